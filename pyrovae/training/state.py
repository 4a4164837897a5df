"""The state that training changes: parameters, buffers and modes of modules, and the random generators."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.arguments import cuda_devices, tensors_of
from pyrovae.inference.running import evaluation_mode

Snapshot = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ModelState:
    """The parameters, buffers and modules that a model and a guide use.

    Keys are "<number> <name>", numbered in the order of use, because the names that Pyro gives to parameters may differ
    from one process to the next.

    Args:
        params: the parameters to train, unconstrained.
        buffers: the buffers of all modules.
        frozen: the parameters of modules that are not trained.
        modes: for each module whether it is in training mode during training.
        has_loss: whether the ELBO has a loss, and not only a gradient.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    frozen: Sequence[Tensor]
    modes: dict[nn.Module, bool]
    has_loss: bool

    @cached_property
    def trained(self) -> list[Tensor]:
        """The parameters to train, each once, also if several names share it."""
        return list({id(p): p for p in self.params.values()}.values())

    def tensors(self) -> list[Tensor]:
        """Returns all parameters, frozen or not, and buffers."""
        return [*self.trained, *self.frozen, *self.buffers.values()]

    def find_nonfinite(self) -> str | None:
        """Returns the name of a parameter that holds NaN or infinity, None if all are finite."""
        if bool(nn.utils.get_total_norm(self.trained).isfinite()):  # many times faster
            return None
        return next((display_name(key) for key, p in self.params.items() if not bool(torch.isfinite(p).all())), None)

    def snapshot(self) -> Snapshot:
        """Returns copies of all parameters and buffers."""
        groups = {"params": self.params, "buffers": self.buffers}
        return {group: {k: t.detach().clone() for k, t in tensors.items()} for group, tensors in groups.items()}

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Copies a snapshot into the parameters and buffers, after checking that it has their names and shapes."""
        for group, tensors in (("params", self.params), ("buffers", self.buffers)):
            ours = {k: tuple(t.shape) for k, t in tensors.items()}
            theirs = {k: tuple(t.shape) for k, t in snapshot[group].items()}
            if ours != theirs:
                key = sorted(ours.items() ^ theirs.items())[0][0]
                raise ValueError(
                    f"The checkpoint was written for another model: {display_name(key)!r} has shape {theirs.get(key)} "
                    f"in the checkpoint, {ours.get(key)} in the model. Resume with the same model and guide."
                )
        for k, t in (self.params | self.buffers).items():
            t.copy_((snapshot["params"] | snapshot["buffers"])[k])

    def set_modes(self) -> None:
        """Sets the modes for training, at the start or after a callback changed them."""
        for module, mode in self.modes.items():
            if module.training is not mode:
                module.training = mode

    @contextmanager
    def modes_restored(self) -> Iterator[None]:
        """Restores the modes of all modules, training or evaluation, when training ends or fails."""
        before = {module: module.training for module in self.modes}
        try:
            yield
        finally:
            for module, mode in before.items():
                module.training = mode


def display_name(key: str) -> str:
    """Returns the name of a parameter or buffer without its number."""
    return key.split(" ", 1)[1]


def find_state(loss: Any, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> ModelState:
    """Runs the loss once, and finds the parameters, buffers and modules that it uses. The run changes nothing.

    Args:
        loss: an ELBO; Pyro's base class does not declare the methods of its kinds.
        model: a Pyro model.
        guide: a Pyro guide.
        args: positional arguments of both.
        kwargs: keyword arguments of both.

    Raises:
        ValueError: when there is no parameter, or a module is used whose parameters Pyro does not know.
    """
    modules: dict[int, nn.Module] = {}

    def record(module: nn.Module, _inputs: Any) -> None:
        modules.setdefault(id(module), module)

    handle = nn.modules.module.register_module_forward_pre_hook(record)
    devices = cuda_devices(tensors_of(args, kwargs))
    has_loss = True
    try:
        with (
            torch.no_grad(),
            evaluation_mode(),
            torch.random.fork_rng(devices),
            poutine.trace(param_only=True) as tracer,
        ):
            try:
                loss.loss(model, guide, *args, **kwargs)
            except NotImplementedError:  # an ELBO that has a gradient only
                has_loss = False
                loss.differentiable_loss(model, guide, *args, **kwargs)
    finally:
        handle.remove()
    for owner in (model, guide):  # the module of a method is used, even if it is never called
        owner = getattr(owner, "__self__", owner)
        if isinstance(owner, nn.Module):
            modules.update((id(m), m) for m in owner.modules())
    nodes: Mapping[str, Any] = tracer.trace.nodes
    params = {
        f"{i} {name.split('$$$')[-1]}": site["value"].unconstrained() for i, (name, site) in enumerate(nodes.items())
    }
    if not params:
        raise ValueError(
            "model and guide have no parameters to train. Register networks with pyro.module, or use pyro.param."
        )
    known = {id(p) for p in params.values()}
    for module in modules.values():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in known:
                if not p.is_contiguous():
                    raise ValueError(
                        f"{name} of {module} would not be trained: Pyro copies parameters that are not contiguous in "
                        "memory. Leave out to(memory_format=...), or call it on the data alone."
                    )
                taken = ", ".join(sorted({key.split("$$$")[0] for key in pyro.get_param_store()}))
                raise ValueError(
                    f"{name} of {module} is used but would not be trained, because Pyro does not know it. Register the "
                    f"network with pyro.module, under a name that no other model has (taken: {taken}); or freeze it "
                    "with requires_grad_(False)."
                )
    buffers = {
        f"{i} {name}": buffer
        for i, module in enumerate(modules.values())
        for name, buffer in module.named_buffers(recurse=False)
    }
    inner = {id(child) for module in modules.values() for child in module.modules() if child is not module}
    roots = [module for key, module in modules.items() if key not in inner]
    modes = {module: module.training for root in roots for module in root.modules()}
    for root in roots:
        modes.update(dict.fromkeys(_modules_to_train(root, parent_is_training=False), True))
    frozen = [p for m in modules.values() for p in m.parameters(recurse=False) if id(p) not in known]
    return ModelState(params, buffers, frozen, modes, has_loss)


def _modules_to_train(module: nn.Module, parent_is_training: bool) -> Iterator[nn.Module]:
    """Yields a module and its descendants that train in training mode: all but those frozen in evaluation mode."""
    children, params = list(module.children()), list(module.parameters())
    is_frozen = bool(params) and not any(p.requires_grad for p in params)
    if not module.training and (is_frozen or parent_is_training and not children):
        return
    yield module
    for child in children:
        yield from _modules_to_train(child, module.training)


def _generators(batches: Iterable) -> Iterator[torch.Generator]:
    """Yields the random generators that belong to a loader or its samplers, besides torch's global one."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    for holder in (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def random_state(batches: Iterable) -> dict[str, Any]:
    """Returns the states of the random generators of torch, NumPy, Python and a loader."""
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(batches)],
    }


def set_random_state(state: dict[str, Any], batches: Iterable) -> None:
    """Sets the random generators to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    for generator, saved in zip(_generators(batches), state["loader"], strict=True):
        generator.set_state(saved)
