"""Compilation in the background, of a graph that is played back meanwhile: a process of its own makes a library of it.

It is worth its time in long runs alone, and where a step spends a good part of its time on what a compiler fuses. Both
are estimated from the operations, never from the clock, so that a compiled graph takes over at the same call in every
run with the same seed, and its results are the same to the bit.
"""

import math
import operator
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pyrovae.compilation import aot_process, torch_internals
from pyrovae.compilation.recording import Node, Recording, is_random

# What operations take on one core, roughly, in seconds; measured with the parts of benchmarks/parts.py.
_A_FLOP, _AN_ELEMENT, _AN_OPERATION = 1 / 60e9, 0.8e-9, 4e-6
_FUSED = 0.5  # the share that a compiler saves of the time of what is no product
_COMPILATION, _COMPILED_OPERATION = 20.0, 0.025  # seconds to compile a graph, and for each of its operations
_MIN_SHARE = 0.1  # of a step that is saved
_MAX_OPERATIONS = 3000  # more take a compiler many minutes
_PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm"])


class Costs(NamedTuple):
    """What a graph is estimated to take, in seconds.

    Args:
        call: of one call, played back.
        saved: of it, by a compiler.
        compilation: of the graph.
    """

    call: float
    saved: float
    compilation: float


def costs(recording: Recording) -> Costs:
    """Estimates what a graph takes from its operations, and the sizes of what they read and write."""
    products, elements, count = 0.0, 0.0, 0
    for node in recording.nodes:
        if node.op is operator.getitem or node.root is not node and node.root is not None:  # a view
            continue
        count += 1
        name, sizes = node.op._opname, [math.prod(_shape(x)) for x in (node, *node.sources)]
        if name in _PRODUCTS:
            products += 2 * sizes[0] * _shape(node.sources[-2])[-1]
        elif "convolution" in name:
            # Each element of the result meets the filters of its channel; going back, twice. Strides of transposed
            # convolutions are not seen.
            is_back = "backward" in name
            size, filters, result = (sizes[1], sizes[3], node.sources[0]) if is_back else (sizes[0], sizes[2], node)
            products += (4 if is_back else 2) * size * filters / _shape(result)[1]
        elif not is_random(node.op):
            elements += max(sizes)
    threads = torch.get_num_threads()
    others = elements * _AN_ELEMENT / threads + count * _AN_OPERATION
    call = products * _A_FLOP / threads + others
    return Costs(call, _FUSED * others, _COMPILATION + _COMPILED_OPERATION * count)


def _shape(node: Node) -> Any:
    return node.geometry[1] if node.geometry else ()  # of an operation with several results: of none


class _Pickler(pickle.Pickler):
    """Writes nodes by their numbers, and operations by their names.

    Args:
        file: where.
        numbers: those of the nodes.
    """

    def __init__(self, file: BinaryIO, numbers: dict[Node, int]):
        super().__init__(file)
        self.numbers = numbers

    def persistent_id(self, x: Any) -> Any:
        if isinstance(x, Node):
            return self.numbers[x], None
        if isinstance(x, torch_internals.OpOverload):
            return x._schema.name, x._overloadname
        return None


def _write(recording: Recording, results: list[Node], file: BinaryIO) -> None:
    """Writes a graph with these results as :func:`pyrovae.compilation.aot_process.read` takes it."""
    constants = [x for x in dict.fromkeys(x for node in recording.nodes for x in node.sources) if x.tensor is not None]
    numbers = {x: i for i, x in enumerate([*recording.placeholders, *constants, *recording.nodes])}
    inputs = [(tuple(t.shape), t.stride(), t.dtype) for t in recording.inputs]
    operations = [(node.op, node.args, node.kwargs) for node in recording.nodes]
    content = (torch.get_num_threads(), inputs, [x.tensor for x in constants], len(operations))
    for part in (content, *operations, results):
        _Pickler(file, numbers).dump(part)


class Background:
    """The compilation of a graph in the background.

    Args:
        recording: the graph.
        start_at: the call of the graph at which the compilation starts.
        take_over_at: the call at which its result takes over.
    """

    def __init__(self, recording: Recording, start_at: int, take_over_at: int):
        self.recording, self.start_at, self.take_over_at = recording, start_at, take_over_at
        self.process: subprocess.Popen | None = None
        self.has_failed = False
        self._finalizer: weakref.finalize | None = None

    @classmethod
    def of(cls, recording: Recording) -> "Background | None":
        """Returns the compilation that is worth its time if there are enough calls; None if it never is.

        The result takes over when compilation from the first call on would have saved twice the time that it takes:
        a run that has gone on for so long mostly goes on for as long again.
        """
        devices = {t.device.type for t in recording.inputs}
        if devices != {"cpu"} or recording.changes_inputs or len(recording.nodes) > _MAX_OPERATIONS:
            return None
        if torch_internals.load_library is None or os.name != "posix" or not sys.executable:
            return None
        cost = costs(recording)
        if cost.saved < _MIN_SHARE * cost.call:
            return None
        calls = math.ceil(2 * cost.compilation / cost.saved)
        return cls(recording, calls // 2, calls)

    def start(self) -> None:
        """Starts the process. It ends with this one, however this one ends."""
        try:
            self._start()
        except Exception:  # of a disk, a limit of processes, an argument that cannot be pickled: only speed is lost
            self.has_failed = True

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pyrovae-"))
        self.results = [x for x in dict.fromkeys(self.recording.results) if isinstance(x, Node) and x.op is not None]
        processes: list[subprocess.Popen] = []
        self._finalizer = weakref.finalize(self, _end, self.folder, os.getpid(), processes)
        with (self.folder / aot_process.GRAPH).open("wb") as file:
            _write(self.recording, self.results, file)
        self.process = subprocess.Popen(
            [sys.executable, aot_process.__file__, self.folder],
            stdin=subprocess.PIPE,  # closed when this process ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        processes.append(self.process)

    def result(self) -> Callable[..., list] | None:
        """Waits for the compilation, and returns the compiled function; None where there is none."""
        if self.process is None and not self.has_failed:
            self.start()
        if self.process is None:
            return None
        self.process.wait()
        try:
            path = (self.folder / aot_process.RESULT).read_text()
            run_library = torch_internals.load_library(path)
        except (OSError, RuntimeError):
            return None
        finally:
            self.close()
        results, placeholders = self.recording.results, self.recording.placeholders
        # Where each result comes from: the library, the inputs, or what is the same in every run.
        places = {x: (1, i) for i, x in enumerate(placeholders)} | {x: (0, i) for i, x in enumerate(self.results)}
        fixed = [x.tensor if isinstance(x, Node) else x for x in results]
        sources = [places.get(x, (2, i)) if isinstance(x, Node) else (2, i) for i, x in enumerate(results)]

        def run(*given: Tensor) -> list:
            values = run_library([*given]), given, fixed
            return [values[source][i] for source, i in sources]

        return run

    def close(self) -> None:
        """Ends the process, if it runs, and removes its files."""
        if self._finalizer is not None:
            self._finalizer()


def _end(folder: Path, owner: int, processes: list[subprocess.Popen]) -> None:
    if os.getpid() != owner:  # a fork, such as a worker of a DataLoader
        return
    for process in processes:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)
