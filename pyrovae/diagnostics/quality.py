"""How samples compare with data in a feature space: precision, recall and Fréchet distance, and their floor."""

import math
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrovae.arguments import elements_per_datum, named_tensors, take_rows
from pyrovae.diagnostics.base import TABLE_WIDTH, Diagnosis, ReportInputs, check_at_least, in_memory, latents_of
from pyrovae.distributions import center
from pyrovae.inference.messages import check_finite
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.simulation import check_simulated, simulate
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import inspect
from pyrovae.inference.weights import inspect_samples, trace_guide
from pyrovae.plots.drawing import are_images, grid_of, new_figure, show
from pyrovae.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PrecisionRecall", "Quality", "QualityScores", "frechet_distance", "precision_recall", "quality"]

_CHUNK = 2**20  # elements of the data, or distances, processed at once
_NUM_DRAWS = 8  # of the guide, over which features are averaged if they depend on draws
_NUM_EXAMPLES = 36
_ERRORS = 2  # standard errors: smaller differences from the floor may be chance
_FAR = 2.0  # a Fréchet distance above this multiple of the floor is large


class PrecisionRecall(NamedTuple):
    """Precision, the share of samples that look like data, and recall, the share of data that look like samples."""

    precision: float
    recall: float


class QualityScores(NamedTuple):
    """Precision, recall and Fréchet distance of samples to data."""

    precision: float
    recall: float
    frechet: float


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    r"""Shares of samples within the manifold of the data, and of data within that of the samples.

    .. math:: \mathrm{precision} = \frac{1}{M} \sum_{j=1}^M
        \mathbb{1}\!\left[\exists i : \lVert g_j - r_i \rVert \le \rho_k(r_i)\right], \qquad
        \mathrm{recall} = \frac{1}{N} \sum_{i=1}^N
        \mathbb{1}\!\left[\exists j : \lVert r_i - g_j \rVert \le \rho_k(g_j)\right]

    The manifold of a set is the union of balls around its members, each with the distance :math:`\rho_k` to the k-th
    nearest neighbour in the set as its radius; the ball of an outlier is large. Both shares depend on the sizes of the
    sets: compare only at equal sizes.

    Args:
        real: features of data, shape ``(n, d)``.
        generated: features of samples, shape ``(m, d)``.
        k: the number of the nearest neighbour.

    Returns:
        A :class:`PrecisionRecall`.

    Raises:
        ValueError: when features are not two-dimensional, differ in width, hold NaN or infinity or have fewer than
            ``k + 2`` rows, or k is below 1.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models, T. Kynkäänniemi, T. Karras, S. Laine, J.
        Lehtinen and T. Aila, 2019, https://arxiv.org/abs/1904.06991.

    >>> real = torch.tensor([[0.0], [1.0], [2.0]])
    >>> precision_recall(real, torch.tensor([[0.5], [0.6], [9.0]]), k=1)
    PrecisionRecall(precision=0.6666666666666666, recall=0.6666666666666666)
    """
    check_at_least("k", k, 1)
    real, generated = _check_features(real, generated, at_least=k + 2)
    return PrecisionRecall(_share_inside(real, generated, k), _share_inside(generated, real, k))


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    r"""Squared Fréchet (2-Wasserstein) distance between normal distributions fitted to two sets of features.

    .. math:: \lVert m_r - m_g \rVert^2
        + \operatorname{tr}\!\left(C_r + C_g - 2 \left(C_r^{1/2} C_g C_r^{1/2}\right)^{1/2}\right)

    It is called FID if the features are those of an Inception network. Computed in double precision, and correct for
    covariances without full rank. It grows as the number of rows falls: compare only at equal sizes.

    Args:
        real: features of data, shape ``(n, d)``.
        generated: features of samples, shape ``(m, d)``.

    Raises:
        ValueError: when features are not two-dimensional, differ in width, hold NaN or infinity or have fewer than 2
            rows.

    References:
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, M. Heusel, H. Ramsauer, T.
        Unterthiner, B. Nessler and S. Hochreiter, 2017, https://arxiv.org/abs/1706.08500.

    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet_distance(x, 3 * x + 1), 6)  # means 0 and 1, standard deviations sqrt(2) and 3 sqrt(2)
    9.0
    """
    real, generated = _check_features(real, generated, at_least=2)
    # With C = R'R, the trace of the root is the sum of the singular values of R_r R_g', which needs no matrix root.
    cross = torch.linalg.matrix_norm(_factor(real) @ _factor(generated).T, ord="nuc")
    spread = real.var(0).sum() + generated.var(0).sum() - 2 * cross
    return ((real.mean(0) - generated.mean(0)).square().sum() + spread.clamp_min(0)).item()


