r"""The difference of log p(x) between two models, with its errors."""

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributions import StudentT

from pyrovae import notebooks
from pyrovae.estimators.base import Estimate
from pyrovae.inference.messages import warn
from pyrovae.plots.comparisons import comparisons
from pyrovae.plots.drawing import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = ("the first", "the second")
_FEW = 10  # data below which their spread says too little
_FAR = 40.0  # standard errors beyond which a probability is 1 in double precision, for so many data
_ROUNDING = 1e-4  # of the sum of a datum's numbers, in single precision and in others
_CLEAR = 0.975  # probability from which one model is called better


class Comparison(NamedTuple):
    r"""The difference of :math:`\log p(x)` between two estimates of the same data, from :func:`compare`.

    Args:
        differences: the first minus the second, for each datum, ``(batch,)`` in nats.
        difference: their mean.
        sampling_error: standard error of the mean that comes from the samples: how well the mean over these data is
            known.
        data_error: standard error of the mean as an estimate for all data that these are drawn from, by their spread;
            the noise of the samples is a part of that spread.
        num_untrusted: data for which at least one of the estimates is not to be trusted.
        first: the values of the first, ``(batch,)`` in nats.
        second: the values of the second, ``(batch,)`` in nats.
        trusted: whether both are to be trusted, ``(batch,)``.
        names: what the two are called.
        quantity: what was estimated.
    """

    differences: Tensor
    difference: float
    sampling_error: float
    data_error: float
    num_untrusted: int
    first: Tensor
    second: Tensor
    trusted: Tensor
    names: tuple[str, str] = _NAMES
    quantity: str = "log p(x)"

    @property
    def probability(self) -> float:
        r"""How probable it is that the first is better for all data that these are drawn from; NaN for few data.

        By Student's t distribution of the mean over its `data_error`, without prior knowledge of the difference. It
        counts the errors of the samples as far as they are known: not the data that are not to be trusted.
        """
        n = len(self.differences)
        if n < _FEW:
            return math.nan
        if self.data_error == 0:
            return 0.5 + 0.5 * ((self.difference > 0) - (self.difference < 0))
        t = max(-_FAR, min(self.difference / self.data_error, _FAR))
        density = StudentT(torch.tensor(n - 1.0, dtype=torch.double)).log_prob
        line = torch.linspace(0.0, abs(t), 2001, dtype=torch.double)
        return 0.5 + math.copysign(torch.trapezoid(density(line).exp(), line).item(), t)

    @property
    def verdict(self) -> str:
        """Which of the two is better for all data that these are drawn from, and how sure that is, in one line."""
        better = self.names[0] if self.difference > 0 else self.names[1]
        p = max(self.probability, 1 - self.probability)
        if math.isnan(p):
            return f"{len(self.differences):,} data are too few to say which is better for others"
        sure = "more than 99.9 %" if p > 0.999 else f"{100 * p:.1f} %"
        if p < _CLEAR:
            return (
                f"not clear which is better: {better} is with a probability of {sure}, less than the "
                f"{100 * _CLEAR:g} % that count as clear"
            )
        return f"{better} is better by {abs(self.difference):.3f} nats a datum, with a probability of {sure}"

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws both values of each datum, and a histogram of the differences; writes the picture if a path is given.

        Returns:
            A matplotlib figure.
        """
        return comparisons([self], path)

    def _repr_html_(self) -> str:
        """Shows the text and the picture, in a notebook."""
        return notebooks.preformatted(str(self)) + notebooks.picture(self.plot())

    def __str__(self) -> str:
        n = len(self.differences)
        higher = int((self.differences > 0).sum())
        text = (
            f"{self.quantity} of {self.names[0]} less {self.names[1]}: {self.difference:+.3f} nats a datum (standard "
            f"error: {self.sampling_error:.3f} from samples, {self.data_error:.3f} from {n:,} data); "
            f"{self.names[0]} is higher for {higher:,}\n{self.verdict}"
        )
        if self.num_untrusted:
            text += (
                f"\nnot to be trusted in one or both, so that the errors may be too small: {self.num_untrusted:,} data"
            )
        return text


class Ranking(NamedTuple):
    """Estimates of several models for the same data, best first, with all their pairs, from :func:`compare_all`.

    Args:
        estimates: by the names of the models, from the highest mean to the lowest.
        pairs: the comparison of each pair, the better one first.
    """

    estimates: dict[str, Estimate]
    pairs: list[Comparison]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws each pair as :meth:`Comparison.plot`, one below the other; writes the picture if a path is given.

        Returns:
            A matplotlib figure.
        """
        return comparisons(self.pairs, path)

    def _repr_html_(self) -> str:
        """Shows the text and the picture, in a notebook."""
        return notebooks.preformatted(str(self)) + notebooks.picture(self.plot())

    def __str__(self) -> str:
        number = {name: i + 1 for i, name in enumerate(self.estimates)}
        quantity = next(iter(self.estimates.values())).method.quantity
        lines = [f"{'':3} {'model':28} {quantity:>16} {'samples':>8} {'data':>8} {'untrusted':>9}"]
        for name, estimate in self.estimates.items():
            n = len(estimate.value)
            sampling = estimate.standard_error.double().square().sum().sqrt().item() / n
            spread = estimate.value.double().std().item() / math.sqrt(n) if n > 1 else math.nan
            lines.append(
                f"{number[name]:>2}. {shortened(name, 28):28} {estimate.value.double().mean().item():>16.3f} "
                f"{sampling:>8.3f} {spread:>8.3f} {int((~estimate.trusted).sum()):>9,}"
            )
        lines += [
            "",
            f"{'pair':10} {'difference':>10} {'samples':>8} {'data':>8} {'untrusted':>9}   the first is better",
        ]
        for pair in self.pairs:
            here = f"{number[pair.names[0]]} less {number[pair.names[1]]}"
            p = pair.probability
            sure = "too few data" if math.isnan(p) else "over 99.9 %" if p > 0.999 else f"{100 * p:.1f} %"
            lines.append(
                f"{here:10} {pair.difference:>+10.3f} {pair.sampling_error:>8.3f} {pair.data_error:>8.3f} "
                f"{pair.num_untrusted:>9,}   {sure}"
            )
        lines += ["", "nats a datum; standard errors from samples and data; probability for all data"]
        if any(pair.num_untrusted for pair in self.pairs):
            lines.append("where data are untrusted, differences may be wrong and errors too small")
        return "\n".join(lines)


