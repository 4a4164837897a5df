"""Tables of the field: each row is a configuration of `pyrovae train`, beside the number that was published.

A row is trained with the file of its name in `benchmarks/results/`, scored as in the papers, by 5,000 importance
samples of the guide for each test image, and by stages of estimators until an image can be trusted, on the first
images. Its record, a JSON file beside the configuration, holds what was run, and `docs/results.md` is written from the
records. A run that was stopped goes on where it was, and a row with a record is not run again.

    python benchmarks/results.py --list                            # what was run and what was not
    python benchmarks/results.py --data-root data                  # all rows, in their order
    python benchmarks/results.py mnist-mlp-normal --data-root data # one
    python benchmarks/results.py --page                            # docs/results.md alone
    pyrovae train --config benchmarks/results/mnist-mlp-normal.yaml --data-root data    # the same without a record
"""

import argparse
import csv
import json
import statistics
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import yaml

from pyrovae.cli import main as command_line
from pyrovae.config import with_current_names

FOLDER = Path(__file__).with_name("results")
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
CURVE = 60  # points of the validation curve that a record keeps

EXEMPLAR = "[Norouzi, Fleet and Norouzi 2020](https://arxiv.org/abs/2004.04795)"
IWAE = "[Burda, Grosse and Salakhutdinov 2016](https://arxiv.org/abs/1509.00519)"
GROUPED = "none; the bounds are those of [Rainforth et al. 2018](https://arxiv.org/abs/1802.04537)"
SETTINGS = {
    "exemplar": "Settings of the MLPs: two gated layers of 300 units, 40 latents a level, Bernoulli pixels, binarised "
    "again for each batch, Adam with a learning rate of 5e-4, batches of 100, the weight of the KL divergence raised "
    "over 100 epochs, training until the validation loss has not improved for 50, 5,000 importance samples. In the "
    "two-level rows here, parts take what they see side by side, in layers of 600 and 300 units, of which the paper's "
    "networks, with layers of their own for each input, are a special case. Convolutional networks here are residual, "
    "with stages of 32 and 64 channels; the decoder in place of PixelSNAIL is `nn.GatedPixelCNN` of 8 layers with "
    "64 channels.",
    "fast": "They are those of MLPs of one level with a standard normal prior. The rows try to reach them in little "
    "time by the same networks, with the bound of 5 importance samples and doubly reparameterised gradients, a "
    "VampPrior of 500, batches of 200, and a learning rate that rises to 0.003 and falls to zero over 60 epochs.",
    "best": "They are the best of MLPs of one level, with an exemplar prior. The rows try to beat them by the same "
    "networks: as in the table above, over 240 epochs, with matrix products in bfloat16; on Fashion-MNIST over 160, "
    "with gradients clipped to a norm of 20, because a first run without was lost at epoch 121 (229.6 nats of "
    "validation, then 552). The clock of the run on MNIST ran on while it was stopped, for 0.9 of its hours.",
    "iwae": "Settings: two tanh layers of 200 units, 50 latents, Bernoulli pixels, binarised again for each batch, "
    "Adam, batches of 20, 3,280 epochs at falling learning rates, 5,000 importance samples.",
    "bounds": "The model, the learning rates and the score are those of the table above, so that rows can be compared "
    "with each other; the papers of these bounds have other settings, and their numbers are not repeated here.",
}


class Row(NamedTuple):
    """A row of a table.

    Args:
        name: that of its configuration and its record.
        title: the model, in words.
        published: log p(x) of the test data in nats a datum, as published; None where it was not, in these settings.
    """

    name: str
    title: str
    published: float | None


class Table(NamedTuple):
    """A table of rows beside the numbers of one paper."""

    title: str
    source: str  # of the numbers, or of the method where there are none
    settings: str
    rows: Sequence[Row]


def _exemplar_rows(data: str, numbers: Sequence[tuple[str, str, float, float, float]]) -> list[Row]:
    priors = (("normal", "standard normal prior"), ("vamp", "VampPrior of 500"), ("exemplar", "exemplar prior"))
    return [
        Row(f"{data}-{network}-{prior}", f"{title}, {words}", -number)
        for network, title, *row in numbers
        for (prior, words), number in zip(priors, row, strict=True)
    ]


