"""Parts of the data that are given: masks of the observed sites, models of what is given, and checks."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyrovae import arguments
from pyrovae.distributions import Blocks, MaskedElements, Multinomial, Stacked, mask_elements
from pyrovae.estimators.task import Task
from pyrovae.inference.running import isolated, traced
from pyrovae.inference.sites import independent_elements, is_data, latents_of_trace, sample_sites, unwrapped
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import annotate_plates, log_prob_of

Given = Tensor | str | Iterable[str] | Mapping[str, Tensor | bool]

GIVEN = "_given"  # the keyword argument by which the masks travel with the rows of the data
_CHECKED_ROWS = 16  # data on which is checked that the density of what is given does not depend on the rest


class Conditioned(NamedTuple):
    """The task of scoring data, and that of scoring what is given of them.

    Args:
        whole: of all that is observed.
        given: of what is given alone; its guide runs at that where it takes a mask of the observed elements.
        places: where the elements of a datum are, for each observed site.
        num_rows: of masks with a row for each datum; None without such a mask.
    """

    whole: Task
    given: Task
    places: dict[str, "Place"]
    num_rows: int | None


def condition(task: Task, given: Given) -> Conditioned:
    """Returns the tasks of scoring all data and what is given of them, after checking that both have a density."""
    head = task.rows(slice(0, _CHECKED_ROWS))
    with isolated(arguments.tensors_of(task.args, task.kwargs)), arguments.row_positions(head.offset):
        latents = traced(head.guide, None, *head.args, **head.kwargs)
        trace = traced(head.model, latents_of_trace(latents), *head.args, **head.kwargs)
        sites = _data_sites(annotate_plates(trace, task.structure), task.structure)
        if not sites:
            raise ValueError("the model observes no data in a plate, so that no part of a datum can be given.")
        places = {name: _place(site) for name, site in sites.items()}
        masks = {name: _mask_of(name, mask, places[name]) for name, mask in _by_site(given, sites).items()}
        _check_both_parts(masks)
        rows = {
            name: _rows_of(name, mask, places[name], task).to(sites[name]["value"].device)
            for name, mask in masks.items()
        }
        kwargs = {**task.kwargs, GIVEN: rows}
        whole = replace(task, model=_Whole(task.model), guide=_Whole(task.guide), kwargs=kwargs)
        part = replace(whole, model=_GivenModel(task.model, places))
        _check_separable(part.rows(slice(0, _CHECKED_ROWS)), sites, places, latents)
        argument = _mask_argument(sites, places, head)
    if argument is not None:
        part = replace(part, guide=_GivenGuide(task.guide, *argument))
    num_rows = next((len(mask) for mask in masks.values() if len(mask) > 1), None)
    return Conditioned(whole, part, places, num_rows)


class Place(NamedTuple):
    """Where the elements of a datum are in the values of an observed site.

    Args:
        shape: of a datum: its plates and the event.
        dim: dimension of the data in a value without a dimension of draws.
    """

    shape: torch.Size
    dim: int


class _Whole:
    """A model or a guide that leaves the masks aside."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(GIVEN)
        return self.function(*args, **kwargs)


class _GivenModel:
    """A model that observes what is given alone."""

    def __init__(self, model: Callable, places: dict[str, Place]):
        self.model, self.places = model, places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _GivenOnly(self.places, kwargs.pop(GIVEN)):
            return self.model(*args, **kwargs)


class _GivenGuide:
    """A guide that takes a mask of the observed elements, without those that are not given.

    A datum without a given element keeps its mask, because an encoder may need one: any proposal is valid.

    Args:
        guide: the guide.
        site: the observed site.
        leaf: index of the mask among the leaves of the arguments.
    """

    def __init__(self, guide: Callable, site: str, leaf: int):
        self.guide, self.site, self.leaf = guide, site, leaf

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(GIVEN)[self.site]
        leaves, spec = tree_flatten((args, kwargs))
        observed = leaves[self.leaf].bool()
        kept = observed & given.to(observed.device)
        is_empty = ~kept.flatten(1).any(1).view(-1, *[1] * (kept.dim() - 1))
        leaves[self.leaf] = torch.where(is_empty, observed, kept).to(leaves[self.leaf].dtype)
        args, kwargs = tree_unflatten(leaves, spec)
        return self.guide(*args, **kwargs)


class _GivenOnly(Messenger):
    """The Pyro handler of :class:`_GivenModel`."""

    def __init__(self, places: dict[str, Place], given: dict[str, Tensor]):
        super().__init__()
        self.places, self.given = places, given

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] and msg["name"] in self.places:
            msg["fn"] = part_of(msg["name"], msg["fn"], site_mask(msg["name"], self.places, self.given))


def site_mask(name: str, places: dict[str, Place], given: dict[str, Tensor]) -> Tensor:
    return given[name].movedim(0, places[name].dim)


