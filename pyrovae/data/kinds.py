"""Which kind of column holds the values that a pass over a table found: rules that are said, and never change a number.

Kinds, levels, ranges, steps and formats are those of all rows. Locations, scales and spikes are those of the training
rows alone.
"""

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrovae.data.cells import ZONE, parse_times
from pyrovae.data.columns import (
    KINDS,
    Binary,
    Bounded,
    Category,
    Column,
    Constant,
    Continuous,
    Count,
    Discrete,
    Identifier,
    Ordered,
    Positive,
    Real,
    Time,
)
from pyrovae.data.summaries import Summary

__all__ = ["Override", "column_of", "decimal_signs"]

Override = str | Mapping[str, Any] | Column

_FEW = 20  # different numbers that are levels of their own, if there are ten cells for each
_CELLS_PER_LEVEL = 10
_SCALE = 11  # levels from 0 that a scale has, 0 to 10; more of them that thin out are a count
_FAR = 10  # standard deviations from 0 within which a bound at 0 matters
_GAPS = 3  # levels of their own that are possible, for each that occurs
_MAX_LEVELS = 1000
_MAX_SPIKES = 64
_SPIKE_SHARE = 0.002
_MOST_CODES = 3  # frequent values: with more of them, none is taken for one that means a missing cell
_MAX_STEPS = 2**23  # in the range of a column; float32 tells twice as many apart
_MAX_STEPS_OF_DECIMALS = 10**6 - 1  # where values are rounded more finely, a density says the same
_MAX_COUNT = 1000
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 100.0))
_ID_NAME = re.compile(
    r"(^|[_\s.-])(id|idx|index|nr|no|number|key|uuid|row)$|^unnamed: \d+$|^$|[a-z]I[dD]$", re.IGNORECASE
)
# Formats of dates, then those of dates with times.
_DATES = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%d-%b-%Y", "%d %b %Y")
_TIMES = (" %H:%M:%S", " %H:%M", "T%H:%M:%S", "T%H:%M:%SZ", "T%H:%M", " %I:%M:%S %p", " %I:%M %p")
_FORMATS = _DATES + tuple(f"{date}{time}" for date in _DATES for time in _TIMES)
_SHORT_FORMATS = tuple(f.replace("%Y", "%y") for f in _FORMATS)  # 69 to 99 are 1969 to 1999, 00 to 68 are 2000 to 2068
_COMMA_DECIMAL = re.compile(r"[+-]?\d+,\d+|[+-]?\d{1,3}(\.\d{3})+,\d+")
_POINT_THOUSANDS = re.compile(r"[+-]?\d{1,3}(\.\d{3}){2,}")
_COMMA_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_WITH_SIGN = re.compile(
    r"[+-]?[$€£¥]\s?[+-]?[\d.,']*\d|[+-]?[\d.,']*\d\s?([%€$£¥]|[a-zA-Z]{1,3})|[+-]?\d{1,3}('\d{3})+(\.\d+)?"
)


