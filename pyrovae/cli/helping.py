"""The help of the command line: the common options on one screen, all of them with ``--help-all``."""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

_WIDTH = 80
_INDENT = 26  # of the second column


@dataclass(frozen=True)
class Page:
    """What ``--help`` of a command shows.

    Args:
        examples: command lines.
        groups: the common options, by a title; the others are named without a text.
    """

    examples: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]


PAGES: dict[str, Page] = {
    "describe": Page(
        ("pyrovae describe table.csv", "pyrovae describe table.csv --output schema.yaml"),
        {"common": ("file", "output", "kinds", "missing")},
    ),
    "train": Page(
        (
            "pyrovae train --data table.csv",
            "pyrovae train --data mnist --latent-dim 32 --prior VampPrior --run runs/vamp",
        ),
        {
            "data and run": ("data", "run", "preprocessing", "resume"),
            "model": ("latent_dim", "prior", "likelihood", "encoder"),
            "training": ("loss", "optimizer", "epochs", "batch_size", "patience", "seed", "device"),
        },
    ),
    "evaluate": Page(
        ("pyrovae evaluate runs/mnist", "pyrovae evaluate runs/mnist --num-data 100 --output scores.csv"),
        {"common": ("run", "split", "num_data", "output", "data", "method", "seconds", "device")},
    ),
    "compare": Page(
        ("pyrovae compare runs/a runs/b",),
        {"common": ("runs", "split", "num_data", "output", "picture", "data")},
    ),
    "sweep": Page(
        ("pyrovae sweep sweep.yaml", "pyrovae sweep sweep.yaml --trials 50"),
        {"common": ("file", "trials", "directory", "seed")},
    ),
    "diagnose": Page(
        ("pyrovae diagnose runs/mnist", "pyrovae diagnose runs/mnist --nuts-samples 0"),
        {"common": ("run", "split", "num_data", "nuts_samples", "other", "output")},
    ),
    "report": Page(
        ("pyrovae report runs/mnist", "pyrovae report runs/a runs/b --output ab.html"),
        {"common": ("runs", "output", "num_data", "seconds")},
    ),
    "sample": Page(
        ("pyrovae sample runs/mnist", "pyrovae sample runs/adult --given 'sex=Female' --output rows.csv"),
        {"common": ("run", "num_samples", "output", "mean", "given", "label", "steps", "seed")},
    ),
    "reconstruct": Page(
        ("pyrovae reconstruct runs/mnist",),
        {"common": ("run", "split", "num_data", "output", "data")},
    ),
    "forecast": Page(
        ("pyrovae forecast runs/recordings --steps 60",),
        {"common": ("run", "steps", "split", "num_data", "num_draws", "output")},
    ),
    "repair": Page(
        ("pyrovae repair runs/mnist --mask left",),
        {"common": ("run", "mask", "split", "num_data", "num_draws", "output")},
    ),
    "score": Page(
        ("pyrovae score runs/adult new.csv", "pyrovae score runs/adult new.csv --output scores.csv"),
        {"common": ("run", "file", "output", "num_explained", "reference", "seconds")},
    ),
    "impute": Page(
        ("pyrovae impute runs/adult holes.csv",),
        {"common": ("run", "file", "output", "num_draws", "num_completed", "seed")},
    ),
    "encode": Page(
        ("pyrovae encode runs/mnist", "pyrovae encode runs/adult new.csv"),
        {"common": ("run", "file", "split", "output", "data", "device")},
    ),
    "parts": Page(("pyrovae parts", "pyrovae train --likelihood.help Normal"), {}),
}


class HelpAll(argparse._HelpAction):
    """The action of ``--help-all``."""

    def __call__(self, parser: Any, *args: Any) -> None:
        parser._print_message(parser.format_help_all(), sys.stdout)
        parser.exit()


def overview(description: str, groups: dict[str, dict[str, str]]) -> str:
    """Returns the help of the whole command line.

    Args:
        description: what the library is, in a line.
        groups: the commands by a title, each with a line.
    """
    lines = ["usage: pyrovae COMMAND ...", "", *textwrap.wrap(description, _WIDTH)]
    for title, commands in groups.items():
        lines += ["", f"{title}:"]
        for name, text in commands.items():
            lines += _two_columns(f"  {name}", text, indent=16)
    lines += ["", "examples:", "  pyrovae train", "  pyrovae train --data table.csv", "  pyrovae evaluate runs/table"]
    lines += ["", "options of a command: pyrovae COMMAND --help, all of them: --help-all", "version: --version", ""]
    return "\n".join(lines)


def short_help(name: str, description: str, actions: Sequence[Any], notes: Iterable[str] = ()) -> str:
    """Returns the help of a command that fits on a screen.

    Args:
        name: the command.
        description: what it does, in a line.
        actions: its options.
        notes: paragraphs for the end.
    """
    page, by_name = PAGES[name], {a.dest: a for a in actions}
    lines = _head(name, description, actions)
    for title, options in page.groups.items():
        lines += ["", f"{title}:"]
        for option in options:
            lines += _two_columns(_left(by_name[option]), _sentence(by_name[option]))
    shown = {option for options in page.groups.values() for option in options}
    more = [a.option_strings[0] for a in actions if a.dest not in shown and _is_option(a)]
    if more:
        lines += ["", *_filled(f"more: {', '.join(map(_dashed, more))}", "  "), "  each with a text: --help-all"]
    return "\n".join([*lines, *_notes(notes)])


