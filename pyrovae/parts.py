"""How models call their parts, and the checks that parts fit each other and the context."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar, cast

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyrovae.arguments import as_tensors
from pyrovae.distributions.spaces import innermost
from pyrovae.encoders import Encoder
from pyrovae.inference.running import evaluation_mode
from pyrovae.likelihoods import Likelihood
from pyrovae.nn.base import check_count
from pyrovae.priors import Prior
from pyrovae.rows import number_type

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_evaluation_mode(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a method for users: it runs in evaluation mode (without dropout), and the mode is restored afterwards.

    Arrays become tensors, of the type that the networks take. Inside Pyro's handlers it runs in the current mode and
    with what it is given, because there it is part of a model that is trained or scored.
    """
    takes_data = "x" in signature(method).parameters

    @wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if am_i_wrapped():
            return method(*args, **kwargs)
        numbers = number_type(args[0])  # type: ignore[arg-type]  # of the VAE
        numbers = numbers if takes_data else numbers._replace(converts=False)
        given, named = as_tensors(args[1:], kwargs, numbers)
        with evaluation_mode():
            return method(args[0], *given, **named)  # type: ignore[arg-type]

    return run


def takes_context(part: nn.Module) -> bool:
    """Returns whether a part is called with the context: it was built for one, or has no `context_dim`."""
    return getattr(part, "context_dim", 1) > 0


def call(part: nn.Module, *inputs: Tensor, context: Tensor | None) -> dist.TorchDistribution:
    """Returns the distribution that a part returns.

    Args:
        part: a prior, a likelihood or an encoder.
        *inputs: z for a likelihood, x for an encoder, nothing for a prior.
        context: shape ``(batch, context_dim)``, or None; a part that was built without one gets None.

    Raises:
        TypeError: when the part returns something other than a distribution of Pyro's.
    """
    p = part(*inputs, context if takes_context(part) else None)
    if not isinstance(p, dist.Distribution):
        name, kind = type(part).__name__, type(p).__name__
        if isinstance(p, torch.distributions.Distribution):
            raise TypeError(
                f"{name} returned torch's {kind}, which Pyro cannot sample. Import it from pyro.distributions, which "
                "has the same names; derive your own distributions from pyro.distributions.TorchDistribution."
            )
        raise TypeError(f"{name} must return a distribution of pyro.distributions, but returned a {kind}.")
    return cast(dist.TorchDistribution, p)  # Pyro's Normal, say, has the methods but is no subclass


def likelihood_at(likelihood: nn.Module, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
    r"""Returns :math:`p(x \mid z)` for z of shape ``(*leading, latent_dim)``.

    Raises:
        ValueError: when the batch shape does not broadcast with `leading`: the network mixes different data.
    """
    p = call(likelihood, z, context=context)
    leading = z.shape[:-1]
    if p.batch_shape == leading:
        return p
    if not hasattr(likelihood, "latent_dim") and p.batch_shape == z.shape[: len(p.batch_shape)]:
        return p  # a likelihood of the user's own may take latents that are matrices
    if context is not None and takes_context(likelihood):
        leading = torch.broadcast_shapes(leading, context.shape[:-1])
    pairs = zip(p.batch_shape[::-1], leading[::-1], strict=False)
    if len(p.batch_shape) > len(leading) or any(size not in (1, expected) for size, expected in pairs):
        raise ValueError(
            f"{type(likelihood).__name__} returned a distribution of batch shape {tuple(p.batch_shape)} for z of shape "
            f"{tuple(z.shape)}, but must keep all dimensions of z except the last, {tuple(leading)}: there may be "
            "several. In its network write h.reshape(*h.shape[:-1], ...) in place of h.view(-1, ...), and "
            "h.flatten(-3) in place of h.flatten(1). Declare the dimensions of a datum with .to_event(n)."
        )
    return p


def sample_prior(prior: nn.Module, num_samples: int, context: Tensor | None) -> Tensor:
    """Draws latents; with a context, for each of its rows, even if the prior does not depend on it."""
    check_count(num_samples, "num_samples", 0)
    p = call(prior, context=context)
    if context is not None:
        p = p.expand(context.shape[:1])
    return p.sample((num_samples,))


def check_roles(**parts: nn.Module) -> None:
    """Raises a TypeError when a part does not fit its role.

    Args:
        **parts: parts by role ("prior", "likelihood", "encoder"), with an index in brackets where there are several.
    """
    listing = ", ".join(f"{name} is {type(part).__name__}" for name, part in parts.items())
    order = f"Are the parts in the wrong order? Here {listing}."
    for name, part in parts.items():
        check_module(name, part)
        role = name.partition("[")[0].removesuffix("s")
        # An encoder may be a likelihood, as in a hierarchy, and the other way round: both map vectors to distributions.
        if isinstance(part, (Likelihood, Encoder) if role == "prior" else Prior) or not _takes(part, role):
            raise TypeError(
                f"{name} must have a forward that takes ({_FORWARDS[role]}), but that of {type(part).__name__} takes "
                f"other arguments. {order}"
            )
    if isinstance(parts.get("likelihood"), Encoder) and isinstance(parts.get("encoder"), Likelihood):
        raise TypeError(f"likelihood and encoder are interchanged. {order}")


# The arguments of a part's forward, by its role.
_FORWARDS = {
    "prior": "context=None",
    "conditional": "z, context=None",
    "likelihood": "z, context=None",
    "encoder": "x, context=None",
}


def _takes(part: nn.Module, role: str) -> bool:
    """Returns whether the signature of a part's forward fits its role."""
    try:
        forward = signature(part.forward)
    except (TypeError, ValueError):  # not written in Python
        return True
    try:
        forward.bind(*[None] * (1 if role == "prior" else 2))
    except TypeError:
        return False
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in forward.parameters.items() if parameter.kind in positional]
    return role != "prior" or "context" not in names[1:]