def compare_all(estimates: Mapping[str, Estimate]) -> Ranking:
    """Compares several models by estimates of log p(x) of the same data, each pair as :func:`compare` does.

    Args:
        estimates: by the names of the models, at least two.

    Raises:
        ValueError: when there are fewer than two, and as :func:`compare`.

    >>> from pyrovae.estimators import ImportanceSampling
    >>> zeros, method = torch.zeros(20), ImportanceSampling(50)
    >>> values = {"a": torch.arange(20) / 10, "b": torch.arange(20) / 10 + 1, "c": torch.arange(20) / 5}
    >>> ranking = compare_all({name: Estimate(x, zeros, zeros, zeros, 50, method) for name, x in values.items()})
    >>> list(ranking.estimates), [pair.names for pair in ranking.pairs]
    (['b', 'c', 'a'], [('b', 'c'), ('b', 'a'), ('c', 'a')])
    """
    if len(estimates) < 2:
        raise ValueError(f"estimates must hold at least two models, got {len(estimates)}.")
    for (a, first), (b, second) in combinations(estimates.items(), 2):
        compare(first, second, names=(a, b))  # before they are put in order: some values may not be finite
    ranked = dict(sorted(estimates.items(), key=lambda item: -item[1].value.double().mean().item()))
    pairs = [compare(ranked[a], ranked[b], names=(a, b)) for a, b in combinations(ranked, 2)]
    return Ranking(ranked, pairs)


