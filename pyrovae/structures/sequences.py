"""What models of sequences have in common: masks and contexts of their steps, and particles that filter them."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pyrovae.inference.filtering import Filtered, run_filter, systematic
from pyrovae.inference.messages import check_later
from pyrovae.inference.structure import inspect
from pyrovae.nn.base import check_count
from pyrovae.vae import Registered


class SequenceVAE(Registered):
    """Base of the models of sequences, ``(batch, time, *x_shape)``, with masks of the observed steps.

    Their latents are one site "z", or with :meth:`model_by_step` and :meth:`guide_by_step` sites "z1", "z2", ...
    """

    @abstractmethod
    def model_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The generative process with a site for each state and each observed step, in their order."""

    @abstractmethod
    def guide_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The amortised posterior with a site for each state."""

    @abstractmethod
    def check_vector(self, context: Tensor | None) -> None:
        """Raises a ValueError if the parts do not take the context of a step."""

    def mask_of(self, x: Tensor, mask: Tensor | None, context: Tensor | None) -> Tensor:
        """Checks mask and context; returns the mask as booleans."""
        self.check_vector(context)
        if context is not None and (context.dim() != 3 or context.shape[:2] != x.shape[:2]):
            raise ValueError(
                f"context must have shape {(*x.shape[:2], 'context_dim')}, a vector for each step; got "
                f"{tuple(context.shape)}."
            )
        if mask is None:
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, but x has {tuple(x.shape[:2])} steps: give one value for each "
                "step of each sequence."
            )
        mask = mask.bool()
        some = mask.any(1)
        if not check_later(some.all()) and not bool(some.all()):
            raise ValueError(
                f"mask has no observed step in {int((~some).sum())} of {len(x)} sequences, first in number "
                f"{int((~some).nonzero()[0])}. Remove those sequences."
            )
        return mask

    def filter_states(self, x: Tensor, mask: Tensor, context: Tensor | None, num_particles: int) -> Filtered:
        """Runs a particle filter, for a mask that was checked.

        Raises:
            ValueError: when all particles of a sequence die.
        """
        check_count(num_particles, "num_particles")
        # In place of hidden values, which may be NaN: a step that the likelihood takes.
        seen = mask.view(*mask.shape, *(1,) * (x.dim() - 2))
        args = (torch.where(seen, x, x[mask][0]), mask, context)
        structure = inspect(self.model_by_step, self.guide_by_step, *args)
        run = run_filter(self.model_by_step, self.guide_by_step, structure, num_particles, 0.5, systematic, args, {})
        died = ~(run.log_z[0] > -math.inf)
        if bool(died.any()):
            raise ValueError(
                f"all {num_particles:,} particles of {int(died.sum())} of {len(x)} sequences have weight zero, first "
                f"of number {int(died.nonzero()[0])}: no state that was drawn explains the data. Train the guide, or "
                "take more particles."
            )
        return run

    def draw_paths(self, x: Tensor, mask: Tensor, context: Tensor | None, num_particles: int) -> Tensor:
        """Returns the last particles of a filter with the states of their ancestors.

        Their shape is ``(num_particles, batch, time, latent_dim)``; they are equally weighted and in random order.
        """
        run = self.filter_states(x, mask, context, num_particles)
        states = torch.stack([run.guide[f"z{t + 1}"]["value"] for t in range(x.shape[1])], dim=-2)
        chosen = systematic(run.log_w[0].softmax(0))
        chosen = chosen.gather(0, torch.rand_like(run.log_w[0]).argsort(0))
        return states.gather(0, chosen[..., None, None].expand_as(states))


def until_last(mask: Tensor) -> Tensor:
    """Returns which steps are not after the last observed one."""
    return mask.flip(1).cummax(1).values.flip(1)


def check_generated(num_samples: int, num_steps: int, context: Tensor | None) -> None:
    """Raises a ValueError when numbers of draws and steps are out of range, or a context has other steps."""
    check_count(num_samples, "num_samples", 0)
    check_count(num_steps, "num_steps")
    if context is not None and (context.dim() != 3 or context.shape[1] != num_steps):
        raise ValueError(f"context must have shape (batch, {num_steps}, context_dim), got {tuple(context.shape)}.")


def split_context(
    context: Tensor | None, mask: Tensor | None, time: int, num_steps: int
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the context of the steps that are given and of those to forecast."""
    if context is None:
        return None, None
    if mask is not None or context.shape[1] != time + num_steps:
        raise ValueError(
            f"context must have {time + num_steps} steps, the given ones and those to come, and no mask; got shape "
            f"{tuple(context.shape)} and mask={mask if mask is None else tuple(mask.shape)}."
        )
    return context[:, :time], context[:, time:]
