"""Data sets from files of numbers."""

from pathlib import Path

import numpy as np
import torch

from pyrovae.data.splits import Split, Splits, random_splits
from pyrovae.inference.messages import check_finite

_PARTS = ("train", "validation", "test")


def load_table(path: Path) -> Splits:
    """Loads a ``.npy``, ``.npz`` or ``.csv`` file, as :func:`pyrovae.data.load` says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        arrays = _read(path)
    except Exception as error:  # numpy and zipfile have no common error for damaged files
        raise ValueError(f"{path} is truncated, or holds something other than numbers ({error}).") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} must hold numbers, got {array.dtype}.")
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is refused below
        tensors = {name: torch.from_numpy(np.ascontiguousarray(a, np.float32)) for name, a in arrays.items()}
    for name, x in tensors.items():
        if x.dim() < 2 or x.numel() == 0:
            raise ValueError(
                f"{path}: {name} must have rows and columns, (size, *x_shape), got shape {tuple(x.shape)}."
            )
        check_finite(f"{path}: {name}", x)
    if tensors.keys() >= set(_PARTS):
        shapes = {name: tuple(x.shape[1:]) for name, x in tensors.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"{path}: train, validation and test must hold data of one shape, got {shapes}.")
        return Splits(*(Split(tensors[part], None) for part in _PARTS))
    if len(tensors) != 1:
        raise ValueError(f"{path} must hold one array, or train, validation and test; it holds {', '.join(tensors)}.")
    [x] = tensors.values()
    if len(x) < 3:
        raise ValueError(f"{path} holds {len(x)} data, too few to split into train, validation and test.")
    tenth = max(1, len(x) // 10)
    return random_splits(x, validation=tenth, test=tenth)


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".csv":
        return {"x": _read_csv(path)}
    with open(path, "rb") as file:
        content = np.load(file, allow_pickle=False)  # unpickling could run code
        return {"x": content} if path.suffix == ".npy" else dict(content)


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
