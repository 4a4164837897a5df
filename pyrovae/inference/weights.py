r"""Importance weights of any Pyro model and guide, from traces of many samples.

No other module computes :math:`\log p(x, z) - \log q(z \mid x)`.
"""

import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrovae.arguments import as_tensors, count_data, take_rows, tensors_of
from pyrovae.distributions import Stacked
from pyrovae.distributions.normals import LowRankMultivariateNormal, MultivariateNormal
from pyrovae.inference.messages import PER_DATUM, check_observed_by, warn
from pyrovae.inference.running import full_precision, isolated, traced
from pyrovae.inference.sites import (
    DataPlate,
    is_masked,
    latents_of_trace,
    mask_around,
    masks_differ,
    sample_sites,
    unwrapped,
    without_mask,
)
from pyrovae.inference.structure import SiteStructure, inspect
from pyrovae.rows import number_type

__all__ = ["log_weights"]

SAMPLES = "_num_samples"  # the plate of the draws, left of all others


def log_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> Tensor:
    r"""Draws log importance weights, per datum, for any model and guide; differentiable.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    The mean of the weights is an unbiased estimate of :math:`p(x_n)`. All sites of a datum must be in one plate, of any
    name and dimension. Three things are left out: factors that only scale a loss (``poutine.scale``, the N/B of a
    subsampled data plate); factors and observed sites of the guide, which are not part of q; and observed values that
    all data share, such as a conditioned global latent. Masks of the model are applied, and hide latents from q too: a
    latent that plays no part needs no mask in the guide. The guide runs once for all samples
    together, or once per sample where the results would differ.

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
    args, kwargs = as_tensors(args, kwargs, number_type(model, guide))
    structure = inspect_weights(model, guide, *args, num_samples=num_samples, **kwargs)
    drawn = trace_guide(guide, structure, num_samples, *args, **kwargs)
    return weigh(model, drawn, structure, num_samples, *args, **kwargs)[1]


def in_plate_of_one(model: Callable, guide: Callable) -> tuple[Callable, Callable]:
    """Returns a model and a guide that have no plates, such as those of a time series, in a plate of one datum."""
    warn(
        "model and guide have no plate, so that all that they are given is one datum, such as a time series. If the "
        'rows of the data are independent, put the sites of a datum in pyro.plate("data", len(x)), in both; if not, a '
        'plate of one, pyro.plate("data", 1), says so.'
    )

    def in_plate(function: Callable) -> Callable:
        def single(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate("all_as_one_datum", 1):  # not "data", which a plate that is looped over may be named
                return function(*args, **kwargs)

        return single

    return in_plate(model), in_plate(guide)


def inspect_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> SiteStructure:
    """Returns the structure of a model and a guide; raises a ValueError if weights per datum are undefined."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    structure = inspect(model, guide, *args, **kwargs)
    check_weights(structure)
    if structure.out_of_support:  # allowed in training, but such data have no density to score
        check_observed_by(model, guide, *args, **kwargs)
    check_independent(structure, model, guide, *args, **kwargs)
    return check_draws(structure, model, guide, *args, **kwargs)


def check_weights(structure: SiteStructure) -> None:
    """Raises a ValueError if importance weights per datum are undefined."""
    if structure.problems:
        if any(name.startswith("_Auto") for name in structure.auxiliary):
            raise ValueError(
                f"Importance weights per datum are undefined: {'; '.join(structure.problems)}. Automatic guides with "
                "one latent for all data, such as AutoDiagonalNormal, have none: take AutoNormal, or an encoder."
            )
        raise ValueError(
            f"Importance weights per datum are undefined: {'; '.join(structure.problems)}. {PER_DATUM}; give "
            "a latent that all data share a value, by poutine.condition of the model and of the guide; put a single "
            'series, whose rows are its steps, in pyro.plate("data", 1).'
        )


def check_masks(structure: SiteStructure) -> None:
    """Raises a ValueError if a latent is masked inside of its distribution, in a model or a guide alone."""
    if structure.masked_inside:
        raise ValueError(
            f'site "{min(structure.masked_inside)}" is masked inside of its distribution (fn.mask) in the model and '
            "not so in the guide, or the other way, so that it is not known what of q plays no part. Mask it around "
            "the site, with poutine.mask, in the model."
        )


def masked_as(q: dict, masks: Mapping[str, Any]) -> dict:
    """Returns a latent of a guide with its mask in the model: what plays no part there has no density in q either."""
    if q["name"] not in masks:
        return q
    return {**q, "mask": masks[q["name"]], "fn": mask_around(q)[1]}


