"""Data a second of ``pyrovae.fit`` in one process of a single thread, or in several processes.

compare.py runs this script. To run it alone:

    torchrun --standalone --nproc-per-node 2 benchmarks/processes.py --batch 128 --compile

The model is the MLP VAE of the other benchmarks; the batch size is that of each process. The result is the median over
all epochs but the first two, and includes everything that a process does between steps and between epochs.
"""

import argparse
import os
import statistics
import time
from itertools import pairwise

import pyro
import torch
from models import binary_images, pyrovae_vae

import pyrovae

DATA = 16_384  # an epoch, for each process


def main(args: argparse.Namespace) -> None:
    """Trains, and prints the data a second."""
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
        compile=args.compile or "auto",
        callbacks=[lambda _: ends.append(time.perf_counter())],
        progress=False,
    )
    if ends:  # only rank 0 calls callbacks
        seconds = statistics.median(b - a for a, b in pairwise(ends[1:]))
        print(f"{len(x) / seconds:.0f} data a second", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128, help="data a step of each process")
    parser.add_argument("--epochs", type=int, default=8, help="epochs; the first two are not timed")
    parser.add_argument("--compile", action="store_true")
    main(parser.parse_args())
