r"""Newton's method for the modes of :math:`\log p(x, u)`, for all data at once."""

import math
from collections.abc import Sequence
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
MAX_DENSE = 300  # dimensions, above which a diagonal and a matrix of low rank are tried for the curvature
_RANK = 64  # of the latter, at first
_NEGLIGIBLE = 0.05  # eigenvalue of what is left out, relative to the diagonal
_PROBES = 4  # random vectors for the diagonal
_TRIALS = 4  # step lengths a Newton step
_NUM_GRADIENTS = 20  # of the quasi-Newton method, after a Newton step
_FIRST_GRADIENTS = 30  # the same, before the first Newton step, where a curvature is known
_LEFT = 0.6  # share of the data that still move, at which they go on alone: a new target costs a few runs of the model

# Modes far out, under a prior with heavy tails.
_FAR = (1e3, 1e4)  # spreads of the prior, between which its tails are compared
_HEAVY = 30.0  # nats that a heavy tail loses there at most: 4.6 for Cauchy's, 25 for Student's with 10 degrees
_RATIO, _NUM_DISTANCES = 1.5, 36  # distances from a spread to some million spreads
_BEST = 2  # points that are kept
_PRIOR_DRAWS = 64  # for its center and spread


class Curvature(NamedTuple):
    """Minus the second derivatives of the log joint density, made positive definite, ``(..., dim, dim)``."""

    matrix: Tensor

    def inverse(self) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(self.matrix))

    def log_det(self) -> Tensor:
        return 2 * torch.linalg.cholesky(self.matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def solve(self, g: Tensor, damping: Tensor) -> Tensor:
        """Returns the Newton step for a gradient, with a multiple of the curvature's mean added to the curvature."""
        matrix = self.matrix.clone()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal += damping.unsqueeze(-1) * diagonal.mean(-1, keepdim=True)
        return torch.cholesky_solve(g.unsqueeze(-1), torch.linalg.cholesky(matrix)).squeeze(-1)

    def of(self, index: Any) -> "Curvature":
        """Returns the curvature of some of the points."""
        return Curvature(self.matrix[index])


class Mode(NamedTuple):
    """A mode of each datum, ``(batch, dim)``, and the curvature there."""

    u: Tensor
    curvature: Curvature

    def is_near(self, u: Tensor) -> Tensor:
        """Returns whether points, ``(..., batch, dim)``, are near the mode: Newton's method would not end elsewhere."""
        offset = (u - self.u).to(self.curvature.matrix)
        square = (offset * (self.curvature.matrix @ offset.unsqueeze(-1)).squeeze(-1)).sum(-1)
        return square < _NEAR**2  # false for NaN

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
    dim = u.shape[-1]
    matrix = _low_rank(target, leaf, gradient) if dim > MAX_DENSE else None
    if matrix is None:
        rows = [gradient_of(gradient[..., i], leaf, retain=True) for i in range(dim)]
        matrix = _positive(-torch.stack(rows, dim=-2).detach().double())
    return gradient.detach().double(), Curvature(matrix)


def _positive(hessian: Tensor) -> Tensor:
    """Returns symmetric matrices with the absolute values of their eigenvalues; the identity if not finite."""
    hessian = (hessian + hessian.mT) / 2
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    hessian = torch.where(hessian.isfinite().flatten(-2).all(-1)[..., None, None], hessian, identity)
    values, vectors = torch.linalg.eigh(hessian)
    values = values.abs()
    largest = values.amax(-1, keepdim=True)
    values = torch.where(largest > 0, values.clamp(min=_FLOOR * largest), 1.0)
    return (vectors * values.unsqueeze(-2)) @ vectors.mT


@torch.enable_grad()
def _low_rank(target: Target, leaf: Tensor, gradient: Tensor) -> Tensor | None:
    r"""Returns minus the second derivatives as a diagonal, that of the prior, and a matrix of low rank.

    .. math:: H \approx D^{1/2} (I + V \Lambda V^T) D^{1/2}

    The largest eigenvalues of the scaled difference are found from products of H with random vectors.

    Returns:
        The matrices, ``(..., dim, dim)``, with absolute eigenvalues; None where the rank is not low.
    """
    prior = torch.autograd.grad(target.log_prior_graph(leaf).sum(), leaf, create_graph=True)[0]
    signs = [torch.randint_like(leaf, 2) * 2 - 1 for _ in range(_PROBES)]
    # The exact diagonal, for any signs, where dimensions are independent under the prior.
    diagonal = torch.stack([v * gradient_of(prior * v, leaf, retain=True) for v in signs]).mean(0)
    diagonal = diagonal.double().abs()
    is_curved = (diagonal > _FLOOR * diagonal.amax(-1, keepdim=True)) & diagonal.isfinite()
    diagonal = torch.where(is_curved, diagonal, 1.0)
    scale = diagonal.sqrt().unsqueeze(-1)

    def product(v: Tensor) -> Tensor:  # (..., dim, columns)
        columns = (v / scale).to(leaf.dtype).unbind(-1)
        found = [gradient_of(gradient * column, leaf, retain=True) for column in columns]
        return -torch.stack(found, dim=-1).double() / scale - v

    rank = 0
    while rank < leaf.shape[-1] // 8:
        rank = max(2 * rank, _RANK)
        start = torch.randn(*leaf.shape, rank, dtype=torch.double, device=leaf.device)
        basis = torch.linalg.qr(product(start)).Q
        basis = torch.linalg.qr(product(basis)).Q
        small = basis.mT @ product(basis)
        if not bool(small.isfinite().all()):
            return None
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        if bool((values.abs().amin(-1) < _NEGLIGIBLE).all()):
            vectors = scale * (basis @ vectors)
            # Eigenvalues of the sum in absolute value, as with all second derivatives.
            added = (1 + values).abs().clamp(min=_FLOOR) - 1
            return torch.diag_embed(diagonal) + (vectors * added.unsqueeze(-2)) @ vectors.mT
    return None


def joint_of(task: Task) -> Target:
    """Returns the joint density of some data and their latents."""
    return Target(task, WeightedGuide(prior_of(task.model), is_prior=True))


def num_real_latents(task: Task) -> int:
    """Returns how many real numbers the latents of a datum are.

    Raises:
        ValueError: when they are not all mapped to real numbers.
    """
    return joint_of(replace(task.rows(slice(0, 2)), graphs=None)).dim


class Ends(NamedTuple):
    """Where climbs end: points, ``(starts, batch, dim)``, the log joint density and the curvature there."""

    u: Tensor
    log_joint: Tensor
    curvature: Curvature

    @classmethod
    def cat(cls, parts: Sequence["Ends"]) -> "Ends":
        us, log_joints, curvatures = zip(*parts, strict=True)
        matrix = torch.cat([curvature.matrix for curvature in curvatures])
        return cls(torch.cat(us), torch.cat(log_joints), Curvature(matrix))


def climb(task: Task, u: Tensor, num_steps: int, known: Mode | None = None) -> Ends:
    """Climbs from some points to modes by damped Newton steps, each followed by steps of a quasi-Newton method.

    Second derivatives take as long as dozens of gradients.

    Args:
        task: the data.
        u: where to start, ``(starts, batch, dim)``.
        num_steps: largest number of Newton steps.
        known: modes near which a climb need not go on. Their curvature serves for its first steps.

    Returns:
        The modes. Where a climb came near a known one, the log joint density is minus infinity.
    """
    target, rows = joint_of(task), torch.arange(task.size, device=u.device)
    if known is None:
        u, log_joint = u.clone(), target.log_joint(u)
        found = Curvature(torch.diag_embed(torch.ones_like(u, dtype=torch.double)))
        is_done = torch.zeros_like(log_joint, dtype=torch.bool)
    else:
        found = Curvature(known.curvature.matrix.repeat(len(u), 1, 1, 1))
        u, log_joint = _follow(task, u, found, _FIRST_GRADIENTS)
        is_done = known.is_near(u)
    damping = torch.full(log_joint.shape, 1e-2, dtype=torch.double, device=u.device)
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
            trial = target.log_joint(moved)
            better = trial >= value  # false for NaN
            at = torch.where(better.unsqueeze(-1), moved, at)
            value = torch.where(better, trial, value)
            damped = torch.where(better, damped / 4, damped * 8)
            if bool((better | is_near).all()):
                break
            step = torch.where(better.unsqueeze(-1), 0.0, curvature.solve(gradient, damped))
        if not bool(is_near.all()):
            part = task if len(rows) == task.size else task.rows(rows)
            at, value = _follow(part, at, curvature, _NUM_GRADIENTS)
        u[:, rows], log_joint[:, rows], damping[:, rows] = at, value, damped
        done = is_near if known is None else is_near | known.rows(rows).is_near(at)
        found.matrix[:, rows] = curvature.matrix
        is_done[:, rows] |= done
    is_none = log_joint.isnan() if known is None else log_joint.isnan() | known.is_near(u)
    return Ends(u, torch.where(is_none, -torch.inf, log_joint), found)


def _follow(task: Task, u: Tensor, curvature: Curvature, num_gradients: int) -> tuple[Tensor, Tensor]:
    """Goes on by a quasi-Newton method (BFGS), from a curvature that need not be that at u.

    Args:
        task: the data.
        u: where to start, ``(starts, batch, dim)``.
        curvature: of the first step.
        num_gradients: largest number of gradients to take.

    Returns:
        Points that are at least as high, and the log joint density there, ``(starts, batch)``.
    """
    target, rows = joint_of(task), torch.arange(task.size, device=u.device)
    value, gradient = _value_and_gradient(target, u)
    best_u, best = u.clone(), value.clone()
    inverse = curvature.inverse()
    length = torch.ones_like(gradient[..., :1])
    for _ in range(num_gradients):
        step = (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
        left = ((gradient * step).sum(-1) > _TOLERANCE).any(0)
        if not bool(left.any()):
            break
        if task.divisible and 2 <= int(left.sum()) <= _LEFT * len(left):
            u, value, gradient, inverse, length, step = (
                t[:, left] for t in (u, value, gradient, inverse, length, step)
            )
            rows = rows[left]
            target = joint_of(task.rows(rows))
        moved = (u + length * step).to(u.dtype)
        trial, there = _value_and_gradient(target, moved)
        inverse = _corrected(inverse, (moved - u).double(), gradient - there)
        better = (trial >= value).unsqueeze(-1)  # false for NaN
        u, gradient = torch.where(better, moved, u), torch.where(better, there, gradient)
        value = torch.where(better.squeeze(-1), trial, value)
        length = torch.where(better, (2 * length).clamp(max=1.0), length / 4)
        best_u[:, rows], best[:, rows] = u, value
    return best_u, best


def _corrected(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """Returns an inverse curvature that gives the change of the gradient along a step, by the formula of BFGS."""
    product = (step * change).sum(-1, keepdim=True)
    turned = (inverse @ change.unsqueeze(-1)).squeeze(-1)
    # Elsewhere the density is not concave, or numbers are not finite.
    is_good = product > 1e-8 * (step.square().sum(-1, keepdim=True) * change.square().sum(-1, keepdim=True)).sqrt()
    along = step / product
    factor = 1 + (change * turned).sum(-1, keepdim=True) / product
    added = (factor * step).unsqueeze(-1) * along.unsqueeze(-2)
    crossed = turned.unsqueeze(-1) * along.unsqueeze(-2)
    return torch.where(is_good.unsqueeze(-1), inverse + added - crossed - crossed.mT, inverse)


@torch.enable_grad()
def _value_and_gradient(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log joint density, and its gradient in double precision."""
    u = u.detach().requires_grad_()
    log_joint = target.log_joint_graph(u)
    return log_joint.detach(), gradient_of(log_joint, u, retain=False).double()


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
