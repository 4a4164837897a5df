"""Encoders and decoders as programs of ``torch.export``, which run without pyrovae and Pyro."""

from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

__all__ = ["export_decoder", "export_encoder"]


class _Moments(nn.Module):
    """The mean and the standard deviation of what a part returns.

    Args:
        part: an encoder or a likelihood.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self.part(x) if context is None else self.part(x, context)
        return p.mean, p.variance.sqrt()


def export_encoder(vae: Any, x: Tensor, context: Tensor | None = None) -> ExportedProgram:
    r"""Returns the map from data to mean and standard deviation of :math:`q(z \mid x)` as a program of torch.

    It takes any number of data, and can be saved by ``torch.export.save`` and run where neither pyrovae nor Pyro is.

    Args:
        vae: a :class:`pyrovae.VAE`.
        x: at least two data, as an example, ``(batch, *x_shape)``.
        context: their contexts, ``(batch, context_dim)``, if the encoder takes them.

    Raises:
        ValueError: when the batch has fewer than two data, or the distribution has no mean or standard deviation.

    >>> from pyrovae import VAE, encoders, likelihoods, priors
    >>> vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> program = export_encoder(vae, torch.randn(4, 3)).module()
    >>> mean, scale = program(torch.randn(7, 3))
    >>> mean.shape, scale.shape
    (torch.Size([7, 2]), torch.Size([7, 2]))
    """
    return _export(vae.encoder, "x", x, context)


def export_decoder(vae: Any, z: Tensor, context: Tensor | None = None) -> ExportedProgram:
    r"""Returns the map from latents to mean and standard deviation of :math:`p(x \mid z)` as a program of torch.

    Arguments and errors are those of :func:`export_encoder`.

    Args:
        vae: a :class:`pyrovae.VAE`.
        z: at least two latents, as an example, ``(batch, latent_dim)``.
        context: their contexts, ``(batch, context_dim)``, if the likelihood takes them.
    """
    return _export(vae.likelihood, "z", z, context)


def _export(part: nn.Module, name: str, x: Tensor, context: Tensor | None) -> ExportedProgram:
    if x.dim() < 2 or len(x) < 2:
        raise ValueError(
            f"{name} must hold at least two data, (batch, ...), as an example; got shape {tuple(x.shape)}."
        )
    module = _Moments(part)
    args = tuple(t.detach() for t in (x, context) if t is not None)  # torch warns of others
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            try:
                module(*args)
            except (NotImplementedError, AttributeError) as error:
                raise ValueError(
                    f"{type(part).__name__} gives a distribution without a mean or a standard deviation: "
                    f"{error or type(error).__name__}. Export its network instead."
                ) from error
            batch = Dim("batch")
            shapes = {"x": {0: batch}, "context": None if context is None else {0: batch}}
            return export(module, args, dynamic_shapes=shapes if context is not None else {"x": {0: batch}})
    finally:
        for child, mode in modes.items():
            child.training = mode
