"""Data with NaN: refused, unless a model and a guide fill it in themselves."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae.arguments import as_arguments, named_arrays, take_rows, tensors_of
from pyrovae.inference.messages import check_finite
from pyrovae.inference.running import isolated, traced
from pyrovae.inference.sites import latents_of_trace, sample_sites
from pyrovae.rows import Rows

Fills = Callable[[tuple, dict[str, Any]], bool]  # whether a model and a guide fill in some rows of data

_ROWS = 64  # with NaN, on which model and guide are tried


def check_filled(args: tuple, kwargs: dict[str, Any], fills: Fills | None, name: str = "") -> None:
    """Checks canonical arguments as :func:`check_finite` does; rows with NaN may stay where a model fills them in.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        fills: asked about rows with NaN; None where nobody fills them in.
        name: of the data in messages; by default each argument has its own.
    """
    for own, x in named_arrays(args, kwargs):
        try:
            check_finite(name or own, x)
        except ValueError:
            rows = None if fills is None else _rows_with_nan(x)
            if fills is None or rows is None or not fills(*take_rows(rows, args, kwargs)):
                raise


def check_batch(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    transform: Callable | None = None,
    name: str = "",
) -> None:
    """Checks a batch as :func:`check_filled` does, whatever the shapes of its tensors are."""
    try:
        for own, x in named_arrays(args, kwargs):
            check_finite(name or own, x)
    except ValueError:
        if not fills_in(model, guide, args, kwargs, transform):
            raise


def fills_in(
    model: Callable,
    guide: Callable | None,
    args: tuple,
    kwargs: dict[str, Any],
    transform: Callable | None = None,
) -> bool:
    """Returns whether all that a model and a guide say of data with NaN is finite: values, densities, gradients.

    Args:
        model: a Pyro model.
        guide: a Pyro guide, or None.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        transform: called with the arguments first, its result used instead.
    """
    tensors = tensors_of(args, kwargs)
    if any(bool(torch.isinf(x).any()) for x in tensors):
        return False
    try:
        with isolated(tensors), torch.enable_grad(), pyro.validation_enabled(False):
            if transform is not None:
                given = as_arguments(transform(*args, **kwargs))
                args, kwargs = given.args, given.kwargs
            draws = None if guide is None else traced(guide, None, *args, **kwargs)
            latents = None if draws is None else latents_of_trace(draws)
            traces = [trace for trace in (draws, traced(model, latents, *args, **kwargs)) if trace is not None]
            if not all(_is_finite(site) for trace in traces for site in sample_sites(trace).values()):
                return False
            total = sum(trace.log_prob_sum() for trace in traces)
            found = [site["value"] for trace in traces for site in trace.nodes.values() if site["type"] == "param"]
            leaves = [p for p in (getattr(p, "unconstrained", lambda p=p: p)() for p in found) if p.requires_grad]
            if not leaves or not isinstance(total, Tensor) or not total.requires_grad:
                return True
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    except Exception:  # whatever they cannot do with NaN
        return False
    return all(g is None or bool(torch.isfinite(g).all()) for g in gradients)


def _is_finite(site: dict) -> bool:
    # A mask hides NaN from the density, but not from its gradient: what is observed must be filled in.
    return all(bool(torch.isfinite(x).all()) for x in (site["value"], site["fn"].log_prob(site["value"])))


def _rows_with_nan(x: Tensor | Rows) -> Tensor | None:
    """Returns the numbers of some rows that hold NaN, two at least if there are two rows; None if any is infinite."""
    found: list[Tensor] = []
    if x.dtype.is_complex or isinstance(x, Tensor) and (x.layout is not torch.strided or x.dim() == 0):
        return None
    for start, rows in x.chunks() if isinstance(x, Rows) else [(0, x)]:
        if torch.isinf(rows).any():
            return None
        found.append(start + rows.isnan().reshape(len(rows), -1).any(1).nonzero().squeeze(1))
    numbers = torch.cat(found)[:_ROWS]
    if len(numbers) == 1 and len(x) > 1:  # some models squeeze a single row away
        numbers = torch.cat([numbers, (numbers + 1) % len(x)])
    return numbers
