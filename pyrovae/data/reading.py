"""Reading tables in chunks of rows: text files (CSV, TSV, ...), Parquet, Excel, and frames of other libraries."""

import codecs
import csv
import io
import itertools
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.data.cells import CellError, is_number, is_text, to_arrow

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DELIMITERS", "Dialect", "Frame", "Parquet", "Source", "TextFile", "as_table", "is_unicode", "open_source"]

_SAMPLE = 2**18  # bytes in which the dialect is looked for
_BLOCK = 2**22  # bytes read at once
_ROWS = 2**16  # rows of other sources at once
DELIMITERS = ("\t", ";", "|", ",")  # the comma last, because it is also a decimal point
_EXCEL = (".xlsx", ".xls", ".xlsb", ".ods")
_PARQUET = (".parquet", ".pq")
_ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".h5ad")
_RAGGED = re.compile(r"(?:Row #(\d+): )?Expected (\d+) columns, got (\d+): (.*)", re.DOTALL)  # what Arrow says


@dataclass(frozen=True)
class Dialect:
    """How a text file of a table is written.

    Args:
        delimiter: what separates cells.
        decimal: the decimal point, or comma.
        thousands: what separates thousands; "" for nothing.
        encoding: the encoding of the text.
        header: whether the first line holds the names of the columns.
        missing: a text that means a missing cell, or several; an empty cell is always missing. The first is written.
    """

    delimiter: str = ","
    decimal: str = "."
    thousands: str = ""
    encoding: str = "utf-8"
    header: bool = True
    missing: tuple[str, ...] = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1:
            raise ValueError(f"delimiter must be one character, got {self.delimiter!r}.")
        if self.decimal not in (".", ",") or self.thousands == self.decimal:
            raise ValueError(
                f"decimal must be '.' or ',' and differ from thousands, got {self.decimal!r} and {self.thousands!r}. "
                "Give both."
            )
        if isinstance(self.missing, str):
            object.__setattr__(self, "missing", (self.missing,))
        if not self.missing:
            raise ValueError("missing must hold at least one text, such as ''.")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(
                f"encoding must be one that Python knows, such as cp1252, got {self.encoding!r}."
            ) from None

    @property
    def has_plain_numbers(self) -> bool:
        """Whether numbers are written with a decimal point and without separators of thousands."""
        return self.decimal == "." and not self.thousands

    def plain_numbers(self, cells: "pa.Array") -> "pa.Array":
        """Returns text that holds numbers with a decimal point and without separators of thousands.

        Raises:
            CellError: when a cell is no number as this dialect writes it.
        """
        import pyarrow.compute as pc

        if self.has_plain_numbers:
            return cells
        point, group = re.escape(self.decimal), re.escape(self.thousands)
        grouped = rf"|[0-9]{{1,3}}({group}[0-9]{{3}})+" if self.thousands else ""
        number = rf"^[+-]?([0-9]+{grouped})({point}[0-9]*)?([eE][+-]?[0-9]+)?$|^[+-]?{point}[0-9]+$"
        wrong = pc.invert(pc.fill_null(pc.match_substring_regex(cells, number), True))
        if pc.any(wrong).as_py():
            index = pc.index(wrong, True).as_py()
            signs = f"decimal {self.decimal!r}" + (f" and thousands {self.thousands!r}" if self.thousands else "")
            raise CellError(index, f"{cells[index].as_py()!r} is no number with {signs}")
        if self.thousands:
            cells = pc.replace_substring(cells, self.thousands, "")
        return pc.replace_substring(cells, ",", ".") if self.decimal == "," else cells


