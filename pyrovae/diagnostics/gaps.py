r"""Where a model loses nats: between log p(x) and the bound that it was trained by."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrovae import bounds
from pyrovae.arguments import take_rows
from pyrovae.diagnostics.base import Diagnosis, check_at_least, in_memory, inspect_part
from pyrovae.estimators import (
    AnnealedImportanceSampling,
    Enumeration,
    Estimate,
    Estimator,
    ImportanceSampling,
    log_marginal,
    refine,
)
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.weights import log_weights

_DATA = 100  # tuned at once


@dataclass(frozen=True)
class Losses:
    r"""What is lost on some data, per datum in nats; every tensor has shape ``(batch,)``.

    Args:
        estimate: of :math:`\log p(x)`.
        best: the ELBO of the best q of the guide's family for each datum.
        elbo: the ELBO of the guide.
        best_error: standard error of `best`.
        elbo_error: standard error of `elbo`.
    """

    estimate: Estimate
    best: Tensor
    elbo: Tensor
    best_error: Tensor
    elbo_error: Tensor

    @property
    def approximation(self) -> Tensor:
        r""":math:`\log p(x)` less the best ELBO of the family: what no guide of the family can reach."""
        return self.estimate.value - self.best

    @property
    def amortization(self) -> Tensor:
        """The best ELBO of the family less the guide's: what the encoder misses."""
        return self.best - self.elbo

    @property
    def inference(self) -> Tensor:
        r""":math:`\log p(x)` less the guide's ELBO, the sum of both: :math:`\mathrm{KL}(q(z \mid x)\,\|\,p(z \mid x))`."""
        return self.estimate.value - self.elbo


