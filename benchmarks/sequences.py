"""Steps of training a deep Markov model, by stock SVI, by graphs, and by particle filters.

The model has the networks of Pyro's example: piano rolls of 88 keys, 129 steps, batches of 20, 100 latents, hidden
layers of 100 (emission) and 200 units (transition), and a tanh recurrence of 600 units from the end, whose state is
combined with the latents of the step before. "Loop" is plain Pyro, with a site for
each state and each observation, as in Pyro's example; "StateSpaceVAE" is the same model with all steps scored in one
call. "Stock SVI" checks arguments and values of distributions, as Pyro does by default; the others do not, as under
`pyrovae.fit`. A step is a loss with its gradients, in CPU seconds of one thread; all take turns, in one process. The
seconds of the first four steps are those until a graph has started: tracing, checks, and the eager steps before.

    python benchmarks/sequences.py
"""

import argparse
import statistics
import time
from functools import partial

import pyro
import report
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrovae import bounds, encoders, likelihoods, nn, priors
from pyrovae.compilation.api import Compiled
from pyrovae.compilation.playback import play_back
from pyrovae.structures import StateSpaceVAE

KEYS, LATENT, EMISSION, TRANSITION, WIDTH = 88, 100, 100, 200, 600
GOALS = {"StateSpaceVAE, ELBO / stock SVI": 1 / 3, "loop, FIVO 16 / loop, IWAE 16": 1.3}


class BackwardRNN(torch.nn.Module):
    """Summaries of the rest of each sequence, by a plain recurrence from its last step."""

    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.RNN(KEYS, WIDTH, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        last = mask.sum(1, keepdim=True) - 1
        order = torch.where(steps <= last, last - steps, steps).unsqueeze(-1)
        return self.rnn(x.gather(1, order.expand_as(x)))[0].gather(1, order.expand(-1, -1, WIDTH))


def state_space() -> StateSpaceVAE:
    small = partial(nn.MLP, hidden=(EMISSION, EMISSION))
    return StateSpaceVAE(
        priors.StandardNormal(LATENT),
        encoders.DiagonalNormal(LATENT, LATENT, partial(nn.GatedTransition, width=TRANSITION)),
        likelihoods.Bernoulli(LATENT, KEYS, small),
        encoders.DiagonalNormal(LATENT, LATENT, nn.Combiner, context_dim=WIDTH),
        BackwardRNN(),
    )


def seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(steps: int, batch: int, rounds: int, particles: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of each step, and those until the first step of a graph, by contender."""
    pyro.set_rng_seed(0)
    x = (torch.rand(batch, steps, KEYS) < 0.05).float()
    mask = torch.arange(steps) < torch.randint(steps // 3, steps + 1, (batch, 1))
    vae = state_space()
    whole, loop = (vae.model, vae.guide), (vae.model_by_step, vae.guide_by_step)
    played = partial(Compiled, backend=play_back)
    contenders = {
        "stock SVI": (Trace_ELBO(), loop),
        "stock SVI, unchecked": (Trace_ELBO(), loop),
        "loop, ELBO": (played(bounds.ELBO(closed_form=False)), loop),
        "StateSpaceVAE, ELBO": (played(bounds.ELBO(closed_form=False)), whole),
        f"loop, IWAE {particles}": (played(bounds.IWAE(particles)), loop),
        f"loop, FIVO {particles}": (played(bounds.FIVO(particles)), loop),
    }

    def call(name: str) -> Tensor:
        loss, (model, guide) = contenders[name]
        with pyro.validation_enabled(name == "stock SVI"):
            return loss.loss_and_grads(model, guide, x, mask)

    started = {}
    for name in contenders:
        started[name] = seconds(lambda name=name: [call(name) for _ in range(4)])
        print(f"{name}: {started[name]:.1f} s for the first four steps", flush=True)
        for _ in range(8):  # of which some are compared with the function
            call(name)
    taken = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            taken[name].append(seconds(lambda name=name: call(name)))
    return taken, started


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    taken, started = measure(args.steps, args.batch, args.rounds, args.particles)
    base = statistics.median(taken["stock SVI"])
    rows = [
        [name, report.quartiles(times, 3), f"{statistics.median(times) / base:.2f}", f"{started[name]:.1f}"]
        for name, times in taken.items()
    ]
    goals = []
    for ratio, goal in GOALS.items():
        a, b = ratio.split(" / ")
        found = statistics.median(p / q for p, q in zip(taken[a], taken[b], strict=True))
        goals.append([ratio, f"{found:.2f}", f"at most {goal:.2f}"])
    header = ["", "CPU s a step", "/ stock SVI", "first four steps, CPU s"]
    text = "\n\n".join(
        [
            f"{args.steps} steps of time, batches of {args.batch}; medians and quartiles of {args.rounds} rounds.",
            report.table(header, rows),
            report.table(["Goal", "Measured", ""], goals),
            report.machine(packages=("torch", "pyro-ppl")),
        ]
    )
    print(text)
    if args.write:
        report.write("sequences", f"## Sequences\n\n{text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=129)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    main(parser.parse_args())
