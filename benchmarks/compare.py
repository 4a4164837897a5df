"""Speed of pyrovae, by default and compiled, compared with hand-written PyTorch, Lightning, stock Pyro and pythae.

A training step (`mlp`, `conv`). The models are the MLP VAE 784-400-20-400-784 and one with strided convolutions, with
Bernoulli pixels; the data are binary and in memory, in a new random order every epoch; Adam at a learning rate of 1e-3,
float32. The objectives are the ELBO of one particle and the IWAE bound of 50. The contenders:

- fit: `pyrovae.fit` as it is, which plays traced operations back; eager, by `compile=False`; and compiled, by
  `compile=True`.
- hand-written PyTorch: eager; its loss under `torch.compile`; on a GPU the whole step of each as one CUDA graph. Fused
  Adam.
- Lightning: the same hand-written loss and optimizer in a LightningModule, driven by its Trainer without logs, bars and
  checkpoints, with the batches of the hand-written loop, which are faster than those of a DataLoader.
- stock SVI: Pyro's SVI, Adam and Trace_ELBO, or RenyiELBO(alpha=0) for the IWAE bound, on pyrovae's model and guide.
- pythae: the loop of its trainer on its VAE or IWAE.

All have the same networks and the same initial weights, and each trains its own copy. They take turns in one process: a
round is a few short epochs of each, in an order that rotates from round to round. The time runs from the end of a
round's first epoch to the end of its last, and includes everything that the loop does between steps and between epochs.
It excludes what a call of `fit` does once, and compilation, which happens in a round that warms up. At the end all are
scored on the same data with the same noise, which shows that they trained the same model equally well.

A small step (`digits`): the digits of scikit-learn, an MLP 64-400-16-400-64, batches of 128, one thread. With it the
share of a step that goes into the guards, which watch what a graph might freeze.

Compilation in the background (`background`): steps of `fit` before and after a compiled graph took over.

Importance sampling (`importance`): log p(x) of the trained MLP VAE, by `log_marginal` and by pythae's `get_nll` at its
default batch size and at others, and the arithmetic rate of the networks relative to that of a matrix product.

Precision (`precision`): training steps of `fit` in float32 and with `precision="bf16"`; log p(x) of the test digits
after training in both, in float32; and a VAE scored in float32 and under bfloat16 autocast, with the same noise.

Memory (`memory`): a loss with its gradients, each in a fresh process: the largest amount that torch holds above what it
held before, and the peak of the process (VmHWM) after two calls, compilation included.

First steps (`first`): the first five training steps of a fresh process, from building the optimizer on, with an empty
cache of compiled code and, in another process, with the cache that the first one filled.

Several processes (`processes`): data a second in one process of one thread, and in two, which share a batch of twice
the size.

Quality (`quality`): the time that training takes to reach a given log p(x) of the test digits, and of 1,000 test images
of MNIST, in fresh processes with empty caches, compilation included.

    python benchmarks/compare.py --data-root data
    python benchmarks/compare.py --only mlp importance
    python benchmarks/compare.py --device cuda
"""

import argparse
import json
import logging
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pyro
import report
import torch
from estimators import SQUARE, flop_an_image, ratios, resident, take_turns, trained
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from models import HIDDEN, IMAGE, LATENT, PIXELS, ByHand, binary_images, convolutional_vae, pyrovae_vae, pythae_vae
from parts import peak_memory
from pyro.infer import ELBO, SVI, RenyiELBO, Trace_ELBO
from torch import Tensor
from tqdm.auto import tqdm

import pyrovae
from pyrovae import VAE, bounds, data, encoders, likelihoods, priors
from pyrovae.compilation.api import Compiled
from pyrovae.compilation.graph import CompiledGraph
from pyrovae.compilation.playback import play_back

LEARNING_RATE = 1e-3
EPOCH_SECONDS, MOST_DATA, ROUNDS = 0.25, 2**16, (6, 40)  # of hand-written PyTorch; of an epoch; fewest and most
SCORED = 500
PRODUCTS = 5  # matrix products a round
FIRST_STEPS = 5  # the fourth of which fit traces
PRECISIONS = (None, "bf16")  # of fit
BUDGET = {"cpu": 64e6, "cuda": 2e9}  # memory for log_marginal, in bytes: the default, and more where that is faster
STOCK_GOALS = {32: 2.0, 128: 1.5}  # by batch size
TEST_SAMPLES, MOST_EPOCHS = 200, 500
JSON, PICTURE = (Path(__file__).with_suffix(suffix) for suffix in (".json", ".png"))
HAND, HAND_COMPILED = "hand-written", "hand-written, compiled"
HAND_GRAPH, HAND_COMPILED_GRAPH = "hand-written, CUDA graph", "hand-written, compiled, CUDA graph"
GRAPHS_BY_HAND = (HAND_GRAPH, HAND_COMPILED_GRAPH)  # on a GPU
STOCK, FIT, EAGER, COMPILED, PYTHAE = "stock SVI", "fit", "fit, eager", "fit, compiled", "pythae"
LIGHTNING = "Lightning"
PACKAGES = ("torch", "pyro-ppl", "pythae", "lightning")

# Trains for some epochs. It calls mark() after each, and stops when mark() returns True.
Train = Callable[[int, Callable[[], bool | None]], None]
# Builds a Train from a VAE, the data, the batch size and the number of particles.
Build = Callable[[VAE, Tensor, int, int], Train]
Measured = dict[str, Any]


# The loops.


def shuffled_batches(x: Tensor, batch: int) -> Iterator[Tensor]:
    """Yields the data in batches, in a new random order."""
    for rows in torch.randperm(len(x)).to(x.device).split(batch):
        yield x.index_select(0, rows)


def loop(step: Callable[[Tensor], Tensor | float], x: Tensor, batch: int) -> Train:
    """A hand-written training loop, which reads the loss once an epoch."""

    def train(epochs: int, mark: Callable[[], bool | None]) -> None:
        for _ in range(epochs):
            total = 0.0
            for rows in shuffled_batches(x, batch):
                total += step(rows) * len(rows)
            float(total)
            if mark():
                break

    return train


def hand_written(vae: VAE, x: Tensor, batch: int, particles: int, compiled: bool = False) -> Train:
    """Hand-written PyTorch, with fused Adam."""
    loss = ByHand(vae, particles)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE, fused=True)
    compute = torch.compile(loss, dynamic=False) if compiled else loss

    def step(rows: Tensor) -> Tensor:
        value = compute(rows)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return loop(step, x, batch)


