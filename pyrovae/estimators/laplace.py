r"""Laplace's approximation of each posterior, as a proposal."""

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor
from torch.distributions import Transform

from pyrovae.distributions import MultivariateNormal
from pyrovae.estimators.base import check_count, check_positive
from pyrovae.estimators.memory import Allocations, clamp
from pyrovae.estimators.proposals import Proposal, WeightedGuide
from pyrovae.estimators.targets import Site, Target, gradient_of
from pyrovae.estimators.task import Task, prior_of

_MEAN_DRAWS = 64  # of the guide, whose mean is the first start
_TOLERANCE = 1e-3  # nats: half the Newton decrement at which a mode counts as found
_FLOOR = 1e-6  # smallest curvature, relative to the largest of a datum
_SCALES = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5)
_PILOT_DEGREES = 10.0
_SLACK = 0.9  # nats of the second moment that a wider proposal, whose weights have lighter tails, may cost


class Laplace(Proposal):
    r"""A normal or Student-t distribution at the mode of each posterior, with the curvature there.

    .. math:: q(u \mid x) = \mathcal{N}\!\left(u;\, u^*, s^2 H^{-1}\right), \quad
        u^* = \arg\max_u \log p(x, u), \quad H = -\nabla^2 \log p(x, u^*)

    with all latents of a datum as one vector u of real numbers: a latent with another support is mapped to them, and
    its Jacobian counts. Damped Newton steps find the mode, from the guide's mean and from draws of the guide; the
    highest mode is kept. Their second derivatives are exact, and enter by the absolute values of their eigenvalues. The
    scale s of each datum follows from pilot draws that are not used again: the widest of six whose weights have a
    second moment close to the smallest.

    Dimensions of a plate within a datum are independent given the sites before. The guide serves as a start only.

    Args:
        num_starts: points that Newton steps start from, at least 1: the guide's mean, and draws of the guide.
        num_steps: largest number of Newton steps, at least 1.
        num_pilots: pilot draws per datum, at least 1.
        scale: s; None to choose it by the pilot draws.
        degrees: degrees of freedom of a Student-t distribution instead of the normal, which is infinity.

    References:
        Accurate Approximations for Posterior Moments and Marginal Densities, L. Tierney and J. B. Kadane, 1986,
        https://doi.org/10.1080/01621459.1986.10478240; Identifying and attacking the saddle point problem in
        high-dimensional non-convex optimization, Y. N. Dauphin et al., 2014, https://arxiv.org/abs/1406.2572 (absolute
        eigenvalues).

    >>> Laplace(num_starts=2)
    Laplace(num_starts=2)
    """

    def __init__(
        self,
        num_starts: int = 1,
        num_steps: int = 20,
        num_pilots: int = 200,
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
        task = replace(task, graphs=None)
        target = Target(task, WeightedGuide(prior_of(task.model), is_prior=True))
        fits = [self._fit(part) for part in task.split(self._rows_at_once(task))]
        mode, scale_tril = (torch.cat(parts) for parts in zip(*fits, strict=True))
        return [WeightedGuide(_NormalGuide(target, mode, scale_tril, self.degrees))]

    def _rows_at_once(self, task: Task) -> int:
        """Returns for how many data the graph of second derivatives fits in the memory budget."""
        if not task.divisible:
            return task.size
        few = task.rows(slice(0, 2))
        target = Target(few, WeightedGuide(prior_of(few.model), is_prior=True))
        u = target.draw(1)
        with Allocations() as allocations:
            _gradient_graph(target, u)
        per_datum = self.num_starts * allocations.bytes() / few.size
        return clamp(task.max_memory / per_datum, task.size)

    def _fit(self, task: Task) -> tuple[Tensor, Tensor]:
        """Returns the mode, and the Cholesky factor of the scale matrix, for each datum."""
        target = Target(task, WeightedGuide(prior_of(task.model), is_prior=True))
        with torch.no_grad():
            draws = target.pack(task.draw(max(_MEAN_DRAWS, self.num_starts - 1))[0])
        u = torch.cat([draws.mean(0, keepdim=True), draws[: self.num_starts - 1]])
        u, log_joint = _climb(target, u, self.num_steps)
        mode = u[log_joint.argmax(0), torch.arange(u.shape[1], device=u.device)]
        _, curvature = _derivatives(target, mode.unsqueeze(0))
        covariance = curvature.inverse()[0]
        scale_tril = torch.linalg.cholesky(covariance).to(mode.dtype)
        scale = self._choose_scale(target, mode, scale_tril) if self.scale is None else self.scale
        return mode, scale * scale_tril

    def _choose_scale(self, target: Target, mode: Tensor, scale_tril: Tensor) -> Tensor:
        """Returns the scale at which the weights have the smallest second moment, ``(batch, 1, 1)``, by pilot draws."""
        # Wider than most of the choices, so that the weights of the pilot draws have light tails themselves.
        pilot = _density(mode, 1.2 * scale_tril, _PILOT_DEGREES)
        u = pilot.sample((self.num_pilots,))
        log_p, log_r = target.log_joint(u), pilot.log_prob(u)
        rows = []
        for scale in _SCALES:
            log_q = _density(mode, scale * scale_tril, self.degrees).log_prob(u)
            rows.append((2 * log_p - log_q - log_r).double().logsumexp(0))
        moments = torch.stack(rows).nan_to_num(math.inf)
        # The widest that costs little: pilot draws seldom show what is lost in the tails of a narrow one.
        index = torch.arange(len(_SCALES), device=u.device).unsqueeze(-1)
        best = torch.where(moments <= moments.amin(0) + _SLACK, index, 0).amax(0)
        return mode.new_tensor(_SCALES)[best][:, None, None]


class _Curvature(NamedTuple):
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


@torch.enable_grad()
def _gradient_graph(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u as a leaf, and the gradient of the log joint density there with its graph."""
    u = u.detach().requires_grad_()
    gradient = torch.autograd.grad(target.log_joint_graph(u).sum(), u, create_graph=True)[0]
    return u, gradient


@torch.enable_grad()
def _derivatives(target: Target, u: Tensor) -> tuple[Tensor, _Curvature]:
    """Returns the gradient of the log joint density, and minus its second derivatives made positive definite."""
    leaf, gradient = _gradient_graph(target, u)
    rows = [gradient_of(gradient[..., i], leaf, retain=True) for i in range(u.shape[-1])]
    hessian = -torch.stack(rows, dim=-2).detach().double()
    hessian = (hessian + hessian.mT) / 2
    is_finite = hessian.isfinite().flatten(-2).all(-1)[..., None, None]
    hessian = torch.where(is_finite, hessian, torch.eye(u.shape[-1], dtype=hessian.dtype, device=u.device))
    values, vectors = torch.linalg.eigh(hessian)
    values = values.abs()
    largest = values.amax(-1, keepdim=True)
    values = torch.where(largest > 0, values.clamp(min=_FLOOR * largest), 1.0)
    return gradient.detach().double(), _Curvature(values, vectors)


def _climb(target: Target, u: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Returns the modes that damped Newton steps reach from some points, and the log joint density there."""
    log_joint = target.log_joint(u)
    damping = torch.full(log_joint.shape, 1e-2, dtype=torch.double, device=u.device)
    for _ in range(num_steps):
        gradient, curvature = _derivatives(target, u)
        step = curvature.solve(gradient, damping)
        is_last = not bool(((gradient * step).sum(-1) > 2 * _TOLERANCE).any())
        if is_last:  # so near to a mode, the full step is best
            step = curvature.solve(gradient, torch.zeros_like(damping))
        for _ in range(4):
            moved = (u + step).to(u.dtype)
            found = target.log_joint(moved)
            better = found >= log_joint  # false for NaN
            u = torch.where(better.unsqueeze(-1), moved, u)
            log_joint = torch.where(better, found, log_joint)
            damping = torch.where(better, damping / 4, damping * 8)
            if bool(better.all()):
                break
            step = torch.where(better.unsqueeze(-1), 0.0, curvature.solve(gradient, damping))
        if is_last:
            break
    return u, log_joint


def _density(mean: Tensor, scale_tril: Tensor, degrees: float) -> dist.TorchDistribution:
    """Returns a Student-t distribution over vectors; a normal one for infinitely many degrees of freedom."""
    if degrees == math.inf:
        return MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)
    return dist.MultivariateStudentT(degrees, mean, scale_tril, validate_args=False)


class _NormalGuide:
    """A Pyro guide that draws the latents of each datum from a normal or Student-t distribution, site after site.

    Args:
        target: which columns of u each site has.
        mode: shape ``(batch, dim)``.
        scale_tril: Cholesky factor of the scale matrix, ``(batch, dim, dim)``.
        degrees: degrees of freedom, infinite for a normal distribution.
    """

    draws_directly = True  # without auxiliary sites, whatever the task's guide has: its density is known everywhere

    def __init__(self, target: Target, mode: Tensor, scale_tril: Tensor, degrees: float):
        self.target, self.mode, self.scale_tril, self.degrees = target, mode, scale_tril, degrees

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        noise: list[Tensor] = []
        quadratic: Tensor | float = 0.0
        frames = {frame.name: frame for site in self.target.sites for frame in site.frames}
        plates = {name: pyro.plate(name, frame.size, dim=frame.dim) for name, frame in frames.items()}
        for site in self.target.sites:
            # u = mode + L e: given the sites before, whose noise e is known, a site's block of u is again normal.
            here, before = site.columns, slice(0, site.columns.start)
            mean, own = self.mode[:, here], self.scale_tril[:, here, here]
            degrees, factor = self.degrees, 1.0
            if noise:
                known = torch.cat(noise, dim=-1)
                mean = mean + (self.scale_tril[:, here, before] @ known.unsqueeze(-1)).squeeze(-1)
                if degrees < math.inf:
                    factor = ((degrees + quadratic) / (degrees + before.stop)).sqrt()[..., None, None]
                    degrees = degrees + before.stop
            else:
                mean = mean.unsqueeze(0)
            u = self._sample(site, mean, factor * own, degrees, plates)
            if site is self.target.sites[-1]:
                break
            e = torch.linalg.solve_triangular(own, (u - mean).unsqueeze(-1), upper=False).squeeze(-1)
            noise.append(e)
            quadratic = quadratic + e.square().sum(-1)

    def _sample(self, site: Site, mean: Tensor, scale_tril: Tensor, degrees: float, plates: dict) -> Tensor:
        """Samples a site from a distribution of its block of u, ``(draws, batch, size)``; returns the block."""
        place, size = self.target.place, math.prod(site.event)
        draws, batch = mean.shape[:2]
        if math.prod(site.plates) > 1:
            count = math.prod(site.plates)
            covariance = (scale_tril @ scale_tril.mT).unflatten(-1, (count, size)).unflatten(-3, (count, size))
            blocks = covariance.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            scale_tril = torch.linalg.cholesky(blocks)
        else:
            scale_tril = scale_tril.unsqueeze(-3)
        mean = mean.reshape(draws, batch, *site.plates, size).movedim(1, place)
        scale_tril = scale_tril.reshape(-1, batch, *site.plates, size, size).movedim(1, place)
        if len(scale_tril) == 1:  # without a dimension of draws, for which matrices would be copied
            scale_tril = scale_tril.squeeze(0)
        fn = _density(mean, scale_tril, degrees)
        transforms: list[Transform] = []
        if site.event != (size,):
            transforms.append(ReshapeTransform(torch.Size((size,)), torch.Size(site.event)))
        if site.transform is not None:
            transforms.append(site.transform)
        if transforms:
            fn = dist.TransformedDistribution(fn, transforms)
        with ExitStack() as stack:
            for frame in site.frames:
                stack.enter_context(plates[frame.name])
            value = pyro.sample(site.name, fn)
        return self.target.pack_value(site, value)
