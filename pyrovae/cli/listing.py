"""``pyrovae parts``, and the names that a misspelt one may mean."""

import difflib
import inspect
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from torch import optim
from torch.optim import lr_scheduler

from pyrovae import bounds, encoders, estimators, likelihoods, nn, priors, regularizers, structures, trackers
from pyrovae.cli.helping import HelpAll, class_help, class_list, full_help, overview, short_help
from pyrovae.complaints import explain

# Packages of parts, with the options that take them. Of structures, an option takes those that it can build.
PARTS: dict[str, tuple[str, ModuleType]] = {
    "priors": ("--prior", priors),
    "likelihoods": ("--likelihood", likelihoods),
    "encoders": ("--encoder", encoders),
    "structures": ("--structure", structures),
    "networks": ("--likelihood.network, --encoder.network", nn),
    "bounds": ("--loss", bounds),
    "regularizers": ("--loss.regularizers+", regularizers),
    "estimators": ("--method, of evaluate", estimators),
    "trackers": ("--tracker", trackers),
}


def classes_of(module: ModuleType) -> dict[str, str]:
    """Returns the public classes of a package that can be built, with the first line of the docstring of each."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {
        name: re.sub(r":\w+:`~?([\w.]+)`", r"\1", (cls.__doc__ or "").partition("\n")[0])
        for name, cls in found.items()
        if isinstance(cls, type)
        and not inspect.isabstract(cls)
        and (module is not structures or issubclass(cls, structures.Structure))
    }


def parts() -> None:
    """Lists all parts, bounds, regularizers, estimators and trackers, with a line each."""
    width = min(120, shutil.get_terminal_size().columns)
    for title, (option, module) in PARTS.items():
        print(f"{title} ({option})")
        for name, line in classes_of(module).items():
            text = f"  {name:<26} {line}"
            print(text if len(text) <= width else f"{text[: width - 4]} ...")
        print()
    print("the arguments of a class: pyrovae train --likelihood.help Normal")


class Parser(ArgumentParser):
    """A parser whose help fits on a screen, and whose errors are two lines: what is wrong, and where to look.

    Args:
        command: the command, a key of ``helping.PAGES``; "" for the whole command line, or the arguments of a class.
        groups: the commands by a title, each with a line, of the whole command line.
        kwargs: arguments of ``ArgumentParser``.
    """

    def __init__(self, command: str = "", groups: dict[str, dict[str, str]] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self._command, self._groups = command, groups
        if command:
            self.add_argument("--help_all", action=HelpAll, help="Show all options and exit.")

    def format_help(self, formatter: Any = None) -> str:
        if self._command:
            return short_help(self._command, self.description or "", self._actions)
        if self._groups is not None:
            return overview(self.description or "", self._groups)
        return self._format_class()

    def format_help_all(self) -> str:
        """Returns the help of a command with the whole text of all options."""
        notes = [self.epilog] if self.epilog else []
        notes.append("classes: pyrovae parts. Arguments of a class: for example --prior.help VampPrior")
        return full_help(
            self._command, self.description or "", self._actions, notes[: None if _has_classes(self) else -1]
        )

    def _format_class(self) -> str:
        """Returns the help of a class, for which jsonargparse makes a parser; of a base class, its subclasses."""
        option, _, path = (self.description or "").removeprefix("Help for ").partition("=")
        module, _, name = path.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        option = option.removesuffix(".help")
        if isinstance(cls, type) and inspect.isabstract(cls):
            found = {
                n: line
                for _, package in PARTS.values()
                for n, line in classes_of(package).items()
                if issubclass(getattr(package, n), cls)
            }
            return class_list(option, found)
        given = f"{option}.optimizer".strip("-") if option == "--scheduler" else ""  # the one of the run
        actions = [action for action in self._actions if action.dest != given]
        return class_help(option, name, (cls.__doc__ or "").strip().partition("\n")[0], actions)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"pyrovae: error: {_plain(message)}\n{_advice(message, parser)}\n")
        self.exit(2)


def _has_classes(parser: ArgumentParser) -> bool:
    return any(action.dest.endswith(".help") for action in parser._actions)


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def _plain(message: str) -> str:
    text = explain(message)
    text = re.sub(
        r"(?:\[.* Errors: .*)?Expected a dot import path string: (\S+?)\.?(?: - .*)?$", r"there is no class \1.", text
    )
    key = re.search(r"^([\w.]+): ", text)
    missing = re.search(
        r"(?:class_path '[\w.]*?(\w+)': )?the following arguments are required: ([\w, ]+?)(?: -|\.?$)", text
    )
    if key and missing:
        options = " and ".join(f"--{key[1]}.{name} VALUE" for name in missing[2].split(", "))
        return f"{key[1]}: {missing[1] or 'the class'} needs {missing[2]}. Give {options}."
    needed = re.fullmatch(r"the following arguments are required: (\w+)\.(\w+)", text)
    if needed:  # positional ones
        return f"{needed[1]} needs {needed[2]}. Give it after the command: pyrovae {needed[1]} {needed[2].upper()}."
    text = re.sub(r"argument subcommand: invalid choice: '(.*?)' \(choose from .*", r"there is no command \1.", text)
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"Expected a typing.Literal\[(.*?)\]", r"must be one of \1", text)
    text = re.sub(r"Expected a (int|float|bool)\b", lambda m: f"must be {_KINDS[m[1]]}", text)
    text = re.sub(r"Expected a (?:Sequence|list|List|tuple), got (.*?)\.$", r"it is a list: give '[\1]'.", text)
    return re.sub(r"Option '(.*?)' is not accepted", r"it has no argument '\1'", text)


_MEANT = {  # by words of other programs
    **dict.fromkeys(["lr", "learning_rate"], "--optimizer.lr"),  # an option of classes, which nothing lists
    **dict.fromkeys(["out", "out_dir", "outdir", "output", "output_dir", "run_dir", "save_dir"], "--run"),
}


def _advice(message: str, parser: Any) -> str:
    """Returns a line with the names nearest to the one that is wrong, or the command that lists all."""
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.-]+)", message)
    path = re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", message)
    command = re.search(r"invalid choice: '(.*?)' \(choose from (.*?)\)", message)
    cls = re.search(r"Expected a dot import path string: (\S+?)\.?(?:\s|$)", message)
    argument = re.search(r"Option '(.*?)' is not accepted", message)
    nearest: list[str] = []
    if unknown:
        options = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
        meant = _MEANT.get(unknown[1].replace("-", "_"), "")
        nearest = [meant] if meant in (*options, "--optimizer.lr") else _nearest(f"--{unknown[1]}", options)
    elif path and Path(path[1]).exists():
        return f"Is it the data? Give --data {path[1]}."
    elif command:
        nearest = _nearest(command[1], re.findall(r"[\w-]+", command[2]))
    elif cls:
        nearest = _nearest(cls[1], _names_of_classes())
    elif argument:
        named = re.search(r"class_path='([\w.]+)'", message[argument.end() :])
        module, _, name = named[1].rpartition(".") if named else ("", "", "")
        owner = getattr(sys.modules.get(module), name, None)
        nearest = _nearest(argument[1], inspect.signature(owner).parameters if callable(owner) else [])
    if nearest:
        return f"Nearest: {', '.join(nearest)}."
    return "All options: pyrovae COMMAND --help. All classes: pyrovae parts."


def _nearest(word: str, words: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(word, list(words), n=3, cutoff=0.6)


def _names_of_classes() -> list[str]:
    ours = [name for _, module in PARTS.values() for name in classes_of(module)]
    theirs = [n for m in (optim, lr_scheduler) for n, x in vars(m).items() if isinstance(x, type) and n[0] != "_"]
    return [*ours, *theirs]
