"""Time, memory and accuracy of the estimators of log p(x), in five parts.

Importance sampling: `pyrovae.log_marginal` and pythae's `VAE.get_nll`. The model is the MLP VAE 784-400-20-400-784 with
Bernoulli pixels, trained for a few epochs; pythae's is built around the same networks. Both take the same number of
samples per image.

- Time: seconds per image; the two alternate in one process on the same images. `get_nll` is called without gradients
  (it does not disable them itself) and at several of its batch sizes, of which the fastest counts. A square matrix
  product is timed too, and the arithmetic of the networks in `log_marginal` (multiplications and additions in their
  matrix products only) is given as a share of its rate.
- Agreement: the means over all images and rounds, and the standard error of their difference from the spread between
  rounds.
- Memory: a new process holds the data, then estimates all of it in one call. Its peak is Linux's VmHWM, the largest
  resident memory. (Not `getrusage`: its peak includes that of the parent process.)

Annealing: annealed importance sampling of the same model, and an implementation in plain PyTorch for this decoder only,
with the same images, chains, temperatures, step sizes, leapfrog steps and number of gradients. The pilot run, which
finds step sizes and temperatures, is left out for both.

Accuracy: every estimator at several budgets on a VAE of digits, against long annealing from the prior, by the time per
datum.

MNIST: how far the usual protocol is off on models of real images (see images.py).

Trust: whether `UntilTrusted` is right, on a trained run (see trust.py).

    python benchmarks/estimators.py
    python benchmarks/estimators.py --only accuracy
"""

import argparse
import math
import multiprocessing
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import images
import pyro
import report
import torch
import trust
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from models import HIDDEN, LATENT, PIXELS, binary_images, pyrovae_vae, pythae_vae
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm.auto import tqdm

import pyrovae
from pyrovae import VAE, data, encoders, estimators, likelihoods, priors
from pyrovae.estimators.task import open_task

GOALS = {"importance": 3.0, "annealing": 1.3, "memory": 2000}  # times as fast, times as long, MB
SQUARE = 2048
CHAINS, LEAPFROG, SIZES = 32, 2, (5, 20, 100)  # of annealing, as the library has them; and images at once
GOAL_SIZE = 100  # log_marginal takes some 120 at once
PICTURE = Path(__file__).with_suffix(".png")

Contenders = dict[str, Callable[[], Any]]


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long a call took and what it returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def take_turns(contenders: Contenders, rounds: int, what: str) -> tuple[dict[str, list[float]], dict[str, list]]:
    """Returns the seconds and the results of every round, by contender, after a round to warm up."""
    names = list(contenders)
    times, results = ({name: [] for name in names} for _ in range(2))
    with torch.no_grad():
        for i in tqdm(range(-1, rounds), desc=what):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                took, result = seconds(contenders[name])
                if i >= 0:
                    times[name].append(took)
                    results[name].append(result)
    return times, results


def ratios(these: list[float], those: list[float]) -> list[float]:
    """Returns ratios within each round."""
    return [a / b for a, b in zip(these, those, strict=True)]


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Returns how far the means over rounds are apart, with the standard error: a round's estimates are independent."""
    error = math.sqrt(sum(statistics.variance(means) / len(means) for means in (ours, theirs)))
    return statistics.mean(ours) - statistics.mean(theirs), error


def trained(images: int, epochs: int) -> tuple[VAE, Tensor]:
    """Returns the VAE of :mod:`models` after some epochs, and that many of the images it saw."""
    vae, x = pyrovae_vae(), binary_images(12_800)
    pyrovae.fit(vae.model, vae.guide, x, epochs=epochs, progress=False)
    return vae, x[:images]


# Importance sampling, beside pythae.


def flop_an_image(vae: VAE, num_samples: int) -> int:
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


