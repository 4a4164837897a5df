"""``pyrovae sample`` and ``pyrovae reconstruct``."""

from pathlib import Path

import pyro

from pyrovae import storage
from pyrovae.cli.common import MEANS, SplitName, load_run_and_data, new_file, prior_means, write_array


def sample(
    run: str, num_samples: int = 64, output: str | None = None, mean: bool = False, seed: int = 0, trust: bool = False
) -> None:
    """Draws samples from p(x) of a trained run, and writes them as a picture or an array.

    Args:
        run: the run directory.
        num_samples: number of samples.
        output: a .png, .npy or .csv file; samples-<seed>.png in the run directory by default.
        mean: write the mean of p(x | z) instead of a draw from it.
        seed: seed of the samples.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    out = new_file(output or Path(run) / f"samples-{seed}.png", (".png", ".npy", ".csv"))
    vae, _ = storage.load_run(run, trust=trust)
    pyro.set_rng_seed(seed)
    x = prior_means(vae, num_samples) if mean else vae.sample(num_samples)
    if out.suffix == ".png":
        from pyrovae import plots

        plots.samples(x, out, MEANS if mean else "samples from p(x)")
    else:
        write_array(x, out)
    print(f"{num_samples} samples: {out}")


def reconstruct(
    run: str,
    split: SplitName = "test",
    num_data: int = 10,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    trust: bool = False,
) -> None:
    """Reconstructs the first data of a split by a trained run, and writes them as a picture or an array.

    Args:
        run: the run directory.
        split: the split of the data.
        num_data: number of data.
        output: a .png, .npy or .csv file; reconstructions-<split>.png in the run directory by default.
        data: another data set of the same shape; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        seed: seed of the latents.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    out = new_file(output or Path(run) / f"reconstructions-{split}.png", (".png", ".npy", ".csv"))
    vae, splits, _ = load_run_and_data(run, data, data_root, trust)
    pyro.set_rng_seed(seed)
    x = getattr(splits, split).x[:num_data]
    reconstructed = vae.reconstruct(x)
    if out.suffix == ".png":
        from pyrovae import plots

        plots.reconstructions(x, reconstructed, out)
    else:
        write_array(reconstructed, out)
    print(f"{len(x)} reconstructions: {out}")
