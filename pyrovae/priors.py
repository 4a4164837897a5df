r"""Priors: modules whose ``forward(context=None)`` returns a Pyro distribution, :math:`p(z)` or :math:`p(z \mid c)`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyrovae import latents
from pyrovae.latents import (
    NormalMixture,
    check_classes,
    check_simplex,
    check_temperature,
    one_hot_blocks,
    positive,
    tril_of,
)
from pyrovae.nn import MLP, Network, apply, build

__all__ = [
    "Categorical",
    "DiagonalNormal",
    "Dirichlet",
    "ExemplarPrior",
    "FlowPrior",
    "FullRankGaussianMixture",
    "GaussianMixture",
    "GaussianProcess",
    "HypersphericalUniform",
    "Laplace",
    "LogisticNormal",
    "OneHotCategorical",
    "Prior",
    "RelaxedOneHotCategorical",
    "ResampledPrior",
    "StandardNormal",
    "StudentT",
    "TiedGaussianMixture",
    "VampPrior",
    "cauchy",
    "matern_32",
    "matern_52",
    "spline_flow",
    "squared_exponential",
]


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

    A prior with parameters says where they start, and :meth:`parameters_of` returns them: learned, or learned with the
    output of a network of the context added to them. One over another space than the real vectors says so in the
    attribute `support`, a constraint, which must be its encoder's too.

    Args:
        latent_dim: number of latent dimensions, at least 1.
        network: what maps a context to what is added to the parameters, a module or a callable that builds one from
            ``(context_dim, len(start))``.
        context_dim: width of the context vector, 0 for none.
        start: the parameters before training, as one vector; None for a prior without.
    """

    support: constraints.Constraint = constraints.real_vector

    def __init__(
        self, latent_dim: int, network: Network = MLP, context_dim: int = 0, *, start: Tensor | None = None
    ):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}.")
        self.latent_dim, self.context_dim = latent_dim, context_dim
        if start is not None:
            self.params = nn.Parameter(start)
            if context_dim:
                self.network = build(network, context_dim, len(start), 0)

    def parameters_of(self, context: Tensor | None = None) -> Tensor:
        """Returns the parameters as one vector, or with a context as vectors of shape ``(*leading, size)``."""
        if not self.context_dim:
            return self.params
        if context is None:
            raise ValueError(f"{type(self).__name__} was built with context_dim={self.context_dim} and needs a context.")
        return self.params + apply(self.network, context, None, self.params.shape, type(self).__name__)

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


