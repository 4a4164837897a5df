r"""log_marginal: estimates log p(x) of data in memory, in a loader, or shared by several processes."""

import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from pyrovae import arguments
from pyrovae.compilation.cache import GraphCache, backend_of
from pyrovae.compilation.recording import Recording
from pyrovae.distributed import World, init_process_group
from pyrovae.estimators.base import Estimate, Estimator, join
from pyrovae.estimators.exact import Enumeration
from pyrovae.estimators.task import Task, open_task
from pyrovae.estimators.weighted import ImportanceSampling
from pyrovae.progress import tqdm


@torch.no_grad()
def log_marginal(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    method: Estimator | None = None,
    num_samples: int | None = None,
    max_memory: float = 64e6,
    compile: bool | Literal["auto"] = "auto",
    progress: bool = True,
    **kwargs: Any,
) -> Estimate:
    r"""Estimates :math:`\log p(x)` per datum; by default by importance sampling with the guide as the proposal.

    .. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad
        z_k \sim q(z \mid x)

    Data and samples are processed in chunks that fit the memory budget, so that their number is not limited. Modules
    run in evaluation mode and are restored afterwards. The value of a model without latents is exact by any method.
    Discrete latents with ``infer={"enumerate": "parallel"}`` in the model, which the guide lacks, are summed over.

    k-hat sees weights whose tail is too heavy. It does not see a mode that the guide never draws: with the guide on one
    of two modes, weights can be nearly equal, and the value far too low. ``method=UntilTrusted()`` looks for modes.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide; may be None for a method that does not use it.
        *args: tensors, arrays, lists or packed sequences with one entry per datum, and dicts, lists and tuples of
            these; numbers, ``None``, strings and other objects, which apply to all data; or a ``Dataset``, or a
            ``DataLoader`` that keeps the order of the data, whose batches become arguments as in :func:`pyrovae.fit`.
        method: an estimator of :mod:`pyrovae.estimators`; :class:`~pyrovae.estimators.ImportanceSampling` by default.
        num_samples: short for ``method=ImportanceSampling(num_samples)``; 1,000 by default.
        max_memory: budget for intermediate results, in bytes. A larger budget is faster on a GPU, but not on a CPU.
        compile: how the model is scored, as in :func:`pyrovae.fit`, always with the same noise. With "auto" its
            operations are traced after a few calls, and played back from then on, with the same result to the bit; in
            thousands of calls a graph compiled in the background may take over, equal to rounding. With True they are
            compiled graphs, as :func:`pyrovae.compile` makes them: compilation takes some seconds, and the graphs of
            the last models are kept. With False the model runs at every call.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        An :class:`Estimate`; where it is not to be trusted for some data, its `remedy` names what to use.

    Raises:
        ValueError: when an argument is out of range, holds NaN or infinity, has another length than the data, or is
            ambiguous; when a loader does not keep the order of the data; when model and guide do not match each other
            or the data, or weights per datum are undefined; when the method does not support such latents.

    References:
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519; Pareto Smoothed Importance Sampling, A. Vehtari, D. Simpson, A. Gelman, Y. Yao
        and J. Gabry, 2024, https://arxiv.org/abs/1507.02646.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> estimate = log_marginal(vae.model, vae.guide, torch.zeros(5, 3), num_samples=100, progress=False)
    >>> estimate.value.shape, estimate.standard_error.shape
    (torch.Size([5]), torch.Size([5]))
    """
    if method is None:
        method = ImportanceSampling(1000 if num_samples is None else num_samples)
    elif not isinstance(method, Estimator):
        raise TypeError(f"method must be an estimator such as estimators.ImportanceSampling(), got {method!r}.")
    elif num_samples is not None:
        raise ValueError(
            f"num_samples={num_samples} and method={method} were both given. Give the method its own number."
        )
    backend_of(compile)
    loader = arguments.as_loader(args, kwargs)
    if loader is None:
        return _score(model, guide, method, args, kwargs, max_memory, compile, progress)
    parts: list[Estimate] = []
    offset, began = 0, time.monotonic()
    for batch in map(
        arguments.as_arguments, tqdm(loader, desc="log p(x)", unit="batch", delay=0.5, disable=not progress)
    ):
        method_here = method
        if method.seconds is not None:  # the time that is left, shared by the batches that are left
            method_here = copy(method)
            left = method.seconds - (time.monotonic() - began)
            method_here.seconds = max(left, 1e-3) / max(len(loader) - len(parts), 1)
        part = _score(model, guide, method_here, batch.args, batch.kwargs | kwargs, max_memory, compile, False, offset)
        offset += len(part.value)
        parts.append(part)
    if not parts:
        raise ValueError("there is no batch of data. Give at least one datum, and a DataLoader that does not drop it.")
    method = parts[0].method if isinstance(parts[0].method, Enumeration) else method
    return replace(join(method, parts), remedy=next((part.remedy for part in parts if part.remedy), ""))


