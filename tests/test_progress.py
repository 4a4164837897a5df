"""Progress bars: in a terminal, and in the log of a job."""

import io
from types import SimpleNamespace

import pytest

from pyrovae.progress import tqdm


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[Terminal, io.StringIO], ids=["terminal", "log"])
def stderr(request, monkeypatch):
    file = request.param()
    monkeypatch.setattr("pyrovae.progress.sys", SimpleNamespace(stderr=file, modules={}))
    return file


class Clock:
    """A bar whose time is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


def test_a_log_has_a_line_in_ten_seconds(stderr, monkeypatch):
    clock = Clock(monkeypatch)
    bar = tqdm(total=1000, file=stderr, miniters=1)
    for _ in range(1000):
        clock.now += 0.05
        bar.update()
    bar.close()
    shown = stderr.getvalue().count("\r")
    assert shown > 300 if stderr.isatty() else shown in (6, 7)  # in 50 seconds
    assert "1000/1000" in stderr.getvalue()
    assert stderr.getvalue().endswith("\n")


def test_what_ends_before_the_delay_shows_nothing(stderr, monkeypatch):
    clock = Clock(monkeypatch)
    bar = tqdm(total=10, file=stderr, delay=0.5)
    bar.reset(20)
    bar.set_description("compiling")
    clock.now = 0.4
    bar.update(20)
    bar.close()
    assert stderr.getvalue() == ""


def test_a_line_that_was_shown_is_ended(stderr, monkeypatch):
    clock = Clock(monkeypatch)
    bar = tqdm(total=10, file=stderr, delay=0.5)
    clock.now = 1.0
    bar.set_description("compiling")
    clock.now = 1.2
    bar.close()
    assert stderr.getvalue().endswith("\n")


def test_a_bar_that_is_turned_off_is_silent(stderr):
    bar = tqdm(total=10, file=stderr, disable=True)
    bar.set_description("nothing")
    bar.reset(5)
    bar.update(5)
    bar.close()
    assert stderr.getvalue() == ""
