"""Likelihoods of bits, counts, classes and grey levels."""

import math

import torch
from pyro import distributions as dist
from torch import Tensor

from pyrovae import distributions
from pyrovae.likelihoods.base import Likelihood, bounded, inside, keep_log
from pyrovae.nn import MLP, Network, Shape, as_shape


class Bernoulli(Likelihood):
    r"""Independent Bernoulli pixels, for data that are 0 or 1.

    .. math:: p(x \mid z) = \prod_d \mu_d(z)^{x_d} (1 - \mu_d(z))^{1 - x_d}, \qquad \mu(z) = \sigma(\mathrm{network}(z))

    Grey values between 0 and 1 are outside the support, because their "likelihood" does not integrate to one. Binarise
    them (``fit(..., transform=pyrovae.data.dynamic_binarization)``) or use a likelihood of real numbers.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114.

    >>> Bernoulli(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(torch.ones(1, 8, 8)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, x_shape: Shape, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, x_shape, network, context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.IndependentBernoulli(
            dist.Bernoulli(logits=self.parameters_of(z, context)), len(self.x_shape)
        )

    def output_for(self, x: Tensor) -> Tensor:
        return inside(x.mean(0), len(x)).logit()


class SigmoidBelief(Likelihood):
    r"""Binary data whose elements depend on the latent and on the elements before: chords, pixels, answers.

    .. math:: p(x \mid z) = \prod_d \mu_d^{x_d} (1 - \mu_d)^{1 - x_d}, \qquad
        \mu_d = \sigma\left(\mathrm{network}(z)_d + \sum_{i < d} x_i W_{id}\right)

    It is a fully visible sigmoid belief network given z. Which elements come together, such as the keys of a chord,
    :class:`Bernoulli` leaves to the latent; here one matrix says it, which is learned from zero. All elements are
    scored in one pass, and drawn one after the other, in their order in memory.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum, of D elements; the matrix has D² numbers.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        context_dim: width of the context vector, 0 for none.

    References:
        Connectionist Learning of Belief Networks, R. M. Neal, 1992, https://doi.org/10.1016/0004-3702(92)90065-6.
        Modeling Temporal Dependencies in High-Dimensional Sequences, N. Boulanger-Lewandowski, Y. Bengio and
        P. Vincent, 2012, https://arxiv.org/abs/1206.6392 (chords).

    >>> SigmoidBelief(2, 88)(torch.zeros(5, 2)).log_prob(torch.ones(88)).shape
    torch.Size([5])
    """

    def __init__(self, latent_dim: int, x_shape: Shape, network: Network = MLP, context_dim: int = 0):
        super().__init__(latent_dim, x_shape, network, context_dim)
        size = math.prod(self.x_shape)
        self.weight = torch.nn.Parameter(torch.zeros(size, size))

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.SigmoidBelief(self.parameters_of(z, context), self.weight.triu(1), len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return inside(x.mean(0), len(x)).logit()  # where the matrix is zero, as it is at first


class Poisson(Likelihood):
    r"""Independent Poisson counts.

    .. math:: p(x \mid z) = \prod_d \frac{\mu_d^{x_d} e^{-\mu_d}}{x_d!}, \qquad \mu(z) = e^{\mathrm{network}(z)}

    With `library`, :math:`\mu = l\, \mathrm{softmax}(\mathrm{network}(z, c))` instead. The last number of the context c
    is :math:`\log l`, the logarithm of the library size of a datum (its expected total).

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        library: whether the last column of the context is the logarithm of a library size.
        context_dim: width of the context vector, 0 for none; includes the library size.

    Raises:
        ValueError: with `library` when there is no context.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> x = torch.tensor([[3.0, 0.0, 1.0], [10.0, 2.0, 0.0]])
    >>> likelihood = Poisson(2, 3, library=True, context_dim=1)
    >>> likelihood(torch.zeros(2, 2), context=x.sum(-1, keepdim=True).log()).mean.sum(-1).detach().round()
    tensor([ 4., 12.])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        library: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        _check_library(library, context_dim)
        self.library = library

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        log_mean = _log_mean(self.parameters_of(z, context), len(self.x_shape), context if self.library else None)
        return distributions.Poisson(log_mean).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return _log_mean_count(x)


