"""The kinds of columns that a table can have: how cells become numbers for a model, and numbers become cells again."""

import datetime
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pyrovae.data.cells import (
    MAX_NUMBER,
    ZONE,
    CellError,
    as_float64,
    as_numbers,
    is_text,
    parse_times,
    refuse,
    to_arrow,
)
from pyrovae.distributions import Classes, Numbers

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "KINDS",
    "Binary",
    "Bounded",
    "Category",
    "Column",
    "Constant",
    "Continuous",
    "Count",
    "Discrete",
    "Identifier",
    "LeftOut",
    "Modelled",
    "Ordered",
    "Positive",
    "Real",
    "Time",
]

Level = str | int | float | bool

_OFF_GRID = 1e-3  # of a step: what rounding in double precision explains
_SECONDS = {"day": 86400, "minute": 60, "second": 1}


@dataclass(frozen=True)
class Column(ABC):
    """Base of the kinds of columns.

    To add a kind, derive a frozen dataclass from :class:`Continuous`, :class:`Discrete` or :class:`LeftOut`, whose
    fields are what a person may edit in a schema file, and add it to ``KINDS``.

    Args:
        name: the name in the first line of the file.
        missing: the share of cells that are missing in the training data.
    """

    name: str
    missing: float = field(default=0.0, kw_only=True)

    modelled: ClassVar[bool]
    likelihood: ClassVar[str]  # what log p(x) holds of a value, in words

    @property
    def kind(self) -> str:
        """The name of the kind, as in a schema file."""
        return type(self).__name__

    @abstractmethod
    def describe(self) -> str:
        """Returns what is known of the values, in one line."""

    def text(self, values: "pa.Array") -> list[str | None]:
        """Returns decoded values as they are written in a text file, None where missing."""
        return [None if v is None else str(v) for v in values.to_pylist()]

    def to_dict(self) -> dict[str, Any]:
        """Returns the kind and the fields that differ from their defaults, as plain numbers, strings and lists."""
        content: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if f.default is MISSING or value != f.default:
                content[f.name] = list(value) if isinstance(value, tuple) else value
        return content

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Column":
        """Returns the column that :meth:`to_dict` described.

        Raises:
            ValueError: when there is no such kind, or its fields are unknown, are not given or do not fit.

        >>> Column.from_dict({"name": "sex", "kind": "Binary", "levels": ["Female", "Male"]})
        Binary(name='sex', missing=0.0, levels=('Female', 'Male'))
        """
        given = dict(content)
        where, kind = f"column {given.get('name')!r}", given.pop("kind", None)
        cls = KINDS.get(kind) if isinstance(kind, str) else None
        if cls is None:
            raise ValueError(f"{where}: kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        known = {f.name: f for f in fields(cls)}
        needed = [name for name, f in known.items() if f.default is MISSING and name not in given]
        unknown = [name for name in given if name not in known]
        if needed or unknown:
            wrong = f"needs {', '.join(needed)}" if needed else f"has no {', '.join(map(str, unknown))}"
            raise ValueError(f"{where}: {kind} {wrong}. Its fields are {', '.join(known)}.")
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return cls(**arguments)


class Modelled(Column):
    """Base of the columns that a model sees: each is one column of the tensor, NaN where a cell is missing."""

    modelled = True

    @abstractmethod
    def encode(self, values: Any) -> np.ndarray:
        """Returns values as numbers.

        Args:
            values: an Arrow array, or any one-dimensional array or list: numbers, or text as in a file. None, null and
                NaN are missing.

        Returns:
            A float64 array of the same length, NaN where a value is missing.

        Raises:
            CellError: when a value is not one of this column.
        """

    @property
    @abstractmethod
    def cells(self) -> Classes | Numbers:
        """What a likelihood and an encoder must know of the encoded values."""

    @abstractmethod
    def decode(self, x: Any) -> "pa.Array":
        """Returns the values of numbers that :meth:`encode` may return, null where they are NaN.

        Args:
            x: a one-dimensional tensor or array.
        """


class LeftOut(Column):
    """Base of the columns that no model sees."""

    likelihood = "none, because the column is left out"
    modelled = False

    @abstractmethod
    def fill(self, size: int) -> "pa.Array":
        """Returns cells of this column for a table of generated rows."""


@dataclass(frozen=True)
class Continuous(Modelled):
    """Base of the columns of numbers. All fields are in own units, those of the file; the tensor holds value - origin.

    The origin keeps precision: numbers near 1,000,000 have steps of 0.06 in float32. A shift has Jacobian 1, so
    densities of the encoded value are densities in own units.

    Args:
        loc: location of the values that are no spikes.
        scale: their scale, positive.
        spikes: single values that are taken so often that each has a probability of its own; a density describes the
            rest.
        step: values are rounded to multiples of it, so that the likelihood of a value is the probability of the
            interval value - step / 2 to value + step / 2; None for values with a density.
        origin: what is subtracted.
        decimals: digits after the point to write; None for as many as float32 holds.
        min_decimals: digits after the point that are written though they are zeros.
    """

    loc: float
    scale: float
    spikes: tuple[float, ...] = ()
    step: float | None = None
    origin: float = 0.0
    decimals: int | None = None
    min_decimals: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, "loc", "scale", "origin", *(["step"] if self.step is not None else []))
        if not self.scale > 0 or (self.step is not None and not self.step > 0):
            wrong = "scale" if not self.scale > 0 else "step"
            raise ValueError(f"column {self.name!r}: {wrong} must be positive, got {getattr(self, wrong)}.")
        if not all(_is_number(s) and math.isfinite(s) for s in self.spikes):
            raise ValueError(f"column {self.name!r}: spikes must be finite numbers, got {self.spikes!r}.")

    @cached_property
    def encoded_loc(self) -> float:
        """The location of the encoded values, loc - origin."""
        return self.loc - self.origin

    @cached_property
    def encoded_spikes(self) -> tuple[float, ...]:
        """The spikes as they are in the tensor, equal to encoded values in float32."""
        return tuple(float(np.float32(s - self.origin)) for s in self.spikes)

    def is_inside(self, values: np.ndarray) -> np.ndarray:
        """Returns which values, in own units and no spikes, have a density."""
        return np.ones(len(values), dtype=bool)

    @property
    def range_text(self) -> str:
        """Which values have a density, in words."""
        return "any number"

    def encode(self, values: Any) -> np.ndarray:
        v = as_numbers(values)
        here = ~np.isnan(v)
        refuse(here & (np.abs(v) > MAX_NUMBER), values, "is infinite; leave the cell empty if it is missing")
        spike = np.isin(v, np.asarray(self.spikes, dtype=float)) if self.spikes else np.zeros(len(v), dtype=bool)
        refuse(
            here & ~spike & ~self.is_inside(v),
            values,
            f"is outside the range of a {self.kind} column: {self.range_text}. Correct it, or change kind or range in "
            "the schema and train again",
        )
        if self.step is not None:
            with np.errstate(invalid="ignore"):
                off = np.abs(v / self.step - np.round(v / self.step)) > _OFF_GRID + 1e-9 * np.abs(v / self.step)
            refuse(
                here & ~spike & off,
                values,
                f"is not a multiple of the step {self.step:g}. Round it, or give a smaller step (or none) in the "
                "schema and train again",
            )
        return v - self.origin

    def decode(self, x: Any) -> "pa.Array":
        import pyarrow as pa

        encoded = as_float64(x)
        v = encoded + self.origin
        if self.step is not None:
            v = np.round(v / self.step) * self.step
        for spike, seen in zip(self.spikes, self.encoded_spikes, strict=True):
            v = np.where(encoded == seen, spike, v)
        if self.decimals is not None:
            v = np.round(v, self.decimals)
        missing = np.isnan(v)
        if self.decimals == 0:
            return pa.array(np.where(missing, 0, v).astype(np.int64), mask=missing)
        return pa.array(v, mask=missing)

    def text(self, values: "pa.Array") -> list[str | None]:
        return [None if v is None else self._write(v) for v in values.to_pylist()]

    def _write(self, value: float) -> str:
        if self.decimals is None:  # as short as float32 can tell it apart
            return f"{value:.12g}" if self.origin else str(np.float32(value))
        whole, point, digits = f"{value:.{self.decimals}f}".partition(".")
        digits = digits.rstrip("0").ljust(self.min_decimals, "0")
        return f"{whole}{point}{digits}" if digits else whole

    @property
    def place_text(self) -> str:
        """Where the values are, in words."""
        return f"{self.loc:.12g} +- {self.scale:.3g}"

    def describe(self) -> str:
        parts = [self.place_text]
        parts += [f"in steps of {self.step:g}"] if self.step is not None else []
        parts += [f"often {_listed(self.spikes)}"] if self.spikes else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Real(Continuous):
    """Numbers of any size and sign.

    >>> age = Real("age", 38.6, 13.6, step=1, decimals=0)
    >>> age.encode(["39", None, "50"])
    array([39., nan, 50.])
    >>> age.decode([39.2, float("nan")]).to_pylist()
    [39, None]
    """

    likelihood = "a density in own units; in steps, the probability of a step; of a frequent value, its own"

    @property
    def cells(self) -> Numbers:
        offset = 0.0 if self.step is None else -self.origin % self.step
        return Numbers(self.encoded_loc, self.scale, None, self.step, offset, spikes=self.encoded_spikes)


