"""Shared by test files: the failure rate of statistical tests, equality to the bit, and processes that are killed."""

import builtins
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae import storage

# Chance that a statistical test fails with another seed although the library is right.
FAILURE_RATE = 1e-4


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Asserts that two nested values are the same to the bit: types, keys and their order, dtypes, NaN included."""
    assert type(a) is type(b), f"{where}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert bits(a) == bits(b), f"{where} differs by up to {(a.double() - b.double()).abs().max().item()}"
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert repr(a) == repr(b), f"{where}: {a!r} and {b!r}"  # exact for floats, and NaN equals NaN


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def in_new_process(call: str, folder: Path) -> str:
    """Runs ``module.function(folder)`` of a module in tests/ in a new interpreter; returns what it printed."""
    module, function = call.split(".")
    code = f"import sys, pathlib, {module}; {module}.{function}(pathlib.Path(sys.argv[1]))"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


class Moments:
    """Counts moments at which a process may die, and kills it at one of them, as a power failure would.

    The moments are, for every file that is written: half of it in the temporary file, before the flush to the disk,
    before the renaming and after it; and wherever :meth:`pass_one` is called.
    """

    def __init__(self, last: int | None):
        self.passed, self.last = 0, last
        self.open, self.fsync, self.replace = builtins.open, os.fsync, os.replace

    def pass_one(self, *_: Any) -> None:
        self.passed += 1
        time.sleep(0.001)  # so that a kill from outside may come here too
        if self.passed == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        storage.open = lambda *args: HalfWritten(self.open(*args), self)
        os.fsync = lambda file: (self.pass_one(), self.fsync(file))
        os.replace = lambda *paths: (self.pass_one(), self.replace(*paths), self.pass_one())


class HalfWritten:
    """A file with a moment in the middle of each write."""

    def __init__(self, file: Any, moments: Moments):
        self.file, self.moments = file, moments

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.moments.pass_one()
        self.file.write(content[half:])

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def ended_by(work: Callable[[Moments], None], last: int | None = None, seconds: float | None = None) -> int:
    """Forks a process that works until a moment or for some seconds and is killed; returns the signal, 0 if it ended.

    Only for a process that has not computed anything yet: threads do not survive a fork.
    """
    child = os.fork()
    if child == 0:
        moments = Moments(last)
        moments.install()
        status = 1
        try:
            work(moments)
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status != 1 << 8, "the work raised"
    return status
