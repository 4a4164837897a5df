"""Runs on the Hugging Face Hub, with a card that is written from the run."""

import contextlib
import importlib
import json
import shutil
import tempfile
from inspect import signature
from pathlib import Path
from typing import Any

from pyrovae import storage
from pyrovae._version import __version__
from pyrovae.extras import check_installed
from pyrovae.parts import context_size

__all__ = ["load_from_hub", "push_to_hub"]

# No checkpoint, and no picture that shows data.
_FILES = (
    *storage.ABOUT,
    "weights.safetensors",
    "metrics.jsonl",
    "samples.png",
    "learning_curve.png",
)
_NEEDED = ("config.yaml", "run.json", "weights.safetensors")


def push_to_hub(directory: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Sends a finished run to the Hugging Face Hub, with a card; returns the address of the commit.

    The weights, the configuration, the history and pictures of samples are sent, but no data. The schema of a table,
    which is needed to load it, has the names of its columns and their classes, and the vocabulary of a text its words;
    exemplars are weights.

    Args:
        directory: of the run.
        repo_id: "user/name"; the repository is made if there is none.
        private: make a new repository private.
        token: an access token; that of your login if None.

    Raises:
        ImportError: when huggingface-hub is not installed.
        FileNotFoundError: when the run has no weights.
        ValueError: when the run is damaged, or its configuration was edited.
    """
    hub = _package()
    directory = Path(directory)
    config = storage.read_config(directory, trust=True)  # which builds nothing
    for name in _NEEDED:
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} has no {name}. Finish the run, then send it.")
    vae = None
    with contextlib.suppress(ValueError):  # of classes from elsewhere, whose code is not run to write a card
        vae = storage.load_run(directory)[0]
    with tempfile.TemporaryDirectory() as folder:
        for name in _FILES:
            if (directory / name).exists():
                shutil.copy(directory / name, folder)
        (Path(folder) / "README.md").write_text(card(directory, repo_id, vae, config), encoding="utf-8")
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        sent = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"A run of pyrovae {__version__}")
    return str(sent.commit_url)


def load_from_hub(
    repo_id: str, *, revision: str | None = None, token: str | None = None, trust: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Loads a run from the Hugging Face Hub, without running code from it; returns what :func:`pyrovae.load_run` does.

    Args:
        repo_id: "user/name".
        revision: a branch, a tag or a commit.
        token: an access token; that of your login if None.
        trust: allow the configuration to name classes outside pyrovae, torch and Pyro, which are then imported and run.

    Raises:
        ImportError: when huggingface-hub is not installed.
        ValueError: as :func:`pyrovae.load_run`.
    """
    hub = _package()
    folder = hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(_FILES))
    return storage.load_run(folder, trust=trust)


def card(directory: Path, repo_id: str, vae: Any, config: dict[str, Any]) -> str:
    """Returns the card of a run in Markdown: what it was trained on, its parts, its score, and how to load it."""
    parts = [f"| {part} | `{_described(config[part])}` |" for part in _PARTS if config.get(part) is not None]
    lines = [
        "---\nlibrary_name: pyrovae\ntags:\n- variational-autoencoder\n- pyro\n---",
        f"# {repo_id.rpartition('/')[2]}",
        "A variational autoencoder that [pyrovae](https://github.com/pyrovae/pyrovae) trained.",
        "\n".join(["| | |", "|---|---|", f"| data | `{Path(str(config['data'])).name}` |", *parts]),
        "## Score",
        _score(directory / "metrics.jsonl"),
        "## Load",
        f'```python\nfrom pyrovae.hub import load_from_hub\n\nvae, config = load_from_hub("{repo_id}")\n'
        f"{_drawn(vae)}\n```",
    ]
    if (directory / "samples.png").exists():
        lines.insert(4, "![samples](samples.png)")
    return "\n\n".join(lines) + "\n"


def _drawn(vae: Any) -> str:
    """Returns the lines that draw samples, of some steps and for each of some contexts if the parts take them.

    Nothing is known of the parts if the VAE is None.
    """
    if vae is None:
        return "x = vae.sample(16)"
    has_steps = "num_steps" in signature(vae.sample).parameters
    given = "16, 20" if has_steps else "16"
    context_dim = context_size(vae)
    if context_dim == 0:
        return f"x = vae.sample({given})"
    if has_steps:
        rows = f"import torch\n\ncontext = torch.zeros(1, 20, {context_dim})  # numbers of your own, for each step"
        return f"{rows}\nx = vae.sample({given}, context)"
    rows = f"import torch\n\ncontext = torch.eye({context_dim})  # a row for each class, or numbers of your own"
    return f"{rows}\nx = vae.sample({given}, context)  # 16 for each row"


_PARTS = ("latent_dim", "prior", "likelihood", "encoder", "structure", "loss", "preprocessing")


def _described(value: Any) -> str:
    """Returns a class with its arguments, or a value, in a line."""
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value).replace("|", "/").replace("`", "'")
    arguments = ", ".join(
        f"{name}={_described(x)}" for name, x in (value.get("init_args") or {}).items() if x is not None
    )
    return f"{str(value['class_path']).rpartition('.')[2]}({arguments})"


def _score(metrics: Path) -> str:
    """Returns the score of the test data in words."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    result = next((record for record in reversed(records) if "log_marginal" in record), None)
    if result is None:
        return "The run was not scored."
    n, what = result["num_data"], result.get("scored", "log p(x)")
    text = (
        f"{what} = {result['log_marginal']:.3f} ± {result['standard_error']:.3f} nats a datum, on {n:,} test data, "
        f"of which {1 - result['not_trusted'] / n:.1%} can be trusted. The error is that of sampling."
    )
    return text + (f" Independent dimensions: {result['baseline']:.3f}." if "baseline" in result else "")


def _package() -> Any:
    check_installed("huggingface_hub", "hub")
    return importlib.import_module("huggingface_hub")
