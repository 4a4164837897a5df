"""What is between data in the latent space, seen through the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyrovae.diagnostics.base import Diagnosis, ReportInputs, check_at_least, in_memory
from pyrovae.diagnostics.latent_space import LatentSpace
from pyrovae.inference.running import evaluation_mode
from pyrovae.plots.drawing import are_images, draw_grid_of_curves, draw_rows_of_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Interpolations", "interpolations"]

_JUMP = 0.5  # a path with a larger share of its length in one step counts as a jump


@dataclass(frozen=True)
class Interpolations(Diagnosis):
    """Paths between pairs of data in the latent space.

    Args:
        pairs: the rows of the data at the ends of each path.
        ends: these data, shape ``(pairs, 2, *x_shape)``.
        latents: the paths, shape ``(pairs, steps, total)``.
        decoded: means of p(x | z) along them, shape ``(pairs, steps, *x_shape)``.
        change: root mean square of the change from one step to the next, shape ``(pairs, steps - 1)``.
        site: the observed site.
        spherical: whether the paths are arcs.
    """

    question: ClassVar[str] = "What lies between data?"

    pairs: list[tuple[int, int]]
    ends: Tensor
    latents: Tensor
    decoded: Tensor
    change: Tensor
    site: str
    spherical: bool

    @property
    def detour(self) -> Tensor:
        """Length of each path through the decoded data, over the distance of its ends, shape ``(pairs,)``."""
        straight = (self.decoded[:, -1] - self.decoded[:, 0]).flatten(1).square().mean(1).sqrt()
        return self.change.sum(1) / straight

    @property
    def largest_step(self) -> Tensor:
        """Share of the largest step in the length of each path, shape ``(pairs,)``."""
        return self.change.amax(1) / self.change.sum(1)

    @property
    def verdict(self) -> str:
        share = self.largest_step.nan_to_num(0.0)
        even = 1 / self.change.shape[1]
        if not bool(self.change.sum() > 0):
            return (
                "The paths do not change the data, so that the decoder ignores the latents: see diagnostics.collapse."
            )
        jumps = int((share > max(_JUMP, 1.5 * even)).sum())
        if jumps:
            return (
                f"{jumps} of {len(share)} paths jump, more than half of the change in one step: more regularisation "
                "(bounds.ELBO with a larger beta, a noisier likelihood), or more steps to see where."
            )
        return (
            f"Smooth: no step is more than {share.max().item():.0%} of its path (equal steps would be {even:.0%} each)."
        )

    def numbers(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "pairs": self.pairs,
            "spherical": self.spherical,
            "length": self.change.sum(1),
            "detour": self.detour,
            "largest_step": self.largest_step,
        }

    def draw(self) -> "Figure":
        """Draws the paths, one row per pair: the data at both ends, and the decoded latents between them."""
        labels = [f"{a} to {b}" for a, b in self.pairs]
        title = f"data at both ends, and decoded along {'arcs' if self.spherical else 'lines'} between their latents"
        if not are_images(self.ends[:, 0]):
            return draw_grid_of_curves([[d] for d in self.decoded], [[ends] for ends in self.ends], labels, title)
        rows = torch.cat([self.ends[:, :1], self.decoded, self.ends[:, 1:]], dim=1)
        return draw_rows_of_images([rows], labels, [0, rows.shape[1] - 2], title)

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Interpolations":
        return interpolations(inputs.model, inputs.guide, *inputs.args)

    def table(self) -> list[str]:
        kind = "arcs" if self.spherical else "straight lines"
        lines = [
            f'interpolations of "{self.site}": {len(self.pairs)} {kind} of {self.latents.shape[1]} steps',
            f"{'data':>15}{'RMS length':>14}{'length / distance':>20}{'largest step':>15}",
        ]
        rows = zip(self.pairs, self.change.sum(1), self.detour, self.largest_step, strict=True)
        for (a, b), length, detour, share in rows:
            lines.append(f"{f'{a} to {b}':>15}{length:14.4g}{detour:20.2f}{f'{share:.0%}':>15}")
        return lines


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
    r"""Decodes the latents between those of two data, on a straight line or an arc.

    .. math:: z_t = (1 - t)\, z_a + t\, z_b \quad\text{or}\quad
        z_t = \frac{\sin((1 - t) \theta)\, z_a + \sin(t \theta)\, z_b}{\sin \theta}, \qquad
        \cos \theta = \frac{z_a^\top z_b}{\lVert z_a \rVert \lVert z_b \rVert}

    An arc keeps the distance from the origin, at which a standard normal prior in many dimensions has its mass, and
    stays on a sphere. The ends are posterior means; all latents move together, each site on its own arc. Other
    arguments of the model, such as a context, are those of the first datum of a pair. Modules run in evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: arguments of both.
        site: the observed site to look at; by default the only one.
        pairs: rows of the data at the two ends; by default the first and the second, the third and the fourth, and so
            on, at most five.
        steps: points on a path with its ends, at least 2.
        spherical: whether the paths are arcs.
        **kwargs: as `args`.

    Returns:
        :class:`Interpolations`.

    Raises:
        ValueError: when an argument is out of range, there are fewer than 2 data, latents are discrete, or a path
            leaves their support.

    References:
        Sampling Generative Networks, T. White, 2016, https://arxiv.org/abs/1609.04468.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> interpolations(vae.model, vae.guide, torch.randn(50, 3), pairs=[(0, 1), (0, 7)], steps=5).decoded.shape
    torch.Size([2, 5, 3])
    """
    check_at_least("steps", steps, 2)
    args, kwargs, size = in_memory(2, "interpolations", model, args, kwargs)
    if pairs is None:
        pairs = [(i, i + 1) for i in range(0, min(size, 10) - 1, 2)]
    given = [tuple(pair) for pair in pairs]
    if not given or not all(len(pair) == 2 and all(0 <= i < size for i in pair) for pair in given):
        raise ValueError(f"pairs must be pairs of rows from 0 to {size - 1}, at least one, got {given}.")
    pairs = [(first, second) for first, second in given]
    ends = torch.tensor(pairs)
    with evaluation_mode():
        space = LatentSpace(model, guide, size, args, kwargs, site)
        a, b = space.means[ends.T.to(space.means.device)]
        t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).reshape(-1, 1, 1)
        interpolate = _arc if spherical else torch.lerp
        a, b = a.expand(steps, -1, -1), b.expand(steps, -1, -1)
        path = torch.cat([interpolate(a[..., here], b[..., here], t) for here in space.columns.values()], dim=-1)
        site, first, decoded = space.decode(ends[:, 0], path)
        _, second, _ = space.decode(ends[:, 1], path[-1:])
    decoded = decoded.movedim(1, 0)
    return Interpolations(
        pairs=pairs,
        ends=torch.stack([first, second], dim=1),
        latents=path.movedim(1, 0),
        decoded=decoded,
        change=(decoded[:, 1:] - decoded[:, :-1]).flatten(2).square().mean(2).sqrt(),
        site=site,
        spherical=spherical,
    )


def _arc(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Returns points on an arc between vectors; on a line if the vectors are parallel."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).unsqueeze(-1).clamp(-1, 1)
    angle, sine = cosine.acos(), (1 - cosine.square()).sqrt()
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    return torch.where(sine > 1e-4, arc, torch.lerp(a, b, t))