@dataclass(frozen=True)
class Positive(Continuous):
    """Skewed numbers above 0: loc and scale are those of the natural logarithm. Spikes may be 0 or less.

    A column with a step has only multiples of it above 0, so that the intervals begin at step / 2.

    >>> Positive("price", 5.0, 1.2, step=0.01, decimals=2, min_decimals=2).decode([3.499999]).to_pylist()
    [3.5]
    """

    likelihood = "as Real, on a logarithmic scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.origin != 0:
            raise ValueError(f"column {self.name!r}: a Positive column has origin 0, got {self.origin}.")

    @property
    def cells(self) -> Numbers:
        low = -math.inf if self.step is None else self.step
        return Numbers(self.loc, self.scale, 0.0, self.step, low=low, spikes=self.encoded_spikes)

    def is_inside(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(np.float32) > 0  # its logarithm has to be finite in the tensor too

    @property
    def range_text(self) -> str:
        return "above 0"

    @property
    def place_text(self) -> str:
        return f"near {math.exp(min(self.loc, 700)):.5g}, factor {math.exp(min(self.scale, 700)):.3g}"


@dataclass(frozen=True)
class Bounded(Continuous):
    """Numbers from low to high, such as shares, or from low on. The origin is low, whatever is given.

    Values equal to low or high are possible, as those next to them; many of them are a spike.

    Args:
        low: the lowest possible value.
        high: the highest possible value; None for no end.
    """

    likelihood = "as Real, with all values in the range"

    low: float = 0.0
    high: float | None = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", self.low)
        super().__post_init__()
        _check_numbers(self, "low", *(["high"] if self.high is not None else []))
        if self.high is not None and not self.low < self.high:
            raise ValueError(f"column {self.name!r}: low must be below high, got {self.low} and {self.high}.")

    @property
    def cells(self) -> Numbers:
        low, high, offset = self.low, math.inf if self.high is None else self.high, 0.0
        if self.step is not None:  # the outermost points of the grid
            low = math.ceil(low / self.step - 1e-9) * self.step
            high = high if self.high is None else math.floor(high / self.step + 1e-9) * self.step
            offset = low - self.low
        ends = (low - self.low, high - self.low)
        return Numbers(self.encoded_loc, self.scale, None, self.step, offset, *ends, spikes=self.encoded_spikes)

    def is_inside(self, values: np.ndarray) -> np.ndarray:
        return (values >= self.low) & (values <= (math.inf if self.high is None else self.high))

    @property
    def range_text(self) -> str:
        return f"{self.low:g} or more" if self.high is None else f"{self.low:g} to {self.high:g}"

    def describe(self) -> str:
        return f"{self.range_text}, {super().describe()}"


@dataclass(frozen=True)
class Count(Modelled):
    """Whole numbers from 0. loc and scale are mean and standard deviation.

    >>> Count("children", 1.1, 1.3).decode([2.0]).to_pylist()
    [2]
    """

    likelihood = "the probability of the number"

    loc: float
    scale: float

    def __post_init__(self) -> None:
        _check_numbers(self, "loc", "scale")
        if self.loc < 0 or not self.scale > 0:
            raise ValueError(
                f"column {self.name!r}: loc must be at least 0 and scale positive, got {self.loc} and {self.scale}."
            )

    @property
    def cells(self) -> Numbers:
        # Location and scale of log(1 + x), as if it were normal; the largest count is that of single precision.
        variance = math.log1p((self.scale / (1 + self.loc)) ** 2)
        loc, scale = math.log1p(self.loc) - variance / 2, math.sqrt(variance)
        return Numbers(loc, scale, 1.0, 1.0, low=0.0, high=2.0**24 - 1)

    def encode(self, values: Any) -> np.ndarray:
        v = as_numbers(values)
        here = ~np.isnan(v)
        refuse(here & ~((v >= 0) & (v == np.floor(v)) & (v < 2**24)), values, "is no count: 0, 1, 2, ...")
        return v

    def decode(self, x: Any) -> "pa.Array":
        import pyarrow as pa

        v = as_float64(x)
        missing = np.isnan(v)
        return pa.array(np.where(missing, 0, np.round(v)).astype(np.int64), mask=missing)

    def describe(self) -> str:
        return f"mean {self.loc:.4g}, standard deviation {self.scale:.4g}"


@dataclass(frozen=True)
class Discrete(Modelled):
    """Base of the columns with a fixed set of values, encoded as 0 to K - 1.

    Args:
        levels: the K values, all text, all numbers, or False and True.
    """

    likelihood = "the probability of the level"

    levels: tuple[Level, ...]

    fewest: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if len(self.levels) < self.fewest or len(set(self.levels)) < len(self.levels):
            raise ValueError(
                f"column {self.name!r}: {self.kind} needs at least {self.fewest} different levels, got "
                f"{_listed(self.levels)}."
            )
        types = {type(level) for level in self.levels}
        if not (types <= {str} or types <= {bool} or types <= {int, float}):
            raise ValueError(
                f"column {self.name!r}: levels must be all text or all numbers, got {_listed(self.levels)}. Put quotes "
                "around levels that are text."
            )

    @property
    def num_levels(self) -> int:
        """The number of levels, K."""
        return len(self.levels)

    @property
    def cells(self) -> Classes:
        return Classes(self.num_levels)

    def encode(self, values: Any) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        cells = to_arrow(values)
        if isinstance(self.levels[0], bool) and pa.types.is_boolean(cells.type):
            codes = pc.index_in(cells, value_set=pa.array(self.levels))
        elif isinstance(self.levels[0], (str, bool)):
            # Text cells may come back as another type, for example codes that pandas read as numbers.
            cells = cells if is_text(cells.type) else pc.cast(cells, pa.string())
            codes = pc.index_in(cells, value_set=pa.array([str(level) for level in self.levels], cells.type))
        else:
            numbers = as_numbers(cells)
            cells = pa.array(numbers, mask=np.isnan(numbers))
            codes = pc.index_in(cells, value_set=pa.array(self.levels, pa.float64()))
        unknown = pc.and_(cells.is_valid(), pc.is_null(codes)).to_numpy(zero_copy_only=False)
        refuse(
            unknown,
            values,
            f"is none of the {self.num_levels} levels of the training data ({_listed(self.levels)}). Leave the cell "
            "empty to take it as missing; or train again with this level, or another kind, such as Count for a count, "
            "in the schema: pyrovae describe FILE --output schema.yaml, then pyrovae train --schema schema.yaml",
        )
        return np.array(pc.cast(codes, pa.float64()).to_numpy(zero_copy_only=False))

    def decode(self, x: Any) -> "pa.Array":
        import pyarrow as pa

        v = as_float64(x)
        missing = np.isnan(v)
        codes = np.where(missing, 0, v).round().astype(np.int64)
        outside = (codes < 0) | (codes >= self.num_levels)
        refuse(outside, codes, f"is no code of {self.name!r}: 0 to {self.num_levels - 1}")
        return pa.array(self.levels).take(pa.array(codes, mask=missing))

    def describe(self) -> str:
        return f"{self.num_levels} levels: {_listed(self.levels)}"


@dataclass(frozen=True)
class Category(Discrete):
    """Values without an order.

    >>> Category("colour", ("blue", "red")).encode(["red", None])
    array([ 1., nan])
    """


@dataclass(frozen=True)
class Binary(Discrete):
    """Two values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.levels) != 2:
            raise ValueError(f"column {self.name!r}: Binary has two levels, got {_listed(self.levels)}.")


@dataclass(frozen=True)
class Ordered(Discrete):
    """Values in an order, lowest first.

    >>> Ordered("size", ("S", "M", "L")).decode([2]).to_pylist()
    ['L']
    """

    @property
    def cells(self) -> Classes:
        return Classes(self.num_levels, is_ordered=True)


@dataclass(frozen=True)
class Time(Modelled):
    """Dates, or dates with times of day, as the number of units since an origin.

    Args:
        loc: location of the encoded values, in units since the origin.
        scale: their scale, in units.
        origin: the earliest time of the training data, in ISO format.
        unit: "day", "minute" or "second".
        step: 1 if values are whole units, None for values with a density per unit.
        format: how a time is written, as in strftime; "iso" for ISO 8601 with fractions of a second or a zone.
        zone: whether times of the format "iso" have a zone; they are written in UTC.

    >>> born = Time("born", 10.0, 5.0, origin="2020-03-01", unit="day", step=1, format="%d.%m.%Y")
    >>> born.encode(["03.03.2020"])
    array([2.])
    >>> born.text(born.decode([2.0]))
    ['03.03.2020']
    """

    likelihood = "as Real, in units since the origin"

    loc: float
    scale: float
    origin: str = "1970-01-01"
    unit: str = "day"
    step: float | None = None
    format: str = "iso"
    zone: bool = False

    spikes: ClassVar[tuple[float, ...]] = ()
    encoded_spikes: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        _check_numbers(self, "loc", "scale")
        if not self.scale > 0 or self.step not in (None, 1):
            raise ValueError(f"column {self.name!r}: scale must be positive and step 1 or none.")
        if self.unit not in _SECONDS:
            raise ValueError(f"column {self.name!r}: unit must be one of {', '.join(_SECONDS)}, got {self.unit!r}.")
        try:
            self._origin  # noqa: B018 (to check it)
        except ValueError as error:
            raise ValueError(f"column {self.name!r}: origin must be an ISO time ({error}).") from None

    @cached_property
    def _origin(self) -> datetime.datetime:
        return datetime.datetime.fromisoformat(str(self.origin)).replace(tzinfo=None)

    @property
    def _other_zone(self) -> str:
        return "has no zone, as the training data have" if self.zone else "has a zone, which the training data have not"

    @property
    def encoded_loc(self) -> float:
        """The location of the encoded values."""
        return self.loc

    @cached_property
    def cycles(self) -> dict[str, tuple[float, float]]:
        """Lengths of "day", "week" and "year", if longer than a unit, and the place of the origin in each, in units.

        An encoded x is at ``(x + place) / length``, modulo 1, of the cycle.
        """
        o, per_day = self._origin, 86400 / _SECONDS[self.unit]
        of_day = (o - o.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds() / 86400
        days = {"day": (1.0, of_day), "week": (7.0, o.weekday() + of_day)}
        days["year"] = (365.2425, o.timetuple().tm_yday - 1 + of_day)
        if self.unit == "day":
            del days["day"]
        return {name: (length * per_day, place * per_day) for name, (length, place) in days.items()}

    @property
    def cells(self) -> Numbers:
        return Numbers(self.loc, self.scale, None, self.step, cycles=tuple(self.cycles.values()))

    def encode(self, values: Any) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        cells = to_arrow(values)
        if is_text(cells.type):
            times = parse_times(cells, self.format)
            unread = pc.and_(cells.is_valid(), pc.is_null(times)).to_numpy(zero_copy_only=False)
            refuse(unread, values, f"is no time of the format {self.format!r}")
            if self.format == "iso":
                has_zone = pc.fill_null(pc.match_substring_regex(cells, ZONE), self.zone).to_numpy(zero_copy_only=False)
                refuse(has_zone != self.zone, values, self._other_zone)
        elif pa.types.is_null(cells.type):
            return np.full(len(cells), np.nan)
        elif pa.types.is_date(cells.type) or pa.types.is_timestamp(cells.type):
            if self.format == "iso" and (getattr(cells.type, "tz", None) is not None) != self.zone:
                raise CellError(0, self._other_zone)
            times = pc.cast(cells, pa.timestamp("us"), safe=False)
        else:
            raise CellError(0, f"is {cells.type}, not a date or a time")
        missing = pc.is_null(times).to_numpy(zero_copy_only=False)
        micro = pc.fill_null(pc.cast(times, pa.int64()), 0).to_numpy(zero_copy_only=False)
        v = np.where(missing, np.nan, self.since_origin(micro.view("datetime64[us]")))
        if self.step is not None:
            refuse(~missing & (v != np.round(v)), values, f"is not a whole {self.unit}, as in the training data")
        return v

    def decode(self, x: Any) -> "pa.Array":
        import pyarrow as pa

        v = as_float64(x)
        missing = np.isnan(v)
        micro = self.instants(np.where(missing, 0, v)).astype(np.int64)
        times = pa.array(micro, mask=missing).cast(pa.timestamp("us", "UTC" if self.zone else None))
        if self.zone:
            return times
        return times.cast(pa.date32()) if self.unit == "day" and self.step is not None else times

    def instants(self, v: np.ndarray) -> np.ndarray:
        """Returns times in units since the origin as ``datetime64[us]``, rounded to what is written."""
        seconds = (v if self.step is None else np.round(v)) * _SECONDS[self.unit]
        if self.format != "iso":  # which has no fractions of a second
            seconds = np.round(seconds)
        return np.datetime64(self._origin, "us") + np.round(seconds * 1e6).astype("timedelta64[us]")

    def since_origin(self, instants: np.ndarray) -> np.ndarray:
        """Returns instants as units since the origin."""
        return (instants - np.datetime64(self._origin, "us")).astype(np.float64) / (1e6 * _SECONDS[self.unit])

    def text(self, values: "pa.Array") -> list[str | None]:
        times = values.to_pylist()
        if self.format == "iso":
            return [None if t is None else t.isoformat() for t in times]
        return [None if t is None else t.strftime(self.format) for t in times]

    def describe(self) -> str:
        return f"{self.unit}s since {self.origin}, written {self.format}"


@dataclass(frozen=True)
class Constant(LeftOut):
    """A single value in all rows, or no value in any: left out.

    Args:
        value: the value; None for a column that is all missing.
    """

    value: Level | None = None

    def count_others(self, cells: "pa.Array") -> int:
        """Returns the number of cells that hold another value; missing cells hold none."""
        cells = to_arrow(cells).drop_null()
        if self.value is None:
            return len(cells)
        if _is_number(self.value):
            try:
                return int((as_numbers(cells) != self.value).sum())
            except CellError:
                return len(cells)
        return sum(str(cell) != str(self.value) for cell in cells.to_pylist())

    def fill(self, size: int) -> "pa.Array":
        import pyarrow as pa

        return pa.array([self.value] * size, pa.string() if self.value is None else None)

    def describe(self) -> str:
        return "left out: no cell has a value" if self.value is None else f"left out: always {self.value!r}"


@dataclass(frozen=True)
class Identifier(LeftOut):
    """A name or a number of the row, or free text: left out. Generated rows are numbered, or have empty cells.

    Args:
        numbers: whether it holds numbers.
    """

    numbers: bool = False

    def fill(self, size: int) -> "pa.Array":
        import pyarrow as pa

        return pa.array(np.arange(1, size + 1)) if self.numbers else pa.nulls(size, pa.string())

    def describe(self) -> str:
        return "left out: numbers the rows" if self.numbers else "left out: names the rows, or free text"


KINDS: dict[str, type[Column]] = {
    cls.__name__: cls for cls in (Real, Positive, Bounded, Count, Binary, Category, Ordered, Time, Constant, Identifier)
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_numbers(column: Column, *names: str) -> None:
    for name in names:
        value = getattr(column, name)
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"column {column.name!r}: {name} must be a finite number, got {value!r}.")


def _listed(values: tuple, most: int = 6) -> str:
    shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values[:most])
    return f"{shown}, ..." if len(values) > most else shown
