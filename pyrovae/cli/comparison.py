"""``pyrovae compare``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrovae import estimators, storage
from pyrovae.cli.common import (
    SplitName,
    advice_as_options,
    check_device,
    chosen_method,
    data_to_score,
    default_method,
    first_of,
    load_data_of,
    measure_of,
    new_file,
    programs_of,
    write_columns,
)
from pyrovae.cli.labels import arguments_of, scored
from pyrovae.data import Schema, Split
from pyrovae.data.columns import Continuous, Count, Discrete, Modelled, Time
from pyrovae.estimators import Estimate, Estimator, log_marginal


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
    compile: bool | Literal["auto"] = "auto",
    quiet: bool = False,
    trust: bool = False,
) -> None:
    """Compares trained runs by log p(x) of the same data: paired differences, with errors and how sure they are.

    Args:
        runs: two or more run directories.
        split: the split of the data to score.
        method: the class of another estimator, one of pyrovae.estimators; UntilTrusted by default, of sequences
            ParticleFilter.
        num_samples: importance samples of the guide per datum, instead of stages; of sequences, filters. For other
            methods use --method.num_samples.
        num_data: score only this many data, the first of the split; all by default.
        output: a .csv file for the results of each datum: estimate, standard error, and whether it can be trusted, of
            each run.
        picture: a .png file; by default comparison-<split>-<other runs>.png in the first run directory.
        data: another data set of the same shape to score; that of the runs by default.
        data_root: the directory of the images; those of the runs by default.
        max_memory: memory for intermediate results, in bytes.
        seed: seed of the samples.
        device: cpu, cuda, cuda:1, ...
        compile: score by code that a compiler makes, which takes some seconds. auto, the default, plays traced
            operations back, which gives the same bits as false, in less time.
        quiet: print the results alone, without progress bars.
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
    if method is not None and method.relation != "=":
        raise ValueError(f"{method} is an upper bound of log p(x): a difference says nothing. Take another method.")
    check_device(device)
    loaded = comparable_runs(runs, split, num_data, data, data_root, device, trust)
    table = None if output is None else new_file(output, (".csv",))
    names = "-".join(path.name for path in paths[1:])
    drawn = Path(runs[0]) / f"comparison-{split}-{names}.png" if picture is None else Path(picture)
    if drawn.suffix != ".png":
        raise ValueError(f"picture must end in .png, got {drawn}.")
    if drawn.exists():
        raise FileExistsError(f"{drawn} already exists. Give another file with --picture.")

    found = scored_runs(loaded, split, method, num_samples, None, seed, max_memory, compile, quiet)
    ranking = estimators.compare_all(found)
    print(ranking)
    print("\n" + "\n".join(pair.verdict for pair in ranking.pairs))
    if table is not None:
        columns: dict[str, Tensor] = {"datum": torch.arange(len(found[runs[0]].value))}
        for i, estimate in enumerate(found.values()):
            for name in ("value", "standard_error", "trusted"):
                columns[f"{name}_{i + 1}"] = getattr(estimate, name)
        write_columns(columns, table)
        print(f"per datum, runs in the order given: {table}")
    drawn.parent.mkdir(parents=True, exist_ok=True)
    ranking.plot(drawn)
    print(f"picture: {drawn}")


