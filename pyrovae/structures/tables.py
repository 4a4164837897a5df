"""VAEs of tables."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.distributions import Classes, Numbers, Scales
from pyrovae.encoders import DiagonalNormal, Encoder
from pyrovae.likelihoods import Likelihood, Tabular
from pyrovae.likelihoods.tabular import HasCells, cells_of
from pyrovae.nn import GatedMLP
from pyrovae.nn.base import Shape
from pyrovae.priors import Prior, StandardNormal
from pyrovae.recorded import Recorded
from pyrovae.structures.assembly import class_of, make_prior
from pyrovae.structures.missing import MissingDataVAE

_FARTHEST = 10.0  # in scales of its column: outliers do not drown the other inputs


class TableFeatures(Recorded):
    r"""What an encoder sees of a row: for each column numbers of about unit size, and whether the cell is missing.

    Numbers are standardised, on the logarithmic scale if the column has one, and limited to ten scales; single values
    that a column takes very often (spikes) and classes are one-hot; levels in an order have their place too; times have
    sine and cosine of their day, week and year. All features of a missing cell are 0.

    Args:
        columns: the columns, those of a :class:`pyrovae.data.Schema` that are modelled, or their ``.cells``.

    >>> features = TableFeatures([Numbers(40.0, 10.0), Classes(3)])
    >>> features(torch.tensor([[50.0, 2.0], [0.0, 1.0]]), torch.tensor([[True, True], [False, True]]))
    tensor([[1., 0., 0., 1., 0., 0.],
            [0., 0., 1., 0., 1., 0.]])
    """

    numbers: Tensor

    def __init__(self, columns: Sequence[HasCells | Classes | Numbers]):
        super().__init__()
        self.cells = cells_of(columns)
        # Steps do not matter here, so that all numbers go together.
        numbers = [(d, c) for d, c in enumerate(self.cells) if isinstance(c, Numbers)]
        self.classes = [(d, c) for d, c in enumerate(self.cells) if isinstance(c, Classes)]
        self.cyclic = [(d, *cycle) for d, c in numbers for cycle in c.cycles]
        plain = [Numbers(c.loc, c.scale, c.shift, spikes=c.spikes) for _, c in numbers]
        self.scales = Scales(plain) if plain else None
        self.register_buffer("numbers", torch.tensor([d for d, _ in numbers], dtype=torch.long), persistent=False)
        self.num_features = (
            len(numbers) * (1 + (self.scales.num_spikes if self.scales else 0))
            + sum(c.num_classes + c.is_ordered for _, c in self.classes)
            + 2 * len(self.cyclic)
            + len(self.cells)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = []
        if self.scales is not None:
            here, values = mask[:, self.numbers], x[:, self.numbers]
            u = self.scales.standardize(values).clamp(-_FARTHEST, _FARTHEST)
            if self.scales.num_spikes:
                is_spike = self.scales.is_spike(values) & here.unsqueeze(-1)
                u = torch.where(is_spike.any(-1), 0.0, u)
                features.append(is_spike.flatten(1).to(x.dtype))
            features.append(torch.where(here, u, 0.0))
        for d, c in self.classes:
            codes = torch.arange(c.num_classes, dtype=x.dtype, device=x.device)
            # Unlike torch's one_hot, this reads no values back, which no graph can.
            features.append(((x[:, d : d + 1] == codes) & mask[:, d : d + 1]).to(x.dtype))
            if c.is_ordered:
                features.append(((2 * x[:, d] / (c.num_classes - 1) - 1) * mask[:, d]).unsqueeze(-1))
        for d, length, place in self.cyclic:
            angle = (x[:, d].double() + place) * (2 * math.pi / length)
            both = torch.stack([angle.sin(), angle.cos()], dim=-1).to(x.dtype)
            features.append(torch.where(mask[:, d : d + 1], both, 0.0))
        return torch.cat([*features, (~mask).to(x.dtype)], dim=-1)

    def extra_repr(self) -> str:
        return f"num_columns={len(self.cells)}, num_features={self.num_features}"


def _gated(x_shape: Shape, latent_dim: int, context_dim: int = 0) -> Encoder:
    return DiagonalNormal(x_shape, latent_dim, GatedMLP, context_dim)


def _taking(context_dim: int, part: Callable[..., Any], needed: bool = False) -> Callable[..., Any]:
    """Returns a callable that builds a part for a context, where the part can take one."""
    if not context_dim:
        return part
    before = getattr(part, "keywords", {}).get("context_dim", 0)
    if before not in (0, context_dim):
        raise ValueError(f"context_dim is {before}, but the context has {context_dim} features. Leave context_dim out.")
    made = class_of(part)
    if "context_dim" in inspect.signature(made).parameters:
        return partial(part, context_dim=context_dim)
    if needed:
        raise ValueError(f"a likelihood given a context must take context_dim, and {made.__name__} does not.")
    return part


def table_vae(
    columns: Sequence[HasCells | Classes | Numbers],
    latent_dim: int = 16,
    *,
    context: Sequence[HasCells | Classes | Numbers] = (),
    prior: Callable[..., Prior] = StandardNormal,
    likelihood: Callable[..., Likelihood] = Tabular,
    encoder: Callable[..., Encoder] = _gated,
) -> MissingDataVAE:
    r"""Returns a VAE of the rows of a table, whose cells may be missing.

    .. math:: p(x_{\mathrm{obs}}, z) = p(z) \prod_{d\,\mathrm{observed}} p_d(x_d \mid z), \qquad
        q(z \mid x_{\mathrm{obs}})

    Cells are missing at random: what is missing adds nothing to log p, and the encoder sees which cells are missing.
    Train it on ``data.split_missing(schema.encode(frame))``.

    Given other columns c of the rows, all three factors are conditional, and log p is that of x given c. Cells of c may
    be missing too. The model and the guide then take x, the mask and the features of c, as in the example.

    Args:
        columns: the columns, those of a :class:`pyrovae.data.Schema` that are modelled, or their ``.cells``.
        latent_dim: number of latent dimensions.
        context: columns to condition on, ``schema.context``.
        prior: called with `latent_dim`, or with the encoder if its first argument has this name.
        likelihood: called with `latent_dim` and `columns`.
        encoder: called with the number of features of a row, as :class:`TableFeatures` makes them, and `latent_dim`.
            With a context, all three are called with ``context_dim`` too; those without such an argument are not.

    Raises:
        ValueError: when there is a context, and the likelihood does not take one.

    >>> vae = table_vae([Numbers(40.0, 10.0), Classes(3)], latent_dim=2)
    >>> vae.sample(5).shape
    torch.Size([5, 2])
    >>> sex = [Classes(2)]
    >>> vae = table_vae([Numbers(40.0, 10.0), Classes(3)], latent_dim=2, context=sex)
    >>> c, observed = torch.tensor([[1.0], [0.0]]), torch.tensor([[True], [False]])
    >>> vae.sample(5, TableFeatures(sex)(c, observed)).shape
    torch.Size([5, 2, 2])
    """
    features, context_dim = TableFeatures(columns), TableFeatures(context).num_features
    p = _taking(context_dim, likelihood, needed=True)(latent_dim, columns)
    q = _taking(context_dim, encoder)(features.num_features, latent_dim)
    return MissingDataVAE(make_prior(_taking(context_dim, prior), latent_dim, q), p, q, features)


class _Constant(nn.Module):
    """A network whose output is the same for every input.

    Args:
        size: the width of the output.
    """

    def __init__(self, size: int):
        super().__init__()
        self.output = nn.Parameter(torch.zeros(size))

    def forward(self, z: Tensor) -> Tensor:
        return self.output.expand(*z.shape[:-1], -1)


def fit_independent_columns(
    columns: Sequence[HasCells | Classes | Numbers], x: Tensor, *, num_steps: int = 200, max_rows: int = 5_000
) -> Tabular:
    r"""Fits each column by itself: the baseline of a VAE of a table, and what is usual for each column.

    .. math:: p(x) = \prod_d p_d(x_d)

    The distributions are those of :class:`~pyrovae.likelihoods.Tabular`, with parameters that maximise the likelihood.

    Args:
        columns: the columns, those of a :class:`pyrovae.data.Schema` that are modelled, or their ``.cells``.
        x: the training data, ``(size, len(columns))``, NaN where a cell is missing.
        num_steps: steps of the optimizer.
        max_rows: rows that are used, evenly spread; enough for a column by itself.

    Returns:
        The likelihood, which does not depend on z; :func:`log_prob_of_cells` scores data by it.

    >>> x = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    >>> log_prob_of_cells(fit_independent_columns([Classes(2)], x), x[:2]).exp().round(decimals=2)
    tensor([[0.2500],
            [0.7500]])
    """
    x = x[:: max(1, len(x) // max_rows)]
    likelihood = Tabular(1, columns, lambda _, size: _Constant(size if isinstance(size, int) else size[0]), 8)
    network = likelihood.network
    with torch.no_grad():
        network.output.copy_(likelihood.output_for(x))  # type: ignore[operator]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = -log_prob_of_cells(likelihood, x).sum() / len(x)
        loss.backward()
        optimizer.step()
        schedule.step()
    return likelihood.requires_grad_(False)


def log_prob_of_cells(likelihood: Tabular, x: Tensor) -> Tensor:
    """Returns the log-probability or log-density of each cell in own units, 0 where missing, ``(size, columns)``.

    Args:
        likelihood: one that does not depend on z, of :func:`fit_independent_columns`.
        x: the data, ``(size, columns)``, NaN where a cell is missing.
    """
    p = likelihood(x.new_zeros(1, 1)).base_dist
    here = ~x.isnan()
    log_prob = p.log_prob(torch.where(here, x, p.filler.to(x.dtype)))
    return torch.where(here, log_prob, 0.0)
