"""Shards of batches: their noise is that of one process, and their losses add up."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from bound_cases import BOUNDS, BoundCase
from helpers import assert_same
from linear_gaussian import diagonal_vae, gradients
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from pyrovae import VAE
from pyrovae.distributed import World

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # of sums in another order, in double precision
WIDTH = 5


def data(size: int) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


DRAWS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "randn": torch.randn,
    "rand": torch.rand,
    "randint": lambda shape: torch.randint(1000, shape),
    "randn_like": lambda shape: torch.randn_like(torch.empty(shape)),
    "rand_like": lambda shape: torch.rand_like(torch.empty(shape)),
    "randint_like": lambda shape: torch.randint_like(torch.empty(shape), 1000),
    "randn of out": lambda shape: torch.randn(shape, out=torch.empty(shape)),
    "normal_": lambda shape: torch.empty(shape).normal_(),
    "uniform_": lambda shape: torch.empty(shape).uniform_(),
    "exponential_": lambda shape: torch.empty(shape).exponential_(),
    "cauchy_": lambda shape: torch.empty(shape).cauchy_(),
    "log_normal_": lambda shape: torch.empty(shape).log_normal_(),
    "geometric_": lambda shape: torch.empty(shape).geometric_(0.1),
    "bernoulli_": lambda shape: torch.empty(shape).bernoulli_(0.4),
    "bernoulli_ of probabilities": lambda shape: torch.empty(shape).bernoulli_(torch.full(shape, 0.4)),
    "bernoulli": lambda shape: torch.bernoulli(torch.full(shape, 0.4)),
    "normal": lambda shape: torch.normal(torch.zeros(shape), torch.ones(shape)),
    "normal of one scale": lambda shape: torch.normal(torch.zeros(shape), 2.0),
    "dropout": lambda shape: dropout(torch.ones(shape), 0.4),
    "Normal": lambda shape: dist.Normal(torch.zeros(shape), 1.0).rsample(),
    "Normal, expanded": lambda shape: dist.Normal(torch.zeros(shape[-1:]), 1.0).expand(shape).rsample(),
    "Laplace": lambda shape: dist.Laplace(torch.zeros(shape), 1.0).rsample(),
    "Bernoulli": lambda shape: dist.Bernoulli(torch.full(shape, 0.4)).sample(),
    "Categorical": lambda shape: dist.Categorical(torch.ones(*shape, 5)).sample(),
}
# The dimension of the data, and the shape of the noise for n data.
LAYOUTS: dict[str, tuple[int, Callable[[int], tuple[int, ...]]]] = {
    "data": (0, lambda n: (n,)),
    "particles": (1, lambda n: (6, n)),
    "vectors": (0, lambda n: (n, 13)),
    "as many dimensions as data in a shard": (0, lambda n: (n, 4)),
    "images": (0, lambda n: (n, 3, 11, 13)),
    "particles of vectors": (1, lambda n: (6, n, 13)),
    "as many particles as data in a shard": (1, lambda n: (4, n, 13)),
    "particles of particles": (2, lambda n: (2, 6, n, 13)),
}


def sharded(function: Callable[[int], Tensor], total: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the result of a function of the number of data in each process, and the random states after it."""
    found, states = [], []
    for shard in (World(i, size).shard(total) for i in range(size)):
        torch.manual_seed(3)
        with shard.noise():
            found.append(function(shard.count))
        states.append(torch.get_rng_state())
    return found, states


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DRAWS)
def test_noise_of_all_shards_is_what_one_process_draws(name, layout):
    place, shape = LAYOUTS[layout]
    if name == "Categorical" and place != len(shape(1)) - 1:
        pytest.skip("torch flattens all batch dimensions, where the dimension of the data cannot be recognised")
    for total, size in ((8, 2), (7, 2), (10, 3)):
        found, states = sharded(lambda n: DRAWS[name](shape(n)), total, size)
        torch.manual_seed(3)
        whole = DRAWS[name](shape(total))
        assert_same(torch.cat(found, place), whole)
        for state in states:
            assert state.equal(torch.get_rng_state())


def test_particles_and_data_may_be_in_one_dimension():
    for total, size in ((8, 2), (7, 2), (10, 3)):
        found, states = sharded(lambda n: torch.randn(3 * n, 13), total, size)
        torch.manual_seed(3)
        whole = torch.randn(3 * total, 13)
        assert_same(torch.cat([x.unflatten(0, (3, -1)) for x in found], 1), whole.unflatten(0, (3, -1)))
        for state in states:
            assert state.equal(torch.get_rng_state())


def test_noise_without_a_data_dimension_is_the_same_in_all_processes():
    (first, second), (state, other) = sharded(lambda n: torch.randn(5, 13), 12, 2)
    assert_same(first, second)
    assert state.equal(other)


