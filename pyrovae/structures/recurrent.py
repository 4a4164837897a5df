"""Recurrent VAEs: VAEs of sequences whose steps depend on all steps before, latents and data."""

import math
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from pyrovae.distributions import RecurrentChain, center
from pyrovae.inference.filtering import systematic
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
from pyrovae.structures.smoothing import Smoothed


class RecurrentVAE(SequenceVAE):
    r"""A VAE at each step of a sequence, whose parts have a memory of all steps before as their context.

    .. math:: p(x, z) = \prod_{t=1}^T p(z_t \mid h_{t-1})\, p(x_t \mid z_t, h_{t-1}), \qquad
        q(z \mid x) = \prod_{t=1}^T q(z_t \mid x_t, h_{t-1}), \qquad h_t = f(h_{t-1}, x_t, z_t), \quad h_0 = 0

    ``vae.model`` and ``vae.guide`` take ``(x, mask=None, context=None)``, as those of :class:`StateSpaceVAE`, with the
    same sites, "z" for the latents of all steps and "x" for the data. The likelihood scores all steps in one call.
    :meth:`model_by_step` and :meth:`guide_by_step` are the same densities with sites "z1", "x1", "z2", ..., for
    :class:`pyrovae.bounds.FIVO`, :class:`pyrovae.estimators.ParticleFilter` and
    :func:`pyrovae.estimators.log_predictive`. ``vae.model`` scores data and cannot draw them, so that what simulates
    data from a model, such as ``calibration``, refuses it: draw by ``vae.sample``.

    At a step that was not observed, the recurrence sees that it was not, and its latent, and the guide is the prior.
    So the model of sequences with gaps is one of its own, learned from sequences with gaps; it is not the model of
    whole sequences with some of their steps integrated out. A sequence ends at its last observed step; padding changes
    nothing.

    Args:
        prior: ``prior(h)`` returns :math:`p(z_t \mid h_{t-1} = h)`: a prior whose context is the memory.
        likelihood: ``likelihood(z, h)`` returns :math:`p(x_t \mid z_t = z, h_{t-1} = h)`.
        encoder: ``encoder(x, h)`` returns :math:`q(z_t \mid x_t = x, h_{t-1} = h)`.
        recurrence: ``recurrence(h, x, mask, z)`` returns the memories after each of some steps, such as
            :class:`ForwardGRU`; its attribute `width` is that of a memory.

    The context of a step, for parts that were built for one, has shape ``(batch, time, context_dim)``. It follows the
    memory in the context of the parts, which are then built with the sum of both widths. A part that was built without
    any context does not see the memory.

    Raises:
        ValueError: when the parts have different latent dimensions, spaces, data or contexts, or no part takes the
            memory; when a mask does not have the shape of the steps, or hides a whole sequence.

    References:
        A Recurrent Latent Variable Model for Sequential Data, J. Chung, K. Kastner, L. Dinh, K. Goel, A. Courville and
        Y. Bengio, 2015, https://arxiv.org/abs/1506.02216.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = RecurrentVAE(
    ...     priors.DiagonalNormal(2, context_dim=16),
    ...     likelihoods.Normal(2, 3, context_dim=16),
    ...     encoders.DiagonalNormal(3, 2, context_dim=16),
    ...     ForwardGRU(3, 2, width=16),
    ... )
    >>> vae.sample(5, num_steps=20).shape
    torch.Size([5, 20, 3])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module, recurrence: nn.Module):
        super().__init__()
        check_roles(prior=prior, likelihood=likelihood, encoder=encoder)
        check_module("recurrence", recurrence)
        check_equal("latent_dim", prior=prior, likelihood=likelihood, encoder=encoder, recurrence=recurrence)
        check_equal("x_shape", likelihood=likelihood, encoder=encoder, recurrence=recurrence)
        check_spaces(prior=prior, encoder=encoder)
        check_contexts(prior=prior, likelihood=likelihood, encoder=encoder)
        self.prior, self.likelihood, self.encoder, self.recurrence = prior, likelihood, encoder, recurrence
        self.width, self._context_dim = width_of_memory(recurrence, *self._parts)

    @property
    def _parts(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.prior, self.likelihood, self.encoder

    @property
    def context_dim(self) -> int:
        return self._context_dim or 0

    def model(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The generative process, with the latents of all steps at site "z" and all observed steps at site "x"."""
        self.register()
        seen = self._mask_of(x, mask, context)

        def conditional(h: Tensor, steps: slice) -> dist.TorchDistribution:
            return self._prior(with_context(h, context, steps))

        with pyro.plate("data", len(x)):
            chain = self._chain(x, seen, conditional)
            z = pyro.sample("z", chain)
            p = likelihood_at(self.likelihood, z, with_context(chain.memories(z), context, slice(None)))
            if pyro.sample("x", p.mask(seen).to_event(1), obs=x) is not x:
                raise ValueError(
                    "data cannot be drawn from the model of a RecurrentVAE for all steps at once, because a step "
                    "depends on those before it: call sample(), or draw from model_by_step."
                )

    def guide(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents of all steps at site "z"."""
        self.register()
        self._mask_of(x, mask, context)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, mask, context))

    @in_evaluation_mode
    def encode(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> RecurrentChain:
        r"""Returns :math:`q(z \mid x)`, with ``batch_shape == (batch,)`` and events ``(time, latent_dim)``."""
        seen = self._mask_of(x, mask, context)

        def conditional(h: Tensor, steps: slice) -> dist.TorchDistribution:
            return self._posterior(
                x[:, steps], None if mask is None else seen[:, steps], with_context(h, context, steps)
            )

        return self._chain(x, seen, conditional)

    def model_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The generative process with a site for each latent and each observed step, in their order."""
        self.register()
        seen: Any = self._mask_of(x, mask, context)  # Pyro's types of masks leave out tensors of any kind
        active: Any = until_last(seen)
        h = start_of(self.recurrence, len(x))
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                here = with_context(h, context, t)
                with poutine.mask(mask=active[:, t]):
                    z = pyro.sample(f"z{t + 1}", self._prior(here))
                with poutine.mask(mask=seen[:, t]):
                    step = pyro.sample(f"x{t + 1}", likelihood_at(self.likelihood, z, here), obs=x[:, t])
                h = self._advance(h, step.unsqueeze(1 - x.dim()), seen[:, t], z)

    def guide_by_step(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> None:
        """The amortised posterior with a site for each latent."""
        self.register()
        seen: Any = self._mask_of(x, mask, context)
        active: Any = until_last(seen)
        h = start_of(self.recurrence, len(x))
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                q = self._posterior(x[:, t], None if mask is None else seen[:, t], with_context(h, context, t))
                with poutine.mask(mask=active[:, t]):
                    z = pyro.sample(f"z{t + 1}", q)
                h = self._advance(h, x[:, t : t + 1], seen[:, t], z)

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x'_t \mid z_t, h_{t-1})` at one draw from the guide, shaped like x."""
        q = self.encode(x, mask, context)
        z = q.sample()
        return center(likelihood_at(self.likelihood, z, with_context(q.memories(z), context, slice(None))))

    @torch.no_grad()
    @in_evaluation_mode
    def smooth(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        num_samples: int = 100,
        num_particles: int = 30,
    ) -> Smoothed:
        r"""Draws the latents of all steps given whole sequences, :math:`p(z_1, \dots, z_T \mid x_1, \dots, x_T)`.

        .. math:: p(z \mid x) \approx \sum_r \frac{\hat p_r(x)}{\sum_s \hat p_s(x)}\, \delta_{z^{(r)}}

        Each of many independent filters gives one of its paths, :math:`z^{(r)}`, drawn by its last weights, and the
        paths are weighted by the filters' estimates of p(x). The error falls with the number of filters and of
        particles. The latents after the last observed step are draws of the prior.

        Args:
            x: sequences, ``(batch, time, *x_shape)``; any values, NaN too, at the steps that were not observed.
            mask: their observed steps, ``(batch, time)``; None for all.
            context: shape ``(batch, time, context_dim)``, or None.
            num_samples: paths for each sequence. There are as many filters, but at least 50.
            num_particles: particles of a filter.

        Returns:
            A :class:`Smoothed`, whose effective number is that of the filters, the same for all steps of a sequence. A
            warning tells where it is below 10.

        Raises:
            ValueError: when all particles of a sequence die.

        References:
            Particle Markov Chain Monte Carlo Methods, C. Andrieu, A. Doucet and R. Holenstein, 2010,
            https://doi.org/10.1111/j.1467-9868.2009.00736.x (a path and the estimate of its filter).
        """
        check_count(num_samples, "num_samples")
        mask = self._mask_of(x, mask, context)
        num_runs = max(num_samples, 50)  # of fewer, the effective number says little
        run = self._filter_states(x, mask, context, num_particles, num_runs)
        states = torch.stack([run.guide[f"z{t + 1}"]["value"] for t in range(x.shape[1])], dim=-2)
        states = states.unflatten(0, (num_runs, num_particles))
        log_w = torch.where(run.log_z.unsqueeze(1) > -math.inf, run.log_w, 0.0)  # any path of a filter without weight
        last = dist.Categorical(logits=log_w.transpose(1, 2)).sample()  # (runs, batch)
        paths = states.gather(1, last[:, None, :, None, None].expand(-1, 1, -1, *states.shape[-2:])).squeeze(1)
        weights = run.log_z.softmax(0)
        ess = (1 / weights.square().sum(0)).unsqueeze(-1).expand(-1, x.shape[1])
        chosen = systematic(weights)
        chosen = chosen.gather(0, torch.rand_like(weights).argsort(0))  # in random order
        smoothed = Smoothed(paths.gather(0, chosen[..., None, None].expand_as(paths))[:num_samples], ess)
        smoothed.warn_of_few(num_particles)
        return smoothed

    def _likelihood_of(self, z: Tensor, x: Tensor, mask: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        h = self.encode(x, mask, context).memories(z)
        return likelihood_at(self.likelihood, z, with_context(h, context, slice(None)))

    def _reads_draws(self) -> bool:
        return True

    def _draw_first(self, num_samples: int, num_steps: int, context: Tensor | None) -> Tensor:
        leading = (num_samples,) if context is None else (num_samples, len(context))
        return self._generate(start_of(self.recurrence, *leading), num_steps, context)

    def _draw_next(
        self, z: Tensor, x: Tensor, mask: Tensor, context: Tensor | None, coming: Tensor | None, num_steps: int
    ) -> Tensor:
        h, active = start_of(self.recurrence, *z.shape[:2]), until_last(mask)
        for t in range(x.shape[1]):
            h = torch.where(active[:, t, None], self._advance(h, x[:, t : t + 1], mask[:, t], z[..., t, :]), h)
        return self._generate(h, num_steps, coming)

    def _check_vector(self, context: Tensor | None) -> None:
        check_beside_memory(context, self.width, self._context_dim)

    def _prior(self, here: Tensor) -> dist.TorchDistribution:
        return call(self.prior, context=here).expand(here.shape[:-1])

    def _posterior(self, x: Tensor, seen: Tensor | None, here: Tensor) -> dist.TorchDistribution:
        """Returns q of steps, which is the prior where they were not observed."""
        if seen is None:
            return call(self.encoder, x, context=here)
        shape = (*seen.shape, *(1,) * (x.dim() - seen.dim()))
        q = call(self.encoder, torch.where(seen.view(shape), x, 0), context=here)  # whatever stands there, NaN too
        return dist.MaskedMixture(seen, self._prior(here), q)

    def _chain(self, x: Tensor, seen: Tensor, conditional: Any) -> RecurrentChain:
        """Returns the latents of all steps, for their distributions given the memories."""

        def advance(h: Tensor, z: Tensor, steps: slice) -> Tensor:
            return self.recurrence(h, x[:, steps], seen[:, steps], z)

        return RecurrentChain(start_of(self.recurrence, len(x)), conditional, advance, x.shape[1], until_last(seen))

    def _advance(self, h: Tensor, x: Tensor, seen: Tensor, z: Tensor) -> Tensor:
        """Returns the memory after one step; x has a dimension for it, before the shape of a step."""
        return self.recurrence(h, x, seen.unsqueeze(-1), z.unsqueeze(-2)).squeeze(-2)

    def _generate(self, h: Tensor, num_steps: int, context: Tensor | None) -> Tensor:
        """Draws steps of x that follow memories of shape ``(*leading, width)``."""
        seen, steps = torch.ones_like(h[..., :1], dtype=torch.bool), []
        for t in range(num_steps):
            here = with_context(h, context, t).unsqueeze(-2)
            z = self._prior(here).sample()
            steps.append(likelihood_at(self.likelihood, z, here).sample())
            h = self.recurrence(h, steps[-1], seen, z).squeeze(-2)
        return torch.cat(steps, dim=h.dim() - 1)


class ForwardGRU(Recorded):
    r"""A gated recurrent unit whose state is the memory of a :class:`RecurrentVAE` or a :class:`StateSpaceVAE`.

    .. math:: h_t = \mathrm{GRU}([m_t x_t, m_t, z_t], h_{t-1})

    Steps that were not observed (:math:`m_t = 0`) are read as zeros.

    Args:
        x_shape: shape of one step.
        latent_dim: number of latent dimensions; 0 for a memory of the data alone.
        width: units of the state.
        memory: steps over which the longest memories last at the start of training.

    Raises:
        ValueError: when a sequence does not have the stated shape.

    References:
        Learning Phrase Representations using RNN Encoder-Decoder, K. Cho et al., 2014,
        https://arxiv.org/abs/1406.1078.

    >>> ForwardGRU(3, 2, 16)(torch.zeros(7, 16), torch.zeros(7, 50, 3), None, torch.zeros(7, 50, 2)).shape
    torch.Size([7, 50, 16])
    """

    def __init__(self, x_shape: Shape, latent_dim: int, width: int = 128, memory: int = 20):
        super().__init__()
        self.x_shape, self.width = as_shape(x_shape, "x_shape"), check_count(width, "width")
        self.latent_dim = check_count(latent_dim, "latent_dim", 0)
        gru = nn.GRU(math.prod(self.x_shape) + 1 + self.latent_dim, self.width, batch_first=True)
        self.gru = start_recurrence(gru, check_count(memory, "memory"))

    def forward(self, h: Tensor, x: Tensor, mask: Tensor | None, z: Tensor | None = None) -> Tensor:
        """Returns the states after each of some steps, ``(*leading, steps, width)``.

        Args:
            h: the state before the first of them, ``(*leading, width)``.
            x: their data, ``(*leading, steps, *x_shape)``; leading dimensions are broadcast.
            mask: whether they were observed, ``(*leading, steps)``; None for all.
            z: their latents, ``(*leading, steps, latent_dim)``; None for a memory of the data alone.
        """
        if x.shape[x.dim() - len(self.x_shape) :] != self.x_shape or x.dim() <= len(self.x_shape):
            raise ValueError(
                f"ForwardGRU takes sequences of shape (batch, time, {', '.join(map(str, self.x_shape))}), got "
                f"{tuple(x.shape)}."
            )
        x = x.flatten(x.dim() - len(self.x_shape)).to(h.dtype)
        seen = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        x = torch.where(seen.unsqueeze(-1), x, 0.0)
        parts = [x, seen.unsqueeze(-1).to(h.dtype)] + ([] if z is None else [z])
        leading = torch.broadcast_shapes(h.shape[:-1], *(part.shape[:-2] for part in parts))
        steps = torch.cat([part.expand(*leading, *part.shape[-2:]) for part in parts], dim=-1)
        num_steps, steps = steps.shape[-2], steps.flatten(0, -3)
        states, _ = self.gru(steps, h.expand(*leading, -1).reshape(1, -1, self.width))
        return states.reshape(*leading, num_steps, self.width)
