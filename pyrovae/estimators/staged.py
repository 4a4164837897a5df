r"""An estimator that spends on each datum what it needs."""

import math
import time
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrovae.estimators.annealed import AnnealedImportanceSampling
from pyrovae.estimators.base import Estimate, Estimator, check_positive, join
from pyrovae.estimators.exact import Enumeration
from pyrovae.estimators.laplace import Laplace
from pyrovae.estimators.memory import clamp
from pyrovae.estimators.proposals import Guide, WeightedGuide
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task, prior_of
from pyrovae.estimators.weighted import ImportanceSampling
from pyrovae.inference.structure import SiteStructure

_BLOCK = 200  # data that pass through the stages together, at most
_FIRST_BLOCKS = (4, 12)  # under a budget of time: two sizes, from which the time of more data follows
_NUM_TIMES = 6  # latest runs of a stage from which the time of the next is computed
_BLOCK_TIME = 0.1  # of the budget, at most, for a block
_MAX_DIM = 300  # of the latents of a datum, for Laplace's approximation: its time rises with the square
_LEAST_PILOT = 25  # draws of a pilot run: k-hat needs 21
_PILOT_KHAT = 0.5  # k-hat of a pilot run, which is chosen among several, is smaller than that of the full run
_AGREEMENT = 4.0  # standard errors by which a pilot run may be above the value that counts

# From the cheapest; which of them serve depends on the latents.
_ENUMERATION, _GUIDE, _MANY, _LAPLACE, _ANNEALING, _ANNEALING_FROM_GUIDE = range(6)
_STAGES: list[Estimator] = [
    Enumeration(10_000),
    ImportanceSampling(2000),
    ImportanceSampling(20_000),
    ImportanceSampling(4000, Laplace()),
    AnnealedImportanceSampling(start=Laplace()),
    AnnealedImportanceSampling(start=Guide()),
]