def check_independent(
    structure: SiteStructure, model: Callable, guide: Callable, *args: Any, **kwargs: Any
) -> dict[str, Any] | None:
    """Raises a ValueError if data depend on each other's latents, so that weights per datum are undefined.

    Returns:
        The masks of latents in the model, where the guide masks them otherwise; None if these depend on the latents, or
        are inside of a distribution, so that what the guide draws cannot be masked alike.
    """
    if structure.data is None:
        return {}
    with isolated(tensors_of(args, kwargs)):
        draw = latents_of_trace(traced(guide, None, *args, **kwargs))
        before = sample_sites(traced(model, draw, *args, **kwargs))
        reason = _reason_dependent(model, draw, before, structure.data, args, kwargs)
        masks: dict[str, Any] | None = {}
        if _hidden_elements_differ(before, sample_sites(draw)):
            again = sample_sites(traced(model, latents_of_trace(traced(guide, None, *args, **kwargs)), *args, **kwargs))
            drawn = sample_sites(draw)
            latents = [name for name in drawn if name in before and name in again]
            depend = any(masks_differ(before[name], again[name]) for name in latents)
            inside = any(masks_differ(before[name], drawn[name], inside=True) for name in latents)
            masks = None if depend or inside else {name: mask_around(before[name])[0] for name in latents}
    if reason is not None:
        raise ValueError(
            f"Importance weights per datum are undefined: {reason} data. Compute what belongs to a datum from its own "
            "row: sum over the last dimension, as in x.sum(-1), and take no mean, sum or softmax over the rows. Data "
            "that do depend on each other, as in a graph, have no scores of their own: train such a model with "
            "bounds.ELBO or an ELBO of Pyro."
        )
    return masks


