"""Whether a model is blurry: error by spatial frequency, sharpness of samples, and width of p(x | z)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import elements_per_datum, take_rows
from pyrovae.diagnostics.base import (
    Diagnosis,
    ReportInputs,
    check_at_least,
    data_second,
    expected_data,
    in_memory,
    observed_site,
)
from pyrovae.distributions import MaskedElements
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import inspect_samples, trace_guide, trace_model
from pyrovae.plots.drawing import are_images, grid_of, new_figure, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Sharpness", "sharpness"]

_CHUNK = 2**20  # elements of the data, times draws, worked on at once
_NUM_BANDS = 8  # of spatial frequency, at most
_NUM_EXAMPLES = 8
_LOST = 0.5  # a band with a larger share of error in its power counts as lost
_STRUCTURE = 1.5  # an error above this multiple of the power of white noise has structure
_MISFIT = 1.25  # a scale that is off by more than this factor does not fit
_NOTHING = 0.95  # with a larger share of all power lost, nothing was learned
_SOFT = 0.7  # images with a smaller share of the data's Laplacian variance count as blurred
_NAMES = {
    "data": "data",
    "reconstructions": "reconstructions",
    "means": "samples: means of p(x | z)",
    "draws": "samples: draws of p(x | z)",
}


@dataclass(frozen=True)
class Sharpness(Diagnosis):
    r"""The error of a model by spatial frequency, and the sharpness of its reconstructions and samples.

    Args:
        frequency: centre of each band of spatial frequencies, in cycles per pixel, shape ``(bands,)``.
        power: power of the data about their mean in each band, per element; sums to their variance.
        error: power of x minus the decoded mean in each band, per element; sums to the mean squared error.
        share: share of all frequencies in each band, which is the share of the power of white noise.
        laplacian: variance of the Laplacian over the pixels of each datum, shape ``(batch,)``, for the "data", their
            "reconstructions", and samples from the prior: the "means" of p(x | z) and "draws" from it.
        width: root mean square of the standard deviation of p(x | z), in the units of the data; None if undefined.
        residual: root mean square of x minus the decoded mean, in the units of the data.
        examples: the first images of each kind in `laplacian`, ``(n, channels, *pixels)``.
        site: the observed site.
        num_data: number of data.
    """

    question: ClassVar[str] = "Is it blurry?"

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
        """Error over the data's power, shape ``(bands,)``: 1 if no better than the mean, NaN without power."""
        # Bands in which the data do not differ hold only rounding.
        return torch.where(self.power > 1e-10 * self.power.sum(), self.error / self.power, math.nan)

    @property
    def ratio(self) -> float | None:
        """The width of p(x | z) over the residual, which is 1 if the scale fits."""
        return None if self.width is None or self.residual == 0 else self.width / self.residual

    @property
    def excess(self) -> Tensor:
        """Power of the error over that of white noise with the same total, ``(bands,)``; above 1 for structure."""
        return self.error / (self.error.sum() * self.share)

    @property
    def verdict(self) -> str:
        findings = []
        lost = self.lost > _LOST
        structured = lost & (self.excess > _STRUCTURE)
        if self.power.sum() > 0 and self.error.sum() > _NOTHING * self.power.sum():
            findings.append(
                f"Reconstructions are no better than the mean datum: {self.error.sum() / self.power.sum():.0%} is "
                "lost, latents are not used. Start from a smaller scale, if there is one (likelihoods.Normal, "
                "scale=0.1), warm up (bounds.ELBO with beta=bounds.Linear) or keep free bits (bounds.FreeBits)"
            )
        elif bool(structured.any()):
            where = ", ".join(f"{f:.2f}" for f in self.frequency[structured])
            findings.append(
                f"Blurry: more than half of the data's power is lost at {where} cycles per pixel, and the error has "
                "structure: a larger latent_dim, a lower beta in bounds.ELBO, or a convolutional decoder "
                "(nn.ResidualDeconvNet)"
            )
        if self.ratio is not None and self.ratio > _MISFIT:
            findings.append(
                f"p(x | z) is {self.ratio:.2f} times as wide as the residuals, so that draws are noisy: learn its "
                "scale (likelihoods.Normal with learn_scale=True, likelihoods.OptimalNormal) and train longer"
            )
        elif self.ratio is not None and self.ratio < 1 / _MISFIT:
            findings.append(
                f"p(x | z) is only {self.ratio:.2f} times as wide as the residuals, overconfident on these data: "
                "learn its scale (likelihoods.OptimalNormal), or stop earlier (fit with validation= and patience=)"
            )
        if findings:
            return ". ".join(findings) + "."
        means, draws = self._relative("means"), self._relative("draws")
        samples = f"samples have {means:.0%} of the data's sharpness in their means and {draws:.0%} in draws"
        if bool(lost.any()):
            return f"Not blurry: the error of reconstructions is white, like noise in the data; {samples}."
        if means < _SOFT:
            return (
                f"Reconstructions are sharp, but {samples}: a prior closer to the encoded data (priors.VampPrior, "
                "priors.FlowPrior), or a likelihood with several modes (likelihoods.DiscretizedLogisticMixture)."
            )
        return f"Not blurry: reconstructions keep detail; {samples}."

    def numbers(self) -> dict[str, Any]:
        return {
            "num_data": self.num_data,
            "frequency": self.frequency,
            "power": self.power,
            "error": self.error,
            "lost": self.lost,
            "excess": self.excess,
            "laplacian": {name: values.mean() for name, values in self.laplacian.items()},
            "width": self.width,
            "residual": self.residual,
            "ratio": self.ratio,
        }

    def draw(self) -> "Figure":
        """Draws spectra, the share lost, the sharpness of each kind of picture, and some pictures of each kind."""
        images = are_images(self.examples["data"])
        figure = new_figure(11, 5.4 if images else 6.5)
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 0.65 if images else 1))[:, 0]
        spectrum, lost, sharp = above.subplots(1, 3)
        self._draw_spectra(spectrum, lost)
        self._draw_sharpness(sharp)
        self._draw_examples(list(below.subplots(2, 2).flat), images)
        return figure

    def _draw_spectra(self, spectrum: "Axes", lost: "Axes") -> None:
        frequency = self.frequency.cpu().numpy()
        spectrum.plot(frequency, self.power.cpu().numpy(), marker="o", markersize=3, label="data about their mean")
        spectrum.plot(frequency, self.error.cpu().numpy(), marker="o", markersize=3, label="x minus decoded mean")
        white = self.error.sum() * self.share
        spectrum.plot(frequency, white.cpu().numpy(), color="grey", linewidth=0.8, linestyle="--", label="white noise")
        spectrum.set(xlabel="cycles per pixel", ylabel="power per element in the band", yscale="log", title="spectra")
        spectrum.legend(fontsize="small")
        lost.plot(frequency, self.lost.cpu().numpy(), marker="o", markersize=3, color="C1")
        lost.axhline(1, color="grey", linewidth=0.5, linestyle="--")
        title = "share lost (1: no better than the mean)"
        lost.set(xlabel="cycles per pixel", ylabel="error / power of the data", title=title)
        lost.set_ylim(0, 1.5)  # how far the error is above the mean datum's says nothing about blur

    def _draw_sharpness(self, ax: "Axes") -> None:
        names, values = list(self.laplacian), [v.cpu() for v in self.laplacian.values()]
        ax.barh(
            range(len(names)),
            [v.mean().item() for v in values],
            xerr=[2 * v.std().item() / math.sqrt(len(v)) for v in values],
            color=["C0", "C1", "C2", "C2"],
            capsize=3,
        )
        ax.set_yticks(range(len(names)), [_NAMES[name].replace(": ", ":\n") for name in names])
        ax.invert_yaxis()
        ax.set(xlabel="variance of the Laplacian (± 2 errors)", title="sharpness")

    def _draw_examples(self, axes: list["Axes"], images: bool) -> None:
        # All kinds on the scale on which the data go from 0 to 1.
        low, high = self.examples["data"].min(), self.examples["data"].max()
        values = torch.cat([x.flatten() for x in self.examples.values()])
        limits = values.min().item(), values.max().item()
        for i, (ax, name) in enumerate(zip(axes, self.laplacian, strict=True)):
            x = self.examples[name]
            if images:
                show(ax, grid_of((x - low) / (high - low).clamp_min(1e-12), len(x)))
                ax.set_axis_off()
            else:
                x = x.cpu()
                x = x[:, 0] if x.dim() == 3 else x.flatten(1)
                ax.plot(x.T.numpy(), linewidth=0.7, alpha=0.7, color=f"C{i}")
                ax.set(xlabel="pixel", ylim=limits)
            ax.set_title(_NAMES[name], fontsize="small")

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Sharpness":
        return sharpness(inputs.model, inputs.guide, *inputs.args)

    def table(self) -> list[str]:
        columns = zip(self.frequency, self.power, self.error, self.lost, self.excess, strict=True)
        total, error = self.power.sum(), self.error.sum()
        rows = [(f"{f:.3f}", *rest) for f, *rest in columns]
        images = next(iter(self.examples.values())).dim() > 3
        rows.append(("all", total, error, error / total if total > 0 else math.nan, 1.0))
        lines = [
            f'sharpness of "{self.site}": {self.num_data:,} data, power per element about the mean datum',
            f"taken as {'images' if images else 'sequences; shape=(height, width) takes them as images'}",
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
        return lines

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
    r"""Looks for blur: error by spatial frequency, sharpness of samples and of data, and the width of p(x | z).

    .. math:: E_b = \frac{1}{N^2} \sum_{f \in b} \operatorname{E} \left| \mathcal{F}[x - \mu(z)]_f \right|^2, \qquad
        \sum_b E_b = \frac{1}{N} \operatorname{E} \lVert x - \mu(z) \rVert^2, \qquad z \sim q(z \mid x)

    The Fourier transform is over the last two dimensions of a datum of N pixels (the last, for a signal), without
    dimensions of one pixel; bands are rings of frequencies, and channels are averaged. :math:`\mu` is the mean of
    p(x | z). The share lost is :math:`E_b` over the same for x about the mean datum. Sharpness is the variance of the
    Laplacian over pixels. One sample is drawn from the prior for each datum, with its context. Noise in the data counts
    as lost, but is white, and makes data sharper than any mean; binarisation is such noise. Modules run in evaluation
    mode, data in chunks.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; other objects are passed on.
        site: name of the observed site to look at, for models with several.
        shape: shape of a datum if the model takes it flattened, ``(28, 28)`` for images of 784 columns.
        num_draws: draws of z per datum.
        **kwargs: as `args`.

    Returns:
        A :class:`Sharpness`.

    Raises:
        ValueError: when there are fewer than 2 data, `num_draws` is below 1, the model has several observed sites and
            none is named, a datum has fewer than 3 pixels along a dimension or another size than `shape`, elements are
            missing, or model and guide do not match each other or the data.

    References:
        Modelling the Power Spectra of Natural Images: Statistics and Information, A. van der Schaaf and J. H. van
        Hateren, 1996, https://doi.org/10.1016/0042-6989(96)00002-8. Diatom Autofocusing in Brightfield Microscopy: A
        Comparative Study, J. L. Pech-Pacheco et al., 2000, https://doi.org/10.1109/ICPR.2000.903548. Simple and
        Effective VAE Training with Calibrated Decoders, O. Rybkin, K. Daniilidis and S. Levine, 2021,
        https://arxiv.org/abs/2006.13202.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 16), encoders.DiagonalNormal(16, 2))
    >>> result = sharpness(vae.model, vae.guide, torch.randn(50, 16), shape=(4, 4))
    >>> result.frequency.shape, round(result.width, 2)
    (torch.Size([6]), 1.0)
    """
    check_at_least("num_draws", num_draws, 1)
    args, kwargs, size = in_memory(2, "sharpness", model, args, kwargs)
    chunk = max(1, int(_CHUNK / (num_draws * elements_per_datum(args, kwargs, size))))
    parts = []
    with evaluation_mode():
        for start in range(0, size, chunk):
            part_args, part_kwargs = take_rows(slice(start, start + chunk), args, kwargs)
            structure = inspect_samples(model, guide, *part_args, **part_kwargs)
            drawn = trace_guide(guide, structure, num_draws, *part_args, **part_kwargs)
            scored = trace_model(model, drawn, structure, num_draws, *part_args, **part_kwargs)
            name = observed_site(scored, site)
            # Unconditioned, and replayed against an empty trace, the model draws all of its sites.
            with poutine.uncondition():
                prior = trace_model(model, poutine.Trace(), structure, 1, *part_args, **part_kwargs)
            parts.append(_part(scored, prior, structure, name, shape))
    total = sum(len(part.power) for part in parts)
    mean = reduce(torch.add, [part.sum_of_data for part in parts]) / total
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
    """What a chunk of the data contributes to the result."""

    sum_of_data: Tensor
    power: Tensor  # of each datum, (batch, bands)
    error: Tensor
    laplacian: dict[str, Tensor]
    variance: float  # of p(x | z), summed over data
    examples: dict[str, Tensor]


def _part(
    scored: poutine.Trace, prior: poutine.Trace, structure: SiteStructure, site: str, shape: tuple[int, ...] | None
) -> _Part:
    node, drawn = sample_sites(scored)[site], sample_sites(prior)[site]
    if isinstance(node["fn"], MaskedElements) and not bool(node["fn"].mask_of_elements.all()):
        raise ValueError(f'The data at site "{site}" lack elements, but a spectrum needs all. Give complete data.')
    pictures = {
        "data": data_second(node["value"], scored, structure, site)[:1],
        "reconstructions": expected_data(scored, structure, site),
        "means": expected_data(prior, structure, site),
        "draws": data_second(drawn["value"], prior, structure, site),
    }
    pictures = {name: _as_pictures(values, shape) for name, values in pictures.items()}
    x, residual = pictures["data"][0], pictures["data"] - pictures["reconstructions"]
    _, band = _bands(x.shape[2:], x.device)
    try:
        variance = node["fn"].variance.double().mean().item() * len(x)
    except NotImplementedError:  # some distributions do not define it
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
            "least 3 pixels along each (or 1, to ignore it). Give images or signals, with shape= if they are flat."
        )
    return x.reshape(*x.shape[:2], -1, *pixels)


