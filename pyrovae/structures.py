r"""Models beyond one latent and complete data: hierarchies, missing values, labels for some of the data.

Each gives ``.model`` and ``.guide``, which go wherever those of a :class:`pyrovae.VAE` do.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from pyrovae.arguments import row_name
from pyrovae.distributions import center, mask_elements
from pyrovae.encoders import Encoder
from pyrovae.inference.imputation import Imputation, impute
from pyrovae.likelihoods import Likelihood
from pyrovae.nn import MLP, Network, apply, build
from pyrovae.priors import Prior
from pyrovae.vae import (
    OneLatent,
    Registered,
    call,
    check_context,
    check_equal,
    check_length,
    check_roles,
    check_spaces,
    check_vectors,
    in_evaluation_mode,
    likelihood_at,
    sample_prior,
    takes_context,
)

__all__ = ["ClassifierELBO", "HierarchicalVAE", "LadderVAE", "MissingDataVAE", "SemiSupervisedVAE"]


class _Hierarchy(Registered, ABC):
    r"""A generative model with any number of levels of latents; how they are inferred is left open.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1})\; p(x \mid z_1)
    """

    def __init__(
        self, prior: nn.Module, conditionals: Sequence[nn.Module], likelihood: nn.Module, encoders: Sequence[nn.Module]
    ):
        super().__init__()
        if not encoders:
            raise ValueError("encoders is empty. Give one a level, the one nearest to the data first.")
        _check_count("conditionals", conditionals, len(encoders) - 1, len(encoders))
        several = {"conditionals": conditionals, "encoders": encoders}
        numbered = {f"{name}[{i}]": part for name, parts in several.items() for i, part in enumerate(parts)}
        check_roles(prior=prior, likelihood=likelihood, **numbered)
        for i, (p, q) in enumerate(zip([*conditionals, prior], encoders, strict=True)):
            name = f"conditionals[{i}]" if i < len(conditionals) else "prior"
            check_spaces(**{name: p, f"encoders[{i}]": q})
        self.prior, self.conditionals, self.likelihood = prior, nn.ModuleList(conditionals), likelihood
        self.encoders = nn.ModuleList(encoders)

    def model(self, x: Tensor, context: Tensor | None = None) -> None:
        """The generative process, from the top latent down to the data observed at site "x"."""
        self.register()
        self._check_context(context, x)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.encoders)}", call(self.prior, context=context))
            for level, conditional in reversed(list(enumerate(self.conditionals, start=1))):
                z = pyro.sample(f"z{level}", call(conditional, z, context=context))
            pyro.sample("x", self.decode(z, context), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents, one site a level."""
        self.register()
        self._check_context(context, x)
        with pyro.plate("data", len(x)):
            self._infer(x, context)

    @in_evaluation_mode
    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid z_1)` for the latents next to the data, of shape ``(*leading, latent_dim)``."""
        return likelihood_at(self.likelihood, z, context)

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, context: Tensor | None = None) -> Tensor:
        """Draws from p(x), pixel noise included.

        Args:
            num_samples: number of draws; with a context, for each of its rows.
            context: shape ``(batch, context_dim)``, or None.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with a context.
        """
        check_vectors(context, self.prior, *self.conditionals, self.likelihood)
        z = sample_prior(self.prior, num_samples, context)
        for conditional in reversed(self.conditionals):
            z = call(conditional, z, context=context).sample()
        return self.decode(z, context).sample()

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid z_1)` at one draw of all latents given x, shaped like x."""
        return center(self.decode(self._infer(x, context), context))

    @abstractmethod
    def _infer(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Samples every latent given x, each at its site; returns the one next to the data."""

    def _generative_links(self) -> list[tuple[str, nn.Module, str, str]]:
        conditionals = enumerate(self.conditionals)
        return [
            ("likelihood", self.likelihood, "z1", "x"),
            *((f"conditionals[{i}]", part, f"z{i + 2}", f"z{i + 1}") for i, part in conditionals),
            ("prior", self.prior, "", f"z{len(self.encoders)}"),
        ]

    def _check_context(self, context: Tensor | None, x: Tensor) -> None:
        networks = getattr(self, "networks", ())
        # Other than a part, a network that does not say so takes no context.
        taking = [network for network in networks if _network_takes_context(network)]
        check_context(context, x, self.prior, *self.conditionals, self.likelihood, *self.encoders, *taking)


