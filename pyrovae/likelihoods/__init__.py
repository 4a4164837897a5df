r"""Likelihoods: modules whose ``forward(z, context=None)`` returns the Pyro distribution :math:`p(x \mid z)`.

Each has its decoder network, declares its event dimensions and is normalised: ``log_prob`` is in nats and includes all
constants.
"""

from pyrovae.likelihoods.base import Likelihood, bits_per_dim
from pyrovae.likelihoods.continuous import (
    Beta,
    ContinuousBernoulli,
    Gamma,
    Laplace,
    LogNormal,
    Normal,
    OptimalNormal,
    StudentT,
)
from pyrovae.likelihoods.discrete import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Multinomial,
    NegativeBinomial,
    Poisson,
    SigmoidBelief,
    ZeroInflatedNegativeBinomial,
)
from pyrovae.likelihoods.mixed import Mixed
from pyrovae.likelihoods.sequences import Autoregressive, PixelCNN
from pyrovae.likelihoods.tabular import Tabular

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gamma",
    "Laplace",
    "Likelihood",
    "LogNormal",
    "Mixed",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "OptimalNormal",
    "PixelCNN",
    "Poisson",
    "SigmoidBelief",
    "StudentT",
    "Tabular",
    "ZeroInflatedNegativeBinomial",
    "bits_per_dim",
]
