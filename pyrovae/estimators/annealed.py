r"""Estimators that move latents from a distribution that is known to the posterior: annealing, and its two sides."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.base import (
    Allocations,
    Estimate,
    Estimator,
    Task,
    check_count,
    check_positive,
    clamp,
    join,
    open_task,
)
from pyrovae.estimators.proposals import Prior, Proposal
from pyrovae.estimators.targets import Densities, Target
from pyrovae.estimators.weighted import WeightSums
from pyrovae.inference.messages import described
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import simulate

_DIVERGED = 1000.0  # an error of the energy, in nats, that no useful step makes; as in Stan
_PILOT_CHAINS = 32


class Schedule(ABC):
    r"""Base of the schedules of temperatures :math:`0 = \beta_0 < \dots < \beta_T = 1`; write `betas` for another.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models, Y. Wu, Y. Burda, R. Salakhutdinov and R.
        Grosse, 2017, https://arxiv.org/abs/1611.04273.
    """

    @abstractmethod
    def betas(self, num_temperatures: int, pilot: "TemperingPath") -> Tensor:
        """Returns ``(num_temperatures + 1, batch)``, or the same for all data in one column; from a run before the one that counts."""

    def __repr__(self) -> str:
        return described(self)


class Linear(Schedule):
    r"""Equal steps, :math:`\beta_t = t / T`."""

    def betas(self, num_temperatures: int, pilot: "TemperingPath") -> Tensor:
        return torch.linspace(0, 1, num_temperatures + 1).unsqueeze(-1)


class Sigmoid(Schedule):
    r"""Small steps at either end, after Wu et al.

    .. math:: \beta_t = \frac{\sigma(\delta (2t/T - 1)) - \sigma(-\delta)}{\sigma(\delta) - \sigma(-\delta)}

    Args:
        rate: :math:`\delta`, positive.
    """

    def __init__(self, rate: float = 4.0):
        check_positive("rate", rate)
        self.rate = rate

    def betas(self, num_temperatures: int, pilot: "TemperingPath") -> Tensor:
        s = (self.rate * torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64)).sigmoid()
        return ((s - s[0]) / (s[-1] - s[0])).float().unsqueeze(-1)


class Adaptive(Schedule):
    r"""Steps of equal length for each datum, by how much the log weights vary: the least variance to first order.

    .. math:: \int_{\beta_{t-1}}^{\beta_t} \sqrt{\mathrm{Var}_{f_\beta}\left[\log p(x, z) - \log q(z)\right]}\, d\beta
        = \text{const.}

    References:
        Simulating Normalizing Constants: From Importance Sampling to Bridge Sampling to Path Sampling, A. Gelman and
        X.-L. Meng, 1998, https://doi.org/10.1214/ss/1028905934.
    """

    def betas(self, num_temperatures: int, pilot: "TemperingPath") -> Tensor:
        steps = pilot.betas.diff(dim=0)
        speed = 0.5 * (pilot.speeds[1:] + pilot.speeds[:-1])
        # A tenth of equal steps, in case the run before saw too little.
        length = speed * steps
        length = length / length.sum(0, keepdim=True).clamp(min=1e-12) + 0.1 * steps
        at = torch.cat([torch.zeros_like(length[:1]), length.cumsum(0)])
        at = at / at[-1:]
        grid = torch.linspace(0, 1, num_temperatures + 1, dtype=at.dtype, device=at.device)
        betas = _interpolate(grid.unsqueeze(-1).expand(-1, at.shape[1]), at, pilot.betas)
        betas[0], betas[-1] = 0.0, 1.0
        return betas


class TemperingPath(NamedTuple):
    """How a run before the one that counts went from the start to the posterior; the first dimension is time.

    Args:
        betas: the temperatures, ``(steps, batch)``, from 0 to 1.
        step_sizes: of the moves at each, for the chains to be accepted as often as asked for, of the same shape.
        scales: standard deviations of the chains, ``(steps, batch, dim)``.
        speeds: standard deviations of what the posterior's log-density is above the start's, ``(steps, batch)``.
    """

    betas: Tensor
    step_sizes: Tensor
    scales: Tensor
    speeds: Tensor

    def at(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns step sizes and scales at temperatures ``(batch,)``."""
        upper, share = _between(self.betas, beta.unsqueeze(0))
        rows = torch.arange(len(beta), device=beta.device)

        def at(values: Tensor, share: Tensor) -> Tensor:
            return torch.lerp(values[upper[0] - 1, rows].log(), values[upper[0], rows].log(), share).exp()

        step, scale = at(self.step_sizes, share[0]), at(self.scales, share[0].unsqueeze(-1))
        return step, scale


