r"""Sums over discrete latents by eliminating one after the other, as Pyro does where a model is enumerated.

A model whose discrete latents are independent given the others, or a chain, has a sum of few terms for each of them,
although there are many combinations: :math:`K^2 T` terms for T steps of K states, not :math:`K^T`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

from pyrovae.arguments import tensors_of
from pyrovae.inference.running import isolated
from pyrovae.inference.sites import latents_of_trace, sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import (
    SAMPLES,
    differs,
    log_p_of,
    log_prob_of,
    one_draw,
    trace_guide,
    trace_model,
    unmasked_log_prob_of,
)

_MOST_VALUES = 4096  # of the latents that one log-probability depends on, together
_MOST_NUMBERS = 2**26  # of a table from which a latent is eliminated, for all draws and data at once
_CHECKED_DRAWS = 8


def log_sums(
    model: Callable,
    draws: poutine.Trace,
    structure: SiteStructure,
    names: frozenset[str],
    num_samples: int,
    args: tuple,
    kwargs: dict[str, Any],
    log_prob: Callable[[dict], Tensor],
    chosen: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`\log \sum_y p(y, z)` and :math:`\log \sum_y p(x, y, z)`, ``(num_samples, batch)`` each.

    Args:
        model: a Pyro model.
        draws: a trace of `num_samples` draws of z.
        structure: the sites of the model and its guide.
        names: names of the sites y.
        num_samples: number of draws.
        args: arguments of the model.
        kwargs: the same, by name.
        log_prob: returns the log-probability of a site of the model, not masked for the sites y.
        chosen: values of y, ``(num_samples, *plates, batch, *event)``, to which the sums are restricted; all by
            default.
    """
    if structure.vectorized:
        return _log_sums(model, draws, structure, names, num_samples, args, kwargs, log_prob, chosen or {})
    parts = []
    for k in range(num_samples):
        values = {name: value[k : k + 1] for name, value in (chosen or {}).items()}
        part = one_draw(draws, structure, k)
        parts.append(_log_sums(model, part, structure, names, None, args, kwargs, log_prob, values))
    prior, joint = zip(*parts, strict=True)
    return torch.cat(prior), torch.cat(joint)


