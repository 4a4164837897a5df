"""New rows of a table by a VAE, a Gaussian copula, TVAE and CTGAN, in one run; and hidden cells, filled.

    pip install ctgan
    python benchmarks/tables.py adult.data adult.test --seconds 1500

The files are the Adult data of the UCI repository, each with a line of names. The VAE is that of `examples/adult.py`.
The copula has the distributions of the columns in the data as they are, and classes as intervals, the more frequent
first (Patki, Wedge and Veeramachaneni 2016, https://doi.org/10.1109/DSAA.2016.49). TVAE and CTGAN are those of the
package ctgan, with its settings, and with all columns of words as classes; numbers that they generate are brought into
the range of the training data. Each makes as many rows as it was trained on. F1 and AUROC are means over three
classifiers (boosted trees, logistic regression, a decision tree) that are trained on these rows and tested on real
ones. The likeness of columns and of pairs of columns with those of test rows is that of `diagnostics.synthetic_rows`.
Training is in CPU seconds of one thread; where 300 epochs, the package's number, take longer than `--seconds`, there
are fewer. Results are kept in tables.json, and written into the README.md of this folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyro
import report
import scipy.stats
import torch
from torch import Tensor

from pyrovae import data, diagnostics
from pyrovae.data.columns import Discrete, Modelled

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import adult

RESULTS = Path(__file__).with_suffix(".json")
NAMES = ("real rows", "pyrovae", "Gaussian copula", "TVAE", "CTGAN")
EPOCHS = 300  # of ctgan
Columns = tuple[Modelled, ...]


class Copula:
    """A Gaussian copula of encoded rows."""

    def fit(self, x: np.ndarray, columns: Columns) -> None:
        rng = np.random.default_rng(0)
        self.sorted, ranks = [], []
        for values, column in zip(x.T, columns, strict=True):
            values = np.where(np.isnan(values), -1.0, values)  # missing, as one more value
            if isinstance(column, Discrete):
                levels, counts = np.unique(values, return_counts=True)
                place = dict(zip(levels[np.argsort(-counts)], range(len(levels)), strict=True))
                order = np.array([place[v] for v in values])
            else:
                order = values
            by_order = np.lexsort((rng.random(len(values)), order))
            self.sorted.append(values[by_order])
            ranks.append(np.argsort(by_order))
        scores = scipy.stats.norm.ppf((np.array(ranks) + 0.5) / len(x))
        self.root = np.linalg.cholesky(np.corrcoef(scores) + 1e-9 * np.eye(len(scores)))

    def sample(self, size: int) -> np.ndarray:
        scores = self.root @ np.random.default_rng(1).normal(size=(len(self.root), size))
        places = (scipy.stats.norm.cdf(scores) * len(self.sorted[0])).astype(int)
        drawn = np.stack([s[p] for s, p in zip(self.sorted, places, strict=True)], axis=1)
        return np.where(drawn < 0, np.nan, drawn)


def frame_of(x: Tensor, schema: data.Schema):
    """Returns rows as ctgan takes them: missing words are a word."""
    frame = schema.decode(x).to_pandas()
    for column in schema.modelled:
        if isinstance(column, Discrete) and isinstance(column.levels[0], str):
            frame[column.name] = frame[column.name].astype(object).fillna("?")
    return frame


def rows_of(frame, x: Tensor, schema: data.Schema) -> Tensor:
    """Returns rows that ctgan has made, encoded, with numbers in the range of rows x."""
    encoded = []
    for column in schema.modelled:
        values = frame[column.name].to_numpy()
        if isinstance(column, Discrete) and isinstance(column.levels[0], str):
            values = pa.array([None if v == "?" else v for v in values], pa.string())
        else:
            known = schema.decode(x).column(column.name).to_numpy()
            values = np.clip(np.round(values.astype(float)), np.nanmin(known), np.nanmax(known))
        encoded.append(column.encode(values))
    return torch.from_numpy(np.stack(encoded, axis=1)).float()


def by_ctgan(name: str, x: Tensor, schema: data.Schema, seconds: float) -> tuple[Tensor, float, int]:
    import ctgan

    frame = frame_of(x, schema)
    words = [c.name for c in schema.modelled if isinstance(c, Discrete) and isinstance(c.levels[0], str)]

    def fit(epochs: int) -> tuple[ctgan.TVAE | ctgan.CTGAN, float]:
        np.random.seed(0)
        torch.manual_seed(0)
        model = getattr(ctgan, name)(epochs=epochs, enable_gpu=False)
        start = time.process_time()
        model.fit(frame, words)
        return model, time.process_time() - start

    fit(1)  # imports
    # The columns are transformed before the first epoch, however many follow.
    one, three = fit(1)[1], fit(3)[1]
    epoch = max((three - one) / 2, 1e-3)
    epochs = int(max(1, min(EPOCHS, 1 + (seconds - one) / epoch)))
    print(f"{name}: {epoch:.1f} s an epoch, {epochs} epochs", flush=True)
    model, spent = fit(epochs)
    return rows_of(model.sample(len(x)), x, schema), spent, epochs


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    table = data.Table(args.train)
    schema, columns = table.schema, table.schema.modelled
    test = data.Table(args.test, schema).x
    pyro.set_rng_seed(0)
    order = torch.randperm(len(table))
    validation, x = table.x[order[: len(table) // 20]], table.x[order[len(table) // 20 :]]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def vae() -> tuple[Tensor, float, int]:
        start = time.process_time()
        made, history = adult.train(x, validation, columns, 16, args.epochs)
        spent = time.process_time() - start
        pyro.set_rng_seed(2)
        results["imputation"] = adult.imputations(made, x, test, columns, 1000, 500)
        pyro.set_rng_seed(1)
        return made.sample(len(x)), spent, len(history)

    def copula() -> tuple[Tensor, float, int]:
        made, start = Copula(), time.process_time()
        made.fit(x.double().numpy(), columns)
        return torch.from_numpy(made.sample(len(x))).float(), time.process_time() - start, 1

    gans = [partial(by_ctgan, name, x, schema, args.seconds) for name in NAMES[3:]]
    makers: dict[str, Callable[[], tuple[Tensor, float, int]]]
    makers = dict(zip(NAMES, (lambda: (x, 0.0, 0), vae, copula, *gans), strict=True))
    for name in args.methods or NAMES:
        rows, spent, epochs = makers[name]()
        classified = adult.classify(rows, test, columns)
        found = diagnostics.synthetic_rows(x, test, rows, columns)
        results.setdefault("rows", {})[name] = {
            "F1": float(np.mean([f1 for f1, _ in classified.values()])),
            "AUROC": float(np.mean([auroc for _, auroc in classified.values()])),
            "columns": found.column_score,
            "pairs": found.pair_score,
            "copied": found.copies.share,
            "CPU seconds": spent,
            "epochs": epochs,
        }
        results["machine"] = report.machine(packages=("torch", "pyro-ppl", "ctgan"))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results["rows"][name], flush=True)
    write(results)


def write(results: dict) -> None:
    """Writes the section of the README."""
    header = ["Rows from", "F1", "AUROC", "Columns", "Pairs", "Nearer to training rows", "Epochs", "CPU seconds"]
    lines = []
    for name in NAMES:
        r = results["rows"].get(name)
        if r is None:
            lines.append([name, "not run", *[""] * (len(header) - 2)])
            continue
        numbers = [f"{r[key]:.3f}" for key in ("F1", "AUROC", "columns", "pairs")]
        trained = [str(r["epochs"]), f"{r['CPU seconds']:.0f}"] if r["epochs"] else ["", ""]
        lines.append([name, *numbers, f"{r['copied']:.1%}" if r["epochs"] else "", *trained])
    short = [(name, results["rows"][name]["epochs"]) for name in NAMES[3:] if name in results["rows"]]
    short = [f"{epochs} of {EPOCHS} epochs of {name}" for name, epochs in short if epochs < EPOCHS]
    limits = f"Limited in time, and perhaps better with more: {', '.join(short)}. " if short else ""
    filled = [[name, *(f"{v:.3f}" for v in errors)] for name, errors in results["imputation"].items()]
    report.write(
        "tables",
        "\n\n".join(
            [
                "## Tables",
                __doc__.partition("\n\n")[2].partition("\n\n")[2].strip(),
                results["machine"],
                report.table(header, lines),
                f"{limits}Methods may have run in other processes; the machine had other work too.",
                "A fifth of the cells of 1,000 complete test rows are hidden and filled:",
                report.table(["Method", "RMSE of numbers, in standard deviations", "Share of wrong classes"], filled),
            ]
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="file of training rows")
    parser.add_argument("test", type=Path, help="file of test rows")
    parser.add_argument("--methods", nargs="*", choices=NAMES, help="some of them")
    parser.add_argument("--epochs", type=int, default=40, help="of the VAE of pyrovae")
    parser.add_argument("--seconds", type=float, default=1500, help="CPU seconds of TVAE and of CTGAN, at most")
    main(parser.parse_args())
