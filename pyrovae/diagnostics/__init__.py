"""What a model learned, and where it loses nats: functions of any model and guide that print, draw and summarise."""

from pyrovae.diagnostics.anomalies import anomalies, auroc
from pyrovae.diagnostics.base import Diagnosis
from pyrovae.diagnostics.collapse import CollapseMonitor, collapse
from pyrovae.diagnostics.exploration import interpolations, latent_map, traversals
from pyrovae.diagnostics.gaps import gaps
from pyrovae.diagnostics.posteriors import calibration, posterior_check, reliability
from pyrovae.diagnostics.quality import frechet_distance, precision_recall, quality
from pyrovae.diagnostics.sharpness import sharpness

__all__ = [
    "CollapseMonitor",
    "Diagnosis",
    "anomalies",
    "auroc",
    "calibration",
    "collapse",
    "frechet_distance",
    "gaps",
    "interpolations",
    "latent_map",
    "posterior_check",
    "precision_recall",
    "quality",
    "reliability",
    "sharpness",
    "traversals",
]
