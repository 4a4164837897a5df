"""Particle filters: bounds and scores of models that draw their latents step by step."""

import gc
import itertools
import math
import weakref
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine import runtime
from torch import Tensor, nn

import pyrovae
from pyrovae import bounds
from pyrovae.bounds import FIVO, IWAE, multinomial, stratified, systematic
from pyrovae.cli import main
from pyrovae.estimators import ImportanceSampling, ParticleFilter, Prior, UntilTrusted, log_predictive
from pyrovae.inference.filtering import check_followed, run_filter
from pyrovae.inference.structure import inspect
from pyrovae.inference.weights import inspect_samples

A = torch.tensor([[0.8, 0.3], [-0.2, 0.7]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, 1.0]], dtype=torch.float64)
Q, R = 0.7, 0.6  # standard deviations of the steps and of the observations
STEPS = 5


def series(n: int = 4, steps: int = STEPS) -> Tensor:
    z, rows = torch.zeros(n, 2, dtype=torch.float64), []
    for _ in range(steps):
        z = z @ A.T + Q * torch.randn_like(z)
        rows.append(z @ C.T + R * torch.randn(n, 3, dtype=torch.float64))
    return torch.stack(rows, dim=1)


def model(x: Tensor, mask: Tensor | None = None) -> None:
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x), 2, dtype=torch.float64)
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z{t}", dist.Normal(z @ A.T, Q).to_event(1))
                pyro.sample(f"x{t}", dist.Normal(z @ C.T, R).to_event(1), obs=x[:, t])


def guide(x: Tensor, mask: Tensor | None = None, gain: Tensor | float = 0.4) -> None:
    """A proposal that looks at the state before and at the data, and is wider than the posterior."""
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x), 2, dtype=torch.float64)
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=mask[:, t]):
                loc = (1 - gain) * (z @ A.T) + gain * x[:, t, [0, 2]]
                z = pyro.sample(f"z{t}", dist.Normal(loc, 0.8).to_event(1))