class Source(ABC):
    """Base of what tables are read from: names of columns, and batches of rows, as often as wanted.

    Args:
        where: the name for messages.
        names: the names of the columns.
        dialect: how the file is written; only ``missing`` matters where cells have types.
        notes: what the reader had to find out, one line each.
    """

    def __init__(self, where: str, names: Sequence[str], dialect: Dialect, notes: Sequence[str] = ()):
        self.where, self.names, self.dialect, self.notes = where, list(names), dialect, list(notes)
        self.missing_seen: Counter[str] = Counter()
        self.orders: dict[str, list[Any]] = {}  # the levels of ordered categories, once they were read
        if not self.names:
            raise ValueError(f"{where} has no columns.")
        twice = [name for name, times in Counter(self.names).items() if times > 1]
        if twice:
            raise ValueError(
                f"{where}: the name {twice[0]!r} occurs twice in the header. Give each column its own name."
            )

    def batches(self) -> Iterator["pa.RecordBatch"]:
        """Yields batches of rows. Text is stripped of spaces, and null where it means a missing cell."""
        self.missing_seen = Counter()
        for batch in self.raw_batches():
            yield self._with_nulls(batch)

    @abstractmethod
    def raw_batches(self) -> Iterator["pa.RecordBatch"]:
        """Yields batches of rows as they are in the file."""

    @cached_property
    def num_rows(self) -> int:
        """The number of rows."""
        return sum(batch.num_rows for batch in self.raw_batches())

    def _with_nulls(self, batch: "pa.RecordBatch") -> "pa.RecordBatch":
        import pyarrow as pa
        import pyarrow.compute as pc

        tokens = list(dict.fromkeys(["", *self.dialect.missing]))
        columns = []
        for name, column in zip(self.names, batch.columns, strict=True):
            if pa.types.is_dictionary(column.type) and column.type.ordered:
                levels = [v.strip() if isinstance(v, str) else v for v in column.dictionary.to_pylist()]
                levels = [v for v in levels if v not in tokens]
                # Without an order where parts of a file differ, or levels are neither words nor numbers.
                plain = len(levels) > 1 and len({type(v) for v in levels}) == 1 and type(levels[0]) in (str, int, float)
                self.orders[name] = levels if plain and self.orders.get(name, levels) == levels else []
            column = to_arrow(column)
            if is_text(column.type):
                column = pc.utf8_trim_whitespace(column)
                absent = pc.is_in(column, value_set=pa.array(tokens, column.type))
                if pc.any(absent).as_py():
                    found = pc.value_counts(column.filter(absent))
                    self.missing_seen.update({v["values"]: v["counts"] for v in found.to_pylist()})
                    column = pc.if_else(absent, pa.scalar(None, column.type), column)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, names=self.names)


class Frame(Source):
    """A table in memory."""

    def __init__(self, table: "pa.Table", where: str = "the table", dialect: Dialect | None = None):
        super().__init__(where, table.column_names, dialect or Dialect())
        self.table = table

    def raw_batches(self) -> Iterator["pa.RecordBatch"]:
        yield from self.table.to_batches(max_chunksize=_ROWS)

    @cached_property
    def num_rows(self) -> int:
        return len(self.table)


class Parquet(Source):
    """A Parquet file."""

    def __init__(self, path: Path, dialect: Dialect | None = None):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self.file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file, or is truncated ({error}).") from None
        # The index that pandas stores is no column.
        stored = [name for name in self.file.schema_arrow.names if not name.startswith("__index_level_")]
        super().__init__(str(path), stored, dialect or Dialect())

    def raw_batches(self) -> Iterator["pa.RecordBatch"]:
        yield from self.file.iter_batches(_ROWS, columns=self.names)

    @cached_property
    def num_rows(self) -> int:
        return self.file.metadata.num_rows


