"""A training loop of your own at the speed of hand-written PyTorch: plain Pyro, one compiled graph.

    python examples/compiled.py

`pyrovae.compile` turns any ELBO (here Pyro's own), for any model and guide, into one graph of tensor operations with
its gradient. The result is used like the ELBO; noise, losses and weights are the same for the same seed. The weight of
the warm-up is a tensor, because each new value of a Python number would need a new graph. `pyrovae.fit(...,
compile=True)` does the same, with validation, checkpoints and several processes (torchrun).
"""

import argparse
import time

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyrovae
from pyrovae import data

LATENT_DIM, PIXELS = 16, 64


def make_pair(hidden=400):
    """Returns a model, a guide, their networks, and the weight of the KL divergence for a warm-up."""
    decoder = nn.Sequential(nn.Linear(LATENT_DIM, hidden), nn.ReLU(), nn.Linear(hidden, PIXELS))
    encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, 2 * LATENT_DIM))
    beta = torch.ones(())

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, nn.ModuleList([decoder, encoder]), beta


def train(elbo, x, args):
    """Trains a new pair; returns it, the loss of the last epoch, and the seconds of the first and of a later step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    model, guide, networks, beta = make_pair()
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=True)
    times = []
    for epoch in range(args.epochs):
        beta.fill_(min((epoch + 1) / 20, 1.0))
        total = 0.0
        batches = torch.randperm(len(x)).split(args.batch_size)
        for rows in batches[:-1]:  # all of one size
            start = time.perf_counter()
            batch = torch.bernoulli(x[rows])
            optimizer.zero_grad()
            total += elbo.loss_and_grads(model, guide, batch) / args.batch_size / (len(batches) - 1)
            optimizer.step()
            times.append(time.perf_counter() - start)
    return model, guide, total, times[0], sum(times[1:]) / len(times[1:])


def main(args):
    splits = data.load("digits")
    x, x_test = splits.train.x.flatten(1), data.static_binarization(splits.test.x).flatten(1)
    print(f"{'':10}{'first step':>12}{'later step':>14}{'final loss':>18}")
    for name, elbo in (("eager", Trace_ELBO()), ("compiled", pyrovae.compile(Trace_ELBO()))):
        model, guide, loss, first, later = train(elbo, x, args)
        print(f"{name:10}{first:10.2f} s{1e3 * later:11.2f} ms{loss:13.3f} nats", flush=True)
    estimate = pyrovae.log_marginal(model, guide, x_test, num_samples=args.num_samples, compile=True, progress=False)
    print(f"\ntest {estimate}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=5000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 25
    main(args)
