"""Supports of latents that no bijection maps to real numbers: spheres, values that can be listed, and integers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions import Flattened
from pyrovae.distributions.spaces import innermost
from pyrovae.inference.sites import is_masked, unwrapped

_MANY = 64  # values of one integer, above which it is moved by steps


class Sphere(NamedTuple):
    """Unit vectors.

    Args:
        size: of one vector.
    """

    size: int


class Classes(NamedTuple):
    """Latents with finitely many values, each written as the number of its value.

    Args:
        values: the values of one latent, ``(num_values, *event)``.
    """

    values: Tensor

    def encode(self, values: Tensor) -> Tensor:
        """Returns the numbers of some values, ``(*leading, *event)``; raises a ValueError for any other value."""
        event = list(range(1 - self.values.dim(), 0))
        numbers = torch.full(values.shape[: values.dim() - len(event)], -1, device=values.device)
        for number, value in enumerate(self.values):  # one by one: all at once may not fit in memory
            equal = values == value
            numbers[equal.all(dim=event) if event else equal] = number
        if bool((numbers < 0).any()):
            raise ValueError("the guide draws discrete latents that are no values of the model's distribution.")
        return numbers

    def decode(self, numbers: Tensor) -> Tensor:
        """Returns the values with some numbers."""
        return self.values[numbers.round().long()]


class Counts(NamedTuple):
    """Integers between bounds, which may be infinite.

    Args:
        low: the lowest integers, ``(batch, columns)``.
        high: the highest.
        dtype: of the values.
    """

    low: Tensor
    high: Tensor
    dtype: torch.dtype

    def decode(self, numbers: Tensor) -> Tensor:
        return numbers.round().to(self.dtype)


class Listed(NamedTuple):
    """The values that the latents of a site can take, and the number of latents per datum.

    Args:
        values: the values of one latent, shape ``(num_values, *event)``.
        cells: latents per datum.
        shape: shape of the latents of one datum, ``(*plates, 1, *event)``, with 1 in the place of the data plate.
    """

    values: Tensor
    cells: int
    shape: tuple[int, ...]

    def is_of(self, fn: Any) -> bool:
        """Whether the latents of a distribution take these values."""
        try:
            values = list_values(fn)
        except NotImplementedError:
            return False
        return values.shape == self.values.shape and bool((values == self.values).all())


class Combinations(NamedTuple):
    """All combinations of the values that discrete latents of a datum can take, numbered from 0.

    Args:
        sites: the values of each site.
        nodes: the sites, in a trace of several draws.
        place: dimension of the data in a value of shape ``(num_samples, *plates, *event)``.
        only: the number of the single one that is meant; None for all.
    """

    sites: dict[str, Listed]
    nodes: Mapping[str, dict]
    place: int
    only: int | None = None

    @classmethod
    def of(cls, nodes: Mapping[str, dict], place: int) -> "Combinations":
        """Returns those of some sites in a trace of several draws; raises a ValueError if they cannot be listed."""
        return cls({name: _listed(name, node, place) for name, node in nodes.items()}, nodes, place)

    @property
    def total(self) -> int:
        """Their number, an integer of Python: it may be very large."""
        if self.only is not None:
            return 1
        return math.prod(len(site.values) ** site.cells for site in self.sites.values())

    @property
    def written(self) -> str:
        """Their number for a message."""
        return f"{self.total:,}" if self.total < 10**9 else f"about 10^{math.log10(self.total):.0f}"

    def values(self, numbers: Tensor, size: int) -> dict[str, Tensor]:
        """Returns the values of the combinations with some numbers, for a number of data; a latent is a digit."""
        assigned = {}
        numbers = numbers if self.only is None else torch.full_like(numbers, self.only)
        for name, site in self.sites.items():
            digits = []
            for _ in range(site.cells):
                digits.append(numbers % len(site.values))
                numbers = numbers // len(site.values)
            values = site.values[torch.stack(digits, dim=1).to(site.values.device)]  # (draws, cells, *event)
            values = values.reshape(len(values), *site.shape)
            full = list(values.shape)
            full[self.place] = size
            assigned[name] = values.expand(full)
        return assigned

    def check(self, nodes: Mapping[str, dict]) -> None:
        """Raises a ValueError if the sites, in a trace of other data, take other values."""
        for name, listed in self.sites.items():
            if not listed.is_of(nodes[name]["fn"]):
                raise ValueError(
                    f'the values that the latents at site "{name}" can take are not the same for all data. Score '
                    "those with the same values together; or take AnnealedImportanceSampling()."
                )


def check_unmasked(name: str, site: dict) -> None:
    """Raises a ValueError if the latents of a site are masked for some data."""
    if is_masked(site):
        raise ValueError(
            f'the latents at site "{name}" are masked for some data, so that they have no density to '
            "integrate. Take ImportanceSampling(), which sums over them exactly if the guide leaves them to the model."
        )


def _listed(name: str, site: dict, place: int) -> Listed:
    fn = site["fn"]
    try:
        values = list_values(fn)
    except NotImplementedError:
        raise ValueError(
            f'the latents at site "{name}" ({type(base_distribution(fn)).__name__}) have no values that can be listed. '
            "Take AnnealedImportanceSampling()."
        ) from None
    event = values.shape[1:]
    shape = tuple(1 if i == place else n for i, n in enumerate(fn.batch_shape) if i > 0) + tuple(fn.event_shape)
    return Listed(values, math.prod(shape) // math.prod(event), shape)


def list_values(fn: Any) -> Tensor:
    """Returns the values of one of the latents of a distribution, ``(num_values, *event)``.

    Raises:
        NotImplementedError: when they cannot be listed.
    """
    base = base_distribution(fn)
    values = base.enumerate_support(expand=False)
    return values.reshape(len(values), *base.event_shape)


def base_distribution(fn: Any) -> Any:
    """Returns the distribution of one of the latents that ``Independent``, :class:`Flattened`, masks, ... wrap."""
    while True:
        inner = fn.base_dist if isinstance(fn, Flattened) else unwrapped(fn)
        if inner is fn:
            return fn
        fn = inner


def discrete_support(site: dict, place: int) -> Classes | Counts | None:
    """Returns the support of discrete latents; None if it is neither listed nor an interval of integers.

    Args:
        site: the site of a single draw, of batch shape ``(1, *plates)``, the data plate among them.
        place: dimension of the data plate.
    """
    fn, value = site["fn"], site["value"]
    support = fn.support
    inner = innermost(support)
    has_bounds = hasattr(inner, "lower_bound") or hasattr(inner, "upper_bound")
    is_integer = inner is constraints.integer or (has_bounds and inner.event_dim == 0)
    try:
        values = list_values(fn)
    except NotImplementedError:
        values = None
    if values is not None and (len(values) <= _MANY or not is_integer):
        return Classes(values)
    if not is_integer:
        return None
    shape = fn.batch_shape + getattr(support, "event_shape", fn.event_shape)

    def bound(name: str, default: float) -> Tensor:
        limit = torch.as_tensor(getattr(inner, name, default), dtype=torch.double, device=value.device)
        limit = limit.expand(shape).movedim(place, 1)
        return limit.reshape(limit.shape[1], -1)

    return Counts(bound("lower_bound", -math.inf), bound("upper_bound", math.inf), value.dtype)


def sphere(fn: Any) -> Sphere:
    """Returns the support of latents on spheres."""
    return Sphere(getattr(fn.support, "event_shape", fn.event_shape)[-1])
