"""KL divergences in closed form."""

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae.distributions import Stacked
from pyrovae.inference.sites import layers


def kl_in_closed_form(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor | None:
    """Returns KL(q || p) of each element of the batch, or None where no closed form is known.

    >>> q = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> kl_in_closed_form(q, dist.Normal(torch.ones(2), 1.0).to_event(1))
    tensor(1.)
    """
    # Torch and Pyro leave a point's density, and what a mask hides, out of account.
    if any(isinstance(fn, dist.Delta | dist.MaskedDistribution | Stacked) for fn in (*layers(q), *layers(p))):
        return None
    if q.batch_shape != p.batch_shape:  # some closed forms do not broadcast
        shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        q, p = q.expand(shape), p.expand(shape)
    if isinstance(q, dist.MultivariateNormal | dist.LowRankMultivariateNormal) and _is_diagonal_normal(p):
        loc, scale = p.base_dist.loc, p.base_dist.scale
        if isinstance(q, dist.MultivariateNormal):
            log_det = 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            log_det = _low_rank_log_det(q)
        squares = ((q.variance + (q.loc - loc).square()) / scale.square() - 1).sum(-1)
        return 0.5 * (squares + 2 * scale.log().sum(-1) - log_det)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _is_diagonal_normal(p: dist.TorchDistribution) -> bool:
    return isinstance(p, dist.Independent) and isinstance(p.base_dist, dist.Normal) and p.reinterpreted_batch_ndims == 1


def _low_rank_log_det(q: dist.LowRankMultivariateNormal) -> Tensor:
    """Returns the log-determinant of a covariance W W' + D, by the matrix determinant lemma."""
    return 2 * q._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) + q.cov_diag.log().sum(-1)


def conditioned_alike(model_names: list[str], guide_names: list[str]) -> set[str]:
    """Returns the latents whose KL divergence given the latents before them is what the ELBO holds.

    Given what the guide drew before a site, its term's mean over the site's own draw is a KL divergence if what the
    model may condition on there was drawn before. In a guide of another order it was not: p(z1 | z2) depends on a z2
    that in q(z2 | z1) depends on z1.
    """
    place = {name: i for i, name in enumerate(guide_names)}
    alike, latest = set(), -1
    for name in model_names:
        if name in place:
            if place[name] > latest:
                alike.add(name)
            latest = max(latest, place[name])
    return alike
