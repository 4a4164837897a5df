"""Tables whose rows are steps of time, as sequences and back, in Python and on the command line."""

import csv
import datetime
import json
import math
import re
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import yaml

from pyrovae import log_marginal, plots
from pyrovae.cli import main
from pyrovae.data import Schema, TimeSeries, load_series
from pyrovae.estimators import ParticleFilter
from pyrovae.storage import load_run

START = datetime.date(2020, 1, 1)
SMALL = ["--epochs", "2", "--latent-dim", "2", "--structure", "Recurrent", "--structure.width", "8"]
SMALL += ["--num-samples", "4", "--quiet"]


def days(count: int, first: int = 0) -> list[str]:
    return [str(START + datetime.timedelta(first + i)) for i in range(count)]


def write(path: Path, table: dict[str, list]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return path


def walks(seed: int = 0) -> dict[str, list]:
    """Three shops whose rows are mixed: prices in cents, and sales, of 60, 50 and 40 days that end together."""
    rng, rows = np.random.default_rng(seed), []
    for shop, count in (("Ulm", 60), ("Bern", 50), ("Graz", 40)):
        prices = np.round(20 * np.exp(0.02 * rng.normal(size=count).cumsum()), 2)
        sales = rng.poisson(200, count)
        rows += list(zip(days(count, 60 - count), [shop] * count, prices.tolist(), sales.tolist(), strict=True))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return {name: [row[i] for row in rows] for i, name in enumerate(("day", "shop", "price", "sales"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run on three series, `run`, beside the table, `shops.csv`."""
    folder = tmp_path_factory.mktemp("series")
    write(folder / "shops.csv", walks())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = ["--time", "day", "--series", "shop", "--growth", "true", "--max-steps", "20"]
        main(["train", "--data", "shops.csv", "--run", "run", *given, *SMALL])
    return folder


def test_pieces_are_the_standardised_cells_in_the_order_of_their_times():
    table = walks()
    series = TimeSeries.of(table, "day", "shop", ["price"], num_steps=20)
    steps = series.steps(table)
    x, places = series.pieces(steps)
    assert x.shape == (3 + 2 + 3, 20, 1) and steps.names == ["Bern", "Graz", "Ulm"]
    seen = places >= 0
    assert torch.equal(seen, ~x[..., 0].isnan())
    rows = steps.rows[places[seen].numpy()]
    assert sorted(rows) == list(range(1, 151))
    cells = np.array([table["price"][row - 1] for row in rows])
    # Within half a cent, which is the noise of rounded prices.
    found = x[seen][:, 0].double().numpy() * series.scale[0] + series.loc[0]
    assert (np.abs(found - cells) < 0.005 + 1e-4).all() and np.abs(found - cells).max() > 0.003
    for piece in places:
        of = piece[piece >= 0].numpy()
        assert len({table["shop"][row - 1] for row in steps.rows[of]}) == 1
        times = [table["day"][row - 1] for row in steps.rows[of]]
        assert times == sorted(times)
    assert x[seen].mean().item() == pytest.approx(0, abs=1e-3)
    assert x[seen].std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_growth_adds_up_to_the_levels():
    rng = np.random.default_rng(1)
    table = {"year": list(range(1950, 2010)), "price": np.exp(rng.normal(size=60).cumsum() / 10).tolist()}
    table["balance"] = rng.normal(size=60).cumsum().tolist()
    series = TimeSeries.of(table, "year", growth=True)
    assert series.logarithmic == (True, False)
    steps = series.steps(table)
    assert steps.x.shape == (59, 2)
    first = np.array([[table["price"][0], table["balance"][0]]])
    again = series.levels(torch.from_numpy(steps.x)[None], first)[0]
    assert again == pytest.approx(np.stack([table["price"], table["balance"]], 1)[1:], rel=1e-9)
    changes = series.levels(torch.from_numpy(steps.x))
    assert changes[:, 0] == pytest.approx(np.diff(np.log(table["price"])))


def test_rounded_numbers_are_moved_within_their_step_and_come_back():
    """The noise is uniform, is that of a time and a number alone, and is gone when rows are written."""
    count = 4000
    counts = np.random.default_rng(2).poisson(30, count)
    table = {"t": days(count), "n": counts.tolist()}
    series = TimeSeries.of(table, "t")
    values = series.steps(table).x[:, 0] * series.scale[0] + series.loc[0]
    noise = values - counts
    assert (np.abs(noise) <= 0.5).all()
    # Kolmogorov and Smirnov's distance, whose probability of being above 1.95 / sqrt(n) is 0.001.
    distance = np.abs(np.sort(noise) + 0.5 - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / math.sqrt(count)
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 3.3 / math.sqrt(count)
    assert abs(np.corrcoef(noise, counts)[0, 1]) < 3.3 / math.sqrt(count)
    part = {name: cells[100:40:-1] for name, cells in table.items()}
    assert np.array_equal(series.steps(part).x, series.steps(table).x[41:101])
    assert series.table(values[:, None]).column("n").to_pylist() == counts.tolist()


def test_parts_follow_each_other_in_time(tmp_path):
    table = walks()
    splits = load_series(write(tmp_path / "shops.csv", table), time="day", series="shop", num_steps=20)
    steps = splits.time_series.steps(table)
    ends = []
    for part, first in ((splits.train, None), (splits.validation, 0), (splits.test, 1)):
        begins = [table["day"][row - 1] for row in part.rows.tolist()]
        if first is not None:
            assert min(begins) > ends[first]
        lengths = (~part.x.isnan().any(-1)).sum(1).tolist()
        place = {row: i for i, row in enumerate(steps.rows.tolist())}
        last = [steps.rows[place[r] + n - 1] for r, n in zip(part.rows.tolist(), lengths, strict=True)]
        ends.append(max(table["day"][row - 1] for row in last))
    total = sum(int((~part.x.isnan().any(-1)).sum()) for part in splits)
    assert total == 150
    assert ends[2] == max(table["day"])


def test_a_row_with_an_empty_cell_is_a_missing_step(tmp_path):
    table = {
        "t": days(50),
        "a": [str(i * i % 7 + i / 3) for i in range(50)],
        "b": [str(i % 5 + 0.37) for i in range(50)],
    }
    table["a"][7] = table["b"][20] = ""
    series = TimeSeries.of(table, "t", columns=["a", "b"])
    steps = series.steps(table)
    assert np.flatnonzero(np.isnan(steps.x).any(1)).tolist() == [7, 20]
    assert np.isnan(steps.x[[7, 20]]).all()
    assert "2 rows with an empty cell are missing steps" in series.describe(steps)
    grown = TimeSeries.of(table, "t", columns=["a", "b"], growth=True)
    assert np.isnan(grown.steps(table).x).any(1).sum() == 4  # to the gap and from it


def test_it_is_written_and_read():
    series = TimeSeries.of(walks(), "day", "shop", growth=True)
    again = TimeSeries.from_dict(json.loads(json.dumps(series.to_dict())))
    assert again == series
    with pytest.raises(ValueError, match="must have the entries schema, time"):
        TimeSeries.from_dict({"time": "day"})
    with pytest.raises(ValueError, match="an entry for each column"):
        TimeSeries.from_dict(series.to_dict() | {"loc": [0.0]})


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"time": "date"}, "time: the table has no column 'date'. It has 'day', 'shop', 'price', 'sales'"),
        ({}, {"series": "city"}, "series: the table has no column 'city'"),
        ({}, {"columns": ["cost"]}, "columns: the table has no column 'cost'"),
        ({}, {"columns": ["shop"], "series": None}, "holds no numbers|cannot be|words"),
        ({}, {"time": "shop", "series": None}, "column 'shop'"),
        ({}, {"time": "shop"}, "must name different columns"),
        ({}, {"series": None}, "rows [0-9]+ and [0-9]+ have the same 'day'. Remove one, or give the column"),
        ({"price": ["1.50"] * 150}, {"columns": ["price"]}, "'price' never changes in the training rows"),
        ({}, {"num_steps": 1}, "num_steps must be at least 2, got 1"),
    ],
)
def test_wrong_arguments_are_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        TimeSeries.of(walks() | change, **({"time": "day", "series": "shop"} | options))


def test_wrong_cells_are_named(tmp_path):
    table = walks()
    with pytest.raises(ValueError, match="column 'day', row 5: has no time"):
        TimeSeries.of(table | {"day": [None if i == 4 else day for i, day in enumerate(table["day"])]}, "day", "shop")
    with pytest.raises(ValueError, match="column 'shop', row 3: is empty"):
        TimeSeries.of(
            table | {"shop": [None if i == 2 else name for i, name in enumerate(table["shop"])]}, "day", "shop"
        )
    twice = {name: cells + cells[:1] for name, cells in table.items()}
    with pytest.raises(ValueError, match="rows 1 and 151 of the series '.*' have the same 'day'. Remove one"):
        TimeSeries.of(twice, "day", "shop")
    series = TimeSeries.of(table, "day", "shop", ["price"], growth=True)
    with pytest.raises(ValueError, match="column 'price', row 9.*|outside the range"):
        series.steps(table | {"price": [-1.0 if i == 8 else cell for i, cell in enumerate(table["price"])]})
    with pytest.raises(ValueError, match="lacks 'price'"):
        series.steps({name: cells for name, cells in table.items() if name != "price"})
    with pytest.raises(ValueError, match="too few"):
        load_series(write(tmp_path / "a.csv", {"t": days(3), "v": [1.5, 2.25, 0.5]}), time="t")
    frozen = {"t": days(60), "rate": [math.pi] * 20 + [math.e] * 20 + [math.sqrt(2) * i for i in range(20)]}
    with pytest.warns(UserWarning, match="'rate' repeats the number of the row before in 64%"):
        load_series(write(tmp_path / "b.csv", frozen), time="t")


def test_a_run_knows_how_rows_became_steps(run, capsys, monkeypatch):
    series = load_run(run / "run")[1]["time_series"]
    assert series.growth and series.names == ["price", "sales"] and series.num_steps == 20
    assert series == TimeSeries.of(str(run / "shops.csv"), "day", "shop", growth=True, num_steps=20, until=0.8)
    stored = yaml.safe_load((run / "run" / "config.yaml").read_text())
    assert (stored["time"], stored["series"], stored["growth"], stored["max_steps"]) == ("day", "shop", True, 20)
    assert stored["likelihood"]["class_path"] == "pyrovae.likelihoods.StudentT"
    monkeypatch.chdir(run)
    main(["train", "--run", "run", "--resume", "--epochs", "3", "--quiet"])
    assert len((run / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    main(["evaluate", "run", "--quiet", "--output", "e.csv"])
    out = capsys.readouterr().out
    assert "3 series of 147 rows, day from 2020-01-02 to 2020-02-29" in out
    a_datum, a_row = re.search(
        r"Normal: (\S+) nats per datum \(baseline; -log p\(x\): (\S+) nats a row\)", out
    ).groups()
    rows = int(re.search(r"nats a row, of (\d+) rows", out)[1])
    pieces = int(re.search(r"from (\d+) data", out)[1])
    assert float(a_row) * rows == pytest.approx(-float(a_datum) * pieces, abs=5e-4 * (rows + pieces))
    assert "change of the logarithm" in out


def test_rows_that_follow_are_those_of_the_library(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    for ending in ("csv", "npy", "png"):
        options = ["--steps", "4", "--num-data", "2", "--num-draws", "30", "--output", str(tmp_path / f"f.{ending}")]
        main(["forecast", "run", *options])
    vae, config = load_run(run / "run")
    series = config["time_series"]
    table = walks()
    steps = series.steps(table)
    last = steps.x[steps.series == 0][-20:], steps.x[steps.series == 1][-20:]
    pyro.set_rng_seed(0)
    x = torch.from_numpy(np.stack(last)).float()
    draws = vae.forecast(x, 4, torch.ones(2, 20, dtype=torch.bool), num_samples=30, num_particles=100)
    price = {
        shop: table["price"][max((d, i) for i, d in enumerate(table["day"]) if table["shop"][i] == shop)[1]]
        for shop in ("Bern", "Graz")
    }
    found = np.load(tmp_path / "f.npy")
    changes = (draws[..., 0].double().numpy() * series.scale[0] + series.loc[0]).cumsum(-1)
    expected = np.array([price["Bern"], price["Graz"]])[:, None] * np.exp(changes)
    assert found[..., 0] == pytest.approx(expected, rel=1e-5)
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert len(rows) == 2 * 4 * 2
    [one] = [row for row in rows if (row["series"], row["step"], row["column"]) == ("Graz", "3", "price")]
    assert one["after"] == "2020-02-29"
    assert float(one["q50"]) == pytest.approx(np.median(expected[:, 1, 2]), rel=1e-4)
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_rows_are_scored_given_those_before(run, monkeypatch, tmp_path, capsys):
    """The rows of the first piece add up to its log p(x), others know half a piece."""
    monkeypatch.chdir(run)
    options = ["--method", "ParticleFilter", "--method.num_samples", "40", "--method.num_particles", "100"]
    main(["score", "run", "shops.csv", "--output", str(tmp_path / "s.csv"), *options])
    assert "the least probable rows" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert len({row["row"] for row in rows}) == len(rows) == 147
    vae, config = load_run(run / "run")
    series, table = config["time_series"], walks()
    steps = series.steps(table)
    found = {int(row["row"]): (float(row["log_p"]), float(row["standard_error"])) for row in rows}
    programs, method = (vae.model_by_step, vae.guide_by_step), ParticleFilter(40, 100)
    for name in range(3):
        of = np.flatnonzero(steps.series == name)
        for start, kept in ((0, 0), (10, 10), (20, 10)):  # of 20 rows, the first ten of which were scored before
            x = torch.from_numpy(steps.x[of[start : start + 20]]).float()[None]
            whole = log_marginal(*programs, x, method=method, progress=False)
            value, error = whole.value.item(), whole.standard_error.item()
            if kept:
                before = log_marginal(*programs, x[:, :kept], method=method, progress=False)
                value, error = value - before.value.item(), math.hypot(error, before.standard_error.item())
            its = [found[int(row)] for row in steps.rows[of[start + kept : start + 20]]]
            error = math.hypot(error, math.sqrt(sum(e**2 for _, e in its)))
            assert abs(sum(v for v, _ in its) - value) < 4.5 * error + 1e-3
    turned = write(tmp_path / "turned.csv", {name: cells[::-1] for name, cells in table.items()})
    main(["score", "run", str(turned), "--output", str(tmp_path / "t.csv"), *options])
    again = {151 - int(row["row"]): row for row in csv.DictReader((tmp_path / "t.csv").read_text().splitlines())}
    assert again.keys() == found.keys()
    assert all(float(again[row]["log_p"]) == pytest.approx(value, abs=1e-4) for row, (value, _) in found.items())
    with pytest.raises(SystemExit, match="scored by ParticleFilter, got ImportanceSampling"):
        main(["score", "run", "shops.csv", "--output", str(tmp_path / "u.csv"), "--method", "ImportanceSampling"])


def test_drawn_rows_are_written_as_the_table_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shops.csv", walks())
    main(["train", "--data", "shops.csv", "--time", "day", "--series", "shop", "--run", "run", *SMALL])
    main(["sample", "run", "--num-samples", "3", "--steps", "7", "--output", "a.csv"])
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [(row["sequence"], row["step"]) for row in rows[6:8]] == [("1", "7"), ("2", "1")]
    for row in rows:
        assert float(row["sales"]) == int(row["sales"])
        assert round(100 * float(row["price"])) == pytest.approx(100 * float(row["price"]), abs=1e-6)
    main(["encode", "run", "shops.csv", "--output", "e.csv"])
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 1 + 3


def test_a_schema_says_what_the_file_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = {"t": days(60), "v": [("." if i == 9 else f"{i * 37 % 11 + i / 8:.3f}") for i in range(60)]}
    write(tmp_path / "a.csv", table)
    train = ["train", "--data", "a.csv", "--time", "t", "--run", "run", *SMALL]
    with pytest.raises(SystemExit, match="no column of numbers beside the times 't': 'v' is Category"):
        main(train)
    with pytest.raises(SystemExit, match="pyrovae describe a.csv --output schema.yaml"):
        main([*train, "--columns", "v"])
    (tmp_path / "schema.yaml").write_text(Schema.infer("a.csv", missing=(".",)).to_yaml())
    main([*train, "--schema", "schema.yaml"])
    assert load_run("run")[1]["time_series"].schema.dialect.missing == (".",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digits", "--time", "day"], "time is for a table, a file; data is 'digits'"),
        (["--data", "shops.csv", "--series", "shop"], "series, columns and growth are for a table with time"),
        (["--data", "shops.csv", "--time", "day", "--series", "shop", "--likelihood", "Tabular"], "for sequences"),
        (["--data", "shops.csv", "--time", "day"], "have the same 'day'. Remove one, or give the column"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shops.csv", walks())
    with pytest.raises(SystemExit, match=message):
        main(["train", *options, "--epochs", "1", "--run", "run"])
    assert not (tmp_path / "run").exists()


def test_growth_that_is_always_alike_has_no_scale():
    with pytest.raises(ValueError, match="column 'v' grows always alike in the training rows"):
        TimeSeries.of({"t": days(12), "v": [math.pi * 1.5**i for i in range(12)]}, "t", growth=True)


def test_a_series_that_ends_in_an_empty_cell_goes_on_after_the_row_before(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    table = walks()
    end = max((day, i) for i, day in enumerate(table["day"]) if table["shop"][i] == "Bern")[1]
    holed = table | {"price": ["" if i == end else cell for i, cell in enumerate(table["price"])]}
    place = str(write(tmp_path / "holed.csv", holed))
    main(["forecast", "run", "--data", place, "--steps", "2", "--num-data", "1", "--output", str(tmp_path / "f.csv")])
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert {row["after"] for row in rows} == {"2020-02-28"}
    assert all(float(row["q05"]) <= float(row["q95"]) for row in rows)  # not NaN
    assert all(float(row["q05"]) >= 0 for row in rows)


def test_series_of_one_row_and_times_that_a_schema_leaves_out():
    table = {"t": [1, 2, 3, 4, 5, 6, 1], "s": ["a"] * 6 + ["b"], "v": [1.234, 2.71, 3.9, 2.2, 1.1, 5.123, 2.0]}
    series = TimeSeries.of(table, "t", "s", growth=True, num_steps=3)
    steps = series.steps(table)
    assert steps.rows[series.last(steps)[1].numpy()].tolist() == [[4, 5, 6]]
    schema = Schema.infer(table, {"t": "Identifier"})
    with pytest.raises(ValueError, match="time: the schema has no column 't' of times or numbers"):
        TimeSeries.of(table, "t", "s", schema=schema)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["2024-02-27", "2024-02-28", "2024-02-29"], ["2024-03-01", "2024-03-02"]),
        (["2024-01-05", "2024-01-12", "2024-01-19"], ["2024-01-26", "2024-02-02"]),
        (["2024-01-04", "2024-01-05", "2024-01-08"], ["2024-01-09", "2024-01-10"]),  # over a weekend
        (["2024-01-08", "2024-01-09", "2024-01-11", "2024-01-12", "2024-01-15"], ["", ""]),  # one in four is missing
        (["2023-11-15", "2023-12-15", "2024-01-15"], ["2024-02-15", "2024-03-15"]),
        (["2023-11-30", "2023-12-31", "2024-01-31"], ["2024-02-29", "2024-03-31"]),
        (["2023-09-30", "2023-12-31", "2024-03-31"], ["2024-06-30", "2024-09-30"]),
        (["2020-02-29", "2021-02-28", "2022-02-28"], ["2023-02-28", "2024-02-29"]),
        (["2024-01-01", "2024-01-05", "2024-01-06"], ["", ""]),
        (["2024-01-01T21:00", "2024-01-01T22:30", "2024-01-02T00:00"], ["2024-01-02T01:30", "2024-01-02T03:00"]),
        (
            ["2024-01-01T21:00Z", "2024-01-01T22:30Z", "2024-01-02T00:00Z"],
            ["2024-01-02T01:30:00+00:00", "2024-01-02T03:00:00+00:00"],
        ),
        ([2001, 2002, 2003], ["2004", "2005"]),
        ([0.25, 0.5, 0.75], ["1", "1.25"]),
        ([202411, 202412, 202501], ["", ""]),
    ],
)
def test_times_that_follow_go_on_with_the_rhythm(times, expected):
    table = {"t": times, "v": [float(i**2) for i in range(len(times))]}
    series = TimeSeries.of(table, "t")
    found = series.times_after(series.steps(table), len(times) - 1, 2)
    assert found == expected


def test_forecasts_say_when_their_rows_are(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    main(["forecast", "run", "--steps", "3", "--num-data", "3", "--output", str(tmp_path / "f.csv")])
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert [row["time"] for row in rows if row["column"] == "sales"] == ["2020-03-01", "2020-03-02", "2020-03-03"] * 3


def test_a_picture_and_quantiles_begin_after_the_last_complete_row(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    table = walks()
    late = {day for day in table["day"] if day > "2020-02-20"}
    prices = ["" if day in late else cell for day, cell in zip(table["day"], table["price"], strict=True)]
    sales = ["" if day in late else cell for day, cell in zip(table["day"], table["sales"], strict=True)]
    place = str(write(tmp_path / "holed.csv", table | {"price": prices, "sales": sales}))
    seen = []
    drawn = plots.forecasts
    monkeypatch.setattr("pyrovae.plots.forecasts", lambda past, coming: seen.append(past) or drawn(past, coming))
    main(["forecast", "run", "--data", place, "--steps", "2", "--output", str(tmp_path / "f.png")])
    (past,) = seen
    series = TimeSeries.of(table, "day", "shop", growth=True)
    steps = series.steps(table)
    for name, of in zip(("Bern", "Graz", "Ulm"), past, strict=True):
        which = steps.series == steps.names.index(name)
        last = steps.levels[which & (series.steps(place).times <= 50)][-1]
        np.testing.assert_allclose(of[-1].numpy(), last)


def test_a_series_goes_on_after_its_last_complete_row_however_long_ago(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(run)
    table = walks()
    never = ["" if shop == "Graz" else cell for shop, cell in zip(table["shop"], table["price"], strict=True)]
    old = [
        "" if shop == "Bern" and day > "2020-01-20" else cell
        for shop, day, cell in zip(table["shop"], table["day"], never, strict=True)
    ]
    place = str(write(tmp_path / "old.csv", table | {"price": old}))
    with pytest.warns(UserWarning, match="no forecast of 'Graz': each row has an empty cell"):
        main(["forecast", "run", "--data", place, "--steps", "1", "--output", str(tmp_path / "f.csv")])
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert {row["series"]: row["after"] for row in rows} == {"Bern": "2020-01-20", "Ulm": "2020-02-29"}
    assert "2 of 3 series" in capsys.readouterr().out


def test_growth_goes_on_from_a_level_after_an_empty_cell(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    table = walks()
    holed = ["" if day == "2020-02-28" else cell for day, cell in zip(table["day"], table["price"], strict=True)]
    place = str(write(tmp_path / "holed.csv", table | {"price": holed}))
    main(["forecast", "run", "--data", place, "--steps", "1", "--output", str(tmp_path / "f.csv")])
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert {row["after"] for row in rows} == {"2020-02-29"}
    last = {shop: price for day, shop, price in zip(*list(table.values())[:3], strict=True) if day == "2020-02-29"}
    for row in rows:
        if row["column"] == "price":
            assert abs(float(row["q50"]) / last[row["series"]] - 1) < 0.1


def test_reconstructions_are_rows_in_the_units_of_the_table(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    main(["reconstruct", "run", "--output", str(tmp_path / "r.csv")])
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert list(rows[0])[:5] == ["row", "series", "time", "change of price", "change of price, reconstructed"]
    table = walks()
    for row in rows:
        place = int(row["row"]) - 1
        assert (row["series"], row["time"]) == (table["shop"][place], table["day"][place])
    assert all(row["change of sales, reconstructed"] != "nan" for row in rows)
    main(["reconstruct", "run", "--output", str(tmp_path / "r.png")])
    assert (tmp_path / "r.png").exists()


def test_small_counts_are_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    table = {
        "t": days(80),
        "sold": rng.poisson(0.4, 80).tolist(),
        "is_open": (rng.random(80) < 0.5).astype(int).tolist(),
    }
    write(tmp_path / "a.csv", table)
    for i, options in enumerate(([], ["--columns", "sold,is_open"])):
        main(["train", "--data", "a.csv", "--time", "t", "--run", f"run{i}", *SMALL, *options])
        series = load_run(f"run{i}")[1]["time_series"]
        assert [column.kind for column in series.schema.columns[1:]] == ["Count", "Count"]
        main(["sample", f"run{i}", "--num-samples", "20", "--output", f"s{i}.csv"])
        rows = list(csv.DictReader(Path(f"s{i}.csv").read_text().splitlines()))
        assert all(row["sold"].isdigit() for row in rows)


def test_words_are_named(tmp_path):
    table = {"month": [f"2020-{i:02}" for i in range(1, 13)], "open": ["no", "yes"] * 6, "v": [i**2 for i in range(12)]}
    with pytest.raises(ValueError, match="time: column 'month' .* holds words.*of months their first day"):
        TimeSeries.of(table, "month")
    table["month"] = list(range(12))
    with pytest.raises(ValueError, match="columns: column 'open' .* holds words, such as 'no', and no numbers"):
        TimeSeries.of(table, "month", columns=["open", "v"])


def test_embeddings_say_where_their_pieces_begin(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    main(["encode", "run", "shops.csv", "--output", str(tmp_path / "e.csv")])
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    table = walks()
    assert {row["series"] for row in rows} == {"Bern", "Graz", "Ulm"}
    for row in rows:
        place = int(row["row"]) - 1
        assert (row["series"], row["time"]) == (table["shop"][place], table["day"][place])
        assert math.isfinite(float(row["mean_1"]))


def test_numbers_far_from_zero_keep_the_digits_of_their_spread():
    x = 1e8 + np.random.RandomState(0).normal(0, 5, 100)
    series = TimeSeries.of({"day": [f"2020-{1 + i // 25:02}-{1 + i % 25:02}" for i in range(100)], "x": x}, "day")
    assert abs(float(series.number_text(0, 100000012.976162)) - 100000012.976162) < 1e-5
    assert series.number_text(0, 0.0) == "0" and series.number_text(0, math.nan) == "nan"
    near = TimeSeries.of({"day": [f"2020-{1 + i // 25:02}-{1 + i % 25:02}" for i in range(100)], "x": x - 1e8}, "day")
    assert len(near.number_text(0, 100 / 7)) <= 9


def test_gaps_between_rows_are_filled(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    table = walks()
    gap = {("Ulm", "2020-01-11"), ("Ulm", "2020-01-12"), ("Graz", "2020-02-29")}  # the last at the end of its series
    keys = list(zip(table["shop"], table["day"], strict=True))
    prices = ["" if key in gap else cell for key, cell in zip(keys, table["price"], strict=True)]
    notes = [f"0{i}.50" for i in range(len(keys))]
    write(tmp_path / "shops.csv", table | {"price": prices, "note": notes})
    given = [
        "--time",
        "day",
        "--series",
        "shop",
        "--columns",
        "price,sales",
        "--max-steps",
        "20",
        "--structure",
        "StateSpace",
    ]
    main(["train", "--data", "shops.csv", "--run", "own", *given, *SMALL[:4], "--num-samples", "4", "--quiet"])
    main(["impute", "own", "shops.csv", "--num-draws", "40", "--output", "filled.csv"])
    vae, config = load_run("own")
    series = config["time_series"]
    steps = series.steps("shops.csv")
    ((window, hidden),) = series.gaps(steps)
    x = torch.from_numpy(steps.x[window]).float().unsqueeze(0)
    pyro.set_rng_seed(0)
    found = vae.impute(x.nan_to_num(), ~x.isnan().any(-1), num_draws=40)
    assert len(window) == 20 and [steps.rows[i] for i in hidden] == [
        1 + keys.index(("Ulm", day)) for day in ("2020-01-11", "2020-01-12")
    ]
    expected = np.quantile(series.levels(found.draws)[:, 0], (0.05, 0.5, 0.95), axis=0)
    cells = list(csv.DictReader(Path("filled-cells.csv").read_text().splitlines()))
    assert [(c["series"], c["time"], c["column"]) for c in cells] == [
        ("Ulm", "2020-01-11", "price"),
        ("Ulm", "2020-01-12", "price"),
    ]
    for cell, t in zip(cells, hidden - window[0], strict=True):
        numbers = [float(cell[name]) for name in ("low_5", "value", "high_95")]
        np.testing.assert_allclose(numbers, expected[:, t, series.names.index("price")], rtol=1e-5)
    rows = list(csv.DictReader(Path("filled.csv").read_text().splitlines()))
    for row, key, price, sales in zip(rows, keys, prices, table["sales"], strict=True):
        assert (row["shop"], row["day"]) == key and float(row["sales"]) == sales
        if key in gap:
            assert (row["price"] == "") == (key[0] == "Graz")
        else:
            assert float(row["price"]) == price
    lines, again = ((tmp_path / name).read_text().splitlines() for name in ("shops.csv", "filled.csv"))
    assert len(lines) == len(again)
    for line, other, key in zip(lines[1:], again[1:], keys, strict=True):  # to the letter, also other columns
        assert line == other or key in gap
    main(["train", "--data", "shops.csv", "--run", "growth", *given, "--growth", "true", *SMALL[:4], "--quiet"])
    with pytest.raises(SystemExit, match="gaps of a run on growth are not filled"):
        main(["impute", "growth", "shops.csv", "--output", "no.csv"])
    monkeypatch.chdir(run)
    with pytest.raises(SystemExit, match="gaps are filled by runs that were trained with --structure StateSpace"):
        main(["impute", "run", "shops.csv", "--output", str(tmp_path / "no.csv")])
