"""How far to trust log p(x): importance sampling, what k-hat says of it, and annealing and quadrature to check it by.

    python examples/marginal_likelihood.py

An estimator is an object that `log_marginal` takes as its method. Importance sampling from the guide is quick; but where the
guide misses some of the posterior, all hangs on a few draws, and neither the value nor its standard error is to be trusted.
Pareto k-hat says for which data (https://arxiv.org/abs/1507.02646). Those are scored again by annealed importance sampling
(https://arxiv.org/abs/1611.04273), which starts from the prior and makes no use of the guide. That can be checked, too: on data
that the model drew, annealing from both sides encloses log p(x) (https://arxiv.org/abs/1511.02543), and with two latent
dimensions a grid finds it.
"""

import argparse
import time

import pyro

import pyrovae
from pyrovae import data, encoders, estimators, likelihoods, log_marginal, priors


def train(latent_dim, args):
    """Returns a VAE of digits."""
    pyro.set_rng_seed(args.seed)
    train, validation, _ = data.load("digits")
    vae = pyrovae.VAE(
        prior=priors.StandardNormal(latent_dim),
        likelihood=likelihoods.Bernoulli(latent_dim, (1, 8, 8)),
        encoder=encoders.DiagonalNormal((1, 8, 8), latent_dim),
    )
    pyrovae.fit(
        vae.model,
        vae.guide,
        train.x,
        transform=data.dynamic_binarization,
        validation=data.static_binarization(validation.x),
        patience=20,
        epochs=args.epochs,
        progress=False,
    )
    return vae


def main(args):
    x = data.static_binarization(data.load("digits").test.x)
    vae = train(16, args)
    annealing = estimators.AnnealedImportanceSampling(num_temperatures=args.num_temperatures)

    estimate = log_marginal(vae.model, vae.guide, x, num_samples=args.num_samples, progress=False)
    print(f"test {estimate}\n")

    doubtful = ~estimate.trusted
    if doubtful.any():
        # There are few of them, so they can have more temperatures.
        thorough = estimators.AnnealedImportanceSampling(num_temperatures=5 * args.num_temperatures)
        again = log_marginal(vae.model, None, x[doubtful], method=thorough, progress=False)
        gain = again.value - estimate.value[doubtful]
        error = again.standard_error.square().mean().sqrt()
        print(f"{again}\nbeside importance sampling: {gain.min():+.3f} to {gain.max():+.3f} nats, each ± {error:.3f}\n")

    # As many data as it is given, drawn from the model; importance sampling of the same data.
    bracket = estimators.bidirectional(vae.model, None, x[: args.num_data], method=annealing, progress=False)
    inside = log_marginal(vae.model, vae.guide, *bracket.args, num_samples=args.num_samples, progress=False)
    print(f"{bracket}\nimportance sampling of these data: {inside.value.mean():.3f}\n")

    small = train(2, args)
    truth = log_marginal(small.model, None, x[: args.num_data], method=estimators.Quadrature(), progress=False)
    print(f"with 2 latent dimensions, by quadrature: {truth}")
    for method in (estimators.ImportanceSampling(args.num_samples), annealing):
        found = log_marginal(small.model, small.guide, x[: args.num_data], method=method, progress=False)
        wrong = (found.value - truth.value).abs()
        print(f"{type(method).__name__} is off by {wrong.mean():.4f} nats in the mean, {wrong.max():.4f} at most")

    k = args.num_samples
    methods = {
        "importance sampling, guide": estimators.ImportanceSampling(k),
        "   Pareto-smoothed": estimators.ImportanceSampling(k, smoothed=True),
        "   guide, widened": estimators.ImportanceSampling(k, estimators.Widened()),
        "   guide and prior": estimators.ImportanceSampling(k, estimators.Mixed()),
        "   guide, refined": estimators.ImportanceSampling(k, estimators.Refined()),
        "annealing from the prior": annealing,
        "   from the guide": estimators.AnnealedImportanceSampling(
            num_temperatures=args.num_temperatures, start=estimators.Guide()
        ),
        "sequential Monte Carlo": estimators.SequentialMonteCarlo(num_particles=args.num_particles),
        "CUBO, an upper bound": estimators.CUBO(k),
    }
    print(f"\n{'16 latent dimensions':28}   log p(x)  standard error  not trusted  seconds")
    for name, method in methods.items():
        start = time.perf_counter()
        found = log_marginal(vae.model, vae.guide, x[: args.num_data], method=method, progress=False)
        took, n = time.perf_counter() - start, len(found.value)
        error = found.standard_error.square().sum().sqrt() / n
        doubtful = int((~found.trusted).sum())
        print(
            f"{name:28}{method.relation:>2}{found.value.mean():9.3f}{error:16.4f}{doubtful:13}{took:9.1f}", flush=True
        )
    print(f"nats a datum; the error is that of the mean over the first {n} test data, from the samples alone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=5000, help="importance samples a datum")
    parser.add_argument("--num-temperatures", type=int, default=200, help="of annealing")
    parser.add_argument("--num-particles", type=int, default=32, help="of sequential Monte Carlo")
    parser.add_argument("--num-data", type=int, default=100, help="data in the comparisons")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples, args.num_temperatures, args.num_particles, args.num_data = 2, 25, 5, 4, 5
    main(args)
