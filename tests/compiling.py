"""Pairs to compile, and what compares a compiled loss with the eager one; shared by the tests of compilation."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from cases import SMALL
from pyro import distributions as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyrovae import VAE, bounds, encoders, likelihoods, priors
from pyrovae import compile as compiled
from pyrovae.compilation.api import Compiled
from pyrovae.compilation.playback import play_back
from pyrovae.compilation.recording import Recording

SGD = partial(torch.optim.SGD, lr=1e-3)
FETCHED = "the computation depends on a value fetched from a tensor"


class Traced:
    """Stands in for the compiler: plays graphs back, to the same bits, and counts graphs and their runs."""

    def __init__(self):
        self.made, self.runs = 0, 0

    def __call__(self, recording: Recording) -> Callable:
        self.made += 1
        play = play_back(recording)

        def run(*given: Tensor) -> list[Tensor]:
            self.runs += 1
            return play(*given)

        return run


@contextmanager
def refused(reason: str) -> Iterator[list]:
    """Expects one warning that something is not compiled, for a reason."""
    with pytest.warns(UserWarning, match=f"not compiled, and runs eagerly: .*{reason}") as warned:
        yield warned
    assert len([one for one in warned if "leaves no exemplar out" not in str(one.message)]) == 1


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
    """Makes something that is the same each time."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return make()


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def evaluated(elbo: Any, pair: Pair, args: tuple, kwargs: dict[str, Any]) -> list[Tensor | None]:
    """Returns a loss, all that it is made of, and the gradients, which it leaves in place."""
    for p in pair.parameters():
        p.grad = None
    if isinstance(elbo, bounds.Bound) or isinstance(elbo, Compiled) and isinstance(elbo.elbo, bounds.Bound):
        terms = elbo.terms(pair.model, pair.guide, *args, **kwargs)
        terms.loss.backward()
        found = [t.detach().clone() for t in tree_leaves(tuple(terms))]
    else:
        found = [torch.as_tensor(elbo.loss_and_grads(pair.model, pair.guide, *args, **kwargs), dtype=torch.float64)]
    return found + [None if p.grad is None else p.grad.clone() for p in pair.parameters()]


def trained(elbo: Any, pair: Pair, *args: Any, steps: int = 4, change: Callable = lambda step: None, **kwargs: Any):
    """Returns what some steps of gradient descent compute, and what is left: weights, buffers and random state."""
    pyro.set_rng_seed(1)
    found = []
    for step in range(steps):
        change(step)
        found += evaluated(elbo, pair, args, kwargs)
        with torch.no_grad():
            for p in pair.parameters():
                if p.grad is not None:
                    p.sub_(1e-3 * p.grad)
    left = [t.clone() for module in pair.modules for t in module.state_dict().values()]
    return [*found, *left, torch.get_rng_state()]


def same(found: Iterable, expected: Iterable, exact: bool = True) -> None:
    """Asserts equality: to the bit, as graphs that are played back give; else but for rounding.

    Rounding is that of a few thousand operations on numbers of the size of the largest entry.
    """
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            assert a is b
        elif exact or not b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            size = 1 + b[b.isfinite()].abs().max().item() if b.numel() else 1
            torch.testing.assert_close(a, b, rtol=0, atol=(1e-10 if b.dtype == torch.float64 else 1e-4) * size)


def same_compiled(
    make_elbo: Callable[[], Any], make: Callable[[], Pair], *args: Any, exact: bool = True, **kwargs: Any
) -> Compiled:
    """Asserts that steps compiled are those that are not; returns the compiled ELBO."""
    expected = trained(make_elbo(), fresh(make), *args, **kwargs)
    elbo = compiled(make_elbo())
    same(trained(elbo, fresh(make), *args, **kwargs), expected, exact)
    return elbo


def linear(factor: Callable[[], Any] = lambda: 1.0, decoder: nn.Module | None = None, registered: bool = True) -> Pair:
    """Returns a pair by hand whose decoder is multiplied by what a function gives."""
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
    """Dropout and running statistics."""
    network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)).double()
    return linear(decoder=network)
