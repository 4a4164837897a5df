"""Recurrent networks, from sequences to vectors and back."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pyrovae.nn.base import Shape, ShapedNetwork, as_shape, check_count, start_layer


def _sequence_shape(shape: Shape, name: str) -> tuple[int, ...]:
    result = as_shape(shape, name)
    if len(result) < 2:
        raise ValueError(
            f"{name} must be the shape of a sequence, (time, features), got {shape!r}. Use MLP for vectors."
        )
    return result


_Recurrent = TypeVar("_Recurrent", bound=nn.RNNBase)


@torch.no_grad()
def start_recurrence(network: _Recurrent, time: int) -> _Recurrent:
    """Initialises input weights at unit gain, recurrent weights as rotations, and memories of 1 to `time` steps.

    Torch scales all weights by the width of the state, which makes a few input features weak, and gives all units a
    memory of two steps, through which no gradient reaches the far end of a long sequence.
    """
    # The gates in torch's order; that which keeps the state is the update gate or the forget gate.
    gates, keeping = (("r", "z", "n"), "z") if isinstance(network, nn.GRU) else (("i", "f", "g", "o"), "f")
    for name, parameter in network.named_parameters():
        for gate, chunk in zip(gates, parameter.chunk(len(gates)), strict=True):
            if name.startswith("weight_ih"):
                nn.init.normal_(chunk, std=1 / math.sqrt(chunk.shape[1]))
            elif name.startswith("weight_hh"):
                nn.init.orthogonal_(chunk)
            elif name.startswith("bias_ih") and gate == keeping:
                # A gate of sigmoid(log u) = u / (1 + u) keeps its state for about 1 + u steps.
                chunk.uniform_(1, max(time - 1, 1)).log_()
            else:
                nn.init.zeros_(chunk)
    return network


class GRUEncoder(ShapedNetwork):
    r"""A bidirectional gated recurrent network from a sequence to a vector.

    .. math:: y = W [\overrightarrow{h}_{\mathrm{last}}, \overleftarrow{h}_{\mathrm{first}}, c] + b

    Sequences of different lengths are padded to one length and stacked with their mask, as shape
    ``(2, time, features)``: values first, then the mask, 1 where observed and 0 where not. The network then reads the
    values and the mask, with zeros in place of values that were not observed. It does not read the steps after the last
    observation, so that more padding does not change the result. Of a sequence without any observation it reads the
    first step.

    Args:
        in_shape: shape of one input: ``(time, features)``; or ``(2, time, features)``, a sequence and its mask.
        out_shape: shape of one output.
        width: units of the state of each direction.
        context_dim: width of the context vector, 0 for none; it enters the affine map to the output.

    Raises:
        ValueError: when `in_shape` is not that of a sequence, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder, K. Cho et al., 2014,
        https://arxiv.org/abs/1406.1078.
        Can Recurrent Neural Networks Warp Time?, C. Tallec and Y. Ollivier, 2018, https://arxiv.org/abs/1804.11188
        (the initialisation of the update gates, which gives units memories of 1 to `time` steps).

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
        width = check_count(width, "width")
        time, features = self.in_shape[-2], math.prod(self.in_shape[:-2]) * self.in_shape[-1]
        self.gru = start_recurrence(nn.GRU(features, width, batch_first=True, bidirectional=True), time)
        self.head = nn.Linear(2 * width + context_dim, math.prod(self.out_shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x)
        leading = x.shape[: x.dim() - len(self.in_shape)]
        x = x.reshape(math.prod(leading), *self.in_shape)
        sequences: Tensor | PackedSequence = x
        if len(self.in_shape) == 3:
            observed = x[:, 1] != 0
            sequences = masked = torch.cat([x[:, 0].where(observed, 0), x[:, 1]], dim=-1)
            if len(x):  # torch cannot pack an empty batch
                steps = torch.arange(1, self.in_shape[1] + 1, device=x.device)
                lengths = (steps * observed.any(-1)).amax(-1).clamp_min(1)
                sequences = pack_padded_sequence(masked, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, h = self.gru(sequences)
        h = self.append_context(h.transpose(0, 1).reshape(*leading, 2 * h.shape[-1]), context)
        return self.head(h).unflatten(-1, self.out_shape)


class GRUDecoder(ShapedNetwork):
    r"""A gated recurrent network from a vector to a sequence.

    .. math:: h_0 = \tanh(W_0 [z, c] + b_0), \quad h_t = \mathrm{GRU}([z, c], h_{t-1}), \quad y_t = W h_t + b

    Its input is the latent alone, never earlier outputs: given z, the outputs do not depend on the data, and a
    likelihood may treat the steps as independent.

    Args:
        in_shape: shape of one input, flattened inside.
        out_shape: shape of one output, ``(..., time, features)``; the dimensions before the last two are parameters
            of each feature.
        width: units of the state.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `out_shape` is not that of a sequence, or an input or context does not have the stated shape.
        TypeError: when an input is not floating point.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder, K. Cho et al., 2014,
        https://arxiv.org/abs/1406.1078.
        Can Recurrent Neural Networks Warp Time?, C. Tallec and Y. Ollivier, 2018, https://arxiv.org/abs/1804.11188
        (the initialisation of the update gates).

    >>> GRUDecoder(8, (50, 3))(torch.zeros(4, 7, 8)).shape
    torch.Size([4, 7, 50, 3])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, width: int = 128, context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), _sequence_shape(out_shape, "out_shape"), context_dim)
        width = check_count(width, "width")
        time, features = self.out_shape[-2], math.prod(self.out_shape[:-2]) * self.out_shape[-1]
        self.foot = start_layer(nn.Linear(math.prod(self.in_shape) + context_dim, width), 1.0)
        self.gru = start_recurrence(nn.GRU(self.foot.in_features, width, batch_first=True), time)
        self.head = nn.Linear(width, features)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.flatten_input(x, context)
        leading = h.shape[:-1]
        h = h.reshape(math.prod(leading), h.shape[-1])
        states, _ = self.gru(h.unsqueeze(1).expand(-1, self.out_shape[-2], -1), self.foot(h).tanh().unsqueeze(0))
        out = self.head(states).unflatten(-1, (-1, self.out_shape[-1])).transpose(-3, -2)
        return out.reshape(*leading, *self.out_shape)


class GatedTransition(ShapedNetwork):
    r"""A network between states of a sequence that starts as the identity, and learns where to leave it.

    .. math:: g = \sigma(a(z)), \quad \mu = (1 - g) \odot (z + W z + b) + g \odot h(z), \quad
        r = V\, \mathrm{relu}(h(z)) + d

    a and h are perceptrons of one hidden layer, :math:`W` starts at zero. It returns :math:`\mu` and r, from which
    ``encoders.DiagonalNormal`` makes a mean and a standard deviation.

    Args:
        in_shape: shape of a state, ``(dim,)``.
        out_shape: twice as long.
        width: units of the hidden layers.
        context_dim: width of the context vector, 0 for none; a and h read it.

    Raises:
        ValueError: when `out_shape` is not twice as long as `in_shape`; as :class:`MLP`.

    References:
        Structured Inference Networks for Nonlinear State Space Models, R. G. Krishnan, U. Shalit and D. Sontag, 2017,
        https://arxiv.org/abs/1609.09869.

    >>> GatedTransition(3, 6)(torch.zeros(7, 3)).shape
    torch.Size([7, 6])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, width: int = 200, context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        if len(self.in_shape) != 1 or self.out_shape != (2 * self.in_shape[0],):
            raise ValueError(
                f"out_shape must be twice as long as in_shape, a mean and a scale for each dimension; got {in_shape!r} "
                f"and {out_shape!r}."
            )
        n, width = self.in_shape[0], check_count(width, "width")
        self.gate = nn.Sequential(nn.Linear(n + context_dim, width), nn.ReLU(), nn.Linear(width, n))
        self.proposal = nn.Sequential(nn.Linear(n + context_dim, width), nn.ReLU(), nn.Linear(width, n))
        self.linear, self.scale = nn.Linear(n, n), nn.Linear(n, n)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x)
        h = self.append_context(x, context)
        gate, proposal = self.gate(h).sigmoid(), self.proposal(h)
        mean = (1 - gate) * (x + self.linear(x)) + gate * proposal
        return torch.cat([mean, self.scale(proposal.relu())], dim=-1)


class Combiner(ShapedNetwork):
    r"""A network of a state and a summary of the data, in which the state is only added to the summary.

    .. math:: y = V \frac{\tanh(W z + b) + c}{2} + d

    The summary c is the context, and as wide as the hidden layer: no weight is spent on it, so that a step of time
    costs little where summaries are wide. It is the posterior's network in a deep Markov model.

    Args:
        in_shape: shape of a state.
        out_shape: shape of one output.
        context_dim: width of the summary, at least 1.

    Raises:
        ValueError: when there is no context, or an input or context does not have the stated shape.

    References:
        Structured Inference Networks for Nonlinear State Space Models, R. G. Krishnan, U. Shalit and D. Sontag, 2017,
        https://arxiv.org/abs/1609.09869.

    >>> Combiner(3, 6, context_dim=16)(torch.zeros(7, 3), torch.zeros(7, 16)).shape
    torch.Size([7, 6])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, context_dim: int = 0):
        super().__init__(as_shape(in_shape, "in_shape"), as_shape(out_shape, "out_shape"), context_dim)
        check_count(context_dim, "context_dim")
        self.state = nn.Linear(math.prod(self.in_shape), context_dim)
        self.head = nn.Linear(context_dim, math.prod(self.out_shape))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_input(x)
        h, summary = self.match_context(self.state(x.flatten(x.dim() - len(self.in_shape))), context)
        return self.head((h.tanh() + summary) / 2).unflatten(-1, self.out_shape)
