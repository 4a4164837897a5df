"""What all diagnostics share: the base class of results, and access to latents and data by site."""

import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae import arguments, notebooks
from pyrovae.arguments import take_rows
from pyrovae.data.columns import Modelled
from pyrovae.distributions import center
from pyrovae.estimators import Estimator
from pyrovae.estimators.task import checked
from pyrovae.inference.missing import fills_in
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure, inspect
from pyrovae.inference.weights import check_draws
from pyrovae.plots.drawing import write
from pyrovae.rows import number_type

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE_WIDTH = 80  # characters


@dataclass(frozen=True, eq=False)
class ReportInputs:
    """A trained model with data, for a report by all diagnostics.

    Args:
        model: a Pyro model of one tensor of data, and of its context, if there is one.
        guide: a Pyro guide of the same.
        x: the data to look at, ``(batch, *x_shape)``.
        train: training data, ``(size, *x_shape)``.
        held_out: whether `x` are other data than `train`.
        labels: classes of `x`, ``(batch,)``, or None.
        other: a second set of data, to tell from `x`, or None.
        method: an estimator of log p(x); None for the default.
        nuts_samples: draws per NUTS chain.
        columns: for a table, the columns of the data, ``schema.modelled``, or None.
        generated: for a table, rows drawn from the model, as many as `x` or more, or None.
        context: the context of `x`, ``(batch, context_dim)``, or None.
        train_context: that of `train`.
        other_context: that of `other`.
    """

    model: Callable
    guide: Callable
    x: Tensor
    train: Tensor
    held_out: bool
    labels: Tensor | None = None
    other: Tensor | None = None
    method: Estimator | None = None
    nuts_samples: int = 1000
    columns: Sequence[Modelled] | None = None
    generated: Tensor | None = None
    context: Tensor | None = None
    train_context: Tensor | None = None
    other_context: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor, ...]:
        """What the model and the guide take for the data to look at."""
        return _with_context(self.x, self.context)

    @property
    def train_args(self) -> tuple[Tensor, ...]:
        """What they take for the training data."""
        return _with_context(self.train, self.train_context)

    @property
    def other_args(self) -> tuple[Tensor, ...] | None:
        """What they take for the second set of data; None if there is none."""
        return None if self.other is None else _with_context(self.other, self.other_context)

    @property
    def few(self) -> int:
        """The number of data for a slow diagnostic, a third of them but at least 30."""
        return max(30, len(self.x) // 3)


def _with_context(x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if context is None else (x, context)


class Diagnosis(ABC):
    """Base of the results of diagnostics: numbers that print as a table with a verdict, and draw themselves.

    To add a diagnostic, write a module with a frozen dataclass derived from this, and a function of a model, a guide
    and data that returns it; then add the class to the registry in ``report.py``, which the command line and the tests
    read. The class defines:

    - ``question``, which it answers, for the report;
    - :attr:`verdict`, one line with the finding and its usual remedy;
    - :meth:`table`, the lines to print above the verdict, at most 80 characters wide;
    - :meth:`numbers`, the numbers for a JSON file;
    - :meth:`draw`, its picture;
    - :meth:`for_report`, which runs the function on the inputs of a report.
    """

    question: ClassVar[str]

    @property
    @abstractmethod
    def verdict(self) -> str:
        """The finding and its usual remedy, in one line."""

    @abstractmethod
    def table(self) -> list[str]:
        """Returns the lines of the table."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Returns the numbers that sum up the result: tensors, numbers, and dicts and lists of these."""

    @abstractmethod
    def draw(self) -> "Figure":
        """Draws the result."""

    @classmethod
    @abstractmethod
    def for_report(cls, inputs: ReportInputs) -> "Diagnosis":
        """Runs the diagnostic as the report does."""

    def summary(self) -> dict[str, Any]:
        """Returns the numbers of the result and the verdict for JSON; None for numbers that are not finite."""
        return _to_json({**self.numbers(), "verdict": self.verdict})

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the result; returns a matplotlib figure, and writes it if a path is given."""
        return write(self.draw(), path)

    def _repr_html_(self) -> str:
        """Shows the table with the verdict, and the picture, in a notebook."""
        return notebooks.preformatted(str(self)) + notebooks.picture(self.draw())

    def __str__(self) -> str:
        return "\n".join([*self.table(), textwrap.fill(self.verdict, TABLE_WIDTH)])


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, Tensor):
        return _to_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Latents(NamedTuple):
    r"""Draws of all latents of each datum, those of all sites concatenated.

    Args:
        values: shape ``(num_draws, batch, total)``.
        columns: the columns of each site in the last dimension.
    """

    values: Tensor
    columns: dict[str, slice]


def latents_of(trace: poutine.Trace, structure: SiteStructure) -> Latents:
    """Returns the latents of each datum in a trace of several draws, without latents outside the data plate."""
    place, parts, columns, at = structure.data_index, [], {}, 0
    for name, site in sample_sites(trace).items():
        if site["is_observed"] or site["infer"].get("is_auxiliary") or site["data"] is None:
            continue
        value, fn = site["value"], site["fn"]
        value = value.expand(fn.batch_shape + fn.event_shape).movedim(place, 1)
        value = value.reshape(*value.shape[:2], -1)  # a scalar gets a dimension
        parts.append(value if value.is_floating_point() else value.to(torch.get_default_dtype()))
        columns[name] = slice(at, at + value.shape[-1])
        at += value.shape[-1]
    if not parts:
        raise ValueError("The guide has no latent site in the data plate, so that there is nothing to diagnose.")
    return Latents(torch.cat(parts, dim=-1), columns)


def names_of(columns: dict[str, slice]) -> list[str]:
    """Returns the names of all latent dimensions; the name of the site for a site with a single dimension.

    >>> names_of({"a": slice(0, 1), "b": slice(1, 3)})
    ['a', 'b[0]', 'b[1]']
    """
    return [
        name if here.stop - here.start == 1 else f"{name}[{i - here.start}]"
        for name, here in columns.items()
        for i in range(here.start, here.stop)
    ]


def at_latents(trace: poutine.Trace, structure: SiteStructure, latents: Latents) -> poutine.Trace:
    """Returns a trace of ``num_draws`` draws with these latents, the inverse of :func:`latents_of`."""
    place, values = structure.data_index, {}
    sites = sample_sites(trace)
    for name, columns in latents.columns.items():
        site = sites[name]
        shape = site["fn"].batch_shape + site["fn"].event_shape
        plates = [n for i, n in enumerate(shape) if i not in (0, place)]
        value = latents.values[..., columns].reshape(*latents.values.shape[:2], *plates).movedim(1, place)
        values[name] = value.to(site["value"].dtype)
    return with_values(trace, values)


def with_values(trace: poutine.Trace, values: dict[str, Tensor]) -> poutine.Trace:
    """Returns a copy of a trace with other values at some sites."""
    changed = trace.copy()
    for name, value in values.items():
        changed.nodes[name] = {**trace.nodes[name], "value": value}
    return changed


def observed_site(trace: poutine.Trace, site: str | None) -> str:
    """Returns the name of the observed site to look at: `site`, or the only one if it is None."""
    # pyro.factor makes an observed site that holds no data.
    sites = [
        name
        for name, node in sample_sites(trace).items()
        if node["is_observed"] and node["data"] is not None and not node["infer"].get("is_auxiliary")
    ]
    if site is None and len(sites) == 1:
        return sites[0]
    if site not in sites:
        raise ValueError(f"site must be one of the model's observed sites, {', '.join(sites) or 'none'}; got {site!r}.")
    return site


def expected_data(trace: poutine.Trace, structure: SiteStructure, site: str) -> Tensor:
    r"""Returns the centre of :math:`p(x \mid z)` for each draw of a model's trace, ``(num_draws, batch, *x_shape)``."""
    return data_second(center(sample_sites(trace)[site]["fn"]), trace, structure, site)


def data_second(value: Tensor, trace: poutine.Trace, structure: SiteStructure, site: str) -> Tensor:
    """Moves the data dimension of a site's value, ``(num_draws, *plates, batch, *event)``, to the second place."""
    fn, depth, place = sample_sites(trace)[site]["fn"], structure.max_plate_nesting, structure.data_index
    value = value.expand(fn.batch_shape + fn.event_shape)
    lead = fn.batch_shape
    # A site under the data plate alone has size 1 in the place of other plates.
    value = value.movedim(place, 1)
    plates = [lead[i] for i in range(1, depth + 1) if i != place and lead[i] > 1]
    return value.reshape(*value.shape[:2], *plates, *value.shape[depth + 1 :])


def inspect_part(model: Callable, guide: Callable, rows: slice, args: tuple, kwargs: dict) -> SiteStructure:
    """Returns the structure of a model and a guide on some rows of the data.

    Raises:
        ValueError: when model and guide do not match, or run only on all data together.
    """
    part, named = take_rows(rows, args, kwargs)
    try:
        return inspect(model, guide, *part, **named)
    except Exception as error:  # plates or shapes that do not match, an error of a network
        try:
            whole, named = take_rows(slice(None), args, kwargs)  # arrays as tensors
            inspect(model, guide, *whole, **named)
        except Exception:
            raise error from None
        cause = str(error).partition("Trace Shapes")[0].strip().splitlines() or [type(error).__name__]
        raise ValueError(
            "model and guide run on all the data, but not on some of them, as this diagnostic takes them: "
            f"{cause[0].rstrip(' .')}. If parameters belong to rows, as in AutoNormal over local latents, give it a "
            "guide with an encoder; log_marginal, reliability, sharpness and quality take all the data at once."
        ) from error


def inspect_posterior(model: Callable, guide: Callable, rows: slice, args: tuple, kwargs: dict) -> SiteStructure:
    """Returns the structure on some rows; raises a ValueError if the posterior of a datum is undefined."""
    structure = inspect_part(model, guide, rows, args, kwargs)
    if structure.problems:
        raise ValueError(
            f"The posterior of a datum is undefined: {'; '.join(structure.problems)}. What belongs to a datum must "
            'stand under pyro.plate("data", len(x)) in the model and in the guide, drawn from a density.'
        )
    args, kwargs = take_rows(rows, args, kwargs)
    return check_draws(structure, model, guide, *args, **kwargs)


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises a ValueError unless an argument is at least `least`."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def in_memory(minimum: int, diagnostic: str, model: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict, int]:
    """Returns arguments whose rows can be taken, with a loader's batches joined, and the number of data.

    Raises:
        ValueError: when there are fewer data than a diagnostic needs, or they are not finite.
    """
    numbers = number_type(model)
    if arguments.as_loader(args, kwargs) is None:
        size = arguments.count_data(*arguments.as_rows(args, kwargs, numbers))
    else:
        args, kwargs, size = arguments.in_memory(args, kwargs, numbers)
    if size < minimum:
        raise ValueError(f"{diagnostic} needs at least {minimum} data, got {size}. Give it more.")
    return checked(args, kwargs, numbers, partial(fills_in, model, None))
