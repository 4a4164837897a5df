r"""Proposals: the distributions from which latents are drawn, and from which annealing starts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
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
from pyrovae.estimators.base import check_count, check_positive
from pyrovae.estimators.task import Task, prior_of, sum_out_discrete
from pyrovae.inference.messages import described
from pyrovae.inference.structure import SiteStructure
from pyrovae.inference.weights import inspect_samples, log_q_of, trace_model
from pyrovae.recorded import NumbersChecked


class WeightedGuide(NamedTuple):
    """A guide and its share of the draws.

    Args:
        guide: a Pyro guide.
        share: relative to the shares of the other guides.
        is_prior: whether it is the model's prior.
    """

    guide: Callable
    share: float = 1.0
    is_prior: bool = False


class Proposal(NumbersChecked, ABC):
    r"""Base of the proposals: the distribution from which an estimator draws the latents of a datum.

    To add one, write :meth:`guides`, which returns Pyro guides for all data of a :class:`Task`, with their shares of
    the draws. Weights have the right mean under any proposal; the proposal decides only their variance. `needs_guide`
    says whether it uses the task's guide, and `sums_discrete` whether it draws continuous latents alone, and without
    masks, so that few discrete ones beside them are summed over. `finds_modes` says whether it goes to modes that it
    looks for, and so never sees the others: its results are then compared with draws of the guide and the prior.
    """

    needs_guide = True
    sums_discrete = False
    finds_modes = False

    @abstractmethod
    def guides(self, task: Task) -> list[WeightedGuide]:
        """Returns the guides to draw from, with their shares."""

    def fit(self, task: Task) -> "Proposal":
        """Returns the proposal fitted to the data of a task, for several runs on these data or parts of them.

        Here itself: :meth:`guides` has nothing to fit, or fits in each run.
        """
        return self

    def prepare(self, task: Task) -> Task:
        """Returns the task of the latents that are drawn, for an estimator that uses the proposal."""
        return sum_out_discrete(replace(task, unmasked=True)) if self.sums_discrete else task

    def single(self, task: Task, user: str) -> WeightedGuide:
        """Returns the only guide to draw from; raises a ValueError for a mixture of several.

        Args:
            task: the task.
            user: subject and verb of the error, "AnnealedImportanceSampling starts" for example.
        """
        guides = self.guides(task)
        if len(guides) != 1:
            raise ValueError(f"{user} from one proposal, but {self} has {len(guides)}. Give it one of them.")
        return guides[0]

    def __repr__(self) -> str:
        return described(self)


class Guide(Proposal):
    """The guide as it is."""

    def guides(self, task: Task) -> list[WeightedGuide]:
        return [WeightedGuide(task.guide)]


class Prior(Proposal):
    """The model's prior, whatever the data."""

    needs_guide = False

    def guides(self, task: Task) -> list[WeightedGuide]:
        return [WeightedGuide(prior_of(task.model), is_prior=True)]


class Widened(Proposal):
    r"""The guide with its latents moved away from their mean: a remedy for a guide that is too narrow.

    .. math:: z = \mu + s\,(z' - \mu), \qquad z' \sim q(z \mid x), \quad \mu = \mathrm{E}_q[z']

    at each latent site by itself; the support of the latents must be all real numbers. The tails of the weights get
    lighter; for an exact guide, the variance of the weights gets larger.

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
        return [WeightedGuide(_ModifiedGuide(task.guide, task.structure, self._widen))]

    def _widen(self, name: str, p: Any) -> Any:
        support = p.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if support not in (constraints.real, constraints.real_vector):
            raise ValueError(
                f'the latents at site "{name}" have the support {p.support}, not all real numbers, so that they cannot '
                "be widened. Take estimators.Refined() or a Mixed() proposal."
            )
        try:
            mean = p.mean
        except NotImplementedError:  # a flow, for example
            mean = p.sample((256,)).mean(0)
        affine = dist.transforms.AffineTransform((1 - self.scale) * mean, self.scale, event_dim=len(p.event_shape))
        return dist.TransformedDistribution(p, [affine])


class Mixed(Proposal):
    r"""A mixture of proposals; each weight is at most that of any single proposal, divided by its share.

    .. math:: q(z \mid x) = \sum_j \alpha_j\, q_j(z \mid x)

    By default nine tenths of the guide and one tenth of the prior, so that no weight is above
    :math:`10\, p(x \mid z)`.

    Args:
        proposals: the :math:`q_j`.
        shares: :math:`\alpha_j`, positive; they are scaled to sum to one.

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
                f"shares must hold one number per proposal, got {len(self.shares)} for {len(self.proposals)}."
            )
        for proposal in self.proposals:
            if not isinstance(proposal, Proposal):
                raise TypeError(f"proposals must be proposals such as estimators.Widened(), got {proposal!r}.")
        for share in self.shares:
            check_positive("shares", share)
        self.needs_guide = any(proposal.needs_guide for proposal in self.proposals)

    def prepare(self, task: Task) -> Task:
        # All parts must count the same densities.
        return replace(task, unmasked=task.unmasked or any(part.sums_discrete for part in self.proposals))

    def fit(self, task: Task) -> Proposal:
        return Mixed([proposal.fit(task) for proposal in self.proposals], self.shares)

    def guides(self, task: Task) -> list[WeightedGuide]:
        total = sum(self.shares)
        return [
            weighted._replace(share=weighted.share * share / total)
            for proposal, share in zip(self.proposals, self.shares, strict=True)
            for weighted in proposal.guides(task)
        ]


