"""What several commands share: loading data and runs, checks of arguments, and files of results."""

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import storage
from pyrovae.arguments import as_device
from pyrovae.cli.labels import to_draw
from pyrovae.data.arrays import ARRAYS
from pyrovae.distributions import Blocks, Multinomial
from pyrovae.estimators import Estimate, Estimator, ImportanceSampling, ParticleFilter, UntilTrusted
from pyrovae.likelihoods import Likelihood
from pyrovae.structures import SequenceVAE

Preprocessing = Literal["grey", "static", "dynamic"]


SplitName = Literal["train", "validation", "test"]
_PARTS = ("train", "validation", "test")
_NUM_FILTERS, _NUM_PARTICLES = 20, 32  # of a sequence


MEANS = "means of p(x | z), z from the prior"


load_data = lru_cache(maxsize=1)(partial(datasets.load, numbers=True))  # a folder takes long; main clears it


def default_run(data: str) -> Path:
    """Returns the default run directory for a data set."""
    return Path("runs") / Path(data).resolve().stem


def stem_of(file: str) -> str:
    """Returns the name of a file without its endings.

    >>> stem_of("data/kjv.txt.gz")
    'kjv'
    """
    return Path(file.removesuffix(".gz")).stem


def load_run_and_data(
    run: str, data: str | None, data_root: str | None, trust: bool
) -> tuple[Any, datasets.Splits, Preprocessing]:
    """Returns the VAE of a run, and the data of the run or another data set with their preprocessing."""
    vae, config = storage.load_run(run, trust=trust)
    return vae, load_data_of(config, data, data_root), config["preprocessing"]


def load_data_of(config: dict[str, Any], data: str | None, data_root: str | None) -> datasets.Splits:
    """Returns the data of a run, or another data set, as its configuration says; prints lines that describe them."""
    source, schema, vocabulary = data or config["data"], config.get("table"), config.get("vocabulary")
    if vocabulary is not None:
        splits, description = load_text(source, vocabulary)
    elif config.get("spectrogram") is not None:
        splits, description = load_sounds(source, config["spectrogram"])
    elif config.get("piano_roll") is not None:
        splits, description = load_music(source, config["piano_roll"])
    elif config.get("time_series") is not None:
        splits, description = load_series(source, config["time_series"])
    elif schema is None:
        splits, description = load_splits(source, data_root or config["data_root"], config["preprocessing"])
    else:
        splits, description = load_table(source, schema)
    if data is None or Path(data).resolve() == Path(config["data"]).resolve():
        check_fingerprint(config, splits)
    print(description)
    return splits


def check_fingerprint(config: dict[str, Any], splits: datasets.Splits) -> None:
    """Raises a ValueError if the data of a run are not those that it was trained on.

    Args:
        config: the configuration of the run, as it was loaded.
        splits: the data.
    """
    before = config.get("fingerprint")
    if before is not None and not splits.has_fingerprint(before):
        raise ValueError(
            f"{config['data']} has changed since the run began: other data, or in another order, so that its test part "
            "may hold what the run was trained on. Put it back; or train a new run; or give other data in another file."
        )


_OPTION = re.compile(r"\b(delimiter|decimal|thousands|encoding|header|missing)=")


def as_options(message: str) -> str:
    """Returns a message with the arguments that it advises written as options of ``pyrovae describe``."""
    return _OPTION.sub(r"--\1 ", message)


_ADVICE = (  # of results, in the words of Python
    (re.compile(r"\bmethod=(?:estimators\.)?(\w+)\(\)"), r"--method \1"),
    (re.compile(r"\bmethod=(?:estimators\.)?(\w+)\((\w+)=(\d+)\)"), r"--method \1 --method.\2 \3"),
    (re.compile(r"to score, estimators\.(\w+)\(\)"), r"to score, --method ImportanceSampling --method.proposal \1"),
    (re.compile(r", most_unusual\(n\) lists more"), ""),
    (re.compile(r"\bnum_rounds\b"), "data: --num-data"),
)


