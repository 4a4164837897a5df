"""Programs that others published: each trained, compiled, bounded, scored and diagnosed, against numbers of its own.

What a program is and its log p(x), by enumeration, quadrature or a recursion, is in programs.py. Sums over the sites of
a run, one draw after the other by Pyro's own handlers, are here.
"""

import math
import warnings
from contextlib import nullcontext

import pyro
import pytest
import torch
from helpers import FAILURE_RATE
from linear_gaussian import assert_unit_scores
from programs import PROGRAMS, Pair, Program, by_fit, by_svi, cevae, cevae_blind, lda, made, sparse_gamma, trained
from pyro import poutine
from pyro.contrib.cevae import CEVAE, TraceCausalEffect_ELBO
from pyro.infer import SVI
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrovae import History, bounds, diagnostics, estimators, fit, log_marginal, log_weights

HALF_THE_DIGITS = math.sqrt(torch.finfo(torch.float64).eps)  # what rounding may grow to over the steps of a run
LEFT_OUT = math.exp(-25) * 40_000  # Quadrature leaves out points 25 nats below the highest, of so many

PLATES = ("data", "batch", "z_minibatch", "documents", "rows")  # over the data, as the originals name them

every = pytest.mark.parametrize("program", [pytest.param(p, id=p.name) for p in PROGRAMS])


class Recorded:
    """A guide that keeps the latents of its runs."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self.runs: list[dict[str, Tensor]] = []

    def __call__(self, *args: Tensor) -> None:
        with poutine.trace() as tracer:
            self.pair.guide(*args)
        self.runs.append({name: site["value"].detach() for name, site in latents_of(tracer.trace).items()})

    def draws(self, num_samples: int) -> list[dict[str, Tensor]]:
        """Returns the latest draws, made in one run or one by one, each in the shapes of a run of its own."""
        with torch.random.fork_rng():
            alone = latents_of(poutine.trace(self.pair.guide).get_trace(*self.pair.data))
        shapes = {name: site["value"].shape for name, site in alone.items()}
        latest = self.runs[-1]
        if all(value.shape == shapes[name] for name, value in latest.items()):
            return self.runs[-num_samples:]
        return [{name: value[k].reshape(shapes[name]) for name, value in latest.items()} for k in range(num_samples)]


def latents_of(trace: poutine.Trace) -> dict[str, dict]:
    """Returns the latents of a guide's trace; not points, which follow from others, nor what it observes."""
    return {
        name: trace.nodes[name]
        for name in trace.stochastic_nodes
        if not isinstance(trace.nodes[name]["fn"], (_Subsample, pyro.distributions.Delta))
    }


