"""What happens to runs: kills at bad moments, two processes at once, directories that move, edited configurations."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml

import pyrovae
from pyrovae import plots, storage
from pyrovae.cli import main
from pyrovae.locks import DirectoryLock
from pyrovae.training import MetricsFile

OPTIONS = ["--num-samples", "10", "--latent-dim", "2"]


def train(directory, *options):
    main(["train", "--run", str(directory), *OPTIONS, *options])


def message_of(*argv):
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, argv)))
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    return exit.value.code


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four epochs that nothing happened to."""
    directory = tmp_path_factory.mktemp("accidents") / "whole"
    train(directory, "--epochs", "4", "--likelihood.network.activation", "torch.nn.LeakyReLU")
    return directory


@pytest.mark.parametrize("last", ["run.json", "config.yaml"])
def test_a_start_that_was_killed_between_its_files_is_started_again(last, tmp_path, monkeypatch, capsys):
    write = storage.write_atomically

    def killed(path, content):
        if path.name == last:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(storage, "write_atomically", killed)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--epochs", "1")
    monkeypatch.undo()
    if last == "config.yaml":  # else nothing is there yet
        assert "--resume" in message_of("train", "--run", tmp_path / "run", "--epochs", "1")
    train(tmp_path / "run", "--epochs", "1", "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    pyrovae.load_run(tmp_path / "run")


@pytest.mark.parametrize("left", ["config.yaml", "run.json"])
def test_what_an_earlier_version_left_of_a_start_is_started_again(left, whole, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(whole / left, tmp_path / "run" / left)
    train(tmp_path / "run", "--epochs", "1", "--resume")
    pyrovae.load_run(tmp_path / "run")


def test_files_of_a_killed_write_are_removed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / ".weights.safetensors.0123.tmp").write_bytes(b"half")
    train(tmp_path / "run", "--epochs", "5", "--resume")
    assert not list((tmp_path / "run").glob(".*"))


HOLDER = """
import sys, time
from pyrovae.locks import DirectoryLock
DirectoryLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_told_who_trains_and_a_dead_one_holds_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            message = message_of("train", "--run", tmp_path / "run", "--resume", "--epochs", "5")
            assert f"process {holder.pid} on " in message and "is working in" in message
        finally:
            holder.kill()
    assert (tmp_path / "run" / ".lock").exists()  # what a dead process left
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in before.items())
    train(tmp_path / "run", "--epochs", "5", "--resume")
    assert not (tmp_path / "run" / ".lock").exists()


def test_of_two_new_runs_in_one_place_one_wins_and_the_other_is_refused(tmp_path):
    lock = DirectoryLock(tmp_path / "run")
    lock.acquire()
    assert f"process {os.getpid()} on " in message_of("train", "--run", tmp_path / "run", *OPTIONS, "--epochs", "1")
    with pytest.raises(BlockingIOError, match="is working in"):
        DirectoryLock(tmp_path / "run").acquire()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []
    train(tmp_path / "run", "--epochs", "1")  # the directory is there, and empty


def test_temporary_names_are_of_one_write(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(str(a)), replace(a, b))[1])
    for _ in range(2):
        storage.write_atomically(tmp_path / "file", b"x")
    assert len(set(names)) == 2 and (tmp_path / "file").read_bytes() == b"x"


def after_epoch(epoch, do, monkeypatch):
    """Calls a function once, after an epoch of training."""
    write = MetricsFile.__call__

    def also(self, history):
        write(self, history)
        if len(history) == epoch:
            do()

    monkeypatch.setattr(MetricsFile, "__call__", also)


def test_a_directory_that_was_renamed_is_told_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    after_epoch(2, lambda: (tmp_path / "run").rename(tmp_path / "elsewhere"), monkeypatch)
    message = message_of("train", "--run", tmp_path / "run", *OPTIONS, "--epochs", "4")
    assert "was renamed" in message
    if sys.platform == "linux":
        assert f"pyrovae train --run {tmp_path / 'elsewhere'} --resume" in message
    monkeypatch.undo()
    train(tmp_path / "elsewhere", "--epochs", "4", "--resume")


def test_a_directory_that_was_removed_is_told(tmp_path, monkeypatch):
    after_epoch(2, lambda: shutil.rmtree(tmp_path / "run"), monkeypatch)
    assert "was removed or renamed during training" in message_of(
        "train", "--run", tmp_path / "run", *OPTIONS, "--epochs", "4"
    )


@pytest.mark.parametrize("compile", [[], ["--compile", "true"]])
def test_sigterm_ends_training_with_a_checkpoint_and_a_word(compile, whole, tmp_path, monkeypatch, capsys, traced):
    options = ["--epochs", "4", "--likelihood.network.activation", "torch.nn.LeakyReLU"]
    handler = signal.getsignal(signal.SIGTERM)
    after_epoch(2, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    with pytest.raises(SystemExit) as exit:
        train(tmp_path / "run", *options, *compile)
    assert exit.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    said = capsys.readouterr().err
    assert f"last epoch that was written. Continue with: pyrovae train --run {tmp_path / 'run'} --resume" in said
    assert not (tmp_path / "run" / ".lock").exists() and not (tmp_path / "run" / "weights.safetensors").exists()
    monkeypatch.undo()
    train(tmp_path / "run", "--resume", *compile)
    if not compile:
        for name in ("weights.safetensors", "config.yaml"):
            assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_sigterm_between_steps_ends_after_the_step(tmp_path, monkeypatch, capsys):
    steps = []

    def once(self):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        after_step(self)

    from pyrovae.cli.signals import StopOnSignal

    after_step = StopOnSignal.after_step
    monkeypatch.setattr(StopOnSignal, "after_step", once)
    with pytest.raises(SystemExit) as exit:
        train(tmp_path / "run", "--epochs", "2")
    assert exit.value.code == 143 and len(steps) == 3
    assert "ended by SIGTERM. No epoch was done. Continue with" in capsys.readouterr().err
    monkeypatch.undo()
    train(tmp_path / "run", "--resume")


def edit(directory, old, new):
    text = (directory / "config.yaml").read_text()
    assert old in text
    (directory / "config.yaml").write_text(text.replace(old, new))


def test_an_edited_configuration_of_the_model_is_told(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    edit(tmp_path / "run", "negative_slope: 0.01", "negative_slope: 0.91")
    with pytest.raises(ValueError, match=r"negative_slope is 0\.91, but training had 0\.01"):
        pyrovae.load_run(tmp_path / "run")
    assert "negative_slope is 0.91" in message_of("evaluate", tmp_path / "run")


@pytest.mark.parametrize(("old", "new"), [("seed: 0", "seed: 1"), ("batch_size: 128", "batch_size: 64")])
def test_an_edited_configuration_of_training_is_told_when_it_is_resumed(old, new, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    edit(tmp_path / "run", old, new)
    assert "was edited" in message_of("train", "--run", tmp_path / "run", "--resume", "--epochs", "5")
    pyrovae.load_run(tmp_path / "run")  # the weights are those of this model


def test_an_entry_that_was_taken_out_is_told(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del config["encoder"]["init_args"]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"encoder\.init_args is missing, but training had"):
        pyrovae.load_run(tmp_path / "run")


@pytest.mark.parametrize("num_rows", [10, 19, 25])
def test_a_few_rows_get_their_score(num_rows, tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(num_rows, 4)).astype(np.float32)
    np.save(tmp_path / "few.npy", x)
    train(tmp_path / "run", "--data", str(tmp_path / "few.npy"), "--preprocessing", "grey", "--likelihood", "Normal",
          "--epochs", "2", "--latent-dim", "3")  # fmt: skip
    assert "test: log p(x) = " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["split"] == "test"


def test_a_picture_that_fails_costs_neither_the_score_nor_the_others(tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise IndexError("no such dimension")

    monkeypatch.setattr(plots, "latent_space", fails)
    train(tmp_path / "run", "--epochs", "1")
    out = capsys.readouterr().out
    assert "test: log p(x) = " in out and "latent_space.png could not be drawn: no such dimension" in out
    assert (tmp_path / "run" / "learning_curve.png").exists() and (tmp_path / "run" / "samples.png").exists()
