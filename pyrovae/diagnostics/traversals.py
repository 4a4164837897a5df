"""What each latent dimension does: one dimension at a time, seen through the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrovae.diagnostics.base import Diagnosis, ReportInputs, check_at_least, in_memory, names_of
from pyrovae.diagnostics.latent_space import LatentSpace
from pyrovae.inference.running import evaluation_mode
from pyrovae.plots.drawing import are_images, draw_grid_of_curves, draw_rows_of_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Traversals", "traversals"]

_MAX_DIMS = 8  # unless they are named
_IDLE = 0.05  # a dimension with less than this share of the largest change counts as idle
_MAX_PANELS = 3  # data in the picture


@dataclass(frozen=True)
class Traversals(Diagnosis):
    """The effect of each latent dimension on the decoded mean, over the range of the aggregate posterior.

    Args:
        dims: the dimensions that move, among the concatenated latents.
        names: their names.
        values: values of each dimension, shape ``(dims, steps)``.
        latents: the latents at the start, shape ``(num_data, total)``.
        data: the data at the start, shape ``(num_data, *x_shape)``.
        decoded: means of p(x | z), shape ``(num_data, dims, steps, *x_shape)``.
        change: root mean square change by each dimension, over data, steps and elements, shape ``(dims,)``, in the
            units of the data.
        site: the observed site.
    """

    question: ClassVar[str] = "What does each dimension do?"

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
                "No dimension changes the data, so that the decoder ignores the latents: warm up with "
                "bounds.ELBO(beta=bounds.Linear(...)), keep nats with bounds.FreeBits, or weaken the decoder."
            )
        finding = f"{', '.join(self.names[i] for i in order[:3])} change{'s' * (len(order) == 1)} the data most"
        idle = [self.names[i] for i in order if self.change[i] < _IDLE * strongest]
        if idle:
            finding += f"; {_listed(idle)} hardly at all: a smaller latent_dim, or bounds.FreeBits to use all of it"
        return finding + "."

    def numbers(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "num_data": len(self.data),
            "dimensions": self.names,
            "lowest": self.values[:, 0],
            "highest": self.values[:, -1],
            "change": self.change,
        }

    def draw(self) -> "Figure":
        """Draws the effect of each dimension on the first data, one row per dimension: the datum, then the decoded."""
        count = min(len(self.data), _MAX_PANELS)
        order = self.change.argsort(descending=True).tolist()
        labels = [f"{self.names[i]}\n±{self.change[i].item():.2g}" for i in order]
        title = "from the lowest to the highest value of a dimension (±: root mean square change)"
        if not are_images(self.data):
            rows = [[self.decoded[n, i] for n in range(count)] for i in order]
            data = [[self.data[n] for n in range(count)] for _ in order]
            return draw_grid_of_curves(rows, data, labels, title)
        panels = [
            torch.cat([self.data[n].expand(len(order), 1, *self.data.shape[1:]), self.decoded[n, order]], dim=1)
            for n in range(count)
        ]
        return draw_rows_of_images(panels, labels, [0], title)

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Traversals":
        return traversals(inputs.model, inputs.guide, *inputs.args)

    def table(self) -> list[str]:
        width = max(9, *(len(name) for name in self.names))
        lines = [
            f'traversals of "{self.site}": {len(self.data)} data, {self.values.shape[1]} steps a dimension',
            f"{'dimension':{width}}{'from':>10}{'to':>10}{'RMS change':>14}",
        ]
        for i in self.change.argsort(descending=True).tolist():
            low, high = self.values[i, 0].item(), self.values[i, -1].item()
            lines.append(f"{self.names[i]:{width}}{low:10.3f}{high:10.3f}{self.change[i].item():14.4g}")
        return lines


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
    r"""Moves one latent dimension of a datum at a time and decodes.

    .. math:: \mathrm{E}[x \mid z_1, \dots, z_{d - 1}, v, z_{d + 1}, \dots, z_D], \qquad
        z = \mathrm{E}_{q(z \mid x_n)}[z], \quad v \text{ from the 2.5% to the 97.5% quantile of } q(z_d)

    In a hierarchy, normal latents below one that moves keep their distance to their conditional mean, in standard
    deviations, and so move with it; other latents stay. Modules run in evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: arguments of both; the range of the aggregate posterior is over all the data.
        site: the observed site to look at; by default the only one.
        num_data: number of data to start from, the first ones.
        dims: the dimensions, among the latents concatenated in the guide's order; by default the at most eight whose
            posterior means vary most.
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
    args, kwargs, size = in_memory(max(num_data, 2), "traversals", model, args, kwargs)
    with evaluation_mode():
        space = LatentSpace(model, guide, size, args, kwargs, site)
        total = space.means.shape[1]
        if dims is None:
            dims = space.means.var(0).argsort(descending=True)[:_MAX_DIMS].tolist()
        elif not dims or not all(isinstance(d, int) and 0 <= d < total for d in dims):
            raise ValueError(f"dims must be integers from 0 to {total - 1}, at least one, got {list(dims)}.")
        low, high = np.quantile(space.draws.cpu().numpy(), (0.025, 0.975), axis=0)
        values = torch.stack([torch.linspace(low[d], high[d], steps, dtype=space.means.dtype) for d in dims])
        start = space.means[:num_data]
        moved = start.repeat(len(dims) * steps, 1, 1)
        for i, d in enumerate(dims):
            moved[i * steps : (i + 1) * steps, :, d] = values[i].unsqueeze(-1).to(moved.device)
        site, data, decoded = space.decode(slice(0, num_data), moved, following=True)
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
        site=site,
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
