"""The command line on sequences: sounds without options, and arrays with a structure of time."""

import csv
import json
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import yaml

import pyrovae
from pyrovae import load_run
from pyrovae.cli import main
from pyrovae.cli.labels import split_steps
from pyrovae.data import Spectrogram
from pyrovae.estimators import ParticleFilter
from pyrovae.structures import MissingDataVAE, RecurrentVAE, StateSpaceVAE

soundfile = pytest.importorskip("soundfile")
STOCHASTIC_RECURRENT = ["--structure", "StateSpace", "--structure.width", "8", "--prior", "DiagonalNormal"]
STOCHASTIC_RECURRENT += ["--structure.autoregressive", "true"]
SMALL = ["--epochs", "2", "--latent-dim", "2", "--structure", "Recurrent", "--structure.width", "8", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the directory of a run on tones of different lengths, beside these."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    (folder / "tones").mkdir()
    for i in range(30):
        time = np.arange(rng.integers(300, 1200)) / 2000
        soundfile.write(folder / "tones" / f"{i:02d}.wav", 0.3 * np.sin(2 * np.pi * (200 + 20 * i) * time), 2000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--data", "tones", "--run", "run", *SMALL])
    return folder / "run"


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Returns a file of series of two features, 5 to 9 steps long, with a step that is not there."""
    path = tmp_path_factory.mktemp("series") / "series.npy"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 9, 2)).cumsum(1).astype(np.float32)
    for i in range(60):
        x[i, 5 + i % 5 :] = np.nan
    x[:, 2] = np.nan
    np.save(path, x)
    return path


def test_sounds_need_no_option_but_their_folder(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["structure"]["class_path"] == "pyrovae.structures.Recurrent"
    assert config["likelihood"]["class_path"] == "pyrovae.likelihoods.StudentT"
    assert config["loss"]["init_args"]["beta"]["init_args"]["epochs"] == 1
    vae, loaded = load_run(run)
    assert isinstance(vae, RecurrentVAE)
    assert loaded["spectrogram"] == Spectrogram(2000, 64, 37)
    assert {p.name for p in run.glob("*.png")} >= {"samples.png", "reconstructions.png", "latent_space.png"}
    assert "could not be made" not in (run / "report.html").read_text()


def test_the_score_of_sequences_is_a_filter_by_the_step(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    out = tmp_path / "scores.csv"
    main(["evaluate", "run", "--output", str(out), "--quiet"])
    said = capsys.readouterr().out
    values = [float(row["value"]) for row in csv.DictReader(out.read_text().splitlines())]
    vae, config = load_run(run)
    x, mask = split_steps(pyrovae.data.load_sounds("tones", config["spectrogram"]).test.x)
    pyro.set_rng_seed(0)
    method = ParticleFilter(num_samples=20, num_particles=32)
    expected = pyrovae.log_marginal(vae.model_by_step, vae.guide_by_step, x, mask, method=method, progress=False)
    assert values == pytest.approx(expected.value.tolist(), rel=1e-6)
    assert f"-log p(x): {-sum(values) / int(mask.sum()):.3f} nats a frame, of {int(mask.sum())} frames" in said
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["scored"] == "log p(x)" and record["baseline"] < 0


def test_more_filters_and_other_methods_can_be_asked_for(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    main(["evaluate", "run", "--num-samples", "8", "--num-data", "2", "--quiet"])
    assert "from 8 filters a datum" in capsys.readouterr().out
    main(["evaluate", "run", "--method", "ImportanceSampling", "--num-data", "2", "--quiet"])
    assert "filters" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="sequences are filtered"):
        main(["evaluate", "run", "--seconds", "3"])


def test_sounds_are_drawn_reconstructed_and_scored(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    main(["sample", "run", "--num-samples", "3", "--steps", "20", "--output", str(tmp_path / "a.wav")])
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 2000 and len(samples) == 3 * 19 * 32 + 2 * 600
    main(["sample", "run", "--num-samples", "3", "--output", str(tmp_path / "a.npy")])
    assert np.load(tmp_path / "a.npy").shape == (3, 37, 31)
    main(["reconstruct", "run", "--num-data", "2", "--output", str(tmp_path / "b.flac")])
    main(["reconstruct", "run", "--num-data", "2", "--output", str(tmp_path / "b.png")])
    main(["score", "run", "tones", "--output", str(tmp_path / "c.csv")])
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert {row["sound"] for row in rows} == {f"{i:02d}.wav" for i in range(30)}
    for row in rows:
        assert float(row["nats_a_frame"]) == pytest.approx(-float(row["log_p"]) / int(row["frames"]), rel=1e-4)
        assert float(row["to"]) - float(row["from"]) == pytest.approx(int(row["frames"]) * 32 / 2000, abs=0.001)
    capsys.readouterr()
    main(["score", "run", "tones/03.wav", "--output", str(tmp_path / "d.csv")])
    assert "03.wav, from 0.00 s" in capsys.readouterr().out


def test_a_run_on_sounds_goes_on_to_the_same_bits(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run.parent)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--data", "tones", *SMALL[2:], "--loss", "ELBO"]
    main(["train", "--run", str(whole), *options, "--epochs", "3"])
    main(["train", "--run", str(parts), *options, "--epochs", "2"])
    main(["train", "--run", str(parts), "--resume", "--epochs", "3", "--quiet"])
    assert (parts / "spectrogram.json").read_bytes() == (run / "spectrogram.json").read_bytes()
    a, b = (load_run(directory)[0].state_dict() for directory in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_runs_on_sounds_are_compared_by_filters(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(run.parent)
    main(["train", "--data", "tones", "--run", str(tmp_path / "other"), *SMALL, "--seed", "1"])
    capsys.readouterr()
    main(["compare", "run", str(tmp_path / "other"), "--picture", str(tmp_path / "c.png"), "--quiet"])
    assert capsys.readouterr().out.count("from 20 filters a datum") == 2
    main(["report", "run", str(tmp_path / "other"), "--output", str(tmp_path / "r.html")])
    assert (tmp_path / "r.html").exists()


def test_a_sound_has_an_embedding_whatever_follows_its_end(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run.parent)
    main(["encode", "run", "tones", "--output", str(tmp_path / "z.csv")])
    rows = list(csv.DictReader((tmp_path / "z.csv").read_text().splitlines()))
    assert len(rows[0]) == 7 and [row["sound"] for row in rows] == sorted(p.name for p in Path("tones").iterdir())
    assert all(float(row["from"]) == 0 < float(row["to"]) for row in rows)
    main(["encode", "run", "--split", "train", "--output", str(tmp_path / "z.npy")])
    assert np.isfinite(np.load(tmp_path / "z.npy")).all()


def test_sounds_may_have_one_latent_for_a_piece(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(run.parent)
    place = str(tmp_path / "run")
    main(["train", "--data", "tones", "--run", place, "--structure", "Incomplete", *SMALL[:4], "--quiet"])
    assert isinstance(load_run(place)[0], MissingDataVAE)
    main(["sample", place, "--num-samples", "2", "--output", str(tmp_path / "a.wav")])
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == 2 * 36 * 32 + 600
    main(["reconstruct", place, "--num-data", "2", "--output", str(tmp_path / "b.npy")])
    x = pyrovae.data.load_sounds("tones", load_run(place)[1]["spectrogram"]).test.x[:2]
    assert np.array_equal(np.isnan(np.load(tmp_path / "b.npy")), x.isnan().numpy())
    main(["score", place, "tones/03.wav", "--num-samples", "20", "--output", str(tmp_path / "c.csv")])
    assert "nats a frame" in capsys.readouterr().out


def test_a_corrupt_spectrogram_is_named(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.yaml", "run.json", "weights.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    (copy / "spectrogram.json").write_text('{"rate": 8000}')
    with pytest.raises(ValueError, match=r"spectrogram.json is corrupt: a spectrogram must have the entries"):
        load_run(copy)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["diagnose", "run", "--nuts-samples", "100"], "nuts_samples is not for sequences"),
        (["diagnose", "run", "--method", "ImportanceSampling"], "steps of sequences are scored by ParticleFilter"),
        (["sample", "run", "--mean"], "are not for sequences"),
        (["sample", "run", "--steps", "0"], "steps must be at least 1"),
        (["sample", "run", "--temperature", "0.5"], "temperature and top_p are for text"),
        (["sample", "run", "--output", "a.mp4"], "must end in .wav or .flac or .png or .npy"),
        (["score", "run", "tones", "--reference", "tones"], "reference is for tables"),
        (["impute", "run", "tones"], "is no run on a table"),
        (["repair", "run"], "repair is not for sequences. What follows one: pyrovae forecast run"),
    ],
)
def test_what_is_not_for_sounds_is_refused_by_name(run, monkeypatch, command, message):
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit, match=message):
        main(command)


@pytest.mark.parametrize(
    ("options", "cls"),
    [
        (["--structure", "Recurrent", "--structure.width", "8", "--prior", "DiagonalNormal"], RecurrentVAE),
        (["--structure", "StateSpace", "--structure.width", "8"], StateSpaceVAE),
        (STOCHASTIC_RECURRENT, StateSpaceVAE),
    ],
)
def test_series_of_different_lengths_with_gaps(series, tmp_path, monkeypatch, capsys, options, cls):
    monkeypatch.chdir(tmp_path)
    small = ["--latent-dim", "2", "--likelihood", "Normal", "--preprocessing", "grey", "--epochs", "2", "--quiet"]
    main(["train", "--data", str(series), "--run", "run", *options, *small])
    assert "nats a step, of 36 steps" in capsys.readouterr().out
    vae, _ = load_run("run")
    assert isinstance(vae, cls) and vae.context_dim == 0
    assert (getattr(vae, "recurrence", None) is not None) == (cls is RecurrentVAE or options is STOCHASTIC_RECURRENT)
    main(["sample", "run", "--num-samples", "4", "--steps", "12", "--output", "a.npy"])
    assert np.load("a.npy").shape == (4, 12, 2)
    main(["evaluate", "run", "--split", "validation", "--quiet"])


def test_what_follows_is_drawn_by_the_forecast_of_the_library(series, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--structure", "StateSpace", "--structure.width", "8", "--latent-dim", "2", "--likelihood", "Normal"]
    main(["train", "--data", str(series), "--run", "run", *options, "--epochs", "1", "--quiet"])
    for ending in ("npy", "csv", "png"):
        main(["forecast", "run", "--steps", "5", "--num-data", "3", "--num-draws", "40", "--output", f"f.{ending}"])
    vae, _ = load_run("run")
    x, mask = split_steps(pyrovae.data.load(str(series)).test.x[:3])
    pyro.set_rng_seed(0)
    draws = vae.forecast(x, 5, mask, num_samples=40, num_particles=100)
    assert np.array_equal(np.load("f.npy"), draws.numpy())
    rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert len(rows) == 3 * 5 * 2
    [one] = [row for row in rows if (row["sequence"], row["step"], row["element"]) == ("2", "4", "1")]
    assert float(one["q95"]) == pytest.approx(draws[:, 1, 3, 0].quantile(0.95).item(), rel=1e-5)


def test_a_sound_goes_on(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run.parent)
    for ending in ("wav", "png"):
        out = str(tmp_path / f"a.{ending}")
        main(["forecast", "run", "--steps", "10", "--num-data", "2", "--num-draws", "2", "--output", out])
    x = pyrovae.data.load_sounds("tones", load_run(run)[1]["spectrogram"]).test.x[:2]
    frames = int((~x.isnan().any(-1)).sum())
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == (frames + 2 * 10 - 2) * 32 + 600
    main(["train", "--epochs", "1", "--run", str(tmp_path / "digits"), "--num-samples", "2", "--quiet"])
    with pytest.raises(SystemExit, match="is no run on sequences: a VAE has no steps to come"):
        main(["forecast", str(tmp_path / "digits")])


def test_a_prior_without_a_context_cannot_have_a_memory(series, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Recurrent needs a prior that takes the memory.*Take --prior DiagonalNormal"):
        main(["train", "--data", str(series), "--structure", "Recurrent", "--likelihood", "Normal"])
    np.save("vectors.npy", np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    with pytest.raises(SystemExit, match=r"StateSpace is for sequences, of shape \(time, features\)"):
        main(["train", "--data", "vectors.npy", "--structure", "StateSpace", "--preprocessing", "grey"])
    assert not (tmp_path / "runs").exists()


def test_steps_are_there_or_missing_as_a_whole():
    x = torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan]], [[3.0, 4.0], [5.0, 6.0]]])
    filled, mask = split_steps(x)
    assert mask.tolist() == [[True, False], [True, True]]
    assert filled[0, 1].tolist() == [1.0, 2.0] and torch.equal(filled[mask], x[mask])
    x[1, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="step 0 of sequence 1 has NaN in some elements alone"):
        split_steps(x)
    with pytest.raises(ValueError, match="step 0 of sequence 7 has NaN"):
        split_steps(x, torch.tensor([3, 7]))
    with pytest.raises(ValueError, match="sequence 1 is all NaN"):
        split_steps(torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]))
