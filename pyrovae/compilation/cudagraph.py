"""What is computed on a GPU again and again, recorded once and played back as one launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrovae.compilation.guards import Guards, same


class PostStep(NamedTuple):
    """What is done with the result of a function, such as a step of an optimizer; on a GPU in one go with it.

    Args:
        call: called with the result and the state; changes tensors in place.
        told: returns numbers and objects that are the same whenever it launches the same on the same memory; None where
            that cannot be told, and it is not to be recorded.
    """

    call: Callable[[Any, Guards], Any]
    told: Callable[[], list] | None


class CudaGraph:
    """What a function launches on a GPU, to be launched again at once, from and into the same memory: a CUDA graph.

    Args:
        function: called with inputs; its launches depend on nothing but what is told here.
        inputs: tensors that it reads, others at each call.
        kept: the other tensors that it reads, and may change in place.
        told: what else decides what it launches.

    Raises:
        RuntimeError: when it does what cannot be recorded, as waiting for the GPU.
    """

    def __init__(self, function: Callable[[list[Tensor]], Any], inputs: list[Tensor], kept: list[Tensor], told: list):
        self.kept, self.told = kept, told
        self.places = [t.data_ptr() for t in kept]
        self.inputs = [t.clone() for t in inputs]
        if any(a.stride() != b.stride() for a, b in zip(self.inputs, inputs, strict=True)):
            raise RuntimeError("an argument is a view with gaps, call contiguous() on it")
        self.device = (inputs or kept)[0].device
        with torch.cuda.device(self.device):
            try:
                self.graph, self.result = _recorded(lambda: function(self.inputs))
            except RuntimeError:
                # Torch's generator is left as if it were recording still, until a recording comes to its end.
                nothing = torch.zeros((), device=self.device)
                _recorded(lambda: nothing.zero_())
                raise

    def matches(self, told: list) -> bool:
        """Returns whether it does what is asked for now."""
        return same(self.told, told) and [t.data_ptr() for t in self.kept] == self.places

    def replay(self, inputs: list[Tensor]) -> Any:
        """Launches it for inputs; returns its result, which the next time overwrites."""
        with torch.cuda.device(self.device):
            if inputs:
                torch._foreach_copy_(self.inputs, inputs)
            self.graph.replay()
        return self.result


def _recorded(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    # The thread of a loader may talk to the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        return graph, function()


def on_one_gpu(module: torch.fx.GraphModule, tensors: list[Tensor]) -> bool:
    """Returns whether all is read and drawn on one GPU, so that nothing is left out where only its launches are recorded."""
    drawn = [n for n in module.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    tensors = [*tensors, *(t for n in drawn for t in tree_leaves(n.meta["val"]) if isinstance(t, Tensor))]
    return all(t.is_cuda for t in tensors) and len({t.device for t in tensors}) == 1
