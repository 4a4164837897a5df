r"""A proposal that is adapted to each posterior by its own importance weights."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyrovae.estimators.base import check_count
from pyrovae.estimators.laplace import Fitted, Laplace
from pyrovae.estimators.memory import Allocations, clamp, split_evenly
from pyrovae.estimators.moves import next_temperature
from pyrovae.estimators.newton import joint_of
from pyrovae.estimators.normal_guides import Components, draw_pilots
from pyrovae.estimators.proposals import Proposal, WeightedGuide
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task
from pyrovae.inference.filtering import effective_size

_LEAST_SHARE = 0.1  # effective sample size after tempering, as a share of the draws
_FLOOR = 1e-6  # added to the variances, relative to their mean, so that a covariance from few draws has an inverse
_PILOT_DEGREES = 20.0  # of the rounds' draws
_KEPT = 0.15  # share of the covariance of the round before
_SCALE_PILOTS = 400  # draws that the width is chosen by
_DRAWS_AT_ONCE = 100  # for which memory is planned, if there are as many


class Adapted(Proposal):
    r"""A normal or Student-t distribution with the moments of each posterior, from rounds of importance sampling.

    .. math:: \mu_t = \sum_k \bar w_k u_k, \quad
        \Sigma_t = (1 - c) \sum_k \bar w_k (u_k - \mu_t)(u_k - \mu_t)^\top + c\, \Sigma_{t-1}, \qquad
        \bar w_k \propto \left(\frac{p(x, u_k)}{q_{t-1}(u_k \mid x)}\right)^{\beta_t}, \quad u_k \sim q_{t-1}

    with all latents of a datum as one vector u of real numbers, as in :class:`Laplace`. The temperature
    :math:`\beta_t` of each datum is the largest up to 1 at which the effective sample size is a tenth of the draws, so
    that few large weights do not decide, and c is 0.15. The draws of a round are from a Student-t distribution of 20
    degrees of freedom. Of the rounds, the one is taken whose own draws have the largest effective sample size, for each
    datum; its width is then chosen as that of :class:`Laplace`. No draw of these rounds is used again.

    It describes bent and skewed posteriors better than the curvature at the mode does. In many dimensions the moments
    need more draws; a mixture, ``Mixed([Laplace(), Adapted()])``, is then safer.

    Args:
        proposal: where to begin, a proposal of one component; :class:`Laplace` by default.
        num_rounds: rounds of moment matching, at least 1.
        num_draws: draws per datum and round, at least 2.
        degrees: degrees of freedom of a Student-t distribution with these moments, above 2; infinity for the normal.

    References:
        Adaptive Multiple Importance Sampling, J.-M. Cornuet, J.-M. Marin, A. Mira and C. P. Robert, 2012,
        https://arxiv.org/abs/0907.1254; Adaptive Importance Sampling in General Mixture Classes, O. Cappé, R. Douc,
        A. Guillin, J.-M. Marin and C. P. Robert, 2008, https://arxiv.org/abs/0710.4242.

    >>> Adapted(num_rounds=5)
    Adapted(num_rounds=5)
    """

    sums_discrete = True

    def __init__(
        self,
        proposal: Proposal | None = None,
        num_rounds: int = 3,
        num_draws: int = 2000,
        degrees: float = math.inf,
    ):
        if proposal is not None and not isinstance(proposal, Proposal):
            raise TypeError(f"proposal must be a proposal such as estimators.Laplace(), got {proposal!r}.")
        check_count("num_rounds", num_rounds)
        check_count("num_draws", num_draws, least=2)
        if not degrees > 2:
            raise ValueError(f"degrees must be above 2, so that there is a variance to match; got {degrees}.")
        self.proposal, self.num_rounds, self.num_draws, self.degrees = proposal, num_rounds, num_draws, degrees
        self.needs_guide = proposal is None or proposal.needs_guide

    def guides(self, task: Task) -> list[WeightedGuide]:
        return self.fit(task).guides(task)

    def fit(self, task: Task) -> Proposal:
        task = replace(task, graphs=None)
        fits = [self._fit_part(part) for part in task.split(self._rows_at_once(task))]
        return Fitted(Components.cat(fits), self.degrees, task.offset)

    def _rows_at_once(self, task: Task) -> int:
        """Returns how many data to take at once, so that some draws of each fit in the memory budget."""
        if not task.divisible:
            return task.size
        few = task.rows(slice(0, 2))
        per_datum = self._bytes_per_draw(joint_of(few)) * min(self.num_draws, _DRAWS_AT_ONCE)
        return clamp(task.max_memory / per_datum, task.size)

    def _bytes_per_draw(self, target: Target) -> float:
        u = target.draw(1)
        with Allocations() as allocations:
            target.log_joint(u)
        return max(allocations.bytes(), 1) / u.shape[1]

    def _fit_part(self, task: Task) -> Components:
        """Returns the component of the best round, for each datum."""
        target = joint_of(task)
        start = (Laplace() if self.proposal is None else self.proposal).single(task, "Adapted begins").guide
        at_once = clamp(task.max_memory / (task.size * self._bytes_per_draw(target)), self.num_draws)
        sizes = split_evenly(self.num_draws, at_once)
        us, log_ws = zip(*(self._draw(target, start, n) for n in sizes), strict=True)
        u, log_w = torch.cat(us), torch.cat(log_ws)
        best: list[Tensor] = []
        deviations = u.double() - u.double().mean(0)
        covariance = torch.einsum("knd,kne->nde", deviations, deviations) / (len(u) - 1)
        for _ in range(self.num_rounds):
            mean, covariance = _moments(u.double(), log_w, covariance)
            scale_tril = torch.linalg.cholesky(covariance).to(u.dtype)
            # Heavier tails than those of the result: a covariance that is too small would not grow again.
            pilot = Components.single(mean.to(u.dtype), scale_tril)
            covariance = covariance * (_PILOT_DEGREES / (_PILOT_DEGREES - 2))
            u = pilot.draw(self.num_draws, _PILOT_DEGREES)
            log_p = torch.cat([target.log_joint(part) for part in u.split(at_once)])
            log_w = (log_p - pilot.log_prob(u, _PILOT_DEGREES)).double()
            new = [mean.to(u.dtype), scale_tril, _ess(log_w)]
            if best:
                better = new[2] >= best[2]
                new = [torch.where(better.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip(new, best, strict=True)]
            best = new
        mean, scale_tril, _ = best
        if self.degrees < math.inf:  # whose covariance is that of the scale matrix times this
            scale_tril = scale_tril * math.sqrt((self.degrees - 2) / self.degrees)
        found = Components.single(mean, scale_tril)
        # Chosen by other draws than those of the moments, which favour a narrow one.
        return found.scaled(draw_pilots(target, found, _SCALE_PILOTS, at_once), self.degrees)

    def _draw(self, target: Target, start: Callable, num_draws: int) -> tuple[Tensor, Tensor]:
        """Returns draws from the start and their log weights."""
        trace, log_q = target.task.draw(num_draws, start)
        prior, likelihood = target.task.score(trace, num_draws)
        return target.pack(trace), (prior + likelihood - log_q).double()


def _ess(log_w: Tensor) -> Tensor:
    """Returns the effective sample size for each datum; 0 where no weight is finite."""
    return effective_size(log_w, 0).nan_to_num(0.0)


def _moments(u: Tensor, log_w: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the covariance of draws by their tempered weights, the covariance shrunk to another.

    Args:
        u: draws, ``(draws, batch, dim)``.
        log_w: log weights, ``(draws, batch)``.
        before: the covariance of the distribution that u is drawn from; a share of it is kept.
    """
    finite = log_w.isfinite()
    lowest = torch.where(finite, log_w, math.inf).amin(0)
    lowest = torch.where(lowest.isfinite(), lowest, 0.0)
    log_w = torch.where(finite, log_w, lowest - 1e3)
    _, tempered = next_temperature(torch.zeros_like(log_w[0]), log_w, _LEAST_SHARE)
    w = tempered.softmax(0)
    mean = (w.unsqueeze(-1) * u).sum(0)
    deviations = u - mean
    own = torch.einsum("kn,knd,kne->nde", w, deviations, deviations)
    covariance = (1 - _KEPT) * own + _KEPT * before
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    floor = _FLOOR * variances.mean(-1)[:, None, None].clamp(min=torch.finfo(u.dtype).tiny)
    return mean, covariance + floor * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
