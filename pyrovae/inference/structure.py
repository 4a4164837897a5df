"""The structure of a Pyro model and guide: :func:`inspect` runs them once and checks that they fit each other."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform

from pyrovae.arguments import count_data, explain_type_errors, kind_of, named_tensors, take_rows
from pyrovae.distributions import Blocks
from pyrovae.inference.messages import check_mass, check_observed, warn_of_large_counts
from pyrovae.inference.missing import check_batch
from pyrovae.inference.running import isolated, traced
from pyrovae.inference.sites import (
    DataPlate,
    describe_plates,
    full_sizes,
    has_moves,
    in_support,
    is_data,
    is_discrete,
    latents_of_trace,
    masks_differ,
    num_reals,
    plate_sizes,
    sample_sites,
    unwrapped,
)

__all__ = ["SiteStructure", "data_plate", "inspect"]

Sites = dict[str, dict]  # the sample sites of a trace, by name

DATA = "data"  # a plate of this name holds the data, whatever other plates there are
named_plate: ContextVar[str | None] = ContextVar("named_plate", default=None)  # set by data_plate


@contextmanager
def data_plate(name: str) -> Iterator[None]:
    """Names the plate that holds the data, for all calls inside; needed only where it cannot be found.

    Args:
        name: of the plate, in the model.

    Raises:
        ValueError: inside, when the model has no such plate over an observed site.

    >>> with data_plate("documents"):
    ...     pass  # fit(model, guide, documents), log_marginal(model, guide, documents), a diagnostic
    """
    token = named_plate.set(name)
    try:
        yield
    finally:
        named_plate.reset(token)


class SiteStructure(NamedTuple):
    """The sites of a model and its guide, and their plates.

    Args:
        max_plate_nesting: number of dimensions that the plates take, from the right.
        data: the plate over the data; None without one.
        data_size: full size of that plate, which is larger than the batch where the plate is subsampled; None without
            one.
        data_drawn: how many data it held in this run; None without one.
        problems: reasons why importance weights per datum are undefined, each naming a site.
        sites: names of the sites of model and guide.
        observed: names of the model's observed sites.
        latents: names of the model's latent sites.
        discrete: names of the latent sites that are discrete.
        without_bijection: names of the continuous latent sites whose space is no sphere and has no bijection from R^n.
        guide_observed: names of the guide's observed sites and factors, which are not part of q.
        auxiliary: names of the guide's auxiliary latent sites, from which it computes latents of the model.
        global_observed: names of the model's observed sites outside of the data plate, such as a conditioned global
            latent.
        unvalidated: names of the observed sites whose distributions were built with ``validate_args=False``.
        out_of_support: names of the unvalidated sites with data outside of their support.
        masked_apart: names of the latents with other masks around them in the model than in the guide.
        masked_inside: names of those with other masks inside of their distributions.
        vectorized: whether many samples may be drawn at once; otherwise they are drawn one by one.
    """

    max_plate_nesting: int
    data: DataPlate | None
    data_size: int | None
    data_drawn: int | None
    problems: tuple[str, ...]
    sites: frozenset[str]
    observed: frozenset[str]
    latents: frozenset[str]
    discrete: frozenset[str]
    without_bijection: frozenset[str]
    guide_observed: frozenset[str]
    auxiliary: frozenset[str]
    global_observed: frozenset[str]
    unvalidated: frozenset[str]
    out_of_support: frozenset[str]
    masked_apart: frozenset[str]
    masked_inside: frozenset[str]
    vectorized: bool = True

    @property
    def has_plates(self) -> bool:
        """Whether any site is in a plate; without any, all data are one datum, such as a series."""
        return self.max_plate_nesting > 0

    def holds_rows(self, rows: int) -> bool:
        """Whether the plate over the data may be over so many rows: it held them, draws its own, or there is none."""
        return self.data_drawn in (rows, None) or self.data_drawn != self.data_size

    @property
    def data_index(self) -> int:
        """The dimension of the data in a value of shape ``(num_samples, *plates, *event)``."""
        return self.max_plate_nesting + 1 + (-1 if self.data is None else self.data.dim)


def inspect(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> SiteStructure:
    """Runs a guide, and a model at its latents, on a batch; checks that they fit; returns their structure.

    Modules run in evaluation mode and the random state is restored, so that the call changes nothing. The data plate is
    the one named "data", or the one that all observed sites share and whose size is the number of data.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        **kwargs: what both are called with.

    Raises:
        ValueError: when the guide misses a latent site of the model, or has one that the model lacks; when a site lies
            in different plates in the two; when a site has batch dimensions that no plate declares; when observed
            data has the wrong shape or is outside its distribution's support. The message names the site.
    """
    for name, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{name} must be a Pyro {name}, a function or a module's method; got {function!r}.")
    check_batch(model, guide, args, kwargs)
    model_sites, guide_trace = _trace_pair(model, guide, args, kwargs)
    guide_sites = sample_sites(guide_trace)
    _check_fit(model_sites, guide_sites)
    latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    observed = {name: site for name, site in model_sites.items() if site["is_observed"]}
    if not observed and any(is_data(site) for site in guide_sites.values()):
        raise ValueError("the model observes nothing, but the guide does. Were model and guide swapped?")
    for name, site in [*model_sites.items(), *guide_sites.items()]:
        _check_batch_shape(name, site)
    unvalidated = frozenset(name for name, site in observed.items() if _is_unvalidated(site["fn"]))
    for name, site in observed.items():
        _check_rows(name, site)
        if name not in unvalidated:
            _check_data(name, site)

    rows = None
    with suppress(ValueError):  # the arguments do not show the number of data
        rows = count_data(args, kwargs)
    # Observed sites whose values are arguments, or views of them; all observed sites without any.
    storages = {t.untyped_storage().data_ptr() for _, t in named_tensors(args, kwargs)}
    holding_data = {
        name: site for name, site in observed.items() if site["value"].untyped_storage().data_ptr() in storages
    } or observed
    data, ambiguity = _find_data_plate(model_sites, guide_sites, rows, list(holding_data.values()))
    if data and rows and rows > 1 and holding_data is not observed:
        for name, site in holding_data.items():
            _check_repeated(name, site, data, rows)

    global_observed = frozenset(
        name
        for name, site in observed.items()
        if data and data.frame(site) is None and is_data(site) and name not in holding_data
    )
    if any(rows in observed[name]["value"].shape for name in global_observed):
        # A value that all data share is the same tensor in each run; a value computed from the data is a new one.
        with isolated(t for _, t in named_tensors(args, kwargs)):
            again = traced(model, latents_of_trace(guide_trace), *args, **kwargs)
        global_observed = frozenset(
            name for name in global_observed if again.nodes[name]["value"] is observed[name]["value"]
        )

    pairs = {name: (site, guide_sites[name]) for name, site in latents.items() if name in guide_sites}
    both = [*model_sites.values(), *guide_sites.values()]
    depths = [-frame.dim for site in both for frame in site["cond_indep_stack"] if frame.vectorized]
    data_frame = next((frame for site in both if (frame := data.frame(site))), None) if data else None
    problems = (ambiguity,) if ambiguity else tuple(_problems(model_sites, guide_sites, data, global_observed))
    return SiteStructure(
        max_plate_nesting=max(depths, default=0),
        data=data,
        data_size=data_frame.full_size or data_frame.size if data_frame else None,
        data_drawn=data_frame.size if data_frame else None,
        problems=problems,
        sites=frozenset(model_sites.keys() | guide_sites.keys()),
        observed=frozenset(observed),
        latents=frozenset(latents),
        discrete=frozenset(name for name, site in latents.items() if is_discrete(site["fn"])),
        without_bijection=frozenset(
            name for name, site in latents.items() if not has_moves(site["fn"]) and not is_discrete(site["fn"])
        ),
        guide_observed=frozenset(name for name, site in guide_sites.items() if site["is_observed"]),
        auxiliary=frozenset(
            name for name, site in guide_sites.items() if site["infer"].get("is_auxiliary") and not site["is_observed"]
        ),
        global_observed=global_observed,
        unvalidated=unvalidated,
        out_of_support=frozenset(
            name for name in unvalidated if not in_support(observed[name]["fn"], observed[name]["value"]).all()
        ),
        masked_apart=frozenset(name for name, (p, q) in pairs.items() if masks_differ(p, q)),
        masked_inside=frozenset(name for name, (p, q) in pairs.items() if masks_differ(p, q, inside=True)),
    )


def rows_are_data(
    model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict[str, Any]
) -> bool:
    """Returns whether the plate over the data holds one for each row of tensors.

    It does not if the data lie along another dimension, such as those of ``(time, batch)``.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        structure: what :func:`inspect` returns for these arguments.
        args: tensors, at least one of them with rows.
        kwargs: tensors.
    """
    rows = count_data(args, kwargs)
    is_alone = all(rows not in t.shape[1:] for _, t in named_tensors(args, kwargs))
    if rows < 2 or (structure.holds_rows(rows) and (structure.data_drawn != rows or is_alone)):
        return True
    half, named = take_rows(slice(0, rows // 2), args, kwargs)
    try:
        return inspect(model, guide, *half, **named).data_drawn != structure.data_drawn
    except Exception:  # they do not run on fewer rows
        return structure.holds_rows(rows)


def _trace_pair(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Sites, poutine.Trace]:
    """Returns the sites of a model that ran at the latents of a guide, and the guide's trace."""
    with isolated(t for _, t in named_tensors(args, kwargs)), explain_type_errors(args, kwargs):
        guide_trace = traced(guide, None, *args, **kwargs)
        try:
            model_trace = traced(model, latents_of_trace(guide_trace), *args, **kwargs)
        except Exception:
            # The model failed at the guide's latents. Its own draws may show which site does not fit.
            sites = {}
            with suppress(Exception):
                sites = sample_sites(traced(model, None, *args, **kwargs))
            if sites:
                _check_fit(sites, sample_sites(guide_trace))
            raise
    return sample_sites(model_trace), guide_trace


