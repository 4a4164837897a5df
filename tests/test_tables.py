"""Tables: what is found out about files, encoding them, and refusing what could be read in two ways."""

import csv
import datetime
import decimal
import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pyrovae import data
from pyrovae.cli import main
from pyrovae.data import Positive, Real, Schema, Table, Time, load

TABLES = Path(__file__).parent / "tables"

# The kinds of the columns of each small file.
KINDS = {
    "adult.data": "Positive Category Positive Category Ordered Category Category Category Category Binary Positive "
    "Positive Positive Category Binary",
    "bank.tsv": "Bounded Category Real Binary Binary Positive Binary",
    "cities.csv": "Identifier Positive Positive",
    "constant.csv": "Constant Constant Constant Real",
    "flags.csv": "Binary Binary Bounded",
    "genes.csv": "Positive Real Bounded Binary",
    "houses.csv": "Identifier Category Positive Positive Ordered Real Binary",
    "iris.data": "Bounded Bounded Bounded Bounded Category",
    "latin-1.csv": "Category Real",
    "near-a-million.csv": "Real Binary",
    "pandas-index.csv": "Identifier Real Bounded",
    "ratings.csv": "Ordered Ordered Real",
    "sensors.csv": "Time Category Real Positive Category",
    "shares.csv": "Bounded Bounded Category",
    "stock.csv": "Time Real Real Positive",
    "survey.csv": "Ordered Ordered Category Identifier",
    "titanic.csv": "Identifier Binary Ordered Identifier Binary Bounded Ordered Identifier Positive Identifier "
    "Category",
    "trial.xlsx": "Identifier Time Bounded Binary",
    "umsatz.csv": "Time Category Positive Bounded",
    "utf-16.csv": "Category Bounded",
    "visits.csv": "Count Ordered Category",
    "weather.csv": "Time Real Category Positive",
    "wine.csv": "Ordered Real Positive Bounded Bounded Positive Bounded Bounded Bounded Bounded Positive Bounded "
    "Bounded Positive",
}
# Columns whose cells are written in another way: numbers with more digits than float32 has, with exponents or with
# separators of thousands.
WRITTEN_DIFFERENTLY = {
    "cities.csv": {"inhabitants", "area_km2"},
    "genes.csv": {"gene_a", "gene_b"},
    "sensors.csv": {"temperature", "vibration"},
    "stock.csv": {"Volume"},
    "umsatz.csv": {"Umsatz"},
}
OPTIONS = {"latin-1.csv": {"encoding": "latin-1"}}


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {name: Table(TABLES / name, **OPTIONS.get(name, {})) for name in KINDS}


def rows_of(path: Path, table: Table) -> list[list[str]]:
    """Returns the rows of a text file, by an independent reader."""
    dialect = table.schema.dialect
    with open(path, encoding=dialect.encoding.replace("utf-8", "utf-8-sig"), newline="") as file:
        rows = list(csv.reader(file, delimiter=dialect.delimiter, skipinitialspace=True))
    return [[cell.strip() for cell in row] for row in rows[int(dialect.header) :] if row]


def number(cell: str, table: Table) -> float:
    return float(cell.replace(table.schema.dialect.thousands or " ", "").replace(",", "."))


def test_all_files_are_tested():
    assert set(KINDS) == {path.name for path in TABLES.iterdir()} - {"README.md"}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_columns(tables, name):
    assert [column.kind for column in tables[name].schema.columns] == KINDS[name].split()


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith("xlsx")])
def test_files_come_back_as_they_are_written(tables, name, tmp_path):
    table, copy = tables[name], tmp_path / name
    table.schema.write(table.x, copy)
    given, written = rows_of(TABLES / name, table), rows_of(copy, table)
    assert len(given) == len(written) == len(table)
    for i, column in enumerate(table.schema.columns):
        a, b = [row[i] for row in given], [row[i] for row in written]
        if column.name in WRITTEN_DIFFERENTLY.get(name, ()):
            a, b = ([number(cell, table) for cell in cells] for cells in (a, b))
            assert b == pytest.approx(a, rel=2**-23)
        elif column.modelled or column.kind == "Constant":
            assert a == b, column
    # The schema reads what it wrote, by way of YAML too, and all numbers are the same again.
    schema = Schema.from_yaml(table.schema.to_yaml())
    assert schema == table.schema
    assert torch.equal(Table(copy, schema, **OPTIONS.get(name, {})).x.nan_to_num(-1e9), table.x.nan_to_num(-1e9))


@pytest.mark.parametrize("name", KINDS)
def test_descriptions_fit_in_a_terminal(tables, name):
    lines = tables[name].schema.describe().splitlines()
    assert len(lines) == 1 + len(KINDS[name].split()) and max(map(len, lines)) <= 80


def test_what_is_found_out_of_adult(tables):
    columns = {column.name: column for column in tables["adult.data"].schema.columns}
    assert columns["workclass"].missing == 33 / 400 and columns["age"].missing == 0
    assert columns["capital-gain"].spikes[0] == 0 and columns["hours-per-week"].spikes.count(40) == 1
    assert {columns[name].step for name in ("age", "fnlwgt", "capital-gain", "hours-per-week")} == {1}
    assert columns["education-num"].levels == tuple(range(2, 17))
    assert tables["adult.data"].schema.dialect.missing[0] == "?"
    assert tables["adult.data"].notes == ["missing cells are written '?' (70)"]


