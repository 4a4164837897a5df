"""Files: weights, checkpoints and run directories, written whole or not at all, and read without running code."""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from pyrovae._version import __version__

__all__ = ["load", "load_run", "read_checkpoint", "save", "write_atomically", "write_checkpoint"]

FORMAT = "1"  # of every file; raised when an older pyrovae could misread what a newer one writes


def save(module: nn.Module, path: str | Path) -> None:
    """Writes the weights and buffers of a module to a safetensors file, whole or not at all.

    Args:
        module: any module, a :class:`pyrovae.VAE` for example.
        path: the file; one that is there is replaced.

    Raises:
        OSError: when the file cannot be written. What was there before stays as it was.

    >>> import tempfile
    >>> module = nn.Linear(2, 3)
    >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> save(module, path)
    >>> load(nn.Linear(2, 3), path).weight.equal(module.weight)
    True
    """
    _write(path, dict(module.state_dict()), kind="weights", state=None)


def load(module: nn.Module, path: str | Path) -> nn.Module:
    """Reads weights that :func:`save` wrote into a module of the same shape; returns the module.

    Args:
        module: a module built like the one that was saved.
        path: the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is corrupt, truncated, of another kind or version, or another module's. The module is
            left as it was.
    """
    tensors, _ = _read(path, kind="weights")
    ours = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in tensors.items()}
    if ours != theirs:
        name = sorted(ours.items() ^ theirs.items())[0][0]
        raise ValueError(
            f"{path} holds the weights of another module: {name!r} has shape {theirs.get(name, 'none')} in the file, "
            f"{ours.get(name, 'none')} in the module. Build the module as it was when it was saved."
        )
    module.load_state_dict(tensors)
    return module


def write_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings and tensors to one safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, tensors)
    _write(path, tensors, kind="checkpoint", state=packed)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what :func:`write_checkpoint` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is corrupt, truncated, or of another kind or version.
    """
    tensors, state = _read(path, kind="checkpoint")
    return _unpack(state, tensors)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all: beside it first, then flushed to the disk and renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):  # Ctrl-C, for one
            raise
        raise OSError(
            error.errno,
            f"cannot write {path}: {error.strerror}. What was there before is unchanged. Make room or name "
            "another place",
        ) from error


def load_run(directory: str | Path, trust: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a run directory that ``pyrovae train`` wrote, without running code from it.

    Args:
        directory: the run directory.
        trust: let its configuration name classes outside pyrovae, which are then imported and built.

    Returns:
        The :class:`pyrovae.VAE`, in evaluation mode, and the configuration.

    Raises:
        FileNotFoundError: when there is no such run, or it has no weights yet.
        ValueError: when a file is corrupt or from another version, or the configuration names classes outside pyrovae
            and is not trusted.
    """
    from pyrovae.cli import build_from_config  # the command line imports this module

    directory = Path(directory)
    config = read_config(directory, trust)
    weights = directory / "weights.safetensors"
    if not weights.exists():
        raise FileNotFoundError(
            f"{directory} has no weights yet. Finish it with: pyrovae train --run {directory} --resume"
        )
    vae = build_from_config(config, config["x_shape"])
    return load(vae, weights).eval(), config


def create_run(directory: str | Path, config: str, x_shape: tuple[int, ...]) -> None:
    """Writes what makes a directory a run's: its configuration, and the version and shape of data it is for."""
    about = {"pyrovae": __version__, "format": FORMAT, "x_shape": x_shape}
    write_atomically(Path(directory) / "config.yaml", config.encode())
    write_atomically(Path(directory) / "run.json", json.dumps(about).encode())


