"""Files: weights, checkpoints and run directories. Writes are atomic, and reading a file never runs code from it."""

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from pyrovae import blueprints
from pyrovae import config as configs
from pyrovae._version import __version__
from pyrovae.complaints import explain
from pyrovae.data import PianoRoll, Schema, Spectrogram, Splits, TimeSeries, Vocabulary
from pyrovae.documents import read_yaml
from pyrovae.inference.messages import warn
from pyrovae.likelihoods import Tabular
from pyrovae.vae import Registered

__all__ = ["load", "load_run", "read_checkpoint", "save", "save_run", "write_atomically", "write_checkpoint"]

_SCHEMA = "schema.yaml"  # in the directory of a run on a table
# How files became data, by the names of splits and of configurations: what it is, and its file in the run directory.
ENCODINGS: dict[str, tuple[type[Vocabulary | Spectrogram | PianoRoll | TimeSeries], str]] = {
    "vocabulary": (Vocabulary, "vocabulary.json"),
    "spectrogram": (Spectrogram, "spectrogram.json"),
    "piano_roll": (PianoRoll, "piano_roll.json"),
    "time_series": (TimeSeries, "time_series.json"),
}
ABOUT = ("config.yaml", "run.json", _SCHEMA, *(file for _, file in ENCODINGS.values()))  # the files that tell of a run
_MAX_NUMBERS = 10_000_000  # in a tensor of a new module, unless its weights are larger
FORMAT = "1"  # of every file; to be raised when an older pyrovae would misread what a newer one writes


def save(module: nn.Module, path: str | Path) -> None:
    """Writes the weights and buffers of a module to a safetensors file, atomically, and how it was built.

    A VAE, a part or a network of pyrovae remembers its arguments. If these have names or values that can be written
    (classes, numbers, tensors, other such modules), :func:`load` needs the path alone.

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
    _write(path, dict(module.state_dict()), kind="weights", state=_described(module))


def _described(module: nn.Module) -> dict[str, Any]:
    try:
        return {"built": blueprints.describe(module)}
    except blueprints.Undescribed as reason:
        return {"undescribed": str(reason)}


@overload
def load(module: nn.Module, path: str | Path) -> nn.Module: ...


@overload
def load(module: str | Path, path: None = None, *, trust: bool = False) -> nn.Module: ...


def load(module: nn.Module | str | Path, path: str | Path | None = None, *, trust: bool = False) -> nn.Module:
    """Reads the weights that :func:`save` wrote: ``load(module, path)``, or ``load(path)``, which builds the module.

    Only classes of pyrovae, torch and Pyro are built, unless `trust` is True.

    Args:
        module: a module built like the saved one; or the file.
        path: the file.
        trust: allow the file to name classes outside pyrovae, torch and Pyro, which are then imported and run.

    Returns:
        The module.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is corrupt, truncated, of another kind or format, or of another module, which is then
            unchanged; or, for ``load(path)``, when it does not hold how the module was built, or names other code.
    """
    if path is None:
        if isinstance(module, nn.Module):
            raise TypeError("load takes a module and a path, or a path alone.")
        return _load_built(module, trust)
    if not isinstance(module, nn.Module):
        raise TypeError(f"load takes a module and a path, or a path alone; got {module!r} as the module.")
    tensors, _ = _read(path, kind="weights")
    return _with_weights(module, tensors, path)


def _load_built(path: str | Path, trust: bool) -> nn.Module:
    tensors, state = _read(path, kind="weights")
    if not (isinstance(state, dict) and "built" in state):
        reason = f": {state['undescribed']}" if isinstance(state, dict) and "undescribed" in state else ""
        raise ValueError(
            f"{path} does not hold how the module was built{reason}. Build it, and call load(module, path)."
        )
    try:
        module = blueprints.build(state["built"], trust)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # of a constructor, whose arguments may have changed since
        raise ValueError(
            f"{path} was saved by pyrovae {_version_of(path)}, and cannot be built by {__version__} ({error}). Build "
            "the module, and call load(module, path)."
        ) from error
    ours, dtypes = (
        {t.dtype for t in found.values() if t.is_floating_point()} for found in (module.state_dict(), tensors)
    )
    if len(dtypes) == 1 and ours != dtypes:  # scales of a table stay in double precision
        module.to(dtypes.pop())
    return _with_weights(module, tensors, path)


def _version_of(path: str | Path) -> str:
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pyrovae"])["version"]


def _with_weights(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> nn.Module:
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # of no other process
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
        The :class:`pyrovae.VAE`, or the one that its structure builds, in evaluation mode, and the configuration; of a
        table a :class:`~pyrovae.structures.MissingDataVAE`, and the :class:`pyrovae.data.Schema` as the entry "table".
        Names of classes that have moved since the run was written are the present ones.

    Raises:
        FileNotFoundError: when the directory is not a run, or none of its epochs has ended. Of a run that was
            interrupted the weights of the checkpoint are taken, with a warning.
        ValueError: when a file is corrupt or of another format, or when the configuration names code outside pyrovae,
            torch and Pyro and `trust` is False.
    """
    directory = Path(directory)
    config = read_config(directory, trust)
    weights = directory / "weights.safetensors"
    if config.get("built"):
        return load(weights, trust=trust).eval(), config
    if not weights.exists():
        return _load_unfinished(directory, config), config
    tensors, state = _read(weights, kind="weights")
    trained = state.get("config") if isinstance(state, dict) else None
    if trained is not None:  # pyrovae 0.1 did not write it
        _check_unchanged(directory, trained, configs.of_model(config))
    vae = _build(directory, config, tensors)
    _with_weights(vae, tensors, weights)
    return vae.eval(), config


