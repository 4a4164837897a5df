"""What a model has learned, and where it loses nats: functions of any model and guide whose results print and draw."""

from pyrovae.diagnostics.anomalies import AUROC, Anomalies, anomalies, auroc
from pyrovae.diagnostics.base import Diagnosis, ReportInputs
from pyrovae.diagnostics.calibration import Calibration, calibration
from pyrovae.diagnostics.collapse import Collapse, collapse
from pyrovae.diagnostics.gaps import Gaps, gaps
from pyrovae.diagnostics.interpolations import Interpolations, interpolations
from pyrovae.diagnostics.latent_map import LatentMap, latent_map
from pyrovae.diagnostics.monitor import CollapseMonitor
from pyrovae.diagnostics.posterior import PosteriorCheck, posterior_check
from pyrovae.diagnostics.quality import (
    PrecisionRecall,
    Quality,
    QualityScores,
    frechet_distance,
    precision_recall,
    quality,
)
from pyrovae.diagnostics.ranking import Ranking, RankingDifference, ranking
from pyrovae.diagnostics.reliability import Reliability, reliability
from pyrovae.diagnostics.report import DIAGNOSES
from pyrovae.diagnostics.sharpness import Sharpness, sharpness
from pyrovae.diagnostics.steps import Steps, steps
from pyrovae.diagnostics.synthetic import Copies, SyntheticRows, Utility, synthetic_rows
from pyrovae.diagnostics.traversals import Traversals, traversals

__all__ = [
    "AUROC",
    "Anomalies",
    "Calibration",
    "Collapse",
    "CollapseMonitor",
    "Copies",
    "DIAGNOSES",
    "Diagnosis",
    "Gaps",
    "Interpolations",
    "LatentMap",
    "PosteriorCheck",
    "PrecisionRecall",
    "Quality",
    "QualityScores",
    "Ranking",
    "RankingDifference",
    "Reliability",
    "ReportInputs",
    "Sharpness",
    "Steps",
    "SyntheticRows",
    "Traversals",
    "Utility",
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
    "ranking",
    "reliability",
    "sharpness",
    "steps",
    "synthetic_rows",
    "traversals",
]
