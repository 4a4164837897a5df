"""What a Pyro model and guide must be like, checked on one batch before anything long starts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrovae.distributions import Blocks, MaskedElements, grid, open_unit_interval

__all__ = ["Structure", "check_finite", "evaluation_mode", "inspect", "sample_sites"]

DATA = "data"  # the name of the plate over the data


class Structure(NamedTuple):
    """How the sites of a model and guide lie in plates.

    Args:
        max_plate_nesting: how many dimensions the plates take, from the right.
        data_size: how many data the data plate stands for, which may be more than it holds. None without one.
        problems: per site, why importance weights per datum are undefined.
        sites: the names of the sites of both.
        observed: the names of the model's observed sites.
        latents: the names of the model's latent sites.
        discrete: those of them whose latents are discrete.
        curved: those of them whose space is none that real numbers are mapped to one to one, such as a sphere.
    """

    max_plate_nesting: int
    data_size: int | None
    problems: tuple[str, ...]
    sites: frozenset[str]
    observed: frozenset[str]
    latents: frozenset[str]
    discrete: frozenset[str]
    curved: frozenset[str]


def check_finite(name: str, x: Tensor) -> None:
    """Raises a ValueError that names the argument and the first bad row if x holds NaN or infinity."""
    if not x.is_floating_point() or bool(torch.isfinite(x).all()):
        return
    if x.dim() == 0:
        raise ValueError(f"{name} is {x.item()}. Give a finite number.")
    bad = (~torch.isfinite(x)).reshape(len(x), -1).any(dim=-1)
    raise ValueError(
        f"{name} holds NaN or infinity in {int(bad.sum())} of {len(x)} rows, the first of them row "
        f"{int(bad.nonzero()[0])}. Remove those rows or fill the missing values; a MissingDataVAE takes what "
        "pyrovae.data.split_missing(x) gives."
    )


@contextmanager
def evaluation_mode() -> Iterator[None]:
    """Runs every module that is called inside in ``eval()`` mode, and puts back afterwards what it changed.

    A model and a guide are functions, and their modules cannot be listed; so each is switched as it is called.
    """
    switched: list[nn.Module] = []

    def switch(module: nn.Module, _inputs: Any) -> None:
        for child in module.modules() if module.training else ():
            if child.training:
                child.training = False
                switched.append(child)

    handle = nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()
        for module in switched:
            module.training = True


@contextmanager
def full_precision(devices: Iterable[torch.device]) -> Iterator[None]:
    """Computes what is inside as precisely as its numbers are given, also where autocast is on outside."""
    with ExitStack() as stack:
        for kind in {device.type for device in devices}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:
    """Returns the sample sites of a trace by name, without those that only draw a plate's subsample."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    }


def inspect(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Structure:
    """Runs a model and a guide once on a batch, checks that they fit each other and the data, returns their structure.

    Modules run in evaluation mode and the random state is put back, so that a look changes nothing.

    Raises:
        ValueError: when the guide misses a latent site of the model, or has one that the model lacks; when a site lies
            in different plates in the two; when a site has batch dimensions that no plate declares; when observed
            data has the wrong shape or is outside its distribution's support. The message names the site.
    """
    for name, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{name} must be a Pyro {name}, a function or a module's method; got {function!r}.")
    tensors = {name: t for name, t in named_arguments(args, kwargs) if isinstance(t, Tensor)}
    for name, t in tensors.items():
        check_finite(name, t)
    devices = sorted({t.device for t in tensors.values() if t.is_cuda}, key=str)
    with torch.no_grad(), evaluation_mode(), torch.random.fork_rng(devices):
        guide_sites = sample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        model_trace = poutine.trace(model).get_trace(*args, **kwargs)
    model_sites = sample_sites(model_trace)
    latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}

    for name, site in latents.items():
        if name not in guide_sites and not site["infer"].get("enumerate"):
            raise ValueError(
                f'The guide misses the latent site "{name}" of the model (it has {_names(guide_sites)}). '
                f'Add pyro.sample("{name}", ...) to the guide.'
            )
    for name, site in guide_sites.items():
        if name not in latents and not site["infer"].get("is_auxiliary") and not site["is_observed"]:
            raise ValueError(
                f'The guide samples "{name}", which is no latent site of the model (it has {_names(latents)}). '
                'Rename it, or mark it infer={"is_auxiliary": True}.'
            )
    for name in latents.keys() & guide_sites.keys():
        plates, others = _plates(latents[name]), _plates(guide_sites[name])
        if plates != others:
            raise ValueError(
                f'The plates of site "{name}" differ: {_describe(plates)} in the model, {_describe(others)} in the '
                "guide. Give it the same plates, with the same sizes and dimensions, in both."
            )
    for name, site in [*model_sites.items(), *guide_sites.items()]:
        _check_batch_shape(name, site)
    check_all_observed(model_trace)

    frames = [f for site in [*model_sites.values(), *guide_sites.values()] for f in site["cond_indep_stack"]]
    data = next((frame for frame in frames if frame.name == DATA and frame.vectorized), None)
    return Structure(
        max_plate_nesting=max((-frame.dim for frame in frames if frame.vectorized), default=0),
        data_size=None if data is None else data.full_size or data.size,
        problems=tuple(_problems(model_sites, guide_sites)),
        sites=frozenset(model_sites.keys() | guide_sites.keys()),
        observed=frozenset(model_sites.keys() - latents.keys()),
        latents=frozenset(latents),
        discrete=frozenset(name for name, site in latents.items() if _is_discrete(site["fn"])),
        curved=frozenset(name for name, site in latents.items() if _is_curved(site["fn"])),
    )


