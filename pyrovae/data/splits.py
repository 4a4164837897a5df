"""A data set as its training, validation and test parts."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrovae.rows import Rows


class Split(NamedTuple):
    """One part of a data set.

    Args:
        x: the data, ``(size, *x_shape)``, float32; those of a large file as :class:`~pyrovae.data.Rows`, which stay on
            the disk.
        labels: their classes, ``(size,)``, int64, or None for data without labels.
    """

    x: Any  # a tensor or Rows
    labels: Tensor | None


class Splits(NamedTuple):
    """The training, validation and test parts of a data set."""

    train: Split
    validation: Split
    test: Split


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
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # NumPy guarantees that this never changes
    sizes = [len(x) - validation - test, validation, test]
    taken = x.__getitem__ if isinstance(x, Tensor) else lambda rows: x.select(rows.numpy())
    return Splits(*(Split(taken(rows), None if labels is None else labels[rows]) for rows in order.split(sizes)))


def split_by_tenths(path: Path, x: Tensor | Rows, labels: Tensor | None) -> Splits:
    """Returns 8/10, 1/10 and 1/10 of the data of a file, in a random order that is always the same."""
    if len(x) < 3:
        raise ValueError(f"{path} holds {len(x)} data, too few to split into train, validation and test.")
    tenth = max(1, len(x) // 10)
    return random_splits(x, labels, validation=tenth, test=tenth)
