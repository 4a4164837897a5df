"""Priors over classes, as integers, one-hot vectors or relaxed one-hot vectors."""

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyrovae import distributions
from pyrovae.distributions import check_classes, check_temperature, one_hot_blocks
from pyrovae.nn import MLP, Network
from pyrovae.nn.base import check_count
from pyrovae.priors.base import Prior


class Categorical(Prior):
    r"""Independent classes as integers, with learned probabilities.

    .. math:: p(z) = \prod_d \pi_{d, z_d}, \qquad z_d \in \{0, \dots, K - 1\}

    The decoder then needs a network of integers: ``network=functools.partial(nn.OneHotInput, num_classes=K)``.

    Args:
        latent_dim: number of latent variables.
        num_classes: :math:`K`, at least 2.
        network: maps a context to the logits, a module or a callable that builds one from
            ``(context_dim, latent_dim * num_classes)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2.

    References:
        Neural Variational Inference and Learning in Belief Networks, A. Mnih and K. Gregor, 2014,
        https://arxiv.org/abs/1402.0030.

    >>> Categorical(3, num_classes=2)().log_prob(torch.tensor([0, 1, 1]))  # 3 log(1/2)
    tensor(-2.0794, grad_fn=<SumBackward1>)
    """

    def __init__(self, latent_dim: int, num_classes: int, network: Network = MLP, context_dim: int = 0):
        check_classes(num_classes)
        latent_dim = check_count(latent_dim, "latent_dim")
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim * num_classes))
        self.num_classes, self.support = num_classes, distributions.integers(num_classes)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(context).unflatten(-1, (self.latent_dim, self.num_classes))
        return dist.Categorical(logits=logits).to_event(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class OneHotCategorical(Prior):
    r"""One-hot vectors, concatenated, with learned probabilities.

    .. math:: p(z) = \prod_{m=1}^M \prod_{k=1}^K \pi_{mk}^{z_{mk}}, \qquad M K = \mathrm{latent\_dim}

    Args:
        latent_dim: number of latent dimensions.
        num_classes: length :math:`K` of each one-hot vector, a divisor of `latent_dim`; None for one vector of all.
        network: maps a context to the logits, a module or a callable that builds one from
            ``(context_dim, latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2 or does not divide `latent_dim`.

    References:
        Categorical Reparameterization with Gumbel-Softmax, E. Jang, S. Gu and B. Poole, 2017,
        https://arxiv.org/abs/1611.01144.

    >>> OneHotCategorical(6, num_classes=3)().sample().sum()
    tensor(2.)
    """

    def __init__(self, latent_dim: int, num_classes: int | None = None, network: Network = MLP, context_dim: int = 0):
        latent_dim = check_count(latent_dim, "latent_dim")
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim))
        self.blocks = one_hot_blocks(latent_dim, num_classes)
        self.support = distributions.blocks_of(constraints.one_hot, self.blocks)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(context).unflatten(-1, self.blocks)
        return distributions.Flattened(dist.OneHotCategorical(logits=logits).to_event(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.blocks[1]}"


class RelaxedOneHotCategorical(Prior):
    r"""Relaxed one-hot vectors (points of the simplex), concatenated, with learned probabilities.

    .. math:: z_m = \mathrm{softmax}\left(\frac{\log \pi_m + g_m}{\tau}\right), \qquad g_{mk} \sim \mathrm{Gumbel}

    Args:
        latent_dim: number of latent dimensions.
        num_classes: length :math:`K` of each vector, a divisor of `latent_dim`; None for one vector of all.
        temperature: :math:`\tau`, positive; lower values are nearer to one-hot.
        network: maps a context to the logits, a module or a callable that builds one from
            ``(context_dim, latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2 or does not divide `latent_dim`, or `temperature` is not positive.

    References:
        The Concrete Distribution, C. J. Maddison, A. Mnih and Y. W. Teh, 2017, https://arxiv.org/abs/1611.00712.

    >>> RelaxedOneHotCategorical(3)().sample().shape
    torch.Size([3])
    """

    temperature: Tensor

    def __init__(
        self,
        latent_dim: int,
        num_classes: int | None = None,
        temperature: float = 0.5,
        network: Network = MLP,
        context_dim: int = 0,
    ):
        latent_dim = check_count(latent_dim, "latent_dim")
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim))
        self.blocks = one_hot_blocks(latent_dim, num_classes)
        self.support = distributions.blocks_of(constraints.simplex, self.blocks)
        self.register_buffer("temperature", torch.tensor(check_temperature(temperature)))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(context).unflatten(-1, self.blocks)
        relaxed = distributions.RelaxedOneHotCategorical(self.temperature, logits=logits)
        return distributions.Flattened(relaxed.to_event(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.blocks[1]}, temperature={self.temperature.item():g}"
