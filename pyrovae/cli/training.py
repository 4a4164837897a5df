"""``pyrovae train``."""

import contextlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal, cast

import pyro
import torch
import yaml
from pyro.infer import ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyrovae import data as datasets
from pyrovae import diagnostics, storage
from pyrovae.cli.common import (
    Preprocessing,
    advice_as_options,
    check_device,
    check_fingerprint,
    chosen_method,
    context_names,
    crowded,
    data_to_score,
    default_method,
    default_run,
    is_discrete,
    is_music,
    is_sounds,
    is_table,
    is_text,
    load_music,
    load_series,
    load_sounds,
    load_splits,
    load_table,
    load_text,
    per_step,
    programs_of,
    read_schema,
    unit_of,
)
from pyrovae.cli.labels import arguments_of, note_on, scored
from pyrovae.cli.pictures import pictures_of
from pyrovae.cli.reporting import write_report
from pyrovae.cli.signals import StopOnSignal
from pyrovae.cli.text import per_word, score_by_frequency
from pyrovae.config import is_tabular, make_table_vae, make_vae
from pyrovae.distributed import init_process_group
from pyrovae.encoders import Delta, DiagonalNormal, Encoder
from pyrovae.estimators import (
    Estimate,
    independent_baseline,
    log_marginal,
)
from pyrovae.likelihoods import Autoregressive, Bernoulli, Likelihood
from pyrovae.locks import DirectoryLock, is_empty
from pyrovae.nn import Shape
from pyrovae.priors import ExemplarPrior, Prior, StandardNormal
from pyrovae.progress import tqdm
from pyrovae.structures import (
    MissingDataVAE,
    SemiSupervisedVAE,
    SequenceVAE,
    Structure,
    fit_independent_columns,
    log_prob_of_cells,
)
from pyrovae.structures.assembly import DenseHierarchy, Incomplete, class_of
from pyrovae.trackers import Tracker
from pyrovae.training import Callback, History, MetricsFile, Tracking, fit, trackers_of

_LEAST_SECONDS = 60.0  # to score the test data
_NUM_MONITORED = 300  # validation data in which training measures whether the latents collapse