def _check_fit(model_sites: Sites, guide_sites: Sites) -> None:
    """Raises a ValueError that names a site that is missing in the model or the guide, or in other plates there."""
    latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    for name, site in latents.items():
        if name not in guide_sites and not site["infer"].get("enumerate"):
            raise ValueError(
                f'The guide misses the latent site "{name}" of the model (it has {_names(guide_sites)}). '
                f'Add pyro.sample("{name}", ...) to the guide; if it is data, observe it, by obs= in the model; if it '
                'is discrete, sum over it, by infer={"enumerate": "parallel"} in the model.'
            )
    for name, site in guide_sites.items():
        if name not in latents and not site["infer"].get("is_auxiliary") and not site["is_observed"]:
            if name in model_sites:
                raise ValueError(
                    f'The guide samples "{name}", which the model observes. Give the guide the same value, as in '
                    f'poutine.condition(guide, data={{"{name}": value}}).'
                )
            raise ValueError(
                f'The guide samples "{name}", which is no latent site of the model (it has {_names(latents)}). '
                'Rename it, or mark it infer={"is_auxiliary": True}.'
            )
    for name in latents.keys() & guide_sites.keys():
        sizes = [(plate_sizes(site), full_sizes(site)) for site in (latents[name], guide_sites[name])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f'The plates of site "{name}" differ: {describe_plates(latents[name])} in the model, '
                f"{describe_plates(guide_sites[name])} in the guide. Give it plates of the same sizes and dimensions "
                "in both. A guide with parameters for each row, such as AutoNormal, takes always the same rows, all at "
                "once."
            )


