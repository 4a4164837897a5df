"""Whether the encoder is calibrated: ranks of true latents among draws of the guide."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrovae.arguments import elements_per_datum, take_rows
from pyrovae.diagnostics.base import (
    Diagnosis,
    Latents,
    ReportInputs,
    check_at_least,
    in_memory,
    inspect_part,
    inspect_posterior,
    latents_of,
    names_of,
    with_values,
)
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.simulation import check_simulated, simulate
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import log_joint, trace_guide
from pyrovae.plots.drawing import new_figure
from pyrovae.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Calibration", "calibration"]

_LEVEL = 0.05  # of significance
_DEGREE = 4  # of the polynomials in the test of uniform ranks
_CHUNK = 2**22  # elements of the largest argument, times draws, processed at once
_NUM_LISTED = 12
_NARROW_SHAPE, _WIDE_SHAPE, _LOW, _HIGH = "too narrow", "too wide", "too low", "too high"
_IMPROBABLE, _PROBABLE, _EVEN, _UNEVEN = "draws too improbable", "draws too probable", "even", "uneven"
_REMEDIES = {
    _NARROW_SHAPE: "encoders.FullRankNormal, encoders.NeuralSplineFlow or bounds.IWAE against a narrow guide",
    _PROBABLE: "encoders.FullRankNormal, encoders.NeuralSplineFlow or bounds.IWAE against a narrow guide",
    _WIDE_SHAPE: "longer training or a larger encoder network",
    _LOW: "longer training or a larger encoder network",
    _HIGH: "longer training or a larger encoder network",
    _IMPROBABLE: "longer training, a larger encoder network, or a richer guide such as encoders.FullRankNormal",
    _UNEVEN: "a richer guide such as encoders.NeuralSplineFlow",
}


@dataclass(frozen=True, eq=False)
class Calibration(Diagnosis):
    r"""The ranks of true latents among the guide's draws.

    Args:
        names: the ranked quantities: each latent dimension, and "log p(x, z)" as the last; ``total`` of them.
        ranks: number of the guide's draws below the truth, from 0 to `num_draws`, shape ``(num_ranks, total)``.
        slope: trend of the ranks' frequencies (positive: the guide is too low), in standard errors, ``(total,)``.
        bowl: excess of extreme ranks (positive: the guide is too narrow), in standard errors, ``(total,)``.
        p_value: probability of ranks at least as uneven under an exact guide, shape ``(total,)``.
        adjusted_p_value: p-value adjusted by Holm's method for testing all quantities, shape ``(total,)``.
        shapes: what the ranks of each quantity mean, in words.
        num_draws: draws of the guide per datum.
    """

    question: ClassVar[str] = "Is the encoder calibrated?"

    names: tuple[str, ...]
    ranks: Tensor
    slope: Tensor
    bowl: Tensor
    p_value: Tensor
    adjusted_p_value: Tensor
    shapes: tuple[str, ...]
    num_draws: int

    @property
    def uneven(self) -> Tensor:
        """Which quantities have ranks that are not uniform, at a level of 5% for all together; shape ``(total,)``."""
        return self.adjusted_p_value < _LEVEL

    @property
    def verdict(self) -> str:
        uneven = [shape for shape, bad in zip(self.shapes, self.uneven.tolist(), strict=True) if bad]
        data = f"in {len(self.ranks):,} data drawn from the model itself (not in your data)"
        if not uneven:
            return f"No sign that the guide is wrong {data}; smaller faults need more num_rounds."
        counts = {shape: uneven.count(shape) for shape in dict.fromkeys(uneven)}
        listed = ", ".join(f"{shape} ({count})" for shape, count in counts.items())
        remedies = list(dict.fromkeys(_REMEDIES[shape] for shape in counts))
        return (
            f"The guide is wrong in {len(uneven)} of {len(self.names)} quantities, {data}: {listed}. "
            f"Try {'; '.join(remedies)}."
        )

    def table(self) -> list[str]:
        order = self.p_value.argsort().tolist()
        shown = order[:_NUM_LISTED]
        lines = [
            f"Ranks of the truth among {self.num_draws} draws of the guide, {len(self.ranks):,} simulated data",
            f"{'quantity':14}{'mean rank':>10}{'slope':>8}{'bowl':>8}{'p':>9}{'Holm p':>9}  shape",
        ]
        mean = self.ranks.double().mean(0) / self.num_draws
        for i in shown:
            lines.append(
                f"{self.names[i][:13]:14}{mean[i]:10.3f}{self.slope[i]:+8.1f}{self.bowl[i]:+8.1f}"
                f"{self.p_value[i]:9.2g}{self.adjusted_p_value[i]:9.2g}  {self.shapes[i]}"
            )
        if len(order) > len(shown):
            lines.append(f"... and {len(order) - len(shown)} with larger p")
        lines.append("mean rank: 0.5 if right; slope, bowl: in standard errors")
        return lines

    def numbers(self) -> dict[str, Any]:
        """Returns the number of quantities with uneven ranks, and the numbers of each quantity."""
        return {
            "num_ranks": len(self.ranks),
            "num_draws": self.num_draws,
            "num_uneven": self.uneven.sum(),
            "quantities": {
                name: {
                    "slope": self.slope[i],
                    "bowl": self.bowl[i],
                    "p_value": self.p_value[i],
                    "adjusted_p_value": self.adjusted_p_value[i],
                    "shape": self.shapes[i],
                }
                for i, name in enumerate(self.names)
            },
        }

    def draw(self) -> "Figure":
        """Draws histograms of the ranks of log p(x, z) and of the dimensions with the smallest p-values."""
        n, total = self.ranks.shape
        shown = [total - 1, *(i for i in self.p_value.argsort().tolist() if i < total - 1)][:_NUM_LISTED]
        columns = min(4, len(shown))
        height = math.ceil(len(shown) / columns)
        figure = new_figure(max(2.7 * columns, 5), 2.2 * height + 0.5)
        axes = figure.subplots(height, columns, squeeze=False).flatten()
        bins = next(bins for bins in (20, 10, 5) if n >= 10 * bins)
        edges = np.round(np.linspace(0, self.num_draws + 1, bins + 1))
        share = np.diff(edges) / (self.num_draws + 1)
        spread = 2.576 * np.sqrt((1 - share) / (n * share))
        ranks = self.ranks.cpu().numpy()
        for ax, i in zip(axes, shown, strict=False):
            count, _ = np.histogram(ranks[:, i], edges)
            colour = "C3" if self.uneven[i] else "C0"
            ax.stairs(count / (n * share), edges, fill=True, color=colour, alpha=0.7)
            for bound in (1 + spread, 1 - spread):
                ax.stairs(bound, edges, baseline=None, color="black", linestyle=":", linewidth=1)
            ax.axhline(1, color="black", linewidth=0.5)
            ax.set_ylim(0, max(2.0, 1.05 * (count / (n * share)).max()))
            ax.set_xlim(0, self.num_draws + 1)
            ax.set_title(f"{self.names[i]}: {self.shapes[i]}", fontsize=9)
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        figure.supxlabel(f"rank of the truth among {self.num_draws} draws of the guide", fontsize=9)
        figure.supylabel("frequency, 1 if right", fontsize=9)
        left_out = f"; {total - len(shown)} with larger p are left out" if total > len(shown) else ""
        figure.suptitle(
            f"{n:,} data from the model; between the dotted lines: 99% of bars, if right{left_out}", fontsize=9
        )
        return figure

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Calibration":
        return calibration(inputs.model, inputs.guide, *inputs.args, num_rounds=-(-300 // len(inputs.x)))


@torch.no_grad()
def calibration(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 99,
    num_rounds: int = 1,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    r"""Ranks true latents among the guide's draws, for data simulated from the model; uniform if the guide is exact.

    .. math:: z, x \sim p(x, z), \quad z_l \sim q(z \mid x), \qquad
        r = \sum_{l=1}^L 1[f(x, z_l) < f(x, z)] \sim \mathrm{Uniform}\{0, \dots, L\}
        \ \text{ if } q(z \mid x) = p(z \mid x)

    with each latent dimension as :math:`f`, and :math:`\log p(x, z)`, which alone detects a guide that ignores the data
    and draws from the prior. Ties, of discrete latents, are broken at random. The test statistic is the sum of squares
    of the ranks' components along orthogonal polynomials of degrees 1 to 4 (Neyman's smooth test); the first is the
    slope, the second the bowl. Under an exact guide it is chi-square with 4 degrees of freedom.

    This tests the guide on data from the model: if the model is far from your data, a guide can be right on the one and
    wrong on the other. Uniform ranks are no proof: faults that cancel over the data remain hidden.

    Args:
        model: a Pyro model, called with the same arguments as the guide, which observes some of them.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; the same number is simulated. What the model does not
            observe (a context) stays the same.
        num_draws: draws of the guide per datum :math:`L`, at least 19.
        num_rounds: number of simulations of the whole data.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Calibration`.

    Raises:
        ValueError: when an argument is out of range; fewer than 50 data are simulated; the model observes none of its
            arguments; model and guide do not match each other or the data; or a latent is outside the data plate.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, S. Talts, M. Betancourt, D. Simpson,
        A. Vehtari and A. Gelman, 2018, https://arxiv.org/abs/1804.06788; Simulation-Based Calibration Checking for
        Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity, M. Modrák et al., 2023,
        https://arxiv.org/abs/2211.02383; "Smooth Test" for Goodness of Fit, J. Neyman, 1937,
        https://doi.org/10.1080/03461238.1937.10404821.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> calibration(vae.model, vae.guide, torch.zeros(60, 3), progress=False).names
    ('z[0]', 'z[1]', 'log p(x, z)')
    """
    check_at_least("num_draws", num_draws, 19)
    check_at_least("num_rounds", num_rounds, 1)
    args, kwargs, size = in_memory(1, "calibration", model, args, kwargs)
    if size * num_rounds < 50:
        raise ValueError(
            f"calibration needs at least 50 simulated data, got {size} data in num_rounds={num_rounds}. Set num_rounds "
            f"to {math.ceil(50 / size)} or more."
        )
    chunk = max(1, int(_CHUNK / ((num_draws + 1) * elements_per_datum(args, kwargs, size))))
    inspect_part(model, guide, slice(0, 2), args, kwargs)  # a guide with parameters per row cannot take simulated data
    parts = []
    with evaluation_mode(), tqdm(desc="ranks", total=size * num_rounds, unit="datum", disable=not progress) as bar:
        for _ in range(num_rounds):
            for start in range(0, size, chunk):
                part_args, part_kwargs = take_rows(slice(start, start + chunk), args, kwargs)
                structure = inspect_posterior(model, guide, slice(start, start + chunk), args, kwargs)
                latents, ranked = _ranks(model, guide, structure, num_draws, part_args, part_kwargs)
                parts.append(ranked)
                bar.update(len(ranked))
    ranks = torch.cat(parts)
    components = (_polynomials(num_draws, _DEGREE)[ranks.cpu()].sum(0) / math.sqrt(len(ranks))).to(ranks.device)
    p_value = torch.special.gammaincc(torch.tensor(_DEGREE / 2).double(), components.square().sum(-1).cpu() / 2)
    adjusted = _holm(p_value)
    slope, bowl = components[:, 0].cpu(), components[:, 1].cpu()
    kinds = [
        "discrete" if name in structure.discrete else "latent"
        for name, columns in latents.columns.items()
        for _ in range(columns.start, columns.stop)
    ]
    shapes = tuple(
        _shape(kind, *numbers)
        for kind, *numbers in zip([*kinds, "density"], adjusted.tolist(), slope.tolist(), bowl.tolist(), strict=True)
    )
    names = (*names_of(latents.columns), "log p(x, z)")
    return Calibration(names, ranks, slope, bowl, p_value, adjusted, shapes, num_draws)


def _ranks(
    model: Callable, guide: Callable, structure: SiteStructure, num_draws: int, args: tuple, kwargs: dict
) -> tuple[Latents, Tensor]:
    """Simulates latents and data; returns latents of the guide, the true ones last, and the ranks of the true ones."""
    truth, args, kwargs = simulate(model, structure, *args, **kwargs)
    check_simulated(model, truth, structure, args, kwargs)
    drawn = trace_guide(guide, structure, num_draws + 1, *args, **kwargs)
    # The truth replaces the last draw: scored separately, equal latents would differ by rounding.
    values = {}
    for name, site in sample_sites(drawn).items():
        if name in structure.latents:
            values[name] = site["value"].clone()
            values[name][-1] = truth.nodes[name]["value"]
    drawn = with_values(drawn, values)
    latents = latents_of(drawn, structure)
    log_p = log_joint(model, drawn, structure, num_draws + 1, *args, **kwargs)
    quantities = torch.cat([latents.values, log_p.unsqueeze(-1).to(latents.values)], dim=-1)
    draws, true = quantities[:-1], quantities[-1]
    resolution = 16 * torch.finfo(true.dtype).eps * (1 + true.abs())
    below, tied = (draws < true - resolution).sum(0), ((draws - true).abs() <= resolution).sum(0)
    return latents, below + (torch.rand_like(true) * (tied + 1)).long()


def _polynomials(top: int, degree: int) -> Tensor:
    """Returns polynomials of degrees 1 to `degree` on the integers 0 to `top`, ``(top + 1, degree)``.

    They are orthonormal under the uniform distribution, and positive at the top.
    """
    grid = torch.linspace(-1, 1, top + 1, dtype=torch.float64)
    q, _ = torch.linalg.qr(grid.unsqueeze(-1) ** torch.arange(degree + 1))
    return (q * q[-1].sign() * math.sqrt(top + 1))[:, 1:]


def _holm(p_value: Tensor) -> Tensor:
    """Adjusts p-values for multiple tests by Holm's method."""
    ordered, order = p_value.sort()
    stepped = (ordered * torch.arange(len(p_value), 0, -1)).cummax(0).values.clamp(max=1)
    return torch.empty_like(p_value).scatter_(0, order, stepped)


def _shape(kind: str, p_value: float, slope: float, bowl: float) -> str:
    """Returns in words what the ranks of a quantity of kind "latent", "discrete" or "density" mean."""
    if p_value >= _LEVEL:
        return _EVEN
    if kind == "discrete" or max(abs(slope), abs(bowl)) < 2:
        return _UNEVEN
    if kind == "density":
        return (_IMPROBABLE if slope > 0 else _PROBABLE) if abs(slope) >= abs(bowl) else _UNEVEN
    if abs(slope) >= abs(bowl):
        return _LOW if slope > 0 else _HIGH
    return _NARROW_SHAPE if bowl > 0 else _WIDE_SHAPE
