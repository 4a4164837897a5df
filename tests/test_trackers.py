"""Trackers get every epoch of a run once, also of one that was interrupted, and never end it."""

import importlib.util
import logging
import random
import threading
import time

import numpy as np
import pyro
import pytest
import torch

import pyrovae
from pyrovae import encoders, likelihoods, priors, trackers
from pyrovae.cli import main
from pyrovae.training import History, Tracking, fit, trackers_of

RECORD = {"epoch": 1, "loss": 3.0, "kl": torch.tensor(0.5), "note": "none", "many": torch.zeros(2)}
CONFIG = {"epochs": 3, "prior": {"class_path": "pyrovae.priors.StandardNormal"}}


class Recorder(trackers.Tracker):
    """A tracker that keeps what it gets."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def note(self, name, *args):
        if name == self.fails_at:
            raise RuntimeError("no\nconnection")
        self.calls.append((name, *args))

    def start(self, name, directory, config, key, epoch):
        self.note("start", name, config, key, epoch)
        return "key"

    def step(self, number):
        self.note("step", number)

    def epoch(self, number, numbers):
        self.note("epoch", number, numbers)

    def picture(self, name, path, epoch):
        self.note("picture", name, epoch)

    def end(self, is_complete):
        self.note("end", is_complete)


class Restless(Recorder):
    """A tracker that draws from a generator of its own, and then from all global ones."""

    def step(self, number):
        self.calls.append(torch.rand(1, generator=torch.Generator()))
        random.random(), np.random.rand(), torch.rand(1)


class Hanging(Recorder):
    """A tracker that never returns."""

    def __init__(self, hangs_at):
        super().__init__()
        self.hangs_at = hangs_at

    def note(self, name, *args):
        if name == self.hangs_at:
            threading.Event().wait()
        self.calls.append(name)


def train(callbacks, epochs=2, **kwargs):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    x = torch.randn(20, 3)
    return fit(
        vae.model,
        vae.guide,
        x,
        epochs=epochs,
        batch_size=10,
        callbacks=callbacks,
        compile=False,
        progress=False,
        **kwargs,
    )


def test_a_tracker_gets_start_steps_epochs_and_end(tmp_path):
    tracker = Recorder()
    history = train([Tracking(tracker, tmp_path, CONFIG, "name")])
    names = [call[0] for call in tracker.calls]
    assert names == ["start", "step", "step", "epoch", "step", "step", "epoch", "end"]
    assert tracker.calls[0] == ("start", "name", CONFIG, None, 0)
    assert [call[2]["loss"] for call in tracker.calls if call[0] == "epoch"] == history["loss"]
    assert tracker.calls[-1] == ("end", True)
    assert trackers_of(tmp_path) == ["Recorder"]


def test_entries_that_are_no_numbers_are_left_out(tmp_path):
    tracker = Recorder()
    with Tracking(tracker, tmp_path) as tracking:
        tracking(History([RECORD]))
    assert tracker.calls == [("epoch", 1, {"loss": 3.0, "kl": 0.5}), ("end", True)]


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    train([Tracking(Recorder(), tmp_path)], checkpoint=checkpoint)
    tracker = Recorder()
    train([Tracking(tracker, tmp_path, CONFIG, "name")], epochs=3, checkpoint=checkpoint, resume=True)
    assert tracker.calls[0] == ("start", "name", CONFIG, "key", 2)
    assert [call[1] for call in tracker.calls if call[0] == "epoch"] == [3]


@pytest.mark.parametrize("where", ["start", "step", "epoch", "picture", "end"])
def test_a_tracker_that_fails_does_not_end_a_run(where, tmp_path, caplog):
    tracker = Recorder(fails_at=where)
    with Tracking(tracker, tmp_path) as tracking:
        assert len(train([tracking])) == 2
        tracking.picture(tmp_path / "samples.png")
    assert [record.getMessage() for record in caplog.records] == ["the run goes on without Recorder: no connection"]
    assert where not in [call[0] for call in tracker.calls]


def test_a_tracker_does_not_change_the_run(tmp_path, caplog):
    alone, tracker = train([]), Restless()
    assert train([Tracking(tracker, tmp_path)])["loss"] == alone["loss"]
    assert len(tracker.calls) == 2 and "rand.default draws torch's random numbers" in caplog.text


@pytest.mark.parametrize("where", ["start", "step", "epoch", "end"])
def test_a_tracker_that_hangs_neither_ends_nor_delays_a_run(where, tmp_path, caplog):
    tracking = Tracking(Hanging(where), tmp_path, seconds=0.2)
    ended = []
    history = train([tracking, lambda history: ended.append(time.monotonic())], epochs=3)
    assert time.monotonic() - ended[-1] < 5
    assert len(history) == 3
    [message] = [record.getMessage() for record in caplog.records]
    waiting = {"start": 11, "step": 10, "epoch": 8, "end": 1}[where]
    assert message == f"the run goes on without Hanging: it did not end within 0.2 s, with {waiting} calls to come"


def test_calls_that_wait_for_a_tracker_have_a_limit(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pyrovae.training.tracking._MOST", 3)
    assert len(train([Tracking(Hanging("start"), tmp_path, seconds=0.1)], epochs=3)) == 3
    assert "the run goes on without Hanging: it is 3 calls behind" in caplog.text


def test_steps_are_left_out_when_a_tracker_is_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae.training.tracking._MOST_BEFORE_A_STEP", 0)
    tracker = Recorder()
    train([Tracking(tracker, tmp_path)])
    assert [call[0] for call in tracker.calls] == ["start", "epoch", "epoch", "end"]


def test_a_run_that_fails_ends_as_one_that_failed(tmp_path):
    def fail(history):
        raise KeyError("mine")

    tracker = Recorder()
    with pytest.raises(KeyError, match="mine"):
        train([Tracking(tracker, tmp_path), fail])
    assert tracker.calls[-1] == ("end", False)


def test_callbacks_start_in_their_order_and_end_in_the_other():
    calls = []

    class Noting:
        def __init__(self, name):
            self.name = name

        def start(self, history):
            calls.append(("start", self.name, len(history)))

        def __call__(self, history):
            pass

        def end(self, is_complete):
            calls.append(("end", self.name, is_complete))

    train([Noting("a"), Noting("b")])
    assert calls == [("start", "a", 0), ("start", "b", 0), ("end", "b", True), ("end", "a", True)]


def test_python_logging_gets_a_line_an_epoch(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mine"):
        train([Tracking(trackers.PythonLogging("mine"), tmp_path, name="name")])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "name: training starts after epoch 0" and lines[-1] == "training ended"
    assert lines[1].startswith("epoch 1: loss ") and len(lines) == 4


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    cls = {"tensorboard": trackers.TensorBoard, "wandb": trackers.WandB, "mlflow": trackers.MLflow}[name]
    with pytest.raises(ImportError, match=rf"{name} is not installed.*pyrovae\[{name}\]"):
        cls()


def interrupted_twice(make, directory):
    """Tracks a run whose first process wrote an epoch after its checkpoint; returns the losses of epochs 1 to 4."""
    losses = [3.0, 2.5, 2.25, 2.0]
    records = [{"epoch": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    for began, ended in ((0, 3), (2, 4)):
        tracking = Tracking(make(), directory, CONFIG, "name")
        tracking.start(History(records[:began]))
        for count in range(began + 1, ended + 1):
            tracking(History(records[:count]))
        path = directory / "samples.png"
        pyrovae.plots.samples(torch.rand(4, 1, 8, 8), path)
        tracking.picture(path)
        tracking.end(True)
        assert tracking.tracker is not None
    return losses


def test_tensorboard_reads_each_epoch_once_the_picture_and_the_configuration(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = interrupted_twice(trackers.TensorBoard, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(losses, start=1))
    assert events.Images("samples")[0].width > 0
    [text] = events.Tensors("configuration/text_summary")
    assert b"pyrovae.priors.StandardNormal" in text.tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore")  # of the package
def test_mlflow_keeps_one_run_with_each_epoch_the_picture_and_the_configuration(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    losses = interrupted_twice(lambda: trackers.MLflow(uri), tmp_path)
    client = MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("pyrovae").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": "3", "prior.class_path": "pyrovae.priors.StandardNormal"}
    sent = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert sent == dict(enumerate(losses, start=1))
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/samples.png"]


@pytest.mark.filterwarnings("ignore")  # of the package
def test_wandb_writes_one_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted_twice(lambda: trackers.WandB(mode="offline"), tmp_path)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two parts of one run
    assert any(b"StandardNormal" in file.read_bytes() for file in files)


def test_the_command_line_takes_a_tracker_in_any_case_and_runs_do_not_keep_it(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    few = ["--data", "data.npy", "--preprocessing", "grey", "--likelihood", "Normal", "--epochs", "1", "--run", "run"]
    small = [*few, "--latent-dim", "1", "--num-samples", "2", "--encoder.network.hidden", "[4]"]
    with caplog.at_level(logging.INFO, "pyrovae"):
        main(["train", *small, "--tracker", "pythonlogging"])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "run: training starts after epoch 0" and lines[-1] == "training ended"
    assert "test/log_marginal" in lines[-2]
    assert "tracker" not in (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    main(["train", "--run", "run", "--resume", "--epochs", "2"])
    assert "add --tracker PythonLogging" in capsys.readouterr().out


def test_the_command_line_names_a_missing_package_in_a_line(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit) as error:
        main(["train", "--run", str(tmp_path / "run"), "--tracker", "MLflow"])
    assert error.value.code == "pyrovae: error: mlflow is not installed. Install it: pip install 'pyrovae[mlflow]'"
