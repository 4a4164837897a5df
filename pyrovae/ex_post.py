"""Priors fitted after training, to the latents of a trained encoder."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyrovae.arguments import Arguments, as_arguments
from pyrovae.nn import register
from pyrovae.parts import call
from pyrovae.training import fit
from pyrovae.vae import VAE

__all__ = ["fit_prior"]


def fit_prior(vae: VAE, data: Any, prior: nn.Module, *, transform: Callable | None = None, **options: Any) -> VAE:
    r"""Returns a VAE with another prior, fitted to the latents that the encoder of a trained one gives.

    .. math:: \max_{p} \; \frac{1}{N} \sum_{n=1}^N \mathrm{E}_{q(z \mid x_n)} \log p(z)

    Encoder and likelihood stay as they are. The ELBO of each datum changes by
    :math:`\mathrm{E}_{q(z \mid x)}[\log p_\text{new}(z) - \log p_\text{old}(z)]`. That of the training data rises if
    the new prior fits their latents better than the old one; log p(x) follows as a rule, but this is not certain. A
    prior with many parameters may fit the training data alone: give `validation` and `patience`. Latents are drawn anew
    in every epoch.

    Args:
        vae: the trained VAE, which is left as it is.
        data: training data, as for :func:`pyrovae.fit`.
        prior: the prior at its start, which is left as it is. Of a :class:`pyrovae.priors.VampPrior` of the encoder of
            `vae`, the pseudo-inputs are fitted.
        transform: called with every batch before it is encoded, as for :func:`pyrovae.fit`.
        **options: other arguments of :func:`pyrovae.fit`, but for `loss`.

    Returns:
        A VAE with the fitted prior, and copies of the likelihood and the encoder.

    Raises:
        TypeError: when `vae` is not a :class:`pyrovae.VAE`, or a loss is given.
        ValueError: when the prior has no parameters of its own, or does not fit the encoder; as :func:`pyrovae.fit`.

    References:
        From Variational to Deterministic Autoencoders, P. Ghosh, M. S. M. Sajjadi, A. Vergari, M. Black and
        B. Schölkopf, 2020, https://arxiv.org/abs/1903.12436 (there for autoencoders without a prior).

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> mixture = fit_prior(vae, torch.randn(100, 3), priors.GaussianMixture(2), epochs=3, progress=False)
    >>> mixture.prior
    GaussianMixture(latent_dim=2, num_components=10)
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"vae must be a VAE of one level of latents, got a {type(vae).__name__}.")
    if "loss" in options:
        raise TypeError("fit_prior takes no loss: it maximises the mean of log p(z). Leave it out.")
    made = copy.deepcopy(VAE(prior, vae.likelihood, vae.encoder))  # as one, because the prior may hold the encoder
    fixed = [*made.likelihood.parameters(), *made.encoder.parameters()]
    needed = [p.requires_grad for p in fixed]
    for p in fixed:
        p.requires_grad_(False)
    latents = _Latents(made, transform)
    if not any(p.requires_grad for p in made.parameters()):
        raise ValueError(
            f"prior has no parameters to fit: {type(prior).__name__}. Give another one, such as priors.GaussianMixture."
        )
    made.eval()
    fit(latents.model, latents.guide, data, transform=latents.draw, **options)
    for p, needs in zip(fixed, needed, strict=True):
        p.requires_grad_(needs)
    return made


class _Latents(nn.Module):
    """A prior as a model of data: latents that an encoder gives.

    Args:
        vae: the VAE that both belong to.
        transform: called with every batch before it is encoded.
    """

    def __init__(self, vae: VAE, transform: Callable | None):
        super().__init__()
        self.vae, self.transform = vae, transform

    @property
    def input_dtype(self) -> torch.dtype | None:
        return self.vae.input_dtype

    def model(self, z: Tensor, context: Tensor | None = None) -> None:
        register(self.vae.name, self.vae)
        with pyro.plate("data", len(z)):
            pyro.sample("z", call(self.vae.prior, context=context), obs=z)

    def guide(self, z: Tensor, context: Tensor | None = None) -> None:
        """Has no latents: z is observed."""

    @torch.no_grad()
    def draw(self, *args: Any) -> Arguments:
        """Returns latents of a batch, drawn from the encoder, and its context."""
        if self.transform is not None:
            args = as_arguments(self.transform(*args)).args
        x, *context = args
        return Arguments(self.vae.encode(x, *context).sample(), *context)
