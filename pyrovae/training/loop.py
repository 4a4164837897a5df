"""The training loop: :func:`fit`."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceTailAdaptive_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from pyrovae.arguments import as_arguments, as_device, as_tensors, count_data, row_positions
from pyrovae.bounds import Bound
from pyrovae.compilation import api as graphs
from pyrovae.compilation.cache import backend_of
from pyrovae.data.batches import Batches, as_batches
from pyrovae.distributed import init_process_group
from pyrovae.inference.messages import is_integer, warn
from pyrovae.inference.missing import fills_in
from pyrovae.progress import tqdm
from pyrovae.rows import number_type
from pyrovae.training.callbacks import Callback, listeners_of, running, stop_requested
from pyrovae.training.checkpoints import Checkpointer
from pyrovae.training.history import History
from pyrovae.training.rows import check_rows
from pyrovae.training.schedules import check_length
from pyrovae.training.trainer import Trainer

__all__ = ["fit"]

Data = Any  # tensors, arrays, containers of these, a Dataset or a DataLoader

# The fused kernel updates all parameters at once, in a fraction of the time of a loop over them.
Adam = partial(torch.optim.Adam, lr=1e-3, fused=True)


def fit(
    model: Callable,
    guide: Callable,
    data: Data,
    *,
    loss: ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | Optimizer = Adam,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    schedule_every_step: bool = False,
    ema_decay: float | None = None,
    transform: Callable | None = None,
    clip_norm: float | None = None,
    micro_batch_size: int | None = None,
    precision: Literal["bf16"] | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    compile: bool | Literal["auto"] = "auto",
    progress: bool = True,
) -> History:
    r"""Trains the parameters of any Pyro model and guide by gradient descent on an ELBO.

    A step lowers the loss per datum of a batch, :math:`\frac{1}{N} \mathrm{loss}(x_1, \dots, x_N)`. Batches and noise
    are drawn from torch's random state: call ``pyro.set_rng_seed`` first to make a run repeatable.

    Every epoch runs in training mode (dropout, batch norm), even if a callback called ``eval()``. At the end, the modes
    of before are restored. What is frozen in evaluation mode stays in evaluation mode: a module in evaluation mode
    whose parameters all have ``requires_grad=False``, or a single layer, such as batch norm, in evaluation mode inside
    a module in training mode.

    Data in memory are shuffled, unless one batch holds them all. So it must where there are parameters that belong to
    rows of the data, such as those of Pyro's automatic guides for latents per datum, and where rows are steps of a
    series. `fit` refuses the first, and warns of the second, if it cuts rows into batches.

    Args:
        model: a Pyro model, called with a batch: ``model(x)``, or ``model(x, context)`` for pairs.
        guide: a Pyro guide, called like the model.
        data: data in memory, a ``Dataset`` or a ``DataLoader``. In memory: a tensor, a NumPy array, a packed sequence,
            a dict of these, or a tuple of these and of lists with an entry per datum. The members of a tuple become
            positional arguments, ``Arguments(x, mask=mask)`` of :mod:`pyrovae.arguments` gives keyword arguments.
            Numbers, ``None`` and the like are passed with every batch. Batches of data in memory are made without a
            Python loop over the data. The batches of a ``DataLoader`` are used as they are, whatever `batch_size` says,
            and become arguments by the same rules, so a dict is one argument.
        loss: any ``pyro.infer.ELBO``, such as one of :mod:`pyrovae.bounds`; ``Trace_ELBO()`` by default. The loss of an
            ELBO that has a gradient only, such as ``TraceTailAdaptive_ELBO``, is recorded as infinite.
        epochs: passes over the data, including those before a resume.
        batch_size: data per step, or all data if there are fewer. The last batch of an epoch may be smaller.
        optimizer: called with the parameters, such as ``functools.partial(torch.optim.Adam, lr=3e-4)``; or a torch
            optimizer that holds them.
        scheduler: called with the optimizer to make a learning-rate schedule, which steps once per epoch. A
            ``OneCycleLR`` that is given no length gets that of the run.
        schedule_every_step: step the schedule after every step instead; its lengths are then numbers of steps.
        ema_decay: validate, call callbacks and end with an exponential moving average of the weights over the steps, of
            this decay, such as 0.999. Parameters with constraints are averaged without them. Buffers, such as the
            statistics of batch norm, are averaged too.
        transform: called with every batch, its result used instead: ``transform(x)``, or ``transform(x, context)``.
            It applies to validation batches too.
        clip_norm: largest norm of the gradient of the loss per datum, over all parameters together.
        micro_batch_size: run model and guide on at most so many data of a batch at once, and add up the gradients, so
            that large batches fit into memory. The step is that of the whole batch with other noise; what a loss makes
            of a batch as a whole (free bits, batch norm) is that of a micro-batch.
        precision: "bf16" computes matrix products and convolutions of the networks in bfloat16, by ``torch.autocast``,
            in training and validation; densities, log weights and sums keep the type of the parameters, which must be
            float32. It is faster on processors that have such products. None computes all in that type.
        validation: data in any of the forms above. Their loss is computed after every epoch, in evaluation mode and
            with the same noise each time.
        patience: stop when the validation loss has not improved for this many epochs, and restore the weights of the
            best epoch.
        callbacks: functions called with the :class:`History` after every epoch, in order; see
            :class:`pyrovae.training.Callback`. Training stops if one returns True.
        checkpoint: a file for the state of training. It is written after epochs, if at most a twentieth of the time
            goes into it, and at the end. A write that is interrupted leaves the earlier file.
        resume: continue from the checkpoint if it exists. The result is bitwise that of an uninterrupted run on the
            same machine.
        device: the device that data in memory are moved to at the start, and the batches of a loader one by one; None
            leaves them where they are.
        compile: how the loss and its gradient are computed, always with the same noise. With "auto" their operations
            are traced after a few steps, and played back from then on without Pyro's handlers: a step is faster, and
            its result is the same to the bit. In long runs on a CPU that gain by it, a graph that was compiled in the
            background takes over, at a step that follows from the operations alone; its result is equal to rounding.
            With True they are a compiled graph from the start, see :func:`pyrovae.compile`: the first step of a process
            takes some seconds more, the others less. With False model and guide run at every step. Where there can be
            no graph, a line says why, and model and guide run at every step. On a GPU the step of the optimizer is
            recorded together with a graph.
        progress: show a progress bar.

    Returns:
        The :class:`History`.

    Raises:
        ValueError: when an argument is out of range; when a schedule is shorter than the run and cannot go on; when the
            data are empty, hold NaN or infinity or are outside the support of the likelihood; when model and guide do
            not fit each other; when parameters belong to rows of data that come in several batches; or when the
            checkpoint is of another model.
        TypeError: when `optimizer` is not and does not make a torch optimizer, `loss` is not an ELBO, or `scheduler` or
            a callback cannot be called.
        FileExistsError: when the checkpoint exists and `resume` is False.
        RuntimeError: when gradients are turned off.
        FloatingPointError: when the loss or a parameter becomes NaN or infinite. The message names the step and the
            site. The checkpoint keeps the last good state.

    >>> import pyro
    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> pyro.set_rng_seed(0)
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> history = fit(vae.model, vae.guide, torch.randn(100, 3), epochs=5, batch_size=50, progress=False)
    >>> len(history)
    5
    """
    _check_arguments(
        epochs, batch_size, patience, clip_norm, validation, scheduler, callbacks, loss, compile, ema_decay
    )
    _check_steps(micro_batch_size, precision)
    if not torch.is_grad_enabled():
        raise RuntimeError("fit takes gradients, which torch.no_grad() or inference_mode() turns off: call it outside.")
    device = as_device(device)
    epochs, batch_size = int(epochs), int(batch_size)  # NumPy's integers are not accepted by all of torch
    world = init_process_group(device)
    checkpoint_exists = checkpoint is not None and world.broadcast_from_rank0(lambda: Path(checkpoint).exists())
    if checkpoint_exists and not resume:
        raise FileExistsError(
            f"checkpoint {checkpoint} already exists. Pass resume=True to continue from it, or give another path."
        )
    if resume and checkpoint is None:
        raise ValueError("resume=True needs a checkpoint to continue from.")
    if world.size > 1 and isinstance(getattr(data, "sampler", None), DistributedSampler):
        raise ValueError(
            "data has a DistributedSampler, but fit itself divides each batch among the processes: give the DataLoader "
            "without it."
        )

    numbers = number_type(model, guide)
    fills = partial(fills_in, model, guide, transform=transform)
    as_given = partial(as_batches, device=device, numbers=numbers, fills=fills)
    batches = as_given("data", data, batch_size, shuffle=True)
    # Without gradients, more data fit into memory. A series that is trained as one batch is not cut here either.
    most = max(batch_size, 1000)
    held_out = None if validation is None else as_given("validation", validation, most, shuffle=False)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("data gives no batch. Give at least one datum, and a DataLoader that does not drop it.")
    if isinstance(data, (DataLoader, IterableDataset)):  # which decide on the order of the data
        num_data = 0
    else:
        num_data = batches.size if isinstance(batches, Batches) else len(data)
    try:
        steps_per_epoch = len(batches)
    except TypeError:  # an iterable data set has no length
        steps_per_epoch = None
    if not schedule_every_step:
        schedule_length: int | None = epochs
    else:
        schedule_length = None if steps_per_epoch is None else epochs * steps_per_epoch

    loss = Trace_ELBO() if loss is None else loss
    backend = backend_of(compile)
    if backend is not None and not isinstance(loss, graphs.Compiled):
        loss = graphs.Compiled(loss, backend)
    with row_positions(getattr(batches, "rows", None)):
        trainer = Trainer(
            world,
            model,
            guide,
            loss,
            first_batch=first,
            num_data=num_data,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule_every_step=schedule_every_step,
            schedule_length=schedule_length,
            ema_decay=None if ema_decay is None else float(ema_decay),
            transform=transform,
            clip_norm=clip_norm,
            micro_batch_size=None if micro_batch_size is None else int(micro_batch_size),
            precision=precision,
            device=device,
            numbers=numbers,
        )
    if trainer.row_parameters:
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size cuts batches, but parameter {trainer.row_parameters[0]!r} belongs to rows of the "
                "data, which must come in one batch. Leave it out."
            )
        check_rows(trainer.row_parameters, batch_size, len(batches))
    if held_out is not None and not trainer.state.has_loss:
        raise ValueError(
            f"validation needs a loss, but {type(trainer.loss).__name__} has a gradient only. Leave validation out."
        )
    if isinstance(trainer.loss, Bound):
        trainer.loss.count_epochs(steps_per_epoch)
    _warn_of_long_schedules(trainer.loss, steps_per_epoch, epochs, patience)

    history, best, checkpointer = History(), None, None  # best: the weights of the best epoch
    if checkpoint is not None:
        first = as_arguments(first)
        count = count_data(*as_tensors(first.args, first.kwargs))
        fingerprint = {"steps an epoch": steps_per_epoch, "data in the first batch": count}
        checkpointer = Checkpointer(checkpoint, trainer, batches, fingerprint)
        if checkpoint_exists:
            history, best = checkpointer.load()
    if trainer.scheduler is not None and schedule_length is not None:
        check_length(trainer.scheduler, schedule_length, "steps" if schedule_every_step else "epochs")
    if checkpointer is not None:
        checkpointer.save(history, best)  # if the file cannot be written, this raises now and not after an epoch
    start = time.monotonic() - (history["seconds"][-1] if len(history) else 0.0)
    bar = tqdm(
        total=None if steps_per_epoch is None else steps_per_epoch * epochs,
        initial=0 if steps_per_epoch is None else steps_per_epoch * min(len(history), epochs),
        bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]" if steps_per_epoch else None,
        dynamic_ncols=True,
        disable=not (progress and world.is_rank0),
    )

    def describe(line: str = "") -> None:
        bar.set_description(line or f"epoch {len(history) + 1}/{epochs}", refresh=bool(line))

    called = callbacks if world.is_rank0 else ()  # by the other processes none
    listeners = listeners_of(called)

    def after_step() -> None:
        bar.update()
        for listener in listeners:
            listener()

    if trainer.compiled is not None:
        trainer.compiled.graphs.report = describe  # with a line before a graph is compiled, without after
        if compile == "auto":
            trainer.compiled.graphs.refused = lambda line: None if bar.disable else bar.write(line, file=sys.stderr)
    graphs_closed = nullcontext() if trainer.compiled is None else closing(trainer.compiled.graphs)
    with trainer.state.modes_restored(), bar, running(called, history), graphs_closed:
        while len(history) < epochs and not _is_out_of_patience(history, patience):
            epoch = len(history) + 1
            describe()
            record = {"epoch": epoch} | trainer.train_epoch(batches, epoch, after_step, is_quiet=not listeners)
            if held_out is not None:
                record["validation"] = trainer.validate(held_out, epoch)
            record["learning_rate"] = trainer.optimizer.param_groups[0]["lr"]
            trainer.end_epoch(record)
            record["seconds"] = time.monotonic() - start
            _warn_of_divergence(history["loss"] if len(history) else [], record["loss"])
            history.records.append(record)
            shown: dict[str, object] = {
                name: f"{record[name]:.3f}" for name in ("loss", "validation") if name in record
            }
            bar.set_postfix(shown, refresh=False)

            if history.best_epoch == epoch:
                best = trainer.state.snapshot()
            stop = world.broadcast_from_rank0(lambda: stop_requested(callbacks, history))
            is_last = stop or epoch == epochs or _is_out_of_patience(history, patience)
            if checkpointer is not None and (is_last or checkpointer.is_due()):
                checkpointer.save(history, best)
            if stop:
                break
    trainer.synchronize()
    if patience is not None and best is not None:
        trainer.state.restore(best)
    return history


def _check_arguments(
    epochs: Any,
    batch_size: Any,
    patience: Any,
    clip_norm: Any,
    validation: Any,
    scheduler: Any,
    callbacks: Any,
    loss: Any,
    compile: Any,
    ema_decay: Any,
) -> None:
    """Raises an error that names the first argument that is out of range or of the wrong type."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if not (is_integer(value) and value >= 1 or name == "patience" and value is None):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    if clip_norm is not None and not (isinstance(clip_norm, (float, int, np.number)) and clip_norm > 0):
        raise ValueError(f"clip_norm must be positive, got {clip_norm!r}.")
    if isinstance(loss, TraceTailAdaptive_ELBO) and not loss.vectorize_particles:
        raise ValueError(
            "TraceTailAdaptive_ELBO needs its particles drawn at once: give it num_particles and "
            "vectorize_particles=True."
        )
    if patience is not None and validation is None:
        raise ValueError("patience stops training by the validation loss: give validation data, or leave patience out.")
    if not (scheduler is None or callable(scheduler)):
        raise TypeError(
            "scheduler must make a schedule when called with the optimizer, such as functools.partial(StepLR, "
            f"step_size=10); got {scheduler!r}."
        )
    if not (isinstance(callbacks, Sequence) and all(map(callable, callbacks))):
        raise TypeError(f"callbacks must be a list of functions of the history, got {callbacks!r}.")
    if ema_decay is not None and not (isinstance(ema_decay, (float, int, np.number)) and 0 < ema_decay < 1):
        raise ValueError(f"ema_decay must be between 0 and 1, such as 0.999, or None, got {ema_decay!r}.")
    backend_of(compile)
    if loss is not None and (isinstance(loss, type) or not callable(getattr(loss, "loss", None))):
        raise TypeError(f"loss must be an ELBO object, such as bounds.IWAE(16), got {loss!r}.")


