"""Time of a training step: ``pyrovae.fit`` beside hand-written PyTorch, stock Pyro and pythae's trainer.

The model is the MLP VAE 784-400-20-400-784 with Bernoulli pixels, the data binary and in memory, batches of 128 in a
new random order every epoch, Adam at a learning rate of 1e-3, float32. The four take turns in one process: a round is a
few short epochs of each, in an order that moves on from round to round. Each keeps its own weights throughout.

What is timed is the time from the end of a round's first epoch to the end of its last, everything the loop does
between steps and between epochs included. The first epoch of a round is left out for all four alike. For ``fit`` it
holds what a call does once (checks of the data, the model and the guide; a new optimizer), which would weigh more in
the short calls made here than in a real one: it is given apart.

    python benchmarks/step_time.py
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterator

import pyro
import report
import torch
from models import HIDDEN, LATENT, PIXELS, binary_images, pyrovae_vae, pythae_vae
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import pyrovae

BATCH = 128
LEARNING_RATE = 1e-3
GOALS = {"hand-written": 1.5, "stock SVI": 0.85}

# Trains for some epochs, calls mark() after each, and returns the mean loss of the last in nats a datum.
Train = Callable[[int, Callable[[], None]], float]


def shuffled_batches(x: Tensor) -> Iterator[Tensor]:
    """Yields the data in batches, in a new random order."""
    for rows in torch.randperm(len(x)).split(BATCH):
        yield x.index_select(0, rows)


def hand_written(x: Tensor) -> Train:
    """PyTorch as one writes it by hand: eager, the KL divergence in closed form, fused Adam."""
    encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LEARNING_RATE, fused=True)

    def train(epochs: int, mark: Callable[[], None]) -> float:
        for _ in range(epochs):
            total = 0.0
            for batch in shuffled_batches(x):
                loc, log_variance = encoder(batch).chunk(2, dim=-1)
                z = loc + (0.5 * log_variance).exp() * torch.randn_like(loc)
                reconstruction = F.binary_cross_entropy_with_logits(decoder(z), batch, reduction="sum")
                kl = 0.5 * (loc.square() + log_variance.exp() - 1 - log_variance).sum()
                loss = (reconstruction + kl) / len(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            mark()
        return total / len(x)

    return train


def stock_svi(x: Tensor) -> Train:
    """Pyro's own SVI, Trace_ELBO and Adam on pyrovae's model and guide."""
    vae = pyrovae_vae()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())

    def train(epochs: int, mark: Callable[[], None]) -> float:
        for _ in range(epochs):
            total = 0.0
            for batch in shuffled_batches(x):
                total += svi.step(batch)
            mark()
        return total / len(x)

    return train


def pyrovae_fit(x: Tensor) -> Train:
    """``pyrovae.fit`` as a user calls it, all defaults but the progress bar."""
    vae = pyrovae_vae()

    def train(epochs: int, mark: Callable[[], None]) -> float:
        history = pyrovae.fit(
            vae.model, vae.guide, x, epochs=epochs, batch_size=BATCH, callbacks=[lambda _: mark()], progress=False
        )
        return history["loss"][-1]

    return train


def pythae_trainer(x: Tensor) -> Train:
    """The training loop of pythae's trainer (``BaseTrainer.train_step``), without its progress bar.

    Its copy of the model after every epoch and its files are left out too.
    """
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler

    config = BaseTrainerConfig(per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE, no_cuda=True)
    trainer = BaseTrainer(pythae_vae(pyrovae_vae()), BaseDataset(x, torch.zeros(len(x))), training_config=config)
    trainer.set_optimizer()
    trainer.callback_handler = CallbackHandler([], trainer.model)

    def train(epochs: int, mark: Callable[[], None]) -> float:
        for epoch in range(epochs):
            loss = trainer.train_step(epoch)
            mark()
        return loss

    return train


def timed(train: Train, epochs: int, steps: int) -> tuple[float, float, float]:
    """Returns milliseconds a step after the first epoch, what the first took beyond that in all, and the last loss."""
    marks = [time.perf_counter()]
    loss = train(epochs, lambda: marks.append(time.perf_counter()))
    epoch = (marks[-1] - marks[1]) / (epochs - 1)
    return 1e3 * epoch / steps, 1e3 * (marks[1] - marks[0] - epoch), loss


def main(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the README's part."""
    pyro.set_rng_seed(0)
    logging.disable(logging.INFO)  # pythae's
    x = binary_images(args.steps * BATCH)
    contenders = {
        "hand-written": hand_written(x),
        "stock SVI": stock_svi(x),
        "fit": pyrovae_fit(x),
        "pythae": pythae_trainer(x),
    }
    names = list(contenders)
    step_ms, extra_ms, losses = ({name: [] for name in names} for _ in range(3))
    for i in tqdm(range(-1, args.rounds), desc="rounds"):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            step, extra, loss = timed(contenders[name], args.epochs, args.steps)
            if i >= 0:  # the first round warms up
                step_ms[name].append(step)
                extra_ms[name].append(extra)
                losses[name].append(loss)

    rows = []
    for name in names:
        ratios = [ours / theirs for ours, theirs in zip(step_ms["fit"], step_ms[name], strict=True)]
        rows.append(
            [
                name,
                report.quartiles(step_ms[name], 2),
                "" if name == "fit" else report.quartiles(ratios, 2),
                f"at most {GOALS[name]}" if name in GOALS else "",
                f"{losses[name][-1]:.1f}",
            ]
        )
    text = (
        "## A training step\n\n"
        f"`python benchmarks/step_time.py`: MLP VAE {PIXELS}-{HIDDEN}-{LATENT}-{HIDDEN}-{PIXELS}, batches of {BATCH}, "
        f"{args.rounds} rounds of {(args.epochs - 1) * args.steps} timed steps each, taking turns in one process. "
        "Medians over rounds, in brackets the quartiles; ratios are taken within a round. The last column, the loss in "
        "nats a datum in the last round, shows that all four train the same model. Stock SVI runs as it comes, with Pyro's validation; `fit` has checks of its "
        "own in its place.\n\n"
        + report.table(["loop", "ms / step", "fit / this", "goal", "loss"], rows)
        + f"\n\nOnce a call, `fit` took a further {statistics.median(extra_ms['fit']):.0f} ms, for its checks of "
        f"{len(x):,} data, the model and the guide.\n\n{report.machine()}"
    )
    print(text)
    if not args.smoke:
        report.write("STEP TIME", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="rounds that count")
    parser.add_argument("--epochs", type=int, default=3, help="epochs a round, the first of them not timed")
    parser.add_argument("--steps", type=int, default=50, help="steps an epoch")
    parser.add_argument("--smoke", action="store_true", help="a few short rounds, nothing written")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.epochs, args.steps = 3, 2, 10
    main(args)
