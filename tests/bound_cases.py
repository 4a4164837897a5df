"""The registry of every public bound: add a row per new bound, and the tests over all bounds cover it."""

from collections.abc import Callable
from typing import NamedTuple

from pyrovae import bounds
from pyrovae.bounds import Covariance, DoublyReparameterized, StickingTheLanding


class BoundCase(NamedTuple):
    """One public bound with one estimator of its gradient.

    Args:
        name: its name in the tests.
        build: builds one from a number of particles, a multiple of 2.
        kind: "lower" where its mean is at most log p(x), "upper" where its limit in many particles is at least that,
            "none" for neither.
        reparameterized: whether it refuses latents without an rsample.
        unbiased: whether the mean of its gradient is the gradient of its mean, in all parameters.
    """

    name: str
    build: Callable[..., bounds.Bound]
    kind: str = "lower"
    reparameterized: bool = False
    unbiased: bool = True


DREG, STL = DoublyReparameterized(), StickingTheLanding()

BOUNDS = [
    BoundCase("ELBO", lambda k, **kw: bounds.ELBO(k, **kw)),
    BoundCase("ELBO-draws", lambda k, **kw: bounds.ELBO(k, closed_form=False, **kw)),
    BoundCase("ELBO-STL", lambda k, **kw: bounds.ELBO(k, gradient=STL, **kw), reparameterized=True),
    BoundCase("ELBO-DReG", lambda k, **kw: bounds.ELBO(k, gradient=DREG, **kw), reparameterized=True),
    BoundCase("IWAE", lambda k, **kw: bounds.IWAE(k, **kw)),
    BoundCase("IWAE-DReG", lambda k, **kw: bounds.IWAE(k, DREG, **kw), reparameterized=True),
    BoundCase("MIWAE", lambda k, **kw: bounds.MIWAE(k, 2, **kw)),
    BoundCase("MIWAE-DReG", lambda k, **kw: bounds.MIWAE(k, 2, DREG, **kw), reparameterized=True),
    # The two gradients of PIWAE are those of two functions: see the test of its own.
    BoundCase("PIWAE", lambda k, **kw: bounds.PIWAE(k, 2, **kw), unbiased=False),
    BoundCase("PIWAE-DReG", lambda k, **kw: bounds.PIWAE(k, 2, DREG, **kw), reparameterized=True, unbiased=False),
    BoundCase("CIWAE", lambda k, **kw: bounds.CIWAE(k, 0.3, **kw)),
    BoundCase("CIWAE-DReG", lambda k, **kw: bounds.CIWAE(k, 0.3, DREG, **kw), reparameterized=True),
    BoundCase("Renyi-half", lambda k, **kw: bounds.Renyi(k, 0.5, **kw)),
    BoundCase("Renyi-half-DReG", lambda k, **kw: bounds.Renyi(k, 0.5, DREG, **kw), reparameterized=True),
    BoundCase("Renyi-2", lambda k, **kw: bounds.Renyi(k, 2.0, **kw)),
    BoundCase("Renyi-2-DReG", lambda k, **kw: bounds.Renyi(k, 2.0, DREG, **kw), reparameterized=True),
    BoundCase("Renyi-minus-1", lambda k, **kw: bounds.Renyi(k, -1.0, **kw), kind="upper"),
    BoundCase("Renyi-minus-1-DReG", lambda k, **kw: bounds.Renyi(k, -1.0, DREG, **kw), "upper", reparameterized=True),
    BoundCase("VRMax", lambda k, **kw: bounds.VRMax(k, **kw), kind="none"),
    BoundCase("CUBO", lambda k, **kw: bounds.CUBO(k, **kw), kind="upper", unbiased=False),
    BoundCase(
        "CUBO-DReG",
        lambda k, **kw: bounds.CUBO(k, gradient=DREG, **kw),
        kind="upper",
        reparameterized=True,
        unbiased=False,
    ),
    BoundCase("TVO", lambda k, **kw: bounds.TVO(k, 4, **kw)),
    BoundCase("TVO-DReG", lambda k, **kw: bounds.TVO(k, 4, gradient=DREG, **kw), reparameterized=True),
    BoundCase("TVO-covariance", lambda k, **kw: bounds.TVO(k, 4, gradient=Covariance(), **kw), unbiased=False),
    # On models without steps; the tests of particle filters are its own.
    BoundCase("FIVO", lambda k: bounds.FIVO(k), unbiased=False),
    BoundCase("FIVO-unbiased", lambda k: bounds.FIVO(k, 1.0, bounds.multinomial, resampling_gradient=True)),
    BoundCase("ReweightedWakeSleep", lambda k, **kw: bounds.ReweightedWakeSleep(k, **kw), unbiased=False),
    BoundCase(
        "ReweightedWakeSleep-sleep", lambda k, **kw: bounds.ReweightedWakeSleep(k, 0.5, 0.5, **kw), unbiased=False
    ),
]
BY_NAME = {case.name: case for case in BOUNDS}
