"""Networks that read a sequence step by step: decoders that see a latent and the steps before, encoders of classes."""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pyrovae.nn.base import Shape, ShapedNetwork, as_shape, check_count, image_shape, start_layer
from pyrovae.nn.sequences import start_recurrence


class StepInput(nn.Module):
    """Vectors of the steps of a sequence: embeddings of classes, an affine map of other numbers.

    The elements of a step that are classes have an embedding each, and these are summed. A number that is no class is
    not looked up in silence: the vector of its step is NaN, and a number beyond the last class raises an IndexError.

    Args:
        step_shape: shape of one step.
        width: width of the vectors.
        num_classes: number of classes; None for steps of other numbers.
    """

    def __init__(self, step_shape: tuple[int, ...], width: int, num_classes: int | None):
        super().__init__()
        self.size, self.num_classes = math.prod(step_shape), num_classes
        self.layer: nn.Module
        if num_classes is None:
            self.layer = start_layer(nn.Linear(self.size, width), 1.0)
        else:
            self.layer = nn.Embedding(self.size * check_count(num_classes, "num_classes", 2), width)
            nn.init.normal_(self.layer.weight, std=1 / math.sqrt(self.size))  # vectors of unit size

    def forward(self, x: Tensor) -> Tensor:
        """Returns vectors ``(*leading, width)`` of steps ``(*leading, size)``."""
        if self.num_classes is None:
            return self.layer(x)
        classes = x.long()
        h = self.layer(classes + self.num_classes * torch.arange(self.size, device=x.device)).sum(-2)
        return torch.where((classes == x).all(-1, keepdim=True), h, math.nan) if x.is_floating_point() else h


