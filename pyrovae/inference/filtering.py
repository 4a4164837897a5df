r"""Particle filters over any Pyro model and guide that draw their sites step by step.

Model and guide run side by side, each as a coroutine that stops at its latent sites. Between two steps the particles of
a datum are resampled. What the functions computed from a particle before, such as the state of a recurrence, follows
it: every operation first brings the tensors that it reads to the present order of the particles.

Particles are a dimension in front of the plates. For functions that cannot take it, such as those with a recurrence of
torch, they are rows: the data are repeated.
"""

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from contextvars import copy_context
from functools import cache
from typing import Any, NamedTuple

import pyro
import torch
from greenlet import GreenletExit, getcurrent, greenlet
from pyro import poutine
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyrovae.arguments import count_data, take_rows
from pyrovae.inference.running import isolated, traced
from pyrovae.inference.sites import latents_of_trace, mask_around, sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import (
    SAMPLES,
    annotate_plates,
    check_masks,
    log_prob_of,
    masked_as,
    per_datum,
    take_draws,
    trace_model,
)

Resampling = Callable[[Tensor], Tensor]


def multinomial(weights: Tensor) -> Tensor:
    """Draws the ancestors of particles independently, in proportion to their weights.

    Args:
        weights: normalised weights, ``(num_particles, *batch)``.

    Returns:
        The index of the ancestor of each particle, shaped like `weights`.

    >>> multinomial(torch.tensor([[0.0], [1.0], [0.0]])).T
    tensor([[1, 1, 1]])
    """
    return _inverse_cdf(weights, torch.rand_like(weights))


def stratified(weights: Tensor) -> Tensor:
    """Draws the ancestors of particles, one in each of as many equal parts of the distribution of weights.

    Arguments and result are those of :func:`multinomial`; the numbers of offspring vary less.

    >>> stratified(torch.full((3, 1), 1 / 3)).T
    tensor([[0, 1, 2]])
    """
    return _inverse_cdf(weights, (_ranks(weights) + torch.rand_like(weights)) / len(weights))


def systematic(weights: Tensor) -> Tensor:
    """Draws the ancestors of particles at equal distances in the distribution of weights, from a common random start.

    Arguments and result are those of :func:`multinomial`; the number of offspring of a particle is its expectation,
    rounded up or down.

    >>> systematic(torch.tensor([[0.5], [0.0], [0.5], [0.0]])).T
    tensor([[0, 0, 2, 2]])
    """
    return _inverse_cdf(weights, (_ranks(weights) + torch.rand_like(weights[:1])) / len(weights))


def _ranks(weights: Tensor) -> Tensor:
    ranks = torch.arange(len(weights), dtype=weights.dtype, device=weights.device)
    return ranks.view(-1, *(1,) * (weights.dim() - 1))


def _inverse_cdf(weights: Tensor, positions: Tensor) -> Tensor:
    cumulated = weights.movedim(0, -1).cumsum(-1)
    # Relative to the last sum, which rounding moves away from 1. A particle without weight is never chosen.
    positions = positions.movedim(0, -1).expand_as(cumulated) * cumulated[..., -1:]
    chosen = torch.searchsorted(cumulated.contiguous(), positions.contiguous(), right=True)
    return chosen.clamp(max=len(weights) - 1).movedim(-1, 0)


class Resampled(NamedTuple):
    """A step after which particles may have been resampled.

    Args:
        log_w: log weights before, since the last resampling, ``(runs, particles, batch)``.
        log_prob: log-probability of the ancestors, 0 where there was no resampling, ``(runs, batch)``.
        log_z: the log of the estimate so far, up to the last resampling, ``(runs, batch)``.
    """

    log_w: Tensor
    log_prob: Tensor
    log_z: Tensor


class Draw(NamedTuple):
    """A latent of the guide without rsample, for its score function.

    Args:
        log_q: its log-probability, ``(runs, batch)``, summed over the particles.
        log_z: the log of the estimate before it was drawn, ``(runs, batch)``.
    """

    log_q: Tensor
    log_z: Tensor


