"""Batches of data: in memory by index, or by a DataLoader."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Number
from typing import Any, TypeVar

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
from pyrovae.inference.missing import Fills, check_filled
from pyrovae.rows import NumberType, Rows

T = TypeVar("T")


class Batches:
    """Batches of data in memory or in memory maps, taken by index with the same order for all tensors.

    Rows of memory maps and of sparse matrices are taken by a thread while the caller works on the batch before.

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
        return self.each(lambda indices: self.take(indices) if self.named else self.take(indices).args)

    def each(self, function: Callable[[range | Tensor], T]) -> Iterator[T]:
        """Yields what a function makes of the indices of each batch.

        It must draw no random numbers: a thread may call it while the caller works on the batch before.
        """
        if not any(isinstance(x, Rows) and x.is_slow for _, x in named_arrays(self.tensors, self.named)):
            for rows, indices in self._indices():
                self.rows = rows
                yield function(indices)
            return
        with ThreadPoolExecutor(1, "next batch") as pool:
            submitted = ((rows, pool.submit(function, indices)) for rows, indices in self._indices())
            current = next(submitted, None)
            while current is not None:
                following = next(submitted, None)
                self.rows, taken = current
                yield taken.result()
                current = following

    def _indices(self) -> Iterator[tuple[Tensor | int, range | Tensor]]:
        """Yields the places of each batch, as :attr:`rows` has them, and its indices, on the device of the data."""
        if not self.shuffle:
            for start in range(0, self.size, self.batch_size):
                yield start, range(start, min(start + self.batch_size, self.size))
            return
        # Drawn on the CPU, so that the order does not depend on the device of the data, and then moved there at once.
        order = torch.randperm(self.size)
        moved_order = order.to(device_of(self.tensors, self.named), non_blocking=True)
        yield from zip(order.split(self.batch_size), moved_order.split(self.batch_size), strict=True)

    def in_order(self) -> "Batches":
        """Returns batches of the same data, not shuffled."""
        return Batches(self.tensors, self.batch_size, shuffle=False, named=self.named)

    def take(self, indices: range | Tensor) -> Arguments:
        """Returns some of the data, consecutive ones by a range."""
        rows = slice(indices.start, indices.stop) if isinstance(indices, range) else indices
        args, kwargs = take_rows(rows, self.tensors, self.named)
        return Arguments(*args, **kwargs)


def as_batches(
    name: str,
    data: Any,
    batch_size: int,
    shuffle: bool,
    device: torch.device | str | None = None,
    numbers: NumberType | None = None,
    fills: Fills | None = None,
) -> Batches | DataLoader:
    """Returns batches of any kind of data that :func:`pyrovae.fit` takes, and checks data in memory.

    Args:
        name: name of the argument, for messages.
        data: the data.
        batch_size: data a batch, at most all.
        shuffle: whether each pass has a new order. If one batch holds all data, they stay in theirs: rows may be steps
            of a series, or have parameters of their own.
        device: device for data in memory; None to leave them where they are.
        numbers: the type of the numbers that model and guide take.
        fills: whether model and guide fill in rows with NaN.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset) or is_map_style(data):
        pin = device is not None and torch.device(device).type == "cuda"  # pinned memory makes copies asynchronous
        if isinstance(data, IterableDataset):
            return DataLoader(data, batch_size, pin_memory=pin)
        size = len(data)
        if size == 0:
            raise ValueError(f"{name} is empty. Give at least one datum.")
        batch_size = min(batch_size, size)
        return DataLoader(data, batch_size, shuffle=shuffle and batch_size < size, pin_memory=pin)
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
    check_filled(args, kwargs, fills, name)
    devices = {t.device for t in tensors_of(args, kwargs)}
    if device is None and len(devices) > 1:
        raise ValueError(f"{name} holds tensors on {' and '.join(map(str, devices))}. Put them on one device.")
    if device is not None:
        args, kwargs = to_device(args, kwargs, device)
    batch_size = min(batch_size, size)
    return Batches(args, batch_size, shuffle and batch_size < size, kwargs)