class DiagonalNormal(Prior):
    r"""A normal prior with learned mean and scales, or with a network's of the context.

    .. math:: p(z \mid c) = \mathcal{N}(z; \mu(c), \mathrm{diag}\, \sigma(c)^2)

    Args:
        latent_dim: number of latent dimensions.
        network: what maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, 2 * latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models, K. Sohn, H. Lee and X. Yan,
        2015, https://papers.nips.cc/paper/5775.

    >>> DiagonalNormal(3)().log_prob(torch.zeros(3)).shape
    torch.Size([])
    """

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(2 * latent_dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(context).chunk(2, dim=-1)
        return dist.Normal(loc, positive(raw)).to_event(1)


class Laplace(Prior):
    r"""Independent Laplace dimensions with learned location and scale: sparser than a normal.

    .. math:: p(z) = \prod_d \frac{1}{2 b_d} \exp\left(-\frac{|z_d - \mu_d|}{b_d}\right)

    Args:
        latent_dim: number of latent dimensions.
        network: what maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, 2 * latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> Laplace(1)().log_prob(torch.zeros(1)).item()  # -log 2
    -0.69314...
    """

    def __init__(self, latent_dim: int, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(2 * latent_dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw = self.parameters_of(context).chunk(2, dim=-1)
        return dist.Laplace(loc, positive(raw)).to_event(1)


class StudentT(Prior):
    r"""Independent Student-t dimensions with learned location, scale and degrees of freedom: heavier tails.

    .. math:: p(z) = \prod_d \mathrm{StudentT}(z_d; \nu_d, \mu_d, \sigma_d)

    Args:
        latent_dim: number of latent dimensions.
        df: degrees of freedom :math:`\nu` before training, positive.
        network: what maps a context to the parameters, a module or a callable that builds one from
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
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(3 * latent_dim))
        if not 0 < df < math.inf:
            raise ValueError(f"df must be positive and finite, got {df}.")
        self.df = df

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, raw, raw_df = self.parameters_of(context).chunk(3, dim=-1)
        return dist.StudentT(self.df * positive(raw_df), loc, positive(raw)).to_event(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, df={self.df}"


class GaussianMixture(Prior):
    r"""A mixture of normals with independent dimensions.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal{N}(z; \mu_k, \mathrm{diag}\, \sigma_k^2)

    Args:
        latent_dim: number of latent dimensions.
        num_components: :math:`K`, at least 1.
        network: what maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, num_components * (1 + 2 * latent_dim))``.
        context_dim: width of the context vector, 0 for none.

    References:
        Approximate Inference for Deep Latent Gaussian Mixtures, E. Nalisnick, L. Hertel and P. Smyth, 2016,
        https://www.ics.uci.edu/~smyth/publications/; Deep Unsupervised Clustering with Gaussian Mixture Variational
        Autoencoders, N. Dilokthanakul et al., 2016, https://arxiv.org/abs/1611.02648.

    >>> GaussianMixture(3, num_components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def __init__(self, latent_dim: int, num_components: int = 10, network: Network = MLP, context_dim: int = 0):
        start = _mixture_start(latent_dim, num_components, scales=latent_dim * num_components)
        super().__init__(latent_dim, network, context_dim, start=start)
        self.num_components = num_components

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits, loc, raw = _mixture_parameters(self, context)
        return NormalMixture(logits, loc, positive(raw).unflatten(-1, loc.shape[-2:]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}"


class FullRankGaussianMixture(Prior):
    r"""A mixture of normals, each with a covariance of its own.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal{N}(z; \mu_k, L_k L_k^\top)

    Args:
        latent_dim: number of latent dimensions.
        num_components: :math:`K`, at least 1.
        network: what maps a context to the parameters, a module or a callable that builds one from ``(context_dim,
            num_components * (1 + latent_dim + latent_dim * (latent_dim + 1) // 2))``.
        context_dim: width of the context vector, 0 for none.

    References:
        Variational Deep Embedding, Z. Jiang, Y. Zheng, H. Tan, B. Tang and H. Zhou, 2017,
        https://arxiv.org/abs/1611.05148.

    >>> FullRankGaussianMixture(3, num_components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def __init__(self, latent_dim: int, num_components: int = 10, network: Network = MLP, context_dim: int = 0):
        triangle = latent_dim * (latent_dim + 1) // 2
        start = _mixture_start(latent_dim, num_components, scales=num_components * triangle)
        super().__init__(latent_dim, network, context_dim, start=start)
        self.num_components = num_components

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits, loc, raw = _mixture_parameters(self, context)
        return NormalMixture(logits, loc, scale_tril=tril_of(raw.unflatten(-1, (self.num_components, -1))))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}"


class TiedGaussianMixture(Prior):
    r"""A mixture of normals that share one covariance.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal{N}(z; \mu_k, L L^\top)

    Args:
        latent_dim: number of latent dimensions.
        num_components: :math:`K`, at least 1.
        network: what maps a context to the parameters, a module or a callable that builds one from ``(context_dim,
            num_components * (1 + latent_dim) + latent_dim * (latent_dim + 1) // 2)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Variational Deep Embedding, Z. Jiang, Y. Zheng, H. Tan, B. Tang and H. Zhou, 2017,
        https://arxiv.org/abs/1611.05148.

    >>> TiedGaussianMixture(3, num_components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def __init__(self, latent_dim: int, num_components: int = 10, network: Network = MLP, context_dim: int = 0):
        start = _mixture_start(latent_dim, num_components, scales=latent_dim * (latent_dim + 1) // 2)
        super().__init__(latent_dim, network, context_dim, start=start)
        self.num_components = num_components

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits, loc, raw = _mixture_parameters(self, context)
        return NormalMixture(logits, loc, scale_tril=tril_of(raw).unsqueeze(-3))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}"


def _mixture_start(latent_dim: int, num_components: int, scales: int) -> Tensor:
    if num_components < 1:
        raise ValueError(f"num_components must be at least 1, got {num_components}.")
    # Means apart from one another, for components that are alike stay so.
    return torch.cat([torch.zeros(num_components), torch.randn(num_components * latent_dim), torch.zeros(scales)])


def _mixture_parameters(prior: Prior, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    params, k = prior.parameters_of(context), prior.num_components
    loc = params[..., k : k + k * prior.latent_dim].unflatten(-1, (k, prior.latent_dim))
    return params[..., :k], loc, params[..., k + k * prior.latent_dim :]


class VampPrior(Prior):
    r"""A mixture of the encoder's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^K q(z \mid u_k)

    The encoder sees the pseudo-inputs once for each run of the model, however many particles there are. With a context,
    they are encoded along with each row of it.

    Args:
        encoder: the encoder of the VAE.
        num_components: number of pseudo-inputs :math:`K`, at least 1.
        data: what they start from: shape ``(at least num_components, *x_shape)``, of which the first are taken; None for
            noise.
        bounds: smallest and largest value of a pseudo-input; None for any real number.

    Raises:
        ValueError: when `num_components` is below 1, or `data` has another shape or fewer rows, or lies outside `bounds`.

    References:
        VAE with a VampPrior, J. M. Tomczak and M. Welling, 2018, https://arxiv.org/abs/1705.07120.

    >>> from pyrovae import encoders
    >>> VampPrior(encoders.DiagonalNormal(4, 2), num_components=5)().log_prob(torch.zeros(7, 2)).shape
    torch.Size([7])
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_components: int = 500,
        data: Tensor | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ):
        super().__init__(encoder.latent_dim)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        shape = (num_components, *encoder.x_shape)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be a smaller and a larger number, got {bounds}.")
        self.num_components, self.bounds = num_components, bounds
        self.support, self.context_dim = encoder.support, getattr(encoder, "context_dim", 0)
        if data is None:
            raw = torch.randn(shape)
        elif data.shape[1:] != shape[1:] or len(data) < num_components:
            raise ValueError(f"data must have shape (at least {num_components}, *{shape[1:]}), got {tuple(data.shape)}.")
        else:
            raw = self._raw(data[:num_components].detach().clone())
        self.raw_inputs = nn.Parameter(raw)
        self.encoder = encoder
        if not self.context_dim:
            with torch.no_grad():
                q = encoder(self.pseudo_inputs()[:1])
            if isinstance(q, dist.Delta):
                raise ValueError("encoder gives points (Delta), of which no prior can be mixed. Give one with a density.")

    def _raw(self, data: Tensor) -> Tensor:
        if self.bounds is None:
            return data
        low, high = self.bounds
        if bool(((data < low) | (data > high)).any()):
            raise ValueError(
                f"data ranges from {data.min().item():g} to {data.max().item():g}, outside bounds={self.bounds}. Give the "
                "bounds of the data, or None."
            )
        # At the bounds themselves a sigmoid has no slope: pixels that are 0 or 1 start a hundredth inside.
        return ((data - low) / (high - low)).clamp(0.01, 0.99).logit()

    def pseudo_inputs(self) -> Tensor:
        """Returns the pseudo-inputs, shape ``(num_components, *x_shape)``."""
        if self.bounds is None:
            return self.raw_inputs
        low, high = self.bounds
        return low + (high - low) * self.raw_inputs.sigmoid()

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        inputs = self.pseudo_inputs()
        if self.context_dim:
            if context is None:
                raise ValueError("VampPrior: its encoder was built with a context, and so it needs one.")
            leading, inputs = context.shape[:-1], inputs.expand(*context.shape[:-1], *inputs.shape)
            context = context.unsqueeze(-2).expand(*leading, self.num_components, -1)
        q = self.encoder(inputs, context if self.context_dim else None)
        logits = self.raw_inputs.new_zeros(q.batch_shape)
        if isinstance(q, dist.MultivariateNormal):
            return NormalMixture(logits, q.loc, scale_tril=q.scale_tril)
        if isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):
            return NormalMixture(logits, q.base_dist.loc, q.base_dist.scale)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), q)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}, bounds={self.bounds}"


class ExemplarPrior(Prior):
    r"""A mixture of normals of one width around the encoder's means of the training data themselves.

    .. math:: p(z) = \frac{1}{N} \sum_{n=1}^N \mathcal{N}(z; \mu(x_n), \sigma^2 I)

    In training the context is the number of each datum in `data`, shape ``(batch,)``, and its own exemplar is left out
    (the mean is then over N - 1): ``fit(vae.model, vae.guide, (data, torch.arange(len(data))))``. Without a context none
    is left out. In training the sum runs over the exemplars nearest to the z of the batch, found among means that were
    kept from when they were last encoded, and encoded anew; leaving terms out makes it a lower bound. In evaluation mode
    it is exact, over all of them.

    Args:
        encoder: the encoder of the VAE, with a mean.
        data: the exemplars, shape ``(N, *x_shape)``. They are no part of what is saved: build the prior with the same
            ones before loading.
        num_neighbors: exemplars taken for each z in training.
        scale: :math:`\sigma` before training.

    Raises:
        ValueError: when `data` does not have the encoder's shape, `num_neighbors` is below 1, `scale` is not positive, or
            the numbers of the data are out of range.

    References:
        Exemplar VAE: Linking Generative Models, Nearest Neighbor Retrieval, and Data Augmentation, S. Norouzi,
        D. J. Fleet and M. Norouzi, 2020, https://arxiv.org/abs/2004.04795.

    >>> from pyrovae import encoders
    >>> ExemplarPrior(encoders.DiagonalNormal(4, 2), torch.rand(100, 4))().log_prob(torch.zeros(7, 2)).shape
    torch.Size([7])
    """

    def __init__(self, encoder: nn.Module, data: Tensor, num_neighbors: int = 10, scale: float = 0.5):
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}.")
        super().__init__(encoder.latent_dim, start=torch.tensor([math.log(scale)]))
        self.context_dim = 1
        if data.shape[1:] != encoder.x_shape or len(data) < 2:
            raise ValueError(f"data must have shape (at least 2, *{encoder.x_shape}), got {tuple(data.shape)}.")
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}.")
        if getattr(encoder, "context_dim", 0):
            raise ValueError("encoder takes a context, but exemplars are encoded without. Build it with context_dim=0.")
        if encoder.support is not constraints.real_vector:
            raise ValueError(f"ExemplarPrior is a mixture of normals, but the encoder's latents are {encoder.support}.")
        try:
            with torch.no_grad():
                encoder(data[:1]).mean  # noqa: B018
        except NotImplementedError as error:
            raise ValueError(f"{type(encoder).__name__} states no mean, which an ExemplarPrior needs.") from error
        self.num_neighbors, self.encoder = min(num_neighbors, len(data) - 1), encoder
        # No buffer: neither a checkpoint nor a file of weights is to hold the data.
        self.data = data.detach()
        self.register_buffer("means", torch.full((len(data), encoder.latent_dim), math.nan), persistent=False)
        self._encoded_with = None

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        left_out = None if context is None else self._numbers(context)
        if not self.training:
            weights = tuple((id(t), t._version, t.dtype) for t in [*self.encoder.parameters(), *self.encoder.buffers()])
            if weights != self._encoded_with:
                self._encode_all()
                self._encoded_with = weights
        elif bool(self.means[0, 0].isnan()):
            self._encode_all()
        nearest = partial(self._nearest, left_out) if self.training else None
        return latents.Exemplars(self.means, self.params.exp(), left_out, nearest)

    def _numbers(self, context: Tensor) -> Tensor:
        numbers = context.long().flatten()
        if bool((numbers != context.flatten()).any() | (numbers < 0).any() | (numbers >= len(self.data)).any()):
            raise ValueError(
                "the context of an ExemplarPrior is the number of each datum in its data, from 0 to "
                f"{len(self.data) - 1}, got values from {context.min().item():g} to {context.max().item():g}."
            )
        return numbers

    def _encode(self, numbers: Tensor) -> Tensor:
        return self.encoder(self.data[numbers.to(self.data.device)].to(self.params)).mean

    @torch.no_grad()
    def _encode_all(self) -> None:
        for rows in torch.arange(len(self.data)).split(1000):
            self.means[rows] = self._encode(rows)

    def _nearest(self, left_out: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers of the exemplars nearest to any row of z, and their means, encoded anew."""
        with torch.no_grad():
            half_squares = 0.5 * self.means.square().sum(-1)
            own = None if left_out is None else left_out.expand(z.shape[:-1]).flatten()
            rows = z.flatten(0, -2)
            found = [] if left_out is None else [left_out]
            for start in range(0, len(rows), 256):  # for memory
                closeness = torch.addmm(-half_squares, rows[start : start + 256], self.means.T)
                if own is not None:
                    closeness.scatter_(1, own[start : start + 256, None], -math.inf)
                found.append(closeness.topk(self.num_neighbors, sorted=False).indices.flatten())
            numbers = torch.cat(found).unique()
        means = self._encode(numbers)
        self.means[numbers] = means.detach()
        return numbers, means

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, num_exemplars={len(self.data)}, num_neighbors={self.num_neighbors}"


def spline_flow(features: int, context: int) -> nn.Module:
    """Returns zuko's neural spline flow with coupling, which draws and scores in two passes a transformation.

    References:
        Neural Spline Flows, C. Durkan, A. Bekasov, I. Murray and G. Papamakarios, 2019,
        https://arxiv.org/abs/1906.04032.
    """
    return latents.import_zuko().flows.NSF(features, context, transforms=3, passes=2)


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

    def __init__(
        self, latent_dim: int, flow: Callable[[int, int], nn.Module] = spline_flow, context_dim: int = 0
    ):
        super().__init__(latent_dim, context_dim=context_dim)
        self.flow = flow if isinstance(flow, nn.Module) else flow(latent_dim, context_dim)
        with torch.no_grad():
            event_shape = tuple(self.flow(torch.zeros(context_dim) if context_dim else None).event_shape)
        if event_shape != (latent_dim,):
            raise ValueError(f"flow must be one of ({latent_dim},) numbers, but its events have shape {event_shape}.")
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        if self.context_dim and context is None:
            raise ValueError(f"FlowPrior was built with context_dim={self.context_dim} and needs a context.")
        return latents.Flow(self.flow(context if self.context_dim else None), self.zero, self.zero + 1)


class HypersphericalUniform(Prior):
    r"""The uniform prior on the unit sphere, for von Mises-Fisher encoders.

    .. math:: p(z) = \frac{\Gamma(m / 2)}{2 \pi^{m / 2}}, \qquad \lVert z \rVert = 1

    Args:
        latent_dim: dimension m of the space that the sphere is in, at least 2.

    Raises:
        ValueError: when `latent_dim` is below 2.

    References:
        Hyperspherical Variational Auto-Encoders, T. R. Davidson, L. Falorsi, N. De Cao, T. Kipf and J. M. Tomczak, 2018,
        https://arxiv.org/abs/1804.00891.

    >>> HypersphericalUniform(2)().log_prob(torch.tensor([1.0, 0.0]))  # -log(2 pi)
    tensor(-1.8379)
    """

    support = constraints.sphere

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        if latent_dim < 2:
            raise ValueError(f"latent_dim must be at least 2, a sphere's, got {latent_dim}.")
        self.register_buffer("like", torch.zeros(latent_dim), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return latents.HypersphericalUniform(self.like)


class Categorical(Prior):
    r"""Independent classes as integers, with learned probabilities.

    .. math:: p(z) = \prod_d \pi_{d, z_d}, \qquad z_d \in \{0, \dots, K - 1\}

    The decoder then takes integers: ``network=functools.partial(nn.OneHotInput, num_classes=K)``.

    Args:
        latent_dim: number of latent variables.
        num_classes: :math:`K`, at least 2.
        network: what maps a context to the logits, a module or a callable that builds one from
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
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim * num_classes))
        self.num_classes, self.support = num_classes, latents.integers(num_classes)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(context).unflatten(-1, (self.latent_dim, self.num_classes))
        return dist.Categorical(logits=logits).to_event(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class OneHotCategorical(Prior):
    r"""One-hot vectors, one beside the other, with learned probabilities.

    .. math:: p(z) = \prod_{m=1}^M \prod_{k=1}^K \pi_{mk}^{z_{mk}}, \qquad M K = \mathrm{latent\_dim}

    Args:
        latent_dim: number of latent dimensions.
        num_classes: length :math:`K` of each one-hot vector, a divisor of `latent_dim`; None for one vector of all.
        network: what maps a context to the logits, a module or a callable that builds one from
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

    def __init__(
        self, latent_dim: int, num_classes: int | None = None, network: Network = MLP, context_dim: int = 0
    ):
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim))
        self.blocks = one_hot_blocks(latent_dim, num_classes)
        self.support = latents.blocks_of(constraints.one_hot, self.blocks)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(context).unflatten(-1, self.blocks)
        return latents.Flattened(dist.OneHotCategorical(logits=logits).to_event(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.blocks[1]}"


class RelaxedOneHotCategorical(Prior):
    r"""Relaxed one-hot vectors (points of the simplex), one beside the other, with learned probabilities.

    .. math:: z_m = \mathrm{softmax}\left(\frac{\log \pi_m + g_m}{\tau}\right), \qquad g_{mk} \sim \mathrm{Gumbel}

    Args:
        latent_dim: number of latent dimensions.
        num_classes: length :math:`K` of each vector, a divisor of `latent_dim`; None for one vector of all.
        temperature: :math:`\tau`, positive; the lower, the nearer to one-hot.
        network: what maps a context to the logits, a module or a callable that builds one from
            ``(context_dim, latent_dim)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2 or does not divide `latent_dim`, or `temperature` is not positive.

    References:
        The Concrete Distribution, C. J. Maddison, A. Mnih and Y. W. Teh, 2017, https://arxiv.org/abs/1611.00712.

    >>> RelaxedOneHotCategorical(3)().sample().sum()
    tensor(1.0000)
    """

    def __init__(
        self,
        latent_dim: int,
        num_classes: int | None = None,
        temperature: float = 0.5,
        network: Network = MLP,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim))
        self.blocks = one_hot_blocks(latent_dim, num_classes)
        self.support = latents.blocks_of(constraints.simplex, self.blocks)
        self.register_buffer("temperature", torch.tensor(check_temperature(temperature)))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(context).unflatten(-1, self.blocks)
        relaxed = latents.RelaxedOneHotCategorical(self.temperature, logits=logits)
        return latents.Flattened(relaxed.to_event(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_classes={self.blocks[1]}, temperature={self.temperature.item():g}"


class LogisticNormal(Prior):
    r"""A logistic normal prior on the simplex, for topics: the softmax of a normal vector and a zero.

    .. math:: z = \mathrm{softmax}(y_1, \dots, y_{K-1}, 0), \quad y \sim \mathcal{N}(\mu, \mathrm{diag}\,\sigma^2)

    Args:
        latent_dim: number of topics :math:`K`, at least 2.
        network: what maps a context to the parameters, a module or a callable that builds one from
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
        return latents.LogisticNormal(loc, positive(raw))


class Dirichlet(Prior):
    r"""A Dirichlet prior on the simplex with learned concentrations, for topics.

    .. math:: p(z) = \frac{\Gamma(\sum_k \alpha_k)}{\prod_k \Gamma(\alpha_k)} \prod_{k=1}^K z_k^{\alpha_k - 1}

    Args:
        latent_dim: number of topics :math:`K`, at least 2.
        concentration: every :math:`\alpha_k` before training, positive; below one it favours few topics at a time.
        network: what maps a context to the parameters, a module or a callable that builds one from
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

    def __init__(
        self, latent_dim: int, concentration: float = 1.0, network: Network = MLP, context_dim: int = 0
    ):
        check_simplex(latent_dim)
        super().__init__(latent_dim, network, context_dim, start=torch.zeros(latent_dim))
        if not 0 < concentration < math.inf:
            raise ValueError(f"concentration must be positive and finite, got {concentration}.")
        self.concentration = concentration

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Dirichlet(self.concentration * positive(self.parameters_of(context)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, concentration={self.concentration}"


class ResampledPrior(Prior):
    r"""The standard normal, reshaped by rejection with a learned acceptance probability (LARS).

    .. math:: p(z) = \mathcal{N}(z; 0, I) \left( \frac{a(z)}{Z} \left(1 - (1 - Z)^{T-1}\right) + (1 - Z)^{T-1} \right),
        \qquad Z = \mathrm{E}\, a(z), \quad a(z) = \sigma(\mathrm{network}(z))

    In training Z is estimated anew in each step, from `num_samples` draws; in evaluation mode from 16,384 points of a
    Sobol sequence, always the same, so that log p(z) is a fixed function. The density is normalised as well as they know
    Z: its logarithm is off by about :math:`s / (128 Z)` nats or less, where s is the standard deviation of a(z).

    Args:
        latent_dim: number of latent dimensions.
        network: the logit of the acceptance probability, a module or a callable that builds one from
            ``(latent_dim, 1)``.
        tries: T, the draw that is kept whatever its acceptance probability, at least 1.
        num_samples: draws for Z in training, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `tries` or `num_samples` is below 1.

    References:
        Resampled Priors for Variational Autoencoders, M. Bauer and A. Mnih, 2019, https://arxiv.org/abs/1810.11428.

    >>> ResampledPrior(3)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

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
        if self.context_dim and context is None:
            raise ValueError(f"ResampledPrior was built with context_dim={self.context_dim} and needs a context.")
        context = context if self.context_dim else None
        base = dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
        points = base.sample((self.num_samples,)) if self.training else self.points
        if context is not None:
            base = base.expand(context.shape[:-1])
            points = points.reshape(len(points), *[1] * (context.dim() - 1), -1).expand(-1, *context.shape[:-1], -1)
        accept = partial(self._log_acceptance, context)
        return latents.Resampled(base, accept, accept(points).logsumexp(0) - math.log(len(points)), self.tries)

    def _log_acceptance(self, context: Tensor | None, z: Tensor) -> Tensor:
        return logsigmoid(apply(self.network, z, context, (1,), "ResampledPrior").squeeze(-1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tries={self.tries}, num_samples={self.num_samples}"


def _normal_points(latent_dim: int) -> Tensor:
    sobol = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=0)
    return torch.special.ndtri(sobol.draw(2**14, dtype=torch.float64).clamp(1e-10, 1 - 1e-10)).float()


def squared_exponential(distance: Tensor) -> Tensor:
    r"""The squared-exponential kernel, :math:`\exp(-r^2 / 2)`: very smooth."""
    return (-0.5 * distance.square()).exp()


def matern_32(distance: Tensor) -> Tensor:
    r"""The Matern kernel of smoothness 3/2, :math:`(1 + \sqrt3 r) \exp(-\sqrt3 r)`: once differentiable paths."""
    r = math.sqrt(3) * distance
    return (1 + r) * (-r).exp()


def matern_52(distance: Tensor) -> Tensor:
    r"""The Matern kernel of smoothness 5/2, :math:`(1 + \sqrt5 r + 5 r^2 / 3) \exp(-\sqrt5 r)`: twice."""
    r = math.sqrt(5) * distance
    return (1 + r + r.square() / 3) * (-r).exp()


def cauchy(distance: Tensor) -> Tensor:
    r"""The Cauchy (rational quadratic) kernel, :math:`1 / (1 + r^2)`: many length scales at once."""
    return 1 / (1 + distance.square())


class GaussianProcess(Prior):
    r"""Gaussian processes over a known coordinate, times for example: a prior for sequences.

    .. math:: z_p = (z_p(t_1), \dots, z_p(t_T)) \sim \mathcal{N}(0, K_p), \qquad
        K_p(t, t') = (1 - s)\, k(|t - t'| / l_p) + s\, [t = t']

    The latents of a datum are :math:`P = \mathrm{latent\_dim} / T` independent processes at T times, one process after
    the other: ``z.unflatten(-1, (P, T))``. The context holds the times of each datum; without one they are
    0, 1, ..., T - 1. The variance is one, as a decoder may scale its input.

    Args:
        latent_dim: number of latent dimensions, a multiple of `num_times`.
        num_times: :math:`T`, at least 1.
        length_scale: :math:`l_p` before training, in units of the times; each process learns its own.
        kernel: :math:`k`, a function of the distance in length scales, with k(0) = 1: `squared_exponential`,
            `matern_32`, `matern_52` or `cauchy`, of :mod:`pyrovae.priors`, or another.
        noise: :math:`s`, the share of the variance that is not smooth, in (0, 1).

    Raises:
        ValueError: when `num_times` does not divide `latent_dim`, or `length_scale` or `noise` is out of range, or the
            times are not T for each datum.

    References:
        Gaussian Process Prior Variational Autoencoders, F. P. Casale, A. Dalca, L. Saglietti, J. Listgarten and
        N. Fusi, 2018, https://arxiv.org/abs/1810.11738; GP-VAE: Deep Probabilistic Time Series Imputation, V. Fortuin,
        D. Baranchuk, G. Raetsch and S. Mandt, 2020, https://arxiv.org/abs/1907.04155.

    >>> GaussianProcess(10, num_times=5)(torch.rand(7, 5)).sample().shape
    torch.Size([7, 10])
    """

    def __init__(
        self,
        latent_dim: int,
        num_times: int,
        length_scale: float = 1.0,
        kernel: Callable[[Tensor], Tensor] = squared_exponential,
        noise: float = 1e-3,
    ):
        if num_times < 1 or latent_dim % num_times:
            raise ValueError(f"num_times must divide latent_dim={latent_dim}, got {num_times}.")
        if not 0 < length_scale < math.inf:
            raise ValueError(f"length_scale must be positive and finite, got {length_scale}.")
        if not 0 < noise < 1:
            raise ValueError(f"noise must be between 0 and 1, got {noise}.")
        start = torch.full((latent_dim // num_times,), math.log(length_scale))
        super().__init__(latent_dim, start=start)
        self.num_times, self.kernel, self.noise, self.context_dim = num_times, kernel, noise, num_times
        self.register_buffer("times", torch.arange(num_times, dtype=torch.get_default_dtype()), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        times = self.times if context is None else context.to(self.times)
        if times.shape[-1:] != (self.num_times,):
            raise ValueError(f"context must hold {self.num_times} times a datum, got shape {tuple(times.shape)}.")
        distance = (times.unsqueeze(-1) - times.unsqueeze(-2)).abs().unsqueeze(-3)
        smooth = self.kernel(distance / self.params.exp().reshape(-1, 1, 1))
        eye = torch.eye(self.num_times, dtype=smooth.dtype, device=smooth.device)
        scale_tril = torch.linalg.cholesky((1 - self.noise) * smooth + self.noise * eye)
        processes = dist.MultivariateNormal(times.new_zeros(scale_tril.shape[:-1]), scale_tril=scale_tril)
        return latents.Flattened(processes.to_event(1))

    def extra_repr(self) -> str:
        kernel = getattr(self.kernel, "__name__", repr(self.kernel))
        return f"latent_dim={self.latent_dim}, num_times={self.num_times}, kernel={kernel}, noise={self.noise:g}"