@dataclass(frozen=True)
class Quality(Diagnosis):
    """How samples from a model compare with its data in a feature space.

    Args:
        model: the scores of samples against data, the mean over the two halves of the data.
        floor: the scores of one half of the data against the other: those of a perfect model at this size.
        size: number of data, and of samples, in each half.
        k: the number of the nearest neighbour.
        features: name of the features.
        real: features of the data, shape ``(n, d)``.
        generated: features of the samples, of the same shape.
        data: the first data, for the picture.
        samples: the first samples, for the picture.
    """

    question: ClassVar[str] = "Are samples like the data?"

    model: QualityScores
    floor: QualityScores
    size: int
    k: int
    features: str
    real: Tensor
    generated: Tensor
    data: Tensor
    samples: Tensor

    @property
    def verdict(self) -> str:
        findings = []
        if self._below("precision"):
            findings.append(
                f"{1 - self.model.precision:.0%} of samples are unlike data (floor {1 - self.floor.precision:.0%}): "
                "a prior closer to the encoded data (priors.VampPrior, priors.FlowPrior), or a learned scale "
                "(likelihoods.OptimalNormal) where pixels are noisy"
            )
        if self._below("recall"):
            findings.append(
                f"{1 - self.model.recall:.0%} of data are unlike any sample (floor {1 - self.floor.recall:.0%}): "
                "modes are missing; a larger latent_dim, a tighter bound (bounds.IWAE) or a lower beta in bounds.ELBO"
            )
        if not findings and self.model.frechet > _FAR * self.floor.frechet:
            findings.append(
                "Precision and recall reach the floor, but the Fréchet distance is more than "
                f"{_FAR:g} times the floor: means or covariances differ; a richer prior (priors.FlowPrior)"
            )
        return (
            ". ".join(findings or [f"{self.size:,} samples cannot be distinguished from data by these features"]) + "."
        )

    def _below(self, score: str) -> bool:
        model, floor = getattr(self.model, score), getattr(self.floor, score)
        # Binomial errors: the model's share is of 2 n (both halves), the floor's of n.
        variance = (model * (1 - model) / 2 + floor * (1 - floor)) / self.size
        return floor - model > _ERRORS * math.sqrt(variance) + 1 / self.size

    def numbers(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "k": self.k,
            "features": self.features,
            "model": self.model._asdict(),
            "floor": self.floor._asdict(),
        }

    def draw(self) -> "Figure":
        """Draws features of data and samples in a plane, precision and recall with their floor, and some of both."""
        images = are_images(self.data)
        figure = new_figure(14 if images else 10, 4.6)
        axes = figure.subplots(1, 4 if images else 2, width_ratios=[1.2, 0.8, 1, 1] if images else [1.2, 0.8])
        self._draw_features(axes[0])
        self._draw_scores(axes[1])
        if images:
            # Both on the scale on which the data go from 0 to 1.
            low, high = self.data.min(), self.data.max()
            for ax, x, name in zip(axes[2:], (self.data, self.samples), ("data", "samples"), strict=True):
                show(ax, grid_of((x - low) / (high - low).clamp_min(1e-12), 6))
                ax.set_axis_off()
                ax.set_title(name)
        return figure

    def _draw_features(self, ax: "Axes") -> None:
        center = self.real.mean(0)
        _, _, principal = torch.linalg.svd(self.real - center, full_matrices=False)
        for x, name, colour in ((self.real, "data", "C0"), (self.generated, "samples", "C1")):
            at = ((x - center) @ principal[:2].T).cpu()
            if at.shape[1] == 1:
                ax.hist(at[:, 0].numpy(), bins=30, alpha=0.6, color=colour, label=name)
            else:
                ax.scatter(at[:, 0].numpy(), at[:, 1].numpy(), s=8, linewidths=0, alpha=0.6, color=colour, label=name)
        second = "number" if self.real.shape[1] == 1 else "second principal component"
        ax.set(xlabel="first principal component", ylabel=second, title=self.features)
        ax.legend()

    def _draw_scores(self, ax: "Axes") -> None:
        for i, (name, scores) in enumerate((("samples", self.model), ("data, the floor", self.floor))):
            colour = ("C1", "C0")[i]
            heights = ax.bar([i * 0.4 - 0.2, 1 + i * 0.4 - 0.2], scores[:2], width=0.4, color=colour, label=name)
            ax.bar_label(heights, fmt="%.2f", padding=2)
        ax.set_xticks([0, 1], ["precision", "recall"])
        ax.set(ylim=(0, 1.25), ylabel=f"share ({self.size:,} against {self.size:,})")
        ax.set_title(f"Fréchet distance {self.model.frechet:.3g}, floor {self.floor.frechet:.3g}", fontsize="medium")
        ax.legend(loc="upper center", ncols=2, fontsize="small")

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Quality":
        return quality(inputs.model, inputs.guide, *inputs.args)

    def table(self) -> list[str]:
        lines = [
            *textwrap.wrap(f"quality of samples by {self.features} ({self.real.shape[1]} features)", TABLE_WIDTH),
            f"{self.size:,} samples against {self.size:,} data, twice; {self.k} nearest neighbours",
            f"{'':30}{'precision':>10}{'recall':>10}{'Fréchet distance':>20}",
        ]
        for name, scores in (("samples against data", self.model), ("data against data, the floor", self.floor)):
            lines.append(f"{name:30}{scores.precision:10.3f}{scores.recall:10.3f}{scores.frechet:20.4g}")
        return lines


