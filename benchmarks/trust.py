"""Whether trusted log p(x) is right: all test images of a trained run, long annealing, and data drawn from the model.

    python benchmarks/estimators.py --only trust --run runs/mnist-gated --data-root data

Results are saved a few images at a time, so that a measurement that was stopped goes on. Several processes may share
it: each takes the images that no other has begun.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import report
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyrovae
from pyrovae import data
from pyrovae.estimators import AnnealedImportanceSampling, Estimate, UntilTrusted, bidirectional

AT_ONCE = {"whole": 1000, "long": 10, "simulated": 10}
SEED = 2  # of the binarisation


def measured(name: str, total: int, args: argparse.Namespace, measure: Callable[[int, int], dict[str, Tensor]]) -> dict:
    """Returns what is measured of all images, some at a time: from files, where there are any."""
    directory = Path(args.results) / name
    directory.mkdir(parents=True, exist_ok=True)
    names = [(first, min(first + AT_ONCE[name], total)) for first in range(0, total, AT_ONCE[name])]
    for first, end in names:
        path, begun = (directory / f"{first:05}-{end:05}{suffix}" for suffix in (".safetensors", ".begun"))
        try:
            begun.touch(exist_ok=path.exists())
        except FileExistsError:  # by another process
            continue
        if path.exists():
            continue
        try:
            pyro.set_rng_seed(first)
            began = time.process_time()
            columns = measure(first, end)
            columns["seconds"] = torch.full((end - first,), (time.process_time() - began) / (end - first))
            save_file({key: value.contiguous() for key, value in columns.items()}, path)
        finally:
            if not path.exists():
                begun.unlink()
        print(name, first, end, f"{columns['seconds'][0]:.3f} CPU seconds an image", flush=True)
    parts = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} if parts else {}


def columns_of(estimate: Estimate, name: str = "") -> dict[str, Tensor]:
    """Returns the tensors of an estimate by name."""
    columns = {key: getattr(estimate, key) for key in ("value", "standard_error", "ess", "khat", "trusted")}
    columns |= {key: estimate.diagnostics[key] for key in ("stage",) if key in estimate.diagnostics}
    return {name + key: value for key, value in columns.items()}


def whole(vae: Any, x: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Scores all test images."""

    def measure(first: int, end: int) -> dict[str, Tensor]:
        return columns_of(score(vae, x[first:end]))

    return measured("whole", len(x), args, measure)


def score(vae: Any, x: Tensor) -> Estimate:
    return pyrovae.log_marginal(vae.model, vae.guide, x, method=UntilTrusted(), progress=False)


def long(vae: Any, x: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Scores the first test images by long annealing from the prior, which shares neither guide nor modes."""
    method = AnnealedImportanceSampling(*args.long)

    def measure(first: int, end: int) -> dict[str, Tensor]:
        return columns_of(pyrovae.log_marginal(vae.model, None, x[first:end], method=method, progress=False))

    return measured("long", args.long_images, args, measure)


def simulated(vae: Any, x: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Scores data drawn from the model, and encloses their log p(x) by annealing forwards and backwards."""
    method = AnnealedImportanceSampling(*args.bidirectional)

    def measure(first: int, end: int) -> dict[str, Tensor]:
        bracket = bidirectional(vae.model, vae.guide, x[first:end], method=method, progress=False)
        found = columns_of(score(vae, bracket.args[0]))
        return found | columns_of(bracket.lower, "lower_") | columns_of(bracket.upper, "upper_")

    return measured("simulated", args.simulated_images, args, measure)


def enclosed(drawn: dict[str, Tensor]) -> tuple[int, int]:
    """Returns how many scores are within the bounds, by three standard errors, and near the lower one, by 1.96."""
    value = drawn["value"].double()
    below, above = (
        (drawn["standard_error"].square() + drawn[f"{side}_standard_error"].square()).double().sqrt()
        for side in ("lower", "upper")
    )
    inside = (value > drawn["lower_value"] - 3 * below) & (value < drawn["upper_value"] + 3 * above)
    covered = (value - drawn["lower_value"]).abs() < 1.96 * below
    return int(inside.sum()), int(covered.sum())


def trusted_run(args: argparse.Namespace) -> tuple[Any, Tensor]:
    """Returns the model of a run, and the test images of MNIST, binarised once."""
    vae = pyrovae.load_run(args.run)[0].eval()
    return vae, data.static_binarization(data.load("mnist", args.data_root).test.x[: args.run_images], SEED)


def trust(args: argparse.Namespace) -> str:
    """Returns the README's part on whether what is trusted is right."""
    vae, x = trusted_run(args)
    found = whole(vae, x, args)
    check, drawn = long(vae, x, args), simulated(vae, x, args)
    n, error = len(found["value"]), found["standard_error"].double()
    median, high = error.quantile(0.5).item(), error.quantile(0.99).item()
    off = (check["value"] - found["value"][: args.long_images])[check["trusted"]].double()
    errors = check["standard_error"].square() + found["standard_error"][: args.long_images].square()
    its_error = errors[check["trusted"]].double().sum().sqrt().item() / max(len(off), 1)
    inside, covered = enclosed(drawn)
    size = len(drawn["value"])
    return (
        "## Is what is trusted right?\n\n"
        f"`python benchmarks/estimators.py --only trust`: a VAE with gated layers ({Path(args.run).name}), the first "
        f"{n:,} test images, binarised once, by `UntilTrusted()`: log p(x) = {found['value'].mean():.3f} nats, with a "
        f"standard error of {error.square().sum().sqrt().item() / n:.4f} from the draws.\n\n"
        + report.table(
            ["what", "measured", "goal"],
            [
                ["images that are trusted", f"{int(found['trusted'].sum()):,} of {n:,}", "99.5 %"],
                ["standard error of an image: median", f"{median:.3f} nats", "at most 0.05"],
                ["the same, 99th percentile", f"{high:.3f} nats", "at most 0.1"],
                ["CPU time for 10,000 images", f"{10_000 * found['seconds'].mean() / 60:.0f} minutes", "at most 20"],
                [
                    f"long annealing from the prior less `UntilTrusted`, mean of {len(off)} images",
                    f"{off.mean():+.3f} ± {its_error:.3f} nats",
                    "0 ± 0.02",
                ],
                ["data drawn from the model: within the bounds", f"{inside} of {size}", "99 %"],
                [
                    "the same: 95 % intervals that hold the difference to annealing",
                    f"{covered} of {size}",
                    "92 to 98 %",
                ],
            ],
        )
        + f"\n\nLong annealing: {args.long[0]} chains and {args.long[1]:,} temperatures. The bounds on log p(x) of "
        f"data drawn from the model are those of annealing forwards and backwards, {args.bidirectional[0]} chains and "
        f"{args.bidirectional[1]} temperatures, with three standard errors of the difference. Annealing forwards is "
        "unbiased for p(x): intervals are those of the difference to it.\n\n"
        + report.machine(packages=("torch", "pyro-ppl"))
    )