def _reason_dependent(
    model: Callable, draw: poutine.Trace, before: dict[str, dict], plate: DataPlate, args: tuple, kwargs: dict
) -> str | None:
    """Returns which log-probability depends on the latents of several data; None if there is none.

    Half of the rows take the latents of one of the others: the others must keep their log-probabilities, and so must
    the observed sites outside of the data plate.
    """
    size = max((frame.size for site in before.values() if (frame := plate.frame(site))), default=1)
    changed, kept = torch.randperm(size).tensor_split([size // 2])
    rows = torch.arange(size)
    rows[changed] = kept[0]
    moved = draw.copy()
    for name, site in sample_sites(draw).items():
        dim = plate.dim - len(site["fn"].event_shape)
        if plate.frame(site):
            moved.nodes[name] = {**site, "value": _take(site["value"], dim, rows)}
    after = sample_sites(traced(model, moved, *args, **kwargs))
    for name in [name for name in before if name in after]:
        is_inside = plate.frame(before[name]) is not None
        try:
            log_probs = [log_prob_of(sites[name]) for sites in (before, after)]
        except (KeyError, NotImplementedError, ValueError):  # raised where the data are scored
            continue
        if is_inside:
            log_probs = [_take(log_prob, plate.dim, kept) for log_prob in log_probs]
        if differs(*log_probs) and not is_random(model, draw, name, before, args, kwargs):
            if is_inside:
                return f'the log-probability at site "{name}" of the model depends on the latents of other'
            return f'site "{name}" of the model is outside of the plate {plate}, and depends on the latents of several'
    return None


def _take(t: Tensor, dim: int, rows: Tensor) -> Tensor:
    """Returns some rows of a tensor; the tensor, if it is the same for all rows."""
    if t.dim() < -dim or t.shape[dim] == 1:
        return t
    return t.index_select(dim, rows.to(t.device))


def is_random(
    model: Callable, draw: poutine.Trace, name: str, sites: dict[str, dict], args: tuple, kwargs: dict
) -> bool:
    """Whether the log-probability of a site changes from run to run at the same latents."""
    again = sample_sites(traced(model, draw, *args, **kwargs))
    return name not in again or differs(log_prob_of(again[name]), log_prob_of(sites[name]))


def take_draws(draw: poutine.Trace, plate: DataPlate, rows: Tensor) -> poutine.Trace:
    """Returns draws of latents and subsamples for some rows of the plate over the data."""
    few, latents, nodes = draw.copy(), sample_sites(draw), dict[str, Any](draw.nodes)
    for name, site in nodes.items():
        if name in latents and plate.frame(site):
            dim = plate.dim - len(site["fn"].event_shape)
            few.nodes[name] = {**site, "value": _take(site["value"], dim, rows)}
        elif name in plate.names and isinstance(site.get("fn"), _Subsample):
            # Indices of rows, or what was given as `subsample`, rows of data.
            few.nodes[name] = {**site, "value": _take(site["value"], -site["value"].dim(), rows)}
    return few


def check_rows_alone(structure: SiteStructure, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> None:
    """Raises a ValueError if some data of a batch have other log-probabilities without the rest of it.

    A datum may depend on those before it, those after it, or on a mean: the data have both, and are not in the middle.

    Args:
        structure: the sites of both.
        model: a Pyro model.
        guide: a Pyro guide.
        args: what both are called with, two rows at least.
        kwargs: what both are called with.
    """
    plate = structure.data
    if plate is None:
        return
    size = count_data(args, kwargs)
    some = slice(1, max(2, 1 + (size - 1) // 2))
    rows, (part, named) = torch.arange(size)[some], take_rows(some, args, kwargs)
    with isolated(tensors_of(args, kwargs)):
        draw = latents_of_trace(traced(guide, None, *args, **kwargs))
        together = sample_sites(traced(model, draw, *args, **kwargs))
        try:
            alone = sample_sites(traced(model, take_draws(draw, plate, rows), *part, **named))
            log_probs = {name: (log_prob_of(alone[name]), log_prob_of(together[name])) for name in alone}
        except Exception:  # the model does not run on so few data
            return
        for name, (actual, expected) in log_probs.items():
            if plate.frame(together[name]) is None or not differs(actual, _take(expected, plate.dim, rows)):
                continue
            if not is_random(model, draw, name, together, args, kwargs):
                raise ValueError(
                    f'Log p(x) of a datum is undefined: the log-probability at site "{name}" of the model depends on '
                    "which other data are scored with it. Compute statistics of the data, such as means over rows, "
                    "once, of the training data, and keep them in the model, as BatchNorm does in evaluation mode."
                )


def inspect_samples(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> SiteStructure:
    """Returns the structure of a model and a guide; its `vectorized` says whether many samples may be drawn at once."""
    return check_draws(inspect(model, guide, *args, **kwargs), model, guide, *args, **kwargs)


def check_draws(structure: SiteStructure, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> SiteStructure:
    """Returns a structure whose `vectorized` says whether many samples may be drawn at once.

    Several samples are drawn at once, and model and guide run at one of them alone. If log-probabilities differ, or the
    draw fails, samples are drawn one by one, with a warning.
    """
    if not structure.vectorized:
        return structure
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with isolated(tensors):
        reason = _reason_not_vectorized(model, guide, structure, tensors, args, kwargs)
    if reason is None:
        return structure
    warn(
        f"samples are drawn one by one, which is slow: {reason}. To draw many at once, let model and guide take "
        "latents of shape (num_samples, *batch, *event): count dimensions from the last, as in softmax(-1), and "
        "flatten the leading ones before a layer that takes a single batch dimension, such as BatchNorm1d. (Particle "
        "filters repeat rows of data instead.)"
    )
    return structure._replace(vectorized=False)


def _reason_not_vectorized(
    model: Callable, guide: Callable, structure: SiteStructure, tensors: list[Tensor], args: tuple, kwargs: dict
) -> str | None:
    """Returns the reason why samples cannot be drawn at once; None if they can."""
    sizes = {n for t in tensors for n in t.shape}
    # A number that is the size of no other dimension, so that no other is mistaken for the samples.
    num_samples = next(n for n in range(2, 2 + len(sizes) + 1) if n not in sizes)
    try:
        drawn = trace_guide(guide, structure, num_samples, *args, **kwargs)
        scored = trace_model(model, drawn, structure, num_samples, *args, **kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        try:
            traced(model, latents_of_trace(traced(guide, None, *args, **kwargs)), *args, **kwargs)
        except Exception:  # a single sample fails as well: the error is raised where the data are scored
            return None
        if "invalid values" in str(error):  # a parameter out of range for some draws, whatever their number
            raise
        text = str(error).partition("Trace Shapes")[0].strip().splitlines()
        return text[0].rstrip(" .") if text else type(error).__name__
    last = num_samples - 1
    one = structure._replace(vectorized=False)
    for function, at_once in ((guide, drawn), (model, scored)):
        alone = traced(function, one_draw(drawn, one, last, points=function is model), *args, **kwargs)
        change = _difference(sample_sites(at_once), sample_sites(alone), last)
        if change is not None:
            again = traced(function, one_draw(drawn, one, last, points=function is model), *args, **kwargs)
            if _difference(sample_sites(alone), sample_sites(again), None) is None:  # not by random numbers of its own
                return change
    return None


def _difference(several: dict[str, dict], alone: dict[str, dict], sample: int | None) -> str | None:
    """Returns how log-probabilities of a sample differ between a draw of several and of one; None if they agree."""
    if several.keys() != alone.keys():
        return f"the sites {', '.join(sorted(several.keys() ^ alone.keys()))} are missing in some runs"
    for name, site in alone.items():
        try:
            expected = log_prob_of(site)
            actual = log_prob_of(several[name])
        # Some flows cannot score values that they did not draw; data outside of a support raise where they are scored.
        except (KeyError, NotImplementedError, ValueError):
            continue
        actual = actual if sample is None else actual[sample] if actual.dim() > expected.dim() else actual
        try:
            is_other = differs(actual, expected)
        except RuntimeError:
            return (
                f'site "{name}" has log-probabilities of shape {tuple(actual.shape)} at once, {tuple(expected.shape)} '
                "alone"
            )
        if is_other and not _is_rounding(several[name], site, sample):
            return f'the log-probability at site "{name}" differs when samples are drawn at once'
    return None


def differs(actual: Tensor, expected: Tensor) -> bool:
    """Whether log-probabilities differ by more than rounding; a RuntimeError if their shapes do not fit."""
    actual, expected = torch.broadcast_tensors(actual, expected)
    finite = expected.isfinite() & actual.isfinite()
    error = torch.where(finite, (actual - expected).abs(), (actual != expected) & ~(actual.isnan() & expected.isnan()))
    size = torch.where(finite, expected.abs(), 0.0).amax() if expected.numel() else torch.zeros(())
    precision = math.sqrt(torch.finfo(expected.dtype).eps) if expected.is_floating_point() else 0.0
    return bool(error.numel()) and error.amax().item() > precision * (1 + size.item())


def _is_rounding(several: dict, alone: dict, sample: int | None) -> bool:
    """Whether log-probabilities differ by rounding: a normal keeps the noise of its own draws, and else computes it."""
    normals = [unwrapped(site["fn"]) for site in (several, alone)]
    if not all(isinstance(normal, MultivariateNormal | LowRankMultivariateNormal) for normal in normals):
        return False
    for name in ("loc", "covariance_matrix"):
        actual, expected = (getattr(normal, name) for normal in normals)
        actual = actual if sample is None or actual.dim() == expected.dim() else actual[sample]
        precision = math.sqrt(torch.finfo(expected.dtype).eps)
        if (actual - expected).abs().max() > precision * expected.abs().max():
            return False
    return True


def trace_guide(
    guide: Callable, structure: SiteStructure, num_samples: int, *args: Any, **kwargs: Any
) -> poutine.Trace:
    """Runs the guide for `num_samples` draws, at once if possible; returns its trace."""
    if structure.vectorized:
        with pyro.plate(SAMPLES, num_samples, dim=-1 - structure.max_plate_nesting):
            return annotate_plates(traced(guide, None, *args, **kwargs), structure)
    traces: list[poutine.Trace] = []
    for _ in range(num_samples):
        # All draws use the subsample of the first.
        traces.append(traced(guide, _subsamples_of(traces[0]) if traces else None, *args, **kwargs))
    return _stacked(traces, structure)


def weigh(
    model: Callable, drawn: poutine.Trace, structure: SiteStructure, num_samples: int, *args: Any, **kwargs: Any
) -> tuple[poutine.Trace, Tensor]:
    r"""Runs a model at a guide's trace of `num_samples` draws; returns its trace and log weights, in the same shape."""
    check_masks(structure)
    scored = trace_model(model, drawn, structure, num_samples, *args, **kwargs)
    masks = {name: mask_around(site)[0] for name, site in sample_sites(scored).items()}
    return scored, log_p_of(scored, structure) - log_q_of(drawn, lambda q: log_prob_of(masked_as(q, masks)))


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


def log_p_of(
    trace: poutine.Trace, structure: SiteStructure, log_prob: Callable[[dict], Tensor] | None = None
) -> Tensor:
    r"""Returns :math:`\log p(x, z)` of a model's trace, ``(num_samples, batch)``, without its global observed sites.

    `log_prob` returns the log-probability of a site; :func:`log_prob_of` by default.
    """
    log_prob, sites = log_prob or log_prob_of, sample_sites(trace)
    terms = [per_datum(site, log_prob(site)) for name, site in sites.items() if name not in structure.global_observed]
    return torch.as_tensor(sum(terms, 0.0))


def log_q_of(trace: poutine.Trace, log_prob: Callable[[dict], Tensor] | None = None) -> Tensor:
    r"""Returns :math:`\log q` of the latents in a guide's trace, ``(num_samples, batch)``; no observed sites.

    `log_prob` as in :func:`log_p_of`.
    """
    log_prob = log_prob or log_prob_of
    latents = [site for site in sample_sites(trace).values() if not site["is_observed"]]
    return torch.as_tensor(sum((per_datum(site, log_prob(site)) for site in latents), 0.0))


def trace_model(
    model: Callable, draws: poutine.Trace, structure: SiteStructure, num_samples: int, *args: Any, **kwargs: Any
) -> poutine.Trace:
    """Runs the model at the latents of a guide's trace of `num_samples` draws; returns its trace."""
    if structure.vectorized:
        with pyro.plate(SAMPLES, num_samples, dim=-1 - structure.max_plate_nesting):
            return annotate_plates(traced(model, latents_of_trace(draws), *args, **kwargs), structure)
    parts = [one_draw(draws, structure, k) for k in range(num_samples)]
    return _stacked([traced(model, part, *args, **kwargs) for part in parts], structure)


def _subsamples_of(trace: poutine.Trace) -> poutine.Trace:
    """Returns a trace with its subsamples alone, without sample sites."""
    kept = trace.copy()
    for name in sample_sites(trace):
        kept.remove_node(name)
    return kept


def one_draw(draws: poutine.Trace, structure: SiteStructure, sample: int, points: bool = True) -> poutine.Trace:
    """Returns one of several draws as a trace of a single draw; without :class:`Delta` sites unless `points`."""
    part = latents_of_trace(draws)
    for name, site in sample_sites(part).items():
        if not points and isinstance(unwrapped(site["fn"]), pyro.distributions.Delta):
            part.remove_node(name)
            continue
        value, event_dim = site["value"], len(site["fn"].event_shape)
        value = value.expand(torch.broadcast_shapes(value.shape, site["fn"].batch_shape[1:] + site["fn"].event_shape))
        lead = value.dim() - event_dim
        value = value[sample] if lead > structure.max_plate_nesting else value
        value = value.reshape(value.shape[value.dim() - event_dim - site["num_plates"] :])
        part.nodes[name] = {**site, "value": value}
    return part


def _stacked(traces: list[poutine.Trace], structure: SiteStructure) -> poutine.Trace:
    """Returns one trace of several draws from traces of one draw each."""
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
            "value": _stacked_values([site["value"] for site in each], shape),
            "mask": _stacked_values([site["mask"] for site in each], fn.batch_shape),
            "scale": _stacked_values([site["scale"] for site in each], fn.batch_shape),
        }
    return annotate_plates(whole, structure)


def structure_of_run(
    structure: SiteStructure, sites: Set[str], model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> SiteStructure:
    """Returns the structure of a run, whose sites may be others than those of the batch that was inspected.

    A loop over time that ends with the longest sequence of a batch has as many sites as that sequence has steps. The
    sites of a batch must be the same in each run.

    Args:
        structure: that of the batch that was inspected.
        sites: names of the sites of the run.
        model: a Pyro model.
        guide: a Pyro guide.
        args: what both were called with in the run.
        kwargs: what both were called with in the run.

    Raises:
        ValueError: when the sites change from run to run; when the plates are others than in the batch that was
            inspected. The message names the sites.
    """
    if sites == structure.sites:
        return structure
    with isolated(tensors_of(args, kwargs)):
        for _ in range(3):  # sites that come and go at random may agree by chance
            drawn = traced(guide, None, *args, **kwargs)
            scored = traced(model, latents_of_trace(drawn), *args, **kwargs)
            check_same_sites(sample_sites(drawn).keys() | sample_sites(scored).keys(), sites)
    found = inspect(model, guide, *args, **kwargs)
    if (found.max_plate_nesting, found.data) != (structure.max_plate_nesting, structure.data):
        raise ValueError(
            f"the plate over the data is {structure.data or 'missing'} in one batch, {found.data or 'missing'} in "
            "another, or other plates differ. Put the sites in the same plates for every batch."
        )
    return found._replace(vectorized=structure.vectorized)


def check_same_sites(before: Set[str], now: Set[str]) -> None:
    """Raises a ValueError that names the sites that are in only one of two runs of a model and guide."""
    if before != now:
        changed = sorted(before ^ now)
        listed = ", ".join(f'"{name}"' for name in changed[:4]) + (f" and {len(changed) - 4} more" * bool(changed[4:]))
        raise ValueError(
            f"the sites of the model and the guide change from run to run ({listed}), so that the latents have no "
            "density. Draw all sites in every run, and mask those without a part in it with poutine.mask."
        )


def _stacked_values(values: list[Any], shape: torch.Size) -> Any:
    """Returns the value that all draws share, or the stack of their values, in front of the plates."""
    first = values[0]
    if all(value is first or not isinstance(value, Tensor) and value == first for value in values):
        return first
    return torch.stack([torch.as_tensor(value).expand(shape[1:]) for value in values])


def annotate_plates(trace: poutine.Trace, structure: SiteStructure) -> poutine.Trace:
    """Adds the plates of each site to a trace, and checks that the samples are the dimension in front of the plates.

    A site gets an entry "data", the frame of its data plate or None, and "num_plates", the number of plate dimensions
    of its values.
    """
    for name, site in sample_sites(trace).items():
        if site["value"].dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f'site "{name}" has values in {site["value"].dtype}, too coarse for densities. Give its distribution '
                "parameters in single precision: cast what a network returns, network(x).float()."
            )
        site["data"] = None if structure.data is None else structure.data.frame(site)
        site["num_plates"], plates = 0, set()
        for frame in site["cond_indep_stack"]:
            if frame.vectorized:
                plates.add(frame.dim)
                if frame.name != SAMPLES:
                    site["num_plates"] = max(site["num_plates"], -frame.dim)
        shape, depth = site["fn"].batch_shape, structure.max_plate_nesting
        stray = [dim for dim in range(-min(len(shape), depth), 0) if dim not in plates and shape[dim] > 1]
        if len(shape) > depth + 1 or stray:
            fault = "too many dimensions"
            if stray:
                fault = f"{shape[stray[0]]} at dimension {stray[0]}, where it is in no plate,"
            raise ValueError(
                f'site "{name}" has batch shape {tuple(shape)}, {fault} for samples in front of {depth} dimensions of '
                "plates. Latents have shape (num_samples, *plates, *event), with size 1 for each plate that they are "
                "not in: keep this order in what is computed from them, and sum over a plate with keepdim=True."
            )
    return trace


def log_prob_of(site: dict) -> Tensor:
    """Returns the log-probability of a site's value, masked but not scaled, ``(num_samples, *plates, batch)``.

    Scales, such as the N/B of a subsampled plate, belong outside of the logarithm of a mean of weights.
    """
    with full_precision([site["value"].device]):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def unmasked_log_prob_of(site: dict) -> Tensor:
    """Returns the log-probability of a latent as if it were not masked: the integral over its values is one."""
    return log_prob_of({**site, "fn": without_mask(site["fn"]), "mask": None})


def _hidden_elements_differ(scored: dict[str, dict], of_guide: dict[str, dict]) -> bool:
    """Whether a model and a guide mask other elements of latents."""
    latents = [name for name, site in scored.items() if not site["is_observed"] and name in of_guide]
    if not any(is_masked(sites[name]) for sites in (scored, of_guide) for name in latents):
        return False
    return any(bool(_hides(scored[name]).ne(_hides(of_guide[name])).any()) for name in latents)


def _hides(site: dict) -> Tensor:
    """Returns 0 where a site is not masked, 1 where some of its elements are, 2 where all are."""
    masked, whole = log_prob_of(site), unmasked_log_prob_of(site)
    return (masked != whole).int() * (1 + (masked == 0).int())


def per_datum(site: dict, t: Tensor, event_dim: int = 0) -> Tensor:
    """Sums a site's ``(num_samples, *plates, *event)`` over all plates except the data plate.

    Returns:
        Shape ``(num_samples, batch, *event)``, with a batch of 1 for a site outside of the data plate.
    """
    end = t.dim() - event_dim
    if site["data"] is None:
        return t.flatten(1, end - 1).sum(1, keepdim=True) if end > 1 else t.unsqueeze(1)
    if end == 2:
        return t
    return t.movedim(end + site["data"].dim, end - 1).flatten(1, end - 2).sum(1)
