"""Modules that remember the arguments that they were built with, so that a file can say how to build them again."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import numpy as np
from torch import Tensor, nn

_T = TypeVar("_T", bound="Recorded")
_REAL, _LIST, _SHAPE = "a single number", "a list", "a whole number or a tuple of them"
_AXES = {_REAL: 0, _LIST: 1, _SHAPE: 1}  # of arrays that serve too


class BuiltWith:
    """The arguments of a call.

    It is copied with a module, but not pickled: arguments may be functions without a name.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.args, self.kwargs = args, kwargs

    def __reduce__(self) -> tuple:
        return _forgotten, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "BuiltWith":
        from copy import deepcopy

        return BuiltWith(deepcopy(self.args, memo), deepcopy(self.kwargs, memo))


def _forgotten() -> None:
    return None


class NumbersChecked:
    """Base of classes that take no array where a single number belongs.

    >>> class Scaled(NumbersChecked):
    ...     def __init__(self, scale: float): ...
    >>> Scaled(np.ones(2))
    Traceback (most recent call last):
    ValueError: scale of Scaled must be a single number, got an array of shape (2,).
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        check_numbers(cls, args, kwargs)
        return super().__new__(cls)


def check_numbers(cls: type, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises a ValueError where an array is given to a class in place of a number, numbers or a function."""
    if not any(isinstance(x, (Tensor, np.ndarray)) for x in (*args, *kwargs.values())):
        return
    parameters = _parameters_of(cls)
    for name, x in [*zip(parameters, args), *kwargs.items()]:
        wanted = parameters.get(name, "")
        if isinstance(x, (Tensor, np.ndarray)) and wanted and x.ndim != _AXES.get(wanted):
            kind = "a tensor" if isinstance(x, Tensor) else "an array"
            shape = f"of shape {tuple(x.shape)}" if x.ndim else "without dimensions: take its .item()"
            raise ValueError(f"{name} of {cls.__name__} must be {wanted}, got {kind} {shape}.")


@cache
def _parameters_of(cls: type) -> dict[str, str]:
    """Returns the parameters of a class, in their order, with what they must be; "" where that may be an array."""
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        annotation = parameter.annotation
        kinds = set(get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]) - {NoneType}
        if kinds <= {int, float, bool}:
            found[name] = _REAL if float in kinds else "a single whole number"
        elif all(get_origin(kind) is Sequence for kind in kinds):
            found[name] = _LIST
        elif all(kind is int or get_origin(kind) is tuple for kind in kinds):
            found[name] = _SHAPE
        else:
            found[name] = "a function or a class" if all(get_origin(kind) is Callable for kind in kinds) else ""
    return found


class Recorded(nn.Module):
    """Base of the parts, the networks and the VAEs: ``built_with`` holds the arguments that a module was built with."""

    built_with: BuiltWith | None

    def __new__(cls: type[_T], *args: Any, **kwargs: Any) -> _T:
        check_numbers(cls, args, kwargs)
        made = nn.Module.__new__(cls)
        # Not by nn.Module, which would make modules among the arguments its children.
        object.__setattr__(made, "built_with", BuiltWith(args, kwargs))
        return made
