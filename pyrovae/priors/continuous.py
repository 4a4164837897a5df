"""Priors over real vectors, the sphere and the simplex."""

import math
from collections.abc import Callable
from functools import partial

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrovae import distributions
from pyrovae.distributions import check_simplex, positive
from pyrovae.nn import MLP, Network, apply, build
from pyrovae.nn.base import check_count
from pyrovae.priors.base import Prior


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

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        # Buffers, so that they move with the module; not persistent, because they are constants.
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class DiagonalNormal(Prior):
    r"""A normal prior with learned mean and scales, which may depend on a context through a network.

    .. math:: p(z \mid c) = \mathcal{N}(z; \mu(c), \mathrm{diag}\, \sigma(c)^2)

    Args:
        latent_dim: number of latent dimensions.
        network: maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, 2 * latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models, K. Sohn, H. Lee and X. Yan,
        2015, https://papers.nips.cc/paper/5775.

    >>> DiagonalNormal(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        latent_dim = check_count(latent_dim, "latent_dim")
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(2 * latent_dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(context).chunk(2, dim=-1)
        return dist.Normal(loc, positive(raw)).to_event(1)


class Laplace(Prior):
    r"""Independent Laplace dimensions with learned locations and scales: sparser than a normal.

    .. math:: p(z) = \prod_d \frac{1}{2 b_d} \exp\left(-\frac{|z_d - \mu_d|}{b_d}\right)

    Args:
        latent_dim: number of latent dimensions.
        network: maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, 2 * latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> Laplace(1)().log_prob(torch.zeros(1)).item()  # -log 2
    -0.69314...
    """

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        latent_dim = check_count(latent_dim, "latent_dim")
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(2 * latent_dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(context).chunk(2, dim=-1)
        return dist.Laplace(loc, positive(raw)).to_event(1)


class StudentT(Prior):
    r"""Independent Student t dimensions with learned locations, scales and degrees of freedom: heavier tails.

    .. math:: p(z) = \prod_d \mathrm{StudentT}(z_d; \nu_d, \mu_d, \sigma_d)

    Args:
        latent_dim: number of latent dimensions.
        df: initial degrees of freedom :math:`\nu`, positive.
        network: maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, 3 * latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `df` is not positive and finite.

    References:
        Student-t Variational Autoencoder for Robust Density Estimation, H. Takahashi, T. Iwata, Y. Yamanaka,
        M. Yamada and S. Yagi, 2018, https://doi.org/10.24963/ijcai.2018/374.

    >>> StudentT(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    def __init__(self, latent_dim: int, df: float = 5.0, network: Network = MLP, context_dim: int = 0):
        latent_dim = check_count(latent_dim, "latent_dim")
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(3 * latent_dim))
        if not 0 < df < math.inf:
            raise ValueError(f"df must be positive and finite, got {df}.")
        self.df = df

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw, raw_df = self.parameters_of(context).chunk(3, dim=-1)
        return distributions.StudentT(self.df * positive(raw_df), loc, positive(raw)).to_event(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, df={self.df}"


def spline_flow(features: int, context: int) -> nn.Module:
    """Returns a neural spline flow of zuko's with coupling: drawing and scoring take two passes a transformation.

    Args:
        features: number of dimensions.
        context: width of the context vector, 0 for none.

    References:
        Neural Spline Flows, C. Durkan, A. Bekasov, I. Murray and G. Papamakarios, 2019,
        https://arxiv.org/abs/1906.04032.
    """
    return distributions.import_zuko().flows.NSF(features, context, transforms=3, passes=2)


class FlowPrior(Prior):
    r"""Any of zuko's normalizing flows as a prior.

    .. math:: p(z) = \mathcal{N}(f(z); 0, I) \left| \det \frac{\partial f}{\partial z} \right|

    Args:
        latent_dim: number of latent dimensions.
        flow: builds the flow from ``(latent_dim, context_dim)``, ``zuko.flows.MAF`` for example.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when the flow's events are not of shape ``(latent_dim,)``.

    References:
        Variational Lossy Autoencoder, X. Chen et al., 2017, https://arxiv.org/abs/1611.02731; Density Estimation using
        Real NVP, L. Dinh, J. Sohl-Dickstein and S. Bengio, 2017, https://arxiv.org/abs/1605.08803.

    >>> FlowPrior(3)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    zero: Tensor

    def __init__(self, latent_dim: int, flow: Callable[[int, int], nn.Module] = spline_flow, context_dim: int = 0):
        super().__init__(latent_dim, context_dim=context_dim)
        self.flow = flow if isinstance(flow, nn.Module) else flow(latent_dim, context_dim)
        try:
            with torch.no_grad():
                p = self.flow(torch.zeros(context_dim) if context_dim else None)
                event_shape = tuple(p.event_shape)
                if event_shape == (latent_dim,):
                    p.log_prob(torch.zeros(latent_dim))
        except RuntimeError as error:
            raise ValueError(
                f"flow takes no context of width {context_dim}: {error}. Build it from (latent_dim, context_dim)."
            ) from error
        if event_shape != (latent_dim,):
            raise ValueError(f"flow must have events of shape ({latent_dim},), got {event_shape}.")
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.Flow(self.flow(self.select_context(context)), self.zero, self.zero + 1)


class ResampledPrior(Prior):
    r"""The standard normal, changed by rejection sampling with a learned acceptance probability (LARS).

    .. math:: p(z) = \mathcal{N}(z; 0, I) \left( \frac{a(z)}{Z} \left(1 - (1 - Z)^{T-1}\right) + (1 - Z)^{T-1} \right),
        \qquad Z = \mathrm{E}\, a(z), \quad a(z) = \sigma(\mathrm{network}(z))

    In training, each step estimates Z from `num_samples` draws. In evaluation mode, Z is estimated from 16,384 fixed
    points of a Sobol sequence, so that log p(z) is a fixed function. The normalisation is as accurate as this estimate:
    the error of log p(z) is at most about :math:`s / (128 Z)` nats, where s is the standard deviation of a(z).

    Args:
        latent_dim: number of latent dimensions.
        network: the logit of the acceptance probability, a module or a callable that builds one from
            ``(latent_dim, 1)``.
        tries: T, at least 1; draw number T is always accepted.
        num_samples: draws for Z in training, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `tries` or `num_samples` is below 1.

    References:
        Resampled Priors for Variational Autoencoders, M. Bauer and A. Mnih, 2019, https://arxiv.org/abs/1810.11428.

    >>> ResampledPrior(3)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    loc: Tensor
    points: Tensor

    def __init__(
        self,
        latent_dim: int,
        network: Network = MLP,
        tries: int = 100,
        num_samples: int = 1024,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, context_dim=context_dim)
        for name, value in (("tries", tries), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.tries, self.num_samples = tries, num_samples
        self.network = build(network, latent_dim, 1, context_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("points", _normal_points(latent_dim), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        context = self.select_context(context)
        base = dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
        points = base.sample((self.num_samples,)) if self.training else self.points
        if context is not None:
            base = base.expand(context.shape[:-1])
            points = points.reshape(len(points), *[1] * (context.dim() - 1), -1).expand(-1, *context.shape[:-1], -1)
        accept = partial(self._log_acceptance, context)
        return distributions.Resampled(base, accept, accept(points).logsumexp(0) - math.log(len(points)), self.tries)

    def _log_acceptance(self, context: Tensor | None, z: Tensor) -> Tensor:
        return logsigmoid(apply(self.network, z, context, (1,), "ResampledPrior").squeeze(-1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tries={self.tries}, num_samples={self.num_samples}"


def _normal_points(latent_dim: int) -> Tensor:
    sobol = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=0)
    return torch.special.ndtri(sobol.draw(2**14, dtype=torch.float64).clamp(1e-10, 1 - 1e-10)).float()


def squared_exponential(distance: Tensor) -> Tensor:
    r"""The squared-exponential kernel, :math:`\exp(-r^2 / 2)`, with smooth paths, of distances r in length scales."""
    return (-0.5 * distance.square()).exp()


def matern_32(distance: Tensor) -> Tensor:
    r"""The Matern kernel of smoothness 3/2, :math:`(1 + \sqrt3 r) \exp(-\sqrt3 r)`, with once differentiable paths."""
    r = math.sqrt(3) * distance
    return (1 + r) * (-r).exp()


def matern_52(distance: Tensor) -> Tensor:
    r"""The Matern kernel of smoothness 5/2, :math:`(1 + \sqrt5 r + 5 r^2 / 3) \exp(-\sqrt5 r)`, with twice
    differentiable paths.
    """
    r = math.sqrt(5) * distance
    return (1 + r + r.square() / 3) * (-r).exp()


def cauchy(distance: Tensor) -> Tensor:
    r"""The Cauchy (rational quadratic) kernel, :math:`1 / (1 + r^2)`, a mixture of many length scales."""
    return 1 / (1 + distance.square())


class GaussianProcess(Prior):
    r"""Gaussian processes over a known coordinate, such as time: a prior for sequences.

    .. math:: z_p = (z_p(t_1), \dots, z_p(t_T)) \sim \mathcal{N}(0, K_p), \qquad
        K_p(t, t') = (1 - s)\, k(|t - t'| / l_p) + s\, [t = t']

    The latents of a datum are :math:`P = \mathrm{latent\_dim} / T` independent processes at T times, concatenated:
    ``z.unflatten(-1, (P, T))``. The context holds the times of each datum; without one, the times are 0, 1, ..., T - 1
    for all data. The variance is one, because a decoder may scale its input.

    Args:
        latent_dim: number of latent dimensions, a multiple of `num_times`.
        num_times: :math:`T`, at least 1.
        length_scale: initial :math:`l_p`, in the units of the times; each process learns its own.
        kernel: :math:`k`, a function of the distance in length scales, with k(0) = 1: `squared_exponential`,
            `matern_32`, `matern_52` or `cauchy`, of :mod:`pyrovae.priors`, or another.
        noise: :math:`s`, the fraction of the variance that is white noise, in (0, 1).
        context_dim: `num_times` if each datum has its own times, 0 if all have 0, 1, ..., T - 1.

    Raises:
        ValueError: when `num_times` does not divide `latent_dim`, when another argument is out of range, or when the
            context does not have T times for each datum.

    References:
        Gaussian Process Prior Variational Autoencoders, F. P. Casale, A. Dalca, L. Saglietti, J. Listgarten and
        N. Fusi, 2018, https://arxiv.org/abs/1810.11738; GP-VAE: Deep Probabilistic Time Series Imputation, V. Fortuin,
        D. Baranchuk, G. Raetsch and S. Mandt, 2020, https://arxiv.org/abs/1907.04155.

    >>> GaussianProcess(10, num_times=5, context_dim=5)(torch.rand(7, 5)).sample().shape
    torch.Size([7, 10])
    """

    times: Tensor

    def __init__(
        self,
        latent_dim: int,
        num_times: int,
        length_scale: float = 1.0,
        kernel: Callable[[Tensor], Tensor] = squared_exponential,
        noise: float = 1e-3,
        context_dim: int = 0,
    ):
        if num_times < 1 or latent_dim % num_times:
            raise ValueError(f"num_times must divide latent_dim={latent_dim}, got {num_times}.")
        if not 0 < length_scale < math.inf:
            raise ValueError(f"length_scale must be positive and finite, got {length_scale}.")
        if not 0 < noise < 1:
            raise ValueError(f"noise must be between 0 and 1, got {noise}.")
        if context_dim not in (0, num_times):
            raise ValueError(f"context_dim must be num_times={num_times}, or 0 for none, got {context_dim}.")
        super().__init__(latent_dim, start=torch.full((latent_dim // num_times,), math.log(length_scale)))
        self.num_times, self.kernel, self.noise, self.context_dim = num_times, kernel, noise, context_dim
        self.register_buffer("times", torch.arange(num_times, dtype=torch.get_default_dtype()), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        context = self.select_context(context)
        times = self.times if context is None else context.to(self.times)
        if times.shape[-1:] != (self.num_times,):
            raise ValueError(
                f"context must hold {self.num_times} times a datum, shape (batch, {self.num_times}), got "
                f"{tuple(times.shape)}."
            )
        distance = (times.unsqueeze(-1) - times.unsqueeze(-2)).abs().unsqueeze(-3)
        smooth = self.kernel(distance / self.params.exp().reshape(-1, 1, 1))
        eye = torch.eye(self.num_times, dtype=smooth.dtype, device=smooth.device)
        scale_tril = torch.linalg.cholesky((1 - self.noise) * smooth + self.noise * eye)
        processes = dist.MultivariateNormal(times.new_zeros(scale_tril.shape[:-1]), scale_tril=scale_tril)
        return distributions.Flattened(processes.to_event(1))

    def extra_repr(self) -> str:
        kernel = getattr(self.kernel, "__name__", repr(self.kernel))
        return f"{super().extra_repr()}, num_times={self.num_times}, kernel={kernel}, noise={self.noise:g}"


class HypersphericalUniform(Prior):
    r"""The uniform prior on the unit sphere, for von Mises-Fisher encoders.

    .. math:: p(z) = \frac{\Gamma(m / 2)}{2 \pi^{m / 2}}, \qquad \lVert z \rVert = 1

    Args:
        latent_dim: dimension m of the space that the sphere is in, at least 2.

    Raises:
        ValueError: when `latent_dim` is below 2.

    References:
        Hyperspherical Variational Auto-Encoders, T. R. Davidson, L. Falorsi, N. De Cao, T. Kipf and J. M. Tomczak,
        2018, https://arxiv.org/abs/1804.00891.

    >>> HypersphericalUniform(2)().log_prob(torch.tensor([1.0, 0.0]))  # -log(2 pi)
    tensor(-1.8379)
    """

    support = constraints.sphere

    like: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        if latent_dim < 2:
            raise ValueError(f"latent_dim must be at least 2 for latents on a sphere, got {latent_dim}.")
        self.register_buffer("like", torch.zeros(latent_dim), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.HypersphericalUniform(self.like)


class LogisticNormal(Prior):
    r"""A logistic normal prior on the simplex, for topics: the softmax of a normal vector and a zero.

    .. math:: z = \mathrm{softmax}(y_1, \dots, y_{K-1}, 0), \quad y \sim \mathcal{N}(\mu, \mathrm{diag}\,\sigma^2)

    Args:
        latent_dim: number of topics :math:`K`, at least 2.
        network: maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, 2 * (latent_dim - 1))``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `latent_dim` is below 2.

    References:
        Correlated Topic Models, D. M. Blei and J. D. Lafferty, 2005, https://papers.nips.cc/paper/2906;
        Autoencoding Variational Inference for Topic Models, A. Srivastava and C. Sutton, 2017,
        https://arxiv.org/abs/1703.01488.

    >>> LogisticNormal(3)().sample().shape
    torch.Size([3])
    """

    support = constraints.simplex

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        check_simplex(latent_dim)
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(2 * (latent_dim - 1)))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(context).chunk(2, dim=-1)
        return distributions.LogisticNormal(loc, positive(raw))


class Dirichlet(Prior):
    r"""A Dirichlet prior on the simplex with learned concentrations, for topics.

    .. math:: p(z) = \frac{\Gamma(\sum_k \alpha_k)}{\prod_k \Gamma(\alpha_k)} \prod_{k=1}^K z_k^{\alpha_k - 1}

    Args:
        latent_dim: number of topics :math:`K`, at least 2.
        concentration: initial value of every :math:`\alpha_k`, positive; below one it favours few topics in a datum.
        network: maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `latent_dim` is below 2 or `concentration` is not positive and finite.

    References:
        Latent Dirichlet Allocation, D. M. Blei, A. Y. Ng and M. I. Jordan, 2003,
        https://jmlr.org/papers/v3/blei03a.html; Autoencoding Variational Inference for Topic Models, A. Srivastava and
        C. Sutton, 2017, https://arxiv.org/abs/1703.01488.

    >>> Dirichlet(3)().log_prob(torch.tensor([0.2, 0.3, 0.5])).item()  # log 2, nearly: the concentrations are 1
    0.69314...
    """

    support = constraints.simplex

    def __init__(self, latent_dim: int, concentration: float = 1.0, network: Network = MLP, context_dim: int = 0):
        check_simplex(latent_dim)
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim))
        if not 0 < concentration < math.inf:
            raise ValueError(f"concentration must be positive and finite, got {concentration}.")
        self.concentration = concentration

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Dirichlet(self.concentration * positive(self.parameters_of(context)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, concentration={self.concentration}"
