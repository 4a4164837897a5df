"""Random accidents: damaged files, command lines, calls and kills. Nothing may hang, end in a traceback, or be wrong.

The ordinary run has a few of each. ``PYROVAE_FUZZ=40 pytest -m slow tests/test_fuzz.py`` has forty times as many, and
``PYROVAE_FUZZ_COMPILED=1`` trains a third of the runs that are killed by compiled steps.
"""

import contextlib
import inspect
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyrovae
from pyrovae import bounds, encoders, estimators, likelihoods, nn, priors
from pyrovae.cli import main
from pyrovae.cli.parser import COMMANDS

TIMES = int(os.environ.get("PYROVAE_FUZZ", "10"))
ORDINARY = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


TRAINING = ["--num-samples", "10", "--latent-dim", "2", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "run"
    main(["train", "--run", str(directory), *TRAINING, "--likelihood.network.activation", "torch.nn.LeakyReLU"])
    return directory


# -------------------------------------------------------------------------------------------------------- damaged files


@st.composite
def damages(draw):
    """A function of the bytes of a file."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "swap", "number", "word", "zeros"]))
    seed = draw(st.integers(0, 2**32))

    def damage(content):
        rng = random.Random(seed)
        at = rng.randrange(len(content))
        length = rng.choice([1, 2, 5, 20, 200])
        if kind == "cut":
            return content[:at]
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        if kind == "insert":
            return content[:at] + rng.randbytes(length) + content[at:]
        if kind == "remove":
            return content[:at] + content[at + length :]
        if kind == "swap":
            other = rng.randrange(len(content))
            a, b = sorted((at, other))
            return (
                content[:a]
                + content[b : b + length]
                + content[a + length : b]
                + content[a : a + length]
                + content[b + length :]
            )
        if kind == "zeros":
            return content[:at] + bytes(length) + content[at + length :]
        text = content.decode("latin-1")
        words = [w for w in text.replace(":", " ").replace(",", " ").split() if (w[0].isdigit()) == (kind == "number")]
        if not words:
            return content[:at]
        new = rng.choice(
            ["0", "-1", "1e9", "nan", "1000000000"] if kind == "number" else ["null", "[]", "{}", "x", "''", "true"]
        )
        return text.replace(rng.choice(words[:500]), new, 1).encode("latin-1")

    return damage


def scores(directory):
    vae, _ = pyrovae.load_run(directory)
    pyro.set_rng_seed(0)
    x = torch.linspace(0, 1, 3 * 64).reshape(3, 1, 8, 8).round()
    with torch.no_grad():
        return pyrovae.log_weights(vae.model, vae.guide, x, num_samples=4)


FILES = ["config.yaml", "run.json", "weights.safetensors"]


def check_damage(run, place, file, damage):
    for name in FILES:
        shutil.copy(run / name, place / name)
    (place / file).write_bytes(damage((run / file).read_bytes()))
    try:
        found = scores(place)
    except (ValueError, FileNotFoundError):
        return
    assert found.equal(scores(run))  # what was damaged does not matter


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused_or_does_not_matter(file, run, tmp_path):
    settings(ORDINARY, max_examples=15)(
        given(damage=damages())(lambda damage: check_damage(run, tmp_path, file, damage))
    )()


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_many_damaged_files(file, run, tmp_path):
    settings(ORDINARY, max_examples=15 * TIMES)(
        given(damage=damages())(lambda damage: check_damage(run, tmp_path, file, damage))
    )()


# -------------------------------------------------------------------------------------------------------- command lines

VALUES = [
    "0", "1", "-1", "2", "3.5", "1e-3", "nan", "inf", "null", "true", "", "x", "[]", "[1, 2]", "{}", "{a: 1}", "a.b",
    "digits", "Normal", "Bernoulli", "StandardNormal", "VampPrior", "FullRankNormal", "IWAE", "MLP", "ConvNet", "Adam",
    "os.system", "torch.nn.ReLU", "pyrovae.priors", "pyrovae.priors.StandardNormal", "train", "test", "grey", "static",
    "nothing.csv", "/dev/null", "\u00e9", "a: [", "{class_path: x}", "ImportanceSampling", "UntilTrusted", "StepLR",
]  # fmt: skip
# Numbers that would make a run long are not fuzzed here: what is asked for is done.
LONG = {"epochs", "nuts_samples", "num_draws"}


def options_of(command):
    names = [n for n in inspect.signature(COMMANDS[command]).parameters if n not in LONG]
    extra = [
        "likelihood.network",
        "encoder.network.hidden",
        "loss.num_particles",
        "optimizer.lr",
        "config",
        "nonsense",
        "help",
    ]
    return st.sampled_from([*names, *extra])


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from([*COMMANDS, "train", "evaluate", "tarin"]))
    if command == "tarin":
        return [command]
    options = draw(st.lists(st.tuples(options_of(command), st.sampled_from(VALUES)), max_size=4))
    words = [w for name, value in options for w in draw(st.sampled_from([[f"--{name}", value], [f"--{name}={value}"]]))]
    if command == "train":
        return [command, *TRAINING, *words]
    return [command, *draw(st.sampled_from([["RUN"], ["RUN"], [], ["nothing"], ["RUN", "RUN"]])), *words]


def check_command_line(run, place, argv):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(run, place / "sound")
    argv = ["sound" if word == "RUN" else word for word in argv]
    if argv[0] == "train" and "--run" not in " ".join(argv):
        argv += ["--run", "new"]
    if argv[0] == "diagnose":
        argv += ["--nuts_samples", "0", "--num_data", "30"]
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.chdir(place) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                main(argv)
        except SystemExit as exit:
            assert exit.code in (None, 0, 2) or isinstance(exit.code, str) and "\n" not in exit.code.strip(), argv
        except Exception:
            raise AssertionError(f"{argv} ended in\n{traceback.format_exc()}") from None
    assert time.process_time() - began < 120, argv


@pytest.mark.skipif(sys.version_info < (3, 11), reason="contextlib.chdir")
def test_a_command_line_works_or_ends_in_a_line(run, tmp_path):
    settings(ORDINARY, max_examples=8)(
        given(argv=command_lines())(lambda argv: check_command_line(run, tmp_path / "here", argv))
    )()


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="contextlib.chdir")
def test_many_command_lines(run, tmp_path):
    settings(ORDINARY, max_examples=8 * TIMES)(
        given(argv=command_lines())(lambda argv: check_command_line(run, tmp_path / "here", argv))
    )()


# ---------------------------------------------------------------------------------------------------------------- calls

POOL = [
    0, 1, 2, 3, -1, 2.5, True, None, float("nan"), float("inf"), "3", "", (), (3,), (1, 8, 8), (0,), (-1,), [4], [2, 2],
    {},
    torch.nn.ReLU, nn.MLP, len, object(), 1e-3,
]  # fmt: skip
CALLABLES = [
    getattr(module, name)
    for module in (priors, likelihoods, encoders, nn, bounds, estimators)
    for name in module.__all__
    if isinstance(getattr(module, name), type) and not inspect.isabstract(getattr(module, name))
]


@st.composite
def calls(draw):
    function = draw(st.sampled_from(CALLABLES))
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    given = {}
    for p in parameters:
        usual = {"latent_dim": 2, "x_shape": 3, "in_shape": 3, "out_shape": 2, "num_classes": 3, "num_samples": 5}
        if p.default is p.empty or draw(st.integers(0, 2)) == 0:
            use = draw(st.booleans()) and p.name in usual
            given[p.name] = usual[p.name] if use else draw(st.sampled_from(POOL))
    return function, given


def check_call(call):
    function, arguments = call
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = function(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert str(error), (function, arguments)
        return
    except Exception:
        raise AssertionError(f"{function.__name__}({arguments}) ended in\n{traceback.format_exc()}") from None
    assert not isinstance(made, torch.nn.Module) or all(p.isfinite().all() for p in made.parameters()), (
        function,
        arguments,
    )


def test_a_call_works_or_says_what_is_wrong():
    settings(ORDINARY, max_examples=300)(given(call=calls())(check_call))()


@pytest.mark.slow
def test_many_calls():
    settings(ORDINARY, max_examples=300 * TIMES)(given(call=calls())(check_call))()


# ---------------------------------------------------------------------------------------------------------------- kills

# Ends itself at a write: before or after the temporary file takes its place, or halfway through it.
DRIVER = """
import os, signal, sys
from pyrovae import storage
from pyrovae.cli import main
when, where = int(sys.argv[1]), sys.argv[2]
count, replace, fsync = 0, os.replace, os.fsync

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted_replace(a, b):
    global count
    count += 1
    if count == when and where == "before":
        die()
    replace(a, b)
    if count == when and where == "after":
        die()

def counted_fsync(file):
    if count + 1 == when and where == "half":
        os.ftruncate(file, os.fstat(file).st_size // 2)
        die()
    fsync(file)

os.replace, os.fsync = counted_replace, counted_fsync
main(sys.argv[3:])
"""
KILLED = ["train", "--num-samples", "10", "--latent-dim", "2", "--epochs", "12", "--seed", "3"]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """The weights of a run that nothing happened to; those of compiled steps are made when they are asked for."""
    found = {}

    def weights(compiled):
        if compiled not in found:
            directory = tmp_path_factory.mktemp("unharmed") / "run"
            start(["-m", "pyrovae"], directory, compiled).wait(timeout=600)
            found[compiled] = (directory / "weights.safetensors").read_bytes()
        return found[compiled]

    return weights


def start(python, directory, compiled, *more):
    argv = [*KILLED, "--run", str(directory), *(["--compile", "true"] if compiled else []), *more]
    return subprocess.Popen([sys.executable, *python, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def check_kills(directory, seed, unharmed):
    rng = random.Random(seed)
    compiled = seed % 3 == 2 and os.environ.get("PYROVAE_FUZZ_COMPILED", "") == "1"
    expected = unharmed(compiled)
    for _ in range(rng.choice([1, 2, 3])):
        if seed % 3 == 0:
            when, where = rng.randrange(1, 12), rng.choice(["before", "after", "half"])
            process = start(["-c", DRIVER, str(when), where], directory, compiled, "--resume")
        else:
            process = start(["-m", "pyrovae"], directory, compiled, "--resume")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(2, 20))
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait(timeout=600)
    assert start(["-m", "pyrovae"], directory, compiled, "--resume").wait(timeout=600) == 0
    assert (directory / "weights.safetensors").read_bytes() == expected


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
@pytest.mark.parametrize("seed", [0])
def test_a_killed_run_ends_on_the_same_bits(seed, unharmed, tmp_path):
    check_kills(tmp_path / "run", seed, unharmed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
@pytest.mark.parametrize("seed", range(1, 1 + 2 * TIMES))
def test_many_killed_runs(seed, unharmed, tmp_path):
    check_kills(tmp_path / "run", seed, unharmed)
