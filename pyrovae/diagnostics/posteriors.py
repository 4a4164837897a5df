"""Is the posterior right? The guide against long Markov chains, against the model's own draws, and by its weights."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import Transform, biject_to
from tqdm.auto import tqdm

from pyrovae.arguments import take_rows, width
from pyrovae.diagnostics import base
from pyrovae.diagnostics.base import Diagnosis, Latents, check_at_least, latents_of
from pyrovae.estimators import log_marginal
from pyrovae.inference.structure import SiteStructure, evaluation_mode, sample_sites
from pyrovae.inference.weights import check_draws, log_joint, simulate, trace_guide, trace_model

__all__ = ["Calibration", "PosteriorCheck", "Reliability", "calibration", "posterior_check", "reliability"]

_WIDTH = 80
_NARROW, _WIDE = 0.8, 1.25  # ratios of standard deviations
_SHIFT = 0.25  # posterior standard deviations
_CORRELATION = 0.3
_SURE = 4  # standard errors: no fault is what chance makes of few draws and many dimensions
_SHARE = 0.05  # of the dimensions: fewer may be chance
_RHAT, _ESS = 1.05, 100
_STARTS = 100  # tries to find a place with a density
_LEVEL = 0.05
_DEGREE = 4  # of the polynomials that ranks are held against
_CHUNK = 2**22  # elements of the largest argument, times draws, that calibration works on at once


@dataclass(frozen=True, eq=False)
class PosteriorCheck(Diagnosis):
    r"""A guide beside NUTS, datum by datum; what :func:`posterior_check` returns.

    Args:
        names: the latent dimensions, by site: ``total`` of them.
        guide_draws: draws of the guide, shape ``(num_draws, batch, total)``.
        draws: draws by NUTS, the chains one after the other, shape ``(num_draws, batch, total)``.
        guide_mean: shape ``(batch, total)``.
        guide_std: shape ``(batch, total)``.
        mean: by NUTS, shape ``(batch, total)``.
        std: by NUTS, shape ``(batch, total)``.
        difference: the guide's mean less that of NUTS, in standard deviations of NUTS, shape ``(batch, total)``.
        ratio: the guide's standard deviation over that of NUTS, shape ``(batch, total)``.
        distance: 1-Wasserstein distance of the marginals, in standard deviations of NUTS, shape ``(batch, total)``.
            Where nothing is wrong, draws alone make it some :math:`\sqrt{1 / \text{ess} + 1 / \text{num\_draws}}`.
        correlation_difference: correlations under the guide less those under NUTS, shape ``(batch, total, total)``.
        rhat: split R-hat of the chains, shape ``(batch, total)``.
        ess: effective sample size of the chains, shape ``(batch, total)``.
        divergences: how many draws by NUTS diverged, shape ``(batch,)``.
        num_chains: chains a datum.
    """

    names: tuple[str, ...]
    guide_draws: Tensor
    draws: Tensor
    guide_mean: Tensor
    guide_std: Tensor
    mean: Tensor
    std: Tensor
    difference: Tensor
    ratio: Tensor
    distance: Tensor
    correlation_difference: Tensor
    rhat: Tensor
    ess: Tensor
    divergences: Tensor
    num_chains: int

    @property
    def converged(self) -> Tensor:
        """Whether the chains of a datum may be believed: R-hat and effective sample size of all dimensions."""
        return ((self.rhat <= _RHAT) & (self.ess >= _ESS)).all(-1)

    @property
    def discrepancy(self) -> Tensor:
        """The distance of a datum, the mean over its dimensions, in posterior standard deviations; ``(batch,)``."""
        return self.distance.mean(-1)

    @property
    def verdict(self) -> str:
        """One line: what was found, and what usually mends it."""
        use = self.converged
        doubtful = int((~use).sum())
        if doubtful == len(use):
            return (
                f"The chains of NUTS settled for none of the {len(use)} data, so the guide cannot be judged: raise "
                "warmup_steps and num_samples; chains that never agree tell of several modes, which "
                "encoders.GaussianMixture or encoders.NeuralSplineFlow can hold."
            )
        shares, found = self._shares(), []
        if shares["narrow"] >= _SHARE:
            found.append(
                f"too narrow in {shares['narrow']:.0%} of the dimensions (encoders.FullRankNormal or NeuralSplineFlow; "
                "bounds.IWAE widens it)"
            )
        if shares["wide"] >= _SHARE:
            found.append(
                f"too wide in {shares['wide']:.0%} of the dimensions (train the encoder longer, or give it a larger "
                "network; after ReweightedWakeSleep or CUBO, a richer family such as encoders.FullRankNormal)"
            )
        if shares["shifted"] >= _SHARE:
            found.append(
                f"shifted in {shares['shifted']:.0%} of the dimensions (a larger encoder network, longer training, "
                "more data)"
            )
        error = (1 / self.ess.amin(-1) + 1 / len(self.guide_draws)).sqrt()
        missed = int((self._correlation_gap() > (_SURE * error).clamp(min=_CORRELATION))[use].sum())
        if missed:
            found.append(
                f"without the correlations of {missed} of {int(use.sum())} data (encoders.FullRankNormal, "
                "LowRankNormal or NeuralSplineFlow)"
            )
        seen = max(_SHIFT, _SURE * error[use].amax().item())
        said = (
            f"The guide is {'; '.join(found)}."
            if found
            else f"The guide is right wherever NUTS can tell: with these draws, of shifts above {seen:.2f} sd."
        )
        if doubtful:
            said += f" {doubtful} of {len(use)} data left out: their chains did not settle, raise warmup_steps."
        return said

    def __str__(self) -> str:
        batch, total = self.mean.shape
        worst = self.distance.argmax(-1)
        lines = [
            f"The guide beside NUTS: {self.num_chains} chains, {len(self.draws):,} draws a datum, {total} dimensions",
            f"{'datum':>6}{'distance':>9}{'narrow':>7}{'wide':>5}{'shifted':>8}{'corr.':>6}"
            f"{'worst':>9}{'shift':>6}{'ratio':>6}{'R-hat':>6}{'ESS':>6}{'div.':>5}",
        ]
        rhat, ess, gap = self.rhat.amax(-1), self.ess.amin(-1), self._correlation_gap()
        narrow, wide, shifted = (t.sum(-1) for t in self._faults())
        for i in range(batch):
            d = int(worst[i])
            mark = "" if self.converged[i] else "*"
            lines.append(
                f"{f'{mark}{i}':>6}{self.discrepancy[i]:9.3f}{int(narrow[i]):7}{int(wide[i]):5}{int(shifted[i]):8}"
                f"{gap[i]:6.2f}{self.names[d][:8]:>9}{self.difference[i, d]:+6.2f}{self.ratio[i, d]:6.2f}{rhat[i]:6.2f}"
                f"{ess[i]:6.0f}{int(self.divergences[i]):5}"
            )
        lines.append(
            textwrap.fill(
                f"distance: mean over dimensions, in posterior standard deviations (sd); narrow: ratio of sd below "
                f"{_NARROW}; wide: above {_WIDE}; shifted: by more than {_SHIFT} sd (each beyond {_SURE} standard "
                "errors as well); corr.: largest difference of a correlation; worst: the most distant dimension",
                _WIDTH,
            )
        )
        if not bool(self.converged.all()):
            lines.append(f"*: not to be trusted, R-hat above {_RHAT} or ESS below {_ESS}")
        return "\n".join([*lines, textwrap.fill(self.verdict, _WIDTH)])

    def summary(self) -> dict[str, Any]:
        """Returns shares of the dimensions and the distance, both of data whose chains settled, and a row a datum."""
        use, worst, gap = self.converged, self.distance.argmax(-1), self._correlation_gap()
        return {
            "num_data": len(use),
            "num_converged": int(use.sum()),
            "num_draws": len(self.draws),
            "distance": _plain(self.discrepancy[use].mean()),
            **{name: _plain(share) for name, share in self._shares().items()},
            "data": [
                {
                    "converged": bool(use[i]),
                    "distance": _plain(self.discrepancy[i]),
                    "correlation": _plain(gap[i]),
                    "worst": self.names[d],
                    "difference": _plain(self.difference[i, d]),
                    "ratio": _plain(self.ratio[i, d]),
                    "rhat": _plain(self.rhat[i].amax()),
                    "ess": _plain(self.ess[i].amin()),
                    "divergences": int(self.divergences[i]),
                }
                for i, d in enumerate(worst.tolist())
            ],
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws, for each datum, the two latents whose correlation the guide misses most and its worst marginals."""
        from pyrovae.plots import posteriors

        return posteriors.posterior_check(self, path)

    def _faults(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns where the guide is too narrow, too wide and shifted, each of shape ``(batch, total)``."""
        n, far = len(self.guide_draws), self.ratio.log().abs()
        sure = far > _SURE * (0.5 / self.ess + 0.5 / n).sqrt()
        shifted = self.difference.abs() > (_SURE * (1 / self.ess + self.ratio.square() / n).sqrt()).clamp(min=_SHIFT)
        return sure & (self.ratio < _NARROW), sure & (self.ratio > _WIDE), shifted

    def _shares(self) -> dict[str, float]:
        """Returns the shares of the dimensions with a fault, among data whose chains settled."""
        faults = zip(("narrow", "wide", "shifted"), self._faults(), strict=True)
        return {name: fault[self.converged].double().mean().item() for name, fault in faults}

    def _correlation_gap(self) -> Tensor:
        return self.correlation_difference.abs().flatten(1).amax(-1)


@torch.no_grad()
def posterior_check(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_data: int = 3,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 2,
    progress: bool = True,
    **kwargs: Any,
) -> PosteriorCheck:
    r"""Holds the guide against the posterior itself, which long chains of the No-U-Turn sampler find, datum by datum.

    .. math:: z_k \sim q(z \mid x) \quad\text{beside}\quad z_t \sim p(z \mid x) \propto p(x, z)

    Chains start by turns at a draw of the guide and of the prior, so that they disagree, which R-hat sees, if the guide
    sits in one mode of several. No draw proves that there is no other mode. Scales that only weigh a training loss are
    left out of the posterior. Modules run in evaluation mode. It takes minutes rather than seconds: chains run one
    after the other, a few hundred evaluations of the model a second.

    Args:
        model: a Pyro model, called with the same arguments as the guide; all its latents are continuous.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension, or anything else, which is passed on as it is.
        num_data: the first so many data are looked at.
        num_samples: draws a chain keeps, at least 100. The guide makes as many as all chains of a datum.
        warmup_steps: steps a chain takes before, in which it adapts its step size and mass matrix.
        num_chains: chains a datum, at least 2.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`PosteriorCheck`.

    Raises:
        ValueError: when an argument is out of range; a latent is discrete or lies in a space that is no image of the
            real vectors (a sphere); no start has a density; model and guide do not fit each other or the data; or a
            latent lies outside the data plate.

    References:
        The No-U-Turn Sampler, M. D. Hoffman and A. Gelman, 2014, https://arxiv.org/abs/1111.4246.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> settings = {"num_data": 1, "num_samples": 100, "warmup_steps": 20, "progress": False}
    >>> posterior_check(vae.model, vae.guide, torch.zeros(5, 3), **settings).ratio.shape
    torch.Size([1, 2])
    """
    check_at_least("num_data", num_data, 1)
    check_at_least("num_samples", num_samples, 100)
    check_at_least("warmup_steps", warmup_steps, 1)
    check_at_least("num_chains", num_chains, 2)
    args, kwargs, size = base.in_memory(1, "posterior_check", args, kwargs)
    num_data = min(num_data, size)
    bar = tqdm(
        desc="NUTS", total=num_data * num_chains * (warmup_steps + num_samples), unit="step", disable=not progress
    )
    guide_draws, draws, divergences = [], [], []
    with evaluation_mode(), bar:
        for i in range(num_data):
            row, named = take_rows(slice(i, i + 1), args, kwargs)
            structure = _inspect(model, guide, slice(i, i + 1), args, kwargs)
            drawn = trace_guide(guide, structure, num_chains * num_samples, *row, **named)
            guide_draws.append(latents_of(drawn, structure))
            spaces = _unconstrained(
                trace_model(model, drawn, structure, num_chains * num_samples, *row, **named), structure
            )
            chains, diverged = [], 0
            for chain in range(num_chains):
                start = guide if chain % 2 == 0 else model
                found, here = _chain(model, start, structure, spaces, warmup_steps, num_samples, row, named, bar)
                chains.append(found)
                diverged += here
            values = {name: torch.cat([chain[name] for chain in chains]) for name in spaces}
            draws.append(latents_of(_at(drawn, values), structure).values)
            divergences.append(diverged)
    q = torch.cat([latents.values for latents in guide_draws], dim=1).double()
    p = torch.cat(draws, dim=1).double()
    chains = p.unflatten(0, (num_chains, num_samples))
    mean, std, guide_mean, guide_std = p.mean(0), p.std(0), q.mean(0), q.std(0)
    return PosteriorCheck(
        names=_names(guide_draws[0]),
        guide_draws=q,
        draws=p,
        guide_mean=guide_mean,
        guide_std=guide_std,
        mean=mean,
        std=std,
        difference=(guide_mean - mean) / std,
        ratio=guide_std / std,
        distance=(q.sort(0).values - p.sort(0).values).abs().mean(0) / std,
        correlation_difference=_correlations(q) - _correlations(p),
        rhat=split_gelman_rubin(chains),
        ess=effective_sample_size(chains).clamp(max=len(p)),
        divergences=torch.tensor(divergences),
        num_chains=num_chains,
    )


@dataclass(frozen=True, eq=False)
class Calibration(Diagnosis):
    r"""How the truth ranks among the guide's draws; what :func:`calibration` returns.

    Args:
        names: the quantities that were ranked: each latent dimension, and "log p(x, z)" as the last; ``total`` of them.
        ranks: how many of the guide's draws lie below the truth, from 0 to `num_draws`, shape ``(num_ranks, total)``.
        slope: how far ranks lean to the top (positive: the guide is too low), in standard errors, shape ``(total,)``.
        bowl: how far they crowd at both ends (positive: the guide is too narrow), in standard errors, ``(total,)``.
        p_value: of ranks at least so uneven, were the guide exact, shape ``(total,)``.
        adjusted_p_value: the same by Holm, for looking at all quantities at once, shape ``(total,)``.
        shapes: what the ranks of each quantity say, in words.
        num_draws: draws of the guide a datum.
    """

    names: tuple[str, ...]
    ranks: Tensor
    slope: Tensor
    bowl: Tensor
    p_value: Tensor
    adjusted_p_value: Tensor
    shapes: tuple[str, ...]
    num_draws: int

    @property
    def uneven(self) -> Tensor:
        """Which quantities have ranks that are not uniform, at a level of 5% over all; shape ``(total,)``."""
        return self.adjusted_p_value < _LEVEL

    @property
    def verdict(self) -> str:
        """One line: what was found, and what usually mends it."""
        found = [name for name, bad in zip(self.shapes, self.uneven.tolist(), strict=True) if bad]
        data = f"in {len(self.ranks):,} data drawn from the model itself (not in yours)"
        if not found:
            return f"No sign that the guide is off {data}; smaller faults take more num_rounds to see."
        counts = {shape: found.count(shape) for shape in sorted(set(found), key=found.index)}
        listed = ", ".join(f"{shape} ({count})" for shape, count in counts.items())
        mends = list(dict.fromkeys(_MENDS[shape] for shape in counts))
        return (
            f"The guide is off in {len(found)} of {len(self.names)} quantities, {data}: {listed}. "
            f"Try {'; '.join(mends)}."
        )

    def __str__(self) -> str:
        order = self.p_value.argsort().tolist()
        shown = order[:12]
        lines = [
            f"Ranks of the truth among {self.num_draws} draws of the guide, {len(self.ranks):,} simulated data",
            f"{'quantity':14}{'mean rank':>10}{'slope':>8}{'bowl':>8}{'p':>9}{'Holm p':>9}  shape",
        ]
        mean = self.ranks.double().mean(0) / self.num_draws
        for i in shown:
            lines.append(
                f"{self.names[i][:13]:14}{mean[i]:10.3f}{self.slope[i]:+8.1f}{self.bowl[i]:+8.1f}"
                f"{self.p_value[i]:9.2g}{self.adjusted_p_value[i]:9.2g}  {self.shapes[i]}"
            )
        if len(order) > len(shown):
            lines.append(f"... and {len(order) - len(shown)} with larger p")
        lines.append("mean rank: 0.5 if right; slope, bowl: in standard errors")
        return "\n".join([*lines, textwrap.fill(self.verdict, _WIDTH)])

    def summary(self) -> dict[str, Any]:
        """Returns how many quantities have uneven ranks, and a row a quantity."""
        return {
            "num_ranks": len(self.ranks),
            "num_draws": self.num_draws,
            "num_uneven": int(self.uneven.sum()),
            "quantities": {
                name: {
                    "slope": _plain(self.slope[i]),
                    "bowl": _plain(self.bowl[i]),
                    "p_value": _plain(self.p_value[i]),
                    "adjusted_p_value": _plain(self.adjusted_p_value[i]),
                    "shape": self.shapes[i],
                }
                for i, name in enumerate(self.names)
            },
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws histograms of the ranks of log p(x, z) and of the dimensions with the smallest p-values."""
        from pyrovae.plots import posteriors

        return posteriors.calibration(self, path)


_NARROW_SHAPE, _WIDE_SHAPE, _LOW, _HIGH = "too narrow", "too wide", "too low", "too high"
_IMPROBABLE, _PROBABLE, _EVEN, _UNEVEN = "draws too improbable", "draws too probable", "even", "uneven"
_MENDS = {
    _NARROW_SHAPE: "encoders.FullRankNormal, encoders.NeuralSplineFlow or bounds.IWAE against a narrow guide",
    _PROBABLE: "encoders.FullRankNormal, encoders.NeuralSplineFlow or bounds.IWAE against a narrow guide",
    _WIDE_SHAPE: "longer training or a larger encoder network",
    _LOW: "longer training or a larger encoder network",
    _HIGH: "longer training or a larger encoder network",
    _IMPROBABLE: "longer training, a larger encoder network, or a richer guide such as encoders.FullRankNormal",
    _UNEVEN: "a richer guide such as encoders.NeuralSplineFlow",
}


@torch.no_grad()
def calibration(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 99,
    num_rounds: int = 1,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    r"""Ranks true latents among the guide's draws, in data simulated from the model: uniform if the guide is exact.

    .. math:: z, x \sim p(x, z), \quad z_l \sim q(z \mid x), \qquad
        r = \sum_{l=1}^L 1[f(x, z_l) < f(x, z)] \sim \mathrm{Uniform}\{0, \dots, L\}
        \ \text{ if } q(z \mid x) = p(z \mid x)

    with each latent dimension as :math:`f`, and :math:`\log p(x, z)`, which alone sees a guide that ignores the data
    and draws from the prior. Ties, of discrete latents, are broken at random. Unevenness is the sum of squares of the
    ranks' components along orthogonal polynomials of degrees 1 to 4 (Neyman's smooth test), of which the first is the
    slope and the second the bowl; under an exact guide it is chi-square with 4 degrees of freedom.

    This tests the guide on the model's own data: a guide can be right there and wrong on yours if the model is far from
    them, and the other way round. An even rank is no proof: faults that cancel over the data cannot be seen.

    Args:
        model: a Pyro model, called with the same arguments as the guide, which observes some of them.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; as many are simulated, anything that the model does
            not observe (a context) stays as it is.
        num_draws: draws of the guide a datum :math:`L`, at least 19.
        num_rounds: how often as many data as there are in `args` are simulated.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Calibration`.

    Raises:
        ValueError: when an argument is out of range; fewer than 50 data are simulated; what the model observes is none
            of the arguments; model and guide do not fit each other or the data; or a latent lies outside the data
            plate.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, S. Talts, M. Betancourt, D. Simpson,
        A. Vehtari and A. Gelman, 2018, https://arxiv.org/abs/1804.06788; Simulation-Based Calibration Checking for
        Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity, M. Modrák et al., 2023,
        https://arxiv.org/abs/2211.02383; "Smooth Test" for Goodness of Fit, J. Neyman, 1937,
        https://doi.org/10.1080/03461238.1937.10404821.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> calibration(vae.model, vae.guide, torch.zeros(60, 3), progress=False).names
    ('z[0]', 'z[1]', 'log p(x, z)')
    """
    check_at_least("num_draws", num_draws, 19)
    check_at_least("num_rounds", num_rounds, 1)
    args, kwargs, size = base.in_memory(1, "calibration", args, kwargs)
    if size * num_rounds < 50:
        raise ValueError(
            f"calibration needs at least 50 simulated data, got {size} data in num_rounds={num_rounds}. Set num_rounds "
            f"to {math.ceil(50 / size)} or more."
        )
    chunk = max(1, int(_CHUNK / ((num_draws + 1) * width(args, kwargs, size))))
    base.inspect_part(model, guide, slice(0, 2), args, kwargs)  # a guide of fixed rows knows nothing of data drawn anew
    ranks = []
    with evaluation_mode(), tqdm(desc="ranks", total=size * num_rounds, unit="datum", disable=not progress) as bar:
        for _ in range(num_rounds):
            for start in range(0, size, chunk):
                part = take_rows(slice(start, start + chunk), args, kwargs)
                structure = _inspect(model, guide, slice(start, start + chunk), args, kwargs)
                latents, ranked = _ranks(model, guide, structure, num_draws, *part)
                ranks.append(ranked)
                bar.update(len(ranked))
    ranks = torch.cat(ranks)
    components = (_polynomials(num_draws, _DEGREE)[ranks.cpu()].sum(0) / math.sqrt(len(ranks))).to(ranks.device)
    p_value = torch.special.gammaincc(torch.tensor(_DEGREE / 2).double(), components.square().sum(-1).cpu() / 2)
    adjusted = _holm(p_value)
    slope, bowl = components[:, 0].cpu(), components[:, 1].cpu()
    kinds = [
        "discrete" if name in structure.discrete else "latent"
        for name, columns in latents.columns.items()
        for _ in range(columns.start, columns.stop)
    ]
    shapes = tuple(
        _shape(kind, *numbers)
        for kind, *numbers in zip([*kinds, "density"], adjusted.tolist(), slope.tolist(), bowl.tolist(), strict=True)
    )
    names = (*_names(latents), "log p(x, z)")
    return Calibration(names, ranks, slope, bowl, p_value, adjusted, shapes, num_draws)


@dataclass(frozen=True, eq=False)
class Reliability(Diagnosis):
    """How well the guide serves as a proposal, datum by datum; what :func:`reliability` returns.

    Args:
        khat: shape of the Pareto tail of the importance weights, as in :class:`pyrovae.Estimate`, shape ``(batch,)``.
        ess: effective sample size, between 1 and `num_samples`, shape ``(batch,)``.
        num_samples: samples a datum.

    >>> print(Reliability(torch.tensor([0.1, 0.6]), torch.tensor([80.0, 20.0]), 100).verdict)
    The guide is a good proposal: k-hat is above 0.7 for 0 of 2 data.
    """

    khat: Tensor
    ess: Tensor
    num_samples: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many data have a k-hat below 0.5 (good), from 0.5 to 0.7 (usable), and above (not to be trusted)."""
        low, high = int((self.khat < 0.5).sum()), int((~(self.khat <= 0.7)).sum())
        return low, len(self.khat) - low - high, high

    @property
    def verdict(self) -> str:
        """One line: what was found, and what usually mends it."""
        bad = f"k-hat is above 0.7 for {self.counts[2]:,} of {len(self.khat):,} data"
        if self.counts[2] <= _SHARE * len(self.khat):
            return f"The guide is a good proposal: {bad}."
        return (
            f"The guide misses mass of the posterior: {bad}, whose log p(x) is likely to be too low. A richer guide "
            "(encoders.FullRankNormal, encoders.NeuralSplineFlow), bounds.IWAE, or a larger num_samples makes them "
            "fewer."
        )

    def __str__(self) -> str:
        n, lines = len(self.khat), [f"Importance weights of the guide, {self.num_samples:,} samples a datum"]
        names = ("below 0.5, good", "0.5 to 0.7, usable", "above 0.7, not to be trusted")
        lines += [
            f"k-hat {name:30}{count:8,} of {n:,} ({count / n:.0%})"
            for name, count in zip(names, self.counts, strict=True)
        ]
        quantiles = zip(("5%", "25%", "50%", "75%", "95%"), self._ess_quantiles(), strict=True)
        lines.append("ESS quantiles: " + "  ".join(f"{name} {value:,.1f}" for name, value in quantiles))
        lines.append("worst data:    " + "  ".join(f"{i} ({self.khat[i]:.2f})" for i in self._worst(5)))
        return "\n".join([*lines, textwrap.fill(self.verdict, _WIDTH)])

    def summary(self) -> dict[str, Any]:
        """Returns counts by k-hat, quantiles of the effective sample size, and the worst data by index."""
        return {
            "num_data": len(self.khat),
            "num_samples": self.num_samples,
            **dict(zip(("good", "usable", "untrusted"), self.counts, strict=True)),
            "ess_quantiles": [_plain(value) for value in self._ess_quantiles()],
            "worst": [{"datum": i, "khat": _plain(self.khat[i]), "ess": _plain(self.ess[i])} for i in self._worst(5)],
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws a histogram of k-hat beside the effective sample sizes."""
        from pyrovae.plots import posteriors

        return posteriors.reliability(self, path)

    def _ess_quantiles(self) -> list[float]:
        return self.ess.double().quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).to(self.ess).double()).tolist()

    def _worst(self, count: int) -> list[int]:
        return self.khat.argsort(descending=True)[:count].tolist()


