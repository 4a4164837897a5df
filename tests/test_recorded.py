"""Losses, weights, estimates and draws, compared with recorded ones: a change of the code's structure keeps them.

Each case runs in double precision from seed 0. The numbers are in ``recorded/numbers.json``. Record them again only
after a change that is meant to change numbers: ``python tests/test_recorded.py --write`` records all cases, and
``python tests/test_recorded.py --write "fit IWAE" "fit TVO"`` the named ones.

``recorded/run`` is a run directory of pyrovae 0.1.0 without its pictures. It must stay as it is: later versions must
load, score and resume it. It was written by

    pyrovae train --run tests/recorded/run --epochs 3 --num-samples 50 --latent-dim 2
        --prior VampPrior --prior.num_components 2
        --encoder GaussianMixture --encoder.num_components 2 --encoder.network GatedMLP --encoder.network.hidden '[3]'
        --likelihood.network ResidualMLP --likelihood.network.width 3 --likelihood.network.num_blocks 1
        --loss pyrovae.bounds.weighted.IWAE --loss.num_particles 4 --loss.gradient DoublyReparameterized
        --loss.regularizers '[{class_path: MaximumMeanDiscrepancy, init_args: {weight: 1.0,
            kernel: pyrovae.regularizers.inverse_multiquadric_kernel}}]'
        --optimizer.lr 0.01 --scheduler StepLR --scheduler.step_size 2
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from cases import Case, cases, inputs
from pyro import distributions as dist
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyrovae import (
    VAE,
    bounds,
    data,
    diagnostics,
    distributions,
    encoders,
    estimators,
    fit,
    impute,
    latents,
    likelihoods,
    load_run,
    log_marginal,
    log_weights,
    nn,
    priors,
    regularizers,
    structures,
)
from pyrovae.cli import main as command_line

RECORDED = Path(__file__).parent / "recorded"
NUMBERS, RUN = RECORDED / "numbers.json", RECORDED / "run"

Number = bool | int | float | None

CASES: dict[str, Callable[[], Any]] = {}  # each returns tensors, numbers, and dicts, lists and named tuples of them


def recorded(name: str) -> Callable:
    """Registers a case under a name."""

    def register(case: Callable) -> Callable:
        CASES[name] = case
        return case

    return register


# ------------------------------------------------------------------------------------------------- running a case


@contextmanager
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def flattened(value: Any, path: str = "") -> dict[str, list[float]]:
    """Returns the numbers in nested dicts, lists and named tuples by their path; text may change and is left out."""
    if isinstance(value, str):
        return {}
    if isinstance(value, torch.Tensor):
        return {path: value.detach().double().flatten().tolist()}
    if isinstance(value, Number):
        return {path: [math.nan if value is None else float(value)]}
    if isinstance(value, list) and all(isinstance(v, Number) for v in value):
        return {path: [math.nan if v is None else float(v) for v in value]}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {p: v for key, item in items for p, v in flattened(item, f"{path}/{key}" if path else str(key)).items()}


def measure(name: str) -> dict[str, list[float]]:
    """Runs a case from seed 0 in double precision."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with double_precision():
        return flattened(CASES[name]())


def digest(t: torch.Tensor) -> torch.Tensor:
    """Returns the sum and the norm of a tensor, and a sum that changes if its elements change places."""
    t = t.detach().double().flatten()
    return torch.stack([t.sum(), t.norm(), t @ torch.arange(len(t)).double().cos()])


def weights_of(*modules: torch.nn.Module) -> torch.Tensor:
    tensors = [t for module in modules for _, t in sorted(module.state_dict().items())]
    return digest(torch.cat([t.double().flatten() for t in tensors]))


# -------------------------------------------------------------------------------------------------------- the data

SMALL = partial(nn.MLP, hidden=(8,))


def binary(size: int = 48, shape: tuple[int, ...] = (6,)) -> torch.Tensor:
    """Binary data from a single hidden cause."""
    cause = torch.rand(size, *(1,) * len(shape))
    return (torch.rand(size, *shape) < 0.1 + 0.8 * cause).double()