class _Moved(NamedTuple):
    """Latents after a Hamiltonian move, with the share of it that would be accepted and whether it diverged."""

    u: Tensor
    at: Densities
    acceptance: Tensor
    diverged: Tensor


class _Annealed(Estimator):
    """What annealing from a start to the posterior has in common."""

    num_particles = 1
    _share_kept = 0.8  # of the effective sample size, at each temperature of the run before

    def __init__(self, num_samples: int, num_leapfrog: int, start: Proposal | None, acceptance: float):
        super().__init__(num_samples)
        check_count("num_leapfrog", num_leapfrog)
        check_positive("acceptance", acceptance, largest=0.99)
        self.num_leapfrog, self.acceptance = num_leapfrog, acceptance
        self.start = Prior() if start is None else start
        if not isinstance(self.start, Proposal):
            raise TypeError(f"start must be a proposal such as estimators.Prior(), got {start!r}.")

    @property
    def needs_guide(self) -> bool:
        """Whether the start looks at the guide."""
        return self.start.needs_guide

    def estimate(self, task: Task) -> Estimate:
        data, runs = self._fit(task)
        task.start(task.size, "datum")
        return join(self, [self._score(part, runs) for part in task.split(data)])

    def _fit(self, task: Task) -> tuple[int, int]:
        """Returns how many data, and of each how many runs, fit in the budget at once."""
        few = replace(task.rows(slice(0, 1)), graphs=None)
        target = Target(few, self.start.single(few, f"{type(self).__name__} starts"))
        used = []
        for chains in (1, 2):
            u = target.draw(chains)
            with Allocations() as counted:
                target(u)
            used.append(counted.bytes())
        at_once = task.max_memory / max(used[1] - used[0], 1)  # chains
        data = clamp(at_once / max(self.num_samples * self.num_particles, _PILOT_CHAINS), task.size)
        return data, clamp(at_once / (data * self.num_particles), self.num_samples)

    def _prepare(self, task: Task) -> tuple[Target, TemperingPath, Tensor]:
        """Returns where chains move for some data, what a run before the one that counts found, and the temperatures."""
        target = Target(task, self.start.single(task, f"{type(self).__name__} starts"))
        path = self._pilot(target, task)
        return target, path, self._betas(path)

    def _score(self, task: Task, runs: int) -> Estimate:
        target, path, betas = self._prepare(task)
        return self._run(target, path, betas, target.draw(self.num_samples * self.num_particles), task, runs)

    def _run(self, target: Target, path: TemperingPath, betas: Tensor, u: Tensor, task: Task, runs: int) -> Estimate:
        """Takes chains from u through temperatures, so many runs at once; returns the ratio of the constants at the ends."""
        sums = WeightSums(self.num_samples)
        acceptance = diverged = 0.0
        for some in u.split(runs * self.num_particles):
            share = len(some) / len(u)
            log_w, accepted, failed = self._anneal(target, path, betas, some, task, share)
            sums.add(log_w.to(u.dtype))
            acceptance, diverged = acceptance + share * accepted, diverged + share * failed
        estimate = sums.estimate(self)
        # At a single temperature nothing moves: it is importance sampling.
        estimate.diagnostics.update(
            diverged=diverged, acceptance=acceptance if len(betas) > 2 else acceptance + math.nan
        )
        return estimate

    def _anneal(
        self, target: Target, path: TemperingPath, betas: Tensor, u: Tensor, task: Task, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes chains from u through temperatures, up or down.

        Returns:
            Log weights, ``(runs, batch)``, and the shares of moves that were accepted and that diverged, ``(batch,)``.
        """
        runs, n, batch = len(u) // self.num_particles, self.num_particles, u.shape[1]
        at, steps = target(u), len(betas) - 1
        # Sums of many terms, and products of small numbers: in double precision.
        log_w = torch.zeros(runs, n, batch, dtype=torch.float64, device=u.device)
        log_z = torch.zeros_like(log_w[:, 0])
        acceptance, diverged = torch.zeros_like(u[0, :, 0]), torch.zeros_like(u[0, :, 0])
        for t in range(1, steps + 1):
            rise = betas[t] - betas[t - 1]
            # Of data that are there before others nothing rises, not even an impossible draw's 0 times infinity.
            log_w = log_w + torch.where(rise == 0, 0.0, rise * at.rise).double().view(runs, n, batch)
            if t < steps:
                if n > 1:
                    u, at, log_w, log_z = _resample(u, at, log_w, log_z)
                step, scale = path.at(betas[t])
                moved = _move(target, u, at, betas[t], step, scale, self.num_leapfrog)
                u, at = moved.u, moved.at
                acceptance += moved.acceptance.mean(0) / (steps - 1)
                diverged += moved.diverged.to(diverged).mean(0) / (steps - 1)
            task.advance(0.5 * batch * share / steps)
        return log_z + log_w.logsumexp(1) - math.log(n), acceptance, diverged

    def _pilot(self, target: Target, task: Task) -> TemperingPath:
        """Runs chains to the posterior by adaptive tempering, to learn step sizes, scales and temperatures from them."""
        chains = max(_PILOT_CHAINS, self.num_particles)
        u = target.draw(chains)
        at = target(u)
        batch, dim = u.shape[1:]
        beta = torch.zeros(batch, dtype=u.dtype, device=u.device)
        step = torch.full_like(beta, 0.5 / dim**0.25)
        variance = u.var(0).clamp(min=1e-12)
        betas, steps, scales, speeds = [], [], [], []

        def record() -> None:
            betas.append(beta)
            steps.append(step)
            scales.append(variance.sqrt())
            # Impossible draws have no weight from the first temperature on, however near it is.
            possible = at.rise.isfinite()
            lowest = torch.where(possible, at.rise, math.inf).amin(0)
            speeds.append(torch.where(possible, at.rise, lowest).nan_to_num(posinf=0.0).std(0))

        record()
        while bool((beta < 1).any()):
            before = beta
            beta, log_w = _next_temperature(beta, at.rise, self._share_kept)
            u, at, *_ = _resample(u, at, log_w.unsqueeze(0), log_w.new_zeros(1, batch), always=True)
            for _ in range(2):
                moved = _move(target, u, at, beta, step, variance.sqrt(), self.num_leapfrog)
                u, at = moved.u, moved.at
                step = step * (0.5 * (moved.acceptance.mean(0) - self.acceptance)).exp()
            # Few chains tell the scale to a fifth: go on from what the temperatures before said.
            variance = torch.lerp(variance, u.var(0).clamp(min=1e-12), 0.3)
            record()
            task.advance(0.5 * (beta - before).sum().item())
        return TemperingPath(torch.stack(betas), torch.stack(steps), torch.stack(scales), torch.stack(speeds))

    @abstractmethod
    def _betas(self, path: TemperingPath) -> Tensor:
        """Returns the temperatures of the run that counts, ``(steps + 1, batch)``."""

    def trusts(self, estimate: Estimate) -> Tensor:
        """Returns whether a fifth of the chains and at least four count, and moves were accepted and hardly ever diverged.

        The tail of so few weights says little; that few of them count says more.
        """
        fails = (estimate.diagnostics["acceptance"] < 0.2) | (estimate.diagnostics["diverged"] > 0.05)
        return (estimate.ess >= max(0.2 * self.num_samples, 4)) & ~fails

    def describe(self, estimate: Estimate) -> str:
        n = len(estimate.value)
        untrusted = int((~estimate.trusted).sum())
        said = f"not to be trusted (few {self.unit} count, or moves fail): {untrusted:,} of {n:,} data"
        acceptance, diverged = estimate.diagnostics["acceptance"], estimate.diagnostics["diverged"]
        acceptance = acceptance[~acceptance.isnan()]
        if not len(acceptance):
            return said
        moves = f"moves accepted: {acceptance.mean().item():.0%} (least: {acceptance.min().item():.0%})"
        share = f"diverged: {diverged.mean().item():.1%} of moves, of {int((diverged > 0).sum()):,} of {n:,} data"
        return f"{moves}; {share}\n{said}"

    def remedy(self, structure: SiteStructure) -> str:
        return "Take more temperatures, or start=Refined()."


class AnnealedImportanceSampling(_Annealed):
    r"""Annealed importance sampling with Hamiltonian moves.

    .. math:: \hat p(x) = \frac{1}{K} \sum_{k=1}^K \prod_{t=1}^T
        \left(\frac{p(x, z_{t-1})}{q(z_{t-1})}\right)^{\beta_t - \beta_{t-1}}, \qquad
        z_0 \sim q, \quad z_t \sim \mathcal{T}_{\beta_t}(\cdot \mid z_{t-1})

    where each move :math:`\mathcal{T}_\beta` leaves :math:`q(z)^{1-\beta} p(x, z)^\beta` as it is. It is unbiased, like
    importance sampling, and its weights vary less with each temperature. A run before the one that counts finds step
    sizes, scales and temperatures for each datum, so that the run that counts adapts to nothing. Latents must be
    continuous; bounded ones are moved in the space of real numbers that is mapped to theirs.

    Args:
        num_samples: chains per datum K, at least 1; below 21 there is no k-hat.
        num_temperatures: T, at least 1.
        num_leapfrog: gradients a move, at least 1.
        start: what q is, :class:`Prior` unless given, so that nothing depends on the guide; :class:`Guide` or
            :class:`Refined` need fewer temperatures where they are near.
        schedule: the temperatures, :class:`Adaptive` unless given.
        acceptance: share of moves that the step sizes are to have accepted, below 1.

    Raises:
        ValueError: when latents are discrete, or live where real numbers are not mapped to one to one (a sphere).

    References:
        Annealed Importance Sampling, R. M. Neal, 2001, https://arxiv.org/abs/physics/9803008; On the Quantitative
        Analysis of Decoder-Based Generative Models, Y. Wu, Y. Burda, R. Salakhutdinov and R. Grosse, 2017,
        https://arxiv.org/abs/1611.04273.

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
            raise TypeError(f"schedule must be one such as estimators.Sigmoid(), got {schedule!r}.")

    def _betas(self, path: TemperingPath) -> Tensor:
        betas = self.schedule.betas(self.num_temperatures, path).to(path.betas)
        if bool((betas[0] != 0).any() | (betas[-1] != 1).any() | (betas.diff(dim=0) < 0).any()):
            raise ValueError(f"the temperatures of {self.schedule} must rise from 0 to 1.")
        return betas.expand(-1, path.betas.shape[1])


class SequentialMonteCarlo(_Annealed):
    r"""Sequential Monte Carlo with adaptive tempering: annealing that drops chains of little weight for others.

    .. math:: \hat p(x) = \prod_{t=1}^T \frac{1}{N} \sum_{n=1}^N w_{tn}, \qquad
        w_{tn} = \left(\frac{p(x, z_{t-1,n})}{q(z_{t-1,n})}\right)^{\beta_t - \beta_{t-1}}

    Temperatures are found for each datum by a run before the one that counts, each as far as keeps a share of the
    effective sample size; being fixed then, they leave the estimate unbiased. Particles are resampled (systematically)
    where less than half of their effective sample size is left. The runs are independent: the error comes from their
    spread.

    Args:
        num_samples: runs per datum, at least 1; below 21 there is no k-hat.
        num_particles: particles a run N, at least 2.
        num_leapfrog: gradients a move, at least 1.
        start: what q is, :class:`Prior` unless given.
        kept: share of the effective sample size that a temperature is to keep, below 1.
        acceptance: share of moves that the step sizes are to have accepted, below 1.

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

    @property
    def _share_kept(self) -> float:
        return self.kept

    def _betas(self, path: TemperingPath) -> Tensor:
        return path.betas


def _move(
    target: Target, u: Tensor, at: Densities, beta: Tensor, step: Tensor, scale: Tensor, num_leapfrog: int
) -> _Moved:
    """Moves chains by Hamiltonian dynamics at temperatures ``(batch,)``, which leaves their density as it is."""
    # Steps of one length may go round in circles.
    size = step.unsqueeze(-1) * scale * torch.empty_like(u[..., :1]).uniform_(0.8, 1.2)
    temperature = beta.unsqueeze(-1)

    def push(at: Densities, momentum: Tensor, share: float) -> Tensor:
        return momentum + share * size * (at.start_gradient + temperature * at.rise_gradient)

    def energy(at: Densities, momentum: Tensor) -> Tensor:
        return 0.5 * momentum.square().sum(-1) - at.start - beta * at.rise

    momentum = torch.randn_like(u)
    moved, there = u, at
    pushed = push(at, momentum, 0.5)
    for i in range(num_leapfrog):
        moved = moved + size * pushed
        there = target(moved)
        pushed = push(there, pushed, 1.0 if i < num_leapfrog - 1 else 0.5)
    error = energy(there, pushed) - energy(at, momentum)
    error = torch.where(error.isnan(), math.inf, error)
    acceptance = (-error).exp().clamp(max=1.0)
    accepted = torch.rand_like(acceptance) < acceptance
    at = Densities(*(torch.where(_like(accepted, old), new, old) for new, old in zip(there, at, strict=True)))
    return _Moved(torch.where(_like(accepted, u), moved, u), at, acceptance, error > _DIVERGED)


def _like(chains: Tensor, t: Tensor) -> Tensor:
    return chains.unsqueeze(-1) if t.dim() > chains.dim() else chains


def _next_temperature(beta: Tensor, rise: Tensor, kept: float) -> tuple[Tensor, Tensor]:
    """Returns how far each datum's temperature may rise for weights to keep a share of their effective sample size.

    By bisection; and at least a thousandth, so that it ends. Also returns the log weights, ``(chains, batch)``.
    """
    rise = rise.double()

    def share(step: Tensor) -> Tensor:
        log_w = step * rise
        return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() / len(rise)

    low, high = torch.zeros_like(rise[0]), 1 - beta.double()
    whole = share(high) >= kept
    for _ in range(30):
        middle = 0.5 * (low + high)
        enough = share(middle) >= kept
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    step = torch.where(whole, 1 - beta.double(), torch.minimum(low.clamp(min=1e-3), 1 - beta.double()))
    after = torch.where(whole, torch.ones_like(beta), (beta + step).to(beta).clamp(max=1.0))
    return after, step * rise


def _resample(
    u: Tensor, at: Densities, log_w: Tensor, log_z: Tensor, always: bool = False
) -> tuple[Tensor, Densities, Tensor, Tensor]:
    """Resamples chains by their log weights, ``(runs, particles, batch)``, systematically, where few of them count.

    Returns the chains, and the log weights with what was divided out of them added to `log_z`.
    """
    runs, n, batch = log_w.shape
    total = log_w.logsumexp(1)
    ess = (2 * total - (2 * log_w).logsumexp(1)).exp()
    needed = total > -math.inf
    if not always:
        needed = needed & (ess < 0.5 * n)
    cumulated = (log_w - total.unsqueeze(1)).exp().cumsum(1).movedim(1, -1).contiguous()
    positions = torch.rand(runs, batch, 1, dtype=log_w.dtype, device=log_w.device) + torch.arange(
        n, device=log_w.device
    )
    chosen = torch.searchsorted(cumulated, positions / n).clamp(max=n - 1).movedim(-1, 1)
    own = torch.arange(n, device=log_w.device).view(1, n, 1)
    chosen = torch.where(needed.unsqueeze(1), chosen, own)

    def take(t: Tensor) -> Tensor:
        index = chosen if t.dim() == 2 else chosen.unsqueeze(-1).expand(-1, -1, -1, t.shape[-1])
        return t.unflatten(0, (runs, n)).gather(1, index).flatten(0, 1)

    log_z = torch.where(needed, log_z + total - math.log(n), log_z)
    return take(u), Densities(*map(take, at)), torch.where(needed.unsqueeze(1), 0.0, log_w), log_z


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Returns values at x by lines between those at known places, ascending; all ``(places, batch)``."""
    upper, share = _between(known, x)
    return torch.lerp(values.gather(0, upper - 1), values.gather(0, upper), share)


def _between(known: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which known place is the next above x, and how far x is on the way there from the one below it."""
    upper = torch.searchsorted(known.T.contiguous(), x.T.contiguous()).T.clamp(1, len(known) - 1)
    low, high = known.gather(0, upper - 1), known.gather(0, upper)
    return upper, ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


class Bracket(NamedTuple):
    r"""What encloses :math:`\log p(x)` of data drawn from the model, from both sides.

    Args:
        lower: the estimate by annealing from the start to the posterior, a stochastic lower bound.
        upper: by annealing back from an exact draw of the posterior, a stochastic upper bound. All chains of a datum
            start from the one draw, whose chance its standard error does not hold; the spread over data does.
        args: the model's arguments, with the data that were drawn.
        kwargs: its keyword arguments.
    """

    lower: Estimate
    upper: Estimate
    args: tuple
    kwargs: dict[str, Any]

    @property
    def gap(self) -> Tensor:
        """How far the two are apart, ``(batch,)`` in nats: on average, the most that either can be wrong."""
        return self.upper.value - self.lower.value

    def __str__(self) -> str:
        n = len(self.gap)
        error = self.gap.std().item() / math.sqrt(n) if n > 1 else math.nan
        low, high = self.lower.value.mean().item(), self.upper.value.mean().item()
        return (
            f"log p(x) of {n:,} data drawn from the model: {low:.3f} to {high:.3f} nats a datum, a gap of {high - low:.3f} "
            f"(standard error: {error:.3f})"
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
    r"""Encloses :math:`\log p(x)` on data drawn from the model, by annealing forwards and backwards.

    .. math:: \mathrm{E}[\log \hat p(x)] \le \log p(x) \le \mathrm{E}[-\log \widehat{1/p(x)}]

    Of data that the model drew, the latents are an exact draw of the posterior, and chains can be run back from there:
    the mean of one over their weights is unbiased for :math:`1/p(x)`. The gap says how far the method is from the truth
    at this number of chains and temperatures; on real data it can be trusted as far as the model is like them.

    Args:
        model: a Pyro model, which observes arguments of its own.
        guide: a Pyro guide, or None.
        *args: what the model is called with; data of its own take the place of those that it observes.
        method: the annealing, :class:`AnnealedImportanceSampling` unless given.
        max_memory: budget for intermediate results, in bytes.
        progress: whether to show a progress bar.
        **kwargs: what the model is called with.

    Raises:
        ValueError: as :func:`log_marginal`; when what the model observes is none of its arguments.

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
    with open_task(model, guide, method, args, kwargs, max_memory, progress=False):
        latents, drawn, named = simulate(model, *args, **kwargs)
    with open_task(model, guide, method, drawn, named, max_memory, progress) as task:
        task.start(1.5 * task.size, "datum")
        lower, upper, done = [], [], 0
        data, runs = method._fit(task)
        for part in task.split(data):
            target, path, betas = method._prepare(part)
            exact = target.pack_rows(latents, slice(done, done + part.size)).expand(method.num_samples, -1, -1)
            lower.append(method._run(target, path, betas, target.draw(method.num_samples), part, runs))
            upper.append(method._run(target, path, betas.flip(0), exact, part, runs))
            done += part.size
    reverse = join(method, upper)
    return Bracket(join(method, lower), replace(reverse, value=-reverse.value), drawn, named)
