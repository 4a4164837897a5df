"""A process that has imported everything that a training run needs, and forks a run for each line that it reads.

A run so starts in a tenth of a second. Nothing is computed before a fork, because threads do not survive one. Pictures
and the report, which are drawn after the weights are written, are left out.

Each line is a dict in JSON: "argv", of the command line; "seconds" and "signal", when and how the run is killed from
outside; "write" and "where", the write at which it kills itself: "before" or "after" the temporary file takes its
place, or "half" of it. The answer is a line with the status of the process, as subprocess gives it, and the seconds
that it took.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import stat
import sys
import time

from pyrovae.cli import main, training

LONGEST = 300.0  # seconds


def kill_at_write(when, where):
    count, replace, fsync = 0, os.replace, os.fsync

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(a, b):
        nonlocal count
        count += 1
        if count == when and where == "before":
            die()
        replace(a, b)
        if count == when and where == "after":
            die()

    def counted_fsync(file):
        if count + 1 == when and where == "half" and stat.S_ISREG(os.fstat(file).st_mode):  # not a directory
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()
        fsync(file)

    os.replace, os.fsync = counted_replace, counted_fsync


def in_fork(work):
    """Returns the number of a forked process that works with nothing to read, and whose lines nobody reads."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(status)
    return child


def train(argv, write=None, where=None):
    training.pictures_of = lambda *args: {}
    training.write_report = lambda *args: None
    if write is not None:
        kill_at_write(write, where)
    main(argv)


def answer(order):
    began = time.monotonic()
    child = in_fork(lambda: train(order["argv"], order.get("write"), order.get("where")))
    kills = [(order.get("seconds"), order.get("signal")), (LONGEST, signal.SIGKILL)]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        took = time.monotonic() - began
        if ended:
            return [os.waitstatus_to_exitcode(status), took]
        for kill in kills:
            if kill[0] is not None and took > kill[0]:
                os.kill(child, kill[1])
                kills.remove(kill)
                break
        time.sleep(0.005)


def import_like(argv, file):
    """Imports what a run imports."""

    def name_modules():
        train(argv)
        with open(file, "w") as names:
            names.write("\n".join(sys.modules))

    os.waitpid(in_fork(name_modules), 0)
    with open(file) as names:
        for name in names.read().split():
            if name not in sys.modules and name.startswith(("torch", "pyro", "functorch", "sympy")):
                with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
                    importlib.import_module(name)


if __name__ == "__main__":
    import_like(json.loads(sys.argv[1]), sys.argv[2])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