class NegativeBinomial(Likelihood):
    r"""Independent negative binomial counts: Poisson counts whose rates vary.

    .. math:: p(x \mid z) = \prod_d \frac{\Gamma(x_d + \theta_d)}{x_d!\, \Gamma(\theta_d)}
        \left(\frac{\theta_d}{\theta_d + \mu_d}\right)^{\theta_d} \left(\frac{\mu_d}{\theta_d + \mu_d}\right)^{x_d},
        \qquad \mu(z) = e^{\mathrm{network}(z)}

    The variance is :math:`\mu + \mu^2 / \theta`. With `library`,
    :math:`\mu = l\, \mathrm{softmax}(\mathrm{network}(z, c))` instead. The last number of the context c is
    :math:`\log l`, the logarithm of the library size of a datum.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        inverse_dispersion: initial :math:`\theta`; its logarithm is learned for each dimension of x.
        library: whether the last column of the context is the logarithm of a library size.
        context_dim: width of the context vector, 0 for none; includes the library size.

    Raises:
        ValueError: when `inverse_dispersion` is not positive and finite; with `library` when there is no context.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> NegativeBinomial(2, 3)(torch.zeros(5, 2)).log_prob(torch.ones(5, 3)).shape
    torch.Size([5])
    """

    log_inverse_dispersion: Tensor

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        inverse_dispersion: float = 1.0,
        library: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        keep_log(self, "inverse_dispersion", inverse_dispersion, self.x_shape)
        _check_library(library, context_dim)
        self.library = library

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        log_mean = _log_mean(self.parameters_of(z, context), len(self.x_shape), context if self.library else None)
        counts = distributions.NegativeBinomial(self.log_inverse_dispersion.exp(), log_mean=log_mean)
        return counts.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return _log_mean_count(x)


class ZeroInflatedNegativeBinomial(Likelihood):
    r"""Independent negative binomial counts, each replaced by zero with some probability.

    .. math:: p(x \mid z) = \prod_d \left(\pi_d [x_d = 0] + (1 - \pi_d)\, \mathrm{NB}(x_d; \mu_d, \theta_d)\right),
        \qquad \mu(z) = e^{\mathrm{network}(z)_1}, \quad \pi(z) = \sigma(\mathrm{network}(z)_2)

    NB is the distribution of :class:`NegativeBinomial`, and `library` has the same meaning as there.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (2, *x_shape))``.
        inverse_dispersion: initial :math:`\theta`; its logarithm is learned for each dimension of x.
        library: whether the last column of the context is the logarithm of a library size.
        context_dim: width of the context vector, 0 for none; includes the library size.

    Raises:
        ValueError: when `inverse_dispersion` is not positive and finite; with `library` when there is no context.

    References:
        Deep Generative Modeling for Single-Cell Transcriptomics, R. Lopez, J. Regier, M. B. Cole, M. I. Jordan and
        N. Yosef, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    >>> ZeroInflatedNegativeBinomial(2, 3)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """

    log_inverse_dispersion: Tensor

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        inverse_dispersion: float = 1.0,
        library: bool = False,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=(2, *as_shape(x_shape, "x_shape")))
        keep_log(self, "inverse_dispersion", inverse_dispersion, self.x_shape)
        _check_library(library, context_dim)
        self.library = library

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        raw, gate_logits = self.parameters_of(z, context).unbind(-len(self.param_shape))
        log_mean = _log_mean(raw, len(self.x_shape), context if self.library else None)
        theta = self.log_inverse_dispersion.exp()
        p = distributions.ZeroInflatedNegativeBinomial(theta, None, gate_logits, log_mean=log_mean)
        return p.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        log_mean = _log_mean_count(x)  # the gate starts at one half, so the other counts have twice the mean
        return torch.stack([log_mean + math.log(2), torch.zeros_like(log_mean)])


