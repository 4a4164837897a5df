"""Data sets from files of NumPy arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.matrices import read_hdf5, read_npz
from pyrovae.data.splits import Split, Splits, random_splits, split_by_tenths
from pyrovae.inference.messages import check_finite, check_rows, warn
from pyrovae.rows import Rows, is_sparse

ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".h5ad")  # endings of the files that are read here
_PARTS = ("train", "validation", "test")
_LABELS = ("y", "labels", "label", "target", "targets")
_IN_MEMORY = 2**26  # bytes of the arrays that are loaded at once


def load_arrays(path: Path) -> Splits:
    """Loads a file of arrays or of a sparse matrix, as :func:`pyrovae.data.load` says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        arrays = _read(path)
    except ImportError:  # of the package that reads the file
        raise
    except Exception as error:  # numpy and zipfile have no common error for damaged files
        raise ValueError(f"{path} is truncated, or holds something other than numbers ({error}).") from error
    labels = {of: arrays.pop(name) for name, of in _labels_among(arrays).items()}
    data = {name: as_rows(f"{path}: {name}", array) for name, array in arrays.items()}
    shapes = {name: tuple(x.shape[1:]) for name, x in data.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{path}: {', '.join(data)} must hold data of one shape, got {shapes}.")
    classes = _classes(path, labels, {name: len(x) for name, x in data.items()})
    for prefix in ("", "x_"):
        names = [prefix + part for part in _PARTS]
        if data.keys() == set(names):
            return Splits(*(Split(data[name], classes.get(name)) for name in names))
    if data.keys() == {"x_train", "x_test"}:
        train, test = ((data[name], classes.get(name)) for name in ("x_train", "x_test"))
        return with_validation(path, train, test)
    if len(data) != 1:
        raise ValueError(
            f"{path} must hold one array, or train, validation and test; it holds {', '.join(data) or 'none'}. One "
            f"array more, {' or '.join(_LABELS[:2])}, may hold a class for each datum."
        )
    [(name, x)] = data.items()
    return split_by_tenths(path, x, classes.get(name))


def with_validation(path: Path, train: tuple, test: tuple) -> Splits:
    """Returns the splits of data that come in two parts: a tenth of the training part is set aside, at random."""
    x, labels = train
    if len(x) < 2:
        raise ValueError(f"{path} holds {len(x)} training data, too few to set some aside for validation.")
    parts = random_splits(x, labels, validation=max(1, len(x) // 10), test=0)
    return Splits(parts.train, parts.validation, Split(*test))


def as_rows(name: str, array: Any) -> Tensor | Rows:
    """Returns the data of an array of numbers, checked: images with channels first and from 0 to 1."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}.")
    if array.ndim < 2 or 0 in array.shape:
        raise ValueError(f"{name} must have rows and columns, (size, *x_shape), got shape {array.shape}.")
    divisor = 1.0
    if is_sparse(array):
        rows = Rows(array, torch.float32)
        check_finite(name, rows)
        return rows
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        array, divisor = _as_images(name, array)
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3) and array.shape[2] > 4:
        warn(f"{name} has shape {array.shape}: its last dimension is taken for the channels, and moved to the front.")
        array = np.moveaxis(array, -1, 1)
    rows = Rows(array, torch.float32, divisor=divisor)
    check_rows(name, rows, missing=True)
    return rows if rows.map is not None and array.nbytes > _IN_MEMORY else rows[:]


def _read(path: Path) -> dict[str, Any]:
    """Reads the arrays of a file; unpickling, which could run code, is not allowed."""
    if path.suffix != ".npy":
        return read_npz(path) if path.suffix == ".npz" else read_hdf5(path)
    try:
        return {"x": np.load(path, mmap_mode="r", allow_pickle=False)}
    except ValueError:  # arrays without elements cannot be mapped
        return {"x": np.load(path, allow_pickle=False)}


def _labels_among(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns the names of arrays of labels, each with the name of the array of their data."""
    pairs = {name: f"x_{name[2:]}" for name in arrays if name.startswith("y_")}
    if pairs and {*pairs.values()} <= arrays.keys():
        return pairs
    found = [name for name, y in arrays.items() if name in _LABELS and not is_sparse(y) and y.size == len(y)]
    if len(arrays) == 2 and len(found) == 1:
        return {found[0]: next(name for name in arrays if name != found[0])}
    return {}


def _classes(path: Path, labels: dict[str, np.ndarray], sizes: dict[str, int]) -> dict[str, Tensor]:
    """Returns labels as classes: whole numbers as they are, words numbered in alphabetical order."""
    labels = {name: y.reshape(-1) for name, y in labels.items()}
    for name, y in labels.items():
        if len(y) != sizes[name]:
            raise ValueError(f"{path}: there are {len(y)} labels, but {name} holds {sizes[name]} data.")
        if y.dtype.kind not in "biufUS" or y.dtype.kind == "f" and not bool((y == np.floor(y)).all()):
            raise ValueError(f"{path}: labels must be classes, whole numbers or words, got {y.dtype}.")
    if any(y.dtype.kind in "US" for y in labels.values()):
        words = np.unique(np.concatenate([y.astype(str) for y in labels.values()]))
        labels = {name: np.searchsorted(words, y.astype(str)) for name, y in labels.items()}
    return {name: torch.from_numpy(y.astype(np.int64)) for name, y in labels.items()}


def _as_images(name: str, array: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns bytes as images with channels first, not copied, and the number that means white."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] not in (1, 3, 4) and array.shape[3] in (1, 3, 4):
        array = np.moveaxis(array, -1, 1)
    top = max(int(x.max()) for _, x in Rows(array).chunks())
    if 1 < top < 32:
        warn(
            f"{name} holds bytes from 0 to {top} only, so that its images are nearly black: bytes are divided by 255. "
            f"If {top} means white, save x / {top} as numbers from 0 to 1."
        )
    return array, 1.0 if top == 1 else 255.0


def load_mask(path: Path) -> Tensor:
    """Returns a picture or a ``.npy`` file of the shape of a datum as a mask: False where it is zero."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False) != 0)
        from PIL import Image  # slow to import

        with Image.open(path) as picture:
            return torch.from_numpy(np.asarray(picture.convert("L")) != 0)
    except Exception as error:  # PIL has no common error for damaged files
        raise ValueError(f"{path} cannot be read as a mask ({error}). Give a picture or a .npy file.") from error
