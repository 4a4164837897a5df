"""What a Pyro model and guide must be like, checked on one batch before anything long starts."""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from inspect import signature
from numbers import Integral
from types import FunctionType
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, GammaPoisson, ImproperUniform, MaskedDistribution, constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrovae.arguments import count_data, cuda_devices, named_tensors, row_name, types_explained
from pyrovae.distributions import Blocks, MaskedElements, Stacked, grid, open_unit_interval

__all__ = ["SiteStructure", "check_finite", "evaluation_mode", "inspect", "sample_sites"]

_WRAPPERS = (torch.distributions.Independent, ExpandedDistribution, MaskedDistribution, MaskedElements)
named_plate: ContextVar[str | None] = ContextVar("named_plate", default=None)  # by data_plate, inside of it
DATA = "data"  # a plate of this name holds the data, whatever other plates there are
_LOST = 0.01  # nats a datum that rounding may take


@contextmanager
def data_plate(name: str) -> Iterator[None]:
    """Says which plate holds the data, for all that runs inside; it is found without in all but a few models.

    Args:
        name: of the plate, in the model.

    Raises:
        ValueError: inside, when the model has no such plate over an observed site.

    >>> with data_plate("documents"):
    ...     pass  # fit(model, guide, documents), log_marginal(model, guide, documents), a diagnostic
    """
    token = named_plate.set(name)
    try:
        yield
    finally:
        named_plate.reset(token)


class DataPlate(NamedTuple):
    """The plate over the data.

    Args:
        names: its names; a guide may have another than its model.
        dim: its dimension, counted from the right, negative.
    """

    names: frozenset[str]
    dim: int

    def frame(self, site: dict) -> CondIndepStackFrame | None:
        """Returns the frame of this plate that a site stands in, with its size; None if it stands outside."""
        for frame in site["cond_indep_stack"]:
            if frame.dim == self.dim and frame.name in self.names:
                return frame if frame.size >= 0 else frame._replace(size=_plate_sizes(site)[self.dim], full_size=None)
        return None

    def check_in_order(self, drawn: int, size: int) -> None:
        """Raises a ValueError unless as many data were drawn as were given, for results come in their order."""
        if drawn != size:
            raise ValueError(
                f"The plate {self} drew {drawn} of {size} data that it was given. Results come in the order of the data: use "
                'pyro.plate("data", len(x)), or pyro.plate("data", total, subsample=x).'
            )

    def __str__(self) -> str:
        return f'"{min(self.names)}"'


class SiteStructure(NamedTuple):
    """How the sites of a model and guide lie in plates.

    Args:
        max_plate_nesting: how many dimensions the plates take, from the right.
        data: the plate over the data. None without one.
        data_size: how many data that plate stands for, which may be more than it holds. None without one.
        problems: per site, why importance weights per datum are undefined.
        sites: the names of the sites of both.
        observed: the names of the model's observed sites.
        latents: the names of the model's latent sites.
        discrete: those of them whose latents are discrete.
        curved: those of them whose space is none that real numbers are mapped to one to one, such as a sphere.
        extra: the names of the guide's observed sites and factors, which are no part of q.
        auxiliary: the names of the guide's latent sites that the latents of the model are computed from.
        given: the names of the model's observed sites outside of the data plate, such as a conditioned global latent.
        unvalidated: the names of the observed sites whose distributions were built with ``validate_args=False``, and
        outside: those of them with data outside of their support.
        vectorized: whether many samples may be drawn at once; otherwise they are drawn one by one.
    """

    max_plate_nesting: int
    data: DataPlate | None
    data_size: int | None
    problems: tuple[str, ...]
    sites: frozenset[str]
    observed: frozenset[str]
    latents: frozenset[str]
    discrete: frozenset[str]
    curved: frozenset[str]
    extra: frozenset[str]
    auxiliary: frozenset[str]
    given: frozenset[str]
    unvalidated: frozenset[str]
    outside: frozenset[str]
    vectorized: bool = True

    @property
    def data_index(self) -> int:
        """The dimension of the data in a value whose first dimension is the samples' and whose others are the plates'."""
        return self.max_plate_nesting + 1 + (-1 if self.data is None else self.data.dim)


