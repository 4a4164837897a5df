"""Anomaly scores of each datum, and how well they separate a second set of data from the first."""

import math
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrovae.arguments import as_rows, named_arrays
from pyrovae.diagnostics.base import TABLE_WIDTH, Diagnosis, ReportInputs, check_at_least, in_memory
from pyrovae.estimators import Estimate, log_marginal
from pyrovae.plots.drawing import are_images, grid_of, new_figure, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AUROC", "Anomalies", "anomalies", "auroc"]

_NUM_LISTED = 5
_KHAT = 0.7
_MANY = 0.2  # share of the data with a larger k-hat that the verdict mentions
_ERRORS = 2  # standard errors: areas that differ less from 0.5 may be chance
_UNITS = {"likelihood": "-log p(x), nats", "complexity": "bits beyond zlib's", "typicality": "nats from the reference"}
_NUM_SHOWN = 12  # images


class AUROC(NamedTuple):
    """Area under the receiver operating characteristic, with its standard error; None where a set has one datum."""

    value: float
    standard_error: float | None


def auroc(usual: Tensor, unusual: Tensor) -> AUROC:
    r"""Probability that a score is larger for an unusual datum than for a usual one, ties counted half.

    .. math:: \hat A = \frac{1}{N M} \sum_{i=1}^N \sum_{j=1}^M
        \left(\mathbb{1}[s_i < t_j] + \tfrac12 \mathbb{1}[s_i = t_j]\right)

    Computed exactly, from ranks. The standard error is that of DeLong et al., from the variance of each datum's
    contribution; it is 0 if all pairs are in order, and then says nothing.

    Args:
        usual: scores :math:`s`, shape ``(n,)``.
        unusual: scores :math:`t`, shape ``(m,)``.

    Returns:
        An :class:`AUROC`.

    Raises:
        ValueError: when scores are not one-dimensional, are empty or hold NaN.

    References:
        Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves: A Nonparametric
        Approach, E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson, 1988, https://doi.org/10.2307/2531595.

    >>> auroc(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])).value
    0.75
    """
    for name, scores in (("usual", usual), ("unusual", unusual)):
        if scores.dim() != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be scores of shape (n,), n at least 1, got {tuple(scores.shape)}.")
        if bool(scores.isnan().any()):
            raise ValueError(f"{name} holds NaN, which has no rank, first at {int(scores.isnan().nonzero()[0])}.")
    # The share of the other set below each score; the mean over either set is the area.
    of_unusual, of_usual = _share_below(usual, unusual), 1 - _share_below(unusual, usual)
    error = None
    if min(len(usual), len(unusual)) > 1:
        error = math.sqrt(of_unusual.var().item() / len(unusual) + of_usual.var().item() / len(usual))
    return AUROC(of_unusual.mean().item(), error)


