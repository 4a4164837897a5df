r"""What all bounds share: log weights of particles, a function of them, and an estimate of its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrovae.bounds.gradients import Coefficients, DetachedDraws, Gradient, Reparameterized, dot, leave_one_out
from pyrovae.bounds.reductions import Reduced
from pyrovae.bounds.scoring import ModelTerms, SiteScorer, SiteTerms, same_scale
from pyrovae.inference.messages import PER_DATUM, described, is_integer
from pyrovae.inference.sites import layers, sample_sites
from pyrovae.inference.structure import SiteStructure, inspect, named_plate
from pyrovae.inference.weights import (
    check_draws,
    check_independent,
    check_masks,
    in_plate_of_one,
    log_prob_of,
    per_datum,
    structure_of_run,
    trace_guide,
    trace_model,
)
from pyrovae.recorded import NumbersChecked
from pyrovae.regularizers import Cost, Regularizer, Run


class Terms(NamedTuple):
    r"""A loss and its parts, each summed over the data (and scaled up to all data by a subsampled plate).

    Args:
        loss: what training minimises, in nats; if gradients are enabled, differentiable, with the gradient of the
            bound's estimator.
        bound: the bound itself, on :math:`\log p(x)`, without training weights and regularizers.
        reconstruction: :math:`\mathrm{E}_q \log p(x \mid z)`, of all observed sites.
        kl: :math:`\mathrm{E}_q [\log q(z \mid x) - \log p(z)]`, for each latent site.
        regularizers: what each regularizer added to the loss, by the name of its class; the second of a class and those
            after it have a number.
    """

    loss: Tensor
    bound: Tensor
    reconstruction: Tensor
    kl: dict[str, Tensor]
    regularizers: dict[str, Tensor]

    @property
    def named(self) -> dict[str, Tensor]:
        """All of them, detached, by their names in a history."""
        kl = {f"kl {name}": t for name, t in self.kl.items()}
        parts = {"bound": self.bound, "reconstruction": self.reconstruction, **kl, **self.regularizers}
        return {"loss": self.loss.detach(), **parts}


class LossParts(NamedTuple):
    r"""Log weights and the loss, which a bound computes from the contributions of sites.

    Args:
        log_p: the model's side of the log weights, ``(num_particles, batch)``.
        log_q: the guide's side, of the same shape.
        global_log_w: log weights of the sites outside of the data plate, ``(num_particles, 1)``, or 0 without any; they
            are split evenly over the data in `log_p` and `log_q`.
        scale: factor of the bound of each datum.
        loss: the loss, summed over the data.
        bound: the bound, summed over the data.
    """

    log_p: Tensor
    log_q: Tensor
    global_log_w: Tensor | float
    scale: float | Tensor
    loss: Tensor
    bound: Tensor


class _Inspected(NamedTuple):
    """What a bound found when it was last called with another pair, or other kinds of arguments.

    Args:
        call: the model, the guide, and the kinds of their arguments.
        model: the model; in a plate of one datum if it had no plate.
        guide: the guide, likewise.
        structure: the sites of both.
        known: sets of sites that batches had.
    """

    call: tuple
    model: Callable
    guide: Callable
    structure: SiteStructure
    known: set[frozenset[str]]


class Bound(NumbersChecked, PyroELBO, ABC):
    r"""Base of the bounds: a training objective for any Pyro model and guide.

    .. math:: \mathcal{L} = \mathrm{E}_{z_1, \dots, z_K \sim q(z \mid x)}\, f(\ell_1, \dots, \ell_K), \qquad
        \ell_k = \log p(x, z_k) - \log q(z_k \mid x)

    A bound can be used wherever Pyro takes an ELBO: in ``pyrovae.fit(..., loss=...)`` and in ``pyro.infer.SVI``.
    Particles are vectorised. :meth:`terms` returns the parts of the loss. The loss is minus the sum of the bound over
    the data; the N/B of a subsampled data plate multiplies f, masks act inside of it.

    To add a bound, derive from :class:`ImportanceBound` and write ``reduce``: f with its first two derivatives, as
    a :class:`Reduced` over the first dimension of the log weights. Three class attributes describe f: `smooth` is False
    if f has a kink, which its second derivative leaves out; `linear` is True if f is a mean; `is_upper` is True if
    training is to lower it.

    Args:
        num_particles: draws of the guide per datum :math:`K`, at least 1.
        gradient: the estimator of its gradient; plain reparameterisation if None.
        chunk_size: particles that the model runs on at once, to bound memory: gradients are accumulated, and the model
            runs again in the backward pass. The guide runs once, on all particles. None for no chunks.
        regularizers: terms added to the loss, which is then no longer a bound.
    """

    linear = False
    smooth = True
    is_upper = False
    by_datum = False  # whether it needs weights per datum

    def __init__(
        self,
        num_particles: int,
        gradient: Gradient | None = None,
        chunk_size: int | None = None,
        regularizers: Sequence[Regularizer] = (),
    ):
        for name, value in (("num_particles", num_particles), ("chunk_size", chunk_size)):
            if value is None and name == "chunk_size":
                continue
            if not is_integer(value) or value < 1:
                got = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
                raise ValueError(f"{name} must be an integer of at least 1, got {got}.")
        super().__init__(num_particles=int(num_particles), vectorize_particles=True)
        self.gradient = Reparameterized() if gradient is None else gradient
        if not isinstance(self.gradient, Gradient):
            raise TypeError(f"gradient must be an estimator such as bounds.Reparameterized(), got {gradient!r}.")
        if not (isinstance(regularizers, Sequence) and all(isinstance(r, Regularizer) for r in regularizers)):
            raise TypeError(f"regularizers must be a list of instances of Regularizer, got {regularizers!r}.")
        self.chunk_size = None if chunk_size is None else int(chunk_size)
        self.regularizers = tuple(regularizers)
        self.steps = 0
        has_own_gradient = type(self).coefficients is not Bound.coefficients
        one_function = type(self).reduce_model is Bound.reduce_model  # the same f for model and guide
        # Whether one backward pass through the log weights computes the gradient; whether latents without an rsample
        # get score functions; and whether the gradient goes through the draws of the latents.
        self.single_backward = self.gradient.single_backward and one_function and not has_own_gradient
        self.score_functions = self.gradient.score_functions and not has_own_gradient
        self.through_draws = self.gradient.reparameterized or self.gradient.single_backward and not has_own_gradient
        self.scorer = SiteScorer()
        self._inspected: _Inspected | None = None
        self.gradient.check(self)

    @abstractmethod
    def reduce(self, log_w: Tensor) -> Reduced:
        """Returns f of log weights ``(num_particles, *rest)``, over the first dimension, with its derivatives."""

    def reduce_model(self, log_w: Tensor) -> Reduced:
        """Returns the f that the model's parameters are trained by: ``reduce``, unless a bound has another."""
        return self.reduce(log_w)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Returns the coefficients of the gradient: the estimator's, unless a bound has its own gradient.

        A bound that overrides this has its own gradient at fixed latents, without score functions; it may have a `path`
        if its estimator is reparameterized.
        """
        return self.gradient.coefficients(self, log_w)

    def extra_surrogate(self, run: Run, structure: SiteStructure, scale: float | Tensor) -> Tensor | float:
        """Returns a number whose gradient is a part of minus the loss's that is not tied to a particle; 0 for none."""
        return 0.0

    @abstractmethod
    def _loss_parts(self, terms: SiteTerms, reconstruction: Tensor, kl: dict[str, Tensor], batch: int) -> LossParts:
        """Returns log weights and loss from the contributions of sites, and the terms that were computed from these."""

    @abstractmethod
    def _check_structure(self, structure: SiteStructure) -> None:
        """Raises a ValueError, which names the site, if the bound is not defined for a model and a guide."""

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Terms:
        """Estimates the loss and its parts; with gradients enabled, as a step of training.

        Args:
            model: a Pyro model, called with the same arguments as the guide.
            guide: a Pyro guide with the model's latent sites.
            *args: what both are called with.
            **kwargs: what both are called with.

        Raises:
            ValueError: when model and guide do not fit each other, the data or the bound; the message names the site.
        """
        inspected = (model, guide, _kinds(args, kwargs), named_plate.get())
        if self._inspected is not None and self._inspected.call == inspected:
            found = self._inspected
            return self._estimate(found.model, found.guide, found.structure, args, kwargs)
        structure = inspect(model, guide, *args, **kwargs)
        if self.by_datum and not structure.has_plates:
            model, guide = in_plate_of_one(model, guide)
            structure = inspect(model, guide, *args, **kwargs)
        if structure.guide_observed:
            names = ", ".join(f'"{name}"' for name in sorted(structure.guide_observed))
            raise ValueError(
                f"the guide observes {names}, which is not part of q, so that {type(self).__name__} is not a bound. "
                "Hide it with poutine.block, move it to the model, or train with pyro.infer.Trace_ELBO."
            )
        check_masks(structure)
        self._check_structure(structure)
        if self.by_datum:
            check_independent(structure, model, guide, *args, **kwargs)
        structure = check_draws(structure, model, guide, *args, **kwargs)
        self._inspected = None
        terms = self._estimate(model, guide, structure, args, kwargs)
        self._inspected = _Inspected(inspected, model, guide, structure, {structure.sites})
        return terms

    def _check_sites(
        self,
        structure: SiteStructure,
        sites: frozenset[str],
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict,
    ) -> None:
        """Raises a ValueError if the sites of a run change at random, or if the bound is not defined for them."""
        known = {structure.sites} if self._inspected is None else self._inspected.known
        if sites not in known:
            self._check_structure(structure_of_run(structure, sites, model, guide, args, kwargs))
            known.add(sites)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of the loss; schedules have their final values, so that epochs can be compared."""
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
        """Returns the state of a resumed run: the number of steps so far."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.steps = state["steps"]

    def __repr__(self) -> str:
        return described(self)

    @property
    def schedules(self) -> list:
        """The schedules that a bound has; none unless it says otherwise."""
        return []

    def count_epochs(self, steps_per_epoch: int | None) -> None:
        """Tells the schedules how many steps an epoch has, None where that is not known."""
        for schedule in self.schedules:
            schedule.steps_per_epoch = steps_per_epoch

    @property
    def span(self) -> int:
        """Training steps until all schedules finish, once; 0 without any."""
        return 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy inspects for itself, and holds no reference to a model.
        return self.__dict__ | {"_inspected": None}

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} makes its traces in terms().")

    def _estimate(self, model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict) -> Terms:
        """Draws from the guide, scores the draws, and returns the loss with the gradient of its estimator."""
        training = torch.is_grad_enabled()
        detached = None
        if training and not self.single_backward:
            detached = DetachedDraws(self.through_draws or bool(self.regularizers))
        with detached or nullcontext():
            guide_trace = trace_guide(guide, structure, self.num_particles, *args, **kwargs)
        guide_sites = sample_sites(guide_trace)
        scores = self._score_functions(guide_sites) if training else {}

        # Without latents all particles are the same: there is nothing to split.
        size = min(self.chunk_size or self.num_particles, self.num_particles) if guide_sites else self.num_particles
        score = partial(self._score, model, guide, structure, args, kwargs)
        if size == self.num_particles:
            run, model_terms = score(guide_trace, size)
        else:
            run, model_terms = self._score_in_chunks(score, guide_trace, size)
        site_terms = self.scorer.with_guide(model_terms, guide_trace, detached is not None)
        reconstruction, kl = site_terms.reconstruction_and_kl()
        batch, full_size = 1, 1
        for site in [*sample_sites(run.model_trace).values(), *guide_sites.values()]:
            if site["data"] is not None:
                batch, full_size = site["data"].size, site["data"].full_size or site["data"].size
                break
        parts = self._loss_parts(site_terms, reconstruction, kl, batch)

        costs: dict[str, Cost] = {}
        for i, regularizer in enumerate(self.regularizers):
            number = 1 + sum(type(before) is type(regularizer) for before in self.regularizers[:i])
            name = type(regularizer).__name__
            costs[f"{name} {number}" if number > 1 else name] = regularizer(run)
        values = {name: full_size / batch * cost.value.detach() for name, cost in costs.items()}
        loss = parts.loss + sum(values.values())
        if training:
            regularization = full_size / batch * sum(cost.value + cost.aside for cost in costs.values())
            surrogate = self._surrogate(parts, scores, regularization, detached)
            surrogate = surrogate + self.extra_surrogate(run, structure, parts.scale)
            # The value of the loss, with the gradient of its estimator.
            loss = loss.detach() - (surrogate - surrogate.detach())
            self.steps += 1
        return Terms(loss, parts.bound.detach(), reconstruction, kl, values)

    def _score(
        self,
        model: Callable,
        guide: Callable,
        structure: SiteStructure,
        args: tuple,
        kwargs: dict[str, Any],
        draws: poutine.Trace,
        size: int,
        trace_again: bool = False,
    ) -> tuple[Run, ModelTerms]:
        """Runs a model at draws of a guide; returns the traces and the contributions of the model's sites.

        With `trace_again` the guide runs again, because distributions for all draws do not fit a chunk of them.
        """
        model_trace = trace_model(model, draws, structure, size, *args, **kwargs)
        sites = frozenset(sample_sites(draws).keys() | sample_sites(model_trace).keys())
        self._check_sites(structure, sites, model, guide, args, kwargs)
        if trace_again:
            draws = trace_model(guide, draws, structure, size, *args, **kwargs)
        return Run(model_trace, draws, model, guide, args, kwargs), self.scorer.model_terms(model_trace, draws)

    def _score_in_chunks(self, score: Callable, draws: poutine.Trace, size: int) -> tuple[Run, ModelTerms]:
        """Scores draws in chunks of particles; returns the run of the first chunk, and the contributions of all."""
        latents = {name: site for name, site in sample_sites(draws).items() if not site["is_observed"]}

        def score_chunk(is_first: bool, *values: Tensor) -> tuple[Run | None, ModelTerms]:
            chunk = draws.copy()
            for (name, site), value in zip(latents.items(), values, strict=True):
                chunk.nodes[name] = {**site, "value": value}
            trace_again = self.scorer.closed_form or is_first and bool(self.regularizers)
            run, terms = score(chunk, len(values[0]), trace_again)
            return run if is_first else None, terms

        chunks: list[ModelTerms] = []
        for i, values in enumerate(zip(*(site["value"].split(size) for site in latents.values()), strict=True)):
            if torch.is_grad_enabled():
                # The model's intermediate results are dropped, and computed again in the backward pass. The latents are
                # arguments, because checkpoint restores the random state of its arguments' devices.
                run, terms = checkpoint(score_chunk, i == 0, *values, use_reentrant=False)
            else:
                run, terms = score_chunk(i == 0, *values)
            if run is not None:
                first_run = run
            chunks.append(terms)
        observed, latent = (
            {name: torch.cat([contributions[name] for contributions in parts]) for name in parts[0]}
            for parts in ([t.observed for t in chunks], [t.latent for t in chunks])
        )
        masks = {name: _joined([terms.masks[name] for terms in chunks], latents[name], size) for name in latents}
        return first_run, chunks[-1]._replace(observed=observed, latent=latent, masks=masks)

    def _score_functions(self, latents: dict[str, dict]) -> dict[str, Tensor]:
        """Returns log q of the latents that need a score function; raises where the gradient needs another latent."""
        scores = {}
        for name, q in latents.items():
            if self.gradient.reparameterized and (not q["fn"].has_rsample or q["fn"].support.is_discrete):
                reason = "whose straight-through gradient is biased" if q["fn"].has_rsample else "which has none"
                raise ValueError(
                    f'{type(self.gradient).__name__} needs a latent with an rsample, but site "{name}" of the guide is '
                    f"a {type(layers(q['fn'])[-1]).__name__}, {reason}. Take ReweightedWakeSleep, or "
                    "gradient=Reparameterized() with a distribution without rsample (Categorical), whose score "
                    "function has leave-one-out baselines."
                )
            nonlinear = self.through_draws and not self.linear and self.num_particles > 1
            if nonlinear and getattr(q["fn"], "stratified", False):
                raise ValueError(
                    f'the particles of site "{name}" of the guide are stratified, and so depend on one another: the '
                    f"gradient of {type(self).__name__} would be biased. Build the encoder with stratified=False, or "
                    "train with bounds.ELBO."
                )
            if self.score_functions and not q["fn"].has_rsample:
                if self.num_particles == 1:
                    raise ValueError(
                        f'site "{name}" of the guide is a {type(layers(q["fn"])[-1]).__name__}, which has no rsample: '
                        "its gradient needs a baseline from other particles. Take num_particles of at least 2, or "
                        "ReweightedWakeSleep; or sum over all values with pyro.infer.TraceEnum_ELBO."
                    )
                scores[name] = per_datum(q, log_prob_of(q))
        later_global = False  # whether a latent outside of the data plate comes after this one
        for name, q in reversed(latents.items()):
            if q["data"] is None:
                later_global = True
            elif name in scores and later_global:
                raise ValueError(
                    f'a latent outside the data plate is drawn after site "{name}" of the guide, which has no rsample: '
                    "its score function would need the weights of all data. Draw the latents that all data share first."
                )
        return scores

    def _surrogate(
        self,
        parts: LossParts,
        scores: dict[str, Tensor],
        regularization: Tensor | float,
        detached: DetachedDraws | None,
    ) -> Tensor:
        """Returns a number whose gradient is the estimate of the gradient of minus the loss."""
        log_w = (parts.log_p - parts.log_q).detach()
        c = Coefficients(*(None if t is None else t * parts.scale for t in self.coefficients(log_w)))
        score: Tensor | float = 0.0
        for t in scores.values():
            if t.shape[-1] == log_w.shape[-1]:
                # A latent of a datum changes the weights of that datum and those of the global sites, which are split
                # over the data in log_w.
                rest = parts.global_log_w * (1 - 1 / log_w.shape[-1])
                signal = leave_one_out(self, log_w + rest) * parts.scale
            else:  # a latent that all data share changes the weights of all
                signal = leave_one_out(self, log_w.sum(-1, keepdim=True))
            score = score + dot(signal, t)
        if detached is None:  # a single backward pass
            return torch.as_tensor(dot(c.model, parts.log_p - parts.log_q) + score - regularization)
        fixed = score - regularization + dot(c.model, parts.log_p) + dot(c.guide, parts.log_q)
        path = score - regularization + dot(c.path, parts.log_p - parts.log_q)
        return torch.as_tensor(fixed + detached.backpropagate(path))