TABLES = (
    Table(
        "Dynamic MNIST",
        EXEMPLAR,
        SETTINGS["exemplar"],
        _exemplar_rows(
            "mnist",
            [
                ("mlp", "MLP, one level", 84.45, 82.43, 82.09),
                ("mlp-2", "MLP, two levels", 82.39, 81.56, 81.22),
                ("conv-2", "convolutional, two levels", 80.52, 79.67, 79.58),
                ("pixel-2", "with PixelSNAIL", 78.20, 77.90, 77.95),
            ],
        ),
    ),
    Table(
        "Dynamic Fashion-MNIST",
        EXEMPLAR,
        SETTINGS["exemplar"],
        _exemplar_rows(
            "fashion-mnist",
            [
                ("mlp", "MLP, one level", 228.70, 227.35, 226.75),
                ("mlp-2", "MLP, two levels", 227.37, 226.72, 226.53),
                ("conv-2", "convolutional, two levels", 225.38, 224.67, 224.63),
                ("pixel-2", "with PixelSNAIL", 223.68, 223.45, 223.26),
            ],
        ),
    ),
    Table(
        "In less time",
        EXEMPLAR,
        SETTINGS["fast"],
        [Row("mnist-fast", "dynamic MNIST", -84.45), Row("fashion-mnist-fast", "dynamic Fashion-MNIST", -228.70)],
    ),
    Table(
        "Other combinations",
        EXEMPLAR,
        SETTINGS["best"],
        [Row("mnist-best", "dynamic MNIST", -82.09), Row("fashion-mnist-best", "dynamic Fashion-MNIST", -226.75)],
    ),
    Table(
        "Importance weighted autoencoders on dynamic MNIST",
        IWAE,
        SETTINGS["iwae"],
        [Row("mnist-iwae-1", "VAE", -86.76), Row("mnist-iwae-5", "IWAE, k = 5", -85.54)]
        + [Row("mnist-iwae-50", "IWAE, k = 50", -84.78)],
    ),
    Table(
        "Other bounds and gradients on dynamic MNIST",
        GROUPED,
        SETTINGS["bounds"],
        [
            Row("mnist-miwae", "MIWAE, 8 groups of 8 samples", None),
            Row("mnist-piwae", "PIWAE, 64 samples, for the encoder 8 groups of 8", None),
            Row("mnist-ciwae", "CIWAE, 64 samples, half ELBO and half IWAE", None),
            Row("mnist-dreg", "IWAE, k = 64, doubly reparameterised", None),
            Row("mnist-stl", "VAE, sticking the landing", None),
        ],
    ),
)
ROWS = {row.name: row for table in TABLES for row in table.rows}


