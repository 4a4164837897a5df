"""The names that this module had before :mod:`pyrovae.inference`."""

from pyrovae.inference.weights import Imputation, impute, log_weights

__all__ = ["Imputation", "impute", "log_weights"]
