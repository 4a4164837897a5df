"""Precision, recall and Fréchet distance against direct computations; samples of a perfect model reach the floor."""

import math
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pyro
import pytest
import scipy.linalg
import torch
from helpers import FAILURE_RATE
from linear_gaussian import assert_mean, repeat, truth, vae_of
from pyro import distributions as dist

from pyrovae import VAE, encoders, likelihoods, nn, priors, structures
from pyrovae.diagnostics.quality import QualityScores, _latent_means, frechet_distance, precision_recall, quality


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_all_pairs(k, monkeypatch):
    monkeypatch.setattr(sys.modules["pyrovae.diagnostics.quality"], "_CHUNK", 100)  # several parts
    real, generated = torch.randn(30, 2), 1.5 * torch.randn(40, 2) + 0.5

    def share(centers, points):
        inside = 0
        for p in points:
            for i, c in enumerate(centers):
                others = sorted(math.dist(c, o) for j, o in enumerate(centers) if j != i)
                if math.dist(c, p) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    r, g = real.double().tolist(), generated.double().tolist()
    assert precision_recall(real, generated, k) == pytest.approx((share(r, g), share(g, r)))
    assert precision_recall(real, generated, k)[::-1] == precision_recall(generated, real, k)


def test_precision_and_recall_tell_what_is_wrong():
    real = torch.cat([torch.randn(100, 3), torch.randn(100, 3) + 50])
    missing = torch.randn(200, 3)  # of two modes, one
    assert precision_recall(real, missing).precision > 0.9 and precision_recall(real, missing).recall < 0.55
    strange = torch.cat([torch.randn(100, 3), torch.randn(100, 3) + 50, torch.randn(200, 3) - 50])
    assert precision_recall(real, strange).precision < 0.55 and precision_recall(real, strange).recall > 0.9
    assert precision_recall(real, real) == (1.0, 1.0)


def test_frechet_distance_is_that_of_the_matrix_square_root():
    real, generated = torch.randn(50, 4) @ torch.randn(4, 4), torch.randn(60, 4) @ torch.randn(4, 4) + 1
    c, d = np.cov(real.double().T.numpy()), np.cov(generated.double().T.numpy())
    root = scipy.linalg.sqrtm(c @ d).real
    offset = (real.double().mean(0) - generated.double().mean(0)).square().sum().item()
    assert frechet_distance(real, generated) == pytest.approx(offset + np.trace(c + d - 2 * root), rel=1e-8)
    assert frechet_distance(real, generated) == pytest.approx(frechet_distance(generated, real), rel=1e-12)


def test_frechet_distance_has_its_closed_forms_without_full_rank():
    x = torch.randn(5, 20).double()  # five points in 20 dimensions
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, x + 2) == pytest.approx(80)  # a shift alone
    assert frechet_distance(x, 3 * x) == pytest.approx(
        (2 * x.mean(0)).square().sum().item() + 4 * x.var(0).sum().item()
    )
    a, b = torch.zeros(9, 4).double(), torch.zeros(9, 4).double()
    a[:, :2], b[:, 2:] = torch.randn(9, 2), torch.randn(9, 2)  # in planes that are at right angles
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item())
    assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])) == pytest.approx(2)


def test_samples_of_the_true_model_reach_the_floor():
    known = truth(2, 4)
    vae = vae_of(known)

    def once():
        found = quality(vae.model, vae.guide, known.marginal().sample((60,)), features=lambda x: x)
        floor = [found.floor.precision, found.floor.recall, found.floor.frechet]
        model = [found.model.precision, found.model.recall, found.model.frechet]
        return torch.tensor(model) - torch.tensor(floor)

    assert_mean(repeat(once, 100), torch.zeros(3), FAILURE_RATE)


