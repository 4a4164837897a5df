r"""Schedules of temperatures for annealing, and the pilot run that they are computed from."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.estimators.base import check_positive
from pyrovae.inference.messages import described
from pyrovae.recorded import NumbersChecked


class TemperingPath(NamedTuple):
    r"""What a pilot run learned on its way from the start q to the posterior; the first dimension is time.

    Args:
        betas: the temperatures, ``(steps, batch)``, from 0 to 1.
        step_sizes: step sizes of the moves that give the target acceptance rate, of the same shape.
        scales: standard deviations of the chains, ``(steps, batch, dim)``.
        speeds: standard deviations of :math:`\log p(x, z) - \log q(z)` over the chains, ``(steps, batch)``.
    """

    betas: Tensor
    step_sizes: Tensor
    scales: Tensor
    speeds: Tensor

    def at(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns step sizes and scales at temperatures ``(batch,)``, by interpolation of their logarithms."""
        upper, share = _between(self.betas, beta.unsqueeze(0))
        rows = torch.arange(len(beta), device=beta.device)

        def at(values: Tensor, share: Tensor) -> Tensor:
            return torch.lerp(values[upper[0] - 1, rows].log(), values[upper[0], rows].log(), share).exp()

        return at(self.step_sizes, share[0]), at(self.scales, share[0].unsqueeze(-1))


class Schedule(NumbersChecked, ABC):
    r"""Base of the schedules of temperatures, :math:`0 = \beta_0 < \dots < \beta_T = 1`.

    To add one, write :meth:`betas`.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models, Y. Wu, Y. Burda, R. Salakhutdinov and R.
        Grosse, 2017, https://arxiv.org/abs/1611.04273.
    """

    @abstractmethod
    def betas(self, num_temperatures: int, pilot: TemperingPath) -> Tensor:
        """Returns the temperatures.

        Args:
            num_temperatures: T.
            pilot: what a pilot run learned.

        Returns:
            Shape ``(num_temperatures + 1, batch)``, or ``(num_temperatures + 1, 1)`` if they are the same for all data.
        """

    def __repr__(self) -> str:
        return described(self)


class Linear(Schedule):
    r"""Equal steps, :math:`\beta_t = t / T`."""

    def betas(self, num_temperatures: int, pilot: TemperingPath) -> Tensor:
        return torch.linspace(0, 1, num_temperatures + 1).unsqueeze(-1)


class Sigmoid(Schedule):
    r"""Small steps at both ends, as in Wu et al.

    .. math:: \beta_t = \frac{\sigma(\delta (2t/T - 1)) - \sigma(-\delta)}{\sigma(\delta) - \sigma(-\delta)}

    Args:
        rate: :math:`\delta`, positive.
    """

    def __init__(self, rate: float = 4.0):
        check_positive("rate", rate)
        self.rate = rate

    def betas(self, num_temperatures: int, pilot: TemperingPath) -> Tensor:
        s = (self.rate * torch.linspace(-1, 1, num_temperatures + 1, dtype=torch.float64)).sigmoid()
        return ((s - s[0]) / (s[-1] - s[0])).float().unsqueeze(-1)


class Adaptive(Schedule):
    r"""Steps with equal variation of the log weights, for each datum: the least variance to first order.

    .. math:: \int_{\beta_{t-1}}^{\beta_t} \sqrt{\mathrm{Var}_{f_\beta}\left[\log p(x, z) - \log q(z)\right]}\, d\beta
        = \text{const.}

    References:
        Simulating Normalizing Constants: From Importance Sampling to Bridge Sampling to Path Sampling, A. Gelman and
        X.-L. Meng, 1998, https://doi.org/10.1214/ss/1028905934.
    """

    def betas(self, num_temperatures: int, pilot: TemperingPath) -> Tensor:
        steps = pilot.betas.diff(dim=0)
        speed = 0.5 * (pilot.speeds[1:] + pilot.speeds[:-1])
        # With a tenth of equal steps, in case the pilot run misses some variation.
        length = speed * steps
        length = length / length.sum(0, keepdim=True).clamp(min=1e-12) + 0.1 * steps
        at = torch.cat([torch.zeros_like(length[:1]), length.cumsum(0)])
        at = at / at[-1:]
        grid = torch.linspace(0, 1, num_temperatures + 1, dtype=at.dtype, device=at.device)
        betas = _interpolate(grid.unsqueeze(-1).expand(-1, at.shape[1]), at, pilot.betas)
        betas[0], betas[-1] = 0.0, 1.0
        return betas


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Returns values at x by linear interpolation between ascending known points; all ``(points, batch)``."""
    upper, share = _between(known, x)
    return torch.lerp(values.gather(0, upper - 1), values.gather(0, upper), share)


def _between(known: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index of the known point above x, and the position of x between the point below, 0, and it, 1."""
    upper = torch.searchsorted(known.T.contiguous(), x.T.contiguous()).T.clamp(1, len(known) - 1)
    low, high = known.gather(0, upper - 1), known.gather(0, upper)
    return upper, ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
