"""Time and peak memory of a training step with every part, relative to a standard VAE.

The standard VAE has a standard-normal prior, a Bernoulli likelihood and a diagonal normal encoder: 784 pixels or
columns, 40 latent dimensions, networks with one hidden layer of 400, batches of 128, Trace_ELBO, fused Adam. In each
measurement one part is replaced, and the parts that must fit it (such as the prior of a von Mises-Fisher encoder).
Steps of both VAEs alternate in one process. Memory is the peak of torch's allocations during a step, relative to those
before it, from its profiler.

Two costs of mixture priors are measured as well: the memory of scoring, which should not grow with particles x data x
components x dimensions, and the time for exemplars.

    python benchmarks/parts.py
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import pyro
import report
import torch
from models import PIXELS, binary_images
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from pyrovae import VAE, encoders, likelihoods, nn, priors

BATCH, LATENT, CLASSES = 128, 40, 4
COMPONENTS, EXEMPLARS, PARTICLES = 500, 50_000, 50
GOALS = {"memory": 200e6, "exemplar": 3.0}
IMAGE, SEQUENCE = (1, 28, 28), (28, 28)


class Step:
    """One training step of a VAE on one batch."""

    def __init__(self, vae: VAE, x: Tensor, *context: Tensor):
        self.vae, self.arguments, self.loss = vae, (x, *context), Trace_ELBO()
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)

    def __call__(self) -> None:
        with pyro.validation_enabled(False):
            loss = self.loss.differentiable_loss(self.vae.model, self.vae.guide, *self.arguments)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def standard(x: Tensor, prior=None, likelihood=None, encoder=None) -> Step:
    """Returns a step of the standard VAE, with some parts replaced."""
    x_shape = x.shape[1:]
    return Step(
        VAE(
            prior or priors.StandardNormal(LATENT),
            likelihood or likelihoods.Bernoulli(LATENT, x_shape),
            encoder or encoders.DiagonalNormal(x_shape, LATENT),
        ),
        x,
    )


def all_parts(binary: Tensor) -> dict[str, Callable[[], Step]]:
    """Returns a function for each part, by name, that builds its step."""
    x = binary[:BATCH]
    grey, images = x * 0.8 + 0.1, x.unflatten(-1, IMAGE)
    counts, classes = torch.poisson(3 * grey), torch.randint(CLASSES, x.shape).float()
    one_hot_input = partial(nn.OneHotInput, num_classes=CLASSES)

    def vamp() -> Step:
        encoder = encoders.DiagonalNormal(PIXELS, LATENT)
        return standard(x, prior=priors.VampPrior(encoder, COMPONENTS), encoder=encoder)

    def exemplars() -> Step:
        encoder = encoders.DiagonalNormal(PIXELS, LATENT)
        vae = VAE(priors.ExemplarPrior(encoder, binary), likelihoods.Bernoulli(LATENT, PIXELS), encoder)
        return Step(vae, x, torch.arange(BATCH))

    def prior(part: Callable, encoder: Callable = encoders.DiagonalNormal, network=nn.MLP, **options) -> Step:
        likelihood = likelihoods.Bernoulli(LATENT, PIXELS, network)
        return standard(x, part(LATENT, **options), likelihood, encoder(PIXELS, LATENT))

    def likelihood(part: Callable, data: Tensor, **options) -> Step:
        return standard(data, likelihood=part(LATENT, data.shape[1:], **options))

    def encoder(part: Callable, **options) -> Step:
        return standard(x, encoder=part(PIXELS, LATENT, **options))

    def network(data: Tensor, encoder=nn.MLP, decoder=nn.MLP) -> Step:
        decoding = likelihoods.Bernoulli(LATENT, data.shape[1:], decoder)
        return standard(data, likelihood=decoding, encoder=encoders.DiagonalNormal(data.shape[1:], LATENT, encoder))

    one_hot, relaxed, integers, topics = (
        partial(encoders.OneHotCategorical, num_classes=CLASSES),
        partial(encoders.RelaxedOneHotCategorical, num_classes=CLASSES),
        partial(encoders.Categorical, num_classes=CLASSES),
        encoders.LogisticNormal,
    )
    table = [(likelihoods.Normal, 300), (likelihoods.Poisson, 300), (likelihoods.Bernoulli, PIXELS - 600)]
    mixed = torch.cat([grey[:, :300], counts[:, 300:600], x[:, 600:]], dim=1)
    return {
        "prior DiagonalNormal": partial(prior, priors.DiagonalNormal),
        "prior Laplace": partial(prior, priors.Laplace),
        "prior StudentT": partial(prior, priors.StudentT),
        f"prior GaussianMixture({COMPONENTS})": partial(prior, priors.GaussianMixture, num_components=COMPONENTS),
        f"prior TiedGaussianMixture({COMPONENTS})": partial(
            prior, priors.TiedGaussianMixture, num_components=COMPONENTS
        ),
        f"prior FullRankGaussianMixture({COMPONENTS})": partial(
            prior, priors.FullRankGaussianMixture, num_components=COMPONENTS
        ),
        f"prior VampPrior({COMPONENTS})": vamp,
        f"prior ExemplarPrior({len(binary):,})": exemplars,
        "prior FlowPrior": partial(prior, priors.FlowPrior),
        "prior ResampledPrior": partial(prior, priors.ResampledPrior),
        "prior GaussianProcess (10 times)": partial(prior, priors.GaussianProcess, num_times=10),
        "prior HypersphericalUniform, encoder VonMisesFisher": partial(
            prior, priors.HypersphericalUniform, encoders.VonMisesFisher
        ),
        "prior, encoder Categorical": partial(prior, priors.Categorical, integers, one_hot_input, num_classes=CLASSES),
        "prior, encoder OneHotCategorical": partial(prior, priors.OneHotCategorical, one_hot, num_classes=CLASSES),
        "prior, encoder RelaxedOneHotCategorical": partial(
            prior, priors.RelaxedOneHotCategorical, relaxed, num_classes=CLASSES
        ),
        "prior Dirichlet, encoder LogisticNormal": partial(prior, priors.Dirichlet, topics),
        "prior, encoder LogisticNormal": partial(prior, priors.LogisticNormal, topics),
        "likelihood ContinuousBernoulli": partial(likelihood, likelihoods.ContinuousBernoulli, grey),
        "likelihood Normal": partial(likelihood, likelihoods.Normal, grey),
        "likelihood OptimalNormal": partial(likelihood, likelihoods.OptimalNormal, grey),
        "likelihood Laplace": partial(likelihood, likelihoods.Laplace, grey),
        "likelihood StudentT": partial(likelihood, likelihoods.StudentT, grey),
        "likelihood LogNormal": partial(likelihood, likelihoods.LogNormal, grey),
        "likelihood Gamma": partial(likelihood, likelihoods.Gamma, grey),
        "likelihood Beta": partial(likelihood, likelihoods.Beta, grey),
        "likelihood Poisson": partial(likelihood, likelihoods.Poisson, counts),
        "likelihood NegativeBinomial": partial(likelihood, likelihoods.NegativeBinomial, counts),
        "likelihood ZeroInflatedNegativeBinomial": partial(
            likelihood, likelihoods.ZeroInflatedNegativeBinomial, counts
        ),
        "likelihood Multinomial": partial(likelihood, likelihoods.Multinomial, counts, total_count=100),
        f"likelihood Categorical({CLASSES})": partial(
            likelihood, likelihoods.Categorical, classes, num_classes=CLASSES
        ),
        "likelihood DiscretizedLogistic": partial(likelihood, likelihoods.DiscretizedLogistic, x),
        "likelihood DiscretizedLogisticMixture(5)": partial(likelihood, likelihoods.DiscretizedLogisticMixture, x),
        "likelihood Mixed (3 blocks)": partial(likelihood, likelihoods.Mixed, mixed, blocks=table),
        "encoder FullRankNormal": partial(encoder, encoders.FullRankNormal),
        "encoder LowRankNormal(5)": partial(encoder, encoders.LowRankNormal, rank=5),
        "encoder GaussianMixture(5)": partial(encoder, encoders.GaussianMixture),
        "encoder InverseAutoregressiveFlow": partial(encoder, encoders.InverseAutoregressiveFlow),
        "encoder NeuralSplineFlow": partial(encoder, encoders.NeuralSplineFlow),
        "encoder Delta": partial(encoder, encoders.Delta),
        "networks GatedMLP": partial(network, x, nn.GatedMLP, nn.GatedMLP),
        "networks ResidualMLP": partial(network, x, nn.ResidualMLP, nn.ResidualMLP),
        "networks ConvNet, DeconvNet": partial(network, images, nn.ConvNet, nn.DeconvNet),
        "networks ResidualConvNet, ResidualDeconvNet": partial(
            network, images, nn.ResidualConvNet, nn.ResidualDeconvNet
        ),
        "networks GRUEncoder, GRUDecoder": partial(network, x.unflatten(-1, SEQUENCE), nn.GRUEncoder, nn.GRUDecoder),
    }


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_memory(step: Callable[[], None]) -> int:
    """Returns the peak of torch's allocations during a step, in bytes, relative to those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def compared(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> tuple[list[float], list[float]]:
    """Returns the milliseconds of a step, and ratios to another step; they alternate after a warm-up step of each."""
    ours(), theirs()
    times, ratios = [], []
    for i in range(rounds):
        pair = [seconds(ours), seconds(theirs)] if i % 2 else [seconds(theirs), seconds(ours)][::-1]
        times.append(1e3 * pair[0])
        ratios.append(pair[0] / pair[1])
    return times, ratios


