"""Time and memory of ``pyrovae.log_marginal`` beside pythae's ``VAE.get_nll``, and whether the two agree.

The model is the MLP VAE 784-400-20-400-784 with Bernoulli pixels, trained for a few epochs; pythae's is built around
the very same networks. Both estimate log p(x) by importance sampling, with as many samples an image.

- Time: seconds an image, the two taking turns in one process on the same images. ``get_nll`` is called without
  gradients (it does not see to that itself) and at several of its batch sizes, of which the best counts. A square
  matrix product takes its turn too, and the arithmetic of the networks in ``log_marginal`` (multiplications and
  additions in their matrix products, nothing else) is given as a share of its rate.
- Agreement: the means over all images and rounds, and the standard error of their difference from the spread between
  rounds.
- Memory: a fresh process holds the data, then estimates all of it in one call. Its peak is what Linux calls VmHWM, the
  most memory resident at any one time. (``getrusage`` would not do: its peak includes that of the parent process.)

    python benchmarks/log_marginal.py
"""

import argparse
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import report
import torch
from models import HIDDEN, LATENT, PIXELS, binary_images, pyrovae_vae, pythae_vae
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyrovae

MEMORY_GOAL = 2000  # MB
SQUARE = 2048


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long a call took and what it returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def flop_an_image(vae: pyrovae.VAE, num_samples: int) -> int:
    """Returns the arithmetic in the matrix products: the encoder once, the decoder for every sample."""

    def weights(module: nn.Module) -> int:
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

    return 2 * (weights(vae.encoder) + num_samples * weights(vae.likelihood))


