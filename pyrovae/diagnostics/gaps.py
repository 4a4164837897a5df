r"""Where nats are lost between log p(x) and the ELBO."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyrovae import bounds
from pyrovae.arguments import take_rows
from pyrovae.diagnostics.base import Diagnosis, ReportInputs, check_at_least, in_memory, inspect_part
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
from pyrovae.plots.drawing import new_figure
from pyrovae.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DATA = 100  # tuned at once
_SMALL = 0.5  # nats


@dataclass(frozen=True)
class Losses:
    r"""The gaps on some data, per datum in nats; every tensor has shape ``(batch,)``.

    Args:
        estimate: estimate of :math:`\log p(x)`.
        best: the ELBO of the best q in the guide's family for each datum.
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
        r""":math:`\log p(x)` minus the best ELBO of the family: the loss by the family of q."""
        return self.estimate.value - self.best

    @property
    def amortization(self) -> Tensor:
        """The best ELBO of the family minus the guide's: the loss by the encoder."""
        return self.best - self.elbo

    @property
    def inference(self) -> Tensor:
        r""":math:`\log p(x)` minus the guide's ELBO, the sum of both: :math:`\mathrm{KL}(q(z \mid x)\|p(z \mid x))`."""
        return self.estimate.value - self.elbo


@dataclass(frozen=True)
class Gaps(Diagnosis):
    r"""The gaps on data and on training data.

    Args:
        test: the gaps on the data.
        train: the gaps on the training data; None without them.
    """

    question: ClassVar[str] = "Where are my nats lost?"

    test: Losses
    train: Losses | None

    @property
    def generalization(self) -> Tensor | None:
        r"""The mean :math:`\log p(x)` of the training data minus that of the data; None without training data."""
        return None if self.train is None else self.train.estimate.value.mean() - self.test.estimate.value.mean()

    @property
    def generalization_error(self) -> float | None:
        """Standard error of the generalisation gap over data; None without training data."""
        if self.train is None:
            return None
        return math.hypot(*[_standard_error(losses.estimate.value) for losses in (self.test, self.train)])

    @property
    def _sets(self) -> dict[str, Losses]:
        return {"test": self.test} if self.train is None else {"test": self.test, "train": self.train}

    @property
    def verdict(self) -> str:
        losses = {
            "approximation": self.test.approximation.mean().item(),
            "amortisation": self.test.amortization.mean().item(),
        }
        # A difference between two sets of data that may be chance is not a loss.
        gap, error = self.generalization, self.generalization_error
        if gap is not None and error is not None and gap > 2 * error:
            losses["generalisation"] = gap.item()
        largest = max(losses, key=lambda name: losses[name])
        remedies = {
            "approximation": "the family of q is too poor: encoders.FullRankNormal or NeuralSplineFlow, or train with "
            "bounds.IWAE",
            "amortisation": "the encoder does not find the best q: a larger network, longer training, or a "
            "DoublyReparameterized IWAE; to score, estimators.Refined()",
            "generalisation": "the model fits the training data better: more data, a smaller decoder, weight decay, "
            "earlier stopping",
        }
        if losses[largest] < _SMALL:
            inference = self.test.inference.mean().item()
            return (
                f"Little is lost: {inference:.2f} nats a datum lie between log p(x) and the ELBO, no gap of {_SMALL:g} "
                "or more."
            )
        return f"Most is lost by {largest} ({losses[largest]:.2f} nats a datum): {remedies[largest]}."

    def table(self) -> list[str]:
        sets = self._sets
        columns = [
            {
                "": f"{name} ({len(losses.elbo):,} data)",
                "log p(x)": _mean(losses.estimate.value),
                "  approximation gap": _mean(losses.approximation),
                "best ELBO of the family": _mean(losses.best),
                "  amortisation gap": _mean(losses.amortization),
                "ELBO of the guide": _mean(losses.elbo),
                "  inference gap, the sum": _mean(losses.inference),
            }
            for name, losses in sets.items()
        ]
        lines = [f"{row:26}" + "".join(f"{column[row]:>24}" for column in columns) for row in columns[0]]
        if self.generalization is not None:
            gap = f"{self.generalization.item():.3f} ± {self.generalization_error:.3f}"
            lines.append(f"{'generalisation gap':26}{gap:>24}")
        untrusted = sum(int((~losses.estimate.trusted).sum()) for losses in sets.values())
        lines.append(f"nats a datum ± standard error over data; log p(x) not to be trusted: {untrusted:,}")
        return lines

    def numbers(self) -> dict[str, Any]:
        def numbers_of(losses: Losses) -> dict[str, float]:
            return {
                "log_marginal": losses.estimate.value.mean().item(),
                "best_elbo": losses.best.mean().item(),
                "elbo": losses.elbo.mean().item(),
                "approximation": losses.approximation.mean().item(),
                "amortization": losses.amortization.mean().item(),
                "untrusted": int((~losses.estimate.trusted).sum()),
                "num_data": len(losses.elbo),
            }

        return {
            "test": numbers_of(self.test),
            "train": None if self.train is None else numbers_of(self.train),
            "generalization": self.generalization,
        }

    def draw(self) -> "Figure":
        """Draws the gaps as bars from log p(x) down to the ELBO, and their spread over the data."""
        figure = new_figure(9, 4)
        bars, spread = figure.subplots(1, 2)
        for i, losses in enumerate(self._sets.values()):
            _draw_bars(bars, i, losses)
            _draw_spread(spread, (i, i + len(self._sets) + 0.5), losses)
        n, names = len(self._sets), list(self._sets)
        bars.set_xticks(range(n), names)
        bars.use_sticky_edges = False  # room for the text above and below
        bars.margins(y=0.15)
        bars.set(xlim=(-0.6, n - 0.4), ylabel="nats a datum", title="from log p(x) down to the ELBO")
        bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
        spread.set_xticks([i + j * (n + 0.5) for j in range(2) for i in range(n)], names * 2)
        spread.axhline(0, color="grey", linewidth=0.5)
        spread.set(ylabel="nats", title="over data (quartiles, 5 and 95 %)")
        return figure

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Gaps":
        few = inputs.few
        train = tuple(t[:few] for t in inputs.train_args) if inputs.held_out else None
        args = (t[:few] for t in inputs.args)
        return gaps(inputs.model, inputs.guide, *args, train=train, method=inputs.method)


