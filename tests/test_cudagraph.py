"""Compiled steps that are recorded as CUDA graphs give the results of eager ones.

Without a GPU, a stand-in tests when a step is recorded and when it is replayed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from bound_cases import BY_NAME
from compiling import Pair, fresh, normalised, pair_of, same, small_vae
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import bounds, estimators, fit, log_marginal
from pyrovae import compile as compiled
from pyrovae.compilation import graph, tracing
from pyrovae.compilation.api import Compiled
from pyrovae.compilation.cudagraph import CudaGraph, memory_for, without_repeats
from pyrovae.training import trainer as training

same = partial(same, exact=False)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
fit, log_marginal = partial(fit, progress=False), partial(log_marginal, progress=False)


class StandIn:
    """Calls the recorded function again, from and into the same memory."""

    def __init__(self, function: Callable, inputs: list[Tensor], kept: list[Tensor], fingerprint: list):
        self.function, self.kept, self.fingerprint = function, kept, fingerprint
        self.addresses = [t.data_ptr() for t in kept]
        self.inputs, self.result = list(map(memory_for, inputs)), None

    matches = CudaGraph.matches

    def replay(self, inputs: list[Tensor]) -> Any:
        for kept, new in zip(self.inputs, inputs, strict=True):
            without_repeats(kept).copy_(without_repeats(new))
        result = self.function(self.inputs)
        if self.result is None:
            self.result = result
        for kept, new in zip(tree_leaves(self.result), tree_leaves(result), strict=True):
            if isinstance(new, Tensor):
                kept.copy_(new)
        return self.result


@pytest.fixture(autouse=True)
def recorded(monkeypatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(graph, "CudaGraph", StandIn)
        monkeypatch.setattr(graph, "on_one_gpu", lambda module, tensors: True)
        monkeypatch.setattr(training, "_make_recordable", lambda optimizer: not isinstance(optimizer, Adagrad))
        monkeypatch.setattr(tracing, "compile_module", lambda module: module)


def random_state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


def data(size: int = 50) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(DEVICE)


def on_device(make: Callable[[], Pair] = lambda: pair_of(small_vae())) -> Pair:
    pair = fresh(make)
    for module in pair.modules:
        module.to(DEVICE, torch.float64)
    return pair


def fitted(elbo: Any, make: Callable[[], Pair] = lambda: pair_of(small_vae()), x: Any = None, **options: Any) -> list:
    """Returns the losses of training, the final weights and buffers, and the random state."""
    pair = on_device(make)
    torch.manual_seed(1)
    options = {"epochs": 12, "batch_size": 16} | options  # the last batch is smaller
    history = fit(pair.model, pair.guide, data() if x is None else x, loss=elbo, **options)
    left = [t.clone() for module in pair.modules for t in module.state_dict().values()]
    return [torch.tensor(history["loss"]), *left, random_state()]


def recordings_of(elbo: Compiled) -> list:
    return [made.cuda_graph for entry in elbo.graphs._entries.values() for made in entry.graphs]


LOSSES = {
    "Trace_ELBO": Trace_ELBO,
    "warmed up": lambda: bounds.ELBO(beta=bounds.Linear(steps=20)),
    **{name: partial(BY_NAME[name].build, 4) for name in ("IWAE", "IWAE-DReG", "TVO", "ReweightedWakeSleep")},
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_training_is_the_same_and_recorded(make):
    elbo = compiled(make())
    same(fitted(elbo), fitted(make()))
    assert recordings_of(elbo) and all(recordings_of(elbo))


# Each with whether it is recorded.
OPTIMIZERS = {
    "Adam": (partial(Adam, lr=1e-2), True),
    "AdamW": (partial(AdamW, lr=1e-2, weight_decay=0.1, amsgrad=True), True),
    "NAdam": (partial(NAdam, lr=1e-2), True),
    "RMSprop": (partial(RMSprop, lr=1e-2, momentum=0.5), True),
    "SGD": (partial(SGD, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1), True),
    "Adagrad": (partial(Adagrad, lr=1e-2), False),  # counts on the host
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name):
    optimizer, recorded = OPTIMIZERS[name]
    elbo = compiled(Trace_ELBO())
    options = {"optimizer": optimizer, "clip_norm": 1.0}
    same(fitted(elbo, **options), fitted(Trace_ELBO(), **options))
    assert recordings_of(elbo)
    along = [recording for recording in recordings_of(elbo) if recording is not None and recording.fingerprint]
    assert bool(along) is recorded


def settings(optimizers: list) -> Callable:
    """Returns a callback that changes what an optimizer multiplies by."""

    def change(history) -> None:
        for group in optimizers[-1].param_groups:
            group["weight_decay"] = 0.1 * len(history)
            group["betas"] = (0.9, 0.9 if len(history) % 2 else 0.99)

    return change


def test_settings_of_the_optimizer_are_not_frozen():
    def run(elbo: Any) -> list:
        made = []

        def optimizer(params):
            made.append(Adam(params, lr=1e-2))
            return made[-1]

        return fitted(elbo, optimizer=optimizer, callbacks=[settings(made)], scheduler=partial(StepLR, step_size=2))

    same(run(compiled(Trace_ELBO())), run(Trace_ELBO()))


def test_a_plateau_lowers_the_learning_rate():
    options = {"scheduler": partial(ReduceLROnPlateau, patience=0, threshold=10.0), "validation": data(20)}
    same(fitted(compiled(Trace_ELBO()), **options), fitted(Trace_ELBO(), **options))


def test_two_runs_with_one_loss_have_a_state_each():
    elbo = compiled(Trace_ELBO())
    first, second = fitted(elbo), fitted(elbo)
    same(first, second)
    same(first, fitted(Trace_ELBO()))


def test_running_statistics_and_dropout():
    # The bias before a batch norm has no gradient but rounding, which Adam would make large.
    elbo, options = compiled(Trace_ELBO()), {"optimizer": partial(SGD, lr=1e-3)}
    same(fitted(elbo, normalised, **options), fitted(Trace_ELBO(), normalised, **options))
    assert all(recordings_of(elbo))


def test_weights_that_move_in_memory_are_read_there():
    def run(elbo: Any) -> list:
        pair = on_device()

        def move(history) -> None:
            for p in pair.parameters():
                p.data = p.data * 0.9

        torch.manual_seed(1)
        history = fit(pair.model, pair.guide, data(), loss=elbo, epochs=6, batch_size=10, callbacks=[move])
        return [torch.tensor(history["loss"]), *pair.parameters()]

    same(run(compiled(Trace_ELBO())), run(Trace_ELBO()))


@needs_gpu
def test_a_loader_whose_thread_uses_the_gpu():
    def loader() -> DataLoader:
        return DataLoader(TensorDataset(data().cpu()), batch_size=16, pin_memory=True, num_workers=1)

    elbo = compiled(Trace_ELBO())
    options = {"device": DEVICE, "epochs": 4}
    same(fitted(elbo, x=loader(), **options), fitted(Trace_ELBO(), x=loader(), **options))
    assert any(recordings_of(elbo))


@needs_gpu
def test_what_cannot_be_recorded_runs_with_a_warning(monkeypatch):
    expected, step = fitted(Trace_ELBO(), optimizer=partial(SGD, lr=1e-3)), SGD.step

    def waiting(self, closure=None):
        torch.cuda.synchronize()
        return step(self)

    monkeypatch.setattr(SGD, "step", waiting)
    elbo = compiled(Trace_ELBO())
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph") as warned:
        found = fitted(elbo, optimizer=partial(SGD, lr=1e-3))
    assert len(warned) == 1
    same(found, expected)


@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_run_is_the_same_on_a_gpu_and_continues_without_one(compile, tmp_path):
    whole, path = fitted(Trace_ELBO(), epochs=6, compile=compile), tmp_path / "checkpoint.pt"
    for epochs in (3, 6):
        resumed = fitted(Trace_ELBO(), epochs=epochs, compile=compile, checkpoint=path, resume=epochs == 6)
    same(resumed, whole)
    pair = fresh(lambda: pair_of(small_vae()))
    pair.modules[0].double()
    history = fit(
        pair.model, pair.guide, data().cpu(), loss=Trace_ELBO(), epochs=7, batch_size=16, checkpoint=path, resume=True
    )
    assert len(history) == 7


def test_what_is_returned_is_not_overwritten():
    pair, x = on_device(), data()
    elbo = compiled(bounds.IWAE(3))
    kept = [elbo.terms(pair.model, pair.guide, x).loss for _ in range(8)]
    values = [loss.item() for loss in kept]
    assert all(recordings_of(elbo)) and len(set(values)) == 8
    torch.manual_seed(3)
    again = []
    for _ in range(8):
        again.append(elbo.terms(pair.model, pair.guide, x).loss.item())
    torch.manual_seed(3)
    expected = [bounds.IWAE(3).terms(pair.model, pair.guide, x).loss.item() for _ in range(8)]
    assert again == pytest.approx(expected, rel=1e-10)


def test_svi_with_pyros_optimizer():
    def run(elbo: Any) -> list:
        pair = on_device()
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
        torch.manual_seed(1)
        return [torch.as_tensor(float(svi.step(data()))) for _ in range(12)] + [*pair.parameters()]

    same(run(compiled(Trace_ELBO())), run(Trace_ELBO()))


METHODS = {
    "importance": estimators.ImportanceSampling(300),
    "annealing": estimators.AnnealedImportanceSampling(num_samples=6, num_temperatures=8),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_scores_are_the_same(method):
    pair, x = on_device(), data(20)
    found = []
    for compile in (False, True):
        torch.manual_seed(2)
        found.append(log_marginal(pair.model, pair.guide, x, method=method, max_memory=2e5, compile=compile))
    same([found[1].value, found[1].standard_error], [found[0].value, found[0].standard_error])


def test_low_precision():
    def run(elbo: Any) -> float:
        pair = fresh(lambda: pair_of(small_vae()))
        pair.modules[0].to(DEVICE)
        torch.manual_seed(1)
        with torch.autocast(DEVICE, torch.bfloat16):
            return fit(pair.model, pair.guide, data().float(), loss=elbo, epochs=3, batch_size=25)["loss"][-1]

    assert run(compiled(Trace_ELBO())) == pytest.approx(run(Trace_ELBO()), rel=0.02)


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "with gaps": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:, None, 0].expand(-1, 5, -1),
    "expanded twice, with gaps": lambda x: x[:1, ::2].expand(6, -1, -1)[:, :, None].expand(-1, -1, 2, -1),
    "one number": lambda x: x[0, 0, 0].expand(3, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_inputs_of_a_cuda_graph_have_memory_of_their_own_and_the_same_strides(view):
    given = view(torch.randn(4, 6, 3))
    room = memory_for(given)
    without_repeats(room).copy_(without_repeats(given))
    assert torch.equal(room, given) and room.stride() == given.stride() and room.data_ptr() != given.data_ptr()


class Failing(nn.Module):
    """A module whose output is NaN after 60 calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return torch.where(self.count > 60, torch.nan, x)


def test_a_loss_that_is_not_finite_is_found_within_some_steps():
    vae = small_vae()
    vae.encoder.network = nn.Sequential(Failing(), vae.encoder.network)
    vae.to(DEVICE, torch.float64)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        fit(vae.model, vae.guide, data(), epochs=100, batch_size=10, compile=True)
