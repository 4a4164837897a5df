"""pyrovae sweep: what files say, the search, sweeps that go on, and the runs that it trains."""

import contextlib
import csv
import io
import json
import math
import subprocess
import sys

import pytest
import yaml

from pyrovae.cli import main, sweeping

TRAIN = {"data": "digits", "epochs": 1, "num_samples": 5}
VARY = {
    "optimizer.lr": {"low": 0.0001, "high": 0.1, "log": True},
    "latent_dim": {"low": 2, "high": 6},
    "prior": ["StandardNormal", "GaussianMixture"],
    "likelihood.network.hidden": [[20], [20, 20]],
}


def write(folder, vary=VARY, train=TRAIN):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"train": train, "vary": vary}))
    return str(path)


def table(folder) -> list[dict]:
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


def error_of(*argv) -> str:
    with pytest.raises(SystemExit) as error:
        main(["sweep", *map(str, argv)])
    return str(error.value)


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({}, "vary must hold the options to search"),
        ({"latent_dim": {"low": 8, "high": 4}}, "vary holds .* for latent_dim. Give a range"),
        ({"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}, "low end of a log range is above 0"),
        ({"optimizer.lr": {"low": "1e-4", "high": 1.0}}, "Give a range"),
        ({"optimizer.lr": 0.1}, "Give a range"),
        ({"batch_size": []}, "Give a range"),
        ({"latent_dims": [2, 3]}, "latent_dims, which is no option"),
        ({"run": ["a", "b"]}, "run, which is no option"),
        ({"trust": [True]}, "trust, which is no option"),
        ({"loss.beta": [0.1, 1.0]}, "losses of other data or objectives cannot be compared"),
        ({"likelihood": ["Normal", "StudentT"]}, "cannot be compared"),
        ({"preprocessing": ["grey", "static"]}, "cannot be compared"),
        ({"prior": ["StandardNormal", "evil.Prior"]}, "vary names evil.Prior"),
        ({"likelihood.network": [{"class_path": "evil.Network"}]}, "vary names evil.Network"),
    ],
)
def test_what_cannot_be_searched_is_refused(vary, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        sweeping.sweep(write(tmp_path, vary))
    assert not (tmp_path / "runs").exists()


def test_the_rest_of_the_file_is_checked_as_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "must not name a run" in error_of(write(tmp_path, train={"run": "a"}))
    assert "epochs must be int" in error_of(write(tmp_path, train={"epochs": "many"}))
    assert "evil.Prior" in error_of(write(tmp_path, train={"prior": {"class_path": "evil.Prior"}}))
    assert "trials must be at least 1" in error_of(write(tmp_path), "--trials", "0")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "two entries, train and vary" in error_of(tmp_path / "list.yaml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'pyrovae[sweep]'" in error_of(write(tmp_path))
    assert not (tmp_path / "runs").exists()


def bowl(calls, stop_at=None):
    """Returns a stand-in of a trial: a loss whose minimum is at a rate of 0.01 and 4 latents."""

    def run(study, number, options, place, trust):
        if number == stop_at and number not in {n for n, _ in calls}:
            calls.append((number, options))
            raise KeyboardInterrupt
        calls.append((number, options))
        study.tell(number, math.log(options["optimizer.lr"] / 0.01) ** 2 + (options["latent_dim"] - 4) ** 2)

    return run


def test_a_sweep_that_goes_on_is_the_one_that_was_not_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    file, whole, parts = write(tmp_path), [], []
    monkeypatch.setattr(sweeping, "_run", bowl(whole))
    sweeping.sweep(file, 25, "whole")
    monkeypatch.setattr(sweeping, "_run", bowl(parts, stop_at=12))
    sweeping.sweep(file, 5, "parts")
    with pytest.raises(KeyboardInterrupt):
        sweeping.sweep(file, 25, "parts")
    sweeping.sweep(file, 25, "parts")
    assert parts.pop(12) == whole[12], "the trial that was stopped has the same options again"
    assert parts == whole
    assert len({json.dumps(options) for _, options in whole}) == 25
    rows = table(tmp_path / "whole")
    assert [float(row["validation"]) for row in rows] == sorted(float(row["validation"]) for row in rows)
    assert f"pyrovae evaluate whole/{rows[0]['run']}" in capsys.readouterr().out
    later, first = ([float(r["validation"]) for r in rows if (int(r["run"]) < 10) == early] for early in (False, True))
    assert sum(later) / len(later) < sum(first) / len(first), "what is chosen after ten trials is better than chance"
    with pytest.raises(ValueError, match="holds another sweep"):
        sweeping.sweep(write(tmp_path, VARY | {"batch_size": [50, 100]}), 25, "whole")


def in_this_process(command, **kwargs):
    """Stands in for subprocess.run, without the seconds in which a process imports torch."""
    python, *module = command[:3]
    assert (python, module) == (sys.executable, ["-m", "pyrovae"])
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(command[3:])
        except SystemExit as error:
            return subprocess.CompletedProcess(command, 1, "", f"{err.getvalue()}\n{error}\n")
    return subprocess.CompletedProcess(command, 0, "", "")


def test_trials_are_runs_and_failures_are_said(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    main(["sweep", write(tmp_path), "--trials", "2"])
    out = capsys.readouterr().out
    rows = table(tmp_path / "runs" / "sweep")
    assert {row["run"] for row in rows} == {"000", "001"}
    for row in rows:
        run = tmp_path / "runs" / "sweep" / row["run"]
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["latent_dim"] == int(row["latent_dim"])
        assert config["prior"]["class_path"].endswith(row["prior"])
        assert config["optimizer"]["init_args"]["lr"] == float(row["optimizer.lr"])
        assert config["likelihood"]["init_args"]["network"]["init_args"]["hidden"] == json.loads(
            row["likelihood.network.hidden"]
        )
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert float(row["validation"]) == min(record.get("validation", math.inf) for record in records)
        assert f"{float(row['validation']):.4f}" in out
    message = error_of(write(tmp_path, {"prior.nonsense": [1, 2]}), "--directory", "wrong")
    assert "trial 0 failed (--prior.nonsense=" in message and "no argument 'nonsense'" in message
