"""Training of any Pyro model and guide."""

from pyrovae.training.callbacks import Callback, MetricsFile
from pyrovae.training.history import History
from pyrovae.training.loop import fit

__all__ = ["Callback", "History", "MetricsFile", "fit"]
