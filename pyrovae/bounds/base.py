r"""What all bounds have in common: log weights of particles, a function of them, and an estimate of its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrovae.bounds.gradients import Coefficients, Gradient, Reparameterized
from pyrovae.bounds.reductions import Reduced
from pyrovae.checks import DATA, Structure, inspect, sample_sites
from pyrovae.importance import log_prob_of, per_datum, trace_guide, trace_model
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


class Sides(NamedTuple):
    r"""The contributions of sites to log weights, ``(num_particles, batch)`` or with a dimension of latents at the end.

    Args:
        observed: of observed sites, :math:`\log p(x \mid z)`.
        model: of latent sites, :math:`\log p(z)`, or minus a KL divergence in closed form.
        guide: of latent sites, :math:`\log q(z \mid x)`; none where the KL divergence is in closed form.
        scores: :math:`\log q(z \mid x)` of latent sites without an rsample.
        scales: what a site's contribution is scaled by, for each site of the model ("p", name) and guide ("q", name).
    """

    observed: dict[str, Tensor]
    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    scores: dict[str, Tensor]
    scales: dict[tuple[str, str], float | Tensor]


class Weighed(NamedTuple):
    r"""What a bound makes of the contributions of sites.

    Args:
        log_p: all that stands on the model's side of the log weights, ``(num_particles, batch)``.
        log_q: all that stands on the guide's, of the same shape.
        scale: what the bound of each datum is scaled by.
        loss: the loss, and
        bound: the bound, both summed over the data.
    """

    log_p: Tensor
    log_q: Tensor
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

    To add a bound, derive from :class:`ImportanceBound` and write :meth:`reduce`, f with its first two derivatives.

    Args:
        num_particles: draws of the guide per datum :math:`K`, at least 1.
        gradient: the estimator of its gradient, plain reparameterisation unless given.
        chunk_size: particles that the model is run on at once, to bound memory; their gradients are accumulated, at the
            price of running the model twice. None for all of them.
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
            if not (isinstance(value, int) and value >= 1 or name == "chunk_size" and value is None):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.gradient = Reparameterized() if gradient is None else gradient
        if not isinstance(self.gradient, Gradient):
            raise TypeError(f"gradient must be an estimator such as bounds.Reparameterized(), got {gradient!r}.")
        self.chunk_size, self.regularizers = chunk_size, tuple(regularizers)
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
    def _weigh(self, sides: Sides, batch: int) -> Weighed:
        """Returns log weights and loss from the contributions of sites."""

    def _pair(self, p: dict, q: dict, closed_form: bool) -> tuple[Tensor, Tensor | None]:
        """Returns the contributions of a latent site on the model's and the guide's side, from its site in each."""
        return per_datum(p, log_prob_of(p)), per_datum(q, log_prob_of(q))

    @abstractmethod
    def _check_structure(self, structure: Structure) -> None:
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
        structure = self._inspect(model, guide, args, kwargs)
        training = torch.is_grad_enabled()
        chunks = [
            self._particles(model, guide, structure, k, i == 0, args, kwargs)
            for i, k in enumerate(_split(self.num_particles, self.chunk_size or self.num_particles))
        ]
        first = chunks[0]
        self._check_scored(first.guide_trace)
        sides = _joined([chunk.sides for chunk in chunks])
        batch, full = _data_size([*sample_sites(first.model_trace).values(), *sample_sites(first.guide_trace).values()])
        weighed = self._weigh(sides, batch)
        run = Run(first.model_trace, first.guide_trace, model, guide, args, kwargs)
        share = full / batch
        costs = _numbered([(type(regularizer).__name__, regularizer(run)) for regularizer in self.regularizers])
        values = {name: share * cost.value.detach() for name, cost in costs.items()}
        loss = weighed.loss + sum(values.values())
        if training:
            extra = share * sum(cost.value + cost.aside for cost in costs.values())
            surrogate = self._surrogate(weighed, sides.scores, chunks, extra) + share * self._also(run)
            # The value of the loss with the gradient of its estimator.
            loss = loss.detach() - (surrogate - surrogate.detach())
            self.steps += 1
        return Terms(loss, weighed.bound.detach(), *_parts(sides), values)

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

    def _coefficients(self, log_w: Tensor, scored: bool) -> Coefficients:
        return self.gradient.coefficients(self, log_w, scored)

    def _inspect(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Structure:
        """Looks at a model and a guide once, and again only when they or the form of their arguments change."""
        form = [(name, type(value)) for name, value in [*enumerate(args), *kwargs.items()]]
        if self._inspected != (model, guide, form):
            structure = inspect(model, guide, *args, **kwargs)
            self._check_structure(structure)
            self._inspected, self._structure = (model, guide, form), structure
        return self._structure

    def _particles(
        self, model: Callable, guide: Callable, structure: Structure, k: int, keep: bool, args: tuple, kwargs: dict
    ) -> "_Chunk":
        cut = (
            None if self._whole or not torch.is_grad_enabled() else _Cut(self._follows_path or bool(self.regularizers))
        )
        if cut is None:
            guide_trace = trace_guide(guide, structure, k, *args, **kwargs)
        else:
            with cut:
                guide_trace = trace_guide(guide, structure, k, *args, **kwargs)
        kept = []

        def score() -> Sides:
            model_trace = trace_model(model, guide_trace, structure, k, *args, **kwargs)
            _check_sites(structure, guide_trace, model_trace)
            if keep and not kept:
                kept.append(model_trace)
            return self._sides(guide_trace, model_trace, cut is not None)

        if k < self.num_particles and torch.is_grad_enabled():
            # Forgets what the model computed, and computes it again when the gradient passes.
            sides = checkpoint(score, use_reentrant=False)
        else:
            sides = score()
        return _Chunk(guide_trace, kept[0] if kept else None, sides, cut)

    def _sides(self, guide_trace: poutine.Trace, model_trace: poutine.Trace, was_cut: bool) -> Sides:
        model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
        sides = Sides({}, {}, {}, {}, {})
        for name, p in model_sites.items():
            sides.scales["p", name] = p["scale"]
            if p["is_observed"]:
                sides.observed[name] = per_datum(p, log_prob_of(p))
        exact = _conditioned_alike(list(model_sites), list(guide_sites))
        for name, q in guide_sites.items():
            sides.scales["q", name] = q["scale"]
            try:
                if name in model_sites and not q["is_observed"]:
                    p_side, q_side = self._pair(model_sites[name], q, name in exact)
                    sides.model[name] = p_side
                else:
                    q_side = per_datum(q, log_prob_of(q))
                if not q["is_observed"] and not q["fn"].has_rsample:
                    sides.scores[name] = per_datum(q, log_prob_of(q))
            except (KeyError, NotImplementedError) as error:
                if not was_cut:
                    raise
                raise ValueError(
                    f'{type(self.gradient).__name__} scores the latents of site "{name}" apart from their draw, which '
                    f"{type(q['fn']).__name__} cannot do ({error}). Take gradient=Reparameterized(), or a distribution "
                    "that scores any value, such as a flow of zuko's."
                ) from error
            if q_side is not None:
                sides.guide[name] = q_side
        return sides

    def _check_scored(self, guide_trace: poutine.Trace) -> None:
        for name, q in sample_sites(guide_trace).items():
            if q["is_observed"]:
                continue
            if self.gradient.reparameterized and (not q["fn"].has_rsample or q["fn"].support.is_discrete):
                raise ValueError(
                    f'{type(self.gradient).__name__} needs a latent whose draws are differentiable, but site "{name}" of '
                    f"the guide is a {_name(q['fn'])} of {q['fn'].support}. Take gradient=Reparameterized(), which uses "
                    "leave-one-out baselines there, or ReweightedWakeSleep."
                )
            if self._whole and not q["fn"].has_rsample and self.num_particles == 1 and torch.is_grad_enabled():
                raise ValueError(
                    f'site "{name}" of the guide is a {_name(q["fn"])}, which has no rsample: its gradient needs a '
                    "baseline from other particles. Take num_particles of at least 2, or ReweightedWakeSleep; or sum over "
                    "all values with pyro.infer.TraceEnum_ELBO."
                )

    def _also(self, run: Run) -> Tensor | float:
        """Returns a number whose gradient is a part of minus the loss's that no particle has."""
        return 0.0

    def _surrogate(self, weighed: Weighed, scores: dict[str, Tensor], chunks: list["_Chunk"], extra: Tensor) -> Tensor:
        """Returns a number whose gradient is the estimate of the gradient of minus the loss."""
        log_w = (weighed.log_p - weighed.log_q).detach()
        c = Coefficients(*(None if t is None else t * weighed.scale for t in self._coefficients(log_w, bool(scores))))
        score = _total_score(c.score, scores)
        if self._whole:
            return _dot(c.model, weighed.log_p - weighed.log_q) + score - extra
        held = score - extra
        for coefficient, t in ((c.model, weighed.log_p), (c.guide, weighed.log_q)):
            if coefficient is not None:
                held = held + _dot(coefficient, t)
        along = score - extra
        if c.path is not None:
            along = along + _dot(c.path, weighed.log_p - weighed.log_q)
        return held + _path(along, [chunk.cut for chunk in chunks])


