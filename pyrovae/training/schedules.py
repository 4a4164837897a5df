"""Learning-rate schedules: how long they are, and how long the run is."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from pyrovae.inference.messages import warn

# The attribute of torch's schedules that says after how many of their steps they end.
_LENGTHS = ("total_steps", "T_max", "T_0", "total_iters")


def make_schedule(scheduler: Callable[..., LRScheduler], optimizer: Optimizer, num_steps: int | None) -> LRScheduler:
    """Returns a schedule; a OneCycleLR that is given no length gets that of the run.

    Args:
        scheduler: called with the optimizer to make the schedule.
        optimizer: the optimizer.
        num_steps: how often the schedule steps in the run, None where that is not known.
    """
    try:
        return scheduler(optimizer)
    except ValueError as error:
        if "must define either total_steps" not in str(error):  # what OneCycleLR says
            raise
        if num_steps is None:
            raise ValueError("scheduler: OneCycleLR needs total_steps, because the data have no length.") from error
    return scheduler(optimizer, total_steps=num_steps)


def check_length(schedule: LRScheduler, num_steps: int, unit: str) -> None:
    """Warns of a schedule that does not end with the run; raises where it cannot go on that long.

    Args:
        schedule: the schedule, as it is after a resume.
        num_steps: how often it steps in the run.
        unit: what it counts, for the message.

    Raises:
        ValueError: for a OneCycleLR that ends before the run.
    """
    name = type(schedule).__name__
    length = next((getattr(schedule, attribute) for attribute in _LENGTHS if hasattr(schedule, attribute)), None)
    if length is None:
        return
    if length > num_steps:
        warn(
            f"the schedule {name} takes {length} {unit}, but the run has {num_steps}: it does not come to its end. "
            f"Give the schedule {num_steps} {unit}, or train longer."
        )
    if 0 < length < num_steps and isinstance(schedule, CosineAnnealingLR):
        warn(
            f"the schedule CosineAnnealingLR falls over {length} {unit} and then rises again, but the run has "
            f"{num_steps}. Give it T_max={num_steps} in a new run, or train no longer."
        )
    if length < num_steps and isinstance(schedule, OneCycleLR):
        raise ValueError(
            f"scheduler: OneCycleLR takes {length} {unit} and cannot go on, but the run has {num_steps}. Leave its "
            "length out in a new run, which gives it that of the run. A run that is resumed cannot be made longer."
        )
