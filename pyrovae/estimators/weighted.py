r"""Importance sampling: of p(x) from the guide or a better proposal, and of an upper bound on it."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrovae.estimators.base import Allocations, Estimate, Estimator, Task, check_positive, clamp, join, split_evenly
from pyrovae.estimators.proposals import Guide, Proposal, WeightedGuide, log_density
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import check_draws


class _Weighted(Estimator):
    """What the weights of draws from a proposal tell."""

    smoothed = False
    order = 1.0

    def __init__(self, num_samples: int, proposal: Proposal | None):
        super().__init__(num_samples)
        self.proposal = Guide() if proposal is None else proposal
        if not isinstance(self.proposal, Proposal):
            raise TypeError(f"proposal must be one such as estimators.Widened(), got {proposal!r}.")

    @property
    def needs_guide(self) -> bool:
        """Whether the proposal looks at the guide."""
        return self.proposal.needs_guide

    def estimate(self, task: Task) -> Estimate:
        task.start(task.size * self.num_samples, "sample")
        data, draws, slices = _chunk_sizes(task, self.num_samples)
        return join(self, [self._score(part, draws, slices) for part in task.split(data)])

    def _score(self, task: Task, draws: int, slices: int) -> Estimate:
        proposals = self.proposal.guides(task)
        sums = WeightSums(self.num_samples, self.order)
        counts = _shares(self.num_samples, [weighed.share for weighed in proposals])
        mixed = [w._replace(share=n / self.num_samples) for w, n in zip(proposals, counts, strict=True) if n]
        checked = False
        for weighed, count in zip(mixed, filter(None, counts), strict=True):
            for drawn in split_evenly(count, draws):
                trace, log_q = task.draw(drawn, weighed.guide)
                done = 0
                for k in split_evenly(drawn, slices):
                    # The first score of a datum checks it; Pyro's validation takes time. A graph cannot: one sample is scored
                    # twice for it.
                    check = not checked and task.graphs is None
                    if not checked and not check:
                        task.score(_slice_trace(trace, slice(1)), 1, check_data=True)
                    part = _slice_trace(trace, slice(done, done + k))
                    with nullcontext() if check else pyro.validation_enabled(False):
                        prior, likelihood = task.score(part, k, check_data=check)
                        own = log_q[done : done + k]
                        log_q_here = own if len(mixed) == 1 else _log_mixture(task, mixed, weighed, own, prior, part, k)
                    checked = True
                    sums.add(prior + likelihood - log_q_here)
                    done += k
                    task.advance(k * task.size)
        estimate = sums.estimate(self, self.smoothed)
        if task.structure.discrete:  # weights that are all alike may be those of the only value that was ever drawn
            return replace(estimate, khat=torch.full_like(estimate.khat, math.nan))
        return estimate

    def describe(self, estimate: Estimate) -> str:
        biased = "smoothed weights: less variance, some bias. " if self.smoothed else ""
        if self.num_samples >= 21 and bool(estimate.khat.isnan().all()):
            return (
                f"{biased}latents are discrete, and k-hat sees no value that was never drawn: whom to trust is unknown"
            )
        return biased + super().describe(estimate)


class ImportanceSampling(_Weighted):
    r"""Importance sampling, with the guide as the proposal or a better one.

    .. math:: \hat p(x) = \frac{1}{K} \sum_{k=1}^K w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    is unbiased, and its logarithm a lower bound on log p(x) in expectation. A mixture of proposals is sampled by its
    shares, each draw weighed against the density of the whole mixture; the standard error then is a little too large.
    With the guide alone, the guide runs once per datum, and twice to compare draws at once with one alone, as long as all latents of a datum fit in the memory budget (they
    do up to some 100,000 samples of 20 dimensions), and a few times more for the first two, to plan the chunks.

    Args:
        num_samples: samples per datum :math:`K`, at least 1; exactly so many are drawn.
        proposal: what the latents are drawn from, the guide unless given.
        smoothed: replace the largest weights of each datum by what the Pareto distribution fitted to them expects
            (PSIS). It lowers the variance at the price of a bias, where k-hat is between some 0.5 and 0.7.

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


