r"""Annealing: estimators that move latents from a normalised distribution to the posterior."""

import math
from abc import abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.base import Estimate, Estimator, check_count, check_positive, join
from pyrovae.estimators.memory import Allocations, clamp
from pyrovae.estimators.moves import move, next_temperature, resample
from pyrovae.estimators.proposals import Guide, Prior, Proposal
from pyrovae.estimators.schedules import Adaptive, Schedule, TemperingPath
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task, open_task
from pyrovae.estimators.weighted import WeightSums
from pyrovae.inference.simulation import check_simulated, simulate
from pyrovae.inference.structure import SiteStructure

_PILOT_CHAINS = 32
_LEAST_RENEWALS = 2.0  # of the discrete latent that is drawn anew least often
_FIXED = 1e-9  # variance of integers below which all chains have the same: that of one in 32 is above 0.01


class _Annealed(Estimator):
    """Base of the estimators that anneal from a start to the posterior."""

    num_particles = 1
    _share_kept = 0.8  # of the effective sample size, at each temperature of the pilot run

    def __init__(self, num_samples: int, num_leapfrog: int, start: Proposal | None, acceptance: float):
        super().__init__(num_samples)
        check_count("num_leapfrog", num_leapfrog)
        check_positive("acceptance", acceptance, largest=0.99)
        self.num_leapfrog, self.acceptance = num_leapfrog, acceptance
        self.start = Prior() if start is None else start
        if not isinstance(self.start, Proposal):
            raise TypeError(f"start must be a proposal such as estimators.Prior(), got {start!r}.")
        self.needs_guide = self.start.needs_guide

    def estimate(self, task: Task) -> Estimate:
        task = self.prepare(task)
        num_data, num_runs = self._chunk_sizes(task)
        task.start(task.size, "datum")
        return join(self, [self._score(part, num_runs) for part in task.split(num_data)])

    def prepare(self, task: Task) -> Task:
        return self.start.prepare(task)

    def fit(self, task: Task) -> Estimator:
        fitted = copy(self)
        fitted.start = self.start.fit(self.prepare(task))
        return fitted

    def _chunk_sizes(self, task: Task) -> tuple[int, int]:
        """Returns how many data, and how many runs of each, fit in the memory budget at once."""
        few = replace(task.rows(slice(0, 1)), graphs=None)
        target = self._target(few)
        used = []
        for chains in (1, 2):
            u = target.draw(chains)
            with Allocations() as allocations:
                target(u)
            used.append(allocations.bytes())
        # A sweep scores all values of a discrete latent at once.
        num_values = 1 if target.discrete is None else max(*target.discrete.sizes, 2)
        max_chains = task.max_memory / max((used[1] - used[0]) * num_values, 1)
        num_data = clamp(max_chains / max(self.num_samples * self.num_particles, _PILOT_CHAINS), task.size)
        return num_data, clamp(max_chains / (num_data * self.num_particles), self.num_samples)

    def _target(self, task: Task) -> Target:
        return Target(task, self.start.single(task, f"{type(self).__name__} starts"), real=False)

    def _prepare(self, task: Task) -> tuple[Target, TemperingPath, Tensor]:
        """Returns the densities for some data, what a pilot run learned about them, and the temperatures."""
        target = self._target(task)
        path = self._pilot(target, task)
        return target, path, self._betas(path)

    def _score(self, task: Task, num_runs: int) -> Estimate:
        target, path, betas = self._prepare(task)
        return self._run(target, path, betas, target.draw(self.num_samples * self.num_particles), task, num_runs)

    def _run(
        self, target: Target, path: TemperingPath, betas: Tensor, u: Tensor, task: Task, num_runs: int
    ) -> Estimate:
        """Estimates the log ratio of the normalising constants at the last and the first temperature.

        Args:
            target: the densities.
            path: what the pilot run learned.
            betas: the temperatures, ``(steps + 1, batch)``, rising or falling.
            u: where the chains start, ``(chains, batch, dim)``.
            task: the task, whose bar is moved.
            num_runs: runs at once.
        """
        sums = WeightSums(self.num_samples)
        means: list[Tensor] = []
        for chains in u.split(num_runs * self.num_particles):
            share = len(chains) / len(u)
            log_w, *rates = self._anneal(target, path, betas, chains, task, share)
            sums.add(log_w.to(u.dtype))
            means.append(share * torch.cat([rates[0].unsqueeze(-1), rates[1].unsqueeze(-1), rates[2]], dim=-1))
        mean = torch.as_tensor(sum(means))
        acceptance, diverged, jumps = mean[:, 0], mean[:, 1], mean[:, 2:]
        if len(betas) == 2:  # from one end straight to the other nothing moves: this is importance sampling
            acceptance = acceptance + math.nan
        diagnostics = {"diverged": diverged, "acceptance": acceptance}
        if target.discrete is not None:
            diagnostics["renewals"] = _renewals(jumps, path.scales[..., target.discrete.columns], len(betas) > 2)
        return replace(sums.estimate(self), diagnostics=diagnostics)

    def _anneal(
        self, target: Target, path: TemperingPath, betas: Tensor, u: Tensor, task: Task, share: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Moves chains from u through the temperatures; `share` is their share of all chains, for the bar.

        Returns:
            Log weights, ``(runs, batch)``; the shares of moves that were accepted and that diverged, ``(batch,)``; the
            sum over moves of the squared jumps of discrete latents, ``(batch, num_discrete)``.
        """
        runs, n, batch = len(u) // self.num_particles, self.num_particles, u.shape[1]
        at, steps = target(u), len(betas) - 1
        # In double precision: sums of many terms, and products of small numbers.
        log_w = torch.zeros(runs, n, batch, dtype=torch.float64, device=u.device)
        log_z = torch.zeros_like(log_w[:, 0])
        acceptance, diverged = torch.zeros_like(u[0, :, 0]), torch.zeros_like(u[0, :, 0])
        columns = [] if target.discrete is None else target.discrete.places
        jumps = torch.zeros_like(u[0][:, columns])
        for t in range(1, steps + 1):
            rise = betas[t] - betas[t - 1]
            # Where the temperature stays, the weight stays too: 0 times an infinite rise would be NaN.
            log_w = log_w + torch.where(rise == 0, 0.0, rise * at.rise).double().view(runs, n, batch)
            if t < steps:
                if n > 1:
                    u, at, log_w, log_z = resample(u, at, log_w, log_z)
                step, scale = path.at(betas[t])
                moved = move(target, u, at, betas[t], step, scale, self.num_leapfrog)
                if columns:
                    jumps += (moved.u - u)[..., columns].square().mean(0)
                u, at = moved.u, moved.at
                acceptance += moved.acceptance.mean(0) / (steps - 1)
                diverged += moved.diverged.to(diverged).mean(0) / (steps - 1)
            task.advance(0.5 * batch * share / steps)
        return log_z + log_w.logsumexp(1) - math.log(n), acceptance, diverged, jumps

    def _pilot(self, target: Target, task: Task) -> TemperingPath:
        """Runs chains to the posterior by adaptive tempering, to learn step sizes, scales and temperatures."""
        chains = max(_PILOT_CHAINS, self.num_particles)
        u = target.draw(chains)
        at = target(u)
        batch, dim = u.shape[1:]
        beta = torch.zeros(batch, dtype=u.dtype, device=u.device)
        step = torch.full_like(beta, 0.5 / dim**0.25)
        variance = target.variance(u)
        steps = [(beta, step, variance.sqrt(), _spread(at.rise))]
        while bool((beta < 1).any()):
            before = beta
            beta, log_w = next_temperature(beta, at.rise, self._share_kept)
            u, at, *_ = resample(u, at, log_w.unsqueeze(0), log_w.new_zeros(1, batch), always=True)
            for _ in range(2):
                moved = move(target, u, at, beta, step, variance.sqrt(), self.num_leapfrog)
                u, at = moved.u, moved.at
                if target.has_gradients:
                    step = step * (0.5 * (moved.acceptance.mean(0) - self.acceptance)).exp()
            # So few chains give the scale with an error of a fifth: average it over temperatures.
            variance = torch.lerp(variance, target.variance(u), 0.3)
            steps.append((beta, step, variance.sqrt(), _spread(at.rise)))
            task.advance(0.5 * (beta - before).sum().item())
        return TemperingPath(*map(torch.stack, zip(*steps, strict=True)))

    @abstractmethod
    def _betas(self, path: TemperingPath) -> Tensor:
        """Returns the temperatures of the main run, ``(steps + 1, batch)``."""

    def trusts(self, estimate: Estimate) -> Tensor:
        """Returns whether the ESS is a fifth of the chains and at least 4, and moves are accepted and rarely diverge.

        The ESS, because so few weights say little about their tail. Discrete latents have to be drawn anew at least
        twice on the way from the start to the posterior.
        """
        fails = (estimate.diagnostics["acceptance"] < 0.2) | (estimate.diagnostics["diverged"] > 0.05)
        if "renewals" in estimate.diagnostics:
            fails = fails | (estimate.diagnostics["renewals"] < _LEAST_RENEWALS)
        return (estimate.ess >= max(0.2 * self.num_samples, 4)) & ~fails

    def describe(self, estimate: Estimate) -> str:
        n = len(estimate.value)
        untrusted = int((~estimate.trusted).sum())
        unseen = "; modes that the guide misses are not seen" if isinstance(self.start, Guide) else ""
        reliability = f"not to be trusted (low ESS of {self.unit}, or moves fail): {untrusted:,} of {n:,} data{unseen}"
        lines = []
        acceptance, diverged = estimate.diagnostics["acceptance"], estimate.diagnostics["diverged"]
        acceptance = acceptance[~acceptance.isnan()]
        if len(acceptance):
            lines.append(f"moves accepted: {acceptance.mean().item():.0%} (least: {acceptance.min().item():.0%})")
            failed = f"for {int((diverged > 0).sum()):,} of {n:,} data"
            lines.append(f"diverged: {diverged.mean().item():.1%} of moves, {failed}")
        if "renewals" in estimate.diagnostics:
            renewals = estimate.diagnostics["renewals"]
            median, least = renewals.median().item(), renewals.min().item()
            lines.append(f"discrete latents were drawn anew {median:.0f} times (least: {least:.1f})")
        return "; ".join(lines) + f"\n{reliability}" if lines else reliability

    def remedy(self, structure: SiteStructure) -> str:
        return "Take more temperatures, or UntilTrusted()."


def _renewals(jumps: Tensor, scales: Tensor, moved: bool) -> Tensor:
    r"""Returns how often chains drew the discrete latent anew that they draw least often, ``(batch,)``.

    .. math:: \min_d \frac{\sum_t \mathrm{E}\,(u_{t,d} - u_{t-1,d})^2}{2 \,\mathrm{Var}\, u_d}

    An independent draw adds one to the ratio, and a latent that is stuck at different values in different chains adds
    nothing. One that never differs does not count: its other values were scored at every temperature.

    Args:
        jumps: the sums of squared jumps of each latent, ``(batch, num_discrete)``.
        scales: standard deviations over chains during the pilot run, ``(steps, batch, num_discrete)``.
        moved: whether there were moves at all.
    """
    variance = scales.square().mean(0)
    renewals = torch.where(variance > _FIXED, jumps / (2 * variance), math.inf).amin(-1)
    return renewals if moved else torch.zeros_like(renewals)


def _spread(rise: Tensor) -> Tensor:
    """Returns the standard deviation over chains; impossible draws count as the lowest possible one."""
    possible = rise.isfinite()
    lowest = torch.where(possible, rise, math.inf).amin(0)
    return torch.where(possible, rise, lowest).nan_to_num(posinf=0.0).std(0)


class AnnealedImportanceSampling(_Annealed):
    r"""Annealed importance sampling with Hamiltonian moves, and Gibbs moves of discrete latents.

    .. math:: \hat p(x) = \frac{1}{K} \sum_{k=1}^K \prod_{t=1}^T
        \left(\frac{p(x, z_{t-1})}{q(z_{t-1})}\right)^{\beta_t - \beta_{t-1}}, \qquad
        z_0 \sim q, \quad z_t \sim \mathcal{T}_{\beta_t}(\cdot \mid z_{t-1})

    where each move :math:`\mathcal{T}_\beta` leaves :math:`q(z)^{1-\beta} p(x, z)^\beta` invariant. It is unbiased,
    like importance sampling, and its weights vary less with more temperatures. A pilot run finds step sizes, scales and
    temperatures for each datum, so that the main run does not adapt.

    Latents may be of several kinds in one model. Constrained ones are moved in the unconstrained space, unit vectors
    along great circles. Discrete ones are drawn one after the other given all others, from all values if these can be
    listed; counts take steps. The diagnostic "renewals" is how often chains drew the discrete latent anew that they
    draw least often: latents that only change together stay where they are, and are not trusted.

    Args:
        num_samples: chains per datum K, at least 1; below 21 there is no k-hat.
        num_temperatures: T, at least 1.
        num_leapfrog: gradients per move, at least 1.
        start: q; :class:`Prior` by default, so that nothing depends on the guide. :class:`Guide` or :class:`Refined`
            need fewer temperatures where they are close to the posterior.
        schedule: the temperatures; :class:`Adaptive` by default.
        acceptance: target acceptance rate of the moves, below 1.

    Raises:
        ValueError: when the support of latents depends on other latents, or has neither a bijection from
            :math:`\mathbb{R}^n` nor moves of its own, as spheres, values that can be listed, and integers have.

    References:
        Annealed Importance Sampling, R. M. Neal, 2001, https://arxiv.org/abs/physics/9803008; On the Quantitative
        Analysis of Decoder-Based Generative Models, Y. Wu, Y. Burda, R. Salakhutdinov and R. Grosse, 2017,
        https://arxiv.org/abs/1611.04273; Geodesic Monte Carlo on Embedded Manifolds, S. Byrne and M. Girolami, 2013,
        https://arxiv.org/abs/1301.6064; Peskun's Theorem and a Modified Discrete-State Gibbs Sampler, J. S. Liu, 1996,
        https://doi.org/10.1093/biomet/83.3.681.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> method = AnnealedImportanceSampling(num_samples=4, num_temperatures=5)
    >>> estimate = pyrovae.log_marginal(vae.model, None, torch.zeros(5, 3), method=method, progress=False)
    >>> sorted(estimate.diagnostics)
    ['acceptance', 'diverged']
    """

    unit = "chains"

    def __init__(
        self,
        num_samples: int = 32,
        num_temperatures: int = 200,
        num_leapfrog: int = 2,
        start: Proposal | None = None,
        schedule: Schedule | None = None,
        acceptance: float = 0.8,
    ):
        super().__init__(num_samples, num_leapfrog, start, acceptance)
        check_count("num_temperatures", num_temperatures)
        self.num_temperatures = num_temperatures
        self.schedule = Adaptive() if schedule is None else schedule
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a schedule such as estimators.Sigmoid(), got {schedule!r}.")

    def _betas(self, path: TemperingPath) -> Tensor:
        betas = self.schedule.betas(self.num_temperatures, path).to(path.betas)
        if bool((betas[0] != 0).any() | (betas[-1] != 1).any() | (betas.diff(dim=0) < 0).any()):
            raise ValueError(f"the temperatures of {self.schedule} must rise from 0 to 1.")
        return betas.expand(-1, path.betas.shape[1])


class SequentialMonteCarlo(_Annealed):
    r"""Sequential Monte Carlo with adaptive tempering: annealing that resamples chains by their weights.

    .. math:: \hat p(x) = \prod_{t=1}^T \frac{1}{N} \sum_{n=1}^N w_{tn}, \qquad
        w_{tn} = \left(\frac{p(x, z_{t-1,n})}{q(z_{t-1,n})}\right)^{\beta_t - \beta_{t-1}}

    A pilot run finds temperatures for each datum, each step as large as keeps a share of the effective sample size; the
    main run does not adapt them, so that the estimate is unbiased. Particles are resampled (systematically) where their
    effective sample size is below half of their number. The runs are independent: the error comes from their spread.

    Args:
        num_samples: runs per datum, at least 1; below 21 there is no k-hat.
        num_particles: particles per run N, at least 2.
        num_leapfrog: gradients per move, at least 1.
        start: q; :class:`Prior` by default.
        kept: share of the effective sample size that each step of the temperature keeps, below 1.
        acceptance: target acceptance rate of the moves, below 1.

    Raises:
        ValueError: as :class:`AnnealedImportanceSampling`.

    References:
        Sequential Monte Carlo Samplers, P. Del Moral, A. Doucet and A. Jasra, 2006,
        https://doi.org/10.1111/j.1467-9868.2006.00553.x; Toward Automatic Model Comparison: An Adaptive Sequential
        Monte Carlo Approach, Y. Zhou, A. M. Johansen and J. A. D. Aston, 2016, https://arxiv.org/abs/1303.3123.

    >>> SequentialMonteCarlo(num_samples=24, num_particles=16).num_particles
    16
    """

    unit = "runs"

    def __init__(
        self,
        num_samples: int = 24,
        num_particles: int = 32,
        num_leapfrog: int = 2,
        start: Proposal | None = None,
        kept: float = 0.9,
        acceptance: float = 0.8,
    ):
        super().__init__(num_samples, num_leapfrog, start, acceptance)
        check_count("num_particles", num_particles, least=2)
        check_positive("kept", kept, largest=0.999)
        self.num_particles, self.kept = int(num_particles), kept
        self._share_kept = kept

    def _betas(self, path: TemperingPath) -> Tensor:
        return path.betas


class Bracket(NamedTuple):
    r"""A lower and an upper bound on :math:`\log p(x)` of data drawn from the model.

    Args:
        lower: the estimate by annealing from the start to the posterior, a stochastic lower bound.
        upper: the estimate by annealing back from an exact draw of the posterior, a stochastic upper bound. All chains
            of a datum start from the same draw; its randomness is not in the standard error of a datum, but it is in
            the spread over data.
        args: the model's arguments, with the data that were drawn.
        kwargs: its keyword arguments.
    """

    lower: Estimate
    upper: Estimate
    args: tuple
    kwargs: dict[str, Any]

    @property
    def gap(self) -> Tensor:
        """The upper minus the lower bound, ``(batch,)`` in nats: on average, the largest error of either."""
        return self.upper.value - self.lower.value

    def __str__(self) -> str:
        n = len(self.gap)
        error = self.gap.std().item() / math.sqrt(n) if n > 1 else math.nan
        low, high = self.lower.value.mean().item(), self.upper.value.mean().item()
        return (
            f"log p(x) of {n:,} data drawn from the model: {low:.3f} to {high:.3f} nats a datum, "
            f"a gap of {high - low:.3f} (standard error: {error:.3f})"
        )


@torch.no_grad()
def bidirectional(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    method: AnnealedImportanceSampling | None = None,
    max_memory: float = 64e6,
    progress: bool = True,
    **kwargs: Any,
) -> Bracket:
    r"""Bounds :math:`\log p(x)` from both sides, on data drawn from the model, by annealing forwards and backwards.

    .. math:: \mathrm{E}[\log \hat p(x)] \le \log p(x) \le \mathrm{E}[-\log \widehat{1/p(x)}]

    If the model drew the data, its latents are an exact draw of the posterior, from which chains can run back: the mean
    of the inverse weights is unbiased for :math:`1/p(x)`. The gap bounds the error of the method at this number of
    chains and temperatures; it carries over to real data as far as these resemble data from the model.

    Args:
        model: a Pyro model that observes some of its arguments.
        guide: a Pyro guide, or None.
        *args: positional arguments of the model; those that it observes are replaced by data drawn from it.
        method: the annealing; :class:`AnnealedImportanceSampling` by default.
        max_memory: budget for intermediate results, in bytes.
        progress: whether to show a progress bar.
        **kwargs: keyword arguments of the model.

    Raises:
        ValueError: as in :func:`log_marginal`; when the model observes none of its arguments.

    References:
        Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo, R. B. Grosse, Z. Ghahramani and R. P.
        Adams, 2015, https://arxiv.org/abs/1511.02543.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> method = AnnealedImportanceSampling(num_samples=4, num_temperatures=5)
    >>> bracket = bidirectional(vae.model, None, torch.zeros(5, 3), method=method, progress=False)
    >>> bracket.gap.shape
    torch.Size([5])
    """
    method = AnnealedImportanceSampling() if method is None else method
    if not isinstance(method, AnnealedImportanceSampling):
        raise TypeError(f"method must be an AnnealedImportanceSampling, got {method!r}.")
    with open_task(model, guide, method, args, kwargs, max_memory, progress=False) as task:
        task.check_not_summed("bidirectional")
        latents, drawn, named = simulate(model, task.structure, *args, **kwargs)
        check_simulated(model, latents, task.structure, drawn, named)
    with open_task(model, guide, method, drawn, named, max_memory, progress) as task:
        task = method.prepare(task)
        task.start(1.5 * task.size, "datum")
        lower, upper, done = [], [], 0
        num_data, num_runs = method._chunk_sizes(task)
        for part in task.split(num_data):
            target, path, betas = method._prepare(part)
            exact = target.pack_rows(latents, slice(done, done + part.size)).expand(method.num_samples, -1, -1)
            lower.append(method._run(target, path, betas, target.draw(method.num_samples), part, num_runs))
            upper.append(method._run(target, path, betas.flip(0), exact, part, num_runs))
            done += part.size
    reverse = join(method, upper)
    return Bracket(join(method, lower), replace(reverse, value=-reverse.value), drawn, named)
