"""Rows of an array, a memory map or a sparse matrix, which become dense tensors a batch at a time."""

import inspect
import math
import mmap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Rows", "pack_bits"]

_CHUNK = 2**22  # bytes of the rows that checks read at once
_MAPPED = 2**26  # bytes of a memory map that may be in memory, while scattered rows are read
_AROUND = 2**21  # bytes that the system may bring to memory with one row

_NUMPY = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class Rows:
    """Rows of an array, taken as tensors by index; the array itself is neither copied nor converted.

    :func:`pyrovae.fit`, :func:`pyrovae.log_marginal` and the diagnostics take rows from arrays in this way. Large files
    that :func:`pyrovae.data.load` reads are ``Rows`` too: ``rows[:10]``, ``rows[indices]`` and ``rows[mask]`` are
    tensors, ``rows[3]`` is one datum, ``rows[:]`` is all of them in memory. Pages of a memory map that were read are
    given back to the system.

    Args:
        source: an array of numbers, or a memory map, in any order of memory and bytes, which may be read-only; a
            sparse matrix of scipy, whose rows become dense when they are taken; a tensor; or what :func:`pack_bits`
            makes of binary data.
        dtype: the type of the tensors; that of the array by default.
        index: the rows of the array that are meant, in order; all by default.
        divisor: a number by which the tensors are divided, such as 255 for bytes that mean 0 to 1.

    >>> rows = Rows(np.arange(6.0).reshape(3, 2), dtype=torch.float32)
    >>> len(rows), rows.shape
    (3, (3, 2))
    >>> rows[[2, 0]]
    tensor([[4., 5.],
            [0., 1.]])
    """

    def __init__(
        self,
        source: Any,
        dtype: torch.dtype | None = None,
        index: np.ndarray | None = None,
        divisor: float = 1.0,
    ):
        source = _by_rows(source) if is_sparse(source) else source
        if isinstance(source, np.ma.MaskedArray) and source.mask.any():
            raise ValueError(
                f"a masked array hides {int(source.mask.sum()):,} of {source.size:,} numbers, which would be taken as "
                "they are. Give x.filled(numpy.nan) to split_missing and a MissingDataVAE, or fill them."
            )
        self.source: Any = np.asarray(source) if isinstance(source, np.ndarray) else source
        self.dtype: torch.dtype = dtype or (source.dtype if _is_tensor(source) else _torch_dtype(source.dtype))
        self.index, self.divisor = index, divisor
        self.map = _map_of(source)

    def __len__(self) -> int:
        return self.source.shape[0] if self.index is None else len(self.index)

    def __repr__(self) -> str:
        where = "" if self.map is None else ", in a memory map"
        return f"Rows({len(self)} of shape {self.shape[1:]}, {str(self.dtype).removeprefix('torch.')}{where})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor of all rows."""
        return (len(self), *self.source.shape[1:])

    def size(self, dim: int) -> int:
        """Returns the size of the tensor of all rows along a dimension, which torch's ``TensorDataset`` asks for."""
        return self.shape[dim]

    @property
    def is_slow(self) -> bool:
        """Whether rows are read from a file, or made of a sparse matrix."""
        return self.map is not None or is_sparse(self.source)

    @property
    def holds_integers(self) -> bool:
        """Whether the array holds integers, which may have to become floating-point numbers."""
        kind = self.source.dtype
        return kind.kind in "iu" if isinstance(kind, np.dtype) else not (kind.is_floating_point or kind == torch.bool)

    def __getitem__(self, rows: Any) -> Tensor:
        if _is_tensor(self.source):
            rows = rows if self.index is None else torch.from_numpy(self.index)[rows]
            return self._divided(_rows_of(self.source, rows).to(self.dtype))
        rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        kind = _NUMPY.get(self.dtype) if self.source.dtype.kind == "f" else None
        chosen = self._read(rows if self.index is None else self.index[rows])
        with np.errstate(over="ignore"):  # numbers beyond the type become infinite, which checks refuse
            # Always a copy: models may change their batches, but must not change, or fail to change, the array.
            copy = np.array(chosen, dtype=kind or chosen.dtype.newbyteorder("="), order="C")
        if self.map is not None:
            self.map.madvise(mmap.MADV_DONTNEED)
        return self._divided(torch.from_numpy(copy).to(self.dtype))

    def _divided(self, x: Tensor) -> Tensor:
        return x if self.divisor == 1 else x / self.divisor

    def _read(self, rows: Any) -> np.ndarray:
        """Returns rows of the array. Rows that are scattered over a memory map are read some at a time."""
        if is_sparse(self.source):
            return self.source[rows].toarray()
        if self.map is None or np.ndim(rows) == 0 and not isinstance(rows, slice):
            return self.source[rows]
        if isinstance(rows, slice):
            if rows.step in (None, 1):
                return self.source[rows]
            rows = np.arange(*rows.indices(len(self.source)))
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        together = max(1, _MAPPED // (self.source.nbytes // len(self.source) + _AROUND))
        parts = [self.source[:0]]
        for start in range(0, len(rows), together):
            parts.append(self.source[rows[start : start + together]])
            self.map.madvise(mmap.MADV_DONTNEED)
        return np.concatenate(parts)

    def select(self, index: np.ndarray | slice) -> "Rows":
        """Returns some of the rows, without reading them."""
        return self._like(self.dtype, np.arange(len(self))[index] if self.index is None else self.index[index])

    def _like(self, dtype: torch.dtype, index: np.ndarray | None) -> "Rows":
        rows = Rows(self.source, dtype, index, self.divisor)
        rows.map = self.map
        return rows

    def astype(self, dtype: torch.dtype) -> "Rows":
        """Returns the same rows, to be taken in another type."""
        return self._like(dtype, self.index)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields consecutive rows, some megabytes at a time, each time with the number of the first."""
        size = max(1, _CHUNK // max(1, self.dtype.itemsize * math.prod(self.shape[1:])))
        for start in range(0, len(self), size):
            yield start, self[start : start + size]

    def to(self, device: torch.device | str) -> "Rows":
        """Returns the rows with an array in memory on a device; memory maps and sparse matrices stay where they are."""
        if self.is_slow:
            return self
        if _is_tensor(self.source):
            return Rows(self.source.to(device), self.dtype, self.index, self.divisor)
        return Rows(Rows(self.source)[:].to(device), self.dtype, self.index, self.divisor)


def pack_bits(x: Any) -> Rows:
    """Packs binary data eight elements to a byte, a thirty-second of the memory of float32.

    :func:`pyrovae.fit`, :func:`pyrovae.log_marginal` and the diagnostics take the result as data, and widen it a batch
    at a time, on the device where it is: ``fit(vae.model, vae.guide, pack_bits(x))``.

    Args:
        x: a tensor, an array, a memory map, a sparse matrix or :class:`Rows` of zeros and ones, a row a datum.

    Raises:
        ValueError: when there are other numbers.

    >>> packed = pack_bits(torch.eye(3))
    >>> packed[[0, 2]]
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """
    given = x if isinstance(x, Rows) else Rows(x)
    packed = torch.empty(len(given), -(-math.prod(given.shape[1:]) // 8), dtype=torch.uint8)
    for start, rows in given.chunks():
        is_binary = (rows == 0) | (rows == 1)
        if not is_binary.all():
            raise ValueError(
                f"x must be of zeros and ones, got {rows[~is_binary][0].item():g}. Binarise it, for example by "
                "pyrovae.data.static_binarization."
            )
        bits = np.packbits(rows.cpu().numpy().astype(bool).reshape(len(rows), -1), axis=1)
        packed[start : start + len(rows)] = torch.from_numpy(bits)
    dtype = given.dtype if given.dtype.is_floating_point else torch.get_default_dtype()
    return Rows(_Bits(packed, given.shape[1:]), dtype)


class _Bits:
    """Binary numbers, eight to a byte: as much of a tensor of bytes as :class:`Rows` needs.

    Args:
        packed: the bytes of each row, the first number in the highest bit, as of ``numpy.packbits``.
        shape: that of a row.
    """

    dtype = torch.uint8

    def __init__(self, packed: Tensor, shape: tuple[int, ...]):
        self.packed, self.shape = packed, (len(packed), *shape)

    def to(self, device: torch.device | str) -> "_Bits":
        return _Bits(self.packed.to(device), self.shape[1:])

    def __getitem__(self, rows: Any) -> Tensor:
        packed, size = _rows_of(self.packed, rows), math.prod(self.shape[1:])
        if packed.device.type == "cpu":
            wide = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=size))
        else:
            wide = _unpacked(packed, size)
        return wide.reshape(*packed.shape[:-1], *self.shape[1:])


def _unpacked(packed: Tensor, size: int) -> Tensor:
    """Returns what ``numpy.unpackbits`` returns, on any device."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).flatten(-2)[..., :size]


def _is_tensor(source: Any) -> bool:
    return isinstance(source, (Tensor, _Bits))


def _rows_of(source: Any, rows: Any) -> Tensor:
    """Returns rows of a tensor, or of bits."""
    if isinstance(source, Tensor) and isinstance(rows, Tensor):
        rows = rows.to(source.device)
        on_cpu = source.device.type == "cpu"
        if on_cpu and rows.dim() == 1 and rows.dtype == torch.int64 and len(rows) and rows.min() >= 0:
            return source.index_select(0, rows)  # several times as fast as brackets
    return source[rows]


def is_sparse(x: Any) -> bool:
    """Returns whether something is a sparse matrix or array of scipy, which need not be imported."""
    return hasattr(x, "tocsr") and hasattr(x, "nnz")


def _by_rows(x: Any) -> Any:
    """Returns a sparse matrix as a ``csr_array`` that stores each element once; it shares memory where it can.

    Raises:
        ValueError: when it does not have two dimensions, or does not hold real numbers.
    """
    if len(x.shape) != 2 or x.dtype.kind not in "biuf":
        raise ValueError(
            f"a sparse matrix must have two dimensions, a row a datum, and hold real numbers; got shape {x.shape} and "
            f"{x.dtype}."
        )
    from scipy.sparse import csr_array  # slow to import

    x = x if isinstance(x, csr_array) else csr_array(x)
    if not x.has_canonical_format:
        x = x.copy()  # the given matrix is not changed
        x.sum_duplicates()
    return x


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    if dtype.kind == "f" and dtype.itemsize > 8:  # extended precision, which torch does not have
        return torch.float64
    return torch.from_numpy(np.zeros(0, dtype.newbyteorder("="))).dtype


class NumberType(NamedTuple):
    """The type in which a model and a guide take numbers.

    Args:
        dtype: of floating-point numbers; None if it is not known.
        converts: whether tensors are converted to it too, and the data (the first argument) even if they are integers.
    """

    dtype: torch.dtype | None = None
    converts: bool = False


def number_type(*functions: Callable | None) -> NumberType:
    """Returns the type of the numbers that a model and a guide take, by the modules whose methods these are."""
    for function in functions:
        while isinstance(function, partial) or callable(function) and hasattr(function, "__wrapped__"):
            function = function.func if isinstance(function, partial) else inspect.unwrap(function)
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            dtype = getattr(owner, "input_dtype", None)
            if dtype is not None:
                return NumberType(dtype, converts=True)
            found = next((p.dtype for p in owner.parameters() if p.is_floating_point()), None)
            if found is not None:
                return NumberType(found)
    return NumberType()


def _map_of(array: Any) -> Any:
    """Returns the mapping of the file that an array shows, if its pages may be given back; else None."""
    while isinstance(array, np.ndarray):
        # A private mapping (mode "c") would lose changes with its pages.
        if isinstance(array, np.memmap) and array.mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
            return getattr(array, "_mmap", None)
        array = array.base
    return None
