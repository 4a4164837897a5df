"""The simplest density model, for comparison with a VAE."""

import torch
from torch import Tensor


def independent_baseline(train: Tensor, test: Tensor) -> tuple[str, Tensor]:
    r"""Scores data by a model with independent dimensions; a VAE that does not beat it has learned nothing.

    .. math:: p(x) = \prod_d \mathrm{Bernoulli}(x_d; \mu_d) \quad\text{or}\quad
        p(x) = \prod_d \mathcal{N}(x_d; \mu_d, \sigma^2)

    Bernoulli if all test data are 0 or 1, with :math:`\mu` smoothed by half a datum of each value; otherwise normal,
    with one :math:`\sigma` for all dimensions, so that a constant dimension does no harm. Of counts the normal gives
    densities, which say nothing beside the probabilities of a likelihood of counts.

    Args:
        train: data from which the parameters are estimated, shape ``(size, *x_shape)``.
        test: data to score, shape ``(batch, *x_shape)``.

    Returns:
        The model's name, and :math:`\log p(x)` in nats, shape ``(batch,)``.

    >>> import torch
    >>> independent_baseline(torch.eye(2), torch.eye(2))
    ('factorised Bernoulli', tensor([-1.3863, -1.3863]))
    """
    if bool(((test == 0) | (test == 1)).all()):
        bernoulli = torch.distributions.Bernoulli((train.sum(0) + 0.5) / (len(train) + 1))
        return "factorised Bernoulli", bernoulli.log_prob(test).flatten(1).sum(1)
    mean = train.mean(0)
    normal = torch.distributions.Normal(mean, (train - mean).square().mean().sqrt())
    return "factorised Normal", normal.log_prob(test).flatten(1).sum(1)
