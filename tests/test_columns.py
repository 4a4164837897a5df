"""The kinds of columns: cells become numbers and the same cells again, and cells that do not fit are refused."""

import datetime
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrovae.data import (
    Binary,
    Bounded,
    Category,
    CellError,
    Column,
    Constant,
    Count,
    Identifier,
    Ordered,
    Positive,
    Real,
    Schema,
    Time,
    columns,
)

# A column of each kind, with cells as a file writes them.
CASES = {
    "whole numbers": (Real("x", 40, 10, step=1, decimals=0), ["39", "-2", None, "16777215"]),
    "decimals": (Real("x", 40, 10, step=0.01, decimals=2, min_decimals=2), ["3.50", "-0.01", "1234.56", None]),
    "few digits": (Real("x", 0, 1, step=0.25, decimals=2), ["3.25", "0.5", "-7", None]),
    "near a million": (Real("x", 1e6, 1, step=0.001, origin=1e6, decimals=3), ["1000000.123", "999998.765", None]),
    "floats": (Real("x", 0, 1), ["0.1", "-1.2345678e-05", "3e+20", None]),
    "spikes": (Real("x", 0, 1, spikes=(0.1, 99999.0), decimals=1), ["0.1", "99999", "-3.2", None]),
    "positive": (Positive("x", 3, 1, spikes=(0.0, -1.0), step=1, decimals=0), ["0", "-1", "1", "15024", None]),
    "bounded": (Bounded("x", 55, 1, low=50, high=60, decimals=1), ["50", "60", "57.3", None]),
    "from zero on": (Bounded("x", 3, 1, low=0, high=None, step=1, decimals=0), ["0", "16777215", None]),
    "count": (Count("x", 3, 2), ["0", "7", None]),
    "two words": (Binary("x", ("no", "yes")), ["yes", "no", None]),
    "two numbers": (Binary("x", (0, 1)), ["1", "0", None]),
    "words": (Category("x", ("a", "b c", "é,\"'")), ["é,\"'", "a", None, "b c"]),
    "codes": (Category("x", ("01002", "02138")), ["02138", None, "01002"]),
    "ordered words": (Ordered("x", ("S", "M", "L")), ["L", "S", None]),
    "ordered numbers": (Ordered("x", (0.5, 1.0, 1.5)), ["1.5", "0.5", None]),
    "dates": (Time("x", 0, 9, origin="2020-02-28", unit="day", step=1, format="%Y-%m-%d"), ["2020-03-01", None]),
    "early dates": (Time("x", 0, 9, origin="2020-02-28", unit="day", step=1, format="%d.%m.%Y"), ["31.12.1899"]),
    "minutes": (
        Time("x", 0, 9, origin="2020-02-28 23:50", unit="minute", step=1, format="%Y-%m-%d %H:%M"),
        ["2020-02-29 00:10", None],
    ),
    "seconds": (
        Time("x", 0, 9, origin="2020-02-28 23:50:07", unit="second", step=1, format="%Y-%m-%dT%H:%M:%S"),
        ["2020-02-28T23:50:06", None],
    ),
    "fractions": (
        Time("x", 0, 9, origin="2020-01-01 10:00:00", unit="second", format="iso"),
        ["2020-01-01T10:00:00.250000", "2020-01-01T10:00:01", None],
    ),
}


def through_float32(column: Column, cells: list) -> pa.Array:
    """Returns the values that come back after the tensor's precision."""
    return column.decode(torch.from_numpy(column.encode(cells)).float())


@pytest.mark.parametrize("name", CASES)
def test_cells_come_back_as_they_are_written(name):
    column, cells = CASES[name]
    values = through_float32(column, cells)
    assert column.text(values) == cells
    encoded = column.encode(cells)
    assert encoded.dtype == np.float64 and np.isnan(encoded).tolist() == [cell is None for cell in cells]
    # The values themselves, of their own types, are encoded as their text is.
    assert np.array_equal(column.encode(values), encoded, equal_nan=True) or name == "floats"
    assert column.encode(pa.nulls(2, pa.string())).tolist() == pytest.approx([math.nan] * 2, nan_ok=True)