def test_the_verdict_is_silent_for_the_true_model_and_not_for_another():
    known = truth(2, 4)
    vae = vae_of(known)
    silent = sum(
        "cannot be distinguished" in quality(vae.model, vae.guide, known.marginal().sample((200,))).verdict
        for _ in range(40)
    )
    assert silent >= 30, silent
    x = known.marginal().sample((300,))
    wild = quality(vae.model, vae.guide, known.bias + 0.2 * (x - known.bias), features=lambda x: x)
    assert wild.model.precision < 0.7 < wild.floor.precision and "of samples are unlike data" in wild.verdict
    narrow = quality(vae.model, vae.guide, known.bias + 5 * (x - known.bias), features=lambda x: x)
    assert narrow.model.recall < 0.7 < narrow.floor.recall and "of data are unlike any sample" in narrow.verdict


def test_samples_are_drawn_with_the_context_of_each_datum():
    context = torch.cat([torch.zeros(30, 1), torch.full((30, 1), 100.0)])

    def model(x, context):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(context, 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a.squeeze(-1), 1.0))
            pyro.sample("x", dist.Normal(b.unsqueeze(-1).expand(*b.shape, 3), 1.0).to_event(1), obs=x)

    def guide(x, context):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x.mean(-1, keepdim=True), 1.0).to_event(1))
            pyro.sample("b", dist.Normal(a.squeeze(-1) + 7, 1.0))

    x = context + torch.randn(60, 3)
    found = quality(model, guide, x, context)
    assert found.features == "means of the guide's latents" and found.generated.shape == (60, 2)
    assert bool(((found.generated[:, 0] > 50) == (context[:, 0] > 50)).all())
    torch.testing.assert_close(found.real[:, 0], x.mean(-1).double())
    assert bool(((found.real[:, 1] - found.real[:, 0] - 7).abs() < 6 / math.sqrt(8)).all())
    assert quality(model, guide, x=x, context=context).size == 30


def test_features_are_means_where_the_guide_has_them_and_of_draws_where_not():
    x = torch.randn(11, 4)
    vae = VAE(priors.StandardNormal(3), likelihoods.Normal(3, 4), encoders.DiagonalNormal(4, 3))
    torch.testing.assert_close(_latent_means(vae.model, vae.guide, (x,), {}), vae.encode(x).mean.detach())
    flow = VAE(priors.StandardNormal(3), likelihoods.Normal(3, 4), encoders.InverseAutoregressiveFlow(4, 3))
    assert quality(flow.model, flow.guide, x).real.shape == (11, 3)
    decoder = likelihoods.Normal(2, 4, partial(nn.OneHotInput, num_classes=3))
    classes = VAE(priors.Categorical(2, 3), decoder, encoders.Categorical(4, 2, num_classes=3))
    assert set(quality(classes.model, classes.guide, x).real.unique().tolist()) <= {0.0, 1.0, 2.0}
    deep = structures.HierarchicalVAE(
        priors.StandardNormal(2),
        [encoders.DiagonalNormal(2, 3)],
        likelihoods.Normal(3, 4),
        [encoders.DiagonalNormal(4, 3), encoders.DiagonalNormal(3, 2)],
    )
    assert quality(deep.model, deep.guide, x).real.shape == (11, 5)


def test_chunks_and_the_random_state_of_the_caller(monkeypatch):
    vae = VAE(priors.StandardNormal(3), likelihoods.Normal(3, 4), encoders.DiagonalNormal(4, 3)).train()
    x = torch.randn(21, 4)
    whole = quality(vae.model, vae.guide, x)
    monkeypatch.setattr(sys.modules["pyrovae.diagnostics.quality"], "_CHUNK", 5 * 8 * 4)
    pyro.set_rng_seed(1)
    parts = quality(vae.model, vae.guide, x)
    # A product of matrices is rounded in another order for other numbers of rows.
    torch.testing.assert_close(parts.real, whole.real, rtol=0, atol=10 * torch.finfo(torch.float32).eps)
    pyro.set_rng_seed(1)
    assert quality(vae.model, vae.guide, x).model == parts.model
    assert parts.size == 10 and vae.encoder.training


