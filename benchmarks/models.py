"""What the benchmarks have in common: the data, and the MLP VAE 784-400-20-400-784 in pyrovae and in pythae."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae import VAE, encoders, likelihoods, priors

PIXELS, HIDDEN, LATENT = 784, 400, 20


def binary_images(size: int) -> Tensor:
    """Draws binary images that vary along two factors, so that there is something to learn; shape ``(size, 784)``."""
    loadings = 0.3 * torch.randn(2, PIXELS)
    return torch.bernoulli((torch.randn(size, 2) @ loadings).sigmoid())


def pyrovae_vae() -> VAE:
    """Returns the VAE with pyrovae's default networks, which have one hidden layer of 400."""
    likelihood, encoder = likelihoods.Bernoulli(LATENT, PIXELS), encoders.DiagonalNormal(PIXELS, LATENT)
    return VAE(priors.StandardNormal(LATENT), likelihood, encoder)


def pythae_vae(vae: VAE) -> nn.Module:
    """Returns pythae's VAE around the networks of ours: the same weights, in the same memory."""
    from pythae.models import VAE as PythaeVAE  # here, so that it adds nothing to the memory of who does without
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.network = vae.encoder.network

        def forward(self, x: Tensor) -> ModelOutput:
            loc, raw = self.network(x).chunk(2, dim=-1)
            scale = softplus(raw + math.log(math.e - 1)) + 1e-6  # as in pyrovae.encoders.DiagonalNormal
            return ModelOutput(embedding=loc, log_covariance=2 * scale.log())

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network = vae.likelihood.network

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    config = VAEConfig(input_dim=(PIXELS,), latent_dim=LATENT, reconstruction_loss="bce")
    return PythaeVAE(config, encoder=Encoder(), decoder=Decoder())
