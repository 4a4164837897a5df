"""The process that compiles a graph in the background; see background.py. It is run as a file, and imports torch alone.

python aot_process.py FOLDER    # reads the graph there, and writes the path of the library that it makes
"""

import importlib.util
import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

if __name__ == "__main__":  # without the folder of this file, whose modules are none of this process
    sys.path = [path for path in sys.path if not path or Path(path).resolve() != Path(__file__).resolve().parent]

GRAPH, RESULT = "graph", "result"


def end_with_parent() -> None:
    """Ends this process when the one that started it ends, whose end of the pipe is closed then."""
    sys.stdin.buffer.read()
    os._exit(1)


class Reader(pickle.Unpickler):
    """Reads what :mod:`pyrovae.compilation.background` writes: nodes by their numbers, operations by their names."""

    def __init__(self, file: BinaryIO, nodes: list):
        super().__init__(file)
        self.nodes = nodes

    def persistent_load(self, pid: Any) -> Any:
        """Returns a node or an operation."""
        name, overload = pid
        if overload is None:
            return self.nodes[name]
        import torch

        namespace, operation = name.split("::")
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


def read(file: BinaryIO) -> tuple[Any, tuple, int]:
    """Returns a graph as a module, tensors with the shapes of its inputs, and the number of threads to run on."""
    import torch
    from torch import fx

    nodes: list = []
    num_threads, inputs, constants, num_operations = Reader(file, nodes).load()
    graph = fx.Graph()
    nodes += [graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    nodes += [graph.create_node("get_attr", f"constant_{i}") for i in range(len(constants))]
    for _ in range(num_operations):
        nodes.append(graph.call_function(*Reader(file, nodes).load()))
    graph.output(Reader(file, nodes).load())
    module = fx.GraphModule({f"constant_{i}": t for i, t in enumerate(constants)}, graph)
    examples = tuple(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in inputs)
    return module, examples, num_threads


def _torch_internals() -> Any:
    """Returns the module beside this file that uses private parts of torch, without the package around it."""
    spec = importlib.util.spec_from_file_location("torch_internals", Path(__file__).with_name("torch_internals.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path) -> None:
    """Compiles a graph, and writes the path of the library."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.nice(5)  # more, and it would not be done for minutes where all cores are busy
    import torch

    with (folder / GRAPH).open("rb") as file:
        module, examples, num_threads = read(file)
    torch.set_num_threads(num_threads)
    path = _torch_internals().compile_library(module, examples)
    unfinished = folder / f"{RESULT}.part"
    unfinished.write_text(path)
    unfinished.replace(folder / RESULT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the thread waits for input, which an ordinary exit would not outlive
