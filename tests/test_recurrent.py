"""Recurrent VAEs: sequences whose steps depend on all steps before."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import pyrovae
from pyrovae import bounds, encoders, likelihoods, priors
from pyrovae.distributions import RecurrentChain
from pyrovae.estimators import ParticleFilter, log_predictive
from pyrovae.nn import MLP
from pyrovae.structures import ForwardGRU, RecurrentVAE, SequenceVAE, StateSpaceVAE

AFFINE = partial(MLP, hidden=())
F64 = {"dtype": torch.float64}
# h' = STAY h + m FROM_X x + m FROM_SEEN + FROM_Z z;  z ~ N(TO_Z h, Q^2);  x ~ N(C z + D h, R^2)
STAY = torch.tensor([[0.5, 0.2], [-0.3, 0.4]], **F64)
FROM_X = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.2, 0.4]], **F64)
FROM_SEEN = torch.tensor([0.2, -0.1], **F64)
FROM_Z = torch.tensor([[0.6, 0.1], [-0.2, 0.5]], **F64)
TO_Z = torch.tensor([[0.7, -0.4], [0.3, 0.6]], **F64)
C = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, 1.0]], **F64)
D = torch.tensor([[0.2, 0.1], [0.0, -0.6], [0.4, 0.0]], **F64)
Q, R = 0.8, 0.6


class Linear(nn.Module):
    """A linear recurrence."""

    width = 2

    def __init__(self):
        super().__init__()
        self.stay = nn.Parameter(STAY.clone())

    def forward(self, h: Tensor, x: Tensor, mask: Tensor, z: Tensor) -> Tensor:
        states, seen = [], mask.unsqueeze(-1)
        given = torch.where(seen, x @ FROM_X.T + FROM_SEEN, 0.0) + z @ FROM_Z.T
        for step in given.unbind(-2):
            h = h @ self.stay.T + step
            states.append(h)
        return torch.stack(states, -2)


def raw(scale: float) -> float:
    """What `positive` maps to a scale."""
    return math.log(math.expm1(scale - 1e-6)) - math.log(math.e - 1)


def linear_gaussian() -> RecurrentVAE:
    """A linear-Gaussian model, and a guide that is wider than its posterior."""
    vae = RecurrentVAE(
        priors.DiagonalNormal(2, AFFINE, context_dim=2),
        likelihoods.Normal(2, 3, AFFINE, context_dim=2),
        encoders.DiagonalNormal(3, 2, AFFINE, context_dim=2),
        Linear(),
    ).double()
    (to_z,), (to_x,), (to_q,) = (part.network.layers for part in (vae.prior, vae.likelihood, vae.encoder))
    with torch.no_grad():
        vae.prior.params.zero_()
        for layer in (to_z, to_x, to_q):
            layer.weight.zero_()
            layer.bias.zero_()
        to_z.weight[:2], to_z.bias[2:] = TO_Z, raw(Q)
        to_x.weight.copy_(torch.cat([C, D], 1))
        vae.likelihood.log_scale.fill_(math.log(R))
        precision = C.T @ C / R**2 + torch.eye(2, **F64) / Q**2
        to_x_of_q = torch.linalg.solve(precision, C.T / R**2)
        to_q.weight[:2] = torch.cat([to_x_of_q, TO_Z - to_x_of_q @ (C @ TO_Z + D)], 1)
        to_q.bias[2:] = raw(0.7)
    return vae


def joint(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and covariance of all steps of x, by the coefficients of the noise that the model adds."""
    all_steps, _ = coefficients(mask)
    return all_steps[:, -1], all_steps[:, :-1] @ all_steps[:, :-1].T