@pytest.mark.parametrize("name", CASES)
def test_columns_and_schemas_come_back_from_yaml(name):
    column, _ = CASES[name]
    assert Column.from_dict(column.to_dict()) == column
    schema = Schema([column, Constant("c", value="k"), Constant("empty"), Identifier("i", numbers=True, missing=0.25)])
    assert Schema.from_yaml(schema.to_yaml()) == schema


def test_every_kind_is_tested():
    tested = {type(column) for column, _ in CASES.values()} | {Constant, Identifier}
    assert tested == set(columns.KINDS.values())


@given(st.integers(-(10**7), 10**7), st.integers(0, 3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_multiples_of_a_step_are_exact(multiple, decimals):
    column = Real("x", 0, 1, step=10.0**-decimals, decimals=decimals)
    value = multiple / 10**decimals
    assert through_float32(column, [value]).to_pylist() == [value]


@given(st.integers(-(10**6), 10**6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_origin_keeps_precision(multiple):
    """Numbers of 13 digits, which float32 without an origin would round to 65,536."""
    column = Real("x", 1e12, 10, step=0.01, origin=1e12, decimals=2)
    value = round(1e12 + multiple / 100, 2)
    assert through_float32(column, [value]).to_pylist() == [value]


def test_spikes_are_equal_to_encoded_values_in_float32():
    column = Real("x", 1e6, 1, spikes=(1e6 + 0.1, 0.3), origin=1e6)
    x = torch.from_numpy(column.encode([1e6 + 0.1, 0.3])).float()
    assert x.tolist() == list(column.encoded_spikes)


def test_missing_values_of_other_libraries():
    values = np.array([1.0, np.nan, 3.0])
    assert np.array_equal(Real("x", 0, 1).encode(values), values, equal_nan=True)
    assert np.array_equal(Category("x", (1, 3)).encode(values), [0, np.nan, 1], equal_nan=True)
    assert np.array_equal(Category("x", ("1", "3")).encode(pa.array([1, None, 3])), [0, np.nan, 1], equal_nan=True)
    assert np.array_equal(Binary("x", (False, True)).encode([True, None, False]), [1, np.nan, 0], equal_nan=True)


def test_times_of_other_types():
    column = Time("x", 0, 9, origin="2020-01-01", unit="day", step=1)
    for days in (
        [datetime.date(2020, 1, 3)],
        [datetime.datetime(2020, 1, 3)],
        np.array(["2020-01-03"], "datetime64[D]"),
    ):
        assert column.encode(days).tolist() == [2]


def test_cycles_of_times():
    """The place in a day, a week and a year is that of the calendar."""
    start = datetime.datetime(2021, 3, 5, 6, 30)
    for unit in ("second", "minute", "day"):
        column = Time("x", 0, 1, origin=str(start), unit=unit)
        x = column.encode([str(start + datetime.timedelta(days=300, hours=5))])[0]
        then = start + datetime.timedelta(days=300, hours=5)
        places = {name: (x + place) % length / length for name, (length, place) in column.cycles.items()}
        of_day = (then.hour + then.minute / 60) / 24
        assert ("day" in places) == (unit != "day")
        assert places.get("day", of_day) == pytest.approx(of_day, abs=1e-9)
        assert places["week"] == pytest.approx((then.weekday() + of_day) / 7, abs=1e-9)
        assert places["year"] == pytest.approx((then.timetuple().tm_yday - 1 + of_day) / 365.2425, abs=1e-9)


BAD_CELLS = {
    "a word": (Real("x", 0, 1), ["1", "two"], 1, "'two' is not a number"),
    "underscores": (Real("x", 0, 1), ["1_000"], 0, "not a number"),
    "infinity": (Real("x", 0, 1), ["1", "2", "-inf"], 2, "infinite"),
    "between steps": (Real("x", 0, 1, step=1), ["1", "2.5"], 1, "not a multiple of the step 1"),
    "zero": (Positive("x", 0, 1), ["1", "0"], 1, "above 0"),
    "above": (Bounded("x", 0.5, 1, low=0, high=1), ["0.5", "1.01"], 1, "0 to 1"),
    "below": (Bounded("x", 0.5, 1, low=0, high=None), ["0.5", "-0.01"], 1, "0 or more"),
    "no count": (Count("x", 1, 1), ["1", "2", "0.5"], 2, "no count"),
    "negative count": (Count("x", 1, 1), ["-1"], 0, "no count"),
    "new level": (Category("x", ("a", "b")), ["a", None, "c"], 2, "'c' is none of the 2 levels"),
    "new number": (Ordered("x", (1, 2)), ["1", "3"], 1, "none of the 2 levels"),
    "another format": (Time("x", 0, 1, format="%d.%m.%Y"), ["01.02.2020", "2020-02-01"], 1, "'%d.%m.%Y'"),
    "half a day": (Time("x", 0, 1, step=1), ["2020-01-01", "2020-01-01T12:00:00"], 1, "whole day"),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_cells_that_do_not_fit_are_refused(name):
    column, cells, index, message = BAD_CELLS[name]
    with pytest.raises(CellError, match=message) as error:
        column.encode(cells)
    assert error.value.index == index


BAD_COLUMNS = {
    "no kind": ({"name": "x"}, "kind must be one of Real"),
    "another kind": ({"name": "x", "kind": "Gaussian"}, "'Gaussian'"),
    "unknown field": ({"name": "x", "kind": "Count", "loc": 1, "scale": 1, "sigma": 2}, "has no sigma"),
    "lacking field": ({"name": "x", "kind": "Category"}, "needs levels"),
    "no scale": ({"name": "x", "kind": "Real", "loc": 0, "scale": 0}, "scale must be positive"),
    "infinite": ({"name": "x", "kind": "Real", "loc": math.inf, "scale": 1}, "loc must be a finite number"),
    "text": ({"name": "x", "kind": "Real", "loc": "a", "scale": 1}, "loc must be a finite number, got 'a'"),
    "step": ({"name": "x", "kind": "Real", "loc": 0, "scale": 1, "step": -1}, "step must be positive"),
    "bounds": ({"name": "x", "kind": "Bounded", "loc": 0, "scale": 1, "low": 1, "high": 1}, "low must be below high"),
    "one level": ({"name": "x", "kind": "Category", "levels": ["a"]}, "at least 2 different levels"),
    "levels twice": ({"name": "x", "kind": "Category", "levels": ["a", "b", "a"]}, "different levels"),
    "levels of two types": ({"name": "x", "kind": "Category", "levels": ["a", 1]}, "all text or all numbers"),
    "three of two": ({"name": "x", "kind": "Binary", "levels": ["a", "b", "c"]}, "two levels"),
    "unit": ({"name": "x", "kind": "Time", "loc": 0, "scale": 1, "unit": "year"}, "unit must be one of"),
    "origin": ({"name": "x", "kind": "Time", "loc": 0, "scale": 1, "origin": "soon"}, "origin must be an ISO time"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_columns_that_make_no_sense_are_refused(name):
    content, message = BAD_COLUMNS[name]
    with pytest.raises(ValueError, match=f"'x'.*{message}"):
        Column.from_dict(content)


def test_schemas_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="'a' occurs twice"):
        Schema([Real("a", 0, 1), Real("a", 0, 1)])
    with pytest.raises(ValueError, match="none can be modelled"):
        Schema([Constant("a")])
    for text in ("columns: 3", "- a", "columns: [{kind: Real}]", "", "columns: [3]", "{", "dialect: {quote: x}"):
        with pytest.raises(ValueError, match="the schema|kind Real|column None|YAML"):
            Schema.from_yaml(text)
