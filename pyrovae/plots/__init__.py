"""Pictures. Each function returns a matplotlib figure, and writes it if a path is given.

matplotlib is slow to import, and is imported when something is drawn.
"""

from pyrovae.plots.comparisons import comparisons
from pyrovae.plots.histories import collapse_history, learning_curve
from pyrovae.plots.pictures import latent_space, reconstructions, repairs, samples
from pyrovae.plots.results import draw_result
from pyrovae.plots.series import forecasts, imputations, sequences

# The result of each diagnostic draws itself.
anomalies = calibration = collapse = gaps = interpolations = latent_map = draw_result
posterior_check = quality = reliability = sharpness = steps = synthetic_rows = traversals = draw_result

__all__ = [
    "anomalies",
    "calibration",
    "collapse",
    "collapse_history",
    "comparisons",
    "forecasts",
    "gaps",
    "imputations",
    "interpolations",
    "latent_map",
    "latent_space",
    "learning_curve",
    "posterior_check",
    "quality",
    "reconstructions",
    "reliability",
    "repairs",
    "samples",
    "sequences",
    "sharpness",
    "steps",
    "synthetic_rows",
    "traversals",
]
