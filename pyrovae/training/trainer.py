"""Training: any Pyro model and guide, any ``pyro.infer.ELBO``, one function."""

import math
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm.auto import tqdm

from pyrovae import storage
from pyrovae.arguments import (
    Arguments,
    converted,
    count_data,
    cuda_devices,
    moved,
    of_batch,
    placed,
    settled,
    take_rows,
    tensors_of,
)
from pyrovae.bounds import Bound
from pyrovae.compilation import api as graphs
from pyrovae.compilation.cudagraph import PostStep
from pyrovae.compilation.guards import Guards
from pyrovae.data.loading import Batches, as_batches
from pyrovae.distributed import Shard, init_process_group
from pyrovae.inference.structure import (
    ObservedChecked,
    check_all_observed,
    check_finite,
    evaluation_mode,
    inspect,
    is_integer,
    latents_of_trace,
    sample_sites,
    traced,
    unwrapped,
    warn,
)

__all__ = ["History", "fit"]

Data = Any  # tensors, arrays, what is made of them, a Dataset or a DataLoader

# Steps on a GPU between looks at whether all is well.
_ASK_EVERY = 50

# One kernel for all parameters, which takes a fraction of the time of the loop over them.
Adam = partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass
class History:
    """What training recorded: one record (a dict) an epoch.

    A record holds "epoch", "loss" and, where asked for, "validation" (nats a datum: losses, so lower is better),
    "learning_rate" and "seconds" since the start. One of :mod:`pyrovae.bounds` adds what the loss is made of, in nats a
    datum: "bound", "reconstruction", "kl z" for each latent site "z", and each regularizer by its class. Callbacks may
    add entries to the last one.

    Args:
        records: the records in order.

    >>> history = History([{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.5}])
    >>> history["loss"]
    [3.0, 2.5]
    >>> print(history)
    epoch    loss
        1  3.0000
        2  2.5000
    """

    records: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> list:
        """Returns one entry of every record, None where a record lacks it."""
        if not any(name in record for record in self.records):
            raise KeyError(
                f"no record holds {name!r}; they hold {list(self.records[-1]) if self.records else 'nothing'}"
            )
        return [record.get(name) for record in self.records]

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the lowest validation loss, None before the first."""
        scored = [record for record in self.records if "validation" in record]
        return min(scored, key=lambda record: record["validation"])["epoch"] if scored else None

    def table(self, max_rows: int = 20) -> str:
        """Returns a table of at most `max_rows` records, evenly spaced, the first and the last among them.

        A learning rate that stays the same is left out, and what fewer than half of the records hold.
        """
        count = min(max_rows, len(self))
        shown = [self.records[round(i * (len(self) - 1) / max(count - 1, 1))] for i in range(count)]
        names = list(dict.fromkeys(name for record in self.records for name in record))
        if "learning_rate" in names and len(set(self["learning_rate"])) == 1:
            names.remove("learning_rate")
        names = [name for name in names if 2 * sum(name in record for record in self.records) >= len(self)]
        cells = [names] + [[_cell(record.get(name)) for name in names] for record in shown]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | Path | None = None):
        """Draws the losses by epoch; returns the matplotlib figure, and writes it if a path is given."""
        from pyrovae import plots  # matplotlib is slow to import

        return plots.learning_curve(self, path)


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
    transform: Callable | None = None,
    clip_norm: float | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[History], Any]] = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    compile: bool = False,
    progress: bool = True,
) -> History:
    r"""Trains the parameters of any Pyro model and guide by gradient descent on an ELBO.

    A step lowers the loss per datum, :math:`\frac{1}{N} \mathrm{loss}(x_1, \dots, x_N)`, of a batch. Batches, noise and
    so the result follow from torch's random state: call ``pyro.set_rng_seed`` before for a run that can be repeated.

    Every epoch starts in training mode (dropout, batch norm), also if a callback called ``eval()``, and the end puts back
    the mode that was there before. What is in evaluation mode at the start stays so if it is frozen: a module whose
    parameters all have ``requires_grad=False``, or a single layer, such as batch norm, inside of a module in training mode.

    Data in memory are shuffled, unless parameters belong to their rows, as those of Pyro's automatic guides of latents per
    datum: then all are taken at once, in their order, and `fit` warns of it; smaller batches are refused.

    Args:
        model: a Pyro model, called with a batch: ``model(x)``, or ``model(x, context)`` for pairs.
        guide: a Pyro guide, called like the model.
        data: in memory, a tensor, a NumPy array, a list with an entry a datum in a tuple, a packed sequence or a dict of
            these; a tuple of them, which become positional arguments; ``Arguments(x, mask=mask)`` of
            :mod:`pyrovae.arguments` for keywords. What else is in it, such as a number or ``None``, is for all data. It is
            shuffled and batched without a loop over items. Or a ``Dataset``; or a ``DataLoader``, which then has the say
            over batches: these become arguments by the same rule, so that a dict is one argument, and what
            ``collate_fn`` makes of it is passed on.
        loss: any ``pyro.infer.ELBO``, one of :mod:`pyrovae.bounds` for example; the default a new ``Trace_ELBO()``. The loss of
            one that has a gradient alone, such as ``TraceTailAdaptive_ELBO``, is recorded as infinite.
        epochs: passes over the data, those before a resume included.
        batch_size: data a step, all of them if there are fewer; the last batch of an epoch may be smaller.
        optimizer: called with the parameters, as in ``functools.partial(torch.optim.Adam, lr=3e-4)``; or a torch
            optimizer that holds them.
        scheduler: called with the optimizer to make a learning-rate schedule, stepped once an epoch.
        transform: called with every batch, its result used instead: ``transform(x)``, or ``transform(x, context)``.
            Applies to validation batches too.
        clip_norm: largest norm of the gradient of the loss per datum over all parameters together.
        validation: data as above; its loss is taken after every epoch, in evaluation mode, each time with the same noise.
        patience: stop when this many epochs brought no lower validation loss, and restore the weights of the best.
        callbacks: functions called with the :class:`History` after every epoch; one that returns True, numpy's or a
            tensor's too, ends training.
        checkpoint: a file to keep the state of training in, written after epochs (rarely enough to cost little) and at
            the end, whole or not at all.
        resume: go on from the checkpoint if it is there. The result is the same to the bit as that of a run that was not
            interrupted, on the same machine.
        device: where to move data in memory, once, and batches of a loader; the default leaves them where they are.
        compile: whether to compute loss and gradient by a compiled graph, as :func:`pyrovae.compile` does, the noise
            being the same. It takes some seconds at the first step of this process. On a GPU the optimizer's step is
            recorded along with it.
        progress: whether to show a progress bar.

    Returns:
        The :class:`History`.

    Raises:
        ValueError: when an argument is out of range, data is empty, holds NaN or infinity or is outside the
            likelihood's support, or model and guide do not fit each other; when parameters belong to rows of data that
            come in several batches; or the checkpoint is another model's.
        TypeError: when `optimizer` makes none of torch's, `loss` is no ELBO, or `scheduler` or a callback is no function.
        FileExistsError: when the checkpoint is there and `resume` is not asked for.
        FloatingPointError: when the loss or a parameter stops being finite. The message names the step and the site; the
            checkpoint keeps the last good state.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> pyro.set_rng_seed(0)
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> history = fit(vae.model, vae.guide, torch.randn(100, 3), epochs=5, batch_size=50, progress=False)
    >>> len(history)
    5
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if not (is_integer(value) and value >= 1 or name == "patience" and value is None):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    epochs, batch_size = int(epochs), int(batch_size)  # numpy's are not taken by all of torch
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}.")
    if patience is not None and validation is None:
        raise ValueError("patience stops training by the validation loss: give validation data, or leave patience out.")
    if not (scheduler is None or callable(scheduler)):
        raise TypeError(
            "scheduler must make a schedule when called with the optimizer, such as functools.partial(StepLR, step_size=10); "
            f"got {scheduler!r}."
        )
    if not (isinstance(callbacks, Sequence) and all(map(callable, callbacks))):
        raise TypeError(f"callbacks must be a list of functions of the history, got {callbacks!r}.")
    world = init_process_group(device)
    is_there = checkpoint is not None and world.broadcast_from_rank0(lambda: Path(checkpoint).exists())
    if is_there and not resume:
        raise FileExistsError(f"checkpoint {checkpoint} is there already. Pass resume=True to go on, or another path.")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs a checkpoint to go on from.")

    if world.size > 1 and isinstance(getattr(data, "sampler", None), DistributedSampler):
        raise ValueError(
            "data has a DistributedSampler, but fit shares each batch out itself: give the DataLoader without it."
        )
    batches = as_batches("data", data, batch_size, shuffle=True, device=device)
    held_out = None if validation is None else as_batches("validation", validation, None, shuffle=False, device=device)
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("data gives no batch. Give at least one datum, and a DataLoader that does not drop it.")
    if loss is not None and (isinstance(loss, type) or not callable(getattr(loss, "loss", None))):
        raise TypeError(f"loss must be an ELBO that is built, such as bounds.IWAE(16), got {loss!r}.")
    loss = Trace_ELBO() if loss is None else loss
    loss = graphs.compile(loss) if compile else loss
    if isinstance(batches, Batches) and len(batches) == 1:
        first = next(iter(batches.in_order()))
    others_say = isinstance(data, (DataLoader, IterableDataset))  # in which order data come
    num_shuffled = 0 if others_say else batches.size if isinstance(batches, Batches) else len(data)
    with placed(getattr(batches, "rows", None)):
        run = _Run(world, model, guide, loss, optimizer, scheduler, transform, clip_norm, device, first, num_shuffled)
    if run.of_rows:
        _warn_of_rows(run.of_rows, batch_size, len(batches))
        batches = as_batches("data", data, batch_size, shuffle=False, device=device)
    if held_out is not None and not run.has_loss:
        raise ValueError(
            f"validation needs a loss, but {type(run.loss).__name__} has a gradient alone. Leave validation out."
        )
    history, best, steps = History(), None, _length(batches)
    _warn_of_schedules(run.loss, steps, epochs, patience)
    first = of_batch(first)
    fingerprint = {"steps an epoch": steps, "data in the first batch": count_data(*converted(first.args, first.kwargs))}

    if is_there:
        saved = world.broadcast_from_rank0(lambda: storage.read_checkpoint(checkpoint))
        if saved["data"] != fingerprint:
            raise ValueError(
                f"checkpoint {checkpoint} was made with {saved['data']}, but now there are {fingerprint}. Resume with the "
                "same data and batch size."
            )
        run.load_state(saved)
        history, best = History(saved["history"]), saved["best"]
        _set_random_state(saved["random"], batches)

    def save() -> float:
        if not world.is_rank0:
            return 0.0
        start = time.monotonic()
        rest = {"data": fingerprint, "history": history.records, "best": best, "random": _random_state(batches)}
        storage.write_checkpoint(checkpoint, run.state() | rest)
        return time.monotonic() - start

    # A place that cannot be written to shows now, not after an epoch.
    cost = 0.0 if checkpoint is None else save()
    saved_at = time.monotonic()
    started = time.monotonic() - (history["seconds"][-1] if len(history) else 0.0)
    with (
        run.modes_put_back(),
        tqdm(
            total=None if steps is None else steps * epochs,
            initial=0 if steps is None else steps * min(len(history), epochs),
            unit="step",
            disable=not (progress and world.is_rank0),
        ) as bar,
    ):
        if run.compiled is not None:
            run.compiled.graphs.report = bar.set_description
        while len(history) < epochs and not _out_of_patience(history, patience):
            epoch = len(history) + 1
            run.start_epoch()
            count = 0.0
            # Pyro's validation takes a tenth of a step. The first batch has passed it, and what may change after is looked at:
            # the data at each observed site, and whether the loss is finite.
            with pyro.validation_enabled(False):
                for batch in world.check_same_batches(batches):
                    bar.set_description(
                        f"epoch {epoch}/{epochs}", refresh=False
                    )  # there may be another while it compiles
                    batch = run.prepare("data", batch, check=not isinstance(batches, Batches))
                    shard = world.shard(count_data(batch.args, batch.kwargs))
                    run.rows = getattr(batches, "rows", None)
                    run.step(batch, shard, epoch)
                    count += shard.total
                    bar.update()
            if count == 0:
                raise ValueError(
                    f"data gave no batch in epoch {epoch}. A data set must be iterable anew for every epoch."
                )
            record = {"epoch": epoch} | run.means(count)
            run.align()  # what each has gathered of its own data, batch norm's statistics, is the first one's for all
            if held_out is not None:
                record["validation"] = run.validate(held_out, epoch)
            record["learning_rate"] = run.optimizer.param_groups[0]["lr"]
            run.end_epoch(record)
            record["seconds"] = time.monotonic() - started
            history.records.append(record)
            bar.set_postfix(
                {name: f"{record[name]:.3f}" for name in ("loss", "validation") if name in record}, refresh=False
            )
            if history.best_epoch == epoch:
                best = run.snapshot()
            stop = world.broadcast_from_rank0(lambda: any([_is_true(callback(history)) for callback in callbacks]))
            last = stop or epoch == epochs or _out_of_patience(history, patience)
            # Often enough to lose little when killed, seldom enough that writing takes no more than a twentieth.
            if checkpoint is not None and (last or time.monotonic() - saved_at > 20 * cost):
                cost, saved_at = save(), time.monotonic()
            if stop:
                break
    run.align()
    if patience is not None and best is not None:
        run.restore(best)
    return history