def _draw_bars(ax: "Axes", at: int, losses: Losses) -> None:
    top, best, low = (t.mean().item() for t in (losses.estimate.value, losses.best, losses.elbo))
    for upper, lower, colour, label in ((top, best, "C0", "approximation"), (best, low, "C1", "amortisation")):
        ax.bar(at, upper - lower, bottom=lower, width=0.5, color=colour, label=label if at == 0 else None)
        ax.annotate(f"{upper - lower:.2f}", (at, (upper + lower) / 2), ha="center", va="center")
    ax.annotate(f"log p(x) {top:.2f}", (at, top), (0, 3), textcoords="offset points", ha="center", va="bottom")
    ax.annotate(f"ELBO {low:.2f}", (at, low), (0, -3), textcoords="offset points", ha="center", va="top")


def _draw_spread(ax: "Axes", positions: tuple[float, float], losses: Losses) -> None:
    values = [losses.approximation.cpu().numpy(), losses.amortization.cpu().numpy()]
    boxes = ax.boxplot(values, positions=positions, widths=0.6, showfliers=False, patch_artist=True, whis=(5, 95))
    for box, colour in zip(boxes["boxes"], ("C0", "C1"), strict=True):
        box.set(facecolor=colour, alpha=0.6)
    for line in boxes["medians"]:
        line.set(color="black")


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
    r"""Splits the gap between log p(x) and the ELBO into its parts.

    .. math:: \log p(x) - \mathcal{L}[q] = \underbrace{\log p(x) - \mathcal{L}[q^*]}_{\text{approximation}}
        + \underbrace{\mathcal{L}[q^*] - \mathcal{L}[q]}_{\text{amortisation}}, \qquad
        q^* = \arg\max_{q \in \mathcal{Q}} \mathcal{L}[q](x)

    with the best q of the guide's family for each datum, found by gradient steps from the encoder's q
    (:func:`pyrovae.estimators.refine`). With training data, also the generalisation gap.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide.
        *args: tensors with the data along their first dimension; other objects are passed on.
        train: the arguments for training data; a single one need not be in a tuple.
        method: an estimator of log p(x). By default :class:`~pyrovae.estimators.AnnealedImportanceSampling` from the
            prior, which does not use the guide, or :class:`~pyrovae.estimators.Enumeration` for discrete latents.
        num_samples: draws per datum for the ELBOs, at least 2.
        num_steps: gradient steps to the best q.
        learning_rate: the initial learning rate.
        progress: whether to show progress bars.
        **kwargs: as `args`, for both sets of data.

    Returns:
        :class:`Gaps`.

    Raises:
        ValueError: as in :func:`pyrovae.log_marginal`; when the guide's family has no parameters.

    References:
        Inference Suboptimality in Variational Autoencoders, C. Cremer, X. Li and D. Duvenaud, 2018,
        https://arxiv.org/abs/1801.03558.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> method = ImportanceSampling(100)
    >>> result = gaps(vae.model, vae.guide, torch.zeros(5, 3), method=method, num_steps=5, progress=False)
    >>> bool((result.test.approximation + result.test.amortization - result.test.inference).abs().max() < 1e-5)
    True
    """
    check_at_least("num_samples", num_samples, 2)
    if train is not None:
        train = train if isinstance(train, tuple) else (train,)

    def measure(args: tuple, name: str) -> Losses:
        return _measure(model, guide, args, kwargs, method, num_samples, num_steps, learning_rate, progress, name)

    return Gaps(measure(args, "test"), None if train is None else measure(train, "train"))


