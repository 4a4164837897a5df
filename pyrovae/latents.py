"""The names that this module had before they moved to :mod:`pyrovae.distributions`."""

from pyrovae.distributions import (
    Exemplars,
    Flattened,
    Flow,
    HypersphericalUniform,
    LogisticNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NormalMixture,
    RelaxedOneHotCategorical,
    ReparameterizedMixture,
    Resampled,
    StratifiedCategorical,
    VonMisesFisher,
)

__all__ = [
    "Exemplars",
    "Flattened",
    "Flow",
    "HypersphericalUniform",
    "LogisticNormal",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "NormalMixture",
    "RelaxedOneHotCategorical",
    "ReparameterizedMixture",
    "Resampled",
    "StratifiedCategorical",
    "VonMisesFisher",
]
