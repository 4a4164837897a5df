"""Parameters whose elements belong to rows of the data, such as those of Pyro's automatic guides of local latents."""

import math
from collections.abc import Callable

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from pyrovae.arguments import Arguments, canonicalize, cuda_devices, take_rows, tensors_of
from pyrovae.inference.running import evaluation_mode, isolated, traced
from pyrovae.inference.sites import is_data, latents_of_trace, sample_sites, unwrapped
from pyrovae.inference.structure import SiteStructure, inspect, rows_are_data
from pyrovae.inference.weights import differs, is_random, log_prob_of, take_draws


def parameters_of_rows(
    model: Callable, guide: Callable, params: dict[str, Tensor], batch: Arguments, size: int, num_data: int
) -> list[str]:
    """Returns the keys of the parameters whose elements belong to rows of a batch, whichever data are in these rows.

    The first datum is scored in the first row, and again in the second row after a shift of all rows by one. The
    elements of a parameter that have a gradient in the two runs are compared. Elements that belong to a datum (the
    output of a network, or what is looked up for the datum) are the same in both. If the two sets of elements are
    disjoint, the parameter belongs to the rows.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        params: the parameters by key.
        batch: arguments of both.
        size: the number of rows in the batch.
        num_data: the number of data in all batches.
    """
    params = {key: p for key, p in params.items() if any(n and n % m == 0 for n in p.shape for m in (size, num_data))}
    if size < 2 or not params:
        return []
    devices = cuda_devices([*tensors_of(batch.args, batch.kwargs), *params.values()])
    try:
        with evaluation_mode(), pyro.validation_enabled(False):
            with torch.random.fork_rng(devices):
                in_first, draws = _elements_used_by_row(0, model, guide, params, batch, size, poutine.Trace())
            for site in sample_sites(draws).values():  # the draws for a datum are shifted with it
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        dim, x = frame.dim - site["fn"].event_dim, site["value"]
                        if x.dim() >= -dim and x.shape[dim] == size:
                            site["value"] = x.roll(1, dim)
            args, kwargs = take_rows(torch.arange(size).roll(1), *canonicalize(batch.args, batch.kwargs)[:2])
            with torch.random.fork_rng(devices):
                in_second, _ = _elements_used_by_row(1, model, guide, params, Arguments(*args, **kwargs), size, draws)
    except Exception:  # rows that cannot be shifted, such as sequences sorted by their lengths
        return []
    return [
        key
        for key, a, b in zip(params, in_first, in_second, strict=True)
        if bool(a.any()) and bool(b.any()) and not bool((a & b).any())
    ]


def _elements_used_by_row(
    row: int,
    model: Callable,
    guide: Callable,
    params: dict[str, Tensor],
    batch: Arguments,
    size: int,
    draws: poutine.Trace,
) -> tuple[list[Tensor], poutine.Trace]:
    """Returns a mask for each parameter, True where an element has a gradient in a row; and the latents drawn.

    Args:
        row: the row of the batch.
        model: a Pyro model.
        guide: a Pyro guide.
        params: the parameters by key.
        batch: arguments of both.
        size: the number of rows in the batch.
        draws: latents to use instead of new draws.
    """
    with torch.enable_grad():
        guide_trace = traced(guide, draws, *batch.args, **batch.kwargs)
        with poutine.replay(trace=draws):
            guide_sites = sample_sites(guide_trace)
            model_sites = sample_sites(traced(model, guide_trace, *batch.args, **batch.kwargs))
        of_sites = [
            {f.name for f in site["cond_indep_stack"] if f.vectorized and f.size == size}
            for site in model_sites.values()
            if site["is_observed"]
        ]
        plates = set.intersection(*of_sites) if of_sites else set()  # those that hold all observed sites
        total = torch.zeros(())  # all densities and values of the row
        for site in [*guide_sites.values(), *model_sites.values()] if len(plates) == 1 else []:
            value, event_dim = site["value"], site["fn"].event_dim
            summed = value.flatten(value.dim() - event_dim).sum(-1) if event_dim else value
            for frame in site["cond_indep_stack"]:
                for x in (site["fn"].log_prob(value), summed) if frame.name in plates else ():
                    if x.requires_grad and x.dim() >= -frame.dim and x.shape[frame.dim] == size:
                        total = total + x.select(frame.dim, row).sum()
        if total.requires_grad:
            leaves = list(params.values())
            gradients = list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
        else:
            gradients = [torch.zeros_like(p) for p in params.values()]
    drawn = poutine.Trace()
    for name, site in (model_sites | guide_sites).items():
        # A Delta is recomputed from its parameters, and so is the auxiliary draw of an automatic guide.
        if not (site["is_observed"] or site["infer"].get("is_auxiliary") or isinstance(unwrapped(site["fn"]), Delta)):
            drawn.add_node(name, **{**site, "value": site["value"].detach()})
    return [gradient != 0 for gradient in gradients], drawn


