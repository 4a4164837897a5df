"""The names that this module had before :mod:`pyrovae.inference`."""

from pyrovae.inference.imputation import Imputation, impute
from pyrovae.inference.weights import log_weights

__all__ = ["Imputation", "impute", "log_weights"]
