"""Callbacks that send what happens in training to a tracker."""

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae import storage
from pyrovae.trackers import Tracker
from pyrovae.training.history import History

__all__ = ["Tracking"]

_FILE = "tracker.json"


class Tracking:
    """A callback that sends each epoch to a tracker, such as :class:`pyrovae.trackers.TensorBoard`.

    An error of the tracker never ends training: it is logged as a warning of the logger "pyrovae", and training goes on
    without the tracker. What a tracker draws from the global random generators does not change the run.

    A resumed run goes on in the same place, by a file in the directory. The tracker is closed at the end of training
    or, in a ``with`` block, at the end of the block; until then :meth:`results` and :meth:`picture` can send more.

    Args:
        tracker: the tracker.
        directory: of the run, where a file with the key of the tracker's run is kept.
        config: the settings of the run, to be sent.
        name: of the run; that of the directory if None.

    >>> import tempfile
    >>> from pyrovae.trackers import PythonLogging
    >>> with Tracking(PythonLogging(), tempfile.mkdtemp()) as tracking:
    ...     tracking.start(History())
    ...     tracking(History([{"epoch": 1, "loss": 3.0}]))
    """

    def __init__(
        self, tracker: Tracker, directory: str | Path, config: Mapping[str, Any] | None = None, name: str | None = None
    ):
        self.tracker: Tracker | None = tracker
        self.directory, self.config = Path(directory), config or {}
        self.name = name or self.directory.resolve().name
        self._is_held = self._is_started = False
        self._num_steps = self._epoch = 0

    def __enter__(self) -> "Tracking":
        self._is_held = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._is_held = False
        self.end(kind is None)

    def start(self, history: History) -> None:
        """Opens the run at the tracker, or opens it again."""
        self._epoch = len(history)

        def open_run(tracker: Tracker) -> None:
            file, name = self.directory / _FILE, type(tracker).__name__
            keys = json.loads(file.read_text()) if file.exists() else {}
            key = tracker.start(
                self.name, self.directory, self.config, keys.get(name) if history else None, len(history)
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            storage.write_atomically(file, (json.dumps(keys | {name: key}) + "\n").encode())

        self._is_started = True
        self._attempt(open_run)

    def after_step(self) -> None:
        self._num_steps += 1
        if self.tracker is not None and type(self.tracker).step is not Tracker.step:
            self._attempt(lambda tracker: tracker.step(self._num_steps))

    def __call__(self, history: History) -> None:
        self._epoch = history.records[-1]["epoch"]
        self.results(history.records[-1])

    def results(self, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a record at the epoch that ended last."""
        numbers = {name: float(x) for name, x in record.items() if name != "epoch" and _is_number(x)}
        self._attempt(lambda tracker: tracker.epoch(self._epoch, numbers))

    def picture(self, path: Path) -> None:
        """Sends a picture, a .png file."""
        self._attempt(lambda tracker: tracker.picture(path.stem, path, self._epoch))

    def end(self, is_complete: bool) -> None:
        """Closes the run at the tracker, unless this is in a ``with`` block."""
        if self._is_started and not self._is_held:
            self._attempt(lambda tracker: tracker.end(is_complete))
            self._is_started = False

    def _attempt(self, action: Callable[[Tracker], None]) -> None:
        """Does something with the tracker, which is dropped at an error."""
        if self.tracker is None:
            return
        try:
            with _random_state_kept():
                action(self.tracker)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            name = type(self.tracker).__name__
            logging.getLogger("pyrovae").warning("training goes on without %s: %s", name, reason)
            self.tracker = None


def trackers_of(directory: Path) -> list[str]:
    """Returns the names of the trackers that followed the run in a directory."""
    file = directory / _FILE
    try:
        return list(json.loads(file.read_text()))
    except (OSError, ValueError):
        return []


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Keeps the random states of Python, NumPy and torch."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.number, np.bool_)) or isinstance(x, Tensor) and x.dim() == 0
