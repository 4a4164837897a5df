"""Masked convolutions: a decoder of images that sees a latent and the pixels above and to the left."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyrovae.nn.autoregressive import SequenceDecoder
from pyrovae.nn.base import Network, Shape, build, check_count, start_layer
from pyrovae.nn.images import DeconvNet


def _gate(h: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    return a.tanh() * b.sigmoid()


class _Layer(nn.Module):
    """A layer of both stacks. Channels are last; the inputs have the rows above, or the pixels to the left, in front.

    Args:
        width: number of channels.
        kernel_size: side of the square kernel, in pixels, before a half of it is masked.
        depth: number of layers of the network.
    """

    def __init__(self, width: int, kernel_size: int, depth: int):
        super().__init__()
        self.side = kernel_size // 2
        self.down = start_layer(nn.Conv2d(width, 2 * width, (self.side + 1, kernel_size)), 1.0)
        self.across = start_layer(nn.Linear((self.side + 1) * width, 2 * width), 1.0)
        self.link = start_layer(nn.Linear(width, 2 * width), 1.0)
        self.latent = start_layer(nn.Linear(width, 4 * width), 1.0)
        # Gates make features about a third as large; what all layers add has about the size of what they start with.
        gain = 3 / math.sqrt(depth)
        self.outward = nn.ModuleList(start_layer(nn.Linear(width, width), gain) for _ in range(2))

    def from_above(self, rows: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features of rows, and what these give to the pixels in the rows.

        Args:
            rows: ``(N, side + R, W, width)``, with `side` rows above the R rows.
            latent: features of the latent, ``(N, R, W, 4 * width)``.
        """
        a, b = latent.chunk(2, dim=-1)
        h = self.down(pad(rows, (0, 0, self.side, self.side)).movedim(-1, 1)).movedim(1, -1)
        v = rows[:, self.side :] + self.outward[0](_gate(h + a))
        return v, self.link(v) + b

    def from_left(self, pixels: Tensor, above: Tensor) -> Tensor:
        """Returns features ``(N, R, C, width)`` of pixels ``(N, R, side + C, width)`` and of what rows above gave."""
        count = above.shape[2]
        seen = torch.cat([pixels[:, :, i : i + count] for i in range(self.side + 1)], dim=-1)
        return pixels[:, :, self.side :] + self.outward[1](_gate(self.across(seen) + above))


class _Drawing(NamedTuple):
    latents: tuple[Tensor, ...]  # features of the latent for each layer, (N, H, W, 4 * width)
    place: int  # number of pixels before
    row: tuple[Tensor, ...]  # vectors of the pixels of this row, (N, width) each
    above: tuple[Tensor, ...]  # inputs of each layer in the rows above, (N, side, W, width)
    given: tuple[Tensor, ...]  # what the rows above gave to this row in each layer, (N, 1, W, 2 * width)
    left: tuple[Tensor, ...]  # inputs of each layer to the left, (N, 1, side, width)