def advice_as_options(text: str) -> str:
    """Returns a result's text with the calls that it advises written as options.

    >>> advice_as_options("Score them by method=UntilTrusted().")
    'Score them by --method UntilTrusted.'
    """
    for pattern, option in _ADVICE:
        text = pattern.sub(option, text)
    return text


@contextmanager
def _advice_on_reading(data: str) -> Iterator[None]:
    """Says how to tell what a table does not tell by itself, where it cannot be read without that."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if not (_OPTION.search(text) or any(advice in text for advice in ("--kinds", "the kind ", "other signs"))):
            raise
        raise ValueError(
            f"{as_options(text)} To say this, write a schema with pyrovae describe {data} --output schema.yaml (there: "
            "--decimal, --encoding, --kinds, ...), then pyrovae train --schema schema.yaml."
        ) from None


@lru_cache(maxsize=1)  # train reads the table for its defaults, then for itself
def _load_table(data: str, schema: str | None, context: tuple[str, ...], stamp: tuple[int, int]) -> datasets.Splits:
    return datasets.load(data, schema=None if schema is None else datasets.Schema.from_yaml(schema), context=context)


def context_names(context: list[str] | str | None) -> tuple[str, ...]:
    """Returns the names of the columns that ``--context`` gives, as a list or with commas between.

    >>> context_names("sex, age")
    ('sex', 'age')
    """
    names = (context or "").split(",") if not isinstance(context, list) else context
    return tuple(name.strip() for name in names if name.strip())


def load_table(data: str, schema: datasets.Schema | None, context: tuple[str, ...] = ()) -> tuple[datasets.Splits, str]:
    """Returns the splits of a table, without rows that have no cell, and lines that describe them.

    Args:
        data: the file.
        schema: its columns; found out if None.
        context: names of columns to condition on; those of the schema if none.
    """
    file = Path(data).stat() if Path(data).is_file() else None  # a file that has changed is read again
    stamp = (0, 0) if file is None else (file.st_mtime_ns, file.st_size)
    with _advice_on_reading(data):
        splits = _load_table(data, None if schema is None else schema.to_yaml(), context, stamp)
    kept, empty = [], 0
    for part in splits:
        some = ~part.x.isnan().all(dim=1)
        empty += int((~some).sum())
        others = {name: getattr(part, name) for name in ("rows", "context")}
        kept.append(replace(part, x=part.x[some], **{n: None if t is None else t[some] for n, t in others.items()}))
    splits = replace(splits, train=kept[0], validation=kept[1], test=kept[2])
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in zip(_PARTS, kept, strict=True))
    share = sum(int(part.x.isnan().sum()) for part in kept) / max(1, sum(part.x.numel() for part in kept))
    lines = [f"{data}: {sizes} rows of {kept[0].x.shape[1]} columns, {share:.1%} of the cells missing"]
    if empty:
        lines.append(f"{empty:,} rows without any cell are left out")
    if splits.schema is not None:
        lines += ["", splits.schema.describe()]
    return splits, "\n".join(lines)


def is_text(data: str) -> bool:
    """Returns whether data are a file of text, and no data set with a name."""
    return data not in datasets.DATA_SETS and datasets.is_text_file(data)


@lru_cache(maxsize=1)  # train reads the text for its defaults, then for itself
def _load_text(data: str, vocabulary: datasets.Vocabulary | None, options: frozenset, stamp: tuple[int, int]) -> tuple:
    splits = datasets.load_text(data, vocabulary, **dict(options))
    assert splits.vocabulary is not None  # of text
    return splits, splits.vocabulary.describe(datasets.read_lines(data)[0])


def load_text(data: str, vocabulary: datasets.Vocabulary | None = None, **options: Any) -> tuple[datasets.Splits, str]:
    """Returns the splits of a file of text, and lines that describe them.

    Args:
        data: the file.
        vocabulary: its words; those of the training part if None.
        **options: of :meth:`pyrovae.data.Vocabulary.of`; those that are None are left out.
    """
    file = Path(data).stat() if Path(data).is_file() else None  # a file that has changed is read again
    stamp = (0, 0) if file is None else (file.st_mtime_ns, file.st_size)
    given = frozenset((name, value) for name, value in options.items() if value is not None)
    splits, description = _load_text(data, vocabulary, given, stamp)
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in zip(_PARTS, splits, strict=True))
    return splits, f"{data}: {sizes} lines\n{description}"


def is_sounds(data: str) -> bool:
    """Returns whether data are sounds, and no data set with a name; music is looked for first."""
    return data not in datasets.DATA_SETS and datasets.is_sounds(data)


@lru_cache(maxsize=1)  # train reads the sounds for its defaults, then for itself; main clears it
def load_sounds(data: str, spectrogram: datasets.Spectrogram | None = None) -> tuple[datasets.Splits, str]:
    """Returns the splits of a folder or an archive of sounds, and lines that describe them.

    Args:
        data: the folder or archive.
        spectrogram: how they become spectra; what suits them if None.
    """
    splits = datasets.load_sounds(data, spectrogram)
    assert splits.spectrogram is not None  # of sounds
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in zip(_PARTS, splits, strict=True))
    return splits, f"{data}: {sizes} pieces of sounds\n{splits.spectrogram.describe()}"


def is_music(data: str) -> bool:
    """Returns whether data are music, and no data set with a name."""
    return data not in datasets.DATA_SETS and datasets.is_music(data)


@lru_cache(maxsize=1)  # train reads the songs for its defaults, then for itself; main clears it
def load_music(
    data: str,
    piano_roll: datasets.PianoRoll | None = None,
    per_quarter: int | None = None,
    num_steps: int | None = None,
) -> tuple[datasets.Splits, str]:
    """Returns the splits of songs, and lines that describe them.

    Args:
        data: the file, the folder or the archive.
        piano_roll: how they become sequences; what suits them if None.
        per_quarter: steps of a quarter note, of MIDI files.
        num_steps: steps of a piece.
    """
    splits = datasets.load_music(data, piano_roll, per_quarter, num_steps)
    assert splits.piano_roll is not None  # of songs
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in zip(_PARTS, splits, strict=True))
    return splits, f"{data}: {sizes} pieces of songs\n{splits.piano_roll.describe()}"


def load_series(
    data: str,
    time_series: datasets.TimeSeries | None = None,
    time: str | None = None,
    series: str | None = None,
    columns: tuple[str, ...] = (),
    growth: bool = False,
    num_steps: int | None = None,
    schema: datasets.Schema | None = None,
) -> tuple[datasets.Splits, str]:
    """Returns the splits of a table whose rows are steps of time, and lines that describe them.

    Args:
        data: the file.
        time_series: how its rows become steps; found out from the other arguments if None.
        time: the column of times.
        series: the column that names the series of a row.
        columns: those to model; all that hold numbers if none.
        growth: whether to model how much columns grow.
        num_steps: rows of a piece.
        schema: its columns; found out if None.
    """
    if data not in datasets.DATA_SETS and not Path(data).exists():
        raise FileNotFoundError(f"there is no file {data}.")
    if not is_table(data):
        raise ValueError(f"time is for a table, a file; data is {data!r}. Leave one of them out.")
    with _advice_on_reading(data):
        splits = datasets.load_series(
            data,
            time_series,
            time=time,
            series=series,
            columns=columns,
            growth=growth,
            num_steps=num_steps,
            schema=schema,
        )
    assert splits.time_series is not None
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in zip(_PARTS, splits, strict=True))
    return splits, f"{data}: {sizes} pieces\n{splits.time_series.describe(splits.time_series.steps(data))}"


def read_schema(path: str | None) -> datasets.Schema | None:
    """Returns the schema of a file that ``pyrovae describe`` wrote; None for none."""
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} with a schema. Write one with pyrovae describe --output.")
    return None if path is None else datasets.Schema.from_yaml(Path(path))


def names_tabular(class_path: str) -> bool:
    """Returns whether a configuration's likelihood is that of the rows of a table."""
    return class_path.rpartition(".")[2] == "Tabular"


