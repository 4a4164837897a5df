"""Imputation by importance sampling: draws and means of data given the observed data."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import in_memory, tensors_of
from pyrovae.distributions import center
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import DataPlate, sample_sites
from pyrovae.inference.weights import draw, inspect_weights, log_p_of, trace_model

__all__ = ["Imputation", "impute"]

_CHUNK = 2**22  # elements of the largest argument, times samples, that impute works on at once


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
    args, kwargs, size = in_memory(args, kwargs)
    chunk = max(1, _CHUNK // max((t.numel() for t in tensors_of(args, kwargs)), default=1))
    with evaluation_mode():
        structure = inspect_weights(model, guide, *args, num_samples=num_samples, **kwargs)
        place, right = structure.data_index, -1 - structure.data.dim  # of the data, and how many plates come after
        log_sum = log_sum_of_squares = mean = kept = None
        for start in range(0, num_samples, chunk):
            k = min(chunk, num_samples - start)
            drawn, log_q = draw(guide, structure, k, *args, **kwargs)
            scored = trace_model(model, drawn, structure, k, *args, **kwargs)
            if start == 0:
                _check_imputed(scored, site, log_q, size, structure.data)
            # In double precision, for the sums may run over very many terms.
            log_w = (log_p_of(scored, structure) - log_q).double()
            log_sum_here = log_w.logsumexp(0)
            before = torch.full_like(log_sum_here, -math.inf) if log_sum is None else log_sum
            log_sum = torch.logaddexp(before, log_sum_here)
            squares = (2 * log_w).logsumexp(0)
            log_sum_of_squares = squares if start == 0 else torch.logaddexp(log_sum_of_squares, squares)

            # As long as all weights are zero, their shares are 0 / 0: count them as none.
            w = (log_w - log_sum).exp().nan_to_num(0.0)
            p = scored.nodes[site]["fn"]
            part = (_beside(w, place, right, p) * center(p)).sum(0)
            mean = (
                part
                if start == 0
                else part + mean * _beside((before - log_sum).exp().nan_to_num(0.0), place - 1, right, p)
            )

            # Each draw keeps a latent of earlier chunks, or takes one of this, by their shares of the weight.
            choice = torch.multinomial((w + (w.sum(0) == 0)).T, num_draws, replacement=True).T
            taken = _take(drawn, choice, place)
            if start > 0:
                fresh = torch.rand_like(choice, dtype=w.dtype) < w.sum(0)
                _replace(taken, kept, ~fresh, place, right)
            kept = taken
        if bool((log_sum == -math.inf).any()):
            raise ValueError(
                f"all {num_samples} samples of datum {int((log_sum == -math.inf).nonzero()[0])} have weight zero, so there "
                "is nothing to impute from. Train the guide, or draw more samples."
            )
        p = trace_model(model, kept, structure, num_draws, *args, **kwargs).nodes[site]["fn"]
        draws = p.sample()
    ess = (2 * log_sum - log_sum_of_squares).exp().clamp(max=num_samples)
    shape = _own_shape(scored.nodes[site], mean.shape, structure.max_plate_nesting)
    return Imputation(mean.to(center(p).dtype).reshape(shape), draws.reshape(num_draws, *shape), ess.to(log_q.dtype))


def _check_imputed(trace: poutine.Trace, site: str, log_q: Tensor, size: int, plate: DataPlate) -> None:
    observed = [name for name, node in sample_sites(trace).items() if node["is_observed"]]
    if site not in observed:
        raise ValueError(f'The model has no observed site "{site}" to impute; it has {", ".join(observed) or "none"}.')
    plate.check_in_order(log_q.shape[1], size)


def _beside(t: Tensor, dim: int, right: int, p: Any) -> Tensor:
    """Returns t, ``(*samples, batch)``, with the data at dimension `dim`, `right` more plates, and room for the events of p."""
    shape = t.shape[:-1] + (1,) * (dim + 1 - t.dim()) + t.shape[-1:] + (1,) * right
    return t.reshape(shape + (1,) * len(p.event_shape))


def _take(trace: poutine.Trace, choice: Tensor, dim: int) -> poutine.Trace:
    """Returns a guide's trace at chosen samples, ``(num_draws, batch)``, with the data at dimension `dim`."""
    rows = torch.arange(choice.shape[1], device=choice.device)
    taken = trace.copy()
    for name, node in sample_sites(trace).items():
        if not node["is_observed"]:
            taken.nodes[name] = {**node, "value": node["value"].movedim(dim, 1)[choice, rows].movedim(1, dim)}
    return taken


def _replace(trace: poutine.Trace, other: poutine.Trace, where: Tensor, dim: int, right: int) -> None:
    for name, node in sample_sites(trace).items():
        if not node["is_observed"]:
            node["value"] = torch.where(
                _beside(where, dim, right, node["fn"]), other.nodes[name]["value"], node["value"]
            )


def _own_shape(node: dict, shape: torch.Size, depth: int) -> torch.Size:
    """Returns a shape without the leading dimensions of plates that a site does not stand in."""
    return shape[depth - node["num_plates"] :]
