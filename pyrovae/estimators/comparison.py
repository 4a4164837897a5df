r"""The difference of log p(x) between two models, with its errors."""

import math
from typing import NamedTuple

from torch import Tensor

from pyrovae.estimators.base import Estimate


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
    """

    differences: Tensor
    difference: float
    sampling_error: float
    data_error: float
    num_untrusted: int

    def __str__(self) -> str:
        n = len(self.differences)
        higher = int((self.differences > 0).sum())
        text = (
            f"log p(x) of the first less the second: {self.difference:+.3f} nats a datum (standard error: "
            f"{self.sampling_error:.3f} from samples, {self.data_error:.3f} from {n:,} data); "
            f"the first is higher for {higher:,}"
        )
        if self.num_untrusted:
            text += (
                f"\nnot to be trusted in one or both, so that the errors may be too small: {self.num_untrusted:,} data"
            )
        return text


def compare(first: Estimate, second: Estimate) -> Comparison:
    r"""Compares two models by estimates of log p(x) of the same data, in the same order and unit.

    .. math:: \bar d = \frac{1}{N} \sum_n d_n, \quad d_n = \log \hat p_1(x_n) - \log \hat p_2(x_n), \qquad
        s_{\text{samples}}^2 = \frac{1}{N^2} \sum_n \left(s_{1n}^2 + s_{2n}^2\right), \quad
        s_{\text{data}}^2 = \frac{1}{N (N - 1)} \sum_n \left(d_n - \bar d\right)^2

    Data that are hard for one model are mostly hard for the other, so that the spread of the differences is far smaller
    than that of the values, and so is the error of their mean. The draws of the two estimates are taken as independent.

    Args:
        first: the estimate of one model.
        second: the estimate of the other.

    Raises:
        ValueError: when the numbers of data differ, one of the estimates is an upper bound, or a value is not finite.

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
    if n != other:
        raise ValueError(
            f"first has {n:,} data and second {other:,}: give estimates of the same data, in the same order."
        )
    for name, estimate in (("first", first), ("second", second)):
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
    differences = first.value.double() - second.value.double().to(first.value.device)
    variances = first.standard_error.double().square() + second.standard_error.double().square().to(differences.device)
    return Comparison(
        differences,
        differences.mean().item(),
        variances.sum().sqrt().item() / n,
        differences.std().item() / math.sqrt(n) if n > 1 else math.nan,
        int((~(first.trusted & second.trusted.to(first.trusted.device))).sum()),
    )
