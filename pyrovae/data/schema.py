"""The schema of a table: its columns in the order of the file, and how the file is written."""

import csv
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pyrovae.data.cells import CellError, as_numbers, is_text, to_arrow
from pyrovae.data.columns import Column, Constant, Continuous, Count, Discrete, LeftOut, Modelled, Time
from pyrovae.data.kinds import Override, column_of, decimal_signs
from pyrovae.data.reading import Dialect, Source, TextFile, as_table, open_source
from pyrovae.data.summaries import Summary
from pyrovae.documents import read_yaml

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Schema"]

_RATINGS = {"user", "item", "rating"}


class Schema:
    """The columns of a table: what they hold, and how their cells become one tensor and back.

    Args:
        columns: all columns, in the order of the file.
        dialect: how the file is written.
        notes: what was found out about the file, one line each; not a part of the schema that is written.
        context: names of columns that a model conditions on; it models the others given these.

    Raises:
        ValueError: when no column can be modelled, names occur twice, or the context names a column that is left out.

    >>> from pyrovae.data.columns import Category, Constant, Real
    >>> schema = Schema([Real("age", 40, 10, step=1, decimals=0), Constant("year", value=1994),
    ...                  Category("city", ("Bern", "Graz", "Ulm"))])
    >>> schema.names
    ['age', 'city']
    >>> x = schema.encode({"city": ["Ulm", None], "age": [39, 50]})
    >>> x
    tensor([[39.,  2.],
            [50., nan]])
    >>> schema.decode(x).to_pylist()[0]
    {'age': 39, 'year': 1994, 'city': 'Ulm'}
    """

    def __init__(
        self,
        columns: Sequence[Column],
        dialect: Dialect | None = None,
        notes: Sequence[str] = (),
        context: Sequence[str] = (),
    ):
        self.columns, self.dialect, self.notes = tuple(columns), dialect or Dialect(), tuple(notes)
        for column in self.columns:
            if not isinstance(column, Column):
                raise TypeError(f"columns must hold columns, such as data.Real('age', 40, 10), got {column!r}.")
        seen: set[str] = set()
        for name in (column.name for column in self.columns):
            if name in seen:
                raise ValueError(f"columns: the name {name!r} occurs twice. Give each column a name of its own.")
            seen.add(name)
        known = [column for column in self.columns if isinstance(column, Modelled)]
        if not known:
            raise ValueError("columns: none can be modelled, because all are constant or name the rows.")
        for name in context:
            if name not in [column.name for column in known]:
                why = "is left out" if name in seen else "is not there"
                others = quoted([column.name for column in known], 12)
                raise ValueError(f"context: column {name!r} {why}. Name some of {others}.")
        if len({*context}) == len(known):
            raise ValueError("context: all columns are in it, so that none is left to model. Name fewer.")
        self.context = tuple(column for column in known if column.name in context)
        self.modelled = tuple(column for column in known if column.name not in context)

    def __repr__(self) -> str:
        context = [column.name for column in self.context]
        return f"Schema({list(self.columns)!r}{f', context={context!r}' if context else ''})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and (self.columns, self.dialect, self.context) == (
            other.columns,
            other.dialect,
            other.context,
        )

    __hash__ = None  # type: ignore[assignment]

    def given(self, context: Sequence[str]) -> "Schema":
        """Returns the schema of models that condition on some columns.

        Args:
            context: names of these columns; others are modelled, also those that were in the context before.

        Raises:
            ValueError: when there is no such column, it is left out, or no other is left.

        >>> schema = Schema.infer({"city": ["Ulm", "Bern", "Ulm"], "age": [39, 50, 41]}).given(["city"])
        >>> schema.names
        ['age']
        >>> schema.encode_context({"city": ["Ulm", None]})
        tensor([[1.],
                [nan]])
        """
        return Schema(self.columns, self.dialect, self.notes, context)

    @property
    def names(self) -> list[str]:
        """The names of the columns of the tensor."""
        return [column.name for column in self.modelled]

    @property
    def context_names(self) -> list[str]:
        """The names of the columns that models condition on."""
        return [column.name for column in self.context]

    @staticmethod
    def infer(
        source: Any,
        overrides: Mapping[str, Override] | None = None,
        rows: np.ndarray | Tensor | None = None,
        **options: Any,
    ) -> "Schema":
        """Returns the schema of a file or a table, found out from its cells.

        Kinds, levels, ranges, steps and formats are those of all rows; locations, scales, spikes and shares of missing
        cells are those of the training rows.

        Args:
            source: as for :class:`Table`.
            overrides: for names of columns the kind, as ``"Category"``; fields, as ``{"kind": "Time", "format":
                "%d/%m/%Y"}``; or the column itself. The rest is found out.
            rows: the training rows, counted from 0; None for all.
            **options: fields of the :class:`Dialect` that are known.

        Raises:
            ValueError: when cells are ambiguous, of several formats or infinite, or no column can be modelled.

        >>> schema = Schema.infer({"size": ["S", "L", "S", "M"], "price": ["3.50", "2.99", "", "4.00"]})
        >>> print(schema.describe())
        column  kind      missing  values
        size    Category           3 levels: L, M, S
        price   Bounded      25 %  0 or more, 3.4967 +- 0.408, in steps of 0.01
        """
        source = open_source(source, **options)
        overrides = dict(overrides or {})
        unknown = [name for name in overrides if name not in source.names]
        if unknown:
            raise ValueError(
                f"overrides: there is no column {unknown[0]!r} in {source.where}: {quoted(source.names, 12)}."
            )
        try:
            summaries, notes = _summarize(source, rows), []
            if not {"decimal", "thousands"} & options.keys():
                signs = decimal_signs([s for s in summaries if s.name not in overrides])
                if signs != (".", ""):
                    source.dialect = dataclasses.replace(source.dialect, decimal=signs[0], thousands=signs[1])
                    notes.append(f"numbers are written with the decimal sign {signs[0]!r}")
                    notes[-1] += f" and the separator of thousands {signs[1]!r}" if signs[1] else ""
                    summaries = _summarize(source, rows)
            if summaries[0].rows == 0:
                raise ValueError("there is no row.")
            source.num_rows = summaries[0].rows
            columns = []
            for summary in summaries:
                column, found = column_of(summary, overrides.get(summary.name))
                columns.append(column)
                notes += found
            texts = [text for text, _ in source.missing_seen.most_common()]
            if texts:
                counted = ", ".join(f"{text!r} ({source.missing_seen[text]:,})" for text in texts)
                notes.insert(0, f"missing cells are written {counted}")
                missing = tuple(dict.fromkeys([texts[0], *source.dialect.missing]))
                source.dialect = dataclasses.replace(source.dialect, missing=missing)
            if {re.sub("_?ids?$", "", name.lower()) for name in source.names} >= _RATINGS:
                notes.append("if rows are ratings of items by users, data.load_ratings reads them for recommendation")
            return Schema(columns, source.dialect, [*source.notes, *notes])
        except ValueError as error:
            raise ValueError(f"{source.where}: {str(error).removeprefix(source.where).lstrip(':, ')}") from None

    def encode(self, frame: Any, *, first_row: int = 1) -> Tensor:
        """Returns rows as a float32 tensor, ``(rows, len(modelled))``, NaN where a cell is missing.

        Args:
            frame: a table of pandas, polars or pyarrow, or a dict of columns; columns may be in any order, and those
                that are left out may lack. Text is read as in the file: numbers, and the words for missing cells.
            first_row: the number of the first row, for messages.

        Raises:
            ValueError: when columns lack or are unknown, or when a cell is not one of its column; column and row are
                named.
        """
        return self._encoded(self.modelled, frame, first_row)

    def encode_context(self, frame: Any, *, first_row: int = 1) -> Tensor:
        """Returns the cells that models condition on, ``(rows, len(context))``, as :meth:`encode` does the others."""
        return self._encoded(self.context, frame, first_row)

    def _encoded(self, columns: Sequence[Modelled], frame: Any, first_row: int) -> Tensor:
        table = as_table(frame)
        source = open_source(table, missing=self.dialect.missing)
        self.check_names(source.names, source.where, [column.name for column in columns])
        x = torch.empty(len(table), len(columns))
        self._encode_into([(columns, x)], source, first_row)
        return x

    def encode_into(self, x: Tensor, source: Source, context: Tensor | None = None) -> list[str]:
        """Encodes all rows of a source into float32 tensors, in chunks of rows; returns notes, one line each.

        Args:
            x: shape ``(rows, len(modelled))``.
            source: what ``pyrovae.data.reading.open_source`` returns.
            context: for the cells that models condition on, ``(rows, len(context))``, or None.
        """
        self.check_names(source.names, source.where)
        return self._encode_into([(self.modelled, x), *([] if context is None else [(self.context, context)])], source)

    def _encode_into(
        self, tensors: Sequence[tuple[Sequence[Modelled], Tensor]], source: Source, first_row: int = 1
    ) -> list[str]:
        start = 0
        places = [(column, x.numpy()[:, i]) for columns, x in tensors for i, column in enumerate(columns)]
        constant = [c for c in self.columns if isinstance(c, Constant) and c.name in source.names]
        differs = dict.fromkeys((c.name for c in constant), 0)
        for batch in source.batches():
            for c in constant:
                differs[c.name] += c.count_others(batch.column(source.names.index(c.name)))
            for column, place in places:
                cells = batch.column(source.names.index(column.name))
                try:
                    if is_text(cells.type) and holds_numbers(column):
                        cells = self.dialect.plain_numbers(cells)
                    place[start : start + len(cells)] = column.encode(cells)
                except CellError as error:
                    row = first_row + start + error.index
                    raise ValueError(f"{source.where}: column {column.name!r}, row {row:,}: {error.problem}.") from None
            start += batch.num_rows
        return [
            f"column {c.name!r} is left out, as in training, but {differs[c.name]:,} rows do not hold {c.value!r}"
            for c in constant
            if differs[c.name]
        ]

    def decode(self, x: Tensor, context: Tensor | None = None) -> "pa.Table":
        """Returns a pyarrow table with all columns of the file: numbers, text and times, null where x is NaN.

        ``.to_pandas()`` and ``polars.from_arrow`` turn it into other tables; :meth:`write` writes it as the file is
        written.

        Columns that are left out are not in x, and are not restored: a constant has its value in the training data,
        identifiers are numbered from 1 if they were numbers, and else null. :meth:`write_filled` keeps those of a file.

        Args:
            x: shape ``(rows, len(modelled))``.
            context: the cells that the model conditions on, ``(rows, len(context))``; None where there are none.
        """
        import pyarrow as pa

        if x.dim() != 2 or x.shape[1] != len(self.modelled):
            raise ValueError(f"x must have shape (rows, {len(self.modelled)}), got {tuple(x.shape)}.")
        given = () if context is None else tuple(context.shape)
        if given != ((len(x), len(self.context)) if self.context else ()):
            names = f"the encoded cells of {quoted(self.context_names)}" if self.context else "left out"
            raise ValueError(f"context must be {names}, one row for each of the {len(x)} of x, got shape {given}.")
        encoded = dict(zip(self.names, x.T, strict=True))
        if context is not None:
            encoded |= dict(zip(self.context_names, context.T, strict=True))
        cells = []
        for column in self.columns:
            if isinstance(column, Modelled):
                cells.append(column.decode(encoded[column.name]))
            elif isinstance(column, LeftOut):
                cells.append(column.fill(len(x)))
        return pa.table(cells, names=[column.name for column in self.columns])

    def write(self, x: "Tensor | pa.Table", path: str | Path, context: Tensor | None = None) -> None:
        """Writes rows to a text file as the file of the training data is written, or to a Parquet file.

        Args:
            x: encoded rows, or a decoded table.
            path: a file, replaced if it exists; with the suffix .parquet for Parquet, else text.
            context: as for :meth:`decode`.

        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> schema = Schema.infer({"price": ["3.50", "2.99", "", "4.00"]})
        >>> schema.write(torch.tensor([[3.0], [float("nan")], [2.25]]), path)
        >>> path.read_text().splitlines()
        ['price', '3.00', '""', '2.25']
        """
        table = self.decode(x, context) if isinstance(x, Tensor) else x
        path = Path(path)
        if path.suffix.lower() in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            pq.write_table(table, path)
            return
        delimiter = "\t" if path.suffix.lower() == ".tsv" else self.dialect.delimiter
        with open(path, "w", encoding=self.dialect.encoding, newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            if self.dialect.header:
                writer.writerow(table.column_names)
            writer.writerows(zip(*(self._written(column, table[column.name]) for column in self.columns), strict=True))

    def write_filled(self, filled: Tensor, x: Tensor, source: Any, path: str | Path) -> None:
        """Writes a table with missing cells filled, and every other cell as it is in the table.

        The columns are those of the source, in its order, also those that are left out. A text file keeps the text of
        each cell that is not filled.

        Args:
            filled: encoded rows, ``(rows, len(modelled))``; only cells that are missing in `x` are taken from it.
            x: the encoded rows of the source, NaN where a cell is missing.
            source: as for :class:`Table`, or the ``source`` of one.
            path: a file, replaced if it exists; with the suffix .parquet for Parquet, else text.

        >>> import tempfile
        >>> from pyrovae.data import Identifier, Real
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> schema = Schema([Identifier("id"), Real("price", 3, 1, decimals=2)])
        >>> source = {"id": ["7b", "9a"], "price": ["3.5", ""]}
        >>> x = schema.encode(source)
        >>> schema.write_filled(torch.tensor([[0.0], [2.25]]), x, source, path)
        >>> path.read_text().splitlines()
        ['id,price', '7b,3.5', '9a,2.25']
        """
        if filled.shape != x.shape or x.dim() != 2 or x.shape[1] != len(self.modelled):
            raise ValueError(
                f"filled and x must have shape (rows, {len(self.modelled)}), got {tuple(filled.shape)} and "
                f"{tuple(x.shape)}."
            )
        known, path = self.dialect, Path(path)
        options: dict[str, Any] = {} if known.header else {"header": False}
        options |= {"decimal": known.decimal, "thousands": known.thousands, "missing": known.missing}
        source = open_source(source, **options)
        self.check_names(source.names, source.where)
        parts = self._filled_batches(filled, x, source)
        if path.suffix.lower() in (".parquet", ".pq"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            chunks = [[self._typed(*cells) for cells in part] for part in parts]
            columns = [pa.concat_arrays(_of_one_type(pieces)) for pieces in zip(*chunks, strict=True)]
            pq.write_table(pa.table(columns, names=source.names), path)
            return
        dialect = source.dialect if isinstance(source, TextFile) else self.dialect
        delimiter = "\t" if path.suffix.lower() == ".tsv" else dialect.delimiter
        with open(path, "w", encoding=dialect.encoding, newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            if dialect.header:
                writer.writerow(source.names)
            for part in parts:
                writer.writerows(zip(*(self._texts(*cells) for cells in part), strict=True))

    def _filled_batches(
        self, filled: Tensor, x: Tensor, source: Source
    ) -> "Iterator[list[tuple[Column, pa.Array, pa.Array | None, np.ndarray]]]":
        """Yields for each batch of rows and each column of a source: the column, its cells, values, where to fill."""
        columns = {column.name: column for column in self.columns}
        at = {name: i for i, name in enumerate(self.names)}
        start = 0
        for batch in source.raw_batches():
            rows = slice(start, start + batch.num_rows)
            part = []
            for name, cells in zip(source.names, batch.columns, strict=True):
                column, values, holes = columns[name], None, np.zeros(batch.num_rows, dtype=bool)
                if isinstance(column, Modelled) and name in at:
                    holes = (x[rows, at[name]].isnan() & ~filled[rows, at[name]].isnan()).cpu().numpy()
                    values = column.decode(filled[rows, at[name]])
                part.append((column, to_arrow(cells), values, holes))
            yield part
            start += batch.num_rows

    def _texts(self, column: Column, cells: Any, values: Any, holes: np.ndarray) -> list[str]:
        """Returns cells as text: those of a text file as they are, but for the holes."""
        if is_text(cells.type):
            texts = [self.dialect.missing[0] if cell is None else cell for cell in cells.to_pylist()]
        elif isinstance(column, Time):
            texts = self._written(column, values)
        else:
            texts = [self._text_of(cell) for cell in cells.to_pylist()]
        if holes.any():
            new = self._written(column, values)
            for i in holes.nonzero()[0]:
                texts[i] = new[i]
        return texts

    def _text_of(self, cell: Any) -> str:
        if cell is None or cell != cell:
            return self.dialect.missing[0]
        if isinstance(cell, float):
            text = str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else repr(cell)
            return text.replace(".", self.dialect.decimal)
        return str(cell)

    def _typed(self, column: Column, cells: Any, values: Any, holes: np.ndarray) -> Any:
        """Returns cells with a type, for Parquet."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if values is None:
            return cells
        if is_text(cells.type):
            if not holds_numbers(column):
                return values  # words and times lose nothing in the tensor
            tokens = pa.array(["", *self.dialect.missing], cells.type)
            stripped = pc.utf8_trim_whitespace(cells)
            absent = pc.is_in(stripped, value_set=tokens)
            stripped = pc.if_else(absent, pa.scalar(None, cells.type), stripped)
            cells = pa.array(as_numbers(self.dialect.plain_numbers(stripped)), from_pandas=True)
            cells = pc.cast(cells, values.type, safe=False)
        if not holes.any():
            return cells
        try:
            values = pc.cast(values, cells.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # such as 2.5 among whole numbers
            cells = pc.cast(cells, values.type, safe=False)
        return pc.if_else(pa.array(holes), values, cells)

    def _written(self, column: Column, cells: Any) -> list[str]:
        text = column.text(cells)
        if self.dialect.decimal != "." and holds_numbers(column):
            text = [None if cell is None else cell.replace(".", self.dialect.decimal) for cell in text]
        return [self.dialect.missing[0] if cell is None else cell for cell in text]

    def describe(self) -> str:
        """Returns the columns with their kinds, shares of missing cells and values, as a table in 80 columns."""
        names = [column.name if len(column.name) <= 24 else column.name[:23] + "…" for column in self.columns]
        width = max(6, *map(len, names))
        lines = [f"{'column':{width}}  {'kind':10}missing  values"]
        for name, column in zip(names, self.columns, strict=True):
            missing = f"{100 * column.missing:.{3 if column.missing >= 0.01 else 2}g} %" if column.missing else ""
            line = f"{name:{width}}  {column.kind:10} {missing:>6}  {column.describe()}"
            lines.append(line if len(line) <= 80 else line[:79] + "…")
        if self.context:
            lines.append(f"context: {', '.join(self.context_names)}; the others are modelled given their cells")
        return "\n".join(lines)

    def check_names(self, names: Sequence[str], where: str = "the table", needed: Sequence[str] | None = None) -> None:
        """Raises a ValueError unless these are the columns of the schema, in any order.

        Args:
            names: names of columns.
            where: what has them.
            needed: those that may not lack; None for all that are not left out.
        """
        if needed is None:
            needed = [column.name for column in self.columns if isinstance(column, Modelled)]
        lacking = [name for name in needed if name not in names]
        known = {column.name for column in self.columns}
        unknown = [name for name in names if name not in known]
        if lacking or unknown:
            parts = [f"lacks {quoted(lacking)}"] if lacking else []
            parts += [f"has {quoted(unknown)}, which the training data did not have"] if unknown else []
            raise ValueError(
                f"{where} {' and '.join(parts)}. Give the columns of the training data, in any order: "
                f"{quoted(needed, 12)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the schema as plain dicts, lists, numbers and strings."""
        written = dataclasses.asdict(self.dialect)
        differs = {f.name: written[f.name] for f in dataclasses.fields(Dialect) if written[f.name] != f.default}
        dialect = {name: list(v) if isinstance(v, tuple) else v for name, v in differs.items()}
        columns = [column.to_dict() for column in self.columns]
        context = {"context": self.context_names} if self.context else {}
        return ({"dialect": dialect} if dialect else {}) | context | {"columns": columns}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Schema":
        """Returns the schema that :meth:`to_dict` described.

        Raises:
            ValueError: when entries lack, are unknown or do not fit.
        """
        try:
            given = content.get("dialect", {}).items()
            dialect: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
            columns = [Column.from_dict(c) for c in content["columns"]]
            return Schema(columns, Dialect(**dialect), context=tuple(content.get("context", ())))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the schema must hold a list of columns, each with a name and a kind ({error})."
            ) from None

    def to_yaml(self) -> str:
        """Returns the schema as text that a person may edit."""
        return yaml.safe_dump(
            _plain(self.to_dict()), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )

    @staticmethod
    def from_yaml(source: str | Path) -> "Schema":
        """Reads a schema from text, or from a file whose path is a ``Path``.

        Raises:
            ValueError: when it is no schema.
        """
        where = str(source) if isinstance(source, Path) else "the schema"
        try:
            content = read_yaml(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        except ValueError as error:  # of YAML and of the encoding
            raise ValueError(f"{where} is no schema: {error}") from None
        try:
            return Schema.from_dict(content if isinstance(content, dict) else {})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _summarize(source: Source, rows: np.ndarray | Tensor | None) -> list[Summary]:
    """Passes over a source once; returns what is known of its columns."""
    summaries = [Summary(name, source.dialect) for name in source.names]
    training = None
    if rows is not None:
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0 or rows.min() < 0:
            raise ValueError("rows must be the numbers of the training rows, counted from 0.")
        training = np.zeros(int(rows.max()) + 1, dtype=bool)
        training[rows] = True
    start = 0
    for batch in source.batches():
        part = None
        if training is not None:
            part = training[start : start + batch.num_rows]
            part = np.pad(part, (0, batch.num_rows - len(part)))
        for summary, cells in zip(summaries, batch.columns, strict=True):
            summary.update(cells, part)
            summary.order = tuple(source.orders.get(summary.name, ()))
        start += batch.num_rows
    if training is not None and len(training) > start:
        raise ValueError(f"rows names row {len(training) - 1:,}, but there are {start:,} rows, counted from 0.")
    return summaries


def _of_one_type(pieces: Sequence[Any]) -> list[Any]:
    """Returns chunks of a column with the type of the first that was changed, if any was."""
    import pyarrow.compute as pc

    types = {piece.type for piece in pieces}
    if len(types) == 1:
        return list(pieces)
    widest = next((t for t in types if str(t) in ("double", "string", "large_string")), pieces[0].type)
    return [pc.cast(piece, widest, safe=False) for piece in pieces]


def holds_numbers(column: Column) -> bool:
    if isinstance(column, Discrete):
        return not isinstance(column.levels[0], (str, bool))
    return isinstance(column, (Continuous, Count))


def quoted(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _plain(value: Any) -> Any:
    """Returns nested values without numpy's numbers, and whole floats of YAML as they are."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