def comparable_runs(
    runs: list[str],
    split: SplitName,
    num_data: int | None,
    data: str | None,
    data_root: str | None,
    device: str,
    trust: bool,
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns the VAE of each run, and what it takes of the data that all are to be scored on.

    Arguments are as of :func:`compare`.

    Raises:
        ValueError: when log p(x) of the runs cannot be compared.
    """
    loaded = {run: storage.load_run(run, trust=trust) for run in runs}
    parts = _common_data(loaded, split, data, data_root)
    return {
        run: (vae.to(device), arguments_of(vae, first_of(parts[run], num_data, device), config.get("table")))
        for run, (vae, config) in loaded.items()
    }


def scored_runs(
    loaded: dict[str, tuple[Any, tuple[Any, ...]]],
    split: SplitName,
    method: Estimator | None = None,
    num_samples: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    max_memory: float = 64e6,
    compile: bool | Literal["auto"] = "auto",
    quiet: bool = False,
) -> dict[str, Estimate]:
    """Returns estimates of log p(x) for runs, and prints each; `loaded` is what :func:`comparable_runs` returned.

    Without a method each run has that of :func:`default_method`, with a number of samples or a budget of seconds.
    """
    found = {}
    for i, (run, (vae, args)) in enumerate(loaded.items()):
        pyro.set_rng_seed((seed + i) % 2**32)  # the errors of a difference are those of independent draws
        its = chosen_method(method, num_samples, default_method(vae, seconds))
        found[run] = log_marginal(
            *programs_of(vae, its), *args, method=its, max_memory=max_memory, compile=compile, progress=not quiet
        )
        print(advice_as_options(f"{run}, {split}: {found[run]}\n"))
    return found


def _common_data(
    loaded: dict[str, tuple[Any, dict[str, Any]]], split: SplitName, data: str | None, data_root: str | None
) -> dict[str, Split]:
    """Returns the data that all runs are scored on, for each run as it takes them.

    Raises:
        ValueError: when log p(x) of the runs cannot be compared.
    """
    parts: dict[tuple, Split] = {}
    (name, (vae, config)), *others = loaded.items()
    schema = config.get("table")
    for other, (_, its_config) in others:
        its_schema = its_config.get("table")
        if (schema is None) != (its_schema is None):
            tables, numbers = (name, other) if its_schema is None else (other, name)
            raise ValueError(
                f"{tables} is a run on a table and {numbers} is not: log p(x) of different data cannot be compared. "
                "Train both on the same data."
            )
        if schema is not None and its_schema is not None:
            _check_units(name, schema, other, its_schema)
        for encoding in storage.ENCODINGS:
            if config.get(encoding) != its_config.get(encoding):
                words = encoding.replace("_", " ")
                raise ValueError(
                    f"{name} and {other} do not have the same {words}: what they give probabilities to is not the "
                    "same, and log p(x) cannot be compared. Train both on the same data with the same options."
                )
    found = {name: _part(parts, config, split, data, data_root)}
    for other, (its_vae, its_config) in others:
        if config["x_shape"] != its_config["x_shape"]:
            raise ValueError(
                f"{name} has data of shape {config['x_shape']} and {other} of {its_config['x_shape']}: log p(x) of "
                "different data cannot be compared."
            )
        if scored(vae, schema) != scored(its_vae, its_config.get("table")):
            raise ValueError(
                f"{name} gives {scored(vae)} and {other} {scored(its_vae)}: these cannot be compared. Train both on "
                "the same labels, or both without."
            )
        found[other] = _part(parts, its_config, split, data, data_root)
        if not _are_equal(found[name], schema, found[other], its_config.get("table")):
            changed = [key for key in ("data", "preprocessing", "data_root") if config.get(key) != its_config.get(key)]
            why = "; ".join(f"{key} is {config.get(key)} and {its_config.get(key)}" for key in changed)
            why = f" ({why})" if why or schema is None else ""
            raise ValueError(
                f"{name} and {other} have different data in the {split} part{why}: log p(x) of different data, or "
                "in another unit, cannot be compared. Score both on one data set with --data, if only that differs."
            )
        if schema is None and measure_of(its_vae) != measure_of(vae):  # those of tables are in their schemas
            raise ValueError(
                f"{name} gives a {_words(measure_of(vae))} and {other} a {_words(measure_of(its_vae))}: these cannot "
                "be compared. Train both with likelihoods of one kind."
            )
    return found


def _part(
    parts: dict[tuple, Split], config: dict[str, Any], split: SplitName, data: str | None, data_root: str | None
) -> Split:
    """Returns a split of a run's data as it is scored, which is loaded once."""
    preprocessing, schema = config["preprocessing"], config.get("table")
    how = (data_root or config["data_root"], preprocessing) if schema is None else schema.to_yaml()
    key = (data or config["data"], how)
    if key not in parts:
        parts[key] = data_to_score(load_data_of(config, data, data_root), split, preprocessing)
    return parts[key]


def _check_units(name: str, schema: Schema, other: str, its_schema: Schema) -> None:
    """Raises a ValueError unless log p(x) of two tables is of the same columns in the same units."""
    if schema.names != its_schema.names:
        differ = [n for n in (*schema.names, *its_schema.names) if (n in schema.names) != (n in its_schema.names)]
        which = f"{', '.join(map(repr, differ))} in only one of them" if differ else "the same in another order"
        raise ValueError(
            f"{name} and {other} model different columns ({which}): log p(x) of different data cannot be compared. "
            "Train both with one schema: --schema."
        )
    if schema.context_names != its_schema.context_names:
        given, its_given = (", ".join(s.context_names) or "no column" for s in (schema, its_schema))
        raise ValueError(
            f"{name} conditions on {given} and {other} on {its_given}: these cannot be compared. Train both with one "
            "--context."
        )
    for column, its_column in zip(schema.modelled, its_schema.modelled, strict=True):
        unit, its_unit = _unit(column), _unit(its_column)
        if unit != its_unit:
            raise ValueError(
                f"column {column.name!r}: {name} gives a {unit} ({column.kind}) and {other} a {its_unit} "
                f"({its_column.kind}): these cannot be compared. Train both with one schema: --schema."
            )


def _unit(column: Modelled) -> str:
    """Returns what a likelihood gives for a value of a column: all that may not differ between runs compared."""
    if isinstance(column, Continuous):
        if column.step is not None:
            return f"probability of a step of {column.step:g}"
        spikes = f" with probabilities for {', '.join(f'{s:g}' for s in sorted(column.spikes))}"
        return "density" + (spikes if column.spikes else "")
    if isinstance(column, Time):
        return f"density per {column.unit}" if column.step is None else f"probability of {column.step:g} {column.unit}"
    whole = isinstance(column, Discrete) and all(type(level) is int for level in column.levels)
    return "probability of a step of 1" if whole or isinstance(column, Count) else "probability of a level"


def _are_equal(part: Split, schema: Schema | None, other: Split, its_schema: Schema | None) -> bool:
    """Returns whether data are the same, for tables the same cells, however they are encoded."""
    if schema is None or its_schema is None:
        return _are_same_cells(part.x, (), other.x, ())
    of_context = part.context is None or _are_same_cells(
        part.context, schema.context, other.context, its_schema.context
    )
    return of_context and _are_same_cells(part.x, schema.modelled, other.x, its_schema.modelled)


def _are_same_cells(x: Tensor, columns: Sequence[Modelled], other: Any, its_columns: Sequence[Modelled]) -> bool:
    """Returns whether tensors hold the same, however the cells of their columns are encoded; no columns for numbers."""
    if x.shape != other.shape or not torch.equal(x.isnan(), other.isnan()):
        return False
    if not columns:
        return torch.equal(x.nan_to_num(), other.nan_to_num())
    for d, (column, its_column) in enumerate(zip(columns, its_columns, strict=True)):
        if column == its_column and torch.equal(x[:, d].nan_to_num(), other[:, d].nan_to_num()):
            continue
        a, b = column.decode(x[:, d]).to_pylist(), its_column.decode(other[:, d]).to_pylist()
        if isinstance(column, Continuous):  # origins may differ, and with them the rounding in float32
            close = np.isclose(_floats(a), _floats(b), rtol=1e-5, atol=1e-5 * _size(_floats(a)), equal_nan=True)
            if not close.all():
                return False
        elif a != b:
            return False
    return True


def _floats(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _size(values: np.ndarray) -> float:
    """Returns the standard deviation of the values that are there."""
    there = values[~np.isnan(values)]
    return float(there.std()) if len(there) else 0.0


def _words(measure: tuple[str, ...]) -> str:
    kinds = list(dict.fromkeys(measure))
    return kinds[0] if len(kinds) == 1 else "mixture of both: " + ", ".join(measure)
