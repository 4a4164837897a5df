"""Training and scoring in several processes as in one: data are sharded, gradients summed, results gathered."""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyrovae.arguments import as_arguments, as_tensors, canonicalize, take_rows, tensors_of


class World(NamedTuple):
    """This process and those that it works with, started by ``torchrun`` or joined in a process group of the user's.

    Args:
        rank: of this process, from 0.
        size: number of processes.
    """

    rank: int
    size: int

    @property
    def is_rank0(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def shard(self, total: int) -> "Shard":
        """Returns this process's shard of a batch of so many data.

        A batch of fewer data than processes is not divided: each process takes all of it, with a lower weight.
        """
        if total < self.size:
            return Shard(0, total, total, 1 / self.size)
        start, end = self.shard_bounds(total)
        return Shard(start, end - start, total, (end - start) / total)

    def shard_bounds(self, total: int) -> tuple[int, int]:
        """Returns where this process's part of so many data starts and ends; the part may be empty."""
        return self.rank * total // self.size, (self.rank + 1) * total // self.size

    def broadcast_from_rank0(self, value: Callable[[], Any]) -> Any:
        """Broadcasts rank 0's result of a function; an error of rank 0 is raised by all processes."""
        if self.size == 1:
            return value()
        outcome: list[Any] = [None, None]  # the result and the error
        if self.is_rank0:
            try:
                with single_process():
                    outcome = [value(), None]
            except Exception as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, device=_device())
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all_gather(self, value: Any) -> list:
        """Returns the values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Returns the sums over processes of tensors, whose shapes and order must be the same in all processes."""
        return list(tensors) if self.size == 1 else _coalesced(dist.all_reduce, tensors)

    def check_same_batch(self, batch: Any) -> None:
        """Raises a ValueError if a batch is not the same in all processes."""
        if self.size == 1:
            return
        sums = self.all_gather([(tuple(t.shape), t.sum(dtype=torch.double).item()) for t in _tensors_of(batch)])
        if any(other != sums[0] for other in sums):
            raise ValueError(
                "data gives different batches in different processes, but each process must take its shard of the same "
                "batch. Let the loader draw its order from torch's random state."
            )

    @torch.no_grad()
    def broadcast_state(self, tensors: Iterable[Tensor]) -> None:
        """Copies rank 0's values of tensors, and its random state, to all processes, so that all draw the same."""
        if self.size == 1:
            return
        tensors = list(tensors)
        for t, value in zip(tensors, _coalesced(partial(dist.broadcast, src=0), tensors), strict=True):
            t.copy_(value)
        states = self.broadcast_from_rank0(
            lambda: (torch.get_rng_state(), torch.cuda.get_rng_state() if _on_gpu() else None)
        )
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])


