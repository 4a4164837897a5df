r"""Deterministic values of log p(x): quadrature for few latent dimensions, enumeration for discrete latents."""

import math
from dataclasses import replace
from itertools import product

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.estimators.base import Estimate, Estimator, join
from pyrovae.estimators.memory import Allocations, clamp, split_evenly
from pyrovae.estimators.proposals import WeightedGuide
from pyrovae.estimators.supports import Combinations, check_unmasked
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task, prior_of, sum_out, sum_out_discrete
from pyrovae.inference.filtering import effective_size
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure

_DEPTH = 25.0  # nats below the maximum of an integrand, beyond which it is ignored: e^-25 is 1e-11
_ROUNDS = 12  # grids fitted to each datum, at most
_PRIOR_DRAWS = 1000
_CHECK_DRAWS = 16_000  # of the prior again, less than one of the rounds
_TELLING = 20.0  # effective draws from which their mean has an error
_ERRORS = 4.0  # standard errors, by which their mean is clearly above
_FACTOR = math.log(1e4)  # the same for fewer draws, by Markov's inequality
_ROUNDINGS = 8  # steps of the precision of log p(x, u): those of its terms, which may be larger than their sum


class _Deterministic(Estimator):
    """Base of the deterministic estimators."""

    needs_guide = False
    is_random = False

    def _estimate(self, value: Tensor, error: Tensor, num_samples: int) -> Estimate:
        unknown = torch.full_like(value, math.nan)
        return Estimate(value, error, unknown, unknown, num_samples, self)