def check_module(name: str, part: Any) -> None:
    """Raises a TypeError if a part is not a module, but a class for example."""
    if not isinstance(part, nn.Module):
        raise TypeError(f"{name} must be a module, got {part!r}. Build a class with its arguments first.")


def check_equal(attribute: str, **parts: nn.Module) -> None:
    """Raises a ValueError when parts have different values of an attribute, a TypeError when one is not a module."""
    for name, part in parts.items():
        check_module(name, part)
    stated = {name: getattr(part, attribute) for name, part in parts.items() if hasattr(part, attribute)}
    if len({repr(value) for value in stated.values()}) > 1:
        listing = ", ".join(f"{name} has {value}" for name, value in stated.items())
        raise ValueError(f"The parts of a VAE must agree on {attribute}: {listing}.")


def check_spaces(**parts: nn.Module) -> None:
    """Raises a ValueError when a prior and an encoder have different supports; it names parts that fit each of them."""
    try:
        check_equal("support", **parts)
    except ValueError as error:
        (_, prior), (name, encoder) = parts.items()
        supports: list[Any] = [prior.support, encoder.support]
        over = [_OVER.get(type(innermost(support))) for support in supports]
        if over[0] == over[1]:
            advice = ["Build both with the same latent_dim and the same number of classes."]
        else:
            advice = [f"With this prior use {over[0][1]}." if over[0] else ""]
            advice += [f"With this {name} use {over[1][0]}." if over[1] else ""]
        raise ValueError(" ".join([str(error), *filter(None, advice)])) from None


# Priors and encoders for each space, by the class of the constraint on one number or vector.
_OVER = {
    type(constraints.real): ("priors.StandardNormal or priors.VampPrior", "encoders.DiagonalNormal"),
    type(constraints.sphere): ("priors.HypersphericalUniform", "encoders.VonMisesFisher"),
    type(constraints.simplex): ("priors.LogisticNormal or priors.Dirichlet", "encoders.LogisticNormal"),
    type(constraints.one_hot): ("priors.OneHotCategorical", "encoders.OneHotCategorical"),
    type(constraints.integer_interval(0, 1)): ("priors.Categorical", "encoders.Categorical"),
}


def check_contexts(**parts: nn.Module) -> None:
    """Raises a ValueError when parts that take a context have different `context_dim`."""
    check_equal("context_dim", **{name: part for name, part in parts.items() if getattr(part, "context_dim", 0)})


def check_context(context: Tensor | None, x: Tensor, *parts: nn.Module) -> None:
    """Raises a ValueError if a context is not one row a datum, is not made of vectors, or no part takes it."""
    if context is None:
        return
    check_length("context", context, x)
    check_vectors(context, *parts)
    if not any(map(takes_context, parts)):
        raise ValueError(
            f"a context of shape {tuple(context.shape)} was given, but no part takes one. Build the likelihood, for "
            f"example, with context_dim={context.shape[-1]}; or leave the context out with "
            "fit(..., transform=lambda x, context: x)."
        )


def context_size(vae: Any) -> int:
    """Returns the number of classes, or of features, that the parts of a VAE take as a context, 0 if they take none."""
    if hasattr(vae, "context_dim"):  # its encoders take the levels above them as a context, too
        return vae.context_dim
    parts = [part for child in vae.children() for part in (child if isinstance(child, nn.ModuleList) else (child,))]
    return max(map(width_of_context, parts), default=0)


def width_of_context(part: Any) -> int:
    """Returns the width of the vectors that a part takes as a context, 0 if it takes none, or the numbers of data."""
    return 0 if getattr(part, "takes_numbers", False) else getattr(part, "context_dim", 0)


def check_vectors(context: Tensor | None, *parts: nn.Module) -> None:
    """Raises a ValueError if a context is one number a datum but the parts take vectors."""
    if context is None or context.dim() != 1:
        return
    others = [part for part in parts if not getattr(part, "takes_numbers", False)]
    stated = [part.context_dim for part in others if hasattr(part, "context_dim")]
    if any(stated) or len(stated) == len(parts):
        raise ValueError(
            f"context has shape {tuple(context.shape)}, one number a datum, but must have one vector a datum, shape "
            "(batch, context_dim). Are they labels? To leave them out, call fit(..., transform=lambda x, labels: x). "
            "To condition on them, give torch.nn.functional.one_hot(labels, num_classes).float() and build parts with "
            "context_dim=num_classes. For numbers give context.unsqueeze(-1)."
        )


def check_length(name: str, given: Tensor | None, x: Tensor) -> None:
    """Raises a ValueError unless an argument has one row a datum; a single row would silently broadcast."""
    if given is not None and len(given) != len(x):
        raise ValueError(f"{name} has {len(given)} rows but x has {len(x)}: give one row of {name} a datum.")
