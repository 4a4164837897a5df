"""Priors that are mixtures, of learned components or of posteriors of the encoder."""

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.distributions import NormalMixture, positive, tril_of
from pyrovae.inference.messages import check_finite, warn
from pyrovae.nn import MLP, Network
from pyrovae.nn.base import check_count
from pyrovae.priors.base import Prior
from pyrovae.recorded import BuiltWith


class _GaussianMixture(Prior, ABC):
    """A mixture of normals; subclasses define the covariances. The parameters are weights, means and covariances."""

    def __init__(self, latent_dim: int, num_components: int = 10, network: Network = MLP, context_dim: int = 0):
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        latent_dim = check_count(latent_dim, "latent_dim")
        # Random means, because identical components would stay identical.
        means, scales = torch.randn(num_components * latent_dim), self._num_scales(latent_dim, num_components)
        start = torch.cat([torch.zeros(num_components), means, torch.zeros(scales)])
        super().__init__(latent_dim, network, context_dim, start=start)
        self.num_components = num_components

    @abstractmethod
    def _num_scales(self, latent_dim: int, num_components: int) -> int:
        """Returns the number of parameters of the covariances."""

    @abstractmethod
    def _scales(self, raw: Tensor) -> dict[str, Tensor]:
        """Returns these parameters as keyword arguments of :class:`pyrovae.distributions.NormalMixture`."""

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        params, k = self.parameters_of(context), self.num_components
        end = k + k * self.latent_dim
        loc = params[..., k:end].unflatten(-1, (k, self.latent_dim))
        return NormalMixture(params[..., :k], loc, **self._scales(params[..., end:]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}"


class GaussianMixture(_GaussianMixture):
    r"""A mixture of normals with independent dimensions.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal{N}(z; \mu_k, \mathrm{diag}\, \sigma_k^2)

    Args:
        latent_dim: number of latent dimensions.
        num_components: :math:`K`, at least 1.
        network: maps a context to the parameters, a module or a callable that builds one from
            ``(context_dim, num_components * (1 + 2 * latent_dim))``.
        context_dim: width of the context vector, 0 for none.

    References:
        Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders, N. Dilokthanakul et al., 2016,
        https://arxiv.org/abs/1611.02648.

    >>> GaussianMixture(3, num_components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def _num_scales(self, latent_dim: int, num_components: int) -> int:
        return num_components * latent_dim

    def _scales(self, raw: Tensor) -> dict[str, Tensor]:
        return {"scale": positive(raw).unflatten(-1, (self.num_components, self.latent_dim))}


class FullRankGaussianMixture(_GaussianMixture):
    r"""A mixture of normals, each with its own covariance.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal{N}(z; \mu_k, L_k L_k^\top)

    Args:
        latent_dim: number of latent dimensions.
        num_components: :math:`K`, at least 1.
        network: maps a context to the parameters, a module or a callable that builds one from ``(context_dim,
            num_components * (1 + latent_dim + latent_dim * (latent_dim + 1) // 2))``.
        context_dim: width of the context vector, 0 for none.

    References:
        Variational Deep Embedding, Z. Jiang, Y. Zheng, H. Tan, B. Tang and H. Zhou, 2017,
        https://arxiv.org/abs/1611.05148.

    >>> FullRankGaussianMixture(3, num_components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def _num_scales(self, latent_dim: int, num_components: int) -> int:
        return num_components * (latent_dim * (latent_dim + 1) // 2)

    def _scales(self, raw: Tensor) -> dict[str, Tensor]:
        return {"scale_tril": tril_of(raw.unflatten(-1, (self.num_components, -1)))}


class TiedGaussianMixture(_GaussianMixture):
    r"""A mixture of normals that share one covariance.

    .. math:: p(z) = \sum_{k=1}^K \pi_k\, \mathcal{N}(z; \mu_k, L L^\top)

    Args:
        latent_dim: number of latent dimensions.
        num_components: :math:`K`, at least 1.
        network: maps a context to the parameters, a module or a callable that builds one from ``(context_dim,
            num_components * (1 + latent_dim) + latent_dim * (latent_dim + 1) // 2)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Variational Deep Embedding, Z. Jiang, Y. Zheng, H. Tan, B. Tang and H. Zhou, 2017,
        https://arxiv.org/abs/1611.05148.

    >>> TiedGaussianMixture(3, num_components=5)().log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    def _num_scales(self, latent_dim: int, num_components: int) -> int:
        return latent_dim * (latent_dim + 1) // 2

    def _scales(self, raw: Tensor) -> dict[str, Tensor]:
        return {"scale_tril": tril_of(raw).unsqueeze(-3)}


class VampPrior(Prior):
    r"""A mixture of the encoder's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^K q(z \mid u_k)

    Each run of the model encodes the pseudo-inputs once, for all particles. With a context, they are encoded with each
    of its rows. Normal posteriors are scored by one matrix product. Others, such as flows, are scored one by one for
    every z, and the time is proportional to the number of components.

    Args:
        encoder: the encoder of the VAE.
        num_components: number of pseudo-inputs :math:`K`, at least 1.
        data: initial pseudo-inputs, the first `num_components` rows, shape ``(at least num_components, *x_shape)``;
            None for noise.
        bounds: smallest and largest value of a pseudo-input; None for any real number.

    Raises:
        ValueError: when `num_components` is below 1, or `data` has another shape, fewer rows, or values outside
            `bounds`.

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
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be the encoder of the VAE, a module, got {encoder!r}.")
        stated: Any = encoder  # a type checker takes the attributes of a module for tensors or modules
        super().__init__(stated.latent_dim)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        shape = (num_components, *stated.x_shape)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be a pair (low, high) with low < high, or None, got {bounds}.")
        self.num_components, self.bounds = num_components, bounds
        self.support, self.context_dim = stated.support, getattr(encoder, "context_dim", 0)
        if data is None:
            raw = torch.randn(shape).to(_weight(encoder))
        elif data.shape[1:] != shape[1:] or len(data) < num_components:
            raise ValueError(
                f"data must have shape (at least {num_components}, *{shape[1:]}), got {tuple(data.shape)}. Give more "
                "data or fewer num_components."
            )
        else:
            raw = self._raw(data[:num_components].detach().clone().to(_weight(encoder)))
        self.raw_inputs = nn.Parameter(raw)
        self.encoder = encoder
        if not self.context_dim:
            with torch.no_grad():
                q = encoder(self.pseudo_inputs()[:1])
            if isinstance(q, dist.Delta):
                raise ValueError("encoder returns points (Delta) without a density. Give an encoder with a density.")

    def _raw(self, data: Tensor) -> Tensor:
        if self.bounds is None:
            return data
        low, high = self.bounds
        if bool(((data < low) | (data > high)).any()):
            raise ValueError(
                f"data ranges from {data.min().item():g} to {data.max().item():g}, outside bounds={self.bounds}. Give "
                "the bounds of the data, or None."
            )
        # At the bounds a sigmoid has no gradient: pixels of 0 or 1 start one hundredth inside.
        return ((data - low) / (high - low)).clamp(0.01, 0.99).logit()

    def pseudo_inputs(self) -> Tensor:
        """Returns the pseudo-inputs, shape ``(num_components, *x_shape)``."""
        if self.bounds is None:
            return self.raw_inputs
        low, high = self.bounds
        return low + (high - low) * self.raw_inputs.sigmoid()

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        inputs, context = self.pseudo_inputs(), self.select_context(context)
        if context is not None:
            leading, inputs = context.shape[:-1], inputs.expand(*context.shape[:-1], *inputs.shape)
            context = context.unsqueeze(-2).expand(*leading, self.num_components, -1)
        q = self.encoder(inputs, context)
        logits = self.raw_inputs.new_zeros(q.batch_shape)
        if isinstance(q, dist.MultivariateNormal):
            return NormalMixture(logits, q.loc, scale_tril=q.scale_tril)
        if isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):
            return NormalMixture(logits, q.base_dist.loc, q.base_dist.scale)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), q)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_components={self.num_components}, bounds={self.bounds}"


class ExemplarPrior(Prior):
    r"""A mixture of normals with one scale around the means that the encoder gives for the training data.

    .. math:: p(z) = \frac{1}{N} \sum_{n=1}^N \mathcal{N}(z; \mu(x_n), \sigma^2 I)

    In training, the context is the index of each datum in `data`, shape ``(batch,)``, and each datum leaves its own
    exemplar out (the mean is then over N - 1): ``fit(vae.model, vae.guide, (data, torch.arange(len(data))))``. Without
    a context, no exemplar is left out. In training, the sum has only the exemplars nearest to the latents of the batch,
    which makes it a lower bound. They are selected by means from earlier steps, and then encoded again. In evaluation
    mode the sum is exact, over all exemplars.

    Args:
        encoder: the encoder of the VAE, with a mean.
        data: the exemplars, shape ``(N, *x_shape)``. Saved weights hold their means alone; so that a prior can be built
            from a file, their number N serves too: it scores and draws by the means that it loads, and trains when its
            attribute `data` is set to the exemplars.
        num_neighbors: number of exemplars for each z in training.
        scale: initial :math:`\sigma`.

    Raises:
        ValueError: when `data` are missing or do not have the shape of the encoder's input, `num_neighbors` is below 1,
            `scale` is not positive, or an index in the context is out of range.

    References:
        Exemplar VAE: Linking Generative Models, Nearest Neighbor Retrieval, and Data Augmentation, S. Norouzi,
        D. J. Fleet and M. Norouzi, 2020, https://arxiv.org/abs/2004.04795.

    >>> from pyrovae import encoders
    >>> ExemplarPrior(encoders.DiagonalNormal(4, 2), torch.rand(100, 4))().log_prob(torch.zeros(7, 2)).shape
    torch.Size([7])
    """

    means: Tensor

    def __init__(
        self, encoder: nn.Module, data: Tensor | int | None = None, num_neighbors: int = 10, scale: float = 0.5
    ):
        if data is None:
            raise ValueError("ExemplarPrior needs data, the exemplars: give the training data.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}.")
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be the encoder of the VAE, a module, got {encoder!r}.")
        stated: Any = encoder  # a type checker takes the attributes of a module for tensors or modules
        weight = _weight(encoder)
        super().__init__(stated.latent_dim, start=weight.new_full((1,), math.log(scale)))
        self.context_dim, self.takes_numbers = 1, True  # the context is an index, not a vector
        if not isinstance(data, (Tensor, int)):
            raise TypeError(f"data must be a tensor of exemplars, or their number, got a {type(data).__name__}.")
        count = len(data) if isinstance(data, Tensor) else data
        if isinstance(data, Tensor) and data.shape[1:] != stated.x_shape or count < 2:
            given = tuple(data.shape) if isinstance(data, Tensor) else data
            raise ValueError(f"data must have shape (at least 2, *{stated.x_shape}), got {given}.")
        if isinstance(data, Tensor):
            check_finite("data", data)
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}.")
        if getattr(encoder, "context_dim", 0):
            raise ValueError("encoder takes a context, but exemplars have none. Build it with context_dim=0.")
        if stated.support is not constraints.real_vector:
            raise ValueError(f"ExemplarPrior is a mixture of normals, but the encoder's latents are {stated.support}.")
        try:
            with torch.no_grad():
                encoder(weight.new_zeros(1, *stated.x_shape)).mean  # noqa: B018
        except NotImplementedError as error:
            raise ValueError(
                f"{type(encoder).__name__} returns a distribution without a mean, which an ExemplarPrior needs. Use "
                "an encoder such as DiagonalNormal."
            ) from error
        self.num_neighbors, self.encoder = min(num_neighbors, count - 1), encoder
        # Not a buffer, so that checkpoints and files of weights do not hold the data.
        self.data = data.detach() if isinstance(data, Tensor) else None
        self.register_buffer("means", weight.new_full((count, stated.latent_dim), math.nan))
        self.built_with = BuiltWith((encoder, count, num_neighbors, scale), {})  # nor do descriptions
        self._encoded_with: tuple[tuple[int, int, torch.dtype], ...] | None = None  # the weights of the means

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        left_out = None if context is None else self._indices(context)
        if self.training and left_out is None and torch.is_grad_enabled():
            warn(
                "an ExemplarPrior without a context leaves no exemplar out: a datum that is one of them has its own "
                "posterior as a part of its prior. Give the numbers of the data in training: fit(model, guide, "
                "(x, torch.arange(len(x))))."
            )
        self._update_means()
        nearest = partial(self._nearest, left_out) if self.training else None
        return distributions.Exemplars(self.means, self.params.exp(), left_out, nearest)

    def _update_means(self) -> None:
        """Encodes the exemplars again, in evaluation mode all if the weights of the encoder may have changed."""
        if self.data is None:
            if self.training or bool(self.means[0, 0].isnan()):
                raise ValueError(
                    f"this ExemplarPrior was built for {len(self.means)} exemplars without their data, and "
                    + ("cannot train" if self.training else "no means were loaded")
                    + ": set its attribute data to the training data."
                )
            return
        if len(self.data) != len(self.means):
            raise ValueError(f"data of an ExemplarPrior has {len(self.data)} rows, and it has {len(self.means)} means.")
        if self.training:
            self._encoded_with = None  # a step follows, and fused optimizers change weights without a new version
            if bool(self.means[0, 0].isnan()):
                self._encode_all()
            return
        weights = tuple((id(t), t._version, t.dtype) for t in [*self.encoder.parameters(), *self.encoder.buffers()])
        if weights != self._encoded_with:
            self._encode_all()
            self._encoded_with = weights

    def _indices(self, context: Tensor) -> Tensor:
        indices = context.long().flatten()
        if bool((indices != context.flatten()).any() | (indices < 0).any() | (indices >= len(self.means)).any()):
            raise ValueError(
                "the context of an ExemplarPrior must be the index of each datum in its data, from 0 to "
                f"{len(self.means) - 1}, got values from {context.min().item():g} to {context.max().item():g}. Give "
                "torch.arange(len(data)) with the training data."
            )
        return indices

    def _encode(self, indices: Tensor) -> Tensor:
        assert self.data is not None
        return self.encoder(self.data[indices.to(self.data.device)].to(self.params)).mean

    @torch.no_grad()
    def _encode_all(self) -> None:
        for rows in torch.arange(len(self.means)).split(1000):
            self.means[rows] = self._encode(rows)

    def _nearest(self, left_out: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the indices of the exemplars that are nearest to some row of z, and their means, encoded again."""
        with torch.no_grad():
            half_squares = 0.5 * self.means.square().sum(-1)
            excluded = None if left_out is None else left_out.expand(z.shape[:-1]).flatten()
            rows = z.reshape(-1, self.latent_dim)
            # With the exemplars left out, whose means are then encoded again too.
            selected = [] if left_out is None else [left_out]
            for start in range(0, len(rows), 256):  # bounds the memory
                closeness = torch.addmm(-half_squares, rows[start : start + 256], self.means.T)
                if excluded is not None:
                    closeness.scatter_(1, excluded[start : start + 256, None], -math.inf)
                selected.append(closeness.topk(self.num_neighbors, sorted=False).indices.flatten())
            indices = torch.cat(selected).unique()
        means = self._encode(indices)
        self.means[indices] = means.detach()
        return indices, means

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, num_exemplars={len(self.means)}, num_neighbors={self.num_neighbors}"


def _weight(encoder: nn.Module) -> Tensor:
    """Returns a tensor with the device and dtype of an encoder."""
    return next((p.detach() for p in encoder.parameters()), torch.zeros(()))
