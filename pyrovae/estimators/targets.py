r"""All latents of a datum as one unconstrained vector with its log-densities, for gradients and grids."""

from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyrovae.compilation.guards import Guards
from pyrovae.estimators.proposals import WeightedGuide, log_density
from pyrovae.estimators.task import Task, prior_of
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.weights import SAMPLES, log_prob_of, per_datum


class Densities(NamedTuple):
    r"""Log-densities at latents u of shape ``(chains, batch, dim)``.

    Args:
        start: :math:`\log q(u)`, normalised, ``(chains, batch)``.
        rise: :math:`\log p(x, u) - \log q(u)`, of the same shape.
        start_gradient: gradient of `start` with respect to u, ``(chains, batch, dim)``.
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


class Target:
    r"""The latents of a model as unconstrained vectors u, with the densities between a start and the posterior.

    .. math:: \log f_\beta(u) = \log q(u) + \beta \left(\log p(x, u) - \log q(u)\right)

    Latents with a constrained support are mapped to :math:`\mathbb{R}^n` by a bijection; both densities are those of u.

    Args:
        task: the model and the data.
        start: the guide that is q.

    Raises:
        ValueError: when latents are not continuous, or their support has no bijection from :math:`\mathbb{R}^n`.
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
        # Distributions keep the validation that they are created with, and it takes time.
        with torch.no_grad(), pyro.validation_enabled(False):
            trace, _ = task.draw(1, start.guide)
            prior, other = (task.draw(1, prior_of(task.model))[0] for _ in range(2))
        self.sites = self._layout(trace, prior, other)
        self.dim = self.sites[-1].columns.stop if self.sites else 0
        latents = [site for site in sample_sites(trace).values() if not site["is_observed"]]
        # The distribution of a single site depends on no other draw, so that its encoder need not run again.
        self._fixed = latents[0] if len(latents) == 1 else None
        self.template = trace
        # What the density of the start reads, for a compiled graph that is valid for all chunks of data.
        source = () if self.start.is_prior else (self.start.guide if self._fixed is None else self._fixed["fn"],)
        self.reads = Guards(source) if task.graphs is not None else None

    def _layout(self, trace: poutine.Trace, prior: poutine.Trace, other: poutine.Trace) -> list[Site]:
        """Returns the latent sites of the start; their supports must be the same in two runs of the prior."""
        sites, at = [], 0
        prior_sites, other_sites = sample_sites(prior), sample_sites(other)
        for name, site in sample_sites(trace).items():
            if site["is_observed"]:
                continue
            fn, support = site["fn"], _support(prior_sites[name])
            batch, event = fn.batch_shape, fn.event_shape
            plates = tuple(n for i, n in enumerate(batch) if i not in (0, self.place))
            try:
                transform = biject_to(support)
            except NotImplementedError:
                raise ValueError(
                    f'the latents at site "{name}" have a support ({support}) without a bijection from R^n, which '
                    "gradients would leave. Take ImportanceSampling()."
                ) from None
            bounds = zip(_bounds(support), _bounds(_support(other_sites[name])), strict=True)
            if not all(torch.equal(a, b) for a, b in bounds):
                raise ValueError(
                    f'the support of the latents at site "{name}" ({support}) depends on other latents. Draw them from '
                    "a distribution with a fixed support, and map them in the model; or take ImportanceSampling()."
                )
            shape = tuple(transform.inverse_shape(event)) if event else ()
            size = torch.Size(plates + shape).numel()
            moved = None if _is_identity(transform) else transform
            frames = tuple(frame for frame in site["cond_indep_stack"] if frame.name != SAMPLES)
            sites.append(Site(name, moved, plates, shape, slice(at, at + size), frames))
            at += size
        return sites

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
        return value.movedim(self.place, 1).reshape(len(value), value.shape[self.place], -1)

    def _unpack(self, u: Tensor) -> tuple[poutine.Trace, Tensor | float]:
        """Returns a trace with the latents at u, and the log Jacobian determinant of the maps from u, by datum."""
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
        r"""Returns :math:`\log q(u)`, and :math:`\log p(x \mid u)` if q is the prior, else :math:`\log p(x, u)`."""
        trace, log_det = self._unpack(u)
        chains = len(u)
        with pyro.validation_enabled(False):
            prior, likelihood = self.task.score(trace, chains)
            if self.start.is_prior:
                return prior + log_det, likelihood.expand(u.shape[:2])
            if self._fixed is not None:
                value = trace.nodes[self._fixed["name"]]["value"]
                log_q = per_datum(self._fixed, log_prob_of({**self._fixed, "value": value}))
            else:
                log_q = log_density(self.task, self.start.guide, trace, chains)
            return log_q + log_det, prior + likelihood + log_det

    @torch.no_grad()
    def log_joint(self, u: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x, u)`, ``(chains, batch)``, without its graph."""
        return self.log_joint_graph(u)

    def log_joint_graph(self, u: Tensor) -> Tensor:
        r"""Returns :math:`\log p(x, u)`, ``(chains, batch)``."""
        first, second = self._terms(u)
        return first + second if self.start.is_prior else second

    def __call__(self, u: Tensor) -> Densities:
        """Returns the log-densities at u and their gradients."""
        if self.reads is None:
            return self._densities(u)
        inputs = [u, *self.reads.tensors]
        return self.task.compute(lambda: self._densities(u), inputs, ("densities", len(u), self.reads.fingerprint))

    def _densities(self, u: Tensor) -> Densities:
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
    try:
        return fn.support
    except NotImplementedError:
        flow: Any = getattr(fn, "dist", None)  # a flow of zuko's, wrapped for Pyro
        if hasattr(flow, "transform") and _is_identity(biject_to(flow.base.support)):
            return flow.transform.domain
        raise ValueError(
            f'the {type(fn).__name__} of site "{node["name"]}" does not state the support of its latents. Give it one, '
            "such as pyro.distributions.constraints.real_vector, or take ImportanceSampling()."
        ) from None


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
