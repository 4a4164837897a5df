"""Data sets from text files of numbers."""

from pathlib import Path

import numpy as np
import torch

from pyrovae.data.splits import Splits, split_by_tenths
from pyrovae.inference.messages import check_finite


def load_table(path: Path) -> Splits:
    """Loads a ``.csv`` file, as :func:`pyrovae.data.load` says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        array = _read_csv(path)
    except Exception as error:
        raise ValueError(f"{path} is truncated, or holds something other than numbers ({error}).") from error
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which is refused below
        x = torch.from_numpy(array.astype(np.float32))
    check_finite(f"{path}: x", x)
    return split_by_tenths(path, x, None)


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
