"""Objectives as compiled graphs that are compared with the eager objectives."""

from pyrovae.compilation.api import compile

__all__ = ["compile"]
