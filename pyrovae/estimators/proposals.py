r"""Proposals: what latents are drawn from, and where annealing starts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from inspect import signature
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import transform_to

from pyrovae.bounds import ELBO
from pyrovae.bounds.base import Bound
from pyrovae.inference.messages import described
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import inspect_samples, log_q_of, trace_model
from pyrovae.estimators.base import Task, check_count, check_positive, prior_of


class WeightedGuide(NamedTuple):
    """A guide and its share of the draws.

    Args:
        guide: a Pyro guide.
        share: relative to those of the others.
        is_prior: whether it is the model's own distribution of the latents.
    """

    guide: Callable
    share: float = 1.0
    is_prior: bool = False


class Proposal(ABC):
    r"""Base of the proposals: what the latents of a datum are drawn from, for an estimator.

    To add one, write :meth:`guides`, which returns Pyro guides made from those of a :class:`Task`, for all its data,
    with their shares of the draws. Whatever is drawn from, weights have the right mean: a proposal decides about the
    variance alone. `needs_guide` says whether it looks at the guide.
    """

    needs_guide = True

    @abstractmethod
    def guides(self, task: Task) -> list[WeightedGuide]:
        """Returns the guides to draw from, with their shares."""

    def single(self, task: Task, what_for: str) -> WeightedGuide:
        """Returns the one guide to draw from; raises a ValueError for a mixture of several."""
        guides = self.guides(task)
        if len(guides) != 1:
            raise ValueError(f"{what_for} from one proposal, and {self} is {len(guides)}. Give it one of them.")
        return guides[0]

    def __repr__(self) -> str:
        return described(self)


class Guide(Proposal):
    """The guide as it is."""

    def guides(self, task: Task) -> list[WeightedGuide]:
        return [WeightedGuide(task.guide)]


class Prior(Proposal):
    """The model's own distribution of the latents, whatever the data."""

    needs_guide = False

    def guides(self, task: Task) -> list[WeightedGuide]:
        return [WeightedGuide(prior_of(task.model), is_prior=True)]


class Widened(Proposal):
    r"""The guide, its latents moved away from their mean: an answer to posteriors that are too narrow.

    .. math:: z = \mu + s\,(z' - \mu), \qquad z' \sim q(z \mid x), \quad \mu = \mathrm{E}_q[z']

    at each latent site by itself, whose latents must be any real numbers. The tails of the weights get lighter; of a
    guide that is right they get more variance.

    Args:
        scale: s, positive.

    References:
        Importance Sampling, section 9 of Monte Carlo Theory, Methods and Examples, A. B. Owen, 2013,
        https://artowen.su.domains/mc.

    >>> Widened(1.5)
    Widened(scale=1.5)
    """

    def __init__(self, scale: float = 1.2):
        check_positive("scale", scale)
        self.scale = scale

    def guides(self, task: Task) -> list[WeightedGuide]:
        return [WeightedGuide(_Changed(task.guide, task.structure, self._widen))]

    def _widen(self, name: str, p: Any) -> Any:
        support = p.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if support not in (constraints.real, constraints.real_vector):
            raise ValueError(
                f'the latents at site "{name}" are not any real numbers ({p.support}), so that they cannot be widened. Take '
                "estimators.Refined() or a Mixed() proposal."
            )
        try:
            mean = p.mean
        except NotImplementedError:  # a flow, for one
            mean = p.sample((256,)).mean(0)
        affine = dist.transforms.AffineTransform((1 - self.scale) * mean, self.scale, event_dim=len(p.event_shape))
        return dist.TransformedDistribution(p, [affine])


class Mixed(Proposal):
    r"""A mixture of proposals: weights are bounded by those of its best, up to its share.

    .. math:: q(z \mid x) = \sum_j \alpha_j\, q_j(z \mid x)

    The guide and a tenth of the prior unless given, so that no weight is above :math:`10\, p(x \mid z)`.

    Args:
        proposals: the :math:`q_j`.
        shares: :math:`\alpha_j`, positive; they are scaled to add up to one.

    References:
        Weighted Average Importance Sampling and Defensive Mixture Distributions, T. Hesterberg, 1995,
        https://doi.org/10.1080/00401706.1995.10484303.

    >>> Mixed([Guide(), Widened(2.0), Prior()], shares=[0.6, 0.3, 0.1]).shares
    [0.6, 0.3, 0.1]
    """

    def __init__(self, proposals: Sequence[Proposal] | None = None, shares: Sequence[float] | None = None):
        self.proposals = [Guide(), Prior()] if proposals is None else list(proposals)
        self.shares = (
            ([0.9, 0.1] if proposals is None else [1.0] * len(self.proposals)) if shares is None else list(shares)
        )
        if not self.proposals or len(self.proposals) != len(self.shares):
            raise ValueError(
                f"shares must hold one number a proposal, got {len(self.shares)} for {len(self.proposals)}."
            )
        for proposal in self.proposals:
            if not isinstance(proposal, Proposal):
                raise TypeError(f"proposals must be ones such as estimators.Widened(), got {proposal!r}.")
        for share in self.shares:
            check_positive("shares", share)

    @property
    def needs_guide(self) -> bool:
        """Whether one of the proposals looks at the guide."""
        return any(proposal.needs_guide for proposal in self.proposals)

    def guides(self, task: Task) -> list[WeightedGuide]:
        total = sum(self.shares)
        return [
            weighed._replace(share=weighed.share * share / total)
            for proposal, share in zip(self.proposals, self.shares, strict=True)
            for weighed in proposal.guides(task)
        ]