def _is_unvalidated(fn: Any) -> bool:
    """Whether a distribution was built with ``validate_args=False`` where others are validated."""
    return torch.distributions.Distribution._validate_args and not getattr(unwrapped(fn), "_validate_args", True)


def _check_rows(name: str, site: dict) -> None:
    """Raises a ValueError if the data at a site do not fit its plates."""
    value, fn = site["value"], site["fn"]
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f'the data at site "{name}" is a {kind_of(value)}, not a tensor: give numbers as a tensor or an array, and '
            "several arguments one by one, not as a tuple."
        )
    try:
        torch.broadcast_shapes(value.shape[: value.dim() - len(fn.event_shape)], fn.batch_shape)
    except RuntimeError:
        raise ValueError(
            f'The data at site "{name}" has shape {tuple(value.shape)}, which does not fit its '
            f"{describe_plates(site)}. Take the size of a plate from the data, len(x), not from a number: the data are "
            "cut into batches."
        ) from None


def _check_repeated(name: str, site: dict, data: "DataPlate", rows: int) -> None:
    """Raises a ValueError if the rows of an argument are the elements of one datum, which the plate would repeat."""
    shape, event = tuple(site["value"].shape), len(site["fn"].event_shape)
    if data.frame(site) and shape[:1] == (rows,) and len(shape) - event < -data.dim:
        raise ValueError(
            f'The data at site "{name}" has shape {shape}, all of which is one datum there: the plate would repeat it '
            "for each row. Give a single datum a dimension for the batch, x[None]."
        )


def _check_data(name: str, site: dict) -> None:
    """Raises a ValueError if the data at a site do not fit its distribution; warns of densities that lose precision."""
    fn, value = site["fn"], site["value"]
    check_observed(name, fn, value)
    base = unwrapped(fn)
    for block, x, _ in base.split(value) if isinstance(base, Blocks) else [(fn, value, None)]:
        if is_discrete(block):
            check_mass(name, block, block.log_prob(x))
    warn_of_large_counts(name, fn, value)


