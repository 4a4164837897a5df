"""``pyrovae sample`` and ``pyrovae reconstruct``."""

from pathlib import Path
from typing import Any

import pyro
import torch

from pyrovae import storage
from pyrovae.cli.common import (
    MEANS,
    SplitName,
    data_to_score,
    load_run_and_data,
    load_table,
    new_file,
    write_array,
)
from pyrovae.cli.labels import arguments_of, draw
from pyrovae.cli.pictures import as_pictures, draw_curves, is_drawn_as_curves
from pyrovae.cli.pieces import reconstruct_pieces, recordings_of, sample_pieces
from pyrovae.cli.rows import TABLES, draw_given, draw_rows, given_context, read_given, reconstruct_rows
from pyrovae.cli.series import reconstruct_series, sample_series
from pyrovae.cli.text import reconstruct_lines, sample_lines
from pyrovae.data import Schema
from pyrovae.structures import MissingDataVAE, SequenceVAE


def sample(
    run: str,
    num_samples: int = 64,
    output: str | None = None,
    mean: bool = False,
    given: str | None = None,
    missing: bool = False,
    label: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    trust: bool = False,
) -> None:
    """Draws samples from p(x) of a trained run, and writes them as a picture, an array, rows, text or sounds.

    Columns of a table that are left out are no part of p(x): identifiers are numbered from 1, or empty if they are
    names, and constants have their value in the training data.

    Args:
        run: the run directory.
        num_samples: number of samples.
        output: a .png, .npy or .csv file; samples-<seed>.png in the run directory by default. Of a table a .csv, .tsv
            or .parquet file, written as the training data were; samples-<seed>.csv by default. Of text a .txt file;
            samples-<seed>.txt by default. Of sounds a .wav or .flac file, in which they follow one another, .png or
            .npy; samples-<seed>.wav by default.
        mean: write the mean of p(x | z) instead of a draw from it.
        given: cells of a table that all rows shall have, as 'sex=Female, age=40.5'; with double quotes around a cell
            that has a comma. Draws are exact for columns that the model conditions on, by importance weights for
            others. Columns that the model conditions on and that are not given have cells of random training rows.
        missing: leave cells of a table empty where those of random rows of the training data are missing.
        label: the class of all samples, for runs that take labels. By default a run with a context has all classes in
            turn, and a semi-supervised run draws them.
        temperature: of text; below 1 the most probable words become more frequent. Other values than 1 give no draws
            from p(x).
        top_p: of text, the share of the probability that is kept at each word, of the most probable ones. Below 1 it
            gives no draws from p(x).
        steps: of sequences, sounds and music, the number of steps of each sample; those of a datum by default.
        seed: seed of the samples.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    vae, config = storage.load_run(run, trust=trust)
    schema, vocabulary, time_series = (config.get(name) for name in ("table", "vocabulary", "time_series"))
    recordings = recordings_of(config)
    if steps is not None and (steps < 1 or not isinstance(vae, SequenceVAE)):
        raise ValueError(f"steps must be at least 1, and is for sequences, sounds and music alone; got {steps}.")
    if isinstance(vae, SequenceVAE) and (mean or missing or given is not None or label is not None):
        raise ValueError("mean, given, missing and label are not for sequences. Leave them out.")
    if vocabulary is not None:
        if mean or missing or given is not None or label is not None:
            raise ValueError("mean, given, missing and label are not for text. Leave them out.")
        sample_lines(
            vae, vocabulary, num_samples, output or Path(run) / f"samples-{seed}.txt", temperature, top_p, seed
        )
        return
    if temperature != 1 or top_p != 1:
        raise ValueError("temperature and top_p are for text, and this run is on other data. Leave them out.")
    if schema is not None:
        if label is not None:
            raise ValueError("label is not for tables. Leave it out; --given has cells that all rows shall have.")
        if mean:
            raise ValueError("mean is not for tables, whose classes have none. Leave it out.")
        _sample_rows(
            vae, schema, config, num_samples, output or Path(run) / f"samples-{seed}.csv", given, missing, seed
        )
        return
    if recordings is not None:
        place = output or Path(run) / f"samples-{seed}{recordings[0].endings[0]}"
        sample_pieces(vae, recordings, num_samples, steps, place, seed)
        return
    if given is not None or missing:
        raise ValueError("given and missing are for tables, and this run is on other data. Leave them out.")
    if time_series is not None:
        sample_series(vae, time_series, num_samples, steps, output or Path(run) / f"samples-{seed}.csv", seed)
        return
    out = new_file(output or Path(run) / f"samples-{seed}.png", (".png", ".npy", ".csv"))
    pyro.set_rng_seed(seed)
    if isinstance(vae, SequenceVAE):
        x = vae.sample(num_samples, config["x_shape"][0] if steps is None else steps)
    else:
        x = draw(vae, num_samples, label, mean=mean)
    if out.suffix == ".png":
        from pyrovae import plots

        shown = as_pictures(x) if isinstance(vae, SequenceVAE) else x
        plots.samples(shown, out, MEANS if mean else "samples from p(x)")
    else:
        write_array(x, out)
    print(f"{num_samples} samples: {out}")


def _sample_rows(
    vae: MissingDataVAE,
    schema: Schema,
    config: dict[str, Any],
    num_samples: int,
    output: str | Path,
    given: str | None,
    missing: bool,
    seed: int,
) -> None:
    """Draws rows of a table, and writes them with its columns, types and formats."""
    out = new_file(output, (".csv", ".tsv", ".parquet", ".pq"))
    pyro.set_rng_seed(seed)
    cells = {} if given is None else read_given(schema, given)
    open_names = [name for name in schema.context_names if name not in cells]
    is_weighted = any(name in cells for name in schema.names)
    if open_names and is_weighted:
        raise ValueError(
            f"given has cells of columns that the model draws: give cells of all that it conditions on too, here of "
            f"{', '.join(open_names)}."
        )
    train = load_table(config["data"], schema)[0].train if missing or open_names else None
    context = None
    if schema.context:
        context, line = given_context(schema, cells, train if open_names else None, num_samples)
        if not is_weighted:
            print(line)
    if is_weighted and given is not None:
        x, ess = draw_given(vae, schema, given, num_samples)
        print(f"given {given}: effective sample size {ess:,.0f}")
    else:
        x = draw_rows(vae, schema, num_samples, context)
    if missing and train is not None:
        holes = train.x[torch.randint(len(train.x), (num_samples,))].isnan()
        x = torch.where(holes, torch.nan, x)
    schema.write(x, out, context)
    print(f"{num_samples:,} rows: {out}")


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
    """Reconstructs the first data of a split by a trained run, as a picture, an array, rows, text, sounds or music.

    Rows of a table have the medians of p(x | z) for numbers and its most probable classes, at one draw of z.

    Args:
        run: the run directory.
        split: the split of the data.
        num_data: number of data.
        output: a .png, .npy or .csv file; reconstructions-<split>.png in the run directory by default. Of a table a
            .csv, .tsv or .parquet file; reconstructions-<split>.csv by default. Of text a .txt file, each line before
            its reconstruction, with a tab between; reconstructions-<split>.txt by default. Of sounds a .wav or .flac
            file, of music a .mid or .json file, each piece before its reconstruction, .png or .npy;
            reconstructions-<split>.wav or .mid by default.
        data: another data set of the same shape; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        seed: seed of the latents.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    config = storage.read_config(run, trust=trust)
    vocabulary, recordings = config.get("vocabulary"), recordings_of(config)
    if vocabulary is not None or recordings is not None:
        ending = ".txt" if recordings is None else recordings[0].endings[0]
        place = output or Path(run) / f"reconstructions-{split}{ending}"
        vae, splits, preprocessing = load_run_and_data(run, data, data_root, trust)
        x = data_to_score(splits, split, preprocessing, num_data).x
        if recordings is not None:
            reconstruct_pieces(vae, recordings, x, place, seed)
        elif vocabulary is not None:
            reconstruct_lines(vae, vocabulary, x, place, seed)
        return
    ending, endings = (".csv", TABLES) if config.get("table") else (".png", (".png", ".npy", ".csv"))
    out = new_file(output or Path(run) / f"reconstructions-{split}{ending}", endings)
    vae, splits, preprocessing = load_run_and_data(run, data, data_root, trust)
    pyro.set_rng_seed(seed)
    part = data_to_score(splits, split, preprocessing, num_data)
    x = part.x
    if splits.schema is not None:
        rows = reconstruct_rows(vae, splits.schema, *arguments_of(vae, part, splits.schema))
        splits.schema.write(rows, out, part.context)
        print(f"{len(rows)} reconstructions: {out}")
        return
    reconstructed = vae.reconstruct(*arguments_of(vae, part))
    if isinstance(vae, SequenceVAE):
        reconstructed = reconstructed.masked_fill(x.isnan(), torch.nan)
    if splits.time_series is not None and out.suffix == ".csv":
        reconstruct_series(splits.time_series, data or config["data"], x, reconstructed, part.rows, out)
    elif out.suffix == ".png" and isinstance(vae, SequenceVAE) and (splits.time_series or is_drawn_as_curves(x)):
        draw_curves(x, reconstructed, splits.time_series, "data and reconstructions", out)
    elif out.suffix == ".png":
        from pyrovae import plots

        if isinstance(vae, SequenceVAE):
            x, reconstructed = as_pictures(torch.cat([x, reconstructed])).chunk(2)
        plots.reconstructions(x, reconstructed, out)
    else:
        write_array(reconstructed, out)
    print(f"{len(x)} reconstructions: {out}")
