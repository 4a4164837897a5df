"""Distributions of latents made from another one: flattened, resampled, or transformed by a flow."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyrovae.distributions.spaces import ShapeLike, blocks_of, support_of


class Flattened(dist.TorchDistribution):
    r"""A distribution with its event dimensions flattened to one, because latents of a VAE are vectors.

    .. math:: p(z) = p_{\mathrm{base}}(\mathrm{unflatten}(z))

    Args:
        base_dist: any distribution with events of at least one dimension.

    >>> Flattened(dist.OneHotCategorical(torch.ones(3, 4)).to_event(1)).sample().shape
    torch.Size([12])
    """

    arg_constraints = {}

    def __init__(self, base_dist: dist.TorchDistribution):
        self.base_dist, self.has_rsample = base_dist, base_dist.has_rsample
        super().__init__(base_dist.batch_shape, torch.Size([base_dist.event_shape.numel()]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return blocks_of(support_of(self.base_dist), self.base_dist.event_shape)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Flattened":
        return Flattened(self.base_dist.expand(batch_shape))

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self._flat(self.base_dist.sample(sample_shape))

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        return self._flat(self.base_dist.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value.unflatten(-1, self.base_dist.event_shape))

    @property
    def mean(self) -> Tensor:
        return self._flat(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        return self._flat(self.base_dist.variance)

    def _flat(self, value: Tensor) -> Tensor:
        return value.flatten(value.dim() - len(self.base_dist.event_shape))


@register_kl(Flattened, Flattened)
def _kl_flattened(q: Flattened, p: Flattened) -> Tensor:
    if q.base_dist.event_shape != p.base_dist.event_shape:
        raise NotImplementedError
    return kl_divergence(q.base_dist, p.base_dist)


class Resampled(dist.TorchDistribution):
    r"""Rejection sampling with a learned acceptance probability and a limited number of tries (LARS).

    .. math:: p(z) = \pi(z) \left( \frac{a(z)}{Z} \left(1 - (1 - Z)^{T-1}\right) + (1 - Z)^{T-1} \right),
        \qquad Z = \mathrm{E}_{\pi}[a(z)]

    Args:
        base_dist: the proposal :math:`\pi`.
        log_acceptance: returns :math:`\log a(z)` for z of shape ``(*leading, d)``.
        log_normalizer: :math:`\log Z`, of the proposal's batch shape.
        tries: T, at least 1; the last draw is always accepted.

    References:
        Resampled Priors for Variational Autoencoders, M. Bauer and A. Mnih, 2019, https://arxiv.org/abs/1810.11428.

    >>> proposal = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    >>> p = Resampled(proposal, lambda z: torch.zeros(z.shape[:-1]), torch.tensor(0.0), tries=5)
    >>> p.log_prob(torch.zeros(1))  # every draw is accepted
    tensor(-0.9189)
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(
        self,
        base_dist: dist.TorchDistribution,
        log_acceptance: Callable[[Tensor], Tensor],
        log_normalizer: Tensor,
        tries: int,
    ):
        self.base_dist, self.log_acceptance = base_dist, log_acceptance
        self.log_normalizer, self.tries = log_normalizer, tries
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Resampled":
        return Resampled(self.base_dist.expand(batch_shape), self.log_acceptance, self.log_normalizer, self.tries)

    def log_prob(self, value: Tensor) -> Tensor:
        z = self.log_normalizer.exp().clamp(max=1 - torch.finfo(value.dtype).eps)
        given_up = (self.tries - 1) * torch.log1p(-z)
        accepted = self.log_acceptance(value) - self.log_normalizer + torch.log(-torch.expm1(given_up))
        return self.base_dist.log_prob(value) + torch.logaddexp(accepted, given_up)

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        value = self.base_dist.sample(sample_shape)
        todo = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        for _ in range(self.tries - 1):
            todo = todo & (torch.rand_like(value[..., 0]).log() > self.log_acceptance(value))
            if not bool(todo.any()):
                break
            value = torch.where(todo.unsqueeze(-1), self.base_dist.sample(sample_shape), value)
        return value


class Flow(dist.TorchDistribution):
    r"""A distribution of zuko's, scaled and shifted.

    .. math:: z = \mu + \sigma \odot f(\epsilon), \qquad
        \log p(z) = \log p_f\left(\frac{z - \mu}{\sigma}\right) - \sum_d \log \sigma_d

    The last draw is scored without inverting the flow.

    Args:
        flow: a distribution of zuko's with events of shape ``(d,)``; with `features`, a callable that maps them to one.
        loc: :math:`\mu`, shape ``(*batch, d)`` or ``()``.
        scale: :math:`\sigma`, of the same shape.
        features: the argument of `flow`, shape ``(*batch, num_features)``, or None.

    References:
        Normalizing Flows for Probabilistic Modeling and Inference, G. Papamakarios, E. Nalisnick, D. J. Rezende,
        S. Mohamed and B. Lakshminarayanan, 2021, https://arxiv.org/abs/1912.02762.

    >>> normal = import_zuko().distributions.DiagNormal(torch.zeros(2), torch.ones(2))
    >>> Flow(normal, torch.zeros(2), torch.full((2,), 2.0)).log_prob(torch.zeros(2))  # -log(8 pi)
    tensor(-3.2242)
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "features": constraints.real_vector,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any, loc: Tensor, scale: Tensor, features: Tensor | None = None):
        self.flow, self.loc, self.scale, self.features = flow, loc, scale, features
        self._made = flow if features is None else flow(features)
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(self._made.batch_shape, self._made.event_shape, validate_args=False)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Flow":
        new = self._get_checked_instance(Flow, _instance)
        new.flow, new.loc, new.scale, new.features = self.flow, self.loc, self.scale, self.features
        new._made, new._drawn = self._made.expand(torch.Size(batch_shape)), None
        super(Flow, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        value, log_prob = self._made.rsample_and_log_prob(torch.Size(sample_shape))
        value = self.loc + self.scale * value
        self._drawn = value, log_prob - self._log_scale()
        return value

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None:
            drawn, log_prob = self._drawn
            # A draw under no_grad has a score without a graph: where gradients are needed, the score is computed again.
            if value is drawn and (log_prob.requires_grad or not torch.is_grad_enabled()):
                return log_prob
        return self._made.log_prob((value - self.loc) / self.scale) - self._log_scale()

    def __repr__(self) -> str:
        return f"Flow({self._made!r})"

    def _log_scale(self) -> Tensor:
        return self.scale.log().expand(self.scale.shape[:-1] + self.event_shape).sum(-1)


def import_zuko() -> ModuleType:
    """Imports zuko and turns the validation of arguments, which zuko turns off for the whole process, on again."""
    base = torch.distributions.Distribution
    before = base._validate_args, base.__dict__["arg_constraints"]
    import zuko

    base._validate_args, base.arg_constraints = before  # type: ignore[method-assign]  # a property in torch
    for name in zuko.distributions.__all__:  # these need it turned off
        kind = getattr(zuko.distributions, name)
        if isinstance(kind.arg_constraints, property):
            kind.arg_constraints = {}
    return zuko