def reliability(
    model: Callable, guide: Callable, *args: Any, num_samples: int = 1000, progress: bool = True, **kwargs: Any
) -> Reliability:
    r"""Says for how many data the guide is a good proposal, by the Pareto tail of its importance weights.

    .. math:: \Pr(w > t) \propto t^{-1 / \hat k} \ \text{ for large } t, \qquad
        w = \frac{p(x, z)}{q(z \mid x)}, \quad z \sim q(z \mid x)

    Below 0.5 the weights have a variance, and log p(x) its usual error; above 0.7 no practical number of samples finds
    the mass that the guide misses. An exact guide has equal weights and a k-hat of minus infinity.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension, or anything else, which is passed on as it is.
        num_samples: samples a datum, at least 21; the more, the surer k-hat.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Reliability`.

    Raises:
        ValueError: when `num_samples` is below 21, and as in :func:`pyrovae.log_marginal`.

    References:
        Pareto Smoothed Importance Sampling, A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, 2024,
        https://arxiv.org/abs/1507.02646; Yes, but Did It Work?: Evaluating Variational Inference, Y. Yao, A. Vehtari,
        D. Simpson and A. Gelman, 2018, https://arxiv.org/abs/1802.02538.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> reliability(vae.model, vae.guide, torch.zeros(5, 3), num_samples=100, progress=False).khat.shape
    torch.Size([5])
    """
    check_at_least("num_samples", num_samples, 21)
    args, kwargs, _ = base.in_memory(1, "reliability", args, kwargs)
    estimate = log_marginal(model, guide, *args, num_samples=num_samples, progress=progress, **kwargs)
    return Reliability(estimate.khat, estimate.ess, num_samples)


