"""What models and guides are called with: what of it belongs to rows of the data, and how rows are taken.

Data may be tensors, NumPy arrays, anything with ``to_numpy`` (a column or a table of pandas), lists and tuples, packed
sequences, and dicts, lists and tuples of these. What holds an entry a datum is cut along with the others. Numbers, strings,
``None``, functions, tensors without dimensions and other objects belong to all data and are passed on as they are.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import register_pytree_node, tree_leaves
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["Arguments"]

_ROWS = 1000  # that the loader of a data set takes at once


class Arguments:
    """A batch, or data in memory, with keywords: what a model and a guide are called with.

    For :func:`pyrovae.fit`, whose data otherwise become positional arguments; also from a loader's ``collate_fn`` or a
    ``transform``.

    Args:
        *args: positional arguments.
        **kwargs: keyword arguments.

    >>> batch = Arguments(torch.zeros(2, 3), mask=torch.ones(2, 3))
    >>> len(batch.args), list(batch.kwargs)
    (1, ['mask'])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    def pin_memory(self) -> "Arguments":
        """Returns the same with tensors in pinned memory, as a ``DataLoader`` asks for."""
        args, kwargs = tree_map(lambda t: t.pin_memory(), (self.args, self.kwargs))
        return Arguments(*args, **kwargs)


class _Entries:
    """A list or a tuple that was found to have an entry a datum."""


class _Members:
    """A list or a tuple whose members were found to have entries each, so that it is one of several things."""


class _EntryList(_Entries, list):
    pass


class _EntryTuple(_Entries, tuple):
    pass


class _MemberList(_Members, list):
    pass


class _MemberTuple(_Members, tuple):
    pass


# Kept in their types: from fewer rows, another kind might be found.
for _kind in (_EntryList, _EntryTuple, _MemberList, _MemberTuple):
    register_pytree_node(_kind, lambda x: (list(x), None), lambda x, _, kind=_kind: kind(x))


def as_arguments(batch: Any) -> Arguments:
    """Returns what a loader gives as arguments: tuples and lists are positional ones, all else is a single one."""
    if isinstance(batch, Arguments):
        return batch
    if isinstance(batch, (tuple, list)) and not isinstance(batch, (PackedSequence, _Entries)):
        return Arguments(*batch)
    return Arguments(batch)


