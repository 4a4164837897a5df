"""Whether the latents are used: KL divergences, active units, mutual information, and a prior that fits or not."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyrovae.arguments import cuda_devices, take_rows, tensors_of
from pyrovae.bounds.kl import conditioned_alike, kl_in_closed_form
from pyrovae.diagnostics.base import Diagnosis, Latents, at_latents, check_at_least, in_memory, inspect_part, latents_of
from pyrovae.estimators.proposals import check_no_auxiliary
from pyrovae.inference.messages import check_all_observed
from pyrovae.inference.running import evaluation_mode
from pyrovae.inference.sites import is_masked, layers, sample_sites
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import check_draws, log_prob_of, per_datum, trace_guide, trace_model
from pyrovae.training import History

__all__ = ["Collapse", "CollapseMonitor", "collapse"]

_ROWS = 2**13  # data times draws that the model is run on at once
_PAIRS = 2**16  # latents times data whose posteriors score them at once
_ACTIVE = 0.01  # variance over the data of the posterior mean of an active unit, as in the paper
_NOTHING = 0.1  # nats; a dimension at that threshold is worth 0.005
_MISFIT = 1.0  # nats a datum that the ELBO would gain from a prior that fits


@dataclass(frozen=True)
class Collapse(Diagnosis):
    r"""How much of x the latents hold, and how the prior meets the aggregate posterior.

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))
        = \mathrm{I}(x; z) + \mathrm{KL}(q(z) \,\|\, p(z)), \qquad q(z) = \frac{1}{N} \sum_n q(z \mid x_n)

    `kl`, `mutual_information` and `aggregate_kl` are the three terms for these N data. Their mutual information is at
    most log N, though, and that of the distribution they come from may be far larger: in expectation it lies between
    `mutual_information` and `mutual_information_upper`, and the divergence between `aggregate_kl_lower` and
    `aggregate_kl`.

    Args:
        kl: divergence of each datum, of all latents, in nats, shape ``(batch,)``.
        kl_by_site: that of each site, its share of the divergence given the latents before it.
        kl_by_dimension: mean over the data for each dimension, shape ``(total,)``; NaN where posterior or prior has no
            independent dimensions.
        variance: of the posterior means over the data, shape ``(total,)``; of a class that of its one-hot vector,
            summed.
        variance_error: standard error of `variance`, from draws; 0 where the posterior states its mean.
        columns: which of the `total` dimensions belong to which site.
        kl_error: standard error of the mean of `kl` for these data, from draws; 0 in closed form.
        mutual_information: :math:`\mathrm{I}(x; z)` of these data, in nats.
        mutual_information_error: its standard error from draws.
        mutual_information_upper: the same with each datum left out of the aggregate that scores its own latents.
        aggregate_kl: :math:`\mathrm{KL}(q(z) \,\|\, p(z))` of these data, in nats.
        aggregate_kl_error: its standard error from draws.
        posterior: a draw from :math:`q(z \mid x)` for each datum, shape ``(batch, total)``.
        prior: a draw from the prior for each datum, of the same shape.
        num_draws: draws a datum.
    """

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
        """Which dimensions have posterior means with a variance above 0.01, by two standard errors, ``(total,)``."""
        return self.variance - 2 * self.variance_error > _ACTIVE

    @property
    def active_units(self) -> int:
        """How many dimensions are active."""
        return int(self.active.sum())

    @property
    def ceiling(self) -> float:
        """The most that the mutual information of so many data can be, log N."""
        return math.log(len(self.kl))

    @property
    def aggregate_kl_lower(self) -> float:
        """What the divergence of aggregate posterior and prior is with the upper estimate of the mutual information."""
        return max(self.kl.double().mean().item() - self.mutual_information_upper, 0.0)

    @property
    def verdict(self) -> str:
        active, total = self.active_units, len(self.variance)
        used = f"{active} of {total} dimensions {'is' if active == 1 else 'are'} active"
        mend = (
            "warm up with bounds.ELBO(beta=bounds.Linear(...)), keep nats with bounds.FreeBits, or weaken the decoder"
        )
        if self.mutual_information < _NOTHING:
            but = "and none" if active == 0 else f"though {active}"
            return (
                f"Collapsed: the latents tell {max(self.mutual_information, 0.0):.3f} nats of the data, {but} of "
                f"{total} dimensions {'is' if active < 2 else 'are'} active: {mend}."
            )
        found, shares = [], {name: kl.mean().item() for name, kl in self.kl_by_site.items()}
        empty = [name for name, share in shares.items() if share < _NOTHING]
        if empty and len(shares) > 1:
            listed = ", ".join(f'"{name}" ({shares[name]:.3f} nats)' for name in empty)
            found.append(f"Site {listed} adds nothing: {mend}, or leave it out")
        if active < total / 2:
            found.append(
                f"Only {used}: a smaller latent_dim would do, and if reconstructions are poor, warm up with "
                "bounds.ELBO(beta=bounds.Linear(...)) or keep nats with bounds.FreeBits"
            )
        if self.aggregate_kl_lower > _MISFIT + 2 * self.aggregate_kl_error:
            found.append(
                f"A hole in the prior: it misses the aggregate posterior by at least {self.aggregate_kl_lower:.2f} "
                "nats a datum, which priors.VampPrior, priors.FlowPrior or priors.GaussianMixture may gain"
            )
        elif self.aggregate_kl > _MISFIT:
            found.append(
                f"Whether the prior fits is open: from {len(self.kl):,} data, its divergence to the aggregate "
                f"posterior is between {self.aggregate_kl_lower:.2f} and {self.aggregate_kl:.2f} nats; give more data"
            )
        healthy = "Healthy: " + used
        if self.aggregate_kl <= _MISFIT:
            healthy += f", and the prior is within {max(self.aggregate_kl, 0.0):.2f} nats of the aggregate posterior"
        in_use = active >= total / 2 and not (empty and len(shares) > 1)
        return ". ".join(([healthy] if in_use and self.aggregate_kl_lower <= _MISFIT else []) + found) + "."

    def summary(self) -> dict[str, Any]:
        return {
            "num_data": len(self.kl),
            "num_draws": self.num_draws,
            "kl": _finite(self.kl.double().mean().item()),
            "kl_error": _finite(self.kl_error),
            "kl_by_site": {name: _finite(kl.double().mean().item()) for name, kl in self.kl_by_site.items()},
            "kl_by_dimension": [_finite(kl) for kl in self.kl_by_dimension.tolist()],
            "variance": [_finite(v) for v in self.variance.tolist()],
            "active_units": self.active_units,
            "num_dimensions": len(self.variance),
            "mutual_information": _finite(self.mutual_information),
            "mutual_information_error": _finite(self.mutual_information_error),
            "mutual_information_upper": _finite(self.mutual_information_upper),
            "mutual_information_ceiling": self.ceiling,
            "aggregate_kl": _finite(self.aggregate_kl),
            "aggregate_kl_error": _finite(self.aggregate_kl_error),
            "aggregate_kl_lower": _finite(self.aggregate_kl_lower),
            "verdict": self.verdict,
        }

    def plot(self, path: str | Path | None = None) -> Any:
        from pyrovae.plots.collapse import collapse

        return collapse(self, path)

    def __str__(self) -> str:
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
            lines.extend(textwrap.wrap(f"KL of each dimension, sorted: {listed}{rest}", 80, subsequent_indent="  "))
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
        lines.append(f"the most that I(x; z) of {n} data can be, log N: {self.ceiling:.3f}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 80)])


@torch.no_grad()
def collapse(
    model: Callable, guide: Callable, *args: Any, num_draws: int = 10, progress: bool = True, **kwargs: Any
) -> Collapse:
    r"""Measures how much the latents hold of the data, by dimension and as a whole, and whether the prior fits them.

    .. math:: \mathrm{I}(x; z) = \frac{1}{N} \sum_n \mathrm{E}_{q(z \mid x_n)}
        \left[\log q(z \mid x_n) - \log q(z)\right], \qquad q(z) = \frac{1}{N} \sum_m q(z \mid x_m)

    A dimension is active if :math:`\mathrm{Var}_x\, \mathrm{E}_{q(z \mid x)}[z]` is above 0.01, a threshold for
    latents of unit scale; variances that draws add to their mean are taken off. KL divergences are in closed form where
    there is one, given the latents before. All latents of a datum are taken together in I(x; z). With a prior that
    depends on a context, :math:`\log p(z)` is given it. Every latent is scored by the posterior of every datum, so time
    grows with the square of the data: some thousand will do. Modules run in evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide with the model's latent sites.
        *args: tensors with the data along their first dimension, or anything else, which is passed on as it is.
        num_draws: draws of the latents per datum, at least 2.
        progress: whether to show a progress bar.
        **kwargs: as `args`.

    Returns:
        A :class:`Collapse`.

    Raises:
        ValueError: when `num_draws` is below 2, there are fewer than 2 data, a latent is masked, cannot be scored at
            other values than its draws or stands outside the data plate, or model and guide do not fit each other.

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
    >>> found = collapse(vae.model, vae.guide, torch.randn(50, 3), progress=False)
    >>> found.kl.shape, found.kl_by_dimension.shape, found.active.shape
    (torch.Size([50]), torch.Size([2]), torch.Size([2]))
    """
    check_at_least("num_draws", num_draws, 2)
    args, kwargs, size = in_memory(2, "collapse", args, kwargs)
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
        structure.data.check_in_order(z.shape[1], size)
        latents = Latents(z, drawn[0].columns)
        log_q = _score_all(guide, structure, latents, drawn[0].template, args, kwargs, progress)

    # Sums over many terms in double precision.
    kl_by_site = kl_by_site.double()
    kl = kl_by_site.sum(-1)
    own, mixture, others = log_q
    information, upper = own - mixture, own - others
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


class CollapseMonitor:
    """A callback of :func:`pyrovae.fit` that looks at every so many epochs whether the latents are used.

    It adds "kl", "active_units" and "mutual_information" of the data that it is given to the history's last record, as
    :func:`collapse` finds them, so that they are written and kept in checkpoints with it. Each time the noise
    is the same, and the random state of training is put back: a run ends with the same weights, to the bit, with it or
    without. Some hundred data take about a step's time.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        *args: what both are called with, on the device of their parameters: validation data, for example.
        every: epochs from one look to the next, at least 1.
        num_draws: draws of the latents per datum, at least 2.
        **kwargs: as `args`.

    Raises:
        ValueError: when `every` is below 1 or `num_draws` below 2, or there are fewer than 2 data.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> x = torch.randn(50, 3)
    >>> monitor = CollapseMonitor(vae.model, vae.guide, x, every=2)
    >>> history = pyrovae.fit(vae.model, vae.guide, x, batch_size=50, epochs=4, callbacks=[monitor], progress=False)
    >>> [record["epoch"] for record in monitor.records]
    [2, 4]
    """

    def __init__(self, model: Callable, guide: Callable, *args: Any, every: int = 1, num_draws: int = 2, **kwargs: Any):
        check_at_least("every", every, 1)
        check_at_least("num_draws", num_draws, 2)
        self.args, self.kwargs, _ = in_memory(2, "CollapseMonitor", args, kwargs)
        self.model, self.guide = model, guide
        self.every, self.num_draws = every, num_draws
        self.records: list[dict[str, Any]] = []  # "epoch" and the numbers of each look, those before a resume included

    def __call__(self, history: History) -> None:
        last = history.records[-1]
        if last["epoch"] % self.every == 0:
            devices = cuda_devices(tensors_of(self.args, self.kwargs))
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                found = collapse(
                    self.model, self.guide, *self.args, num_draws=self.num_draws, progress=False, **self.kwargs
                )
            last["kl"] = found.kl.mean().item()
            last["active_units"] = found.active_units
            last["mutual_information"] = found.mutual_information
        names = ("epoch", "kl", "active_units", "mutual_information")
        self.records = [{k: r[k] for k in names} for r in history.records if "mutual_information" in r]

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the records by epoch; returns the matplotlib figure, and writes it if a path is given."""
        from pyrovae.plots.collapse import collapse_history

        return collapse_history(self.records, path)


