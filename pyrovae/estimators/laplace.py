r"""Laplace's approximation of each posterior, as a proposal."""

import math
from dataclasses import replace

import pyro
import torch
from torch import Tensor

from pyrovae.estimators.base import check_count, check_positive
from pyrovae.estimators.memory import Allocations, clamp
from pyrovae.estimators.newton import (
    Ends,
    Mode,
    climb,
    far_starts,
    gradient_graph,
    heavy_columns,
    joint_of,
)
from pyrovae.estimators.normal_guides import Components, NormalGuide, draw_pilots
from pyrovae.estimators.proposals import Proposal, WeightedGuide
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task

MAX_DIM = 2000  # of the latents of a datum, above which another proposal is better: the time rises with the square
_MEAN_DRAWS = 64  # of the guide, whose mean is the first start
_LEAST_STARTS = 100  # from the prior, in all data of a part
_CLIMBS = 200  # at once: those of a start that has arrived for all data go on alone, and more are not faster
_MORE_STARTS = 12  # for all data of a part, if one of them has several modes
_SHARED_STARTS = 12  # modes of other data, from which climbs of all data start then
_FAR_ROUNDS = 3  # each with twice as many lines as the one before, under heavy tails
_SEEN = 20.0  # nats of mass below the largest, to which a mode is worth more starts: other data may have more of it
_FAINT = 5.0  # nats of mass below the largest, under which a mode is left out
_FAINT_VALUE = 8.0  # the same between modes of different values of discrete latents, which may be many
_FARTHEST, _WIDEST = 80.0, 30.0  # of real numbers that stand for latents with ends: exp(-88) is 0 in single precision