def is_table(data: str) -> bool:
    """Returns whether data are a file that may be a table, and no arrays or data set with a name."""
    return data not in datasets.DATA_SETS and Path(data).suffix not in ARRAYS and Path(data).is_file()


def load_splits(data: str, data_root: str, preprocessing: Preprocessing) -> tuple[datasets.Splits, str]:
    """Returns the splits, and lines that describe them. What is to be binarised once is binarised."""
    splits = load_data(data, data_root)
    words = {
        "grey": "grey (values as they are)",
        "static": "static binarisation (once, seed 0)",
        "dynamic": "dynamic binarisation (training data again for each batch, the rest once, seed 0)",
    }[preprocessing]
    if preprocessing != "grey":
        seeds = (None if preprocessing == "dynamic" else 0, 1, 2)
        splits = datasets.Splits(
            *(
                part if seed is None else replace(part, x=datasets.static_binarization(part.x, seed))
                for part, seed in zip(splits, seeds, strict=True)
            )
        )
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in zip(_PARTS, splits, strict=True))
    return splits, f"{data}: {sizes} of shape {tuple(splits.train.x.shape[1:])}\npreprocessing: {words}"


def data_to_score(
    splits: datasets.Splits,
    split: SplitName,
    preprocessing: Preprocessing,
    num_data: int | None = None,
    device: str = "cpu",
) -> datasets.Split:
    """Returns the first data of a split for scoring: binarised once, where training binarises each batch.

    Args:
        splits: the data.
        split: the split.
        preprocessing: that of the run.
        num_data: how many; all if None.
        device: where x is to be.
    """
    part = getattr(splits, split)
    if preprocessing == "dynamic" and split == "train":
        part = replace(part, x=datasets.static_binarization(part.x, 0))
    return first_of(part, num_data, device)


