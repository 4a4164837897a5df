r"""log_conditional: estimates of log p(x_a | x_b), of some parts of the data given others."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyrovae import arguments
from pyrovae.estimators.base import Estimate, Estimator, join
from pyrovae.estimators.givens import GIVEN, Given, Place, condition, part_of, site_mask
from pyrovae.estimators.laplace import MAX_DIM, Laplace
from pyrovae.estimators.marginal import log_marginal
from pyrovae.estimators.newton import num_real_latents
from pyrovae.estimators.proposals import Guide, Mixed, Prior, Proposal, WeightedGuide
from pyrovae.estimators.task import Task
from pyrovae.estimators.weighted import (
    WeightSums,
    apportion,
    chunk_sizes,
    draw_mixture,
    log_mixture,
    slice_trace,
    split_and_fit,
    with_doubts,
)
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import log_prob_of, per_datum, trace_model


def log_conditional(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    given: Given,
    num_samples: int | None = None,
    proposal: Proposal | None = None,
    method: Estimator | None = None,
    max_memory: float = 64e6,
    progress: bool = True,
    **kwargs: Any,
) -> Estimate:
    r"""Estimates :math:`\log p(x_a \mid x_b)` per datum, of a part of the data given the rest of it.

    .. math:: \log \hat p(x_a \mid x_b) = \log \frac{\sum_k w_k}{\sum_k v_k}, \qquad
        w_k = \frac{p(x_a, x_b, z_k)}{q(z_k)}, \quad v_k = \frac{p(x_b, z_k)}{q(z_k)}, \quad z_k \sim q

    Both marginals are estimated from the same draws, so that much of their noise cancels. The standard error is that of
    the logarithm of a ratio of means, by the delta method. Since :math:`p(z \mid x_b)` is wider than
    :math:`p(z \mid x)`, half of the draws are from the proposal for all data, and half from the same proposal for
    :math:`x_b` alone. Where the guide takes a mask of the observed elements, as that of a
    :class:`~pyrovae.structures.MissingDataVAE`, it is run at :math:`x_b`.

    What is given is checked: at fixed latents its density must not depend on the rest, as it does where a decoder reads
    the elements before. Elements that a model masks itself, such as missing ones, are in neither part.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide; may be None for a `proposal` or a `method` that does not use it.
        *args: data, as :func:`pyrovae.log_marginal` takes them.
        given: :math:`x_b`, where the rest of what the model observes is :math:`x_a`: a boolean mask, True where x is
            given, which broadcasts to the shape of a datum, or has a row for each datum; the name of an observed site,
            or a list of such names; or a dict of sites, with a mask or a bool for each. Sites that are not named are
            not given.
        num_samples: samples per datum, 1,000 by default.
        proposal: what both halves are drawn from. By default a mixture, for continuous latents of
            :class:`~pyrovae.estimators.Laplace`, the guide and the prior, for others of the guide and the prior.
        method: an estimator, such as ``AnnealedImportanceSampling()`` or ``Enumeration()``, for both marginals, each
            with its own draws, in place of the common draws.
        max_memory: budget for intermediate results, in bytes.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        An :class:`~pyrovae.Estimate` of :math:`\log p(x_a \mid x_b)`, which is trusted where both marginals are: `khat`
        is the larger one, `ess` the smaller one. Its diagnostics are "log_joint" and "log_given", the estimates of
        :math:`\log p(x)` and :math:`\log p(x_b)`, and "joint_error", "given_error", "joint_khat", "given_khat".

    Raises:
        TypeError: when `proposal` or `method` is of another kind.
        ValueError: when `given` names no observed site, does not fit the data, or leaves one part empty for all of
            them; when the elements of a site of which a part is given are not independent given the latents, or what is
            given depends on the rest at fixed latents; when a site observes something computed from the arguments; and
            as :func:`pyrovae.log_marginal`.

    References:
        Monte Carlo Theory, Methods and Examples, A. B. Owen, 2013, https://artowen.su.domains/mc (ratio estimation,
        stratified sampling); Safe and Effective Importance Sampling, A. Owen and Y. Zhou, 2000,
        https://doi.org/10.1080/01621459.2000.10473909 (mixtures).

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> x, first = torch.randn(5, 3), torch.tensor([True, False, False])
    >>> estimate = log_conditional(vae.model, vae.guide, x, given=first, progress=False)
    >>> estimate.value.shape, bool(estimate.trusted.all())
    (torch.Size([5]), True)
    """
    if isinstance(given, Iterable) and not isinstance(given, str | Mapping | Tensor):
        given = list(given)  # it is read several times
    how: _Conditional
    if method is None:
        if proposal is not None and not isinstance(proposal, Proposal):
            raise TypeError(f"proposal must be a proposal such as estimators.Laplace(), got {proposal!r}.")
        how = _CommonDraws(given, 1000 if num_samples is None else num_samples, proposal)
    else:
        if not isinstance(method, Estimator):
            raise TypeError(f"method must be an estimator such as estimators.UntilTrusted(), got {method!r}.")
        if num_samples is not None or proposal is not None:
            raise ValueError(
                f"num_samples and proposal are for the default method: give them to {type(method).__name__} itself."
            )
        if method.relation != "=":
            raise ValueError(f"{method} is an upper bound of log p(x): a difference says nothing. Take an estimator.")
        how = _Separate(given, method)
    estimate = log_marginal(model, guide, *args, method=how, max_memory=max_memory, progress=progress, **kwargs)
    if how.num_rows not in (None, len(estimate.value)):
        raise ValueError(f"given has {how.num_rows:,} rows for {len(estimate.value):,} data. Give one a datum.")
    return estimate


class _Conditional(Estimator):
    """Base of the two ways to estimate log p(x_a | x_b), which return its errors and those of both marginals.

    Args:
        given: what is given.
        num_samples: draws per datum.
    """

    quantity = "log p(x_a | x_b)"

    def __init__(self, given: Given, num_samples: int):
        super().__init__(num_samples)
        self.given = given
        self.num_rows: int | None = None  # of masks with a row for each datum

    def estimate(self, task: Task) -> Estimate:
        task.check_not_summed("log_conditional")
        conditioned = condition(task, self.given)
        self.num_rows = conditioned.num_rows
        return self.score(conditioned.whole, conditioned.given, conditioned.places)

    @abstractmethod
    def score(self, whole: Task, seen: Task, places: dict[str, Place]) -> Estimate:
        """Scores the data, from the task of all of them and that of what is given alone."""

    def trusts(self, estimate: Estimate) -> Tensor:
        return estimate.diagnostics["reliable"]

    def describe(self, estimate: Estimate) -> str:
        untrusted = int((~estimate.trusted).sum())
        return f"log p(x) or log p(x_b) not to be trusted: {untrusted:,} of {len(estimate.value):,} data"

    def remedy(self, structure: SiteStructure) -> str:
        if structure.latents == structure.discrete:
            return "Take method=Enumeration()."
        if structure.discrete or structure.without_bijection:
            return "Draw more samples."
        return (
            "Draw more samples, or take proposal=Mixed([Laplace(), Adapted()]) or method=AnnealedImportanceSampling()."
        )


class _CommonDraws(_Conditional):
    """Both marginals from the same draws, of a mixture of proposals for both posteriors."""

    def __init__(self, given: Given, num_samples: int, proposal: Proposal | None):
        super().__init__(given, num_samples)
        self.proposal = proposal
        self.needs_guide = proposal is None or proposal.needs_guide

    def score(self, whole: Task, seen: Task, places: dict[str, Place]) -> Estimate:
        # Guides and other proposals are mixed: all of them must count the same densities.
        whole, seen = replace(whole, unmasked=True), replace(seen, unmasked=True)
        whole.start(whole.size * self.num_samples, "sample")
        num_data, num_drawn, num_scored = chunk_sizes(whole, self.num_samples, lambda t, *d: _score(t, places, *d))
        proposal = _default_proposal(whole) if self.proposal is None else self.proposal
        both = zip(split_and_fit(whole, num_data, proposal), split_and_fit(seen, num_data, proposal), strict=True)
        return join(self, [self._score(a, b, places, num_drawn, num_scored) for a, b in both])

    def _mixture(self, *fitted: tuple[Task, Proposal]) -> list[WeightedGuide]:
        """Returns the proposals for both posteriors, with their exact shares of the draws."""
        components: list[WeightedGuide] = []
        for task, proposal in fitted:
            for new in proposal.guides(task):
                for i, old in enumerate(components):
                    if old.guide is new.guide or old.is_prior and new.is_prior:
                        components[i] = old._replace(share=old.share + new.share)
                        break
                else:
                    components.append(new)
        counts = apportion(self.num_samples, [component.share for component in components])
        return [c._replace(share=n / self.num_samples) for c, n in zip(components, counts, strict=True) if n]

    def _score(
        self,
        fitted: tuple[Task, Proposal],
        fitted_to_seen: tuple[Task, Proposal],
        places: dict[str, Place],
        num_drawn: int,
        num_scored: int,
    ) -> Estimate:
        whole, mixture = fitted[0], self._mixture(fitted, fitted_to_seen)
        counts = [round(component.share * self.num_samples) for component in mixture]
        joint, given = WeightSums(self.num_samples), WeightSums(self.num_samples)
        ratio, checked, is_point = _RatioSums(counts), False, torch.tensor(False)
        for draws in draw_mixture(whole, mixture, counts, num_drawn, num_scored):
            if not checked:  # one draw: others skip Pyro's validation, which takes time
                whole.score(slice_trace(draws.trace, slice(1)), 1, check_data=True)
                checked = True
            with pyro.validation_enabled(False):
                prior, log_joint, log_given = _score(whole, places, draws.trace, draws.num_draws)
                log_q = draws.log_q if len(mixture) == 1 else log_mixture(whole, mixture, draws, prior)
            is_point = is_point | draws.are_equal
            log_w, log_v = log_joint + prior - log_q, log_given + prior - log_q
            joint.add(log_w)
            given.add(log_v)
            ratio.add(next(i for i, c in enumerate(mixture) if c is draws.component), log_w, log_v)
            whole.advance(draws.num_draws * whole.size)
        first, second = (with_doubts(s.estimate(self), is_point, whole.structure) for s in (joint, given))
        value, error = ratio.estimate()
        return _joined(
            self,
            first,
            second,
            value.to(first.value.dtype),
            error.to(first.value.dtype),
            Estimator.trusts(self, first),
            Estimator.trusts(self, second),
        )


class _Separate(_Conditional):
    """Both marginals by an estimator, each with its own draws."""

    def __init__(self, given: Given, method: Estimator):
        super().__init__(given, getattr(method, "num_samples", 1))
        self.method, self.needs_guide, self.unit = method, method.needs_guide, method.unit
        self.is_random, self.seconds = method.is_random, method.seconds

    def score(self, whole: Task, seen: Task, places: dict[str, Place]) -> Estimate:
        method = copy(self.method)
        if self.seconds is not None:
            method.seconds = self.seconds / 2  # each of the two has half of the time
        first, second = method.estimate(whole), method.estimate(seen)
        error = (first.standard_error.square() + second.standard_error.square()).sqrt()
        return _joined(self, first, second, first.value - second.value, error, first.trusted, second.trusted)

    def remedy(self, structure: SiteStructure) -> str:
        return self.method.remedy(structure)


def _default_proposal(task: Task) -> Proposal:
    """Returns a mixture that covers posteriors given parts of the data, which are wider than those of the guide."""
    try:
        if num_real_latents(task) <= MAX_DIM:
            return Mixed([Laplace(), Guide(), Prior()], [0.6, 0.3, 0.1])
    except ValueError:  # discrete, or not to be moved by gradients
        pass
    return Mixed([Guide(), Prior()])


def _joined(
    method: _Conditional,
    joint: Estimate,
    given: Estimate,
    value: Tensor,
    error: Tensor,
    trusts_joint: Tensor,
    trusts_given: Tensor,
) -> Estimate:
    """Returns the estimate of the difference, with those of both marginals as diagnostics."""
    diagnostics = {"reliable": trusts_joint & trusts_given}
    for name, part in (("joint", joint), ("given", given)):
        diagnostics |= {f"log_{name}": part.value, f"{name}_error": part.standard_error, f"{name}_khat": part.khat}
    return Estimate(
        value=value,
        standard_error=error,
        ess=torch.minimum(joint.ess, given.ess),
        khat=torch.maximum(joint.khat, given.khat),
        num_samples=joint.num_samples,
        method=method,
        diagnostics=diagnostics,
    )


class _RatioSums:
    r"""Running sums for the logarithm of a ratio of two mean weights and its error, by the delta method.

    .. math:: s^2 = \frac{1}{K^2} \sum_j K_j \operatorname{Var}_j\left[d_k\right], \qquad
        d_k = \frac{w_k}{\bar w} - \frac{v_k}{\bar v}

    where j are the components of the mixture, of which :math:`K_j` are drawn each.

    Args:
        counts: the numbers :math:`K_j`.
    """

    def __init__(self, counts: list[int]):
        self.counts = counts
        self._sums: list[Tensor | None] = [None] * len(counts)

    def add(self, component: int, log_w: Tensor, log_v: Tensor) -> None:
        log_w, log_v = log_w.double(), log_v.double()
        new = torch.stack([t.logsumexp(0) for t in (log_w, log_v, 2 * log_w, 2 * log_v, log_w + log_v)])
        old = self._sums[component]
        self._sums[component] = new if old is None else torch.logaddexp(old, new)

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Returns the log of the ratio and its standard error, ``(batch,)`` each."""
        sums = torch.stack([s for s in self._sums if s is not None])
        k = sum(self.counts)
        log_w, log_v = sums[:, 0].logsumexp(0), sums[:, 1].logsumexp(0)  # K times the means
        mean = (sums[:, 0] - log_w).exp() - (sums[:, 1] - log_v).exp()
        square = (sums[:, 2] - 2 * log_w).exp() + (sums[:, 3] - 2 * log_v).exp()
        square = square - 2 * (sums[:, 4] - log_w - log_v).exp()
        counts = sums.new_tensor(self.counts).unsqueeze(-1)
        if min(self.counts) > 1:
            variance = (counts / (counts - 1) * (square - mean.square() / counts)).sum(0)
        else:  # without the strata: too large rather than too small
            variance = k / (k - 1) * square.sum(0) if k > 1 else torch.full_like(log_w, math.nan)
        return log_w - log_v, variance.clamp(min=0).sqrt()


def _score(task: Task, places: dict[str, Place], trace: Trace, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns log p(z), log p(x | z) and log p(x_b | z) at a trace's latents, ``(num_samples, batch)`` each."""
    with arguments.row_positions(task.offset):
        scored = trace_model(task.model, trace, task.structure, num_samples, *task.args, **task.kwargs)
    prior, joint, given = (torch.zeros((), dtype=torch.float32) for _ in range(3))
    for name, site in sample_sites(scored).items():
        if name in task.structure.global_observed:
            continue
        log_prob = per_datum(site, task.log_prob_of(site))
        if not site["is_observed"]:
            prior = prior + log_prob
            continue
        joint = joint + log_prob
        if name in places:
            fn = part_of(name, site["fn"], site_mask(name, places, task.kwargs[GIVEN]))
            log_prob = per_datum(site, log_prob_of({**site, "fn": fn}))
        given = given + log_prob  # a factor is no data, and stays
    if task.structure.data is not None:
        task.structure.data.check_in_order(joint.shape[-1] if joint.dim() else 0, task.size)
    return prior, joint, given
