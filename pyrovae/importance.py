r"""Importance weights of any Pyro model and guide, and data drawn by them.

The one place where :math:`\log p(x, z) - \log q(z \mid x)` is formed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrovae.checks import DATA, Structure, evaluation_mode, full_precision, inspect, named_arguments, sample_sites
from pyrovae.distributions import center

__all__ = ["Imputation", "impute", "log_weights"]

_SAMPLES = "_num_samples"  # the plate of the draws, left of all others
_CHUNK = 2**22  # elements of the largest argument, times samples, that impute works on at once


def log_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> Tensor:
    r"""Draws log importance weights, per datum, for any model and guide; differentiable.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    The mean of the weights is an unbiased estimate of :math:`p(x_n)`. Everything per datum must stand in a plate named
    "data" at dimension -1. Factors that only scale a loss (``poutine.scale``, the N/B of a subsampled data plate) are
    left out, masks are applied. The guide runs once, for all samples together.

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


def inspect_weights(model: Callable, guide: Callable, *args: Any, num_samples: int, **kwargs: Any) -> Structure:
    """Returns the structure of a model and a guide, or raises because weights per datum are undefined."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    structure = inspect(model, guide, *args, **kwargs)
    if structure.problems:
        raise ValueError(
            f"Importance weights per datum are undefined: {'; '.join(structure.problems)}. What belongs to a datum "
            'must stand under pyro.plate("data", len(x), dim=-1) in the model and in the guide, drawn from a density.'
        )
    return structure


def draw(
    guide: Callable, structure: Structure, num_samples: int, *args: Any, **kwargs: Any
) -> tuple[poutine.Trace, Tensor]:
    r"""Runs the guide once for `num_samples` draws; returns its trace and :math:`\log q`, ``(num_samples, batch)``."""
    trace = trace_guide(guide, structure, num_samples, *args, **kwargs)
    return trace, _log_prob_per_datum(trace)


def trace_guide(guide: Callable, structure: Structure, num_samples: int, *args: Any, **kwargs: Any) -> poutine.Trace:
    """Runs the guide once for `num_samples` draws; returns its trace."""
    with _samples(structure, num_samples), poutine.trace() as tracer:
        guide(*args, **kwargs)
    return _of_depth(tracer.trace, structure)


def log_joint(
    model: Callable,
    draws: poutine.Trace,
    structure: Structure,
    num_samples: int,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    r"""Returns :math:`\log p(x, z)` at the latents of a guide's trace of `num_samples` draws, in the same shape."""
    trace = trace_model(model, draws, structure, num_samples, *args, **kwargs)
    return _log_prob_per_datum(trace)


def trace_model(
    model: Callable, draws: poutine.Trace, structure: Structure, num_samples: int, *args: Any, **kwargs: Any
) -> poutine.Trace:
    """Runs the model at the latents of a guide's trace of `num_samples` draws; returns its trace."""
    # Handlers as contexts, not wrappers: a wrapped model could not take an argument of the name "context".
    with _samples(structure, num_samples), poutine.trace() as tracer, poutine.replay(trace=draws):
        model(*args, **kwargs)
    return _of_depth(tracer.trace, structure)


def _of_depth(trace: poutine.Trace, structure: Structure) -> poutine.Trace:
    """Returns a trace, after checking that its samples lie right in front of its plates, where they are looked for."""
    for name, site in sample_sites(trace).items():
        if site["value"].dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f'site "{name}" has values in {site["value"].dtype}, too coarse for densities. Give its distribution numbers in '
                "single precision: cast what a network returns, network(x).float()."
            )
        shape = site["fn"].batch_shape
        plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
        stray = [dim for dim in range(-min(len(shape), structure.max_plate_nesting), 0) if dim not in plates and shape[dim] > 1]
        if len(shape) > structure.max_plate_nesting + 1 or stray:
            wrong = f"{shape[stray[0]]} at dimension {stray[0]}, where it stands in no plate," if stray else "too many dimensions"
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
    in_place, given = {}, [*args, *kwargs.values()]
    for name, site in sites.items():
        if site["infer"].get("was_observed") and not site["infer"].get("_deterministic"):
            seen = site["infer"]["obs"]
            if not any(seen is value for value in given):
                raise ValueError(
                    f'Data drawn from the model at site "{name}" cannot be handed back to it: what the site observes is '
                    "none of the arguments as given. Observe the argument itself."
                )
            in_place[id(seen)] = site["value"]
    swapped = {name: in_place.get(id(value), value) for name, value in kwargs.items()}
    return drawn, tuple(in_place.get(id(value), value) for value in args), swapped


