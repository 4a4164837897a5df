r"""Estimates of :math:`\log p(x)`, per datum, in nats, each with its error and diagnostics."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from pyrovae.checks import check_finite, evaluation_mode, named_arguments, sample_sites
from pyrovae.importance import Structure, draw, inspect_weights, log_joint

__all__ = ["Estimate", "independent_baseline", "log_marginal"]


class Estimate(NamedTuple):
    r"""Estimates of :math:`\log p(x)` with what says how far to trust them; every tensor has shape ``(batch,)``.

    Args:
        value: :math:`\log \hat p(x)` in nats; a lower bound in expectation.
        standard_error: of `value`, in nats, from the spread of the weights; NaN for a single sample. It cannot tell of
            mass that no sample has found: see `khat`.
        ess: effective sample size, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and the number of samples.
        khat: shape of the Pareto tail of the weights. Above 0.7 neither value nor error is to be trusted; minus
            infinity when the weights in the tail are equal (to rounding), infinity when nearly all are zero, NaN for
            fewer than 21 samples.
        num_samples: samples per datum.

    >>> weights = Estimate(torch.tensor([-1.0, -3.0]), torch.tensor([0.3, 0.4]), torch.ones(2), torch.zeros(2), 50)
    >>> print(weights)
    log p(x) = -2.000 nats a datum (standard error: 0.250 from 50 samples a datum, 1.000 from 2 data)
    Pareto k-hat above 0.7, not to be trusted: 0 of 2 data
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    khat: Tensor
    num_samples: int

    def __str__(self) -> str:
        n = len(self.value)
        sampling = self.standard_error.square().sum().sqrt().item() / n
        spread = self.value.std().item() / math.sqrt(n) if n > 1 else math.nan
        return (
            f"log p(x) = {self.value.mean().item():.3f} nats a datum (standard error: {sampling:.3f} from "
            f"{self.num_samples:,} samples a datum, {spread:.3f} from {n:,} data)\n{self._verdict()}"
        )

    def _verdict(self) -> str:
        if self.num_samples < 21:
            return "Pareto k-hat, which says whom to trust: unknown below 21 samples a datum"
        return f"Pareto k-hat above 0.7, not to be trusted: {int((self.khat > 0.7).sum()):,} of {len(self.khat):,} data"


