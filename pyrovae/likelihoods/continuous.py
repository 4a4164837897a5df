"""Likelihoods of real numbers, positive ones and those between 0 and 1."""

import math

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from pyrovae import distributions
from pyrovae.likelihoods.base import Likelihood, bounded, inside, keep_log
from pyrovae.nn import MLP, Network, Shape, as_shape

_TWO = math.log(math.expm1(2))  # softplus(_TWO) = 2, the concentration of the uniform distribution


class ContinuousBernoulli(Likelihood):
    r"""Independent continuous Bernoulli pixels, for grey values from 0 to 1.

    .. math:: p(x \mid z) = \prod_d \frac{l_d}{e^{l_d} - 1} e^{l_d x_d}, \qquad l = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        context_dim: width of the context vector, 0 for none.

    References:
        The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders, G. Loaiza-Ganem and J. P.
        Cunningham, 2019, https://arxiv.org/abs/1907.06845.

    >>> ContinuousBernoulli(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(torch.rand(5, 1, 8, 8)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, x_shape: Shape, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, x_shape, network, context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.ContinuousBernoulli(logits=self.parameters_of(z, context)).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        mean = inside(x.mean(0), len(x))
        low, high = torch.full_like(mean, -1e6), torch.full_like(mean, 1e6)
        for _ in range(80):  # bisection down to rounding: the mean increases with the logit
            middle = (low + high) / 2
            below = distributions.ContinuousBernoulli(logits=middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class Normal(Likelihood):
    r"""Independent normal pixels with a scale that is fixed, learned for all dimensions, or learned for each.

    .. math:: p(x \mid z) = \prod_d \mathcal{N}(x_d; \mu_d(z), \sigma_d^2), \qquad \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        scale: :math:`\sigma`, in the units of the data; its initial value if it is learned.
        learn_scale: whether the logarithm of :math:`\sigma` is learned; otherwise :math:`\sigma` is constant.
        per_dimension: whether each dimension of x has its own :math:`\sigma_d`; otherwise all share one.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `scale` is not positive and finite.

    References:
        Simple and Effective VAE Training with Calibrated Decoders, O. Rybkin, K. Daniilidis and S. Levine, 2021,
        https://arxiv.org/abs/2006.13202.

    >>> Normal(2, 3, scale=0.1)(torch.zeros(5, 2)).stddev[0]
    tensor([0.1000, 0.1000, 0.1000], grad_fn=<SelectBackward0>)
    """

    log_scale: Tensor

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
        keep_log(self, "scale", scale, self.x_shape if per_dimension else (), learn_scale)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.parameters_of(z, context)
        return dist.Normal(loc, self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class OptimalNormal(Likelihood):
    r"""Independent normal pixels with the optimal common scale in closed form: the sigma-VAE.

    .. math:: p(x \mid z) = \prod_d \mathcal{N}(x_d; \mu_d(z), \sigma^2), \qquad
        \sigma^2 = \frac{1}{N} \sum_{i=1}^N (x_i - \mu_i)^2

    In training mode, ``log_prob`` uses the optimal scale for its N numbers (over particles, data and dimensions), with
    its gradient. The log-probabilities of a batch then depend on each other, and their sum is the largest that one
    scale gives. In evaluation mode, it uses the running average of these scales, so that the density does not depend on
    the batch. Samples always use the running average.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        momentum: weight of the newest batch in the running average, above 0 and at most 1; the first batches have equal
            weights.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `momentum` is not above 0 and at most 1.

    References:
        Simple and Effective VAE Training with Calibrated Decoders, O. Rybkin, K. Daniilidis and S. Levine, 2021,
        https://arxiv.org/abs/2006.13202.

    >>> likelihood = OptimalNormal(2, 3)
    >>> trained_on = likelihood(torch.zeros(5, 2)).log_prob(torch.ones(5, 3))
    >>> likelihood.eval()(torch.zeros(5, 2)).stddev.shape
    torch.Size([5, 3])
    """

    variance: Tensor
    num_batches: Tensor

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, momentum: float = 0.01, context_dim: int = 0
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}.")
        self.momentum = momentum
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("num_batches", torch.zeros(()))

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.parameters_of(z, context)
        learn = self._average if self.training else None
        return distributions.BatchScaleNormal(loc, self.variance.sqrt(), learn).to_event(len(self.x_shape))

    def _average(self, variance: Tensor) -> None:
        self.num_batches += 1
        self.variance.lerp_(variance, self.num_batches.reciprocal().clamp_min(self.momentum))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class Laplace(Likelihood):
    r"""Independent Laplace pixels: the likelihood of the absolute error.

    .. math:: p(x \mid z) = \prod_d \frac{1}{2 b_d} e^{-|x_d - \mu_d(z)| / b_d}, \qquad \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        scale: initial scale :math:`b`, in the units of the data; its logarithm is learned.
        per_dimension: whether each dimension of x has its own :math:`b_d`; otherwise all share one.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `scale` is not positive and finite.

    References:
        Continuous Univariate Distributions, vol. 2, N. L. Johnson, S. Kotz and N. Balakrishnan, 1995, chapter 24,
        https://www.wiley.com/en-us/9780471584940.

    >>> Laplace(2, 3, scale=0.1)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    log_scale: Tensor

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        scale: float = 1.0,
        per_dimension: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        keep_log(self, "scale", scale, self.x_shape if per_dimension else ())

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Laplace(self.parameters_of(z, context), self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class StudentT(Likelihood):
    r"""Independent Student t pixels, with heavy tails for data with outliers.

    .. math:: p(x \mid z) = \prod_d \mathrm{t}_{\nu_d}\!\left((x_d - \mu_d(z)) / \sigma_d\right) / \sigma_d, \qquad
        \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        df: initial degrees of freedom :math:`\nu`; their logarithm is learned.
        scale: initial scale :math:`\sigma`, in the units of the data; its logarithm is learned.
        per_dimension: whether each dimension of x has its own :math:`\nu_d` and :math:`\sigma_d`; otherwise all share
            one.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `df` or `scale` is not positive and finite.

    References:
        Student-t Variational Autoencoder for Robust Density Estimation, H. Takahashi, T. Iwata, Y. Yamanaka, M. Yamada
        and S. Yagi, 2018, https://www.ijcai.org/proceedings/2018/374.

    >>> StudentT(2, 3, df=4.0)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    log_df: Tensor
    log_scale: Tensor

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        df: float = 5.0,
        scale: float = 1.0,
        per_dimension: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        keep_log(self, "df", df, self.x_shape if per_dimension else ())
        keep_log(self, "scale", scale, self.x_shape if per_dimension else ())

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.parameters_of(z, context)
        return distributions.StudentT(self.log_df.exp(), loc, self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class LogNormal(Likelihood):
    r"""Independent log-normal elements, for positive numbers that vary over orders of magnitude.

    .. math:: p(x \mid z) = \prod_d \frac{1}{x_d} \mathcal{N}(\log x_d; \mu_d(z), \sigma_d^2), \qquad
        \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        scale: initial standard deviation :math:`\sigma` of the logarithm of the data; its logarithm is learned.
        per_dimension: whether each dimension of x has its own :math:`\sigma_d`; otherwise all share one.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `scale` is not positive and finite.

    References:
        Continuous Univariate Distributions, vol. 1, N. L. Johnson, S. Kotz and N. Balakrishnan, 1994, chapter 14,
        https://www.wiley.com/en-us/9780471584957.

    >>> LogNormal(2, 3)(torch.zeros(5, 2)).log_prob(torch.ones(5, 3)).shape
    torch.Size([5])
    """

    log_scale: Tensor

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        scale: float = 1.0,
        per_dimension: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        keep_log(self, "scale", scale, self.x_shape if per_dimension else ())

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.LogNormal(self.parameters_of(z, context), self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0).log() - self.log_scale.detach().mul(2).exp() / 2


class Gamma(Likelihood):
    r"""Independent gamma elements, for positive numbers such as power spectra.

    .. math:: p(x \mid z) = \prod_d \frac{(\alpha / m_d)^\alpha}{\Gamma(\alpha)} x_d^{\alpha - 1} e^{-\alpha x_d / m_d},
        \qquad m(z) = e^{\mathrm{network}(z)}

    With :math:`\alpha = 1` it is the exponential distribution: the likelihood of a power spectrum with normal Fourier
    coefficients. Its negative logarithm is the Itakura-Saito divergence from x to its mean m, up to terms in x alone.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``; it returns log m.
        concentration: :math:`\alpha`; its initial value if it is learned.
        learn_concentration: whether the logarithm of :math:`\alpha` is learned; otherwise :math:`\alpha` is constant.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `concentration` is not positive and finite.

    References:
        Nonnegative Matrix Factorization with the Itakura-Saito Divergence, C. Févotte, N. Bertin and J.-L. Durrieu,
        2009, https://doi.org/10.1162/neco.2008.04-08-771. Statistical Speech Enhancement Based on Probabilistic
        Integration of Variational Autoencoder and Non-Negative Matrix Factorization, Y. Bando et al., 2018,
        https://arxiv.org/abs/1710.11439.

    >>> Gamma(2, 3)(torch.zeros(5, 2)).log_prob(torch.ones(5, 3)).shape
    torch.Size([5])
    """

    log_concentration: Tensor

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        concentration: float = 1.0,
        learn_concentration: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        keep_log(self, "concentration", concentration, (), learn_concentration)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        concentration = self.log_concentration.exp()
        log_mean = bounded(self.parameters_of(z, context))
        return distributions.Gamma(concentration, concentration * torch.exp(-log_mean)).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0).log()


class Beta(Likelihood):
    r"""Independent beta elements, for proportions above 0 and below 1.

    .. math:: p(x \mid z) = \prod_d \mathrm{Beta}(x_d; m_d c_d, (1 - m_d) c_d), \qquad
        m(z) = \sigma(\mathrm{network}(z)_1), \quad c(z) = \mathrm{softplus}(\mathrm{network}(z)_2 + a)

    m is the mean and c the concentration around it; the constant a makes every element uniform where the network is
    zero. The density may be infinite at 0 and at 1, which are therefore outside the support: shrink data that have
    them, for example with ``(x * (n - 1) + 0.5) / n`` for n data.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (2, *x_shape))``.
        context_dim: width of the context vector, 0 for none.

    References:
        A Better Lemon Squeezer? Maximum-Likelihood Regression with Beta-Distributed Dependent Variables, M. Smithson
        and J. Verkuilen, 2006, https://doi.org/10.1037/1082-989X.11.1.54.

    >>> Beta(2, 3)(torch.zeros(5, 2)).log_prob(torch.full((5, 3), 0.5)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, x_shape: Shape, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=(2, *as_shape(x_shape, "x_shape")))

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        logit, raw = self.parameters_of(z, context).unbind(-len(self.param_shape))
        logit, concentration = bounded(logit), softplus(raw + _TWO) + 1e-6
        p = distributions.Beta(logit.sigmoid() * concentration, (-logit).sigmoid() * concentration)
        return p.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        # The variance of a beta distribution is m (1 - m) / (c + 1).
        concentration = (mean * (1 - mean) / x.var(0, correction=0).clamp_min(1e-6) - 1).clamp_min(0.1)
        return torch.stack([mean.logit(), concentration + torch.log(-torch.expm1(-concentration)) - _TWO])
