r"""Networks: plain functions of tensors that know no distribution.

A network is any ``nn.Module`` that maps ``(*leading, *in_shape)`` to ``(*leading, *out_shape)`` for *any number* of
leading dimensions, because particles arrive as ``(num_particles, batch, *in_shape)``. A conditional network is also
called with a context, ``network(x, context)``, of shape ``(*leading, context_dim)`` that broadcasts against x.

Parts (likelihoods, encoders) take either such a module or, more conveniently, a callable that builds one from
``(in_shape, out_shape)``: the part then works out the shapes. ``MLP`` itself is such a callable, and so is
``functools.partial(MLP, hidden=(512, 512))``.

The deep networks here start so that the second moment of what flows through them neither vanishes nor explodes
(weights of variance :math:`g^2 / n` for n inputs, with the gain g that makes up for the activation), and a residual
block starts close to the identity. Affine maps to the output start as torch starts them, below the input's scale.

References:
    Delving Deep into Rectifiers, K. He, X. Zhang, S. Ren and J. Sun, 2015, https://arxiv.org/abs/1502.01852.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pack_padded_sequence

__all__ = [
    "ConvNet",
    "DeconvNet",
    "GRUDecoder",
    "GRUEncoder",
    "GatedMLP",
    "LogInput",
    "MLP",
    "OneHotInput",
    "ResidualConvNet",
    "ResidualDeconvNet",
    "ResidualMLP",
    "set_output_bias",
]

Shape = int | tuple[int, ...]
Network = Callable[[Shape, Shape], nn.Module]


def as_shape(shape: Shape, name: str) -> tuple[int, ...]:
    """Returns a tuple for a shape given as an int or a sequence of ints, all of them positive."""
    result = (shape,) if isinstance(shape, Integral) else tuple(shape)
    if not result or not all(isinstance(n, Integral) and n > 0 for n in result):
        raise ValueError(f"{name} must be a positive int or a non-empty tuple of them, got {shape!r}.")
    return tuple(map(int, result))


def register(name: str, module: nn.Module) -> None:
    """Registers a module's parameters with Pyro, under a name that no other module has."""
    # What pyro.module does, without its warning at every call for each parameter that is frozen on purpose.
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            pyro.param(f"{name}$$${key}", parameter)


def build(network: Network, in_shape: Shape, out_shape: Shape, context_dim: int) -> nn.Module:
    """Returns `network` itself if it is a module already, else what it builds for these shapes."""
    if isinstance(network, nn.Module):
        return network
    if context_dim < 0:
        raise ValueError(f"context_dim must be 0 (no context) or the width of the context, got {context_dim}.")
    return network(in_shape, out_shape, **({"context_dim": context_dim} if context_dim else {}))


def apply(network: nn.Module, x: Tensor, context: Tensor | None, out_shape: tuple[int, ...], owner: str) -> Tensor:
    """Calls a network, with the context if there is one, and checks the shape of what it returns.

    What it returns in less than single precision (inside ``torch.autocast``) is cast, for densities are made of it.
    """
    out = network(x) if context is None else network(x, context)
    out = out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    if out.shape[out.dim() - len(out_shape) :] != out_shape:
        raise ValueError(
            f"{owner}: its network must return (..., {', '.join(map(str, out_shape))}), but returned "
            f"{tuple(out.shape)} for an input of shape {tuple(x.shape)}."
        )
    return out


def _check_shape(network: nn.Module, x: Tensor, in_shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{type(network).__name__} takes a tensor, got a {type(x).__name__}. Pick what it takes from a batch, as in "
            'fit(..., transform=lambda batch: batch["x"]).'
        )
    if x.dim() < len(in_shape) or x.shape[x.dim() - len(in_shape) :] != in_shape:
        raise ValueError(
            f"{type(network).__name__} takes inputs of shape (..., {', '.join(map(str, in_shape))}), got "
            f"{tuple(x.shape)}. Reshape the data, or build the network for that shape."
        )


def _check_input(network: nn.Module, x: Tensor, in_shape: tuple[int, ...]) -> None:
    _check_shape(network, x, in_shape)
    if not x.is_floating_point():
        raise TypeError(
            f"{type(network).__name__} takes floating-point inputs, got {x.dtype}. Convert numbers with .float(); give classes "
            "to a network that reads them, nn.OneHotInput."
        )