class Refined(Proposal):
    r"""The guide tuned to each datum by gradient steps: free of what the encoder cannot tell data apart by.

    .. math:: \max_{\delta_n} \mathcal{L}\left(x_n; q(z \mid \eta(x_n) + \delta_n)\right)

    with :math:`\eta` what parametrises the guide's distributions (means, log standard deviations, logits, features of a
    flow) and :math:`\delta_n` a change of them for the datum alone, the same for all draws. The family stays as it is.
    Neither model nor guide is trained.

    Args:
        num_steps: steps of Adam, at least 1, at a rate that falls to zero.
        learning_rate: the rate it starts at, positive.
        bound: the bound to raise, of :mod:`pyrovae.bounds`; ``ELBO(8)`` unless given. An :class:`IWAE` makes wider
            proposals, but in many dimensions its gradient needs far more particles.

    References:
        Semi-Amortized Variational Autoencoders, Y. Kim, S. Wiseman, A. C. Miller, D. Sontag and A. M. Rush, 2018,
        https://arxiv.org/abs/1802.02550.

    >>> Refined(num_steps=50)
    Refined(num_steps=50)
    """

    def __init__(self, num_steps: int = 100, learning_rate: float = 0.05, bound: Bound | None = None):
        check_count("num_steps", num_steps)
        check_positive("learning_rate", learning_rate)
        if bound is not None and not isinstance(bound, Bound):
            raise TypeError(f"bound must be one of pyrovae.bounds, got {bound!r}.")
        self.num_steps, self.learning_rate, self.bound = num_steps, learning_rate, bound

    def guides(self, task: Task) -> list[WeightedGuide]:
        return [WeightedGuide(self.tune(task.model, task.guide, task.structure, task.args, task.kwargs))]

    def tune(self, model: Callable, guide: Callable, structure: SiteStructure, args: tuple, kwargs: dict) -> Callable:
        """Returns the guide tuned to each of some data."""
        # A copy, for a bound counts steps, and those of a training are others.
        bound = ELBO(8) if self.bound is None else copy(self.bound)
        changes: dict[tuple[str, ...], Tensor] = {}
        tuned = _Changed(
            guide,
            structure,
            lambda name, p: _shifted(p, (name,), changes, structure.max_plate_nesting, len(p.batch_shape)),
        )
        with torch.enable_grad():
            bound.differentiable_loss(model, tuned, *args, **kwargs)  # finds out what there is to change
            if not changes:
                raise ValueError("the guide's distributions have no parameters that can be tuned to each datum.")
            optimizer = torch.optim.Adam(changes.values(), lr=self.learning_rate)
            for step in range(self.num_steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.num_steps)
                loss = bound.differentiable_loss(model, tuned, *args, **kwargs)
                # Not backward: the gradients of model and guide belong to whoever trains them.
                for change, gradient in zip(
                    changes.values(), torch.autograd.grad(loss, list(changes.values()), allow_unused=True), strict=True
                ):
                    # Where there is no way up, the guide stays as it is: it is a proposal still.
                    change.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
                optimizer.step()
        for change in changes.values():
            change.requires_grad_(False)
        return tuned


def refine(
    model: Callable,
    guide: Callable,
    *args: Any,
    bound: Bound | None = None,
    num_steps: int = 100,
    learning_rate: float = 0.05,
    **kwargs: Any,
) -> Callable:
    r"""Tunes a guide to each of some data by gradient steps; returns a Pyro guide for these data, in this order.

    See :class:`Refined`, which is what estimators take, for they work through data in chunks. Modules of the model are
    run as they are, in training or evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide.
        *args: what both are called with.
        bound: the bound to raise, of :mod:`pyrovae.bounds`; ``ELBO(8)`` unless given.
        num_steps: steps of Adam, at least 1.
        learning_rate: the rate it starts at, positive.
        **kwargs: what both are called with.

    Raises:
        ValueError: when the guide's distributions have no parameters that can be changed; when the refined guide is
            called with another number of data.

    >>> import pyrovae
    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = pyrovae.VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    >>> x = torch.randn(5, 3)
    >>> refined = refine(vae.model, vae.guide, x, num_steps=10)
    >>> pyrovae.log_weights(vae.model, refined, x, num_samples=4).shape
    torch.Size([4, 5])
    """
    proposal = Refined(num_steps, learning_rate, bound)
    return proposal.tune(model, guide, inspect_samples(model, guide, *args, **kwargs), args, kwargs)