def _bands(pixels: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the mean frequency of each band, in cycles per pixel, and the band that each frequency is in."""
    axes = [torch.fft.fftfreq(n, dtype=torch.float64, device=device).square() for n in pixels]
    radius = (axes[0].unsqueeze(-1) + axes[1] if len(axes) == 2 else axes[0]).sqrt()
    band = (radius / radius.max() * _NUM_BANDS).long().clamp_max(_NUM_BANDS - 1)
    band[radius == 0] = -1  # brightness has its own band
    _, band = band.unique(return_inverse=True)  # small images leave some bands empty
    count = torch.bincount(band.flatten())
    return torch.bincount(band.flatten(), radius.flatten()) / count, band


def _power(x: Tensor, band: Tensor) -> Tensor:
    """Returns the power of ``(n, channels, *pixels)`` in each band, ``(n, bands)``; bands sum to the mean square."""
    spectrum = torch.fft.fftn(x, dim=tuple(range(2, x.dim()))).abs().square().mean(1).flatten(1) / band.numel() ** 2
    return spectrum.new_zeros(len(x), int(band.max()) + 1).index_add(1, band.flatten(), spectrum)


def _laplacian(x: Tensor) -> Tensor:
    """Returns the variance of the Laplacian over the inner pixels of ``(num_draws, batch, channels, *pixels)``."""
    inner = [slice(None)] * 3 + [slice(1, -1)] * (x.dim() - 3)
    total = -2 * (x.dim() - 3) * x[tuple(inner)]
    for i in range(3, x.dim()):
        for shift in (slice(0, -2), slice(2, None)):
            total = total + x[(*inner[:i], shift, *inner[i + 1 :])]
    return total.flatten(2).var(-1, correction=0)
