"""The registry of all public parts: add a row for a new part, and the tests over all parts include it.

A row names a part and builds a small one. The shapes are small so that tests can sum over the whole sample space (see
spaces.py): two real dimensions (a plane), three corners of a simplex, four binary pixels (16 images). In smaller layers
all units might be dead initially (ReLU).

The first row of a class is used in triples.py, with priors, likelihoods and encoders that fit. Its builder takes
optional arguments: ``(latent_dim, network)`` for a likelihood, ``x_shape`` for an encoder, and ``encoder`` for a prior
that is built from one. The builders of other rows take no arguments.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from spaces import Space, compositions, enumeration, product, space_of
from torch import Tensor, nn

from pyrovae import encoders, likelihoods, priors
from pyrovae.distributions import Classes, Numbers, has_ended, import_zuko
from pyrovae.encoders import DiagonalNormal, FullRankNormal
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import (
    MLP,
    Combiner,
    ConvNet,
    DeconvNet,
    GatedMLP,
    GatedPixelCNN,
    GatedTransition,
    GRUDecoder,
    GRUEncoder,
    LogInput,
    Network,
    OneHotInput,
    RecurrentDecoder,
    ResidualConvNet,
    ResidualDeconvNet,
    ResidualMLP,
    Shape,
    TokenEncoder,
    TransformerDecoder,
)


class Case(NamedTuple):
    """One public part.

    Args:
        name: its name in test reports.
        kind: "prior", "likelihood", "encoder" or "network".
        cls: its class.
        build: builds one.
        context_dim: the width of the context that the built part needs, 0 for none.
        step: the step size for spaces.py, smaller for a density with many kinks.
        accuracy: the largest difference of the sum over that space from one.
        density: False for a distribution without a density (a point mass), which is then only sampled; and for a
            network with parameters that only sequences reach, which it takes apart from its input.
        space: returns the space of its distribution, where the support does not determine it.
    """

    name: str
    kind: str
    cls: type[nn.Module]
    build: Callable[..., nn.Module]
    context_dim: int = 0
    step: float = 1 / 16
    accuracy: float = 1e-6
    density: bool = True
    space: Callable[[TorchDistribution], Space] | None = None


Z, C = 2, 3  # width of the latents and of contexts
SMALL = partial(MLP, hidden=(8,))
KINKS = {"step": 1 / 24, "accuracy": 5e-3}  # densities made of pieces: splines
CONV, DECONV = partial(ConvNet, channels=(4, 8)), partial(DeconvNet, channels=(16, 8))


def normal(context_dim: int = 0) -> DiagonalNormal:
    return DiagonalNormal(4, Z, SMALL, context_dim=context_dim)


def exemplars(encoder: nn.Module) -> Tensor:
    """Returns six exemplars, always the same ones, because a prior does not save them."""
    size = 6 * math.prod(encoder.x_shape)
    return (7 * torch.arange(size) % 5 < 2).float().view(6, *encoder.x_shape)


def sigmoid_belief(z: int, x_shape: Shape, network: Network) -> nn.Module:
    """Returns a sigmoid belief network whose elements depend on each other, as after training."""
    part = likelihoods.SigmoidBelief(z, x_shape, network)
    with torch.no_grad():
        part.weight.normal_()
    return part


def small_flow(features: int, context: int) -> nn.Module:
    return import_zuko().flows.NSF(features, context, transforms=1, passes=2, hidden_features=(8,), bins=4)


def sequences(num_classes: int, time: int, end: int | None = None) -> Space:
    """Returns all sequences of classes; with `end`, those in which only the end follows the end."""
    points = torch.cartesian_prod(*[torch.arange(num_classes)] * time)
    return enumeration(points if end is None else points[~(has_ended(points, end) & (points != end)).any(-1)])


def images(num_classes: int, *shape: int) -> Space:
    """Returns all images of classes of a shape."""
    return enumeration(torch.cartesian_prod(*[torch.arange(num_classes)] * math.prod(shape)).view(-1, *shape))


RECURRENT = partial(RecurrentDecoder, width=8, embedding_width=4)
TRANSFORMER = partial(TransformerDecoder, width=8, num_heads=2)
PIXELS = partial(GatedPixelCNN, width=8, num_layers=2, kernel_size=3, network=MLP)

TABLE = [Numbers(1.0, 1.0, step=1.0, low=0.0, high=3.0, spikes=(2.0,)), Classes(3), Classes(2)]
LEVELS = enumeration(torch.arange(5) / 4)  # the grid of the discretised likelihoods here

CASES = [
    Case("StandardNormal", "prior", priors.StandardNormal, lambda: priors.StandardNormal(Z)),
    Case("DiagonalNormal-prior", "prior", priors.DiagonalNormal, lambda: priors.DiagonalNormal(Z)),
    Case("DiagonalNormal-prior-context", "prior", priors.DiagonalNormal, lambda: priors.DiagonalNormal(Z, SMALL, C), C),
    Case("Laplace", "prior", priors.Laplace, lambda: priors.Laplace(Z)),
    Case("Laplace-context", "prior", priors.Laplace, lambda: priors.Laplace(Z, SMALL, C), C),
    Case("StudentT", "prior", priors.StudentT, lambda: priors.StudentT(Z)),
    Case("StudentT-context", "prior", priors.StudentT, lambda: priors.StudentT(Z, 3.0, SMALL, C), C),
    Case("GaussianMixture", "prior", priors.GaussianMixture, lambda: priors.GaussianMixture(Z, 3)),
    Case("GaussianMixture-context", "prior", priors.GaussianMixture, lambda: priors.GaussianMixture(Z, 3, SMALL, C), C),
    Case(
        "FullRankGaussianMixture", "prior", priors.FullRankGaussianMixture, lambda: priors.FullRankGaussianMixture(Z, 3)
    ),
    Case(
        "FullRankGaussianMixture-context",
        "prior",
        priors.FullRankGaussianMixture,
        lambda: priors.FullRankGaussianMixture(Z, 3, SMALL, C),
        C,
    ),
    Case("TiedGaussianMixture", "prior", priors.TiedGaussianMixture, lambda: priors.TiedGaussianMixture(Z, 3)),
    Case(
        "TiedGaussianMixture-context",
        "prior",
        priors.TiedGaussianMixture,
        lambda: priors.TiedGaussianMixture(Z, 3, SMALL, C),
        C,
    ),
    Case("VampPrior", "prior", priors.VampPrior, lambda encoder=None: priors.VampPrior(encoder or normal(), 3)),
    Case(
        "VampPrior-full-rank",
        "prior",
        priors.VampPrior,
        lambda: priors.VampPrior(FullRankNormal(4, Z, SMALL), 3, bounds=None),
    ),
    Case("VampPrior-context", "prior", priors.VampPrior, lambda: priors.VampPrior(normal(C), 3), C),
    Case(
        "ExemplarPrior",
        "prior",
        priors.ExemplarPrior,
        lambda encoder=None: priors.ExemplarPrior(encoder or normal(), exemplars(encoder or normal()), 2),
    ),
    Case("FlowPrior", "prior", priors.FlowPrior, lambda: priors.FlowPrior(Z, small_flow), **KINKS),
    Case("FlowPrior-context", "prior", priors.FlowPrior, lambda: priors.FlowPrior(Z, small_flow, C), C, **KINKS),
    Case("HypersphericalUniform", "prior", priors.HypersphericalUniform, lambda: priors.HypersphericalUniform(3)),
    Case(
        "HypersphericalUniform-circle", "prior", priors.HypersphericalUniform, lambda: priors.HypersphericalUniform(2)
    ),
    Case("Categorical", "prior", priors.Categorical, lambda: priors.Categorical(2, 3)),
    Case("Categorical-context", "prior", priors.Categorical, lambda: priors.Categorical(2, 3, SMALL, C), C),
    Case("OneHotCategorical", "prior", priors.OneHotCategorical, lambda: priors.OneHotCategorical(6, 3)),
    Case("OneHotCategorical-one", "prior", priors.OneHotCategorical, lambda: priors.OneHotCategorical(3)),
    Case(
        "OneHotCategorical-context",
        "prior",
        priors.OneHotCategorical,
        lambda: priors.OneHotCategorical(6, 3, SMALL, C),
        C,
    ),
    Case("Relaxed", "prior", priors.RelaxedOneHotCategorical, lambda: priors.RelaxedOneHotCategorical(3)),
    Case("Relaxed-blocks", "prior", priors.RelaxedOneHotCategorical, lambda: priors.RelaxedOneHotCategorical(4, 2)),
    Case(
        "Relaxed-context",
        "prior",
        priors.RelaxedOneHotCategorical,
        lambda: priors.RelaxedOneHotCategorical(3, None, 1.0, SMALL, C),
        C,
    ),
    Case("LogisticNormal", "prior", priors.LogisticNormal, lambda: priors.LogisticNormal(3)),
    Case("LogisticNormal-context", "prior", priors.LogisticNormal, lambda: priors.LogisticNormal(3, SMALL, C), C),
    Case("Dirichlet", "prior", priors.Dirichlet, lambda: priors.Dirichlet(3)),
    Case("Dirichlet-context", "prior", priors.Dirichlet, lambda: priors.Dirichlet(3, 2.0, SMALL, C), C),
    Case("ResampledPrior", "prior", priors.ResampledPrior, lambda: priors.ResampledPrior(Z, SMALL, 5), accuracy=1e-3),
    Case(
        "ResampledPrior-context",
        "prior",
        priors.ResampledPrior,
        lambda: priors.ResampledPrior(Z, SMALL, 5, context_dim=C),
        C,
        accuracy=1e-3,
    ),
    Case("GaussianProcess", "prior", priors.GaussianProcess, lambda: priors.GaussianProcess(2, 2)),
    Case(
        "GaussianProcess-times",
        "prior",
        priors.GaussianProcess,
        lambda: priors.GaussianProcess(2, 2, noise=0.3, context_dim=2),
        2,
    ),
    Case("Bernoulli-vector", "likelihood", Bernoulli, lambda z=Z, network=SMALL: Bernoulli(z, 4, network)),
    Case("Bernoulli-image", "likelihood", Bernoulli, lambda: Bernoulli(Z, (1, 2, 2), DECONV)),
    Case("Bernoulli-context", "likelihood", Bernoulli, lambda: Bernoulli(Z, 4, SMALL, context_dim=C), C),
    Case(
        "SigmoidBelief",
        "likelihood",
        likelihoods.SigmoidBelief,
        lambda z=Z, network=SMALL: sigmoid_belief(z, 3, network),
        space=lambda p: enumeration(torch.cartesian_prod(*[torch.arange(2)] * 3)),
    ),
    Case(
        "SigmoidBelief-image",
        "likelihood",
        likelihoods.SigmoidBelief,
        lambda: sigmoid_belief(Z, (1, 2, 2), DECONV),
        space=lambda p: images(2, 1, 2, 2),
    ),
    Case("Normal-learned", "likelihood", Normal, lambda z=Z, network=SMALL: Normal(z, 2, network, scale=2.0)),
    Case("Normal-fixed", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, scale=0.3, learn_scale=False)),
    Case("Normal-per-dimension", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, scale=0.3, per_dimension=True)),
    Case("Normal-image", "likelihood", Normal, lambda: Normal(Z, (1, 1, 2), DECONV, per_dimension=True)),
    Case("Normal-context", "likelihood", Normal, lambda: Normal(Z, 2, SMALL, context_dim=C), C),
    Case(
        "ContinuousBernoulli",
        "likelihood",
        likelihoods.ContinuousBernoulli,
        lambda z=Z, network=SMALL: likelihoods.ContinuousBernoulli(z, 2, network),
    ),
    Case(
        "ContinuousBernoulli-image",
        "likelihood",
        likelihoods.ContinuousBernoulli,
        lambda: likelihoods.ContinuousBernoulli(Z, (1, 1, 2), DECONV),
    ),
    # In training mode the log-probabilities of a batch depend on each other.
    Case(
        "OptimalNormal",
        "likelihood",
        likelihoods.OptimalNormal,
        lambda z=Z, network=SMALL: likelihoods.OptimalNormal(z, 2, network).eval(),
    ),
    Case(
        "OptimalNormal-context",
        "likelihood",
        likelihoods.OptimalNormal,
        lambda: likelihoods.OptimalNormal(Z, 2, SMALL, context_dim=C).eval(),
        C,
    ),
    Case(
        "Laplace-vector",
        "likelihood",
        likelihoods.Laplace,
        lambda z=Z, network=SMALL: likelihoods.Laplace(z, 2, network, scale=0.5),
    ),
    Case(
        "Laplace-per-dimension",
        "likelihood",
        likelihoods.Laplace,
        lambda: likelihoods.Laplace(Z, (1, 1, 2), DECONV, per_dimension=True),
    ),
    Case(
        "StudentT-vector",
        "likelihood",
        likelihoods.StudentT,
        lambda z=Z, network=SMALL: likelihoods.StudentT(z, 2, network, df=3.0),
    ),
    Case(
        "StudentT-per-dimension",
        "likelihood",
        likelihoods.StudentT,
        lambda: likelihoods.StudentT(Z, (1, 1, 2), DECONV, per_dimension=True),
    ),
    Case("StudentT-Cauchy", "likelihood", likelihoods.StudentT, lambda: likelihoods.StudentT(Z, 2, SMALL, df=1.0)),
    Case(
        "LogNormal",
        "likelihood",
        likelihoods.LogNormal,
        lambda z=Z, network=SMALL: likelihoods.LogNormal(z, 2, network, scale=0.5),
    ),
    Case(
        "LogNormal-per-dimension",
        "likelihood",
        likelihoods.LogNormal,
        lambda: likelihoods.LogNormal(Z, (1, 1, 2), DECONV, per_dimension=True),
    ),
    Case("Gamma", "likelihood", likelihoods.Gamma, lambda z=Z, network=SMALL: likelihoods.Gamma(z, 2, network)),
    Case(
        "Gamma-learned",
        "likelihood",
        likelihoods.Gamma,
        lambda: likelihoods.Gamma(Z, 2, SMALL, concentration=3.0, learn_concentration=True),
    ),
    # An infinite density has mass between 1 and the nearest floating-point number, which the sum cannot include.
    Case(
        "Beta",
        "likelihood",
        likelihoods.Beta,
        lambda z=Z, network=SMALL: likelihoods.Beta(z, 2, network),
        accuracy=1e-4,
    ),
    Case("Beta-image", "likelihood", likelihoods.Beta, lambda: likelihoods.Beta(Z, (1, 1, 2), DECONV), accuracy=1e-4),
    Case("Poisson", "likelihood", likelihoods.Poisson, lambda z=Z, network=SMALL: likelihoods.Poisson(z, 2, network)),
    Case(
        "Poisson-library",
        "likelihood",
        likelihoods.Poisson,
        lambda: likelihoods.Poisson(Z, 2, SMALL, library=True, context_dim=C),
        C,
    ),
    Case(
        "NegativeBinomial",
        "likelihood",
        likelihoods.NegativeBinomial,
        lambda z=Z, network=SMALL: likelihoods.NegativeBinomial(z, 2, network, 3.0),
    ),
    Case(
        "NegativeBinomial-library",
        "likelihood",
        likelihoods.NegativeBinomial,
        lambda: likelihoods.NegativeBinomial(Z, (1, 1, 2), SMALL, library=True, context_dim=C),
        C,
    ),
    Case(
        "ZeroInflatedNegativeBinomial",
        "likelihood",
        likelihoods.ZeroInflatedNegativeBinomial,
        lambda z=Z, network=SMALL: likelihoods.ZeroInflatedNegativeBinomial(z, 2, network, 3.0),
    ),
    Case(
        "ZeroInflatedNegativeBinomial-library",
        "likelihood",
        likelihoods.ZeroInflatedNegativeBinomial,
        lambda: likelihoods.ZeroInflatedNegativeBinomial(Z, 2, SMALL, library=True, context_dim=C),
        C,
    ),
    Case(
        "Categorical-vector",
        "likelihood",
        likelihoods.Categorical,
        lambda z=Z, network=SMALL: likelihoods.Categorical(z, 2, network, num_classes=3),
    ),
    Case(
        "Categorical-image",
        "likelihood",
        likelihoods.Categorical,
        lambda: likelihoods.Categorical(Z, (1, 1, 2), DECONV, num_classes=3),
    ),
    Case(
        "Multinomial",
        "likelihood",
        likelihoods.Multinomial,
        lambda z=Z, network=SMALL: likelihoods.Multinomial(z, 3, network, total_count=4),
        space=lambda p: compositions(4, 3),
    ),
    Case(
        "DiscretizedLogistic",
        "likelihood",
        likelihoods.DiscretizedLogistic,
        lambda z=Z, network=SMALL: likelihoods.DiscretizedLogistic(z, 2, network, levels=5),
        space=lambda p: product(LEVELS, LEVELS),
    ),
    Case(
        "DiscretizedLogistic-256",
        "likelihood",
        likelihoods.DiscretizedLogistic,
        lambda: likelihoods.DiscretizedLogistic(Z, 1, SMALL),
        space=lambda p: product(enumeration(torch.arange(256) / 255)),
    ),
    Case(
        "DiscretizedLogisticMixture",
        "likelihood",
        likelihoods.DiscretizedLogisticMixture,
        lambda z=Z, network=SMALL: likelihoods.DiscretizedLogisticMixture(z, 2, network, num_components=3, levels=5),
        space=lambda p: product(LEVELS, LEVELS),
    ),
    Case(
        "Tabular",
        "likelihood",
        likelihoods.Tabular,
        lambda z=Z, network=SMALL: likelihoods.Tabular(z, TABLE, network, num_components=2),
        space=lambda p: product(*(enumeration(torch.arange(n)) for n in (4, 3, 2))),
    ),
    Case(
        "Mixed",
        "likelihood",
        likelihoods.Mixed,
        lambda z=Z, network=SMALL: likelihoods.Mixed(
            z,
            3,
            [
                (partial(Normal, network=network), 1),
                (partial(likelihoods.Categorical, network=network, num_classes=3), 1),
                (partial(Bernoulli, network=network), 1),
            ],
        ),
        space=lambda p: product(*map(space_of, p.blocks)),
    ),
    Case(
        "Autoregressive",
        "likelihood",
        likelihoods.Autoregressive,
        lambda z=Z, network=SMALL: likelihoods.Autoregressive(z, 3, RECURRENT, num_classes=3, end=0),
        space=lambda p: sequences(3, 3, end=0),
    ),
    Case(
        "Autoregressive-transformer",
        "likelihood",
        likelihoods.Autoregressive,
        lambda: likelihoods.Autoregressive(Z, 4, partial(TRANSFORMER, skip=True), num_classes=3),
        space=lambda p: sequences(3, 4),
    ),
    Case(
        "Autoregressive-context",
        "likelihood",
        likelihoods.Autoregressive,
        lambda: likelihoods.Autoregressive(
            Z, (2, 2), partial(RECURRENT, skip=True), partial(Bernoulli, network=SMALL), context_dim=C
        ),
        C,
        space=lambda p: enumeration(torch.cartesian_prod(*[torch.arange(2)] * 4).view(-1, 2, 2)),
    ),
    Case(
        "PixelCNN",
        "likelihood",
        likelihoods.PixelCNN,
        lambda z=Z, network=SMALL: likelihoods.PixelCNN(z, (1, 2, 2), PIXELS, num_classes=3),
        space=lambda p: images(3, 1, 2, 2),
    ),
    Case(
        "PixelCNN-channels",
        "likelihood",
        likelihoods.PixelCNN,
        lambda: likelihoods.PixelCNN(Z, (2, 2, 2), PIXELS, partial(Bernoulli, network=SMALL)),
        space=lambda p: images(2, 2, 2, 2),
    ),
    Case(
        "PixelCNN-context",
        "likelihood",
        likelihoods.PixelCNN,
        lambda: likelihoods.PixelCNN(Z, (1, 3, 2), PIXELS, partial(Bernoulli, network=SMALL), context_dim=C),
        C,
        space=lambda p: images(2, 1, 3, 2),
    ),
    Case("DiagonalNormal-vector", "encoder", DiagonalNormal, lambda x_shape=4: DiagonalNormal(x_shape, Z, SMALL)),
    Case("DiagonalNormal-image", "encoder", DiagonalNormal, lambda: DiagonalNormal((1, 7, 5), Z, CONV)),
    Case("DiagonalNormal-context", "encoder", DiagonalNormal, lambda: DiagonalNormal(4, Z, SMALL, context_dim=C), C),
    Case("FullRankNormal-vector", "encoder", FullRankNormal, lambda x_shape=4: FullRankNormal(x_shape, Z, SMALL)),
    Case("FullRankNormal-image", "encoder", FullRankNormal, lambda: FullRankNormal((1, 7, 5), Z, CONV)),
    Case("FullRankNormal-context", "encoder", FullRankNormal, lambda: FullRankNormal(4, Z, SMALL, context_dim=C), C),
    Case(
        "LowRankNormal", "encoder", encoders.LowRankNormal, lambda x_shape=4: encoders.LowRankNormal(x_shape, Z, SMALL)
    ),
    Case(
        "LowRankNormal-context",
        "encoder",
        encoders.LowRankNormal,
        lambda: encoders.LowRankNormal(4, Z, SMALL, rank=2, context_dim=C),
        C,
    ),
    Case(
        "GaussianMixture-posterior",
        "encoder",
        encoders.GaussianMixture,
        lambda x_shape=4: encoders.GaussianMixture(x_shape, Z, SMALL, 2),
    ),
    # Its draws are not independent: they are spread more evenly.
    Case(
        "GaussianMixture-stratified",
        "encoder",
        encoders.GaussianMixture,
        lambda: encoders.GaussianMixture(4, Z, SMALL, 3, stratified=True),
    ),
    Case(
        "GaussianMixture-posterior-context",
        "encoder",
        encoders.GaussianMixture,
        lambda: encoders.GaussianMixture(4, Z, SMALL, 2, context_dim=C),
        C,
    ),
    Case(
        "InverseAutoregressiveFlow",
        "encoder",
        encoders.InverseAutoregressiveFlow,
        lambda x_shape=4: encoders.InverseAutoregressiveFlow(x_shape, Z, SMALL, 1, 4),
        accuracy=1e-5,
    ),
    Case(
        "InverseAutoregressiveFlow-context",
        "encoder",
        encoders.InverseAutoregressiveFlow,
        lambda: encoders.InverseAutoregressiveFlow(4, Z, SMALL, context_dim=C),
        C,
        accuracy=1e-5,
    ),
    Case(
        "NeuralSplineFlow",
        "encoder",
        encoders.NeuralSplineFlow,
        lambda x_shape=4: encoders.NeuralSplineFlow(x_shape, Z, SMALL, 1, 4),
        **KINKS,
    ),
    Case(
        "NeuralSplineFlow-context",
        "encoder",
        encoders.NeuralSplineFlow,
        lambda: encoders.NeuralSplineFlow(4, Z, SMALL, 1, 4, context_dim=C),
        C,
        **KINKS,
    ),
    Case(
        "VonMisesFisher",
        "encoder",
        encoders.VonMisesFisher,
        lambda x_shape=4: encoders.VonMisesFisher(x_shape, 3, SMALL),
    ),
    Case("VonMisesFisher-circle", "encoder", encoders.VonMisesFisher, lambda: encoders.VonMisesFisher(4, 2, SMALL)),
    Case(
        "VonMisesFisher-context",
        "encoder",
        encoders.VonMisesFisher,
        lambda: encoders.VonMisesFisher(4, 3, SMALL, context_dim=C),
        C,
    ),
    Case(
        "Categorical-posterior",
        "encoder",
        encoders.Categorical,
        lambda x_shape=4: encoders.Categorical(x_shape, 2, SMALL, num_classes=3),
    ),
    Case(
        "Categorical-posterior-context",
        "encoder",
        encoders.Categorical,
        lambda: encoders.Categorical(4, 2, SMALL, num_classes=3, context_dim=C),
        C,
    ),
    Case(
        "OneHotCategorical-posterior",
        "encoder",
        encoders.OneHotCategorical,
        lambda x_shape=4: encoders.OneHotCategorical(x_shape, 6, SMALL, num_classes=3),
    ),
    Case(
        "OneHotCategorical-posterior-context",
        "encoder",
        encoders.OneHotCategorical,
        lambda: encoders.OneHotCategorical(4, 3, SMALL, context_dim=C),
        C,
    ),
    Case(
        "Relaxed-posterior",
        "encoder",
        encoders.RelaxedOneHotCategorical,
        lambda x_shape=4: encoders.RelaxedOneHotCategorical(x_shape, 3, SMALL),
    ),
    Case(
        "Relaxed-posterior-blocks",
        "encoder",
        encoders.RelaxedOneHotCategorical,
        lambda: encoders.RelaxedOneHotCategorical(4, 4, SMALL, num_classes=2),
    ),
    Case(
        "Relaxed-posterior-context",
        "encoder",
        encoders.RelaxedOneHotCategorical,
        lambda: encoders.RelaxedOneHotCategorical(4, 3, SMALL, temperature=1.0, context_dim=C),
        C,
    ),
    Case(
        "LogisticNormal-posterior",
        "encoder",
        encoders.LogisticNormal,
        lambda x_shape=4: encoders.LogisticNormal(x_shape, 3, SMALL),
    ),
    Case(
        "LogisticNormal-posterior-context",
        "encoder",
        encoders.LogisticNormal,
        lambda: encoders.LogisticNormal(4, 3, SMALL, context_dim=C),
        C,
    ),
    Case("Delta", "encoder", encoders.Delta, lambda x_shape=4: encoders.Delta(x_shape, Z, SMALL), density=False),
    Case(
        "Delta-context", "encoder", encoders.Delta, lambda: encoders.Delta(4, Z, SMALL, context_dim=C), C, density=False
    ),
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
    Case("GatedMLP-vector", "network", GatedMLP, lambda: GatedMLP(4, 3)),
    Case("GatedMLP-context", "network", GatedMLP, lambda: GatedMLP(4, (2, 3), hidden=(8, 8), context_dim=C), C),
    Case("ResidualMLP-vector", "network", ResidualMLP, lambda: ResidualMLP(4, 3, width=16, num_blocks=3)),
    Case(
        "ResidualMLP-context",
        "network",
        ResidualMLP,
        lambda: ResidualMLP((1, 7, 5), (2, 3), width=16, context_dim=C),
        C,
    ),
    Case(
        "ResidualConvNet-28x28",
        "network",
        ResidualConvNet,
        lambda: ResidualConvNet((2, 1, 28, 28), 6, channels=(4, 8)),
    ),
    Case(
        "ResidualConvNet-1x2",
        "network",
        ResidualConvNet,
        lambda: ResidualConvNet((1, 1, 2), 6, channels=(16,), blocks_per_stage=2),
    ),
    Case(
        "ResidualConvNet-context",
        "network",
        ResidualConvNet,
        lambda: ResidualConvNet((1, 7, 5), 6, channels=(4, 8), context_dim=C),
        C,
    ),
    Case(
        "ResidualDeconvNet-28x28",
        "network",
        ResidualDeconvNet,
        lambda: ResidualDeconvNet(5, (1, 28, 28), channels=(8, 4)),
    ),
    Case(
        "ResidualDeconvNet-1x2",
        "network",
        ResidualDeconvNet,
        lambda: ResidualDeconvNet(5, (2, 1, 1, 2), channels=(16,), blocks_per_stage=2),
    ),
    Case(
        "ResidualDeconvNet-context",
        "network",
        ResidualDeconvNet,
        lambda: ResidualDeconvNet(5, (1, 7, 5), channels=(8, 4), context_dim=C),
        C,
    ),
    Case("GRUEncoder-vector", "network", GRUEncoder, lambda: GRUEncoder((5, 3), 4, width=8)),
    Case("GRUEncoder-masked", "network", GRUEncoder, lambda: GRUEncoder((2, 5, 3), 4, width=8)),
    Case("GRUEncoder-context", "network", GRUEncoder, lambda: GRUEncoder((5, 3), 4, width=8, context_dim=C), C),
    Case("GRUDecoder-vector", "network", GRUDecoder, lambda: GRUDecoder(4, (5, 3), width=8)),
    Case("GRUDecoder-context", "network", GRUDecoder, lambda: GRUDecoder(4, (2, 5, 3), width=8, context_dim=C), C),
    Case("Combiner", "network", Combiner, lambda: Combiner(3, 6, context_dim=C), C),
    Case("GatedTransition", "network", GatedTransition, lambda: GatedTransition(3, 6, width=8)),
    Case("GatedTransition-context", "network", GatedTransition, lambda: GatedTransition(3, 6, 8, context_dim=C), C),
    Case("RecurrentDecoder-values", "network", RecurrentDecoder, lambda: RECURRENT(4, (5, 3)), density=False),
    Case(
        "RecurrentDecoder-skip",
        "network",
        RecurrentDecoder,
        lambda: RECURRENT(4, 5, num_classes=3, num_layers=2, cell=nn.LSTM, skip=True),
        density=False,
    ),
    Case(
        "RecurrentDecoder-context",
        "network",
        RecurrentDecoder,
        lambda: RECURRENT(4, (5, 3), num_layers=2, context_dim=C),
        C,
        density=False,
    ),
    Case("TransformerDecoder-values", "network", TransformerDecoder, lambda: TRANSFORMER(4, (5, 3)), density=False),
    Case(
        "TransformerDecoder-context",
        "network",
        TransformerDecoder,
        lambda: TRANSFORMER(4, 5, num_classes=3, skip=True, context_dim=C),
        C,
        density=False,
    ),
    Case("GatedPixelCNN-values", "network", GatedPixelCNN, lambda: PIXELS(4, (2, 3, 5)), density=False),
    Case(
        "GatedPixelCNN-context",
        "network",
        GatedPixelCNN,
        lambda: PIXELS(4, (1, 3, 2), num_classes=3, context_dim=C),
        C,
        density=False,
    ),
    Case(
        "TokenEncoder",
        "network",
        TokenEncoder,
        lambda: TokenEncoder(5, 4, num_classes=3, end=0, width=8, embedding_width=4),
    ),
    Case(
        "TokenEncoder-context",
        "network",
        TokenEncoder,
        lambda: TokenEncoder(5, 4, num_classes=3, width=8, embedding_width=4, context_dim=C),
        C,
    ),
    Case("LogInput-vector", "network", LogInput, lambda: LogInput(4, 3, network=SMALL)),
    Case("LogInput-context", "network", LogInput, lambda: LogInput(4, 3, network=SMALL, context_dim=C), C),
    Case("OneHotInput-vector", "network", OneHotInput, lambda: OneHotInput(4, 3, num_classes=5, network=SMALL)),
    Case(
        "OneHotInput-context",
        "network",
        OneHotInput,
        lambda: OneHotInput(4, 3, num_classes=5, network=SMALL, context_dim=C),
        C,
    ),
]


def cases(*kinds: str, context: bool | None = None) -> list[Case]:
    """Returns the cases of these kinds; with `context`, only those with (or only those without) a context."""
    return [c for c in CASES if c.kind in kinds and context in (None, c.context_dim > 0)]


def input_shape(case: Case, part: nn.Module) -> tuple[int, ...]:
    """Returns the shape of one input of a likelihood, an encoder or a network."""
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
    """Returns random arguments for a part with these leading dimensions, with the context if it needs one."""
    dtype = next((p.dtype for p in part.parameters()), None)
    context = (torch.randn(*leading, case.context_dim, dtype=dtype),) if case.context_dim else ()
    if case.kind == "prior":
        return context
    shape = (*leading, *input_shape(case, part))
    if isinstance(part, OneHotInput | TokenEncoder):
        return torch.randint(part.num_classes, shape).to(dtype), *context
    return torch.randn(shape, dtype=dtype), *context