def images(size: int = 40) -> torch.Tensor:
    """Grey images of a smooth pattern at random places."""
    place = 2 * math.pi * torch.rand(size, 1, 1, 1)
    grid = torch.arange(4.0).view(1, 1, 1, 4) + torch.arange(4.0).view(1, 1, 4, 1)
    return 0.5 + 0.4 * torch.sin(grid + place) + 0.05 * torch.randn(size, 1, 4, 4)


def small_vae(latent_dim: int = 2, x_shape: nn.Shape = 6, **parts: torch.nn.Module) -> VAE:
    defaults = {
        "prior": priors.StandardNormal(latent_dim),
        "likelihood": likelihoods.Bernoulli(latent_dim, x_shape, SMALL),
        "encoder": encoders.DiagonalNormal(x_shape, latent_dim, SMALL),
    }
    return VAE(**(defaults | parts))


def normal_vae(x_shape: nn.Shape = (1, 4, 4)) -> VAE:
    return small_vae(x_shape=x_shape, likelihood=likelihoods.Normal(2, x_shape, SMALL, scale=0.5))


def class_vae() -> VAE:
    """Two latents of three classes each."""
    return small_vae(
        prior=priors.Categorical(2, 3),
        likelihood=likelihoods.Bernoulli(2, 6, partial(nn.OneHotInput, num_classes=3, network=SMALL)),
        encoder=encoders.Categorical(6, 2, SMALL, num_classes=3),
    )


# ---------------------------------------------------------------------------------------------------------- training


def trained(model: Callable, guide: Callable, x: Any, *modules: torch.nn.Module, **options: Any) -> dict[str, Any]:
    """Trains for a few epochs; returns what the history holds, without the seconds, and a digest of the weights."""
    options = {"epochs": 4, "batch_size": 16, "optimizer": partial(torch.optim.Adam, lr=1e-2)} | options
    history = fit(model, guide, x, progress=False, **options)
    names = [name for name in history.records[-1] if name not in ("epoch", "seconds")]
    return {name: history[name] for name in names} | {"weights": weights_of(*modules)}


def train_vae(loss: Callable[[], Any], build: Callable[[], VAE] = small_vae) -> dict[str, Any]:
    vae = build()
    return trained(vae.model, vae.guide, binary(), vae, loss=loss())


DREG, STL = bounds.DoublyReparameterized(), bounds.StickingTheLanding()

LOSSES: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "ELBO": lambda: bounds.ELBO(2),
    "ELBO of draws": lambda: bounds.ELBO(2, closed_form=False),
    "ELBO, STL": lambda: bounds.ELBO(3, gradient=STL),
    "ELBO, Linear": lambda: bounds.ELBO(beta=bounds.Linear(steps=9)),
    "ELBO, Cyclical": lambda: bounds.ELBO(beta=bounds.Cyclical(period=5)),
    "ELBO, FreeBits": lambda: bounds.ELBO(penalty=bounds.FreeBits(0.1)),
    "ELBO, FreeBits of a site": lambda: bounds.ELBO(2, penalty=bounds.FreeBits(0.2, group_size=None)),
    "ELBO, Capacity": lambda: bounds.ELBO(beta=5.0, penalty=bounds.Capacity(bounds.Linear(steps=9, end=1.0))),
    "ELBO, chunked": lambda: bounds.ELBO(4, chunk_size=2),
    "IWAE": lambda: bounds.IWAE(4),
    "IWAE, DReG": lambda: bounds.IWAE(4, DREG),
    "IWAE, DReG, chunked": lambda: bounds.IWAE(4, DREG, chunk_size=2),
    "MIWAE": lambda: bounds.MIWAE(4, 2),
    "PIWAE": lambda: bounds.PIWAE(4, 2),
    "PIWAE, DReG": lambda: bounds.PIWAE(4, 2, DREG),
    "CIWAE": lambda: bounds.CIWAE(4, 0.3),
    "Renyi": lambda: bounds.Renyi(4, 0.5),
    "Renyi, DReG": lambda: bounds.Renyi(4, -1.0, DREG),
    "VRMax": lambda: bounds.VRMax(4),
    "CUBO": lambda: bounds.CUBO(4),
    "CUBO, DReG": lambda: bounds.CUBO(4, gradient=DREG),
    "TVO": lambda: bounds.TVO(4, 3),
    "TVO, Covariance": lambda: bounds.TVO(4, 3, gradient=bounds.Covariance()),
    "ReweightedWakeSleep": lambda: bounds.ReweightedWakeSleep(4, 0.5, 0.5),
    "TotalCorrelation": lambda: bounds.ELBO(regularizers=[regularizers.TotalCorrelation(2.0, dataset_size=48)]),
    "MaximumMeanDiscrepancy": lambda: bounds.IWAE(
        3, regularizers=[regularizers.MaximumMeanDiscrepancy(5.0, regularizers.inverse_multiquadric_kernel)]
    ),
    "DensityRatio": lambda: bounds.ELBO(regularizers=[regularizers.DensityRatio(SMALL(2, 1), weight=2.0)]),
    "Adversarial": lambda: bounds.ELBO(regularizers=[regularizers.Adversarial(SMALL(6, 1), weight=0.5)]),
}
CASES |= {f"fit {name}": partial(train_vae, loss) for name, loss in LOSSES.items()}

