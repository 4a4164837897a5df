"""What models of sequences have in common: masks and contexts of their steps, and particles that filter them."""

import math
from abc import abstractmethod
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.distributions import center
from pyrovae.inference.filtering import Filtered, run_filter, systematic
from pyrovae.inference.imputation import Imputation
from pyrovae.inference.messages import check_later
from pyrovae.inference.structure import inspect
from pyrovae.nn.base import check_count
from pyrovae.parts import in_evaluation_mode, takes_context
from pyrovae.structures.smoothing import Smoothed
from pyrovae.vae import Registered


class SequenceVAE(Registered):
    """Base of the models of sequences, ``(batch, time, *x_shape)``, with masks of the observed steps.

    Their latents are one site "z", or with :meth:`model_by_step` and :meth:`guide_by_step` sites "z1", "z2", ... They
    are :class:`StateSpaceVAE` and :class:`RecurrentVAE`.
    """

    @abstractmethod
    def model_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The generative process with a site for each state and each observed step, in their order."""

    @abstractmethod
    def guide_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The amortised posterior with a site for each state."""

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """The width of the context of a step, 0 for none; that of a memory does not count."""

    @abstractmethod
    def reconstruct(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Returns the centre of the likelihood of each step at one draw from the guide, shaped like x."""

    @abstractmethod
    def smooth(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        num_samples: int = 100,
        num_particles: int = 100,
    ) -> Smoothed:
        """Draws the latents of all steps given whole sequences."""

    @abstractmethod
    def _likelihood_of(self, z: Tensor, x: Tensor, mask: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        """Returns the likelihood of each step for paths of latents, ``(num_paths, batch, time, dim)``."""

    @abstractmethod
    def _reads_draws(self) -> bool:
        """Returns whether a step that is drawn depends on the data that were drawn before."""

    @abstractmethod
    def _check_vector(self, context: Tensor | None) -> None:
        """Raises a ValueError if the parts do not take the context of a step."""

    @abstractmethod
    def _draw_first(self, num_samples: int, num_steps: int, context: Tensor | None) -> Tensor:
        """Draws whole sequences."""

    @abstractmethod
    def _draw_next(
        self, z: Tensor, x: Tensor, mask: Tensor, context: Tensor | None, coming: Tensor | None, num_steps: int
    ) -> Tensor:
        """Draws the steps after the end of sequences, for paths of their latents, ``(num_paths, batch, time, dim)``."""

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, num_steps: int, context: Tensor | None = None) -> Tensor:
        """Draws sequences from p(x), with the noise of the likelihood.

        Args:
            num_samples: number of draws; with a context, number for each of its rows.
            num_steps: their length; with a context, that of the context.
            context: shape ``(batch, num_steps, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, num_steps, *x_shape)``, or ``(num_samples, batch, num_steps, *x_shape)``.
        """
        check_count(num_samples, "num_samples", 0)
        check_count(num_steps, "num_steps")
        if context is not None and (context.dim() != 3 or context.shape[1] != num_steps):
            raise ValueError(f"context must have shape (batch, {num_steps}, context_dim), got {tuple(context.shape)}.")
        self._check_vector(context)
        return self._draw_first(num_samples, num_steps, context)

    @torch.no_grad()
    @in_evaluation_mode
    def forecast(
        self,
        x: Tensor,
        num_steps: int,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        num_samples: int = 100,
        num_particles: int = 100,
    ) -> Tensor:
        r"""Draws the steps after the end of sequences, :math:`p(x_{T+1}, \dots, x_{T+h} \mid x_1, \dots, x_T)`.

        The latents of the sequences are drawn by a particle filter, whose error falls with the number of particles.

        Args:
            x: sequences, ``(batch, time, *x_shape)``.
            num_steps: the steps to draw, :math:`h`.
            mask: their observed steps, ``(batch, time)``; a forecast starts after the last of them.
            context: shape ``(batch, time + num_steps, context_dim)``, with the steps to come after `time`, or None;
                needs a mask of None.
            num_samples: draws for each sequence.
            num_particles: particles of the filter.

        Returns:
            Shape ``(num_samples, batch, num_steps, *x_shape)``.

        Raises:
            ValueError: when all particles of a sequence die.
        """
        check_count(num_steps, "num_steps")
        check_count(num_samples, "num_samples")
        time, coming = x.shape[1], None
        if context is not None:
            if mask is not None or context.shape[1] != time + num_steps:
                raise ValueError(
                    f"context must have {time + num_steps} steps, the given ones and those to come, and no mask; got "
                    f"shape {tuple(context.shape)} and mask={mask if mask is None else tuple(mask.shape)}."
                )
            context, coming = context[:, :time], context[:, time:]
        mask = self._mask_of(x, mask, context)
        z = self._draw_paths(x, mask, context, max(num_particles, num_samples))[:num_samples]
        return self._draw_next(z, x, mask, context, coming, num_steps)

    @torch.no_grad()
    @in_evaluation_mode
    def impute(
        self,
        x: Tensor,
        mask: Tensor,
        context: Tensor | None = None,
        *,
        num_draws: int = 100,
        num_particles: int | None = None,
    ) -> Imputation:
        r"""Draws the steps that were not observed, given those before and after them.

        .. math:: x_t \sim p(x_t \mid z_1, \dots, z_t, x_{<t}), \qquad z \sim p(z \mid x_{\text{observed}})

        The latents are those of :meth:`smooth`; steps after the last observed one are forecasts. A memory of the data
        sees that a step was not observed, as in training, and not its draw. Where there is one, sequences that end
        before the last step are refused, because what follows depends on the draws before it:
        :meth:`forecast` draws that.

        Args:
            x: sequences, ``(batch, time, *x_shape)``; any values, NaN too, at the steps that were not observed.
            mask: their observed steps, ``(batch, time)``.
            context: shape ``(batch, time, context_dim)``, or None.
            num_draws: draws for each sequence.
            num_particles: particles of the filter, or of each filter; None for those of :meth:`smooth`.

        Returns:
            An :class:`~pyrovae.Imputation` whose observed steps are those of x. Its `ess` is the smallest effective
            number that :meth:`smooth` gives for a step that was not observed, or for any where none is missing.

        Raises:
            ValueError: when sequences end before the last step, and there is a memory of the data; when all particles
                of a sequence die.

        >>> from pyrovae import encoders, likelihoods, nn, priors
        >>> from pyrovae.structures import BackwardGRU, StateSpaceVAE
        >>> vae = StateSpaceVAE(
        ...     priors.StandardNormal(2),
        ...     encoders.DiagonalNormal(2, 2, nn.GatedTransition),
        ...     likelihoods.Normal(2, 3),
        ...     encoders.DiagonalNormal(2, 2, context_dim=16),
        ...     BackwardGRU(3, 16),
        ... )
        >>> mask = torch.tensor([True, True, False, False, True]).expand(4, 5)
        >>> vae.impute(torch.zeros(4, 5, 3), mask, num_draws=20).draws.shape
        torch.Size([20, 4, 5, 3])
        """
        mask = self._mask_of(x, mask, context)
        ended = ~mask[:, -1]
        if self._reads_draws() and bool(ended.any()):
            raise ValueError(
                f"{int(ended.sum())} of {len(x)} sequences end before the last step, first of number "
                f"{int(ended.nonzero()[0])}. Impute sequences of one length, and draw what follows them by forecast()."
            )
        given = {} if num_particles is None else {"num_particles": num_particles}
        states, ess = self.smooth(x, mask, context, num_samples=num_draws, **given)
        p = self._likelihood_of(states, x, mask, context)
        seen = mask.view(*mask.shape, *(1,) * (x.dim() - 2))
        centers = center(p)
        mean = centers.double().mean(0)
        mean = mean.to(centers.dtype) if centers.is_floating_point() else mean
        elsewhere = mask & ~mask.all(1, keepdim=True)
        least = torch.where(elsewhere, math.inf, ess).amin(1)
        return Imputation(torch.where(seen, x, mean), torch.where(seen, x, p.sample()), least)

    def _mask_of(self, x: Tensor, mask: Tensor | None, context: Tensor | None) -> Tensor:
        """Checks mask and context; returns the mask as booleans."""
        self._check_vector(context)
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

    def _filter_states(
        self, x: Tensor, mask: Tensor, context: Tensor | None, num_particles: int, num_runs: int = 1
    ) -> Filtered:
        """Runs particle filters, for a mask that was checked.

        Raises:
            ValueError: when all particles of a sequence die.
        """
        check_count(num_particles, "num_particles")
        # In place of hidden values, which may be NaN: a step that the likelihood takes.
        seen = mask.view(*mask.shape, *(1,) * (x.dim() - 2))
        args = (torch.where(seen, x, x[mask][0]), mask, context)
        structure = inspect(self.model_by_step, self.guide_by_step, *args)
        run = run_filter(
            self.model_by_step, self.guide_by_step, structure, num_particles, 0.5, systematic, args, {}, num_runs
        )
        died = ~(run.log_z.amax(0) > -math.inf)
        if bool(died.any()):
            raise ValueError(
                f"all {num_particles:,} particles of {int(died.sum())} of {len(x)} sequences have weight zero, first "
                f"of number {int(died.nonzero()[0])}: no state that was drawn explains the data. Train the guide, or "
                "take more particles."
            )
        return run

    def _draw_paths(self, x: Tensor, mask: Tensor, context: Tensor | None, num_particles: int) -> Tensor:
        """Returns the last particles of a filter with the states of their ancestors.

        Their shape is ``(num_particles, batch, time, latent_dim)``; they are equally weighted and in random order.
        """
        run = self._filter_states(x, mask, context, num_particles)
        states = torch.stack([run.guide[f"z{t + 1}"]["value"] for t in range(x.shape[1])], dim=-2)
        chosen = systematic(run.log_w[0].softmax(0))
        chosen = chosen.gather(0, torch.rand_like(run.log_w[0]).argsort(0))
        return states.gather(0, chosen[..., None, None].expand_as(states))


def width_of_memory(recurrence: nn.Module, *parts: nn.Module) -> tuple[int, int | None]:
    """Returns the width of a memory, and of the context that parts see beside it; None where they take any.

    Raises:
        ValueError: when no part sees the memory, or parts were built for less than it.
    """
    if not hasattr(recurrence, "width"):
        raise ValueError(f"{type(recurrence).__name__} does not state the width of its memory: give it a `width`.")
    width = int(recurrence.width)  # type: ignore[arg-type]
    stated: set[Any] = {part.context_dim for part in parts if getattr(part, "context_dim", 0)}
    if not any(map(takes_context, parts)) or stated and min(stated) < width:
        raise ValueError(
            f"the parts have context_dim={min(stated, default=0)}, but the memory of {type(recurrence).__name__} "
            f"has {width} units. Build the prior, the likelihood and the encoder with context_dim={width}, or more "
            "where steps have a context of their own."
        )
    return width, min(stated) - width if stated else None


def check_beside_memory(context: Tensor | None, width: int, context_dim: int | None) -> None:
    """Raises a ValueError if the parts, which see a memory, do not take the context of a step beside it."""
    given = 0 if context is None else context.shape[-1]
    if context_dim is not None and given != context_dim:
        raise ValueError(
            f"the context of a step has {given} numbers, but the parts were built for {context_dim}, after {width} of "
            f"the memory. Build them with context_dim={width + given}."
        )


def start_of(recurrence: nn.Module, *leading: int) -> Tensor:
    """Returns memories before the first step, ``(*leading, width)``."""
    width: Any = recurrence.width
    return next(recurrence.parameters(), torch.zeros(())).new_zeros(*leading, width)


def with_context(h: Tensor, context: Tensor | None, steps: slice | int) -> Tensor:
    """Returns the memories before some steps, followed by the contexts of these steps."""
    if context is None:
        return h
    here = context[:, steps].to(h.dtype)
    return torch.cat([h, here.expand(*h.shape[:-1], -1)], dim=-1)


def until_last(mask: Tensor) -> Tensor:
    """Returns which steps are not after the last observed one."""
    return mask.flip(1).cummax(1).values.flip(1)
