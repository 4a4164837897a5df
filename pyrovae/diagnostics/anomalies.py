"""What is unusual: scores of each datum by the model, and how well they tell a second set of data from the first."""

import math
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.arguments import as_tensors, named_tensors
from pyrovae.diagnostics.base import Diagnosis, check_at_least, finite_or_none, in_memory
from pyrovae.estimators import Estimate, log_marginal

__all__ = ["AUROC", "Anomalies", "anomalies", "auroc"]

_NUM_LISTED = 5
_KHAT = 0.7
_MANY = 0.2  # share of the data that may have such a k-hat without a word in the verdict
_ERRORS = 2  # areas that differ from a half by less than so many standard errors are chance


class AUROC(NamedTuple):
    """Area under the receiver operating characteristic, with its standard error; None where a set has one datum."""

    value: float
    standard_error: float | None


def auroc(usual: Tensor, unusual: Tensor) -> AUROC:
    r"""Probability that a score is larger for an unusual datum than for a usual one, ties counted half.

    .. math:: \hat A = \frac{1}{N M} \sum_{i=1}^N \sum_{j=1}^M
        \left(\mathbb{1}[s_i < t_j] + \tfrac12 \mathbb{1}[s_i = t_j]\right)

    Exactly, from ranks. The standard error is that of DeLong et al., from how much the part of each datum varies; it is
    0 where all pairs are in order, and then says nothing.

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
    # The share of the other set below each score: both parts have the area for their mean.
    of_unusual, of_usual = _share_below(usual, unusual), 1 - _share_below(unusual, usual)
    error = None
    if min(len(usual), len(unusual)) > 1:
        error = math.sqrt(of_unusual.var().item() / len(unusual) + of_usual.var().item() / len(usual))
    return AUROC(of_unusual.mean().item(), error)


@dataclass(frozen=True)
class Anomalies(Diagnosis):
    """Scores of data, the larger the more unusual, and how well they tell a second set from the first.

    Args:
        log_marginal: log p(x) in nats, shape ``(batch,)``.
        khat: Pareto k-hat of its estimate, shape ``(batch,)``; above 0.7 it is not to be trusted.
        scores: by name, shape ``(batch,)``: "likelihood", minus log p(x) in nats; "complexity", the bits that the model
            needs beyond a compressor; "typicality", how far log p(x) is from that of the reference, in nats.
        reference: mean of log p(x) of the reference data, in nats.
        skipped: why there is no score by complexity; empty if there is.
        x: the data, ``(batch, *x_shape)``.
        auroc: by name of the score, how well it tells the other data from these; empty without.
        other: the same of the other data, or None.
    """

    log_marginal: Tensor
    khat: Tensor
    scores: dict[str, Tensor]
    reference: float
    skipped: str
    x: Tensor
    auroc: dict[str, AUROC]
    other: "Anomalies | None"

    def most_unusual(self, count: int, score: str = "likelihood") -> Tensor:
        """Returns the numbers of the data with the largest scores, the largest first."""
        return self.scores[score].argsort(descending=True, stable=True)[:count]

    @property
    def verdict(self) -> str:
        if self.other is None:
            worst = ", ".join(map(str, self.most_unusual(_NUM_LISTED).tolist()))
            found = f"Least likely: data {worst}; see if they are faulty or foreign, most_unusual(n) lists more"
            return f"{found}{self._distrust}."
        best = max(self.auroc, key=lambda name: self.auroc[name].value)
        area, plain = self.auroc[best], self.auroc["likelihood"]
        shown = f"AUROC {_shown(area)}"
        if area.value - _ERRORS * (area.standard_error or 0) <= 0.5:
            text = f"No score tells the other data from these ({shown} by {best}): to the model they are alike"
        elif best == "likelihood":
            text = f"log p(x) tells the other data from these best, {shown}"
        else:
            text = f"Told apart best by {best}, {shown} (by log p(x) alone {plain.value:.3f})"
        if plain.value + _ERRORS * (plain.standard_error or 0) < 0.5:
            text += "; it finds the others more likely than its own, as models do simpler data: do not go by log p(x)"
        return f"{text}{self._distrust}."

    @property
    def num_untrusted(self) -> int:
        """How many estimates of log p(x), of both sets, have a k-hat above 0.7 or none."""
        own = int((~(self.khat <= _KHAT)).sum())
        return own + (0 if self.other is None else self.other.num_untrusted)

    @property
    def _distrust(self) -> str:
        total = len(self.khat) + (0 if self.other is None else len(self.other.khat))
        if self.num_untrusted <= _MANY * total:
            return ""
        return "; many estimates of log p(x) are too low: raise num_samples, or train a better encoder (FullRankNormal)"

    def summary(self) -> dict[str, Any]:
        summary = {
            "num_data": len(self.log_marginal),
            "mean_log_marginal": finite_or_none(self.log_marginal.double().mean().item()),
            "reference_log_marginal": self.reference,
            "num_untrusted": self.num_untrusted,
            "most_unusual": {name: self.most_unusual(_NUM_LISTED, name).tolist() for name in self.scores},
            "verdict": self.verdict,
        }
        if self.other is not None:
            summary["num_other_data"] = len(self.other.log_marginal)
            summary["mean_log_marginal_of_other"] = finite_or_none(self.other.log_marginal.double().mean().item())
            summary["auroc"] = {name: area._asdict() for name, area in self.auroc.items()}
        return summary

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.anomalies import anomalies

        return anomalies(self, path)

    def __str__(self) -> str:
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
                theirs = self.other.scores[name].mean()
                lines.append(f"{name:12}{values.mean():12.4g}{theirs:18.4g}{_shown(self.auroc[name]):>20}")
        if self.skipped:
            lines += textwrap.wrap(f"no score by complexity: {self.skipped}", 80)
        total = len(self.khat) + (0 if self.other is None else len(self.other.khat))
        lines.append(f"Pareto k-hat above 0.7 or unknown, not to be trusted: {self.num_untrusted:,} of {total:,} data")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])


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
    r"""Scores how unusual each datum is to a model, and how well that tells a second set of data from the first.

    .. math:: s_{\mathrm{likelihood}} = -\log p(x), \qquad s_{\mathrm{complexity}} = -\log_2 p(x) - L(x), \qquad
        s_{\mathrm{typicality}} = \left| \log p(x) - \operatorname{E}_{\mathrm{ref}} \log p \right|

    Models find simple data likely, whatever they were trained on. L(x) corrects for that: the length in bits of x
    as zlib compresses it (DEFLATE at level 9, no header), row by row, as bytes: grey values from 0 to 1 rounded to
    255ths, or whole numbers as they are. It is coarse for data of some hundred bytes or less. For
    other real numbers there is no such score. Densities are off by a constant from probabilities of bytes, which ranks
    do not see. What is likelier than the reference is unusual too,
    and typicality sees it. log p(x) is from :func:`pyrovae.log_marginal`.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with, the data first.
        other: what both are called with for a second set of data, to be told from the first.
        reference: the same for the data that typicality starts from, the training data; the first set if left out.
        num_samples: importance samples per datum.
        progress: whether to show a progress bar.
        **kwargs: what both are called with, the same for all sets of data.

    Returns:
        An :class:`Anomalies`.

    Raises:
        ValueError: when there are no data, `num_samples` is below 1, a tensor is given by keyword beside several sets
            of data, no reference has a finite log p(x), or :func:`pyrovae.log_marginal` refuses.

    References:
        Input Complexity and Out-of-Distribution Detection with Likelihood-Based Generative Models, J. Serrà et al.,
        2020, https://arxiv.org/abs/1909.11480; Detecting
        Out-of-Distribution Inputs to Deep Generative Models Using Typicality, E. Nalisnick, A. Matsukawa, Y. W. Teh and
        B. Lakshminarayanan, 2019, https://arxiv.org/abs/1906.02994.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> found = anomalies(vae.model, vae.guide, torch.randn(20, 3), other=torch.randn(9, 3) + 9, progress=False)
    >>> found.auroc["likelihood"].value
    1.0
    """
    check_at_least("num_samples", num_samples, 1)
    sets = {"data": args, "other": _as_args(other), "reference": _as_args(reference)}
    tensors = [name for name, value in named_tensors((), as_tensors((), kwargs)[1]) if value.dim() > 0]
    if tensors and not (other is None and reference is None):
        raise ValueError(
            f"{tensors[0]} is given by keyword, but has rows of one set alone. Give it by position, in each."
        )
    settled = {name: in_memory(1, "anomalies", given, kwargs)[:2] for name, given in sets.items() if given is not None}
    found = {
        name: log_marginal(model, guide, *args, num_samples=num_samples, progress=progress, **kwargs)
        for name, (args, kwargs) in settled.items()
    }
    usual = found.get("reference", found["data"]).value.double()
    usual = usual[usual.isfinite()]
    if len(usual) == 0:
        raise ValueError(
            "log p(x) of all reference data is minus infinity: no draw of the guide explains any. Train it."
        )
    center = usual.mean().item()
    x = [_data_of(*settled[name]) for name in ("data", "other") if name in found]
    compressed, skipped = _complexity(x)

    def of(i: int, estimate: Estimate) -> dict[str, Any]:
        scores = _scores(estimate, compressed[i : i + 1], center)
        shared = {"reference": center, "skipped": skipped, "x": x[i]}
        return {"log_marginal": estimate.value, "khat": estimate.khat, "scores": scores, **shared}

    own = of(0, found["data"])
    if other is None:
        return Anomalies(**own, auroc={}, other=None)
    theirs = Anomalies(**of(1, found["other"]), auroc={}, other=None)
    areas = {name: auroc(score, theirs.scores[name]) for name, score in own["scores"].items()}
    return Anomalies(**own, auroc=areas, other=theirs)


def _scores(estimate: Estimate, compressed: list[Tensor], center: float) -> dict[str, Tensor]:
    log_p = estimate.value.double()
    scores = {"likelihood": -log_p}
    for bits in compressed:
        scores["complexity"] = -log_p / math.log(2) - bits.to(log_p.device)
    return scores | {"typicality": (log_p - center).abs()}


def _as_args(given: tuple | Tensor | None) -> tuple | None:
    return given if given is None or type(given) is tuple else (given,)


def _data_of(args: tuple, kwargs: dict) -> Tensor:
    return next(t for _, t in named_tensors(args, kwargs) if t.dim() > 0)


def _complexity(sets: list[Tensor]) -> tuple[list[Tensor], str]:
    """Returns the bits that each datum of each set takes compressed, or none and why."""
    low, high = min(x.min().item() for x in sets), max(x.max().item() for x in sets)
    whole = all(bool((x == x.round()).all()) for x in sets)
    if 0 <= low and high <= 1:
        scale, dtype = 255, torch.uint8
    elif whole and 0 <= low and high <= 255:
        scale, dtype = 1, torch.uint8
    elif whole:
        scale, dtype = 1, torch.int32
    else:
        return [], f"data from {low:.3g} to {high:.3g} are neither grey values from 0 to 1 nor whole numbers"
    return [torch.tensor([_bits(datum) for datum in (x * scale).round().to(dtype).cpu()]).double() for x in sets], ""


def _bits(datum: Tensor) -> int:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)  # negative: no header, no checksum
    return 8 * len(compressor.compress(datum.numpy().tobytes()) + compressor.flush())


def _share_below(scores: Tensor, at: Tensor) -> Tensor:
    """Returns the share of scores that are below each of some others, ties counted half."""
    scores = scores.double().sort().values
    at = at.double()
    below = torch.searchsorted(scores, at) + torch.searchsorted(scores, at, right=True)
    return below.double() / (2 * len(scores))


def _shown(area: AUROC) -> str:
    return f"{area.value:.3f}" + ("" if area.standard_error is None else f" ± {area.standard_error:.3f}")
