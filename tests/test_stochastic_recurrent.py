"""State-space models with a memory of the data: stochastic recurrent networks."""

import math
from functools import partial

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch import nn as torch_nn
from torch.distributions import MultivariateNormal

import pyrovae
from pyrovae import bounds, encoders, likelihoods, nn, priors
from pyrovae.estimators import ParticleFilter, log_predictive
from pyrovae.structures import BackwardGRU, ForwardGRU, StateSpaceVAE

AFFINE = partial(nn.MLP, hidden=())
F64 = {"dtype": torch.float64}
# z ~ N(A z_before + B d, Q^2);  x ~ N(C z + D d, R^2);  d' = STAY d + m (FROM_X x + FROM_SEEN)
A = torch.tensor([[0.8, 0.3], [-0.2, 0.7]], **F64)
B = torch.tensor([[0.5, -0.3], [0.2, 0.4]], **F64)
C = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, 1.0]], **F64)
D = torch.tensor([[0.2, 0.1], [0.0, -0.6], [0.4, 0.0]], **F64)
STAY = torch.tensor([[0.5, 0.2], [-0.3, 0.4]], **F64)
FROM_X = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.2, 0.4]], **F64)
FROM_SEEN = torch.tensor([0.2, -0.1], **F64)
Q, R = 0.7, 0.6


class Linear(torch_nn.Module):
    """A linear recurrence of the data."""

    width = 2

    def __init__(self):
        super().__init__()
        self.stay = torch_nn.Parameter(STAY.clone())

    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        states = []
        for step in torch.where(mask.unsqueeze(-1), x @ FROM_X.T + FROM_SEEN, 0.0).unbind(-2):
            h = h @ self.stay.T + step
            states.append(h)
        return torch.stack(states, -2)


def raw(scale: float) -> float:
    """What `positive` maps to a scale."""
    return math.log(math.expm1(scale - 1e-6)) - math.log(math.e - 1)


def linear_gaussian() -> StateSpaceVAE:
    """A linear-Gaussian model, with a guide that draws from a wider transition, whatever the data of the step."""
    vae = StateSpaceVAE(
        priors.DiagonalNormal(2, AFFINE, context_dim=2),
        encoders.DiagonalNormal(2, 2, AFFINE, context_dim=2),
        likelihoods.Normal(2, 3, AFFINE, context_dim=2),
        encoders.DiagonalNormal(2, 2, AFFINE, context_dim=8 + 2),
        BackwardGRU(3, 8),
        Linear(),
    ).double()
    with torch.no_grad():
        for part in (vae.prior, vae.transition, vae.likelihood, vae.encoder):
            (layer,) = part.network.layers
            layer.weight.zero_()
            layer.bias.zero_()
        vae.prior.params.zero_()
        vae.prior.network.layers[0].weight[:2] = B
        vae.prior.network.layers[0].bias[2:] = raw(Q)
        vae.transition.network.layers[0].weight[:2] = torch.cat([A, B], 1)
        vae.transition.network.layers[0].bias[2:] = raw(Q)
        vae.likelihood.network.layers[0].weight.copy_(torch.cat([C, D], 1))
        vae.likelihood.log_scale.fill_(math.log(R))
        vae.encoder.network.layers[0].weight[:2] = torch.cat([A, torch.zeros(2, 8, **F64), B], 1)
        vae.encoder.network.layers[0].bias[2:] = raw(1.1)
    return vae