def part_of(name: str, fn: Any, mask: Tensor) -> Any:
    """Returns the distribution of the elements of a site where a mask is True, ``(*plates, *event)``."""
    if isinstance(fn, Stacked):
        return Stacked([part_of(name, part, mask) for part in fn.parts], len(fn.batch_shape) - 1)
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(part_of(name, fn.base_dist, mask), fn._mask)
    if isinstance(fn, Blocks):
        pairs = zip(fn.blocks, mask.expand(*mask.shape[:-1], *fn.event_shape).split(fn.sizes, dim=-1), strict=True)
        return Blocks([part_of(name, block, columns) for block, columns in pairs], False)
    base, observed = (fn.base_dist, fn.mask_of_elements) if isinstance(fn, MaskedElements) else (fn, None)
    here = mask if observed is None else mask & observed
    if not isinstance(base, Multinomial) and independent_elements(base) is not None:
        return mask_elements(base, here)
    events = tuple(range(-len(fn.event_shape), 0))
    whole = (mask if observed is None else mask | ~observed).all(events) if events else mask
    some = here.any(events) if events else mask
    if bool((some & ~whole).any()):
        raise ValueError(
            f'the elements at site "{name}" are not independent given the latents ({type(unwrapped(base)).__name__}), '
            "so that no part of them has a density here. Give the whole of the site or nothing; or take a "
            "distribution of single elements and .to_event(n)."
        )
    return MaskedDistribution(fn, whole & some)


def _data_sites(trace: Trace, structure: SiteStructure) -> dict[str, dict]:
    """Returns the observed sites that hold parts of each datum."""
    return {
        name: site
        for name, site in sample_sites(trace).items()
        if is_data(site) and name not in structure.global_observed and site["data"] is not None
    }


def _place(site: dict) -> Place:
    event = site["fn"].event_shape
    batch = torch.broadcast_shapes(site["fn"].batch_shape, site["value"].shape[: site["value"].dim() - len(event)])
    index = len(batch) + site["data"].dim
    return Place(batch[:index] + batch[index + 1 :] + event, index)


def _by_site(given: Given, sites: Iterable[str]) -> dict[str, Any]:
    """Returns what is given as a mask or a bool for each observed site."""
    sites = list(sites)
    listed = ", ".join(f'"{name}"' for name in sites) or "nothing"
    if isinstance(given, Mapping):
        named = dict(given)
    elif isinstance(given, str):
        named = {given: True}
    elif isinstance(given, Iterable) and not hasattr(given, "shape") and all(isinstance(g, str) for g in given):
        named = dict.fromkeys(given, True)
    elif len(sites) == 1:
        named = {sites[0]: given}
    else:
        raise ValueError(f"given is one mask, but the model observes {listed}. Give a dict of sites and masks.")
    for name in named:
        if name not in sites:
            raise ValueError(f"given names the site {name!r}, but the model observes {listed} for each datum.")
    return {name: named.get(name, False) for name in sites}


def _mask_of(name: str, mask: Any, place: Place) -> Tensor:
    """Returns a site's mask as ``(rows or 1, *shape of a datum)``."""
    if isinstance(mask, bool):
        return torch.tensor(mask).expand(1, *place.shape)
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool:
        raise ValueError(f'given must be boolean for site "{name}", True where x is given; got {mask.dtype}.')
    by_row = mask.dim() == len(place.shape) + 1
    own = mask.shape[int(by_row) :]
    try:
        fits = torch.broadcast_shapes(own, place.shape) == place.shape
    except RuntimeError:
        fits = False
    if not fits or by_row and not len(mask):
        raise ValueError(
            f'given has shape {tuple(mask.shape)} for site "{name}", whose data have shape {tuple(place.shape)}: give '
            "a mask of that shape, or one for each datum."
        )
    return mask.expand(len(mask) if by_row else 1, *place.shape)


def _check_both_parts(masks: dict[str, Tensor]) -> None:
    """Raises a ValueError if nothing is given, or everything."""
    for fault, masks_of in (("nothing", masks), ("everything", {name: ~mask for name, mask in masks.items()})):
        if not any(bool(mask.any()) for mask in masks_of.values()):
            raise ValueError(
                f"given holds {fault}, but p(x_a | x_b) needs both parts. For log p(x) of all data take log_marginal."
            )


def _rows_of(name: str, mask: Tensor, place: Place, task: Task) -> Tensor:
    """Returns the rows of a site's mask for the data of a task."""
    if len(mask) == 1:
        return mask.expand(task.size, *place.shape)
    rows = task.offset if isinstance(task.offset, Tensor) else task.offset + torch.arange(task.size)
    if len(mask) <= int(rows.max()):
        raise ValueError(
            f'given has {len(mask):,} rows for site "{name}", fewer than there are data. Give one a datum.'
        )
    return mask[rows.to(mask.device)]


