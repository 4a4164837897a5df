"""What priors have in common."""

from abc import ABC, abstractmethod

from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae.nn import MLP, Network, apply, build
from pyrovae.nn.base import check_count
from pyrovae.recorded import Recorded


class Prior(Recorded, ABC):
    r"""Base of the library's priors, and how to write one.

    A prior takes `latent_dim` first when it is built, and ``forward(context=None)`` returns a Pyro distribution with
    ``event_shape == (latent_dim,)``. Its ``batch_shape`` is ``()``, or ``(batch,)`` when it depends on a context of
    shape ``(batch, context_dim)``. In a script any module with such a ``forward`` works; the command line finds
    subclasses of this class::

        class WideNormal(Prior):
            def __init__(self, latent_dim: int, scale: float = 2.0):
                super().__init__(latent_dim)
                self.scale = scale

            def forward(self, context=None):
                return dist.Normal(torch.zeros(self.latent_dim), self.scale).to_event(1)

    A prior with parameters gives their initial values as `start`. :meth:`parameters_of` then returns the learned
    parameters, or with a context their sum with the output of a network. A prior over another space than real vectors
    has this space as its attribute `support`, a constraint, which must be that of the encoder too.

    Args:
        latent_dim: number of latent dimensions, at least 1.
        network: maps a context to a vector that is added to the parameters, a module or a callable that builds one from
            ``(context_dim, len(start))``.
        context_dim: width of the context vector, 0 for none.
        start: the initial parameters, as one vector; None for a prior without parameters.
    """

    support: constraints.Constraint = constraints.real_vector

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0, *, start: Tensor | None = None):
        super().__init__()
        latent_dim = check_count(latent_dim, "latent_dim")
        self.latent_dim, self.context_dim = latent_dim, context_dim
        if start is not None:
            self.params = nn.Parameter(start)
            if context_dim:
                self.network = build(network, context_dim, len(start), 0)

    def parameters_of(self, context: Tensor | None = None) -> Tensor:
        """Returns the parameters as one vector, or with a context as vectors of shape ``(*leading, size)``."""
        context = self.select_context(context)
        if context is None:
            return self.params
        return self.params + apply(self.network, context, None, self.params.shape, type(self).__name__)

    def select_context(self, context: Tensor | None) -> Tensor | None:
        """Returns the context if the prior was built for one, else None; raises a ValueError if it is missing."""
        if not self.context_dim:
            return None
        if context is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} was built with context_dim={self.context_dim} and needs a context. Give one vector a datum."
            )
        return context

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Returns the distribution."""

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")
