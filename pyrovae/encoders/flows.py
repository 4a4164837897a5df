"""Encoders that transform a normal by a flow of zuko's."""

from abc import abstractmethod

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.distributions import positive
from pyrovae.encoders.base import Encoder
from pyrovae.nn import MLP, Network, Shape


class _FlowEncoder(Encoder):
    """A normal posterior transformed by a flow that depends on features of x."""

    def __init__(
        self,
        x_shape: Shape,
        latent_dim: int,
        network: Network = MLP,
        num_transforms: int = 2,
        num_features: int = 32,
        context_dim: int = 0,
    ):
        for name, value in (("num_transforms", num_transforms), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        super().__init__(x_shape, latent_dim, network, context_dim, num_params=2 * latent_dim + num_features)
        self.flow = self._flow(num_transforms, num_features)

    @abstractmethod
    def _flow(self, num_transforms: int, num_features: int) -> nn.Module:
        """Returns a flow of zuko's of `latent_dim` dimensions with a context of `num_features`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        d, params = self.latent_dim, self.parameters_of(x, context)
        return distributions.Flow(self.flow, params[..., :d], positive(params[..., d : 2 * d]), params[..., 2 * d :])


class InverseAutoregressiveFlow(_FlowEncoder):
    r"""A normal posterior transformed by inverse autoregressive flows that depend on features of x.

    .. math:: z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x)), \qquad \epsilon \sim \mathcal{N}(0, I)

    Drawing takes one pass through the flow, which also gives the density of the draw. The density of any other z is
    exact too, and takes as many passes as there are dimensions.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, 2 * latent_dim + num_features)``: mean, scale
            and features h.
        num_transforms: flows one after the other, at least 1.
        num_features: width of h, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_transforms` or `num_features` is below 1.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, D. P. Kingma, T. Salimans, R. Jozefowicz,
        X. Chen, I. Sutskever and M. Welling, 2016, https://arxiv.org/abs/1606.04934.

    >>> InverseAutoregressiveFlow(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def _flow(self, num_transforms: int, num_features: int) -> nn.Module:
        zuko, d = distributions.import_zuko(), self.latent_dim
        orders = [torch.arange(d), torch.arange(d).flip(0)]
        transforms = [
            zuko.flows.MaskedAutoregressiveTransform(d, num_features, order=orders[i % 2]).inv
            for i in range(num_transforms)
        ]
        normal = zuko.distributions.DiagNormal
        base = zuko.lazy.UnconditionalDistribution(normal, torch.zeros(d), torch.ones(d), buffer=True)
        return zuko.flows.Flow(transforms, base)


class NeuralSplineFlow(_FlowEncoder):
    r"""A normal posterior transformed by neural spline flows that depend on features of x.

    .. math:: z = \mu(x) + \sigma(x) \odot f(\epsilon; h(x)), \qquad \epsilon \sim \mathcal{N}(0, I)

    These are coupling flows: drawing, and the density of any z, take two passes through each. They transform values
    within five standard deviations of the mean, and are the identity outside.

    Args:
        x_shape: shape of one datum.
        latent_dim: number of latent dimensions.
        network: a module, or a callable that builds one from ``(x_shape, 2 * latent_dim + num_features)``: mean, scale
            and features h.
        num_transforms: flows one after the other, at least 1.
        num_features: width of h, at least 1.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `num_transforms` or `num_features` is below 1.

    References:
        Neural Spline Flows, C. Durkan, A. Bekasov, I. Murray and G. Papamakarios, 2019,
        https://arxiv.org/abs/1906.04032.

    >>> NeuralSplineFlow(64, 3)(torch.zeros(5, 64)).rsample().shape
    torch.Size([5, 3])
    """

    def _flow(self, num_transforms: int, num_features: int) -> nn.Module:
        flows = distributions.import_zuko().flows
        return flows.NSF(self.latent_dim, num_features, transforms=num_transforms, passes=2)
