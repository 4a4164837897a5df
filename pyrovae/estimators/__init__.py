"""Estimates of log p(x) per datum, with their errors and with diagnostics of their reliability."""

from pyrovae.estimators.adapted import Adapted
from pyrovae.estimators.annealed import AnnealedImportanceSampling, Bracket, SequentialMonteCarlo, bidirectional
from pyrovae.estimators.base import Estimate, Estimator
from pyrovae.estimators.baseline import independent_baseline
from pyrovae.estimators.comparison import Comparison, Ranking, compare, compare_all
from pyrovae.estimators.conditional import log_conditional
from pyrovae.estimators.exact import Enumeration, Quadrature
from pyrovae.estimators.filtered import ParticleFilter, Predictive, log_predictive
from pyrovae.estimators.guides import as_guide
from pyrovae.estimators.laplace import Laplace
from pyrovae.estimators.marginal import log_marginal
from pyrovae.estimators.proposals import Guide, Mixed, Prior, Proposal, Refined, Widened, refine
from pyrovae.estimators.schedules import Adaptive, Linear, Schedule, Sigmoid
from pyrovae.estimators.staged import UntilTrusted
from pyrovae.estimators.task import Task
from pyrovae.estimators.weighted import CUBO, ImportanceSampling

__all__ = [
    "Adapted",
    "Adaptive",
    "AnnealedImportanceSampling",
    "Bracket",
    "CUBO",
    "Comparison",
    "Enumeration",
    "Estimate",
    "Estimator",
    "Guide",
    "ImportanceSampling",
    "Linear",
    "Laplace",
    "Mixed",
    "ParticleFilter",
    "Predictive",
    "Prior",
    "Proposal",
    "Quadrature",
    "Ranking",
    "Refined",
    "Schedule",
    "SequentialMonteCarlo",
    "Sigmoid",
    "Task",
    "UntilTrusted",
    "Widened",
    "as_guide",
    "bidirectional",
    "compare",
    "compare_all",
    "independent_baseline",
    "log_conditional",
    "log_marginal",
    "log_predictive",
    "refine",
]
