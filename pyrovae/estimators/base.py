r"""What all estimates of log p(x) have in common: what they return, the data and the memory they are worked through in."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from pyrovae import arguments
from pyrovae.arguments import take_rows
from pyrovae.compilation.cache import GraphCache
from pyrovae.distributed import World, init_process_group
from pyrovae.inference.messages import check_all_observed, check_finite, check_mass, described, is_integer
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import check_draws, draw, inspect_weights, log_prob_of, per_datum, trace_model

_HEAD = 7  # data that a pair is looked at with, before the whole


@dataclass(frozen=True)
class Estimate:
    r"""Estimates of :math:`\log p(x)` with what says how far to trust them; every tensor has shape ``(batch,)``.

    Args:
        value: :math:`\log \hat p(x)` in nats.
        standard_error: of `value`, in nats, from the spread of the samples; NaN for a single one. It cannot tell of
            mass that no sample has found: see `trusted`. Of a :class:`~pyrovae.estimators.Quadrature`, what halving its
            points changes.
        ess: effective sample size, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and the number of samples; NaN
            where nothing is sampled.
        khat: shape of the Pareto tail of the weights. Above 0.7 neither value nor error is to be trusted; minus
            infinity when the weights in the tail are equal (to rounding), infinity when nearly all are zero, NaN for
            fewer than 21 samples and for discrete latents, of which it cannot tell.
        num_samples: samples per datum: weights, chains, runs or points.
        method: the estimator.
        diagnostics: what else the estimator says of each datum, by name.
        remedy: what to use for the data that are not to be trusted; empty where all are.

    >>> from pyrovae.estimators import ImportanceSampling
    >>> one, half = torch.ones(2), torch.full((2,), 0.5)
    >>> print(Estimate(torch.tensor([-1.0, -3.0]), half, one, one, 50, ImportanceSampling(50), remedy="Take more samples."))
    log p(x) = -2.000 nats a datum (standard error: 0.354 from 50 samples a datum, 1.000 from 2 data)
    Pareto k-hat above 0.7, not to be trusted: 2 of 2 data. Take more samples.
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int
    method: "Estimator"
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    remedy: str = ""

    @property
    def trusted(self) -> Tensor:
        """Whether the value and the error of each datum are to be trusted, as far as the estimator can tell."""
        return self.method.trusts(self)

    def __str__(self) -> str:
        n = len(self.value)
        sampling = self.standard_error.square().sum().sqrt().item() / n
        spread = self.value.std().item() / math.sqrt(n) if n > 1 else math.nan
        verdict = self.method.describe(self)
        return (
            f"log p(x) {self.method.relation} {self.value.mean().item():.3f} nats a datum (standard error: {sampling:.3f} from "
            f"{self.num_samples:,} {self.method.unit} a datum, {spread:.3f} from {n:,} data)\n{verdict}"
            + (f". {self.remedy}" if self.remedy else "")
        )


class Estimator(ABC):
    r"""Base of the estimators of :math:`\log p(x)`; :func:`log_marginal` takes any of them.

    To add one, write :meth:`estimate`, which scores the data of a :class:`~pyrovae.estimators.Task`; :meth:`trusts` and
    :meth:`describe`, which say of which data the result is not to be trusted. `unit` is what it draws, `relation` what
    stands between log p(x) and the value, `needs_guide` whether it looks at the guide.

    Args:
        num_samples: what it draws per datum, at least 1.
    """

    unit = "samples"
    relation = "="
    needs_guide = True

    def __init__(self, num_samples: int):
        check_count("num_samples", num_samples)
        self.num_samples = int(num_samples)

    @abstractmethod
    def estimate(self, task: "Task") -> Estimate:
        """Scores all data of a task."""

    def trusts(self, estimate: Estimate) -> Tensor:
        """Returns whether each datum's value and error are to be trusted, ``(batch,)``; by the tail of its weights."""
        return estimate.khat <= 0.7

    def describe(self, estimate: Estimate) -> str:
        """Returns what to print of it."""
        if self.num_samples < 21:
            return "Pareto k-hat, which says whom to trust: unknown below 21 samples a datum"
        untrusted = int((~estimate.trusted).sum())
        return f"Pareto k-hat above 0.7, not to be trusted: {untrusted:,} of {len(estimate.value):,} data"

    def remedy(self, structure: SiteStructure) -> str:
        """Returns what to use for data that the estimator is not to be trusted for, given what the latents are."""
        if structure.latents == structure.discrete:
            return "Score them by method=Enumeration()."
        if structure.discrete or structure.without_bijection:  # gradients cannot move these
            return "Draw more samples."
        return "Score them by method=AnnealedImportanceSampling()."

    def __repr__(self) -> str:
        return described(self)