@torch.no_grad()
def log_marginal(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    max_memory: float = 64e6,
    progress: bool = True,
    **kwargs: Any,
) -> Estimate:
    r"""Estimates :math:`\log p(x)` per datum by importance sampling with the guide as the proposal.

    .. math:: \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad z_k \sim q(z \mid x)

    Data and samples are worked through in chunks that fit the memory budget, with weights summed as they come, so any
    number of either will do. Modules run in evaluation mode and are put back afterwards.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide. It runs once per datum as long as all latents of a datum fit in the budget (they do up to
            some 100,000 samples of 20 dimensions), and a few times more for the first two, to plan the chunks.
        *args: tensors with the data along their first dimension, or anything else, which is passed on as it is.
        num_samples: samples per datum :math:`K`; exactly so many are drawn.
        max_memory: budget for intermediate results, in bytes. On a CPU more is not faster; on a GPU it is.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        An :class:`Estimate`.

    Raises:
        ValueError: when an argument is out of range, holds NaN or infinity, or has another length than the data; when
            model and guide do not fit each other or the data, or weights per datum are undefined.

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
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if not max_memory > 0:
        raise ValueError(f"max_memory must be a positive number of bytes, got {max_memory}.")
    size = _num_data(args, kwargs)
    head = _rows(slice(0, 1), args, kwargs)
    bar = tqdm(desc="log p(x)", total=size * num_samples, unit="sample", unit_scale=True, disable=not progress)
    with evaluation_mode(), bar:
        structure = inspect_weights(model, guide, *head[0], num_samples=num_samples, **head[1])
        data, draws, slices = _chunk_sizes(model, guide, structure, args, kwargs, size, num_samples, max_memory)
        chunks = []
        for start in range(0, size, data):
            part_args, part_kwargs = _rows(slice(start, start + data), args, kwargs)
            sums = _WeightSums(num_samples)
            for drawn in _split(num_samples, draws):
                trace, log_q = draw(guide, structure, drawn, *part_args, **part_kwargs)
                done = 0
                for k in _split(drawn, slices):
                    part = _slice_trace(trace, slice(done, done + k))
                    # The first score of a datum checks it; Pyro's validation takes time.
                    with pyro.validation_enabled(False) if done else nullcontext():
                        log_p = log_joint(model, part, structure, k, *part_args, check_data=not done, **part_kwargs)
                    sums.add(log_p - log_q[done : done + k])
                    done += k
                    bar.update(log_p.numel())
            chunks.append(sums.estimate())
            _check_length(chunks[-1].value, min(data, size - start))
        columns = list(zip(*chunks, strict=True))[:-1]
    return Estimate(*(torch.cat(column) for column in columns), num_samples)


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


class _WeightSums:
    """Sums over log weights that arrive in pieces of shape (any number, batch): all that an estimate needs.

    Everything is in double precision, for the sums run over far more terms than float32 can tell apart.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.tail_size = math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))  # as in the PSIS paper
        self.log_sum = self.log_sum_of_squares = self.largest = None

    def add(self, log_w: Tensor) -> None:
        dtype = log_w.dtype
        log_w = log_w.double()
        log_sum, log_sum_of_squares = log_w.logsumexp(0), (2 * log_w).logsumexp(0)
        largest = log_w
        if self.log_sum is None:
            self.dtype = dtype
        else:
            log_sum = torch.logaddexp(self.log_sum, log_sum)
            log_sum_of_squares = torch.logaddexp(self.log_sum_of_squares, log_sum_of_squares)
            largest = torch.cat([self.largest, log_w])
        self.log_sum, self.log_sum_of_squares = log_sum, log_sum_of_squares
        self.largest = largest.topk(min(self.tail_size + 1, len(largest)), dim=0).values

    def estimate(self) -> Estimate:
        k = self.num_samples
        ess = (2 * self.log_sum - self.log_sum_of_squares).exp().clamp(max=k)
        ess = torch.where(self.log_sum == -math.inf, 0.0, ess)  # no sample has any weight
        # The delta method: the relative variance of the mean weight, with the unbiased variance of the weights.
        standard_error = ((k / ess - 1) / (k - 1)).sqrt() if k > 1 else torch.full_like(ess, math.nan)
        value = self.log_sum - math.log(k)
        khat = _pareto_khat(self.largest, resolution=math.sqrt(torch.finfo(self.dtype).eps))
        return Estimate(*(t.to(self.dtype) for t in (value, standard_error, ess, khat)), k)


def _pareto_khat(largest: Tensor, resolution: float) -> Tensor:
    """Fits a generalized Pareto distribution to the tails of log weights, shape ``(tail + 1, batch)``, largest first.

    Log weights that differ by less than the resolution are taken to be equal: their differences are rounding.

    The estimator of Zhang and Stephens (A New and Efficient Estimation Method for the Generalized Pareto Distribution,
    2009) with the weak prior of Vehtari et al., for a whole batch at once.
    """
    n = len(largest) - 1
    if n < 5:
        return torch.full_like(largest[0], math.nan)
    weights = (largest - largest[0]).exp()
    x = (weights[:-1] - weights[-1]).flip(0)  # ascending excesses over the threshold, the largest not in the tail
    m = 30 + math.isqrt(n)
    grid = torch.arange(1, m + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)
    # Excesses of zero, ties with the threshold, tell nothing of the scale: take the smallest that is none instead.
    smallest = torch.where(x > 0, x, math.inf).amin(0)
    quartile, top = torch.maximum(x[int(n / 4 + 0.5) - 1], smallest), x[-1]
    b = 1 / top + (1 - (m / (grid - 0.5)).sqrt()) / (3 * quartile)

    def shape_at(b: Tensor) -> Tensor:
        return torch.stack([torch.log1p(-row * x).mean(0) for row in b])  # row by row, for memory

    k = shape_at(b)
    posterior = (n * ((-b / k).log() - k - 1)).softmax(dim=0)
    khat = shape_at((posterior * b).sum(0, keepdim=True))[0]
    khat = (n * khat + 5) / (n + 10)
    khat = torch.where(largest[0] - largest[-1] > resolution, khat, -math.inf)
    return torch.where(largest[-1] == -math.inf, math.inf, khat)  # nearly all weights are zero: there is no tail to see