def joint(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns means of all steps of x and z, and the coefficients of the noise that the model adds."""
    steps = len(mask)
    d = z = torch.zeros(2, 5 * steps + 1, **F64)  # the last column is the constant
    xs, zs = [], []
    for t, seen in enumerate(mask.tolist()):
        z = A @ z + B @ d
        z[:, 5 * t : 5 * t + 2] += Q * torch.eye(2, **F64)
        x = C @ z + D @ d
        x[:, 5 * t + 2 : 5 * t + 5] += R * torch.eye(3, **F64)
        xs.append(x)
        zs.append(z)
        d = STAY @ d
        if seen:
            d = d + FROM_X @ x
            d[:, -1] += FROM_SEEN
    x_rows, z_rows = torch.cat(xs), torch.cat(zs)
    return x_rows[:, -1], z_rows[:, -1], x_rows[:, :-1], z_rows[:, :-1]


def marginal(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the log-density of the observed steps of sequences."""
    values = []
    for row, seen in zip(x, mask, strict=True):
        mean, _, noise, _ = joint(seen)
        kept = seen.repeat_interleave(3)
        normal = MultivariateNormal(mean[kept], noise[kept] @ noise[kept].T)
        values.append(normal.log_prob(row[seen].flatten()))
    return torch.stack(values)


def conditional(x: Tensor, seen: Tensor, wanted: str) -> tuple[Tensor, Tensor]:
    """Returns mean and covariance of all steps of z, or of x, given the observed steps of a sequence."""
    x_mean, z_mean, x_noise, z_noise = joint(seen)
    kept = seen.repeat_interleave(3)
    mean, noise = (z_mean, z_noise) if wanted == "z" else (x_mean, x_noise)
    gain = torch.linalg.solve(x_noise[kept] @ x_noise[kept].T, x_noise[kept] @ noise.T).T
    return mean + gain @ (x[seen].flatten() - x_mean[kept]), noise @ noise.T - gain @ x_noise[kept] @ noise.T


def stochastic_recurrent(context_dim: int = 0) -> StateSpaceVAE:
    width = 8 + context_dim
    return StateSpaceVAE(
        priors.DiagonalNormal(2, context_dim=width),
        encoders.DiagonalNormal(2, 2, nn.GatedTransition, context_dim=width),
        likelihoods.Normal(2, 3, context_dim=width),
        encoders.DiagonalNormal(2, 2, context_dim=6 + width),
        BackwardGRU(3, 6),
        ForwardGRU(3, 0, width=8),
    ).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Sequences of lengths 4, 3 and 4 with steps that are missing between."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    return torch.where(mask.unsqueeze(-1), 0.5 * torch.randn(3, 4, 3, **F64), 50.0), mask


def terms(function, z: Tensor, *args) -> dict[str, Tensor]:
    """Returns the log-densities of the sites of a model or a guide, by step, at given states."""
    values = {f"z{t + 1}": step for t, step in enumerate(z.unbind(1))}
    trace = poutine.trace(poutine.condition(function, values)).get_trace(*args)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in trace.nodes if name[1:].isdigit()}


def test_log_p_is_that_of_the_normal(data):
    x, mask = data
    vae, expected = linear_gaussian(), marginal(*data)
    by_importance = pyrovae.log_marginal(vae.model, vae.guide, x, mask, num_samples=20_000, progress=False)
    by_filter = pyrovae.log_marginal(
        vae.model_by_step, vae.guide_by_step, x, mask, method=ParticleFilter(32, 300), progress=False
    )
    for estimate in (by_importance, by_filter):
        assert ((estimate.value - expected).abs() < 4.5 * estimate.standard_error + 1e-6).all(), estimate


def test_scores_of_steps_are_those_of_the_normal():
    vae, x = linear_gaussian(), 0.5 * torch.randn(2, 5, 3, **F64)
    found = log_predictive(vae.model_by_step, vae.guide_by_step, x, method=ParticleFilter(64, 300))
    so_far = torch.stack([marginal(x[:, : t + 1], torch.ones(2, t + 1).bool()) for t in range(5)], 1)
    expected = so_far.diff(dim=1, prepend=torch.zeros(2, 1, **F64))
    assert ((found.value - expected).abs() < 4.5 * found.standard_error + 1e-6).all()


def test_draws_and_forecasts_are_those_of_the_normal(data):
    x, mask = data
    vae, n = linear_gaussian(), 8000
    drawn = vae.sample(n, 4).flatten(1)
    mean, _, noise, _ = joint(torch.ones(4).bool())
    assert ((drawn.mean(0) - mean).abs() < 4.5 * drawn.std(0) / math.sqrt(n)).all()
    products = (drawn - mean).unsqueeze(-1) * (drawn - mean).unsqueeze(-2)
    assert ((products.mean(0) - noise @ noise.T).abs() < 5 * products.std(0) / math.sqrt(n)).all()

    runs, m = 20, 200
    coming = vae.forecast(x.repeat(runs, 1, 1), 2, mask.repeat(runs, 1), num_samples=m, num_particles=m)
    assert coming.shape == (m, 3 * runs, 2, 3)
    for i, length in enumerate((4, 3, 4)):
        seen = torch.cat([mask[i, :length], torch.ones(2).bool()])
        mean, _, noise, _ = joint(seen)
        kept = seen.repeat_interleave(3)
        kept[-6:] = False
        covariance = noise @ noise.T
        gain = torch.linalg.solve(covariance[kept][:, kept], covariance[kept][:, -6:]).T
        expected = mean[-6:] + gain @ (x[i, mask[i]].flatten() - mean[kept])
        spread = covariance[-6:, -6:] - gain @ covariance[kept][:, -6:]
        away = coming[:, i::3].flatten(2) - expected
        for found, exact in (
            (away.mean(0), torch.zeros(6, **F64)),
            (torch.einsum("nri,nrj->rij", away, away) / m, spread),
        ):
            assert ((found.mean(0) - exact).abs() < 4.5 * found.std(0) / math.sqrt(runs)).all()


