r"""Importance weights of any Pyro model and guide, and data drawn by them.

The one place where :math:`\log p(x, z) - \log q(z \mid x)` is formed.
"""

import math
from collections.abc import Callable, Set
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrovae.arguments import tensors_of, tree_map
from pyrovae.distributions import Stacked
from pyrovae.distributions.normals import LowRankMultivariateNormal, MultivariateNormal
from pyrovae.inference.messages import PER_DATUM, check_observed_by, warn
from pyrovae.inference.running import full_precision, isolated, traced
from pyrovae.inference.sites import latents_of_trace, sample_sites, unwrapped
from pyrovae.inference.structure import SiteStructure, inspect

__all__ = ["log_weights"]

_SAMPLES = "_num_samples"  # the plate of the draws, left of all others


def log_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> Tensor:
    r"""Draws log importance weights, per datum, for any model and guide; differentiable.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    The mean of the weights is an unbiased estimate of :math:`p(x_n)`. Everything per datum must stand in one plate, of
    any name and dimension. Factors that only scale a loss (``poutine.scale``, the N/B of a subsampled data plate) are
    left out, and so are factors and observed sites of the guide, which are no part of q, and observed values that all
    data share, such as a conditioned global latent; masks are applied. The guide runs once, for all samples together,
    or once for each where that is not the same.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        num_samples: number of draws per datum, at least 1.
        **kwargs: what both are called with.

    Returns:
        Log weights in nats, shape ``(num_samples, batch)``.

    Raises:
        ValueError: when `num_samples` is below 1, model and guide do not fit each other or the data, or a site lies
            outside the data plate, so that weights per datum are undefined. The message names the site.

    References:
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> log_weights(vae.model, vae.guide, torch.zeros(5, 3), num_samples=10).shape
    torch.Size([10, 5])
    """
    structure = inspect_weights(model, guide, *args, num_samples=num_samples, **kwargs)
    trace, log_q = draw(guide, structure, num_samples, *args, **kwargs)
    return log_joint(model, trace, structure, num_samples, *args, **kwargs) - log_q