def compare(first: Estimate, second: Estimate, names: tuple[str, str] = _NAMES) -> Comparison:
    r"""Compares two models by estimates of log p(x) of the same data, in the same order and unit.

    .. math:: \bar d = \frac{1}{N} \sum_n d_n, \quad d_n = \log \hat p_1(x_n) - \log \hat p_2(x_n), \qquad
        s_{\text{samples}}^2 = \frac{1}{N^2} \sum_n \left(s_{1n}^2 + s_{2n}^2\right), \quad
        s_{\text{data}}^2 = \frac{1}{N (N - 1)} \sum_n \left(d_n - \bar d\right)^2

    Data that are hard for one model are mostly hard for the other, so that the spread of the differences is far smaller
    than that of the values, and so is the error of their mean. The draws of the two estimates are taken as independent.
    It warns where the numbers of a datum were not the same, as far as their sum tells.

    Args:
        first: the estimate of one model.
        second: the estimate of the other.
        names: what to call the two.

    Raises:
        ValueError: when the numbers of data or the quantities differ, one of the estimates is an upper bound, or a
            value is not finite.

    References:
        Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC, A. Vehtari, A. Gelman and J.
        Gabry, 2017, https://arxiv.org/abs/1507.04544 (section 5, standard errors of paired differences).

    >>> import pyrovae, torch
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> x = torch.randn(50, 3)
    >>> a, b = (pyrovae.log_marginal(vae.model, vae.guide, x, num_samples=n, progress=False) for n in (100, 1000))
    >>> comparison = compare(a, b)
    >>> comparison.sampling_error > 0, comparison.differences.shape
    (True, torch.Size([50]))
    """
    n, other = len(first.value), len(second.value)
    called = ("first", "second") if names == _NAMES else names
    if n != other:
        raise ValueError(
            f"{called[0]} has {n:,} data and {called[1]} {other:,}: give estimates of the same data, in the same order."
        )
    quantity, of_other = first.method.quantity, second.method.quantity
    if quantity != of_other:
        raise ValueError(f"{called[0]} estimates {quantity} and {called[1]} {of_other}: give estimates of the same.")
    for name, estimate in zip(called, (first, second), strict=True):
        if estimate.method.relation != "=":
            raise ValueError(
                f"{name} is an upper bound of log p(x), by {estimate.method}: a difference says nothing. Take an "
                "estimator of log p(x), such as estimators.UntilTrusted()."
            )
        bad = (~estimate.value.isfinite()).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"log p(x) of {name} is {estimate.value[row].item()} for {len(bad):,} data, at row {row} of the data "
                "first. Leave them out of both."
            )
    if first.sums is not None and second.sums is not None and len(first.sums) == len(second.sums) == n:
        apart = (first.sums - second.sums.to(first.sums.device)).abs() > _ROUNDING * (1 + first.sums.abs())
        rows = apart.nonzero()
        if len(rows):
            warn(
                f"{called[0]} and {called[1]} were given other numbers for {len(rows):,} of {n:,} data, at row "
                f"{int(rows[0])} first. Differences say something of the same data alone, in the same order and unit, "
                "binarised once for both."
            )
    value, of_second = first.value.double(), second.value.double().to(first.value.device)
    differences = value - of_second
    variances = first.standard_error.double().square() + second.standard_error.double().square().to(differences.device)
    trusted = first.trusted & second.trusted.to(first.trusted.device)
    return Comparison(
        differences,
        differences.mean().item(),
        variances.sum().sqrt().item() / n,
        differences.std().item() / math.sqrt(n) if n > 1 else math.nan,
        int((~trusted).sum()),
        value,
        of_second,
        trusted,
        names,
        quantity,
    )
