"""A data set as its training, validation and test parts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyrovae.data.schema import Schema


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: it unpacks into x and labels.

    Args:
        x: the data, ``(size, *x_shape)``, float32.
        labels: their classes, ``(size,)``, int64, or None for data without labels.
        rows: their row numbers in the file, counted from 1, ``(size,)``, int64; None for data that are no rows.
    """

    x: Tensor
    labels: Tensor | None
    rows: Tensor | None = None

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
    """

    train: Split
    validation: Split
    test: Split
    schema: "Schema | None" = field(default=None, kw_only=True)

    def __iter__(self) -> Iterator[Split]:
        return iter((self.train, self.validation, self.test))


def random_splits(x: Tensor, labels: Tensor | None = None, *, validation: int, test: int) -> Splits:
    """Splits data in a random order that is always the same; the training part is the remainder.

    Args:
        x: the data, ``(size, *x_shape)``.
        labels: their classes, ``(size,)``, or None.
        validation: size of the validation part.
        test: size of the test part.

    >>> [len(split.x) for split in random_splits(torch.zeros(100, 2), validation=10, test=20)]
    [70, 10, 20]
    """
    parts = random_rows(len(x), validation=validation, test=test)
    return Splits(*(Split(x[rows], None if labels is None else labels[rows], rows + 1) for rows in parts))


def random_rows(size: int, *, validation: int, test: int) -> tuple[Tensor, ...]:
    """Returns the rows of the three parts of :func:`random_splits`, counted from 0."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(size))  # NumPy guarantees that this never changes
    return order.split([size - validation - test, validation, test])
