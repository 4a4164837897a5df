"""The rows of the page of results: their configurations, runs, records, and the page."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pyrovae import config as configs
from pyrovae.cli.parser import command_parser

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("results")


def test_the_page_is_that_of_the_records(results):
    assert results.PAGE.read_text() == results.page()


def test_every_row_has_a_file_that_is_checked_as_the_command_line_does(results):
    files = sorted(results.FOLDER.glob("*.yaml"))
    assert {path.stem for path in files} == set(results.ROWS)
    for path in files:
        configs.check_options(yaml.safe_load(path.read_text()))
        parser = command_parser("train")
        parsed = yaml.safe_load(parser.dump(parser.parse_args(["--config", str(path)]), skip_unset=False))
        for entry, value in yaml.safe_load(path.read_text()).items():
            assert results.holds(parsed[entry], value), f"{path.name}: a run would hold {parsed[entry]} for {entry}"
    assert {path.stem for path in results.FOLDER.glob("*.json")} <= {path.stem for path in files}


def test_the_list_says_what_was_run_and_what_was_not(results, capsys):
    results.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert set(states) == set(results.ROWS)
    for name, line in states.items():
        expected = "run" if (results.FOLDER / f"{name}.json").exists() else "not run"
        assert line.split(maxsplit=2)[2].startswith(f"{expected} "), line


def smoke(results, name: str, folder: Path) -> dict:
    x = np.random.default_rng(0).random((60, 1, 8, 8)) < 0.2
    np.savez(folder / "x.npz", x=x.astype(np.float32))
    options = ["--data", str(folder / "x.npz"), "--epochs", "2", "--num-samples", "5"]
    return results.run(name, folder, options, "cpu", trusted_images=2, trusted_seconds=0.1)


FILES = sorted(path.stem for path in (BENCHMARKS / "results").glob("*.yaml"))
QUICK = "mnist-mlp-normal"


@pytest.mark.filterwarnings("ignore:the schedule of ELBO takes")
@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
def test_a_row_runs_and_is_recorded(results, tmp_path, monkeypatch, name):
    record = smoke(results, name, tmp_path)
    assert record["row"] == name and record["epochs"] == 2 and len(record["validation"]) == 2
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert record["test"]["log_marginal"] == lines[-1]["log_marginal"] and record["test"]["num_samples"] == 5
    assert record["trusted"]["num_data"] == record["same_images"]["num_data"] == 2
    # The page is made of the record.
    monkeypatch.setattr(results, "record_of", {name: record}.get)
    (line,) = [line for line in results.page().splitlines() if f"`{name}`" in line]
    assert f"{record['test']['log_marginal']:.2f} ± " in line and "2 epochs (ended there), best" in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the schedule of ELBO takes")
def test_what_is_trained_is_not_trained_again(results, tmp_path):
    record, weights = smoke(results, QUICK, tmp_path), tmp_path / QUICK / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert smoke(results, QUICK, tmp_path)["validation"] == record["validation"]
    assert weights.stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore:the schedule of ELBO takes")
def test_a_run_of_other_settings_is_not_recorded(results, tmp_path):
    (tmp_path / QUICK).mkdir()
    config = yaml.safe_load((results.FOLDER / f"{QUICK}.yaml").read_text())
    (tmp_path / QUICK / "config.yaml").write_text(yaml.safe_dump(config | {"batch_size": 7}))
    (tmp_path / QUICK / "metrics.jsonl").write_text('{"split": "test"}\n')
    with pytest.raises(ValueError, match="trained with another batch_size"):
        results.run(QUICK, tmp_path, [], "cpu", 2, 1.0)


def test_unknown_rows_are_refused(results, capsys):
    with pytest.raises(SystemExit):
        results.main(["mnist"])
    assert "there is no row mnist" in capsys.readouterr().err