def _build(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Returns the VAE of a run, with new weights; `tensors` are those that it is to hold."""
    most = max(_MAX_NUMBERS, 4 * sum(t.numel() for t in tensors.values()))
    try:
        with configs.SizeLimit(most):
            vae = configs.build_vae(config, config["x_shape"], config.get("table"))
    except Exception as error:  # of jsonargparse, or of a constructor, whose arguments may have changed since
        raise ValueError(
            f"the VAE of {directory} cannot be built from its config.yaml and run.json: {explain(str(error))}"
        ) from error
    return vae


def _load_unfinished(directory: Path, config: dict[str, Any]) -> Any:
    """Returns the VAE of a run whose training was interrupted, with the weights of its checkpoint, and warns of it.

    These are the weights that the run would have if it ended there: those of the best epoch, if there is patience.
    """
    finish = f"pyrovae train --run {directory} --resume"
    path = directory / "checkpoint.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no weights yet. Finish the run with: {finish}")
    check_unedited(directory, config)
    saved = read_checkpoint(path)
    epoch = len(saved["history"])
    if epoch == 0:
        raise FileNotFoundError(f"{directory} has no weights yet: no epoch has ended. Finish the run with: {finish}")
    snapshot = saved["best"] if config.get("patience") is not None and saved["best"] is not None else saved
    found = {key.split(" ", 1)[1]: t for key, t in snapshot["params"].items()}
    vae = _build(directory, config, found)
    ours = {name.removesuffix("_unconstrained"): p for name, p in vae.named_parameters()}
    buffers = _matched_buffers(vae, [(key.split(" ", 1)[1], t) for key, t in snapshot["buffers"].items()])
    if buffers is None or {n: p.shape for n, p in ours.items()} != {n: t.shape for n, t in found.items()}:
        raise ValueError(
            f"the checkpoint of {directory} holds state that only training can restore. End the run after its {epoch} "
            f"epochs with: {finish} --epochs {epoch}"
        )
    with torch.no_grad():
        for tensor, value in [*((p, found[name]) for name, p in ours.items()), *buffers]:
            tensor.copy_(value)
    which = "of the best of" if snapshot is not saved else "after"
    warn(f"{directory} is not finished: its weights are those {which} the {epoch} epochs of its checkpoint.")
    return vae.eval()


def _matched_buffers(vae: nn.Module, saved: list[tuple[str, Tensor]]) -> list[tuple[Tensor, Tensor]] | None:
    """Returns each buffer with its value in a checkpoint, which knows only its name in its module.

    None if the names and shapes do not say which is which.
    """
    ours: dict[tuple[str, torch.Size], list[Tensor]] = {}
    theirs: dict[tuple[str, torch.Size], list[Tensor]] = {}
    for name, buffer in vae.named_buffers():
        ours.setdefault((name.rpartition(".")[2], buffer.shape), []).append(buffer)
    for name, value in saved:
        theirs.setdefault((name, value.shape), []).append(value)
    if {key: len(group) for key, group in ours.items()} != {key: len(group) for key, group in theirs.items()}:
        return None
    if any(not torch.equal(value, group[0]) for group in theirs.values() for value in group):
        return None
    return [pair for key, group in ours.items() for pair in zip(group, theirs[key], strict=True)]


def save_run(
    vae: Registered,
    directory: str | Path,
    *,
    data: str | Path,
    data_root: str | Path = "data",
    preprocessing: Literal["grey", "static", "dynamic"] = "grey",
) -> None:
    """Writes a VAE of a script as a run directory, which ``pyrovae evaluate``, ``diagnose`` and ``sample`` take.

    Args:
        vae: a :class:`pyrovae.VAE`, or one of :mod:`pyrovae.structures`, of parts that can be described, see
            :func:`save`; not one of a table.
        directory: a new or empty directory.
        data: the name of the data set, a file or a folder, as for :func:`pyrovae.data.load`, on which commands work.
        data_root: the folder of the data sets.
        preprocessing: what commands do with values between 0 and 1, as ``pyrovae train --preprocessing``.

    Raises:
        FileExistsError: when the directory exists and is not empty.
        TypeError: when `vae` is not a VAE.
        ValueError: when it cannot be described; nothing is written.

    >>> import tempfile
    >>> from pyrovae import VAE, encoders, likelihoods, priors
    >>> x_shape = (1, 8, 8)
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, x_shape), encoders.DiagonalNormal(x_shape, 2))
    >>> run = Path(tempfile.mkdtemp()) / "run"
    >>> save_run(vae, run, data="digits", preprocessing="dynamic")
    >>> load_run(run)[0].encoder.latent_dim
    2
    """
    directory = Path(directory)
    if not isinstance(vae, Registered):
        raise TypeError(f"vae must be a pyrovae.VAE or one of pyrovae.structures, got {type(vae).__name__}.")
    if isinstance(vae.likelihood, Tabular):
        raise ValueError("a VAE of a table needs its schema. Keep it by pyrovae.save, or train it by pyrovae train.")
    if preprocessing not in ("grey", "static", "dynamic"):
        raise ValueError(f"preprocessing must be grey, static or dynamic, got {preprocessing!r}.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty. Give a new directory.")
    state = _described(vae)
    if "built" not in state:
        raise ValueError(f"how the VAE was built cannot be written: {state['undescribed']}.")
    x_shape = getattr(vae.likelihood, "x_shape", None)
    if x_shape is None:
        raise ValueError(f"{type(vae.likelihood).__name__} must have the shape of a datum as its attribute x_shape.")
    config = {"built": True, "data": str(data), "data_root": str(data_root), "preprocessing": preprocessing}
    _write(directory / "weights.safetensors", dict(vae.state_dict()), kind="weights", state=state)
    create_run(directory, yaml.safe_dump(config, sort_keys=False), x_shape)


def create_run(
    directory: str | Path,
    config: str,
    x_shape: tuple[int, ...],
    splits: Splits | None = None,
) -> None:
    """Writes the files that mark a directory as a run: its configuration, and the version and the shape of a datum.

    The configuration is written last: without it there is no run, and training starts afresh.

    Args:
        directory: the run directory.
        config: the configuration, as YAML.
        x_shape: shape of a datum.
        splits: the data; how a table, a text, sounds or time series became numbers goes into files of their own.
    """
    files = []
    if splits is not None and splits.schema is not None:
        write_atomically(Path(directory) / _SCHEMA, splits.schema.to_yaml().encode())
        files.append(_SCHEMA)
    for name, (_, file) in ENCODINGS.items():
        encoding = getattr(splits, name, None)
        if encoding is not None:
            entries = json.dumps(encoding.to_dict(), ensure_ascii=False, indent=0)
            write_atomically(Path(directory) / file, entries.encode())
            files.append(file)
    about = {
        "pyrovae": __version__,
        "format": FORMAT,
        "x_shape": x_shape,
        "files": files,
        "config": yaml.safe_load(config),
        "fingerprint": None if splits is None else splits.fingerprint(),
    }
    write_atomically(Path(directory) / "run.json", json.dumps(about).encode())
    write_atomically(Path(directory) / "config.yaml", config.encode())


def save_trained(vae: nn.Module, directory: str | Path) -> None:
    """Writes the weights of a run at the end of training, with the configuration that they were trained with."""
    config = read_yaml((Path(directory) / "config.yaml").read_text(encoding="utf-8"))
    state = _described(vae) | {"config": configs.of_model(config)}
    _write(Path(directory) / "weights.safetensors", dict(vae.state_dict()), kind="weights", state=state)


def can_resume(directory: str | Path) -> bool:
    """Returns whether a directory holds a run or its remains, and not only files of a start that was killed."""
    names = ("config.yaml", "run.json", "checkpoint.safetensors", "weights.safetensors")
    exist = [(Path(directory) / name).exists() for name in names]
    return all(exist[:2]) or any(exist[2:])


def remove_leftovers(directory: str | Path) -> None:
    """Removes temporary files of writes that were killed; call it where no other process writes."""
    for file in Path(directory).glob(".*.tmp"):
        file.unlink(missing_ok=True)


def read_config(directory: str | Path, trust: bool = False) -> dict[str, Any]:
    """Reads the configuration of a run, with the shape of a datum as its entry "x_shape".

    That of a table has the :class:`pyrovae.data.Schema` as its entry "table", that of text the
    :class:`pyrovae.data.Vocabulary` as "vocabulary", of sounds the :class:`pyrovae.data.Spectrogram` as "spectrogram",
    of music the :class:`pyrovae.data.PianoRoll` as "piano_roll", and of time series the
    :class:`pyrovae.data.TimeSeries` as "time_series". The entry "fingerprint" is that of the data.

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
    written_by = _read_about(about)
    if written_by["format"] != FORMAT:
        raise ValueError(
            f"{directory} is a run of pyrovae {written_by['pyrovae']}, format {written_by['format']}; this is "
            f"pyrovae {__version__}, which reads format {FORMAT}. Use that version, or train a new run."
        )
    try:
        config = configs.with_current_names(read_yaml(file.read_text(encoding="utf-8")))
        config = {"structure": None} | configs.check_run(config, trust)  # that of 0.1 has none
    except ValueError as error:
        raise ValueError(f"{file} is corrupt or not to be trusted: {error}") from None
    try:
        config["x_shape"] = configs.check_x_shape(written_by["x_shape"])
    except ValueError as error:
        raise ValueError(f"{about} is corrupt: {error}") from None
    fingerprint = config["fingerprint"] = written_by.get("fingerprint")  # earlier versions did not write it, nor files
    if fingerprint is not None and not _is_fingerprint(fingerprint):
        raise ValueError(f"{about} is corrupt: its fingerprint of the data is no list of numbers for each part.")
    files = written_by.get("files", [])
    if not isinstance(files, list) or not all(name in ABOUT for name in files):
        raise ValueError(f"{about} is corrupt: its files are {files}.")
    for name in files:
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name} any more, which says what its numbers stand for. Put it back."
            )
    if (Path(directory) / _SCHEMA).exists():
        config["table"] = Schema.from_yaml(Path(directory) / _SCHEMA)
    for name, (cls, encoding) in ENCODINGS.items():
        if (Path(directory) / encoding).exists():
            config[name] = _read_encoding(cls, Path(directory) / encoding)
    return config


