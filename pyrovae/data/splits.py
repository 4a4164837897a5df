"""A data set as its training, validation and test parts."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Split(NamedTuple):
    """One part of a data set.

    Args:
        x: the data, ``(size, *x_shape)``, float32.
        labels: their classes, ``(size,)``, int64, or None for data without labels.
    """

    x: Tensor
    labels: Tensor | None


class Splits(NamedTuple):
    """The training, validation and test parts of a data set."""

    train: Split
    validation: Split
    test: Split


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
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # NumPy guarantees that this never changes
    sizes = [len(x) - validation - test, validation, test]
    return Splits(*(Split(x[rows], None if labels is None else labels[rows]) for rows in order.split(sizes)))