class Laplace(Proposal):
    r"""Normal or Student-t distributions at the modes of each posterior, with the curvature there.

    .. math:: q(u \mid x) = \sum_m \alpha_m\, \mathcal{N}\!\left(u;\, \mu_m, s^2 H_m^{-1}\right), \quad
        H_m = -\nabla^2 \log p(x, u_m)

    with all latents of a datum as one vector u of real numbers: a latent with another support is mapped to them, and
    its Jacobian counts. Damped Newton steps, and quasi-Newton steps between them, climb to a mode :math:`u_m` from the
    guide's mean and from draws of the prior. Second derivatives are exact, and enter by the absolute values of their
    eigenvalues. With more than 300 latents they are a diagonal, that of the prior, and a matrix of low rank, as long as
    what is left out is small.

    Mostly all starts of a datum end at one mode. Where one of some data has several, with a mass that is not negligible
    beside the largest, more starts are made for all of these data, from draws of the prior and from the modes of each
    other, and each mode that is found gets a component.

    Under a prior with tails like a power, such as Cauchy's, a mode may be anywhere. Newton steps then start, too, from
    the highest points of lines along these latents, to a million times the spread of the prior. Modes where more than
    three latents are far from the others' may be missed.

    Pilot draws, which are not used again, then choose the centres :math:`\mu_m`, since the mean of a skewed posterior
    is a better one than the mode; the shares :math:`\alpha_m`; and the scale s: the widest of six whose weights have a
    second moment close to the smallest.

    Dimensions of a plate within a datum are independent given the sites before. The guide serves as a start only.
    Discrete latents beside the continuous ones are summed over: by all combinations of their values if there are at
    most 64, with modes of their own for each, or else one latent after the other, where that is possible. Latents that
    are masked are taken without the mask, in the model and in the proposal: their density integrates to one.

    Args:
        num_starts: points that Newton steps start from, at least 1: the guide's mean, and draws of the prior. With 1, a
            second mode is never seen. Few data, fewer than 100, have more starts each.
        num_steps: largest number of Newton steps, at least 1.
        num_pilots: pilot draws per datum, at least 1.
        scale: s, with the modes as centres; None to choose both by the pilot draws.
        degrees: degrees of freedom of Student-t distributions instead of the normal ones, which are infinity.

    References:
        Accurate Approximations for Posterior Moments and Marginal Densities, L. Tierney and J. B. Kadane, 1986,
        https://doi.org/10.1080/01621459.1986.10478240; Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization, Y. N. Dauphin et al., 2014, https://arxiv.org/abs/1406.2572 (absolute
        eigenvalues); Adaptive Importance Sampling in General Mixture Classes, O. Cappe, R. Douc, A. Guillin, J.-M.
        Marin and C. P. Robert, 2008, https://arxiv.org/abs/0710.4242 (centres and shares by weighted draws);
        Numerical Optimization, section 6.1, J. Nocedal and S. J. Wright, 2006 (BFGS); Finding Structure with
        Randomness, N. Halko, P. G. Martinsson and J. A. Tropp, 2011, https://arxiv.org/abs/0909.4061 (low rank).

    >>> Laplace(num_starts=4)
    Laplace(num_starts=4)
    """

    sums_discrete = True
    finds_modes = True

    def __init__(
        self,
        num_starts: int = 2,
        num_steps: int = 20,
        num_pilots: int = 1000,
        scale: float | None = None,
        degrees: float = math.inf,
    ):
        check_count("num_starts", num_starts)
        check_count("num_steps", num_steps)
        check_count("num_pilots", num_pilots)
        if scale is not None:
            check_positive("scale", scale)
        if not degrees > 0:
            raise ValueError(f"degrees must be positive, got {degrees}.")
        self.num_starts, self.num_steps, self.num_pilots = num_starts, num_steps, num_pilots
        self.scale, self.degrees = scale, degrees

    def guides(self, task: Task) -> list[WeightedGuide]:
        return self.fit(task).guides(task)

    def fit(self, task: Task) -> "Proposal":
        task = replace(task, graphs=None)
        per_datum = self._bytes_per_datum(task)
        num_data = clamp(task.max_memory / (self.num_starts * per_datum), task.size)
        fits = [self._fit_part(part, per_datum) for part in task.split(num_data)]
        return Fitted(Components.cat(fits), self.degrees, task.offset)

    def _bytes_per_datum(self, task: Task) -> float:
        """Returns the memory of the graph of second derivatives of a datum."""
        used, sizes = [], [min(n, task.size) for n in (2, 4)] if task.divisible else [task.size]
        for size in sizes:
            target = joint_of(task.rows(slice(0, size)))
            with pyro.validation_enabled(False):
                u = target.draw(1)
            with Allocations() as allocations:
                gradient_graph(target, u)
            used.append(allocations.bytes())
        if sizes[0] == sizes[-1]:
            return max(used[-1] / sizes[-1], 1)
        return max((used[1] - used[0]) / (sizes[1] - sizes[0]), 1)  # without what does not grow with the data

    def _fit_part(self, task: Task, per_datum: float) -> Components:
        at_once = max(1, int(task.max_memory / (per_datum * task.size)))
        # By values of discrete latents, so that a narrow mode of one does not hide a wide one of another.
        found = _merged([self._modes(part, at_once) for part in task.by_values()])
        target = joint_of(task)
        found = _within_reach(found, target)
        if self.scale is not None:
            return found._replace(scale_tril=self.scale * found.scale_tril)
        pilots = draw_pilots(target, found, self.num_pilots, at_once)
        return found.moved(pilots.u, pilots.log_w).scaled(pilots, self.degrees)

    def _modes(self, task: Task, at_once: int) -> Components:
        """Returns a component for each mode, whose shares are the masses there: they do not sum to one."""
        target = joint_of(task)
        with torch.no_grad():
            u = target.pack(task.draw(_MEAN_DRAWS)[0]).mean(0, keepdim=True)
        best = climb(task, u, self.num_steps)
        mode, ends = Mode(best.u[0], best.curvature.of(0)), [best]
        num_starts, most = 0, 0
        if self.num_starts > 1:
            num_starts = max(self.num_starts - 1, math.ceil(_LEAST_STARTS / task.size))
            most = num_starts + _MORE_STARTS
            ends += self._far_modes(task, mode, at_once)
        num_modes, num_tried = task.size, 0
        few = min(at_once, math.ceil(_CLIMBS / task.size))
        while num_tried < most:
            with pyro.validation_enabled(False):  # a scale may round to zero, far out
                starts = target.draw(num_starts)
            num_tried += num_starts
            if len(ends) > 1:  # what is a mode of one datum is near one of another
                starts = torch.cat([starts, _modes_of_others(ends[1:], task.size)])
            ends += [climb(task, start, self.num_steps, known=mode) for start in starts.split(few)]
            known, num_modes = num_modes, int((_separate(Ends.cat(ends), _SEEN).log_share > -math.inf).sum())
            if num_modes == known:
                break
            num_starts = min(2 * num_starts, most - num_tried)
        if num_modes > task.size:
            return _separate(Ends.cat(ends), _FAINT)
        found = Components.single(mode.u, torch.linalg.cholesky(mode.curvature.inverse()).to(u.dtype))
        log_mass = _finite(best.log_joint[0].double() - 0.5 * mode.curvature.log_det())
        return found._replace(log_share=log_mass.unsqueeze(-1).to(u.dtype))

    def _far_modes(self, task: Task, mode: Mode, at_once: int) -> list[Ends]:
        """Returns modes that draws of a prior with heavy tails seldom come near.

        Latents may each be near or far: lines go on from the modes that lines have found.
        """
        columns, found, bases = heavy_columns(task), [], [mode.u]
        target = joint_of(task)
        for _ in range(min(len(columns), _FAR_ROUNDS)):
            starts = torch.cat([far_starts(target, base, columns, at_once) for base in bases])
            ends = [climb(task, start, self.num_steps, known=mode) for start in starts.split(at_once)]
            found += ends
            bases = [base for end in ends for base in end.u]
        return found


