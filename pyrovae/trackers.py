"""Trackers: TensorBoard, Weights & Biases, MLflow and Python's logging, to which a run sends its numbers and pictures.

:class:`pyrovae.training.Tracking` makes a callback of a tracker, ``pyrovae train --tracker TensorBoard`` uses one.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pyrovae.extras import check_installed

__all__ = ["MLflow", "PythonLogging", "TensorBoard", "Tracker", "WandB"]

_LONGEST = 500  # characters of a parameter of MLflow


class Tracker(ABC):
    """A place that numbers, pictures and the configuration of a run are sent to.

    A subclass opens a run in :meth:`start`, sends the numbers of an epoch in :meth:`epoch` and a picture in
    :meth:`picture`, and closes the run in :meth:`end`. All are called in one thread, which is not that of training. A
    tracker may raise any error, or hang: training goes on without it. It must not draw random numbers from torch's
    generators, for which it is left, nor from those of Python and NumPy if what is trained draws from them.
    """

    @abstractmethod
    def start(self, name: str, directory: Path, config: Mapping[str, Any], key: str | None, epoch: int) -> str:
        """Opens a run; returns a key by which the same run can be opened again.

        Args:
            name: a name for people.
            directory: where files may be written.
            config: the settings of the run.
            key: what this method returned before training was interrupted; None for a new run.
            epoch: epochs that have ended. Later ones that were sent before are replaced by equal numbers.
        """

    def step(self, number: int) -> None:  # noqa: B027
        """Is called after a step with the number of steps in this process; not after all where it is slower than them.

        By default it does nothing.
        """

    @abstractmethod
    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        """Sends the numbers of an epoch, or those of the end, such as the score of the test data."""

    def picture(self, name: str, path: Path, epoch: int) -> None:  # noqa: B027
        """Sends a picture, a .png file. By default it does nothing."""

    @abstractmethod
    def end(self, is_complete: bool) -> None:
        """Closes the run, which may have ended with an error."""


class TensorBoard(Tracker):
    """Writes files for TensorBoard to ``<run directory>/tensorboard``; see them by ``tensorboard --logdir``.

    Args:
        directory: another directory.

    Raises:
        ImportError: when TensorBoard is not installed.
    """

    def __init__(self, directory: str | None = None):
        check_installed("tensorboard", "tensorboard")
        self.directory = directory

    def start(self, name: str, directory: Path, config: Mapping[str, Any], key: str | None, epoch: int) -> str:
        from torch.utils.tensorboard import SummaryWriter

        where = key or self.directory or str(directory / "tensorboard")
        # What an interrupted run wrote after its checkpoint is hidden.
        self._writer: Any = SummaryWriter(where, purge_step=None if key is None else epoch + 1)
        if key is None:
            self._writer.add_text("configuration", _as_code(config))
        return where

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def picture(self, name: str, path: Path, epoch: int) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.array(picture.convert("RGB")), epoch, dataformats="HWC")

    def end(self, is_complete: bool) -> None:
        self._writer.close()


class WandB(Tracker):
    """Sends a run to Weights & Biases.

    Args:
        project: the project there.
        entity: the user or team; that of your login if None.
        mode: "online", or "offline" to keep files in the run directory, which ``wandb sync`` sends later; None for
            what the environment variable WANDB_MODE says, or online.

    Raises:
        ImportError: when wandb is not installed.
    """

    def __init__(self, project: str = "pyrovae", entity: str | None = None, mode: str | None = None):
        check_installed("wandb", "wandb")
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, name: str, directory: Path, config: Mapping[str, Any], key: str | None, epoch: int) -> str:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=self.project,
            entity=self.entity,
            name=name,
            dir=str(directory),
            config=dict(config),
            id=key,
            resume="allow",
            mode=self.mode,
        )
        self._run.define_metric("*", step_metric="epoch")
        return self._run.id

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"epoch": number, **numbers})

    def picture(self, name: str, path: Path, epoch: int) -> None:
        self._run.log({"epoch": epoch, name: self._wandb.Image(str(path))})

    def end(self, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)


class MLflow(Tracker):
    """Sends a run to MLflow.

    Args:
        uri: the tracking server, or a database such as "sqlite:///mlflow.db"; what MLflow is set to if None.
        experiment: the experiment, made if there is none of this name.

    Raises:
        ImportError: when MLflow is not installed.
    """

    def __init__(self, uri: str | None = None, experiment: str = "pyrovae"):
        check_installed("mlflow", "mlflow")
        self.uri, self.experiment = uri, experiment

    def start(self, name: str, directory: Path, config: Mapping[str, Any], key: str | None, epoch: int) -> str:
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient(self.uri)
        if key is not None:
            self._client.update_run(key, status="RUNNING")
            self._id: str = key
            return key
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        for entry, value in _flat(config).items():
            self._client.log_param(self._id, entry, str(value)[:_LONGEST])
        return self._id

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=number)

    def picture(self, name: str, path: Path, epoch: int) -> None:
        self._client.log_artifact(self._id, str(path), "pictures")

    def end(self, is_complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_complete else "FAILED")


class PythonLogging(Tracker):
    """Writes a line for each epoch to a logger of Python's ``logging``, for programs.

    Args:
        logger: the name of the logger.
        level: the level of the lines, such as ``logging.INFO``.

    >>> logging.basicConfig(level=logging.INFO)
    >>> tracker = PythonLogging()
    >>> key = tracker.start("digits", Path("runs/digits"), {}, None, 0)
    >>> tracker.epoch(1, {"loss": 12.5})
    """

    def __init__(self, logger: str = "pyrovae", level: int = logging.INFO):
        self.logger, self.level = logger, level

    def start(self, name: str, directory: Path, config: Mapping[str, Any], key: str | None, epoch: int) -> str:
        self._say("%s: training starts after epoch %d", name, epoch)
        return self.logger

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        self._say("epoch %d: %s", number, ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))

    def end(self, is_complete: bool) -> None:
        self._say("training ended" if is_complete else "training ended with an error")

    def _say(self, message: str, *args: Any) -> None:
        logging.getLogger(self.logger).log(self.level, message, *args)


def _as_code(config: Mapping[str, Any]) -> str:
    """Returns a configuration as a block of code in Markdown."""
    return "".join(f"    {line}\n" for line in yaml.safe_dump(dict(config), sort_keys=False).splitlines())


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the entries of nested dicts, with dots between the names.

    >>> _flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