def log_prob_of(site: dict) -> Tensor:
    """Returns the log-probability of a site's value, masked but not scaled, ``(num_samples, *plates, batch)``."""
    # N/B and training weights belong outside the log of a mean of weights.
    with full_precision([site["value"].device]):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


def in_data(site: dict) -> bool:
    """Whether a site stands in the data plate."""
    return any(frame.name == DATA and frame.dim == -1 for frame in site["cond_indep_stack"])


def per_datum(site: dict, t: Tensor, event_dim: int = 0) -> Tensor:
    """Sums a site's ``(num_samples, *plates, batch, *event)`` over its plates but the data's.

    Over all plates for a site that does not stand in the data plate; its batch is one.

    Returns:
        Shape ``(num_samples, batch, *event)``.
    """
    end = t.dim() - event_dim
    if in_data(site):
        return t.flatten(1, end - 2).sum(1) if end > 2 else t
    return t.flatten(1, end - 1).sum(1, keepdim=True) if end > 1 else t.unsqueeze(1)


class Imputation(NamedTuple):
    r"""What a model makes of data that it was given, seen through the latents.

    Args:
        mean: :math:`\mathrm{E}[x' \mid x]`, shape ``(batch, *x_shape)``.
        draws: draws of :math:`x' \sim p(x' \mid x)`, shape ``(num_draws, batch, *x_shape)``.
        ess: effective sample size of the weights, shape ``(batch,)``, between 1 and the number of samples; where it is
            small, neither mean nor draws are to be trusted.
    """

    mean: Tensor
    draws: Tensor
    ess: Tensor