def _with_context(network: nn.Module, h: Tensor, context: Tensor | None, context_dim: int) -> Tensor:
    """Appends the context to features h of shape (*leading, features), broadcasting the leading dimensions."""
    if context_dim == 0:
        if context is not None:
            raise ValueError(
                f"{type(network).__name__} was built without a context but was given one of shape "
                f"{tuple(context.shape)}. Build it with context_dim={context.shape[-1] if context.dim() else 1}."
            )
        return h
    if context is None:
        raise ValueError(f"{type(network).__name__} was built with context_dim={context_dim} and needs a context.")
    if context.shape[-1:] != (context_dim,):
        raise ValueError(
            f"context must have shape (..., {context_dim}), got {tuple(context.shape)}. "
            "Encode labels as vectors, for example with torch.nn.functional.one_hot(labels, classes).float()."
        )
    try:
        leading = torch.broadcast_shapes(h.shape[:-1], context.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"context of shape {tuple(context.shape)} does not match inputs with leading dimensions "
            f"{tuple(h.shape[:-1])}: give one context a datum."
        ) from None
    return torch.cat([h.expand(*leading, -1), context.to(h.dtype).expand(*leading, -1)], dim=-1)


class _Shaped(nn.Module):
    """A network that knows its shapes."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], context_dim: int):
        super().__init__()
        self.in_shape, self.out_shape, self.context_dim = in_shape, out_shape, context_dim

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}{context}"

    def _flat(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Returns inputs and context as vectors."""
        _check_input(self, x, self.in_shape)
        return _with_context(self, x.flatten(x.dim() - len(self.in_shape)), context, self.context_dim)


class _Dense(_Shaped):
    """Inputs flattened, beside the context, through `layers`, to outputs of any shape."""

    layers: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(self._flat(x, context)).unflatten(-1, self.out_shape)


class _ImageEncoder(_Shaped):
    """Images, their channels flattened, through `layers` to vectors, and beside the context through `head`."""

    layers: nn.Module
    head: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(self, x, self.in_shape)
        leading, (height, width) = x.shape[: x.dim() - len(self.in_shape)], self.in_shape[-2:]
        h = self.layers(x.reshape(math.prod(leading), math.prod(self.in_shape[:-2]), height, width))
        h = _with_context(self, h.reshape(*leading, h.shape[-1]), context, self.context_dim)
        return self.head(h).unflatten(-1, self.out_shape)


class _ImageDecoder(_Shaped):
    """Inputs flattened, beside the context, through `foot` and `layers` to images."""

    foot: nn.Module
    layers: nn.Module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.foot(self._flat(x, context))
        leading = h.shape[:-1]
        return self.layers(h.reshape(math.prod(leading), h.shape[-1])).reshape(*leading, *self.out_shape)


class _Residual(nn.Sequential):
    """A residual block: what flows in, plus the branch of it that the layers make."""

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


_RELU = math.sqrt(2)  # the gain that makes up for the half of the second moment that a ReLU takes
_GATE = math.sqrt(3)  # a^2 E[sigmoid(a u)^2] = 1 for u ~ N(0, 1) at a = 1.73: what a gated linear unit needs
_BRANCH = 0.1  # the scale at which a residual branch starts; at 0 its inner layers would begin without a gradient


