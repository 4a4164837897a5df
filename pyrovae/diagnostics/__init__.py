"""What a model learned, and where it loses nats: functions of any model and guide that print, draw and summarise."""

from pyrovae.diagnostics.anomalies import AUROC, Anomalies, anomalies, auroc
from pyrovae.diagnostics.base import Diagnosis
from pyrovae.diagnostics.collapse import Collapse, CollapseMonitor, collapse
from pyrovae.diagnostics.exploration import (
    Interpolations,
    LatentMap,
    Traversals,
    interpolations,
    latent_map,
    traversals,
)
from pyrovae.diagnostics.gaps import Gaps, gaps
from pyrovae.diagnostics.posteriors import (
    Calibration,
    PosteriorCheck,
    Reliability,
    calibration,
    posterior_check,
    reliability,
)
from pyrovae.diagnostics.quality import (
    PrecisionRecall,
    Quality,
    QualityScores,
    frechet_distance,
    precision_recall,
    quality,
)
from pyrovae.diagnostics.sharpness import Sharpness, sharpness

__all__ = [
    "AUROC",
    "Anomalies",
    "Calibration",
    "Collapse",
    "CollapseMonitor",
    "Diagnosis",
    "Gaps",
    "Interpolations",
    "LatentMap",
    "PosteriorCheck",
    "PrecisionRecall",
    "Quality",
    "QualityScores",
    "Reliability",
    "Sharpness",
    "Traversals",
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