def column_of(summary: Summary, override: Override | None = None) -> tuple[Column, list[str]]:
    """Returns the column of a summary, and notes about it, one line each.

    Args:
        summary: what is known of its values.
        override: a kind, fields of the column (its kind among them), or the column itself.

    Raises:
        ValueError: when its cells are ambiguous, of several formats or infinite, or the override does not fit.
    """
    name = summary.name
    if isinstance(override, Column):
        if override.name != name:
            raise ValueError(f"the column for {name!r} has the name {override.name!r}. Give it the same name.")
        return override, []
    given = {"kind": override} if isinstance(override, str) else dict(override or {})
    kind = given.pop("kind", None)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"column {name!r}: kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if summary.infinite_row is not None and kind not in ("Identifier", "Constant"):
        raise ValueError(
            f"column {name!r}, row {summary.infinite_row:,}: infinite, or beyond 3.4e38, the largest number of single "
            "precision. Correct the cell, divide the column, or leave the cell empty if it is missing."
        )
    notes: list[str] = []
    if kind is not None:
        column = _of_kind(KINDS[kind], summary, given)
    elif summary.present == 0:
        column, notes = Constant(name), ["has no values: left out"]
    elif summary.counts is not None and len(summary.counts) == 1:
        [value] = summary.counts
        column = Constant(name, value=_levels(summary)[0] if _has_numbers(summary) else _plain(value))
        if summary.absent:
            notes.append(f"is {value!r} or missing: left out; fill the empty cells with another value to model it")
    elif _is_beyond_double(summary):
        column = Identifier(name, numbers=True)
        notes.append("has whole numbers beyond 2**53, which double precision cannot tell apart: left out, as names")
    elif 2 <= len(summary.order) <= _MAX_LEVELS:
        column = Ordered(name, summary.order)
    elif _has_numbers(summary):
        column = _number(summary)
    elif summary.type is not None and ("date" in str(summary.type) or "timestamp" in str(summary.type)):
        column = _time(summary, None)
    else:
        column, notes = _text(summary)
    if given:
        column = Column.from_dict(column.to_dict() | given)
    if isinstance(column, Bounded) and _has_numbers(summary) and summary.low < math.inf:
        high = math.inf if column.high is None else column.high
        low_seen, high_seen = _ends(summary, set() if {"low", "high"} & given.keys() else set(column.spikes))
        if low_seen < column.low or high_seen > high:
            raise ValueError(
                f"column {name!r} has cells from {low_seen:g} to {high_seen:g}, outside of the range from "
                f"{column.low:g} to {high:g} that was given. Make it wider, or correct the cells."
            )
    if isinstance(column, Continuous) and "spikes" not in given:
        low_seen, high_seen = _ends(summary, set(column.spikes))
        far = high_seen - low_seen
        codes = [s for s in column.spikes if s and (s < low_seen - far or s > high_seen + far)]
        for spike in codes if len(column.spikes) <= _MOST_CODES else []:
            notes.append(
                f"is often {spike:.12g}, far from all others: if that stands for a missing cell, "
                f"say missing='{spike:.12g}'"
            )
    if isinstance(column, Time) and column.zone:
        notes.append("has times with a zone: they are taken, and written, in UTC")
    if isinstance(column, (Continuous, Time)) and column.step is None and _is_rounded(summary, column):
        notes.append("has more steps than float32 can tell apart: it is kept to 7 digits")
    content = column.to_dict() | ({"missing": _tidy(summary.missing)} if summary.missing else {})
    return Column.from_dict(content), [f"column {name!r} {note}" for note in notes]


def decimal_signs(summaries: list[Summary]) -> tuple[str, str]:
    """Returns the decimal sign, and the separator of thousands, of text cells that are numbers only if read so.

    Raises:
        ValueError: when both readings are possible, or columns differ.
    """
    found: dict[tuple[str, str], Summary] = {}
    for summary in summaries:
        others = [] if summary.numeric else summary.non_numbers()
        if not others:
            continue
        if all(_POINT_THOUSANDS.fullmatch(v) for v in others):
            found[",", "."] = summary
            continue
        if all(_COMMA_THOUSANDS.fullmatch(v) for v in others):
            both = all(_COMMA_DECIMAL.fullmatch(v) for v in others)
            if both and not any("." in v for v in _words(summary)):
                raise ValueError(
                    f"column {summary.name!r}{_row_of(summary, others[0])}: {others[0]!r} may have a decimal "
                    "comma or a separator of thousands. Say decimal=',' or thousands=','."
                )
            found[".", ","] = summary
        elif all(_COMMA_DECIMAL.fullmatch(v) for v in others):
            found[",", "." if any("." in v for v in others) else ""] = summary
    if len({decimal for decimal, _ in found}) > 1:
        a, b = (s.name for s in list(found.values())[:2])
        raise ValueError(f"columns {a!r} and {b!r} have different decimal signs. Write all numbers in one way.")
    signs = max(found, default=(".", ""))  # with a separator of thousands, if one column has it
    where = found[signs].name if found else ""
    for summary in summaries:
        # Some with three digits after a point, others without a point: numbers as 12.5 would have fewer digits.
        if summary.numeric and summary.like_thousands and summary.text_decimals == (0, 3):
            if signs[0] == ",":
                signs = (",", ".")
                continue
            one = next((v for v in _words(summary) if "." in v), "1.234")
            raise ValueError(
                f"column {summary.name!r}{_row_of(summary, one)}: {one!r} may have a decimal point or a separator of "
                "thousands. Say decimal='.' or decimal=',', thousands='.'."
            )
    for summary in summaries if signs[0] == "," else ():
        points = [v for v in _words(summary) if "." in v]
        if points and summary.numeric and not (signs[1] == "." and summary.like_thousands):
            raise ValueError(
                f"column {summary.name!r}{_row_of(summary, points[0])}: {points[0]!r} has a point, where "
                f"{where!r} has decimal commas. Write all numbers in one way, or say decimal and thousands."
            )
    return signs


