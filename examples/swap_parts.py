"""Any prior with any likelihood: one loop over both on handwritten digits, scored by test log p(x).

    python examples/swap_parts.py

The digits have 17 grey levels. Discrete likelihoods give probabilities of these levels. Densities get levels with
uniform noise; the density times the width of a level is a lower bound of the probability (Theis et al., 2016,
https://arxiv.org/abs/1511.01844), which makes all of them comparable. Where k-hat is above 0.7 for many data,
importance sampling probably underestimates log p(x): the model is better than the printed value.
"""

import argparse
import math
from functools import partial

import pyro
import torch

import pyrovae
from pyrovae import data, encoders, likelihoods, nn, priors

LATENT_DIM, X_SHAPE, LEVELS = 8, (1, 8, 8), 17


def add_noise(x):
    """Adds uniform noise: level k of 0, ..., 16 becomes a number between k / 17 and (k + 1) / 17."""
    return ((LEVELS - 1) * x + torch.rand_like(x).clamp(1e-5, 1 - 1e-5)) / LEVELS


def main(args):
    train, validation, test = data.load("digits")
    network = partial(nn.GatedMLP, hidden=(200,))
    # Built from the encoder: the components of a VampPrior are posteriors of the encoder at pseudo-inputs.
    all_priors = {
        "StandardNormal": lambda encoder: priors.StandardNormal(LATENT_DIM),
        "GaussianMixture": lambda encoder: priors.GaussianMixture(LATENT_DIM, num_components=20),
        "VampPrior": lambda encoder: priors.VampPrior(encoder, num_components=100, data=train.x),
        "FlowPrior": lambda encoder: priors.FlowPrior(LATENT_DIM),
    }
    discrete = {
        "DiscretizedLogistic": partial(likelihoods.DiscretizedLogistic, levels=LEVELS),
        "DiscretizedLogisticMixture": partial(likelihoods.DiscretizedLogisticMixture, levels=LEVELS),
    }
    continuous = {"Normal": likelihoods.Normal, "Beta": likelihoods.Beta}

    for likelihood_name, likelihood in (discrete | continuous).items():
        noise = add_noise if likelihood_name in continuous else None
        x_test = add_noise(test.x) if noise else test.x
        log_width = -math.prod(X_SHAPE) * math.log(LEVELS) if noise else 0.0
        for prior_name, prior in all_priors.items():
            pyro.set_rng_seed(0)
            encoder = encoders.DiagonalNormal(X_SHAPE, LATENT_DIM, network)
            vae = pyrovae.VAE(prior(encoder), likelihood(LATENT_DIM, X_SHAPE, network), encoder)
            vae.likelihood.start_at(noise(train.x) if noise else train.x)
            pyrovae.fit(
                vae.model,
                vae.guide,
                train.x,
                transform=noise,
                validation=validation.x,
                patience=10,
                epochs=args.epochs,
                progress=False,
            )
            estimate = pyrovae.log_marginal(vae.model, vae.guide, x_test, num_samples=args.num_samples, progress=False)
            log_prob = estimate.value + log_width
            print(
                f"{prior_name:15}  {likelihood_name:26}  test log p(x) = {log_prob.mean():.2f} nats a datum, "
                f"{likelihoods.bits_per_dim(log_prob, X_SHAPE).mean():.3f} bits per dimension, "
                f"k-hat not below 0.7 for {int((~(estimate.khat < 0.7)).sum())} of {len(x_test)}"  # or unknown
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 1, 20
    main(args)
