"""A model and a guide in plain Pyro, without a class of pyrovae, trained and scored by pyrovae.

    python examples/plain_pyro.py

The library has no class for this model: it has two latents, and one of them is the scale of the other.

    s ~ LogNormal(0, 1)        z | s ~ Normal(0, s I)        x | z ~ Bernoulli(decoder(z))

pyrovae needs the following of the pair. Model and guide take the same arguments. The sites of a datum are in a plate
named "data" at dimension -1. Networks are registered with pyro.module and act on the last dimension, because samples
have shape (num_samples, batch, latent_dim).
"""

import argparse

import pyro
import torch
from pyro import distributions as dist
from torch import nn

import pyrovae
from pyrovae import data

D = 10
decoder = nn.Sequential(nn.Linear(D, 200), nn.ReLU(), nn.Linear(200, 64))
encoder = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 2 * D + 2))


def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.LogNormal(torch.zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(D), s.unsqueeze(-1)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        loc, scale, s_loc, s_scale = encoder(x).split([D, D, 1, 1], dim=-1)
        pyro.sample("s", dist.LogNormal(s_loc.squeeze(-1), s_scale.squeeze(-1).exp()))
        pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def main(args):
    pyro.set_rng_seed(0)
    train, validation, test = (part.x.flatten(1) for part in data.load("digits"))
    history = pyrovae.fit(
        model,
        guide,
        train,
        transform=data.dynamic_binarization,
        validation=data.static_binarization(validation),
        epochs=args.epochs,
        patience=20,
    )
    print(history)
    x_test = data.static_binarization(test)
    estimate = pyrovae.log_marginal(model, guide, x_test, num_samples=args.num_samples)
    print(f"test {estimate}")

    # The log weights of all samples, (num_samples, batch), for an estimator or a bound of your own.
    log_w = pyrovae.log_weights(model, guide, x_test[:5], num_samples=100)
    print(f"ELBO of the first five test data: {[round(v, 1) for v in log_w.mean(0).tolist()]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 20
    main(args)
