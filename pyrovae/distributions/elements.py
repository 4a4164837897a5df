"""Distributions made of others: several stacked, blocks of a vector, and data with elements left out."""

import itertools
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions.continuous import BatchScaleNormal
from pyrovae.distributions.counts import Multinomial
from pyrovae.distributions.spaces import ShapeLike, support_of


def center(p: dist.TorchDistribution) -> Tensor:
    """Returns the mean of a distribution, or its mode where it has no finite mean (classes, heavy tails).

    Of sequences that are drawn step by step, which have neither, it returns the greedy sequence.

    >>> center(dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
    tensor(2.)
    """
    if hasattr(p, "greedy"):
        return p.greedy()
    mean = p.mean
    return mean if bool(torch.isfinite(mean).all()) else torch.where(torch.isfinite(mean), mean, p.mode.to(mean.dtype))


class Stacked(dist.TorchDistribution):
    r"""Several distributions of one shape, stacked along a new dimension to the left of the plates.

    .. math:: p(x_1, \dots, x_K) = \prod_k p_k(x_k)

    Args:
        parts: the distributions.
        depth: number of plate dimensions to the right of the new one.

    >>> p = Stacked([dist.Normal(torch.zeros(5), 1.0), dist.Normal(torch.ones(5), 1.0)], depth=1)
    >>> p.log_prob(torch.tensor([[0.0], [1.0]])).shape
    torch.Size([2, 5])
    """

    arg_constraints = {}

    def __init__(self, parts: Sequence[dist.TorchDistribution], depth: int):
        self.parts = tuple(parts)
        self.has_rsample = all(part.has_rsample for part in self.parts)
        plates = torch.broadcast_shapes(*(part.batch_shape for part in self.parts))
        shape = torch.Size((len(self.parts), *(1,) * (depth - len(plates)), *plates))
        super().__init__(shape, self.parts[0].event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return support_of(self.parts[0])

    @property
    def mean(self) -> Tensor:
        return self._stack([part.mean for part in self.parts], self.event_shape)

    @property
    def mode(self) -> Tensor:
        return self._stack([part.mode for part in self.parts], self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self._stack([part.variance for part in self.parts], self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        event = self.event_shape
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + event))
        each = value.unbind(value.dim() - len(event) - len(self.batch_shape))
        return self._stack([part.log_prob(x) for part, x in zip(self.parts, each, strict=True)], torch.Size(), value)

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self._draw("rsample", torch.Size(sample_shape))

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self._draw("sample", torch.Size(sample_shape))

    def _draw(self, how: str, sample_shape: torch.Size) -> Tensor:
        shape = sample_shape + self.batch_shape[1:] + self.event_shape
        draws = [getattr(part, how)(sample_shape) for part in self.parts]
        # A part may have fewer plate dimensions: ones go between the sample dimensions and its own.
        aligned = [
            x.reshape(sample_shape + (1,) * (len(shape) - x.dim()) + x.shape[len(sample_shape) :]) for x in draws
        ]
        return torch.stack([x.expand(shape) for x in aligned], dim=len(sample_shape) - len(shape) - 1)

    def _stack(self, each: list[Tensor], event: torch.Size, value: Tensor | None = None) -> Tensor:
        """Stacks one tensor a part, with the sample dimensions of `value` in front."""
        outer = torch.Size() if value is None else value.shape[: value.dim() - len(self.batch_shape + self.event_shape)]
        shape = outer + self.batch_shape[1:] + event
        return torch.stack([x.expand(shape) for x in each], dim=len(outer))


class Blocks(dist.TorchDistribution):
    r"""Independent distributions of vectors, concatenated to one vector.

    .. math:: p(x) = \prod_b p_b(x_b), \qquad x = [x_1, \dots, x_B]

    Its mean is the :func:`center` of each block: the mode for classes.

    Args:
        blocks: the distributions, each of events with one dimension.

    >>> p = Blocks([dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Bernoulli(torch.full((1,), 0.9)).to_event(1)])
    >>> p.event_shape, p.mean
    (torch.Size([3]), tensor([0.0000, 0.0000, 0.9000]))
    """

    arg_constraints = {}

    def __init__(self, blocks: Sequence[dist.TorchDistribution], validate_args: bool | None = None):
        batch_shape = torch.broadcast_shapes(*(p.batch_shape for p in blocks))
        self.blocks = [p if p.batch_shape == batch_shape else p.expand(batch_shape) for p in blocks]
        self.sizes = [p.event_shape[0] for p in blocks]
        super().__init__(batch_shape, torch.Size([sum(self.sizes)]), validate_args=validate_args)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        return _BlocksConstraint(self)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Blocks":
        return Blocks([p.expand(batch_shape) for p in self.blocks], False)

    def split(self, x: Tensor) -> list[tuple[dist.TorchDistribution, Tensor, slice]]:
        """Returns for each block its distribution, its columns of x, and the slice of these columns."""
        ends = list(itertools.accumulate(self.sizes))
        slices = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [(p, x[..., columns], columns) for p, columns in zip(self.blocks, slices, strict=True)]

    def log_prob(self, value: Tensor) -> Tensor:
        return reduce(operator.add, (p.log_prob(x) for p, x, _ in self.split(value)))

    @property
    def mean(self) -> Tensor:
        return torch.cat([center(p) for p in self.blocks], dim=-1)

    @property
    def variance(self) -> Tensor:
        return torch.cat([p.variance for p in self.blocks], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return torch.cat([p.sample(sample_shape) for p in self.blocks], dim=-1)


class _BlocksConstraint(constraints.Constraint):
    """The columns of each block are in the support of that block."""

    event_dim = 1

    def __init__(self, p: Blocks):
        super().__init__()
        self.p = p
        self.supports = [support_of(block) for block in p.blocks]
        self.is_discrete = all(support.is_discrete for support in self.supports)

    def check(self, value: Tensor) -> Tensor:
        pairs = zip(self.supports, self.p.split(value), strict=True)
        return torch.stack([support.check(x) for support, (_, x, _) in pairs]).all(0)

    def __repr__(self) -> str:
        return f"blocks({', '.join(map(repr, self.supports))})"


def mask_elements(p: dist.TorchDistribution, mask: Tensor) -> dist.TorchDistribution:
    r"""Returns the distribution of the observed elements of a datum; the other elements are left out.

    .. math:: \log p(x_o) = \sum_{d \in o} \log p(x_d)

    This holds for distributions with independent elements. For :class:`Multinomial` it is the distribution of the
    observed counts given their sum. The elements left out may be NaN or outside the support, and get no gradient.
    Samples and the mean are those of the whole distribution.

    Args:
        p: a distribution of independent elements (``.to_event(n)`` of one without event dimensions), a
            :class:`Multinomial`, or :class:`Blocks` of them.
        mask: True where an element is observed; broadcasts with ``p.batch_shape + p.event_shape``.

    Raises:
        ValueError: when the mask is not boolean, or its shape does not fit the distribution's.
        TypeError: when the elements of `p` are not declared independent.

    >>> p = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    >>> mask_elements(p, torch.tensor([True, False, False])).log_prob(torch.tensor([0.0, torch.nan, 9.0]))
    tensor(-0.9189)
    """
    whole = p.batch_shape + p.event_shape
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True where an element is observed, got {mask.dtype}.")
    try:
        shape = torch.broadcast_shapes(mask.shape, whole)
    except RuntimeError:
        shape = None
    cut = None if shape is None else len(shape) - len(p.event_shape)
    if shape is None or shape[cut:] != p.event_shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, which does not broadcast with {tuple(p.batch_shape)} distributions "
            f"of events of shape {tuple(p.event_shape)}. Give one boolean an element: (..., *{tuple(p.event_shape)})."
        )
    if shape != whole:
        p = p.expand(shape[:cut])
    mask = mask.expand(shape)
    if isinstance(p, Blocks):
        return Blocks([mask_elements(block, columns) for block, columns, _ in p.split(mask)])
    if isinstance(p, Multinomial):
        return MaskedElements(p, Multinomial(p.total_count, p.logits, len(p.event_shape), mask), mask)
    elements = p
    while isinstance(elements, torch.distributions.Independent):
        elements = elements.base_dist
    if elements.event_shape or elements.batch_shape != shape or isinstance(elements, MaskedElements):
        raise TypeError(
            f"mask_elements needs a distribution of independent elements, got {type(elements).__name__}. Use a "
            "distribution without event dimensions and .to_event(n)."
        )
    if isinstance(elements, BatchScaleNormal):
        elements = BatchScaleNormal(elements.loc, elements.scale, elements.learn, mask)
    return MaskedElements(p, elements, mask)


class MaskedElements(dist.TorchDistribution):
    r"""A distribution with elements left out, as :func:`mask_elements` returns it.

    .. math:: \log p(x_o) = \sum_{d \in o} \log p(x_d)

    Args:
        base_dist: the whole distribution, for samples and moments.
        observed: the distribution that scores the observed elements: `base_dist` without its event dimensions, or a
            :class:`Multinomial` of the observed counts.
        mask: True where an element is observed, shape ``base_dist.batch_shape + base_dist.event_shape``.

    >>> p = mask_elements(dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.tensor([True, False]))
    >>> type(p).__name__, p.log_prob(torch.zeros(2))
    ('MaskedElements', tensor(-0.9189))
    """

    arg_constraints = {}

    def __init__(self, base_dist: dist.TorchDistribution, observed: dist.TorchDistribution, mask: Tensor):
        self.base_dist, self.observed, self.mask_of_elements = base_dist, observed, mask
        self.has_rsample = base_dist.has_rsample
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> "_ObservedConstraint":
        return _ObservedConstraint(self)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> dist.TorchDistribution:
        mask = self.mask_of_elements.expand(torch.Size(batch_shape) + self.event_shape)
        return mask_elements(self.base_dist.expand(batch_shape), mask)

    def log_prob(self, value: Tensor) -> Tensor:
        filler = getattr(self.observed, "filler", None)  # Columns have one of each column
        filler = self._filler(value.dtype) if filler is None else filler.to(value.dtype)
        log_prob = self.observed.log_prob(torch.where(self.mask_of_elements, value, filler))
        if self.observed.event_shape:
            return log_prob
        log_prob = torch.where(self.mask_of_elements, log_prob, 0.0)
        return log_prob.flatten(log_prob.dim() - len(self.event_shape)).sum(-1) if self.event_shape else log_prob

    def _filler(self, dtype: torch.dtype) -> float:
        """Returns a number inside the support, for the elements left out: outside, gradients may be NaN."""
        elements = self.support.elements
        for number in (0.5, 1.0, 0.0):
            if bool(elements.check(torch.tensor(number).to(dtype)).all()):
                return number
        raise TypeError(
            f"mask_elements puts 0, 1/2 or 1 in place of elements left out, but none of them is in {elements}. Scale "
            "the data so that one is."
        )

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def mode(self) -> Tensor:
        return self.base_dist.mode

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self.base_dist.rsample(sample_shape)


class _ObservedConstraint(constraints.Constraint):
    """The observed elements are in the support of their distribution; the others may be anything."""

    def __init__(self, p: MaskedElements):
        super().__init__()
        support = support_of(p.observed)
        self.elements = getattr(support, "base_constraint", support)
        self.mask, self.event_dim, self.is_discrete = p.mask_of_elements, len(p.event_shape), support.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inside = self.elements.check(value) | ~self.mask
        return inside.flatten(inside.dim() - self.event_dim).all(-1) if self.event_dim else inside

    def __repr__(self) -> str:
        return f"observed({self.elements!r})"
