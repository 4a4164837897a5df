"""Configurations of runs: from names of classes and their arguments, as in a run's ``config.yaml``, to a VAE."""

import difflib
import reprlib
import sys
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pyrovae.data import Schema
from pyrovae.encoders import Encoder
from pyrovae.likelihoods import Likelihood, Tabular
from pyrovae.nn import Shape
from pyrovae.priors import Prior
from pyrovae.structures import MissingDataVAE, Structure, table_vae
from pyrovae.structures.assembly import class_of, make_prior
from pyrovae.trackers import Tracker
from pyrovae.vae import VAE, Registered

# The entries of a configuration that name classes, and arguments of these.
PARTS = ("prior", "likelihood", "encoder", "structure", "loss", "optimizer", "scheduler", "tracker")
# The other entries that training takes, with the types of their values.
SETTINGS: dict[str, tuple[type, ...]] = {
    "data": (str,),
    "schema": (str, type(None)),
    "context": (str, list, type(None)),
    "time": (str, type(None)),
    "series": (str, type(None)),
    "columns": (str, list, type(None)),
    "growth": (bool,),
    "data_root": (str,),
    "preprocessing": (str,),
    "shift": (int,),
    "latent_dim": (int,),
    "epochs": (int,),
    "batch_size": (int,),
    "patience": (int, type(None)),
    "schedule_every_step": (bool,),
    "ema_decay": (float, type(None)),
    "clip_norm": (float, int, type(None)),
    "micro_batch_size": (int, type(None)),
    "precision": (str, type(None)),
    "num_samples": (int, type(None)),
    "seed": (int,),
    "device": (str,),
    "characters": (bool, type(None)),
    "max_words": (int, type(None)),
    "tokenizer": (str, type(None)),
    "max_steps": (int, type(None)),
    "per_quarter": (int, type(None)),
}
_OPTIONS: dict[str, tuple[type, ...]] = {"run": (str, type(None)), "compile": (bool, str)}  # kept by no run
_OF_MODEL = ("latent_dim", "context", "prior", "likelihood", "encoder", "structure")  # what weights belong to
NOT_KEPT = (*_OPTIONS, "tracker")  # by runs
RENEWABLE = ("epochs", "patience", "num_samples", "data_root", "device")  # what may change when a run is resumed
# What settings mean that the configuration of an earlier version lacks, where that is not null.
EARLIER = {"schedule_every_step": False, "shift": 0, "growth": False}
# Entries that the configuration of a run on a VAE of a script has beside those of its data.
_BUILT = {"built": (bool,)}
_OF_DATA = ("data", "data_root", "preprocessing")
_NEEDED = ("latent_dim", "prior", "likelihood", "encoder", *_OF_DATA)

# Packages that have another name now than in the configurations of earlier versions.
_RENAMED_PACKAGES = {"pyrovae.latents": "pyrovae.distributions", "pyrovae.graphs": "pyrovae.compilation.api"}
# All public names of these packages are trusted: kernels, schedules and the like are not torch modules.
_TRUSTED_PACKAGES = ("pyrovae.priors", "pyrovae.bounds", "pyrovae.regularizers")
# Classes of these packages are trusted if they have one of these bases.
_TRUSTED_BASES: dict[str, tuple[type, ...]] = {
    "pyrovae": (nn.Module, pyro.infer.ELBO, Structure, Tracker),
    "torch.nn": (nn.Module,),
    "torch.optim": (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
    "pyro.infer": (pyro.infer.ELBO,),
}

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange)


def make_vae(
    x_shape: Shape,
    latent_dim: int,
    prior: Callable[[int], Prior],
    likelihood: Callable[[int, Shape], Likelihood],
    encoder: Callable[[Shape, int], Encoder],
    structure: Structure | None = None,
) -> Registered:
    """Returns the VAE of these parts, with new weights.

    Args:
        x_shape: shape of a datum.
        latent_dim: number of latent dimensions.
        prior: called with `latent_dim`, or with the encoder if its first argument has this name, as that of a
            VampPrior.
        likelihood: called with `latent_dim` and `x_shape`.
        encoder: called with `x_shape` and `latent_dim`.
        structure: how the parts are put together, and with what else; None for a :class:`pyrovae.VAE`.
    """
    if structure is not None:
        return structure.build(x_shape, latent_dim, prior, likelihood, encoder)
    p, q = likelihood(latent_dim, x_shape), encoder(x_shape, latent_dim)
    return VAE(make_prior(prior, latent_dim, q), p, q)


