"""Pairs of models and guides drawn at random: their weights, compared with sums over sites of particle by particle.

A pair is a description, a :class:`Pair`. Pyro runs it through :meth:`Pair.model` and :meth:`Pair.guide`;
:func:`by_hand` reads the same description and adds up log-densities one number at a time, in Python's arithmetic. Both
use the same draws: the guide runs inside of a trace of this module, whose values are read afterwards.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pyrovae import bounds, log_marginal, log_weights

ORDINARY = settings(
    deadline=None, derandomize=True, database=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
MANY = settings(ORDINARY, max_examples=3000)

# Some twenty numbers below a hundred are added up in double precision, each the result of some ten roundings.
ROUNDING = 20 * 10 * 100 * torch.finfo(torch.float64).eps


class Site(NamedTuple):
    """A site: its family, how many elements an event has (0 for none), where it stands and what masks it.

    Its natural parameter is `shift + slope * c`, with c the datum's covariate, plus what earlier latents add: see
    :func:`squashed`.
    """

    name: str
    family: str
    width: int
    inner: bool
    shift: float
    slope: float
    guide_shift: float
    guide_slope: float
    model_mask: str
    guide_mask: str


class Pair(NamedTuple):
    """A model and a guide of these sites, the last of them observed.

    Args:
        sites: the latents in the model's order, then the observed site.
        reverse: whether the guide draws the latents in the other order.
        plate: the name of the data plate.
        dim: its dimension.
        total: how many data it stands for; 0 for those that it holds, -1 for a plate without a size.
        inner: the name of a plate inside of the data, of five.
        inner_dim: its dimension.
        factor: the name of a factor of the model; empty for none.
        scale: what the losses of model and guide are scaled by.
        alone: whether model and guide refuse several draws at once.
    """

    sites: tuple[Site, ...]
    reverse: bool
    plate: str
    dim: int
    total: int
    inner: str
    inner_dim: int
    factor: str
    scale: float
    alone: bool = False

    @property
    def latents(self) -> tuple[Site, ...]:
        return self.sites[:-1]

    @property
    def in_guide(self) -> tuple[Site, ...]:
        return self.latents[::-1] if self.reverse else self.latents

    @property
    def depth(self) -> int:
        """How many dimensions the plates take."""
        return max(-self.dim, -self.inner_dim if any(site.inner for site in self.sites) else 0)

    def _placed(self, t: Tensor, inner: bool) -> Tensor:
        """Moves ``(data, *event)``, or ``(data, inner, *event)``, to where the plates are."""
        if inner and self.inner_dim < self.dim:
            t = t.transpose(0, 1)
        event = t.shape[1 + inner :]
        shape = [1] * max(-self.dim, -self.inner_dim if inner else 0)
        sizes = t.shape[: 1 + inner]
        for dim, size in zip(sorted([self.dim] + [self.inner_dim] * inner), sizes, strict=True):
            shape[dim] = size
        return t.reshape(*shape, *event)

    def _plate(self, size: int) -> pyro.plate:
        if self.total < 0:
            return pyro.plate(self.plate, dim=self.dim)
        if self.total > 0:
            return pyro.plate(self.plate, self.total, subsample_size=size, dim=self.dim)
        return pyro.plate(self.plate, size, dim=self.dim)

    def _sum(self, before: list[tuple[Site, Tensor]], inner: bool) -> Tensor | float:
        total = 0.0
        for site, z in before:
            u = squashed(z.double())
            u = u.sum(-1) if site.width else u
            if site.inner and not inner:
                u = u.sum(self.inner_dim, keepdim=True)
            if self.alone and u.dim() > self.depth:
                raise RuntimeError("several draws at once")
            total = total + u
        return total

    def _sample(
        self, site: Site, side: str, plate: Any, before: list, c: Tensor, mask: Tensor, obs: Tensor | None = None
    ) -> Tensor:
        shift, slope, how = (
            (site.shift, site.slope, site.model_mask)
            if side == "p"
            else (site.guide_shift, site.guide_slope, site.guide_mask)
        )
        eta = shift + slope * self._placed(c, False) + self._sum(before, site.inner)
        if site.inner:
            eta = eta + torch.zeros(5).double().reshape([5] + [1] * (-self.inner_dim - 1))
        if site.width:
            eta = eta.unsqueeze(-1) + 0.25 * torch.arange(site.width)
        fn = FAMILIES[site.family].distribution(eta)
        mask = self._placed(mask, False)
        if how == "elements":  # of the events, the first; of a site without, the site
            first = torch.arange(site.width) == 0
            fn = fn.mask(mask.unsqueeze(-1) | ~first if site.width else mask)
        if site.width:
            fn = fn.to_event(1)
        if how == "distribution":
            fn = fn.mask(mask)
        with ExitStack() as stack:
            if site.inner:
                stack.enter_context(plate)
            if how == "poutine":
                stack.enter_context(poutine.mask(mask=mask))
            return pyro.sample(site.name, fn, obs=obs)

    def model(self, c: Tensor, x: Tensor, mask: Tensor) -> None:
        *latents, observed = self.sites
        before: list[tuple[Site, Tensor]] = []
        plate = pyro.plate(self.inner, 5, dim=self.inner_dim) if any(site.inner for site in self.sites) else None
        with poutine.scale(scale=self.scale), self._plate(len(c)):
            for site in latents:
                before.append((site, self._sample(site, "p", plate, before, c, mask)))
            if self.factor:
                pyro.factor(self.factor, 0.7 * self._sum(before, False) + 0.2 * self._placed(c, False))
            self._sample(observed, "p", plate, before, c, mask, obs=self._placed(x, observed.inner))

    def guide(self, c: Tensor, x: Tensor, mask: Tensor) -> None:
        before: list[tuple[Site, Tensor]] = []
        plate = pyro.plate(self.inner, 5, dim=self.inner_dim) if any(site.inner for site in self.latents) else None
        with poutine.scale(scale=self.scale), self._plate(len(c)):
            for site in self.in_guide:
                before.append((site, self._sample(site, "q", plate, before, c, mask)))

    def data(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns covariates, observations and a mask, whose first datum is left as it is."""
        observed = self.sites[-1]
        shape = (size, *[5] * observed.inner, *[observed.width] * (observed.width > 0))
        x = FAMILIES[observed.family].distribution(torch.zeros(shape).double()).sample()
        return torch.randn(size).double(), x, torch.arange(size) % 2 == 0


