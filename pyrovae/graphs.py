"""The name that this module had before :mod:`pyrovae.compilation`."""

from pyrovae.compilation import compile

__all__ = ["compile"]