def _check_steps(micro_batch_size: Any, precision: Any) -> None:
    """Raises a ValueError that names an option of the steps that is out of range."""
    if micro_batch_size is not None and not (is_integer(micro_batch_size) and micro_batch_size >= 1):
        raise ValueError(f"micro_batch_size must be an integer of at least 1, or None, got {micro_batch_size!r}.")
    if precision not in (None, "bf16"):
        raise ValueError(f'precision must be "bf16" or None, got {precision!r}.')


def _warn_of_long_schedules(loss: ELBO, steps_per_epoch: int | None, epochs: int, patience: int | None) -> None:
    """Warns if training ends, or may be stopped, before the schedules of a loss end."""
    if not isinstance(loss, Bound) or not steps_per_epoch:
        return
    span = math.ceil(loss.span / steps_per_epoch)
    for name, value in (("epochs", epochs), ("patience", patience)):
        if value is not None and value < span:
            warn(
                f"the schedule of {type(loss).__name__} takes {loss.span} steps, which are {span} epochs of these "
                f"data, but {name}={value}. Make the schedule shorter, or {name} larger."
            )


def _warn_of_divergence(before: Sequence[float], loss: float) -> None:
    """Warns where the loss of an epoch is above all before by many times their spread, and by more than their size."""
    most, least = max(before, default=math.inf), min(before, default=0.0)
    if len(before) >= 3 and loss - most > max(10 * (most - least), abs(most) + 1):
        warn(
            f"the loss of epoch {len(before) + 1} is {loss:.4g}, and was {most:.4g} at most before: the run has "
            "diverged. Clip gradients (clip_norm), lower the learning rate, or let patience go back to the best epoch."
        )


def _is_out_of_patience(history: History, patience: int | None) -> bool:
    best = history.best_epoch
    return patience is not None and best is not None and len(history) - best >= patience
