r"""Terms that are added to a loss. With one of them, the loss is no longer a bound on log p(x)."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from pyrovae.distributions import center
from pyrovae.inference.messages import described
from pyrovae.inference.sites import independent_elements, sample_sites
from pyrovae.nn import register
from pyrovae.recorded import NumbersChecked

__all__ = [
    "Adversarial",
    "Cost",
    "DensityRatio",
    "MaximumMeanDiscrepancy",
    "Regularizer",
    "Run",
    "TotalCorrelation",
    "gaussian_kernel",
    "inverse_multiquadric_kernel",
]

_count = itertools.count()


class Run(NamedTuple):
    """One run of a guide and a model, with the particles as the leftmost dimension of every value.

    Args:
        model_trace: trace of the model at the guide's latents.
        guide_trace: trace of the guide.
        model: the model.
        guide: the guide.
        args: arguments of both.
        kwargs: keyword arguments of both.
    """

    model_trace: poutine.Trace
    guide_trace: poutine.Trace
    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict[str, Any]

    def site(self, name: str, of_guide: bool) -> dict:
        """Returns a site of the guide or the model; raises a ValueError if there is none of that name."""
        sites = sample_sites(self.guide_trace if of_guide else self.model_trace)
        if name not in sites:
            where = "guide" if of_guide else "model"
            raise ValueError(f'the {where} has no site "{name}" to regularize; it has {", ".join(sites) or "none"}.')
        return sites[name]


class Cost(NamedTuple):
    """What a regularizer adds to a loss, summed over the data.

    Args:
        value: in nats, with its gradient.
        aside: a term of value zero, with the gradient of auxiliary networks such as a discriminator.
    """

    value: Tensor
    aside: Tensor | float = 0.0


class Regularizer(NumbersChecked, ABC):
    r"""Base of the regularizers, which can be added to any bound: ``bounds.ELBO(regularizers=[...])``.

    To add one, derive from it and return a :class:`Cost` from the sites of a :class:`Run`:
    ``run.site("z", of_guide=True)`` is the node of Pyro's trace, with the distribution as ``["fn"]`` and the latents,
    ``(num_particles, batch, *event)``, as ``["value"]``. Latents with an rsample are differentiable. If a bound runs in
    chunks of particles, the run is that of the first chunk.

    Args:
        weight: factor of the term, finite.
    """

    def __init__(self, weight: float):
        if not math.isfinite(weight):
            raise ValueError(f"weight must be finite, got {weight}.")
        self.weight = weight

    def __repr__(self) -> str:
        return described(self)

    @abstractmethod
    def __call__(self, run: Run) -> Cost:
        """Returns the cost of a run."""


class TotalCorrelation(Regularizer):
    r"""The total correlation of the aggregate posterior, from a minibatch: with the ELBO, the beta-TCVAE.

    .. math:: \lambda\, \mathrm{KL}\Big(q(z) \,\|\, \prod_d q(z_d)\Big), \qquad
        q(z) = \frac{1}{N} \sum_n q(z \mid x_n)

    The ELBO's KL divergence contains the total correlation once, so that
    ``ELBO(regularizers=[TotalCorrelation(beta - 1, N)])`` has it with weight beta. The stratified estimate of the
    density is unbiased, :math:`\hat q(z_i) = \frac{1}{N} q(z_i \mid x_i) + \frac{N - 1}{N} \frac{1}{B - 1} \sum_{j \ne
    i} q(z_i \mid x_j)`; the weighted one, :math:`\frac{1}{N B} \sum_j q(z_i \mid x_j)`, is biased: even from all data
    it is N times too small, which adds a constant :math:`(D - 1) \log N` to the total correlation of D dimensions. The
    logarithms of both are biased downwards; the bias of the stratified one falls with the batch size.

    Args:
        weight: :math:`\lambda`.
        dataset_size: number of training data :math:`N`, at least 2.
        stratified: whether to take the stratified estimate, or the weighted one.
        site: the latent, whose posterior must have independent dimensions.

    Raises:
        ValueError: when an argument is out of range, when a batch has more than `dataset_size` data, when the guide has
            no such site, or when its dimensions are not independent.

    References:
        Isolating Sources of Disentanglement in Variational Autoencoders, R. T. Q. Chen, X. Li, R. Grosse and
        D. Duvenaud, 2018, https://arxiv.org/abs/1802.04942.

    >>> TotalCorrelation(5.0, dataset_size=60_000).weight
    5.0
    """

    def __init__(self, weight: float, dataset_size: int, stratified: bool = True, site: str = "z"):
        super().__init__(weight)
        if not dataset_size >= 2:
            raise ValueError(f"dataset_size must be at least 2, got {dataset_size}.")
        self.dataset_size, self.stratified, self.site = dataset_size, stratified, site

    def __call__(self, run: Run) -> Cost:
        latent = run.site(self.site, of_guide=True)
        fn, z = latent["fn"], latent["value"]
        elements = independent_elements(fn)
        if elements is None or len(fn.event_shape) != 1:
            raise ValueError(
                f'TotalCorrelation needs a posterior with independent dimensions at site "{self.site}", got a '
                f"{type(fn).__name__}. DensityRatio needs only draws."
            )
        batch, n = z.shape[-2], self.dataset_size
        if batch > n:
            raise ValueError(f"TotalCorrelation got a batch of {batch} data, more than dataset_size={n}.")
        if batch < 2:
            return Cost(z.new_zeros(()))
        # Each latent under the posterior of each datum: (batch of z, *particles, batch of x, dimensions).
        log_q = elements.log_prob(z.movedim(-2, 0).unsqueeze(-2))
        eye = torch.eye(batch, dtype=torch.bool, device=z.device).reshape(batch, *[1] * (z.dim() - 2), batch, 1)
        if self.stratified:
            others = torch.full_like(eye, math.log((n - 1) / (n * (batch - 1))), dtype=log_q.dtype)
            log_share = others.masked_fill(eye, -math.log(n))
        else:
            log_share = torch.full_like(eye, -math.log(n * batch), dtype=log_q.dtype)
        joint = (log_q.sum(-1, keepdim=True) + log_share).logsumexp(-2).squeeze(-1)
        marginals = (log_q + log_share).logsumexp(-2).sum(-1)
        correlation = (joint - marginals).flatten(1).mean(1)
        return Cost(self.weight * correlation.sum())


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`\exp(-\lVert a - b \rVert^2 / d)` for all pairs of rows, of d dimensions.

    >>> gaussian_kernel(torch.zeros(2, 3), torch.zeros(4, 3)).shape
    torch.Size([2, 4])
    """
    return (-_squared_distances(a, b) / a.shape[-1]).exp()


