"""Guides that draw the latents of each datum from normal or Student-t distributions, or from mixtures of them."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor
from torch.distributions import Transform
from torch.nn import functional as F

from pyrovae.distributions import MultivariateNormal
from pyrovae.estimators.targets import Site, Target

_LEAST_SHARE = 0.05  # of a component that pilot draws find empty
_SHRINKAGE = 20.0  # effective draws at which half of a shift that pilot draws show is made; half the dimension if more
_SCALES = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5)
_SLACK = 0.9  # nats of the second moment that a wider proposal, whose weights have lighter tails, may cost
_LARGEST = 1e4  # of numbers that stand for latents with ends
_PILOT_SCALE, _PILOT_DEGREES = 1.2, 30.0
_FEW = 40  # dimensions, up to which these serve; with more, as wide a proposal would lose more nats


def density(mean: Tensor, scale_tril: Tensor, degrees: float | Tensor) -> dist.TorchDistribution:
    """Returns a Student-t distribution over vectors; a normal one for infinitely many degrees of freedom."""
    if degrees == math.inf:
        return MultivariateNormal(mean, scale_tril=scale_tril, validate_args=False)
    return dist.MultivariateStudentT(degrees, mean, scale_tril, validate_args=False)


def _mixture(log_share: Tensor, components: dist.TorchDistribution) -> dist.TorchDistribution:
    shares = dist.Categorical(logits=log_share, validate_args=False)
    return dist.MixtureSameFamily(shares, components, validate_args=False)


class Components(NamedTuple):
    """The components of a mixture over the latents u of each datum.

    Args:
        log_share: logarithm of their shares, minus infinity for those that a datum does not have, ``(batch, count)``.
        mean: ``(batch, count, dim)``.
        scale_tril: Cholesky factors of their scale matrices, ``(batch, count, dim, dim)``.
    """

    log_share: Tensor
    mean: Tensor
    scale_tril: Tensor

    @property
    def num_components(self) -> int:
        return self.mean.shape[1]

    def rows(self, rows: slice | Tensor) -> "Components":
        return Components(*(t[rows] for t in self))

    @classmethod
    def single(cls, mean: Tensor, scale_tril: Tensor) -> "Components":
        """Returns one component for each datum, of ``(batch, dim)`` and ``(batch, dim, dim)``."""
        return cls(torch.zeros_like(mean[:, :1]), mean.unsqueeze(1), scale_tril.unsqueeze(1))

    @classmethod
    def cat(cls, parts: Sequence["Components"]) -> "Components":
        """Joins those of several parts of the data; a part with fewer components repeats its first, with no share."""
        count = max(part.num_components for part in parts)
        padded = []
        for part in parts:
            missing = count - part.num_components
            first = [t[:, :1].expand(-1, missing, *t.shape[2:]) for t in part]
            log_share = F.pad(part.log_share, (0, missing), value=-math.inf)
            padded.append((log_share, torch.cat([part.mean, first[1]], 1), torch.cat([part.scale_tril, first[2]], 1)))
        return cls(*(torch.cat(columns) for columns in zip(*padded, strict=True)))

    def draw(self, num_draws: int, degrees: float) -> Tensor:
        """Returns draws of u, ``(num_draws, batch, dim)``."""
        batch, count, dim = self.mean.shape
        # Draws last: a product with few matrices, not one for each draw.
        noise = self.mean.new_empty(batch, count, dim, num_draws).normal_()
        u = (self.scale_tril @ noise).movedim(-1, 0)
        if degrees < math.inf:
            chi2 = torch.distributions.Chi2(self.mean.new_tensor(degrees)).sample((num_draws, batch, 1, 1))
            u = u / (chi2 / degrees).sqrt()
        u = self.mean + u
        if count == 1:
            return u.squeeze(2)
        chosen = torch.distributions.Categorical(logits=self.log_share).sample((num_draws,))
        return u.gather(2, chosen[..., None, None].expand(-1, -1, 1, dim)).squeeze(2)

    def log_prob(self, u: Tensor, degrees: float) -> Tensor:
        """Returns the log-density of u, ``(num_draws, batch, dim)``, of shape ``(num_draws, batch)``."""
        return (self.log_share + self.log_prob_of_each(u, u.new_ones(1), degrees)[0]).logsumexp(-1)

    def log_prob_of_each(self, u: Tensor, scales: Tensor, degrees: float) -> Tensor:
        """Returns the log-density of u under each component, with all scales multiplied by some factors.

        Args:
            u: shape ``(num_draws, batch, dim)``.
            scales: the factors, ``(scales,)``.
            degrees: degrees of freedom, infinite for normal distributions.

        Returns:
            Shape ``(scales, num_draws, batch, count)``.
        """
        dim = u.shape[-1]
        offset = (u.unsqueeze(2) - self.mean).movedim(0, -1)  # draws last, so that no factor is copied for each
        quadratic = torch.linalg.solve_triangular(self.scale_tril, offset, upper=False).square().sum(-2).movedim(-1, 0)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        scales = scales[:, None, None, None]
        quadratic, log_det = quadratic / scales.square(), log_det + dim * scales.log()
        if degrees == math.inf:
            return -0.5 * (quadratic + dim * math.log(2 * math.pi)) - log_det
        constant = math.lgamma((degrees + dim) / 2) - math.lgamma(degrees / 2) - dim / 2 * math.log(degrees * math.pi)
        return constant - (degrees + dim) / 2 * (quadratic / degrees).log1p() - log_det

    def scaled(self, pilots: "Pilots", degrees: float) -> "Components":
        """Returns the components with the scale at which the weights have a small second moment, by pilot draws."""
        scales = 1 + (pilots.u.new_tensor(_SCALES) - 1) * _relative_width(pilots.u.shape[-1])
        each = self.log_prob_of_each(pilots.u, scales, degrees)
        log_q = (self.log_share + each).logsumexp(-1)
        moments = (pilots.log_w + pilots.log_p - log_q.double()).logsumexp(1).nan_to_num(math.inf)
        # The widest that costs little: pilot draws seldom show what is lost in the tails of a narrow one.
        index = torch.arange(len(_SCALES), device=moments.device).unsqueeze(-1)
        best = torch.where(moments <= moments.amin(0) + _SLACK, index, 0).amax(0)
        scale = scales[best][:, None, None, None]
        return self._replace(scale_tril=scale * self.scale_tril)

    def moved(self, u: Tensor, log_w: Tensor) -> "Components":
        """Returns the components with means and shares moved towards those of weighted draws.

        Args:
            u: the draws, ``(num_draws, batch, dim)``.
            log_w: their log weights, ``(num_draws, batch)``.
        """
        weights = log_w.softmax(0).nan_to_num(0.0).to(u.dtype).unsqueeze(-1)
        if self.num_components > 1:
            each = self.log_prob_of_each(u, u.new_ones(1), math.inf)[0]
            weights = weights * (self.log_share + each).softmax(-1).nan_to_num(0.0)
        total = weights.sum(0)
        effective = total.square() / weights.square().sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
        trust = effective / (effective + max(_SHRINKAGE, u.shape[-1] / 2))
        sums = torch.stack([(weights[..., k : k + 1] * u).sum(0) for k in range(self.num_components)], dim=1)
        mean = sums / total.clamp(min=1e-30).unsqueeze(-1)
        mean = self.mean + trust.unsqueeze(-1) * (mean - self.mean)
        if self.num_components == 1:
            return self._replace(mean=mean)
        is_there = self.log_share > -math.inf
        least = min(_LEAST_SHARE, 0.5 / self.num_components)
        share = torch.where(is_there, torch.lerp(self.log_share.exp(), total, trust).clamp(min=least), 0)
        return self._replace(mean=mean, log_share=(share / share.sum(-1, keepdim=True)).log())


def _relative_width(dim: int) -> float:
    """Returns by how much less wide than in few dimensions a proposal may be, for the same loss."""
    return math.sqrt(min(1.0, _FEW / dim))


class Pilots(NamedTuple):
    """Draws that choose a proposal and are not used again: u, log p(x, u), and log weights in double precision."""

    u: Tensor
    log_p: Tensor
    log_w: Tensor


def draw_pilots(target: Target, components: Components, num_draws: int, num_scored: int) -> Pilots:
    """Draws from components that are wider, so that the weights of the draws have light tails themselves.

    Args:
        target: the joint density.
        components: those of each datum.
        num_draws: number of draws of each datum.
        num_scored: draws of each datum to score at once.
    """
    width = _relative_width(components.mean.shape[-1])
    wide = components._replace(scale_tril=(1 + (_PILOT_SCALE - 1) * width) * components.scale_tril)
    degrees = _PILOT_DEGREES / width**2
    u = wide.draw(num_draws, degrees)
    log_p = torch.cat([target.log_joint(part) for part in u.split(num_scored)])
    return Pilots(u, log_p, (log_p - wide.log_prob(u, degrees)).double().nan_to_num(nan=-math.inf))


class NormalGuide:
    """A Pyro guide that draws the latents of each datum from a mixture of normal or Student-t distributions.

    Args:
        target: which columns of u each site has.
        components: those of each datum.
        degrees: degrees of freedom, infinite for normal distributions.
    """

    draws_directly = True  # without auxiliary sites, whatever the task's guide has: its density is known everywhere

    def __init__(self, target: Target, components: Components, degrees: float):
        self.target, self.components, self.degrees = target, components, degrees

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        log_share, all_means, all_factors = self.components
        log_share = log_share.unsqueeze(0)
        noise: list[Tensor] = []
        quadratic: Tensor | float = 0.0
        frames = {frame.name: frame for site in self.target.sites for frame in site.frames}
        # A plate without a size has that of the values in it.
        sizes = {name: frame.size if frame.size >= 0 else None for name, frame in frames.items()}
        plates = {name: pyro.plate(name, sizes[name], dim=frame.dim) for name, frame in frames.items()}
        for site in self.target.sites:
            # u = mean + L e: given the sites before, whose noise e is known, a site's block of u is again normal.
            here, before = site.columns, slice(0, site.columns.start)
            mean, own = all_means[..., here], all_factors[..., here, here]
            degrees, factor = self.degrees, torch.ones(())
            if noise:
                known = torch.cat(noise, dim=-1)
                mean = mean + (all_factors[..., here, before] @ known.unsqueeze(-1)).squeeze(-1)
                if degrees < math.inf:
                    factor = ((degrees + quadratic) / (degrees + before.stop)).sqrt()[..., None, None]
                    degrees = degrees + before.stop
            else:
                mean = mean.unsqueeze(0)
            scale_tril = factor.to(own) * own
            u = self._sample(site, log_share, mean, scale_tril, degrees, plates)
            if site is self.target.sites[-1]:
                break
            u = u.unsqueeze(-2)
            if self.components.num_components > 1:  # the shares given the sites so far
                log_share = log_share + density(mean, scale_tril, degrees).log_prob(u)
            e = torch.linalg.solve_triangular(own, (u - mean).unsqueeze(-1), upper=False).squeeze(-1)
            noise.append(e)
            quadratic = quadratic + e.square().sum(-1)

    def _sample(
        self, site: Site, log_share: Tensor, mean: Tensor, scale_tril: Tensor, degrees: float, plates: dict
    ) -> Tensor:
        """Samples a site from the components of its block of u, ``(draws, batch, count, size)``; returns the block."""
        place, size = self.target.place, math.prod(site.event)
        draws, batch, count = mean.shape[:3]
        factors = scale_tril.reshape(-1, batch, count, *scale_tril.shape[-2:])
        if math.prod(site.plates) > 1:
            blocks = math.prod(site.plates)
            covariance = (factors @ factors.mT).unflatten(-1, (blocks, size)).unflatten(-3, (blocks, size))
            factors = torch.linalg.cholesky(covariance.diagonal(dim1=-4, dim2=-2).movedim(-1, -3))
        # From (draws, batch, count, *plates, size) to the shape of the site, with the components last.
        mean = mean.reshape(draws, batch, count, *site.plates, size).movedim(2, -2).movedim(1, place)
        factors = factors.reshape(-1, batch, count, *site.plates, size, size).movedim(2, -3).movedim(1, place)
        if count == 1:
            mean, factors = mean.squeeze(-2), factors.squeeze(-3)
        if len(factors) == 1:  # without a dimension of draws, for which matrices would be copied
            factors = factors.squeeze(0)
        if len(mean) == 1:  # no draw so far, or one without a plate of draws
            mean = mean.squeeze(0)
        fn = density(mean, factors, degrees)
        if count > 1:
            shares = log_share.reshape(-1, batch, *[1] * len(site.plates), count).movedim(1, place)
            shares = shares.squeeze(0) if len(shares) == 1 else shares
            fn = _mixture(shares.expand(fn.batch_shape), fn)
        transforms: list[Transform] = []
        if site.event != (size,):
            transforms.append(ReshapeTransform(torch.Size((size,)), torch.Size(site.event)))
        if site.transform is not None:
            transforms.append(site.transform)
        if transforms:
            fn = dist.TransformedDistribution(fn, transforms)
        with ExitStack() as stack:
            for frame in site.frames:
                stack.enter_context(plates[frame.name])
            value = pyro.sample(site.name, fn)
        if value.dim() - len(fn.event_shape) == self.target.depth:  # without a plate of draws
            value = value.unsqueeze(0)
        u = self.target.pack_value(site, value)
        # A positive latent may be rounded to zero or infinity; what is drawn given it is to stay finite.
        return u if site.transform is None else u.nan_to_num(posinf=_LARGEST, neginf=-_LARGEST)
