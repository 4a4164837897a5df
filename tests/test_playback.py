"""Graphs that are recorded and played back give the bits of the function: in random programs, and where bugs were."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyrovae.compilation.playback import play_back
from pyrovae.compilation.recording import FetchesValueError, Recording, is_random, record
from pyrovae.inference.messages import Untraceable

Program = Callable[[list[Tensor]], list[Tensor]]


def given(seed: int = 0) -> list[Tensor]:
    """Returns the inputs of a program: leaves with a gradient, and data without."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(4, 3, generator=generator) for _ in range(2))
    return [a.requires_grad_(), torch.randn(3, generator=generator).requires_grad_(), b]


def assert_same_bits(program: Program) -> Recording:
    """Records a program, plays it back on other inputs, and compares all bits, also those of inputs that it changes."""
    torch.manual_seed(1)
    recording, _ = record(lambda: program(inputs), inputs := given())
    read = [next(i for i, x in enumerate(inputs) if x is t) for t in recording.inputs]
    play = play_back(recording)
    for seed in (1, 2):
        expected_inputs, inputs = given(seed), given(seed)
        torch.manual_seed(seed)
        expected = program(expected_inputs)
        torch.manual_seed(seed)
        with torch.no_grad():
            found = play(*(inputs[i] for i in read))
        for a, b in zip([*found, *inputs], [*expected, *expected_inputs], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=False)
    return recording


UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.exp,
    torch.tanh,
    torch.sigmoid,
    torch.nn.functional.softplus,
    torch.relu,
    torch.square,
    lambda x: x**2,
    lambda x: x * 1,
    lambda x: x / 1.0,
    lambda x: x - 0,
    lambda x: x + 0.0,
    lambda x: -x,
    lambda x: x.clamp(-1, 1),
    lambda x: x.detach(),
    lambda x: x.clone(),
    lambda x: x.sum(-1, keepdim=True),
    lambda x: x.logsumexp(-1, keepdim=True),
    lambda x: x.softmax(-1),
    lambda x: x.reshape(-1),
    lambda x: x[..., 1:],
    lambda x: x[..., ::2],
    lambda x: x.flip(-1),
    lambda x: x.unsqueeze(0),
    lambda x: x.mT if x.dim() > 1 else x,
    lambda x: x.expand(2, *x.shape),
    lambda x: x + torch.randn_like(x),
    lambda x: x * torch.rand(x.shape).lt(0.5),
    lambda x: x + torch.arange(x.shape[-1]),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: x.cumsum(-1),
    lambda x: torch.stack(x.unbind(-1), -1),
    lambda x: x.double().float(),
    lambda x: x.max(-1).values,
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    lambda x, y: x / (1 + y**2),
    torch.maximum,
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: torch.cat([x.reshape(-1), y.reshape(-1)]),
    lambda x, y: x.reshape(-1, x.shape[-1]) @ x.new_ones(x.shape[-1], 2) + y.mean(),
]


def change_copy(x: Tensor, y: Tensor) -> Tensor:
    copy = x.clone()
    copy.add_(y.mean())
    return copy


def change_part(x: Tensor, y: Tensor) -> Tensor:
    zeros = torch.zeros_like(x)
    zeros[..., :1] = y.mean()
    return zeros + x


def change_view(x: Tensor, y: Tensor) -> Tensor:
    copy = x * 2
    before = copy.sum()
    copy.view(-1)[0] += y.sum()
    return copy * before


CHANGING = [change_copy, change_part, change_view]


def random_program(seed: int) -> Program:
    """Returns a program of up to 20 random operations on up to 30 numbers, with the gradient of the sum of its end."""

    def program(inputs: list[Tensor]) -> list[Tensor]:
        draw = random.Random(seed)
        values, results = [*inputs], []
        for _ in range(draw.randrange(3, 20)):
            x, y = draw.choice(values), draw.choice(values)
            operation = draw.choice([*UNARY, *BINARY, *CHANGING])
            try:
                value = operation(x) if operation in UNARY else operation(x, y)
            except (RuntimeError, IndexError):  # shapes that do not fit: the same in every run
                continue
            if value.numel() == 0 or value.numel() > 200:
                continue
            values.append(value)
            if draw.random() < 0.3:  # the same again, for what is computed twice
                values.append(operation(x) if operation in UNARY else operation(x, y))
        for value in values[3:]:
            if draw.random() < 0.3:
                results.append(value.detach().clone())
        total = sum(value.tanh().mean() for value in values[-4:])
        leaves = inputs[:2]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []
        return [total.detach(), *results, *(g for g in gradients if g is not None)]

    return program


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_programs_give_the_same_bits(first):
    for seed in range(first, first + 40):
        assert_same_bits(random_program(seed))


@pytest.mark.slow
def test_many_random_programs_give_the_same_bits():
    for seed in range(1000, 6000):
        assert_same_bits(random_program(seed))


def test_what_is_computed_twice_keeps_its_memory_while_a_view_lives():
    # The second quotient is the first; the view of the second must keep the memory of the first.
    def program(inputs):
        a, b, c = inputs
        first, second = c / 3, c / 3
        view = second.mT
        return [first * 2, view @ a.detach() + b.detach()]

    assert_same_bits(program)


def test_repeated_neutral_and_constant_operations_are_dropped():
    def program(inputs):
        a, _, _ = inputs
        scale = torch.ones(3).exp() * 2  # the same in every run
        return [(a.exp() * 1 * scale).detach(), (a.exp() / 1 - 0) * scale, a.mT.mT * 2]

    recording = assert_same_bits(program)
    names = [node.op._opname for node in recording.nodes]
    assert sorted(name for name in names if name not in ("detach", "alias")) == ["exp", "mul", "mul"]


def test_random_draws_stay_in_their_order():
    def program(inputs):
        unused = torch.rand(3)  # moves the generator
        return [torch.randn(3), torch.randn(3), torch.zeros(3).bernoulli_(0.5) + 0 * unused]

    recording = assert_same_bits(program)
    assert len([node for node in recording.nodes if is_random(node.op)]) == 4


def test_inputs_that_a_program_changes_are_changed():
    def program(inputs):
        *_, c = inputs
        before = c * 2
        c.mul_(0.5).add_(1)
        return [before, c * 2]

    assert assert_same_bits(program).changes_inputs


def test_numbers_that_each_run_makes_anew_are_not_changed_for_good():
    def program(inputs):
        counts = torch.tensor([1.0, 2.0, 3.0])
        counts += inputs[2][0]
        return [counts]

    assert_same_bits(program)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda x: x * x.sum().item(), FetchesValueError),
        (lambda x: x if x.sum() > 0 else -x, FetchesValueError),
        (lambda x: x[x > 0], Untraceable),
        (lambda x: x.unique(), Untraceable),
    ],
    ids=["item", "if", "mask", "unique"],
)
def test_what_depends_on_values_is_refused(function, error):
    x = torch.randn(4)
    with pytest.raises(error):
        record(lambda: [function(x)], [x])


def test_values_that_are_the_same_in_every_run_may_be_fetched():
    x = torch.randn(4)
    recording, _ = record(lambda: [x * torch.full((3,), 2.0).sum().item()], [x])
    assert torch.equal(play_back(recording)(x)[0], x * 6)
