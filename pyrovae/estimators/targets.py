r"""All latents of a datum as one vector of numbers with its log-densities, for gradients, grids and moves."""

from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import SineBivariateVonMises, SineSkewed
from torch import Tensor
from torch.distributions import VonMises, constraints
from torch.nn.functional import normalize

from pyrovae.compilation.guards import Guards
from pyrovae.distributions.bijections import bijection
from pyrovae.estimators.proposals import WeightedGuide, log_density
from pyrovae.estimators.supports import Classes, Counts, Sphere, discrete_support, sphere
from pyrovae.estimators.task import Task, prior_of
from pyrovae.inference.messages import Untraceable
from pyrovae.inference.sites import is_sphere, sample_sites, unwrapped
from pyrovae.inference.weights import SAMPLES, log_prob_of, per_datum

_ANGLES = (VonMises, SineBivariateVonMises, SineSkewed)  # they state all real numbers as their support
Support = Sphere | Classes | Counts | None  # None for real numbers


class Densities(NamedTuple):
    r"""Log-densities at latents u of shape ``(chains, batch, dim)``.

    Args:
        start: :math:`\log q(u)`, normalised, ``(chains, batch)``.
        rise: :math:`\log p(x, u) - \log q(u)`, of the same shape.
        start_gradient: gradient of `start` with respect to u, ``(chains, batch, dim)``; 0 for discrete latents.
        rise_gradient: gradient of `rise`, of the same shape.
    """

    start: Tensor
    rise: Tensor
    start_gradient: Tensor
    rise_gradient: Tensor


class Site(NamedTuple):
    """Where the latents of a site are in u."""

    name: str
    transform: torch.distributions.Transform | None  # from u to the latents; None for the identity
    plates: tuple[int, ...]  # sizes of the plates other than the data plate
    event: tuple[int, ...]  # event shape of the unconstrained latents
    columns: slice
    frames: tuple[Any, ...]  # the plates, without that of the draws
    support: Support


class Discrete(NamedTuple):
    """The discrete columns of u.

    Args:
        columns: their places in u, ``(n,)``.
        places: the same, as integers.
        sizes: how many values each can take, numbered from 0; 0 for integers that move by steps.
        low: the lowest integers, ``(batch, n)``.
        high: the highest integers, ``(batch, n)``.
    """

    columns: Tensor
    places: list[int]
    sizes: list[int]
    low: Tensor
    high: Tensor