def mixture_memory(prior: priors.Prior) -> int:
    z = torch.randn(PARTICLES, BATCH, LATENT, requires_grad=True)
    return peak_memory(lambda: prior().log_prob(z).sum().backward())


def main(args: argparse.Namespace) -> None:
    """Measures, prints, and writes the section of the README."""
    pyro.set_rng_seed(0)
    binary = binary_images(args.exemplars)
    baseline = standard(binary[:BATCH])
    baseline()
    base_memory = peak_memory(baseline)
    times, _ = compared(baseline, baseline, args.rounds)
    rows = [["standard", report.quartiles(times, 2), "1", f"{base_memory / 1e6:.1f}", "1"]]
    parts = all_parts(binary)
    for name, build in tqdm(parts.items(), desc="parts"):
        step = build()
        times, ratios = compared(step, baseline, args.rounds)
        memory = peak_memory(step)
        ratio = f"{memory / base_memory:.1f}"
        rows.append([name, report.quartiles(times, 2), report.quartiles(ratios, 2), f"{memory / 1e6:.1f}", ratio])

    steps = {name: parts[name]() for name in parts if "VampPrior" in name or "ExemplarPrior" in name}
    vamp, exemplar = steps.values()
    _, ratios = compared(exemplar, vamp, args.rounds)
    mixtures = {
        part.__name__: mixture_memory(part(LATENT, COMPONENTS))
        for part in (priors.GaussianMixture, priors.TiedGaussianMixture, priors.FullRankGaussianMixture)
    }
    listed = ", ".join(f"{name} {memory / 1e6:.0f} MB" for name, memory in mixtures.items())
    dense = 4 * PARTICLES * BATCH * COMPONENTS * LATENT
    text = (
        "## Parts\n\n"
        "`python benchmarks/parts.py`: a training step with each part, relative to the standard VAE with a "
        f"standard-normal prior, Bernoulli likelihood and diagonal encoder ({PIXELS} pixels, {LATENT} latent "
        f"dimensions, MLPs with one hidden layer of 400, batches of {BATCH}, one particle). {args.rounds} steps of "
        "each, alternating with the standard VAE; medians, with quartiles in brackets. Memory: the peak of torch's "
        "allocations during a step, relative to those before it.\n\n"
        + report.table(["part", "ms / step", "/ standard", "peak MB", "/ standard"], rows)
        + f"\n\nA step with ExemplarPrior({args.exemplars:,}) takes {report.quartiles(ratios, 2)} times one with "
        f"VampPrior({COMPONENTS}) (goal: at most {GOALS['exemplar']:g}).\n\n"
        f"Score and gradient of {COMPONENTS} components at {PARTICLES} particles, batch {BATCH} and {LATENT} latent "
        f"dimensions: {listed} (goal: below {GOALS['memory'] / 1e6:.0f} MB; a tensor over particles, data, components "
        f"and dimensions has {dense / 1e6:.0f} MB).\n\n{report.machine()}"
    )
    print(text)
    if not args.smoke:
        report.write("PARTS", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="measured steps of each part")
    parser.add_argument("--exemplars", type=int, default=EXEMPLARS, help="exemplars of the ExemplarPrior")
    parser.add_argument("--smoke", action="store_true", help="a few steps; writes nothing")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.exemplars = 4, 1000
    main(args)