class Refined(Proposal):
    r"""The guide tuned to each datum by gradient steps, which removes the error of the encoder (amortisation gap).

    .. math:: \max_{\delta_n} \mathcal{L}\left(x_n; q(z \mid \eta(x_n) + \delta_n)\right)

    with :math:`\eta` the unconstrained parameters of the guide's distributions (means, log standard deviations, logits,
    features of a flow) and :math:`\delta_n` an offset for each datum, the same for all draws. The family stays the
    same. Neither model nor guide is trained.

    Args:
        num_steps: steps of Adam, at least 1, at a learning rate that falls to zero.
        learning_rate: the initial learning rate, positive.
        bound: the bound to maximise, of :mod:`pyrovae.bounds`; ``ELBO(8)`` by default. An
            :class:`~pyrovae.bounds.IWAE` gives wider
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
        # A copy: a bound counts its steps, and must not mix these with those of a training run.
        bound = ELBO(8) if self.bound is None else copy(self.bound)
        offsets = _Offsets(structure.max_plate_nesting)
        tuned = _ModifiedGuide(guide, structure, offsets.apply)
        with torch.enable_grad():
            bound.differentiable_loss(model, tuned, *args, **kwargs)  # the first run creates the offsets
            if not offsets.by_path:
                raise ValueError("the guide's distributions have no parameters that can be tuned to each datum.")
            tensors = list(offsets.by_path.values())
            optimizer = torch.optim.Adam(tensors, lr=self.learning_rate)
            for step in range(self.num_steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.num_steps)
                loss = bound.differentiable_loss(model, tuned, *args, **kwargs)
                # Not loss.backward(), which would add to the gradients of model and guide.
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
                for offset, gradient in zip(tensors, gradients, strict=True):
                    # Without a finite gradient the guide stays as it is, which is a valid proposal.
                    offset.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
                optimizer.step()
        for offset in tensors:
            offset.requires_grad_(False)
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
    r"""Tunes a guide to each datum by gradient steps; returns a Pyro guide for exactly these data, in this order.

    Estimators work through data in chunks, and take :class:`Refined` instead. Modules run as they are, in training or
    evaluation mode.

    Args:
        model: a Pyro model, called with the same arguments as the guide.
        guide: a Pyro guide.
        *args: positional arguments of both.
        bound: the bound to maximise, of :mod:`pyrovae.bounds`; ``ELBO(8)`` by default.
        num_steps: steps of Adam, at least 1.
        learning_rate: the initial learning rate, positive.
        **kwargs: keyword arguments of both.

    Raises:
        ValueError: when the guide's distributions have no parameters that can be tuned; when the refined guide is
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
    """Raises a ValueError if a guide has auxiliary sites, so that its density is known at its own draws only."""
    if structure.auxiliary:
        listed = ", ".join(f'"{name}"' for name in sorted(structure.auxiliary))
        raise ValueError(
            f"the guide computes its latents from the auxiliary site {listed}, so that its density is known at its own "
            "draws only. Take ImportanceSampling() with the guide as it is, AnnealedImportanceSampling() from the "
            "prior, or a guide that draws the latents directly."
        )


def log_density(task: Task, guide: Callable, trace: Trace, num_samples: int) -> Tensor:
    r"""Returns the log-density of a guide at the latents of another guide's trace, ``(num_samples, batch)``."""
    if not getattr(guide, "draws_directly", False):  # the task's guide, or a modification of it
        check_no_auxiliary(task.structure)
    drawn = trace_model(guide, trace, task.structure, num_samples, *task.args, **task.kwargs)
    return log_q_of(task.without_summed(drawn), task.log_prob_of)