def squashed(z):
    """What a latent adds to the natural parameters of later sites: between -1 and 1, whatever its family."""
    return z / (1 + abs(z))


class Family(NamedTuple):
    """A distribution by its natural parameter, and its log-density in plain arithmetic."""

    distribution: Callable[[Tensor], dist.TorchDistribution]
    log_density: Callable[[float, float], float]


def log_normal(x: float, loc: float, scale: float) -> float:
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def log_gamma(x: float, shape: float, rate: float) -> float:
    return shape * math.log(rate) - math.lgamma(shape) + (shape - 1) * math.log(x) - rate * x


def log_category(x: float, logits: list[float]) -> float:
    return logits[round(x)] - math.log(sum(math.exp(logit) for logit in logits))


FAMILIES = {
    "Normal": Family(lambda eta: dist.Normal(eta, 0.8), lambda x, eta: log_normal(x, eta, 0.8)),
    "LogNormal": Family(
        lambda eta: dist.LogNormal(0.4 * eta, 0.6), lambda x, eta: log_normal(math.log(x), 0.4 * eta, 0.6) - math.log(x)
    ),
    "Gamma": Family(
        lambda eta: dist.Gamma(2 + (0.3 * eta).exp(), 1.5), lambda x, eta: log_gamma(x, 2 + math.exp(0.3 * eta), 1.5)
    ),
    "Bernoulli": Family(lambda eta: dist.Bernoulli(logits=eta), lambda x, eta: log_category(x, [0.0, eta])),
    "Categorical": Family(
        lambda eta: dist.Categorical(logits=torch.stack([torch.zeros_like(eta), eta, -eta], dim=-1)),
        lambda x, eta: log_category(x, [0.0, eta, -eta]),
    ),
}


def is_masked_inside(pair: Pair) -> bool:
    """Returns whether elements of a latent are masked in the model alone, or in the guide alone."""
    return any(
        site.width > 0 and (site.model_mask == "elements") != (site.guide_mask == "elements") for site in pair.latents
    )


