"""``pyrovae encode``."""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import storage
from pyrovae.cli.common import (
    SplitName,
    check_device,
    data_to_score,
    first_of,
    load_data_of,
    new_file,
    stem_of,
    write_columns,
)
from pyrovae.cli.labels import arguments_of
from pyrovae.cli.pictures import mean_over_steps, name_of_latents
from pyrovae.cli.pieces import read_pieces, recordings_of, starts_of
from pyrovae.cli.rows import check_some, load_rows
from pyrovae.cli.text import lines_with_words
from pyrovae.structures import SequenceVAE

_AT_ONCE = 1000  # data
_NUM_DRAWS = 100  # where q has no mean


def encode(
    run: str,
    file: str | None = None,
    split: SplitName = "test",
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str = "cpu",
    trust: bool = False,
    seed: int = 0,
) -> None:
    """Writes the embedding of each datum: mean and standard deviation of q(z | x).

    Of several levels of latents it is that of the level next to the data; of a sequence, such as a piece of a sound
    or of a song, the mean of the latents over its steps, and the standard deviation of that mean.

    Args:
        run: the run directory.
        file: for runs on tables, text, sounds and music, what to embed: a table with the columns of the training data
            (needed for a table), a text, a sound or MIDI file, a folder or a .zip archive of them, or a .json file of
            songs. A row, line or piece each, in the order of the file.
        split: without a file, the split of the data.
        output: a .csv or .npy file; encoded-<file or split>.csv in the run directory by default. Columns of a .csv
            file: row, line or datum; or the sound or song with the times from and to of the piece; or the row, series
            and time where a piece of a time series begins; label if the data have any; mean_1, ..., sd_1, ...
        data: without a file, another data set of the same shape; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        device: cpu, cuda, cuda:1, ...
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
        seed: seed of draws, for an encoder without a mean.
    """
    check_device(device)
    name = split if file is None else stem_of(file)
    out = new_file(output or Path(run) / f"encoded-{name}.csv", (".csv", ".npy"))
    config = storage.read_config(run, trust=trust)
    schema = config.get("table")
    if schema is not None:
        if file is None:
            raise ValueError("file is missing: give a table with the columns of the training data.")
        vae, table, chosen = load_rows(run, file, trust, device)
        check_some(chosen, file)
        columns: dict[str, Tensor | list[str]] = {"row": torch.arange(len(table)) + 1}
        size = len(table)
        part = datasets.Split(table.x, None, context=table.context)
    else:
        vae = storage.load_run(run, trust=trust)[0].to(device)
        part, columns = _data(config, file, split, data, data_root)
        size, chosen = len(part.x), torch.arange(len(part.x))
    pyro.set_rng_seed(seed)
    found = []
    for some in chosen.split(_AT_ONCE):
        x = part.x[some] if isinstance(part.x, Tensor) else part.x.select(some.numpy())[:]
        others = {k: None if t is None else t[some] for k, t in (("labels", part.labels), ("context", part.context))}
        few = first_of(datasets.Split(x, others["labels"], None, others["context"]), None, device)
        found.append(torch.cat(embeddings(vae, arguments_of(vae, few, schema)), dim=-1).cpu())
    encoded = torch.full((size, found[0].shape[1]), torch.nan)
    encoded[chosen] = torch.cat(found)
    n = encoded.shape[1] // 2
    if out.suffix == ".npy":
        np.save(out, encoded.numpy())
    else:
        names = [f"{what}_{i + 1}" for what in ("mean", "sd") for i in range(n)]
        write_columns(columns | dict(zip(names, encoded.T, strict=True)), out)
    print(f"{len(chosen):,} embeddings in {n} dimensions: {out}")


def _data(
    config: dict[str, Any], file: str | None, split: SplitName, data: str | None, data_root: str | None
) -> tuple[datasets.Split, dict[str, Tensor | list[str]]]:
    """Returns data that are no table, and columns of the result that say which they are."""
    vocabulary, recordings = config.get("vocabulary"), recordings_of(config)
    if file is None:
        part = data_to_score(load_data_of(config, data, data_root), split, config["preprocessing"])
        columns: dict[str, Tensor | list[str]] = {"datum": torch.arange(len(part.x))}
        return part, columns if part.labels is None else columns | {"label": part.labels}
    if vocabulary is not None:
        lines, numbers = lines_with_words(vocabulary, file)
        return datasets.Split(vocabulary.encode(lines), None), {"line": torch.tensor(numbers)}
    if recordings is not None:
        kind, encoding = recordings
        x, which, names = read_pieces(recordings, file)
        begins, size = torch.tensor(starts_of(which, encoding.num_steps)), kind.size(encoding)
        ends = begins + (~x.isnan().any(-1)).sum(1)
        of = {kind.name: [names[i] for i in which.tolist()]}
        return datasets.Split(x, None), of | {"from": begins * size, "to": ends * size}
    if config.get("time_series") is not None:
        series = config["time_series"]
        steps = series.steps(file)
        x, places = series.pieces(steps)
        first = places[:, 0].numpy()
        return datasets.Split(x, None), {
            "row": torch.from_numpy(steps.rows[first]),
            "series": [steps.names[i] for i in steps.series[first]],
            "time": [text or "" for text in series.times_text(steps.times[first])],
        }
    raise ValueError("file is for runs on tables, text, sounds, music. Leave it out, or name other data with --data.")


@torch.no_grad()
def embeddings(vae: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation of q(z | x), ``(size, latent_dim)``, exact or of 100 draws.

    Args:
        vae: the VAE; of several levels of latents, those next to the data are taken.
        args: what its guide takes.
    """
    trace = poutine.trace(vae.guide).get_trace(*args)
    name, is_sequence = name_of_latents(trace), isinstance(vae, SequenceVAE)
    # What is drawn after others, such as a level below another, has a mean that differs from draw to draw.
    first = next(key for key in trace.stochastic_nodes if not site_is_subsample(trace.nodes[key]))
    if first == name and not is_sequence:
        q = trace.nodes[name]["fn"]
        try:
            return q.mean.flatten(1), q.stddev.flatten(1)
        except (NotImplementedError, AttributeError):  # a flow, a class
            pass
    traces = (poutine.trace(vae.guide).get_trace(*args) for _ in range(_NUM_DRAWS))
    values = (each.nodes[name]["value"] for each in traces)
    draws = torch.stack([mean_over_steps(z, args[1]) if is_sequence else z.float().reshape(len(z), -1) for z in values])
    return draws.mean(0), draws.std(0)
