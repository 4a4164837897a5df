"""Data sets with fixed splits, the usual preprocessing, and batches of data in memory."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyrovae.arguments import Arguments, as_arguments, canonicalize, count_data, take_rows, tensors_of, to_device
from pyrovae.inference.messages import check_finite

__all__ = ["Batches", "Split", "Splits", "dynamic_binarization", "load", "split_missing", "static_binarization"]


class Split(NamedTuple):
    """Data `x`, ``(size, *x_shape)``, float32, and `labels`, ``(size,)``, int64, or None where there are none."""

    x: Tensor
    labels: Tensor | None


class Splits(NamedTuple):
    """A data set's training, validation and test parts."""

    train: Split
    validation: Split
    test: Split


def load(name: str, root: str | Path = "data") -> Splits:
    """Loads a data set with its fixed splits, images scaled to [0, 1], each with `x` and `labels` (None without).

    ============================  =========================  ==========================================================
    name                          shape                      train / validation / test
    ============================  =========================  ==========================================================
    digits                        (1, 8, 8)                  1,197 / 300 / 300 of scikit-learn's, in a fixed shuffle
    mnist, fashion-mnist, kmnist  (1, 28, 28)                first 50,000 / last 10,000 of the training set / test set
    omniglot                      (1, 28, 28)                background: all but 1,345 / 1,345 by a fixed shuffle;
                                                             evaluation set: 13,180
    cifar10                       (3, 32, 32)                first 45,000 / last 5,000 of the training set / test set
    a file, .npy, .npz or .csv    as in the file             8/10, 1/10, 1/10 of the rows, in a fixed shuffle
    ============================  =========================  ==========================================================

    An ``.npz`` file may hold ``train``, ``validation`` and ``test`` arrays, which are then the splits, or one array;
    a ``.csv`` file holds numbers, with or without one line of names. Values are taken as they are.

    Args:
        name: a name in the table, or the path of a file.
        root: where torchvision's data sets are, or are downloaded to. IDX files may also lie there (or in ``raw``, or in
            ``<name>/raw``) still gzipped.

    Raises:
        ValueError: when there is no such data set, or a file holds no data, no numbers, NaN or infinity.
        FileNotFoundError: when there is no such file.

    >>> splits = load("digits")
    >>> splits.train.x.shape, splits.validation.x.shape, splits.test.x.shape
    (torch.Size([1197, 1, 8, 8]), torch.Size([300, 1, 8, 8]), torch.Size([300, 1, 8, 8]))
    """
    if name == "digits":
        from sklearn.datasets import load_digits  # slow to import

        bunch = load_digits()
        x = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
        return _shuffled(x, torch.from_numpy(bunch.target).long(), validation=300, test=300)
    if name in _TORCHVISION:
        return _torchvision(name, Path(root))
    if Path(name).suffix in (".npy", ".npz", ".csv"):
        return _from_file(Path(name))
    raise ValueError(
        f"there is no data set {name!r}. Name one of digits, {', '.join(_TORCHVISION)}, or a .npy, .npz or .csv file."
    )


