"""``pyrovae compare``."""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrovae import estimators, storage
from pyrovae.cli.common import SplitName, check_device, data_to_score, load_splits, measure_of, new_file
from pyrovae.estimators import Estimator, ImportanceSampling, UntilTrusted, log_marginal
from pyrovae.vae import VAE


def compare(
    runs: list[str],
    split: SplitName = "test",
    method: Estimator | None = None,
    num_samples: int | None = None,
    num_data: int | None = None,
    output: str | None = None,
    picture: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    max_memory: float = 64e6,
    seed: int = 0,
    device: str = "cpu",
    compile: bool = False,
    trust: bool = False,
) -> None:
    """Compares trained runs by log p(x) of the same data: paired differences, with errors and how sure they are.

    Args:
        runs: two or more run directories.
        split: the split of the data to score.
        method: the class of another estimator, one of pyrovae.estimators; UntilTrusted by default.
        num_samples: importance samples of the guide per datum, instead of stages. For other methods use
            --method.num_samples.
        num_data: score only this many data, the first of the split; all by default.
        output: a .csv file for the results of each datum: estimate, standard error, and whether it can be trusted, of
            each run.
        picture: a .png file; by default comparison-<split>-<other runs>.png in the first run directory.
        data: another data set of the same shape to score; that of the runs by default.
        data_root: the directory of the images; those of the runs by default.
        max_memory: memory for intermediate results, in bytes.
        seed: seed of the samples.
        device: cpu, cuda, cuda:1, ...
        compile: score by compiled graphs, which take some seconds to make.
        trust: allow the configurations of the runs to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if len(runs) < 2:
        raise ValueError(f"compare needs two run directories or more, got {len(runs)}.")
    paths = [Path(run).resolve() for run in runs]
    twice = next((run for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice. Give different runs.")
    if num_data is not None and num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    if method is None:
        method = UntilTrusted() if num_samples is None else ImportanceSampling(num_samples)
    elif num_samples is not None:
        raise ValueError(f"--num-samples is for importance sampling: give --method.num_samples {num_samples} instead.")
    if method.relation != "=":
        raise ValueError(f"{method} is an upper bound of log p(x): a difference says nothing. Take another method.")
    check_device(device)
    loaded = {run: storage.load_run(run, trust=trust) for run in runs}
    x = _common_data(loaded, split, data, data_root)[:num_data].to(device)
    table = None if output is None else new_file(output, (".csv",))
    names = "-".join(path.name for path in paths[1:])
    drawn = Path(runs[0]) / f"comparison-{split}-{names}.png" if picture is None else Path(picture)
    if drawn.suffix != ".png":
        raise ValueError(f"picture must end in .png, got {drawn}.")
    if drawn.exists():
        raise FileExistsError(f"{drawn} already exists. Give another file with --picture.")

    found = {}
    for i, (run, (vae, _)) in enumerate(loaded.items()):
        pyro.set_rng_seed((seed + i) % 2**32)  # the errors of a difference are those of independent draws
        vae.to(device)
        found[run] = log_marginal(vae.model, vae.guide, x, method=method, max_memory=max_memory, compile=compile)
        print(f"{run}, {split}: {found[run]}\n")
    ranking = estimators.compare_all(found)
    print(ranking)
    print("\n" + "\n".join(pair.verdict for pair in ranking.pairs))
    if table is not None:
        columns: dict[str, Tensor] = {"datum": torch.arange(len(x))}
        for i, estimate in enumerate(found.values()):
            for name in ("value", "standard_error", "trusted"):
                columns[f"{name}_{i + 1}"] = getattr(estimate, name).cpu()
        rows = torch.stack([column.double() for column in columns.values()], dim=1)
        np.savetxt(
            table,
            rows,
            delimiter=",",
            fmt=["%d"] + ["%.9g", "%.9g", "%d"] * len(found),
            comments="",
            header=",".join(columns),
        )
        print(f"per datum, runs in the order given: {table}")
    drawn.parent.mkdir(parents=True, exist_ok=True)
    ranking.plot(drawn)
    print(f"picture: {drawn}")


def _common_data(
    loaded: dict[str, tuple[VAE, dict[str, Any]]], split: SplitName, data: str | None, data_root: str | None
) -> Tensor:
    """Returns the data that all runs are scored on; raises a ValueError if their log p(x) cannot be compared."""
    parts: dict[tuple, Tensor] = {}
    (name, (vae, config)), *others = loaded.items()
    first = _part(parts, config, split, data, data_root)
    measure = measure_of(vae)
    for other, (its_vae, its_config) in others:
        if config["x_shape"] != its_config["x_shape"]:
            raise ValueError(
                f"{name} has data of shape {config['x_shape']} and {other} of {its_config['x_shape']}: log p(x) of "
                "different data cannot be compared."
            )
        x = _part(parts, its_config, split, data, data_root)
        if x.shape != first.shape or not torch.equal(x, first):
            changed = [key for key in ("data", "preprocessing", "data_root") if config.get(key) != its_config.get(key)]
            why = "; ".join(f"{key} is {config.get(key)} and {its_config.get(key)}" for key in changed)
            raise ValueError(
                f"{name} and {other} have different data in the {split} part ({why}): log p(x) of different data, or "
                "in another unit, cannot be compared. Score both on one data set with --data, if only that differs."
            )
        if measure_of(its_vae) != measure:
            raise ValueError(
                f"{name} gives a {_words(measure)} and {other} a {_words(measure_of(its_vae))}: these cannot be "
                "compared. Train both with likelihoods of one kind."
            )
    return first


def _part(
    parts: dict[tuple, Tensor], config: dict[str, Any], split: SplitName, data: str | None, data_root: str | None
) -> Tensor:
    """Returns a split of a run's data as it is scored, which is loaded once."""
    key = data or config["data"], data_root or config["data_root"], config["preprocessing"]
    if key not in parts:
        splits, description = load_splits(*key)
        print(description)
        parts[key] = data_to_score(splits, split, key[2])
    return parts[key]


def _words(measure: tuple[str, ...]) -> str:
    kinds = list(dict.fromkeys(measure))
    return kinds[0] if len(kinds) == 1 else "mixture of both: " + ", ".join(measure)