def inspect_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> SiteStructure:
    """Returns the structure of a model and a guide, or raises because weights per datum are undefined."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    structure = inspect(model, guide, *args, **kwargs)
    if structure.problems:
        raise ValueError(
            f"Importance weights per datum are undefined: {'; '.join(structure.problems)}. {PER_DATUM}; give "
            "a latent that all data share a value, by poutine.condition of the model and of the guide."
        )
    if structure.out_of_support:  # which a model may be trained on, but a density of none is no score
        check_observed_by(model, guide, *args, **kwargs)
    return check_draws(structure, model, guide, *args, **kwargs)


def inspect_samples(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> SiteStructure:
    """Returns the structure of a model and a guide, and whether many samples may be drawn at once."""
    return check_draws(inspect(model, guide, *args, **kwargs), model, guide, *args, **kwargs)


def check_draws(structure: SiteStructure, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> SiteStructure:
    """Returns a structure that says whether many samples may be drawn at once.

    A draw of several samples at once is compared with a run of model and guide at one of them alone. Where log-probabilities
    differ, or there is no such draw, samples are drawn one by one, and a warning says so.
    """
    if not structure.vectorized:
        return structure
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with isolated(tensors):
        reason = _why_one_by_one(model, guide, structure, tensors, args, kwargs)
    if reason is None:
        return structure
    warn(
        f"samples are drawn one by one, which is slow: {reason}. To draw many at once, let model and guide take latents of shape "
        "(num_samples, *batch, *event): name dimensions from the last, as in softmax(-1), and flatten the leading ones before a layer "
        "that takes one batch, such as BatchNorm1d."
    )
    return structure._replace(vectorized=False)


def _why_one_by_one(
    model: Callable, guide: Callable, structure: SiteStructure, tensors: list[Tensor], args: tuple, kwargs: dict
) -> str | None:
    """Returns why samples cannot be drawn at once; None if they can."""
    sizes = {n for t in tensors for n in t.shape}
    num_samples = next(
        n for n in range(2, 2 + len(sizes) + 1) if n not in sizes
    )  # for no other dimension to be taken for it
    try:
        drawn = trace_guide(guide, structure, num_samples, *args, **kwargs)
        scored = trace_model(model, drawn, structure, num_samples, *args, **kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        try:
            traced(model, latents_of_trace(traced(guide, None, *args, **kwargs)), *args, **kwargs)
        except Exception:  # they do not take these data alone either, which is said where the data are scored
            return None
        text = str(error).partition("Trace Shapes")[0].strip().splitlines()
        return text[0].rstrip(" .") if text else type(error).__name__
    last = num_samples - 1
    one = structure._replace(vectorized=False)
    for function, at_once in ((guide, drawn), (model, scored)):
        alone = traced(function, _one_draw(drawn, one, last, points=function is model), *args, **kwargs)
        change = _difference(sample_sites(at_once), sample_sites(alone), last)
        if change is not None:
            again = traced(function, _one_draw(drawn, one, last, points=function is model), *args, **kwargs)
            if _difference(sample_sites(alone), sample_sites(again), None) is None:  # it draws no noise of its own
                return change
    return None


def _difference(several: dict[str, dict], alone: dict[str, dict], sample: int | None) -> str | None:
    """Returns at which site one of several samples has another log-probability than alone, by more than rounding."""
    if several.keys() != alone.keys():
        return f"the sites {', '.join(sorted(several.keys() ^ alone.keys()))} are not always there"
    for name, site in alone.items():
        try:
            wanted = log_prob_of(site)
            got = log_prob_of(several[name])
        # A flow cannot score what it did not draw; data outside of a support are named where they are scored.
        except (KeyError, NotImplementedError, ValueError):
            continue
        got = got if sample is None else got[sample] if got.dim() > wanted.dim() else got
        try:
            got, wanted = torch.broadcast_tensors(got, wanted)
        except RuntimeError:
            return (
                f'site "{name}" has log-probabilities of shape {tuple(got.shape)} at once, {tuple(wanted.shape)} alone'
            )
        finite = wanted.isfinite() & got.isfinite()
        error = torch.where(finite, (got - wanted).abs(), (got != wanted) & ~(got.isnan() & wanted.isnan()))
        size = torch.where(finite, wanted.abs(), 0.0).amax() if wanted.numel() else torch.zeros(())
        precision = math.sqrt(torch.finfo(wanted.dtype).eps) if wanted.is_floating_point() else 0.0
        if error.numel() and error.amax().item() > precision * (1 + size.item()):
            if not _is_rounding(several[name], site, sample):
                return f'the log-probability at site "{name}" differs when samples are drawn at once'
    return None


def _is_rounding(several: dict, alone: dict, sample: int | None) -> bool:
    """Whether log-probabilities differ because a normal knows the noise of its own draws, and of others only their values."""
    normals = [unwrapped(site["fn"]) for site in (several, alone)]
    if not all(isinstance(normal, MultivariateNormal | LowRankMultivariateNormal) for normal in normals):
        return False
    for name in ("loc", "covariance_matrix"):
        got, wanted = (getattr(normal, name) for normal in normals)
        got = got if sample is None or got.dim() == wanted.dim() else got[sample]
        precision = math.sqrt(torch.finfo(wanted.dtype).eps)
        if (got - wanted).abs().max() > precision * wanted.abs().max():
            return False
    return True


def draw(
    guide: Callable, structure: SiteStructure, num_samples: int, *args: Any, **kwargs: Any
) -> tuple[poutine.Trace, Tensor]:
    r"""Runs the guide once for `num_samples` draws; returns its trace and :math:`\log q`, ``(num_samples, batch)``."""
    trace = trace_guide(guide, structure, num_samples, *args, **kwargs)
    return trace, log_q_of(trace)


def _samples(structure: SiteStructure, num_samples: int) -> pyro.plate:
    return pyro.plate(_SAMPLES, num_samples, dim=-1 - structure.max_plate_nesting)


def trace_guide(
    guide: Callable, structure: SiteStructure, num_samples: int, *args: Any, **kwargs: Any
) -> poutine.Trace:
    """Runs the guide for `num_samples` draws, at once if it can be; returns its trace."""
    if structure.vectorized:
        with _samples(structure, num_samples):
            return of_depth(traced(guide, None, *args, **kwargs), structure)
    traces: list[poutine.Trace] = []
    for _ in range(num_samples):
        # All draws are of the same data.
        traces.append(traced(guide, _subsamples_of(traces[0]) if traces else None, *args, **kwargs))
    return _stacked(traces, structure)


def log_joint(
    model: Callable,
    draws: poutine.Trace,
    structure: SiteStructure,
    num_samples: int,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    r"""Returns :math:`\log p(x, z)` at the latents of a guide's trace of `num_samples` draws, in the same shape."""
    return log_p_of(trace_model(model, draws, structure, num_samples, *args, **kwargs), structure)


