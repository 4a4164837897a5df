"""Distributions over latents that neither torch nor Pyro has, each a Pyro distribution like any other."""

import math
from collections.abc import Callable

import numpy as np
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import normalize, softplus
from torch.special import ndtr

__all__ = [
    "Exemplars",
    "Flattened",
    "Flow",
    "HypersphericalUniform",
    "LogisticNormal",
    "NormalMixture",
    "RelaxedOneHotCategorical",
    "ReparameterizedMixture",
    "Resampled",
    "StratifiedCategorical",
    "VonMisesFisher",
    "flattened",
    "import_zuko",
    "log_0f1",
    "positive",
    "tril_of",
]

_ONE = math.log(math.e - 1)  # softplus(_ONE) = 1
_FLOOR = 1e-6  # a smaller scale beside a prior of scale one is lost to float32 rounding


def positive(raw: Tensor) -> Tensor:
    """Maps any number to a positive one, zero to one, so that untrained scales start at one.

    >>> positive(torch.zeros(1))
    tensor([1.0000])
    """
    return softplus(raw + _ONE) + _FLOOR


def tril_of(raw: Tensor) -> Tensor:
    """Returns lower triangular matrices with a positive diagonal from d (d + 1) / 2 numbers each.

    The first d numbers are the diagonal before :func:`positive`, the others the strict lower triangle row by row.

    >>> tril_of(torch.tensor([0.0, 0.0, 5.0]))
    tensor([[1.0000, 0.0000],
            [5.0000, 1.0000]])
    """
    d = (math.isqrt(8 * raw.shape[-1] + 1) - 1) // 2
    rows, cols = torch.tril_indices(d, d, offset=-1, device=raw.device)
    lower = raw[..., d:]
    # Scatter, not assignment: the matrix keeps its gradient and any number of leading dimensions.
    flat = torch.diag_embed(positive(raw[..., :d])).flatten(-2)
    return flat.scatter(-1, (rows * d + cols).expand(lower.shape), lower).unflatten(-1, (d, d))


