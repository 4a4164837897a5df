"""Preprocessing of data before training."""

import torch
from torch import Tensor

from pyrovae.rows import Rows


def dynamic_binarization(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    r"""Draws binary pixels with grey values as probabilities, again at each call; for ``fit(..., transform=...)``.

    .. math:: b_d \sim \mathrm{Bernoulli}(x_d)

    Args:
        x: grey values between 0 and 1.
        *rest: the other tensors of the batch, returned unchanged.

    Raises:
        ValueError: when a value is not between 0 and 1.

    References:
        On the Quantitative Analysis of Deep Belief Networks, R. Salakhutdinov and I. Murray, 2008,
        https://doi.org/10.1145/1390156.1390266.

    >>> dynamic_binarization(torch.tensor([0.0, 1.0]))
    (tensor([0., 1.]),)
    """
    _check_grey(x)
    return torch.bernoulli(x), *rest


def static_binarization(x: Tensor | Rows, seed: int = 0) -> Tensor:
    r"""Draws binary pixels with grey values as probabilities once: the same draw for the same seed.

    .. math:: b_d \sim \mathrm{Bernoulli}(x_d)

    Args:
        x: grey values between 0 and 1.
        seed: seed of the draw.

    Raises:
        ValueError: when a value is not between 0 and 1.

    References:
        On the Quantitative Analysis of Deep Belief Networks, R. Salakhutdinov and I. Murray, 2008,
        https://doi.org/10.1145/1390156.1390266.

    >>> static_binarization(torch.tensor([0.0, 0.5, 0.5, 1.0]))
    tensor([0., 0., 1., 1.])
    """
    x = x[:] if isinstance(x, Rows) else x
    _check_grey(x)
    return torch.bernoulli(x, generator=torch.Generator(x.device).manual_seed(seed))


def split_missing(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits data with NaN for missing values into data and a mask, for :class:`~pyrovae.structures.MissingDataVAE`.

    Args:
        x: data of any shape, NaN where a value is missing.

    Returns:
        x with zeros for missing values, and a mask of the same shape, True where x is observed.

    >>> split_missing(torch.tensor([1.0, float("nan")]))
    (tensor([1., 0.]), tensor([ True, False]))
    """
    mask = ~torch.isnan(x)
    return torch.where(mask, x, 0), mask


def _check_grey(x: Tensor) -> None:
    if x.is_cuda:  # the comparison would wait for the GPU; torch.bernoulli checks its argument there
        return
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            f"only values between 0 and 1 can be binarised, but x ranges from {x.min():g} to {x.max():g}. Divide 8-bit "
            "images by 255; take real numbers as they are (--preprocessing grey) with a likelihood such as Normal."
        )