class HierarchicalVAE(_Hierarchy):
    r"""A VAE with any number of levels of latents, inferred from the data upwards.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p(z_l \mid z_{l+1})\; p(x \mid z_1), \qquad
        q(z \mid x) = q(z_1 \mid x) \prod_{l=2}^{L} q(z_l \mid z_{l-1})

    The latents stand at the sites "z1", next to the data, to "zL", the top. All lists go from the data upwards. What
    maps a vector to a distribution of vectors is a conditional: ``encoders.DiagonalNormal(above, below)``, with a
    standard deviation that depends on the level above, or ``likelihoods.Normal(above, below)``, with one that does not.

    Args:
        prior: ``prior(context)`` returns :math:`p(z_L)`.
        conditionals: ``conditionals[l - 1](z, context)`` returns :math:`p(z_l \mid z_{l+1} = z)`; one for each level
            but the top.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z_1 = z)`.
        encoders: ``encoders[0](x, context)`` returns :math:`q(z_1 \mid x)`, ``encoders[l - 1](z, context)``
            :math:`q(z_l \mid z_{l-1} = z)`; one for each level.

    Raises:
        ValueError: when the numbers of parts, the sizes of what they take and give, or the spaces of the latents do not
            meet; when a context is given that no part takes, or that has not one row a datum.

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
        z = first = None
        for level, encoder in enumerate(self.encoders, start=1):
            z = pyro.sample(f"z{level}", call(encoder, x if z is None else z, context=context))
            first = z if first is None else first
        return first


class LadderVAE(_Hierarchy):
    r"""A VAE with any number of levels of latents, inferred from the top down in the order in which they are generated.

    .. math:: d_0 = x, \quad d_l = \mathrm{network}_l(d_{l-1}), \qquad
        q(z \mid x) = \mathrm{encoder}_L(d_L) \prod_{l=1}^{L-1} q(z_l \mid z_{l+1}, x), \qquad
        q(z_l \mid z_{l+1}, x) \propto \mathrm{encoder}_l(d_l)\, p(z_l \mid z_{l+1})

    The model is that of :class:`HierarchicalVAE`. Below the top the posterior is the normalised product of what the
    data say and what the level above says, both diagonal normals, so that precisions add up.

    Args:
        prior: ``prior(context)`` returns :math:`p(z_L)`.
        conditionals: ``conditionals[l - 1](z, context)`` returns :math:`p(z_l \mid z_{l+1} = z)`, a diagonal normal; one
            for each level but the top.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z_1 = z)`.
        networks: ``networks[l - 1]`` maps :math:`d_{l-1}` to :math:`d_l`, any modules; one for each level. One that was
            built with a ``context_dim`` is called with the context too.
        encoders: ``encoders[l - 1](d, context)`` returns a distribution of :math:`z_l` given :math:`d_l = d`, below the
            top a diagonal normal; one for each level.

    Raises:
        ValueError: as :class:`HierarchicalVAE`.
        TypeError: when a distribution that enters a product is no diagonal normal.

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
        d, said_by_data = x, []
        for network, encoder in zip(self.networks, self.encoders, strict=True):
            d = network(d, context) if context is not None and _network_takes_context(network) else network(d)
            said_by_data.append(call(encoder, d, context=context))
        z = pyro.sample(f"z{len(said_by_data)}", said_by_data[-1])
        for level, conditional in reversed(list(enumerate(self.conditionals, start=1))):
            said_from_above = call(conditional, z, context=context)
            z = pyro.sample(f"z{level}", _product(level, said_by_data[level - 1], said_from_above))
        return z


def _product(level: int, q: dist.TorchDistribution, p: dist.TorchDistribution) -> dist.TorchDistribution:
    """Returns the normalised product of the densities of two diagonal normals."""
    for name, factor in ((f"encoders[{level - 1}]", q), (f"conditionals[{level - 1}]", p)):
        base = factor.base_dist if isinstance(factor, torch.distributions.Independent) else factor
        if not isinstance(base, torch.distributions.Normal):
            raise TypeError(
                f"Level {level} of a LadderVAE multiplies diagonal normals, but {name} returned {type(base).__name__}. Use "
                "encoders.DiagonalNormal, or likelihoods.Normal as a conditional; or infer upwards with HierarchicalVAE."
            )
    # In ratios of variances, for a precision may overflow where these do not.
    q_variance, p_variance = q.variance, p.variance
    share = p_variance / (q_variance + p_variance)  # what the data's word weighs
    loc = p.mean + share * (q.mean - p.mean)
    return dist.Normal(loc, (share * q_variance).sqrt()).to_event(1)


class MissingDataVAE(OneLatent):
    r"""A VAE of data of which each datum may lack some elements, missing at random.

    .. math:: p(x_{\mathrm{obs}}, z) = p(z) \prod_{d\,:\,m_d = 1} p(x_d \mid z), \qquad
        q(z \mid x_{\mathrm{obs}}) = \mathrm{encoder}(m \odot x,\, m)

    ``vae.model`` and ``vae.guide`` take ``(x, mask, context=None)``. What x holds where the mask is False has no part
    in anything; :func:`pyrovae.data.split_missing` makes a pair of data with NaN in the holes, which is what
    :func:`pyrovae.fit` and :func:`pyrovae.log_marginal` take. The latter gives the log-density of the observed
    elements.

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid z)`, elements independent given z; or a Multinomial,
            of which the observed counts given their sum are scored.
        encoder: ``encoder(x, context)`` returns a distribution of z, for an x of shape ``(batch, 2, *x_shape)``: the
            data with zeros in the holes, and the mask. One built for ``(2 * channels, height, width)``, or generally a
            shape twice as long in the first dimension, gets both one after the other in that dimension.

    Raises:
        ValueError: when the parts state different latent dimensions or spaces, or the encoder was built for another
            shape; when a mask does not have the data's shape, is not 0 or 1, or leaves nothing of a datum.

    References:
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets, P.-A. Mattei and J. Frellsen, 2019,
        https://arxiv.org/abs/1812.02633.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = MissingDataVAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal((2, 3), 2))
    >>> x, mask = torch.zeros(5, 3), torch.tensor([True, False, True]).expand(5, 3)
    >>> vae.impute(x, mask, num_samples=10, num_draws=4).draws.shape
    torch.Size([4, 5, 3])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, encoder: nn.Module):
        super().__init__(prior, likelihood, encoder)
        x_shape, stated = getattr(likelihood, "x_shape", None), getattr(encoder, "x_shape", None)
        if x_shape and stated and tuple(stated) not in ((2, *x_shape), (2 * x_shape[0], *x_shape[1:])):
            raise ValueError(
                f"The encoder of a MissingDataVAE sees the data and the mask. Build it for {(2, *x_shape)}, or for "
                f"{(2 * x_shape[0], *x_shape[1:])}, not for {tuple(stated)}."
            )

    def model(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> None:
        """The generative process, with what there is of the data observed at site "x" and the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        x, mask = _fill(x, mask)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", call(self.prior, context=context))
            pyro.sample("x", mask_elements(self.decode(z, context), mask), obs=x)

    def guide(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> None:
        """The amortised posterior of the latents at site "z"."""
        self.register()
        self.check_context(context, x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x, mask, context))

    @in_evaluation_mode
    def encode(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`q(z \mid x_{\mathrm{obs}})`, with ``batch_shape == (batch,)``."""
        x, mask = _fill(x, mask)
        both = torch.stack([x, mask.to(x.dtype)], dim=1)
        both = both.reshape(len(x), *getattr(self.encoder, "x_shape", both.shape[1:]))
        return call(self.encoder, both, context=context)

    def impute(
        self,
        x: Tensor,
        mask: Tensor,
        context: Tensor | None = None,
        *,
        num_samples: int = 1000,
        num_draws: int = 1,
    ) -> Imputation:
        """Fills the holes by what the model expects there given what was observed, as :func:`pyrovae.impute`.

        Args:
            x: data, shape ``(batch, *x_shape)``; anything, NaN too, in the holes.
            mask: of the same shape, True where x is observed.
            context: shape ``(batch, context_dim)``, or None.
            num_samples: samples of the latents per datum.
            num_draws: draws of the missing elements per datum.

        Returns:
            An :class:`~pyrovae.Imputation` with all observed elements as they are.
        """
        x, mask = _fill(x, mask)
        found = impute(self.model, self.guide, x, mask, context, num_samples=num_samples, num_draws=num_draws)
        return found._replace(mean=torch.where(mask, x, found.mean), draws=torch.where(mask, x, found.draws))


def _fill(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the data with zeros in the holes and the mask as booleans, after checking the mask."""
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)} but x has {tuple(x.shape)}: give one value an element.")
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must be boolean, or 0 where x is missing and 1 where it is observed.")
        mask = mask.bool()
    empty = ~mask.flatten(1).any(dim=1)
    if bool(empty.any()):
        raise ValueError(
            f"mask leaves nothing observed in {int(empty.sum())} of {len(x)} rows, the first of them "
            f"{row_name(int(empty.nonzero()[0]))}. Remove those rows."
        )
    return torch.where(mask, x, 0), mask


class SemiSupervisedVAE(Registered):
    r"""A VAE with a class beside the latents, which is known for some of the data: the model M2 of Kingma et al.

    .. math:: p(x, y, z) = p(y)\, p(z)\, p(x \mid y, z), \qquad q(y, z \mid x) = q(y \mid x)\, q(z \mid x, y)

    ``vae.model`` and ``vae.guide`` take ``(x, y=None)``, y of shape ``(batch,)``: a class from 0 to ``num_classes -
    1``, or -1 where it is not known. ``log_marginal(vae.model, vae.guide, x, y)`` estimates log p(x, y) where y is
    known and log p(x) where it is not. Train with :class:`ClassifierELBO`, or Pyro's
    ``TraceEnum_ELBO(max_plate_nesting=1)``: they sum over the classes, where other losses draw one, with gradients of a
    large variance.

    The class at site "y" is latent for all data. Where it is known, the guide draws "y" from p(y), as the model does,
    so that it adds nothing, what is drawn is not used, and the known class is observed at the site "label".

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`, or with ``context_dim=num_classes`` :math:`p(z \mid y)`.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid y, z)`; built with ``context_dim=num_classes``,
            for the context is the class as a vector of zeros and a one.
        encoder: ``encoder(x, context)`` returns :math:`q(z \mid x, y)`, or without ``context_dim`` :math:`q(z \mid x)`.
        classifier: the network of q(y | x), a module that returns one logit a class, or a callable that builds one from
            ``(x_shape, num_classes)``.
        num_classes: number of classes.
        class_probs: :math:`p(y)`, one positive number a class that sum to one; all the same unless given.

    Raises:
        ValueError: when the parts state different sizes or spaces, or neither prior nor likelihood takes the class;
            when a class is out of range, or y has not one class a datum.

    References:
        Semi-supervised Learning with Deep Generative Models, D. P. Kingma, D. J. Rezende, S. Mohamed and M. Welling,
        2014, https://arxiv.org/abs/1406.5298.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = SemiSupervisedVAE(
    ...     prior=priors.StandardNormal(2),
    ...     likelihood=likelihoods.Bernoulli(2, 64, context_dim=10),
    ...     encoder=encoders.DiagonalNormal(64, 2, context_dim=10),
    ...     num_classes=10,
    ... )
    >>> vae.classify(torch.zeros(5, 64)).probs.shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        encoder: nn.Module,
        classifier: Network = MLP,
        *,
        num_classes: int,
        class_probs: Sequence[float] | None = None,
    ):
        super().__init__()
        check_roles(prior=prior, likelihood=likelihood, encoder=encoder)
        check_equal("latent_dim", prior=prior, likelihood=likelihood, encoder=encoder)
        check_equal("x_shape", likelihood=likelihood, encoder=encoder)
        check_spaces(prior=prior, encoder=encoder)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        for name, part in (("prior", prior), ("likelihood", likelihood), ("encoder", encoder)):
            if getattr(part, "context_dim", 0) not in (0, num_classes):
                raise ValueError(
                    f"The context is the class, but {name} has context_dim={part.context_dim}. Build it with "
                    f"context_dim={num_classes}, the number of classes."
                )
        if not (takes_context(prior) or takes_context(likelihood)):
            raise ValueError(
                f"The data do not depend on the class. Build the likelihood (or the prior) with context_dim={num_classes}."
            )
        probs = torch.full((num_classes,), 1 / num_classes) if class_probs is None else torch.tensor(class_probs)
        if probs.shape != (num_classes,) or not bool((probs > 0).all()) or abs(probs.sum().item() - 1) > 1e-5:
            raise ValueError(f"class_probs must be {num_classes} positive numbers that sum to one, got {class_probs}.")
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder
        self.num_classes = num_classes
        self.classifier = build(classifier, likelihood.x_shape, num_classes, 0)
        self.register_buffer("class_probs", probs / probs.sum(), persistent=False)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        """The generative process: sites "y", "z", the data at "x", and the classes that are known at "label"."""
        self.register()
        known, y = self._classes(x, y)
        with pyro.plate("data", len(x)):
            drawn = pyro.sample("y", dist.Categorical(self.class_probs))
            with poutine.mask(mask=known):
                pyro.sample("label", dist.Categorical(self.class_probs), obs=y)
            context = self._context(torch.where(known, y, drawn))
            z = pyro.sample("z", call(self.prior, context=context))
            pyro.sample("x", likelihood_at(self.likelihood, z, context), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """The classifier where the class is not known, and the amortised posterior of the latents."""
        self.register()
        known, y = self._classes(x, y)
        with pyro.plate("data", len(x)):
            logits = torch.where(known.unsqueeze(-1), self.class_probs.log(), self.classify(x).logits)
            drawn = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            context = self._context(torch.where(known, y, drawn))
            pyro.sample("z", call(self.encoder, x, context=context))

    @in_evaluation_mode
    def classify(self, x: Tensor) -> dist.Categorical:
        r"""Returns :math:`q(y \mid x)`, with ``batch_shape == (batch,)``.

        In evaluation mode, with gradients; inside of Pyro's handlers, as in training, in the mode that there is.
        """
        return dist.Categorical(logits=apply(self.classifier, x, None, (self.num_classes,), "classifier"))

    @torch.no_grad()
    @in_evaluation_mode
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Returns the fraction of data whose class the classifier thinks the likeliest, in evaluation mode.

        Args:
            x: data, shape ``(batch, *x_shape)``.
            y: their classes, shape ``(batch,)``; data without (-1) are left out.
        """
        known, y = self._classes(x, y)
        if not bool(known.any()):
            raise ValueError("y holds no known class, so there is no accuracy.")
        right = self.classify(x).logits.argmax(-1) == y
        return right[known].double().mean().item()

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, y: Tensor | None = None) -> Tensor:
        """Draws from p(x), or from p(x | y) of given classes, pixel noise included.

        Args:
            num_samples: number of draws; with classes, for each of them.
            y: classes, shape ``(batch,)``, or None; -1 draws one.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with classes.
        """
        drawn = dist.Categorical(self.class_probs).sample((num_samples,))
        if y is not None:
            known, y = self._classes(y, y)
            drawn = torch.where(known, y, dist.Categorical(self.class_probs).sample((num_samples, len(y))))
        context = self._context(drawn)
        prior = call(self.prior, context=context).expand(drawn.shape)
        return likelihood_at(self.likelihood, prior.sample(), context).sample()

    def _classes(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns which classes are known, and the classes, zero where they are not; both of shape ``(batch,)``."""
        if y is None:
            y = torch.full((len(x),), -1, device=x.device)
        check_length("y", y, x)
        if y.dim() != 1 or y.is_floating_point():
            raise ValueError(f"y must hold one integer a datum, shape ({len(x)},), got {tuple(y.shape)} of {y.dtype}.")
        wrong = (y < -1) | (y >= self.num_classes)
        if bool(wrong.any()):
            raise ValueError(
                f"y must hold classes from 0 to {self.num_classes - 1}, or -1 where the class is not known, but holds "
                f"{int(y[wrong][0])} in {row_name(int(wrong.nonzero()[0]))}."
            )
        return y >= 0, y.clamp(min=0).long()

    def _context(self, y: Tensor) -> Tensor:
        return one_hot(y, self.num_classes).to(self.class_probs.dtype)


class ClassifierELBO(TraceEnum_ELBO):
    r"""The loss of a :class:`SemiSupervisedVAE`: the negative ELBO and the cross entropy of the known classes.

    .. math:: \mathrm{loss} = -\sum_n \mathrm{ELBO}_n - \alpha \sum_{n\,:\,y_n\ \mathrm{known}} \log q(y_n \mid x_n)

    The ELBO sums over the classes, and where the class is known the classifier has no part in it; the second term lets
    it learn from those data. A training weight, so :math:`\alpha` stands here and not in the model.

    Args:
        classify: ``vae.classify``; ``classify(x)`` returns the Categorical distribution q(y | x).
        weight: :math:`\alpha`, nats of loss a nat of cross entropy, at least 0. Choose it by validation: with few
            labels the best may be hundreds (the digits of ``examples/semi_supervised.py`` take 300). The paper takes a
            tenth of the number of all data over the number of those with a class.
        **kwargs: arguments of ``pyro.infer.TraceEnum_ELBO``.

    Raises:
        ValueError: when `weight` is negative or not finite.

    References:
        Semi-supervised Learning with Deep Generative Models, D. P. Kingma, D. J. Rezende, S. Mohamed and M. Welling,
        2014, https://arxiv.org/abs/1406.5298.

    >>> from pyrovae import encoders, fit, likelihoods, priors
    >>> _ = pyro.set_rng_seed(0)
    >>> likelihood, encoder = likelihoods.Normal(2, 3, context_dim=2), encoders.DiagonalNormal(3, 2, context_dim=2)
    >>> vae = SemiSupervisedVAE(priors.StandardNormal(2), likelihood, encoder, num_classes=2)
    >>> x, y = torch.randn(100, 3), torch.randint(-1, 2, (100,))
    >>> loss = ClassifierELBO(vae.classify, weight=10.0)
    >>> len(fit(vae.model, vae.guide, (x, y), loss=loss, epochs=5, batch_size=50, progress=False))
    5
    """

    def __init__(self, classify: Callable[[Tensor], dist.Categorical], weight: float, **kwargs: Any):
        super().__init__(**{"max_plate_nesting": 1} | kwargs)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be at least 0 and finite, got {weight}.")
        self.classify, self.weight = classify, weight

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of the loss."""
        with torch.no_grad():
            return super().loss(model, guide, *args, **kwargs) + self._cross_entropy(*args, **kwargs).item()

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Returns an estimate of the loss that can be differentiated."""
        return super().differentiable_loss(model, guide, *args, **kwargs) + self._cross_entropy(*args, **kwargs)

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns an estimate of the loss and adds its gradient to the parameters'."""
        value = self.differentiable_loss(model, guide, *args, **kwargs)
        value.backward()
        return value.item()

    def _cross_entropy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return x.new_zeros(())
        with poutine.block():  # inside of a handler, and so in the mode of training
            logits = self.classify(x).logits
        return self.weight * cross_entropy(logits, y.long(), ignore_index=-1, reduction="sum")


def _network_takes_context(network: nn.Module) -> bool:
    return getattr(network, "context_dim", 0) > 0  # other than a part, any module will do, and takes one input


def _check_count(name: str, parts: Sequence[nn.Module], count: int, levels: int) -> None:
    if len(parts) != count:
        raise ValueError(
            f"{levels} encoders make {levels} levels, which take {count} {name}, got {len(parts)}. Give one encoder a "
            "level and one conditional a level but the top, each from the data upwards."
        )


def _check_shapes(links: list[tuple[str, nn.Module, str, str]]) -> None:
    """Raises a ValueError where parts do not meet: each with its name, the variable it takes and the one it gives."""
    stated: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, part, into, out in links:
        for variable, shape in zip((into, out), _ends(part), strict=True):
            if shape is not None:
                stated.setdefault(variable, {})[name] = shape
    for variable, shapes in stated.items():
        if len(set(shapes.values())) > 1:
            listing = ", ".join(f"{name} is built for {shape}" for name, shape in shapes.items())
            raise ValueError(f"The parts must agree on the shape of {variable}: {listing}.")


def _ends(part: nn.Module) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Returns the shapes of what a part takes and of what it gives, None where it does not say."""
    if isinstance(part, Encoder):
        return part.x_shape, (part.latent_dim,)
    if isinstance(part, Likelihood):
        return (part.latent_dim,), part.x_shape
    if isinstance(part, Prior):
        return None, (part.latent_dim,)
    return getattr(part, "in_shape", None), getattr(part, "out_shape", None)
