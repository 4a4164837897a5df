r"""An estimator that spends on each datum what it needs."""

import math
import time
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
_FIRST_BLOCK = 8  # under a budget of time, before it is known how long stages take
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

    is at most `target`. k-hat of the pilot run must be at most 0.5, to leave room for that of the full run: trust ends at
    0.7. The draws of the pilot run are then thrown away, and a full run with new draws counts, whatever
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
        target: largest standard error that a stage may leave to a datum, in nats, as far as a pilot run can tell. The last
            stage may leave a larger one.
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

    @property
    def needs_guide(self) -> bool:
        """Whether one of the stages uses the guide."""
        return any(stage.needs_guide for stage in self._all_stages)

    @property
    def _all_stages(self) -> list[Estimator]:
        return _STAGES if self.stages is None else self.stages

    def estimate(self, task: Task) -> Estimate:
        numbers, largest = (range(len(self.stages)), task.size) if self.stages is not None else _choose_stages(task)
        stages = [_Stage(number, self._all_stages[number]) for number in numbers]
        task.start(task.size, "datum")
        # Under a budget, every estimate is late by the time that a block takes longer than the last.
        clock = _Clock(self.seconds)
        block_size = _FIRST_BLOCK if self.seconds is not None else _BLOCK
        parts, start = [], 0
        while start < task.size:
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
        result = _Result(len(block))
        left = torch.arange(len(block))
        reserve = clock.time_of_run(stages[0])  # for each datum that waits
        for stage in stages:
            expected = len(left) * (clock.time_of_pilot(stage) + clock.time_of_run(stage))
            if not clock.allows(expected + reserve * (rest + len(left) * (stage is not stages[0]))):
                served = clock.run(stages[0], stages[0].estimator, task, block[left])
                result.add(left, served, -1)
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
        pilot = clock.run(stage, smaller, task, block[left], is_pilot=True)
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
        self.began, self.seconds = time.monotonic(), seconds
        self.pilots: dict[int, float] = {}  # seconds per datum in the latest run, by number of the stage
        self.runs: dict[int, float] = {}
        self.shares: dict[int, float] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def allows(self, expected: float) -> bool:
        return self.seconds is None or self.elapsed + expected <= self.seconds

    def time_of_pilot(self, stage: _Stage) -> float:
        return self.pilots.get(stage.number, 0.0)

    def time_of_run(self, stage: _Stage) -> float:
        """Returns the seconds per datum of a full run; before the first, by the pilot run, and zero before that."""
        known = self.runs.get(stage.number)
        return self.time_of_pilot(stage) / self.shares.get(stage.number, 1.0) if known is None else known

    def run(self, stage: _Stage, estimator: Estimator, task: Task, rows: Tensor, is_pilot: bool = False) -> Estimate:
        """Scores some rows of a task without its progress bar, and remembers the time."""
        began = self.elapsed
        found = _run(estimator, task, rows)
        if found.value.is_cuda:
            torch.cuda.synchronize(found.value.device)
        (self.pilots if is_pilot else self.runs)[stage.number] = (self.elapsed - began) / len(rows)
        if is_pilot:
            self.shares[stage.number] = estimator.num_samples / stage.estimator.num_samples
        return found


class _Result:
    """The runs that count for the data of a block, and the largest value that each datum had in a pilot run.

    Args:
        size: number of data.
    """

    def __init__(self, size: int):
        self.size = size
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

        columns = [
            in_order([getattr(part, name) for _, part, _ in self.parts])
            for name in ("value", "standard_error", "ess", "khat")
        ]
        stage = in_order([torch.full_like(part.value, number, dtype=torch.long) for _, part, number in self.parts])
        reliable = in_order([part.trusted for _, part, _ in self.parts]) & (stage >= 0)
        value, error = columns[:2]
        for rows, pilot in self.pilots:
            rows = rows.to(value.device)
            bound = _AGREEMENT * (pilot.standard_error.square() + error[rows].square()).sqrt()
            reliable[rows] &= ~(pilot.value - value[rows] > bound)
        num_samples = max(part.num_samples for _, part, _ in self.parts)
        return Estimate(*columns, num_samples, method, {"stage": stage, "reliable": reliable})


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
