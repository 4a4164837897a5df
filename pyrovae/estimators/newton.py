r"""Newton's method for the modes of :math:`\log p(x, u)`, for all data at once."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyrovae.estimators.proposals import WeightedGuide
from pyrovae.estimators.targets import Target, gradient_of
from pyrovae.estimators.task import Task, prior_of

_TOLERANCE = 1e-3  # nats: half the Newton decrement at which a mode counts as found
_FLOOR = 1e-6  # smallest curvature, relative to the largest of a datum
_NEAR = 3.0  # standard deviations from a mode
_TRIALS = 4  # step lengths a Newton step

# Modes far out, under a prior with heavy tails.
_FAR = (1e3, 1e4)  # spreads of the prior, between which its tails are compared
_HEAVY = 30.0  # nats that a heavy tail loses there at most: 4.6 for Cauchy's, 25 for Student's with 10 degrees
_RATIO, _NUM_DISTANCES = 1.5, 36  # distances from a spread to some million spreads
_BEST = 2  # points that are kept
_PRIOR_DRAWS = 64  # for its center and spread


class Curvature(NamedTuple):
    """Curvature with absolute eigenvalues, ``(..., dim)``, and its eigenvectors, ``(..., dim, dim)``."""

    values: Tensor
    vectors: Tensor

    def inverse(self) -> Tensor:
        return (self.vectors / self.values.unsqueeze(-2)) @ self.vectors.mT

    def solve(self, g: Tensor, damping: Tensor) -> Tensor:
        """Returns the Newton step for a gradient, with a multiple of the curvature's mean added to the curvature."""
        values = self.values + damping.unsqueeze(-1) * self.values.mean(-1, keepdim=True)
        rotated = (self.vectors.mT @ g.unsqueeze(-1)).squeeze(-1)
        return (self.vectors @ (rotated / values).unsqueeze(-1)).squeeze(-1)

    def of(self, index: Any) -> "Curvature":
        """Returns the curvature of some of the points."""
        return Curvature(self.values[index], self.vectors[index])


class Mode(NamedTuple):
    """A mode of each datum, ``(batch, dim)``, and the curvature there."""

    u: Tensor
    curvature: Curvature

    def is_near(self, u: Tensor) -> Tensor:
        """Returns whether points, ``(..., batch, dim)``, are near the mode: Newton's method would not end elsewhere."""
        offset = (u - self.u).to(self.curvature.vectors)
        rotated = (self.curvature.vectors.mT @ offset.unsqueeze(-1)).squeeze(-1)
        return (rotated.square() * self.curvature.values).sum(-1).sqrt() < _NEAR  # false for NaN

    def rows(self, rows: Tensor) -> "Mode":
        return Mode(self.u[rows], self.curvature.of(rows))