def _has_numbers(summary: Summary) -> bool:
    return summary.numeric and not summary.leading_zeros


def _is_beyond_double(summary: Summary) -> bool:
    """Returns whether different whole numbers are one in double precision: names, such as numbers of cards."""
    if not _has_numbers(summary) or max(abs(summary.low), abs(summary.high)) <= 2**53:
        return False
    written = set(map(str, summary.some if summary.counts is None else summary.counts))
    return len(set(map(float, written))) < len({int(w) for w in written if w.lstrip("+-").isdigit()})


def _of_kind(cls: type[Column], summary: Summary, given: dict[str, Any]) -> Column:
    """Returns a column of a kind that was asked for; fields in `given` replace those that are found."""
    name, counts = summary.name, summary.counts
    if issubclass(cls, (Continuous, Count)):
        if not summary.numeric or summary.present == 0:
            example = _example(summary)
            raise ValueError(
                f"column {name!r} cannot be {cls.__name__}: {example} is no number. Say missing={example} if it means "
                "a missing cell."
            )
        if issubclass(cls, Count):
            return _count(summary)
        return _continuous(cls, summary, given)
    if cls is Time:
        return _time(summary, given.get("format"))
    if issubclass(cls, Discrete):
        if "levels" in given:
            return cls(name, tuple(given["levels"]))
        if counts is None:
            raise ValueError(f"column {name!r} cannot be {cls.__name__}: it has too many different values.")
        return cls(name, summary.order if cls is Ordered and summary.order else _levels(summary))
    if cls is Constant:
        return Constant(name, value=given.get("value", _plain(next(iter(counts))) if counts else None))
    return Identifier(name, numbers=summary.numeric and summary.present > 0)


def _is_rounded(summary: Summary, column: Continuous | Time) -> bool:
    if isinstance(column, Time):
        return column.loc + 2 * column.scale > _MAX_STEPS / 2
    return summary.decimals == 0 and summary.high - summary.low > _MAX_STEPS


def _number(summary: Summary) -> Column:
    name, counts, n = summary.name, summary.counts, summary.present
    whole = summary.decimals == 0
    distinct = math.inf if counts is None else len(counts)
    if counts is not None and distinct <= 100:  # "1" and "1.0" are one number
        distinct = len(set(map(float, counts)))
    if whole and summary.absent == 0 and n > 2:
        all_differ = distinct == n or (counts is None and summary.increasing)
        if summary.consecutive or (all_differ and _ID_NAME.search(name)):
            return Identifier(name, numbers=True)
    if distinct == 2:
        return Binary(name, _levels(summary))
    if whole and summary.low == 0 and summary.divisor == 1 and _SCALE < distinct <= _FEW and _thins_out(summary):
        return _count(summary)  # a larger one may come
    if distinct <= _FEW and n >= _CELLS_PER_LEVEL * distinct and summary.decimals is not None:
        unit = (summary.divisor or 1) / 10**summary.decimals
        if (summary.high - summary.low) / unit < _GAPS * distinct:  # 1 to 16, but not 0, 1,485, 1,573, ...
            return Ordered(name, _levels(summary))
    if whole and summary.low == 0 and summary.high <= _MAX_COUNT and _is_count(summary):
        return _count(summary)
    return _continuous(None, summary, {})


