r"""What all estimators of log p(x) share: the result, with its reliability, and the base class."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrovae import notebooks
from pyrovae.inference.messages import described, is_integer
from pyrovae.inference.structure import SiteStructure
from pyrovae.recorded import NumbersChecked

if TYPE_CHECKING:
    from pyrovae.estimators.task import Task


_LEAST_ESS = 10.0  # below which a few weights are the sum, and their tail cannot be fitted
DISAGREEMENT = 4.0  # standard errors between two estimates of a datum: one datum in 16,000 by chance
_DISAGREEMENT_IF_HEAVY = 6.0  # the same, if one has weights with a heavy tail, whose error is stated too small


@dataclass(frozen=True)
class Estimate:
    r"""Estimates of :math:`\log p(x)` with their errors and diagnostics; every tensor has shape ``(batch,)``.

    Args:
        value: :math:`\log \hat p(x)` in nats.
        standard_error: of `value`, in nats, from the spread of the samples; NaN for a single sample. It does not
            include posterior mass that no sample has found: see `trusted`.
            For :class:`~pyrovae.estimators.Quadrature`, the change of the
            value when the number of points is halved.
        ess: effective sample size, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and the number of samples; NaN
            where nothing is sampled.
        khat: shape of the Pareto tail of the weights. Above 0.7 neither value nor error is to be trusted. Minus
            infinity when the weights in the tail are equal (to rounding), infinity when nearly all are zero, NaN for
            fewer than 21 samples and for discrete latents, where it means nothing.
        num_samples: samples per datum: weights, chains, runs or points.
        method: the estimator.
        diagnostics: further numbers of the estimator for each datum, by name.
        remedy: what to use for the data that are not to be trusted; empty where all are.
        sums: the sum of each datum's numbers, in the first argument that holds data, by which other data are noticed;
            None where they are not known.

    >>> from pyrovae.estimators import ImportanceSampling
    >>> one, half = torch.ones(2), torch.full((2,), 0.5)
    >>> method, remedy = ImportanceSampling(50), "Take more samples."
    >>> print(Estimate(torch.tensor([-1.0, -3.0]), half, one, one, 50, method, remedy=remedy))
    log p(x) = -2.000 nats a datum (standard error: 0.354 from 50 samples a datum, 1.000 from 2 data)
    Pareto k-hat above 0.7, not to be trusted: 2 of 2 data; modes that the guide misses are not seen. Take more samples.
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    method: "Estimator"
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    remedy: str = ""
    sums: Tensor | None = None

    @property
    def trusted(self) -> Tensor:
        """Whether the value and the error of each datum are to be trusted, as far as the estimator can see."""
        return self.method.trusts(self) & ~self.value.isnan() & (self.value < math.inf)

    def __str__(self) -> str:
        mean, sampling, spread = self._summary()
        value = f"{self.method.quantity} {self.method.relation} {mean:.3f} nats"
        error = f"standard error: {sampling:.3f} from {self.num_samples:,} {self.method.unit}"
        if len(self.value) > 1:
            value, error = f"{value} a datum", f"{error} a datum, {spread:.3f} from {len(self.value):,} data"
        return f"{value} ({error})\n{self._reliability()}"

    def _repr_html_(self) -> str:
        """Shows the mean, its errors and how far it can be trusted, in a notebook."""
        mean, sampling, spread = self._summary()
        names = [f"{self.method.quantity}, nats a datum", "standard error: samples", "data", "data trusted"]
        trusted = f"{int(self.trusted.sum()):,} of {len(self.value):,}"
        row = [f"{self.method.relation} {mean:.3f}", f"{sampling:.3f}", f"{spread:.3f}", trusted]
        return notebooks.table(names, [row]) + notebooks.preformatted(self._reliability())

    def _summary(self) -> tuple[float, float, float]:
        """Returns the mean, its standard error by the samples, and that by the spread of the data."""
        n = len(self.value)
        sampling = self.standard_error.square().sum().sqrt().item() / n
        return self.value.mean().item(), sampling, self.value.std().item() / math.sqrt(n) if n > 1 else math.nan

    def _reliability(self) -> str:
        return self.method.describe(self) + (f". {self.remedy}" if self.remedy else "")