def sides(pair: Pair, draw: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log p(z), log p(x | z) and log q(z) of each datum at a draw, a new one unless given, without scales."""
    fixed = None
    if draw is not None:
        fixed = poutine.trace(pair.guide).get_trace(*pair.data)
        for name in list(fixed.nodes):
            if name in draw:
                fixed.nodes[name]["value"] = draw[name]
            elif fixed.nodes[name]["type"] == "sample":
                fixed.remove_node(name)
    guide = pair.guide if fixed is None else poutine.replay(pair.guide, trace=fixed)
    q = poutine.trace(guide).get_trace(*pair.data)
    names = q.stochastic_nodes
    for name in q.observation_nodes:
        q.remove_node(name)
    p = poutine.trace(poutine.replay(pair.model, trace=q)).get_trace(*pair.data)
    size = len(pair.data[0])
    found = [torch.zeros(size, dtype=torch.float64) for _ in range(3)]
    for side, trace in ((0, p), (1, p), (2, q)):
        for site in trace.nodes.values():
            if (
                site["type"] != "sample"
                or isinstance(site["fn"], _Subsample)
                or (side < 2 and site["is_observed"] != side)
            ):
                continue
            if not stands_in_data(site):
                continue  # what all data share, and was given
            log_prob = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, 0.0)
            found[side] += log_prob.movedim(pair.dim, 0).reshape(size, -1).sum(-1)
    assert names, "the guide draws something"
    return tuple(found)


def given(pair: Pair) -> float:
    """Returns the log-probability of what all data share and was given."""
    q = poutine.trace(pair.guide).get_trace(*pair.data)
    p = poutine.trace(poutine.replay(pair.model, trace=q)).get_trace(*pair.data)
    sites = [site for site in map(p.nodes.get, p.observation_nodes) if not stands_in_data(site)]
    return sum(site["fn"].log_prob(site["value"]).sum().item() for site in sites)


def stands_in_data(site: dict) -> bool:
    return any(frame.name in PLATES for frame in site["cond_indep_stack"])


def summed(pair: Pair, draws: list[dict[str, Tensor]]) -> Tensor:
    """Returns log weights, ``(num_draws, batch)``, one draw after the other."""
    rows = []
    for draw in draws:
        prior, likelihood, log_q = sides(pair, draw)
        rows.append(prior + likelihood - log_q)
    return torch.stack(rows)


TRAINED: dict[str, Pair] = {}


@pytest.fixture
def scored(program) -> Pair:
    if program.name not in TRAINED:
        TRAINED[program.name] = trained(program)
    pyro.set_rng_seed(2)
    return TRAINED[program.name]


@pytest.fixture
def calm(program):
    """Ignores the warning of samples that are drawn one by one, for a program whose samples are."""
    with warnings.catch_warnings():
        if program.alone:
            warnings.filterwarnings("ignore", message="samples are drawn one by one")
        yield


@every
def test_fit_is_stock_svi(program: Program):
    wanted = by_svi(made(program))
    history = fitted(program, made(program))
    assert wanted[-1] != wanted[0], "it trains"
    assert history["loss"] == pytest.approx(wanted, rel=HALF_THE_DIGITS)


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, id=p.name, marks=[] if p.quick else [pytest.mark.slow]) for p in PROGRAMS],
)
def test_compiled_it_trains_alike(program: Program):
    wanted = fitted(program, made(program), 3)["loss"]
    pair = made(program)
    if program.compiles:
        found = fitted(program, pair, 3, compile=True)["loss"]
    else:
        with pytest.warns(UserWarning, match="not compiled"):
            found = by_fit(pair, 3, compile=True)["loss"]
    assert found == pytest.approx(wanted, rel=HALF_THE_DIGITS)


def fitted(program: Program, pair: Pair, *args, **options) -> History:
    with pytest.warns(UserWarning, match=program.warned) if program.warned else nullcontext():
        return by_fit(pair, *args, **options)


@every
@torch.no_grad()
def test_a_bound_is_a_function_of_sums_over_sites(program: Program, scored: Pair, calm):
    guide = Recorded(scored)
    if program.weighs:
        loss = bounds.IWAE(num_particles=5).loss(scored.model, guide, *scored.data)
        wanted = scale_of(scored) * (summed(scored, guide.draws(5)).logsumexp(0) - math.log(5)).sum().item()
    else:
        loss = bounds.ELBO(num_particles=5, closed_form=False).loss(scored.model, guide, *scored.data)
        prior, likelihood, log_q = (
            torch.stack([torch.stack(sides(scored, draw)) for draw in guide.draws(5)]).mean(0).sum(-1)
        )
        wanted = (likelihood + getattr(scored.module, "annealing", 1.0) * (prior - log_q)).item() + given(scored)
    assert -loss == pytest.approx(wanted, rel=HALF_THE_DIGITS)


def scale_of(pair: Pair) -> float:
    return getattr(pair.module, "scale", 1.0)


@every
@torch.no_grad()
def test_log_marginal_is_a_mean_of_such_sums(program: Program, scored: Pair, calm):
    guide = Recorded(scored)
    estimate = log_marginal(scored.model, guide, *scored.data, num_samples=25, progress=False)
    wanted = summed(scored, guide.draws(25)).logsumexp(0) - math.log(25)
    torch.testing.assert_close(estimate.value, wanted, rtol=HALF_THE_DIGITS, atol=HALF_THE_DIGITS)


@every
@torch.no_grad()
def test_log_marginal_is_the_truth(program: Program, scored: Pair, calm):
    truth = scored.truth(*scored.data)
    estimate = log_marginal(scored.model, scored.guide, *scored.data, num_samples=1000, progress=False)
    # Where the tail of the weights is heavy and few count, the standard error is not the error.
    fine = ~(estimate.khat > 0.5) | (estimate.ess > 500)
    assert fine.sum() > len(truth) / 2, "the guide is a fair proposal"
    assert_unit_scores(((estimate.value - truth) / estimate.standard_error)[fine], FAILURE_RATE)
    if program.exact is not None:
        exact = log_marginal(scored.model, None, *scored.data, method=program.exact, progress=False)
        assert (exact.value - truth).abs().max() < exact.standard_error.max() + LEFT_OUT


@every
@torch.no_grad()
def test_collapse_finds_the_divergence(program: Program, scored: Pair, calm):
    if program.uncollapsed:
        with pytest.raises(ValueError, match=program.uncollapsed):
            diagnostics.collapse(scored.model, scored.guide, *scored.data, progress=False)
        return
    found = diagnostics.collapse(scored.model, scored.guide, *scored.data, num_draws=50, progress=False)
    draws = [sides(scored) for _ in range(200)]
    kl = torch.stack([(log_q - prior).mean() for prior, _, log_q in draws])
    error = math.hypot(kl.std().item() / math.sqrt(len(kl)), found.kl_error)
    assert abs(found.kl.mean() - kl.mean()) < 4 * error  # fails by chance once in 16,000


@every
@torch.no_grad()
def test_gaps_are_those_of_sums_over_sites(program: Program, scored: Pair, calm):
    guide = Recorded(scored)
    method = program.exact or estimators.ImportanceSampling(500)
    found = diagnostics.gaps(
        scored.model, guide, *scored.data, method=method, num_samples=20, num_steps=5, progress=False
    )
    elbo = summed(scored, guide.draws(20)).mean(0)
    torch.testing.assert_close(found.test.elbo, elbo, rtol=HALF_THE_DIGITS, atol=HALF_THE_DIGITS)
    if program.exact is not None:
        precision = LEFT_OUT + found.test.estimate.standard_error.max()
        assert (found.test.inference - (scored.truth(*scored.data) - elbo)).abs().max() < precision


@pytest.mark.parametrize("program", [pytest.param(p, id=p.name) for p in PROGRAMS if p.refused])
def test_log_marginal_of_what_has_none_is_refused_by_name(program: Program):
    pair = made(program)
    with pytest.raises(ValueError, match=program.refused):
        log_marginal(pair.model, pair.guide, *pair.data, progress=False)


@pytest.mark.parametrize("make", [lda, sparse_gamma], ids=["LDA", "sparse gamma"])
def test_weights_of_data_that_share_latents_are_refused_by_name(make):
    pair = make()
    for score in (
        lambda: log_weights(pair.model, pair.guide, *pair.data, num_samples=2),
        lambda: bounds.IWAE(num_particles=2).loss(pair.model, pair.guide, *pair.data),
        lambda: diagnostics.collapse(pair.model, pair.guide, *pair.data, progress=False),
        lambda: diagnostics.gaps(pair.model, pair.guide, *pair.data, progress=False),
    ):
        with pytest.raises(ValueError, match='"(topic_weights|w_bottom)".*outside'):
            score()


@torch.no_grad()
def test_what_a_guide_observes_is_no_part_of_it():
    pair = cevae()
    values = []
    for guide in (pair.guide, cevae_blind(pair).guide):
        pyro.set_rng_seed(1)
        values.append(log_marginal(pair.model, guide, *pair.data, num_samples=50, progress=False).value)
    assert torch.equal(*values)


def test_a_network_that_another_keeps_from_training_is_found():
    """Pyro's CEVAE has a t_nn in its model and another in its guide, and registers both under one name."""
    pyro.set_rng_seed(0)
    cevae = CEVAE(feature_dim=3, latent_dim=1, hidden_dim=4, num_layers=2)
    data = torch.randn(20, 3), torch.rand(20).round(), torch.rand(20).round()
    before = {name: p.detach().clone() for name, p in cevae.named_parameters()}
    svi = SVI(cevae.model, cevae.guide, pyro.optim.Adam({"lr": 0.1}), TraceCausalEffect_ELBO())
    for _ in range(3):
        svi.step(*data)
    still = {name for name, p in cevae.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in still if name.startswith("model.t_nn")}, "under SVI the model's never moves"
    assert not any(name.startswith("guide.t_nn") for name in still)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="would not be trained, because Pyro does not know it.*t_nn"):
        fit(cevae.model, cevae.guide, data, loss=TraceCausalEffect_ELBO(), epochs=1, batch_size=20, progress=False)
