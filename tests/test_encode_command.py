"""Embeddings from the command line, of every kind of run."""

import numpy as np
import pytest
import torch
from pyro import poutine

from pyrovae import data, load_run
from pyrovae.cli import main
from pyrovae.cli.encoding import embeddings

SMALL = ["--epochs", "1", "--latent-dim", "3", "--num-samples", "2", "--quiet", "--run", "run"]
SMALL += ["--encoder.network.hidden", "[16]", "--likelihood.network.hidden", "[16]"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoded(*options):
    main(["encode", "run", *options, "--output", "z.csv"])
    with open("z.csv") as file:
        names = file.readline().strip().split(",")
    return names, np.loadtxt("z.csv", delimiter=",", skiprows=1)


def test_images_have_the_means_of_the_encoder_and_their_labels():
    main(["train", *SMALL])
    names, rows = encoded("--split", "validation")
    assert names == ["datum", "label", "mean_1", "mean_2", "mean_3", "sd_1", "sd_2", "sd_3"]
    part = data.load("digits").validation
    with torch.no_grad():
        q = load_run("run")[0].encode(data.static_binarization(part.x, 1))
    np.testing.assert_array_equal(rows[:, 1], part.labels.numpy())
    np.testing.assert_allclose(rows[:, 2:], torch.cat([q.mean, q.stddev], -1).numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(SystemExit, match="file is for runs on tables, text, sounds, music"):
        main(["encode", "run", "digits.npy"])
    main(["encode", "run", "--output", "z.npy"])
    assert np.load("z.npy").shape == (300, 6)


def test_a_level_below_others_has_the_mean_of_draws():
    main(["train", *SMALL, "--structure", "DenseHierarchy", "--structure.above", "[2]"])
    x = data.static_binarization(data.load("digits").test.x, 2)[:20]
    vae = load_run("run")[0]
    torch.manual_seed(0)
    mean, sd = embeddings(vae, (x,))
    draws = torch.stack([poutine.trace(vae.guide).get_trace(x).nodes["z1"]["value"] for _ in range(2000)])
    error = draws.std(0) / 100**0.5
    assert ((mean - draws.mean(0)).abs() < 5 * error).all()
    assert (sd / draws.std(0) - 1).abs().max() < 5 / (2 * 100) ** 0.5


def test_a_flow_has_the_mean_of_draws():
    main(["train", *SMALL, "--encoder", "InverseAutoregressiveFlow"])
    _, rows = encoded()
    assert rows.shape == (300, 8) and np.isfinite(rows).all()
    x = data.static_binarization(data.load("digits").test.x, 2)
    with torch.no_grad():
        draws = load_run("run")[0].encode(x).sample((1000,))
    error = (draws.std(0) * (1 / 100 + 1 / 1000) ** 0.5).numpy()
    assert (np.abs(rows[:, 2:5] - draws.mean(0).numpy()) < 6 * error).all()


def test_lines_of_a_text_keep_their_numbers():
    lines = [f"{who} {what}." for who in "abcde" for what in ("ran", "sat", "ate")] * 2
    with open("lines.txt", "w") as file:
        file.write("\n\n".join(lines))
    options = [*SMALL[:9], "--likelihood", "Autoregressive", "--likelihood.network", "RecurrentDecoder"]
    main(["train", "--data", "lines.txt", *options])
    names, rows = encoded("lines.txt")
    assert names[0] == "line" and rows[:, 0].tolist() == list(range(1, 60, 2))
    np.testing.assert_allclose(rows[0, 1:], rows[15, 1:], rtol=1e-5)  # the same line


def test_a_table_needs_a_file():
    with open("t.csv", "w") as file:
        file.write("a,b\n" + "".join(f"{i / 7},{i % 3}\n" for i in range(60)))
    main(["train", "--data", "t.csv", "--epochs", "1", "--num-samples", "2", "--quiet", "--run", "run"])
    with pytest.raises(SystemExit, match="file is missing: give a table"):
        main(["encode", "run"])
    names, rows = encoded("t.csv")
    assert names[0] == "row" and len(rows) == 60