def without_masks(pair: Pair, mask: Tensor) -> Pair:
    """Returns the pair without the masks of its latents if they differ between model and guide for some datum."""

    def hides(kind: str, width: int) -> str:
        return "none" if bool(mask.all()) else "some" if kind == "elements" and width > 1 else "all"

    def effect(kind: str, width: int) -> str:
        return "none" if kind == "none" else hides(kind, width)

    if all(effect(site.model_mask, site.width) == effect(site.guide_mask, site.width) for site in pair.latents):
        return pair
    latents = tuple(site._replace(model_mask="none", guide_mask="none") for site in pair.latents)
    return pair._replace(sites=(*latents, pair.sites[-1]))


def by_hand(pair: Pair, draws: list[dict[str, Tensor]], c: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """log p(x, z) - log q(z | x), ``(num_draws, batch)``, for draws whose values have plates and events, no samples."""
    c, mask = c.tolist(), mask.tolist()
    return torch.tensor(
        [
            [_log_weight(pair, _latents_of(pair, values, n), n, c[n], x[n], mask[n]) for n in range(len(c))]
            for values in draws
        ],
        dtype=torch.float64,
    )


def _latents_of(pair: Pair, values: dict[str, Tensor], n: int) -> dict[str, list[list[float]]]:
    """Returns the latents of a datum: for each site, for each place of the inner plate, its elements."""
    latents = {}
    for site in pair.latents:
        value = values[site.name].double().unsqueeze(-1) if site.width == 0 else values[site.name].double()
        value = value.reshape([1] * (pair.depth + 1 - value.dim()) + list(value.shape))
        value = value.movedim(pair.dim - 1, 0)[n]
        if site.inner:
            value = value.movedim(pair.inner_dim + (pair.dim > pair.inner_dim) - 1, 0)
        latents[site.name] = value.reshape(5 if site.inner else 1, max(site.width, 1)).tolist()
    return latents


def _log_weight(pair: Pair, latents: dict, n: int, c: float, x: Tensor, kept: bool) -> float:
    observed = pair.sites[-1]
    seen = {observed.name: x.double().reshape(5 if observed.inner else 1, max(observed.width, 1)).tolist()}
    log_p = log_q = 0.0
    for i, site in enumerate(pair.sites):
        log_p += _log_density(site, pair.sites[:i], site.shift, site.slope, site.model_mask, latents | seen, c, kept)
    for i, site in enumerate(pair.in_guide):
        shift, slope = site.guide_shift, site.guide_slope
        # What the model masks plays no part in q either, whatever the guide masks.
        log_q += _log_density(site, pair.in_guide[:i], shift, slope, site.model_mask, latents, c, kept)
    if pair.factor:
        log_p += 0.7 * sum(squashed(z) for site in pair.latents for row in latents[site.name] for z in row) + 0.2 * c
    return log_p - log_q


def _log_density(
    site: Site, before: tuple[Site, ...], shift: float, slope: float, mask: str, values: dict, c: float, kept: bool
) -> float:
    total = 0.0
    for j, elements in enumerate(values[site.name]):
        eta = shift + slope * c
        for parent in before:
            rows = values[parent.name]
            if parent.inner and site.inner:
                rows = [rows[j]]
            eta += sum(squashed(z) for row in rows for z in row)
        for e, value in enumerate(elements):
            masked = mask != "none" and not kept and (mask != "elements" or e == 0)
            if not masked:
                total += FAMILIES[site.family].log_density(value, eta + 0.25 * e)
    return total


class Recorded:
    """A guide whose draws are kept, run by run."""

    def __init__(self, pair: Pair):
        self.pair = pair
        self.runs: list[dict[str, Tensor]] = []

    def __call__(self, *args: Tensor) -> None:
        with poutine.trace() as tracer:
            self.pair.guide(*args)
        self.runs.append({site.name: tracer.trace.nodes[site.name]["value"].detach() for site in self.pair.latents})

    def draws(self, num_samples: int) -> list[dict[str, Tensor]]:
        """Returns the latest draws, which were made in one run, or one by one."""
        if self.pair.alone:
            return self.runs[-num_samples:]
        for site in self.pair.latents:
            value = self.runs[-1][site.name]
            assert value.dim() == 1 + self.pair.depth + (site.width > 0) and len(value) == num_samples
        return [{name: value[k] for name, value in self.runs[-1].items()} for k in range(num_samples)]


names = st.text("abcxyzABZ0189_. -éβ", min_size=1, max_size=8).filter(str.strip)
quarters = st.integers(-4, 4).map(lambda n: n / 4)
masks = st.sampled_from(["none", "none", "poutine", "distribution", "elements"])


@st.composite
def pairs(draw, alone: bool = False) -> tuple[Pair, int]:
    """Draws a pair, and how many data it is for."""
    size = draw(st.integers(2, 4))
    count = draw(st.integers(1, 3))
    called = draw(
        st.lists(names.filter(lambda name: name != "data"), min_size=count + 4, max_size=count + 4, unique=True)
    )
    sites = tuple(
        Site(
            name=name,
            family=draw(st.sampled_from(sorted(FAMILIES))),
            width=draw(st.sampled_from([0, 0, 2])),
            inner=draw(st.booleans()),
            shift=draw(quarters),
            slope=draw(quarters),
            guide_shift=draw(quarters),
            guide_slope=draw(quarters),
            model_mask=draw(masks),
            guide_mask=draw(masks),
        )
        for name in called[: count + 1]
    )
    dim = draw(st.sampled_from([-1, -2]))
    pair = Pair(
        sites=sites,
        reverse=draw(st.booleans()),
        plate=draw(st.sampled_from(["data", called[-3]])),
        dim=dim,
        total=draw(st.sampled_from([0, 0, -1, 7, 12])),
        inner=called[-2],
        inner_dim=draw(st.sampled_from([-3 - dim, -3])),
        factor=draw(st.sampled_from(["", called[-1]])),
        scale=draw(st.sampled_from([1.0, 1.0, 0.25, 3.0])),
        alone=alone,
    )
    return pair, size


def check(pair: Pair, size: int) -> None:
    """Compares log weights, the importance-weighted loss and log p(x) of three particles with sums by hand."""
    torch.manual_seed(0)
    data = pair.data(size)
    recorded = Recorded(pair)

    def expected() -> Tensor:
        return by_hand(pair, recorded.draws(3), *data)

    if is_masked_inside(pair):  # log p(x) alone is known, of the latents without their masks
        with pytest.raises(ValueError, match="is masked inside of its distribution"), torch.no_grad():
            log_weights(pair.model, recorded, *data, num_samples=3)
        with pytest.raises(ValueError, match="is masked inside of its distribution"):
            bounds.IWAE(num_particles=3).loss(pair.model, recorded, *data)
        estimate = log_marginal(pair.model, recorded, *data, num_samples=3, progress=False)
        counted = by_hand(without_masks(pair, data[-1]), recorded.draws(3), *data)
        assert_equal(estimate.value, counted.logsumexp(0) - math.log(3))
        return
    with torch.no_grad():
        log_w = log_weights(pair.model, recorded, *data, num_samples=3)
    assert_equal(log_w, expected())
    estimate = log_marginal(pair.model, recorded, *data, num_samples=3, progress=False)
    assert_equal(estimate.value, expected().logsumexp(0) - math.log(3))
    loss = bounds.IWAE(num_particles=3).loss(pair.model, recorded, *data)
    scale = pair.scale * (pair.total / size if pair.total > 0 else 1.0)
    bound = scale * (expected().logsumexp(0) - math.log(3)).sum()
    assert_equal(torch.tensor(-loss, dtype=torch.float64), bound)


def assert_equal(ours: Tensor, by_hand: Tensor) -> None:
    assert ours.shape == by_hand.shape
    error = (ours - by_hand).abs() / (1 + by_hand.abs())
    assert error.max() < ROUNDING, f"{ours.tolist()} where the sums are {by_hand.tolist()}"


@ORDINARY
@given(pairs())
def test_weights_of_random_pairs_are_sums_over_their_sites(drawn):
    check(*drawn)


@pytest.mark.slow
@MANY
@given(pairs())
def test_weights_of_many_random_pairs_are_sums_over_their_sites(drawn):
    check(*drawn)


@settings(ORDINARY, max_examples=20)
@given(pairs(alone=True))
def test_pairs_that_take_one_draw_at_a_time_have_the_same_sums(drawn):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="samples are drawn one by one")
        check(*drawn)
