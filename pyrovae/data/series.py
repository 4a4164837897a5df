"""Tables whose rows are steps of time, as sequences of numbers, and back."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.calendars import times_after
from pyrovae.data.columns import Column, Continuous, Count, Discrete, Identifier, Modelled, Positive, Time
from pyrovae.data.reading import open_source
from pyrovae.data.schema import Schema, quoted
from pyrovae.data.splits import Split, Splits
from pyrovae.inference.messages import warn

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["TimeSeries", "load_series"]

_MAX_STEPS = 64
_TRAINING, _VALIDATION = 0.8, 0.9  # shares of the rows, in the order of their times, up to which a part reaches
_LITTLE = 0.2  # of the spread of a column, as its change from row to row
_OFTEN = 0.05  # a share of steps that repeat the value before them, above which a density may be without bound


class Steps(NamedTuple):
    """The steps of all series of a table, a series after the other, each in the order of its times.

    Args:
        x: their values, NaN where a step is missing, ``(steps, columns)``.
        levels: the cells of the table, in its units, ``(steps, columns)``.
        times: ``(steps,)``, in the units of the column of times.
        rows: their rows in the table, counted from 1, ``(steps,)``.
        series: the number of the series of each in `names`, ``(steps,)``.
        names: the names of the series; one empty name for a table of a single series.
    """

    x: np.ndarray
    levels: np.ndarray
    times: np.ndarray
    rows: np.ndarray
    series: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class TimeSeries:
    r"""How the rows of a table become steps of sequences, and sequences become rows.

    .. math:: x_{tc} = (v_{tc} - m_c) / s_c \qquad \text{or, of growth,} \qquad
        v_{tc} = \log y_{tc} - \log y_{t-1,c} \text{ where } y_{tc} > 0, \text{ else } y_{tc} - y_{t-1,c}

    m and s are mean and standard deviation of a column over the training steps. A row in which a cell is missing is a
    missing step as a whole. Numbers that are rounded, such as prices in cents, are moved within a step of their column,
    at random but always the same for the same time and number, so that a density exists.

    Args:
        schema: the column of times, first, and those that are modelled.
        time: the name of the column of times.
        series: the name of the column that names the series; None for a table of a single series.
        growth: whether a column is modelled by how much it grows from a row to the next, of columns that are positive
            in all training rows by the change of their logarithm.
        logarithmic: for each modelled column whether its growth is that of its logarithm.
        loc: the means :math:`m_c`.
        scale: the standard deviations :math:`s_c`.
        num_steps: rows of a piece, at most.

    >>> table = {"day": ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"], "price": [10.0, 11.0, 10.5, 12.0]}
    >>> series = TimeSeries.of(table, "day", growth=True)
    >>> series.names, series.logarithmic
    (['price'], (True,))
    >>> series.steps(table).x.shape
    (3, 1)
    """

    schema: Schema
    time: str
    series: str | None = None
    growth: bool = False
    logarithmic: tuple[bool, ...] = ()
    loc: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    num_steps: int = _MAX_STEPS

    @classmethod
    def of(
        cls,
        table: Any,
        time: str,
        series: str | None = None,
        columns: Sequence[str] = (),
        *,
        growth: bool = False,
        num_steps: int | None = None,
        schema: Schema | None = None,
        until: float = 1.0,
    ) -> "TimeSeries":
        """Returns what suits a table.

        Args:
            table: the path of a file, or a table of pandas, polars or pyarrow, or a dict of columns.
            time: the name of the column of times: dates, or numbers.
            series: the name of the column that names the series of a row; None for a single one.
            columns: names of the columns to model; all that hold numbers by default.
            growth: whether to model how much columns grow.
            num_steps: rows of a piece; by default those of the longest series, up to 64.
            schema: the columns of the table, and how it is written; found out if None.
            until: the share of rows, in the order of their times, that mean and standard deviation are of.

        Raises:
            ValueError: when there is no such column, times are missing or occur twice in a series, no column holds
                numbers, or a column never changes.
        """
        source = open_source(table, **({} if schema is None else _dialect_options(schema)))
        for name, what in ((time, "time"), (series, "series"), *((name, "columns") for name in columns)):
            if name is not None and name not in source.names:
                raise ValueError(f"{what}: {source.where} has no column {name!r}. It has {quoted(source.names, 12)}.")
        if time == series or {time, series} & {*columns}:
            raise ValueError("time, series and columns must name different columns.")
        if num_steps is not None and num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, got {num_steps}.")
        found = _schema_of(source, time, series, columns) if schema is None else schema
        unfit = [c.name for c in found.columns if c.name in columns and not _is_number(c)]
        if unfit:
            raise ValueError(f"columns: the schema has {unfit[0]!r}, which holds no numbers. Change its kind to Real.")
        kept: list[Column] = [c for c in found.columns if c.name == time and (isinstance(c, Time) or _is_number(c))]
        if not kept:
            raise ValueError(f"time: the schema has no column {time!r} of times or numbers. Change its kind.")
        kept += [c for c in found.columns if _is_number(c) and c.name not in (time, series)]
        if columns:
            kept = [kept[0]] + [next(c for c in kept if c.name == name) for name in columns]
        if len(kept) == 1:
            others = ", ".join(f"{c.name!r} is {c.kind}" for c in found.columns if c.name not in (time, series))
            raise ValueError(
                f"{source.where} has no column of numbers beside the times {time!r}: {others or 'none is left'}. Name "
                "those that shall be read as numbers by columns."
            )
        made = cls(Schema(kept, found.dialect), time, series, num_steps=num_steps or _MAX_STEPS)
        raw = made.steps(table)
        left_out = [f"{c.name!r} ({c.kind})" for c in found.columns if c not in kept and c.name != series]
        if left_out and not columns:
            warn(f"columns that hold no numbers are left out: {', '.join(left_out)}. Name those to model by columns.")
        threshold = np.quantile(raw.times, until, method="lower")
        first = raw.levels[raw.times <= threshold]
        logarithmic = tuple(bool(growth and np.nanmin(level) > 0) for level in first.T)
        made = dataclasses.replace(made, growth=growth, logarithmic=logarithmic)
        steps = made.steps(table)
        values = steps.x[(steps.times <= threshold) & ~np.isnan(steps.x).any(1)]
        if len(values) < 2:
            raise ValueError(
                f"{source.where} has {len(values)} complete rows to train on, too few. Rows with an empty cell are "
                "missing steps: fill them in, or choose columns without gaps by columns."
            )
        loc, scale = values.mean(0), values.std(0)
        still = ~((scale > 1e-9 * np.abs(loc)) & (np.nanstd(first, axis=0) > 0))  # beyond rounding
        if still.any():
            what = "grows always alike" if growth and np.nanstd(first[:, still.argmax()]) > 0 else "never changes"
            raise ValueError(f"column {made.names[still.argmax()]!r} {what} in the training rows. Leave it out.")
        longest = int(np.bincount(steps.series).max())
        return dataclasses.replace(
            made,
            loc=tuple(map(float, loc)),
            scale=tuple(map(float, scale)),
            num_steps=num_steps or max(2, min(_MAX_STEPS, longest)),
        )

    @property
    def names(self) -> list[str]:
        """The names of the columns that are modelled."""
        return [column.name for column in self._columns]

    @property
    def _columns(self) -> list[Any]:
        return [column for column in self.schema.modelled if column.name != self.time]

    def steps(self, table: Any) -> Steps:
        """Returns the steps of a table; those of growth begin with the second row of a series.

        Raises:
            ValueError: when columns lack, a time is missing or occurs twice in a series, or a cell does not fit.
        """
        source = open_source(table, **_dialect_options(self.schema))
        times, levels, labels = self._read(source)
        names = sorted(set(labels))
        which = np.searchsorted(names, labels)
        order = np.lexsort((times, which))
        times, levels, which = times[order], levels[order], which[order]
        twice = (np.diff(times) == 0) & (np.diff(which) == 0)
        if twice.any():
            i = int(twice.argmax())
            a, b = sorted((order[i] + 1, order[i + 1] + 1))
            advice = (
                "Remove one" if self.series else "Remove one, or give the column that tells the series apart as series"
            )
            of = f" of the series {names[which[i]]!r}" if self.series else ""
            raise ValueError(f"{source.where}: rows {a:,} and {b:,}{of} have the same {self.time!r}. {advice}.")
        values = self._within_steps(levels, times)
        rows = order + 1
        if self.growth:
            values, later = self._growth(values, levels, which, rows, source.where)
            times, levels, which, rows = times[later], levels[later], which[later], rows[later]
        values[np.isnan(values).any(1)] = np.nan
        if self.loc:
            values = (values - np.array(self.loc)) / np.array(self.scale)
        return Steps(values, levels, times, rows, which, names)

    def pieces(self, steps: Steps, chosen: np.ndarray | None = None, overlap: int = 0) -> tuple[Tensor, Tensor]:
        """Returns steps as pieces of sequences, which hold steps of one series each, and where these are in `steps`.

        Pieces without a step that is observed are left out.

        Args:
            steps: those of :meth:`steps`.
            chosen: which of them, ``(steps,)``; None for all.
            overlap: how many of its first steps a piece has in common with the piece before it.

        Returns:
            Values, ``(pieces, num_steps, columns)``, float32, NaN where a step is missing and after the end; places,
            ``(pieces, num_steps)``, -1 after the end.
        """
        pieces = []
        for name in range(len(steps.names)):
            of = steps.series == name
            places = np.flatnonzero(of if chosen is None else of & chosen)
            starts = range(0, max(len(places) - overlap, min(1, len(places))), self.num_steps - overlap)
            pieces += [places[i : i + self.num_steps] for i in starts]
        index = torch.full((len(pieces), self.num_steps), -1)
        for i, places in enumerate(pieces):
            index[i, : len(places)] = torch.from_numpy(places)
        values = torch.from_numpy(steps.x).float() if len(steps.x) else torch.empty(1, len(self.names))
        x = torch.where((index >= 0).unsqueeze(-1), values[index.clamp_min(0)], torch.nan)
        some = ~x.isnan().flatten(1).all(1)
        return x[some], index[some]

    def last(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Returns rows of each series as :meth:`pieces` does: the last one without an empty cell, and those before it.

        There are `num_steps` of them at most. A series without such a row is left out.
        """
        places = np.arange(len(steps.x))
        complete = ~np.isnan(steps.x).any(1)
        ends = np.full(len(steps.names), -1)
        np.maximum.at(ends, steps.series[complete], places[complete])
        behind = ends[steps.series] - places
        return self.pieces(steps, (behind >= 0) & (behind < self.num_steps))

    def gaps(self, steps: Steps) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the missing steps between others: those of a window that ends in an observed step, and those hidden.

        A window has `num_steps` steps of one series, or all if there are fewer, with the gap about in its middle. Gaps
        at the end of a series, and those of more than half a window, are left out.
        """
        hidden, found = np.isnan(steps.x).any(1), []
        for number in range(len(steps.names)):
            (of,) = np.nonzero(steps.series == number)
            start, stop = of[0], of[-1] + 1
            edges = np.flatnonzero(np.diff(np.concatenate([[0], hidden[start:stop].astype(int), [0]]))) + start
            for first, after in edges.reshape(-1, 2):
                if after == stop or after - first > self.num_steps // 2:
                    continue
                seen = np.flatnonzero(~hidden[after : min(stop, first + self.num_steps // 2 + 1)])
                end = after + seen.max() + 1
                found.append((np.arange(max(start, end - self.num_steps), end), np.arange(first, after)))
        return found

    def last_known(self, steps: Steps, places: np.ndarray) -> np.ndarray:
        """Returns the last row of the series of each place in which all levels are known, there or later.

        A level after an empty cell is known, while its growth is not.
        """
        known = ~np.isnan(steps.levels).any(1)
        ends = places.copy()
        for i, place in enumerate(places):
            later = np.flatnonzero(known[place:] & (steps.series[place:] == steps.series[place]))
            ends[i] = place + (later.max() if len(later) else 0)
        return ends

    def levels(self, x: Tensor, last: np.ndarray | None = None) -> np.ndarray:
        """Returns sequences in the units of the table; of growth the levels that follow some rows.

        Levels outside the range of their column, such as counts below 0, become the end of the range.

        Args:
            x: sequences, ``(..., steps, columns)``.
            last: the levels of the rows before, ``(..., columns)``, broadcast; None for how much columns grow.
        """
        values = x.double().cpu().numpy() * np.array(self.scale) + np.array(self.loc)
        if self.growth and last is not None:
            total = values.cumsum(-2)
            before = np.expand_dims(last, -2)
            log = np.array(self.logarithmic)
            values = np.where(log, before * np.exp(np.where(log, total, 0.0)), before + total)
        elif self.growth:
            return values
        return np.clip(values, *self._ranges())

    def table(self, levels: np.ndarray, **others: Any) -> "pa.Table":
        """Returns levels, ``(rows, columns)``, as a table, rounded as the columns are, after other columns."""
        import pyarrow as pa

        decoded = [
            column.decode(level - getattr(column, "origin", 0.0))
            for column, level in zip(self._columns, levels.T, strict=True)
        ]
        return pa.table([*others.values(), *decoded], names=[*others, *self.names])

    def write_filled(self, table: Any, steps: Steps, levels: np.ndarray, path: Path) -> None:
        """Writes a table with empty cells filled, and every other cell as it is there, also of other columns.

        Args:
            table: what the steps were read from.
            steps: all rows of the table, not those of growth.
            levels: of all steps, NaN where a cell stays empty.
            path: a text or Parquet file.
        """
        source = open_source(table, **_dialect_options(self.schema))
        known = {column.name for column in self.schema.columns}
        others = [Identifier(name) for name in source.names if name not in known]
        schema = Schema([*self.schema.columns, *others], self.schema.dialect)
        x = np.zeros((len(steps.rows), len(schema.modelled)))  # NaN where a cell is empty; other values do not matter
        filled = x.copy()
        for c, column in enumerate(self._columns):
            place = steps.rows - 1, schema.names.index(column.name)
            x[place], filled[place] = steps.levels[:, c], levels[:, c] - getattr(column, "origin", 0.0)
        schema.write_filled(torch.from_numpy(filled), torch.from_numpy(x), table, path)

    def number_text(self, column: int, value: float, digits: int = 7) -> str:
        """Returns a level of a column as text, with so many digits of the standard deviation and all before these."""
        scale = self.scale[column] * (abs(value) if self.logarithmic and self.logarithmic[column] else 1.0)
        before = math.ceil(math.log10(abs(value) / scale)) if value and math.isfinite(value) else 0
        return f"{value:.{min(17, digits + max(0, before))}g}"

    def times_text(self, times: np.ndarray) -> list[str | None]:
        """Returns times as they are written in the table."""
        column: Any = self.schema.columns[0]
        own = times - (column.origin if isinstance(column, Continuous) else 0.0)
        return column.text(column.decode(own))

    def times_after(self, steps: Steps, place: int, num_steps: int) -> list[str]:
        """Returns the times that follow a step, as they are written in the table.

        They go on with the rhythm of the series until there: at the same place of each month, on weekdays, or at the
        usual distance. They are empty where nine in ten distances are not alike; of numbers, where not all are.

        Args:
            steps: those of :meth:`steps`.
            place: the number of the step there.
            num_steps: how many times follow.
        """
        own = steps.times[: place + 1][steps.series[: place + 1] == steps.series[place]]
        column: Any = self.schema.columns[0]
        coming = times_after(column.instants(own) if isinstance(column, Time) else own, num_steps)
        if coming is None:
            return [""] * num_steps
        texts = self.times_text(column.since_origin(coming) if isinstance(column, Time) else coming)
        return [text or "" for text in texts]

    def describe(self, steps: Steps) -> str:
        """Returns in words what the steps of a table are."""
        missing = int(np.isnan(steps.x).any(1).sum())
        many = f"{len(steps.names):,} series" if self.series else "one series"
        start, end = self.times_text(np.array([steps.times.min(), steps.times.max()]))
        lines = [f"{many} of {len(steps.x):,} rows, {self.time} from {start} to {end}; pieces of {self.num_steps} rows"]
        kinds = [
            f"{name} ({'change of the logarithm' if log else 'change' if self.growth else 'level'})"
            for name, log in zip(self.names, self.logarithmic, strict=True)
        ]
        lines.append(f"columns in units of their standard deviation: {', '.join(kinds)}")
        wandering = [] if self.growth else self._wandering(steps)
        if wandering:
            lines.append(f"wanders, so that its changes may be easier to model, with growth: {', '.join(wandering)}")
        if missing:
            lines.append(f"{missing:,} rows with an empty cell are missing steps")
        gaps = np.diff(steps.times)[np.diff(steps.series) == 0]
        if len(gaps) and gaps.min() < gaps.max() and isinstance(self.schema.columns[0], Time):
            usual = float(np.median(gaps))
            alike, unit = int((gaps == usual).sum()), self.schema.columns[0].unit + ("s" if usual != 1 else "")
            lines.append(
                f"rows are the steps: {alike:,} of {len(gaps):,} are {usual:g} {unit} after the row before, the others "
                f"up to {gaps.max():g}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments, as JSON holds them."""
        entries: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()} | {
            "schema": self.schema.to_yaml()
        }

    @classmethod
    def from_dict(cls, entries: Any) -> "TimeSeries":
        """Returns what :meth:`to_dict` described; raises a ValueError that says what is wrong with the entries."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(entries, dict) or entries.keys() != {*names}:
            raise ValueError(f"time series must have the entries {', '.join(names)}.")
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in entries.items()}
        values["schema"] = Schema.from_yaml(values["schema"])
        made = cls(**values)
        if not len(made.loc) == len(made.scale) == len(made.logarithmic) == len(made.names):
            raise ValueError("loc, scale and logarithmic must have an entry for each column.")
        return made

    def _wandering(self, steps: Steps) -> list[str]:
        """Returns the columns that change from row to row by little of their spread."""
        same = np.diff(steps.series) == 0
        changes, spread = np.diff(steps.x, axis=0)[same], np.nanstd(steps.x, axis=0)
        return [name for name, c, s in zip(self.names, changes.T, spread, strict=True) if np.nanstd(c) < _LITTLE * s]

    def _ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the smallest and the largest number that each column may have."""
        low = [0.0 if isinstance(c, Count | Positive) else getattr(c, "low", -math.inf) for c in self._columns]
        high = [getattr(c, "high", None) for c in self._columns]
        return np.array(low), np.array([math.inf if h is None else h for h in high])

    def _read(self, source: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the times, the levels of the columns, and the names of the series of all rows."""
        import pyarrow as pa

        needed = [column.name for column in self.schema.modelled]
        lacking = [name for name in (*needed, self.series) if name is not None and name not in source.names]
        if lacking:
            raise ValueError(f"{source.where} lacks {quoted(lacking)}. It has {quoted(source.names, 12)}.")
        whole = pa.Table.from_batches(list(source.batches()))
        if not len(whole):
            raise ValueError(f"{source.where} has no row.")
        labels = np.array([""] * len(whole), dtype=object)
        if self.series is not None:
            labels = np.array([None if v is None else str(v) for v in whole.column(self.series).to_pylist()], object)
            unnamed = np.array([label is None for label in labels])
            if unnamed.any():
                raise ValueError(
                    f"{source.where}: column {self.series!r}, row {int(unnamed.argmax()) + 1:,}: is empty."
                )
        encoded = torch.empty(len(whole), len(needed), dtype=torch.float64)
        part = open_source(whole.select(needed), missing=self.schema.dialect.missing)
        part.where = source.where
        self.schema.encode_into(encoded, part)
        origins = [getattr(column, "origin", 0.0) for column in self.schema.modelled]
        own = encoded.numpy() + np.array([origin if isinstance(origin, float | int) else 0.0 for origin in origins])
        times = own[:, needed.index(self.time)]
        absent = np.isnan(times)
        if absent.any():
            raise ValueError(f"{source.where}: column {self.time!r}, row {int(absent.argmax()) + 1:,}: has no time.")
        return times, own[:, [i for i, name in enumerate(needed) if name != self.time]], labels

    def _within_steps(self, levels: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Returns levels moved within the steps to which they are rounded."""
        moved = levels.copy()
        for i, column in enumerate(self._columns):
            step = 1.0 if isinstance(column, Count) else column.step
            if step is not None:
                moved[:, i] += step * (_uniform(times, levels[:, i], i) - 0.5)
        return moved

    def _growth(
        self, values: np.ndarray, levels: np.ndarray, which: np.ndarray, rows: np.ndarray, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns how much the values grow from a row to the next of its series, and the rows to which they grow."""
        for i, is_log in enumerate(self.logarithmic):
            wrong = is_log & ~(levels[:, i] > 0) & ~np.isnan(levels[:, i])
            if wrong.any():
                raise ValueError(
                    f"{where}: column {self.names[i]!r}, row {rows[wrong.argmax()]:,}: is "
                    f"{levels[wrong.argmax(), i]:g}, and its growth is that of its logarithm. Train without growth."
                )
        log = np.array(self.logarithmic or (False,) * values.shape[1])
        scaled = np.where(log, np.log(np.where(log, values, 1.0)), values)
        later = np.flatnonzero(np.diff(which) == 0) + 1
        return scaled[later] - scaled[later - 1], later


def load_series(
    path: str | Path,
    time_series: TimeSeries | None = None,
    *,
    time: str | None = None,
    series: str | None = None,
    columns: Sequence[str] = (),
    growth: bool = False,
    num_steps: int | None = None,
    schema: Schema | None = None,
) -> Splits:
    """Loads a table whose rows are steps of time as splits of pieces of sequences.

    The rows are split by their times: the first 8/10 to train on, the next tenth to validate, the last to test. A piece
    holds rows of one series and of one part.

    Args:
        path: a table (.csv, .tsv, .parquet, .xlsx, or another text file).
        time_series: how rows become steps; found out from `time` and the other arguments if None.
        time: the name of the column of times.
        series: the name of the column that names the series of a row; None for a single one.
        columns: names of the columns to model; all that hold numbers by default.
        growth: whether to model how much columns grow from row to row.
        num_steps: rows of a piece, at most.
        schema: the columns of the file, and how it is written; found out if None.

    Returns:
        The splits, with ``splits.time_series``. x has shape ``(pieces, num_steps, columns)``, NaN where a step is
        missing; ``split.rows`` is the row of the file in which a piece begins.

    Raises:
        ValueError: when there is no such column, times are missing or occur twice, or a part has no row.
    """
    if time_series is None:
        if time is None:
            raise ValueError("time must name the column of times.")
        time_series = TimeSeries.of(
            path, time, series, columns, growth=growth, num_steps=num_steps, schema=schema, until=_TRAINING
        )
    steps = time_series.steps(path)
    first, second = np.quantile(steps.times, (_TRAINING, _VALIDATION), method="lower")
    parts = []
    for name, chosen in (
        ("training", steps.times <= first),
        ("validation", (steps.times > first) & (steps.times <= second)),
        ("test", steps.times > second),
    ):
        x, places = time_series.pieces(steps, chosen)
        if not len(x):
            raise ValueError(f"{path} has no complete row for the {name} part: {len(steps.x)} rows are too few.")
        parts.append(Split(x, None, torch.from_numpy(steps.rows)[places[:, 0]]))
    _warn_of_repeats(time_series, steps)
    return Splits(*parts, time_series=time_series)


def _warn_of_repeats(series: TimeSeries, steps: Steps) -> None:
    """Warns of columns without a step whose values are often those of the row before."""
    same = np.diff(steps.series) == 0
    for column, levels in zip(series._columns, steps.levels.T, strict=True):
        share = float((np.diff(levels)[same] == 0).mean()) if same.any() else 0.0
        if share > _OFTEN and isinstance(column, Continuous) and column.step is None:
            warn(
                f"column {column.name!r} repeats the number of the row before in {share:.0%} of the rows, which no "
                "density describes: log p may grow without bound. Leave the column out, or the rows in which nothing "
                "was measured."
            )


def _schema_of(source: Any, time: str, series: str | None, columns: Sequence[str]) -> Schema:
    """Returns the schema of a source, with the times as times or numbers, and named columns as numbers."""
    overrides: dict[str, Any] = {}
    for _ in range(2):
        found = Schema.infer(source, overrides)
        if not columns:  # small counts have few levels, and are numbers all the same
            counts = {c.name: "Count" for c in found.columns if c.name not in (time, series) and _holds_counts(c)}
            found = Schema.infer(source, overrides | counts) if counts else found
        for column in found.columns:
            ordered = isinstance(column, Time) or _is_number(column)
            if (column.name == time and not ordered) or (column.name in columns and not _is_number(column)):
                _check_no_words(column, source.where, "time" if column.name == time else "columns")
                if column.name in overrides:
                    what = "times" if column.name == time else "numbers"
                    raise ValueError(f"{source.where}: column {column.name!r} holds no {what}.")
                overrides[column.name] = "Count" if column.name != time and _holds_counts(column) else "Real"
        if not overrides:
            break
    return found


def _check_no_words(column: Column, where: str, argument: str) -> None:
    """Raises a ValueError if no cell of a column of text is a number."""
    if isinstance(column, Identifier):
        words = not column.numbers
        example = ""
    else:
        levels = column.levels if isinstance(column, Discrete) else ()
        words = bool(levels) and not any(_is_written_number(level) for level in levels)
        example = f", such as {levels[0]!r}" if levels else ""
    if not words:
        return
    if argument == "time":
        raise ValueError(
            f"time: column {column.name!r} of {where} holds words{example}, and no times or numbers. Write dates as "
            "2024-01-31, of months their first day."
        )
    raise ValueError(
        f"columns: column {column.name!r} of {where} holds words{example}, and no numbers. Write two words as 0 and 1."
    )


def _is_written_number(level: Any) -> bool:
    try:
        float(str(level).replace(",", "."))
    except ValueError:
        return False
    return True


def _holds_counts(column: Column) -> bool:
    """Whether a column of levels has numbers from 0 alone, such as few counts, or 0 and 1."""
    levels = getattr(column, "levels", ())
    return bool(levels) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 and v == int(v) for v in levels
    )


def _is_number(column: Column) -> bool:
    return isinstance(column, Modelled) and isinstance(column, Continuous | Count)


def _dialect_options(schema: Schema) -> dict[str, Any]:
    """Returns how numbers and missing cells are written, which a file does not tell by itself."""
    known = schema.dialect
    options: dict[str, Any] = {} if known.header else {"header": False}
    return options | {"decimal": known.decimal, "thousands": known.thousands, "missing": known.missing}


def _uniform(times: np.ndarray, values: np.ndarray, column: int) -> np.ndarray:
    """Returns numbers between 0 and 1 that look random and depend on a time, a value and the number of a column."""
    bits = times.astype(np.float64).view(np.uint64) ^ np.uint64(0x9E3779B97F4A7C15 * (column + 1) % 2**64)
    for more in (np.nan_to_num(values).astype(np.float64).view(np.uint64), np.uint64(0)):
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = (bits ^ (bits >> np.uint64(31))) ^ more
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53
