"""Distributions that neither torch nor Pyro has, or has right, each a Pyro distribution like any other."""

from pyrovae.distributions.cells import (
    Classes,
    Columns,
    LogisticCells,
    Numbers,
    RoundedLogisticCells,
    Scales,
)
from pyrovae.distributions.chains import MarkovChain, RecurrentChain
from pyrovae.distributions.continuous import BatchScaleNormal, Beta, ContinuousBernoulli, Gamma, StudentT
from pyrovae.distributions.counts import Multinomial, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pyrovae.distributions.discrete import (
    Categorical,
    DiscretizedLogistic,
    IndependentBernoulli,
    SigmoidBelief,
)
from pyrovae.distributions.elements import Blocks, MaskedElements, Stacked, center, mask_elements
from pyrovae.distributions.mixtures import Exemplars, NormalMixture, ReparameterizedMixture, StratifiedCategorical
from pyrovae.distributions.normals import LowRankMultivariateNormal, MultivariateNormal
from pyrovae.distributions.reshaped import Flattened, Flow, Resampled, import_zuko
from pyrovae.distributions.sequences import Autoregressive, has_ended, sharpen
from pyrovae.distributions.simplexes import LogisticNormal, RelaxedOneHotCategorical
from pyrovae.distributions.spaces import (
    blocks_of,
    check_classes,
    check_simplex,
    check_temperature,
    flattened,
    grid,
    integers,
    one_hot_blocks,
    open_unit_interval,
    positive,
    tril_of,
)
from pyrovae.distributions.spheres import HypersphericalUniform, VonMisesFisher, log_0f1

__all__ = [
    "Autoregressive",
    "BatchScaleNormal",
    "Beta",
    "Blocks",
    "Categorical",
    "Classes",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Exemplars",
    "Flattened",
    "Flow",
    "Gamma",
    "HypersphericalUniform",
    "IndependentBernoulli",
    "LogisticCells",
    "LogisticNormal",
    "LowRankMultivariateNormal",
    "MarkovChain",
    "RecurrentChain",
    "MaskedElements",
    "Multinomial",
    "MultivariateNormal",
    "NegativeBinomial",
    "NormalMixture",
    "Numbers",
    "Poisson",
    "RelaxedOneHotCategorical",
    "ReparameterizedMixture",
    "Resampled",
    "RoundedLogisticCells",
    "Scales",
    "SigmoidBelief",
    "Stacked",
    "StratifiedCategorical",
    "StudentT",
    "VonMisesFisher",
    "ZeroInflatedNegativeBinomial",
    "blocks_of",
    "center",
    "check_classes",
    "check_simplex",
    "check_temperature",
    "flattened",
    "grid",
    "has_ended",
    "import_zuko",
    "integers",
    "log_0f1",
    "mask_elements",
    "one_hot_blocks",
    "open_unit_interval",
    "positive",
    "sharpen",
    "tril_of",
]
