r"""Encoders: modules whose ``forward(x, context=None)`` returns the Pyro distribution :math:`q(z \mid x)`."""

from abc import ABC, abstractmethod

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import normalize

from pyrovae import distributions
from pyrovae.distributions import positive, tril_of
from pyrovae.nn import MLP, Network, Shape, apply, as_shape, build

__all__ = [
    "Categorical",
    "Delta",
    "DiagonalNormal",
    "Encoder",
    "FullRankNormal",
    "GaussianMixture",
    "InverseAutoregressiveFlow",
    "LogisticNormal",
    "LowRankNormal",
    "NeuralSplineFlow",
    "OneHotCategorical",
    "RelaxedOneHotCategorical",
    "VonMisesFisher",
]


class Encoder(nn.Module, ABC):
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
        return dist.Normal(loc, positive(raw)).to_event(1)


class FullRankNormal(Encoder):
    r"""A normal posterior with a full covariance matrix, from its Cholesky factor.

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

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        params, d = self.parameters_of(x, context), self.latent_dim
        return distributions.MultivariateNormal(params[..., :d], scale_tril=tril_of(params[..., d:]))


class LowRankNormal(Encoder):
    r"""A normal posterior whose covariance is diagonal plus one of low rank.

    .. math:: q(z \mid x) = \mathcal{N}(z; \mu(x), \mathrm{diag}\, \sigma(x)^2 + W(x) W(x)^\top)

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, (2 + rank) * latent_dim)``.
        rank: columns of W, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `rank` is below 1.

    References:
        Stochastic Backpropagation and Approximate Inference in Deep Generative Models, D. J. Rezende, S. Mohamed and
        D. Wierstra, 2014, https://arxiv.org/abs/1401.4082.

    >>> LowRankNormal(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, rank: int = 1, context_dim: int = 0):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}. For rank 0 use DiagonalNormal.")
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=(2 + rank) * latent_dim)
        self.rank = rank

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        d = self.latent_dim
        params = self.parameters_of(x, context)
        factor = params[..., 2 * d :].unflatten(-1, (d, self.rank))
        return distributions.LowRankMultivariateNormal(
            params[..., :d], factor, positive(params[..., d : 2 * d]).square()
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class GaussianMixture(Encoder):
    r"""A posterior that is a mixture of normals with independent dimensions, reparameterised.

    .. math:: q(z \mid x) = \sum_{k=1}^K \pi_k(x)\, \mathcal{N}(z; \mu_k(x), \mathrm{diag}\, \sigma_k(x)^2)

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, num_components * (1 + 2 * latent_dim))``.
        num_components: :math:`K`, at least 1.
        stratified: whether the particles of a datum are spread evenly over the components. Each particle has the same
            distribution as without, and their mean has a smaller variance. But particles are not independent: standard
            errors that assume so are too large, and only the ELBO has an unbiased gradient, not the other bounds.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_components` is below 1.

    References:
        Implicit Reparameterization Gradients, M. Figurnov, S. Mohamed and A. Mnih, 2018,
        https://arxiv.org/abs/1805.08498; Automatic Differentiation Variational Inference with Mixtures, W. Morningstar,
        S. Vikram, C. Ham, A. Gallagher and J. Dillon, 2021, https://arxiv.org/abs/2003.01687.

    >>> GaussianMixture(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        x_shape: Shape,
        latent_dim: int,
        network: Network = MLP,
        num_components: int = 5,
        stratified: bool = False,
        context_dim: int = 0,
    ):
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        num_params = num_components * (1 + 2 * latent_dim)
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=num_params)
        self.num_components, self.stratified = num_components, stratified

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        k = self.num_components
        params = self.parameters_of(x, context)
        loc, raw = params[..., k:].unflatten(-1, (2, k, self.latent_dim)).unbind(-3)
        categorical = distributions.StratifiedCategorical if self.stratified else dist.Categorical
        components = dist.Normal(loc, positive(raw)).to_event(1)
        return distributions.ReparameterizedMixture(categorical(logits=params[..., :k]), components)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}, stratified={self.stratified}"


class _FlowEncoder(Encoder):
    """A normal posterior transformed by a flow that depends on features of x."""

    def __init__(
        self,
        x_shape: Shape,
        latent_dim: int,
        network: Network = MLP,
        num_transforms: int = 2,
        num_features: int = 32,
        context_dim: int = 0,
    ):
        for name, value in (("num_transforms", num_transforms), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=2 * latent_dim + num_features)
        self.flow = self._flow(num_transforms, num_features)

    @abstractmethod
    def _flow(self, num_transforms: int, num_features: int) -> nn.Module:
        """Returns a flow of zuko's of `latent_dim` dimensions with a context of `num_features`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        d, params = self.latent_dim, self.parameters_of(x, context)
        return distributions.Flow(self.flow, params[..., :d], positive(params[..., d : 2 * d]), params[..., 2 * d :])


class InverseAutoregressiveFlow(_FlowEncoder):
    r"""A normal posterior transformed by inverse autoregressive flows that depend on features of x.

    .. math:: z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x)), \qquad \epsilon \sim \mathcal{N}(0, I)

    Drawing takes one pass through the flow, which also gives the density of the draw. The density of any other z is
    exact too, and takes as many passes as there are dimensions.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, 2 * latent_dim + num_features)``: mean, scale
            and features h.
        num_transforms: flows one after the other, at least 1.
        num_features: width of h, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_transforms` or `num_features` is below 1.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, D. P. Kingma, T. Salimans, R. Jozefowicz,
        X. Chen, I. Sutskever and M. Welling, 2016, https://arxiv.org/abs/1606.04934.

    >>> InverseAutoregressiveFlow(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def _flow(self, num_transforms: int, num_features: int) -> nn.Module:
        zuko, d = distributions.import_zuko(), self.latent_dim
        orders = [torch.arange(d), torch.arange(d).flip(0)]
        transforms = [
            zuko.flows.MaskedAutoregressiveTransform(d, num_features, order=orders[i % 2]).inv
            for i in range(num_transforms)
        ]
        normal = zuko.distributions.DiagNormal
        base = zuko.lazy.UnconditionalDistribution(normal, torch.zeros(d), torch.ones(d), buffer=True)
        return zuko.flows.Flow(transforms, base)


class NeuralSplineFlow(_FlowEncoder):
    r"""A normal posterior transformed by neural spline flows that depend on features of x.

    .. math:: z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x)), \qquad \epsilon \sim \mathcal{N}(0, I)

    These are coupling flows: drawing, and the density of any z, take two passes through each. They transform values
    within five standard deviations of the mean, and are the identity outside.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, 2 * latent_dim + num_features)``: mean, scale
            and features h.
        num_transforms: flows one after the other, at least 1.
        num_features: width of h, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_transforms` or `num_features` is below 1.

    References:
        Neural Spline Flows, C. Durkan, A. Bekasov, I. Murray and G. Papamakarios, 2019,
        https://arxiv.org/abs/1906.04032.

    >>> NeuralSplineFlow(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def _flow(self, num_transforms: int, num_features: int) -> nn.Module:
        flows = distributions.import_zuko().flows
        return flows.NSF(self.latent_dim, num_features, transforms=num_transforms, passes=2)


class VonMisesFisher(Encoder):
    r"""A von Mises-Fisher posterior on the unit sphere.

    .. math:: q(z \mid x) \propto \exp(\kappa(x)\, \mu(x)^\top z), \qquad \lVert z \rVert = \lVert \mu \rVert = 1

    The initial concentration is near twice the dimension. In many dimensions, a concentration near 1 is almost uniform:
    the latents then carry no information, and training does not leave this state.

    Args:
        x_shape: shape of one datum.
        latent_dim: dimension of the space that the sphere is in, at least 2.
        network: a module, or a callable that builds one from ``(x_shape, latent_dim + 1)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `latent_dim` is below 2.

    References:
        Hyperspherical Variational Auto-Encoders, T. R. Davidson, L. Falorsi, N. De Cao, T. Kipf and J. M. Tomczak,
        2018, https://arxiv.org/abs/1804.00891.

    >>> VonMisesFisher(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    support = constraints.sphere

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        if latent_dim < 2:
            raise ValueError(f"latent_dim must be at least 2 for latents on a sphere, got {latent_dim}.")
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim + 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        params = self.parameters_of(x, context)
        concentration = 2 * self.latent_dim * positive(params[..., -1])
        return distributions.VonMisesFisher(normalize(params[..., :-1], dim=-1), concentration)


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


class LogisticNormal(Encoder):
    r"""A logistic normal posterior on the simplex, for topics: the softmax of a normal vector and a zero.

    .. math:: z = \mathrm{softmax}(y_1, \dots, y_{K-1}, 0), \qquad
        y \sim \mathcal{N}(\mu(x), \mathrm{diag}\,\sigma(x)^2)

    Args:
        x_shape: shape of one datum.
        latent_dim: number of topics :math:`K`, at least 2.
        network: a module, or a callable that builds one from ``(x_shape, 2 * (latent_dim - 1))``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `latent_dim` is below 2.

    References:
        Autoencoding Variational Inference for Topic Models, A. Srivastava and C. Sutton, 2017,
        https://arxiv.org/abs/1703.01488.

    >>> LogisticNormal(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    support = constraints.simplex

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        distributions.check_simplex(latent_dim)
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=2 * (latent_dim - 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(x, context).chunk(2, dim=-1)
        return distributions.LogisticNormal(loc, positive(raw))


class Delta(Encoder):
    r"""A single point: the encoder of a plain autoencoder, for comparison.

    .. math:: q(z \mid x) = \delta(z - \mu(x))

    It has no density, and ``log_marginal`` refuses it. Training maximises :math:`\log p(x, \mu(x))`, which is not a
    bound on :math:`\log p(x)`.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Reducing the Dimensionality of Data with Neural Networks, G. E. Hinton and R. R. Salakhutdinov, 2006,
        https://doi.org/10.1126/science.1127647; From Variational to Deterministic Autoencoders, P. Ghosh et al., 2020,
        https://arxiv.org/abs/1903.12436.

    >>> Delta(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Delta(self.parameters_of(x, context), event_dim=1)
