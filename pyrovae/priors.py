r"""Priors: modules whose ``forward(context=None)`` returns a Pyro distribution, :math:`p(z)` or :math:`p(z \mid c)`."""

from abc import ABC, abstractmethod

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae.nn import MLP, Network, apply, build

__all__ = ["Prior", "StandardNormal"]


class Prior(nn.Module, ABC):
    r"""Base of the library's priors, and how to write one.

    A prior takes `latent_dim` first when it is built, and ``forward(context=None)`` returns a Pyro distribution with
    ``event_shape == (latent_dim,)``. Its ``batch_shape`` is ``()``, or ``(batch,)`` when it depends on a context of
    shape ``(batch, context_dim)``. In a script any module with such a forward will do; the command line looks for
    subclasses of this one::

        class WideNormal(Prior):
            def __init__(self, latent_dim: int, scale: float = 2.0):
                super().__init__(latent_dim)
                self.scale = scale

            def forward(self, context=None):
                return dist.Normal(torch.zeros(self.latent_dim), self.scale).to_event(1)

    A prior with parameters states how many numbers they are, and :meth:`parameters_of` returns them: learned as they are
    or, with a context, computed from it by a network.

    Args:
        latent_dim: number of latent dimensions, at least 1.
        network: what maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, num_params)``.
        context_dim: width of the context vector, 0 for none.
        num_params: how many numbers the parameters are.

    A prior over another space than the real vectors says so in the class attribute `support`, a constraint, which must
    be its encoder's too.
    """

    support: constraints.Constraint = constraints.real_vector

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0, *, num_params: int = 0):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}.")
        self.latent_dim, self.context_dim, self.num_params = latent_dim, context_dim, num_params
        if not num_params:
            return
        if context_dim:
            self.network = build(network, context_dim, num_params, 0)
        else:
            self.params = nn.Parameter(torch.zeros(num_params))

    def parameters_of(self, context: Tensor | None = None) -> Tensor:
        """Returns the parameters, of shape ``(num_params,)``, or ``(*leading, num_params)`` with a context."""
        if not self.context_dim:
            return self.params
        if context is None:
            raise ValueError(f"{type(self).__name__} was built with context_dim={self.context_dim} and needs a context.")
        return apply(self.network, context, None, (self.num_params,), type(self).__name__)

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Returns the distribution."""

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")


class StandardNormal(Prior):
    r"""The standard normal prior; a context does not change it.

    .. math:: p(z) = \mathcal{N}(z; 0, I)

    Args:
        latent_dim: number of latent dimensions.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> StandardNormal(3)().log_prob(torch.zeros(3))
    tensor(-2.7568)
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        # Buffers, so that the prior follows the module's device and dtype; constants, so not part of its state.
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)
