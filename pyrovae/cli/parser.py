"""The parser of the command line, and its entry point ``main``."""

import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import docstring_parser
import pyro
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

import pyrovae
from pyrovae import config as configs
from pyrovae import data as datasets
from pyrovae import storage, trackers
from pyrovae.cli.common import (
    context_names,
    default_run,
    is_music,
    is_sounds,
    is_table,
    is_text,
    load_data,
    load_music,
    load_series,
    load_sounds,
    load_table,
    load_text,
    names_tabular,
    read_schema,
)
from pyrovae.cli.comparison import compare
from pyrovae.cli.defaults import LIKELIHOOD, table_defaults
from pyrovae.cli.description import describe
from pyrovae.cli.diagnosis import diagnose
from pyrovae.cli.drawing import reconstruct, sample
from pyrovae.cli.encoding import encode
from pyrovae.cli.forecasting import forecast
from pyrovae.cli.listing import Parser, parts
from pyrovae.cli.music import music_defaults
from pyrovae.cli.pixels import has_missing, options_for
from pyrovae.cli.repairing import repair
from pyrovae.cli.reporting import report
from pyrovae.cli.rows import impute, score
from pyrovae.cli.scoring import evaluate
from pyrovae.cli.series import series_defaults
from pyrovae.cli.signals import Terminated
from pyrovae.cli.sounds import sound_defaults
from pyrovae.cli.sweeping import sweep
from pyrovae.cli.text import text_defaults, text_options
from pyrovae.cli.training import train
from pyrovae.complaints import explain
from pyrovae.distributed import init_process_group, single_process, was_restarted
from pyrovae.documents import read_yaml

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "data": {"describe": describe},
    "train and score": {"train": train, "evaluate": evaluate, "compare": compare, "sweep": sweep},
    "look at a run": {
        "diagnose": diagnose,
        "report": report,
        "sample": sample,
        "reconstruct": reconstruct,
        "encode": encode,
        "forecast": forecast,
        "repair": repair,
    },
    "rows of a table": {"score": score, "impute": impute},
    "look up": {"parts": parts},
}
COMMANDS = {name: function for group in GROUPS.values() for name, function in group.items()}


FLAGS = ("quiet", "resume", "trust", "mean", "missing", "compile")  # given without a value


