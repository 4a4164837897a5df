"""``pyrovae repair``."""

from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor

from pyrovae.cli.common import SplitName, check_device, data_to_score, load_run_and_data, new_file
from pyrovae.cli.labels import given
from pyrovae.data.arrays import load_mask
from pyrovae.structures import SequenceVAE
from pyrovae.structures import repair as repaired_by

_SIDES = ("top", "bottom", "left", "right", "center")


def repair(
    run: str,
    mask: str = "bottom",
    split: SplitName = "test",
    num_data: int = 8,
    num_draws: int = 4,
    num_steps: int = 300,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Draws hidden parts of the first data of a split by a trained run, and writes them as a picture or an array.

    Args:
        run: the run directory.
        mask: what is hidden: top, bottom, left, right (halves of an image) or center; or a picture or a .npy file of
            the shape of a datum, 0 where it is hidden.
        split: the split of the data.
        num_data: number of data.
        num_draws: draws of the hidden part of each datum.
        num_steps: steps of the Markov chain of each draw.
        output: a .png file, or a .npz file with x, mask, mean, draws and acceptance; repairs-<split>.png in the run
            directory by default.
        data: another data set of the same shape; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        seed: seed of the draws.
        device: cpu, cuda, cuda:1, ...
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    out = new_file(output or Path(run) / f"repairs-{split}.png", (".png", ".npz"))
    check_device(device)
    vae, splits, preprocessing = load_run_and_data(run, data, data_root, trust)
    if isinstance(vae, SequenceVAE):
        raise ValueError(f"repair is not for sequences. What follows one: pyrovae forecast {run}.")
    pyro.set_rng_seed(seed)
    part = data_to_score(splits, split, preprocessing, num_data, device)
    x, *context = part.x, *given(vae, part.labels, part.x.device)
    seen = _mask(mask, tuple(x.shape[1:])).to(device)
    found = repaired_by(vae.to(device), x, seen, *context, num_draws=num_draws, num_steps=num_steps)
    hidden = ~seen.expand(x.shape)
    if out.suffix == ".png":
        from pyrovae import plots

        if not (x.dim() == 4 and x.shape[1] in (1, 3)):
            raise ValueError(f"data of shape {tuple(x.shape[1:])} are no images. Give --output FILE.npz.")
        title = "p(hidden | seen): several draws, and their mean"
        plots.repairs(x, ~hidden, found.mean, found.draws, out, title)
    else:
        arrays = {"x": x, "mask": ~hidden, **found._asdict()}
        np.savez(out, **{name: t.cpu().numpy() for name, t in arrays.items()})
    error = (found.mean - x)[hidden].square().mean().sqrt().item()
    print(f"{len(x)} data, {hidden[0].sum():,} of {x[0].numel():,} elements hidden: {out}")
    print(f"RMSE of the mean where hidden: {error:.4f}; chains accepted {found.acceptance.mean():.0%} of the proposals")
    stuck = int((found.acceptance < 0.01).sum())
    if stuck:
        print(f"the chains of {stuck} of {len(x)} data hardly moved: do not trust their draws; give more --num-steps")


def _mask(mask: str, x_shape: tuple[int, ...]) -> Tensor:
    """Returns which elements of a datum are seen."""
    if mask not in _SIDES:
        seen = load_mask(Path(mask))
        try:
            return seen.expand(x_shape)
        except RuntimeError:
            raise ValueError(f"mask {mask} has shape {tuple(seen.shape)}, but data have {x_shape}.") from None
    if len(x_shape) < 2:
        raise ValueError(f"mask {mask} is for images, but data have shape {x_shape}. Give a .npy file.")
    height, width = x_shape[-2:]
    rows, columns = torch.arange(height).unsqueeze(1), torch.arange(width).unsqueeze(0)
    middle = (rows >= height // 4) & (rows < height - height // 4)
    middle = middle & (columns >= width // 4) & (columns < width - width // 4)
    hidden = {
        "top": rows < height // 2,
        "bottom": rows >= height - height // 2,
        "left": columns < width // 2,
        "right": columns >= width - width // 2,
        "center": middle,
    }[mask]
    return ~hidden.expand(x_shape)