class UntilTrusted(Estimator):
    r"""Stages of estimators, cheapest first: each datum is scored by the first that a pilot run finds good enough.

    A stage is good enough for a datum if its pilot run is trusted, and the standard error that its full run is to have,

    .. math:: s_{\text{pilot}} \sqrt{K_{\text{pilot}} / K},

    is at most `target`. k-hat of the pilot run must be at most 0.5, to leave room for that of the full run: trust ends
    at 0.7. The draws of the pilot run are then thrown away, and a full run with new draws counts, whatever
    it gives: the choice of the stage does not depend on the draws that count, so that the result is unbiased for p(x)
    where the stages are. The last stage scores all data that are left.

    A datum is trusted if its full run is, and if no pilot run of any stage was higher by more than four standard errors
    of the difference: since pilot runs are unbiased too, mass was missed otherwise.

    The default stages depend on the latents:

    - discrete: :class:`Enumeration` of up to 10,000 combinations of values;
    - continuous: importance sampling with the guide, importance sampling with :class:`Laplace`, and annealing from it.
      Above 300 dimensions, :class:`Laplace` takes too long: annealing starts from the guide;
    - those that gradients cannot move, on a sphere for example, discrete ones with more combinations, and both kinds
      together: importance sampling with the guide, with few draws or with many. With discrete latents, no datum is
      trusted.

    Data pass through the stages in blocks. If model and guide do not run on some of the data alone, all data pass
    through the stages that one of them needs.

    Args:
        stages: the estimators, cheapest first; None for those above.
        target: largest standard error that a stage may leave to a datum, in nats, as far as a pilot run can
            tell. The last stage may leave a larger one.
        pilot_share: draws of a pilot run, as a share of those of the full run, at most 1.
        seconds: budget of time for all data; each of several processes has the same. Data for which it does not suffice
            are scored by the first stage alone: they are not trusted, and counted. The first stage runs even if it
            takes longer than the budget. None for no limit.

    The diagnostics are "stage", which is the number of the stage that scored a datum, in the order of the list (or of
    the default list), and -1 where there was no time; and "reliable", which is `trusted`.

    Raises:
        TypeError: when a stage is not an estimator.
        ValueError: when a stage is an upper bound or has stages itself; when a number is out of range.

    References:
        Pareto Smoothed Importance Sampling, A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, 2024,
        https://arxiv.org/abs/1507.02646 (trust by k-hat); Annealed Importance Sampling, R. M. Neal, 2001,
        https://arxiv.org/abs/physics/9803008.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> x = torch.zeros(5, 3)
    >>> estimate = pyrovae.log_marginal(vae.model, vae.guide, x, method=UntilTrusted(), progress=False)
    >>> bool(estimate.trusted.all()), bool((estimate.standard_error < 0.1).all())
    (True, True)
    """

    unit = "draws or fewer"

    def __init__(
        self,
        stages: Sequence[Estimator] | None = None,
        target: float = 0.05,
        pilot_share: float = 0.25,
        seconds: float | None = None,
    ):
        if stages is not None:
            _check_stages(stages)
        check_positive("target", target)
        check_positive("pilot_share", pilot_share, largest=1.0)
        if seconds is not None:
            check_positive("seconds", seconds)
        self.stages = None if stages is None else list(stages)
        self.target, self.pilot_share, self.seconds = target, pilot_share, seconds
        super().__init__(max(stage.num_samples for stage in self._all_stages))
        self.needs_guide = any(stage.needs_guide for stage in self._all_stages)

    @property
    def _all_stages(self) -> list[Estimator]:
        return _STAGES if self.stages is None else self.stages

    def estimate(self, task: Task) -> Estimate:
        numbers, largest = (range(len(self.stages)), task.size) if self.stages is not None else _choose_stages(task)
        stages = [_Stage(number, self._all_stages[number]) for number in numbers]
        task.start(task.size, "datum")
        clock = _Clock(self.seconds)
        parts: list[Estimate] = []
        start, block_size = 0, _BLOCK
        while start < task.size:
            if self.seconds is not None and len(parts) < len(_FIRST_BLOCKS):
                block_size = _FIRST_BLOCKS[len(parts)]
            end = task.size if not task.divisible else min(start + min(block_size, largest), task.size)
            if end == task.size - 1:  # no block of a single row: some models squeeze it away
                end = task.size
            began = clock.elapsed
            parts.append(self._score(task, torch.arange(start, end), stages, clock))
            if self.seconds is not None:
                per_datum = max(clock.elapsed - began, 1e-9) / (end - start)
                block_size = max(2, clamp(_BLOCK_TIME * self.seconds / per_datum, _BLOCK))
            start = end
        return join(self, parts)

    def _score(self, task: Task, block: Tensor, stages: "list[_Stage]", clock: "_Clock") -> Estimate:
        """Scores a block of data, which are given by their indices."""
        rest = task.size - int(block[-1]) - 1
        result, left = _Result(), torch.arange(len(block))
        for stage in stages:
            # Data that a stage does not serve, and those of later blocks, are left to the first stage.
            waiting = rest if stage is stages[0] else rest + len(left)
            if not clock.allows(stage, len(left), stages[0], waiting):
                result.add(left, clock.run(stages[0], stages[0].estimator, task, block[left]), -1)
                task.advance(len(left))
                break
            good = torch.ones(len(left), dtype=torch.bool)
            if stage is not stages[-1]:
                good = self._try(stage, task, block, left, result, clock)
            if good.any():
                result.add(left[good], clock.run(stage, stage.estimator, task, block[left[good]]), stage.number)
                task.advance(int(good.sum()))
            left = left[~good]
            if not len(left):
                break
        clock.num_blocks += 1
        return result.estimate(self)

    def _try(
        self, stage: "_Stage", task: Task, block: Tensor, left: Tensor, result: "_Result", clock: "_Clock"
    ) -> Tensor:
        """Returns for which of the data that are left a stage is good enough, by a pilot run."""
        estimator = stage.estimator
        size = estimator.num_samples
        if estimator.is_random:
            size = min(max(round(self.pilot_share * size), _LEAST_PILOT), size)
        smaller = copy(estimator)
        smaller.num_samples = size
        pilot = clock.run(stage, smaller, task, block[left])
        result.compare(left, pilot)
        error = pilot.standard_error * math.sqrt(size / estimator.num_samples)
        return (pilot.trusted & ~(pilot.khat > _PILOT_KHAT) & (error <= self.target)).cpu()

    def trusts(self, estimate: Estimate) -> Tensor:
        return estimate.diagnostics["reliable"]

    def describe(self, estimate: Estimate) -> str:
        number = estimate.diagnostics["stage"]
        counts = [(_name(stage), int((number == i).sum())) for i, stage in enumerate(self._all_stages)]
        counts.append(("first stage for lack of time", int((number == -1).sum())))
        served = ", ".join(f"{name} {count:,}" for name, count in counts if count)
        untrusted = int((~estimate.trusted).sum())
        return f"scored by: {served}\nnot to be trusted: {untrusted:,} of {len(number):,} data"

    def remedy(self, structure: SiteStructure) -> str:
        if structure.discrete:
            return super().remedy(structure)
        more = "stages with more samples or temperatures"
        return f"Give it {more}." if self.seconds is None else f"Give it more seconds, or {more}."


