"""Distributions that neither torch nor Pyro has, each a Pyro distribution like any other."""

import torch
from pyro import distributions as dist
from torch import Tensor

__all__ = ["IndependentBernoulli", "center"]


def center(p: dist.TorchDistribution) -> Tensor:
    """Returns the mean of a distribution, or its mode where it has no finite mean (classes, heavy tails).

    >>> center(dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
    tensor(2.)
    """
    mean = p.mean
    return mean if bool(torch.isfinite(mean).all()) else torch.where(torch.isfinite(mean), mean, p.mode.to(mean.dtype))


class IndependentBernoulli(dist.Independent):
    r"""``Bernoulli(logits=...).to_event(n)`` with a log-probability several times as fast, to the same rounding.

    .. math:: \log p(x) = \sum_d \left(x_d l_d - \max(l_d, 0)\right)
        - \sum_g \log \prod_{d \in g} \left(1 + e^{-|l_d|}\right)

    One logarithm serves a group g of up to 64 dimensions: every factor is in (1, 2], so the product cannot overflow.

    Args:
        base_distribution: a Bernoulli distribution.
        reinterpreted_batch_ndims: how many of its batch dimensions are event dimensions.

    >>> logits, x = torch.tensor([[-2.0, 0.5, 3.0]]), torch.tensor([0.0, 1.0, 1.0])
    >>> IndependentBernoulli(dist.Bernoulli(logits=logits), 1).log_prob(x)
    tensor([-0.6496])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        event_dims = self.reinterpreted_batch_ndims
        if event_dims == 0:
            return super().log_prob(value)
        if self._validate_args:
            self.base_dist._validate_sample(value)
        logits = self.base_dist.logits
        logits, value = torch.broadcast_tensors(logits, value.to(logits.dtype))
        return _BernoulliLogProb.apply(logits.flatten(-event_dims), value.flatten(-event_dims))


class _BernoulliLogProb(torch.autograd.Function):
    """The sum over the last dimension, with its derivatives x - sigmoid(l) by l and l by x instead of a product's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        size = logits.shape[-1]
        group = max(n for n in range(1, 65) if size % n == 0)
        factors = logits.abs().neg_().exp_().add_(1).unflatten(-1, (group, -1))
        return (x * logits).sub_(logits.relu()).sum(-1) - factors.prod(-2).log_().sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, x = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        by_logits = grad * (x - logits.sigmoid()) if ctx.needs_input_grad[0] else None
        return by_logits, grad * logits if ctx.needs_input_grad[1] else None
