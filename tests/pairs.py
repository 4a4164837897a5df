"""Pairs of a model and a guide for the tests of compilation, and the comparison of their results."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from cases import SMALL
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae import VAE, encoders, likelihoods, priors


class Pair(NamedTuple):
    """A model, a guide, and the modules that hold their parameters."""

    model: Callable
    guide: Callable
    modules: list[nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.modules for p in module.parameters()]


def small_vae() -> VAE:
    return VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))


def pair_of(vae: nn.Module) -> Pair:
    return Pair(vae.model, vae.guide, [vae])


def fresh(make: Callable[[], Any]) -> Any:
    """Calls a function with an empty parameter store and a fixed seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return make()


def same(found: Iterable, expected: Iterable) -> None:
    """Asserts equality up to the rounding of a few thousand operations on numbers of the size of the largest entry."""
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            assert a is b
        elif b.is_floating_point():
            size = 1 + b[b.isfinite()].abs().max().item() if b.numel() else 1
            torch.testing.assert_close(a, b, rtol=0, atol=(1e-10 if b.dtype == torch.float64 else 1e-4) * size)
        else:
            assert torch.equal(a, b)


def linear(factor: Callable[[], Any] = lambda: 1.0, decoder: nn.Module | None = None, registered: bool = True) -> Pair:
    """Returns a pair whose decoder's output is multiplied by the value of a function."""
    decoder = nn.Linear(2, 3).double() if decoder is None else decoder

    def model(x):
        if registered:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(factor() * decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    return Pair(model, guide, [decoder])


def normalised() -> Pair:
    """Returns a pair with dropout and running statistics."""
    network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    return linear(decoder=network)
