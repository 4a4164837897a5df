"""The pictures. Each function returns a matplotlib figure, and writes it if a path is given.

matplotlib is imported here and nowhere else.
"""

from pyrovae.plots.anomalies import anomalies
from pyrovae.plots.collapse import collapse, collapse_history
from pyrovae.plots.exploration import interpolations, latent_map, traversals
from pyrovae.plots.gaps import gaps
from pyrovae.plots.pictures import latent_space, learning_curve, reconstructions, samples
from pyrovae.plots.posteriors import calibration, posterior_check, reliability
from pyrovae.plots.quality import quality
from pyrovae.plots.sharpness import sharpness

__all__ = [
    "anomalies",
    "calibration",
    "collapse",
    "collapse_history",
    "gaps",
    "interpolations",
    "latent_map",
    "latent_space",
    "learning_curve",
    "posterior_check",
    "quality",
    "reconstructions",
    "reliability",
    "samples",
    "sharpness",
    "traversals",
]
