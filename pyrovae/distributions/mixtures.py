"""Mixtures of normals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.special import ndtr

from pyrovae.distributions.provenance import apply_function
from pyrovae.distributions.spaces import ShapeLike

_CHUNK = 2**24  # log-densities of components that Exemplars computes at once


class NormalMixture(dist.TorchDistribution):
    r"""A mixture of normals that is scored by matrix products.

    .. math:: p(z) = \sum_c \pi_c\, \mathcal{N}(z; \mu_c, \Sigma_c), \qquad
        \log \mathcal{N}(z; \mu_c, \Sigma_c) = -\tfrac12 \mathrm{vec}(\Sigma_c^{-1})^\top \mathrm{vec}(z z^\top)
        + (\Sigma_c^{-1} \mu_c)^\top z + \mathrm{const}_c

    One product of a matrix of features of z with a matrix of the components gives all log-densities, without a tensor
    over particles, data, components and dimensions. The terms nearly cancel where components are narrow and far apart;
    therefore the product is computed in double precision, and the error is below that of rounding z to single
    precision. Expanding copies no parameter.

    Args:
        logits: log weights, normalised or not, shape ``(*batch, components)``.
        loc: means, shape ``(*batch, components, d)``.
        scale: standard deviations, shape ``(*batch, components, d)``, or None.
        scale_tril: in place of `scale`, Cholesky factors of the covariances, shape ``(*batch, components, d, d)``, or
            ``(*batch, 1, d, d)`` for one that all components share.

    Raises:
        ValueError: when both or neither of `scale` and `scale_tril` are given.

    >>> p = NormalMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
    >>> p.log_prob(torch.zeros(1))
    tensor(-1.4189)
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor | None = None, *, scale_tril: Tensor | None = None):
        root = scale_tril if scale is None else scale
        if root is None or (scale is not None and scale_tril is not None):
            raise ValueError("Give either scale or scale_tril, not both.")
        self.logits, self.loc = logits.log_softmax(-1), loc
        self._root, self._diagonal = root, scale is not None
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "NormalMixture":
        new = self._get_checked_instance(NormalMixture, _instance)
        new.logits, new.loc, new._root, new._diagonal = self.logits, self.loc, self._root, self._diagonal
        super(NormalMixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    @property
    def scale(self) -> Tensor | None:
        return self._root if self._diagonal else None

    @property
    def scale_tril(self) -> Tensor | None:
        return None if self._diagonal else self._root

    def component_log_prob(self, z: Tensor) -> Tensor:
        r"""Returns :math:`\log \mathcal{N}(z; \mu_c, \Sigma_c)` of all components, shape ``(*leading, components)``."""
        dtype, center = z.dtype, self.loc.detach().double().mean(-2)
        z, loc = z - center, self.loc - center.unsqueeze(-2)
        unit = -0.5 * z.shape[-1] * math.log(2 * math.pi)  # the log-density of a standard normal at its mean
        if self._diagonal:
            scale = self._root.double()
            precision = scale.reciprocal().square()
            weights = torch.cat([-0.5 * precision, precision * loc], dim=-1)
            constant = unit - scale.log().sum(-1) - 0.5 * (precision * loc.square()).sum(-1)
            return (_rows_by_components(torch.cat([z.square(), z], dim=-1), weights) + constant).to(dtype)
        scale_tril = self._root.double()
        constant = unit - scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        inverse = torch.linalg.solve_triangular(scale_tril, eye, upper=False)
        if scale_tril.shape[-3] == 1:  # shared: after whitening, the components differ only in an inner product
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
        squares = _rows_by_components(apply_function(_LowerProducts, z, rows, cols), quadratic)
        return (squares + _rows_by_components(z, linear) + constant).to(dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        return (self.component_log_prob(value) + self.logits).logsumexp(-1)

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        logits = self.logits.expand(self.batch_shape + self.logits.shape[-1:])
        which = dist.Categorical(logits=logits).sample(sample_shape)

        def pick(t: Tensor, event_dims: int) -> Tensor:
            """Returns the parameters of the component of each draw; gathers, and so copies no others."""
            event = t.shape[t.dim() - event_dims :]
            t = t.expand(*which.shape, self.logits.shape[-1], *event)
            index = which.reshape(*which.shape, *[1] * (event_dims + 1)).expand(*which.shape, 1, *event)
            return t.gather(which.dim(), index).squeeze(which.dim())

        noise = torch.randn(which.shape + self.event_shape, dtype=self.loc.dtype, device=self.loc.device)
        if self._diagonal:
            return pick(self.loc, 1) + pick(self._root, 1) * noise
        return pick(self.loc, 1) + (pick(self._root, 2) @ noise.unsqueeze(-1)).squeeze(-1)

    @property
    def mean(self) -> Tensor:
        return self._average(self.loc)

    @property
    def variance(self) -> Tensor:
        variances = self._root.square() if self._diagonal else self._root.square().sum(-1)
        return self._average(variances + self.loc.square()) - self.mean.square()

    def _average(self, t: Tensor) -> Tensor:
        return (self.logits.exp().unsqueeze(-1) * t).sum(-2).expand(self.batch_shape + self.event_shape)


class _LowerProducts(torch.autograd.Function):
    """The products z_i z_j for given i and j, with a gradient that saves z alone; autograd would save both factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return z[..., rows].mul_(z[..., cols])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, rows, cols = ctx.saved_tensors
        by_z = torch.zeros_like(z).index_add_(-1, rows, grad * z[..., cols])
        return by_z.index_add_(-1, cols, grad.mul(z[..., rows])), None, None


def _rows_by_components(features: Tensor, weights: Tensor) -> Tensor:
    """Returns products of features ``(*samples, *batch, n)`` with weights ``(*batch, components, n)`` as one matmul.

    Samples become rows of the left matrix, so that the weights are not copied for each of them.
    """
    samples = features.shape[: features.dim() - weights.dim() + 1]
    rows = features.reshape(math.prod(samples), *features.shape[len(samples) :]).movedim(0, -2)
    return (rows @ weights.mT).movedim(-2, 0).unflatten(0, samples) if samples else (rows @ weights.mT).squeeze(-2)


class Exemplars(dist.TorchDistribution):
    r"""An equally weighted mixture of normals with one scale; each datum may leave one component out.

    .. math:: p(z) = \frac{1}{N} \sum_{n=1}^N \mathcal{N}(z; \mu_n, \sigma^2 I)

    Args:
        means: :math:`\mu`, shape ``(N, d)``.
        scale: :math:`\sigma`, one number.
        left_out: the index of the component that each datum leaves out, shape ``(batch,)``; None to keep all.
        nearest: maps z to the indices and means of the components to score z by; the log-density is then a lower
            bound. None for all components.

    References:
        Exemplar VAE: Linking Generative Models, Nearest Neighbor Retrieval, and Data Augmentation, S. Norouzi,
        D. J. Fleet and M. Norouzi, 2020, https://arxiv.org/abs/2004.04795.

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
        batch_shape: ShapeLike | None = None,
    ):
        self.means, self.scale, self.left_out, self.nearest = means, scale, left_out, nearest
        if batch_shape is None:
            batch_shape = torch.Size() if left_out is None else left_out.shape
        super().__init__(torch.Size(batch_shape), means.shape[-1:], validate_args=False)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "Exemplars":
        return Exemplars(self.means, self.scale, self.left_out, self.nearest, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        indices, means = None, self.means
        if self.nearest is not None:
            indices, means = self.nearest(value.detach())
        # The squared distance is a difference of squares that nearly cancel: centred, and in double precision.
        center, scale = means.detach().double().mean(0), self.scale.double()
        z, means = (value - center) / scale, (means - center) / scale
        half_squares, count = 0.5 * means.square().sum(-1), len(self.means)
        size = max(1, _CHUNK // len(means))
        rows = z.reshape(-1, z.shape[-1]).split(size)
        excluded: Sequence[Tensor | None] = [None] * len(rows)
        if self.left_out is not None:
            indices = torch.arange(count, device=means.device) if indices is None else indices
            excluded = self.left_out.expand(z.shape[:-1]).reshape(-1, 1).split(size)
            count -= 1
        sums = []
        for some, without in zip(rows, excluded, strict=True):  # bounds the memory
            closeness = some @ means.T - half_squares
            if without is not None:
                closeness = closeness.masked_fill(without == indices, -math.inf)
            sums.append(closeness.logsumexp(-1))
        constant = math.log(count) + self.event_shape[0] * (scale.log().squeeze() + 0.5 * math.log(2 * math.pi))
        return (torch.cat(sums).view(z.shape[:-1]) - 0.5 * z.square().sum(-1) - constant).to(value.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        which = torch.randint(len(self.means) - (self.left_out is not None), shape, device=self.means.device)
        if self.left_out is not None:
            which = which + (which >= self.left_out)
        return self.means[which] + self.scale * torch.randn_like(self.means[which])


class ReparameterizedMixture(dist.MixtureSameFamily):
    r"""A mixture of diagonal normals with unbiased reparameterised gradients for all parameters, weights included.

    .. math:: F_i(z_i \mid z_{<i}) = \sum_k w_{ki}\, \Phi\left(\frac{z_i - \mu_{ki}}{\sigma_{ki}}\right), \qquad
        w_{ki} \propto \pi_k \prod_{j<i} \mathcal{N}(z_j; \mu_{kj}, \sigma_{kj}^2), \qquad
        \frac{\partial z}{\partial \theta} = -\left(\frac{\partial F}{\partial z}\right)^{-1}
        \frac{\partial F}{\partial \theta}

    These are implicit reparameterisation gradients: the conditional probabilities F of a draw stay fixed while the
    parameters change. (Pyro's ``MixtureOfDiagNormals`` has biased gradients by the weights: for the expectation of a
    square the bias is as large as the gradient.)

    Args:
        mixture_distribution: the weights, ``Categorical`` or :class:`StratifiedCategorical`.
        component_distribution: the components, ``Normal(loc, scale).to_event(1)``, ``loc`` of shape
            ``(*batch, components, d)``.

    References:
        Implicit Reparameterization Gradients, M. Figurnov, S. Mohamed and A. Mnih, 2018,
        https://arxiv.org/abs/1805.08498; Stochastic Backpropagation through Mixture Density Distributions, A. Graves,
        2016, https://arxiv.org/abs/1607.05690.

    >>> components = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
    >>> ReparameterizedMixture(dist.Categorical(torch.ones(2)), components).rsample((7,)).shape
    torch.Size([7, 1])
    """

    has_rsample = True

    @property
    def stratified(self) -> bool:
        """Whether draws along new dimensions depend on one another."""
        return isinstance(self.mixture_distribution, StratifiedCategorical)

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        z = self.sample(sample_shape)
        if not torch.is_grad_enabled():
            return z
        normal = self.component_distribution.base_dist
        standard = (z.unsqueeze(-2) - normal.loc) / normal.scale
        log_density = -0.5 * standard.square() - normal.scale.log()
        before = log_density.cumsum(-1) - log_density
        weights = (self.mixture_distribution.logits.unsqueeze(-1) + before).softmax(-2)
        with torch.no_grad():  # use the smaller of the two tails, so that nothing cancels
            side = torch.where((weights * ndtr(standard)).sum(-2, keepdim=True) > 0.5, -1.0, 1.0).to(z.dtype)
        tails = side * ndtr(side * standard)
        levels = (weights * tails).sum(-2)  # the conditional probabilities F, or F - 1
        with torch.no_grad():
            below = torch.einsum(
                "...ki,...kj->...ij", weights * (tails - levels.unsqueeze(-2)), -standard / normal.scale
            )
            density = (weights * log_density.exp()).sum(-2) / math.sqrt(2 * math.pi)
            slopes = below.tril(-1) + torch.diag_embed(density.clamp_min(torch.finfo(z.dtype).tiny))
        moved = torch.linalg.solve_triangular(slopes, (levels - levels.detach()).unsqueeze(-1), upper=False)
        return z - moved.squeeze(-1)  # `moved` is zero; it carries the gradient


class StratifiedCategorical(dist.Categorical):
    r"""A categorical distribution whose draws along new leading dimensions are spread evenly over its probabilities.

    .. math:: x_i = F^{-1}\left(\frac{\pi_i - 1 + u_i}{n}\right), \qquad u_i \sim \mathrm{Uniform}(0, 1), \quad
        \pi \text{ a random permutation of } 1, \dots, n

    with F the cumulative probabilities. Each draw alone follows the distribution. Of n draws together, the number in
    each class differs from n times its probability by less than two. New dimensions are those of `sample_shape` and
    those that ``expand`` adds.

    Args:
        logits: logarithms of the probabilities, normalised or not, shape ``(*batch, components)``.

    >>> StratifiedCategorical(torch.tensor([0.25, 0.75])).sample((4,)).sum()
    tensor(3)
    """

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "StratifiedCategorical":
        new = super().expand(batch_shape, _instance)
        new._rows = self._num_rows()
        return new

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
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