def coefficients(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all steps of x, and of z, as linear functions of the noise that the model adds; the last is constant."""
    steps, h = len(mask), torch.zeros(2, 5 * len(mask) + 1, **F64)  # the last column is the constant
    rows, latents = [], []
    for t, seen in enumerate(mask.tolist()):
        z, x = TO_Z @ h, torch.zeros(3, 5 * steps + 1, **F64)
        z[:, 5 * t : 5 * t + 2] += Q * torch.eye(2, **F64)
        x += C @ z + D @ h
        x[:, 5 * t + 2 : 5 * t + 5] += R * torch.eye(3, **F64)
        rows.append(x)
        latents.append(z)
        h = STAY @ h + FROM_Z @ z
        if seen:
            h = h + FROM_X @ x
            h[:, -1] += FROM_SEEN
    return torch.cat(rows), torch.cat(latents)


def marginal(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the log-density of the observed steps of sequences."""
    values = []
    for row, seen in zip(x, mask, strict=True):
        (mean, covariance), kept = joint(seen), seen.repeat_interleave(3)
        values.append(MultivariateNormal(mean[kept], covariance[kept][:, kept]).log_prob(row[seen].flatten()))
    return torch.stack(values)


def recurrent(context_dim: int = 0) -> RecurrentVAE:
    return RecurrentVAE(
        priors.DiagonalNormal(2, context_dim=8 + context_dim),
        likelihoods.Normal(2, 3, context_dim=8 + context_dim),
        encoders.DiagonalNormal(3, 2, context_dim=8 + context_dim),
        ForwardGRU(3, 2, width=8),
    ).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Sequences of lengths 4, 3 and 4 with steps that are missing between."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    return torch.where(mask.unsqueeze(-1), torch.randn(3, 4, 3, **F64), 50.0), mask


def terms(function, z: Tensor, *args) -> dict[str, Tensor]:
    """Returns the log-densities of the sites of a model or a guide, by step, at given latents."""
    values = {f"z{t + 1}": step for t, step in enumerate(z.unbind(1))}
    trace = poutine.trace(poutine.condition(function, values)).get_trace(*args)
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in trace.nodes if name[1:].isdigit()}


def test_a_chain_with_a_memory_is_that_of_its_steps():
    """An autoregression of the second order, whose memory is the last two values, with an end."""
    active = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    chain = RecurrentChain(
        torch.zeros(2, 2, **F64),
        lambda h, steps: dist.Normal(0.6 * h[..., :1] - 0.3 * h[..., 1:], 0.5).to_event(1),
        lambda h, z, steps: torch.stack(
            [z[..., 0], torch.cat([h[..., None, 0], z[..., :-1, 0]], -1)],
            -1,
        ),
        4,
        active,
    )
    noise = torch.eye(4, **F64)
    noise[1, 0] = noise[2, 1] = noise[3, 2] = -0.6
    noise[2, 0] = noise[3, 1] = 0.3
    path = 0.5 * torch.linalg.inv(noise)
    ended = torch.block_diag(path[:2, :2], torch.eye(2, **F64))
    drawn = chain.rsample((20_000,))
    for value in (drawn, drawn.clone()):  # scored as it was drawn, and all steps in one call
        for i, factor in enumerate((path, ended)):
            exact = MultivariateNormal(torch.zeros(4, **F64), scale_tril=factor)
            torch.testing.assert_close(chain.log_prob(value)[:, i], exact.log_prob(drawn[:, i, :, 0]))
    products = drawn[:, 0] @ drawn[:, 0].mT
    assert ((products.mean(0) - path @ path.T).abs() < 5 * products.std(0) / math.sqrt(len(drawn))).all()


def test_log_p_is_that_of_the_normal(data):
    x, mask = data
    vae, expected = linear_gaussian(), marginal(*data)
    by_importance = pyrovae.log_marginal(vae.model, vae.guide, x, mask, num_samples=20_000, progress=False)
    by_filter = pyrovae.log_marginal(
        vae.model_by_step, vae.guide_by_step, x, mask, method=ParticleFilter(32, 200), progress=False
    )
    for estimate in (by_importance, by_filter):
        assert ((estimate.value - expected).abs() < 4.5 * estimate.standard_error + 1e-6).all(), estimate
        assert estimate.trusted.all()


def test_the_filtering_bound_is_below_and_rises(data):
    x, mask = data
    vae, expected = linear_gaussian(), marginal(*data).sum()
    found = []
    for num_particles in (2, 8, 32):
        bound = bounds.FIVO(num_particles)
        values = torch.tensor([-bound.loss(vae.model_by_step, vae.guide_by_step, x, mask) for _ in range(25)])
        found.append((values.mean(), values.std() / math.sqrt(len(values))))
    for (low, error), (high, other) in zip(found, [*found[1:], (expected, torch.tensor(0.0))], strict=True):
        assert low < high + 3 * math.hypot(error, other)
    (low, error), (high, other) = found[0], found[-1]
    assert low + 4 * error < high - 4 * other
    assert expected - high < (expected - low) / 4  # the gap falls at least as fast as 1 / sqrt(num_particles)


