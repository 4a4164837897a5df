"""``pyrovae report``: one file that holds all, needs no network, and shows nothing that a run could smuggle in."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from pyrovae.cli import main, page

TINY = [
    "--latent-dim",
    "2",
    "--num-samples",
    "2",
    "--encoder.network.hidden",
    "[4]",
    "--likelihood.network.hidden",
    "[4]",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run on the digits, twice."""
    root = tmp_path_factory.mktemp("runs")
    main(["train", "--run", str(root / "a"), "--epochs", "2", *TINY])
    shutil.copytree(root / "a", root / "b")
    return root


class Resources(HTMLParser):
    """Collects what a page would load, and checks that tags are closed."""

    VOID = ("meta", "img", "circle", "path", "polyline")

    def __init__(self, text):
        super().__init__()
        self.loaded, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data-sheet")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data-sheet")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_alone(text):
    found = Resources(text)
    assert not found.open
    assert all(url.startswith("data:image/png;base64,") for url in found.loaded)


def test_training_ends_with_a_report_that_holds_all(runs):
    text = (runs / "a" / "report.html").read_text()
    assert_alone(text)
    result = json.loads((runs / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{result['log_marginal']:.3f} ± {result['standard_error']:.3f}" in text
    assert f"{1 - result['not_trusted'] / 300:.1%}" in text
    for title in ("Learning curve", "Samples and reconstructions", "Latent space", "Diagnosis", "Configuration"):
        assert f"<h3>{title}</h3>" in text
    assert text.count("<img ") == 2 and text.count('data-tile="') == 300 and "could not be made" not in text
    assert "class_path: pyrovae.likelihoods.Bernoulli" in text


def test_several_runs_are_compared_and_a_diagnosis_is_shown(runs, capsys):
    (runs / "b" / "diagnosis-test").mkdir()
    verdict = {"collapse": {"question": "Does it collapse?", "verdict": "No <b>."}, "gaps": {"skipped": "too few"}}
    (runs / "b" / "diagnosis-test" / "diagnosis.json").write_text(json.dumps(verdict))
    main(["report", str(runs / "a"), str(runs / "b"), "--num-data", "10", "--seconds", "1"])
    assert "report-b.html" in capsys.readouterr().out
    text = (runs / "a" / "report-b.html").read_text()
    assert_alone(text)
    assert "Comparison" in text and "the first 10 test data" in text
    assert "No &lt;b&gt;." in text and "skipped: too few" in text
    main(["report", str(runs / "a"), str(runs / "b"), "--num-data", "10", "--seconds", "1"])  # it is written again


def test_what_is_refused(runs, tmp_path):
    for argv, message in [
        (["--output", "x.pdf"], "output must end in .html"),
        ([str(runs / "a")], "a directory twice"),
        (["--num-data", "0"], "num_data must be at least 1"),
        ([str(tmp_path / "none")], "is not a run directory"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["report", str(runs / "a"), *argv])
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(SystemExit, match="already exists and is no report"):
        main(["report", str(runs / "a"), "--output", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_text_is_not_read_as_html():
    hostile = '<script>alert("x")</script>\'"'
    text = page.page(hostile, [
        page.cards({hostile: hostile}),
        page.table([hostile], [[hostile]]),
        page.details(hostile, page.text(hostile)),
        page.line_chart([1.0, 2.0], {hostile: [1.0, 2.0]}, hostile, hostile),
        page.scatter(torch.rand(2, 2), [hostile, "b"], [hostile, "b"], None, [hostile, hostile]),
    ])  # fmt: skip
    assert_alone(text)
    assert text.count("<script>") == 1 and "alert(&quot;" in text


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2e-5, 1e-5), (1e6, 1e6 + 3), (-27.1, 1400.0)])
def test_ticks_are_few_round_numbers_inside(low, high):
    ticks = page._ticks(low, high)
    assert 4 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_epochs_have_whole_ticks():
    assert page._ticks(0.96, 2.04, least=1.0) == [1, 2]
    assert ">1.2<" not in page.line_chart([1, 2], {"loss": [4.0, 2.0]}, "epoch", "nats")


def test_curves_are_where_their_numbers_are():
    text = page.line_chart([1, 2, 3], {"loss": [4.0, float("nan"), 2.0]}, "epoch", "nats")
    [points] = re.findall('polyline points="(.*?)"', text)
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert x1 < x2 and y1 < y2  # downwards
    assert text.count("<circle") == 2 and "loss\nepoch 3: 2.0000" in text
    assert "no finite numbers" in page.line_chart([1], {"loss": [float("inf")]}, "epoch", "nats")


def test_the_sheet_of_pictures_holds_each_at_its_place():
    from io import BytesIO

    from PIL import Image

    tiles = torch.arange(5).div(5).reshape(5, 1, 1, 1).expand(5, 1, 4, 4)
    sheet = np.array(Image.open(BytesIO(page._sheet(tiles, columns=2))))
    assert sheet.shape == (144, 96)
    for i in range(5):
        top, left = 48 * (i // 2), 48 * (i % 2)
        assert (sheet[top : top + 48, left : left + 48] == round(i / 5 * 255)).all()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_without_a_network(runs, scheme, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True)
        tab, messages = context.new_page(), []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.goto((runs / "a" / "report.html").resolve().as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        tab.locator("circle[data-tile='299']").hover(force=True)
        assert tab.locator("#tip").inner_text().startswith("test datum 299, label ")
        assert tab.locator("#tip div").count() == 1
        assert messages == []
        browser.close()
