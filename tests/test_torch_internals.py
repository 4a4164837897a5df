"""Private parts of torch: one module imports them, and without them everything runs eagerly."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyrovae

PACKAGE = Path(pyrovae.__file__).parent


def private_names(path: Path) -> Iterator[str]:
    """Yields the private modules and names of torch, ``torch._x``, that a file imports or reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"]
        yield from (name for name in names if re.match(r"torch\._(?!_)|torch\.fx\.experimental\b", name))


def test_one_module_imports_private_parts_of_torch():
    found = {path.relative_to(PACKAGE).as_posix(): [*private_names(path)] for path in PACKAGE.rglob("*.py")}
    assert {path for path, names in found.items() if names} == {"compilation/torch_internals.py"}


WITHOUT = '''
import builtins
import warnings

import pyro
import torch

import_of_python = builtins.__import__


def without_internals(name, globals=None, locals=None, fromlist=(), level=0):
    """Imports as a torch does that has no private modules, for pyrovae only: torch itself needs them."""
    if (globals or {}).get("__name__", "").startswith("pyrovae.compilation") and name == "torch.utils._python_dispatch":
        raise ImportError(f"No module named {name!r}")
    return import_of_python(name, globals, locals, fromlist, level)


builtins.__import__ = without_internals

import pyrovae
from pyrovae import VAE, bounds, encoders, fit, likelihoods, log_marginal, priors

x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))


def run(function):
    """Returns what a function of a new VAE gives, and the warnings."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 3), encoders.DiagonalNormal(3, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = function(vae)
    return found, [str(warning.message) for warning in caught]


def train(vae, **options):
    fit(vae.model, vae.guide, x, epochs=2, batch_size=8, progress=False, **options)
    return [p.tolist() for p in vae.parameters()]


def losses(vae, elbo):
    return [elbo.loss_and_grads(vae.model, vae.guide, x).item() for _ in range(3)]


def score(vae, **options):
    return log_marginal(vae.model, vae.guide, x, num_samples=30, progress=False, **options).value.tolist()


for name, eager, compiled in (
    ("Trace_ELBO", train, lambda vae: train(vae, compile=True)),
    ("IWAE", lambda vae: losses(vae, bounds.IWAE(4)), lambda vae: losses(vae, pyrovae.compile(bounds.IWAE(4)))),
    ("log p(x, z)", score, lambda vae: score(vae, compile=True)),
):
    expected, silence = run(eager)
    found, said = run(compiled)
    assert silence == [], silence
    assert found == expected, name
    reason = f"torch {torch.__version__} lacks what tracing needs: No module named 'torch.utils._python_dispatch'"
    assert said == [f"{name} is not compiled, and runs eagerly: {reason}."], said
print("done")
'''


def test_without_private_parts_of_torch_everything_runs_eagerly_with_one_warning():
    ended = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
