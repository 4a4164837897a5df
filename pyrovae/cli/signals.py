"""The signal by which clusters and containers announce the end of a process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pyrovae.training import History


class Terminated(BaseException):
    """Training was ended by SIGTERM; the message says how to go on."""


class StopOnSignal:
    """A callback and a context that ends training on SIGTERM after the step, so that no file is left half written.

    The checkpoint is that of the last epoch that was written. A second signal ends at once.

    Args:
        directory: the run directory, for the message.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._is_in_training = self._is_received = False
        self._before: Any = None

    def __enter__(self) -> None:
        try:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        except ValueError:  # not the main thread, which alone gets signals
            self._before = None

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """A context, of :func:`pyrovae.fit`, in which the signal waits for the end of a step."""
        self._is_in_training = True
        try:
            yield
        finally:
            self._is_in_training = False
        self.after_step()  # it came in the last epoch, whose checkpoint is written

    def after_step(self) -> None:
        if self._is_received:
            is_written = (self.directory / "metrics.jsonl").exists()  # a checkpoint is there before the first epoch
            done = "The checkpoint is that of the last epoch that was written." if is_written else "No epoch was done."
            raise Terminated(
                f"pyrovae: ended by SIGTERM. {done} Continue with: pyrovae train --run {self.directory} --resume"
            )

    def __call__(self, history: History) -> bool:
        """Ends training with a checkpoint of the epoch that has just ended."""
        return self._is_received

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        is_first, self._is_received = not self._is_received, True
        if not (self._is_in_training and is_first):
            self.after_step()
