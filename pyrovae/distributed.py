"""Several processes that train and score as one: data are shared out, gradients added up, results gathered in order."""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyrovae.arguments import as_arguments, as_tensors, canonicalize, take_rows, tensors_of


class World(NamedTuple):
    """This process among those that work together, started by ``torchrun`` or with a process group of their own.

    Args:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this one prints and writes for all."""
        return self.rank == 0

    def shard(self, total: int) -> "Shard":
        """Returns which of so many data are this process's; all of them, with less weight, if there are too few to go round."""
        if total < self.size:
            return Shard(0, total, total, 1 / self.size)
        start, end = self.shard_bounds(total)
        return Shard(start, end - start, total, (end - start) / total)

    def shard_bounds(self, total: int) -> tuple[int, int]:
        """Returns where this process's part of so many data starts and ends; it may hold none."""
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def broadcast_from_rank0(self, value: Callable[[], Any]) -> Any:
        """Returns to all what the first process finds; an error there is raised by all."""
        if self.size == 1:
            return value()
        found: list[Any] = [None, None]
        if self.first:
            try:
                with alone():
                    found = [value(), None]
            except Exception as error:
                found = [None, error]
        distributed.broadcast_object_list(found, src=0, device=_device())
        if found[1] is not None:
            raise found[1]
        return found[0]

    def all_gather(self, value: Any) -> list:
        """Returns to all what each process has, in order."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def all_reduce(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Returns to all the sums over processes of tensors that each has, of the same shapes in the same order."""
        return list(tensors) if self.size == 1 else _together(distributed.all_reduce, tensors)

    def check_same_batches(self, batches: Iterable) -> Iterator:
        """Yields batches, after making sure that the first is the same in all processes."""
        for i, batch in enumerate(batches):
            if i == 0 and self.size > 1:
                sums = self.all_gather([(tuple(t.shape), t.double().sum().item()) for t in _tensors_of(batch)])
                if any(other != sums[0] for other in sums):
                    raise ValueError(
                        "data gives other batches in other processes, of which each is to take its share. Let a loader draw its "
                        "order from torch's random state."
                    )
            yield batch

    @torch.no_grad()
    def broadcast_state(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values of tensors, and its random state, from which all draw alike."""
        if self.size == 1:
            return
        tensors = list(tensors)
        for t, first in zip(tensors, _together(partial(distributed.broadcast, src=0), tensors), strict=True):
            t.copy_(first)
        states = self.broadcast_from_rank0(
            lambda: (torch.get_rng_state(), torch.cuda.get_rng_state() if _on_gpu() else None)
        )
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])


def _together(act: Callable[[Tensor], Any], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns what an operation among processes makes of tensors: those of a type in one piece, for each piece takes a while."""
    tensors = [t.detach() for t in tensors]
    kinds: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        kinds.setdefault((t.dtype, t.device), []).append(i)
    for places in kinds.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in places])
        act(flat)
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
            tensors[i] = part.view_as(tensors[i])
    return tensors


