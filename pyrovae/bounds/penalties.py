"""Functions of KL divergences that the ELBO takes in place of the divergences."""

from abc import ABC, abstractmethod

from torch import Tensor

from pyrovae.bounds.schedules import Schedule, check_weight, value_at
from pyrovae.inference.messages import described


class Penalty(ABC):
    """Base of functions of KL divergences that the ELBO takes in their place.

    Args:
        per_dimension: whether it is given the divergence of each dimension of a latent, or that of the whole.
    """

    per_dimension: bool = False

    @abstractmethod
    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        """Returns a penalty per datum, ``(batch,)``, which autograd can differentiate.

        Args:
            kl: divergence of one latent site, ``(batch,)``, or ``(batch, latent_dim)`` of each dimension.
            step: training steps so far; None in evaluation.
        """

    def __repr__(self) -> str:
        return described(self)


class FreeBits(Penalty):
    r"""Free bits: divergences below a threshold cost nothing more, so that they are used.

    .. math:: \sum_g \max(\lambda, \overline{\mathrm{KL}}_g)

    over groups of dimensions, with the mean over the data of the batch, as in the paper. Groups need a prior and a
    posterior whose dimensions are independent.

    Args:
        nats: threshold :math:`\lambda` for each group, in nats (a bit is 0.693), at least 0.
        group_size: dimensions a group, the last one perhaps smaller; 1 for each dimension by itself, None for all of a
            latent site together.

    Raises:
        ValueError: when `nats` is negative or not finite, or `group_size` is below 1.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, D. P. Kingma, T. Salimans, R. Jozefowicz,
        X. Chen, I. Sutskever and M. Welling, 2016, https://arxiv.org/abs/1606.04934.

    >>> FreeBits(0.5)(torch.tensor([[0.1, 2.0], [0.3, 4.0]]), step=0)
    tensor([3.5000, 3.5000])
    """

    def __init__(self, nats: float, group_size: int | None = 1):
        self.nats = check_weight("nats", nats)
        if group_size is not None and not (isinstance(group_size, int) and group_size >= 1):
            raise ValueError(
                f"group_size must be an integer of at least 1, or None for all together, got {group_size}."
            )
        self.group_size, self.per_dimension = group_size, group_size is not None

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        groups = kl.mean(0).reshape(1) if self.group_size is None else kl.mean(0).split(self.group_size)
        total = sum(group.sum().clamp_min(self.nats) for group in groups)
        return total.expand(len(kl))


class Capacity(Penalty):
    r"""A target for the KL divergence of each latent site, which training raises slowly.

    .. math:: |\overline{\mathrm{KL}} - C_t|

    of the mean over the data of the batch, so that the noise of an estimated divergence hardly counts. The ELBO's `beta`
    is its weight :math:`\gamma`.

    Args:
        nats: :math:`C_t`, a number or a :class:`Schedule`, at least 0.

    Raises:
        ValueError: when `nats` is negative or not finite.

    References:
        Understanding Disentangling in beta-VAE, C. P. Burgess et al., 2018, https://arxiv.org/abs/1804.03599.

    >>> Capacity(Linear(steps=100, end=25.0))(torch.tensor([3.0, 4.0]), step=20)
    tensor([1.5000, 1.5000])
    """

    def __init__(self, nats: float | Schedule):
        self.nats = nats if isinstance(nats, Schedule) else check_weight("nats", nats)

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        return (kl.mean() - value_at(self.nats, step)).abs().expand(len(kl))
