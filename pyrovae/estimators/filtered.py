r"""The particle filter: log p(x) of sequences, by importance sampling that resamples between the steps of time."""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.base import Estimate, Estimator, check_count, join
from pyrovae.estimators.memory import PeakMemory, clamp, split_evenly
from pyrovae.estimators.proposals import Guide, Proposal
from pyrovae.estimators.task import Task, open_task
from pyrovae.estimators.weighted import WeightSums, fit_tail
from pyrovae.inference.filtering import Filtered, Resampling, check_followed, effective_size, run_filter, systematic
from pyrovae.inference.messages import warn
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import check_weights, structure_of_run

_LEAST = 4  # effective filters, of a datum that is trusted


class ParticleFilter(Estimator):
    r"""A particle filter, for models and guides that draw their latents step by step.

    .. math:: \hat p(x) = \frac{1}{R} \sum_{r=1}^R \prod_{t=1}^T \frac{1}{K} \sum_{k=1}^K w_{rt}^k, \qquad
        w_{rt}^k = \frac{p(x_t, z_t^k \mid z_{<t}^{a_k}, x_{<t})}{q(z_t^k \mid z_{<t}^{a_k}, x)}

    is unbiased, and its variance grows linearly with the number of steps, where that of importance sampling grows
    exponentially. Which models it takes, and when it resamples, is as in :class:`pyrovae.bounds.FIVO`. The standard
    error is that of R independent filters, and at least that of the mean of their logarithms. The diagnostics of each
    datum: "least ess", the smallest effective sample size of the particles over all steps; "khat of steps", the largest
    k-hat of the weights of a step, of all filters together.

    A datum is trusted where the effective sample size of the filters is a fifth of them and at least 4, and where no
    step has a k-hat above :math:`\min(0.7,\, 1 - 1 / \log_{10} K)`, which is 0.5 for 100 particles and 0.67 for 1,000:
    with heavier tails a filter misses the largest weights, its estimate is too low, and so is its error.

    Args:
        num_samples: independent filters :math:`R` for each datum, at least 2 for a standard error.
        num_particles: particles of each filter :math:`K`, at least 2.
        proposal: the distribution of the draws; the guide by default. ``Prior()`` is the bootstrap filter.
        threshold: share of the particles to which the effective sample size may fall.
        resampling: draws the ancestors, such as :func:`pyrovae.bounds.systematic`.

    References:
        Novel Approach to Nonlinear/Non-Gaussian Bayesian State Estimation, N. J. Gordon, D. J. Salmond and
        A. F. M. Smith, 1993, https://doi.org/10.1049/ip-f-2.1993.0015; An Introduction to Sequential Monte Carlo,
        N. Chopin and O. Papaspiliopoulos, 2020, https://doi.org/10.1007/978-3-030-47845-2; Pareto Smoothed Importance
        Sampling, A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, 2024, https://arxiv.org/abs/1507.02646 (the
        largest k-hat for a number of draws).

    >>> ParticleFilter(num_particles=500).num_samples
    32
    """

    unit = "filters"

    def __init__(
        self,
        num_samples: int = 32,
        num_particles: int = 100,
        proposal: Proposal | None = None,
        threshold: float = 0.5,
        resampling: Resampling = systematic,
    ):
        super().__init__(num_samples)
        check_count("num_particles", num_particles, least=2)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}.")
        self.num_particles = int(num_particles)
        self.threshold, self.resampling = threshold, resampling
        self.proposal = Guide() if proposal is None else proposal
        if not isinstance(self.proposal, Proposal):
            raise TypeError(f"proposal must be a proposal such as estimators.Prior(), got {proposal!r}.")
        self.needs_guide = self.proposal.needs_guide

    def estimate(self, task: Task) -> Estimate:
        task.check_not_summed("ParticleFilter")
        few = task.rows(slice(0, 2))
        if not self._check_followed(few).resampled and len(task.structure.latents) > 1:
            warn(
                "nothing is observed between two latents of this model, so that ParticleFilter resamples nothing and "
                "is importance sampling. Observe each step of time in the loop that draws its latents."
            )
        with PeakMemory() as peak:
            self._run(few, 1)
        most = clamp(task.max_memory * few.size / max(peak.bytes, 1), task.size * self.num_samples)
        task.start(task.size, "datum")
        parts = [
            self._score(part, clamp(most / part.size, self.num_samples))
            for part in task.split(clamp(most / self.num_samples, task.size))
        ]
        return join(self, parts)

    def fit(self, task: Task) -> Estimator:
        fitted = copy(self)
        fitted.proposal = self.proposal.fit(task)
        return fitted

    @property
    def _largest_khat(self) -> float:
        return min(0.7, 1 - 1 / math.log10(self.num_particles))

    def trusts(self, estimate: Estimate) -> Tensor:
        fails = estimate.diagnostics["khat of steps"] > self._largest_khat
        return (estimate.ess >= max(0.2 * self.num_samples, _LEAST)) & ~fails

    def describe(self, estimate: Estimate) -> str:
        untrusted, n = int((~estimate.trusted).sum()), len(estimate.value)
        least = estimate.diagnostics["least ess"].min().item()
        if self.num_samples <= _LEAST:
            return (
                f"{self.num_samples} filters are too few to tell how far to trust them, not to be trusted: "
                f"{untrusted:,} of {n:,} data"
            )
        return (
            f"filters differ too much, or a step has k-hat above {self._largest_khat:.2g}, not to be trusted: "
            f"{untrusted:,} of {n:,} data; "
            f"smallest effective sample size of the {self.num_particles:,} particles: {least:.1f}"
        )

    def remedy(self, structure: SiteStructure) -> str:
        if self.num_samples < 20:  # of which few can tell how much they differ
            return "Take more filters: method=ParticleFilter(num_samples=32)."
        return f"Take more particles: method=ParticleFilter(num_particles={10 * self.num_particles})."

    def run_checked(self, task: Task) -> Filtered:
        """Returns a run of all filters on all data at once, after checking that the particles can be followed."""
        if not self._check_followed(task).resampled:
            raise ValueError(
                "nothing is observed between two latents of this model, so that it has no steps. Observe each step of "
                "time in the loop that draws its latents."
            )
        return self._run(task, self.num_samples)

    def _check_followed(self, task: Task) -> Filtered:
        guide = self._guide(task)
        return check_followed(task.model, guide, task.structure, self.num_particles, task.args, task.kwargs)

    def _guide(self, task: Task) -> Callable:
        return self.proposal.single(task, "ParticleFilter draws").guide

    def _run(self, task: Task, num_runs: int) -> Filtered:
        guide = self._guide(task)
        run = run_filter(
            task.model,
            guide,
            task.structure,
            self.num_particles,
            self.threshold,
            self.resampling,
            task.args,
            task.kwargs,
            num_runs,
            keep=False,
        )
        if task.structure.data is not None:
            task.structure.data.check_in_order(run.log_z.shape[-1], task.size)
        check_weights(structure_of_run(task.structure, run.sites, task.model, guide, task.args, task.kwargs))
        return run

    def _score(self, task: Task, num_runs: int) -> Estimate:
        """Scores some data, by so many filters at once."""
        sums, log_z, least, khat = WeightSums(self.num_samples), [], [], []
        for count in split_evenly(self.num_samples, num_runs):
            run = self._run(task, count)
            sums.add(run.log_z)
            log_z.append(run.log_z)
            steps = [*(step.log_w for step in run.resampled), run.log_w]
            least.append(torch.stack([effective_size(log_w).amin(0) for log_w in steps]).amin(0))
            khat.append(torch.stack([_tail(log_w) for log_w in steps]).amax(0))
            task.advance(task.size * count / self.num_samples)
        diagnostics = {"least ess": torch.stack(least).amin(0), "khat of steps": torch.stack(khat).amax(0)}
        estimate = sums.estimate(self)
        # Of filters that differ by many nats one makes up the mean, whose error seems to be one nat at most.
        spread = torch.cat(log_z).std(0) / math.sqrt(self.num_samples)
        error = torch.maximum(estimate.standard_error, spread.to(estimate.standard_error.dtype))
        diagnostics = {name: t.to(estimate.value.dtype) for name, t in diagnostics.items()}
        return replace(estimate, standard_error=error, diagnostics=diagnostics)