class Filtered(NamedTuple):
    r"""What a particle filter found.

    Args:
        log_z: :math:`\log \hat p(x)`, ``(runs, batch)``; the exponential is unbiased.
        log_w: the last log weights, since the last resampling, ``(runs, particles, batch)``.
        resampled: the steps between which particles were resampled, in order.
        draws: the latents without rsample.
        sites: names of the sites of model and guide.
        model: the model's sites, in the order of the last particles, each with "term": its contribution to the log
            weights, ``(particles, batch)``, and "drawn": its value in the order of the particles of its own step; none
            unless they were kept.
        guide: the guide's sites, likewise.
    """

    log_z: Tensor
    log_w: Tensor
    resampled: list[Resampled]
    draws: list[Draw]
    sites: frozenset[str]
    model: dict[str, dict]
    guide: dict[str, dict]


class _Seen(NamedTuple):
    """What is known of a tensor of particles.

    Args:
        reference: a weak reference to it.
        moves: the number of resamplings that it, or its later version, has seen.
        later: the tensor in the order after these, None for itself.
    """

    reference: Any
    moves: int
    later: Tensor | None


class Particles(TorchFunctionMode):
    """Brings every tensor that depends on particles to their present order, when an operation reads it.

    Args:
        num_particles: of all runs together.
        data_index: the dimension of the data, counted from that of the particles.
        are_rows: whether particles are rows of repeated data, and not a dimension of their own.
    """

    def __init__(self, num_particles: int, data_index: int, are_rows: bool = False):
        super().__init__()
        self.num_particles, self.data_index, self.are_rows = num_particles, data_index, are_rows
        self.batch: int | None = None  # the number of data; None without a plate over them
        self.is_active = True
        self._ancestors: list[Tensor] = []  # one tensor for each resampling
        self._composed: dict[tuple[int, int], Tensor] = {}
        self._seen: dict[int, _Seen] = {}  # by the id of a tensor

    def follow(self, t: Tensor) -> Tensor:
        """Returns a tensor of the particles, marked as in their present order."""
        key = id(t)
        # A weak reference that outlives its tensor removes the entry, before the id can be another's.
        self._seen[key] = _Seen(weakref.ref(t, lambda _: self._seen.pop(key, None)), len(self._ancestors), None)
        return t

    def forget(self) -> None:
        """Lets go of all tensors."""
        self._seen.clear()
        self._composed.clear()

    def resample(self, chosen: Tensor) -> None:
        """Changes the order of the particles to that of their ancestors, ``(num_particles, batch)``."""
        if self.batch is not None:
            chosen = chosen * self.batch + torch.arange(self.batch, device=chosen.device)
        self._ancestors.append(chosen.flatten())
        self._composed.clear()

    def present(self, t: Tensor) -> Tensor:
        """Returns a tensor in the present order of the particles; itself if it does not depend on them."""
        seen, now = self._seen.get(id(t)), len(self._ancestors)
        if seen is None:
            return t
        source = t if seen.later is None else seen.later
        if seen.moves == now:
            return source
        moved = self._take(source, self._ancestors_since(seen.moves))
        self._seen[id(t)] = seen._replace(moves=now, later=moved)
        return moved

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.is_active or name == "requires_grad_":
            return func(*args, **kwargs)
        if name == "__get__":  # of a property, most of which are the same in any order: shape, device
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        moved, depends = self._moved(args)
        if kwargs:
            values, also = self._moved(tuple(kwargs.values()))
            moved_kwargs, depends = dict(zip(kwargs, values, strict=True)), depends or also
        else:
            moved_kwargs = kwargs
        if not depends:
            return func(*args, **kwargs)
        written = _written(name, args, kwargs)
        if any(self.present(t) is not t for t in written):
            raise ValueError(
                f"{name} writes into a tensor of particles that were resampled since. Do not write in place what is "
                "computed from latents: keep the values of all steps in a list, and torch.stack them."
            )
        result = func(*moved, **moved_kwargs)
        for t in (result, *written) if isinstance(result, Tensor) else (*tree_leaves(result), *written):
            if isinstance(t, Tensor):
                self.follow(t)
        return result

    def _moved(self, values: tuple | list) -> tuple[tuple | list, bool]:
        """Returns arguments in the present order of the particles, and whether any depends on them."""
        moved, depends = [], False
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self._seen:
                    value, depends = self.present(value), True
            elif type(value) in (tuple, list):
                value, also = self._moved(value)
                depends = depends or also
            moved.append(value)
        return tuple(moved) if type(values) is tuple else moved, depends

    def _ancestors_since(self, seen: int) -> Tensor:
        """Returns the ancestors, after the resampling number `seen`, of the present particles."""
        now = len(self._ancestors)
        if (seen, now) not in self._composed:
            index = self._ancestors[-1]
            for ancestors in reversed(self._ancestors[seen:-1]):
                index = ancestors.index_select(0, index)
            self._composed[seen, now] = index
        return self._composed[seen, now]

    def _take(self, t: Tensor, index: Tensor) -> Tensor:
        """Returns a tensor at the ancestors of the particles, which are its leftmost dimension that may be theirs."""
        n, batch, d = self.num_particles, self.batch, self.data_index
        if self.are_rows:
            assert batch is not None
            if t.shape == (n, batch):  # terms of log weights
                return t.flatten().index_select(0, index).view(n, batch)
            dims = [i for i, size in enumerate(t.shape) if size == n * batch]
            return t.index_select(dims[0], index) if dims else t
        for i, size in enumerate(t.shape):
            if batch is None:
                if size == n:
                    return t.index_select(i, index)
            elif size == n and i + d < t.dim() and t.shape[i + d] == batch:
                rows = t.movedim(i + d, i + 1).flatten(i, i + 1).index_select(i, index)
                return rows.unflatten(i, (n, batch)).movedim(i + 1, i + d)
            elif size == n * batch and d == 1:
                return t.index_select(i, index)
        return t  # a number of all particles together


