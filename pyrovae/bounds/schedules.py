"""Numbers that change from one training step to the next, such as the weight of a KL divergence."""

import math
from abc import ABC, abstractmethod
from typing import Any, NoReturn, cast

from torch import Tensor

from pyrovae.inference.messages import Untraceable, described
from pyrovae.recorded import NumbersChecked


class Schedule(NumbersChecked, ABC):
    """Base of numbers that change from one training step to the next; the bound counts the steps.

    :func:`pyrovae.fit` sets `steps_per_epoch`, for schedules that count epochs.
    """

    steps_per_epoch: int | None = None

    @property
    @abstractmethod
    def span(self) -> int:
        """Steps until the schedule finishes, once."""

    @abstractmethod
    def __call__(self, step: int | None) -> float:
        """Returns the number after `step` steps; at the end of the schedule if None, as in evaluation."""

    def __repr__(self) -> str:
        return described(self)


class Linear(Schedule):
    r"""A linear warm-up, constant from its end on.

    .. math:: \beta_t = \beta_0 + \min(t / T, 1)\, (\beta_T - \beta_0)

    Args:
        steps: training steps :math:`T`, at least 1.
        start: the number at the first step, exactly.
        end: the number from step `steps` on.
        epochs: in place of `steps`, the number of epochs that make :math:`T`, at least 1.

    Raises:
        ValueError: unless one of `steps` and `epochs` is given, when it is below 1, or a number is negative or not
            finite; when it counts epochs outside of :func:`pyrovae.fit`, or those of data whose length is not known.

    References:
        Generating Sentences from a Continuous Space, S. R. Bowman, L. Vilnis, O. Vinyals, A. M. Dai, R. Jozefowicz and
        S. Bengio, 2016, https://arxiv.org/abs/1511.06349; Ladder Variational Autoencoders, C. K. Sønderby et al., 2016,
        https://arxiv.org/abs/1602.02282.

    >>> beta = Linear(steps=100)
    >>> beta(0), beta(50), beta(1000)
    (0.0, 0.5, 1.0)
    """

    def __init__(self, steps: int | None = None, start: float = 0.0, end: float = 1.0, epochs: int | None = None):
        if (steps is None) == (epochs is None):
            raise ValueError(f"give steps or epochs, one of them, got steps={steps} and epochs={epochs}.")
        for name, value in (("steps", steps), ("epochs", epochs)):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.steps, self.epochs = steps, epochs
        self.start, self.end = check_weight("start", start), check_weight("end", end)

    def __call__(self, step: int | None) -> float:
        share = 1.0 if step is None else min(step / self.span, 1.0)
        return self.start + share * (self.end - self.start)

    @property
    def span(self) -> int:
        if self.epochs is None:
            return cast(int, self.steps)
        if self.steps_per_epoch is None:
            raise ValueError(
                f"{self!r} counts epochs, and the number of steps of an epoch is not known here: give steps instead. "
                "fit knows it for data that have a length."
            )
        return self.epochs * self.steps_per_epoch


class Cyclical(Schedule):
    r"""A periodic warm-up: linear over the first part of each period, constant over the rest.

    .. math:: \beta_t = \beta_0 + \min\left(\frac{t \bmod T}{r T}, 1\right) (\beta_T - \beta_0)

    Args:
        period: training steps :math:`T` of a cycle, at least 1.
        start: the number at the first step of a cycle, exactly.
        end: the number after the linear part.
        ramp: the fraction :math:`r` of a cycle that is linear, above 0 and at most 1.

    Raises:
        ValueError: when an argument is out of range.

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, H. Fu, C. Li, X. Liu, J. Gao,
        A. Celikyilmaz and L. Carin, 2019, https://arxiv.org/abs/1903.10145.

    >>> beta = Cyclical(period=100)
    >>> beta(25), beta(75), beta(100)
    (0.5, 1.0, 0.0)
    """

    def __init__(self, period: int, start: float = 0.0, end: float = 1.0, ramp: float = 0.5):
        if not period >= 1:
            raise ValueError(f"period must be at least 1, got {period}.")
        if not 0 < ramp <= 1:
            raise ValueError(f"ramp must be above 0 and at most 1, got {ramp}.")
        self.period, self.ramp = period, ramp
        self.start, self.end = check_weight("start", start), check_weight("end", end)

    def __call__(self, step: int | None) -> float:
        share = 1.0 if step is None else min(step % self.period / (self.ramp * self.period), 1.0)
        return self.start + share * (self.end - self.start)

    @property
    def span(self) -> int:
        return self.period


class ScheduledStep:
    """A symbolic training step, with the values of schedules as tensors: a graph with it holds for all steps.

    Args:
        numbers: scalar tensors, by the id of a schedule.

    Raises:
        Untraceable: when it is used as a number, which would fix the step in the graph.
    """

    def __init__(self, numbers: dict[int, Tensor]):
        self.numbers = numbers

    def at(self, schedule: Schedule) -> Tensor:
        if id(schedule) not in self.numbers:
            raise Untraceable(f"{schedule!r} is not an attribute of the bound or of its penalty")
        return self.numbers[id(schedule)]

    def __add__(self, steps: int) -> "ScheduledStep":
        return self

    def _refuse(self, *_: Any) -> NoReturn:
        raise Untraceable(
            "it computes with the training step, which would stay constant in a graph: use an attribute that is a "
            "Schedule"
        )

    __index__ = __int__ = __float__ = __bool__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __sub__ = __rsub__ = __mod__ = __floordiv__ = _refuse


def value_at(number: float | Schedule, step: "int | ScheduledStep | None") -> float | Tensor:
    if not isinstance(number, Schedule):
        return number
    return step.at(number) if isinstance(step, ScheduledStep) else number(step)


def check_weight(name: str, value: float) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, or an instance of a schedule where one is allowed, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
    return value
