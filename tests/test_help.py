"""Help fits on a screen, and all of it is there."""

import shlex
from argparse import SUPPRESS
from functools import cache

import pytest

from pyrovae import bounds, encoders, likelihoods, priors
from pyrovae.cli import main
from pyrovae.cli.helping import PAGES
from pyrovae.cli.listing import classes_of
from pyrovae.cli.parser import COMMANDS, command_parser, normalized

# Every fourth class of each, because jsonargparse takes long to read one.
OF_CLASSES = [
    (option, package, name)
    for option, package, base in [
        ("--prior", priors, priors.Prior),
        ("--likelihood", likelihoods, likelihoods.Likelihood),
        ("--encoder", encoders, encoders.Encoder),
        ("--loss", bounds, bounds.Bound),
    ]
    for name in [name for name in classes_of(package) if issubclass(getattr(package, name), base)][::4]
]


parser_of = cache(command_parser)


def printed(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    captured = capsys.readouterr()
    assert exit.value.code == 0 and captured.err == ""
    return captured.out


def class_text(option, name, capsys, *more):
    with pytest.raises(SystemExit):
        parser_of("train").parse_args([f"{option}.help", *name.split(), *more])
    return capsys.readouterr().out


def assert_fits(text):
    lines = text.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_on_a_screen(command):
    text = parser_of(command).format_help()
    assert_fits(text)
    assert "\nexamples:\n" in text


def test_every_command_is_listed_on_a_screen(capsys):
    text = printed(["--help"], capsys)
    assert_fits(text)
    assert set(COMMANDS) <= set(text.split())
    assert printed([], capsys) == text


def test_the_command_line_prints_help(capsys):
    assert printed(["encode", "--help"], capsys) == parser_of("encode").format_help()
    assert printed(["encode", "--help-all"], capsys) == parser_of("encode").format_help_all()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_text_in_all_of_the_help_and_its_name_in_the_short_one(command):
    parser = parser_of(command)
    short, full = parser.format_help(), parser.format_help_all()
    assert max(map(len, full.splitlines())) <= 80
    for action in parser._actions:
        if action.dest in ("help", "help_all") or action.dest.endswith(".help") or action.help == SUPPRESS:
            continue
        name = action.option_strings[0].replace("_", "-") if action.option_strings else action.dest.upper()
        assert name in short
        assert f"  {name}" in full
        if action.dest != "print_config":  # jsonargparse's own
            assert " ".join(action.help.rstrip(".").split()) in " ".join(full.split()), name


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_command_lines_that_are_understood(command):
    for example in PAGES[command].examples:
        _, name, *argv = shlex.split(example)
        if "--likelihood.help" not in argv:
            parser_of(name).parse_args(normalized(argv))


@pytest.mark.parametrize(("option", "package", "name"), OF_CLASSES)
def test_help_of_a_class_shows_its_arguments_alone(option, package, name, capsys):
    text = class_text(option, f"{package.__name__}.{name}", capsys)  # Pyro has a class of the same name as some bounds
    assert_fits(text)
    assert text.startswith(f"{option} {name}: ")


def test_help_of_a_class_does_not_list_all_networks(capsys):
    text = class_text("--likelihood", "Normal", capsys)
    assert "--likelihood.learn_scale true|false" in text and "torch." not in text
    # By its full name: other tests may define classes with the name MLP.
    nested = class_text("--likelihood", "Normal", capsys, "--likelihood.network.help", "pyrovae.nn.MLP")
    assert nested.startswith("--likelihood.network MLP: ") and "--likelihood.network.hidden LIST" in nested


def test_help_of_an_option_without_a_class_lists_the_classes(capsys):
    text = class_text("--prior", "", capsys)
    assert all(f"  {name}" in text for name in classes_of(priors))