# Latents without an rsample: the gradients are score functions, VIMCO for the importance-weighted bound.
CLASS_LOSSES = ("ELBO", "IWAE", "TVO, Covariance", "ReweightedWakeSleep")
CASES |= {f"fit {name} of classes": partial(train_vae, LOSSES[name], class_vae) for name in CLASS_LOSSES}


@recorded("fit with validation, patience, schedule, clipping and binarisation")
def _():
    vae, x = small_vae(), torch.rand(48, 6)
    return trained(
        vae.model,
        vae.guide,
        x,
        vae,
        loss=bounds.ELBO(beta=bounds.Linear(steps=4)),
        transform=data.dynamic_binarization,
        validation=data.static_binarization(x[:20]),
        patience=2,
        clip_norm=0.5,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8),
        epochs=6,
    )


@recorded("fit with dropout")
def _():
    def network(in_shape, out_shape):
        return torch.nn.Sequential(SMALL(in_shape, 8), torch.nn.Dropout(0.3), SMALL(8, out_shape))

    likelihood, encoder = likelihoods.Bernoulli(2, 6, network), encoders.DiagonalNormal(6, 2, network)
    vae = small_vae(likelihood=likelihood, encoder=encoder)
    return trained(vae.model, vae.guide, binary(), vae, loss=bounds.IWAE(3))


@recorded("fit HierarchicalVAE")
def _():
    vae = structures.HierarchicalVAE(
        prior=priors.StandardNormal(2),
        conditionals=[encoders.DiagonalNormal(2, 3, SMALL)],
        likelihood=likelihoods.Bernoulli(3, 6, SMALL),
        encoders=[encoders.DiagonalNormal(6, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL)],
    )
    x = binary()
    history = trained(vae.model, vae.guide, x, vae, loss=bounds.ELBO(2, penalty=bounds.FreeBits(0.1)))
    return history | {"sample": digest(vae.sample(5)), "estimate": estimated(vae, x[:8])}


@recorded("fit LadderVAE")
def _():
    vae = structures.LadderVAE(
        prior=priors.StandardNormal(2),
        conditionals=[encoders.DiagonalNormal(2, 3, SMALL)],
        likelihood=likelihoods.Bernoulli(3, 6, SMALL),
        networks=[SMALL(6, 5), SMALL(5, 4)],
        encoders=[encoders.DiagonalNormal(5, 3, SMALL), encoders.DiagonalNormal(4, 2, SMALL)],
    )
    x = binary()
    history = trained(vae.model, vae.guide, x, vae, loss=bounds.IWAE(3, DREG))
    return history | {"reconstructed": digest(vae.reconstruct(x)), "estimate": estimated(vae, x[:8])}


