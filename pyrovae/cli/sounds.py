"""Sounds in the command line: settings that suit them, and sounds that a run draws, reconstructs or scores."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrovae.cli.common import advice_as_options, new_file, per_step, programs_of
from pyrovae.cli.defaults import recurrent_defaults
from pyrovae.cli.labels import arguments_of, draw
from pyrovae.cli.pictures import as_pictures
from pyrovae.data import Spectrogram, Split, read_sounds
from pyrovae.estimators import Estimator, log_marginal
from pyrovae.structures import SequenceVAE

SOUND = (".wav", ".flac")
_PAUSE = 0.3  # seconds between sounds in one file
_NUM_SHOWN = 5


def sound_defaults(num_pieces: int, epochs: int | None = None) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` that suit sounds, as a configuration holds them.

    Args:
        num_pieces: pieces of sounds to train on.
        epochs: passes over the data; None for what suits them.
    """
    epochs = min(500, max(10, 120_000 // num_pieces)) if epochs is None else epochs
    batch_size = min(32, max(8, num_pieces // 20))
    return recurrent_defaults(
        epochs=epochs,
        warm_up=max(1, min(5, epochs // 2)) * -(-num_pieces // batch_size),
        batch_size=batch_size,
        patience=10,
        latent_dim=16,
        width=128,
        hidden=128,
        scale=0.3,
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


@torch.no_grad()
def sample_sounds(
    vae: Any, spectrogram: Spectrogram, num_samples: int, num_steps: int | None, output: str | Path, seed: int
) -> None:
    """Draws sounds from p(x), and writes them."""
    out = new_file(output, (*SOUND, ".png", ".npy"))
    pyro.set_rng_seed(seed)
    num_steps = spectrogram.num_frames if num_steps is None else num_steps
    x = (vae.sample(num_samples, num_steps) if isinstance(vae, SequenceVAE) else draw(vae, num_samples)).cpu()
    write_levels(x, spectrogram, out, "sounds from p(x): frequencies upwards, time to the right")
    print(f"{num_samples} sounds of {num_steps * spectrogram.hop:.2f} s: {out}")


@torch.no_grad()
def reconstruct_sounds(vae: Any, spectrogram: Spectrogram, x: Tensor, output: str | Path, seed: int) -> None:
    """Writes pieces of sounds, each before its reconstruction; phases of both are found from the levels."""
    out = new_file(output, (*SOUND, ".png", ".npy"))
    pyro.set_rng_seed(seed)
    again = vae.reconstruct(*arguments_of(vae, Split(x, None))).masked_fill(x.isnan(), torch.nan)
    pairs = torch.stack([x, again], dim=1).flatten(0, 1)
    shown = again if out.suffix == ".npy" else pairs
    write_levels(shown, spectrogram, out, "pieces of sounds, each before its reconstruction")
    print(f"{len(x)} pieces of sounds, each before its reconstruction: {out}")


def score_sounds(
    vae: Any,
    spectrogram: Spectrogram,
    file: str,
    output: str | Path,
    method: Estimator,
    max_memory: float,
    seed: int,
    device: str,
) -> None:
    """Writes log p(x) of each piece of the sounds of a file, a folder or an archive, and prints nats a frame."""
    out = new_file(output, (".csv",))
    sounds, _ = read_sounds(file, spectrogram.rate)
    x, owners = spectrogram.encode(list(sounds.values()))
    args = arguments_of(vae, Split(x.to(device), None))
    pyro.set_rng_seed(seed)
    estimate = log_marginal(*programs_of(vae, method), *args, method=method, max_memory=max_memory)
    value, frames = estimate.value.cpu(), (~x.isnan().any(-1)).sum(1)
    names, starts = list(sounds), _starts(owners, spectrogram)
    with open(out, "w", newline="", encoding="utf-8") as content:
        writer = csv.writer(content, lineterminator="\n")
        writer.writerow(["sound", "from", "to", "log_p", "standard_error", "trusted", "frames", "nats_a_frame"])
        for i, owner in enumerate(owners.tolist()):
            end = starts[i] + float(frames[i]) * spectrogram.hop
            row = [names[owner], f"{starts[i]:.3f}", f"{end:.3f}", f"{value[i]:.9g}"]
            row += [f"{estimate.standard_error[i]:.3g}", int(estimate.trusted[i]), int(frames[i])]
            writer.writerow([*row, f"{-value[i] / frames[i]:.6g}"])
    print(advice_as_options(f"{file}: {estimate}\n{per_step(estimate, int(frames.sum()), 'frame')}"))
    for i in (value / frames).argsort()[:_NUM_SHOWN].tolist():
        print(f"{names[owners[i]]}, from {starts[i]:.2f} s: {-value[i] / frames[i]:.2f} nats a frame")
    print(f"per piece: {out}")


def _starts(owners: Tensor, spectrogram: Spectrogram) -> list[float]:
    """Returns where each piece begins in its sound, in seconds."""
    starts, previous, count = [], -1, 0
    for owner in owners.tolist():
        count = count + 1 if owner == previous else 0
        previous = owner
        starts.append(count * spectrogram.num_frames * spectrogram.hop)
    return starts
