"""The command line on real data: what it writes, refuses, resumes and repeats."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pyrovae
from pyrovae import data
from pyrovae.cli import main
from pyrovae.cli.common import advice_as_options, crowded
from pyrovae.diagnostics import DIAGNOSES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory of a short training on the digits, made once; tests must leave it as it is."""
    directory = tmp_path_factory.mktemp("cli") / "digits"
    main(["train", "--run", str(directory), "--epochs", "40", "--num-samples", "200"])
    return directory


def digest(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).rglob("*") if p.is_file()}


def error_of(*argv):
    """Returns the message a command line ends with, which must be one line and no traceback."""
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in argv])
    assert isinstance(exit.value.code, str), f"exit status {exit.value.code} without a message"
    assert "\n" not in exit.value.code
    return exit.value.code


def test_train_leaves_a_whole_run_and_beats_the_baseline(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "run.json", "weights.safetensors", "checkpoint.safetensors", "metrics.jsonl", "samples.png",
        "reconstructions.png", "latent_space.png", "learning_curve.png", "report.html",
    }  # fmt: skip
    *epochs, result = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [record["epoch"] for record in epochs] == list(range(1, 41))
    assert result["split"] == "test" and result["num_data"] == 300 and result["num_samples"] == 200
    assert result["log_marginal"] - 2 * result["standard_error"] > result["baseline"]
    for picture in run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "parts",
    [
        ["--prior", "VampPrior", "--prior.num_components", "7"],
        pytest.param(["--prior", "FlowPrior", "--encoder", "GaussianMixture"], marks=pytest.mark.slow),
        ["--prior", "GaussianProcess", "--prior.num_times", "4", "--prior.kernel", "pyrovae.priors.matern_32"],
        ["--prior", "HypersphericalUniform", "--encoder", "VonMisesFisher"],
        [
            "--prior",
            "Categorical",
            "--prior.num_classes",
            "3",
            "--encoder",
            "Categorical",
            "--encoder.num_classes",
            "3",
            "--likelihood.network",
            "OneHotInput",
            "--likelihood.network.num_classes",
            "3",
        ],
    ],
    ids=lambda parts: parts[1],
)
def test_other_parts_train_and_are_loaded_without_trust(parts, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", "--run", str(run), "--epochs", "1", "--num-samples", "10", "--latent-dim", "4", *parts])
    main(["evaluate", str(run), "--num-samples", "10"])
    assert "bits per dimension, of 64" in capsys.readouterr().out
    main(["sample", str(run), "--num-samples", "3", "--output", str(run / "x.npy"), "--mean"])
    assert np.load(run / "x.npy").shape == (3, 1, 8, 8)


LOSSES = {
    "IWAE": "--loss IWAE --loss.num_particles 4 --loss.gradient DoublyReparameterized",
    "warm-up": "--loss ELBO --loss.beta Linear --loss.beta.steps 20 --loss.penalty FreeBits --loss.penalty.nats 0.1",
    "wake-sleep": "--loss pyrovae.bounds.ReweightedWakeSleep --loss.num_particles 4 --loss.sleep 0.5",
    "discriminator": "--loss ELBO --loss.regularizers "
    "[{class_path:TotalCorrelation,init_args:{weight:5,dataset_size:1197}},"
    "{class_path:DensityRatio,init_args:{weight:1,discriminator:{class_path:pyrovae.nn.MLP,init_args:{in_shape:4,out_shape:1}}}}]",
}


@pytest.mark.parametrize("loss", LOSSES)
def test_bounds_train_and_are_resumed_to_the_bit_without_trust(loss, tmp_path):
    parts = [part.replace(":", ": ").replace(",", ", ") for part in LOSSES[loss].split()]
    common = ["train", "--num-samples", "10", "--latent-dim", "4"]
    for name, epochs in (("whole", "4"), ("parts", "2")):
        main([*common, *parts, "--run", str(tmp_path / name), "--epochs", epochs])
    main(["train", "--resume", "--run", str(tmp_path / "parts"), "--epochs", "4"])
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    record = json.loads((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()[3])
    assert {"bound", "reconstruction", "kl z"} <= record.keys()
    if loss == "discriminator":
        assert {"TotalCorrelation", "DensityRatio"} <= record.keys()


def test_a_table_of_mixed_columns_trains_from_a_file_and_has_no_baseline(tmp_path, capsys):
    rng = np.random.default_rng(0)
    z = rng.normal(size=200)
    columns = [z + rng.normal(size=200), -z, rng.poisson(np.exp(z)), (z > 0).astype(int) + (z > 1)]
    np.savetxt(tmp_path / "table.csv", np.stack(columns, axis=1), delimiter=",")
    config = {
        "data": str(tmp_path / "table.csv"),
        "preprocessing": "grey",
        "latent_dim": 2,
        "likelihood": {
            "class_path": "Mixed",
            "init_args": {
                "blocks": [
                    [{"class_path": "Normal"}, 2],
                    [{"class_path": "Poisson"}, 1],
                    [{"class_path": "Categorical", "init_args": {"num_classes": 3}}, 1],
                ]
            },
        },
    }
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    main(["train", "--config", str(tmp_path / "mixed.yaml"), "--run", str(run), "--epochs", "2", "--num-samples", "30"])
    main(["evaluate", str(run), "--num-samples", "30"])
    out = capsys.readouterr().out
    assert "baseline" not in out and "bits per dimension" not in out  # part density, part probability
    main(["sample", str(run), "--num-samples", "50", "--output", str(run / "x.csv")])
    x = np.loadtxt(run / "x.csv", delimiter=",")
    assert set(x[:, 3]) <= {0, 1, 2} and (x[:, 2] == x[:, 2].round()).all() and (x[:, 0] != x[:, 0].round()).all()


def test_data_outside_a_likelihoods_support_end_in_one_line_that_says_how_to_mend_them(tmp_path):
    message = error_of("train", "--run", tmp_path / "run", "--likelihood", "Poisson", "--preprocessing", "grey")
    assert "outside the support of Poisson" in message and "raw counts" in message


def test_the_output_names_preprocessing_and_baseline(tmp_path, capsys):
    main(["train", "--run", str(tmp_path / "a"), "--epochs", "1", "--num-samples", "10", "--preprocessing", "static"])
    out = capsys.readouterr().out
    assert "preprocessing: static binarisation" in out
    assert "factorised Bernoulli: -27." in out  # of the digits, binarised; the mean of a product of Bernoullis
    assert "test: log p(x) = -" in out


def test_evaluate_writes_what_log_marginal_gives(run, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    main(["evaluate", str(run), "--num-samples", "300", "--output", str(out), "--split", "validation", "--seed", "3"])
    table = np.genfromtxt(out, delimiter=",", names=True)
    assert table.dtype.names == ("datum", "value", "standard_error", "ess", "khat", "trusted", "row")
    np.testing.assert_array_equal(table["row"], data.load("digits").validation.rows)

    vae, _ = pyrovae.load_run(run)
    x = data.static_binarization(data.load("digits").validation.x, seed=1)
    torch.manual_seed(3)
    estimate = pyrovae.log_marginal(vae.model, vae.guide, x, num_samples=300, progress=False)
    np.testing.assert_allclose(table["value"], estimate.value, rtol=1e-7)
    assert advice_as_options(str(estimate)) in capsys.readouterr().out
    assert "already" in error_of("evaluate", run, "--output", out)


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        (
            ["AnnealedImportanceSampling", "--method.num_temperatures", "20", "--method.schedule", "Sigmoid"],
            "32 chains",
        ),
        (["ImportanceSampling", "--method.num_samples", "100", "--method.proposal", "Mixed"], "100 samples"),
    ],
    ids=["annealed", "mixed"],
)
def test_evaluate_takes_an_estimator(options, unit, run, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    main(["evaluate", str(run), "--num-data", "20", "--output", str(out), "--method", *options])
    text = capsys.readouterr().out
    assert f"from {unit} a datum" in text and "from 20 data" in text
    table = np.genfromtxt(out, delimiter=",", names=True)
    assert len(table) == 20 and np.isfinite(table["value"]).all() and set(table["trusted"]) <= {0.0, 1.0}
    if "AnnealedImportanceSampling" in options:
        assert (table["acceptance"] > 0.2).all() and (table["diverged"] == 0).all()
    # Both estimate the same: their difference is within their errors.
    main(["evaluate", str(run), "--num-data", "20", "--num-samples", "2000", "--output", str(tmp_path / "plain.csv")])
    plain = np.genfromtxt(tmp_path / "plain.csv", delimiter=",", names=True)
    error = np.sqrt(np.square(table["standard_error"]).sum() + np.square(plain["standard_error"]).sum())
    assert abs((table["value"] - plain["value"]).sum()) < 5 * error


def test_evaluate_scores_training_data_that_were_binarised_for_each_batch(run, capsys):
    main(["evaluate", str(run), "--split", "train", "--num-data", "30", "--num-samples", "50"])
    assert "train: log p(x) = -" in capsys.readouterr().out


def test_a_method_that_is_not_for_the_run_ends_in_one_line(run):
    assert "up to 3 latent dimensions, got 16" in error_of("evaluate", run, "--method", "Quadrature")
    assert "--method.num_samples 7" in error_of("evaluate", run, "--method", "CUBO", "--num-samples", "7")


def test_diagnose_says_what_a_run_learned(run, tmp_path, capsys):
    out, before = tmp_path / "diagnosis", digest(run)
    options = ["--nuts-samples", "0", "--method", "ImportanceSampling", "--num-data", "40", "--output", str(out)]
    main(["diagnose", str(run), *options])
    text = capsys.readouterr().out
    results = json.loads((out / "diagnosis.json").read_text())
    assert {name for name, result in results.items() if "skipped" not in result} == {*DIAGNOSES} - {
        "steps",
        "posterior",
        "synthetic_rows",
    }
    assert {p.stem for p in out.glob("*.png")} == {*results, "collapse_history"}
    for name in results:
        assert f": {DIAGNOSES[name].question}" in text
        assert results[name]["verdict"].split()[0] in text
    assert max(map(len, text.split("== in short")[1].splitlines()[:-1])) <= 80
    assert digest(run) == before
    assert "is there already" in error_of("diagnose", run, "--output", out)
    assert "nuts_samples must be at least 100, or 0" in error_of("diagnose", run, "--nuts-samples", "5")
    assert "num_data must be at least 30" in error_of("diagnose", run, "--num-data", "5")


def test_training_records_whether_the_latents_collapse(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:-1]
    looked = [record for record in records if "mutual_information" in record]
    assert len(looked) == 40 and all(0 <= record["active_units"] <= 16 for record in looked)
    assert looked[-1]["mutual_information"] > looked[0]["mutual_information"]


def test_diagnose_leaves_out_what_is_not_for_the_parts(tmp_path, capsys):
    parts = ["--prior", "OneHotCategorical", "--prior.num_classes", "4", "--encoder", "OneHotCategorical"]
    parts += ["--encoder.num_classes", "4", "--latent-dim", "8"]
    directory = tmp_path / "classes"
    main(["train", "--run", str(directory), "--epochs", "2", "--num-samples", "20", *parts])
    main(["diagnose", str(directory), "--num-data", "30"])
    results = json.loads((directory / "diagnosis-test" / "diagnosis.json").read_text())
    assert "skipped" in results["posterior"] and "skipped" in results["traversals"]
    assert results["gaps"]["test"]["untrusted"] == 0  # by enumeration
    assert "not for this model" in capsys.readouterr().out


def test_sample_and_reconstruct_write_pictures_and_arrays(run, tmp_path):
    main(["sample", str(run), "--num-samples", "7", "--output", str(tmp_path / "x.npy")])
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (7, 1, 8, 8) and set(np.unique(x)) == {0.0, 1.0}
    main(["sample", str(run), "--num-samples", "7", "--mean", "--output", str(tmp_path / "mean.csv")])
    mean = np.loadtxt(tmp_path / "mean.csv", delimiter=",")
    assert mean.shape == (7, 64) and ((mean > 0) & (mean < 1)).any()
    main(["reconstruct", str(run), "--num-data", "5", "--output", str(tmp_path / "r.npy")])
    assert np.load(tmp_path / "r.npy").shape == (5, 1, 8, 8)
    main(["reconstruct", str(run), "--output", str(tmp_path / "r.png")])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "must end in" in error_of("sample", run, "--output", tmp_path / "x.jpg")


def test_an_existing_directory_is_never_overwritten(run, tmp_path):
    before = digest(run)
    message = error_of("train", "--run", run, "--epochs", "1")
    assert str(run) in message and "--resume" in message
    assert digest(run) == before

    (tmp_path / "thesis.txt").write_text("precious")
    assert "already exists" in error_of("train", "--run", tmp_path, "--epochs", "1")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_a_file_in_place_of_a_run_directory_is_refused(tmp_path, resume):
    (tmp_path / "file").write_text("mine")
    assert "file is a file, and a run is a directory" in error_of("train", "--run", tmp_path / "file", *resume)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["epochs", "batch-size", "patience", "num-samples"])
def test_numbers_that_are_too_small_are_refused_at_once(tmp_path, capsys, name):
    message = error_of("train", "--run", tmp_path / "run", f"--{name}", "0")
    assert f"{name.replace('-', '_')} must be at least 1, got 0" in message
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_run_repeated_from_its_config_has_the_same_weights(run, tmp_path):
    main(["train", "--config", str(run / "config.yaml"), "--run", str(tmp_path / "again")])
    assert digest(tmp_path / "again")["weights.safetensors"] == digest(run)["weights.safetensors"]


def test_resume_with_more_epochs_goes_on_with_the_configuration_of_the_run(tmp_path, run):
    directory = tmp_path / "digits"
    main(["train", "--run", str(directory), "--epochs", "15", "--num-samples", "200"])
    main(["train", "--run", str(directory), "--resume", "--epochs", "40"])
    assert digest(directory)["weights.safetensors"] == digest(run)["weights.safetensors"]
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("epoch") for line in lines] == [*range(1, 41), None]


