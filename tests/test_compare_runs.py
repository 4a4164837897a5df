"""``pyrovae compare``: real runs of two configurations, what it writes, and what it refuses."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from pyro import distributions as dist

from pyrovae import VAE, data, encoders, likelihoods, load_run, log_marginal, priors
from pyrovae.cli import main
from pyrovae.cli.common import measure_of
from pyrovae.estimators import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs on the digits: two that differ in their latents, one on grey values; and two on a small table."""
    root = tmp_path_factory.mktemp("runs")
    np.savetxt(root / "table.csv", np.random.default_rng(0).normal(size=(200, 3)), delimiter=",")
    table = ["--data", str(root / "table.csv"), "--preprocessing", "grey", "--likelihood", "Normal"]
    for name, options in {
        "wide": ["--latent-dim", "8", "--epochs", "8"],
        "narrow": ["--latent-dim", "1", "--epochs", "8"],
        "static": ["--latent-dim", "1", "--epochs", "1", "--preprocessing", "static"],
        "grey": ["--latent-dim", "1", "--epochs", "1", "--preprocessing", "grey", "--likelihood", "Normal"],
        "bytes": ["--latent-dim", "1", "--epochs", "1", "--likelihood", "Normal"],
        "table": [*table, "--latent-dim", "1", "--epochs", "1"],
    }.items():
        main(["train", "--run", str(root / name), "--num-samples", "10", *options])
    return root


def error_of(*argv):
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in argv])
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    return exit.value.code


def test_two_runs_are_scored_compared_and_drawn(runs, tmp_path, capsys):
    common = ["--num-samples", "300", "--num-data", "100"]
    main(["compare", str(runs / "narrow"), str(runs / "wide"), *common, "--output", str(tmp_path / "scores.csv")])
    out = capsys.readouterr().out
    assert (runs / "narrow" / "comparison-test-wide.png").read_bytes().startswith(b"\x89PNG")
    scores = np.genfromtxt(tmp_path / "scores.csv", delimiter=",", names=True)
    names = ("datum", "value_1", "standard_error_1", "trusted_1", "value_2", "standard_error_2", "trusted_2")
    assert scores.dtype.names == names and len(scores) == 100
    x = data.static_binarization(data.load("digits").test.x, 2)[:100]
    found = []
    for i, name in enumerate(("narrow", "wide")):
        vae, _ = load_run(runs / name)
        torch.manual_seed(i)
        found.append(log_marginal(vae.model, vae.guide, x, num_samples=300, progress=False))
        assert np.allclose(scores[f"value_{i + 1}"], found[i].value.numpy(), atol=1e-4)
    by_name = dict(zip((str(runs / "narrow"), str(runs / "wide")), found, strict=True))
    better, worse = sorted(by_name, key=lambda name: -by_name[name].value.mean())
    expected = compare(by_name[better], by_name[worse], names=(better, worse))
    line = next(line for line in out.splitlines() if line.startswith("1 less 2"))
    assert [float(number) for number in re.findall(r"[-+]?\d+\.\d{3}", line)] == pytest.approx(
        [expected.difference, expected.sampling_error, expected.data_error], abs=2e-3
    )
    assert expected.difference > 0 and int(line.split()[6]) == expected.num_untrusted
    assert expected.verdict in out
    message = error_of("compare", runs / "narrow", runs / "wide", *common)
    assert "comparison-test-wide.png already exists. Give another file with --picture" in message


def test_three_runs_fit_in_eighty_columns(runs, tmp_path, capsys):
    picture = tmp_path / "new" / "picture.png"
    directories = [str(runs / name) for name in ("narrow", "static", "wide")]  # the same data, binarised for scoring
    main(["compare", *directories, "--num-samples", "30", "--num-data", "20", "--picture", str(picture)])
    out = capsys.readouterr().out
    table = out[out.index("    model") :].splitlines()
    assert max(len(line) for line in table[: table.index("")]) <= 80
    assert sum(line[1:7] == " less " for line in table) == 3
    assert all(line.startswith(f" {i + 1}. ") for i, line in enumerate(table[1:4]))
    assert picture.exists()


def test_training_data_are_those_that_evaluate_scores(runs, tmp_path, capsys):
    options = ["--split", "train", "--num-samples", "10", "--num-data", "10", "--picture", str(tmp_path / "p.png")]
    main(["compare", str(runs / "narrow"), str(runs / "static"), *options])
    assert "narrow, train: log p(x) = " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["table"], r"narrow has data of shape \(1, 8, 8\) and .*table of \(3,\)"),
        (["grey"], "have different data in the test part .preprocessing is dynamic and grey"),
        (["bytes"], "narrow gives a probability and .*bytes a density: these cannot be compared"),
        (["wide", "bytes"], "narrow gives a probability and .*bytes a density"),
        ([], "compare needs two run directories or more, got 1"),
        (["narrow"], "narrow is given twice"),
        (["nothing"], "is not a run directory"),
        (["wide", "--method", "CUBO"], "is an upper bound of log p"),
        (["wide", "--picture", "x.pdf"], "picture must end in .png"),
        (["wide", "--output", "x.txt"], "output must end in .csv"),
        (["wide", "--num-data", "0"], "num_data must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_and_writes_nothing(others, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in runs.rglob("*"))
    others = [str(runs / other) if i == 0 and other[:2] != "--" else other for i, other in enumerate(others)]
    others = [str(runs / other) if other == "bytes" else other for other in others]
    assert re.search(message, error_of("compare", runs / "narrow", *others))
    assert sorted(path.name for path in runs.rglob("*")) == before and not list(tmp_path.iterdir())


def test_a_likelihood_says_what_its_values_are():
    class Shares(likelihoods.Normal):
        def forward(self, z, context=None):
            return dist.Dirichlet(self.parameters_of(z).exp())

    def vae(likelihood):
        return VAE(priors.StandardNormal(1), likelihood(1, 3), encoders.DiagonalNormal(3, 1))

    mixed = partial(likelihoods.Mixed, blocks=[(likelihoods.Normal, 2), (likelihoods.Bernoulli, 1)])
    normals = partial(likelihoods.Mixed, blocks=[(likelihoods.Normal, 2), (likelihoods.StudentT, 1)])
    assert measure_of(vae(likelihoods.Bernoulli)) == ("probability",) * 3
    assert measure_of(vae(mixed)) == ("density", "density", "probability")
    assert measure_of(vae(likelihoods.Normal)) == measure_of(vae(normals)) == ("density",) * 3
    assert measure_of(vae(likelihoods.Multinomial)) == ("probability given the sum of the counts",) * 3
    assert measure_of(vae(Shares)) == ("density on Simplex()",) * 3