def first_of(part: datasets.Split, num_data: int | None, device: str) -> datasets.Split:
    """Returns the first data of a part, all if `num_data` is None, with x on a device."""
    few = {name: getattr(part, name) for name in ("labels", "rows", "context")}
    few = {name: None if t is None else t[:num_data] for name, t in few.items()}
    return replace(part, x=part.x[:num_data].to(device), **few)


def default_method(vae: Any, seconds: float | None = None, num_checked: int = 0) -> Estimator:
    """Returns the estimator of log p(x) for a VAE: a particle filter for sequences, stages for others.

    Args:
        vae: the VAE.
        seconds: budget of the stages; a filter has none.
        num_checked: data that the stages estimate a second time.
    """
    if isinstance(vae, SequenceVAE):
        return ParticleFilter(num_samples=_NUM_FILTERS, num_particles=_NUM_PARTICLES)
    return UntilTrusted(seconds=seconds, num_checked=num_checked)


def programs_of(vae: Any, method: Estimator) -> tuple[Any, Any]:
    """Returns the model and the guide that an estimator takes; a filter takes those with a site for each step."""
    if isinstance(vae, SequenceVAE) and isinstance(method, ParticleFilter):
        return vae.model_by_step, vae.guide_by_step
    return vae.model, vae.guide


def per_step(estimate: Estimate, num_steps: int, unit: str = "step") -> str:
    """Returns in words -log p(x) by the step of sequences, or what else a step is."""
    nats = -estimate.value.double().sum().item() / num_steps
    note = "" if bool(estimate.trusted.all()) else "; too high for those that are not to be trusted"
    return f"-log p(x): {nats:.3f} nats a {unit}, of {num_steps:,} {unit}s{note}"


def unit_of(splits: datasets.Splits) -> str:
    """Returns what a step of sequences is called."""
    return "frame" if splits.spectrogram else "row" if splits.time_series else "step"