SEVERAL = ("runs",)  # positional, of one or more words
OPTIONAL = ("file",)  # positional, of at most one word, where the default is None


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Writes warnings as lines of their own words: the program that they name otherwise is this one."""
    before = warnings.formatwarning

    def written(message: Any, category: type[Warning], *place: Any, **kwargs: Any) -> str:
        return f"warning: {message}\n" if category is UserWarning else before(message, category, *place, **kwargs)

    warnings.formatwarning = written
    try:
        yield
    finally:
        warnings.formatwarning = before


@plain_warnings()
def main(argv: list[str] | None = None) -> None:
    """Runs the command line; exits with a message and status 1 when the input is wrong."""
    argv = normalized(sys.argv[1:] if argv is None else argv) or ["--help"]
    trust = "--trust" in argv
    if (trust or _names_own_code(argv)) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the last, so that no file here stands in for an installed module
    os.environ.pop("JSONARGPARSE_DEFAULT_ENV", None)  # options come from the command line and its files alone
    parser = make_parser(trust)
    try:
        settings = parser.parse_args(argv)
        world = init_process_group(settings[settings.subcommand].get("device"))
        load_data.cache_clear()
        load_sounds.cache_clear()
        load_music.cache_clear()
        if settings.subcommand == "train" and (settings.train.resume or was_restarted()):
            settings = _resumed(parser, argv, settings.train)
            settings.train.resume = True
        elif settings.subcommand == "train":
            settings = _with_defaults(parser, argv, settings)
        command = settings.subcommand
        # A loss may hold a network, which is built here. It gets random numbers other than those of the VAE's weights.
        pyro.set_rng_seed((settings[command].get("seed", 0) + 1) % 2**32)
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
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the lines, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        text = str(error).partition("Trace Shapes:")[0].rstrip()  # Pyro adds a long table
        if text.startswith("Does not validate"):  # of a class that refused its arguments when it was built
            text = explain(text)
        absent = re.search(r"\S+ is not installed\. Install it: .*", text)  # the cause, of a class that is built
        sys.exit(f"pyrovae: error: {absent[0] if absent else text}")
    except Terminated as ended:
        print(ended, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt as error:
        sys.exit(f"\npyrovae: interrupted. {error}".rstrip())


class CheckedFile(ActionConfigFile):
    """The action of ``--config``: what was checked is what is parsed, and names no code that is not trusted."""

    trust = False

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        where, text = "--config", str(values)
        if os.path.isfile(text):  # also False for a long text, where Path raises
            where, text = text, Path(text).read_text(encoding="utf-8")
        elif ":" not in text:
            raise FileNotFoundError(f"there is no file {text}. Give a file of settings, or settings, with --config.")
        try:
            config = configs.check_options(configs.with_current_names(read_yaml(text)), self.trust)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # The comment, longer than any path can be, keeps jsonargparse from taking the text for the name of a file.
        super().__call__(parser, cfg, "#" * 10_000 + "\n" + yaml.safe_dump(config), option_string)


class TrustedFile(CheckedFile):
    """The action of ``--config`` after ``--trust``."""

    trust = True


def make_parser(trust: bool = False) -> ArgumentParser:
    """Returns the parser of the whole command line.

    Args:
        trust: whether files may name code outside pyrovae, torch and Pyro.
    """
    groups = {title: {name: _summary(f) for name, f in group.items()} for title, group in GROUPS.items()}
    summary = _summary(pyrovae)
    parser = Parser(groups=groups, prog="pyrovae", description=summary, version=pyrovae.__version__)
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        commands.add_subcommand(name, command_parser(name, trust), help=_summary(function))
    return parser


def command_parser(name: str, trust: bool = False) -> ArgumentParser:
    """Returns the parser of one command, from the signature and docstring of its function."""
    function = COMMANDS[name]
    epilog = f"Data sets: {', '.join(datasets.descriptions())}." if name == "train" else None
    parser = Parser(name, description=_summary(function), epilog=epilog)
    if name == "train":
        action = TrustedFile if trust else CheckedFile
        parser.add_argument("--config", action=action, help="a file with arguments, such as the config.yaml of a run")
    helps = {param.arg_name: param.description for param in docstring_parser.parse(function.__doc__).params}
    parameters = inspect.signature(function).parameters
    flags = {name: text for name, text in helps.items() if name in FLAGS and parameters[name].default is False}
    several = {name: text for name, text in helps.items() if name in SEVERAL}
    optional = {name: text for name, text in helps.items() if name in OPTIONAL and parameters[name].default is None}
    for argument, text in several.items():
        parser.add_argument(argument, nargs="+", type=str, help=text)
    parser.add_function_arguments(function, as_positional=True, skip={*flags, *several, *optional, "config"})
    for argument, text in optional.items():
        parser.add_argument(argument, nargs="?", type=str, help=text)
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    return parser


def _names_own_code(argv: list[str]) -> bool:
    """Returns whether an option names a class outside pyrovae, torch and Pyro, which may be in this directory."""
    names = []
    for option, following in pairwise([*argv, ""]):
        name, equals, value = option.partition("=")
        if name.removeprefix("--").partition(".")[0].removesuffix("+") in (*configs.PARTS, "method"):
            names.append(value if equals else following)
    return any("." in name and not configs.is_trusted(name) for name in names)


def _summary(documented: Any) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


def _config(settings: Any) -> str:
    """Returns the configuration of a training run as YAML: all arguments but the run directory and the flags."""
    config = yaml.safe_load(command_parser("train").dump(settings, skip_unset=False))
    return yaml.safe_dump(
        {k: v for k, v in config.items() if k not in ("config", *configs.NOT_KEPT, *FLAGS)}, sort_keys=False
    )


def normalized(argv: list[str]) -> list[str]:
    """Returns a command line with underscores in names of options, and a value for ``--compile`` without one."""

    def with_underscores(arg: str) -> str:
        name, equals, value = arg.partition("=")
        return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg

    argv = list(map(with_underscores, argv))
    for i in range(1, len(argv)):
        if argv[i - 1] == "--tracker":  # whose names are known in other cases
            argv[i] = next((name for name in trackers.__all__ if name.lower() == argv[i].lower()), argv[i])
    return [
        "--compile=true" if arg == "--compile" and following not in ("auto", "true", "false") else arg
        for arg, following in pairwise([*argv, ""])
    ]


def _with_defaults(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a training run with what fits its data, where the command line does not give it."""
    if settings.train.time is not None:
        return _for_series(parser, argv, settings)
    if is_music(settings.train.data):
        return _for_music(parser, argv, settings)
    if is_sounds(settings.train.data):
        return _for_sounds(parser, argv, settings)
    if is_text(settings.train.data):
        return _for_text(parser, argv, settings)
    if is_table(settings.train.data):
        return _for_table(parser, argv, settings)
    return _for_images(parser, *_for_missing(parser, argv, settings))


def _for_missing(parser: ArgumentParser, argv: list[str], settings: Any) -> tuple[list[str], Any]:
    """Returns a command line and its settings with what data with NaN need, where it does not say anything else."""
    train = settings.train
    if not has_missing(train.data, train.data_root):
        return argv, settings
    options = [] if train.structure is not None else ["--structure", "Incomplete"]
    if not any(arg.partition("=")[0] == "--preprocessing" for arg in argv):
        options += ["--preprocessing", "grey"]
    if not options:
        return argv, settings
    if init_process_group().is_rank0:
        print(f"NaN: elements are missing, so {' '.join(options)}")
    argv = [*argv, *options]
    return argv, parser.parse_args(argv)


