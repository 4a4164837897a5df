"""``pyrovae forecast``."""

from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyrovae import storage
from pyrovae.cli.common import SplitName, check_device, data_to_score, load_data_of, new_file, write_rows
from pyrovae.cli.labels import split_steps
from pyrovae.cli.pictures import as_pictures, is_drawn_as_curves
from pyrovae.cli.pieces import recordings_of
from pyrovae.cli.series import forecast_series
from pyrovae.structures import SequenceVAE
from pyrovae.structures.sequences import until_last

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_NUM_PARTICLES = 100


def forecast(
    run: str,
    steps: int = 20,
    split: SplitName = "test",
    num_data: int | None = None,
    num_draws: int | None = None,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Draws the steps after the end of the first sequences of a split, given all steps before, by a trained run.

    The latents of a sequence are drawn by a particle filter of 100 particles, or as many as there are draws.

    Args:
        run: the run directory, of a run with the structure Recurrent or StateSpace, as that of sounds.
        steps: number of steps to draw.
        split: the split of the data.
        num_data: number of sequences; 4 by default, of time series all, but for a picture.
        num_draws: draws for each sequence; 100 by default, for quantiles 1,000.
        output: a .png file: fans of the draws, or of many features one draw after the sequence; a .csv file: quantiles
            of the draws of each sequence, step and element, all counted from 1; or a .npy file: the draws, (num_draws,
            num_data, steps, ...). Of sounds also a .wav or .flac file, of music .mid or .json: each piece with one draw
            that goes on. The default is forecasts-<split>.png in the run directory, of sounds .wav, of music .mid. Of a
            table of time series the steps are rows after the last of each series of the file, in the units of its
            columns, and the default is forecasts.csv.
        data: another data set of the same shape; that of the run by default.
        data_root: the directory of the data; that of the run by default.
        seed: seed of the draws.
        device: cpu, cuda, cuda:1, ...
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    for name, value in (("steps", steps), ("num_data", num_data), ("num_draws", num_draws)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    check_device(device)
    vae, config = storage.load_run(run, trust=trust)
    if not isinstance(vae, SequenceVAE):
        raise ValueError(
            f"{run} is no run on sequences: a {type(vae).__name__} has no steps to come. Train with --structure "
            "Recurrent or StateSpace, or on sounds."
        )
    ending = Path(output).suffix if output else ".csv" if config.get("time_series") is not None else ".png"
    num_draws = num_draws or (1000 if ending == ".csv" else 100)
    num_particles = max(_NUM_PARTICLES, num_draws)
    if config.get("time_series") is not None:
        out = new_file(output or Path(run) / "forecasts.csv", (".csv", ".png", ".npy"))
        file, series = data or config["data"], config["time_series"]
        num_series = num_data or (4 if ending == ".png" else None)
        forecast_series(vae, series, file, steps, num_series, num_draws, num_particles, out, seed, device)
        return
    num_data = num_data or 4
    recordings = recordings_of(config)
    endings: tuple[str, ...] = (".png", ".csv", ".npy")
    if recordings is not None:
        is_discrete = config.get("piano_roll") is not None  # whose quantiles say nothing
        endings = tuple(dict.fromkeys((*recordings[0].endings, *(endings[::2] if is_discrete else endings))))
    out = new_file(output or Path(run) / f"forecasts-{split}{endings[0]}", endings)
    x = data_to_score(load_data_of(config, data, data_root), split, config["preprocessing"], num_data).x
    filled, mask = split_steps(x)
    pyro.set_rng_seed(seed)
    args = filled.to(device), steps, mask.to(device)
    draws = vae.to(device).forecast(*args, num_samples=num_draws, num_particles=num_particles).cpu()
    past = _aligned(x, mask)
    if out.suffix == ".npy":
        np.save(out, draws.numpy())
    elif out.suffix == ".csv":
        _write_quantiles(draws, out)
    elif out.suffix == ".png":
        _draw(past, draws, out)
    elif recordings is not None:
        kind, encoding = recordings
        both = [torch.cat([one[its], draw]) for one, its, draw in zip(x, mask, draws[0], strict=True)]
        kind.write(pad_sequence(both, batch_first=True, padding_value=torch.nan), encoding, out, "")
    drawn = f"{num_draws} draws" if out.suffix in (".npy", ".csv", ".png") else "a draw"
    print(f"{drawn} of {steps} steps after each of {len(x)} sequences: {out}")


def _aligned(x: Tensor, mask: Tensor) -> Tensor:
    """Returns sequences that end at the same step, with NaN before shorter ones."""
    lengths = until_last(mask).sum(1)
    rows = torch.arange(x.shape[1]) + lengths.unsqueeze(1) - int(lengths.max())
    rows = rows[:, : int(lengths.max())]
    taken = x[torch.arange(len(x)).unsqueeze(1), rows.clamp_min(0)]
    return taken.masked_fill((rows < 0).view(*rows.shape, *(1,) * (x.dim() - 2)), torch.nan)


def _draw(past: Tensor, draws: Tensor, path: Path) -> None:
    from pyrovae import plots

    if is_drawn_as_curves(past):
        plots.forecasts(past, draws, path=path)
        return
    whole = as_pictures(torch.cat([past, draws[0]], dim=1))
    whole[..., past.shape[1]] = 1.0  # a line where the draw begins
    plots.samples(whole, path, "sequences, and after the line a draw of what follows")


def _write_quantiles(draws: Tensor, path: Path) -> None:
    points = np.quantile(draws.flatten(3).numpy(), _QUANTILES, 0)
    rows = (
        [*(i + 1 for i in place), *(f"{value:.7g}" for value in points[(slice(None), *place)])]
        for place in np.ndindex(points.shape[1:])
    )
    write_rows(path, ["sequence", "step", "element", *(f"q{round(100 * q):02d}" for q in _QUANTILES)], rows)
