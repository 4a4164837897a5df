"""Estimates of log p(x), per datum, with what says how far to trust them."""

from pyrovae.estimators.base import Estimate, independent_baseline, log_marginal

__all__ = ["Estimate", "independent_baseline", "log_marginal"]