def _is_count(summary: Summary) -> bool:
    """Returns whether whole numbers from 0 thin out from their mode on, without spikes: the shape of a count."""
    sample = summary.sample
    return bool(sample.mean() < 50 and not _spikes(sample, 1.0) and np.median(sample) < (summary.high + 1) / 2)


def _thins_out(summary: Summary) -> bool:
    """Returns whether a count has few values in the upper third of its range, where codes have as many as elsewhere."""
    return _is_count(summary) and float(np.mean(summary.sample > 2 / 3 * summary.high)) < 0.15


def _count(summary: Summary) -> Count:
    sample = summary.sample
    return Count(summary.name, loc=_tidy(sample.mean()), scale=_tidy(max(float(sample.std()), 0.1)))


def _continuous(kind: type[Continuous] | None, summary: Summary, given: dict[str, Any]) -> Continuous:
    sample = summary.sample
    step = _step(summary)
    spikes = tuple(given.get("spikes", _spikes(sample, step)))
    rest = sample[~np.isin(sample, spikes)]
    rest = rest if len(rest) else sample
    ends = given
    if kind is None:
        kind = _continuous_kind(summary, rest, set(spikes))
        if kind is Real and _ends(summary, set(spikes))[0] >= 0 and rest.mean() < _FAR * max(rest.std(), 1e-300):
            kind, ends = Bounded, {"low": 0.0, "high": None}  # so that no negative number is drawn
    fields: dict[str, Any] = {"spikes": spikes, "step": step}
    if kind is Bounded:
        low = float(ends.get("low", min(0.0, summary.low)))
        high = ends.get("high", next((b for a, b in _RANGES if a == low and b >= summary.high), summary.high))
        fields |= {"low": low, "high": None if high is None else float(high)}
    if kind is Positive:
        if not (rest > 0).all():
            raise ValueError(f"column {summary.name!r} cannot be Positive: it holds {float(rest.min()):g}.")
        rest = np.log(rest)
    loc, scale = _location(rest, step if kind is not Positive else None)
    if kind is Real and abs(loc) > 30 * scale:  # keeps precision in float32
        unit = step if step is not None else 10.0 ** math.floor(math.log10(scale))
        fields["origin"] = _tidy(round(loc / unit) * unit, 15)
    decimals = summary.decimals
    fewest = 0
    if summary.text_decimals is not None:
        fewest, most = summary.text_decimals
        if decimals is None:
            fewest = 0
        else:
            decimals, fewest = (most, fewest) if most <= 15 else (decimals, 0)
    elif decimals is not None and "int" not in str(summary.type):
        decimals = max(decimals, 1)  # floats stay floats
    loc = round(loc, 4 - math.floor(math.log10(scale)))
    return kind(summary.name, loc, _tidy(scale), decimals=decimals, min_decimals=fewest, **fields)


def _step(summary: Summary) -> float | None:
    if summary.decimals is None or summary.divisor in (None, 0):
        return None
    divisor = summary.divisor if summary.present >= 1000 else 1
    unit = divisor if summary.decimals == 0 else _tidy(divisor / 10**summary.decimals, 12)
    steps = (summary.high - summary.low) / unit
    return unit if steps <= (_MAX_STEPS if summary.decimals == 0 else _MAX_STEPS_OF_DECIMALS) else None


