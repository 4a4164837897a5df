"""The VAE: a prior, a likelihood and an encoder joined into a Pyro model and guide."""

import copy
import itertools
from abc import ABC, abstractmethod
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.distributions import center
from pyrovae.encoders import Encoder
from pyrovae.nn import register
from pyrovae.nn.base import ShapedNetwork
from pyrovae.parts import (
    call,
    check_context,
    check_contexts,
    check_equal,
    check_roles,
    check_spaces,
    check_vectors,
    in_evaluation_mode,
    likelihood_at,
    sample_prior,
)
from pyrovae.recorded import Recorded

__all__ = ["VAE"]

_count = itertools.count()


class Registered(Recorded, ABC):
    """Base of the VAEs: it registers its parameters with Pyro, under a name that is unique to each copy."""

    def __init__(self) -> None:
        super().__init__()
        self.name = f"vae{next(_count)}"

    def __getstate__(self) -> dict[str, Any]:
        # Pyro adds a weak reference to every registered parameter, which cannot be pickled. deepcopy leaves it out.
        return copy.deepcopy(self.__dict__, {id(self): self})

    def __copy__(self) -> "Registered":
        made = type(self).__new__(type(self))
        made.__setstate__(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "Registered":
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Every copy gets a new name. Pyro's parameter store is global and keyed by name: training a copy with the same
        # name would silently train the parameters of the original.
        super().__setstate__(state)
        self.name = f"vae{next(_count)}"

    @abstractmethod
    def model(self, *args: Any) -> None:
        """The generative process."""

    @abstractmethod
    def guide(self, *args: Any) -> None:
        """The approximate posterior."""

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The type to which data are converted; None where a network of the user's own may need them as they are."""
        encoders = [part for part in self.modules() if isinstance(part, Encoder)]
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
        if len(dtypes) != 1 or not encoders or not all(isinstance(part.network, ShapedNetwork) for part in encoders):
            return None
        return dtypes.pop()

    def register(self) -> None:
        """Registers the parameters with Pyro; every model and guide calls this first."""
        register(self.name, self)


class OneLatent(Registered):
    r"""Base of VAEs with one latent: it checks that the parts fit, and gives :math:`p(x \mid z)` and draws of x.

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)`.
        encoder: the encoder.
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module):
        super().__init__()
        check_roles(prior=prior, likelihood=likelihood, encoder=encoder)
        check_equal("latent_dim", prior=prior, likelihood=likelihood, encoder=encoder)
        check_spaces(prior=prior, encoder=encoder)
        check_contexts(prior=prior, likelihood=likelihood, encoder=encoder)
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder

    @in_evaluation_mode
    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` for z of shape ``(*leading, latent_dim)``.

        Runs in evaluation mode, with gradients; inside a Pyro model, in the current mode.
        """
        return likelihood_at(self.likelihood, z, context)

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Draws from p(x), with the noise of the likelihood; for means call ``decode(prior().sample((n,))).mean``.

        Runs in evaluation mode, which is restored afterwards.

        Args:
            num_samples: number of draws; with a context, number for each of its rows.
            context: shape ``(batch, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with a context.
        """
        return self.decode_from_prior(num_samples, context).sample()

    @torch.no_grad()
    @in_evaluation_mode
    def decode_from_prior(self, num_samples: int, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` at draws of z from the prior: as :meth:`sample`, before x is drawn."""
        check_vectors(context, self.prior, self.likelihood)
        return self.decode(sample_prior(self.prior, num_samples, context), context)

    def check_context(self, context: Tensor | None, x: Tensor) -> None:
        """Raises a ValueError if a context is not one vector a datum, or no part takes it."""
        check_context(context, x, self.prior, self.likelihood, self.encoder)


class VAE(OneLatent):
    r"""A variational autoencoder as a Pyro model and guide.

    .. math:: p(x, z) = p(z)\, p(x \mid z), \qquad q(z \mid x)

    ``vae.model`` and ``vae.guide`` take ``(x, context=None)`` and work wherever Pyro takes a model and a guide. With a
    context (one vector a datum, such as one-hot labels) the same class is a conditional VAE: each part that was built
    for a context gets it. Give it to Pyro's own tools by position, ``svi.step(x, context)``, because Pyro uses the
    keyword itself.

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`, events of shape ``(latent_dim,)``.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)`.
        encoder: ``encoder(x, context)`` returns :math:`q(z \mid x)`, events of shape ``(latent_dim,)``.

    Raises:
        TypeError: when a part is not a module (but a class, for example), or its ``forward`` takes other arguments (for
            example, because the parts are in the wrong order); when a part returns something other than a distribution
            of Pyro's.
        ValueError: when the parts have different latent dimensions, latent spaces, data or context shapes; when a
            context is given that no part takes, that does not have one row a datum, or whose rows are numbers (labels),
            not vectors.

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
            z = pyro.sample("z", call(self.prior, context=context))
            pyro.sample("x", self.decode(z, context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, context))

    @in_evaluation_mode
    def encode(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`q(z \mid x)`, with ``batch_shape == (batch,)``.

        Runs in evaluation mode, with gradients; inside a Pyro guide, in the current mode.
        """
        return call(self.encoder, x, context=context)

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid z)` at one draw of :math:`z \sim q(z \mid x)`, shaped like x.

        The centre is the mean, or for classes, which have no mean, the mode.
        """
        return center(self.decode(self.encode(x, context).sample(), context))