def kalman(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Returns log p(x) of the linear-Gaussian model."""
    mean, covariance, total = torch.zeros(len(x), 2).double(), torch.zeros(2, 2).double(), []
    for t in range(x.shape[1]):
        mean, covariance = mean @ A.T, A @ covariance @ A.T + Q**2 * torch.eye(2)
        noise = C @ covariance @ C.T + R**2 * torch.eye(3)
        total.append(torch.distributions.MultivariateNormal(mean @ C.T, noise).log_prob(x[:, t]))
        gain = covariance @ C.T @ torch.linalg.inv(noise)
        mean, covariance = mean + (x[:, t] - mean @ C.T) @ gain.T, covariance - gain @ C @ covariance
    steps = torch.stack(total, dim=1)
    return steps.sum(1) if lengths is None else (steps * (torch.arange(x.shape[1]) < lengths.unsqueeze(1))).sum(1)


def filtered(model, guide, *args, runs: int = 1000, particles: int = 8, threshold: float = 1.0, by=systematic):
    structure = inspect(model, guide, *args)
    with torch.no_grad():
        return run_filter(model, guide, structure, particles, threshold, by, args, {}, num_runs=runs).log_z


def assert_unbiased(log_z: Tensor, expected: Tensor) -> None:
    """The mean of exp(log_z) over the runs is exp(expected), to 4.5 standard errors."""
    relative = (log_z - expected).exp()
    error = relative.std(0) / math.sqrt(len(relative))
    assert ((relative.mean(0) - 1).abs() < 4.5 * error).all(), (relative.mean(0), error)


@pytest.mark.parametrize("by", [multinomial, stratified, systematic])
def test_the_number_of_offspring_is_in_proportion_to_the_weight(by):
    weights = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64).unsqueeze(1).expand(-1, 20_000)
    counts = torch.stack([(by(weights) == i).sum(0) for i in range(4)]).double()
    expected = 4 * weights[:, 0]
    error = counts.std(1) / math.sqrt(counts.shape[1])
    assert ((counts.mean(1) - expected).abs() <= 4.5 * error).all()
    if by is systematic:
        assert ((counts - expected.unsqueeze(1)).abs() < 1).all()
    assert counts[1].max() == 0


@pytest.mark.parametrize("by", [multinomial, stratified, systematic])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_estimate_is_unbiased(by, threshold):
    x = series()
    assert_unbiased(filtered(model, guide, x, threshold=threshold, by=by), kalman(x))


def test_the_bound_rises_with_particles_and_stays_below():
    x = series(n=1).expand(400, -1, -1)
    values, truth = [], kalman(x[:1]).item()
    for particles in (2, 8, 32):
        log_z = filtered(model, guide, x, runs=1, particles=particles)[0]
        error = log_z.std().item() / math.sqrt(log_z.numel())
        values.append((log_z.mean().item(), error))
        assert log_z.mean().item() < truth + 4.5 * error
    for (low, low_error), (high, high_error) in itertools.pairwise(values):
        assert high - low > 4.5 * math.hypot(low_error, high_error)


def test_resampling_helps_on_long_series():
    x = series(n=1, steps=40).expand(100, -1, -1)
    with_resampling, without = (filtered(model, guide, x, runs=1, particles=16, threshold=t)[0] for t in (0.5, 0.0))
    error = math.hypot(with_resampling.std().item(), without.std().item()) / 10
    assert with_resampling.mean() - without.mean() > 4.5 * error


def test_without_resampling_it_is_the_importance_weighted_bound():
    x, gain = series(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found = []
    for bound in (FIVO(6, threshold=0.0), IWAE(6)):
        bound.loss(model, partial(guide, gain=gain), x)  # looks at the pair
        pyro.set_rng_seed(3)
        terms = bound.terms(model, partial(guide, gain=gain), x)
        (gradient,) = torch.autograd.grad(terms.loss, gain)
        found.append((terms.loss.detach(), gradient, terms.reconstruction, torch.stack(list(terms.kl.values()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_masked_steps_count_for_nothing():
    x, lengths = series(), torch.tensor([5, 3, 1, 4])
    mask = torch.arange(STEPS) < lengths.unsqueeze(1)
    noise = torch.where(mask.unsqueeze(-1), x, 100 * torch.randn_like(x))
    assert_unbiased(filtered(model, guide, noise, mask), kalman(x, lengths))


def test_each_datum_has_particles_of_its_own():
    x = series()
    apart = torch.stack([kalman(x[i : i + 1])[0] for i in range(len(x))])
    log_z = filtered(model, guide, x, runs=20, particles=300)
    assert (log_z.mean(0) - apart).abs().max() < 0.2  # data differ by nats
    assert (apart.max() - apart.min()) > 0.5


def test_a_series_without_a_plate_is_filtered():
    x = series(n=1)[0]

    def alone(x):
        z = torch.zeros(2, dtype=torch.float64)
        for t in range(len(x)):
            z = pyro.sample(f"z{t}", dist.Normal(z @ A.T, Q).to_event(1))
            pyro.sample(f"x{t}", dist.Normal(z @ C.T, R).to_event(1), obs=x[t])

    def proposal(x):
        for t in range(len(x)):
            pyro.sample(f"z{t}", dist.Normal(0.7 * x[t, [0, 2]], 0.8).to_event(1))

    assert_unbiased(filtered(alone, proposal, x), kalman(x.unsqueeze(0)))


def test_plates_inside_of_the_data_are_filtered():
    x = series(n=6)  # two series a datum
    pairs = x.view(3, 2, STEPS, 3)

    def both(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("series", 2, dim=-2):
            z = torch.zeros(2, len(x), 2, dtype=torch.float64)
            for t in range(STEPS):
                z = pyro.sample(f"z{t}", dist.Normal(z @ A.T, Q).to_event(1))
                pyro.sample(f"x{t}", dist.Normal(z @ C.T, R).to_event(1), obs=x[:, :, t].transpose(0, 1))

    def proposal(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("series", 2, dim=-2):
            z = torch.zeros(2, len(x), 2, dtype=torch.float64)
            for t in range(STEPS):
                loc = 0.6 * (z @ A.T) + 0.4 * x[:, :, t, [0, 2]].transpose(0, 1)
                z = pyro.sample(f"z{t}", dist.Normal(loc, 0.8).to_event(1))

    assert_unbiased(filtered(both, proposal, pairs, runs=4000), kalman(x).view(3, 2).sum(1))


CHAIN = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 1.5], dtype=torch.float64)


def switching(x: Tensor, means: Tensor = MEANS) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x), dtype=torch.long)
        for t in range(x.shape[1]):
            z = pyro.sample(f"z{t}", dist.Categorical(CHAIN[z]))
            pyro.sample(f"x{t}", dist.Normal(means[z], 1.0), obs=x[:, t])


def switching_guide(x: Tensor, slope: Tensor | float = 0.8) -> None:
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            logits = torch.stack([torch.zeros_like(x[:, t]), slope * x[:, t]], dim=-1)
            pyro.sample(f"z{t}", dist.Categorical(logits=logits))


def test_discrete_states_agree_with_enumeration():
    x = torch.randn(3, 4, dtype=torch.float64)
    paths = []
    for path in itertools.product(range(2), repeat=4):
        total, before = torch.zeros(3, dtype=torch.float64), 0
        for t, state in enumerate(path):
            total = total + CHAIN[before, state].log() + dist.Normal(MEANS[state], 1.0).log_prob(x[:, t])
            before = state
        paths.append(total)
    assert_unbiased(filtered(switching, switching_guide, x), torch.stack(paths).logsumexp(0))


def exact_bound(x: Tensor, means: Tensor, slope: Tensor) -> Tensor:
    """Returns E log p-hat of two particles over two steps with resampling, by enumeration, apart from the library."""
    x = x[0]

    def terms(t: int, before: int, state: int) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(torch.stack([torch.zeros_like(x[t]), slope * x[t]]), 0)[state]
        log_p = CHAIN[before, state].log() + dist.Normal(means[state], 1.0).log_prob(x[t])
        return log_q, log_p - log_q

    total = torch.zeros((), dtype=torch.float64)
    for first in itertools.product(range(2), repeat=2):
        q1, w1 = zip(*(terms(0, 0, z) for z in first), strict=True)
        w1 = torch.stack(w1)
        for ancestors in itertools.product(range(2), repeat=2):
            log_a = w1.log_softmax(0)[list(ancestors)].sum()
            for second in itertools.product(range(2), repeat=2):
                pairs = zip(ancestors, second, strict=True)
                q2, w2 = zip(*(terms(1, first[a], z) for a, z in pairs), strict=True)
                log_z = w1.logsumexp(0) + torch.stack(w2).logsumexp(0) - 2 * math.log(2)
                total = total + (sum(q1) + log_a + sum(q2)).exp() * log_z
    return total


def test_the_gradient_with_that_of_resampling_is_that_of_the_expected_bound():
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    n, found = 4000, []
    means = MEANS.clone().requires_grad_()
    slope = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact_bound(x, means, slope), [means, slope])])
    bound = FIVO(2, 1.0, multinomial, resampling_gradient=True)
    for _ in range(30):
        batch = x.expand(n // 30, -1)
        loss = bound.differentiable_loss(partial(switching, means=means), partial(switching_guide, slope=slope), batch)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(-loss / len(batch), [means, slope])]))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.2 * expected.abs().max()).all()


def test_the_default_gradient_leaves_out_that_of_resampling():
    x = series(n=1).expand(2000, -1, -1)
    gain = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    own = partial(guide, gain=gain)
    (plain,) = torch.autograd.grad(FIVO(4, 1.0, multinomial).differentiable_loss(model, own, x), gain)
    unbiased = FIVO(4, 1.0, multinomial, resampling_gradient=True)
    (full,) = torch.autograd.grad(unbiased.differentiable_loss(model, own, x), gain)
    assert plain.isfinite() and full.isfinite() and (plain - full).abs() > 1e-6


def test_discrete_latents_need_the_gradient_of_resampling():
    with pytest.raises(ValueError, match=r"no rsample.*resampling_gradient=True"):
        FIVO(4).differentiable_loss(switching, switching_guide, torch.randn(3, 4, dtype=torch.float64))


class Recurrent(nn.Module):
    """A model whose state is a recurrence over all latents, and that keeps them in a list; `fault` breaks that."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        self.cell, self.loc = nn.GRUCell(2, 4).double(), nn.Linear(4, 2).double()

    def model(self, x: Tensor) -> None:
        pyro.module("recurrent", self)
        with pyro.plate("data", len(x)):
            h, z, values, kept = torch.zeros(4).double(), torch.zeros(2).double(), [], None
            buffer = torch.zeros(())
            for t in range(x.shape[1]):
                lead = torch.broadcast_shapes(z.shape[:-1], h.shape[:-1], (len(x),))
                flat = [s.expand(*lead, -1).reshape(-1, s.shape[-1]) for s in (z, h)]
                h = self.cell(*flat).reshape(*lead, 4)
                z = pyro.sample(f"z{t}", dist.Normal(self.loc(h), Q).to_event(1))
                values.append(z)
                if t == 0:
                    kept = z.detach().numpy().copy()
                    buffer = z.new_zeros(*z.shape[:-1], x.shape[1], 2)
                mean = torch.stack(values).mean(0)
                if self.fault == "numpy":
                    mean = mean + torch.from_numpy(kept)
                elif self.fault == "in place":
                    buffer[..., t, :] = z
                    mean = buffer.sum(-2)
                elif self.fault == "one particle":
                    mean = values[0].view(len(x), -1) if t else mean
                pyro.sample(f"x{t}", dist.Normal(mean @ C.T, R).to_event(1), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        pyro.module("recurrent", self)
        guide(x)


def test_what_a_model_remembers_follows_the_particles():
    vae, x = Recurrent(), series()
    values = [filtered(vae.model, vae.guide, x, runs=2000, threshold=t) for t in (0.0, 1.0)]
    relative = [(v - values[0].logsumexp(0) + math.log(2000)).exp() for v in values]
    error = torch.stack([r.std(0) for r in relative]).norm(dim=0) / math.sqrt(2000)
    assert ((relative[0].mean(0) - relative[1].mean(0)).abs() < 4.5 * error).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("numpy", r'site "x1" is another after particles were resampled.*shape \(num_particles'),
        ("in place", r"writes into a tensor of particles.*torch\.stack"),
    ],
)
def test_a_model_whose_particles_cannot_be_followed_is_refused(fault, message):
    vae, x = Recurrent(fault), series()
    for score in (
        lambda: FIVO(8, threshold=1.0).loss(vae.model, vae.guide, x),
        lambda: pyrovae.log_marginal(vae.model, vae.guide, x, method=ParticleFilter(4, 8), progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            score()
        assert not runtime._PYRO_STACK and not runtime._DIM_ALLOCATOR._stack


def one_at_a_time(function):
    """A pair with a view that has no place for particles in front of the data."""

    def run(x, mask=None, **kwargs):
        class Viewed(pyro.poutine.messenger.Messenger):
            def _pyro_post_sample(self, msg):
                if not msg["is_observed"]:
                    msg["value"] = msg["value"].view(len(x), -1)

        with Viewed():
            function(x, mask, **kwargs)

    return run


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_particles_of_a_model_that_takes_one_at_a_time_are_rows(threshold):
    x, mask = series(n=3), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]]).bool()
    pair = one_at_a_time(model), one_at_a_time(guide)
    structure = inspect_samples(*pair, x, mask)
    assert not structure.vectorized
    check_followed(*pair, structure, 5, (x, mask), {})
    with torch.no_grad():
        found = run_filter(*pair, structure, 8, threshold, systematic, (x, mask), {}, num_runs=1500).log_z
    at_once = filtered(model, guide, x, mask, runs=1500, threshold=threshold)
    relative = [(v - at_once.logsumexp(0) + math.log(1500)).exp() for v in (found, at_once)]
    error = torch.stack([r.std(0) for r in relative]).norm(dim=0) / math.sqrt(1500)
    assert ((relative[0].mean(0) - relative[1].mean(0)).abs() < 4.5 * error).all()
    assert_unbiased(found[:, :2], kalman(x, mask.sum(1))[:2])


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
def test_a_recurrence_of_torch_in_the_loop_is_filtered_and_trained():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.loc = nn.GRU(2, 4, batch_first=True).double(), nn.Linear(4, 2).double()
            self.flattens = False

        def model(self, x):
            pyro.module("memory", self)
            h = torch.zeros(1, len(x), 4).double()
            with pyro.plate("data", len(x)):
                for t in range(x.shape[1]):
                    z = pyro.sample(f"z{t}", dist.Normal(self.loc(h[0]), Q).to_event(1))
                    if self.flattens:
                        before = h.expand(1, *z.shape[:-1], 4).reshape(1, -1, 4)
                        h = self.memory(z.reshape(-1, 1, 2), before)[1].reshape(1, *z.shape[:-1], 4)
                    else:
                        _, h = self.memory(z.unsqueeze(1), h)
                    pyro.sample(f"x{t}", dist.Normal(z @ C.T, R).to_event(1), obs=x[:, t])

        def guide(self, x):
            pyro.module("memory", self)
            guide(x)

    torch.manual_seed(1)
    vae, x = Memory(), series(n=12)
    score = partial(pyrovae.log_marginal, method=ParticleFilter(16, 100), progress=False)
    found = score(vae.model, vae.guide, x, max_memory=2e6)
    vae.flattens = True
    other = score(vae.model, vae.guide, x)
    error = (found.standard_error.square() + other.standard_error.square()).sqrt()
    assert ((found.value - other.value).abs() < 5.5 * error).all()
    vae.flattens = False
    history = pyrovae.fit(vae.model, vae.guide, x, loss=FIVO(4), epochs=5, batch_size=6, progress=False)
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
def test_particles_are_no_rows_of_a_model_that_mixes_rows():
    def mixes(x, mask=None):
        one_at_a_time(model)(x + 0.01 * x.sum(0))  # a mean would be the same of repeated rows

    with pytest.raises(ValueError, match=r'"x0" depends on other rows. Particles are rows of repeated data'):
        FIVO(8).loss(mixes, one_at_a_time(guide), series())


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
def test_particles_of_data_along_another_dimension_are_no_rows():
    x = series().transpose(0, 1)
    pair = [lambda x, f=f: one_at_a_time(f)(x.transpose(0, 1)) for f in (model, guide)]
    with pytest.raises(ValueError, match=r"draw all particles at once.*does not hold one datum for each row"):
        FIVO(8).loss(*pair, x)

    def of_hundred(x, observed=True):
        with pyro.plate("data", 100, subsample=x):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)).view(len(x))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"draw all particles at once.*does not hold one datum for each row"):
        FIVO(8).loss(of_hundred, partial(of_hundred, observed=False), torch.ones(4))