def _coalesced(collective: Callable[[Tensor], Any], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Applies a collective operation to tensors, once for all tensors of a type: each call has a latency."""
    tensors = [t.detach() for t in tensors]
    groups: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.dtype, t.device), []).append(i)
    for group in groups.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in group])
        collective(flat)
        for i, part in zip(group, flat.split([tensors[i].numel() for i in group]), strict=True):
            tensors[i] = part.view_as(tensors[i])
    return tensors


class GradientSum:
    """Sums gradients over processes, while the backward pass computes further ones.

    Gradients are sent in buckets of several. The backward pass computes them roughly from the last parameter to the
    first, and so the buckets are filled. Every process sends the same buckets in the same order.

    Args:
        params: the parameters, the same in all processes.
        bucket_bytes: a bucket that has this size, or more, takes no further gradient. Small buckets are slower where no
            core is free for sending: by 5 % with 1 MB in place of 2.6 MB, for two processes on two cores.

    References:
        PyTorch Distributed: Experiences on Accelerating Data Parallel Training, S. Li et al., 2020,
        https://arxiv.org/abs/2006.15704.
    """

    def __init__(self, params: Sequence[Tensor], bucket_bytes: int = 25 * 2**20):
        self.params = params
        self.positions = {id(p): i for i, p in enumerate(params)}
        self.buckets: list[list[int]] = []
        size = 0
        for i in reversed(range(len(params))):
            p = params[i]
            last = params[self.buckets[-1][0]] if self.buckets else None
            if last is None or size >= bucket_bytes or (p.dtype, p.device) != (last.dtype, last.device):
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(i)
            size += p.numel() * p.element_size()
        self._clear()

    def _clear(self) -> None:
        self.gradients: dict[int, Tensor] = {}  # by the position of the parameter
        self.sent: list[tuple[Tensor, Any]] = []  # of each bucket that is on its way

    def add(self, param: Tensor, gradient: Tensor) -> None:
        """Takes the gradient of this process by a parameter, whole, and sends the buckets that are full."""
        if id(param) not in self.positions:  # it is not trained
            return
        self.gradients[self.positions[id(param)]] = gradient.detach()
        while len(self.sent) < len(self.buckets) - 1 and all(i in self.gradients for i in self._next()):
            self._send()

    def sums(self) -> tuple[list[Tensor], Tensor]:
        """Returns the sums, zeros where no process has a gradient, and how many processes have each."""
        while len(self.sent) < len(self.buckets):
            self._send()
        sums = list(self.params)
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            start = 0
            for i in bucket:
                end = start + self.params[i].numel()
                sums[i] = flat[start:end].view_as(self.params[i])
                start = end
        counts = flat[-len(self.params) :]
        self._clear()
        return sums, counts

    def _next(self) -> list[int]:
        return self.buckets[len(self.sent)]

    @torch.no_grad()
    def _send(self) -> None:
        found = [self.gradients.get(i) for i in self._next()]
        params = [self.params[i] for i in self._next()]
        parts = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(params, found, strict=True)]
        if len(self.sent) == len(self.buckets) - 1:  # the last tells which gradients there were
            has = [float(i in self.gradients) for i in range(len(self.params))]
            parts.append(torch.tensor(has, dtype=parts[0].dtype, device=parts[0].device))
        flat = torch.cat(parts)
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))


class Shard(NamedTuple):
    """Some of the data of a batch.

    Args:
        start: position of the first.
        count: number of data.
        total: number of data of the batch.
        weight: of their mean in the mean over the batch.
    """

    start: int
    count: int  # type: ignore[assignment]  # hides the count of tuples
    total: int
    weight: float

    def rows(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns the rows of a batch's arguments that belong to these data."""
        if self.count == self.total:
            return args, kwargs
        args, kwargs, _ = canonicalize(args, kwargs)
        return take_rows(slice(self.start, self.start + self.count), args, kwargs)

    def noise(self) -> AbstractContextManager:
        """Returns a context in which random draws for these data are those of one process with the whole batch."""
        return nullcontext() if self.count == self.total else _ShardNoise(self)


# Operations that draw each element independently.
_ELEMENTWISE_DRAWS = frozenset(
    {
        "normal",
        "normal_",
        "randn",
        "randn_like",
        "uniform_",
        "rand",
        "rand_like",
        "bernoulli",
        "bernoulli_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
        "randint",
        "randint_like",
        "random_",
        "poisson",
        "binomial",
        "_standard_gamma",
        "native_dropout",
    }
)
# Operations that draw vectors: their last dimension is never that of the data.
_VECTOR_DRAWS = frozenset({"multinomial", "_sample_dirichlet"})


class _ShardNoise(TorchDispatchMode):
    """Draws for all data of a batch, and keeps the draws of a shard.

    Processes with the same random state then draw what a single process would draw. The dimension of the data is
    recognised by its size: preferably the last but one, as for latents that are vectors; else the first of that size;
    else one whose size is a multiple, which holds several draws for each datum. If another dimension is taken by
    mistake, the draws still have the right distribution, but are not those of a single process.
    """

    def __init__(self, shard: Shard):
        super().__init__()
        self.shard = shard

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name not in _ELEMENTWISE_DRAWS and name not in _VECTOR_DRAWS:
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs), is_leaf=_is_shape)
        shapes = [
            tuple(x.shape) if isinstance(x, Tensor) else tuple(x)
            for x in leaves
            if isinstance(x, Tensor) or _is_shape(x)
        ]
        dim = self._data_dim(max(shapes, key=len, default=()), name in _VECTOR_DRAWS)
        if dim is None:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(lambda x: self._widened(x, dim), (args, kwargs), is_leaf=_is_shape)
        drawn = tree_map(lambda x: self._narrowed(x, dim), func(*wide_args, **wide_kwargs))
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn

    def _data_dim(self, shape: tuple[int, ...], are_vectors: bool) -> int | None:
        """Returns the dimension of the data, negative; None if there is none."""
        dims = list(range(-len(shape), -1 if are_vectors else 0))
        dims.sort(key=lambda dim: dim != -2)
        exact = [dim for dim in dims if shape[dim] == self.shard.count]
        multiple = [dim for dim in dims if shape[dim] > 0 and shape[dim] % self.shard.count == 0]
        return next(iter(exact + multiple), None)

    def _widened(self, x: Any, dim: int) -> Any:
        """Returns a tensor or a shape for all data of the batch. Rows outside of the shard repeat its first or last."""
        start, count, total, _ = self.shard
        if isinstance(x, Tensor) and x.dim() >= -dim and x.shape[dim] and x.shape[dim] % count == 0:
            rows = (torch.arange(total, device=x.device) - start).clamp(0, count - 1)
            rows = (count * torch.arange(x.shape[dim] // count, device=x.device).unsqueeze(1) + rows).flatten()
            return x.index_select(x.dim() + dim, rows)
        if _is_shape(x):
            at = len(x) + dim
            return [*x[:at], x[at] // count * total, *x[at + 1 :]]
        return x

    def _narrowed(self, x: Tensor, dim: int) -> Tensor:
        """Returns the rows of the shard."""
        start, count, total, _ = self.shard
        at = x.dim() + dim
        return x.unflatten(at, (-1, total)).narrow(at + 1, start, count).flatten(at, at + 1)


_SINGLE: list[bool] = []  # not empty inside of single_process


@contextmanager
def single_process() -> Iterator[None]:
    """Makes this process work without the others: inside, :func:`init_process_group` returns a world of size 1."""
    _SINGLE.append(True)
    try:
        yield
    finally:
        _SINGLE.pop()


def init_process_group(device: torch.device | str | None = None) -> World:
    """Returns this process's world, and joins the process group if ``torchrun`` started it; else a world of size 1.

    Args:
        device: where it computes; the backend is NCCL for a GPU, else gloo.
    """
    if _SINGLE or not dist.is_available():
        return World(0, 1)
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(dist.rendezvous("env://"))
        # The store outlives processes that were killed. After a restart, processes must not read the addresses that
        # those left in it.
        store = dist.PrefixStore(f"life {_restarts()}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    if not dist.is_initialized():
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size())


def was_restarted() -> bool:
    """Returns whether ``torchrun`` restarted the processes, after one of them failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _on_gpu() -> bool:
    return dist.get_backend() == "nccl"


def _device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if _on_gpu() else None


def _is_shape(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(isinstance(n, int) for n in x)


def _tensors_of(batch: Any) -> list[Tensor]:
    batch = as_arguments(batch)
    return tensors_of(*as_tensors(batch.args, batch.kwargs))