def test_location_scale_and_spikes_are_those_of_the_training_rows():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(10, 1, 500), np.full(50, 10.5), rng.normal(1000, 1, 500), np.full(50, 1000.5)])
    words = ["a"] * 550 + ["b"] * 550
    schema = Schema.infer({"x": x, "w": words}, rows=np.arange(550))
    column, category = schema.columns
    # A standard error of the mean of 500 numbers is 0.045; the farthest percent is drawn in.
    assert abs(column.loc - 10) < 0.2 and abs(column.scale - 1) < 0.2 and column.spikes == (10.5,)
    assert category.levels == ("a", "b"), "levels are those of all rows"


def test_skewed_numbers_are_positive_and_others_real_unless_none_is_negative():
    rng = np.random.default_rng(1)
    frame = {
        "lognormal": np.exp(rng.normal(2, 1, 1000)),
        "normal": rng.normal(60, 5, 1000),
        "near zero": rng.normal(20, 6, 1000).clip(0.5),
        "never negative": np.append(0, rng.normal(15, 5, 999).clip(0.1)),
        "mixed": np.concatenate([np.exp(rng.normal(2, 1, 999)), [-1]]),
        "many zeros": np.where(rng.random(1000) < 0.3, 0, np.exp(rng.normal(2, 1, 1000))),
    }
    schema = Schema.infer(frame)
    kinds = ["Positive", "Real", "Bounded", "Bounded", "Real", "Positive"]
    assert [column.kind for column in schema.columns] == kinds
    assert all((column.low, column.high) == (0, None) for column in schema.columns[2:4])
    assert schema.columns[3].spikes == () and schema.columns[5].spikes == (0,)
    # Standard errors 1 / sqrt(1000) and 1 / sqrt(2000).
    assert abs(schema.columns[0].loc - 2) < 5 / 1000**0.5 and abs(schema.columns[0].scale - 1) < 5 / 2000**0.5
    assert all(column.step is None for column in schema.columns)


def test_rounded_bell_shapes_have_no_spikes():
    """The mode of whole numbers is no spike, however often it occurs; a value put on top of them is."""
    rng = np.random.default_rng(2)
    for scale in (1, 3, 30):
        [column] = Schema.infer({"x": np.round(rng.normal(100, scale, 20_000)).astype(int)}, {"x": "Real"}).columns
        assert column.spikes == () and column.step == 1, scale
    x = np.concatenate([np.round(rng.normal(40, 12, 10_000)), np.full(5_000, 40)]).astype(int)
    assert Schema.infer({"x": x}).columns[0].spikes == (40,)


def test_overrides():
    frame = {"zip": [2139, 2138, 2139, 1002] * 20, "when": ["01/02/2020", "03/04/2020"] * 40, "size": list("SMLM") * 20}
    schema = Schema.infer(
        frame,
        {
            "zip": "Category",
            "when": {"kind": "Time", "format": "%d/%m/%Y"},
            "size": {"kind": "Ordered", "levels": ["S", "M", "L"]},
        },
    )
    assert [column.kind for column in schema.columns] == ["Category", "Time", "Ordered"]
    assert schema.encode(frame)[0].tolist() == [2, 0, 0] and schema.columns[1].origin == "2020-02-01"
    own = Real("zip", 2000, 10)
    assert Schema.infer(frame, {"zip": own, "when": "Category"}).columns[0] is own
    assert Schema.infer(frame, {"when": "Identifier"}).columns[1].kind == "Identifier"
    for overrides, message in (
        ({"zap": "Real"}, "no column 'zap'"),
        ({"zip": "Gaussian"}, "kind must be one of"),
        ({"size": "Real"}, "'size' cannot be Real: 'S' is no number"),
        ({"zip": Real("zap", 0, 1)}, "has the name 'zap'"),
        ({"when": {"kind": "Time", "format": "%Y"}}, "no time of the format"),
        ({"zip": {"kind": "Real", "sigma": 1}}, "has no sigma"),
    ):
        with pytest.raises(ValueError, match=message):
            Schema.infer(frame, {"when": "Category"} | overrides)


# Sources.


def test_the_same_table_from_all_sources(tmp_path):
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(3)
    frame = {
        "age": [int(v) for v in rng.integers(18, 90, 200)],
        "income": [None if i % 9 == 0 else round(float(v), 2) for i, v in enumerate(rng.lognormal(8, 1, 200))],
        "city": [None if i % 7 == 0 else ["Bern", "Graz", "Ulm"][i % 3] for i in range(200)],
        "day": [np.datetime64("2020-01-01") + int(v) for v in rng.integers(0, 900, 200)],
    }
    arrow = pa.table({**frame, "day": np.array(frame["day"])})
    pq.write_table(arrow, tmp_path / "t.parquet")
    pandas = arrow.to_pandas()
    pandas.to_csv(tmp_path / "t.csv", index=False)
    pandas.to_parquet(tmp_path / "indexed.parquet", index=True)
    with gzip.open(tmp_path / "t.csv.gz", "wb") as file:
        file.write((tmp_path / "t.csv").read_bytes())
    sources = [arrow, arrow.to_batches()[0], pandas, pandas.convert_dtypes(), pandas.set_index(pd.Index(range(7, 207)))]
    sources += [tmp_path / name for name in ("t.parquet", "indexed.parquet", "t.csv", "t.csv.gz")]
    sources += [str(tmp_path / "t.csv"), {**frame, "day": np.array(frame["day"])}]
    if pl := pytest.importorskip("polars"):
        sources.append(pl.from_arrow(arrow))
    expected = Table(arrow)
    assert [column.kind for column in expected.schema.columns] == ["Bounded", "Positive", "Category", "Time"]
    assert [int(v) for v in expected.x.isnan().sum(0)] == [0, 23, 29, 0]
    for source in sources:
        table = Table(source)
        assert torch.equal(table.x.nan_to_num(-1e9), expected.x.nan_to_num(-1e9)), type(source)
        assert table.names == expected.names
        # And each is encoded by the schema of the first.
        assert torch.equal(Table(source, expected.schema).x.nan_to_num(-1e9), expected.x.nan_to_num(-1e9))
    decoded = expected.schema.decode(expected.x)
    assert decoded["age"].to_pylist() == frame["age"] and decoded["city"].to_pylist() == frame["city"]


