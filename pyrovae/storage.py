"""Files: weights, checkpoints and run directories. Writes are atomic, and reading a file never runs code from it."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from pyrovae import config as configs
from pyrovae._version import __version__
from pyrovae.data import Schema
from pyrovae.structures import MissingDataVAE
from pyrovae.vae import VAE

__all__ = ["load", "load_run", "read_checkpoint", "save", "write_atomically", "write_checkpoint"]

_SCHEMA = "schema.yaml"  # in the directory of a run on a table
FORMAT = "1"  # of every file; to be raised when an older pyrovae would misread what a newer one writes


def save(module: nn.Module, path: str | Path) -> None:
    """Writes the weights and buffers of a module to a safetensors file, atomically.

    Args:
        module: any module, such as a :class:`pyrovae.VAE`.
        path: the file; an existing one is replaced.

    Raises:
        OSError: when the file cannot be written. An existing file is unchanged.

    >>> import tempfile
    >>> module = nn.Linear(2, 3)
    >>> path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> save(module, path)
    >>> load(nn.Linear(2, 3), path).weight.equal(module.weight)
    True
    """
    _write(path, dict(module.state_dict()), kind="weights", state=None)


def load(module: nn.Module, path: str | Path) -> nn.Module:
    """Reads the weights that :func:`save` wrote into a module; returns the module.

    Args:
        module: a module built like the saved one.
        path: the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is corrupt, truncated, of another kind or format, or of another module. The module is
            then unchanged.
    """
    tensors, _ = _read(path, kind="weights")
    ours = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in tensors.items()}
    if ours != theirs:
        name = sorted(ours.items() ^ theirs.items())[0][0]
        raise ValueError(
            f"{path} holds the weights of another module: {name!r} has shape {theirs.get(name, 'none')} in the file, "
            f"{ours.get(name, 'none')} in the module. Build the module with the same arguments as the saved one."
        )
    module.load_state_dict(tensors)
    return module


def write_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes nested dicts, lists, tuples, numbers, strings and tensors to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, tensors)
    _write(path, tensors, kind="checkpoint", state=packed)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads what :func:`write_checkpoint` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is corrupt, truncated, or of another kind or format.
    """
    tensors, state = _read(path, kind="checkpoint")
    return _unpack(state, tensors)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file completely or not at all: to a temporary file first, flushed to the disk and renamed."""
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
            f"cannot write {path}: {error.strerror}. An existing file is unchanged. Free some space, or "
            "give another path",
        ) from error


def load_run(directory: str | Path, trust: bool = False) -> tuple[Any, dict[str, Any]]:
    """Loads a run directory that ``pyrovae train`` wrote, without running code from it.

    Args:
        directory: the run directory.
        trust: allow the configuration to name classes outside pyrovae, torch and Pyro, which are then imported and run.

    Returns:
        The :class:`pyrovae.VAE`, in evaluation mode, and the configuration; of a table a
        :class:`~pyrovae.structures.MissingDataVAE`, and the :class:`pyrovae.data.Schema` as the entry "table". Names
        of classes that have moved since the run was written are the present ones.

    Raises:
        FileNotFoundError: when the directory is not a run, or has no weights yet.
        ValueError: when a file is corrupt or of another format, or when the configuration names code outside pyrovae,
            torch and Pyro and `trust` is False.
    """
    directory = Path(directory)
    config = read_config(directory, trust)
    weights = directory / "weights.safetensors"
    if not weights.exists():
        raise FileNotFoundError(
            f"{directory} has no weights yet. Finish the run with: pyrovae train --run {directory} --resume"
        )
    vae: VAE | MissingDataVAE = configs.build_vae(config, config["x_shape"], config.get("table"))
    load(vae, weights)
    return vae.eval(), config


def create_run(directory: str | Path, config: str, x_shape: tuple[int, ...], schema: Schema | None = None) -> None:
    """Writes the files that mark a directory as a run: its configuration, and the version and the shape of a datum.

    Args:
        directory: the run directory.
        config: the configuration, as YAML.
        x_shape: shape of a datum.
        schema: the columns of a table, which go into ``schema.yaml``; None for other data.
    """
    if schema is not None:
        write_atomically(Path(directory) / _SCHEMA, schema.to_yaml().encode())
    about = {"pyrovae": __version__, "format": FORMAT, "x_shape": x_shape}
    write_atomically(Path(directory) / "config.yaml", config.encode())
    write_atomically(Path(directory) / "run.json", json.dumps(about).encode())


def read_config(directory: str | Path, trust: bool = False) -> dict[str, Any]:
    """Reads the configuration of a run, with the shape of a datum as its entry "x_shape".

    That of a table has the :class:`pyrovae.data.Schema` as its entry "table".

    Args:
        directory: the run directory.
        trust: allow names of classes outside pyrovae, torch and Pyro.

    Raises:
        FileNotFoundError: when the directory is not a run.
        ValueError: when a file is corrupt or of another format, or names code that is not trusted.
    """
    file, about = Path(directory) / "config.yaml", Path(directory) / "run.json"
    for needed in (file, about):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{directory} is not a run directory: it has no {needed.name}. Give one that pyrovae train wrote."
            )
    try:
        written_by = json.loads(about.read_text())
        if written_by["format"] != FORMAT:
            raise ValueError(
                f"{directory} is a run of pyrovae {written_by['pyrovae']}, format {written_by['format']}; this is "
                f"pyrovae {__version__}, which reads format {FORMAT}. Use that version, or train a new run."
            )
        config = configs.with_current_names(yaml.safe_load(file.read_text()))
        config = config | {"x_shape": tuple(written_by["x_shape"])}
        if (Path(directory) / _SCHEMA).exists():
            config["table"] = Schema.from_yaml(Path(directory) / _SCHEMA)
        untrusted = [] if trust else configs.untrusted_names(config)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} has a corrupt config.yaml or run.json ({error!r}).") from error
    if untrusted:
        raise ValueError(
            f"{file} names code outside pyrovae: {', '.join(untrusted)}. To load the run would execute this code. If "
            "you trust it, use --trust (in Python: trust=True)."
        )
    return config


def _flush_directory(directory: Path) -> None:
    # So that the new name outlives a power failure. Windows cannot open a directory, and does not need it.
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: str | Path, tensors: dict[str, Tensor], kind: str, state: Any) -> None:
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    about = {"version": __version__, "format": FORMAT, "kind": kind, "sha256": _digest(tensors, state), "state": state}
    # A single entry, because safetensors writes several in any order, and equal weights must make equal files.
    write_atomically(path, safetensors.torch.save(tensors, {"pyrovae": json.dumps(about)}))


def _read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}. Give a {kind} file that pyrovae wrote.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "pyrovae" not in metadata:
                raise ValueError(f"{path} was not written by pyrovae. Give a {kind} file that was.")
            about = json.loads(metadata["pyrovae"])
            if about["format"] != FORMAT:
                raise ValueError(
                    f"{path} was written by pyrovae {about['version']} in format {about['format']}; this is pyrovae "
                    f"{__version__}, which reads format {FORMAT}. Use that version, or write the file again."
                )
            if about["kind"] != kind:
                raise ValueError(f"{path} holds {about['kind']}, not {kind}. Give a {kind} file.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
            intact = about["sha256"] == _digest(tensors, about["state"])
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is truncated, corrupt or not a safetensors file ({error}). Use another copy."
        ) from error
    if not intact:
        raise ValueError(f"{path} is corrupt: its checksum does not match its content. Use another copy.")
    return tensors, about["state"]


def _digest(tensors: dict[str, Tensor], state: Any) -> str:
    digest = hashlib.sha256(json.dumps(state).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns a nested value as JSON can hold it. Tensors are moved to `tensors`, under numbers."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):  # as pairs, because JSON would turn keys that are numbers into strings
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    raise TypeError(
        f"a checkpoint cannot hold a {type(value).__name__}: {value!r}. It is in the history, or in the state of the "
        "optimizer or scheduler: use numbers, strings and tensors there."
    )


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
