"""Spaces of latents and data as constraints, and maps from real numbers into them."""

import math
from typing import TypeVar

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import softplus

ShapeLike = torch.Size | list[int] | tuple[int, ...]  # what torch's distributions take as a shape
Distribution = TypeVar("Distribution", bound=dist.TorchDistribution)

_ONE = math.log(math.e - 1)  # softplus(_ONE) = 1
_FLOOR = 1e-6  # float32 would round a smaller scale away, relative to a prior of scale one


def positive(raw: Tensor) -> Tensor:
    r"""Maps real numbers to positive ones, and zero to one, so that untrained scales start at one.

    .. math:: \mathrm{softplus}(r + \log(e - 1)) + 10^{-6}

    >>> positive(torch.zeros(1))
    tensor([1.0000])
    """
    return softplus(raw + _ONE) + _FLOOR


def tril_of(raw: Tensor) -> Tensor:
    """Returns lower triangular matrices with a positive diagonal, each from d (d + 1) / 2 numbers.

    The first d numbers are mapped by :func:`positive` to the diagonal; the others are the strict lower triangle, row by
    row.

    Args:
        raw: any real numbers, shape ``(*leading, d (d + 1) / 2)``.

    Returns:
        Shape ``(*leading, d, d)``.

    >>> tril_of(torch.tensor([0.0, 0.0, 5.0]))
    tensor([[1.0000, 0.0000],
            [5.0000, 1.0000]])
    """
    d = (math.isqrt(8 * raw.shape[-1] + 1) - 1) // 2
    rows, cols = torch.tril_indices(d, d, offset=-1, device=raw.device)
    lower = raw[..., d:]
    # Scatter, not assignment: it is differentiable and takes any number of leading dimensions.
    flat = torch.diag_embed(positive(raw[..., :d])).flatten(-2)
    return flat.scatter(-1, (rows * d + cols).expand(lower.shape), lower).unflatten(-1, (d, d))


def integers(num_classes: int) -> constraints.Constraint:
    """Returns the support of vectors of class numbers."""
    return constraints.independent(constraints.integer_interval(0, num_classes - 1), 1)


def keep_checks(old: dist.TorchDistribution, new: Distribution) -> Distribution:
    """Returns an expanded distribution, which checks values if the one that it was expanded from does."""
    new._validate_args = old._validate_args
    return new


def support_of(p: dist.TorchDistribution) -> constraints.Constraint:
    """Returns the support of a distribution; raises a NotImplementedError, as torch does, if it is undefined."""
    support = p.support
    if support is None:
        raise NotImplementedError(f"{type(p).__name__} has no support. Define it as an attribute, a constraint.")
    return support


class flattened(constraints.Constraint):
    """The support of a :class:`Flattened` distribution: a constraint on vectors that are reshaped first.

    Args:
        base_constraint: the constraint on events of `event_shape`.
        event_shape: the shape that a vector is given.

    >>> flattened(constraints.one_hot, (2, 2)).check(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    tensor(True)
    """

    event_dim = 1

    def __init__(self, base_constraint: constraints.Constraint, event_shape: tuple[int, ...]):
        self.base_constraint, self.event_shape = base_constraint, tuple(event_shape)
        self.is_discrete = base_constraint.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inside = self.base_constraint.check(value.unflatten(-1, self.event_shape))
        over = len(self.event_shape) - self.base_constraint.event_dim
        return inside.flatten(inside.dim() - over).all(-1) if over else inside

    def __repr__(self) -> str:
        return f"Flattened({self.base_constraint}, {self.event_shape})"


def blocks_of(constraint: constraints.Constraint, shape: tuple[int, ...]) -> constraints.Constraint:
    """Returns the support of vectors that are several events concatenated; for a single event, `constraint` itself."""
    return constraint if constraint.event_dim == 1 and math.prod(shape[:-1]) == 1 else flattened(constraint, shape)


def one_hot_blocks(latent_dim: int, num_classes: int | None) -> tuple[int, int]:
    """Returns the number of one-hot vectors in the latents and their length.

    Args:
        latent_dim: number of latent dimensions.
        num_classes: length of each vector; None for one vector of `latent_dim`.

    Raises:
        ValueError: when `num_classes` is below 2 or does not divide `latent_dim`.

    >>> one_hot_blocks(6, 3)
    (2, 3)
    """
    num_classes = latent_dim if num_classes is None else num_classes
    check_classes(num_classes)
    if latent_dim % num_classes:
        raise ValueError(f"num_classes must divide latent_dim={latent_dim}, got {num_classes}.")
    return latent_dim // num_classes, num_classes


def check_classes(num_classes: int) -> None:
    """Raises a ValueError unless there are at least two classes."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")


def check_simplex(latent_dim: int) -> None:
    """Raises a ValueError unless there are at least two dimensions."""
    if latent_dim < 2:
        raise ValueError(f"latent_dim must be at least 2 for latents on a simplex, got {latent_dim}.")


def check_temperature(temperature: float) -> float:
    """Returns the temperature; raises a ValueError unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    return temperature


class _OpenUnitInterval(constraints.interval):
    """The numbers above 0 and below 1."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "the open interval (0, 1)"


open_unit_interval = _OpenUnitInterval()


class grid(constraints.Constraint):  # lower case, as constraints with arguments are in torch
    r"""The constraint of numbers on a grid, with a tolerance of a hundredth of a level.

    .. math:: x \in \left\{\tfrac{k}{L - 1} : k = 0, \dots, L - 1\right\}

    Args:
        levels: :math:`L`, the number of grid points from 0 to 1.

    >>> grid(5).check(torch.tensor([0.0, 0.25, 0.3]))
    tensor([ True,  True, False])
    """

    is_discrete = True

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.levels - 1)
        return ((level - level.round()).abs() < 0.01) & (level > -0.01) & (level < self.levels - 0.99)

    def __repr__(self) -> str:
        return f"grid(levels={self.levels})"


def innermost(support: constraints.Constraint) -> constraints.Constraint:
    """Returns the constraint on one element that others such as ``constraints.independent`` wrap."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support