def _moved(pixels: int, then: Callable | None) -> Callable:
    """Returns a transform of batches that moves images, before another."""

    def transform(*batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moved = datasets.random_shift(*batch, pixels=pixels)
        return moved if then is None else then(*moved)

    return transform


def train(
    data: str = "digits",
    run: str | None = None,
    schema: str | None = None,
    context: list[str] | str | None = None,
    time: str | None = None,
    series: str | None = None,
    columns: list[str] | str | None = None,
    growth: bool = False,
    data_root: str = "data",
    preprocessing: Preprocessing = "dynamic",
    shift: int = 0,
    latent_dim: int = 16,
    prior: Callable[[int], Prior] = StandardNormal,
    likelihood: Callable[[int, Shape], Likelihood] = Bernoulli,
    encoder: Callable[[Shape, int], Encoder] = DiagonalNormal,
    structure: Structure | None = None,
    loss: ELBO | None = None,
    optimizer: Callable[[Iterable], Optimizer] = lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    schedule_every_step: bool = False,
    ema_decay: float | None = None,
    epochs: int = 500,
    batch_size: int = 128,
    patience: int | None = 50,
    clip_norm: float | None = None,
    micro_batch_size: int | None = None,
    precision: Literal["bf16"] | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    characters: bool | None = None,
    max_words: int | None = None,
    max_steps: int | None = None,
    tokenizer: str | None = None,
    per_quarter: int | None = None,
    compile: bool | Literal["auto"] = "auto",
    tracker: Tracker | None = None,
    quiet: bool = False,
    resume: bool = False,
    trust: bool = False,
    *,
    config: str = "",
) -> None:
    """Trains a VAE on a data set, scores it on the test split, and writes the results to a run directory.

    Args:
        data: the name of a data set (--help-all lists them), a .npy, .npz or .h5 file, a folder of pictures, a table
            (.csv, .tsv, .parquet, .xlsx, ...), text, a datum a line (.txt, .txt.gz), a folder or .zip archive of
            sounds (.wav, .flac, .ogg, .mp3, .aiff) or of MIDI files (.mid), or songs as lists of notes (.json). For
            images in files and folders, for tables, text, sounds and music, the settings that are not given are those
            that fit the pixels, the columns and rows, the words and lines, the frames, or the songs.
        run: the run directory; runs/<data> by default. An existing directory is never overwritten.
        schema: the columns of a table, a file of pyrovae describe; found out from the data by default.
        context: columns of a table to condition on, as sex,age. The others are modelled given their cells, and log p
            is conditional. By default those of the schema, or none.
        time: of a table whose rows are steps of time, the column of their times. The rows are then modelled as
            sequences, not each by itself, and the last ones are held out.
        series: of such a table, the column that names the series of a row; a single series by default.
        columns: of such a table, the columns to model, as open,close; all that hold numbers by default.
        growth: of such a table, whether to model how much a column grows from row to row: of positive columns, such as
            prices, the change of the logarithm, of others the change.
        data_root: the directory of the images, which are downloaded to it if needed.
        preprocessing: what to do with values between 0 and 1. grey: nothing (also for tables); static: binarise all
            data once; dynamic: binarise the training data again for each batch, and the other splits once.
        shift: pixels by which training images are moved in each direction, at most; of music, semitones by which songs
            are moved up or down. At random, again for each batch.
        latent_dim: number of latent dimensions.
        prior: the class of p(z).
        likelihood: the class of p(x | z).
        encoder: the class of q(z | x).
        structure: the class of what the parts are put together to, beyond a VAE: Hierarchy, Ladder, DenseHierarchy,
            Incomplete (missing elements; chosen by itself for data with NaN), SemiSupervised, or for sequences
            Recurrent or StateSpace. With
            --likelihood.context_dim and others, a VAE takes the labels of the data as a context.
        loss: the class of the training objective, such as one of pyrovae.bounds; Pyro's Trace_ELBO by default.
        optimizer: the class of the optimizer.
        scheduler: the class of a learning-rate schedule, which steps once per epoch. OneCycleLR without a length spans
            the run.
        schedule_every_step: step the schedule after every step instead; its lengths are then numbers of steps.
        ema_decay: score and keep an exponential moving average of the weights over the steps, of this decay, such as
            0.999; null for the weights themselves.
        epochs: passes over the training data.
        batch_size: data per step.
        patience: stop when the validation loss has not improved for this many epochs; null to never stop early.
        clip_norm: largest norm of the gradient over all parameters; null for no limit.
        micro_batch_size: data that the model runs on at once; the gradients of a batch are added up, so that large
            batches fit into memory. null for whole batches.
        precision: bf16 for matrix products in bfloat16 during training, which is faster on some processors; null for
            float32. The score at the end is computed in float32.
        num_samples: importance samples of the guide per datum for the test log p(x), of sequences filters; null for
            stages of estimators, until each datum can be trusted, in at most a third of the time that training took, or
            a minute.
        seed: seed of the weights, the batches and the noise.
        device: cpu, cuda, cuda:1, ...; with cuda, each process of torchrun takes a GPU of its own.
        characters: of text, whether the steps are characters; words by default.
        max_words: of text, how many of the most frequent words of the training lines are known; 5,000 by default. All
            others become one word, <unknown>.
        max_steps: of text, the longest line in words, with its end; longer ones are cut. By default the longest of the
            training lines, up to 64 words, 256 characters or 128 tokens. With time, the rows of a piece, 64 by default,
            into which longer series are cut; of music, the steps of a piece, those of the longest song up to 160 by
            default.
        tokenizer: of text, a file of the package tokenizers, such as tokenizer.json, that cuts lines into parts of
            words, which take the place of words.
        per_quarter: of music, the steps of a quarter note; 4 by default, of .json files 1.
        compile: train and score by code that a compiler makes, which takes some seconds and is faster in long runs.
            auto, the default, plays traced operations back, which gives the same bits as false, in less time, and
            compiles in the background what long runs gain by.
        tracker: the class of a tracker that numbers and pictures are sent to: TensorBoard, WandB, MLflow or
            PythonLogging. An error of a tracker does not end training. Runs do not keep the option: give it again with
            --resume.
        quiet: print the results alone, without progress bars.
        resume: continue the run in the run directory with its configuration, or start it if there is none. Only epochs,
            patience, num_samples, data_root and device may be changed; as many epochs as are done end the run as it is.
        trust: allow the file of --config, or the configuration of a resumed run, to name classes outside pyrovae,
            torch and Pyro, which runs their code. Classes that options name need no such leave.
        config: the configuration as YAML, to be kept in the run directory.
    """
    directory, world = Path(run) if run is not None else default_run(data), init_process_group(device)
    is_new = world.broadcast_from_rank0(lambda: _check_place(directory, resume))
    kept = storage.read_config(directory, trust=True) if resume and storage.can_resume(directory) else {}
    counts = {"epochs": epochs, "batch_size": batch_size, "patience": patience, "num_samples": num_samples}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    check_device(device)
    pyro.set_rng_seed(seed)
    vae: Any
    has_exemplars = class_of(prior) is ExemplarPrior
    if time is None and (series is not None or columns is not None or growth):
        raise ValueError("series, columns and growth are for a table with time, the column of its times. Give it, too.")
    if is_tabular(likelihood):
        if time is not None:
            raise ValueError("time is for sequences, and the likelihood Tabular for rows. Take another likelihood.")
        if not is_table(data):
            raise ValueError(f"the likelihood Tabular is for a table, a file; data is {data!r}. Take another one.")
        if preprocessing != "grey":
            raise ValueError(f"a table takes preprocessing grey, its cells as they are, got {preprocessing}.")
        known = kept.get("table") or read_schema(schema)
        splits, description = load_table(data, known, context_names(context))
        if has_exemplars:
            raise ValueError("the rows of a table cannot be exemplars. Take --prior VampPrior or GaussianMixture.")
        if structure is not None:
            raise ValueError("structure is not for a table with the likelihood Tabular. Leave one of them out.")
        vae = make_table_vae(cast(datasets.Schema, splits.schema), latent_dim, prior, likelihood, encoder)
        vae.likelihood.start_at(splits.train.x)
        description += f"\n\n{_choices(config)}"
    else:
        if schema is not None and time is None:
            raise ValueError("schema is for a table with the likelihood Tabular, or with time. Leave one of them out.")
        if context is not None:
            raise ValueError(
                "context is for a table with the likelihood Tabular: it names columns. Labels of other data are a "
                "context with --likelihood.context_dim and --encoder.context_dim, the number of classes."
            )
        words = {
            "characters": characters,
            "max_words": max_words,
            "num_steps": max_steps,
            "tokenizer": tokenizer,
        }
        if per_quarter is not None and (time is not None or not is_music(data)):
            raise ValueError(f"per_quarter is for music, and {data} is none. Leave it out.")
        if time is not None:
            given = None if kept else read_schema(schema)
            named = context_names(columns)
            splits, description = load_series(
                data, kept.get("time_series"), time, series, named, growth, max_steps, given
            )
        elif is_music(data):
            if any(words[name] is not None for name in words.keys() - {"num_steps"}):
                raise ValueError(
                    f"characters, max_words and tokenizer are for text, and {data} is music. Leave them out."
                )
            roll = kept.get("piano_roll")
            splits, description = load_music(data, roll, *((None, None) if roll else (per_quarter, max_steps)))
        elif is_text(data):
            vocabulary = kept.get("vocabulary")
            splits, description = load_text(data, vocabulary, **({} if vocabulary else words))
        elif any(value is not None for value in words.values()):
            raise ValueError(
                f"characters, max_words, max_steps and tokenizer are for text, and {data} is none. Leave them out."
            )
        elif is_sounds(data):
            splits, description = load_sounds(data, kept.get("spectrogram"))
        else:
            splits, description = load_splits(data, data_root, preprocessing)
        if has_exemplars:
            if isinstance(structure, Incomplete):
                raise ValueError("data with missing elements cannot be exemplars. Take another prior, as VampPrior.")
            if not isinstance(structure, DenseHierarchy | None):
                raise ValueError(
                    "exemplars are encoded from the data alone, and the encoder of the top latents of "
                    f"{type(structure).__name__} reads something else. Take DenseHierarchy, or another prior."
                )
            if not isinstance(splits.train.x, torch.Tensor):
                raise ValueError("the exemplars of an ExemplarPrior must be in memory, and this file is too large.")
            prior = partial(cast(Any, prior), data=splits.train.x)
        vae = make_vae(tuple(splits.train.x.shape[1:]), latent_dim, prior, likelihood, encoder, structure)
        if splits.piano_roll is not None and not is_discrete(vae):
            raise ValueError(
                f"the likelihood {type(vae.likelihood).__name__} is a density, and keys are on or off. Take "
                "--likelihood SigmoidBelief or Bernoulli."
            )
        if isinstance(vae.likelihood, Autoregressive):
            vae.likelihood.start_at(splits.train.x)
        if (splits.spectrogram or splits.piano_roll or splits.time_series) and isinstance(vae, SequenceVAE):
            steps, seen = arguments_of(vae, splits.train)
            cast(Likelihood, vae.likelihood).start_at(steps[seen])
        loss = structure.loss(vae, splits.train.labels) if structure is not None and loss is None else loss
    check_fingerprint(kept, splits)
    vae.to(device)
    x_shape = tuple(splits.train.x.shape[1:])
    training = arguments_of(vae, splits.train, splits.schema)
    if has_exemplars:
        config = _with_number_of_exemplars(config, len(training[0]))
        training = *training, torch.arange(len(training[0]))
    if any(isinstance(part, Delta) for part in vae.modules()):
        raise ValueError(
            "the encoder Delta is a point and no distribution, so that no score of log p(x) follows training. Take "
            "another encoder, or train an autoencoder from Python, by pyrovae.fit."
        )
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}.")
    is_sequence, is_song = isinstance(vae, SequenceVAE), splits.piano_roll is not None
    if shift and is_sequence != is_song:
        raise ValueError(f"shift moves images, or songs of a model of sequences; {data} is neither. Give --shift 0.")
    if shift and (splits.schema is not None or len(x_shape) < 2):
        raise ValueError(f"shift moves images, but a datum of {data} has shape {x_shape}. Leave it out.")
    if not quiet:
        print(f"{description}\n{vae}\nrun directory: {directory}")

    metrics = MetricsFile(directory / "metrics.jsonl")
    callbacks: list[Callback] = []
    few = data_to_score(splits, "validation", "grey", _NUM_MONITORED, device)
    monitored = arguments_of(vae, few, splits.schema)
    if len(monitored[0]) > 1 and not is_sequence:  # each pair of a sequence and latents is a long loop
        monitor = diagnostics.CollapseMonitor(vae.model, vae.guide, *monitored, every=max(1, epochs // 50))
        callbacks.append(_WherePossible(monitor))
    callbacks.append(metrics)  # the last, because it writes the entries of the others
    lock, stop = DirectoryLock(directory), StopOnSignal(directory)
    world.broadcast_from_rank0(lambda: _take(lock, resume))
    callbacks[:0] = [stop, _InPlace(lock)]
    transform: Callable | None = datasets.dynamic_binarization if preprocessing == "dynamic" else None
    if shift and is_song:
        transform = partial(datasets.random_transposition, semitones=shift)
    elif shift:
        transform = _moved(shift, transform)
    if splits.schema is not None:
        transform = datasets.hide_cells
        print("a fifth of the rows have cells hidden at random in each epoch, so that the VAE learns to fill any holes")
    tracking = None if tracker is None else Tracking(tracker, directory, yaml.safe_load(config))
    if tracking is not None:
        callbacks.append(tracking)
    elif resume and trackers_of(directory):
        names = trackers_of(directory)
        print(f"not tracked any more: {', '.join(names)} followed this run. To go on there, add --tracker {names[-1]}")
    with stop, lock, contextlib.nullcontext() if tracking is None or not world.is_rank0 else tracking:
        checkpoint = directory / "checkpoint.safetensors"
        saved_at = _time_of(checkpoint)
        before = {name: (directory / name).read_bytes() for name in storage.ABOUT if (directory / name).exists()}
        if world.is_rank0:
            storage.create_run(directory, config, x_shape, splits)
        if world.is_rank0 and (line := crowded()):
            print(line, file=sys.stderr)
        began = monotonic()
        try:
            with stop.after_the_step():
                history = fit(
                    vae.model,
                    vae.guide,
                    training,
                    loss=loss,
                    epochs=epochs,
                    batch_size=batch_size,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    schedule_every_step=schedule_every_step,
                    ema_decay=ema_decay,
                    transform=transform,
                    clip_norm=clip_norm,
                    micro_batch_size=micro_batch_size,
                    precision=precision,
                    validation=arguments_of(vae, splits.validation, splits.schema),
                    patience=patience,
                    callbacks=callbacks,
                    checkpoint=checkpoint,
                    resume=resume,
                    device=device,
                    # The search for the nearest exemplars has no graph.
                    compile=False if has_exemplars and compile == "auto" else compile,
                    progress=not quiet,
                )
        except KeyboardInterrupt:
            go_on = f"Go on: pyrovae train --run {directory} --resume"
            if not (directory / "metrics.jsonl").exists():
                raise KeyboardInterrupt(f"No epoch was done. {go_on}.") from None
            raise KeyboardInterrupt(
                f"The checkpoint holds the epochs that were written. {go_on}; end it there: the same with a smaller "
                "--epochs; use it as it is: pyrovae evaluate, and all other commands."
            ) from None
        except Exception:
            # Bad input leaves nothing behind, and a run that was there as it was.
            if world.is_rank0 and _time_of(checkpoint) == saved_at:
                for name in storage.ABOUT:
                    if name in before:
                        storage.write_atomically(directory / name, before[name])
                    else:
                        (directory / name).unlink(missing_ok=True)
                if is_new:
                    lock.release()
                    with contextlib.suppress(OSError):  # of a directory that is not there, or not empty
                        directory.rmdir()
            raise

        vae.eval()
        test = arguments_of(vae, data_to_score(splits, "test", "grey", None, device), splits.schema)
        seconds = max(_LEAST_SECONDS, (monotonic() - began) / 3)
        method = chosen_method(None, num_samples, default_method(vae, seconds))
        estimate = log_marginal(*programs_of(vae, method), *test, method=method, compile=compile, progress=not quiet)
        if world.is_rank0:
            storage.save_trained(vae, directory)
            settings = yaml.safe_load(config) or {}
            result = _report_training(vae, splits, history, epochs, estimate, metrics, directory, settings)
            if tracking is not None:
                tracking.results({f"test/{name}": value for name, value in result.items()})
                for path in sorted(directory.glob("*.png")):
                    tracking.picture(path)


def _with_number_of_exemplars(config: str, count: int) -> str:
    """Returns the configuration of a run, with the number of exemplars of its prior, to load it without the data."""
    settings = yaml.safe_load(config) or {}
    if "prior" not in settings:
        return config
    given = settings["prior"].get("init_args", {})
    if given.get("data") not in (None, count):
        raise ValueError(
            f"the data of ExemplarPrior are the {count:,} training data, got {given['data']}. Leave it out."
        )
    settings["prior"]["init_args"] = given | {"data": count}
    return yaml.safe_dump(settings, sort_keys=False)


def _time_of(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def _check_place(directory: Path, resume: bool) -> bool:
    """Checks that a run may be written to a directory; returns whether it is new."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, and a run is a directory. Give another place with --run.")
    if not resume and directory.exists() and not is_empty(directory):
        raise FileExistsError(
            f"{directory} already exists. Continue the run with --resume, or give another place with --run DIRECTORY."
        )
    return not directory.exists()


def _take(lock: DirectoryLock, resume: bool) -> None:
    """Takes the lock of a run directory, which another process may have filled since it was looked at."""
    lock.acquire()
    try:
        _check_place(lock.directory, resume)
    except FileExistsError:
        lock.release()
        raise
    storage.remove_leftovers(lock.directory)


class _InPlace:
    """A callback that ends training when the run directory was removed or renamed."""

    def __init__(self, lock: DirectoryLock):
        self.lock = lock

    def __call__(self, history: History) -> None:
        self.lock.check()


def _report_training(
    vae: Any,
    splits: datasets.Splits,
    history: History,
    epochs: int,
    estimate: Estimate,
    metrics: MetricsFile,
    directory: Path,
    config: dict[str, Any],
) -> dict[str, Any]:
    """Writes the metrics and the pictures of a run, and prints its results and what can be done next; returns them."""
    if len(history) < epochs:
        print(
            f"stopped after epoch {len(history)}: the validation loss had not improved since epoch "
            f"{history.best_epoch}, whose weights are kept."
        )
    elif history.best_epoch == epochs:
        print(
            f"the validation loss was the lowest in the last epoch, {epochs}: more may lower it. "
            + (
                f"Train again with --epochs {2 * epochs}: the learning rate of this run has come to its end."
                if config.get("scheduler")
                else f"Go on with: pyrovae train --run {directory} --resume --epochs {2 * epochs}"
            )
        )
    n = len(estimate.value)
    result: dict[str, Any] = {
        "split": "test",
        "scored": scored(vae, splits.schema),
        "log_marginal": estimate.value.mean().item(),
        "standard_error": estimate.standard_error.square().sum().sqrt().item() / n,
        "not_trusted": int((~estimate.trusted).sum()),
        "num_data": n,
        "num_samples": estimate.num_samples,
    }
    scores = advice_as_options(f"test: {estimate}{note_on(vae, splits.schema)}")
    name, baseline, by_step = "", None, ""
    if splits.schema is not None:
        name, p = "independent columns", fit_independent_columns(vae.likelihood.cells, splits.train.x)
        baseline = log_prob_of_cells(p, splits.test.x).sum(-1)
    elif splits.vocabulary is not None:
        scores += f"\n{per_word(estimate.value.cpu(), splits.test.x, splits.vocabulary)}"
        name, baseline = score_by_frequency(splits.train.x, splits.test.x, splits.vocabulary)
    elif isinstance(vae, SequenceVAE):
        (steps, seen), (its_steps, its_seen) = (arguments_of(vae, part) for part in (splits.train, splits.test))
        unit = unit_of(splits)
        scores += f"\n{per_step(estimate, int(its_seen.sum()), unit)}"
        if is_discrete(vae) == bool(((its_steps == 0) | (its_steps == 1)).all()):
            name, of_steps = independent_baseline(steps[seen], its_steps[its_seen])
            baseline = torch.zeros(n).index_add(0, its_seen.nonzero()[:, 0], of_steps)
            by_step = f"; -log p(x): {-of_steps.double().mean().item():.3f} nats a {unit}"
    # Not for a file on the disk, which may be larger than the memory.
    elif isinstance(splits.train.x, Tensor) and not isinstance(vae, SemiSupervisedVAE | MissingDataVAE):
        is_binary = bool(((splits.test.x == 0) | (splits.test.x == 1)).all())
        if is_discrete(vae) == is_binary:  # the baseline is a probability for binary data, and a density for others
            name, baseline = independent_baseline(splits.train.x, splits.test.x)
    if baseline is not None:
        result["baseline"] = baseline.mean().item()
        scores += f"\n{name}: {result['baseline']:.3f} nats per datum (baseline{by_step})"
        if result["log_marginal"] < result["baseline"]:
            scores += (
                "\nworse than the baseline, which knows no dependence between the dimensions: train longer, or with "
                "other settings."
            )
    metrics.write([*history.records, result])
    print(f"\n{history}\n\n{scores}")
    files = pictures_of(str(directory), vae, splits, history)
    files["report.html"] = lambda path: write_report(directory, vae, config, splits)
    for name, write in files.items():
        try:
            write(directory / name)
        except Exception as error:  # a picture must not cost the others, nor the results
            print(f"{name} could not be drawn: {' '.join(str(error).split()) or type(error).__name__}")
    print(f"\npictures, weights and metrics: {directory}\non one page: {directory / 'report.html'}")
    print(f"score it again: pyrovae evaluate {directory}")
    if isinstance(vae, SequenceVAE):
        print(f"what follows the test sequences: pyrovae forecast {directory}")
    print(f"what it learned, and where it loses nats: pyrovae diagnose {directory}")
    return result


class _WherePossible:
    """A callback that is dropped, with one line that says why, where it is not defined for the parts of a VAE."""

    def __init__(self, callback: Callback):
        self.callback: Callback | None = callback

    def __call__(self, history: History) -> None:
        if self.callback is None:
            return
        try:
            self.callback(history)
        except (ValueError, NotImplementedError) as error:
            tqdm.write(f"whether the latents collapse is not recorded: {error}")
            self.callback = None


def _choices(config: str) -> str:
    """Returns the settings of a run on a table, in one line."""
    settings = yaml.safe_load(config) or {}
    names = ("latent_dim", "batch_size", "epochs", "patience")
    listed = [f"{name} {settings[name]}" for name in names if name in settings]
    for name in ("prior", "likelihood", "encoder", "optimizer"):
        if isinstance(settings.get(name), dict):
            listed.append(f"{name} {settings[name]['class_path'].rpartition('.')[2]}")
    rate = ((settings.get("optimizer") or {}).get("init_args") or {}).get("lr") if settings else None
    return "settings: " + ", ".join([*listed, *([f"learning rate {rate:g}"] if rate else [])])
