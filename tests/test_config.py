"""Configurations: names of classes that have moved, names that are not trusted, and a VAE from its parts."""

import importlib
import inspect
import shutil

import pytest
import yaml

from pyrovae import load_run, priors
from pyrovae.cli import main
from pyrovae.cli.training import train
from pyrovae.config import NOT_KEPT, PARTS, SETTINGS, make_vae, untrusted_names, with_current_names
from pyrovae.encoders import DiagonalNormal
from pyrovae.likelihoods import Bernoulli
from pyrovae.storage import read_config

# A name in a configuration of an earlier version, and the present one.
RENAMED = {
    "pyrovae.latents.VonMisesFisher": "pyrovae.distributions.VonMisesFisher",
    "pyrovae.latents.spheres.VonMisesFisher": "pyrovae.distributions.VonMisesFisher",
    "pyrovae.graphs.Compiled": "pyrovae.compilation.api.Compiled",
    "pyrovae.bounds.schedule.Linear": "pyrovae.bounds.Linear",
    "pyrovae.priors.vamp.VampPrior": "pyrovae.priors.VampPrior",
    "pyrovae.regularizers.kernels.gaussian_kernel": "pyrovae.regularizers.gaussian_kernel",
}


def test_a_run_can_keep_every_option_of_training():
    of_the_command = {"quiet", "resume", "trust", "config"}
    assert {*SETTINGS, *PARTS, *NOT_KEPT} == {*inspect.signature(train).parameters} - of_the_command


@pytest.mark.parametrize("old", RENAMED)
def test_names_that_moved_are_replaced(old):
    config = {"loss": {"class_path": old, "init_args": {"a": [old, 3, None], "b": "text"}}}
    new = RENAMED[old]
    assert with_current_names(config) == {"loss": {"class_path": new, "init_args": {"a": [new, 3, None], "b": "text"}}}
    module, _, attribute = new.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_a_renamed_package_is_replaced_also_where_its_old_name_is_imported():
    importlib.import_module("pyrovae.latents")
    assert with_current_names("pyrovae.latents.VonMisesFisher") == "pyrovae.distributions.VonMisesFisher"


@pytest.mark.parametrize(
    "name",
    [
        "pyrovae.priors.VampPrior",
        "pyrovae.bounds.weighted.IWAE",
        "pyrovae.priors.Unknown",
        "pyrovae.priors",
        "os.system",
    ],
)
def test_other_names_stay(name):
    assert with_current_names(name) == name


@pytest.mark.parametrize("name", ["pyrovae.storage.os.remove", "pyrovae.latents.os.remove", "pyrovae.storage.save"])
def test_no_replacement_makes_a_name_trusted(name):
    parts = dict.fromkeys(("prior", "likelihood", "encoder", "loss", "optimizer", "scheduler"))
    config = with_current_names(parts | {"loss": {"class_path": name}})
    assert untrusted_names(config) == [name]


def test_a_run_of_an_earlier_version_is_loaded_and_resumed(tmp_path, capsys):
    options = ["--epochs", "1", "--num-samples", "10", "--latent-dim", "2"]
    main(["train", "--run", str(tmp_path / "run"), *options])
    run = shutil.copytree(tmp_path / "run", tmp_path / "old")
    config = (run / "config.yaml").read_text()
    assert "pyrovae.likelihoods.Bernoulli" in config
    config = config.replace("pyrovae.likelihoods.Bernoulli", "pyrovae.likelihoods.binary.Bernoulli")
    (run / "config.yaml").write_text(config)
    vae, loaded = load_run(run)
    assert loaded["likelihood"]["class_path"] == "pyrovae.likelihoods.Bernoulli"
    for ours, theirs in zip(vae.parameters(), load_run(tmp_path / "run")[0].parameters(), strict=True):
        assert ours.equal(theirs)
    main(["train", "--run", str(run), "--resume", "--epochs", "2"])
    added = {name: read_config(run)[name] for name in ("x_shape", "fingerprint")}
    assert yaml.safe_load((run / "config.yaml").read_text()) | added == read_config(run)
    assert added["x_shape"] == (1, 8, 8) and [part[0] for part in added["fingerprint"]] == [1197, 300, 300]


def test_a_prior_whose_first_argument_is_the_encoder_gets_it():
    vae = make_vae((4,), 2, priors.VampPrior, Bernoulli, DiagonalNormal)
    assert vae.prior.encoder is vae.encoder
    assert make_vae((4,), 2, priors.StandardNormal, Bernoulli, DiagonalNormal).prior().event_shape == (2,)