class _Stage(NamedTuple):
    """A stage, and its number in the list of all."""

    number: int
    estimator: Estimator


class _Clock:
    """Measures how long stages take, and says what the budget of time allows.

    Args:
        seconds: the budget; None for no limit.
    """

    def __init__(self, seconds: float | None):
        self.began, self.seconds, self.num_blocks = time.monotonic(), seconds, 0
        # By number of the stage and number of samples: how many data the latest runs had, and their seconds.
        self.times: dict[tuple[int, int], deque[tuple[int, float]]] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def allows(self, stage: _Stage, size: int, first: _Stage, waiting: int) -> bool:
        """Returns whether a stage can run for some data, and the first stage for those that wait, within the budget."""
        if self.seconds is None:
            return True
        expected = 0.0
        if self.num_blocks >= len(_FIRST_BLOCKS):  # before, the times of few data say nothing about those of many
            pilots = [self._time(*key, size) for key in self.times if key[0] == stage.number]
            expected = sum(pilots) + self._time_of_first(first, waiting)
        return self.elapsed + expected <= self.seconds

    def _time_of_first(self, first: _Stage, size: int) -> float:
        """Returns the seconds of a full run of the first stage; by its pilot runs, if there was no full one."""
        num_samples = first.estimator.num_samples
        if (first.number, num_samples) in self.times:
            return self._time(first.number, num_samples, size)
        return max(self._time(*key, size) * num_samples / key[1] for key in self.times if key[0] == first.number)

    def _time(self, number: int, num_samples: int, size: int) -> float:
        """Returns the seconds of a run, which are linear in the number of data."""
        sizes, seconds = torch.tensor(list(self.times[number, num_samples]), dtype=torch.double).T
        if len(sizes.unique()) == 1:
            return size * (seconds / sizes).mean().item()
        slope = ((sizes - sizes.mean()) * (seconds - seconds.mean())).sum() / (sizes - sizes.mean()).square().sum()
        slope = slope.clamp(min=0.0)
        return ((seconds.mean() - slope * sizes.mean()).clamp(min=0.0) + slope * size).item()

    def run(self, stage: _Stage, estimator: Estimator, task: Task, rows: Tensor) -> Estimate:
        """Scores some rows of a task without its progress bar, and remembers the time."""
        began = self.elapsed
        found = _run(estimator, task, rows)
        if found.value.is_cuda:
            torch.cuda.synchronize(found.value.device)
        times = self.times.setdefault((stage.number, estimator.num_samples), deque(maxlen=_NUM_TIMES))
        times.append((len(rows), self.elapsed - began))
        return found


