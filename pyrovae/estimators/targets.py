r"""All latents of a datum as one vector of any real numbers, and its log-densities: where gradients and grids work."""

from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyrovae.compilation.guards import Guards
from pyrovae.estimators.base import Task, prior_of
from pyrovae.estimators.proposals import WeightedGuide, log_density
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.weights import log_prob_of, per_datum


class Densities(NamedTuple):
    r"""Log-densities at latents u of shape ``(chains, batch, dim)``.

    Args:
        start: :math:`\log q(u)`, normalised, ``(chains, batch)``.
        rise: what the model's :math:`\log p(x, u)` is above it, of the same shape.
        start_gradient: of `start` in u, ``(chains, batch, dim)``.
        rise_gradient: of `rise`.
    """

    start: Tensor
    rise: Tensor
    start_gradient: Tensor
    rise_gradient: Tensor


class _Site(NamedTuple):
    name: str
    transform: torch.distributions.Transform | None  # from real numbers to the latents; None where they are the same
    plates: tuple[int, ...]  # sizes of the plates but the data's
    event: tuple[int, ...]  # shape of the real numbers
    columns: slice


class Target:
    r"""The latents of a model as real numbers u, the density that they start from and the one to reach.

    .. math:: \log f_\beta(u) = \log q(u) + \beta \left(\log p(x, u) - \log q(u)\right)

    Latents in a bounded space are mapped to real numbers, and both densities are those of u.

    Args:
        task: the model and the data.
        start: what q is.

    Raises:
        ValueError: when latents are not continuous, or their space is none that real numbers are mapped to one to one.
    """

    def __init__(self, task: Task, start: WeightedGuide):
        structure = task.structure
        if structure.discrete:
            raise ValueError(
                f"the latents at {_names(structure.discrete)} are discrete, and gradients cannot move them. Take "
                "estimators.Enumeration() if all latents are discrete, or ImportanceSampling()."
            )
        self.task, self.start = task, start
        self.depth, self.place = structure.max_plate_nesting, structure.data_index
        # Distributions that were made with validation keep to it, and it takes time.
        with torch.no_grad(), pyro.validation_enabled(False):
            trace, _ = task.draw(1, start.guide)
            prior, other = (task.draw(1, prior_of(task.model))[0] for _ in range(2))
        self._layout(trace, prior, other)
        own = [site for site in sample_sites(trace).values() if not site["is_observed"]]
        # The distribution of a single site depends on nothing that is drawn: its encoder need not run again.
        self._fixed = own[0]["fn"] if len(own) == 1 else None
        self.template = trace
        # What its density is computed from, for a graph that matches all data.
        source = () if self.start.is_prior else (self.start.guide if self._fixed is None else self._fixed,)
        self.reads = Guards(source) if task.graphs is not None else None

    def _layout(self, trace: poutine.Trace, prior: poutine.Trace, other: poutine.Trace) -> None:
        self.sites, at = [], 0
        for name, site in sample_sites(trace).items():
            if site["is_observed"]:
                continue
            fn, support = site["fn"], _support(prior.nodes[name])
            batch, event = fn.batch_shape, fn.event_shape
            plates = tuple(n for i, n in enumerate(batch) if i not in (0, self.place))
            try:
                transform = biject_to(support)
            except NotImplementedError:
                raise ValueError(
                    f'the latents at site "{name}" live in a space ({support}) that real numbers are not mapped to one to '
                    "one, and gradients would lead out of it. Take ImportanceSampling()."
                ) from None
            bounds = zip(_bounds(support), _bounds(_support(other.nodes[name])), strict=True)
            if not all(torch.equal(a, b) for a, b in bounds):
                raise ValueError(
                    f'the space of the latents at site "{name}" ({support}) depends on other latents. Draw them from one that '
                    "does not, and map them in the model; or take ImportanceSampling()."
                )
            shape = tuple(transform.inverse_shape(event)) if event else ()
            if _is_identity(transform):
                transform = None
            size = torch.Size(plates + shape).numel()
            self.sites.append(_Site(name, transform, plates, shape, slice(at, at + size)))
            at += size
        self.dim = at

    def draw(self, num_samples: int) -> Tensor:
        """Draws from the start, ``(num_samples, batch, dim)``."""
        with torch.no_grad():
            trace, _ = self.task.draw(num_samples, self.start.guide)
            return self.pack(trace)

    def pack(self, trace: poutine.Trace) -> Tensor:
        """Returns the latents of a trace of several draws as real numbers."""
        return self._pack({site.name: _value(trace.nodes[site.name]) for site in self.sites})

    def pack_rows(self, trace: poutine.Trace, rows: slice) -> Tensor:
        """Returns the latents of some data in a trace without a dimension of draws as real numbers, ``(1, rows, dim)``."""
        values = {}
        for site in self.sites:
            node = trace.nodes[site.name]
            value, missing = _value(node), self.depth - len(node["fn"].batch_shape)
            value = value.reshape(*[1] * (missing + 1), *value.shape)
            values[site.name] = value[(slice(None),) * self.place + (rows,)]
        return self._pack(values)

    def _pack(self, values: dict[str, Tensor]) -> Tensor:
        parts = []
        for site in self.sites:
            value = values[site.name]
            value = value if site.transform is None else site.transform.inv(value)
            parts.append(value.movedim(self.place, 1).reshape(len(value), value.shape[self.place], -1))
        return torch.cat(parts, dim=-1)

    def _unpack(self, u: Tensor) -> tuple[poutine.Trace, Tensor | float]:
        """Returns a trace with the latents, and the log of how much volume the maps from real numbers make."""
        trace, log_det = self.template.copy(), 0.0
        for site in self.sites:
            part = u[..., site.columns].reshape(*u.shape[:2], *site.plates, *site.event).movedim(1, self.place)
            value = part
            if site.transform is not None:
                value = site.transform(part)
                log = site.transform.log_abs_det_jacobian(part, value)
                log_det = log_det + log.movedim(self.place, 1).reshape(*u.shape[:2], -1).sum(-1)
            trace.nodes[site.name] = {**trace.nodes[site.name], "value": value}
        return trace, log_det

    def _terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two terms of which the log-density is made: :math:`\\log q` and, from the prior, what comes on top."""
        trace, log_det = self._unpack(u)
        chains = len(u)
        with pyro.validation_enabled(False):
            prior, likelihood = self.task.score(trace, chains)
            if self.start.is_prior:
                return prior + log_det, likelihood.expand(u.shape[:2])
            if self._fixed is not None:
                (site,) = self.sites
                node = self.template.nodes[site.name]
                log_q = per_datum(node, log_prob_of({**node, "value": trace.nodes[site.name]["value"]}))
            else:
                log_q = log_density(self.task, self.start.guide, trace, chains)
            return log_q + log_det, prior + likelihood + log_det

    @torch.no_grad()
    def log_joint(self, u: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x, u)`, ``(chains, batch)``."""
        first, second = self._terms(u)
        return first + second if self.start.is_prior else second

    def __call__(self, u: Tensor) -> Densities:
        """Returns the log-densities at u and their gradients."""
        if self.task.graphs is None:
            return self._densities(u)
        inputs = [u, *self.reads.tensors]
        return self.task.compute(lambda: self._densities(u), inputs, ("densities", len(u), self.reads.fingerprint))

    def _densities(self, u: Tensor) -> Densities:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            first, second = self._terms(u)
            # One pass each: at another temperature they are combined anew.
            gradients = [_gradient(term, u, retain) for term, retain in ((first, True), (second, False))]
        first, second = first.detach(), second.detach()
        if self.start.is_prior:
            return Densities(first, second, *gradients)
        return Densities(first, second - first, gradients[0], gradients[1] - gradients[0])


