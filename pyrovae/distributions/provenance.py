"""Functions with gradients of their own under ``TraceGraph_ELBO``, which marks tensors by where they come from."""

from typing import Any

from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.autograd import Function


def apply_function(function: type[Function], *args: Any) -> Tensor:
    """Returns ``function.apply(*args)``.

    A ``ProvenanceTensor`` hides the graph of the tensor that it stands for from autograd, which would lose the gradient
    without a word. The function gets the tensor itself, and the result the marks of all arguments.
    """
    if not any(isinstance(x, ProvenanceTensor) for x in args):
        return function.apply(*args)
    return track_provenance(function.apply(*map(detach_provenance, args)), get_provenance(args))
