"""The command line: ``pyrovae train | evaluate | diagnose | sample | reconstruct``.

The arguments of a command are those of its function below: jsonargparse reads their type hints and docstrings.
"""

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import docstring_parser
import numpy as np
import pyro
import torch
import yaml
from jsonargparse import ArgumentParser
from pyro.infer import ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

import pyrovae
from pyrovae import data as datasets
from pyrovae import diagnostics, storage
from pyrovae.config import make_vae
from pyrovae.distributed import init_process_group, single_process, was_restarted
from pyrovae.distributions import Blocks, center
from pyrovae.encoders import DiagonalNormal, Encoder
from pyrovae.estimators import Estimate, Estimator, ImportanceSampling, independent_baseline, log_marginal
from pyrovae.likelihoods import Bernoulli, Likelihood, bits_per_dim
from pyrovae.nn import Shape
from pyrovae.priors import Prior, StandardNormal
from pyrovae.training import Callback, History, MetricsFile, fit
from pyrovae.vae import VAE

__all__ = ["diagnose", "evaluate", "main", "reconstruct", "sample", "train"]

_NUM_MONITORED = 300  # validation data in which training measures whether the latents collapse

Preprocessing = Literal["grey", "static", "dynamic"]
SplitName = Literal["train", "validation", "test"]


