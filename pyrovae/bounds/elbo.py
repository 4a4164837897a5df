r"""The evidence lower bound, and what training does with its KL divergence."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyrovae.bounds.base import Bound, LossParts, Sides, layers, same_scale
from pyrovae.bounds.gradients import Gradient
from pyrovae.bounds.reductions import Reduced, power_mean
from pyrovae.distributions import Stacked
from pyrovae.inference.messages import Untraceable
from pyrovae.inference.structure import SiteStructure, described, full_precision
from pyrovae.inference.weights import log_prob_of, per_datum
from pyrovae.regularizers import Regularizer


class Schedule(ABC):
    """Base of numbers that change from one training step to the next; a bound counts its steps."""

    @property
    @abstractmethod
    def span(self) -> int:
        """Steps until the end is reached, once."""

    @abstractmethod
    def __call__(self, step: int | None) -> float:
        """Returns the number after so many steps; None for the end, which evaluation takes."""

    def __repr__(self) -> str:
        return described(self)


class Linear(Schedule):
    r"""A straight line, and its end from there on: a warm-up.

    .. math:: \beta_t = \beta_0 + \min(t / T, 1)\, (\beta_T - \beta_0)

    Args:
        steps: training steps :math:`T`, at least 1.
        start: the number at the first step, exactly.
        end: the number from step `steps` on.

    Raises:
        ValueError: when `steps` is below 1, or a number is negative or not finite.

    References:
        Generating Sentences from a Continuous Space, S. R. Bowman, L. Vilnis, O. Vinyals, A. M. Dai, R. Jozefowicz and
        S. Bengio, 2016, https://arxiv.org/abs/1511.06349; Ladder Variational Autoencoders, C. K. Sønderby et al., 2016,
        https://arxiv.org/abs/1602.02282.

    >>> beta = Linear(steps=100)
    >>> beta(0), beta(50), beta(1000)
    (0.0, 0.5, 1.0)
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0):
        if not steps >= 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        self.steps = steps
        self.start, self.end = _weight("start", start), _weight("end", end)

    def __call__(self, step: int | None) -> float:
        share = 1.0 if step is None else min(step / self.steps, 1.0)
        return self.start + share * (self.end - self.start)

    @property
    def span(self) -> int:
        return self.steps


class Cyclical(Schedule):
    r"""A warm-up again and again: a straight line over the first part of each period, and its end over the rest.

    .. math:: \beta_t = \beta_0 + \min\left(\frac{t \bmod T}{r T}, 1\right) (\beta_T - \beta_0)

    Args:
        period: training steps :math:`T` of a cycle, at least 1.
        start: the number at the first step of a cycle, exactly.
        end: the number when the line has ended.
        ramp: the share :math:`r` of a cycle that the line takes, above 0 and at most 1.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, H. Fu, C. Li, X. Liu, J. Gao,
        A. Celikyilmaz and L. Carin, 2019, https://arxiv.org/abs/1903.10145.

    >>> beta = Cyclical(period=100)
    >>> beta(25), beta(75), beta(100)
    (0.5, 1.0, 0.0)
    """

    def __init__(self, period: int, start: float = 0.0, end: float = 1.0, ramp: float = 0.5):
        if not period >= 1:
            raise ValueError(f"period must be at least 1, got {period}.")
        if not 0 < ramp <= 1:
            raise ValueError(f"ramp must be above 0 and at most 1, got {ramp}.")
        self.period, self.ramp = period, ramp
        self.start, self.end = _weight("start", start), _weight("end", end)

    def __call__(self, step: int | None) -> float:
        share = 1.0 if step is None else min(step % self.period / (self.ramp * self.period), 1.0)
        return self.start + share * (self.end - self.start)

    @property
    def span(self) -> int:
        return self.period


class Penalty(ABC):
    """Base of functions of KL divergences that the ELBO takes in their place.

    Args:
        per_dimension: whether it is given the divergence of each dimension of a latent, or that of the whole.
    """

    per_dimension: bool = False

    @abstractmethod
    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        """Returns a penalty per datum, ``(batch,)``, which autograd can differentiate.

        Args:
            kl: divergence of one latent site, ``(batch,)``, or ``(batch, latent_dim)`` of each dimension.
            step: training steps so far; None in evaluation.
        """

    def __repr__(self) -> str:
        return described(self)


