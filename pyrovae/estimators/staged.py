r"""An estimator that spends on each datum what it needs."""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.annealed import AnnealedImportanceSampling
from pyrovae.estimators.base import DISAGREEMENT, Estimate, Estimator, check_count, check_positive, is_higher
from pyrovae.estimators.budget import BLOCK, Clock, Kind
from pyrovae.estimators.exact import Enumeration, Quadrature
from pyrovae.estimators.laplace import MAX_DIM, Laplace, Shared
from pyrovae.estimators.memory import clamp
from pyrovae.estimators.newton import MAX_DENSE, joint_of
from pyrovae.estimators.proposals import Guide, Prior, WeightedGuide
from pyrovae.estimators.simulated import share_missed, share_unseen
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task, prior_of, sum_out_discrete
from pyrovae.estimators.weighted import ImportanceSampling
from pyrovae.inference.structure import SiteStructure
from pyrovae.progress import tqdm

_LEAST_PILOT = 25  # draws of a pilot run: k-hat needs 21
_LEAST_FULL = 2000  # draws of a full run, if its stage has so many: k-hat of fewer is noisy
_FEWER = math.sqrt(2)  # ratio between the numbers of draws that full runs may have
_PILOT_KHAT = 0.5  # largest k-hat of a pilot run: those that are good by chance are chosen, so that 0.7 is too much
_AGREEMENT = 3.0  # standard errors between means over data
_MISSED = 0.1  # of p(x), on average over data: what may be missed before no datum is trusted
_MANY_MISSED = 0.01  # share of the data with a higher pilot run, above which no datum is trusted
_FIRST_OF_PRIOR = 50  # data: if draws from the prior say nothing of any of them, there are no more
_SIMULATED, _SIMULATED_IF_MANY = 64, 16  # data drawn from the model; the latter with many latents, which take long
_MOST_AT_ENDS = 1e-3  # share of the prior's draws that are rounded to the ends of their support
_PRIOR_DRAWS = 1000  # to find that share
_TELLING = 20  # effective draws from the prior that say something of a datum
_MARGIN = 0.7  # of the target, that a pilot run has to foresee: a full run may draw a larger weight
_MOST_ERROR = 4.0  # targets, up to which a standard error is trusted

_COLUMNS = ("value", "standard_error", "ess", "khat")  # tensors of an estimate

# Which of them serve, and in which order, depends on the latents.
_ENUMERATION, _GUIDE, _MANY, _LAPLACE, _MORE_LAPLACE, _ANNEALING, _FROM_GUIDE, _FROM_PRIOR, _HEAVY = range(9)
_PRIOR, _AGAIN, _LINE, _TAILED, _MORE_TAILED, _FROM_TAILED = range(9, 15)
# Tails of a normal distribution end where scales depend on other latents, as in a funnel, and no draw tells. Those of a
# Student-t distribution with few degrees of freedom reach there, and with few latents they cost little elsewhere.
_DEGREES, _MAX_TAILED = 2.5, 10
_ENUMERATE = Enumeration(10_000)
_FINE, _FINE_TAILED = Laplace(num_pilots=2000), Laplace(num_pilots=2000, degrees=_DEGREES)
_STAGES: list[Estimator] = [
    _ENUMERATE,
    ImportanceSampling(2000),
    ImportanceSampling(20_000),
    ImportanceSampling(4000, Laplace()),
    ImportanceSampling(16_000, _FINE),
    AnnealedImportanceSampling(num_temperatures=400, start=_FINE),
    AnnealedImportanceSampling(start=Guide()),
    AnnealedImportanceSampling(),
    ImportanceSampling(8000, Laplace(degrees=4.0)),
    ImportanceSampling(8000, Prior()),
    ImportanceSampling(2000),
    Quadrature(8000),
    ImportanceSampling(4000, Laplace(degrees=_DEGREES)),
    ImportanceSampling(16_000, _FINE_TAILED),
    AnnealedImportanceSampling(num_temperatures=400, start=_FINE_TAILED),
]


