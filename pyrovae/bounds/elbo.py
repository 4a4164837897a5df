r"""The evidence lower bound, and what training does with its KL divergence."""

from collections.abc import Sequence

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyrovae.bounds.base import Bound, LossParts, Sides, same_scale
from pyrovae.bounds.gradients import Gradient
from pyrovae.bounds.kl import kl_in_closed_form
from pyrovae.bounds.penalties import Penalty
from pyrovae.bounds.reductions import Reduced, power_mean
from pyrovae.bounds.schedules import Schedule, check_weight, value_at
from pyrovae.inference.running import full_precision
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import log_prob_of, per_datum
from pyrovae.regularizers import Regularizer


class ELBO(Bound):
    r"""The evidence lower bound, with closed-form KL divergences and weights on them.

    .. math:: \mathrm{E}_{q(z \mid x)} \log p(x \mid z) - \beta\, \mathrm{KL}(q(z \mid x) \,\|\, p(z))
        \;\le\; \log p(x) \quad (\beta \ge 1)

    A latent site's KL divergence is taken in closed form where its pair of distributions has one, given the latents
    before it; this is right for a hierarchy inferred in the order of the model, and where the guide has another order
    the term is estimated from the draws. With ``gradient=StickingTheLanding()`` all are, for only then does the variance
    vanish at the exact posterior. Latents outside the data plate, and ``poutine.scale`` on single sites, are fine.

    Args:
        num_particles: draws of the guide per datum, at least 1.
        beta: weight of the KL divergences, a number or a :class:`Schedule`, at least 0. A warm-up may start at 0.
        penalty: what is made of the divergence of each latent site, :class:`FreeBits` or :class:`Capacity`; None for the
            divergence itself.
        closed_form: whether to take divergences in closed form.
        gradient: the estimator of the gradient.
        chunk_size: particles that the model is run on at once; None for all.
        regularizers: what else the loss holds.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114; beta-VAE,
        I. Higgins et al., 2017, https://openreview.net/forum?id=Sy2fzU9gl.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> loss = ELBO(beta=Linear(steps=4), penalty=FreeBits(0.1))
    >>> x = torch.randn(100, 3)
    >>> history = pyrovae.fit(vae.model, vae.guide, x, loss=loss, batch_size=50, epochs=2, progress=False)
    >>> len(history["kl z"])
    2
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        beta: float | Schedule = 1.0,
        penalty: Penalty | None = None,
        closed_form: bool = True,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        if not (penalty is None or isinstance(penalty, Penalty)):
            raise TypeError(f"penalty must be one that is built, such as bounds.FreeBits(0.1), got {penalty!r}.")
        self.beta = beta if isinstance(beta, Schedule) else check_weight("beta", beta)
        self.penalty, self.closed_form = penalty, closed_form
        # A penalty of divergences that are estimated is no function of the mean log weight any more.
        self.linear = self.smooth = penalty is None
        super().__init__(num_particles, gradient, chunk_size, regularizers)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 0.0)

    @property
    def schedules(self) -> list[Schedule]:
        held = [self.beta, *vars(self.penalty).values()] if self.penalty is not None else [self.beta]
        return [number for number in held if isinstance(number, Schedule)]

    @property
    def span(self) -> int:
        return max((schedule.span for schedule in self.schedules), default=0)

    def _check_structure(self, structure: SiteStructure) -> None:
        enumerated = [problem for problem in structure.problems if "enumerated" in problem]
        if enumerated:
            raise ValueError(f"bounds.ELBO does not enumerate: {'; '.join(enumerated)}. Use pyro.infer.TraceEnum_ELBO.")

    @property
    def _closes(self) -> bool:
        return self.closed_form and not self.gradient.reparameterized

    @property
    def _each(self) -> bool:
        return self.penalty is not None and self.penalty.per_dimension

    def _model_side(self, p: dict, q: dict, closed_form: bool) -> tuple[Tensor, bool]:
        p_fn, event_dim = (_dimensions(p), 1) if self._each else (p["fn"], 0)
        kl = None
        if closed_form and self._closes and p["mask"] is q["mask"] and same_scale(p["scale"], q["scale"]):
            with full_precision([q["value"].device]):
                kl = kl_in_closed_form(_dimensions(q) if self._each else q["fn"], p_fn)
        # A divergence that does not depend on the draw is the same for all.
        batch = p["value"].shape[: p["value"].dim() - len(p_fn.event_shape)]
        t = self._masked(p, p_fn.log_prob(p["value"]) if kl is None else -kl.expand(batch))
        return per_datum(p, self._scaled(p, t, event_dim), event_dim), kl is not None

    def _guide_side(self, q: dict, shared: bool) -> Tensor:
        if not (self._each and shared):
            return per_datum(q, self._scaled(q, log_prob_of(q)))
        return per_datum(q, self._scaled(q, self._masked(q, _dimensions(q).log_prob(q["value"])), 1), 1)

    def _masked(self, site: dict, t: Tensor) -> Tensor:
        """Masks the contribution of a latent, or of each of its dimensions, of which a number is the only one."""
        mask = site["mask"]
        if self._each:
            t = t if site["fn"].event_shape else t.unsqueeze(-1)
            mask = mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask
        return scale_and_mask(t, mask=mask)

    def _scale_of(self, site: dict) -> float | Tensor:
        return 1.0 if _varies(site["scale"]) else site["scale"]

    def _scaled(self, site: dict, t: Tensor, event_dim: int = 0) -> Tensor:
        if not _varies(site["scale"]):
            return t
        if self.penalty is not None and not site["is_observed"]:
            raise ValueError(
                f'site "{site["name"]}" is scaled by a tensor, which has no place in {type(self.penalty).__name__}, a '
                "function of the divergence itself. Scale it by one number, or leave out the penalty."
            )
        return t * (site["scale"].unsqueeze(-1) if event_dim else site["scale"])

    def _loss_parts(self, sides: Sides, reconstruction: Tensor, kl: dict[str, Tensor], batch: int) -> LossParts:
        step = self.steps if torch.is_grad_enabled() else None
        beta, scales = value_at(self.beta, step), sides.scales
        log_p = [t * scales["p", name] for name, t in sides.observed.items()]
        log_q, loss = [], -reconstruction
        for name, divergence in kl.items():
            sites = {side: t[name] for side, t in (("p", sides.model), ("q", sides.guide)) if name in t}
            if self.penalty is not None and "p" in sites:
                signed = (-t.detach().mean(0) if side == "p" else t.detach().mean(0) for side, t in sites.items())
                slope, penalty = _penalize(self.penalty, sum(signed), step)
                loss = loss + beta * (penalty * scales["p", name]).sum()
            else:
                slope, loss = 1.0, loss + beta * divergence
            for side, t in sites.items():
                t = beta * slope * t * scales[side, name]
                (log_p if side == "p" else log_q).append(t.sum(-1) if t.dim() > 2 else t)
        return LossParts(*_by_datum(log_p, log_q, batch), 1.0, loss, reconstruction - sum(kl.values()))


def _penalize(penalty: Penalty, kl: Tensor, step: int | None) -> tuple[Tensor | float, Tensor]:
    """Returns the slopes of a penalty at the KL divergences of the data, in training, and what it is for each datum."""
    if step is None:
        return 1.0, penalty(kl, step)
    with torch.enable_grad():
        value = penalty(kl.requires_grad_(), step)
        (slopes,) = torch.autograd.grad(value.sum(), kl)
    return slopes, value.detach()


def _by_datum(log_p: list[Tensor], log_q: list[Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor | float]:
    """Returns both sides of the log weights, and the part that belongs to no datum, of which each has its share."""
    sides, outside = [], 0.0
    for terms, sign in ((log_p, 1), (log_q, -1)):
        own = [t for t in terms if t.shape[-1] == batch]
        shared = [t for t in terms if t.shape[-1] != batch]
        total = sum(own) + sum(t.expand(-1, batch) / batch for t in shared)
        outside = outside + sign * sum(t.detach() for t in shared)
        sides.append(total)
    like = sides[0] if isinstance(sides[0], Tensor) else sides[1]
    return *(side + torch.zeros_like(like) for side in sides), outside


def _varies(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.dim() > 0


def _dimensions(site: dict) -> dist.TorchDistribution:
    """Returns the distribution of a site's dimensions one by one, as elements of its batch; of a number, its own."""
    fn = site["fn"]
    if not fn.event_shape:
        return fn
    if isinstance(fn, dist.Independent) and fn.reinterpreted_batch_ndims == 1 and not fn.base_dist.event_shape:
        return fn.base_dist
    raise ValueError(
        f'FreeBits(group_size=...) needs the KL divergence of each dimension, but site "{site["name"]}" has a '
        f"{type(fn).__name__} whose dimensions are not independent. Take group_size=None, for the site as a whole."
    )
