"""The VAE: a prior, a likelihood and an encoder joined into a Pyro model and guide."""

import copy
import itertools
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyrovae.distributions import center
from pyrovae.encoders import Encoder
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import innermost
from pyrovae.likelihoods import Likelihood
from pyrovae.nn import register
from pyrovae.priors import Prior

__all__ = ["VAE"]

_count = itertools.count()


def in_evaluation_mode(method: Callable) -> Callable:
    """Has a method that is for users run in evaluation mode, without dropout, whatever the mode is, which is put back.

    Inside of Pyro's handlers it runs in the mode that there is: there it is a piece of a model that is trained, or scored.
    """

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if am_i_wrapped():
            return method(*args, **kwargs)
        with evaluation_mode():
            return method(*args, **kwargs)

    return run


class Registered(nn.Module):
    """A module that registers its parameters with Pyro, under a name that no other instance or copy has."""

    def __init__(self):
        super().__init__()
        self.name = f"vae{next(_count)}"

    def __getstate__(self):
        # Pyro leaves a weak reference on every parameter that it knows, which cannot be pickled. Copies are without.
        return copy.deepcopy(self.__dict__, {id(self): self})

    def __copy__(self):
        made = type(self).__new__(type(self))
        made.__setstate__(self.__dict__)
        return made

    def __deepcopy__(self, memo):
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

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
        check_roles(prior=prior, likelihood=likelihood, encoder=encoder)
        check_equal("latent_dim", prior=prior, likelihood=likelihood, encoder=encoder)
        check_spaces(prior=prior, encoder=encoder)
        check_contexts(prior=prior, likelihood=likelihood, encoder=encoder)
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder

    @in_evaluation_mode
    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` for z of shape ``(*leading, latent_dim)``.

        In evaluation mode, with gradients; inside of a Pyro model that is trained, in the mode of training.
        """
        return likelihood_at(self.likelihood, z, context)

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Draws whole data from p(x), pixel noise included; for the means call ``decode(prior().sample((n,))).mean``.

        In evaluation mode, which is put back after, as all that draws or encodes.

        Args:
            num_samples: number of draws; with a context, for each of its rows.
            context: shape ``(batch, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with a context.
        """
        check_vectors(context, self.prior, self.likelihood)
        return self.decode(sample_prior(self.prior, num_samples, context), context).sample()

    def check_context(self, context: Tensor | None, x: Tensor) -> None:
        """Raises a ValueError if a context has not one row a datum, or none of the parts takes it."""
        check_context(context, x, self.prior, self.likelihood, self.encoder)


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
        TypeError: when a part is no module, but a class for example, or cannot be called as it would be, as where parts are
            in another order; when one returns no distribution of Pyro's.
        ValueError: when the parts state different latent dimensions, latent spaces, data or context shapes; when a
            context is given that no part takes, that has not one row a datum, or whose rows are no vectors, as labels are.

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

        In evaluation mode, with gradients; inside of a Pyro guide that is trained, in the mode of training.
        """
        return call(self.encoder, x, context=context)

    @torch.no_grad()
    @in_evaluation_mode
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


def call(part: nn.Module, *inputs: Tensor, context: Tensor | None) -> dist.TorchDistribution:
    """Returns the distribution of a part; raises a TypeError if it is none of Pyro's."""
    p = part(*inputs, given(part, context))
    if not isinstance(p, dist.Distribution):
        name, kind = type(part).__name__, type(p).__name__
        if isinstance(p, torch.distributions.Distribution):
            raise TypeError(
                f"{name} returned torch's {kind}, which Pyro cannot sample. Take it from pyro.distributions, which has the "
                "same distributions by the same names; derive one of your own from pyro.distributions.TorchDistribution."
            )
        raise TypeError(f"{name} must return a distribution of pyro.distributions, but returned a {kind}.")
    return p


def likelihood_at(likelihood: nn.Module, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
    r"""Returns :math:`p(x \mid z)`; raises a ValueError if its shape shows that it mixed up latents of different data."""
    p = call(likelihood, z, context=context)
    leading = z.shape[:-1]
    if (
        p.batch_shape == leading
        or not hasattr(likelihood, "latent_dim")
        and p.batch_shape == z.shape[: len(p.batch_shape)]
    ):
        return p  # the latter, for latents of one's own may be matrices
    if context is not None and takes_context(likelihood):
        leading = torch.broadcast_shapes(leading, context.shape[:-1])
    kept = zip(p.batch_shape[::-1], leading[::-1], strict=False)
    if len(p.batch_shape) > len(leading) or any(ours not in (1, theirs) for ours, theirs in kept):
        raise ValueError(
            f"{type(likelihood).__name__} returned a distribution of batch shape {tuple(p.batch_shape)} for z of shape "
            f"{tuple(z.shape)}, but must keep all dimensions of z but the last, {tuple(leading)}: there may be several. In its "
            "network write h.reshape(*h.shape[:-1], ...) in place of h.view(-1, ...), h.flatten(-3) in place of h.flatten(1); "
            "declare the dimensions of a datum by .to_event(n)."
        )
    return p


def sample_prior(prior: nn.Module, num_samples: int, context: Tensor | None) -> Tensor:
    """Draws latents, for each row of a context if there is one, even if the prior does not depend on it."""
    p = call(prior, context=context)
    if context is not None:
        p = p.expand(context.shape[:1])
    return p.sample((num_samples,))


def check_context(context: Tensor | None, x: Tensor, *parts: nn.Module) -> None:
    """Raises a ValueError if a context has not one row a datum, is no vector, or none of the parts takes it."""
    if context is None:
        return
    check_length("context", context, x)
    check_vectors(context, *parts)
    if not any(map(takes_context, parts)):
        raise ValueError(
            f"a context of shape {tuple(context.shape)} was given, but no part takes one. Build the likelihood, say, "
            f"with context_dim={context.shape[-1]}; or leave the context out, by fit(..., transform=lambda x, context: x)."
        )


def check_vectors(context: Tensor | None, *parts: nn.Module) -> None:
    """Raises a ValueError if a context is one number a datum, and a part takes vectors or none takes numbers."""
    if context is None or context.dim() != 1:
        return
    others = [part for part in parts if not getattr(part, "takes_numbers", False)]
    stated = [part.context_dim for part in others if hasattr(part, "context_dim")]
    if any(stated) or len(stated) == len(parts):
        raise ValueError(
            f"context has shape {tuple(context.shape)}, one number a datum, but must hold one vector a datum, shape (batch, "
            "context_dim). Are they labels? To leave them out, call fit(..., transform=lambda x, labels: x); to condition on "
            "them, give torch.nn.functional.one_hot(labels, num_classes).float() and build parts with "
            "context_dim=num_classes. Of numbers make vectors by context.unsqueeze(-1)."
        )


def check_length(name: str, given: Tensor | None, x: Tensor) -> None:
    """Raises a ValueError unless an argument has one row a datum; one row would broadcast over all without a word."""
    if given is not None and len(given) != len(x):
        raise ValueError(f"{name} has {len(given)} rows but x has {len(x)}: give one row of {name} a datum.")


def check_contexts(**parts: nn.Module) -> None:
    """Raises a ValueError when parts that take a context state different widths of it."""
    check_equal("context_dim", **{name: part for name, part in parts.items() if getattr(part, "context_dim", 0)})


# What a part is called with, by what it is.
_FORWARDS = {
    "prior": "context=None",
    "conditional": "z, context=None",
    "likelihood": "z, context=None",
    "encoder": "x, context=None",
}


def check_roles(**parts: nn.Module) -> None:
    """Raises a TypeError when a part cannot be what it was given for.

    Args:
        **parts: by what they are, followed by a number in brackets where there are several.
    """
    listing = ", ".join(f"{name} is {type(part).__name__}" for name, part in parts.items())
    order = f"Were the parts given in another order? Here {listing}."
    for name, part in parts.items():
        check_module(name, part)
        role = name.partition("[")[0].removesuffix("s")
        # Likelihoods and encoders both map a vector to a distribution: one may be in the other's place.
        if isinstance(part, (Likelihood, Encoder) if role == "prior" else Prior) or not _takes(part, role):
            raise TypeError(
                f"{name} must have a forward that takes ({_FORWARDS[role]}), and {type(part).__name__} has another. {order}"
            )
    if isinstance(parts.get("likelihood"), Encoder) and isinstance(parts.get("encoder"), Likelihood):
        raise TypeError(f"likelihood and encoder must be one of each, in this order. {order}")


def _takes(part: nn.Module, role: str) -> bool:
    """Returns whether a forward can be called as the role asks for, so far as its signature says."""
    try:
        taken = signature(part.forward)
    except (TypeError, ValueError):  # not written in Python
        return True
    try:
        taken.bind(*[None] * (1 if role == "prior" else 2))
    except TypeError:
        return False
    by_place = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in taken.parameters.items() if parameter.kind in by_place]
    return role != "prior" or "context" not in names[1:]


# Parts of the library over each space, by the class of what a single number or vector in it satisfies.
_OVER = {
    type(constraints.real): ("priors.StandardNormal or priors.VampPrior", "encoders.DiagonalNormal"),
    type(constraints.sphere): ("priors.HypersphericalUniform", "encoders.VonMisesFisher"),
    type(constraints.simplex): ("priors.LogisticNormal or priors.Dirichlet", "encoders.LogisticNormal"),
    type(constraints.one_hot): ("priors.OneHotCategorical", "encoders.OneHotCategorical"),
    type(constraints.integer_interval(0, 1)): ("priors.Categorical", "encoders.Categorical"),
}


def check_spaces(**parts: nn.Module) -> None:
    """Raises a ValueError when a prior and an encoder state different spaces, which names parts over each of them."""
    try:
        check_equal("support", **parts)
    except ValueError as error:
        (_, prior), (name, encoder) = parts.items()
        over = [_OVER.get(type(innermost(part.support))) for part in (prior, encoder)]
        if over[0] == over[1]:
            advice = ["Build both with the same latent_dim and the same number of classes."]
        else:
            advice = [f"Beside this prior goes {over[0][1]}." if over[0] else ""]
            advice += [f"Beside this {name} goes {over[1][0]}." if over[1] else ""]
        raise ValueError(" ".join([str(error), *filter(None, advice)])) from None


def check_module(name: str, part: Any) -> None:
    """Raises a TypeError if something given for a part is none, but a class for example."""
    if not isinstance(part, nn.Module):
        raise TypeError(f"{name} must be a module, got {part!r}. Build a class with its arguments first.")


def check_equal(attribute: str, **parts: nn.Module) -> None:
    """Raises a ValueError when parts state different values of an attribute, a TypeError when one is no part."""
    for name, part in parts.items():
        check_module(name, part)
    stated = {name: getattr(part, attribute) for name, part in parts.items() if hasattr(part, attribute)}
    if len({repr(value) for value in stated.values()}) > 1:
        listing = ", ".join(f"{name} has {value}" for name, value in stated.items())
        raise ValueError(f"The parts of a VAE must agree on {attribute}: {listing}.")