@dataclass(frozen=True)
class Anomalies(Diagnosis):
    """Anomaly scores of data, larger for more unusual data, and how well they separate a second set from the first.

    Args:
        log_marginal: log p(x) in nats, shape ``(batch,)``.
        khat: Pareto k-hat of its estimate, shape ``(batch,)``; above 0.7 it is not to be trusted.
        scores: by name, shape ``(batch,)``: "likelihood", minus log p(x) in nats; "complexity", the bits of the model
            minus those of a compressor; "typicality", the distance of log p(x) from the reference, in nats.
        reference: mean of log p(x) of the reference data, in nats.
        skipped: the reason if there is no score by complexity; otherwise empty.
        x: the data, ``(batch, *x_shape)``.
        auroc: by name of the score, how well it separates the other data from these; empty without other data.
        other: the scores of the other data, or None.
    """

    question: ClassVar[str] = "What is unusual?"

    log_marginal: Tensor
    khat: Tensor
    scores: dict[str, Tensor]
    reference: float
    skipped: str
    x: Tensor
    auroc: dict[str, AUROC]
    other: "Anomalies | None"

    def most_unusual(self, count: int, score: str = "likelihood") -> Tensor:
        """Returns the indices of the data with the largest scores, in descending order."""
        return self.scores[score].argsort(descending=True, stable=True)[:count]

    @property
    def verdict(self) -> str:
        if self.other is None:
            worst = ", ".join(map(str, self.most_unusual(_NUM_LISTED).tolist()))
            finding = f"Least likely: data {worst}; check if they are faulty or foreign, most_unusual(n) lists more"
            return f"{finding}{self._distrust}."
        best = max(self.auroc, key=lambda name: self.auroc[name].value)
        area, plain = self.auroc[best], self.auroc["likelihood"]
        shown = f"AUROC {_shown(area)}"
        if area.value - _ERRORS * (area.standard_error or 0) <= 0.5:
            text = f"No score separates the other data from these ({shown} by {best}): to the model they are alike"
        elif best == "likelihood":
            text = f"log p(x) separates the other data from these best, {shown}"
        else:
            text = f"The best separation is by {best}, {shown} (by log p(x) alone {plain.value:.3f})"
        if plain.value + _ERRORS * (plain.standard_error or 0) < 0.5:
            text += "; the other data are more likely than these, as simpler data often are: do not use log p(x)"
        return f"{text}{self._distrust}."

    @property
    def num_untrusted(self) -> int:
        """How many estimates of log p(x), of both sets, have a k-hat above 0.7 or none."""
        count = int((~(self.khat <= _KHAT)).sum())
        return count + (0 if self.other is None else self.other.num_untrusted)

    @property
    def _total(self) -> int:
        return len(self.khat) + (0 if self.other is None else len(self.other.khat))

    @property
    def _distrust(self) -> str:
        if self.num_untrusted <= _MANY * self._total:
            return ""
        return "; many estimates of log p(x) are too low: raise num_samples, or train a better encoder (FullRankNormal)"

    def numbers(self) -> dict[str, Any]:
        numbers = {
            "num_data": len(self.log_marginal),
            "mean_log_marginal": self.log_marginal.double().mean(),
            "reference_log_marginal": self.reference,
            "num_untrusted": self.num_untrusted,
            "most_unusual": {name: self.most_unusual(_NUM_LISTED, name) for name in self.scores},
        }
        if self.other is not None:
            numbers["num_other_data"] = len(self.other.log_marginal)
            numbers["mean_log_marginal_of_other"] = self.other.log_marginal.double().mean()
            numbers["auroc"] = {name: area._asdict() for name, area in self.auroc.items()}
        return numbers

    def draw(self) -> "Figure":
        """Draws the distribution of each score, ROC curves against other data, and the most and least likely data."""
        images = are_images(self.x)
        columns = len(self.scores) + (self.other is not None)
        figure = new_figure(3.6 * columns, 3.4 + 2 * images)
        above = below = figure
        if images:
            above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(3.4, 2))[:, 0]
        axes = above.subplots(1, columns, squeeze=False)[0]
        for ax, name in zip(axes, self.scores, strict=False):
            self._draw_scores(ax, name)
        axes[0].set_ylabel("density")
        if self.other is not None:
            axes[0].legend(fontsize="small")
            self._draw_roc(axes[-1], self.other.scores)
        if images:
            self._draw_examples(below.subplots(2, 1))
        return figure

    def _draw_scores(self, ax: "Axes", name: str) -> None:
        sets = {"data": self.scores[name]} | ({} if self.other is None else {"other data": self.other.scores[name]})
        finite = {label: values[values.isfinite()].cpu() for label, values in sets.items()}
        edges = torch.histogram(torch.cat(list(finite.values())), 40).bin_edges.tolist()
        for label, values in finite.items():
            ax.hist(values.numpy(), bins=edges, density=True, alpha=0.6, label=label)
        ax.set(xlabel=_UNITS[name], title=name)
        ax.set_yticks([])

    def _draw_roc(self, ax: "Axes", other: dict[str, Tensor]) -> None:
        for name, area in self.auroc.items():
            ax.plot(*_roc_curve(self.scores[name], other[name]), label=f"{name}, {area.value:.2f}")
        ax.plot([0, 1], [0, 1], color="grey", linewidth=0.5, linestyle="--")
        ax.set(xlabel="share of data taken for others", ylabel="share of others found", title="ROC, area below")
        ax.set(aspect="equal")
        ax.legend(fontsize="small", loc="lower right")

    def _draw_examples(self, axes: "list[Axes]") -> None:
        low, high = self.x.min(), self.x.max()
        order = self.most_unusual(len(self.x)).to(self.x.device)
        rows = {"least likely of the data": order[:_NUM_SHOWN], "most likely": order.flip(0)[:_NUM_SHOWN]}
        for ax, (title, chosen) in zip(axes, rows.items(), strict=True):
            show(ax, grid_of((self.x[chosen] - low) / (high - low).clamp_min(1e-12), len(chosen)))
            ax.set_axis_off()
            ax.set_title(title, fontsize="medium")

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Anomalies":
        return anomalies(inputs.model, inputs.guide, *inputs.args, other=inputs.other_args, reference=inputs.train_args)

    def table(self) -> list[str]:
        size = f"{len(self.log_marginal):,} data"
        if self.other is not None:
            size += f", {len(self.other.log_marginal):,} others"
        lines = [f"unusual data: {size}; larger scores are more unusual"]
        if self.other is None:
            lines.append(f"{'score':12}{'mean':>10}{'sd':>10}{'largest':>10}   data with the largest")
            for name, values in self.scores.items():
                worst = ", ".join(map(str, self.most_unusual(_NUM_LISTED, name).tolist()))
                spread = values.std().item() if len(values) > 1 else math.nan
                lines.append(f"{name:12}{values.mean():10.4g}{spread:10.4g}{values.max():10.4g}   {worst}")
        else:
            lines.append(f"{'score':12}{'mean':>12}{'mean of others':>18}{'AUROC':>20}")
            for name, values in self.scores.items():
                of_others = self.other.scores[name].mean()
                lines.append(f"{name:12}{values.mean():12.4g}{of_others:18.4g}{_shown(self.auroc[name]):>20}")
        if self.skipped:
            lines += textwrap.wrap(f"no score by complexity: {self.skipped}", TABLE_WIDTH)
        untrusted = f"{self.num_untrusted:,} of {self._total:,} data"
        return [*lines, f"Pareto k-hat above 0.7 or unknown, not to be trusted: {untrusted}"]


