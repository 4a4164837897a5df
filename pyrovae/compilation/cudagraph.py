"""Recording of what a function launches on a GPU as a CUDA graph, replayed as one launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.compilation import torch_internals
from pyrovae.compilation.guards import Guards, all_unchanged
from pyrovae.compilation.recording import Recording


class PostStep(NamedTuple):
    """What follows the computation of a result, such as a step of an optimizer; on a GPU it is recorded with it.

    Args:
        call: called with the result and the guards; changes tensors in place.
        fingerprint: returns numbers and objects that are unchanged whenever `call` launches the same kernels on the
            same memory; None where that is unknown, and `call` must not be recorded.
        on_gradient: called before that with a leaf and its gradient, some or all, while others may still be computed.
    """

    call: Callable[[Any, Guards], Any]
    fingerprint: Callable[[], list] | None
    on_gradient: Callable[[Tensor, Tensor], Any] | None = None


class CudaGraph:
    """A CUDA graph: the kernels that a function launched, launched again from and into the same memory.

    Args:
        function: called with inputs.
        inputs: tensors that it reads, different at each call.
        kept: the other tensors that it reads, and may change in place.
        fingerprint: everything else that its launches depend on.

    Raises:
        RuntimeError: when the function does what cannot be recorded, such as waiting for the GPU.
    """

    def __init__(
        self, function: Callable[[list[Tensor]], Any], inputs: list[Tensor], kept: list[Tensor], fingerprint: list
    ):
        self.kept, self.fingerprint = kept, fingerprint
        self.addresses = [t.data_ptr() for t in kept]
        self.inputs = list(map(memory_for, inputs))
        self._written = list(map(without_repeats, self.inputs))
        self.device = (inputs or kept)[0].device
        with torch.cuda.device(self.device):
            self._take(inputs)
            try:
                self.graph, self.result = _captured(lambda: function(self.inputs))
            except RuntimeError:
                # A failed capture leaves torch's generator in its capturing state, until some capture succeeds.
                nothing = torch.zeros((), device=self.device)
                _captured(lambda: nothing.zero_())
                raise

    def matches(self, fingerprint: list) -> bool:
        """Returns whether a replay computes what a call of the function would compute now."""
        is_same = all_unchanged(self.fingerprint, fingerprint)
        return is_same and [t.data_ptr() for t in self.kept] == self.addresses

    def replay(self, inputs: list[Tensor]) -> Any:
        """Replays the graph for some inputs; returns its result, which the next replay overwrites."""
        with torch.cuda.device(self.device):
            self._take(inputs)
            self.graph.replay()
        return self.result

    def _take(self, inputs: list[Tensor]) -> None:
        if inputs:
            torch_internals.copy_tensors(self._written, list(map(without_repeats, inputs)))


def memory_for(t: Tensor) -> Tensor:
    """Returns new memory for the values of a tensor, with its strides, which the recorded code counts on."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def without_repeats(t: Tensor) -> Tensor:
    """Returns the part of an expanded tensor that holds each of its numbers once, so that it can be written to."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t


def _captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    # The default mode forbids what the thread of a loader may do on the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        return graph, function()


def on_one_gpu(recording: Recording, inputs: list[Tensor]) -> bool:
    """Returns whether a graph reads and draws on one GPU only, so that a CUDA graph of it is complete."""
    devices = {t.device for t in (*inputs, *recording.inputs)} | recording.random_devices()
    return len(devices) == 1 and next(iter(devices)).type == "cuda"
