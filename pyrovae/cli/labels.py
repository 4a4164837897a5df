"""Labels and contexts of data in the command line: what a model and a guide take beside x, and what log p is of."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyrovae.data import Rows, Schema, Split, split_missing
from pyrovae.distributions import center
from pyrovae.inference.messages import check_finite
from pyrovae.parts import context_size
from pyrovae.structures import MissingDataVAE, SemiSupervisedVAE, SequenceVAE, TableFeatures

_NUM_NAMED = 4  # columns of a context that are named


def scored(vae: Any, schema: Schema | None = None) -> str:
    """Returns in words what log p of a VAE is of, given :func:`arguments_of`."""
    if schema is not None:
        names = schema.context_names
        more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
        return f"log p(x | {', '.join(names[:_NUM_NAMED])}{more})" if names else "log p(x)"
    if isinstance(vae, SemiSupervisedVAE):
        return "log p(x, label), and log p(x) where the label is unknown"
    return "log p(x | label)" if context_size(vae) else "log p(x)"


def note_on(vae: Any, schema: Schema | None = None) -> str:
    """Returns a line to be printed after an estimate of log p(x), where it is of something else."""
    what = scored(vae, schema)
    return "" if what == "log p(x)" else f"\nhere log p(x) stands for {what}"


def context_of(schema: Schema, cells: Tensor | None) -> tuple[Tensor, ...]:
    """Returns the context of rows as the model of a table takes it, or nothing if it takes none.

    Args:
        schema: the columns.
        cells: the encoded cells of the context, ``(rows, len(schema.context))``, NaN where missing; None if it is none.
    """
    return () if cells is None else (TableFeatures(schema.context)(*split_missing(cells)),)


def arguments_of(vae: Any, part: Split, schema: Schema | None = None) -> tuple[Any, ...]:
    """Returns what the model and the guide of a VAE take, for a part of its data.

    That is x, of a :class:`MissingDataVAE` which elements are observed, of a :class:`SequenceVAE` which steps; then, if
    its parts take a context, labels as one-hot vectors, or of a table the features of the columns that it conditions
    on. A :class:`SemiSupervisedVAE` takes x and the labels themselves.

    Args:
        vae: the VAE.
        part: the data, with labels if the VAE takes them.
        schema: the columns of a table; None for other data.

    Raises:
        ValueError: when a context is needed and the labels do not give one.
    """
    x, labels = part
    assert x is not None
    if isinstance(vae, SemiSupervisedVAE):
        unknown = torch.full((len(x),), -1)
        return x, (unknown if labels is None else labels).to(_device_of(x))
    if isinstance(vae, MissingDataVAE | SequenceVAE) and isinstance(x, Rows):
        raise ValueError("data with missing elements must be in memory, and a file of this size stays on the disk.")
    if isinstance(vae, SequenceVAE):
        if context_size(vae):
            raise ValueError("steps of sequences have no context in the command line. Leave out context_dim.")
        return split_steps(x, part.rows)
    if isinstance(x, Tensor) and not isinstance(vae, MissingDataVAE):
        check_finite("the data", x)
    args = split_missing(x) if isinstance(vae, MissingDataVAE) else (x,)
    if schema is not None:
        return (*args, *(c.to(_device_of(x)) for c in context_of(schema, part.context)))
    return (*args, *given(vae, labels, _device_of(x)))


def split_steps(x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns sequences, with a value of theirs in place of steps that are NaN, and which steps are not.

    Args:
        x: sequences, ``(size, time, ...)``.
        rows: their numbers in the file, for messages; None for those in x, counted from 0.

    Raises:
        ValueError: when some elements of a step are NaN and others are not, or a sequence is all NaN.
    """
    rows = torch.arange(len(x)) if rows is None else rows
    missing = x.isnan().flatten(2) if x.dim() > 2 else x.isnan().unsqueeze(-1)
    some = missing.any(-1)
    mixed = some & ~missing.all(-1)
    if bool(mixed.any()):
        i, t = (int(index) for index in mixed.nonzero()[0])
        raise ValueError(
            f"step {t} of sequence {int(rows[i])} has NaN in some elements alone: steps are observed or missing as a "
            "whole. Fill the elements in, or take --structure Incomplete."
        )
    if bool(some.all(1).any()):
        raise ValueError(f"sequence {int(rows[int(some.all(1).nonzero()[0])])} is all NaN. Leave it out.")
    if not bool(some.any()):
        return x, ~some
    there = x[~some]  # in place of NaN, whose gradient is NaN where it is masked: a step that the likelihood takes
    return torch.where(some.view(*some.shape, *(1,) * (x.dim() - 2)), there[0], x), ~some


