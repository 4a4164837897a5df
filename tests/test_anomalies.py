"""Scores against closed forms, areas against all pairs and scikit-learn, errors against their spread."""

import json
import math
import zlib

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from helpers import FAILURE_RATE
from linear_gaussian import assert_fraction, truth, vae_of
from pyro import distributions as dist
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score, roc_curve

from pyrovae import VAE, encoders, likelihoods, log_marginal, priors, structures
from pyrovae.diagnostics.anomalies import _roc_curve, anomalies, auroc


def test_areas_are_those_of_all_pairs_with_ties():
    usual, unusual = torch.randint(5, (40,)).float(), torch.randint(2, 7, (30,)).float()
    usual[0], unusual[0] = math.inf, -math.inf
    pairs = (usual[:, None] < unusual).double() + 0.5 * (usual[:, None] == unusual)
    found = auroc(usual, unusual)
    assert found.value == pytest.approx(pairs.mean().item(), rel=1e-12)
    finite = [t.clamp(-99, 99) for t in (usual, unusual)]
    labels = torch.cat([torch.zeros(40), torch.ones(30)])
    assert found.value == pytest.approx(roc_auc_score(labels, torch.cat(finite)), rel=1e-12)
    assert auroc(unusual, usual).value == pytest.approx(1 - found.value)
    # DeLong's variance from the sums over pairs.
    variance = pairs.mean(0).var() / 30 + pairs.mean(1).var() / 40
    assert found.standard_error == pytest.approx(variance.sqrt().item(), rel=1e-12)


def test_areas_cover_their_closed_form():
    # Of N(0, 1) and N(1, 4): the probability that a difference is positive.
    area = scipy.stats.norm.cdf(1 / math.sqrt(5))
    inside = 0
    for _ in range(1000):
        found = auroc(torch.randn(400), 1 + 2 * torch.randn(300))
        inside += abs(found.value - area) < 1.96 * found.standard_error
    assert_fraction(inside, 1000, 0.95, FAILURE_RATE)


def test_areas_of_single_data_have_no_error():
    assert auroc(torch.zeros(1), torch.ones(5)) == (1.0, None)
    assert auroc(torch.zeros(4), torch.zeros(5)) == (0.5, 0.0)


def test_the_curve_is_that_of_all_thresholds():
    usual, unusual = torch.randint(9, (40,)).double(), torch.randint(3, 12, (30,)).double()
    x, y = _roc_curve(usual, unusual)
    assert trapezoid(y, x) == pytest.approx(auroc(usual, unusual).value)
    labels = torch.cat([torch.zeros(40), torch.ones(30)])
    expected = roc_curve(labels, torch.cat([usual, unusual]), drop_intermediate=False)
    np.testing.assert_allclose(x, expected[0])
    np.testing.assert_allclose(y, expected[1])


def test_scores_have_their_closed_forms():
    known = truth(2, 5)
    vae, p = vae_of(known), known.marginal()
    x, other, reference = p.sample((30,)), p.sample((20,)) + 1, p.sample((25,))
    found = anomalies(vae.model, vae.guide, x, other=(other,), reference=reference, num_samples=30, progress=False)
    torch.testing.assert_close(found.log_marginal, p.log_prob(x))  # under the exact posterior all weights are equal
    assert found.reference == pytest.approx(p.log_prob(reference).mean().item())
    torch.testing.assert_close(found.scores["likelihood"], -p.log_prob(x))
    typicality = (p.log_prob(other) - p.log_prob(reference).mean()).abs()
    torch.testing.assert_close(found.other.scores["typicality"], typicality)
    expected = roc_auc_score([0] * 30 + [1] * 20, torch.cat([-p.log_prob(x), -p.log_prob(other)]))
    assert found.auroc["likelihood"].value == pytest.approx(expected)
    assert list(found.scores) == ["likelihood", "typicality"]
    assert "neither grey values from 0 to 1 nor integers" in found.skipped and found.skipped in str(found).replace(
        "\n", " "
    )
    assert found.num_untrusted == 0 and "too low" not in found.verdict
    alone = anomalies(vae.model, vae.guide, x, num_samples=30, progress=False)
    assert alone.reference == pytest.approx(p.log_prob(x).mean().item()) and alone.auroc == {}
    assert alone.most_unusual(3).tolist() == p.log_prob(x).argsort()[:3].tolist()
    assert all(str(i) in alone.verdict for i in alone.most_unusual(5).tolist())