class _Result:
    """The runs that count for the data of a block, and the pilot runs."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Estimate, int]] = []
        self.pilots: list[tuple[Tensor, Estimate]] = []

    def add(self, rows: Tensor, estimate: Estimate, number: int) -> None:
        self.parts.append((rows, estimate, number))

    def compare(self, rows: Tensor, pilot: Estimate) -> None:
        self.pilots.append((rows, pilot))

    def estimate(self, method: Estimator) -> Estimate:
        """Returns the estimates in the order of the data."""
        order = torch.cat([rows for rows, _, _ in self.parts]).argsort()

        def in_order(values: list[Tensor]) -> Tensor:
            joined = torch.cat(values)
            return joined[order.to(joined.device)]

        value = in_order([part.value for _, part, _ in self.parts])
        error = in_order([part.standard_error for _, part, _ in self.parts])
        ess = in_order([part.ess for _, part, _ in self.parts])
        khat = in_order([part.khat for _, part, _ in self.parts])
        stage = in_order([torch.full_like(part.value, number, dtype=torch.long) for _, part, number in self.parts])
        reliable = in_order([part.trusted for _, part, _ in self.parts]) & (stage >= 0)
        for rows, pilot in self.pilots:
            rows = rows.to(value.device)
            bound = _AGREEMENT * (pilot.standard_error.square() + error[rows].square()).sqrt()
            reliable[rows] &= ~(pilot.value - value[rows] > bound)
        num_samples = max(part.num_samples for _, part, _ in self.parts)
        diagnostics = {"stage": stage, "reliable": reliable}
        return Estimate(value, error, ess, khat, num_samples, method, diagnostics)


def _choose_stages(task: Task) -> tuple[list[int], int]:
    """Returns the numbers of the default stages for a model's latents, and how many data a block may have."""
    structure = task.structure
    if structure.latents == structure.discrete:
        try:
            _STAGES[_ENUMERATION].plan(task)  # type: ignore[attr-defined]
        except ValueError:
            return [_GUIDE, _MANY], task.size
        return [_ENUMERATION], task.size
    few = replace(task.rows(slice(0, 2)), graphs=None)
    try:
        dim = Target(few, WeightedGuide(prior_of(task.model), is_prior=True)).dim
    except ValueError:  # discrete, or not to be moved by gradients
        return [_GUIDE, _MANY], task.size
    if dim > _MAX_DIM:
        return [_GUIDE, _MANY if structure.auxiliary else _ANNEALING_FROM_GUIDE], task.size
    # Laplace's approximation holds some matrices of double precision for each datum.
    return [_GUIDE, _LAPLACE, _ANNEALING], max(2, clamp(task.max_memory / (40 * dim**2), task.size))


def _run(estimator: Estimator, task: Task, rows: Tensor) -> Estimate:
    """Scores some rows of a task without its progress bar."""
    count = len(rows)
    if task.divisible and count == 1 and task.size > 1:  # some models squeeze a single row away
        rows = torch.cat([rows, (rows + 1) % task.size])
    silent = replace(task.rows(rows), bar=tqdm(disable=True))
    found = estimator.estimate(silent)
    chosen = slice(0, count) if task.divisible else rows.to(found.value.device)
    columns = {name: getattr(found, name)[chosen] for name in ("value", "standard_error", "ess", "khat")}
    return replace(found, **columns, diagnostics={name: x[chosen] for name, x in found.diagnostics.items()})


def _name(stage: Estimator) -> str:
    """Returns a stage's name in a summary, with its proposal."""
    proposal = getattr(stage, "proposal", getattr(stage, "start", None))
    return type(stage).__name__ + ("" if proposal is None else f" from {type(proposal).__name__}")


def _check_stages(stages: Sequence[Estimator]) -> None:
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Estimator) for stage in stages):
        raise TypeError(
            "stages must be a list of estimators such as [estimators.ImportanceSampling(), "
            f"estimators.AnnealedImportanceSampling()], got {stages!r}."
        )
    for stage in stages:
        if stage.relation != "=" or isinstance(stage, UntilTrusted):
            raise ValueError(
                f"stages must be estimators of log p(x) without stages of their own, got {stage!r}. Leave it out."
            )
