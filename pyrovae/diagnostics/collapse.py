"""Whether the latents are used: KL divergences, active units, mutual information, and the fit of the prior."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pyrovae.arguments import take_rows
from pyrovae.bounds.kl import conditioned_alike, kl_in_closed_form
from pyrovae.diagnostics.base import (
    TABLE_WIDTH,
    Diagnosis,
    Latents,
    ReportInputs,
    at_latents,
    check_at_least,
    in_memory,
    inspect_part,
    latents_of,
    names_of,
)
from pyrovae.estimators.proposals import check_no_auxiliary
from pyrovae.inference.messages import check_all_observed
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import is_masked, layers, sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import check_draws, log_prob_of, per_datum, trace_guide, trace_model
from pyrovae.plots.drawing import integer_ticks, new_figure
from pyrovae.progress import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Collapse", "collapse"]

_ROWS = 2**13  # data times draws in one run of the model
_PAIRS = 2**16  # pairs of a latent and a posterior scored at once
_ACTIVE = 0.01  # variance over the data of the posterior mean of an active unit, as in the paper
_NOTHING = 0.1  # nats; a dimension at that threshold has 0.005
_MISFIT = 1.0  # nats a datum that the ELBO would gain from a prior that fits
_MAX_NAMES = 24  # of dimensions in the picture


@dataclass(frozen=True)
class Collapse(Diagnosis):
    r"""How much information about x the latents hold, and how the prior fits the aggregate posterior.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))
        = \mathrm{I}(x; z) + \mathrm{KL}(q(z) \,\|\, p(z)), \qquad q(z) = \frac{1}{N} \sum_n q(z \mid x_n)

    `kl`, `mutual_information` and `aggregate_kl` are the three terms for these N data. The mutual information of N data
    is at most log N; that of the distribution they come from may be far larger. In expectation it is between
    `mutual_information` and `mutual_information_upper`, and the divergence between `aggregate_kl_lower` and
    `aggregate_kl`.

    Args:
        kl: divergence of each datum, of all latents, in nats, shape ``(batch,)``.
        kl_by_site: divergence of each site given the latents before it, in nats, shape ``(batch,)`` each.
        kl_by_dimension: mean over the data for each dimension, shape ``(total,)``; NaN where posterior or prior has no
            independent dimensions.
        variance: variance of the posterior means over the data, shape ``(total,)``; for a categorical latent the sum
            over its one-hot vector.
        variance_error: standard error of `variance`, from draws; 0 where the posterior mean is known.
        columns: the columns of each site among the `total` dimensions.
        kl_error: standard error of the mean of `kl` for these data, from draws; 0 in closed form.
        mutual_information: :math:`\mathrm{I}(x; z)` of these data, in nats.
        mutual_information_error: its standard error from draws.
        mutual_information_upper: the same, with each datum left out of the aggregate that scores its latents.
        aggregate_kl: :math:`\mathrm{KL}(q(z) \,\|\, p(z))` of these data, in nats.
        aggregate_kl_error: its standard error from draws.
        posterior: a draw from :math:`q(z \mid x)` for each datum, shape ``(batch, total)``.
        prior: a draw from the prior for each datum, of the same shape.
        num_draws: draws per datum.
    """

    question: ClassVar[str] = "Is it collapsing?"

    kl: Tensor
    kl_by_site: dict[str, Tensor]
    kl_by_dimension: Tensor
    variance: Tensor
    variance_error: Tensor
    columns: dict[str, slice]
    kl_error: float
    mutual_information: float
    mutual_information_error: float
    mutual_information_upper: float
    aggregate_kl: float
    aggregate_kl_error: float
    posterior: Tensor
    prior: Tensor
    num_draws: int

    @property
    def active(self) -> Tensor:
        """Whether the posterior mean's variance is above 0.01 by two standard errors, by dimension, ``(total,)``."""
        return self.variance - 2 * self.variance_error > _ACTIVE

    @property
    def active_units(self) -> int:
        """Number of active dimensions."""
        return int(self.active.sum())

    @property
    def ceiling(self) -> float:
        """The largest possible mutual information of N data, log N."""
        return math.log(len(self.kl))

    @property
    def aggregate_kl_lower(self) -> float:
        """The divergence of aggregate posterior and prior by the upper estimate of the mutual information."""
        return max(self.kl.double().mean().item() - self.mutual_information_upper, 0.0)

    @property
    def verdict(self) -> str:
        active, total = self.active_units, len(self.variance)
        used = f"{active} of {total} dimensions {'is' if active == 1 else 'are'} active"
        remedy = (
            "warm up with bounds.ELBO(beta=bounds.Linear(...)), keep nats with bounds.FreeBits, or weaken the decoder"
        )
        if self.mutual_information < _NOTHING:
            but = "and none" if active == 0 else f"though {active}"
            return (
                f"Collapsed: the latents hold {max(self.mutual_information, 0.0):.3f} nats about the data, {but} of "
                f"{total} dimensions {'is' if active < 2 else 'are'} active: {remedy}."
            )
        findings, shares = [], {name: kl.mean().item() for name, kl in self.kl_by_site.items()}
        empty = [name for name, share in shares.items() if share < _NOTHING]
        if empty and len(shares) > 1:
            listed = ", ".join(f'"{name}" ({shares[name]:.3f} nats)' for name in empty)
            findings.append(f"Site {listed} adds nothing: {remedy}, or leave it out")
        if active < total / 2:
            findings.append(
                f"Only {used}: a smaller latent_dim is enough, and if reconstructions are poor, warm up with "
                "bounds.ELBO(beta=bounds.Linear(...)) or keep nats with bounds.FreeBits"
            )
        if self.aggregate_kl_lower > _MISFIT + 2 * self.aggregate_kl_error:
            findings.append(
                f"A hole in the prior: it misses the aggregate posterior by at least {self.aggregate_kl_lower:.2f} "
                "nats a datum, which priors.VampPrior, priors.FlowPrior or priors.GaussianMixture may gain"
            )
        elif self.aggregate_kl > _MISFIT:
            findings.append(
                f"Whether the prior fits is unknown: from {len(self.kl):,} data, its divergence to the aggregate "
                f"posterior is between {self.aggregate_kl_lower:.2f} and {self.aggregate_kl:.2f} nats; give more data"
            )
        healthy = "Healthy: " + used
        if self.aggregate_kl <= _MISFIT:
            healthy += f", and the prior is within {max(self.aggregate_kl, 0.0):.2f} nats of the aggregate posterior"
        in_use = active >= total / 2 and not (empty and len(shares) > 1)
        return ". ".join(([healthy] if in_use and self.aggregate_kl_lower <= _MISFIT else []) + findings) + "."

    def numbers(self) -> dict[str, Any]:
        return {
            "num_data": len(self.kl),
            "num_draws": self.num_draws,
            "kl": self.kl.double().mean(),
            "kl_error": self.kl_error,
            "kl_by_site": {name: kl.double().mean() for name, kl in self.kl_by_site.items()},
            "kl_by_dimension": self.kl_by_dimension,
            "variance": self.variance,
            "active_units": self.active_units,
            "num_dimensions": len(self.variance),
            "mutual_information": self.mutual_information,
            "mutual_information_error": self.mutual_information_error,
            "mutual_information_upper": self.mutual_information_upper,
            "mutual_information_ceiling": self.ceiling,
            "aggregate_kl": self.aggregate_kl,
            "aggregate_kl_error": self.aggregate_kl_error,
            "aggregate_kl_lower": self.aggregate_kl_lower,
        }

    def draw(self) -> "Figure":
        """Draws the KL divergence of each dimension, and aggregate posterior and prior where the means vary most.

        Without divergences by dimension, the variances of the posterior means are drawn instead.
        """
        figure = new_figure(10, 4.5)
        left, right = figure.subplots(1, 2)
        self._draw_dimensions(left)
        self._draw_aggregate(right)
        return figure

    def _draw_dimensions(self, ax: "Axes") -> None:
        kl, variance, active = (t.cpu().numpy() for t in (self.kl_by_dimension, self.variance, self.active))
        by_kl = bool(np.isfinite(kl).all())
        height = kl if by_kl else np.clip(variance, 1e-6, None)
        order = np.argsort(-height, kind="stable")
        place = np.arange(len(order))
        for which, colour, label in ((active, "C0", "active"), (~active, "C7", "inactive")):
            chosen = which[order]
            if chosen.any():
                ax.bar(place[chosen], height[order][chosen], color=colour, label=f"{label}: {chosen.sum()}")
        if by_kl:
            ax.set_ylabel("KL divergence (nats a datum)")
        else:
            ax.set(ylabel="variance of the posterior mean over the data", yscale="log")
            ax.axhline(_ACTIVE, color="black", linewidth=0.8, linestyle="--", label=f"{_ACTIVE}")
        if len(order) <= _MAX_NAMES:
            names = names_of(self.columns)
            ax.set_xticks(place, [names[i] for i in order], rotation=90 if len(order) > 8 else 0)
        ax.set(xlabel="dimension, sorted", title=f"{active.sum()} of {len(active)} dimensions are active")
        ax.legend()

    def _draw_aggregate(self, ax: "Axes") -> None:
        names, posterior, prior = names_of(self.columns), self.posterior.cpu().numpy(), self.prior.cpu().numpy()
        top = np.argsort(-self.variance.cpu().numpy(), kind="stable")[:2]
        integers = all(np.array_equal(t, t.round()) for t in (posterior[:, top], prior[:, top]))
        if integers or len(top) < 2:
            i = top[0]
            both = np.concatenate([posterior[:, i], prior[:, i]])
            low, high = both.min(), both.max()
            bins = (np.arange(low - 0.5, high + 1) if integers else np.linspace(low, high, 41)).tolist()
            weights = [np.full(len(t), 1 / len(t)) for t in (prior, posterior)]
            ax.hist(prior[:, i], bins, weights=weights[0], color="C7", alpha=0.6, label="prior")
            ax.hist(posterior[:, i], bins, weights=weights[1], histtype="step", color="C0", linewidth=1.5, label="q(z)")
            ax.set(xlabel=names[i], ylabel="share of the draws")
            if integers:
                integer_ticks(ax.xaxis)
        else:
            for t, colour, label in ((prior, "C7", "prior"), (posterior, "C0", "q(z)")):
                ax.scatter(t[:, top[0]], t[:, top[1]], s=10, color=colour, alpha=0.5, linewidths=0, label=label)
            ax.set(xlabel=names[top[0]], ylabel=names[top[1]], aspect="equal")
        low, high = self.aggregate_kl_lower, self.aggregate_kl
        interval = f"{high:.2f} nats" if high - low < 0.01 else f"{low:.2f} to {high:.2f} nats"
        ax.set_title(f"KL(q(z) || p(z)): {interval}")
        ax.legend()

    @classmethod
    def for_report(cls, inputs: ReportInputs) -> "Collapse":
        return collapse(inputs.model, inputs.guide, *inputs.args)

    def table(self) -> list[str]:
        width = max(7, *(len(name) for name in self.columns))
        lines = [
            f"collapse: {len(self.kl):,} data, {self.num_draws} draws each; in nats",
            f"{'latent':{width}}  dimensions  active  KL a datum",
        ]
        for name, columns in self.columns.items():
            size, active = columns.stop - columns.start, int(self.active[columns].sum())
            lines.append(f"{name:{width}}{size:12}{active:8}{self.kl_by_site[name].mean():12.3f}")
        if len(self.columns) > 1:
            lines.append(f"{'all':{width}}{len(self.variance):12}{self.active_units:8}{self.kl.mean():12.3f}")
        shown = self.kl_by_dimension[self.kl_by_dimension.isfinite()].sort(descending=True).values
        if len(shown) > 0:
            listed = " ".join(f"{kl:.2f}" for kl in shown[:20])
            rest = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
            line = f"KL of each dimension, sorted: {listed}{rest}"
            lines.extend(textwrap.wrap(line, TABLE_WIDTH, subsequent_indent="  "))
        n = f"{len(self.kl):,}"
        lines.append(f"{'':29}{f'of these {n} data':>20}{'error':>8}{'of their distribution':>23}")
        for name, value, error, bound in (
            ("mean KL", self.kl.double().mean().item(), self.kl_error, ""),
            (
                "= mutual information I(x; z)",
                self.mutual_information,
                self.mutual_information_error,
                f"to {_near(min(self.mutual_information_upper, self.kl.double().mean().item())):.3f}",
            ),
            ("+ KL(q(z) || p(z))", self.aggregate_kl, self.aggregate_kl_error, f"from {self.aggregate_kl_lower:.3f}"),
        ):
            lines.append(f"{name:29}{_near(value):20.3f}{error:8.3f}{bound:>23}".rstrip())
        return [*lines, f"largest possible I(x; z) of {n} data, log N: {self.ceiling:.3f}"]