class SequenceDecoder(ShapedNetwork):
    r"""Base of the networks of :class:`pyrovae.likelihoods.Autoregressive`, and how to write one.

    .. math:: h_t = f_t(z, c, x_1, \dots, x_{t-1})

    A subclass defines :meth:`features`, :meth:`start` and :meth:`step`, which say the same in one pass and step by
    step. A learned vector, `blank`, is read in place of the step before the first one, and of each step that is
    left out.

    Args:
        in_shape: shape of one latent, flattened inside.
        x_shape: shape of one sequence, ``(time, *step)``, or ``(time,)`` for a number a step.
        width: width of the features of a step; the outputs have the shape ``(time, width)``.
        embedding_width: width of the vectors of steps that are read.
        num_classes: number of classes, for steps of class numbers; None for other numbers.
        context_dim: width of the context vector, 0 for none.
        image: whether x is an image, ``(*channels, height, width)``, whose steps are the pixels, row by row.
    """

    def __init__(
        self,
        in_shape: Shape,
        x_shape: Shape,
        width: int,
        embedding_width: int,
        num_classes: int | None,
        context_dim: int,
        image: bool = False,
    ):
        self_shape = as_shape(in_shape, "in_shape")
        x_shape = image_shape(x_shape, "x_shape") if image else as_shape(x_shape, "x_shape")
        num_steps = math.prod(x_shape[-2:]) if image else x_shape[0]
        super().__init__(self_shape, (num_steps, check_count(width, "width")), context_dim)
        self.x_shape, self.num_classes, self.image = x_shape, num_classes, image
        self.step_shape = x_shape[:-2] if image else x_shape[1:] or (1,)
        self.condition_width = math.prod(self_shape) + context_dim
        self.embedding = StepInput(self.step_shape, check_count(embedding_width, "embedding_width"), num_classes)
        self.blank = nn.Parameter(torch.randn(embedding_width) / 10)

    def steps_of(self, x: Tensor) -> Tensor:
        """Returns the steps of data ``(*leading, *x_shape)`` in the order in which they are read.

        Returns:
            Shape ``(*leading, num_steps, *step_shape)``.
        """
        if not self.image:
            return x.unsqueeze(-1) if len(self.x_shape) == 1 else x
        return x.flatten(-2).movedim(-1, -len(self.x_shape) + 1)

    def data_of(self, steps: Tensor) -> Tensor:
        """Returns the data whose steps, ``(*leading, num_steps, *step_shape)``, these are."""
        if not self.image:
            return steps.squeeze(-1) if len(self.x_shape) == 1 else steps
        return steps.movedim(-len(self.x_shape) + 1, -1).unflatten(-1, self.x_shape[-2:])

    def condition(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns z and the context as one vector, ``(*leading, condition_width)``."""
        return self.flatten_input(z, context)

    def forward(  # type: ignore[override]  # its input is a latent
        self, z: Tensor, context: Tensor | None = None, x: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """Returns the features of all steps, ``(*leading, time, width)``; those of a step depend on earlier x alone.

        Args:
            z: the latents, ``(*leading, *in_shape)``.
            context: shape ``(*leading, context_dim)``, or None.
            x: the sequences, ``(*leading, *x_shape)``; None to read none of their steps.
            read: which steps are read, boolean, ``(*leading, time)``; None for all.
        """
        return self.score(self.condition(z, context), x, read)

    def score(self, condition: Tensor, x: Tensor | None, read: Tensor | None = None) -> Tensor:
        """Returns what :meth:`forward` does, of the vectors that :meth:`condition` returns."""
        time, leading = self.out_shape[0], condition.shape[:-1]
        if x is not None:
            leading = torch.broadcast_shapes(leading, x.shape[: x.dim() - len(self.x_shape)])
            x = self.steps_of(x.expand(*leading, *self.x_shape))
            x = x.reshape(math.prod(leading), time, self.embedding.size)
        condition = condition.expand(*leading, condition.shape[-1]).reshape(math.prod(leading), condition.shape[-1])
        first = self.blank.expand(len(condition), 1, -1)
        if x is None:
            previous = first.expand(-1, time, -1)
        else:
            before = self.embedding(x[:, :-1])
            if read is not None:
                kept = read.expand(*leading, time).reshape(len(x), time)[:, :-1].unsqueeze(-1)
                before = torch.where(kept, before, self.blank)
            previous = torch.cat([first, before], dim=1)
        return self.features(condition, previous).reshape(*leading, *self.out_shape)

    def next_features(self, state: Any, x: Tensor | None) -> tuple[Tensor, Any]:
        """Returns the features of the next step and the state after it.

        Args:
            state: the state of :meth:`start`, of N conditions, or the one returned before.
            x: the step before, ``(N, *step)``; None for the first.
        """
        if x is None:
            return self.step(state, self.blank)
        return self.step(state, self.embedding(x.reshape(len(x), self.embedding.size)))

    @abstractmethod
    def features(self, condition: Tensor, previous: Tensor) -> Tensor:
        """Returns features ``(N, time, width)`` of conditions and of the vectors of the step before each step."""

    @abstractmethod
    def start(self, condition: Tensor) -> Any:
        """Returns the state before the first step, given conditions ``(N, condition_width)``."""

    @abstractmethod
    def step(self, state: Any, previous: Tensor) -> tuple[Tensor, Any]:
        """Returns features ``(N, width)`` of the next step and the state after it, given the vector before it."""


class _Recurrence(NamedTuple):
    condition: Tensor
    layers: tuple[tuple[Tensor, ...], ...]  # h, or h and c, of each layer


class RecurrentDecoder(SequenceDecoder):
    r"""A gated recurrent decoder that reads the latent and the steps before.

    .. math:: s_0 = \tanh(W_0 [z, c] + b_0), \quad s_t = \mathrm{GRU}([x_{t-1}, z, c], s_{t-1}), \quad h_t = s_t

    With several layers, a layer reads the features h of the layer below. With `skip`,
    :math:`h_t = \tanh(A s_t + B [z, c] + b)` at each layer, so that no step and no layer can do without the latent.

    Args:
        in_shape: shape of one latent, flattened inside.
        x_shape: shape of one sequence, ``(time, *step)``, or ``(time,)`` for a number a step.
        num_classes: number of classes, for steps of class numbers, which are embedded; None for other numbers.
        width: units of the state of a layer.
        embedding_width: width of the vectors of steps that are read.
        num_layers: number of layers.
        cell: ``nn.GRU`` or ``nn.LSTM``.
        skip: whether each layer has a skip connection from the latent.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape, or a number is too small.
        TypeError: when `cell` is another class.

    References:
        Generating Sentences from a Continuous Space, S. R. Bowman et al., 2016, https://arxiv.org/abs/1511.06349.
        Avoiding Latent Variable Collapse with Generative Skip Models, A. B. Dieng, Y. Kim, A. M. Rush and D. M. Blei,
        2019, https://arxiv.org/abs/1807.04863 (the skip connections).

    >>> decoder = RecurrentDecoder(8, (20,), num_classes=30)
    >>> decoder(torch.zeros(5, 8), x=torch.zeros(5, 20)).shape  # features of each step
    torch.Size([5, 20, 256])
    """

    def __init__(
        self,
        in_shape: Shape,
        x_shape: Shape,
        num_classes: int | None = None,
        width: int = 256,
        embedding_width: int = 128,
        num_layers: int = 1,
        cell: type[nn.GRU] | type[nn.LSTM] = nn.GRU,
        skip: bool = False,
        context_dim: int = 0,
    ):
        if cell not in (nn.GRU, nn.LSTM):
            raise TypeError(f"cell must be torch.nn.GRU or torch.nn.LSTM, got {cell!r}.")
        super().__init__(in_shape, x_shape, width, embedding_width, num_classes, context_dim)
        num_layers, self.num_states = check_count(num_layers, "num_layers"), 1 if cell is nn.GRU else 2
        sizes = [embedding_width + self.condition_width] + [width + self.condition_width] * (num_layers - 1)
        self.foot = start_layer(nn.Linear(self.condition_width, num_layers * self.num_states * width), 1.0)
        self.cells = nn.ModuleList(
            start_recurrence(cell(size, width, batch_first=True), self.x_shape[0]) for size in sizes
        )
        self.skips = nn.ModuleList(
            start_layer(nn.Linear(width + self.condition_width, width), 1.0) for _ in range(num_layers if skip else 0)
        )

    def start(self, condition: Tensor) -> _Recurrence:
        states = self.foot(condition).tanh().unflatten(-1, (len(self.cells), self.num_states, -1))
        return _Recurrence(condition, tuple(layer.unbind(1) for layer in states.unbind(1)))

    def features(self, condition: Tensor, previous: Tensor) -> Tensor:
        return self._run(self.start(condition), previous)[0]

    def step(self, state: _Recurrence, previous: Tensor) -> tuple[Tensor, _Recurrence]:
        h, after = self._run(state, previous.expand(len(state.condition), -1).unsqueeze(1))
        return h.squeeze(1), after

    def _run(self, state: _Recurrence, h: Tensor) -> tuple[Tensor, _Recurrence]:
        """Returns the features of some steps, given the vectors before each, and the state after them."""
        condition = state.condition.unsqueeze(1).expand(-1, h.shape[1], -1)
        after = []
        for i, (cell, before) in enumerate(zip(self.cells, state.layers, strict=True)):
            packed = tuple(part.unsqueeze(0).contiguous() for part in before)
            h, end = cell(torch.cat([h, condition], dim=-1), packed if self.num_states == 2 else packed[0])
            after.append(tuple(part.squeeze(0) for part in (end if self.num_states == 2 else (end,))))
            if len(self.skips):
                h = self.skips[i](torch.cat([h, condition], dim=-1)).tanh()
        return h, state._replace(layers=tuple(after))


class _Cache(NamedTuple):
    condition: Tensor
    time: int
    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values of each block, (N, heads, time, features)


class _Block(nn.Module):
    """Self-attention to earlier steps, then two affine layers, each added to its input.

    Args:
        width: width of the features.
        num_heads: number of heads.
        depth: number of blocks of the network.
    """

    def __init__(self, width: int, num_heads: int, depth: int):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.inward = start_layer(nn.Linear(width, 3 * width), 1.0)
        # What the branches of all blocks add to the features has about their size together.
        self.outward = start_layer(nn.Linear(width, width), 1 / math.sqrt(2 * depth))
        self.wide = start_layer(nn.Linear(width, 4 * width), math.sqrt(2))
        self.narrow = start_layer(nn.Linear(4 * width, width), 1 / math.sqrt(2 * depth))

    def forward(self, h: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the features of some steps, and the keys and values of these and all before.

        Args:
            h: the features, ``(N, time, width)``; without `past`, of all steps, else of the next one.
            past: keys and values of the steps before, or None.
        """
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.inward(self.norms[0](h)).chunk(3, dim=-1)
        )
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        scores = queries @ keys.transpose(-2, -1) / math.sqrt(keys.shape[-1])
        if past is None:
            time = h.shape[1]
            future = torch.ones(time, time, dtype=torch.bool, device=h.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        h = h + self.outward((scores.softmax(-1) @ values).transpose(1, 2).flatten(-2))
        return h + self.narrow(gelu(self.wide(self.norms[1](h)))), (keys, values)


class TransformerDecoder(SequenceDecoder):
    r"""A causal transformer that reads the latent and the steps before.

    .. math:: h_t = \mathrm{LayerNorm}(\mathrm{blocks}(u_1, \dots, u_t)_t), \qquad
        u_t = E x_{t-1} + p_t + A [z, c]

    Each block is attention of several heads to the steps up to its own, then two affine layers; both are added to their
    input after a layer normalisation of it. With `skip`, each block also adds its own affine map of :math:`[z, c]`.

    Args:
        in_shape: shape of one latent, flattened inside.
        x_shape: shape of one sequence, ``(time, *step)``, or ``(time,)`` for a number a step.
        num_classes: number of classes, for steps of class numbers, which are embedded; None for other numbers.
        width: width of the features.
        num_layers: number of blocks.
        num_heads: heads of each block, a divisor of `width`.
        skip: whether each block has a skip connection from the latent.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when an input or context does not have the stated shape, a number is too small, or `num_heads` does
            not divide `width`.

    References:
        Attention Is All You Need, A. Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
        On Layer Normalization in the Transformer Architecture, R. Xiong et al., 2020,
        https://arxiv.org/abs/2002.04745 (normalisation before each layer).

    >>> decoder = TransformerDecoder(8, (20, 3))
    >>> decoder(torch.zeros(5, 8), x=torch.zeros(5, 20, 3)).shape
    torch.Size([5, 20, 128])
    """

    def __init__(
        self,
        in_shape: Shape,
        x_shape: Shape,
        num_classes: int | None = None,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        skip: bool = False,
        context_dim: int = 0,
    ):
        if check_count(width, "width") % check_count(num_heads, "num_heads"):
            raise ValueError(f"num_heads must divide width={width}, got {num_heads}.")
        super().__init__(in_shape, x_shape, width, width, num_classes, context_dim)
        self.places = nn.Parameter(torch.randn(self.x_shape[0], width) / 10)
        self.foot = start_layer(nn.Linear(self.condition_width, width), 1.0)
        depth = check_count(num_layers, "num_layers")
        self.blocks = nn.ModuleList(_Block(width, num_heads, depth) for _ in range(depth))
        self.skips = nn.ModuleList(
            start_layer(nn.Linear(self.condition_width, width), 1.0) for _ in range(depth if skip else 0)
        )
        self.norm = nn.LayerNorm(width)

    def features(self, condition: Tensor, previous: Tensor) -> Tensor:
        return self._run(condition, previous + self.places, [None] * len(self.blocks))[0]

    def start(self, condition: Tensor) -> _Cache:
        block = self.blocks[0]
        features = self.out_shape[1] // block.num_heads  # type: ignore[operator]
        empty = condition.new_empty(len(condition), block.num_heads, 0, features)  # type: ignore[call-overload]
        return _Cache(condition, 0, ((empty, empty),) * len(self.blocks))

    def step(self, state: _Cache, previous: Tensor) -> tuple[Tensor, _Cache]:
        h = (previous + self.places[state.time]).expand(len(state.condition), -1).unsqueeze(1)
        h, layers = self._run(state.condition, h, list(state.layers))
        return h.squeeze(1), _Cache(state.condition, state.time + 1, layers)

    def _run(
        self, condition: Tensor, h: Tensor, past: list[tuple[Tensor, Tensor]] | list[None]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        h = h + self.foot(condition).unsqueeze(1)
        layers = []
        for i, (block, before) in enumerate(zip(self.blocks, past, strict=True)):
            if len(self.skips):
                h = h + self.skips[i](condition).unsqueeze(1)
            h, seen = block(h, before)
            layers.append(seen)
        return self.norm(h), tuple(layers)


class TokenEncoder(ShapedNetwork):
    r"""A bidirectional gated recurrent network from a sequence of classes to a vector.

    .. math:: y = W [\overrightarrow{h}_n, \overleftarrow{h}_1, c] + b

    The n steps that are read are those up to the first `end`; what follows is not read, so that more padding does not
    change the result.

    Args:
        in_shape: shape of one input, ``(time,)``: class numbers from 0 to ``num_classes - 1``, integers or floats.
        out_shape: shape of one output.
        num_classes: number of classes.
        end: the class that ends a sequence; None if all steps are read.
        width: units of the state of each direction.
        embedding_width: width of the vectors of classes.
        context_dim: width of the context vector, 0 for none; it enters the affine map to the output.

    Raises:
        ValueError: when an input or context does not have the stated shape, or `end` is no class.
        IndexError: when an input is beyond the last class. Where it is no class number the output is NaN.

    References:
        Generating Sentences from a Continuous Space, S. R. Bowman et al., 2016, https://arxiv.org/abs/1511.06349.

    >>> encoder = TokenEncoder(4, 2, num_classes=10, end=0)
    >>> y = encoder(torch.tensor([[3, 5, 0, 0], [3, 5, 0, 7]]))
    >>> torch.equal(y[0], y[1])
    True
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        num_classes: int,
        end: int | None = None,
        width: int = 128,
        embedding_width: int = 128,
        context_dim: int = 0,
    ):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        if len(self.in_shape) != 1:
            raise ValueError(f"in_shape must be the length of the sequences, (time,), got {in_shape!r}.")
        if end is not None and not 0 <= end < num_classes:
            raise ValueError(f"end must be a class, from 0 to {num_classes - 1}, got {end}.")
        self.num_classes, self.end = num_classes, end
        self.embedding = StepInput((1,), check_count(embedding_width, "embedding_width"), num_classes)
        self.directions = nn.ModuleList(
            start_recurrence(nn.GRU(embedding_width, check_count(width, "width"), batch_first=True), self.in_shape[0])
            for _ in range(2)
        )
        self.head = nn.Linear(2 * width + context_dim, math.prod(self.out_shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x, floating=False)
        leading, time = x.shape[:-1], x.shape[-1]
        x = x.reshape(math.prod(leading), time)
        steps = torch.arange(time, device=x.device)
        last = torch.full_like(x[:, :1], time - 1, dtype=torch.long)
        if self.end is not None:
            last = torch.where(x == self.end, steps, time - 1).amin(-1, keepdim=True)
        states = []
        for direction, places in zip(
            self.directions, (steps.expand(len(x), -1), (last - steps).clamp_min(0)), strict=True
        ):
            outputs, _ = direction(self.embedding(x.gather(1, places).unsqueeze(-1)))
            states.append(outputs.gather(1, last.unsqueeze(-1).expand(-1, -1, outputs.shape[-1])).squeeze(1))
        h = torch.cat(states, dim=-1)
        h = self.append_context(h.reshape(*leading, h.shape[-1]), context)
        return self.head(h).unflatten(-1, self.out_shape)