def resident(entry: str) -> float:
    """Returns VmRSS (memory resident now) or VmHWM (its peak so far) of this process in MB; Linux only."""
    kilobytes = re.search(rf"{entry}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
    return int(kilobytes) * 1024 / 1e6


def memory(images: int, num_samples: int) -> tuple[float, float, float]:
    """Returns memory before and its peak after estimating that many images, in MB, and the seconds it took."""
    x, vae = binary_images(images), pyrovae_vae()
    before = resident("VmRSS")
    took, _ = seconds(lambda: pyrovae.log_marginal(vae.model, vae.guide, x, num_samples=num_samples))
    return before, resident("VmHWM"), took


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """Calls a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def compare(vae: pyrovae.VAE, x: Tensor, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list]]:
    """Takes turns; returns the seconds of every round and the estimates of every round, by contender."""
    theirs, square = pythae_vae(vae).eval(), torch.randn(SQUARE, SQUARE)

    def get_nll(batch_size: int) -> float:
        return theirs.get_nll(x, n_samples=args.num_samples, batch_size=batch_size)  # the mean of log p(x), not negated

    contenders = {
        "pyrovae": lambda: pyrovae.log_marginal(vae.model, vae.guide, x, num_samples=args.num_samples, progress=False),
        "matrix product": lambda: square @ square,
        **{f"pythae, batch size {b}": lambda b=b: get_nll(b) for b in args.batch_sizes},
    }
    names = list(contenders)
    times, results = ({name: [] for name in names} for _ in range(2))
    with torch.no_grad():
        for i in tqdm(range(-1, args.rounds), desc="rounds"):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                took, result = seconds(contenders[name])
                if i >= 0:  # the first round warms up
                    times[name].append(took)
                    results[name].append(result)
    return times, results


def main(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the README's part."""
    pyro.set_rng_seed(0)
    vae, data = pyrovae_vae(), binary_images(12_800)
    pyrovae.fit(vae.model, vae.guide, data, epochs=args.epochs, progress=False)
    x = data[: args.images]
    times, results = compare(vae, x, args)

    theirs = [name for name in times if name.startswith("pythae")]
    best = min(theirs, key=lambda name: statistics.median(times[name]))
    time_ratios = {
        name: [other / ours for other, ours in zip(times[name], times["pyrovae"], strict=True)] for name in theirs
    }
    flop = flop_an_image(vae, args.num_samples) * len(x)
    rates = [flop / took / 1e9 for took in times["pyrovae"]]
    square_rates = [2 * SQUARE**3 / took / 1e9 for took in times["matrix product"]]
    shares = [100 * ours / square for ours, square in zip(rates, square_rates, strict=True)]

    # Spread over rounds, for a round's estimates are independent of the next round's.
    our_means = [estimate.value.mean().item() for estimate in results["pyrovae"]]
    their_means = [mean for name in theirs for mean in results[name]]
    difference = statistics.mean(our_means) - statistics.mean(their_means)
    error = math.sqrt(sum(statistics.variance(means) / len(means) for means in (our_means, their_means)))
    untrusted = int((results["pyrovae"][-1].khat > 0.7).sum())

    before, peak, took = in_fresh_process(memory, args.memory_images, args.num_samples)

    time_rows = [["pyrovae", report.quartiles([1e3 * t / len(x) for t in times["pyrovae"]], 1), ""]]
    for name in theirs:
        per_image = report.quartiles([1e3 * t / len(x) for t in times[name]], 1)
        label = name + (" (its best)" if name == best else "")
        time_rows.append([label, per_image, report.quartiles(time_ratios[name], 1)])
    text = (
        "## log p(x)\n\n"
        f"`python benchmarks/log_marginal.py`: MLP VAE {PIXELS}-{HIDDEN}-{LATENT}-{HIDDEN}-{PIXELS}, "
        f"{args.num_samples:,} samples an image, the same weights in both libraries. {args.rounds} rounds of {len(x)} "
        "images each, taking turns in one process; medians over rounds, in brackets the quartiles; ratios are taken "
        "within a round.\n\n"
        + report.table(["estimator", "ms / image", "this / pyrovae"], time_rows)
        + f"\n\nThe matrix products in `log_marginal` ran at {report.quartiles(rates, 0)} GFLOP/s, all its other work "
        f"counted as time; one of {SQUARE} x {SQUARE} alone at {report.quartiles(square_rates, 0)}. A share of "
        f"{report.quartiles(shares, 0)} %.\n\n"
        f"The mean log p(x) over the images and all rounds: pyrovae {statistics.mean(our_means):.4f}, pythae "
        f"{statistics.mean(their_means):.4f} nats. They differ by {difference:+.4f}, {abs(difference) / error:.1f} "
        f"standard errors of the difference ({error:.4f}; goal: below 4). Pareto k-hat is above 0.7 for {untrusted} of "
        f"{len(x)} images.\n\n"
        + report.table(
            ["memory", "MB", "goal"],
            [
                ["before: imports, data, model", f"{before:.0f}", ""],
                [f"peak, {args.memory_images:,} images in one call", f"{peak:.0f}", f"below {MEMORY_GOAL}"],
                ["added by the call, at most", f"{peak - before:.0f}", ""],
            ],
        )
        + f"\n\nThat call took {took:.0f} s, {1e3 * took / args.memory_images:.1f} ms an image.\n\n{report.machine()}"
    )
    print(text)
    if not args.smoke:
        report.write("LOG MARGINAL", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="rounds that count")
    parser.add_argument("--images", type=int, default=20, help="images a round")
    parser.add_argument("--num-samples", type=int, default=5000, help="samples an image, a multiple of each batch size")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[100, 1000, 5000], help="for pythae")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training before")
    parser.add_argument("--memory-images", type=int, default=10_000, help="images in the call whose memory is measured")
    parser.add_argument("--smoke", action="store_true", help="a few short rounds, nothing written")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.images, args.num_samples, args.batch_sizes = 2, 5, 1000, [100, 1000]
        args.epochs, args.memory_images = 1, 100
    if any(args.num_samples % b for b in args.batch_sizes):
        parser.error("pythae draws a whole number of batches: make --num-samples a multiple of each of --batch-sizes")
    main(args)
