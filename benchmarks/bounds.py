"""Time and peak memory of a loss with its gradients, for every bound and for Pyro's Trace_ELBO with as many particles.

The model is the MLP VAE 784-400-20-400-784 with Bernoulli pixels and a diagonal normal guide; the last rows have
categorical latents, with score-function gradients. A call is one `loss_and_grads` of a batch of 64 binary images,
without an optimizer and without Pyro's validation. For each number of particles all losses take turns in one process,
in a new random order every round, because the state of the allocator after one affects the next; ratios are to the
Trace_ELBO of the same model and round. Memory is the peak of torch's allocations during a call minus those before it,
with the gradients of the parameters, from its profiler.

Then two goals at 50 particles: an IWAE is not slower than Pyro's RenyiELBO(alpha=0), which is the same bound, and
doubly reparameterised gradients do not cost much more than plain ones.

    python benchmarks/bounds.py
"""

import argparse
import random
import statistics
import time
from functools import partial

import pyro
import report
from models import HIDDEN, LATENT, PIXELS, binary_images, pyrovae_vae
from parts import peak_memory
from pyro.infer import ELBO as PyroELBO
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyrovae import VAE, bounds, encoders, likelihoods, nn, priors, regularizers

BATCH, CLASSES, DATASET = 64, 10, 50_000
PARTICLES, GOAL_PARTICLES, CHUNK, GROUP = (1, 8, 64), 50, 8, 4
CALLS = {1: 10, 8: 4}  # a round, of what takes a few milliseconds
GOALS = {"IWAE / RenyiELBO": 1.0, "DReG / IWAE": 1.35}
BASELINE, DISCRETE = "Trace_ELBO (Pyro)", "classes: "

Losses = dict[str, PyroELBO | None]


def losses_at(k: int) -> Losses:
    """Returns every bound with `k` particles, by name; None where it makes no sense with so few or so many."""
    dreg, groups = bounds.DoublyReparameterized(), max(k // GROUP, 1)
    regularized = {
        "TotalCorrelation": regularizers.TotalCorrelation(1.0, DATASET),
        "MaximumMeanDiscrepancy": regularizers.MaximumMeanDiscrepancy(1.0),
        "DensityRatio": regularizers.DensityRatio(nn.MLP(LATENT, 1), 1.0),
        "Adversarial": regularizers.Adversarial(nn.MLP(PIXELS, 1), 1.0),
    }
    return {
        BASELINE: trace_elbo(k),
        "RenyiELBO, alpha 0 (Pyro)": renyi_elbo(k) if k > 1 else None,
        "ELBO": bounds.ELBO(k),
        "ELBO, StickingTheLanding": bounds.ELBO(k, gradient=bounds.StickingTheLanding()),
        "IWAE": bounds.IWAE(k),
        "IWAE, DoublyReparameterized": bounds.IWAE(k, gradient=dreg),
        f"IWAE, chunks of {CHUNK}": bounds.IWAE(k, chunk_size=CHUNK) if k > CHUNK else None,
        f"MIWAE, groups of {GROUP}": bounds.MIWAE(k, groups),
        f"PIWAE, groups of {GROUP}": bounds.PIWAE(k, groups),
        f"PIWAE, groups of {GROUP}, DoublyReparameterized": bounds.PIWAE(k, groups, gradient=dreg),
        "CIWAE": bounds.CIWAE(k),
        "Renyi, alpha 0.5": bounds.Renyi(k, alpha=0.5),
        "Renyi, alpha 0.5, DoublyReparameterized": bounds.Renyi(k, alpha=0.5, gradient=dreg),
        "VRMax": bounds.VRMax(k),
        "CUBO": bounds.CUBO(k) if k > 1 else None,
        "CUBO, DoublyReparameterized": bounds.CUBO(k, gradient=dreg),
        "TVO": bounds.TVO(k),
        "TVO, Covariance": bounds.TVO(k, gradient=bounds.Covariance()) if k > 1 else None,
        "ReweightedWakeSleep": bounds.ReweightedWakeSleep(k) if k > 1 else None,
        "ReweightedWakeSleep with sleep": bounds.ReweightedWakeSleep(k, wake=0.5, sleep=0.5) if k > 1 else None,
        **{f"ELBO, {name}": bounds.ELBO(regularizers=[r]) if k == 1 else None for name, r in regularized.items()},
    }


def discrete_losses_at(k: int) -> Losses:
    """Returns, likewise, bounds for latents that are classes."""
    return {
        DISCRETE + BASELINE: trace_elbo(k),
        DISCRETE + "ELBO (leave-one-out)": bounds.ELBO(k) if k > 1 else None,
        DISCRETE + "IWAE (VIMCO)": bounds.IWAE(k) if k > 1 else None,
        DISCRETE + "ReweightedWakeSleep": bounds.ReweightedWakeSleep(k) if k > 1 else None,
    }


def trace_elbo(k: int) -> PyroELBO:
    """Returns Pyro's ELBO, with the nesting of the data plate."""
    return Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1)


def renyi_elbo(k: int) -> PyroELBO:
    """Returns Pyro's importance-weighted bound, with the nesting of the data plate."""
    return RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)


def discrete_vae() -> VAE:
    """Returns the VAE of :mod:`models` with as many latents, of ten classes each."""
    decoder = partial(nn.OneHotInput, num_classes=CLASSES)
    return VAE(
        priors.Categorical(LATENT, CLASSES),
        likelihoods.Bernoulli(LATENT, PIXELS, decoder),
        encoders.Categorical(PIXELS, LATENT, num_classes=CLASSES),
    )


