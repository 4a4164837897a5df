"""Multivariate normals with accurate log-densities when their covariances are ill-conditioned."""

import math
from functools import cached_property
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyrovae.distributions.spaces import ShapeLike, keep_checks


class _Remembered(torch.distributions.Distribution):
    r"""Keeps the noise of the last draw, for its log-density.

    For an ill-conditioned normal, rounding moves z by many standard deviations along a narrow direction. The noise
    gives the log-density of the exact z.
    """

    # z, its noise, and whether z was drawn with a graph
    _drawn: tuple[Tensor, tuple[Tensor, ...], bool] | None = None

    def _remember(self, z: Tensor, *noise: Tensor) -> Tensor:
        self._drawn = z, noise, torch.is_grad_enabled()
        return z

    def sample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        """Draws without keeping the noise: the log-density of the draw is then that of the rounded numbers."""
        before = self._drawn
        with torch.no_grad():
            z = self.rsample(sample_shape)
        self._drawn = before
        return z

    def _noise_of(self, value: Tensor) -> tuple[Tensor, ...] | None:
        """Returns the noise of the last draw if `value` is that very tensor, else None."""
        if self._drawn is None or value is not self._drawn[0]:
            return None
        # A draw without a graph may stay fixed while parameters change: then its noise depends on them.
        return self._drawn[1] if self._drawn[2] or not torch.is_grad_enabled() else None

    def _start(self, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Returns a mask of where `value` equals the last draw, shape ``(..., 1)``, and the noise there, if any."""
        if self._drawn is None or value.shape != self._drawn[0].shape:
            return torch.zeros((), dtype=torch.bool, device=value.device), None
        z, noise, _ = self._drawn
        same = (value == z).all(-1, keepdim=True).detach()
        return same, tuple(torch.where(same, t, 0.0).double() for t in noise)


class MultivariateNormal(_Remembered, dist.MultivariateNormal):
    r"""Torch's multivariate normal, with log-densities of its own draws from their noise.

    .. math:: \log q(z) = -\tfrac12 \lVert \epsilon \rVert^2 - \log \lvert L \rvert - \tfrac{d}{2} \log 2 \pi, \qquad
        z = \mu + L \epsilon

    Other values are scored in double precision.

    Args:
        loc: :math:`\mu`.
        scale_tril: :math:`L`.

    >>> q = MultivariateNormal(torch.zeros(2), scale_tril=torch.tensor([[1.0, 0.0], [1e6, 1e-4]]))
    >>> torch.isclose(q.log_prob(q.rsample((10000,))).mean(), -q.entropy(), atol=0.1)  # ten standard errors
    tensor(True)
    """

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        noise = self.loc.new_empty(self._extended_shape(sample_shape)).normal_()
        return self._remember(self.loc + _times(self._unbroadcasted_scale_tril, noise), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        constant = -0.5 * self.event_shape[0] * math.log(2 * math.pi)
        tril = self._unbroadcasted_scale_tril
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        noise = self._noise_of(value)
        if noise is not None:
            return constant - log_det - 0.5 * noise[0].square().sum(-1)
        tril = tril.double()
        same, start = self._start(value)
        offset = value.double() - self.loc.double()
        if start is None:
            white = _solve(tril, offset)
        else:
            white = start[0] + _solve(tril, _zero_where(same, offset - _times(tril, start[0])))
        return (constant - log_det - 0.5 * white.square().sum(-1)).to(self.loc.dtype)


class LowRankMultivariateNormal(_Remembered, dist.LowRankMultivariateNormal):
    r"""Torch's normal with covariance :math:`D + W W^\top`, with log-densities of its own draws from their noise.

    .. math:: \log q(z) = -\tfrac12 \lVert (I - Q Q^\top)\, b \rVert^2 - \log \lvert R \rvert
        - \tfrac12 \log \lvert D \rvert - \tfrac{d}{2} \log 2 \pi, \qquad
        \begin{pmatrix} D^{-1/2} W \\ I \end{pmatrix} = Q R

    Here b is :math:`(\epsilon, -\eta)` for a draw :math:`z = \mu + W \eta + D^{1/2} \epsilon`, and
    :math:`(D^{-1/2} (z - \mu), 0)`, in double precision, for any other z. Both give the same up to rounding, because
    they differ by a combination of the columns of Q. Nothing cancels, as it does in the Woodbury formula.

    Args:
        loc: :math:`\mu`.
        cov_factor: :math:`W`, shape ``(*batch, d, rank)``.
        cov_diag: the diagonal of D.

    >>> q = LowRankMultivariateNormal(torch.zeros(2), torch.full((2, 1), 1e6), torch.full((2,), 1e-8))
    >>> torch.isclose(q.log_prob(q.rsample((10000,))).mean(), -q.entropy(), atol=0.1)  # ten standard errors
    tensor(True)
    """

    def __init__(self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor, validate_args: bool | None = None):
        # Not torch's __init__: it takes a Cholesky factor of a matrix that rounding makes indefinite.
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], cov_factor.shape[:-2], cov_diag.shape[:-1])
        self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag = cov_factor, cov_diag
        self.loc, self.cov_diag = loc.expand(*batch_shape, -1), cov_diag.expand(*batch_shape, -1)
        self.cov_factor = cov_factor.expand(*batch_shape, -1, -1)
        torch.distributions.Distribution.__init__(self, batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: ShapeLike, _instance: Any = None) -> "LowRankMultivariateNormal":
        loc = self.loc.expand(*batch_shape, -1)
        new = LowRankMultivariateNormal(loc, self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag, False)
        return keep_checks(self, new)

    @cached_property
    def _qr(self) -> tuple[Tensor, Tensor]:
        """Q and R, in double precision."""
        a = self._unbroadcasted_cov_factor.double() / self._unbroadcasted_cov_diag.double().sqrt().unsqueeze(-1)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(*a.shape[:-2], -1, -1)
        return torch.linalg.qr(torch.cat([a, eye], dim=-2))

    @property
    def _capacitance_tril(self) -> Tensor:
        r = self._qr[1]
        return (r * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT.to(self.loc.dtype)

    def rsample(self, sample_shape: ShapeLike = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        eta = self.loc.new_empty(*shape[:-1], self._unbroadcasted_cov_factor.shape[-1]).normal_()
        noise = self.loc.new_empty(shape).normal_()
        spread = self._unbroadcasted_cov_diag.sqrt() * noise
        return self._remember(self.loc + _times(self._unbroadcasted_cov_factor, eta) + spread, noise, eta)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        noise = self._noise_of(value)
        if noise is not None:
            b = torch.cat([noise[0], -noise[1]], dim=-1).double()
        else:
            factor, scale = self._unbroadcasted_cov_factor.double(), self._unbroadcasted_cov_diag.double().sqrt()
            same, start = self._start(value)
            offset = value.double() - self.loc.double()
            if start is None:
                y, eta = offset / scale, offset.new_zeros(*offset.shape[:-1], factor.shape[-1])
            else:
                epsilon, eta = start
                offset = _zero_where(same, offset - _times(factor, eta) - scale * epsilon)
                y = epsilon + offset / scale
            b = torch.cat([y, -eta], dim=-1)
        q, r = self._qr
        rest = b - _times(q, _times(q.mT, b))
        log_det = 2 * r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1) + self.cov_diag.log().sum(-1)
        constant = self.event_shape[0] * math.log(2 * math.pi)
        return -0.5 * (constant + log_det + rest.square().sum(-1)).to(self.loc.dtype)


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Returns products of matrices with vectors ``(*samples, *batch, d)``, without copying a matrix for each sample."""
    columns = _as_columns(matrix, vectors)
    return _as_vectors(matrix @ columns, vectors.shape[:-1])


def _solve(tril: Tensor, vectors: Tensor) -> Tensor:
    """Returns the solutions y of ``tril @ y = vectors``, without a copy of a matrix for each sample."""
    columns = _as_columns(tril, vectors)
    return _as_vectors(torch.linalg.solve_triangular(tril, columns, upper=False), vectors.shape[:-1])


def _as_columns(matrix: Tensor, vectors: Tensor) -> Tensor:
    samples = max(vectors.dim() - matrix.dim() + 1, 0)
    return vectors.reshape(-1, *vectors.shape[samples:]).movedim(0, -1)


def _as_vectors(columns: Tensor, shape: torch.Size) -> Tensor:
    if columns.dim() > len(shape) + 1:  # fewer vectors than matrices
        return columns.squeeze(-1)
    return columns.movedim(-1, 0).reshape(*shape, columns.shape[-2])


def _zero_where(same: Tensor, t: Tensor) -> Tensor:
    """Returns t with zeros where `same` is true, and the gradient of t everywhere: t is zero there up to rounding."""
    return t - torch.where(same, t.detach(), 0.0)
