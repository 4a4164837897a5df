"""Likelihoods of sequences whose steps depend on the steps before, and of images as sequences of pixels."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.likelihoods.base import Likelihood
from pyrovae.likelihoods.discrete import Categorical
from pyrovae.nn import MLP, GatedPixelCNN, Network, RecurrentDecoder, SequenceDecoder, Shape, as_shape
from pyrovae.nn.base import check_count


class Autoregressive(Likelihood):
    r"""Sequences whose steps depend on the latent and on the steps before: language, music, series of numbers.

    .. math:: p(x \mid z) = \prod_{t=1}^T p(x_t \mid h_t), \qquad h_t = \mathrm{network}_t(z, x_1, \dots, x_{t-1})

    The distribution of a step is any likelihood, whose latent is :math:`h_t`: classes, binary vectors, mixtures of
    logistics, heavy tails. All steps are scored in one pass, and drawn one after the other.

    Sequences of classes of different lengths have a class `end`, after which all classes are `end` too, with
    probability one: they are padded with it, and log p(x) needs no lengths. A sequence of T steps without `end` goes
    on after them.

    A decoder that predicts well from the steps before may ignore the latent ("posterior collapse"). With
    `step_dropout`, the network does not read some steps, chosen at random, while it is trained; the loss is then
    no bound of log p(x). Scores and draws read all steps.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one sequence, ``(T, *step_shape)``, or ``(T,)`` for a number a step.
        network: the decoder, a :class:`pyrovae.nn.SequenceDecoder` or a callable that builds one from
            ``(latent_dim, x_shape)``.
        output: a callable that builds the likelihood of a step from ``(width, step_shape)``; it gets `num_classes`, if
            that is given. None for :class:`Categorical` with an affine network.
        num_classes: number of classes of the numbers of a step; None for numbers that are no classes.
        end: the class that ends a sequence, for one class a step; None if sequences do not end.
        step_dropout: probability that a step is not read in training ("word dropout").
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `output` is None without `num_classes`; when `end` is no class, or a step is more than one
            class; when `step_dropout` is not from 0 to 1; when the network has other features than `output` takes.
        TypeError: when the network is no :class:`pyrovae.nn.SequenceDecoder`.

    References:
        Generating Sentences from a Continuous Space, S. R. Bowman et al., 2016, https://arxiv.org/abs/1511.06349.

    >>> import torch
    >>> from pyrovae.likelihoods import StudentT
    >>> Autoregressive(2, 20, num_classes=30, end=0)(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 20])
    >>> Autoregressive(2, (20, 3), output=StudentT)(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 20, 3])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = RecurrentDecoder,
        output: Callable[[int, Shape], Likelihood] | None = None,
        num_classes: int | None = None,
        end: int | None = None,
        step_dropout: float = 0.0,
        context_dim: int = 0,
    ):
        nn.Module.__init__(self)  # not Likelihood's: the network reads x too, and the output has a decoder of its own
        self.latent_dim, self.x_shape = check_count(latent_dim, "latent_dim"), as_shape(x_shape, "x_shape")
        self.context_dim, self.num_classes = context_dim, num_classes
        if output is None:
            if num_classes is None:
                raise ValueError(
                    "output or num_classes must be given: output=likelihoods.Normal for real numbers, num_classes for "
                    "classes."
                )
            output = partial(Categorical, network=partial(MLP, hidden=()))
        if end is not None and (num_classes is None or len(self.x_shape) != 1 or not 0 <= end < num_classes):
            raise ValueError(
                f"end must be one of the classes of sequences of one class a step, got {end} for num_classes="
                f"{num_classes} and x_shape {self.x_shape}."
            )
        if not 0 <= step_dropout <= 1:
            raise ValueError(f"step_dropout must be a probability, from 0 to 1, got {step_dropout}.")
        self.end, self.step_dropout = end, step_dropout
        classes = {} if num_classes is None else {"num_classes": num_classes}
        keywords = {"context_dim": context_dim} if context_dim else {}
        if not isinstance(network, nn.Module):
            network = network(latent_dim, self.x_shape, **classes, **keywords)
        if not isinstance(network, SequenceDecoder):
            raise TypeError(
                f"network must be a pyrovae.nn.SequenceDecoder, such as RecurrentDecoder or TransformerDecoder, got "
                f"{type(network).__name__}."
            )
        if network.num_classes != num_classes:
            raise ValueError(
                f"the network must have num_classes={num_classes}, as the likelihood has, got {network.num_classes}."
            )
        self.network: SequenceDecoder = network
        self.output: Likelihood = output(network.out_shape[1], network.step_shape, **classes)  # type: ignore[arg-type]

    def forward(self, z: Tensor, context: Tensor | None = None) -> distributions.Autoregressive:
        condition = self.network.condition(z, context)
        dropout = self.step_dropout if self.training else 0.0
        return distributions.Autoregressive(self.network, self.output, condition, self.x_shape, self.end, dropout)

    def start_at(self, x: Any) -> "Autoregressive":
        r"""Initialises the bias of the output from data, so that each step has about the distribution of all steps.

        Args:
            x: the training data, ``(size, *x_shape)``.

        Returns:
            The likelihood itself.
        """
        x = self._check_data(x)
        steps = self.network.steps_of(x).flatten(0, 1)
        if self.end is not None:
            steps = steps[~distributions.has_ended(x, self.end).flatten()]
        self.output.start_at(steps)
        return self


