"""Sample sites of a Pyro trace: their distributions, their plates, and the data in them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.distributions import MaskedElements, Stacked
from pyrovae.distributions.bijections import bijection
from pyrovae.distributions.spaces import innermost

_WRAPPERS = (torch.distributions.Independent, ExpandedDistribution, MaskedDistribution, MaskedElements)


class DataPlate(NamedTuple):
    """The plate over the data.

    Args:
        names: its names; a guide may name it otherwise than its model.
        dim: its dimension, counted from the right, negative.
    """

    names: frozenset[str]
    dim: int

    def frame(self, site: dict) -> CondIndepStackFrame | None:
        """Returns this plate's frame of a site, with its size; None if the site is outside of the plate."""
        for frame in site["cond_indep_stack"]:
            if frame.dim == self.dim and frame.name in self.names:
                return frame if frame.size >= 0 else frame._replace(size=plate_sizes(site)[self.dim], full_size=None)
        return None

    def check_in_order(self, drawn: int, size: int) -> None:
        """Raises a ValueError unless the plate drew all data, because results are returned in the order of the data."""
        if drawn != size:
            raise ValueError(
                f"The plate {self} drew {drawn} of {size} data. Results are returned in the order of the data, which "
                'lie along the first dimension: use pyro.plate("data", len(x)), or pyro.plate("data", total, '
                "subsample=x)."
            )

    def __str__(self) -> str:
        return f'"{min(self.names)}"'


class SharedSitesScaled(Messenger):
    """Multiplies the log-probabilities of sites outside of the data plate by a share.

    Where a batch is cut into parts, each part has the term of a latent that all data share, of a prior of parameters or
    of a factor outside of the plate, which belongs to the batch once: the shares of all parts sum to one.

    Args:
        plate: the plate over the data.
        share: of the data that a part has.
    """

    def __init__(self, plate: DataPlate, share: float):
        super().__init__()
        self.plate, self.share = plate, share

    def _pyro_sample(self, msg: Any) -> None:
        frames = msg["cond_indep_stack"]
        if any(frame.dim == self.plate.dim and frame.name in self.plate.names for frame in frames):
            return
        if "_enumerate_dim" in msg["infer"]:
            raise ValueError(
                f'Site "{msg["name"]}" is outside of the plate over the data, and is summed over: a batch cannot be '
                "cut into parts then. Leave micro_batch_size out, and train in one process."
            )
        msg["scale"] = msg["scale"] * self.share


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:
    """Returns the sample sites of a trace by name, without subsamples of plates and ``pyro.deterministic`` values."""
    nodes: Mapping[str, Any] = trace.nodes  # Pyro's type of a site leaves open what sample sites are sure to have
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("_deterministic")
    }


def latents_of_trace(trace: poutine.Trace) -> poutine.Trace:
    """Returns a trace without its observed sites, to replay a model at its latents."""
    latents = trace.copy()
    for name, site in sample_sites(trace).items():
        if site["is_observed"]:
            latents.remove_node(name)
    return latents


def is_data(site: dict) -> bool:
    """Whether a site observes data, which a factor does not."""
    return site["is_observed"] and not site["infer"].get("is_auxiliary")


def is_masked(site: dict) -> bool:
    """Whether a mask, around a site or inside of its distribution, hides some of it."""
    masks = [site["mask"], *(getattr(fn, "_mask", None) for fn in layers(site["fn"]))]
    return any(mask is not None and not bool(torch.as_tensor(mask).all()) for mask in masks)


def mask_around(site: dict) -> tuple[Any, Any]:
    """Returns the mask of a site, of handlers and of its whole distribution, and the distribution without it."""
    mask, fn = site["mask"], site["fn"]
    while True:
        own: Any
        if isinstance(fn, MaskedDistribution):
            own, fn = fn._mask, fn.base_dist
        elif isinstance(fn, Stacked) and all(isinstance(part, MaskedDistribution) for part in fn.parts):
            own = torch.stack([torch.as_tensor(part._mask).expand(fn.batch_shape[1:]) for part in fn.parts])
            fn = Stacked([part.base_dist for part in fn.parts], len(fn.batch_shape) - 1)
        else:
            return mask, fn
        mask = own if mask is None else own & mask


def masks_differ(a: dict, b: dict, *, inside: bool = False) -> bool:
    """Whether two sites have other masks around them, or inside of their distributions.

    A mask that hides nothing here may hide something of other data, so that it counts too.
    """
    masks = []
    for mask, fn in map(mask_around, (a, b)):
        found = [getattr(layer, "_mask", None) for layer in layers(fn)] if inside else [mask]
        masks.append([torch.as_tensor(mask) for mask in found if mask is not None and mask is not True])
    if len(masks[0]) != len(masks[1]):
        return True
    return any(not _same_where_broadcast(m, n) for m, n in zip(*masks, strict=True))


