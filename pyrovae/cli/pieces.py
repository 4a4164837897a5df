"""Sounds and music in the command line: the pieces of files that a run draws, reconstructs or scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyrovae.cli.common import advice_as_options, new_file, per_step, programs_of, write_rows
from pyrovae.cli.labels import arguments_of, draw
from pyrovae.cli.music import MUSIC, write_keys
from pyrovae.cli.pictures import as_pictures
from pyrovae.cli.sounds import SOUND, write_levels
from pyrovae.data import PianoRoll, Spectrogram, Split, read_music, read_sounds
from pyrovae.estimators import Estimator, log_marginal
from pyrovae.structures import SequenceVAE

_NUM_SHOWN = 5


class Kind(NamedTuple):
    """What files of recordings hold.

    Args:
        name: one of them.
        step: a step of its sequence.
        unit: of the time in it.
        endings: of files that are written, the usual one first.
        read: returns those of a file, a folder or an archive by their names, given the encoding.
        write: writes sequences, ``(pieces, steps, ...)``, to a file with a title, given the encoding.
        size: returns the time of a step, given the encoding.
    """

    name: str
    step: str
    unit: str
    endings: tuple[str, ...]
    read: Callable[[str, Any], dict[str, Any]]
    write: Callable[[Tensor, Any, Path, str], None]
    size: Callable[[Any], float]


def _read_sounds(file: str, spectrogram: Spectrogram) -> dict[str, Any]:
    return read_sounds(file, spectrogram.rate)[0]


def _read_music(file: str, piano_roll: PianoRoll) -> dict[str, Any]:
    songs = read_music(file, piano_roll.per_quarter)
    for name, song in songs.items():
        piano_roll.check(song, f"song {name} of {file}")
    return songs


Recordings = tuple[Kind, Any]  # what recordings a run is on, and how they are encoded

KINDS = {  # by their encodings in the configuration of a run
    "spectrogram": Kind(
        "sound", "frame", "s", (*SOUND, ".png", ".npy"), _read_sounds, write_levels, lambda encoding: encoding.hop
    ),
    "piano_roll": Kind(
        "song",
        "step",
        "quarter notes",
        (*MUSIC, ".png", ".npy"),
        _read_music,
        write_keys,
        lambda encoding: 1 / encoding.per_quarter,
    ),
}


def recordings_of(config: dict[str, Any]) -> Recordings | None:
    """Returns what recordings a run is on, and its encoding of them; None for other data."""
    return next(((kind, config[name]) for name, kind in KINDS.items() if config.get(name) is not None), None)


def read_pieces(recordings: Recordings, file: str) -> tuple[Tensor, Tensor, list[str]]:
    """Returns the pieces of the recordings of a file, the number of the one that each is of, and their names."""
    kind, encoding = recordings
    found = kind.read(file, encoding)
    print(f"{file}: {len(found):,} {kind.name}s\n{encoding.describe()}")
    x, owners = encoding.encode(list(found.values()))
    return x, owners, list(found)


@torch.no_grad()
def sample_pieces(
    vae: Any, recordings: Recordings, num_samples: int, num_steps: int | None, output: str | Path, seed: int
) -> None:
    """Draws sequences from p(x), and writes them as recordings."""
    kind, encoding = recordings
    out = new_file(output, kind.endings)
    pyro.set_rng_seed(seed)
    num_steps = encoding.num_steps if num_steps is None else num_steps
    x = (vae.sample(num_samples, num_steps) if isinstance(vae, SequenceVAE) else draw(vae, num_samples)).cpu()
    kind.write(x, encoding, out, f"{kind.name}s from p(x), time to the right")
    print(f"{num_samples} {kind.name}s of {x.shape[1] * kind.size(encoding):.4g} {kind.unit}: {out}")


@torch.no_grad()
def reconstruct_pieces(vae: Any, recordings: Recordings, x: Tensor, output: str | Path, seed: int) -> None:
    """Writes pieces of recordings, each before its reconstruction."""
    kind, encoding = recordings
    out = new_file(output, kind.endings)
    pyro.set_rng_seed(seed)
    again = vae.reconstruct(*arguments_of(vae, Split(x, None))).masked_fill(x.isnan(), torch.nan)
    title = f"pieces of {kind.name}s, each before its reconstruction"
    if out.suffix == ".png":
        from pyrovae import plots

        title = f"pieces of {kind.name}s above, their reconstructions below"
        above, below = as_pictures(torch.cat([x, again])).chunk(2)
        plots.reconstructions(above, below, out, title)
        print(f"{len(x)} {title}: {out}")
        return
    shown = again if out.suffix == ".npy" else torch.stack([x, again], dim=1).flatten(0, 1)
    kind.write(shown, encoding, out, title)
    print(f"{len(x)} {title}: {out}")


def score_pieces(
    vae: Any,
    recordings: Recordings,
    file: str,
    output: str | Path,
    method: Estimator,
    max_memory: float,
    seed: int,
    device: str,
) -> None:
    """Writes log p(x) of each piece of the recordings of a file, a folder or an archive, and prints nats a step."""
    kind, encoding = recordings
    out = new_file(output, (".csv",))
    x, owners, names = read_pieces(recordings, file)
    steps = (~x.isnan().any(-1)).sum(1)
    if isinstance(vae, SequenceVAE):
        x = x[:, : int(steps.max())]  # no step after the longest piece
    args = arguments_of(vae, Split(x.to(device), None))
    pyro.set_rng_seed(seed)
    estimate = log_marginal(*programs_of(vae, method), *args, method=method, max_memory=max_memory)
    value = estimate.value.cpu()
    size, starts = kind.size(encoding), starts_of(owners, encoding.num_steps)
    rows = []
    for i, owner in enumerate(owners.tolist()):
        end = starts[i] + int(steps[i])
        row = [names[owner], f"{starts[i] * size:.3f}", f"{end * size:.3f}", f"{value[i]:.9g}"]
        row += [f"{estimate.standard_error[i]:.3g}", int(estimate.trusted[i]), int(steps[i])]
        rows.append([*row, f"{-value[i] / steps[i]:.6g}"])
    header = [kind.name, "from", "to", "log_p", "standard_error", "trusted", f"{kind.step}s", f"nats_a_{kind.step}"]
    write_rows(out, header, rows)
    print(advice_as_options(f"{file}: {estimate}\n{per_step(estimate, int(steps.sum()), kind.step)}"))
    for i in (value / steps).argsort()[:_NUM_SHOWN].tolist():
        place = f"from {starts[i] * size:.2f} {kind.unit}"
        print(f"{names[owners[i]]}, {place}: {-value[i] / steps[i]:.2f} nats a {kind.step}")
    print(f"per piece: {out}")


def starts_of(owners: Tensor, num_steps: int) -> list[int]:
    """Returns the step of its recording at which each piece begins, counted from 0."""
    starts, previous, count = [], -1, 0
    for owner in owners.tolist():
        count = count + 1 if owner == previous else 0
        previous = owner
        starts.append(count * num_steps)
    return starts
