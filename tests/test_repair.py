"""Repair: hidden parts of data given the seen ones."""

import math

import numpy as np
import pyro
import pytest
import torch
from linear_gaussian import assert_mean, truth, vae_of
from PIL import Image

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.cli import main
from pyrovae.structures import repair


def test_draws_are_those_of_the_conditional_distribution():
    """The data of a linear model are jointly normal, so that p(hidden | seen) is known."""
    known = truth(2, 5)
    vae = vae_of(known, widen=1.3, shift=0.1)  # the proposal is not the posterior
    pyro.set_rng_seed(0)
    joint = known.marginal()
    x = joint.sample((1,))
    mask = torch.tensor([True, False, True, False, True])
    found = repair(vae, x.float(), mask, num_draws=4000, num_steps=60)
    mean, cov = joint.loc.double(), joint.covariance_matrix.double()
    gain = cov[~mask][:, mask] @ cov[mask][:, mask].inverse()
    expected = mean[~mask] + gain @ (x[0].double() - mean)[mask]
    expected_cov = cov[~mask][:, ~mask] - gain @ cov[mask][:, ~mask]
    draws = found.draws[:, 0].double()
    assert draws[:, mask].eq(x[0].float().double()[mask]).all()
    assert_mean(draws[:, ~mask], expected, 1e-6)
    deviations = draws[:, ~mask] - expected
    assert_mean(deviations[:, :, None] * deviations[:, None, :], expected_cov, 1e-6)
    # The mean averages the means of p(x | z) over chains that are independent of each other.
    error = (expected_cov.diagonal() / 4000).sqrt()
    assert ((found.mean[0, ~mask].double() - expected).abs() < 5 * error).all()
    assert 0.3 < found.acceptance < 1


def test_classes_match_an_enumeration():
    """Two bits with a latent on a grid: p(second | first) is a ratio of two sums."""
    pyro.set_rng_seed(1)
    vae = VAE(priors.StandardNormal(1), likelihoods.Bernoulli(1, 2), encoders.DiagonalNormal(2, 1))
    for p in vae.likelihood.parameters():
        p.data *= 4
    grid = torch.linspace(-8, 8, 4001).unsqueeze(1)
    weight = vae.prior().log_prob(grid).exp()
    with torch.no_grad():
        both = vae.decode(grid).mean
    expected = (weight * both[:, 0] * both[:, 1]).sum() / (weight * both[:, 0]).sum()
    found = repair(vae, torch.tensor([[1.0, math.nan]]), torch.tensor([1, 0]), num_draws=4000, num_steps=60)
    assert_mean(found.draws[:, 0, 1:].double(), expected[None].double(), 1e-6)


def test_data_are_repaired_in_parts_with_their_contexts(monkeypatch):
    vae = VAE(
        priors.StandardNormal(2),
        likelihoods.Normal(2, 3, context_dim=1),
        encoders.DiagonalNormal(3, 2, context_dim=1),
    )
    monkeypatch.setattr("pyrovae.structures.completion._CHUNK", 3 * 2 * 4)
    x, context = np.random.RandomState(0).randn(10, 3), np.ones((10, 1))
    found = repair(vae, x, np.array([True, False, True]), context, num_draws=2, num_steps=10)
    assert found.draws.shape == (2, 10, 3) and found.mean.shape == (10, 3) and found.acceptance.shape == (10,)
    assert found.mean[:, ::2].equal(torch.from_numpy(x).float()[:, ::2])


def test_bad_input_is_named():
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, 3), encoders.DiagonalNormal(3, 2))
    x, mask = torch.ones(4, 3), torch.tensor([True, True, False])
    for given, text in (
        ((x, torch.ones(2, 3)), "does not broadcast"),
        ((x, mask * 2), "mask must be boolean"),
        ((x * torch.nan, mask), "NaN or infinity where the mask"),
        ((x / 2, mask), "outside the support of Bernoulli where it is seen, in 4 of 4"),
    ):
        with pytest.raises(ValueError, match=text):
            repair(vae, *given)
    for options in ({"num_draws": 0}, {"num_steps": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            repair(vae, x, mask, **options)
    whole = VAE(priors.StandardNormal(2), likelihoods.Multinomial(2, 3), encoders.DiagonalNormal(3, 2))
    with pytest.raises(ValueError, match="not independent"):
        repair(whole, x, mask)
    with pytest.raises(TypeError, match=r"must be a pyrovae\.VAE"):
        repair(vae.model, x, mask)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("repair")
    x = np.random.RandomState(0).randint(0, 256, (30, 6, 6, 3)).astype(np.uint8)
    np.save(path / "x.npy", x)
    main(["train", "--data", str(path / "x.npy"), "--run", str(path / "run"), "--epochs", "1", "--num-samples", "2"])
    return path / "run"


def test_the_command_writes_pictures_and_arrays(run, tmp_path, capsys):
    fast = ("--num-steps", "10", "--num-data", "3", "--num-draws", "2")
    main(["repair", str(run), *fast])
    assert (run / "repairs-test.png").stat().st_size > 1000
    assert "3 data, 54 of 108 elements hidden" in capsys.readouterr().out
    Image.fromarray(np.eye(6, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", np.eye(6))
    found = []
    for name in ("mask.png", "mask.npy"):
        out = tmp_path / f"{name}.npz"
        main(["repair", str(run), *fast, "--mask", str(tmp_path / name), "--output", str(out)])
        found.append(np.load(out))
    a, b = found
    assert (a["mask"] == (np.eye(6) > 0)).all() and (a["draws"] == b["draws"]).all() and a["draws"].shape[0] == 2
    assert (a["draws"][:, a["mask"]] == a["x"][a["mask"]]).all()
    for mask, text in (("nothing.png", "no file"), (run / "config.yaml", "cannot be read as a mask")):
        with pytest.raises(SystemExit, match=text):
            main(["repair", str(run), "--mask", str(mask), "--output", str(tmp_path / "new.png")])
    assert not (tmp_path / "new.png").exists()