def _continuous_kind(summary: Summary, rest: np.ndarray, spikes: set[float]) -> type[Continuous]:
    low, high = summary.low, summary.high
    for a, b in _RANGES:
        margin = 0.02 * (b - a) if b == 1 else 0.0
        if a <= low <= a + margin and b - margin <= high <= b:
            return Bounded
        if a == 0 <= low and high == b and b in spikes:  # a share that often is all
            return Bounded
    if len(rest) < 20 or not rest.min() > 0 or not (_ends(summary, spikes)[0] > 0 or spikes):
        return Real
    if any(float(v) <= 0 and float(v) not in spikes for v in summary.counts or ()) or (
        summary.counts is None and low <= 0 and low not in spikes
    ):
        return Real
    if 0.0 in spikes or float(rest.mean()) < 2 * float(rest.std()):  # a normal distribution would reach below 0
        return Positive
    logs, z = np.log(rest), (rest - rest.mean()) / max(float(rest.std()), 1e-300)
    # The gain of a lognormal over a normal distribution, in nats per value.
    gain = math.log(max(float(rest.std()), 1e-300)) - math.log(max(float(logs.std()), 1e-300)) - float(logs.mean())
    return Positive if gain > 0.05 and float((z**3).mean()) > 0.5 else Real


def _ends(summary: Summary, spikes: set[float]) -> tuple[float, float]:
    """Returns the lowest and the highest of all values but spikes; where they were not counted, of all values."""
    others = [v for v in map(float, summary.counts or ()) if v not in spikes]
    return (min(others), max(others)) if others else (summary.low, summary.high)


def _spikes(values: np.ndarray, step: float | None) -> tuple[float, ...]:
    """Returns values that occur far more often than those around them.

    A value with a density occurs once. For rounded values the count is compared with the mean of the two steps next to
    it, and with the median of the ten steps around it, where steps without values count 0.
    """
    distinct, counts = np.unique(values, return_counts=True)
    often = np.flatnonzero(counts >= max(10, _SPIKE_SHARE * len(values)))
    found = []
    for i in often:
        usual = 0.0
        if step is not None:
            a, b = np.searchsorted(distinct, [distinct[i] - 5.5 * step, distinct[i] + 5.5 * step])
            inside = (distinct[i] - 5.5 * step >= distinct[0]) + (distinct[i] + 5.5 * step <= distinct[-1])
            around = np.concatenate([counts[a:i], counts[i + 1 : b]])
            usual = float(np.median(np.pad(around, (0, max(0, 5 * max(1, inside) - len(around))))))
            # The steps next to it show the top of a narrow peak.
            a, b = np.searchsorted(distinct, [distinct[i] - 1.5 * step, distinct[i] + 1.5 * step])
            sides = int(distinct[i] > distinct[0]) + int(distinct[i] < distinct[-1])
            usual = max(usual, float(counts[a:b].sum() - counts[i]) / max(1, sides))
        if counts[i] > 4 * usual and counts[i] - usual > 5 * math.sqrt(usual + 1):
            found.append(i)
    found = sorted(found, key=lambda i: -counts[i])[:_MAX_SPIKES]
    if len(found) == len(distinct):  # something has to be left for the density
        found = found[:-1]
    return tuple(sorted(float(distinct[i]) for i in found))


def _location(values: np.ndarray, step: float | None) -> tuple[float, float]:
    """Returns mean and standard deviation without the farthest 0.5 percent on either side, which are drawn in."""
    low, high = np.quantile(values, [0.005, 0.995])
    inner = np.clip(values, low, high)
    scale = float(inner.std())
    return float(inner.mean()), scale if scale > 0 else (step or abs(float(inner.mean())) or 1.0)


