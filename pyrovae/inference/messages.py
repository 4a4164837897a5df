"""Errors and warnings about data, sites and arguments, each written once."""

import math
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from numbers import Integral
from types import FunctionType
from typing import Any, TypeGuard

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import GammaPoisson, constraints
from pyro.distributions.hmm import HiddenMarkovModel
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from pyrovae.arguments import cuda_devices, row_name, tensors_of
from pyrovae.distributions import Blocks, MaskedElements, grid, open_unit_interval
from pyrovae.distributions.spaces import innermost
from pyrovae.inference.running import traced
from pyrovae.inference.sites import in_support, is_discrete, latents_of_trace, sample_sites, unwrapped
from pyrovae.rows import Rows, is_sparse

_LOST = 0.01  # nats a datum that rounding may take
_COARSE = 0.01  # steps of rounding, in standard deviations of the data, that change a log-density by about as much


# The end of errors about weights per datum.
PER_DATUM = (
    'Put the sites of a datum in pyro.plate("data", len(x)), in the model and in the guide, and draw them from '
    "distributions that have a density"
)


class Untraceable(Exception):
    """Why an objective cannot be compiled to a graph, or should not be."""


def warn(text: str) -> None:
    """Warns, with the line that called the library as the warning's location."""
    frame, level = sys._getframe(1), 2
    inner = ("pyrovae", "pyro", "torch", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer of Python or NumPy; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def described(thing: Any) -> str:
    """Returns the call that builds an object, for its repr: arguments that are attributes, without the defaults.

    Checkpoints hold this text. It must not differ between processes, as the address in the repr of a function does.
    """
    arguments = []
    for name, parameter in signature(type(thing)).parameters.items():
        value = getattr(thing, name, parameter.default)
        is_plain = isinstance(value, (int, float, str, tuple))
        if value is parameter.default or is_plain and value == parameter.default:
            continue
        text = repr(value)
        if isinstance(value, nn.Module):
            text = type(value).__name__
        elif isinstance(value, FunctionType):
            text = value.__qualname__
        arguments.append(f"{name}={text}")
    return f"{type(thing).__name__}({', '.join(arguments)})"


def check_finite(name: str, x: Tensor | Rows) -> None:
    """Raises a ValueError that names the argument and the first bad row if x holds NaN or infinity.

    Rows of an array are read some at a time. Numbers that become infinite, or integers that are no longer exact, in the
    type of the model are refused as well.
    """
    if isinstance(x, Rows):
        check_rows(name, x)
        return
    if x.layout is not torch.strided:
        raise ValueError(
            f"{name} is a sparse tensor. Give x.to_dense(), or a sparse matrix of scipy, whose rows become dense a "
            "batch at a time."
        )
    if not x.is_floating_point() or bool(torch.isfinite(x).all()):
        return
    if x.dim() == 0:
        raise ValueError(f"{name} is {x.item()}. Give a finite number.")
    bad = (~torch.isfinite(x)).reshape(len(x), -1).any(dim=-1)
    raise ValueError(
        f"{name} holds NaN or infinity in {int(bad.sum())} of {len(x)} rows, the first of them row "
        f"{int(bad.nonzero()[0])}. Remove those rows or fill the missing values (under a mask, by any "
        "numbers); or train a MissingDataVAE, with the result of pyrovae.data.split_missing(x) as its data."
    )


def check_rows(name: str, rows: Rows, *, missing: bool = False) -> None:
    """Checks rows of an array as :func:`check_finite`; with `missing`, NaN is allowed, for missing elements."""
    if not rows.dtype.is_floating_point:
        return
    kind = str(rows.dtype).removeprefix("torch.")
    largest = 2 / torch.finfo(rows.dtype).eps  # all smaller integers are exact
    if is_sparse(rows.source):  # zeros need no check, of which there may be far more
        limit = largest if rows.holds_integers else torch.finfo(rows.dtype).max
        stored = rows.source.data
        if max(-float(stored.min(initial=0)), float(stored.max(initial=0))) < limit:  # not if there is NaN
            return
    else:
        _warn_of_rounding(name, rows)
    bad, first = 0, None
    for start, x in rows.chunks():
        if rows.holds_integers and x.numel() and x.abs().max().item() >= largest:
            raise ValueError(
                f"{name} holds integers of {largest:.0f} or more, which {kind} does not represent exactly. Scale them, "
                "or convert the networks to double precision by .double()."
            )
        is_good = torch.isfinite(x) | x.isnan() if missing else torch.isfinite(x)
        if bool(is_good.all()):
            continue
        here = (~is_good).reshape(len(x), -1).any(dim=-1)
        bad += int(here.sum())
        first = start + int(here.nonzero()[0]) if first is None else first
    if first is not None and missing:
        raise ValueError(
            f"{name} holds infinity, or numbers beyond {kind}, in {bad} of {len(rows)} rows, the first of them row "
            f"{first}. Remove those rows, scale them, or write NaN where a value is missing."
        )
    if first is not None:
        raise ValueError(
            f"{name} holds NaN or infinity, or numbers beyond {kind}, in {bad} of {len(rows)} rows, the first of them "
            f"row {first}. Remove those rows or fill the missing values; or train a MissingDataVAE, with the result of "
            "pyrovae.data.split_missing(x) as its data."
        )


def _warn_of_rounding(name: str, rows: Rows) -> None:
    """Warns where rows of double precision vary by little more than they are rounded by in the type of the model."""
    if rows.source.dtype not in (torch.float64, np.float64) or rows.dtype == torch.float64:
        return
    _, x = next(rows.astype(torch.float64).chunks(), (0, torch.empty(0)))  # some megabytes tell
    if len(x) < 2:
        return
    spread = (x - x.nanmean(dim=0)).nan_to_num(0, 0, 0).square().mean(dim=0).sqrt()
    step = torch.finfo(rows.dtype).eps * x.nan_to_num(0, 0, 0).abs().amax(dim=0)
    is_lost = ((step > _COARSE * spread) & (spread > 0)).flatten()
    if not bool(is_lost.any()):
        return
    at = int(is_lost.nonzero()[0])
    kind = str(rows.dtype).removeprefix("torch.")
    warn(
        f"{name} varies by {spread.flatten()[at]:.2g} in element {at} of a row, around numbers that {kind} rounds to "
        f"steps of {step.flatten()[at]:.2g}: the model sees the rounded numbers, and log p(x) is theirs. Subtract the "
        "mean of that element, or convert the model to double precision by .double(), or pass a tensor of float64."
    )


def check_all_observed(trace: poutine.Trace, without: frozenset[str] = frozenset()) -> None:
    """Raises a ValueError if an observed value in a trace does not fit its distribution; skips sites in `without`."""
    for name, site in sample_sites(trace).items():
        if site["is_observed"] and name not in without:
            check_observed(name, site["fn"], site["value"])


class ObservedChecked(Messenger):
    """A Pyro handler that checks the data at every observed site, as :func:`check_observed` does.

    Args:
        later: raise nothing and keep the results for :meth:`inside`, because an immediate check would wait for the GPU.
        without: names of sites that are not checked.
    """

    def __init__(self, later: bool = False, without: frozenset[str] = frozenset()):
        super().__init__()
        self.later, self.without = later, without
        self._inside: list[Tensor] = []

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] or isinstance(msg["fn"], _Subsample) or torch.jit.is_tracing():
            return
        if msg["name"] in self.without:
            return
        if self.later:
            self._inside.append(in_support(msg["fn"], msg["value"]).all())
        else:
            check_observed(msg["name"], msg["fn"], msg["value"])

    def inside(self) -> Tensor:
        """Returns a tensor: whether all data were in the support of their distributions."""
        return torch.stack(self._inside).all() if self._inside else torch.ones((), dtype=torch.bool)


