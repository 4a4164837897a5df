"""Descriptions of modules as JSON: how they were built. Modules are built from them without running other code."""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.config import is_trusted, with_current_names
from pyrovae.data.columns import Modelled
from pyrovae.distributions import Classes, Numbers
from pyrovae.recorded import BuiltWith
from pyrovae.structures.assembly import class_of

_ATOMS = (type(None), bool, int, float, str)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding, nn.LayerNorm, nn.Flatten, nn.Unflatten)


_CELLS = {"Classes": Classes, "Numbers": Numbers}  # columns of a table


class Undescribed(Exception):
    """Why a module cannot be described."""


def describe(module: nn.Module) -> dict[str, Any]:
    """Returns how a module was built: names of classes and their arguments, as JSON and tensors hold them.

    Raises:
        Undescribed: when something has no name, such as a lambda, or the module was changed since it was built.
    """
    description = _Describer().describe("the module", module)
    try:
        with torch.random.fork_rng(devices=[]):
            again = build(description, trust=True)
    except Exception as error:
        raise Undescribed(f"it cannot be built again ({error})") from None
    ours, theirs = ({name: t.shape for name, t in x.state_dict().items()} for x in (module, again))
    if ours != theirs or repr(module) != repr(again):
        raise Undescribed("it was changed after it was built")
    return description


def build(description: dict[str, Any], trust: bool = False) -> nn.Module:
    """Returns the module that a description is of, with new weights.

    Raises:
        ValueError: when it names code outside pyrovae, torch and Pyro, and `trust` is False.
    """
    description = with_current_names(description)
    untrusted = [] if trust else [name for name in _names(description) if not is_trusted(name)]
    if untrusted:
        raise ValueError(
            f"the file names code outside pyrovae: {', '.join(sorted(set(untrusted)))}. To load it would execute this "
            "code. If you trust it, use trust=True."
        )
    return _Builder().build(description)


class _Describer:
    """Modules that occur twice, such as the encoder of a VampPrior, are described once."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def describe(self, where: str, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.describe(where, x) for x in value]}
        if isinstance(value, dict):
            return {"dict": [[self.describe(where, k), self.describe(where, v)] for k, v in value.items()]}
        if isinstance(value, Tensor):
            return {"tensor": value.detach().cpu().tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, Modelled):  # a model knows no more of it
            value = value.cells
        if isinstance(value, (Classes, Numbers)):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {"cells": type(value).__name__, **self._arguments(where, (), fields)}
        if isinstance(value, partial) and str(getattr(value.func, "__module__", "")).startswith("jsonargparse."):
            value = partial(class_of(value), **value.keywords)  # an option of the command line
        if isinstance(value, partial):
            return {"partial": self.describe(where, value.func), **self._arguments(where, value.args, value.keywords)}
        if isinstance(value, nn.Module):
            return self._module(where, value)
        if isinstance(value, type) or callable(value) and hasattr(value, "__qualname__"):
            return {"name": _name_of(where, value)}
        raise Undescribed(f"{where} is a {type(value).__name__}, which has no description")

    def _module(self, where: str, module: nn.Module) -> dict[str, Any]:
        if id(module) in self.numbers:
            return {"same": self.numbers[id(module)]}
        name = _name_of(where, type(module))
        record = getattr(module, "built_with", None)
        if isinstance(record, BuiltWith):
            arguments = self._arguments(type(module).__name__, record.args, record.kwargs)
        elif hasattr(module, "built_with"):
            raise Undescribed(f"{where} was unpickled, which does not keep its arguments")
        elif type(module) is nn.Sequential:
            arguments = self._arguments(where, tuple(module), {})
        elif type(module) in _PLAIN or not any(True for _ in module.parameters()):
            arguments = self._arguments(where, (), _settings(where, module))
        else:
            raise Undescribed(
                f"{where} is a {type(module).__name__}, a network of your own: derive it from nn.base.ShapedNetwork"
            )
        self.numbers[id(module)] = len(self.numbers)
        return {"module": name, "number": self.numbers[id(module)], **arguments}

    def _arguments(self, where: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {
            "args": [self.describe(f"argument {i + 1} of {where}", x) for i, x in enumerate(args)],
            "kwargs": {name: self.describe(f"{name} of {where}", x) for name, x in kwargs.items()},
        }


class _Builder:
    def __init__(self) -> None:
        self.modules: dict[int, nn.Module] = {}

    def build(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "same" in value:
            return self.modules[value["same"]]
        if "list" in value:
            return [self.build(x) for x in value["list"]]
        if "tuple" in value:
            return tuple(self.build(x) for x in value["tuple"])
        if "dict" in value:
            return {self.build(k): self.build(v) for k, v in value["dict"]}
        if "tensor" in value:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        if "name" in value:
            return _imported(value["name"])
        if "cells" in value:
            return _CELLS[value["cells"]](**{k: self.build(v) for k, v in value["kwargs"].items()})
        args, kwargs = [self.build(x) for x in value["args"]], {k: self.build(v) for k, v in value["kwargs"].items()}
        if "partial" in value:
            return partial(self.build(value["partial"]), *args, **kwargs)
        made = _imported(value["module"])(*args, **kwargs)
        self.modules[value["number"]] = made
        return made


def _names(value: Any) -> list[str]:
    """Returns all names of code in a description."""
    if isinstance(value, list):
        return [name for x in value for name in _names(x)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("name", "module") if isinstance(value.get(key), str)]
    return own + [name for x in value.values() for name in _names(x)]


def _name_of(where: str, thing: Callable) -> str:
    module, name = thing.__module__, thing.__qualname__
    package = ".".join(module.split(".")[:2])
    for place in (package, module):
        if getattr(sys.modules.get(place), name, None) is thing:
            return f"{place}.{name}"
    raise Undescribed(f"{where} is {name}, which has no name that could be imported")


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _settings(where: str, module: nn.Module) -> dict[str, Any]:
    """Returns the arguments of one of torch's modules, which are its attributes."""
    from inspect import signature

    settings = {}
    for name, parameter in signature(type(module)).parameters.items():
        if name in ("device", "dtype", "_weight", "_freeze"):
            continue
        if name == "bias":
            settings[name] = module.bias is not None
        elif hasattr(module, name):
            settings[name] = getattr(module, name)
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise Undescribed(f"{where} is a {type(module).__name__}, whose arguments are not known")
    return settings