def _written(name: str, args: tuple, kwargs: dict) -> list[Tensor]:
    """Returns the tensors that an operation writes into."""
    if "out" in kwargs:
        return [t for t in tree_leaves(kwargs["out"]) if isinstance(t, Tensor)]
    return [t for t in args[:1] if _is_in_place(name)]


@cache
def _is_in_place(name: str) -> bool:
    if name.endswith("_") and not name.endswith("__"):
        return True
    return name == "__setitem__" or name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")


class _Coroutine:
    """A model or a guide that runs until it stops itself, with a stack of Pyro's handlers of its own."""

    def __init__(self, function: Callable[[], Any]):
        self._greenlet = greenlet(lambda _: function())
        self._greenlet.gr_context = copy_context()  # variables such as the data plate that a caller named
        self._state = self._exchange(None)

    @property
    def has_ended(self) -> bool:
        return self._greenlet.dead

    def resume(self, *, close: bool = False) -> None:
        """Runs until the function stops or ends; with `close`, ends it at once."""
        self._greenlet.parent = getcurrent()  # where it stops
        outside = self._exchange(self._state)
        try:
            if close:
                self._greenlet.throw(GreenletExit)
            else:
                self._greenlet.switch(None)
        finally:
            self._state = self._exchange(outside)

    @staticmethod
    def _exchange(state: tuple | None) -> tuple:
        """Returns the state of the running coroutine that Pyro and torch keep globally, and puts another in place."""
        stack, dims = runtime._PYRO_STACK, runtime._DIM_ALLOCATOR._stack
        before = stack[:], dims[:], torch.is_grad_enabled()
        if state is not None:
            stack[:], dims[:] = state[:2]
            torch.set_grad_enabled(state[2])
        return before


def _stop() -> None:
    """Stops the running coroutine, until it is resumed."""
    getcurrent().parent.switch()