@torch.no_grad()
def quality(
    model: Callable,
    guide: Callable,
    *args: Any,
    features: Callable[[Tensor], Tensor] | None = None,
    k: int = 3,
    progress: bool = True,
    **kwargs: Any,
) -> Quality:
    """Compares samples from a model with data: are they plausible (precision), and do they cover the data (recall)?

    One sample is drawn from p(x) for each datum, with its context. Data and samples are split into halves at random,
    and each half of the samples is compared with one half of the data. The scores of one half of the data against the
    other are the floor, which no model of the data beats except by chance. All scores depend on the size, which is the
    same for all of them.

    Args:
        model: a Pyro model that observes one of its arguments, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; other objects are passed on.
        features: maps data ``(batch, *x_shape)`` to features ``(batch, d)`` with meaningful distances: the hidden layer
            of a classifier, for example. By default the means of the guide's latents, which do not see what the encoder
            ignores.
        k: the number of the nearest neighbour, see :func:`precision_recall`.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Quality`.

    Raises:
        ValueError: when there are fewer than ``2 (k + 2)`` data, k is below 1, features are not ``(batch, d)`` or hold
            NaN or infinity, the guide has no latents in the data plate, or the model observes none of its arguments.

    References:
        Improved Precision and Recall Metric for Assessing Generative Models, T. Kynkäänniemi, T. Karras, S. Laine, J.
        Lehtinen and T. Aila, 2019, https://arxiv.org/abs/1904.06991; GANs Trained by a Two Time-Scale Update Rule
        Converge to a Local Nash Equilibrium, M. Heusel et al., 2017, https://arxiv.org/abs/1706.08500.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> quality(vae.model, vae.guide, torch.randn(40, 3)).size
    20
    """
    check_at_least("k", k, 1)
    args, kwargs, size = in_memory(2 * (k + 2), f"quality with k={k}", model, args, kwargs)
    chunk = max(1, int(_CHUNK / (_NUM_DRAWS * elements_per_datum(args, kwargs, size))))
    real_parts: list[Tensor] = []
    generated_parts: list[Tensor] = []
    with evaluation_mode(), tqdm(total=size, desc="quality", unit="datum", delay=0.5, disable=not progress) as bar:
        for start in range(0, size, chunk):
            part_args, part_kwargs = take_rows(slice(start, start + chunk), args, kwargs)
            structure = inspect(model, guide, *part_args, **part_kwargs)
            trace, drawn_args, drawn_kwargs = simulate(model, structure, *part_args, **part_kwargs)
            check_simulated(model, trace, structure, drawn_args, drawn_kwargs)
            x, drawn = _observed((part_args, part_kwargs), (drawn_args, drawn_kwargs))
            if start == 0:
                data, samples = x[:_NUM_EXAMPLES], drawn[:_NUM_EXAMPLES]
            if features is None:
                real_parts.append(_latent_means(model, guide, part_args, part_kwargs))
                generated_parts.append(_latent_means(model, guide, drawn_args, drawn_kwargs))
            else:
                real_parts.append(features(x))
                generated_parts.append(features(drawn))
                for inputs, outputs in ((x, real_parts[-1]), (drawn, generated_parts[-1])):
                    if outputs.dim() != 2 or len(outputs) != len(inputs):
                        raise ValueError(
                            f"features must be (batch, d), but for data of shape {tuple(inputs.shape)} they have shape "
                            f"{tuple(outputs.shape)}. Flatten them to one row per datum."
                        )
            bar.update(len(x))
    real, generated = _check_features(torch.cat(real_parts), torch.cat(generated_parts), at_least=2 * (k + 2))
    half = size // 2
    a, b = torch.randperm(size)[: 2 * half].split(half)
    both = [_scores(real[rows], generated[rows], k) for rows in (a, b)]
    return Quality(
        model=QualityScores(*((one + other) / 2 for one, other in zip(*both, strict=True))),
        floor=_scores(real[a], real[b], k),
        size=half,
        k=k,
        features="means of the guide's latents" if features is None else _name_of(features),
        real=real,
        generated=generated,
        data=data,
        samples=samples,
    )


