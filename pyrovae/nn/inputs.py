"""Networks that transform their input first, then call another network."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.nn.base import Network, Shape, ShapedNetwork, apply, as_shape, build
from pyrovae.nn.dense import MLP


class OneHotInput(ShapedNetwork):
    r"""Converts class numbers to one-hot vectors for another network: for integer data and discrete latents.

    .. math:: y = \mathrm{network}(\mathrm{onehot}(x), c)

    Without it, a network would take class 3 as three times class 1.

    Args:
        in_shape: shape of one input, of integers from 0 to ``num_classes - 1`` (of an integer or floating-point type).
        out_shape: shape of one output.
        num_classes: number of classes.
        network: a module, or a callable that builds one from ``((*in_shape, num_classes), out_shape)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape, or an input is not a class number.

    >>> OneHotInput(4, 10, num_classes=5)(torch.tensor([[0, 1, 2, 4]])).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        num_classes: int,
        network: Network = MLP,
        context_dim: int = 0,
    ):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        self.num_classes = num_classes
        self.network = build(network, (*self.in_shape, num_classes), self.out_shape, context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x, floating=False)
        classes = x.long()
        # Written so that NaN is refused: every comparison with NaN is false.
        if not bool(((classes == x) & (classes >= 0) & (classes < self.num_classes)).all()):
            low, high = x.min().item(), x.max().item()
            raise ValueError(
                f"OneHotInput takes whole numbers from 0 to {self.num_classes - 1} (num_classes={self.num_classes}), "
                f"but its input ranges from {low:g} to {high:g}. Count classes from 0, or build it with more classes."
            )
        dtype = next((p.dtype for p in self.network.parameters()), torch.get_default_dtype())
        return apply(self.network, one_hot(classes, self.num_classes).to(dtype), context, self.out_shape, "OneHotInput")


class LogInput(ShapedNetwork):
    r"""Converts numbers to a logarithmic scale for another network: for counts and powers, which may span decades.

    .. math:: y = \mathrm{network}(\mathrm{sign}(x) \log(1 + |x|), c)

    With raw counts, the few large ones would dominate an encoder.

    Args:
        in_shape: shape of one input.
        out_shape: shape of one output.
        network: a module, or a callable that builds one from ``(in_shape, out_shape)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> LogInput(4, 10)(torch.tensor([[0.0, 3.0, 1000.0, 7.0]])).shape
    torch.Size([1, 10])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, network: Network = MLP, context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        self.network = build(network, self.in_shape, self.out_shape, context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x)
        return apply(self.network, x.sign() * x.abs().log1p(), context, self.out_shape, "LogInput")
