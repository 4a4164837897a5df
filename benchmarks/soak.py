"""Memory of a process that trains, scores, samples, draws, saves and loads again and again.

    python benchmarks/soak.py --minutes 60

Every round makes a new VAE of another prior and bound, so that graphs, parameters and results of earlier rounds have to
be let go. Resident memory (Linux's VmRSS) is read after each round and a collection of garbage. The first tenth of the
time is a warm-up: allocators and caches fill. Fails when the highest later round is over 20 MB above the highest of the
warm-up.
"""

import argparse
import gc
import re
import tempfile
import time
from pathlib import Path

import pyro
import torch

import pyrovae
from pyrovae import bounds, data, diagnostics, encoders, likelihoods, plots, priors

LIMIT = 20.0  # MB
PRIORS = [priors.StandardNormal, lambda dim: priors.GaussianMixture(dim, 10), priors.FlowPrior]
LOSSES = [None, bounds.IWAE(num_particles=4), bounds.ELBO(beta=bounds.Linear(50))]


def resident() -> float:
    """Returns the memory of this process that is resident, in MB."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def work(number: int, splits: data.Splits, directory: Path) -> None:
    """One round."""
    pyro.clear_param_store()
    pyro.set_rng_seed(number)
    x_test = data.static_binarization(splits.test.x)
    vae = pyrovae.VAE(
        PRIORS[number % len(PRIORS)](8), likelihoods.Bernoulli(8, (1, 8, 8)), encoders.DiagonalNormal((1, 8, 8), 8)
    )
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        splits.train.x,
        loss=LOSSES[number // len(PRIORS) % len(LOSSES)],
        transform=data.dynamic_binarization,
        validation=data.static_binarization(splits.validation.x),
        epochs=5,
        checkpoint=directory / "checkpoint.safetensors",
        progress=False,
    )
    estimate = pyrovae.log_marginal(vae.model, vae.guide, x_test, num_samples=200, progress=False)
    assert estimate.value.isfinite().all()
    diagnostics.collapse(vae.model, vae.guide, x_test[:100], progress=False)
    history.plot(directory / "curve.png")
    plots.samples(vae.sample(16), directory / "samples.png")
    plots.reconstructions(x_test[:8], vae.reconstruct(x_test[:8]), directory / "reconstructions.png")
    pyrovae.save(vae, directory / "vae.safetensors")
    pyrovae.load(directory / "vae.safetensors")


def main(args: argparse.Namespace) -> None:
    """Works for some minutes, and prints the memory."""
    torch.set_num_threads(1)
    splits, began, last, measured = data.load("digits"), time.monotonic(), 0.0, []
    while time.monotonic() - began < 60 * args.minutes:
        with tempfile.TemporaryDirectory() as folder:
            work(len(measured), splits, Path(folder))
        gc.collect()
        measured.append(((time.monotonic() - began) / 60, resident()))
        if measured[-1][0] - last >= args.minutes / 30:
            last = measured[-1][0]
            print(f"{last:5.1f} minutes, {len(measured):4d} rounds: {measured[-1][1]:.1f} MB", flush=True)
    warm = max(memory for minutes, memory in measured if minutes <= args.minutes / 10)
    later = max(memory for minutes, memory in measured if minutes > args.minutes / 10)
    print(f"{len(measured)} rounds: at most {warm:.1f} MB in the warm-up, {later:.1f} MB after it")
    if later - warm > LIMIT:
        raise SystemExit(f"memory grew by {later - warm:.1f} MB, more than {LIMIT:.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    main(parser.parse_args())