class CUBO(_Weighted):
    r"""A stochastic upper bound on log p(x), the chi upper bound: its distance from a lower one encloses the truth.

    .. math:: \mathrm{CUBO}_n(x) = \frac{1}{n} \log \mathrm{E}_{q(z \mid x)}\left[w^n\right] \ge \log p(x)

    The expectation is estimated by the mean over K samples, so that it bounds log p(x) in the limit of many; from few
    it is too low. Its error is that of :math:`w^n`, whose tail is n times as heavy.

    Args:
        num_samples: samples per datum :math:`K`, at least 1.
        order: n, above 1; the higher, the looser.
        proposal: what the latents are drawn from, the guide unless given.

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
            raise ValueError(f"order must be above 1, got {order}: at 1 it is importance sampling, no upper bound.")
        self.order = order

    def remedy(self, structure: SiteStructure) -> str:
        return "It may be below log p(x): take a lower order, or more samples."


def _shares(total: int, shares: list[float]) -> list[int]:
    """Returns whole numbers that add up to the total, by shares, what is left over to the largest remainders."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _log_mixture(
    task: Task,
    mixed: list[WeightedGuide],
    drawn_from: WeightedGuide,
    log_q: Tensor,
    prior: Tensor,
    trace: poutine.Trace,
    k: int,
) -> Tensor:
    """Returns the log-density of a mixture of proposals at draws from one of them."""
    terms = []
    for weighed in mixed:
        if weighed is drawn_from:
            log = log_q
        elif weighed.is_prior:  # which the model has just scored
            log = prior
        else:
            log = log_density(task, weighed.guide, trace, k)
        terms.append(log + math.log(weighed.share))
    return torch.stack(terms).logsumexp(0)


