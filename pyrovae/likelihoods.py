r"""Likelihoods: modules whose ``forward(z, context=None)`` returns the Pyro distribution :math:`p(x \mid z)`.

Each holds its decoder network, declares its event dimensions and is normalised: ``log_prob`` is in nats, with every
constant in it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrovae import distributions
from pyrovae.nn import MLP, Network, Shape, apply, as_shape, build, set_output_bias

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gamma",
    "Laplace",
    "Likelihood",
    "LogNormal",
    "Mixed",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "OptimalNormal",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "bits_per_dim",
]


class Likelihood(nn.Module, ABC):
    r"""Base of the library's likelihoods, and how to write one.

    A likelihood takes `latent_dim` and `x_shape` first when it is built, and ``forward(z, context=None)`` maps z of
    shape ``(*leading, latent_dim)`` to a Pyro distribution with ``batch_shape == leading`` and
    ``event_shape == x_shape``. :meth:`parameters_of` calls the decoder. In a script any module with such a forward
    will do; the command line looks for subclasses of this one::

        class Exponential(Likelihood):
            def forward(self, z, context=None):
                return dist.Exponential(self.parameters_of(z, context).exp()).to_event(len(self.x_shape))

            def output_for(self, x):  # for start_at alone
                return -x.mean(0).log()

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

    def output_for(self, x: Tensor) -> Tensor:
        r"""Returns what the decoder must give, of shape `param_shape`, for :math:`p(x \mid z)` to have x's mean."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no output_for(x), from which start_at(x) would start."
        )

    def start_at(self, x: Tensor) -> "Likelihood":
        r"""Starts the bias of the decoder from data: :math:`p(x \mid z)` has their mean, but for what z adds to it.

        An untrained decoder then need not learn the average datum first.

        Args:
            x: the training data, ``(size, *x_shape)``.

        Returns:
            The likelihood itself.

        Raises:
            ValueError: when x has not the likelihood's shape, when no output is right for its mean (a negative mean of
                positive data), or when the decoder does not end in a layer with a bias.

        References:
            Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
            https://arxiv.org/abs/1509.00519, whose code does so.

        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
        >>> Bernoulli(1, 2).start_at(x)(torch.zeros(3, 1)).mean.shape
        torch.Size([3, 2])
        """
        with torch.no_grad():
            set_output_bias(self.network, self.output_for(self._check_data(x)))
        return self

    def _check_data(self, x: Tensor) -> Tensor:
        if len(x) == 0 or x.shape[1:] != self.x_shape:
            raise ValueError(f"x must have shape (size, {', '.join(map(str, self.x_shape))}), got {tuple(x.shape)}.")
        return x if x.is_floating_point() else x.float()

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
        return distributions.IndependentBernoulli(
            dist.Bernoulli(logits=self.parameters_of(z, context)), len(self.x_shape)
        )

    def output_for(self, x: Tensor) -> Tensor:
        return _inside(x.mean(0), len(x)).logit()


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
        mean = _inside(x.mean(0), len(x))
        low, high = torch.full_like(mean, -1e6), torch.full_like(mean, 1e6)
        for _ in range(80):  # the mean rises with the logit; bisection to rounding
            middle = (low + high) / 2
            below = distributions.ContinuousBernoulli(logits=middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


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
        _keep_log(self, "scale", scale, self.x_shape if per_dimension else (), learn_scale)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.parameters_of(z, context)
        return dist.Normal(loc, self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class OptimalNormal(Likelihood):
    r"""Independent normal pixels with the one scale that is best for them, in closed form: the sigma-VAE.

    .. math:: p(x \mid z) = \prod_d \mathcal{N}(x_d; \mu_d(z), \sigma^2), \qquad
        \sigma^2 = \frac{1}{N} \sum_{i=1}^N (x_i - \mu_i)^2

    In training mode the scale is that of the N numbers which ``log_prob`` is given (over particles, data and
    dimensions), gradient included: the log-probabilities of a batch then depend on each other, and their sum is the
    largest that one scale gives. In evaluation mode it is the running average of those scales, so that the density is
    a proper one, the same in any batch. Samples always take the running average.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        momentum: weight of the newest batch in the running average, above 0 and at most 1; the first batches weigh
            equally until then.
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
        scale: where the scale :math:`b` starts, in the units of the data; its logarithm is learned.
        per_dimension: whether each dimension of x has its own :math:`b_d`; otherwise one serves all.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `scale` is not positive and finite.

    References:
        Continuous Univariate Distributions, vol. 2, N. L. Johnson, S. Kotz and N. Balakrishnan, 1995, chapter 24,
        https://www.wiley.com/en-us/9780471584940.

    >>> Laplace(2, 3, scale=0.1)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

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
        _keep_log(self, "scale", scale, self.x_shape if per_dimension else ())

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Laplace(self.parameters_of(z, context), self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class StudentT(Likelihood):
    r"""Independent Student t pixels, whose heavy tails bear outliers.

    .. math:: p(x \mid z) = \prod_d \mathrm{t}_{\nu_d}\!\left((x_d - \mu_d(z)) / \sigma_d\right) / \sigma_d, \qquad
        \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        df: where the degrees of freedom :math:`\nu` start; their logarithm is learned.
        scale: where the scale :math:`\sigma` starts, in the units of the data; its logarithm is learned.
        per_dimension: whether each dimension of x has its own :math:`\nu_d` and :math:`\sigma_d`; otherwise one of
            each serves all.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `df` or `scale` is not positive and finite.

    References:
        Student-t Variational Autoencoder for Robust Density Estimation, H. Takahashi, T. Iwata, Y. Yamanaka, M. Yamada
        and S. Yagi, 2018, https://www.ijcai.org/proceedings/2018/374.

    >>> StudentT(2, 3, df=4.0)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

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
        _keep_log(self, "df", df, self.x_shape if per_dimension else ())
        _keep_log(self, "scale", scale, self.x_shape if per_dimension else ())

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc = self.parameters_of(z, context)
        return distributions.StudentT(self.log_df.exp(), loc, self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0)


class LogNormal(Likelihood):
    r"""Independent log-normal elements, for positive numbers that vary by factors.

    .. math:: p(x \mid z) = \prod_d \frac{1}{x_d} \mathcal{N}(\log x_d; \mu_d(z), \sigma_d^2), \qquad
        \mu(z) = \mathrm{network}(z)

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        scale: where :math:`\sigma`, of the logarithm of the data, starts; its logarithm is learned.
        per_dimension: whether each dimension of x has its own :math:`\sigma_d`; otherwise one serves all.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `scale` is not positive and finite.

    References:
        Continuous Univariate Distributions, vol. 1, N. L. Johnson, S. Kotz and N. Balakrishnan, 1994, chapter 14,
        https://www.wiley.com/en-us/9780471584957.

    >>> LogNormal(2, 3)(torch.zeros(5, 2)).log_prob(torch.ones(5, 3)).shape
    torch.Size([5])
    """

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
        _keep_log(self, "scale", scale, self.x_shape if per_dimension else ())

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.LogNormal(self.parameters_of(z, context), self.log_scale.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0).log() - self.log_scale.detach().mul(2).exp() / 2


class Gamma(Likelihood):
    r"""Independent gamma elements, for positive numbers such as power spectra.

    .. math:: p(x \mid z) = \prod_d \frac{(\alpha / m_d)^\alpha}{\Gamma(\alpha)} x_d^{\alpha - 1} e^{-\alpha x_d / m_d},
        \qquad m(z) = e^{\mathrm{network}(z)}

    With :math:`\alpha = 1`, the exponential distribution, minus its logarithm is the Itakura-Saito divergence from x to
    its mean m, but for terms in x alone: the likelihood of a power spectrum whose Fourier coefficients are normal.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``; it gives log m.
        concentration: :math:`\alpha`; where learning starts if it is learned.
        learn_concentration: whether :math:`\alpha` is a parameter (of its logarithm) or stays as given.
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
        _keep_log(self, "concentration", concentration, (), learn_concentration)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        concentration = self.log_concentration.exp()
        log_mean = _bounded(self.parameters_of(z, context))
        return distributions.Gamma(concentration, concentration * torch.exp(-log_mean)).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return x.mean(0).log()


class Beta(Likelihood):
    r"""Independent beta elements, for proportions above 0 and below 1.

    .. math:: p(x \mid z) = \prod_d \mathrm{Beta}(x_d; m_d c_d, (1 - m_d) c_d), \qquad
        m(z) = \sigma(\mathrm{network}(z)_1), \quad c(z) = \mathrm{softplus}(\mathrm{network}(z)_2 + a)

    m is the mean, c the concentration about it; the constant a makes every element uniform where the network is zero.
    The density may be infinite at 0 and at 1, which are therefore outside the support: squeeze data that has them,
    for example with ``(x * (n - 1) + 0.5) / n`` for n data.

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
        logit, concentration = _bounded(logit), softplus(raw + _TWO) + 1e-6
        p = distributions.Beta(logit.sigmoid() * concentration, (-logit).sigmoid() * concentration)
        return p.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        mean = x.mean(0)
        # The variance of a beta distribution is m (1 - m) / (c + 1).
        concentration = (mean * (1 - mean) / x.var(0, correction=0).clamp_min(1e-6) - 1).clamp_min(0.1)
        return torch.stack([mean.logit(), concentration + torch.log(-torch.expm1(-concentration)) - _TWO])


class Poisson(Likelihood):
    r"""Independent Poisson counts.

    .. math:: p(x \mid z) = \prod_d \frac{\mu_d^{x_d} e^{-\mu_d}}{x_d!}, \qquad \mu(z) = e^{\mathrm{network}(z)}

    With `library`, :math:`\mu = l\, \mathrm{softmax}(\mathrm{network}(z, c))` instead, where the last number of the
    context c is :math:`\log l`, the logarithm of the datum's library size (its expected total).

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        library: whether the last column of the context is the logarithm of a library size.
        context_dim: width of the context vector, 0 for none; includes the library size.

    Raises:
        ValueError: with `library` when there is no context.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> x = torch.tensor([[3.0, 0.0, 1.0], [10.0, 2.0, 0.0]])
    >>> likelihood = Poisson(2, 3, library=True, context_dim=1)
    >>> likelihood(torch.zeros(2, 2), context=x.sum(-1, keepdim=True).log()).mean.sum(-1).detach().round()
    tensor([ 4., 12.])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        library: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        _check_library(library, context_dim)
        self.library = library

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        log_mean = _log_mean(self.parameters_of(z, context), len(self.x_shape), context if self.library else None)
        return dist.Poisson(log_mean.exp()).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return _log_mean_count(x)


class NegativeBinomial(Likelihood):
    r"""Independent negative binomial counts: Poisson counts whose rates vary.

    .. math:: p(x \mid z) = \prod_d \frac{\Gamma(x_d + \theta_d)}{x_d!\, \Gamma(\theta_d)}
        \left(\frac{\theta_d}{\theta_d + \mu_d}\right)^{\theta_d} \left(\frac{\mu_d}{\theta_d + \mu_d}\right)^{x_d},
        \qquad \mu(z) = e^{\mathrm{network}(z)}

    The variance is :math:`\mu + \mu^2 / \theta`. With `library`,
    :math:`\mu = l\, \mathrm{softmax}(\mathrm{network}(z, c))` instead, where the last number of the context c is
    :math:`\log l`, the logarithm of the datum's library size.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        inverse_dispersion: where :math:`\theta` starts; its logarithm is learned for each dimension of x.
        library: whether the last column of the context is the logarithm of a library size.
        context_dim: width of the context vector, 0 for none; includes the library size.

    Raises:
        ValueError: when `inverse_dispersion` is not positive and finite; with `library` when there is no context.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> NegativeBinomial(2, 3)(torch.zeros(5, 2)).log_prob(torch.ones(5, 3)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        inverse_dispersion: float = 1.0,
        library: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        _keep_log(self, "inverse_dispersion", inverse_dispersion, self.x_shape)
        _check_library(library, context_dim)
        self.library = library

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        log_mean = _log_mean(self.parameters_of(z, context), len(self.x_shape), context if self.library else None)
        total_count, logits = self.log_inverse_dispersion.exp(), log_mean - self.log_inverse_dispersion
        return distributions.NegativeBinomial(total_count, logits=logits).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return _log_mean_count(x)


class ZeroInflatedNegativeBinomial(Likelihood):
    r"""Independent negative binomial counts, some of which are lost and read zero.

    .. math:: p(x \mid z) = \prod_d \left(\pi_d [x_d = 0] + (1 - \pi_d)\, \mathrm{NB}(x_d; \mu_d, \theta_d)\right),
        \qquad \mu(z) = e^{\mathrm{network}(z)_1}, \quad \pi(z) = \sigma(\mathrm{network}(z)_2)

    NB is that of :class:`NegativeBinomial`, and so is what `library` does to :math:`\mu`.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (2, *x_shape))``.
        inverse_dispersion: where :math:`\theta` starts; its logarithm is learned for each dimension of x.
        library: whether the last column of the context is the logarithm of a library size.
        context_dim: width of the context vector, 0 for none; includes the library size.

    Raises:
        ValueError: when `inverse_dispersion` is not positive and finite; with `library` when there is no context.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> ZeroInflatedNegativeBinomial(2, 3)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        inverse_dispersion: float = 1.0,
        library: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=(2, *as_shape(x_shape, "x_shape")))
        _keep_log(self, "inverse_dispersion", inverse_dispersion, self.x_shape)
        _check_library(library, context_dim)
        self.library = library

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        raw, gate_logits = self.parameters_of(z, context).unbind(-len(self.param_shape))
        log_mean = _log_mean(raw, len(self.x_shape), context if self.library else None)
        total_count, logits = self.log_inverse_dispersion.exp(), log_mean - self.log_inverse_dispersion
        p = distributions.ZeroInflatedNegativeBinomial(total_count, logits, gate_logits)
        return p.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        log_mean = _log_mean_count(x)  # the gate starts at one half, so the counts that pass have twice the mean
        return torch.stack([log_mean + math.log(2), torch.zeros_like(log_mean)])