class ImportanceBound(Bound):
    """Base of the bounds that are functions of importance weights per datum; a subclass writes ``reduce``."""

    by_datum = True

    def _check_structure(self, structure: SiteStructure) -> None:
        outside = [
            f'site "{name}" of the model is outside the plate {structure.data}'
            for name in sorted(structure.global_observed)
        ]
        if structure.problems or outside:
            raise ValueError(
                f"{type(self).__name__} needs importance weights per datum, but "
                f"{'; '.join([*structure.problems, *outside])}. {PER_DATUM}; hide a value that all data share by "
                "poutine.block(model, hide=[...]); or train with bounds.ELBO, which needs no weights per datum (for "
                "enumerated latents, with pyro.infer.TraceEnum_ELBO)."
            )

    def _loss_parts(self, terms: SiteTerms, reconstruction: Tensor, kl: dict[str, Tensor], batch: int) -> LossParts:
        scale = self._common_scale(terms)
        first, *others = [*terms.observed.values(), *terms.model.values()]
        log_p = sum(others, first)
        log_q = sum(terms.guide.values(), torch.zeros_like(log_p))
        log_w = (log_p - log_q).detach()
        value = self.reduce_model(log_w).value
        if value.shape != log_w.shape[1:]:
            raise ValueError(
                f"{type(self).__name__}.reduce returned a value of shape {tuple(value.shape)} for log weights of shape "
                f"{tuple(log_w.shape)}: reduce over the first dimension alone."
            )
        bound = (value * scale).sum()
        return LossParts(log_p, log_q, 0.0, scale, bound if self.is_upper else -bound, bound)

    def _common_scale(self, terms: SiteTerms) -> float | Tensor:
        """Returns the scale that all sites share, which multiplies f; raises a ValueError if their scales differ."""
        first_name, first = next(iter(terms.model_scales.items()))
        for where, scales in (("model", terms.model_scales), ("guide", terms.guide_scales)):
            for name, scale in scales.items():
                if not same_scale(scale, first):
                    raise ValueError(
                        f'site "{first_name}" of the model is scaled by {first} and site "{name}" of the {where} by '
                        f"{scale}, but in {type(self).__name__} a weight of a single site would be inside a logarithm. "
                        "Weigh terms with bounds.ELBO(beta=...), or scale the whole model and guide alike "
                        "(poutine.scale)."
                    )
        if isinstance(first, Tensor) and first.dim() > 1:
            raise ValueError(
                f"{type(self).__name__} takes one scale per datum, but the sites are scaled by a tensor of shape "
                f"{tuple(first.shape)}. Scale model and guide by a tensor of shape (batch,), or by a number."
            )
        return first


def _joined(masks: list[Any], site: dict, size: int) -> Any:
    """Returns a mask of all particles of a latent from those of chunks of so many; one of them if all are the same."""
    first, dims = masks[0], site["value"].dim() - len(site["fn"].event_shape)
    by_particle = isinstance(first, Tensor) and first.dim() == dims and len(first) == size
    return torch.cat(masks) if by_particle else first


def _kinds(args: tuple, kwargs: dict[str, Any]) -> list[tuple]:
    """Returns the properties of arguments that may change which sites and plates there are."""
    kinds = []
    for name, value in [*enumerate(args), *kwargs.items()]:
        size = len(value) if hasattr(value, "__len__") and not isinstance(value, Tensor) else None
        kinds.append((name, type(value), value.dim() if isinstance(value, Tensor) else size))
    return kinds
