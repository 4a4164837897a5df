"""Variational autoencoders as Pyro models and guides."""

from pyrovae import (
    bounds,
    data,
    diagnostics,
    distributions,
    encoders,
    estimators,
    likelihoods,
    nn,
    priors,
    regularizers,
    structures,
)
from pyrovae._version import __version__
from pyrovae.arguments import Arguments
from pyrovae.compilation import compile
from pyrovae.estimators import Estimate, log_marginal
from pyrovae.ex_post import fit_prior
from pyrovae.inference.imputation import Imputation, impute
from pyrovae.inference.structure import data_plate
from pyrovae.inference.weights import log_weights
from pyrovae.storage import load, load_run, save, save_run
from pyrovae.training import History, fit
from pyrovae.vae import VAE

__all__ = [
    "Arguments",
    "Estimate",
    "History",
    "Imputation",
    "VAE",
    "__version__",
    "bounds",
    "compile",
    "data",
    "data_plate",
    "diagnostics",
    "distributions",
    "encoders",
    "estimators",
    "fit",
    "fit_prior",
    "impute",
    "likelihoods",
    "load",
    "load_run",
    "log_marginal",
    "log_weights",
    "nn",
    "priors",
    "regularizers",
    "save",
    "save_run",
    "structures",
]
