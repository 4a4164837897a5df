"""Time series in the command line: settings that suit them, and rows that a run draws, forecasts or scores."""

import csv
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrovae.cli.common import new_file, write_rows
from pyrovae.cli.defaults import recurrent_defaults, student_t
from pyrovae.cli.labels import split_steps
from pyrovae.data import TimeSeries
from pyrovae.data.series import Steps
from pyrovae.estimators import Estimator, ParticleFilter, log_predictive
from pyrovae.inference.messages import warn
from pyrovae.progress import tqdm
from pyrovae.structures import SequenceVAE
from pyrovae.structures.sequences import until_last

TABLES = (".csv", ".tsv", ".parquet", ".pq")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_NUM_SHOWN = 5
_LEAST_ESS = 30  # of the draws of a gap
_GAPS_AT_ONCE = 64


def series_defaults(num_pieces: int, num_columns: int, epochs: int | None = None) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` that suit time series, as a configuration holds them.

    Args:
        num_pieces: pieces to train on.
        num_columns: columns that are modelled.
        epochs: passes over the data; None for what suits them.
    """
    epochs = min(500, max(20, 12_000 // num_pieces)) if epochs is None else epochs
    batch_size = min(32, max(4, num_pieces // 10))
    return recurrent_defaults(
        student_t(hidden=64, scale=0.5),
        epochs=epochs,
        warm_up=max(1, min(20, epochs // 2)),
        batch_size=batch_size,
        patience=max(20, epochs // 10),
        latent_dim=min(16, 2 + num_columns),
        width=64,
        hidden=64,
    )


def check_sequences(vae: Any) -> SequenceVAE:
    """Returns the VAE of a run on time series; raises a ValueError if it is none of sequences."""
    if not isinstance(vae, SequenceVAE):
        raise ValueError(
            f"this is for sequences, and a {type(vae).__name__} has no steps. Train with --structure Recurrent or "
            "StateSpace."
        )
    return vae


@torch.no_grad()
def sample_series(
    vae: Any, time_series: TimeSeries, num_samples: int, num_steps: int | None, output: str | Path, seed: int
) -> None:
    """Draws sequences from p(x), and writes their rows."""
    out = new_file(output, TABLES)
    pyro.set_rng_seed(seed)
    num_steps = time_series.num_steps if num_steps is None else num_steps
    x = check_sequences(vae).sample(num_samples, num_steps)
    values = time_series.levels(x).reshape(-1, len(time_series.names))
    sequence, step = (1 + np.indices((num_samples, num_steps))).reshape(2, -1)
    if time_series.growth:  # which is not rounded as the levels are
        columns = dict(zip(time_series.names, values.T, strict=True))
        _write({"sequence": sequence, "step": step, **columns}, out)
    else:
        _write({"sequence": sequence, "step": step}, out, time_series, values)
    print(
        f"{num_samples} sequences of {num_steps} {'changes from row to row' if time_series.growth else 'rows'}: {out}"
    )
    logs = [name for name, log in zip(time_series.names, time_series.logarithmic, strict=True) if log]
    if logs:
        print(f"of the logarithm of {', '.join(logs)}")


def reconstruct_series(
    time_series: TimeSeries, file: str, x: Tensor, reconstructed: Tensor, rows: Tensor | None, out: Path
) -> None:
    """Writes the rows of pieces beside their reconstructions, in the units of the table.

    Args:
        time_series: how rows are steps.
        file: the table.
        x: pieces, with NaN where there is no step.
        reconstructed: of the same shape.
        rows: the row of the table in which each piece begins.
        out: where to write.
    """
    values, again = time_series.levels(x), time_series.levels(reconstructed)
    steps = time_series.steps(file)
    starts = {int(row): place for place, row in enumerate(steps.rows)}
    assert rows is not None  # of pieces of a table
    found = []
    for i, row in enumerate(rows.tolist()):
        for t in np.flatnonzero(~np.isnan(values[i]).any(1)):
            place = starts[row] + int(t)  # the steps of a series follow each other
            own = values[i, t] if time_series.growth else steps.levels[place]  # not moved within their steps
            pairs = enumerate(zip(own, again[i, t], strict=True))
            numbers = [time_series.number_text(c, v, digits=9) for c, pair in pairs for v in pair]
            (time,) = time_series.times_text(steps.times[place : place + 1])
            found.append([int(steps.rows[place]), steps.names[steps.series[place]], time, *numbers])
    of = [f"change of {name}" if time_series.growth else name for name in time_series.names]
    header = ["row", "series", "time", *(text for name in of for text in (name, f"{name}, reconstructed"))]
    write_rows(out, header, found)


@torch.no_grad()
def impute_series(
    vae: Any, time_series: TimeSeries, file: str, num_draws: int, output: Path, seed: int, device: str
) -> None:
    """Fills the gaps between the rows of a file, and writes the points of the draws of each cell."""
    if getattr(check_sequences(vae), "recurrence", None) is not None:
        raise ValueError(
            "gaps are filled by runs that were trained with --structure StateSpace: a memory of the rows before knows "
            "only gaps like those that it was trained with."
        )
    if time_series.growth:
        raise ValueError(
            "gaps of a run on growth are not filled: the levels on both sides say how much columns grew in between, "
            "which the model does not see. Train without growth."
        )
    cells_out = new_file(output.with_name(f"{output.stem}-cells.csv"), (".csv",))
    steps = time_series.steps(file)
    gaps = time_series.gaps(steps)
    pyro.set_rng_seed(seed)
    vae, filled, lines, unsure = vae.to(device), steps.levels.copy(), [], 0
    lengths = [len(window) for window, _ in gaps]
    with tqdm(desc="gaps", total=len(gaps), unit="gap") as bar:
        for length in sorted(set(lengths)):
            group = [gap for gap, own in zip(gaps, lengths, strict=True) if own == length]
            for few in (group[i : i + _GAPS_AT_ONCE] for i in range(0, len(group), _GAPS_AT_ONCE)):
                x = torch.from_numpy(steps.x[np.stack([window for window, _ in few])]).float().to(device)
                found = vae.impute(x.nan_to_num(), ~x.isnan().any(-1), num_draws=num_draws)
                levels, ess = time_series.levels(found.draws), found.ess.tolist()
                unsure += sum(size < _LEAST_ESS for size in ess)
                for i, (window, hidden) in enumerate(few):
                    points = np.quantile(levels[:, i], (0.05, 0.5, 0.95), axis=0)
                    for place in hidden.tolist():
                        t = place - window[0]
                        for c in np.flatnonzero(np.isnan(steps.levels[place])):
                            filled[place, c] = points[1, t, c]
                            lines.append((place, c, points[:, t, c], ess[i]))
                bar.update(len(few))
    time_series.write_filled(file, steps, filled, output)
    texts = time_series.times_text(steps.times)
    rows = (
        [steps.rows[place], steps.names[steps.series[place]], texts[place], time_series.names[c]]
        + [time_series.number_text(int(c), points[k]) for k in (1, 0, 2)]
        + [f"{size:.1f}"]
        for place, c, points, size in lines
    )
    write_rows(cells_out, ["row", "series", "time", "column", "value", "low_5", "high_95", "ess"], rows)
    left = int(np.isnan(filled).sum())
    print(f"{len(lines):,} cells of {len(gaps):,} gaps are filled with the medians of {num_draws} draws: {output}")
    print(f"what the draws of each say: {cells_out}")
    if left:
        print(f"{left:,} cells stay empty: at the end of a series, or in a gap of more than half a piece")
    if unsure:
        warn(f"{unsure:,} gaps have an effective sample size below {_LEAST_ESS}: take more draws, or train longer.")


@torch.no_grad()
def forecast_series(
    vae: Any,
    time_series: TimeSeries,
    file: str,
    num_steps: int,
    num_series: int | None,
    num_draws: int,
    num_particles: int,
    output: Path,
    seed: int,
    device: str,
) -> None:
    """Draws the rows after the last ones of each series of a file, in the units of the table."""
    steps = time_series.steps(file)
    check_sequences(vae)
    all_x, all_places = time_series.last(steps)
    if not len(all_x):
        raise ValueError(f"{file}: no series has a row without an empty cell, after which it could go on.")
    x, places = all_x[:num_series], all_places[:num_series]
    filled, mask = split_steps(x, torch.from_numpy(steps.rows)[places[:, 0]])
    pyro.set_rng_seed(seed)
    ends = until_last(mask).sum(1) - 1  # of the last rows without an empty cell
    complete = places[torch.arange(len(places)), ends].numpy()
    last = time_series.last_known(steps, complete)  # of growth, also a level after an empty cell
    skipped = last - complete
    args = filled.to(device), num_steps + int(skipped.max()), mask.to(device)
    draws = vae.to(device).forecast(*args, num_samples=num_draws, num_particles=num_particles).cpu()
    draws = torch.stack([draws[:, i, k : k + num_steps] for i, k in enumerate(skipped.tolist())], dim=1)
    coming = time_series.levels(draws, steps.levels[last])
    names = [steps.names[i] for i in steps.series[last]]
    lacking = sorted({*steps.names} - {steps.names[i] for i in steps.series[all_places[:, 0].numpy()]})
    if lacking:
        warn(f"no forecast of {', '.join(map(repr, lacking))}: each row has an empty cell.")
    if output.suffix == ".npy":
        np.save(output, coming)
    elif output.suffix == ".png":
        _draw(time_series, steps, last, coming, names, output)
    else:
        points = np.quantile(coming, _QUANTILES, axis=0)
        after = time_series.times_text(steps.times[last])
        times = [time_series.times_after(steps, place, num_steps) for place in last.tolist()]
        rows = (
            [names[i], after[i], t + 1, times[i][t], time_series.names[c]]
            + [time_series.number_text(c, v) for v in points[:, i, t, c]]
            for i, t, c in np.ndindex(points.shape[1:])
        )
        header = ["series", "after", "step", "time", "column", *(f"q{round(100 * q):02d}" for q in _QUANTILES)]
        write_rows(output, header, rows)
    of = f"{len(x)} of {len(steps.names)} series"
    print(
        f"{num_draws} draws of the {num_steps} rows after the end of {of}, given the last {x.shape[1]} rows: {output}"
    )


@torch.no_grad()
def score_series(
    vae: Any,
    time_series: TimeSeries,
    file: str,
    output: str | Path,
    method: Estimator,
    max_memory: float,
    seed: int,
    device: str,
) -> None:
    """Writes log p of each row of a file given at least the half piece of rows before it; prints the least probable."""
    out = new_file(output, (".csv",))
    check_sequences(vae)
    if not isinstance(method, ParticleFilter):
        raise ValueError(f"rows of time series are scored by ParticleFilter, got {method}. Take --num-samples alone.")
    steps, overlap = time_series.steps(file), time_series.num_steps // 2
    x, places = time_series.pieces(steps, overlap=overlap)
    filled, mask = split_steps(x, torch.from_numpy(steps.rows)[places[:, 0]])
    pyro.set_rng_seed(seed)
    args = filled.to(device), mask.to(device)
    found = log_predictive(vae.model_by_step, vae.guide_by_step, *args, method=method)
    series = torch.from_numpy(steps.series)[places[:, 0]]
    chosen = mask.clone()
    chosen[1:, :overlap] &= (series[1:] != series[:-1]).unsqueeze(1)  # these are scored in the piece before
    at = places[chosen].numpy()
    value, error = (t.cpu()[chosen].double().numpy() for t in (found.value, found.standard_error))
    order = steps.rows[at].argsort()
    at, value, error = at[order], value[order], error[order]
    rows, times = steps.rows[at], time_series.times_text(steps.times[at])
    names = [steps.names[i] for i in steps.series[at]]
    found_rows = ([rows[i], names[i], times[i], f"{value[i]:.9g}", f"{error[i]:.3g}"] for i in range(len(at)))
    write_rows(out, ["row", "series", "time", "log_p", "standard_error"], found_rows)
    before = f"{overlap} to {time_series.num_steps - 1}"
    print(f"{file}: {len(at):,} rows, each given the {before} rows of its series before it, or all if there are fewer")
    if len(at) < len(steps.x):
        after = ", or of growth after one," if time_series.growth else ""
        print(f"{len(steps.x) - len(at):,} rows with an empty cell{after} are not scored")
    print(f"log p = {value.mean():.3f} nats a row (standard error: {math.sqrt((error**2).sum()) / len(at):.3f})")
    rough = int((error > 1).sum())
    if rough:
        warn(f"{rough:,} rows have a standard error above 1 nat: they are not to be trusted. Take more filters.")
    print("the least probable rows:")
    for i in value.argsort()[:_NUM_SHOWN].tolist():
        of = f" of {names[i]}" if names[i] else ""
        print(f"  row {rows[i]:,}, {times[i]}{of}: {value[i]:.2f} nats")
    print(f"per row: {out}")


def _write(
    columns: dict[str, Any], path: Path, time_series: TimeSeries | None = None, levels: np.ndarray | None = None
) -> None:
    """Writes columns of numbers, and levels as the table that the run was trained on writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {name: pa.array(column) for name, column in columns.items()}
    written = dict.fromkeys(columns, "{:.9g}".format)
    if time_series is None or levels is None:
        table = pa.table(list(numbers.values()), names=list(numbers))
    else:
        table = time_series.table(levels, **numbers)
        written |= {name: partial(time_series.number_text, c, digits=9) for c, name in enumerate(time_series.names)}
    if path.suffix in (".parquet", ".pq"):
        pq.write_table(table, path)
        return
    with open(path, "w", newline="", encoding="utf-8") as content:
        writer = csv.writer(content, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(table.column_names)
        texts = [
            [_text(v, written[name]) for v in column.to_pylist()]
            for name, column in zip(table.column_names, table.columns, strict=True)
        ]
        writer.writerows(zip(*texts, strict=True))


def _text(value: Any, written: Callable[[float], str]) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return written(value) if isinstance(value, float) else str(value)


def _draw(
    time_series: TimeSeries, steps: Steps, last: np.ndarray, coming: np.ndarray, names: list[str], path: Path
) -> None:
    """Draws the rows of series up to their last ones, which are at the same step, and fans of what follows."""
    from pyrovae import plots

    first = np.searchsorted(steps.series, steps.series[last])
    counts = np.minimum(last + 1 - first, time_series.num_steps)
    past = np.full((len(last), counts.max(), steps.levels.shape[1]), np.nan)
    for i, (end, count) in enumerate(zip(last, counts, strict=True)):
        past[i, -count:] = steps.levels[end + 1 - count : end + 1]
    figure = plots.forecasts(torch.from_numpy(past), torch.from_numpy(coming))
    titles = [f"{name} {column}".strip() for name in names for column in time_series.names]
    for ax, title in zip(figure.axes, titles, strict=False):
        ax.set_title(title, fontsize="small")
        ax.set_ylabel("")
    figure.savefig(path, dpi=150)