def train(
    data: str = "digits",
    run: str | None = None,
    data_root: str = "data",
    preprocessing: Preprocessing = "dynamic",
    latent_dim: int = 16,
    prior: Callable[[int], Prior] = StandardNormal,
    likelihood: Callable[[int, Shape], Likelihood] = Bernoulli,
    encoder: Callable[[Shape, int], Encoder] = DiagonalNormal,
    loss: ELBO | None = None,
    optimizer: Callable[[Iterable], Optimizer] = lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    epochs: int = 500,
    batch_size: int = 128,
    patience: int | None = 50,
    clip_norm: float | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    compile: bool = False,
    resume: bool = False,
    trust: bool = False,
    *,
    config: str = "",
) -> None:
    """Trains a VAE on a data set, scores it on the test split, and writes the results to a run directory.

    Args:
        data: the name of a data set (listed at the end of this help), or a .npy, .npz or .csv file.
        run: the run directory; runs/<data> by default. An existing directory is never overwritten.
        data_root: the directory of the images, which are downloaded to it if needed.
        preprocessing: what to do with values between 0 and 1. grey: nothing (also for tables); static: binarise all
            data once; dynamic: binarise the training data again for each batch, and the other splits once.
        latent_dim: number of latent dimensions.
        prior: the class of p(z).
        likelihood: the class of p(x | z).
        encoder: the class of q(z | x).
        loss: the class of the training objective, such as one of pyrovae.bounds; Pyro's Trace_ELBO by default.
        optimizer: the class of the optimizer.
        scheduler: the class of a learning-rate schedule, which steps once per epoch.
        epochs: passes over the training data.
        batch_size: data per step.
        patience: stop when the validation loss has not improved for this many epochs; null to never stop early.
        clip_norm: largest norm of the gradient over all parameters; null for no limit.
        num_samples: importance samples per datum for the test log p(x).
        seed: seed of the weights, the batches and the noise.
        device: cpu, cuda, cuda:1, ...; with cuda, each process of torchrun takes a GPU of its own.
        compile: train and score by compiled graphs, which take some seconds to make.
        resume: continue the run in the run directory with its configuration, or start it if there is none. Only epochs
            (to a larger number), patience, num_samples, data_root and device may be changed.
        trust: allow the configuration of a resumed run to name classes outside pyrovae, torch and Pyro, which runs
            their code.
        config: the configuration as YAML, to be kept in the run directory.
    """
    directory, world = Path(run) if run is not None else default_run(data), init_process_group(device)
    is_taken, is_new = world.broadcast_from_rank0(
        lambda: (directory.exists() and (not directory.is_dir() or any(directory.iterdir())), not directory.exists())
    )
    if is_taken and not resume:
        raise FileExistsError(
            f"{directory} already exists. Continue the run with --resume, or give another place with --run DIRECTORY."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    _check_device(device)
    pyro.set_rng_seed(seed)
    splits, description = _load(data, data_root, preprocessing)
    x_shape = tuple(splits.train.x.shape[1:])
    vae = make_vae(x_shape, latent_dim, prior, likelihood, encoder).to(device)
    print(f"{description}\n{vae}\nrun directory: {directory}")

    metrics = MetricsFile(directory / "metrics.jsonl")
    callbacks: list[Callback] = []
    monitored = splits.validation.x[:_NUM_MONITORED].to(device)
    if len(monitored) > 1:
        monitor = diagnostics.CollapseMonitor(vae.model, vae.guide, monitored, every=max(1, epochs // 50))
        callbacks.append(_WherePossible(monitor))
    callbacks.append(metrics)  # the last, because it writes the entries of the others
    if world.is_rank0:
        storage.create_run(directory, config, x_shape)
    try:
        history = fit(
            vae.model,
            vae.guide,
            splits.train.x,
            loss=loss,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
            transform=datasets.dynamic_binarization if preprocessing == "dynamic" else None,
            clip_norm=clip_norm,
            validation=splits.validation.x,
            patience=patience,
            callbacks=callbacks,
            checkpoint=directory / "checkpoint.safetensors",
            resume=resume,
            device=device,
            compile=compile,
        )
    except Exception:
        # Bad input leaves nothing behind.
        if world.is_rank0 and is_new and not (directory / "checkpoint.safetensors").exists():
            for name in ("config.yaml", "run.json"):
                (directory / name).unlink()
            directory.rmdir()
        raise

    vae.eval()
    test = splits.test.x.to(device)
    estimate = log_marginal(vae.model, vae.guide, test, num_samples=num_samples, compile=compile)
    if world.is_rank0:
        storage.save(vae, directory / "weights.safetensors")
        _report_training(vae, splits, history, epochs, estimate, metrics, directory)


def _report_training(
    vae: VAE,
    splits: datasets.Splits,
    history: History,
    epochs: int,
    estimate: Estimate,
    metrics: MetricsFile,
    directory: Path,
) -> None:
    """Writes the metrics and the pictures of a run, and prints its results and what can be done next."""
    if len(history) < epochs:
        print(
            f"stopped after epoch {len(history)}: the validation loss had not improved since epoch "
            f"{history.best_epoch}, whose weights are kept."
        )
    n = len(estimate.value)
    result = {
        "split": "test",
        "log_marginal": estimate.value.mean().item(),
        "standard_error": estimate.standard_error.square().sum().sqrt().item() / n,
        "khat_above_0.7": int((estimate.khat > 0.7).sum()),
        "num_data": n,
        "num_samples": estimate.num_samples,
    }
    scores = f"test: {estimate}"
    # The baseline is a probability for binary data, and a density for all others.
    if _is_discrete(vae) == bool(((splits.test.x == 0) | (splits.test.x == 1)).all()):
        name, baseline = independent_baseline(splits.train.x, splits.test.x)
        result["baseline"] = baseline.mean().item()
        scores += f"\n{name}: {result['baseline']:.3f} nats per datum (baseline)"
    metrics.write([*history.records, result])
    _draw(vae, splits, history, directory)
    print(f"\n{history}\n\n{scores}")
    method = re.search(r"method=(\w+)", estimate.remedy)
    options = f"--method {method[1]}" if method else "--num-samples 5000"
    print(f"\npictures, weights and metrics: {directory}\nscore it again: pyrovae evaluate {directory} {options}")
    print(f"what it learned, and where it loses nats: pyrovae diagnose {directory}")


def evaluate(
    run: str,
    split: SplitName = "test",
    method: Estimator | None = None,
    num_samples: int | None = None,
    num_data: int | None = None,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    max_memory: float = 64e6,
    seed: int = 0,
    device: str = "cpu",
    compile: bool = False,
    trust: bool = False,
) -> None:
    """Estimates log p(x) of each datum under a trained run, by importance sampling or another estimator.

    Args:
        run: the run directory.
        split: the split of the data to score.
        method: the class of the estimator, one of pyrovae.estimators; ImportanceSampling by default.
        num_samples: importance samples per datum, 5000 by default. For other methods use --method.num_samples.
        num_data: score only this many data, the first of the split; all by default.
        output: a .csv file for the results of each datum: estimate, standard error, effective sample size, k-hat,
            whether it can be trusted, and what else the method gives.
        data: another data set of the same shape to score; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        max_memory: memory for intermediate results, in bytes.
        seed: seed of the samples.
        device: cpu, cuda, cuda:1, ...; with cuda, each process of torchrun takes a GPU of its own.
        compile: score by compiled graphs, which take some seconds to make.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    world = init_process_group(device)
    out = None if output is None else world.broadcast_from_rank0(lambda: _new_file(output, (".csv",)))
    if num_data is not None and num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    if method is None:
        method = ImportanceSampling(5000 if num_samples is None else num_samples)
    elif num_samples is not None:
        raise ValueError(f"--num-samples is for the default method: give --method.num_samples {num_samples} instead.")
    _check_device(device)
    vae, splits, preprocessing = _load_run(run, data, data_root, trust)
    pyro.set_rng_seed(seed)
    vae.to(device)
    x = _scored(splits, split, preprocessing)[:num_data].to(device)
    estimate = log_marginal(vae.model, vae.guide, x, method=method, max_memory=max_memory, compile=compile)
    if out is not None and world.is_rank0:
        columns = {name: getattr(estimate, name) for name in ("value", "standard_error", "ess", "khat", "trusted")}
        columns |= estimate.diagnostics
        table = torch.stack([torch.arange(len(x)), *(column.double().cpu() for column in columns.values())], dim=1)
        header = ",".join(("datum", *columns))
        np.savetxt(out, table, delimiter=",", fmt=["%d"] + ["%.9g"] * len(columns), comments="", header=header)
        print(f"per datum: {out}")
    print(f"{split}: {estimate}")
    if _is_discrete(vae) and method.relation == "=":
        print(f"{bits_per_dim(estimate.value, x.shape[1:]).mean().item():.4f} bits per dimension, of {x[0].numel():,}")


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
    out = _new_file(output or Path(run) / f"samples-{seed}.png", (".png", ".npy", ".csv"))
    vae, _ = storage.load_run(run, trust=trust)
    pyro.set_rng_seed(seed)
    x = _prior_means(vae, num_samples) if mean else vae.sample(num_samples)
    if out.suffix == ".png":
        from pyrovae import plots

        plots.samples(x, out, _MEANS if mean else "samples from p(x)")
    else:
        _write_array(x, out)
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
    out = _new_file(output or Path(run) / f"reconstructions-{split}.png", (".png", ".npy", ".csv"))
    vae, splits, _ = _load_run(run, data, data_root, trust)
    pyro.set_rng_seed(seed)
    x = getattr(splits, split).x[:num_data]
    reconstructed = vae.reconstruct(x)
    if out.suffix == ".png":
        from pyrovae import plots

        plots.reconstructions(x, reconstructed, out)
    else:
        _write_array(reconstructed, out)
    print(f"{len(x)} reconstructions: {out}")


def diagnose(
    run: str,
    split: SplitName = "test",
    num_data: int = 300,
    method: Estimator | None = None,
    nuts_samples: int = 1000,
    other: str | None = None,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Reports what a trained run learned and where it loses nats: tables with verdicts, a JSON file, pictures.

    Args:
        run: the run directory.
        split: the part of the data to look at.
        num_data: number of data to look at, the first ones; gaps are measured on a third of them.
        method: the class of the estimator of log p(x) for the gaps, one of pyrovae.estimators;
            AnnealedImportanceSampling by default.
        nuts_samples: draws of each of two NUTS chains for the posteriors of three data, after half as many warm-up
            steps: the slowest part. At least 100, or 0 to leave it out.
        other: a second data set of the same shape to compare with the first; without it, the most unusual data are
            listed.
        output: a directory for the results; by default diagnosis-<split> in the run directory.
        data: another data set of the same shape; by default the run's own.
        data_root: where the images are; by default as in training.
        seed: seed of everything that is drawn.
        device: cpu, cuda, cuda:1, ...
        trust: let the run's configuration name classes outside pyrovae, and so run their code.
    """
    if num_data < 30:
        raise ValueError(f"num_data must be at least 30 for a diagnosis, got {num_data}.")
    if nuts_samples and nuts_samples < 100:
        raise ValueError(f"nuts_samples must be at least 100, or 0 to leave NUTS out; got {nuts_samples}.")
    out = Path(output) if output is not None else Path(run) / f"diagnosis-{split}"
    if out.exists():
        raise FileExistsError(f"{out} is there already. Name another place with --output.")
    _check_device(device)
    vae, config = storage.load_run(run, trust=trust)
    root, preprocessing = data_root or config["data_root"], config["preprocessing"]
    splits, described = _load(data or config["data"], root, preprocessing)
    print(described)
    vae.to(device)
    part = getattr(splits, split)
    x = _scored(splits, split, preprocessing)[:num_data].to(device)
    train = _scored(splits, "train", preprocessing)[:num_data].to(device)
    labels = None if part.labels is None else part.labels[: len(x)].to(device)
    strange = None
    if other is not None:
        strange = _scored(_load(other, root, preprocessing)[0], "test", preprocessing)[:num_data].to(device)
        if strange.shape[1:] != x.shape[1:]:
            raise ValueError(f"other has data of shape {tuple(strange.shape[1:])}, the run of {tuple(x.shape[1:])}.")

    inputs = diagnostics.ReportInputs(
        vae.model,
        vae.guide,
        x,
        train,
        held_out=split != "train",
        labels=labels,
        other=strange,
        method=method,
        nuts_samples=nuts_samples,
    )
    results, verdicts = {}, []
    for name, kind in diagnostics.DIAGNOSES.items():
        if name == "posterior" and nuts_samples == 0:
            continue
        print(f"\n== {name.replace('_', ' ')}: {kind.question}")
        pyro.set_rng_seed(seed)  # each diagnostic draws the same, whichever ran before it
        try:
            result = kind.for_report(inputs)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition("Trace Shapes:")[0].rstrip()
            print(f"not for this model or these data: {reason}")
            results[name] = {"skipped": reason}
        else:
            print(result)
            out.mkdir(parents=True, exist_ok=True)
            result.plot(out / f"{name}.png")
            results[name] = result.summary()
            verdicts.append(f"{kind.question} {result.verdict}")
        storage.write_atomically(out / "diagnosis.json", (json.dumps(results, indent=1) + "\n").encode())
    _draw_collapse(Path(run) / "metrics.jsonl", out / "collapse_history.png")
    print("\n== in short")
    for verdict in verdicts:
        print(textwrap.fill(verdict, 80, subsequent_indent="  "))
    print(f"\npictures and numbers: {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "sample": sample,
    "reconstruct": reconstruct,
}
FLAGS = ("resume", "trust", "mean", "compile")  # given without a value
RENEWABLE = ("epochs", "patience", "num_samples", "data_root", "device")  # what may change when a run is resumed


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; exits with a message and status 1 when the input is wrong."""
    argv = [_with_underscores(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    if os.getcwd() not in sys.path:  # where the modules with the user's own classes are
        sys.path.insert(0, os.getcwd())
    parser = make_parser()
    try:
        settings = parser.parse_args(argv)
        world = init_process_group(settings[settings.subcommand].get("device"))
        if settings.subcommand == "train" and (settings.train.resume or was_restarted()):
            settings = _resumed(parser, argv, settings.train)
            settings.train.resume = True
        command = settings.subcommand
        # A loss may hold a network, which is built here. It gets random numbers other than those of the VAE's weights.
        pyro.set_rng_seed((settings[command].seed + 1) % 2**32)
        arguments = parser.instantiate(settings)[command].as_dict()
        arguments.pop("config", None)
        if command == "train":
            arguments["config"] = _config(settings.train)
        # Of several processes only rank 0 prints. It runs alone the commands that are not distributed.
        if command in ("train", "evaluate"):
            with nullcontext() if world.is_rank0 else redirect_stdout(None):
                COMMANDS[command](**arguments)
        elif world.is_rank0:
            with single_process():
                COMMANDS[command](**arguments)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"pyrovae: error: {str(error).partition('Trace Shapes:')[0].rstrip()}")  # Pyro adds a long table
    except KeyboardInterrupt:
        sys.exit("\npyrovae: interrupted. To continue a training run, use --resume.")


def make_parser() -> ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = ArgumentParser(prog="pyrovae", description=pyrovae.__doc__, version=pyrovae.__version__)
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        commands.add_subcommand(name, command_parser(name), help=_summary(function))
    return parser


def command_parser(name: str) -> ArgumentParser:
    """Returns the parser of one command, from the signature and docstring of its function."""
    function = COMMANDS[name]
    epilog = f"Data sets: {', '.join(datasets.descriptions())}." if name == "train" else None
    parser = ArgumentParser(description=_summary(function), epilog=epilog)
    if name == "train":
        parser.add_argument("--config", action="config", help="a file with arguments, such as the config.yaml of a run")
    helps = {param.arg_name: param.description for param in docstring_parser.parse(function.__doc__).params}
    flags = {name: text for name, text in helps.items() if name in FLAGS}
    parser.add_function_arguments(function, as_positional=True, skip={*flags, "config"})
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    return parser


def _summary(function: Callable) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _config(settings: Any) -> str:
    """Returns the configuration of a training run as YAML: all arguments but the run directory and the flags."""
    config = yaml.safe_load(command_parser("train").dump(settings, skip_unset=False))
    return yaml.safe_dump({k: v for k, v in config.items() if k not in ("config", "run", *FLAGS)}, sort_keys=False)


def default_run(data: str) -> Path:
    """Returns the default run directory for a data set."""
    return Path("runs") / Path(data).stem


def _with_underscores(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg


def _resumed(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of the run to be resumed, with the changes on the command line.

    Args:
        parser: the parser of the whole command line.
        argv: the command line.
        settings: the settings of ``pyrovae train`` on this command line alone.
    """
    directory = Path(settings.run) if settings.run is not None else default_run(settings.data)
    if not (directory / "config.yaml").exists():
        if init_process_group().is_rank0:
            print(f"nothing to resume in {directory}: starting")
        return parser.parse_args(argv)
    stored = storage.read_config(directory, trust=settings.trust)
    # As text, not as a file, because the names in it are the present ones.
    text = yaml.safe_dump({name: value for name, value in stored.items() if name != "x_shape"})
    at = argv.index("train") + 1
    resumed = parser.parse_args([*argv[:at], "--config", text, *argv[at:]])
    resumed.train.run = str(directory)
    # The checkpoint restores the optimizer and the random state: a change that it would undo must be an error.
    config = yaml.safe_load(_config(resumed.train))
    changed = [name for name in config if config[name] != stored.get(name) and name not in RENEWABLE]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} cannot change when a run is resumed. Leave this out, or start a new run with "
            f"--run DIRECTORY; what may change is {', '.join(RENEWABLE)}."
        )
    if config["epochs"] < stored["epochs"]:
        raise ValueError(
            f"epochs is {config['epochs']}, but the run in {directory} was started with {stored['epochs']}. Give a "
            "larger number."
        )
    return resumed


def _load_run(
    run: str, data: str | None, data_root: str | None, trust: bool
) -> tuple[VAE, datasets.Splits, Preprocessing]:
    """Returns the VAE of a run, and the data of the run or another data set with their preprocessing."""
    vae, config = storage.load_run(run, trust=trust)
    splits, description = _load(data or config["data"], data_root or config["data_root"], config["preprocessing"])
    print(description)
    return vae, splits, config["preprocessing"]


def _load(data: str, data_root: str, preprocessing: Preprocessing) -> tuple[datasets.Splits, str]:
    """Returns the splits, and lines that describe them. What is to be binarised once is binarised."""
    splits = datasets.load(data, data_root)
    words = {
        "grey": "grey (values as they are)",
        "static": "static binarisation (once, seed 0)",
        "dynamic": "dynamic binarisation (training data again for each batch, the rest once, seed 0)",
    }[preprocessing]
    if preprocessing != "grey":
        seeds = (None if preprocessing == "dynamic" else 0, 1, 2)
        splits = datasets.Splits(
            *(
                part if seed is None else part._replace(x=datasets.static_binarization(part.x, seed))
                for part, seed in zip(splits, seeds, strict=True)
            )
        )
    sizes = " + ".join(f"{len(part.x):,} {name}" for name, part in splits._asdict().items())
    return splits, f"{data}: {sizes} of shape {tuple(splits.train.x.shape[1:])}\npreprocessing: {words}"


def _scored(splits: datasets.Splits, split: SplitName, preprocessing: Preprocessing) -> Tensor:
    """Returns the data of a split for scoring: binarised once, where training binarises each batch."""
    x = getattr(splits, split).x
    return datasets.static_binarization(x, 0) if preprocessing == "dynamic" and split == "train" else x


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


def _draw_collapse(metrics: Path, path: Path) -> None:
    """Plots the mutual information of data and latents over training, if the run recorded it."""
    from pyrovae import plots

    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    records = [record for record in records if "mutual_information" in record]
    if len(records) > 1:
        plots.collapse_history(records, path)
        print(f"\nover training: {path}")


@torch.no_grad()
def _is_discrete(vae: VAE) -> bool | None:
    """Returns whether the data of the likelihood are discrete; None if only some of their columns are."""
    p = vae.decode(vae.prior().sample((1,)))
    blocks: list[Any] = list(p.blocks) if isinstance(p, Blocks) else [p]
    kinds = {block.support.is_discrete for block in blocks}
    return kinds.pop() if len(kinds) == 1 else None


_MEANS = "means of p(x | z), z from the prior"


@torch.no_grad()
def _prior_means(vae: VAE, num_samples: int) -> Tensor:
    return center(vae.decode(vae.prior().sample((num_samples,))))


@torch.no_grad()
def _draw(vae: VAE, splits: datasets.Splits, history: History, directory: Path) -> None:
    from pyrovae import plots  # matplotlib is slow to import

    device = next(vae.parameters()).device
    x = splits.test.x[:1000].to(device)
    labels = splits.test.labels
    plots.samples(_prior_means(vae, 100), directory / "samples.png", _MEANS)
    plots.reconstructions(x[:10], vae.reconstruct(x[:10]), directory / "reconstructions.png")
    plots.latent_space(
        vae.encode(x).sample().float(), None if labels is None else labels[:1000], directory / "latent_space.png"
    )
    plots.learning_curve(history, directory / "learning_curve.png")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _new_file(path: str | Path, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.suffix not in suffixes:
        raise ValueError(f"output must end in {' or '.join(suffixes)}, got {path}.")
    if path.exists():
        raise FileExistsError(f"{path} already exists. Give another file with --output, or another --seed.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_array(x: Tensor, path: Path) -> None:
    array = x.cpu().numpy()
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savetxt(path, array.reshape(len(array), -1), delimiter=",", fmt="%.9g")
