"""Training and scoring by compiled graphs give the eager results; and the compiler itself does."""

import gc
import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from bound_cases import BOUNDS
from cases import SMALL
from compiling import SGD, Pair, doubles, fresh, linear, pair_of, same, same_compiled
from linear_gaussian import diagonal_vae
from pyro import distributions as dist
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyrovae import VAE, bounds, encoders, estimators, fit, likelihoods, log_marginal, priors
from pyrovae import compile as compiled
from pyrovae.compilation import cache
from pyrovae.compilation.graph import CompiledGraph, compile_graph
from pyrovae.nn import MLP, ConvNet, DeconvNet

fit, log_marginal = partial(fit, progress=False), partial(log_marginal, progress=False)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (None, {"clip_norm": 0.5}),
        (lambda: bounds.ELBO(beta=bounds.Linear(6)), {"clip_norm": 0.5, "validation": doubles(6, 3)}),
        (lambda: bounds.IWAE(3), {}),
    ],
    ids=["None", "ELBO", "IWAE"],
)
def test_fit_compiled_is_the_same(loss, options, traced, at_once):
    found = []
    for compile in (False, True):
        vae = fresh(lambda: diagonal_vae(2, 3))
        history = fit(
            vae.model,
            vae.guide,
            doubles(22, 3),
            loss=loss and loss(),
            epochs=3,
            batch_size=8,
            optimizer=SGD,
            compile=compile,
            **options,
        )
        records = [[t for name, t in record.items() if name != "seconds"] for record in history.records]
        found.append(
            [torch.tensor(records, dtype=torch.float64), *(p.detach() for p in vae.parameters()), torch.get_rng_state()]
        )
    same(found[1], found[0])
    assert traced.made == 2  # the last batch of an epoch is smaller


def with_dropout() -> Pair:
    """Float32, with layer norm and dropout."""

    def network(in_shape: int | tuple[int, ...], out_shape: int | tuple[int, ...]) -> nn.Module:
        return nn.Sequential(MLP(in_shape, 8, ()), nn.LayerNorm(8), nn.Softplus(), nn.Dropout(0.2), MLP(8, out_shape))

    return pair_of(VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, network), encoders.DiagonalNormal(3, 2)))


def fitted(
    loss: Any, epochs: int, make: Callable[[], Pair] = with_dropout, x: Tensor | None = None, **options: Any
) -> list:
    pair = fresh(make)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(7)) if x is None else x
    options = {"batch_size": 16, "clip_norm": 5.0, "validation": x[:9] + 0.1} | options  # the last batch is smaller
    history = fit(pair.model, pair.guide, x, loss=loss, epochs=epochs, **options)
    records = [[t for name, t in record.items() if name != "seconds"] for record in history.records]
    left = [t for module in pair.modules for t in module.state_dict().values()]
    return [torch.tensor(records, dtype=torch.float64), *left, torch.get_rng_state()]


PYRO = {
    "Trace": Trace_ELBO,
    "Trace-particles": partial(Trace_ELBO, 3),
    "Trace-vectorized": partial(Trace_ELBO, 3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
}
LOSSES = {**{bound.name: partial(bound.build, 4) for bound in BOUNDS}, **PYRO}


@pytest.mark.parametrize("name", LOSSES)
def test_fit_by_default_resumed_or_not_is_the_same_to_the_bit(name, tmp_path):
    make = LOSSES[name]
    expected = fitted(make(), 4, compile=False)
    same(fitted(make(), 4), expected)
    fitted(make(), 2, checkpoint=tmp_path / "state")
    same(fitted(make(), 4, checkpoint=tmp_path / "state", resume=True), expected)


class Transposed(nn.Module):
    """A linear map whose weight has a gradient with other strides than its own."""

    def __init__(self, in_shape: Any, out_shape: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*out_shape, in_shape))

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, self.weight.t().contiguous().t() * 1.0)