def anomalies(
    model: Callable,
    guide: Callable,
    *args: Any,
    other: tuple | Tensor | None = None,
    reference: tuple | Tensor | None = None,
    num_samples: int = 1000,
    progress: bool = True,
    **kwargs: Any,
) -> Anomalies:
    r"""Scores how unusual each datum is to a model, and how well the scores separate a second set of data.

    .. math:: s_{\mathrm{likelihood}} = -\log p(x), \qquad s_{\mathrm{complexity}} = -\log_2 p(x) - L(x), \qquad
        s_{\mathrm{typicality}} = \left| \log p(x) - \operatorname{E}_{\mathrm{ref}} \log p \right|

    Models assign a high likelihood to simple data, whatever they were trained on. L(x) corrects for that: the length of
    x in bits as compressed by zlib (DEFLATE at level 9, no header), each datum as bytes: grey values from 0 to 1
    rounded to 255ths, or integers as they are. It is coarse for data of a few hundred bytes or less. Other real numbers
    have no such score. Densities differ from probabilities of bytes by a constant, which does not change ranks. Data
    more likely than the reference are unusual too; typicality detects them. log p(x) is from
    :func:`pyrovae.log_marginal`.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: positional arguments of both, the data first.
        other: the arguments for a second set of data; a single one need not be in a tuple.
        reference: the arguments for the reference of typicality, the training data; the first set by default.
        num_samples: importance samples per datum.
        progress: whether to show a progress bar.
        **kwargs: keyword arguments of both, the same for all sets of data.

    Returns:
        An :class:`Anomalies`.

    Raises:
        ValueError: when there are no data, `num_samples` is below 1, a tensor is given by keyword with several sets of
            data, or no reference has a finite log p(x); and as in :func:`pyrovae.log_marginal`.

    References:
        Input Complexity and Out-of-Distribution Detection with Likelihood-Based Generative Models, J. Serrà et al.,
        2020, https://arxiv.org/abs/1909.11480; Detecting
        Out-of-Distribution Inputs to Deep Generative Models Using Typicality, E. Nalisnick, A. Matsukawa, Y. W. Teh and
        B. Lakshminarayanan, 2019, https://arxiv.org/abs/1906.02994.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> result = anomalies(vae.model, vae.guide, torch.randn(20, 3), other=torch.randn(9, 3) + 9, progress=False)
    >>> result.auroc["likelihood"].value
    1.0
    """
    check_at_least("num_samples", num_samples, 1)
    sets = {"data": args, "other": _as_args(other), "reference": _as_args(reference)}
    tensors = [name for name, x in named_arrays((), as_rows((), kwargs)[1]) if len(x.shape) > 0]
    if tensors and not (other is None and reference is None):
        raise ValueError(
            f"{tensors[0]} is given by keyword, but has the rows of a single set. Give it by position, in each set."
        )
    settled = {
        name: in_memory(1, "anomalies", model, given, kwargs)[:2] for name, given in sets.items() if given is not None
    }
    estimates = {
        name: log_marginal(model, guide, *args, num_samples=num_samples, progress=progress, **kwargs)
        for name, (args, kwargs) in settled.items()
    }
    usual = estimates.get("reference", estimates["data"]).value.double()
    usual = usual[usual.isfinite()]
    if len(usual) == 0:
        raise ValueError(
            "log p(x) of all reference data is minus infinity: no draw of the guide explains any. Train it."
        )
    center = usual.mean().item()
    x = [_data_of(*settled[name]) for name in ("data", "other") if name in estimates]
    compressed, skipped = _complexity(x)

    def result(i: int, estimate: Estimate) -> Anomalies:
        scores = _scores(estimate, compressed[i : i + 1], center)
        return Anomalies(estimate.value, estimate.khat, scores, center, skipped, x[i], auroc={}, other=None)

    first = result(0, estimates["data"])
    if other is None:
        return first
    second = result(1, estimates["other"])
    areas = {name: auroc(score, second.scores[name]) for name, score in first.scores.items()}
    return replace(first, auroc=areas, other=second)