def log_p_of(trace: poutine.Trace, structure: SiteStructure) -> Tensor:
    r"""Returns :math:`\log p(x, z)` of a model's trace, ``(num_samples, batch)``, given what all data share."""
    sites = sample_sites(trace)
    return sum(
        per_datum(site, log_prob_of(site)) for name, site in sites.items() if name not in structure.global_observed
    )


def log_q_of(trace: poutine.Trace) -> Tensor:
    r"""Returns :math:`\log q` of the latents in a guide's trace, ``(num_samples, batch)``; what it observes is no part."""
    return sum(per_datum(site, log_prob_of(site)) for site in sample_sites(trace).values() if not site["is_observed"])


def trace_model(
    model: Callable, draws: poutine.Trace, structure: SiteStructure, num_samples: int, *args: Any, **kwargs: Any
) -> poutine.Trace:
    """Runs the model at the latents of a guide's trace of `num_samples` draws; returns its trace."""
    if structure.vectorized:
        with _samples(structure, num_samples):
            return of_depth(traced(model, latents_of_trace(draws), *args, **kwargs), structure)
    parts = [_one_draw(draws, structure, k) for k in range(num_samples)]
    return _stacked([traced(model, part, *args, **kwargs) for part in parts], structure)


def _subsamples_of(trace: poutine.Trace) -> poutine.Trace:
    """Returns a trace with nothing but which data its plates hold."""
    kept = trace.copy()
    for name in sample_sites(trace):
        kept.remove_node(name)
    return kept


def _one_draw(draws: poutine.Trace, structure: SiteStructure, sample: int, points: bool = True) -> poutine.Trace:
    """Returns one of several draws as if it had been drawn alone; if not `points`, without what a guide computes from others."""
    part = latents_of_trace(draws)
    for name, site in sample_sites(part).items():
        if not points and isinstance(unwrapped(site["fn"]), pyro.distributions.Delta):
            part.remove_node(name)
            continue
        value, event_dim = site["value"], len(site["fn"].event_shape)
        value = value.expand(torch.broadcast_shapes(value.shape, site["fn"].batch_shape[1:] + site["fn"].event_shape))
        lead = value.dim() - event_dim
        own = value[sample] if lead > structure.max_plate_nesting else value
        own = own.reshape(own.shape[own.dim() - event_dim - site["num_plates"] :])
        part.nodes[name] = {**site, "value": own}
    return part


def _stacked(traces: list[poutine.Trace], structure: SiteStructure) -> poutine.Trace:
    """Returns traces of one draw each as one trace of several."""
    whole, depth = traces[0].copy(), structure.max_plate_nesting
    sites = [sample_sites(trace) for trace in traces]
    for other in sites:
        check_same_sites(sites[0].keys(), other.keys())
    for name, first in sites[0].items():
        each = [other[name] for other in sites]
        fn = Stacked([site["fn"] for site in each], depth)
        shape = fn.batch_shape + fn.event_shape
        whole.nodes[name] = {
            **first,
            "fn": fn,
            "value": _together([site["value"] for site in each], shape),
            "mask": _together([site["mask"] for site in each], fn.batch_shape),
            "scale": _together([site["scale"] for site in each], fn.batch_shape),
        }
    return of_depth(whole, structure)


def check_same_sites(before: Set[str], now: Set[str]) -> None:
    """Raises a ValueError that names the sites which one run of a model or guide has, and another has not."""
    if before != now:
        changed = ", ".join(f'"{name}"' for name in sorted(before ^ now))
        raise ValueError(
            f"the sites of the model and the guide change from run to run ({changed}), so that a density of the latents "
            "is undefined. Draw all sites in every run and mask those that play no part, with poutine.mask."
        )