def warn(text: str) -> None:
    """Warns, and says that it is of the line that called the library."""
    frame, level = sys._getframe(1), 2
    inner = ("pyrovae", "pyro", "torch", "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_masked(site: dict) -> bool:
    """Whether a mask, around a site or inside of its distribution, hides some of it."""
    fn, masks = site["fn"], [site["mask"]]
    fn = fn.parts[0] if isinstance(fn, Stacked) else fn
    while fn is not None:
        masks.append(getattr(fn, "_mask", None))
        fn = getattr(fn, "base_dist", None)
    return any(mask is not None and not bool(torch.as_tensor(mask).all()) for mask in masks)


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
    """Returns the sample sites of a trace by name, without a plate's subsamples and values that are only recorded."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("_deterministic")
    }


def traced(function: Callable, draws: poutine.Trace | None, *args: Any, **kwargs: Any) -> poutine.Trace:
    """Runs a model or a guide, at the latents and subsamples of another trace if there is one; returns its trace."""
    # Handlers as contexts, not wrappers: a wrapped function could not take an argument of the name "context".
    with poutine.trace() as tracer, poutine.replay(trace=draws) if draws is not None else nullcontext():
        function(*args, **kwargs)
    return tracer.trace


def inspect(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> SiteStructure:
    """Runs a guide, and a model at its latents, on a batch; checks that they fit; returns their structure.

    Modules run in evaluation mode and the random state is put back, so that a look changes nothing. The data plate is
    the one named "data", or the one that all observed sites share and whose size is the number of data.

    Raises:
        ValueError: when the guide misses a latent site of the model, or has one that the model lacks; when a site lies
            in different plates in the two; when a site has batch dimensions that no plate declares; when observed
            data has the wrong shape or is outside its distribution's support. The message names the site.
    """
    for name, function in (("model", model), ("guide", guide)):
        if not callable(function):
            raise TypeError(f"{name} must be a Pyro {name}, a function or a module's method; got {function!r}.")
    tensors = named_tensors(args, kwargs)
    for name, t in tensors:
        check_finite(name, t)
    devices = cuda_devices(t for _, t in tensors)
    with torch.no_grad(), evaluation_mode(), torch.random.fork_rng(devices), types_explained(args, kwargs):
        guide_trace = traced(guide, None, *args, **kwargs)
        guide_sites = sample_sites(guide_trace)
        try:
            model_sites = sample_sites(traced(model, latents_of_trace(guide_trace), *args, **kwargs))
        except Exception as error:
            alone = {}
            with suppress(Exception):  # a run by itself may show what does not fit
                alone = sample_sites(traced(model, None, *args, **kwargs))
            if alone:
                _check_fit(alone, guide_sites)
            raise error
    _check_fit(model_sites, guide_sites)
    latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    if not latents.keys() < model_sites.keys() and any(_is_data(site) for site in guide_sites.values()):
        raise ValueError("the model observes nothing, but the guide does. Were model and guide swapped?")

    for name, site in [*model_sites.items(), *guide_sites.items()]:
        _check_batch_shape(name, site)
    unvalidated = frozenset(
        name for name, site in model_sites.items() if site["is_observed"] and _is_unvalidated(site["fn"])
    )
    for name, site in model_sites.items():
        if site["is_observed"] and name not in unvalidated:
            check_observed(name, site["fn"], site["value"])
            base = unwrapped(site["fn"])
            blocks = base.split(site["value"]) if isinstance(base, Blocks) else [(site["fn"], site["value"], None)]
            for fn, value, _ in blocks:
                if _is_discrete(fn):
                    check_mass(name, fn, fn.log_prob(value))
            _warn_of_large_counts(name, site["fn"], site["value"])

    rows = None
    with suppress(ValueError):  # nothing says how many there are
        rows = count_data(args, kwargs)
    holding = _holding_data(model_sites, args, kwargs)
    data, unclear = _data_plate(model_sites, guide_sites, rows, holding)
    frames = [f for site in [*model_sites.values(), *guide_sites.values()] for f in site["cond_indep_stack"]]
    own = [f for f in map(data.frame, [*model_sites.values(), *guide_sites.values()]) if f is not None] if data else []
    given = frozenset(
        name
        for name, site in model_sites.items()
        if data and data.frame(site) is None and _is_data(site) and not any(site is held for held in holding)
    )
    if any(rows in model_sites[name]["value"].shape for name in given):
        # A value that all data share is the same in each run; what a run makes of the data is another each time.
        with torch.no_grad(), evaluation_mode(), torch.random.fork_rng(devices):
            again = traced(model, latents_of_trace(guide_trace), *args, **kwargs)
        given = frozenset(name for name in given if again.nodes[name]["value"] is model_sites[name]["value"])
    found = _problems(model_sites, guide_sites, data, given)
    return SiteStructure(
        max_plate_nesting=max((-frame.dim for frame in frames if frame.vectorized), default=0),
        data=data,
        data_size=own[0].full_size or own[0].size if own else None,
        problems=(unclear,) if unclear else tuple(found),
        sites=frozenset(model_sites.keys() | guide_sites.keys()),
        observed=frozenset(model_sites.keys() - latents.keys()),
        latents=frozenset(latents),
        discrete=frozenset(name for name, site in latents.items() if _is_discrete(site["fn"])),
        curved=frozenset(name for name, site in latents.items() if _is_curved(site["fn"])),
        extra=frozenset(name for name, site in guide_sites.items() if site["is_observed"]),
        auxiliary=frozenset(
            name for name, site in guide_sites.items() if site["infer"].get("is_auxiliary") and not site["is_observed"]
        ),
        given=given,
        unvalidated=unvalidated,
        outside=frozenset(
            name
            for name in unvalidated
            if not _support_check(model_sites[name]["fn"], model_sites[name]["value"]).all()
        ),
    )


def _check_fit(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> None:
    """Raises a ValueError that names a site which the model and the guide do not have alike."""
    latents = {name: site for name, site in model_sites.items() if not site["is_observed"]}
    for name, site in latents.items():
        if name not in guide_sites and not site["infer"].get("enumerate"):
            raise ValueError(
                f'The guide misses the latent site "{name}" of the model (it has {_names(guide_sites)}). '
                f'Add pyro.sample("{name}", ...) to the guide.'
            )
    for name, site in guide_sites.items():
        if name not in latents and not site["infer"].get("is_auxiliary") and not site["is_observed"]:
            if name in model_sites:
                raise ValueError(
                    f'The guide samples "{name}", which the model observes. Give the guide the same value, as in '
                    f'poutine.condition(guide, data={{"{name}": value}}).'
                )
            raise ValueError(
                f'The guide samples "{name}", which is no latent site of the model (it has {_names(latents)}). '
                'Rename it, or mark it infer={"is_auxiliary": True}.'
            )
    for name in latents.keys() & guide_sites.keys():
        sizes = [(_plate_sizes(site), _full_sizes(site)) for site in (latents[name], guide_sites[name])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f'The plates of site "{name}" differ: {_describe(latents[name])} in the model, '
                f"{_describe(guide_sites[name])} in the guide. Give it plates of the same sizes and dimensions in both; a "
                "guide whose parameters belong to rows, such as AutoNormal's, takes all its rows at once, and no others."
            )


def latents_of_trace(trace: poutine.Trace) -> poutine.Trace:
    """Returns a trace without its observed sites, which a model is not replayed at."""
    latents = trace.copy()
    for name, site in sample_sites(trace).items():
        if site["is_observed"]:
            latents.remove_node(name)
    return latents


def _is_data(site: dict) -> bool:
    """Whether a site observes data, which a factor does not."""
    return site["is_observed"] and not site["infer"].get("is_auxiliary")


def _is_unvalidated(fn: Any) -> bool:
    """Whether a distribution was built with ``validate_args=False`` where others are validated."""
    return torch.distributions.Distribution._validate_args and not getattr(unwrapped(fn), "_validate_args", True)


def _holding_data(model_sites: dict[str, dict], args: tuple, kwargs: dict[str, Any]) -> list[dict]:
    """Returns the observed sites whose values are arguments, or parts of them; all observed ones without any."""
    given = {t.untyped_storage().data_ptr() for _, t in named_tensors(args, kwargs)}
    observed = [site for site in model_sites.values() if site["is_observed"]]
    return [site for site in observed if site["value"].untyped_storage().data_ptr() in given] or observed


def _data_plate(
    model_sites: dict, guide_sites: dict, rows: int | None, holding_data: list[dict]
) -> tuple[DataPlate | None, str]:
    """Returns the plate over the data, and what is unclear about it, or nothing."""
    sites = holding_data or list(model_sites.values())
    stacks = [{frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    sizes = {
        (frame.name, dim): {_plate_sizes(site)[dim], frame.full_size}
        for site, stack in zip(sites, stacks, strict=True)
        for dim, frame in stack.items()
    }
    count = Counter((frame.name, dim) for stack in stacks for dim, frame in stack.items())
    shared = [key for key in count if count[key] == max(count.values())]
    wanted = named_plate.get()
    named = [key for key in count if key[0] == (wanted or DATA)]
    if wanted and not named:
        listed = ", ".join(f'"{name}"' for name, _ in count) or "none"
        raise ValueError(
            f'data_plate("{wanted}") names no plate over the data that the model observes; those are {listed}.'
        )
    fitting = [key for key in shared if rows in sizes[key]]
    choice = next((keys for keys in (named, fitting, shared) if keys), [])
    if not choice:
        return None, ""
    if len(choice) > 1:
        listed = " and ".join(f'"{name}" (dim {dim})' for name, dim in choice)
        return (
            None,
            f'which plate holds the data is unclear, of {listed}: say it by pyrovae.data_plate(name), or name one of them "{DATA}"',
        )
    ((name, dim),) = choice
    names = {name}
    for key in model_sites.keys() & guide_sites.keys():
        if any(frame.dim == dim and frame.name == name for frame in model_sites[key]["cond_indep_stack"]):
            names.update(frame.name for frame in guide_sites[key]["cond_indep_stack"] if frame.dim == dim)
    return DataPlate(frozenset(names), dim), ""


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
    """Returns how an object was built, from the arguments of its class that are its attributes, defaults left out.

    Checkpoints hold this text: nothing in it may differ between processes, as the address in the repr of a function does.
    """

    def named(value: Any) -> str:
        if isinstance(value, nn.Module):
            return type(value).__name__
        return value.__qualname__ if isinstance(value, FunctionType) else repr(value)

    given = []
    for name, parameter in signature(type(thing)).parameters.items():
        value = getattr(thing, name, parameter.default)
        if not (
            value is parameter.default or isinstance(value, (int, float, str, tuple)) and value == parameter.default
        ):
            given.append(f"{name}={named(value)}")
    return f"{type(thing).__name__}({', '.join(given)})"


def check_all_observed(trace: poutine.Trace, without: frozenset[str] = frozenset()) -> None:
    """Raises a ValueError if an observed value in a trace does not fit its distribution, for all sites but some."""
    for name, site in sample_sites(trace).items():
        if site["is_observed"] and name not in without:
            check_observed(name, site["fn"], site["value"])


class ObservedChecked(Messenger):
    """A Pyro handler that checks the data at every observed site, as :func:`check_observed` does.

    Args:
        later: keep what was found, for :meth:`inside`, and raise nothing: a look at a GPU would have to wait for it.
        without: names of sites that are not checked.
    """

    def __init__(self, later: bool = False, without: frozenset[str] = frozenset()):
        super().__init__()
        self.later, self.without = later, without
        self._inside: list[Tensor] = []

    def _pyro_post_sample(self, msg: dict) -> None:
        if not msg["is_observed"] or isinstance(msg["fn"], _Subsample) or torch.jit.is_tracing():
            return
        if msg["name"] in self.without:
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
        latents = latents_of_trace(traced(guide, None, *args, **kwargs))
        check_all_observed(traced(model, latents, *args, **kwargs))


def check_observed(name: str, fn: Any, value: Tensor, columns: str = "") -> None:
    """Raises a ValueError if an observed value does not have its distribution's shape or is outside its support."""
    base = unwrapped(fn)
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
    space = innermost(base.support)
    observed = value[fn.mask_of_elements.expand(value.shape)] if isinstance(fn, MaskedElements) else value
    low, high = observed.min().item(), observed.max().item()
    first = int((~inside).nonzero()[:, -1].min()) if inside.dim() else 0  # the data are the last dimension
    raise ValueError(
        f'The data at site "{name}"{columns} is outside the support of {kind}, {space}: it ranges from {low:g} to '
        f"{high:g}, and the first datum outside is {row_name(first)}. {_mending(space)}"
    )


def _warn_of_large_counts(name: str, fn: Any, value: Tensor) -> None:
    r"""Warns where torch's distributions of counts lose nats: they subtract numbers as large as :math:`x \log x`."""
    base = unwrapped(fn)
    kinds = (
        torch.distributions.Poisson,
        torch.distributions.NegativeBinomial,
        torch.distributions.Multinomial,
        torch.distributions.Binomial,
        GammaPoisson,
    )
    if not isinstance(base, kinds) or type(base).__module__.startswith("pyrovae") or not value.numel():
        return
    counts = value.detach().double()
    precision = torch.finfo(base.mean.dtype).eps
    # Errors of elements have any sign, and so add up as a root of squares.
    error = (precision / 2 * counts * counts.clamp(min=1).log()).square()
    lost = error.sum(-1).sqrt().max().item() if error.dim() > 1 else error.max().sqrt().item()
    if lost > _LOST:
        warn(
            f'the log-probability of the counts at site "{name}", of up to {counts.max().item():,.0f}, is off by some {lost:.2g} nats a '
            f"datum in {base.mean.dtype}. Take {type(base).__name__} of pyrovae.distributions where there is one, or give the "
            "distribution parameters in double precision."
        )


def check_mass(name: str, fn: Any, log_prob: Tensor) -> None:
    """Raises a ValueError if a probability of a discrete value is above one."""
    if not _is_discrete(fn):
        return
    # Sums of many terms have rounding of their own.
    largest = log_prob.max().item() if log_prob.numel() else 0.0
    if largest > math.sqrt(torch.finfo(log_prob.dtype).eps) * max(1, fn.event_shape.numel()):
        raise ValueError(
            f'The likelihood at site "{name}", {type(unwrapped(fn)).__name__}, is no probability: the log-probability of a '
            f"discrete value is {largest:.3g}, above 0. Normalise it: the probabilities of all values are to add up to 1."
        )


def _support_check(fn: Any, value: Tensor) -> Tensor:
    """Returns where a value is in the support of a distribution; everywhere if it leaves its support undefined."""
    try:
        return fn.support.check(value)
    except NotImplementedError:
        return torch.ones((), dtype=torch.bool, device=value.device)


def unwrapped(fn: Any) -> Any:
    """Returns the innermost distribution that others wrap; of several in a stack, the first one's."""
    while isinstance(fn, (*_WRAPPERS, Stacked)):
        fn = fn.parts[0] if isinstance(fn, Stacked) else fn.base_dist
    return fn


def innermost(support: constraints.Constraint) -> constraints.Constraint:
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


def _plate_sizes(site: dict) -> dict[int, int]:
    """Returns the sizes of a site's plates by dimension; one without a size of its own has its site's."""
    sizes = {frame.dim: int(frame.size) for frame in site["cond_indep_stack"] if frame.vectorized}
    shape = torch.Size()
    if site["value"] is not None and min(sizes.values(), default=0) < 0:
        shape = site["value"].shape[: site["value"].dim() - len(site["fn"].event_shape)]
    shape = torch.broadcast_shapes(shape, site["fn"].batch_shape)
    return {dim: size if size >= 0 else shape[dim] if len(shape) >= -dim else 1 for dim, size in sizes.items()}


def _full_sizes(site: dict) -> dict[int, int]:
    """Returns how much a site's plates stand for, by dimension: more than they hold where they are subsampled."""
    full = {frame.dim: int(frame.full_size or -1) for frame in site["cond_indep_stack"] if frame.vectorized}
    return {dim: full[dim] if full[dim] >= 0 else size for dim, size in _plate_sizes(site).items()}


def _describe(site: dict) -> str:
    sizes = _full_sizes(site)
    plates = [f'plate "{f.name}" (dim {f.dim}, size {sizes.get(f.dim, f.size)})' for f in site["cond_indep_stack"]]
    return ", ".join(plates) or "no plate"


def _check_batch_shape(name: str, site: dict) -> None:
    plates, shape = _plate_sizes(site), site["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] != plates.get(dim, 1):
            raise ValueError(
                f'Site "{name}" has batch shape {tuple(shape)}, but {_describe(site)}. Put it in a plate '
                f'(with pyro.plate("{DATA}", len(x)): ...) or declare event dimensions with .to_event(n).'
            )


def _problems(
    model_sites: dict[str, dict], guide_sites: dict[str, dict], data: DataPlate | None, given: frozenset[str]
) -> Iterator[str]:
    named = "the plate " + (str(data) if data else f'"{DATA}"')
    for where, sites in (("model", model_sites), ("guide", guide_sites)):
        outside = [
            name
            for name, site in sites.items()
            if name not in given
            and not (where == "guide" and site["is_observed"])
            and (not data or not data.frame(site))
        ]
        if outside:
            listed = ", ".join(f'"{name}"' for name in outside[:3]) + (
                f" and {len(outside) - 3} more" if outside[3:] else ""
            )
            verb = "is" if len(outside) == 1 else "are"
            yield f"site{'s' if outside[1:] else ''} {listed} of the {where} {verb} outside {named}"
        for name, site in sites.items():
            for frame in site["cond_indep_stack"]:
                is_data = data is not None and frame.dim == data.dim and frame.name in data.names
                if frame.vectorized and not is_data and frame.full_size not in (None, frame.size):
                    yield f'site "{name}" of the {where} is in the plate "{frame.name}", which is subsampled'
    for name, site in model_sites.items():
        if isinstance(unwrapped(site["fn"]), ImproperUniform):
            yield f'site "{name}" of the model is an ImproperUniform, which has no density'
    latents = {name: site for name, site in guide_sites.items() if not site["is_observed"]}
    auxiliary = [name for name, site in latents.items() if site["infer"].get("is_auxiliary")]
    points = [name for name, site in latents.items() if isinstance(unwrapped(site["fn"]), Delta)]
    # Pyro's automatic guides draw auxiliary numbers and map them to the latents, one to one: points with a density.
    drawn = sum(latents[name]["value"].numel() for name in auxiliary)
    if not auxiliary or drawn != sum(_num_reals(model_sites.get(name, latents[name])) for name in points):
        for name in points:
            yield f'site "{name}" of the guide is a point (Delta), which has no density'
        for name in auxiliary:
            yield f'site "{name}" of the guide is auxiliary'
    for name, site in model_sites.items():
        if site["infer"].get("is_auxiliary") and not site["is_observed"] and name not in guide_sites:
            yield f'site "{name}" of the model is auxiliary'
    for name in model_sites.keys() - guide_sites.keys():
        if not model_sites[name]["is_observed"]:
            yield f'site "{name}" of the model is enumerated, and the guide does not sample it'


def _num_reals(site: dict) -> int:
    """Returns how many real numbers the latents of a site are mapped from, one to one."""
    shape = site["fn"].batch_shape + site["fn"].event_shape
    try:
        return biject_to(site["fn"].support).inverse_shape(shape).numel()
    except NotImplementedError:
        return shape.numel()
