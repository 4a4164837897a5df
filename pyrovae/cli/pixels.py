"""What fits the pixels of a file or a folder: the options of ``pyrovae train`` that were not given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrovae import data as datasets
from pyrovae.cli.common import load_data
from pyrovae.data.arrays import ARRAYS

_KINDS = {
    "two values": ("Bernoulli", "grey"),
    "256 levels": ("DiscretizedLogistic", "grey"),
    "bytes": ("", "grey"),
    "real numbers": ("Normal", "grey"),
}


def options_for(data: str, data_root: str, argv: list[str]) -> tuple[list[str], str]:
    """Returns options of ``pyrovae train`` that fit images in a file or a folder, and a line that says why.

    What is given on the command line is left out. There are none for the registered data sets, and for other data.

    Args:
        data: the name of a data set, a file or a folder.
        data_root: the directory of the images.
        argv: the command line.

    Raises:
        ValueError: when bytes were stored as numbers from 0 to 255 that are not scaled.
    """
    path = Path(data)
    if data in datasets.DATA_SETS or not (path.is_dir() or path.suffix in (".npy", ".npz")) or "--config" in argv:
        return [], ""
    splits = load_data(data, data_root)
    if len(splits.train.x.shape) != 4:
        return [], ""
    kind = _kind([split.x for split in splits])
    given = {arg.partition("=")[0].removeprefix("--"): arg.partition("=")[2] for arg in argv if arg.startswith("--")}
    if kind == "bytes" and "likelihood" not in given:
        raise ValueError(
            f"{data} holds whole numbers from 0 to 255: bytes, which are never taken for numbers from 0 to 1. Save "
            "them as uint8, or divided by 255; or name a likelihood for them as they are, --likelihood Normal."
        )
    likelihood, preprocessing = _KINDS[kind]
    options = []
    if given.keys() & {"likelihood", "preprocessing"}:
        at = argv.index("--likelihood") + 1 if "--likelihood" in argv else len(argv)
        chosen = given.get("likelihood") or (argv[at] if at < len(argv) else "Bernoulli")
        if chosen.rpartition(".")[2] == "Bernoulli" and kind in ("256 levels", "real numbers"):
            preprocessing = "dynamic"
    else:
        options += ["--likelihood", likelihood]
        if "likelihood.network" not in given:
            options += ["--likelihood.network", "DeconvNet"]
    if "preprocessing" not in given:
        options += ["--preprocessing", preprocessing]
    if "encoder" not in given and "encoder.network" not in given:
        options += ["--encoder", "DiagonalNormal", "--encoder.network", "ConvNet"]
    return options, f"pixels: {kind}, so {' '.join(options)}" if options else ""


def has_missing(data: str, data_root: str) -> bool:
    """Returns whether a file of arrays has NaN, which stands for missing elements."""
    if data in datasets.DATA_SETS or Path(data).suffix not in ARRAYS:
        return False
    return any(bool(chunk.isnan().any()) for split in load_data(data, data_root) for chunk in _chunks(split.x))


def _chunks(x: Any) -> Iterator[Tensor]:
    return iter([x]) if isinstance(x, Tensor) else (chunk for _, chunk in x.chunks())


def _kind(parts: list[Any]) -> str:
    is_binary = is_grid = is_whole = True
    low = high = 0.0
    for x in parts:
        for chunk in _chunks(x):
            chunk = chunk[~chunk.isnan()]
            if not len(chunk):
                continue
            low, high = min(low, chunk.min().item()), max(high, chunk.max().item())
            is_binary = is_binary and bool(((chunk == 0) | (chunk == 1)).all())
            is_whole = is_whole and bool((chunk == chunk.round()).all())
            is_grid = is_grid and bool(((chunk * 255).round() / 255 == chunk).all())
    if is_binary:
        return "two values"
    if is_whole and low >= 0 and 1 < high <= 255:
        return "bytes"
    return "256 levels" if is_grid and low >= 0 and high <= 1 else "real numbers"
