"""``pyrovae score``, ``impute`` and ``encode``: what a trained VAE of a table says about the rows of a file."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import storage
from pyrovae.cli.common import (
    advice_as_options,
    check_device,
    check_fingerprint,
    chosen_method,
    default_method,
    first_of,
    load_table,
    new_file,
    stem_of,
)
from pyrovae.cli.labels import arguments_of, context_of, note_on, scored
from pyrovae.cli.pieces import recordings_of, score_pieces
from pyrovae.cli.series import impute_series, score_series
from pyrovae.cli.text import score_lines
from pyrovae.data.cells import is_number
from pyrovae.data.columns import Discrete, Modelled
from pyrovae.data.schema import holds_numbers
from pyrovae.estimators import Estimator, UntilTrusted, log_marginal
from pyrovae.inference.imputation import impute as impute_rows
from pyrovae.structures import MissingDataVAE

_DRAWS_OF_A_ROW = 1001
TABLES = (".csv", ".tsv", ".parquet", ".pq")
_NUM_COMPARED, _NUM_HIDDEN = 500, 100  # reference rows for the rank of a row without holes, and with holes
_NUM_READ = 2000  # reference rows among which those are looked for
_NUM_USUAL = 200  # reference rows for the mean of a cell
_NUM_PATTERNS = 20  # patterns of holes for which reference rows are scored, the most frequent ones
_FEW_COMPARED = 30  # reference rows, below which ranks are rough
_LEAST_COMPARED = 10  # reference rows for a rank
_NUM_SAMPLES = 100  # importance samples that explain a cell
_PAIR = re.compile(r'\s*(?:"([^"]+)"|([^=,"]+?))\s*=\s*(?:"([^"]*)"|([^",][^,]*?|))\s*(?:,|$)')  # of --given
_LEAST_ESS = 30.0  # below it a few samples make most of an imputation


def score(
    run: str,
    file: str,
    output: str | None = None,
    method: Estimator | None = None,
    num_samples: int | None = None,
    num_explained: int = 100,
    reference: str | None = None,
    seconds: float | None = None,
    max_memory: float = 64e6,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Writes log p(x) of each row of a table, line of a text, song or sound, and how unusual a row is and why.

    Of a run with a context, log_p is conditional on the cells of the context, which are not explained.

    Columns of the result: row (counted from 1); log_p in nats with its standard_error; trusted (1 or 0) and khat, which
    say whether log_p can be relied on; rarer_than (the share of reference rows that are more probable); and for the
    most unusual rows up to three surprising cells, each with the nats by which log p(cell | all other cells of the row)
    is below the mean of its column in 200 reference rows.

    Only observed cells count. A row with missing cells is compared with reference rows in which the same cells are
    hidden. rarer_than is empty where there are fewer than 10 of them, for patterns of missing cells beyond the 20 most
    frequent ones of the file, and for rows without any cell.

    Of a text the columns are line (counted from 1, without empty ones); log_p, standard_error, trusted and khat; words,
    with the end of the line; unknown, how many of them are not in the vocabulary; and nats_a_word.

    Of time series log_p is that of a row given at least half a piece of rows before it, and the columns are row,
    series, time, log_p and standard_error.

    Of sounds they are sound, the name of the file; from and to, where the piece is, in seconds; log_p, standard_error
    and trusted; frames; and nats_a_frame. Of music they are the same with song, quarter notes and steps.

    Args:
        run: the run directory.
        file: a table with the columns of the training data, a text, or a sound, a MIDI file, a folder or a .zip
            archive of them, or a .json file of songs.
        output: a .csv file; scores-<file>.csv in the run directory by default.
        method: the class of another estimator, one of pyrovae.estimators; UntilTrusted by default, of sounds
            and music ParticleFilter.
        num_samples: importance samples of the guide per row, instead of stages of estimators until a row can be
            trusted; of sounds and music, filters.
        num_explained: how many of the most unusual rows have their most surprising cells listed.
        reference: a table of usual rows to compare with; by default the test part of the data of the run.
        seconds: budget of time of the stages, for the rows and again for those to compare with; null for no limit. Rows
            for which it does not suffice are not trusted.
        max_memory: memory for intermediate results, in bytes.
        seed: seed of the samples.
        device: cpu, cuda, cuda:1, ...
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_explained < 0 or (num_samples is not None and num_samples < 2):
        raise ValueError(f"num_samples must be at least 2 and num_explained 0, got {num_samples} and {num_explained}.")
    if seconds is not None and (num_samples is not None or method is not None):
        raise ValueError("--seconds is a budget of the stages: leave out --num-samples and --method.")
    if method is not None and method.relation != "=":
        raise ValueError(f"{method} is an upper bound of log p(x). Take another method.")
    check_device(device)
    place = output or Path(run) / f"scores-{stem_of(file)}.csv"
    config = storage.read_config(run, trust=trust)
    others: tuple[tuple[Any, Callable], ...] = (
        (config.get("vocabulary"), score_lines),
        (recordings_of(config), score_pieces),
        (config.get("time_series"), score_series),
    )
    for encoding, score_them in others:
        if encoding is not None:
            if reference is not None:
                raise ValueError("reference is for tables, and this run is on other data. Leave it out.")
            vae, _ = storage.load_run(run, trust=trust)
            method = chosen_method(method, num_samples, default_method(vae, seconds))
            score_them(vae.to(device), encoding, file, place, method, max_memory, seed, device)
            return
    method = chosen_method(method, num_samples, UntilTrusted(seconds=seconds))
    out = new_file(place, (".csv",))
    vae, table, rows = load_rows(run, file, trust, device)
    usual = arguments_of(vae, first_of(_reference_rows(run, reference, table.schema), _NUM_READ, device), table.schema)
    check_some(rows, file)
    args = _arguments(vae, table, rows, device)
    pyro.set_rng_seed(seed)
    estimate = log_marginal(vae.model, vae.guide, *args, method=method, max_memory=max_memory)
    value, trusted = estimate.value.cpu(), estimate.trusted.cpu()
    print(advice_as_options(f"{file}: {estimate}{note_on(vae, table.schema)}"))
    rarer, below = _compare(vae, value, args[1], usual, method, max_memory)
    # The most unusual first; rows that cannot be compared come last, the least probable first.
    order = sorted(range(len(rows)), key=lambda i: (bool(below[i].isnan()), -float(below[i]), float(value[i])))
    unusual = torch.tensor(order[:num_explained], dtype=torch.long)
    listed = {i: [""] * 3 for i in unusual.tolist()}
    if len(unusual):
        few = tuple(t[:_NUM_USUAL] for t in usual)
        cells = explain(vae, tuple(t[unusual] for t in args), few, num_samples or _NUM_SAMPLES, seed)
        for i, surprise in zip(unusual.tolist(), cells, strict=True):
            best = surprise.nan_to_num(-np.inf).argsort(descending=True)[:3].tolist()
            listed[i] = [f"{table.names[d]} ({surprise[d]:.2f})" if surprise[d] >= 0.005 else "" for d in best]
            listed[i] += [""] * (3 - len(listed[i]))
    with open(out, "w", newline="", encoding="utf-8") as content:
        writer = csv.writer(content, lineterminator="\n")
        names = ["row", "log_p", "standard_error", "trusted", "khat", "rarer_than", "cell_1", "cell_2", "cell_3"]
        writer.writerow(names)
        at = {int(row): i for i, row in enumerate(rows)}
        for row in range(len(table)):
            i = at.get(row)
            if i is None:  # no cell is observed: probability one
                writer.writerow([row + 1, 0, 0, 1, *[""] * 5])
                continue
            numbers = [f"{value[i]:.9g}", f"{estimate.standard_error[i]:.3g}", int(trusted[i])]
            numbers += [_or_empty(estimate.khat[i], ".3g"), _or_empty(rarer[i], ".6f")]
            writer.writerow([row + 1, *numbers, *listed.get(i, [""] * 3)])
    alone = int(rarer.isnan().sum())
    if alone:
        print(
            f"rarer_than is empty for {alone:,} rows with holes: fewer than {_LEAST_COMPARED} reference rows have all "
            f"their cells, or {_NUM_PATTERNS} other patterns of holes are more frequent"
        )
    if not trusted.all():
        doubtful = [str(int(row) + 1) for row in rows[~trusted]]
        print(f"rows not to be trusted: {', '.join(doubtful[:10])}{', ...' if len(doubtful) > 10 else ''}")
        if num_samples is not None:
            print("leave out --num-samples to score each row until it can be trusted")
    for i in unusual[:5].tolist():
        surprising = ", ".join(filter(None, listed[i])) or "no cell"
        print(f"row {int(rows[i]) + 1}: {scored(vae, table.schema)} = {value[i]:.2f}; surprising: {surprising}")
    print(f"per row: {out}")


def _or_empty(value: Tensor, form: str) -> str:
    return "" if value.isnan() else format(float(value), form)


def _compare(
    vae: MissingDataVAE, value: Tensor, mask: Tensor, usual: tuple[Tensor, ...], method: Estimator, max_memory: float
) -> tuple[Tensor, Tensor]:
    """Compares rows with usual rows in which the same cells are observed, all others hidden.

    Args:
        vae: the VAE.
        value: log p of the rows.
        mask: which of their cells are observed, ``(size, columns)``.
        usual: the usual rows, which of their cells are observed, and their context, if the model takes one.
        method: the estimator of log p of the usual rows.
        max_memory: memory for intermediate results, in bytes.

    Returns:
        The share of usual rows that are more probable, and the nats by which a row is below their median; NaN where
        fewer than 10 of them have all cells of the row, or 20 other patterns of holes are more frequent.
    """
    patterns, which, counts = mask.unique(dim=0, return_inverse=True, return_counts=True)
    groups, found = [], []
    for number in counts.argsort(descending=True, stable=True)[:_NUM_PATTERNS].tolist():
        seen = patterns[number]
        most = _NUM_COMPARED if bool(seen.all()) else _NUM_HIDDEN
        fit = (usual[1] | ~seen).all(1).nonzero().flatten()[:most]
        if len(fit) >= _LEAST_COMPARED:
            groups.append((number, len(fit)))
            found.append((usual[0][fit], seen.expand(len(fit), -1), *(t[fit] for t in usual[2:])))
    rarer, below = torch.full_like(value, torch.nan), torch.full_like(value, torch.nan)
    if not found:
        return rarer, below
    x, seen, *context = (torch.cat(parts) for parts in zip(*found, strict=True))
    x = torch.where(seen, x, torch.zeros_like(x))
    print(f"{len(x):,} reference rows are scored to compare with")
    scores = log_marginal(vae.model, vae.guide, x, seen, *context, method=method, max_memory=max_memory)
    for (number, size), compared in zip(groups, scores.value.cpu().split([n for _, n in groups]), strict=True):
        rows = (which == number).nonzero().flatten().cpu()
        ordered = compared.sort().values
        rarer[rows] = (size - torch.searchsorted(ordered, value[rows], right=True)).to(value.dtype) / size
        below[rows] = ordered.median() - value[rows]
    return rarer, below


def _reference_rows(run: str, reference: str | None, schema: datasets.Schema) -> datasets.Split:
    """Returns usual rows to compare with, those of a file or of the test part of the data of a run."""
    if reference is not None:
        table = datasets.Table(Path(reference), schema)
        part = _part(table, _with_cells(table))
    else:
        config = storage.read_config(run, trust=True)  # which builds nothing
        source = config["data"]
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"{source}, the data of the run, is not there, and rows are compared with its test part. Give a table "
                "of usual rows with --reference."
            )
        splits, _ = load_table(source, schema)
        check_fingerprint(config, splits)
        part = splits.test
    size = len(part.x)
    if size == 0:
        raise ValueError("there are no rows to compare with. Give some: --reference.")
    if size < _FEW_COMPARED:
        where = "test part of the run" if reference is None else "reference"
        print(f"there are only {size} rows to compare with, the {where}: ranks are rough. Give more: --reference FILE")
    return part


def explain(
    vae: MissingDataVAE, rows: tuple[Tensor, ...], usual: tuple[Tensor, ...], num_samples: int, seed: int
) -> Tensor:
    r"""Returns how surprising each cell is given all others, in nats against the mean of its column.

    .. math:: \log p(x_d \mid x_{-d}) = \log p(x) - \log p(x_{-d})

    Both are estimated with the same seed.

    Args:
        vae: the VAE.
        rows: the rows to explain and which of their cells are observed, each ``(size, columns)``; and their context,
            if the model takes one.
        usual: the rows that give the mean of each column, likewise.
        num_samples: importance samples per row and cell.
        seed: seed of the samples.

    Returns:
        Shape ``(size, columns)``, NaN for missing cells. The only cell of a row is compared by its log p, with that of
        the cells of its column when all others are hidden.
    """
    x, mask, *context = (torch.cat([a, b]) for a, b in zip(rows, usual, strict=True))

    def log_p(x: Tensor, mask: Tensor, which: Tensor | slice) -> Tensor:
        pyro.set_rng_seed(seed)
        args = (x, mask, *(c[which] for c in context))
        return log_marginal(vae.model, vae.guide, *args, num_samples=num_samples, progress=False).value.cpu()

    surprise = torch.full(x.shape, torch.nan)
    whole = log_p(x, mask, slice(None))
    for d in range(x.shape[1]):
        rest = mask.clone()
        rest[:, d] = False
        some = (mask[:, d] & rest.any(1)).nonzero().flatten()
        if len(some):
            without = log_p(x[some], rest[some], some)
            surprise[some.cpu(), d] = without - whole[some.cpu()]
    size = len(rows[0])
    result = surprise[:size] - surprise[size:].nanmean(0)
    single = mask[:size].sum(1) == 1
    for d in mask[:size][single].any(0).nonzero().flatten().tolist():
        alone = (single & mask[:size, d]).nonzero().flatten().cpu()
        some = mask[size:, d].nonzero().flatten() + size
        if len(some):
            only = torch.zeros_like(mask[some])
            only[:, d] = True
            result[alone, d] = log_p(x[some], only, some).mean() - whole[alone]
    return result


def impute(
    run: str,
    file: str,
    output: str | None = None,
    num_samples: int = 1000,
    num_draws: int = 100,
    num_completed: int = 0,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Fills the missing cells of a file, and writes how sure each is.

    Of a time series a row with an empty cell is drawn as a whole, given the rows before and after it; its other cells
    stay as they are, and say nothing of the empty one. Gaps at the end of a series stay empty: see pyrovae forecast.

    Cells that are not missing, and columns that are left out, stay as they are in the file; so do the cells that the
    model conditions on, missing or not.

    Numbers are filled with the median of draws from p(missing cells | observed cells), classes with the most probable
    one. A second file has a line for each filled cell: the 5 % and 95 % points of the draws of numbers, probabilities
    of classes, and the effective sample size (ess) of the draws of the row, which is to be above 30.

    Args:
        run: the run directory.
        file: a table with the columns of the training data.
        output: a .csv, .tsv or .parquet file; imputed-<file>.csv in the run directory by default. The second file is
            <output>-cells.csv.
        num_samples: importance samples per row.
        num_draws: draws per row.
        num_completed: how many completed tables to write besides, each with one draw in place of each missing cell, for
            multiple imputation: <output>-1.csv, ...
        seed: seed of the draws.
        device: cpu, cuda, cuda:1, ...
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_draws < 10 or not 0 <= num_completed <= num_draws:
        wrong = f"{num_draws} and {num_completed}"
        raise ValueError(f"num_draws must be at least 10, and num_completed from 0 to num_draws, got {wrong}.")
    check_device(device)
    config = storage.read_config(run, trust=trust)
    out = new_file(output or Path(run) / f"imputed-{stem_of(file)}.csv", TABLES)
    if config.get("time_series") is not None:
        if num_completed:
            raise ValueError("num_completed is for tables without times. Leave it out.")
        vae = storage.load_run(run, trust=trust)[0]
        impute_series(vae, config["time_series"], file, num_draws, out, seed, device)
        return
    cells_out = new_file(out.with_name(f"{out.stem}-cells.csv"), (".csv",))
    others = [new_file(out.with_name(f"{out.stem}-{i + 1}{out.suffix}"), TABLES) for i in range(num_completed)]
    vae, table, rows = load_rows(run, file, trust, device)
    if len(rows) < len(table):
        print(f"{len(table) - len(rows):,} rows have no cell at all, and stay empty")
    pyro.set_rng_seed(seed)
    incomplete = rows[table.x[rows].isnan().any(1)]
    filled = table.x.clone()
    completed = [table.x.clone() for _ in others]
    lines, unsure = [], 0
    for part in incomplete.split(256) if len(incomplete) else ():  # split gives one empty part of none
        args = _arguments(vae, table, part, device)
        imputed = vae.impute(*args, num_samples=num_samples, num_draws=num_draws)
        draws, ess = imputed.draws.cpu(), imputed.ess.cpu()
        unsure += int((ess < _LEAST_ESS).sum())
        for each, one in zip(completed, draws, strict=False):
            each[part] = one
        for d, column in enumerate(table.schema.modelled):
            for i in table.x[part, d].isnan().nonzero().flatten().tolist():
                value, details = _summary(column, draws[:, i, d])
                filled[part[i], d] = value
                lines.append((int(part[i]) + 1, column, value, *details, float(ess[i])))
    for path, each in zip([out, *others], [filled, *completed], strict=True):
        table.schema.write_filled(each, table.x, table.source, path)
    if table.context is not None and table.context.isnan().any():
        names = ", ".join(table.schema.context_names)
        print(f"the model conditions on {names}: {int(table.context.isnan().sum()):,} empty cells there stay empty")
    lines.sort(key=lambda line: line[0])
    with open(cells_out, "w", newline="", encoding="utf-8") as content:
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(["row", "column", "value", "low_5", "high_95", "probabilities", "ess"])
        for row, column, value, low, high, shares, ess_of_row in lines:
            texts = [_text(column, v) for v in (value, low, high)]
            writer.writerow([row, column.name, *texts, shares, f"{ess_of_row:.1f}"])
    if not lines:
        print(f"there is nothing to fill: every row that has a cell has all. The table is written as it is: {out}")
        return
    print(f"filled {len(lines):,} cells in {len(incomplete):,} of {len(table):,} rows: {out}\nhow sure: {cells_out}")
    if unsure:
        print(f"the effective sample size is below {_LEAST_ESS:g} for {unsure:,} rows: take more --num-samples")


def _summary(column: Modelled, draws: Tensor) -> tuple[float, tuple[float | None, float | None, str]]:
    """Returns the value to fill in, and the 5 % and 95 % points, or the probabilities of classes."""
    if isinstance(column, Discrete):
        shares = torch.bincount(draws.long(), minlength=column.num_levels).double() / len(draws)
        order = shares.argsort(descending=True, stable=True)
        listed = "; ".join(f"{column.levels[k]}: {shares[k]:.2f}" for k in order.tolist() if shares[k] > 0)
        return float(order[0]), (None, None, listed)
    ordered = draws.sort().values  # draws themselves, which are on the grid of the column
    points = [float(ordered[round(q * (len(ordered) - 1))]) for q in (0.5, 0.05, 0.95)]
    return points[0], (points[1], points[2], "")


def _text(column: Modelled, value: Tensor | float | None) -> str:
    return "" if value is None else column.text(column.decode([value]))[0] or ""


def draw_rows(vae: MissingDataVAE, schema: datasets.Schema, num_samples: int, cells: Tensor | None) -> Tensor:
    """Returns rows drawn from p(x), or from p(x | c), one for each row of encoded cells c."""
    device, parts = next(vae.parameters()).device, []
    for start in range(0, num_samples, 4096):
        if cells is None:
            parts.append(vae.sample(min(4096, num_samples - start)))
        else:
            parts.append(vae.sample(1, *(c.to(device) for c in context_of(schema, cells[start : start + 4096])))[0])
    return torch.cat(parts).cpu()


@torch.no_grad()
def reconstruct_rows(
    vae: MissingDataVAE, schema: datasets.Schema, x: Tensor, mask: Tensor, context: Tensor | None = None
) -> Tensor:
    """Returns rows as p(x | z) has them at one draw of z: medians of numbers, and the most probable classes."""
    p = vae.decode(vae.encode(x, mask, context).sample(), context)
    draws = p.sample((_DRAWS_OF_A_ROW,)).cpu()  # it has no quantiles
    rows = [[_summary(c, draws[:, i, d])[0] for d, c in enumerate(schema.modelled)] for i in range(len(x))]
    return torch.tensor(rows, dtype=draws.dtype)


def read_given(schema: datasets.Schema, given: str) -> dict[str, list[Any]]:
    """Returns cells by the names of their columns, each in a list.

    Args:
        schema: the columns.
        given: the cells, as ``"sex=Female, age=40.5"``: numbers with a decimal point, or, between double quotes, cells
            as the file has them. A name with a comma or an equals sign is between double quotes, too.

    Raises:
        ValueError: when it is something else, or a column is unknown.
    """
    cells: dict[str, list[Any]] = {}
    columns, start = {column.name: column for column in (*schema.context, *schema.modelled)}, 0
    while start < len(given):
        pair = _PAIR.match(given, start)
        if pair is None:
            raise ValueError(
                f"given must be pairs such as 'sex=Female, age=40.5', got {given[start:].strip()!r}. Write numbers "
                "with a decimal point, and double quotes around a name or a cell with a comma, as in "
                '\'size="23,5", "a, b"=Bern\'.'
            )
        quoted_name, plain_name, quoted, plain = pair.groups()
        name = quoted_name or plain_name
        if name not in columns:
            raise ValueError(f"given names {name!r}, but the columns are {', '.join(columns)}.")
        if name in cells:
            raise ValueError(f"given names {name!r} twice. Give each column one cell.")
        cells[name] = [quoted if quoted is not None else plain]
        if plain is not None and is_number(plain) and holds_numbers(columns[name]):
            cells[name] = [float(plain)]  # with a decimal point, however the file is written
        if cells[name][0] in ("", *schema.dialect.missing) and name in schema.names:
            raise ValueError(f"given has a missing cell, {cells[name][0]!r}, in column {name!r}. Leave the column out.")
        start = pair.end()
    return cells


def draw_given(vae: MissingDataVAE, schema: datasets.Schema, given: str, num_samples: int) -> tuple[Tensor, float]:
    """Returns rows with given cells, drawn by sampling-importance-resampling, and the effective sample size.

    Args:
        vae: the VAE.
        schema: its columns; of those that the model conditions on, each must have a cell.
        given: the cells, as for :func:`read_given`.
        num_samples: number of rows.

    Raises:
        ValueError: when a column or value is unknown, or too few of the samples are near the given cells.
    """
    cells = read_given(schema, given)
    every = {column.name: [None] for column in (*schema.context, *schema.modelled)} | cells
    x, mask = datasets.split_missing(schema.encode(every))
    context = context_of(schema, schema.encode_context(every) if schema.context else None)
    candidates = max(20_000, 10 * num_samples)
    imputed = impute_rows(vae.model, vae.guide, x, mask, *context, num_samples=candidates, num_draws=num_samples)
    ess = float(imputed.ess[0])
    if ess < min(100, candidates / 10):
        raise ValueError(
            f"only {ess:.0f} of {candidates:,} samples count for {given!r} (effective sample size): such rows are too "
            "rare for this model. Give fewer cells, or values that occur in the training data."
        )
    return torch.where(mask, x, imputed.draws[:, 0]), ess


def given_context(
    schema: datasets.Schema, cells: dict[str, list[Any]], train: datasets.Split | None, num_samples: int
) -> tuple[Tensor, str]:
    """Returns the encoded cells that rows are to be drawn given, one row each, and a line that says what they are.

    Args:
        schema: the columns, with a context.
        cells: given cells, as :func:`read_given` returns them.
        train: training rows; random ones supply the cells of the context that are not given. None if all are given.
        num_samples: number of rows.

    Raises:
        ValueError: when a value is unknown, or no training row has the given cells of the context.
    """
    names = schema.context_names
    asked = schema.encode_context({name: cells.get(name, [None]) for name in names})[0]
    said = ", ".join(f"{c.name}={_text(c, v)}" for c, v in zip(schema.context, asked, strict=True) if c.name in cells)
    if train is None:
        return asked.expand(num_samples, -1), f"given {said}: draws are exact, the model conditions on these columns"
    assert train.context is not None
    there = torch.tensor([name in cells for name in names])
    same = (train.context == asked) | (train.context.isnan() & asked.isnan()) | ~there
    rows = same.all(1).nonzero().flatten()
    if not len(rows):
        raise ValueError(
            f"no training row has {said}, to take {', '.join(n for n in names if n not in cells)} from. Give a cell of "
            f"each column that the model conditions on: {', '.join(names)}."
        )
    others = ", ".join(name for name in names if name not in cells)
    which = f"{len(rows):,} training rows with {said}" if said else "random training rows"
    return train.context[rows[torch.randint(len(rows), (num_samples,))]], f"given {others} of {which}"


def _with_cells(table: datasets.Table) -> Tensor:
    """Returns the rows that have a cell to model."""
    return (~table.x.isnan().all(1)).nonzero().flatten()


def _part(table: datasets.Table, rows: Tensor) -> datasets.Split:
    return datasets.Split(table.x[rows], None, rows + 1, None if table.context is None else table.context[rows])


def _arguments(vae: MissingDataVAE, table: datasets.Table, rows: Tensor, device: str) -> tuple[Tensor, ...]:
    """Returns what the model and the guide take for rows of a table."""
    return arguments_of(vae, first_of(_part(table, rows), None, device), table.schema)


def check_some(rows: Tensor, file: str) -> None:
    if len(rows) == 0:
        raise ValueError(f"file: no row of {file} has a cell that the model knows. Give a table with such rows.")


def load_rows(run: str, file: str, trust: bool, device: str) -> tuple[MissingDataVAE, datasets.Table, Tensor]:
    """Returns the VAE of a run, a file read by its schema, and the rows that have a cell."""
    vae, config = storage.load_run(run, trust=trust)
    schema = config.get("table")
    if schema is None:
        raise ValueError(f"{run} is no run on a table. Take pyrovae evaluate or reconstruct, or train on a table.")
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    table = datasets.Table(Path(file), schema)
    return vae.to(device), table, _with_cells(table)