def check_no_auxiliary(structure: SiteStructure) -> None:
    """Raises a ValueError if a guide computes its latents from auxiliary ones, so that others have no known density."""
    if structure.auxiliary:
        listed = ", ".join(f'"{name}"' for name in sorted(structure.auxiliary))
        raise ValueError(
            f"the guide computes its latents from the auxiliary site {listed}, and has a density at its own draws alone. Take "
            "ImportanceSampling() with the guide as it is, AnnealedImportanceSampling() from the prior, or a guide that draws "
            "the latents themselves."
        )


def log_density(task: Task, guide: Callable, trace: Trace, num_samples: int) -> Tensor:
    r"""Returns the log-density of a guide at the latents of another's trace, ``(num_samples, batch)``."""
    check_no_auxiliary(task.structure)
    return log_q_of(trace_model(guide, trace, task.structure, num_samples, *task.args, **task.kwargs))


class _Changed(Messenger):
    """A guide whose latents are drawn from other distributions, made from its own.

    Args:
        guide: a Pyro guide.
        structure: of the model and the guide.
        change: returns the distribution for a site's name and distribution.
    """

    def __init__(self, guide: Callable, structure: SiteStructure, change: Callable[[str, Any], Any]):
        super().__init__()
        self.guide, self.structure, self.change = guide, structure, change

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with self:
            self.guide(*args, **kwargs)

    def _pyro_sample(self, msg: dict) -> None:
        # What is no data site has no datum to be changed for.
        data = self.structure.data
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample) and data and data.frame(msg) is not None:
            msg["fn"] = self.change(msg["name"], msg["fn"])


def _shifted(p: Any, path: tuple[str, ...], changes: dict, nesting: int, lead: int) -> Any:
    """Returns a distribution whose parameters are changed, each in the unbounded space that its constraint maps from.

    Args:
        p: the distribution.
        path: names of the site and of the distributions around it.
        changes: by the path of each parameter; those missing are added, at zero.
        nesting: how many plates there are.
        lead: how many dimensions of the batch shape the site has, samples included.
    """
    if isinstance(p, dist.Delta):  # which is where it is computed to be
        return p
    if isinstance(p, torch.distributions.Independent):
        return dist.Independent(_shifted(p.base_dist, path, changes, nesting, lead), p.reinterpreted_batch_ndims)
    if isinstance(p, ExpandedDistribution):
        return ExpandedDistribution(
            _shifted(p.base_dist, path, changes, nesting, len(p.base_dist.batch_shape)), p.batch_shape
        )
    if isinstance(p, MaskedDistribution):
        return MaskedDistribution(_shifted(p.base_dist, path, changes, nesting, lead), p._mask)
    if type(p) in (dist.TransformedDistribution, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(_shifted(p.base_dist, path, changes, nesting, lead), p.transforms)
    arguments, changed = {}, False
    names = signature(type(p)).parameters
    # What its class is built from and holds: some, such as mixtures, behind a property.
    held = [name for name in names if name in vars(p) or f"_{name}" in vars(p) and hasattr(p, name)]
    held = held or [name for name in names if hasattr(p, name)]
    for first, others in (("logits", ("probs",)), ("scale_tril", ("covariance_matrix", "precision_matrix"))):
        if first in held:
            held = [name for name in held if name not in others]
    for name in held:
        value = getattr(p, name)
        if isinstance(value, torch.distributions.Distribution):
            value = _shifted(value, (*path, name), changes, nesting, lead)
            changed = True
        elif isinstance(value, Tensor) and value.is_floating_point() and name in p.arg_constraints:
            constraint = p.arg_constraints[name]
            try:
                free = transform_to(constraint)
            except NotImplementedError:  # depends on others, or is no space that free numbers are mapped to
                free = None
            if free is not None:
                full = p.batch_shape + value.shape[value.dim() - constraint.event_dim :]
                raw = free.inv(value.expand(full))
                key = (*path, name)
                shape = raw.shape[max(0, lead - nesting) :]
                if key in changes and changes[key].shape != shape:
                    raise ValueError(
                        f'site "{path[0]}" was refined for other data: changes of shape {tuple(changes[key].shape)} do not fit '
                        f"{tuple(shape)}. Call the refined guide with the very data, in one piece; what works through data in "
                        "chunks takes the proposal estimators.Refined() instead."
                    )
                if key not in changes:
                    changes[key] = torch.zeros(shape, dtype=raw.dtype, device=raw.device, requires_grad=True)
                value = free(raw + changes[key])
                changed = True
        arguments[name] = value
    return type(p)(**arguments) if changed else p