def _support(node: dict) -> constraints.Constraint:
    """Returns the space of a site's latents; raises a ValueError where its distribution does not say."""
    fn = node["fn"]
    try:
        return fn.support
    except NotImplementedError:
        flow = getattr(fn, "dist", None)  # one of zuko's, in Pyro's shell
        if hasattr(flow, "transform") and _is_identity(biject_to(flow.base.support)):
            return flow.transform.domain
        raise ValueError(
            f'the {type(fn).__name__} of site "{node["name"]}" does not say what space its latents are in. Give it a support, '
            "such as pyro.distributions.constraints.real_vector, or take ImportanceSampling()."
        ) from None


def _value(node: dict) -> Tensor:
    return node["value"].expand(node["fn"].batch_shape + node["fn"].event_shape)


def _gradient(term: Tensor, u: Tensor, retain: bool) -> Tensor:
    if not term.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad(term.sum(), u, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def _bounds(support: constraints.Constraint) -> list[Tensor]:
    own = [bound for bound in vars(support).values() if isinstance(bound, Tensor)]
    return own + (_bounds(support.base_constraint) if hasattr(support, "base_constraint") else [])


def _is_identity(transform: torch.distributions.Transform) -> bool:
    while isinstance(transform, torch.distributions.IndependentTransform):
        transform = transform.base_transform
    return transform == torch.distributions.transforms.identity_transform


def _names(names: frozenset[str]) -> str:
    listed = ", ".join(f'"{name}"' for name in sorted(names))
    return f"site{'s' if len(names) > 1 else ''} {listed}"