@pytest.mark.parametrize("compile", ["auto", pytest.param(True, marks=pytest.mark.slow)])
def test_fused_optimizers_take_gradients_of_other_strides(compile):
    def make() -> Pair:
        likelihood = likelihoods.Bernoulli(2, 3, Transposed)
        return pair_of(VAE(priors.StandardNormal(2), likelihood, encoders.DiagonalNormal(3, 2)))

    pair = fresh(make)
    loss = bounds.ELBO().terms(pair.model, pair.guide, torch.zeros(5, 3)).loss
    weight = pair.modules[0].likelihood.network.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.stride() != weight.stride()
    options = {"optimizer": partial(torch.optim.Adam, lr=0.1, fused=True), "validation": None}
    x = (torch.randn(50, 3, generator=torch.Generator().manual_seed(7)) > 0).float()
    found, expected = (fitted(None, 5, make, x, compile=c, **options) for c in (compile, False))
    same(found[1:], expected[1:], exact=compile == "auto")


def test_fit_by_default_plays_steps_back(monkeypatch):
    calls = []
    original = CompiledGraph.__call__
    monkeypatch.setattr(CompiledGraph, "__call__", lambda *args: calls.append(1) or original(*args))
    fitted(None, 18)
    # Of 18 epochs of three batches and a smaller one. The first size runs three times, and a fourth to be traced; the
    # other one 16 times, and a seventeenth.
    assert len(calls) == (3 * 18 - 4) + (18 - 17)


class Warming(nn.Module):
    """A model with a number that is not to be frozen."""

    def __init__(self):
        super().__init__()
        self.share, self.loc = 1.0, nn.Parameter(torch.zeros(3))

    def model(self, x: Tensor) -> None:
        pyro.module("warming", self)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=self.share):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)