class FreeBits(Penalty):
    r"""Free bits: divergences below a threshold cost nothing more, so that they are used.

    .. math:: \sum_g \max(\lambda, \overline{\mathrm{KL}}_g)

    over groups of dimensions, with the mean over the data of the batch, as in the paper. Groups need a prior and a
    posterior whose dimensions are independent.

    Args:
        nats: threshold :math:`\lambda` for each group, in nats (a bit is 0.693), at least 0.
        group_size: dimensions a group, the last one perhaps smaller; 1 for each dimension by itself, None for all of a
            latent site together.

    Raises:
        ValueError: when `nats` is negative or not finite, or `group_size` is below 1.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, D. P. Kingma, T. Salimans, R. Jozefowicz,
        X. Chen, I. Sutskever and M. Welling, 2016, https://arxiv.org/abs/1606.04934.

    >>> FreeBits(0.5)(torch.tensor([[0.1, 2.0], [0.3, 4.0]]), step=0)
    tensor([3.5000, 3.5000])
    """

    def __init__(self, nats: float, group_size: int | None = 1):
        self.nats = _weight("nats", nats)
        if group_size is not None and not (isinstance(group_size, int) and group_size >= 1):
            raise ValueError(
                f"group_size must be an integer of at least 1, or None for all together, got {group_size}."
            )
        self.group_size, self.per_dimension = group_size, group_size is not None

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        groups = kl.mean(0).reshape(1) if self.group_size is None else kl.mean(0).split(self.group_size)
        total = sum(group.sum().clamp_min(self.nats) for group in groups)
        return total.expand(len(kl))


class Capacity(Penalty):
    r"""A target for the KL divergence of each latent site, which training raises slowly.

    .. math:: |\overline{\mathrm{KL}} - C_t|

    of the mean over the data of the batch, so that the noise of an estimated divergence hardly counts. The ELBO's `beta`
    is its weight :math:`\gamma`.

    Args:
        nats: :math:`C_t`, a number or a :class:`Schedule`, at least 0.

    Raises:
        ValueError: when `nats` is negative or not finite.

    References:
        Understanding Disentangling in beta-VAE, C. P. Burgess et al., 2018, https://arxiv.org/abs/1804.03599.

    >>> Capacity(Linear(steps=100, end=25.0))(torch.tensor([3.0, 4.0]), step=20)
    tensor([1.5000, 1.5000])
    """

    def __init__(self, nats: float | Schedule):
        self.nats = nats if isinstance(nats, Schedule) else _weight("nats", nats)

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        return (kl.mean() - _at(self.nats, step)).abs().expand(len(kl))


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
        self.beta = beta if isinstance(beta, Schedule) else _weight("beta", beta)
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
        beta, scales = _at(self.beta, step), sides.scales
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


def _varies(scale: float | Tensor) -> bool:
    return isinstance(scale, Tensor) and scale.dim() > 0


def _at(number: float | Schedule, step: "int | ScheduledStep | None") -> float | Tensor:
    if not isinstance(number, Schedule):
        return number
    return step.at(number) if isinstance(step, ScheduledStep) else number(step)


class ScheduledStep:
    """Any training step, with what schedules give at it: what stands in a graph for all steps.

    Args:
        numbers: tensors without dimensions, by the identity of a schedule.

    Raises:
        Untraceable: when it is used as a number, for which it would have to be a certain step.
    """

    def __init__(self, numbers: dict[int, Tensor]):
        self.numbers = numbers

    def at(self, schedule: Schedule) -> Tensor:
        if id(schedule) not in self.numbers:
            raise Untraceable(f"{schedule!r} is no attribute of the bound or of its penalty")
        return self.numbers[id(schedule)]

    def __add__(self, steps: int) -> "ScheduledStep":
        return self

    def _refuse(self, *_: Any) -> NoReturn:
        raise Untraceable(
            "it computes with the training step, which would stay the same: make it an attribute that is a Schedule"
        )

    __index__ = __int__ = __float__ = __bool__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __sub__ = __rsub__ = __mod__ = __floordiv__ = _refuse


def _weight(name: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, or where it may change a schedule that is built, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
    return value
