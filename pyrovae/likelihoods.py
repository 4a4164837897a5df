r"""Likelihoods: modules whose ``forward(z, context=None)`` returns the Pyro distribution :math:`p(x \mid z)`.

Each holds its decoder network, declares its event dimensions and is normalised: ``log_prob`` is in nats, with every
constant in it.
"""

import math
from abc import ABC, abstractmethod

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.distributions import IndependentBernoulli
from pyrovae.nn import MLP, Network, Shape, apply, as_shape, build

__all__ = ["Bernoulli", "Likelihood", "Normal"]


class Likelihood(nn.Module, ABC):
    r"""Base of the library's likelihoods, and how to write one.

    A likelihood takes `latent_dim` and `x_shape` first when it is built, and ``forward(z, context=None)`` maps z of
    shape ``(*leading, latent_dim)`` to a Pyro distribution with ``batch_shape == leading`` and
    ``event_shape == x_shape``. :meth:`parameters_of` calls the decoder. In a script any module with such a forward
    will do; the command line looks for subclasses of this one::

        class Poisson(Likelihood):
            def forward(self, z, context=None):
                return dist.Poisson(self.parameters_of(z, context).exp()).to_event(len(self.x_shape))

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, param_shape)``.
        context_dim: width of the context vector, 0 for none.
        param_shape: shape of what the decoder returns, `x_shape` unless the distribution has several parameters.
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        context_dim: int = 0,
        *,
        param_shape: Shape | None = None,
    ):
        super().__init__()
        self.latent_dim, self.x_shape, self.context_dim = latent_dim, as_shape(x_shape, "x_shape"), context_dim
        self.param_shape = self.x_shape if param_shape is None else as_shape(param_shape, "param_shape")
        self.network = build(network, latent_dim, self.param_shape, context_dim)

    def parameters_of(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the decoder's output for z, of shape ``(*leading, *param_shape)``."""
        return apply(self.network, z, context, self.param_shape, type(self).__name__)

    @abstractmethod
    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Returns the distribution."""

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, x_shape={self.x_shape}"


class Bernoulli(Likelihood):
    r"""Independent Bernoulli pixels, for data that is 0 or 1.

    .. math:: p(x \mid z) = \prod_d \mu_d(z)^{x_d} (1 - \mu_d(z))^{1 - x_d}, \qquad \mu(z) = \sigma(\mathrm{network}(z))

    Grey values between 0 and 1 are outside its support: its "likelihood" of them does not integrate to one. Binarise
    them (``fit(..., transform=pyrovae.data.dynamic_binarization)``) or use a likelihood of real numbers.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> Bernoulli(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(torch.ones(1, 8, 8)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, x_shape: Shape, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, x_shape, network, context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return IndependentBernoulli(dist.Bernoulli(logits=self.parameters_of(z, context)), len(self.x_shape))


class Normal(Likelihood):
    r"""Independent normal pixels with a scale that is fixed, learned once, or learned per dimension.

    .. math:: p(x \mid z) = \prod_d \mathcal{N}(x_d; \mu_d(z), \sigma_d^2), \qquad \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        scale: :math:`\sigma`, in the units of the data; where learning starts if it is learned.
        learn_scale: whether :math:`\sigma` is a parameter (of its logarithm) or stays as given.
        per_dimension: whether each dimension of x has its own :math:`\sigma_d`; otherwise one serves all.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `scale` is not positive and finite.

    References:
        Simple and Effective VAE Training with Calibrated Decoders, O. Rybkin, K. Daniilidis and S. Levine, 2021,
        https://arxiv.org/abs/2006.13202.

    >>> Normal(2, 3, scale=0.1)(torch.zeros(5, 2)).stddev[0]
    tensor([0.1000, 0.1000, 0.1000], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        scale: float = 1.0,
        learn_scale: bool = True,
        per_dimension: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}.")
        log_scale = torch.full(self.x_shape if per_dimension else (), math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.parameters_of(z, context)
        return dist.Normal(loc, self.log_scale.exp()).to_event(len(self.x_shape))
