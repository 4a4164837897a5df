"""Modules that remember the arguments that they were built with, so that a file can say how to build them again."""

from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T", bound="Recorded")


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


class Recorded(nn.Module):
    """Base of the parts, the networks and the VAEs: ``built_with`` holds the arguments that a module was built with."""

    built_with: BuiltWith | None

    def __new__(cls: type[_T], *args: Any, **kwargs: Any) -> _T:
        made = nn.Module.__new__(cls)
        # Not by nn.Module, which would make modules among the arguments its children.
        object.__setattr__(made, "built_with", BuiltWith(args, kwargs))
        return made
