"""A table: a VAE of census rows makes new rows, scores rows and fills holes, against simple methods.

    python examples/adult.py adult.data adult.test

The files are the Adult data of the UCI repository (https://archive.ics.uci.edu/dataset/2/adult) with a first line of
names. Without files, rows of a made-up table are used. Classifiers are trained on rows that the VAE makes and tested on
real ones; hidden cells of test rows are imputed by the VAE and by scikit-learn.
"""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 (IterativeImputer needs it)
from sklearn.impute import IterativeImputer, KNNImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.tree import DecisionTreeClassifier

import pyrovae
from pyrovae import data, diagnostics, encoders, likelihoods, nn, priors
from pyrovae.data.columns import Discrete
from pyrovae.structures import fit_independent_columns, log_prob_of_cells, table_vae

CLASSIFIERS = {
    "boosted trees": partial(HistGradientBoostingClassifier, random_state=0),
    "logistic regression": partial(LogisticRegression, max_iter=300),
    "decision tree": partial(DecisionTreeClassifier, max_depth=10, random_state=0),
}


def made_up(size):
    """Rows of a table in which the schooling decides on the rest."""
    rng = np.random.default_rng(0)
    level = rng.integers(3, size=size)
    gain = np.where(rng.random(size) < 0.9, 0, np.exp(7 + level + rng.normal(size=size)).round())
    job = np.array(["crafts", "sales", "science"], dtype=object)[(level + (rng.random(size) < 0.2)) % 3]
    job[rng.random(size) < 0.06] = None
    return {
        "age": (20 + 15 * rng.gamma(2, 1, size)).round(),
        "schooling": np.array(["school", "college", "doctorate"])[level],
        "job": job,
        "gain": gain,
        "income": np.where(level + rng.normal(size=size) + (gain > 0) > 1.5, ">50K", "<=50K"),
    }


def design(x, columns):
    """Inputs of a classifier for the last column: one-hot classes and numbers."""
    inputs = []
    for d, column in enumerate(columns[:-1]):
        cells = x[:, d].numpy()
        is_class = isinstance(column, Discrete)
        inputs.append(cells[:, None] == np.arange(column.num_levels) if is_class else np.nan_to_num(cells)[:, None])
    return np.concatenate(inputs, axis=1).astype(float)


def classify(x, test, columns):
    """F1 and AUROC on test rows of classifiers that are trained on rows x."""
    inputs, tested = design(x, columns), design(test, columns)
    mean, scale = inputs.mean(0), inputs.std(0) + 1e-9
    scores = {}
    for name, make in CLASSIFIERS.items():
        classifier = make().fit((inputs - mean) / scale, x[:, -1].numpy())
        p = classifier.predict_proba((tested - mean) / scale)[:, 1]
        scores[name] = f1_score(test[:, -1], p > 0.5), roc_auc_score(test[:, -1], p)
    return scores


def impute_by(imputer, known, holes, columns):
    """Fills holes by a method of scikit-learn, with standardised numbers and one-hot classes."""
    mean = torch.nan_to_num(known).mean(0)
    scale = torch.nan_to_num(known).std(0) + 1e-9

    def expand(x):
        parts = []
        for d, column in enumerate(columns):
            cells = x[:, d : d + 1]
            if isinstance(column, Discrete):
                levels = (cells == torch.arange(column.num_levels)).float()
                parts.append(torch.where(cells.isnan(), torch.nan, levels))
            else:
                parts.append((cells - mean[d]) / scale[d])
        return torch.cat(parts, dim=1).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of IterativeImputer: five rounds are enough
        done = torch.from_numpy(imputer.fit(expand(known)).transform(expand(holes))).float()
    filled, at = holes.clone(), 0
    for d, column in enumerate(columns):
        width = column.num_levels if isinstance(column, Discrete) else 1
        part, at = done[:, at : at + width], at + width
        value = part.argmax(1).float() if width > 1 else part[:, 0] * scale[d] + mean[d]
        filled[:, d] = torch.where(holes[:, d].isnan(), value, holes[:, d])
    return filled


def imputation_errors(filled, truth, hidden, columns, train):
    """The error of numbers, in standard deviations of their column, and the share of wrong classes."""
    numbers, classes = [], []
    for d, column in enumerate(columns):
        here = hidden[:, d]
        if isinstance(column, Discrete):
            classes.append((filled[here, d].round() != truth[here, d]).float().mean())
        else:
            known = train[:, d][~train[:, d].isnan()]
            numbers.append((filled[here, d] - truth[here, d]).square().mean().sqrt() / known.std())
    return float(np.mean(numbers)), float(np.mean(classes))


