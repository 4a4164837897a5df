"""A likelihood of tables with columns of different types."""

from collections.abc import Callable, Sequence
from typing import cast

from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.likelihoods.base import Likelihood
from pyrovae.nn import Shape, as_shape


class Mixed(Likelihood):
    r"""Independent blocks of columns, each with its own likelihood and decoder: tables of mixed types.

    .. math:: p(x \mid z) = \prod_b p_b(x_b \mid z), \qquad x = [x_1, \dots, x_B]

    Args:
        latent_dim: number of latent dimensions.
        x_shape: the number of columns, summed over the blocks.
        blocks: for each block a callable that builds its likelihood from ``(latent_dim, columns)``, and its number of
            columns. With a context the callable also gets `context_dim`.
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when there is no block, or the columns of the blocks do not add up to `x_shape`.

    References:
        Handling Incomplete Heterogeneous Data Using VAEs, A. Nazabal, P. M. Olmos, Z. Ghahramani and I. Valera, 2020,
        https://arxiv.org/abs/1807.03653.

    >>> import torch
    >>> from functools import partial
    >>> from pyrovae.likelihoods import Bernoulli, Categorical, Normal
    >>> blocks = [(Normal, 3), (partial(Categorical, num_classes=5), 1), (Bernoulli, 4)]
    >>> Mixed(2, 8, blocks)(torch.zeros(6, 2)).sample().shape
    torch.Size([6, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        blocks: Sequence[tuple[Callable[[int, Shape], Likelihood], int]],
        context_dim: int = 0,
    ):
        nn.Module.__init__(self)  # not Likelihood's: only the blocks have decoders
        for block in blocks:
            if not isinstance(block, (tuple, list)) or len(block) != 2 or isinstance(block[0], nn.Module):
                raise ValueError(
                    "blocks must be pairs of a class (or functools.partial of one) and a number of columns, as in "
                    f"(likelihoods.Normal, 3), got {block!r}."
                )
        self.latent_dim, self.x_shape, self.context_dim = latent_dim, as_shape(x_shape, "x_shape"), context_dim
        self.sizes = [size for _, size in blocks]
        if len(blocks) == 0 or self.x_shape != (sum(self.sizes),):
            raise ValueError(
                f"x_shape must be ({sum(self.sizes)},), the sum of the columns of the blocks {self.sizes}, got "
                f"{x_shape!r}."
            )
        keywords = {"context_dim": context_dim} if context_dim else {}
        self.blocks = nn.ModuleList([block(latent_dim, size, **keywords) for block, size in blocks])

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return distributions.Blocks([block(z, context) for block in self.blocks])

    def output_for(self, x: Tensor) -> Tensor:
        raise NotImplementedError("Mixed has no decoder, only its blocks have. Call output_for of a block.")

    def start_at(self, x: Tensor) -> "Mixed":
        for block, columns in zip(self.blocks, self._check_data(x).split(self.sizes, dim=-1), strict=True):
            cast(Likelihood, block).start_at(columns)
        return self