def _is_fingerprint(found: Any) -> bool:
    parts = found if isinstance(found, list) and len(found) == 3 else [None]
    return all(isinstance(part, list) and all(isinstance(x, int | float) for x in part) for part in parts)


def _read_encoding(cls: Any, path: Path) -> Any:
    try:
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: {error}") from None


def check_unedited(directory: str | Path, config: dict[str, Any]) -> None:
    """Raises a ValueError when the configuration of a run is not that which it was started with."""
    before = _read_about(Path(directory) / "run.json").get("config")
    if isinstance(before, dict):  # pyrovae 0.1 did not write it
        _check_unchanged(directory, configs.of_training(before), configs.of_training(config))


def _check_unchanged(directory: str | Path, before: Any, now: dict[str, Any]) -> None:
    changed = configs.difference(configs.with_current_names(before), now)
    if changed is not None:
        name, old, new = changed
        raise ValueError(
            f"{Path(directory) / 'config.yaml'} was edited: {name} is {new}, but training had {old}. Put it back, or "
            "train a new run."
        )


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: it is no JSON ({error}).") from None
    missing = [name for name in ("pyrovae", "format", "x_shape") if not (isinstance(about, dict) and name in about)]
    if missing:
        raise ValueError(f"{path} is corrupt: the entry {missing[0]!r} is missing.")
    return about


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
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path} is a directory, not a {kind} file. pyrovae.load_run reads that of a run.")
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
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
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
