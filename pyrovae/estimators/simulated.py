"""Data that the model draws, with exact draws from their posteriors, as a test of what a proposal reaches."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyrovae.estimators.base import Estimator
from pyrovae.estimators.exact import Quadrature
from pyrovae.estimators.newton import climb, joint_of
from pyrovae.estimators.targets import Target
from pyrovae.estimators.task import Task, prior_of
from pyrovae.estimators.weighted import ImportanceSampling
from pyrovae.inference.simulation import check_simulated, simulate
from pyrovae.progress import tqdm

_LEAST_SIMULATED = 16  # data at once
_UNSEEN = 10.0  # nats by which the weight of an exact draw is above the mean weight, where no draws go
_LEAST_GOOD = 0.25  # share of them whose estimates are good, so that it is known whether modes are missed
_OTHER = 0.7  # nats between p(x) and the mass of a single mode by its curvature, above which there is more than that
_CLIMB, _PRIOR_DRAWS = 20, 1000  # steps to the mode; draws whose range tells how far apart the points of a grid are
_MOST_UNSEEN = 1  # of them: with k-hat at 0.5 the posterior has a share of exp(-10) there


def share_unseen(task: Task, estimator: Estimator, num_data: int, most_khat: float) -> float:
    r"""Returns the share of data drawn from the model with latents where the draws for an estimate do not go.

    .. math:: \log p(x, z) - \log q(z \mid x) - \log \hat p(x) > 10, \quad x, z \sim p(x, z)

    Data count whose estimate is good. The share is zero if it is one datum, and NaN if nothing is known: the model
    cannot draw data, or the estimates of few of them are good.

    Args:
        task: the data in whose place others are drawn.
        estimator: importance sampling, with the draws of a pilot run.
        num_data: number of data to draw.
        most_khat: largest k-hat of a good estimate.
    """
    # As many at once as there are, since modes are searched for in all data at once.
    blocks = (torch.arange(num_data) % task.size).split(max(task.size, _LEAST_SIMULATED))
    blocks = blocks if task.divisible else blocks[:1]
    bar = tqdm(disable=True)
    for guide in (task.guide, prior_of(task.model)):  # guides of others may take no data but their own
        try:
            found = [
                _rises(replace(task.rows(rows), guide=guide, graphs=None, bar=bar), estimator, most_khat)
                for rows in blocks
            ]
        except Exception:  # programs of others need not run without their data
            continue
        rise, is_good = (torch.cat(columns) for columns in zip(*found, strict=True))
        num_good, num_unseen = int(is_good.sum()), int(((rise > _UNSEEN) & is_good).sum())
        if num_unseen > _MOST_UNSEEN:
            return num_unseen / num_good
        return 0.0 if num_good >= _LEAST_GOOD * len(is_good) else math.nan
    return math.nan


def share_missed(task: Task, quadrature: Quadrature, num_data: int) -> float:
    """Returns the share of data drawn from a model of one latent of whose latents a grid misses the mode.

    A climb from the latent ends at its mode. A mode that is narrower than a cell of the grid, and whose mass, by the
    curvature there, is not about p(x), counts: either the grid has missed it, or there are several such modes, and the
    grid has points in some of them by chance. The share is zero if it is one datum, and NaN if the model cannot draw
    data.

    Args:
        task: the data in whose place others are drawn.
        quadrature: the grid.
        num_data: number of data to draw.
    """
    rows = torch.arange(num_data) % task.size if task.divisible else torch.arange(task.size)
    try:
        few = replace(task.rows(rows), graphs=None, bar=tqdm(disable=True))
        latents, args, kwargs = simulate(few.model, few.structure, *few.args, **few.kwargs)
        check_simulated(few.model, latents, few.structure, args, kwargs)
        few = next(iter(quadrature.prepare(replace(few, args=args, kwargs=kwargs)).split(few.size)))
        value = quadrature.estimate(few).value.double()
        target = joint_of(few)
        u = target.pack_rows(latents, slice(0, few.size))
        ends = climb(few, u, _CLIMB)
    except Exception:  # programs of others need not run without their data
        return math.nan
    log_det = ends.curvature.of(0).log_det()
    mass = ends.log_joint[0].double() + 0.5 * (math.log(2 * math.pi) - log_det)
    prior = target.draw(_PRIOR_DRAWS)
    is_narrow = (-0.5 * log_det).exp() < (prior.amax(0) - prior.amin(0)).squeeze(-1) / quadrature.num_samples
    num_missed = int((is_narrow & ((mass - value).abs() > _OTHER) & (mass > value - _UNSEEN)).sum())
    return num_missed / len(value) if num_missed > _MOST_UNSEEN else 0.0


def _rises(task: Task, estimator: Estimator, most_khat: float) -> tuple[Tensor, Tensor]:
    """Draws data from a model; returns how far the log weights of their latents are above log p(x), and if it is good.

    Raises:
        ValueError: when the model cannot draw data in the place of those that it observes.
    """
    latents, args, kwargs = simulate(task.model, task.structure, *task.args, **task.kwargs)
    check_simulated(task.model, latents, task.structure, args, kwargs)
    task = next(iter(estimator.prepare(replace(task, args=args, kwargs=kwargs)).split(task.size)))
    fitted = estimator.fit(task)
    assert isinstance(fitted, ImportanceSampling)  # as the stages with Laplace are
    pilot = fitted.estimate(task)
    target = Target(task, fitted.proposal.guides(task)[0])
    _, rise = target.values(target.pack_rows(latents, slice(0, task.size)))
    return rise[0] - pilot.value, pilot.trusted & ~(pilot.khat > most_khat)
