"""The command line on models beyond a VAE: hierarchies, missing elements, labels for some data, labels as a context."""

import json

import numpy as np
import pyro
import pytest
import torch
import yaml
from sklearn.datasets import load_digits

import pyrovae
from pyrovae import data, estimators
from pyrovae.cli import main
from pyrovae.structures import (
    DenseHierarchicalVAE,
    HierarchicalVAE,
    LadderVAE,
    MissingDataVAE,
    SemiSupervised,
    SemiSupervisedVAE,
)

SHORT = [
    "--epochs",
    "2",
    "--num-samples",
    "5",
    "--likelihood.network.hidden",
    "[32]",
    "--encoder.network.hidden",
    "[32]",
]
OPTIONS = {
    "hierarchy": (["--structure", "Hierarchy", "--structure.above", "[4]"], HierarchicalVAE),
    "ladder": (["--structure", "Ladder", "--structure.above", "[4]", "--structure.widths", "[32, 16]"], LadderVAE),
    "dense": (["--structure", "DenseHierarchy", "--structure.above", "[4]"], DenseHierarchicalVAE),
    "missing": (["--likelihood", "Normal"], MissingDataVAE),
    "labels": (["--structure", "SemiSupervised", "--structure.num_classes", "10"], SemiSupervisedVAE),
    "context": (["--likelihood.context_dim", "10", "--encoder.context_dim", "10"], pyrovae.VAE),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small digits of two values; with a fifth of their pixels missing, and with labels for a tenth."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    digits = load_digits()
    x, y = (digits.data[:600] > 8).astype(np.float32), digits.target[:600].astype(np.int64)
    holes = np.where(rng.random(x.shape) < 0.2, np.nan, x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
    np.savez(folder / "x.npz", x=x, y=y)
    np.savez(folder / "missing.npz", x=holes)
    np.savez(folder / "labels.npz", x=x, y=np.where(rng.random(len(y)) < 0.9, -1, y))
    return folder


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """A run of each structure, each of which a test must leave as it is."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (options, _) in OPTIONS.items():
        file = files / (f"{name}.npz" if name in ("missing", "labels") else "x.npz")
        grey = [] if name == "missing" else ["--preprocessing", "grey"]
        main(["train", "--data", str(file), "--run", str(folder / name), *grey, *options, *SHORT])
    return folder


def arguments(name, part):
    """What the model and the guide take, written by hand."""
    return {
        "missing": lambda: (torch.nan_to_num(part.x), ~part.x.isnan()),
        "labels": lambda: (part.x, part.labels),
        "context": lambda: (part.x, torch.eye(10)[part.labels]),
    }.get(name, lambda: (part.x,))()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_is_loaded_without_trust_and_evaluated_as_in_python(name, runs, tmp_path):
    vae, config = pyrovae.load_run(runs / name)
    assert type(vae) is OPTIONS[name][1]
    part = data.load(config["data"]).test
    main(["evaluate", str(runs / name), "--num-samples", "30", "--seed", "3", "--output", str(tmp_path / "scores.csv")])
    written = np.loadtxt(tmp_path / "scores.csv", delimiter=",", skiprows=1)
    pyro.set_rng_seed(3)
    method = estimators.ImportanceSampling(30)
    expected = pyrovae.log_marginal(vae.model, vae.guide, *arguments(name, part), method=method, progress=False)
    assert written[:, 1] == pytest.approx(expected.value.numpy(), rel=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_records_its_training_and_draws_as_many_samples_as_asked(name, runs, tmp_path):
    assert len((runs / name / "metrics.jsonl").read_text().splitlines()) == 3
    main(["sample", str(runs / name), "--num-samples", "12", "--output", str(tmp_path / "x.npy")])
    assert np.load(tmp_path / "x.npy").shape == (12, 64)


@pytest.mark.parametrize("name", OPTIONS)
def test_reconstructions_are_those_of_python(name, runs, tmp_path):
    vae, config = pyrovae.load_run(runs / name)
    part = data.load(config["data"]).test
    argv = ["reconstruct", str(runs / name), "--num-data", "5", "--seed", "3", "--output"]
    main([*argv, str(tmp_path / "r.npy")])
    pyro.set_rng_seed(3)
    expected = vae.reconstruct(*(t[:5] for t in arguments(name, part)))
    assert np.array_equal(np.load(tmp_path / "r.npy"), expected.numpy())
    main([*argv, str(tmp_path / "r.png")])
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_the_class_of_samples_can_be_given_where_a_run_takes_labels(runs, tmp_path):
    for name in ("labels", "context"):
        vae, _ = pyrovae.load_run(runs / name)
        main(
            [
                "sample",
                str(runs / name),
                "--label",
                "7",
                "--num-samples",
                "5",
                "--output",
                str(tmp_path / f"{name}.npy"),
            ]
        )
        pyro.set_rng_seed(0)
        label = torch.full((5,), 7) if name == "labels" else torch.eye(10)[[7] * 5]
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), vae.sample(1, label)[0].numpy())
    for argv, message in (
        (["sample", runs / "context", "--label", "10"], "from 0 to 9, got 10"),
        (["sample", runs / "hierarchy", "--label", "1"], "take labels"),
        (["diagnose", runs / "context"], "--label"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(arg) for arg in argv])


def test_the_loss_of_a_semi_supervised_run_has_the_weight_of_the_paper(files):
    labels = data.load(str(files / "labels.npz")).train.labels
    structure = SemiSupervised(num_classes=10)
    vae = structure.build((64,), 2, pyrovae.priors.StandardNormal, pyrovae.likelihoods.Bernoulli, encoder)
    assert structure.loss(vae, labels).weight == pytest.approx(0.1 * len(labels) / (labels >= 0).sum().item())
    with pytest.raises(ValueError, match="classes of some training data"):
        structure.loss(vae, torch.full((3,), -1))


def encoder(x_shape, latent_dim, context_dim=0):
    return pyrovae.encoders.DiagonalNormal(x_shape, latent_dim, context_dim=context_dim)


@pytest.mark.parametrize("part", ["encoder", "likelihood"])
def test_another_context_than_the_classes_is_refused_by_name(part, files, tmp_path):
    classes = ["--structure", "SemiSupervised", "--structure.num_classes", "10", *SHORT]
    argv = ["train", "--data", str(files / "labels.npz"), "--run", str(tmp_path / "run"), *classes]
    with pytest.raises(
        SystemExit, match=f"{part}.context_dim is 7, but SemiSupervised gives the {part} the 10 classes"
    ):
        main([*argv, f"--{part}.context_dim", "7"])
    assert not (tmp_path / "run").exists()


def test_diagnose_looks_at_complete_data_or_at_one_class(runs, tmp_path):
    main(
        [
            "diagnose",
            str(runs / "hierarchy"),
            "--num-data",
            "30",
            "--nuts-samples",
            "0",
            "--output",
            str(tmp_path / "d"),
        ]
    )
    results = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert "skipped" not in results["collapse"]
    with pytest.raises(SystemExit, match="without missing elements"):
        main(["diagnose", str(runs / "missing"), "--num-data", "30"])


def test_runs_that_score_other_things_are_not_compared(runs):
    with pytest.raises(SystemExit, match=r"log p\(x \| label\)"):
        main(["compare", str(runs / "hierarchy"), str(runs / "context"), "--num-samples", "10"])


def test_missing_elements_choose_their_structure_and_are_refused_by_others(runs, files, tmp_path):
    config = yaml.safe_load((runs / "missing" / "config.yaml").read_text())
    assert config["structure"]["class_path"] == "pyrovae.structures.Incomplete" and config["preprocessing"] == "grey"
    options = [
        "--structure",
        "Hierarchy",
        "--structure.above",
        "[4]",
        "--likelihood",
        "Normal",
        "--preprocessing",
        "grey",
    ]
    with pytest.raises(SystemExit, match="NaN"):
        main(["train", "--data", str(files / "missing.npz"), "--run", str(tmp_path / "no"), *options])
    assert not (tmp_path / "no").exists()


def test_a_vae_of_a_script_with_missing_elements_is_kept_as_a_run(files, tmp_path):
    encoder = pyrovae.encoders.DiagonalNormal((2, 64), 2)
    vae = MissingDataVAE(pyrovae.priors.StandardNormal(2), pyrovae.likelihoods.Normal(2, 64), encoder)
    pyrovae.save_run(vae, tmp_path / "run", data=files / "missing.npz")
    main(["evaluate", str(tmp_path / "run"), "--num-samples", "5"])
    assert type(pyrovae.load_run(tmp_path / "run")[0]) is MissingDataVAE