class UntilTrusted(Estimator):
    r"""Stages of estimators, cheapest first: each datum is scored by the first that a pilot run finds good enough.

    A stage is good enough for a datum if its pilot run is trusted, and the standard error that a full run of K draws is
    to have,

    .. math:: s_{\text{pilot}} \sqrt{K_{\text{pilot}} / K},

    is at most 0.7 times `target`, because the full run may draw a larger weight. K is as small as that allows, but at
    least 2,000, and at most the number of the stage. k-hat of the pilot run must be at most 0.5, to leave room for that
    of the full run: trust ends at 0.7. The draws of the pilot run are then thrown away, and a full run with new draws
    counts, whatever it gives: the choice of the stage and of K does not depend on the draws that count, so that the
    result is unbiased for p(x) where the stages are. The last stage scores all data that are left, with all its draws.

    A datum is trusted if its full run is, if its standard error is at most four times `target`, and if no pilot run of
    any stage was higher by more than four standard errors of the difference, or six if it is not trusted: since pilot
    runs are unbiased too, mass was missed otherwise, and the datum has the value of the highest. If more than two data
    and one in a hundred were higher, no datum is trusted: modes of others are missed too. Mass that no stage finds is
    not seen: `num_checked` is for that.

    The latents of data that the model draws are exact draws from their posteriors. The default stages with
    :class:`Laplace` draw up to 64 data, and fit to them: if more than one has latents whose weight is ten nats above
    p(x), there are modes which the stages do not find, and no datum is trusted. If the model cannot draw data in the
    place of what it observes, or if the stage scores few of them well, the summary says that it is not known.

    Where rounding puts more than one in 1,000 draws of the prior at an end of the latents' support, such as 0 and 1,
    different real numbers are one latent, and no datum is trusted.

    One of the pilot runs of the default stages draws from the prior, which knows of no mode. It says nothing where its
    draws do not reach the data, as with many latents. Where it can be trusted, and is higher than the results by more
    than a tenth of p(x) and four standard errors, on average over the data, no datum is trusted.

    The default stages depend on the latents:

    - discrete: :class:`Enumeration` of up to 10,000 combinations of values;
    - one real number: :class:`Quadrature` with 8,000 points, whose grid sees the modes on the line; where that is not
      good enough, as below;
    - continuous: importance sampling with :class:`Laplace`, first with heavy tails where latents are constrained, then
      with few draws and with many; then annealing from it. Its tails are those of Student-t distributions with up to 10
      dimensions, where they cost little, and normal above. Above 300 dimensions with few draws only, and annealing from
      the prior, and from the guide; above 2,000, where :class:`Laplace` takes too long, annealing alone. Discrete
      latents beside continuous ones are summed over, where they have at most 64 combinations of values or can be
      eliminated one after the other;
    - on a sphere, or discrete with more combinations, alone or with others: annealing from the prior, and from the
      guide;
    - in a space without moves: importance sampling with the guide, with few draws or with many.

    A guide that knows one of several modes looks perfect by its weights. It therefore scores no datum where other
    stages look for modes: a pilot run of importance sampling with it is compared with them, and it serves for lack of
    time.

    If model and guide do not run on some of the data alone, a stage runs on all data, and the results of those that it
    does not serve are dropped.

    Args:
        stages: the estimators, cheapest first; None for those above. Stages with the same proposal, as an object,
            share its fit to a datum.
        target: largest standard error that a stage may leave to a datum, in nats, as far as a pilot run can tell. A
            datum with an error above four times the target is not trusted.
        pilot_share: draws of a pilot run, as a share of those of the full run, at most 1.
        seconds: budget of time for all data; each of several processes has the same. Data for which it does not suffice
            are scored by the first stage, with the draws of another pilot run: they are not trusted, and counted. That
            is done even if it takes longer than the budget. None for no limit.
        num_checked: data, drawn at random, that are estimated a second time by `check`: the summary has the mean
            difference with its error. A datum where the two are more than four standard errors apart is not trusted,
            and no datum is if the mean difference is above three. Its time is not in the budget.
        check: the estimator of the second time; annealing from the prior with 100 chains and 1,000 temperatures by
            default, which shares neither guide nor modes with the stages.

    The diagnostics are "stage", which is the number of the stage that scored a datum, in the order of the list, and
    -1 where there was no time; "reliable", what the runs of a datum say of it; "missed", where a pilot run was
    higher; "unseen", the share of data from the model for which modes are missed, in the first batch, zero where all
    is well or nobody looked, NaN where it is not known; and, if some data are checked, "check" and "check_error", the
    second estimates and their standard errors, NaN for the other data. The numbers of the default stages are: 0
    enumeration, 1 the guide with few draws and 2 with many, 3 Laplace with few draws, 4 with many and 8 with heavy
    tails, 5 annealing from Laplace, 6 from the guide and 7 from the prior, 10 the guide again, 12 to 14 as 3 to 5 with
    tails of Student-t distributions.

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
        pilot_share: float = 0.125,
        seconds: float | None = None,
        num_checked: int = 0,
        check: Estimator | None = None,
    ):
        if stages is not None:
            _check_stages(stages)
        if check is not None and (not isinstance(check, Estimator) or check.relation != "="):
            raise TypeError(f"check must be an estimator of log p(x) such as estimators.Quadrature(), got {check!r}.")
        check_count("num_checked", num_checked, least=0)
        check_positive("target", target)
        check_positive("pilot_share", pilot_share, largest=1.0)
        if seconds is not None:
            check_positive("seconds", seconds)
        self.stages = None if stages is None else list(stages)
        self.target, self.pilot_share, self.seconds = target, pilot_share, seconds
        self.num_checked = num_checked
        self.check = AnnealedImportanceSampling(100, 1000) if check is None else check
        super().__init__(max(stage.num_samples for stage in self._all_stages))
        self.needs_guide = any(stage.needs_guide for stage in self._all_stages)
        self.needs_guide |= self.num_checked > 0 and self.check.needs_guide

    @property
    def _all_stages(self) -> list[Estimator]:
        return _STAGES if self.stages is None else self.stages

    def estimate(self, task: Task) -> Estimate:
        found = self._estimate(task)
        return found if self.num_checked == 0 else self._checked(task, found)

    def _checked(self, task: Task, found: Estimate) -> Estimate:
        """Adds second estimates of some data, and trusts none for which they are far from the first.

        If they disagree on average, the other data are not trusted either.
        """
        rows = torch.randperm(task.size)[: self.num_checked].sort().values
        second = _run(self.check, task, rows)
        check, check_error = (torch.full_like(found.value, math.nan) for _ in range(2))
        rows = rows[second.trusted.cpu()]
        second = _take(second, second.trusted)
        check[rows], check_error[rows] = second.value.to(check), second.standard_error.to(check)
        bound = DISAGREEMENT * (found.standard_error.square() + check_error.square()).sqrt()
        reliable = found.diagnostics["reliable"] & ~((check - found.value).abs() > bound)
        diagnostics = found.diagnostics | {"check": check, "check_error": check_error}
        difference, error, _ = _disagreement(replace(found, diagnostics=diagnostics))
        if abs(difference) > _AGREEMENT * error:
            reliable = torch.zeros_like(reliable)
        return replace(found, diagnostics=diagnostics | {"reliable": reliable})

    def _estimate(self, task: Task) -> Estimate:
        plan = _choose_stages(task) if self.stages is None else _Plan(range(len(self.stages)), task.size)
        numbers, largest, compared, fitted, num_simulated, at_ends = plan
        stages, fits = _share_fits([_Stage(number, self._all_stages[number]) for number in numbers])
        task.start(task.size, "datum")
        clock, result, left = Clock(self.seconds, stages[0].number), _Result(compared), torch.arange(task.size)
        for stage in stages:
            prepared = stage.estimator.prepare(task)  # once, not for each block
            passed_on = [left[:0]]
            while len(left):
                size = clock.num_data(stage.number, len(left) + sum(map(len, passed_on)), largest)
                if size == 0:
                    return self._give_up(stages[0], task, torch.cat([*passed_on, left]), result)
                if stage.estimator is _STAGES[_PRIOR] and len(passed_on) == 1:
                    size = min(size, _FIRST_OF_PRIOR)
                n = min(size, len(left)) if task.divisible else len(left)
                block, left = left[:n], left[n:]
                passed_on.append(self._serve(stage, stage is stages[-1], prepared, block, result, clock))
                for fit in fits if task.divisible else []:
                    fit.keep(task.rows(torch.cat(passed_on)).offset)
                task.advance(n - len(passed_on[-1]))
            left = torch.cat(passed_on)
        found = result.estimate(self, _MOST_ERROR * self.target)
        # Once for all batches of a loader and all processes.
        is_first = isinstance(task.offset, int) and task.offset == 0
        if is_first and bool((found.diagnostics["stage"] == _LINE).all()):  # by no draws that could miss modes
            grid = self._all_stages[_LINE]
            assert isinstance(grid, Quadrature)
            found.diagnostics["unseen"].fill_(share_missed(task, grid, num_simulated))
        elif fitted is not None and is_first and clock.allows(fitted, num_simulated):
            estimator = self._smaller(self._all_stages[fitted])
            found.diagnostics["unseen"].fill_(share_unseen(task, estimator, num_simulated, _PILOT_KHAT))
        found.diagnostics["at_ends"].fill_(at_ends)
        return found

    def _serve(
        self, stage: "_Stage", is_last: bool, task: Task, rows: Tensor, result: "_Result", clock: "Clock"
    ) -> Tensor:
        """Scores those of some data for which a stage is good enough, and returns the others."""
        estimator = stage.estimator
        if stage.number in result.silent:
            return rows
        if is_last or not estimator.is_random:  # a second run of the latter would give the same
            with clock.measure(stage.number, Kind.FULL, rows):
                found = _run(estimator, task, rows)
            good = torch.ones(len(rows), dtype=torch.bool)
            if not is_last:
                good = (found.trusted & (found.standard_error <= self.target)).cpu()
                result.compare(rows[~good], _take(found, ~good), from_prior=False)
            if good.any():
                result.add(rows[good], _take(found, good), stage.number)
            return rows[~good]
        with clock.measure(stage.number, Kind.PILOT, rows):
            estimator = estimator.fit(_part(task, rows))  # for the pilot run and the full run
            smaller = self._smaller(estimator)
            pilot = _run(smaller, task, rows)
        from_prior = stage.estimator is _STAGES[_PRIOR]
        result.compare(rows, pilot, from_prior)
        if stage.number in result.compared:
            if from_prior and not bool(_tells(pilot).any()):
                result.silent.add(stage.number)
            return rows
        needed = smaller.num_samples * (pilot.standard_error / (_MARGIN * self.target)).square().cpu()
        numbers = _numbers_of_draws(estimator.num_samples)
        good = (pilot.trusted & ~(pilot.khat > _PILOT_KHAT)).cpu() & (needed <= numbers[-1])
        level = torch.bucketize(needed, torch.tensor(numbers).to(needed))
        if not task.divisible and good.any():  # each run is one of all data
            level = level[good].amax().expand_as(level)
        for i in level[good].unique().tolist():
            chosen = good & (level == i)
            with clock.measure(stage.number, Kind.FULL, rows[chosen]):
                found = _run(_with_draws(estimator, numbers[i]), task, rows[chosen])
            result.add(rows[chosen], found, stage.number)
        return rows[~good]

    def _smaller(self, estimator: Estimator) -> Estimator:
        """Returns the estimator of a pilot run."""
        if not estimator.is_random:
            return estimator
        size = estimator.num_samples
        return _with_draws(estimator, min(max(round(self.pilot_share * size), _LEAST_PILOT), size))

    def _give_up(self, first: "_Stage", task: Task, left: Tensor, result: "_Result") -> Estimate:
        """Scores the data for which there is no time by the first stage."""
        for rows in left.split(BLOCK if task.divisible else task.size):
            result.add(rows, _run(self._smaller(first.estimator), task, rows), -1)
            task.advance(len(rows))
        return result.estimate(self, _MOST_ERROR * self.target)

    def trusts(self, estimate: Estimate) -> Tensor:
        is_wrong = (estimate.diagnostics["unseen"] > 0) | (estimate.diagnostics["at_ends"] > _MOST_AT_ENDS)
        return estimate.diagnostics["reliable"] & ~is_wrong.any()

    def describe(self, estimate: Estimate) -> str:
        number = estimate.diagnostics["stage"]
        counts = [(_name(stage), int((number == i).sum())) for i, stage in enumerate(self._all_stages)]
        counts.append(("first stage for lack of time", int((number == -1).sum())))
        served = ", ".join(f"{name} {count:,}" for name, count in counts if count)
        untrusted = int((~estimate.trusted).sum())
        check = self._describe_check(estimate) if "check" in estimate.diagnostics else ""
        missed = int(estimate.diagnostics["missed"].sum())
        unseen = estimate.diagnostics["unseen"]
        if bool(unseen.isnan().any()):
            check = f"whether modes are missed could not be seen from data that the model draws\n{check}"
        if bool((unseen > 0).any()):
            share = f"{unseen.nan_to_num().max().item():.0%} of the data that the model draws"
            check = f"modes are missed: for {share}, latents are where no draws go\n{check}"
        elif missed:
            check = f"modes are missed: other draws found more of p(x) for {missed:,} data\n{check}"
        at_ends = estimate.diagnostics["at_ends"].max().item()
        if at_ends > _MOST_AT_ENDS:
            dtype = str(estimate.value.dtype).removeprefix("torch.")
            check = (
                f"latents are at the ends of their support, as far as {dtype} can tell, for {at_ends:.1%} of the draws "
                f"of the prior: take double precision, or a prior without so much mass there\n{check}"
            )
        return f"scored by: {served}\n{check}not to be trusted: {untrusted:,} of {len(number):,} data"

    def _describe_check(self, estimate: Estimate) -> str:
        """Returns the line on the second estimates."""
        difference, error, n = _disagreement(estimate)
        if n == 0:
            return (
                f"not checked: no estimate of {_name(self.check)} is to be trusted. Give check= another estimator, or "
                "more temperatures\n"
            )
        verdict = "they agree" if abs(difference) <= _AGREEMENT * error else "they disagree: trust neither"
        return (
            f"checked by {_name(self.check)}: {difference:+.3f} nats on {n:,} data (standard error: {error:.3f}); "
            f"{verdict}\n"
        )

    def remedy(self, structure: SiteStructure) -> str:
        # Of discrete latents, k-hat says nothing.
        few = "Quadrature()" if structure.discrete else "Quadrature() or ImportanceSampling(20_000, Prior())"
        other = f"AnnealedImportanceSampling(), with few latents {few}"
        time = "Take" if self.seconds is None else "Give it more seconds, or take"
        return f"{time} {other}, or stages with more samples."


class _Stage(NamedTuple):
    """A stage, and its number in the list of all."""

    number: int
    estimator: Estimator


class _Result:
    """The runs that count, and the pilot runs, with the indices of their data."""

    def __init__(self, compared: frozenset[int]) -> None:
        self.compared = compared  # numbers of the stages whose pilot runs are compared, and that score no data
        self.silent: set[int] = set()  # numbers of those that say nothing
        self.parts: list[tuple[Tensor, Estimate, int]] = []
        self.pilots: list[tuple[Tensor, Estimate, bool]] = []  # the last: whether it drew from the prior

    def add(self, rows: Tensor, estimate: Estimate, number: int) -> None:
        self.parts.append((rows, estimate, number))

    def compare(self, rows: Tensor, pilot: Estimate, from_prior: bool) -> None:
        self.pilots.append((rows, pilot, from_prior))

    def estimate(self, method: Estimator, largest_error: float) -> Estimate:
        """Returns the estimates in the order of the data; none with a larger standard error is trusted."""
        order = torch.cat([rows for rows, _, _ in self.parts]).argsort()

        def in_order(values: list[Tensor]) -> Tensor:
            joined = torch.cat(values)
            return joined[order.to(joined.device)]

        value, error, ess, khat = (in_order([getattr(part, name) for _, part, _ in self.parts]) for name in _COLUMNS)
        stage = in_order([torch.full_like(part.value, number, dtype=torch.long) for _, part, number in self.parts])
        reliable = in_order([part.trusted for _, part, _ in self.parts]) & (stage >= 0) & ~(error > largest_error)
        columns = (value, error, ess, khat)

        def put(rows: Tensor, pilot: Estimate, chosen: Tensor) -> None:
            for column, name in zip(columns, _COLUMNS, strict=True):
                column[rows[chosen]] = getattr(pilot, name)[chosen].to(column)

        lost = value.isnan()  # densities overflow in the last stage: the pilot run with the smallest error is left
        error[lost], reliable = math.inf, reliable & ~lost
        for rows, pilot, _ in self.pilots if bool(lost.any()) else []:
            rows = rows.to(value.device)
            put(rows, pilot, lost[rows] & (pilot.standard_error < error[rows]))
        missed, better = torch.zeros_like(reliable), []
        excess, variance, n = 0.0, 0.0, 0  # of pilot runs from the prior, in shares of p(x)
        for rows, pilot, from_prior in self.pilots:
            rows = rows.to(value.device)
            tells = _tells(pilot) & reliable[rows] if from_prior else torch.ones_like(pilot.trusted)
            higher = is_higher(pilot, value[rows], error[rows]) & tells
            missed[rows] |= higher
            better.append((rows[higher], _take(pilot, higher)))
            if from_prior:
                ratio = (pilot.value - value[rows])[tells].double().clamp(max=50).exp()
                variances = pilot.standard_error.square() + error[rows].square()
                excess += (ratio - 1).sum().item()
                variance += (ratio.square() * variances[tells]).sum().item()
                n += len(ratio)
        # So many are never higher by chance: where modes of some data are missed, those of others are too.
        if int(missed.sum()) > max(_MANY_MISSED * len(missed), 2):
            missed |= True
        if excess > max(_MISSED * n, DISAGREEMENT * math.sqrt(variance)):
            missed |= True
        reliable &= ~missed
        for rows, pilot in better:  # what was missed is at least known not to be less
            put(rows, pilot, pilot.value > value[rows])
        num_samples = max(part.num_samples for _, part, _ in self.parts)
        unseen, at_ends = torch.zeros_like(value), torch.zeros_like(value)
        diagnostics = {"stage": stage, "reliable": reliable, "missed": missed, "unseen": unseen, "at_ends": at_ends}
        return Estimate(value, error, ess, khat, num_samples, method, diagnostics)


class _Plan(NamedTuple):
    """The stages that serve.

    Args:
        numbers: their numbers.
        largest: how many data fit in memory at once.
        compared: those that are compared alone.
        fitted: the one whose proposal must reach the latents of data that the model draws; None for no such check.
        num_simulated: the number of these data.
        at_ends: the share of the prior's draws that are at the ends of their support, as far as their type can tell.
    """

    numbers: Sequence[int]
    largest: int
    compared: frozenset[int] = frozenset()
    fitted: int | None = None
    num_simulated: int = _SIMULATED
    at_ends: float = 0.0


def _choose_stages(task: Task) -> _Plan:
    """Returns the default stages for a model's latents.

    A guide that covers one of several modes looks perfect by its weights. Where other stages look for modes, its pilot
    run is only compared with them.
    """
    structure = task.structure
    if structure.latents == structure.discrete:
        try:
            _ENUMERATE.plan(task)
            return _Plan([_ENUMERATION], task.size)
        except ValueError:  # too many
            pass
    try:
        target = joint_of(sum_out_discrete(replace(task.rows(slice(0, 2)), graphs=None)))
    except ValueError:
        return _stages_without_gradients(task)
    guide, at_ends = frozenset([_GUIDE, _PRIOR]), _share_at_ends(target)
    # Laplace's approximation holds some matrices of double precision for each datum.
    dim = target.dim
    largest = max(2, clamp(task.max_memory / (40 * dim**2), task.size))
    if dim <= MAX_DENSE:
        # Real numbers that stand for a simplex or an interval have tails like exponentials, heavier than normal ones.
        heavy = [_HEAVY] if any(site.transform is not None for site in target.sites) else []
        line = [_LINE] if dim == 1 and structure.vectorized else []  # one by one, its many points take minutes
        normal, tailed = (_LAPLACE, _MORE_LAPLACE, _ANNEALING), (_TAILED, _MORE_TAILED, _FROM_TAILED)
        few, more, last = tailed if dim <= _MAX_TAILED else normal
        fitted = [*heavy, few]
        stages = [_GUIDE, _PRIOR, *line, *fitted, more, last]
        return _Plan(stages, largest, guide, fitted[0], at_ends=at_ends)
    annealing = [_FROM_PRIOR] if structure.auxiliary else [_FROM_PRIOR, _FROM_GUIDE]
    if dim <= MAX_DIM:
        return _Plan([_GUIDE, _LAPLACE, *annealing], largest, guide, _LAPLACE, _SIMULATED_IF_MANY, at_ends)
    return _Plan([_GUIDE, *annealing], task.size, guide, at_ends=at_ends)


@torch.no_grad()
def _share_at_ends(target: Target) -> float:
    """Returns the share of the prior's draws that are at an end of their support, up to rounding.

    There, different u are one latent, and densities of u, which integrals and weights are made of, mean nothing.
    """
    if all(site.transform is None for site in target.sites):
        return 0.0
    u = target.draw(_PRIOR_DRAWS)
    is_at_end = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
    for site in target.sites:
        if site.transform is None:
            continue
        columns = u[..., site.columns]
        is_extreme = (columns == columns.amin(0)) | (columns == columns.amax(0))
        is_at_end |= (is_extreme & (is_extreme.sum(0) > 2)).any(-1)  # draws are clamped there
        part = columns.reshape(*u.shape[:2], *site.plates, *site.event)
        here, above, below = (site.transform(part + step) for step in (0.0, 1.0, -1.0))
        is_at_end |= ((here == above) | (here == below)).reshape(*u.shape[:2], -1).any(-1)
    return is_at_end.double().mean().item()


def _share_fits(stages: list[_Stage]) -> tuple[list[_Stage], list[Shared]]:
    """Returns stages among which those that have the same proposal share its fits, and these proposals."""
    names = ["proposal" if hasattr(stage.estimator, "proposal") else "start" for stage in stages]
    proposals = [getattr(stage.estimator, name, None) for stage, name in zip(stages, names, strict=True)]
    shared: dict[int, Shared] = {}
    result = []
    for stage, name, proposal in zip(stages, names, proposals, strict=True):
        if proposal is not None and sum(p is proposal for p in proposals) > 1:
            estimator = copy(stage.estimator)
            setattr(estimator, name, shared.setdefault(id(proposal), Shared(proposal)))
            stage = stage._replace(estimator=estimator)
        result.append(stage)
    return result, [*shared.values()]


def _tells(pilot: Estimate) -> Tensor:
    """Returns for which data a pilot run from the prior says something: k-hat and the number of draws that count."""
    return (pilot.ess >= _TELLING) & ~(pilot.khat > 0.7)


def _part(task: Task, rows: Tensor) -> Task:
    """Returns the task for some rows, without its progress bar; twice the same row where it is the only one."""
    if task.divisible and len(rows) == 1 and task.size > 1:  # some models squeeze a single row away
        rows = rows.repeat(2)
    return replace(task.rows(rows), bar=tqdm(disable=True))


def _stages_without_gradients(task: Task) -> _Plan:
    """Returns the stages for latents that are not all mapped to real numbers."""
    few, size = replace(task.rows(slice(0, 2)), graphs=None), task.size
    prior, guide = WeightedGuide(prior_of(task.model), is_prior=True), frozenset([_GUIDE, _PRIOR])
    try:
        u = Target(few, prior, real=False).draw(1)
    except ValueError:  # no moves
        return _Plan([_GUIDE, _PRIOR, _AGAIN, _MANY], size, guide)
    try:
        Target(few, WeightedGuide(few.guide), real=False).values(u)
    except (KeyError, NotImplementedError, ValueError):  # a guide whose density is known at its own draws alone
        return _Plan([_GUIDE, _PRIOR, _FROM_PRIOR], size, guide)
    # Guides are often far too sure of a value or a mode, and hide the others from chains that start there.
    return _Plan([_GUIDE, _PRIOR, _FROM_PRIOR, _FROM_GUIDE], size, guide)


def _run(estimator: Estimator, task: Task, rows: Tensor) -> Estimate:
    """Scores some rows of a task."""
    found = estimator.estimate(_part(task, rows))
    return _take(found, slice(0, len(rows)) if task.divisible else rows)


def _numbers_of_draws(largest: int) -> list[int]:
    """Returns how many draws a full run may have, from few to many."""
    numbers = [largest]
    while numbers[0] > _LEAST_FULL:
        numbers.insert(0, max(math.ceil(numbers[0] / _FEWER), _LEAST_FULL))
    return numbers


def _with_draws(estimator: Estimator, num_samples: int) -> Estimator:
    """Returns a copy of an estimator with another number of draws."""
    changed = copy(estimator)
    changed.num_samples = num_samples
    return changed


def _take(estimate: Estimate, rows: Tensor | slice) -> Estimate:
    """Returns the estimates of some of the data."""
    rows = rows if isinstance(rows, slice) else rows.to(estimate.value.device)
    columns = {name: getattr(estimate, name)[rows] for name in _COLUMNS}
    return replace(estimate, **columns, diagnostics={name: x[rows] for name, x in estimate.diagnostics.items()})


def _disagreement(estimate: Estimate) -> tuple[float, float, int]:
    """Returns the mean difference of the second estimates, its standard error, and their number."""
    check, check_error = estimate.diagnostics["check"], estimate.diagnostics["check_error"]
    is_checked = ~check.isnan()
    n = int(is_checked.sum())
    if n == 0:
        return 0.0, math.inf, 0
    variances = (check_error.square() + estimate.standard_error.square())[is_checked].double()
    return (check - estimate.value)[is_checked].double().mean().item(), variances.sum().sqrt().item() / n, n


def _name(stage: Estimator) -> str:
    """Returns a stage's name in a summary, with its proposal and number of draws."""
    proposal = getattr(stage, "proposal", getattr(stage, "start", None))
    name = type(stage).__name__ + ("" if proposal is None else f" from {type(proposal).__name__}")
    most = "up to " if stage.num_samples > _LEAST_FULL else ""
    return f"{name} ({most}{stage.num_samples:,} {stage.unit})" if stage.is_random else name


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