def _score(
    model: Callable,
    guide: Callable | None,
    method: Estimator,
    args: tuple,
    kwargs: dict,
    max_memory: float,
    compile: bool | Literal["auto"],
    progress: bool,
    offset: int = 0,
) -> Estimate:
    """Scores data in memory; `offset` is the index of the first among all data."""
    world = init_process_group(arguments.device_of(args, kwargs))
    with open_task(model, guide, method, args, kwargs, max_memory, progress and world.is_rank0, offset) as task:
        backend = backend_of(compile)
        if backend is not None:
            graphs = _graphs_of(model, backend)
            graphs.report = task.bar.set_description
            if compile == "auto":
                graphs.refused = lambda line: None  # nobody asked for them, and they change nothing but the time
            graphs.refuse_packed(task.args, task.kwargs)
            task = replace(task, graphs=graphs)
        if not task.structure.latents:  # a sum over the only way to draw nothing
            method = Enumeration()
        estimate = method.estimate(task) if world.size == 1 else _score_in_shards(method, task, world)
        remedy = "" if bool(estimate.trusted.all()) else method.remedy(task.structure)
        return replace(estimate, remedy=remedy, sums=_sums_of(task))


def _sums_of(task: Task) -> Tensor | None:
    """Returns the sum of each datum's numbers in the first argument that holds data; None for sequences."""
    named = arguments.named_arrays(task.args, task.kwargs)
    if not named:
        return None
    x = named[0][1]
    is_other = isinstance(x, Tensor) and (x.layout != torch.strided or x.is_complex())
    if is_other or len(x.shape) == 0 or len(x) != task.size:
        return None
    if isinstance(x, Tensor):
        return x.reshape(len(x), -1).sum(1, dtype=torch.double)
    sums = torch.empty(len(x), dtype=torch.double)  # at first: small results between chunks would keep their memory
    for start, part in x.chunks():
        sums[start : start + len(part)] = part.reshape(len(part), -1).sum(1, dtype=torch.double)
    return sums


@lru_cache(maxsize=4)
def _graphs_of(model: Callable, backend: Callable[[Recording], Callable]) -> GraphCache:
    # Stages and chunks have many shapes, most of which come a few times only.
    return GraphCache("log p(x, z)", backend, warmup=16)


def _score_in_shards(method: Estimator, task: Task, world: World) -> Estimate:
    """Scores one shard of the data in each process, with different noise; every process returns all, in order."""
    if not task.divisible:
        raise ValueError(
            "model and guide do not run on some of the data alone, so that processes cannot share them. Score in one."
        )
    start, end = world.shard_bounds(task.size)
    seed = int(torch.randint(2**62, ()))
    seed = world.broadcast_from_rank0(lambda: seed) + world.rank
    device = arguments.device_of(task.args, task.kwargs)
    columns: dict[str, Any] | None = None  # of this process's estimate; None where its shard is empty
    if end > start:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            part = method.estimate(task.rows(slice(start, end)))
        # Without the method: every process has it, and its class may not be picklable.
        columns = {name: x for name, x in vars(_to(part, torch.device("cpu"))).items() if name != "method"}
    parts = [Estimate(**columns, method=method) for columns in world.all_gather(columns) if columns is not None]
    return _to(join(method, parts), device)


def _to(estimate: Estimate, device: torch.device) -> Estimate:
    return replace(
        estimate,
        value=estimate.value.to(device),
        standard_error=estimate.standard_error.to(device),
        ess=estimate.ess.to(device),
        khat=estimate.khat.to(device),
        diagnostics={name: x.to(device) for name, x in estimate.diagnostics.items()},
    )