@torch.enable_grad()
def gradient_graph(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u as a leaf, and the gradient of the log joint density there with its graph."""
    u = u.detach().requires_grad_()
    gradient = torch.autograd.grad(target.log_joint_graph(u).sum(), u, create_graph=True)[0]
    return u, gradient


@torch.enable_grad()
def derivatives(target: Target, u: Tensor) -> tuple[Tensor, Curvature]:
    """Returns the gradient of the log joint density, and minus its second derivatives made positive definite."""
    leaf, gradient = gradient_graph(target, u)
    rows = [gradient_of(gradient[..., i], leaf, retain=True) for i in range(u.shape[-1])]
    hessian = -torch.stack(rows, dim=-2).detach().double()
    hessian = (hessian + hessian.mT) / 2
    is_finite = hessian.isfinite().flatten(-2).all(-1)[..., None, None]
    hessian = torch.where(is_finite, hessian, torch.eye(u.shape[-1], dtype=hessian.dtype, device=u.device))
    values, vectors = torch.linalg.eigh(hessian)
    values = values.abs()
    largest = values.amax(-1, keepdim=True)
    values = torch.where(largest > 0, values.clamp(min=_FLOOR * largest), 1.0)
    return gradient.detach().double(), Curvature(values, vectors)


def joint_of(task: Task) -> Target:
    """Returns the joint density of some data and their latents."""
    return Target(task, WeightedGuide(prior_of(task.model), is_prior=True))


def num_real_latents(task: Task) -> int:
    """Returns how many real numbers the latents of a datum are.

    Raises:
        ValueError: when they are not all mapped to real numbers.
    """
    return joint_of(replace(task.rows(slice(0, 2)), graphs=None)).dim


def climb(task: Task, u: Tensor, num_steps: int, known: Mode | None = None) -> tuple[Tensor, Tensor]:
    """Climbs from some points to modes by damped Newton steps.

    Args:
        task: the data.
        u: where to start, ``(starts, batch, dim)``.
        num_steps: largest number of steps.
        known: modes near which a climb need not go on.

    Returns:
        The modes, ``(starts, batch, dim)``, and the log joint density there, ``(starts, batch)``.
    """
    target, rows = joint_of(task), torch.arange(task.size, device=u.device)
    u, log_joint = u.clone(), target.log_joint(u)
    damping = torch.full(log_joint.shape, 1e-2, dtype=torch.double, device=u.device)
    is_done = torch.zeros_like(log_joint, dtype=torch.bool)
    for _ in range(num_steps):
        left = (~is_done[:, rows]).any(0)
        if not bool(left.any()):
            break
        # Derivatives of the others cost as much, and a new target costs a few runs of the model.
        if task.divisible and 2 <= int(left.sum()) <= 0.8 * len(left):
            rows = rows[left]
            target = joint_of(task.rows(rows))
        at, value, damped = u[:, rows], log_joint[:, rows], damping[:, rows]
        gradient, curvature = derivatives(target, at)
        step = curvature.solve(gradient, damped)
        is_near = ~((gradient * step).sum(-1) > 2 * _TOLERANCE)  # and where it is NaN
        # So near to a mode, the full step is best, and the last.
        step = torch.where(is_near.unsqueeze(-1), curvature.solve(gradient, torch.zeros_like(damped)), step)
        for _ in range(_TRIALS):
            moved = (at + step).to(at.dtype)
            found = target.log_joint(moved)
            better = found >= value  # false for NaN
            at = torch.where(better.unsqueeze(-1), moved, at)
            value = torch.where(better, found, value)
            damped = torch.where(better, damped / 4, damped * 8)
            if bool((better | is_near).all()):
                break
            step = torch.where(better.unsqueeze(-1), 0.0, curvature.solve(gradient, damped))
        u[:, rows], log_joint[:, rows], damping[:, rows] = at, value, damped
        is_done[:, rows] |= is_near if known is None else is_near | known.rows(rows).is_near(at)
    return u, log_joint.nan_to_num(nan=-torch.inf)


@torch.no_grad()
def heavy_columns(task: Task) -> list[int]:
    """Returns the latents whose prior has tails like a power: modes may then be anywhere.

    A light tail costs a mode that is far out more nats than a likelihood that is nearly normal can give.
    """
    target = joint_of(task.rows(slice(0, 2)))
    center, spread = _center_and_spread(target)
    columns = []
    for column in range(target.dim):
        near, far = (center.repeat(2, 1, 1) for _ in _FAR)
        for points, distance in zip((near, far), _FAR, strict=True):
            points[0, :, column] += distance * spread[:, column]
            points[1, :, column] -= distance * spread[:, column]
        loss = target.values(near)[0] - target.values(far)[0]
        if bool((loss < _HEAVY).any()):  # false for NaN
            columns.append(column)
    return columns


@torch.no_grad()
def far_starts(target: Target, u: Tensor, columns: list[int], at_once: int) -> Tensor:
    """Returns the best local maxima of the joint density on lines through a point of each datum.

    Args:
        target: the joint density.
        u: a point of each datum, ``(batch, dim)``.
        columns: the latents along which the lines go.
        at_once: points a datum to score at once.

    Returns:
        Points, ``(2, batch, dim)``; u itself where a line has no other maximum.
    """
    _, spread = _center_and_spread(target)
    distances = _RATIO ** torch.arange(_NUM_DISTANCES, dtype=u.dtype, device=u.device)
    heights, points = [torch.full_like(u[None, :, 0], -math.inf).expand(_BEST, -1)], [u.expand(_BEST, *u.shape)]
    for column in columns:
        for sign in (-1.0, 1.0):
            line = u.repeat(_NUM_DISTANCES, 1, 1)
            line[..., column] += sign * distances.unsqueeze(-1) * spread[:, column]
            log_joint = torch.cat([target.log_joint(part) for part in line.split(at_once)])
            log_joint = log_joint.nan_to_num(nan=-math.inf, posinf=-math.inf)
            is_top = (log_joint[1:-1] > log_joint[:-2]) & (log_joint[1:-1] >= log_joint[2:])
            heights.append(torch.where(is_top, log_joint[1:-1], -math.inf))
            points.append(line[1:-1])
    height, point = torch.cat(heights), torch.cat(points)
    best = height.topk(_BEST, dim=0)
    chosen = point.gather(0, best.indices.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
    return torch.where(best.values.unsqueeze(-1) > -math.inf, chosen, u)


def _center_and_spread(target: Target) -> tuple[Tensor, Tensor]:
    """Returns the median of the prior's draws, and their median distance from it, ``(batch, dim)`` each."""
    with pyro.validation_enabled(False):
        u = target.draw(_PRIOR_DRAWS)
    center = u.median(0).values
    return center, (u - center).abs().median(0).values.clamp(min=torch.finfo(u.dtype).tiny)