class Categorical(Likelihood):
    r"""Independent classes, numbered from 0, as floats or integers.

    .. math:: p(x \mid z) = \prod_d \mathrm{softmax}(\mathrm{network}(z)_{\cdot d})_{x_d}

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum, one class number an element.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (num_classes, *x_shape))``.
        num_classes: number of classes, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_classes` is below 2.

    References:
        Pixel Recurrent Neural Networks, A. van den Oord, N. Kalchbrenner and K. Kavukcuoglu, 2016,
        https://arxiv.org/abs/1601.06759.

    >>> Categorical(2, (8, 8), num_classes=4)(torch.zeros(5, 2)).log_prob(torch.full((5, 8, 8), 3.0)).shape
    torch.Size([5])
    """

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, num_classes: int = 256, context_dim: int = 0
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        param_shape = (num_classes, *as_shape(x_shape, "x_shape"))
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=param_shape)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        logits = self.parameters_of(z, context).movedim(-len(self.param_shape), -1)
        return distributions.Categorical(logits=logits).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        # Half a datum is added to each class: the logarithm is finite for a class that does not occur.
        counts = torch.stack([(x == k).sum(0) for k in range(self.param_shape[0])]) + 0.5
        return torch.log(counts / counts.sum(0))


class Multinomial(Likelihood):
    r"""Counts given their total, such as those of words in a document or of items that a user chose.

    .. math:: p(x \mid z) = \frac{n!}{\prod_d x_d!} \prod_d \pi_d(z)^{x_d}, \qquad n = \sum_d x_d, \quad
        \pi(z) = \mathrm{softmax}(\mathrm{network}(z))

    The log-probability is conditional on the total n of each datum, which may differ from datum to datum.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, x_shape)``.
        total_count: the total of samples and of the mean.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `total_count` is below 1.

    References:
        Variational Autoencoders for Collaborative Filtering, D. Liang, R. G. Krishnan, M. D. Hoffman and T. Jebara,
        2018, https://arxiv.org/abs/1802.05814.

    >>> Multinomial(2, 3, total_count=10)(torch.zeros(5, 2)).sample().sum(-1)
    tensor([10., 10., 10., 10., 10.])
    """

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, total_count: int = 1, context_dim: int = 0
    ):
        super().__init__(latent_dim, x_shape, network, context_dim)
        if total_count < 1:
            raise ValueError(f"total_count must be at least 1, got {total_count}.")
        self.total_count = total_count

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.Multinomial(self.total_count, self.parameters_of(z, context), len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        return _log_mean_count(x)


class DiscretizedLogistic(Likelihood):
    r"""Independent logistic pixels rounded to a grid, for bytes: data are ``k / (levels - 1)``, from 0 to 1.

    .. math:: p(x \mid z) = \prod_d \int_{a(x_d)}^{b(x_d)} \mathrm{Logistic}(u; \mu_d, s_d)\, du, \qquad
        \mu(z) = \tfrac{1}{2} + \mathrm{network}(z)_1, \quad s(z) = e^{\mathrm{network}(z)_2}

    The integral is from half a level below to half a level above; the first and the last level have the tails. Its
    log-probabilities are comparable with those of a categorical likelihood, and with densities by :func:`bits_per_dim`.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, (2, *x_shape))``.
        levels: number of levels, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `levels` is below 2.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow, D. P. Kingma et al., 2016,
        https://arxiv.org/abs/1606.04934.

    >>> x = torch.randint(256, (5, 1, 8, 8)) / 255
    >>> DiscretizedLogistic(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(x).shape
    torch.Size([5])
    """

    def __init__(
        self, latent_dim: int, x_shape: Shape, network: Network = MLP, levels: int = 256, context_dim: int = 0
    ):
        _check_levels(levels)
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=(2, *as_shape(x_shape, "x_shape")))
        self.levels = levels

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, log_scale = self.parameters_of(z, context).unbind(-len(self.param_shape))
        p = distributions.DiscretizedLogistic(loc + 0.5, log_scale.clamp(-20, 20).exp(), self.levels)
        return p.to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        # Only about the mean of the data: the tails outside the grid change it.
        scale = (x.std(0, correction=0) * math.sqrt(3) / math.pi).clamp_min(0.5 / (self.levels - 1))
        return torch.stack([x.mean(0) - 0.5, scale.log()])


