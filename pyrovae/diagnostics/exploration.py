"""The latent space seen through the decoder: one dimension at a time, between data, and as a map."""

import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrovae.arguments import take_rows
from pyrovae.diagnostics.base import (
    Diagnosis,
    Latents,
    at_latents,
    beside_draws,
    check_at_least,
    expected_data,
    finite_or_none,
    in_memory,
    inspect_part,
    latents_of,
    names_of,
    observed_site,
)
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import independent_elements
from pyrovae.inference.weights import check_draws, trace_guide, trace_model

__all__ = ["Interpolations", "LatentMap", "Traversals", "interpolations", "latent_map", "traversals"]

_ROWS = 2**13  # data times draws that the guide or the model is run on at once
_DRAWS = 10  # a datum, for the range of the aggregate posterior
_SHOWN = 8  # dimensions, unless they are named
_IDLE = 0.05  # a dimension that moves the data less than this share of the strongest counts as idle
_JUMP = 0.5  # a path of which one step is more than this share counts as a jump


@dataclass(frozen=True)
class Traversals(Diagnosis):
    """What each latent dimension does to the decoded mean when it alone moves over the aggregate posterior's range.

    Args:
        dims: the dimensions that move, of all latents one beside the other.
        names: their names.
        values: where each dimension goes, shape ``(dims, steps)``.
        latents: where each datum starts, shape ``(num_data, total)``.
        data: the data that it starts from, shape ``(num_data, *x_shape)``.
        decoded: means of p(x | z), shape ``(num_data, dims, steps, *x_shape)``.
        change: root mean square of what a dimension changes, over data, steps and elements, shape ``(dims,)``, in the
            units of the data.
        site: the observed site.
    """

    dims: list[int]
    names: list[str]
    values: Tensor
    latents: Tensor
    data: Tensor
    decoded: Tensor
    change: Tensor
    site: str

    @property
    def verdict(self) -> str:
        order = self.change.argsort(descending=True).tolist()
        strongest = self.change.max().item()
        if not strongest > 1e-6 * max(self.data.abs().max().item(), 1e-30):
            return (
                "No dimension moves the data, so the decoder ignores the latents: warm up with "
                "bounds.ELBO(beta=bounds.Linear(...)), keep nats with bounds.FreeBits, or weaken the decoder."
            )
        found = f"{', '.join(self.names[i] for i in order[:3])} {'moves' if len(order) == 1 else 'move'} the data most"
        idle = [self.names[i] for i in order if self.change[i] < _IDLE * strongest]
        if idle:
            found += f"; {_listed(idle)} hardly at all: a smaller latent_dim, or bounds.FreeBits to put it to use"
        return found + "."

    def summary(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "num_data": len(self.data),
            "dimensions": self.names,
            "lowest": self.values[:, 0].tolist(),
            "highest": self.values[:, -1].tolist(),
            "change": self.change.tolist(),
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.exploration import traversals

        return traversals(self, path)

    def __str__(self) -> str:
        width = max(9, *(len(name) for name in self.names))
        lines = [
            f'traversals of "{self.site}": {len(self.data)} data, {self.values.shape[1]} steps a dimension',
            f"{'dimension':{width}}{'from':>10}{'to':>10}{'RMS change':>14}",
        ]
        for i in self.change.argsort(descending=True).tolist():
            low, high = self.values[i, 0].item(), self.values[i, -1].item()
            lines.append(f"{self.names[i]:{width}}{low:10.3f}{high:10.3f}{self.change[i].item():14.4g}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])


@torch.no_grad()
def traversals(
    model: Callable,
    guide: Callable,
    *args: Any,
    site: str | None = None,
    num_data: int = 2,
    dims: Sequence[int] | None = None,
    steps: int = 9,
    **kwargs: Any,
) -> Traversals:
    r"""Moves one latent dimension of a datum at a time, and decodes.

    .. math:: \mathrm{E}[x \mid z_1, \dots, z_{d - 1}, v, z_{d + 1}, \dots, z_D], \qquad
        z = \mathrm{E}_{q(z \mid x_n)}[z], \quad v \text{ from the 2.5% to the 97.5% quantile of } q(z_d)

    In a hierarchy, normal latents below one that moves keep their distance to their mean given those above, in units of
    its standard deviation, and so follow; other latents stay. Modules run in evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with; the range of the aggregate posterior is taken over all the data.
        site: the observed site to look at; the only one unless given.
        num_data: how many data to start from, the first ones.
        dims: which dimensions, of all latents one beside the other in the guide's order; unless given, those whose
            posterior means vary most, at most eight.
        steps: values of each dimension, at least 2.
        **kwargs: as `args`.

    Returns:
        :class:`Traversals`.

    Raises:
        ValueError: when an argument is out of range, there are fewer data than `num_data` (or than 2), latents are
            discrete, or a dimension cannot move alone (on a sphere or simplex).

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework, I. Higgins et al., 2017,
        https://openreview.net/forum?id=Sy2fzU9gl.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> traversals(vae.model, vae.guide, torch.randn(50, 3), steps=5).decoded.shape
    torch.Size([2, 2, 5, 3])
    """
    check_at_least("num_data", num_data, 1)
    check_at_least("steps", steps, 2)
    args, kwargs, size = in_memory(max(num_data, 2), "traversals", args, kwargs)
    with evaluation_mode():
        space = _Space(model, guide, size, args, kwargs)
        total = space.means.shape[1]
        if dims is None:
            dims = space.means.var(0).argsort(descending=True)[:_SHOWN].tolist()
        elif not dims or not all(isinstance(d, int) and 0 <= d < total for d in dims):
            raise ValueError(f"dims must be integers from 0 to {total - 1}, at least one, got {list(dims)}.")
        low, high = np.quantile(space.draws.cpu().numpy(), (0.025, 0.975), axis=0)
        values = torch.stack([torch.linspace(low[d], high[d], steps, dtype=space.means.dtype) for d in dims])
        start = space.means[:num_data]
        moved = start.repeat(len(dims) * steps, 1, 1)
        for i, d in enumerate(dims):
            moved[i * steps : (i + 1) * steps, :, d] = values[i].unsqueeze(-1).to(moved.device)
        data, decoded = space.decode(slice(0, num_data), moved, site, following=True)
    decoded = decoded.unflatten(0, (len(dims), steps)).movedim(2, 0)
    spread = (decoded - decoded.mean(2, keepdim=True)).square().movedim(1, 0)
    names = names_of(space.columns)
    return Traversals(
        dims=list(dims),
        names=[names[d] for d in dims],
        values=values,
        latents=start,
        data=data,
        decoded=decoded,
        change=spread.flatten(1).mean(1).sqrt(),
        site=space.site,
    )


@dataclass(frozen=True)
class Interpolations(Diagnosis):
    """What lies between pairs of data in the latent space.

    Args:
        pairs: the rows of the data at the ends of each path.
        ends: these data, shape ``(pairs, 2, *x_shape)``.
        latents: the paths, shape ``(pairs, steps, total)``.
        decoded: means of p(x | z) along them, shape ``(pairs, steps, *x_shape)``.
        change: root mean square of the change from one step to the next, shape ``(pairs, steps - 1)``.
        site: the observed site.
        spherical: whether the paths are arcs.
    """

    pairs: list[tuple[int, int]]
    ends: Tensor
    latents: Tensor
    decoded: Tensor
    change: Tensor
    site: str
    spherical: bool

    @property
    def detour(self) -> Tensor:
        """Length of each path through the decoded data, in units of the distance of its ends, shape ``(pairs,)``."""
        straight = (self.decoded[:, -1] - self.decoded[:, 0]).flatten(1).square().mean(1).sqrt()
        return self.change.sum(1) / straight

    @property
    def largest_step(self) -> Tensor:
        """Share of a path's length that its largest step is, shape ``(pairs,)``."""
        return self.change.amax(1) / self.change.sum(1)

    @property
    def verdict(self) -> str:
        share = self.largest_step.nan_to_num(0.0)
        even = 1 / self.change.shape[1]
        if not bool(self.change.sum() > 0):
            return "The paths do not move the data, so the decoder ignores the latents: see diagnostics.collapse."
        jumps = int((share > max(_JUMP, 1.5 * even)).sum())
        if jumps:
            return (
                f"{jumps} of {len(share)} paths jump, more than half of the change in one step: more regularisation "
                "(bounds.ELBO with a larger beta, a noisier likelihood), or more steps to see where."
            )
        return (
            f"Smooth: no step is more than {share.max().item():.0%} of its path (all alike would be {even:.0%} each)."
        )

    def summary(self) -> dict[str, Any]:
        def numbers(t: Tensor) -> list[float | None]:
            return [finite_or_none(value) for value in t.tolist()]

        return {
            "site": self.site,
            "pairs": [list(pair) for pair in self.pairs],
            "spherical": self.spherical,
            "length": self.change.sum(1).tolist(),
            "detour": numbers(self.detour),
            "largest_step": numbers(self.largest_step),
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.exploration import interpolations

        return interpolations(self, path)

    def __str__(self) -> str:
        kind = "arcs" if self.spherical else "straight lines"
        lines = [
            f'interpolations of "{self.site}": {len(self.pairs)} {kind} of {self.latents.shape[1]} steps',
            f"{'data':>15}{'RMS length':>14}{'length / distance':>20}{'largest step':>15}",
        ]
        rows = zip(self.pairs, self.change.sum(1), self.detour, self.largest_step, strict=True)
        for (a, b), length, detour, share in rows:
            lines.append(f"{f'{a} to {b}':>15}{length:14.4g}{detour:20.2f}{f'{share:.0%}':>15}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])


@torch.no_grad()
def interpolations(
    model: Callable,
    guide: Callable,
    *args: Any,
    site: str | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    steps: int = 9,
    spherical: bool = False,
    **kwargs: Any,
) -> Interpolations:
    r"""Decodes what lies between the latents of two data, on a straight line or an arc.

    .. math:: z_t = (1 - t)\, z_a + t\, z_b \quad\text{or}\quad
        z_t = \frac{\sin((1 - t) \theta)\, z_a + \sin(t \theta)\, z_b}{\sin \theta}, \qquad
        \cos \theta = \frac{z_a^\top z_b}{\lVert z_a \rVert \lVert z_b \rVert}

    An arc keeps the distance from the origin, where a standard normal prior in many dimensions has its mass, and stays
    on a sphere. The ends are the means of the posterior; all latents move together, each site on its own arc. What else
    the model is given, such as a context, is that of the first datum of a pair. Modules run in evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        site: the observed site to look at; the only one unless given.
        pairs: rows of the data at the two ends; unless given, the first with the second, the third with the fourth, and
            so on, at most five.
        steps: points on a path, its ends among them, at least 2.
        spherical: whether to go along arcs.
        **kwargs: as `args`.

    Returns:
        :class:`Interpolations`.

    Raises:
        ValueError: when an argument is out of range, there are fewer than 2 data, latents are discrete, or a path
            leaves their space.

    References:
        Sampling Generative Networks, T. White, 2016, https://arxiv.org/abs/1609.04468.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> interpolations(vae.model, vae.guide, torch.randn(50, 3), pairs=[(0, 1), (0, 7)], steps=5).decoded.shape
    torch.Size([2, 5, 3])
    """
    check_at_least("steps", steps, 2)
    args, kwargs, size = in_memory(2, "interpolations", args, kwargs)
    if pairs is None:
        pairs = [(i, i + 1) for i in range(0, min(size, 10) - 1, 2)]
    given = [tuple(pair) for pair in pairs]
    if not given or not all(len(pair) == 2 and all(0 <= i < size for i in pair) for pair in given):
        raise ValueError(f"pairs must be pairs of rows from 0 to {size - 1}, at least one, got {given}.")
    ends = torch.tensor(given)
    with evaluation_mode():
        space = _Space(model, guide, size, args, kwargs)
        a, b = space.means[ends.T.to(space.means.device)]
        t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).reshape(-1, 1, 1)
        path = torch.cat(
            [
                (_arc if spherical else torch.lerp)(
                    a[:, here].expand(steps, -1, -1), b[:, here].expand(steps, -1, -1), t
                )
                for here in space.columns.values()
            ],
            dim=-1,
        )
        first, decoded = space.decode(ends[:, 0], path, site)
        second, _ = space.decode(ends[:, 1], path[-1:], site)
    decoded = decoded.movedim(1, 0)
    return Interpolations(
        pairs=given,
        ends=torch.stack([first, second], dim=1),
        latents=path.movedim(1, 0),
        decoded=decoded,
        change=(decoded[:, 1:] - decoded[:, :-1]).flatten(2).square().mean(2).sqrt(),
        site=space.site,
        spherical=spherical,
    )


@dataclass(frozen=True)
class LatentMap(Diagnosis):
    """The latents of the data in a plane; of two dimensions, with what the decoder makes of the plane.

    Args:
        latents: means of the posterior, shape ``(batch, total)``.
        columns: which of the `total` dimensions belong to which site.
        coordinates: their first two principal components, or the latents themselves if they have two dimensions or one,
            shape ``(batch, 2)``.
        explained: share of the variance of the latents along both axes, shape ``(2,)``.
        labels: classes of the data, shape ``(batch,)``, or None.
        agreement: share of the data whose nearest neighbour, in all dimensions, has the same label; None without
            labels.
        chance: the same for a neighbour at random.
        grid: where the plane is decoded along each axis, shape ``(2, points)``; None unless the latents have two
            dimensions that are free to move.
        decoded: means of p(x | z), row by row from the top, shape ``(points, points, *x_shape)``; None without a grid.
    """

    latents: Tensor
    columns: dict[str, slice]
    coordinates: Tensor
    explained: Tensor
    labels: Tensor | None
    agreement: float | None
    chance: float | None
    grid: Tensor | None
    decoded: Tensor | None

    @property
    def verdict(self) -> str:
        share, total = self.explained.sum().item(), self.latents.shape[1]
        if total <= 2:
            found = f"The map is all of the {total} latent dimension{'s' if total > 1 else ''}"
        elif share < 0.5:
            found = f"The map shows only {share:.0%} of the latents' variance, so judge no distance by it"
        else:
            found = f"The map shows {share:.0%} of the variance of {total} latent dimensions"
        if self.agreement is not None:
            found += f"; {self.agreement:.0%} of the data have a nearest neighbour of their own label "
            found += f"({self.chance:.0%} by chance)"
            if self.agreement - self.chance < 0.2 * (1 - self.chance):
                found += (
                    ": the latents hardly tell labels apart, which more latent dimensions or a smaller beta may mend"
                )
        return found + "."

    def summary(self) -> dict[str, Any]:
        return {
            "num_data": len(self.latents),
            "num_dimensions": self.latents.shape[1],
            "explained": self.explained.tolist(),
            "agreement": self.agreement,
            "chance": self.chance,
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.exploration import latent_map

        return latent_map(self, path)

    def __str__(self) -> str:
        lines = [
            f"latent map: {len(self.latents):,} data, {self.latents.shape[1]} latent dimensions",
            f"{'axis':>4}{'from':>10}{'to':>10}{'share of the variance':>24}",
        ]
        for i, share in enumerate(self.explained.tolist()):
            here = self.coordinates[:, i]
            lines.append(f"{i + 1:4}{here.min().item():10.3f}{here.max().item():10.3f}{f'{share:.1%}':>24}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])


@torch.no_grad()
def latent_map(
    model: Callable,
    guide: Callable,
    *args: Any,
    labels: Tensor | None = None,
    site: str | None = None,
    points: int = 15,
    **kwargs: Any,
) -> LatentMap:
    r"""Maps the latents of all data to a plane, by their two leading principal components.

    Two latent dimensions are shown as they are, and beside them what the decoder makes of a grid over 95% of the
    aggregate posterior along each axis, with whatever else the model is given that of the first datum.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: what both are called with.
        labels: classes of the data, shape ``(batch,)``, to colour by and to look for in neighbours.
        site: the observed site to decode; the only one unless given.
        points: of the grid along each axis, at least 2.
        **kwargs: as `args`.

    Returns:
        A :class:`LatentMap`.

    Raises:
        ValueError: when there are fewer than 3 data, `labels` has not one a datum, `points` is below 2, or latents are
            discrete.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> found = latent_map(vae.model, vae.guide, torch.randn(50, 3), points=5)
    >>> found.coordinates.shape, found.decoded.shape
    (torch.Size([50, 2]), torch.Size([5, 5, 3]))
    """
    check_at_least("points", points, 2)
    args, kwargs, size = in_memory(3, "latent_map", args, kwargs)
    if labels is not None and tuple(labels.shape) != (size,):
        raise ValueError(f"labels must hold one class a datum, shape ({size},), got {tuple(labels.shape)}.")
    with evaluation_mode():
        space = _Space(model, guide, size, args, kwargs)
        z = space.means
        centred = (z - z.mean(0)).double()
        if z.shape[1] <= 2:
            flat = torch.cat([z, z.new_zeros(size, 2 - z.shape[1])], dim=1)
            variance = flat.double().var(0)
        else:
            _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
            variance = scale[:2].square() / (size - 1)
            flat = (centred @ axes[:2].T).to(z.dtype)
        grid = decoded = None
        if z.shape[1] == 2:
            low, high = np.quantile(space.draws.cpu().numpy(), (0.025, 0.975), axis=0)
            grid = torch.stack([torch.linspace(low[i], high[i], points, dtype=z.dtype) for i in range(2)])
            # From the top, as a picture is read.
            rows, columns = torch.meshgrid(grid[1].flip(0), grid[0], indexing="ij")
            plane = torch.stack([columns, rows], dim=-1).reshape(-1, 1, 2).to(z.device)
            if space.inside(plane):
                decoded = space.decode(slice(0, 1), plane, site)[1][:, 0].unflatten(0, (points, points))
            else:
                grid = None
    agreement = chance = None
    if labels is not None:
        agreement, chance = _agreement(z, labels.to(z.device))
    total = centred.var(0).sum()
    return LatentMap(
        latents=z,
        columns=space.columns,
        coordinates=flat,
        explained=(variance / total).to(z.dtype),
        labels=labels,
        agreement=agreement,
        chance=chance,
        grid=grid,
        decoded=decoded,
    )


class _Space:
    """The latents of data and the way back: means and draws of the posterior, and what is decoded from others.

    Attributes:
        means: shape ``(batch, total)``, each site's mean given the means of those before; draws where it has none.
        draws: of the aggregate posterior, shape ``(some, total)``.
        columns: which dimensions belong to which site.
        site: the observed site, once something is decoded.
    """

    def __init__(self, model: Callable, guide: Callable, size: int, args: tuple, kwargs: dict):
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.structure = inspect_part(model, guide, slice(0, 2), args, kwargs)
        means, draws = [], []
        for start in range(0, size, _ROWS // _DRAWS):
            part_args, part_kwargs = take_rows(slice(start, start + _ROWS // _DRAWS), args, kwargs)
            self.structure = check_draws(self.structure, model, guide, *part_args, **part_kwargs)
            trace = trace_guide(guide, self.structure, _DRAWS, *part_args, **part_kwargs)
            found = latents_of(trace, self.structure)
            for name in found.columns:
                if trace.nodes[name]["fn"].support.is_discrete:
                    raise ValueError(
                        f'site "{name}" is discrete, so there is nothing between its values to move through. '
                        "diagnostics.collapse tells how much discrete latents hold."
                    )
            draws.append(found.values.flatten(0, 1))
            with _AtMeans():
                trace = trace_guide(guide, self.structure, 1, *part_args, **part_kwargs)
            means.append(latents_of(trace, self.structure).values[0])
        self.columns = found.columns
        self.means, self.draws = torch.cat(means), torch.cat(draws)
        self.structure.data.check_in_order(len(self.means), size)

    def inside(self, moved: Tensor) -> bool:
        """Whether latents ``(num_draws, rows, total)`` at the first rows lie in their space."""
        return self._outside(self._at(slice(0, moved.shape[1]), moved)) is None

    def decode(
        self, rows: slice | Tensor, moved: Tensor, site: str | None, following: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the data in some rows, and the means of p(x | z) there at latents ``(num_draws, rows, total)``.

        With `following`, normal latents below others that moved keep their standardised distance to their mean.
        """
        args, kwargs = take_rows(rows, self.args, self.kwargs)
        here = self._at(rows, self.means[rows].unsqueeze(0))
        before = trace_model(self.model, here, self.structure, 1, *args, **kwargs)
        self.site = observed_site(before, site)
        decoded = []
        for part in moved.split(max(1, _ROWS // moved.shape[1])):
            there = self._at(rows, part)
            name = self._outside(there)
            if name is not None:
                raise ValueError(
                    f'latents of site "{name}" leave their space, {there.nodes[name]["fn"].support}, when they move '
                    "along straight lines. On a sphere use interpolations(..., spherical=True), on a simplex "
                    "interpolations."
                )
            with _Following(before) if following else nullcontext():
                after = trace_model(self.model, there, self.structure, len(part), *args, **kwargs)
            decoded.append(expected_data(after, self.structure, self.site))
        data = before.nodes[self.site]["value"]
        return beside_draws(data, before, self.structure, self.site)[0], torch.cat(decoded)

    def _at(self, rows: slice | Tensor, moved: Tensor) -> poutine.Trace:
        """Returns a trace of the guide on some rows, at given latents."""
        args, kwargs = take_rows(rows, self.args, self.kwargs)
        trace = trace_guide(self.guide, self.structure, 1, *args, **kwargs)
        return at_latents(trace, self.structure, Latents(moved, self.columns))

    def _outside(self, trace: poutine.Trace) -> str | None:
        """Returns the name of a site whose latents are not in its support, or None."""
        for name in self.columns:
            site = trace.nodes[name]
            if not bool(site["fn"].support.check(site["value"]).all()):
                return name
        return None


class _AtMeans(Messenger):
    """A Pyro handler that sets latents to their means, where those are known and lie in the latents' space."""

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        try:
            mean = msg["fn"].mean
        except NotImplementedError:
            return
        if bool(torch.isfinite(mean).all()) and bool(msg["fn"].support.check(mean).all()):
            msg["value"], msg["done"] = mean, True


class _Following(Messenger):
    """A Pyro handler that keeps normal latents as many standard deviations from their means as in a trace."""

    def __init__(self, before: poutine.Trace):
        super().__init__()
        self.before = before

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample) or msg["name"] not in self.before.nodes:
            return
        now, then = _normal(msg["fn"]), _normal(self.before.nodes[msg["name"]]["fn"])
        if now is not None and then is not None:
            msg["value"] = now.loc + now.scale * (msg["value"] - then.loc) / then.scale


def _normal(fn: Any) -> torch.distributions.Normal | None:
    """Returns the normal distribution of independent dimensions, or None."""
    elements = independent_elements(fn)
    return elements if isinstance(elements, torch.distributions.Normal) else None


def _arc(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Returns what lies between vectors along an arc, or on a line where they point the same way or opposite ways."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).unsqueeze(-1).clamp(-1, 1)
    angle, sine = cosine.acos(), (1 - cosine.square()).sqrt()
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    return torch.where(sine > 1e-4, arc, torch.lerp(a, b, t))


def _agreement(z: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns which share of rows has a nearest neighbour with the same label, and which has by chance."""
    size, same = len(z), 0
    for rows in torch.arange(size, device=z.device).split(max(1, 2**22 // size)):
        distance = torch.cdist(z[rows], z)
        distance[torch.arange(len(rows)), rows] = math.inf
        same += int((labels[distance.argmin(1)] == labels[rows]).sum())
    counts = labels.unique(return_counts=True)[1].double()
    return same / size, (counts * (counts - 1)).sum().item() / (size * (size - 1))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