class ImportanceBound(Bound):
    """Base of the bounds that are functions of importance weights per datum; one writes :meth:`reduce`."""

    def _check_structure(self, structure: Structure) -> None:
        if structure.problems:
            raise ValueError(
                f"{type(self).__name__} weighs each datum by itself, but {'; '.join(structure.problems)}. Put what belongs "
                f'to a datum under pyro.plate("{DATA}", len(x), dim=-1) in the model and in the guide, drawn from a '
                "density; or train with bounds.ELBO, which needs no weights per datum (of enumerated latents, with "
                "pyro.infer.TraceEnum_ELBO)."
            )

    def _weigh(self, sides: Sides, batch: int) -> Weighed:
        scale = _common_scale(type(self).__name__, sides.scales)
        log_p = sum([*sides.observed.values(), *sides.model.values()])
        log_q = sum(sides.guide.values()) + torch.zeros_like(log_p)
        value = self._value((log_p - log_q).detach())
        bound = (value * scale).sum()
        return Weighed(log_p, log_q, scale, bound if self.is_upper else -bound, bound)

    def _value(self, log_w: Tensor) -> Tensor:
        """Returns what the bound is reported to be, per datum."""
        return self.reduce_model(log_w).value


class _Cut(Messenger):
    """A Pyro handler that cuts the graph at each latent, so that log-probabilities can be differentiated by it alone.

    Args:
        leaves: whether the latents are to have gradients of their own.
    """

    def __init__(self, leaves: bool):
        super().__init__()
        self.leaves = leaves
        self.drawn: dict[str, Tensor] = {}  # with their graphs
        self.latents: dict[str, Tensor] = {}  # without

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        drawn = msg["value"]
        msg["value"] = drawn.detach()
        if self.leaves and drawn.requires_grad:
            self.drawn[msg["name"]] = drawn
            self.latents[msg["name"]] = msg["value"].requires_grad_()


