"""Sounds in the command line: settings that suit them, and files of sounds."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrovae.cli.defaults import recurrent_defaults, student_t
from pyrovae.cli.pictures import as_pictures
from pyrovae.data import Spectrogram

SOUND = (".wav", ".flac")
_PAUSE = 0.3  # seconds between sounds in one file


def sound_defaults(num_pieces: int, epochs: int | None = None) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` that suit sounds, as a configuration holds them.

    Args:
        num_pieces: pieces of sounds to train on.
        epochs: passes over the data; None for what suits them.
    """
    epochs = min(500, max(10, 120_000 // num_pieces)) if epochs is None else epochs
    batch_size = min(32, max(8, num_pieces // 20))
    return recurrent_defaults(
        student_t(hidden=128, scale=0.3),
        epochs=epochs,
        warm_up=max(1, min(5, epochs // 2)),
        batch_size=batch_size,
        patience=10,
        latent_dim=16,
        width=128,
        hidden=128,
    )


def write_sounds(sounds: list[np.ndarray], spectrogram: Spectrogram, path: Path) -> None:
    """Writes sounds to one file, one after the other with pauses between."""
    import soundfile

    pause = np.zeros(round(_PAUSE * spectrogram.rate))
    peaks = [float(np.abs(sound).max()) for sound in sounds]
    parts = [part / max(1.0, peak) for sound, peak in zip(sounds, peaks, strict=True) for part in (sound, pause)][:-1]
    soundfile.write(path, np.concatenate(parts), spectrogram.rate, subtype="PCM_16")
    loud = sum(peak > 1 for peak in peaks)
    if loud:
        print(f"{loud} of {len(sounds)} sounds are louder than full scale, and are made softer")


def write_levels(x: Tensor, spectrogram: Spectrogram, path: Path, title: str) -> None:
    """Writes levels as sounds, a picture or an array, as the name of the file says."""
    if path.suffix in SOUND:
        write_sounds(spectrogram.decode(x), spectrogram, path)
    elif path.suffix == ".png":
        from pyrovae import plots

        plots.samples(as_pictures(x), path, title)
    else:
        np.save(path, x.numpy())