class TextFile(Source):
    """A text file with one line of cells for each row; gzipped or not.

    Args:
        path: the file.
        options: fields of the :class:`Dialect` that are known; the others are found out.

    Raises:
        ValueError: when the file is empty, is not in its encoding, or has a row with more or fewer cells than others.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]):
        self.path = path
        with self._open() as file:
            start = file.read(_SAMPLE + 1)
        if not bytes(start).strip():
            raise ValueError(f"{path} is empty.")
        dialect, notes = Dialect(**options), []
        if "encoding" not in options and bytes(start[:2]) in (b"\xff\xfe", b"\xfe\xff"):
            dialect = replace(dialect, encoding="utf-16")
        text = self._decode(bytes(start), dialect.encoding, whole=len(start) <= _SAMPLE)
        if "delimiter" not in options:
            dialect = replace(dialect, delimiter=_delimiter(text, path))
        if dialect.delimiter != "," and "delimiter" not in options:
            notes.append(f"cells are separated by {_NAMES.get(dialect.delimiter, dialect.delimiter)}")
        rows = _rows(text, dialect.delimiter)
        if not rows:
            raise ValueError(f"{path} holds no row.")
        self.first = [cell.strip() for cell in rows[0]]
        if "header" not in options:
            header = not any(map(is_number, self.first)) or _is_header(rows, set(dialect.missing))
            dialect = replace(dialect, header=header)
            if not header:
                notes.append("no header, because the first line holds numbers: columns are column_1, column_2, ...")
        names = self.first if dialect.header else [f"column_{i + 1}" for i in range(len(self.first))]
        super().__init__(str(path), names, dialect, notes)
        if dialect.header and "header" not in options:
            self._check_header(rows)

    def raw_batches(self) -> Iterator["pa.RecordBatch"]:
        yield from self._read(list(map(str, range(len(self.names)))))

    @cached_property
    def num_rows(self) -> int:
        return sum(batch.num_rows for batch in self._read(["0"]))

    def _read(self, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        every = list(map(str, range(len(self.names))))
        row = 0
        with self._open() as file:
            try:
                reader = arrow_csv.open_csv(
                    file,
                    arrow_csv.ReadOptions(
                        use_threads=False,  # so that a row that is refused has a number
                        block_size=_BLOCK,
                        column_names=every,
                        skip_rows_after_names=int(self.dialect.header),
                        encoding={"utf-8": "utf8"}.get(self.dialect.encoding, self.dialect.encoding),
                    ),
                    arrow_csv.ParseOptions(
                        # Without a handler of rows in Python, which a thread of Arrow may let go of at the exit.
                        delimiter=self.dialect.delimiter,
                        newlines_in_values=True,
                    ),
                    arrow_csv.ConvertOptions(
                        column_types=dict.fromkeys(every, pa.string()),
                        include_columns=columns,
                        strings_can_be_null=False,
                    ),
                )
                for batch in reader:
                    self._check_no_header(batch, row)
                    row += batch.num_rows
                    if batch.num_rows:
                        yield batch
            except (pa.ArrowInvalid, UnicodeError) as error:
                raise self._explained(error) from None

    def _explained(self, error: Exception) -> ValueError:
        ragged = _RAGGED.search(str(error))
        if ragged:
            line = "a line" if ragged[1] is None else f"line {ragged[1]}"
            return ValueError(
                f"{self.path}, {line}: {ragged[3]} cells, where {ragged[2]} are expected: {ragged[4][:60]!r}. Correct "
                f"the line; put quotes around cells that hold {self.dialect.delimiter!r}."
            )
        if "UTF8" in str(error) or isinstance(error, UnicodeError):
            with self._open() as file:  # names the line
                for number, content in enumerate(io.BytesIO(file.read()), start=1):
                    try:
                        content.decode(self.dialect.encoding)
                    except UnicodeDecodeError as bad:
                        return self._not_encoded(bad, number)
        if "truncated" in str(error).lower() or "Empty CSV" in str(error):
            return ValueError(f"{self.path} holds no row, or is truncated ({error}).")
        return ValueError(f"{self.path} cannot be read: {error}.")

    def _not_encoded(self, error: UnicodeDecodeError, line: int) -> ValueError:
        return ValueError(
            f"{self.path}, line {line}: the byte 0x{error.object[error.start]:02x} is not {self.dialect_name}. Save "
            "the file in that encoding; where a schema is made, its own can be given, for example encoding=cp1252 "
            "(Excel in Western Europe) or latin-1."
        )

    @property
    def dialect_name(self) -> str:
        """The encoding, as people write it."""
        return getattr(self, "dialect", Dialect()).encoding.upper()

    def _decode(self, start: bytes, encoding: str, whole: bool) -> str:
        try:
            return start.decode("utf-8-sig" if encoding == "utf-8" else encoding)
        except UnicodeDecodeError as error:
            if not whole and error.start > len(start) - 8:  # the sample ends within a character
                return start[: error.start].decode("utf-8-sig" if encoding == "utf-8" else encoding)
            raise self._not_encoded(error, start[: error.start].count(b"\n") + 1) from None

    def _open(self) -> Any:
        import pyarrow as pa

        return pa.input_stream(str(self.path), compression="gzip" if self.path.suffix == ".gz" else None)

    def _check_header(self, rows: list[list[str]]) -> None:
        """Refuses a first line of words that are also cells: a file without a header would lose its first row."""
        body = [[cell.strip() for cell in row] for row in rows[1:]]
        shared = [
            name for i, name in enumerate(self.first) if name and any(i < len(row) and row[i] == name for row in body)
        ]
        if 2 * len(shared) > len(self.first) and not any(row == self.first for row in body):
            raise ValueError(
                f"{self.path}: the first line may be a row of data, because {shared[0]!r} is also a cell below it. Say "
                "header=False if it is, or header=True if it holds the names of the columns."
            )

    def _check_no_header(self, batch: "pa.RecordBatch", row: int) -> None:
        """Refuses a row that repeats the header, as in files that were put together."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self.dialect.header or batch.num_columns < len(self.names):
            return
        same = pc.equal(pc.utf8_trim_whitespace(batch.column(0)), pa.scalar(self.names[0], pa.string()))
        for i in pc.indices_nonzero(same).to_pylist():
            if [str(column[i].as_py()).strip() for column in batch.columns] == self.names:
                raise ValueError(
                    f"{self.path}, row {row + i + 1:,}: the header occurs again, as in files that were put together. "
                    "Remove that line, or say header=False if the first line is a row of data."
                )