def _log_sums(
    model: Callable,
    draws: poutine.Trace,
    structure: SiteStructure,
    names: frozenset[str],
    num_samples: int | None,
    args: tuple,
    kwargs: dict[str, Any],
    log_prob: Callable[[dict], Tensor],
    chosen: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns the sums for draws at once; for a single one, without a dimension of draws, if `num_samples` is None."""
    depth = structure.max_plate_nesting
    free = -2 - depth if num_samples is not None else -1 - depth
    with (
        poutine.trace() as tracer,
        poutine.replay(trace=latents_of_trace(draws)),
        poutine.enum(first_available_dim=free),
        poutine.infer_config(config_fn=lambda site: {"enumerate": "parallel"} if site["name"] in names else {}),
    ):
        if num_samples is None:
            model(*args, **kwargs)
        else:
            with pyro.plate(SAMPLES, num_samples, dim=-1 - depth):
                model(*args, **kwargs)
    data = "a"  # all plates over the data are the same dimension
    over_data = dict.fromkeys(structure.data.names, data) if structure.data is not None else {}
    tracer.trace.symbolize_dims(over_data)
    prior: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    joint: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    eliminated, dtype = set(), torch.float32
    for name, site in sample_sites(tracer.trace).items():
        if name in structure.global_observed:
            continue
        symbols = site["infer"]["_dim_to_symbol"]
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        ordinal = frozenset(symbols[frame.dim] for frame in frames)
        if structure.data is not None and data not in ordinal:
            raise ValueError(f'site "{name}" is outside of the plate over the data')
        factors = [log_prob(site)]
        if name in names:
            eliminated.add(site["infer"]["_enumerate_symbol"])
            if name in chosen:
                event = list(range(-len(site["fn"].event_shape), 0))
                same = site["value"] == chosen[name]
                factors.append(torch.where(same.all(dim=event) if event else same, 0.0, -math.inf).to(factors[0]))
        for factor in factors:
            # In double precision: sums of many terms.
            joint.setdefault(ordinal, []).append(packed.pack(factor.double(), symbols))
            if not site["is_observed"]:
                prior.setdefault(ordinal, []).append(packed.pack(factor.double(), symbols))
            dtype = torch.promote_types(dtype, factor.dtype)
    samples = tracer.trace.plate_to_symbol.get(SAMPLES, "")
    first, second = (_contracted(tree, eliminated, samples, data, num_samples or 1) for tree in (prior, joint))
    return first.to(dtype), second.to(dtype)


class _LogSums(LogRing):
    """Sums of products in log space, one dimension after the other, cheapest first.

    Pyro's own shifts each factor by its largest value: where factors disagree by 90 nats, their product is zero.
    """

    def sumproduct(self, terms: Sequence[Any], dims: Set[str]) -> Any:
        left, terms = set(dims), list(terms)
        while left:
            sizes: dict[str, int] = {}
            for dim in sorted(left):
                shapes = [dict(zip(t._pyro_dims, t.shape, strict=True)) for t in terms if dim in t._pyro_dims]
                sizes[dim] = math.prod({name: size for shape in shapes for name, size in shape.items()}.values())
            dim = min(sizes, key=lambda name: sizes[name])
            if sizes[dim] > _MOST_NUMBERS:
                raise ValueError(
                    f"a sum over one of them has {sizes[dim]:,} numbers, since too many depend on each other"
                )
            joined = _product([t for t in terms if dim in t._pyro_dims])
            summed = joined.logsumexp(joined._pyro_dims.index(dim))
            summed._pyro_dims = joined._pyro_dims.replace(dim, "")
            terms = [t for t in terms if dim not in t._pyro_dims] + [summed]
            left.remove(dim)
        return _product(terms)


def _product(terms: list[Any]) -> Any:
    """Returns the sum of some packed tensors, with all of their dimensions."""
    dims = "".join(sorted(set("".join(t._pyro_dims for t in terms))))
    total: Any = 0.0
    for t in terms:
        order = [t._pyro_dims.index(dim) for dim in dims if dim in t._pyro_dims]
        shape = [t.shape[t._pyro_dims.index(dim)] if dim in t._pyro_dims else 1 for dim in dims]
        total = total + t.permute(order).reshape(shape)
    total._pyro_dims = dims
    return total


def _contracted(
    tree: OrderedDict[frozenset[str], list[Tensor]], eliminated: set[str], samples: str, data: str, num_samples: int
) -> Tensor:
    """Returns the sum of products of factors, ``(num_samples, batch)``."""
    total: Tensor | float = 0.0
    for terms in contract_tensor_tree(tree, eliminated, ring=_LogSums()).values():
        for term in terms:
            dims = term._pyro_dims
            others = [i for i, symbol in enumerate(dims) if symbol not in (samples, data)]
            t = term.sum(others) if others else term[...]
            kept = [symbol for symbol in dims if symbol in (samples, data)]
            if kept == [data, samples]:
                t = t.t()
            elif kept == [data]:
                t = t.unsqueeze(0)
            elif len(kept) < 2:
                t = t.reshape(-1, 1)
            total = total + t
    return torch.as_tensor(total).expand(num_samples, -1)


def check_eliminable(
    model: Callable,
    prior: Callable,
    structure: SiteStructure,
    sizes: Mapping[str, int],
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Raises a ValueError if discrete latents of a model cannot be eliminated one after the other.

    The sums are restricted to the values of some draws of the prior, and must then be the joint densities of these.

    Args:
        model: a Pyro model.
        prior: a guide that draws all latents as the model does.
        structure: the sites of both.
        sizes: how many values each of the latents can take.
        args: arguments of the model, some data.
        kwargs: the same, by name.
    """
    names = frozenset(sizes)
    with isolated(tensors_of(args, kwargs)):
        try:
            found: Any = get_dependencies(model, args, kwargs)
        except Exception as error:
            raise ValueError(f"what depends on them is not known ({error})") from None
        for name, above in found["prior_dependencies"].items():
            together = math.prod(sizes.get(up, 1) for up in above)
            if together > _MOST_VALUES:
                raise ValueError(f'the log-probability at site "{name}" depends on {together:,} combinations of them')
        drawn = trace_guide(prior, structure, _CHECKED_DRAWS, *args, **kwargs)
        sites = sample_sites(drawn)
        others = drawn.copy()
        for name in names:
            others.remove_node(name)
        chosen = {name: sites[name]["value"] for name in names}

        def log_prob(site: dict) -> Tensor:
            return unmasked_log_prob_of(site) if site["name"] in names else log_prob_of(site)

        try:
            _, joint = log_sums(model, others, structure, names, _CHECKED_DRAWS, args, kwargs, log_prob, chosen)
        except Exception as error:  # of the model, or of the sums
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"the model does not run on all of their values at once ({first})") from None
        expected = log_p_of(trace_model(model, drawn, structure, _CHECKED_DRAWS, *args, **kwargs), structure, log_prob)
    if joint.shape[-1] not in (1, expected.shape[-1]) or differs(joint, expected):
        raise ValueError("the model gives other log-probabilities where it runs on all of their values at once")
