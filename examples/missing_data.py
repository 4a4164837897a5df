"""Missing data: a VAE learns from digits with half of their pixels missing, and imputes the missing pixels.

    python examples/missing_data.py

The VAE never sees a complete digit. Its error over the missing pixels of test images is compared with that of the mean
of each pixel and of scikit-learn's nearest neighbours, and a picture shows the imputed digits.
"""

import argparse
from functools import partial
from pathlib import Path

import pyro
import torch
from sklearn.impute import KNNImputer

import pyrovae
from pyrovae import data, encoders, likelihoods, plots, priors
from pyrovae.structures import MissingDataVAE

LATENT_DIM, X_SHAPE = 16, (1, 8, 8)


def lose(x, fraction):
    """Replaces a random fraction of all pixels by NaN."""
    return torch.where(torch.rand_like(x) < fraction, torch.nan, x)


def lose_more(x, mask):
    """Hides further pixels, different ones each time: augmentation, so that the VAE does not memorise the masks."""
    fewer = mask & (torch.rand_like(x) > 0.2)
    return x, torch.where(fewer.flatten(1).any(1).view(-1, 1, 1, 1), fewer, mask)  # but never all pixels of a digit


def main(args):
    pyro.set_rng_seed(0)
    splits = data.load("digits")
    train, validation, test = (data.split_missing(lose(part.x, args.missing)) for part in splits)

    vae = MissingDataVAE(
        prior=priors.StandardNormal(LATENT_DIM),
        likelihood=likelihoods.Normal(LATENT_DIM, X_SHAPE, scale=0.3),
        encoder=encoders.DiagonalNormal((2, *X_SHAPE), LATENT_DIM),  # the pixels and the mask
    )
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        train,
        transform=lose_more,  # also for validation data
        validation=validation,
        epochs=args.epochs,
        patience=30,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
    )
    print(history)
    print(f"test {pyrovae.log_marginal(vae.model, vae.guide, *test, num_samples=args.num_samples)}")

    x, mask = test
    imputed = vae.impute(x, mask, num_samples=args.num_samples, num_draws=3)
    train_nan, x_nan = (torch.where(m, v, torch.nan).flatten(1) for v, m in (train, test))
    neighbours = torch.from_numpy(KNNImputer(n_neighbors=args.neighbours).fit(train_nan).transform(x_nan)).view_as(x)
    completions = {
        "VAE": imputed.mean,
        f"{args.neighbours} nearest neighbours": neighbours,
        "mean of each pixel": train_nan.nanmean(0).view(X_SHAPE).expand_as(x),
    }
    print("root mean square error over the missing pixels (black is 0, white is 1):")
    for name, completed in completions.items():
        print(f"  {name:22s} {(completed - splits.test.x)[~mask].square().mean().sqrt():.4f}")

    # Seven rows of seven digits. The mean blurs all possible completions; a draw shows one, with the noise of pixels.
    rows = [splits.test.x, torch.where(mask, x, 0.5), imputed.mean, *imputed.draws, neighbours]
    title = "digit, observed pixels, VAE: mean and three draws, nearest neighbours"
    plots.samples(torch.cat([row[:7] for row in rows]), args.output, title)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--missing", type=float, default=0.5, help="fraction of missing pixels")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--neighbours", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("missing_data.png"), help="file of the picture")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 20
    main(args)