class WeightSums:
    """Sums over log weights that arrive in pieces of shape (any number, batch): all that an estimate needs.

    Everything is in double precision, for the sums run over far more terms than float32 can tell apart.
    """

    def __init__(self, num_samples: int, order: float = 1.0):
        self.num_samples, self.order = num_samples, order
        self.tail_size = math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))  # as in the PSIS paper
        self.log_sum = self.log_sum_of_squares = self.largest = None

    def add(self, log_w: Tensor) -> None:
        self.dtype = log_w.dtype
        log_w = self.order * log_w.double()
        log_sum, log_sum_of_squares = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
        largest = log_w
        if self.log_sum is not None:
            log_sum = torch.logaddexp(self.log_sum, log_sum)
            log_sum_of_squares = torch.logaddexp(self.log_sum_of_squares, log_sum_of_squares)
            largest = torch.cat([self.largest, log_w])
        self.log_sum, self.log_sum_of_squares = log_sum, log_sum_of_squares
        self.largest = largest.topk(min(self.tail_size + 1, len(largest)), dim=0).values

    def estimate(self, method: Estimator, smoothed: bool = False) -> Estimate:
        k = self.num_samples
        # In single precision log weights have rounding of their own, and equal ones differ by it.
        khat, sigma = fit_tail(self.largest, resolution=math.sqrt(torch.finfo(self.dtype).eps))
        log_sum, log_sum_of_squares = self.log_sum, self.log_sum_of_squares
        if smoothed:
            log_sum, log_sum_of_squares = self._smooth(khat, sigma)
        ess = (2 * log_sum - log_sum_of_squares).exp().clamp(max=k)
        ess = torch.where(log_sum == -math.inf, 0.0, ess)  # no sample has any weight
        # The delta method: the relative variance of the mean weight, with the unbiased variance of the weights.
        standard_error = ((k / ess - 1) / (k - 1)).sqrt() if k > 1 else torch.full_like(ess, math.nan)
        value = (log_sum - math.log(k)) / self.order
        columns = (value, standard_error / self.order, ess, khat)
        return Estimate(*(t.to(self.dtype) for t in columns), k, method)

    def _smooth(self, khat: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums with the weights in the tail replaced by the quantiles of the Pareto distribution."""
        top, n = self.largest[0], len(self.largest) - 1
        raw = (self.largest - top).exp()
        p = (torch.arange(n, 0, -1, dtype=raw.dtype, device=raw.device).unsqueeze(-1) - 0.5) / n
        quantiles = raw[-1] + sigma * torch.expm1(-khat * torch.log1p(-p)) / khat
        # No weight is made larger than the largest that was drawn; where no tail could be fitted, none is changed.
        smooth = torch.where(khat.isfinite() & (khat != 0), quantiles.clamp(max=1.0), raw[:-1])
        logs = []
        for log_sum, power in ((self.log_sum, 1), (self.log_sum_of_squares, 2)):
            rest = (log_sum - power * top).exp() - raw[:-1].pow(power).sum(0)
            logs.append((rest.clamp(min=0) + smooth.pow(power).sum(0)).log() + power * top)
        return logs[0], logs[1]


def fit_tail(largest: Tensor, resolution: float) -> tuple[Tensor, Tensor]:
    """Fits a generalized Pareto distribution to the tails of log weights, shape ``(tail + 1, batch)``, largest first.

    Log weights that differ by less than the resolution are taken to be equal: their differences are rounding. Where those
    of a tail spread over more than 672 nats, the ratio of double precision's rounding to its smallest number, k-hat is
    infinite.

    The estimator of Zhang and Stephens (A New and Efficient Estimation Method for the Generalized Pareto Distribution,
    2009) with the weak prior of Vehtari et al., for a whole batch at once.

    Returns:
        The shape, k-hat, and the scale as a share of the largest weight.
    """
    n = len(largest) - 1
    if n < 5:
        return torch.full_like(largest[0], math.nan), torch.full_like(largest[0], math.nan)
    weights = (largest - largest[0]).exp()
    x = (weights[:-1] - weights[-1]).flip(0)  # ascending excesses over the threshold, the largest not in the tail
    m = 30 + math.isqrt(n)
    grid = torch.arange(1, m + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    # Excesses of zero, ties with the threshold, tell nothing of the scale: take the smallest that is none instead.
    smallest = torch.where(x > 0, x, math.inf).amin(0)
    quartile, top = torch.maximum(x[int(n / 4 + 0.5) - 1], smallest), x[-1]
    b = 1 / top + (1 - (m / (grid - 0.5)).sqrt()) / (3 * quartile)

    def shape_at(b: Tensor) -> Tensor:
        return torch.stack([torch.log1p(-row * x).mean(0) for row in b])  # row by row, for memory

    k = shape_at(b)
    posterior = (n * ((-b / k).log() - k - 1)).softmax(dim=0)
    best = (posterior * b).sum(0, keepdim=True)
    raw = shape_at(best)[0]
    khat = (n * raw + 5) / (n + 10)
    khat = torch.where(largest[0] - largest[-1] > resolution, khat, -math.inf)
    # Beyond this spread excesses are lost to underflow, as if nearly all weights were zero: there is no tail to see.
    number = torch.finfo(x.dtype)
    unseen = (largest[-1] == -math.inf) | (largest[0] - largest[-1] > math.log(number.eps / number.tiny))
    khat = torch.where(unseen, math.inf, khat)
    return khat, -raw / best[0]


def _chunk_sizes(task: Task, num_samples: int) -> tuple[int, int, int]:
    """Returns how many data, draws of the guide and draws scored by the model make a chunk, from what small ones took."""

    task = replace(task, graphs=None)

    def bytes_of(samples: int, data: int) -> tuple[int, int]:
        part = task.rows(slice(0, data))
        part = replace(part, structure=check_draws(part.structure, part.model, part.guide, *part.args, **part.kwargs))
        with Allocations() as in_guide:
            trace, _ = part.draw(samples)
        with Allocations() as in_model:
            part.score(trace, samples)
        return in_guide.bytes(), in_model.bytes()

    few = min(2, task.size) if task.divisible else task.size
    one_guide, one_model = bytes_of(1, few)
    two_guide, two_model = bytes_of(2, few)
    per_draw = max((two_guide - one_guide) / few, 1)
    per_score = max((two_model - one_model) / few, 1)
    per_datum = max(sum(bytes_of(1, few + 1)) - one_guide - one_model, 1) if task.size > few else 1
    data = clamp(task.max_memory / max(num_samples * per_draw, per_datum), task.size)
    draws = clamp(task.max_memory / (data * per_draw), num_samples)
    slices = clamp(task.max_memory / (data * per_score), draws)
    return data, draws, slices


def _slice_trace(trace: poutine.Trace, samples: slice) -> poutine.Trace:
    """Returns a trace with some of the draws of another; samples are the leftmost dimension of every value."""
    part = trace.copy()
    for name, site in sample_sites(trace).items():
        if not site["is_observed"]:
            part.nodes[name] = {**site, "value": site["value"][samples]}
    return part
