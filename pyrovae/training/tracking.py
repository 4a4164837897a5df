"""Callbacks that send what happens in training to a tracker."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae import storage
from pyrovae.trackers import Tracker
from pyrovae.training.history import History

__all__ = ["Tracking"]

_FILE = "tracker.json"
_MOST = 10_000  # calls that may wait for a tracker
_MOST_BEFORE_A_STEP = 100


class Tracking:
    """A callback that sends each epoch to a tracker, such as :class:`pyrovae.trackers.TensorBoard`.

    The tracker works in a thread of its own, so that one that is slow, or hangs, does not delay training. An error of
    the tracker never ends training: it is logged as a warning of the logger "pyrovae", and training goes on without the
    tracker. So it does without one that draws torch's random numbers, which would change the run.

    A resumed run goes on in the same place, by a file in the directory. The tracker is closed at the end of training
    or, in a ``with`` block, at the end of the block; until then :meth:`results` and :meth:`picture` can send more.

    Args:
        tracker: the tracker.
        directory: of the run, where a file with the key of the tracker's run is kept.
        config: the settings of the run, to be sent.
        name: of the run; that of the directory if None.
        seconds: how long the end waits for a tracker that is behind. It is then left, with a warning.

    >>> import tempfile
    >>> from pyrovae.trackers import PythonLogging
    >>> with Tracking(PythonLogging(), tempfile.mkdtemp()) as tracking:
    ...     tracking.start(History())
    ...     tracking(History([{"epoch": 1, "loss": 3.0}]))
    """

    def __init__(
        self,
        tracker: Tracker,
        directory: str | Path,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        seconds: float = 30.0,
    ):
        self.tracker: Tracker | None = tracker
        self.directory, self.config = Path(directory), config or {}
        self.name, self.seconds = name or self.directory.resolve().name, seconds
        self._is_held = False
        self._num_steps = self._epoch = 0
        self._calls: Queue[Callable[[Tracker], None] | None] = Queue(_MOST)
        self._thread: Thread | None = None  # while the run is open at the tracker

    def __enter__(self) -> "Tracking":
        self._is_held = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._is_held = False
        self.end(kind is None)

    def start(self, history: History) -> None:
        """Opens the run at the tracker, or opens it again."""
        self._epoch = num_epochs = len(history)
        self.directory.mkdir(parents=True, exist_ok=True)

        def open_run(tracker: Tracker) -> None:
            file, name = self.directory / _FILE, type(tracker).__name__
            keys = json.loads(file.read_text()) if file.exists() else {}
            key = tracker.start(
                self.name, self.directory, self.config, keys.get(name) if num_epochs else None, num_epochs
            )
            storage.write_atomically(file, (json.dumps(keys | {name: key}) + "\n").encode())

        self._attempt(open_run)

    def after_step(self) -> None:
        self._num_steps += 1
        is_wanted = self.tracker is not None and type(self.tracker).step is not Tracker.step
        if is_wanted and self._calls.qsize() < _MOST_BEFORE_A_STEP:
            number = self._num_steps
            self._attempt(lambda tracker: tracker.step(number))

    def __call__(self, history: History) -> None:
        self._epoch = history.records[-1]["epoch"]
        self.results(history.records[-1])

    def results(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a record at the epoch that ended last."""
        numbers = {name: float(x) for name, x in record.items() if name != "epoch" and _is_number(x)}
        epoch = self._epoch
        self._attempt(lambda tracker: tracker.epoch(epoch, numbers))

    def picture(self, path: Path) -> None:
        """Sends a picture, a .png file."""
        epoch = self._epoch
        self._attempt(lambda tracker: tracker.picture(path.stem, path, epoch))

    def end(self, is_complete: bool) -> None:
        """Closes the run at the tracker, unless this is in a ``with`` block."""
        if self._thread is None or self._is_held:
            return
        self._attempt(lambda tracker: tracker.end(is_complete))
        self._attempt(None)  # the end of the thread
        self._thread.join(self.seconds)
        if self._thread.is_alive():
            self._leave(f"it did not end within {self.seconds:g} s, with {self._calls.qsize()} calls to come")
        self._thread = None

    def _attempt(self, call: Callable[[Tracker], None] | None) -> None:
        """Lets the thread call the tracker, or end."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="tracker", daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except Full:
            self._leave(f"it is {_MOST:,} calls behind")

    def _work(self) -> None:
        """Calls the tracker, in the thread, until it raises an error or all is done."""
        while (call := self._calls.get()) is not None:
            if self.tracker is not None:
                try:
                    with _NoDraws():
                        call(self.tracker)
                except BaseException as error:  # SystemExit too, which packages raise where they want an answer
                    self._leave(" ".join(str(error).split()) or type(error).__name__)

    def _leave(self, reason: str) -> None:
        if self.tracker is not None:
            name, self.tracker = type(self.tracker).__name__, None
            logging.getLogger("pyrovae").warning("the run goes on without %s: %s", name, reason)


class _NoDraws(TorchDispatchMode):
    """Refuses to draw from torch's generators, in this thread: training draws from them at the same time."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags and kwargs.get("generator") is None:
            raise RuntimeError(f"{function} draws torch's random numbers; a tracker needs a torch.Generator of its own")
        return function(*args, **kwargs)


def trackers_of(directory: Path) -> list[str]:
    """Returns the names of the trackers that followed the run in a directory."""
    file = directory / _FILE
    try:
        return list(json.loads(file.read_text()))
    except (OSError, ValueError):
        return []


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.number, np.bool_)) or isinstance(x, Tensor) and x.dim() == 0
