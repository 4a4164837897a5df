"""What likelihoods have in common."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.arguments import as_tensors
from pyrovae.nn import MLP, Network, Shape, apply, as_shape, build, set_output_bias
from pyrovae.nn.base import check_count
from pyrovae.recorded import Recorded


class Likelihood(Recorded, ABC):
    r"""Base of the library's likelihoods, and how to write one.

    A likelihood takes `latent_dim` and `x_shape` first when it is built, and ``forward(z, context=None)`` maps z of
    shape ``(*leading, latent_dim)`` to a Pyro distribution with ``batch_shape == leading`` and
    ``event_shape == x_shape``. :meth:`parameters_of` calls the decoder. In a script any module with such a ``forward``
    works; the command line finds subclasses of this class::

        class Exponential(Likelihood):
            def forward(self, z, context=None):
                return dist.Exponential(self.parameters_of(z, context).exp()).to_event(len(self.x_shape))

            def output_for(self, x):  # only start_at needs it
                return -x.mean(0).log()

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one datum.
        network: the decoder, a module or a callable that builds one from ``(latent_dim, param_shape)``.
        context_dim: width of the context vector, 0 for none.
        param_shape: shape of the decoder's output; None for `x_shape`, one parameter an element.
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = MLP,
        context_dim: int = 0,
        *,
        param_shape: Shape | None = None,
    ):
        super().__init__()
        self.latent_dim, self.context_dim = check_count(latent_dim, "latent_dim"), context_dim
        self.x_shape = as_shape(x_shape, "x_shape")
        self.param_shape = self.x_shape if param_shape is None else as_shape(param_shape, "param_shape")
        self.network = build(network, latent_dim, self.param_shape, context_dim)

    def parameters_of(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the decoder's output for z, of shape ``(*leading, *param_shape)``."""
        return apply(self.network, z, context, self.param_shape, type(self).__name__)

    @abstractmethod
    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Returns the distribution."""

    def output_for(self, x: Tensor) -> Tensor:
        r"""Returns the decoder output, of shape `param_shape`, at which :math:`p(x \mid z)` has the mean of x."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no output_for(x), which start_at(x) needs. Define it, or train without "
            "start_at(x)."
        )

    def start_at(self, x: Any) -> "Likelihood":
        r"""Initialises the bias of the decoder from data, so that :math:`p(x \mid z)` has about their mean at first.

        The decoder then need not learn the average datum.

        Args:
            x: the training data, ``(size, *x_shape)``: a tensor, or an array or a sparse matrix, which is made one
                tensor.

        Returns:
            The likelihood itself.

        Raises:
            ValueError: when x does not have the shape of the likelihood, when no output gives its mean (a negative mean
                of positive data), or when the decoder does not end in a layer with a bias.

        References:
            Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
            https://arxiv.org/abs/1509.00519, whose code does so.

        >>> from pyrovae.likelihoods import Bernoulli
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
        >>> Bernoulli(1, 2).start_at(x)(torch.zeros(3, 1)).mean.shape
        torch.Size([3, 2])
        """
        with torch.no_grad():
            set_output_bias(self.network, self.output_for(self._check_data(x)))
        return self

    def _check_data(self, x: Any) -> Tensor:
        (x,), _ = as_tensors((x,), {})
        if len(x) == 0 or x.shape[1:] != self.x_shape:
            raise ValueError(f"x must have shape (size, {', '.join(map(str, self.x_shape))}), got {tuple(x.shape)}.")
        return x if x.is_floating_point() else x.float()

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, x_shape={self.x_shape}"


def bits_per_dim(log_prob: Tensor, x_shape: Shape, bin_width: float = 1.0) -> Tensor:
    r"""Converts log-probabilities in nats to bits per dimension; lower is better.

    .. math:: -\frac{\log p(x) + D \log w}{D \log 2}

    Args:
        log_prob: log p(x) in nats, of any shape.
        x_shape: shape of one datum, of D dimensions.
        bin_width: w, for a density of data that were rounded to bins of this width (and dequantised). The density times
            the volume of a bin is the probability of the bin, which is comparable with discrete likelihoods. 1/256 for
            bytes scaled to [0, 1].

    Raises:
        ValueError: when `bin_width` is not positive and finite.

    References:
        A Note on the Evaluation of Generative Models, L. Theis, A. van den Oord and M. Bethge, 2016,
        https://arxiv.org/abs/1511.01844.

    >>> bits_per_dim(torch.tensor([0.0]), (3, 32, 32), bin_width=1 / 256)
    tensor([8.])
    """
    if not 0 < bin_width < math.inf:
        raise ValueError(f"bin_width must be positive and finite, got {bin_width}.")
    return -(log_prob / math.prod(as_shape(x_shape, "x_shape")) + math.log(bin_width)) / math.log(2)


def keep_log(part: nn.Module, name: str, value: float, shape: tuple[int, ...], learn: bool = True) -> None:
    """Registers the logarithm of a positive number as the parameter (or buffer) ``log_<name>``.

    Args:
        part: the module.
        name: name of the number.
        value: its initial value.
        shape: shape of the parameter; all its elements start at the same value.
        learn: whether it is a parameter; otherwise it is a buffer.

    Raises:
        ValueError: when the value is not positive and finite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    log = torch.full(shape, math.log(value))
    if learn:
        part.register_parameter(f"log_{name}", nn.Parameter(log))
    else:
        part.register_buffer(f"log_{name}", log)


def inside(mean: Tensor, size: int) -> Tensor:
    """Clamps means of `size` numbers from 0 to 1 to half a datum from the ends, where a logit is infinite."""
    return mean.clamp(0.5 / size, 1 - 0.5 / size)


def bounded(log: Tensor) -> Tensor:
    """Clamps the output of a network, so that its exponential and the inverse are finite in float32."""
    return log.clamp(-60, 60)