class Categorical(Likelihood):
    r"""Independent classes, numbered from 0, as floats or as integers.

    .. math:: p(x \mid z) = \prod_d \mathrm{softmax}(\mathrm{network}(z)_{\cdot d})_{x_d}

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum, one class number an element.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (num_classes, *x_shape))``.
        num_classes: number of classes, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2.

    References:
        Pixel Recurrent Neural Networks, A. van den Oord, N. Kalchbrenner and K. Kavukcuoglu, 2016,
        https://arxiv.org/abs/1601.06759.

    >>> Categorical(2, (8, 8), num_classes=4)(torch.zeros(5, 2)).log_prob(torch.full((5, 8, 8), 3.0)).shape
    torch.Size([5])
    """

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, num_classes: int = 256, context_dim: int = 0
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        param_shape = (num_classes, *as_shape(x_shape, "x_shape"))
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=param_shape)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(z, context).movedim(-len(self.param_shape), -1)
        return distributions.Categorical(logits=logits).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        classes = torch.arange(self.param_shape[0], device=x.device).view(-1, *(1,) * x.dim())
        # Half a datum more of each class, so that one that was not seen has a logarithm.
        return torch.log(((x == classes).float().sum(1) + 0.5) / (len(x) + 0.5 * len(classes)))


class Multinomial(Likelihood):
    r"""Counts given their total: how often a user chose each item, a document each word.

    .. math:: p(x \mid z) = \frac{n!}{\prod_d x_d!} \prod_d \pi_d(z)^{x_d}, \qquad n = \sum_d x_d, \quad
        \pi(z) = \mathrm{softmax}(\mathrm{network}(z))

    The log-probability is conditional on each datum's own total n, which may differ from datum to datum.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        total_count: the total of samples and of the mean.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `total_count` is below 1.

    References:
        Variational Autoencoders for Collaborative Filtering, D. Liang, R. G. Krishnan, M. D. Hoffman and T. Jebara,
        2018, https://arxiv.org/abs/1802.05814.

    >>> Multinomial(2, 3, total_count=10)(torch.zeros(5, 2)).sample().sum(-1)
    tensor([10., 10., 10., 10., 10.])
    """

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, total_count: int = 1, context_dim: int = 0
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        if total_count < 1:
            raise ValueError(f"total_count must be at least 1, got {total_count}.")
        self.total_count = total_count

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.Multinomial(self.total_count, self.parameters_of(z, context), len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return _log_mean_count(x)


class DiscretizedLogistic(Likelihood):
    r"""Independent logistic pixels rounded to a grid, for bytes: data ``k / (levels - 1)`` from 0 to 1.

    .. math:: p(x \mid z) = \prod_d \int_{a(x_d)}^{b(x_d)} \mathrm{Logistic}(u; \mu_d, s_d)\, du, \qquad
        \mu(z) = \tfrac{1}{2} + \mathrm{network}(z)_1, \quad s(z) = e^{\mathrm{network}(z)_2}

    from half a level below to half a level above; the first and the last level take the tails. Comparable with a
    categorical likelihood, and by :func:`bits_per_dim` with a density.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (2, *x_shape))``.
        levels: number of levels, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `levels` is below 2.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow, D. P. Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934.

    >>> x = torch.randint(256, (5, 1, 8, 8)) / 255
    >>> DiscretizedLogistic(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(x).shape
    torch.Size([5])
    """

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, levels: int = 256, context_dim: int = 0
    ):
        _check_levels(levels)
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=(2, *as_shape(x_shape, "x_shape")))
        self.levels = levels

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, log_scale = self.parameters_of(z, context).unbind(-len(self.param_shape))
        p = distributions.DiscretizedLogistic(loc + 0.5, log_scale.clamp(-20, 20).exp(), self.levels)
        return p.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        # About the data's mean: the tails beyond the grid move it.
        scale = (x.std(0, correction=0) * math.sqrt(3) / math.pi).clamp_min(0.5 / (self.levels - 1))
        return torch.stack([x.mean(0) - 0.5, scale.log()])