def named(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns all arguments with the names that messages call them by."""
    return [*((f"argument {i + 1}", value) for i, value in enumerate(args)), *kwargs.items()]


def count_data(args: tuple, kwargs: dict[str, Any]) -> int:
    """Returns the number of data: of rows of the first tensor, array or packed sequence; else of entries of the first list.

    Raises:
        ValueError: when nothing says how many there are.
    """
    if args and isinstance(args[0], Tensor) and args[0].dim() > 0:
        return len(args[0])
    return _counted(named(args, kwargs))[1]


def _counted(given: list[tuple[str, Any]]) -> tuple[str, int]:
    """Returns the name of what says how many data there are, and the number."""
    undecided = []
    for name, value in _leaves(given):
        size = _size(value)
        if size is not None:
            return name, size
        if isinstance(value, (list, tuple)):
            undecided.append((name, value))
    for name, value in undecided:
        sizes = [_first_size(entry) for entry in value]
        known = set(sizes) - {None}
        if not value:
            continue
        if len(known) != 1 or known == {len(value)}:  # numbers and words, or sequences of any length
            return name, len(value)
        (size,) = known
        if None in sizes:
            return name, size
        raise ValueError(
            f"{name} is a {_kind_of(value)} of {len(value)} with {size} rows each: are these {len(value)} data, or {size}? "
            f"For {len(value)}, give a tensor with an entry a datum beside it; for {size}, give a dict, or an argument each."
        )
    raise ValueError(
        "there is no tensor, array or list among the arguments: give at least one, with an entry a datum along its first "
        "dimension."
    )


def canonicalize(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], int]:
    """Returns arguments with arrays as tensors and lists marked as entries or members, and the number of data.

    Floating-point arrays get the type of the floating-point tensors beside them, or the default one; those of strings and
    objects stay arrays.

    Raises:
        ValueError: when something has rows or entries, but not one a datum, or may be taken in two ways.
    """
    args, kwargs = as_tensors(args, kwargs)
    given = named(args, kwargs)
    first, size = _counted(given)
    if size == 0:
        raise ValueError(f"{first} is empty{_shape(dict(_leaves(given)).get(first))}. Give at least one datum.")
    decided = [_decided(name, value, first, size) for name, value in given]
    return tuple(decided[: len(args)]), dict(zip(kwargs, decided[len(args) :], strict=True)), size


def as_tensors(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns arguments with arrays, and what gives them by ``to_numpy``, as tensors."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return args, kwargs
    dtype = next(
        (t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()),
        torch.get_default_dtype(),
    )

    def convert(x: Any) -> Any:
        if not isinstance(x, (np.ndarray, Tensor)) and hasattr(x, "to_numpy"):
            x = x.to_numpy()
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
            return x
        x = np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(x).to(dtype) if x.dtype.kind == "f" else torch.from_numpy(x)

    return tree_map(convert, (args, kwargs))


def take(value: Any, rows: slice | Tensor) -> Any:
    """Returns some rows of settled arguments: of a tensor, or of all that they hold."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value
        return value[rows] if isinstance(rows, slice) else value.index_select(0, rows.to(value.device))
    if isinstance(value, np.ndarray):
        return value if value.ndim == 0 else value[rows if isinstance(rows, slice) else rows.cpu().numpy()]
    if isinstance(value, PackedSequence):
        return _of_packed(value, rows)
    if isinstance(value, _Entries):
        return type(value)(value[rows] if isinstance(rows, slice) else [value[i] for i in rows.tolist()])
    return _rebuilt(value, lambda x: take(x, rows))


def take_rows(rows: slice | Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns settled arguments for some of the data."""
    return tuple(take(x, rows) for x in args), {name: take(x, rows) for name, x in kwargs.items()}


def to_device(args: tuple, kwargs: dict[str, Any], device: torch.device | str) -> tuple[tuple, dict[str, Any]]:
    """Returns arguments with their tensors on a device."""
    return tree_map(
        lambda t: t.to(device, non_blocking=True) if isinstance(t, (Tensor, PackedSequence)) else t, (args, kwargs)
    )


def tensors_of(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns all tensors in arguments."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return list(args)
    found: list[Tensor] = []
    tree_map(lambda x: found.extend(t for t in tree_leaves(x) if isinstance(t, Tensor)), (args, kwargs))
    return found


def holds_packed(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Returns whether there is a packed sequence in arguments."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return False
    found: list[bool] = []
    tree_map(lambda x: found.append(isinstance(x, PackedSequence)), (args, kwargs))
    return any(found)


def named_tensors(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Returns all tensors in arguments with the names that messages call them by."""
    found = []
    for name, value in _leaves(named(args, kwargs)):
        found += [(name, t) for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def elements_per_datum(args: tuple, kwargs: dict[str, Any], size: int) -> float:
    """Returns how many numbers a datum has in the largest of so many data's tensors, at least 1."""
    return max(1.0, max((t.numel() for t in tensors_of(args, kwargs)), default=0) / size)


def tree_map(function: Callable, value: Any) -> Any:
    """Returns arguments with what a function makes of each thing in containers of any kind."""
    if isinstance(value, (Mapping, _Members)) or _is_record(value):
        return _rebuilt(value, lambda x: tree_map(function, x))
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):
        return type(value)(tree_map(function, x) for x in value)
    return function(value)


def as_loader(args: tuple, kwargs: dict[str, Any]) -> DataLoader | None:
    """Returns the loader if there is one, and nothing else, among arguments, after checking that it keeps the order.

    A data set gets a loader that takes its data in order.

    Raises:
        ValueError: when it draws the data in a random order.
        TypeError: when there are other positional arguments beside it.
    """
    if not any(isinstance(x, (DataLoader, Dataset)) for x in (*args, *kwargs.values())):
        return None
    if len(args) != 1 or not isinstance(args[0], (DataLoader, Dataset)):
        raise TypeError(
            "a DataLoader or a Dataset gives all that belongs to a datum: give nothing beside it but keywords that are for all data."
        )
    loader = args[0] if isinstance(args[0], DataLoader) else DataLoader(args[0], _ROWS)
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    for sampler in samplers:
        shuffled = isinstance(sampler, DistributedSampler) and (sampler.shuffle or sampler.num_replicas > 1)
        if shuffled or isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
            raise ValueError(
                f"the DataLoader takes data by a {type(sampler).__name__}, but results come in the order of the data. Give one "
                "with shuffle=False."
            )
    return loader


def in_memory(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], int]:
    """Returns settled arguments, those of a loader in memory, and the number of data."""
    loader = as_loader(args, kwargs)
    if loader is None:
        return canonicalize(args, kwargs)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed, also where it needs none
        batches = [canonicalize(batch.args, batch.kwargs | kwargs)[:2] for batch in map(as_arguments, loader)]
    if not batches:
        raise ValueError("there is no batch of data. Give at least one datum, and a DataLoader that does not drop it.")
    joined = _joined([dict(enumerate(args)) | named for args, named in batches])
    places = range(len(batches[0][0]))
    return canonicalize(tuple(joined[i] for i in places), {name: x for name, x in joined.items() if name not in places})


_placed: ContextVar[int | Tensor | None] = ContextVar("placed", default=None)


@contextmanager
def row_positions(rows: int | Tensor | None) -> Iterator[None]:
    """Has messages inside name rows by their places in the data: the first of a run of rows, or the place of each."""
    token = _placed.set(rows)
    try:
        yield
    finally:
        _placed.reset(token)


def row_name(row: int) -> str:
    """Returns how a message calls a row of what a model was called with, by its place in the data where that is known."""
    rows = _placed.get()
    if isinstance(rows, Tensor):
        rows, row = (0, int(rows[row])) if row < len(rows) else (None, row)
    return f"row {row} of the batch" if rows is None else f"row {rows + row} of the data"


@contextmanager
def explain_type_errors(args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Raises a TypeError that says what an argument is to be instead, where its type is the matter."""
    try:
        yield
    except TypeError as error:
        hints = {
            "positional argument": "Hand keywords over as pyrovae.Arguments(x, mask=mask), a dict of them as Arguments(**batch)",
            "expected np.ndarray": "Arrays are handed to model and guide as tensors: torch.as_tensor takes both",
        }
        for cause, hint in hints.items():
            if cause in str(error):
                raise TypeError(f"{error}. {hint}.") from error
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if not ("dtype" in text or "scalar type" in text or "expected" in text) or not (
            "double" in text or "float64" in text
        ):
            raise
        kinds = {name: t.dtype for name, t in named_tensors(args, kwargs) if t.is_floating_point()}
        doubles = [name for name, kind in kinds.items() if kind == torch.float64]
        if doubles:
            raise TypeError(
                f"{doubles[0]} is of float64, but the networks compute in float32: give it in single "
                "precision, by .float(), or make the networks double precision by .double()."
            ) from error
        if not kinds:
            raise
        name, kind = next(iter(kinds.items()))
        raise TypeError(
            f"{name} is of {str(kind).removeprefix('torch.')}, but the networks compute in float64: give it as a tensor of float64 "
            "(torch.from_numpy keeps an array's), or make the networks single precision by .float()."
        ) from error


def _leaves(given: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yields what dicts and the like hold, by name; lists and tuples that are not marked yet stay whole."""
    for name, value in given:
        if isinstance(value, Mapping):
            yield from _leaves([(f"{name}[{key!r}]", x) for key, x in value.items()])
        elif isinstance(value, _Members) or _is_record(value):
            yield from _leaves([(f"{name}[{i}]", x) for i, x in enumerate(value)])
        else:
            yield name, value


def _is_record(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence)


def _size(value: Any) -> int | None:
    """Returns how many rows something has by itself; None where it has none, or may be taken in two ways."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() > 0 else None
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim > 0 else None
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])
    return len(value) if isinstance(value, _Entries) else None


def _first_size(value: Any) -> int | None:
    return next((size for _, x in _leaves([("", value)]) if (size := _size(x)) is not None), None)


def _decided(name: str, value: Any, first: str, size: int) -> Any:
    """Returns a value with its lists marked as entries or members; checks that all that has rows has one a datum."""
    own = _size(value)
    if own is not None:
        if own != size:
            raise ValueError(
                f"{first} has {size} rows but {name} has {own}: give one row a datum in each. What is for all data, let model and "
                "guide take from elsewhere than an argument."
            )
        return value
    if isinstance(value, Mapping):
        return _rebuilt(value, lambda key, x: _decided(f"{name}[{key!r}]", x, first, size), with_keys=True)
    if isinstance(value, _Members) or _is_record(value):
        parts = iter([_decided(f"{name}[{i}]", x, first, size) for i, x in enumerate(value)])
        return _rebuilt(value, lambda x: next(parts))
    if not isinstance(value, (list, tuple)) or isinstance(value, PackedSequence) or not value:
        return value
    kind = 0 if isinstance(value, list) else 1
    is_entries, is_members = len(value) == size, _are_members(value, size)
    if is_entries and is_members and size > 1:
        raise ValueError(
            f"{name} is a {_kind_of(value)} of {size} with {size} rows each, and there are {size} data: does it have an entry a datum, or "
            "a row a datum in each? Stack it to one tensor for the former; give a dict for the latter."
        )
    if is_entries:
        return (_EntryList, _EntryTuple)[kind](value)
    if is_members:
        parts = [_decided(f"{name}[{i}]", x, first, size) for i, x in enumerate(value)]
        return (_MemberList, _MemberTuple)[kind](parts)
    raise ValueError(
        f"{first} has {size} rows but {name} is a {_kind_of(value)} of {len(value)}: does it belong to data? Then give an entry a "
        "datum. If it is for all data, let model and guide take it from elsewhere than an argument, such as functools.partial."
    )


def _are_members(value: Any, size: int) -> bool:
    """Returns whether things in a list have rows, one a datum each; those without any do not count."""
    sizes = []
    for _, x in _leaves([("", x) for x in value]):
        nested = isinstance(x, (list, tuple)) and not isinstance(x, (PackedSequence, _Entries))
        own = (size if len(x) == size or _are_members(x, size) else len(x)) if nested else _size(x)
        if own is not None:
            sizes.append(own)
    return bool(sizes) and all(own == size for own in sizes)


def _kind_of(value: Any) -> str:
    return "list" if isinstance(value, list) else "tuple"


def _shape(value: Any) -> str:
    return f": shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""


def _rebuilt(value: Any, function: Callable, with_keys: bool = False) -> Any:
    """Returns a dict, a record or several things with what a function makes of each member; all else as it is."""
    if isinstance(value, Mapping):
        items = {key: function(key, x) if with_keys else function(x) for key, x in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        new = copy(value)
        for key, x in items.items():
            new[key] = x
        return new
    if _is_record(value):
        return type(value)(*map(function, value))
    return type(value)(map(function, value)) if isinstance(value, _Members) else value


def _of_packed(value: PackedSequence, rows: slice | Tensor) -> PackedSequence:
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    if isinstance(rows, slice):
        padded, lengths = padded[rows], lengths[rows]
    else:
        padded, lengths = padded.index_select(0, rows.to(padded.device)), lengths.index_select(0, rows.cpu())
    # Those in the order of their lengths stay so.
    in_order = value.sorted_indices is None and isinstance(rows, slice)
    return pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=in_order)


def _joined(parts: list[Any]) -> Any:
    """Returns the data of several batches as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.dim() > 0 else first
    if isinstance(first, np.ndarray):
        return np.concatenate(parts) if first.ndim > 0 else first
    if isinstance(first, PackedSequence):
        sequences = [x[:n] for part in parts for x, n in zip(*pad_packed_sequence(part, batch_first=True), strict=True)]
        return torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    if isinstance(first, _Entries):
        return type(first)(x for part in parts for x in part)
    if isinstance(first, Mapping):
        return _rebuilt(first, lambda key, _: _joined([part[key] for part in parts]), with_keys=True)
    if isinstance(first, _Members) or _is_record(first):
        columns = iter([_joined(list(column)) for column in zip(*parts, strict=True)])
        return _rebuilt(first, lambda _: next(columns))
    return first