def test_columns_in_another_order_are_put_in_order():
    frame = {"a": [1.5, 2.25, 3.125], "b": ["x", "y", "x"], "c": [7, 7, 7]}
    schema = Schema.infer(frame)
    assert torch.equal(schema.encode({"b": frame["b"], "a": frame["a"]}), schema.encode(frame))


def test_new_data_with_other_columns_are_refused():
    schema = Schema.infer({"a": [1.5, 2.25, 3.125], "b": ["x", "y", "x"]})
    with pytest.raises(ValueError, match="lacks 'a' and has 'd'.*in any order: 'a', 'b'"):
        schema.encode({"b": ["x"], "d": [1]})
    with pytest.raises(ValueError, match="column 'b', row 12: 'z' is none of the 2 levels"):
        schema.encode({"a": [1.0, 2.0], "b": ["x", "z"]}, first_row=11)


def test_rows_are_counted_over_chunks(tmp_path):
    """The row that is named is that of the file, though it is read in chunks, also where cells hold several lines."""
    lines = ["a,b", *(f'{i / 7},"two\nlines"' for i in range(400_000))]
    lines[300_001] = 'three,"two\nlines"'
    path = tmp_path / "long.csv"
    path.write_text("\n".join(lines))
    schema = Schema([Real("a", 0, 1), data.Category("b", ("two\nlines", "x"))])
    with pytest.raises(ValueError, match="column 'a', row 300,001: 'three' is not a number"):
        Table(path, schema)


def test_a_tensor_in_a_file(tmp_path):
    kept = Table(TABLES / "adult.data", memory_map=tmp_path / "rows.bin")
    assert torch.equal(kept.x.nan_to_num(-1), Table(TABLES / "adult.data").x.nan_to_num(-1))
    assert (tmp_path / "rows.bin").stat().st_size == 4 * kept.x.numel()


def test_a_tensor_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(MemoryError, match="400 rows and 15 columns needs.*memory_map"):
        Table(TABLES / "adult.data")


def test_splits_of_a_table():
    """Parts are disjoint, and their row numbers are those of the file."""
    splits, table = load(str(TABLES / "adult.data")), Table(TABLES / "adult.data")
    assert [len(split.x) for split in splits] == [320, 40, 40]
    rows = torch.cat([split.rows for split in splits])
    assert rows.sort().values.tolist() == list(range(1, 401))
    for split in splits:
        assert torch.equal(split.x.nan_to_num(-1), table.x[split.rows - 1].nan_to_num(-1))
    assert splits.schema.names == table.names
    train = Schema.infer(TABLES / "adult.data", rows=splits.train.rows - 1)
    assert splits.schema == train != table.schema
    again = load(str(TABLES / "adult.data"), schema=table.schema)
    assert again.schema is table.schema and torch.equal(again.test.rows, splits.test.rows)


MANY = range(30)


def _grouped(number: int) -> str:
    """Returns a number as it is written in much of Europe."""
    return f"{number:,}".replace(",", ".")