def hand_written_graph(vae: VAE, x: Tensor, batch: int, particles: int, compiled: bool = False) -> Train:
    """The same, with the whole step recorded as a CUDA graph."""
    loss = ByHand(vae, particles)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LEARNING_RATE, fused=True, capturable=True)
    compute = torch.compile(loss, dynamic=False) if compiled else loss
    given = x[:batch].clone()

    def step() -> Tensor:
        value = compute(given)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    # The setup that libraries do at their first call must not be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def replay(rows: Tensor) -> Tensor:
        given.copy_(rows)
        graph.replay()
        return value

    replay.held = optimizer  # keeps its memory alive, which the graph writes into
    return loop(replay, x, batch)


def stock_elbo(particles: int) -> ELBO:
    """Returns Pyro's objective."""
    if particles == 1:
        return Trace_ELBO()
    return RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True)


def stock_svi(vae: VAE, x: Tensor, batch: int, particles: int) -> Train:
    """Pyro's SVI, objective and Adam on pyrovae's model and guide."""
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), stock_elbo(particles))
    return loop(lambda rows: svi.step(rows) / len(rows), x, batch)


def pyrovae_elbo(particles: int, compiled: bool) -> ELBO:
    """Returns the objective that a user passes to ``fit``."""
    loss = Trace_ELBO() if particles == 1 else bounds.IWAE(particles)
    return pyrovae.compile(loss) if compiled else loss


def pyrovae_fit(
    vae: VAE, x: Tensor, batch: int, particles: int, compile: bool | str = "auto", precision: str | None = None
) -> Train:
    """``pyrovae.fit`` with its defaults, except the loss and the progress bar."""
    loss = pyrovae_elbo(particles, compile is True)  # kept from call to call, with its graphs
    if compile == "auto":
        loss = Compiled(loss, play_back)

    def train(epochs: int, mark: Callable[[], bool | None]) -> None:
        callbacks = [lambda _: mark()]
        options = {"epochs": epochs, "batch_size": batch, "callbacks": callbacks, "precision": precision}
        pyrovae.fit(vae.model, vae.guide, x, loss=loss, compile=compile, progress=False, **options)

    return train


class _Shuffled:
    """The batches of the hand-written loop, as Lightning takes them."""

    def __init__(self, x: Tensor, batch: int):
        self.x, self.batch = x, batch

    def __iter__(self) -> Iterator[Tensor]:
        return shuffled_batches(self.x, self.batch)

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch)


def lightning_trainer(vae: VAE, x: Tensor, batch: int, particles: int) -> Train:
    """The hand-written loss and optimizer, driven by Lightning's Trainer."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.loss = ByHand(vae, particles)

        def training_step(self, rows: Tensor) -> Tensor:
            return self.loss(rows)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    class Marks(lightning.Callback):
        def __init__(self, mark: Callable[[], bool | None]):
            self.mark = mark

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = bool(self.mark())

    module = Module()
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)
    silent = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)

    def train(epochs: int, mark: Callable[[], bool | None]) -> None:
        device = "gpu" if x.is_cuda else "cpu"
        trainer = lightning.Trainer(accelerator=device, devices=1, max_epochs=epochs, callbacks=[Marks(mark)], **silent)
        trainer.fit(module, _Shuffled(x, batch))

    return train


def pythae_trainer(vae: VAE, x: Tensor, batch: int, particles: int) -> Train:
    """The training loop of pythae's trainer (``BaseTrainer.train_step``), without its progress bar.

    Its copy of the model after every epoch and its files are left out too.
    """
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler

    config = BaseTrainerConfig(per_device_train_batch_size=batch, learning_rate=LEARNING_RATE, no_cuda=not x.is_cuda)
    dataset = BaseDataset(x.cpu(), torch.zeros(len(x)))
    trainer = BaseTrainer(pythae_vae(vae, particles), dataset, training_config=config)
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([], trainer.model)

    def train(epochs: int, mark: Callable[[], bool | None]) -> None:
        for epoch in range(epochs):
            trainer.train_step(epoch)
            if mark():
                break

    return train


BUILD: dict[str, Build] = {
    HAND: hand_written,
    HAND_COMPILED: partial(hand_written, compiled=True),
    HAND_GRAPH: hand_written_graph,
    HAND_COMPILED_GRAPH: partial(hand_written_graph, compiled=True),
    STOCK: stock_svi,
    FIT: pyrovae_fit,
    EAGER: partial(pyrovae_fit, compile=False),
    COMPILED: partial(pyrovae_fit, compile=True),
    LIGHTNING: lightning_trainer,
    PYTHAE: pythae_trainer,
}


def loops_on(device: str) -> list[str]:
    """Returns the names of all loops that run on a device."""
    return [name for name in BUILD if name not in GRAPHS_BY_HAND or device == "cuda"]


def finish(device: str) -> None:
    """Waits until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """Calls a function in a new process, which may have children, such as compilers."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# A training step.

NETWORKS = {
    "mlp": (f"MLP {PIXELS}-{HIDDEN}-{LATENT}-{HIDDEN}-{PIXELS}", pyrovae_vae, (PIXELS,)),
    "conv": (f"Convolutions, {IMAGE[1]} x {IMAGE[2]}", convolutional_vae, IMAGE),
}
SHORT = {"mlp": "MLP", "conv": "convolutions"}


def objective(particles: int) -> str:
    return "ELBO" if particles == 1 else f"IWAE {particles}"


def started(name: str, network: str, x: Tensor, batch: int, particles: int) -> tuple[VAE, Train]:
    """Returns a VAE, with the same weights each time, and the loop that trains it."""
    pyro.set_rng_seed(1)
    vae = NETWORKS[network][1]().to(x.device)
    return vae, BUILD[name](vae, x, batch, particles)


def ms_a_step(train: Train, epochs: int, steps: int, device: str) -> float:
    """Returns milliseconds a step after the first epoch."""
    marks = []

    def mark() -> None:
        finish(device)
        marks.append(time.perf_counter())

    train(epochs, mark)
    return 1e3 * (marks[-1] - marks[0]) / ((epochs - 1) * steps)


def ms_in_turns(
    trains: dict[str, Train], rounds: int, epochs: int, steps: int, device: str, what: str
) -> dict[str, list[float]]:
    """Returns milliseconds a step in every round, by loop, after a round to warm up."""
    names, ms = list(trains), {name: [] for name in trains}
    for i in tqdm(range(-1, rounds), desc=what):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took = ms_a_step(trains[name], epochs, steps, device)
            if i >= 0:
                ms[name].append(took)
    return ms


def measure_case(network: str, particles: int, batch: int, args: argparse.Namespace) -> Measured:
    """Returns milliseconds a step in every round, and the final loss, by loop."""
    torch.compiler.reset()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def images(size: int) -> Tensor:
        return binary_images(size).reshape(size, *NETWORKS[network][2]).to(args.device)

    trial_ms = ms_a_step(started(HAND, network, images(2 * batch), batch, particles)[1], 3, 2, args.device)
    steps = max(1, min(round(1e3 * EPOCH_SECONDS / trial_ms), MOST_DATA // batch))
    steps = min(steps, 4) if args.smoke else steps
    fewest, most = (2, 2) if args.smoke else ROUNDS
    rounds = max(fewest, min(round(1e3 * args.seconds / (trial_ms * steps * args.epochs)), most))
    x, names = images(steps * batch), loops_on(args.device)
    vaes, trains = {}, {}
    for name in names:
        vaes[name], trains[name] = started(name, network, x, batch, particles)
    what = f"{network}, {objective(particles)}, batch {batch}"
    ms = ms_in_turns(trains, rounds, args.epochs, steps, args.device, what)
    loss = {}
    for name, vae in vaes.items():
        torch.manual_seed(2)
        scored = pyrovae.log_marginal(vae.model, vae.guide, x[:SCORED], num_samples=particles, progress=False)
        loss[name] = -scored.value.mean().item()
    timed = (args.epochs - 1) * steps
    return {"particles": particles, "batch": batch, "timed steps a round": timed, "ms": ms, "loss": loss}


def measure_network(network: str, args: argparse.Namespace) -> Measured:
    cases = [(1, batch) for batch in args.batches] + [(args.particles, batch) for batch in args.iwae_batches]
    return {"cases": [measure_case(network, particles, batch, args) for particles, batch in cases]}


def by_objective(measured: Measured) -> dict[int, list[Measured]]:
    """Returns the cases of a network by their number of particles."""
    groups = {}
    for case in measured["cases"]:
        groups.setdefault(case["particles"], []).append(case)
    return groups


def network_section(network: str, measured: Measured) -> str:
    parts = []
    for particles, cases in by_objective(measured).items():
        rows = []
        base = FIT if all(FIT in case["ms"] for case in cases) else COMPILED
        for case in cases:
            for name, ms in case["ms"].items():
                against = "" if name == base else report.quartiles(ratios(ms, case["ms"][base]), 2)
                rate = 1e3 / statistics.median(ms)
                first = f"{case['batch']}" if name == HAND else ""
                rows.append([first, name, report.quartiles(ms, 2), digits(rate), against, f"{case['loss'][name]:.1f}"])
        rounds = ", ".join(f"{len(c['ms'][HAND])} of {c['timed steps a round']} at batch {c['batch']}" for c in cases)
        parts.append(
            f"### {NETWORKS[network][0]}, {objective(particles)}\n\n"
            + report.table(["batch", "loop", "ms / step", "steps / s", f"this / {base}", "loss"], rows)
            + f"\n\nRounds and timed steps in each: {rounds}."
        )
    return "\n\n".join(parts)


def digits(value: float) -> str:
    """Returns a number with at least three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# A small step.