class _Draws(NamedTuple):
    """What the draws of some data say.

    Args:
        tensors: the latents, ``(num_draws, batch, total)``; the terms of the KL divergence by site and by dimension, of
            the same shape but for the last dimension; and a draw from the prior, ``(1, batch, total)``.
        means: for each site the means that the posterior has given the latents before, or draws, of shape
            ``(num_draws, batch, dimensions, classes)``.
        columns: which dimensions belong to which site.
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
    alike = conditioned_alike(list(sample_sites(scored)), list(columns))
    kl_by_site, kl_by_dimension, means = [], [], {}
    for name in columns:
        q, p = trace.nodes[name], scored.nodes[name]
        if is_masked(q) or is_masked(p):
            raise ValueError(
                f'site "{name}" is masked, and the mutual information of latents that some data lack is undefined. '
                "Look at data that have all latents, or draw the latents of the others from the prior in the guide too."
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
    fresh = latents_of(trace_guide(model, structure, 1, *args, **kwargs), structure)
    prior = torch.cat([fresh.values[..., fresh.columns[name]] for name in columns], dim=-1)
    return _Draws(
        (z, torch.stack(kl_by_site, dim=-1), torch.cat(kl_by_dimension, dim=-1), prior), means, columns, trace
    )


def _divergence(q: dict, p: dict, given_alike: bool) -> tuple[Tensor, Tensor | None]:
    """Returns log q - log p of a latent site, or their mean over it, per datum, ``(num_draws, batch)``.

    And in the shape of the latents, by dimension, where those are independent.
    """
    each = [_dimensions(site["fn"]) for site in (q, p)]
    alone = all(fn is not None for fn in each)
    fns = each if alone else [q["fn"], p["fn"]]
    kl = kl_in_closed_form(*fns) if given_alike else None
    if kl is None:
        kl = fns[0].log_prob(q["value"]) - fns[1].log_prob(q["value"])
    event_dim = len(q["fn"].event_shape) if alone else 0
    kl = kl.expand(q["fn"].batch_shape + (q["fn"].event_shape if alone else ()))
    summed = kl.flatten(kl.dim() - event_dim).sum(-1) if event_dim else kl
    return per_datum(q, summed), kl if alone else None


def _dimensions(fn: dist.TorchDistribution) -> dist.TorchDistribution | None:
    """Returns the distribution of independent dimensions one by one, as elements of its batch; None without."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return None if fn.event_shape or isinstance(fn, dist.MaskedDistribution) else fn