@dataclass(frozen=True)
class Gaps(Diagnosis):
    r"""Where the nats are lost.

    Args:
        test: what is lost on the data.
        train: what is lost on the training data; None where none were given.
    """

    test: Losses
    train: Losses | None

    @property
    def generalization(self) -> Tensor | None:
        r"""The mean :math:`\log p(x)` of the training data less that of the others; None without training data."""
        return None if self.train is None else self.train.estimate.value.mean() - self.test.estimate.value.mean()

    def _generalization_error(self) -> float:
        return math.hypot(*[_standard_error(losses.estimate.value) for losses in (self.test, self.train)])

    @property
    def verdict(self) -> str:
        losses = {
            "approximation": self.test.approximation.mean().item(),
            "amortisation": self.test.amortization.mean().item(),
        }
        # Between two sets of data, what may be chance is no loss.
        if self.generalization is not None and self.generalization > 2 * self._generalization_error():
            losses["generalisation"] = self.generalization.item()
        largest = max(losses, key=losses.get)
        mends = {
            "approximation": "the family of q is too poor: encoders.FullRankNormal or NeuralSplineFlow, or train with bounds.IWAE",
            "amortisation": "the encoder does not find the best q: a larger network, longer training, or a DoublyReparameterized "
            "IWAE; to score, estimators.Refined()",
            "generalisation": "the model knows the training data better: more data, a smaller decoder, weight decay, earlier stopping",
        }
        if losses[largest] < 0.5:
            inference = self.test.inference.mean().item()
            return f"Little is lost: {inference:.2f} nats a datum lie between log p(x) and the ELBO, no gap of 0.5 or more."
        return f"Most is lost by {largest} ({losses[largest]:.2f} nats a datum): {mends[largest]}."

    def __str__(self) -> str:
        sides = {"test": self.test} if self.train is None else {"test": self.test, "train": self.train}
        rows = [("", *[f"{name} ({len(losses.elbo):,} data)" for name, losses in sides.items()])]

        def row(name: str, of: Callable[[Losses], Tensor]) -> None:
            rows.append((name, *[_mean(of(losses)) for losses in sides.values()]))

        row("log p(x)", lambda losses: losses.estimate.value)
        row("  approximation gap", lambda losses: losses.approximation)
        row("best ELBO of the family", lambda losses: losses.best)
        row("  amortisation gap", lambda losses: losses.amortization)
        row("ELBO of the guide", lambda losses: losses.elbo)
        row("  inference gap, the sum", lambda losses: losses.inference)
        lines = [f"{name:26}" + "".join(f"{cell:>24}" for cell in cells) for name, *cells in rows]
        if self.generalization is not None:
            error = self._generalization_error()
            lines.append(f"{'generalisation gap':26}{f'{self.generalization.item():.3f} ± {error:.3f}':>24}")
        untrusted = sum(int((~losses.estimate.trusted).sum()) for losses in sides.values())
        lines.append(f"nats a datum ± standard error over data; log p(x) not to be trusted: {untrusted:,}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])

    def summary(self) -> dict[str, Any]:
        def of(losses: Losses) -> dict[str, float]:
            return {
                "log_marginal": losses.estimate.value.mean().item(),
                "best_elbo": losses.best.mean().item(),
                "elbo": losses.elbo.mean().item(),
                "approximation": losses.approximation.mean().item(),
                "amortization": losses.amortization.mean().item(),
                "untrusted": int((~losses.estimate.trusted).sum()),
                "num_data": len(losses.elbo),
            }

        generalization = None if self.generalization is None else self.generalization.item()
        return {
            "test": of(self.test),
            "train": None if self.train is None else of(self.train),
            "generalization": generalization,
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.gaps import gaps as draw

        return draw(self, path)


@torch.no_grad()
def gaps(
    model: Callable,
    guide: Callable,
    *args: Any,
    train: tuple | Tensor | None = None,
    method: Estimator | None = None,
    num_samples: int = 500,
    num_steps: int = 300,
    learning_rate: float = 0.1,
    progress: bool = True,
    **kwargs: Any,
) -> Gaps:
    r"""Takes apart what lies between log p(x) and the ELBO: where the nats are lost.

    .. math:: \log p(x) - \mathcal{L}[q] = \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation}}
        + \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q]}_{\text{amortisation}}, \qquad
        q^* = \arg\max_{q \in \mathcal{Q}} \mathcal{L}[q](x)

    with the best q of the guide's family for each datum by itself, found by gradient steps from the encoder's
    (:func:`pyrovae.estimators.refine`). With training data, also what the model knows of them better than of others.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide.
        *args: tensors with the data along their first dimension, or anything else, which is passed on as it is.
        train: the arguments for training data; a single one need not be in a tuple.
        method: an estimator of log p(x). Unless given, :class:`~pyrovae.estimators.AnnealedImportanceSampling` from the
            prior, which does not look at the guide, or for discrete latents :class:`~pyrovae.estimators.Enumeration`.
        num_samples: draws a datum for the ELBOs, at least 2.
        num_steps: gradient steps to the best q.
        learning_rate: the rate they start at.
        progress: whether to show progress bars.
        **kwargs: as `args`, for both.

    Returns:
        :class:`Gaps`.

    Raises:
        ValueError: as :func:`pyrovae.log_marginal`; when the guide's family has no parameters.

    References:
        Inference Suboptimality in Variational Autoencoders, C. Cremer, X. Li and D. Duvenaud, 2018,
        https://arxiv.org/abs/1801.03558.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> method = ImportanceSampling(100)
    >>> lost = gaps(vae.model, vae.guide, torch.zeros(5, 3), method=method, num_steps=5, progress=False)
    >>> bool((lost.test.approximation + lost.test.amortization - lost.test.inference).abs().max() < 1e-5)
    True
    """
    check_at_least("num_samples", num_samples, 2)
    if train is not None:
        train = train if isinstance(train, tuple) else (train,)

    def losses(args: tuple, what: str) -> Losses:
        return _losses(model, guide, args, kwargs, method, num_samples, num_steps, learning_rate, progress, what)

    return Gaps(losses(args, "test"), None if train is None else losses(train, "train"))


def _losses(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict,
    method: Estimator | None,
    num_samples: int,
    num_steps: int,
    learning_rate: float,
    progress: bool,
    what: str,
) -> Losses:
    args, kwargs, size = in_memory(1, "gaps", args, kwargs)
    structure = inspect_part(model, guide, slice(0, 2), args, kwargs)
    if method is None:
        if structure.latents == structure.discrete:
            method = Enumeration()
        else:
            method = ImportanceSampling(10 * num_samples) if structure.discrete else AnnealedImportanceSampling()
    estimate = log_marginal(model, guide, *args, method=method, progress=progress, **kwargs)
    found = []
    with evaluation_mode(), tqdm(total=size, desc=f"best q, {what}", unit="datum", disable=not progress) as bar:
        for start in range(0, size, _DATA):
            part, named = take_rows(slice(start, start + _DATA), args, kwargs)
            bound = bounds.ELBO(num_particles=16)
            tuned = refine(model, guide, *part, bound=bound, num_steps=num_steps, learning_rate=learning_rate, **named)
            row = []
            for q in (tuned, guide):
                log_w = log_weights(model, q, *part, num_samples=num_samples, **named)
                row += [log_w.mean(0), log_w.std(0) / math.sqrt(num_samples)]
            found.append(row)
            bar.update(min(_DATA, size - start))
    best, best_error, elbo, elbo_error = (torch.cat(column) for column in zip(*found, strict=True))
    return Losses(estimate, best, elbo, best_error, elbo_error)


def _standard_error(t: Tensor) -> float:
    return t.std().item() / math.sqrt(len(t)) if len(t) > 1 else math.nan


def _mean(t: Tensor) -> str:
    return f"{t.mean().item():.3f} ± {_standard_error(t):.3f}"