def test_scores_of_steps_are_those_of_the_normal():
    vae, x = linear_gaussian(), torch.randn(2, 5, 3, **F64)
    found = log_predictive(vae.model_by_step, vae.guide_by_step, x, method=ParticleFilter(64, 200))
    so_far = torch.stack([marginal(x[:, : t + 1], torch.ones(2, t + 1).bool()) for t in range(5)], 1)
    expected = so_far.diff(dim=1, prepend=torch.zeros(2, 1, **F64))
    assert ((found.value - expected).abs() < 4.5 * found.standard_error + 1e-6).all()


def test_smoothed_latents_are_those_of_the_normal(data):
    x, mask = data
    vae = linear_gaussian()
    pyro.set_rng_seed(0)
    n = 4000
    found = vae.smooth(x, mask, num_samples=n, num_particles=20)
    assert found.states.shape == (n, len(x), x.shape[1], 2)
    assert torch.equal(found.ess, found.ess[:, :1].expand_as(found.ess))
    for i, seen in enumerate(mask):
        of_x, of_z = coefficients(seen)
        kept, length = seen.repeat_interleave(3), int(seen.nonzero().amax()) + 1
        of_x, of_z = of_x[kept], of_z[: 2 * length]
        gain = torch.linalg.solve(of_x[:, :-1] @ of_x[:, :-1].T, of_x[:, :-1] @ of_z[:, :-1].T).T
        mean = of_z[:, -1] + gain @ (x[i][seen].flatten() - of_x[:, -1])
        rest = of_z[:, :-1] - gain @ of_x[:, :-1]
        covariance = rest @ rest.T
        path = found.states[:, i, :length].flatten(1)
        # As many independent draws as effective filters, of those that were resampled.
        independent = 1 / (1 / found.ess[i, 0] + 1 / n)
        error = (covariance.diagonal() / independent).sqrt()
        assert ((path.mean(0) - mean).abs() <= 4.5 * error).all()
        spread = covariance.diagonal().outer(covariance.diagonal()) + covariance.square()
        assert ((path.T.cov() - covariance).abs() <= 4.5 * (spread / independent).sqrt()).all()
    assert vae.smooth(x, mask, num_samples=3).states.shape == (3, len(x), x.shape[1], 2)
    with pytest.warns(UserWarning, match="fewer than 10 effective particles"):
        vae.smooth(20 * torch.randn_like(x), num_samples=3, num_particles=2)


def test_gaps_are_filled_by_what_the_model_says_of_them(data):
    x, mask = data[0][2:], data[1][2:]
    vae, n = linear_gaussian(), 4000
    pyro.set_rng_seed(0)
    filled = vae.impute(torch.where(mask.unsqueeze(-1), x, torch.nan), mask, num_draws=n, num_particles=20)
    assert (filled.draws[:, :, mask[0]] == x[0, mask[0]]).all() and (filled.mean[:, mask[0]] == x[0, mask[0]]).all()
    of_x, kept = coefficients(mask[0])[0], mask[0].repeat_interleave(3)
    seen, gaps = of_x[kept], of_x[~kept]
    gain = torch.linalg.solve(seen[:, :-1] @ seen[:, :-1].T, seen[:, :-1] @ gaps[:, :-1].T).T
    mean = gaps[:, -1] + gain @ (x[0][mask[0]].flatten() - seen[:, -1])
    rest = gaps[:, :-1] - gain @ seen[:, :-1]
    variance = (rest @ rest.T).diagonal()
    independent = 1 / (1 / filled.ess[0] + 1 / n)  # draws, of those that were resampled
    found = filled.draws[:, 0].flatten(1)[:, ~kept]
    assert ((found.mean(0) - mean).abs() <= 4.5 * (variance / independent).sqrt()).all()
    assert ((found.var(0) - variance).abs() <= 4.5 * variance * (2 / independent).sqrt()).all()
    assert ((filled.mean[0].flatten()[~kept] - mean).abs() <= 4.5 * (variance / independent).sqrt()).all()
    whole = vae.impute(filled.mean, torch.ones_like(mask), num_draws=3)
    assert torch.equal(whole.mean, filled.mean) and 10 < whole.ess.item() <= 50
    with pytest.raises(ValueError, match="1 of 1 sequences end before the last step, first of number 0"):
        vae.impute(x, mask.flip(1))


