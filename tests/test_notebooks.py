"""What results show in a notebook, the table of a long history, and the notebooks of the tutorials."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from pyrovae import notebooks
from pyrovae.diagnostics import DIAGNOSES
from pyrovae.diagnostics.base import Diagnosis
from pyrovae.estimators import Estimate, ImportanceSampling, compare_all
from pyrovae.training import History

sys.path.append(str(Path(__file__).parents[1] / "docs" / "_ext"))
import tutorials

TUTORIALS = sorted(tutorials.FOLDER.glob("*.ipynb"))
every_tutorial = pytest.mark.parametrize("notebook", TUTORIALS, ids=lambda path: path.stem)


class Cells(HTMLParser):
    """Collects the text of each cell, and the pictures."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.pictures, self.tag = [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.pictures += tag == "img" and dict(attrs)["src"].startswith("data:image/png;base64,")

    def handle_data(self, data):
        if self.tag in ("td", "th", "pre"):
            self.cells.append(data)


def an_estimate(shift=0.0):
    zeros = torch.zeros(20)
    return Estimate(torch.arange(20) / 10 + shift, zeros, zeros + 50, zeros, 50, ImportanceSampling(50))


def test_a_history_shows_its_table_and_its_curve():
    shown = Cells(History([{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.5}])._repr_html_())
    assert shown.cells == ["epoch", "loss", "1", "3.0000", "2", "2.5000"] and shown.pictures == 1
    assert "without epochs" in History()._repr_html_()


def test_an_estimate_shows_its_errors_and_its_trust():
    shown = Cells(an_estimate()._repr_html_())
    assert shown.cells[:4] == ["log p(x), nats a datum", "standard error: samples", "data", "data trusted"]
    assert shown.cells[4] == "= 0.950" and shown.cells[7] == "20 of 20"
    assert "k-hat" in shown.cells[8]


def test_a_comparison_shows_its_text_and_its_picture():
    ranking = compare_all({"a": an_estimate(), "b<": an_estimate(1.0)})
    for result in (ranking, ranking.pairs[0]):
        shown = Cells(result._repr_html_())
        assert "".join(shown.cells) == str(result) and shown.pictures == 1


def test_every_diagnosis_shows_itself():
    assert all(issubclass(kind, Diagnosis) and hasattr(kind, "_repr_html_") for kind in DIAGNOSES.values())


def test_text_is_not_read_as_html():
    assert "<b>" not in notebooks.table(["<b>"], [["<b>"]]) + notebooks.preformatted("<b>")


@pytest.mark.parametrize("epochs", [20, 60, 500])
def test_entries_of_now_and_then_are_columns_whatever_the_length(epochs):
    every = max(1, epochs // 50)
    records = [{"epoch": i, "loss": 1.0} | ({"active": 3} if i % every == 0 else {}) for i in range(1, epochs + 1)]
    names, *rows = History(records).table().splitlines()
    assert names.split() == ["epoch", "loss", "active"]
    shown = [int(row.split()[0]) for row in rows]
    assert shown[0] == 1 and shown[-1] == epochs and len(set(shown)) == 20 and shown == sorted(shown)
    assert sum(len(row.split()) == 3 for row in rows) >= 19 - (every > 1)


@every_tutorial
def test_a_tutorial_runs_and_shows_pictures_and_numbers(notebook):
    shown = [Cells(output) for kind, _, output in tutorials.run(notebook) if kind == "code"]
    assert sum(cells.pictures for cells in shown) >= 3
    assert any("log p(x)" in text for cells in shown for text in cells.cells)


@every_tutorial
def test_a_tutorial_is_a_notebook_without_output(notebook):
    content = json.loads(notebook.read_text())
    assert content["nbformat"] == 4 and content["cells"][0]["source"][0].startswith("# ")
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_there_are_two_tutorials():
    assert len(TUTORIALS) == 2
