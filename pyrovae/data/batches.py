"""Batches of data: in memory by index, or by a DataLoader."""

import math
from collections.abc import Iterator, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyrovae.arguments import (
    Arguments,
    as_arguments,
    canonicalize,
    count_data,
    device_of,
    is_map_style,
    named_arrays,
    take_rows,
    tensors_of,
    to_device,
)
from pyrovae.inference.messages import check_finite
from pyrovae.rows import NumberType


class Batches:
    """Batches of data in memory, taken by index with the same order for all tensors.

    Args:
        tensors: positional arguments, with the data along the first dimension, all of one length; or other arguments
            that :func:`pyrovae.arguments.canonicalize` returns.
        batch_size: data a batch; the last batch may be smaller.
        shuffle: whether each pass draws a new order from torch's random state.
        named: keyword arguments, if there are any.

    >>> [x.tolist() for x, in Batches([torch.arange(5)], batch_size=2, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, tensors: Sequence[Any], batch_size: int, shuffle: bool, named: dict[str, Any] | None = None):
        self.tensors, self.named, self.batch_size, self.shuffle = tuple(tensors), named or {}, batch_size, shuffle
        self.size = count_data(self.tensors, self.named)
        # The rows of the current batch: their indices, or for consecutive rows the index of the first.
        self.rows: Tensor | int | None = None

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[tuple | Arguments]:
        if not self.shuffle:
            for start in range(0, self.size, self.batch_size):
                self.rows = start
                yield self._take(slice(start, start + self.batch_size))
            return
        # Drawn on the CPU, so that the order does not depend on the device of the data, and then moved there at once.
        order = torch.randperm(self.size)
        moved_order = order.to(device_of(self.tensors, self.named), non_blocking=True)
        for rows, moved_rows in zip(order.split(self.batch_size), moved_order.split(self.batch_size), strict=True):
            self.rows = rows
            yield self._take(moved_rows)

    def in_order(self) -> "Batches":
        """Returns batches of the same data, not shuffled."""
        return Batches(self.tensors, self.batch_size, shuffle=False, named=self.named)

    def _take(self, rows: slice | Tensor) -> tuple | Arguments:
        args, kwargs = take_rows(rows, self.tensors, self.named)
        return Arguments(*args, **kwargs) if kwargs else args


def as_batches(
    name: str,
    data: Any,
    batch_size: int | None,
    shuffle: bool,
    device: torch.device | str | None = None,
    numbers: NumberType | None = None,
) -> Batches | DataLoader:
    """Returns batches of any kind of data that :func:`pyrovae.fit` takes, and checks data in memory.

    Args:
        name: name of the argument, for messages.
        data: the data.
        batch_size: data a batch, at most all; None for large batches, where no gradient is needed.
        shuffle: whether each pass has a new order.
        device: device for data in memory; None to leave them where they are.
        numbers: the type of the numbers that model and guide take.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset) or is_map_style(data):
        pin = device is not None and torch.device(device).type == "cuda"  # pinned memory makes copies asynchronous
        if isinstance(data, IterableDataset):
            return DataLoader(data, batch_size or 1000, pin_memory=pin)
        size = len(data)
        if size == 0:
            raise ValueError(f"{name} is empty. Give at least one datum.")
        return DataLoader(data, min(batch_size or 1000, size), shuffle=shuffle, pin_memory=pin)
    if data is None or isinstance(data, (str, Number)) or callable(data):
        raise TypeError(
            f"{name} must be a tensor, an array, a dict or a tuple of such, a Dataset or a DataLoader, got "
            f"{type(data).__name__}."
        )
    batch = as_arguments(data)
    try:
        args, kwargs, size = canonicalize(batch.args, batch.kwargs, numbers)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for _, x in named_arrays(args, kwargs):
        check_finite(name, x)
    devices = {t.device for t in tensors_of(args, kwargs)}
    if device is None and len(devices) > 1:
        raise ValueError(f"{name} holds tensors on {' and '.join(map(str, devices))}. Put them on one device.")
    if device is not None:
        args, kwargs = to_device(args, kwargs, device)
    return Batches(args, min(batch_size or 1000, size), shuffle, kwargs)
