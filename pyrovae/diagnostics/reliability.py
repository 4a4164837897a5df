"""Whether importance sampling with the guide can be trusted: the tails of its weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrovae.diagnostics.base import Diagnosis, ReportInputs, check_at_least, in_memory
from pyrovae.estimators import log_marginal
from pyrovae.plots.drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Reliability", "reliability"]

_SHARE = 0.05  # of the data: fewer with a large k-hat may be chance
_GROUPS = ("below 0.5, good", "0.5 to 0.7, usable", "above 0.7, not to be trusted")  # by k-hat


@dataclass(frozen=True, eq=False)
class Reliability(Diagnosis):
    """How good a proposal the guide is for each datum.

    Args:
        khat: shape of the Pareto tail of the importance weights, as in :class:`pyrovae.Estimate`, shape ``(batch,)``.
        ess: effective sample size, between 1 and `num_samples`, shape ``(batch,)``.
        num_samples: samples per datum.

    >>> print(Reliability(torch.tensor([0.1, 0.6]), torch.tensor([80.0, 20.0]), 100).verdict)
    The guide is a good proposal: k-hat is above 0.7 for 0 of 2 data.
    """

    question: ClassVar[str] = "Can importance sampling be trusted?"

    khat: Tensor
    ess: Tensor
    num_samples: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of data with a k-hat below 0.5 (good), from 0.5 to 0.7 (usable), and above (not to be trusted)."""
        low, high = int((self.khat < 0.5).sum()), int((~(self.khat <= 0.7)).sum())
        return low, len(self.khat) - low - high, high

    @property
    def verdict(self) -> str:
        bad = f"k-hat is above 0.7 for {self.counts[2]:,} of {len(self.khat):,} data"
        if self.counts[2] <= _SHARE * len(self.khat):
            return f"The guide is a good proposal: {bad}."
        return (
            f"The guide misses mass of the posterior: {bad}, whose log p(x) is likely to be too low. A richer guide "
            "(encoders.FullRankNormal, encoders.NeuralSplineFlow), bounds.IWAE, or a larger num_samples reduces their "
            "number."
        )

    def table(self) -> list[str]:
        n, lines = len(self.khat), [f"Importance weights of the guide, {self.num_samples:,} samples a datum"]
        lines += [
            f"k-hat {name:30}{count:8,} of {n:,} ({count / n:.0%})"
            for name, count in zip(_GROUPS, self.counts, strict=True)
        ]
        quantiles = zip(("5%", "25%", "50%", "75%", "95%"), self._ess_quantiles(), strict=True)
        lines.append("ESS quantiles: " + "  ".join(f"{name} {value:,.1f}" for name, value in quantiles))
        lines.append("worst data:    " + "  ".join(f"{i} ({self.khat[i]:.2f})" for i in self._worst(5)))
        return lines

    def numbers(self) -> dict[str, Any]:
        """Returns counts by k-hat, quantiles of the effective sample size, and the worst data by index."""
        return {
            "num_data": len(self.khat),
            "num_samples": self.num_samples,
            **dict(zip(("good", "usable", "untrusted"), self.counts, strict=True)),
            "ess_quantiles": self._ess_quantiles(),
            "worst": [{"datum": i, "khat": self.khat[i], "ess": self.ess[i]} for i in self._worst(5)],
        }

    def draw(self) -> "Figure":
        """Draws a histogram of k-hat, and the effective sample size of each datum against its k-hat."""
        low, high = -0.5, 1.5  # k-hat is infinite for equal weights and for lost data
        khat = self.khat.cpu().double().clamp(low, high).numpy()
        figure = new_figure(9, 3.5)
        left, right = figure.subplots(1, 2)
        for ax in (left, right):
            ax.set_xticks(np.arange(low, high + 0.1, 0.5))
        colours = ("C0", "C1", "C3")
        for start, stop, name, colour, count in zip(
            (low, 0.5, 0.7), (0.5, 0.7, high), _GROUPS, colours, self.counts, strict=True
        ):
            bins = np.arange(round(start / 0.05), round(stop / 0.05) + 1) * 0.05
            inside = (khat >= start) & ((khat < stop) | (stop == high))
            left.hist(khat[inside], bins, color=colour, alpha=0.7, label=f"{name}: {count:,}")
            right.scatter(khat[inside], self.ess.cpu().numpy()[inside], s=8, color=colour, alpha=0.7, linewidths=0)
        left.set(xlabel="Pareto k-hat (the ends hold all beyond)", ylabel="data", xlim=(low, high))
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        right.axhline(self.num_samples, color="grey", linewidth=0.5, linestyle="--")
        label = f"effective of {self.num_samples:,} samples"
        right.set(xlabel="Pareto k-hat", ylabel=label, yscale="log", xlim=(low - 0.05, high + 0.05))
        return figure

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Reliability":
        return reliability(inputs.model, inputs.guide, *inputs.args)

    def _ess_quantiles(self) -> list[float]:
        return self.ess.double().quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).to(self.ess).double()).tolist()

    def _worst(self, count: int) -> list[int]:
        return self.khat.argsort(descending=True)[:count].tolist()


def reliability(
    model: Callable, guide: Callable, *args: Any, num_samples: int = 1000, progress: bool = True, **kwargs: Any
) -> Reliability:
    r"""Counts the data for which the guide is a good proposal, by the Pareto tails of the importance weights.

    .. math:: \Pr(w > t) \propto t^{-1 / \hat k} \ \text{ for large } t, \qquad
        w = \frac{p(x, z)}{q(z \mid x)}, \quad z \sim q(z \mid x)

    For a k-hat below 0.5 the weights have a finite variance, and log p(x) its usual error; above 0.7 no practical
    number of samples finds the mass that the guide misses. An exact guide has equal weights and a k-hat of minus
    infinity.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; other objects are passed on.
        num_samples: samples per datum, at least 21; more samples make k-hat more precise.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Reliability`.

    Raises:
        ValueError: when `num_samples` is below 21, and as in :func:`pyrovae.log_marginal`.

    References:
        Pareto Smoothed Importance Sampling, A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, 2024,
        https://arxiv.org/abs/1507.02646; Yes, but Did It Work?: Evaluating Variational Inference, Y. Yao, A. Vehtari,
        D. Simpson and A. Gelman, 2018, https://arxiv.org/abs/1802.02538.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> reliability(vae.model, vae.guide, torch.zeros(5, 3), num_samples=100, progress=False).khat.shape
    torch.Size([5])
    """
    check_at_least("num_samples", num_samples, 21)
    args, kwargs, _ = in_memory(1, "reliability", model, args, kwargs)
    estimate = log_marginal(model, guide, *args, num_samples=num_samples, progress=progress, **kwargs)
    return Reliability(estimate.khat, estimate.ess, num_samples)
