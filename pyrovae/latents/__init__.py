"""Distributions over latents that neither torch nor Pyro has, each a Pyro distribution like any other."""

from pyrovae.latents.mixtures import Exemplars, NormalMixture, ReparameterizedMixture, StratifiedCategorical
from pyrovae.latents.normals import LowRankMultivariateNormal, MultivariateNormal
from pyrovae.latents.reshaped import Flattened, Flow, Resampled, import_zuko
from pyrovae.latents.simplexes import LogisticNormal, RelaxedOneHotCategorical
from pyrovae.latents.spaces import (
    blocks_of,
    check_classes,
    check_simplex,
    check_temperature,
    flattened,
    integers,
    one_hot_blocks,
    positive,
    tril_of,
)
from pyrovae.latents.spheres import HypersphericalUniform, VonMisesFisher, log_0f1

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
    "blocks_of",
    "check_classes",
    "check_simplex",
    "check_temperature",
    "flattened",
    "import_zuko",
    "integers",
    "log_0f1",
    "one_hot_blocks",
    "positive",
    "tril_of",
]