def train(x, validation, columns, latent_dim, epochs):
    """Trains a VAE on rows, with cells hidden at random, so that the encoder learns to fill holes."""
    network = partial(nn.GatedMLP, hidden=(256, 256))
    vae = table_vae(
        columns,
        latent_dim,
        prior=priors.GaussianMixture,
        likelihood=partial(likelihoods.Tabular, network=network),
        encoder=partial(encoders.DiagonalNormal, network=network),
    )
    vae.likelihood.start_at(x)
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        data.split_missing(x),
        validation=data.split_missing(validation),
        epochs=epochs,
        batch_size=256,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        transform=data.hide_cells,  # also for validation data
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs),
        clip_norm=10.0,
    )
    return vae, history


def imputations(vae, x, test, columns, num_rows, num_samples):
    """Hides a fifth of the cells of complete test rows; returns the errors of each method that fills them."""
    complete = test[~test.isnan().any(1)][:num_rows]
    hidden = torch.rand_like(complete) < 0.2
    hidden[hidden.all(1), 0] = False
    holes = torch.where(hidden, torch.nan, complete)
    imputed = vae.impute(*data.split_missing(holes), num_samples=num_samples, num_draws=50)
    is_class = torch.tensor([isinstance(column, Discrete) for column in columns])
    known = x[:: max(1, len(x) // 3000)]
    middle = torch.stack([v[~v.isnan()].mode().values if c else v.nanmedian() for v, c in zip(x.T, is_class)])
    iterative = IterativeImputer(
        Ridge(10.0), max_iter=5, min_value=-5, max_value=5, keep_empty_features=True, random_state=0
    )
    filled = {
        "VAE": torch.where(is_class, imputed.draws.mode(0).values, imputed.draws.mean(0)),
        "median and mode": torch.where(hidden, middle, complete),
        "10 nearest neighbours": impute_by(KNNImputer(n_neighbors=10, keep_empty_features=True), known, holes, columns),
        "IterativeImputer": impute_by(iterative, known, holes, columns),
    }
    return {name: imputation_errors(done.float(), complete, hidden, columns, x) for name, done in filled.items()}


def main(args):
    pyro.set_rng_seed(0)
    started = time.perf_counter()
    if args.train is None:
        rows = made_up(args.num_rows)
        half = {name: cells[: args.num_rows // 2] for name, cells in rows.items()}
        table = data.Table(half)
        rest = {name: cells[args.num_rows // 2 :] for name, cells in rows.items()}
        test = table.schema.encode(rest)
    else:
        table = data.Table(args.train)
        test = data.Table(args.test, table.schema).x
    columns = table.schema.modelled
    print(table.schema.describe())
    order = torch.randperm(len(table))
    validation, x = table.x[order[: len(table) // 20]], table.x[order[len(table) // 20 :]]
    vae, history = train(x, validation, columns, args.latent_dim, args.epochs)
    print(history)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    few = test[: args.num_test]
    print(f"test {pyrovae.log_marginal(vae.model, vae.guide, *data.split_missing(few), num_samples=args.num_samples)}")
    baseline = log_prob_of_cells(fit_independent_columns(columns, x), few).sum(1).mean()
    print(f"independent columns: {baseline:.3f} nats a datum")

    pyro.set_rng_seed(1)
    generated = vae.sample(len(x))
    table.schema.write(generated, args.output)
    print(f"\n{len(generated):,} new rows in {args.output}; classifiers for {columns[-1].name!r}, on real test rows:")
    scores = {"new rows": classify(generated, test, columns), "real rows": classify(x, test, columns)}
    for name in CLASSIFIERS:
        listed = "   ".join(f"{kind}: F1 {s[name][0]:.3f}, AUROC {s[name][1]:.3f}" for kind, s in scores.items())
        print(f"  {name:20s} {listed}")
    print(diagnostics.synthetic_rows(x, test, generated, columns))

    print("\nhidden cells: error of numbers in standard deviations, share of wrong classes")
    for name, errors in imputations(vae, x, test, columns, args.num_imputed, args.num_samples).items():
        print(f"  {name:22s} {errors[0]:.3f}  {errors[1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", nargs="?", type=Path, help="file of training rows")
    parser.add_argument("test", nargs="?", type=Path, help="file of test rows")
    parser.add_argument("--num-rows", type=int, default=4000, help="rows of the made-up table")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--num-samples", type=int, default=500, help="importance samples a row")
    parser.add_argument("--num-test", type=int, default=1000, help="test rows that are scored")
    parser.add_argument("--num-imputed", type=int, default=1000, help="test rows with hidden cells")
    parser.add_argument("--output", type=Path, default=Path("new_rows.csv"), help="file of the new rows")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if (args.train is None) != (args.test is None):
        parser.error("give a file of training rows and one of test rows, or neither")
    if args.smoke:
        args.epochs, args.num_samples, args.num_rows, args.num_test, args.num_imputed = 2, 50, 600, 50, 50
    main(args)