class DiscretizedLogisticMixture(Likelihood):
    r"""Independent mixtures of rounded logistic distributions: pixels as in PixelCNN++, but independent.

    .. math:: p(x \mid z) = \prod_d \sum_{k=1}^K \pi_{kd}(z) \int_{a(x_d)}^{b(x_d)} \mathrm{Logistic}(u; \mu_{kd}(z),
        s_{kd}(z))\, du

    The integral and the location and scale are those of :class:`DiscretizedLogistic`; :math:`\pi` is the softmax of the
    first output of the network.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from
            ``(latent_dim, (3 * num_components, *x_shape))``: logits, locations, then logarithms of scales.
        num_components: K, the number of components, at least 1.
        levels: number of levels, at least 2.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_components` is below 1 or `levels` below 2.

    References:
        PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications,
        T. Salimans, A. Karpathy, X. Chen and D. P. Kingma, 2017, https://arxiv.org/abs/1701.05517.

    >>> x = torch.randint(256, (5, 1, 8, 8)) / 255
    >>> DiscretizedLogisticMixture(2, (1, 8, 8))(torch.zeros(5, 2)).log_prob(x).shape
    torch.Size([5])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        num_components: int = 5,
        levels: int = 256,
        context_dim: int = 0,
    ):
        _check_levels(levels)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}.")
        param_shape = (3 * num_components, *as_shape(x_shape, "x_shape"))
        super().__init__(latent_dim, x_shape, network, context_dim, param_shape=param_shape)
        self.num_components, self.levels = num_components, levels

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        parameters = self.parameters_of(z, context).movedim(-len(self.param_shape), -1)
        logits, loc, log_scale = parameters.chunk(3, dim=-1)
        components = distributions.DiscretizedLogistic(loc + 0.5, log_scale.clamp(-20, 20).exp(), self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components).to_event(len(self.x_shape))

    def output_for(self, x: Tensor) -> Tensor:
        # Components spread over two standard deviations, because identical ones would stay alike for long.
        std = x.std(0, correction=0).clamp_min(0.5 / (self.levels - 1))
        offset = (torch.arange(self.num_components) * 2 + 1) / self.num_components - 1
        loc = torch.stack([x.mean(0) - 0.5 + float(o) * std for o in offset])
        log_scale = (std * math.sqrt(3) / math.pi / math.sqrt(self.num_components)).log().expand(loc.shape)
        return torch.cat([torch.zeros_like(loc), loc, log_scale])


def _log_mean(raw: Tensor, event_dim: int, library: Tensor | None) -> Tensor:
    """Returns the logarithms of the means of counts; `library` is the context that ends in the log library size."""
    if library is None:
        return bounded(raw)
    log_proportions = raw.flatten(raw.dim() - event_dim).log_softmax(-1).reshape(raw.shape)
    return bounded(log_proportions + library[..., -1].reshape(library.shape[:-1] + (1,) * event_dim))


def _check_library(library: bool, context_dim: int) -> None:
    if library and context_dim < 1:
        raise ValueError(
            "library=True takes the log library size from the last column of the context, and needs context_dim of at "
            f"least 1, got {context_dim}. Build the likelihood with context_dim=1 or more."
        )


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")


def _log_mean_count(x: Tensor) -> Tensor:
    return x.mean(0).clamp_min(0.5 / len(x)).log()  # half a count where all counts are zero
