"""A conditional VAE: digits given their labels. The class is the same; the label is a context for the parts.

    python examples/conditional.py

It compares test log p(x | label) with the log p(x) of a VAE without labels, and draws each digit ten times.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pyro
import torch
from torch.nn.functional import one_hot

import pyrovae
from pyrovae import data, encoders, likelihoods, plots, priors

LATENT_DIM, X_SHAPE, CLASSES = 16, (1, 8, 8), 10


def make_vae(context_dim):
    return pyrovae.VAE(
        prior=priors.StandardNormal(LATENT_DIM),
        likelihood=likelihoods.Bernoulli(LATENT_DIM, X_SHAPE, context_dim=context_dim),
        encoder=encoders.DiagonalNormal(X_SHAPE, LATENT_DIM, context_dim=context_dim),
    )


def main(args):
    train, validation, test = data.load("digits")
    for context_dim, name in ((0, "p(x)"), (CLASSES, "p(x | label)")):
        pyro.set_rng_seed(0)
        vae = make_vae(context_dim)

        def arguments(part):
            """Returns the arguments of model and guide: x, or x and one vector a datum."""
            return (part.x, one_hot(part.labels, CLASSES).float()) if context_dim else (part.x,)

        pyrovae.fit(
            vae.model,
            vae.guide,
            arguments(train),
            transform=data.dynamic_binarization,
            validation=arguments(replace(validation, x=data.static_binarization(validation.x))),
            epochs=args.epochs,
            patience=20,
        )
        x_test, *context = arguments(replace(test, x=data.static_binarization(test.x)))
        estimate = pyrovae.log_marginal(vae.model, vae.guide, x_test, *context, num_samples=args.num_samples)
        print(f"{name}: test {estimate}")

    digits = torch.eye(CLASSES)
    with torch.no_grad():  # ten latents, each decoded as every digit: all digits of a row have the same style
        z = vae.prior().sample((10, 1)).expand(-1, CLASSES, -1)
        images = vae.decode(z, digits).mean
    plots.samples(images.flatten(0, 1), args.output, "one latent a row, one label a column")
    print(f"picture: {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--output", type=Path, default=Path("conditional.png"), help="file of the picture")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 20
    main(args)