def read_config(directory: str | Path, trust: bool = False) -> dict[str, Any]:
    """Reads a run's configuration and ``x_shape``; raises a ValueError if it names code that is not to be trusted."""
    file, about = Path(directory) / "config.yaml", Path(directory) / "run.json"
    for needed in (file, about):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{directory} is no run directory: it has no {needed.name}. Name one of pyrovae train's."
            )
    try:
        written_by = json.loads(about.read_text())
        if written_by["format"] != FORMAT:
            raise ValueError(
                f"{directory} is a run of pyrovae {written_by['pyrovae']}, format {written_by['format']}; this is pyrovae "
                f"{__version__}, which reads format {FORMAT}. Use that version, or train anew."
            )
        config = yaml.safe_load(file.read_text()) | {"x_shape": tuple(written_by["x_shape"])}
        parts = {name: config[name] for name in ("prior", "likelihood", "encoder", "loss", "optimizer", "scheduler")}
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} has a corrupt config.yaml or run.json ({error!r}).") from error
    strange = [] if trust else [name for name in _strings(parts) if not _is_known_class(name)]
    if strange:
        raise ValueError(
            f"{file} names code outside pyrovae: {', '.join(strange)}. Loading the run would execute it. If you trust it, say "
            "so with --trust (in Python: trust=True)."
        )
    return config


def _strings(value: Any) -> list[str]:
    """Returns all strings that may name code; the name of a Pyro site, a word without a dot, does not."""
    if isinstance(value, dict):
        sites = isinstance(value.get("site"), str) and value["site"].isidentifier()
        return [s for k, v in value.items() if not (k == "site" and sites) for s in _strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []


def _is_known_class(name: str) -> bool:
    """Whether a name is that of a class that pyrovae, torch or Pyro has loaded already; imports nothing.

    What else the priors, bounds and regularizers make public (kernels, flows, schedules) is as harmless.
    """
    module, _, attribute = name.rpartition(".")
    kind = getattr(sys.modules.get(module), attribute, None)
    if (
        module in ("pyrovae.priors", "pyrovae.bounds", "pyrovae.regularizers")
        and attribute in sys.modules[module].__all__
    ):
        return True
    kinds = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, pyro.infer.ELBO)
    return (
        module.split(".")[0] in ("pyrovae", "torch", "pyro")
        and isinstance(kind, type)
        and issubclass(kind, kinds)
        and kind.__module__.split(".")[0] in ("pyrovae", "torch", "pyro")
    )


def _flush_directory(directory: Path) -> None:
    # The new name, too, is to outlive a power failure. Windows cannot, and need not, open a directory for that.
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: str | Path, tensors: dict[str, Tensor], kind: str, state: Any) -> None:
    # Copies, for safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    about = {"version": __version__, "format": FORMAT, "kind": kind, "sha256": _digest(tensors, state), "state": state}
    # One entry, for safetensors writes several in any order, and equal weights are to make equal files.
    write_atomically(path, safetensors.torch.save(tensors, {"pyrovae": json.dumps(about)}))


def _read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}. Name a {kind} file that pyrovae wrote.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "pyrovae" not in metadata:
                raise ValueError(f"{path} was not written by pyrovae. Name a {kind} file that was.")
            about = json.loads(metadata["pyrovae"])
            if about["format"] != FORMAT:
                raise ValueError(
                    f"{path} was written by pyrovae {about['version']} in format {about['format']}; this is pyrovae "
                    f"{__version__}, which reads format {FORMAT}. Use that version, or write the file anew."
                )
            if about["kind"] != kind:
                raise ValueError(f"{path} holds {about['kind']}, not {kind}. Name a {kind} file.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            intact = about["sha256"] == _digest(tensors, about["state"])
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file ({error}). Use another copy.") from error
    if not intact:
        raise ValueError(f"{path} is corrupt: its content does not have the checksum in it. Use another copy.")
    return tensors, about["state"]


def _digest(tensors: dict[str, Tensor], state: Any) -> str:
    digest = hashlib.sha256(json.dumps(state).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turns a nested value into what JSON keeps, with tensors put aside by number."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):  # as pairs, for keys may be numbers, which JSON would turn into strings
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    raise TypeError(f"a checkpoint cannot keep a {type(value).__name__} (of a scheduler or optimizer): {value!r}.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if isinstance(value, dict):
        [(kind, content)] = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_unpack(v, tensors) for v in content)
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    return value
