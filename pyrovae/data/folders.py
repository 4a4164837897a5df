"""Files in folders and archives: those of one kind, and the classes and parts that their subfolders name."""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import torch
from torch import Tensor

from pyrovae.data.splits import random_rows
from pyrovae.inference.messages import warn

PARTS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_NUM_LISTED = 5


def find_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Returns the files in a folder and its subfolders that end in one of the suffixes, without hidden ones, sorted."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )


def count_files(path: Path, suffixes: Sequence[str]) -> int:
    """Returns how many files of a folder or a .zip archive end in one of the suffixes; 0 for what cannot be read."""
    if path.is_dir():
        return len(find_files(path, suffixes))
    try:
        with zipfile.ZipFile(path) as archive:
            return len(_names_in(archive, suffixes))
    except (zipfile.BadZipFile, OSError):
        return 0


def read_files(path: Path, suffixes: Sequence[str]) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """Returns the names of the files of one kind in a folder or an archive, each with what it is read from.

    Args:
        path: a folder, a .zip archive, or a file, which is returned alone.
        suffixes: how the names of the files end.

    Raises:
        ValueError: when an archive cannot be read.
    """
    if path.is_dir():
        yield from ((str(file.relative_to(path)), file) for file in find_files(path, suffixes))
    elif path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                for name in _names_in(archive, suffixes):
                    yield name, io.BytesIO(archive.read(name))
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} cannot be read as a .zip archive ({error}).") from None
    else:
        yield path.name, path


def listed(names: Sequence[str]) -> str:
    """Returns names with commas between, the first ones of many."""
    more = f" and {len(names) - _NUM_LISTED:,} more" if len(names) > _NUM_LISTED else ""
    return f"{', '.join(names[:_NUM_LISTED])}{more}"


def raise_first(wrong: Mapping[str, ValueError], size: int) -> None:
    """Raises the first error of files, if there is one, with the names of the others.

    Args:
        wrong: the errors, by the names of the files.
        size: the number of all files.
    """
    if not wrong:
        return
    first, *others = wrong
    also = f" So is, of {size:,} files: {listed(others)}." if others else ""
    raise ValueError(f"{wrong[first]}{also}") from None


def read_places(folder: Path, places: Sequence[Sequence[str]], what: str) -> tuple[list[str] | None, Tensor | None]:
    """Returns the part of each file, None where subfolders name no parts, and its class, None where there are none.

    Args:
        folder: the folder, or an archive, for messages.
        places: for each file the subfolders that it is in.
        what: what the files are, in the plural.
    """
    parts = [PARTS.get(place[0].lower(), "") if place else "" for place in places]
    has_parts = {"train", "test"} <= {*parts} and "" not in parts
    classes = [place[1:] if has_parts else place for place in places]
    labels = None
    if all(classes):
        names = sorted({place[0] for place in classes})
        labels = torch.tensor([names.index(place[0]) for place in classes])
    elif any(classes):
        warn(f"some {what} in {folder} are in subfolders and others are not: they are loaded without labels.")
    return parts if has_parts else None, labels


def split_files(path: Path, names: Sequence[str], what: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Returns the files of the training, validation and test parts, counted from 0, and the class of each file.

    Subfolders are parts or classes, as :func:`read_places` says. Without parts, 8/10, 1/10 and 1/10 are taken in a
    random order that is always the same; without a validation part, a tenth of the training part.

    Args:
        path: the folder or the archive.
        names: of the files, with their subfolders.
        what: what the files are, in the plural.

    Raises:
        ValueError: when there are too few files.
    """
    places = [PurePath(name).parts[:-1] for name in names]
    if path.suffix.lower() == ".zip" and len({place[:1] for place in places}) == 1:
        places = [place[1:] for place in places]  # an archive of one folder
    parts, labels = read_places(path, places, what)
    if len(names) < 3:
        raise ValueError(
            f"{path} holds {len(names)} {what}, too few to split into train, validation and test. Cut long ones into "
            "several files."
        )
    if parts is None:
        tenth = max(1, len(names) // 10)
        return random_rows(len(names), validation=tenth, test=tenth), labels
    groups = {part: torch.tensor([i for i, its in enumerate(parts) if its == part]) for part in set(parts)}
    if "validation" not in groups:
        size = len(groups["train"])
        if size < 2:
            raise ValueError(f"{path} holds {size} training {what}, too few to set some aside for validation.")
        kept, held, _ = random_rows(size, validation=max(1, size // 10), test=0)
        groups |= {"train": groups["train"][kept], "validation": groups["train"][held]}
    return (groups["train"], groups["validation"], groups["test"]), labels


def _names_in(archive: zipfile.ZipFile, suffixes: Sequence[str]) -> list[str]:
    return sorted(
        name
        for name in archive.namelist()
        if PurePath(name).suffix.lower() in suffixes
        and not any(part.startswith((".", "__MACOSX")) for part in PurePath(name).parts)
    )