def _time(summary: Summary, format: str | None) -> Time:
    import pyarrow as pa
    import pyarrow.compute as pc

    name = summary.name
    values = summary.some if summary.counts is None else list(summary.counts)
    if not values:
        raise ValueError(f"column {name!r} cannot be Time: it has no values.")
    cells = pa.array(values, pa.string()) if isinstance(values[0], str) else pa.array(values)
    if not isinstance(values[0], str):
        times, format = cells.cast(pa.timestamp("us"), safe=False), "iso"
    else:
        if format is None:
            format = _format(summary, values) or "iso"
        times = parse_times(cells, format)
        if times.null_count:
            wrong = values[times.is_null().to_pylist().index(True)]
            raise ValueError(
                f"column {name!r}{_row_of(summary, wrong)}: {wrong!r} is no time of the format {format!r}."
            )
    zone = format == "iso" and _has_zone(summary, values)
    micro = pc.cast(times, pa.int64()).to_numpy(zero_copy_only=False)
    of_unit = {"day": 86_400_000_000, "minute": 60_000_000, "second": 1_000_000}
    unit = next((u for u, size in of_unit.items() if (micro % size == 0).all()), "second")
    if summary.counts is None and unit == "minute":  # seconds may come later
        unit = "second"
    counts = np.array([1 if summary.counts is None else summary.counts[v] for v in values])
    first = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=int(micro.min()))
    whole = bool((micro % of_unit[unit] == 0).all())
    encoded = (micro - micro.min()) / of_unit[unit]
    loc, scale = _location(np.repeat(encoded, np.minimum(counts, 1000)), 1.0)
    step = 1 if whole and encoded.max() <= _MAX_STEPS else None
    origin = first.date().isoformat() if unit == "day" else first.isoformat(sep=" ")
    return Time(name, _tidy(loc), _tidy(scale), origin=origin, unit=unit, step=step, format=format, zone=zone)


def _has_zone(summary: Summary, values: list[Any]) -> bool:
    """Returns whether times have a zone.

    Raises:
        ValueError: when some have one and others not.
    """
    if not isinstance(values[0], str):
        return "tz=" in str(summary.type)
    found = [re.search(ZONE, v) is not None for v in values]
    if any(found) and not all(found):
        without, some = values[found.index(False)], values[found.index(True)]
        raise ValueError(
            f"column {summary.name!r}{_row_of(summary, without)}: {without!r} has no zone, where others have, such as "
            f"{some!r}. Write all times with one, or none."
        )
    return any(found)


def _format(summary: Summary, values: list[str]) -> str | None:
    """Returns the format of text that holds times, None for other text."""
    import pyarrow as pa

    if not all(any(c.isdigit() for c in v) and 6 <= len(v) <= 40 for v in values[:20]):
        return None
    cells = pa.array(values, pa.string())
    reads: dict[str, Any] = {}
    whole: list[str] = []
    for formats in (_FORMATS, _SHORT_FORMATS):
        reads |= {f: parse_times(cells, f) for f in formats}
        whole = whole or [f for f in formats if reads[f].null_count == 0]
    if len(whole) == 1:
        _check_century(summary, values, whole[0], reads[whole[0]])
        return whole[0]
    if len(whole) > 1:
        other = values[[a != b for a, b in zip(reads[whole[0]].to_pylist(), reads[whole[1]].to_pylist())].index(True)]
        raise ValueError(
            f"column {summary.name!r}{_row_of(summary, other)}: {other!r} may be {whole[0]} or {whole[1]}. "
            f"Say which (overrides, --kinds): {{{summary.name}: {{kind: Time, format: '{whole[0]}'}}}}."
        )
    if parse_times(cells, "iso").null_count == 0:
        return "iso"
    readable = np.any([times.is_valid().to_numpy(zero_copy_only=False) for times in reads.values()], axis=0)
    if readable.mean() > 0.5:
        best = max(reads, key=lambda f: len(values) - reads[f].null_count)
        at = reads[best].is_null().to_pylist().index(True)
        usual = reads[best].is_valid().to_pylist().index(True)
        raise ValueError(
            f"column {summary.name!r}{_row_of(summary, values[at])}: {values[at]!r}, where other cells are "
            f"times such as {values[usual]!r}. Write all in one format, leave cells without a time empty, or give the "
            "kind Category."
        )
    return None


