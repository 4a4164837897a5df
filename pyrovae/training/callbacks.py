"""Callbacks: functions that :func:`pyrovae.fit` calls with the history after every epoch."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyrovae import storage
from pyrovae.training.history import History

__all__ = ["Callback", "MetricsFile"]


class Callback(Protocol):
    """A function, or an object with ``__call__``, that :func:`pyrovae.fit` calls with the history after every epoch.

    A callback may:

    * read the :class:`History`, whose last record is that of the epoch that has just ended;
    * add entries to the last record, ``history.records[-1]["accuracy"] = 0.9``. Numbers, strings, tensors, and lists,
      tuples and dicts of these are kept in checkpoints. This is how a callback keeps state over a resume: it reads
      ``history`` instead of its own attributes, as :class:`pyrovae.diagnostics.CollapseMonitor` does;
    * return True (a ``bool``, or one of NumPy or of torch without dimensions) to stop training. Any other value is
      ignored;
    * call ``eval()``, make Pyro parameters of its own, or change weights. The next epoch restores the training modes;
    * have a method ``start(history)``, which is called before the first step; the history holds the epochs of before a
      resume;
    * have a method ``after_step()``, which is called without arguments after every step;
    * have a method ``end(is_complete)``, which is called once at the end, with False if an error ended training;
    * raise an error, which ends training. The checkpoint then keeps the state before this epoch.

    It must not draw random numbers from the global generators if the run is to have the same result with and without
    it: wrap what it draws in ``torch.random.fork_rng()``. With several processes, only rank 0 calls callbacks.

    >>> def stop_below(history):
    ...     return history["loss"][-1] < 2.6
    >>> stop_below(History([{"epoch": 1, "loss": 2.5}]))
    True
    """

    def __call__(self, history: History) -> Any:
        """Is called after every epoch; training stops if the result is True."""


def stop_requested(callbacks: Iterable[Callback], history: History) -> bool:
    """Calls all callbacks, in order; returns whether any of them returned True."""
    results = [callback(history) for callback in callbacks]
    return any(_is_true(result) for result in results)


@contextmanager
def running(callbacks: Iterable[Callback], history: History) -> Iterator[None]:
    """Calls the methods ``start`` and ``end`` of callbacks around training."""
    with ExitStack() as stack:
        for callback in callbacks:
            start, end = (getattr(callback, name, None) for name in ("start", "end"))
            if callable(end):
                stack.push(lambda kind, *_, end=end: end(kind is None) and None)
            if callable(start):
                start(history)
        yield


def listeners_of(callbacks: Iterable[Callback]) -> list[Callable[[], Any]]:
    """Returns the methods ``after_step`` of the callbacks that have one."""
    return [callback.after_step for callback in callbacks if hasattr(callback, "after_step")]


def _is_true(x: Any) -> bool:
    """Returns whether a value is a boolean that is True: not 1, nor an array with dimensions."""
    is_bool = isinstance(x, (bool, np.bool_)) or isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 0
    return is_bool and bool(x)


class MetricsFile:
    """A callback that writes every record of the history as a line of JSON.

    The first call writes all records. A resumed run thus drops the lines that the interrupted run wrote after its last
    checkpoint. Later calls append a line.

    Args:
        path: the file; an existing one is replaced.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> metrics, history = MetricsFile(path), History([{"epoch": 1, "loss": 3.0}])
    >>> metrics(history)
    >>> print(path.read_text(), end="")
    {"epoch": 1, "loss": 3.0}
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._is_started = False

    def __call__(self, history: History) -> None:
        if not self._is_started:
            self.write(history.records)
            self._is_started = True
            return
        with open(self.path, "a") as file:
            file.write(_json_line(history.records[-1]))

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Replaces the file by one with these records."""
        storage.write_atomically(self.path, "".join(map(_json_line, records)).encode())


def _json_line(record: dict[str, Any]) -> str:
    def as_number(x: Any) -> Any:
        if isinstance(x, (np.generic, np.ndarray, Tensor)):
            return x.tolist()
        raise TypeError(f"a file of metrics cannot hold a {type(x).__name__}: {x!r}. Use numbers, strings and tensors.")

    return json.dumps(record, default=as_number) + "\n"
