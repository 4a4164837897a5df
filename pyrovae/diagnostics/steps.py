"""What the latents of each step of a sequence say, and where in time nats are lost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyrovae.arguments import take_rows
from pyrovae.diagnostics.base import Diagnosis, ReportInputs, check_at_least, in_memory
from pyrovae.estimators import ParticleFilter, log_predictive
from pyrovae.estimators.task import open_task
from pyrovae.inference.filtering import run_filter, systematic
from pyrovae.inference.weights import log_prob_of, per_datum, unmasked_log_prob_of
from pyrovae.plots.drawing import new_figure
from pyrovae.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_AT_ONCE = 50  # sequences
_MEMORY = 64e6  # bytes
_UNUSED = 0.01  # nats a step
_SMALL = 0.1
_ROUGH = 1.0  # standard error of a step, in nats
_ALONE = 1.5  # effective particles; below it, one particle has nearly all the weight
_PARTS = 4  # of time, in the table


@dataclass(frozen=True)
class Steps(Diagnosis):
    r"""The log-density of each step given those before, and the terms of its ELBO, in nats.

    Every tensor has shape ``(batch, steps)``. Sums are by the number of observed steps: what the latents of missing
    steps cost counts, so that the means over all of time are those of whole sequences.

    Args:
        predictive: estimate of :math:`\log p(x_t \mid x_1, \dots, x_{t-1})`.
        standard_error: of `predictive`.
        least_ess: the smallest effective sample size of the particles after the step.
        reconstruction: the mean of :math:`\log p(x_t \mid z_1, \dots, z_t, \dots)` under the guide.
        kl: the mean of :math:`\log q(z_t \mid \dots) - \log p(z_t \mid \dots)` under the guide.
        observed: whether the step was observed.
        num_particles: particles of a filter.
    """

    question: ClassVar[str] = "What do the latents of a step say?"

    predictive: Tensor
    standard_error: Tensor
    least_ess: Tensor
    reconstruction: Tensor
    kl: Tensor
    observed: Tensor
    num_particles: int

    @property
    def elbo(self) -> Tensor:
        """The terms of the ELBO of each step, ``(batch, steps)``."""
        return self.reconstruction - self.kl

    @property
    def gap(self) -> tuple[float, float]:
        r""":math:`\log p(x)` minus the ELBO, in nats a step, and its standard error over sequences."""
        return self._mean(self.predictive - self.elbo)

    @property
    def _rough(self) -> Tensor:
        """Whether the filters cannot tell the log-density of a step."""
        return self.observed & ~((self.standard_error <= _ROUGH) & (self.least_ess >= _ALONE))

    @property
    def verdict(self) -> str:
        share = self._rough.sum().item() / self.observed.sum().item()
        (kl, _), (gap, error) = self._mean(self.kl), self.gap
        if share > 0.1:
            return (
                f"Filters of {self.num_particles:,} particles cannot tell log p(x) at {share:.0%} of the steps, and "
                f"the gap is rough. Take more: method=ParticleFilter(num_particles={10 * self.num_particles})."
            )
        if kl < _UNUSED:
            return (
                f"The latents are not used: they say less than {_UNUSED:g} nats a step. Raise the weight of their KL "
                "divergence slowly (bounds.Linear), give them free bits, or make the memory or the likelihood weaker."
            )
        if gap > max(_SMALL, 2 * error):
            return (
                f"{gap:.2f} nats a step lie between log p(x) and the ELBO: train with particles (bounds.FIVO on the "
                "model and guide by step), or with a larger encoder that sees all steps."
            )
        return f"Little is lost by the guide: {gap:.2f} nats a step. The latents say {kl:.2f} nats a step."

    def table(self) -> list[str]:
        sequences, steps = len(self.observed), int(self.observed.sum())
        length = self.observed.shape[1]
        edges = torch.linspace(0, length, min(_PARTS, length) + 1).round().int().tolist()
        parts = [(a, b) for a, b in pairwise(edges) if bool(self.observed[:, a:b].any())]
        names = [f"{a + 1} to {b}" if b > a + 1 else str(b) for a, b in parts]
        lines = [f"Nats a step ± standard error over sequences, of {steps:,} steps of {sequences:,} sequences"]
        lines.append(f"{'steps':22}{'all':>18}" + "".join(f"{name:>10}" for name in names))
        rows = {
            "log p(x_t | before)": self.predictive,
            "  gap": self.predictive - self.elbo,
            "ELBO": self.elbo,
            "  reconstruction": self.reconstruction,
            "  KL of the latents": self.kl,
        }
        for name, t in rows.items():
            value, error = self._mean(t)
            cells = [f"{self._mean(t, a, b)[0]:>10.3f}" for a, b in parts]
            all_of_it = f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"  # of one sequence none
            lines.append(f"{name:22}{all_of_it:>18}" + "".join(cells))
        ess = torch.where(self.observed, self.least_ess / self.num_particles, 0.0)
        cells = [f"{self._mean(ess, a, b)[0]:>10.0%}" for a, b in parts]
        lines.append(f"{'effective particles':22}{self._mean(ess)[0]:>18.0%}" + "".join(cells))
        rough = int(self._rough.sum())
        lines.append(f"steps where filters differ by {_ROUGH:g} nat or one particle has the weight: {rough:,}")
        return lines

    def numbers(self) -> dict[str, Any]:
        means = {"log_predictive": self.predictive, "elbo": self.elbo, "kl": self.kl}
        return {
            "num_sequences": len(self.observed),
            "num_steps": int(self.observed.sum()),
            **{name: self._mean(t)[0] for name, t in means.items()},
            "gap": self.gap[0],
            "gap_error": self.gap[1],
            "by_step": {name: self._by_step(t) for name, t in means.items()},
        }

    def draw(self) -> "Figure":
        """Draws the means over sequences at each step."""
        figure = new_figure(9, 5)
        top, bottom = figure.subplots(2, 1, sharex=True)
        steps = torch.arange(1, self.observed.shape[1] + 1).numpy()
        for t, label in ((self.predictive, "log p(x_t | before)"), (self.elbo, "ELBO")):
            top.plot(steps, self._by_step(t).numpy(), label=label)
        top.set(ylabel="nats", title="means over the sequences that have the step")
        top.legend(frameon=False)
        bottom.plot(steps, self._by_step(self.kl).numpy(), color="C2", label="KL of the latents")
        bottom.plot(steps, self._by_step(self.predictive - self.elbo).numpy(), color="C3", label="log p minus ELBO")
        bottom.axhline(0, color="grey", linewidth=0.5)
        bottom.set(xlabel="step", ylabel="nats")
        bottom.legend(frameon=False)
        return figure

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Steps":
        if inputs.method is not None and not isinstance(inputs.method, ParticleFilter):
            raise ValueError(f"steps are scored by ParticleFilter, got {inputs.method}.")
        return steps(inputs.model, inputs.guide, *inputs.args, method=inputs.method)

    def _mean(self, t: Tensor, start: int = 0, stop: int | None = None) -> tuple[float, float]:
        """Returns the sum over a part of time by its observed steps, and its standard error over sequences.

        What missing steps add counts, so that the result for all of time is that of whole sequences.
        """
        seen = self.observed[:, start:stop]
        sums = t[:, start:stop].sum(1).double()
        counts = seen.sum(1).double()
        mean = sums.sum() / counts.sum()
        error = (sums - mean * counts).std() / math.sqrt(len(sums)) / counts.mean() if len(sums) > 1 else math.nan
        return mean.item(), float(error)

    def _by_step(self, t: Tensor) -> Tensor:
        counts = self.observed.sum(0)
        return (torch.where(self.observed, t, 0.0).sum(0) / counts).masked_fill(counts == 0, math.nan).cpu()


@torch.no_grad()
def steps(
    model: Callable,
    guide: Callable,
    *args: Any,
    method: ParticleFilter | None = None,
    num_samples: int = 20,
    progress: bool = True,
    **kwargs: Any,
) -> Steps:
    r"""Splits the log-density and the ELBO of sequences by their steps.

    .. math:: \log p(x) = \sum_t \log p(x_t \mid x_1, \dots, x_{t-1}), \qquad
        \mathcal{L} = \sum_t \operatorname{E}_q \left[\log p(x_t \mid z_1, \dots, z_t, \dots)
        - \log \frac{q(z_t \mid \dots)}{p(z_t \mid \dots)}\right]

    A guide that looks ahead pays for what it knows of later steps before they come: at a single step the difference of
    the two is no bound, and may be of either sign; the sum over all steps is the gap of the ELBO.

    Args:
        model: a Pyro model that draws its latents step by step, each step with an observation, as ``model_by_step`` of
            a :class:`~pyrovae.structures.StateSpaceVAE` or :class:`~pyrovae.structures.RecurrentVAE` does.
        guide: a Pyro guide that draws them likewise.
        *args: tensors with the sequences along their first dimension; other objects are passed on.
        method: the particle filters; 20 of 32 particles by default.
        num_samples: draws of the guide for the terms of the ELBO.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        :class:`Steps`.

    Raises:
        ValueError: when the model has no steps; as :func:`pyrovae.estimators.log_predictive`.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors, structures
    >>> parts = (likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2, context_dim=8))
    >>> vae = structures.StateSpaceVAE(
    ...     priors.DiagonalNormal(2), encoders.DiagonalNormal(2, 2), likelihoods.Normal(2, 3),
    ...     encoders.DiagonalNormal(2, 2, context_dim=8), structures.BackwardGRU(3, 8))
    >>> steps(vae.model_by_step, vae.guide_by_step, torch.zeros(5, 7, 3), progress=False).kl.shape
    torch.Size([5, 7])
    """
    check_at_least("num_samples", num_samples, 1)
    method = ParticleFilter(num_samples=20, num_particles=32) if method is None else method
    args, kwargs, size = in_memory(1, "steps", model, args, kwargs)
    found: list[tuple[Tensor, ...]] = []
    with tqdm(total=size, desc="steps", unit="sequence", disable=not progress) as bar:
        for start in range(0, size, _AT_ONCE):
            part, named = take_rows(slice(start, start + _AT_ONCE), args, kwargs)
            filtered = log_predictive(model, guide, *part, method=method, **named)
            terms = _terms(model, guide, part, named, method, num_samples)
            if terms[0].shape != filtered.value.shape:
                raise ValueError(
                    f"model and guide have {filtered.value.shape[1]} steps that are filtered and {terms[0].shape[1]} "
                    "that are observed after latents. Draw the latents of a step before its observation."
                )
            found.append((*filtered, *terms))
            bar.update(min(_AT_ONCE, size - start))
    predictive, error, ess, reconstruction, kl, observed = (torch.cat(column) for column in zip(*found, strict=True))
    return Steps(predictive, error, ess, reconstruction, kl, observed, method.num_particles)


def _terms(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, method: ParticleFilter, num_samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the reconstruction and the KL divergence of each step, and whether it was observed."""
    with open_task(model, guide, method, args, kwargs, _MEMORY, progress=False) as task:
        structure = task.structure
        run = run_filter(task.model, task.guide, structure, num_samples, 0.0, systematic, task.args, task.kwargs)
        zeros = torch.zeros_like(run.log_z[0])
        # Latents that the guide alone has belong to no step of the model.
        spent = sum((site["term"].mean(0) for name, site in run.guide.items() if name not in run.model), zeros)
        reconstruction, kl, observed, is_over = [zeros], [spent], [zeros.bool()], False
        for name, site in run.model.items():
            if name in structure.global_observed:
                continue
            if site["is_observed"]:
                reconstruction[-1] = reconstruction[-1] + site["term"].mean(0)
                observed[-1] = observed[-1] | _is_seen(site)
                is_over = True
                continue
            if is_over:  # a latent after an observation begins a step
                reconstruction, kl, observed = [*reconstruction, zeros], [*kl, zeros], [*observed, zeros.bool()]
                is_over = False
            kl[-1] = kl[-1] + run.guide[name]["term"].mean(0) - site["term"].mean(0)
    return torch.stack(reconstruction, 1), torch.stack(kl, 1), torch.stack(observed, 1)


def _is_seen(site: dict) -> Tensor:
    """Returns for each datum whether some of an observed site is not masked."""
    hidden = (log_prob_of(site) == 0) & (unmasked_log_prob_of(site) != 0)
    return per_datum(site, (~hidden).float()).amax(0) > 0