class Fitted(Proposal):
    """Components for the data of a task, and of its parts.

    Args:
        components: those of each datum.
        degrees: degrees of freedom, infinite for normal distributions.
        offset: the index of the first datum in the whole data set, or those of all, ``(size,)``.
    """

    needs_guide = False
    sums_discrete = True

    def __init__(self, components: Components, degrees: float, offset: int | Tensor):
        self.components, self.degrees, self.offset = components, degrees, offset

    def guides(self, task: Task) -> list[WeightedGuide]:
        if not isinstance(self.offset, Tensor) and not isinstance(task.offset, Tensor):
            start = task.offset - self.offset
            rows: slice | Tensor = slice(start, start + task.size)
        else:
            known = _indices(self.offset, len(self.components.mean))
            order = known.argsort()
            rows = order[torch.searchsorted(known[order], _indices(task.offset, task.size))]
        return [WeightedGuide(NormalGuide(joint_of(task), self.components.rows(rows), self.degrees))]


class Shared(Proposal):
    """A proposal whose fit to a datum serves for all later runs on that datum.

    Args:
        proposal: the proposal, which :class:`Fitted` ones come from.
    """

    def __init__(self, proposal: Proposal):
        self.proposal, self.needs_guide = proposal, proposal.needs_guide
        self.sums_discrete = proposal.sums_discrete
        self.parts: list[Fitted] = []

    def guides(self, task: Task) -> list[WeightedGuide]:
        return self.fit(task).guides(task)

    def fit(self, task: Task) -> Proposal:
        rows = _indices(task.offset, task.size)
        known = [_indices(part.offset, len(part.components.mean)) for part in self.parts]
        if known and bool(torch.isin(rows, torch.cat(known)).all()):
            at = torch.cat(known)
            order = at.argsort()
            chosen = order[torch.searchsorted(at[order], rows)]
            components = Components.cat([part.components for part in self.parts]).rows(chosen)
            return Fitted(components, self.parts[0].degrees, task.offset)
        fitted = self.proposal.fit(task)
        if isinstance(fitted, Fitted):
            self.parts.append(fitted)
        return fitted

    def keep(self, offset: int | Tensor) -> None:
        """Forgets the fits to all data but those at some positions in the whole data set."""
        parts = []
        for part in self.parts:
            known = _indices(part.offset, len(part.components.mean))
            kept = torch.isin(known, torch.as_tensor(offset))
            if kept.any():
                parts.append(Fitted(part.components.rows(kept), part.degrees, known[kept]))
        self.parts = parts


def _modes_of_others(ends: list[Ends], size: int) -> Tensor:
    """Returns some of the points where climbs of any datum ended, away from its first mode, as starts for all data."""
    found = torch.cat([end.u[end.log_joint > -math.inf] for end in ends])
    chosen = torch.randperm(len(found))[:_SHARED_STARTS].to(found.device)
    return found[chosen].unsqueeze(1).expand(-1, size, -1)


