"""How generated rows of a table compare with held-out rows: columns, pairs, use for classifiers, and copies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.columns import Discrete, Modelled
from pyrovae.diagnostics.base import Diagnosis, ReportInputs
from pyrovae.plots.drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Copies", "SyntheticRows", "Utility", "synthetic_rows"]

_FEWEST = 30  # rows of each set
_BINS = 10  # of a column of numbers, in its joint distribution with others: tenths of the held-out rows
_MAX_COMPARED = 5000  # rows whose nearest rows are looked for
_MAX_CLASSIFIED = 20  # levels of the column that is predicted
_MAX_TRAINED = 50_000  # rows that a classifier is trained on
_CHUNK = 2**24  # differences of cells computed at once
_ERRORS = 3  # standard errors
_WORSE = 0.02  # a mean score so much below that of real rows is said


class Utility(NamedTuple):
    """How well a classifier predicts a column of the held-out rows.

    Args:
        f1: the F1 score, the mean over the classes.
        auroc: the area under the ROC curve of each class against the others, the mean over the classes.
    """

    f1: float
    auroc: float


class Copies(NamedTuple):
    """How near generated rows are to training rows, and to as many held-out rows.

    Args:
        share: the share of generated rows that are nearer to a training row; 0.5 if nothing is copied.
        standard_error: its standard error if nothing is copied.
        generated: the median distance of a generated row to the closest training row, in columns.
        held_out: the same distance of a held-out row.
        equal: the share of generated rows that are equal to a training row.
        equal_held_out: the same share of held-out rows.
    """

    share: float
    standard_error: float
    generated: float
    held_out: float
    equal: float
    equal_held_out: float


@dataclass(frozen=True)
class SyntheticRows(Diagnosis):
    """How generated rows of a table compare with held-out rows.

    Args:
        names: names of the columns.
        columns: for each column the likeness of generated and held-out rows, 0 to 1, ``(D,)``.
        columns_floor: the likeness of training and held-out rows, which a perfect model reaches.
        pairs: for each pair of columns the likeness of generated and held-out rows, ``(D, D)``.
        pairs_floor: that of training and held-out rows.
        missing: for each column the share of missing cells in generated rows less that in held-out rows, ``(D,)``.
        size: number of held-out rows, and of the generated and the training rows that are compared with them.
        target: the column that a classifier predicts, or None.
        trained_on_generated: scores of a classifier that is trained on generated rows; None without a column to
            predict that has several classes in the held-out rows.
        trained_on_real: those of one that is trained on training rows, or None.
        copies: how near generated rows are to training rows.
    """

    question: ClassVar[str] = "Are generated rows as good as real ones?"

    names: tuple[str, ...]
    columns: Tensor
    columns_floor: Tensor
    pairs: Tensor
    pairs_floor: Tensor
    missing: Tensor
    size: int
    target: str | None
    trained_on_generated: Utility | None
    trained_on_real: Utility | None
    copies: Copies

    @property
    def column_score(self) -> float:
        """The mean likeness of columns."""
        return self.columns.mean().item()

    @property
    def pair_score(self) -> float:
        """The mean likeness of pairs of columns; 1 for a single column."""
        return _mean_of_pairs(self.pairs)

    @property
    def verdict(self) -> str:
        findings = []
        if self.copies.share > 0.5 + _ERRORS * self.copies.standard_error:
            findings.append(
                f"{self.copies.share:.0%} of generated rows are nearer to a training row than to a held-out row, where "
                "50% are expected: the model copies rows; use fewer weights or stop earlier"
            )
        if self.columns_floor.mean().item() - self.column_score > _WORSE:
            d = int((self.columns - self.columns_floor).argmin())
            findings.append(
                f"Columns differ, {self.names[d]!r} most ({self.columns[d]:.3f}, real rows "
                f"{self.columns_floor[d]:.3f}): train longer, or change its kind in the schema"
            )
        if _mean_of_pairs(self.pairs_floor) - self.pair_score > _WORSE:
            i, j = divmod(int((self.pairs - self.pairs_floor).argmin()), len(self.names))
            findings.append(
                f"Pairs of columns differ, {self.names[i]!r} and {self.names[j]!r} most ({self.pairs[i, j]:.3f}, real "
                f"rows {self.pairs_floor[i, j]:.3f}): a larger latent_dim or network, or a richer prior"
            )
        if self.trained_on_generated and self.trained_on_real:
            lost = self.trained_on_real.auroc - self.trained_on_generated.auroc
            if lost > _WORSE:
                findings.append(
                    f"A classifier of {self.target!r} loses {lost:.3f} of AUROC when it is trained on generated rows"
                )
        if not findings:
            findings = ["Generated rows are as like held-out rows as training rows are, and none are copied"]
        return ". ".join(findings) + "."

    def numbers(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "column_score": self.column_score,
            "column_score_floor": self.columns_floor.mean().item(),
            "pair_score": self.pair_score,
            "pair_score_floor": _mean_of_pairs(self.pairs_floor),
            "columns": dict(zip(self.names, self.columns.tolist(), strict=True)),
            "missing": dict(zip(self.names, self.missing.tolist(), strict=True)),
            "target": self.target,
            "trained_on_generated": self.trained_on_generated and self.trained_on_generated._asdict(),
            "trained_on_real": self.trained_on_real and self.trained_on_real._asdict(),
            "copies": self.copies._asdict(),
        }

    def table(self) -> list[str]:
        lines = [
            f"{self.size:,} generated rows against {self.size:,} held-out rows (1: the same distribution)",
            f"{'':44}{'generated':>12}{'real':>12}",
            f"{'columns, mean likeness':44}{self.column_score:12.3f}{self.columns_floor.mean().item():12.3f}",
            f"{'pairs of columns, mean likeness':44}{self.pair_score:12.3f}{_mean_of_pairs(self.pairs_floor):12.3f}",
        ]
        worst = (self.columns - self.columns_floor).argsort()[:3].tolist()
        for d in worst:
            name = self.names[d] if len(self.names[d]) <= 38 else self.names[d][:37] + "…"
            lines.append(f"  {name:42}{self.columns[d]:12.3f}{self.columns_floor[d]:12.3f}")
        if self.trained_on_generated and self.trained_on_real:
            target = (self.target or "")[:22]
            for name in ("f1", "auroc"):
                label = f"classifier of {target}, {name.upper()}"
                a, b = getattr(self.trained_on_generated, name), getattr(self.trained_on_real, name)
                lines.append(f"{label:44}{a:12.3f}{b:12.3f}")
        copies = self.copies
        lines.append(
            f"{'distance to the closest training row, median':44}{copies.generated:12.3f}{copies.held_out:12.3f}"
        )
        lines.append(f"{'equal to a training row':44}{copies.equal:12.2%}{copies.equal_held_out:12.2%}")
        lines.append(
            f"nearer to a training row than to a held-out row: {copies.share:.1%} +- {copies.standard_error:.1%} (50% "
            "expected)"
        )
        return lines

    def draw(self) -> "Figure":
        """Draws the likeness of each column and of each pair of columns."""
        figure = new_figure(12, max(3.6, 1.2 + 0.26 * len(self.names)))
        left, right = figure.subplots(1, 2)
        at = np.arange(len(self.names))
        left.barh(at - 0.2, self.columns.numpy(), 0.4, color="C1", label="generated rows")
        left.barh(at + 0.2, self.columns_floor.numpy(), 0.4, color="C0", label="training rows")
        left.set_yticks(at, self.names)
        left.invert_yaxis()
        left.set(xlim=(min(0.8, self.columns.min().item() - 0.05), 1), xlabel="likeness to held-out rows")
        left.legend(loc="lower left", fontsize="small")
        image = right.imshow((self.pairs - self.pairs_floor).numpy(), cmap="RdBu", vmin=-0.3, vmax=0.3)
        right.set_xticks(at, self.names, rotation=90)
        right.set_yticks(at, self.names)
        right.set_title("pairs: generated less training rows", fontsize="medium")
        figure.colorbar(image, ax=right)
        return figure

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "SyntheticRows":
        if inputs.columns is None or inputs.generated is None:
            raise ValueError("these data are no table with a schema, so that they have no columns to compare.")
        return synthetic_rows(inputs.train, inputs.x, inputs.generated, inputs.columns)


def synthetic_rows(
    train: Tensor,
    held_out: Tensor,
    generated: Tensor,
    columns: Sequence[Modelled],
    *,
    target: str | None = None,
    seed: int = 0,
) -> SyntheticRows:
    r"""Compares generated rows of a table with held-out rows.

    The likeness of two samples of a column is one minus the Kolmogorov-Smirnov distance of numbers, or minus the total
    variation distance of levels; that of a pair of columns is one minus the total variation distance of their joint
    distribution, with numbers in tenths of the held-out rows:

    .. math:: 1 - \sup_v |F(v) - G(v)|, \qquad 1 - \frac{1}{2} \sum_{k, l} |p_{kl} - q_{kl}|

    Missing cells are left out of both. Training rows, as many as there are held-out rows, give the likeness that a
    perfect model reaches at this size. A classifier (gradient-boosted trees) is trained on generated and on training
    rows, as many of each, and tested on held-out rows. The distance of two rows is the sum over columns of the
    difference of ranks (numbers) or 0 and 1 (levels): if the model copies training rows, generated rows are nearer to
    them than to as many held-out rows.

    Args:
        train: training rows, ``(size, D)``, as a :class:`~pyrovae.data.Schema` encodes them, NaN where missing.
        held_out: rows that the model has not seen.
        generated: rows drawn from the model.
        columns: the columns, ``schema.modelled``.
        target: the name of a discrete column to predict; by default the last one of up to 20 levels.
        seed: seed of the rows that are taken and of the classifiers.

    Returns:
        A :class:`SyntheticRows`.

    Raises:
        ValueError: when a set has fewer than 30 rows or another number of columns, or `target` is no discrete column.

    References:
        Modeling Tabular Data Using Conditional GAN, L. Xu, M. Skoularidou, A. Cuesta-Infante and K. Veeramachaneni,
        2019, https://arxiv.org/abs/1907.00503; The Synthetic Data Vault, N. Patki, R. Wedge and K. Veeramachaneni,
        2016, https://doi.org/10.1109/DSAA.2016.49.

    >>> from pyrovae.data import Category, Real
    >>> columns = [Real("a", 0, 1), Category("b", ("x", "y"))]
    >>> def rows(n):
    ...     b = torch.bernoulli(torch.full((n,), 0.3))
    ...     return torch.stack([torch.randn(n) + b, b], dim=1)
    >>> _ = torch.manual_seed(0)
    >>> synthetic_rows(rows(500), rows(500), rows(500), columns).pair_score > 0.85
    True
    """
    sets = {"train": train, "held_out": held_out, "generated": generated}
    for name, x in sets.items():
        if x.dim() != 2 or x.shape[1] != len(columns) or len(x) < _FEWEST:
            raise ValueError(
                f"{name} must have at least {_FEWEST} rows and the {len(columns)} columns, got shape {tuple(x.shape)}."
            )
    rng = np.random.default_rng(seed)
    real, other, made = (x.detach().cpu().double().numpy() for x in sets.values())
    size = min(len(real), len(other), len(made))
    a, b, c = (x[rng.permutation(len(x))[:size]] for x in (real, other, made))
    discrete = [isinstance(column, Discrete) for column in columns]
    scores, floors = (_likeness_of_columns(x, b, discrete) for x in (c, a))
    codes = [_codes(x, b, columns) for x in (a, b, c)]
    place = _place_of(target, columns)
    on_generated = on_real = None
    if place is not None:
        trained = min(len(real), len(made), _MAX_TRAINED)
        on_generated, on_real = (
            _utility(x[rng.permutation(len(x))[:trained]], other, columns, place, seed) for x in (made, real)
        )
    return SyntheticRows(
        names=tuple(column.name for column in columns),
        columns=scores,
        columns_floor=floors,
        pairs=_likeness_of_pairs(codes[2], codes[1]),
        pairs_floor=_likeness_of_pairs(codes[0], codes[1]),
        missing=torch.from_numpy(np.isnan(c).mean(0) - np.isnan(b).mean(0)),
        size=size,
        target=None if place is None else columns[place].name,
        trained_on_generated=on_generated,
        trained_on_real=on_real,
        copies=_copies(a[:_MAX_COMPARED], b[:_MAX_COMPARED], c[:_MAX_COMPARED], discrete),
    )


def _mean_of_pairs(pairs: Tensor) -> float:
    d = len(pairs)
    return 1.0 if d < 2 else pairs[~torch.eye(d, dtype=torch.bool)].mean().item()


def _likeness_of_columns(x: np.ndarray, y: np.ndarray, discrete: list[bool]) -> Tensor:
    scores = []
    for d, is_discrete in enumerate(discrete):
        a, b = (v[~np.isnan(v)] for v in (x[:, d], y[:, d]))
        if not len(a) or not len(b):
            scores.append(float(len(a) == len(b)))
            continue
        values = np.unique(np.concatenate([a, b]))
        if is_discrete:
            shares = [(v[:, None] == values).mean(0) if len(values) < 50 else _shares(v, values) for v in (a, b)]
            scores.append(1 - np.abs(shares[0] - shares[1]).sum() / 2)
        else:
            below = [np.searchsorted(np.sort(v), values, side="right") / len(v) for v in (a, b)]
            scores.append(1 - np.abs(below[0] - below[1]).max())
    return torch.tensor(scores)


def _shares(v: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(np.searchsorted(values, v), minlength=len(values)) / len(v)


def _codes(x: np.ndarray, held_out: np.ndarray, columns: Sequence[Modelled]) -> list[np.ndarray]:
    """Returns codes of all cells, -1 where missing: levels, and numbers in tenths of the held-out rows."""
    codes = []
    for d, column in enumerate(columns):
        v = x[:, d]
        if isinstance(column, Discrete):
            code = np.where(np.isnan(v), -1, v)
        else:
            known = held_out[:, d][~np.isnan(held_out[:, d])]
            edges = np.unique(np.quantile(known, np.arange(1, _BINS) / _BINS)) if len(known) else np.empty(0)
            # A value that many rows have is a bin of its own: both sides of it are edges.
            code = np.where(np.isnan(v), -1, np.searchsorted(edges, v, "left") + np.searchsorted(edges, v, "right"))
        codes.append(code.astype(np.int64))
    return codes


def _likeness_of_pairs(x: list[np.ndarray], y: list[np.ndarray]) -> Tensor:
    d = len(x)
    scores = torch.ones(d, d)
    for i in range(d):
        for j in range(i + 1, d):
            width = int(max(x[j].max(), y[j].max())) + 1
            joint = []
            for codes in (x, y):
                present = (codes[i] >= 0) & (codes[j] >= 0)
                joint.append(codes[i][present] * width + codes[j][present])
            if len(joint[0]) and len(joint[1]):
                cells = int(max(joint[0].max(), joint[1].max())) + 1
                p, q = (np.bincount(v, minlength=cells) / len(v) for v in joint)
                scores[i, j] = scores[j, i] = 1 - float(np.abs(p - q).sum()) / 2
            else:
                scores[i, j] = scores[j, i] = float(len(joint[0]) == len(joint[1]))
    return scores


def _place_of(target: str | None, columns: Sequence[Modelled]) -> int | None:
    """Returns the place of the column to predict, None if there is none."""
    fitting = [d for d, c in enumerate(columns) if isinstance(c, Discrete) and c.num_levels <= _MAX_CLASSIFIED]
    if target is None:
        return fitting[-1] if fitting and len(columns) > 1 else None
    places = [d for d in fitting if columns[d].name == target]
    if not places:
        names = ", ".join(repr(columns[d].name) for d in fitting) or "none"
        raise ValueError(
            f"target must be a discrete column of up to {_MAX_CLASSIFIED} levels ({names}), got {target!r}."
        )
    return places[0]


def _utility(
    rows: np.ndarray, held_out: np.ndarray, columns: Sequence[Modelled], place: int, seed: int
) -> Utility | None:
    """Returns the scores of a classifier trained on rows; None where the held-out rows have a single class."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # slow to import
    from sklearn.metrics import f1_score, roc_auc_score

    rows, held_out = (x[~np.isnan(x[:, place])] for x in (rows, held_out))
    y, y_test = (x[:, place].astype(int) for x in (rows, held_out))
    if len(y) == 0 or len(np.unique(y_test)) < 2:
        return None
    inputs = [d for d in range(len(columns)) if d != place and not np.isnan(rows[:, d]).all()]
    probability = np.zeros((len(y_test), int(max(y.max(), y_test.max())) + 1))
    if len(np.unique(y)) == 1 or not inputs:  # nothing to learn: the most frequent class
        probability[:, np.bincount(y).argmax()] = 1
    else:
        levels = [c.num_levels if isinstance(c, Discrete) else 0 for c in (columns[d] for d in inputs)]
        classifier = HistGradientBoostingClassifier(
            categorical_features=[2 < n <= 255 for n in levels], early_stopping=False, random_state=seed
        ).fit(rows[:, inputs], y)
        probability[:, classifier.classes_] = classifier.predict_proba(held_out[:, inputs])
    present = np.unique(y_test)
    areas = [roc_auc_score(y_test == k, probability[:, k]) for k in present]
    f1 = f1_score(y_test, probability.argmax(1), labels=present, average="macro", zero_division=0)
    return Utility(float(f1), float(np.mean(areas)))


