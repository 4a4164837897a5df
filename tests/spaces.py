"""Sample spaces of distributions as points with weights: integrals or sums over a space become sums over its points.

:func:`space_of` finds the space of a distribution from its support. Continuous spaces are integrated by the
double-exponential rules of H. Takahasi and M. Mori (Double Exponential Formulas for Numerical Integration, 1974). They
converge to rounding for functions that are smooth inside the space, even if they are singular at its boundary.
"""

import itertools
import math
from typing import NamedTuple

import scipy.stats
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints


class Space(NamedTuple):
    """Points ``(n, *event_shape)`` and the logarithms of their weights ``(n,)``: 0 where the points are enumerated."""

    points: Tensor
    log_weights: Tensor

    def probabilities(self, p: dist.TorchDistribution) -> Tensor:
        """Returns the probability of each point, or of the cell around it; they sum to one."""
        return (p.log_prob(self.points) + self.log_weights).exp()


def _steps(low: float, high: float, step: float) -> Tensor:
    return torch.arange(round(low / step), round(high / step) + 1, dtype=torch.float64) * step


def half_line(step: float) -> Space:
    """Returns the positive numbers, from 1e-19 to 1e19, as x = exp(pi/2 sinh t)."""
    t = _steps(-4.0, 4.0, step)
    log_x = math.pi / 2 * t.sinh()
    return Space(log_x.exp(), log_x + (math.pi / 2 * t.cosh() * step).log())


def line(center: float, scale: float, step: float) -> Space:
    """Returns the real numbers as two half lines, so that a kink at the centre causes no error."""
    x, log_weights = half_line(step)
    x = torch.cat([center - scale * x.flip(0), center + scale * x])
    return Space(x, torch.cat([log_weights.flip(0), log_weights]) + math.log(scale))


def interval(step: float) -> Space:
    """Returns the numbers between 0 and 1, x = 1 / (1 + exp(-pi sinh t)), up to rounding from the ends."""
    t = _steps(-3.1, 3.1, step)
    logit = math.pi * t.sinh()
    x = logit.sigmoid()
    return Space(x, (math.pi * t.cosh() * step).log() + x.log() + (-logit).sigmoid().log())


def product(*factors: Space) -> Space:
    """Returns the product of spaces of scalars or vectors, as vectors."""
    index = torch.cartesian_prod(*[torch.arange(len(f.points)) for f in factors]).view(-1, len(factors))
    points = [f.points.reshape(len(f.points), -1)[i] for f, i in zip(factors, index.T, strict=True)]
    return Space(torch.cat(points, -1), sum(f.log_weights[i] for f, i in zip(factors, index.T, strict=True)))


def enumeration(points: Tensor) -> Space:
    return Space(points.double(), torch.zeros(len(points), dtype=torch.float64))


def simplex(size: int, step: float) -> Space:
    """Returns the vectors of positive numbers with sum one, with the measure of their first ``size - 1`` numbers."""
    fractions, log_weights = product(*[interval(step)] * (size - 1))
    rest, points = torch.ones(len(fractions), dtype=torch.float64), []
    for fraction in fractions.T:
        points.append(rest * fraction)
        log_weights = log_weights + rest.log()
        rest = rest * (1 - fraction)
    return Space(torch.stack([*points, rest], -1), log_weights)


def sphere(dim: int, size: int = 200) -> Space:
    """Returns the unit circle with arc length, or the unit sphere with area."""
    angle = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 * math.pi / size
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if dim == 2:
        return Space(circle, torch.full((size,), math.log(2 * math.pi / size), dtype=torch.float64))
    # Gauss-Legendre nodes along the axis: the eigenvalues of the Jacobi matrix (Golub and Welsch, 1969).
    k = torch.arange(1, size, dtype=torch.float64)
    nodes, vectors = torch.linalg.eigh(torch.diag(k / (4 * k**2 - 1).sqrt(), 1).T)
    height, log_width = nodes.repeat_interleave(size), (2 * vectors[0].square()).log().repeat_interleave(size)
    around = circle.repeat(size, 1) * (1 - height**2).sqrt().unsqueeze(-1)
    return Space(torch.cat([around, height.unsqueeze(-1)], -1), log_width + math.log(2 * math.pi / size))


def compositions(total: int, size: int) -> Space:
    """Returns all vectors of `size` counts that sum to `total`."""
    bars = itertools.combinations(range(total + size - 1), size - 1)
    points = [[b - a - 1 for a, b in itertools.pairwise((-1, *bar, total + size - 1))] for bar in bars]
    return enumeration(torch.tensor(points))