class Target:
    r"""The latents of a model as vectors u, with the densities between a start and the posterior.

    .. math:: \log f_\beta(u) = \log q(u) + \beta \left(\log p(x, u) - \log q(u)\right)

    Latents with a constrained support are mapped to :math:`\mathbb{R}^n` by a bijection; both densities are those of u.
    Unit vectors are in u as they are, with their density on the sphere. Discrete latents are in it as integers: the
    number of a value, or a count itself.

    Args:
        task: the model and the data.
        start: the guide that is q.
        real: whether all of u must be real numbers, without spheres and discrete latents.

    Raises:
        ValueError: when the support of latents is none of these, or depends on other latents.
    """

    def __init__(self, task: Task, start: WeightedGuide, real: bool = True):
        structure = task.structure
        if structure.discrete and real:
            raise ValueError(
                f"the latents at {_names(structure.discrete)} are discrete, and gradients cannot move them. Take "
                "estimators.Enumeration() if all latents are discrete, or AnnealedImportanceSampling() if there are "
                "too many combinations of values to sum over."
            )
        self.task, self.start, self.real = task, start, real
        self.depth, self.place = structure.max_plate_nesting, structure.data_index
        # Distributions keep the validation that they are created with, and it takes time.
        with torch.no_grad(), pyro.validation_enabled(False):
            trace, _ = task.draw(1, start.guide)
            prior, other = (task.draw(1, prior_of(task.model))[0] for _ in range(2))
        self.sites = self._layout(trace, prior, other)
        self.dim = self.sites[-1].columns.stop if self.sites else 0
        self.spheres = [(site.columns, site.support.size) for site in self.sites if isinstance(site.support, Sphere)]
        self.discrete = self._discrete(task.size)
        moved = [site for site in self.sites if not isinstance(site.support, Classes | Counts)]
        self.has_gradients = bool(moved)
        latents = [site for site in sample_sites(trace).values() if not site["is_observed"]]
        # In u, integers have the precision of their log-probabilities.
        precisions = [log_prob_of(site).dtype for site in latents if site["name"] in structure.discrete]
        self.dtype = max(precisions, key=lambda dtype: torch.finfo(dtype).bits) if precisions else None
        # The distribution of a single site depends on no other draw, so that its encoder need not run again.
        self._fixed = latents[0] if len(latents) == 1 else None
        self.template = trace
        # What the density of the start reads, for a graph that is valid for all chunks of data; None without graphs.
        source = () if self.start.is_prior else (self.start.guide if self._fixed is None else self._fixed["fn"],)
        self.reads: Guards | None = None
        if task.graphs is not None:
            with suppress(Untraceable):
                self.reads = Guards(source)

    def _layout(self, trace: poutine.Trace, prior: poutine.Trace, other: poutine.Trace) -> list[Site]:
        """Returns the latent sites of the start; their supports must be the same in two runs of the prior."""
        sites, at = [], 0
        prior_sites, other_sites = sample_sites(prior), sample_sites(other)
        for name, site in sample_sites(trace).items():
            if site["is_observed"]:
                continue
            fn, drawn = site["fn"], prior_sites[name]
            batch, event = fn.batch_shape, tuple(fn.event_shape)
            plates = tuple(n for i, n in enumerate(batch) if i not in (0, self.place))
            transform: torch.distributions.Transform | None = None
            support: Support
            shape = event
            if name in self.task.structure.discrete:
                support = discrete_support(drawn, self.place)
                if support is None:
                    raise ValueError(
                        f'the discrete latents at site "{name}" ({drawn["fn"].support}) are neither integers nor have '
                        "values that can be listed. Take ImportanceSampling()."
                    )
            else:
                transform, support = self._continuous(name, drawn)
            again = discrete_support(other_sites[name], self.place) if isinstance(support, Classes | Counts) else None
            bounds = zip(_bounds(_support(drawn)), _bounds(_support(other_sites[name])), strict=True)
            if not (all(torch.equal(a, b) for a, b in bounds) and _same(support, again)):
                raise ValueError(
                    f'the support of the latents at site "{name}" ({_support(drawn)}) depends on other latents. Draw '
                    "them from a distribution with a fixed support, and map them in the model; or take "
                    "ImportanceSampling()."
                )
            if transform is not None and event:
                shape = tuple(transform.inverse_shape(event))
            size = torch.Size(plates + shape).numel()
            if isinstance(support, Classes):
                size //= support.values[0].numel()
            moved = None if transform is None or _is_identity(transform) else transform
            frames = tuple(frame for frame in site["cond_indep_stack"] if frame.name != SAMPLES)
            sites.append(Site(name, moved, plates, shape, slice(at, at + size), frames, support))
            at += size
        return sites

    def _continuous(self, name: str, site: dict) -> tuple[torch.distributions.Transform | None, Sphere | None]:
        """Returns the bijection to the support of continuous latents; None, and the sphere, for a sphere."""
        support = _support(site)
        if is_sphere(support) and not self.real:
            found = sphere(site["fn"])
            if found.size < 2:
                raise ValueError(
                    f'the latents at site "{name}" are unit vectors of one number, 1 or -1. Draw them from a Bernoulli.'
                )
            return None, found
        try:
            return bijection(support), None
        except NotImplementedError:
            more = "AnnealedImportanceSampling() or " if is_sphere(support) else ""
            raise ValueError(
                f'the latents at site "{name}" have a support ({support}) without a bijection from R^n, which '
                f"gradients would leave. Take {more}ImportanceSampling()."
            ) from None

    def _discrete(self, batch: int) -> Discrete | None:
        """Returns the discrete columns of u; None without."""
        columns, sizes, lows, highs = [], [], [], []
        for site in self.sites:
            if not isinstance(site.support, Classes | Counts):
                continue
            here = list(range(site.columns.start, site.columns.stop))
            columns += here
            if isinstance(site.support, Classes):
                sizes += [len(site.support.values)] * len(here)
                low = torch.zeros(batch, len(here), dtype=torch.double, device=site.support.values.device)
                lows.append(low)
                highs.append(low + len(site.support.values) - 1)
            else:
                sizes += [0] * len(here)
                lows.append(site.support.low)
                highs.append(site.support.high)
        if not columns:
            return None
        low, high = torch.cat(lows, -1), torch.cat(highs, -1)
        return Discrete(torch.tensor(columns, device=low.device), columns, sizes, low, high)

    def draw(self, num_samples: int) -> Tensor:
        """Draws from the start, ``(num_samples, batch, dim)``."""
        with torch.no_grad():
            trace, _ = self.task.draw(num_samples, self.start.guide)
            return self.pack(trace)

    def pack(self, trace: poutine.Trace) -> Tensor:
        """Returns the latents of a trace of several draws as vectors u, ``(num_samples, batch, dim)``."""
        nodes = sample_sites(trace)
        return self._pack({site.name: _value(nodes[site.name]) for site in self.sites})

    def pack_rows(self, trace: poutine.Trace, rows: slice) -> Tensor:
        """Returns the latents of some data, in a trace without a dimension of draws, as u, ``(1, rows, dim)``."""
        values, nodes = {}, sample_sites(trace)
        for site in self.sites:
            node = nodes[site.name]
            value, missing = _value(node), self.depth - len(node["fn"].batch_shape)
            value = value.reshape(*[1] * (missing + 1), *value.shape)
            values[site.name] = value[(slice(None),) * self.place + (rows,)]
        return self._pack(values)

    def _pack(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([self.pack_value(site, values[site.name]) for site in self.sites], dim=-1)

    def pack_value(self, site: Site, value: Tensor) -> Tensor:
        """Returns a site's latents as its columns of u."""
        value = value if site.transform is None else site.transform.inv(value)
        value = value.movedim(self.place, 1)
        if isinstance(site.support, Classes):
            cells = value.reshape(*value.shape[:2], -1, *site.support.values.shape[1:])
            value = site.support.encode(cells)
        if isinstance(site.support, Classes | Counts):
            value = value.to(self.dtype)
        return value.reshape(*value.shape[:2], -1)

    def _unpack(self, u: Tensor) -> tuple[poutine.Trace, Tensor | float]:
        """Returns a trace with the latents at u, and the log Jacobian determinant of the maps from u, by datum."""
        trace, log_det = self.template.copy(), 0.0
        for site in self.sites:
            part = u[..., site.columns]
            if isinstance(site.support, Classes | Counts):
                part = site.support.decode(part.detach())
            part = part.reshape(*u.shape[:2], *site.plates, *site.event).movedim(1, self.place)
            value = part
            if site.transform is not None:
                value = site.transform(part)
                log = site.transform.log_abs_det_jacobian(part, value)
                log_det = log_det + log.movedim(self.place, 1).reshape(*u.shape[:2], -1).sum(-1)
            trace.nodes[site.name] = {**trace.nodes[site.name], "value": value}
        return trace, log_det

    def _terms(self, u: Tensor, task: Task | None = None) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log q(u)`, and :math:`\log p(x \mid u)` if q is the prior, else :math:`\log p(x, u)`."""
        task = self.task if task is None else task
        trace, log_det = self._unpack(u)
        chains = len(u)
        with pyro.validation_enabled(False):
            prior, likelihood = task.score(trace, chains)
            if self.start.is_prior:
                return prior + log_det, likelihood.expand(u.shape[:2])
            if self._fixed is not None:
                value = trace.nodes[self._fixed["name"]]["value"]
                log_q = per_datum(self._fixed, task.log_prob_of({**self._fixed, "value": value}))
            else:
                log_q = log_density(task, self.start.guide, trace, chains)
            return log_q + log_det, prior + likelihood + log_det

    @torch.no_grad()
    def log_joint(self, u: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x, u)`, ``(chains, batch)``, without its graph."""
        return self.log_joint_graph(u)

    def log_joint_graph(self, u: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x, u)`, ``(chains, batch)``."""
        first, second = self._terms(u)
        return first + second if self.start.is_prior else second

    def log_prior_graph(self, u: Tensor) -> Tensor:
        r"""Returns :math:`\log p(u)`, ``(chains, batch)``, where q is the prior."""
        return self._terms(u)[0]

    def values(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what :class:`Densities` names `start` and `rise`, without gradients."""
        if self.reads is None:
            return self._values(u)
        inputs = [u, *self.reads.tensors]
        return self.task.compute(lambda: self._values(u), inputs, ("values", len(u), self.reads.fingerprint))

    @torch.no_grad()
    def _values(self, u: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._terms(u, replace(self.task, graphs=None))  # no graph inside of a graph
        return first, second if self.start.is_prior else second - first

    def variance(self, u: Tensor) -> Tensor:
        """Returns the variance of u over chains, ``(batch, dim)``, positive; the same for all columns of a sphere."""
        variance = u.var(0)
        for columns, size in self.spheres:
            blocks = variance[..., columns].unflatten(-1, (-1, size))
            variance[..., columns] = blocks.mean(-1, keepdim=True).expand_as(blocks).flatten(-2)
        return variance.clamp(min=1e-12)

    def tangent(self, u: Tensor, v: Tensor) -> Tensor:
        """Returns the part of v along which u can move: tangents to spheres, and nothing for discrete columns."""
        if not self.spheres and self.discrete is None:
            return v
        v = v.clone()
        for columns, size in self.spheres:
            x, along = (t[..., columns].unflatten(-1, (-1, size)) for t in (u, v))
            v[..., columns] = (along - (along * x).sum(-1, keepdim=True) * x).flatten(-2)
        if self.discrete is not None:
            v[..., self.discrete.columns] = 0.0
        return v

    def flow(self, u: Tensor, momentum: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Moves u along its momentum: on straight lines, and on great circles of the spheres.

        Args:
            u: the latents, ``(chains, batch, dim)``.
            momentum: tangent at u, of the same shape.
            size: step sizes, of a shape that broadcasts with u, the same for all columns of a sphere.

        Returns:
            The new u and the momentum there.
        """
        moved = u + size * momentum
        if not self.spheres:
            return moved, momentum
        momentum, size = momentum.clone(), size.expand_as(u)
        for columns, length in self.spheres:
            x, p = (t[..., columns].unflatten(-1, (-1, length)) for t in (u, momentum))
            step = size[..., columns].unflatten(-1, (-1, length))[..., :1]
            speed = p.norm(dim=-1, keepdim=True)
            angle = step * speed
            there = normalize(x * angle.cos() + p * step * (angle / torch.pi).sinc(), dim=-1)
            moved[..., columns] = there.flatten(-2)
            momentum[..., columns] = (p * angle.cos() - x * speed * angle.sin()).flatten(-2)
        return moved, self.tangent(moved, momentum)  # without the part across, which is rounding

    def __call__(self, u: Tensor) -> Densities:
        """Returns the log-densities at u and their gradients."""
        if self.reads is None:
            return self._densities(u)
        inputs = [u, *self.reads.tensors]
        return self.task.compute(lambda: self._densities(u), inputs, ("densities", len(u), self.reads.fingerprint))

    def _densities(self, u: Tensor) -> Densities:
        if not self.has_gradients:
            zero = torch.zeros_like(u)
            return Densities(*self._values(u), zero, zero)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            first, second = self._terms(u)
            # One backward pass each: every temperature needs another combination of them.
            gradients = [gradient_of(term, u, retain) for term, retain in ((first, True), (second, False))]
        first, second = first.detach(), second.detach()
        if self.start.is_prior:
            return Densities(first, second, *gradients)
        return Densities(first, second - first, gradients[0], gradients[1] - gradients[0])


def _support(node: dict) -> constraints.Constraint:
    """Returns the support of a site's latents; raises a ValueError where its distribution does not state it."""
    fn = node["fn"]
    if isinstance(unwrapped(fn), _ANGLES):
        return constraints.independent(constraints.interval(-torch.pi, torch.pi), len(fn.event_shape))
    try:
        return fn.support
    except NotImplementedError:
        inner = unwrapped(fn)
        flow: Any = getattr(inner, "dist", None)  # a flow of zuko's, wrapped for Pyro
        if hasattr(flow, "transform") and _is_identity(bijection(flow.base.support)):
            return flow.transform.domain
        raise ValueError(
            f'the {type(inner).__name__} of site "{node["name"]}" does not state the support of its latents. Give it '
            "one, such as pyro.distributions.constraints.real_vector, or take ImportanceSampling()."
        ) from None


def _same(one: Support, other: Support) -> bool:
    """Whether discrete supports, of two draws of the prior, are the same."""
    if isinstance(one, Classes):
        return isinstance(other, Classes) and torch.equal(one.values, other.values)
    if isinstance(one, Counts):
        return isinstance(other, Counts) and torch.equal(one.low, other.low) and torch.equal(one.high, other.high)
    return True


def _value(node: dict) -> Tensor:
    return node["value"].expand(node["fn"].batch_shape + node["fn"].event_shape)


def gradient_of(term: Tensor, u: Tensor, retain: bool) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad(term.sum(), u, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def _bounds(support: constraints.Constraint) -> list[Tensor]:
    """Returns the tensors that define a support, those of the constraints inside it included."""
    bounds = [bound for bound in vars(support).values() if isinstance(bound, Tensor)]
    return bounds + (_bounds(support.base_constraint) if hasattr(support, "base_constraint") else [])


def _is_identity(transform: torch.distributions.Transform) -> bool:
    while isinstance(transform, torch.distributions.IndependentTransform):
        transform = transform.base_transform
    return transform == torch.distributions.transforms.identity_transform


def _names(names: frozenset[str]) -> str:
    listed = ", ".join(f'"{name}"' for name in sorted(names))
    return f"site{'s' if len(names) > 1 else ''} {listed}"
