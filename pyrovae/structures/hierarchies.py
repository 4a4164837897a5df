"""VAEs with several levels of latents."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyrovae.distributions import center
from pyrovae.encoders import Encoder
from pyrovae.likelihoods import Likelihood
from pyrovae.parts import (
    call,
    check_context,
    check_roles,
    check_spaces,
    check_vectors,
    in_evaluation_mode,
    likelihood_at,
    sample_prior,
    width_of_context,
)
from pyrovae.priors import Prior
from pyrovae.vae import Registered


class _Hierarchy(Registered):
    """A generative model with any number of levels of latents; subclasses define what parts see, and the inference."""

    def __init__(
        self, prior: nn.Module, conditionals: Sequence[nn.Module], likelihood: nn.Module, encoders: Sequence[nn.Module]
    ):
        super().__init__()
        if not encoders:
            raise ValueError("encoders is empty. Give one for each level, starting at the data.")
        _check_count("conditionals", conditionals, len(encoders) - 1, len(encoders))
        lists = {"conditionals": conditionals, "encoders": encoders}
        indexed = {f"{name}[{i}]": part for name, parts in lists.items() for i, part in enumerate(parts)}
        check_roles(prior=prior, likelihood=likelihood, **indexed)
        for i, (p, q) in enumerate(zip([*conditionals, prior], encoders, strict=True)):
            name = f"conditionals[{i}]" if i < len(conditionals) else "prior"
            check_spaces(**{name: p, f"encoders[{i}]": q})
        self.prior, self.conditionals, self.likelihood = prior, nn.ModuleList(conditionals), likelihood
        self.encoders = nn.ModuleList(encoders)

    def model(self, x: Tensor, context: Tensor | None = None) -> None:
        """The generative process, from the top latent to the data, which are observed at site "x"."""
        self.register()
        self._check_context(context, x)
        with pyro.plate("data", len(x)):
            above = [pyro.sample(f"z{len(self.encoders)}", call(self.prior, context=context))]
            for level, conditional in reversed(list(enumerate(self.conditionals, start=1))):
                above.insert(0, pyro.sample(f"z{level}", call(conditional, self._seen(above), context=context)))
            pyro.sample("x", self.decode(self._seen(above), context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents, with one site a level."""
        self.register()
        self._check_context(context, x)
        with pyro.plate("data", len(x)):
            self._infer(x, context)

    @in_evaluation_mode
    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` for what the likelihood takes, of shape ``(*leading, likelihood.latent_dim)``:
        the latents of the first level; in a :class:`DenseHierarchicalVAE` those of all levels, side by side."""
        return likelihood_at(self.likelihood, z, context)

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Draws from p(x), with the noise of the likelihood.

        Args:
            num_samples: number of draws; with a context, number for each of its rows.
            context: shape ``(batch, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with a context.
        """
        return self.decode_from_prior(num_samples, context).sample()

    @torch.no_grad()
    @in_evaluation_mode
    def decode_from_prior(self, num_samples: int, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z)` at draws of all latents: as :meth:`sample`, before x is drawn."""
        check_vectors(context, self.prior, *self.conditionals, self.likelihood)
        above = [sample_prior(self.prior, num_samples, context)]
        for conditional in reversed(self.conditionals):
            above.insert(0, call(conditional, self._seen(above), context=context).sample())
        return self.decode(self._seen(above), context)

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid z)` at one draw of all latents given x, shaped like x."""
        return center(self.decode(self._infer(x, context), context))

    @abstractmethod
    def _seen(self, above: Sequence[Tensor]) -> Tensor:
        """Returns what the likelihood or a conditional takes, of the latents of all levels above it, nearest first."""

    @abstractmethod
    def _infer(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Samples all latents given x, each at its site; returns what the likelihood takes of them."""

    @abstractmethod
    def _inference_parts(self) -> list[nn.Module]:
        """Returns the parts of the guide that may take the context."""

    def _check_context(self, context: Tensor | None, x: Tensor) -> None:
        check_context(context, x, self.prior, *self.conditionals, self.likelihood, *self._inference_parts())


class _Markov(_Hierarchy):
    r"""A hierarchy in which every level is given the next one alone.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1})\; p(x \mid z_1)
    """

    def _seen(self, above: Sequence[Tensor]) -> Tensor:
        return above[0]

    def _generative_links(self) -> list[tuple[str, nn.Module, str, str]]:
        conditionals = enumerate(self.conditionals)
        return [
            ("likelihood", self.likelihood, "z1", "x"),
            *((f"conditionals[{i}]", part, f"z{i + 2}", f"z{i + 1}") for i, part in conditionals),
            ("prior", self.prior, "", f"z{len(self.encoders)}"),
        ]


class HierarchicalVAE(_Markov):
    r"""A VAE with any number of levels of latents, inferred from the bottom up.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1})\; p(x \mid z_1), \qquad
        q(z \mid x) = q(z_1 \mid x) \prod_{l=2}^{L} q(z_l \mid z_{l-1})

    The latents are at the sites "z1" (next to the data) to "zL" (the top). All lists start at the data. A conditional
    maps a vector to a distribution of vectors: ``encoders.DiagonalNormal(above, below)``, with a standard deviation
    that depends on the level above, or ``likelihoods.Normal(above, below)``, with one that does not.

    Args:
        prior: ``prior(context)`` returns :math:`p(z_L)`.
        conditionals: ``conditionals[l - 1](z, context)`` returns :math:`p(z_l \mid z_{l+1} = z)`; one for each level
            except the top.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z_1 = z)`.
        encoders: ``encoders[0](x, context)`` returns :math:`q(z_1 \mid x)`, ``encoders[l - 1](z, context)``
            :math:`q(z_l \mid z_{l-1} = z)`; one for each level.

    Raises:
        ValueError: when the numbers of parts, the shapes of their inputs and outputs, or the spaces of the latents do
            not fit; when a context is given that no part takes, or that does not have one row a datum.

    References:
        Stochastic Backpropagation and Approximate Inference in Deep Generative Models, D. J. Rezende, S. Mohamed and
        D. Wierstra, 2014, https://arxiv.org/abs/1401.4082.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = HierarchicalVAE(
    ...     prior=priors.StandardNormal(2),
    ...     conditionals=[encoders.DiagonalNormal(2, 5)],
    ...     likelihood=likelihoods.Bernoulli(5, 64),
    ...     encoders=[encoders.DiagonalNormal(64, 5), encoders.DiagonalNormal(5, 2)],
    ... )
    >>> vae.sample(3).shape
    torch.Size([3, 64])
    """

    def __init__(
        self, prior: nn.Module, conditionals: Sequence[nn.Module], likelihood: nn.Module, encoders: Sequence[nn.Module]
    ):
        super().__init__(prior, conditionals, likelihood, encoders)
        links = [(f"encoders[{i}]", part, f"z{i}" if i else "x", f"z{i + 1}") for i, part in enumerate(encoders)]
        _check_shapes(self._generative_links() + links)

    def _infer(self, x: Tensor, context: Tensor | None) -> Tensor:
        values = [x]
        for level, encoder in enumerate(self.encoders, start=1):
            values.append(pyro.sample(f"z{level}", call(encoder, values[-1], context=context)))
        return values[1]

    def _inference_parts(self) -> list[nn.Module]:
        return list(self.encoders)


class LadderVAE(_Markov):
    r"""A VAE with any number of levels of latents, inferred from the top down, in the order of the generative model.

    .. math:: d_0 = x, \quad d_l = \mathrm{network}_l(d_{l-1}), \qquad
        q(z \mid x) = \mathrm{encoder}_L(d_L) \prod_{l=1}^{L-1} q(z_l \mid z_{l+1}, x), \qquad
        q(z_l \mid z_{l+1}, x) \propto \mathrm{encoder}_l(d_l)\, p(z_l \mid z_{l+1})

    The model is that of :class:`HierarchicalVAE`. Below the top, the posterior is the normalised product of two
    diagonal normals, one from the data and one from the level above: their precisions add up.

    Args:
        prior: ``prior(context)`` returns :math:`p(z_L)`.
        conditionals: ``conditionals[l - 1](z, context)`` returns :math:`p(z_l \mid z_{l+1} = z)`, a diagonal normal;
            one for each level except the top.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z_1 = z)`.
        networks: ``networks[l - 1]`` is any module that maps :math:`d_{l-1}` to :math:`d_l`; one for each level. A
            network with a ``context_dim`` is called with the context too.
        encoders: ``encoders[l - 1](d, context)`` returns a distribution of :math:`z_l` given :math:`d_l = d`, below the
            top a diagonal normal; one for each level.

    Raises:
        ValueError: as :class:`HierarchicalVAE`.
        TypeError: when a factor of a product is not a diagonal normal.

    References:
        Ladder Variational Autoencoders, C. K. Sønderby, T. Raiko, L. Maaløe, S. K. Sønderby and O. Winther, 2016,
        https://arxiv.org/abs/1602.02282.

    >>> from pyrovae import encoders, likelihoods, nn, priors
    >>> vae = LadderVAE(
    ...     prior=priors.StandardNormal(2),
    ...     conditionals=[encoders.DiagonalNormal(2, 5)],
    ...     likelihood=likelihoods.Bernoulli(5, 64),
    ...     networks=[nn.MLP(64, 30), nn.MLP(30, 20)],
    ...     encoders=[encoders.DiagonalNormal(30, 5), encoders.DiagonalNormal(20, 2)],
    ... )
    >>> vae.reconstruct(torch.zeros(7, 64)).shape
    torch.Size([7, 64])
    """

    def __init__(
        self,
        prior: nn.Module,
        conditionals: Sequence[nn.Module],
        likelihood: nn.Module,
        networks: Sequence[nn.Module],
        encoders: Sequence[nn.Module],
    ):
        super().__init__(prior, conditionals, likelihood, encoders)
        _check_count("networks", networks, len(encoders), len(encoders))
        self.networks = nn.ModuleList(networks)
        links = [(f"networks[{i}]", part, f"d{i}" if i else "x", f"d{i + 1}") for i, part in enumerate(networks)]
        links += [(f"encoders[{i}]", part, f"d{i + 1}", f"z{i + 1}") for i, part in enumerate(encoders)]
        _check_shapes(self._generative_links() + links)

    def _infer(self, x: Tensor, context: Tensor | None) -> Tensor:
        d, bottom_up = x, []
        for network, encoder in zip(self.networks, self.encoders, strict=True):
            d = network(d, context) if context is not None and _network_takes_context(network) else network(d)
            bottom_up.append(call(encoder, d, context=context))
        z = pyro.sample(f"z{len(bottom_up)}", bottom_up[-1])
        for level, conditional in reversed(list(enumerate(self.conditionals, start=1))):
            top_down = call(conditional, z, context=context)
            z = pyro.sample(f"z{level}", _product(level, bottom_up[level - 1], top_down))
        return z

    def _inference_parts(self) -> list[nn.Module]:
        return [*self.encoders, *(network for network in self.networks if _network_takes_context(network))]


class DenseHierarchicalVAE(_Hierarchy):
    r"""A VAE with any number of levels of latents, in which every part sees all levels above it.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1}, \dots, z_L)\; p(x \mid z_1, \dots, z_L), \qquad
        q(z \mid x) = q(z_L \mid x) \prod_{l=1}^{L-1} q(z_l \mid x, z_{l+1}, \dots, z_L)

    The latents are at the sites "z1" (next to the data) to "zL" (the top). All lists start at the data. A part takes
    the levels that it sees side by side in one vector, the nearest level first: the likelihood and the conditionals as
    their input, the encoders below the top as their context. Two gated layers for each of two levels, joined by a
    third, as in the paper, are a special case of ``nn.GatedMLP`` with hidden layers of ``[600, 300]``, whose first
    layer may take each level to units of its own.

    Args:
        prior: ``prior(context)`` returns :math:`p(z_L)`.
        conditionals: ``conditionals[l - 1](z, context)`` returns :math:`p(z_l \mid z)` for
            :math:`z = (z_{l+1}, \dots, z_L)`; one for each level except the top.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)` for :math:`z = (z_1, \dots, z_L)`.
        encoders: ``encoders[L - 1](x, context)`` returns :math:`q(z_L \mid x)`, ``encoders[l - 1](x, z)``
            :math:`q(z_l \mid x, z)` for :math:`z = (z_{l+1}, \dots, z_L)`; one for each level. An encoder below the top
            is built with a ``context_dim`` of the number of dimensions above it; if it takes the context too, which
            is appended, with that number and the width of the context.

    Raises:
        ValueError: when the numbers of parts, the shapes of their inputs and outputs, or the spaces of the latents do
            not fit; when a context is given that no part takes, or that does not have one row a datum.

    References:
        VAE with a VampPrior, J. M. Tomczak and M. Welling, 2018, https://arxiv.org/abs/1705.07120 (of two levels).

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = DenseHierarchicalVAE(
    ...     prior=priors.StandardNormal(2),
    ...     conditionals=[encoders.DiagonalNormal(2, 5)],
    ...     likelihood=likelihoods.Bernoulli(5 + 2, 64),
    ...     encoders=[encoders.DiagonalNormal(64, 5, context_dim=2), encoders.DiagonalNormal(64, 2)],
    ... )
    >>> vae.sample(3).shape
    torch.Size([3, 64])
    """

    def __init__(
        self, prior: nn.Module, conditionals: Sequence[nn.Module], likelihood: nn.Module, encoders: Sequence[nn.Module]
    ):
        super().__init__(prior, conditionals, likelihood, encoders)
        top = len(encoders)
        links = [("likelihood", likelihood, _levels(1, top), "x"), ("prior", prior, "", f"z{top}")]
        links += [(f"conditionals[{i}]", part, _levels(i + 2, top), f"z{i + 1}") for i, part in enumerate(conditionals)]
        links += [(f"encoders[{i}]", part, "x", f"z{i + 1}") for i, part in enumerate(encoders)]
        _check_shapes(links)
        self._check_widths()

    @property
    def context_dim(self) -> int:
        """Width of the context that parts take beside the latents above them, 0 for none."""
        *others, top = self.encoders
        dims = [width_of_context(part) for part in (self.prior, *self.conditionals, self.likelihood, top)]
        for level, part in enumerate(others, start=1):
            dims.append(getattr(part, "context_dim", 0) - (self._width_from(level + 1) or 0))
        return max(0, *dims)

    def _check_widths(self) -> None:
        """Raises a ValueError where the input of a part is not as wide as the levels that it sees."""
        for first, part in enumerate([self.likelihood, *self.conditionals], start=1):
            width, stated = self._width_from(first), _ends(part)[0]
            if width is not None and stated is not None and stated != (width,):
                name = "likelihood" if first == 1 else f"conditionals[{first - 2}]"
                raise ValueError(
                    f"{name} is built for {stated}, but takes the latents {_levels(first, len(self.encoders))} side by "
                    f"side, which have {width} dimensions. Build it for {width}."
                )
        for i, encoder in enumerate(self.encoders[:-1]):
            width, stated = self._width_from(i + 2), getattr(encoder, "context_dim", None)
            if width is not None and stated is not None and stated < width:
                raise ValueError(
                    f"encoders[{i}] has context_dim={stated}, but takes the latents "
                    f"{_levels(i + 2, len(self.encoders))} as its context, which have {width} dimensions. Build it "
                    f"with context_dim={width}, or that and the width of the context."
                )

    def _width_from(self, first: int) -> int | None:
        """Returns the number of dimensions of the levels from `first` to the top, None if one of them is unknown."""
        levels: list[Any] = list(self.encoders[first - 1 :])  # a type checker takes attributes for modules
        return sum(part.latent_dim for part in levels) if all(hasattr(part, "latent_dim") for part in levels) else None

    def _seen(self, above: Sequence[Tensor]) -> Tensor:
        return _side_by_side(above)

    def _infer(self, x: Tensor, context: Tensor | None) -> Tensor:
        *others, top = self.encoders
        above = [pyro.sample(f"z{len(self.encoders)}", call(top, x, context=context))]
        for level, encoder in reversed(list(enumerate(others, start=1))):
            is_seen = context is not None and self._takes_context_too(level)
            seen = _side_by_side([*above, cast(Tensor, context)] if is_seen else above)
            above.insert(0, pyro.sample(f"z{level}", call(encoder, x, context=seen)))
        return self._seen(above)

    def _inference_parts(self) -> list[nn.Module]:
        *others, top = self.encoders
        return [*(part for level, part in enumerate(others, start=1) if self._takes_context_too(level)), top]

    def _takes_context_too(self, level: int) -> bool:
        """Returns whether the encoder of a level below the top takes the context besides the levels above."""
        width, stated = self._width_from(level + 1), getattr(self.encoders[level - 1], "context_dim", None)
        return width is None or stated is None or stated > width


def _side_by_side(vectors: Sequence[Tensor]) -> Tensor:
    leading = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
    return torch.cat([v.expand(*leading, -1) for v in vectors], dim=-1)


def _levels(first: int, last: int) -> str:
    return ", ".join(f"z{level}" for level in range(first, last + 1))


def _product(level: int, q: dist.TorchDistribution, p: dist.TorchDistribution) -> dist.TorchDistribution:
    """Returns the normalised product of the densities of two diagonal normals."""
    for name, factor in ((f"encoders[{level - 1}]", q), (f"conditionals[{level - 1}]", p)):
        base = factor.base_dist if isinstance(factor, torch.distributions.Independent) else factor
        if not isinstance(base, torch.distributions.Normal):
            raise TypeError(
                f"Level {level} of a LadderVAE multiplies diagonal normals, but {name} returned {type(base).__name__}. "
                "Use encoders.DiagonalNormal, or likelihoods.Normal as a conditional; or use a HierarchicalVAE."
            )
    # Ratios of variances, because precisions may overflow.
    q_variance, p_variance = q.variance, p.variance
    weight = p_variance / (q_variance + p_variance)  # of q
    loc = p.mean + weight * (q.mean - p.mean)
    return dist.Normal(loc, (weight * q_variance).sqrt()).to_event(1)


def _network_takes_context(network: nn.Module) -> bool:
    return getattr(network, "context_dim", 0) > 0  # unlike a part, a module without `context_dim` takes no context


def _check_count(name: str, parts: Sequence[nn.Module], count: int, levels: int) -> None:
    if len(parts) != count:
        raise ValueError(
            f"{levels} encoders make {levels} levels, which need {count} {name}, got {len(parts)}. Give one encoder "
            "for each level and one conditional for each level except the top, starting at the data."
        )


def _check_shapes(links: list[tuple[str, nn.Module, str, str]]) -> None:
    """Raises a ValueError where parts disagree on the shape of a variable.

    Args:
        links: for each part its name, the part, and the names of its input and output variables.
    """
    by_variable: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, part, source, target in links:
        for variable, shape in zip((source, target), _ends(part), strict=True):
            if shape is not None:
                by_variable.setdefault(variable, {})[name] = shape
    for variable, shapes in by_variable.items():
        if len(set(shapes.values())) > 1:
            listing = ", ".join(f"{name} is built for {shape}" for name, shape in shapes.items())
            raise ValueError(f"The parts must agree on the shape of {variable}: {listing}.")


def _ends(part: nn.Module) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Returns the shapes of the input and the output of a part, None where they are unknown."""
    if isinstance(part, Encoder):
        return part.x_shape, (part.latent_dim,)
    if isinstance(part, Likelihood):
        return (part.latent_dim,), part.x_shape
    if isinstance(part, Prior):
        return None, (part.latent_dim,)
    return getattr(part, "in_shape", None), getattr(part, "out_shape", None)
