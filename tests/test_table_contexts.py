"""Tables of which some columns are a context: rows are modelled given their cells."""

import csv
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch

import pyrovae
from pyrovae import data, log_marginal
from pyrovae.cli import main
from pyrovae.cli.labels import arguments_of, scored
from pyrovae.data import Identifier, Schema
from pyrovae.structures import TableFeatures, table_vae

COLUMNS = ["id", "city", "income", "born", "member"]
CONTEXT = ["city", "born"]


def write_rows(path, size=400, seed=0):
    """Writes rows in which the city decides on income and membership, some cells missing."""
    rng = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in range(size):
            k = rng.integers(3)
            row = [1000 + i, ["Bern", "Graz", "Ulm"][k], f"{np.exp(8 + k + 0.3 * rng.normal()):.2f}"]
            row += [1950 + rng.integers(50), ["no", "yes"][int(rng.random() < 0.1 + 0.4 * k)]]
            writer.writerow(["" if d > 0 and rng.random() < 0.05 else cell for d, cell in enumerate(row)])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    write_rows(folder / "people.csv")
    directory = folder / "run"
    options = ["--epochs", "20", "--num-samples", "50", "--latent-dim", "1"]
    for part in ("likelihood", "encoder"):
        options += [f"--{part}.network.hidden", "[16]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--data", "people.csv", "--run", str(directory), "--context", "born, city", *options])
    return directory


