"""The private parts of torch that compilation needs. No other module of pyrovae uses them.

Torch may move or remove them in any release. ``MISSING`` then says what is missing, nothing is compiled, and everything
else works.
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    from torch.utils._python_dispatch import TorchDispatchMode

    class DispatchMode(TorchDispatchMode):
        """A context in which a function runs every operation that torch dispatches, those of autograd too.

        Args:
            dispatch: called with an operation and its arguments; returns its result.
        """

        def __init__(self, dispatch: Callable[[Any, tuple, dict[str, Any]], Any]):
            super().__init__()
            self.dispatch = dispatch

    def _dispatch(self: DispatchMode, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return self.dispatch(op, args, kwargs or {})

    # Set after the class is made, which would wrap it for torch.compile: that takes longer than most operations.
    DispatchMode.__torch_dispatch__ = _dispatch  # type: ignore[method-assign,assignment]
    copy_tensors = torch._foreach_copy_
    function_owners = (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase)
    below_autograd = torch._C._AutoDispatchBelowAutograd
    OpOverload = torch._ops.OpOverload
    MISSING = ""
except (ImportError, AttributeError) as error:
    MISSING = str(error)

try:  # libraries that torch compiled ahead of time, a part of torch that may be missing by itself
    _runner = torch._C._aoti.AOTIModelContainerRunnerCpu

    def load_library(path: str) -> Callable[[list], list]:
        """Returns the function of tensors in a library for the CPU."""
        return _runner(path, 1).run

except AttributeError:
    load_library = None  # type: ignore[assignment]


def has_vector_instructions() -> bool:
    """Returns whether torch's own kernels use the processor's vector instructions in this process.

    Inductor then need not compile and load programs that test them, which takes half the time of a first compilation.
    """
    from torch._inductor import config  # takes long to import

    return hasattr(config.cpp, "vec_isa_ok") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def compile_library(module: torch.fx.GraphModule, examples: tuple) -> str:
    """Compiles a graph of tensors into a library for the CPU, which :func:`load_library` takes; returns its path.

    Args:
        module: the graph.
        examples: tensors with the shapes and strides of its inputs.
    """
    from torch import _inductor  # takes long to import

    options: dict[str, Any] = {"fallback_random": True}  # random numbers as in eager mode
    if has_vector_instructions():
        options["cpp.vec_isa_ok"] = True
    return str(_inductor.aot_compile(module, examples, options=options))
