"""What every test starts from, and what none may leave behind."""

import os

# Threads of several processes would wait for each other most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyro
import pytest
import torch

# Modules that tests import assertions from: a failure there shows its values, as in a test.
pytest.register_assert_rewrite("compiling", "helpers", "linear_gaussian", "spaces")


def global_state() -> dict:
    """Returns the settings of the process that a library has no business to change."""
    return {
        "validation of arguments": torch.distributions.Distribution._validate_args,
        "pyro.settings": pyro.settings.get(),
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "global forward pre hooks": list(torch.nn.modules.module._global_forward_pre_hooks),
        "global forward hooks": list(torch.nn.modules.module._global_forward_hooks),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "numpy error handling": np.geterr(),
    }


@pytest.fixture(autouse=True)
def clean_start_and_clean_end():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = global_state()
    yield
    after = global_state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test left global state changed (before, after): {changed}"


@pytest.fixture
def traced(monkeypatch):
    """Plays graphs back where the compiler would take seconds for each; returns a counter of graphs and runs."""
    from compiling import Traced

    from pyrovae.compilation import cache
    from pyrovae.compilation.graph import compile_graph
    from pyrovae.compilation.tracing import inductor

    stand_in = Traced()

    def compile_without_compiler(*args):
        *others, backend = args
        return compile_graph(*others, stand_in if backend is inductor else backend)

    monkeypatch.setattr(cache, "compile_graph", compile_without_compiler)
    return stand_in


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Makes a graph for each shape of the data when it first comes."""
    from pyrovae.compilation import cache

    monkeypatch.setattr(cache, "_WARMUP_CALLS", 0)
