"""A run that was interrupted can be used as it is, ended early, or continued."""

import shutil

import numpy as np
import pytest
import torch

from pyrovae import load_run
from pyrovae.cli import main
from pyrovae.storage import read_checkpoint
from pyrovae.training import MetricsFile
from pyrovae.training.checkpoints import Checkpointer

OPTIONS = [
    "--preprocessing",
    "grey",
    "--likelihood",
    "Normal",
    "--latent-dim",
    "1",
    "--num-samples",
    "2",
    "--epochs",
    "9",
]
WARNING = "ignore:.*is not finished:UserWarning"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of 9 epochs that Ctrl-C ended in the fourth."""
    place = tmp_path_factory.mktemp("place")
    np.save(place / "data.npy", np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32))
    write = MetricsFile.__call__

    def interrupt(self, history):
        if len(history) == 4:
            raise KeyboardInterrupt
        write(self, history)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "__call__", interrupt)
        patch.setattr(Checkpointer, "is_due", lambda self: True)
        with pytest.raises(SystemExit, match=r"interrupted\. The checkpoint .*--resume; .*--epochs; .*evaluate"):
            main(["train", "--data", str(place / "data.npy"), "--run", str(place / "run"), *OPTIONS])
    return place


@pytest.fixture
def run(place, tmp_path):
    return shutil.copytree(place / "run", tmp_path / "run")


def test_it_can_be_used_as_it_is(run, capsys):
    with pytest.warns(UserWarning, match="is not finished: its weights are those of the best of the 3 epochs"):
        vae, _ = load_run(run)
    best = {
        key.split(" ", 1)[1]: value
        for key, value in read_checkpoint(run / "checkpoint.safetensors")["best"]["params"].items()
    }
    assert set(best) == set(vae.state_dict())
    assert all(torch.equal(best[name], value) for name, value in vae.state_dict().items())
    with pytest.warns(UserWarning, match="is not finished"):
        main(["evaluate", str(run), "--num-samples", "2"])
    assert "test: log p(x) = " in capsys.readouterr().out


@pytest.mark.filterwarnings(WARNING)
def test_it_can_be_ended_early_with_the_weights_that_it_had(run):
    unfinished, _ = load_run(run)
    main(["train", "--run", str(run), "--resume", "--epochs", "3"])
    ended, config = load_run(run)
    assert config["epochs"] == 3
    for before, after in zip(unfinished.state_dict().values(), ended.state_dict().values(), strict=True):
        assert torch.equal(before, after)


def test_quiet_prints_the_results_alone(run, capsys):
    main(["train", "--run", str(run), "--resume", "--epochs", "5", "--quiet"])
    captured = capsys.readouterr()
    assert captured.err == "" and "test: log p(x)" in captured.out and "Linear(" not in captured.out
    main(["evaluate", str(run), "--num-samples", "30", "--quiet"])
    assert capsys.readouterr().err == ""


def test_it_can_be_continued_but_not_to_fewer_epochs_than_are_done(run):
    with pytest.raises(SystemExit, match="epochs is 2, but 3 epochs .* are done. Give at least 3"):
        main(["train", "--run", str(run), "--resume", "--epochs", "2"])
    main(["train", "--run", str(run), "--resume", "--epochs", "5"])
    assert load_run(run)[1]["epochs"] == 5


def test_a_run_without_an_epoch_has_no_weights(run):
    (run / "checkpoint.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights yet"):
        load_run(run)


@pytest.mark.filterwarnings(WARNING)
def test_a_configuration_that_was_edited_is_refused(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("latent_dim: 1", "latent_dim: 2"))
    with pytest.raises(ValueError, match="latent_dim"):
        load_run(run)
