"""The command line on a small table with columns of many kinds."""

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pyro
import pytest
import torch
import yaml

import pyrovae
from pyrovae import data, log_marginal
from pyrovae.cli import main
from pyrovae.cli.common import load_table
from pyrovae.cli.comparison import _check_units
from pyrovae.cli.rows import draw_given, explain, read_given
from pyrovae.data import Binary, Category, Count, Dialect, Discrete, Real, Schema
from pyrovae.likelihoods import Tabular
from pyrovae.structures import TableFeatures, fit_independent_columns, log_prob_of_cells, table_vae

COLUMNS = ["id", "born", "city", "income", "visits", "share", "member"]


def write_rows(path, size=300, seed=0):
    """Writes rows in which the city decides on much, some cells missing."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in range(size):
            k = rng.integers(3)
            day = np.datetime64("1990-01-01") + rng.integers(4000)
            row = [1000 + i, day, ["Bern", "Graz", "Ulm"][k], f"{np.exp(8 + k + 0.3 * rng.normal()):.2f}"]
            row += [rng.poisson(2 + 8 * k), f"{rng.beta(2, 3):.3f}", ["no", "yes"][int(rng.random() < 0.2 + 0.3 * k)]]
            writer.writerow(["" if d > 0 and rng.random() < 0.05 else cell for d, cell in enumerate(row)])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    write_rows(folder / "people.csv")
    network = ["--likelihood.network.hidden", "[32]", "--encoder.network.hidden", "[32]"]
    directory = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["train", "--data", "people.csv", "--run", str(directory), "--epochs", "15", "--num-samples", "50"]
        main([*arguments, "--latent-dim", "3", *network])
    return directory


def test_the_schedule_of_a_table_ends_with_the_run(run):
    scheduler = yaml.safe_load((run / "config.yaml").read_text())["scheduler"]
    assert scheduler["class_path"].endswith("CosineAnnealingLR") and scheduler["init_args"]["T_max"] == 15


@pytest.fixture
def people(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    return run.parent / "people.csv"


def test_training_needs_no_option_but_the_file_and_says_what_it_chose(people, tmp_path, capsys):
    main(["train", "--data", "people.csv", "--run", str(tmp_path / "run"), "--epochs", "1", "--num-samples", "10"])
    out = capsys.readouterr().out
    assert "likelihood Tabular" in out and "batch_size" in out and "learning rate" in out
    assert "independent columns" in out and "income" in out
    assert "worse than the baseline" in out  # one epoch is not enough
    assert {"schema.yaml", "config.yaml", "weights.safetensors"} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_few_rows_to_compare_with_are_said_and_serve(run, people, tmp_path, capsys):
    few = tmp_path / "few.csv"
    few.write_text("".join(people.read_text().splitlines(keepends=True)[:13]))
    argv = ["score", str(run), str(few), "--num-samples", "30", "--output", str(tmp_path / "scores.csv")]
    main([*argv, "--reference", str(few)])
    assert "there are only 12 rows to compare with, the reference: ranks are rough" in capsys.readouterr().out
    assert all(row["log_p"] for row in read(tmp_path / "scores.csv"))


def test_a_run_is_loaded_with_its_schema_and_scores_to_the_digit(run, people, tmp_path):
    vae, config = pyrovae.load_run(run)
    schema = config["table"]
    assert schema.names == COLUMNS[1:] and isinstance(schema, Schema)
    main(["score", str(run), "people.csv", "--num-samples", "30", "--num-explained", "2", "--seed", "5",
          "--output", str(tmp_path / "scores.csv")])  # fmt: skip
    scores = read(tmp_path / "scores.csv")
    assert [int(row["row"]) for row in scores] == list(range(1, 301))
    table = data.Table(people, schema)
    pyro.set_rng_seed(5)
    x, mask = data.split_missing(table.x)
    estimate = log_marginal(vae.model, vae.guide, x, mask, num_samples=30, max_memory=64e6, progress=False)
    assert [row["log_p"] for row in scores] == [f"{v:.9g}" for v in estimate.value.tolist()]
    assert [row["trusted"] for row in scores] == [str(int(t)) for t in estimate.trusted.tolist()]
    assert [row["khat"] for row in scores] == [f"{k:.3g}" for k in estimate.khat.tolist()]
    explained = [row for row in scores if row["cell_1"]]
    assert len(explained) == 2 and all(float(row["rarer_than"]) > 0.95 for row in explained)
    # The rows of the file are those of the run, of which a tenth is compared with: ranks are about uniform.
    ranks = [float(row["rarer_than"]) for row in scores if row["rarer_than"]]
    assert len(ranks) > 250 and abs(np.mean(ranks) - 0.5) < 5 / np.sqrt(12 * 20)


def test_rows_with_holes_are_compared_with_rows_that_have_the_same(run, people, tmp_path, capsys):
    """A row is as rare as the same row whose other cells are usual, though fewer cells count."""
    rows = [row for row in read(people) if "" not in row.values()][:3]
    rows[0] |= {"income": "9000000.00", "share": ""}  # far out, with a hole
    rows[1] = dict.fromkeys(COLUMNS, "") | {"income": "9000000.00"}  # the only cell
    rows[2] = dict.fromkeys(COLUMNS, "")  # no cell
    with open(tmp_path / "new.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    main(["score", str(run), str(tmp_path / "new.csv"), "--output", str(tmp_path / "s.csv"), "--num-samples", "100"])
    far, only, none = read(tmp_path / "s.csv")
    for row in (far, only):
        assert float(row["rarer_than"]) == 1 and row["cell_1"].startswith("income (")
    assert only["cell_2"] == only["cell_3"] == ""
    assert (none["rarer_than"], none["khat"], none["cell_1"], none["log_p"]) == ("", "", "", "0")
    for row in (far, only):  # only positive surprise is named
        named = [row[f"cell_{k}"] for k in (1, 2, 3) if row[f"cell_{k}"]]
        assert all(float(cell.rpartition("(")[2].rstrip(")")) > 0 for cell in named)
    with pytest.raises(SystemExit, match="--seconds"):
        main(["score", str(run), "people.csv", "--seconds", "2", "--num-samples", "30"])


def test_resuming_keeps_the_schema_of_the_run(people, tmp_path):
    arguments = ["train", "--data", "people.csv", "--num-samples", "10", "--latent-dim", "2"]
    for name, epochs in (("whole", "4"), ("parts", "2")):
        main([*arguments, "--run", str(tmp_path / name), "--epochs", epochs, "--scheduler", "null"])
    before = (tmp_path / "parts" / "schema.yaml").read_bytes()
    main(["train", "--resume", "--run", str(tmp_path / "parts"), "--epochs", "4"])
    assert (tmp_path / "parts" / "schema.yaml").read_bytes() == before
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_samples_are_written_as_the_table_is(run, people, tmp_path):
    out = tmp_path / "new.csv"
    main(["sample", str(run), "--num-samples", "400", "--output", str(out), "--missing"])
    rows = read(out)
    assert list(rows[0]) == COLUMNS and len(rows) == 400
    assert {row["city"] for row in rows} == {"Bern", "Graz", "Ulm", ""}
    assert all(row["visits"] == "" or int(row["visits"]) >= 0 for row in rows)
    share = sum(cell == "" for row in rows for cell in list(row.values())[1:]) / (6 * 400)
    assert abs(share - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 2400) + 0.02
    # What is written can be read by the same schema.
    schema = pyrovae.load_run(run)[1]["table"]
    assert data.Table(out, schema).x.shape == (400, 6)


def test_given_cells_are_kept_and_the_others_follow_from_them():
    """A model whose p(x2 | x1) is known: z is a class, read off from both columns."""
    pyro.set_rng_seed(0)
    columns = [Binary("a", ("no", "yes")), Real("b", 0.0, 1.0)]
    vae = table_vae(columns, 1, likelihood=lambda d, c: Tabular(d, c, network=torch.nn.Linear(1, 2 + 12)))
    network = vae.likelihood.network
    with torch.no_grad():
        network.weight.zero_()
        network.bias.zero_()
        # Heads are in the order of the columns: two logits, then locations, scales and weights of four components.
        network.weight[1] = 3.0  # log odds of "yes": 3 z
        network.weight[2:6] = 1.0  # the mean of b: z
        network.bias[6:10] = -1.0
    x, ess = draw_given(vae, Schema(columns), "a=yes", 20_000)
    assert bool((x[:, 0] == 1).all()) and ess > 1000
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z**2) * torch.sigmoid(3 * z)
    mean = (weight * z).sum() / weight.sum()
    error = x[:, 1].std() / np.sqrt(min(ess, 20_000)) + x[:, 1].std() / np.sqrt(20_000)
    assert abs(x[:, 1].mean() - mean) < 5 * error
    with pytest.raises(ValueError, match="'c'"):
        draw_given(vae, Schema(columns), "c=1", 10)
    with pytest.raises(ValueError, match="too rare"):
        draw_given(vae, Schema(columns), "b=60", 10)


def test_surprise_of_a_cell_is_its_log_probability_given_the_others():
    """With a decoder that ignores z, cells are independent, and log p(x_d | rest) is log p(x_d)."""
    pyro.set_rng_seed(0)
    columns = [Category("c", ("a", "b", "c")), Count("n", 3.0, 2.0), Real("r", 0.0, 1.0)]
    vae = table_vae(columns, 2, likelihood=lambda d, c: Tabular(d, c, network=torch.nn.Linear(2, 3 + 12 + 12)))
    for weight in (vae.likelihood.network.weight, *vae.encoder.parameters()):  # q(z | x) = p(z) = N(0, 1)
        torch.nn.init.zeros_(weight)
    x = vae.sample(60)
    x[7, 1] = torch.nan
    x, mask = data.split_missing(x)
    surprise = explain(vae, (x[[3, 7]], mask[[3, 7]]), (x, mask), 20, 0)
    each = vae.likelihood(torch.zeros(1, 2)).base_dist.log_prob(x)
    each = torch.where(mask, each, torch.nan)
    expected = each.nanmean(0) - each[[3, 7]]
    assert bool(surprise[1, 1].isnan())
    torch.testing.assert_close(surprise, expected, atol=1e-3, rtol=0, equal_nan=True)
    alone = torch.tensor([[False, True, False]])
    surprise = explain(vae, (x[[3]], alone), (x, mask), 20, 0)
    torch.testing.assert_close(surprise[0, 1], expected[0, 1], atol=1e-3, rtol=0)
    assert bool(surprise[0, [0, 2]].isnan().all())


def test_imputation_fills_holes_alone_and_says_how_sure_it_is(run, people, tmp_path):
    out = tmp_path / "full.csv"
    main(["impute", str(run), "people.csv", "--output", str(out), "--num-samples", "200", "--num-draws", "50",
          "--num-completed", "2"])  # fmt: skip
    before, after, cells = read(people), read(out), read(tmp_path / "full-cells.csv")
    holes = 0
    for row_before, row_after in zip(before, after, strict=True):
        for name in COLUMNS[1:]:
            if row_before[name] == "":
                holes += 1
                assert row_after[name] != ""
            elif name in ("city", "born", "member", "visits"):
                assert row_before[name] == row_after[name]
            else:
                assert float(row_before[name]) == pytest.approx(float(row_after[name]), abs=0.006)
    assert len(cells) == holes
    for cell in cells:
        value = after[int(cell["row"]) - 1][cell["column"]]
        assert cell["value"] == value
        if cell["probabilities"]:
            shares = [float(part.rpartition(": ")[2]) for part in cell["probabilities"].split("; ")]
            assert cell["probabilities"].startswith(value) and sum(shares) == pytest.approx(1, abs=0.05)
    completed = read(tmp_path / "full-2.csv")
    assert all(row[name] != "" for row in completed for name in COLUMNS[1:])


def test_imputation_keeps_what_is_in_the_file(run, people, tmp_path):
    """Identifiers, another constant, the spelling of numbers, and the order of columns."""
    before = read(people)[:40]
    for i, row in enumerate(before):
        row["id"] = f"{90_000 - 7 * i}"
        row["income"] = row["income"] and f"{row['income']}000"
    before[3]["visits"], before[5] = "", dict.fromkeys(COLUMNS, "") | {"id": "5"}
    names = COLUMNS[::-1]
    with open(tmp_path / "new.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter=";")
        writer.writeheader()
        writer.writerows(before)
    for name in ("full.csv", "typed.parquet"):
        main(["impute", str(run), str(tmp_path / "new.csv"), "--output", str(tmp_path / name), "--num-samples", "50",
              "--num-draws", "10", "--num-completed", "1"])  # fmt: skip
    for name in ("full.csv", "full-1.csv"):
        with open(tmp_path / name, newline="") as file:
            after = list(csv.DictReader(file, delimiter=";"))
        assert list(after[0]) == names and after[5] == before[5]
        for old, new in zip(before, after, strict=True):
            assert all(new[c] == old[c] if old[c] else new[c] != "" or old["id"] == "5" for c in names)
    typed = pq.read_table(tmp_path / "typed.parquet").to_pylist()
    assert [row["id"] for row in typed] == [row["id"] for row in before]
    assert all(float(old["income"]) == new["income"] for old, new in zip(before, typed, strict=True) if old["income"])
    # From a Parquet file, whose cells have types.
    main(["impute", str(run), str(tmp_path / "typed.parquet"), "--output", str(tmp_path / "again.parquet")])
    assert pq.read_table(tmp_path / "again.parquet").to_pylist() == typed


def test_a_constant_of_a_new_file_is_kept(tmp_path):
    (tmp_path / "old.csv").write_text("year,a,b\n" + "".join(f"1994,{i % 7},{i % 3}\n" for i in range(40)))
    (tmp_path / "new.csv").write_text("year,a,b\n2001,1,2\n1994,,1\n,3,0\n")
    schema = data.Table(tmp_path / "old.csv").schema
    table = data.Table(tmp_path / "new.csv", schema)
    schema.write_filled(torch.ones_like(table.x), table.x, table.source, tmp_path / "full.csv")
    rows = (tmp_path / "full.csv").read_text().splitlines()
    assert rows[0] == "year,a,b" and rows[1] == "2001,1,2" and rows[3] == ",3,0"
    assert rows[2].startswith("1994,") and rows[2].endswith(",1") and ",," not in rows[2]
    with pytest.raises(ValueError, match="shape"):
        schema.write_filled(table.x[:1], table.x, table.source, tmp_path / "full.csv")


def test_imputation_of_a_table_without_holes_says_so(run, people, tmp_path, capsys):
    rows = [row for row in read(people) if "" not in row.values()]
    with open(tmp_path / "new.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    main(["impute", str(run), str(tmp_path / "new.csv"), "--output", str(tmp_path / "full.csv")])
    assert "nothing to fill" in capsys.readouterr().out
    assert (tmp_path / "full.csv").read_bytes() == (tmp_path / "new.csv").read_bytes()


def test_embeddings_are_those_of_the_encoder_in_the_order_of_the_file(run, people, tmp_path):
    main(["encode", str(run), "people.csv", "--output", str(tmp_path / "z.csv")])
    rows = np.loadtxt(tmp_path / "z.csv", delimiter=",", skiprows=1)
    vae, config = pyrovae.load_run(run)
    x, mask = data.split_missing(data.Table(people, config["table"]).x)
    with torch.no_grad():
        q = vae.encode(x, mask)
    np.testing.assert_array_equal(rows[:, 0], np.arange(1, 301))
    np.testing.assert_allclose(rows[:, 1:], torch.cat([q.mean, q.stddev], -1).numpy(), rtol=1e-6, atol=1e-6)


def test_evaluate_knows_tables_and_samples_have_no_mean(run, people, capsys):
    main(["evaluate", str(run), "--num-samples", "20"])
    assert "test: log p(x)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="tables"):
        main(["sample", str(run), "--mean", "--output", "x.csv"])


def test_rows_are_reconstructed_from_their_latents(run, people, tmp_path):
    vae, config = pyrovae.load_run(run)
    out = tmp_path / "r.csv"
    main(["reconstruct", str(run), "--num-data", "12", "--split", "train", "--output", str(out), "--seed", "4"])
    assert list(read(out)[0]) == COLUMNS and len(read(out)) == 12
    x = data.Table(out, config["table"]).x
    assert not x.isnan().any()
    # Each median lies within the 99 % of the draws of the same distribution, and each class is among the likely ones.
    part = load_table(config["data"], config["table"])[0].train
    args = data.split_missing(part.x[:12])
    pyro.set_rng_seed(4)
    with torch.no_grad():
        draws = vae.decode(vae.encode(*args).sample()).sample((4000,))
    low, high = draws.quantile(0.25, dim=0), draws.quantile(0.75, dim=0)
    for d, column in enumerate(config["table"].modelled):
        if isinstance(column, Discrete):
            shares = (draws[:, :, d] == x[:, d]).double().mean(0)
            assert (shares > 1 / column.num_levels - 0.05).all()
        else:
            assert ((low[:, d] <= x[:, d]) & (x[:, d] <= high[:, d])).all()


@pytest.mark.parametrize(
    "given, problem",
    [("city=Bern, city=Ulm", "'city' twice"), ("city=Bern, share=", "missing cell, '', in column 'share'")],
)
def test_cells_given_twice_or_not_at_all_are_refused(run, people, tmp_path, given, problem):
    with pytest.raises(SystemExit, match=problem):
        main(["sample", str(run), "--given", given, "--output", str(tmp_path / "x.csv")])


def test_bad_input_is_refused_and_leaves_nothing(run, people, tmp_path):
    (tmp_path / "bad.csv").write_text(people.read_text().replace("Ulm", "Linz"))
    for verb in ("score", "impute", "encode"):
        with pytest.raises(SystemExit, match="city"):
            main([verb, str(run), str(tmp_path / "bad.csv"), "--output", str(tmp_path / "out.csv")])
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises(SystemExit, match="no file"):
        main(["score", str(run), str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match="Tabular"):
        main(["train", "--likelihood", "Tabular", "--preprocessing", "grey", "--run", str(tmp_path / "r")])
    with pytest.raises(SystemExit, match="grey"):
        main(["train", "--data", "people.csv", "--preprocessing", "static", "--run", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_hidden_cells_are_a_uniform_fraction_of_some_rows():
    torch.manual_seed(0)
    mask = torch.rand(20_000, 8) < 0.9
    mask[:, 0] = True
    x, fewer = data.hide_cells(torch.zeros(20_000, 8), mask, share=0.4)
    assert bool((fewer <= mask).all()) and bool(fewer.any(1).all())
    # Of the last cells, if observed, 0.4 times a mean fraction of a half are hidden, but for rows that would be empty.
    hidden = 1 - fewer[:, 7][mask[:, 7]].double().mean().item()
    empty = 0.4 / 9 * 1.6  # the share of rows that would lose all of about 7.3 cells, at most
    assert 0.2 - empty - 0.02 < hidden < 0.2 + 5 * np.sqrt(0.16 / 18_000)
    with pytest.raises(ValueError, match="share"):
        data.hide_cells(x, mask, share=2.0)


def test_independent_columns_reach_the_entropy_of_independent_data():
    torch.manual_seed(0)
    columns = [Real("r", 2.0, 3.0), Category("c", ("a", "b", "c"))]
    x = torch.stack([2 + 3 * torch.randn(20_000), torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 20_000, True)], 1)
    p = fit_independent_columns(columns, x[:10_000])
    score = log_prob_of_cells(p, x[10_000:])
    exact = torch.stack([
        torch.distributions.Normal(2.0, 3.0).log_prob(x[10_000:, 0]),
        torch.tensor([0.5, 0.3, 0.2]).log()[x[10_000:, 1].long()],
    ], dim=1)  # fmt: skip
    gap = score - exact
    assert (gap.mean(0).abs() < 5 * gap.std(0) / 100 + 0.01).all()
    holes = torch.tensor([[torch.nan, 1.0]])
    assert log_prob_of_cells(p, holes)[0, 0] == 0


def test_features_of_times_and_levels():
    features = TableFeatures([data.Ordered("o", ("S", "M", "L")), data.Time("t", 10.0, 5.0, origin="2024-01-01")])
    x, mask = torch.tensor([[2.0, 0.0], [0.0, 7.0]]), torch.tensor([[True, True], [False, True]])
    out = features(x, mask)
    assert out.shape == (2, features.num_features)
    place = features.cyclic
    assert len(place) == 2  # week and year: days have no time of day
    # A week later the week's sine and cosine are the same.
    week = out[:, 5:7] if place[0][1] == 7 else out[:, 7:9]
    torch.testing.assert_close(week[0], week[1])


def test_runs_of_one_table_are_compared_in_the_units_of_the_file(run, people, tmp_path, capsys):
    schema = pyrovae.load_run(run)[1]["table"]
    short = ["train", "--data", "people.csv", "--epochs", "1", "--num-samples", "10", "--latent-dim", "2"]

    def train(name, **changed):
        columns = [replace(c, **changed.get(c.name, {})) for c in schema.columns]
        (tmp_path / f"{name}.yaml").write_text(Schema(columns, schema.dialect).to_yaml())
        main([*short, "--run", str(tmp_path / name), "--schema", str(tmp_path / f"{name}.yaml")])
        return str(tmp_path / name)

    others = [train("short"), train("moved", income={"loc": 8.5, "scale": 1.0}, born={"loc": 1000.0})]
    arguments = ["--num-samples", "30", "--output", str(tmp_path / "scores.csv")]
    main(["compare", str(run), *others, *arguments, "--picture", str(tmp_path / "p.png")])
    assert "1 less 2" in capsys.readouterr().out
    scores = read(tmp_path / "scores.csv")
    assert len(scores) == 30
    vae = pyrovae.load_run(run)[0]
    x, mask = data.split_missing(data.load("people.csv", schema=schema).test.x)
    pyro.set_rng_seed(0)
    value = log_marginal(vae.model, vae.guide, x, mask, num_samples=30, max_memory=64e6, progress=False).value
    assert np.allclose([float(row["value_1"]) for row in scores], value.numpy(), atol=1e-4)

    density = train("density", share={"step": None, "decimals": None, "min_decimals": 0})
    with pytest.raises(SystemExit, match="column .share.: .* a probability of a step of 0.001 .* a density"):
        main(["compare", str(run), density, "--picture", str(tmp_path / "q.png")])
    np.savetxt(tmp_path / "n.csv", np.random.default_rng(0).normal(size=(60, 6)), delimiter=",")
    numbers = ["--data", str(tmp_path / "n.csv"), "--preprocessing", "grey", "--likelihood", "Normal"]
    main(["train", *numbers, "--run", str(tmp_path / "n"), "--epochs", "1", "--num-samples", "10"])
    with pytest.raises(SystemExit, match="is a run on a table and .* is not"):
        main(["compare", str(run), str(tmp_path / "n"), "--picture", str(tmp_path / "q.png")])


def test_units_of_columns_are_compared_and_not_their_kinds():
    def check(*columns):
        _check_units("a", Schema(columns[:1]), "b", Schema(columns[1:]))

    count, ages = Count("n", 3.0, 2.0), Real("n", 3.0, 2.0, step=1)
    for other in (ages, data.Ordered("n", (0, 1, 2)), data.Positive("n", 1.0, 1.0, step=1, spikes=(0,))):
        check(count, other)
    check(Real("n", 0.0, 1.0), data.Positive("n", 1.0, 2.0))
    density = Real("n", 0.0, 1.0)
    for a, b in [(count, density), (ages, replace(ages, step=0.5)), (density, replace(density, spikes=(0.0,)))]:
        with pytest.raises(ValueError, match="column 'n': a gives a .*these cannot be compared. Train both with one"):
            check(a, b)
    with pytest.raises(ValueError, match="model different columns .'n', 'm' in only one of them"):
        check(count, replace(count, name="m"))


@pytest.mark.parametrize("given", ['t="23,5", c=Bern', "t=23.5, c=Bern", "c=Bern,t=23.5", 't = 23.5 ,c="Bern"'])
def test_given_numbers_are_written_with_a_point_or_as_in_the_file(given):
    pyro.set_rng_seed(0)
    columns = [Real("t", 23.0, 5.0, step=0.5, decimals=1), Category("c", ("Bern", "Ulm, Donau"))]
    schema = Schema(columns, Dialect(delimiter=";", decimal=",", thousands="."))
    vae = table_vae(columns, 1)
    x, _ = draw_given(vae, schema, given, 5)
    assert x.tolist() == [[23.5, 0.0]] * 5
    assert draw_given(vae, schema, 'c="Ulm, Donau"', 5)[0][:, 1].tolist() == [1.0] * 5
    with pytest.raises(ValueError, match="got '5'. Write numbers with a decimal point, and double quotes"):
        draw_given(vae, schema, "t=23,5", 5)


def test_a_given_name_may_have_commas_and_equals_signs():
    schema = Schema([Real("size, in cm", 0.0, 1.0), Real("a=b", 0.0, 1.0), Real("c", 0.0, 1.0)])
    given = read_given(schema, '"size, in cm"=2.5, "a=b"="-1.0",c=0.5')
    assert given == {"size, in cm": [2.5], "a=b": ["-1.0"], "c": [0.5]}
    with pytest.raises(ValueError, match="given must be pairs"):
        read_given(schema, "size, in cm=2.5")


@pytest.fixture
def changed(run, people, tmp_path, monkeypatch):
    """A run whose file was sorted by another column since: as many rows, and the same rows."""
    monkeypatch.chdir(tmp_path)
    first, *rows = people.read_text().splitlines()
    (tmp_path / "mine.csv").write_text("\n".join([first, *rows]) + "\n")
    main(["train", "--data", "mine.csv", "--run", "mine", "--epochs", "2", "--num-samples", "5", "--latent-dim", "2"])
    (tmp_path / "mine.csv").write_text("\n".join([first, *sorted(rows, key=lambda row: row[::-1])]) + "\n")
    return tmp_path / "mine"


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "mine", "--num-samples", "5"],
        ["evaluate", "mine", "--data", "mine.csv", "--num-samples", "5"],
        ["diagnose", "mine"],
        ["report", "mine"],
        ["score", "mine", "mine.csv", "--output", "scores.csv"],
        ["train", "--run", "mine", "--resume", "--epochs", "3"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_a_file_that_changed_since_training_is_refused(changed, command):
    before = {path: path.read_bytes() for path in changed.iterdir()}
    with pytest.raises(SystemExit, match="mine.csv has changed since the run began"):
        main(command)
    assert {path: path.read_bytes() for path in changed.iterdir()} == before


def test_changed_rows_can_be_scored_as_other_data_and_beside_others(changed, tmp_path, capsys):
    (tmp_path / "other.csv").write_bytes((tmp_path / "mine.csv").read_bytes())
    main(["evaluate", "mine", "--data", "other.csv", "--num-samples", "5"])
    assert "test: log p(x)" in capsys.readouterr().out
    main(["score", "mine", "mine.csv", "--reference", "other.csv", "--output", "scores.csv", "--num-samples", "5"])
    assert len(read(tmp_path / "scores.csv")) == 300
    about = json.loads((changed / "run.json").read_text())
    del about["fingerprint"]  # as a run of an earlier version
    (changed / "run.json").write_text(json.dumps(about))
    main(["evaluate", "mine", "--num-samples", "5"])
