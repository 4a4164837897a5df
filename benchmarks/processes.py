"""Data a second of ``pyrovae.fit`` in one process of a single thread, or in several that work as one.

Run by compare.py; by itself: ``torchrun --standalone --nproc-per-node 2 benchmarks/processes.py --batch 128 --compile``. The MLP
VAE of the other benchmarks; the batch is that of each process. The median over epochs, but for the first two, and for all a
process does between steps and between epochs.
"""

import argparse
import os
import statistics
import time

import pyro
import torch
from models import binary_images, pyrovae_vae

import pyrovae

DATA = 16_384  # an epoch, for each process


def main(args: argparse.Namespace) -> None:
    """Trains, and prints how many data a second were trained on."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    pyro.set_rng_seed(0)
    steps = DATA // args.batch
    vae, x, ends = pyrovae_vae(), binary_images(args.batch * steps * processes), []
    pyrovae.fit(
        vae.model,
        vae.guide,
        x,
        epochs=args.epochs,
        batch_size=args.batch * processes,
        compile=args.compile,
        callbacks=[lambda _: ends.append(time.perf_counter())],
        progress=False,
    )
    if ends:  # callbacks are the first process's
        seconds = statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False))
        print(f"{len(x) / seconds:.0f} data a second", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="data a step of each process")
    parser.add_argument("--epochs", type=int, default=8, help="epochs, the first two of them not timed")
    parser.add_argument("--compile", action="store_true")
    main(parser.parse_args())