def _indices(offset: int | Tensor, size: int) -> Tensor:
    return offset if isinstance(offset, Tensor) else offset + torch.arange(size)


def _separate(ends: Ends, faint: float) -> Components:
    """Returns a component for each of the separate modes of a datum whose mass is at most so many nats below."""
    u, log_joint, curvature = ends
    log_mass = _finite(log_joint.double() - 0.5 * curvature.log_det())
    log_mass = torch.where(log_mass > log_mass.amax(0) - faint, log_mass, -math.inf)
    columns = torch.arange(u.shape[1], device=u.device)
    is_kept = torch.zeros_like(log_mass, dtype=torch.bool)
    for index in log_mass.argsort(0, descending=True):
        at = (index, columns)
        is_double = (Mode(u[at], curvature.of(at)).is_near(u) & is_kept).any(0)
        is_kept[at] = ~is_double & (log_mass[at] > -math.inf)
    is_kept[0] |= ~is_kept.any(0)  # nothing finite was found: the weights will tell
    log_share = torch.where(is_kept, log_mass.nan_to_num(neginf=-1e30), -math.inf)
    chosen = log_share.argsort(0, descending=True)[: int(is_kept.sum(0).max())]
    scale_tril = torch.linalg.cholesky(curvature.of((chosen, columns)).inverse())
    columns_last = (log_share.gather(0, chosen), u[chosen, columns], scale_tril)
    return Components(*(t.movedim(0, 1).to(u.dtype) for t in columns_last))


def _finite(log_mass: Tensor) -> Tensor:
    """Returns log-masses, without those along ridges on which climbs ran away."""
    return torch.where(log_mass < math.inf, log_mass, -math.inf)


def _within_reach(found: Components, target: Target) -> Components:
    """Returns components of finite numbers, with means and scales for which latents are not rounded to their ends.

    Latents with ends, or positive ones, are mapped from real numbers of some tens. A climb along a ridge, such as that
    of a scale and of what it scales towards zero, goes on beyond, and the curvature there is that of a plane.
    """
    log_share, mean, scale_tril = found
    moved = torch.zeros(mean.shape[-1], dtype=torch.bool, device=mean.device)
    for site in target.sites:
        moved[site.columns] = site.transform is not None
    mean = torch.where(moved, mean.clamp(-_FARTHEST, _FARTHEST), mean)
    width = torch.linalg.vector_norm(scale_tril, dim=-1)
    scale_tril = scale_tril * torch.where(moved & (width > _WIDEST), _WIDEST / width, 1.0).unsqueeze(-1)
    is_finite = mean.isfinite().all(-1) & scale_tril.isfinite().flatten(-2).all(-1)
    mean = torch.where(is_finite.unsqueeze(-1), mean, 0.0)
    scale_tril = torch.where(is_finite[..., None, None], scale_tril, torch.eye(mean.shape[-1]).to(mean))
    log_share = torch.where(is_finite, log_share, -math.inf)
    nothing = ~(log_share > -math.inf).any(-1, keepdim=True)  # the weights will tell
    return Components(torch.where(nothing, 0.0, log_share).log_softmax(-1), mean, scale_tril)


def _merged(parts: list[Components]) -> Components:
    """Returns those of all parts that have enough mass for a datum, with shares that sum to one."""
    log_mass, mean, scale_tril = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    if len(parts) > 1:
        log_mass = torch.where(log_mass > log_mass.amax(1, keepdim=True) - _FAINT_VALUE, log_mass, -math.inf)
        chosen = log_mass.argsort(1, descending=True)[:, : int((log_mass > -math.inf).sum(1).max().clamp(min=1))]
        rows = torch.arange(len(mean), device=mean.device).unsqueeze(-1)
        log_mass, mean, scale_tril = log_mass[rows, chosen], mean[rows, chosen], scale_tril[rows, chosen]
    nothing = ~(log_mass > -math.inf).any(1, keepdim=True)  # the weights will tell
    return Components(torch.where(nothing, 0.0, log_mass).log_softmax(1), mean, scale_tril)
