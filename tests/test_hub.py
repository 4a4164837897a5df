"""Runs that are sent to a stand-in of the hub come back the same, and no data are sent."""

import importlib.util
import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import pyrovae
from pyrovae import VAE, encoders, hub, likelihoods, load_run, priors
from pyrovae.cli import main
from pyrovae.structures import ForwardGRU, RecurrentVAE

REAL = importlib.util.find_spec("huggingface_hub") is not None


class StandIn:
    """The functions of huggingface_hub that are used, on a folder; their calls are checked against the real ones."""

    def __init__(self, root):
        self.root, self.private = root, {}

    def check(self, real, **kwargs):
        if REAL:
            import huggingface_hub

            inspect.signature(getattr(huggingface_hub, real)).bind(**kwargs)

    def HfApi(self, token):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.check("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        self.private[repo_id] = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.check("upload_folder", repo_id=repo_id, folder_path=folder_path, commit_message=commit_message)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/1")

    def snapshot_download(self, repo_id, revision, token, allow_patterns):
        self.check("snapshot_download", repo_id=repo_id, revision=revision, token=token, allow_patterns=allow_patterns)
        return str(self.root / repo_id)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr(hub, "_package", lambda: stand_in)
    return stand_in


@pytest.fixture
def run(tmp_path):
    shape = (1, 8, 8)
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, shape), encoders.DiagonalNormal(shape, 2))
    pyrovae.save_run(vae, tmp_path / "run", data=tmp_path / "secret" / "digits.npy")
    result = {"log_marginal": -22.5, "standard_error": 0.004, "not_trusted": 3, "num_data": 300, "baseline": -27.0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(result) + "\n")
    for name in ("reconstructions.png", "checkpoint.safetensors", "report.html"):
        (tmp_path / "run" / name).write_bytes(b"data")
    return tmp_path / "run"


def test_a_run_comes_back_with_its_weights_and_no_data_are_sent(run, stand_in):
    assert hub.push_to_hub(run, "me/digits", private=True) == "hub/me/digits/1"
    assert stand_in.private == {"me/digits": True}
    assert {path.name for path in (stand_in.root / "me/digits").iterdir()} == {
        "README.md", "config.yaml", "run.json", "weights.safetensors", "metrics.jsonl",
    }  # fmt: skip
    (sent, _), (found, _) = load_run(run), hub.load_from_hub("me/digits")
    assert all(torch.equal(a, b) for a, b in zip(sent.state_dict().values(), found.state_dict().values(), strict=True))


def test_the_card_says_data_score_and_how_to_load(run, stand_in):
    hub.push_to_hub(run, "me/digits")
    card = (stand_in.root / "me/digits/README.md").read_text()
    assert card.startswith("---\nlibrary_name: pyrovae\n")
    assert "-22.500 ± 0.004 nats a datum, on 300 test data, of which 99.0% can be trusted" in card
    assert "| data | `digits.npy` |" in card and "secret" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code, names)
    assert names["x"].shape == (16, 1, 8, 8)


def test_the_card_of_a_run_with_a_context_gives_one(tmp_path, stand_in):
    likelihood = likelihoods.Bernoulli(2, 5, context_dim=3)
    vae = VAE(priors.StandardNormal(2), likelihood, encoders.DiagonalNormal(5, 2, context_dim=3))
    pyrovae.save_run(vae, tmp_path / "run", data=tmp_path / "classes.npz")
    hub.push_to_hub(tmp_path / "run", "me/classes")
    names = {}
    exec((stand_in.root / "me/classes/README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    assert names["x"].shape == (16, 3, 5)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_the_card_of_sequences_draws_steps(tmp_path, stand_in, context_dim):
    width = 8
    vae = RecurrentVAE(
        priors.DiagonalNormal(2, context_dim=width + context_dim),
        likelihoods.Normal(2, 5, context_dim=width + context_dim),
        encoders.DiagonalNormal(5, 2, context_dim=width + context_dim),
        ForwardGRU(5, 2, width=width),
    )
    pyrovae.save_run(vae, tmp_path / "run", data=tmp_path / "series.npy")
    hub.push_to_hub(tmp_path / "run", "me/series")
    names = {}
    exec((stand_in.root / "me/series/README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    assert names["x"].shape == ((16, 20, 5) if context_dim == 0 else (16, 1, 20, 5))


def test_a_run_on_text_keeps_its_words(tmp_path, stand_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join(f"{a} {b}." for a in "abcde" for b in ("ran", "sat", "ate")))
    main(["train", "--data", "lines.txt", "--run", "run", "--epochs", "1", "--num-samples", "2", "--quiet"])
    hub.push_to_hub("run", "me/lines")
    assert hub.load_from_hub("me/lines")[1]["vocabulary"] == load_run("run")[1]["vocabulary"]


def test_code_from_elsewhere_is_not_run_to_write_a_card(run, stand_in, monkeypatch):
    asked = []

    def load_run(directory, *, trust=False):
        asked.append(trust)
        raise ValueError("the likelihood names a class from elsewhere")

    monkeypatch.setattr(hub.storage, "load_run", load_run)
    hub.push_to_hub(run, "me/digits")
    assert asked == [False]
    assert "x = vae.sample(16)\n```" in (stand_in.root / "me/digits/README.md").read_text()


def test_classes_are_described_with_their_arguments():
    config = {"class_path": "pyrovae.priors.VampPrior", "init_args": {"num_components": 20, "data": None}}
    assert hub._described(config) == "VampPrior(num_components=20)"


def test_an_unfinished_run_is_refused_and_nothing_is_sent(run, stand_in):
    (run / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights\.safetensors"):
        hub.push_to_hub(run, "me/digits")
    assert not stand_in.root.exists()


def test_a_missing_package_is_named(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pyrovae\[hub\]'"):
        hub.push_to_hub(run, "me/digits")