def _together(values: list[Any], shape: torch.Size) -> Any:
    """Returns what all draws have, or what each has in front of the plates."""
    first = values[0]
    if all(value is first or not isinstance(value, Tensor) and value == first for value in values):
        return first
    return torch.stack([torch.as_tensor(value).expand(shape[1:]) for value in values])


def of_depth(trace: poutine.Trace, structure: SiteStructure) -> poutine.Trace:
    """Returns a trace, after checking that its samples lie right in front of its plates, where they are looked for.

    Each site gets an entry "data", the frame of the data plate that it stands in, or None, and "num_plates", how many
    dimensions of plates its values have.
    """
    for name, site in sample_sites(trace).items():
        if site["value"].dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f'site "{name}" has values in {site["value"].dtype}, too coarse for densities. Give its distribution numbers in '
                "single precision: cast what a network returns, network(x).float()."
            )
        shape = site["fn"].batch_shape
        plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
        site["data"] = None if structure.data is None else structure.data.frame(site)
        own = [-f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != _SAMPLES]
        site["num_plates"] = max(own, default=0)
        stray = [
            dim
            for dim in range(-min(len(shape), structure.max_plate_nesting), 0)
            if dim not in plates and shape[dim] > 1
        ]
        if len(shape) > structure.max_plate_nesting + 1 or stray:
            wrong = (
                f"{shape[stray[0]]} at dimension {stray[0]}, where it stands in no plate,"
                if stray
                else "too many dimensions"
            )
            raise ValueError(
                f'site "{name}" has batch shape {tuple(shape)}, {wrong} for samples in front of '
                f"{structure.max_plate_nesting} dimensions of plates. Latents come as (num_samples, *plates, *event), with a "
                "one for each plate that they do not stand in: keep that order in what is made of them, and sum over a plate "
                "with keepdim=True."
            )
    return trace


def simulate(model: Callable, *args: Any, **kwargs: Any) -> tuple[poutine.Trace, tuple, dict]:
    r"""Draws latents and data from a model; returns their trace, and the arguments with the data in their places.

    .. math:: z, x \sim p(x, z)

    The latents are exact draws of :math:`p(z \mid x)` given the data: what a guide would have to find. Data take the
    place of the arguments that the model observes, of which there are as many.

    Raises:
        ValueError: when what a site observes is none of the arguments.
    """
    with torch.no_grad(), poutine.trace() as tracer, poutine.uncondition():
        model(*args, **kwargs)
    drawn, sites = tracer.trace.copy(), sample_sites(tracer.trace)
    for name in tracer.trace.nodes.keys() - sites.keys():
        drawn.remove_node(name)  # a plate's choice of data, which are drawn now
    in_place, given = {}, tensors_of(args, kwargs)
    for name, site in sites.items():
        if site["infer"].get("was_observed"):
            seen = site["infer"]["obs"]
            if not any(seen is value for value in given):
                raise ValueError(
                    f'Data drawn from the model at site "{name}" cannot be handed back to it: what the site observes is '
                    "none of the arguments as given. Observe the argument itself."
                )
            in_place[id(seen)] = site["value"]
    return drawn, *tree_map(lambda value: in_place.get(id(value), value), (args, kwargs))


def log_prob_of(site: dict) -> Tensor:
    """Returns the log-probability of a site's value, masked but not scaled, ``(num_samples, *plates, batch)``."""
    # N/B and training weights belong outside the log of a mean of weights.
    with full_precision([site["value"].device]):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def in_data(site: dict) -> bool:
    """Whether a site, of a trace of several draws, stands in the data plate."""
    return site["data"] is not None


def per_datum(site: dict, t: Tensor, event_dim: int = 0) -> Tensor:
    """Sums a site's ``(num_samples, *plates, *event)`` over its plates but the data's.

    Over all plates for a site that does not stand in the data plate; its batch is one.

    Returns:
        Shape ``(num_samples, batch, *event)``.
    """
    end = t.dim() - event_dim
    if not in_data(site):
        return t.flatten(1, end - 1).sum(1, keepdim=True) if end > 1 else t.unsqueeze(1)
    if end == 2:
        return t
    return t.movedim(end + site["data"].dim, end - 1).flatten(1, end - 2).sum(1)