_NAMES = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", " ": "spaces"}


def open_source(source: Any, **options: Any) -> Source:
    """Returns a source of batches of rows.

    Args:
        source: the path of a text file, a Parquet or an Excel file; a table of pandas, polars or pyarrow; a dict of
            columns; or a :class:`Source`, which is returned.
        **options: fields of a :class:`Dialect` that are known.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file cannot be read.
    """
    if isinstance(source, Source):
        return source
    dialect = Dialect(**options)
    if not isinstance(source, (str, Path)):
        frame = Frame(as_table(source), dialect=dialect)
        names = [str(name) for name in getattr(getattr(source, "index", None), "names", []) if name is not None]
        if names:
            frame.notes.append(f"the index {', '.join(map(repr, names))} is left out: reset_index() makes it a column")
        return frame
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix.lower() in _ARRAYS:
        raise ValueError(f"{path} holds arrays, and no table with named columns. Take a .csv, .parquet or .xlsx file.")
    if path.suffix.lower() in _PARQUET:
        return Parquet(path, dialect)
    if path.suffix.lower() in _EXCEL:
        return Frame(_read_excel(path, dialect), str(path), dialect)
    if path.suffix.lower() == ".tsv" and "delimiter" not in options:
        options["delimiter"] = "\t"
    return TextFile(path, options)


