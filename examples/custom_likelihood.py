"""A likelihood of your own: the pixels of the digits are counts from 0 to 16, here with a binomial distribution.

    python examples/custom_likelihood.py

A part is a module whose forward returns a Pyro distribution; this one has ten lines. The command line takes the same
class by its import path, for any file of counts:

    pyrovae train --data counts.npy --preprocessing grey \
        --likelihood custom_likelihood.Binomial --likelihood.total_count 16
"""

import argparse
import math

import pyro
from pyro import distributions as dist

import pyrovae
from pyrovae import data, encoders, priors
from pyrovae.likelihoods import Likelihood
from pyrovae.nn import MLP, Network, Shape


class Binomial(Likelihood):
    """Independent binomial pixels, for counts from 0 to total_count."""

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, total_count: int = 16, context_dim: int = 0
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        self.total_count = total_count

    def forward(self, z, context=None):
        return dist.Binomial(self.total_count, logits=self.parameters_of(z, context)).to_event(len(self.x_shape))


def main(args):
    pyro.set_rng_seed(0)
    train, validation, test = (part.x * 16 for part in data.load("digits"))  # grey values back to counts
    latent_dim, x_shape = 16, (1, 8, 8)
    vae = pyrovae.VAE(
        prior=priors.StandardNormal(latent_dim),
        likelihood=Binomial(latent_dim, x_shape),
        encoder=encoders.DiagonalNormal(x_shape, latent_dim),
    )
    pyrovae.fit(vae.model, vae.guide, train, validation=validation, epochs=args.epochs, patience=20)
    estimate = pyrovae.log_marginal(vae.model, vae.guide, test, num_samples=args.num_samples)
    print(f"test {estimate}")

    print(f"baseline, all counts equally likely: {-64 * math.log(17):.3f} nats a datum")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 20
    main(args)