def test_draws_and_forecasts_are_those_of_the_normal(data):
    x, mask = data
    vae, n = linear_gaussian(), 8000
    drawn = vae.sample(n, 4).flatten(1)
    mean, covariance = joint(torch.ones(4).bool())
    assert ((drawn.mean(0) - mean).abs() < 4.5 * drawn.std(0) / math.sqrt(n)).all()
    products = (drawn - mean).unsqueeze(-1) * (drawn - mean).unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all()

    runs, m = 20, 200
    coming = vae.forecast(x.repeat(runs, 1, 1), 2, mask.repeat(runs, 1), num_samples=m, num_particles=m)
    assert coming.shape == (m, 3 * runs, 2, 3)
    for i, length in enumerate((4, 3, 4)):
        longer = torch.cat([mask[i, :length], torch.ones(2).bool()])
        (mean, covariance), kept = joint(longer), longer.repeat_interleave(3)
        kept[-6:] = False
        gain = torch.linalg.solve(covariance[kept][:, kept], covariance[kept][:, -6:]).T
        expected = mean[-6:] + gain @ (x[i, mask[i]].flatten() - mean[kept])
        spread = covariance[-6:, -6:] - gain @ covariance[kept][:, -6:]
        away = coming[:, i::3].flatten(2) - expected
        for found, exact in (
            (away.mean(0), torch.zeros(6, **F64)),
            (torch.einsum("nri,nrj->rij", away, away) / m, spread),
        ):
            error = found.std(0) / math.sqrt(runs)
            assert ((found.mean(0) - exact).abs() < 4.5 * error).all()


def test_data_are_drawn_step_by_step_or_not_at_all():
    """The model for all steps at once reads the data that it is given, so that draws from it would be wrong."""
    vae, x = linear_gaussian(), torch.zeros(8000, 4, 3, **F64)
    with pytest.raises(ValueError, match="data cannot be drawn.*call sample\\(\\), or draw from model_by_step"):
        poutine.uncondition(vae.model)(x[:2])
    with pytest.raises(ValueError, match="data cannot be drawn"):
        pyrovae.diagnostics.calibration(vae.model, vae.guide, x[:60], num_draws=20)
    drawn = poutine.trace(poutine.uncondition(vae.model_by_step)).get_trace(x)
    values = torch.cat([drawn.nodes[f"x{t + 1}"]["value"] for t in range(4)], 1)
    mean, covariance = joint(torch.ones(4).bool())
    products = (values - mean).unsqueeze(-1) * (values - mean).unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(len(values))).all()


def test_one_call_for_all_steps_is_the_sum_of_the_steps(data):
    """The whole forms, in which the recurrence reads given latents, and those with a site for each step."""
    x, mask = data
    vae, z = recurrent(), torch.randn(3, 4, 2, **F64)
    by_step = [terms(vae.model_by_step, z, x, mask), terms(vae.guide_by_step, z, x, mask)]
    whole = [
        poutine.trace(poutine.condition(function, {"z": z})).get_trace(x, mask) for function in (vae.model, vae.guide)
    ]
    for trace in whole:
        trace.compute_log_prob()
    sums = [sum(found[f"z{t + 1}"] for t in range(4)) for found in by_step]
    expected = whole[0].nodes["z"]["log_prob"] - whole[1].nodes["z"]["log_prob"]
    torch.testing.assert_close(sums[0] - sums[1], expected)  # without the steps after the end, which cancel
    torch.testing.assert_close(sum(by_step[0][f"x{t + 1}"] for t in range(4)), whole[0].nodes["x"]["log_prob"])


def test_a_path_scores_as_it_was_drawn(data):
    x, mask = data
    q = recurrent().encode(x, mask)
    z = q.rsample((5,))
    drawn, h = q.log_prob(z), q.memories(z)
    torch.testing.assert_close(q.log_prob(z.clone()), drawn)
    torch.testing.assert_close(q.memories(z.clone()), h)


def test_no_step_sees_the_future(data):
    x = data[0]
    vae, z = recurrent(), torch.randn(3, 4, 2, **F64)
    for t in range(4):
        other, moved = x.clone(), z.clone()
        other[:, t] += 1.0
        moved[:, t] += 1.0
        for function in (vae.model_by_step, vae.guide_by_step):
            before, after = terms(function, z, x), terms(function, moved, other)
            for name, value in before.items():
                changes = (after[name] != value).any()
                assert bool(changes) == (int(name[1:]) >= t + 1), name