def test_what_is_likelier_than_the_data_is_typically_unusual():
    known = truth(2, 5)
    vae, p = vae_of(known), known.marginal()
    x, other = p.sample((200,)), known.bias + 0.01 * torch.randn(200, 5).double()  # near the mode, where no data are
    found = anomalies(vae.model, vae.guide, x, other=other, num_samples=30, progress=False)
    assert found.auroc["likelihood"].value < 0.1 and found.auroc["typicality"].value > 0.7
    assert "best separation is by typicality" in found.verdict and "do not use log p(x)" in found.verdict
    same = anomalies(vae.model, vae.guide, x, other=x.flip(0), num_samples=30, progress=False)
    assert same.auroc["likelihood"].value == pytest.approx(0.5, abs=1e-3) and "No score separates" in same.verdict


def grey_vae(likelihood, x_shape=(1, 4, 4)):
    return VAE(priors.StandardNormal(2), likelihood(2, x_shape), encoders.DiagonalNormal(x_shape, 2))


def bits(array):
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return 8 * len(compressor.compress(array.tobytes()) + compressor.flush())


@pytest.mark.parametrize(
    ("likelihood", "x", "as_bytes"),
    [
        (likelihoods.Normal, torch.rand(9, 1, 4, 4), lambda x: (255 * x).round().astype(np.uint8)),
        (likelihoods.Bernoulli, torch.bernoulli(torch.full((9, 1, 4, 4), 0.3)), lambda x: (255 * x).astype(np.uint8)),
        (likelihoods.Poisson, torch.randint(9, (9, 1, 4, 4)).float(), lambda x: x.astype(np.uint8)),
        (likelihoods.Poisson, torch.randint(900, (9, 1, 4, 4)).float(), lambda x: x.astype(np.int32)),
    ],
)
def test_complexity_is_the_length_that_a_compressor_needs(likelihood, x, as_bytes):
    vae = grey_vae(likelihood)
    found = anomalies(vae.model, vae.guide, x, num_samples=25, progress=False)
    lengths = torch.tensor([bits(datum) for datum in as_bytes(x.numpy())])
    expected = -found.log_marginal.double() / math.log(2) - lengths
    torch.testing.assert_close(found.scores["complexity"], expected)
    assert found.skipped == ""


def test_both_sets_are_compressed_alike():
    vae = grey_vae(likelihoods.Normal)
    x, real = torch.rand(5, 1, 4, 4), torch.randn(5, 1, 4, 4)
    assert "complexity" not in anomalies(vae.model, vae.guide, x, other=real, num_samples=25, progress=False).scores
    whole = 7 * torch.ones(5, 1, 4, 4)  # grey values would be bytes of 255ths, beside whole numbers they are not
    assert "complexity" not in anomalies(vae.model, vae.guide, x, other=whole, num_samples=25, progress=False).scores


def test_complexity_mends_what_simple_data_do():
    # Independent normal pixels of the data's spread: flat grey is likelier than any datum.
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.5, 0.3).expand((1, 16, 16)).to_event(3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x, flat = torch.rand(60, 1, 16, 16), (0.5 + 0.1 * torch.rand(60, 1, 1, 1)).expand(60, 1, 16, 16)
    found = anomalies(model, guide, x, other=flat, num_samples=25, progress=False)
    assert found.auroc["likelihood"].value == 0 and found.auroc["complexity"].value == 1


def test_any_pyro_pair_will_do():
    def model(x, context):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(context, 1.0))
            with pyro.plate("two", 2, dim=-2):
                b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(())))
            loc = (a + b.sum(-2, keepdim=True)).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], 3), 1.0).to_event(1), obs=x)

    def guide(x, context):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.StudentT(4.0, x.mean(-1) - 1, 1.0))
            with pyro.plate("two", 2, dim=-2):
                pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(())))

    x, context = torch.randn(12, 3) + 1, torch.zeros(12)
    found = anomalies(
        model,
        guide,
        x,
        context,
        other=(x, context + 9),
        reference=(x[:5], context[:5]),
        num_samples=300,
        progress=False,
    )
    assert found.auroc["likelihood"].value == 1  # the same data with the wrong context
    assert max(map(len, str(found).splitlines())) <= 80
    with pytest.raises(ValueError, match="context is given by keyword, but has the rows of a single set"):
        anomalies(model, guide, x, context=context, other=(x,), num_samples=30, progress=False)
    assert anomalies(model, guide, x, context=context, num_samples=30, progress=False).x is x


