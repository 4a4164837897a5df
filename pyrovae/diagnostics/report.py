"""The registry of all diagnostics, in the order of the report."""

from pyrovae.diagnostics.anomalies import Anomalies
from pyrovae.diagnostics.base import Diagnosis
from pyrovae.diagnostics.calibration import Calibration
from pyrovae.diagnostics.collapse import Collapse
from pyrovae.diagnostics.gaps import Gaps
from pyrovae.diagnostics.interpolations import Interpolations
from pyrovae.diagnostics.latent_map import LatentMap
from pyrovae.diagnostics.posterior import PosteriorCheck
from pyrovae.diagnostics.quality import Quality
from pyrovae.diagnostics.reliability import Reliability
from pyrovae.diagnostics.sharpness import Sharpness
from pyrovae.diagnostics.steps import Steps
from pyrovae.diagnostics.synthetic import SyntheticRows
from pyrovae.diagnostics.traversals import Traversals

# By the names of the sections, pictures and numbers of a report.
DIAGNOSES: dict[str, type[Diagnosis]] = {
    "steps": Steps,
    "gaps": Gaps,
    "collapse": Collapse,
    "reliability": Reliability,
    "posterior": PosteriorCheck,
    "calibration": Calibration,
    "sharpness": Sharpness,
    "quality": Quality,
    "synthetic_rows": SyntheticRows,
    "anomalies": Anomalies,
    "traversals": Traversals,
    "interpolations": Interpolations,
    "latent_map": LatentMap,
}
