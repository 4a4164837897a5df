"""The VAE: a prior, a likelihood and an encoder joined into a Pyro model and guide."""

import itertools

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

__all__ = ["VAE"]

_count = itertools.count()


class VAE(nn.Module):
    r"""A variational autoencoder as a Pyro model and guide.

    .. math:: p(x, z) = p(z)\, p(x \mid z), \qquad q(z \mid x)

    ``vae.model`` and ``vae.guide`` take ``(x, context=None)`` and go wherever Pyro takes a model and a guide. With a
    context (labels, say, one vector a datum) all three parts see it, and the same class is a conditional VAE. Pyro's own
    tools take it by position, ``svi.step(x, context)``: Pyro uses the keyword itself.

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`, events of shape ``(latent_dim,)``.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)`.
        encoder: ``encoder(x, context)`` returns :math:`q(z \mid x)`, events of shape ``(latent_dim,)``.

    Raises:
        ValueError: when the parts state different latent dimensions or data shapes.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> from pyrovae import VAE, encoders, likelihoods, priors
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, 64), encoders.DiagonalNormal(64, 2))
    >>> vae.sample(5).shape
    torch.Size([5, 64])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module):
        super().__init__()
        _check_equal("latent_dim", prior=prior, likelihood=likelihood, encoder=encoder)
        _check_equal("x_shape", likelihood=likelihood, encoder=encoder)
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder
        self.name = f"vae{next(_count)}"

    def __setstate__(self, state):
        # Copies come through here. Pyro's parameter store is global and keyed by name: a copy under the same name
        # would silently train the original's parameters.
        super().__setstate__(state)
        self.name = f"vae{next(_count)}"

    def model(self, x: Tensor, context: Tensor | None = None) -> None:
        """The generative process, with the data observed at site "x" and the latents at site "z"."""
        self._register()
        _check_length(x, context)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(context))
            pyro.sample("x", self.likelihood(z, context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents at site "z"."""
        self._register()
        _check_length(x, context)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x, context))

    def _register(self) -> None:
        # What pyro.module does, without its warning at every call for each parameter that is frozen on purpose.
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"{self.name}$$${name}", parameter)

    def encode(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`q(z \mid x)`, with ``batch_shape == (batch,)``."""
        return self.encoder(x, context)

    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` for z of shape ``(*leading, latent_dim)``."""
        return self.likelihood(z, context)

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Draws from p(x), pixel noise included; for the mean images call ``decode(prior().sample((n,))).mean``.

        Args:
            num_samples: number of draws; with a context, for each of its rows.
            context: shape ``(batch, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with a context.
        """
        prior = self.prior(context)
        if context is not None:  # a prior may ignore its context; draw for each of its rows all the same
            prior = prior.expand(context.shape[:-1])
        return self.decode(prior.sample((num_samples,)), context).sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the mean of :math:`p(x' \mid z)` at one draw of :math:`z \sim q(z \mid x)`, shaped like x."""
        return self.decode(self.encode(x, context).sample(), context).mean


def _check_length(x: Tensor, context: Tensor | None) -> None:
    # One context would broadcast over all data without a word.
    if context is not None and len(context) != len(x):
        raise ValueError(f"context has {len(context)} rows but x has {len(x)}: give one context a datum.")


def _check_equal(attribute: str, **parts: nn.Module) -> None:
    stated = {name: getattr(part, attribute) for name, part in parts.items() if hasattr(part, attribute)}
    if len(set(stated.values())) > 1:
        listing = ", ".join(f"{name} has {value}" for name, value in stated.items())
        raise ValueError(f"The parts of a VAE must agree on {attribute}: {listing}.")
