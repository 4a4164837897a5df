r"""Values of log p(x) without chance: by quadrature where the latent is small, by enumeration where it is discrete."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.distributions import Flattened
from pyrovae.estimators.base import Allocations, Estimate, Estimator, Task, clamp, join, prior_of
from pyrovae.estimators.proposals import WeightedGuide
from pyrovae.estimators.targets import Target
from pyrovae.inference.sites import is_masked, sample_sites, unwrapped
from pyrovae.inference.structure import SiteStructure

_DEPTH = 25.0  # nats below the top of an integrand, beyond which it is left out: e^-25 is 1e-11
_ROUNDS = 12  # grids fitted to each datum, at most
_PRIOR_DRAWS = 1000


class _Deterministic(Estimator):
    """What estimators without chance have in common."""

    needs_guide = False

    def _check_unmasked(self, trace: poutine.Trace) -> None:
        for name, site in sample_sites(trace).items():
            if not site["is_observed"] and is_masked(site):
                raise ValueError(
                    f'the latents at site "{name}" are masked for some data, so that they have no density to go over. Take '
                    "ImportanceSampling()."
                )

    def _estimate(self, value: Tensor, error: Tensor, num_samples: int) -> Estimate:
        nothing = torch.full_like(value, math.nan)
        return Estimate(value, error, nothing, nothing, num_samples, self)


class Quadrature(_Deterministic):
    r"""The trapezoidal rule on a grid fitted to each datum's posterior: the truth, for up to three latent dimensions.

    .. math:: p(x) = \int p(x, u)\, du \approx \prod_d h_d \sum_j p(x, u_j)

    The grid starts as wide as the prior's draws and closes in on all that is within 25 nats of the highest point. The
    rule's error falls exponentially with the number of points for smooth integrands that vanish at both ends, and with
    its square where a decoder has kinks (ReLU). The error that is stated is what half as many points a dimension would
    change: for smooth integrands far more than the true one. Bounded latents are integrated in the space of real
    numbers mapped to theirs. The guide is not looked at.

    Args:
        num_samples: points of the grid, at least 5 a dimension.

    Raises:
        ValueError: when there are more than three latent dimensions a datum, too few points for them, or latents that
            are discrete.

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

    def estimate(self, task: Task) -> Estimate:
        few = replace(task.rows(slice(0, 1)), graphs=None)
        target = Target(few, WeightedGuide(prior_of(task.model), is_prior=True))
        dim = target.dim
        if dim > 3:
            raise ValueError(
                f"Quadrature is for up to 3 latent dimensions, got {dim}. Take AnnealedImportanceSampling()."
            )
        side = int(self.num_samples ** (1 / dim) + 1e-9)
        side -= 1 - side % 2  # odd, so that half of the points reach both ends too
        if side < 5:
            raise ValueError(
                f"num_samples must be at least {5**dim}, 5 points for each of {dim} latent dimensions; got {self.num_samples}."
            )
        with Allocations() as counted:
            target.log_joint(target.draw(64))
        per_point = max(counted.bytes() / 64, 1)
        data = clamp(task.max_memory / (side**dim * dim * 16), task.size)
        slices = clamp(task.max_memory / (data * per_point), side**dim)
        task.start(task.size, "datum")
        return join(self, [self._score(part, side, slices) for part in task.split(data)])

    def _score(self, task: Task, side: int, slices: int) -> Estimate:
        target = Target(task, WeightedGuide(prior_of(task.model), is_prior=True))
        self._check_unmasked(target.template)
        draws = target.draw(_PRIOR_DRAWS)
        low, high = draws.amin(0), draws.amax(0)
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)  # (batch, dim)
        shape = (side,) * target.dim
        line = torch.linspace(0, 1, side, dtype=low.dtype, device=low.device)
        unit = torch.cartesian_prod(*[line] * target.dim).view(-1, 1, target.dim)
        value, error = torch.full_like(low[:, 0], -math.inf, dtype=torch.float64), math.inf
        for _ in range(_ROUNDS):
            log_f = torch.cat([target.log_joint(low + part * (high - low)) for part in unit.split(slices)])
            log_f = log_f.double().unflatten(0, shape)
            found = _log_integral(log_f, low, high, 1)
            changed = (found - _log_integral(log_f, low, high, 2)).abs().nan_to_num(nan=math.inf)
            changed = changed + _share_outside(log_f, low.shape[-1])
            # Of all grids the one whose points matter least: a heavy tail can lead the last ones astray.
            value, error = torch.where(changed <= error, found, value), torch.minimum(changed, torch.as_tensor(error))
            low, high, moved = _closer(log_f, low, high, side)
            if not moved:
                break
        task.advance(task.size)
        return self._estimate(value.to(low.dtype), error.to(low.dtype), self.num_samples)

    def trusts(self, estimate: Estimate) -> Tensor:
        return estimate.standard_error < 0.1

    def describe(self, estimate: Estimate) -> str:
        rough = int((~estimate.trusted).sum())
        return f"half of the points change more than 0.1 nats, not to be trusted: {rough:,} of {len(estimate.value):,} data"

    def remedy(self, structure: SiteStructure) -> str:
        return "Take more points (num_samples), or AnnealedImportanceSampling()."