@recorded("fit MissingDataVAE")
def _():
    vae = structures.MissingDataVAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 6, SMALL), encoders.DiagonalNormal((2, 6), 2, SMALL)
    )
    x, mask = data.split_missing(torch.where(torch.rand(48, 6) < 0.3, torch.nan, binary() + torch.rand(48, 6)))
    history = trained(vae.model, vae.guide, (x, mask), vae, loss=bounds.IWAE(3))
    imputed = vae.impute(x[:6], mask[:6], num_samples=50, num_draws=2)
    return history | {"imputed": imputed, "estimate": estimated(vae, x[:8], mask[:8])}


@recorded("fit SemiSupervisedVAE")
def _():
    vae = structures.SemiSupervisedVAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(2, 6, SMALL, context_dim=3),
        encoders.DiagonalNormal(6, 2, SMALL, context_dim=3),
        SMALL,
        num_classes=3,
    )
    x = binary()
    labels = torch.where(torch.rand(48) < 0.5, -1, x[:, :2].sum(1).long())
    loss = structures.ClassifierELBO(vae.classify, weight=20.0)
    history = trained(vae.model, vae.guide, (x, labels), vae, loss=loss)
    return history | {"classes": vae.classify(x[:4]).logits, "estimate": estimated(vae, x[:8])}


