"""Networks of affine maps, between tensors of any shape."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from pyrovae.nn.base import Shape, ShapedNetwork, as_shape, check_count, check_counts, start_layer
from pyrovae.nn.residual import residual_block

# For u ~ N(0, 1) and a = sqrt(3), a^2 E[sigmoid(a u)^2] = 1 to two digits: a gated linear unit keeps the second moment.
_GATE_GAIN = math.sqrt(3)


class _Dense(ShapedNetwork):
    """Flattened inputs and context, concatenated, through `layers` to outputs of any shape."""

    layers: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(self.flatten_input(x, context)).unflatten(-1, self.out_shape)


class MLP(_Dense):
    r"""A multilayer perceptron between tensors of any shape.

    .. math:: h_0 = [\mathrm{flatten}(x), c], \quad h_{i} = a(W_i h_{i-1} + b_i), \quad y = W_L h_{L-1} + b_L

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output.
        hidden: widths of the hidden layers; empty for an affine map.
        activation: builds the activation :math:`a`, for example ``torch.nn.SiLU``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    >>> import torch
    >>> MLP((1, 8, 8), 10)(torch.zeros(5, 3, 1, 8, 8)).shape
    torch.Size([5, 3, 10])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Sequence[int] = (400,),
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        widths = [math.prod(self.in_shape) + context_dim, *check_counts(hidden, "hidden")]
        layers = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.out_shape)))


class GatedMLP(_Dense):
    r"""A multilayer perceptron of gated linear units.

    .. math:: h_0 = [\mathrm{flatten}(x), c], \quad
        h_{i} = (W_i h_{i-1} + b_i) \odot \sigma(V_i h_{i-1} + d_i), \quad y = W_L h_{L-1} + b_L

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output.
        hidden: widths of the hidden layers; empty for an affine map.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Language Modeling with Gated Convolutional Networks, Y. N. Dauphin, A. Fan, M. Auli and D. Grangier, 2017,
        https://arxiv.org/abs/1612.08083.
        VAE with a VampPrior, J. M. Tomczak and M. Welling, 2018, https://arxiv.org/abs/1705.07120 (two such layers
        of 300).

    >>> import torch
    >>> GatedMLP((1, 8, 8), 10)(torch.zeros(5, 3, 1, 8, 8)).shape
    torch.Size([5, 3, 10])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, hidden: Sequence[int] = (300, 300), context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        widths = [math.prod(self.in_shape) + context_dim, *check_counts(hidden, "hidden")]
        layers = []
        for n_in, n_out in pairwise(widths):
            layers += [start_layer(nn.Linear(n_in, 2 * n_out), _GATE_GAIN), nn.GLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.out_shape)))


class ResidualMLP(_Dense):
    r"""A deep perceptron of pre-activation residual blocks with layer normalisation.

    .. math:: h_0 = W_0 [\mathrm{flatten}(x), c] + b_0, \quad h_{i} = h_{i-1} + f_i(h_{i-1}), \quad
        y = W\, a(h_L) + b

    The branches :math:`f(h) = W_2\, a(\mathrm{norm}(W_1\, a(\mathrm{norm}(h)) + b_1)) + b_2` are initialised at a tenth
    of unit scale, so that a network of any depth is close to one hidden layer at first. Unlike in He et al., there is
    no normalisation before the output: with it, a VAE takes much longer until its decoder uses the latents.

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output.
        width: units of every hidden layer.
        num_blocks: number of residual blocks, of two layers each.
        activation: builds the activation :math:`a`, for example ``torch.nn.SiLU``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Identity Mappings in Deep Residual Networks, K. He, X. Zhang, S. Ren and J. Sun, 2016,
        https://arxiv.org/abs/1603.05027.
        Layer Normalization, J. L. Ba, J. R. Kiros and G. E. Hinton, 2016, https://arxiv.org/abs/1607.06450.
        Fixup Initialization: Residual Learning Without Normalization, H. Zhang, Y. N. Dauphin and T. Ma, 2019,
        https://arxiv.org/abs/1901.09321 (why a block should start as the identity).

    >>> import torch
    >>> ResidualMLP((1, 8, 8), 10, num_blocks=8)(torch.zeros(5, 3, 1, 8, 8)).shape
    torch.Size([5, 3, 10])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        width: int = 256,
        num_blocks: int = 4,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        width, num_blocks = check_count(width, "width"), check_count(num_blocks, "num_blocks", 0)
        layer, norm = partial(nn.Linear, width, width), partial(nn.LayerNorm, width)
        self.layers = nn.Sequential(
            start_layer(nn.Linear(math.prod(self.in_shape) + context_dim, width), 1.0),
            *(residual_block(layer, norm, activation) for _ in range(num_blocks)),
            activation(),
            nn.Linear(width, math.prod(self.out_shape)),
        )