def dynamic_binarization(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Draws binary pixels with grey values as probabilities, anew at each call; for ``fit(..., transform=...)``.

    Args:
        x: grey values between 0 and 1.
        *rest: what else the batch holds, returned as it is.

    Raises:
        ValueError: when a value is not between 0 and 1.

    References:
        On the Quantitative Analysis of Deep Belief Networks, R. Salakhutdinov and I. Murray, 2008,
        https://doi.org/10.1145/1390156.1390266.

    >>> dynamic_binarization(torch.tensor([0.0, 1.0]))
    (tensor([0., 1.]),)
    """
    _check_grey(x)
    return torch.bernoulli(x), *rest


def static_binarization(x: Tensor, seed: int = 0) -> Tensor:
    """Draws binary pixels with grey values as probabilities, once and for all: the same for the same seed.

    Args:
        x: grey values between 0 and 1.
        seed: of the draw.

    Raises:
        ValueError: when a value is not between 0 and 1.

    References:
        On the Quantitative Analysis of Deep Belief Networks, R. Salakhutdinov and I. Murray, 2008,
        https://doi.org/10.1145/1390156.1390266.

    >>> static_binarization(torch.tensor([0.0, 0.5, 0.5, 1.0]))
    tensor([0., 0., 1., 1.])
    """
    _check_grey(x)
    return torch.bernoulli(x, generator=torch.Generator(x.device).manual_seed(seed))


def split_missing(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits data with holes, where x is NaN, into data without and a mask; for :class:`MissingDataVAE`.

    Args:
        x: data of any shape, NaN where a value is missing.

    Returns:
        x with zeros in the holes, and a mask of the same shape, True where x is observed.

    >>> split_missing(torch.tensor([1.0, float("nan")]))
    (tensor([1., 0.]), tensor([ True, False]))
    """
    mask = ~torch.isnan(x)
    return torch.where(mask, x, 0), mask


class Batches:
    """Batches of data in memory, taken by index, everything in the same order.

    Args:
        tensors: positional arguments, with the data along the first dimension, of one length; or what else
            :func:`pyrovae.arguments.canonicalize` returns.
        batch_size: data a batch; the last may be smaller.
        shuffle: whether to draw a new order from torch's random state for every pass.
        named: keyword arguments, if there are any.

    >>> [x.tolist() for x, in Batches([torch.arange(5)], batch_size=2, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, tensors: Sequence[Any], batch_size: int, shuffle: bool, named: dict[str, Any] | None = None):
        self.tensors, self.named, self.batch_size, self.shuffle = tuple(tensors), named or {}, batch_size, shuffle
        self.size = count_data(self.tensors, self.named)
        self.rows: Tensor | int | None = None  # of the batch given last: the place of each, or of the first of a run

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[tuple | Arguments]:
        if not self.shuffle:
            for start in range(0, self.size, self.batch_size):
                self.rows = start
                yield self._taken(slice(start, start + self.batch_size))
            return
        # Drawn on the CPU, and so the same wherever the data are; moved there in one go.
        order = torch.randperm(self.size)
        device = next((t.device for t in tensors_of(self.tensors, self.named)), order.device)
        for self.rows, rows in zip(
            order.split(self.batch_size), order.to(device, non_blocking=True).split(self.batch_size), strict=True
        ):
            yield self._taken(rows)

    def in_order(self) -> "Batches":
        """Returns batches of the same data, in their order."""
        return Batches(self.tensors, self.batch_size, shuffle=False, named=self.named)

    def _taken(self, rows: slice | Tensor) -> tuple | Arguments:
        args, kwargs = take_rows(rows, self.tensors, self.named)
        return Arguments(*args, **kwargs) if kwargs else args


def as_batches(
    name: str, data: Any, batch_size: int | None, shuffle: bool, device: torch.device | str | None = None
) -> Batches | DataLoader:
    """Returns what `fit` iterates over for each kind of data it takes, after checking what is in memory.

    Args:
        name: of the argument, for messages.
        data: what :func:`pyrovae.fit` takes.
        batch_size: data a batch, all of them where there are fewer; None for large ones where no gradient is taken.
        shuffle: whether the order is new in every pass.
        device: where to move what is in memory; None to leave it.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Dataset):
        pin = device is not None and torch.device(device).type == "cuda"  # so that copies need not be waited for
        if isinstance(data, IterableDataset):
            return DataLoader(data, batch_size or 1000, pin_memory=pin)
        if len(data) == 0:
            raise ValueError(f"{name} is empty. Give at least one datum.")
        return DataLoader(data, min(batch_size or 1000, len(data)), shuffle=shuffle, pin_memory=pin)
    if data is None or isinstance(data, (str, Number)) or callable(data):
        raise TypeError(
            f"{name} must be a tensor, an array, a dict or a tuple of such, a Dataset or a DataLoader, got {type(data).__name__}."
        )
    batch = as_arguments(data)
    try:
        args, kwargs, size = canonicalize(batch.args, batch.kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    found = tensors_of(args, kwargs)
    for t in found:
        check_finite(name, t)
    devices = {t.device for t in found}
    if device is None and len(devices) > 1:
        raise ValueError(f"{name} holds tensors on {' and '.join(map(str, devices))}. Put them on one device.")
    if device is not None:
        args, kwargs = to_device(args, kwargs, device)
    return Batches(args, min(batch_size or 1000, size), shuffle, kwargs)


def _check_grey(x: Tensor) -> None:
    if x.is_cuda:  # a look would have to wait for it, and what it is for is checked on the GPU
        return
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(
            f"only values between 0 and 1 can be binarised, but x ranges from {x.min():g} to {x.max():g}. Divide 8-bit "
            "images by 255; take real numbers as they are (--preprocessing grey) with a likelihood such as Normal."
        )


def _shuffled(x: Tensor, labels: Tensor | None, validation: int, test: int) -> Splits:
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # the legacy stream, which never changes
    sizes = [len(x) - validation - test, validation, test]
    return Splits(*(Split(x[rows], None if labels is None else labels[rows]) for rows in order.split(sizes)))


_TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "omniglot": "Omniglot",
    "cifar10": "CIFAR10",
}


