"""The command line on folders of pictures and files of images: what fits their pixels is chosen and said."""

import numpy as np
import pytest
import yaml
from PIL import Image

import pyrovae
from pyrovae.cli import main

FAST = ("--epochs", "1", "--batch-size", "16", "--num-samples", "2", "--latent-dim", "2")


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def train(data, run, *argv) -> dict:
    main(["train", "--data", str(data), "--run", str(run), *FAST, *map(str, argv)])
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_folder_of_pictures_of_any_size_trains_and_is_scored(tmp_path, capsys):
    for i, image in enumerate(noise(30, 9, 7, 3)):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    config = train(tmp_path / "data", tmp_path / "run")
    said = capsys.readouterr().out
    assert "pixels: 256 levels, so --likelihood DiscretizedLogistic --likelihood.network DeconvNet" in said
    assert config["preprocessing"] == "grey" and config["likelihood"]["class_path"].endswith("DiscretizedLogistic")
    vae, _ = pyrovae.load_run(tmp_path / "run")
    assert vae.likelihood.x_shape == (3, 9, 7) and isinstance(vae.encoder.network, pyrovae.nn.ConvNet)
    main(["evaluate", str(tmp_path / "run"), "--num-samples", "2"])
    assert "bits per dimension" in capsys.readouterr().out


KINDS = {
    "two values": (noise(30, 4, 4) // 128 * 255, "Bernoulli", "grey"),
    "bytes with channels last": (noise(30, 4, 5, 3), "DiscretizedLogistic", "grey"),
    "256 levels as numbers": ((noise(30, 1, 4, 4) / 255).astype(np.float32), "DiscretizedLogistic", "grey"),
    "real numbers": (np.random.RandomState(0).randn(30, 1, 4, 4), "Normal", "grey"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_is_that_of_the_pixels(kind, tmp_path):
    x, likelihood, preprocessing = KINDS[kind]
    np.save(tmp_path / "x.npy", x)
    config = train(tmp_path / "x.npy", tmp_path / "run")
    assert config["likelihood"]["class_path"].rpartition(".")[2] == likelihood
    assert config["preprocessing"] == preprocessing


def test_what_is_given_stays(tmp_path):
    np.save(tmp_path / "x.npy", noise(30, 4, 4))
    config = train(tmp_path / "x.npy", tmp_path / "a", "--likelihood", "Bernoulli")
    assert config["preprocessing"] == "dynamic"
    network = "pyrovae.nn.MLP"  # with its package: other tests may have classes of this name
    config = train(tmp_path / "x.npy", tmp_path / "b", "--likelihood.network", network, "--encoder.network", network)
    assert config["likelihood"]["init_args"]["network"]["class_path"].endswith("MLP")
    assert config["encoder"]["init_args"]["network"]["class_path"].endswith("MLP")
    config = train(tmp_path / "x.npy", tmp_path / "c", "--preprocessing", "static")
    assert config["likelihood"]["class_path"].endswith("Bernoulli")
    again = train(tmp_path / "x.npy", tmp_path / "c", "--resume", "--epochs", "2")
    assert again["preprocessing"] == "static"


def test_numbers_from_0_to_255_are_never_taken_for_0_to_1(tmp_path):
    np.save(tmp_path / "x.npy", noise(30, 1, 4, 4).astype(np.float32))
    with pytest.raises(SystemExit, match="whole numbers from 0 to 255: bytes, which are never taken"):
        main(["train", "--data", str(tmp_path / "x.npy"), "--run", str(tmp_path / "run"), *FAST])
    assert not (tmp_path / "run").exists()
    config = train(tmp_path / "x.npy", tmp_path / "run", "--likelihood", "Normal")  # as they are
    assert config["preprocessing"] == "grey"


@pytest.mark.parametrize("kind", ["Bernoulli", "ContinuousBernoulli", "DiscretizedLogistic"])
def test_bytes_are_named_in_python_too(kind):
    vae = pyrovae.VAE(
        pyrovae.priors.StandardNormal(2),
        getattr(pyrovae.likelihoods, kind)(2, (1, 4, 4)),
        pyrovae.encoders.DiagonalNormal((1, 4, 4), 2),
    )
    with pytest.raises(ValueError, match="Whole numbers up to 255, as of bytes.*divide them by 255"):
        pyrovae.fit(vae.model, vae.guide, noise(30, 1, 4, 4), progress=False)


def test_a_file_on_the_disk_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae.data.arrays._IN_MEMORY", 10)
    np.save(tmp_path / "x.npy", noise(30, 4, 4))
    train(tmp_path / "x.npy", tmp_path / "run")
    main(["evaluate", str(tmp_path / "run"), "--num-samples", "2", "--split", "train"])
    main(["reconstruct", str(tmp_path / "run")])
