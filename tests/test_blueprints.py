"""Modules that are saved with how they were built, and loaded without the code that built them."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import pyrovae
from pyrovae import VAE, data, encoders, likelihoods, load, load_run, priors, save, save_run, structures
from pyrovae.cli import main
from pyrovae.nn import MLP, ConvNet, DeconvNet, OneHotInput

IMAGE = (1, 8, 8)
TABLE = data.Table(
    {
        "day": ["2020-01-03", "2021-05-03", None],
        "km": [1e6 + 0.5, 1e6 + 2.5, 1e6 + 1.25],
        "city": ["Ulm", "Bern", "Ulm"],
    },
    context=["day"],
)


def shared() -> VAE:
    encoder = encoders.FullRankNormal(3, 2, network=partial(MLP, hidden=(7,), activation=nn.SiLU))
    return VAE(priors.VampPrior(encoder, 4), likelihoods.StudentT(2, 3, df=4.5, per_dimension=True), encoder)


BUILT = {
    "classes as arguments": lambda: VAE(
        priors.StandardNormal(2),
        likelihoods.DiscretizedLogistic(2, IMAGE, network=DeconvNet, levels=17),
        encoders.DiagonalNormal(IMAGE, 2, network=partial(ConvNet, channels=(4, 8))),
    ),
    "a part that two others share": shared,
    "modules as arguments": lambda: VAE(
        priors.Dirichlet(4, concentration=0.5),
        likelihoods.Multinomial(4, 9, network=nn.Linear(4, 9, bias=False)),
        encoders.LogisticNormal(9, 4, network=nn.Sequential(nn.Linear(9, 5), nn.LeakyReLU(0.3), nn.Linear(5, 8))),
    ),
    "blocks": lambda: VAE(
        priors.GaussianMixture(2, num_components=3),
        likelihoods.Mixed(2, 4, [(likelihoods.Normal, 2), (partial(likelihoods.Categorical, num_classes=5), 2)]),
        encoders.DiagonalNormal(4, 2),
    ),
    "double precision": lambda: shared().double(),
    "missing data": lambda: structures.MissingDataVAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal((2, 3), 2)
    ),
    "a table given a column": lambda: structures.table_vae(
        TABLE.schema.modelled, 2, context=TABLE.schema.context, prior=partial(priors.GaussianMixture, num_components=2)
    ),
    "classes": lambda: VAE(
        priors.Categorical(1, 5),
        likelihoods.Normal(1, 3, network=partial(OneHotInput, num_classes=5)),
        encoders.Categorical(3, 1, num_classes=5),
    ),
    "a copy": lambda: copy.deepcopy(shared()),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_module_is_built_again_with_its_weights(name, tmp_path):
    vae = BUILT[name]()
    state = torch.get_rng_state()
    save(vae, tmp_path / "vae.safetensors")
    found = load(tmp_path / "vae.safetensors")
    assert type(found) is type(vae) and repr(found) == repr(vae)
    ours, theirs = vae.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert len({id(p) for p in found.parameters()}) == len({id(p) for p in vae.parameters()})  # what was shared is
    if name == "a table given a column":
        x, mask = data.split_missing(TABLE.x)
        c = structures.TableFeatures(TABLE.schema.context)(*data.split_missing(TABLE.context))
        assert vae.encode(x, mask, c).mean.equal(found.encode(x, mask, c).mean)  # scales are in double precision
    elif name != "missing data":
        torch.manual_seed(0)
        x = vae.sample(3)
        torch.manual_seed(0)
        assert x.equal(found.sample(3))
    torch.set_rng_state(state)
    again = BUILT[name]() if name != "a copy" else vae
    assert load(again, tmp_path / "vae.safetensors") is again  # as before


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x)


def replaced() -> VAE:
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    vae.encoder.network = MLP(3, 4, hidden=(5,))
    return vae


UNDESCRIBED = {
    "a lambda": (
        lambda: encoders.DiagonalNormal(3, 2, network=lambda a, b: MLP(a, b)),
        "no name that could be imported",
    ),
    "an own network": (lambda: encoders.DiagonalNormal(3, 2, network=Own()), "network of your own"),
    "a change": (replaced, "changed after it was built"),
}


@pytest.mark.parametrize("name", UNDESCRIBED)
def test_what_cannot_be_described_keeps_its_weights_and_says_so(name, tmp_path):
    make, reason = UNDESCRIBED[name]
    module = make()
    save(module, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / "a.safetensors")
    other = make()
    load(other, tmp_path / "a.safetensors")
    assert all(p.equal(q) for p, q in zip(module.parameters(), other.parameters(), strict=True))


class OwnLikelihood(likelihoods.Normal):
    """A part of a user's own."""


def test_code_of_others_is_run_with_trust_alone(tmp_path):
    vae = VAE(priors.StandardNormal(2), OwnLikelihood(2, 3), encoders.DiagonalNormal(3, 2))
    save(vae, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"code outside pyrovae: .*OwnLikelihood.*trust=True"):
        load(tmp_path / "a.safetensors")
    assert isinstance(load(tmp_path / "a.safetensors", trust=True).likelihood, OwnLikelihood)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "pyrovae.storage.save", "torch.hub.load"])
def test_a_forged_file_runs_nothing(name, tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    from pyrovae import blueprints

    description = blueprints.describe(vae)
    for forged in (
        {"module": name, "number": 0, "args": [f"touch {tmp_path / 'made'}"], "kwargs": {}},
        {**description, "kwargs": {"x": {"partial": {"name": name}, "args": [], "kwargs": {}}}},
    ):
        with pytest.raises(ValueError, match="outside pyrovae"):
            blueprints.build(forged)
    assert not (tmp_path / "made").exists()


def test_files_of_before_say_that_they_have_weights_alone(tmp_path):
    vae = shared()
    save(vae, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["pyrovae"])
    assert "built" in about["state"]
    from pyrovae.storage import _write

    _write(tmp_path / "old.safetensors", dict(vae.state_dict()), kind="weights", state=None)
    with pytest.raises(ValueError, match=r"does not hold how the module was built.*load\(module, path\)"):
        load(tmp_path / "old.safetensors")
    load(shared(), tmp_path / "old.safetensors")


def test_a_script_makes_a_run_that_the_command_line_takes(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.RandomState(0).randn(40, 3))
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    run = tmp_path / "run"
    save_run(vae, run, data=tmp_path / "x.npy")
    main(["evaluate", str(run), "--num-samples", "5"])
    assert "test: " in capsys.readouterr().out
    main(["sample", str(run), "--num-samples", "3", "--output", str(tmp_path / "s.npy")])
    assert np.load(tmp_path / "s.npy").shape == (3, 3)
    found, config = load_run(run)
    assert found.likelihood.network.layers[0].weight.equal(vae.likelihood.network.layers[0].weight)
    assert config["x_shape"] == (3,) and not found.training
    with pytest.raises(SystemExit, match="no training to resume"):
        main(["train", "--run", str(run), "--resume"])
    with pytest.raises(FileExistsError, match="not empty"):
        save_run(vae, run, data="digits")
    own = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2, network=Own()))
    with pytest.raises(ValueError, match="network of your own"):
        save_run(own, tmp_path / "other", data="digits")
    assert not (tmp_path / "other").exists()


def test_a_vae_with_a_lambda_is_pickled_as_before(tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2, lambda a, b: MLP(a, b)))
    torch.save(vae, tmp_path / "vae.pt")
    again = torch.load(tmp_path / "vae.pt", weights_only=False)
    assert repr(again) == repr(vae) and pyrovae.__version__
