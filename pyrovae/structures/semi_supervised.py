"""A VAE of data with labels for some of them, and its loss."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyrovae.arguments import row_name
from pyrovae.distributions import center
from pyrovae.inference.messages import check_later
from pyrovae.nn import MLP, Network, apply, build
from pyrovae.parts import (
    call,
    check_equal,
    check_length,
    check_roles,
    check_spaces,
    in_evaluation_mode,
    likelihood_at,
    takes_context,
)
from pyrovae.vae import Registered


class SemiSupervisedVAE(Registered):
    r"""A VAE with a latent class that is known for some of the data: the model M2 of Kingma et al.

    .. math:: p(x, y, z) = p(y)\, p(z)\, p(x \mid y, z), \qquad q(y, z \mid x) = q(y \mid x)\, q(z \mid x, y)

    ``vae.model`` and ``vae.guide`` take ``(x, y=None)``, with y of shape ``(batch,)``: a class from 0 to ``num_classes
    - 1``, or -1 where it is unknown. ``log_marginal(vae.model, vae.guide, x, y)`` estimates log p(x, y) where y is
    known and log p(x) where it is unknown. Train with :class:`ClassifierELBO`, or Pyro's
    ``TraceEnum_ELBO(max_plate_nesting=1)``: they sum over the classes. Other losses draw one class, and their gradients
    have a large variance.

    The class at site "y" is latent for all data. Where it is known, the guide draws "y" from p(y), as the model does:
    the two terms cancel, the draw is not used, and the known class is observed at the site "label".

    Args:
        prior: ``prior(context)`` returns :math:`p(z)`, or with ``context_dim=num_classes`` :math:`p(z \mid y)`.
        likelihood: ``likelihood(z, context)`` returns :math:`p(x \mid y, z)`; built with ``context_dim=num_classes``,
            because the context is the class as a one-hot vector.
        encoder: ``encoder(x, context)`` returns :math:`q(z \mid x, y)`, or without ``context_dim`` :math:`q(z \mid x)`.
        classifier: the network of :math:`q(y \mid x)`, a module that returns one logit a class, or a callable that
            builds one from ``(x_shape, num_classes)``.
        num_classes: number of classes.
        class_probs: :math:`p(y)`, positive numbers that sum to one, one a class; uniform by default.

    Raises:
        ValueError: when the parts have different sizes or spaces, or neither prior nor likelihood takes the class;
            when a class is out of range, or y does not have one class a datum.

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

    class_probs: Tensor

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
                "The data do not depend on the class. Build the likelihood (or the prior) with "
                f"context_dim={num_classes}."
            )
        probs = torch.full((num_classes,), 1 / num_classes) if class_probs is None else torch.tensor(class_probs)
        if probs.shape != (num_classes,) or not bool((probs > 0).all()) or abs(probs.sum().item() - 1) > 1e-5:
            raise ValueError(f"class_probs must be {num_classes} positive numbers that sum to one, got {class_probs}.")
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder
        self.num_classes = num_classes
        x_shape: Any = likelihood.x_shape
        self.classifier = build(classifier, x_shape, num_classes, 0)
        self.register_buffer("class_probs", probs / probs.sum(), persistent=False)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        """The generative process: latents at sites "y" and "z", the data at "x", and known classes at "label"."""
        self.register()
        known, y = self._classes(x, y)
        with pyro.plate("data", len(x)):
            drawn = pyro.sample("y", dist.Categorical(self.class_probs))
            with poutine.mask(mask=known):  # type: ignore[call-overload]  # no Tensor is a BoolTensor
                pyro.sample("label", dist.Categorical(self.class_probs), obs=y)
            context = self._context(torch.where(known, y, drawn))
            z = pyro.sample("z", call(self.prior, context=context))
            pyro.sample("x", likelihood_at(self.likelihood, z, context), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """The classifier where the class is unknown, and the amortised posterior of the latents."""
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

        Runs in evaluation mode, with gradients; inside Pyro's handlers, as in training, in the current mode.
        """
        return dist.Categorical(logits=apply(self.classifier, x, None, (self.num_classes,), "classifier"))

    @torch.no_grad()
    @in_evaluation_mode
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Returns the accuracy of the classifier, in evaluation mode.

        Args:
            x: data, shape ``(batch, *x_shape)``.
            y: their classes, shape ``(batch,)``; data of an unknown class (-1) are left out.

        Raises:
            ValueError: when y holds no known class.
        """
        known, y = self._classes(x, y)
        if not bool(known.any()):
            raise ValueError("y holds no known class, which accuracy needs. Give the classes of some of the data.")
        right = self.classify(x).logits.argmax(-1) == y
        return right[known].double().mean().item()

    @torch.no_grad()
    @in_evaluation_mode
    def sample(self, num_samples: int, y: Tensor | None = None) -> Tensor:
        """Draws from p(x), or from p(x | y) for given classes, with the noise of the likelihood.

        Args:
            num_samples: number of draws; with classes, number for each of them.
            y: classes, shape ``(batch,)``, or None; for -1 a class is drawn.

        Returns:
            Shape ``(num_samples, *x_shape)``, or ``(num_samples, batch, *x_shape)`` with classes.
        """
        return self.decode_from_prior(num_samples, y).sample()

    @torch.no_grad()
    @in_evaluation_mode
    def decode_from_prior(self, num_samples: int, y: Tensor | None = None) -> dist.TorchDistribution:
        r"""Returns :math:`p(x \mid y, z)` at draws of z and of unknown classes: :meth:`sample` draws x from it."""
        drawn = dist.Categorical(self.class_probs).sample((num_samples,))
        if y is not None:
            known, y = self._classes(y, y)
            drawn = torch.where(known, y, dist.Categorical(self.class_probs).sample((num_samples, len(y))))
        context = self._context(drawn)
        prior = call(self.prior, context=context).expand(drawn.shape)
        return likelihood_at(self.likelihood, prior.sample(), context)

    @torch.no_grad()
    @in_evaluation_mode
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        r"""Returns the centre of :math:`p(x' \mid y, z)` at one draw of z and of unknown classes given x.

        Args:
            x: data, shape ``(batch, *x_shape)``.
            y: their classes, shape ``(batch,)``, -1 where unknown; None if all are.
        """
        known, y = self._classes(x, y)
        context = self._context(torch.where(known, y, self.classify(x).sample()))
        return center(likelihood_at(self.likelihood, call(self.encoder, x, context=context).sample(), context))

    def _classes(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns a mask of known classes, and the classes with zero for unknown ones, both of shape ``(batch,)``."""
        if y is None:
            y = torch.full((len(x),), -1, device=x.device)
        check_length("y", y, x)
        if y.dim() != 1 or y.is_floating_point():
            raise ValueError(f"y must hold one integer a datum, shape ({len(x)},), got {tuple(y.shape)} of {y.dtype}.")
        wrong = (y < -1) | (y >= self.num_classes)
        if not check_later(~wrong.any()) and bool(wrong.any()):
            raise ValueError(
                f"y must hold classes from 0 to {self.num_classes - 1}, or -1 where the class is unknown, but holds "
                f"{int(y[wrong][0])} in {row_name(int(wrong.nonzero()[0]))}."
            )
        return y >= 0, y.clamp(0, self.num_classes - 1).long()

    def _context(self, y: Tensor) -> Tensor:
        # As one_hot, which reads the classes to check them, and a graph cannot.
        classes = torch.arange(self.num_classes, device=y.device)
        return (y.unsqueeze(-1) == classes).to(self.class_probs.dtype)


class ClassifierELBO(TraceEnum_ELBO):
    r"""The loss of a :class:`SemiSupervisedVAE`: the negative ELBO plus the cross entropy of the known classes.

    .. math:: \mathrm{loss} = -\sum_n \mathrm{ELBO}_n - \alpha \sum_{n\,:\,y_n\ \mathrm{known}} \log q(y_n \mid x_n)

    The ELBO sums over the classes. Where the class is known, the ELBO does not depend on the classifier; with the
    second term, the classifier learns from these data too. :math:`\alpha` weighs the loss and is not part of the model.

    Args:
        classify: ``vae.classify``; ``classify(x)`` returns the Categorical distribution q(y | x).
        weight: :math:`\alpha`, nats of loss for a nat of cross entropy, at least 0. Choose it by validation: with few
            labels the best may be hundreds (300 for the digits of ``examples/semi_supervised.py``). The paper uses a
            tenth of the ratio of all data to those with a class.
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
        """Returns an estimate of the loss, and adds its gradient to those of the parameters."""
        value = self.differentiable_loss(model, guide, *args, **kwargs)
        value.backward()
        return value.item()

    def _cross_entropy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            return x.new_zeros(())
        with poutine.block():  # `classify` runs in evaluation mode unless a handler is active
            logits = self.classify(x).logits
        target = y.long().clamp(max=logits.shape[-1] - 1)  # the model says what is wrong with larger ones
        return self.weight * cross_entropy(logits, target, ignore_index=-1, reduction="sum")