class Quadrature(_Deterministic):
    r"""The trapezoidal rule on a grid fitted to each datum's posterior: exact, for up to three latent dimensions.

    .. math:: p(x) = \int p(x, u)\, du \approx \prod_d h_d \sum_j p(x, u_j)

    The grid starts as wide as draws of the prior, and shrinks to the region within 25 nats of the highest point. The
    error falls exponentially with the number of points for smooth integrands that vanish at both ends, and
    quadratically where a decoder has kinks (ReLU). The stated error is the largest change with half as many points in
    each dimension, for smooth integrands far more than the true error; plus the share of the outermost points, and the
    rounding of log p(x, u); on a line also that of a third of the points, and what jumps and noise between neighbours
    may hide. A peak that is narrow beside the distance of two points may be missed; where draws of
    the prior find more of p(x), the value is not trusted. Constrained latents are integrated in the unconstrained
    space. Discrete latents beside them are summed over, as :class:`Laplace` does. The guide is not used.

    Args:
        num_samples: points of the grid, at least 5 per dimension.

    Raises:
        ValueError: when a datum has more than three latent dimensions, there are too few points for them, or discrete
            latents cannot be summed over.

    References:
        The Exponentially Convergent Trapezoidal Rule, L. N. Trefethen and J. A. C. Weideman, 2014,
        https://doi.org/10.1137/130932132.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> estimate = pyrovae.log_marginal(vae.model, None, torch.zeros(5, 3), method=Quadrature(1000), progress=False)
    >>> estimate.value.shape
    torch.Size([5])
    """

    unit = "points"

    def __init__(self, num_samples: int = 40_000):
        super().__init__(num_samples)

    def prepare(self, task: Task) -> Task:
        return sum_out_discrete(replace(task, unmasked=True))

    def estimate(self, task: Task) -> Estimate:
        task = self.prepare(task)
        few = replace(task.rows(slice(0, 1)), graphs=None)
        target = Target(few, WeightedGuide(prior_of(task.model), is_prior=True))
        dim = target.dim
        if dim > 3:
            raise ValueError(
                f"Quadrature is for up to 3 latent dimensions, got {dim}. Take AnnealedImportanceSampling()."
            )
        side = int(self.num_samples ** (1 / dim) + 1e-9)
        side -= 1 - side % 2  # odd, so that every second point reaches both ends too
        if side < 5:
            raise ValueError(
                f"num_samples must be at least {5**dim}, 5 points for each of {dim} latent dimensions; "
                f"got {self.num_samples}."
            )
        with Allocations() as allocations:
            target.log_joint(target.draw(64))
        per_point = max(allocations.bytes() / 64, 1)
        num_data = clamp(task.max_memory / (side**dim * dim * 16), task.size)
        num_points = clamp(task.max_memory / (num_data * per_point), side**dim)
        task.start(task.size, "datum")
        return join(self, [self._score_all(part, side, num_points) for part in task.split(num_data)])

    def _score_all(self, task: Task, side: int, num_points: int) -> Estimate:
        """Scores some data, with a grid for each combination of the discrete latents that are summed over."""
        parts = [self._score(part, side, num_points) for part in task.by_values()]
        task.advance(task.size)
        if len(parts) == 1:
            return parts[0]
        value = torch.stack([part.value for part in parts]).double()
        share = value.softmax(0).nan_to_num(0.0)
        error = torch.stack([part.standard_error for part in parts]).double()
        error = torch.where(share > 0, share * error, 0.0).sum(0)
        dtype = parts[0].value.dtype
        return self._estimate(value.logsumexp(0).to(dtype), error.to(dtype), self.num_samples)

    def _score(self, task: Task, side: int, num_points: int) -> Estimate:
        """Scores some data on grids of `side` points per dimension, with `num_points` at once."""
        target = Target(task, WeightedGuide(prior_of(task.model), is_prior=True))
        draws = target.draw(_PRIOR_DRAWS)
        low, high = draws.amin(0), draws.amax(0)
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)  # (batch, dim)
        shape = (side,) * target.dim
        line = torch.linspace(0, 1, side, dtype=low.dtype, device=low.device)
        unit = torch.cartesian_prod(*[line] * target.dim).view(-1, 1, target.dim)
        value = torch.full_like(low[:, 0], -math.inf, dtype=torch.float64)
        error = torch.full_like(value, math.inf)
        for _ in range(_ROUNDS):
            log_f = torch.cat([target.log_joint(low + part * (high - low)) for part in unit.split(num_points)])
            log_f = log_f.double().unflatten(0, shape)
            new_value = _log_integral(log_f, low, high, 1, (0,) * target.dim)
            # Every second point in each dimension, from either of the first two: of what is narrow some see more.
            halves = [_log_integral(log_f, low, high, 2, first) for first in product((0, 1), repeat=target.dim)]
            if target.dim == 1:  # halves of a jump may agree by chance
                halves += [_log_integral(log_f, low, high, 3, (first,)) for first in range(3)]
            new_error = (new_value - torch.stack(halves)).abs().amax(0).nan_to_num(nan=math.inf)
            if target.dim == 1:
                new_error = new_error + _unsteadiness(log_f, low.squeeze(-1), high.squeeze(-1))
            new_error = new_error + _share_outside(log_f, low.shape[-1]) + _rounding(log_f, low.dtype)
            # Keep the grid with the smallest error, not the last: a heavy tail can mislead the last ones.
            value = torch.where(new_error <= error, new_value, value)
            error = torch.minimum(new_error, error)
            low, high, moved = _shrink(log_f, low, high, side)
            if not moved:
                break
        if task.summed is None or task.eliminates:  # else the prior's draws are those of all values
            sizes = split_evenly(min(_CHECK_DRAWS, self.num_samples), num_points)
            seen = torch.cat([target.values(target.draw(n))[1].expand(n, task.size) for n in sizes])
            error = torch.where(_is_above(seen.double(), value), math.inf, error)
        return self._estimate(value.to(low.dtype), error.to(low.dtype), self.num_samples)

    def trusts(self, estimate: Estimate) -> Tensor:
        return estimate.standard_error < 0.1

    def describe(self, estimate: Estimate) -> str:
        rough = int((~estimate.trusted).sum())
        n = len(estimate.value)
        return f"halving the points changes more than 0.1 nats, not to be trusted: {rough:,} of {n:,} data"

    def remedy(self, structure: SiteStructure) -> str:
        return "Take more points (num_samples), or AnnealedImportanceSampling()."


def _shrink(log_f: Tensor, low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor, bool]:
    """Returns the box of all points that matter plus one cell, for data where it differs much; and whether any does."""
    dim = low.shape[-1]
    # A coarse grid may miss most of a peak between its points: keep points near which there may be one.
    counts = log_f + _hidden(log_f, dim) > log_f.flatten(0, dim - 1).amax(0) - _DEPTH
    lows, highs = [], []
    for d in range(dim):
        hit = counts.movedim(d, 0).flatten(1, -2).any(1) if dim > 1 else counts  # (side, batch)
        first = hit.to(torch.uint8).argmax(0)
        last = side - 1 - hit.flip(0).to(torch.uint8).argmax(0)
        cell = (high[:, d] - low[:, d]) / (side - 1)
        # Mass that reaches the border continues beyond it.
        beyond = 0.25 * (high[:, d] - low[:, d])
        lows.append(low[:, d] + torch.where(first == 0, -beyond, (first - 1) * cell))
        highs.append(low[:, d] + torch.where(last == side - 1, (side - 1) * cell + beyond, (last + 1) * cell))
    new_low, new_high = torch.stack(lows, dim=-1), torch.stack(highs, dim=-1)
    grown = (new_low < low) | (new_high > high)
    shrunk = (new_high - new_low) < 0.8 * (high - low)
    moved = (grown | shrunk).any(-1, keepdim=True)
    return torch.where(moved, new_low, low), torch.where(moved, new_high, high), bool(moved.any())


