r"""The bound of a particle filter, for models and guides that draw their latents step by step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrovae.arguments import tensors_of
from pyrovae.bounds.base import Terms
from pyrovae.bounds.scoring import SiteTerms
from pyrovae.bounds.weighted import IWAE
from pyrovae.inference.filtering import Filtered, Resampling, check_followed, multinomial, run_filter, systematic
from pyrovae.inference.messages import warn
from pyrovae.inference.structure import SiteStructure


class FIVO(IWAE):
    r"""The bound of a particle filter: importance weighting whose particles are resampled between the steps of time.

    .. math:: \mathrm{E} \log \hat p(x), \qquad
        \hat p(x) = \prod_{t=1}^T \frac{1}{K} \sum_{k=1}^K w_t^k, \qquad
        w_t^k = \frac{p(x_t, z_t^k \mid z_{<t}^{a_k}, x_{<t})}{q(z_t^k \mid z_{<t}^{a_k}, x)}

    Over T steps the variance of importance weights grows exponentially, that of a particle filter linearly: the bound
    stays tight for long sequences. It is also known as variational sequential Monte Carlo. It takes any Pyro model and
    guide whose latents are drawn in a loop, each step with an observation: a step ends where the model draws a latent
    after it observed something. Model and guide run side by side. Each datum of the plate has particles of its own, and
    resamples them where their effective sample size is at most `threshold` times their number. Masks
    (``poutine.mask``) make sequences of different lengths. Without an observation between two latents nothing is
    resampled, and the bound is :class:`IWAE`.

    That the particles can be followed through a model (its recurrent states, the lists that it keeps) is checked on the
    first batch of each shape, by scoring their paths again without resampling. Particles are a dimension in front of
    the plates. For a model that cannot take it, such as one with ``torch.nn.GRU`` in its loop, they are rows of
    repeated data; then one particle is scored alone too.

    Args:
        num_particles: :math:`K` for each datum, at least 1.
        threshold: share of the particles to which the effective sample size may fall, from 0 (:class:`IWAE`) to 1
            (resampling after every step).
        resampling: draws the ancestors: :func:`systematic`, :func:`stratified` or :func:`multinomial`, or a function
            like these.
        resampling_gradient: whether the gradient includes that of the choice of ancestors, which makes it unbiased, but
            in general far too noisy. It needs ``resampling=multinomial``, and is needed for latents without rsample.

    Raises:
        ValueError: when an argument is out of range; when particles cannot be followed through the model or the guide;
            as :class:`IWAE`.

    References:
        Filtering Variational Objectives, C. J. Maddison, D. Lawson, G. Tucker, N. Heess, M. Norouzi, A. Mnih, A. Doucet
        and Y. W. Teh, 2017, https://arxiv.org/abs/1705.09279; Auto-Encoding Sequential Monte Carlo, T. A. Le, M. Igl,
        T. Rainforth, T. Jin and F. Wood, 2018, https://arxiv.org/abs/1705.10306; Variational Sequential Monte Carlo,
        C. A. Naesseth, S. W. Linderman, R. Ranganath and D. M. Blei, 2018, https://arxiv.org/abs/1705.11140.

    >>> import pyro
    >>> from pyro import distributions as dist
    >>> def model(x):
    ...     z = torch.zeros(len(x))
    ...     with pyro.plate("data", len(x)):
    ...         for t in range(x.shape[1]):
    ...             z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 1.0))
    ...             pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         for t in range(x.shape[1]):
    ...             pyro.sample(f"z{t}", dist.Normal(x[:, t], 0.7))
    >>> FIVO(num_particles=8).terms(model, guide, torch.zeros(3, 20)).bound.shape
    torch.Size([])
    """

    def __init__(
        self,
        num_particles: int,
        threshold: float = 0.5,
        resampling: Resampling = systematic,
        resampling_gradient: bool = False,
    ):
        super().__init__(num_particles)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}.")
        if not callable(resampling):
            raise TypeError(f"resampling must be a function such as bounds.systematic, got {resampling!r}.")
        if resampling_gradient and resampling is not multinomial:
            raise ValueError(
                "resampling_gradient=True needs resampling=bounds.multinomial, whose ancestors are independent draws; "
                f"got {getattr(resampling, '__name__', resampling)!r}."
            )
        self.threshold, self.resampling, self.resampling_gradient = threshold, resampling, resampling_gradient
        self._followed: tuple = ()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_followed": ()}

    def _estimate(self, model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict) -> Terms:
        self._check_followed(model, guide, structure, args, kwargs)
        run = run_filter(model, guide, structure, self.num_particles, self.threshold, self.resampling, args, kwargs)
        self._check_sites(structure, run.sites, model, guide, args, kwargs)
        value = run.log_z[0]
        terms = SiteTerms(
            observed={name: site["term"] for name, site in run.model.items() if site["is_observed"]},
            model={name: site["term"] for name, site in run.model.items() if not site["is_observed"]},
            guide={name: site["term"] for name, site in run.guide.items()},
            model_scales={name: site["scale"] for name, site in run.model.items()},
            guide_scales={name: site["scale"] for name, site in run.guide.items()},
        )
        scale = self._common_scale(terms)
        bound = (value * scale).sum()
        loss = -bound
        if torch.is_grad_enabled():
            surrogate = self._score_terms(run, value.detach())
            loss = loss - ((surrogate * scale).sum() - (surrogate * scale).sum().detach())
            self.steps += 1
        reconstruction, kl = terms.reconstruction_and_kl()
        return Terms(loss, bound.detach(), reconstruction, kl, {})

    def _score_terms(self, run: Filtered, log_z: Tensor) -> Tensor:
        """Returns a number for each datum whose gradient is that of the discrete choices."""
        if not self.resampling_gradient:
            if run.draws:
                raise ValueError(
                    "a latent of the guide has no rsample. Its gradient needs that of the choice of ancestors: take "
                    "FIVO(..., resampling=bounds.multinomial, resampling_gradient=True)."
                )
            return torch.zeros_like(log_z)
        choices = [(step.log_prob, step.log_z) for step in run.resampled]
        choices += [(draw.log_q, draw.log_z) for draw in run.draws]
        # What came before a choice does not depend on it.
        return sum(((log_z - before[0]) * log_prob[0] for log_prob, before in choices), torch.zeros_like(log_z))

    def _check_followed(
        self, model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Checks, once for each shape of the arguments, that the particles can be followed."""
        shapes = tuple(tuple(t.shape) for t in tensors_of(args, kwargs))
        followed_pair, followed_shapes = self._followed or ((model, guide, structure), set())
        if followed_pair != (model, guide, structure):
            followed_shapes = set()
        if shapes in followed_shapes or self.num_particles == 1:
            return
        run = check_followed(model, guide, structure, self.num_particles, args, kwargs)
        if not run.resampled and len(structure.latents) > 1:
            warn(
                "nothing is observed between two latents of this model, so that FIVO resamples nothing and is IWAE. "
                "Observe each step of time in the loop that draws its latents."
            )
        self._followed = (model, guide, structure), followed_shapes | {shapes}