def test_a_killed_run_resumed_ends_with_the_same_weights(tmp_path, run):
    directory = tmp_path / "digits"
    command = [
        sys.executable,
        "-m",
        "pyrovae",
        "train",
        "--run",
        str(directory),
        "--epochs",
        "40",
        "--num-samples",
        "200",
    ]
    metrics = directory / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 10):
        assert process.poll() is None and time.monotonic() < deadline, (
            "training ended, or hung, before it could be killed"
        )
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (directory / "weights.safetensors").exists()

    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert digest(directory)["weights.safetensors"] == digest(run)["weights.safetensors"]
    lines = metrics.read_text().splitlines()
    assert [json.loads(line).get("epoch") for line in lines] == [*range(1, 41), None]


OWN_CLASS = """
import pathlib
from pyro import distributions as dist
from pyrovae.likelihoods import Likelihood

pathlib.Path({marker!r}).touch()

class Laplace(Likelihood):
    def forward(self, z, context=None):
        return dist.Laplace(self.parameters_of(z, context), 0.2).to_event(len(self.x_shape))
"""


def test_a_users_class_trains_by_import_path_and_is_loaded_only_when_trusted(tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    (tmp_path / "own_laplace.py").write_text(OWN_CLASS.format(marker=str(marker)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["train", "--run", "own", "--preprocessing", "grey", "--likelihood", "own_laplace.Laplace", "--epochs", "2",
          "--num-samples", "10"])  # fmt: skip
    marker.unlink()
    del sys.modules["own_laplace"]

    for argv in (["evaluate", "own"], ["sample", "own"], ["reconstruct", "own"], ["train", "--run", "own", "--resume"]):
        message = error_of(*argv)
        assert "own_laplace.Laplace" in message and "--trust" in message
    assert not marker.exists()
    main(["evaluate", "own", "--num-samples", "10", "--trust"])
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "pyrovae.storage.os.system", "pyrovae.storage.load", "torch.load", "subprocess.Popen"]
)
@pytest.mark.parametrize(
    "where", [("likelihood",), ("likelihood", "class_path"), ("encoder", "init_args", "network"), ("loss",)]
)
def test_a_config_that_names_other_code_is_refused(name, where, run, tmp_path):
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = yaml.safe_load((run / "config.yaml").read_text())
    place = config
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = name
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert name in error_of("evaluate", tmp_path)
    assert name in error_of("train", "--run", tmp_path, "--resume")