def chosen_method(method: Estimator | None, num_samples: int | None, default: Estimator) -> Estimator:
    """Returns the estimator that the options --method and --num-samples ask for; samples of a filter are filters."""
    if method is None and num_samples is not None and isinstance(default, ParticleFilter):
        return ParticleFilter(num_samples, default.num_particles)
    if method is None:
        return default if num_samples is None else ImportanceSampling(num_samples)
    if num_samples is not None:
        raise ValueError(f"--num-samples is for importance sampling: give --method.num_samples {num_samples} instead.")
    return method


@torch.no_grad()
def is_discrete(vae: Any) -> bool | None:
    """Returns whether the data of the likelihood are discrete; None if only some of their columns are."""
    kinds = {block.support.is_discrete for block in _blocks(vae)}
    return kinds.pop() if len(kinds) == 1 else None


@torch.no_grad()
def measure_of(vae: Any) -> tuple[str, ...]:
    """Returns for each column, or for all of a datum, whether the likelihood is a probability or a density.

    Only values of one kind can be compared: a density on a simplex or on a sphere has another unit than one of as many
    real numbers.
    """
    blocks = _blocks(vae)
    if len(blocks) > 1:
        return tuple(_measure(block) for block in blocks for _ in range(block.event_shape[0]))
    [p] = blocks
    return (_measure(p),) * (p.event_shape[0] if len(p.event_shape) == 1 else 1)


def _blocks(vae: Any) -> list[Any]:
    """Returns the distributions of p(x | z), of sequences those of a step, one for each kind of elements."""
    if isinstance(vae, SequenceVAE):
        like = next(vae.parameters())
        x = like.new_zeros(1, 1, *cast(Likelihood, vae.likelihood).x_shape)
        return [poutine.trace(vae.model_by_step).get_trace(x).nodes["x1"]["fn"]]
    p = vae.decode_from_prior(*to_draw(vae, 1, None))
    return list(p.blocks) if isinstance(p, Blocks) else [p]


def _measure(p: Any) -> str:
    if isinstance(p, Multinomial):
        return "probability given the sum of the counts"
    support = p.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support.is_discrete:
        return "probability"
    on_surface = support.event_dim and support is not constraints.real_vector
    return f"density on {support}" if on_surface else "density"


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=as_device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def crowded() -> str:
    """Returns a line where other processes use the cores that threads of OpenMP would need; else an empty one.

    A thread that waits for another spins. If that one has no core, a step of a small VAE takes up to a hundred times as
    long.
    """
    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # what a container may use of them
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    if threads == 1 or threads + round(load) <= cores:
        return ""
    busy = f", and other processes keep about {load:.1f} busy" if round(load) else ""
    return (
        f"{cores:g} cores, and torch uses {threads} threads{busy}. Steps may take many times as long: if they do, set "
        "OMP_NUM_THREADS=1 before the command."
    )


def new_file(path: str | Path, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"output must end in {' or '.join(suffixes)}, got {path}.")
    if path.exists():
        raise FileExistsError(f"{path} already exists. Give another file with --output, or another --seed.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as a .csv file with a header."""
    with open(path, "w", newline="", encoding="utf-8") as content:
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_columns(columns: Mapping[str, Tensor | list[str]], path: Path) -> None:
    """Writes columns of numbers, ``(rows,)`` each, or of words as a .csv file with their names."""

    def written(column: Tensor | list[str]) -> list[str]:
        if isinstance(column, list):
            return column
        pattern = "{:.9g}" if column.is_floating_point() else "{:d}"
        numbers = column.cpu().double() if column.is_floating_point() else column.cpu().long()
        return list(map(pattern.format, numbers.tolist()))

    write_rows(path, list(columns), zip(*map(written, columns.values()), strict=True))


def write_array(x: Tensor, path: Path) -> None:
    array = x.cpu().numpy()
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savetxt(path, array.reshape(len(array), -1), delimiter=",", fmt="%.9g")
