r"""Losses of Pyro models and guides as compiled graphs: Pyro's handlers run once, when a graph is traced."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyrovae.arguments import in_layout_of
from pyrovae.bounds import Bound, Terms
from pyrovae.bounds.schedules import ScheduledStep
from pyrovae.compilation.cache import GraphCache
from pyrovae.compilation.cudagraph import PostStep
from pyrovae.compilation.guards import ATOMS, Guards
from pyrovae.compilation.recording import Recording
from pyrovae.compilation.tracing import inductor
from pyrovae.distributed import Shard
from pyrovae.inference.messages import ObservedChecked, Untraceable, check_observed_by

__all__ = ["Compiled", "GraphCache", "compile"]

# Calls on a GPU between checks of a result, each of which waits for the GPU.
_CHECK_EVERY = 50


class Step(NamedTuple):
    """The result of one evaluation of a loss and its gradient.

    Args:
        loss: summed over the data, as the ELBO gives it.
        terms: its parts; None for one of Pyro's ELBOs.
        numbers: the loss and its parts, in the order of the terms' names, in one tensor of float64.
        inside: whether all observed data are in the support of their distributions.
        fine: whether they are, and the loss is finite.
        gradients: of the loss times a scale, for each leaf that it reads; None where there is none.
    """

    loss: Tensor
    terms: Terms | None
    numbers: Tensor
    inside: Tensor
    fine: Tensor
    gradients: list[Tensor | None]


class Compiled(ELBO):
    r"""An ELBO whose loss and gradient are computed together by a compiled graph; see :func:`compile`.

    Args:
        elbo: the ELBO.
        backend: what runs the operations of a graph.
    """

    def __init__(self, elbo: ELBO, backend: Callable[[Recording], Callable] = inductor):
        super().__init__(num_particles=elbo.num_particles, vectorize_particles=elbo.vectorize_particles)
        self.elbo: Any = elbo  # a Bound has more than the methods of ELBO
        self.graphs = GraphCache(type(elbo).__name__, backend)
        self.unvalidated: frozenset[str] = frozenset()  # observed sites whose data are not checked

    def step(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        scale: float = 1.0,
        shard: Shard | None = None,
        post_step: PostStep | None = None,
        unchanged: bool = False,
    ) -> tuple[Step, Guards] | None:
        """Computes a loss, and the gradient of the loss times a scale.

        Args:
            model: a Pyro model.
            guide: a Pyro guide.
            args: positional arguments of both.
            kwargs: keyword arguments of both.
            scale: of the gradient.
            shard: the part of a batch that `args` and `kwargs` hold, which takes its part of the batch's noise; None
                for a whole batch.
            post_step: called with the :class:`Step` before it is returned; a later step may overwrite the result then.
            unchanged: whether no code of a user ran since the latest step.

        Returns:
            The result, and the guards of the state that it was computed from; None where there is no graph, as
            :class:`GraphCache` says. Nothing has been computed then.
        """
        self.graphs.refuse_packed(args, kwargs)
        leaves, structure = _flattened(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        others = [x for x in leaves if not isinstance(x, Tensor)]
        schedules = self.elbo.schedules if isinstance(self.elbo, Bound) else []
        weights = []
        if schedules:
            like = next((t for t in tensors if t.dtype in (torch.float, torch.double)), torch.empty(()))
            # Filled on the device: a copy to a GPU would wait for it.
            weights = [torch.full((), s(self.elbo.steps), dtype=like.dtype, device=like.device) for s in schedules]
        schedule_values = dict(zip(map(id, schedules), weights, strict=True))

        def function(leaves: list[Tensor]) -> Step:
            with shard.noise() if shard is not None else nullcontext():
                return _step(self.elbo, model, guide, args, kwargs, schedule_values, scale, leaves, self.unvalidated)

        roots = (model, guide, self.elbo, *(x for x in others if not isinstance(x, ATOMS)))
        static = (
            scale,
            shard,
            structure,
            *((type(x), x) if isinstance(x, ATOMS) else type(x) for x in others),
        )
        result = self.graphs(function, [*tensors, *weights], roots, static, post_step, unchanged)
        if result is not None and isinstance(self.elbo, Bound):
            self.elbo.steps += 1
        return result

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Terms:
        """Estimates the loss of a bound and its parts, as :meth:`pyrovae.bounds.Bound.terms` does."""
        if not isinstance(self.elbo, Bound):
            raise AttributeError(
                f"{type(self.elbo).__name__} has no terms: use loss, or compile one of pyrovae.bounds."
            )
        result = self._checked_step(model, guide, args, kwargs) if torch.is_grad_enabled() else None
        if result is None:
            return self.elbo.terms(model, guide, *args, **kwargs)
        step, guards = result
        assert step.terms is not None  # those of a Bound
        return step.terms._replace(loss=_differentiable(step, guards))

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of the loss, not compiled."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Returns an estimate of the loss that can be differentiated, once, by the parameters."""
        result = self._checked_step(model, guide, args, kwargs) if torch.is_grad_enabled() else None
        if result is None:
            return self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return _differentiable(*result)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor | float:
        """Returns an estimate of the loss, and adds its gradient to that of the parameters."""
        result = self._checked_step(model, guide, args, kwargs)
        if result is None:
            return self.elbo.loss_and_grads(model, guide, *args, **kwargs)
        step, guards = result
        for p, gradient in zip(guards.leaves, step.gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
        return step.loss

    def _checked_step(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Step, Guards] | None:
        result = self.step(model, guide, args, kwargs)
        if result is None:
            return None
        step, guards = result
        if (not step.inside.is_cuda or self.graphs.calls % _CHECK_EVERY == 0) and not bool(step.inside):
            check_observed_by(model, guide, *args, **kwargs)
        if _PYRO_STACK:  # a handler of SVI, which finds the parameters by these calls
            for name in guards.params:
                pyro.param(name)
        return step, guards

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> NoReturn:
        raise NotImplementedError("Compiled makes no traces of its own.")

    def __repr__(self) -> str:
        return f"compile({self.elbo!r})"


def compile(elbo: ELBO) -> Compiled:
    r"""Returns an ELBO with the same losses and gradients, computed by compiled graphs.

    The loss over a Pyro model and guide and its gradient are traced, through Pyro's handlers, into one graph of tensor
    operations, which ``torch.compile`` compiles: it is as fast as code written by hand. The result is used as any ELBO:
    in ``pyro.infer.SVI``, in a training loop with ``loss_and_grads``, in :func:`pyrovae.fit`, where ``compile=True``
    is a short form. For the same seed, noise is the same as without compilation.

    Everything may change between calls: there is one graph for each shape of the data and for each state of what model
    and guide can reach (numbers, flags, train and eval mode, global variables); schedules of a bound are inputs. At
    calls 1, 2, 4, 8, ... each graph is compared with the ELBO itself, which finds a change of what no guard sees, such
    as a file. Where there can be no graph (no C++ compiler, control flow that depends on the values of tensors, state
    that every run changes, a torch without the internals that tracing needs), one warning says why, and the ELBO runs
    eagerly.

    To find their state, model and guide run some times more often than there are steps, and the random state is
    restored after each such run. A guide that sets itself up at its first call, such as Pyro's automatic guides, does
    so then, without changing the random state; call it once before for a run that is equal to one without compilation.

    Args:
        elbo: one of :mod:`pyrovae.bounds`, or Pyro's ``Trace_ELBO``, ``TraceMeanField_ELBO`` or ``TraceEnum_ELBO``.
            Pyro's other ELBOs run eagerly.

    Raises:
        TypeError: when `elbo` is not an ELBO.
        RuntimeError: at a call, when a graph disagrees with the ELBO itself.

    References:
        PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation, J.
        Ansel et al., 2024, https://doi.org/10.1145/3620665.3640366.

    >>> from pyrovae import bounds
    >>> compile(bounds.IWAE(num_particles=16))
    compile(IWAE(num_particles=16, gradient=Reparameterized()))
    """
    if not isinstance(elbo, ELBO):
        raise TypeError(f"elbo must be an instance of ELBO, such as bounds.IWAE(16), got {elbo!r}.")
    return elbo if isinstance(elbo, Compiled) else Compiled(elbo)


def _flattened(args: tuple, kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
    """Returns the leaves of arguments, and their tree structure, hashable."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return args, len(args)  # the most common case, and much faster than tree_flatten
    return tree_flatten((args, kwargs))


def _step(
    elbo: Any,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    schedule_values: dict[int, Tensor],
    scale: float,
    leaves: list[Tensor],
    unvalidated: frozenset[str],
) -> Step:
    """Computes a loss and its gradient eagerly: the function that is traced."""
    kind = type(elbo).__name__
    if not hasattr(elbo, "differentiable_loss"):
        raise Untraceable(f"{kind} has no differentiable_loss")
    if _defining_class(elbo, "differentiable_loss") is not _defining_class(elbo, "loss_and_grads"):
        raise Untraceable(f"the loss_and_grads and the differentiable_loss of {kind} come from different classes")
    terms = None
    with torch.enable_grad(), ObservedChecked(later=True, without=unvalidated) as data:
        if isinstance(elbo, Bound):
            steps = elbo.steps
            elbo.steps = ScheduledStep(schedule_values)  # type: ignore[assignment]
            try:
                terms = elbo.terms(model, guide, *args, **kwargs)
            finally:
                elbo.steps = steps
            loss = terms.loss
            terms = terms._replace(loss=loss.detach())
        else:
            loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        gradients: list[Tensor | None] = [None] * len(leaves)
        if leaves and loss.requires_grad:
            found = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
            gradients = [None if g is None else in_layout_of(p, g) for p, g in zip(leaves, found, strict=True)]
    loss, inside = loss.detach(), torch.as_tensor(data.inside(), device=loss.device)
    numbers = torch.stack([loss] if terms is None else [*terms.named.values()]).double()
    return Step(loss, terms, numbers, inside, loss.isfinite() & inside, gradients)


def _defining_class(elbo: ELBO, name: str) -> type:
    return next(cls for cls in type(elbo).__mro__ if name in vars(cls))


class _LossWithGradient(torch.autograd.Function):
    """A loss whose gradient has been computed with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple:
        return None, None, *(outer * gradient for gradient in ctx.gradients)


def _differentiable(step: Step, guards: Guards) -> Tensor:
    """Returns the loss of a step, with its gradient by the leaves for autograd."""
    pairs = [(g, p) for g, p in zip(step.gradients, guards.leaves, strict=True) if g is not None]
    return _LossWithGradient.apply(step.loss, [g for g, _ in pairs], *(p for _, p in pairs))