class Predictive(NamedTuple):
    r"""Log-densities of each step of sequences given the steps before.

    Args:
        value: :math:`\log \hat p(x_t \mid x_1, \dots, x_{t-1})` in nats, ``(batch, steps)``. Their sum is
            :math:`\log \hat p(x)`.
        standard_error: of `value`, from the spread of the filters.
        least_ess: the smallest effective sample size of the particles at each step, over the filters.
    """

    value: Tensor
    standard_error: Tensor
    least_ess: Tensor


@torch.no_grad()
def log_predictive(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    method: ParticleFilter | None = None,
    **kwargs: Any,
) -> Predictive:
    r"""Estimates the log-density of each step of sequences given the steps before: one-step-ahead forecasts, scored.

    .. math:: \log p(x_t \mid x_1, \dots, x_{t-1}), \qquad t = 1, \dots, T

    for a model that draws its latents step by step, each step with an observation, by filters that resample after every
    step. A guide may look at all data: it is the proposal, and no part of the forecast.

    Args:
        model: a Pyro model.
        guide: a Pyro guide; None with the proposal ``Prior()``.
        *args: what both are called with.
        method: the number of filters and particles, and the proposal; ``ParticleFilter()`` by default. Its threshold is
            not used.
        **kwargs: what both are called with.

    Returns:
        A :class:`Predictive`.

    Raises:
        ValueError: when the model has no steps; when particles cannot be followed; as :func:`log_marginal`.

    >>> import pyro
    >>> from pyro import distributions as dist
    >>> from pyrovae.estimators import Prior
    >>> def model(x):
    ...     z = torch.zeros(len(x))
    ...     with pyro.plate("data", len(x)):
    ...         for t in range(x.shape[1]):
    ...             z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 1.0))
    ...             pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])
    >>> log_predictive(model, None, torch.zeros(3, 20), method=ParticleFilter(8, 50, Prior())).value.shape
    torch.Size([3, 20])
    """
    method = ParticleFilter() if method is None else method
    if not isinstance(method, ParticleFilter):
        raise TypeError(f"method must be a ParticleFilter, got {method!r}.")
    every_step = copy(method)
    every_step.threshold = 1.0
    with open_task(model, guide, every_step, args, kwargs, 64e6, progress=False) as task:
        task.check_not_summed("log_predictive")
        run = every_step.run_checked(task)
    # A filter whose particles have all died has no density from then on.
    died = [step.log_w.logsumexp(1) == -math.inf for step in run.resampled]
    so_far = [torch.where(dead, -math.inf, step.log_z) for dead, step in zip(died, run.resampled, strict=True)]
    log_z = torch.stack([*so_far, run.log_z], dim=-1).double()
    total = log_z.logsumexp(0)
    value = total.diff(dim=-1, prepend=torch.full_like(total[..., :1], math.log(len(log_z))))
    # The delta method, for the ratio of the means of two steps.
    ratios = (log_z - total).exp() * len(log_z)
    change = ratios.diff(dim=-1, prepend=torch.ones_like(ratios[..., :1]))
    error = change.std(0) / math.sqrt(len(log_z)) if len(log_z) > 1 else torch.full_like(value, math.nan)
    ess = torch.stack([effective_size(log_w).amin(0) for log_w in [*(s.log_w for s in run.resampled), run.log_w]], -1)
    dtype = run.log_z.dtype
    return Predictive(value.to(dtype), error.to(dtype), ess.to(dtype))


def _tail(log_w: Tensor) -> Tensor:
    """Returns k-hat of the weights of a step, ``(runs, particles, batch)``, relative to their mean in each run."""
    total = log_w.logsumexp(1, keepdim=True)
    relative = torch.where(total > -math.inf, log_w - total, -math.inf).flatten(0, 1).double()
    n = len(relative)
    size = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))
    largest = relative.topk(min(size + 1, n), dim=0).values
    khat = fit_tail(largest, resolution=math.sqrt(torch.finfo(log_w.dtype).eps))[0]
    return torch.where(khat.isnan(), -math.inf, khat)  # of too few particles, which show no tail