def _check_century(summary: Summary, values: list[str], format: str, times: Any) -> None:
    """Raises a ValueError if years of two digits, read as 1969 to 2068, are in the future: these may be of 19.."""
    import pyarrow.compute as pc

    if "%y" in format:
        late = pc.greater(times, datetime.datetime.now() + datetime.timedelta(days=366)).to_pylist()
        if True in late:
            wrong = values[late.index(True)]
            raise ValueError(
                f"column {summary.name!r}{_row_of(summary, wrong)}: {wrong!r} has a year of two digits, and may be of "
                "the past or of the future. Write years with four digits; or read 69 to 99 as 1969 to 1999 and 00 to "
                f"68 as 2000 to 2068 (overrides, --kinds): {{{summary.name}: {{kind: Time, format: '{format}'}}}}."
            )


def _text(summary: Summary) -> tuple[Column, list[str]]:
    name, counts, n = summary.name, summary.counts, summary.present
    if "bool" in str(summary.type):
        return Binary(name, (False, True)), []
    values = summary.some if counts is None else list(counts)
    if all(isinstance(v, str) for v in values) and _format(summary, values) is not None:
        return _time(summary, None), []
    others = summary.non_numbers()
    numbers = len(values) - len(others)
    if numbers and not others and not summary.leading_zeros and not summary.dialect.has_plain_numbers:
        raise ValueError(
            f"column {name!r}{_row_of(summary, values[0])}: {values[0]!r} is no number with the decimal sign "
            f"{summary.dialect.decimal!r}{_thousands(summary)}. Write all numbers in one way, or give other signs."
        )
    notes: list[str] = []
    if numbers == 0 and sum(map(bool, map(_WITH_SIGN.fullmatch, values))) > 0.9 * len(values) and len(values) > _FEW:
        notes.append(f"holds numbers with signs, such as {values[0]!r}: take the signs away to model them as numbers")
    if counts is None:
        return Identifier(name), [*notes, "has too many different words to model: left out"]
    if numbers and others and not summary.leading_zeros:
        if 2 * sum(counts[v] for v in others) < n and len(values) > _FEW:
            raise ValueError(
                f"column {name!r}{_row_of(summary, others[0])}: {others[0]!r}, where most cells are numbers. "
                f"Say missing={others[0]!r} if it means missing, give separators of thousands (thousands=' '), correct "
                "the cell, or give the kind Category."
            )
        notes.append(f"holds words and numbers, such as {others[0]!r}: its values are taken as words")
    if len(values) > 2 and ((len(values) == n and n >= 5) or (len(values) > _FEW and 2 * len(values) > n)):
        notes.append(f"has {len(values):,} different values in {n:,} cells: left out, as names of rows or free text")
        return Identifier(name), notes
    if len(values) > _MAX_LEVELS:
        notes.append(
            f"has {len(values):,} levels, more than {_MAX_LEVELS:,}: left out; give the kind Category to keep it"
        )
        return Identifier(name), notes
    return (Binary if len(values) == 2 else Category)(name, _levels(summary)), notes


def _levels(summary: Summary) -> tuple:
    """Returns the values in their order, of one type: whole numbers as int."""
    values = list(summary.counts or ())
    if _has_numbers(summary):
        numbers = sorted({float(v) for v in values})
        return tuple(int(v) if summary.decimals == 0 else v for v in numbers)
    if all(isinstance(v, bool) for v in values):
        return (False, True)
    return tuple(sorted(map(str, values)))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _words(summary: Summary) -> list[str]:
    """Returns the values that are text: those that were counted, or some of them where there are too many."""
    return [v for v in (summary.some if summary.counts is None else summary.counts) if isinstance(v, str)]


def _thousands(summary: Summary) -> str:
    return f" and {summary.dialect.thousands!r} between thousands" if summary.dialect.thousands else ""


def _row_of(summary: Summary, value: Any) -> str:
    row = summary.first_rows.get(value)
    return "" if row is None else f", row {row:,}"


def _example(summary: Summary) -> str:
    others = summary.non_numbers()
    return repr(others[0]) if others else f"a value of type {summary.type}"


def _tidy(value: float, digits: int = 6) -> float:
    """Returns a number with few digits, as a person reads it in a schema."""
    return float(f"{float(value):.{digits}g}")
