"""Spectra sum to squared errors, and those of linear-Gaussian models have closed forms."""

import math
import sys
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from helpers import FAILURE_RATE
from linear_gaussian import assert_mean, repeat, truth, vae_of
from pyro import distributions as dist

from pyrovae import VAE, encoders, likelihoods, nn, priors, structures
from pyrovae.data import split_missing
from pyrovae.diagnostics.sharpness import _bands, _laplacian, _power, sharpness


def constant_pair(loc, scale):
    """A model that ignores its latent: its reconstructions and means are known."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc, scale).expand(loc.shape).to_event(loc.dim()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("x_shape", [(3, 7, 6), (5, 9), (12,), (1, 11), (4, 1)])
def test_bands_sum_to_the_mean_squared_error_and_to_the_variance(x_shape):
    x, loc = torch.randn(20, *x_shape).double(), torch.randn(x_shape).double()
    found = sharpness(*constant_pair(loc, 0.5), x)
    torch.testing.assert_close(found.error.sum(), (x - loc).square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.power.sum(), x.var(0, correction=0).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.share.sum(), torch.tensor(1.0))
    assert found.residual == pytest.approx((x - loc).square().mean().sqrt().item())
    assert found.width == pytest.approx(0.5) and found.num_data == 20


def test_a_wave_is_in_the_band_of_its_frequency_and_brightness_in_one_of_its_own():
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    frequency, band = _bands(torch.Size((16, 16)), torch.device("cpu"))
    for down, across in ((3, 0), (0, 8), (2, 5)):
        wave = torch.cos(2 * math.pi * (down * row + across * column) / 16).double()[None, None]
        at = int(band[down, across])
        assert _power(wave, band)[0, at] == pytest.approx(wave.square().mean().item(), rel=1e-6)
        radius = math.hypot(down, across) / 16
        assert abs(frequency[at] - radius) == (frequency - radius).abs().min()  # nor is another band's nearer
    flat = torch.full((1, 1, 16, 16), 3.0).double()
    torch.testing.assert_close(_power(flat, band)[0], torch.tensor([9.0] + [0.0] * 8).double())


def test_spectra_are_those_of_a_direct_fourier_transform():
    x = torch.randn(4, 2, 5, 6).double()
    _, band = _bands(torch.Size((5, 6)), torch.device("cpu"))
    down = np.exp(-2j * np.pi * np.outer(np.arange(5), np.arange(5)) / 5)
    across = np.exp(-2j * np.pi * np.outer(np.arange(6), np.arange(6)) / 6)
    power = (np.abs(down @ x.numpy() @ across) ** 2).mean(1) / 30**2
    expected = np.stack([power[:, (band == b).numpy()].sum(-1) for b in range(int(band.max()) + 1)], axis=1)
    np.testing.assert_allclose(_power(x, band), expected, rtol=1e-12)


def test_the_laplacian_is_the_sum_of_second_differences():
    x = torch.randn(2, 3, 1, 6, 7).double()
    array = x[1, 2, 0].numpy()
    second = np.diff(array, 2, axis=0)[:, 1:-1] + np.diff(array, 2, axis=1)[1:-1]
    assert _laplacian(x)[1, 2].item() == pytest.approx(second.var())
    line = torch.randn(1, 1, 1, 9).double()
    assert _laplacian(line)[0, 0].item() == pytest.approx(np.diff(line[0, 0, 0].numpy(), 2).var())
    ramp = torch.arange(8.0).expand(1, 1, 1, 5, 8)
    assert _laplacian(ramp).item() == 0


def test_the_error_of_the_true_model_is_its_noise_and_white():
    known = truth(3, 12, scale=0.4)
    vae = vae_of(known)
    latent_spectrum = known.marginal().covariance_matrix.numpy()
    _, band = _bands(torch.Size((12,)), torch.device("cpu"))
    waves = np.exp(-2j * np.pi * np.outer(np.arange(12), np.arange(12)) / 12)
    per_frequency = np.einsum("fi,ij,fj->f", waves, latent_spectrum, waves.conj()).real / 12**2
    power = torch.tensor([per_frequency[(band == b).numpy()].sum() for b in range(int(band.max()) + 1)])

    def once():
        found = sharpness(vae.model, vae.guide, known.marginal().sample((400,)))
        unbiased = found.power * 400 / 399  # their mean is that of the data
        sharp = torch.stack([found.laplacian[name].mean() for name in ("data", "draws")])
        return torch.cat([found.error, unbiased, sharp[:1] - sharp[1:], torch.tensor([found.residual**2])])

    share = torch.bincount(band) / 12
    expected = torch.cat([0.16 * share, power, torch.zeros(1).double(), torch.tensor([0.16]).double()])
    assert_mean(repeat(once, 60), expected, FAILURE_RATE)
    found = sharpness(vae.model, vae.guide, known.marginal().sample((2000,)))
    assert found.width == pytest.approx(0.4) and found.ratio == pytest.approx(1, abs=0.02)
    assert "times as wide" not in found.verdict and "Blurry" not in found.verdict
    more = sharpness(vae.model, vae.guide, known.marginal().sample((300,)), num_draws=7)
    assert more.residual == pytest.approx(0.4, abs=0.02) and len(more.laplacian["reconstructions"]) == 300


def test_blur_is_found_where_it_is():
    x = torch.randn(400, 1, 8, 8)
    x = x + 3 * torch.randn(400, 1, 1, 1)  # brightness, which the mean datum does not have
    half = x.flatten(1).mean(1).reshape(-1, 1, 1, 1)

    def model(x, half):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(half.expand(x.shape), 1.0).to_event(3), obs=x)

    def guide(x, half):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    found = sharpness(model, guide, x, half)
    assert found.lost[0] < 1e-6 and bool((found.lost[1:] > 0.99).all())
    assert found.verdict.startswith("Not blurry: the error of reconstructions is white")
    smooth = sharpness(model, guide, half.expand(x.shape), torch.zeros_like(half))  # all brightness is lost
    assert smooth.lost[0] > 0.99 and bool(smooth.lost[1:].isnan().all())
    assert smooth.summary()["lost"][1] is None
    assert "no better than the mean datum" in smooth.verdict
    wave = torch.randn(400, 1, 1, 1) * torch.cos(torch.arange(8.0) * math.pi / 4)
    x = x + 1.4 * wave  # a low frequency that is never decoded
    assert sharpness(model, guide, x, x.flatten(1).mean(1).reshape(-1, 1, 1, 1)).verdict.startswith("Blurry")


@pytest.mark.parametrize(("scale", "found"), [(2.0, "2.0. times as wide"), (0.5, "only 0.5. times as wide"), (1.0, "")])
def test_the_scale_is_held_beside_the_residual(scale, found):
    x = torch.randn(500, 1, 6, 6)
    result = sharpness(*constant_pair(torch.zeros(1, 6, 6), scale), x)
    assert result.ratio == pytest.approx(scale, rel=0.03)
    assert ("times as wide" in result.verdict) == bool(found)


def test_flat_images_are_seen_as_what_they_are():
    x = torch.randn(30, 1, 4, 6).double()
    pair, flat = constant_pair(torch.zeros(1, 4, 6), 1.0), constant_pair(torch.zeros(24), 1.0)
    torch.testing.assert_close(sharpness(*flat, x.flatten(1), shape=(4, 6)).error, sharpness(*pair, x).error)


def test_chunks_change_nothing(monkeypatch):
    x, pair = torch.randn(23, 1, 5, 5).double(), constant_pair(torch.zeros(1, 5, 5), 1.0)
    whole = sharpness(*pair, x)
    monkeypatch.setattr(sys.modules["pyrovae.diagnostics.sharpness"], "_CHUNK", 4 * 25)
    parts = sharpness(*pair, x)
    torch.testing.assert_close(parts.power, whole.power)
    torch.testing.assert_close(parts.error, whole.error)
    torch.testing.assert_close(parts.laplacian["data"], whole.laplacian["data"])
    assert parts.num_data == 23 and parts.width == pytest.approx(whole.width)


def two_sites():
    """Two latents, a context, a second observed site and a deterministic one; another plate."""

    def model(x, y, context):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(context, 1.0))
            with pyro.plate("parts", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
            total = pyro.deterministic("total", a + b.sum(-2, keepdim=True), event_dim=0)
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)
            pyro.sample("x", dist.Normal(total.unsqueeze(-1).expand(*total.shape, 8), 1.0).to_event(1), obs=x)

    def guide(x, y, context):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.mean(-1), 1.0))
            with pyro.plate("parts", 2, dim=-2):
                pyro.sample("b", dist.Normal(a, 1.0))

    return model, guide


def test_any_pyro_pair_will_do():
    x, y, context = torch.randn(40, 8), torch.randn(40), 50 + torch.randn(40)
    with pytest.raises(ValueError, match="site must be one of the model's observed sites, y, x; got None"):
        sharpness(*two_sites(), x, y, context)
    found = sharpness(*two_sites(), x, y, context, site="x")
    assert found.examples["means"].shape == (8, 1, 8)
    assert bool((found.examples["means"] > 100).all())  # samples are drawn with the context of each datum
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize(
    "likelihood",
    [likelihoods.Bernoulli, likelihoods.Poisson, likelihoods.StudentT, likelihoods.DiscretizedLogisticMixture],
)
def test_every_likelihood_is_looked_at(likelihood):
    x = (torch.rand(12, 1, 4, 4) < 0.5).float()
    network = partial(nn.OneHotInput, num_classes=3)
    vae = VAE(
        priors.Categorical(2, 3), likelihood(2, (1, 4, 4), network), encoders.Categorical((1, 4, 4), 2, num_classes=3)
    )
    found = sharpness(vae.model, vae.guide, x)
    assert found.error.sum() > 0
    assert found.width is None or found.width > 0
    assert found.summary()["width"] == found.width


def test_a_hierarchy_is_looked_at_and_leaves_the_random_state_to_its_caller():
    vae = structures.HierarchicalVAE(
        priors.StandardNormal(2),
        [encoders.DiagonalNormal(2, 3)],
        likelihoods.Normal(3, (1, 5, 5)),
        [encoders.DiagonalNormal((1, 5, 5), 3), encoders.DiagonalNormal(3, 2)],
    ).train()
    x = torch.randn(10, 1, 5, 5)
    results = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        results.append(sharpness(vae.model, vae.guide, x, num_draws=3))
    torch.testing.assert_close(results[0].error, results[1].error, rtol=0, atol=0)
    assert vae.likelihood.training


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(1, 6), {}, "sharpness needs at least 2 data, got 1"),
        (torch.randn(5, 6), {"num_draws": 0}, "num_draws must be at least 1, got 0"),
        (torch.randn(5, 6), {"shape": (4, 4)}, r"shape \(4, 4\) has 16 elements, but a datum has \(6,\)"),
        (torch.randn(5, 2), {}, r"datum, which has shape \(2,\): it needs at least 3 pixels"),
        (torch.randn(5, 2, 6), {}, "at least 3 pixels along each"),
        (torch.randn(5, 1, 1), {}, "at least 3 pixels along each"),
        (torch.randn(5, 6), {"site": "y"}, "observed sites, x; got 'y'"),
    ],
)
def test_bad_input_is_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        sharpness(*constant_pair(torch.zeros(x.shape[1:]), 1.0), x, **options)


def test_incomplete_data_are_refused():
    x, mask = split_missing(torch.where(torch.rand(9, 6) < 0.2, math.nan, torch.randn(9, 6)))
    vae = structures.MissingDataVAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 6), encoders.DiagonalNormal((2, 6), 2)
    )
    with pytest.raises(ValueError, match='The data at site "x" lack elements'):
        sharpness(vae.model, vae.guide, x, mask)
    assert sharpness(vae.model, vae.guide, x, torch.ones_like(mask)).num_data == 9


@pytest.mark.parametrize("x_shape", [(1, 6, 6), (9,), (2, 5, 5)])
def test_the_picture_shows_the_numbers(x_shape, tmp_path):
    found = sharpness(*constant_pair(torch.zeros(x_shape), 1.0), torch.randn(20, *x_shape))
    figure = found.plot(tmp_path / "sharpness.png")
    axes = figure.axes
    np.testing.assert_allclose(axes[0].lines[1].get_ydata(), found.error)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), found.lost)
    np.testing.assert_allclose(
        [bar.get_width() for bar in axes[2].patches], [v.mean() for v in found.laplacian.values()]
    )
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")