class NormalMixture(dist.TorchDistribution):
    r"""A mixture of normals, scored by matrix products: no tensor over particles, data, components and dimensions.

    .. math:: p(z) = \sum_c \pi_c\, \mathcal{N}(z; \mu_c, \Sigma_c), \qquad
        \log \mathcal{N}(z; \mu_c, \Sigma_c) = -\tfrac12 \mathrm{vec}(\Sigma_c^{-1})^\top \mathrm{vec}(z z^\top)
        + (\Sigma_c^{-1} \mu_c)^\top z + \mathrm{const}_c

    so that one product of a matrix of features of z with one of components gives the log-densities of all of them. The
    terms cancel where components are narrow and far apart, and so the product is taken in double precision: what is
    lost is less than what z lost when it was rounded to single. Expanding copies no parameter.

    Args:
        logits: log weights, normalised or not, shape ``(*batch, components)``.
        loc: means, shape ``(*batch, components, d)``.
        scale: standard deviations, shape ``(*batch, components, d)``, or None.
        scale_tril: Cholesky factors of covariances, shape ``(*batch, components, d, d)``, or ``(*batch, 1, d, d)`` for
            one that all components share; instead of `scale`.

    >>> p = NormalMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
    >>> p.log_prob(torch.zeros(1))
    tensor(-1.4189)
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor | None = None, *, scale_tril: Tensor | None = None):
        self.logits, self.loc, self.scale, self.scale_tril = logits.log_softmax(-1), loc, scale, scale_tril
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(NormalMixture, _instance)
        new.logits, new.loc, new.scale, new.scale_tril = self.logits, self.loc, self.scale, self.scale_tril
        super(NormalMixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def component_log_prob(self, z: Tensor) -> Tensor:
        r"""Returns :math:`\log \mathcal{N}(z; \mu_c, \Sigma_c)` of all components, shape ``(*leading, components)``."""
        dtype, center = z.dtype, self.loc.detach().double().mean(-2)
        z, loc = z - center, self.loc - center.unsqueeze(-2)
        constant = -0.5 * z.shape[-1] * math.log(2 * math.pi)
        if self.scale is not None:
            scale = self.scale.double()
            precision = scale.reciprocal().square()
            weights = torch.cat([-0.5 * precision, precision * loc], dim=-1)
            constant = constant - scale.log().sum(-1) - 0.5 * (precision * loc.square()).sum(-1)
            return (_rows_by_components(torch.cat([z.square(), z], dim=-1), weights) + constant).to(dtype)
        scale_tril = self.scale_tril.double()
        constant = constant - scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        inverse = torch.linalg.solve_triangular(scale_tril, eye, upper=False)
        if scale_tril.shape[-3] == 1:  # shared: whiten both sides, and components differ in a product alone
            inverse = inverse.squeeze(-3)
            z, loc = _rows_by_components(z, inverse), loc @ inverse.mT
            constant = constant - 0.5 * loc.square().sum(-1)
            return (_rows_by_components(z, loc) - 0.5 * z.square().sum(-1, keepdim=True) + constant).to(dtype)
        precision = inverse.mT @ inverse
        linear = (precision @ loc.unsqueeze(-1)).squeeze(-1)
        rows, cols = torch.tril_indices(z.shape[-1], z.shape[-1], device=z.device)
        # Off the diagonal each product stands for two entries of the symmetric matrix.
        quadratic = precision[..., rows, cols] * torch.where(rows == cols, -0.5, -1.0).to(z.dtype)
        constant = constant - 0.5 * (linear * loc).sum(-1)
        squares = _rows_by_components(_LowerProducts.apply(z, rows, cols), quadratic)
        return (squares + _rows_by_components(z, linear) + constant).to(dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        return (self.component_log_prob(value) + self.logits).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape=torch.Size()) -> Tensor:
        logits = self.logits.expand(self.batch_shape + self.logits.shape[-1:])
        which = dist.Categorical(logits=logits).sample(sample_shape)

        def pick(t: Tensor, event_dims: int) -> Tensor:
            """Takes each draw's component; expanding and gathering copy no more than what is taken."""
            event = t.shape[t.dim() - event_dims :]
            t = t.expand(*which.shape, self.logits.shape[-1], *event)
            index = which.reshape(*which.shape, *[1] * (event_dims + 1)).expand(*which.shape, 1, *event)
            return t.gather(which.dim(), index).squeeze(which.dim())

        noise = torch.randn(which.shape + self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
        if self.scale is not None:
            return pick(self.loc, 1) + pick(self.scale, 1) * noise
        return pick(self.loc, 1) + (pick(self.scale_tril, 2) @ noise.unsqueeze(-1)).squeeze(-1)

    @property
    def mean(self) -> Tensor:
        return self._average(self.loc)

    @property
    def variance(self) -> Tensor:
        variances = self.scale.square() if self.scale is not None else self.scale_tril.square().sum(-1)
        return self._average(variances + self.loc.square()) - self.mean.square()

    def _average(self, t: Tensor) -> Tensor:
        return (self.logits.exp().unsqueeze(-1) * t).sum(-2).expand(self.batch_shape + self.event_shape)


class _LowerProducts(torch.autograd.Function):
    """The products z_i z_j for given i and j; keeps z for the gradient, where autograd would keep both factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return z[..., rows].mul_(z[..., cols])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        z, rows, cols = ctx.saved_tensors
        by_z = torch.zeros_like(z).index_add_(-1, rows, grad * z[..., cols])
        return by_z.index_add_(-1, cols, grad.mul(z[..., rows])), None, None


def _rows_by_components(features: Tensor, weights: Tensor) -> Tensor:
    """Returns products of features ``(*samples, *batch, n)`` with weights ``(*batch, components, n)`` as one matmul.

    Samples become the rows of a matrix beside each batch's components, so that nothing is copied for each of them.
    """
    samples = features.shape[: features.dim() - weights.dim() + 1]
    rows = features.reshape(samples.numel(), *features.shape[len(samples) :]).movedim(0, -2)
    return (rows @ weights.mT).movedim(-2, 0).unflatten(0, samples) if samples else (rows @ weights.mT).squeeze(-2)


class Flattened(dist.TorchDistribution):
    """A distribution whose event dimensions are made one, as the latents of a VAE have only one.

    Args:
        base_dist: any distribution with events of at least one dimension.

    >>> Flattened(dist.OneHotCategorical(torch.ones(3, 4)).to_event(1)).sample().shape
    torch.Size([12])
    """

    arg_constraints = {}

    def __init__(self, base_dist: dist.TorchDistribution):
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, torch.Size([base_dist.event_shape.numel()]), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.base_dist.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        return blocks_of(self.base_dist.support, self.base_dist.event_shape)

    def expand(self, batch_shape, _instance=None):
        return Flattened(self.base_dist.expand(batch_shape))

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        return self._flat(self.base_dist.sample(sample_shape))

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        return self._flat(self.base_dist.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value.unflatten(-1, self.base_dist.event_shape))

    @property
    def mean(self) -> Tensor:
        return self._flat(self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        return self._flat(self.base_dist.variance)

    def _flat(self, value: Tensor) -> Tensor:
        return value.flatten(value.dim() - len(self.base_dist.event_shape))


class flattened(constraints.Constraint):
    """The support of a :class:`Flattened` distribution: a constraint on vectors that are read in another shape.

    Args:
        base_constraint: the constraint in that shape.
        event_shape: the shape.

    >>> flattened(constraints.one_hot, (2, 2)).check(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    tensor(True)
    """

    event_dim = 1

    def __init__(self, base_constraint: constraints.Constraint, event_shape: tuple[int, ...]):
        self.base_constraint, self.event_shape = base_constraint, tuple(event_shape)
        self.is_discrete = base_constraint.is_discrete

    def check(self, value: Tensor) -> Tensor:
        inside = self.base_constraint.check(value.unflatten(-1, self.event_shape))
        over = len(self.event_shape) - self.base_constraint.event_dim
        return inside.flatten(inside.dim() - over).all(-1) if over else inside

    def __repr__(self) -> str:
        return f"Flattened({self.base_constraint}, {self.event_shape})"


class LogisticNormal(dist.TransformedDistribution):
    r"""The logistic normal distribution on the simplex: the softmax of a normal vector and a zero.

    .. math:: z = \mathrm{softmax}(y_1, \dots, y_{K-1}, 0), \quad y \sim \mathcal{N}(\mu, \mathrm{diag}\,\sigma^2),
        \qquad \log p(z) = \log \mathcal{N}(y; \mu, \sigma^2) - \sum_{k=1}^K \log z_k

    The density is one of the first K - 1 coordinates, as a Dirichlet's. Torch's distribution of this name breaks a
    stick instead, so that its parts are not alike.

    Args:
        loc: :math:`\mu`, shape ``(*batch, K - 1)``.
        scale: :math:`\sigma`, of the same shape.

    References:
        Logistic-Normal Distributions: Some Properties and Uses, J. Aitchison and S. M. Shen, 1980,
        https://doi.org/10.1093/biomet/67.2.261.

    >>> LogisticNormal(torch.zeros(2), torch.ones(2)).sample().shape
    torch.Size([3])
    """

    arg_constraints = {"loc": constraints.real_vector, "scale": constraints.independent(constraints.positive, 1)}
    support = constraints.simplex
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.loc, self.scale = loc, scale
        super().__init__(dist.Normal(loc, scale).to_event(1), _AdditiveLogistic(), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        event = self.loc.shape[-1:]
        batch_shape = torch.Size(batch_shape)
        return LogisticNormal(self.loc.expand(batch_shape + event), self.scale.expand(batch_shape + event))

    @property
    def mean(self) -> Tensor:
        """The softmax of the mean of y, which is near the mean; that has no closed form."""
        return _AdditiveLogistic()(self.loc)


class _AdditiveLogistic(torch.distributions.Transform):
    domain, codomain = constraints.real_vector, constraints.simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _AdditiveLogistic)

    def _call(self, y: Tensor) -> Tensor:
        z = torch.cat([y, torch.zeros_like(y[..., :1])], dim=-1).softmax(-1)
        return z.clamp_min(torch.finfo(z.dtype).tiny)  # a zero has no logarithm

    def _inverse(self, z: Tensor) -> Tensor:
        return z[..., :-1].log() - z[..., -1:].log()

    def log_abs_det_jacobian(self, y: Tensor, z: Tensor) -> Tensor:
        return z.log().sum(-1)

    def forward_shape(self, shape):
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape):
        return torch.Size([*shape[:-1], shape[-1] - 1])


class RelaxedOneHotCategorical(dist.RelaxedOneHotCategorical):
    """Pyro's relaxed one-hot distribution, its draws kept inside the simplex.

    At low temperatures a draw's small entries fall below the smallest number of its type, and zero has no logarithm;
    and rounding leaves sums that differ from one.

    >>> p = RelaxedOneHotCategorical(torch.tensor(0.1), logits=torch.tensor([100.0, 0.0, -100.0]))
    >>> bool(p.log_prob(p.rsample()).isfinite())
    True
    """

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        z = super().rsample(sample_shape)
        z = z.clamp_min(torch.finfo(z.dtype).tiny)
        return z / z.sum(-1, keepdim=True)


class HypersphericalUniform(dist.TorchDistribution):
    r"""The uniform distribution on the unit sphere in m dimensions.

    .. math:: p(z) = \frac{\Gamma(m / 2)}{2 \pi^{m / 2}}, \qquad \lVert z \rVert = 1

    Args:
        like: a tensor of shape ``(m,)`` that says dimension, device and dtype.

    >>> HypersphericalUniform(torch.empty(3)).log_prob(torch.tensor([0.0, 0.0, 1.0]))  # the area is 4 pi
    tensor(-2.5310)
    """

    arg_constraints = {}
    support = constraints.sphere

    def __init__(self, like: Tensor, batch_shape: torch.Size = torch.Size()):
        self.like = like
        super().__init__(torch.Size(batch_shape), like.shape)

    def expand(self, batch_shape, _instance=None):
        return HypersphericalUniform(self.like, batch_shape)

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        return normalize(self.like.new_empty(self._extended_shape(sample_shape)).normal_(), dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.like.new_full(shape, -_log_area(self.event_shape[0]))

    @property
    def mean(self) -> Tensor:
        return self.like.new_zeros(self.batch_shape + self.event_shape)


class VonMisesFisher(dist.TorchDistribution):
    r"""The von Mises-Fisher distribution on the unit sphere in any dimension m of at least 2, reparameterised.

    .. math:: p(z) = \frac{\exp(\kappa\, \mu^\top z)}{A_m\; {}_0F_1(; m/2; \kappa^2/4)}, \qquad
        A_m = \frac{2 \pi^{m/2}}{\Gamma(m/2)}

    which is the usual form with a Bessel function, but has no division by zero at :math:`\kappa = 0`. The height
    :math:`w = \mu^\top z` is drawn by Wood's rejection; its derivative by :math:`\kappa` is
    :math:`-\partial_\kappa F(w; \kappa) / f(w; \kappa)`, by quadrature, so that gradients are unbiased: those through
    the accepted proposal alone, as in Davidson et al., are not.

    Args:
        loc: mean direction :math:`\mu`, of unit length, shape ``(*batch, m)``.
        concentration: :math:`\kappa \ge 0`, shape ``(*batch,)``.

    References:
        Hyperspherical Variational Auto-Encoders, T. R. Davidson, L. Falorsi, N. De Cao, T. Kipf and J. M. Tomczak,
        2018, https://arxiv.org/abs/1804.00891; Simulation of the von Mises Fisher Distribution, A. T. A. Wood, 1994,
        https://doi.org/10.1080/03610919408813161; Implicit Reparameterization Gradients, M. Figurnov, S. Mohamed and
        A. Mnih, 2018, https://arxiv.org/abs/1805.08498.

    >>> p = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(5.0))
    >>> p.log_prob(torch.tensor([0.0, 0.0, 1.0]))  # log(kappa / (2 pi (1 - exp(-2 kappa))))
    tensor(-0.2284)
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None):
        if loc.shape[-1] < 2:
            raise ValueError(f"loc must have at least 2 dimensions, a sphere's, got shape {tuple(loc.shape)}.")
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc = loc.expand(*batch_shape, loc.shape[-1])
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        batch_shape = torch.Size(batch_shape)
        loc, concentration = self.loc.expand(batch_shape + self.event_shape), self.concentration.expand(batch_shape)
        return VonMisesFisher(loc, concentration, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        m = self.event_shape[0]
        return self.concentration * (self.loc * value).sum(-1) - log_0f1(m / 2, self.concentration) - _log_area(m)

    @property
    def mean(self) -> Tensor:
        return self._mean_height().unsqueeze(-1) * self.loc

    def _mean_height(self) -> Tensor:
        m, kappa = self.event_shape[0], self.concentration
        return kappa / m * (log_0f1(m / 2 + 1, kappa) - log_0f1(m / 2, kappa)).exp()

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        kappa = self.concentration.expand(shape[:-1]).double()
        with torch.no_grad():
            height = _vmf_heights(kappa, shape[-1])
        if self.concentration.requires_grad and torch.is_grad_enabled():
            slope = _vmf_slopes(height, kappa.detach(), self._mean_height().detach().double(), shape[-1])
            height = height + slope * (kappa - kappa.detach())
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        # A direction in the tangent plane at the mean, uniform whatever the mean: differentiable in it.
        tangent = normalize(noise - (noise * self.loc).sum(-1, keepdim=True) * self.loc, dim=-1)
        radius = (1 - height.square()).clamp_min(torch.finfo(height.dtype).tiny).sqrt()
        height, radius = height.to(noise.dtype).unsqueeze(-1), radius.to(noise.dtype).unsqueeze(-1)
        return normalize(height * self.loc + radius * tangent, dim=-1)  # of length one but for rounding


def log_0f1(b: float, kappa: Tensor) -> Tensor:
    r"""Returns :math:`\log {}_0F_1(; b; \kappa^2 / 4)` for b of at least 1, differentiable, in the precision of kappa.

    .. math:: {}_0F_1(; b; \kappa^2/4) = \sum_{j \ge 0} \frac{(\kappa^2/4)^j}{j!\, (b)_j}
        = \Gamma(b) \left(\frac{2}{\kappa}\right)^{b - 1} I_{b - 1}(\kappa)

    The series up to :math:`\kappa = 30`, and above it the uniform asymptotic expansion of the Bessel function I in
    orders of :math:`1 / \sqrt{(b-1)^2 + \kappa^2}`, whose error is below 2e-8 there.

    References:
        NIST Handbook of Mathematical Functions, F. W. J. Olver et al., 2010, https://dlmf.nist.gov/10.41.

    >>> log_0f1(1.5, torch.tensor(2.0))  # log(sinh(2) / 2)
    tensor(0.5952)
    """
    dtype, kappa, order = kappa.dtype, kappa.double(), b - 1
    small, large = kappa.clamp(1e-70, 30), kappa.clamp_min(30)
    # The largest term is at j < 15, the last below e^-200.
    j = torch.arange(100, dtype=torch.float64, device=kappa.device)
    terms = 2 * j * (small / 2).log().unsqueeze(-1) - torch.lgamma(j + 1) - torch.lgamma(j + b) + math.lgamma(b)
    series = terms.logsumexp(-1)
    r = (large.square() + order**2).sqrt()
    q = order**2 / r.square()
    expansion = (
        1
        + (3 - 5 * q) / (24 * r)
        + (81 - 462 * q + 385 * q**2) / (1152 * r**2)
        + (30375 - 369603 * q + 765765 * q**2 - 425425 * q**3) / (414720 * r**3)
        + (4465125 - 94121676 * q + 349922430 * q**2 - 446185740 * q**3 + 185910725 * q**4) / (39813120 * r**4)
    )
    log_bessel = r + order * (large / (order + r)).log() - 0.5 * (2 * math.pi * r).log() + expansion.log()
    asymptotic = log_bessel - order * (large / 2).log() + math.lgamma(b)
    return torch.where(kappa > 30, asymptotic, series).to(dtype)


def _log_area(m: int) -> float:
    return math.log(2) + m / 2 * math.log(math.pi) - math.lgamma(m / 2)


def _vmf_heights(kappa: Tensor, m: int) -> Tensor:
    """Draws heights with density proportional to exp(kappa w) (1 - w^2)^((m - 3) / 2), by Wood's rejection."""
    b = (m - 1) / (2 * kappa + (4 * kappa.square() + (m - 1) ** 2).sqrt())
    x = (1 - b) / (1 + b)
    # log(1 - x^2) without cancellation.
    c = kappa * x + (m - 1) * (4 * b / (1 + b).square()).log()
    half = torch.full_like(kappa, (m - 1) / 2)
    height, todo = torch.zeros_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    while bool(todo.any()):
        beta = torch.distributions.Beta(half, half, validate_args=False).sample()
        w = (1 - (1 + b) * beta) / (1 - (1 - b) * beta)
        accepted = kappa * w + (m - 1) * (1 - x * w).log() - c >= torch.rand_like(kappa).log()
        height = torch.where(todo & accepted, w, height)
        todo = todo & ~accepted
    return height


@torch.no_grad()
def _vmf_slopes(height: Tensor, kappa: Tensor, mean: Tensor, m: int) -> Tensor:
    r"""Returns the derivative of a height by kappa at fixed probability below it.

    With :math:`t = \cos\theta`, :math:`\partial_\kappa F(w) = \int_{t < w} (t - \mathrm{E}\, t) f(t)\, dt`. The
    integrand has one sign on either side of the mean and integrates to zero over all, so the side is taken where
    nothing cancels, as far as twelve standard deviations.
    """
    nodes, weights = (torch.from_numpy(a).to(height) for a in np.polynomial.legendre.leggauss(48))
    angle = height.clamp(-1, 1).acos()
    reach = 12 / torch.maximum(kappa, torch.full_like(kappa, m - 2)).clamp_min(1e-2).sqrt()
    below = height < mean
    far = torch.where(below, (angle + reach).clamp_max(math.pi), (angle - reach).clamp_min(0))
    half = (far - angle).unsqueeze(-1) / 2
    theta = angle.unsqueeze(-1) + half * (nodes + 1)
    t, w = theta.cos(), height.unsqueeze(-1)
    sines = theta.sin().clamp_min(1e-300).log() - angle.sin().clamp_min(1e-300).log().unsqueeze(-1)
    ratio = (kappa.unsqueeze(-1) * (t - w) + (m - 2) * sines).exp()
    integral = (weights * half * (t - mean.unsqueeze(-1)) * ratio).sum(-1)
    # Below the mean: minus the integral from the angle to pi. Above: the same of the other side, where half < 0.
    return -integral * angle.sin()


class Resampled(dist.TorchDistribution):
    r"""Rejection sampling with a learned acceptance probability, given up after a number of tries.

    .. math:: p(z) = \pi(z) \left( \frac{a(z)}{Z} \left(1 - (1 - Z)^{T-1}\right) + (1 - Z)^{T-1} \right),
        \qquad Z = \mathrm{E}_{\pi}[a(z)]

    Args:
        base_dist: the proposal :math:`\pi`.
        log_acceptance: returns :math:`\log a(z)` for z of shape ``(*leading, d)``.
        log_normalizer: :math:`\log Z`, of the proposal's batch shape.
        tries: T, at least 1; the last one is kept whatever comes.

    >>> proposal = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    >>> p = Resampled(proposal, lambda z: torch.zeros(z.shape[:-1]), torch.tensor(0.0), tries=5)
    >>> p.log_prob(torch.zeros(1))  # all are accepted
    tensor(-0.9189)
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(
        self,
        base_dist: dist.TorchDistribution,
        log_acceptance: Callable[[Tensor], Tensor],
        log_normalizer: Tensor,
        tries: int,
    ):
        self.base_dist, self.log_acceptance = base_dist, log_acceptance
        self.log_normalizer, self.tries = log_normalizer, tries
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Resampled(self.base_dist.expand(batch_shape), self.log_acceptance, self.log_normalizer, self.tries)

    def log_prob(self, value: Tensor) -> Tensor:
        z = self.log_normalizer.exp().clamp(max=1 - torch.finfo(value.dtype).eps)
        given_up = (self.tries - 1) * torch.log1p(-z)
        accepted = self.log_acceptance(value) - self.log_normalizer + torch.log(-torch.expm1(given_up))
        return self.base_dist.log_prob(value) + torch.logaddexp(accepted, given_up)

    @torch.no_grad()
    def sample(self, sample_shape=torch.Size()) -> Tensor:
        value = self.base_dist.sample(sample_shape)
        todo = torch.ones(value.shape[:-1], dtype=torch.bool, device=value.device)
        for _ in range(self.tries - 1):
            todo = todo & (torch.rand_like(value[..., 0]).log() > self.log_acceptance(value))
            if not bool(todo.any()):
                break
            value = torch.where(todo.unsqueeze(-1), self.base_dist.sample(sample_shape), value)
        return value


class Exemplars(dist.TorchDistribution):
    r"""A mixture, equally weighted, of normals of one width around means, of which each datum may leave one out.

    .. math:: p(z) = \frac{1}{N} \sum_{n=1}^N \mathcal{N}(z; \mu_n, \sigma^2 I)

    Args:
        means: :math:`\mu`, shape ``(N, d)``.
        scale: :math:`\sigma`, one number.
        left_out: the number of the mean that each datum leaves out, shape ``(batch,)``; None for no such.
        nearest: returns numbers and means of those to score z by, in place of all: a lower bound.

    >>> Exemplars(torch.zeros(2, 1), torch.ones(1)).log_prob(torch.zeros(1))
    tensor(-0.9189)
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(
        self,
        means: Tensor,
        scale: Tensor,
        left_out: Tensor | None = None,
        nearest: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        batch_shape: torch.Size | None = None,
    ):
        self.means, self.scale, self.left_out, self.nearest = means, scale, left_out, nearest
        if batch_shape is None:
            batch_shape = torch.Size() if left_out is None else left_out.shape
        super().__init__(torch.Size(batch_shape), means.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Exemplars(self.means, self.scale, self.left_out, self.nearest, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        numbers, means = None, self.means
        if self.nearest is not None:
            numbers, means = self.nearest(value.detach())
        # The square of a distance as a difference of squares, which cancel: hence the centre, and double precision.
        center, scale = means.detach().double().mean(0), self.scale.double()
        z, means = (value - center) / scale, (means - center) / scale
        closeness = z @ means.T - 0.5 * means.square().sum(-1)
        count = len(self.means)
        if self.left_out is not None:
            numbers = torch.arange(count, device=means.device) if numbers is None else numbers
            closeness = closeness.masked_fill(self.left_out.unsqueeze(-1) == numbers, -math.inf)
            count -= 1
        constant = math.log(count) + self.event_shape[0] * (scale.log().squeeze() + 0.5 * math.log(2 * math.pi))
        return (closeness.logsumexp(-1) - 0.5 * z.square().sum(-1) - constant).to(value.dtype)

    @torch.no_grad()
    def sample(self, sample_shape=torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        which = torch.randint(len(self.means) - (self.left_out is not None), shape, device=self.means.device)
        if self.left_out is not None:
            which = which + (which >= self.left_out)
        return self.means[which] + self.scale * torch.randn_like(self.means[which])


class Flow(dist.TorchDistribution):
    r"""A zuko flow, scaled and shifted: :math:`z = \mu + \sigma \odot f(\epsilon)`.

    What it drew last it scores without inverting the flow.

    Args:
        flow: a distribution of zuko's, events of shape ``(d,)``.
        loc: :math:`\mu`, shape ``(*batch, d)`` or ``()``.
        scale: :math:`\sigma`, of the same shape.
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: torch.distributions.Distribution, loc: Tensor, scale: Tensor):
        self.flow, self.loc, self.scale = flow, loc, scale
        self._drawn = None, None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Flow(self.flow.expand(torch.Size(batch_shape)), self.loc, self.scale)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        value, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        value = self.loc + self.scale * value
        self._drawn = value, log_prob - self._log_scale()
        return value

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        drawn, log_prob = self._drawn
        # Under no_grad the drawing kept no graph; a score that needs one is computed anew.
        if value is drawn and (log_prob.requires_grad or not torch.is_grad_enabled()):
            return log_prob
        return self.flow.log_prob((value - self.loc) / self.scale) - self._log_scale()

    def _log_scale(self) -> Tensor:
        return self.scale.log().expand(self.scale.shape[:-1] + self.event_shape).sum(-1)


def import_zuko():
    """Imports zuko, and undoes what importing it changes for the whole process: that arguments are not validated."""
    base = torch.distributions.Distribution
    before = base._validate_args, base.__dict__["arg_constraints"]
    import zuko

    base._validate_args, base.arg_constraints = before
    for name in zuko.distributions.__all__:  # these rely on it
        kind = getattr(zuko.distributions, name)
        if isinstance(kind.arg_constraints, property):
            kind.arg_constraints = {}
    return zuko


class ReparameterizedMixture(dist.MixtureSameFamily):
    r"""A mixture of diagonal normals whose draws are differentiable in all its parameters, without bias.

    .. math:: F_i(z_i \mid z_{<i}) = \sum_k w_{ki}\, \Phi\left(\frac{z_i - \mu_{ki}}{\sigma_{ki}}\right), \qquad
        w_{ki} \propto \pi_k \prod_{j<i} \mathcal{N}(z_j; \mu_{kj}, \sigma_{kj}^2), \qquad
        \frac{\partial z}{\partial \theta} = -\left(\frac{\partial F}{\partial z}\right)^{-1}
        \frac{\partial F}{\partial \theta}

    A draw is held at its conditional probabilities F while the parameters move. (Pyro's ``MixtureOfDiagNormals`` has
    biased gradients by the weights: those of the expectation of a square are off by as much as they are.)

    References:
        Implicit Reparameterization Gradients, M. Figurnov, S. Mohamed and A. Mnih, 2018,
        https://arxiv.org/abs/1805.08498; Stochastic Backpropagation through Mixture Density Distributions, A. Graves,
        2016, https://arxiv.org/abs/1607.05690.

    >>> components = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
    >>> ReparameterizedMixture(dist.Categorical(torch.ones(2)), components).rsample((7,)).shape
    torch.Size([7, 1])
    """

    has_rsample = True

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        z = self.sample(sample_shape)
        if not torch.is_grad_enabled():
            return z
        normal = self.component_distribution.base_dist
        standard = (z.unsqueeze(-2) - normal.loc) / normal.scale
        log_density = -0.5 * standard.square() - normal.scale.log()
        before = log_density.cumsum(-1) - log_density
        weights = (self.mixture_distribution.logits.unsqueeze(-1) + before).softmax(-2)
        with torch.no_grad():  # the smaller tail of the two, so that nothing cancels
            side = torch.where((weights * ndtr(standard)).sum(-2, keepdim=True) > 0.5, -1.0, 1.0).to(z.dtype)
        tails = side * ndtr(side * standard)
        levels = (weights * tails).sum(-2)  # the conditional probabilities, or those less one
        with torch.no_grad():
            below = torch.einsum("...ki,...kj->...ij", weights * (tails - levels.unsqueeze(-2)), -standard / normal.scale)
            density = (weights * log_density.exp()).sum(-2) / math.sqrt(2 * math.pi)
            slopes = below.tril(-1) + torch.diag_embed(density.clamp_min(torch.finfo(z.dtype).tiny))
        moved = torch.linalg.solve_triangular(slopes, (levels - levels.detach()).unsqueeze(-1), upper=False)
        return z - moved.squeeze(-1)  # what is taken off is zero, and has the gradient


class StratifiedCategorical(dist.Categorical):
    """A categorical distribution whose draws along new leading dimensions are spread evenly over its probabilities.

    Each draw alone has the distribution; together, n draws take each class n times its probability, give or take fewer
    than two. New dimensions are those of `sample_shape` and those that ``expand`` adds.

    >>> StratifiedCategorical(torch.tensor([0.25, 0.75])).sample((4,)).sum()
    tensor(3)
    """

    def expand(self, batch_shape, _instance=None):
        new = super().expand(batch_shape, _instance)
        new._rows = self._num_rows()
        return new

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        strata = shape[: len(shape) - self._num_rows()]
        rows = shape[len(strata) :]
        n = strata.numel()
        order = torch.rand(n, *rows, device=self.logits.device).argsort(0)
        levels = (order + torch.rand(n, *rows, dtype=self.logits.dtype, device=self.logits.device)) / n
        levels = levels.reshape(shape)
        cumulative = self.probs.expand(*shape, -1).cumsum(-1)[..., :-1]
        return (levels.unsqueeze(-1) > cumulative).sum(-1)

    def _num_rows(self) -> int:
        return getattr(self, "_rows", len(self.batch_shape))


def integers(num_classes: int) -> constraints.Constraint:
    """Returns the support of vectors of class numbers."""
    return constraints.independent(constraints.integer_interval(0, num_classes - 1), 1)


def blocks_of(constraint: constraints.Constraint, shape: tuple[int, ...]) -> constraints.Constraint:
    """Returns the support of vectors that hold several events one after the other; of one event, its own support."""
    return constraint if constraint.event_dim == 1 and math.prod(shape[:-1]) == 1 else flattened(constraint, shape)


def one_hot_blocks(latent_dim: int, num_classes: int | None) -> tuple[int, int]:
    """Returns how many one-hot vectors of which length make up the latents; raises if they do not."""
    num_classes = latent_dim if num_classes is None else num_classes
    check_classes(num_classes)
    if latent_dim % num_classes:
        raise ValueError(f"num_classes must divide latent_dim={latent_dim}, got {num_classes}.")
    return latent_dim // num_classes, num_classes


def check_classes(num_classes: int) -> None:
    """Raises a ValueError unless there are at least two classes."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")


def check_simplex(latent_dim: int) -> None:
    """Raises a ValueError unless there are at least two parts of a whole."""
    if latent_dim < 2:
        raise ValueError(f"latent_dim must be at least 2, a simplex's, got {latent_dim}.")


def check_temperature(temperature: float) -> float:
    """Raises a ValueError unless a temperature is positive."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    return temperature