def record_of(name: str) -> dict[str, Any] | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run(
    name: str, runs: Path, options: Sequence[str], device: str, trusted_images: int, trusted_seconds: float
) -> dict[str, Any]:
    """Trains a row, or goes on with it, and scores it; returns its record.

    Args:
        name: the row.
        runs: the folder of the run directories.
        options: further options of `pyrovae train`, which override the configuration.
        device: where it is trained and scored.
        trusted_images: number of test images that are scored until they can be trusted.
        trusted_seconds: budget of that.
    """
    directory, config = runs / name, FOLDER / f"{name}.yaml"
    if not _is_finished(directory):
        place = ["--run", str(directory), "--device", device]
        command_line(["train", "--resume", "--config", str(config), *place, *options])
    trained_with = yaml.safe_load((directory / "config.yaml").read_text())
    overridden = {option.removeprefix("--").replace("-", "_") for option in options[::2]}
    for entry, value in yaml.safe_load(config.read_text()).items():
        if entry not in overridden and not holds(with_current_names(trained_with.get(entry)), value):
            raise ValueError(f"{directory} was trained with another {entry} than {config} says: train it anew.")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "epoch" in line]
    result = next(line for line in lines if line.get("split") == "test")
    validation = [line["validation"] for line in epochs]
    every = -(-len(epochs) // CURVE)
    return {
        "row": name,
        "config": {key: value for key, value in trained_with.items() if key != "data_root"},
        "machine": report.machine(device, packages=("torch", "pyro-ppl")),
        "hours": round(epochs[-1]["seconds"] / 3600, 2),
        "epochs": len(epochs),
        "best_epoch": 1 + min(range(len(epochs)), key=validation.__getitem__),
        "validation": [[line["epoch"], round(line["validation"], 3)] for line in epochs[::every]],
        "test": {key: result[key] for key in ("log_marginal", "standard_error", "num_data", "num_samples")},
        "trusted": _scores(directory, device, trusted_images, ["--seconds", str(trusted_seconds)]),
        "same_images": _scores(directory, device, trusted_images, ["--num-samples", str(result["num_samples"])]),
    }


def _is_finished(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return metrics.exists() and '"split": "test"' in metrics.read_text()


def holds(whole: Any, part: Any) -> bool:
    """Returns whether a configuration has all entries of another one."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and holds(whole[key], part[key]) for key in part)
    return bool(whole == part)


def _scores(directory: Path, device: str, num_images: int, method: Sequence[str]) -> dict[str, Any]:
    """Returns the mean log p(x) of the first test images, and how many of them are not to be trusted."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "scores.csv"
        given = ["--device", device, "--num-data", str(num_images), "--output", str(output), *method]
        command_line(["evaluate", str(directory), *given])
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
    errors = [float(row["standard_error"]) for row in rows]
    return {
        "log_marginal": statistics.fmean(float(row["value"]) for row in rows),
        "standard_error": sum(error**2 for error in errors) ** 0.5 / len(rows),
        "num_data": len(rows),
        "not_trusted": sum(float(row["trusted"]) == 0 for row in rows),
    }


def page() -> str:
    """Returns the page of the results, from the records."""
    done = [name for name in ROWS if record_of(name)]
    text = (
        "# Results\n"
        + _paragraph(
            "Tables of papers, with the same rows trained by this library. This page is written by "
            "`benchmarks/results.py` from the records of the runs in `benchmarks/results/`, which hold their "
            "configuration, seed, machine and validation curve. Each row is a file there for `pyrovae train --config`, "
            "and `python benchmarks/results.py` trains what is not trained yet, and goes on where it was stopped."
        )
        + _paragraph(
            f'Rows: {len(ROWS)}. Run, with one seed each: {len(done)}. Where a row ended at a limit of epochs ("ended '
            'there") and not by its validation loss, more epochs may make it better.'
        )
        + _paragraph(
            "All numbers are log p(x) of the test data in nats a datum; higher is better. The papers estimate it by "
            "5,000 importance samples of the encoder's posterior for each image, which is too low by what these "
            "samples miss. *Trusted* is the estimate by stages until each image can be trusted, on the first images "
            "alone, beside the other estimate of the same images ([why](half-a-nat.md)); with many images that are not "
            "trusted it is no better than the other. Errors are those of the samples alone, not of another seed."
        )
    )
    for table in TABLES:
        header = [
            "Model",
            "File",
            "Published",
            "Here, 5,000 samples",
            "Trusted",
            "5,000 samples, same images",
            "Training",
        ]
        text += f"\n## {table.title}\n" + _paragraph(f"Published numbers: {table.source}. {table.settings}")
        text += "\n" + report.table(header, [_cells(row) for row in table.rows]) + "\n"
    machines = sorted({record["machine"] for name in done if (record := record_of(name))})
    return text + "".join(_paragraph(f"Trained on: {machine}") for machine in machines)


def _paragraph(text: str) -> str:
    return "\n" + textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _cells(row: Row) -> list[str]:
    record, file, published = (
        record_of(row.name),
        f"`{row.name}`",
        "" if row.published is None else f"{row.published:.2f}",
    )
    if record is None:
        return [row.title, file, published, "not run", "", "", ""]
    test, trusted, same = record["test"], record["trusted"], record["same_images"]
    ended = record["epochs"] == record["config"]["epochs"]  # by a limit, not by patience
    return [
        row.title,
        file,
        published,
        f"{test['log_marginal']:.2f} ± {test['standard_error']:.2f}",
        f"{trusted['log_marginal']:.2f} ± {trusted['standard_error']:.2f} ({trusted['num_data']} images, "
        f"{trusted['not_trusted']} not trusted)",
        f"{same['log_marginal']:.2f} ± {same['standard_error']:.2f}",
        f"{record['epochs']} epochs{' (ended there)' if ended else ''}, best {record['best_epoch']}, "
        f"{record['hours']:.1f} hours, seed {record['config']['seed']}",
    ]


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows; all that have no record by default")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--page", action="store_true", help="write docs/results.md, and run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run directories")
    parser.add_argument("--data-root", default="data", help="folder of the images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where everything runs")
    parser.add_argument("--epochs", help="end training after so many, of which the record tells")
    parser.add_argument("--trusted-images", type=int, default=1000, help="images to be scored until they are trusted")
    parser.add_argument("--trusted-seconds", type=float, default=1800.0, help="budget of that")
    given = parser.parse_args(args)
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; see --list")
    if given.list:
        for table in TABLES:
            print(table.title)
            for row in table.rows:
                state = "run" if record_of(row.name) else "not run"
                published = "none" if row.published is None else f"{row.published:.2f}"
                print(f"  {row.name:<28} {published:>8}  {state:<7}  {row.title}")
        return
    names = given.rows or [name for name in ROWS if not record_of(name)]
    for name in [] if given.page else names:
        print(f"\n{name}: {ROWS[name].title}")
        options = ["--data-root", given.data_root, *(["--epochs", given.epochs] if given.epochs else [])]
        record = run(name, given.runs, options, given.device, given.trusted_images, given.trusted_seconds)
        (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(page())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
