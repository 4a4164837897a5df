"""The VAE: a prior, a likelihood and an encoder joined into a Pyro model and guide."""

import itertools

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.distributions import center
from pyrovae.nn import register

__all__ = ["VAE"]

_count = itertools.count()


class Registered(nn.Module):
    """A module that registers its parameters with Pyro, under a name that no other instance or copy has."""

    def __init__(self):
        super().__init__()
        self.name = f"vae{next(_count)}"

    def __setstate__(self, state):
        # Copies come through here. Pyro's parameter store is global and keyed by name: a copy under the same name
        # would silently train the original's parameters.
        super().__setstate__(state)
        self.name = f"vae{next(_count)}"

    def register(self) -> None:
        """Registers the parameters; every model and guide does so first."""
        register(self.name, self)


class OneLatent(Registered):
    """What VAEs of one latent share: a prior, a likelihood and an encoder that meet, and p(x | z) and p(x) from them."""

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module):
        super().__init__()
        check_equal("latent_dim", prior=prior, likelihood=likelihood, encoder=encoder)
        check_equal("support", prior=prior, encoder=encoder)
        check_contexts(prior=prior, likelihood=likelihood, encoder=encoder)
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder

    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` for z of shape ``(*leading, latent_dim)``."""
        return self.likelihood(z, given(self.likelihood, context))

    @torch.no_grad()
    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Draws whole data from p(x), pixel noise included; for the means call ``decode(prior().sample((n,))).mean``.

        Args:
            num_samples: number of draws; with a context, for each of its rows.
            context: shape ``(batch, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with a context.
        """
        return self.decode(sample_prior(self.prior, num_samples, context), context).sample()

    def check_context(self, context: Tensor | None, x: Tensor) -> None:
        """Raises a ValueError if a context has not one row a datum, or none of the parts takes it."""
        check_context(context, x, any(map(takes_context, (self.prior, self.likelihood, self.encoder))))


class VAE(OneLatent):
    r"""A variational autoencoder as a Pyro model and guide.

    .. math:: p(x, z) = p(z)\, p(x \mid z), \qquad q(z \mid x)

    ``vae.model`` and ``vae.guide`` take ``(x, context=None)`` and go wherever Pyro takes a model and a guide. With a
    context (labels, say, one vector a datum) the same class is a conditional VAE: each part that was built for a
    context sees it. Pyro's own tools take it by position, ``svi.step(x, context)``: Pyro uses the keyword itself.

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`, events of shape ``(latent_dim,)``.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)`.
        encoder: ``encoder(x, context)`` returns :math:`q(z \mid x)`, events of shape ``(latent_dim,)``.

    Raises:
        TypeError: when a part is no module, but a class for example.
        ValueError: when the parts state different latent dimensions, latent spaces, data or context shapes; when a
            context is given that no part takes, or that has not one row a datum.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> from pyrovae import VAE, encoders, likelihoods, priors
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, 64), encoders.DiagonalNormal(64, 2))
    >>> vae.sample(5).shape
    torch.Size([5, 64])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module):
        super().__init__(prior, likelihood, encoder)
        check_equal("x_shape", likelihood=likelihood, encoder=encoder)

    def model(self, x: Tensor, context: Tensor | None = None) -> None:
        """The generative process, with the data observed at site "x" and the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(given(self.prior, context)))
            pyro.sample("x", self.decode(z, context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, context))

    def encode(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`q(z \mid x)`, with ``batch_shape == (batch,)``."""
        return self.encoder(x, given(self.encoder, context))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid z)` at one draw of :math:`z \sim q(z \mid x)`, shaped like x.

        The centre is the mean, or the mode of classes, which have no mean.
        """
        return center(self.decode(self.encode(x, context).sample(), context))


def takes_context(part: nn.Module) -> bool:
    """Whether a part is given the context: if it was built for one, or does not say."""
    return getattr(part, "context_dim", 1) > 0


def given(part: nn.Module, context: Tensor | None) -> Tensor | None:
    """Returns the context for a part that was built for one, None for the others."""
    return context if takes_context(part) else None


def sample_prior(prior: nn.Module, num_samples: int, context: Tensor | None) -> Tensor:
    """Draws latents, for each row of a context if there is one, even if the prior does not depend on it."""
    p = prior(given(prior, context))
    if context is not None:
        p = p.expand(context.shape[:1])
    return p.sample((num_samples,))


def check_context(context: Tensor | None, x: Tensor, taken: bool) -> None:
    """Raises a ValueError if a context has not one row a datum, or none of the parts takes it."""
    check_length("context", context, x)
    if context is not None and not taken:
        raise ValueError(
            f"a context of shape {tuple(context.shape)} was given, but no part takes one. Build the likelihood, say, "
            f"with context_dim={context.shape[-1] if context.dim() else 1}."
        )


def check_length(name: str, given: Tensor | None, x: Tensor) -> None:
    """Raises a ValueError unless an argument has one row a datum; one row would broadcast over all without a word."""
    if given is not None and len(given) != len(x):
        raise ValueError(f"{name} has {len(given)} rows but x has {len(x)}: give one row of {name} a datum.")


def check_contexts(**parts: nn.Module) -> None:
    """Raises a ValueError when parts that take a context state different widths of it."""
    check_equal("context_dim", **{name: part for name, part in parts.items() if getattr(part, "context_dim", 0)})


def check_equal(attribute: str, **parts: nn.Module) -> None:
    """Raises a ValueError when parts state different values of an attribute, a TypeError when one is no part."""
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            raise TypeError(f"{name} must be a module, got {part!r}. Build a class with its arguments first.")
    stated = {name: getattr(part, attribute) for name, part in parts.items() if hasattr(part, attribute)}
    if len({repr(value) for value in stated.values()}) > 1:
        listing = ", ".join(f"{name} has {value}" for name, value in stated.items())
        raise ValueError(f"The parts of a VAE must agree on {attribute}: {listing}.")
