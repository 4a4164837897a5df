"""State-space models: sequences whose latents are a Markov chain."""

import math
from functools import partial

import pytest
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import MultivariateNormal

import pyrovae
from pyrovae import bounds, encoders, likelihoods, nn, priors
from pyrovae.distributions import MarkovChain
from pyrovae.estimators import ParticleFilter
from pyrovae.structures import BackwardGRU, Smoothed, StateSpaceVAE

AFFINE = partial(nn.MLP, hidden=())
A = torch.tensor([[0.8, 0.3], [-0.2, 0.7]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, 1.0]], dtype=torch.float64)
Q, R = 0.7, 0.6


def raw(scale: float) -> float:
    """What `positive` maps to a scale."""
    return math.log(math.expm1(scale - 1e-6)) - math.log(math.e - 1)


def state_space(context_dim: int = 0) -> StateSpaceVAE:
    return StateSpaceVAE(
        priors.StandardNormal(2),
        encoders.DiagonalNormal(2, 2, nn.GatedTransition, context_dim=context_dim),
        likelihoods.Normal(2, 3, context_dim=context_dim),
        encoders.DiagonalNormal(2, 2, AFFINE, context_dim=8 + context_dim),
        BackwardGRU(3, 8),
    ).double()


def linear_gaussian() -> StateSpaceVAE:
    """A model with z_1 ~ N(0, I), z_t ~ N(A z, Q^2 I), x_t ~ N(C z, R^2 I), and some encoder."""
    vae = StateSpaceVAE(
        priors.StandardNormal(2),
        encoders.DiagonalNormal(2, 2, AFFINE),
        likelihoods.Normal(2, 3, AFFINE),
        encoders.DiagonalNormal(2, 2, AFFINE, context_dim=8),
        BackwardGRU(3, 8),
    ).double()
    with torch.no_grad():
        (layer,) = vae.transition.network.layers
        layer.weight.zero_()
        layer.weight[:2] = A
        layer.bias.copy_(torch.tensor([0.0, 0.0, raw(Q), raw(Q)]))
        (layer,) = vae.likelihood.network.layers
        layer.weight.copy_(C)
        layer.bias.zero_()
        vae.likelihood.log_scale.fill_(math.log(R))
    return vae


def following() -> StateSpaceVAE:
    """The linear-Gaussian model with a guide that draws from a wider transition, whatever the data."""
    vae = linear_gaussian()
    with torch.no_grad():
        (layer,) = vae.encoder.network.layers
        layer.weight.zero_()
        layer.weight[:2, :2] = A
        layer.bias.copy_(torch.tensor([0.0, 0.0, raw(1.2), raw(1.2)]))
    return vae


