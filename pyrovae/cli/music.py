"""Music in the command line: settings that suit it, and files of songs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrovae.cli.defaults import recurrent_defaults
from pyrovae.cli.pictures import as_pictures
from pyrovae.data import PianoRoll, write_midi

MUSIC = (".mid", ".json")


def music_defaults(num_pieces: int, epochs: int | None = None) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` that suit songs, as a configuration holds them.

    Args:
        num_pieces: pieces of songs to train on.
        epochs: passes over the data; None for what suits them.
    """
    epochs = min(300, max(10, 60_000 // num_pieces)) if epochs is None else epochs
    batch_size = min(32, max(4, num_pieces // 12))
    network = {"class_path": "pyrovae.nn.MLP", "init_args": {"hidden": [128]}}
    return recurrent_defaults(
        {"class_path": "pyrovae.likelihoods.SigmoidBelief", "init_args": {"network": network}},
        epochs=epochs,
        warm_up=max(1, min(20, epochs // 4)),
        batch_size=batch_size,
        patience=30,
        latent_dim=32,
        width=128,
        hidden=128,
    ) | {"shift": 5}


def write_keys(x: Tensor, piano_roll: PianoRoll, path: Path, title: str) -> None:
    """Writes keys as songs, a picture or an array, as the name of the file says."""
    if path.suffix == ".mid":
        write_midi(piano_roll.decode(x), path, piano_roll.per_quarter)
    elif path.suffix == ".json":
        path.write_text(json.dumps(piano_roll.decode(x)) + "\n", encoding="utf-8")
    elif path.suffix == ".png":
        from pyrovae import plots

        plots.samples(as_pictures(x), path, title)
    else:
        np.save(path, x.numpy())