def full_help(name: str, description: str, actions: Sequence[Any], notes: Iterable[str] = ()) -> str:
    """Returns the help of a command with all options and the whole text of each; arguments as of :func:`short_help`."""
    page, by_name = PAGES[name], {a.dest: a for a in actions}
    shown = {option for options in page.groups.values() for option in options}
    more = tuple(a.dest for a in actions if a.dest not in shown and _is_option(a))
    lines = _head(name, description, actions)
    for title, options in {**page.groups, "more": more}.items():
        if options:
            lines += ["", f"{title}:"]
        for option in options:
            lines += _two_columns(_left(by_name[option]), _whole(by_name[option]))
    return "\n".join([*lines, *_notes(notes)])


def class_help(option: str, name: str, description: str, actions: Sequence[Any]) -> str:
    """Returns the help of a class that an option takes.

    Args:
        option: the option, such as "--likelihood".
        name: the class.
        description: the first line of its docstring.
        actions: the options of its arguments.
    """
    lines = [*textwrap.wrap(f"{option} {name}: {description}", _WIDTH), ""]
    shown = [a for a in actions if _is_option(a)]
    for action in shown:
        lines += _two_columns(_left(action, dashes=False), _whole(action))
    nested = [a.option_strings[0] for a in shown if _value(a) == "CLASS"]
    if nested:
        lines += ["", *_filled(f"arguments of a class: {option}.help {name} {nested[0]}.help CLASS", "  ")]
    if not shown:
        lines.append("It takes no arguments.")
    return "\n".join([*lines, ""])


def class_list(option: str, classes: dict[str, str]) -> str:
    """Returns the help of an option that takes a class: the classes, each with a line."""
    lines = [f"classes of {option}:"]
    for name, text in classes.items():
        lines += _two_columns(f"  {name}", text, indent=28)
    return "\n".join([*lines, "", f"the arguments of one: {option}.help {next(iter(classes), 'CLASS')}", ""])


def _head(name: str, description: str, actions: Sequence[Any]) -> list[str]:
    positional = [f"{a.dest.upper()}{' ...' if a.nargs == '+' else ''}" for a in actions if not a.option_strings]
    lines = [" ".join(["usage: pyrovae", name, *positional, "[options]"]), "", *textwrap.wrap(description, _WIDTH)]
    return [*lines, "", "examples:", *(f"  {example}" for example in PAGES[name].examples)]


def _notes(notes: Iterable[str]) -> list[str]:
    return [line for note in notes for line in ("", *_filled(note, "  "))] + [""]


def _filled(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _two_columns(left: str, right: str, indent: int = _INDENT) -> list[str]:
    text = textwrap.wrap(right, _WIDTH - indent, break_on_hyphens=False)
    if len(left) > indent - 2:
        return [left, *(" " * indent + line for line in text)]
    first, *others = text or [""]
    return [f"{left:<{indent}}{first}".rstrip(), *(" " * indent + line for line in others)]


def _is_option(action: Any) -> bool:
    """Returns whether an action is an argument of the command, and not help about one."""
    return action.dest.rpartition(".")[2] not in ("help", "help_all") and action.help != argparse.SUPPRESS


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _left(action: Any, dashes: bool = True) -> str:
    if not action.option_strings:
        return f"  {action.dest.upper()}"
    option = action.option_strings[0]
    return f"  {_dashed(option) if dashes else option} {_value(action)}".rstrip()


def _value(action: Any) -> str:
    """Returns a word for the value of an option, none for a flag."""
    if action.nargs == 0 or action.dest == "print_config":
        return ""
    kinds = _kinds(action)
    if any(get_origin(kind) in (list, tuple, Sequence, Iterable) for kind in kinds):
        return "LIST"
    choices = [str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    if choices:
        choices += ["true", "false"] if bool in kinds else []
        return "|".join(choices)
    if bool in kinds:
        return "true|false"
    if float in kinds or int in kinds:
        return "X" if float in kinds else "N"
    return "CLASS" if _takes_class(action) else action.dest.rpartition(".")[2].upper()


def _kinds(action: Any) -> tuple[Any, ...]:
    """Returns the type of an option's value and, of unions and other generic types, those that it is made of."""

    def with_parts(hint: Any) -> tuple[Any, ...]:
        parts = () if get_origin(hint) is Literal else get_args(hint)
        return (hint, *(kind for part in parts if not isinstance(part, list) for kind in with_parts(part)))

    return with_parts(getattr(action, "_typehint", str))


def _takes_class(action: Any) -> bool:
    """Returns whether an option takes the name of a class, and arguments of it after a dot."""
    plain = (Any, bool, int, float, str, type(None), dict, list, tuple)
    return any(isinstance(kind, type) and kind not in plain for kind in _kinds(action))


def _default(action: Any) -> str:
    """Returns the default of an option in words; "" if it is none, or said in its text."""
    value = action.default
    if value is None or value is False or value in ((), argparse.SUPPRESS) or "default" in (action.help or ""):
        return ""
    if isinstance(value, dict):
        return f" [{value['class_path'].rpartition('.')[2]}]" if "class_path" in value else ""
    value = f"{value:g}" if isinstance(value, float) else str(value)
    return f" [{value.lower() if value in ('True', 'False') else value}]"


def _text(action: Any) -> str:
    if action.dest == "print_config":
        return "print the settings that the other options give, as a file for --config, and end."
    return re.sub(r"``|:\w+:`~?|`|\\(?=[a-z])", "", " ".join((action.help or "").replace("%%", "%").split()))


def _whole(action: Any) -> str:
    """Returns the text of an option, and its default."""
    text = _text(action)
    return f"{text}{'' if text.endswith('.') or not text else '.'}{_default(action)}".strip()


def _sentence(action: Any) -> str:
    """Returns the first clause of the text of an option, and its default."""
    return re.split(r"(?<!\.)[.;:](?=\s|$)", _text(action), maxsplit=1)[0] + _default(action)
