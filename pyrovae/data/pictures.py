"""Data sets from folders of pictures."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pyrovae.data.arrays import with_validation
from pyrovae.data.folders import find_files, read_places
from pyrovae.data.splits import Split, Splits, split_by_tenths
from pyrovae.inference.messages import warn
from pyrovae.rows import Rows

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")
_GREY = ("1", "L", "LA", *_SIXTEEN_BITS)
_IN_MEMORY = 2**26  # bytes of the pictures that become floating-point numbers at once


def load_pictures(folder: Path) -> Splits:
    """Loads a folder of pictures, as :func:`pyrovae.data.load` says."""
    paths = find_files(folder, PICTURES)
    if not paths:
        raise ValueError(
            f"{folder} holds no picture, sound or MIDI file. Give a folder with files {', '.join(PICTURES)}, with "
            "sounds such as .wav, or with .mid."
        )
    parts, labels = read_places(folder, [path.relative_to(folder).parts[:-1] for path in paths], "pictures")
    x = Rows(_read(folder, paths), torch.float32, divisor=255.0)
    if parts is None:
        return split_by_tenths(folder, x if _is_large(x) else x[:], labels)
    split = {
        part: (x.select(rows) if _is_large(x) else x[rows], None if labels is None else labels[rows])
        for part in set(parts)
        for rows in [np.flatnonzero(np.array(parts) == part)]
    }
    if "validation" not in split:
        return with_validation(folder, split["train"], split["test"])
    return Splits(Split(*split["train"]), Split(*split["validation"]), Split(*split["test"]))


def _is_large(x: Rows) -> bool:
    return x.source.nbytes > _IN_MEMORY


def _read(folder: Path, paths: list[Path]) -> np.ndarray:
    """Returns pictures as bytes, ``(size, channels, height, width)``, of the size that most have."""
    from PIL import Image  # slow to import

    sizes: Counter[tuple[int, int]] = Counter()
    is_grey, changed = True, Counter[str]()
    for path in paths:
        try:
            with Image.open(path) as picture:
                is_turned = picture.getexif().get(_ORIENTATION, 1) >= 5
                sizes[picture.size[::-1] if is_turned else picture.size] += 1
                is_grey = is_grey and picture.mode in _GREY
                if getattr(picture, "n_frames", 1) > 1:
                    changed["cut to the first of their frames"] += 1
        except Exception as error:  # PIL has no common error for damaged files
            raise ValueError(f"{path} cannot be read as a picture ({error}). Remove it or replace it.") from error
    size = min(sizes, key=lambda size: (-sizes[size], size))
    x = np.empty((len(paths), 1 if is_grey else 3, size[1], size[0]), np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                content = _in_eight_bits(picture, is_grey, changed)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a picture ({error}). Remove it or replace it.") from error
        if content.size != size:
            changed[f"scaled to {size[0]} x {size[1]} pixels"] += 1
            content = content.resize(size, Image.Resampling.LANCZOS)
        x[i] = np.moveaxis(np.atleast_3d(np.asarray(content)), -1, 0)
    if changed:
        said = ", ".join(f"{count:,} were {what}" for what, count in changed.items())
        warn(f"of {len(paths):,} pictures in {folder}, {said}.")
    return x


_ORIENTATION = 0x0112  # the tag of EXIF


def _in_eight_bits(picture: "Image", is_grey: bool, changed: Counter[str]) -> "Image":
    """Returns a picture upright, grey or in three colours, of eight bits, without transparency."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save these as an array in a .npy file")
    if upright.mode in _SIXTEEN_BITS:
        values = np.asarray(upright, np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than sixteen bits")
        changed["reduced from sixteen bits to eight"] += 1
        upright = Image.fromarray((values / 257).round().astype(np.uint8))
    if "A" in upright.getbands() or "transparency" in upright.info:
        changed["put on a white ground"] += 1
        ground = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(ground, upright.convert("RGBA"))
    elif upright.mode in ("L", "1") and not is_grey:
        changed["made coloured, as others are,"] += 1
    return upright.convert("L" if is_grey else "RGB")