def _torchvision(name: str, root: Path) -> Splits:
    folder = _TORCHVISION[name]
    if folder.endswith("MNIST"):
        train, test = _idx_files(root, folder) or (
            _download(name, root, train=True),
            _download(name, root, train=False),
        )
        validation = 10_000
    elif name == "cifar10":
        train, test = _download(name, root, train=True), _download(name, root, train=False)
        validation = 5_000
    else:
        background, evaluation = _download(name, root, background=True), _download(name, root, background=False)
        train, held_out, _ = _shuffled(*background, validation=1_345, test=0)
        return Splits(train, held_out, Split(*evaluation))
    for x, labels in (train, test):
        if len(x) != len(labels):
            raise ValueError(f"{name} in {root} has {len(x)} images but {len(labels)} labels. Fetch the files again.")
    (x, labels), n = train, len(train[0]) - validation
    if n < 1:
        raise ValueError(f"{name} in {root} has {len(x)} training images, too few to set {validation:,} aside.")
    return Splits(Split(x[:n], labels[:n]), Split(x[n:], labels[n:]), Split(*test))


def _idx_files(root: Path, folder: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Reads the four IDX files of a data set, plain or gzipped, if they are there."""
    for place in (root / folder / "raw", root / "raw", root):
        paths = [
            next((p for p in (place / stem, place / f"{stem}.gz") if p.is_file()), None)
            for stem in (
                f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
            )
        ]
        if all(paths):
            x_train, y_train, x_test, y_test = map(_read_idx, paths)
            return (_scaled(x_train.unsqueeze(1)), y_train.long()), (_scaled(x_test.unsqueeze(1)), y_test.long())
    return None


def _read_idx(path: Path) -> Tensor:
    """Reads an IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, each dimension as four bytes, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dims = content[3]
        shape = struct.unpack_from(f">{dims}I", content, 4)
    except (OSError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}). Fetch it again.") from error
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if content[:3] != b"\0\0\x08" or len(data) != math.prod(shape):
        raise ValueError(f"{path} is no IDX file of unsigned bytes, or is truncated. Fetch it again.")
    return torch.from_numpy(data.reshape(shape).copy())


def _download(name: str, root: Path, **part: bool) -> tuple[Tensor, Tensor]:
    try:
        import torchvision  # slow to import, and broken beside a torch of another build: only where it is needed
    except Exception as error:
        raise ImportError(
            f"{name} needs torchvision, which fails to import ({error}). Install the torchvision that belongs to "
            f"torch {torch.__version__}."
        ) from error
    try:
        dataset = getattr(torchvision.datasets, _TORCHVISION[name])(root, download=True, **part)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{name} is not in {root} and could not be downloaded ({error}). Put its files there, or name their place "
            "with --data-root."
        ) from error
    if hasattr(dataset, "data"):
        x = torch.as_tensor(dataset.data)
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        return _scaled(x), torch.as_tensor(dataset.targets).long()
    # Omniglot comes as 105 x 105 PNG files, ink black; the VAE papers use 28 x 28, ink 1.
    items = [(torch.from_numpy(np.array(image.convert("L").resize((28, 28)))), label) for image, label in dataset]
    return 1 - _scaled(torch.stack([x for x, _ in items]).unsqueeze(1)), torch.tensor([label for _, label in items])


def _scaled(x: Tensor) -> Tensor:
    return x.float() / 255


def _from_file(path: Path) -> Splits:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        if path.suffix == ".csv":
            arrays = {"x": _read_csv(path)}
        else:
            with open(path, "rb") as file:
                content = np.load(file, allow_pickle=False)  # pickles run code
                arrays = {"x": content} if path.suffix == ".npy" else dict(content)
    except Exception as error:  # numpy and zipfile have no common error for what is damaged
        raise ValueError(f"{path} is truncated, or holds something other than numbers ({error}).") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} must hold numbers, got {array.dtype}.")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinity, which is refused below
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a, np.float32)) for name, a in arrays.items()}
    for name, x in tensors.items():
        if x.dim() < 2 or x.numel() == 0:
            raise ValueError(
                f"{path}: {name} must have rows and columns, (size, *x_shape), got shape {tuple(x.shape)}."
            )
        check_finite(f"{path}: {name}", x)
    if {"train", "validation", "test"} <= tensors.keys():
        shapes = {name: tuple(x.shape[1:]) for name, x in tensors.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{path}: train, validation and test must hold data of one shape, got {shapes}.")
        return Splits(*(Split(tensors[part], None) for part in ("train", "validation", "test")))
    if len(tensors) != 1:
        raise ValueError(f"{path} must hold one array, or train, validation and test; it holds {', '.join(tensors)}.")
    [x] = tensors.values()
    tenth = max(1, len(x) // 10)
    if len(x) < 3:
        raise ValueError(f"{path} holds {len(x)} data, too few to split into train, validation and test.")
    return _shuffled(x, None, validation=tenth, test=tenth)


def _read_csv(path: Path) -> np.ndarray:
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if lines and not any(map(_is_number, lines[0].split(","))):  # a line of names
        lines = lines[1:]
    if not lines:
        raise ValueError("no line of numbers")
    return np.loadtxt(lines, delimiter=",", ndmin=2)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