# Draws by rejection, which take a random number of random numbers, and draws where the dimension of the data cannot be
# recognised, have the right distribution only. The functions return cumulative probabilities of draws for n data.
OTHERS: dict[str, Callable[[int], np.ndarray]] = {
    "Gamma": lambda n: scipy.stats.gamma(0.7).cdf(dist.Gamma(torch.full((n, 50), 0.7), 1.0).rsample()),
    "Beta": lambda n: scipy.stats.beta(0.7, 2).cdf(dist.Beta(torch.full((n, 50), 0.7), 2.0).rsample()),
    "Dirichlet": lambda n: scipy.stats.beta(0.7, 1.4).cdf(
        dist.Dirichlet(torch.full((n, 50, 3), 0.7)).rsample()[..., 0]
    ),
    "two dimensions of the data's size": lambda n: scipy.stats.norm.cdf(torch.randn(n, 3, n, 2)),
    "one that is a multiple of it": lambda n: scipy.stats.norm.cdf(torch.randn(3, 2 * n, 2)),
    "flattened": lambda n: scipy.stats.norm.cdf(torch.randn(n * 50)),
}


@pytest.mark.parametrize("total", [400, 401])
@pytest.mark.parametrize("name", OTHERS)
def test_other_noise_has_the_right_distribution_and_is_independent(name, total):
    (first, second), _ = sharded(lambda n: torch.as_tensor(OTHERS[name](n)), total, 2)
    for found, n in ((first, total // 2), (second, total - total // 2)):
        assert found.shape == torch.as_tensor(OTHERS[name](n)).shape
        assert scipy.stats.kstest(found.flatten(), "uniform").pvalue > 1e-6
    length = min(first.numel(), second.numel())
    assert scipy.stats.spearmanr(first.flatten()[:length], second.flatten()[:length]).pvalue > 1e-6


def test_noise_without_a_data_dimension_keeps_its_shape():
    """Weights of a Bayesian network, with one dimension of the size of the batch."""
    found, _ = sharded(lambda n: torch.randn(400, 128), 128, 2)
    assert [x.shape for x in found] == 2 * [(400, 128)]


def test_there_may_be_as_many_categories_as_data_in_a_shard():
    for total in (7, 8):
        found, _ = sharded(lambda n: dist.Categorical(torch.ones(6, n, total // 2)).sample(), total, 2)
        assert [x.shape[0] for x in found] == [6, 6]
        assert max(x.max() for x in found) < total // 2


def test_a_simplex_may_have_as_many_corners_as_data_in_a_shard():
    found, _ = sharded(lambda n: dist.Dirichlet(torch.ones(2, 4)).sample(), 8, 2)
    for x in found:
        torch.testing.assert_close(x.sum(-1), torch.ones(2))


def test_random_slopes_have_their_gradient():
    def slopes(n: int) -> Tensor:
        x = torch.full((n, 13), -2.0, requires_grad=True)
        y = nn.RReLU()(x + 0)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return torch.stack([gradient, y.detach() / -2], 1)

    found, _ = sharded(slopes, 8, 2)
    for gradient, slope in (x.unbind(1) for x in found):
        torch.testing.assert_close(gradient, slope)
        assert ((gradient > 1 / 8) & (gradient < 1 / 3)).all() and gradient.std() > 0


def test_a_permutation_is_of_the_data_of_the_shard():
    """A model permutes the data that it is called with."""
    found, _ = sharded(torch.randperm, 8, 2)
    for order in found:
        assert order.sort().values.tolist() == [0, 1, 2, 3]


def test_attention_without_dropout_draws_nothing():
    """Torch tags its kernel as random. Were it widened along the sequence, some elements would count twice."""
    x = torch.randn(8, 2, 4, 6)
    wanted = scaled_dot_product_attention(x, x, x)
    for shard in (World(i, 2).shard(8) for i in range(2)):
        ((mine,), _) = shard.rows((x,), {})
        with shard.noise():
            found = scaled_dot_product_attention(mine, mine, mine)
        torch.testing.assert_close(found, shard.rows((wanted,), {})[0][0])


def loss_and_gradient(bound: Any, vae: VAE, x: Tensor) -> Tensor:
    loss = bound.differentiable_loss(vae.model, vae.guide, x)
    return torch.cat([loss.detach().reshape(1), gradients(loss, vae)])


LOSSES = [*BOUNDS, BoundCase("Trace_ELBO", lambda k: Trace_ELBO(k, vectorize_particles=True, max_plate_nesting=1))]


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_every_loss_is_the_sum_over_shards(case):
    vae, x = diagonal_vae(2, WIDTH), data(7)
    for size in (2, 3):
        torch.manual_seed(3)
        wanted = loss_and_gradient(case.build(6), vae, x)
        found = 0.0
        for shard in (World(i, size).shard(len(x)) for i in range(size)):
            torch.manual_seed(3)
            with shard.noise():
                found = found + loss_and_gradient(case.build(6), vae, *shard.rows((x,), {})[0])
        torch.testing.assert_close(found, wanted, **ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 16])
def test_shards_hold_all_data_once(total, size):
    shards = [World(i, size).shard(total) for i in range(size)]
    assert math.isclose(sum(shard.weight for shard in shards), 1.0)
    rows = [shard.rows((torch.arange(total),), {})[0][0].tolist() for shard in shards]
    if total < size:  # each has all data
        assert rows == size * [[*range(total)]]
    else:
        assert [*chain.from_iterable(rows)] == [*range(total)]
        assert all(math.isclose(shard.weight, shard.count / total) and shard.count for shard in shards)