def _inspect(model: Callable, guide: Callable, rows: slice, args: tuple, kwargs: dict) -> SiteStructure:
    """Returns the structure of a model and a guide, or raises because the posterior of a datum is undefined."""
    structure = base.inspect_part(model, guide, rows, args, kwargs)
    if structure.problems:
        raise ValueError(
            f"The posterior of a datum is undefined: {'; '.join(structure.problems)}. What belongs to a datum must "
            'stand under pyro.plate("data", len(x)) in the model and in the guide, drawn from a density.'
        )
    args, kwargs = take_rows(rows, args, kwargs)
    return check_draws(structure, model, guide, *args, **kwargs)


def _names(latents: Latents) -> tuple[str, ...]:
    sizes = {name: columns.stop - columns.start for name, columns in latents.columns.items()}
    return tuple(name if n == 1 else f"{name}[{i}]" for name, n in sizes.items() for i in range(n))


def _at(trace: poutine.Trace, values: dict[str, Tensor]) -> poutine.Trace:
    """Returns a trace with other values of its latents."""
    moved = trace.copy()
    for name, value in values.items():
        moved.nodes[name] = {**trace.nodes[name], "value": value}
    return moved


def _unconstrained(trace: poutine.Trace, structure: SiteStructure) -> dict[str, Transform]:
    """Returns, for each latent site of a model's trace, the map of real vectors onto its support."""
    spaces = {}
    for name, site in sample_sites(trace).items():
        if name not in structure.latents:
            continue
        if name in structure.discrete:
            raise ValueError(
                f'The latent site "{name}" is discrete, where NUTS, which follows gradients, cannot go. '
                "pyrovae.diagnostics.calibration and reliability take discrete latents."
            )
        try:
            spaces[name] = biject_to(site["fn"].support)
        except NotImplementedError:
            raise ValueError(
                f'The latent site "{name}" of a {type(site["fn"]).__name__} lies in a space that is no image of the '
                "real vectors, where NUTS cannot go. pyrovae.diagnostics.calibration and reliability take any latents."
            ) from None
    return spaces


