r"""Bounds: training objectives for any Pyro model and guide, each a function of the log weights of particles."""

from pyrovae.bounds.base import Bound, ImportanceBound, Terms
from pyrovae.bounds.elbo import ELBO, Capacity, Cyclical, FreeBits, Linear, Penalty, Schedule
from pyrovae.bounds.gradients import (
    Covariance,
    DoublyReparameterized,
    Gradient,
    Reparameterized,
    StickingTheLanding,
)
from pyrovae.bounds.weighted import CIWAE, CUBO, IWAE, MIWAE, PIWAE, TVO, Renyi, ReweightedWakeSleep, VRMax

__all__ = [
    "CIWAE",
    "CUBO",
    "Bound",
    "Capacity",
    "Covariance",
    "Cyclical",
    "DoublyReparameterized",
    "ELBO",
    "FreeBits",
    "Gradient",
    "IWAE",
    "ImportanceBound",
    "Linear",
    "MIWAE",
    "PIWAE",
    "Penalty",
    "Renyi",
    "Reparameterized",
    "ReweightedWakeSleep",
    "Schedule",
    "StickingTheLanding",
    "TVO",
    "Terms",
    "VRMax",
]