def _check_separable(seen: Task, sites: dict[str, dict], places: dict[str, Place], latents: Trace) -> None:
    """Raises a ValueError if the density of what is given, at fixed latents, depends on data that are not given.

    Such data are replaced, once by draws and once by those of other rows: as in a decoder that reads the elements
    before (autoregressive), or a site whose distribution depends on the data of another.
    """
    given, leaves, spec = seen.kwargs[GIVEN], *tree_flatten((seen.args, seen.kwargs))
    found = {name: _arguments_of(site, places[name], leaves) for name, site in sites.items()}
    before = _log_probs(seen, latents, seen.args, seen.kwargs)
    for replacement in (_drawn, _of_other_rows):
        changed = list(leaves)
        for name, site in sites.items():
            rest = ~given[name]
            if not bool(rest.any()):
                continue
            if not found[name]:
                raise ValueError(
                    f'the values that site "{name}" observes are not one of the arguments as given, so that it cannot '
                    "be told whether what is given depends on the rest of them. Observe the argument itself."
                )
            values = replacement(site, places[name])
            for i in found[name]:
                mine = leaves[i]
                here = torch.where(rest, values.to(mine.dtype), mine.reshape(rest.shape).to(values.device))
                changed[i] = here.reshape(mine.shape).to(mine.device)
        args, kwargs = tree_unflatten(changed, spec)
        after = _log_probs(seen, latents, args, kwargs)
        for name, old in before.items():
            precision = math.sqrt(torch.finfo(old.dtype).eps)
            new = after[name]
            if new.shape != old.shape or not torch.allclose(new, old, rtol=precision, atol=precision, equal_nan=True):
                raise ValueError(
                    f'the density at site "{name}" depends on data that are not given, so that log p(x_b) is no '
                    "integral over the latents alone: a network reads them, or another site's data. Give those that "
                    "come first in the model."
                )


def _log_probs(task: Task, latents: Trace, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the log-probabilities of each site of a model at fixed latents."""
    with pyro.validation_enabled(False):
        trace = traced(task.model, latents_of_trace(latents), *args, **kwargs)
        return {name: log_prob_of(site) for name, site in sample_sites(trace).items()}


def _by_rows(site: dict, value: Tensor, place: Place) -> Tensor:
    batch = torch.broadcast_shapes(site["fn"].batch_shape, value.shape[: value.dim() - len(site["fn"].event_shape)])
    return value.expand(batch + site["fn"].event_shape).movedim(place.dim, 0)


def _drawn(site: dict, place: Place) -> Tensor:
    try:
        return _by_rows(site, site["fn"].sample(), place)
    except NotImplementedError:
        return _of_other_rows(site, place)


def _of_other_rows(site: dict, place: Place) -> Tensor:
    value = _by_rows(site, site["value"], place)
    return value.roll(1, 0) if len(value) > 1 else value.flatten(1).flip(1).reshape(value.shape)


def _arguments_of(site: dict, place: Place, leaves: list[Any]) -> list[int]:
    """Returns the indices of the arguments that are what a site observes, wherever it does."""
    value, observed = _by_rows(site, site["value"], place), _observed(site["fn"])
    observed = torch.ones((), dtype=torch.bool) if observed is None else _by_rows(site, observed, place)
    return [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        and leaf.dtype != torch.bool
        and leaf.numel() == value.numel()
        and len(leaf) == len(value)
        and bool(((leaf.to(value).reshape(value.shape) == value) | ~observed.to(value.device)).all())
    ]


def _observed(fn: Any) -> Tensor | None:
    """Returns the mask of the observed elements of a distribution; None where it has none."""
    if isinstance(fn, MaskedElements):
        return fn.mask_of_elements
    if isinstance(fn, Blocks):
        masks = [_observed(block) for block in fn.blocks]
        if any(mask is not None for mask in masks):
            shapes = [fn.batch_shape + block.event_shape for block in fn.blocks]
            pairs = zip(masks, shapes, strict=True)
            return torch.cat([torch.ones(s, dtype=torch.bool) if m is None else m.expand(s) for m, s in pairs], dim=-1)
    return None


def _mask_argument(sites: dict[str, dict], places: dict[str, Place], head: Task) -> tuple[str, int] | None:
    """Returns the site and the index of the argument that masks its elements, if there is one."""
    for name, site in sites.items():
        observed = _observed(site["fn"])
        if observed is None:
            continue
        observed = _by_rows(site, observed, places[name])
        for i, leaf in enumerate(tree_leaves((head.args, head.kwargs))):
            is_like = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape == observed.shape
            if is_like and bool((leaf.to(observed.device) == observed).all()):
                return name, i
    return None
