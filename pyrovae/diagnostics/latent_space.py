"""The latents of data and the decoder, for exploration: means and draws of the posterior, and decoding of others."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyrovae.arguments import take_rows
from pyrovae.diagnostics.base import (
    Latents,
    at_latents,
    data_second,
    expected_data,
    inspect_part,
    latents_of,
    observed_site,
)
from pyrovae.inference.sites import sample_sites
from pyrovae.inference.weights import check_draws, trace_guide, trace_model

_ROWS = 2**13  # data times draws in one run of the guide or the model
_DRAWS = 10  # per datum, for the range of the aggregate posterior


class LatentSpace:
    """The latents of data, and the decoder.

    Args:
        model: a Pyro model.
        guide: a Pyro guide.
        size: number of data.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        site: name of the observed site to decode; the only one if None.

    Attributes:
        means: posterior means, shape ``(batch, total)``, each site's given the means before it; draws without a mean.
        draws: draws of the aggregate posterior, shape ``(num_draws * batch, total)``.
        columns: the columns of each site among the dimensions.
    """

    def __init__(self, model: Callable, guide: Callable, size: int, args: tuple, kwargs: dict, site: str | None):
        self.model, self.guide, self.args, self.kwargs, self.site = model, guide, args, kwargs, site
        self.structure = inspect_part(model, guide, slice(0, 2), args, kwargs)
        means, draws = [], []
        for start in range(0, size, _ROWS // _DRAWS):
            part_args, part_kwargs = take_rows(slice(start, start + _ROWS // _DRAWS), args, kwargs)
            self.structure = check_draws(self.structure, model, guide, *part_args, **part_kwargs)
            trace = trace_guide(guide, self.structure, _DRAWS, *part_args, **part_kwargs)
            latents, sites = latents_of(trace, self.structure), sample_sites(trace)
            for name in latents.columns:
                if sites[name]["fn"].support.is_discrete:
                    raise ValueError(
                        f'site "{name}" is discrete, so that there are no values between its values. '
                        "diagnostics.collapse shows how much information discrete latents hold."
                    )
            draws.append(latents.values.flatten(0, 1))
            with _AtMeans():
                trace = trace_guide(guide, self.structure, 1, *part_args, **part_kwargs)
            means.append(latents_of(trace, self.structure).values[0])
        self.columns = latents.columns
        self.means, self.draws = torch.cat(means), torch.cat(draws)
        if self.structure.data is not None:
            self.structure.data.check_in_order(len(self.means), size)

    def inside(self, moved: Tensor) -> bool:
        """Whether latents ``(num_draws, rows, total)`` at the first rows are in their support."""
        return self._outside(self._at(slice(0, moved.shape[1]), moved)) is None

    def decode(self, rows: slice | Tensor, moved: Tensor, following: bool = False) -> tuple[str, Tensor, Tensor]:
        """Decodes latents with the context of some rows of the data.

        Args:
            rows: rows of the data.
            moved: latents, ``(num_draws, rows, total)``.
            following: whether normal latents below others that moved keep their standardised distance to their mean.

        Returns:
            The name of the observed site, the data in these rows, and the means of p(x | z), ``(num_draws, rows, *x)``.
        """
        args, kwargs = take_rows(rows, self.args, self.kwargs)
        here = self._at(rows, self.means[rows].unsqueeze(0))
        before = trace_model(self.model, here, self.structure, 1, *args, **kwargs)
        site = observed_site(before, self.site)
        decoded = []
        for part in moved.split(max(1, _ROWS // moved.shape[1])):
            there = self._at(rows, part)
            name = self._outside(there)
            if name is not None:
                support = sample_sites(there)[name]["fn"].support
                raise ValueError(
                    f'latents of site "{name}" leave their support, {support}, when they move '
                    "along straight lines. On a sphere use interpolations(..., spherical=True), on a simplex "
                    "interpolations."
                )
            with _Following(before) if following else nullcontext():
                after = trace_model(self.model, there, self.structure, len(part), *args, **kwargs)
            decoded.append(expected_data(after, self.structure, site))
        data = data_second(sample_sites(before)[site]["value"], before, self.structure, site)[0]
        return site, data, torch.cat(decoded)

    def _at(self, rows: slice | Tensor, moved: Tensor) -> poutine.Trace:
        """Returns a trace of the guide on some rows, at other latents."""
        args, kwargs = take_rows(rows, self.args, self.kwargs)
        trace = trace_guide(self.guide, self.structure, 1, *args, **kwargs)
        return at_latents(trace, self.structure, Latents(moved, self.columns))

    def _outside(self, trace: poutine.Trace) -> str | None:
        """Returns the name of a site whose latents are not in its support, or None."""
        sites = sample_sites(trace)
        for name in self.columns:
            site = sites[name]
            if not bool(site["fn"].support.check(site["value"]).all()):
                return name
        return None


class _AtMeans(Messenger):
    """A Pyro handler that sets latents to their means, if these are known and in the support."""

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        try:
            mean = msg["fn"].mean
        except NotImplementedError:
            return
        if bool(torch.isfinite(mean).all()) and bool(msg["fn"].support.check(mean).all()):
            msg["value"], msg["done"] = mean, True


class _Following(Messenger):
    """A Pyro handler that keeps normal latents at the standardised distance to their means that a trace has."""

    def __init__(self, before: poutine.Trace):
        super().__init__()
        self.before = before

    def _pyro_sample(self, msg: dict) -> None:
        if msg["is_observed"] or isinstance(msg["fn"], _Subsample) or msg["name"] not in self.before.nodes:
            return
        now, then = _normal(msg["fn"]), _normal(self.before.nodes[msg["name"]]["fn"])
        if now is not None and then is not None:
            msg["value"] = now.loc + now.scale * (msg["value"] - then.loc) / then.scale


def _normal(fn: Any) -> torch.distributions.Normal | None:
    """Returns the normal distribution with independent dimensions inside `fn`, or None."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, torch.distributions.Normal) else None
