"""Importance weights and the estimates formed of them, for our VAE and for hand-written pairs."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pyro
import pytest
import torch
from helpers import FAILURE_RATE
from linear_gaussian import assert_mean, assert_unit_scores
from pyro import distributions as dist
from pyro import poutine
from pyro.ops.stats import fit_generalized_pareto
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae import VAE, Estimate, log_marginal, log_weights
from pyrovae.encoders import DiagonalNormal
from pyrovae.estimators import ImportanceSampling, Laplace
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal

EPS = torch.finfo(torch.float64).eps
# Log weights here are below 1000 and sums of fewer than 1000 terms: no double-precision result is off by more.
ROUNDING = 1000 * 1000 * EPS

log_marginal = partial(log_marginal, progress=False)


class Values(Messenger):
    """Keeps the last value of every sample site: after log_weights, the values that the weights were computed from."""

    def __enter__(self):
        self.last = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg):
        self.last[msg["name"]] = msg["value"]


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def data_plate(x: Tensor, **kwargs) -> pyro.plate:
    return pyro.plate("data", len(x), **kwargs)


def small_vae(context_dim: int = 0) -> VAE:
    network = partial(MLP, hidden=(16,))
    likelihood = Normal(2, 3, network, scale=0.5, context_dim=context_dim)
    return VAE(StandardNormal(2), likelihood, DiagonalNormal(3, 2, network, context_dim)).double()


# -------------------------------------------------------------------------------------------------------- log_weights


@pytest.mark.parametrize("num_samples", [1, 7])
@pytest.mark.parametrize("batch", [1, 5])
def test_log_weights_of_a_vae_are_the_hand_formed_ones(num_samples, batch):
    vae, x = small_vae(), doubles(batch, 3)
    with Values() as values:
        log_w = log_weights(vae.model, vae.guide, x, num_samples=num_samples)
    z = values.last["z"]
    assert z.shape == (num_samples, batch, 2)
    assert log_w.shape == (num_samples, batch)
    expected = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - vae.encode(x).log_prob(z)
    torch.testing.assert_close(log_w, expected, rtol=0, atol=ROUNDING)


def test_gradients_flow_through_log_weights():
    vae = small_vae()
    log_weights(vae.model, vae.guide, doubles(5, 3), num_samples=4).logsumexp(0).sum().backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


def test_the_same_draws_follow_from_the_same_seed_and_looking_draws_nothing():
    vae, x = small_vae(), doubles(5, 3)
    pyro.set_rng_seed(1)
    log_w = log_weights(vae.model, vae.guide, x, num_samples=4)
    pyro.set_rng_seed(1)
    z = vae.encode(x).rsample((4,))  # the first draws after the seed are those of the weights
    expected = vae.prior().log_prob(z) + vae.decode(z).log_prob(x) - vae.encode(x).log_prob(z)
    torch.testing.assert_close(log_w, expected, rtol=0, atol=ROUNDING)


def test_an_inner_plate_is_summed_over():
    # A latent per datum and one per pixel and datum; pixels stand in a plate at dimension -2.
    def model(x):
        pixels = pyro.plate("pixels", x.shape[1], dim=-2)
        with data_plate(x, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pixels:
                y = pyro.sample("y", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(y, 0.3), obs=x.T)

    def guide(x):
        pixels = pyro.plate("pixels", x.shape[1], dim=-2)
        with data_plate(x, dim=-1):
            pyro.sample("z", dist.Normal(x.mean(1), 1.0))
            with pixels:
                pyro.sample("y", dist.Normal(x.T, 0.4))

    x = doubles(5, 3)
    with Values() as values:
        log_w = log_weights(model, guide, x, num_samples=7)
    z, y = values.last["z"], values.last["y"]
    assert (z.shape, y.shape) == ((7, 1, 5), (7, 3, 5))
    inner = dist.Normal(z, 0.5).log_prob(y) + dist.Normal(y, 0.3).log_prob(x.T) - dist.Normal(x.T, 0.4).log_prob(y)
    outer = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(x.mean(1), 1.0).log_prob(z)
    torch.testing.assert_close(log_w, inner.sum(1) + outer.squeeze(1), rtol=0, atol=ROUNDING)
    assert log_marginal(model, guide, x, num_samples=30).value.shape == (5,)


def chain_model(x):
    with data_plate(x):
        top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        low = pyro.sample("low", dist.Normal(top.sum(-1), 0.5))
        pyro.deterministic("mean", low.unsqueeze(-1).expand(*low.shape, 3), event_dim=1)
        pyro.sample("x", dist.Normal(low.unsqueeze(-1).expand(*low.shape, 3), 0.7).to_event(1), obs=x)


def chain_guide(x):
    with data_plate(x):
        pyro.deterministic("centre", x.mean(1))
        low = pyro.sample("low", dist.Normal(x.mean(1), 0.6))
        pyro.sample("top", dist.Normal(torch.stack([low, low / 2], -1), 1.0).to_event(1))


def test_latents_that_depend_on_one_another():
    x = doubles(5, 3)
    with Values() as values:
        log_w = log_weights(chain_model, chain_guide, x, num_samples=7)
    top, low = values.last["top"], values.last["low"]
    log_p = dist.Normal(0.0, 1.0).log_prob(top).sum(-1) + dist.Normal(top.sum(-1), 0.5).log_prob(low)
    log_p = log_p + dist.Normal(low.unsqueeze(-1), 0.7).log_prob(x).sum(-1)
    log_q = dist.Normal(x.mean(1), 0.6).log_prob(low)
    log_q = log_q + dist.Normal(torch.stack([low, low / 2], -1), 1.0).log_prob(top).sum(-1)
    torch.testing.assert_close(log_w, log_p - log_q, rtol=0, atol=ROUNDING)


def test_log_marginal_of_latents_that_depend_on_one_another_is_the_closed_form():
    # low ~ N(0, 2 + 0.25) is shared by three pixels with noise 0.49.
    x = doubles(50, 3)
    truth = dist.MultivariateNormal(x.new_zeros(3), 2.25 * torch.ones(3, 3) + 0.49 * torch.eye(3, dtype=x.dtype))
    for budget in (64e6, 2e5):
        estimate = log_marginal(chain_model, chain_guide, x, num_samples=2000, max_memory=budget)
        assert_unit_scores((estimate.value - truth.log_prob(x)) / estimate.standard_error, FAILURE_RATE)


def test_masks_are_applied_and_scales_are_left_out():
    mask = torch.tensor([True, False, True, False, True])

    def model(x, masked, scaled):
        with data_plate(x), poutine.scale(scale=scaled):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=masked):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, masked, scaled):
        with data_plate(x), poutine.scale(scale=scaled):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = doubles(5)
    with Values() as values:
        log_w = log_weights(model, guide, x, mask, 0.1, num_samples=7)
    z = values.last["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(x, 1.0).log_prob(z)
    expected = expected + torch.where(mask, dist.Normal(z, 0.5).log_prob(x), 0.0)
    torch.testing.assert_close(log_w, expected, rtol=0, atol=ROUNDING)


def test_a_subsampled_data_plate_gives_unscaled_weights_per_datum():
    def model(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample=x):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = doubles(20)
    with Values() as values:
        log_w = log_weights(model, guide, x, num_samples=7)
    z = values.last["z"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x) - dist.Normal(x, 1.0).log_prob(z)
    assert log_w.shape == (7, 20)
    torch.testing.assert_close(log_w, expected, rtol=0, atol=ROUNDING)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x)
    for budget in (64e6, 1e4):
        estimate = log_marginal(model, guide, x, num_samples=1000, max_memory=budget)
        assert_unit_scores((estimate.value - truth) / estimate.standard_error, FAILURE_RATE)


def test_a_factor_of_the_model_is_part_of_the_weights():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", standard(x))
            pyro.factor("x", dist.Normal(z, 0.5).log_prob(x))

    x = doubles(5)
    with Values() as values:
        log_w = log_weights(model, good_guide, x, num_samples=7)
    torch.testing.assert_close(log_w, dist.Normal(values.last["z"], 0.5).log_prob(x), rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------------------------------------------------- errors


def standard(x: Tensor) -> dist.Normal:
    return dist.Normal(x.new_zeros(()), 1.0)


def good_model(x):
    with data_plate(x):
        z = pyro.sample("z", standard(x))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def good_guide(x):
    with data_plate(x):
        pyro.sample("z", standard(x))


def global_latent_model(x):
    centre = pyro.sample("centre", standard(x))
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_latent_guide(x):
    pyro.sample("centre", standard(x))
    good_guide(x)


def undeclared_guide(x):
    pyro.sample("z", standard(x).expand(x.shape))


def empty_guide(x):
    with data_plate(x):
        pass


def extra_guide(x, **infer):
    with data_plate(x):
        pyro.sample("z", standard(x))
        pyro.sample("surplus", standard(x), infer=infer)


def inner_latent(x, size=3, subsample_size=None, observe=False, dim=-2, data_dim=-1):
    with data_plate(x, dim=data_dim):
        with pyro.plate("inner", size, subsample_size, dim=dim):
            z = pyro.sample("z", standard(x))
        if observe:
            x = x if data_dim == -1 else x.unsqueeze(-1)
            pyro.sample("x", dist.Normal(z.sum(dim, keepdim=True), 1.0), obs=x)


def short_plate_model(x):
    with pyro.plate("data", 2 * len(x)):
        z = pyro.sample("z", standard(x))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.repeat(2))


PAIRS = {
    "latent outside the plate": (global_latent_model, global_latent_guide, '"centre".*outside the plate "data"'),
    "undeclared batch": (good_model, undeclared_guide, '"z"'),
    "guide misses a site": (good_model, empty_guide, 'guide misses the latent site "z"'),
    "guide has a site too many": (good_model, extra_guide, 'guide samples "surplus"'),
    "auxiliary site": (good_model, partial(extra_guide, is_auxiliary=True), '"surplus" of the guide is auxiliary'),
    "plates of other sizes": (
        partial(inner_latent, observe=True),
        partial(inner_latent, size=4),
        'plates of site "z" differ.*size 3.*size 4',
    ),
    "plate in one only": (partial(inner_latent, observe=True), good_guide, 'plates of site "z" differ.*"inner"'),
    "data plate of another size": (short_plate_model, good_guide, 'plates of site "z" differ'),
    "subsampled inner plate": (
        partial(inner_latent, subsample_size=2, observe=True),
        partial(inner_latent, subsample_size=2),
        'site "z" of the model is in the plate "inner", which is subsampled',
    ),
}


@pytest.mark.parametrize("estimate", [log_weights, log_marginal], ids=["log_weights", "log_marginal"])
@pytest.mark.parametrize(("model", "guide", "match"), PAIRS.values(), ids=PAIRS.keys())
def test_pairs_without_weights_per_datum_are_refused_by_name(model, guide, match, estimate):
    with pytest.raises(ValueError, match=match):
        estimate(model, guide, doubles(5), num_samples=4)


def test_the_pairs_above_differ_from_good_ones_only_in_their_fault():
    # The same building blocks without a fault: nothing is refused.
    assert log_weights(good_model, good_guide, doubles(5), num_samples=4).shape == (4, 5)
    nested = partial(inner_latent, observe=True), inner_latent
    assert log_weights(*nested, doubles(5), num_samples=4).shape == (4, 5)


@pytest.mark.parametrize("num_samples", [0, -3])
@pytest.mark.parametrize("estimate", [log_weights, log_marginal], ids=["log_weights", "log_marginal"])
def test_too_few_samples_are_refused(estimate, num_samples):
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {num_samples}"):
        estimate(good_model, good_guide, doubles(5), num_samples=num_samples)


@pytest.mark.parametrize("max_memory", [0, -1.0, math.nan])
def test_a_budget_that_is_not_positive_is_refused(max_memory):
    with pytest.raises(ValueError, match="max_memory must be a positive number"):
        log_marginal(good_model, good_guide, doubles(5), max_memory=max_memory)


def test_arguments_of_other_lengths_are_refused_by_name():
    vae = small_vae(context_dim=2)
    with pytest.raises(ValueError, match="argument 1 has 5 rows but context has 4"):
        log_marginal(vae.model, vae.guide, doubles(5, 3), context=doubles(4, 2))
    with pytest.raises(ValueError, match="argument 1 has 5 rows but argument 2 has 4"):
        log_marginal(vae.model, vae.guide, doubles(5, 3), doubles(4, 2))
    with pytest.raises(ValueError, match="context"):
        log_weights(vae.model, vae.guide, doubles(5, 3), context=doubles(4, 2), num_samples=4)


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="argument 1 is empty"):
        log_marginal(good_model, good_guide, doubles(0))
    with pytest.raises(ValueError, match="there is no tensor, array or list among the arguments"):
        log_marginal(good_model, good_guide)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["argument 1", "context"])
def test_log_marginal_refuses_nan_and_infinity_by_argument_and_row(name, bad):
    vae = small_vae(context_dim=2)
    x, context = doubles(5, 3), doubles(5, 2)
    (x if name == "argument 1" else context)[3, 1] = bad
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity in 1 of 5 rows, the first of them row 3"):
        log_marginal(vae.model, vae.guide, x, context=context)


def test_log_weights_refuses_nan_by_name():
    vae = small_vae()
    x = doubles(5, 3)
    x[3, 1] = math.nan
    with pytest.raises(ValueError, match='argument 1|site "x"|site "z"'):
        log_weights(vae.model, vae.guide, x, num_samples=4)


@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("estimate", [log_weights, log_marginal], ids=["log_weights", "log_marginal"])
def test_grey_pixels_are_refused_with_the_way_out(estimate, row):
    vae = VAE(StandardNormal(2), Bernoulli(2, 6), DiagonalNormal(6, 2))
    x = torch.ones(5, 6)
    x[row, 2] = 0.4
    with pytest.raises(ValueError, match='(?s)site "x" is outside the support.*pyrovae.data.dynamic_binarization'):
        estimate(vae.model, vae.guide, x, num_samples=4)


def test_data_of_another_shape_is_refused_by_site():
    def model(x):
        with data_plate(x):
            pyro.sample("z", standard(x))
            pyro.sample("x", dist.Normal(x.new_zeros(4), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r'data at site "x" has shape \(5, 3\).*events of shape \(4,\)'):
        log_weights(model, good_guide, doubles(5, 3), num_samples=2)


def test_a_pair_that_picks_its_own_data_is_refused():
    def model(x):
        with data_plate(x, subsample_size=min(3, len(x))) as picked:
            pyro.sample("x", dist.Normal(pyro.sample("z", standard(x)), 1.0), obs=x[picked])

    def guide(x):
        with data_plate(x, subsample_size=min(3, len(x))):
            pyro.sample("z", standard(x))

    with pytest.raises(ValueError, match='plate "data" drew 3 of 6'):
        log_marginal(model, guide, doubles(6), num_samples=10)


# ------------------------------------------------------------------------------------------------------- log_marginal


class Recorded:
    """A hand-written pair that keeps every draw of the guide and every one that the model scores, by datum.

    Rows of x are (number of the datum, its value). To plan its chunks, log_marginal runs the pair on a few draws of the
    first two data; so statements about counts are made of the data from the third on, for which they are exact.
    """

    def __init__(self):
        self.drawn, self.scored, self.sizes = {}, {}, []

    def keep(self, where: dict, x: Tensor, z: Tensor) -> None:
        for i, datum in enumerate(x[:, 0].long().tolist()):
            where.setdefault(datum, []).append(z.detach().reshape(-1, len(x))[:, i])

    def guide(self, x):
        with data_plate(x):
            z = pyro.sample("z", self.q(x))
        self.keep(self.drawn, x, z)

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", standard(x))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 1])
        self.keep(self.scored, x, z)
        self.sizes.append(z.numel())

    def q(self, x):
        return dist.Normal(0.8 * x[:, 1], 0.6)

    def log_w(self, x: Tensor, datum: int) -> Tensor:
        """The weights of the draws of one datum, formed by hand all at once."""
        z, row = torch.cat(self.drawn[datum]).unsqueeze(-1), x[datum : datum + 1]
        log_p = standard(x).log_prob(z) + dist.Normal(z, 0.5).log_prob(row[:, 1])
        return (log_p - self.q(row).log_prob(z)).squeeze(-1)


def numbered(n: int) -> Tensor:
    return torch.stack([torch.arange(n, dtype=torch.float64), doubles(n)], dim=1)


def reference(log_w: Tensor) -> dict[str, float]:
    """Returns the estimate of one datum from all its log weights, by the textbook formulas."""
    k = len(log_w)
    w = (log_w - log_w.max()).exp()
    tail = math.ceil(min(0.2 * k, 3 * math.sqrt(k)))
    largest = w.sort(descending=True).values[: tail + 1]
    return {
        "value": log_w.logsumexp(0).item() - math.log(k),
        "standard_error": (w.std() / w.mean() / math.sqrt(k)).item() if k > 1 else math.nan,
        "ess": (w.sum() ** 2 / (w**2).sum()).item(),
        "khat": fit_generalized_pareto(largest[:-1] - largest[-1])[0] if tail >= 5 else math.nan,
    }


def assert_is(estimate: Estimate, datum: int, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        ours = getattr(estimate, name)[datum].item()
        # The Pareto fit goes through a softmax of sums over up to 200 terms with exponents below 1000.
        assert ours == pytest.approx(value, rel=1e-9, abs=ROUNDING * 10, nan_ok=True), name


@pytest.mark.parametrize(
    ("num_samples", "max_memory"),
    [(1, 64e6), (2, 64e6), (20, 1.0), (21, 64e6), (97, 1.0), (997, 3e3), (997, 2e4), (997, 2e5), (997, 64e6)],
)
def test_log_marginal_uses_exactly_the_draws_that_were_asked_for(num_samples, max_memory, monkeypatch):
    draw_for_scores_alone(monkeypatch)
    pair, x = Recorded(), numbered(12)
    # With graphs, one draw is scored once more, to check the data.
    options = {"num_samples": num_samples, "max_memory": max_memory, "compile": False}
    estimate = log_marginal(pair.model, pair.guide, x, **options)
    assert estimate.num_samples == num_samples
    for datum in range(7, 12):  # the first are drawn for some more, to look and to plan
        drawn, scored = torch.cat(pair.drawn[datum]), torch.cat(pair.scored[datum])
        assert len(drawn) == num_samples
        assert torch.equal(drawn, scored)
        assert len(drawn.unique()) == num_samples
        # One pass over pieces gives what all weights at once give.
        assert_is(estimate, datum, reference(pair.log_w(x, datum)))


def test_budgets_lead_to_different_chunks_and_to_the_same_answer(monkeypatch):
    draw_for_scores_alone(monkeypatch)
    x = numbered(40)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 1])
    pieces = []
    for max_memory in (3e3, 2e5, 64e6):
        pair = Recorded()
        estimate = log_marginal(pair.model, pair.guide, x, num_samples=500, max_memory=max_memory)
        assert_unit_scores((estimate.value - truth) / estimate.standard_error, FAILURE_RATE)
        # No piece has latents that would alone exceed the budget.
        assert max(pair.sizes) * x.element_size() <= max_memory
        pieces.append(len(pair.drawn[39]))
    assert pieces[0] > pieces[1] == pieces[2] == 1  # several runs of the guide only where the draws do not fit


def draw_for_scores_alone(monkeypatch) -> None:
    """Leaves out the draws that are compared with others."""
    monkeypatch.setattr("pyrovae.inference.weights._reason_not_vectorized", lambda *_: None)
    for module in ("inference.weights", "estimators.task"):
        monkeypatch.setattr(f"pyrovae.{module}.check_independent", lambda *_, **__: {})
    monkeypatch.setattr("pyrovae.estimators.task.check_rows_alone", lambda *_: None)


class Seen:
    """Counts by a forward hook how often an encoder sees each row, whose first entry is the number of the datum."""

    def __init__(self, encoder: nn.Module):
        self.rows = []
        encoder.register_forward_hook(
            lambda _module, args, _out: self.rows.append(args[0][..., 0].flatten().round().long())
        )

    def counts(self, n: int) -> list[int]:
        return torch.cat(self.rows).bincount(minlength=n).tolist()


@pytest.mark.parametrize("max_memory", [2e5, 64e6])
def test_the_encoder_sees_every_datum_once_and_three_times_to_compare(max_memory):
    vae = small_vae()
    x = torch.cat([torch.arange(50, dtype=torch.float64).unsqueeze(1), doubles(50, 2)], dim=1)
    seen = Seen(vae.encoder)
    log_marginal(vae.model, vae.guide, x, num_samples=500, max_memory=max_memory)
    counts = seen.counts(50)
    # Draws at once are compared with one alone, and one with another that differs in some rows.
    assert counts[7:] == [1 + 3] * 43
    # To look and to plan, the first data are run through some times more.
    assert all(4 < count < 20 for count in counts[:7])


def test_data_keep_their_order_whatever_the_chunks():
    # Neighbours differ by 3.6 nats or
    # more, against errors below 0.1.
    pair = Recorded()
    x = torch.stack([torch.arange(30.0), 3 * torch.arange(30.0)], dim=1).double()
    estimate = log_marginal(pair.model, pair.guide, x, num_samples=100, max_memory=2e4)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 1])
    assert len(pair.sizes) > 10
    assert estimate.standard_error.max() < 0.1
    assert (estimate.value - truth).abs().max() < 1


def test_contexts_travel_with_their_data():
    vae = small_vae(context_dim=2)
    x, context = doubles(30, 3), doubles(30, 2)
    together = log_marginal(vae.model, vae.guide, x, context, num_samples=200, max_memory=1e5)
    alone = torch.cat(
        [log_marginal(vae.model, vae.guide, x[i : i + 1], context[i : i + 1], num_samples=200).value for i in range(30)]
    )
    error = math.sqrt(2) * together.standard_error
    assert_unit_scores((alone - together.value) / error, FAILURE_RATE)
    mixed_up = log_marginal(vae.model, vae.guide, x, context.flip(0), num_samples=200)
    assert ((mixed_up.value - together.value).abs() > 10 * error).any()  # contexts that are mixed up would show


@pytest.mark.parametrize("estimate", [log_weights, log_marginal], ids=["log_weights", "log_marginal"])
def test_arguments_may_be_given_by_name(estimate):
    vae = small_vae(context_dim=2)
    x, context = doubles(6, 3), doubles(6, 2)
    results = []
    for args, kwargs in [((x, context), {}), ((x,), {"context": context}), ((), {"x": x, "context": context})]:
        pyro.set_rng_seed(1)
        results.append(estimate(vae.model, vae.guide, *args, **kwargs, num_samples=30))
    values = [result if isinstance(result, Tensor) else result.value for result in results]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


class Noisy(nn.Module):
    """An encoder network with modules that behave differently in training, one of them left in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3).eval()
        self.out = nn.Linear(3, 4)

    def forward(self, x):
        return self.out(self.drop(self.frozen(self.norm(x))))