def _hidden(log_f: Tensor, dim: int) -> Tensor:
    """Returns a bound on the rise of a local parabola above each point, within half a cell."""
    bend = torch.zeros_like(log_f)
    for d in range(dim):
        along = log_f.movedim(d, 0)
        second = along.diff(n=2, dim=0).abs().nan_to_num(0.0, posinf=0.0)
        bend += torch.cat([second[:1], second, second[-1:]]).movedim(0, d)
    # At most dim times the trace of the curvature, whatever the direction of a ridge.
    return 0.125 * dim * bend


def _is_above(log_likelihood: Tensor, value: Tensor) -> Tensor:
    """Returns whether draws of the prior find more than a grid, which may miss what is narrow, ``(batch,)``.

    Args:
        log_likelihood: log p(x | u) at the draws, ``(draws, batch)``.
        value: log p(x) by the grid, ``(batch,)``.
    """
    ess, size = effective_size(log_likelihood, 0), len(log_likelihood)
    excess = log_likelihood.logsumexp(0) - math.log(size) - value
    error = (1 / ess - 1 / size).clamp(min=0).sqrt()
    # The mean of few draws that count has no error, but is so far above p(x) once in as many data at most.
    return torch.where(ess > _TELLING, excess > _ERRORS * error, excess > _FACTOR)


