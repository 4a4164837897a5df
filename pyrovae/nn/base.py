"""What networks have in common: shapes, contexts, and how parts build and call them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import TypeVar

import pyro
import torch
from torch import Tensor, nn

from pyrovae.recorded import Recorded

Shape = int | tuple[int, ...]
Network = Callable[[Shape, Shape], nn.Module]

_Layer = TypeVar("_Layer", bound=nn.Linear | nn.Conv2d)


def as_shape(shape: Shape, name: str) -> tuple[int, ...]:
    """Returns a shape, given as a positive int or a sequence of them, as a tuple.

    Args:
        shape: the shape.
        name: name of the argument, for the message.

    Raises:
        ValueError: when the shape is empty or holds something other than positive ints.

    >>> as_shape(64, "x_shape")
    (64,)
    """
    result = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not result or not all(isinstance(n, Integral) and n > 0 for n in result):
        raise ValueError(f"{name} must be a positive int or a non-empty tuple of them, got {shape!r}.")
    return tuple(map(int, result))


def image_shape(shape: Shape, name: str) -> tuple[int, ...]:
    """Returns the shape of an image, ``(*channels, height, width)``, with at least one dimension of channels."""
    result = as_shape(shape, name)
    if len(result) < 3:
        raise ValueError(
            f"{name} must be the shape of an image, (channels, height, width), got {shape!r}. Use MLP for vectors."
        )
    return result


def check_count(value: int, name: str, least: int = 1) -> int:
    """Returns a number of units, blocks or dimensions as an int.

    Args:
        value: the number.
        name: name of the argument, for the message.
        least: the smallest that it may be.

    Raises:
        ValueError: when it is no whole number, or too small.

    >>> check_count(3, "width")
    3
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return int(value)


def check_counts(values: Iterable[int], name: str) -> tuple[int, ...]:
    """Returns a sequence of numbers of units as ints; see :func:`check_count`."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of whole numbers, got {values!r}.")
    return tuple(check_count(value, f"each of {name}") for value in values)


def register(name: str, module: nn.Module) -> None:
    """Registers the parameters of a module with Pyro, under a name that no other module may have."""
    # As pyro.module, but without a warning at every call for each parameter that is frozen on purpose.
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            pyro.param(f"{name}$$${key}", parameter)


def build(network: Network, in_shape: Shape, out_shape: Shape, context_dim: int) -> nn.Module:
    """Returns `network` if it is a module, else the module that it builds.

    Args:
        network: a module, or a callable that builds one from ``(in_shape, out_shape)``, with a keyword `context_dim` if
            there is a context.
        in_shape: shape of one input.
        out_shape: shape of one output.
        context_dim: width of the context vector, 0 for none.
    """
    if isinstance(network, nn.Module):
        return network
    if context_dim < 0:
        raise ValueError(f"context_dim must be 0 (no context) or the width of the context, got {context_dim}.")
    return network(in_shape, out_shape, **({"context_dim": context_dim} if context_dim else {}))


def apply(network: nn.Module, x: Tensor, context: Tensor | None, out_shape: tuple[int, ...], owner: str) -> Tensor:
    """Calls a network, with the context if there is one, and checks the shape of its output.

    Outputs in half precision (inside ``torch.autocast``) are cast to single precision, which densities need.

    Args:
        network: the network.
        x: its input, ``(*leading, *in_shape)``.
        context: shape ``(*leading, context_dim)``, or None.
        out_shape: the shape that one output must have.
        owner: name of the part that calls it, for the message.
    """
    out = network(x) if context is None else network(x, context)
    out = out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    if out.shape[out.dim() - len(out_shape) :] != out_shape:
        raise ValueError(
            f"{owner}: its network must return (..., {', '.join(map(str, out_shape))}), but returned "
            f"{tuple(out.shape)} for an input of shape {tuple(x.shape)}."
        )
    return out


class ShapedNetwork(Recorded, ABC):
    """Base of the networks here: it knows its shapes, and checks inputs and contexts.

    Args:
        in_shape: shape of one input.
        out_shape: shape of one output.
        context_dim: width of the context vector, 0 for none.
    """

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], context_dim: int):
        super().__init__()
        self.in_shape, self.out_shape = in_shape, out_shape
        self.context_dim = check_count(context_dim, "context_dim", 0)

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns outputs, ``(*leading, *out_shape)``, for inputs ``(*leading, *in_shape)``."""

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}{context}"

    def check_input(self, x: Tensor, floating: bool = True) -> None:
        """Raises an error unless x is a tensor of shape ``(*leading, *in_shape)``, by default a floating-point one."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__} takes a tensor, got a {type(x).__name__}. Select it from a batch, as in "
                'fit(..., transform=lambda batch: batch["x"]).'
            )
        if x.dim() < len(self.in_shape) or x.shape[x.dim() - len(self.in_shape) :] != self.in_shape:
            raise ValueError(
                f"{type(self).__name__} takes inputs of shape (..., {', '.join(map(str, self.in_shape))}), got "
                f"{tuple(x.shape)}. Reshape the data, or build the network for that shape."
            )
        if floating and not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} takes floating-point inputs, got {x.dtype}. Convert numbers with .float(); for "
                "class numbers use nn.OneHotInput."
            )

    def append_context(self, h: Tensor, context: Tensor | None) -> Tensor:
        """Appends the context to features h of shape ``(*leading, features)``, broadcasting the leading dimensions."""
        if self.context_dim == 0:
            if context is not None:
                raise ValueError(
                    f"{type(self).__name__} was built without a context but was given one of shape "
                    f"{tuple(context.shape)}. Build it with context_dim={context.shape[-1] if context.dim() else 1}."
                )
            return h
        return torch.cat(self.match_context(h, context), dim=-1)

    def match_context(self, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns features h, ``(*leading, features)``, and the context, with leading dimensions that both have."""
        if context is None:
            raise ValueError(
                f"{type(self).__name__} was built with context_dim={self.context_dim} and needs a context. Give one "
                "vector a datum."
            )
        if context.shape[-1:] != (self.context_dim,):
            raise ValueError(
                f"context must have shape (..., {self.context_dim}), got {tuple(context.shape)}. "
                "Encode labels as vectors, for example with torch.nn.functional.one_hot(labels, classes).float()."
            )
        try:
            leading = torch.broadcast_shapes(h.shape[:-1], context.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"context of shape {tuple(context.shape)} does not match inputs with leading dimensions "
                f"{tuple(h.shape[:-1])}: give one context a datum."
            ) from None
        return h.expand(*leading, -1), context.to(h.dtype).expand(*leading, -1)

    def flatten_input(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Returns inputs as vectors, with the context appended."""
        self.check_input(x)
        return self.append_context(x.flatten(x.dim() - len(self.in_shape)), context)


def start_layer(layer: _Layer, gain: float) -> _Layer:
    r"""Initialises a layer so that the second moment of its outputs is :math:`g^2` times that of its inputs.

    .. math:: W_{ij} \sim \mathcal{N}(0, g^2 / n), \qquad b_i = 0

    Args:
        layer: a layer with n inputs to each output.
        gain: :math:`g`.

    Returns:
        The layer.
    """
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