def noisy_vae() -> VAE:
    likelihood = Normal(2, 3, network=nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    return VAE(StandardNormal(2), likelihood, DiagonalNormal(3, 2, network=Noisy()))


@pytest.mark.parametrize("breaks", [False, True], ids=["", "after an error"])
def test_log_marginal_runs_in_evaluation_mode_and_puts_everything_back(breaks):
    vae, x = noisy_vae(), torch.randn(20, 3)
    modes = {name: module.training for name, module in vae.named_modules()}
    assert set(modes.values()) == {True, False}
    state = {name: t.clone() for name, t in vae.state_dict().items()}

    def model(x):
        vae.model(x)
        if breaks and len(x) > 2:
            raise ArithmeticError

    def estimate():
        pyro.set_rng_seed(1)
        return log_marginal(model, vae.guide, x, num_samples=50)

    if breaks:
        with pytest.raises(ArithmeticError):
            estimate()
    else:
        training = estimate()
    assert {name: module.training for name, module in vae.named_modules()} == modes
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    if not breaks:
        vae.eval()
        assert torch.equal(training.value, estimate().value)


class Watched(nn.GRU):
    """A recurrent layer that keeps whether cuDNN was allowed, which has no gradients of it in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.allowed.append(torch.backends.cudnn.enabled)
        if torch.is_grad_enabled() and self.breaks:
            raise ArithmeticError
        return super().forward(x.reshape(-1, 1, 2))[0].reshape(*x.shape[:-1], 3)


@pytest.mark.parametrize("breaks", [False, True], ids=["", "after an error"])
def test_gradients_of_recurrent_layers_are_taken_without_cudnn(breaks):
    layer = Watched(2, 3, batch_first=True)
    layer.allowed, layer.breaks = [], breaks
    likelihood = Normal(2, 3, network=layer)
    vae, x = VAE(StandardNormal(2), likelihood, DiagonalNormal(3, 2)), torch.randn(4, 3)
    with pytest.raises(ArithmeticError) if breaks else nullcontext():
        log_marginal(vae.model, vae.guide, x, method=ImportanceSampling(50, Laplace(num_starts=1)))
    assert set(layer.allowed) == {True, False}
    assert torch.backends.cudnn.enabled


def test_log_weights_is_left_in_the_mode_it_is_called_in_but_looks_in_evaluation_mode():
    # Bounds train through log_weights: dropout must act in it; the look before it must not move running statistics.
    vae, x = noisy_vae(), torch.randn(20, 3)
    log_weights(vae.model, vae.guide, x, num_samples=3)
    assert vae.encoder.network.norm.num_batches_tracked == 1


def test_log_marginal_builds_no_graph():
    vae = small_vae()
    assert not log_marginal(vae.model, vae.guide, doubles(5, 3), num_samples=30).value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_estimates_have_the_precision_of_the_model(dtype):
    vae = small_vae().to(dtype)
    estimate = log_marginal(vae.model, vae.guide, torch.randn(5, 3, dtype=dtype), num_samples=30)
    assert {estimate.value.dtype, estimate.standard_error.dtype, estimate.ess.dtype, estimate.khat.dtype} == {dtype}


# --------------------------------------------------------------------------------------------- weights made to measure


class Tilted(dist.Uniform):
    """A distribution on the unit interval whose log density is a given function."""

    def __init__(self, low: Tensor, log_w: Callable[[Tensor], Tensor]):
        super().__init__(low, 1.0)
        self.log_w = log_w

    def expand(self, batch_shape, _instance=None):
        return Tilted(self.low.expand(batch_shape), self.log_w)

    def log_prob(self, value):
        return self.log_w(value)


class Made(NamedTuple):
    """A pair whose log weights are a given function of uniform draws."""

    log_w: Callable[[Tensor], Tensor]

    def guide(self, x):
        with data_plate(x):
            pyro.sample("u", dist.Uniform(x.new_zeros(()), 1.0))

    def model(self, x):
        with data_plate(x):
            pyro.sample("u", Tilted(x.new_zeros(()), self.log_w))
            pyro.factor("nothing", torch.zeros_like(x))  # there are no weights without something observed

    def estimate(self, num_samples: int, data: int = 5) -> tuple[Estimate, Tensor]:
        """Returns the estimate and the log weights that it was formed of, in one piece."""
        with Values() as values:
            estimate = log_marginal(self.model, self.guide, doubles(data), num_samples=num_samples)
        return estimate, self.log_w(values.last["u"])


TAILS = {
    "Pareto 0.3": lambda u: -0.3 * u.log(),
    "Pareto 1.2": lambda u: -1.2 * u.log(),
    "exponential": lambda u: (-u.log()).log(),
    "bounded": lambda u: u.log(),
    "lognormal": lambda u: 3 * dist.Normal(0.0, 1.0).icdf(u),
    "far from zero": lambda u: -0.5 * u.log() - 800.0,
}


@pytest.mark.parametrize("num_samples", [21, 100, 2000])
@pytest.mark.parametrize("name", TAILS)
def test_estimates_agree_with_textbook_formulas_for_light_and_heavy_tails(name, num_samples):
    estimate, log_w = Made(TAILS[name]).estimate(num_samples)
    assert log_w.shape == (num_samples, 5)
    for datum in range(5):
        assert_is(estimate, datum, reference(log_w[:, datum]))


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_khat_recovers_the_shape_of_pareto_weights(k):
    # Above any threshold u^-k follows a generalized Pareto distribution of shape k. An efficient estimate of it from n
    # excesses has a standard error of (1 + k) / sqrt(n); the prior of five observations at 0.5 is taken out again.
    estimate, _ = Made(lambda u: -k * u.log()).estimate(5000, data=200)
    n = math.ceil(3 * math.sqrt(5000))
    free_of_prior = (estimate.khat * (n + 10) - 5) / n
    assert_unit_scores((free_of_prior - k) / ((1 + k) / math.sqrt(n)), FAILURE_RATE)


def test_the_estimated_mean_weight_is_unbiased():
    estimate, _ = Made(lambda u: -0.3 * u.log()).estimate(50, data=2000)
    assert_mean(estimate.value.exp(), torch.tensor(1 / 0.7), FAILURE_RATE)  # the integral of u^-0.3


def test_equal_weights_have_no_error_and_no_tail():
    estimate, _ = Made(lambda u: torch.full_like(u, -3.0)).estimate(100)
    assert (estimate.value + 3).abs().max() < ROUNDING
    assert (estimate.ess - 100).abs().max() < ROUNDING
    assert estimate.standard_error.max() < math.sqrt(ROUNDING)
    assert (estimate.khat == -math.inf).all()


def test_weights_equal_but_for_rounding_have_no_tail_that_is_not_to_be_trusted():
    # Rounding leaves a few distinct values and many ties, as a perfect guide does.
    estimate, log_w = Made(lambda u: -95.3 * (1 + 4 * EPS * (2 * u - 1))).estimate(1000, data=50)
    assert 1 < len(log_w.unique()) < 20
    assert (estimate.khat <= 0.7).all()


@pytest.mark.parametrize("spread", [10.0, 100.0, 700.0])
def test_khat_is_that_of_the_tail_as_far_as_numbers_reach(spread):
    # The largest 95 of 1000 weights spread over a tenth of it.
    estimate, log_w = Made(lambda u: spread * u).estimate(1000)
    for datum in range(5):
        assert_is(estimate, datum, reference(log_w[:, datum]))


@pytest.mark.parametrize("slope", [1e4, 1e6])
def test_a_tail_that_underflows_is_not_to_be_trusted(slope):
    estimate, log_w = Made(lambda u: slope * u).estimate(1000)
    assert (log_w.amax(0) - log_w.sort(0).values[-96] > 709).all()  # beyond what double precision holds
    assert (estimate.khat == math.inf).all() and not estimate.trusted.any()
    assert estimate.ess.min() >= 1 - ROUNDING


@pytest.mark.parametrize(("num_samples", "known"), [(20, False), (21, True)])
def test_fewer_than_21_samples_have_no_khat(num_samples, known):
    estimate, _ = Made(TAILS["Pareto 0.3"]).estimate(num_samples)
    assert estimate.khat.isnan().logical_not().eq(known).all()


def test_a_single_sample_has_no_standard_error():
    estimate, log_w = Made(TAILS["Pareto 0.3"]).estimate(1)
    assert estimate.standard_error.isnan().all()
    torch.testing.assert_close(estimate.value, log_w[0], rtol=0, atol=ROUNDING)
    assert (estimate.ess - 1).abs().max() < ROUNDING


def test_impossible_draws_count_as_weights_of_zero():
    estimate, log_w = Made(lambda u: torch.where(u < 0.3, -math.inf, -0.3 * u.log())).estimate(500)
    assert (log_w == -math.inf).any(dim=0).all()
    for datum in range(5):
        assert_is(estimate, datum, reference(log_w[:, datum]))


def test_one_possible_draw_among_impossible_ones_is_not_to_be_trusted(monkeypatch):
    # This density is one of all draws together, which is noticed.
    draw_for_scores_alone(monkeypatch)
    estimate, log_w = Made(lambda u: torch.where(u == u.amax(0), -1.0, -math.inf)).estimate(500)
    assert ((log_w > -math.inf).sum(0) == 1).all()
    torch.testing.assert_close(
        estimate.value, torch.full_like(estimate.value, -1 - math.log(500)), rtol=0, atol=ROUNDING
    )
    assert (estimate.ess - 1).abs().max() < ROUNDING
    assert (estimate.khat > 0.7).all()


def test_data_that_no_draw_can_explain_are_not_to_be_trusted():
    estimate, _ = Made(lambda u: torch.full_like(u, -math.inf)).estimate(100)
    assert (estimate.value == -math.inf).all()
    assert (estimate.khat > 0.7).all()
    assert "not to be trusted: 5 of 5" in str(estimate)


def test_an_estimate_prints_its_errors_and_what_is_not_to_be_trusted():
    estimate = Estimate(
        torch.tensor([-1.0, -3.0]),
        torch.tensor([0.3, 0.4]),
        torch.full((2,), 20.0),
        torch.tensor([0.1, 0.9]),
        50,
        ImportanceSampling(50),
        remedy="Do better.",
    )
    text = str(estimate)
    assert "log p(x) = -2.000 nats" in text
    assert "0.250 from 50 samples" in text  # sqrt(0.3^2 + 0.4^2) / 2
    assert "1.000 from 2 data" in text  # sqrt(2) / sqrt(2)
    assert text.endswith("not to be trusted: 1 of 2 data; modes that the guide misses are not seen. Do better.")
    assert estimate.trusted.tolist() == [True, False]


def test_a_plate_that_is_summed_away_does_not_take_the_place_of_the_samples():
    # Without keepdim, (samples, plate, data) becomes (samples, data), which broadcasts with (samples, 1, data) to
    # (samples, samples, data).
    def model(x, keepdim=False):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("parts", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a + (b.sum(-2, keepdim=True) if keepdim else b.sum(-2)), 1.0), obs=x)

    def guide(x, keepdim=False):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))

    x = torch.randn(4)
    truth = dist.Normal(torch.zeros(()), math.sqrt(5)).log_prob(x)
    with pytest.warns(UserWarning, match="drawn one by one"):
        by_one = log_marginal(model, guide, x, num_samples=500, progress=False)
    at_once = log_marginal(model, guide, x, keepdim=True, num_samples=20_000, progress=False)
    for estimate in (by_one, at_once):
        assert_unit_scores((estimate.value - truth) / estimate.standard_error, FAILURE_RATE)


def test_a_plate_that_is_looped_over_may_have_any_name():
    x = torch.randn(4)

    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 0.5), obs=x[i])

    def guide(x):  # the posterior
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 1.25, 0.2**0.5))

    with pytest.warns(UserWarning, match="have no plate, so that all that they are given is one datum"):
        found = log_marginal(model, guide, x, num_samples=30, progress=False)
    expected = dist.Normal(0.0, 1.25**0.5).log_prob(x).sum()
    torch.testing.assert_close(found.value, expected.reshape(1))