def _for_images(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a command line with the options that fit its images, where it does not give them."""
    options, line = options_for(settings.train.data, settings.train.data_root, argv)
    if not options:
        return settings
    if init_process_group().is_rank0:
        print(line)
    at = argv.index("train") + 1
    return parser.parse_args([*argv[:at], *options, *argv[at:]])


def _for_text(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a training run on text: what the command line leaves open follows from its words."""
    splits, _ = load_text(settings.train.data, **text_options(settings.train))
    defaults = text_defaults(cast(datasets.Vocabulary, splits.vocabulary), len(splits.train.x))
    return _parse_with(parser, argv, defaults)


def _for_sounds(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a training run on sounds: what the command line leaves open suits them."""
    num_pieces = len(load_sounds(settings.train.data)[0].train.x)
    chosen = _parse_with(parser, argv, sound_defaults(num_pieces))
    return _parse_with(parser, argv, sound_defaults(num_pieces, chosen.train.epochs))


def _for_music(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a training run on songs: what the command line leaves open suits them."""
    train = settings.train
    num_pieces = len(load_music(train.data, None, train.per_quarter, train.max_steps)[0].train.x)
    chosen = _parse_with(parser, argv, music_defaults(num_pieces))
    return _parse_with(parser, argv, music_defaults(num_pieces, chosen.train.epochs))


def _for_series(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a training run on time series: what the command line leaves open suits them."""
    train = settings.train
    names, schema = context_names(train.columns), read_schema(train.schema)
    splits, _ = load_series(train.data, None, train.time, train.series, names, train.growth, train.max_steps, schema)
    num_pieces, _, num_columns = splits.train.x.shape
    chosen = _parse_with(parser, argv, series_defaults(num_pieces, num_columns))
    return _parse_with(parser, argv, series_defaults(num_pieces, num_columns, chosen.train.epochs))


def _for_table(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of a training run on a table: what the command line leaves open follows from the table.

    Args:
        parser: the parser of the whole command line.
        argv: the command line.
        settings: the settings of ``pyrovae train`` on this command line alone.
    """
    if not names_tabular(_parse_with(parser, argv, {"likelihood": LIKELIHOOD}).train.likelihood.class_path):
        return settings  # a file of numbers, with a likelihood of the user's choice
    names = context_names(settings.train.context)
    splits, _ = load_table(settings.train.data, read_schema(settings.train.schema), names)
    num_rows, num_columns = splits.train.x.shape
    chosen = _parse_with(parser, argv, table_defaults(num_rows, num_columns))
    return _parse_with(parser, argv, table_defaults(num_rows, num_columns, chosen.train.epochs))


def _parse_with(parser: ArgumentParser, argv: list[str], defaults: dict[str, Any]) -> Any:
    """Returns the settings of a command line of training, with defaults that it overrides."""
    at = argv.index("train") + 1
    return parser.parse_args([*argv[:at], "--config", yaml.safe_dump(defaults), *argv[at:]])


def _resumed(parser: ArgumentParser, argv: list[str], settings: Any) -> Any:
    """Returns the settings of the run to be resumed, with the changes on the command line.

    Args:
        parser: the parser of the whole command line.
        argv: the command line.
        settings: the settings of ``pyrovae train`` on this command line alone.
    """
    directory = Path(settings.run) if settings.run is not None else default_run(settings.data)
    if not storage.can_resume(directory):
        if init_process_group().is_rank0:
            print(f"nothing to resume in {directory}: starting")
        return _with_defaults(parser, argv, parser.parse_args(argv))
    stored = storage.read_config(directory, trust=settings.trust)
    if stored.get("built"):
        raise ValueError(
            f"{directory} was written by save_run, so that there is no training to resume. Go on in Python."
        )
    storage.check_unedited(directory, stored)
    # As text, not as a file, because the names in it are the present ones.
    added = ("x_shape", "fingerprint", "table", *storage.ENCODINGS, *configs.NOT_KEPT)
    text = yaml.safe_dump({name: value for name, value in stored.items() if name not in added})
    at = argv.index("train") + 1
    resumed = parser.parse_args([*argv[:at], "--config", text, *argv[at:]])
    resumed.train.run = str(directory)
    # The checkpoint restores the optimizer and the random state: a change that it would undo must be an error.
    config = yaml.safe_load(_config(resumed.train))
    before = configs.EARLIER | stored
    changed = [name for name in config if config[name] != before.get(name) and name not in configs.RENEWABLE]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} cannot change when a run is resumed. Leave this out, or start a new run with "
            f"--run DIRECTORY; what may change is {', '.join(configs.RENEWABLE)}."
        )
    checkpoint = directory / "checkpoint.safetensors"
    done = len(storage.read_checkpoint(checkpoint)["history"]) if checkpoint.exists() else 0
    if config["epochs"] < done:
        raise ValueError(
            f"epochs is {config['epochs']}, but {done} epochs of the run in {directory} are done. Give at least "
            f"{done}, with which the run ends as it is."
        )
    return resumed
