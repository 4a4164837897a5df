"""Encoders of real vectors, the sphere and the simplex."""

from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import normalize

from pyrovae import distributions
from pyrovae.distributions import positive, tril_of
from pyrovae.encoders.base import Encoder
from pyrovae.nn import MLP, Network, Shape


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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
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

    >>> import torch
    >>> Delta(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def __init__(self, x_shape: Shape, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=latent_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Delta(self.parameters_of(x, context), event_dim=1)