class GatedPixelCNN(SequenceDecoder):
    r"""Gated masked convolutions that read the latent and the pixels above and to the left.

    .. math:: v \leftarrow v + A\, g(K_v * v + U_v m), \qquad
        h \leftarrow h + B\, g(K_h * h + L v + U_h m), \qquad g([a, b]) = \tanh a \odot \sigma(b)

    m is a map of features that a network makes of the latent and the context, as large as the image. The vertical stack
    v starts with the row above each pixel and sees all of the rows above, to the right too. The horizontal stack h
    starts with the pixel to the left, and sees v and the pixels to the left. The features of a pixel are h.

    In draws, a row of v is computed when the row begins, and a pixel of h when its turn comes, from what the layers saw
    before. An image then needs as many operations as one pass, in many small steps.

    A network that sees far can do without the latent ("posterior collapse"). Few layers and a small kernel, of which a
    pixel sees no more than `num_layers` halves to each side, leave the rest to the latent.

    Args:
        in_shape: shape of one latent, flattened inside.
        x_shape: shape of one image, ``(*channels, height, width)``.
        num_classes: number of classes, for pixels of class numbers, which are embedded; None for other numbers.
        width: number of channels of the layers, and width of the features.
        num_layers: number of layers.
        kernel_size: side of the square kernel, in pixels, before a half of it is masked; odd.
        network: a module, or a callable that builds one, from the latent to the map m, ``(width, height, width of x)``.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape, `x_shape` is not that of an image, a number
            is too small, or `kernel_size` is even.

    References:
        Conditional Image Generation with PixelCNN Decoders, A. van den Oord et al., 2016,
        https://arxiv.org/abs/1606.05328.
        PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications,
        T. Salimans, A. Karpathy, X. Chen and D. P. Kingma, 2017, https://arxiv.org/abs/1701.05517 (stacks that start
        with shifted images, and add to what they are given).

    >>> decoder = GatedPixelCNN(8, (1, 7, 5))
    >>> decoder(torch.zeros(4, 8), x=torch.zeros(4, 1, 7, 5)).shape  # features of each pixel
    torch.Size([4, 35, 32])
    """

    def __init__(
        self,
        in_shape: Shape,
        x_shape: Shape,
        num_classes: int | None = None,
        width: int = 32,
        num_layers: int = 4,
        kernel_size: int = 5,
        network: Network = DeconvNet,
        context_dim: int = 0,
    ):
        if check_count(kernel_size, "kernel_size") % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        super().__init__(in_shape, x_shape, width, width, num_classes, context_dim, image=True)
        self.size = self.x_shape[-2:]
        self.network = build(network, self.condition_width, (width, *self.size), 0)
        depth = check_count(num_layers, "num_layers")
        layers = nn.ModuleList(_Layer(width, kernel_size, depth) for _ in range(depth))
        self.layers: Sequence[_Layer] = layers  # type: ignore[assignment]
        self.side = kernel_size // 2

    def features(self, condition: Tensor, previous: Tensor) -> Tensor:
        (height, row), blank = self.size, self.blank.view(1, 1, 1, -1)
        h = previous.unflatten(1, self.size)
        pixels = previous[:, 1 : (height - 1) * row + 1].unflatten(1, (height - 1, row))  # of all rows but the last
        v = torch.cat([blank.expand(len(h), 1, row, -1), pixels], dim=1)
        h = torch.cat([blank.expand(len(h), height, 1, -1), h[:, :, 1:]], dim=2)  # the last of a row is not to the left
        for layer, latent in zip(self.layers, self._latents(condition), strict=True):
            v, given = layer.from_above(pad(v, (0, 0, 0, 0, self.side, 0)), latent)
            h = layer.from_left(pad(h, (0, 0, self.side, 0)), given)
        return h.flatten(1, 2)

    def start(self, condition: Tensor) -> _Drawing:
        nothing = condition.new_zeros(len(condition), self.side, self.size[1], self.blank.shape[0])
        return _Drawing(self._latents(condition), 0, (), (nothing,) * len(self.layers), (), ())

    def step(self, state: _Drawing, previous: Tensor) -> tuple[Tensor, _Drawing]:
        y, x = divmod(state.place, self.size[1])
        blank = self.blank.expand(len(state.latents[0]), -1)
        if x == 0:
            before = torch.stack((*state.row, previous) if y else (blank,) * self.size[1], dim=1)
            state = self._begin_row(state, before.unsqueeze(1), y)
            h = blank
        else:
            state = state._replace(row=(*state.row, previous))
            h = previous
        h, left = h.unflatten(0, (-1, 1, 1)), []
        for layer, given, before in zip(self.layers, state.given, state.left, strict=True):
            seen = torch.cat([before, h], dim=2)
            left.append(seen[:, :, 1:])
            h = layer.from_left(seen, given[:, :, x : x + 1])
        return h.flatten(1), state._replace(place=state.place + 1, left=tuple(left))

    def _begin_row(self, state: _Drawing, v: Tensor, y: int) -> _Drawing:
        """Returns the state with what the rows above give to row y; v holds the vectors of the row just above."""
        above, given = [], []
        for layer, latent, before in zip(self.layers, state.latents, state.above, strict=True):
            seen = torch.cat([before, v], dim=1)
            above.append(seen[:, 1:])
            v, gift = layer.from_above(seen, latent[:, y : y + 1])
            given.append(gift)
        left = (v.new_zeros(len(v), 1, self.side, v.shape[-1]),) * len(self.layers)
        return state._replace(row=(), above=tuple(above), given=tuple(given), left=left)

    def _latents(self, condition: Tensor) -> tuple[Tensor, ...]:
        h = self.network(condition).movedim(1, -1)
        return tuple(layer.latent(h) for layer in self.layers)
