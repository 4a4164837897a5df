"""How far to trust log p(x): importance sampling with its k-hat, checked by annealing and by quadrature.

    python examples/marginal_likelihood.py

An estimator is an object that `log_marginal` takes as its method. Importance sampling from the guide is fast. But where
the guide misses a part of the posterior, the estimate depends on a few draws, and neither the value nor its standard
error can be trusted. Pareto k-hat shows for which data (https://arxiv.org/abs/1507.02646). These are scored again by
annealed importance sampling (https://arxiv.org/abs/1611.04273), which starts from the prior and does not need the
guide. Annealing can be checked as well: on data drawn from the model, annealing from both sides encloses log p(x)
(https://arxiv.org/abs/1511.02543), and with two latent dimensions quadrature on a grid gives its value.
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
        # These are few data, which allows more temperatures.
        thorough = estimators.AnnealedImportanceSampling(num_temperatures=5 * args.num_temperatures)
        again = log_marginal(vae.model, None, x[doubtful], method=thorough, progress=False)
        gain = again.value - estimate.value[doubtful]
        error = again.standard_error.square().mean().sqrt()
        print(f"{again}\nover importance sampling: {gain.min():+.3f} to {gain.max():+.3f} nats, each ± {error:.3f}\n")

    # The data are drawn from the model, as many as in x; importance sampling scores the same data.
    bracket = estimators.bidirectional(vae.model, None, x[: args.num_data], method=annealing, progress=False)
    inside = log_marginal(vae.model, vae.guide, *bracket.args, num_samples=args.num_samples, progress=False)
    print(f"{bracket}\nimportance sampling of these data: {inside.value.mean():.3f}\n")

    small = train(2, args)
    truth = log_marginal(small.model, None, x[: args.num_data], method=estimators.Quadrature(), progress=False)
    print(f"with 2 latent dimensions, by quadrature: {truth}")
    for method in (estimators.ImportanceSampling(args.num_samples), annealing):
        estimate = log_marginal(small.model, small.guide, x[: args.num_data], method=method, progress=False)
        error = (estimate.value - truth.value).abs()
        print(f"error of {type(method).__name__}: {error.mean():.4f} nats in the mean, {error.max():.4f} at most")

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
        estimate = log_marginal(vae.model, vae.guide, x[: args.num_data], method=method, progress=False)
        took, n = time.perf_counter() - start, len(estimate.value)
        error = estimate.standard_error.square().sum().sqrt() / n
        doubtful = int((~estimate.trusted).sum())
        mean = estimate.value.mean()
        print(f"{name:28}{method.relation:>2}{mean:9.3f}{error:16.4f}{doubtful:13}{took:9.1f}", flush=True)
    print(f"nats a datum; Monte Carlo standard errors of the mean over the first {n} test data")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=5000, help="importance samples a datum")
    parser.add_argument("--num-temperatures", type=int, default=200, help="temperatures of annealing")
    parser.add_argument("--num-particles", type=int, default=32, help="particles of sequential Monte Carlo")
    parser.add_argument("--num-data", type=int, default=100, help="data in the comparisons")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples, args.num_temperatures, args.num_particles, args.num_data = 2, 25, 5, 4, 5
    main(args)