def _measure(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict,
    method: Estimator | None,
    num_samples: int,
    num_steps: int,
    learning_rate: float,
    progress: bool,
    name: str,
) -> Losses:
    args, kwargs, size = in_memory(1, "gaps", model, args, kwargs)
    structure = inspect_part(model, guide, slice(0, 2), args, kwargs)
    if method is None:
        if structure.latents == structure.discrete:
            method = Enumeration()
        else:
            method = ImportanceSampling(10 * num_samples) if structure.discrete else AnnealedImportanceSampling()
    estimate = log_marginal(model, guide, *args, method=method, progress=progress, **kwargs)
    rows = []
    with evaluation_mode(), tqdm(total=size, desc=f"best q, {name}", unit="datum", disable=not progress) as bar:
        for start in range(0, size, _DATA):
            part, named = take_rows(slice(start, start + _DATA), args, kwargs)
            bound = bounds.ELBO(num_particles=16)
            tuned = refine(model, guide, *part, bound=bound, num_steps=num_steps, learning_rate=learning_rate, **named)
            row = []
            for q in (tuned, guide):
                log_w = log_weights(model, q, *part, num_samples=num_samples, **named)
                row += [log_w.mean(0), log_w.std(0) / math.sqrt(num_samples)]
            rows.append(row)
            bar.update(min(_DATA, size - start))
    best, best_error, elbo, elbo_error = (torch.cat(column) for column in zip(*rows, strict=True))
    return Losses(estimate, best, elbo, best_error, elbo_error)


def _standard_error(t: Tensor) -> float:
    return t.std().item() / math.sqrt(len(t)) if len(t) > 1 else math.nan


def _mean(t: Tensor) -> str:
    return f"{t.mean().item():.3f} ± {_standard_error(t):.3f}"
