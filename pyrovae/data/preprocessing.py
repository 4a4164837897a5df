"""Preprocessing of data before training."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

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


def split_missing(x: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Splits data with NaN for missing values into data and a mask, for :class:`~pyrovae.structures.MissingDataVAE`.

    Args:
        x: data of any shape, a tensor or an array, NaN where a value is missing.

    Returns:
        x as a tensor with zeros for missing values, and a mask of the same shape, True where x is observed.

    >>> split_missing(torch.tensor([1.0, float("nan")]))
    (tensor([1., 0.]), tensor([ True, False]))
    """
    if not isinstance(x, Tensor):
        filled = np.ma.filled(np.ma.asarray(x).astype(float), np.nan)  # of a masked array too
        x = torch.as_tensor(filled, dtype=torch.get_default_dtype())
    mask = ~torch.isnan(x)
    return torch.where(mask, x, 0), mask


def random_transposition(x: Tensor, mask: Tensor, *rest: Tensor, semitones: int) -> tuple[Tensor, ...]:
    """Moves songs up or down at random, again at each call; for ``fit(..., transform=partial(..., semitones=5))``.

    A song moves by a whole number of semitones, any from `-semitones` to `semitones`, as far as its notes stay on the
    keys.

    Args:
        x: keys of songs, ``(batch, steps, keys)``, as of :class:`PianoRoll`.
        mask: True where a song has a step, ``(batch, steps)``.
        *rest: the other tensors of the batch, returned unchanged.
        semitones: the largest move.

    Raises:
        ValueError: when `semitones` is negative.

    >>> x = torch.eye(12)[None, :3].repeat(200, 1, 1)  # keys 0, 1 and 2
    >>> moved, _ = random_transposition(x, torch.ones(200, 3, dtype=torch.bool), semitones=2)
    >>> [int(first) for first in moved[:, 0].argmax(-1).unique()]  # there are no keys below the first
    [0, 1, 2]
    """
    if not isinstance(semitones, int) or semitones < 0:
        raise ValueError(f"semitones must be a whole number of at least 0, got {semitones}.")
    num_keys = x.shape[-1]
    sounds = ((x > 0) & mask.unsqueeze(-1)).any(1)  # (batch, keys)
    keys = torch.arange(num_keys, device=x.device)
    lowest = torch.where(sounds, keys, num_keys - 1).amin(-1)
    highest = torch.where(sounds, keys, 0).amax(-1)
    by = torch.randint(-semitones, semitones + 1, (len(x),), device=x.device)
    by = by.clamp(-lowest, num_keys - 1 - highest)
    return x.gather(-1, ((keys - by.view(-1, 1, 1)) % num_keys).expand_as(x)), mask, *rest


def hide_cells(x: Tensor, mask: Tensor, *rest: Tensor, share: float = 0.2) -> tuple[Tensor, ...]:
    r"""Hides further elements of some data, again at each call; for ``fit(..., transform=...)``.

    A :class:`~pyrovae.structures.MissingDataVAE` that is to fill any holes must have seen data with many of them. For a
    share of the data, a fraction that is uniform between 0 and 1 of the elements is hidden, but never all.

    Args:
        x: data, ``(batch, *x_shape)``.
        mask: True where x is observed, of the same shape.
        *rest: the other tensors of the batch, returned unchanged.
        share: the share of the data that lose elements, 0 to 1.

    Returns:
        x, the mask with fewer True, and the rest.

    Raises:
        ValueError: when `share` is not between 0 and 1.

    References:
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets, P.-A. Mattei and J. Frellsen, 2019,
        https://arxiv.org/abs/1812.02633.

    >>> x, mask = hide_cells(torch.zeros(1000, 4), torch.ones(1000, 4, dtype=torch.bool), share=1.0)
    >>> bool(mask.any(1).all()), bool(mask.all())
    (True, False)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}.")
    one = (len(x), *(1,) * (x.dim() - 1))
    fraction = torch.rand(one, device=x.device) * (torch.rand(one, device=x.device) < share)
    fewer = mask & (torch.rand(x.shape, device=x.device) >= fraction)
    some = fewer.flatten(1).any(1).view(one)
    return x, torch.where(some, fewer, mask), *rest


def random_shift(x: Tensor, *rest: Tensor, pixels: int = 1) -> tuple[Tensor, ...]:
    r"""Moves each image by up to some pixels in each direction, again at each call; for ``fit(..., transform=...)``.

    .. math:: x'_{i, j} = x_{i - a, j - b}, \qquad a, b \sim \mathrm{Uniform}\{-k, \dots, k\}

    and 0, the background, where that is outside the image. Of training batches alone: moved test images are other data.
    With binary pixels: ``transform=lambda x: data.dynamic_binarization(*data.random_shift(x))``.

    Args:
        x: images, ``(batch, *channels, height, width)``.
        *rest: the other tensors of the batch, returned unchanged.
        pixels: :math:`k`.

    Raises:
        ValueError: when `pixels` is negative, x is not of images, or another tensor has pixels too, such as a mask, and
            would not be moved.

    >>> x = torch.zeros(1, 1, 3, 3)
    >>> x[0, 0, 1, 1] = 1
    >>> (moved,) = random_shift(x)
    >>> moved.sum()
    tensor(1.)
    """
    if pixels < 0:
        raise ValueError(f"pixels must be at least 0, got {pixels}.")
    if x.dim() < 3:
        raise ValueError(f"only images can be moved, (batch, ..., height, width), got {tuple(x.shape)}.")
    if any(t.shape[-2:] == x.shape[-2:] and t.dim() > 2 for t in rest):
        raise ValueError("a tensor beside x has pixels too, such as a mask, and would not be moved with x. Move both.")
    size, (height, width) = len(x), x.shape[-2:]
    padded = pad(x.reshape(size, -1, height, width), (pixels,) * 4)
    first = torch.randint(2 * pixels + 1, (2, size, 1), device=x.device)
    rows, columns = (start + torch.arange(n, device=x.device) for start, n in zip(first, (height, width), strict=True))
    datum = torch.arange(size, device=x.device).view(-1, 1, 1)
    return padded.movedim(1, -1)[datum, rows.unsqueeze(-1), columns.unsqueeze(1)].movedim(-1, 1).reshape(x.shape), *rest


def _check_grey(x: Tensor) -> None:
    if x.is_cuda:  # the comparison would wait for the GPU; torch.bernoulli checks its argument there
        return
    if not x.numel():
        return
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):  # also if there is NaN
        raise ValueError(
            f"only values between 0 and 1 can be binarised, but x ranges from {low:g} to {high:g}. Divide 8-bit "
            "images by 255; take other numbers as they are (--preprocessing grey), with a likelihood such as Normal "
            "for real numbers or Poisson for counts."
        )
