"""Encoders of classes, as integers, one-hot vectors or relaxed one-hot vectors."""

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae import distributions
from pyrovae.encoders.base import Encoder
from pyrovae.nn import MLP, Network, Shape


class Categorical(Encoder):
    r"""Independent classes as integers, with score-function gradients.

    .. math:: q(z \mid x) = \prod_d \pi_{d, z_d}(x), \qquad z_d \in \{0, \dots, K - 1\}

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent variables.
        network: a module, or a callable that builds one from ``(x_shape, latent_dim * num_classes)``.
        num_classes: :math:`K`, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2.

    References:
        Neural Variational Inference and Learning in Belief Networks, A. Mnih and K. Gregor, 2014,
        https://arxiv.org/abs/1402.0030.

    >>> Categorical(64, 3, num_classes=4)(torch.zeros(5, 64)).sample().shape
    torch.Size([5, 3])
    """

    def __init__(
        self, x_shape: Shape, latent_dim: int, network: Network = MLP, num_classes: int = 2, context_dim: int = 0
    ):
        distributions.check_classes(num_classes)
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim * num_classes)
        self.num_classes, self.support = num_classes, distributions.integers(num_classes)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(x, context).unflatten(-1, (self.latent_dim, self.num_classes))
        return dist.Categorical(logits=logits).to_event(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class OneHotCategorical(Encoder):
    r"""One-hot vectors, concatenated, with the straight-through gradient, which is that of the probabilities.

    .. math:: q(z \mid x) = \prod_{m=1}^M \prod_{k=1}^K \pi_{mk}(x)^{z_{mk}}, \qquad
        \frac{\partial z}{\partial \pi} := 1

    The draws are exact; their gradient is biased.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions, :math:`M K`.
        network: a module, or a callable that builds one from ``(x_shape, latent_dim)``.
        num_classes: length :math:`K` of each one-hot vector, a divisor of `latent_dim`; None for one vector of all.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2 or does not divide `latent_dim`.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation, Y. Bengio, N.
        Leonard and A. Courville, 2013, https://arxiv.org/abs/1308.3432.

    >>> OneHotCategorical(64, 6, num_classes=3)(torch.zeros(64)).sample().sum()
    tensor(2.)
    """

    def __init__(
        self,
        x_shape: Shape,
        latent_dim: int,
        network: Network = MLP,
        num_classes: int | None = None,
        context_dim: int = 0,
    ):
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim)
        self.blocks = distributions.one_hot_blocks(latent_dim, num_classes)
        self.support = distributions.blocks_of(constraints.one_hot, self.blocks)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(x, context).unflatten(-1, self.blocks)
        return distributions.Flattened(dist.OneHotCategoricalStraightThrough(logits=logits).to_event(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.blocks[1]}"


class RelaxedOneHotCategorical(Encoder):
    r"""Relaxed one-hot vectors (Gumbel-softmax, concrete), concatenated.

    .. math:: z_m = \mathrm{softmax}\left(\frac{\log \pi_m(x) + g_m}{\tau}\right), \qquad
        g_{mk} \sim \mathrm{Gumbel}

    Its density is on the simplex, and the prior must have one there too:
    :class:`pyrovae.priors.RelaxedOneHotCategorical`.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions, :math:`M K`.
        network: a module, or a callable that builds one from ``(x_shape, latent_dim)``.
        num_classes: length :math:`K` of each vector, a divisor of `latent_dim`; None for one vector of all.
        temperature: :math:`\tau`, positive; lower values are nearer to one-hot and have noisier gradients.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2 or does not divide `latent_dim`, or `temperature` is not positive.

    References:
        Categorical Reparameterization with Gumbel-Softmax, E. Jang, S. Gu and B. Poole, 2017,
        https://arxiv.org/abs/1611.01144; The Concrete Distribution, C. J. Maddison, A. Mnih and Y. W. Teh, 2017,
        https://arxiv.org/abs/1611.00712.

    >>> RelaxedOneHotCategorical(64, 6, num_classes=3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 6])
    """

    temperature: Tensor

    def __init__(
        self,
        x_shape: Shape,
        latent_dim: int,
        network: Network = MLP,
        num_classes: int | None = None,
        temperature: float = 0.5,
        context_dim: int = 0,
    ):
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim)
        self.blocks = distributions.one_hot_blocks(latent_dim, num_classes)
        self.support = distributions.blocks_of(constraints.simplex, self.blocks)
        self.register_buffer("temperature", torch.tensor(distributions.check_temperature(temperature)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(x, context).unflatten(-1, self.blocks)
        relaxed = distributions.RelaxedOneHotCategorical(self.temperature, logits=logits)
        return distributions.Flattened(relaxed.to_event(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.blocks[1]}, temperature={self.temperature.item():g}"