def test_a_hierarchy_is_scored_and_leaves_the_random_state_to_its_caller():
    vae = structures.HierarchicalVAE(
        priors.StandardNormal(2),
        [encoders.DiagonalNormal(2, 3)],
        likelihoods.Normal(3, 6),
        [encoders.DiagonalNormal(6, 3), encoders.DiagonalNormal(3, 2)],
    ).train()
    x = torch.randn(8, 6)
    pyro.set_rng_seed(3)
    found = anomalies(vae.model, vae.guide, x, num_samples=50, progress=False)
    pyro.set_rng_seed(3)
    expected = log_marginal(vae.model, vae.guide, x, num_samples=50, progress=False)
    torch.testing.assert_close(found.log_marginal, expected.value, rtol=0, atol=0)
    torch.testing.assert_close(found.khat, expected.khat, rtol=0, atol=0)
    assert vae.encoders[0].training


def test_estimates_that_are_not_to_be_trusted_are_counted():
    known = truth(2, 5, scale=0.1)
    vae = vae_of(known, shift=6.0)  # a proposal that misses the posterior
    x = known.marginal().sample((20,))
    found = anomalies(vae.model, vae.guide, x, other=x, num_samples=200, progress=False)
    count = int((~(found.khat <= 0.7)).sum() + (~(found.other.khat <= 0.7)).sum())
    assert found.num_untrusted == count > 8
    assert f"not to be trusted: {count} of 40 data" in str(found) and "raise num_samples" in found.verdict
    few = anomalies(vae.model, vae.guide, x, num_samples=5, progress=False)
    assert few.num_untrusted == 20  # no k-hat is known


def test_the_summary_is_json():
    known = truth(2, 5)
    vae, x = vae_of(known), known.marginal().sample((8,))
    for other in (None, x[:1]):
        summary = anomalies(vae.model, vae.guide, x, other=other, num_samples=30, progress=False).summary()
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["auroc"]["likelihood"]["standard_error"] is None


def test_data_without_probability_are_the_most_unusual():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("near", torch.where((x - z).abs() < 5, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.tensor([0.1, 0.2, 50.0, 0.3])
    found = anomalies(model, guide, x, other=x, num_samples=100, progress=False)
    assert found.log_marginal[2] == -math.inf and math.isfinite(found.reference)
    assert found.most_unusual(1).tolist() == found.most_unusual(1, "typicality").tolist() == [2]
    assert found.summary()["mean_log_marginal"] is None
    assert len(found.plot().axes) == 3
    with pytest.raises(ValueError, match="log p\\(x\\) of all reference data is minus infinity"):
        anomalies(model, guide, x, reference=x[2:3], num_samples=100, progress=False)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.randn(0, 5), {}, "anomalies needs at least 1 data, got 0"),
        (torch.randn(5, 5), {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        (torch.randn(5, 5), {"other": torch.randn(0, 5)}, "anomalies needs at least 1 data, got 0"),
        (torch.full((5, 5), math.nan), {}, "holds NaN"),
    ],
)
def test_bad_input_is_named(x, options, message):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 5), encoders.DiagonalNormal(5, 2))
    with pytest.raises(ValueError, match=message):
        anomalies(vae.model, vae.guide, x, progress=False, **options)


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match="usual must be scores of shape"):
        auroc(torch.zeros(0), torch.ones(2))
    with pytest.raises(ValueError, match="unusual holds NaN, which has no rank, first at 1"):
        auroc(torch.zeros(2), torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("x_shape", [(1, 4, 4), (6,)])
def test_the_picture_shows_the_numbers(x_shape, several, tmp_path):
    vae, x = grey_vae(likelihoods.Normal, x_shape), torch.rand(20, *x_shape)
    other = 2 * torch.rand(10, *x_shape) if several else None
    found = anomalies(vae.model, vae.guide, x, other=other, num_samples=25, progress=False)
    figure = found.plot(tmp_path / "anomalies.png")
    panels = len(found.scores) + several
    assert len(figure.axes) == panels + 2 * (len(x_shape) == 3)
    if several:
        line = figure.axes[panels - 1].lines[0]
        area = trapezoid(line.get_ydata(), line.get_xdata())
        assert area == pytest.approx(found.auroc["likelihood"].value)
    assert (tmp_path / "anomalies.png").read_bytes().startswith(b"\x89PNG")
