r"""Bounds: training objectives for any Pyro model and guide, each a function of the log weights of particles."""

from pyrovae.bounds.base import Bound, ImportanceBound, Terms
from pyrovae.bounds.elbo import ELBO
from pyrovae.bounds.filtering import FIVO
from pyrovae.bounds.gradients import (
    Coefficients,
    Covariance,
    DoublyReparameterized,
    Gradient,
    Reparameterized,
    StickingTheLanding,
)
from pyrovae.bounds.penalties import Capacity, FreeBits, Penalty
from pyrovae.bounds.reductions import Reduced, power_mean
from pyrovae.bounds.schedules import Cyclical, Linear, Schedule
from pyrovae.bounds.weighted import CIWAE, CUBO, IWAE, MIWAE, PIWAE, TVO, Renyi, ReweightedWakeSleep, VRMax
from pyrovae.inference.filtering import multinomial, stratified, systematic

__all__ = [
    "CIWAE",
    "CUBO",
    "Bound",
    "Capacity",
    "Coefficients",
    "Covariance",
    "Cyclical",
    "DoublyReparameterized",
    "ELBO",
    "FIVO",
    "FreeBits",
    "Gradient",
    "IWAE",
    "ImportanceBound",
    "Linear",
    "MIWAE",
    "PIWAE",
    "Penalty",
    "Reduced",
    "Renyi",
    "Reparameterized",
    "ReweightedWakeSleep",
    "Schedule",
    "StickingTheLanding",
    "TVO",
    "Terms",
    "VRMax",
    "multinomial",
    "power_mean",
    "stratified",
    "systematic",
]
