"""Cells of tables as Arrow arrays, numbers and times."""

import datetime
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "MAX_NUMBER",
    "CellError",
    "as_float64",
    "as_numbers",
    "is_number",
    "is_text",
    "parse_times",
    "refuse",
    "to_arrow",
]

MAX_NUMBER = float(np.finfo(np.float32).max)  # larger ones are infinite in the tensor


class CellError(ValueError):
    """A cell that a column cannot hold.

    Args:
        index: its place among the values given.
        problem: what is wrong, and what to do.
    """

    def __init__(self, index: int, problem: str):
        super().__init__(f"value {index}: {problem}")
        self.index, self.problem = index, problem


def to_arrow(values: Any) -> "pa.Array":
    """Returns any one-dimensional values as one Arrow array; NaN and None are null."""
    import pyarrow as pa

    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
        values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    if not isinstance(values, pa.Array):
        values = pa.array(values, from_pandas=True)
    if pa.types.is_dictionary(values.type):
        values = to_arrow(values.dictionary).take(values.indices)
    # Of polars; few functions of Arrow take it.
    return values.cast(pa.large_string()) if str(values.type) == "string_view" else values


def as_numbers(values: Any) -> np.ndarray:
    """Returns numbers, or text that holds numbers, as float64, NaN where missing.

    Raises:
        CellError: when text is no number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = to_arrow(values)
    if is_text(cells.type):
        try:
            cells = pc.cast(cells, pa.float64())
        except pa.ArrowInvalid:
            for i, cell in enumerate(cells.to_pylist()):
                if cell is not None and not is_number(cell):
                    raise CellError(i, f"{cell!r} is not a number") from None
            cells = pa.array([None if c is None else float(c) for c in cells.to_pylist()], pa.float64())
    elif pa.types.is_temporal(cells.type) or pa.types.is_nested(cells.type):
        raise CellError(0, f"is {cells.type}, not a number")
    else:
        cells = pc.cast(cells, pa.float64(), safe=False)
    return np.array(pc.fill_null(cells, math.nan).to_numpy(zero_copy_only=False))  # a copy that may be written to


ZONE = r"(Z|[+-][0-9]{2}:?[0-9]{2})$"  # of a time in ISO 8601
_YEAR_100 = datetime.datetime(100, 1, 1)


def parse_times(cells: "pa.Array", format: str) -> "pa.Array":
    """Returns text as timestamps without a zone (UTC, if the text names one), null where it is no time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if format != "iso":
        times = pc.strptime(cells, format=format, unit="s", error_is_null=True)
        if "%Y" in format:  # which takes 98 for the year 98
            times = pc.if_else(pc.greater(times, _YEAR_100), times, None)
        return pc.cast(times, pa.timestamp("us"))
    try:
        return pc.cast(cells, pa.timestamp("us"))
    except pa.ArrowInvalid:  # one cell at a time: some are no times, or have a zone
        return pa.array([_iso_time(cell) for cell in cells.to_pylist()], pa.timestamp("us"))


def is_text(type: "pa.DataType") -> bool:
    """Returns whether an Arrow type holds text."""
    return str(type) in ("string", "large_string")


def is_number(cell: str) -> bool:
    """Returns whether text is a number, as Python reads it but without underscores."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _iso_time(cell: str | None) -> datetime.datetime | None:
    try:
        time = datetime.datetime.fromisoformat(cell or "")
    except ValueError:
        return None
    return time.astimezone(datetime.timezone.utc).replace(tzinfo=None) if time.tzinfo else time


def as_float64(x: Any) -> np.ndarray:
    v = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)
    if v.ndim != 1:
        raise ValueError(f"x must be one column, got shape {v.shape}.")
    return v


def refuse(wrong: np.ndarray, values: Any, problem: str) -> None:
    """Raises a CellError for the first value that is wrong."""
    if wrong.any():
        index = int(wrong.argmax())
        value = values[index]
        value = value.as_py() if hasattr(value, "as_py") else value
        raise CellError(index, f"{value!r} {problem}")