def _mean(site: dict) -> Tensor:
    """Returns the mean of a latent, or its draws where the mean is unknown; of classes that of one-hot vectors."""
    each = _dimensions(site["fn"])
    if isinstance(each, torch.distributions.Categorical):
        return each.probs
    try:
        mean = site["fn"].mean
    except NotImplementedError:
        return site["value"]
    return mean if bool(torch.isfinite(mean).all()) else site["value"]


def _rows_of(t: Tensor, depth: int) -> Tensor:
    """Lays ``(num_draws, *plates, batch, *event)`` out as :func:`latents_of` does, ``(num_draws, batch, total)``."""
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
    """Returns log-densities of latents by their own posterior, by the mean of all, and by the mean of the others.

    Each of shape ``(num_draws, batch)``, in double precision.
    """
    num_draws, size = latents.values.shape[:2]
    z = latents.values.flatten(0, 1)
    of_datum = torch.arange(size, device=z.device).repeat(num_draws)
    own = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    others = torch.full_like(own, -math.inf)
    template = template.copy()
    for name in template.nodes.keys() - latents.columns.keys():
        template.remove_node(name)  # the data that the plate held, which are others now
    side = min(size, math.isqrt(_PAIRS))
    with (
        pyro.validation_enabled(False),
        tqdm(desc="I(x; z)", total=len(z) * size, unit="pair", unit_scale=True, disable=not progress) as bar,
    ):
        for start in range(0, size, side):
            part_args, part_kwargs = take_rows(slice(start, start + side), args, kwargs)
            data = torch.arange(start, min(start + side, size), device=z.device)
            for rows in torch.arange(len(z), device=z.device).split(max(1, _PAIRS // side)):
                # Each latent in a row of its own, the same in the columns of all data.
                block = Latents(z[rows].unsqueeze(1).expand(-1, len(data), -1), latents.columns)
                moved = at_latents(template, structure, block)
                trace = trace_model(guide, moved, structure, len(rows), *part_args, **part_kwargs)
                log_q = sum(_log_q(trace.nodes[name]) for name in latents.columns).double()
                same = of_datum[rows].unsqueeze(1) == data
                own[rows] += log_q.masked_fill(~same, 0.0).sum(1)
                others[rows] = torch.logaddexp(others[rows], log_q.masked_fill(same, -math.inf).logsumexp(1))
                bar.update(log_q.numel())
    mixture = torch.logaddexp(own, others) - math.log(size)
    return tuple(t.reshape(num_draws, size) for t in (own, mixture, others - math.log(size - 1)))


def _log_q(site: dict) -> Tensor:
    try:
        return per_datum(site, log_prob_of(site))
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f'the latents of site "{site["name"]}" must be scored by the posteriors of all data, which '
            f"{type(layers(site['fn'])[-1]).__name__} cannot do ({error}). Take a distribution that scores any value, "
            "such as a flow of zuko's."
        ) from error


def _variance(means: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the variance over the data of means ``(num_draws, batch, dimensions, classes)``, and its standard error.

    Means that differ from draw to draw add a variance of their own to that of their average, which is taken off.
    """
    num_draws, size = means.shape[:2]
    average, noise = means.mean(0), means.var(0) / num_draws
    squares = (average - average.mean(0)).square()
    variance = squares.sum(0) / (size - 1) - noise.mean(0)
    # For normal noise of variance v and a deviation d, 4 d^2 v of the square and 2 v^2 S / (S - 1) of it and of the
    # noise that is taken off. Of estimates of both, this has that mean.
    error = 4 * squares * noise - noise.square() * (2 * num_draws - 4) / (num_draws + 1)
    return variance.sum(-1), (error.sum((0, -1)).clamp(min=0) / size**2).sqrt()


def _error(draws: Tensor) -> float:
    """Returns the standard error of the mean of ``(num_draws, batch)`` for these data."""
    num_draws, size = draws.shape
    return (draws.var(0).sum() / num_draws).sqrt().item() / size


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _near(value: float) -> float:
    """Returns a number as it is printed to three places, without minus zero."""
    return round(value, 3) + 0.0
