"""How models and guides are run: with a trace, in evaluation mode, in full precision, without side effects."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyrovae.arguments import cuda_devices


@contextmanager
def evaluation_mode() -> Iterator[None]:
    """Runs every module that is called inside in ``eval()`` mode, and restores its mode afterwards.

    A model and a guide are functions, whose modules cannot be listed: each module is switched when it is called.
    Recurrent layers run without cuDNN where gradients are enabled: it has none in this mode, and no second ones in any.
    """
    switched: list[nn.Module] = []
    without_cudnn: list[nn.Module] = []

    def switch(module: nn.Module, _inputs: Any) -> None:
        for child in module.modules() if module.training else ():
            if child.training:
                child.training = False
                switched.append(child)
        if isinstance(module, nn.RNNBase) and torch.is_grad_enabled() and torch.backends.cudnn.enabled:
            torch.backends.cudnn.enabled = False
            without_cudnn.append(module)

    def restore(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if without_cudnn and without_cudnn[-1] is module:
            torch.backends.cudnn.enabled = True
            without_cudnn.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(switch),
        nn.modules.module.register_module_forward_hook(restore, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in switched:
            module.training = True


@contextmanager
def full_precision(devices: Iterable[torch.device]) -> Iterator[None]:
    """Turns autocast off on some devices, so that densities are computed in the precision of their parameters."""
    with ExitStack() as stack:
        for kind in {device.type for device in devices if torch.is_autocast_enabled(device.type)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def isolated(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Runs without gradients and in evaluation mode; restores the random state, of the tensors' devices too."""
    with torch.no_grad(), evaluation_mode(), torch.random.fork_rng(cuda_devices(tensors)):
        yield


def traced(function: Callable, draws: poutine.Trace | None, *args: Any, **kwargs: Any) -> poutine.Trace:
    """Runs a model or a guide, at the latents and subsamples of another trace unless None; returns its trace."""
    # Handlers as contexts, not as wrappers: a wrapped function could not take an argument named "context".
    with poutine.trace() as tracer, poutine.replay(trace=draws) if draws is not None else nullcontext():
        try:
            function(*args, **kwargs)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            name = getattr(function, "__qualname__", type(function).__name__)
            raise ValueError(
                f"{name} takes a gradient ({error}), but is checked, validated and scored without gradients. Take it "
                "inside of `with torch.enable_grad():`."
            ) from error
    return tracer.trace
