"""Files in folders: those of one kind, and the classes and parts that their subfolders name."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyrovae.inference.messages import warn

_PARTS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}


def find_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Returns the files in a folder and its subfolders that end in one of the suffixes, without hidden ones, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )


def read_places(folder: Path, places: Sequence[Sequence[str]], what: str) -> tuple[list[str] | None, Tensor | None]:
    """Returns the part of each file, None where subfolders name no parts, and its class, None where there are none.

    Args:
        folder: the folder, or an archive, for messages.
        places: for each file the subfolders that it is in.
        what: what the files are, in the plural.
    """
    parts = [_PARTS.get(place[0].lower(), "") if place else "" for place in places]
    has_parts = {"train", "test"} <= {*parts} and "" not in parts
    classes = [place[1:] if has_parts else place for place in places]
    labels = None
    if all(classes):
        names = sorted({place[0] for place in classes})
        labels = torch.tensor([names.index(place[0]) for place in classes])
    elif any(classes):
        warn(f"some {what} in {folder} are in subfolders and others are not: they are loaded without labels.")
    return parts if has_parts else None, labels