def test_a_step_that_was_not_observed_costs_nothing(data):
    """Its latent has the prior as its guide, and its value is not read."""
    x, mask = data
    vae, z = recurrent(), torch.randn(3, 4, 2, **F64)
    p, q = terms(vae.model_by_step, z, x, mask), terms(vae.guide_by_step, z, x, mask)
    other = terms(vae.model_by_step, z, torch.where(mask.unsqueeze(-1), x, -3.0), mask)
    for t in range(4):
        missing = ~mask[:, t]
        torch.testing.assert_close(p[f"z{t + 1}"][missing], q[f"z{t + 1}"][missing])
        assert (p[f"z{t + 1}"] != q[f"z{t + 1}"])[mask[:, t]].all()
        assert (p[f"x{t + 1}"][missing] == 0).all()
    for name, value in p.items():
        torch.testing.assert_close(other[name], value)


def test_padding_and_the_order_of_the_batch_change_nothing(data):
    x, mask = data
    vae, z = recurrent(), torch.randn(3, 6, 2, **F64)
    longer = torch.cat([x, torch.full((3, 2, 3), -9.0, **F64)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    order = torch.tensor([2, 0, 1])
    found = []
    for values, seen, latents in (
        (x, mask, z[:, :4]),
        (longer, longer_mask, z),
        (x[order], mask[order], z[order, :4]),
    ):
        p, q = (
            poutine.trace(poutine.condition(function, {"z": latents})).get_trace(values, seen)
            for function in (vae.model, vae.guide)
        )
        p.compute_log_prob()
        q.compute_log_prob()
        found.append(p.nodes["z"]["log_prob"] + p.nodes["x"]["log_prob"] - q.nodes["z"]["log_prob"])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][order], found[2])