class _Allocations(TorchFunctionMode):
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


def _chunk_sizes(
    model: Callable,
    guide: Callable,
    structure: Structure,
    args: tuple,
    kwargs: dict,
    size: int,
    num_samples: int,
    max_memory: float,
) -> tuple[int, int, int]:
    """Returns how many data, draws of the guide and draws scored by the model make a chunk, from what small ones took."""

    def bytes_of(samples: int, data: int) -> tuple[int, int]:
        part_args, part_kwargs = _rows(slice(0, data), args, kwargs)
        with _Allocations() as in_guide:
            trace, _ = draw(guide, structure, samples, *part_args, **part_kwargs)
        with _Allocations() as in_model:
            log_joint(model, trace, structure, samples, *part_args, **part_kwargs)
        return in_guide.bytes(), in_model.bytes()

    one_guide, one_model = bytes_of(1, 1)
    two_guide, two_model = bytes_of(2, 1)
    per_draw = max(two_guide - one_guide, 1)
    per_score = max(two_model - one_model, 1)
    per_datum = max(sum(bytes_of(1, 2)) - one_guide - one_model, 1) if size > 1 else 1
    data = _clamp(max_memory / max(num_samples * per_draw, per_datum), size)
    draws = _clamp(max_memory / (data * per_draw), num_samples)
    slices = _clamp(max_memory / (data * per_score), draws)
    return data, draws, slices


def _clamp(n: float, largest: int) -> int:
    return max(1, min(int(n), largest))


def _split(total: int, size: int) -> list[int]:
    """Returns sizes of parts, as equal as can be, none above `size`, that add up to the total."""
    parts = -(-total // size)
    return [total // parts + (i < total % parts) for i in range(parts)]


def _num_data(args: tuple, kwargs: dict) -> int:
    tensors = [(name, t) for name, t in named_arguments(args, kwargs) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors:
        raise ValueError("log_marginal needs at least one tensor with the data along its first dimension, got none.")
    size = len(tensors[0][1])
    if size == 0:
        raise ValueError(f"{tensors[0][0]} is empty: shape {tuple(tensors[0][1].shape)}.")
    for name, t in tensors:
        if len(t) != size:
            raise ValueError(f"{tensors[0][0]} has {size} rows but {name} has {len(t)}: give one row a datum in each.")
        check_finite(name, t)
    return size


def _rows(rows: slice, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    def take(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() > 0 else value

    return tuple(map(take, args)), {name: take(value) for name, value in kwargs.items()}


def _slice_trace(trace: poutine.Trace, samples: slice) -> poutine.Trace:
    """Returns a trace with some of the draws of another; samples are the leftmost dimension of every value."""
    part = trace.copy()
    for name, site in sample_sites(trace).items():
        part.nodes[name] = {**site, "value": site["value"][samples]}
    return part


def _check_length(value: Tensor, size: int) -> None:
    if len(value) != size:
        raise ValueError(
            f'The plate "data" drew {len(value)} of {size} data that it was given. Score data in the order they come: '
            'use pyro.plate("data", len(x)), or pyro.plate("data", total, subsample=x).'
        )