def check_rows_are_data(model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict) -> None:
    """Raises a ValueError if the rows of a batch are no data.

    They are none if a model without plates has a site for each row, a step of one series, or if the plate over the data
    has the same size whatever the number of rows.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        structure: that of a batch.
        args: the batch.
        kwargs: the batch.
    """
    if structure.has_plates:
        if not rows_are_data(model, guide, structure, args, kwargs):
            raise ValueError(
                f"the plate {structure.data} holds {structure.data_drawn} data, and not one for each row, so that fit "
                "cannot cut rows into batches. Give the data along the first dimension, x.transpose(0, 1), with "
                "x[:, t] in model and guide; or all rows in one batch, batch_size=len(x), without micro_batch_size "
                "and in one process."
            )
        return
    args, kwargs, size = canonicalize(args, kwargs)
    args, kwargs = take_rows(slice(0, size // 2), args, kwargs)
    try:
        sites = inspect(model, guide, *args, **kwargs).sites
    except Exception:  # it does not run on fewer rows
        return
    if sites != structure.sites:
        raise ValueError(
            "the model has a site for each row of the data and no plate, so that the rows are steps of one series. fit "
            "would shuffle them and cut them into batches: pass batch_size=len(x), or put several series, the rows of "
            'x, in pyro.plate("data", len(x)).'
        )


def find_dependent_site(
    model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict
) -> str | None:
    """Returns a site whose log-probabilities of two halves of a batch do not add up to that of the batch; None if none.

    The latents are the same. Rows that are steps of a series depend on those before them, and data whose network takes
    means over a batch on all others.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        structure: that of a batch.
        args: the batch.
        kwargs: the batch.
    """
    args, kwargs, size = canonicalize(args, kwargs)
    if structure.data_drawn not in (size, None):  # rows of a subsample that the model draws itself
        return None
    with isolated(tensors_of(args, kwargs)):
        drawn = latents_of_trace(traced(guide, None, *args, **kwargs))
        # With the latents that the guide leaves to the model, which sums over them.
        whole = traced(model, drawn, *args, **kwargs)
        latents, sites = latents_of_trace(whole), sample_sites(whole)
        totals = dict.fromkeys((name for name, site in sites.items() if is_data(site)), torch.zeros(()))
        for half in (slice(0, size // 2), slice(size // 2, size)):
            try:
                few, named = take_rows(half, args, kwargs)
                draws = _draws_of_rows(latents, structure, torch.arange(size)[half], size)
                scored = sample_sites(traced(model, draws, *few, **named))
                # A value that all rows share is scored in each half.
                of_rows = [
                    name
                    for name in totals
                    if name in scored and scored[name]["value"].shape != sites[name]["value"].shape
                ]
                totals = {name: totals[name] + log_prob_of(scored[name]).sum() for name in of_rows}
            except Exception:  # the model does not run on fewer rows
                return None
        for name, total in totals.items():
            if differs(total, log_prob_of(sites[name]).sum()):
                return None if is_random(model, latents, name, sites, args, kwargs) else name
    return None


def _draws_of_rows(latents: poutine.Trace, structure: SiteStructure, rows: Tensor, size: int) -> poutine.Trace:
    """Returns the draws of some rows; without a plate over the data these lie along the first dimension of a draw."""
    if structure.data is not None:
        return take_draws(latents, structure.data, rows)
    few = latents.copy()
    for name, site in sample_sites(latents).items():
        if site["value"].shape[:1] == (size,):
            few.nodes[name] = {**site, "value": site["value"][rows.to(site["value"].device)]}
    return few


def check_scales(model: Callable, guide: Callable, whole: Arguments, part: Arguments) -> None:
    """Raises a ValueError if a site has another scale in a part of a batch: sums over parts would not be the whole's.

    The scales of subsampled plates are left out, whose sizes are accounted for.
    """
    with isolated(tensors_of(whole.args, whole.kwargs)):
        found = []
        for batch in (whole, part):
            drawn = traced(guide, None, *batch.args, **batch.kwargs)
            scored = traced(model, latents_of_trace(drawn), *batch.args, **batch.kwargs)
            sites = sample_sites(drawn) | sample_sites(scored)
            found.append({name: _own_scale(site) for name, site in sites.items()})
    for name in [name for name in found[0] if name in found[1]]:
        of_whole, of_part = found[0][name], found[1][name]
        if of_whole is not None and of_part is not None and not math.isclose(of_whole, of_part, rel_tol=1e-5):
            raise ValueError(
                f'site "{name}" is scaled by {of_whole:.4g} in a batch and by {of_part:.4g} in a part of it, so that '
                "the parts do not add up to the batch. Leave out a scale that depends on the size of the batch, such "
                "as 1 / len(x): fit takes means over the data. Or train without parts (micro_batch_size=None, one "
                "process)."
            )


def _own_scale(site: dict) -> float | None:
    """Returns the scale of a site without those of subsampled plates; None if it is a tensor of several numbers."""
    scale = torch.as_tensor(site["scale"])
    if scale.numel() != 1:
        return None
    sizes = [(f.full_size, f.size) for f in site["cond_indep_stack"] if f.vectorized and f.full_size and f.size > 0]
    return scale.item() / math.prod(full / size for full, size in sizes)


def check_rows(names: list[str], batch_size: int, num_batches: int) -> None:
    """Raises a ValueError if there are parameters that belong to rows, and the data come in several batches."""
    if num_batches == 1:
        return
    listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise ValueError(
        f"parameters {listed} belong to the {batch_size} rows of a batch, but these rows hold other data in every "
        "step. Take all data in one batch, batch_size=len(data); or infer the latents by an encoder network; or "
        "make parameters for all data and look up those of a batch by row numbers, data=(x, torch.arange(len(x)))."
    )
