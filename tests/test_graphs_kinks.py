"""Graphs of networks with kinks: what rounding decides is no mistake."""

import pyro
import torch
from pyro.infer import Trace_ELBO

import pyrovae
from pyrovae import VAE, encoders, likelihoods, nn, priors


def test_a_unit_at_a_kink_is_no_mistake_of_a_graph():
    # Eager and compiled convolutions add in different orders. Of some 2 million ReLUs a step some have an input within
    # rounding of zero, and then the gradients of that unit differ by a datum's whole share.
    pyro.set_rng_seed(0)
    shape = (1, 28, 28)
    likelihood = likelihoods.Bernoulli(20, shape, nn.DeconvNet)
    vae = VAE(priors.StandardNormal(20), likelihood, encoders.DiagonalNormal(shape, 20, nn.ConvNet))
    x = torch.rand(128, *shape).bernoulli()
    loss = pyrovae.compile(Trace_ELBO())
    for _ in range(100):
        loss.loss_and_grads(vae.model, vae.guide, x)
        for kind in loss.graphs._kinds.values():
            kind.graphs[0].calls = 1  # the next call is held against the ELBO itself
