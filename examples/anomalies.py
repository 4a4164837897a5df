"""Anomalies: rows of tables that a VAE finds improbable, beside the detectors of scikit-learn and ECOD.

    python examples/anomalies.py

Each detector learns from usual rows alone, six tenths of them, and ranks the other usual rows and the unusual ones. The
area under the ROC curve (AUROC) is the probability that an unusual row has the higher score. In `wine` one of three
cultivars in turn is unusual, in `cancer` malignant tumours are. In `diabetes` unusual rows are made of cells of
different patients: every column is as it should be, and only their dependence is gone. ECOD (Li et al. 2022,
https://arxiv.org/abs/2201.00382) adds up how far out each cell is among the cells of its column in training. The VAE
scores a row by log p(x), in the units of its columns.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import skew
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyrovae.sklearn import VariationalAutoencoder

RECORDS = Path(__file__).with_suffix(".json")


class ECOD:
    """Empirical tail probabilities of the cells of a row, in the rows that it was fitted to."""

    def fit(self, x):
        self.columns, self.is_skewed_left = np.sort(x, axis=0), skew(x, axis=0) < 0
        return self

    def score_samples(self, x):
        n = len(self.columns)
        below = np.stack([np.searchsorted(c, v, "right") for c, v in zip(self.columns.T, x.T, strict=True)], axis=1)
        above = n - np.stack([np.searchsorted(c, v, "left") for c, v in zip(self.columns.T, x.T, strict=True)], axis=1)
        low, high = np.log((below + 1) / (n + 1)), np.log((above + 1) / (n + 1))
        longer = np.where(self.is_skewed_left, low, high)
        return np.minimum(np.minimum(low.sum(1), high.sum(1)), longer.sum(1))


def tasks(rng):
    """Yields names, usual rows, and unusual ones."""
    wine, cancer, diabetes = load_wine(), load_breast_cancer(), load_diabetes(scaled=False).data
    for k in range(3):
        yield f"wine, {k}", wine.data[wine.target != k], wine.data[wine.target == k]
    yield "cancer", cancer.data[cancer.target == 1], cancer.data[cancer.target == 0]
    rng.shuffle(diabetes)
    yield "diabetes", diabetes[100:], np.stack([rng.permutation(column) for column in diabetes[:100].T], axis=1)


def main(args):
    detectors = {
        "VAE": partial(VariationalAutoencoder, 4, hidden=(32,), max_iter=args.max_iter),
        "isolation forest": IsolationForest,
        "local outlier factor": lambda random_state: make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True)),
        "ECOD": lambda random_state: ECOD(),
    }
    found = {name: {} for name in detectors}
    for seed in range(args.splits):
        rng = np.random.default_rng(seed)
        for task, usual, unusual in tasks(rng):
            order = rng.permutation(len(usual))
            train, rest = np.split(usual[order], [int(0.6 * len(usual))])
            for name, make in detectors.items():
                fitted = make(random_state=seed).fit(train)
                scores = -fitted.score_samples(np.concatenate([rest, unusual]))
                area = roc_auc_score(np.arange(len(scores)) >= len(rest), scores)
                found[name].setdefault(task, []).append(float(area))
                if name == "VAE" and task == "wine, 0" and seed == 0:
                    print(f"wine without cultivar 0: test log p(x) = {fitted.score(rest):.3f} nats a datum")
    names = list(found["VAE"])
    print(f"\nAUROC, the mean of {args.splits} splits\n{'':22}" + "".join(f"{task:>10}" for task in [*names, "mean"]))
    for name, areas in found.items():
        means = [np.mean(areas[task]) for task in names]
        print(f"{name:22}" + "".join(f"{m:10.3f}" for m in [*means, np.mean(means)]))
    best = max((name for name in found if name != "VAE"), key=lambda name: np.mean(list(found[name].values())))
    by_split = np.mean(list(found["VAE"].values()), axis=0) - np.mean(list(found[best].values()), axis=0)
    error = by_split.std(ddof=1) / len(by_split) ** 0.5
    print(f"VAE less {best}, mean of all tables: {by_split.mean():+.3f} ± {error:.3f}, standard error over splits")
    draw(found, names, args.output)
    if args.record:
        RECORDS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def draw(found, names, path):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    for i, (name, areas) in enumerate(found.items()):
        at = np.arange(len(names)) + 0.2 * (i - 1.5)
        ax.bar(at, [np.mean(areas[task]) for task in names], 0.18, label=name)
        for x, task in zip(at, names, strict=True):
            ax.plot([x] * len(areas[task]), areas[task], "_", color="black", markersize=4)
    ax.set(xticks=range(len(names)), xticklabels=names, ylim=(0.4, 1), ylabel="AUROC")
    figure.legend(loc="outside upper center", ncols=len(found), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=5, help="random splits of the rows, at least 2")
    parser.add_argument("--max-iter", type=int, default=500, help="epochs of the VAE, at most")
    parser.add_argument("--output", type=Path, default=Path("anomalies.png"), help="file of the picture")
    parser.add_argument("--record", action="store_true", help="write the areas beside this file")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.splits, args.max_iter = 2, 2
    main(args)
