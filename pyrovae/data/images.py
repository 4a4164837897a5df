"""The data sets of images: scikit-learn's digits, and those of torchvision."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.loading import register
from pyrovae.data.splits import Split, Splits, random_splits

Images = tuple[Tensor, Tensor]  # x and labels


@register("digits")
def digits(root: Path) -> Splits:
    """Digits of scikit-learn, shape (1, 8, 8); 1,197 / 300 / 300 in a fixed random order."""
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return random_splits(x, torch.from_numpy(bunch.target).long(), validation=300, test=300)


@register("mnist")
def mnist(root: Path) -> Splits:
    """Handwritten digits, shape (1, 28, 28); the first 50,000 / last 10,000 of the training set / the test set."""
    return _like_mnist("mnist", "MNIST", root)


@register("fashion-mnist")
def fashion_mnist(root: Path) -> Splits:
    """Clothes, shape (1, 28, 28); the first 50,000 / last 10,000 of the training set / the test set."""
    return _like_mnist("fashion-mnist", "FashionMNIST", root)


@register("kmnist")
def kmnist(root: Path) -> Splits:
    """Japanese characters, shape (1, 28, 28); the first 50,000 / last 10,000 of the training set / the test set."""
    return _like_mnist("kmnist", "KMNIST", root)


@register("omniglot")
def omniglot(root: Path) -> Splits:
    """Characters, shape (1, 28, 28); 17,935 / 1,345 of the background set in a random order / the evaluation set."""
    background, evaluation = (_download("omniglot", "Omniglot", root, background=part) for part in (True, False))
    train, validation, _ = random_splits(*background, validation=1_345, test=0)
    return Splits(train, validation, Split(*evaluation))


@register("cifar10")
def cifar10(root: Path) -> Splits:
    """Photographs, shape (3, 32, 32); the first 45,000 / last 5,000 of the training set / the test set."""
    train, test = (_download("cifar10", "CIFAR10", root, train=part) for part in (True, False))
    return _last_as_validation("cifar10", root, train, test, validation=5_000)


def _like_mnist(name: str, dataset: str, root: Path) -> Splits:
    train, test = _idx_files(root, dataset) or (
        _download(name, dataset, root, train=True),
        _download(name, dataset, root, train=False),
    )
    return _last_as_validation(name, root, train, test, validation=10_000)


def _last_as_validation(name: str, root: Path, train: Images, test: Images, validation: int) -> Splits:
    for x, labels in (train, test):
        if len(x) != len(labels):
            raise ValueError(f"{name} in {root} has {len(x)} images but {len(labels)} labels. Fetch the files again.")
    (x, labels), n = train, len(train[0]) - validation
    if n < 1:
        raise ValueError(f"{name} in {root} has {len(x)} training images, too few to set {validation:,} aside.")
    return Splits(Split(x[:n], labels[:n]), Split(x[n:], labels[n:]), Split(*test))


def _idx_files(root: Path, dataset: str) -> tuple[Images, Images] | None:
    """Reads the four IDX files of a data set, gzipped or not, if they exist."""
    stems = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for folder in (root / dataset / "raw", root / "raw", root):
        either = [(folder / stem, folder / f"{stem}.gz") for stem in stems]
        if all(plain.is_file() or gzipped.is_file() for plain, gzipped in either):
            paths = [plain if plain.is_file() else gzipped for plain, gzipped in either]
            x_train, y_train, x_test, y_test = map(_read_idx, paths)
            return (_scaled(x_train.unsqueeze(1)), y_train.long()), (_scaled(x_test.unsqueeze(1)), y_test.long())
    return None


def _read_idx(path: Path) -> Tensor:
    """Reads an IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, four bytes for each of them, the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dims = content[3]
        shape = struct.unpack_from(f">{dims}I", content, 4)
    except (OSError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}). Fetch it again.") from error
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if content[:3] != b"\0\0\x08" or len(data) != math.prod(shape):
        raise ValueError(f"{path} is not an IDX file of unsigned bytes, or is truncated. Fetch it again.")
    return torch.from_numpy(data.reshape(shape).copy())


def _download(name: str, dataset: str, root: Path, **part: bool) -> Images:
    """Loads one part of a data set of torchvision, and downloads it first if its files are not in `root`."""
    try:
        import torchvision  # slow, and fails with a torch of another build: imported only where it is needed
    except Exception as error:
        raise ImportError(
            f"{name} needs torchvision, which fails to import ({error}). Install the torchvision that belongs to "
            f"torch {torch.__version__}."
        ) from error
    try:
        data = getattr(torchvision.datasets, dataset)(root, download=True, **part)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{name} is not in {root} and could not be downloaded ({error}). Put its files there, or name their folder "
            "with --data-root."
        ) from error
    if hasattr(data, "data"):
        x = torch.as_tensor(data.data)
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        return _scaled(x), torch.as_tensor(data.targets).long()
    # Omniglot has PNG files of 105 x 105 pixels with black ink; VAEs are compared at 28 x 28 pixels with ink 1.
    items = [(torch.from_numpy(np.array(image.convert("L").resize((28, 28)))), label) for image, label in data]
    return 1 - _scaled(torch.stack([x for x, _ in items]).unsqueeze(1)), torch.tensor([label for _, label in items])


def _scaled(x: Tensor) -> Tensor:
    return x.float() / 255
