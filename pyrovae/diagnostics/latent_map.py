"""Where the data are: a map of their latents."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrovae.diagnostics.base import Diagnosis, ReportInputs, check_at_least, in_memory, names_of
from pyrovae.diagnostics.latent_space import LatentSpace
from pyrovae.inference.running import evaluation_mode
from pyrovae.plots.drawing import add_legend_of_labels, are_images, grid_of, new_figure, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LatentMap", "latent_map"]


@dataclass(frozen=True)
class LatentMap(Diagnosis):
    """The latents of the data in a plane; for two latent dimensions, with the decoded plane.

    Args:
        latents: posterior means, shape ``(batch, total)``.
        columns: the columns of each site among the `total` dimensions.
        coordinates: the first two principal components, or the latents themselves if they have one or two dimensions,
            shape ``(batch, 2)``.
        explained: share of the variance of the latents along both axes, shape ``(2,)``.
        labels: classes of the data, shape ``(batch,)``, or None.
        agreement: share of the data whose nearest neighbour, in all dimensions, has the same label; None without
            labels.
        chance: the same for a random neighbour.
        grid: coordinates of the decoded points along each axis, shape ``(2, points)``; None unless the latents have two
            dimensions that can move freely.
        decoded: means of p(x | z), row by row from the top, shape ``(points, points, *x_shape)``; None without a grid.
    """

    question: ClassVar[str] = "Where are the data?"

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
            finding = (
                f"The map shows all {total} latent dimensions" if total > 1 else "The map shows the latent dimension"
            )
        elif share < 0.5:
            finding = f"The map shows only {share:.0%} of the latents' variance, so do not judge distances by it"
        else:
            finding = f"The map shows {share:.0%} of the variance of {total} latent dimensions"
        if self.agreement is not None and self.chance is not None:
            finding += f"; {self.agreement:.0%} of the data have a nearest neighbour with the same label "
            finding += f"({self.chance:.0%} by chance)"
            if self.agreement - self.chance < 0.2 * (1 - self.chance):
                finding += ": the latents hardly separate labels; more latent dimensions or a smaller beta may help"
        return finding + "."

    def numbers(self) -> dict[str, Any]:
        return {
            "num_data": len(self.latents),
            "num_dimensions": self.latents.shape[1],
            "explained": self.explained,
            "agreement": self.agreement,
            "chance": self.chance,
        }

    def draw(self) -> "Figure":
        """Draws the latents of the data in a plane, and the decoded plane if it consists of images."""
        images = None if self.decoded is None or not are_images(self.decoded.flatten(0, 1)) else self.decoded
        figure = new_figure(6 if images is None else 11, 5)
        axes = figure.subplots(1, 1 if images is None else 2, squeeze=False)[0]
        self._draw_latents(axes[0])
        if images is not None and self.grid is not None:
            self._draw_plane(axes[1], self.grid, images)
        return figure

    @property
    def _axis_names(self) -> list[str]:
        if self.latents.shape[1] <= 2:
            return [*names_of(self.columns), ""][:2]
        first, second = self.explained
        return [f"first principal component ({first:.0%})", f"second principal component ({second:.0%})"]

    def _draw_latents(self, ax: "Axes") -> None:
        z, labels = self.coordinates.cpu().numpy(), None if self.labels is None else self.labels.cpu().numpy()
        dots = ax.scatter(z[:, 0], z[:, 1], c=labels, s=8, cmap=None if labels is None else "tab10", linewidths=0)
        if labels is not None:
            add_legend_of_labels(ax, dots)
        x, y = self._axis_names
        ax.set(xlabel=x, ylabel=y, aspect="equal", title="means of q(z | x)")

    def _draw_plane(self, ax: "Axes", grid: Tensor, images: Tensor) -> None:
        extent: list[float] = []
        for line in grid:
            half = (line[1] - line[0]).item() / 2
            extent += [line[0].item() - half, line[-1].item() + half]
        show(ax, grid_of(images.flatten(0, 1), images.shape[1]), extent=extent, aspect="auto")
        x, y = self._axis_names
        ax.set(xlabel=x, ylabel=y, title="means of p(x | z) over the plane")

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "LatentMap":
        return latent_map(inputs.model, inputs.guide, *inputs.args, labels=inputs.labels)

    def table(self) -> list[str]:
        lines = [
            f"latent map: {len(self.latents):,} data, {self.latents.shape[1]} latent dimensions",
            f"{'axis':>4}{'from':>10}{'to':>10}{'share of the variance':>24}",
        ]
        for i, share in enumerate(self.explained.tolist()):
            here = self.coordinates[:, i]
            lines.append(f"{i + 1:4}{here.min().item():10.3f}{here.max().item():10.3f}{f'{share:.1%}':>24}")
        return lines


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

    Two latent dimensions are shown as they are, together with a decoded grid over 95% of the aggregate posterior along
    each axis; other arguments of the model, such as a context, are those of the first datum.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: arguments of both.
        labels: classes of the data, shape ``(batch,)``, to colour by and to compare between neighbours.
        site: the observed site to decode; by default the only one.
        points: points of the grid along each axis, at least 2.
        **kwargs: as `args`.

    Returns:
        A :class:`LatentMap`.

    Raises:
        ValueError: when there are fewer than 3 data, `labels` has another length, `points` is below 2, or latents are
            discrete.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> result = latent_map(vae.model, vae.guide, torch.randn(50, 3), points=5)
    >>> result.coordinates.shape, result.decoded.shape
    (torch.Size([50, 2]), torch.Size([5, 5, 3]))
    """
    check_at_least("points", points, 2)
    args, kwargs, size = in_memory(3, "latent_map", model, args, kwargs)
    if labels is not None and tuple(labels.shape) != (size,):
        raise ValueError(f"labels must hold one class per datum, shape ({size},), got {tuple(labels.shape)}.")
    with evaluation_mode():
        space = LatentSpace(model, guide, size, args, kwargs, site)
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
            # Rows from the top, as in an image.
            rows, columns = torch.meshgrid(grid[1].flip(0), grid[0], indexing="ij")
            plane = torch.stack([columns, rows], dim=-1).reshape(-1, 1, 2).to(z.device)
            if space.inside(plane):
                _, _, decoded = space.decode(slice(0, 1), plane)
                decoded = decoded[:, 0].unflatten(0, (points, points))
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


def _agreement(z: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the share of rows whose nearest neighbour has the same label, and the share expected by chance."""
    size, same = len(z), 0
    for rows in torch.arange(size, device=z.device).split(max(1, 2**22 // size)):
        distance = torch.cdist(z[rows], z)
        distance[torch.arange(len(rows)), rows] = math.inf
        same += int((labels[distance.argmin(1)] == labels[rows]).sum())
    counts = labels.unique(return_counts=True)[1].double()
    return same / size, (counts * (counts - 1)).sum().item() / (size * (size - 1))