@pytest.mark.parametrize(
    "column, options",
    [
        (lambda i: f"{_grouped(1000 * i + 1_000_517)};{i}", {}),  # more than one point
        (lambda i: f"{_grouped(137 * i)};{i},5", {}),  # commas in another column
        (lambda i: f"{_grouped(137 * i)};{i}", {"decimal": ",", "thousands": "."}),
        (lambda i: f"{137 * i / 1000:.3f};{i}", {}),  # all have three digits: a decimal point
    ],
)
def test_points_between_thousands_are_seen(column, options, tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("a;b\n" + "".join(column(i) + "\n" for i in MANY))
    table = data.Table(file, **options)
    found = table.schema.decode(table.x).column("a").to_pylist()
    first = column(7).split(";")[0]
    expected = float(first.replace(".", "")) if options or first.count(".") != 1 or "," in column(7) else float(first)
    assert found[7] == pytest.approx(expected)


def test_tiny_numbers_are_written_as_they_are(tmp_path):
    file = tmp_path / "t.csv"
    values = [(i + 1) * 1.2345e-13 for i in range(40)]
    file.write_text("a,b\n" + "".join(f"{v!r},{i % 3}\n" for i, v in enumerate(values)))
    table = data.Table(file)
    again = table.schema.decode(table.x).column("a").to_pylist()
    np.testing.assert_allclose(again, values, rtol=1e-6)


def test_times_keep_their_zone_and_others_are_refused(tmp_path):
    def file(name, times):
        (tmp_path / name).write_text("t,b\n" + "".join(f"{t},{i % 3}\n" for i, t in enumerate(times)))
        return tmp_path / name

    zoned = [f"2015-01-{i % 28 + 1:02d}T{i % 24:02d}:{7 * i % 60:02d}:00+02:00" for i in range(40)]
    table = data.Table(file("a.csv", zoned))
    written = table.schema.decode(table.x)
    table.schema.write(written, tmp_path / "b.csv")
    again = data.Table(tmp_path / "b.csv", schema=table.schema)
    assert torch.equal(again.x, table.x)
    first = (tmp_path / "b.csv").read_text().splitlines()[1].split(",")[0]
    assert datetime.datetime.fromisoformat(first) == datetime.datetime.fromisoformat(zoned[0])
    naive = [t.removesuffix("+02:00") for t in zoned]
    with pytest.raises(ValueError, match="has no zone, as the training data have"):
        data.Table(file("c.csv", naive), schema=table.schema)
    with pytest.raises(ValueError, match="has a zone, which the training data have not"):
        data.Table(tmp_path / "a.csv", schema=data.Table(file("c.csv", naive[:20] + [f"{naive[20]}.5"])).schema)
    with pytest.raises(ValueError, match="row 31.*has no zone, where others have"):
        data.Table(file("d.csv", zoned[:30] + naive[30:]))


def test_an_index_of_pandas_is_said_to_be_left_out_and_unknown_types_are_refused():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"t": range(40), "a": np.linspace(0, 1, 40), "b": list("xy") * 20})
    table = data.Table(frame.set_index("t"))
    assert list(table.notes) == ["the index 't' is left out: reset_index() makes it a column"]
    assert not data.Table(frame).notes
    with pytest.raises(ValueError, match="that Arrow does not know"):
        data.Table(frame.assign(a=pd.arrays.SparseArray([0, 1] * 20)))
    with pytest.raises(ValueError, match="'a' holds extension.*, which is no number, text or time"):
        data.Table(frame.assign(a=pd.period_range("2020", periods=40)))