@dataclass(frozen=True)
class Task:
    """A model, a guide and data to score, with the memory to do it in.

    Args:
        model: a Pyro model.
        guide: a Pyro guide; without one, `prior_of` the model.
        structure: of both.
        args: what both are called with.
        kwargs: what both are called with.
        size: number of data.
        max_memory: budget for intermediate results, in bytes.
        bar: of progress.
        graphs: of what is computed again and again; None to compute it as it is.
        offset: the place of the first among all data.
        divisible: whether some of the data can be scored without the others; parameters of a guide may belong to all rows.
    """

    model: Callable
    guide: Callable
    structure: SiteStructure
    args: tuple
    kwargs: dict[str, Any]
    size: int
    max_memory: float
    bar: tqdm
    graphs: GraphCache | None = None
    offset: int = 0
    divisible: bool = True

    def rows(self, rows: slice) -> "Task":
        """Returns the task for some of the data; for all of them where they cannot be scored apart."""
        if not self.divisible:
            return self
        args, kwargs = take_rows(rows, self.args, self.kwargs)
        taken = range(self.size)[rows]
        return replace(self, args=args, kwargs=kwargs, size=len(taken), offset=self.offset + taken.start)

    def split(self, data: int) -> Iterator["Task"]:
        """Yields tasks for at most so many data each, one after the other, with what is known of draws of them at once."""
        # A row is not left alone: there are models that squeeze it away.
        sizes = split_evenly(self.size, min(max(data, 2), self.size) if self.divisible else self.size)
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [sizes[-2] + 1]
        starts = accumulate(sizes, initial=0)
        structure = self.structure
        for start, end in pairwise(starts):
            part = self.rows(slice(start, end))
            # Some rows may say nothing of what a network makes of their latents, and so not show that it is wrong.
            structure = check_draws(structure, self.model, self.guide, *part.args, **part.kwargs)
            yield replace(part, structure=structure)

    def start(self, total: float, unit: str) -> None:
        """Starts the bar at nothing of a total."""
        self.bar.unit = unit
        self.bar.reset(total)

    def advance(self, amount: float) -> None:
        """Moves the bar on; sums of fractions do not pass its end."""
        self.bar.update(max(0.0, min(amount, self.bar.total - self.bar.n)))

    def draw(self, num_samples: int, guide: Callable | None = None) -> tuple[poutine.Trace, Tensor]:
        r"""Runs a guide, this one's unless given; returns its trace and :math:`\log q`, ``(num_samples, batch)``."""
        with arguments.row_positions(self.offset):
            return draw(guide or self.guide, self.structure, num_samples, *self.args, **self.kwargs)

    def score(self, trace: poutine.Trace, num_samples: int, check_data: bool = False) -> tuple[Tensor, Tensor]:
        r"""Returns :math:`\log p(z)` and :math:`\log p(x \mid z)` at the latents of a trace, ``(num_samples, batch)`` each."""
        if check_data or torch.is_grad_enabled():
            return self._score(trace, num_samples, check_data)
        latents = [site["value"] for site in sample_sites(trace).values()]
        return self.compute(lambda: self._score(trace, num_samples), latents, ("score", num_samples))

    def compute(self, function: Callable[[], Any], inputs: list[Tensor], static: tuple) -> Any:
        """Returns what a function of the model and some tensors returns, by a compiled graph if there are to be such.

        Args:
            function: the function.
            inputs: the tensors that it reads beside the data of the task and what the model reads.
            static: what tells the function from others, hashable.
        """
        if self.graphs is None:
            return function()
        leaves = tree_leaves((self.args, self.kwargs))
        tensors, others = ([x for x in leaves if isinstance(x, Tensor) == kind] for kind in (True, False))
        found = self.graphs(lambda leaves: function(), [*inputs, *tensors], (self.model, *others), static)
        return function() if found is None else found[0]

    def _score(self, trace: poutine.Trace, num_samples: int, check_data: bool = False) -> tuple[Tensor, Tensor]:
        with arguments.row_positions(self.offset):
            scored = trace_model(self.model, trace, self.structure, num_samples, *self.args, **self.kwargs)
            if check_data:
                check_all_observed(scored)
        sides = [0.0, 0.0]
        for name, site in sample_sites(scored).items():
            if name in self.structure.global_observed:
                continue
            log_prob = log_prob_of(site)
            if check_data and site["is_observed"]:
                check_mass(name, site["fn"], log_prob)
            sides[site["is_observed"]] = sides[site["is_observed"]] + per_datum(site, log_prob)
        prior, likelihood = (s if isinstance(s, Tensor) else torch.zeros(()) for s in sides)
        self.structure.data.check_in_order(max(s.shape[-1] if s.dim() else 0 for s in (prior, likelihood)), self.size)
        return prior, likelihood