def _closer(log_f: Tensor, low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor, bool]:
    """Returns the box of all points that count, a cell wider, where it is another by much; and whether any is."""
    dim = low.shape[-1]
    # Between points there may be a peak of which they see little: as long as the grid is coarse, that may be any of several.
    counts = log_f + _hidden(log_f, dim) > log_f.flatten(0, dim - 1).amax(0) - _DEPTH
    lows, highs = [], []
    for d in range(dim):
        hit = counts.movedim(d, 0).flatten(1, -2).any(1) if dim > 1 else counts  # (side, batch)
        first = hit.to(torch.uint8).argmax(0)
        last = side - 1 - hit.flip(0).to(torch.uint8).argmax(0)
        cell = (high[:, d] - low[:, d]) / (side - 1)
        # What reaches the border goes on beyond it.
        beyond = 0.25 * (high[:, d] - low[:, d])
        lows.append(low[:, d] + torch.where(first == 0, -beyond, (first - 1) * cell))
        highs.append(low[:, d] + torch.where(last == side - 1, (side - 1) * cell + beyond, (last + 1) * cell))
    new_low, new_high = torch.stack(lows, dim=-1), torch.stack(highs, dim=-1)
    grown = (new_low < low) | (new_high > high)
    shrunk = (new_high - new_low) < 0.8 * (high - low)
    moved = (grown | shrunk).any(-1, keepdim=True)
    return torch.where(moved, new_low, low), torch.where(moved, new_high, high), bool(moved.any())


def _hidden(log_f: Tensor, dim: int) -> Tensor:
    """Returns by how much a parabola with the differences at each point may rise above it within half a cell."""
    bend = torch.zeros_like(log_f)
    for d in range(dim):
        along = log_f.movedim(d, 0)
        second = along.diff(n=2, dim=0).abs().nan_to_num(0.0, posinf=0.0)
        bend += torch.cat([second[:1], second, second[-1:]]).movedim(0, d)
    # At most dim times the trace of its curvature, in whatever direction a ridge runs.
    return 0.125 * dim * bend


