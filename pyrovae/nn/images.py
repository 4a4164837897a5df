"""Convolutional networks, from images to vectors and back."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from pyrovae.nn.base import Shape, ShapedNetwork, as_shape, check_counts, image_shape, start_layer
from pyrovae.nn.residual import residual_block


def _halved(size: tuple[int, ...], times: int) -> list[tuple[int, ...]]:
    """Returns the size of an image before the first and after each of several stages of stride 2."""
    sizes = [tuple(size)]
    for _ in range(times):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes


def _group_norm(channels: int) -> nn.GroupNorm:
    # Groups of 16 channels (Wu and He, 2018), or of more where 16 does not divide the number of channels.
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def _conv_blocks(channels: int, count: int, activation: Callable[[], nn.Module]) -> list[nn.Module]:
    conv, norm = partial(nn.Conv2d, channels, channels, 3, padding=1), partial(_group_norm, channels)
    return [residual_block(conv, norm, activation) for _ in range(count)]


class _ImageEncoder(ShapedNetwork):
    """Images with flattened channels through `layers` to vectors; these and the context through `head`."""

    layers: nn.Module
    head: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x)
        leading, (height, width) = x.shape[: x.dim() - len(self.in_shape)], self.in_shape[-2:]
        h = self.layers(x.reshape(math.prod(leading), math.prod(self.in_shape[:-2]), height, width))
        h = self.append_context(h.reshape(*leading, h.shape[-1]), context)
        return self.head(h).unflatten(-1, self.out_shape)


class _ImageDecoder(ShapedNetwork):
    """Flattened inputs and context, concatenated, through `foot` and `layers` to images."""

    foot: nn.Module
    layers: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.foot(self.flatten_input(x, context))
        leading = h.shape[:-1]
        return self.layers(h.reshape(math.prod(leading), h.shape[-1])).reshape(*leading, *self.out_shape)


class ConvNet(_ImageEncoder):
    r"""Strided convolutions from an image to a vector: the usual encoder network.

    .. math:: h_i = a(\mathrm{conv}_i(h_{i-1})), \quad h_0 = x, \qquad y = W [\mathrm{flatten}(h_L), c] + b

    Each stage halves the image (kernel 3, stride 2, padding 1); any size is possible. An affine map of the flattened
    features and the context gives the output.

    Args:
        in_shape: shape of one image, ``(..., height, width)``; the dimensions before the last two are channels.
        out_shape: shape of one output.
        channels: channels after each stage.
        activation: builds the activation after each stage.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `in_shape` is not that of an image, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    >>> import torch
    >>> ConvNet((1, 28, 28), 40)(torch.zeros(7, 1, 28, 28)).shape
    torch.Size([7, 40])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[int] = (32, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__(image_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        channels = check_counts(channels, "channels")
        widths = [math.prod(self.in_shape[:-2]), *channels]
        layers = []
        for n_in, n_out in pairwise(widths):
            layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), activation()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * math.prod(_halved(self.in_shape[-2:], len(channels))[-1])
        self.head = nn.Linear(features + context_dim, math.prod(self.out_shape))


class DeconvNet(_ImageDecoder):
    r"""Transposed convolutions from a vector to an image: the usual decoder network, the mirror of :class:`ConvNet`.

    .. math:: h_0 = W [\mathrm{flatten}(x), c] + b, \qquad h_i = \mathrm{deconv}_i(a(h_{i-1})), \qquad y = h_L

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output, ``(..., height, width)``; the dimensions before the last two are channels.
        channels: channels before each stage; each stage doubles the image.
        activation: builds the activation before each stage.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `out_shape` is not that of an image, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    >>> import torch
    >>> DeconvNet(20, (1, 28, 28))(torch.zeros(4, 7, 20)).shape
    torch.Size([4, 7, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[int] = (64, 32),
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__(as_shape(in_shape, "in_shape"), image_shape(out_shape, "out_shape"), context_dim)
        channels = check_counts(channels, "channels")
        sizes = _halved(self.out_shape[-2:], len(channels))[::-1]
        widths = [*channels, math.prod(self.out_shape[:-2])]
        self.foot = nn.Linear(math.prod(self.in_shape) + context_dim, widths[0] * math.prod(sizes[0]))
        layers: list[nn.Module] = [nn.Unflatten(-1, (widths[0], *sizes[0]))]
        for n_in, n_out, size, doubled in zip(widths, widths[1:], sizes, sizes[1:], strict=False):
            # A stage turns n pixels into 2 n - 1; the output padding makes it 2 n where the mirrored stage had that.
            rows, columns = (b - (2 * a - 1) for a, b in zip(size, doubled, strict=True))
            up = nn.ConvTranspose2d(n_in, n_out, 3, 2, padding=1, output_padding=(rows, columns))
            layers += [activation(), up]
        self.layers = nn.Sequential(*layers)


class ResidualConvNet(_ImageEncoder):
    r"""A residual convolutional network from an image to a vector: the deeper encoder network.

    Each stage halves the image with a strided convolution (kernel 3, stride 2, padding 1; any size is possible), then
    applies pre-activation residual blocks :math:`h + f(h)`. The branch f is group normalisation, activation and a
    convolution of kernel 3, twice, initialised at a tenth of unit scale. Normalisation is within each datum: with batch
    normalisation the output for one datum would depend on the others, and on the number of particles.

    Args:
        in_shape: shape of one image, ``(..., height, width)``; the dimensions before the last two are channels.
        out_shape: shape of one output.
        channels: channels after each stage.
        blocks_per_stage: number of residual blocks in each stage.
        activation: builds the activation.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `in_shape` is not that of an image, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Identity Mappings in Deep Residual Networks, K. He, X. Zhang, S. Ren and J. Sun, 2016,
        https://arxiv.org/abs/1603.05027.
        Group Normalization, Y. Wu and K. He, 2018, https://arxiv.org/abs/1803.08494.

    >>> import torch
    >>> ResidualConvNet((1, 28, 28), 40)(torch.zeros(7, 1, 28, 28)).shape
    torch.Size([7, 40])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[int] = (32, 64),
        blocks_per_stage: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__(image_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        channels = check_counts(channels, "channels")
        widths = [math.prod(self.in_shape[:-2]), *channels]
        layers = []
        for n_in, n_out in pairwise(widths):
            down = start_layer(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), 1.0)
            layers += [down, *_conv_blocks(n_out, blocks_per_stage, activation)]
        self.layers = nn.Sequential(*layers, activation(), nn.Flatten())
        features = widths[-1] * math.prod(_halved(self.in_shape[-2:], len(channels))[-1])
        self.head = nn.Linear(features + context_dim, math.prod(self.out_shape))


class ResidualDeconvNet(_ImageDecoder):
    r"""A residual convolutional network from a vector to an image, the mirror of :class:`ResidualConvNet`.

    Each stage applies residual blocks, repeats pixels up to the size of the mirrored stage (nearest neighbour), and
    convolves. With a transposed convolution of stride 2, some pixels would depend on one tap of the kernel and others
    on two or four, which draws a checkerboard; after repetition all pixels depend on all taps.

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output, ``(..., height, width)``; the dimensions before the last two are channels.
        channels: channels before each stage; each stage doubles the image.
        blocks_per_stage: number of residual blocks in each stage.
        activation: builds the activation.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `out_shape` is not that of an image, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Deconvolution and Checkerboard Artifacts, A. Odena, V. Dumoulin and C. Olah, 2016,
        https://distill.pub/2016/deconv-checkerboard.

    >>> import torch
    >>> ResidualDeconvNet(20, (1, 28, 28))(torch.zeros(4, 7, 20)).shape
    torch.Size([4, 7, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        channels: Sequence[int] = (64, 32),
        blocks_per_stage: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__(as_shape(in_shape, "in_shape"), image_shape(out_shape, "out_shape"), context_dim)
        channels = check_counts(channels, "channels")
        sizes = _halved(self.out_shape[-2:], len(channels))[::-1]
        features = channels[0] * math.prod(sizes[0])
        self.foot = start_layer(nn.Linear(math.prod(self.in_shape) + context_dim, features), 1.0)
        layers: list[nn.Module] = [nn.Unflatten(-1, (channels[0], *sizes[0]))]
        for n_in, n_out, size in zip(channels, channels[1:], sizes[1:], strict=False):
            up = start_layer(nn.Conv2d(n_in, n_out, 3, padding=1), 1.0)
            layers += [*_conv_blocks(n_in, blocks_per_stage, activation), nn.Upsample(size), up]
        layers += [*_conv_blocks(channels[-1], blocks_per_stage, activation), activation()]
        out = nn.Conv2d(channels[-1], math.prod(self.out_shape[:-2]), 3, padding=1)
        self.layers = nn.Sequential(*layers, nn.Upsample(sizes[-1]), out)
