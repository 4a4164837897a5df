"""Estimates of log p(x), per datum, with what says how far to trust them."""

from pyrovae.estimators.annealed import (
    Adaptive,
    AnnealedImportanceSampling,
    Bracket,
    Linear,
    Schedule,
    SequentialMonteCarlo,
    Sigmoid,
    bidirectional,
)
from pyrovae.estimators.base import Estimate, Estimator, Task, independent_baseline, log_marginal
from pyrovae.estimators.exact import Enumeration, Quadrature
from pyrovae.estimators.proposals import Guide, Mixed, Prior, Proposal, Refined, Widened, refine
from pyrovae.estimators.weighted import CUBO, ImportanceSampling

__all__ = [
    "Adaptive",
    "AnnealedImportanceSampling",
    "Bracket",
    "CUBO",
    "Enumeration",
    "Estimate",
    "Estimator",
    "Guide",
    "ImportanceSampling",
    "Linear",
    "Mixed",
    "Prior",
    "Proposal",
    "Quadrature",
    "Refined",
    "Schedule",
    "SequentialMonteCarlo",
    "Sigmoid",
    "Task",
    "Widened",
    "bidirectional",
    "independent_baseline",
    "log_marginal",
    "refine",
]