def _chain(
    model: Callable,
    start: Callable,
    structure: SiteStructure,
    spaces: dict[str, Transform],
    warmup_steps: int,
    num_samples: int,
    args: tuple,
    kwargs: dict,
    bar: tqdm,
) -> tuple[dict[str, Tensor], int]:
    """Runs one chain from a draw of a model or guide; returns its latents by site, and how many draws diverged."""

    def potential(z: dict[str, Tensor]) -> Tensor:
        values = {name: spaces[name](t) for name, t in z.items()}
        volume = sum(spaces[name].log_abs_det_jacobian(t, values[name]).sum() for name, t in z.items())
        return -log_joint(model, _at(first, values), structure, 1, *args, **kwargs).sum() - volume

    for _ in range(_STARTS):
        first = trace_guide(start, structure, 1, *args, **kwargs)
        z = {name: space.inv(first.nodes[name]["value"]) for name, space in spaces.items()}
        if math.isfinite(potential(z).item()):
            break
    else:
        raise ValueError(
            f"none of {_STARTS} draws of the {'model' if start is model else 'guide'} has a finite log p(x, z), so "
            "that NUTS has nowhere to start. Train the model first."
        )
    kernel, kept = NUTS(potential_fn=potential), []
    kernel.initial_params = z
    # Not pyro.infer.MCMC: it changes the handlers of a logger, and runs its chains in other processes. A trajectory
    # that diverges may leave the support of a distribution, which is no fault of the user's.
    with torch.enable_grad(), poutine.block(), pyro.validation_enabled(False):
        kernel.setup(warmup_steps)
        for step in range(warmup_steps + num_samples):
            z = kernel.sample(z)
            if step >= warmup_steps:
                kept.append(z)
            bar.update()
    draws = {name: space(torch.cat([z[name].detach() for z in kept])) for name, space in spaces.items()}
    return draws, len(kernel.diagnostics()["divergences"])