UNGUARDED = "fit, without guards"


def digits_in_turns(args: argparse.Namespace) -> Measured:
    """Returns milliseconds a step in every round, by loop, on one thread."""
    torch.set_num_threads(1)
    x = data.static_binarization(data.load("digits").train.x).flatten(1)[:1152]  # nine batches of 128
    trains = {}
    for name, build in {**{name: BUILD[name] for name in loops_on("cpu")}, UNGUARDED: unguarded_fit}.items():
        pyro.set_rng_seed(1)
        trains[name] = build(pyrovae_vae(x.shape[1], 16), x, 128, 1)
    return {"ms": ms_in_turns(trains, args.rounds, args.digits_epochs_a_round, len(x) // 128, "cpu", "digits")}


def unguarded_fit(*args: Any) -> Train:
    """``pyrovae.fit`` whose graphs find no change, whatever changes."""
    train = pyrovae_fit(*args)

    def unguarded(epochs: int, mark: Callable[[], bool | None]) -> None:
        with patch.object(CompiledGraph, "failure_reason", lambda *args: None):
            train(epochs, mark)

    return unguarded


def measure_digits(args: argparse.Namespace) -> Measured:
    return in_fresh_process(digits_in_turns, args)


def digits_section(measured: Measured) -> str:
    ms = measured["ms"]
    rows = [[name, report.quartiles(took, 2), report.quartiles(ratios(took, ms[FIT]), 2)] for name, took in ms.items()]
    return (
        "### A small step\n\nThe digits of scikit-learn, an MLP 64-400-16-400-64, ELBO, batches of 128, one thread; "
        f"{len(ms[FIT])} rounds.\n\n" + report.table(["loop", "ms / step", f"this / {FIT}"], rows)
    )


# Compilation in the background.


def flow_vae() -> tuple[VAE, Tensor]:
    encoder = encoders.NeuralSplineFlow(PIXELS, LATENT)
    return VAE(priors.StandardNormal(LATENT), likelihoods.Bernoulli(LATENT, PIXELS), encoder), binary_images(2560)


def heavy_tailed_vae() -> tuple[VAE, Tensor]:
    encoder = encoders.DiagonalNormal(PIXELS, LATENT)
    vae = VAE(priors.StandardNormal(LATENT), likelihoods.StudentT(LATENT, PIXELS), encoder)
    return vae, torch.randn(2560, 2) @ torch.randn(2, PIXELS) + torch.randn(2560, PIXELS)


IN_BACKGROUND = {"encoder NeuralSplineFlow": flow_vae, "likelihood StudentT": heavy_tailed_vae}


def around_takeover(name: str, smoke: bool) -> Measured:
    """Trains on one thread until a graph that was compiled in the background took over, and for as long again."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    vae, x = IN_BACKGROUND[name]()
    loss, ends, found = Compiled(Trace_ELBO(), play_back), [], {}

    def mark(_: pyrovae.History) -> bool:
        ends.append(time.perf_counter())
        graph = next(graph for entry in loss.graphs._entries.values() for graph in entry.graphs)
        if "calls" not in found and graph.background is not None:
            found["calls"] = graph.background.take_over_at
        if "epochs" not in found and graph.background is None:
            found["epochs"] = len(ends)
        return smoke or "epochs" in found and len(ends) > 1.2 * found["epochs"]

    pyrovae.fit(vae.model, vae.guide, x, loss=loss, epochs=10_000, batch_size=128, callbacks=[mark], progress=False)
    ms = [1e3 * (b - a) / 20 for a, b in pairwise(ends)]
    at = found.get("epochs", len(ends))
    # The compilation starts at half of these calls.
    return {
        "take over at": found["calls"],
        "before": ms[: at // 2],
        "after": ms[at:],
        "seconds": ends[at - 1] - ends[0],
    }


def measure_background(args: argparse.Namespace) -> Measured:
    return {"cases": {name: in_fresh_process(around_takeover, name, args.smoke) for name in IN_BACKGROUND}}


def background_section(measured: Measured) -> str:
    rows = [
        [
            name,
            report.quartiles(case["before"], 1),
            report.quartiles(case["after"], 1),
            f"{statistics.median(case['before']) / statistics.median(case['after']):.2f}",
            str(case["take over at"]),
            f"{case['seconds']:.0f}",
        ]
        for name, case in measured["cases"].items()
        if case["before"] and case["after"]
    ]
    header = ["part", "ms / step, played back", "compiled", "ratio", "takes over at step", "after s"]
    return (
        "### Compilation in the background\n\nSteps of `fit` as it is on one thread, before a compilation starts and "
        "after its result took over; batches of 128, 784 pixels, 20 latent dimensions.\n\n" + report.table(header, rows)
    )


# Importance sampling.


def measure_importance(args: argparse.Namespace) -> Measured:
    vae, x = trained(args.images, args.train_epochs)
    vae, x = vae.to(args.device), x.to(args.device)
    theirs, square = pythae_vae(vae).eval(), torch.randn(SQUARE, SQUARE, device=args.device)

    def log_marginal(compile: bool | str) -> float:
        options = {"num_samples": args.num_samples, "max_memory": BUDGET[args.device], "progress": False}
        return pyrovae.log_marginal(vae.model, vae.guide, x, compile=compile, **options).value.mean().item()

    def products() -> None:
        for _ in range(PRODUCTS):
            square @ square
        finish(args.device)

    def get_nll(batch_size: int) -> float:
        return theirs.get_nll(x, n_samples=args.num_samples, batch_size=batch_size)  # the mean of log p(x), not negated

    contenders = {
        "log_marginal": lambda: log_marginal("auto"),
        "log_marginal, eager": lambda: log_marginal(False),
        "log_marginal, compiled": lambda: log_marginal(True),
        "matrix product": products,
        **{f"pythae, batch size {b}": lambda b=b: get_nll(b) for b in args.pythae_batches},
    }
    times, results = take_turns(contenders, args.rounds, "importance sampling")
    square_seconds = [took / PRODUCTS for took in times.pop("matrix product")]
    rates = [2 * SQUARE**3 / took / 1e9 for took in square_seconds]
    flop = flop_an_image(vae, args.num_samples) * len(x)
    shares = {
        name: ratios([flop / t / 1e9 for t in times[name]], rates) for name in times if name.startswith("log_marginal")
    }
    return {
        "images": len(x),
        "samples": args.num_samples,
        "seconds": times,
        "GFLOP/s of a matrix product": rates,
        "share of it": shares,
        "log p(x)": {name: results[name] for name in times},
    }


def best_of_pythae(measured: Measured) -> str:
    names = [name for name in measured["seconds"] if name.startswith("pythae")]
    return min(names, key=lambda name: statistics.median(measured["seconds"][name]))


def importance_section(measured: Measured) -> str:
    times, n, best = measured["seconds"], measured["images"], best_of_pythae(measured)
    ours, rows = times["log_marginal, compiled"], []
    for name, took in times.items():
        shares = [100 * share for share in measured["share of it"].get(name, [])]
        rows.append(
            [
                name + (" (its best)" if name == best else ""),
                report.quartiles([1e3 * t / n for t in took], 1),
                "" if took is ours else report.quartiles(ratios(took, ours), 2),
                f"{report.quartiles(shares, 0)} %" if shares else "",
                f"{statistics.mean(measured['log p(x)'][name]):.3f}",
            ]
        )
    return (
        f"### Importance sampling\n\nlog p(x) of the trained MLP VAE, {measured['samples']:,} samples an image, "
        f"{len(ours)} rounds of {n} images. The share of the product is the arithmetic rate of the networks' matrix "
        f"products, relative to that of one product of two matrices of {SQUARE} x {SQUARE} in float32: "
        f"{report.quartiles(measured['GFLOP/s of a matrix product'], 0)} GFLOP/s.\n\n"
        + report.table(["estimator", "ms / image", "this / compiled", "share of the product", "mean log p(x)"], rows)
    )


# Precision.


def measure_precision(args: argparse.Namespace) -> Measured:
    vae, x = trained(args.precision_images, args.train_epochs)
    vae, x = vae.to(args.device), x.to(args.device)

    def score(seed: int, low: bool) -> Tensor:
        torch.manual_seed(seed)
        with torch.autocast(args.device, torch.bfloat16, enabled=low):
            options = {"num_samples": args.num_samples, "max_memory": BUDGET[args.device], "progress": False}
            return pyrovae.log_marginal(vae.model, vae.guide, x, compile=True, **options).value.double().cpu()

    contenders = {"float32": lambda: score(0, False), "bfloat16": lambda: score(0, True)}
    times, results = take_turns(contenders, args.rounds, "precision")
    exact = results["float32"][-1]
    apart = {"bfloat16": results["bfloat16"][-1] - exact, "float32, other noise": score(1, False) - exact}
    return {
        "training": [steps_in_both(*case, args) for case in ((1, 128), (1, 2048), (args.particles, 128))],
        "digits": [digits_in_both(seed, args) for seed in tqdm(range(args.digits_runs), "digits")],
        "digits epochs": args.digits_epochs,
        "images": len(x),
        "samples": args.num_samples,
        "seconds": times,
        "bfloat16 units": has_bfloat16(args.device),
        "difference": {
            name: {
                "mean": d.mean().item(),
                "standard error": d.std().item() / len(x) ** 0.5,
                "largest": d.abs().max().item(),
            }
            for name, d in apart.items()
        },
    }


def steps_in_both(particles: int, batch: int, args: argparse.Namespace) -> Measured:
    """Returns milliseconds a step of ``fit`` in every round, by precision."""
    pyro.set_rng_seed(0)
    steps = max(1, 4096 // batch)
    x = binary_images(steps * batch).to(args.device)
    trains = {
        str(name): pyrovae_fit(pyrovae_vae().to(args.device), x, batch, particles, precision=name)
        for name in PRECISIONS
    }
    ms = ms_in_turns(trains, args.rounds, args.epochs, steps, args.device, f"{objective(particles)} in two precisions")
    return {"particles": particles, "batch": batch, "ms": ms}


def digits_in_both(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Returns the mean log p(x) of the test digits after training in each precision, scored in float32."""
    train_set, _, test_set = data.load("digits")
    x, held_out = (data.static_binarization(split.x).flatten(1).to(args.device) for split in (train_set, test_set))
    found = {}
    for name in PRECISIONS:
        pyro.set_rng_seed(seed)
        vae = pyrovae_vae(x.shape[1], 16).to(args.device)
        pyrovae_fit(vae, x, 128, 1, precision=name)(args.digits_epochs, lambda: None)
        torch.manual_seed(0)
        scored = pyrovae.log_marginal(vae.model, vae.guide, held_out, num_samples=1000, progress=False)
        found[str(name)] = scored.value.mean().item()
    return found


def has_bfloat16(device: str) -> bool:
    """Returns whether the device multiplies bfloat16 numbers in hardware; for CPUs, known on Linux only."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()) is not None


def precision_section(measured: Measured) -> str:
    times, n = measured["seconds"], measured["images"]
    relative = report.quartiles(ratios(times["bfloat16"], times["float32"]), 2)
    units = (
        "This device has units for bfloat16."
        if measured["bfloat16 units"]
        else "This device has no units for bfloat16: it emulates them, which is slower."
    )
    rows = [
        [name, f"{d['mean']:+.4f}", f"{d['standard error']:.4f}", f"{d['largest']:.3f}"]
        for name, d in measured["difference"].items()
    ]
    scored = (
        f"The same VAE scored under `torch.autocast` in bfloat16 and in float32, {n} images, {measured['samples']:,} "
        "samples each, the same noise, both compiled. Differences of log p(x), in nats. A second run in float32, with "
        f"other noise, shows the effect of noise. bfloat16 took {relative} times as long. {units}\n\n"
        + report.table(["minus float32", "mean", "standard error", "largest of a datum"], rows)
    )
    if "training" not in measured:  # an earlier record
        return f"### Precision\n\n{scored}"
    training = [
        [
            objective(case["particles"]),
            str(case["batch"]),
            *(report.quartiles(ms, 1) for ms in case["ms"].values()),
            report.quartiles(ratios(case["ms"]["bf16"], case["ms"]["None"]), 2),
        ]
        for case in measured["training"]
    ]
    digits = [run["bf16"] - run["None"] for run in measured["digits"]]
    error = statistics.stdev(digits) / len(digits) ** 0.5 if len(digits) > 1 else float("nan")
    return (
        '### Precision\n\nTraining steps of `fit`, in float32 and with `precision="bf16"`, taking turns.\n\n'
        + report.table(["objective", "batch", "float32, ms", "bf16, ms", "ratio"], training)
        + f"\n\nTest digits after {measured['digits epochs']} epochs, log p(x) in float32 by 1,000 samples: trained "
        f"with bf16 less trained in float32, the mean of {len(digits)} seeds: {statistics.mean(digits):+.3f} ± "
        f"{error:.3f} nats. Single seeds: {', '.join(f'{d:+.2f}' for d in digits)}.\n\n{scored}"
    )


# Memory.

MEMORY = ("hand-written", "hand-written, compiled", "RenyiELBO (Pyro)", "IWAE", "IWAE, compiled")


def step_memory(name: str, particles: int, batch: int, device: str) -> Measured:
    """Returns megabytes: the most that torch holds in a loss with its gradients, and the peak of the process."""
    pyro.set_rng_seed(0)
    vae, x = pyrovae_vae().to(device), binary_images(batch).to(device)
    before, compiled = resident("VmRSS"), name.endswith("compiled")
    if name.startswith("hand-written"):
        loss = ByHand(vae, particles)
        compute = torch.compile(loss, dynamic=False) if compiled else loss
    else:
        elbo = pyrovae_elbo(particles, compiled) if name.startswith("IWAE") else stock_elbo(particles)

    def call() -> None:
        if name.startswith("hand-written"):
            compute(x).backward()
        else:
            elbo.loss_and_grads(vae.model, vae.guide, x)

    def memory() -> float:
        vae.zero_grad(set_to_none=True)  # gradients are allocated again
        return held_at_most(call, device) / 1e6

    call(), call()
    peak = resident("VmHWM")
    return {"third call": memory(), "fourth call": memory(), "process before": before, "process at most": peak}


def held_at_most(call: Callable[[], None], device: str) -> int:
    """Returns the largest number of bytes that torch holds during a call, above what it held before."""
    if device != "cuda":
        return peak_memory(call)
    finish(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    finish(device)
    return torch.cuda.max_memory_allocated() - before


def measure_memory(args: argparse.Namespace) -> Measured:
    batch = args.iwae_batches[0]
    found = {
        name: in_fresh_process(step_memory, name, args.particles, batch, args.device) for name in tqdm(MEMORY, "memory")
    }
    return {"particles": args.particles, "batch": batch, "MB": found}


def memory_section(measured: Measured) -> str:
    columns = ("third call", "fourth call", "process before", "process at most")
    rows = [[name, *(f"{megabytes[c]:.0f}" for c in columns)] for name, megabytes in measured["MB"].items()]
    return (
        f"### Memory\n\nA loss with its gradients, {objective(measured['particles'])}, MLP, batch {measured['batch']}, "
        "in MB, each in a fresh process. The first two columns: the most that torch holds during a call, above what "
        "it held before. At calls 1, 2, 4, 8, ... pyrovae compares a graph with the eager objective. The last two "
        "columns: the process "
        "before, and its peak after two calls, compilation included.\n\n" + report.table(["loss", *columns], rows)
    )


# The first step.


def first_step(name: str, batch: int, cache: str, device: str) -> float:
    """Returns the seconds it takes to build a training loop and to make five steps."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    pyro.set_rng_seed(0)
    vae, x = pyrovae_vae().to(device), binary_images(FIRST_STEPS * batch).to(device)
    start = time.perf_counter()
    train = BUILD[name](vae, x, batch, 1)
    train(1, lambda: finish(device))
    return time.perf_counter() - start


def measure_first(args: argparse.Namespace) -> Measured:
    names = (HAND, HAND_COMPILED, EAGER, FIT, COMPILED)
    found = {name: {"empty cache": [], "same again": []} for name in names}
    for _ in tqdm(range(args.repeats), "first steps"):
        for name in names:
            with tempfile.TemporaryDirectory() as cache:
                for took in found[name].values():
                    took.append(in_fresh_process(first_step, name, 128, cache, args.device))
    return {"batch": 128, "seconds": found}


def first_section(measured: Measured) -> str:
    rows = [[name, *(report.quartiles(took, 1) for took in by.values())] for name, by in measured["seconds"].items()]
    return (
        f"### The first steps\n\nSeconds of the first {FIRST_STEPS} steps of a process: MLP, ELBO, batch "
        f"{measured['batch']}. "
        "They include building the optimizer, which makes torch import half of its compiler, but no other imports and "
        "no data. With an empty cache of compiled code, and in another process with the cache that the first one "
        f"filled; {len(measured['seconds'][HAND]['same again'])} processes each.\n\n"
        + report.table(["loop", "empty cache", "same again"], rows)
    )


# Several processes.


def data_a_second(processes: int, batch: int, compiled: bool) -> float:
    """Returns data a second in processes of one thread each, with one batch each."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    script = [str(Path(__file__).with_name("processes.py")), "--batch", str(batch), *["--compile"] * compiled]
    run = subprocess.run(
        [sys.executable, *launcher, *script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(re.search(r"(\d+) data a second", run.stdout)[1])


def measure_processes(args: argparse.Namespace) -> Measured:
    cases = []
    for batch in tqdm(args.process_batches, "processes"):
        for compiled in (False, True):
            found = {processes: [] for processes in (1, 2)}
            for _ in range(args.repeats):
                for processes, rates in found.items():
                    rates.append(data_a_second(processes, batch, compiled))
            cases.append({"batch": batch, "compiled": compiled, "one": found[1], "two": found[2]})
    return {"cases": cases}


def processes_section(measured: Measured) -> str:
    rows = [
        [
            COMPILED if case["compiled"] else FIT,
            str(case["batch"]),
            report.quartiles(case["one"], 0),
            report.quartiles(case["two"], 0),
            report.quartiles(ratios(case["two"], case["one"]), 2),
        ]
        for case in measured["cases"]
    ]
    return (
        "### Several processes\n\nData a second in `fit`, MLP, ELBO of one particle (Trace_ELBO), in processes of one "
        f"thread each over gloo on one machine, with the same batch size a process; {len(measured['cases'][0]['one'])} "
        "runs each.\n\n" + report.table(["loop", "batch a process", "one process", "two processes", "two / one"], rows)
    )


# Time to a given quality.


class Target(NamedTuple):
    """A mean log p(x) of test data that training is to reach.

    Args:
        dataset: name of the data.
        latent_dim: of the VAE.
        particles: of the objective.
        value: nats a datum.
        every: epochs between estimates.
    """

    dataset: str
    latent_dim: int
    particles: int
    value: float
    every: int


TARGETS = (Target("digits", 16, 1, -23.5, 5), Target("digits", 16, 50, -23.5, 5), Target("mnist", LATENT, 1, -100.0, 1))


def time_to_target(name: str, target: Target, seed: int, cache: str, args: argparse.Namespace) -> Measured:
    """Trains until the test log p(x) reaches a target; returns the time without evaluation."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    pyro.set_rng_seed(seed)
    train_set, _, test_set = data.load(target.dataset, args.data_root)
    x, held_out = (data.static_binarization(split.x).flatten(1).to(args.device) for split in (train_set, test_set))
    held_out = held_out[:1000]
    vae = pyrovae_vae(x.shape[1], target.latent_dim).to(args.device)
    epochs, reached, start = [], None, time.perf_counter()

    def mark() -> bool:
        nonlocal start, reached
        finish(args.device)
        epochs.append(time.perf_counter() - start)
        done = False
        if len(epochs) % target.every == 0:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                options = {"num_samples": TEST_SAMPLES, "progress": False}
                reached = pyrovae.log_marginal(vae.model, vae.guide, held_out, **options).value.mean().item()
            done = reached >= target.value
        start = time.perf_counter()
        return done

    BUILD[name](vae, x, 128, target.particles)(args.most_epochs, mark)
    beyond = sum(epochs) - len(epochs) * statistics.median(epochs)
    return {"seconds": sum(epochs), "beyond": beyond, "epochs": len(epochs), "log p(x)": reached}


def measure_quality(args: argparse.Namespace) -> Measured:
    names = [name for name in loops_on(args.device) if name not in (*GRAPHS_BY_HAND, PYTHAE)]
    runs = []
    for seed in range(args.runs):
        for target in TARGETS:
            for name in tqdm(names, f"quality, {target.dataset}, {objective(target.particles)}"):
                with tempfile.TemporaryDirectory() as cache:
                    run = in_fresh_process(time_to_target, name, target, seed, cache, args)
                case = {"data": target.dataset, "particles": target.particles, "target": target.value}
                runs.append({"loop": name, **case, "seed": seed, **run})
    return {"runs": runs, "samples": TEST_SAMPLES}


def cases_of(measured: Measured) -> dict[tuple[str, int], list[Measured]]:
    """Returns the runs to a given log p(x) by data and number of particles; earlier records are of the digits."""
    cases = {}
    for run in measured["runs"]:
        cases.setdefault((run.get("data", "digits"), run["particles"]), []).append(run)
    return cases


def quality_section(measured: Measured) -> str:
    rows = []
    for (dataset, particles), runs in cases_of(measured).items():
        for name in dict.fromkeys(run["loop"] for run in runs):
            its_runs = [run for run in runs if run["loop"] == name]
            reached = all(run["log p(x)"] >= run["target"] for run in its_runs)
            seconds, beyond, epochs, value = (
                statistics.mean(run[key] for run in its_runs) for key in ("seconds", "beyond", "epochs", "log p(x)")
            )
            rows.append(
                [
                    f"{dataset}, {objective(particles)}" if name == HAND else "",
                    f"{its_runs[0]['target']:.1f}" if name == HAND else "",
                    name,
                    f"{seconds:.1f}" if reached else f"not in {seconds:.1f}",
                    f"{beyond:.1f}",
                    f"{epochs:.0f}",
                    f"{1e3 * (seconds - beyond) / epochs:.0f}",
                    f"{value:.2f}",
                ]
            )
    num_runs = len({run["seed"] for run in measured["runs"]})
    header = ["data, objective", "target", "loop", "seconds", "of it once", "epochs", "ms / epoch", "reached"]
    return (
        "### Time to a given log p(x)\n\nTraining an MLP VAE (16 latent dimensions for the digits, 20 for MNIST), "
        "static binarization, batches of 128 and a smaller last one, until the mean log p(x) of the test digits, or of "
        f"the first 1,000 test images of MNIST, by {measured['samples']} samples every five epochs, or every epoch, "
        f"reaches a target in nats; means of {num_runs} runs, each in a fresh process with an empty cache, evaluation "
        "not counted. The column 'of it once' is the "
        "time above the median epoch, mostly for compilation: hand-written PyTorch compiles for both sizes at once, "
        "`fit` for the smaller one when it has come 32 "
        "times.\n\n" + report.table(header, rows)
    )


# The report.


PARTS: dict[str, tuple[Callable[[argparse.Namespace], Measured], Callable[[Measured], str]]] = {
    **{name: (partial(measure_network, name), partial(network_section, name)) for name in NETWORKS},
    "digits": (measure_digits, digits_section),
    "background": (measure_background, background_section),
    "importance": (measure_importance, importance_section),
    "precision": (measure_precision, precision_section),
    "memory": (measure_memory, memory_section),
    "first": (measure_first, first_section),
    "processes": (measure_processes, processes_section),
    "quality": (measure_quality, quality_section),
}


def goals_section(device: str, parts: dict[str, Measured]) -> str:
    """Returns the table of goals."""
    rows = []

    def add(what: str, values: list[float], goal: str, digits: int = 2) -> None:
        rows.append([what, report.quartiles(values, digits), goal])

    for case in parts.get("mlp", {}).get("cases", []):
        ms, where = case["ms"], f"MLP, {objective(case['particles'])}, batch {case['batch']}: "
        measured = device, case["particles"], case["batch"]
        if device == "cpu" and case["particles"] == 1 and FIT in ms:
            add(where + f"{FIT} / {HAND}", ratios(ms[FIT], ms[HAND]), "at most 1.05")
            if case["batch"] in STOCK_GOALS:
                goal = f"at least {STOCK_GOALS[case['batch']]}"
                add(where + f"{STOCK} / {FIT}", ratios(ms[STOCK], ms[FIT]), goal)
            if case["batch"] == 128:
                add(where + f"{PYTHAE} / {FIT}", ratios(ms[PYTHAE], ms[FIT]), "at least 1.8")
        if measured == ("cuda", 1, 128):
            add(where + f"{STOCK} / {COMPILED}", ratios(ms[STOCK], ms[COMPILED]), "at least 20", 1)
            for by_hand in GRAPHS_BY_HAND:
                add(where + f"{COMPILED} / {by_hand}", ratios(ms[COMPILED], ms[by_hand]), "at most 1.1")
        elif measured == ("cpu", 1, 128):
            add(where + f"{COMPILED} / {HAND_COMPILED}", ratios(ms[COMPILED], ms[HAND_COMPILED]), "at most 1")
            add(where + f"{STOCK} / {COMPILED}", ratios(ms[STOCK], ms[COMPILED]), "at least 2.1")
            add(where + f"{PYTHAE} / {COMPILED}", ratios(ms[PYTHAE], ms[COMPILED]), "at least 2.5")
        elif measured == ("cpu", 50, 64):
            add(where + f"{STOCK} (RenyiELBO) / {COMPILED}", ratios(ms[STOCK], ms[COMPILED]), "at least 3.2")
    if "digits" in parts:
        ms = parts["digits"]["ms"]
        add(f"Digits, one thread: {FIT} / {HAND}", ratios(ms[FIT], ms[HAND]), "at most 1.15")
        share = [1 - r for r in ratios(ms[UNGUARDED], ms[FIT])]
        add("Digits, one thread: share of the guards", share, "at most 0.02", 3)
    if "importance" in parts and device == "cpu":
        found, ours = parts["importance"], "log_marginal, compiled"
        best = best_of_pythae(found)
        if "log_marginal, eager" in found["seconds"]:
            default = found["seconds"]["log_marginal"]
            add(f"{best} / log_marginal", ratios(found["seconds"][best], default), "at least 3.4")
        add(f"{best} / {ours}", ratios(found["seconds"][best], found["seconds"][ours]), "at least 4")
        add(f"{ours}: share of a matrix product", found["share of it"][ours], "at least 0.6")
    if "first" in parts and device == "cpu":
        took = parts["first"]["seconds"]
        add("First compiled steps, empty cache, s", took[COMPILED]["empty cache"], "at most 8", 1)
        add("First compiled steps, the same again, s", took[COMPILED]["same again"], "at most 8", 1)
        if FIT in took:
            more = [a - b for a, b in zip(took[FIT]["same again"], took[EAGER]["same again"], strict=True)]
            add(f"First steps, {FIT} less {EAGER}, s", more, "at most 0.5")
    for case in parts.get("processes", {}).get("cases", []):
        loop = COMPILED if case["compiled"] else FIT
        where = f"Two processes / one, {loop}, batch {case['batch']} a process"
        add(where, ratios(case["two"], case["one"]), "at least 1.85" if case["batch"] == 2048 else "")
    for (dataset, particles), runs in cases_of(parts.get("quality", {"runs": []})).items():
        seconds = {name: [run["seconds"] for run in runs if run["loop"] == name] for name in (FIT, EAGER, COMPILED)}
        if seconds[FIT]:
            best = min(statistics.mean(seconds[EAGER]), statistics.mean(seconds[COMPILED]))
            where = f"{dataset}, {objective(particles)}: seconds to a given log p(x), {FIT} / the better of the others"
            add(where, [took / best for took in seconds[FIT]], "at most 1.03")
    return report.table(["ratio", "measured", "goal"], rows) if rows else ""


COLOURS = {
    HAND: "#9a9a9a",
    HAND_COMPILED: "#6a6a6a",
    HAND_GRAPH: "#3a3a3a",
    HAND_COMPILED_GRAPH: "#000000",
    LIGHTNING: "#7d5ba6",
    STOCK: "#e0913f",
    PYTHAE: "#c0504d",
    EAGER: "#8db8dd",
    FIT: "#4a90d0",
    COMPILED: "#1f5fa8",
}


def draw(results: dict[str, dict[str, Measured]]) -> Figure | None:
    """Draws steps per second relative to hand-written PyTorch: a panel for each network and objective."""
    rows = [(device, name) for device in results for name in NETWORKS if name in results[device]]
    if not rows:
        return None
    particles = sorted({case["particles"] for d, name in rows for case in results[d][name]["cases"]})
    most = [max(len(by_objective(results[d][name]).get(k, [])) for d, name in rows) for k in particles]
    figure = Figure(figsize=(11, 0.6 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(
        len(rows), len(particles), squeeze=False, sharey="row", width_ratios=[max(n, 1.4) for n in most]
    )
    shown = {}
    for (device, network), panels in zip(rows, axes, strict=True):
        groups = by_objective(results[device][network])
        for k, ax in zip(particles, panels, strict=True):
            names = [name for name in COLOURS if all(name in case["ms"] for case in groups.get(k, []))]
            width = 0.84 / len(names)
            for at, case in enumerate(groups.get(k, [])):
                for i, name in enumerate(names):
                    low, middle, high = statistics.quantiles(
                        ratios(case["ms"][HAND], case["ms"][name]), n=4, method="inclusive"
                    )
                    place = at + (i - (len(names) - 1) / 2) * width
                    bar = ax.bar(place, middle, 0.94 * width, color=COLOURS[name], zorder=2)
                    ax.errorbar(
                        place, middle, [[middle - low], [high - middle]], color="black", linewidth=0.8, zorder=3
                    )
                    if name != HAND:
                        ax.annotate(
                            f"{middle:.2f}",
                            (place, high),
                            (0, 3),
                            textcoords="offset points",
                            ha="center",
                            fontsize=7,
                            rotation=90,
                        )
                    shown.setdefault(name, bar)
            ax.axhline(1, color="black", linewidth=0.8, zorder=1)
            ax.set_title(f"{SHORT[network]}, {objective(k)}" + (", on a GPU" if device == "cuda" else ""), fontsize=10)
            ax.margins(y=0.18)
            ax.set_xticks(range(len(groups.get(k, []))), [f"batch {case['batch']}" for case in groups.get(k, [])])
            ax.set_xlim(-0.55, max(len(groups.get(k, [])), 1) - 0.45)
            ax.tick_params(axis="x", length=0)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", linewidth=0.3)
            ax.set_axisbelow(True)
    figure.supylabel("steps per second, hand-written PyTorch = 1", fontsize=10)
    order = [name for name in COLOURS if name in shown]
    handles = [shown[name] for name in order]
    figure.legend(
        handles,
        order,
        loc="outside lower center",
        ncols=min(len(order), 6),
        frameon=False,
        fontsize=9,
        columnspacing=1.4,
    )
    return figure


def speed_section(results: dict[str, dict[str, Measured]]) -> str:
    """Returns the section of the README."""
    text = (
        "## Speed\n\n`python benchmarks/compare.py`: pyrovae, hand-written PyTorch, Lightning, stock Pyro and pythae "
        "take turns in one process; the docstring of the script describes each. Medians over rounds, with quartiles in "
        "brackets; ratios are taken within a round. The loss is in nats a datum, after the same number of steps, on "
        "the same data with the same noise: it shows that all train the same model equally well. Stock SVI has its "
        f"defaults, Pyro's validation included. All numbers: `{JSON.name}`.\n\n![steps per second relative to "
        f"hand-written PyTorch]({PICTURE.name})"
    )
    for device, parts in results.items():
        on = " on a GPU" if device == "cuda" else ""
        goals = goals_section(device, parts)
        text += f"\n\n### Goals{on}\n\n{goals}" if goals else ""
        for name, (_, section) in PARTS.items():
            if name in parts:
                text += f"\n\n{section(parts[name])}\n\n{parts[name]['machine']}"
    return text


def main(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the numbers, the picture and the section of the README."""
    logging.disable(logging.INFO)  # pythae's
    results = json.loads(JSON.read_text()) if JSON.exists() and not args.smoke else {}
    parts = results.setdefault(args.device, {})
    for name in args.only:
        measure, section = PARTS[name]
        pyro.set_rng_seed(0)
        parts[name] = {"machine": report.machine(args.device, PACKAGES), **measure(args)}
        print(section(parts[name]) + "\n", flush=True)
        if not args.smoke:
            JSON.write_text(json.dumps(results, indent=1) + "\n")
    print(goals_section(args.device, parts))
    text, figure = speed_section(results), draw(results)
    if not args.smoke:
        if figure is not None:
            figure.savefig(PICTURE, dpi=120)
        report.write("SPEED", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="parts to measure; the results of the others are kept",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where everything runs")
    parser.add_argument("--seconds", type=float, default=7, help="of hand-written PyTorch in each case, approximately")
    parser.add_argument("--epochs", type=int, default=3, help="epochs a round; the first is not timed")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512, 2048], help="for the ELBO")
    parser.add_argument("--iwae-batches", type=int, nargs="+", default=[64], help="for the IWAE bound")
    parser.add_argument("--particles", type=int, default=50, help="of the IWAE bound")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds of importance sampling and precision")
    parser.add_argument("--digits-epochs-a-round", type=int, default=30, help="epochs a round of the small step")
    parser.add_argument("--data-root", default="data", help="folder of MNIST")
    parser.add_argument("--images", type=int, default=20, help="images a round of importance sampling")
    parser.add_argument("--precision-images", type=int, default=100, help="images scored in two precisions")
    parser.add_argument("--digits-runs", type=int, default=5, help="seeds of digits trained in two precisions")
    parser.add_argument("--digits-epochs", type=int, default=300, help="their epochs")
    parser.add_argument("--num-samples", type=int, default=5000, help="samples an image, a multiple of each batch size")
    parser.add_argument("--pythae-batches", type=int, nargs="+", default=[100, 1000], help="of get_nll, 100 by default")
    parser.add_argument("--train-epochs", type=int, default=10, help="epochs of training before importance sampling")
    parser.add_argument("--repeats", type=int, default=3, help="first steps of each kind")
    parser.add_argument(
        "--process-batches", type=int, nargs="+", default=[128, 512, 2048], help="of each of two processes"
    )
    parser.add_argument("--runs", type=int, default=2, help="seeds of the time to a given quality")
    parser.add_argument("--smoke", action="store_true", help="a few short rounds, nothing written")
    args = parser.parse_args()
    args.most_epochs = MOST_EPOCHS
    if args.smoke:
        args.batches, args.iwae_batches, args.particles, args.epochs = [32, 128], [8], 5, 2
        args.digits_epochs_a_round = 6
        args.rounds, args.images, args.num_samples, args.pythae_batches = 2, 5, 1000, [100, 1000]
        args.process_batches, args.digits_runs, args.digits_epochs = [128], 2, 3
        args.precision_images, args.train_epochs, args.repeats, args.runs, args.most_epochs = 10, 1, 2, 1, 5
    if any(args.num_samples % b for b in args.pythae_batches):
        parser.error("pythae draws whole batches: make --num-samples a multiple of --pythae-batches")
    main(args)
