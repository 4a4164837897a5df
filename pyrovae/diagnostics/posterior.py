"""Whether the posterior is right: the guide against long Markov chains."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyrovae.arguments import take_rows
from pyrovae.diagnostics.base import (
    TABLE_WIDTH,
    Diagnosis,
    ReportInputs,
    check_at_least,
    in_memory,
    inspect_posterior,
    latents_of,
    names_of,
    with_values,
)
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import log_joint, trace_guide, trace_model
from pyrovae.plots.drawing import new_figure
from pyrovae.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PosteriorCheck", "posterior_check"]

_NARROW, _WIDE = 0.8, 1.25  # ratios of standard deviations
_SHIFT = 0.25  # posterior standard deviations
_CORRELATION = 0.3
_ERRORS = 4  # standard errors: with few draws and many dimensions, smaller faults may be chance
_SHARE = 0.05  # of the dimensions: fewer faults may be chance
_RHAT, _ESS = 1.05, 100
_MAX_STARTS = 100  # draws to find a start with a finite density
_NUTS_COLOUR, _GUIDE_COLOUR = "C0", "C1"
_MAX_ROWS, _MAX_MARGINALS, _MAX_DOTS = 6, 3, 1000  # of the picture


@dataclass(frozen=True, eq=False)
class PosteriorCheck(Diagnosis):
    r"""A guide compared with NUTS, for each datum.

    Args:
        names: the latent dimensions, ``total`` of them.
        guide_draws: draws of the guide, shape ``(num_draws, batch, total)``.
        draws: draws by NUTS, the chains concatenated, shape ``(num_draws, batch, total)``.
        guide_mean: shape ``(batch, total)``.
        guide_std: shape ``(batch, total)``.
        mean: by NUTS, shape ``(batch, total)``.
        std: by NUTS, shape ``(batch, total)``.
        difference: the guide's mean minus that of NUTS, in standard deviations of NUTS, shape ``(batch, total)``.
        ratio: the guide's standard deviation over that of NUTS, shape ``(batch, total)``.
        distance: 1-Wasserstein distance of the marginals, in standard deviations of NUTS, shape ``(batch, total)``. For
            an exact guide it is about :math:`\sqrt{1 / E + 1 / S}`, for an effective sample size of E and S draws of
            the guide.
        correlation_difference: correlations under the guide minus those under NUTS, shape ``(batch, total, total)``.
        rhat: split R-hat of the chains, shape ``(batch, total)``.
        ess: effective sample size of the chains, shape ``(batch, total)``.
        divergences: number of divergent draws by NUTS, shape ``(batch,)``.
        num_chains: chains per datum.
    """

    question: ClassVar[str] = "Is the posterior right?"

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
        """Whether the chains of a datum converged, by R-hat and ESS of all dimensions; ``(batch,)``."""
        return ((self.rhat <= _RHAT) & (self.ess >= _ESS)).all(-1)

    @property
    def discrepancy(self) -> Tensor:
        """The mean distance over dimensions, in posterior standard deviations; ``(batch,)``."""
        return self.distance.mean(-1)

    @property
    def verdict(self) -> str:
        use = self.converged
        doubtful = int((~use).sum())
        if doubtful == len(use):
            return (
                f"The chains of NUTS converged for none of the {len(use)} data, so that the guide cannot be judged: "
                "raise warmup_steps and num_samples. Chains that never agree indicate several modes, which "
                "encoders.GaussianMixture or encoders.NeuralSplineFlow can represent."
            )
        shares, findings = self._shares(), []
        if shares["narrow"] >= _SHARE:
            findings.append(
                f"too narrow in {shares['narrow']:.0%} of the dimensions (encoders.FullRankNormal or NeuralSplineFlow; "
                "bounds.IWAE widens it)"
            )
        if shares["wide"] >= _SHARE:
            findings.append(
                f"too wide in {shares['wide']:.0%} of the dimensions (train the encoder longer, or give it a larger "
                "network; after ReweightedWakeSleep or CUBO, a richer family such as encoders.FullRankNormal)"
            )
        if shares["shifted"] >= _SHARE:
            findings.append(
                f"shifted in {shares['shifted']:.0%} of the dimensions (a larger encoder network, longer training, "
                "more data)"
            )
        error = (1 / self.ess.amin(-1) + 1 / len(self.guide_draws)).sqrt()
        missed = int((self._correlation_gap() > (_ERRORS * error).clamp(min=_CORRELATION))[use].sum())
        if missed:
            findings.append(
                f"without the correlations of {missed} of {int(use.sum())} data (encoders.FullRankNormal, "
                "LowRankNormal or NeuralSplineFlow)"
            )
        resolution = max(_SHIFT, _ERRORS * error[use].amax().item())
        verdict = (
            f"The guide is {'; '.join(findings)}."
            if findings
            else f"The guide is right as far as NUTS shows: these draws show shifts above {resolution:.2f} sd."
        )
        if doubtful:
            verdict += f" {doubtful} of {len(use)} data left out: their chains did not converge, raise warmup_steps."
        return verdict

    def table(self) -> list[str]:
        batch, total = self.mean.shape
        worst = self.distance.argmax(-1)
        lines = [
            f"The guide against NUTS: {self.num_chains} chains, {len(self.draws):,} draws a datum, {total} dimensions",
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
                f"{_NARROW}; wide: above {_WIDE}; shifted: by more than {_SHIFT} sd (each by more than {_ERRORS} "
                "standard errors); corr.: largest difference of a correlation; worst: the most distant dimension",
                TABLE_WIDTH,
            )
        )
        if not bool(self.converged.all()):
            lines.append(f"*: not to be trusted, R-hat above {_RHAT} or ESS below {_ESS}")
        return lines

    def numbers(self) -> dict[str, Any]:
        """Returns shares of the dimensions and the distance, both for data with converged chains, and each datum's."""
        use, worst, gap = self.converged, self.distance.argmax(-1), self._correlation_gap()
        return {
            "num_data": len(use),
            "num_converged": int(use.sum()),
            "num_draws": len(self.draws),
            "distance": self.discrepancy[use].mean(),
            **self._shares(),
            "data": [
                {
                    "converged": bool(use[i]),
                    "distance": self.discrepancy[i],
                    "correlation": gap[i],
                    "worst": self.names[d],
                    "difference": self.difference[i, d],
                    "ratio": self.ratio[i, d],
                    "rhat": self.rhat[i].amax(),
                    "ess": self.ess[i].amin(),
                    "divergences": self.divergences[i],
                }
                for i, d in enumerate(worst.tolist())
            ],
        }

    def draw(self) -> "Figure":
        """Draws, for each datum, the two latents whose correlation the guide misses most and its worst marginals.

        With ellipses at two standard deviations. Of more than 6 data, the 6 worst are drawn.
        """
        batch, total = self.mean.shape
        data = sorted(self.discrepancy.argsort(descending=True)[:_MAX_ROWS].tolist())
        marginals = min(_MAX_MARGINALS, total)
        columns = marginals + (total > 1)
        figure = new_figure(max(3 * columns, 4.5), 2.6 * len(data) + 0.6)
        rows = figure.subplots(len(data), columns, squeeze=False)
        for axes, i in zip(rows, data, strict=True):
            title = f"datum {i}" + ("" if self.converged[i] else " (chains disagree)")
            if total > 1:
                self._draw_pair(axes[0], i)
                axes[0].set_title(title, fontsize=9, fontweight="bold")
            worst = self.distance[i].argsort(descending=True)[:marginals].tolist()
            for ax, d in zip(axes[-marginals:], worst, strict=True):
                name = f"{title}, {self.names[d]}" if total == 1 else self.names[d]
                self._draw_marginal(ax, i, d, name)
        handles = [
            figure.axes[0].plot([], [], "o", color=_NUTS_COLOUR, alpha=0.6, label="NUTS")[0],
            figure.axes[0].plot([], [], "o", color=_GUIDE_COLOUR, alpha=0.6, label="guide")[0],
        ]
        left_out = f"the {len(data)} worst of {batch} data" if batch > len(data) else None
        figure.legend(handles=handles, loc="outside upper center", ncols=2, title=left_out, frameon=False)
        return figure

    def _draw_marginal(self, ax: "Axes", i: int, d: int, name: str) -> None:
        guide_draws, draws = self.guide_draws[:, i, d].cpu().numpy(), self.draws[:, i, d].cpu().numpy()
        bins = np.linspace(*_limits(guide_draws, draws), 31).tolist()
        ax.hist(draws, bins, density=True, color=_NUTS_COLOUR, alpha=0.4)
        ax.hist(guide_draws, bins, density=True, color=_GUIDE_COLOUR, histtype="step", linewidth=1.3)
        shift, ratio = self.difference[i, d].item(), self.ratio[i, d].item()
        ax.set_title(f"{name}: shift {shift:+.2f} sd, ratio {ratio:.2f}", fontsize=9)
        ax.set_yticks([])

    def _draw_pair(self, ax: "Axes", i: int) -> None:
        gap = self.correlation_difference[i].abs()
        a, b = sorted(divmod(int(gap.argmax()), len(gap)))
        if a == b:
            a, b = 0, 1
        guide_draws, draws = self.guide_draws[:, i].cpu().numpy(), self.draws[:, i].cpu().numpy()
        step = max(1, len(draws) // _MAX_DOTS)
        angle = np.linspace(0, 2 * math.pi, 100)
        circle = 2 * np.stack([np.cos(angle), np.sin(angle)])
        for t, colour in ((draws, _NUTS_COLOUR), (guide_draws, _GUIDE_COLOUR)):
            ax.scatter(t[::step, a], t[::step, b], s=5, color=colour, alpha=0.25, linewidths=0)
            # The ellipse of the covariance; not by Cholesky, which fails for a singular one.
            values, vectors = np.linalg.eigh(np.cov(t[:, a], t[:, b]))
            x, y = t[:, [a, b]].mean(0)[:, None] + vectors * np.sqrt(values.clip(0)) @ circle
            ax.plot(x, y, color=colour, linewidth=1.5)
        ax.set_xlim(*_limits(guide_draws[:, a], draws[:, a]))
        ax.set_ylim(*_limits(guide_draws[:, b], draws[:, b]))
        ax.set_xlabel(self.names[a], fontsize=9)
        ax.set_ylabel(self.names[b], fontsize=9)

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "PosteriorCheck":
        n, args = inputs.nuts_samples, (t[:3] for t in inputs.args)
        return posterior_check(inputs.model, inputs.guide, *args, num_samples=n, warmup_steps=n // 2)

    def _faults(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns where the guide is too narrow, too wide and shifted, each of shape ``(batch, total)``."""
        n, far = len(self.guide_draws), self.ratio.log().abs()
        certain = far > _ERRORS * (0.5 / self.ess + 0.5 / n).sqrt()
        shifted = self.difference.abs() > (_ERRORS * (1 / self.ess + self.ratio.square() / n).sqrt()).clamp(min=_SHIFT)
        return certain & (self.ratio < _NARROW), certain & (self.ratio > _WIDE), shifted

    def _shares(self) -> dict[str, float]:
        """Returns the shares of the dimensions with a fault, among data with converged chains."""
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
    r"""Compares the guide with the posterior, from long chains of the No-U-Turn sampler for each datum.

    .. math:: z_k \sim q(z \mid x) \quad\text{against}\quad z_t \sim p(z \mid x) \propto p(x, z)

    Chains start in turn at a draw of the guide and of the prior, so that they disagree, which R-hat detects, if the
    guide covers one mode of several. No draws prove that there is no other mode. Scales that only weight a training
    loss are left out of the posterior. Modules run in evaluation mode. It takes minutes rather than seconds: chains run
    one after the other, with a few hundred evaluations of the model per second.

    Args:
        model: a Pyro model, called with the same arguments as the guide; all its latents are continuous.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; other objects are passed on.
        num_data: number of data to check, the first ones.
        num_samples: draws per chain, at least 100. The guide makes as many as all chains of a datum.
        warmup_steps: steps of a chain before its draws, to adapt step size and mass matrix.
        num_chains: chains per datum, at least 2.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`PosteriorCheck`.

    Raises:
        ValueError: when an argument is out of range; a latent is discrete or its support has no bijection from
            :math:`\mathbb{R}^n` (a sphere); no start has a finite density; model and guide do not match each other or
            the data; or a latent is outside the data plate.

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
    args, kwargs, size = in_memory(1, "posterior_check", model, args, kwargs)
    num_data = min(num_data, size)
    bar = tqdm(
        desc="NUTS", total=num_data * num_chains * (warmup_steps + num_samples), unit="step", disable=not progress
    )
    guide_draws, draws, divergences = [], [], []
    with evaluation_mode(), bar:
        for i in range(num_data):
            row, named = take_rows(slice(i, i + 1), args, kwargs)
            structure = inspect_posterior(model, guide, slice(i, i + 1), args, kwargs)
            drawn = trace_guide(guide, structure, num_chains * num_samples, *row, **named)
            guide_draws.append(latents_of(drawn, structure))
            spaces = _unconstrained(
                trace_model(model, drawn, structure, num_chains * num_samples, *row, **named), structure
            )
            chains, diverged = [], 0
            for chain in range(num_chains):
                start = guide if chain % 2 == 0 else model
                values, count = _chain(model, start, structure, spaces, warmup_steps, num_samples, row, named, bar)
                chains.append(values)
                diverged += count
            values = {name: torch.cat([chain[name] for chain in chains]) for name in spaces}
            draws.append(latents_of(with_values(drawn, values), structure).values)
            divergences.append(diverged)
    q = torch.cat([latents.values for latents in guide_draws], dim=1).double()
    p = torch.cat(draws, dim=1).double()
    chains = p.unflatten(0, (num_chains, num_samples))
    mean, std, guide_mean, guide_std = p.mean(0), p.std(0), q.mean(0), q.std(0)
    return PosteriorCheck(
        names=tuple(names_of(guide_draws[0].columns)),
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


def _unconstrained(trace: poutine.Trace, structure: SiteStructure) -> dict[str, Transform]:
    """Returns, for each latent site of a model's trace, the bijection from real vectors to its support."""
    spaces = {}
    for name, site in sample_sites(trace).items():
        if name not in structure.latents:
            continue
        if name in structure.discrete:
            raise ValueError(
                f'The latent site "{name}" is discrete, but NUTS needs gradients. '
                "pyrovae.diagnostics.calibration and reliability take discrete latents."
            )
        try:
            spaces[name] = biject_to(site["fn"].support)
        except NotImplementedError:
            raise ValueError(
                f'The latent site "{name}" of a {type(site["fn"]).__name__} has a support without a bijection from '
                "R^n, which NUTS needs. pyrovae.diagnostics.calibration and reliability take any latents."
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
    """Runs one chain from a draw of a model or guide; returns its latents by site, and the number of divergences."""

    def potential(z: dict[str, Tensor]) -> Tensor:
        values = {name: spaces[name](t) for name, t in z.items()}
        volume = sum(spaces[name].log_abs_det_jacobian(t, values[name]).sum() for name, t in z.items())
        return -log_joint(model, with_values(first, values), structure, 1, *args, **kwargs).sum() - volume

    for _ in range(_MAX_STARTS):
        first = trace_guide(start, structure, 1, *args, **kwargs)
        z = {name: space.inv(first.nodes[name]["value"]) for name, space in spaces.items()}
        if math.isfinite(potential(z).item()):
            break
    else:
        raise ValueError(
            f"none of {_MAX_STARTS} draws of the {'model' if start is model else 'guide'} has a finite log p(x, z), "
            "so that NUTS cannot start. Train the model first."
        )
    kernel, kept = NUTS(potential_fn=potential), []
    kernel.initial_params = z
    # Not pyro.infer.MCMC: it changes the handlers of a logger, and runs its chains in other processes. Without
    # validation: a divergent trajectory may leave the support of a distribution, which is not the user's error.
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
    """Returns correlations over draws, shape ``(batch, total, total)``; 0 where undefined."""
    return torch.stack([torch.corrcoef(d.T).reshape(d.shape[1], -1) for d in draws.unbind(1)]).nan_to_num(0.0)


def _limits(*draws: np.ndarray) -> tuple[float, float]:
    """Returns limits of an axis around nearly all draws, without the outermost ones."""
    low = min(np.quantile(t, 0.001) for t in draws)
    high = max(np.quantile(t, 0.999) for t in draws)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
