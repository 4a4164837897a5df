r"""Networks: plain functions of tensors that know no distribution.

A network is any ``nn.Module`` that maps ``(*leading, *in_shape)`` to ``(*leading, *out_shape)`` for *any number* of
leading dimensions, because particles arrive as ``(num_particles, batch, *in_shape)``. A conditional network is also
called with a context, ``network(x, context)``, of shape ``(*leading, context_dim)`` that broadcasts against x.

Parts (likelihoods, encoders) take either such a module or, more conveniently, a callable that builds one from
``(in_shape, out_shape)``: the part then works out the shapes. ``MLP`` itself is such a callable, and so is
``functools.partial(MLP, hidden=(512, 512))``.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["MLP", "ConvNet", "DeconvNet"]

Shape = int | tuple[int, ...]
Network = Callable[[Shape, Shape], nn.Module]


def as_shape(shape: Shape, name: str) -> tuple[int, ...]:
    """Returns a tuple for a shape given as an int or a sequence of ints, all of them positive."""
    result = (shape,) if isinstance(shape, int) else tuple(shape)
    if not result or not all(isinstance(n, int) and n > 0 for n in result):
        raise ValueError(f"{name} must be a positive int or a non-empty tuple of them, got {shape!r}.")
    return result


def build(network: Network, in_shape: Shape, out_shape: Shape, context_dim: int) -> nn.Module:
    """Returns `network` itself if it is a module already, else what it builds for these shapes."""
    if isinstance(network, nn.Module):
        return network
    if context_dim < 0:
        raise ValueError(f"context_dim must be 0 (no context) or the width of the context, got {context_dim}.")
    return network(in_shape, out_shape, **({"context_dim": context_dim} if context_dim else {}))


def apply(network: nn.Module, x: Tensor, context: Tensor | None, out_shape: tuple[int, ...], owner: str) -> Tensor:
    """Calls a network, with the context if there is one, and checks the shape of what it returns."""
    out = network(x) if context is None else network(x, context)
    if out.shape[out.dim() - len(out_shape) :] != out_shape:
        raise ValueError(
            f"{owner}: its network must return (..., {', '.join(map(str, out_shape))}), but returned "
            f"{tuple(out.shape)} for an input of shape {tuple(x.shape)}."
        )
    return out


def _check_input(network: nn.Module, x: Tensor, in_shape: tuple[int, ...]) -> None:
    if x.dim() < len(in_shape) or x.shape[x.dim() - len(in_shape) :] != in_shape:
        raise ValueError(
            f"{type(network).__name__} takes inputs of shape (..., {', '.join(map(str, in_shape))}), got "
            f"{tuple(x.shape)}. Reshape the data, or build the network for that shape."
        )
    if not x.is_floating_point():
        raise TypeError(f"{type(network).__name__} takes floating-point inputs, got {x.dtype}. Convert with .float().")


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


class MLP(nn.Module):
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
        super().__init__()
        self.in_shape, self.out_shape = as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape")
        self.context_dim = context_dim
        widths = [math.prod(self.in_shape) + context_dim, *hidden]
        layers = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.out_shape)))

    def extra_repr(self) -> str:
        return _describe(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(self, x, self.in_shape)
        h = _with_context(self, x.flatten(x.dim() - len(self.in_shape)), context, self.context_dim)
        return self.layers(h).unflatten(-1, self.out_shape)


class ConvNet(nn.Module):
    r"""Strided convolutions from an image to a vector: the usual encoder network.

    Each stage halves the image (kernel 3, stride 2, padding 1, so any size will do), and an affine map of the
    flattened features and the context gives the output.

    Args:
        in_shape: shape of one image, ``(channels, height, width)``.
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
        super().__init__()
        self.in_shape, self.out_shape = _image_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape")
        self.context_dim = context_dim
        widths = [self.in_shape[0], *channels]
        layers = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), activation()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        height, width = _halved(self.in_shape[1:], len(channels))[-1]
        self.features = widths[-1] * height * width
        self.head = nn.Linear(self.features + context_dim, math.prod(self.out_shape))

    def extra_repr(self) -> str:
        return _describe(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(self, x, self.in_shape)
        leading = x.shape[:-3]
        h = self.layers(x.reshape(math.prod(leading), *self.in_shape)).reshape(*leading, self.features)
        return self.head(_with_context(self, h, context, self.context_dim)).unflatten(-1, self.out_shape)


class DeconvNet(nn.Module):
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
        super().__init__()
        self.in_shape, self.out_shape = as_shape(in_shape, "in_shape"), _image_shape(out_shape, "out_shape")
        self.context_dim = context_dim
        sizes = _halved(self.out_shape[-2:], len(channels))[::-1]
        widths = [*channels, math.prod(self.out_shape[:-2])]
        self.foot = nn.Linear(math.prod(self.in_shape) + context_dim, widths[0] * math.prod(sizes[0]))
        layers = [nn.Unflatten(-1, (widths[0], *sizes[0]))]
        for n_in, n_out, size, doubled in zip(widths, widths[1:], sizes, sizes[1:], strict=False):
            # A stage makes 2 n - 1 pixels from n; the padding makes it 2 n where the mirrored stage began with that.
            padding = tuple(b - (2 * a - 1) for a, b in zip(size, doubled, strict=True))
            layers += [activation(), nn.ConvTranspose2d(n_in, n_out, 3, 2, padding=1, output_padding=padding)]
        self.layers = nn.Sequential(*layers)

    def extra_repr(self) -> str:
        return _describe(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_input(self, x, self.in_shape)
        h = self.foot(_with_context(self, x.flatten(x.dim() - len(self.in_shape)), context, self.context_dim))
        leading = h.shape[:-1]
        return self.layers(h.reshape(math.prod(leading), h.shape[-1])).reshape(*leading, *self.out_shape)


def _describe(network: nn.Module) -> str:
    context = f", context_dim={network.context_dim}" if network.context_dim else ""
    return f"in_shape={network.in_shape}, out_shape={network.out_shape}{context}"


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
