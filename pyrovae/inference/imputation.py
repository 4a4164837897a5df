"""Imputation by importance sampling: draws and means of data given the observed data."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import in_memory, take_rows, tensors_of
from pyrovae.distributions import center
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.weights import inspect_weights, trace_guide, trace_model, weigh
from pyrovae.rows import number_type

__all__ = ["Imputation", "impute"]

_CHUNK = 2**22  # elements of the largest argument, times samples, that impute works on at once


class Imputation(NamedTuple):
    r"""Means and draws of data given the observed data.

    Args:
        mean: :math:`\mathrm{E}[x' \mid x]`, shape ``(batch, *x_shape)``.
        draws: draws of :math:`x' \sim p(x' \mid x)`, shape ``(num_draws, batch, *x_shape)``.
        ess: effective sample size of the weights, shape ``(batch,)``, between 1 and the number of samples; where it is
            small, mean and draws are unreliable.
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
    r"""Draws data given the observed data, by self-normalised importance sampling with the guide as the proposal.

    .. math:: \mathrm{E}[x' \mid x] \approx \sum_{k=1}^K \bar w_k\, \mathrm{E}[x' \mid z_k], \qquad
        \bar w_k = \frac{w_k}{\sum_j w_j}, \quad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    A draw of :math:`x'` takes :math:`z_k` with probability :math:`\bar w_k`, and then :math:`x' \sim p(x' \mid z_k)`.
    Where elements of x were not observed (masked), :math:`x'` is an imputation; where they were, a reconstruction.
    Modules run in evaluation mode. Samples are processed in chunks; data are not, so that they must fit in memory.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        num_samples: samples per datum :math:`K`.
        num_draws: draws of :math:`x'` per datum.
        site: name of the observed site of the model to draw.
        **kwargs: what both are called with.

    Returns:
        An :class:`Imputation`. Its mean is a mean of modes where :math:`p(x' \mid z)` has no finite mean (classes).

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
    args, kwargs, size = in_memory(args, kwargs, number_type(model, guide))
    args, kwargs = take_rows(slice(None), args, kwargs)  # arrays as tensors
    chunk = max(1, _CHUNK // max((t.numel() for t in tensors_of(args, kwargs)), default=1))
    with evaluation_mode():
        structure = inspect_weights(model, guide, *args, num_samples=num_samples, **kwargs)
        # The dimension of the data, and the number of plates to the right of it.
        dim = structure.data_index
        right = structure.max_plate_nesting - dim
        so_far: _SoFar | None = None
        for start in range(0, num_samples, chunk):
            k = min(chunk, num_samples - start)
            guide_trace = trace_guide(guide, structure, k, *args, **kwargs)
            model_trace, log_w = weigh(model, guide_trace, structure, k, *args, **kwargs)
            sites = sample_sites(model_trace)
            if start == 0:
                observed = [name for name, node in sites.items() if node["is_observed"]]
                if site not in observed:
                    listed = ", ".join(observed) or "none"
                    raise ValueError(f'The model has no observed site "{site}" to impute; it has {listed}.')
                if structure.data is not None:
                    structure.data.check_in_order(log_w.shape[1], size)
            # In double precision, because the sums may have very many terms.
            dtype, log_w = log_w.dtype, log_w.double()
            log_sum, log_sum_of_squares = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
            if so_far is not None:
                log_sum = torch.logaddexp(so_far.log_sum, log_sum)
                log_sum_of_squares = torch.logaddexp(so_far.log_sum_of_squares, log_sum_of_squares)

            # The shares of the samples so far; while all weights are zero they are 0 / 0, and count as zero.
            w = (log_w - log_sum).exp().nan_to_num(0.0)
            p = sites[site]["fn"]
            mean = (_align(w, dim, right, p) * center(p)).sum(0)
            choice = torch.multinomial((w + (w.sum(0) == 0)).T, num_draws, replacement=True).T
            latents = _take(guide_trace, choice, dim)
            if so_far is not None:
                mean = mean + so_far.mean * _align((so_far.log_sum - log_sum).exp().nan_to_num(0.0), dim - 1, right, p)
                # Each draw keeps a latent of the chunks before or takes one of this chunk, by their shares of the
                # weight.
                is_new = torch.rand_like(choice, dtype=w.dtype) < w.sum(0)
                before = sample_sites(so_far.latents)
                for name, node in sample_sites(latents).items():
                    if not node["is_observed"]:
                        is_old = _align(~is_new, dim, right, node["fn"])
                        node["value"] = torch.where(is_old, before[name]["value"], node["value"])
            so_far = _SoFar(log_sum, log_sum_of_squares, mean, latents)
        has_no_weight = log_sum == -math.inf
        if bool(has_no_weight.any()):
            raise ValueError(
                f"all {num_samples} samples of datum {int(has_no_weight.nonzero()[0])} have weight zero, so that there "
                "is nothing to impute from. Train the guide, or draw more samples."
            )
        drawn = sample_sites(trace_model(model, latents, structure, num_draws, *args, **kwargs))
        p = drawn[site]["fn"]
        draws = p.sample()
    ess = (2 * log_sum - log_sum_of_squares).exp().clamp(max=num_samples)
    # Without the leading dimensions of plates that the site is not in.
    shape = mean.shape[structure.max_plate_nesting - sites[site]["num_plates"] :]
    return Imputation(mean.to(center(p).dtype).reshape(shape), draws.reshape(num_draws, *shape), ess.to(dtype))


class _SoFar(NamedTuple):
    """The results of the chunks of samples so far.

    Args:
        log_sum: log of the sum of the weights, ``(batch,)``.
        log_sum_of_squares: log of the sum of their squares, ``(batch,)``.
        mean: mean of the data.
        latents: trace of the latents that are chosen for the draws.
    """

    log_sum: Tensor
    log_sum_of_squares: Tensor
    mean: Tensor
    latents: poutine.Trace


def _align(t: Tensor, dim: int, right: int, p: Any) -> Tensor:
    """Reshapes ``(*samples, batch)``: data at dimension `dim`, then `right` plates and the event of p with size 1."""
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