def importance(args: argparse.Namespace) -> str:
    """Returns the README's part on importance sampling."""
    vae, x = trained(args.images, args.epochs)
    theirs, square = pythae_vae(vae).eval(), torch.randn(SQUARE, SQUARE)

    def get_nll(batch_size: int, gradients: bool = False) -> float:
        with torch.set_grad_enabled(gradients):
            return theirs.get_nll(
                x, n_samples=args.num_samples, batch_size=batch_size
            )  # the mean of log p(x), not negated

    contenders = {
        "pyrovae": lambda: pyrovae.log_marginal(vae.model, vae.guide, x, num_samples=args.num_samples, progress=False),
        "matrix product": lambda: square @ square,
        # As its users call it: it does not switch gradients off itself.
        "pythae, batch size 100, with gradients": lambda: get_nll(100, gradients=True),
        **{f"pythae, batch size {b}": lambda b=b: get_nll(b) for b in args.batch_sizes},
    }
    times, results = take_turns(contenders, args.rounds, "importance sampling")

    names = [name for name in times if name.startswith("pythae")]
    best = min(names, key=lambda name: statistics.median(times[name]))
    rows = [["pyrovae", report.quartiles([1e3 * t / len(x) for t in times["pyrovae"]], 1), "", ""]]
    for name in names:
        per_image = report.quartiles([1e3 * t / len(x) for t in times[name]], 1)
        goal = f"at least {GOALS['importance']:g}" if name == best else ""
        label = name + (" (its best)" if name == best else "")
        rows.append([label, per_image, report.quartiles(ratios(times[name], times["pyrovae"]), 1), goal])
    flop = flop_an_image(vae, args.num_samples) * len(x)
    rates = [flop / took / 1e9 for took in times["pyrovae"]]
    square_rates = [2 * SQUARE**3 / took / 1e9 for took in times["matrix product"]]
    shares = [100 * share for share in ratios(rates, square_rates)]

    our_means = [estimate.value.mean().item() for estimate in results["pyrovae"]]
    their_means = [mean for name in names for mean in results[name]]
    apart, error = difference(our_means, their_means)
    untrusted = int((~results["pyrovae"][-1].trusted).sum())
    before, peak, took = in_fresh_process(memory, args.memory_images, args.num_samples)
    return (
        "## log p(x)\n\n"
        f"`python benchmarks/estimators.py --only importance`: MLP VAE {PIXELS}-{HIDDEN}-{LATENT}-{HIDDEN}-{PIXELS}, "
        f"{args.num_samples:,} samples an image, the same weights in both libraries. {args.rounds} rounds of {len(x)} "
        "images each, taking turns in one process; medians over rounds, in brackets the quartiles; ratios are taken "
        "within a round.\n\n"
        + report.table(["estimator", "ms / image", "this / pyrovae", "goal"], rows)
        + f"\n\nThe matrix products in `log_marginal` ran at {report.quartiles(rates, 0)} GFLOP/s, all its other work "
        f"counted as time; one of {SQUARE} x {SQUARE} alone at {report.quartiles(square_rates, 0)}. A share of "
        f"{report.quartiles(shares, 0)} %.\n\n"
        f"The mean log p(x) over the images and all rounds: pyrovae {statistics.mean(our_means):.4f}, pythae "
        f"{statistics.mean(their_means):.4f} nats. They differ by {apart:+.4f}, {abs(apart) / error:.1f} "
        f"standard errors of the difference ({error:.4f}; goal: below 4). Pareto k-hat is above 0.7 for {untrusted} of "
        f"{len(x)} images.\n\n"
        + report.table(
            ["memory", "MB", "goal"],
            [
                ["before: imports, data, model", f"{before:.0f}", ""],
                [f"peak, {args.memory_images:,} images in one call", f"{peak:.0f}", f"below {GOALS['memory']}"],
                ["added by the call, at most", f"{peak - before:.0f}", ""],
            ],
        )
        + f"\n\nThat call took {took:.0f} s, {1e3 * took / args.memory_images:.1f} ms an image.\n\n{report.machine()}"
    )


# Annealing, beside what one would write by hand for one model.