class _Sites(Messenger):
    """Gives each sample site to a filter, before and after it has its value."""

    def __init__(self, before: Callable[[Any], None], after: Callable[[Any], None]):
        super().__init__()
        self.before, self.after = before, after

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            self.before(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            self.after(msg)


class _Filter:
    """One run of a particle filter; the arguments are those of :func:`run_filter`."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        structure: SiteStructure,
        num_particles: int,
        num_runs: int,
        threshold: float,
        resampling: Resampling,
        args: tuple,
        kwargs: dict[str, Any],
        keep: bool,
    ):
        check_masks(structure)
        self.structure, self.num_particles, self.num_runs, self.keep = structure, num_particles, num_runs, keep
        self.threshold, self.resampling = threshold, resampling
        self.are_rows, n = not structure.vectorized, num_runs * num_particles
        if self.are_rows:
            self.size = count_data(args, kwargs)
            args, kwargs = take_rows(torch.arange(self.size).repeat(n), args, kwargs)
        self.args, self.kwargs = args, kwargs
        self.particles = Particles(n, structure.data_index, self.are_rows)
        self.subsamples: dict[str, Any] = {}
        self.p: dict[str, dict] = {}  # sites by name, empty where they were not kept
        self.q: dict[str, dict] = {}
        self.log_w: Tensor | None = None  # since the last resampling, (runs * particles, batch)
        self.log_z: Tensor | float = 0.0  # up to the last resampling, (runs, batch)
        self.has_observed = False  # since the last resampling
        self.resampled: list[Resampled] = []
        self.draws: list[Draw] = []

        def start(function: Callable, handler: Messenger) -> _Coroutine:
            def run() -> None:
                samples = pyro.plate(SAMPLES, n, dim=-1 - structure.max_plate_nesting)
                with nullcontext() if self.are_rows else samples, handler:
                    function(*args, **kwargs)

            return _Coroutine(run)

        self.guide = start(guide, _Sites(lambda msg: None, self._drawn))
        self.model = start(model, _Sites(self._requested, self._scored))

    def run(self) -> Filtered:
        try:
            with self.particles:
                self.guide.resume()  # to its first latent, so that plates have their subsamples
                self.model.resume()
                while not self.guide.has_ended:
                    self.guide.resume()
                for site in self.q.values():
                    if site and "term" not in site:  # a latent that the model did not ask for
                        site["term"] = self._term(site)
        finally:
            for coroutine in (self.model, self.guide):
                if not coroutine.has_ended:
                    with suppress(GreenletExit):
                        coroutine.resume(close=True)
            del self.guide, self.model  # which hold this filter, and with it the tensors of all steps
        assert self.log_w is not None
        groups = self._groups(self.log_w)
        total = groups.logsumexp(1)
        found = Filtered(
            self.log_z + total - math.log(self.num_particles),
            groups.detach(),
            self.resampled,
            self.draws,
            frozenset(self.p.keys() | self.q.keys()),
            {name: self._in_order(site) for name, site in self.p.items() if self.keep},
            {name: self._in_order(site) for name, site in self.q.items() if self.keep},
        )
        self.particles.forget()
        return found

    def _groups(self, t: Tensor) -> Tensor:
        return t.unflatten(0, (self.num_runs, self.num_particles))

    def _in_order(self, site: dict) -> dict:
        return site | {key: self.particles.present(site[key]) for key in ("value", "term")} | {"drawn": site["value"]}

    def _drawn(self, msg: Any) -> None:
        """The guide has drawn a latent, or the subsample of a plate."""
        if isinstance(msg["fn"], _Subsample):
            self.subsamples[msg["name"]] = msg.copy()
            return
        self.particles.follow(msg["value"])
        self.q[msg["name"]] = site = self._annotated(msg)
        if site["is_observed"]:
            site["term"] = self._term(site)
            return
        if not site["fn"].has_rsample:
            log_q = self._groups(self._term(site)).sum(1)
            before = torch.zeros_like(log_q) + self.log_z
            if self.log_w is not None:
                before = before + self._groups(self.log_w).logsumexp(1) - math.log(self.num_particles)
            self.draws.append(Draw(log_q, before.detach()))
        if site["infer"].get("is_auxiliary"):
            site["term"] = self._term(site)
            self._add(-site["term"])
        else:  # its term is added with that of the model, whose mask hides it
            _stop()

    def _requested(self, msg: Any) -> None:
        """The model needs the value of a latent, or the subsample of a plate."""
        name, drawn = msg["name"], self.subsamples
        if not isinstance(msg["fn"], _Subsample):
            drawn = self.q
            if self.has_observed and self.threshold > 0:
                self._resample()
            while name not in self.q and not self.guide.has_ended:
                self.guide.resume()
            if name not in self.q:
                raise ValueError(f'The guide misses the latent site "{name}" of the model.')
        if name in drawn:
            msg["value"], msg["infer"], msg["done"] = drawn[name]["value"], drawn[name]["infer"], True

    def _scored(self, msg: Any) -> None:
        """A site of the model has its value."""
        if isinstance(msg["fn"], _Subsample):
            return
        site, name = self._annotated(msg), msg["name"]
        site["term"] = self._term(site)
        self.p[name] = site if self.keep else {}
        if name in self.structure.global_observed:
            return
        self._add(site["term"])
        if site["is_observed"]:
            self.has_observed = True
            return
        q = masked_as(self.q[name], {name: mask_around(site)[0]})
        q["term"] = self._term(q)
        self._add(-q["term"])
        self.q[name] = q
        if not self.keep:
            self.q[name] = {}

    def _annotated(self, msg: Any) -> dict:
        """Returns a site with its plates."""
        if self.are_rows:
            site = self.in_plate(msg.copy())
            frame, rows = site["data"], self.particles.num_particles * self.size
            if frame is not None and (frame.size != rows or frame.full_size not in (None, rows)):
                raise ValueError(
                    "particle filters draw all particles at once, which this model or guide cannot do, and the plate "
                    f"{self.structure.data} does not hold one datum for each row, so that rows cannot be repeated. Let "
                    "model and guide take latents of shape (num_samples, *batch, *event), as the warning says."
                )
            self.particles.batch = self.size
            return site
        trace = poutine.Trace()
        trace.add_node(msg["name"], **msg.copy())
        (site,) = sample_sites(annotate_plates(trace, self.structure)).values()
        if site["data"] is not None:
            self.particles.batch = site["data"].size
        return site

    def in_plate(self, site: dict) -> dict:
        """Returns a site of a run without a dimension of particles, with its plate over the data."""
        return site | {"data": None if self.structure.data is None else self.structure.data.frame(site)}

    def _term(self, site: dict) -> Tensor:
        """Returns the contribution of a site to the log weights, ``(particles, batch)``."""
        return self.particles.follow(self.of_particles(site))

    def of_particles(self, site: dict) -> Tensor:
        """Returns the log-probabilities of a site, ``(particles, batch)``."""
        shape = torch.Size((self.particles.num_particles, self.particles.batch or 1))
        if not self.are_rows:
            return per_datum(site, log_prob_of(site)).expand(shape)
        each = per_datum(site, log_prob_of(site).unsqueeze(0))
        return each.expand(1, shape.numel()).reshape(shape)

    def check_particle_alone(
        self, function: Callable, draws: poutine.Trace, sites: dict[str, dict], args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Checks that the last particle has the same log-probabilities without the other rows of repeated data."""
        assert self.structure.data is not None
        rows = torch.arange(self.size) + self.size * (self.particles.num_particles - 1)
        last = take_draws(latents_of_trace(draws), self.structure.data, rows)
        alone = sample_sites(traced(function, last, *args, **kwargs))
        for name, site in sites.items():
            found = site["term"][-1]
            mask = mask_around(site)[0]
            if isinstance(mask, Tensor) and mask.dim() > 0 and mask.shape[self.structure.data.dim] != 1:
                mask = mask.index_select(self.structure.data.dim, rows.to(mask.device))
            masked = masked_as(self.in_plate(alone[name]), {name: mask})
            expected = per_datum(masked, log_prob_of(masked).unsqueeze(0))[0].expand_as(found)
            if not _agree(found, expected):
                raise ValueError(
                    f'the log-probability at site "{name}" depends on other rows. Particles are rows of repeated data, '
                    "because model and guide cannot draw them at once, as the warning says: compute what belongs to a "
                    "datum from its own row, or let both take latents of shape (num_samples, *batch, *event)."
                )

    def _add(self, term: Tensor) -> None:
        self.log_w = term if self.log_w is None else self.log_w + term

    def _resample(self) -> None:
        """Resamples the particles of the runs and data whose effective sample size is low."""
        assert self.log_w is not None
        self.has_observed = False
        self.particles.is_active = False
        groups, n = self._groups(self.log_w), self.num_particles
        total, ess = groups.logsumexp(1), effective_size(groups)
        needed = total > -math.inf
        if self.threshold < 1:  # at 1 always: rounding may raise the size above the number of particles
            needed = needed & (ess <= self.threshold * n)
        normalised = groups - total.unsqueeze(1)
        first = torch.arange(self.num_runs, device=ess.device).view(-1, 1, 1) * n
        unchanged = torch.arange(n, device=ess.device).view(1, -1, 1).expand_as(groups)
        chosen = self.resampling(normalised.detach().exp().movedim(1, 0)).movedim(0, 1)
        chosen = torch.where(needed.unsqueeze(1), chosen, unchanged)
        log_prob = torch.where(needed, normalised.gather(1, chosen).sum(1), 0.0)
        self.log_z = self.log_z + torch.where(needed, total - math.log(n), 0.0)
        self.resampled.append(Resampled(groups.detach(), log_prob, self.log_z.detach()))
        log_w = torch.where(needed.unsqueeze(1), 0.0, groups).flatten(0, 1)
        self.particles.resample((first + chosen).flatten(0, 1))
        self.log_w = self.particles.follow(log_w)
        self.particles.is_active = True


def effective_size(log_w: Tensor, dim: int = 1) -> Tensor:
    """Returns the effective sample size of log weights over a dimension, that of particles by default."""
    log_w = log_w.detach()
    return (2 * log_w.logsumexp(dim) - (2 * log_w).logsumexp(dim)).exp()


def run_filter(
    model: Callable,
    guide: Callable,
    structure: SiteStructure,
    num_particles: int,
    threshold: float,
    resampling: Resampling,
    args: tuple,
    kwargs: dict[str, Any],
    num_runs: int = 1,
    keep: bool = True,
) -> Filtered:
    """Runs a particle filter, whose steps are the latent sites of a model.

    Before each latent site of the model, if something was observed since the last one, the particles of each datum
    whose effective sample size is at most `threshold` times their number are resampled.

    Args:
        model: a Pyro model.
        guide: a Pyro guide, the proposal.
        structure: their sites.
        num_particles: particles of each run and datum.
        threshold: the share of the particles to which the effective sample size may fall; 1 to resample always.
        resampling: draws ancestors, such as :func:`systematic`.
        args: what both are called with.
        kwargs: what both are called with.
        num_runs: independent filters, which run at once.
        keep: whether to return the sites, which takes memory for all steps.
    """
    return _Filter(model, guide, structure, num_particles, num_runs, threshold, resampling, args, kwargs, keep).run()


def check_followed(
    model: Callable, guide: Callable, structure: SiteStructure, num_particles: int, args: tuple, kwargs: dict[str, Any]
) -> Filtered:
    """Checks that all that a model and a guide compute from particles followed them when these were resampled.

    The paths of the last particles are scored again without any resampling: each site must have the log-probability
    that it had when it was filtered. Returns the run that was checked.

    Raises:
        ValueError: when it has another; the message names the site.
    """
    with isolated([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]):
        run = _Filter(model, guide, structure, num_particles, 1, 1.0, multinomial, args, kwargs, keep=True)
        filtered, draws = run.run(), poutine.Trace()
        for site in [*run.subsamples.values(), *filtered.guide.values()]:
            draws.add_node(site["name"], **{key: value for key, value in site.items() if key != "term"})
        for function, sites in ((guide, filtered.guide), (model, filtered.model)):
            if run.are_rows:
                again = sample_sites(traced(function, latents_of_trace(draws), *run.args, **run.kwargs))
            else:
                again = sample_sites(trace_model(function, draws, structure, num_particles, *args, **kwargs))
            for name, site in sites.items():
                masked = masked_as(run.in_plate(again[name]), {name: mask_around(site)[0]})
                if not _agree(site["term"], run.of_particles(masked)):
                    raise ValueError(
                        f'the log-probability at site "{name}" is another after particles were resampled: something '
                        "that the model or the guide computes from its latents does not follow them. Keep latents and "
                        "what is computed from them in tensors of shape (num_particles, *batch, *event), or with these "
                        "dimensions flattened in this order, and do not mix particles."
                    )
            if run.are_rows:
                run.check_particle_alone(function, draws, sites, args, kwargs)
    return filtered


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether log-probabilities are the same but for rounding."""
    finite = expected.isfinite()
    error = torch.where(finite, (found - expected).abs(), (found != expected) & ~found.isnan()).amax()
    size = torch.where(finite, expected.abs(), 0.0).amax()
    return bool(error <= math.sqrt(torch.finfo(found.dtype).eps) * (1 + size))
