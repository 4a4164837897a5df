"""Whether a model is blurry: what is lost by spatial frequency, how sharp samples are, how wide p(x | z) is."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import elements_per_datum, take_rows
from pyrovae.diagnostics.base import (
    Diagnosis,
    beside_draws,
    check_at_least,
    expected_data,
    in_memory,
    look,
    observed_site,
)
from pyrovae.distributions import MaskedElements
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import trace_model

__all__ = ["Sharpness", "sharpness"]

_CHUNK = 2**20  # elements of the data, times draws, worked on at once
_NUM_BANDS = 8  # of spatial frequency, at most
_NUM_EXAMPLES = 8
_LOST = 0.5  # a band of which more of the power is error than not counts as lost
_STRUCTURE = 1.5  # an error of more than so many times the power of white noise has structure
_MISFIT = 1.25  # a scale that is off by more than this factor does not fit
_NOTHING = 0.95  # with more of all power lost than this, nothing was learned
_SOFT = 0.7  # images with less than this share of the data's Laplacian variance count as blurred


@dataclass(frozen=True)
class Sharpness(Diagnosis):
    r"""Where in the spectrum a model loses its data, and how sharp what it makes is beside them.

    Args:
        frequency: centre of each band of spatial frequencies, in cycles per pixel, shape ``(bands,)``.
        power: power of the data about their mean in each band, per element; sums to their variance.
        error: power of x less the decoded mean in each band, per element; sums to the mean squared error.
        share: share of all frequencies that is in each band, which white noise has of its power.
        laplacian: variance of the Laplacian over the pixels of each datum, shape ``(batch,)``, of the "data", of their
            "reconstructions", and of samples from the prior: of the "means" of p(x | z) and of "draws" from it.
        width: root mean square of the standard deviation of p(x | z), in the units of the data; None where it has none.
        residual: root mean square of x less the decoded mean, in the units of the data.
        examples: the first of each of what `laplacian` is of, ``(n, channels, *pixels)``.
        site: the observed site.
        num_data: how many data were looked at.
    """

    frequency: Tensor
    power: Tensor
    error: Tensor
    share: Tensor
    laplacian: dict[str, Tensor]
    width: float | None
    residual: float
    examples: dict[str, Tensor]
    site: str
    num_data: int

    @property
    def lost(self) -> Tensor:
        """Share of the data's power that is error, shape ``(bands,)``: 1 if no better than the mean, NaN of none."""
        # Bands in which no datum differs from another hold nothing but rounding.
        return torch.where(self.power > 1e-10 * self.power.sum(), self.error / self.power, math.nan)

    @property
    def ratio(self) -> float | None:
        """How many times as wide p(x | z) is as its residuals; 1 if the scale fits."""
        return None if self.width is None or self.residual == 0 else self.width / self.residual

    @property
    def excess(self) -> Tensor:
        """Power of the error over that of white noise of the same total, shape ``(bands,)``; above 1 by structure."""
        return self.error / (self.error.sum() * self.share)

    @property
    def verdict(self) -> str:
        found = []
        lost = self.lost > _LOST
        structured = lost & (self.excess > _STRUCTURE)
        if self.power.sum() > 0 and self.error.sum() > _NOTHING * self.power.sum():
            found.append(
                f"Reconstructions tell no more than the mean datum: {self.error.sum() / self.power.sum():.0%} is lost, "
                "latents are not used. Start from a smaller scale, if there is one (likelihoods.Normal, scale=0.1), warm up "
                "(bounds.ELBO with beta=bounds.Linear) or keep free bits (bounds.FreeBits)"
            )
        elif bool(structured.any()):
            where = ", ".join(f"{f:.2f}" for f in self.frequency[structured])
            found.append(
                f"Blurry: more than half of the data's power is lost at {where} cycles per pixel, and what is lost has "
                "structure: a larger latent_dim, a lower beta in bounds.ELBO, or a convolutional decoder "
                "(nn.ResidualDeconvNet)"
            )
        if self.ratio is not None and self.ratio > _MISFIT:
            found.append(
                f"p(x | z) is {self.ratio:.2f} times as wide as the residuals, so that draws are noisy: learn its "
                "scale (likelihoods.Normal with learn_scale=True, likelihoods.OptimalNormal) and train longer"
            )
        elif self.ratio is not None and self.ratio < 1 / _MISFIT:
            found.append(
                f"p(x | z) is only {self.ratio:.2f} times as wide as the residuals, too sure of itself on these data: "
                "learn its scale (likelihoods.OptimalNormal), or stop earlier (fit with validation= and patience=)"
            )
        if found:
            return ". ".join(found) + "."
        means, draws = self._relative("means"), self._relative("draws")
        beside = f"samples have {means:.0%} of the data's sharpness in their means and {draws:.0%} in draws"
        if bool(lost.any()):
            return f"Not blurry: what reconstructions lose is white, as noise of the data is; {beside}."
        if means < _SOFT:
            return (
                f"Reconstructions are sharp, but {beside}: a prior nearer to the encoded data (priors.VampPrior, "
                "priors.FlowPrior), or a likelihood of several modes (likelihoods.DiscretizedLogisticMixture)."
            )
        return f"Not blurry: reconstructions keep detail; {beside}."

    def summary(self) -> dict[str, Any]:
        return {
            "num_data": self.num_data,
            "frequency": self.frequency.tolist(),
            "power": self.power.tolist(),
            "error": self.error.tolist(),
            "lost": [None if math.isnan(share) else share for share in self.lost.tolist()],
            "excess": [None if math.isnan(excess) else excess for excess in self.excess.tolist()],
            "laplacian": {name: values.mean().item() for name, values in self.laplacian.items()},
            "width": self.width,
            "residual": self.residual,
            "ratio": self.ratio,
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.sharpness import sharpness

        return sharpness(self, path)

    def __str__(self) -> str:
        columns = zip(self.frequency, self.power, self.error, self.lost, self.excess, strict=True)
        total, error = self.power.sum(), self.error.sum()
        rows = [(f"{f:.3f}", *rest) for f, *rest in columns]
        images = next(iter(self.examples.values())).dim() > 3
        rows.append(("all", total, error, error / total if total > 0 else math.nan, 1.0))
        lines = [
            f'sharpness of "{self.site}": {self.num_data:,} data, power per element about the mean datum',
            f"read as {'images' if images else 'sequences; shape=(height, width) reads them as images'}",
            "cycles per pixel   power of data   of error   share lost   error / white noise",
        ]
        for name, power, error, lost, excess in rows:
            lost = "-" if math.isnan(lost) else f"{lost:.0%}"
            lines.append(f"{name:>16}{power:16.4g}{error:11.4g}{lost:>13}{excess:22.2f}")
        lines.append("variance of the Laplacian   mean    error   of the data's")
        for name, values in self.laplacian.items():
            shown = {"means": "samples: means", "draws": "samples: draws"}.get(name, name)
            error = values.std() / math.sqrt(len(values))
            lines.append(f"{shown:22}{values.mean():10.4g}{error:9.2g}{self._relative(name):16.2f}")
        if self.width is not None:
            fits = "" if self.ratio is None else f": {self.ratio:.2f} times"
            lines.append(f"root mean square width of p(x | z) {self.width:.4g}, of residuals {self.residual:.4g}{fits}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])

    def _relative(self, name: str) -> float:
        data = self.laplacian["data"].mean().item()
        return self.laplacian[name].mean().item() / data if data > 0 else math.nan


@torch.no_grad()
def sharpness(
    model: Callable,
    guide: Callable,
    *args: Any,
    site: str | None = None,
    shape: tuple[int, ...] | None = None,
    num_draws: int = 1,
    **kwargs: Any,
) -> Sharpness:
    r"""Looks for blur: error by spatial frequency, sharpness of samples beside the data, and the width of p(x | z).

    .. math:: E_b = \frac{1}{N^2} \sum_{f \in b} \operatorname{E} \left| \mathcal{F}[x - \mu(z)]_f \right|^2, \qquad
        \sum_b E_b = \frac{1}{N} \operatorname{E} \lVert x - \mu(z) \rVert^2, \qquad z \sim q(z \mid x)

    The Fourier transform is over the last two dimensions of a datum of N pixels (the last, of a signal), those of one
    pixel aside; bands are rings of frequencies, and channels are averaged. :math:`\mu` is the mean of p(x | z). The
    share lost is :math:`E_b` over the same of x about the mean datum. Sharpness is the variance of the Laplacian over
    pixels, also of samples: z from the prior, of which there is one for each datum, with its context. Noise in the
    data counts as lost, but is white, and makes data sharper than any mean; binarising is such noise. Modules run in
    evaluation mode, data in chunks.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with; tensors have the data along their first dimension.
        site: name of the observed site to look at, for models with several.
        shape: shape of a datum where the model sees it flattened, ``(28, 28)`` for images of 784 columns.
        num_draws: draws of z per datum.
        **kwargs: as `args`.

    Returns:
        A :class:`Sharpness`.

    Raises:
        ValueError: when there are fewer than 2 data, `num_draws` is below 1, the model has several observed sites and
            none is named, a datum has fewer than 3 pixels along a dimension or not the elements of `shape`, elements
            are missing, or model and guide do not fit each other or the data.

    References:
        Modelling the Power Spectra of Natural Images: Statistics and Information, A. van der Schaaf and J. H. van
        Hateren, 1996, https://doi.org/10.1016/0042-6989(96)00002-8. Diatom Autofocusing in Brightfield Microscopy: A
        Comparative Study, J. L. Pech-Pacheco et al., 2000, https://doi.org/10.1109/ICPR.2000.903548. Simple and
        Effective VAE Training with Calibrated Decoders, O. Rybkin, K. Daniilidis and S. Levine, 2021,
        https://arxiv.org/abs/2006.13202.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 16), encoders.DiagonalNormal(16, 2))
    >>> found = sharpness(vae.model, vae.guide, torch.randn(50, 16), shape=(4, 4))
    >>> found.frequency.shape, round(found.width, 2)
    (torch.Size([6]), 1.0)
    """
    check_at_least("num_draws", num_draws, 1)
    args, kwargs, size = in_memory(2, "sharpness", args, kwargs)
    chunk = max(1, int(_CHUNK / (num_draws * elements_per_datum(args, kwargs, size))))
    parts = []
    with evaluation_mode():
        for start in range(0, size, chunk):
            part_args, part_kwargs = take_rows(slice(start, start + chunk), args, kwargs)
            structure, _, scored = look(model, guide, num_draws, *part_args, **part_kwargs)
            name = observed_site(scored, site)
            # Unconditioned from outside, a run of the model at no latents draws all of its sites.
            with poutine.uncondition():
                prior = trace_model(model, poutine.Trace(), structure, 1, *part_args, **part_kwargs)
            parts.append(_part(scored, prior, structure, name, shape))
    total = sum(len(part.power) for part in parts)
    mean = sum(part.sum_of_data for part in parts) / total
    frequency, band = _bands(mean.shape[1:], mean.device)
    error = torch.cat([part.error for part in parts]).mean(0)
    variance = sum(part.variance for part in parts) / total
    return Sharpness(
        frequency=frequency,
        power=(torch.cat([part.power for part in parts]).mean(0) - _power(mean.unsqueeze(0), band)[0]).clamp_min(0),
        error=error,
        share=torch.bincount(band.flatten()) / band.numel(),
        laplacian={key: torch.cat([part.laplacian[key] for part in parts]) for key in parts[0].laplacian},
        width=math.sqrt(variance) if math.isfinite(variance) else None,
        residual=error.sum().sqrt().item(),
        examples=parts[0].examples,
        site=name,
        num_data=total,
    )


class _Part(NamedTuple):
    """What is kept of some of the data."""

    sum_of_data: Tensor
    power: Tensor  # of each datum, (batch, bands)
    error: Tensor
    laplacian: dict[str, Tensor]
    variance: float  # of p(x | z), summed over data
    examples: dict[str, Tensor]


def _part(
    scored: poutine.Trace, prior: poutine.Trace, structure: SiteStructure, site: str, shape: tuple[int, ...] | None
) -> _Part:
    node = scored.nodes[site]
    if isinstance(node["fn"], MaskedElements) and not bool(node["fn"].mask_of_elements.all()):
        raise ValueError(f'The data at site "{site}" lack elements, and a spectrum needs all. Give complete data.')
    pictures = {
        "data": beside_draws(node["value"], scored, structure, site)[:1],
        "reconstructions": expected_data(scored, structure, site),
        "means": expected_data(prior, structure, site),
        "draws": beside_draws(prior.nodes[site]["value"], prior, structure, site),
    }
    pictures = {name: _as_pictures(values, shape) for name, values in pictures.items()}
    x, residual = pictures["data"][0], pictures["data"] - pictures["reconstructions"]
    _, band = _bands(x.shape[2:], x.device)
    try:
        variance = node["fn"].variance.double().mean().item() * len(x)
    except NotImplementedError:  # a distribution may leave it undefined
        variance = math.nan
    return _Part(
        sum_of_data=x.sum(0),
        power=_power(x, band),
        error=_power(residual.flatten(0, 1), band).unflatten(0, residual.shape[:2]).mean(0),
        laplacian={name: _laplacian(values).mean(0) for name, values in pictures.items()},
        variance=variance,
        examples={name: values[0, :_NUM_EXAMPLES].float() for name, values in pictures.items()},
    )


def _as_pictures(x: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Returns data, ``(num_draws, batch, *x_shape)``, as doubles, ``(num_draws, batch, channels, *pixels)``."""
    x = x.double()
    if shape is not None:
        if math.prod(shape) != math.prod(x.shape[2:]):
            raise ValueError(
                f"shape {tuple(shape)} has {math.prod(shape)} elements, but a datum has {tuple(x.shape[2:])}."
            )
        x = x.reshape(*x.shape[:2], *shape)
    pixels = [n for n in x.shape[2:][-2:] if n > 1]
    if not pixels or min(pixels) < 3:
        raise ValueError(
            f"sharpness looks at the last two dimensions of a datum, which has shape {tuple(x.shape[2:])}: it needs at "
            "least 3 pixels along each (or 1, to leave it aside). Give images or signals, with shape= if they are flat."
        )
    return x.reshape(*x.shape[:2], -1, *pixels)


def _bands(pixels: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the mean frequency of each band, in cycles per pixel, and the band that each frequency is in."""
    axes = [torch.fft.fftfreq(n, dtype=torch.float64, device=device).square() for n in pixels]
    radius = (axes[0].unsqueeze(-1) + axes[1] if len(axes) == 2 else axes[0]).sqrt()
    band = (radius / radius.max() * _NUM_BANDS).long().clamp_max(_NUM_BANDS - 1)
    band[radius == 0] = -1  # brightness is a band of its own
    _, band = band.unique(return_inverse=True)  # small images leave some empty
    count = torch.bincount(band.flatten())
    return torch.bincount(band.flatten(), radius.flatten()) / count, band


def _power(x: Tensor, band: Tensor) -> Tensor:
    """Returns the power of ``(n, channels, *pixels)`` in each band, ``(n, bands)``; they sum to the mean square."""
    spectrum = torch.fft.fftn(x, dim=tuple(range(2, x.dim()))).abs().square().mean(1).flatten(1) / band.numel() ** 2
    return spectrum.new_zeros(len(x), int(band.max()) + 1).index_add(1, band.flatten(), spectrum)


def _laplacian(x: Tensor) -> Tensor:
    """Returns the variance over pixels, edges aside, of the Laplacian; the first two dimensions stay."""
    inner = [slice(1, -1)] * (x.dim() - 3)
    total = -2 * len(inner) * x[(..., *inner)]
    for i in range(len(inner)):
        for shift in (slice(0, -2), slice(2, None)):
            total = total + x[(..., *inner[:i], shift, *inner[i + 1 :])]
    return total.flatten(2).var(-1, correction=0)
