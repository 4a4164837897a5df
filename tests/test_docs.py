"""The code of the pages runs, their commands parse, and every public name is described and tested."""

import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import pyrovae
from pyrovae.cli.parser import make_parser, normalized

ROOT = Path(__file__).parents[1]
MADE = ("_build", "gallery", "tutorials")  # when the site is built
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.relative_to(ROOT).parts[1] not in MADE),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Namespaces that are imported by name alone, as they need more than the library itself does.
BY_NAME = ["cli", "distributions", "plots", "storage", "training"]
NAMESPACES = ["pyrovae"] + [
    f"pyrovae.{name}"
    for name in sorted({*BY_NAME, *(name for name in pyrovae.__all__ if inspect.ismodule(getattr(pyrovae, name)))})
]
PUBLIC = [
    (namespace, name)
    for namespace in NAMESPACES
    for name in import_module(namespace).__all__
    if not inspect.ismodule(getattr(import_module(namespace), name))
]


@pytest.fixture
def quick(monkeypatch):
    """Training ends after 40 epochs, and a score takes at most 500 samples, whatever a page says."""
    fit, log_marginal = pyrovae.fit, pyrovae.log_marginal

    def quick_fit(*args, **kwargs):
        return fit(*args, **kwargs | {"epochs": min(kwargs.get("epochs", 40), 40)})

    def quick_log_marginal(*args, **kwargs):
        if "num_samples" in kwargs:
            kwargs["num_samples"] = min(kwargs["num_samples"], 500)
        return log_marginal(*args, **kwargs)

    monkeypatch.setattr(pyrovae, "fit", quick_fit)
    monkeypatch.setattr(pyrovae, "log_marginal", quick_log_marginal)


@every_page
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, quick):
    # The blocks of a page share their names. `<!-- skip: next "why" -->` stands before a block that cannot run, and
    # `<!-- invisible-code-block: python ... -->` holds what a page does not show.
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page)
    monkeypatch.chdir(tmp_path)
    for example in document.examples():
        example.evaluate()


@pytest.fixture(scope="module")
def parser():
    return make_parser()


@every_page
def test_the_commands_of_a_page_parse(page, parser):
    text = page.read_text().replace("\\\n", " ")  # a command may go on in the next line
    for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in re.findall(r"^(?:\$ )?pyrovae (.*)", block, re.MULTILINE):
            line = re.sub(r"--config \S+", "", line)  # the file is not there
            words = shlex.split(line, comments=True)
            parser.parse_args(normalized(words))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_namespace_has_a_page_in_the_reference(namespace):
    # The directive describes all public names of its module: docs/_ext/public.py.
    pages = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.rst")]
    assert sum(f".. public:: {namespace}\n" in page for page in pages) == 1


def test_every_public_name_has_a_docstring():
    missing = []
    for namespace, name in PUBLIC:
        value = getattr(import_module(namespace), name)
        # A class may not lean on the docstring of its base, nor on what Python writes for a named tuple.
        text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        if not (text or "").strip() or text.startswith(f"{name}("):
            missing.append(f"{namespace}.{name}")
    assert missing == []


def test_every_public_name_is_tested():
    # Parts and bounds have registries, whose tests look for what is missing. All else is named in a test or has a
    # doctest, or is a base or what a function returns that is tested.
    used_by_parts = {
        *("MaskedElements", "Task", "blocks_of", "check_classes", "check_simplex", "check_temperature"),
        *("one_hot_blocks", "open_unit_interval", "spline_flow"),
    }
    tests = (path for path in (ROOT / "tests").glob("*.py") if path != Path(__file__))
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in tests)))
    values = [(name, getattr(import_module(namespace), name)) for namespace, name in PUBLIC]
    tested = [(name, value) for name, value in values if name in words or ">>>" in (value.__doc__ or "")]
    returned = [inspect.signature(value).return_annotation for _, value in tested if inspect.isroutine(value)]
    untested = [
        (name, value)
        for name, value in values
        if (name, value) not in tested and value not in returned and not inspect.isabstract(value)
    ]
    assert {name for name, _ in untested} - used_by_parts == set()
