"""The registry of every public part: add a row per new part, and the tests over all parts cover it.

A row names a part and builds a small one. The shapes are small so that tests can go through the whole space that a
distribution lives on: ``latent_dim`` 2 and two real pixels (a plane, integrated on a grid), or four binary pixels (16
images, enumerated). Layers of fewer units than these would now and then be dead from the start (ReLU).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.encoders import DiagonalNormal, FullRankNormal
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import MLP, ConvNet, DeconvNet
from pyrovae.priors import StandardNormal


class Case(NamedTuple):
    """One public part. `context_dim` is the width of the context that the built part needs, 0 for none."""

    name: str
    kind: str  # "prior", "likelihood", "encoder" or "network"
    cls: type[nn.Module]
    build: Callable[[], nn.Module]
    context_dim: int = 0


Z, C = 2, 3  # width of the latents and of contexts
SMALL = partial(MLP, hidden=(8,))
CONV, DECONV = partial(ConvNet, channels=(4, 8)), partial(DeconvNet, channels=(16, 8))

CASES = [
    Case("StandardNormal", "prior", StandardNormal, lambda: StandardNormal(Z)),
    Case("Bernoulli-vector", "likelihood", Bernoulli, lambda: Bernoulli(Z, 4, SMALL)),
    Case("Bernoulli-image", "likelihood", Bernoulli, lambda: Bernoulli(Z, (1, 2, 2), DECONV)),
    Case("Bernoulli-context", "likelihood", Bernoulli, lambda: Bernoulli(Z, 4, SMALL, context_dim=C), C),
    Case("Normal-fixed", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, scale=0.3, learn_scale=False)),
    Case("Normal-learned", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, scale=2.0)),
    Case("Normal-per-dimension", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, scale=0.3, per_dimension=True)),
    Case("Normal-image", "likelihood", Normal, lambda: Normal(Z, (1, 1, 2), DECONV, per_dimension=True)),
    Case("Normal-context", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, context_dim=C), C),
    Case("DiagonalNormal-vector", "encoder", DiagonalNormal, lambda: DiagonalNormal(4, Z, SMALL)),
    Case("DiagonalNormal-image", "encoder", DiagonalNormal, lambda: DiagonalNormal((1, 7, 5), Z, CONV)),
    Case("DiagonalNormal-context", "encoder", DiagonalNormal, lambda: DiagonalNormal(4, Z, SMALL, context_dim=C), C),
    Case("FullRankNormal-vector", "encoder", FullRankNormal, lambda: FullRankNormal(4, Z, SMALL)),
    Case("FullRankNormal-image", "encoder", FullRankNormal, lambda: FullRankNormal((1, 7, 5), Z, CONV)),
    Case("FullRankNormal-context", "encoder", FullRankNormal, lambda: FullRankNormal(4, Z, SMALL, context_dim=C), C),
    Case("MLP-vector", "network", MLP, lambda: MLP(4, 3)),
    Case("MLP-image", "network", MLP, lambda: MLP((1, 7, 5), (2, 3), hidden=(8, 8), activation=nn.SiLU)),
    Case("MLP-affine", "network", MLP, lambda: MLP(4, 3, hidden=())),
    Case("MLP-context", "network", MLP, lambda: MLP(4, 3, hidden=(8,), context_dim=C), C),
    Case("ConvNet-28x28", "network", ConvNet, lambda: ConvNet((1, 28, 28), 6, channels=(4, 4))),
    Case("ConvNet-7x5", "network", ConvNet, lambda: ConvNet((3, 7, 5), 6, channels=(4, 8, 16))),
    Case("ConvNet-1x2", "network", ConvNet, lambda: ConvNet((1, 1, 2), 6, channels=(16,))),
    Case("ConvNet-context", "network", ConvNet, lambda: ConvNet((1, 8, 8), 6, channels=(4,), context_dim=C), C),
    Case("DeconvNet-28x28", "network", DeconvNet, lambda: DeconvNet(5, (1, 28, 28), channels=(4, 4))),
    Case("DeconvNet-7x5", "network", DeconvNet, lambda: DeconvNet(5, (3, 7, 5), channels=(16, 8, 4))),
    Case("DeconvNet-1x2", "network", DeconvNet, lambda: DeconvNet(5, (2, 1, 1, 2), channels=(16,))),
    Case("DeconvNet-context", "network", DeconvNet, lambda: DeconvNet(5, (1, 8, 8), channels=(4,), context_dim=C), C),
]


def cases(*kinds: str, context: bool | None = None) -> list[Case]:
    """Returns the cases of these kinds, only those that need a context (or only those that do not) if asked for."""
    return [c for c in CASES if c.kind in kinds and context in (None, c.context_dim > 0)]


def input_shape(case: Case, part: nn.Module) -> tuple[int, ...]:
    """Returns the shape of what a likelihood, an encoder or a network is called with, leading dimensions aside."""
    return {
        "likelihood": lambda: (part.latent_dim,),
        "encoder": lambda: part.x_shape,
        "network": lambda: part.in_shape,
    }[case.kind]()


def output_shape(case: Case, part: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a part's events, or of one output of a network."""
    return {
        "prior": lambda: (part.latent_dim,),
        "likelihood": lambda: part.x_shape,
        "encoder": lambda: (part.latent_dim,),
        "network": lambda: part.out_shape,
    }[case.kind]()


def inputs(case: Case, part: nn.Module, *leading: int) -> tuple[Tensor, ...]:
    """Returns random arguments for a part with these leading dimensions, the context among them if it needs one."""
    dtype = next((p.dtype for p in part.parameters()), None)
    context = (torch.randn(*leading, case.context_dim, dtype=dtype),) if case.context_dim else ()
    if case.kind == "prior":
        return context
    return torch.randn(*leading, *input_shape(case, part), dtype=dtype), *context
