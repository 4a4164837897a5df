r"""Encoders: modules whose ``forward(x, context=None)`` returns the Pyro distribution :math:`q(z \mid x)`."""

from pyrovae.encoders.base import Encoder
from pyrovae.encoders.continuous import (
    Delta,
    DiagonalNormal,
    FullRankNormal,
    GaussianMixture,
    LogisticNormal,
    LowRankNormal,
    VonMisesFisher,
)
from pyrovae.encoders.discrete import Categorical, OneHotCategorical, RelaxedOneHotCategorical
from pyrovae.encoders.flows import InverseAutoregressiveFlow, NeuralSplineFlow

__all__ = [
    "Categorical",
    "Delta",
    "DiagonalNormal",
    "Encoder",
    "FullRankNormal",
    "GaussianMixture",
    "InverseAutoregressiveFlow",
    "LogisticNormal",
    "LowRankNormal",
    "NeuralSplineFlow",
    "OneHotCategorical",
    "RelaxedOneHotCategorical",
    "VonMisesFisher",
]