def test_the_table_and_the_summary_hold_the_numbers():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 4), encoders.DiagonalNormal(4, 2))
    found = quality(vae.model, vae.guide, torch.randn(40, 4), features=torch.nn.Linear(4, 3))
    assert found.features == "Linear" and isinstance(found.model, QualityScores)
    assert max(map(len, str(found).splitlines())) <= 80
    assert f"{found.floor.precision:10.3f}{found.floor.recall:10.3f}" in str(found)
    assert found.summary()["model"] == found.model._asdict() and found.summary()["size"] == 20


def test_chance_is_not_called_a_finding():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 4), encoders.DiagonalNormal(4, 2))
    found = quality(vae.model, vae.guide, torch.randn(400, 4))
    model, floor = (torch.binomial(torch.full((500,), n), torch.tensor(0.9)) / n for n in (400.0, 200.0))
    called = sum(
        replace(found, model=QualityScores(m, 1.0, 0.0), floor=QualityScores(f, 1.0, 0.0))._below("precision")
        for m, f in zip(model.tolist(), floor.tolist(), strict=True)
    )
    assert called < 500 * 0.05


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (torch.randn(4, 2), torch.randn(9, 2), {}, "real needs at least 5 rows, got 4"),
        (torch.randn(9, 2), torch.randn(4, 2), {}, "generated needs at least 5 rows, got 4"),
        (torch.randn(9, 2), torch.randn(9, 2), {"k": 0}, "k must be at least 1, got 0"),
        (torch.randn(9), torch.randn(9, 2), {}, r"real must be features of shape \(n, d\), got \(9,\)"),
        (torch.randn(9, 2), torch.randn(9, 3), {}, "real has 2 features but generated has 3"),
        (torch.randn(9, 2), torch.full((9, 2), math.nan), {}, r"generated \(features\) holds NaN"),
    ],
)
def test_bad_features_are_named(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, **options)
    if not options and "5 rows" not in message:
        with pytest.raises(ValueError, match=message):
            frechet_distance(real, generated)


def test_bad_input_of_quality_is_named():
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 4), encoders.DiagonalNormal(4, 2))
    x = torch.randn(20, 4)
    with pytest.raises(ValueError, match="real needs at least 2 rows"):
        frechet_distance(x[:1], x)
    with pytest.raises(ValueError, match="quality with k=3 needs at least 10 data, got 9"):
        quality(vae.model, vae.guide, x[:9])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        quality(vae.model, vae.guide, x, k=0)
    with pytest.raises(ValueError, match=r"features must be \(batch, d\), but for data of shape \(20, 4\)"):
        quality(vae.model, vae.guide, x, features=lambda x: x.sum(-1))
    with pytest.raises(ValueError, match=r"real \(features\) holds NaN or infinity in 20 of 20 rows"):
        quality(vae.model, vae.guide, x, features=lambda x: x / 0)
    with pytest.raises(ValueError, match="not one of the arguments as given"):
        quality(lambda x: vae.model(x + 0), vae.guide, x)


def test_a_model_without_data_is_refused():
    def pair(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes none of its arguments"):
        quality(pair, pair, torch.randn(20, 4))


@pytest.mark.parametrize(("x_shape", "latent_dim"), [((1, 4, 4), 3), (5, 1)])
def test_the_picture_shows_the_numbers(x_shape, latent_dim, tmp_path):
    likelihood = likelihoods.Normal(latent_dim, x_shape)
    vae = VAE(priors.StandardNormal(latent_dim), likelihood, encoders.DiagonalNormal(x_shape, latent_dim))
    found = quality(vae.model, vae.guide, torch.randn(20, *likelihood.x_shape))
    figure = found.plot(tmp_path / "quality.png")
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    np.testing.assert_allclose(heights, [*found.model[:2], *found.floor[:2]])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