class _ModifiedGuide:
    """A guide whose latents in the data plate are drawn from modified distributions.

    Args:
        guide: a Pyro guide.
        structure: the sites of the model and the guide.
        modify: returns the new distribution, from a site's name and distribution.
    """

    def __init__(self, guide: Callable, structure: SiteStructure, modify: Callable[[str, Any], Any]):
        self.guide, self.handler = guide, _ModifiedSites(structure, modify)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with self.handler:
            self.guide(*args, **kwargs)


class _ModifiedSites(Messenger):
    """The Pyro handler of :class:`_ModifiedGuide`."""

    def __init__(self, structure: SiteStructure, modify: Callable[[str, Any], Any]):
        super().__init__()
        self.structure, self.modify = structure, modify

    def _pyro_sample(self, msg: dict) -> None:
        data = self.structure.data
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample) and data and data.frame(msg) is not None:
            msg["fn"] = self.modify(msg["name"], msg["fn"])


class _Offsets:
    """Offsets of the parameters of a guide's distributions, for each datum, in the unconstrained space of a parameter.

    Attributes:
        by_path: the tensors, by the names of site, wrapped distributions and parameter; zero when first used.
    """

    def __init__(self, max_plate_nesting: int):
        self.max_plate_nesting = max_plate_nesting
        self.by_path: dict[tuple[str, ...], Tensor] = {}

    def apply(self, name: str, p: Any) -> Any:
        """Returns the distribution of a site with its parameters moved by their offsets."""
        return self._move(p, (name,), len(p.batch_shape))

    def _move(self, p: Any, path: tuple[str, ...], batch_dim: int) -> Any:
        # batch_dim: number of batch dimensions of the site, the dimension of samples included.
        if isinstance(p, dist.Delta):  # at a value that the guide has computed
            return p
        if isinstance(p, torch.distributions.Independent):
            return dist.Independent(self._move(p.base_dist, path, batch_dim), p.reinterpreted_batch_ndims)
        if isinstance(p, ExpandedDistribution):
            base = self._move(p.base_dist, path, len(p.base_dist.batch_shape))
            return ExpandedDistribution(base, p.batch_shape)
        if isinstance(p, MaskedDistribution):
            return MaskedDistribution(self._move(p.base_dist, path, batch_dim), p._mask)
        if type(p) in (dist.TransformedDistribution, torch.distributions.TransformedDistribution):
            return dist.TransformedDistribution(self._move(p.base_dist, path, batch_dim), p.transforms)
        given = {name: getattr(p, name) for name in _constructor_names(p)}
        moved = {name: self._move_argument(p, name, value, (*path, name), batch_dim) for name, value in given.items()}
        return type(p)(**moved) if any(moved[name] is not given[name] for name in given) else p

    def _move_argument(self, p: Any, name: str, value: Any, path: tuple[str, ...], batch_dim: int) -> Any:
        if isinstance(value, torch.distributions.Distribution):
            return self._move(value, path, batch_dim)
        if not isinstance(value, Tensor) or not value.is_floating_point() or name not in p.arg_constraints:
            return value
        constraint = p.arg_constraints[name]
        try:
            to_constrained = transform_to(constraint)
        except NotImplementedError:  # the constraint depends on other parameters, or has no map from real numbers
            return value
        full = p.batch_shape + value.shape[value.dim() - constraint.event_dim :]
        unconstrained = to_constrained.inv(value.expand(full))
        return to_constrained(unconstrained + self._offset(path, unconstrained, batch_dim))

    def _offset(self, path: tuple[str, ...], parameter: Tensor, batch_dim: int) -> Tensor:
        # The same for all samples: without their dimension.
        shape = parameter.shape[max(0, batch_dim - self.max_plate_nesting) :]
        offset = self.by_path.get(path)
        if offset is None:
            offset = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
            self.by_path[path] = offset
        elif offset.shape != shape:
            raise ValueError(
                f'site "{path[0]}" was refined for other data: offsets of shape {tuple(offset.shape)} do not fit '
                f"{tuple(shape)}. Call the refined guide with the same data, all at once; where data are taken in "
                "chunks, use the proposal estimators.Refined() instead."
            )
        return offset


def _constructor_names(p: Any) -> list[str]:
    """Returns the names of the constructor arguments that rebuild a distribution, one for each parameter."""
    names = signature(type(p)).parameters
    # First those that the object stores; some classes, such as mixtures, have a property over a private attribute.
    stored = [name for name in names if name in vars(p) or f"_{name}" in vars(p) and hasattr(p, name)]
    stored = stored or [name for name in names if hasattr(p, name)]
    for chosen, same in (("logits", ("probs",)), ("scale_tril", ("covariance_matrix", "precision_matrix"))):
        if chosen in stored:
            stored = [name for name in stored if name not in same]
    return stored
