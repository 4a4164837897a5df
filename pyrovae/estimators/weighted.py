r"""Importance sampling: estimates of p(x), and of an upper bound on it, with the guide or a better proposal."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import cuda_devices
from pyrovae.estimators.base import Estimate, Estimator, check_positive, is_higher, join
from pyrovae.estimators.memory import Allocations, clamp, split_evenly
from pyrovae.estimators.proposals import Guide, Prior, Proposal, WeightedGuide, log_density
from pyrovae.estimators.task import Task
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import check_draws
from pyrovae.progress import tqdm

_LEAST_COMPARED = 100  # draws of the guide and of the prior beside a proposal that goes to modes
_BLOCK = 500  # data to which a proposal is fitted at once, at least


class _Draws(NamedTuple):
    """Draws from one component of a proposal: a trace of `num_draws` draws, and their log-density.

    `are_equal` says for which data the guide's draws do not vary, see :func:`draws_are_equal`.
    """

    component: WeightedGuide
    trace: poutine.Trace
    log_q: Tensor
    num_draws: int
    are_equal: Tensor


class _Weighted(Estimator):
    """Base of the estimators that are functions of the importance weights of a proposal."""

    smoothed = False
    order = 1.0

    def __init__(self, num_samples: int, proposal: Proposal | None):
        super().__init__(num_samples)
        self.proposal = Guide() if proposal is None else proposal
        if not isinstance(self.proposal, Proposal):
            raise TypeError(f"proposal must be a proposal such as estimators.Widened(), got {proposal!r}.")
        self.needs_guide = self.proposal.needs_guide

    def estimate(self, task: Task) -> Estimate:
        task = self.prepare(task)
        task.start(task.size * self.num_samples, "sample")
        num_data, num_drawn, num_scored = chunk_sizes(task, self.num_samples)
        parts = split_and_fit(task, num_data, self.proposal)
        return join(self, [self._score(part, proposal, num_drawn, num_scored) for part, proposal in parts])

    def prepare(self, task: Task) -> Task:
        return self.proposal.prepare(task)

    def fit(self, task: Task) -> "Estimator":
        fitted = copy(self)
        fitted.proposal = self.proposal.fit(self.prepare(task))
        return fitted

    def _score(self, task: Task, proposal: Proposal, num_drawn: int, num_scored: int) -> Estimate:
        if isinstance(proposal, Guide) and task.masks:
            task = replace(task, unmasked=False)
        components = proposal.guides(task)
        counts = apportion(self.num_samples, [component.share for component in components])
        # The exact shares of the draws, which are stratified by component.
        mixture = [
            component._replace(share=n / self.num_samples) for component, n in zip(components, counts, strict=True) if n
        ]
        counts = [n for n in counts if n]
        sums, checked = WeightSums(self.num_samples, self.order), False
        is_point = torch.tensor(False)
        for draws in draw_mixture(task, mixture, counts, num_drawn, num_scored):
            # The first score of a datum checks it; others skip Pyro's validation, which takes time.
            check = not checked and task.graphs is None
            if not checked and task.graphs is not None:  # a graph checks nothing: score one draw without it
                task.score(slice_trace(draws.trace, slice(1)), 1, check_data=True)
            checked = True
            with nullcontext() if check else pyro.validation_enabled(False):
                prior, likelihood = task.score(draws.trace, draws.num_draws, check_data=check)
                if task.summed is not None and draws.component.is_prior:  # a draw's density is a sum too
                    draws = draws._replace(log_q=prior)
                log_q = draws.log_q if len(mixture) == 1 else log_mixture(task, mixture, draws, prior)
            is_point = is_point | draws.are_equal
            sums.add(prior + likelihood - log_q)
            task.advance(draws.num_draws * task.size)
        return with_doubts(sums.estimate(self, self.smoothed), is_point, task.structure)

    def describe(self, estimate: Estimate) -> str:
        biased = "smoothed weights: less variance, some bias. " if self.smoothed else ""
        if self.num_samples >= 21 and bool(estimate.khat.isnan().all()):
            return (
                f"{biased}latents are discrete, where k-hat does not see values that were never drawn: which data to "
                "trust is unknown"
            )
        unseen = "; modes that the guide misses are not seen" if isinstance(self.proposal, Guide) else ""
        return biased + super().describe(estimate) + unseen


class ImportanceSampling(_Weighted):
    r"""Importance sampling, with the guide or a better proposal.

    .. math:: \hat p(x) = \frac{1}{K} \sum_{k=1}^K w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad
        z_k \sim q(z \mid x)

    is unbiased, and its logarithm a lower bound on log p(x) in expectation. A mixture of proposals is sampled by its
    shares, and the weight of each draw has the density of the whole mixture; the standard error is then slightly too
    large. A proposal that goes to modes, such as :class:`~pyrovae.estimators.Laplace`, does not see those that it did
    not find: where a tenth as many draws from the guide or from the prior find more of p(x), k-hat is infinite.

    With the guide as the proposal, the guide runs once per datum, as long as all latents of a datum fit in the memory
    budget (up to some 100,000 samples of 20 dimensions). It also runs twice per datum to compare draws at once with a
    single one, and a few times on the first two data to plan the chunks.

    Args:
        num_samples: samples per datum :math:`K`, at least 1; exactly this number is drawn.
        proposal: the distribution of the draws; the guide by default.
        smoothed: whether to replace the largest weights of each datum by quantiles of the Pareto distribution fitted to
            them (PSIS). It lowers the variance at the price of a bias, where k-hat is between about 0.5 and 0.7.

    References:
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519; Pareto Smoothed Importance Sampling, A. Vehtari, D. Simpson, A. Gelman, Y. Yao
        and J. Gabry, 2024, https://arxiv.org/abs/1507.02646; Safe and Effective Importance Sampling, A. Owen and Y.
        Zhou, 2000, https://doi.org/10.1080/01621459.2000.10473909.

    >>> ImportanceSampling(5000, smoothed=True)
    ImportanceSampling(num_samples=5000, proposal=Guide(), smoothed=True)
    """

    def __init__(self, num_samples: int = 1000, proposal: Proposal | None = None, smoothed: bool = False):
        super().__init__(num_samples, proposal)
        self.smoothed = smoothed

    def estimate(self, task: Task) -> Estimate:
        found = super().estimate(task)
        if not self.proposal.finds_modes:
            return found
        missed, few = torch.zeros_like(found.khat, dtype=torch.bool), max(_LEAST_COMPARED, self.num_samples // 10)
        # Other results are as without this; a parameter may round to the end of its range for some draws of the prior.
        with torch.random.fork_rng(cuda_devices([found.value])), pyro.validation_enabled(False):
            for proposal in (Guide(), Prior()):
                pilot = ImportanceSampling(few, proposal).estimate(replace(task, bar=tqdm(disable=True)))
                missed |= is_higher(pilot, found.value, found.standard_error)
        khat = torch.where(missed, math.inf, found.khat)
        return replace(found, khat=khat, diagnostics=found.diagnostics | {"missed": missed})

    def describe(self, estimate: Estimate) -> str:
        missed = int(estimate.diagnostics["missed"].sum()) if "missed" in estimate.diagnostics else 0
        found = f"modes are missed: the guide or the prior found more of p(x) for {missed:,} data\n" if missed else ""
        return found + super().describe(estimate)


class CUBO(_Weighted):
    r"""A stochastic upper bound on log p(x), the chi upper bound; with a lower bound it encloses log p(x).

    .. math:: \mathrm{CUBO}_n(x) = \frac{1}{n} \log \mathrm{E}_{q(z \mid x)}\left[w^n\right] \ge \log p(x)

    The expectation is estimated by the mean over K samples, so that the bound holds in the limit of many samples; with
    few it is too low. Its error is that of :math:`w^n`, whose tail is n times as heavy.

    Args:
        num_samples: samples per datum :math:`K`, at least 1.
        order: n, above 1; a higher order gives a looser bound.
        proposal: the distribution of the draws; the guide by default.

    References:
        Variational Inference via Chi-Upper Bound Minimization, A. B. Dieng, D. Tran, R. Ranganath, J. Paisley and
        D. M. Blei, 2017, https://arxiv.org/abs/1611.00328.

    >>> CUBO(5000, order=2.0).relation
    '<='
    """

    relation = "<="

    def __init__(self, num_samples: int = 1000, order: float = 2.0, proposal: Proposal | None = None):
        super().__init__(num_samples, proposal)
        check_positive("order", order)
        if order <= 1:
            raise ValueError(f"order must be above 1, got {order}: at 1 it is importance sampling, not an upper bound.")
        self.order = order

    def remedy(self, structure: SiteStructure) -> str:
        return "It may be below log p(x): take a lower order, or more samples."


def split_and_fit(task: Task, num_data: int, proposal: Proposal) -> Iterator[tuple[Task, Proposal]]:
    """Yields tasks for chunks of about `num_data` data, in order, with the proposal fitted to them.

    It is fitted to many chunks at once, because matrix products of few data are slow.
    """
    done, end, fitted = 0, 0, proposal
    for part in task.split(num_data):
        if done == end:
            end += part.size * math.ceil(_BLOCK / part.size)
            end = end if end + part.size < task.size else task.size
            fitted = proposal.fit(task.rows(slice(done, end)))
        yield part, fitted
        done += part.size


def with_doubts(estimate: Estimate, is_point: Tensor, structure: SiteStructure) -> Estimate:
    """Returns an estimate with the k-hat of data whose weights do not show what was missed.

    Equal draws have equal weights, which say nothing: the proposal is too narrow for the precision of numbers. With
    discrete latents, equal weights may be those of the only value that was ever drawn.
    """
    khat = torch.where(is_point.to(estimate.khat.device), math.inf, estimate.khat)
    return replace(estimate, khat=torch.full_like(khat, math.nan) if structure.discrete else khat)


def draws_are_equal(trace: poutine.Trace, structure: SiteStructure) -> Tensor:
    """Returns whether some element of a datum's continuous latents is the same in all draws, ``(batch,)``."""
    found = []
    for name, site in sample_sites(trace).items():
        fn = site["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if site["is_observed"] or name in structure.discrete or isinstance(fn, dist.Delta):
            continue
        value = site["value"].detach()
        if value.dim() <= structure.data_index or len(value) < 2 or not value.is_floating_point():
            continue
        is_equal = (value == value[:1]).all(0, keepdim=True).movedim(structure.data_index, 0).flatten(1).any(1)
        found.append(is_equal)
    size = max((len(f) for f in found), default=1)
    return torch.stack([f.expand(size) for f in found]).any(0) if found else torch.tensor(False)


def apportion(total: int, shares: list[float]) -> list[int]:
    """Returns integers that sum to the total, in proportion to shares, by the method of largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def draw_mixture(
    task: Task, mixture: list[WeightedGuide], counts: list[int], num_drawn: int, num_scored: int
) -> Iterator[_Draws]:
    """Yields the draws of each component, at most `num_drawn` from one run of its guide, in chunks of `num_scored`."""
    for component, count in zip(mixture, counts, strict=True):
        for drawn in split_evenly(count, num_drawn):
            trace, log_q = task.draw(drawn, component.guide)
            are_equal, start = draws_are_equal(trace, task.structure), 0
            for k in split_evenly(drawn, num_scored):
                rows = slice(start, start + k)
                yield _Draws(component, slice_trace(trace, rows), log_q[rows], k, are_equal)
                start += k


def log_mixture(task: Task, mixture: list[WeightedGuide], draws: _Draws, prior: Tensor) -> Tensor:
    """Returns the log-density of a mixture of proposals at draws from one of them, whose log p(z) is `prior`."""
    terms = []
    for component in mixture:
        if component is draws.component:
            log_q = draws.log_q
        elif component.is_prior:  # the model has just scored it
            log_q = prior
        else:
            log_q = log_density(task, component.guide, draws.trace, draws.num_draws)
        terms.append(log_q + math.log(component.share))
    return torch.stack(terms).logsumexp(0)


class WeightSums:
    """Running sums over log weights, which arrive in chunks of shape ``(any number, batch)``, for an estimate.

    In double precision: the sums have far more terms than float32 can resolve.

    Args:
        num_samples: number of weights per datum.
        order: power of the weights.
    """

    def __init__(self, num_samples: int, order: float = 1.0):
        self.num_samples, self.order = num_samples, order
        self.tail_size = math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))  # as in the PSIS paper
        self._sums: _Sums | None = None
        self.dtype = torch.float32  # of the weights

    def add(self, log_w: Tensor) -> None:
        self.dtype = log_w.dtype
        log_w = self.order * log_w.double()
        sums, before = _Sums(log_w.logsumexp(0), (2 * log_w).logsumexp(0), log_w), self._sums
        if before is not None:
            sums = _Sums(
                torch.logaddexp(before.log_sum, sums.log_sum),
                torch.logaddexp(before.log_sum_of_squares, sums.log_sum_of_squares),
                torch.cat([before.largest, log_w]),
            )
        largest = sums.largest.topk(min(self.tail_size + 1, len(sums.largest)), dim=0).values
        self._sums = sums._replace(largest=largest)

    def estimate(self, method: Estimator, smoothed: bool = False) -> Estimate:
        if self._sums is None:
            raise ValueError("there are no log weights to estimate from. Add some first.")
        k = self.num_samples
        # Equal log weights differ by their rounding.
        khat, sigma = fit_tail(self._sums.largest, resolution=math.sqrt(torch.finfo(self.dtype).eps))
        log_sum, log_sum_of_squares = self._sums.log_sum, self._sums.log_sum_of_squares
        if smoothed:
            log_sum, log_sum_of_squares = _smooth(self._sums, khat, sigma)
        ess = (2 * log_sum - log_sum_of_squares).exp().clamp(max=k)
        ess = torch.where(log_sum == -math.inf, 0.0, ess)  # no sample has any weight
        # The delta method: the relative variance of the mean weight, with the unbiased variance of the weights.
        standard_error = ((k / ess - 1) / (k - 1)).sqrt() if k > 1 else torch.full_like(ess, math.nan)
        return Estimate(
            value=((log_sum - math.log(k)) / self.order).to(self.dtype),
            standard_error=(standard_error / self.order).to(self.dtype),
            ess=ess.to(self.dtype),
            khat=khat.to(self.dtype),
            num_samples=k,
            method=method,
        )


class _Sums(NamedTuple):
    """The log of the sum of weights and of their squares, ``(batch,)``, and the largest log weights, descending."""

    log_sum: Tensor
    log_sum_of_squares: Tensor
    largest: Tensor


def _smooth(sums: _Sums, khat: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums with the weights in the tail replaced by the quantiles of the Pareto distribution."""
    top, n = sums.largest[0], len(sums.largest) - 1
    raw = (sums.largest - top).exp()
    p = (torch.arange(n, 0, -1, dtype=raw.dtype, device=raw.device).unsqueeze(-1) - 0.5) / n
    quantiles = raw[-1] + sigma * torch.expm1(-khat * torch.log1p(-p)) / khat
    # No weight becomes larger than the largest that was drawn; where no tail could be fitted, none changes.
    smooth = torch.where(khat.isfinite() & (khat != 0), quantiles.clamp(max=1.0), raw[:-1])
    logs = []
    for log_sum, power in ((sums.log_sum, 1), (sums.log_sum_of_squares, 2)):
        rest = (log_sum - power * top).exp() - raw[:-1].pow(power).sum(0)
        logs.append((rest.clamp(min=0) + smooth.pow(power).sum(0)).log() + power * top)
    return logs[0], logs[1]


def fit_tail(largest: Tensor, resolution: float) -> tuple[Tensor, Tensor]:
    """Fits a generalized Pareto distribution to the largest weights of each datum.

    Log weights that differ by less than the resolution are taken as equal: their differences are rounding. Where the
    tail spans more than 672 nats, the ratio of double precision's epsilon to its smallest number, k-hat is infinite.

    Args:
        largest: the largest log weights, in descending order, shape ``(tail + 1, batch)``.
        resolution: smallest difference of log weights that is not rounding.

    Returns:
        The shape k-hat, and the scale relative to the largest weight, ``(batch,)`` each; NaN for a tail below 5.

    References:
        A New and Efficient Estimation Method for the Generalized Pareto Distribution, J. Zhang and M. A. Stephens,
        2009, https://doi.org/10.1198/tech.2009.08017; with the weak prior of Pareto Smoothed Importance Sampling, A.
        Vehtari et al., 2024, https://arxiv.org/abs/1507.02646.
    """
    n = len(largest) - 1
    if n < 5:
        return torch.full_like(largest[0], math.nan), torch.full_like(largest[0], math.nan)
    weights = (largest - largest[0]).exp()
    # Ascending excesses over the threshold, which is the largest weight outside the tail.
    x = (weights[:-1] - weights[-1]).flip(0)
    m = 30 + math.isqrt(n)
    grid = torch.arange(1, m + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    # Excesses of zero (ties with the threshold) say nothing about the scale: use the smallest positive one instead.
    smallest = torch.where(x > 0, x, math.inf).amin(0)
    quartile, top = torch.maximum(x[int(n / 4 + 0.5) - 1], smallest), x[-1]
    b = 1 / top + (1 - (m / (grid - 0.5)).sqrt()) / (3 * quartile)

    def shape_at(b: Tensor) -> Tensor:
        return torch.stack([torch.log1p(-row * x).mean(0) for row in b])  # row by row, to save memory

    k = shape_at(b)
    posterior = (n * ((-b / k).log() - k - 1)).softmax(dim=0)
    best = (posterior * b).sum(0, keepdim=True)
    raw = shape_at(best)[0]
    khat = (n * raw + 5) / (n + 10)
    khat = torch.where(largest[0] - largest[-1] > resolution, khat, -math.inf)
    # Beyond this spread excesses underflow, as if nearly all weights were zero.
    finfo = torch.finfo(x.dtype)
    underflow = (largest[-1] == -math.inf) | (largest[0] - largest[-1] > math.log(finfo.eps / finfo.tiny))
    # An infinite weight, or NaN, has no tail to fit.
    khat = torch.where(underflow | ~(largest[0] < math.inf), math.inf, khat)
    return khat, -raw / best[0]


def chunk_sizes(
    task: Task, num_samples: int, score: Callable[[Task, poutine.Trace, int], Any] = Task.score
) -> tuple[int, int, int]:
    """Returns how many data to take at once, draws to make at once, and draws to score at once, from small runs."""
    task = replace(task, graphs=None)

    def bytes_of(draws: int, data: int) -> tuple[int, int]:
        part = task.rows(slice(0, data))
        part = replace(part, structure=check_draws(part.structure, part.model, part.guide, *part.args, **part.kwargs))
        with Allocations() as in_guide:
            trace, _ = part.draw(draws)
        with Allocations() as in_model:
            score(part, trace, draws)
        return in_guide.bytes(), in_model.bytes()

    few = min(2, task.size) if task.divisible else task.size
    one_guide, one_model = bytes_of(1, few)
    two_guide, two_model = bytes_of(2, few)
    per_draw = max((two_guide - one_guide) / few, 1)
    per_score = max((two_model - one_model) / few, 1)
    per_datum = max(sum(bytes_of(1, few + 1)) - one_guide - one_model, 1) if task.size > few else 1
    num_data = clamp(task.max_memory / max(num_samples * per_draw, per_datum), task.size)
    num_drawn = clamp(task.max_memory / (num_data * per_draw), num_samples)
    return num_data, num_drawn, clamp(task.max_memory / (num_data * per_score), num_drawn)


def slice_trace(trace: poutine.Trace, samples: slice) -> poutine.Trace:
    """Returns a trace with some of the draws of another; draws are the leftmost dimension of every latent."""
    part = trace.copy()
    for name, site in sample_sites(trace).items():
        if not site["is_observed"]:
            part.nodes[name] = {**site, "value": site["value"][samples]}
    return part