def _started(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Module:
    """Starts a layer so that its outputs have gain^2 times the second moment of its inputs; returns it."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    nn.init.zeros_(layer.bias)
    return layer


def _residual(
    layer: Callable[[], nn.Module], norm: Callable[[], nn.Module], activation: Callable[[], nn.Module]
) -> _Residual:
    return _Residual(
        *(norm(), activation(), _started(layer(), _RELU)), *(norm(), activation(), _started(layer(), _BRANCH * _RELU))
    )


def _group_norm(channels: int) -> nn.GroupNorm:
    # Groups of 16 channels (Wu and He, 2018), or of all where these are fewer or do not divide into such groups.
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


def _conv_blocks(channels: int, count: int, activation: Callable[[], nn.Module]) -> list[nn.Module]:
    conv, norm = partial(nn.Conv2d, channels, channels, 3, padding=1), partial(_group_norm, channels)
    return [_residual(conv, norm, activation) for _ in range(count)]


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
        widths = [math.prod(self.in_shape) + context_dim, *hidden]
        layers = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
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

    >>> GatedMLP((1, 8, 8), 10)(torch.zeros(5, 3, 1, 8, 8)).shape
    torch.Size([5, 3, 10])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, hidden: Sequence[int] = (300, 300), context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        widths = [math.prod(self.in_shape) + context_dim, *hidden]
        layers = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers += [_started(nn.Linear(n_in, 2 * n_out), _GATE), nn.GLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.out_shape)))


class ResidualMLP(_Dense):
    r"""A deep perceptron of pre-activation residual blocks with layer normalisation.

    .. math:: h_0 = W_0 [\mathrm{flatten}(x), c] + b_0, \quad h_{i} = h_{i-1} + f_i(h_{i-1}), \quad
        y = W\, a(h_L) + b

    with branches :math:`f(h) = W_2\, a(\mathrm{norm}(W_1\, a(\mathrm{norm}(h)) + b_1)) + b_2` that start at a tenth of
    unit scale, so that a network of any depth starts close to one hidden layer. Before the output there is no
    normalisation, unlike in He et al.: with it a VAE stays much longer where its decoder ignores the latents.

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
        layer, norm = partial(nn.Linear, width, width), partial(nn.LayerNorm, width)
        self.layers = nn.Sequential(
            _started(nn.Linear(math.prod(self.in_shape) + context_dim, width), 1.0),
            *(_residual(layer, norm, activation) for _ in range(num_blocks)),
            activation(),
            nn.Linear(width, math.prod(self.out_shape)),
        )


class ConvNet(_ImageEncoder):
    r"""Strided convolutions from an image to a vector: the usual encoder network.

    Each stage halves the image (kernel 3, stride 2, padding 1, so any size will do), and an affine map of the
    flattened features and the context gives the output.

    Args:
        in_shape: shape of one image, ``(..., height, width)``; the dimensions before the last two are channels.
        out_shape: shape of one output.
        channels: channels after each stage.
        activation: builds the activation after each stage.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `in_shape` is not an image's, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

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
        super().__init__(_image_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        widths = [math.prod(self.in_shape[:-2]), *channels]
        layers = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), activation()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * math.prod(_halved(self.in_shape[-2:], len(channels))[-1])
        self.head = nn.Linear(features + context_dim, math.prod(self.out_shape))


class DeconvNet(_ImageDecoder):
    r"""Transposed convolutions from a vector to an image: the usual decoder network, the mirror of :class:`ConvNet`.

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output, ``(..., height, width)``; the dimensions before the last two are channels.
        channels: channels before each stage; each stage doubles the image.
        activation: builds the activation before each stage.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `out_shape` is not an image's, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

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
        super().__init__(as_shape(in_shape, "in_shape"), _image_shape(out_shape, "out_shape"), context_dim)
        sizes = _halved(self.out_shape[-2:], len(channels))[::-1]
        widths = [*channels, math.prod(self.out_shape[:-2])]
        self.foot = nn.Linear(math.prod(self.in_shape) + context_dim, widths[0] * math.prod(sizes[0]))
        layers = [nn.Unflatten(-1, (widths[0], *sizes[0]))]
        for n_in, n_out, size, doubled in zip(widths, widths[1:], sizes, sizes[1:], strict=False):
            # A stage makes 2 n - 1 pixels from n; the padding makes it 2 n where the mirrored stage began with that.
            padding = tuple(b - (2 * a - 1) for a, b in zip(size, doubled, strict=True))
            layers += [activation(), nn.ConvTranspose2d(n_in, n_out, 3, 2, padding=1, output_padding=padding)]
        self.layers = nn.Sequential(*layers)


class ResidualConvNet(_ImageEncoder):
    r"""A residual convolutional network from an image to a vector: the deeper encoder network.

    Each stage halves the image with a strided convolution (kernel 3, stride 2, padding 1, so any size will do), then
    applies pre-activation residual blocks :math:`h + f(h)`, where f is twice group normalisation, activation and a
    convolution of kernel 3, and starts at a tenth of unit scale. Normalisation is within each datum: batch
    normalisation would make the output for one datum depend on the others, and on the number of particles.

    Args:
        in_shape: shape of one image, ``(..., height, width)``; the dimensions before the last two are channels.
        out_shape: shape of one output.
        channels: channels after each stage.
        blocks_per_stage: number of residual blocks in each stage.
        activation: builds the activation.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `in_shape` is not an image's, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Identity Mappings in Deep Residual Networks, K. He, X. Zhang, S. Ren and J. Sun, 2016,
        https://arxiv.org/abs/1603.05027.
        Group Normalization, Y. Wu and K. He, 2018, https://arxiv.org/abs/1803.08494.

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
        super().__init__(_image_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        widths = [math.prod(self.in_shape[:-2]), *channels]
        layers = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            down = _started(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), 1.0)
            layers += [down, *_conv_blocks(n_out, blocks_per_stage, activation)]
        self.layers = nn.Sequential(*layers, activation(), nn.Flatten())
        features = widths[-1] * math.prod(_halved(self.in_shape[-2:], len(channels))[-1])
        self.head = nn.Linear(features + context_dim, math.prod(self.out_shape))


class ResidualDeconvNet(_ImageDecoder):
    r"""A residual convolutional network from a vector to an image, the mirror of :class:`ResidualConvNet`.

    Each stage applies residual blocks, repeats pixels up to the mirrored stage's size (nearest neighbour) and
    convolves. A transposed convolution of stride 2 would reach some pixels through one tap of its kernel, others
    through two or four, and draw a checkerboard; after repetition all pixels are alike.

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output, ``(..., height, width)``; the dimensions before the last two are channels.
        channels: channels before each stage; each stage doubles the image.
        blocks_per_stage: number of residual blocks in each stage.
        activation: builds the activation.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `out_shape` is not an image's, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Deconvolution and Checkerboard Artifacts, A. Odena, V. Dumoulin and C. Olah, 2016,
        https://distill.pub/2016/deconv-checkerboard.

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
        super().__init__(as_shape(in_shape, "in_shape"), _image_shape(out_shape, "out_shape"), context_dim)
        sizes = _halved(self.out_shape[-2:], len(channels))[::-1]
        features = channels[0] * math.prod(sizes[0])
        self.foot = _started(nn.Linear(math.prod(self.in_shape) + context_dim, features), 1.0)
        layers = [nn.Unflatten(-1, (channels[0], *sizes[0]))]
        for n_in, n_out, size in zip(channels, channels[1:], sizes[1:], strict=False):
            up = _started(nn.Conv2d(n_in, n_out, 3, padding=1), 1.0)
            layers += [*_conv_blocks(n_in, blocks_per_stage, activation), nn.Upsample(size), up]
        layers += [*_conv_blocks(channels[-1], blocks_per_stage, activation), activation()]
        out = nn.Conv2d(channels[-1], math.prod(self.out_shape[:-2]), 3, padding=1)
        self.layers = nn.Sequential(*layers, nn.Upsample(sizes[-1]), out)


class GRUEncoder(_Shaped):
    r"""A bidirectional gated recurrent network from a sequence to a vector.

    .. math:: y = W [\overrightarrow{h}_{\mathrm{last}}, \overleftarrow{h}_{\mathrm{first}}, c] + b

    Sequences of different lengths come padded to one length and stacked with their mask, as shape
    ``(2, time, features)``: values first, then the mask, 1 where observed and 0 where not. The mask is then read
    beside the values, values that were not observed are read as zeros, and steps after the last one in which anything
    is observed are not read: more padding does not change the result. Of a sequence without any observation
    the first step is read.

    Args:
        in_shape: shape of one input: ``(time, features)``; or ``(2, time, features)``, a sequence and its mask.
        out_shape: shape of one output.
        width: units of the state of each direction.
        context_dim: width of the context vector, 0 for none; it enters the affine map to the output.

    Raises:
        ValueError: when `in_shape` is no sequence's, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder, K. Cho et al., 2014,
        https://arxiv.org/abs/1406.1078.
        Can Recurrent Neural Networks Warp Time?, C. Tallec and Y. Ollivier, 2018, https://arxiv.org/abs/1804.11188
        (the start of the update gates, which gives units memories of 1 to `time` steps).

    >>> GRUEncoder((50, 3), 8)(torch.zeros(7, 50, 3)).shape
    torch.Size([7, 8])
    >>> x, mask = torch.randn(7, 50, 3), torch.arange(50).unsqueeze(-1).lt(20).expand(7, 50, 3)
    >>> GRUEncoder((2, 50, 3), 8)(torch.stack([x, mask.float()], dim=1)).shape
    torch.Size([7, 8])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, width: int = 128, context_dim: int = 0):
        super().__init__(_sequence_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        if len(self.in_shape) != 2 and (len(self.in_shape) != 3 or self.in_shape[0] != 2):
            raise ValueError(
                f"in_shape must be (time, features), or (2, time, features) for a sequence stacked with its mask, got "
                f"{in_shape!r}."
            )
        time, features = self.in_shape[-2], math.prod(self.in_shape[:-2]) * self.in_shape[-1]
        self.gru = _started_gru(nn.GRU(features, width, batch_first=True, bidirectional=True), time)
        self.head = nn.Linear(2 * width + context_dim, math.prod(self.out_shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(self, x, self.in_shape)
        leading = x.shape[: x.dim() - len(self.in_shape)]
        x = x.reshape(math.prod(leading), *self.in_shape)
        if len(self.in_shape) == 3:
            observed = x[:, 1] != 0
            x = torch.cat([x[:, 0].where(observed, 0), x[:, 1]], dim=-1)
            if len(x):  # torch cannot pack an empty batch
                steps = torch.arange(1, self.in_shape[1] + 1, device=x.device)
                lengths = (steps * observed.any(-1)).amax(-1).clamp_min(1)
                x = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, h = self.gru(x)
        h = _with_context(self, h.transpose(0, 1).reshape(*leading, 2 * h.shape[-1]), context, self.context_dim)
        return self.head(h).unflatten(-1, self.out_shape)


class GRUDecoder(_Shaped):
    r"""A gated recurrent network from a vector to a sequence.

    .. math:: h_0 = \tanh(W_0 [z, c] + b_0), \quad h_t = \mathrm{GRU}([z, c], h_{t-1}), \quad y_t = W h_t + b

    It sees the latent alone, never earlier outputs, so that given z the steps are computed without the data and
    a likelihood may take them as independent.

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output, ``(..., time, features)``; the dimensions before the last two are parameters
            of each feature.
        width: units of the state.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `out_shape` is no sequence's, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder, K. Cho et al., 2014,
        https://arxiv.org/abs/1406.1078.
        Can Recurrent Neural Networks Warp Time?, C. Tallec and Y. Ollivier, 2018, https://arxiv.org/abs/1804.11188
        (the start of the update gates).

    >>> GRUDecoder(8, (50, 3))(torch.zeros(4, 7, 8)).shape
    torch.Size([4, 7, 50, 3])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, width: int = 128, context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), _sequence_shape(out_shape, "out_shape"), context_dim)
        time, features = self.out_shape[-2], math.prod(self.out_shape[:-2]) * self.out_shape[-1]
        self.foot = _started(nn.Linear(math.prod(self.in_shape) + context_dim, width), 1.0)
        self.gru = _started_gru(nn.GRU(self.foot.in_features, width, batch_first=True), time)
        self.head = nn.Linear(width, features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self._flat(x, context)
        leading = h.shape[:-1]
        h = h.reshape(math.prod(leading), h.shape[-1])
        states, _ = self.gru(h.unsqueeze(1).expand(-1, self.out_shape[-2], -1), self.foot(h).tanh().unsqueeze(0))
        out = self.head(states).unflatten(-1, (-1, self.out_shape[-1])).transpose(-3, -2)
        return out.reshape(*leading, *self.out_shape)


class OneHotInput(_Shaped):
    r"""Class numbers as one-hot vectors into another network: for integer data and for discrete latents.

    Without it a network would read class 3 as three times class 1.

    Args:
        in_shape: shape of one input, of integers from 0 to ``num_classes - 1`` (of an integer or floating-point type).
        out_shape: shape of one output.
        num_classes: number of classes.
        network: a module, or a callable that builds one from ``((*in_shape, num_classes), out_shape)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape, or an input is no class number.

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
        _check_shape(self, x, self.in_shape)
        classes = x.long()
        # Neither negation nor a comparison the other way round would refuse NaN.
        if not bool(((classes == x) & (classes >= 0) & (classes < self.num_classes)).all()):
            low, high = x.min().item(), x.max().item()
            raise ValueError(
                f"OneHotInput takes whole numbers from 0 to {self.num_classes - 1} (num_classes={self.num_classes}), "
                f"but its input ranges from {low:g} to {high:g}. Count classes from 0, or build it with more classes."
            )
        dtype = next((p.dtype for p in self.network.parameters()), torch.get_default_dtype())
        return apply(self.network, one_hot(classes, self.num_classes).to(dtype), context, self.out_shape, "OneHotInput")


class LogInput(_Shaped):
    r"""Numbers on a logarithmic scale into another network: for counts and powers, which may span decades.

    .. math:: y = \mathrm{network}(\mathrm{sign}(x) \log(1 + |x|))

    An encoder of raw counts is ruled by the few that are large.

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
        _check_input(self, x, self.in_shape)
        return apply(self.network, x.sign() * x.abs().log1p(), context, self.out_shape, "LogInput")


@torch.no_grad()
def set_output_bias(network: nn.Module, value: Tensor) -> None:
    r"""Sets the bias of a network's last layer, so that its output starts at a value plus what the input adds.

    A decoder that starts at the average datum (on its own scale: logits, logarithms) need not learn it first.

    Args:
        network: a network of this module, or an ``nn.Sequential`` that ends in an affine map or a convolution (layers
            that only reshape may follow it).
        value: shape of one output of the network. A convolution has one bias for all pixels of a channel, a recurrent
            decoder one for all steps: they get the mean.

    Raises:
        ValueError: when the network does not end in a layer with a bias, or `value` is not finite or not of its shape.

    >>> network = MLP(2, (1, 2), hidden=())
    >>> set_output_bias(network, torch.tensor([[3.0, 4.0]]))
    >>> network(torch.zeros(2))
    tensor([[3., 4.]], grad_fn=<ViewBackward0>)
    """
    if isinstance(network, OneHotInput):
        return set_output_bias(network.network, value)
    name, layer = type(network).__name__, _last_layer(network)
    if getattr(layer, "bias", None) is None:
        raise ValueError(
            f"{name} does not end in a layer with a bias that could be set. Use a network of pyrovae.nn, or an "
            "nn.Sequential that ends in an nn.Linear or a convolution with bias=True; or start its output yourself."
        )
    if not bool(value.isfinite().all()):
        raise ValueError("value holds NaN or infinity, where no output can start. Bound it, for example with .clamp().")
    # The dimensions of one output over which a bias is shared.
    shared = (-2,) if isinstance(network, GRUDecoder) else tuple(range(-len(getattr(layer, "kernel_size", ())), 0))
    fits = value.shape == getattr(network, "out_shape", value.shape) and value.dim() > len(shared)
    bias = value.to(layer.bias).unsqueeze(0).mean((0, *shared)) if fits else value
    if not fits or bias.numel() != layer.bias.numel():
        raise ValueError(
            f"value must have the shape of one output of {name}, whose last layer has {layer.bias.numel()} biases, got "
            f"{tuple(value.shape)}."
        )
    layer.bias.copy_(bias.reshape(layer.bias.shape))


def _last_layer(network: nn.Module) -> nn.Module | None:
    """Returns the affine map or convolution that makes a network's output, None if none can be told."""
    if isinstance(network, (nn.Linear, nn.modules.conv._ConvNd)):
        return network
    if isinstance(network, _Shaped | nn.Sequential):  # their last child, which is not so of any module
        children = [child for child in network.children() if not isinstance(child, nn.Flatten | nn.Unflatten)]
        return _last_layer(children[-1]) if children else None
    return None


def _image_shape(shape: Shape, name: str) -> tuple[int, ...]:
    result = as_shape(shape, name)
    if len(result) < 3:
        raise ValueError(f"{name} must be an image's, (channels, height, width), got {shape!r}. Use MLP for vectors.")
    return result


def _halved(size: tuple[int, ...], times: int) -> list[tuple[int, ...]]:
    """Returns the sizes of an image before and after each stage of stride 2."""
    sizes = [tuple(size)]
    for _ in range(times):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes


def _sequence_shape(shape: Shape, name: str) -> tuple[int, ...]:
    result = as_shape(shape, name)
    if len(result) < 2:
        raise ValueError(f"{name} must be a sequence's, (time, features), got {shape!r}. Use MLP for vectors.")
    return result


@torch.no_grad()
def _started_gru(gru: nn.GRU, time: int) -> nn.GRU:
    """Starts inputs at unit gain, recurrences as rotations, and the memories of units between 1 and `time` steps.

    torch starts all weights by the width of the state alone, which makes few features faint, and all memories at two
    steps, through which no gradient comes from the far end of a long sequence.
    """
    for name, parameter in gru.named_parameters():
        for gate, chunk in zip("run", parameter.chunk(3), strict=True):  # reset, update, new: the order in nn.GRU
            if name.startswith("weight_ih"):
                nn.init.normal_(chunk, std=1 / math.sqrt(chunk.shape[1]))
            elif name.startswith("weight_hh"):
                nn.init.orthogonal_(chunk)
            elif name.startswith("bias_ih") and gate == "u":
                # A gate of sigmoid(log u) = u / (1 + u) keeps its state for some 1 + u steps.
                chunk.uniform_(1, max(time - 1, 1)).log_()
            else:
                nn.init.zeros_(chunk)
    return gru