@pytest.fixture
def people(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    return run.parent / "people.csv"


def conditional_log_p(vae, x, context):
    """Returns log p(x | context) of whole rows by quadrature over the one latent."""
    z = torch.linspace(-12, 12, 4001)
    with torch.no_grad():
        log_prior = torch.stack([vae.prior(c.expand(1, -1)).log_prob(z[:, None]) for c in context], 1)
        log_joint = log_prior + vae.decode(z[:, None, None].expand(-1, len(x), 1), context).log_prob(x)
    return log_joint.double().logsumexp(0) + (z[1] - z[0]).double().log()


def test_a_context_is_no_part_of_the_tensor_and_comes_back(tmp_path):
    frame = {"id": ["a1", "b2", "c3"], "age": [39, 50, None], "city": ["Ulm", None, "Bern"], "spent": [1.5, 2.25, 7.0]}
    schema = Schema.infer(frame, {"id": "Identifier"})
    whole, given = data.Table(frame, schema), data.Table(frame, schema, context=["city", "age"])
    assert given.names == ["spent"] and given.schema.context_names == ["age", "city"]
    assert torch.equal(given.x, whole.x[:, 2:]) and torch.equal(
        given.context.nan_to_num(-1), whole.x[:, :2].nan_to_num(-1)
    )
    assert given.schema.decode(given.x, given.context).equals(schema.decode(whole.x))
    assert torch.equal(given.schema.encode({"spent": [1.5]}), given.x[:1])  # a context need not be there
    assert torch.equal(given.schema.encode_context({"age": ["39"], "city": ["Ulm"]}), given.context[:1])
    again = Schema.from_yaml(given.schema.to_yaml())
    assert again == given.schema != schema and again.given([]) == schema
    assert "context: age, city" in again.describe() and "context" not in schema.describe()
    again.write(given.x, tmp_path / "a.csv", given.context)
    schema.write(whole.x, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    (tmp_path / "rows.csv").write_text("age,city\n" + "\n".join(f"{20 + i // 2},{'BU'[i % 2]}" for i in range(40)))
    splits = data.load(tmp_path / "rows.csv", context=["city"])
    assert [part.context.shape for part in splits] == [(32, 1), (4, 1), (4, 1)]
    assert all(torch.equal(part.context[:, 0], ((part.rows - 1) % 2).float()) for part in splits)


@pytest.mark.parametrize(
    ("context", "message"),
    [(["town"], "'town' is not there"), (["id"], "'id' is left out"), (["age", "city"], "none is left to model")],
)
def test_contexts_that_cannot_be_are_refused(context, message):
    schema = Schema([Identifier("id"), *Schema.infer({"age": [39, 50, 41], "city": ["Ulm", "Bern", "Ulm"]}).columns])
    with pytest.raises(ValueError, match=message):
        schema.given(context)


def test_rows_are_decoded_with_their_context_alone():
    table = data.Table({"age": [39, 50, 41], "city": ["Ulm", "Bern", "Ulm"]}, context=["city"])
    for context in (None, table.context[:2], table.x.new_zeros(3, 2)):
        with pytest.raises(ValueError, match="the encoded cells of 'city', one row for each of the 3"):
            table.schema.decode(table.x, context)
    with pytest.raises(ValueError, match="context must be left out"):
        table.schema.given([]).decode(torch.zeros(3, 2), table.context)


def test_a_likelihood_that_takes_no_context_is_refused():
    columns = data.Table({"age": [39, 50, 41], "city": ["Ulm", "Bern", "Ulm"]}, context=["city"]).schema
    with pytest.raises(ValueError, match="a likelihood given a context must take context_dim"):
        table_vae(columns.modelled, 2, context=columns.context, likelihood=lambda latent_dim, columns: None)


def test_a_run_is_built_with_its_context_and_scored_as_in_python(run, people, capsys):
    vae, config = pyrovae.load_run(run)
    schema = config["table"]
    assert schema.context_names == CONTEXT and schema.names == ["income", "member"]
    size = TableFeatures(schema.context).num_features
    assert size == 3 + 1 + 2  # levels, a number, and whether each is missing
    assert [part.context_dim for part in (vae.prior, vae.likelihood, vae.encoder)] == [size] * 3
    main(["evaluate", str(run), "--num-samples", "20", "--output", str(run / "evaluated.csv"), "--quiet"])
    out = capsys.readouterr().out
    assert "here log p(x) stands for log p(x | city, born)" in out
    part = data.load("people.csv", schema=schema).test
    part = replace(part, x=part.x[some := ~part.x.isnan().all(1)], context=part.context[some])
    features = TableFeatures(schema.context)(*data.split_missing(part.context))
    pyrovae.save(vae, run / "saved.safetensors")
    vae = pyrovae.load(run / "saved.safetensors")
    pyro.set_rng_seed(0)
    estimate = log_marginal(vae.model, vae.guide, *data.split_missing(part.x), features, num_samples=20)
    written = np.loadtxt(run / "evaluated.csv", delimiter=",", skiprows=1)[:, 1]
    torch.testing.assert_close(torch.tensor(written).float(), estimate.value, rtol=1e-5, atol=1e-5)


def test_scores_are_conditional(run, people, capsys):
    vae, config = pyrovae.load_run(run)
    schema, table = config["table"], data.Table(people, config["table"])
    out = run / "scores.csv"
    main(["score", str(run), str(people), "--num-samples", "400", "--num-explained", "3", "--output", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("log p(x | city, born)") == 1 + 3
    scores = torch.tensor([float(row["log_p"]) for row in read(out)])
    errors = torch.tensor([float(row["standard_error"]) for row in read(out)])
    whole = ~table.x.isnan().any(1)
    features = TableFeatures(schema.context)(*data.split_missing(table.context))
    exact = conditional_log_p(vae, table.x[whole], features[whole])
    z = (scores[whole] - exact) / errors[whole]
    assert len(z) > 300 and z.abs().median() < 1.5 and (z.abs() < 4).double().mean() > 0.97
    listed = {cell.split(" ")[0] for row in read(out) for cell in (row["cell_1"], row["cell_2"], row["cell_3"]) if cell}
    assert listed and listed <= {"income", "member"}


def test_samples_given_the_whole_context_are_exact(run, people, capsys):
    vae, config = pyrovae.load_run(run)
    schema, size = config["table"], 4000
    shares = {}
    for seed, city in enumerate(("Bern", "Ulm")):
        out = run / f"{city}.csv"
        given = ["--given", f"born=1980, city={city}", "--num-samples", str(size), "--seed", str(seed)]
        main(["sample", str(run), *given, "--output", str(out)])
        assert f"given city={city}, born=1980: draws are exact" in capsys.readouterr().out
        rows = read(out)
        assert {(row["city"], row["born"]) for row in rows} == {(city, "1980")} and list(rows[0]) == COLUMNS
        c = TableFeatures(schema.context)(*data.split_missing(schema.encode_context({"city": [city], "born": [1980]})))
        # p(member | city, born) by quadrature, with the income hidden.
        z = torch.linspace(-12, 12, 4001)
        with torch.no_grad():
            weights = vae.prior(c).log_prob(z[:, None]).double().softmax(0)
            member = vae.decode(z[:, None], c.expand(len(z), -1)).base_dist
            x = torch.tensor([[1.0, 1.0]]).expand(len(z), -1)
            expected = float((weights * member.log_prob(x)[:, 1].exp()).sum())
        shares[city] = np.mean([row["member"] == "yes" for row in rows])
        assert abs(shares[city] - expected) < 4 * np.sqrt(expected * (1 - expected) / size)
    assert shares["Ulm"] > shares["Bern"] + 0.2


def test_other_cells_of_the_context_are_those_of_training_rows(run, people, capsys):
    schema = pyrovae.load_run(run)[1]["table"]
    train = schema.decode(*[(p := data.load("people.csv", schema=schema).train).x, p.context]).to_pylist()
    main(["sample", str(run), "--num-samples", "300", "--given", "city=Graz", "--output", "graz.csv"])
    of_graz = [row["born"] for row in train if row["city"] == "Graz" and (row["income"], row["member"]) != (None, None)]
    assert f"given born of {len(of_graz):,} training rows with city=Graz" in capsys.readouterr().out
    rows = read("graz.csv")
    assert {row["city"] for row in rows} == {"Graz"}
    assert {row["born"] for row in rows} <= {"" if born is None else str(born) for born in of_graz}
    main(["sample", str(run), "--num-samples", "300", "--output", "any.csv", "--missing"])
    assert "given city, born of random training rows" in capsys.readouterr().out
    rows = read("any.csv")
    assert {row["city"] for row in rows} == {"Bern", "Graz", "Ulm", ""} and any(row["income"] == "" for row in rows)


def test_cells_of_other_columns_are_given_by_weights(run, people, capsys):
    given = "born=1980, city=Graz, member=yes"
    main(["sample", str(run), "--num-samples", "50", "--given", given, "--output", "weighted.csv"])
    out = capsys.readouterr().out
    assert "effective sample size" in out and "exact" not in out
    rows = read("weighted.csv")
    assert {(row["city"], row["born"], row["member"]) for row in rows} == {("Graz", "1980", "yes")}
    assert len({row["income"] for row in rows}) > 40


def test_filling_holes_leaves_the_context_as_it_is(run, people, capsys):
    main(["impute", str(run), str(people), "--num-samples", "50", "--num-draws", "10", "--output", "filled.csv"])
    before, after = read(people), read("filled.csv")
    holes = sum(row[name] == "" for row in before for name in CONTEXT)
    assert holes > 0 and f"{holes:,} empty cells there stay empty" in capsys.readouterr().out
    for old, new in zip(before, after, strict=True):
        assert all(old[name] == new[name] for name in COLUMNS if old[name] != "" or name in CONTEXT)
        assert (old["income"], old["member"]) == ("", "") or "" not in (new["income"], new["member"])


def test_embeddings_depend_on_the_context(run, people, tmp_path):
    rows = [
        ["id", *COLUMNS[1:]],
        [1, "Bern", "5000", 1980, "no"],
        [2, "Ulm", "5000", 1980, "no"],
        [3, "", "5000", "", ""],
    ]
    file = tmp_path / "new.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in rows))
    main(["encode", str(run), str(file), "--output", str(tmp_path / "z.npy")])
    z = np.load(tmp_path / "z.npy")
    assert z.shape == (3, 2) and np.isfinite(z).all() and abs(z[0, 0] - z[1, 0]) > 1e-3


def test_a_report_and_a_diagnosis_are_of_rows_given_their_context(run, people, tmp_path, capsys):
    main(["report", str(run), "--output", str(tmp_path / "report.html")])
    text = (tmp_path / "report.html").read_text()
    assert "given city, born of test rows" in text and "log p(x | city, born)" in text
    assert "could not be made" not in text
    vae, config = pyrovae.load_run(run)
    part = data.load("people.csv", schema=config["table"]).test
    assert len(arguments_of(vae, part, config["table"])) == 3
    more = ["--nuts-samples", "0", "--num-data", "30", "--method", "ImportanceSampling", "--method.num_samples", "20"]
    main(["diagnose", str(run), *more, "--split", "train", "--output", str(tmp_path / "found")])
    out = capsys.readouterr().out
    assert "here log p(x) stands for log p(x | city, born)" in out and "columns, mean likeness" in out
    with pytest.raises(SystemExit, match="label is not for tables"):
        main(["diagnose", str(run), *more, "--label", "1", "--output", str(tmp_path / "other")])


def test_a_context_is_kept_with_the_run_and_in_a_schema(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_rows("some.csv", size=60)
    options = ["--data", "some.csv", "--num-samples", "10", "--latent-dim", "1"]
    options += ["--encoder.network.hidden", "[4]", "--likelihood.network.hidden", "[4]"]
    main(["train", *options, "--run", "a", "--context", '["city"]', "--epochs", "1", "--scheduler", "null"])
    main(["train", "--run", "a", "--resume", "--epochs", "2"])
    config = pyrovae.load_run("a")[1]
    assert config["context"] == ["city"] and config["table"].context_names == ["city"]
    with pytest.raises(SystemExit, match="context cannot change when a run is resumed"):
        main(["train", "--run", "a", "--resume", "--context", "born", "--epochs", "3"])
    main(["train", *options, "--run", "b", "--schema", "a/schema.yaml", "--epochs", "1"])
    assert scored(*[(loaded := pyrovae.load_run("b"))[0], loaded[1]["table"]]) == "log p(x | city)"
    main(["compare", "a", "b", "--num-samples", "10", "--num-data", "5", "--quiet"])
    with pytest.raises(SystemExit, match="model different columns"):
        main(["compare", "a", str(run), "--num-samples", "10"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "people.csv", "--context", "town"], "column 'town' is not there. Name some of 'city'"),
        (["train", "--data", "people.csv", "--context", "id"], "column 'id' is left out"),
        (["train", "--data", "digits", "--context", "city"], "context is for a table"),
        (["sample", "run", "--given", "member=yes"], "cells of all that it conditions on too, here of city, born"),
        (["sample", "run", "--given", "city=Rome"], "'Rome' is none of the 3 levels"),
        (["sample", "run", "--given", "city=Bern, born=1900.5"], "born"),
        (["sample", "run", "--given", "born=1890"], "no training row has born=1890"),
        (["train", "--data", "people.csv", "--context", "city", "--likelihood.context_dim", "9"], "context_dim is 9"),
    ],
)
def test_bad_input_is_refused(run, people, arguments, message):
    before = {path.name for path in run.parent.iterdir()}
    with pytest.raises(SystemExit, match=message):
        main(arguments)
    assert {path.name for path in run.parent.iterdir()} - {"runs"} == before - {"runs"}