def test_training_raises_the_bound_and_graphs_keep_the_bits(data):
    x, mask = data
    found = []
    for compile in (False, "auto"):
        torch.manual_seed(0)
        vae = recurrent()
        history = pyrovae.fit(
            vae.model, vae.guide, (x, mask), loss=bounds.ELBO(), epochs=12, compile=compile, progress=False
        )
        found.append((history["loss"], [p.detach().clone() for p in vae.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][0][-1] < found[0][0][0]


def test_gradients_are_right_where_model_and_guide_share_the_recurrence(data):
    """Two unbiased estimators, of which one drops the score of the guide, also where the guide is the prior."""
    vae, runs = linear_gaussian(), 40
    x, mask = data[0].repeat(runs, 1, 1) / 2, data[1].repeat(runs, 1)
    found = []
    for gradient in (bounds.Reparameterized(), bounds.DoublyReparameterized()):
        bound, drawn = bounds.IWAE(3, gradient), []
        for _ in range(25):
            loss = bound.differentiable_loss(vae.model, vae.guide, x, mask) / runs
            grads = torch.autograd.grad(loss, list(vae.parameters()))
            drawn.append(torch.cat([grad.flatten() for grad in grads]))
        values = torch.stack(drawn)
        found.append((values.mean(0), values.std(0) / math.sqrt(len(values))))
    (plain, error), (doubly, other) = found
    assert ((plain - doubly).abs() < 4.5 * (error.square() + other.square()).sqrt() + 1e-9).all()


@pytest.mark.parametrize("loss", [bounds.ELBO, partial(bounds.IWAE, 4), partial(bounds.FIVO, 4)])
def test_bounds_train_by_steps(data, loss):
    vae = recurrent()
    history = pyrovae.fit(vae.model_by_step, vae.guide_by_step, data, loss=loss(), epochs=6, progress=False)
    assert all(map(math.isfinite, history["loss"]))


def test_pyro_trains_it(data):
    vae = recurrent()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
    before = [p.detach().clone() for p in vae.parameters()]
    assert all(math.isfinite(svi.step(*data)) for _ in range(3))
    assert all((a != b).any() for a, b in zip(before, vae.parameters(), strict=True))


def test_contexts_enter_every_step():
    vae = recurrent(context_dim=1)
    x, context = torch.randn(3, 5, 3, **F64), torch.randn(3, 5, 1, **F64)
    assert bounds.ELBO().differentiable_loss(vae.model, vae.guide, x, None, context).isfinite()
    z, moved = torch.randn(3, 5, 2, **F64), context.clone()
    moved[:, 2] += 1.0
    for function in (vae.model_by_step, vae.guide_by_step):
        before, after = terms(function, z, x, None, context), terms(function, z, x, None, moved)
        assert {name for name in before if (before[name] != after[name]).any()} == before.keys() & {"z3", "x3"}
    assert vae.sample(2, 5, context).shape == (2, 3, 5, 3)
    assert vae.forecast(x[:, :3], 2, context=context, num_samples=7).shape == (7, 3, 2, 3)
    assert vae.reconstruct(x, None, context).shape == x.shape


def test_images_and_latents_without_a_memory():
    """Parts of other shapes, and a prior that was built without a context."""
    vae = RecurrentVAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(2, (1, 4, 4), context_dim=8),
        encoders.DiagonalNormal((1, 4, 4), 2, context_dim=8),
        ForwardGRU((1, 4, 4), 2, width=8),
    )
    x = torch.rand(3, 5, 1, 4, 4).round()
    mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
    estimate = pyrovae.log_marginal(vae.model, vae.guide, x, mask, num_samples=200, progress=False)
    by_step = pyrovae.log_marginal(
        vae.model_by_step, vae.guide_by_step, x, mask, method=ParticleFilter(16, 50), progress=False
    )
    error = (estimate.standard_error.square() + by_step.standard_error.square()).sqrt()
    assert ((estimate.value - by_step.value).abs() < 4.5 * error).all()
    assert vae.sample(0, 5).shape == (0, 5, 1, 4, 4)
    assert vae.forecast(x, 2, mask, num_samples=7).shape == (7, 3, 2, 1, 4, 4)


def test_models_of_sequences_have_the_same_verbs():
    for name in ("sample", "smooth", "forecast", "impute", "model_by_step", "guide_by_step"):
        assert all(callable(getattr(model, name)) for model in (RecurrentVAE, StateSpaceVAE, SequenceVAE))
    for name in ("forecast", "impute"):
        assert getattr(RecurrentVAE, name) is getattr(StateSpaceVAE, name) is getattr(SequenceVAE, name)


def test_it_is_saved_and_built_again(tmp_path, data):
    vae = recurrent()
    pyrovae.save(vae, tmp_path / "vae.safetensors")
    again = pyrovae.load(tmp_path / "vae.safetensors")
    z = torch.randn(3, 4, 2, **F64)
    before, after = (terms(one.model_by_step, z, *data) for one in (vae, again))
    assert all(torch.equal(before[name], after[name]) for name in before)


PARTS = {
    "prior": lambda: priors.DiagonalNormal(2, context_dim=8),
    "likelihood": lambda: likelihoods.Normal(2, 3, context_dim=8),
    "encoder": lambda: encoders.DiagonalNormal(3, 2, context_dim=8),
    "recurrence": lambda: ForwardGRU(3, 2, width=8),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrence": lambda: ForwardGRU(3, 4, width=8)}, "agree on latent_dim.*recurrence has 4"),
        ({"recurrence": lambda: ForwardGRU(5, 2, width=8)}, r"agree on x_shape.*recurrence has \(5,\)"),
        ({"recurrence": lambda: ForwardGRU(3, 2, width=9)}, "context_dim=8, but the memory of ForwardGRU has 9 units"),
        ({"recurrence": lambda: nn.Linear(3, 2)}, "Linear does not state the width of its memory"),
        ({"prior": lambda: priors.DiagonalNormal(2, context_dim=9)}, "agree on context_dim"),
        (
            {
                "prior": lambda: priors.StandardNormal(2),
                "likelihood": lambda: likelihoods.Normal(2, 3),
                "encoder": lambda: encoders.DiagonalNormal(3, 2),
            },
            "context_dim=0, but the memory of ForwardGRU has 8 units",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecurrentVAE(**{name: build() for name, build in (PARTS | changes).items()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.zeros(2, 4, 3), torch.ones(2, 3)), r"mask has shape \(2, 3\).*\(2, 4\) steps"),
        (lambda vae: vae.encode(torch.zeros(2, 4, 3), torch.tensor([[1] * 4, [0] * 4])), "no observed step in 1 of 2"),
        (lambda vae: vae.model(torch.zeros(2, 4, 3), None, torch.zeros(2, 4, 1)), "has 1 numbers.*built for 0"),
        (lambda vae: vae.guide(torch.zeros(2, 4, 5)), r"\(\.\.\., 3\), got \(2, 1, 5\)"),
        (lambda vae: vae.sample(2, 0), "num_steps must be at least 1, got 0"),
        (lambda vae: vae.forecast(torch.zeros(2, 4, 3), 1, context=torch.zeros(2, 4, 1)), "context must have 5 steps"),
        (lambda vae: vae.recurrence(torch.zeros(2, 8), torch.zeros(2, 4, 5), None, torch.zeros(2, 4, 2)), "ForwardGRU"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(recurrent().float())


def test_a_context_that_is_missing_is_named():
    with pytest.raises(ValueError, match="has 0 numbers, but the parts were built for 1, after 8 of the memory"):
        recurrent(context_dim=1).sample(3, 4)
