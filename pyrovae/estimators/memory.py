"""How many data and samples fit in a memory budget, measured on small runs."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchFunctionMode):
    """Counts the bytes of all tensors that torch functions return in its context: an estimate of peak memory.

    >>> import torch
    >>> with Allocations() as allocations:
    ...     x = torch.zeros(10) + 1
    >>> allocations.bytes()
    80
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, UntypedStorage] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # kept alive, so that no other storage gets the same address
                self.storages[storage.data_ptr()] = storage
        return out

    def bytes(self) -> int:
        """Returns the total size of the storages, each counted once."""
        return sum(storage.nbytes() for storage in self.storages.values())


class PeakMemory(TorchFunctionMode):
    """Measures the most bytes that tensors of torch functions hold at once in its context.

    >>> import torch
    >>> with PeakMemory() as peak:
    ...     for _ in range(5):
    ...         x = torch.zeros(10)
    ...         del x
    >>> peak.bytes
    40
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._now = 0
        self._holders: dict[int, int] = {}  # tensors by the address of their storage

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                held = self._holders.get(address, 0)
                self._holders[address] = held + 1
                self._now += 0 if held else size
                self.bytes = max(self.bytes, self._now)
                weakref.finalize(tensor, self._release, address, size).atexit = False
        return out

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self._now -= size


def clamp(n: float, largest: int) -> int:
    """Returns n rounded down, at least 1 and at most `largest`."""
    return max(1, min(int(n), largest))


def split_evenly(total: int, size: int) -> list[int]:
    """Returns chunk sizes that sum to `total`, none above `size`; all equal, except that the last may be smaller.

    >>> split_evenly(10, 4)
    [4, 4, 2]
    """
    chunk = -(-total // -(-total // size))
    return [chunk] * (total // chunk) + [total % chunk] * (total % chunk > 0)
