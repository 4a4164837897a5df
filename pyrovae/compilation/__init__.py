"""An objective as one compiled graph, checked against what it was made from."""

from pyrovae.compilation.api import compile

__all__ = ["compile"]