def _scores(real: Tensor, generated: Tensor, k: int) -> QualityScores:
    return QualityScores(*precision_recall(real, generated, k), frechet_distance(real, generated))


def _observed(given: tuple[tuple, dict], drawn: tuple[tuple, dict]) -> tuple[Tensor, Tensor]:
    """Returns the first argument that the model observes, as given and as drawn."""
    for (_, x), (_, sample) in zip(named_tensors(*given), named_tensors(*drawn), strict=True):
        if sample is not x:
            return x, sample
    raise ValueError("The model observes none of its arguments, so there are no data to compare samples with.")


def _latent_means(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
    structure = inspect_samples(model, guide, *args, **kwargs)
    trace = trace_guide(guide, structure, _NUM_DRAWS, *args, **kwargs)
    for name, site in sample_sites(trace).items():
        if site["data"] is not None and not site["is_observed"]:
            with suppress(NotImplementedError):  # a flow has no mean: take that of its draws
                trace.nodes[name] = {**site, "value": center(site["fn"])}
    return latents_of(trace, structure).values.mean(0)


def _name_of(features: Callable) -> str:
    return getattr(features, "__name__", type(features).__name__)


def _check_features(real: Tensor, generated: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    """Returns two sets of features in double precision; raises a ValueError if they cannot be compared."""
    for name, x in (("real", real), ("generated", generated)):
        if x.dim() != 2:
            raise ValueError(f"{name} must be features of shape (n, d), got {tuple(x.shape)}. Flatten them.")
        if len(x) < at_least:
            raise ValueError(f"{name} needs at least {at_least} rows, got {len(x)}. Give it more.")
        if not bool(torch.isfinite(x).all()):
            check_finite(f"{name} (features)", x)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real has {real.shape[1]} features but generated has {generated.shape[1]}.")
    return real.double(), generated.double()


def _share_inside(centers: Tensor, points: Tensor, k: int) -> float:
    """Returns the share of points inside a ball around a centre, whose radius reaches its k-th nearest neighbour."""
    rows = max(1, _CHUNK // max(len(centers), len(points)))
    # A centre is its own nearest neighbour.
    radius = torch.cat([_distances(part, centers).kthvalue(k + 1, dim=1).values for part in centers.split(rows)])
    inside = [(_distances(part, centers) <= radius).any(1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not by matrix products: then the distance of a point to itself is not zero, and ties are not equal.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _factor(x: Tensor) -> Tensor:
    """Returns R with R'R the covariance of features."""
    return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R
