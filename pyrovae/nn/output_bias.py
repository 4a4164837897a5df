"""The initial output of a network, set by the bias of its last layer."""

import torch
from torch import Tensor, nn

from pyrovae.nn.base import ShapedNetwork
from pyrovae.nn.inputs import LogInput, OneHotInput
from pyrovae.nn.sequences import GRUDecoder


@torch.no_grad()
def set_output_bias(network: nn.Module, value: Tensor) -> None:
    r"""Sets the bias of a network's last layer, so that its outputs are initially near a value.

    A decoder whose outputs start at those of the average datum (as logits, logarithms and so on) need not learn them
    first.

    Args:
        network: a network of this module, or an ``nn.Sequential`` that ends in an affine map or a convolution (layers
            that only reshape may follow it).
        value: the value, of the shape of one output of the network. A convolution has one bias for all pixels of a
            channel, a recurrent decoder one for all steps: they get the mean.

    Raises:
        ValueError: when the network does not end in a layer with a bias, or `value` is not finite or not of its shape.

    >>> from pyrovae.nn import MLP
    >>> network = MLP(2, (1, 2), hidden=())
    >>> set_output_bias(network, torch.tensor([[3.0, 4.0]]))
    >>> network(torch.zeros(2))
    tensor([[3., 4.]], grad_fn=<ViewBackward0>)
    """
    if isinstance(network, OneHotInput | LogInput):
        return set_output_bias(network.network, value)
    name, layer = type(network).__name__, _last_layer(network)
    bias = None if layer is None else layer.bias
    if bias is None:
        raise ValueError(
            f"{name} does not end in a layer with a bias that could be set. Use a network of pyrovae.nn, or an "
            "nn.Sequential that ends in an nn.Linear or a convolution with bias=True; or set its bias yourself."
        )
    if not bool(value.isfinite().all()):
        raise ValueError("value holds NaN or infinity, but must be finite. Bound it, for example with .clamp().")
    # The dimensions of one output over which a bias is shared.
    shared = (-2,) if isinstance(network, GRUDecoder) else tuple(range(-len(getattr(layer, "kernel_size", ())), 0))
    fits = value.shape == getattr(network, "out_shape", value.shape) and value.dim() > len(shared)
    start = value.to(bias).unsqueeze(0).mean((0, *shared)) if fits else value
    if not fits or start.numel() != bias.numel():
        raise ValueError(
            f"value must have the shape of one output of {name}, whose last layer has {bias.numel()} biases, got "
            f"{tuple(value.shape)}."
        )
    bias.copy_(start.reshape(bias.shape))


def _last_layer(network: nn.Module) -> nn.Linear | nn.modules.conv._ConvNd | None:
    """Returns the affine map or convolution that computes the output of a network, or None if that is unclear."""
    if isinstance(network, (nn.Linear, nn.modules.conv._ConvNd)):
        return network
    # Only these are known to return the output of their last child.
    if isinstance(network, ShapedNetwork | nn.Sequential):
        children = [child for child in network.children() if not isinstance(child, nn.Flatten | nn.Unflatten)]
        return _last_layer(children[-1]) if children else None
    return None
