"""Distributions on the simplex."""

from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.distributions.spaces import ShapeLike


class LogisticNormal(dist.TransformedDistribution):
    r"""The logistic normal distribution on the simplex: the softmax of a normal vector and a zero.

    .. math:: z = \mathrm{softmax}(y_1, \dots, y_{K-1}, 0), \quad y \sim \mathcal{N}(\mu, \mathrm{diag}\,\sigma^2),
        \qquad \log p(z) = \log \mathcal{N}(y; \mu, \sigma^2) - \sum_{k=1}^K \log z_k

    The density is with respect to the first K - 1 coordinates, as for a Dirichlet. Torch's ``LogisticNormal`` uses
    stick breaking instead, which treats the coordinates differently.

    Args:
        loc: :math:`\mu`, shape ``(*batch, K - 1)``.
        scale: :math:`\sigma`, of the same shape.

    References:
        Logistic-Normal Distributions: Some Properties and Uses, J. Aitchison and S. M. Shen, 1980,
        https://doi.org/10.1093/biomet/67.2.261.

    >>> LogisticNormal(torch.zeros(2), torch.ones(2)).sample().shape
    torch.Size([3])
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}
    support = constraints.simplex
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.loc, self.scale = loc, scale
        super().__init__(dist.Normal(loc, scale).to_event(1), _AdditiveLogistic(), validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "LogisticNormal":
        event = self.loc.shape[-1:]
        batch_shape = torch.Size(batch_shape)
        return LogisticNormal(self.loc.expand(batch_shape + event), self.scale.expand(batch_shape + event))

    @property
    def mean(self) -> Tensor:
        """The softmax of the mean of y, which is near the mean; that has no closed form."""
        return _AdditiveLogistic()(self.loc)


class _AdditiveLogistic(torch.distributions.Transform):
    domain, codomain = constraints.real_vector, constraints.simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AdditiveLogistic)

    def _call(self, x: Tensor) -> Tensor:
        y = torch.cat([x, torch.zeros_like(x[..., :1])], dim=-1).softmax(-1)
        return y.clamp_min(torch.finfo(y.dtype).tiny)  # a zero has no logarithm

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., :-1].log() - y[..., -1:].log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return y.log().sum(-1)

    def forward_shape(self, shape: ShapeLike) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: ShapeLike) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])


class RelaxedOneHotCategorical(dist.RelaxedOneHotCategorical):
    r"""Pyro's relaxed one-hot distribution, with draws inside the simplex.

    .. math:: z = \mathrm{softmax}\left(\frac{l + g}{\tau}\right), \qquad g_k \sim \mathrm{Gumbel}

    At low temperatures small entries of a draw underflow to zero, which has no logarithm, and rounding leaves sums that
    differ from one.

    Args:
        temperature: :math:`\tau`, positive.
        logits: :math:`l`, normalised or not, shape ``(*batch, K)``.

    References:
        The Concrete Distribution, C. J. Maddison, A. Mnih and Y. W. Teh, 2017, https://arxiv.org/abs/1611.00712.

    >>> p = RelaxedOneHotCategorical(torch.tensor(0.1), logits=torch.tensor([100.0, 0.0, -100.0]))
    >>> bool(p.log_prob(p.rsample()).isfinite())
    True
    """

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        z = super().rsample(sample_shape)
        z = z.clamp_min(torch.finfo(z.dtype).tiny)
        return z / z.sum(-1, keepdim=True)
