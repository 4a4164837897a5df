"""Packages of the extras, which may be missing."""

import importlib.util


def check_installed(module: str, extra: str) -> None:
    """Raises an ImportError that says how to install a package, if it is not there.

    Args:
        module: name of its module.
        extra: the extra of pyrovae that it belongs to.

    >>> check_installed("torch", "none")
    """
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise ImportError(f"{name} is not installed. Install it: pip install 'pyrovae[{extra}]'")
