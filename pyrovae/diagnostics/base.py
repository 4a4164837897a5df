"""What all diagnoses have in common: data that can print, draw and summarise itself; latents and data by site."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import arguments
from pyrovae.arguments import take_rows
from pyrovae.distributions import center
from pyrovae.estimators.task import checked
from pyrovae.inference.structure import SiteStructure, inspect, sample_sites
from pyrovae.inference.weights import in_data, inspect_samples, trace_guide, trace_model


class Diagnosis(ABC):
    """Base of what a diagnostic returns: numbers as data, which print as a table with a verdict, and draw themselves.

    A diagnostic is a function of a model, a guide and data that returns one of these, a frozen dataclass. It writes
    :meth:`__str__`, a table no wider than 80 characters; :meth:`summary`, what of it goes into a JSON file;
    :attr:`verdict`, one line that says what was found and what usually mends it; and :meth:`plot`.
    """

    @property
    @abstractmethod
    def verdict(self) -> str:
        """One line: what was found, and what usually mends it."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Returns the numbers that sum it up, as JSON takes them."""

    @abstractmethod
    def plot(self, path: str | Path | None = None) -> Any:
        """Draws it; returns a matplotlib figure, and writes it if a path is given."""


class Latents(NamedTuple):
    r"""Draws of all latents of each datum, one beside the other.

    Args:
        values: shape ``(num_draws, batch, total)``.
        columns: where in the last dimension each site's latents are.
    """

    values: Tensor
    columns: dict[str, slice]


def latents_of(trace: poutine.Trace, structure: SiteStructure) -> Latents:
    """Returns the latents of each datum in a trace of several draws; those outside the data plate are left out."""
    place, parts, columns, at = structure.data_index, [], {}, 0
    for name, site in sample_sites(trace).items():
        if site["is_observed"] or site["infer"].get("is_auxiliary") or not in_data(site):
            continue
        value, fn = site["value"], site["fn"]
        value = value.expand(fn.batch_shape + fn.event_shape).movedim(place, 1)
        value = value.reshape(*value.shape[:2], -1)  # a number's dimension too
        parts.append(value if value.is_floating_point() else value.to(torch.get_default_dtype()))
        columns[name] = slice(at, at + value.shape[-1])
        at += value.shape[-1]
    if not parts:
        raise ValueError("The guide has no latent site in the data plate, so there is nothing to look at.")
    return Latents(torch.cat(parts, dim=-1), columns)


def names_of(columns: dict[str, slice]) -> list[str]:
    """Returns the names of the dimensions of all latents, a site's only one by the name of the site.

    >>> names_of({"a": slice(0, 1), "b": slice(1, 3)})
    ['a', 'b[0]', 'b[1]']
    """
    return [
        name if here.stop - here.start == 1 else f"{name}[{i - here.start}]"
        for name, here in columns.items()
        for i in range(here.start, here.stop)
    ]


def at_latents(trace: poutine.Trace, structure: SiteStructure, latents: Latents) -> poutine.Trace:
    """Returns a trace of ``num_draws`` draws whose latents are given, as :func:`latents_of` lays them out."""
    place, moved = structure.data_index, trace.copy()
    for name, columns in latents.columns.items():
        site = trace.nodes[name]
        shape = site["fn"].batch_shape + site["fn"].event_shape
        plates = [n for i, n in enumerate(shape) if i not in (0, place)]
        value = latents.values[..., columns].reshape(*latents.values.shape[:2], *plates).movedim(1, place)
        moved.nodes[name] = {**site, "value": value.to(site["value"].dtype)}
    return moved


def observed_site(trace: poutine.Trace, site: str | None) -> str:
    """Returns the name of the observed site to look at: the one that is named, or the only one."""
    # pyro.factor makes an observed site that holds no data.
    sites = [
        name
        for name, node in sample_sites(trace).items()
        if node["is_observed"] and in_data(node) and not node["infer"].get("is_auxiliary")
    ]
    if site is None and len(sites) == 1:
        return sites[0]
    if site not in sites:
        raise ValueError(f"site must be one of the model's observed sites, {', '.join(sites) or 'none'}; got {site!r}.")
    return site


def expected_data(trace: poutine.Trace, structure: SiteStructure, site: str) -> Tensor:
    r"""Returns the centre of :math:`p(x \mid z)` in a model's trace of several draws, ``(num_draws, batch, *x_shape)``."""
    p = trace.nodes[site]["fn"]
    return beside_draws(center(p), trace, structure, site)


def drawn_data(trace: poutine.Trace, structure: SiteStructure, site: str) -> Tensor:
    r"""Draws from :math:`p(x \mid z)` in a model's trace of several draws, ``(num_draws, batch, *x_shape)``."""
    return beside_draws(trace.nodes[site]["fn"].sample(), trace, structure, site)


def beside_draws(value: Tensor, trace: poutine.Trace, structure: SiteStructure, site: str) -> Tensor:
    """Moves the data of a site's value, ``(num_draws, *plates, batch, *event)``, next to the draws."""
    fn, depth, place = trace.nodes[site]["fn"], structure.max_plate_nesting, structure.data_index
    value = value.expand(fn.batch_shape + fn.event_shape)
    lead = fn.batch_shape
    # A site under the data plate alone has ones in the place of other plates.
    value = value.movedim(place, 1)
    plates = [lead[i] for i in range(1, depth + 1) if i != place and lead[i] > 1]
    return value.reshape(*value.shape[:2], *plates, *value.shape[depth + 1 :])


def look(
    model: Callable, guide: Callable, num_draws: int, *args: Any, **kwargs: Any
) -> tuple[SiteStructure, poutine.Trace, poutine.Trace]:
    """Runs a guide, and the model at its draws; returns the structure of both and their traces."""
    structure = inspect_samples(model, guide, *args, **kwargs)
    drawn = trace_guide(guide, structure, num_draws, *args, **kwargs)
    return structure, drawn, trace_model(model, drawn, structure, num_draws, *args, **kwargs)


def inspect_part(model: Callable, guide: Callable, rows: slice, args: tuple, kwargs: dict) -> SiteStructure:
    """Returns the structure of a model and a guide on some rows of the data.

    Raises:
        ValueError: when they do not fit each other, or run on all the data alone.
    """
    part, named = take_rows(rows, args, kwargs)
    try:
        return inspect(model, guide, *part, **named)
    except Exception as error:  # plates that do not fit, shapes that do not, a network's own error
        try:
            inspect(model, guide, *args, **kwargs)
        except Exception:
            raise error from None
        raise ValueError(
            "model and guide run on all the data, but not on some of them, as a guide does whose parameters belong to rows (AutoNormal "
            "over local latents): this diagnostic takes the data in parts. Give it a guide with an encoder; log_marginal, reliability, "
            "sharpness and quality take such a guide."
        ) from error


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises a ValueError unless an argument is at least so large."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def in_memory(minimum: int, what_for: str, args: tuple, kwargs: dict) -> tuple[tuple, dict, int]:
    """Returns arguments whose rows can be taken, a loader's data in one piece, and the number of data.

    Raises:
        ValueError: when there are too few for a diagnostic, or they are not finite.
    """
    if arguments.loader_of(args, kwargs) is None:
        size = arguments.count_data(*arguments.converted(args, kwargs))
    else:
        args, kwargs, size = arguments.in_memory(args, kwargs)
    if size < minimum:
        raise ValueError(f"{what_for} needs at least {minimum} data, got {size}. Give it more.")
    return checked(args, kwargs)