def prior_of(model: Callable) -> Callable:
    """Returns a guide that draws the latents of a model as the model does, whatever the data."""

    def guide(*args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"]):
            model(*args, **kwargs)

    return guide


@torch.no_grad()
def log_marginal(
    model: Callable,
    guide: Callable | None,
    *args: Any,
    method: Estimator | None = None,
    num_samples: int | None = None,
    max_memory: float = 64e6,
    compile: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> Estimate:
    r"""Estimates :math:`\log p(x)` per datum, by importance sampling with the guide as the proposal unless told otherwise.

    .. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad z_k \sim q(z \mid x)

    Data and samples are worked through in chunks that fit the memory budget, so any number of either will do. Modules
    run in evaluation mode and are put back afterwards.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide; None will do for a method that makes no use of it.
        *args: tensors, arrays, lists or packed sequences with an entry a datum, and dicts, lists and tuples of such; numbers,
            ``None``, strings and other objects, which are for all data; or a ``Dataset``, or a ``DataLoader`` that keeps the order of
            the data, whose batches become arguments as :func:`pyrovae.fit` has it.
        method: an estimator of :mod:`pyrovae.estimators`; :class:`~pyrovae.estimators.ImportanceSampling` unless given.
        num_samples: short for ``method=ImportanceSampling(num_samples)``, 1,000 unless given.
        max_memory: budget for intermediate results, in bytes. On a CPU more is not faster; on a GPU it is.
        compile: whether to score the model by compiled graphs, as :func:`pyrovae.compile` makes them; they take some
            seconds to make, and are kept for the models scored last.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        An :class:`Estimate`; of data for which the method is not to be trusted, its `remedy` names what to use.

    Raises:
        ValueError: when an argument is out of range, holds NaN or infinity, has another length than the data, or may be
            taken in two ways; when a loader does not keep the order of the data; when model and guide do not fit each
            other or the data, or weights per datum are undefined; when the method is not for such latents.

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
    from pyrovae.estimators.weighted import ImportanceSampling  # which derives from what is above

    if method is None:
        method = ImportanceSampling(1000 if num_samples is None else num_samples)
    elif not isinstance(method, Estimator):
        raise TypeError(f"method must be an estimator such as estimators.ImportanceSampling(), got {method!r}.")
    elif num_samples is not None:
        raise ValueError(
            f"num_samples={num_samples} and method={method} were both given. Give the method its own number."
        )
    loader = arguments.as_loader(args, kwargs)
    if loader is None:
        return _scored(model, guide, method, args, kwargs, max_memory, compile, progress)
    parts, start = [], 0
    for batch in map(
        arguments.as_arguments, tqdm(loader, desc="log p(x)", unit="batch", delay=0.5, disable=not progress)
    ):
        part = _scored(model, guide, method, batch.args, batch.kwargs | kwargs, max_memory, compile, False, start)
        start += len(part.value)
        parts.append(part)
    if not parts:
        raise ValueError("there is no batch of data. Give at least one datum, and a DataLoader that does not drop it.")
    return replace(join(method, parts), remedy=next((part.remedy for part in parts if part.remedy), ""))


def _scored(
    model: Callable,
    guide: Callable | None,
    method: Estimator,
    args: tuple,
    kwargs: dict,
    max_memory: float,
    compile: bool,
    progress: bool,
    offset: int = 0,
) -> Estimate:
    """Scores data that are in memory, the first of which is one of so many."""
    given = arguments.tensors_of(*arguments.as_tensors(args, kwargs))
    world = init_process_group(given[0].device if given else None)
    with open_task(model, guide, method, args, kwargs, max_memory, progress and world.is_rank0, offset) as task:
        if compile:
            graphs = _graphs_of(model)
            graphs.report = task.bar.set_description
            graphs.refuse_packed(task.args, task.kwargs)
            task = replace(task, graphs=graphs)
        estimate = method.estimate(task) if world.size == 1 else _shared(method, task, world)
        return replace(estimate, remedy="" if bool(estimate.trusted.all()) else method.remedy(task.structure))


def _shared(method: Estimator, task: Task, world: World) -> Estimate:
    """Scores a share of the data in each process, with noise of its own; returns the estimates of all, in order, to all."""
    if not task.divisible:
        raise ValueError(
            "model and guide do not run on some of the data alone, so that processes cannot share them. Score in one."
        )
    start, end = world.shard_bounds(task.size)
    seed = int(torch.randint(2**62, ()))
    seed = world.broadcast_from_rank0(lambda: seed) + world.rank
    part = None
    if end > start:
        device = next((x.device for x in arguments.tensors_of(task.args, task.kwargs)), torch.device("cpu"))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            part = method.estimate(task.rows(slice(start, end)))
        tensors = {name: x.cpu() for name, x in vars(part).items() if isinstance(x, Tensor)}
        # Without the method, which the others have, and which may be of a class that cannot be sent.
        diagnostics = {name: x.cpu() for name, x in part.diagnostics.items()}
        part = replace(part, **tensors, diagnostics=diagnostics, method=None)
    whole = join(method, [part for part in world.all_gather(part) if part is not None])
    tensors = (
        {name: x.to(device) for name, x in vars(whole).items() if isinstance(x, Tensor)} if part is not None else {}
    )
    return replace(whole, **tensors)


@lru_cache(maxsize=4)
def _graphs_of(model: Callable) -> GraphCache:
    return GraphCache("log p(x, z)")


@contextmanager
def open_task(
    model: Callable,
    guide: Callable | None,
    method: Estimator,
    args: tuple,
    kwargs: dict,
    max_memory: float,
    progress: bool,
    offset: int = 0,
) -> Iterator[Task]:
    """Checks a model, a guide and data; returns the task of scoring them, in evaluation mode."""
    if not max_memory > 0:
        raise ValueError(f"max_memory must be a positive number of bytes, got {max_memory}.")
    if guide is None or not method.needs_guide:
        if method.needs_guide:
            raise ValueError(
                f"{type(method).__name__} needs a guide, got None. Take "
                "AnnealedImportanceSampling(), or ImportanceSampling(proposal=Prior())."
            )
        guide = prior_of(model)
    args, kwargs, size = checked(args, kwargs)
    # Fewer than all, to see whether some can be taken without the others.
    head = take_rows(slice(0, min(_HEAD, max(size - 1, 1))), args, kwargs)
    # It shows itself once the method has said what there is to do.
    bar = tqdm(desc="log p(x)", total=size, unit_scale=True, delay=0.5, disable=not progress)
    with evaluation_mode(), bar, arguments.row_positions(offset):
        divisible = True
        try:
            structure = inspect_weights(model, guide, *head[0], num_samples=1, **head[1])
        except Exception:  # parameters of a guide that belong to all rows, for one
            divisible = False
            structure = inspect_weights(model, guide, *args, num_samples=1, **kwargs)
        if not structure.observed:
            raise ValueError(
                "the model observes nothing, so that there is no log p(x): give its data to a site, "
                'pyro.sample("x", ..., obs=x). Were model and guide swapped?'
            )
        yield Task(model, guide, structure, args, kwargs, size, max_memory, bar, offset=offset, divisible=divisible)


def join(method: Estimator, parts: list[Estimate]) -> Estimate:
    """Returns the estimates of several chunks of data as one."""
    columns = [
        torch.cat([getattr(part, name) for part in parts]) for name in ("value", "standard_error", "ess", "khat")
    ]
    names = parts[0].diagnostics
    diagnostics = {name: torch.cat([part.diagnostics[name] for part in parts]) for name in names}
    return Estimate(*columns, parts[0].num_samples, method, diagnostics)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a ValueError unless an argument is an integer of at least so much."""
    if not is_integer(value):
        given = repr(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
        raise ValueError(f"{name} must be an integer of at least {least}, got {given}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_positive(name: str, value: float, largest: float = math.inf) -> None:
    """Raises a ValueError unless an argument is positive, finite and not above the largest that it may be."""
    if not (0 < value <= largest and value < math.inf):
        most = "" if largest == math.inf else f" and at most {largest:g}"
        raise ValueError(f"{name} must be positive and finite{most}, got {value}.")


def independent_baseline(train: Tensor, test: Tensor) -> tuple[str, Tensor]:
    r"""Scores data by the simplest model there is, independent dimensions; a VAE that does not beat it learned nothing.

    .. math:: p(x) = \prod_d \mathrm{Bernoulli}(x_d; \mu_d) \quad\text{or}\quad \prod_d \mathcal{N}(x_d; \mu_d, \sigma^2)

    The first for test data that is 0 or 1, with :math:`\mu` smoothed by half a datum of each kind, the second for any
    other, with one :math:`\sigma` for all dimensions, so that a constant one does no harm.

    Args:
        train: data to take means from, shape ``(size, *x_shape)``.
        test: data to score, shape ``(batch, *x_shape)``.

    Returns:
        The model's name, and :math:`\log p(x)` in nats, shape ``(batch,)``.

    >>> independent_baseline(torch.eye(2), torch.eye(2))
    ('factorised Bernoulli', tensor([-1.3863, -1.3863]))
    """
    if bool(((test == 0) | (test == 1)).all()):
        model = torch.distributions.Bernoulli((train.sum(0) + 0.5) / (len(train) + 1))
        return "factorised Bernoulli", model.log_prob(test).flatten(1).sum(1)
    mean = train.mean(0)
    model = torch.distributions.Normal(mean, (train - mean).square().mean().sqrt())
    return "factorised Normal", model.log_prob(test).flatten(1).sum(1)


class Allocations(TorchFunctionMode):
    """Counts the bytes of all tensors that functions return inside, a fair guess of what they hold at once."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # kept alive, so that no address comes twice
                self.storages[storage.data_ptr()] = storage
        return out

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def clamp(n: float, largest: int) -> int:
    return max(1, min(int(n), largest))


def split_evenly(total: int, size: int) -> list[int]:
    """Returns sizes of parts that add up to the total, none above `size`: equal but for the last, which may be smaller."""
    part = -(-total // -(-total // size))
    return [part] * (total // part) + [total % part] * (total % part > 0)


def checked(args: tuple, kwargs: dict) -> tuple[tuple, dict, int]:
    """Returns arguments as :func:`pyrovae.arguments.canonicalize` does, after checking that their numbers are finite."""
    args, kwargs, size = arguments.canonicalize(args, kwargs)
    for name, t in arguments.named_tensors(args, kwargs):
        check_finite(name, t)
    return args, kwargs, size