class _Run:
    """The parameters, buffers, optimizer and schedule of one training run, found by running model and guide once."""

    def __init__(
        self, world, model, guide, loss, optimizer, scheduler, transform, clip_norm, device, first_batch, num_shuffled
    ):
        self.world, self.model, self.guide = world, model, guide
        self.compiled = loss if isinstance(loss, graphs.Compiled) else None
        self.loss = loss if self.compiled is None else self.compiled.elbo
        if isinstance(self.loss, Bound):
            self.loss.load_state_dict({"steps": 0})  # schedules start with the run
        self.transform, self.clip_norm, self.device = transform, clip_norm, device
        self.num_steps = 0
        self.has_loss = True
        self.names: list[str] = []
        self.totals: Tensor | None = None  # of an epoch
        self.rows: Tensor | int | None = None  # the places of a batch's data among all, where they are known
        self.fine: Tensor | None = None  # whether all losses of an epoch are finite, and data in their support
        batch = self.prepare("data", first_batch, check=True)
        total = count_data(batch.args, batch.kwargs)
        structure = inspect(model, guide, *batch.args, **batch.kwargs)
        shard = world.shard(total)
        args, kwargs = shard.rows(batch.args, batch.kwargs)
        if shard.count < total:
            structure = inspect(model, guide, *args, **kwargs)
        self.unvalidated = structure.unvalidated
        for name in structure.outside:
            warn(
                f'data at site "{name}" are outside the support of its distribution, which was built with validate_args=False: the '
                "loss is of no probability of them, and log_marginal will refuse them."
            )
        if self.compiled is not None:
            self.compiled.unvalidated = structure.unvalidated
        # A plate that stands for more data than it holds scales its loss up to all of them.
        self.data_size = structure.data_size if structure.data_size != shard.count else None
        self.params, self.buffers = self._find_state(args, kwargs)
        self.trained = list({id(p): p for p in self.params.values()}.values())
        self.of_rows = self._parameters_of_rows(batch, total, num_shuffled) if num_shuffled else []
        self.optimizer = _built(optimizer, self.trained)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.params.items() if id(p) not in held]
        if missing:
            raise ValueError(
                f"optimizer does not hold {len(missing)} of {len(self.params)} parameters, among them "
                f"{missing[0].split(' ', 1)[1]!r}. Pass a callable such as functools.partial(torch.optim.Adam, lr=1e-3) to "
                "train all of them, or freeze the others with requires_grad_(False)."
            )
        self.recordable = world.size == 1 and _make_recordable(self.optimizer)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        self.align()

    def prepare(self, name: str, batch: Any, check: bool) -> Arguments:
        """Returns a batch as the arguments for model and guide: checked, on its device, transformed."""
        batch = of_batch(batch)
        args, kwargs = converted(batch.args, batch.kwargs)
        if check:
            for x in tensors_of(args, kwargs):
                check_finite(name, x)
        if self.device is not None:
            args, kwargs = moved(args, kwargs, self.device)
        if self.transform is None:
            return Arguments(*args, **kwargs)
        return of_batch(self.transform(*args, **kwargs))

    def _find_state(self, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs the loss once, changing nothing, to find the parameters and buffers it uses, named by order and name.

        The order, because the names that Pyro knows parameters by may differ from one process to the next.
        """
        modules: dict[int, nn.Module] = {}
        handle = nn.modules.module.register_module_forward_pre_hook(lambda m, _: modules.setdefault(id(m), m) and None)
        devices = cuda_devices(tensors_of(args, kwargs))
        try:
            with (
                torch.no_grad(),
                evaluation_mode(),
                torch.random.fork_rng(devices),
                poutine.trace(param_only=True) as found,
            ):
                try:
                    self.loss.loss(self.model, self.guide, *args, **kwargs)
                except NotImplementedError:  # an ELBO of which there is no more than a gradient
                    self.has_loss = False
                    self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
        finally:
            handle.remove()
        for owner in (self.model, self.guide):  # a method's module is used, if not called
            owner = getattr(owner, "__self__", owner)
            if isinstance(owner, nn.Module):
                modules.update((id(m), m) for m in owner.modules())
        params = {
            f"{i} {name.split('$$$')[-1]}": site["value"].unconstrained()
            for i, (name, site) in enumerate(found.trace.nodes.items())
        }
        if not params:
            raise ValueError(
                "model and guide have no parameters to train. Register networks with pyro.module, or use pyro.param."
            )
        known = {id(p) for p in params.values()}
        for module in modules.values():
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad and id(p) not in known:
                    raise ValueError(
                        f"{name} of {module} is used but would not be trained, for Pyro does not know it. Register the "
                        "network with pyro.module, under a name that no other model has taken (taken: "
                        f"{', '.join(sorted({key.split('$$$')[0] for key in pyro.get_param_store().keys()}))}); or freeze "
                        "it with requires_grad_(False)."
                    )
        buffers = {
            f"{i} {name}": buffer
            for i, module in enumerate(modules.values())
            for name, buffer in module.named_buffers(recurse=False)
        }
        inner = {id(child) for module in modules.values() for child in module.modules() if child is not module}
        self.roots = [module for key, module in modules.items() if key not in inner]
        self.modes = {module: module.training for root in self.roots for module in root.modules()}
        for root in self.roots:
            self.modes.update(dict.fromkeys(_learning(root, in_training=False), True))
        self.frozen = [p for m in modules.values() for p in m.parameters(recurse=False) if id(p) not in known]
        return params, buffers

    def _parameters_of_rows(self, batch: Arguments, size: int, num_data: int) -> list[str]:
        """Returns the names of the parameters whose elements belong to rows of a batch, whatever data are there.

        It scores the first datum where it is, and in the place of the second. Where none of the elements that have a part
        in the one has any in the other, they go with the place. What a network makes of a datum goes with the datum, and
        so does what is looked up for it.
        """
        sizes = (size, num_data)
        params = {name: p for name, p in self.params.items() if any(n and n % m == 0 for n in p.shape for m in sizes)}
        if size < 2 or not params:
            return []
        devices = cuda_devices([*tensors_of(batch.args, batch.kwargs), *params.values()])

        try:
            with evaluation_mode(), pyro.validation_enabled(False):
                with torch.random.fork_rng(devices):
                    here, drawn = self._parts_of_row(0, batch, size, params, poutine.Trace())
                for site in drawn.nodes.values():  # the draws for a datum go with it
                    for frame in site["cond_indep_stack"]:
                        if frame.vectorized:
                            dim, x = frame.dim - site["fn"].event_dim, site["value"]
                            if x.dim() >= -dim and x.shape[dim] == size:
                                site["value"] = x.roll(1, dim)
                args, kwargs = take_rows(torch.arange(size).roll(1), *settled(batch.args, batch.kwargs)[:2])
                with torch.random.fork_rng(devices):
                    there, _ = self._parts_of_row(1, Arguments(*args, **kwargs), size, params, drawn)
        except Exception:  # rows that cannot change places, such as sequences in the order of their lengths
            return []
        return [
            name.split(" ", 1)[1]
            for name, a, b in zip(params, here, there, strict=True)
            if bool(a.any()) and bool(b.any()) and not bool((a & b).any())
        ]

    def _parts_of_row(
        self, row: int, batch: Arguments, size: int, params: dict[str, Tensor], drawn: poutine.Trace
    ) -> tuple:
        """Returns which elements of parameters have a part in one row, and what was drawn.

        Args:
            row: the row of the batch.
            batch: the batch.
            size: how many rows it has.
            params: the parameters.
            drawn: draws to take instead of new ones.
        """
        with torch.enable_grad():
            guide = traced(self.guide, drawn, *batch.args, **batch.kwargs)
            with poutine.replay(trace=drawn):
                sites = sample_sites(guide), sample_sites(traced(self.model, guide, *batch.args, **batch.kwargs))
            observed = [site for site in sites[1].values() if site["is_observed"]]
            plates = [
                {f.name for f in site["cond_indep_stack"] if f.vectorized and f.size == size} for site in observed
            ]
            plates = set.intersection(*plates) if plates else set()
            total = torch.zeros(())
            for site in [*sites[0].values(), *sites[1].values()] if len(plates) == 1 else []:
                for frame in site["cond_indep_stack"]:
                    value = site["value"]
                    drawn_here = (
                        value.flatten(value.dim() - site["fn"].event_dim).sum(-1) if site["fn"].event_dim else value
                    )
                    for x in (site["fn"].log_prob(value), drawn_here) if frame.name in plates else ():
                        if x.requires_grad and x.dim() >= -frame.dim and x.shape[frame.dim] == size:
                            total = total + x.select(frame.dim, row).sum()
            if total.requires_grad:
                found = torch.autograd.grad(total, list(params.values()), allow_unused=True, materialize_grads=True)
            else:
                found = [torch.zeros_like(p) for p in params.values()]
        kept = poutine.Trace()
        for name, site in (sites[1] | sites[0]).items():
            # A point is computed anew from what it is made of, and with it what automatic guides draw for all points at once.
            if not (
                site["is_observed"] or site["infer"].get("is_auxiliary") or isinstance(unwrapped(site["fn"]), Delta)
            ):
                kept.add_node(name, **{**site, "value": site["value"].detach()})
        return [gradient != 0 for gradient in found], kept

    def align(self) -> None:
        """Gives all processes the state of the first."""
        self.world.broadcast_state([*self.trained, *self.frozen, *self.buffers.values()])

    @contextmanager
    def modes_put_back(self) -> Iterator[None]:
        """Puts back the modes of modules that training uses, training or evaluation, when it ends or fails."""
        before = {module: module.training for root in self.roots for module in root.modules()}
        try:
            yield
        finally:
            for module, mode in before.items():
                module.training = mode

    def start_epoch(self) -> None:
        for module, mode in self.modes.items():
            if module.training is not mode:  # at the start, or since a callback changed it
                module.training = mode
        self.num_known = len(pyro.get_param_store())  # callbacks may have made parameters of their own
        self.align()  # a callback, which the first process calls, may have changed anything
        self.had: list[bool] = []
        if self.totals is not None:
            self.totals.zero_()
            self.fine.fill_(True)

    def step(self, batch: Arguments, shard: Shard, epoch: int) -> None:
        """Takes one step on a batch, of which this process has a shard, and adds the loss of its data to the totals."""
        self.num_steps += 1
        args, kwargs = shard.rows(batch.args, batch.kwargs)
        noise = torch.get_rng_state()
        self.latest = args, kwargs, noise, self._places(shard), f"at step {self.num_steps} (epoch {epoch})"
        size = self.data_size or shard.count
        scale = shard.weight / size  # of the loss, for what these data count in the mean over their batch
        try:
            if not self._compiled_step(args, kwargs, shard, scale, size):
                self.optimizer.zero_grad()
                named, inside = self._loss_and_grads(args, kwargs, shard, scale)
                numbers = torch.stack([*named.values()]).double()
                fine = numbers[0].isfinite() & inside if self.has_loss else inside
                self._update([*named], numbers, fine, shard, size)
        except ValueError as error:
            self._explain(error)
        if self.totals.is_cuda and self.num_steps % _ASK_EVERY == 0:
            self._require_fine()
        torch.clear_autocast_cache()  # holds the weights as they were before, where autocast is on outside
        if len(pyro.get_param_store()) != self.num_known:
            raise ValueError(
                f"model or guide made a new parameter at step {self.num_steps}, which the optimizer does not know: "
                f"{list(pyro.get_param_store().keys())[-1]!r}. Make all parameters in the first call."
            )

    def _places(self, shard: Shard) -> Tensor | int | None:
        """Returns the places of a share of a batch among all data, where they are known."""
        if self.rows is None or isinstance(self.rows, Tensor):
            return self.rows if self.rows is None else self.rows[shard.start :]
        return self.rows + shard.start

    def _compiled_step(self, args: tuple, kwargs: dict[str, Any], shard: Shard, scale: float, size: int) -> bool:
        """Takes a step by a compiled graph; returns whether there is one."""
        if self.compiled is None or not self.has_loss:
            return False

        def update(step: graphs.Step, state: Guards) -> None:
            self.optimizer.zero_grad()
            for p, gradient in zip(state.leaves, step.gradients, strict=True):
                p.grad = gradient
            names = ["loss"] if step.terms is None else [*step.terms.named]
            self._update(names, step.numbers, step.fine, shard, size)

        post_step = PostStep(update, self._told if self.recordable else None)
        return self.compiled.step(self.model, self.guide, args, kwargs, scale, shard, post_step) is not None

    def _told(self) -> list:
        """Returns what decides what a step of the optimizer launches on a GPU."""
        settings = [value for group in self.optimizer.param_groups for value in group.values()]
        # A tensor that is not on the GPU is read when it is recorded.
        numbers = [x.item() if isinstance(x, Tensor) and not x.is_cuda else x for x in settings]
        return [self, self.optimizer.state, *numbers]

    def _loss_and_grads(
        self, args: tuple, kwargs: dict[str, Any], shard: Shard, scale: float
    ) -> tuple[dict[str, Tensor], Tensor | bool]:
        """Computes the gradient of the loss times a scale.

        Returns:
            The loss and what it is made of, and whether the data are in the support.
        """
        with ObservedChecked(any(x.is_cuda for x in tensors_of(args, kwargs)), self.unvalidated) as data, shard.noise():
            if not hasattr(self.loss, "differentiable_loss"):
                loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
                # Wake-sleep gives the model's, then the guide's.
                named = {"loss": torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss, dtype=torch.double)}
                for p in self.trained:
                    if p.grad is not None:
                        p.grad *= scale
            elif isinstance(self.loss, Bound):
                terms = self.loss.terms(self.model, self.guide, *args, **kwargs)
                (terms.loss * scale).backward()
                named = terms.named
            else:
                loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
                (loss * scale).backward()
                named = {"loss": loss.detach()}
        return named, data.inside()

    def _update(self, names: list[str], numbers: Tensor, fine: Tensor, shard: Shard, size: int) -> None:
        """Adds a loss and what it is made of to the totals, and takes a step of the optimizer with the gradients there are."""
        if self.totals is None:  # kept in place, for what is recorded on a GPU
            self.names, self.totals, self.fine = names, torch.zeros_like(numbers), torch.ones_like(fine)
        self.totals.add_(numbers, alpha=shard.weight * shard.total / size)
        self.fine.logical_and_(fine)
        # To ask a GPU for a number is to wait until it has done all before: seldom, then.
        if not numbers.is_cuda:
            self._require_fine()
        if self.world.size > 1:
            self._add_up_gradients(seldom=numbers.is_cuda)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()

    def _add_up_gradients(self, seldom: bool) -> None:
        """Adds up what the processes have for each parameter; one that none has a gradient for is left without."""
        has = torch.tensor([float(p.grad is not None) for p in self.trained], device=self.trained[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        *gradients, has = self.world.all_reduce([*gradients, has])
        if not seldom or not self.had or self.num_steps % _ASK_EVERY == 0:
            self.had = (has > 0).tolist()
        for p, gradient, had in zip(self.trained, gradients, self.had, strict=True):
            p.grad = gradient if had else None

    def _require_fine(self) -> None:
        """Raises if, since the epoch began, a loss was not finite or data were outside of their support."""
        if not bool(self.fine):
            self._explain(FloatingPointError("it became NaN or infinite"))

    def means(self, count: float) -> dict[str, float]:
        """Returns the loss of an epoch per datum, and what it is made of."""
        self._require_fine()
        (totals,) = self.world.all_reduce([self.totals])
        return dict(zip(self.names, (totals / count).tolist(), strict=True))

    def _explain(self, error: Exception) -> NoReturn:
        """Raises an error that names the cause of a failed loss if running it again shows one, else the error itself."""
        args, kwargs, noise, rows, where = self.latest
        torch.set_rng_state(noise)
        self._require_finite_state(where)
        with torch.no_grad(), pyro.validation_enabled(False), placed(rows):
            guide = traced(self.guide, None, *args, **kwargs)
            model = traced(self.model, latents_of_trace(guide), *args, **kwargs)
            check_all_observed(model, self.unvalidated)
        for part, trace in (("guide", guide), ("model", model)):
            for name, site in sample_sites(trace).items():
                log_prob = site["fn"].log_prob(site["value"])
                for what, x in (("value", site["value"]), ("log-probability", log_prob)):
                    if not bool(torch.isfinite(x).all()):
                        bad = x[~torch.isfinite(x)][0].item()
                        raise _not_finite(where, f'the {what} of site "{name}" in the {part} is {bad}') from error
        if isinstance(error, FloatingPointError):
            raise _not_finite(where, str(error)) from None
        raise error

    def _require_finite_state(self, where: str) -> None:
        for name, p in self.params.items():
            if not bool(torch.isfinite(p).all()):
                raise _not_finite(where, f"parameter {name.split(' ', 1)[1]!r} is no longer finite")

    @torch.no_grad()
    def validate(self, batches: Iterable, epoch: int) -> float:
        """Returns the validation loss per datum, with the same noise each time so that epochs can be compared."""
        total, count = 0.0, 0
        devices = cuda_devices(self.trained)
        with evaluation_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            for batch in batches:
                batch = self.prepare("validation", batch, check=not isinstance(batches, Batches))
                shard = self.world.shard(count_data(batch.args, batch.kwargs))
                args, kwargs = shard.rows(batch.args, batch.kwargs)
                self.rows = getattr(batches, "rows", None)
                self.latest = (
                    args,
                    kwargs,
                    torch.get_rng_state(),
                    self._places(shard),
                    f"on validation data after epoch {epoch}",
                )
                try:
                    with ObservedChecked(without=self.unvalidated), shard.noise():
                        value = self.loss.loss(self.model, self.guide, *args, **kwargs) / (
                            self.data_size or shard.count
                        )
                    if not math.isfinite(value):
                        raise FloatingPointError(f"it became {value}")
                except (ValueError, FloatingPointError) as error:
                    self._explain(error)
                total, count = total + value * shard.weight * shard.total, count + shard.total
        if count == 0:
            raise ValueError(
                "validation gave no batch. Give at least one datum, and a DataLoader that does not drop it."
            )
        (total,) = self.world.all_reduce([torch.tensor(total, dtype=torch.double, device=self.trained[0].device)])
        return total.item() / count

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Steps the schedule; raises if the last step spoilt a parameter, before anything is saved."""
        self._require_finite_state(f"in epoch {record['epoch']}")
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(record.get("validation", record["loss"]))
        elif self.scheduler is not None:
            self.scheduler.step()

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Returns copies of all parameters and buffers."""
        groups = {"params": self.params, "buffers": self.buffers}
        return {group: {k: t.detach().clone() for k, t in tensors.items()} for group, tensors in groups.items()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        """Puts copies back, after checking that they are of the same model."""
        for group, tensors in (("params", self.params), ("buffers", self.buffers)):
            ours = {k: tuple(t.shape) for k, t in tensors.items()}
            theirs = {k: tuple(t.shape) for k, t in snapshot[group].items()}
            if ours != theirs:
                differing = sorted(ours.items() ^ theirs.items())[0][0]
                raise ValueError(
                    f"The checkpoint was written for another model: {differing.split(' ', 1)[1]!r} has shape "
                    f"{theirs.get(differing)} in it, {ours.get(differing)} here. Resume with the same model and guide."
                )
        for k, t in (self.params | self.buffers).items():
            t.copy_((snapshot["params"] | snapshot["buffers"])[k])

    def state(self) -> dict[str, Any]:
        """Returns all that a later process needs to go on."""
        return {
            **self.snapshot(),
            "kinds": self._kinds(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, Bound) else {},
            "graphs": {"calls": []} if self.compiled is None else self.compiled.graphs.state_dict(),
            "num_steps": self.num_steps,
        }

    def _kinds(self) -> dict[str, str | None]:
        scheduler = None if self.scheduler is None else type(self.scheduler).__name__
        loss = repr(self.loss) if isinstance(self.loss, Bound) else type(self.loss).__name__
        return {"optimizer": type(self.optimizer).__name__, "scheduler": scheduler, "loss": loss}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, kind in self._kinds().items():
            if state["kinds"].get(name, kind) != kind:
                raise ValueError(
                    f"{name} is {kind}, but the checkpoint was written with {state['kinds'][name]}. Resume with the same."
                )
        self.restore(state)
        for ours, theirs in zip(self.optimizer.param_groups, state["optimizer"]["param_groups"], strict=False):
            if "capturable" in ours:  # a setting of the device, which may be another now
                theirs["capturable"] = ours["capturable"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if isinstance(self.loss, Bound) and "loss" in state:  # not in a checkpoint of pyrovae 0.1
            self.loss.load_state_dict(state["loss"])
        if self.compiled is not None and "graphs" in state:  # not in a checkpoint of pyrovae 0.1
            self.compiled.graphs.load_state_dict(state["graphs"])
        self.num_steps = state["num_steps"]


def _learning(module: nn.Module, in_training: bool) -> Iterator[nn.Module]:
    """Yields a module and those in it that are to be in training mode: all but what is frozen in evaluation mode.

    Args:
        module: the module.
        in_training: whether the one that it is in is in training mode.
    """
    children, params = list(module.children()), list(module.parameters())
    frozen = bool(params) and not any(p.requires_grad for p in params)
    if not module.training and (frozen or in_training and not children):
        return
    yield module
    for child in children:
        yield from _learning(child, module.training)


def _is_true(x: Any) -> bool:
    """Returns whether what a callback returned is true, and no other thing that only counts as such."""
    is_bool = isinstance(x, (bool, np.bool_)) or isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 0
    return is_bool and bool(x)


def _built(optimizer: Callable | Optimizer, params: list[Tensor]) -> Optimizer:
    built = optimizer
    if callable(optimizer) and not isinstance(optimizer, (Optimizer, PyroOptim)):
        built = optimizer(params)
    if not isinstance(built, Optimizer) or isinstance(built, torch.optim.LBFGS):  # which asks for losses of its own
        raise TypeError(
            "optimizer must be one of torch's other than LBFGS, or make one when called with the parameters, such as "
            f"functools.partial(torch.optim.Adam, lr=1e-3); got {optimizer!r}."
        )
    return built


def _make_recordable(optimizer: Optimizer) -> bool:
    """Has an optimizer keep its counters on the GPU; returns whether it then launches the same at each step."""
    on_gpu = all(p.is_cuda for group in optimizer.param_groups for p in group["params"])
    if not on_gpu or not type(optimizer).__module__.startswith("torch.optim."):
        return False
    if not isinstance(optimizer, torch.optim.SGD):
        if any("capturable" not in group for group in optimizer.param_groups):
            return False
        for group in optimizer.param_groups:
            group["capturable"] = True
        for p, kept in optimizer.state.items():
            kept.update({name: x.to(p.device) for name, x in kept.items() if isinstance(x, Tensor) and x.dim() == 0})
        optimizer._warned_capturable_if_run_uncaptured = True  # its first steps are, on purpose
    return True


def _warn_of_schedules(loss: ELBO, steps: int | None, epochs: int, patience: int | None) -> None:
    """Warns if training ends, or may be stopped, before the schedules of a loss have."""
    span = math.ceil(loss.span / steps) if isinstance(loss, Bound) and steps else 0
    for name, value in (("epochs", epochs), ("patience", patience)):
        if value is not None and value < span:
            warnings.warn(
                f"the schedule of {type(loss).__name__} takes {loss.span} steps, which are {span} epochs of this data, but "
                f"{name}={value}. Make the schedule shorter, or {name} larger.",
                stacklevel=3,
            )


def _warn_of_rows(names: list[str], batch_size: int, num_batches: int) -> None:
    """Warns of parameters that belong to rows of the data; raises a ValueError if these come in several batches."""
    which = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if num_batches > 1:
        raise ValueError(
            f"parameters {which} belong to the {batch_size} rows of a batch, but these hold other data at every step. Take "
            "all data at once, batch_size=len(data); or infer latents by a network of the data, an encoder; or make "
            "parameters for all data, and take those of a batch by row numbers that come with it, data=(x, "
            "torch.arange(len(x)))."
        )
    warnings.warn(f"parameters {which} belong to rows of the data, which are therefore not shuffled.", stacklevel=3)


def _not_finite(where: str, cause: str) -> FloatingPointError:
    return FloatingPointError(
        f"The loss stopped being finite {where}: {cause}. The last checkpoint, if any, is kept. Start anew with a lower "
        "learning rate, or bound the gradient with clip_norm."
    )


def _out_of_patience(history: History, patience: int | None) -> bool:
    best = history.best_epoch
    return patience is not None and best is not None and len(history) - best >= patience


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if not isinstance(value, float) else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


def _length(batches: Iterable) -> int | None:
    try:
        return len(batches)
    except TypeError:  # an iterable data set has no length
        return None


def _generators(batches: Iterable) -> Iterator[torch.Generator]:
    """The random generators that a loader has of its own, beside torch's global one."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    for holder in (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def _random_state(batches: Iterable) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(batches)],
    }


def _set_random_state(state: dict[str, Any], batches: Iterable) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    for generator, saved in zip(_generators(batches), state["loader"], strict=True):
        generator.set_state(saved)
