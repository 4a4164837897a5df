"""Bijections from real numbers to the supports of latents."""

import math

import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor
from torch.distributions import Transform, biject_to, transforms
from torch.distributions.mixture_same_family import MixtureSameFamilyConstraint

from pyrovae.distributions.spaces import ShapeLike, flattened, innermost, open_unit_interval


def bijection(support: constraints.Constraint) -> Transform:
    """Returns a bijection from real numbers to a support; raises a NotImplementedError if there is none.

    As torch's ``biject_to``, but for the supports that pyrovae defines too, and with :class:`LogRatio` for simplexes.

    >>> bijection(constraints.simplex)
    LogRatio()
    """
    if isinstance(support, flattened):
        one = bijection(support.base_constraint)
        over = len(support.event_shape) - support.base_constraint.event_dim
        many = transforms.IndependentTransform(one, over) if over else one
        shape = torch.Size(many.inverse_shape(support.event_shape))
        size, flat = torch.Size([shape.numel()]), torch.Size([math.prod(support.event_shape)])
        steps = [ReshapeTransform(size, shape), many, ReshapeTransform(torch.Size(support.event_shape), flat)]
        return transforms.ComposeTransform(steps)
    if isinstance(support, type(constraints.independent(constraints.real, 1))):
        return transforms.IndependentTransform(bijection(support.base_constraint), support.reinterpreted_batch_ndims)
    if isinstance(support, MixtureSameFamilyConstraint):
        if any(isinstance(x, Tensor) for x in vars(innermost(support)).values()):  # components with bounds of their own
            raise NotImplementedError(f"no bijection to {support}")
        return bijection(support.base_constraint)
    if isinstance(support, type(constraints.simplex)):
        return LogRatio()
    if isinstance(support, type(open_unit_interval)):
        return biject_to(constraints.unit_interval)
    return biject_to(support)


class LogRatio(Transform):
    r"""The inverse of the isometric log-ratio transform, from K - 1 real numbers to the simplex with K entries.

    .. math:: y = \mathrm{softmax}(H^\top x), \qquad x = H \log y, \qquad
        \log\left|\det \frac{\partial (y_1, \dots, y_{K-1})}{\partial x}\right| = \sum_k \log y_k + \tfrac12 \log K

    H has K - 1 orthonormal rows that sum to zero. Every entry keeps its relative precision, also one far below the
    rounding error of 1; torch's ``StickBreakingTransform`` subtracts entries from 1 and loses these.

    References:
        Isometric Logratio Transformations for Compositional Data Analysis, J. J. Egozcue et al., 2003,
        https://doi.org/10.1023/A:1023818214614.

    >>> y = torch.tensor([1e-30, 0.25, 0.75])
    >>> torch.allclose(LogRatio()(LogRatio().inv(y)).log(), y.log())
    True
    """

    domain, codomain = constraints.real_vector, constraints.simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LogRatio)

    def __hash__(self) -> int:
        return hash(LogRatio)

    def _call(self, x: Tensor) -> Tensor:
        y = (x @ _contrasts(x.shape[-1], x)).softmax(-1)
        return y.clamp_min(torch.finfo(y.dtype).tiny)  # a zero has no logarithm

    def _inverse(self, y: Tensor) -> Tensor:
        return y.log() @ _contrasts(y.shape[-1] - 1, y).T

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # Not from y, which cannot get as small as its logarithm.
        size = x.shape[-1]
        return (x @ _contrasts(size, x)).log_softmax(-1).sum(-1) + 0.5 * math.log(size + 1)

    def forward_shape(self, shape: ShapeLike) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: ShapeLike) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])


def _contrasts(size: int, like: Tensor) -> Tensor:
    """Returns Helmert's contrasts: orthonormal rows that sum to zero, ``(size, size + 1)``."""
    row = torch.arange(1, size + 1, dtype=like.dtype, device=like.device).unsqueeze(-1)
    column = torch.arange(size + 1, device=like.device)
    signs = torch.where(column < row, 1.0, torch.where(column == row, -row, 0.0)).to(like.dtype)
    return signs / (row * (row + 1)).sqrt()