class DiscretizedLogisticMixture(Likelihood):
    r"""Independent mixtures of rounded logistic distributions: pixels as in PixelCNN++, without its dependences.

    .. math:: p(x \mid z) = \prod_d \sum_{k=1}^K \pi_{kd}(z) \int_{a(x_d)}^{b(x_d)} \mathrm{Logistic}(u; \mu_{kd}(z),
        s_{kd}(z))\, du

    from half a level below to half a level above, as in :class:`DiscretizedLogistic`; :math:`\pi` is the softmax of the
    network's first output, the others are as there.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from
            ``(latent_dim, (3 * num_components, *x_shape))``: logits, locations, then logarithms of scales.
        num_components: K, the number of components, at least 1.
        levels: number of levels, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_components` is below 1 or `levels` below 2.

    References:
        PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications,
        T. Salimans, A. Karpathy, X. Chen and D. P. Kingma, 2017, https://arxiv.org/abs/1701.05517.

    >>> x = torch.randint(256, (5, 1, 8, 8)) / 255
    >>> DiscretizedLogisticMixture(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(x).shape
    torch.Size([5])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        num_components: int = 5,
        levels: int = 256,
        context_dim: int = 0,
    ):
        _check_levels(levels)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        param_shape = (3 * num_components, *as_shape(x_shape, "x_shape"))
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=param_shape)
        self.num_components, self.levels = num_components, levels

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        parameters = self.parameters_of(z, context).movedim(-len(self.param_shape), -1)
        logits, loc, log_scale = parameters.chunk(3, dim=-1)
        components = distributions.DiscretizedLogistic(loc + 0.5, log_scale.clamp(-20, 20).exp(), self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        # Components side by side over two standard deviations: alike, they would long stay so.
        std = x.std(0, correction=0).clamp_min(0.5 / (self.levels - 1))
        offset = (torch.arange(self.num_components) * 2 + 1) / self.num_components - 1
        loc = torch.stack([x.mean(0) - 0.5 + float(o) * std for o in offset])
        log_scale = (std * math.sqrt(3) / math.pi / math.sqrt(self.num_components)).log().expand(loc.shape)
        return torch.cat([torch.zeros_like(loc), loc, log_scale])


class Mixed(Likelihood):
    r"""Independent blocks of columns, each with a likelihood and a decoder of its own: tables of mixed types.

    .. math:: p(x \mid z) = \prod_b p_b(x_b \mid z), \qquad x = [x_1, \dots, x_B]

    Args:
        latent_dim: number of latent dimensions.
        x_shape: the number of columns, the sum of the blocks'.
        blocks: for each block a callable that builds its likelihood from ``(latent_dim, columns)``, and how many
            columns it has. With a context it is called with `context_dim` too.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when there is no block, or the blocks' columns do not add up to `x_shape`.

    References:
        Handling Incomplete Heterogeneous Data Using VAEs, A. Nazabal, P. M. Olmos, Z. Ghahramani and I. Valera, 2020,
        https://arxiv.org/abs/1807.03653.

    >>> from functools import partial
    >>> blocks = [(Normal, 3), (partial(Categorical, num_classes=5), 1), (Bernoulli, 4)]
    >>> Mixed(2, 8, blocks)(torch.zeros(6, 2)).sample().shape
    torch.Size([6, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        blocks: Sequence[tuple[Callable[[int, Shape], Likelihood], int]],
        context_dim: int = 0,
    ):
        nn.Module.__init__(self)  # no decoder of its own
        self.latent_dim, self.x_shape, self.context_dim = latent_dim, as_shape(x_shape, "x_shape"), context_dim
        self.sizes = [size for _, size in blocks]
        if not blocks or self.x_shape != (sum(self.sizes),):
            raise ValueError(
                f"x_shape must be ({sum(self.sizes)},), the sum of the columns of the blocks {self.sizes}, got "
                f"{x_shape!r}."
            )
        keywords = {"context_dim": context_dim} if context_dim else {}
        self.blocks = nn.ModuleList([block(latent_dim, size, **keywords) for block, size in blocks])

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.Blocks([block(z, context) for block in self.blocks])

    def output_for(self, x: Tensor) -> Tensor:
        raise NotImplementedError("Mixed has no network of its own: each of its blocks has.")

    def start_at(self, x: Tensor) -> "Mixed":
        for block, columns in zip(self.blocks, self._check_data(x).split(self.sizes, dim=-1), strict=True):
            block.start_at(columns)
        return self


def bits_per_dim(log_prob: Tensor, x_shape: Shape, bin_width: float = 1.0) -> Tensor:
    r"""Turns log-probabilities in nats into bits per dimension, the fewer the better.

    .. math:: -\frac{\log p(x) + D \log w}{D \log 2}

    Args:
        log_prob: log p(x) in nats, of any shape.
        x_shape: shape of one datum, of D dimensions.
        bin_width: w, for a density of data that had been rounded to bins of this width (and dequantised): it makes the
            density a probability of the bin, comparable with discrete likelihoods. 1/256 for bytes scaled to [0, 1].

    Raises:
        ValueError: when `bin_width` is not positive and finite.

    References:
        A Note on the Evaluation of Generative Models, L. Theis, A. van den Oord and M. Bethge, 2016,
        https://arxiv.org/abs/1511.01844.

    >>> bits_per_dim(torch.tensor([0.0]), (3, 32, 32), bin_width=1 / 256)
    tensor([8.])
    """
    if not 0 < bin_width < math.inf:
        raise ValueError(f"bin_width must be positive and finite, got {bin_width}.")
    return -(log_prob / math.prod(as_shape(x_shape, "x_shape")) + math.log(bin_width)) / math.log(2)


_TWO = math.log(math.expm1(2))  # softplus(_TWO) = 2, the concentration of the uniform distribution


def _keep_log(part: nn.Module, name: str, value: float, shape: tuple[int, ...], learn: bool = True) -> None:
    """Keeps the logarithm of a positive number as the parameter (or buffer) ``log_<name>``."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    log = torch.full(shape, math.log(value))
    if learn:
        part.register_parameter(f"log_{name}", nn.Parameter(log))
    else:
        part.register_buffer(f"log_{name}", log)


def _bounded(log: Tensor) -> Tensor:
    """Keeps the exponential of a network's output and its inverse within what float32 can hold."""
    return log.clamp(-60, 60)


def _log_mean(raw: Tensor, event_dim: int, library: Tensor | None) -> Tensor:
    """Returns the logarithms of the means of counts; `library` is the context that ends in the log library size."""
    if library is None:
        return _bounded(raw)
    log_proportions = raw.flatten(raw.dim() - event_dim).log_softmax(-1).reshape(raw.shape)
    return _bounded(log_proportions + library[..., -1].reshape(library.shape[:-1] + (1,) * event_dim))


def _check_library(library: bool, context_dim: int) -> None:
    if library and context_dim < 1:
        raise ValueError(
            "library=True takes the log library size from the last column of the context: build the likelihood with "
            f"context_dim=1 or more, got {context_dim}."
        )


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")


def _inside(mean: Tensor, size: int) -> Tensor:
    """Keeps means of numbers from 0 to 1 off the ends by half a datum's part."""
    return mean.clamp(0.5 / size, 1 - 0.5 / size)


def _log_mean_count(x: Tensor) -> Tensor:
    return x.mean(0).clamp_min(0.5 / len(x)).log()  # half a count where there is none
