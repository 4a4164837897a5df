r"""Newton's method for the modes of :math:`\log p(x, u)`, for all data at once."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.proposals import WeightedGuide
from pyrovae.estimators.targets import Target, gradient_of
from pyrovae.estimators.task import Task, prior_of

_TOLERANCE = 1e-3  # nats: half the Newton decrement at which a mode counts as found
_FLOOR = 1e-6  # smallest curvature, relative to the largest of a datum
_NEAR = 3.0  # standard deviations from a mode
_TRIALS = 4  # step lengths a Newton step


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
