"""Any prior with any likelihood: one loop over both on handwritten digits, scored by test log p(x).

    python examples/swap_parts.py

The digits have 17 grey levels, and all three likelihoods are distributions over those levels, so that their log p(x) can be
compared, in nats as in bits per dimension.
"""

import argparse
from functools import partial

import pyro

import pyrovae
from pyrovae import data, encoders, likelihoods, nn, priors


def main(args):
    train, validation, test = data.load("digits")
    latent_dim, x_shape, levels = 16, (1, 8, 8), 17
    network = partial(nn.GatedMLP, hidden=(200,))

    # A prior is handed what it needs: the encoder's posteriors at pseudo-inputs are the components of a VampPrior.
    all_priors = {
        "StandardNormal": lambda encoder, x: priors.StandardNormal(latent_dim),
        "GaussianMixture": lambda encoder, x: priors.GaussianMixture(latent_dim, num_components=20),
        "VampPrior": lambda encoder, x: priors.VampPrior(encoder, num_components=100, data=x, bounds=None),
        "FlowPrior": lambda encoder, x: priors.FlowPrior(latent_dim),
    }
    # Grey levels are k / 16 for the one kind, and classes k for the other: what to multiply the data by.
    all_likelihoods = {
        "DiscretizedLogistic": (partial(likelihoods.DiscretizedLogistic, levels=levels), 1),
        "DiscretizedLogisticMixture": (partial(likelihoods.DiscretizedLogisticMixture, levels=levels), 1),
        "Categorical": (partial(likelihoods.Categorical, num_classes=levels), levels - 1),
    }

    for likelihood_name, (likelihood, scale) in all_likelihoods.items():
        x_train, x_validation, x_test = (scale * part.x for part in (train, validation, test))
        for prior_name, prior in all_priors.items():
            pyro.set_rng_seed(0)
            encoder = encoders.DiagonalNormal(x_shape, latent_dim, network)
            vae = pyrovae.VAE(prior(encoder, x_train), likelihood(latent_dim, x_shape, network), encoder)
            vae.likelihood.start_at(x_train)
            pyrovae.fit(
                vae.model, vae.guide, x_train, validation=x_validation, patience=20, epochs=args.epochs, progress=False
            )
            estimate = pyrovae.log_marginal(
                vae.model, vae.guide, x_test, num_samples=args.num_samples, progress=False
            )
            mean = estimate.value.mean().item()
            bits = likelihoods.bits_per_dim(estimate.value, x_shape).mean().item()
            print(
                f"{prior_name:14}  {likelihood_name:26}  test log p(x) = {mean:.2f} nats a datum, {bits:.3f} bits per dimension, "
                f"{int((estimate.khat > 0.7).sum())} of {len(x_test)} with k-hat above 0.7"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 1, 20
    main(args)
