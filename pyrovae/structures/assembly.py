"""Structures as an option of the command line: how a VAE is put together of parts that are given as callables."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from pyro.infer import ELBO
from torch import Tensor

from pyrovae.encoders import DiagonalNormal, Encoder
from pyrovae.likelihoods import Likelihood
from pyrovae.nn import MLP, GatedTransition, Network, Shape
from pyrovae.priors import Prior
from pyrovae.structures.hierarchies import DenseHierarchicalVAE, HierarchicalVAE, LadderVAE
from pyrovae.structures.missing import MissingDataVAE
from pyrovae.structures.recurrent import ForwardGRU, RecurrentVAE
from pyrovae.structures.semi_supervised import ClassifierELBO, SemiSupervisedVAE
from pyrovae.structures.state_space import BackwardGRU, StateSpaceVAE
from pyrovae.vae import Registered


def class_of(part: Any) -> Any:
    """Returns the class that a callable builds, or the callable itself where that is not known."""
    # jsonargparse gives a partial of a function of its own, which has the class among its arguments.
    return next((a for a in getattr(part, "args", ()) if isinstance(a, type)), getattr(part, "func", part))


def make_prior(prior: Callable[..., Prior], latent_dim: int, encoder: Encoder) -> Prior:
    """Returns the prior that a callable builds from `latent_dim`, or from `encoder` if its first argument is that."""
    first = next(iter(inspect.signature(class_of(prior)).parameters))
    return prior(encoder if first == "encoder" else latent_dim)


class Structure(ABC):
    """How a VAE other than :class:`pyrovae.VAE` is put together: ``pyrovae train --structure``.

    A subclass has arguments of its own, and implements :meth:`build`.
    """

    @abstractmethod
    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> Registered:
        """Returns the VAE, with new weights.

        Args:
            x_shape: shape of a datum.
            latent_dim: number of latent dimensions.
            prior: called with a number of latent dimensions, or with the encoder if its first argument has this name.
            likelihood: called with a number of latent dimensions and a shape of data.
            encoder: called with a shape and a number of latent dimensions.
        """

    def loss(self, vae: Any, labels: Tensor | None) -> ELBO | None:
        """Returns the loss of a training run that names none; None for Pyro's ``Trace_ELBO``.

        Args:
            vae: what :meth:`build` returned.
            labels: classes of the training data, -1 where they are unknown, or None.
        """
        return None


class Incomplete(Structure):
    """A :class:`MissingDataVAE`, for data with NaN where an element is missing.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = Incomplete().build((3,), 2, priors.StandardNormal, likelihoods.Normal, encoders.DiagonalNormal)
    >>> vae.encoder.x_shape
    (2, 3)
    """

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> MissingDataVAE:
        shape = x_shape if isinstance(x_shape, tuple) else (x_shape,)
        # Images keep their three dimensions, which networks of images need.
        both = (2 * shape[0], *shape[1:]) if len(shape) == 3 else (2, *shape)
        q = encoder(both, latent_dim)
        return MissingDataVAE(make_prior(prior, latent_dim, q), likelihood(latent_dim, x_shape), q)


class Hierarchy(Structure):
    r"""A :class:`HierarchicalVAE`: further levels of latents above the first, which has `latent_dim` dimensions.

    Args:
        above: numbers of latent dimensions of the levels above the first, from the bottom to the top.
        conditional: the class of :math:`p(z_l \mid z_{l+1})`, and of :math:`q(z_l \mid z_{l-1})` above the first level.

    Raises:
        ValueError: when there is no level above the first.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> parts = priors.StandardNormal, likelihoods.Bernoulli, encoders.DiagonalNormal
    >>> vae = Hierarchy([4, 2]).build((1, 8, 8), 16, *parts)
    >>> [q.latent_dim for q in vae.encoders]
    [16, 4, 2]
    """

    def __init__(self, above: Sequence[int], conditional: Callable[[int, int], Encoder] = DiagonalNormal):
        self.above, self.conditional = _levels(above), conditional

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> HierarchicalVAE:
        dims = [latent_dim, *self.above]
        pairs = list(pairwise(dims))
        encoders = [encoder(x_shape, latent_dim), *(self.conditional(below, above) for below, above in pairs)]
        conditionals = [self.conditional(above, below) for below, above in pairs]
        return HierarchicalVAE(
            make_prior(prior, dims[-1], encoders[-1]), conditionals, likelihood(latent_dim, x_shape), encoders
        )


class Ladder(Structure):
    r"""A :class:`LadderVAE`: levels of latents as those of :class:`Hierarchy`, inferred from the top down.

    The encoder is built once for each level, on the output of the network of that level.

    Args:
        above: numbers of latent dimensions of the levels above the first, from the bottom to the top.
        widths: sizes of the outputs of the networks, one a level, from the bottom to the top.
        network: the class of the networks, each of which takes the output of the one below.
        conditional: the class of :math:`p(z_l \mid z_{l+1})`, a diagonal normal.

    Raises:
        ValueError: when there is no level above the first, or not one width a level.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> parts = priors.StandardNormal, likelihoods.Bernoulli, encoders.DiagonalNormal
    >>> vae = Ladder([4], widths=[64, 32]).build((1, 8, 8), 16, *parts)
    >>> [q.x_shape for q in vae.encoders]
    [(64,), (32,)]
    """

    def __init__(
        self,
        above: Sequence[int],
        widths: Sequence[int],
        network: Network = MLP,
        conditional: Callable[[int, int], Encoder] = DiagonalNormal,
    ):
        self.above, self.network, self.conditional = _levels(above), network, conditional
        self.widths = list(widths)
        if len(self.widths) != len(self.above) + 1:
            raise ValueError(
                f"widths must be one number a level, {len(self.above) + 1} with the first, got {self.widths}."
            )

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> LadderVAE:
        dims = [latent_dim, *self.above]
        inputs: list[Shape] = [x_shape, *self.widths]
        networks = [self.network(x, d) for x, d in zip(inputs, self.widths, strict=False)]
        encoders = [encoder(width, dim) for width, dim in zip(self.widths, dims, strict=True)]
        conditionals = [self.conditional(above, below) for below, above in pairwise(dims)]
        p = make_prior(prior, dims[-1], encoders[-1])
        return LadderVAE(p, conditionals, likelihood(latent_dim, x_shape), networks, encoders)


class DenseHierarchy(Structure):
    r"""A :class:`DenseHierarchicalVAE`: levels as those of :class:`Hierarchy`, of which every part sees all above it.

    The encoder is built once for each level, on the data, below the top with the levels above as its context.

    Args:
        above: numbers of latent dimensions of the levels above the first, from the bottom to the top.
        conditional: the class of :math:`p(z_l \mid z_{l+1}, \dots, z_L)`.

    Raises:
        ValueError: when there is no level above the first.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> parts = priors.StandardNormal, likelihoods.Bernoulli, encoders.DiagonalNormal
    >>> vae = DenseHierarchy([4, 2]).build((1, 8, 8), 16, *parts)
    >>> vae.likelihood.latent_dim, [q.context_dim for q in vae.encoders]
    (22, [6, 2, 0])
    """

    def __init__(self, above: Sequence[int], conditional: Callable[[int, int], Encoder] = DiagonalNormal):
        self.above, self.conditional = _levels(above), conditional

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> DenseHierarchicalVAE:
        dims = [latent_dim, *self.above]
        widths = [sum(dims[level:]) for level in range(len(dims) + 1)]  # of the levels from each to the top
        top = encoder(x_shape, dims[-1])  # it shows whether the encoder is to take a context besides
        encoders = [
            encoder(x_shape, d, context_dim=n + top.context_dim) for d, n in zip(dims, widths[1:-1], strict=False)
        ]
        encoders.append(top)
        conditionals = [self.conditional(seen, dim) for dim, seen in zip(dims[:-1], widths[1:-1], strict=True)]
        p = make_prior(prior, dims[-1], encoders[-1])
        return DenseHierarchicalVAE(p, conditionals, likelihood(widths[0], x_shape), encoders)


class SemiSupervised(Structure):
    r"""A :class:`SemiSupervisedVAE`, for data with labels, -1 where the class is unknown.

    Likelihood and encoder are built with ``context_dim=num_classes``. Without another loss, the VAE is trained on its
    :class:`ClassifierELBO`.

    Args:
        num_classes: number of classes.
        classifier: the class of the network of :math:`q(y \mid x)`.
        weight: weight of the cross entropy of the known classes; null for a tenth of the ratio of all training data to
            those with a class, as in the paper. With few labels the best may be hundreds: choose it by validation.

    Raises:
        ValueError: when likelihood or encoder is given another ``context_dim``.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> parts = priors.StandardNormal, likelihoods.Bernoulli, encoders.DiagonalNormal
    >>> vae = SemiSupervised(num_classes=10).build((1, 8, 8), 16, *parts)
    >>> vae.likelihood.context_dim
    10
    """

    def __init__(self, num_classes: int, classifier: Network = MLP, weight: float | None = None):
        self.num_classes, self.classifier, self.weight = num_classes, classifier, weight

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> SemiSupervisedVAE:
        for name, part in (("likelihood", likelihood), ("encoder", encoder)):
            given = getattr(part, "keywords", {}).get("context_dim", 0)  # of a partial, which the command line gives
            if given not in (0, self.num_classes):
                raise ValueError(
                    f"{name}.context_dim is {given}, but SemiSupervised gives the {name} the {self.num_classes} "
                    "classes as its context. Leave it out."
                )
        q = encoder(x_shape, latent_dim, context_dim=self.num_classes)
        p = likelihood(latent_dim, x_shape, context_dim=self.num_classes)
        made = make_prior(prior, latent_dim, q)
        return SemiSupervisedVAE(made, p, q, self.classifier, num_classes=self.num_classes)

    def loss(self, vae: SemiSupervisedVAE, labels: Tensor | None) -> ELBO:
        """Returns the :class:`ClassifierELBO`.

        Raises:
            ValueError: when no class is known.
        """
        num_known = 0 if labels is None else int((labels >= 0).sum())
        if labels is None or not num_known:
            raise ValueError(
                "SemiSupervised needs the classes of some training data. Give an .npz file with an array y of classes, "
                "-1 where unknown, or a folder with a subfolder for each class."
            )
        return ClassifierELBO(vae.classify, 0.1 * len(labels) / num_known if self.weight is None else self.weight)


class Recurrent(Structure):
    r"""A :class:`RecurrentVAE`, for sequences: data of shape ``(time, ...)``, with NaN at steps that are not there.

    The prior, the likelihood and the encoder are those of a step, and are built with the memory as their context.

    Args:
        width: units of the memory, a :class:`ForwardGRU`.
        memory: steps over which the longest memories last at the start of training.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> vae = Recurrent(width=32).build((50, 3), 4, priors.DiagonalNormal, likelihoods.Normal, encoders.DiagonalNormal)
    >>> vae.likelihood.x_shape, vae.prior.context_dim
    ((3,), 32)
    """

    def __init__(self, width: int = 128, memory: int = 20):
        self.width, self.memory = width, memory

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> RecurrentVAE:
        step = _step_of(x_shape, "Recurrent")
        _check_prior_of_memory("Recurrent", prior)
        return RecurrentVAE(
            prior(latent_dim, context_dim=self.width),
            likelihood(latent_dim, step, context_dim=self.width),
            encoder(step, latent_dim, context_dim=self.width),
            ForwardGRU(step, latent_dim, self.width, self.memory),
        )


class StateSpace(Structure):
    r"""A :class:`StateSpaceVAE`, for sequences: data of shape ``(time, ...)``, with NaN at steps that are not there.

    The likelihood is that of a step. The encoder gives the state of a step from the state before it, with what the
    recurrence read of this step and of all after it as its context.

    Args:
        width: units of the recurrence, a :class:`BackwardGRU`, and of the memory.
        transition: the class of :math:`p(z_t \mid z_{t-1})`; ``encoders.DiagonalNormal`` with a
            :class:`~pyrovae.nn.GatedTransition` if None.
        autoregressive: whether the steps depend on a memory of the data before them too, a :class:`ForwardGRU`; the
            prior, the transition and the likelihood are then built with it as their context.

    >>> from pyrovae import encoders, likelihoods, priors
    >>> parts = priors.StandardNormal, likelihoods.Normal, encoders.DiagonalNormal
    >>> StateSpace(width=32).build((50, 3), 4, *parts).likelihood.x_shape
    (3,)
    """

    def __init__(
        self, width: int = 128, transition: Callable[..., Encoder] | None = None, autoregressive: bool = False
    ):
        self.width, self.autoregressive = width, autoregressive
        self.transition = partial(DiagonalNormal, network=GatedTransition) if transition is None else transition

    def build(
        self,
        x_shape: Shape,
        latent_dim: int,
        prior: Callable[..., Prior],
        likelihood: Callable[..., Likelihood],
        encoder: Callable[..., Encoder],
    ) -> StateSpaceVAE:
        step = _step_of(x_shape, "StateSpace")
        summaries = BackwardGRU(step, self.width)
        if self.autoregressive:
            _check_prior_of_memory("StateSpace with autoregressive=True", prior)
            return StateSpaceVAE(
                prior(latent_dim, context_dim=self.width),
                self.transition(latent_dim, latent_dim, context_dim=self.width),
                likelihood(latent_dim, step, context_dim=self.width),
                encoder(latent_dim, latent_dim, context_dim=2 * self.width),
                summaries,
                ForwardGRU(step, 0, self.width),
            )
        q = encoder(latent_dim, latent_dim, context_dim=self.width)
        p = likelihood(latent_dim, step)
        return StateSpaceVAE(make_prior(prior, latent_dim, q), self.transition(latent_dim, latent_dim), p, q, summaries)


def _check_prior_of_memory(name: str, prior: Callable[..., Prior]) -> None:
    """Raises a ValueError if a prior takes no context."""
    if "context_dim" not in inspect.signature(class_of(prior)).parameters:
        raise ValueError(
            f"{name} needs a prior that takes the memory as its context, and {class_of(prior).__name__} takes none. "
            "Take --prior DiagonalNormal."
        )


def _step_of(x_shape: Shape, name: str) -> tuple[int, ...]:
    """Returns the shape of a step of sequences."""
    shape = x_shape if isinstance(x_shape, tuple) else (x_shape,)
    if len(shape) < 2:
        raise ValueError(
            f"{name} is for sequences, of shape (time, features), but a datum has shape {shape}. Give series of one "
            "feature a dimension for it: x[..., None]."
        )
    return shape[1:]


def _levels(above: Sequence[int]) -> list[int]:
    if not above or any(dim < 1 for dim in above):
        raise ValueError(f"above must be one or more numbers of latent dimensions, each at least 1, got {list(above)}.")
    return list(above)