def _correlations(draws: Tensor) -> Tensor:
    """Returns correlations over draws, shape ``(batch, total, total)``; NaN counts as none."""
    return torch.stack([torch.corrcoef(d.T).reshape(d.shape[1], -1) for d in draws.unbind(1)]).nan_to_num(0.0)


def _ranks(
    model: Callable, guide: Callable, structure: SiteStructure, num_draws: int, args: tuple, kwargs: dict
) -> tuple[Latents, Tensor]:
    """Simulates latents and data, and ranks them; returns the latents, the true ones last, and the ranks."""
    truth, args, kwargs = simulate(model, *args, **kwargs)
    drawn = trace_guide(guide, structure, num_draws + 1, *args, **kwargs)
    # The truth takes the place of the last draw: scored apart, equal latents would differ by rounding.
    values = {}
    for name, site in sample_sites(drawn).items():
        if name in structure.latents:
            values[name] = site["value"].clone()
            values[name][-1] = truth.nodes[name]["value"]
    drawn = _at(drawn, values)
    latents = latents_of(drawn, structure)
    log_p = log_joint(model, drawn, structure, num_draws + 1, *args, **kwargs)
    quantities = torch.cat([latents.values, log_p.unsqueeze(-1).to(latents.values)], dim=-1)
    draws, true = quantities[:-1], quantities[-1]
    resolution = 16 * torch.finfo(true.dtype).eps * (1 + true.abs())
    below, tied = (draws < true - resolution).sum(0), ((draws - true).abs() <= resolution).sum(0)
    return latents, below + (torch.rand_like(true) * (tied + 1)).long()