def _copies(train: np.ndarray, held_out: np.ndarray, generated: np.ndarray, discrete: list[bool]) -> Copies:
    pooled = np.concatenate([train, held_out])
    t, h, g = (_ranks(x, pooled, discrete) for x in (train, held_out, generated))
    to_train, nearest_train = _closest(g, t, discrete)
    to_held_out, nearest_held_out = _closest(g, h, discrete)
    # If nothing is copied, training and held-out rows can be exchanged. So the side of the closest real row is a fair
    # coin for each real row, which all generated rows that are closest to it share.
    weight = np.zeros(len(t) + len(h))
    in_train = np.where(to_train < to_held_out, 1.0, np.where(to_train == to_held_out, 0.5, 0.0))
    np.add.at(weight, nearest_train, in_train)
    np.add.at(weight, len(t) + nearest_held_out, 1 - in_train)
    held_out_to_train, _ = _closest(h, t, discrete)
    return Copies(
        share=float(in_train.mean()),
        standard_error=0.5 * math.sqrt(float((weight**2).sum())) / float(weight.sum()),
        generated=float(np.median(to_train)),
        held_out=float(np.median(held_out_to_train)),
        equal=_share_in(generated, train),
        equal_held_out=_share_in(held_out, train),
    )


def _share_in(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the share of rows of x that are rows of y. Missing cells are equal, and so are both zeros."""
    keys = [np.where(np.isnan(v), np.nan, v) + 0.0 for v in (x, y)]
    known = {row.tobytes() for row in np.ascontiguousarray(keys[1])}
    return sum(row.tobytes() in known for row in np.ascontiguousarray(keys[0])) / len(x)


def _ranks(x: np.ndarray, pooled: np.ndarray, discrete: list[bool]) -> np.ndarray:
    """Returns numbers as their ranks among real rows, 0 to 1, and levels as they are; -1 where missing."""
    ranks = np.empty(x.shape, dtype=np.float32)
    for d, is_discrete in enumerate(discrete):
        known = np.sort(pooled[:, d][~np.isnan(pooled[:, d])])
        v = x[:, d]
        if not is_discrete and len(known):
            v = np.where(np.isnan(v), np.nan, np.interp(v, *_steps(known)))
        ranks[:, d] = np.where(np.isnan(v), -1, v)
    return ranks


def _steps(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different values, and the middle of their places in the order of all."""
    values, counts = np.unique(known, return_counts=True)
    return values, (np.cumsum(counts) - counts / 2) / len(known)


def _closest(x: np.ndarray, y: np.ndarray, discrete: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each row of x the distance to the closest row of y, and which it is."""
    rows = max(1, _CHUNK // (len(y) * len(discrete)))
    levels = np.array(discrete)
    distances, places = [], []
    for part in np.array_split(x, math.ceil(len(x) / rows)):
        total = np.zeros((len(part), len(y)), dtype=np.float32)
        for d in range(len(levels)):
            difference = part[:, d, None] != y[None, :, d] if levels[d] else np.abs(part[:, d, None] - y[None, :, d])
            total += difference
        places.append(total.argmin(1))
        distances.append(total[np.arange(len(part)), places[-1]])
    return np.concatenate(distances), np.concatenate(places)