@torch.no_grad()
def collapse(
    model: Callable, guide: Callable, *args: Any, num_draws: int = 10, progress: bool = True, **kwargs: Any
) -> Collapse:
    r"""Measures the information that the latents hold about the data, and whether the prior fits them.

    .. math:: \mathrm{I}(x; z) = \frac{1}{N} \sum_n \mathrm{E}_{q(z \mid x_n)}
        \left[\log q(z \mid x_n) - \log q(z)\right], \qquad q(z) = \frac{1}{N} \sum_m q(z \mid x_m)

    A dimension is active if :math:`\mathrm{Var}_x\, \mathrm{E}_{q(z \mid x)}[z]` is above 0.01, a threshold for
    latents of unit scale; the variance that draws add to the mean is subtracted. KL divergences are in closed form
    where there is one, given the latents before. I(x; z) is for all latents of a datum together. With a prior that
    depends on a context, :math:`p(z)` is conditional on it. Every latent is scored by the posterior of every datum, so
    that the time grows with the square of the number of data; a few thousand are enough. Modules run in evaluation
    mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension; other objects are passed on.
        num_draws: draws of the latents per datum, at least 2.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Collapse`.

    Raises:
        ValueError: when `num_draws` is below 2, there are fewer than 2 data, a latent is masked, has a density only at
            its own draws or is outside the data plate, or model and guide do not match each other.

    References:
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519 (active units); ELBO Surgery: yet another way to carve up the variational
        evidence lower bound, M. D. Hoffman and M. J. Johnson, 2016,
        http://approximateinference.org/accepted/HoffmanJohnson2016.pdf; Isolating Sources of Disentanglement in
        Variational Autoencoders, R. T. Q. Chen, X. Li, R. Grosse and D. Duvenaud, 2018,
        https://arxiv.org/abs/1802.04942; On Variational Bounds of Mutual Information, B. Poole, S. Ozair,
        A. van den Oord, A. A. Alemi and G. Tucker, 2019, https://arxiv.org/abs/1905.06922 (both bounds).

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> result = collapse(vae.model, vae.guide, torch.randn(50, 3), progress=False)
    >>> result.kl.shape, result.kl_by_dimension.shape, result.active.shape
    (torch.Size([50]), torch.Size([2]), torch.Size([2]))
    """
    check_at_least("num_draws", num_draws, 2)
    args, kwargs, size = in_memory(2, "collapse", model, args, kwargs)
    with evaluation_mode():
        structure = inspect_part(model, guide, slice(0, 2), args, kwargs)
        if structure.problems:
            raise ValueError(
                f"KL divergences per datum are undefined: {'; '.join(structure.problems)}. What belongs to a datum "
                'must stand under pyro.plate("data", len(x)) in the model and in the guide, drawn from a '
                "density."
            )
        check_no_auxiliary(structure)
        drawn, step = [], max(1, _ROWS // num_draws)
        for start in range(0, size, step):
            part = take_rows(slice(start, start + step), args, kwargs)
            structure = check_draws(structure, model, guide, *part[0], **part[1])
            drawn.append(_draw(model, guide, structure, num_draws, *part[0], **part[1]))
        z, kl_by_site, each, prior = (torch.cat(t, dim=1) for t in zip(*(d.tensors for d in drawn), strict=True))
        if structure.data is not None:
            structure.data.check_in_order(z.shape[1], size)
        latents = Latents(z, drawn[0].columns)
        log_q = _score_all(guide, structure, latents, drawn[0].template, args, kwargs, progress)

    # In double precision: sums over many terms.
    kl_by_site = kl_by_site.double()
    kl = kl_by_site.sum(-1)
    posterior, mixture, others = log_q
    information, upper = posterior - mixture, posterior - others
    spread = [_variance(torch.cat([d.means[name] for d in drawn], dim=1).double()) for name in latents.columns]
    return Collapse(
        kl=kl.mean(0),
        kl_by_site={name: kl_by_site[..., i].mean(0) for i, name in enumerate(latents.columns)},
        kl_by_dimension=each.double().mean((0, 1)),
        variance=torch.cat([variance for variance, _ in spread]),
        variance_error=torch.cat([error for _, error in spread]),
        columns=latents.columns,
        kl_error=_error(kl),
        mutual_information=information.mean().item(),
        mutual_information_error=_error(information),
        mutual_information_upper=upper.mean().item(),
        aggregate_kl=(kl - information).mean().item(),
        aggregate_kl_error=_error(kl - information),
        posterior=z[0],
        prior=prior[0],
        num_draws=num_draws,
    )


class _Draws(NamedTuple):
    """Draws of the posteriors of some data, with their KL divergences.

    Args:
        tensors: the latents, ``(num_draws, batch, total)``; the terms of the KL divergence by site,
            ``(num_draws, batch, sites)``, and by dimension, ``(num_draws, batch, total)``; and a draw from the prior,
            ``(1, batch, total)``.
        means: for each site the posterior means given the latents before, or draws, of shape
            ``(num_draws, batch, dimensions, classes)``.
        columns: the columns of each site among the dimensions.
        template: a trace of the guide.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    means: dict[str, Tensor]
    columns: dict[str, slice]
    template: poutine.Trace


def _draw(
    model: Callable, guide: Callable, structure: SiteStructure, num_draws: int, *args: Any, **kwargs: Any
) -> _Draws:
    depth = structure.data_index
    trace = trace_guide(guide, structure, num_draws, *args, **kwargs)
    scored = trace_model(model, trace, structure, num_draws, *args, **kwargs)
    check_all_observed(scored)
    z, columns = latents_of(trace, structure)
    guide_sites, model_sites = sample_sites(trace), sample_sites(scored)
    alike = conditioned_alike(list(model_sites), list(columns))
    kl_by_site, kl_by_dimension, means = [], [], {}
    for name in columns:
        q, p = guide_sites[name], model_sites[name]
        if is_masked(q) or is_masked(p):
            raise ValueError(
                f'site "{name}" is masked, and the mutual information of latents that some data lack is undefined. '
                "Take data that have all latents, or draw the missing latents from the prior in the guide too."
            )
        kl, each = _divergence(q, p, name in alike)
        kl_by_site.append(kl)
        kl_by_dimension.append(
            torch.full_like(z[..., columns[name]], math.nan) if each is None else _rows_of(each, depth)
        )
        mean = _mean(q)
        if mean.dim() == len(q["fn"].batch_shape + q["fn"].event_shape):
            mean = mean.unsqueeze(-1)
        mean = mean.movedim(depth, 1)
        means[name] = mean.reshape(*mean.shape[:2], -1, mean.shape[-1])
    from_prior = latents_of(trace_guide(model, structure, 1, *args, **kwargs), structure)
    prior = torch.cat([from_prior.values[..., from_prior.columns[name]] for name in columns], dim=-1)
    return _Draws(
        (z, torch.stack(kl_by_site, dim=-1), torch.cat(kl_by_dimension, dim=-1), prior), means, columns, trace
    )


def _divergence(q: dict, p: dict, given_alike: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the KL divergence of a latent site, in closed form or as log q - log p at its draws.

    Per datum, ``(num_draws, batch)``; and by dimension, in the shape of the latents, if the dimensions are independent.
    """
    fns: list[Any] = [_dimensions(site["fn"]) for site in (q, p)]
    alone = all(fn is not None for fn in fns)
    if not alone:
        fns = [q["fn"], p["fn"]]
    kl = kl_in_closed_form(*fns) if given_alike else None
    if kl is None:
        kl = fns[0].log_prob(q["value"]) - fns[1].log_prob(q["value"])
    event_dim = len(q["fn"].event_shape) if alone else 0
    kl = kl.expand(q["fn"].batch_shape + (q["fn"].event_shape if alone else ()))
    summed = kl.flatten(kl.dim() - event_dim).sum(-1) if event_dim else kl
    return per_datum(q, summed), kl if alone else None


def _dimensions(fn: dist.TorchDistribution) -> dist.TorchDistribution | None:
    """Returns the distribution with its independent dimensions as batch dimensions; None if they are dependent."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return None if fn.event_shape or isinstance(fn, dist.MaskedDistribution) else fn


def _mean(site: dict) -> Tensor:
    """Returns the mean of a latent, or its draws if the mean is unknown; for categorical latents the probabilities."""
    each = _dimensions(site["fn"])
    if isinstance(each, torch.distributions.Categorical):
        return each.probs
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        return site["value"]
    return mean if bool(torch.isfinite(mean).all()) else site["value"]


def _rows_of(t: Tensor, depth: int) -> Tensor:
    """Reshapes ``(num_draws, *plates, batch, *event)`` to ``(num_draws, batch, total)``, as :func:`latents_of`."""
    t = t.movedim(depth, 1)
    return t.reshape(*t.shape[:2], -1)


def _score_all(
    guide: Callable,
    structure: SiteStructure,
    latents: Latents,
    template: poutine.Trace,
    args: tuple,
    kwargs: dict,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-densities of latents under their own posterior, the mean of all, and the mean of the others.

    Each has shape ``(num_draws, batch)``, in double precision.
    """
    num_draws, size = latents.values.shape[:2]
    z = latents.values.flatten(0, 1)
    of_datum = torch.arange(size, device=z.device).repeat(num_draws)
    own = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    others = torch.full_like(own, -math.inf)
    template = template.copy()
    for name in template.nodes.keys() - latents.columns.keys():
        template.remove_node(name)  # sites that depend on the data, which change below
    side = min(size, math.isqrt(_PAIRS))
    with (
        pyro.validation_enabled(False),
        tqdm(desc="I(x; z)", total=len(z) * size, unit="pair", unit_scale=True, disable=not progress) as bar,
    ):
        for start in range(0, size, side):
            part_args, part_kwargs = take_rows(slice(start, start + side), args, kwargs)
            data = torch.arange(start, min(start + side, size), device=z.device)
            for rows in torch.arange(len(z), device=z.device).split(max(1, _PAIRS // side)):
                # One row per latent, repeated in the columns of all data.
                block = Latents(z[rows].unsqueeze(1).expand(-1, len(data), -1), latents.columns)
                moved = at_latents(template, structure, block)
                trace = trace_model(guide, moved, structure, len(rows), *part_args, **part_kwargs)
                sites = sample_sites(trace)
                log_q = reduce(torch.add, [_log_q(sites[name]) for name in latents.columns]).double()
                same = of_datum[rows].unsqueeze(1) == data
                own[rows] += log_q.masked_fill(~same, 0.0).sum(1)
                others[rows] = torch.logaddexp(others[rows], log_q.masked_fill(same, -math.inf).logsumexp(1))
                bar.update(log_q.numel())
    mixture = torch.logaddexp(own, others) - math.log(size)
    rest = others - math.log(size - 1)
    return own.reshape(num_draws, size), mixture.reshape(num_draws, size), rest.reshape(num_draws, size)


def _log_q(site: dict) -> Tensor:
    try:
        return per_datum(site, log_prob_of(site))
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f'the latents of site "{site["name"]}" must be scored by the posteriors of all data, but '
            f"{type(layers(site['fn'])[-1]).__name__} cannot score them ({error}). Take a distribution that scores any "
            "value, such as a flow of zuko's."
        ) from error


def _variance(means: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the variance over the data of means ``(num_draws, batch, dimensions, classes)``, and its standard error.

    Means that differ between draws add variance to that of their average, which is subtracted.
    """
    num_draws, size = means.shape[:2]
    average, noise = means.mean(0), means.var(0) / num_draws
    squares = (average - average.mean(0)).square()
    variance = squares.sum(0) / (size - 1) - noise.mean(0)
    # For normal noise of variance v and a deviation d, the variance of the square is 4 d^2 v, and that of v and of its
    # estimate is 2 v^2 S / (S - 1). This has the same expectation, from estimates of both.
    error = 4 * squares * noise - noise.square() * (2 * num_draws - 4) / (num_draws + 1)
    return variance.sum(-1), (error.sum((0, -1)).clamp(min=0) / size**2).sqrt()


def _error(draws: Tensor) -> float:
    """Returns the standard error of the mean of ``(num_draws, batch)`` for these data."""
    num_draws, size = draws.shape
    return (draws.var(0).sum() / num_draws).sqrt().item() / size


def _near(value: float) -> float:
    """Returns a number rounded to three places, without minus zero."""
    return round(value, 3) + 0.0
