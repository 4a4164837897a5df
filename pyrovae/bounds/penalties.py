"""Functions of KL divergences that replace the divergences in the ELBO's loss."""

from abc import ABC, abstractmethod

from torch import Tensor

from pyrovae.bounds.schedules import Schedule, check_weight, value_at
from pyrovae.inference.messages import described
from pyrovae.recorded import NumbersChecked


class Penalty(NumbersChecked, ABC):
    """Base of functions of KL divergences that replace the divergences in the ELBO's loss.

    Args:
        per_dimension: whether it takes the divergence of each dimension of a latent, or that of the whole latent.
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
    r"""Free bits: divergences below a threshold are not penalised, so that the latents are used.

    .. math:: \sum_g \max(\lambda, \overline{\mathrm{KL}}_g)

    over groups of dimensions, with the mean over the data of the batch, as in the paper. Groups need a prior and a
    posterior with independent dimensions.

    By default each dimension is a group of its own: ``FreeBits(5.0)`` with 16 latents leaves 16 * 5 = 80 nats free,
    more than most models use, and then no divergence is penalised. For 5 nats over all dimensions together, say
    ``FreeBits(5.0, group_size=None)``.

    Args:
        nats: threshold :math:`\lambda` for each group, by default each dimension, in nats (a bit is 0.693), at least 0.
        group_size: dimensions per group, where the last group may be smaller; None for one group of all dimensions.

    Raises:
        ValueError: when `nats` is negative or not finite, or `group_size` is below 1.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow, D. P. Kingma, T. Salimans, R. Jozefowicz,
        X. Chen, I. Sutskever and M. Welling, 2016, https://arxiv.org/abs/1606.04934.

    >>> import torch
    >>> FreeBits(0.5)(torch.tensor([[0.1, 2.0], [0.3, 4.0]]), step=0)
    tensor([3.5000, 3.5000])
    >>> FreeBits(0.5, group_size=None)(torch.tensor([2.1, 4.3]), step=0)
    tensor([3.2000, 3.2000])
    """

    def __init__(self, nats: float, group_size: int | None = 1):
        self.nats = check_weight("nats", nats)
        if group_size is not None and not (isinstance(group_size, int) and group_size >= 1):
            raise ValueError(
                f"group_size must be an integer of at least 1, or None for all dimensions, got {group_size}."
            )
        self.group_size, self.per_dimension = group_size, group_size is not None

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        groups = kl.mean(0).reshape(1) if self.group_size is None else kl.mean(0).split(self.group_size)
        total = sum(group.sum().clamp_min(self.nats) for group in groups)
        return total.expand(len(kl))


class Capacity(Penalty):
    r"""A target for the KL divergence of each latent site, which a schedule may raise in training.

    .. math:: |\overline{\mathrm{KL}} - C_t|

    with the mean over the data of the batch, so that the noise of an estimated divergence averages out. Its weight
    :math:`\gamma` is the ELBO's `beta`.

    Args:
        nats: :math:`C_t`, a number or a :class:`Schedule`, at least 0.

    Raises:
        ValueError: when `nats` is negative or not finite.

    References:
        Understanding Disentangling in beta-VAE, C. P. Burgess et al., 2018, https://arxiv.org/abs/1804.03599.

    >>> import torch
    >>> from pyrovae.bounds import Linear
    >>> Capacity(Linear(steps=100, end=25.0))(torch.tensor([3.0, 4.0]), step=20)
    tensor([1.5000, 1.5000])
    """

    def __init__(self, nats: float | Schedule):
        self.nats = nats if isinstance(nats, Schedule) else check_weight("nats", nats)

    def __call__(self, kl: Tensor, step: int | None) -> Tensor:
        return (kl.mean() - value_at(self.nats, step)).abs().expand(len(kl))
