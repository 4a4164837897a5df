"""Training of any Pyro model and guide."""

from pyrovae.training.callbacks import Callback, MetricsFile
from pyrovae.training.history import History
from pyrovae.training.loop import fit
from pyrovae.training.tracking import Tracking, trackers_of

__all__ = ["Callback", "History", "MetricsFile", "Tracking", "fit", "trackers_of"]