class Estimator(NumbersChecked, ABC):
    r"""Base of the estimators of :math:`\log p(x)`; :func:`log_marginal` takes any of them.

    To add one, write :meth:`estimate`, which scores the data of a :class:`Task`, and :meth:`trusts` and
    :meth:`describe`, which say for which data the result is unreliable. Six class attributes: `unit` names what it
    draws, `quantity` what it estimates, `relation` is printed between that and the value, `needs_guide` says whether
    it uses the guide, `is_random` whether the result depends on random numbers, and `seconds` is a budget of time, if
    it keeps one.

    Args:
        num_samples: number of draws per datum, at least 1.
    """

    unit = "samples"
    quantity = "log p(x)"
    relation = "="
    needs_guide = True
    is_random = True
    seconds: float | None = None

    def __init__(self, num_samples: int):
        check_count("num_samples", num_samples)
        self.num_samples = int(num_samples)

    @abstractmethod
    def estimate(self, task: "Task") -> Estimate:
        """Scores all data of a task."""

    def prepare(self, task: "Task") -> "Task":
        """Returns the task that :meth:`estimate` works on: with discrete latents summed over, for some. Here itself."""
        return task

    def fit(self, task: "Task") -> "Estimator":
        """Returns the estimator with its proposal fitted to the data of a task, for several runs on these data.

        Here itself, for estimators without a proposal.
        """
        return self

    def trusts(self, estimate: Estimate) -> Tensor:
        """Returns whether each datum's value and error are to be trusted, ``(batch,)``; here by k-hat and ESS."""
        return (estimate.khat <= 0.7) & ~(estimate.ess < _LEAST_ESS)

    def describe(self, estimate: Estimate) -> str:
        """Returns the line on reliability that an estimate prints."""
        if self.num_samples < 21:
            return "Pareto k-hat, which shows unreliable data, is unknown below 21 samples a datum"
        untrusted = int((~estimate.trusted).sum())
        few = bool((~estimate.trusted & (estimate.khat <= 0.7) & (estimate.ess < _LEAST_ESS)).any())
        reason = f"Pareto k-hat above 0.7{f', or ESS below {_LEAST_ESS:g}' if few else ''}"
        return f"{reason}, not to be trusted: {untrusted:,} of {len(estimate.value):,} data"

    def remedy(self, structure: SiteStructure) -> str:
        """Returns what to use for data with an unreliable estimate, which depends on the kind of the latents."""
        if structure.latents == structure.discrete:
            return "Score them by method=Enumeration(), or AnnealedImportanceSampling() for many combinations."
        if structure.without_bijection:  # annealing cannot move these
            return "Draw more samples."
        return "Score them by method=UntilTrusted()."

    def __repr__(self) -> str:
        return described(self)


def join(method: Estimator, parts: list[Estimate]) -> Estimate:
    """Concatenates the estimates of several chunks of data."""
    sums = [part.sums for part in parts if part.sums is not None]
    return Estimate(
        value=torch.cat([part.value for part in parts]),
        standard_error=torch.cat([part.standard_error for part in parts]),
        ess=torch.cat([part.ess for part in parts]),
        khat=torch.cat([part.khat for part in parts]),
        num_samples=max(part.num_samples for part in parts),
        method=method,
        diagnostics={name: torch.cat([part.diagnostics[name] for part in parts]) for name in parts[0].diagnostics},
        sums=torch.cat(sums) if len(sums) == len(parts) else None,
    )


def is_higher(pilot: Estimate, value: Tensor, standard_error: Tensor) -> Tensor:
    """Returns for which data another unbiased estimate of p(x) is higher by more than chance: mass was missed there.

    Args:
        pilot: the other estimate.
        value: of log p(x) for the same data, in nats.
        standard_error: its standard errors.
    """
    spread = (pilot.standard_error.square() + standard_error.square()).sqrt()
    errors = torch.where(pilot.khat > 0.7, _DISAGREEMENT_IF_HEAVY, DISAGREEMENT)
    return pilot.value - value > errors * spread + math.sqrt(torch.finfo(value.dtype).eps)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a ValueError unless an argument is an integer of at least `least`."""
    if not is_integer(value):
        given = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be an integer of at least {least}, got {given}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_positive(name: str, value: float, largest: float = math.inf) -> None:
    """Raises a ValueError unless an argument is positive, finite and at most `largest`."""
    if not (0 < value <= largest and value < math.inf):
        most = "" if largest == math.inf else f" and at most {largest:g}"
        raise ValueError(f"{name} must be positive and finite{most}, got {value}.")
