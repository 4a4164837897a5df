"""The likelihood of a row of a table."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.distributions import Classes, Numbers, Scales
from pyrovae.likelihoods.base import Likelihood
from pyrovae.nn import GatedMLP, Network


class HasCells(Protocol):
    """A column of a table, such as one of a :class:`pyrovae.data.Schema`: it says what its cells are."""

    @property
    def cells(self) -> Classes | Numbers:
        """What the model must know of the column."""


def cells_of(columns: Sequence[HasCells | Classes | Numbers]) -> list[Classes | Numbers]:
    """Returns what a model must know of each column."""
    wrong = [c for c in columns if not (isinstance(c, (Classes, Numbers)) or hasattr(c, "cells"))]
    if wrong:
        raise TypeError(f"columns must be those of a schema, such as schema.modelled, got {wrong[0]!r}.")
    return [c if isinstance(c, (Classes, Numbers)) else c.cells for c in columns]


class Tabular(Likelihood):
    r"""Rows of a table with columns of numbers, counts, classes and times: one decoder with a head for each column.

    .. math:: p(x \mid z) = \prod_d p_d(x_d \mid \mathrm{network}(z)_d)

    Numbers are a mixture of logistic distributions and of single values (spikes) that the column takes very often, on
    a scale of the column, as :class:`~pyrovae.distributions.LogisticCells`; rounded ones and counts have probabilities,
    as :class:`~pyrovae.distributions.RoundedLogisticCells`; classes are categorical. Densities are in the units of the
    data, so that models with other scales can be compared.

    Args:
        latent_dim: number of latent dimensions.
        columns: the columns, those of a :class:`pyrovae.data.Schema` that are modelled, or their ``.cells``.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, width)``; the width of its
            output is the sum of the parameters of all columns.
        num_components: the number of logistic distributions in the mixture of a column of numbers.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when there is no column, or `num_components` is below 1.

    References:
        Handling Incomplete Heterogeneous Data Using VAEs, A. Nazabal, P. M. Olmos, Z. Ghahramani and I. Valera, 2020,
        https://arxiv.org/abs/1807.03653; Modeling Tabular Data Using Conditional GAN, L. Xu, M. Skoularidou,
        A. Cuesta-Infante and K. Veeramachaneni, 2019, https://arxiv.org/abs/1907.00503.

    >>> columns = [Numbers(40.0, 10.0, step=1.0), Classes(3), Numbers(0.0, 1.0)]
    >>> p = Tabular(2, columns)(torch.zeros(5, 2))
    >>> p.log_prob(torch.tensor([39.0, 2.0, 0.123])).shape
    torch.Size([5])
    """

    inverse: Tensor

    def __init__(
        self,
        latent_dim: int,
        columns: Sequence[HasCells | Classes | Numbers],
        network: Network = GatedMLP,
        num_components: int = 4,
        context_dim: int = 0,
    ):
        cells = cells_of(columns)
        if not cells:
            raise ValueError("columns must hold at least one column.")
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        groups: dict[tuple[str, int], list[int]] = {}
        for d, cell in enumerate(cells):
            if isinstance(cell, Classes):
                groups.setdefault(("classes", cell.num_classes), []).append(d)
            else:
                groups.setdefault(("numbers", cell.step is not None), []).append(d)
        heads = [_head([cells[d] for d in index], num_components) for index in groups.values()]
        sizes = [head.num_columns * head.num_params for head in heads]
        width = sum(sizes)
        super().__init__(latent_dim, len(cells), network, context_dim, param_shape=width)
        self.cells, self.num_components, self.sizes = cells, num_components, sizes
        self.heads = nn.ModuleList(heads)
        for g, index in enumerate(groups.values()):
            self.register_buffer(f"index{g}", torch.tensor(index), persistent=False)
        inverse = torch.tensor([d for index in groups.values() for d in index]).argsort()
        self.register_buffer("inverse", inverse, persistent=False)

    def _index(self) -> list[Tensor]:
        return [getattr(self, f"index{g}") for g in range(len(self.heads))]

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return self.columns_at(self.parameters_of(z, context)).to_event(1)

    def columns_at(self, parameters: Tensor) -> distributions.Columns:
        """Returns the distribution of independent cells for the output of the decoder."""
        pairs = zip(self.heads, parameters.split(self.sizes, dim=-1), strict=True)
        parts = [head(part.unflatten(-1, (cast(_Head, head).num_columns, -1))) for head, part in pairs]
        return distributions.Columns(parts, self._index(), self.inverse)

    def output_for(self, x: Tensor) -> Tensor:
        """Returns the output at which each column has about its distribution in the data x, NaN where missing."""
        pairs = zip(self.heads, self._index(), strict=True)
        return torch.cat([cast(_Head, head).output_for(x[:, index]).flatten() for head, index in pairs])


class _Head(nn.Module, ABC):
    """Base of what turns the output of the decoder into distributions of some columns."""

    num_columns: int
    num_params: int

    @abstractmethod
    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        """Returns the distributions for parameters of shape ``(*leading, num_columns, num_params)``."""

    @abstractmethod
    def output_for(self, x: Tensor) -> Tensor:
        """Returns the parameters that fit data, ``(size, num_columns)``, NaN where missing."""


class _ClassesHead(_Head):
    """Categorical distributions of columns that have equally many classes.

    Args:
        cells: the columns.
    """

    def __init__(self, cells: Sequence[Classes]):
        super().__init__()
        self.num_columns, self.num_params = len(cells), cells[0].num_classes

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        return distributions.Categorical(logits=parameters, validate_args=False)

    def output_for(self, x: Tensor) -> Tensor:
        classes = torch.arange(self.num_params, device=x.device)
        counts = (x.unsqueeze(-1) == classes).sum(0) + 0.5  # half a datum for a class that does not occur
        return (counts / counts.sum(-1, keepdim=True)).log()


class _NumbersHead(_Head):
    """Mixtures of logistic distributions and single values, for columns that all have a step, or none.

    Args:
        cells: the columns.
        num_components: the number of logistic distributions.
    """

    def __init__(self, cells: Sequence[Numbers], num_components: int):
        super().__init__()
        self.scales, self.num_components = Scales(cells), num_components
        self.num_columns, self.num_params = len(cells), 3 * num_components + self.scales.num_spikes
        self.kind = distributions.RoundedLogisticCells if self.scales.is_rounded else distributions.LogisticCells

    def forward(self, parameters: Tensor) -> dist.TorchDistribution:
        m = self.num_components
        loc, log_scale, logits = parameters.split([m, m, self.num_params - 2 * m], dim=-1)
        return self.kind(logits, loc, log_scale, self.scales, validate_args=False)

    def output_for(self, x: Tensor) -> Tensor:
        m, outputs = self.num_components, []
        is_spike = self.scales.is_spike(x)
        u = self.scales.standardize(x)
        for d in range(self.num_columns):
            values = u[:, d][~is_spike[:, d].any(-1) & u[:, d].isfinite()]
            counts = torch.cat([values.new_tensor([float(len(values))] * m) / m, is_spike[:, d].sum(0)]) + 0.5
            if len(values):
                # Component k stands for the k-th part of the sorted values.
                cuts = values.double().quantile(torch.linspace(0.005, 0.995, m + 1).to(values.device).double())
                scale = (cuts[1:] - cuts[:-1]) / 4
                loc = (cuts[1:] + cuts[:-1]) / 2
            else:
                loc, scale = torch.zeros(m), torch.ones(m)
            scale = scale.clamp_min(math.exp(-4.0))
            outputs.append(torch.cat([loc.to(x), scale.log().to(x), (counts / counts.sum()).log().to(x)]))
        return torch.stack(outputs)


def _head(cells: Sequence[Classes | Numbers], num_components: int) -> _Head:
    numbers = [c for c in cells if isinstance(c, Numbers)]
    return (
        _NumbersHead(numbers, num_components) if numbers else _ClassesHead([c for c in cells if isinstance(c, Classes)])
    )
