"""Tables: files of rows with columns of several kinds, and files of numbers alone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.kinds import Override
from pyrovae.data.reading import DELIMITERS, is_unicode, open_source
from pyrovae.data.schema import Schema
from pyrovae.data.splits import Split, Splits, random_rows, split_by_tenths
from pyrovae.inference.messages import check_finite


class Table:
    """A table with its schema and its rows as one tensor.

    Files are read in chunks of rows: once for the schema and once for the tensor, which is all that stays in memory.

    Args:
        source: a text file (CSV, TSV, ..., gzipped or not), a Parquet or an Excel file (its first sheet); a table of
            pandas, polars or pyarrow; or a dict of columns.
        schema: the schema, such as that of the training data; found out from the cells if None.
        overrides: kinds of columns, as for :meth:`Schema.infer`.
        rows: the rows, counted from 0, from which locations, scales and spikes are found out; None for all.
        memory_map: a file in which the tensor is kept, for a tensor larger than the memory; it is replaced.
        context: names of columns that a model is to condition on, as :meth:`Schema.given`; those of the schema if none.
        **options: fields of the :class:`Dialect` that are known: delimiter, decimal, thousands, encoding, header and
            missing; those of the schema, if one is given.

    Attributes:
        schema: the schema.
        x: the rows, ``(len(table), len(names))``, float32, NaN where a cell is missing.
        names: the names of the columns of x.
        context: the cells that the model conditions on, ``(len(table), len(schema.context))``, as those of x; None
            where there are none.
        notes: what was found out about the file, one line each.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file cannot be read without a guess, or does not fit the schema; row and column are named.
        MemoryError: when the tensor is larger than the memory.

    >>> table = Table({"city": ["Bern", "Ulm", "Ulm", None], "age": [39, 50, 41, 28]})
    >>> table.names, len(table)
    (['city', 'age'], 4)
    >>> table.x[3]
    tensor([nan, 28.])
    """

    def __init__(
        self,
        source: Any,
        schema: Schema | None = None,
        *,
        overrides: Mapping[str, Override] | None = None,
        rows: np.ndarray | Tensor | None = None,
        memory_map: str | Path | None = None,
        context: Sequence[str] = (),
        **options: Any,
    ):
        if schema is not None and (overrides or rows is not None):
            raise ValueError("overrides and rows are for a schema that is found out, but a schema is given.")
        options = _options_of(schema, options, source)
        self.source = open_source(source, **options)
        if schema is None:
            schema = Schema.infer(self.source, overrides, rows, **options)
            self.notes = list(schema.notes)
        else:
            self.notes = list(self.source.notes)
        if context:
            schema = schema.given(context)
        self.schema, self.names = schema, schema.names
        size = self.source.num_rows
        if size == 0:
            raise ValueError(f"{self.source.where} has no rows.")
        self.x = _room(size, len(self.names), memory_map)
        self.context = _room(size, len(schema.context), None) if schema.context else None
        self.notes += schema.encode_into(self.x, self.source, self.context)

    def __len__(self) -> int:
        return len(self.x)


def _options_of(schema: Schema | None, options: dict[str, Any], source: Any) -> dict[str, Any]:
    """Returns the options with which a file is opened: those of a schema, where they are needed to read cells.

    The encoding of a schema holds unless the file is UTF-8, which no text in another encoding is by chance. Its
    delimiter holds if it is one that is not looked for.
    """
    if schema is None:
        return options
    known = schema.dialect
    found: dict[str, Any] = {"decimal": known.decimal, "thousands": known.thousands, "missing": known.missing}
    if not known.header:
        found["header"] = False
    if known.delimiter not in DELIMITERS:
        found["delimiter"] = known.delimiter
    is_sought = "encoding" not in options and known.encoding != "utf-8" and isinstance(source, (str, Path))
    if is_sought and not is_unicode(Path(source)):
        found["encoding"] = known.encoding
    return found | options


def _room(size: int, columns: int, memory_map: str | Path | None) -> Tensor:
    """Returns a tensor to fill, in memory or in a file."""
    if memory_map is not None:
        Path(memory_map).unlink(missing_ok=True)
        return torch.from_file(str(memory_map), shared=True, size=size * columns, dtype=torch.float32).view(
            size, columns
        )
    needed = 4 * size * columns
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has none of these
        available = needed
    if needed > available:
        raise MemoryError(
            f"the tensor of {size:,} rows and {columns} columns needs {needed / 1e9:.1f} GB, more than the memory of "
            f"{available / 1e9:.1f} GB. Give a file for it, memory_map='rows.bin', or fewer rows."
        )
    return torch.empty(size, columns)


def load_table(
    path: Path,
    schema: Schema | None = None,
    overrides: Mapping[str, Override] | None = None,
    context: Sequence[str] = (),
    **options: Any,
) -> Splits:
    """Loads the rows of a table as splits, as :func:`pyrovae.data.load` says."""
    source = open_source(path, **_options_of(schema, options, path))
    size = source.num_rows
    if size < 3:
        raise ValueError(f"{path} holds {size} data, too few to split into train, validation and test.")
    tenth = max(1, size // 10)
    parts = random_rows(size, validation=tenth, test=tenth)
    training = None if schema else parts[0]
    table = Table(source, schema, overrides=overrides, rows=training, context=context, **options)
    cells = table.context
    return Splits(
        *(Split(table.x[rows], None, rows + 1, None if cells is None else cells[rows]) for rows in parts),
        schema=table.schema,
    )


def load_numbers(path: Path) -> Splits:
    """Loads a ``.npy``, ``.npz`` or ``.csv`` file of numbers alone, as :func:`pyrovae.data.load` says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        array = _read_csv(path)
    except Exception as error:
        raise ValueError(
            f"{path} is truncated, or holds something other than numbers ({error}). On the command line, a table of "
            "words and numbers is read as one without --likelihood and --encoder."
        ) from error
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is refused below
        x = torch.from_numpy(array.astype(np.float32))
    check_finite(f"{path}: x", x)
    return split_by_tenths(path, x, None)


def _read_csv(path: Path) -> np.ndarray:
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if lines and not any(map(_is_number, lines[0].split(","))):  # a line of names
        lines = lines[1:]
    if not lines:
        raise ValueError("no line of numbers")
    return np.loadtxt(lines, delimiter=",", ndmin=2)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