def _is_discrete(fn: Any) -> bool:
    try:
        return fn.support.is_discrete
    except NotImplementedError:  # a distribution may leave its support undefined
        return False


def _is_curved(fn: Any) -> bool:
    try:
        biject_to(fn.support)
    except NotImplementedError:
        return not _is_discrete(fn)
    return False


def described(thing: Any) -> str:
    """Returns how an object was built, from the arguments of its class that are its attributes, defaults left out."""
    given = []
    for name, parameter in signature(type(thing)).parameters.items():
        value = getattr(thing, name, parameter.default)
        if not (value is parameter.default or isinstance(value, (int, float, str, tuple)) and value == parameter.default):
            given.append(f"{name}={type(value).__name__ if isinstance(value, nn.Module) else repr(value)}")
    return f"{type(thing).__name__}({', '.join(given)})"


def named_arguments(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns all arguments with the names that messages call them by."""
    return [*((f"argument {i + 1}", value) for i, value in enumerate(args)), *kwargs.items()]


def check_all_observed(trace: poutine.Trace) -> None:
    """Raises a ValueError if an observed value in a trace does not fit its distribution."""
    for name, site in sample_sites(trace).items():
        if site["is_observed"]:
            check_observed(name, site["fn"], site["value"])


class ObservedChecked(Messenger):
    """A Pyro handler that checks the data at every observed site, as :func:`check_observed` does.

    Args:
        later: keep what was found, for :meth:`inside`, and raise nothing: a look at a GPU would have to wait for it.
    """

    def __init__(self, later: bool = False):
        super().__init__()
        self.later = later
        self._inside: list[Tensor] = []

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] or isinstance(msg["fn"], _Subsample) or torch.jit.is_tracing():
            return
        if self.later:
            self._inside.append(_support_check(msg["fn"], msg["value"]).all())
        else:
            check_observed(msg["name"], msg["fn"], msg["value"])

    def inside(self) -> Tensor:
        """Returns whether all data were in the support of their distributions, a tensor."""
        return torch.stack(self._inside).all() if self._inside else torch.ones((), dtype=torch.bool)


def check_observed_by(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> None:
    """Raises a ValueError if what a model observes, at latents of the guide, does not fit its distributions."""
    with torch.no_grad(), pyro.validation_enabled(False):
        latents = poutine.trace(guide).get_trace(*args, **kwargs)
        check_all_observed(poutine.trace(poutine.replay(model, trace=latents)).get_trace(*args, **kwargs))


def check_observed(name: str, fn: Any, value: Tensor, columns: str = "") -> None:
    """Raises a ValueError if an observed value does not have its distribution's shape or is outside its support."""
    base = _unwrapped(fn)
    kind = type(base).__name__
    if fn.event_shape and value.shape[value.dim() - len(fn.event_shape) :] != fn.event_shape:
        raise ValueError(
            f'The data at site "{name}" has shape {tuple(value.shape)}, but its distribution {kind} has events of '
            f"shape {tuple(fn.event_shape)}. Reshape the data, or build the likelihood for that shape."
        )
    if isinstance(base, Blocks):
        for block, x, here in base.split(value):
            last = here.stop - 1
            check_observed(name, block, x, f", column{f's {here.start} to' if here.start < last else ''} {last}")
        return
    inside = _support_check(fn, value)
    if bool(inside.all()):
        return
    space = _innermost(base.support)
    observed = value[fn.mask_of_elements.expand(value.shape)] if isinstance(fn, MaskedElements) else value
    low, high = observed.min().item(), observed.max().item()
    first = int((~inside).nonzero()[:, -1].min()) if inside.dim() else 0  # the data are the last dimension
    raise ValueError(
        f'The data at site "{name}"{columns} is outside the support of {kind}, {space}: it ranges from {low:g} to '
        f"{high:g}, and the first datum outside is number {first} of the batch. {_mending(space)}"
    )


def _support_check(fn: Any, value: Tensor) -> Tensor:
    """Returns where a value is in the support of a distribution; everywhere if it leaves its support undefined."""
    try:
        return fn.support.check(value)
    except NotImplementedError:
        return torch.ones((), dtype=torch.bool, device=value.device)


def _unwrapped(fn: Any) -> Any:
    while isinstance(fn, (torch.distributions.Independent, ExpandedDistribution, MaskedDistribution, MaskedElements)):
        fn = fn.base_dist
    return fn


def _innermost(support: constraints.Constraint) -> constraints.Constraint:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _mending(support: constraints.Constraint) -> str:
    """Says how to bring data into a support."""
    if support is constraints.boolean:
        return (
            "Binarise grey values: anew for each batch with fit(..., transform=pyrovae.data.dynamic_binarization), "
            "once with pyrovae.data.static_binarization(x); on the command line with --preprocessing dynamic or "
            "static. Or use a likelihood of real numbers such as Normal."
        )
    if support is constraints.nonnegative_integer:
        return "Give the raw counts: whole numbers from 0, neither normalised nor logarithms."
    if isinstance(support, type(constraints.integer_interval(0, 1))):
        return (
            f"Number the classes from {support.lower_bound} to {support.upper_bound} in whole numbers, or build the "
            "likelihood with more classes (num_classes)."
        )
    if isinstance(support, grid):
        top = support.levels - 1
        return (
            f"The data must be k / {top} for k from 0 to {top}: divide bytes by 255, round grey values with "
            f"(x * {top}).round() / {top}, or build the likelihood with other levels."
        )
    if support is open_unit_interval:
        return (
            "Scale the data to between 0 and 1, and squeeze values of exactly 0 and 1 inside: (x * (n - 1) + 0.5) / n "
            "for n data."
        )
    if support is constraints.unit_interval:
        return "Scale the data to [0, 1]: divide bytes by 255, or subtract the least value and divide by the range."
    if support is constraints.positive:
        return (
            "Add a floor to data that touches zero, such as x + 1e-6 of its scale; for data that may be negative use a "
            "likelihood of real numbers such as Normal."
        )
    return "Transform the data into the support, or use a likelihood that has it in its support."


def _names(sites: dict[str, dict]) -> str:
    return ", ".join(f'"{name}"' for name in sites) or "none"


def _plates(site: dict) -> dict[str, tuple[int | None, int]]:
    return {frame.name: (frame.dim, int(frame.size)) for frame in site["cond_indep_stack"]}


def _describe(plates: dict[str, tuple[int | None, int]]) -> str:
    return ", ".join(f'plate "{name}" (dim {dim}, size {size})' for name, (dim, size) in plates.items()) or "no plate"


def _check_batch_shape(name: str, site: dict) -> None:
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    shape = site["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] != plates.get(dim, 1):
            raise ValueError(
                f'Site "{name}" has batch shape {tuple(shape)}, but {_describe(_plates(site))}. Put it in a plate '
                f'(with pyro.plate("{DATA}", len(x)): ...) or declare event dimensions with .to_event(n).'
            )


def _problems(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> Iterator[str]:
    for where, sites in (("model", model_sites), ("guide", guide_sites)):
        for name, site in sites.items():
            frames = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
            data = frames.pop(DATA, None)
            if data is None:
                yield f'site "{name}" of the {where} is outside the plate "{DATA}"'
            elif data.dim != -1:
                yield f'the plate "{DATA}" of site "{name}" of the {where} is at dimension {data.dim}, not -1'
            for frame in frames.values():
                if frame.full_size not in (None, frame.size):
                    yield f'site "{name}" of the {where} is in the plate "{frame.name}", which is subsampled'
            if where == "guide" and not site["is_observed"] and isinstance(_unwrapped(site["fn"]), Delta):
                yield f'site "{name}" of the guide is a point (Delta), which has no density'
            if site["infer"].get("is_auxiliary") and not site["is_observed"]:  # pyro.factor is both
                yield f'site "{name}" of the {where} is auxiliary'
    for name in model_sites.keys() - guide_sites.keys():
        if not model_sites[name]["is_observed"]:
            yield f'site "{name}" of the model is enumerated, and the guide does not sample it'