def make_table_vae(
    schema: Schema,
    latent_dim: int,
    prior: Callable[[int], Prior],
    likelihood: Callable[..., Likelihood],
    encoder: Callable[[Shape, int], Encoder],
) -> MissingDataVAE:
    """Returns the VAE of the rows of a table, with new weights; see :func:`make_vae` and :func:`structures.table_vae`.

    Args:
        schema: the columns, with those that it conditions on.
        latent_dim: number of latent dimensions.
        prior: as for :func:`make_vae`.
        likelihood: called with `latent_dim` and the modelled columns.
        encoder: called with the number of features of a row and `latent_dim`.
    """
    parts: dict[str, Any] = {"prior": prior, "likelihood": likelihood, "encoder": encoder}
    return table_vae(schema.modelled, latent_dim, context=schema.context, **parts)


def build_vae(config: dict[str, Any], x_shape: tuple[int, ...], schema: Schema | None = None) -> Registered:
    """Returns the VAE that a configuration describes, with new weights; see :func:`make_vae`.

    Args:
        config: the configuration.
        x_shape: shape of a datum.
        schema: the columns of a table; None for other data.
    """
    from jsonargparse import ArgumentParser  # slow to import

    names = ("latent_dim", "prior", "likelihood", "encoder", "structure")
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_function_arguments(make_vae, skip={"x_shape"})
    made = parser.instantiate(parser.parse_object({name: config[name] for name in names})).as_dict()
    structure = made.pop("structure")
    return make_vae(x_shape, **made, structure=structure) if schema is None else make_table_vae(schema, **made)


class SizeLimit(TorchFunctionMode):
    """A context in which torch makes no tensor of more than `max_numbers` elements out of nothing.

    Raises:
        ValueError: instead of asking for the memory.

    >>> with SizeLimit(1000):
    ...     network = nn.Linear(10, 10)
    """

    def __init__(self, max_numbers: int):
        super().__init__()
        self.max_numbers = max_numbers

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            size = func(*args, **kwargs | {"device": "meta"}).numel()  # without memory
            if size > self.max_numbers:
                raise ValueError(f"a tensor of {size:,} numbers is asked for, and {self.max_numbers:,} are allowed.")
        return func(*args, **kwargs)


def is_tabular(likelihood: Any) -> bool:
    """Returns whether a likelihood, or a callable that builds one, is that of the rows of a table."""
    cls = class_of(likelihood)
    return isinstance(cls, type) and issubclass(cls, Tabular)


def with_current_names(config: Any) -> Any:
    """Returns a configuration with the present names of classes and functions of pyrovae that have moved."""
    if isinstance(config, dict):
        return {key: with_current_names(value) for key, value in config.items()}
    if isinstance(config, list):
        return [with_current_names(value) for value in config]
    return _current_name(config) if isinstance(config, str) and config.startswith("pyrovae.") else config


def _current_name(name: str) -> str:
    """Returns the public name of what a name meant in an earlier version; a name that can be imported as it is stays.

    >>> _current_name("pyrovae.latents.spheres.VonMisesFisher")
    'pyrovae.distributions.VonMisesFisher'
    """
    module, _, attribute = name.rpartition(".")
    package = ".".join(module.split(".")[:2])
    if package not in _RENAMED_PACKAGES and hasattr(sys.modules.get(module), attribute):
        return name
    package = _RENAMED_PACKAGES.get(package, package)
    return f"{package}.{attribute}" if hasattr(sys.modules.get(package), attribute) else name


def check(config: Any, trust: bool = False) -> dict[str, Any]:
    """Checks a configuration of training, as a file gives it; returns it. Nothing is imported.

    Args:
        config: what a YAML document holds.
        trust: allow names of code outside pyrovae, torch and Pyro.

    Raises:
        ValueError: when it has an entry that training does not take, a value of another type, or names code that is
            not trusted. The message names the entry.
    """
    if not isinstance(config, dict):
        raise ValueError(f"it must hold names and values, as in 'epochs: 20', got {_shortened(config)}.")
    for name, value in config.items():
        if name in SETTINGS:
            _check_setting(name, value, SETTINGS[name])
        elif name in PARTS:
            _check_plain(name, value)
        else:
            hint = " Write arguments of a class under it, not after a dot." if "." in str(name) else _nearest(name)
            raise ValueError(f"{name!r} is no setting of training.{hint}")
    untrusted = [] if trust else untrusted_names(config)
    if untrusted:
        raise ValueError(
            f"it names code outside pyrovae: {', '.join(untrusted)}. To use it would execute this code. If you trust "
            "it, use --trust (in Python: trust=True)."
        )
    return config


def check_options(config: Any, trust: bool = False) -> dict[str, Any]:
    """Checks a file of ``pyrovae train --config`` as :func:`check` does; it may hold what runs do not keep, too."""
    if not isinstance(config, dict):
        return check(config, trust)
    others = {name: config[name] for name in _OPTIONS if name in config}
    for name, value in others.items():
        _check_setting(name, value, _OPTIONS[name])
    return others | check({name: config[name] for name in config if name not in others}, trust)