class PixelCNN(Autoregressive):
    r"""Images whose pixels depend on the latent and on the pixels above and to the left: sharp samples, and a density.

    .. math:: p(x \mid z) = \prod_{t=1}^{H W} p(x_t \mid h_t), \qquad h_t = \mathrm{network}_t(z, x_1, \dots, x_{t-1})

    Pixels are in rows, from left to right. The distribution of a pixel is any likelihood, whose latent is :math:`h_t`:
    :class:`Bernoulli`, :class:`DiscretizedLogisticMixture` for grey levels, :class:`Categorical` by `num_classes`. All
    pixels are scored in one pass, and drawn one after the other. The channels of a pixel are independent given
    :math:`h_t`, unless its distribution is an :class:`Autoregressive` over channels.

    Pixels beside each other are so alike that the network may ignore the latent ("posterior collapse"): see
    :class:`pyrovae.nn.GatedPixelCNN`.

    Args:
        latent_dim: number of latent dimensions.
        x_shape: shape of one image, ``(*channels, height, width)``, with at least one dimension of channels.
        network: the decoder, or a callable that builds one from ``(latent_dim, x_shape)``.
        output: a callable that builds the likelihood of a pixel from ``(width, channels)``; it gets `num_classes`, if
            that is given. None for :class:`Categorical` with an affine network.
        num_classes: number of classes of the numbers of a pixel; None for numbers that are no classes.
        step_dropout: probability that a pixel is not read in training; the loss is then no bound of log p(x).
        context_dim: width of the context vector, 0 for none.

    Raises:
        ValueError: when `output` is None without `num_classes`; when `x_shape` is not that of an image; when
            `step_dropout` is not from 0 to 1; when the network has other features than `output` takes.
        TypeError: when the network is no :class:`pyrovae.nn.SequenceDecoder`.

    References:
        Conditional Image Generation with PixelCNN Decoders, A. van den Oord et al., 2016,
        https://arxiv.org/abs/1606.05328.
        PixelVAE: A Latent Variable Model for Natural Images, I. Gulrajani et al., 2017,
        https://arxiv.org/abs/1611.05013.

    >>> import torch
    >>> from pyrovae.likelihoods import Bernoulli
    >>> PixelCNN(2, (1, 8, 8), output=Bernoulli)(torch.zeros(5, 2)).sample().shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        x_shape: Shape,
        network: Network = GatedPixelCNN,
        output: Callable[[int, Shape], Likelihood] | None = None,
        num_classes: int | None = None,
        step_dropout: float = 0.0,
        context_dim: int = 0,
    ):
        super().__init__(latent_dim, x_shape, network, output, num_classes, None, step_dropout, context_dim)
        if not self.network.image:
            raise ValueError(f"network must be one of images, such as GatedPixelCNN, got {type(network).__name__}.")