def check_later(is_right: Tensor) -> bool:
    """Leaves a check to the :class:`ObservedChecked` around that checks later; returns whether there is one.

    Where it finds an error, the model runs again, without it. The caller then raises an error that says what is wrong.
    """
    for handler in _PYRO_STACK:
        if isinstance(handler, ObservedChecked) and handler.later:
            handler._inside.append(is_right)
            return True
    return False


def check_observed_by(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> None:
    """Raises a ValueError if data that a model observes, at latents of the guide, do not fit their distributions.

    The random state is left as it was.
    """
    devices = cuda_devices(tensors_of(args, kwargs))
    with torch.random.fork_rng(devices), torch.no_grad(), pyro.validation_enabled(False):
        latents = latents_of_trace(traced(guide, None, *args, **kwargs))
        check_all_observed(traced(model, latents, *args, **kwargs))


def check_observed(name: str, fn: Any, value: Tensor, columns: str = "") -> None:
    """Raises a ValueError if an observed value does not have the shape of its distribution or is out of its support."""
    base = unwrapped(fn)
    kind = type(base).__name__
    event_shape = fn.event_shape
    if _scores_any_length(base):  # whose event has one step for any number of them
        event_shape = value.shape[value.dim() - len(event_shape) :][:1] + event_shape[1:]
    if event_shape and value.shape[value.dim() - len(event_shape) :] != event_shape:
        raise ValueError(
            f'The data at site "{name}" has shape {tuple(value.shape)}, but its distribution {kind} has events of '
            f"shape {tuple(fn.event_shape)}. Reshape the data, or build the likelihood for that shape."
        )
    if isinstance(base, Blocks):
        for block, x, here in base.split(value):
            last = here.stop - 1
            check_observed(name, block, x, f", column{f's {here.start} to' if here.start < last else ''} {last}")
        return
    inside = in_support(fn, value)
    if bool(inside.all()):
        return
    space = innermost(base.support)
    observed = value[fn.mask_of_elements.expand(value.shape)] if isinstance(fn, MaskedElements) else value
    low, high = observed.min().item(), observed.max().item()
    first = int((~inside).nonzero()[:, -1].min()) if inside.dim() else 0  # the data are the last dimension
    bytes_ = ""
    if low >= 0 and 15 < high <= 255 and _is_within_one(space) and bool((observed == observed.round()).all()):
        bytes_ = "Whole numbers up to 255, as of bytes, are never taken for 0 to 1: divide them by 255. "
    raise ValueError(
        f'The data at site "{name}"{columns} is outside the support of {kind}, {space}: it ranges from {low:g} to '
        f"{high:g}, and the first datum outside is {row_name(first)}. {bytes_}{_advice(space)}"
    )


def _scores_any_length(base: Any) -> bool:
    """Whether a distribution is a hidden Markov model whose steps are all alike."""
    is_hmm = isinstance(base, HiddenMarkovModel) or type(base).__name__ == "MissingDataDiscreteHMM"
    return is_hmm and base.event_shape[0] == 1 and getattr(base, "duration", None) is None


def warn_of_large_counts(name: str, fn: Any, value: Tensor) -> None:
    r"""Warns where distributions of counts of torch lose precision: they subtract numbers of size :math:`x \log x`."""
    base = unwrapped(fn)
    kinds = (
        torch.distributions.Poisson,
        torch.distributions.NegativeBinomial,
        torch.distributions.Multinomial,
        torch.distributions.Binomial,
        GammaPoisson,
    )
    if not isinstance(base, kinds) or type(base).__module__.startswith("pyrovae") or not value.numel():
        return
    counts = value.detach().double()
    precision = torch.finfo(base.mean.dtype).eps
    # Rounding errors of the elements have random signs, so their sum grows as the root of their squares.
    error = (precision / 2 * counts * counts.clamp(min=1).log()).square()
    lost = error.sum(-1).sqrt().max().item() if error.dim() > 1 else error.max().sqrt().item()
    if lost > _LOST:
        warn(
            f'the log-probability of the counts at site "{name}", up to {counts.max().item():,.0f}, has a rounding '
            f"error of about {lost:.2g} nats a datum in {base.mean.dtype}. Take {type(base).__name__} of "
            "pyrovae.distributions where there is one, or give the distribution parameters in double precision."
        )


def check_mass(name: str, fn: Any, log_prob: Tensor) -> None:
    """Raises a ValueError if the probability of a discrete value is above one."""
    if not is_discrete(fn):
        return
    # A sum of many terms may exceed 0 by rounding.
    largest = log_prob.max().item() if log_prob.numel() else 0.0
    if largest > math.sqrt(torch.finfo(log_prob.dtype).eps) * max(1, fn.event_shape.numel()):
        raise ValueError(
            f'The likelihood at site "{name}", {type(unwrapped(fn)).__name__}, is not normalised: the log-probability '
            f"of a discrete value is {largest:.3g}, above 0. Normalise it, so that the probabilities of all values add "
            "up to 1."
        )


def _is_within_one(space: constraints.Constraint) -> bool:
    units = (constraints.boolean, constraints.unit_interval, open_unit_interval)
    return isinstance(space, grid) or any(space is unit for unit in units)


def _advice(support: constraints.Constraint) -> str:
    """Returns advice on how to bring data into a support."""
    if support is constraints.boolean:
        return (
            "Binarise grey values: for each batch with fit(..., transform=pyrovae.data.dynamic_binarization), or "
            "once with pyrovae.data.static_binarization(x); on the command line with --preprocessing dynamic or "
            "static. Or use a likelihood of real numbers such as Normal."
        )
    if support is constraints.nonnegative_integer:
        return "Give the raw counts, integers from 0, neither normalised nor as logarithms."
    if isinstance(support, type(constraints.integer_interval(0, 1))):
        return (
            f"Number the classes by integers from {support.lower_bound} to {support.upper_bound}, or build the "
            "likelihood with more classes (num_classes)."
        )
    if isinstance(support, grid):
        top = support.levels - 1
        return (
            f"The data must be k / {top} for k from 0 to {top}: divide bytes by 255, round grey values with "
            f"(x * {top}).round() / {top}, or build the likelihood with other levels."
        )
    if support is open_unit_interval:
        return "Scale the data to [0, 1], then move 0 and 1 into the open interval: (x * (n - 1) + 0.5) / n for n data."
    if support is constraints.unit_interval:
        return "Scale the data to [0, 1]: divide bytes by 255, or subtract the minimum and divide by the range."
    if support is constraints.positive:
        return (
            "Add a floor to data with zeros, such as 1e-6 of its scale; for data that may be negative use a "
            "likelihood of real numbers such as Normal."
        )
    return "Transform the data into the support, or use a likelihood whose support contains the data."