def _polynomials(top: int, degree: int) -> Tensor:
    """Returns polynomials that are orthonormal under the uniform distribution on 0 to top, ``(top + 1, degree)``.

    Of degrees from 1 on, each positive at the top.
    """
    grid = torch.linspace(-1, 1, top + 1, dtype=torch.float64)
    q, _ = torch.linalg.qr(grid.unsqueeze(-1) ** torch.arange(degree + 1))
    return (q * q[-1].sign() * math.sqrt(top + 1))[:, 1:]


def _holm(p_value: Tensor) -> Tensor:
    """Adjusts p-values for looking at all of them at once, by Holm's method."""
    ordered, order = p_value.sort()
    stepped = (ordered * torch.arange(len(p_value), 0, -1)).cummax(0).values.clamp(max=1)
    return torch.empty_like(p_value).scatter_(0, order, stepped)


def _shape(kind: str, p_value: float, slope: float, bowl: float) -> str:
    """Says in words what ranks of a quantity, "latent", "discrete" or "density", have of slope and bowl."""
    if p_value >= _LEVEL:
        return _EVEN
    if kind == "discrete" or max(abs(slope), abs(bowl)) < 2:
        return _UNEVEN
    if kind == "density":
        return (_IMPROBABLE if slope > 0 else _PROBABLE) if abs(slope) >= abs(bowl) else _UNEVEN
    if abs(slope) >= abs(bowl):
        return _LOW if slope > 0 else _HIGH
    return _NARROW_SHAPE if bowl > 0 else _WIDE_SHAPE


def _plain(number: Any) -> float | None:
    """Returns a number as JSON takes it: none where it is not finite."""
    return float(number) if math.isfinite(number) else None
