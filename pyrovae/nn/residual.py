"""Residual blocks."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from pyrovae.nn.base import start_layer

_RELU_GAIN = math.sqrt(2)  # a ReLU halves the second moment
_BRANCH_SCALE = 0.1  # small, but not 0: then the inner layers would have no gradient at first


class _Residual(nn.Sequential):
    """A residual block: the input plus the output of the layers."""

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


def residual_block(
    layer: Callable[[], nn.Linear | nn.Conv2d], norm: Callable[[], nn.Module], activation: Callable[[], nn.Module]
) -> nn.Module:
    r"""Returns a pre-activation residual block, which starts close to the identity.

    .. math:: h + f(h), \qquad f(h) = W_2\, a(\mathrm{norm}(W_1\, a(\mathrm{norm}(h)) + b_1)) + b_2

    Args:
        layer: builds a layer from h to h, affine or a convolution.
        norm: builds a normalisation.
        activation: builds the activation :math:`a`.

    References:
        Identity Mappings in Deep Residual Networks, K. He, X. Zhang, S. Ren and J. Sun, 2016,
        https://arxiv.org/abs/1603.05027.
    """
    return _Residual(
        norm(),
        activation(),
        start_layer(layer(), _RELU_GAIN),
        norm(),
        activation(),
        start_layer(layer(), _BRANCH_SCALE * _RELU_GAIN),
    )
