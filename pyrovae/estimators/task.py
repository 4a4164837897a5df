r"""What an estimator works on: a model, a guide and data, checked once and cut into chunks."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrovae import arguments
from pyrovae.arguments import take_rows, tensors_of
from pyrovae.compilation.cache import GraphCache
from pyrovae.compilation.playback import play_back
from pyrovae.estimators.base import Estimator
from pyrovae.estimators.memory import split_evenly
from pyrovae.estimators.supports import Combinations
from pyrovae.inference.elimination import check_eliminable, log_sums
from pyrovae.inference.messages import check_all_observed, check_mass
from pyrovae.inference.missing import Fills, check_filled, fills_in
from pyrovae.inference.running import evaluation_mode, isolated, traced
from pyrovae.inference.sites import latents_of_trace, sample_sites
from pyrovae.inference.structure import SiteStructure, inspect, rows_are_data
from pyrovae.inference.weights import (
    check_draws,
    check_independent,
    check_rows_alone,
    in_plate_of_one,
    inspect_weights,
    log_prob_of,
    log_q_of,
    masked_as,
    per_datum,
    trace_guide,
    trace_model,
    unmasked_log_prob_of,
)
from pyrovae.progress import tqdm
from pyrovae.rows import NumberType, number_type

_FIRST_ROWS = 7  # data on which a model and a guide are inspected first


_MOST_SUMMED = 64  # combinations of values of discrete latents; each draw is scored once for each

# With more inputs, an operation takes so long that playing back saves less time than tracing and comparing takes.
_MOST_NUMBERS = 2**17


@dataclass(frozen=True)
class Task:
    """A model, a guide and data to score, with a memory budget.

    Args:
        model: a Pyro model.
        guide: a Pyro guide; the prior of the model where the estimator uses no guide.
        structure: the sites of both.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        size: number of data.
        max_memory: budget for intermediate results, in bytes.
        bar: the progress bar.
        graphs: cache of compiled graphs; None to run eagerly.
        offset: index of the first datum in the whole data set, or those of all, ``(size,)``, on the CPU.
        divisible: whether some of the data can be scored alone; not so if parameters of the guide belong to rows.
        summed: values of the discrete latents that log-probabilities are sums over; None without.
        eliminates: whether these latents are eliminated one after the other, and not by all of their combinations.
        unmasked: whether the densities of latents, of the model and of what draws them, count where they are masked.
            Latents that play no part then have a density whose integral is one, which proposals without masks need.
        masks: of latents in the model, where the guide masks them otherwise. Draws of the guide alone may be hidden by
            them, in place of counting `unmasked`, which is noise.
    """

    model: Callable
    guide: Callable
    structure: SiteStructure
    args: tuple
    kwargs: dict[str, Any]
    size: int
    max_memory: float
    bar: tqdm
    graphs: GraphCache | None = None
    offset: int | Tensor = 0
    divisible: bool = True
    summed: Combinations | None = None
    eliminates: bool = False
    unmasked: bool = False
    masks: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, rows: slice | Tensor) -> "Task":
        """Returns the task for some of the data, a slice or indices; for all of them if it is not divisible."""
        if not self.divisible:
            return self
        args, kwargs = take_rows(rows, self.args, self.kwargs)
        size = len(rows) if isinstance(rows, Tensor) else len(range(self.size)[rows])
        places = rows.cpu() if isinstance(rows, Tensor) else rows
        offset: int | Tensor
        if isinstance(self.offset, Tensor):
            offset = self.offset[places]
        else:
            offset = self.offset + (places if isinstance(places, Tensor) else range(self.size)[places].start)
        return replace(self, args=args, kwargs=kwargs, size=size, offset=offset)

    def split(self, chunk_size: int) -> Iterator["Task"]:
        """Yields tasks for chunks of about `chunk_size` data, in order."""
        # No chunk holds a single row, if there are more: some models squeeze it away.
        sizes = split_evenly(self.size, min(max(chunk_size, 2), self.size) if self.divisible else self.size)
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [sizes[-2] + 1]
        structure = self.structure
        for start, end in pairwise(accumulate(sizes, initial=0)):
            part = self.rows(slice(start, end))
            # Checked on every chunk: on some rows a network that cannot take draws at once may still agree by chance.
            with arguments.row_positions(part.offset):
                masks = check_independent(structure, self.model, self.guide, *part.args, **part.kwargs)
                structure = check_draws(structure, self.model, self.guide, *part.args, **part.kwargs)
            if self.summed is not None and not self.eliminates:
                self.summed.check(sample_sites(replace(part, summed=None).draw(1, prior_of(self.model))[0]))
            unmasked = self.unmasked or masks is None or bool(masks)
            yield replace(part, structure=structure, unmasked=unmasked, masks={} if masks is None else masks)

    def by_values(self) -> "list[Task]":
        """Returns a task for each combination of the latents that are summed over; itself without, or if eliminated."""
        if self.summed is None or self.eliminates:
            return [self]
        numbers = range(self.summed.total)
        return [replace(self, summed=self.summed._replace(only=number), graphs=None) for number in numbers]

    def start(self, total: float, unit: str) -> None:
        """Resets the progress bar to a total of some unit."""
        self.bar.unit = unit
        self.bar.reset(total)

    def advance(self, amount: float) -> None:
        """Moves the progress bar, but never past its end by rounding."""
        self.bar.update(max(0.0, min(amount, (self.bar.total or 0.0) - self.bar.n)))

    def draw(self, num_samples: int, guide: Callable | None = None) -> tuple[poutine.Trace, Tensor]:
        r"""Runs a guide (the task's by default); returns its trace and :math:`\log q`, ``(num_samples, batch)``.

        Neither has the latents that are summed over.
        """
        with arguments.row_positions(self.offset):
            trace = trace_guide(guide or self.guide, self.structure, num_samples, *self.args, **self.kwargs)
        trace = self.without_summed(trace)
        return trace, self.log_q_of(trace)

    def log_q_of(self, trace: poutine.Trace) -> Tensor:
        r"""Returns :math:`\log q` of the latents in a guide's trace, ``(num_samples, batch)``."""
        return log_q_of(trace, lambda q: self.log_prob_of(masked_as(q, self.masks)))

    def log_prob_of(self, site: dict) -> Tensor:
        """Returns the log-probability of a site of a trace, masked or not."""
        is_summed = self.summed is not None and site["name"] in self.summed.sites
        counts = not site["is_observed"] and (self.unmasked or is_summed)
        return unmasked_log_prob_of(site) if counts else log_prob_of(site)

    def check_not_summed(self, user: str) -> None:
        """Raises a ValueError if latents are summed over, for a user that draws them all, "ParticleFilter" for one."""
        if self.summed is not None:
            names = ", ".join(f'"{name}"' for name in sorted(self.summed.sites))
            raise ValueError(
                f"{user} draws all latents, and the guide lacks {names}, which the model enumerates. Draw them in the "
                "guide too."
            )

    def without_summed(self, trace: poutine.Trace) -> poutine.Trace:
        """Returns a trace without the latents that are summed over."""
        if self.summed is None:
            return trace
        kept = trace.copy()
        for name in self.summed.sites.keys() & trace.nodes.keys():
            kept.remove_node(name)
        return kept

    def score(self, trace: poutine.Trace, num_samples: int, check_data: bool = False) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log p(z)` and :math:`\log p(x \mid z)` at a trace's latents, ``(num_samples, batch)`` each.

        Args:
            trace: a guide's trace.
            num_samples: number of draws in the trace.
            check_data: whether to check that the data have a density under the model; such a run is never compiled.
        """
        if self.graphs is None or check_data or torch.is_grad_enabled():
            return self._score(trace, num_samples, check_data)
        latents = [site["value"] for site in sample_sites(trace).values()]
        return self.compute(lambda: self._score(trace, num_samples, False), latents, ("score", num_samples))

    def compute(self, function: Callable[[], Any], inputs: list[Tensor], static: tuple) -> Any:
        """Returns the result of a function of the model and some tensors, by a compiled graph if the task has a cache.

        Args:
            function: the function.
            inputs: the tensors that it reads, apart from the data of the task and what the model reads.
            static: hashable key that distinguishes the function from others.
        """
        if self.graphs is None:
            return function()
        leaves = tree_leaves((self.args, self.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        if self.graphs.backend is play_back and sum(t.numel() for t in inputs) > _MOST_NUMBERS:
            return function()
        # The structure says how draws are made, which may change from chunk to chunk.
        static = (self.structure, self.unmasked, *static)
        result = self.graphs(lambda leaves: function(), [*inputs, *tensors], (self.model, *others), static)
        return function() if result is None else result[0]

    def _score(self, trace: poutine.Trace, num_samples: int, check_data: bool) -> tuple[Tensor, Tensor]:
        if self.summed is None:
            return self._score_draws(trace, num_samples, check_data)
        if self.eliminates:
            if check_data:  # at some values, those of the prior
                self._score_draws(trace, num_samples, check_data)
            names = frozenset(self.summed.sites)
            with arguments.row_positions(self.offset):
                sums = log_sums(
                    self.model, trace, self.structure, names, num_samples, self.args, self.kwargs, self.log_prob_of
                )
            return sums[0], sums[1] - sums[0]
        total = self.summed.total
        terms = self._score_draws(self._with_values(trace, self.summed, num_samples), total * num_samples, check_data)
        size = max(term.shape[-1] if term.dim() else 1 for term in terms)
        prior, likelihood = (term.expand(total * num_samples, size).unflatten(0, (total, -1)) for term in terms)
        log_prior = prior.logsumexp(0)
        return log_prior, (prior + likelihood).logsumexp(0) - log_prior

    def _with_values(self, trace: poutine.Trace, summed: Combinations, num_samples: int) -> poutine.Trace:
        """Returns a trace with each draw once for each combination of values of the discrete latents."""
        spread, depth = trace.copy(), self.structure.max_plate_nesting
        for name, site in sample_sites(trace).items():
            value = site["value"]
            if value.dim() - len(site["fn"].event_shape) > depth:  # else the same in all draws
                value = value.expand(num_samples, *value.shape[1:]).repeat(summed.total, *[1] * (value.dim() - 1))
            spread.nodes[name] = {**site, "value": value}
        numbers = torch.arange(summed.total).repeat_interleave(num_samples)
        for name, value in summed.values(numbers, self.size).items():
            fn = pyro.distributions.Delta(value, event_dim=value.dim() - depth - 1)
            spread.nodes[name] = {**summed.nodes[name], "fn": fn, "value": value}
        return spread

    def _score_draws(self, trace: poutine.Trace, num_samples: int, check_data: bool) -> tuple[Tensor, Tensor]:
        with arguments.row_positions(self.offset):
            scored = trace_model(self.model, trace, self.structure, num_samples, *self.args, **self.kwargs)
            if check_data:
                check_all_observed(scored)
        prior: list[Tensor] = []
        likelihood: list[Tensor] = []
        for name, site in sample_sites(scored).items():
            if name in self.structure.global_observed:
                continue
            log_prob = self.log_prob_of(site)
            if not site["is_observed"]:
                prior.append(per_datum(site, log_prob))
                continue
            if check_data:
                check_mass(name, site["fn"], log_prob)
            likelihood.append(per_datum(site, log_prob))
        log_prior, log_likelihood = torch.as_tensor(sum(prior, 0.0)), torch.as_tensor(sum(likelihood, 0.0))
        if self.structure.data is not None:
            batch = max(term.shape[-1] if term.dim() else 0 for term in (log_prior, log_likelihood))
            self.structure.data.check_in_order(batch, self.size)
        return log_prior, log_likelihood


def sum_out_discrete(task: Task) -> Task:
    r"""Returns a task that sums over the values of discrete latents beside continuous ones, if there are few.

    .. math:: p(x, z) = \sum_y p(x, y, z)

    Its scores are those of the continuous latents z alone, which gradients can move.
    """
    structure = task.structure
    if not structure.discrete or structure.discrete == structure.latents:
        return task
    try:
        return sum_out(task, structure.discrete)
    except ValueError:  # there are many, or they cannot be listed
        return task


def sum_out(task: Task, names: frozenset[str]) -> Task:
    """Returns a task that sums over the values of some discrete latents, and of those that it did before.

    Raises:
        ValueError: when the values cannot be listed, or there are too many.
    """
    if task.summed is not None:
        names = names | task.summed.sites.keys()
    few = replace(task.rows(slice(0, 2)), graphs=None, summed=None, eliminates=False)
    sites = sample_sites(few.draw(1, prior_of(task.model))[0])
    absent = sorted(names - sites.keys())
    if absent:
        raise ValueError(
            f'site "{absent[0]}" is drawn for some numbers of rows, and not for others: are the rows the steps of a '
            "series? Give a single series a dimension for the batch, x[None], and take steps from x[:, t]."
        )
    summed = Combinations.of({name: sites[name] for name in sorted(names)}, task.structure.data_index)
    if summed.total > _MOST_SUMMED:
        sizes = {name: len(site.values) for name, site in summed.sites.items()}
        try:
            check_eliminable(few.model, prior_of(few.model), few.structure, sizes, few.args, few.kwargs)
        except ValueError as error:
            listed = ", ".join(f'"{name}"' for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"the latents at {listed} have {summed.written} combinations of values, more than the "
                f"{_MOST_SUMMED} that are summed over, and cannot be eliminated one after the other: {error}. Draw "
                "them in the guide too, and take AnnealedImportanceSampling()."
            ) from None
    structure = task.structure._replace(
        discrete=task.structure.discrete - names, latents=task.structure.latents - names
    )
    return replace(task, summed=summed, eliminates=summed.total > _MOST_SUMMED, structure=structure)


class _Completed:
    """A guide that draws some discrete latents, which it lacks, as the model does given the other latents.

    Args:
        guide: a Pyro guide.
        model: the Pyro model.
        names: names of the latents.
    """

    def __init__(self, guide: Callable, model: Callable, names: frozenset[str]):
        self.guide, self.model, self.names = guide, model, names

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with poutine.trace() as tracer:
            self.guide(*args, **kwargs)
        with poutine.block(expose=list(self.names)), poutine.replay(trace=latents_of_trace(tracer.trace)):
            self.model(*args, **kwargs)


def _completed(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[Callable, frozenset[str]]:
    """Returns a guide that draws the latents that a model enumerates too, as for TraceEnum_ELBO, and their names."""
    with isolated(tensors_of(args, kwargs)):
        try:
            drawn = traced(guide, None, *args, **kwargs)
            sites = sample_sites(traced(model, latents_of_trace(drawn), *args, **kwargs))
        except Exception:  # raised again where both are inspected
            return guide, frozenset()
    latents = {name: site for name, site in sites.items() if not site["is_observed"] and name not in drawn.nodes}
    names = frozenset(name for name, site in latents.items() if site["infer"].get("enumerate"))
    return (_Completed(guide, model, names) if names else guide), names


def prior_of(model: Callable) -> Callable:
    """Returns a guide that draws the latents as the model does, without looking at the data."""

    def guide(*args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"]):
            model(*args, **kwargs)

    return guide


@contextmanager
def open_task(
    model: Callable,
    guide: Callable | None,
    method: Estimator,
    args: tuple,
    kwargs: dict,
    max_memory: float,
    progress: bool,
    offset: int = 0,
) -> Iterator[Task]:
    """Checks a model, a guide and data, and yields the task of scoring them; modules are in evaluation mode inside."""
    if not (isinstance(max_memory, Real) and 0 < max_memory < math.inf):
        raise ValueError(f"max_memory must be a positive number of bytes, got {max_memory!r}.")
    if not method.needs_guide:
        guide = prior_of(model)
    elif guide is None:
        raise ValueError(
            f"{type(method).__name__} needs a guide, got None. Take "
            "AnnealedImportanceSampling(), or ImportanceSampling(proposal=Prior())."
        )
    args, kwargs, size = checked(args, kwargs, number_type(model, guide), partial(fills_in, model, guide))
    # Fewer rows than all, to see whether some of the data can be scored alone.
    few = min(_FIRST_ROWS, max(size - 1, 1))
    head, named = take_rows(slice(0, few), args, kwargs)
    # The bar shows itself only after a delay: by then the method has set its total.
    bar = tqdm(desc="log p(x)", total=size, unit_scale=True, delay=0.5, disable=not progress)
    with evaluation_mode(), bar, arguments.row_positions(offset):
        given = guide
        guide, enumerated = _completed(model, given, head, named)
        try:
            structure = inspect_weights(model, guide, *head, num_samples=1, **named)
            divisible = rows_are_data(model, guide, structure, head, named)
            if arguments.holds_packed(args, kwargs):
                # The last rows too: they are the shortest, and may not fit what was cut to the longest.
                tail, named = take_rows(slice(size - few, size), args, kwargs)
                inspect(model, guide, *tail, **named)
        except Exception:  # parameters of a guide that belong to rows, for example
            divisible = False
        if not divisible:
            args, kwargs = take_rows(slice(None), args, kwargs)  # arrays as tensors
            guide, enumerated = _completed(model, given, args, kwargs)
            if not inspect(model, guide, *args, **kwargs).has_plates:
                (model, guide), size = in_plate_of_one(model, guide), 1
            structure = inspect_weights(model, guide, *args, num_samples=1, **kwargs)
            if structure.data_drawn is not None and not structure.holds_rows(size):
                size = structure.data_drawn  # the data lie along another dimension than the first
        if divisible and few > 1 and not arguments.holds_packed(args, kwargs):
            check_rows_alone(structure, model, guide, head, named)
        if not structure.observed:
            raise ValueError(
                "the model observes nothing, so that there is no log p(x): give its data to a site, "
                'pyro.sample("x", ..., obs=x). Were model and guide swapped?'
            )
        task = Task(model, guide, structure, args, kwargs, size, max_memory, bar, offset=offset, divisible=divisible)
        yield sum_out(task, enumerated) if enumerated else task


def checked(args: tuple, kwargs: dict, numbers: NumberType, fills: Fills) -> tuple[tuple, dict, int]:
    """Returns what :func:`pyrovae.arguments.canonicalize` returns, after :func:`check_filled`."""
    args, kwargs, size = arguments.canonicalize(args, kwargs, numbers)
    check_filled(args, kwargs, fills)
    return args, kwargs, size
