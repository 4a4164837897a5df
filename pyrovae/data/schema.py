"""The schema of a table: its columns in the order of the file, and how the file is written."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from pyrovae.data.columns import CellError, Column, LeftOut, Modelled

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Dialect", "Schema"]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a text file of a table is written.

    Args:
        delimiter: what separates cells.
        decimal: the decimal point, or comma.
        thousands: what separates thousands; "" for nothing.
        encoding: the encoding of the text.
        header: whether the first line holds the names of the columns.
        missing: texts that mean a missing cell, besides an empty one. The first is written for missing cells.
    """

    delimiter: str = ","
    decimal: str = "."
    thousands: str = ""
    encoding: str = "utf-8"
    header: bool = True
    missing: tuple[str, ...] = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")


class Schema:
    """The columns of a table: what they hold, and how their cells become one tensor and back.

    Args:
        columns: all columns, in the order of the file.
        dialect: how the file is written.

    Raises:
        ValueError: when no column can be modelled, or names occur twice.

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

    def __init__(self, columns: Sequence[Column], dialect: Dialect | None = None):
        self.columns, self.dialect = tuple(columns), dialect or Dialect()
        for column in self.columns:
            if not isinstance(column, Column):
                raise TypeError(f"columns must hold columns, such as data.Real('age', 40, 10), got {column!r}.")
        seen: set[str] = set()
        for name in (column.name for column in self.columns):
            if name in seen:
                raise ValueError(f"columns: the name {name!r} occurs twice. Give each column a name of its own.")
            seen.add(name)
        if not self.modelled:
            raise ValueError("columns: none can be modelled, because all are constant or name the rows.")

    def __repr__(self) -> str:
        return f"Schema({list(self.columns)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and (self.columns, self.dialect) == (other.columns, other.dialect)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def modelled(self) -> tuple[Modelled, ...]:
        """The columns of the tensor, in its order, which is that of the file."""
        return tuple(column for column in self.columns if isinstance(column, Modelled))

    @property
    def names(self) -> list[str]:
        """The names of the columns of the tensor."""
        return [column.name for column in self.modelled]

    def encode(self, frame: Any, *, first_row: int = 1) -> Tensor:
        """Returns rows as a float32 tensor, ``(rows, len(modelled))``, NaN where a cell is missing.

        Args:
            frame: a table of pandas, polars or pyarrow, or a dict of columns; columns may be in any order, and those
                that are left out may lack.
            first_row: the number of the first row, for messages.

        Raises:
            ValueError: when columns lack or are unknown, or when a cell is not one of its column; column and row are
                named.
        """
        table = as_table(frame)
        self.check_names(table.column_names)
        x = np.empty((len(table), len(self.modelled)), dtype=np.float32)
        for i, column in enumerate(self.modelled):
            try:
                x[:, i] = column.encode(table[column.name])
            except CellError as error:
                raise ValueError(f"column {column.name!r}, row {first_row + error.index:,}: {error.problem}.") from None
        return torch.from_numpy(x)

    def decode(self, x: Tensor) -> "pa.Table":
        """Returns a pyarrow table with all columns of the file: numbers, text and times, null where x is NaN.

        ``.to_pandas()`` and ``polars.from_arrow`` turn it into other tables; :meth:`write` writes it as the file is
        written.

        Args:
            x: shape ``(rows, len(modelled))``.
        """
        import pyarrow as pa

        if x.dim() != 2 or x.shape[1] != len(self.modelled):
            raise ValueError(f"x must have shape (rows, {len(self.modelled)}), got {tuple(x.shape)}.")
        at = {column.name: i for i, column in enumerate(self.modelled)}
        cells = []
        for column in self.columns:
            if isinstance(column, Modelled):
                cells.append(column.decode(x[:, at[column.name]]))
            elif isinstance(column, LeftOut):
                cells.append(column.fill(len(x)))
        return pa.table(cells, names=[column.name for column in self.columns])

    def check_names(self, names: Sequence[str]) -> None:
        """Raises a ValueError unless these are the columns of the schema, in any order; those left out may lack."""
        lacking = [name for name in self.names if name not in names]
        known = {column.name for column in self.columns}
        unknown = [name for name in names if name not in known]
        if lacking or unknown:
            parts = [f"lack {_quoted(lacking)}"] if lacking else []
            parts += [f"have {_quoted(unknown)}, which the training data did not have"] if unknown else []
            raise ValueError(
                f"the columns {' and '.join(parts)}. Give the columns of the training data, in any order: "
                f"{_quoted(self.names, 12)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the schema as plain dicts, lists, numbers and strings."""
        written = dataclasses.asdict(self.dialect)
        differs = {f.name: written[f.name] for f in dataclasses.fields(Dialect) if written[f.name] != f.default}
        dialect = {name: list(v) if isinstance(v, tuple) else v for name, v in differs.items()}
        columns = [column.to_dict() for column in self.columns]
        return ({"dialect": dialect} if dialect else {}) | {"columns": columns}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Schema":
        """Returns the schema that :meth:`to_dict` described.

        Raises:
            ValueError: when entries lack, are unknown or do not fit.
        """
        try:
            dialect = {k: tuple(v) if isinstance(v, list) else v for k, v in content.get("dialect", {}).items()}
            return Schema([Column.from_dict(c) for c in content["columns"]], Dialect(**dialect))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the schema must hold a list of columns, each with a name and a kind ({error})."
            ) from None

    def to_yaml(self) -> str:
        """Returns the schema as text that a person may edit."""
        return yaml.safe_dump(_plain(self.to_dict()), sort_keys=False, allow_unicode=True, width=120)

    @staticmethod
    def from_yaml(source: str | Path) -> "Schema":
        """Reads a schema from text, or from a file whose path is a ``Path``.

        Raises:
            ValueError: when it is no schema.
        """
        where = str(source) if isinstance(source, Path) else "the schema"
        try:
            content = yaml.safe_load(source.read_text(encoding="utf-8") if isinstance(source, Path) else source)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} is no YAML ({error}).") from None
        try:
            return Schema.from_dict(content if isinstance(content, dict) else {})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def as_table(frame: Any) -> "pa.Table":
    """Returns a table of pandas, polars or pyarrow, or a dict of columns, as a pyarrow table without an index."""
    import pyarrow as pa

    if isinstance(frame, pa.RecordBatch):
        return pa.Table.from_batches([frame])
    if isinstance(frame, pa.Table):
        return frame
    if isinstance(frame, Mapping):
        return pa.table({name: pa.array(column, from_pandas=True) for name, column in frame.items()})
    if type(frame).__module__.partition(".")[0] == "pandas":
        return pa.Table.from_pandas(frame, preserve_index=False)
    if hasattr(frame, "__arrow_c_stream__"):
        return pa.table(frame)
    raise TypeError(
        f"a table must be one of pandas, polars or pyarrow, or a dict of columns, got {type(frame).__name__}."
    )


def _quoted(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _plain(value: Any) -> Any:
    """Returns nested values without numpy's numbers, and whole floats of YAML as they are."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