@recorded("fit a plain Pyro pair")
def _():
    decoder, encoder = SMALL(3, 6), SMALL(6, 8)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(()), 1.0))
            z = pyro.sample("z", dist.StudentT(5.0, torch.zeros(3), s.unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            loc, scale, s_loc, s_scale = encoder(x).split([3, 3, 1, 1], dim=-1)
            pyro.sample("s", dist.LogNormal(s_loc.squeeze(-1), s_scale.squeeze(-1).exp()))
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    x, modules = binary(), (decoder, encoder)
    weights = log_weights(model, guide, x[:3], num_samples=4)
    first = trained(model, guide, x, *modules, loss=Trace_ELBO(num_particles=2))
    second = trained(model, guide, x, *modules, loss=bounds.IWAE(3, DREG), epochs=2)
    imputed = impute(model, guide, x[:5], num_samples=40, num_draws=2)
    return {"Trace_ELBO": first, "IWAE": second, "log_weights": weights, "imputed": imputed}


@recorded("fit a subsampled plate and a mask")
def _():
    decoder, encoder = SMALL(2, 6), SMALL(6, 4)

    def model(x, mask):
        pyro.module("decoder", decoder)
        with pyro.plate("data", 480, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 480, subsample_size=len(x)):
            loc, scale = encoder(x * mask).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    x, mask = binary(), torch.rand(48, 6) < 0.7
    return trained(model, guide, (x, mask), decoder, encoder, loss=bounds.IWAE(3))


# -------------------------------------------------------------------------------- draws, weights and estimates


def estimate_numbers(estimate: estimators.Estimate) -> dict[str, Any]:
    names = ("value", "standard_error", "ess", "khat", "trusted")
    return {name: getattr(estimate, name) for name in names} | {"diagnostics": estimate.diagnostics}


def estimated(vae: Any, *args: torch.Tensor, method: estimators.Estimator | None = None) -> dict[str, Any]:
    method = estimators.ImportanceSampling(50) if method is None else method
    return estimate_numbers(log_marginal(vae.model, vae.guide, *args, method=method, progress=False))


@recorded("a VAE")
def _():
    vae, x = small_vae(), binary(5)
    return {
        "log_weights": log_weights(vae.model, vae.guide, x, num_samples=3),
        "sample": digest(vae.sample(7)),
        "reconstruct": vae.reconstruct(x),
        "impute": impute(vae.model, vae.guide, x, num_samples=30, num_draws=2),
    }


AIS, SMC = estimators.AnnealedImportanceSampling, estimators.SequentialMonteCarlo

ESTIMATORS: dict[str, Callable[[], estimators.Estimator]] = {
    "ImportanceSampling": lambda: estimators.ImportanceSampling(100),
    "ImportanceSampling, smoothed": lambda: estimators.ImportanceSampling(100, smoothed=True),
    "ImportanceSampling, Guide": lambda: estimators.ImportanceSampling(60, estimators.Guide()),
    "ImportanceSampling, Prior": lambda: estimators.ImportanceSampling(60, estimators.Prior()),
    "ImportanceSampling, Widened": lambda: estimators.ImportanceSampling(60, estimators.Widened(1.5)),
    "ImportanceSampling, Mixed": lambda: estimators.ImportanceSampling(60, estimators.Mixed()),
    "ImportanceSampling, Refined": lambda: estimators.ImportanceSampling(60, estimators.Refined(20)),
    "CUBO": lambda: estimators.CUBO(60),
    "AnnealedImportanceSampling": lambda: AIS(8, 20),
    "AnnealedImportanceSampling, Sigmoid": lambda: AIS(8, 20, start=estimators.Guide(), schedule=estimators.Sigmoid()),
    "AnnealedImportanceSampling, Linear": lambda: AIS(8, 20, schedule=estimators.Linear()),
    "AnnealedImportanceSampling, Adaptive": lambda: AIS(8, 20, schedule=estimators.Adaptive()),
    "SequentialMonteCarlo": lambda: SMC(4, 8),
    "Quadrature": lambda: estimators.Quadrature(2_000),
}


def estimate_with(method: Callable[[], estimators.Estimator]) -> dict[str, Any]:
    vae = normal_vae(6)
    return estimated(vae, binary(4), method=method())


CASES |= {f"log_marginal {name}": partial(estimate_with, method) for name, method in ESTIMATORS.items()}


@recorded("log_marginal of classes")
def _():
    vae, x = class_vae(), binary(4)
    methods = {
        "Enumeration": estimators.Enumeration(),
        "ImportanceSampling": estimators.ImportanceSampling(60),
        "Prior": estimators.ImportanceSampling(60, estimators.Prior()),
    }
    return {name: estimated(vae, x, method=method) for name, method in methods.items()}


@recorded("bidirectional")
def _():
    vae, x = normal_vae(6), binary(4)
    bracket = estimators.bidirectional(vae.model, vae.guide, x, method=AIS(8, 20), progress=False)
    return {"lower": estimate_numbers(bracket.lower), "upper": estimate_numbers(bracket.upper), "gap": bracket.gap}


@recorded("refine and independent_baseline")
def _():
    vae, x = normal_vae(6), binary(4)
    guide = estimators.refine(vae.model, vae.guide, x, num_steps=20)
    weights = log_weights(vae.model, guide, x, num_samples=3)
    grey = torch.rand(20, 6)
    baselines = [estimators.independent_baseline(binary(20), x)[1], estimators.independent_baseline(grey, grey[:4])[1]]
    return {"log_weights": weights, "baselines": baselines}


# ------------------------------------------------------------------------------------------------------ diagnostics


def diagnose(diagnostic: Callable[..., diagnostics.Diagnosis], **options: Any) -> dict[str, Any]:
    vae, x = normal_vae(), images()
    fit(vae.model, vae.guide, x, epochs=10, batch_size=20, optimizer=partial(torch.optim.Adam, lr=2e-2), progress=False)
    return diagnostic(vae.model, vae.guide, x, **options).summary()


DIAGNOSTICS: dict[str, Callable[[], Any]] = {
    "collapse": partial(diagnose, diagnostics.collapse, progress=False),
    "reliability": partial(diagnose, diagnostics.reliability, num_samples=60, progress=False),
    "calibration": partial(diagnose, diagnostics.calibration, num_draws=19, num_rounds=2, progress=False),
    "sharpness": partial(diagnose, diagnostics.sharpness),
    "quality": partial(diagnose, diagnostics.quality),
    "traversals": partial(diagnose, diagnostics.traversals, steps=3),
    "interpolations": partial(diagnose, diagnostics.interpolations, steps=5),
    "latent_map": partial(diagnose, diagnostics.latent_map, points=5, labels=torch.arange(40) % 3),
    "posterior_check": partial(
        diagnose, diagnostics.posterior_check, num_data=1, num_samples=100, warmup_steps=20, progress=False
    ),
}
CASES |= DIAGNOSTICS


@recorded("gaps")
def _():
    options = {"method": estimators.Quadrature(2_000), "num_samples": 50, "num_steps": 30, "progress": False}
    return diagnose(diagnostics.gaps, train=images(), **options)


@recorded("anomalies")
def _():
    return diagnose(diagnostics.anomalies, other=images(30) + 0.2, reference=images(), num_samples=50, progress=False)


@recorded("scores of features")
def _():
    real, generated = torch.randn(30, 3), 1.2 * torch.randn(30, 3)
    return {
        "precision_recall": diagnostics.precision_recall(real, generated),
        "frechet_distance": diagnostics.frechet_distance(real, generated),
        "auroc": diagnostics.auroc(real.sum(1), generated.sum(1) - 1),
    }


@recorded("CollapseMonitor")
def _():
    vae, x = small_vae(), binary()
    monitor = diagnostics.CollapseMonitor(vae.model, vae.guide, x[:20], every=2)
    return trained(vae.model, vae.guide, x, vae, callbacks=[monitor])


# ---------------------------------------------------------------------------------------------------- distributions


def flow() -> torch.nn.Module:
    return latents.import_zuko().flows.NSF(6, transforms=1, hidden_features=(8,), bins=4)


# From six numbers, evenly spaced from -1 to 1, to a distribution. Each class of both modules has a row.
DISTRIBUTIONS: dict[str, Callable[[torch.Tensor], dist.TorchDistribution]] = {
    "BatchScaleNormal": lambda t: distributions.BatchScaleNormal(t, torch.tensor(0.5)),
    "Beta": lambda t: distributions.Beta(t.exp(), torch.tensor(2.0)),
    "Blocks": lambda t: distributions.Blocks([dist.Normal(t, 1.0).to_event(1), dist.Bernoulli(logits=t).to_event(1)]),
    "Categorical": lambda t: distributions.Categorical(logits=t),
    "ContinuousBernoulli": lambda t: distributions.ContinuousBernoulli(logits=5 * t),
    "DiscretizedLogistic": lambda t: distributions.DiscretizedLogistic(t.sigmoid(), 0.1 * t.exp(), levels=8),
    "Gamma": lambda t: distributions.Gamma(t.exp(), torch.tensor(1.5)),
    "IndependentBernoulli": lambda t: distributions.IndependentBernoulli(dist.Bernoulli(logits=t), 1),
    "MaskedElements": lambda t: distributions.mask_elements(dist.Normal(t, 1.0).to_event(1), torch.arange(6) % 3 > 0),
    "Multinomial": lambda t: distributions.Multinomial(5, t),
    "NegativeBinomial": lambda t: distributions.NegativeBinomial(torch.tensor(3.0), log_mean=t),
    "Poisson": lambda t: distributions.Poisson(t),
    "SigmoidBelief": lambda t: distributions.SigmoidBelief(t, (0.1 * torch.arange(36.0).view(6, 6) - 2).triu(1)),
    "StudentT": lambda t: distributions.StudentT(torch.tensor(5.0), t, t.exp()),
    "ZeroInflatedNegativeBinomial": lambda t: distributions.ZeroInflatedNegativeBinomial(torch.tensor(3.0), t, -t),
    "Exemplars": lambda t: latents.Exemplars(t.view(3, 2), torch.tensor([0.5])),
    "Flattened": lambda t: latents.Flattened(dist.Normal(t.view(3, 2), 1.0).to_event(2)),
    "Flow": lambda t: latents.Flow(flow()(), t, t.exp()),
    "HypersphericalUniform": lambda t: latents.HypersphericalUniform(t),
    "LogisticNormal": lambda t: latents.LogisticNormal(t, t.exp()),
    "LowRankMultivariateNormal": lambda t: latents.LowRankMultivariateNormal(t, t.unsqueeze(-1), t.exp()),
    "MultivariateNormal": lambda t: latents.MultivariateNormal(t[:3], scale_tril=latents.tril_of(t)),
    "NormalMixture": lambda t: latents.NormalMixture(t[:3], t.view(3, 2), t.view(3, 2).exp()),
    "RelaxedOneHotCategorical": lambda t: latents.RelaxedOneHotCategorical(torch.tensor(0.5), logits=t),
    "ReparameterizedMixture": lambda t: latents.ReparameterizedMixture(
        dist.Categorical(logits=t[:3]), dist.Normal(t.view(3, 2), t.view(3, 2).exp()).to_event(1)
    ),
    "Resampled": lambda t: latents.Resampled(
        dist.Normal(t, 1.0).to_event(1), lambda z: -z.square().sum(-1), t.sum() - 2.0, tries=5
    ),
    "StratifiedCategorical": lambda t: latents.StratifiedCategorical(logits=t),
    "VonMisesFisher": lambda t: latents.VonMisesFisher(t / t.norm(), t[-1:].exp()),
}


def draw_from(build: Callable[[torch.Tensor], dist.TorchDistribution]) -> dict[str, Any]:
    """Draws from a distribution, scores the draws, and takes the gradient of both in its parameters."""
    t = torch.linspace(-1, 1, 6, requires_grad=True)
    p = build(t)
    x = p.rsample((3,)) if p.has_rsample else p.sample((3,))
    log_prob = build(t).log_prob(x.detach())
    total = log_prob.sum() + (x.cos().sum() if x.requires_grad else 0.0)
    [gradient] = torch.autograd.grad(total, t) if total.requires_grad else [torch.zeros(6)]
    return {"draws": digest(x), "log_prob": log_prob, "gradient": gradient}


CASES |= {f"draws of {name}": partial(draw_from, build) for name, build in DISTRIBUTIONS.items()}


# ------------------------------------------------------------------------------------------------------------ parts


def run_part(case: Case) -> dict[str, Any]:
    """Draws from the distribution that a part returns, scores the draws, and takes the gradient in its weights."""
    part = case.build().double()
    out = part(*inputs(case, part, 3))
    if case.kind == "network":
        return {"output": digest(out), "gradient": gradient_of(out.sum(), part)}
    x = out.rsample() if out.has_rsample else out.sample()
    log_prob = out.log_prob(x) if case.density else torch.zeros(())
    total = log_prob.sum() + (x.cos().sum() if x.requires_grad else 0.0)
    return {"draws": digest(x), "log_prob": log_prob, "gradient": gradient_of(total, part)}


def gradient_of(total: torch.Tensor, part: torch.nn.Module) -> torch.Tensor:
    parameters = [p for _, p in sorted(part.named_parameters()) if p.requires_grad]
    if not (parameters and total.requires_grad):
        return torch.zeros(())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return digest(torch.cat([g.flatten() for g in gradients if g is not None]))


PARTS = cases("prior", "likelihood", "encoder", "network")
CASES |= {f"{case.kind} {case.name}": partial(run_part, case) for case in PARTS}


# ------------------------------------------------------------------------------------------------ a run of 0.1.0


@recorded("the run of 0.1.0")
def _():
    vae, config = load_run(RUN)
    vae.double()
    x = data.static_binarization(data.load("digits").test.x[:10].double())
    return {
        "epochs": config["epochs"],
        "estimate": estimated(vae, x),
        "loss": bounds.IWAE(4, DREG).loss(vae.model, vae.guide, x),
        "sample": digest(vae.sample(4)),
    }


# ------------------------------------------------------------------------------------------------------------ tests


def test_every_distribution_has_recorded_draws():
    names = {
        name
        for module in (distributions, latents)
        for name in module.__all__
        if isinstance(getattr(module, name), type)
        and issubclass(getattr(module, name), torch.distributions.Distribution)
    }
    # Stacked, Autoregressive and the chains draw as their parts do; the cells of tables are newer than the records
    # (test_cells.py).
    others = {
        "Stacked",
        "Autoregressive",
        "MarkovChain",
        "RecurrentChain",
        "Columns",
        "LogisticCells",
        "RoundedLogisticCells",
    }
    assert names - others == DISTRIBUTIONS.keys()


def test_every_case_has_recorded_numbers():
    assert json.loads(NUMBERS.read_text()).keys() == {*CASES, COMMAND_LINE}


# Other processors round sums and elementary functions differently. MEASURED is the largest change of a number,
# relative to 1 + its size, when the cases ran without vector instructions (ATEN_CPU_CAPABILITY=default,
# MKL_CBWR=COMPATIBLE), with those of SSE4.2 or AVX2, and with two threads. The tolerance is 1,000 times that, for other
# libraries, and still a thousandth of a rounding in single precision: another number or order of draws, or a step in
# single precision, shows.
MEASURED = 5e-14
TOLERANCE = 1_000 * MEASURED
COMMAND_LINE = "the run of 0.1.0 on the command line"
TOLERANCES = {
    # The many steps of NUTS amplify rounding: here the largest change was 2e-10.
    "posterior_check": 1_000 * 2e-10,
    # In single precision it was 2e-6. With 100 times that, values near -30 may differ by 0.006 nats, which is below the
    # standard error of each, so that other draws show.
    COMMAND_LINE: 100 * 2e-6,
}


def assert_as_recorded(name: str, got: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert got.keys() == wanted.keys()
    for key, numbers in wanted.items():
        np.testing.assert_allclose(got[key], numbers, rtol=tolerance, atol=tolerance, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_as_recorded(name):
    assert_as_recorded(name, measure(name), json.loads(NUMBERS.read_text())[name])


# ------------------------------------------------------------------------------------------ the run, by commands


def score_and_resume(directory: Path) -> dict[str, list[float]]:
    """Scores a copy of the run, then trains it for two more epochs, on the command line and in single precision."""
    run, scores = shutil.copytree(RUN, directory / "run"), directory / "scores.csv"
    command_line(["evaluate", str(run), "--num-data", "50", "--num-samples", "100", "--output", str(scores)])
    table = np.genfromtxt(scores, delimiter=",", names=True)
    command_line(["train", "--run", str(run), "--resume", "--epochs", "5"])
    records = read_metrics(run)
    assert records[:3] == read_metrics(RUN)[:3]
    assert [record.get("epoch") for record in records] == [1, 2, 3, 4, 5, None]
    names = ("loss", "bound", "kl z", "MaximumMeanDiscrepancy", "validation", "learning_rate", "mutual_information")
    resumed = {name: [record[name] for record in records[3:5]] for name in names}
    return flattened(
        {
            "evaluate": {name: table[name].tolist() for name in ("value", "standard_error", "ess")},
            "resume": resumed | {"log_marginal": records[5]["log_marginal"], "weights": weights_of(load_run(run)[0])},
        }
    )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_an_earlier_version_is_scored_and_resumed(tmp_path):
    wanted = json.loads(NUMBERS.read_text())[COMMAND_LINE]
    assert_as_recorded(COMMAND_LINE, score_and_resume(tmp_path), wanted)


# Names of classes are kept in a configuration as they were given, and so by the module that defined them in 0.1.0.
LOSS_NAMES = ["elbo.ELBO", *(f"weighted.{name}" for name in ("CIWAE", "CUBO", "IWAE", "MIWAE", "PIWAE", "Renyi"))]
LOSS_NAMES += ["weighted.ReweightedWakeSleep", "weighted.TVO", "weighted.VRMax"]


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_classes_may_be_named_by_the_modules_of_an_earlier_version(loss, tmp_path):
    run = shutil.copytree(RUN, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    for now, then in {
        "pyrovae.bounds.weighted.IWAE": f"pyrovae.bounds.{loss}",
        "pyrovae.priors.VampPrior": "pyrovae.priors.mixtures.VampPrior",
        "pyrovae.likelihoods.Bernoulli": "pyrovae.likelihoods.discrete.Bernoulli",
    }.items():
        assert now in config
        config = config.replace(now, then)
    (run / "config.yaml").write_text(config)
    vae, loaded = load_run(run)
    assert loaded["loss"]["class_path"] == f"pyrovae.bounds.{loss}"
    assert weights_of(vae).equal(weights_of(load_run(RUN)[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Records the numbers of the cases.")
    parser.add_argument("--write", nargs="*", required=True, metavar="CASE", help="the cases; all if none is named")
    known = [*CASES, COMMAND_LINE]
    names = parser.parse_args().write or known
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    for name in names:
        if name == COMMAND_LINE:
            with TemporaryDirectory() as directory:
                numbers[name] = score_and_resume(Path(directory))
        else:
            numbers[name] = measure(name)
    lines = [f" {json.dumps(name)}: {json.dumps(numbers[name])}" for name in known if name in numbers]
    NUMBERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
