r"""Priors: modules whose ``forward(context=None)`` returns a Pyro distribution, :math:`p(z)` or :math:`p(z \mid c)`."""

from pyrovae.priors.base import Prior
from pyrovae.priors.continuous import (
    DiagonalNormal,
    Dirichlet,
    FlowPrior,
    GaussianProcess,
    HypersphericalUniform,
    Laplace,
    LogisticNormal,
    ResampledPrior,
    StandardNormal,
    StudentT,
    cauchy,
    matern_32,
    matern_52,
    spline_flow,
    squared_exponential,
)
from pyrovae.priors.discrete import Categorical, OneHotCategorical, RelaxedOneHotCategorical
from pyrovae.priors.mixtures import (
    ExemplarPrior,
    FullRankGaussianMixture,
    GaussianMixture,
    TiedGaussianMixture,
    VampPrior,
)

__all__ = [
    "Categorical",
    "DiagonalNormal",
    "Dirichlet",
    "ExemplarPrior",
    "FlowPrior",
    "FullRankGaussianMixture",
    "GaussianMixture",
    "GaussianProcess",
    "HypersphericalUniform",
    "Laplace",
    "LogisticNormal",
    "OneHotCategorical",
    "Prior",
    "RelaxedOneHotCategorical",
    "ResampledPrior",
    "StandardNormal",
    "StudentT",
    "TiedGaussianMixture",
    "VampPrior",
    "cauchy",
    "matern_32",
    "matern_52",
    "spline_flow",
    "squared_exponential",
]
