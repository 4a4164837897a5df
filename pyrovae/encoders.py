r"""Encoders: modules whose ``forward(x, context=None)`` returns the Pyro distribution :math:`q(z \mid x)`."""

import math
from abc import ABC, abstractmethod

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae.nn import MLP, Network, Shape, apply, as_shape, build

__all__ = ["DiagonalNormal", "Encoder", "FullRankNormal"]


class Encoder(nn.Module, ABC):
    r"""Base of the library's encoders, and how to write one.

    An encoder takes `x_shape` and `latent_dim` first when it is built, and ``forward(x, context=None)`` maps x of
    shape ``(batch, *x_shape)`` to a Pyro distribution with ``batch_shape == (batch,)`` and
    ``event_shape == (latent_dim,)``, with an ``rsample`` unless it is discrete. :meth:`parameters_of` calls the
    network. In a script any module with such a forward will do; the command line looks for subclasses of this one::

        class UnitNormal(Encoder):
            def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
                super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim)

            def forward(self, x, context=None):
                return dist.Normal(self.parameters_of(x, context), 1.0).to_event(1)

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, num_params)``.
        context_dim: width of the context vector, 0 for none.
        num_params: how many numbers the network returns for a datum.

    An encoder of another space than the real vectors says so in the class attribute `support`, a constraint, which must
    be its prior's too.
    """

    support: constraints.Constraint = constraints.real_vector

    def __init__(
        self,
        x_shape: Shape,
        latent_dim: int,
        network: Network = MLP,
        context_dim: int = 0,
        *,
        num_params: int,
    ):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}.")
        self.x_shape, self.latent_dim, self.num_params = as_shape(x_shape, "x_shape"), latent_dim, num_params
        self.context_dim = context_dim
        self.network = build(network, self.x_shape, num_params, context_dim)

    def parameters_of(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the network's output for x, of shape ``(batch, num_params)``."""
        return apply(self.network, x, context, (self.num_params,), type(self).__name__)

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Returns the distribution."""

    def extra_repr(self) -> str:
        return f"x_shape={self.x_shape}, latent_dim={self.latent_dim}"


_ONE = math.log(math.e - 1)  # softplus(_ONE) = 1, so that an untrained encoder starts near the standard normal
_FLOOR = 1e-6  # a smaller scale beside a prior of scale one is lost to float32 rounding


def _positive(raw: Tensor) -> Tensor:
    return softplus(raw + _ONE) + _FLOOR


class DiagonalNormal(Encoder):
    r"""A normal posterior with independent dimensions.

    .. math:: q(z \mid x) = \mathcal{N}(z; \mu(x), \mathrm{diag}\, \sigma(x)^2)

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, 2 * latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> DiagonalNormal((1, 8, 8), 3)(torch.zeros(5, 1, 8, 8)).rsample().shape
    torch.Size([5, 3])
    """

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=2 * latent_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(x, context).chunk(2, dim=-1)
        return dist.Normal(loc, _positive(raw)).to_event(1)


class FullRankNormal(Encoder):
    r"""A normal posterior with any covariance, through its Cholesky factor.

    .. math:: q(z \mid x) = \mathcal{N}(z; \mu(x), L(x) L(x)^\top)

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from
            ``(x_shape, latent_dim + latent_dim * (latent_dim + 1) // 2)``: the mean, the diagonal of L (before a
            softplus), then its strict lower triangle row by row.
        context_dim: width of the context vector, 0 for none.

    References:
        Automatic Differentiation Variational Inference, A. Kucukelbir, D. Tran, R. Ranganath, A. Gelman and
        D. M. Blei, 2017, https://arxiv.org/abs/1603.00788.

    >>> FullRankNormal(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        num_params = latent_dim + latent_dim * (latent_dim + 1) // 2
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=num_params)
        rows, cols = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        self.register_buffer("below", rows * latent_dim + cols, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        d = self.latent_dim
        params = self.parameters_of(x, context)
        loc, raw, lower = params[..., :d], params[..., d : 2 * d], params[..., 2 * d :]
        # Scatter, not assignment: the factor keeps its gradient and any number of leading dimensions.
        scale_tril = torch.diag_embed(_positive(raw)).flatten(-2)
        scale_tril = scale_tril.scatter(-1, self.below.expand(lower.shape), lower).unflatten(-1, (d, d))
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)