@pytest.mark.parametrize(
    "write", [lambda v: f"{'-' * (v < 0)}${abs(v):,.2f}", lambda v: f"{abs(v):,.2f}".replace(",", "'")]
)
def test_numbers_with_signs_are_said_to_be_words(write, tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("a;b\n" + "".join(f"{write(1e4 * (i % 7 - 3.3) + 31.7 * i)};{i % 5}\n" for i in range(60)))
    assert any("holds numbers with signs" in note for note in data.Table(file).notes)


@pytest.mark.parametrize("format", ["%m/%d/%Y %I:%M %p", "%Y-%m-%d %I:%M:%S %p", "%d.%m.%Y %H:%M"])
def test_times_of_day_are_written_as_they_were(format, tmp_path):
    start = datetime.datetime(2020, 1, 5, 0, 30)
    times = [(start + i * datetime.timedelta(hours=31)).strftime(format) for i in range(60)]
    file = tmp_path / "t.csv"
    file.write_text("t;b\n" + "".join(f"{t};{i % 3}\n" for i, t in enumerate(times)))
    table = data.Table(file)
    assert table.schema.columns[0].format == format
    table.schema.write(table.x, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == file.read_text()


def test_a_range_that_does_not_hold_all_cells_is_refused(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("age,b\n" + "".join(f"{20 + i / 2},{i % 3}\n" for i in range(60)))
    with pytest.raises(ValueError, match="from 20 to 49.5, outside of the range from 21 to inf"):
        data.Table(file, overrides={"age": {"kind": "Bounded", "low": 21, "high": None}})
    assert (
        data.Table(file, overrides={"age": {"kind": "Bounded", "low": 20, "high": 49.5}}).schema.columns[0].high == 49.5
    )


def test_arrays_and_ratings_are_told_from_tables(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    with pytest.raises(ValueError, match="holds arrays, and no table"):
        data.Table(tmp_path / "x.npy")
    file = tmp_path / "r.csv"
    file.write_text("userId,itemId,rating\n" + "".join(f"{i % 7},{i % 11},{i % 5 + 1}\n" for i in range(100)))
    assert any("load_ratings" in note for note in data.Table(file).schema.notes)


# Files that could be read in two ways, or not at all.

BAD = {
    "empty": ("", {}, "is empty"),
    "only names": ("a,b\n", {}, "there is no row"),
    "one row": ("a,b\n1,2\n", {}, "none can be modelled"),
    "ragged": ("a,b\n1,2\n3,4,5\n6,7\n", {}, "line 3: 3 cells, where 2 are expected: '3,4,5'"),
    "short": ("a,b\n1,2\n3\n", {}, "line 3: 1 cells"),
    "header twice": ("a,b\n1,x\na,b\n3,y\n", {}, "row 2: the header occurs again"),
    "names twice": ("a,b,a\n1,x,2\n", {}, "the name 'a' occurs twice"),
    "words without a header": ("red,yes\nblue,yes\nred,no\n", {}, "the first line may be a row of data"),
    "two encodings": ("a,b\n1,é\n".encode() + "2,é\n".encode("latin-1"), {}, "line 3: the byte 0xe9 is not UTF-8"),
    "late encoding": (b"a,b\n" + b"1,x\n" * 2_000_000 + b"2,\xe9\n", {}, "line 2000002: the byte 0xe9 is not UTF-8"),
    "spaces": ("a b\n1 2\n3 4\n", {}, "separated by spaces"),
    "thousands or decimals": ("a;b\n" + "".join(f"{i + 1},{i + 100};x\n" for i in MANY), {}, "row 1: '1,100' may have"),
    "thousands or a point": (
        "a;b\n" + "".join(f"{_grouped(137 * i)};x\n" for i in MANY),
        {},
        "row 9: '1.096' may have",
    ),
    "points and commas": (
        "a;b\n" + "".join(f"{i},5;{i}.5\n" for i in MANY),
        {},
        "column 'b', row 1: '0.5' has a point, where 'a' has decimal commas",
    ),
    "points, thousands and commas": (
        "a;b;c\n" + "".join(f"{i},5;{_grouped(137 * i)};{i}.5\n" for i in MANY),
        {},
        "column 'c', row 1: '0.5' has a point, where 'a' has decimal commas",
    ),
    "two decimal signs": (
        "a;b\n" + "".join(f'"1,{i:03d}.5";2,{i:02d}\n' for i in MANY),
        {},
        "different decimal signs",
    ),
    "many points and commas": (
        "a;b\n" + "".join(f"{i},5;{i / 8192!r}\n" for i in range(5000)),
        {},
        "column 'b'.* has a point, where 'a' has decimal commas",
    ),
    "wrong decimal sign": (
        "a;b\n" + "".join(f"{i}.25;{i}\n" for i in MANY),
        {"decimal": ",", "thousands": "."},
        "'0.25' is no",
    ),
    "two formats": (
        "d,b\n" + "".join(f"2020-01-{i + 1:02d},x\n" for i in MANY) + "02.03.2020,x\n",
        {},
        "row 31: '02.03.2020', where other cells are times such as '2020-01-01'",
    ),
    "day or month": (
        "d,b\n" + "".join(f"0{i % 9 + 1}/0{i % 7 + 1}/2020,{i}\n" for i in MANY),
        {},
        "row 8.*may be %d/%m",
    ),
    "a word among numbers": (
        "a,b\n" + "".join(f"{i * i},x\n" for i in MANY) + "unknown,x\n",
        {},
        "column 'a', row 31: 'unknown', where most cells are numbers",
    ),
    "infinite": ("a,b\n1,x\n-inf,y\n3,x\n", {}, "column 'a', row 2: infinite"),
    "no quote at the end": ('a,b\n1,"x\n2,y\n', {}, "t.csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(tmp_path, name):
    content, options, message = BAD[name]
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        Schema.infer(path, **options)
    assert str(path) in str(error.value)


def test_what_is_not_clear_is_read_as_said(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a;b\n1,100;x\n2,250;y\n-3,000;x\n")
    for options, values in (({"decimal": ","}, [1.1, 2.25, -3]), ({"thousands": ","}, [1100, 2250, -3000])):
        table = Table(path, **options)
        assert table.schema.decode(table.x)["a"].to_pylist() == values
        assert torch.equal(Table(path, table.schema).x, table.x)
    path.write_text("red,yes\nblue,yes\nred,no\n")
    assert Table(path, header=False).names == ["column_1", "column_2"]
    assert len(Table(path, header=True)) == 2
    path.write_text("a,b\n1.5,x\n-,y\n2.25,x\n")
    assert Table(path, missing=("-",)).x[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "options",
    [{"delimiter": ";;"}, {"decimal": "x"}, {"thousands": "."}, {"missing": ()}, {"encoding": "utf-9"}],
    ids=str,
)
def test_dialects_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        data.Dialect(**options)


def test_words_for_missing_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i}.5,x{i % 2}\n" for i in range(9)) + "?,NA\n,null\nNaN,\nnan,N/A\n")
    table = Table(path)
    assert table.x.isnan().sum(0).tolist() == [4, 4]
    assert "missing cells are written '' (2), '?' (1)" in table.notes[0]


def test_a_file_of_other_text_is_no_table(tmp_path):
    for name in ("t.parquet", "t.xlsx"):
        (tmp_path / name).write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match=f"{name} is no"):
            Table(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file none\.csv"):
        Table("none.csv")
    with pytest.raises(TypeError, match="got int"):
        Table(3)


def test_more_levels_than_a_model_can_learn_are_left_out():
    words = [f"word {i % 1500}" for i in range(6000)]
    schema = Schema.infer({"w": words, "a": np.arange(6000) * 0.37 % 1})
    assert schema.columns[0].kind == "Identifier" and "1,500 levels" in schema.notes[0]
    assert Schema.infer({"w": words}, {"w": "Category"}).columns[0].num_levels == 1500


def test_large_whole_numbers_are_said_to_be_rounded():
    schema = Schema.infer({"a": np.random.default_rng(0).integers(0, 10**9, 500)})
    assert "kept to 7 digits" in schema.notes[0] and schema.columns[0].step is None
    near = Schema.infer({"a": 10**9 + np.random.default_rng(0).integers(0, 10**4, 500)})
    assert near.notes == () and near.columns[0].step == 1 and near.columns[0].origin == pytest.approx(1e9, abs=1e4)


def test_times_of_many_rows(tmp_path):
    """More different times than are counted."""
    start = np.datetime64("2020-01-01T00:00:00")
    frame = {"t": (start + np.arange(50_000) * 61).astype(str), "b": ["x", "y"] * 25_000}
    schema = Schema.infer(frame)
    assert isinstance(schema.columns[0], Time) and schema.columns[0].unit == "second"
    assert schema.encode(frame)[:, 0].diff().eq(61).all()


def test_numbers_that_float32_does_not_hold_are_refused():
    with pytest.raises(ValueError, match="column 'a', row 2: infinite"):
        Schema.infer({"a": [1.0, 1e39, 2.0]})
    with pytest.raises(ValueError, match="column 'a', row 1: 1e-50 is outside the range"):
        Schema([Positive("a", 0, 1)]).encode({"a": [1e-50]})
    with pytest.raises(ValueError, match="column 'a', row 1: 1e[+]39 is infinite"):
        Schema([Positive("a", 0, 1)]).encode({"a": [1e39]})
    numbers = 10**18 + np.random.default_rng(0).integers(0, 10**9, 50) * 1000
    assert "kept to 7 digits" in Schema.infer({"a": numbers}).notes[0]


def test_a_column_that_was_constant_and_is_no_more_is_said():
    schema = Schema.infer({"a": [1.5, 2.5, 3.75], "c": [7, 7, 7], "d": ["x", None, "x"], "e": [None, None, None]})
    assert [column.kind for column in schema.columns] == ["Bounded", "Constant", "Constant", "Constant"]
    new = {"a": [1.0, 2.0], "c": [7, 8], "d": ["x", "y"], "e": [None, "z"]}
    notes = Table(new, schema).notes
    assert [note.split("'")[1] for note in notes] == ["c", "d", "e"] and all("1 rows do not hold" in n for n in notes)
    assert Table({**new, "c": [7, 7], "d": ["x", None], "e": [None, None]}, schema).notes == []


def test_ordered_categories_keep_their_order_and_all_their_levels(tmp_path):
    pd = pytest.importorskip("pandas")
    size = pd.Categorical(["L", "S", None] * 20, categories=["S", " M ", "L"], ordered=True)
    stars = pd.Categorical([1, 3, 2] * 20, categories=[3, 2, 1], ordered=True)
    days = pd.Categorical(pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-05"] * 20), ordered=True)
    frame = pd.DataFrame({"size": size, "stars": stars, "day": days, "plain": pd.Categorical(list("ba") * 30)})
    frame.to_parquet(tmp_path / "t.parquet")
    for source in (frame, tmp_path / "t.parquet"):
        table = Table(source)
        assert [column.kind for column in table.schema.columns] == ["Ordered", "Ordered", "Time", "Binary"]
        # A Parquet file has no order of categories that are numbers.
        levels = [("S", "M", "L"), (3, 2, 1) if source is frame else (1, 2, 3)]
        assert [column.levels for column in table.schema.columns[:2]] == levels
        assert table.x[:3, 0].nan_to_num(-1).tolist() == [2, 0, -1]
    assert Schema.infer(frame, {"size": "Category"}).columns[0].levels == ("L", "S")
    # Parts of a table that do not agree about the order say none.
    parts = [frame.head(9), frame.assign(size=frame["size"].cat.reorder_categories(["L", "S", " M "])).head(9)]
    mixed = pa.concat_tables([pa.Table.from_pandas(part, preserve_index=False) for part in parts])
    assert Table(mixed).schema.columns[0].kind == "Binary"


def test_rows_that_are_no_row_numbers_are_refused():
    frame = {"a": [1.5, 2.5, 3.75]}
    for rows in (np.array([True, False, True]), [], [-1], [3], [[1]]):
        with pytest.raises(ValueError, match="rows"):
            Schema.infer(frame, rows=np.array(rows))


def test_lists_and_durations_are_no_cells():
    with pytest.raises(ValueError, match="'a' holds list"):
        Schema.infer({"a": [[1, 2], [3]], "b": [1, 2]})
    with pytest.raises(ValueError, match="'a' holds duration"):
        Schema.infer({"a": np.arange(3).astype("timedelta64[s]"), "b": [1, 2, 3]})


def test_other_types_of_pandas_and_polars():
    """Categories, nullable numbers, decimals, enumerations and zones."""
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    words, numbers = ["x", "y", "z"] * 10, [1, None, 3] * 10
    times = pd.to_datetime(["2020-01-01 00:00", "2020-06-01 00:00", None] * 10).tz_localize("Europe/Berlin")
    table = Table(pd.DataFrame({"w": pd.Categorical(words), "n": pd.array(numbers, dtype="Int64"), "t": times}))
    assert [column.kind for column in table.schema.columns] == ["Category", "Binary", "Time"]
    time = datetime.datetime(2020, 5, 31, 22, tzinfo=datetime.timezone.utc)
    assert table.schema.decode(table.x)["t"].to_pylist()[1] == time
    assert table.notes == ["column 't' has times with a zone: they are taken, and written, in UTC"]
    frame = pl.DataFrame(
        {
            "w": pl.Series(words, dtype=pl.Categorical),
            "e": pl.Series(words, dtype=pl.Enum(["z", "x", "y"])),
            "d": [decimal.Decimal("1.25") * i for i in range(30)],
        }
    )
    table = Table(frame)
    assert [column.kind for column in table.schema.columns] == ["Category", "Ordered", "Bounded"]
    assert table.schema.columns[1].levels == ("z", "x", "y")
    assert table.schema.decode(table.x).to_pylist() == [{**row, "d": float(row["d"])} for row in frame.to_dicts()]


# The command line.


def test_describe(tmp_path, capsys):
    out = tmp_path / "schema.yaml"
    main(["describe", str(TABLES / "adult.data"), "--output", str(out)])
    printed = capsys.readouterr().out
    assert "400 rows, 15 columns" in printed and "note: missing cells are written '?' (70)" in printed
    assert max(map(len, printed.replace(str(out), "").replace(str(TABLES), "").splitlines())) <= 80
    schema = Schema.from_yaml(out)
    assert schema == Table(TABLES / "adult.data").schema
    # A person edits it and passes it back.
    out.write_text(out.read_text().replace("{name: age, kind: Positive", "{name: age, kind: Real"))
    edited = Schema.from_yaml(out)
    assert (
        not isinstance(edited.columns[0], Positive)
        and len(load(str(TABLES / "adult.data"), schema=edited).test.x) == 40
    )
    main(["describe", str(TABLES / "adult.data"), "--kinds", '{"age": "Category"}'])
    assert "age             Category" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already exists"):
        main(["describe", str(TABLES / "adult.data"), "--output", str(out)])
    with pytest.raises(SystemExit, match="the byte 0xf6 is not UTF-8"):
        main(["describe", str(TABLES / "latin-1.csv"), "--output", str(tmp_path / "none.yaml")])
    assert not (tmp_path / "none.yaml").exists()


def test_a_schema_knows_the_encoding_of_a_file(tmp_path):
    text = "city,size\n" + "Köln,1.5\nBern,2.25\nZürich,3.75\n" * 20
    for encoding in ("cp1252", "utf-16-le"):
        path = tmp_path / f"{encoding}.csv"
        path.write_bytes(text.encode(encoding))
        main(["describe", str(path), "--encoding", encoding, "--output", str(tmp_path / f"{encoding}.yaml")])
        schema = Schema.from_yaml(tmp_path / f"{encoding}.yaml")
        assert load(str(path), schema=schema).train.x.shape == (48, 2)
        table = Table(path, schema)
        assert table.schema.columns[0].levels == ("Bern", "Köln", "Zürich")
        # A new file in UTF-8 is read as what it is.
        (tmp_path / "new.csv").write_text(text, encoding="utf-8")
        assert torch.equal(Table(tmp_path / "new.csv", schema).x, table.x)


@pytest.mark.parametrize("given", ["schema", "context", "overrides", "delimiter"])
def test_arrays_and_pictures_are_no_table(given, tmp_path):
    (tmp_path / "a.csv").write_text("size,kind\n" + "1.5,x\n2.5,y\n" * 10)
    np.save(tmp_path / "a.npy", np.ones((20, 1, 8, 8)))
    values = {"schema": Schema.infer(tmp_path / "a.csv"), "context": ["size"], "overrides": {"size": "Real"}}
    for source in (tmp_path / "a.npy", tmp_path, "digits"):
        with pytest.raises(
            ValueError, match=f"holds arrays, pictures, sounds or music, and {given} is for a table: give a file such"
        ):
            load(str(source), **{given: values.get(given, ";")})


def test_a_schema_knows_a_delimiter_that_is_not_looked_for(tmp_path):
    (tmp_path / "a.csv").write_text("a~b\n" + "1.5~x\n2.5~y\n" * 10)
    schema = Schema.infer(tmp_path / "a.csv", delimiter="~")
    assert Table(tmp_path / "a.csv", Schema.from_yaml(schema.to_yaml())).x.shape == (20, 2)


def test_counts_are_told_from_codes():
    rng = np.random.default_rng(0)
    few = {"stars": rng.integers(1, 6, 500), "months": rng.integers(0, 12, 500), "score": rng.integers(0, 11, 500)}
    counts = {"visits": np.minimum(rng.poisson(5, 500), 17), "calls": rng.geometric(0.3, 500) - 1}
    schema = Schema.infer(few | counts)
    assert [column.kind for column in schema.columns] == ["Ordered"] * 3 + ["Count"] * 2
    assert schema.encode({name: [40 if name in counts else 3] for name in schema.names})[0, 3:].tolist() == [40, 40]
    with pytest.raises(ValueError, match="such as Count for a count, in the schema: pyrovae describe FILE"):
        schema.encode({name: [40] for name in schema.names})


def test_one_word_or_a_list_of_them_may_mean_missing(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "1.5,x\nunknown,y\n2.5,-\n" * 10)
    for given, missing in (("unknown", ("unknown",)), ('["unknown", "-"]', ("unknown", "-")), ("-", ("-",))):
        path = tmp_path / f"{len(given)}.yaml"
        main(["describe", str(tmp_path / "a.csv"), f"--missing={given}", "--output", str(path)])
        assert Schema.from_yaml(path).dialect.missing == missing


def test_the_command_line_names_its_own_ways_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text('a,b\n"1,234",x\n"2,345",y\n' * 1 + '"3,456",z\n' * 10)
    with pytest.raises(SystemExit, match="Say --decimal ',' or --thousands ','"):
        main(["describe", "a.csv"])
    with pytest.raises(SystemExit, match="pyrovae describe a.csv --output schema.yaml .*then pyrovae train --schema"):
        main(["train", "--data", "a.csv"])


@pytest.mark.parametrize("form", ["%d.%m.%y", "%y-%m-%d", "%m/%d/%y", "%d-%b-%y", "%d.%m.%y %H:%M"])
def test_years_of_two_digits_are_read_by_the_rule_of_strptime(form):
    days = [datetime.date(1997, 5, 14) + datetime.timedelta(days=137 * i) for i in range(60)]  # 1997 to 2019
    written = [day.strftime(form) for day in days]
    table = Table({"born": written, "x": [float(i % 7) for i in range(60)]})
    column = table.schema.columns[0]
    assert (column.format, column.origin[:10], column.unit) == (form, "1997-05-14", "day")
    assert [str(t)[:10] for t in table.schema.decode(table.x)["born"].to_pylist()] == [str(day) for day in days]


def test_years_of_two_digits_in_the_future_are_refused_and_taken_if_the_format_is_given():
    table = {"born": [f"{1 + i % 28:02}.06.{45 + i % 50}" for i in range(60)], "x": [float(i % 7) for i in range(60)]}
    with pytest.raises(ValueError, match="(?s)'born', row 1: '01.06.45' has a year of two digits.*'%d.%m.%y'"):
        Table(table)
    given = Table(table, overrides={"born": {"kind": "Time", "format": "%d.%m.%y"}})
    assert given.schema.columns[0].origin == "1969-06-25"  # 25.06.69


def test_a_format_of_four_digits_does_not_take_years_of_two():
    table = {"born": ["31.12.98", "30.11.97"] * 30, "x": [float(i % 7) for i in range(60)]}
    with pytest.raises(ValueError, match="is no time of the format '%d.%m.%Y'"):
        Table(table, overrides={"born": {"kind": "Time", "format": "%d.%m.%Y"}})


CODES = {
    "degrees": (-999.0, lambda rng: np.round(rng.normal(20, 5, 400).clip(0.1), 1), True),
    "answers": (-99, lambda rng: rng.gamma(1, 50, 400).round().astype(int), False),
    "few": (-1, lambda rng: rng.integers(0, 50, 400), False),
    "large": (999999, lambda rng: rng.gamma(1, 50, 400).round().astype(int), True),
}


@pytest.mark.parametrize(("code", "draw", "is_far"), CODES.values(), ids=CODES)
def test_a_number_that_stands_for_something_else_is_a_frequent_value_outside_the_range(code, draw, is_far):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(400) < 0.2, code, draw(rng))
    table = Table({"x": values, "y": rng.normal(size=400)})
    column = table.schema.columns[0]
    assert code in column.spikes and column.low == 0
    assert column.decode(column.encode(values)).to_pylist() == pytest.approx(values.tolist())
    told = [note for note in table.notes if f"is often {code:g}" in note or f"is often {code}" in note]
    assert bool(told) == is_far
    with pytest.raises(ValueError, match=r"outside of the range .* that was given"):
        Table({"x": values, "y": rng.normal(size=400)}, overrides={"x": {"kind": "Bounded", "low": 0, "high": 2000}})


def test_a_number_for_missing_cells_is_told_and_can_be_named(tmp_path):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(400) < 0.2, -999, np.round(rng.normal(20, 5, 400), 1))
    path = tmp_path / "codes.csv"
    path.write_text("x,y\n" + "".join(f"{x:g},{y:.3f}\n" for x, y in zip(values, rng.normal(size=400))))
    assert Table(path).notes == [
        "column 'x' is often -999, far from all others: if that stands for a missing cell, say missing='-999'"
    ]
    table = Table(path, missing="-999")
    assert table.x[:, 0].isnan().sum() == (values == -999).sum() and table.notes == [
        "missing cells are written '-999' (81)"
    ]


@pytest.mark.parametrize("as_text", [False, True])
def test_whole_numbers_beyond_double_precision_are_names(as_text):
    rng = np.random.default_rng(0)
    cards = rng.choice([4111111111111111111, 4111111111111111112, 4111111111111111113], 100)
    table = Table({"card": list(map(str, cards)) if as_text else cards, "x": rng.normal(size=100)})
    assert table.schema.columns[0].kind == "Identifier" and "beyond 2**53" in table.notes[0]
    measured = Table({"charge": 1e18 * rng.normal(size=100), "x": rng.normal(size=100)})
    assert measured.schema.columns[0].kind == "Real"


def test_a_number_beyond_single_precision_is_not_called_infinite_alone():
    with pytest.raises(ValueError, match=r"column 'x', row 2: infinite, or beyond 3.4e38"):
        Table({"x": [1.0, 1e39, 2.0], "y": [1.0, 2.0, 3.5]})


def test_frequent_values_are_not_all_taken_for_codes():
    rng = np.random.default_rng(0)
    amounts = rng.choice(10.0 ** rng.uniform(0, 8, 12).round(2), 400) * np.where(
        rng.random(400) < 0.3, rng.random(400), 1
    )
    assert not [n for n in Table({"x": amounts, "y": rng.normal(size=400)}).notes if "far from all others" in n]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_years_of_two_and_of_four_digits_in_one_column_are_refused(share):
    days = [datetime.date(1997, 5, 14) + datetime.timedelta(days=97 * i) for i in range(60)]
    written = [day.strftime("%d.%m.%y" if i < 60 * share else "%d.%m.%Y") for i, day in enumerate(days)]
    with pytest.raises(ValueError, match="where other cells are times such as .* Write all in one format"):
        Table({"born": written, "x": [float(i % 7) for i in range(60)]})
