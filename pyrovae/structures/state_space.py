"""State-space models: VAEs of sequences whose latents are a Markov chain."""

import math
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from pyrovae.distributions import MarkovChain, center
from pyrovae.nn.base import Shape, as_shape, check_count
from pyrovae.nn.sequences import start_recurrence
from pyrovae.parts import (
    call,
    check_contexts,
    check_equal,
    check_module,
    check_roles,
    check_spaces,
    in_evaluation_mode,
    likelihood_at,
    takes_context,
)
from pyrovae.recorded import Recorded
from pyrovae.structures.sequences import (
    SequenceVAE,
    check_beside_memory,
    start_of,
    until_last,
    width_of_memory,
    with_context,
)
from pyrovae.structures.smoothing import Smoothed, draw_backward


class StateSpaceVAE(SequenceVAE):
    r"""A VAE of sequences: a Markov chain of latent states, and an observation of each.

    .. math:: p(x, z) = p(z_1) \prod_{t=2}^T p(z_t \mid z_{t-1}) \prod_{t=1}^T p(x_t \mid z_t), \qquad
        q(z \mid x) = \prod_{t=1}^T q(z_t \mid z_{t-1}, h_t), \quad h = \mathrm{network}(x)

    ``vae.model`` and ``vae.guide`` take ``(x, mask=None, context=None)``, with x of shape ``(batch, time, *x_shape)``
    and any number of steps. The mask, ``(batch, time)``, is True where a step was observed. A sequence ends at its last
    observed step, so that sequences of different lengths are padded and stacked; values at other steps are ignored.
    The latents of a datum are one site "z", with events of shape ``(time, latent_dim)``, and its data one site "x": all
    steps are scored in one call. :meth:`model_by_step` and :meth:`guide_by_step` are the same densities with sites
    "z1", "x1", "z2", ..., for :class:`pyrovae.bounds.FIVO` and :class:`pyrovae.estimators.ParticleFilter`.

    Args:
        prior: ``prior(context)`` returns :math:`p(z_1)`.
        transition: ``transition(z, context)`` returns :math:`p(z_t \mid z_{t-1} = z)`, such as
            ``encoders.DiagonalNormal(latent_dim, latent_dim, nn.GatedTransition)``.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x_t \mid z_t = z)`.
        encoder: ``encoder(z, h)`` returns :math:`q(z_t \mid z_{t-1} = z, h_t = h)`: an encoder of the state before,
            whose context is the summary (followed by the context of the step, if there is one). The state before the
            first is zero.
        network: ``network(x, mask)`` returns the summaries, ``(batch, time, width)``, such as :class:`BackwardGRU`.
        recurrence: ``recurrence(h, x, mask)`` returns the memories of the data after each of some steps, such as
            :class:`ForwardGRU` with a `latent_dim` of 0; its attribute `width` is that of a memory. None for a model
            whose data depend on the past by its states alone.

    With a recurrence every step depends on the data before it too, and the model is a stochastic recurrent network:

    .. math:: p(x, z) = \prod_{t=1}^T p(z_t \mid z_{t-1}, d_t)\, p(x_t \mid z_t, d_t), \qquad
        d_{t+1} = f(d_t, x_t), \quad d_1 = 0

    Given the data its states are a Markov chain, so that they can be smoothed, as those of a :class:`RecurrentVAE`
    cannot. The memory sees that a step was not observed, and what gaps do is learned from sequences with gaps. Like a
    RecurrentVAE, it draws data by :meth:`~pyrovae.structures.SequenceVAE.sample` and :meth:`model_by_step`, not by
    :meth:`model`.

    The context of a step, for parts that were built for one, has shape ``(batch, time, context_dim)``. With a
    recurrence it follows the memory, and the parts are built with the sum of both widths; the context of the encoder is
    the summary, the memory and the context of the step.

    Raises:
        ValueError: when the parts have different latent dimensions, spaces or contexts, or no part takes the memory;
            when a mask does not have the shape of the steps, or hides a whole sequence.

    References:
        Structured Inference Networks for Nonlinear State Space Models, R. G. Krishnan, U. Shalit and D. Sontag, 2017,
        https://arxiv.org/abs/1609.09869; Sequential Neural Models with Stochastic Layers, M. Fraccaro, S. K. Sonderby,
        U. Paquet and O. Winther, 2016, https://arxiv.org/abs/1605.07571.

    >>> from pyrovae import encoders, likelihoods, nn, priors
    >>> vae = StateSpaceVAE(
    ...     priors.StandardNormal(2),
    ...     encoders.DiagonalNormal(2, 2, nn.GatedTransition),
    ...     likelihoods.Normal(2, 3),
    ...     encoders.DiagonalNormal(2, 2, context_dim=16),
    ...     BackwardGRU(3, 16),
    ... )
    >>> vae.sample(5, num_steps=20).shape
    torch.Size([5, 20, 3])
    """

    def __init__(
        self,
        prior: nn.Module,
        transition: nn.Module,
        likelihood: nn.Module,
        encoder: nn.Module,
        network: nn.Module,
        recurrence: nn.Module | None = None,
    ):
        super().__init__()
        check_roles(prior=prior, likelihood=likelihood, **{"conditionals[0]": transition, "encoder": encoder})
        check_equal("latent_dim", prior=prior, transition=transition, likelihood=likelihood, encoder=encoder)
        check_spaces(prior=prior, encoder=encoder)
        check_spaces(transition=transition, encoder=encoder)
        check_contexts(prior=prior, transition=transition, likelihood=likelihood)
        self.prior, self.transition, self.likelihood = prior, transition, likelihood
        self.encoder, self.network, self.recurrence = encoder, network, recurrence
        self._beside: tuple[int, int | None] = (0, None)  # widths of the memory, and of the context that follows it
        if recurrence is not None:
            check_module("recurrence", recurrence)
            check_equal("x_shape", likelihood=likelihood, recurrence=recurrence)
            if getattr(recurrence, "latent_dim", 0):
                raise ValueError(
                    f"recurrence has latent_dim={recurrence.latent_dim}, but the memory of a StateSpaceVAE is one of "
                    "the data alone: build it with latent_dim=0."
                )
            self._beside = width_of_memory(recurrence, prior, transition, likelihood)
        stated: Any = [part.latent_dim for part in (encoder, prior) if hasattr(part, "latent_dim")]
        if not stated:
            raise ValueError("neither the encoder nor the prior states the latents' number: give one a latent_dim.")
        self._latent_dim = int(stated[0])

    @property
    def context_dim(self) -> int:
        stated = max(getattr(part, "context_dim", 0) for part in (self.prior, self.transition, self.likelihood))
        return max(stated - self._beside[0], 0)

    def model(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The generative process, with all states at site "z" and all observed steps at site "x"."""
        self.register()
        mask = self._mask_of(x, mask, context)
        context = self._given(x, mask, context)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self._chain(x.shape[1], until_last(mask), context))
            p = likelihood_at(self.likelihood, z, context)
            if pyro.sample("x", p.mask(mask).to_event(1), obs=x) is not x and self.recurrence is not None:
                raise ValueError(
                    "data cannot be drawn for all steps at once from the model of a StateSpaceVAE with a recurrence, "
                    "because a step depends on those before it: call sample(), or draw from model_by_step."
                )

    def guide(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The amortised posterior of all states at site "z"."""
        self.register()
        mask = self._mask_of(x, mask, context)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, mask, context))

    @in_evaluation_mode
    def encode(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> MarkovChain:
        r"""Returns :math:`q(z \mid x)`, with ``batch_shape == (batch,)`` and events ``(time, latent_dim)``."""
        mask = self._mask_of(x, mask, context)
        h = self._summaries(x, mask, self._given(x, mask, context))
        # The gradient of a step that is cut out of h is as large as h, for each step; that of all at once is h's.
        one_step = [step.unsqueeze(1) for step in h.unbind(1)]

        def transition(z: Tensor, steps: slice) -> dist.TorchDistribution:
            return self.encoder(z, one_step[steps.start] if steps.stop == steps.start + 1 else h[:, steps])

        initial = self.encoder(h.new_zeros(len(x), self._latent_dim), h[:, 0])
        return MarkovChain(initial, transition, x.shape[1], until_last(mask))

    def model_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The generative process with a site for each state and each observed step, in their order."""
        self.register()
        mask = self._mask_of(x, mask, context)
        observed: Any = mask  # Pyro's types of masks leave out tensors of any kind
        active: Any = until_last(mask)
        z, h = None, None if self.recurrence is None else start_of(self.recurrence, len(x))
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                here = _at(h, context, t)
                p = call(self.prior, context=here) if z is None else call(self.transition, z, context=here)
                with poutine.mask(mask=active[:, t]):
                    z = pyro.sample(f"z{t + 1}", p)
                with poutine.mask(mask=observed[:, t]):
                    step = pyro.sample(f"x{t + 1}", likelihood_at(self.likelihood, z, here), obs=x[:, t])
                if self.recurrence is not None:
                    h = self.recurrence(h, step.unsqueeze(1 - x.dim()), mask[:, t : t + 1]).squeeze(-2)

    def guide_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The amortised posterior with a site for each state."""
        self.register()
        mask = self._mask_of(x, mask, context)
        active: Any = until_last(mask)
        h = self._summaries(x, mask, self._given(x, mask, context))
        z = h.new_zeros(len(x), self._latent_dim)
        with pyro.plate("data", len(x)):
            for t, step in enumerate(h.unbind(1)):
                with poutine.mask(mask=active[:, t]):
                    z = pyro.sample(f"z{t + 1}", self.encoder(z, step))

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid z)` at one draw of :math:`z \sim q(z \mid x)`, shaped like x."""
        z = self.encode(x, mask, context).sample()
        return center(likelihood_at(self.likelihood, z, self._given(x, self._mask_of(x, mask, context), context)))

    @torch.no_grad()
    @in_evaluation_mode
    def smooth(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        num_samples: int = 100,
        num_particles: int = 200,
    ) -> Smoothed:
        r"""Draws the states of all steps given whole sequences, :math:`p(z_1, \dots, z_T \mid x_1, \dots, x_T)`.

        .. math:: z_T \sim \sum_i w_T^i\, \delta_{z_T^i}, \qquad
            z_t \mid z_{t+1} \sim \sum_i \bar w_t^i\, \delta_{z_t^i}, \quad
            \bar w_t^i \propto w_t^i\, p(z_{t+1} \mid z_t^i)

        A particle filter goes forward, with the guide as its proposal, and paths are drawn backward through its
        particles :math:`z_t^i`, with weights :math:`w_t^i`. The error falls with the number of particles. The states
        after the last observed step are draws of the transition.

        Args:
            x: sequences, ``(batch, time, *x_shape)``; any values, NaN too, at the steps that were not observed.
            mask: their observed steps, ``(batch, time)``; None for all.
            context: shape ``(batch, time, context_dim)``, or None.
            num_samples: paths for each sequence.
            num_particles: particles of the filter.

        Returns:
            A :class:`Smoothed`. A warning tells where fewer than 10 particles hold the states of a step.

        Raises:
            ValueError: when all particles of a sequence die.

        References:
            Monte Carlo Smoothing for Nonlinear Time Series, S. J. Godsill, A. Doucet and M. West, 2004,
            https://doi.org/10.1198/016214504000000151.
        """
        check_count(num_samples, "num_samples")
        mask = self._mask_of(x, mask, context)
        active = until_last(mask)
        run = self._filter_states(x, mask, context, num_particles)
        context = self._given(x, mask, context)

        def transition(z: Tensor, t: int) -> dist.TorchDistribution:
            return call(self.transition, z, context=None if context is None else context[:, t])

        smoothed = draw_backward(
            [run.guide[f"z{t + 1}"]["drawn"] for t in range(x.shape[1])],
            [step.log_w[0] for step in run.resampled] + [run.log_w[0]],
            transition,
            active,
            max(num_samples, 50),  # of fewer, the effective size says little
        )
        smoothed.warn_of_few(num_particles)
        return smoothed._replace(states=smoothed.states[:num_samples])

    @torch.no_grad()
    @in_evaluation_mode
    def last_states(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None, *, num_particles: int = 100
    ) -> Tensor:
        r"""Draws the state at the end of sequences, :math:`p(z_T \mid x_1, \dots, x_T)`, by a particle filter.

        Returns:
            Shape ``(num_particles, batch, latent_dim)``, equally weighted and in random order.
        """
        mask = self._mask_of(x, mask, context)
        return _last(self._draw_paths(x, mask, context, num_particles), mask)

    def _likelihood_of(self, z: Tensor, x: Tensor, mask: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        return likelihood_at(self.likelihood, z, self._given(x, mask, context))

    def _reads_draws(self) -> bool:
        return self.recurrence is not None

    def _draw_first(self, num_samples: int, num_steps: int, context: Tensor | None) -> Tensor:
        if self.recurrence is not None:
            leading = (num_samples,) if context is None else (num_samples, len(context))
            return self._generate(None, start_of(self.recurrence, *leading), num_steps, context)
        z = self._chain(num_steps, None, context).sample((num_samples,))
        return likelihood_at(self.likelihood, z, context).sample()

    def _draw_next(
        self, z: Tensor, x: Tensor, mask: Tensor, context: Tensor | None, coming: Tensor | None, num_steps: int
    ) -> Tensor:
        if self.recurrence is not None:
            h = self.recurrence(start_of(self.recurrence, len(x)), x, mask)
            h = h[torch.arange(len(x)), until_last(mask).sum(1) - 1].expand(len(z), -1, -1)
            return self._generate(_last(z, mask), h, num_steps, coming)
        first = None if coming is None else coming[:, 0]
        chain = MarkovChain(
            call(self.transition, _last(z, mask), context=first), self._transition(coming), num_steps, None, False
        )
        return likelihood_at(self.likelihood, chain.sample(), coming).sample()

    def _check_vector(self, context: Tensor | None) -> None:
        if self.recurrence is not None:
            check_beside_memory(context, *self._beside)
        elif context is not None and not any(map(takes_context, (self.prior, self.transition, self.likelihood))):
            raise ValueError("a context is given, but no part was built for one (context_dim).")

    def _given(self, x: Tensor, mask: Tensor, context: Tensor | None) -> Tensor | None:
        """Returns what the parts are given at each step: the memory of the data before it, and its context."""
        if self.recurrence is None:
            return context
        start = start_of(self.recurrence, len(x))
        after = self.recurrence(start, x, mask)
        return with_context(torch.cat([start.unsqueeze(1), after[:, :-1]], dim=1), context, slice(None))

    def _generate(self, z: Tensor | None, h: Tensor, num_steps: int, context: Tensor | None) -> Tensor:
        """Draws steps of x after states z, ``(*leading, latent_dim)``, None at the start, and memories of the data."""
        recurrence: Any = self.recurrence
        seen, steps = torch.ones_like(h[..., :1], dtype=torch.bool), []
        for t in range(num_steps):
            here = with_context(h, context, t)
            p = call(self.prior, context=here) if z is None else call(self.transition, z, context=here)
            z = p.expand(h.shape[:-1]).sample()
            steps.append(likelihood_at(self.likelihood, z, here).sample().unsqueeze(h.dim() - 1))
            h = recurrence(h, steps[-1], seen).squeeze(-2)
        return torch.cat(steps, dim=h.dim() - 1)

    def _chain(self, num_steps: int, active: Tensor | None, context: Tensor | None) -> MarkovChain:
        """Returns p(z)."""
        initial = call(self.prior, context=None if context is None else context[:, 0])
        for t in (active, context):
            if t is not None:
                initial = initial.expand(t.shape[:1])
        later = None if context is None else context[:, 1:]
        return MarkovChain(initial, self._transition(later), num_steps, active)

    def _transition(self, context: Tensor | None) -> Any:
        """Returns the transition of a chain whose steps after the first have a context."""

        def transition(z: Tensor, steps: slice) -> dist.TorchDistribution:
            here = None if context is None else context[:, steps.start - 1 : steps.stop - 1]
            return call(self.transition, z, context=here)

        return transition

    def _summaries(self, x: Tensor, mask: Tensor, context: Tensor | None) -> Tensor:
        h = self.network(x, mask)
        return h if context is None else torch.cat([h, context.to(h.dtype)], dim=-1)


def _at(h: Tensor | None, context: Tensor | None, t: int) -> Tensor | None:
    """Returns what the parts are given at a step: the memory, where there is one, and the context."""
    if h is not None:
        return with_context(h, context, t)
    return None if context is None else context[:, t]


def _last(z: Tensor, mask: Tensor) -> Tensor:
    """Returns the states, ``(num_paths, batch, latent_dim)``, at the last observed steps."""
    last = until_last(mask).sum(1) - 1
    return z.gather(2, last.view(1, -1, 1, 1).expand(len(z), -1, 1, z.shape[-1])).squeeze(2)


class BackwardGRU(Recorded):
    r"""A gated recurrent network that reads sequences from their end, and gives a summary of the rest at every step.

    .. math:: y_t = \mathrm{GRU}([x_t, m_t], y_{t+1}), \qquad y_{T+1} = 0

    Sequences of any number of steps have shape ``(batch, time, *x_shape)``. Steps that were not observed
    (:math:`m_t = 0`) are read as zeros, and those after the last observed one are not read at all, so that padding
    changes nothing.

    Args:
        x_shape: shape of one step.
        width: units of the state, and of a summary.
        memory: steps over which the longest memories last at the start of training.

    Raises:
        ValueError: when a sequence does not have the stated shape.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder, K. Cho et al., 2014,
        https://arxiv.org/abs/1406.1078; Structured Inference Networks for Nonlinear State Space Models, R. G. Krishnan,
        U. Shalit and D. Sontag, 2017, https://arxiv.org/abs/1609.09869.

    >>> BackwardGRU(3, 16)(torch.zeros(7, 50, 3)).shape
    torch.Size([7, 50, 16])
    """

    def __init__(self, x_shape: Shape, width: int = 128, memory: int = 20):
        super().__init__()
        self.x_shape, self.width = as_shape(x_shape, "x_shape"), check_count(width, "width")
        gru = nn.GRU(math.prod(self.x_shape) + 1, self.width, batch_first=True)
        self.gru = start_recurrence(gru, check_count(memory, "memory"))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the summaries, ``(batch, time, width)``, of sequences and the mask of their observed steps."""
        if x.shape[2:] != self.x_shape:
            raise ValueError(
                f"BackwardGRU takes sequences of shape (batch, time, {', '.join(map(str, self.x_shape))}), got "
                f"{tuple(x.shape)}."
            )
        x = x.flatten(2)
        mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        steps = torch.cat([torch.where(mask.unsqueeze(-1), x, 0.0), mask.unsqueeze(-1).to(x.dtype)], dim=-1)
        # The order of the steps from the last observed one to the first; the others stay where they are.
        time = torch.arange(x.shape[1], device=x.device)
        last = (mask * time).amax(-1, keepdim=True)
        order = torch.where(time <= last, last - time, time).unsqueeze(-1)
        states, _ = self.gru(steps.gather(1, order.expand_as(steps)))
        return states.gather(1, order.expand_as(states))