def is_unicode(path: Path) -> bool:
    """Returns whether all of a text file is UTF-8, or begins with the mark of UTF-16."""
    import pyarrow as pa

    decoder = codecs.getincrementaldecoder("utf-8")()
    if not path.is_file() or path.suffix.lower() in (*_PARQUET, *_EXCEL, *_ARRAYS):
        return True
    with pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None) as file:
        try:
            for i, block in enumerate(iter(lambda: bytes(file.read(_BLOCK)), b"")):
                if i == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    return True
                if b"\0" in block:  # as in UTF-16 without a mark
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def as_table(frame: Any) -> "pa.Table":
    """Returns a table of pandas, polars or pyarrow, or a dict of columns, as a pyarrow table without an index."""
    import pyarrow as pa

    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    if isinstance(frame, pa.Table):
        return frame
    try:
        if isinstance(frame, Mapping):
            return pa.table({name: pa.array(column, from_pandas=True) for name, column in frame.items()})
        if type(frame).__module__.partition(".")[0] == "pandas":
            return pa.Table.from_pandas(frame, preserve_index=False)
        if hasattr(frame, "__arrow_c_stream__"):
            return pa.table(frame)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError) as error:  # sparse columns
        raise ValueError(
            f"a column of the table holds values of several types, or of one that Arrow does not know ({error}). Make "
            "them numbers, text or times."
        ) from None
    raise TypeError(
        f"a table must be a file, one of pandas, polars or pyarrow, or a dict of columns, got {type(frame).__name__}."
    )


def _read_excel(path: Path, dialect: Dialect) -> "pa.Table":
    """Reads the first sheet of an Excel file."""
    import pyarrow as pa

    try:
        from python_calamine import CalamineError, CalamineWorkbook
    except ImportError as error:
        raise ImportError("Excel files need python-calamine: pip install 'pyrovae[tables]'.") from error
    try:
        rows = CalamineWorkbook.from_path(str(path)).get_sheet_by_index(0).to_python()
    except CalamineError as error:
        raise ValueError(f"{path} is no Excel file, or is damaged ({error}).") from None
    if len(rows) < 1 + dialect.header:
        raise ValueError(f"{path}: the first sheet holds no row.")
    names = (
        [str(name).strip() for name in rows[0]] if dialect.header else [f"column_{i + 1}" for i in range(len(rows[0]))]
    )
    columns = []
    for cells in zip(*rows[dialect.header :], strict=True):
        present = [cell for cell in cells if cell != ""]
        if any(isinstance(cell, str) for cell in present):  # one type a column: all as text
            columns.append(pa.array([None if cell == "" else _cell_text(cell) for cell in cells], pa.string()))
        else:
            columns.append(pa.array([None if cell == "" else cell for cell in cells]))
    return pa.Table.from_arrays(columns, names=names)


def _cell_text(cell: Any) -> str:
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _rows(text: str, delimiter: str, most: int = 500) -> list[list[str]]:
    """Returns the first rows of a text that are complete, without empty lines."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [row for row in itertools.islice(reader, most + 1) if row]
    except csv.Error:  # a cell longer than any that is no mistake
        return []
    return rows[:-1] if len(rows) > 1 and not text.endswith("\n") and len(text) >= _SAMPLE // 4 else rows


def _delimiter(text: str, path: Path) -> str:
    """Returns the delimiter that cuts all rows into the same number of cells; the comma for a single column."""
    best, best_share = ",", 0.0
    for delimiter in DELIMITERS:
        lengths = Counter(map(len, _rows(text, delimiter)))
        width, times = lengths.most_common(1)[0] if lengths else (1, 0)
        share = times / max(1, lengths.total()) if width > 1 else 0.0
        if share > best_share:
            best, best_share = delimiter, share
    if best_share == 0 and all(len(line.split()) > 1 for line in text.splitlines()[:20] if line.strip()):
        widths = {len(line.split()) for line in text.splitlines()[:20] if line.strip()}
        if len(widths) == 1 and len(text.splitlines()) > 1:
            raise ValueError(f"{path}: cells seem to be separated by spaces. Separate them by commas or tabs.")
    return best


def _is_header(rows: list[list[str]], missing: set[str]) -> bool:
    """Returns whether a first line that holds numbers is a header all the same: a word stands above numbers only."""
    first, body = rows[0], rows[1:]
    for i, name in enumerate(first):
        below = [row[i].strip() for row in body if i < len(row) and row[i].strip() not in missing | {""}]
        if name.strip() not in missing | {""} and not is_number(name) and below and all(map(is_number, below)):
            return True
    return False