def test_damaged_and_foreign_runs_are_refused(run, tmp_path):
    def damaged(name, content):
        for file in run.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / name).write_bytes(content)
        return error_of("sample", tmp_path, "--output", tmp_path / "new.npy")

    about = json.loads((run / "run.json").read_text())
    assert "format 99" in damaged("run.json", json.dumps(about | {"format": "99"}).encode())
    assert "corrupt" in damaged("run.json", b"{")
    assert "corrupt" in damaged("config.yaml", b"latent_dim: 16\n")
    assert "corrupt" in damaged("config.yaml", b"\x80\x81")
    weights = (run / "weights.safetensors").read_bytes()
    assert "truncated" in damaged("weights.safetensors", weights[: len(weights) // 2])
    assert "corrupt" in damaged("weights.safetensors", weights[:-10] + b"0123456789")
    other = (run / "config.yaml").read_text().replace("latent_dim: 16", "latent_dim: 3").encode()
    assert "was edited" in damaged("config.yaml", other)
    assert not (tmp_path / "new.npy").exists()
    assert "not a run directory" in error_of("sample", tmp_path / "nothing")


def test_bad_data_leaves_nothing_behind(tmp_path):
    x = np.random.RandomState(0).rand(50, 6).astype(np.float32)
    np.save(tmp_path / "grey.npy", x)
    x[7, 2] = np.inf  # NaN is a missing value
    np.save(tmp_path / "infinite.npy", x)
    runs = tmp_path / "runs"

    def message(*argv):
        return error_of("train", "--run", runs / "a", "--epochs", "2", "--batch-size", "10", *argv)

    assert "row 7" in message("--data", tmp_path / "infinite.npy")
    assert "--preprocessing" in message("--data", tmp_path / "grey.npy", "--preprocessing", "grey")
    assert "no data set 'mnits'" in message("--data", "mnits")
    assert "no file" in message("--data", tmp_path / "none.csv")
    assert "num_samples" in message("--num-samples", "0")
    assert not runs.exists() or not any(runs.iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot write" in error_of("train", "--run", tmp_path / "file" / "run", "--epochs", "1")


def test_a_table_of_real_numbers(tmp_path, capsys):
    table = np.random.RandomState(0).randn(200, 5)
    np.savetxt(tmp_path / "table.csv", table, delimiter=",", header="a,b,c,d,e", comments="")
    main(["train", "--data", str(tmp_path / "table.csv"), "--run", str(tmp_path / "run"), "--preprocessing", "grey",
          "--likelihood", "Normal", "--likelihood.per-dimension", "true", "--likelihood.network.hidden", "[10]",
          "--latent-dim", "2", "--epochs", "3", "--num-samples", "10"])  # fmt: skip
    out = capsys.readouterr().out
    assert "160 train + 20 validation + 20 test of shape (5,)" in out and "factorised Normal: " in out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["likelihood"]["init_args"]["per_dimension"] is True
    assert config["likelihood"]["init_args"]["network"]["init_args"]["hidden"] == [10]
    main(["sample", str(tmp_path / "run")])
    assert (tmp_path / "run" / "samples-0.png").exists()


def test_an_unknown_option_is_an_error_that_names_it(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--latent-dims", "3"])
    assert "latent_dims" in capsys.readouterr().err


def test_resume_without_a_run_starts_one(tmp_path, capsys):
    main(["train", "--run", str(tmp_path / "new"), "--resume", "--epochs", "1", "--num-samples", "10"])
    assert "nothing to resume" in capsys.readouterr().out
    assert (tmp_path / "new" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    "option", [("--latent-dim", "8"), ("--optimizer.lr", "0.1"), ("--seed", "4"), ("--epochs", "1")]
)
def test_resume_refuses_what_the_checkpoint_would_overrule_and_changes_nothing(option, run):
    before = digest(run)
    message = error_of("train", "--run", run, "--resume", *option)
    assert option[0].strip("-").split(".")[0].replace("-", "_") in message
    assert digest(run) == before


def test_a_schedule_of_steps_and_an_average_train_and_a_longer_run_is_refused(tmp_path):
    run = ["train", "--run", str(tmp_path / "run")]
    schedule = ["--scheduler", "OneCycleLR", "--scheduler.max_lr", "0.003", "--schedule-every-step", "true"]
    main([*run, *schedule, "--ema-decay", "0.9", "--epochs", "2", "--num-samples", "10"])
    rates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[0]["learning_rate"] > 1e-3 > 1e-4 > rates[1]["learning_rate"], "it ends with the run"
    before = digest(tmp_path / "run")
    assert "OneCycleLR takes 20 steps and cannot go on, but the run has 40" in error_of(
        *run, "--resume", "--epochs", "4"
    )
    assert digest(tmp_path / "run") == before
    main([*run, "--resume", "--epochs", "2"])


def test_moved_images_train_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = ["train", "--shift", "1", "--num-samples", "10", "--run"]
    main([*options, str(tmp_path / "whole"), "--epochs", "2"])
    main([*options, str(tmp_path / "parts"), "--epochs", "1"])
    main(["train", "--run", str(tmp_path / "parts"), "--resume", "--epochs", "2"])
    main(["train", "--run", str(tmp_path / "still"), "--num-samples", "10", "--epochs", "2"])
    weights = {name: load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts", "still")}
    assert all(torch.equal(t, weights["parts"][name]) for name, t in weights["whole"].items())
    assert not all(torch.equal(t, weights["still"][name]) for name, t in weights["whole"].items())
    assert "shift must be at least 0, got -1" in error_of(*options, str(tmp_path / "a"), "--shift", "-1")
    assert "the encoder Delta is a point" in error_of(*options, str(tmp_path / "a"), "--encoder", "Delta")
    assert not (tmp_path / "a").exists()
    np.save(tmp_path / "vectors.npy", np.zeros((30, 4), np.float32))
    message = error_of(*options, str(tmp_path / "b"), "--data", str(tmp_path / "vectors.npy"))
    assert "shift moves images, but a datum" in message
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_exemplars_of_a_run_are_its_training_data_and_are_kept_as_their_means(tmp_path, capsys):
    options = ["train", "--prior", "ExemplarPrior", "--latent-dim", "4", "--num-samples", "10", "--run"]
    main([*options, str(tmp_path / "whole"), "--epochs", "3"])
    main([*options, str(tmp_path / "parts"), "--epochs", "2"])
    main(["train", "--run", str(tmp_path / "parts"), "--resume", "--epochs", "3"])
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())
    vae, config = pyrovae.load_run(tmp_path / "whole")
    x = data.load("digits").train.x
    assert config["prior"]["init_args"]["data"] == len(vae.prior.means) == len(x)
    torch.testing.assert_close(vae.prior.means, vae.encoder(x).mean, rtol=1e-4, atol=1e-5)
    main(["evaluate", str(tmp_path / "whole"), "--num-samples", "10"])
    assert "bits per dimension, of 64" in capsys.readouterr().out
    np.savez(tmp_path / "holes.npz", x=np.where(x.flatten(1)[:100] > 0.9, np.nan, x.flatten(1)[:100]))
    message = error_of(*options, str(tmp_path / "a"), "--data", str(tmp_path / "holes.npz"), "--preprocessing", "grey")
    assert "data with missing elements cannot be exemplars" in message
    message = error_of(*options, str(tmp_path / "b"), "--structure", "Hierarchy", "--structure.above", "[3]")
    assert "the encoder of the top latents of Hierarchy reads something else" in message
    message = error_of(*options, str(tmp_path / "c"), "--prior.data", "5")
    assert "the data of ExemplarPrior are the 1,197 training data, got 5" in message
    assert "not compiled" not in capsys.readouterr().err


def test_early_stopping_says_so(tmp_path, capsys):
    main(["train", "--run", str(tmp_path / "a"), "--epochs", "50", "--patience", "1", "--optimizer.lr", "0.03",
          "--num-samples", "10"])  # fmt: skip
    assert "stopped after epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("threads", "load", "quota", "said"),
    [
        (2, 0.2, None, ""),
        (1, 9.0, None, ""),
        (2, 1.1, None, "other processes keep about 1.1 busy"),
        (2, 0.0, "max 100000", ""),
        (2, 0.0, "150000 100000", "1.5 cores, and torch uses 2 threads. Steps"),
    ],
)
def test_threads_without_cores_are_told(monkeypatch, threads, load, quota, said):
    read_text = Path.read_text

    def read(path):
        if str(path) != "/sys/fs/cgroup/cpu.max":
            return read_text(path)
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(Path, "read_text", read)
    assert said in crowded()
    assert bool(said) == bool(crowded())


def test_a_warning_is_a_line_without_the_place_in_the_program(tmp_path):
    options = [
        "--epochs",
        "1",
        "--num-samples",
        "2",
        "--loss",
        "ELBO",
        "--loss.beta",
        "Linear",
        "--loss.beta.steps",
        "90",
    ]
    command = [sys.executable, "-m", "pyrovae", "train", "--run", str(tmp_path / "run"), "--quiet", *options]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.startswith("warning: the schedule of ELBO takes 90 steps") and "sys.exit" not in said