def test_an_error_of_the_model_ends_both_and_restores_the_handlers():
    def fails(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z0", dist.Normal(torch.zeros(len(x), dtype=torch.float64), 1.0))
            pyro.sample("x0", dist.Normal(z, 1.0), obs=x[:, 0])
            if z.dim() > 1:
                raise RuntimeError("out of order")
            pyro.sample("z1", dist.Normal(z, 1.0))

    def proposal(x):
        with pyro.plate("data", len(x)):
            for name in ("z0", "z1"):
                pyro.sample(name, dist.Normal(torch.zeros(len(x), dtype=torch.float64), 1.0))

    x = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out of order"):
        filtered(fails, proposal, x)
    assert not runtime._PYRO_STACK and not runtime._DIM_ALLOCATOR._stack and torch.is_grad_enabled()


def test_a_model_without_steps_is_told_that_nothing_is_resampled():
    def at_the_end(x):
        with pyro.plate("data", len(x)):
            z = [pyro.sample(f"z{t}", dist.Normal(x.new_zeros(len(x)), 1.0)) for t in range(3)]
            pyro.sample("x", dist.Normal(torch.stack(z, -1), 1.0).to_event(1), obs=x)

    def proposal(x):
        with pyro.plate("data", len(x)):
            for t in range(3):
                pyro.sample(f"z{t}", dist.Normal(0.5 * x[:, t], 0.8))

    with pytest.warns(UserWarning, match="FIVO resamples nothing and is IWAE"):
        FIVO(4).loss(at_the_end, proposal, torch.randn(3, 3))


def test_a_subsampled_plate_scales_the_bound():
    x = series(n=12)

    def of_some(run):
        def function(x):
            with pyro.plate("data", len(x), subsample_size=4, dim=-1) as rows:
                z = torch.zeros(len(rows), 2, dtype=torch.float64)
                for t in range(STEPS):
                    loc = z @ A.T if run is model else 0.6 * (z @ A.T) + 0.4 * x[rows, t][:, [0, 2]]
                    z = pyro.sample(f"z{t}", dist.Normal(loc, Q if run is model else 0.8).to_event(1))
                    if run is model:
                        pyro.sample(f"x{t}", dist.Normal(z @ C.T, R).to_event(1), obs=x[rows, t])

        return function

    bound, pair = FIVO(64), (of_some(model), of_some(guide))
    values = torch.stack([bound.terms(*pair, x).bound for _ in range(30)])
    error = values.std() / math.sqrt(30)
    assert (values.mean() - kalman(x).sum()).abs() < 4.5 * error + 0.1 * 12  # below by less than 0.1 nats a datum


@pytest.mark.parametrize("compile", [False, "auto"])
def test_it_trains_a_guide(compile):
    pyro.clear_param_store()
    x = series(n=16)

    def learned(x):
        gain = pyro.param("gain", torch.tensor(0.0, dtype=torch.float64))
        guide(x, gain=gain)

    history = pyrovae.fit(
        model,
        learned,
        x,
        loss=FIVO(8),
        epochs=25,
        batch_size=16,
        optimizer=partial(torch.optim.Adam, lr=0.08),
        compile=compile,
        progress=False,
    )
    assert np.mean(history["bound"][-10:]) > history["bound"][0] + 0.1
    assert 0.1 < pyro.param("gain").item() < 1.0


def test_graphs_give_the_same_bits():
    x, found = series(n=6), []
    for compile in (False, "auto"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = Recurrent()
        history = pyrovae.fit(
            vae.model, vae.guide, x, loss=FIVO(4), epochs=5, batch_size=3, compile=compile, progress=False
        )
        found.append((history["loss"], [p.detach().clone() for p in vae.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_it_works_in_svi():
    pyro.clear_param_store()
    vae, x = Recurrent(), series()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), FIVO(4))
    losses = [svi.step(x) for _ in range(20)]
    assert np.mean(losses[-7:]) < np.mean(losses[:7])


@pytest.mark.parametrize("proposal", [None, Prior()], ids=["guide", "bootstrap"])
def test_the_particle_filter_covers_the_truth(proposal):
    x = series(n=24)
    method = ParticleFilter(num_samples=16, num_particles=50, proposal=proposal)
    estimate = pyrovae.log_marginal(
        model, None if proposal else guide, x, method=method, progress=False, max_memory=2e5
    )
    z = (estimate.value - kalman(x)) / estimate.standard_error
    # 24 t-values of 16 filters each: their mean square has mean 15 / 13 and a standard deviation of about 0.4.
    assert z.square().mean() < 15 / 13 + 4.5 * 0.4
    assert abs(z.mean()) < 4.5 * math.sqrt(15 / 13 / 24)
    assert estimate.trusted.any()
    assert (estimate.diagnostics["least ess"] > 1).all()
    assert "filters a datum" in str(estimate)


def time_first(x: Tensor) -> None:
    model(x.transpose(0, 1))


def guide_time_first(x: Tensor) -> None:
    guide(x.transpose(0, 1))


@pytest.mark.parametrize("method", [ParticleFilter(16, 200), ImportanceSampling(20_000), UntilTrusted()], ids=repr)
@pytest.mark.parametrize("steps", [5, 9])
def test_data_that_lie_along_the_second_dimension_are_not_cut_along_the_first(method, steps):
    x = series(n=7, steps=steps)  # the number of rows with which a pair is inspected first: both are 7
    found = pyrovae.log_marginal(
        time_first, guide_time_first, x.transpose(0, 1), method=method, progress=False, max_memory=2e5
    )
    assert found.value.shape == (7,)
    error = found.standard_error.clamp(min=1e-3)  # a t-value of 15 degrees of freedom: above 5.5 once in 33,000
    assert ((found.value - kalman(x)).abs() < 5.5 * error).all()


def test_steps_of_time_are_no_batches():
    def trainable(x):
        guide_time_first(x, pyro.param("gain", torch.tensor(0.4)))

    def guide_time_first(x, gain):
        guide(x.transpose(0, 1), gain=gain)

    x = series(n=7, steps=20).transpose(0, 1)
    for rows in (7, 4):
        with pytest.raises(ValueError, match=r'the plate "data" holds 7 data, and not one for each row'):
            pyrovae.fit(time_first, trainable, x, epochs=1, batch_size=rows, progress=False)
    history = pyrovae.fit(time_first, trainable, x, epochs=1, batch_size=20, progress=False)
    assert history["loss"][0] > -kalman(x.transpose(0, 1)).mean()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_narrow_proposal_is_not_trusted_outside_its_error(share):
    """The posterior of a step given the state before, with a share of its standard deviations."""
    precision = C.T @ C / R**2 + torch.eye(2, dtype=torch.float64) / Q**2
    gain, factor = torch.linalg.solve(precision, C.T / R**2), torch.linalg.cholesky(torch.linalg.inv(precision))

    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 2, dtype=torch.float64)
            for t in pyro.markov(range(x.shape[1])):
                loc = z @ A.T
                loc = loc + (x[:, t] - loc @ C.T) @ gain.T
                z = pyro.sample(f"z{t}", dist.MultivariateNormal(loc, scale_tril=share * factor))

    x = series(n=100, steps=12)
    estimate = pyrovae.log_marginal(model, narrow, x, method=ParticleFilter(), progress=False)
    z = ((estimate.value - kalman(x)) / estimate.standard_error)[estimate.trusted]
    # t-values of 32 filters; one of 200 is beyond 3.
    assert (z.abs() > 3).sum() <= 3
    assert len(z) > 50 if share == 1 else len(z) < 5


def test_log_densities_of_steps_are_those_of_the_kalman_filter():
    x = series(n=3, steps=6)
    found = log_predictive(model, guide, x, method=ParticleFilter(30, 200))
    steps = torch.stack([kalman(x[:, : t + 1]) for t in range(6)], dim=-1)
    expected = steps.diff(dim=-1, prepend=torch.zeros_like(steps[:, :1]))
    assert ((found.value - expected).abs() < 5 * found.standard_error).all()
    assert found.standard_error.max() < 0.2


def test_a_hopeless_proposal_is_not_trusted():
    x = series(n=3) + 8
    estimate = pyrovae.log_marginal(
        model, guide, x, method=ParticleFilter(20, 10, threshold=0.5, proposal=Prior()), progress=False
    )
    assert not estimate.trusted.any()
    assert "ParticleFilter(num_particles=100)" in estimate.remedy
    assert "ParticleFilter(num_samples=32)" in ParticleFilter(8).remedy(inspect(model, guide, x))


def test_a_step_that_no_particle_explains_has_no_density():
    def hard(x):
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z{t}", dist.Normal(x.new_zeros(len(x)), 1.0))
                pyro.factor(f"x{t}", torch.where((z - x[:, t]).abs() < 1, 0.0, -math.inf))

    x = torch.tensor([[0.0, 90.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = log_predictive(hard, None, x, method=ParticleFilter(10, 100, Prior()))
    inside = math.log(math.erf(1 / math.sqrt(2)))
    assert found.value[0, 1] == -math.inf
    alive = found.value[[0, 1, 1, 1], [0, 0, 1, 2]]
    assert ((alive - inside).abs() < 5 * found.standard_error[[0, 1, 1, 1], [0, 0, 1, 2]]).all()


def test_nothing_holds_the_tensors_of_a_run_that_has_ended():
    x, structure = series(), inspect(model, guide, series())
    gc.collect()
    gc.disable()
    try:
        run = run_filter(model, guide, structure, 8, 1.0, systematic, (x,), {})
        left = weakref.ref(run.guide["z0"]["value"])
        del run
        assert left() is None
    finally:
        gc.enable()


def test_a_run_that_was_trained_by_it_can_be_scored(tmp_path, capsys):
    run = str(tmp_path / "run")
    main(["train", "--loss", "FIVO", "--loss.num_particles", "2", "--epochs", "1", "--num-samples", "5", "--run", run])
    main(["evaluate", run, "--method", "ParticleFilter", "--method.num_samples", "4", "--method.num_particles", "3"])
    assert "--method ParticleFilter --method.num_samples 32" in capsys.readouterr().out


def test_particles_that_all_die_have_no_density():
    def hard(x):
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z{t}", dist.Normal(x.new_zeros(len(x)), 1.0))
                pyro.factor(f"x{t}", torch.where((z - x[:, t]).abs() < 1, 0.0, -math.inf))

    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 90.0, 0.0]], dtype=torch.float64)
    estimate = pyrovae.log_marginal(hard, None, x, method=ParticleFilter(8, 20, proposal=Prior()), progress=False)
    inside = 3 * math.log(math.erf(1 / math.sqrt(2)))
    assert abs(estimate.value[0] - inside) < 4.5 * estimate.standard_error[0]
    assert estimate.value[1] == -math.inf and not estimate.trusted[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold must be between 0 and 1, got 1.5"),
        ({"threshold": math.nan}, "threshold must be between 0 and 1, got nan"),
        ({"resampling": 3}, "resampling must be a function such as bounds.systematic, got 3"),
        ({"resampling_gradient": True}, "needs resampling=bounds.multinomial.*got 'systematic'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FIVO(4, **arguments)


def test_sites_that_differ_are_named():
    def other(x):
        with pyro.plate("data", len(x)):
            for t in range(STEPS - 1):
                pyro.sample(f"z{t}", dist.Normal(x[:, t, :2], 0.8).to_event(1))

    with pytest.raises(ValueError, match='misses the latent site "z4"'):
        bounds.FIVO(4).loss(model, other, series())
