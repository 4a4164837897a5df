"""What a pass over a table finds out about each of its columns, in chunks of rows and bounded memory."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrovae.data.cells import MAX_NUMBER, CellError, as_numbers, is_number, is_text, to_arrow
from pyrovae.data.reading import Dialect

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Summary"]

_NOT_READ = ("list", "struct", "map", "union", "binary", "duration", "interval", "extension")  # types of Arrow
_MAX_DECIMALS = 6  # numbers with more digits after the point are not rounded values
_MAX_VALUES = 20_000  # different values that are counted
_MAX_DECIMAL_NUMBERS = 2_000  # different numbers that are not all whole: little has to be known of them
_MAX_SAMPLE = 200_000  # numbers that are kept


class Summary:
    """The facts of one column: of all rows, except for the sample, which holds training rows alone.

    Args:
        name: name of the column.
        dialect: how its text is written.
    """

    def __init__(self, name: str, dialect: Dialect):
        self.name, self.dialect = name, dialect
        self.type: Any = None  # of Arrow
        self.rows = self.absent = self.absent_in_training = self.training_rows = 0
        self.counts: Counter[Any] | None = Counter()  # of the values; None when there are too many
        self.some: list[Any] = []  # values, when there are too many to count
        self.first_rows: dict[Any, int] = {}  # where a counted value was seen first, counted from 1
        self.numeric = True  # whether all cells are numbers
        self.leading_zeros = False
        self.low, self.high = math.inf, -math.inf
        self.infinite_row: int | None = None
        self.decimals: int | None = 0  # of the values
        self.text_decimals: tuple[int, int] | None = None  # fewest and most that are written
        self.like_thousands = True  # whether points could separate thousands: three digits follow each
        self.divisor: int | None = None  # greatest common, of the numbers in units of the last decimal
        self.order: tuple[Any, ...] = ()  # of all levels, where the table says it
        self.increasing = True
        self.consecutive = True
        self._last: float | None = None
        self._sample: list[np.ndarray] = []
        self._every = 1  # one of so many training rows is in the sample

    @property
    def present(self) -> int:
        """The number of cells that are not missing."""
        return self.rows - self.absent

    @property
    def missing(self) -> float:
        """The share of cells of the training data that are missing."""
        return self.absent_in_training / max(1, self.training_rows)

    @property
    def sample(self) -> np.ndarray:
        """Numbers of the training rows; of all rows, should these have none."""
        values = np.concatenate(self._sample) if self._sample else np.empty(0)
        if len(values) == 0 and self.counts:
            values = np.array([float(v) for v in self.counts], dtype=float)
        return values

    def update(self, cells: "pa.Array", training: np.ndarray | None) -> None:
        """Adds the next rows.

        Args:
            cells: their cells.
            training: which of them are training rows; None for all.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        cells = to_arrow(cells)
        if pa.types.is_floating(cells.type):
            cells = pc.if_else(pc.is_nan(cells), None, cells)
        if any(name in str(cells.type) for name in _NOT_READ):
            raise ValueError(
                f"column {self.name!r} holds {cells.type}, which is no number, text or time. Leave it out."
            )
        if self.type is None or pa.types.is_null(self.type):
            self.type = cells.type
        start, self.rows = self.rows, self.rows + len(cells)
        self.absent += cells.null_count
        training = np.ones(len(cells), dtype=bool) if training is None else training
        self.training_rows += int(training.sum())
        absent = cells.is_null().to_numpy(zero_copy_only=False)
        self.absent_in_training += int((absent & training).sum())
        if cells.null_count == len(cells):
            return
        if is_text(cells.type) and self.numeric and not self.dialect.has_plain_numbers:
            try:
                cells = self.dialect.plain_numbers(cells)
            except CellError as error:
                if self._last is not None:  # after cells that are numbers
                    row = start + error.index + 1
                    raise ValueError(f"column {self.name!r}, row {row:,}: {error.problem}, as others are.") from None
                self.numeric = False
        if pa.types.is_boolean(cells.type) or pa.types.is_temporal(cells.type):
            self.numeric = False
        if self.numeric:
            try:
                numbers = as_numbers(cells)
            except CellError:
                self.numeric = False
            else:
                self._add_numbers(numbers, absent, training, start)
                if is_text(cells.type):
                    self._look_at_text(cells)
        self._count(cells, start)

    def _count(self, cells: "pa.Array", start: int) -> None:
        if self.counts is None:
            return
        encoded = cells.dictionary_encode()
        found = encoded.dictionary.to_pylist()
        most = _MAX_DECIMAL_NUMBERS if self.numeric and self.decimals != 0 else _MAX_VALUES
        if len(found) > most or len(self.counts) > most:
            self.some, self.counts = [*self.counts, *found], None
            return
        present = np.flatnonzero(cells.is_valid().to_numpy(zero_copy_only=False))
        codes = encoded.indices.drop_null().to_numpy()
        firsts = np.zeros(len(found), dtype=int)
        firsts[codes[::-1]] = present[::-1]  # where a code occurs often, the last assignment holds: its first place
        for value, count, first in zip(found, np.bincount(codes).tolist(), firsts.tolist(), strict=True):
            self.counts[value] += count
            self.first_rows.setdefault(value, start + first + 1)

    def _look_at_text(self, cells: "pa.Array") -> None:
        import pyarrow.compute as pc

        cells = cells.drop_null()
        if not self.leading_zeros and pc.any(pc.or_(pc.starts_with(cells, "0"), pc.starts_with(cells, "-0"))).as_py():
            self.leading_zeros = pc.any(pc.match_substring_regex(cells, r"^-?0[0-9]")).as_py()
        point = pc.find_substring(cells, ".")
        digits = pc.if_else(pc.less(point, 0), 0, pc.subtract(pc.subtract(pc.utf8_length(cells), point), 1))
        if self.like_thousands:
            thousands = pc.match_substring_regex(cells, r"^[+-]?([1-9][0-9]{0,2}\.[0-9]{3}|[0-9]{1,3})$")
            self.like_thousands = pc.all(thousands).as_py()
        exponent = any(pc.any(pc.match_substring(cells, e)).as_py() for e in "eE")  # ignore_case is many times slower
        low, high = (int(v.as_py()) for v in pc.min_max(digits).values())
        low, high = (0, 99) if exponent else (low, high)
        fewest, most = self.text_decimals or (low, high)
        self.text_decimals = min(fewest, low), max(most, high)

    def _add_numbers(self, numbers: np.ndarray, absent: np.ndarray, training: np.ndarray, start: int) -> None:
        infinite = np.abs(numbers) > MAX_NUMBER
        if infinite.any() and self.infinite_row is None:
            self.infinite_row = start + int(infinite.argmax()) + 1
        present = numbers[~absent & ~infinite]
        if not len(present):
            return
        self.low, self.high = min(self.low, float(present.min())), max(self.high, float(present.max()))
        self._look_at_decimals(present)
        steps = np.diff(present, prepend=present[0] - 1 if self._last is None else self._last)
        self.increasing = self.increasing and bool((steps > 0).all())
        self.consecutive = self.consecutive and bool((steps == 1).all())
        self._last = float(present[-1])
        kept = numbers[training & ~absent & ~infinite][:: self._every]
        self._sample.append(kept)
        if sum(map(len, self._sample)) > 2 * _MAX_SAMPLE:
            self._sample, self._every = [np.concatenate(self._sample)[::2]], 2 * self._every

    def _look_at_decimals(self, present: np.ndarray) -> None:
        """Finds the fewest decimals that all values have, and the greatest common divisor."""
        while self.decimals is not None:
            scaled = present * 10.0**self.decimals
            whole = np.round(scaled)
            # Rounding errors of double precision. Values that were rounded to float32 are none of a few decimals.
            least = 1e-9 * min(1.0, np.abs(scaled).max())  # numbers may all be tiny
            if (np.abs(scaled - whole) <= least + 4e-16 * np.abs(scaled)).all():
                break
            self.decimals = self.decimals + 1 if self.decimals < _MAX_DECIMALS else None
            self.divisor = None if self.divisor is None else self.divisor * 10
        if self.decimals is not None:
            exact = np.abs(whole).max() < 2**53
            found = int(np.gcd.reduce(np.unique(np.abs(whole)).astype(np.int64))) if exact else 1
            self.divisor = found if self.divisor is None else math.gcd(self.divisor, found)

    def non_numbers(self) -> list[str]:
        """Returns the counted values that are text other than numbers."""
        values = self.some if self.counts is None else self.counts
        return [v for v in values if isinstance(v, str) and not is_number(v)]
