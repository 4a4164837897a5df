"""No file makes pyrovae import or build code of others without ``--trust``, by any way in."""

import inspect
import json
import shutil
import sys

import pytest
import yaml

import pyrovae
from pyrovae.cli import main
from pyrovae.cli.parser import COMMANDS
from pyrovae.config import check, check_options

# Importing it leaves a file, so that also an import that ends in an error is seen.
EVIL = """
import pathlib

import torch

from pyrovae.likelihoods import Bernoulli
from pyrovae.priors import StandardNormal

pathlib.Path(__file__).with_name("imported").touch()


class Net(torch.nn.Linear):
    def __init__(self, in_shape, out_shape, **kwargs):
        super().__init__(in_shape, out_shape)


class Prior(StandardNormal):
    pass


class Likelihood(Bernoulli):
    pass


class Optimizer(torch.optim.Adam):
    pass


def kernel(x, y):
    return x
"""

OF_A_CLASS = {"class_path": "evil.Net"}
NETWORK = {"network": "evil.Net"}
BERNOULLI = "pyrovae.likelihoods.Bernoulli"

# Entries that replace, or come beside, those of a sound configuration.
ATTACKS = {
    "a class": {"prior": {"class_path": "evil.Prior"}},
    "a name alone": {"likelihood": "evil.Likelihood"},
    "an argument": {"likelihood": {"class_path": BERNOULLI, "init_args": {"network": OF_A_CLASS}}},
    "a short name of the class": {"likelihood": {"class_path": "Bernoulli", "init_args": NETWORK}},
    "text of YAML as an argument": {
        "likelihood": {"class_path": BERNOULLI, "init_args": {"network": "{class_path: evil.Net}"}}
    },
    "a function": {"prior": {"class_path": "pyrovae.priors.GaussianProcess", "init_args": {"kernel": "evil.kernel"}}},
    "dict_kwargs": {"likelihood": {"class_path": BERNOULLI, "dict_kwargs": {"network": OF_A_CLASS}}},
    "a list": {"loss": {"class_path": "pyrovae.bounds.ELBO", "init_args": {"regularizers": [OF_A_CLASS]}}},
    "a dotted key": {"likelihood.init_args.network": "evil.Net"},
    "a dotted key of a class": {"prior.class_path": "evil.Prior"},
    "a dotted key of the optimizer": {"optimizer.class_path": "evil.Optimizer"},
    "a dotted key within": {"likelihood": {"class_path": BERNOULLI, "init_args.network": "evil.Net"}},
    "another file": {"config": "other.yaml"},
    "other files": {"config": ["other.yaml"]},
    "another file as a part": {"likelihood": "other.yaml"},
    "trust": {"trust": True, "prior": {"class_path": "evil.Prior"}},
    "built": {"built": "yes", "prior": {"class_path": "evil.Prior"}},
}
# The same as text, where YAML has ways of its own.
TEXTS = {
    "a tag of Python": "prior: !!python/name:evil.Prior",
    "a tag that calls": "prior: !!python/object/apply:evil.Prior [2]",
    "a set": "likelihood: {class_path: pyrovae.likelihoods.Bernoulli, init_args: {network: !!set {evil.Net}}}",
    "pairs": "likelihood: !!pairs [class_path: evil.Likelihood]",
    "bytes": "prior: !!binary ZXZpbC5QcmlvcgpldmlsLlByaW9y",
    "a key twice": "prior: {class_path: pyrovae.priors.StandardNormal}\nprior: {class_path: evil.Prior}",
    "an alias": "data: &name evil.Prior\nprior: {class_path: *name}",
    "a merge": "likelihood: &x {class_path: evil.Likelihood}\nprior: {<<: *x}",
    "a list of documents": "latent_dim: 2\n---\nprior: {class_path: evil.Prior}",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trust") / "sound"
    main(["train", "--run", str(directory), "--epochs", "1", "--num-samples", "10", "--latent-dim", "2"])
    return directory


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """A directory that people share: a run, code, and a file that names the code. It is the current one."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"prior": {"class_path": "evil.Prior"}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # as where Python itself puts it there
    yield tmp_path
    sys.modules.pop("evil", None)


def is_refused(*argv):
    with pytest.raises(SystemExit) as exit:
        main(list(argv))
    return exit.value.code not in (None, 0)


def texts():
    for name, entries in ATTACKS.items():
        yield pytest.param(lambda config, entries=entries: yaml.safe_dump({**config, **entries}), id=name)
    for name, text in TEXTS.items():
        yield pytest.param(lambda config, text=text: f"{yaml.safe_dump(config)}\n{text}\n", id=name)


@pytest.mark.parametrize("attack", [*texts()])
def test_nothing_is_imported_by_any_way_in(attack, place):
    text = attack(yaml.safe_load((place / "run" / "config.yaml").read_text()))
    (place / "run" / "config.yaml").write_text(text)
    assert is_refused("train", "--run", "run", "--resume", "--epochs", "2")
    assert is_refused("train", "--config", "run/config.yaml", "--run", "new", "--epochs", "1")
    assert is_refused("train", "--config", text, "--run", "new", "--epochs", "1")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        pyrovae.load_run("run")
    assert not (place / "imported").exists() and not (place / "new").exists()


def test_every_command_refuses(place):
    config = yaml.safe_load((place / "run" / "config.yaml").read_text())
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(config | ATTACKS["an argument"]))
    of_rows = {"score", "impute", "encode"}
    for command in COMMANDS.keys() - {"describe", "train"}:
        more = ["run/metrics.jsonl"] if command in of_rows else ["run"] if command == "compare" else []
        assert is_refused(command, "run", *more), command
    assert is_refused("train", "--run", "run", "--resume")
    assert is_refused("train", "--print_config", "--config", "run/config.yaml")
    assert not (place / "imported").exists()


def test_the_environment_gives_no_options(place, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("PYROVAE_TRAIN__PRIOR", "evil.Prior")
    monkeypatch.setenv("PYROVAE_TRAIN__CONFIG", "other.yaml")
    monkeypatch.setenv("PYROVAE_CONFIG", "other.yaml")
    main(["train", "--run", "new", "--epochs", "1", "--num-samples", "10", "--latent-dim", "2"])
    assert not (place / "imported").exists()
    assert "evil" not in (place / "new" / "config.yaml").read_text()


def test_a_file_whose_name_is_a_configuration_is_not_read_for_it(place):
    (place / "epochs: 1\n").write_text("prior: {class_path: evil.Prior}")
    (place / "sound.yaml").write_text("epochs: 1\n")
    main(["train", "--config", "sound.yaml", "--run", "new", "--num-samples", "10", "--latent-dim", "2"])
    assert not (place / "imported").exists()


def test_a_file_does_not_stand_in_for_a_module_that_is_not_installed(place, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(place)])
    main(["evaluate", "run", "--num-samples", "10"])
    assert str(place) not in sys.path


@pytest.mark.parametrize("attack", ["a class", "an argument", "a function", "another file as a part"])
def test_the_message_names_the_code(attack, place):
    (place / "run" / "config.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((place / "run" / "config.yaml").read_text()), **ATTACKS[attack]})
    )
    with pytest.raises(SystemExit, match=r"names code outside pyrovae: (evil\.|other\.yaml).*--trust"):
        main(["evaluate", "run"])
    with pytest.raises(SystemExit, match=r"run/config\.yaml: it names code outside pyrovae: (evil\.|other\.yaml)"):
        main(["train", "--config", "run/config.yaml", "--run", "new"])


def test_with_trust_it_is_imported(place):
    config = yaml.safe_load((place / "run" / "config.yaml").read_text())
    config["prior"] = {"class_path": "evil.Prior"}
    (place / "own.yaml").write_text(yaml.safe_dump(config))
    main(["train", "--config", "own.yaml", "--run", "new", "--num-samples", "10", "--trust"])
    assert (place / "imported").exists()
    assert type(pyrovae.load_run("new", trust=True)[0].prior).__name__ == "Prior"


def test_what_an_option_names_needs_no_leave(place):
    main(["train", "--run", "new", "--epochs", "1", "--num-samples", "10", "--prior", "evil.Prior"])
    assert (place / "imported").exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.jit.ScriptModule", "torch.fx.GraphModule", "torch.hub.load", "pyro.nn.PyroModule", "torch.nn.init.ones_",
        "pyrovae.storage.load", "pyrovae.cli.main", "torch.optim.adam.torch.load", "pyro.infer.autoguide.AutoNormal",
        "torch.nnx.Linear", "pyrovae_of_others.Net",
    ],
)  # fmt: skip
def test_of_torch_and_pyro_only_modules_optimizers_and_bounds_are_built(name):
    with pytest.raises(ValueError, match=f"names code outside pyrovae: {name}"):
        check({"loss": {"class_path": name}})


@pytest.mark.parametrize(
    "name",
    ["torch.nn.ReLU", "torch.optim.Adam", "torch.optim.lr_scheduler.StepLR", "pyro.infer.Trace_ELBO",
     "pyrovae.bounds.IWAE", "pyrovae.nn.MLP", "IWAE", "1e-3"],
)  # fmt: skip
def test_parts_optimizers_and_bounds_are_trusted(name):
    check({"loss": {"class_path": name}})


def test_run_json_and_schema_are_checked_as_well(place):
    about = json.loads((place / "run" / "run.json").read_text())
    for x_shape in ("evil.Net", [1, "8"], [], [0], [1.5], None, {"class_path": "evil.Net"}):
        (place / "run" / "run.json").write_text(json.dumps(about | {"x_shape": x_shape}))
        with pytest.raises(ValueError, match="x_shape must be a list of positive integers"):
            pyrovae.load_run("run")
    assert not (place / "imported").exists()


OPTIONS = sorted({*inspect.signature(COMMANDS["train"]).parameters} - {"quiet", "resume", "trust", "config"})


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_training_may_be_in_a_file(name):
    with pytest.raises(ValueError, match=name) as error:
        check_options({name: object})
    assert "no setting" not in str(error.value)