class Shard(NamedTuple):
    """Some of the data of a batch.

    Args:
        start: the first of them.
        count: how many.
        total: data of the batch.
        weight: what their mean counts in that of the batch.
    """

    start: int
    count: int
    total: int
    weight: float

    def rows(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns these data of what a model is called with."""
        if self.count == self.total:
            return args, kwargs
        args, kwargs, _ = canonicalize(args, kwargs)
        return take_rows(slice(self.start, self.start + self.count), args, kwargs)

    def noise(self) -> AbstractContextManager:
        """Returns a context inside of which noise for these data is what one process would draw for them."""
        return nullcontext() if self.count == self.total else _Noise(self)


# What draws for each element by itself, and what draws a vector from each, whose last dimension is not the data's.
_EACH = (
    "normal normal_ randn randn_like uniform_ rand rand_like bernoulli bernoulli_ exponential_ log_normal_ cauchy_ geometric_ "
    "randint randint_like random_ poisson binomial _standard_gamma native_dropout"
).split()
_VECTORS = ("multinomial", "_sample_dirichlet")


class _Noise(TorchDispatchMode):
    """Draws for all data of a batch, and takes what is for a share of them.

    Processes of one random state then draw what a single one would. The dimension of the data is told by its size: the last
    but one, of latents that are vectors, else the first of that size; else one that holds several draws for each. Were it mistaken
    for another, the noise would be as good, but another.
    """

    def __init__(self, shard: Shard):
        super().__init__()
        self.shard = shard

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name not in _EACH and name not in _VECTORS:
            return func(*args, **kwargs)
        given = tree_leaves((args, kwargs), is_leaf=_is_shape)
        shapes = [
            tuple(x.shape) if isinstance(x, Tensor) else tuple(x)
            for x in given
            if isinstance(x, Tensor) or _is_shape(x)
        ]
        place = self._place(max(shapes, key=len, default=()), name in _VECTORS)
        if place is None:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(lambda x: self._widened(x, place), (args, kwargs), is_leaf=_is_shape)
        drawn = tree_map(lambda x: self._own(x, place), func(*wide_args, **wide_kwargs))
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn

    def _place(self, shape: tuple[int, ...], are_vectors: bool) -> int | None:
        """Returns the dimension of the data, counted from the last; None if there is none."""
        places = list(range(-len(shape), -1 if are_vectors else 0))
        places.sort(key=lambda i: i != -2)
        exact = [i for i in places if shape[i] == self.shard.count]
        several = [i for i in places if shape[i] > 0 and shape[i] % self.shard.count == 0]
        return next(iter(exact + several), None)

    def _widened(self, x: Any, place: int) -> Any:
        start, count, total, _ = self.shard
        if isinstance(x, Tensor) and x.dim() >= -place and x.shape[place] and x.shape[place] % count == 0:
            rows = (torch.arange(total, device=x.device) - start).clamp(0, count - 1)
            rows = (count * torch.arange(x.shape[place] // count, device=x.device).unsqueeze(1) + rows).flatten()
            return x.index_select(x.dim() + place, rows)
        if _is_shape(x):
            at = len(x) + place
            return [*x[:at], x[at] // count * total, *x[at + 1 :]]
        return x

    def _own(self, x: Tensor, place: int) -> Tensor:
        start, count, total, _ = self.shard
        at = x.dim() + place
        return x.unflatten(at, (-1, total)).narrow(at + 1, start, count).flatten(at, at + 1)


_ALONE: list[bool] = []  # not empty while one process does what the others only hear of


@contextmanager
def alone() -> Iterator[None]:
    """Makes this process one of one, for what it does inside without the others."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


def init_process_group(device: torch.device | str | None = None) -> World:
    """Returns this process among those it works with, and joins them if ``torchrun`` has started it; else, one of one.

    Args:
        device: where it computes; a GPU talks by NCCL, all else by gloo.
    """
    if _ALONE or not distributed.is_available():
        return World(0, 1)
    if not distributed.is_initialized() and distributed.is_torchelastic_launched():
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(distributed.rendezvous("env://"))
        # The store outlives processes that were killed, and those that are started anew must not hear of their addresses.
        store = distributed.PrefixStore(f"life {_restarts()}", store)
        distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    if not distributed.is_initialized():
        return World(0, 1)
    return World(distributed.get_rank(), distributed.get_world_size())


def was_restarted() -> bool:
    """Returns whether ``torchrun`` has started the processes anew, after one of them failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _on_gpu() -> bool:
    return distributed.get_backend() == "nccl"


def _device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else None


def _is_shape(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(isinstance(n, int) for n in x)


def _tensors_of(batch: Any) -> list[Tensor]:
    batch = as_arguments(batch)
    return tensors_of(*as_tensors(batch.args, batch.kwargs))