class Call:
    """One loss of a VAE on one batch, with its gradients, which start from none."""

    def __init__(self, loss: PyroELBO, vae: VAE, x: Tensor):
        self.loss, self.vae, self.x = loss, vae, x
        regularized_by = getattr(loss, "regularizers", ())  # Pyro's have none
        self.modules = [vae, *(r.discriminator for r in regularized_by if hasattr(r, "discriminator"))]

    def __call__(self) -> None:
        self.loss.loss_and_grads(self.vae.model, self.vae.guide, self.x)

    def seconds(self, calls: int) -> float:
        """Returns the seconds that a call takes, a mean over some."""
        total = 0.0
        for _ in range(calls):
            self.forget()
            start = time.perf_counter()
            self()
            total += time.perf_counter() - start
        return total / calls

    def memory(self) -> float:
        """Returns the peak memory of a call in MB."""
        self.forget()
        return peak_memory(self) / 1e6

    def forget(self) -> None:
        """Takes the gradients away."""
        for module in self.modules:
            module.zero_grad(set_to_none=True)


def take_turns(calls: dict[str, Call], rounds: int, calls_a_round: int, what: str) -> dict[str, list[float]]:
    """Returns the milliseconds of a call in every round, by name, after a round to warm up."""
    names, times = list(calls), {name: [] for name in calls}
    for i in tqdm(range(-1, rounds), desc=what):
        for name in random.sample(names, len(names)):
            took = 1e3 * calls[name].seconds(calls_a_round)
            if i >= 0:
                times[name].append(took)
    return times


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Returns ratios within each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def measured(calls: dict[str, Call], rounds: int, k: int) -> dict[str, tuple[str, str, str]]:
    """Returns, by name, the cells of a table: milliseconds, ratio to the baseline of the same model, megabytes."""
    times = take_turns(calls, rounds, CALLS.get(k, 1), f"{k} particles")
    cells = {}
    for name, call in calls.items():
        baseline = DISCRETE + BASELINE if name.startswith(DISCRETE) else BASELINE
        ratio = "1" if name == baseline else report.quartiles(ratios(times[name], times[baseline]), 2)
        cells[name] = (f"{statistics.median(times[name]):.1f}", ratio, f"{call.memory():.1f}")
    return cells


def goals(vae: VAE, x: Tensor, rounds: int) -> list[list[str]]:
    """Returns the rows of the table of goals."""
    k = GOAL_PARTICLES
    losses = {
        "RenyiELBO": renyi_elbo(k),
        "IWAE": bounds.IWAE(k),
        "DReG": bounds.IWAE(k, gradient=bounds.DoublyReparameterized()),
    }
    times = take_turns({name: Call(loss, vae, x) for name, loss in losses.items()}, rounds, 1, f"{k} particles")
    rows = []
    for pair, goal in GOALS.items():
        ours, theirs = pair.split(" / ")
        both = [report.quartiles(times[name], 1) for name in (ours, theirs)]
        rows.append([pair, *both, report.quartiles(ratios(times[ours], times[theirs]), 2), f"at most {goal:g}"])
    return rows


def main(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the README's part."""
    pyro.set_rng_seed(0)
    x, vae, of_classes = binary_images(BATCH), pyrovae_vae(), discrete_vae()
    with pyro.validation_enabled(False):
        columns = {}
        for k in PARTICLES:
            losses = [(vae, losses_at(k)), (of_classes, discrete_losses_at(k))]
            calls = {
                name: Call(loss, of, x) for of, by_name in losses for name, loss in by_name.items() if loss is not None
            }
            columns[k] = measured(calls, args.rounds, k)
        goal_rows = goals(vae, x, 5 * args.rounds)

    missing = ("", "", "")
    rows = []
    for name in losses_at(1) | discrete_losses_at(1):
        milliseconds, relative, megabytes = zip(*(cells.get(name, missing) for cells in columns.values()), strict=True)
        rows.append([name, *milliseconds, *relative, *megabytes])
    few, *more = PARTICLES
    header = ["bound"]
    for quantity in ("ms", "/ Trace_ELBO", "peak MB"):
        header += [f"{quantity} at {few}", *(f"at {k}" for k in more)]
    text = (
        f"## Bounds\n\n`python benchmarks/bounds.py`: a loss with its gradients (`loss_and_grads`) at {few}, "
        f"{' and '.join(map(str, more))} particles; MLP VAE {PIXELS}-{HIDDEN}-{LATENT}-{HIDDEN}-{PIXELS}, a batch of "
        f"{BATCH} binary images, no optimizer, Pyro's validation off. {args.rounds} rounds in one process, each in a "
        "random order; medians, in brackets the quartiles; ratios are to Pyro's vectorised Trace_ELBO with as many "
        "particles, within a round. Memory: the peak of torch's allocations during a call minus those before it. With "
        f"categorical latents ({LATENT} of {CLASSES} classes) gradients are score functions, and ratios are to the "
        "Trace_ELBO of that model. A CUBO has no gradient for the model's parameters.\n\n"
        + report.table(header, rows)
        + f"\n\nAt {GOAL_PARTICLES} particles, {5 * args.rounds} rounds of the three alone. Pyro's RenyiELBO(alpha=0) "
        "and an IWAE are the same bound; DReG is the IWAE with DoublyReparameterized gradients:\n\n"
        + report.table(["ratio", "ms of the one", "ms of the other", "ratio of both", "goal"], goal_rows)
        + f"\n\n{report.machine()}"
    )
    print(text)
    if not args.smoke:
        report.write("BOUNDS", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--smoke", action="store_true", help="a few rounds, nothing written")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = 3
    main(args)