def annealed_by_hand(
    decoder: nn.Module, x: Tensor, betas: Tensor, sizes: Tensor, chains: int, num_leapfrog: int
) -> Tensor:
    """Returns log p(x) of binary images by annealing from the standard normal prior, ``(batch,)``.

    Temperatures have shape ``(temperatures + 1, batch)``, the sizes of steps ``(temperatures + 1, batch, latent_dim)``.
    """
    x = x.expand(chains, *x.shape)

    def likelihood(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            log_p = -binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(-1)
            return log_p.detach(), torch.autograd.grad(log_p.sum(), z)[0]

    z = torch.randn(*x.shape[:2], LATENT)
    log_p, gradient = likelihood(z)
    log_w = torch.zeros(x.shape[:2], dtype=torch.float64)
    last = len(betas) - 1
    for t in range(1, last + 1):
        log_w += (betas[t] - betas[t - 1]) * log_p
        if t == last:
            break
        beta = betas[t].unsqueeze(-1)
        size = sizes[t] * torch.empty_like(z[..., :1]).uniform_(0.8, 1.2)
        momentum = torch.randn_like(z)
        there, gradient_there = z, gradient
        pushed = momentum + 0.5 * size * (beta * gradient_there - there)
        for i in range(num_leapfrog):
            there = there + size * pushed
            log_p_there, gradient_there = likelihood(there)
            pushed = pushed + (1.0 if i < num_leapfrog - 1 else 0.5) * size * (beta * gradient_there - there)
        kinetic = 0.5 * (momentum.square() - pushed.square() + z.square() - there.square()).sum(-1)
        accepted = torch.rand_like(log_p).log() < kinetic + betas[t] * (log_p_there - log_p)
        z = torch.where(accepted.unsqueeze(-1), there, z)
        gradient = torch.where(accepted.unsqueeze(-1), gradient_there, gradient)
        log_p = torch.where(accepted, log_p_there, log_p)
    return log_w.logsumexp(0) - math.log(chains)


def gradients_in(function: Callable[[], Any], decoder: nn.Module) -> int:
    """Returns how many times a call runs the decoder for a gradient."""
    count = 0

    def see(*_: Any) -> None:
        nonlocal count
        count += torch.is_grad_enabled()

    handle = decoder.register_forward_hook(see)
    function()
    handle.remove()
    return count


def annealing(args: argparse.Namespace) -> str:
    """Returns the README's part on annealing."""
    vae, images = trained(max(SIZES), args.epochs)
    decoder = vae.likelihood.network
    method = estimators.AnnealedImportanceSampling(CHAINS, args.temperatures, LEAPFROG)
    rows = []
    for size in SIZES:
        x = images[:size]
        with open_task(vae.model, None, method, (x,), {}, max_memory=1e9, progress=False) as task, torch.no_grad():
            target, path, betas = method._prepare(task)
            sizes = torch.stack([step.unsqueeze(-1) * scale for step, scale in map(path.at, betas)])
            contenders = {
                "pyrovae": lambda: method._run(target, path, betas, target.draw(CHAINS), task, CHAINS).value,
                "by hand": lambda: annealed_by_hand(decoder, x, betas, sizes, CHAINS, LEAPFROG),
            }
            gradients = [gradients_in(contender, decoder) for contender in contenders.values()]
            if gradients[0] != gradients[1]:
                raise RuntimeError(
                    f"pyrovae took {gradients[0]} gradients, the other {gradients[1]}: no fair comparison."
                )
            times, results = take_turns(contenders, args.rounds, f"annealing, {size} images")
        ours, theirs = (times[name] for name in contenders)
        per_gradient = [
            report.quartiles([1e6 * t / (size * CHAINS * gradients[0]) for t in spent], 2) for spent in (ours, theirs)
        ]
        apart, error = difference(*([v.mean().item() for v in results[name]] for name in contenders))
        goal = f"at most {GOALS['annealing']:g}" if size == GOAL_SIZE else ""
        agreement = f"{apart:+.3f} ({error:.3f})"
        rows.append([f"{size}", *per_gradient, report.quartiles(ratios(ours, theirs), 2), goal, agreement])
    header = [
        "images",
        "pyrovae, µs / gradient",
        "by hand, µs / gradient",
        "pyrovae / by hand",
        "goal",
        "difference, nats",
    ]
    return (
        "## Annealing\n\n"
        "`python benchmarks/estimators.py --only annealing`: annealed importance sampling from the prior, by pyrovae "
        f"for any model and in plain PyTorch for this one, the MLP VAE {PIXELS}-{HIDDEN}-{LATENT}-{HIDDEN}-{PIXELS}. "
        f"{CHAINS} chains per image, {args.temperatures} temperatures, {LEAPFROG} leapfrog steps, the same step sizes "
        f"and temperatures: both took {gradients[0]} gradients per chain. Time is that of the main run, per image, "
        f"chain and gradient. {args.rounds} rounds for each number of images at once, alternating in one process; "
        "medians over rounds, in brackets the quartiles; ratios are taken within a round. The last column is the "
        "difference of the two means of log p(x) over all rounds, in brackets its standard error.\n\n"
        + report.table(header, rows)
        + f"\n\nWhat Pyro's handlers cost is the same for any number of chains.\n\n{report.machine()}"
    )


# Accuracy against time, of all estimators.


class Score(NamedTuple):
    """What one estimator at one budget got for its time.

    Args:
        line: the estimator.
        budget: what it was given.
        seconds: a datum.
        error: root of the mean squared error over data and repeats, the reference's own taken off, in nats; zero where
            nothing is left.
        stated: root of the mean square of its standard errors, in nats.
        untrusted: share of data that it says are not to be trusted.
        above: mean distance above the reference, in nats.
    """

    line: str
    budget: str
    seconds: float
    error: float
    stated: float
    untrusted: float
    above: float


def digits(epochs: int) -> tuple[VAE, Tensor]:
    """Returns the VAE that the README's first command trains, and the test images."""
    train, validation, test = data.load("digits")
    vae = VAE(priors.StandardNormal(16), likelihoods.Bernoulli(16, (1, 8, 8)), encoders.DiagonalNormal((1, 8, 8), 16))
    pyrovae.fit(
        vae.model,
        vae.guide,
        train.x,
        transform=data.dynamic_binarization,
        validation=data.static_binarization(validation.x),
        patience=50,
        epochs=epochs,
    )
    return vae, data.static_binarization(test.x)


def methods(args: argparse.Namespace) -> list[tuple[str, str, estimators.Estimator]]:
    """Returns every estimator at every budget: what it is, what it is given, and itself."""
    weighted = {
        "IS, guide": lambda k: estimators.ImportanceSampling(k),
        "IS, guide, smoothed": lambda k: estimators.ImportanceSampling(k, smoothed=True),
        "IS, widened": lambda k: estimators.ImportanceSampling(k, estimators.Widened()),
        "IS, mixed": lambda k: estimators.ImportanceSampling(k, estimators.Mixed()),
        "IS, refined": lambda k: estimators.ImportanceSampling(k, estimators.Refined()),
        "CUBO": lambda k: estimators.CUBO(k),
    }
    annealed = {
        "AIS, prior": {},
        "AIS, prior, sigmoid": {"schedule": estimators.Sigmoid()},
        "AIS, prior, linear": {"schedule": estimators.Linear()},
        "AIS, guide": {"start": estimators.Guide()},
    }
    moved = {"SMC, prior": {}, "SMC, guide": {"start": estimators.Guide()}}
    return [
        *((name, f"{k:,} samples", build(k)) for name, build in weighted.items() for k in args.samples),
        *(
            (name, f"{t:,} temperatures", estimators.AnnealedImportanceSampling(num_temperatures=t, **options))
            for name, options in annealed.items()
            for t in args.steps
        ),
        *(
            (name, f"{n} particles", estimators.SequentialMonteCarlo(num_particles=n, **options))
            for name, options in moved.items()
            for n in args.particles
        ),
    ]


def scored(
    name: str, budget: str, runs: Sequence[tuple[float, estimators.Estimate]], reference: estimators.Estimate
) -> Score:
    """Returns how an estimator did over some runs."""
    apart = torch.stack([estimate.value - reference.value for _, estimate in runs]).double()
    own = reference.standard_error.double().square().mean()
    stated = torch.stack([estimate.standard_error for _, estimate in runs]).square().mean().sqrt()
    untrusted = torch.stack([~estimate.trusted for _, estimate in runs]).float().mean()
    took = statistics.median(took for took, _ in runs) / len(reference.value)
    error = (apart.square().mean() - own).clamp(min=0).sqrt()
    return Score(name, budget, took, error.item(), stated.item(), untrusted.item(), apart.mean().item())


def draw(scores: Sequence[Score], resolution: float) -> Figure:
    """Draws error against seconds a datum, one line an estimator, as far down as the reference can tell."""
    families = {"IS": "Blues", "AIS": "Reds", "SMC": "Greens"}
    markers = "osD^v"
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    ax = figure.subplots()
    lines = list(dict.fromkeys(score.line for score in scores))
    for family, shades in families.items():
        own = [line for line in lines if line.split(",")[0] == family]
        for i, line in enumerate(own):
            colour = colormaps[shades](0.95 - 0.55 * i / len(own))
            points = [(score.seconds, max(score.error, resolution)) for score in scores if score.line == line]
            seen = [error > resolution for _, error in points]
            # Along the bottom a line would say that nothing is gained, where the reference cannot tell.
            end = len(points) if all(seen) else seen.index(False) + 1
            ax.plot(*zip(*points[:end], strict=True), color=colour, linewidth=1.3)
            for (x, y), solid in zip(points, seen, strict=True):
                ax.plot(x, y, marker=markers[i], markersize=6, color=colour, mfc=colour if solid else "white")
            ax.plot([], [], color=colour, marker=markers[i], label=line)
    ax.axhline(resolution, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    ax.text(
        0.99,
        0.9 * resolution,
        "the reference's own error (hollow: this good, or better)",
        transform=ax.get_yaxis_transform(),
        color="grey",
        fontsize="small",
        ha="right",
        va="top",
    )
    ax.set(xscale="log", yscale="log", xlabel="seconds a datum", ylabel="root-mean-square error of log p(x) (nats)")
    ax.set_ylim(bottom=0.7 * resolution)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    ax.grid(linewidth=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def accuracy(args: argparse.Namespace) -> str:
    """Returns the README's part on accuracy, after drawing its picture."""
    vae, x = digits(args.digits_epochs)
    x = x[: args.data]
    long = estimators.AnnealedImportanceSampling(*args.reference)
    took, reference = seconds(lambda: pyrovae.log_marginal(vae.model, None, x, method=long))
    contenders = methods(args)
    runs = [[] for _ in contenders]
    for _ in range(args.repeats):
        # In a random order, so that other load on the machine does not fall on one estimator.
        for i in tqdm(random.sample(range(len(contenders)), len(contenders)), desc="accuracy"):
            method = contenders[i][2]
            runs[i].append(
                seconds(lambda: pyrovae.log_marginal(vae.model, vae.guide, x, method=method, progress=False))
            )
    scores = [scored(*contender[:2], run, reference) for contender, run in zip(contenders, runs, strict=True)]
    resolution = reference.standard_error.square().mean().sqrt().item()
    estimates = [score for score in scores if score.line != "CUBO"]
    figure = draw(estimates, resolution)
    if not args.smoke:
        figure.savefig(PICTURE, dpi=120)

    rows = [
        [
            score.line,
            score.budget,
            f"{score.seconds:.4f}",
            f"{score.error:.3f}" if score.error > resolution else f"below {resolution:.3f}",
            f"{score.stated:.3f}",
            f"{100 * score.untrusted:.0f} %",
        ]
        for score in estimates
    ]
    bounds = [
        [score.budget, f"{score.seconds:.4f}", f"{score.above:+.3f}", f"{100 * score.untrusted:.0f} %"]
        for score in scores
        if score.line == "CUBO"
    ]
    chains, temperatures, leapfrog = args.reference
    return (
        "## Accuracy\n\n"
        "`python benchmarks/estimators.py --only accuracy`: every estimator on the VAE of digits that the README's "
        f"first command trains (16 latent dimensions), {len(x)} test images in one call, {args.repeats} calls each. "
        f"The reference is annealing from the prior with {chains} chains, {temperatures:,} temperatures and {leapfrog} "
        f"leapfrog steps, mean log p(x) {reference.value.mean():.3f} nats; it took {took / len(x):.1f} s a datum, and "
        f"its standard error is {resolution:.3f} nats a datum. The error is the root mean squared difference over data "
        "and calls, minus the square of the reference's error; the stated error is the root mean square of "
        "`standard_error`; the last column is the share of data that `trusted` rejects. Seconds are medians, with the "
        f"pilot run of annealing and the tuning of a proposal. IS is `ImportanceSampling`, AIS {CHAINS} chains of "
        "`AnnealedImportanceSampling` (with the adaptive schedule unless named), "
        f"SMC {estimators.SequentialMonteCarlo().num_samples} runs of `SequentialMonteCarlo`.\n\n"
        f"![error against seconds a datum, one line per estimator]({PICTURE.name})\n\n"
        + report.table(["estimator", "budget", "s / datum", "error, nats", "stated, nats", "not trusted"], rows)
        + "\n\nA CUBO (order 2) is an upper bound, given enough samples; by its mean distance above the reference:\n\n"
        + report.table(["budget", "s / datum", "above, nats", "not trusted"], bounds)
        + f"\n\n{report.machine()}"
    )


PARTS = {
    "importance": ("LOG MARGINAL", importance),
    "annealing": ("ANNEALING", annealing),
    "accuracy": ("ACCURACY", accuracy),
    "mnist": ("MNIST", images.trusted_scores),
    "trust": ("TRUST", trust.trust),
}


def main(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the README's parts."""
    for name in args.only:
        marker, measure = PARTS[name]
        pyro.set_rng_seed(0)
        text = measure(args)
        print(text, flush=True)
        if not args.smoke:
            report.write(marker, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--rounds", type=int, default=12, help="rounds that count")
    parser.add_argument("--images", type=int, default=20, help="images a round of importance sampling")
    parser.add_argument("--num-samples", type=int, default=5000, help="samples an image, a multiple of each batch size")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[100, 1000, 5000], help="for pythae")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of training before")
    parser.add_argument("--memory-images", type=int, default=10_000, help="images in the call whose memory is measured")
    parser.add_argument("--temperatures", type=int, default=25, help="of annealing, beside the one by hand")
    parser.add_argument("--data-root", default="data", help="where MNIST and Fashion-MNIST are")
    parser.add_argument("--fashion-root", help="where Fashion-MNIST is, if it is elsewhere")
    parser.add_argument("--test-images", type=int, default=200, help="test images of MNIST and Fashion-MNIST")
    sets, kinds = list(images.DATA_SETS), list(images.MODELS)
    parser.add_argument("--data-sets", nargs="+", choices=sets, default=sets, help="of real images")
    parser.add_argument("--models", nargs="+", choices=kinds, default=kinds, help="of real images")
    parser.add_argument("--checked", type=int, default=20, help="those that long annealing scores too")
    parser.add_argument("--run", default="runs/mnist-gated", help="a run on MNIST, for the part on trust")
    parser.add_argument("--run-images", type=int, default=10_000, help="its test images that are scored")
    parser.add_argument("--long-images", type=int, default=200, help="those that long annealing scores too")
    parser.add_argument("--simulated-images", type=int, default=100, help="data drawn from the model")
    parser.add_argument("--results", default="runs/trust", help="where results are saved, from which it goes on")
    parser.add_argument("--data", type=int, default=60, help="test images for the accuracy")
    parser.add_argument("--repeats", type=int, default=2, help="calls of each estimator for the accuracy")
    parser.add_argument("--smoke", action="store_true", help="a few short rounds, nothing written")
    args = parser.parse_args()
    args.digits_epochs, args.reference = 500, (100, 1000, 3)
    args.long, args.bidirectional = (100, 2000), (100, 2000)
    args.samples, args.steps, args.particles = (100, 1000, 10_000, 30_000), (10, 40, 160, 640), (4, 8, 16, 32)
    if args.smoke:
        args.rounds, args.images, args.num_samples, args.batch_sizes = 2, 5, 1000, [100, 1000]
        args.epochs, args.memory_images, args.temperatures = 1, 100, 5
        args.data, args.repeats, args.digits_epochs, args.reference = 10, 1, 5, (20, 50, 2)
        args.run_images, args.long_images, args.simulated_images = 20, 2, 2
        args.long, args.bidirectional, args.results = (20, 50), (20, 50), tempfile.mkdtemp()
        args.samples, args.steps, args.particles = (100, 1000), (5, 20), (4, 8)
    if any(args.num_samples % b for b in args.batch_sizes):
        parser.error("pythae draws a whole number of batches: make --num-samples a multiple of each of --batch-sizes")
    main(args)