def _share_outside(log_f: Tensor, dim: int) -> Tensor:
    """Returns the mass of the outermost points, a guess of the mass beyond them, in nats; infinite if it is all."""
    edge = max(1, len(log_f) // 20)
    inside = log_f[(slice(edge, -edge),) * dim].flatten(0, dim - 1).logsumexp(0)
    return (log_f.flatten(0, dim - 1).logsumexp(0) - inside).nan_to_num(nan=math.inf)


def _rounding(log_f: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the rounding of the terms of log p(x, u), which the points of a grid may share, ``(batch,)``."""
    return _ROUNDINGS * torch.finfo(dtype).eps * log_f.flatten(0, -2).amax(0).abs().clamp(min=1.0)


def _unsteadiness(log_f: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Returns the error, in nats, of jumps and of rounding that the points of a line show, ``(batch,)``.

    A jump may be anywhere between two points. Of rounding it is what a rounded u can change, near the top, and the
    noise between neighbours: of the terms of log p(x, u), which may be much larger than their sum.
    """
    f = (log_f - log_f.amax(0)).exp().nan_to_num(0.0)
    step = f.diff(dim=0).abs()
    is_jump = (step[1:-1] > 5 * torch.maximum(step[:-2], step[2:])) & (step[1:-1] > 1e-3)
    of_jumps = torch.where(is_jump, step[1:-1], 0.0).sum(0) / (2 * f.sum(0))
    near = log_f > log_f.amax(0) - 2
    cell = (high - low).double() / (len(log_f) - 1)
    spacing = torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs()).double()
    of_u = spacing / (near.sum(0) * cell)
    smooth = near[3:] & near[2:-1] & near[1:-2] & near[:-3]
    third = torch.where(smooth, log_f.diff(n=3, dim=0).abs(), math.nan).nanmedian(0).values.nan_to_num(0.0)
    noise = third / math.sqrt(20)  # the third difference of independent errors is so many times as large
    return of_jumps + of_u + noise


def _log_integral(log_f: Tensor, low: Tensor, high: Tensor, stride: int, first: tuple[int, ...]) -> Tensor:
    """Returns the log of the integral over a box, ``(batch,)``, by some points.

    Args:
        log_f: the integrand at the points, ``(side, ..., side, batch)``.
        low: the lowest corner of the box, ``(batch, dim)``.
        high: the highest.
        stride: every such point counts in each dimension.
        first: index of the first that counts, in each dimension.
    """
    dim, side = low.shape[-1], len(log_f)
    some = log_f[tuple(slice(start, None, stride) for start in first)]
    cells = (side - 1) / stride
    volume = ((high - low).double() / cells).log().sum(-1)
    return some.flatten(0, dim - 1).logsumexp(0) + volume


class Enumeration(_Deterministic):
    r"""The sum over all values of the latents: exact, if all latents are discrete.

    .. math:: p(x) = \sum_z p(x, z)

    Latents with many combinations of values are summed out one after the other, where each depends on few others: a
    chain of states, or many latents that are independent given others. The model must then run on all values at once,
    as for ``TraceEnum_ELBO``; this is checked at some draws of the prior. The guide is not used.

    Args:
        num_samples: largest number of combinations of values per datum that are all scored.

    Raises:
        ValueError: when a latent is not discrete, has infinitely many values or other values for other data; or when
            there are more combinations, and they cannot be eliminated.

    References:
        Tensor Variable Elimination for Plated Factor Graphs, F. Obermeyer, E. Bingham, M. Jankowiak, J. Chiu, N.
        Pradhan, A. Rush and N. Goodman, 2019, https://arxiv.org/abs/1902.03210.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> prior, encoder = priors.OneHotCategorical(6, 3), encoders.OneHotCategorical(4, 6, num_classes=3)
    >>> vae = pyrovae.VAE(prior, likelihoods.Bernoulli(6, 4), encoder)
    >>> estimate = pyrovae.log_marginal(vae.model, None, torch.zeros(5, 4), method=Enumeration(), progress=False)
    >>> estimate.num_samples, estimate.standard_error.max()
    (9, tensor(0.))
    """

    unit = "combinations"

    def __init__(self, num_samples: int = 1_000_000):
        super().__init__(num_samples)

    def estimate(self, task: Task) -> Estimate:
        task, few, trace, values = self.plan(task)
        total = values.total
        eliminated = 1 if task.summed is None else task.summed.total
        shown = total * eliminated if eliminated < 10**9 else total
        with Allocations() as allocations:
            few.score(_assign(trace, values, torch.zeros(1, dtype=torch.long), few.size), 1)
        num_scored = clamp(task.max_memory / allocations.bytes(), total)
        num_data = clamp(task.max_memory / (allocations.bytes() * num_scored), task.size)
        parts = []
        task.start(task.size * total, "combination")
        for part in task.split(num_data):
            template, _ = part.draw(1, prior_of(part.model))
            sites = sample_sites(template)
            values.check(sites)
            for name in values.sites:
                check_unmasked(name, sites[name])
            for i, numbers in enumerate(torch.arange(total).split(num_scored)):
                prior, likelihood = part.score(_assign(template, values, numbers, part.size), len(numbers))
                log_p = prior + likelihood
                chunk_sum = log_p.double().logsumexp(0)
                if i == 0:
                    log_sum = chunk_sum
                else:
                    log_sum = torch.logaddexp(log_sum, chunk_sum)
                part.advance(len(numbers) * part.size)
            value = log_sum.to(log_p.dtype)
            parts.append(self._estimate(value, torch.zeros_like(value), shown))
        return join(self, parts)

    def plan(self, task: Task) -> tuple[Task, Task, poutine.Trace, Combinations]:
        """Returns the task, two data of it, a trace of them, and the combinations of values.

        Latents with many combinations are eliminated by the task, where that is possible: a chain of them, for one.

        Raises:
            ValueError: as the class.
        """
        continuous = task.structure.latents - task.structure.discrete
        if continuous:
            raise ValueError(
                f"Enumeration is for discrete latents, and {sorted(continuous)} are not. Take UntilTrusted(), which "
                "takes both kinds."
            )
        few = replace(task.rows(slice(0, 2)), graphs=None)
        trace, _ = few.draw(1, prior_of(task.model))
        latents = {name: site for name, site in sample_sites(trace).items() if not site["is_observed"]}
        values = Combinations.of(latents, task.structure.data_index)
        if values.total > self.num_samples:
            try:
                return self.plan(sum_out(task, task.structure.latents))
            except ValueError as error:
                raise ValueError(
                    f"the latents of a datum have {values.written} combinations of values, more than "
                    f"num_samples={self.num_samples:,}. Raise it, or take AnnealedImportanceSampling()."
                ) from error
        return task, few, trace, values

    def trusts(self, estimate: Estimate) -> Tensor:
        return torch.ones_like(estimate.value, dtype=torch.bool)

    def describe(self, estimate: Estimate) -> str:
        return "exact, except for rounding"


def _assign(trace: poutine.Trace, values: Combinations, numbers: Tensor, size: int) -> poutine.Trace:
    """Returns a trace whose draws are the combinations with these numbers."""
    assigned = trace.copy()
    for name, value in values.values(numbers, size).items():
        assigned.nodes[name] = {**trace.nodes[name], "value": value}
    return assigned
