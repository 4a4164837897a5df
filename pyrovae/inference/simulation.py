r"""Latents and data drawn from a model, in the place of the data that it is called with."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import tensors_of, tree_map
from pyrovae.inference.running import isolated, traced
from pyrovae.inference.sites import latents_of_trace, sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import differs, log_prob_of


def simulate(model: Callable, structure: SiteStructure, *args: Any, **kwargs: Any) -> tuple[poutine.Trace, tuple, dict]:
    r"""Draws latents and data from a model; returns their trace, and the arguments with the drawn data in place.

    .. math:: z, x \sim p(x, z)

    Given the data, the latents are exact draws of :math:`p(z \mid x)`, the target of a guide. The drawn data replace
    the arguments that the model observes, or the parts of them, in the same number. Values that all data share, such as
    a conditioned global latent, stay as they are.

    Raises:
        ValueError: when the value that a site observes is no argument, and no part of one; when two sites observe the
            same; when a site is a factor.
    """
    given = structure.global_observed
    with torch.no_grad(), poutine.trace() as tracer, _Uncondition(given):
        model(*args, **kwargs)
    trace, sites = tracer.trace.copy(), sample_sites(tracer.trace)
    for name in tracer.trace.nodes.keys() - sites.keys():
        trace.remove_node(name)  # the subsample of a plate: the data are new
    tensors = tensors_of(args, kwargs)
    replacements: dict[int, Tensor] = {}
    parts: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
    for name, site in sites.items():
        if not site["infer"].get("was_observed"):
            continue
        observed = site["infer"]["obs"]
        source = next((t for t in tensors if observed is t), None)
        if source is not None and id(source) not in replacements and id(source) not in parts:
            replacements[id(source)] = site["value"]
            continue
        if source is None:
            source = next((t for t in tensors if _is_part(observed, t)), None)
        if source is None or id(source) in replacements:
            raise ValueError(_refusal(name, site, source))
        parts.setdefault(id(source), []).append((name, observed, site["value"]))
    for t in tensors:
        if id(t) in parts:
            replacements[id(t)] = _replaced(t, parts[id(t)])
    return trace, *tree_map(lambda value: replacements.get(id(value), value), (args, kwargs))


def check_simulated(model: Callable, trace: poutine.Trace, structure: SiteStructure, args: tuple, kwargs: dict) -> None:
    """Raises a ValueError unless the model gives simulated data the log-probabilities with which they were drawn.

    Args:
        model: a Pyro model.
        trace: what was drawn.
        structure: the sites of model and guide.
        args: the arguments with the drawn data in place.
        kwargs: likewise.
    """
    drawn = sample_sites(trace)
    with isolated(tensors_of(args, kwargs)):
        latents = trace.copy()
        for name in drawn.keys() & structure.observed:
            latents.remove_node(name)
        run, again = (sample_sites(traced(model, latents_of_trace(latents), *args, **kwargs)) for _ in range(2))
        for name in structure.observed | structure.latents:
            if name not in drawn or name not in run or not differs(log_prob_of(run[name]), log_prob_of(drawn[name])):
                continue
            if not differs(log_prob_of(run[name]), log_prob_of(again[name])):  # no random numbers of its own
                raise ValueError(
                    f'Data cannot be drawn from the model: it reads data that it observes, so that site "{name}" has '
                    "another distribution at the drawn data. Let it read what it draws, as in x = pyro.sample(..., "
                    "obs=x), or give it what it reads, such as a sum of the data, as an argument of its own."
                )


class _Uncondition(poutine.uncondition_messenger.UnconditionMessenger):
    """Draws what a model observes, except for some sites."""

    def __init__(self, given: frozenset[str]):
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.given:
            super()._pyro_sample(msg)


def _is_part(observed: Tensor, t: Tensor) -> bool:
    """Whether a tensor is a view of elements of another."""
    if observed.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() or observed.dtype != t.dtype:
        return False
    memory = _memory(t, torch.int8)
    memory.as_strided(t.size(), t.stride()).fill_(1)
    try:
        return bool(_view(memory, observed, t).all())
    except RuntimeError:  # beyond the elements of t
        return False


def _memory(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns zeros in the number of elements that a tensor spans in memory."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.size(), t.stride(), strict=True))
    return torch.zeros(span, dtype=dtype, device=t.device)


def _view(memory: Tensor, observed: Tensor, t: Tensor) -> Tensor:
    """Returns the elements of the memory of a tensor where another one is."""
    return memory.as_strided(observed.size(), observed.stride(), observed.storage_offset() - t.storage_offset())


def _replaced(t: Tensor, parts: list[tuple[str, Tensor, Tensor]]) -> Tensor:
    """Returns a tensor with other values for parts of it; raises a ValueError if these have elements in common."""
    memory, times = _memory(t, t.dtype), _memory(t, torch.int8)
    new = memory.as_strided(t.size(), t.stride()).copy_(t)
    for name, observed, value in parts:
        counts = _view(times, observed, t)
        if bool(counts.any()):
            raise ValueError(_refusal(name, {"infer": {}}, t))
        counts.fill_(1)
        _view(memory, observed, t).copy_(value)
    return new


def _refusal(name: str, site: dict, source: Tensor | None) -> str:
    if source is not None:
        why = "another site observes the same. Observe each number once"
    elif site["infer"].get("is_auxiliary"):
        why = "the site is a factor. Observe the data by a distribution"
    else:
        why = (
            "the value that the site observes is not one of the arguments as given, nor a part of one. Observe the "
            "argument itself"
        )
    return f'Data drawn from the model at site "{name}" cannot replace an argument: {why}.'