def _scores(estimate: Estimate, compressed: list[Tensor], center: float) -> dict[str, Tensor]:
    log_p = estimate.value.double()
    scores = {"likelihood": -log_p}
    for bits in compressed:
        scores["complexity"] = -log_p / math.log(2) - bits.to(log_p.device)
    return scores | {"typicality": (log_p - center).abs()}


def _as_args(given: tuple | Tensor | None) -> tuple | None:
    return given if given is None or type(given) is tuple else (given,)


def _data_of(args: tuple, kwargs: dict) -> Tensor:
    return next(x if isinstance(x, Tensor) else x[:] for _, x in named_arrays(args, kwargs) if len(x.shape) > 0)


def _complexity(sets: list[Tensor]) -> tuple[list[Tensor], str]:
    """Returns the compressed size of each datum of each set in bits, or an empty list and the reason."""
    low, high = min(x.min().item() for x in sets), max(x.max().item() for x in sets)
    whole = all(bool((x == x.round()).all()) for x in sets)
    if low >= 0 and high <= 1:
        scale, dtype = 255, torch.uint8
    elif whole and low >= 0 and high <= 255:
        scale, dtype = 1, torch.uint8
    elif whole:
        scale, dtype = 1, torch.int32
    else:
        return [], f"data from {low:.3g} to {high:.3g} are neither grey values from 0 to 1 nor integers"
    return [torch.tensor([_bits(datum) for datum in (x * scale).round().to(dtype).cpu()]).double() for x in sets], ""


def _bits(datum: Tensor) -> int:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)  # negative: no header, no checksum
    return 8 * len(compressor.compress(datum.numpy().tobytes()) + compressor.flush())


def _share_below(scores: Tensor, at: Tensor) -> Tensor:
    """Returns the share of scores below each value of `at`, ties counted half."""
    scores = scores.double().sort().values
    at = at.double()
    below = torch.searchsorted(scores, at) + torch.searchsorted(scores, at, right=True)
    return below.double() / (2 * len(scores))


def _roc_curve(usual: Tensor, unusual: Tensor) -> tuple:
    """Returns the shares of both sets above each threshold, from none to all."""
    cuts = torch.cat([usual, unusual]).unique().flip(0)
    shares = [(scores.sort().values, len(scores)) for scores in (usual, unusual)]
    points = [1 - torch.searchsorted(ordered, cuts).double() / n for ordered, n in shares]
    return tuple(torch.cat([p.new_zeros(1), p]).cpu().numpy() for p in points)


def _shown(area: AUROC) -> str:
    return f"{area.value:.3f}" + ("" if area.standard_error is None else f" ± {area.standard_error:.3f}")
