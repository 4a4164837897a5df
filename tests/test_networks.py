"""Properties of single networks; test_parts.py has those of all."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from pyrovae.nn import (
    MLP,
    Combiner,
    ConvNet,
    DeconvNet,
    GatedMLP,
    GRUDecoder,
    GRUEncoder,
    LogInput,
    OneHotInput,
    ResidualConvNet,
    ResidualDeconvNet,
    ResidualMLP,
    set_output_bias,
)

EPS = torch.finfo(torch.float64).eps
FAILURE_RATE = 1e-6  # of each bound on random initial weights; a test has up to a few dozen bounds
SIZES = [(7, 5), (1, 2), (28, 28), (33, 17)]


def rounding(network: nn.Module) -> float:
    """Returns a bound of the difference of two orders of summation: eps times the parameters, for terms below 100."""
    return 100 * EPS * sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------------------------------------ images of any size


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [(1,), (2, 1)], ids=str)
@pytest.mark.parametrize("cls", [ConvNet, ResidualConvNet])
def test_encoders_take_images_of_any_size_and_any_dimensions_of_channels(cls, channels, size):
    network = cls((*channels, *size), (2, 3), channels=(4, 8, 16))
    assert network(torch.randn(2, 5, *channels, *size)).shape == (2, 5, 2, 3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [(1,), (2, 1)], ids=str)
@pytest.mark.parametrize("cls", [DeconvNet, ResidualDeconvNet])
def test_decoders_make_images_of_any_size_and_any_dimensions_of_channels(cls, channels, size):
    network = cls(5, (*channels, *size), channels=(16, 8, 4))
    assert network(torch.randn(2, 3, 5)).shape == (2, 3, *channels, *size)


@pytest.mark.parametrize("cls", [DeconvNet, ResidualDeconvNet])
def test_decoders_go_up_through_the_sizes_that_encoders_go_down(cls):
    network = cls(5, (1, 33, 17), channels=(16, 8, 4), activation=nn.SiLU)
    sizes = []
    h = network.foot(torch.randn(2, 5))
    for layer in network.layers:
        h = layer(h)
        sizes += [tuple(h.shape[-2:])] if tuple(h.shape[-2:]) not in sizes else []
    assert sizes == [(5, 3), (9, 5), (17, 9), (33, 17)]


@pytest.mark.parametrize("cls", [ConvNet, ResidualConvNet])
def test_an_image_stacked_with_its_mask_is_an_image_of_their_channels(cls):
    stacked, flat = cls((2, 3, 7, 5), 4), cls((6, 7, 5), 4)
    flat.load_state_dict(stacked.state_dict())
    x = torch.randn(8, 2, 3, 7, 5)
    assert torch.equal(stacked(x), flat(x.flatten(1, 2)))
    assert not torch.equal(stacked(x), flat(x.transpose(1, 2).flatten(1, 2)))


# -------------------------------------------------------------------------------------------------------- the starts

RESIDUAL = {
    "mlp": partial(ResidualMLP, 50, 3, width=512, num_blocks=4),
    "conv": partial(ResidualConvNet, (3, 28, 28), 3, channels=(256,) * 4, blocks_per_stage=1),
    "deconv": partial(ResidualDeconvNet, 50, (3, 28, 28), channels=(256,) * 4, blocks_per_stage=1),
}


def relative_bounds(units: int) -> tuple[float, float]:
    """Returns bounds of a mean square over independent normal units, relative to its expectation.

    The mean over units of weighted sums of squares of normals is outside with a probability below FAILURE_RATE, for any
    correlation of the data within a unit (Laurent and Massart, 2000, lemma 1, with the largest possible norms).
    """
    x = math.log(2 / FAILURE_RATE)
    return 1 - 2 * math.sqrt(x / units), 1 + 2 * math.sqrt(x / units) + 2 * x / units


def mean_square(h: Tensor) -> float:
    return h.square().mean().item()


@torch.no_grad()
@pytest.mark.parametrize("name", RESIDUAL)
def test_the_scale_neither_vanishes_nor_explodes_and_blocks_start_as_the_identity(name):
    network = RESIDUAL[name]()
    h = torch.randn(16, *network.in_shape)
    start = mean_square(h)
    layers = [*([network.foot] if hasattr(network, "foot") else []), *network.layers]
    deep = 0
    for layer in layers:
        out = layer(h)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            # Weights of variance 1 / n: each output expects the mean square of its inputs, zeros beyond a border too.
            power = h.square().mean(1, keepdim=True)
            expected = power if h.dim() == 2 else avg_pool2d(power, 3, layer.stride, 1)
            units = out.shape[1]
            low, high = relative_bounds(units)
            assert low <= mean_square(out) / expected.mean().item() <= high
        elif isinstance(layer, nn.Sequential):
            # The branch ends in weights of variance 0.02 / n of a ReLU of normalised inputs, whose mean square is at
            # most 1 and one half if they are symmetric about zero. It is independent of h, and so are its units.
            deep += 1
            branch, units = out - h, h.shape[1]
            assert 0 < mean_square(branch) <= 0.02 * relative_bounds(units)[1]
            cross = 2 * scipy.stats.norm.isf(FAILURE_RATE) * math.sqrt(0.02 * mean_square(h) / units)
            assert -cross <= mean_square(out) - mean_square(h) <= 0.02 * relative_bounds(units)[1] + cross
        elif isinstance(layer, nn.ReLU):
            break  # only the layer to the output follows
        h = out
    assert deep == 4
    # The borders of 28, 14, 7 and 4 pixels cost a factor of 0.41 in all; the rest is chance.
    assert 0.1 < mean_square(h) / start < 4


@torch.no_grad()
def test_a_residual_branch_starts_at_a_tenth():
    n = 4096
    block = ResidualMLP(2, 2, width=n, num_blocks=1).layers[1]
    h = torch.randn(n)
    # 0.02 times the mean of relu(u)^2 over n units (mean 1/2, variance 5/4), times a chi-square over n (variance 2/n):
    # a relative variance of 7 / n.
    z = scipy.stats.norm.isf(FAILURE_RATE / 2)
    assert abs(mean_square(block(h) - h) / 0.01 - 1) < z * math.sqrt(7 / n)


@torch.no_grad()
def test_gated_units_keep_the_scale_at_the_start():
    width = 1024
    network = GatedMLP(width, 3, hidden=(width,) * 4)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    h = torch.randn(width)
    for linear, gate in zip(network.layers[0:-1:2], network.layers[1:-1:2], strict=True):
        m = mean_square(h)
        expected = 3 * m * (weights / weights.sum() / (1 + np.exp(-math.sqrt(3 * m) * nodes)) ** 2).sum()
        assert 0.75 * m <= expected <= 1.5 * m  # a square of a gate is 1/4 to 1/2 on average: deep nets stay in bounds
        h = gate(linear(h))
        # A unit's square has a second moment of at most 3 (3 m)^2 / 2, so the mean of `width` a deviation of this.
        assert abs(mean_square(h) - expected) < 5 * m * math.sqrt(13.5 / width)
    assert isinstance(network.layers[-1], nn.Linear)


def test_memories_of_a_gru_reach_over_the_sequence_at_the_start():
    time, width = 100, 64
    encoder = GRUEncoder((time, 3), 2, width=width)
    x = torch.randn(32, time, 3, requires_grad=True)
    # The last state of the first direction; that of the second belongs to the first step.
    state = encoder.gru(x)[1][0]
    (gradient,) = torch.autograd.grad((state * torch.randn(width)).sum(), x)
    first, last = gradient[:, 0].square().mean().sqrt(), gradient[:, -1].square().mean().sqrt()
    # A unit of memory u keeps (u / (1 + u))^100, 0.2 on average over u from 1 to 99; torch's own start keeps 2^-100.
    assert first > 1e-6 * last
    update = encoder.gru.bias_ih_l0.detach()[width : 2 * width].exp()
    assert update.min() >= 1 - 1e-5
    assert update.max() <= time - 1 + 1e-3
    assert scipy.stats.kstest(update.numpy(), scipy.stats.uniform(1, time - 2).cdf).pvalue > FAILURE_RATE


SMALL = {
    "gated": partial(GatedMLP, 6, 4, hidden=(8, 8)),
    "residual": partial(ResidualMLP, 6, 4, width=8, num_blocks=3, activation=nn.SiLU),
    "conv": partial(ResidualConvNet, (1, 7, 5), 4, channels=(16, 16), blocks_per_stage=2, activation=nn.SiLU),
    "deconv": partial(ResidualDeconvNet, 6, (1, 7, 5), channels=(16, 16), blocks_per_stage=2, activation=nn.SiLU),
    "gru-encoder": partial(GRUEncoder, (5, 2), 4, width=8),
    "gru-decoder": partial(GRUDecoder, 6, (5, 2), width=8),
    "one-hot": partial(OneHotInput, 6, 4, 3, network=partial(MLP, hidden=(8,), activation=nn.SiLU)),
}


def small_input(network: nn.Module, *leading: int) -> Tensor:
    if isinstance(network, OneHotInput):
        return torch.randint(network.num_classes, (*leading, *network.in_shape))
    return torch.randn(*leading, *network.in_shape)


@pytest.mark.parametrize("name", SMALL)
def test_a_gradient_reaches_every_entry_of_every_parameter_at_the_start(name):
    network = SMALL[name](context_dim=3)
    out = network(small_input(network, 64), torch.randn(64, 3))
    (out * torch.randn_like(out)).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad.eq(0).any()]
    assert not without


@pytest.mark.parametrize("name", SMALL)
def test_networks_can_be_called_with_other_parameters(name):
    network, other = SMALL[name]().double(), SMALL[name]().double()
    x = small_input(network, 3).double()
    parameters = {name: p.detach() for name, p in other.named_parameters()}
    out = torch.func.functional_call(network, parameters, (x,))
    torch.testing.assert_close(out, other(x).detach(), rtol=0, atol=rounding(network))
    assert (out - network(x)).abs().max() > 1e-3
    assert not out.requires_grad


# --------------------------------------------------------------------------------------------------------- sequences


def gru_by_hand(gru: nn.GRU, x: Tensor, h: Tensor, suffix: str = "") -> Tensor:
    """Returns the states of shape (time, width) that the equations of Cho et al. give for one sequence."""
    w_ih, w_hh, b_ih, b_hh = (getattr(gru, f"{n}_l0{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    states = []
    for step in x:
        r, u, n = (w_ih @ step + b_ih).chunk(3)
        hr, hu, hn = (w_hh @ h + b_hh).chunk(3)
        r, u = (r + hr).sigmoid(), (u + hu).sigmoid()
        h = (1 - u) * (n + r * hn).tanh() + u * h
        states.append(h)
    return torch.stack(states)


def sequences(time: int, features: int, lengths: list[int]) -> Tensor:
    """Returns random sequences stacked with their masks; the padding holds numbers, which must not be read."""
    values = torch.randn(len(lengths), time, features, dtype=torch.float64)
    mask = (torch.arange(time) < torch.tensor(lengths).unsqueeze(-1)).double()
    return torch.stack([values, mask.unsqueeze(-1).expand_as(values)], dim=1)


@pytest.mark.parametrize("masked", [False, True])
def test_gru_encoder_is_the_equations_of_both_directions(masked):
    time, features, lengths = 6, 3, [6, 1, 4] if masked else [6, 6, 6]
    encoder = GRUEncoder((2, time, features) if masked else (time, features), 5, width=4).double()
    x = sequences(time, features, lengths)
    x[0, 1, 2, 1] = 0  # a missing value
    out = encoder(x if masked else x[:, 0])
    for i, length in enumerate(lengths):
        values, mask = x[i, :, :length]
        read = torch.cat([values * mask, mask], dim=-1) if masked else values
        zero = torch.zeros(4, dtype=torch.float64)
        forward = gru_by_hand(encoder.gru, read, zero)[-1]
        backward = gru_by_hand(encoder.gru, read.flip(0), zero, "_reverse")[-1]
        truth = encoder.head(torch.cat([forward, backward]))
        torch.testing.assert_close(out[i], truth, rtol=0, atol=rounding(encoder))


def test_more_padding_does_not_change_what_the_gru_encoder_returns():
    lengths = [5, 1, 3, 0]
    short, long = GRUEncoder((2, 5, 3), 4).double(), GRUEncoder((2, 14, 3), 4).double()
    long.load_state_dict(short.state_dict())  # no weight depends on the time
    x = sequences(5, 3, lengths)
    padding = torch.stack([torch.full((4, 9, 3), 7.0), torch.zeros(4, 9, 3)], dim=1).double()
    torch.testing.assert_close(long(torch.cat([x, padding], dim=2)), short(x), rtol=0, atol=rounding(short))


def test_a_hole_is_read_and_what_stands_in_it_is_not():
    encoder = GRUEncoder((2, 8, 2), 4).double()
    x = sequences(8, 2, [6])
    hole = x.clone()
    hole[0, 1, 2:4] = 0
    other = hole.clone()
    other[0, 0, 2:4] = torch.nan
    assert torch.equal(encoder(other), encoder(hole))
    zeros = x.clone()
    zeros[0, 0, 2:4] = 0
    shorter = torch.cat([x[:, :, :2], x[:, :, 4:], torch.zeros(1, 2, 2, 2).double()], dim=2)
    for different in (x, zeros, shorter):  # observed, observed as zero, and missing
        assert (encoder(different) - encoder(hole)).abs().max() > 1e-4
    partly = x.clone()  # a step with one feature observed counts as observed
    partly[0, 1, 6, 1] = 1
    assert (encoder(partly) - encoder(x)).abs().max() > 1e-4


def test_a_sequence_without_observations_is_read_as_one_empty_step():
    encoder = GRUEncoder((2, 8, 2), 4)
    x = torch.stack([torch.randn(3, 8, 2), torch.zeros(3, 8, 2)], dim=1)
    out = encoder(x)
    assert torch.equal(out[0], out[1])
    assert out.isfinite().all()
    assert encoder(x[:0]).shape == (0, 4)


@pytest.mark.parametrize("shape", [(6, 2), (3, 6, 2)], ids=str)
def test_gru_decoder_is_the_equations_with_the_latent_as_every_input(shape):
    decoder = GRUDecoder(4, shape, width=5, context_dim=2).double()
    z, context = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    out = decoder(z, context)
    for i in range(3):
        given = torch.cat([z[i], context[i]])
        states = gru_by_hand(decoder.gru, given.expand(6, -1), decoder.foot(given).tanh())
        for t in range(6):
            truth = decoder.head(states[t]).reshape(*shape[:-2], 2)  # parameters first, then features
            torch.testing.assert_close(out[i, ..., t, :], truth, rtol=0, atol=rounding(decoder))


# ----------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float64], ids=str)
def test_one_hot_input_into_an_affine_map_looks_rows_up(dtype):
    network = OneHotInput((2, 3), 5, num_classes=4, network=partial(MLP, hidden=())).double()
    x = torch.randint(4, (7, 2, 3))
    affine = network.network.layers[-1]
    table = affine.weight.T.unflatten(0, (6, 4))
    truth = table[torch.arange(6), x.flatten(1)].sum(1) + affine.bias
    torch.testing.assert_close(network(x.to(dtype)), truth, rtol=0, atol=rounding(network))


def test_a_combiner_is_its_equation_with_one_summary_for_many_states():
    network = Combiner(3, 6, context_dim=5)
    z, summary = torch.randn(4, 7, 3), torch.randn(7, 5)
    h = (torch.tanh(z @ network.state.weight.T + network.state.bias) + summary) / 2
    torch.testing.assert_close(network(z, summary), h @ network.head.weight.T + network.head.bias)


def test_log_input_is_its_network_of_the_logarithm():
    network = LogInput(3, 5, network=partial(MLP, hidden=())).double()
    x = torch.tensor([[0.0, 9.0, -99.0]], dtype=torch.float64)
    logarithm = torch.tensor([[0.0, math.log(10), -math.log(100)]], dtype=torch.float64)
    torch.testing.assert_close(network(x), network.network(logarithm), rtol=0, atol=rounding(network))


def test_one_hot_input_hands_the_context_on():
    network = OneHotInput(3, 5, num_classes=4, context_dim=2)
    x, context = torch.randint(4, (7, 3)), torch.randn(7, 2)
    inner = network.network(nn.functional.one_hot(x, 4).float(), context)
    assert torch.equal(network(x, context), inner)
    assert not torch.equal(network(x, -context), inner)


def test_one_hot_input_makes_sequences_of_tokens_into_sequences():
    network = OneHotInput(9, 5, num_classes=4, network=GRUEncoder)
    assert network.network.in_shape == (9, 4)
    assert network(torch.randint(4, (2, 7, 9))).shape == (2, 7, 5)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.tensor([0, 4]), r"0 to 3 \(num_classes=4\), but its input ranges from 0 to 4\."),
        (torch.tensor([-1, 3]), "ranges from -1 to 3"),
        (torch.tensor([0.5, 1.0]), "whole numbers from 0 to 3"),
        (torch.tensor([0.0, torch.nan]), "whole numbers from 0 to 3"),
        (torch.tensor([0.0, torch.inf]), "ranges from 0 to inf"),
    ],
)
def test_what_is_no_class_is_refused(x, match):
    with pytest.raises(ValueError, match=match):
        OneHotInput(2, 5, num_classes=4)(x)


# -------------------------------------------------------------------------------------------------- the output's start

DECODERS = {  # with the dimensions of an output over which a bias is shared
    "mlp": (partial(MLP, 4, (2, 3)), ()),
    "gated": (partial(GatedMLP, 4, (2, 3)), ()),
    "residual": (partial(ResidualMLP, 4, (2, 3)), ()),
    "deconv": (partial(DeconvNet, 4, (2, 3, 7, 5)), (-2, -1)),
    "residual-deconv": (partial(ResidualDeconvNet, 4, (2, 3, 7, 5)), (-2, -1)),
    "gru": (partial(GRUDecoder, 4, (3, 6, 2)), (-2,)),
    "one-hot": (partial(OneHotInput, 4, (2, 3), 5), ()),
}


@torch.no_grad()
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_the_output_moves_by_the_value_less_the_old_bias(name, context_dim):
    build, shared = DECODERS[name]
    network = build(context_dim=context_dim).double()
    inputs = [small_input(network, 8)] + [torch.randn(8, context_dim)] * bool(context_dim)
    inputs = [x.double() for x in inputs]
    zero = torch.zeros(network.out_shape, dtype=torch.float64)
    value = torch.randn(network.out_shape, dtype=torch.float64)
    set_output_bias(network, zero)
    before = network(*inputs)
    assert before.abs().max() > 1e-3  # the contribution of the input
    set_output_bias(network, value)
    moved = value.mean(shared, keepdim=True) if shared else value
    torch.testing.assert_close(
        network(*inputs), before + moved.expand(network.out_shape), rtol=0, atol=rounding(network)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "gated", "residual"])
def test_the_mean_output_starts_near_the_value(name):
    network = DECODERS[name][0]().double()
    value = 5 * torch.randn(network.out_shape, dtype=torch.float64)
    set_output_bias(network, value)
    z = torch.randn(1000, *network.in_shape, dtype=torch.float64)
    hidden = network.layers[:-1](z).mean(0)
    # Uniform weights of variance 1 / (3 n) add a sum that is sub-Gaussian with the deviation |hidden| / sqrt(3 n).
    bound = math.sqrt(2 * math.log(2 * value.numel() / FAILURE_RATE)) * hidden.norm() / math.sqrt(3 * len(hidden))
    assert bound < 3.5  # less than the scale of the value
    assert (network(z).mean(0) - value).abs().max() < bound


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Linear(4, 3), (3,)),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Unflatten(-1, (2, 3))), (2, 3)),
        (nn.Sequential(nn.Unflatten(-1, (1, 2, 2)), nn.ConvTranspose2d(1, 3, 2)), (3, 3, 3)),
        (nn.Sequential(nn.Unflatten(-1, (1, 4)), nn.Sequential(nn.Conv1d(1, 3, 1))), (3, 4)),
        (nn.Sequential(nn.Linear(4, 4), DeconvNet(4, (1, 2, 2))), (1, 2, 2)),
    ],
)
def test_the_output_of_any_sequential_module_can_be_started(network, shape):
    value = torch.arange(3.0).reshape(3, *[1] * (len(shape) - 1)).expand(shape) if shape[0] == 3 else torch.ones(shape)
    set_output_bias(network, torch.zeros(shape))
    x = torch.randn(5, 4)
    before = network(x)
    set_output_bias(network, value)
    torch.testing.assert_close(network(x), before + value, rtol=0, atol=1e-5)  # a few float32 roundings of numbers < 10


@pytest.mark.parametrize("wrap", [partial(OneHotInput, num_classes=2), LogInput], ids=["OneHotInput", "LogInput"])
def test_the_output_of_a_wrapped_recurrent_decoder_is_started(wrap):
    network = wrap(2, (5, 3), network=GRUDecoder)
    value = torch.randn(3).expand(5, 3)  # one bias serves all steps
    set_output_bias(network, value)
    torch.testing.assert_close(network.network.head.bias.data, value[0], rtol=0, atol=1e-6)


def test_a_started_output_still_learns():
    network = MLP(2, 3)
    set_output_bias(network, torch.ones(3))
    network(torch.randn(4, 2)).sum().backward()
    assert network.layers[-1].bias.requires_grad
    assert network.layers[-1].bias.grad.eq(4).all()


@pytest.mark.parametrize(
    ("network", "value", "match"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.Sigmoid()), torch.ones(3), "Sequential does not end in a layer with a bias"),
        (nn.Sequential(), torch.ones(3), "Sequential does not end"),
        (nn.Linear(2, 3, bias=False), torch.ones(3), "Linear does not end .* bias=True"),
        (nn.TransformerEncoderLayer(4, 2, 8), torch.ones(4), "TransformerEncoderLayer does not end .* pyrovae.nn"),
        (MLP(2, (1, 3)), torch.ones(3), r"one output of MLP, whose last layer has 3 biases, got \(3,\)"),
        (MLP(2, 3), torch.ones(4, 3), r"got \(4, 3\)"),
        (nn.Sequential(nn.Linear(2, 3)), torch.ones(4), r"Sequential, whose last layer has 3 biases, got \(4,\)"),
        (nn.Sequential(nn.Conv2d(1, 3, 1)), torch.ones(3), r"3 biases, got \(3,\)"),
        (nn.Sequential(nn.Conv2d(1, 3, 1)), torch.ones(2, 4, 4), r"3 biases, got \(2, 4, 4\)"),
        (GRUDecoder(2, (5, 3)), torch.ones(3), r"GRUDecoder, whose last layer has 3 biases, got \(3,\)"),
        (MLP(2, 3), torch.tensor([0.0, 1.0, -math.inf]), "value holds NaN or infinity"),
    ],
    ids=lambda argument: type(argument).__name__ if isinstance(argument, nn.Module) else None,
)
def test_an_output_that_cannot_be_started_is_refused(network, value, match):
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(ValueError, match=match):
        set_output_bias(network, value)
    assert all(map(torch.equal, network.parameters(), before))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ConvNet((28, 28), 3), "in_shape must be the shape of an image"),
        (lambda: ResidualConvNet((28, 28), 3), "in_shape must be the shape of an image"),
        (lambda: ResidualDeconvNet(3, (28, 28)), "out_shape must be the shape of an image"),
        (lambda: GRUEncoder(5, 3), r"in_shape must be the shape of a sequence, \(time, features\), got 5"),
        (
            lambda: GRUEncoder((3, 8, 2), 3),
            r"\(2, time, features\) for a sequence stacked with its mask, got \(3, 8, 2\)",
        ),
        (lambda: GRUDecoder(3, 5), r"out_shape must be the shape of a sequence, \(time, features\), got 5"),
        (lambda: OneHotInput(3, 5, 0), "num_classes must be at least 1, got 0"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