def test_smoothed_states_are_those_of_the_normal(data):
    x, mask = data[0][[0, 2]], data[1][[0, 2]]
    vae, runs, n = linear_gaussian(), 20, 150
    states = vae.smooth(x.repeat(runs, 1, 1), mask.repeat(runs, 1), num_samples=n, num_particles=3 * n).states
    states = states.flatten(2).unflatten(1, (runs, 2))
    for i in range(2):
        mean, covariance = conditional(x[i], mask[i], "z")
        away = states[:, :, i] - mean
        for found, expected in (
            (away.mean(0), torch.zeros_like(mean)),
            (torch.einsum("nri,nrj->rij", away, away) / n, covariance),
        ):
            assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) / math.sqrt(runs)).all()


def test_gaps_are_filled_by_what_the_model_says_of_them(data):
    x, mask = data[0][2:], data[1][2:]
    vae, runs, n = linear_gaussian(), 30, 150
    filled = vae.impute(x.repeat(runs, 1, 1), mask.repeat(runs, 1), num_draws=n, num_particles=3 * n)
    assert (filled.draws[:, :, mask[0]] == x[0, mask[0]]).all()
    mean, covariance = conditional(x[0], mask[0], "x")
    away = filled.draws.flatten(2) - mean
    products = torch.einsum("nri,nrj->rij", away, away) / n
    gaps = (~mask[0]).repeat_interleave(3)
    for found, expected in (
        (away.mean(0)[:, gaps], 0.0),
        (products.diagonal(0, 1, 2)[:, gaps], covariance.diag()[gaps]),
    ):
        assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) / math.sqrt(runs)).all()


def test_data_are_drawn_step_by_step_or_not_at_all():
    vae, x = linear_gaussian(), torch.zeros(8000, 4, 3, **F64)
    with pytest.raises(ValueError, match="data cannot be drawn.*call sample\\(\\), or draw from model_by_step"):
        poutine.uncondition(vae.model)(x[:2])
    drawn = poutine.trace(poutine.uncondition(vae.model_by_step)).get_trace(x)
    values = torch.cat([drawn.nodes[f"x{t + 1}"]["value"] for t in range(4)], 1)
    mean, _, noise, _ = joint(torch.ones(4).bool())
    products = (values - mean).unsqueeze(-1) * (values - mean).unsqueeze(-2)
    assert ((products.mean(0) - noise @ noise.T).abs() < 5 * products.std(0) / math.sqrt(len(values))).all()


def test_one_call_for_all_steps_is_the_sum_of_the_steps(data):
    x, mask = data
    vae, z = stochastic_recurrent(), torch.randn(3, 4, 2, **F64)
    by_step = [terms(vae.model_by_step, z, x, mask), terms(vae.guide_by_step, z, x, mask)]
    whole = [
        poutine.trace(poutine.condition(function, {"z": z})).get_trace(x, mask) for function in (vae.model, vae.guide)
    ]
    for trace in whole:
        trace.compute_log_prob()
    sums = [sum(found[f"z{t + 1}"] for t in range(4)) for found in by_step]
    torch.testing.assert_close(sums[0] - sums[1], whole[0].nodes["z"]["log_prob"] - whole[1].nodes["z"]["log_prob"])
    torch.testing.assert_close(sum(by_step[0][f"x{t + 1}"] for t in range(4)), whole[0].nodes["x"]["log_prob"])