def space_of(p: dist.TorchDistribution, step: float = 1 / 16) -> Space:
    """Returns the space of a distribution without batch dimensions, with points of the shape of its events.

    Args:
        p: the distribution; in an unbounded space, its samples show where the mass is.
        step: step size in a continuous space. Densities with kinks or narrow peaks need a smaller one.
    """
    support, shape = p.support, p.event_shape
    while hasattr(support, "base_constraint"):
        shape = getattr(support, "event_shape", shape)  # a support of reshaped vectors
        support = support.base_constraint
    # The support of one scalar or vector is that of all of them.
    size = math.prod(shape[: len(shape) - support.event_dim])
    if isinstance(support, constraints._Boolean):
        factors = [enumeration(torch.arange(2))] * size
    elif isinstance(support, constraints._IntegerInterval):
        bounds = (
            torch.as_tensor(b).expand(shape).flatten().tolist() for b in (support.lower_bound, support.upper_bound)
        )
        factors = [enumeration(torch.arange(low, high + 1)) for low, high in zip(*bounds, strict=True)]
    elif isinstance(support, constraints._IntegerGreaterThan):
        # Beyond 60 standard deviations, a geometric tail has less mass than rounding.
        x = p.sample((1000,)).flatten(1)
        bounds = (x.mean(0) + 60 * x.std(0)).long() + 60
        factors = [enumeration(torch.arange(bound)) for bound in bounds.tolist()]
    elif isinstance(support, constraints._Multinomial):
        factors = [compositions(int(support.upper_bound), shape[-1])] * size
    elif isinstance(support, constraints._OneHot):
        factors = [enumeration(torch.eye(shape[-1]))] * size
    elif isinstance(support, constraints._Simplex):
        factors = [simplex(shape[-1], step)] * size
    elif repr(support) == "Sphere":
        factors = [sphere(shape[-1])] * size
    elif isinstance(support, constraints._Interval):
        factors = [interval(step)] * size
    elif isinstance(support, (constraints._GreaterThan, constraints._GreaterThanEq)):
        factors = [half_line(step)] * size
    elif isinstance(support, constraints._Real):
        x = p.sample((1000,)).flatten(1)
        scales = (x.quantile(0.8, 0) - x.quantile(0.2, 0)).tolist()
        factors = [line(c, s, step) for c, s in zip(center_of(p, x).tolist(), scales, strict=True)]
    else:
        raise NotImplementedError(f"add the space of {support} to tests/spaces.py")
    space = product(*factors)
    return Space(space.points.view(-1, *p.event_shape), space.log_weights)


def center_of(p: dist.TorchDistribution, x: Tensor) -> Tensor:
    """Returns the mean, where a Laplace distribution has its kink; without a mean, the median of samples."""
    try:
        mean = p.mean
    except NotImplementedError:
        mean = torch.tensor(math.nan)
    return mean.flatten() if bool(torch.isfinite(mean).all()) else x.median(0).values


def agreement(x: Tensor, space: Space, probabilities: Tensor) -> float:
    """Returns the p-value of the hypothesis that samples ``(n, *event_shape)`` have these probabilities.

    The means of 16 smooth functions over the samples are compared with their expectations, sums over the points of the
    space, whose error is far below the standard errors. The statistic is Hotelling's with the true covariance, and
    follows a chi-square distribution.
    """
    first, rest = x[:1000].flatten(1).double(), x[1000:].flatten(1).double()
    # Cosines along random directions; the first samples centre and scale each coordinate, atan maps it to +-pi/2.
    center, scale = first.median(0).values, (first.quantile(0.8, 0) - first.quantile(0.2, 0)).maximum(first.std(0) / 4)
    directions, phases = (
        2 * torch.randn(first.shape[1], 16, dtype=torch.float64),
        7 * torch.rand(16, dtype=torch.float64),
    )

    def functions(points: Tensor) -> Tensor:
        return (((points - center) / (scale + 1e-9)).atan() @ directions + phases).cos()

    values = functions(space.points.flatten(1))
    expected = probabilities @ values
    covariance = (values - expected).T @ ((values - expected) * probabilities.unsqueeze(-1))
    variances, axes = torch.linalg.eigh(covariance)
    # A mean of 10,000 is normal unless rare events dominate its variance: so small variances are left out.
    kept = variances > 0.02
    if not kept.any():
        raise ValueError("the distribution is so narrow that no function of its samples varies")
    deviations = (functions(rest).mean(0) - expected) @ axes[:, kept]
    return scipy.stats.chi2(int(kept.sum())).sf((len(rest) * deviations.square() / variances[kept]).sum().item())
