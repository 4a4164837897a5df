"""What each site contributes to the log weights of particles: log-probabilities, or KL divergences in closed form."""

from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrovae.bounds.kl import conditioned_alike, kl_in_closed_form
from pyrovae.bounds.penalties import Penalty
from pyrovae.inference.running import full_precision
from pyrovae.inference.sites import independent_elements, mask_around, sample_sites
from pyrovae.inference.weights import log_prob_of, masked_as, per_datum


class ModelTerms(NamedTuple):
    r"""The contributions of a model's sites, each ``(num_particles, batch)``, by name.

    Args:
        observed: of observed sites, :math:`\log p(x \mid z)`.
        latent: of latent sites, :math:`\log p(z)`, or minus a KL divergence in closed form; with a dimension of latents
            at the end where a penalty is per dimension.
        closed: names of the latents with a KL divergence in closed form.
        scales: factors that are not applied yet, by the names of the sites.
        masks: of the latents, which hide them from the guide's density too.
    """

    observed: dict[str, Tensor]
    latent: dict[str, Tensor]
    closed: frozenset[str]
    scales: dict[str, float | Tensor]
    masks: dict[str, Any]


class SiteTerms(NamedTuple):
    r"""The contributions of all sites, as those of :class:`ModelTerms`.

    Args:
        observed: of the model's observed sites.
        model: of the model's latent sites.
        guide: of the guide's latent sites, :math:`\log q(z \mid x)`; none where the KL divergence is in closed form.
        model_scales: factors that are not applied yet, for the model's sites.
        guide_scales: the same for the guide's sites.
    """

    observed: dict[str, Tensor]
    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    model_scales: dict[str, float | Tensor]
    guide_scales: dict[str, float | Tensor]

    def reconstruction_and_kl(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the reconstruction and the KL divergence of each latent: means over particles, sums over the data."""
        # Subtracted from 0, because the negative of 0 would be printed as -0.
        kl = {name: 0.0 - _total(t, self.model_scales[name]) for name, t in self.model.items()}
        for name, t in self.guide.items():
            log_q = _total(t, self.guide_scales[name])
            kl[name] = kl[name] + log_q if name in kl else log_q
        observed = [_total(t, self.model_scales[name]) for name, t in self.observed.items()]
        return torch.as_tensor(sum(observed, 0.0)), kl


class SiteScorer(NamedTuple):
    """Computes the contributions of sites from the traces of a model and a guide.

    Args:
        closed_form: whether to take KL divergences in closed form, where there is one.
        penalty: the penalty on KL divergences, which says whether they are taken per dimension.
        weighted_sites: whether to apply the factors of single sites that are tensors (``poutine.scale``); otherwise,
            and for numbers, the bound applies them.
    """

    closed_form: bool = False
    penalty: Penalty | None = None
    weighted_sites: bool = False

    def model_terms(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> ModelTerms:
        """Returns the contributions of a model's sites, at the latents of a guide."""
        p_sites, q_sites = sample_sites(model_trace), sample_sites(guide_trace)
        exact = conditioned_alike(list(p_sites), list(q_sites)) if self.closed_form else frozenset()
        observed, latent, closed, masks = {}, {}, set(), {}
        for name, p in p_sites.items():
            if p["is_observed"]:
                observed[name] = self._log_prob(p)
            elif name in q_sites:
                masks[name] = mask_around(p)[0]
                minus_kl = self._minus_kl(p, q_sites[name]) if name in exact else None
                latent[name] = self._log_prob(p, latent=True) if minus_kl is None else minus_kl
                if minus_kl is not None:
                    closed.add(name)
        return ModelTerms(observed, latent, frozenset(closed), self._scales(p_sites), masks)

    def with_guide(self, terms: ModelTerms, guide_trace: poutine.Trace, detached: bool) -> SiteTerms:
        """Returns the contributions of all sites, with those of a guide's sites added.

        Args:
            terms: the contributions of the model's sites.
            guide_trace: trace of the guide.
            detached: whether the latents were detached from their draws.
        """
        sites, log_q = sample_sites(guide_trace), {}
        for name, q in sites.items():
            if name in terms.closed:
                continue
            try:
                log_q[name] = self._log_prob(masked_as(q, terms.masks), latent=name in terms.latent)
            except (KeyError, NotImplementedError) as error:
                if not detached:
                    raise
                raise ValueError(
                    f'this gradient takes log q of the latents of site "{name}" apart from their draw, which '
                    f"{type(q['fn']).__name__} cannot compute ({error}). Take gradient=Reparameterized(), or a "
                    "distribution with a density for any value, such as a flow of zuko's."
                ) from error
        return SiteTerms(terms.observed, terms.latent, log_q, terms.scales, self._scales(sites))

    def _log_prob(self, site: dict, latent: bool = False) -> Tensor:
        """Returns the log-probability of a site, per dimension for a penalty on the dimensions of a latent."""
        if latent and self.penalty is not None and self.penalty.per_dimension:
            with full_precision([site["value"].device]):
                t = _elements(site).log_prob(site["value"])
            return self._sum_per_dimension(site, t)
        return self._sum(site, log_prob_of(site))

    def _minus_kl(self, p: dict, q: dict) -> Tensor | None:
        """Returns minus the KL divergence of a latent in closed form, or None without one."""
        if not same_scale(p["scale"], q["scale"]):
            return None
        per_dimension = self.penalty is not None and self.penalty.per_dimension
        (mask, p_fn), (_, q_fn) = mask_around(p), mask_around(q)
        p, q = {**p, "fn": p_fn, "mask": mask}, {**q, "fn": q_fn}
        p_fn, q_fn = (_elements(p), _elements(q)) if per_dimension else (p_fn, q_fn)
        with full_precision([q["value"].device]):
            kl = kl_in_closed_form(q_fn, p_fn)
        if kl is None:
            return None
        # A divergence that does not depend on the draws is the same for all particles.
        t = -kl.expand(p["value"].shape[: p["value"].dim() - len(p_fn.event_shape)])
        return self._sum_per_dimension(p, t) if per_dimension else self._sum(p, scale_and_mask(t, mask=mask))

    def _sum_per_dimension(self, site: dict, t: Tensor) -> Tensor:
        """Masks ``(num_particles, *plates, latent_dim)``, or a scalar site without the last; sums it over plates."""
        mask = site["mask"].unsqueeze(-1) if isinstance(site["mask"], Tensor) else site["mask"]
        t = scale_and_mask(t if site["fn"].event_shape else t.unsqueeze(-1), mask=mask)
        return self._sum(site, t, event_dim=1)

    def _sum(self, site: dict, t: Tensor, event_dim: int = 0) -> Tensor:
        """Applies a tensor-valued scale of a site; sums over all plates except the data plate."""
        if self.weighted_sites and _is_tensor_scale(site["scale"]):
            if self.penalty is not None and not site["is_observed"]:
                raise ValueError(
                    f'site "{site["name"]}" is scaled by a tensor, but {type(self.penalty).__name__} is a function of '
                    "the KL divergence without a scale. Scale it by one number, or leave out the penalty."
                )
            t = t * site["scale"]
        return per_datum(site, t, event_dim)

    def _scales(self, sites: dict[str, dict]) -> dict[str, float | Tensor]:
        """Returns the factors of sites that :meth:`_sum` leaves to the bound."""
        scales = {}
        for name, site in sites.items():
            applied = self.weighted_sites and _is_tensor_scale(site["scale"])
            scales[name] = 1.0 if applied else site["scale"]
        return scales


def same_scale(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two sites have the same scale."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):  # a number, and a tensor of one
        return max(torch.as_tensor(a).dim(), torch.as_tensor(b).dim()) == 0 and bool(a == b)
    return a == b


def _is_tensor_scale(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.dim() > 0


def _elements(site: dict) -> dist.TorchDistribution:
    """Returns the distribution of a latent's dimensions, as elements of its batch."""
    fn = independent_elements(site["fn"]) if len(site["fn"].event_shape) <= 1 else None
    if fn is None:
        raise ValueError(
            f'FreeBits(group_size=...) needs the KL divergence of each dimension, but site "{site["name"]}" has a '
            f"{type(site['fn']).__name__} whose dimensions are not independent. Take group_size=None, for the whole "
            "site."
        )
    return fn


def _total(t: Tensor, scale: float | Tensor) -> Tensor:
    """Returns the mean over particles, summed over dimensions and data."""
    t = t.detach().mean(0)
    t = t.sum(-1) if t.dim() > 1 else t
    return (t * scale).sum()
