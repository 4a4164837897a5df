"""What encoders have in common."""

from abc import ABC, abstractmethod

from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae.nn import MLP, Network, Shape, apply, as_shape, build
from pyrovae.nn.base import check_count
from pyrovae.recorded import Recorded


class Encoder(Recorded, ABC):
    r"""Base of the library's encoders, and how to write one.

    An encoder takes `x_shape` and `latent_dim` first when it is built, and ``forward(x, context=None)`` maps x of
    shape ``(batch, *x_shape)`` to a Pyro distribution with ``batch_shape == (batch,)`` and
    ``event_shape == (latent_dim,)``, with an ``rsample`` unless it is discrete. :meth:`parameters_of` calls the
    network. In a script any module with such a ``forward`` works; the command line finds subclasses of this class::

        class UnitNormal(Encoder):
            def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
                super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim)

            def forward(self, x, context=None):
                return dist.Normal(self.parameters_of(x, context), 1.0).to_event(1)

    An encoder of another space than real vectors has this space as its attribute `support`, a constraint, which must be
    that of the prior too.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, num_params)``.
        context_dim: width of the context vector, 0 for none.
        num_params: length of the vector that the network returns for a datum.
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
        latent_dim = check_count(latent_dim, "latent_dim")
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