def _same_where_broadcast(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(*torch.broadcast_tensors(a, b))
    except RuntimeError:  # shapes that do not fit
        return False


def without_mask(fn: Any) -> Any:
    """Returns a distribution without the masks inside of it; itself where there are none."""
    if not any(isinstance(layer, MaskedDistribution) for layer in layers(fn)):
        return fn
    if isinstance(fn, MaskedDistribution):
        return without_mask(fn.base_dist)
    if isinstance(fn, Stacked):
        return Stacked([without_mask(part) for part in fn.parts], len(fn.batch_shape) - 1)
    if isinstance(fn, ExpandedDistribution):
        return without_mask(fn.base_dist).expand(fn.batch_shape)
    if isinstance(fn, torch.distributions.Independent):
        return without_mask(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    raise ValueError(f"a {type(fn).__name__} of a masked distribution: mask it by poutine.mask, or after it is made.")


def is_discrete(fn: Any) -> bool:
    """Whether a distribution has a discrete support; False if its support is undefined."""
    try:
        return fn.support.is_discrete
    except NotImplementedError:
        return False


def has_moves(fn: Any) -> bool:
    """Whether annealing can move latents of a continuous distribution: on a sphere, or by a bijection from R^n."""
    try:
        if not is_sphere(fn.support):
            bijection(fn.support)
    except NotImplementedError:
        return False
    return True


def is_sphere(support: constraints.Constraint) -> bool:
    """Whether a support is a sphere, or several."""
    return isinstance(innermost(support), type(constraints.sphere))


def in_support(fn: Any, value: Tensor) -> Tensor:
    """Returns where a value is in the support of a distribution; everywhere if its support is undefined."""
    try:
        return fn.support.check(value)
    except NotImplementedError:
        return torch.ones((), dtype=torch.bool, device=value.device)
    except RuntimeError:  # of a support that depends on parameters of more draws, as that of MaskedMixture
        return fn.support.check(value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)))


def num_reals(site: dict) -> int:
    """Returns how many real numbers the bijection to the support of a site maps to its value."""
    shape = site["fn"].batch_shape + site["fn"].event_shape
    try:
        return biject_to(site["fn"].support).inverse_shape(shape).numel()
    except NotImplementedError:
        return shape.numel()


def layers(fn: Any) -> list:
    """Returns a distribution and all distributions inside of it, outermost first; of a stack, the first one's.

    >>> [type(layer).__name__ for layer in layers(torch.distributions.LogNormal(torch.zeros(2), 1.0))]
    ['LogNormal', 'Normal']
    """
    inner = fn.parts[0] if isinstance(fn, Stacked) else getattr(fn, "base_dist", None)
    return [fn] if inner is None else [fn, *layers(inner)]


def unwrapped(fn: Any) -> Any:
    """Returns a distribution without ``Independent``, ``expand`` and masks around it; of a stack, the first one.

    >>> unwrapped(torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1))
    Normal(loc: torch.Size([2]), scale: torch.Size([2]))
    """
    while isinstance(fn, (*_WRAPPERS, Stacked)):
        fn = fn.parts[0] if isinstance(fn, Stacked) else fn.base_dist
    return fn


def independent_elements(fn: Any) -> Any | None:
    """Returns the distribution of the independent elements of an event, as elements of its batch; None without.

    >>> independent_elements(torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1))
    Normal(loc: torch.Size([2]), scale: torch.Size([2]))
    """
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def plate_sizes(site: dict) -> dict[int, int]:
    """Returns the sizes of a site's plates by dimension; a plate without a size takes it from the site's value."""
    sizes = {frame.dim: int(frame.size) for frame in site["cond_indep_stack"] if frame.vectorized}
    shape = torch.Size()
    if site["value"] is not None and min(sizes.values(), default=0) < 0:
        shape = site["value"].shape[: site["value"].dim() - len(site["fn"].event_shape)]
    shape = torch.broadcast_shapes(shape, site["fn"].batch_shape)
    return {dim: size if size >= 0 else shape[dim] if len(shape) >= -dim else 1 for dim, size in sizes.items()}


def full_sizes(site: dict) -> dict[int, int]:
    """Returns the full sizes of a site's plates by dimension, larger than their sizes where they are subsampled."""
    full = {frame.dim: int(frame.full_size or -1) for frame in site["cond_indep_stack"] if frame.vectorized}
    return {dim: full[dim] if full[dim] >= 0 else size for dim, size in plate_sizes(site).items()}


def describe_plates(site: dict) -> str:
    """Returns the plates of a site in words, for messages."""
    sizes = full_sizes(site)
    plates = [f'plate "{f.name}" (dim {f.dim}, size {sizes.get(f.dim, f.size)})' for f in site["cond_indep_stack"]]
    return ", ".join(plates) or "no plate"