@torch.no_grad()
def impute(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    num_draws: int = 1,
    site: str = "x",
    **kwargs: Any,
) -> Imputation:
    r"""Draws data anew given the data, by self-normalised importance sampling with the guide as the proposal.

    .. math:: \mathrm{E}[x' \mid x] \approx \sum_{k=1}^K \bar w_k\, \mathrm{E}[x' \mid z_k], \qquad
        \bar w_k = \frac{w_k}{\sum_j w_j}, \quad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    A draw of :math:`x'` takes one :math:`z_k`, each with probability :math:`\bar w_k`, and then
    :math:`x' \sim p(x' \mid z_k)`. Where elements of x were not observed (masked), :math:`x'` is what the model puts in
    their place; where they were, a reconstruction. Modules run in evaluation mode. Samples are worked through in
    chunks; data are not, so hand over only as many as fit in memory.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        num_samples: samples per datum :math:`K`.
        num_draws: draws of :math:`x'` per datum.
        site: name of the observed site of the model to draw.
        **kwargs: what both are called with.

    Returns:
        An :class:`Imputation`. Its mean is made of modes where :math:`p(x' \mid z)` has no finite mean (classes).

    Raises:
        ValueError: when `num_samples` or `num_draws` is below 1, the model has no such observed site, all weights of a
            datum are zero, or weights per datum are undefined, as in :func:`log_weights`.

    References:
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets, P.-A. Mattei and J. Frellsen, 2019,
        https://arxiv.org/abs/1812.02633.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> imputed = impute(vae.model, vae.guide, torch.zeros(5, 3), num_samples=100, num_draws=4)
    >>> imputed.mean.shape, imputed.draws.shape, imputed.ess.shape
    (torch.Size([5, 3]), torch.Size([4, 5, 3]), torch.Size([5]))
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    tensors = [t for _, t in named_arguments(args, kwargs) if isinstance(t, Tensor) and t.dim() > 0]
    chunk = max(1, _CHUNK // max((t.numel() for t in tensors), default=1))
    with evaluation_mode():
        structure = inspect_weights(model, guide, *args, num_samples=num_samples, **kwargs)
        depth = structure.max_plate_nesting  # the dimension of the data, once samples are the first
        log_sum = log_sum_of_squares = mean = kept = None
        for start in range(0, num_samples, chunk):
            k = min(chunk, num_samples - start)
            drawn, log_q = draw(guide, structure, k, *args, **kwargs)
            scored = trace_model(model, drawn, structure, k, *args, **kwargs)
            if start == 0:
                _check_imputed(scored, site, log_q, tensors)
            # In double precision, for the sums may run over very many terms.
            log_w = (_log_prob_per_datum(scored) - log_q).double()
            log_sum_here = log_w.logsumexp(0)
            before = torch.full_like(log_sum_here, -math.inf) if log_sum is None else log_sum
            log_sum = torch.logaddexp(before, log_sum_here)
            squares = (2 * log_w).logsumexp(0)
            log_sum_of_squares = squares if start == 0 else torch.logaddexp(log_sum_of_squares, squares)

            # As long as all weights are zero, their shares are 0 / 0: count them as none.
            w = (log_w - log_sum).exp().nan_to_num(0.0)
            p = scored.nodes[site]["fn"]
            part = (_beside(w, depth, p) * center(p)).sum(0)
            mean = part if start == 0 else part + mean * _beside((before - log_sum).exp().nan_to_num(0.0), depth - 1, p)

            # Each draw keeps a latent of earlier chunks, or takes one of this, by their shares of the weight.
            choice = torch.multinomial((w + (w.sum(0) == 0)).T, num_draws, replacement=True).T
            taken = _take(drawn, choice, depth)
            if start > 0:
                fresh = torch.rand_like(choice, dtype=w.dtype) < w.sum(0)
                _replace(taken, kept, ~fresh, depth)
            kept = taken
        if bool((log_sum == -math.inf).any()):
            raise ValueError(
                f"all {num_samples} samples of datum {int((log_sum == -math.inf).nonzero()[0])} have weight zero, so there "
                "is nothing to impute from. Train the guide, or draw more samples."
            )
        p = trace_model(model, kept, structure, num_draws, *args, **kwargs).nodes[site]["fn"]
        draws = p.sample()
    ess = (2 * log_sum - log_sum_of_squares).exp().clamp(max=num_samples)
    shape = _own_shape(scored.nodes[site], mean.shape, depth)
    return Imputation(mean.to(center(p).dtype).reshape(shape), draws.reshape(num_draws, *shape), ess.to(log_q.dtype))


def _samples(structure: Structure, num_samples: int) -> pyro.plate:
    return pyro.plate(_SAMPLES, num_samples, dim=-1 - structure.max_plate_nesting)


def _log_prob_per_datum(trace: poutine.Trace) -> Tensor:
    return sum(per_datum(site, log_prob_of(site)) for site in sample_sites(trace).values())


def _check_imputed(trace: poutine.Trace, site: str, log_q: Tensor, tensors: list[Tensor]) -> None:
    observed = [name for name, node in sample_sites(trace).items() if node["is_observed"]]
    if site not in observed:
        raise ValueError(f'The model has no observed site "{site}" to impute; it has {", ".join(observed) or "none"}.')
    if tensors and len(tensors[0]) != log_q.shape[1]:
        raise ValueError(
            f'The plate "data" drew {log_q.shape[1]} of {len(tensors[0])} data that it was given. Impute data in the '
            'order they come: use pyro.plate("data", len(x)), or pyro.plate("data", total, subsample=x).'
        )


def _beside(t: Tensor, dim: int, p: Any) -> Tensor:
    """Returns t, ``(*samples, batch)``, with the data at dimension `dim` and room for the plates and events of p."""
    shape = t.shape[:-1] + (1,) * (dim + 1 - t.dim()) + t.shape[-1:]
    return t.reshape(shape + (1,) * len(p.event_shape))


def _take(trace: poutine.Trace, choice: Tensor, dim: int) -> poutine.Trace:
    """Returns a guide's trace at chosen samples, ``(num_draws, batch)``, with the data at dimension `dim`."""
    rows = torch.arange(choice.shape[1], device=choice.device)
    taken = trace.copy()
    for name, node in sample_sites(trace).items():
        if not node["is_observed"]:
            taken.nodes[name] = {**node, "value": node["value"].movedim(dim, 1)[choice, rows].movedim(1, dim)}
    return taken


def _replace(trace: poutine.Trace, other: poutine.Trace, where: Tensor, dim: int) -> None:
    for name, node in sample_sites(trace).items():
        if not node["is_observed"]:
            node["value"] = torch.where(_beside(where, dim, node["fn"]), other.nodes[name]["value"], node["value"])


def _own_shape(node: dict, shape: torch.Size, depth: int) -> torch.Size:
    """Returns a shape without the leading dimensions of plates that a site does not stand in."""
    own = max(-frame.dim for frame in node["cond_indep_stack"] if frame.vectorized and frame.name != _SAMPLES)
    return shape[depth - own :]