def given(vae: Any, labels: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
    """Returns labels as a VAE takes them: one-hot vectors for a context, classes, or nothing if it takes none.

    Args:
        vae: the VAE.
        labels: one class a datum, or None.
        device: where the result is to be.

    Raises:
        ValueError: when a context is needed and the labels do not give one.
    """
    if isinstance(vae, SemiSupervisedVAE):
        return () if labels is None else (labels.to(device),)
    size = context_size(vae)
    if not size:
        return ()
    if labels is None:
        raise ValueError(
            f"the parts take a context of {size} numbers, a label as a one-hot vector, but the data have no labels. "
            "Give an .npz file with an array y of classes, or leave out context_dim."
        )
    outside = labels[(labels < 0) | (labels >= size)]
    if len(outside):
        raise ValueError(
            f"the labels hold the class {int(outside[0])}, but the parts take a context of {size} classes, numbered "
            "from 0. Give context_dim the number of classes."
        )
    return (one_hot(labels, size).to(device, torch.get_default_dtype()),)


def to_draw(vae: Any, num_samples: int, label: int | None) -> tuple[Any, ...]:
    """Returns the arguments of ``vae.sample`` for a number of draws: the number, or 1 and the labels of the draws.

    Args:
        vae: the VAE.
        num_samples: number of draws.
        label: the class that all have; None for classes in turn if the VAE takes them as a context, otherwise for
            draws of the class too.

    Raises:
        ValueError: when the VAE takes no label, or not this one.
    """
    num_classes = check_label(vae, label)
    if label is None and (not num_classes or isinstance(vae, SemiSupervisedVAE)):
        return (num_samples,)
    labels = torch.arange(num_samples) % num_classes if label is None else torch.full((num_samples,), label)
    return 1, *given(vae, labels, next(vae.parameters()).device)


def draw(vae: Any, num_samples: int, label: int | None = None, *, mean: bool = False) -> Tensor:
    """Returns draws from p(x), or means of p(x | z) at draws of z from the prior, ``(num_samples, *x_shape)``.

    Args:
        vae: the VAE.
        num_samples: number of draws.
        label: as for :func:`to_draw`.
        mean: for means.
    """
    number, *labels = to_draw(vae, num_samples, label)
    p = vae.decode_from_prior(number, *labels)
    x = center(p) if mean else p.sample()
    return x[0] if labels else x


def check_label(vae: Any, label: int | None) -> int:
    """Checks that a label is one that a VAE takes; returns the number of its classes, 0 if it takes none."""
    num_classes = vae.num_classes if isinstance(vae, SemiSupervisedVAE) else context_size(vae)
    if label is not None and not num_classes:
        raise ValueError("label is for runs that take labels, with a context or semi-supervised. Leave it out.")
    if label is not None and not 0 <= label < num_classes:
        raise ValueError(f"label must be a class from 0 to {num_classes - 1}, got {label}.")
    return num_classes


def with_label(part: Split, label: int) -> Split:
    """Returns the data of one class.

    Raises:
        ValueError: when there are none.
    """
    if part.labels is None or not bool((part.labels == label).any()):
        raise ValueError(f"no data have the label {label}. Give another one, or data with labels.")
    here = part.labels == label
    return replace(part, x=part.x[:][here], labels=part.labels[here])


def of_x_alone(vae: Any, program: Callable, label: int | None) -> Callable:
    """Returns the model or the guide of a VAE as a program of whole x, all of one class if `label` is given.

    That of a table which takes a context is a program of x and the context.
    """

    def run(x: Tensor, *context: Tensor) -> Any:
        mask = (torch.ones_like(x, dtype=torch.bool),) if isinstance(vae, MissingDataVAE) else ()
        labels = None if label is None else torch.full((len(x),), label)
        return program(x, *mask, *(context or given(vae, labels, x.device)))

    return run


def _device_of(x: Any) -> torch.device:
    return x.device if isinstance(x, Tensor) else torch.device("cpu")