def test_the_model_sees_no_future_and_the_guide_all(data):
    x = data[0]
    vae, z = stochastic_recurrent(), torch.randn(3, 4, 2, **F64)
    for t in range(4):
        other = x.clone()
        other[:, t] += 1.0
        before, after = (terms(vae.model_by_step, z, values) for values in (x, other))
        changed = {name for name in before if (before[name] != after[name]).any()}
        assert changed == {f"x{t + 1}"} | {f"{site}{s + 1}" for site in "zx" for s in range(t + 1, 4)}
        before, after = (terms(vae.guide_by_step, z, values) for values in (x, other))
        assert all((before[name] != after[name]).any() for name in before)


def test_padding_and_hidden_values_change_nothing(data):
    x, mask = data
    vae, z = stochastic_recurrent(), torch.randn(3, 4, 2, **F64)
    hidden = torch.where(mask.unsqueeze(-1), x, 77.0)
    longer = torch.cat([hidden, torch.full((3, 2, 3), -9.0, **F64)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    padded = torch.cat([z, torch.zeros(3, 2, 2, **F64)], 1)
    for function in (vae.model_by_step, vae.guide_by_step):
        before, after = terms(function, z, x, mask), terms(function, padded, longer, longer_mask)
        for name, value in before.items():
            torch.testing.assert_close(after[name], value)


@pytest.mark.parametrize("by_step", [False, True])
def test_training_raises_the_bound_and_graphs_keep_the_bits(data, by_step):
    found = []
    for compile in (False, "auto"):
        torch.manual_seed(0)
        vae = stochastic_recurrent()
        pair = (vae.model_by_step, vae.guide_by_step) if by_step else (vae.model, vae.guide)
        loss = bounds.FIVO(4) if by_step else bounds.ELBO()
        history = pyrovae.fit(*pair, data, loss=loss, epochs=30, compile=compile, progress=False)
        found.append((history["loss"], [p.detach().clone() for p in vae.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][0][-1] < found[0][0][0]


def test_contexts_follow_the_memory():
    vae = stochastic_recurrent(context_dim=1)
    x, context = torch.randn(3, 5, 3, **F64), torch.randn(3, 5, 1, **F64)
    assert vae.context_dim == 1
    assert bounds.ELBO().differentiable_loss(vae.model, vae.guide, x, None, context).isfinite()
    z, moved = torch.randn(3, 5, 2, **F64), context.clone()
    moved[:, 2] += 1.0
    before, after = (terms(vae.model_by_step, z, x, None, given) for given in (context, moved))
    assert {name for name in before if (before[name] != after[name]).any()} == {"z3", "x3"}
    assert vae.sample(2, 5, context).shape == (2, 3, 5, 3)
    assert vae.forecast(x[:, :3], 2, context=context, num_samples=7).shape == (7, 3, 2, 3)
    assert vae.reconstruct(x, None, context).shape == x.shape
    with pytest.raises(ValueError, match="has 0 numbers, but the parts were built for 1, after 8 of the memory"):
        vae.sample(2, 5)


def test_it_is_saved_and_built_again(tmp_path, data):
    vae = stochastic_recurrent()
    pyrovae.save(vae, tmp_path / "vae.safetensors")
    again = pyrovae.load(tmp_path / "vae.safetensors")
    z = torch.randn(3, 4, 2, **F64)
    before, after = (terms(one.model_by_step, z, *data) for one in (vae, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("recurrence", "message"),
    [
        (lambda: ForwardGRU(3, 2, width=8), "recurrence has latent_dim=2.*latent_dim=0"),
        (lambda: ForwardGRU(5, 0, width=8), r"agree on x_shape.*recurrence has \(5,\)"),
        (lambda: ForwardGRU(3, 0, width=9), "context_dim=8, but the memory of ForwardGRU has 9 units"),
        (lambda: torch_nn.Linear(3, 2), "Linear does not state the width of its memory"),
        (lambda: 8, "recurrence must be a module, got 8"),
    ],
)
def test_recurrences_that_do_not_fit_are_refused(recurrence, message):
    vae = stochastic_recurrent()
    with pytest.raises((ValueError, TypeError), match=message):
        StateSpaceVAE(vae.prior, vae.transition, vae.likelihood, vae.encoder, vae.network, recurrence())


def test_steps_after_the_end_are_left_to_forecasts(data):
    with pytest.raises(ValueError, match=r"1 of 3 sequences end before the last step, first of number 1.*forecast"):
        linear_gaussian().impute(*data)
