"""Importing the library changes nothing but the list of imported modules."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Slow to import, and needed only for plots, some data sets and the command line.
LAZY = (
    "torchvision",
    "matplotlib",
    "pyarrow",
    "sklearn",
    "scipy",
    "jsonargparse",
    "zuko",
    "pandas",
    "PIL",
    "torch._dynamo",
)

STATE = """
import json, logging, os, random, sys, warnings
import numpy, torch, pyro

def state():
    distribution = torch.distributions.Distribution
    return {
        "validation of torch": repr(distribution._validate_args),
        "validation of pyro": repr(pyro.distributions.Distribution.__dict__.get("_validate_args", "inherited")),
        "pyro.settings": repr(pyro.settings.get()),
        "parameter store": list(pyro.get_param_store().keys()),
        "random states": repr((torch.get_rng_state().tolist(), random.getstate())),
        "numpy's random state": repr(numpy.random.get_state()[1].tolist()),
        "dtype": repr(torch.get_default_dtype()),
        "device": repr(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "anomaly": torch.is_anomaly_enabled(),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "pre hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
        "print options": repr(torch._tensor_str.PRINT_OPTS),
        "numpy": (repr(numpy.geterr()), repr(numpy.get_printoptions())),
        "warnings": repr(warnings.filters),
        "logging": (logging.root.level, len(logging.root.handlers), logging.getLogger("pyro").level),
        "environment": dict(os.environ),
        "excepthook": repr(sys.excepthook),
        "working directory": os.getcwd(),
    }

torch.manual_seed(3); numpy.random.seed(3); random.seed(3)
before = state()
import pyrovae, pyrovae.storage
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def python(*args: str) -> str:
    """Runs a new interpreter in which every warning is an error; returns what it printed."""
    ended = subprocess.run([sys.executable, "-W", "error", *args], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    return ended.stdout


def test_importing_changes_no_global_state():
    assert json.loads(python("-c", STATE)) == []


@pytest.mark.parametrize("name", ["pyrovae", "pyrovae.data", "pyrovae.training"])
def test_importing_is_quiet_and_leaves_heavy_modules_out(name):
    out = python("-c", f"import sys, {name}; print([m for m in {LAZY!r} if m in sys.modules])")
    assert out == "[]\n", "and nothing else may be printed"


def test_private_names_and_tests_are_imported_by_no_other_file():
    root = Path(__file__).parents[1]
    private = re.compile(r"^\s*from pyrovae[\w.]* import (?:\([^)]*|[^(\n]*)(?<!\w)_[a-z]", re.MULTILINE)
    assert not [file for file in (root / "pyrovae").rglob("*.py") if private.search(file.read_text())]
    of_tests = re.compile(r"^\s*(?:from|import) test_", re.MULTILINE)
    assert not [file for file in (root / "tests").glob("*.py") if of_tests.search(file.read_text())]