def inverse_multiquadric_kernel(a: Tensor, b: Tensor) -> Tensor:
    r"""Returns :math:`\sum_s \frac{2 d s}{2 d s + \lVert a - b \rVert^2}` for all pairs of rows, as in WAE.

    The scales s are 0.1, 0.2, 0.5, 1, 2, 5 and 10. Its heavy tails give a gradient to latents that are far from the
    prior.

    References:
        Wasserstein Auto-Encoders, I. Tolstikhin, O. Bousquet, S. Gelly and B. Schölkopf, 2018,
        https://arxiv.org/abs/1711.01558.

    >>> inverse_multiquadric_kernel(torch.zeros(2, 3), torch.zeros(4, 3))[0, 0]
    tensor(7.)
    """
    squares = _squared_distances(a, b)
    scales = [2 * a.shape[-1] * s for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
    return sum((scale / (scale + squares) for scale in scales), torch.zeros_like(squares))


class MaximumMeanDiscrepancy(Regularizer):
    r"""The squared maximum mean discrepancy between aggregate posterior and prior: with the ELBO, InfoVAE.

    .. math:: \lambda \left(\mathrm{E}\, k(z, z') + \mathrm{E}\, k(\tilde z, \tilde z')
        - 2\, \mathrm{E}\, k(z, \tilde z) \right), \qquad z, z' \sim q(z), \quad \tilde z, \tilde z' \sim p(z)

    per datum, by its unbiased estimate from pairs of different data of a batch, which may be negative; it is 0 for a
    batch of one. A learned prior gets a gradient if it has an rsample. In a hierarchy the prior of a latent is that
    given the latents above it, drawn from the guide. InfoVAE with its :math:`\alpha` and :math:`\lambda` is
    ``ELBO(beta=1 - alpha, regularizers=[MaximumMeanDiscrepancy(alpha + lambda - 1)])``.

    Args:
        weight: :math:`\lambda`.
        kernel: ``kernel(a, b)`` returns k for all pairs of rows of two matrices.
        site: the latent.

    Raises:
        ValueError: when `weight` is not finite, when there is no such site, or when its latents are not vectors.

    References:
        InfoVAE: Balancing Learning and Inference in Variational Autoencoders, S. Zhao, J. Song and S. Ermon, 2019,
        https://arxiv.org/abs/1706.02262; A Kernel Two-Sample Test, A. Gretton, K. M. Borgwardt, M. J. Rasch,
        B. Schölkopf and A. Smola, 2012, https://jmlr.org/papers/v13/gretton12a.html.

    >>> MaximumMeanDiscrepancy(100.0, inverse_multiquadric_kernel).weight
    100.0
    """

    def __init__(self, weight: float, kernel: Callable[[Tensor, Tensor], Tensor] = gaussian_kernel, site: str = "z"):
        super().__init__(weight)
        self.kernel, self.site = kernel, site

    def __call__(self, run: Run) -> Cost:
        value = _vectors(run, self.site, type(self).__name__)
        batch, width = value.shape[-2:]
        if batch < 2:
            return Cost(value.new_zeros(()))
        z = value.reshape(-1, width)
        # A prior that does not depend on latents has no dimension of particles.
        prior = run.site(self.site, of_guide=False)["fn"].expand(value.shape[:-1])
        prior = (prior.rsample() if prior.has_rsample else prior.sample()).reshape(-1, width)
        particles = len(z) // batch

        def mean(a: Tensor, b: Tensor) -> Tensor:
            # Latents of one datum are not independent draws from the aggregate posterior: only pairs of different data.
            k = self.kernel(a, b).reshape(particles, batch, particles, batch)
            return (k.sum() - k.diagonal(dim1=1, dim2=3).sum()) / (particles**2 * batch * (batch - 1))

        return Cost(self.weight * batch * (mean(z, z) + mean(prior, prior) - 2 * mean(z, prior)))


class _Discriminated(Regularizer):
    """A regularizer with a discriminator that the optimizer of the loss trains as well.

    Its parameters are registered with Pyro. The regularizer's value has no gradient in them, and the discriminator's
    loss has a gradient in them alone.
    """

    def __init__(self, discriminator: nn.Module, weight: float):
        super().__init__(weight)
        if not isinstance(discriminator, nn.Module):
            raise TypeError(f"discriminator must be a module, got {discriminator!r}.")
        self.discriminator = discriminator
        self.name = f"discriminator{next(_count)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # For copies: with the same name, Pyro would train the parameters of the original.
        self.__dict__.update(state)
        self.name = f"discriminator{next(_count)}"

    def _logits_of(self, x: Tensor) -> Tensor:
        """Returns the discriminator's logits, with a gradient in its inputs but not in its parameters."""
        detached = {name: t.detach() for name, t in self.discriminator.named_parameters()}
        try:
            logits = functional_call(self.discriminator, detached, (x,))
        except RuntimeError as error:
            raise ValueError(
                f"the discriminator of {type(self).__name__} does not take inputs of shape {tuple(x.shape)}: {error}."
            ) from error
        return self._check_logits(logits, len(x))

    def _training_loss(self, real: Tensor, fake: Tensor, particles: int = 1) -> Tensor:
        """Returns the discriminator's cross entropy minus itself: zero, with a gradient in its parameters alone.

        Summed over the data, and a mean over the particles of each.
        """
        register(self.name, self.discriminator)
        if not torch.is_grad_enabled():
            return real.new_zeros(())
        x = torch.cat([real.detach(), fake.detach()])
        real_logits, fake_logits = self._check_logits(self.discriminator(x), len(x)).split([len(real), len(fake)])
        loss = softplus(-real_logits).sum() + softplus(fake_logits).sum()
        return (loss - loss.detach()) / particles

    def _check_logits(self, logits: Tensor, n: int) -> Tensor:
        """Returns logits of shape ``(n,)``; raises a ValueError unless there is one for each input."""
        if logits.numel() != n:
            raise ValueError(
                f"{type(self).__name__} needs a discriminator that returns one logit for each of {n} inputs, got shape "
                f"{tuple(logits.shape)}."
            )
        return logits.reshape(n)


class DensityRatio(_Discriminated):
    r"""The total correlation by the density ratio of a discriminator: with the ELBO, FactorVAE.

    .. math:: \gamma\, \mathrm{E}_{q(z)} \log \frac{D(z)}{1 - D(z)} \approx
        \gamma\, \mathrm{KL}\Big(q(z) \,\|\, \prod_d q(z_d)\Big)

    The discriminator classifies latents, against latents whose dimensions were permuted among the data of the batch.
    The optimizer of the loss trains it.

    Args:
        discriminator: maps latents ``(n, latent_dim)`` to one logit each.
        weight: :math:`\gamma`.
        site: the latent.

    Raises:
        ValueError: when `weight` is not finite, when the discriminator returns another shape, when there is no such
            site, or when its latents are not vectors.
        TypeError: when the discriminator is not a module.

    References:
        Disentangling by Factorising, H. Kim and A. Mnih, 2018, https://arxiv.org/abs/1802.05983.

    >>> from pyrovae import nn
    >>> DensityRatio(nn.MLP(2, 1), weight=10.0).weight
    10.0
    """

    def __init__(self, discriminator: nn.Module, weight: float, site: str = "z"):
        super().__init__(discriminator, weight)
        self.site = site

    def __call__(self, run: Run) -> Cost:
        value = _vectors(run, self.site, type(self).__name__)
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())  # classes
        z = value.reshape(-1, *value.shape[-2:])
        # An order of the data for each dimension and particle.
        order = torch.rand_like(z.detach()).argsort(dim=1)
        permuted = z.detach().gather(1, order).flatten(0, 1)
        z = z.flatten(0, 1)
        cost = self.weight * self._logits_of(z).sum() / len(z) * value.shape[-2]
        return Cost(cost, self._training_loss(z, permuted, len(z) // value.shape[-2]))


class Adversarial(_Discriminated):
    r"""An adversarial term on the means of reconstructions and samples, as in VAE-GAN, for sharper samples.

    .. math:: -\lambda \left(\log D(\mu(z)) + \log D(\mu(\tilde z))\right), \qquad
        z \sim q(z \mid x), \quad \tilde z \sim p(z), \quad \mu(z) = \mathrm{E}\, p(x \mid z)

    The discriminator classifies data, against reconstructions and samples. The optimizer of the loss trains it. The
    prior gets a gradient by the samples.

    Args:
        discriminator: maps data ``(n, *x_shape)`` to one logit each.
        weight: :math:`\lambda`.
        site: the observed site, whose distribution must have a differentiable mean.

    Raises:
        ValueError: when `weight` is not finite, when the discriminator returns another shape, or when there is no such
            site.
        TypeError: when the discriminator is not a module.

    References:
        Autoencoding beyond Pixels Using a Learned Similarity Metric, A. B. L. Larsen, S. K. Sønderby, H. Larochelle and
        O. Winther, 2016, https://arxiv.org/abs/1512.09300; Generative Adversarial Networks, I. Goodfellow et al., 2014,
        https://arxiv.org/abs/1406.2661 (the generator's loss that does not saturate).

    >>> from pyrovae import nn
    >>> Adversarial(nn.MLP((1, 8, 8), 1), weight=1.0).weight
    1.0
    """

    def __init__(self, discriminator: nn.Module, weight: float, site: str = "x"):
        super().__init__(discriminator, weight)
        self.site = site

    def __call__(self, run: Run) -> Cost:
        observed = run.site(self.site, of_guide=False)
        with poutine.trace() as tracer, poutine.uncondition():
            run.model(*run.args, **run.kwargs)
        sampled = center(sample_sites(tracer.trace)[self.site]["fn"])
        reconstructed = center(observed["fn"]).reshape(-1, *sampled.shape)[0]
        real = observed["value"].reshape(-1, *sampled.shape)[0].to(sampled.dtype)
        fake = torch.cat([reconstructed, sampled])
        return Cost(self.weight * softplus(-self._logits_of(fake)).sum(), self._training_loss(real, fake))


def _vectors(run: Run, name: str, what_for: str) -> Tensor:
    """Returns the latents of a site, ``(*particles, batch, latent_dim)``, for a regularizer."""
    site = run.site(name, of_guide=True)
    shape = tuple(site["fn"].event_shape)
    if len(shape) != 1:
        raise ValueError(
            f'{what_for} needs latents that are vectors, but site "{name}" has events of '
            f"shape {shape}. Declare the dimensions of a latent with .to_event(1)."
        )
    return site["value"]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
