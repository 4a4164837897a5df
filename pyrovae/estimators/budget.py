"""How long the stages of an estimator take, and for how many data there is time."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

BLOCK = 200  # data that a stage takes at once, at most
_FIRST_BLOCKS = (4, 12)  # under a budget of time: two sizes, from which the time of more data follows
_NUM_TIMES = 6  # latest runs of a stage from which the time of the next is computed


class Kind(Enum):
    """A pilot run, together with the fit of a proposal, or a run that counts."""

    PILOT = "pilot"
    FULL = "full"


class Clock:
    """Measures how long stages take, and says for how many data there is time.

    Args:
        seconds: the budget; None for no limit.
        first: the number of the first stage, which scores the data for which there is no time.
    """

    def __init__(self, seconds: float | None, first: int):
        self.began, self.seconds, self.first = time.monotonic(), seconds, first
        # By number of the stage: data of the latest runs, and seconds.
        self.times: dict[tuple[int, Kind], deque[tuple[int, float]]] = {}
        self.num_blocks: Counter[int] = Counter()  # by number of the stage

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def num_data(self, number: int, waiting: int, largest: int) -> int:
        """Returns how many data a stage may take at once; 0 if time is up.

        Args:
            number: the number of the stage.
            waiting: data that have no result yet: there must be time to score them by the first stage.
            largest: the largest number that memory allows.
        """
        largest = min(largest, BLOCK)
        if self.seconds is None:
            return largest
        block = self.num_blocks[number]
        self.num_blocks[number] += 1
        spare = self.seconds - self.elapsed
        if number != self.first or block >= len(_FIRST_BLOCKS):
            fixed, slope = self._time_of_first()
            spare -= fixed + slope * waiting
        if block < len(_FIRST_BLOCKS):
            return min(_FIRST_BLOCKS[block], largest) if spare > 0 else 0
        lines = [self._line(key) for key in self.times if key[0] == number]  # the pilot run and the full run
        fixed, slope = sum(line[0] for line in lines), max(sum(line[1] for line in lines), 1e-9)
        # Half of the time, so that the other half corrects for an error of the prediction.
        size = (spare / 2 - fixed) / slope
        size = size if size >= 2 else (spare - fixed) / slope
        return min(int(size), largest) if size >= 2 or size >= waiting else 0

    def allows(self, number: int, num_data: int) -> bool:
        """Returns whether there is time for a pilot run of a stage on some more data."""
        if self.seconds is None:
            return True
        fixed, slope = self._line((number, Kind.PILOT)) if (number, Kind.PILOT) in self.times else (math.inf, 0.0)
        return self.elapsed + fixed + slope * num_data < self.seconds

    def _time_of_first(self) -> tuple[float, float]:
        """Returns the seconds of a pilot run of the first stage as a line; of a full run, if it has no other."""
        kind = Kind.PILOT if (self.first, Kind.PILOT) in self.times else Kind.FULL
        return self._line((self.first, kind))

    def _line(self, key: tuple[int, Kind]) -> tuple[float, float]:
        """Returns the seconds of a run as a line in the number of data: those of no datum, and those of each."""
        sizes, seconds = torch.tensor(list(self.times[key]), dtype=torch.double).T
        if len(sizes.unique()) == 1:
            return 0.0, (seconds / sizes).mean().item()
        offset = sizes - sizes.mean()
        slope = ((offset * seconds).sum() / offset.square().sum()).clamp(min=0.0)
        return (seconds.mean() - slope * sizes.mean()).clamp(min=0.0).item(), slope.item()

    @contextmanager
    def measure(self, number: int, kind: Kind, rows: Tensor) -> Iterator[None]:
        """Remembers how long the block takes, for some data."""
        began = self.elapsed
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times = self.times.setdefault((number, kind), deque(maxlen=_NUM_TIMES))
        times.append((len(rows), self.elapsed - began))