def _share_outside(log_f: Tensor, dim: int) -> Tensor:
    """Returns the outermost points' share of all, as a guess of what lies beyond them; as nats, infinite if it is all."""
    edge = max(1, len(log_f) // 20)
    inside = log_f[(slice(edge, -edge),) * dim].flatten(0, dim - 1).logsumexp(0)
    return (log_f.flatten(0, dim - 1).logsumexp(0) - inside).nan_to_num(nan=math.inf)


def _log_integral(log_f: Tensor, low: Tensor, high: Tensor, stride: int) -> Tensor:
    dim, side = low.shape[-1], len(log_f)
    some = log_f[(slice(None, None, stride),) * dim]
    cells = (side - 1) / stride
    volume = ((high - low).double() / cells).log().sum(-1)
    return some.flatten(0, dim - 1).logsumexp(0) + volume


class _Support(NamedTuple):
    """The values that the latents of a site can take, and how many of them there are a datum.

    Args:
        values: shape ``(num_values, *event)`` of one latent.
        cells: latents a datum.
        shape: of all of them, ``(*plates, 1, *event)`` with the data at one.
    """

    values: Tensor
    cells: int
    shape: tuple[int, ...]


class Enumeration(_Deterministic):
    r"""The sum over all values of the latents: exact, where all are discrete and there are not too many.

    .. math:: p(x) = \sum_z p(x, z)

    The guide is not looked at.

    Args:
        num_samples: the most combinations of values a datum that are to be summed over.

    Raises:
        ValueError: when a latent is not discrete, has infinitely many values, or there are more combinations than that.

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
        continuous = task.structure.latents - task.structure.discrete
        if continuous:
            raise ValueError(
                f"Enumeration is for discrete latents, and {sorted(continuous)} are not. Take AnnealedImportanceSampling() if "
                "all are continuous, or ImportanceSampling()."
            )
        few = replace(task.rows(slice(0, 2)), graphs=None)
        trace, _ = few.draw(1, prior_of(task.model))
        supports = {
            name: _support(name, site, few) for name, site in sample_sites(trace).items() if not site["is_observed"]
        }
        # Python's integers, for this may be a very large number.
        total = math.prod(len(support.values) ** support.cells for support in supports.values())
        if total > self.num_samples:
            raise ValueError(
                f"the latents of a datum have {total:,} combinations of values, more than num_samples={self.num_samples:,}. Raise "
                "it, or take ImportanceSampling()."
            )
        with Allocations() as counted:
            few.score(_assigned(trace, supports, torch.zeros(1, dtype=torch.long), few), 1)
        slices = clamp(task.max_memory / counted.bytes(), total)
        data = clamp(task.max_memory / (counted.bytes() * slices), task.size)
        parts = []
        task.start(task.size * total, "combination")
        for part in task.split(data):
            template, _ = part.draw(1, prior_of(part.model))
            self._check_unmasked(template)
            log_sum = None
            for numbers in torch.arange(total).split(slices):
                prior, likelihood = part.score(_assigned(template, supports, numbers, part), len(numbers))
                log_p = prior + likelihood
                here = log_p.double().logsumexp(0)
                log_sum = here if log_sum is None else torch.logaddexp(log_sum, here)
                part.advance(len(numbers) * part.size)
            value = log_sum.to(log_p.dtype)
            parts.append(self._estimate(value, torch.zeros_like(value), total))
        return join(self, parts)

    def trusts(self, estimate: Estimate) -> Tensor:
        return torch.ones_like(estimate.value, dtype=torch.bool)

    def describe(self, estimate: Estimate) -> str:
        return "exact, but for rounding"


def _support(name: str, site: dict, task: Task) -> _Support:
    fn = site["fn"]
    base = fn
    while True:
        inner = base.base_dist if isinstance(base, Flattened) else unwrapped(base)
        if inner is base:
            break
        base = inner
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError:
        raise ValueError(
            f'the latents at site "{name}" ({type(base).__name__}) have no values that can be listed. Take ImportanceSampling().'
        ) from None
    event = base.event_shape
    values = values.reshape(len(values), *event)
    place = task.structure.data_index
    shape = tuple(1 if i == place else n for i, n in enumerate(fn.batch_shape) if i > 0) + tuple(fn.event_shape)
    return _Support(values, math.prod(shape) // math.prod(event), shape)


def _assigned(trace: poutine.Trace, supports: dict[str, _Support], numbers: Tensor, task: Task) -> poutine.Trace:
    """Returns a trace whose draws are the combinations of these numbers, counted with each latent as a digit."""
    assigned = trace.copy()
    for name, support in supports.items():
        digits = []
        for _ in range(support.cells):
            digits.append(numbers % len(support.values))
            numbers = numbers // len(support.values)
        values = support.values[torch.stack(digits, dim=1).to(support.values.device)]  # (draws, cells, *event)
        values = values.reshape(len(values), *support.shape)
        full = list(values.shape)
        full[task.structure.data_index] = task.size
        assigned.nodes[name] = {**trace.nodes[name], "value": values.expand(full)}
    return assigned
