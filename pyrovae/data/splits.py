"""A data set as its training, validation and test parts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.rows import Rows

if TYPE_CHECKING:
    from pyrovae.data.music import PianoRoll
    from pyrovae.data.schema import Schema
    from pyrovae.data.series import TimeSeries
    from pyrovae.data.sounds import Spectrogram
    from pyrovae.data.text import Vocabulary


_NUM_IN_FINGERPRINT = 100  # data of each part
_FINGERPRINT_ERROR = 1e-3  # far above rounding, far below other data


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: it unpacks into x and labels.

    Args:
        x: the data, ``(size, *x_shape)``, float32; those of a large file as :class:`~pyrovae.data.Rows`, which stay on
            the disk.
        labels: their classes, ``(size,)``, int64, or None for data without labels.
        rows: their row numbers in the file, counted from 1, ``(size,)``, int64; None for data that are no rows.
        context: of the rows of a table, the cells that a model conditions on, ``(size, len(schema.context))``, NaN
            where missing; None where there are none.
    """

    x: Any  # a tensor or Rows
    labels: Tensor | None
    rows: Tensor | None = None
    context: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.x, self.labels))


@dataclass(frozen=True, eq=False)
class Splits:
    """The training, validation and test parts of a data set: it unpacks into these three.

    Args:
        train: the training part.
        validation: the validation part.
        test: the test part.
        schema: the columns of a table, whose encoded rows are the data; None for other data.
        vocabulary: the words of a text, whose lines are the data; None for other data.
        spectrogram: how sounds became the levels that are the data; None for other data.
        piano_roll: how songs became the keys that are the data; None for other data.
        time_series: how the rows of a table became the steps of sequences that are the data; None for other data.
    """

    train: Split
    validation: Split
    test: Split
    schema: "Schema | None" = field(default=None, kw_only=True)
    vocabulary: "Vocabulary | None" = field(default=None, kw_only=True)
    spectrogram: "Spectrogram | None" = field(default=None, kw_only=True)
    piano_roll: "PianoRoll | None" = field(default=None, kw_only=True)
    time_series: "TimeSeries | None" = field(default=None, kw_only=True)

    def __iter__(self) -> Iterator[Split]:
        return iter((self.train, self.validation, self.test))

    def fingerprint(self) -> list[list[float]]:
        """Returns numbers that other data, or the same in another order, do not share: for each part, its size and a
        sum over each of 100 data. They are close, not equal, where another machine rounds otherwise."""
        return [_fingerprint(part) for part in self]

    def has_fingerprint(self, numbers: list[list[float]]) -> bool:
        """Returns whether the data have a fingerprint that was taken before."""
        return all(
            len(now) == len(before) and np.allclose(now, before, rtol=0, atol=_FINGERPRINT_ERROR)
            for now, before in zip(self.fingerprint(), numbers, strict=True)
        )


def _fingerprint(part: Split) -> list[float]:
    size = len(part.x)
    count = min(size, _NUM_IN_FINGERPRINT)
    rows = torch.arange(count) * size // max(count, 1)
    total = torch.zeros(count, dtype=torch.float64)
    for values in (part.x, part.labels, part.context) if count else ():
        if values is not None:
            chosen = values[rows].cpu().double().reshape(count, -1).nan_to_num(nan=7.0)
            chosen = chosen.sign() * (1e3 * chosen.abs()).log1p()  # so that small columns count beside large ones
            # Mean squares of one, and different for all columns.
            weights = 2**0.5 * torch.cos(torch.arange(chosen.shape[1], dtype=torch.float64))
            total += chosen @ weights / chosen.shape[1] ** 0.5
    return [size, *(round(value, 6) for value in total.tolist())]


def random_splits(x: Tensor | Rows, labels: Tensor | None = None, *, validation: int, test: int) -> Splits:
    """Splits data in a random order that is always the same; the training part is the remainder.

    Args:
        x: the data, ``(size, *x_shape)``; of :class:`~pyrovae.data.Rows` none is read.
        labels: their classes, ``(size,)``, or None.
        validation: size of the validation part.
        test: size of the test part.

    >>> [len(split.x) for split in random_splits(torch.zeros(100, 2), validation=10, test=20)]
    [70, 10, 20]
    """
    parts = random_rows(len(x), validation=validation, test=test)
    taken = x.__getitem__ if isinstance(x, Tensor) else lambda rows: x.select(rows.numpy())
    return Splits(*(Split(taken(rows), None if labels is None else labels[rows], rows + 1) for rows in parts))


def random_rows(size: int, *, validation: int, test: int) -> tuple[Tensor, ...]:
    """Returns the rows of the three parts of :func:`random_splits`, counted from 0."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(size))  # NumPy guarantees that this never changes
    return order.split([size - validation - test, validation, test])


def split_by_tenths(path: Path, x: Tensor | Rows, labels: Tensor | None) -> Splits:
    """Returns 8/10, 1/10 and 1/10 of the data of a file, in a random order that is always the same."""
    if len(x) < 3:
        raise ValueError(f"{path} holds {len(x)} data, too few to split into train, validation and test.")
    tenth = max(1, len(x) // 10)
    return random_splits(x, labels, validation=tenth, test=tenth)
