"""The steps of training: loss, gradient and optimizer; validation; the cause of a loss that is not finite."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import pyro
import torch
from pyro.infer import ELBO, JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyrovae.arguments import (
    Arguments,
    as_arguments,
    as_tensors,
    count_data,
    cuda_devices,
    in_layout_of,
    row_positions,
    tensors_of,
    to_device,
)
from pyrovae.bounds import Bound
from pyrovae.compilation import api as graphs
from pyrovae.compilation.cudagraph import PostStep
from pyrovae.compilation.guards import Guards, Snapshot
from pyrovae.data.batches import Batches
from pyrovae.distributed import GradientSum, Shard, World
from pyrovae.inference.messages import ObservedChecked, check_all_observed, warn
from pyrovae.inference.missing import check_batch
from pyrovae.inference.running import evaluation_mode, isolated, traced
from pyrovae.inference.sites import SharedSitesScaled, latents_of_trace, sample_sites
from pyrovae.inference.structure import inspect
from pyrovae.rows import NumberType
from pyrovae.training.averaging import Average
from pyrovae.training.rows import check_rows_are_data, check_scales, find_dependent_site, parameters_of_rows
from pyrovae.training.schedules import make_schedule
from pyrovae.training.state import ModelState, display_name, find_state

# Steps on a GPU between checks of values on it, because every check waits for the GPU.
_CHECK_EVERY = 50
_JIT = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)
# Arguments of a run that earlier versions did not have, and so did not write to checkpoints.
_DEFAULTS = {"schedule_every_step": False, "ema_decay": None, "micro_batch_size": None, "precision": None}


class _LossCall(NamedTuple):
    """A call of the loss, kept to repeat it when it fails.

    Args:
        args: positional arguments of model and guide.
        kwargs: keyword arguments of model and guide.
        rng_state: torch's random state before the call.
        rows: the places of the batch in all data, where they are known: of each row, or of the first of a range.
        where: the step or epoch, for messages.
    """

    args: tuple
    kwargs: dict[str, Any]
    rng_state: Tensor
    rows: Tensor | int | None
    where: str


class _MicroBatch(NamedTuple):
    """This process's shard of a part of a batch.

    Args:
        batch: arguments of model and guide, for the data of the shard.
        start: the place of its first datum in the batch.
        shard: which data of the part these are.
        weight: of the mean over the part in the mean over the batch.
    """

    batch: Arguments
    start: int
    shard: Shard
    weight: float


class Trainer:
    """Takes the steps of one training run, and holds all that they change.

    The parameters are found by running model and guide once, on the first batch.

    Args:
        world: this process among those that train together.
        model: a Pyro model.
        guide: a Pyro guide.
        loss: an ELBO, or what :func:`pyrovae.compile` makes of one.
        first_batch: the first batch, as the data give it.
        num_data: the number of data that are cut into batches here, 0 if a loader cuts them. `row_parameters` holds the
            names of the parameters that prevent it.
        optimizer: a torch optimizer, or called with the parameters to make one.
        scheduler: called with the optimizer to make a learning-rate schedule.
        schedule_every_step: step the schedule after every step, not after every epoch.
        schedule_length: how often the schedule steps in the run, None where that is not known.
        ema_decay: decay of the average of the weights, None for none.
        transform: called with the arguments of every batch, its result used instead.
        clip_norm: the largest norm of the gradient.
        micro_batch_size: the largest number of data that model and guide run on at once, None for a whole batch.
        precision: "bf16" for matrix products in it, None for the type of the parameters.
        device: where to move each batch.
        numbers: the type of the numbers that model and guide take.
    """

    def __init__(
        self,
        world: World,
        model: Callable,
        guide: Callable,
        loss: ELBO,
        first_batch: Any,
        num_data: int,
        optimizer: Callable | Optimizer,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        schedule_every_step: bool,
        schedule_length: int | None,
        ema_decay: float | None,
        transform: Callable | None,
        clip_norm: float | None,
        micro_batch_size: int | None,
        precision: str | None,
        device: torch.device | str | None,
        numbers: NumberType,
    ):
        self.world, self.model, self.guide = world, model, guide
        self.transform, self.clip_norm, self.device, self.numbers = transform, clip_norm, device, numbers
        self.micro_batch_size, self.precision = micro_batch_size, precision
        self.compiled = loss if isinstance(loss, graphs.Compiled) else None
        # Pyro's base class of the ELBOs does not declare their methods, and not all have the same.
        self.loss: Any = loss if self.compiled is None else self.compiled.elbo
        if isinstance(self.loss, Bound):
            self.loss.load_state_dict({"steps": 0})  # schedules start with the run

        if isinstance(self.loss, _JIT) and (world.size > 1 or micro_batch_size is not None):
            raise ValueError(
                f"{type(self.loss).__name__} is traced once, for a whole batch, but several processes and "
                "micro_batch_size cut batches into parts. Give Trace_ELBO() or one of pyrovae.bounds, which fit traces "
                "itself."
            )
        batch = self.prepare("data", first_batch, check=True)
        total = count_data(batch.args, batch.kwargs)
        # Runs of model and guide before the first step are no steps: they change nothing.
        before = Snapshot((model, guide))
        whole, batch = batch, _part_of(batch, total, 0, self._parts(total)[0].count)
        are_cut = world.size > 1 or micro_batch_size is not None or total < num_data
        total = count_data(batch.args, batch.kwargs)
        structure = inspect(model, guide, *batch.args, **batch.kwargs)
        shard = world.shard(total)
        args, kwargs = shard.rows(batch.args, batch.kwargs)
        if shard.count < total:
            try:
                structure = inspect(model, guide, *args, **kwargs)
            except ValueError as error:
                raise ValueError(
                    f"model and guide run on a batch of {total} data, but not on the {shard.count} of them that this "
                    "process takes. If their parameters belong to rows of the data, as those of AutoNormal, or the "
                    f"size of a plate is a fixed number, train in one process. The cause: {error}"
                ) from error
        if structure.data is None and (world.size > 1 or micro_batch_size is not None):
            where = "in several processes" if micro_batch_size is None else "with micro_batch_size"
            raise ValueError(
                f"a batch is cut into parts {where}, but no plate of the model holds the data along a dimension: what "
                'belongs to all parts together is not known. Put the data into pyro.plate("data", len(x)), or train '
                "without parts."
            )
        self.plate = structure.data
        if world.size > 1 or micro_batch_size is not None:
            check_scales(model, guide, whole, Arguments(*args, **kwargs))
        if total > 1 and are_cut:
            check_rows_are_data(model, guide, structure, args, kwargs)
            dependent = find_dependent_site(model, guide, structure, args, kwargs)
            if dependent is not None:
                warn(
                    f'the log-probability at site "{dependent}" is that of a batch as a whole, and not of its rows. If '
                    "the rows are steps of one series, train on all at once, batch_size=len(x). If the model takes "
                    "means over a batch, its scores are undefined, and log_marginal refuses it."
                )
        for name in structure.out_of_support:
            warn(
                f'data at site "{name}" are outside the support of its distribution, which was built with '
                "validate_args=False: the loss is not that of a probability of these data, and log_marginal will "
                "refuse them."
            )
        apart = structure.masked_apart | structure.masked_inside
        if apart and not isinstance(self.loss, Bound):
            warn(
                f'site "{min(apart)}" is masked in the model and not in the guide, or otherwise: what '
                f"the model hides counts in q alone, and {type(self.loss).__name__} is no bound on log p(x). Mask it "
                "alike in the guide, by poutine.mask, or train with bounds.ELBO, which does."
            )
        self.unvalidated = structure.unvalidated
        if self.compiled is not None:
            self.compiled.unvalidated = structure.unvalidated
        # A subsampled plate scales the loss up to all data that it stands for.
        self.data_size = structure.data_size if structure.data_size != shard.count else None

        # Looked for on the whole batch, because a shard may not use all of them: processes must find the same ones.
        self.state = find_state(self.loss, model, guide, batch.args, batch.kwargs)
        names = [display_name(key) for key in self.state.params]
        if any(other != names for other in world.all_gather(names)):
            raise ValueError(
                f"the first batch uses other parameters in another process than the {len(names)} that it uses here, "
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}. Give all processes the same data, and call "
                "pyro.param or pyro.module in every call of model and guide."
            )
        if precision is not None:
            self._check_precision(args, kwargs)
        self.row_parameters: list[str] = []
        if num_data:
            keys = parameters_of_rows(model, guide, self.state.params, batch, total, num_data)
            self.row_parameters = list(map(display_name, keys))
        before.restore()
        self.optimizer = _make_optimizer(optimizer, self.state)
        self.scheduler = None if scheduler is None else make_schedule(scheduler, self.optimizer, schedule_length)
        self.every_step = schedule_every_step
        if self.every_step and (self.scheduler is None or isinstance(self.scheduler, ReduceLROnPlateau)):
            given = "none" if self.scheduler is None else "ReduceLROnPlateau, which follows the loss of epochs"
            raise ValueError(
                f"schedule_every_step=True needs a scheduler that counts steps, got {given}. Leave it out."
            )
        # A learning rate that differs from step to step is a constant of a CUDA graph.
        one_call = world.size == 1 and micro_batch_size is None and not self.every_step
        self.recordable = one_call and _make_recordable(self.optimizer)
        self.ema_decay = ema_decay
        self.average = None if ema_decay is None else Average(self.state, ema_decay)

        self.has_same_data = False  # whether data in memory were compared with those of the other processes
        self.gradient_sum = None if world.size == 1 else GradientSum(self.state.trained)
        self.user_code_ran = True  # since the latest step, and may have changed what graphs depend on
        self.num_steps = 0
        self.latest_call = _LossCall(args, kwargs, torch.get_rng_state(), None, "on the first batch")
        # The sums over an epoch of the loss and its parts, by the names of these: a loop over time may have fewer sites
        # in some batches than in others. They are changed in place, because a CUDA graph adds to them.
        self.totals: dict[tuple[str, ...], Tensor] = {}
        self.is_valid = torch.tensor(True)  # whether all losses were finite, and all data in their support
        self.has_gradient: list[bool] = []  # for each parameter, whether any process has a gradient for it
        self.num_pyro_params = 0  # in Pyro's parameter store
        # Parameters there that the first batch did not use: name, value, gradient and the version of that.
        self.strays: list[tuple[str, Tensor, Tensor | None, int]] = []
        self.synchronize()

    def _check_precision(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises a ValueError if more than products of networks would be in bf16, or parameters are not of float32."""
        for key, p in self.state.params.items():
            if p.dtype != torch.float32:
                raise ValueError(
                    f"precision={self.precision!r} is for parameters of float32, but {display_name(key)!r} is "
                    f"{str(p.dtype).removeprefix('torch.')}. Leave precision out."
                )
        with isolated([*tensors_of(args, kwargs), *self.state.trained]), self._autocast():
            guide = traced(self.guide, None, *args, **kwargs)
            model = traced(self.model, latents_of_trace(guide), *args, **kwargs)
        for part, trace in (("guide", guide), ("model", model)):
            for name, site in sample_sites(trace).items():
                if site["fn"].log_prob(site["value"]).dtype in (torch.bfloat16, torch.float16):
                    raise ValueError(
                        f'precision={self.precision!r}: site "{name}" in the {part} has a distribution whose '
                        "parameters are in half precision. Cast what a network returns, network(x).float(), or leave "
                        "precision out."
                    )

    def synchronize(self) -> None:
        """Gives all processes the weights, buffers and random state of rank 0."""
        self.world.broadcast_state(self.state.tensors())

    def prepare(self, name: str, batch: Any, check: bool) -> Arguments:
        """Returns a batch as arguments of model and guide: on the device, transformed; converted and checked first."""
        batch = as_arguments(batch)
        args, kwargs = as_tensors(batch.args, batch.kwargs, self.numbers if check else None)
        if check:
            check_batch(self.model, self.guide, args, kwargs, self.transform, name)
        if self.device is not None:
            args, kwargs = to_device(args, kwargs, self.device)
        if self.transform is None:
            return Arguments(*args, **kwargs)
        return as_arguments(self.transform(*args, **kwargs))

    def train_epoch(
        self, batches: Iterable, epoch: int, after_step: Callable[[], Any], is_quiet: bool = False
    ) -> dict[str, float]:
        """Takes a step on every batch; returns the mean loss per datum and its parts.

        Before and after it, the weights are the averaged ones if there is an average.

        Args:
            batches: the batches.
            epoch: the number of the epoch, from 1.
            after_step: called after every step.
            is_quiet: whether `after_step` runs no code of a user.
        """
        # A loader, a transform, a schedule and an optimizer may run code of a user too.
        is_quiet = is_quiet and isinstance(batches, Batches) and self.transform is None and not self.every_step
        hooks = (self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks)
        is_quiet = is_quiet and _is_torchs(self.optimizer) and not any(hooks)
        self.state.set_modes()
        self.num_pyro_params = len(pyro.get_param_store())  # callbacks may have made parameters of their own
        held = {id(p) for p in self.state.params.values()}
        self.strays = [
            (key.split("$$$")[-1], p, p.grad, 0 if p.grad is None else p.grad._version)
            for key, p in pyro.get_param_store()._params.items()
            if p.requires_grad and id(p) not in held
        ]
        self.synchronize()  # callbacks run on rank 0 only, and may have changed anything
        if self.average is not None:
            self.average.swap()
        self.has_gradient = []
        for totals in self.totals.values():
            totals.zero_()
        self.is_valid.fill_(True)
        count = 0.0
        # Pyro's validation takes a tenth of the time of a step. The first batch has passed it. What may change later is
        # checked in every step: the data at each observed site, and whether the loss is finite.
        with pyro.validation_enabled(False), self._autocast():
            for micro_batches in self._micro_batches(batches):
                self.user_code_ran = not is_quiet or count == 0  # callbacks ran before the first step
                count += self.step(micro_batches, getattr(batches, "rows", None), epoch)
                after_step()
        if count == 0:
            raise ValueError(
                f"data gave no batch in epoch {epoch}. Give a data set that can be iterated again in every epoch."
            )
        self._check_valid()
        means = {name: total / count for name, total in self._sums().items()}
        # Buffers such as the statistics of batch norm are of the data of each process: all take those of rank 0.
        self.synchronize()
        if self.average is not None:
            self.average.swap()
            self.synchronize()
        return means

    def step(self, micro_batches: list["_MicroBatch"], rows: Tensor | int | None, epoch: int) -> int:
        """Takes an optimizer step on this process's shard of a batch; returns the number of data in the batch.

        Args:
            micro_batches: the parts of the batch that model and guide run on at once.
            rows: the places of the batch in all data, where they are known: of each row, or of the first of a range.
            epoch: the number of the epoch, for messages.
        """
        self.num_steps += 1
        where = f"at step {self.num_steps} (epoch {epoch})"
        schedules_at = self.loss.steps if isinstance(self.loss, Bound) else 0
        sums: list[Tensor | None] = [None] * len(self.state.trained)  # of gradients, over micro-batches
        for micro in micro_batches:
            if isinstance(self.loss, Bound):
                self.loss.steps = schedules_at
            self._micro_step(micro, rows, where, is_whole=len(micro_batches) == 1)
            if len(micro_batches) > 1:
                for i, (p, total) in enumerate(zip(self.state.trained, sums, strict=True)):
                    if p.grad is not None:
                        sums[i] = p.grad.clone() if total is None else total.add_(p.grad)
        if len(micro_batches) > 1:
            for p, gradient in zip(self.state.trained, sums, strict=True):
                p.grad = gradient
            self._update()
        if self.average is not None and self.num_steps == 1:
            self.average.start()
        if self.every_step:
            self._step_schedule()
        if self.is_valid.is_cuda and self.num_steps % _CHECK_EVERY == 0:
            self._check_valid()
        torch.clear_autocast_cache()  # it holds the weights of before the step, under an autocast of the caller
        for name, p, gradient, version in self.strays:
            if p.grad is not None and (p.grad is not gradient or p.grad._version != version):
                raise ValueError(
                    f"parameter {name!r} has a gradient at step {self.num_steps}, but the first batch did not use it, "
                    "so that the optimizer does not hold it. Call pyro.param or pyro.module for it in every call of "
                    "model or guide."
                )
        if len(pyro.get_param_store()) != self.num_pyro_params:
            raise ValueError(
                f"model or guide made a new parameter at step {self.num_steps}, which the optimizer does not hold: "
                f"{list(pyro.get_param_store().keys())[-1]!r}. Make all parameters in the first call."
            )
        return sum(micro.shard.total for micro in micro_batches)

    def _parts(self, total: int) -> list[Shard]:
        """Returns the parts of a batch that model and guide run on at once, of sizes that differ by one at most."""
        count = 1 if self.micro_batch_size is None else -(-total // self.micro_batch_size)
        bounds = [i * total // count for i in range(count + 1)]
        return [Shard(start, end - start, total, (end - start) / total) for start, end in pairwise(bounds)]

    def _micro_batches(self, batches: Iterable) -> Iterator[list["_MicroBatch"]]:
        """Yields the micro-batches of each batch, and checks that all processes have the same data."""

        def cut(total: int, take: Callable[[int, int], Arguments]) -> list[_MicroBatch]:
            micro_batches = []
            for part in self._parts(total):
                shard = self.world.shard(part.count)
                start = part.start + shard.start
                micro_batches.append(_MicroBatch(take(start, shard.count), start, shard, part.weight))
            return micro_batches

        # A process takes its shard alone of data in memory; a loader gives whole batches, and a transform may need one.
        if isinstance(batches, Batches) and self.transform is None and self.world.size > 1:
            if not self.has_same_data:
                self.world.check_same_batch(next(iter(batches.in_order())))
                self.has_same_data = True

            def cut_indices(indices: range | Tensor) -> list[_MicroBatch]:
                return cut(len(indices), lambda start, count: batches.take(indices[start : start + count]))

            for taken in batches.each(cut_indices):
                yield [micro._replace(batch=self.prepare("data", micro.batch, check=False)) for micro in taken]
            return
        for i, given in enumerate(batches):
            if i == 0:
                self.world.check_same_batch(given)
            batch = self.prepare("data", given, check=not isinstance(batches, Batches))
            total = count_data(batch.args, batch.kwargs)
            yield cut(total, partial(_part_of, batch, total))

    def _micro_step(self, micro: "_MicroBatch", rows: Tensor | int | None, where: str, is_whole: bool) -> None:
        """Computes the gradient of a micro-batch; if it is the whole batch, takes a step of the optimizer too."""
        args, kwargs, shard = micro.batch.args, micro.batch.kwargs, micro.shard
        self._keep_call(args, kwargs, rows, micro.start, where)
        size = self.data_size or shard.count
        scale = micro.weight * shard.weight / size  # of the loss of the shard in the mean over the batch
        compiled = self.compiled if self.state.has_loss else None
        try:
            with self._shared_scaled(micro.weight * shard.count / shard.total):
                if compiled is None or not self._compiled_step(compiled, args, kwargs, shard, scale, size, is_whole):
                    self.optimizer.zero_grad()
                    parts, is_inside = self._loss_and_grads(args, kwargs, shard, scale, is_whole)
                    values = torch.stack([*parts.values()]).double()
                    is_valid = values[0].isfinite() & is_inside if self.state.has_loss else is_inside
                    self._add_to_totals([*parts], values, is_valid, shard, size)
                    if is_whole:
                        self._update()
        except ValueError as error:
            self._explain(error)

    def _shared_scaled(self, share: float) -> AbstractContextManager:
        """Returns the context in which what belongs to a batch as a whole counts for a share of it."""
        # A subsampled plate scales its part of the loss up, so that each part of a batch has an estimate of the whole.
        if share == 1 or self.plate is None or self.data_size is not None:
            return nullcontext()
        return SharedSitesScaled(self.plate, share)

    def _autocast(self) -> AbstractContextManager:
        """Returns the context in which model and guide run."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.state.trained[0].device.type, torch.bfloat16)

    def _keep_call(
        self, args: tuple, kwargs: dict[str, Any], rows: Tensor | int | None, start: int, where: str
    ) -> None:
        """Keeps a call of the loss for the case that it fails.

        `rows` are the places of a batch in all data, and `start` is the place of the first datum of the call among
        them.
        """
        if rows is not None:
            rows = rows[start:] if isinstance(rows, Tensor) else rows + start
        self.latest_call = _LossCall(args, kwargs, torch.get_rng_state(), rows, where)

    def _compiled_step(
        self,
        compiled: graphs.Compiled,
        args: tuple,
        kwargs: dict[str, Any],
        shard: Shard,
        scale: float,
        size: int,
        is_whole: bool,
    ) -> bool:
        """Does the same by a compiled graph; returns False if nothing was done, because there can be no graph."""

        def update(step: graphs.Step, state: Guards) -> None:
            for group in self.optimizer.param_groups:  # faster than zero_grad
                for p in group["params"]:
                    p.grad = None
            for p, gradient in zip(state.leaves, step.gradients, strict=True):
                p.grad = gradient
            names = ["loss"] if step.terms is None else [*step.terms.named]
            self._add_to_totals(names, step.numbers, step.fine, shard, size)
            if is_whole:
                self._update()

        on_gradient = self.gradient_sum.add if self.gradient_sum is not None and is_whole else None
        post_step = PostStep(update, self._launch_key if self.recordable else None, on_gradient)
        unchanged, self.user_code_ran = not self.user_code_ran, False
        return compiled.step(self.model, self.guide, args, kwargs, scale, shard, post_step, unchanged) is not None

    def _launch_key(self) -> list:
        """Returns what determines the kernels that a step of the optimizer launches on a GPU."""
        settings = [value for group in self.optimizer.param_groups for value in group.values()]
        # The value of a tensor on the CPU becomes a constant of a CUDA graph.
        values = [x.item() if isinstance(x, Tensor) and not x.is_cuda else x for x in settings]
        return [self, self.optimizer.state, *values]

    def _loss_and_grads(
        self, args: tuple, kwargs: dict[str, Any], shard: Shard, scale: float, is_whole: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the gradient of `scale` times the loss, which other processes may be sent if it is of a whole batch.

        Returns:
            The loss and its parts, and whether the data are in the support.
        """
        on_gpu = any(x.is_cuda for x in tensors_of(args, kwargs))
        with ObservedChecked(on_gpu, self.unvalidated) as data, shard.noise():
            if isinstance(self.loss, Bound):
                terms = self.loss.terms(self.model, self.guide, *args, **kwargs)
                self._backward(terms.loss * scale, is_whole)
                parts = terms.named
            elif hasattr(self.loss, "differentiable_loss"):
                loss = self.loss.differentiable_loss(self.model, self.guide, *args, **kwargs)
                self._backward(loss * scale, is_whole)
                parts = {"loss": loss.detach()}
            else:
                loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
                # Wake-sleep returns the loss of the model, then that of the guide.
                loss = loss[0] if isinstance(loss, tuple) else loss
                parts = {"loss": torch.as_tensor(loss, dtype=torch.double)}
                for p in self.state.trained:
                    if p.grad is not None:
                        p.grad *= scale
        return parts, data.inside()

    def _backward(self, loss: Tensor, is_whole: bool) -> None:
        """Computes the gradients of a loss, and sums those of a whole batch over the processes as they come."""
        hooks = []
        if self.gradient_sum is not None and is_whole:
            add = self.gradient_sum.add
            hooks = [p.register_post_accumulate_grad_hook(lambda p: add(p, p.grad)) for p in self.state.trained]
        loss.backward()
        for hook in hooks:
            hook.remove()

    def _add_to_totals(self, names: list[str], values: Tensor, is_valid: Tensor, shard: Shard, size: int) -> None:
        """Adds the loss and its parts to the sums of the epoch."""
        if not self.totals:
            self.is_valid = torch.ones_like(is_valid)
        key = tuple(names)
        if key not in self.totals:
            self.totals[key] = torch.zeros_like(values)
        self.totals[key].add_(values, alpha=shard.weight * shard.total / size)
        self.is_valid.logical_and_(is_valid)
        if not values.is_cuda:  # on a GPU this would wait for it
            self._check_valid()

    def _update(self) -> None:
        """Takes a step of the optimizer."""
        if self.gradient_sum is not None:
            self._add_gradients_of_all()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.state.trained, self.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    def _sums(self) -> dict[str, float]:
        """Returns the sums over an epoch and all processes, by name; those of sites that were in none are left out."""
        sums: dict[str, float] = {}
        of_process = {names: totals.tolist() for names, totals in self.totals.items()}
        for part in self.world.all_gather(of_process):
            for names, totals in part.items():
                for name, total in zip(names, totals, strict=True) if any(totals) or len(part) == 1 else ():
                    sums[name] = sums.get(name, 0.0) + total
        return sums

    def _add_gradients_of_all(self) -> None:
        """Sums the gradients over the processes. A parameter without a gradient in any of them stays without."""
        assert self.gradient_sum is not None
        params = self.state.trained
        for p in params:
            if p.grad is not None:
                self.gradient_sum.add(p, p.grad)
        gradients, has = self.gradient_sum.sums()
        # On a GPU, the first step of an epoch decides for the next ones: to read a value would wait for the GPU.
        if not self.is_valid.is_cuda or not self.has_gradient or self.num_steps % _CHECK_EVERY == 0:
            self.has_gradient = (has > 0).tolist()
        for p, gradient, has_gradient in zip(params, gradients, self.has_gradient, strict=True):
            p.grad = in_layout_of(p, gradient) if has_gradient else None

    @torch.no_grad()
    def validate(self, batches: Iterable, epoch: int) -> float:
        """Returns the validation loss per datum, with the same noise in every epoch so that epochs can be compared."""
        total, count = 0.0, 0
        devices = cuda_devices(self.state.trained)
        with evaluation_mode(), torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(0)
            for batch in batches:
                batch = self.prepare("validation", batch, check=not isinstance(batches, Batches))
                shard = self.world.shard(count_data(batch.args, batch.kwargs))
                args, kwargs = shard.rows(batch.args, batch.kwargs)
                where = f"on validation data after epoch {epoch}"
                self._keep_call(args, kwargs, getattr(batches, "rows", None), shard.start, where)
                try:
                    share = self._shared_scaled(shard.count / shard.total)
                    with ObservedChecked(without=self.unvalidated), shard.noise(), share:
                        loss = self.loss.loss(self.model, self.guide, *args, **kwargs)
                    loss = loss / (self.data_size or shard.count)
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"it became {loss}")
                except (ValueError, FloatingPointError) as error:
                    self._explain(error)
                total, count = total + loss * shard.weight * shard.total, count + shard.total
        if count == 0:
            raise ValueError(
                "validation gave no batch. Give at least one datum, and a DataLoader that does not drop it."
            )
        device = self.state.trained[0].device
        (sum_of_all,) = self.world.all_reduce([torch.tensor(total, dtype=torch.double, device=device)])
        return sum_of_all.item() / count

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Steps the schedule; raises if the last step made a parameter NaN or infinite, before it is saved."""
        self._check_parameters(f"in epoch {record['epoch']}")
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(record.get("validation", record["loss"]))
        elif not self.every_step:
            self._step_schedule()

    def _step_schedule(self) -> None:
        if self.scheduler is None:
            return
        try:
            self.scheduler.step()
        except ZeroDivisionError as error:
            raise ValueError(
                f"scheduler: {type(self.scheduler).__name__} divides by a number of epochs that is 0. Give it a "
                "positive one."
            ) from error

    def _check_valid(self) -> None:
        """Raises if a loss of this epoch was not finite, or data were outside of their support."""
        if not bool(self.is_valid):
            self._explain(FloatingPointError("it became NaN or infinite"))

    def _check_parameters(self, where: str) -> None:
        name = self.state.find_nonfinite()
        if name is not None:
            raise _not_finite(where, f"parameter {name!r} is no longer finite")

    def _explain(self, error: Exception) -> NoReturn:
        """Repeats the latest call of the loss, and raises an error that names the cause.

        Args:
            error: what was wrong with the loss, raised itself if no cause is found.
        """
        args, kwargs, rng_state, rows, where = self.latest_call
        torch.set_rng_state(rng_state)
        self._check_parameters(where)
        with torch.no_grad(), pyro.validation_enabled(False), row_positions(rows), self._autocast():
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

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that :meth:`load_state_dict` needs to resume the run, in another process too."""
        return {
            **self.state.snapshot(),
            "kinds": self._kinds(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, Bound) else {},
            "graphs": {"calls": []} if self.compiled is None else self.compiled.graphs.state_dict(),
            "num_steps": self.num_steps,
            "raw": None if self.average is None else self.average.kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; raises a ValueError if it is of another model or optimizer."""
        for argument, name in self._kinds().items():
            saved = state["kinds"].get(argument, _DEFAULTS.get(argument, name))
            if saved != name:
                raise ValueError(
                    f"{argument} is {name}, but the checkpoint was written with {saved}. Resume with the same "
                    f"{argument}."
                )
        self.state.restore(state)
        for ours, theirs in zip(self.optimizer.param_groups, state["optimizer"]["param_groups"], strict=False):
            if "capturable" in ours:  # it depends on the device, which may be another now
                theirs["capturable"] = ours["capturable"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if isinstance(self.loss, Bound) and "loss" in state:  # pyrovae 0.1 did not write it
            self.loss.load_state_dict(state["loss"])
        if self.compiled is not None and "graphs" in state:  # nor this
            self.compiled.graphs.load_state_dict(state["graphs"])
        if self.average is not None:
            self.average.load(state["raw"])
        self.num_steps = state["num_steps"]

    def _kinds(self) -> dict[str, Any]:
        """Returns the classes of the arguments whose state is of no use to another class, and the options of steps."""
        scheduler = None if self.scheduler is None else type(self.scheduler).__name__
        loss = repr(self.loss) if isinstance(self.loss, Bound) else type(self.loss).__name__
        classes = {"optimizer": type(self.optimizer).__name__, "scheduler": scheduler, "loss": loss}
        options = {"micro_batch_size": self.micro_batch_size, "precision": self.precision}
        return classes | {"schedule_every_step": self.every_step, "ema_decay": self.ema_decay} | options


def _make_optimizer(optimizer: Callable | Optimizer, state: ModelState) -> Optimizer:
    """Returns the optimizer, made from the parameters if needed; raises unless it is torch's and holds all of them."""
    made = optimizer
    if callable(optimizer) and not isinstance(optimizer, (Optimizer, PyroOptim)):
        made = optimizer(state.trained)
    # LBFGS calls the loss itself; SparseAdam takes sparse gradients alone.
    if not isinstance(made, Optimizer) or isinstance(made, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise TypeError(
            "optimizer must be one of torch's other than LBFGS and SparseAdam, or make one when called with the "
            f"parameters, such as functools.partial(torch.optim.Adam, lr=1e-3); got "
            f"{type(made).__name__ if isinstance(made, Optimizer) else repr(optimizer)}."
        )
    held = {id(p) for group in made.param_groups for p in group["params"]}
    missing = [display_name(key) for key, p in state.params.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"optimizer does not hold {len(missing)} of {len(state.params)} parameters, among them {missing[0]!r}. "
            "Pass a callable such as functools.partial(torch.optim.Adam, lr=1e-3) to train all of them, or freeze the "
            "others with requires_grad_(False)."
        )
    return made


def _part_of(batch: Arguments, total: int, start: int, count: int) -> Arguments:
    args, kwargs = Shard(start, count, total, 1.0).rows(batch.args, batch.kwargs)
    return Arguments(*args, **kwargs)


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _make_recordable(optimizer: Optimizer) -> bool:
    """Moves the counters of an optimizer to the GPU; returns whether a CUDA graph can then record its steps."""
    on_gpu = all(p.is_cuda for group in optimizer.param_groups for p in group["params"])
    if not on_gpu or not _is_torchs(optimizer):
        return False
    if not isinstance(optimizer, torch.optim.SGD):
        if any("capturable" not in group for group in optimizer.param_groups):
            return False
        for group in optimizer.param_groups:
            group["capturable"] = True
        for p, kept in optimizer.state.items():
            kept.update({name: x.to(p.device) for name, x in kept.items() if isinstance(x, Tensor) and x.dim() == 0})
        # torch would warn that its first steps run outside of a CUDA graph, as they should.
        optimizer._warned_capturable_if_run_uncaptured = True
    return True


def _not_finite(where: str, cause: str) -> FloatingPointError:
    return FloatingPointError(
        f"The loss is not finite {where}: {cause}. The last checkpoint, if there is one, is kept. Restart with a lower "
        "learning rate, or bound the gradient with clip_norm."
    )
