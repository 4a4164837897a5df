r"""What all bounds have in common: log weights of particles, a function of them, and an estimate of its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrovae.bounds.gradients import Coefficients, Gradient, Reparameterized, leave_one_out
from pyrovae.bounds.kl import conditioned_alike
from pyrovae.bounds.reductions import Reduced
from pyrovae.inference.messages import described, is_integer
from pyrovae.inference.sites import layers, sample_sites
from pyrovae.inference.structure import DATA, SiteStructure, inspect, named_plate
from pyrovae.inference.weights import (
    check_draws,
    check_same_sites,
    in_data,
    log_prob_of,
    per_datum,
    trace_guide,
    trace_model,
)
from pyrovae.regularizers import Cost, Regularizer, Run


class Terms(NamedTuple):
    r"""A loss and what it is made of, each summed over the data (and scaled up to all data by a subsampled plate).

    Args:
        loss: what training lowers, in nats; differentiable, with the gradient of the bound's estimator, if gradients are
            enabled.
        bound: the bound itself, on :math:`\log p(x)`, apart from training weights and regularizers.
        reconstruction: :math:`\mathrm{E}_q \log p(x \mid z)`, of all observed sites.
        kl: :math:`\mathrm{E}_q [\log q(z \mid x) - \log p(z)]`, for each latent site.
        regularizers: what each regularizer added to the loss, by the name of its class; numbered where one comes again.
    """

    loss: Tensor
    bound: Tensor
    reconstruction: Tensor
    kl: dict[str, Tensor]
    regularizers: dict[str, Tensor]

    @property
    def named(self) -> dict[str, Tensor]:
        """All of them without their gradients, by the names that they have in a history."""
        kl = {f"kl {name}": t for name, t in self.kl.items()}
        parts = {"bound": self.bound, "reconstruction": self.reconstruction, **kl, **self.regularizers}
        return {"loss": self.loss.detach(), **parts}


class Sides(NamedTuple):
    r"""The contributions of sites to log weights, ``(num_particles, batch)`` or with a dimension of latents at the end.

    Args:
        observed: of observed sites, :math:`\log p(x \mid z)`.
        model: of latent sites, :math:`\log p(z)`, or minus a KL divergence in closed form.
        guide: of latent sites, :math:`\log q(z \mid x)`; none where the KL divergence is in closed form.
        scales: what a site's contribution is still to be scaled by, for each site of the model ("p", name) and of the
            guide ("q", name).
    """

    observed: dict[str, Tensor]
    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    scales: dict[tuple[str, str], float | Tensor]


class LossParts(NamedTuple):
    r"""What a bound makes of the contributions of sites.

    Args:
        log_p: all that stands on the model's side of the log weights, ``(num_particles, batch)``.
        log_q: all that stands on the guide's, of the same shape.
        outside: the part of the log weights that belongs to no datum, ``(num_particles, 1)``; each datum has its share.
        scale: what the bound of each datum is scaled by.
        loss: the loss, and
        bound: the bound, both summed over the data.
    """

    log_p: Tensor
    log_q: Tensor
    outside: Tensor | float
    scale: float | Tensor
    loss: Tensor
    bound: Tensor


class Bound(PyroELBO, ABC):
    r"""Base of the bounds: a training objective for any Pyro model and guide.

    .. math:: \mathcal{L} = \mathrm{E}_{z_1, \dots, z_K \sim q(z \mid x)}\, f(\ell_1, \dots, \ell_K), \qquad
        \ell_k = \log p(x, z_k) - \log q(z_k \mid x)

    A bound goes wherever Pyro takes an ELBO: in ``pyrovae.fit(..., loss=...)`` and ``pyro.infer.SVI``. Particles are
    vectorised. :meth:`terms` gives what the loss is made of. The loss is minus the sum over the data of the bound; the
    N/B of a subsampled data plate stands outside f, masks inside.

    To add a bound, derive from :class:`ImportanceBound` and write :meth:`reduce`, f with its first two derivatives, as a
    :class:`Reduced` over the first dimension of the log weights. Class attributes say the rest: `smooth` is False if f has
    a kink, which its second derivative leaves out; `linear` is True if f is a mean; `is_upper` is True if training is to
    lower it.

    Args:
        num_particles: draws of the guide per datum :math:`K`, at least 1.
        gradient: the estimator of its gradient, plain reparameterisation unless given.
        chunk_size: particles that the model is run on at once, to bound memory; their gradients are accumulated, at the
            price of running it again when the gradient passes. The guide is run on all of them, once. None for no chunks.
        regularizers: what else the loss holds, for which it is then no bound.
    """

    linear = False
    smooth = True
    is_upper = False

    def __init__(
        self,
        num_particles: int,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        for name, value in (("num_particles", num_particles), ("chunk_size", chunk_size)):
            if not (is_integer(value) and value >= 1 or name == "chunk_size" and value is None):
                given = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
                raise ValueError(f"{name} must be an integer of at least 1, got {given}.")
        super().__init__(num_particles=int(num_particles), vectorize_particles=True)
        self.gradient = Reparameterized() if gradient is None else gradient
        if not isinstance(self.gradient, Gradient):
            raise TypeError(f"gradient must be an estimator such as bounds.Reparameterized(), got {gradient!r}.")
        if not (isinstance(regularizers, Sequence) and all(isinstance(r, Regularizer) for r in regularizers)):
            raise TypeError(f"regularizers must be a list of regularizers that are built, got {regularizers!r}.")
        self.chunk_size = None if chunk_size is None else int(chunk_size)
        self.regularizers = tuple(regularizers)
        self.steps = 0
        self._inspected, self._structure = None, None
        self.gradient.check(self)

    @abstractmethod
    def reduce(self, log_w: Tensor) -> Reduced:
        """Returns f of log weights ``(num_particles, *rest)``, over the first dimension, with its derivatives."""

    def reduce_model(self, log_w: Tensor) -> Reduced:
        """Returns the f that the model's parameters are trained by, the guide's unless a bound says otherwise."""
        return self.reduce(log_w)

    @abstractmethod
    def _loss_parts(self, sides: Sides, reconstruction: Tensor, kl: dict[str, Tensor], batch: int) -> LossParts:
        """Returns log weights and loss from the contributions of sites, and from what the terms are of those."""

    @abstractmethod
    def _check_structure(self, structure: SiteStructure) -> None:
        """Raises a ValueError, which names the site, if the bound is not defined for a model and a guide."""

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Terms:
        """Estimates the loss and what it is made of; with gradients enabled, a step of training.

        Args:
            model: a Pyro model, called with the same arguments as the guide.
            guide: a Pyro guide with the model's latent sites.
            *args: what both are called with.
            **kwargs: what both are called with.

        Raises:
            ValueError: when model and guide do not fit each other, the data or the bound; the message names the site.
        """
        look = (model, guide, _form(args, kwargs), named_plate.get())
        if self._inspected != look:
            structure = inspect(model, guide, *args, **kwargs)
            if structure.guide_observed:
                listed = ", ".join(f'"{name}"' for name in sorted(structure.guide_observed))
                raise ValueError(
                    f"the guide observes {listed}, which is no part of q, so that {type(self).__name__} would bound nothing. "
                    "Hide it with poutine.block, move it to the model, or train with pyro.infer.Trace_ELBO."
                )
            self._check_structure(structure)
            structure = check_draws(structure, model, guide, *args, **kwargs)
            terms = self._terms(model, guide, structure, args, kwargs)
            self._inspected, self._structure = look, structure
            return terms
        return self._terms(model, guide, self._structure, args, kwargs)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of the loss; schedules are taken at their end, so that epochs can be compared."""
        with torch.no_grad():
            return self.terms(model, guide, *args, **kwargs).loss.item()

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Returns an estimate of the loss that can be differentiated."""
        return self.terms(model, guide, *args, **kwargs).loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Returns an estimate of the loss and adds its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def state_dict(self) -> dict[str, int]:
        """Returns what a resumed run needs: how many steps there were."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Puts back what :meth:`state_dict` returned."""
        self.steps = state["steps"]

    def __repr__(self) -> str:
        return described(self)

    @property
    def schedules(self) -> list:
        """The numbers that change from step to step, none unless a bound says otherwise."""
        return []

    @property
    def span(self) -> int:
        """Training steps until the schedules have had their way, once; 0 without any."""
        return 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks for itself, and takes no model with it.
        return self.__dict__ | {"_inspected": None, "_structure": None}

    def _get_trace(self, model, guide, args, kwargs):
        raise NotImplementedError(f"{type(self).__name__} makes its traces in terms().")

    @property
    def _whole(self) -> bool:
        """Whether one backward pass through the log weights is all that the gradient takes."""
        return self.gradient.whole

    @property
    def _follows_path(self) -> bool:
        """Whether the gradient goes through the latents."""
        return self.gradient.whole or self.gradient.reparameterized

    @property
    def _scored(self) -> bool:
        """Whether latents without an rsample have score functions."""
        return self.gradient.scored

    def _coefficients(self, log_w: Tensor) -> Coefficients:
        return self.gradient.coefficients(self, log_w)

    def _model_side(self, p: dict, q: dict, closed_form: bool) -> tuple[Tensor, bool]:
        """Returns the contribution of a latent on the model's side, and whether it is all, a KL divergence."""
        return per_datum(p, log_prob_of(p)), False

    def _guide_side(self, q: dict, shared: bool) -> Tensor:
        """Returns the contribution of a latent on the guide's side, one that the model has too or not."""
        return per_datum(q, log_prob_of(q))

    def _scale_of(self, site: dict) -> float | Tensor:
        """Returns what a site's contribution is still to be scaled by."""
        return site["scale"]

    def _terms(self, model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict) -> Terms:
        training = torch.is_grad_enabled()
        cut = _Cut(self._follows_path or bool(self.regularizers)) if training and not self._whole else None
        with cut or nullcontext():
            guide_trace = trace_guide(guide, structure, self.num_particles, *args, **kwargs)
        latents = {name: site for name, site in sample_sites(guide_trace).items() if not site["is_observed"]}
        scores = self._check_latents(latents) if training else {}
        traces, sides, closed = self._score(model, guide, structure, guide_trace, args, kwargs)
        for name, q in sample_sites(guide_trace).items():
            sides.scales["q", name] = self._scale_of(q)
            if name not in closed:
                sides.guide[name] = self._log_q(q, name in sides.model, cut is not None)
        reconstruction, kl = _parts(sides)
        batch, full = _data_size([*sample_sites(traces[0]).values(), *latents.values()])
        weighed = self._loss_parts(sides, reconstruction, kl, batch)
        run = Run(*traces, model, guide, args, kwargs)
        costs = _numbered([(type(regularizer).__name__, regularizer(run)) for regularizer in self.regularizers])
        values = {name: full / batch * cost.value.detach() for name, cost in costs.items()}
        loss = weighed.loss + sum(values.values())
        if training:
            extra = full / batch * sum(cost.value + cost.aside for cost in costs.values())
            surrogate = self._surrogate(weighed, scores, extra, cut) + self._also(run, structure, weighed.scale)
            # The value of the loss with the gradient of its estimator.
            loss = loss.detach() - (surrogate - surrogate.detach())
            self.steps += 1
        return Terms(loss, weighed.bound.detach(), reconstruction, kl, values)

    def _score(
        self,
        model: Callable,
        guide: Callable,
        structure: SiteStructure,
        draws: poutine.Trace,
        args: tuple,
        kwargs: dict,
    ) -> tuple[tuple[poutine.Trace, poutine.Trace], Sides, set[str]]:
        """Runs the model at a guide's draws, in chunks.

        Returns:
            The traces of model and guide for the first chunk; the contributions of the model's sites, with none of the
            guide's; and the names of the latents of which these are all, a KL divergence.
        """
        names = [name for name, site in sample_sites(draws).items() if not site["is_observed"]]
        values = [draws.nodes[name]["value"] for name in names]
        size = min(self.chunk_size or self.num_particles, self.num_particles) if values else self.num_particles
        traces, closed, scales = [], set(), {}

        def score(first: bool, *values: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            part = draws.copy()
            for name, value in zip(names, values, strict=True):
                part.nodes[name] = {**draws.nodes[name], "value": value}
            k = len(values[0]) if values else size
            model_trace = trace_model(model, part, structure, k, *args, **kwargs)
            _check_sites(structure, draws, model_trace)
            if size < self.num_particles and (self._closes or first and self.regularizers):
                part = trace_model(guide, part, structure, k, *args, **kwargs)  # its distributions for these draws
            sites, observed, side = sample_sites(model_trace), {}, {}
            exact = conditioned_alike(list(sites), names)
            for name, p in sites.items():
                scales["p", name] = self._scale_of(p)
                if p["is_observed"]:
                    observed[name] = per_datum(p, self._scaled(p, log_prob_of(p)))
                elif name in names:
                    side[name], all_of_it = self._model_side(p, part.nodes[name], name in exact)
                    closed.update([name] if all_of_it else [])
            if first and not traces:
                traces.extend([model_trace, part])
            return observed, side

        if size == self.num_particles:
            return traces, Sides(*score(True, *values), {}, scales), closed
        found = []
        for i, part in enumerate(zip(*(value.split(size) for value in values), strict=True)):
            if torch.is_grad_enabled():
                # Forgets what the model computed, and computes it again when the gradient passes. The latents are
                # arguments, for by them it knows whose random state to put back.
                found.append(checkpoint(score, i == 0, *part, use_reentrant=False))
            else:
                found.append(score(i == 0, *part))
        observed, side = (
            {name: torch.cat([contributions[name] for contributions in chunks]) for name in chunks[0]}
            for chunks in zip(*found, strict=True)
        )
        return traces, Sides(observed, side, {}, scales), closed

    @property
    def _closes(self) -> bool:
        """Whether KL divergences may be taken in closed form."""
        return False

    def _scaled(self, site: dict, t: Tensor, event_dim: int = 0) -> Tensor:
        """Scales a site's ``(num_particles, *plates, batch, *event)`` by what cannot be done later."""
        return t

    def _log_q(self, q: dict, shared: bool, was_cut: bool) -> Tensor:
        try:
            return self._guide_side(q, shared)
        except (KeyError, NotImplementedError) as error:
            if not was_cut:
                raise
            raise ValueError(
                f'{type(self).__name__} scores the latents of site "{q["name"]}" apart from their draw for this gradient, '
                f"which {type(q['fn']).__name__} cannot do ({error}). Take gradient=Reparameterized(), or a distribution "
                "that scores any value, such as a flow of zuko's."
            ) from error

    def _check_latents(self, latents: dict[str, dict]) -> dict[str, Tensor]:
        """Returns log q of latents whose score functions are needed; raises where the gradient needs another latent."""
        scores = {}
        for name, q in latents.items():
            if self.gradient.reparameterized and (not q["fn"].has_rsample or q["fn"].support.is_discrete):
                kind = "whose straight-through gradient is biased" if q["fn"].has_rsample else "which has none"
                raise ValueError(
                    f'{type(self.gradient).__name__} needs a latent with an rsample, but site "{name}" of the guide is a '
                    f"{_name(q['fn'])}, {kind}. Take ReweightedWakeSleep, or gradient=Reparameterized() with a distribution "
                    "without rsample (Categorical), whose score function has leave-one-out baselines."
                )
            if (
                self._follows_path
                and not self.linear
                and self.num_particles > 1
                and getattr(q["fn"], "stratified", False)
            ):
                raise ValueError(
                    f'the particles of site "{name}" of the guide are stratified, and so depend on one another: the '
                    f"gradient of {type(self).__name__} would be biased. Build the encoder with stratified=False, or train "
                    "with bounds.ELBO."
                )
            if self._scored and not q["fn"].has_rsample:
                if self.num_particles == 1:
                    raise ValueError(
                        f'site "{name}" of the guide is a {_name(q["fn"])}, which has no rsample: its gradient needs a '
                        "baseline from other particles. Take num_particles of at least 2, or ReweightedWakeSleep; or sum "
                        "over all values with pyro.infer.TraceEnum_ELBO."
                    )
                scores[name] = per_datum(q, log_prob_of(q))
        outside = [i for i, q in enumerate(latents.values()) if not in_data(q)]
        for i, name in enumerate(latents):
            if name in scores and in_data(latents[name]) and any(j > i for j in outside):
                raise ValueError(
                    f'a latent outside the data plate is drawn after site "{name}" of the guide, which has no rsample: '
                    "its score function would have to hear all data at once. Draw what all data share first."
                )
        return scores

    def _also(self, run: Run, structure: SiteStructure, scale: float | Tensor) -> Tensor | float:
        """Returns a number whose gradient is a part of minus the loss's that no particle has."""
        return 0.0

    def _surrogate(
        self, weighed: LossParts, scores: dict[str, Tensor], extra: Tensor | float, cut: "_Cut | None"
    ) -> Tensor:
        """Returns a number whose gradient is the estimate of the gradient of minus the loss."""
        log_w = (weighed.log_p - weighed.log_q).detach()
        c = Coefficients(*(None if t is None else t * weighed.scale for t in self._coefficients(log_w)))
        score = 0.0
        for t in scores.values():
            # A latent moves the weights of its datum and what belongs to none; one that all data share moves all.
            if t.shape[-1] == log_w.shape[-1]:
                outside = weighed.outside * (1 - 1 / log_w.shape[-1])
                signal = leave_one_out(self, log_w + outside) * weighed.scale
            else:
                signal = leave_one_out(self, log_w.sum(-1, keepdim=True))
            score = score + _dot(signal, t)
        if self._whole:
            return _dot(c.model, weighed.log_p - weighed.log_q) + score - extra
        held = score - extra
        for coefficient, t in ((c.model, weighed.log_p), (c.guide, weighed.log_q)):
            if coefficient is not None:
                held = held + _dot(coefficient, t)
        along = score - extra
        if c.path is not None:
            along = along + _dot(c.path, weighed.log_p - weighed.log_q)
        return held + _path(along, cut)


class ImportanceBound(Bound):
    """Base of the bounds that are functions of importance weights per datum; one writes :meth:`reduce`."""

    def _check_structure(self, structure: SiteStructure) -> None:
        given = [
            f'site "{name}" of the model is outside the plate {structure.data}'
            for name in sorted(structure.global_observed)
        ]
        if structure.problems or given:
            raise ValueError(
                f"{type(self).__name__} weighs each datum by itself, but {'; '.join([*structure.problems, *given])}. Put what "
                f'belongs to a datum under pyro.plate("{DATA}", len(x)) in the model and in the guide, drawn from a '
                "density; hide a value that all data share by poutine.block(model, hide=[...]); or train with bounds.ELBO, which "
                "needs no weights per datum (of enumerated latents, with pyro.infer.TraceEnum_ELBO)."
            )

    def _loss_parts(self, sides: Sides, reconstruction: Tensor, kl: dict[str, Tensor], batch: int) -> LossParts:
        scale = _common_scale(type(self).__name__, sides.scales)
        log_p = sum([*sides.observed.values(), *sides.model.values()])
        log_q = sum(sides.guide.values()) + torch.zeros_like(log_p)
        log_w = (log_p - log_q).detach()
        value = self.reduce_model(log_w).value
        if value.shape != log_w.shape[1:]:
            raise ValueError(
                f"{type(self).__name__}.reduce returned a value of shape {tuple(value.shape)} for log weights of shape "
                f"{tuple(log_w.shape)}: reduce over the first dimension alone."
            )
        bound = (value * scale).sum()
        return LossParts(log_p, log_q, 0.0, scale, bound if self.is_upper else -bound, bound)


class _Cut(Messenger):
    """A Pyro handler that cuts the graph at each latent, so that log-probabilities can be differentiated by it alone.

    Args:
        leaves: whether the latents are to have gradients of their own.
    """

    def __init__(self, leaves: bool):
        super().__init__()
        self.leaves = leaves
        # A site comes once for each particle where they are drawn one by one.
        self.drawn: list[Tensor] = []  # with their graphs
        self.latents: list[Tensor] = []  # without

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        drawn = msg["value"]
        msg["value"] = drawn.detach()
        if self.leaves and drawn.requires_grad:
            self.drawn.append(drawn)
            self.latents.append(msg["value"].requires_grad_())


def _numbered(costs: list[tuple[str, Cost]]) -> dict[str, Cost]:
    """Returns costs by name, the second of a name and those after it with a number."""
    names = [name for name, _ in costs]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return {f"{name} {n}" if n > 1 else name: cost for (name, cost), n in zip(costs, counts, strict=True)}


def _path(along: Tensor | float, cut: _Cut) -> Tensor | float:
    """Returns a number whose gradient is that of another through the latents that were cut off."""
    latents, drawn = cut.latents, cut.drawn
    if not latents or not isinstance(along, Tensor) or not along.requires_grad:
        return 0.0
    found = list(torch.autograd.grad(along, latents, retain_graph=True, allow_unused=True))
    total = along.new_zeros(())
    # A latent is drawn given those before it, and so its gradient goes on to theirs.
    for i in reversed(range(len(latents))):
        if found[i] is None:
            continue
        if i > 0:
            further = torch.autograd.grad(drawn[i], latents[:i], found[i], retain_graph=True, allow_unused=True)
            for j, gradient in enumerate(further):
                if gradient is not None:
                    found[j] = gradient if found[j] is None else found[j] + gradient
        total = total + (found[i] * drawn[i]).sum()
    return total


def _dot(coefficient: Tensor, t: Tensor) -> Tensor:
    # A particle of weight zero may be infinitely far off, and zero times infinity is none.
    return (coefficient * t.masked_fill(coefficient == 0, 0.0)).sum()


def _check_sites(structure: SiteStructure, guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
    names = sample_sites(guide_trace).keys() | sample_sites(model_trace).keys()
    check_same_sites(structure.sites, names)


def _common_scale(name: str, scales: dict[tuple[str, str], float | Tensor]) -> float | Tensor:
    """Returns what all sites are scaled by, which then stands outside the logarithm; raises if there is no such thing."""
    first_key, first = next(iter(scales.items()))
    for key, scale in scales.items():
        if not same_scale(scale, first):
            where = {"p": "model", "q": "guide"}
            raise ValueError(
                f'site "{first_key[1]}" of the {where[first_key[0]]} is scaled by {first} and site "{key[1]}" of the '
                f"{where[key[0]]} by {scale}, but a weight of a single site has no place in {name}, inside a logarithm. "
                "Weigh terms with bounds.ELBO(beta=...), and scale the whole model and guide alike (poutine.scale)."
            )
    if isinstance(first, Tensor) and first.dim() > 1:
        raise ValueError(f"{name} takes one scale a datum, but the sites are scaled by a tensor {tuple(first.shape)}.")
    return first


def same_scale(a: float | Tensor, b: float | Tensor) -> bool:
    """Returns whether two sites are scaled alike."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _data_size(sites: list[dict]) -> tuple[int, int]:
    """Returns how many data there are in the data plate, and how many it stands for; one and one without a plate."""
    for site in sites:
        if in_data(site):
            return site["data"].size, site["data"].full_size or site["data"].size
    return 1, 1


def _parts(sides: Sides) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the reconstruction and the KL divergence of each latent, means over particles and summed over the data."""

    def total(side: str, name: str, t: Tensor) -> Tensor:
        t = t.detach().mean(0)
        t = t.sum(-1) if t.dim() > 1 else t
        return (t * sides.scales[side, name]).sum()

    kl = {}
    for name in dict.fromkeys([*sides.model, *sides.guide]):
        q = total("q", name, sides.guide[name]) if name in sides.guide else 0.0
        p = total("p", name, sides.model[name]) if name in sides.model else 0.0
        kl[name] = q - p
    observed = [total("p", name, t) for name, t in sides.observed.items()]
    return sum(observed) if observed else torch.zeros(()), kl


def _form(args: tuple, kwargs: dict[str, Any]) -> list[tuple]:
    """Returns what about arguments may change which sites and plates there are."""
    return [
        (
            name,
            type(value),
            value.dim() if isinstance(value, Tensor) else len(value) if hasattr(value, "__len__") else None,
        )
        for name, value in [*enumerate(args), *kwargs.items()]
    ]


def _name(fn: Any) -> str:
    return type(layers(fn)[-1]).__name__
