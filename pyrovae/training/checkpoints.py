"""Checkpoints: the file that a training run can be resumed from."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyrovae import storage
from pyrovae.training.history import History
from pyrovae.training.state import Snapshot, random_state, set_random_state
from pyrovae.training.trainer import Trainer


class Checkpointer:
    """Writes the state of a run to a file, and reads it.

    Args:
        path: the file.
        trainer: the trainer, whose state is kept.
        batches: the batches, whose random generators are kept.
        fingerprint: numbers that are the same for the same data and batch size.
    """

    def __init__(self, path: str | Path, trainer: Trainer, batches: Iterable, fingerprint: dict[str, Any]):
        self.path, self.trainer, self.batches, self.fingerprint = path, trainer, batches, fingerprint
        self.cost = 0.0  # seconds that the last write took
        self.saved_at = time.monotonic()

    def load(self) -> tuple[History, Snapshot | None]:
        """Restores the state from the file; returns the history and the weights of the best epoch.

        Raises:
            ValueError: when the checkpoint is of other data, another model or another optimizer.
        """
        saved = self.trainer.world.broadcast_from_rank0(lambda: storage.read_checkpoint(self.path))
        if saved["data"] != self.fingerprint:
            raise ValueError(
                f"checkpoint {self.path} was written with {saved['data']}, but now there are {self.fingerprint}. "
                "Resume with the same data and batch size."
            )
        self.trainer.load_state_dict(saved)
        set_random_state(saved["random"], self.batches)
        return History(saved["history"]), saved["best"]

    def save(self, history: History, best: Snapshot | None) -> None:
        """Writes the state on rank 0."""
        start = time.monotonic()
        if self.trainer.world.is_rank0:
            run = {"data": self.fingerprint, "history": history.records, "best": best}
            storage.write_checkpoint(
                self.path, self.trainer.state_dict() | run | {"random": random_state(self.batches)}
            )
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start

    def is_due(self) -> bool:
        """Returns whether enough time has passed for writing to take at most a twentieth of it."""
        return time.monotonic() - self.saved_at > 20 * self.cost
