"""Shared by the benchmarks: data, and two VAEs in pyrovae, in plain PyTorch and in pythae.

One is the MLP VAE 784-400-20-400-784, the other has convolutions of 32 and 64 channels; both have Bernoulli pixels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae import nn as networks

PIXELS, HIDDEN, LATENT = 784, 400, 20
IMAGE = (1, 28, 28)


def binary_images(size: int) -> Tensor:
    """Draws binary images with two latent factors, shape ``(size, 784)``."""
    loadings = 0.3 * torch.randn(2, PIXELS)
    return torch.bernoulli((torch.randn(size, 2) @ loadings).sigmoid())


def pyrovae_vae(pixels: int = PIXELS, latent_dim: int = LATENT) -> VAE:
    """Returns the VAE with pyrovae's default networks, which have one hidden layer of 400."""
    likelihood, encoder = likelihoods.Bernoulli(latent_dim, pixels), encoders.DiagonalNormal(pixels, latent_dim)
    return VAE(priors.StandardNormal(latent_dim), likelihood, encoder)


def convolutional_vae() -> VAE:
    """Returns the VAE with pyrovae's strided convolutions."""
    likelihood = likelihoods.Bernoulli(LATENT, IMAGE, networks.DeconvNet)
    return VAE(priors.StandardNormal(LATENT), likelihood, encoders.DiagonalNormal(IMAGE, LATENT, networks.ConvNet))


def plain_layers(vae: VAE) -> tuple[nn.Sequential, nn.Sequential]:
    """Returns encoder and decoder of a VAE as plain sequences of layers that share its weights."""
    encoder, decoder = vae.encoder.network, vae.likelihood.network
    if isinstance(encoder, networks.ConvNet):
        return nn.Sequential(*encoder.layers, encoder.head), nn.Sequential(decoder.foot, *decoder.layers)
    return nn.Sequential(*encoder.layers), nn.Sequential(*decoder.layers)


def scale_of(raw: Tensor) -> Tensor:
    """Returns standard deviations as :class:`pyrovae.encoders.DiagonalNormal` makes them."""
    return F.softplus(raw + math.log(math.e - 1)) + 1e-6


class ByHand(nn.Module):
    """The loss of a VAE in plain PyTorch, with the networks of a pyrovae VAE.

    With one particle it is the negative ELBO with the KL divergence in closed form, with more the negative IWAE bound.
    """

    def __init__(self, vae: VAE, particles: int = 1):
        super().__init__()
        self.encoder, self.decoder = plain_layers(vae)
        self.particles = particles

    def forward(self, x: Tensor) -> Tensor:
        loc, raw = self.encoder(x).chunk(2, dim=-1)
        scale = scale_of(raw)
        if self.particles == 1:
            z = loc + scale * torch.randn_like(loc)
            reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
            kl = (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum()
            return (reconstruction + kl) / len(x)
        noise = torch.randn(self.particles, *loc.shape, device=x.device)
        z = loc + scale * noise
        logits = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        reconstruction = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        log_ratio = (0.5 * (noise.square() - z.square()) + scale.log()).sum(-1)
        log_w = log_ratio - reconstruction.flatten(2).sum(-1)
        return math.log(self.particles) - log_w.logsumexp(0).mean()


def pythae_vae(vae: VAE, particles: int = 1) -> nn.Module:
    """Returns pythae's VAE, or its IWAE, with the networks of a pyrovae VAE; they share its weights."""
    # Imported here, so that measurements of memory without pythae do not include it.
    from pythae.models import IWAE, IWAEConfig, VAEConfig
    from pythae.models import VAE as PythaeVAE
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    encoder, decoder = plain_layers(vae)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.network = encoder

        def forward(self, x: Tensor) -> ModelOutput:
            loc, raw = self.network(x).chunk(2, dim=-1)
            return ModelOutput(embedding=loc, log_covariance=2 * scale_of(raw).log())

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network = decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    shared = {
        "input_dim": tuple(vae.likelihood.x_shape),
        "latent_dim": vae.likelihood.latent_dim,
        "reconstruction_loss": "bce",
    }
    if particles == 1:
        return PythaeVAE(VAEConfig(**shared), encoder=Encoder(), decoder=Decoder())
    return IWAE(IWAEConfig(**shared, number_samples=particles), encoder=Encoder(), decoder=Decoder())