def check_run(config: Any, trust: bool = False) -> dict[str, Any]:
    """Checks the configuration of a run, as :func:`check` does, and that it holds all that its VAE needs; returns it.

    That of a VAE of a script says only that it was built, and what its data are.
    """
    if isinstance(config, dict) and config.get("built") is True:
        types = {name: SETTINGS[name] for name in _OF_DATA} | _BUILT
        for name, value in config.items():
            if name not in types:
                raise ValueError(f"{name!r} is no entry of the configuration of a VAE that a script built.")
            _check_setting(name, value, types[name])
        needed: tuple[str, ...] = _OF_DATA
    else:
        check(config, trust)
        needed = _NEEDED
    for name in needed:
        if name not in config:
            raise ValueError(f"the entry {name!r} is missing.")
    return config


def of_model(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries that weights belong to."""
    return {name: config[name] for name in _OF_MODEL if config.get(name) is not None}  # some runs have no structure


def of_training(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of training that must not change when a run is resumed, but where its data are."""
    names = {*SETTINGS, *PARTS} - set(RENEWABLE) - {"data", "schema"}
    return {name: config[name] for name in sorted(names & config.keys())}


def difference(before: Any, now: Any, where: str = "") -> tuple[str, str, str] | None:
    """Returns where two nested values differ first, and both values there, as text; None where they are equal.

    >>> difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    ('a.c', '2', '3')
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*before, *(key for key in now if key not in before)):
            if key not in before or key not in now:
                old, new = (_shortened(x[key]) if key in x else "missing" for x in (before, now))
                return f"{where}.{key}".lstrip("."), old, new
            found = difference(before[key], now[key], f"{where}.{key}")
            if found is not None:
                return found
        return None
    return None if before == now else (where.lstrip("."), _shortened(before), _shortened(now))


def check_x_shape(x_shape: Any) -> tuple[int, ...]:
    """Returns the shape of a datum, as ``run.json`` gives it; raises a ValueError that says what is wrong with it."""
    if not (isinstance(x_shape, list) and x_shape and all(type(n) is int and n > 0 for n in x_shape)):
        raise ValueError(f"x_shape must be a list of positive integers, got {_shortened(x_shape)}.")
    return tuple(x_shape)


def _check_setting(name: str, value: Any, types: tuple[type, ...]) -> None:
    if type(value) not in types:
        words = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise ValueError(f"{name} must be {words}, got {_shortened(value)}.")
    if name == "preprocessing" and value not in ("grey", "static", "dynamic"):
        raise ValueError(f"preprocessing must be grey, static or dynamic, got {value!r}.")
    if name in ("latent_dim", "epochs", "batch_size") and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _check_plain(where: str, value: Any) -> None:
    """Raises unless a value is made of text, numbers, lists and dicts alone, which all checks look through."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {_shortened(key)}: a key must be text.")
            _check_plain(f"{where}.{key}", entry)
    elif isinstance(value, list):
        for entry in value:
            _check_plain(where, entry)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{where} holds {_shortened(value)}: give text, numbers, lists and dicts alone.")


def _nearest(name: Any) -> str:
    names = difflib.get_close_matches(str(name), (*SETTINGS, *PARTS), n=2)
    return f" Do you mean {' or '.join(names)}?" if names else ""


def _shortened(value: Any) -> str:
    return reprlib.repr(value)


def untrusted_names(config: dict[str, Any]) -> list[str]:
    """Returns the strings in the parts of a configuration that may name code outside pyrovae, torch and Pyro.

    A single word cannot be imported: it is a site, or the name of a class that is imported already. Numbers such as
    1e-3 are text to YAML.
    """
    names = [name for part in PARTS for name in _strings(config.get(part))]
    return [name for name in names if not (is_trusted(name) or name.isidentifier() or _is_number(name))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for v in value.values() for s in _strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []


def _all(package: str) -> list[str]:
    return sys.modules[package].__all__


def is_trusted(name: str) -> bool:
    """Returns whether a name is of a part, an optimizer, a schedule or an ELBO that is already imported."""
    module, _, attribute = name.rpartition(".")
    if module in _TRUSTED_PACKAGES and attribute in _all(module):
        return True
    cls = getattr(sys.modules.get(module), attribute, None)
    # A function goes by the module that defines it, which may be another than the one that exports it.
    exported = (
        vars(sys.modules[package]).get(attribute) for package in _TRUSTED_PACKAGES if attribute in _all(package)
    )
    if cls is not None and any(cls is public for public in exported):
        return True
    # Both the name and the module that defines the class: a module may import a class from elsewhere.
    return isinstance(cls, type) and any(
        issubclass(cls, bases) and all(f"{path}.".startswith(f"{package}.") for path in (module, cls.__module__))
        for package, bases in _TRUSTED_BASES.items()
    )
