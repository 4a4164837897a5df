"""The former name of :mod:`pyrovae.compilation`."""

from pyrovae.compilation import compile

__all__ = ["compile"]