class _Chunk(NamedTuple):
    guide_trace: poutine.Trace
    model_trace: poutine.Trace | None  # of the first chunk
    sides: Sides
    cut: _Cut | None


def _numbered(costs: list[tuple[str, Cost]]) -> dict[str, Cost]:
    """Returns costs by name, the second of a name and those after it with a number."""
    names = [name for name, _ in costs]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return {f"{name} {n}" if n > 1 else name: cost for (name, cost), n in zip(costs, counts, strict=True)}


def _path(along: Tensor | float, cuts: list[_Cut]) -> Tensor | float:
    """Returns a number whose gradient is that of another through the latents that were cut off."""
    latents = [z for cut in cuts for z in cut.latents.values()]
    if not latents or not isinstance(along, Tensor) or not along.requires_grad:
        return 0.0
    gradients = iter(torch.autograd.grad(along, latents, retain_graph=True, allow_unused=True))
    total = along.new_zeros(())
    for cut in cuts:
        found = [next(gradients) for _ in cut.latents]
        latents, drawn = list(cut.latents.values()), list(cut.drawn.values())
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


def _total_score(signal: Tensor | None, scores: dict[str, Tensor]) -> Tensor | float:
    """Returns the sum over sites of the signal times log q; a site outside the data plate hears that of all data."""
    if signal is None:
        return 0.0
    return sum(
        _dot(signal if t.shape[-1] == signal.shape[-1] else signal.sum(-1, keepdim=True), t) for t in scores.values()
    )


def _conditioned_alike(model_names: list[str], guide_names: list[str]) -> set[str]:
    """Returns the latents whose KL divergence given the latents before them is what the ELBO holds.

    Given what the guide drew before a site, its term's mean over the site's own draw is a KL divergence if what the model
    may condition on there was drawn before. In a guide of another order it was not: p(z1 | z2) depends on a z2 that in
    q(z2 | z1) depends on z1.
    """
    place = {name: i for i, name in enumerate(guide_names)}
    alike, latest = set(), -1
    for name in model_names:
        if name in place:
            if place[name] > latest:
                alike.add(name)
            latest = max(latest, place[name])
    return alike


def _check_sites(structure: Structure, guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
    names = sample_sites(guide_trace).keys() | sample_sites(model_trace).keys()
    if names != structure.sites:
        changed = ", ".join(f'"{name}"' for name in sorted(names ^ structure.sites))
        raise ValueError(
            f"the sites of the model and the guide change from run to run ({changed}), so that a density of the latents "
            "is undefined. Draw all sites in every run and mask those that play no part, with poutine.mask."
        )


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
        for frame in site["cond_indep_stack"]:
            if frame.name == DATA and frame.dim == -1:
                return frame.size, frame.full_size or frame.size
    return 1, 1


def _joined(sides: list[Sides]) -> Sides:
    if len(sides) == 1:
        return sides[0]
    *contributions, scales = zip(*sides, strict=True)
    return Sides(
        *({name: torch.cat([d[name] for d in dicts]) for name in dicts[0]} for dicts in contributions), scales[0]
    )


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


def _split(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _name(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__
