r"""Networks: functions from tensors to tensors, without distributions.

A network is any ``nn.Module`` that maps ``(*leading, *in_shape)`` to ``(*leading, *out_shape)`` for *any number* of
leading dimensions, because particles have shape ``(num_particles, batch, *in_shape)``. A conditional network is also
called with a context, ``network(x, context)``, of shape ``(*leading, context_dim)``, which broadcasts against x.

Parts (likelihoods, encoders) take such a module or, more conveniently, a callable that builds one from
``(in_shape, out_shape)``; the part then computes the shapes. ``MLP`` is such a callable, and so is
``functools.partial(MLP, hidden=(512, 512))``.

The deep networks here are initialised so that the second moment of activations neither vanishes nor explodes (weights
of variance :math:`g^2 / n` for n inputs, with the gain g of the activation), and so that a residual block is close to
the identity. The last affine map keeps torch's initialisation, which gives outputs smaller than its inputs.

References:
    Delving Deep into Rectifiers, K. He, X. Zhang, S. Ren and J. Sun, 2015, https://arxiv.org/abs/1502.01852.
"""

# What parts are written with; not listed in __all__, which holds the networks.
from pyrovae.nn.autoregressive import RecurrentDecoder, SequenceDecoder, TokenEncoder, TransformerDecoder
from pyrovae.nn.base import Network as Network
from pyrovae.nn.base import Shape as Shape
from pyrovae.nn.base import apply as apply
from pyrovae.nn.base import as_shape as as_shape
from pyrovae.nn.base import build as build
from pyrovae.nn.base import register as register
from pyrovae.nn.dense import MLP, GatedMLP, ResidualMLP
from pyrovae.nn.images import ConvNet, DeconvNet, ResidualConvNet, ResidualDeconvNet
from pyrovae.nn.inputs import LogInput, OneHotInput
from pyrovae.nn.output_bias import set_output_bias
from pyrovae.nn.pixels import GatedPixelCNN
from pyrovae.nn.sequences import Combiner, GatedTransition, GRUDecoder, GRUEncoder

__all__ = [
    "Combiner",
    "ConvNet",
    "DeconvNet",
    "GRUDecoder",
    "GRUEncoder",
    "GatedMLP",
    "GatedPixelCNN",
    "GatedTransition",
    "LogInput",
    "MLP",
    "OneHotInput",
    "RecurrentDecoder",
    "ResidualConvNet",
    "ResidualDeconvNet",
    "ResidualMLP",
    "SequenceDecoder",
    "TokenEncoder",
    "TransformerDecoder",
    "set_output_bias",
]
