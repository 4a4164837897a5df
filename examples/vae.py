"""A VAE on handwritten digits, trained by stock Pyro: SVI, Trace_ELBO, pyro.optim.

    python examples/vae.py

`vae.model` and `vae.guide` are an ordinary Pyro model and guide, and all of Pyro works with them. Only the VAE and the
test log p(x) at the end are from pyrovae. `examples/plain_pyro.py` shows the reverse: a model without pyrovae, trained
by pyrovae.
"""

import argparse

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

import pyrovae
from pyrovae import data, encoders, likelihoods, nn, priors


def main(args):
    pyro.set_rng_seed(0)
    train, _, test = data.load("digits")
    x_test = data.static_binarization(test.x)

    # Three parts make a VAE. Each is a module whose forward returns a Pyro distribution, and can be replaced alone.
    latent_dim, x_shape = 16, (1, 8, 8)
    vae = pyrovae.VAE(
        prior=priors.StandardNormal(latent_dim),
        likelihood=likelihoods.Bernoulli(latent_dim, x_shape, network=nn.DeconvNet),
        encoder=encoders.DiagonalNormal(x_shape, latent_dim, network=nn.ConvNet),
    )

    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for epoch in range(args.epochs):
        loss = 0.0
        for rows in torch.randperm(len(train.x)).split(128):
            x = torch.bernoulli(train.x[rows])  # grey values are probabilities of ink: new pixels in each epoch
            loss += svi.step(x)
        if (epoch + 1) % max(args.epochs // 10, 1) == 0:
            print(f"epoch {epoch + 1:4d}   loss {loss / len(train.x):.3f} nats a datum")

    estimate = pyrovae.log_marginal(vae.model, vae.guide, x_test, num_samples=args.num_samples)
    print(f"test {estimate}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 20
    main(args)
