"""Training of any Pyro model and guide."""

from pyrovae.training.trainer import History, fit

__all__ = ["History", "fit"]
