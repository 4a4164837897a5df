"""The evidence lower bound."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae.bounds.base import Bound, LossParts
from pyrovae.bounds.gradients import Gradient
from pyrovae.bounds.penalties import Penalty
from pyrovae.bounds.reductions import Reduced, power_mean
from pyrovae.bounds.schedules import Schedule, check_weight, value_at
from pyrovae.bounds.scoring import SiteScorer, SiteTerms
from pyrovae.inference.structure import SiteStructure
from pyrovae.regularizers import Regularizer


class ELBO(Bound):
    r"""The evidence lower bound, with closed-form KL divergences and weights on them.

    .. math:: \mathrm{E}_{q(z \mid x)} \log p(x \mid z) - \beta\, \mathrm{KL}(q(z \mid x) \,\|\, p(z))
        \;\le\; \log p(x) \quad (\beta \ge 1)

    A latent site's KL divergence is taken in closed form where its pair of distributions has one, given the latents
    before it. This is right for a hierarchy that is inferred in the order of the model; where the guide has another
    order, the term is estimated from the draws. With ``gradient=StickingTheLanding()`` all terms are estimated, because
    only then the variance vanishes at the exact posterior. Latents outside the data plate, and ``poutine.scale`` on
    single sites, are allowed.

    Args:
        num_particles: draws of the guide per datum, at least 1.
        beta: weight of the KL divergences, a number or a :class:`Schedule`, at least 0. A warm-up may start at 0.
        penalty: a function of the divergence of each latent site, :class:`FreeBits` or :class:`Capacity`; None for the
            divergence itself.
        closed_form: whether to take divergences in closed form.
        gradient: the estimator of the gradient.
        chunk_size: particles that the model runs on at once; None for all.
        regularizers: terms added to the loss.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114; beta-VAE,
        I. Higgins et al., 2017, https://openreview.net/forum?id=Sy2fzU9gl.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> from pyrovae.bounds import FreeBits, Linear
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
            raise TypeError(f"penalty must be an instance of Penalty, such as bounds.FreeBits(0.1), got {penalty!r}.")
        self.beta = beta if isinstance(beta, Schedule) else check_weight("beta", beta)
        self.penalty, self.closed_form = penalty, closed_form
        # With a penalty on estimated divergences, the bound is not a function of the mean log weight.
        self.linear = self.smooth = penalty is None
        super().__init__(num_particles, gradient, chunk_size, regularizers)
        # A KL divergence in closed form has the noise that these gradients avoid.
        closed_form = closed_form and not self.gradient.reparameterized
        self.scorer = SiteScorer(closed_form, penalty, weighted_sites=True)

    def reduce(self, log_w: Tensor) -> Reduced:
        return power_mean(log_w, 0.0)

    @property
    def schedules(self) -> list[Schedule]:
        values = [self.beta, *vars(self.penalty).values()] if self.penalty is not None else [self.beta]
        return [value for value in values if isinstance(value, Schedule)]

    @property
    def span(self) -> int:
        return max((schedule.span for schedule in self.schedules), default=0)

    def _check_structure(self, structure: SiteStructure) -> None:
        enumerated = [problem for problem in structure.problems if "enumerated" in problem]
        if enumerated:
            raise ValueError(f"bounds.ELBO does not enumerate: {'; '.join(enumerated)}. Use pyro.infer.TraceEnum_ELBO.")

    def _loss_parts(self, terms: SiteTerms, reconstruction: Tensor, kl: dict[str, Tensor], batch: int) -> LossParts:
        step = self.steps if torch.is_grad_enabled() else None
        beta = value_at(self.beta, step)
        log_p = [t * terms.model_scales[name] for name, t in terms.observed.items()]
        log_q: list[Tensor] = []
        loss = -reconstruction
        for name, divergence in kl.items():
            p, q = terms.model.get(name), terms.guide.get(name)
            slope: Tensor | float = 1.0
            if self.penalty is not None and p is not None:
                kl_per_datum = -p.detach().mean(0) if q is None else -p.detach().mean(0) + q.detach().mean(0)
                slope, penalty = _penalize(self.penalty, kl_per_datum, step)
                loss = loss + beta * (penalty * terms.model_scales[name]).sum()
            else:
                loss = loss + beta * divergence
            for t, scales, side in ((p, terms.model_scales, log_p), (q, terms.guide_scales, log_q)):
                if t is not None:
                    t = beta * slope * t * scales[name]
                    side.append(t.sum(-1) if t.dim() > 2 else t)
        return LossParts(*_by_datum(log_p, log_q, batch), 1.0, loss, reconstruction - sum(kl.values()))


def _penalize(penalty: Penalty, kl: Tensor, step: int | None) -> tuple[Tensor | float, Tensor]:
    """Returns a penalty's derivatives with respect to the KL divergences (1 in evaluation), and its value per datum."""
    if step is None:
        return 1.0, penalty(kl, step)
    with torch.enable_grad():
        value = penalty(kl.requires_grad_(), step)
        (slopes,) = torch.autograd.grad(value.sum(), kl)
    return slopes, value.detach()


def _by_datum(log_p: list[Tensor], log_q: list[Tensor], batch: int) -> tuple[Tensor, Tensor, Tensor | float]:
    """Returns both sides of the log weights, global terms split evenly over the data; and the global log weights."""
    sides: list[Tensor | float] = []
    global_log_w: Tensor | float = 0.0
    for terms, sign in ((log_p, 1), (log_q, -1)):
        local = [t for t in terms if t.shape[-1] == batch]
        shared = [t for t in terms if t.shape[-1] != batch]
        sides.append(sum(local) + sum(t.expand(-1, batch) / batch for t in shared))
        global_log_w = global_log_w + sign * sum(t.detach() for t in shared)
    # A side without sites is zero for each particle and datum.
    zeros = torch.zeros_like(next(side for side in sides if isinstance(side, Tensor)))
    return sides[0] + zeros, sides[1] + zeros, global_log_w