def covariance_of_states(steps: int) -> Tensor:
    """Returns the covariance of all states, by brute force."""
    covariance, variance = torch.zeros(2 * steps, 2 * steps, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for t in range(steps):
        variance = variance if t == 0 else A @ variance @ A.T + Q**2 * torch.eye(2)
        cross = variance
        for s in range(t, steps):
            cross = cross if s == t else A @ cross
            covariance[2 * s : 2 * s + 2, 2 * t : 2 * t + 2] = cross
            covariance[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = cross.T
    return covariance


def joint(steps: int, observed: Tensor) -> tuple[MultivariateNormal, Tensor]:
    """Returns the normal of the observed numbers, and the covariance of all states with them."""
    states, loadings = covariance_of_states(steps), torch.block_diag(*[C] * steps)
    kept = observed.repeat_interleave(3)
    x = loadings @ states @ loadings.T + R**2 * torch.eye(3 * steps)
    x_of_kept = MultivariateNormal(torch.zeros(int(kept.sum()), dtype=torch.float64), x[kept][:, kept])
    return x_of_kept, (states @ loadings.T)[:, kept]


def marginal(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([joint(len(m), m)[0].log_prob(row[m].flatten()) for row, m in zip(x, mask, strict=True)])


@pytest.fixture
def near(data) -> tuple[Tensor, Tensor]:
    """Sequences that are nearer to zero, so that the guide of `following` leaves many particles."""
    return data[0] / 2, data[1]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Sequences of lengths 4, 3 and 4 with steps that are missing between."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    return torch.where(mask.unsqueeze(-1), torch.randn(3, 4, 3, dtype=torch.float64), 50.0), mask


def test_a_chain_is_that_of_its_steps():
    chain = MarkovChain(
        dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1),
        lambda z, steps: dist.Normal(z @ A.T, Q).to_event(1),
        3,
    )
    z, covariance = chain.sample((20_000,)), covariance_of_states(3)
    exact = MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance)
    torch.testing.assert_close(chain.log_prob(z), exact.log_prob(z.flatten(1)))
    products = z.flatten(1).unsqueeze(-1) * z.flatten(1).unsqueeze(-2)
    error = products.std(0) / math.sqrt(len(z))
    assert ((products.mean(0) - covariance).abs() < 5 * error).all()


def test_log_p_is_that_of_the_normal(data):
    x, mask = data
    vae, expected = linear_gaussian(), marginal(*data)
    by_importance = pyrovae.log_marginal(vae.model, vae.guide, x, mask, num_samples=20_000, progress=False)
    by_filter = pyrovae.log_marginal(
        vae.model_by_step, vae.guide_by_step, x, mask, method=ParticleFilter(32, 200), progress=False
    )
    by_laplace = pyrovae.log_marginal(
        vae.model,
        vae.guide,
        x,
        mask,
        method=pyrovae.estimators.ImportanceSampling(500, pyrovae.estimators.Laplace()),
        progress=False,
    )
    for estimate in (by_importance, by_filter, by_laplace):
        assert ((estimate.value - expected).abs() < 4.5 * estimate.standard_error + 1e-6).all(), estimate
    assert by_laplace.trusted.all()


def test_both_forms_have_the_same_density(data):
    x, mask = data
    vae = state_space()
    values = []
    for model, guide in ((vae.model, vae.guide), (vae.model_by_step, vae.guide_by_step)):
        torch.manual_seed(3)
        log_w = pyrovae.log_weights(model, guide, x, mask, num_samples=3000)
        values.append(log_w)
    means = [v.logsumexp(0) - math.log(len(v)) for v in values]
    errors = [((v - m).exp().std(0) / math.sqrt(len(v))) for v, m in zip(values, means, strict=True)]
    assert ((means[0] - means[1]).abs() < 4.5 * torch.stack(errors).norm(dim=0)).all()


def test_padding_and_hidden_values_change_nothing(data):
    x, mask = data
    vae = state_space()
    longer = torch.cat([x, torch.full((3, 2, 3), -9.0, dtype=torch.float64)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    h, padded = vae.network(x, mask), vae.network(longer, longer_mask)
    for i, length in enumerate((4, 3, 4)):
        torch.testing.assert_close(h[i, :length], padded[i, :length])
    z = torch.randn(3, 6, 2, dtype=torch.float64)
    short, long = vae.encode(x, mask), vae.encode(longer, longer_mask)
    prior = [vae._chain(n, m.flip(1).cummax(1).values.flip(1), None) for n, m in ((4, mask), (6, longer_mask))]
    ratios = [prior[0].log_prob(z[:, :4]) - short.log_prob(z[:, :4]), prior[1].log_prob(z) - long.log_prob(z)]
    torch.testing.assert_close(*ratios)
    other = torch.where(mask.unsqueeze(-1), x, 7.0)
    torch.testing.assert_close(vae.encode(other, mask).log_prob(z[:, :4]), short.log_prob(z[:, :4]))


def test_the_order_of_the_batch_changes_nothing(data):
    x, mask = data
    vae, z = state_space(), torch.randn(3, 4, 2, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        vae.encode(x, mask).log_prob(z)[order], vae.encode(x[order], mask[order]).log_prob(z[order])
    )


def test_last_states_and_forecasts_are_those_of_the_normal(data):
    x, mask = data
    vae, n = linear_gaussian(), 4000
    z = vae.last_states(x, mask, num_particles=n)
    forecasts = vae.forecast(x, 2, mask, num_samples=n, num_particles=n)
    assert forecasts.shape == (n, 3, 2, 3)
    for i, last in enumerate((3, 2, 3)):
        normal, cross = joint(4, mask[i])
        gain = cross[2 * last : 2 * last + 2] @ normal.precision_matrix
        mean = gain @ x[i, mask[i]].flatten()
        # The particles of a filter are not independent: ten times the variance of as many draws.
        error = math.sqrt(10 / n)
        assert (z[:, i].mean(0) - mean).abs().max() < 4.5 * error
        for step in (1, 2):
            power = torch.linalg.matrix_power(A, step)
            assert (forecasts[:, i, step - 1].mean(0) - C @ power @ mean).abs().max() < 4.5 * 1.5 * error
    variance = forecasts[:, 0, 0].var(0)
    normal, cross = joint(4, mask[0])
    posterior = covariance_of_states(4)[6:, 6:] - cross[6:] @ normal.precision_matrix @ cross[6:].T
    expected = C @ (A @ posterior @ A.T + Q**2 * torch.eye(2)) @ C.T + R**2 * torch.eye(3)
    assert ((variance - expected.diagonal()).abs() < 4.5 * expected.diagonal() * math.sqrt(20 / n)).all()


def smoothed_normal(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and covariance of all states of a sequence given its observed steps, as the Kalman smoother does."""
    normal, cross = joint(len(mask), mask)
    gain = cross @ normal.precision_matrix
    return gain @ x[mask].flatten(), covariance_of_states(len(mask)) - gain @ cross.T


def test_smoothed_states_are_those_of_the_normal(near):
    """Means and covariances, also between steps and after the end, by the spread of independent smoothers."""
    x, mask = near
    vae, runs, n = following(), 20, 150
    smoothed = vae.smooth(x.repeat(runs, 1, 1), mask.repeat(runs, 1), num_samples=n, num_particles=3 * n)
    assert isinstance(smoothed, Smoothed)
    assert smoothed.states.shape == (n, 3 * runs, 4, 2)
    states = smoothed.states.flatten(2).unflatten(1, (runs, 3))
    for i in range(3):
        mean, covariance = smoothed_normal(x[i], mask[i])
        away = states[:, :, i] - mean
        for found, expected in (
            (away.mean(0), torch.zeros_like(mean)),
            (torch.einsum("nri,nrj->rij", away, away) / n, covariance),
        ):
            # The bias is of the order of 1 / (3 n), the error that of 20 n draws, which is larger.
            error = found.std(0) / math.sqrt(runs)
            assert ((found.mean(0) - expected).abs() < 4.5 * error).all()


def test_effective_particles_are_those_that_hold_the_states(near):
    """They are at most all, and few where a bad guide leaves few, which a warning tells."""
    x, mask = near
    vae = following()
    ess = vae.smooth(x, mask, num_particles=500).ess
    assert ess.shape == (3, 4)
    assert ((ess > 10) & (ess <= 500)).all()
    torch.testing.assert_close(ess[1, 3], ess[1, 2])  # after the end
    with pytest.warns(UserWarning, match="fewer than 10 effective particles.*num_particles=150"):
        few = vae.smooth(10 * x, mask, num_particles=15)
    assert (few.ess <= 15 * (1 + 1e-9)).all()
    assert few.states.shape == (100, 3, 4, 2)


def test_a_gap_is_filled_from_both_sides(near):
    x, mask = near
    vae, runs, n = following(), 20, 150
    holes = torch.where(mask.unsqueeze(-1), x, torch.nan)
    filled = vae.impute(holes.repeat(runs, 1, 1), mask.repeat(runs, 1), num_draws=n, num_particles=3 * n)
    assert filled.ess.shape == (3 * runs,)
    assert ((filled.ess > 10) & (filled.ess <= 3 * n)).all()
    draws = filled.draws.unflatten(1, (runs, 3))
    means = filled.mean.unflatten(0, (runs, 3))
    for i in range(3):
        assert (draws[:, :, i, mask[i]] == x[i, mask[i]]).all()
        assert (means[:, i, mask[i]] == x[i, mask[i]]).all()
        mean, covariance = smoothed_normal(x[i], mask[i])
        for t in (~mask[i]).nonzero().flatten():
            here = slice(2 * int(t), 2 * int(t) + 2)
            expected = C @ mean[here]
            variance = (C @ covariance[here, here] @ C.T).diagonal() + R**2
            found = means[:, i, t]
            assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) / math.sqrt(runs)).all()
            squares = (draws[:, :, i, t] - expected).square().mean(0)
            assert ((squares.mean(0) - variance).abs() < 4.5 * squares.std(0) / math.sqrt(runs)).all()


def test_smoothing_draws_the_same_with_other_padding_and_hidden_values(near):
    x, mask = near
    vae, runs, n = following(), 15, 100
    means = []
    for order, values, more in (([0, 1, 2], 50.0, 0), ([2, 0, 1], -7.0, 3)):
        filled = torch.where(mask.unsqueeze(-1), x, values)[order]
        filled = torch.nn.functional.pad(filled, (0, 0, 0, more), value=3.0)
        seen = torch.nn.functional.pad(mask[order], (0, more))
        states = vae.smooth(filled.repeat(runs, 1, 1), seen.repeat(runs, 1), num_samples=n, num_particles=3 * n).states
        found = states.mean(0).unflatten(0, (runs, 3))[:, torch.tensor(order).argsort(), :4]
        means.append((found.mean(0), found.std(0) / math.sqrt(runs)))
    (first, error), (second, other) = means
    assert ((first - second).abs() < 4.5 * (error.square() + other.square()).sqrt()).all()


def test_particles_that_all_die_are_refused():
    vae, x = state_space().float(), torch.zeros(2, 4, 3)
    x[1, 2] = 1e25  # the log-density is minus infinity whatever the state
    for verb in (vae.smooth, vae.last_states):
        with pytest.raises(ValueError, match="particles of 1 of 2 sequences have weight zero, first of number 1"):
            verb(x)


def test_training_raises_the_bound_and_graphs_keep_the_bits(data):
    x, mask = data
    found = []
    for compile in (False, "auto"):
        torch.manual_seed(0)
        vae = state_space()
        history = pyrovae.fit(
            vae.model,
            vae.guide,
            (x, mask),
            loss=bounds.ELBO(),
            epochs=12,
            compile=compile,
            progress=False,
        )
        found.append((history["loss"], [p.detach().clone() for p in vae.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][0][-1] < found[0][0][0]


def test_filtering_bound_trains_by_steps(data):
    vae = state_space()
    history = pyrovae.fit(vae.model_by_step, vae.guide_by_step, data, loss=bounds.FIVO(4), epochs=8, progress=False)
    assert all(map(math.isfinite, history["bound"]))


def test_contexts_enter_every_step():
    vae = state_space(context_dim=1)
    x, context = torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 5, 1, dtype=torch.float64)
    loss = bounds.ELBO().differentiable_loss(vae.model, vae.guide, x, None, context)
    assert loss.isfinite()
    by_step = bounds.FIVO(4).differentiable_loss(vae.model_by_step, vae.guide_by_step, x, None, context)
    assert by_step.isfinite()
    assert vae.sample(2, 5, context).shape == (2, 3, 5, 3)
    assert vae.smooth(x, None, context, num_samples=7).states.shape == (7, 3, 5, 2)
    assert vae.forecast(x[:, :3], 2, context=context, num_samples=7).shape == (7, 3, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.zeros(2, 4, 3), torch.ones(2, 3)), r"mask has shape \(2, 3\).*\(2, 4\) steps"),
        (lambda vae: vae.encode(torch.zeros(2, 4, 3), torch.tensor([[1] * 4, [0] * 4])), "no observed step in 1 of 2"),
        (lambda vae: vae.model(torch.zeros(2, 4, 3), None, torch.zeros(2, 1)), "no part was built for one"),
        (lambda vae: vae.smooth(torch.zeros(2, 4, 3), num_samples=0), "num_samples must be at least 1, got 0"),
        (lambda vae: vae.smooth(torch.zeros(2, 4, 3), num_particles=0), "num_particles must be at least 1, got 0"),
        (lambda vae: vae.sample(2, 0), "num_steps must be at least 1, got 0"),
        (lambda vae: vae.forecast(torch.zeros(2, 4, 3), 1, context=torch.zeros(2, 4, 1)), "context must have 5 steps"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(state_space().float())
