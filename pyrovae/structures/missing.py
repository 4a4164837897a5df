"""VAEs of data with missing elements."""

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.arguments import row_name
from pyrovae.distributions import center, mask_elements
from pyrovae.inference.imputation import Imputation, impute
from pyrovae.inference.messages import check_later
from pyrovae.parts import call, in_evaluation_mode
from pyrovae.vae import OneLatent


class MissingDataVAE(OneLatent):
    r"""A VAE of data with elements that are missing at random.

    .. math:: p(x_{\mathrm{obs}}, z) = p(z) \prod_{d\,:\,m_d = 1} p(x_d \mid z), \qquad
        q(z \mid x_{\mathrm{obs}}) = \mathrm{encoder}(m \odot x,\, m)

    ``vae.model`` and ``vae.guide`` take ``(x, mask, context=None)``. Values of x where the mask is False are ignored.
    :func:`pyrovae.data.split_missing` turns data with NaN for missing elements into such a pair, which
    :func:`pyrovae.fit` and :func:`pyrovae.log_marginal` take. The latter gives the log-density of the observed
    elements.

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)`, with elements that are independent given z;
            or a Multinomial, which then scores the observed counts given their sum.
        encoder: ``encoder(x, context)`` returns a distribution of z, for an x of shape ``(batch, 2, *x_shape)``: the
            data with zeros for missing elements, and the mask. An encoder for ``(2 * channels, height, width)``, or any
            shape twice as long in the first dimension, gets both concatenated in that dimension.
        features: ``features(x, mask)`` returns what the encoder takes in place of the two; None for the two.

    Raises:
        ValueError: when the parts have different latent dimensions or spaces, or the encoder was built for another
            shape; when a mask does not have the shape of the data, is not 0 or 1, or is 0 for all elements of a datum.

    References:
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets, P.-A. Mattei and J. Frellsen, 2019,
        https://arxiv.org/abs/1812.02633.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = MissingDataVAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal((2, 3), 2))
    >>> x, mask = torch.zeros(5, 3), torch.tensor([True, False, True]).expand(5, 3)
    >>> vae.impute(x, mask, num_samples=10, num_draws=4).draws.shape
    torch.Size([4, 5, 3])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module, features: nn.Module | None = None):
        super().__init__(prior, likelihood, encoder)
        self.features = features
        if features is not None:
            return
        x_shape, stated = getattr(likelihood, "x_shape", None), getattr(encoder, "x_shape", None)
        if x_shape and stated and tuple(stated) not in ((2, *x_shape), (2 * x_shape[0], *x_shape[1:])):
            raise ValueError(
                f"The encoder of a MissingDataVAE takes the data and the mask. Build it for {(2, *x_shape)}, or for "
                f"{(2 * x_shape[0], *x_shape[1:])}, not for {tuple(stated)}."
            )

    def model(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> None:
        """The generative process, with the observed elements at site "x" and the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        x, mask = _fill(x, mask)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", call(self.prior, context=context))
            pyro.sample("x", mask_elements(self.decode(z, context), mask), obs=x)

    def guide(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, mask, context))

    @in_evaluation_mode
    def encode(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`q(z \mid x_{\mathrm{obs}})`, with ``batch_shape == (batch,)``."""
        x, mask = _fill(x, mask)
        if self.features is not None:
            return call(self.encoder, self.features(x, mask), context=context)
        both = torch.stack([x, mask.to(x.dtype)], dim=1)
        both = both.reshape(len(x), *getattr(self.encoder, "x_shape", both.shape[1:]))
        return call(self.encoder, both, context=context)

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid z)` at one draw of :math:`z \sim q(z \mid x_{\mathrm{obs}})`.

        All elements are reconstructed, observed or not; :meth:`impute` keeps the observed ones.
        """
        return center(self.decode(self.encode(x, mask, context).sample(), context))

    def impute(
        self,
        x: Tensor,
        mask: Tensor,
        context: Tensor | None = None,
        *,
        num_samples: int = 1000,
        num_draws: int = 1,
    ) -> Imputation:
        """Imputes the missing elements given the observed ones, as :func:`pyrovae.impute`.

        Args:
            x: data, shape ``(batch, *x_shape)``; any values, NaN too, for missing elements.
            mask: of the same shape, True where x is observed.
            context: shape ``(batch, context_dim)``, or None.
            num_samples: samples of the latents per datum.
            num_draws: draws of the missing elements per datum.

        Returns:
            An :class:`~pyrovae.Imputation` whose observed elements are those of x.
        """
        x, mask = _fill(x, mask)
        filled = impute(self.model, self.guide, x, mask, context, num_samples=num_samples, num_draws=num_draws)
        return filled._replace(mean=torch.where(mask, x, filled.mean), draws=torch.where(mask, x, filled.draws))


def _fill(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Checks the mask; returns the data with zeros for missing elements, and the mask as booleans."""
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)} but x has {tuple(x.shape)}: give one value an element.")
    if mask.dtype != torch.bool:
        is_binary = ((mask == 0) | (mask == 1)).all()
        if not check_later(is_binary) and not bool(is_binary):
            raise ValueError("mask must be boolean, or 0 where x is missing and 1 where it is observed.")
        mask = mask.bool()
    empty = ~mask.flatten(1).any(dim=1)
    if not check_later(~empty.any()) and bool(empty.any()):
        raise ValueError(
            f"mask has no observed element in {int(empty.sum())} of {len(x)} rows, first in "
            f"{row_name(int(empty.nonzero()[0]))}. Remove those rows."
        )
    return torch.where(mask, x, 0), mask