def _find_data_plate(
    model_sites: Sites, guide_sites: Sites, rows: int | None, holding_data: list[dict]
) -> tuple[DataPlate | None, str]:
    """Returns the plate over the data, None without one, and the ambiguity if several plates qualify, else ""."""
    sites = holding_data or list(model_sites.values())
    stacks = [{frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    sizes = {
        (frame.name, dim): {plate_sizes(site)[dim], frame.full_size}
        for site, stack in zip(sites, stacks, strict=True)
        for dim, frame in stack.items()
    }
    count = Counter((frame.name, dim) for stack in stacks for dim, frame in stack.items())
    shared = [key for key in count if count[key] == max(count.values())]
    wanted = named_plate.get()
    named = [key for key in count if key[0] == (wanted or DATA)]
    if wanted and not named:
        listed = ", ".join(f'"{name}"' for name, _ in count) or "none"
        raise ValueError(
            f'data_plate("{wanted}") names no plate over the data that the model observes; those are {listed}.'
        )
    fitting = [key for key in shared if rows in sizes[key]]
    choice = next((keys for keys in (named, fitting, shared) if keys), [])
    if not choice:
        return None, ""
    if len(choice) > 1:
        listed = " and ".join(f'"{name}" (dim {dim})' for name, dim in choice)
        ambiguity = (
            f"the plate over the data may be {listed}: choose one with pyrovae.data_plate(name), or name one of them "
            f'"{DATA}"'
        )
        return None, ambiguity
    ((name, dim),) = choice
    names = {name}
    for key in model_sites.keys() & guide_sites.keys():
        if any(frame.dim == dim and frame.name == name for frame in model_sites[key]["cond_indep_stack"]):
            names.update(frame.name for frame in guide_sites[key]["cond_indep_stack"] if frame.dim == dim)
    return DataPlate(frozenset(names), dim), ""


def _names(sites: Sites) -> str:
    return ", ".join(f'"{name}"' for name in sites) or "none"


def _check_batch_shape(name: str, site: dict) -> None:
    plates, shape = plate_sizes(site), site["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] != plates.get(dim, 1):
            raise ValueError(
                f'Site "{name}" has batch shape {tuple(shape)}, but {describe_plates(site)}. Put it in a plate '
                f'(with pyro.plate("{DATA}", len(x)): ...) or declare event dimensions with .to_event(n).'
            )


def _problems(
    model_sites: Sites, guide_sites: Sites, data: DataPlate | None, global_observed: frozenset[str]
) -> Iterator[str]:
    """Yields the reasons why importance weights per datum are undefined."""
    named = "the plate " + (str(data) if data else f'"{DATA}"')
    for where, sites in (("model", model_sites), ("guide", guide_sites)):
        outside = [
            name
            for name, site in sites.items()
            if name not in global_observed
            and not (where == "guide" and site["is_observed"])
            and (not data or not data.frame(site))
        ]
        if outside:
            listed = ", ".join(f'"{name}"' for name in outside[:3]) + (
                f" and {len(outside) - 3} more" if outside[3:] else ""
            )
            verb = "is" if len(outside) == 1 else "are"
            yield f"site{'s' if outside[1:] else ''} {listed} of the {where} {verb} outside {named}"
        for name, site in sites.items():
            for frame in site["cond_indep_stack"]:
                over_data = data is not None and frame.dim == data.dim and frame.name in data.names
                if frame.vectorized and not over_data and frame.full_size not in (None, frame.size):
                    yield f'site "{name}" of the {where} is in the plate "{frame.name}", which is subsampled'
    for name, site in model_sites.items():
        if isinstance(unwrapped(site["fn"]), ImproperUniform):
            yield f'site "{name}" of the model is an ImproperUniform, which has no density'
    latents = {name: site for name, site in guide_sites.items() if not site["is_observed"]}
    auxiliary = [name for name, site in latents.items() if site["infer"].get("is_auxiliary")]
    points = [name for name, site in latents.items() if isinstance(unwrapped(site["fn"]), Delta)]
    # Pyro's automatic guides draw auxiliary numbers and map them to the latents by a bijection. Such points have a
    # density, that of the numbers and the bijection.
    drawn = sum(latents[name]["value"].numel() for name in auxiliary)
    if not auxiliary or drawn != sum(num_reals(model_sites.get(name, latents[name])) for name in points):
        for name in points:
            yield f'site "{name}" of the guide is a point (Delta), which has no density'
        for name in auxiliary:
            yield f'site "{name}" of the guide is auxiliary'
    for name, site in model_sites.items():
        if site["infer"].get("is_auxiliary") and not site["is_observed"] and name not in guide_sites:
            yield f'site "{name}" of the model is auxiliary'
    for name in model_sites.keys() - guide_sites.keys():
        if not model_sites[name]["is_observed"]:
            yield f'site "{name}" of the model is enumerated, and the guide does not sample it'