def train_warming(compile: Any, on_step: str | None) -> tuple[list[float], Tensor]:
    """Trains for 40 steps, of which each changes the model by code of the user's; returns losses and weights."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Warming()

    def change(*args: Any, **kwargs: Any) -> Any:
        model.share = 1.0 if count.pop() % 9 else 0.5  # two values have two graphs
        return args[0] if on_step == "transform" else None

    class Adam(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            change()

    class Listener:
        def __call__(self, history: Any) -> None:
            pass

        def after_step(self) -> None:
            change()

    def with_hook(p: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(p, lr=0.1)
        optimizer.register_step_post_hook(change)
        return optimizer

    count = list(range(100))
    options = {
        None: {"optimizer": partial(torch.optim.SGD, lr=0.1)},
        "transform": {"transform": change},
        "optimizer": {"optimizer": lambda p: Adam(p, lr=0.1)},
        "hook": {"optimizer": with_hook},
        "listener": {"callbacks": [Listener()]},
    }[on_step]
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(7))
    history = fit(model.model, lambda x: None, x, epochs=1, batch_size=2, compile=compile, **options)
    return history["loss"], model.loc.detach()


@pytest.mark.parametrize("on_step", ["transform", "optimizer", "hook", "listener"])
def test_code_of_a_user_between_steps_may_change_anything(on_step):
    expected, found = (train_warming(compile, on_step) for compile in (False, "auto"))
    assert found[0] == expected[0] and found[1].equal(expected[1])


@pytest.mark.parametrize("on_step", [None, "listener"])
def test_guards_are_checked_where_code_of_a_user_may_have_run(on_step, monkeypatch):
    calls = []
    original = CompiledGraph.failure_reason
    monkeypatch.setattr(CompiledGraph, "failure_reason", lambda *args: calls.append(1) or original(*args))
    train_warming("auto", on_step)
    # The graph is made in the fourth of 40 steps, its first call. Guards are checked after its calls 1, 2, 4, 8, 16 and
    # 32, which ran the model too, and after each sixteenth.
    assert len(calls) == 6 if on_step is None else len(calls) >= 36


def test_the_smaller_last_batch_runs_eagerly_at_first(traced):
    vae = fresh(lambda: diagonal_vae(2, 3))
    fit(vae.model, vae.guide, doubles(22, 3), epochs=3, batch_size=8, compile=True)
    assert traced.made == 1


def test_training_is_resumed_to_the_bit(tmp_path, traced):
    def run(epochs: int, name: str, resume: bool = False) -> dict[str, Tensor]:
        vae = fresh(lambda: diagonal_vae(2, 3))
        loss = bounds.ELBO(beta=bounds.Linear(steps=6))
        fit(
            vae.model,
            vae.guide,
            doubles(22, 3),
            loss=loss,
            epochs=epochs,
            batch_size=8,
            checkpoint=tmp_path / name,
            resume=resume,
            compile=True,
        )
        return vae.state_dict()

    whole = run(4, "whole")
    run(2, "parts")
    resumed = run(4, "parts", resume=True)
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())


ESTIMATORS = {
    "ImportanceSampling": estimators.ImportanceSampling(50),
    "smoothed": estimators.ImportanceSampling(50, smoothed=True),
    "Prior": estimators.ImportanceSampling(50, estimators.Prior()),
    "Widened": estimators.ImportanceSampling(50, estimators.Widened(1.3)),
    "Mixed": estimators.ImportanceSampling(50, estimators.Mixed()),
    "Refined": estimators.ImportanceSampling(50, estimators.Refined(3, 0.05)),
    "Laplace": estimators.ImportanceSampling(50, estimators.Laplace(num_steps=3, scale=1.1)),
    "UntilTrusted": estimators.UntilTrusted(
        [estimators.ImportanceSampling(400), estimators.ImportanceSampling(400, estimators.Laplace(scale=1.1))]
    ),
    "CUBO": estimators.CUBO(50),
    "AnnealedImportanceSampling": estimators.AnnealedImportanceSampling(4, 6),
    "AnnealedImportanceSampling-guide": estimators.AnnealedImportanceSampling(4, 6, start=estimators.Guide()),
    "SequentialMonteCarlo": estimators.SequentialMonteCarlo(2, 8),
    "Quadrature": estimators.Quadrature(400),
}


def same_estimates(
    make: Callable[[], Pair],
    method: estimators.Estimator,
    *args: Tensor,
    how: Any = True,
    exact: bool = True,
    **kwargs: Any,
) -> None:
    found = []
    for compile in (False, how):
        pair = fresh(make)
        pyro.set_rng_seed(1)
        e = log_marginal(pair.model, pair.guide, *args, method=method, compile=compile, **kwargs)
        found.append([e.value, e.standard_error, *e.diagnostics.values(), torch.get_rng_state()])
    # A decision, such as to accept a move, depends on rounding with a probability of the size of the rounding.
    tolerance = 0.0 if exact else 1e-6
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("method", ESTIMATORS.values(), ids=ESTIMATORS)
def test_every_estimate_compiled_is_the_same(method, traced):
    same_estimates(lambda: pair_of(diagonal_vae(2, 3)), method, doubles(4, 3))
    assert traced.made
    assert traced.runs > traced.made


@pytest.mark.parametrize("method", ESTIMATORS.values(), ids=ESTIMATORS)
def test_every_estimate_by_default_is_the_same_to_the_bit(method):
    def make() -> Pair:
        return pair_of(VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2)))

    same_estimates(make, method, torch.randn(5, 3), how="auto", max_memory=3e5)


def test_moves_of_an_estimate_are_played_back(monkeypatch):
    made = []
    monkeypatch.setattr(cache, "compile_graph", lambda *args: made.append(args) or compile_graph(*args))
    pair = fresh(lambda: pair_of(diagonal_vae(2, 3)))
    log_marginal(pair.model, pair.guide, doubles(4, 3), method=estimators.AnnealedImportanceSampling(4, 30))
    assert made


def test_every_estimator_is_compared():
    concrete = {
        cls for cls in vars(estimators).values() if isinstance(cls, type) and issubclass(cls, estimators.Estimator)
    }
    never_traced = {estimators.Enumeration, estimators.ParticleFilter}
    met = {type(method) for method in ESTIMATORS.values()} | never_traced
    assert met == {cls for cls in concrete if not inspect.isabstract(cls)}


def discrete() -> Pair:
    """Two switches a datum, by hand."""
    decoder, encoder = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.3)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return Pair(model, guide, [decoder, encoder])


@pytest.mark.parametrize("method", [estimators.Enumeration(), estimators.ImportanceSampling(50)], ids=repr)
def test_estimates_over_discrete_latents_compiled_are_the_same(method, traced):
    same_estimates(discrete, method, doubles(4, 3))
    assert traced.made


def test_estimates_in_chunks_with_a_context_compiled_are_the_same(traced, at_once):
    def make() -> Pair:
        likelihood = likelihoods.Normal(2, 4, SMALL, context_dim=3)
        return pair_of(
            VAE(priors.StandardNormal(2), likelihood, encoders.DiagonalNormal(4, 2, SMALL, context_dim=3)).double()
        )

    same_estimates(make, estimators.ImportanceSampling(70), doubles(7, 4), doubles(7, 3), max_memory=5e3)
    assert traced.runs > 2 * traced.made > 2


def test_estimates_see_new_weights_and_settings(traced):
    held, x = [1.0], doubles(5, 3)
    pair = fresh(lambda: linear(lambda: held[0]))

    def estimate(compile: bool) -> Tensor:
        pyro.set_rng_seed(1)
        return log_marginal(pair.model, pair.guide, x, num_samples=20, compile=compile).value

    for change in (lambda: None, lambda: held.__setitem__(0, 2.0), lambda: pair.modules[0].weight.data.mul_(2)):
        change()
        same([estimate(True) for _ in range(3)], [estimate(False)] * 3)
    assert traced.made == 2


def test_fit_by_the_compiler_is_the_same():
    found = []
    for compile in (False, True):
        vae = fresh(lambda: diagonal_vae(2, 3))
        loss = bounds.ELBO(beta=bounds.Linear(4))
        history = fit(
            vae.model, vae.guide, doubles(22, 3), loss=loss, epochs=3, batch_size=8, optimizer=SGD, compile=compile
        )
        found.append([torch.tensor(history["loss"]), *(p.detach() for p in vae.parameters()), torch.get_rng_state()])
    same(found[1], found[0], exact=False)


def test_estimates_by_the_compiler_are_the_same():
    same_estimates(lambda: pair_of(diagonal_vae(2, 3)), estimators.ImportanceSampling(50), doubles(4, 3), exact=False)


def test_a_bound_by_the_compiler_is_the_same():
    same_compiled(lambda: bounds.IWAE(4), lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3), steps=9, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ESTIMATORS.values(), ids=ESTIMATORS)
def test_every_estimate_by_the_compiler_is_the_same(method):
    same_estimates(lambda: pair_of(diagonal_vae(2, 3)), method, doubles(4, 3), exact=False)


@pytest.mark.slow
def test_a_unit_at_a_kink_is_no_error_of_a_graph():
    # Eager and compiled convolutions add in different orders. Of some 2 million ReLUs a step, some have an input within
    # rounding of zero, where the gradients of that unit differ by the whole contribution of a datum.
    shape = (1, 28, 28)
    likelihood = likelihoods.Bernoulli(20, shape, DeconvNet)
    vae = VAE(priors.StandardNormal(20), likelihood, encoders.DiagonalNormal(shape, 20, ConvNet))
    x, loss = torch.rand(128, *shape).bernoulli(), compiled(Trace_ELBO())
    for _ in range(100):
        loss.loss_and_grads(vae.model, vae.guide, x)
        for entry in loss.graphs._entries.values():
            entry.graphs[0].calls = 1  # the next call is compared with the ELBO itself


@pytest.mark.parametrize("loss", [lambda: None, lambda: bounds.IWAE(num_particles=2)])
def test_a_vae_that_was_trained_is_let_go(loss):
    pyro.clear_param_store()
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, 3), encoders.DiagonalNormal(3, 2))
    x = torch.rand(80, 3).round()
    fit(vae.model, vae.guide, x, loss=loss(), epochs=3, batch_size=10)  # traced after three steps
    network = weakref.ref(vae.encoder.network)
    del vae
    pyro.clear_param_store()
    gc.collect()
    assert network() is None


def test_a_model_that_seeds_torch_itself_has_the_noise_of_an_eager_run(capsys):
    def make():
        vae = diagonal_vae(2, 3)

        def model(x):
            with torch.random.fork_rng():
                torch.manual_seed(3)
                projection = torch.randn(3).to(x)
            return vae.model(x + projection)

        return Pair(model, vae.guide, [vae])

    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(7)).double()
    found = [fitted(None, 4, make, x, compile=compile, progress=True) for compile in ("auto", False)]
    assert "is not compiled, and runs eagerly" in capsys.readouterr().err
    same(*found, exact=True)
