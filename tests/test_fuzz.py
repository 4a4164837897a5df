"""Random accidents: damaged files, command lines, calls and kills. Nothing may hang, end in a traceback, or be wrong.

The ordinary run has a few of each. ``PYROVAE_FUZZ=40 pytest -m slow tests/test_fuzz.py -s`` has many more, and prints
how many.
"""

import contextlib
import inspect
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import typing
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyrovae
from pyrovae import bounds, encoders, estimators, likelihoods, nn, priors
from pyrovae.cli import main
from pyrovae.cli.parser import COMMANDS, FLAGS

TIMES = int(os.environ.get("PYROVAE_FUZZ", "10"))
ORDINARY = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


TRAINING = ["--num_samples", "10", "--latent_dim", "2", "--epochs", "1", "--preprocessing", "dynamic"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on few small pictures."""
    directory = tmp_path_factory.mktemp("fuzz") / "run"
    data = directory.parent / "data.npy"
    np.save(data, np.random.default_rng(0).random((120, 1, 8, 8), dtype=np.float32))
    options = ["--data", str(data), "--likelihood.network.activation", "torch.nn.LeakyReLU"]
    main(["train", "--run", str(directory), *TRAINING, *options])
    return directory


@pytest.fixture(scope="module")
def run_and_table(run):
    """A run, beside which is one on a small table."""
    rng, file = np.random.default_rng(0), run.parent / "table.csv"
    rows = [f"{rng.normal():.3f},{rng.integers(5)},{rng.choice(['a', 'b', ''])}" for _ in range(120)]
    file.write_text("\n".join(["size,count,kind", *rows]) + "\n")
    options = ["--data", str(file), "--latent_dim", "2", "--epochs", "2", "--num_samples", "10"]
    main(["train", "--run", str(run.parent / "table"), *options])
    return run


@pytest.fixture(scope="module")
def table(run):
    """A run on a small table, which stands beside the other."""
    rng, directory = np.random.default_rng(0), run.parent / "table"
    rows = [f"{rng.normal():.3f},{rng.integers(5)},{rng.choice(['a', 'b', ''])}" for _ in range(120)]
    (run.parent / "table.csv").write_text("\n".join(["size,count,kind", *rows]) + "\n")
    options = ["--data", str(run.parent / "table.csv"), "--latent_dim", "2", "--epochs", "2", "--num_samples", "10"]
    main(["train", "--run", str(directory), *options])
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


def check_damages(run, place, file, times):
    sound, found = scores(run), Counter()

    def check(damage):
        for name in FILES:
            shutil.copy(run / name, place / name)
        (place / file).write_bytes(damage((run / file).read_bytes()))
        found["tried"] += 1
        try:
            same = scores(place).equal(sound)
        except (ValueError, FileNotFoundError):
            found["refused"] += 1
        else:
            assert same  # what was damaged does not matter

    settings(ORDINARY, max_examples=times)(given(damage=damages())(check))()
    print(f"\n{file}: {dict(found)}")


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused_or_does_not_matter(file, run, tmp_path):
    check_damages(run, tmp_path, file, 15)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_many_damaged_files(file, run, tmp_path):
    check_damages(run, tmp_path, file, 17 * TIMES)


# -------------------------------------------------------------------------------------------------------- command lines

VALUES = [
    "0", "1", "-1", "2", "3.5", "1e-3", "nan", "inf", "null", "true", "", "x", "[]", "[1, 2]", "{}", "{a: 1}", "a.b",
    "digits", "Normal", "Bernoulli", "StandardNormal", "VampPrior", "FullRankNormal", "IWAE", "MLP", "ConvNet", "Adam",
    "os.system", "torch.nn.ReLU", "pyrovae.priors", "pyrovae.priors.StandardNormal", "train", "test", "grey", "static",
    "nothing.csv", "/dev/null", "\u00e9", "a: [", "{class_path: x}", "ImportanceSampling", "UntilTrusted", "StepLR",
]  # fmt: skip
# Options by which a command takes long, with values by which it does not.
QUICK = {
    "epochs": ["1", "2"],
    "nuts_samples": ["0"],
    "num_data": ["30", "-1", "x"],
    "num_samples": ["5", "30", "0", "x"],
    "num_draws": ["2"],
    "method": ["ImportanceSampling", "UntilTrusted", "x"],
}
# What each command is given to be quick, before the random options.
ALWAYS = {
    "train": [*TRAINING, "--data", "DATA"],
    "evaluate": ["--num_samples", "5"],
    "compare": ["--num_samples", "5"],
    "diagnose": ["--nuts_samples", "0", "--num_data", "30", "--method", "ImportanceSampling"],
}
DEEP = ["likelihood.network", "encoder.network.hidden", "loss.num_particles", "optimizer.lr", "config", "none", "help"]
PLACES = {"RUN": "sound", "TABLE": "table", "DATA": "data.npy", "CSV": "table.csv"}
RUNS = [["RUN"], ["RUN"], ["TABLE"], ["TABLE"], [], ["nothing"], ["RUN", "RUN"]]
OTHERS = {"train": [[]], "parts": [[]], "describe": [["DATA"], ["CSV"], ["CSV"], ["RUN"]]}


def fitting(command, option):
    """Values that an option may take, more or less."""
    if option in QUICK:
        return QUICK[option]
    parameter = inspect.signature(COMMANDS[command]).parameters.get(option)
    if parameter is None:
        return VALUES
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
    words = [kind for kind in kinds if isinstance(kind, str)]
    words += {"data": ["DATA", "CSV"], "other": ["DATA"], "output": ["new.csv", "new", "new.npy"]}.get(option, [])
    if bool in kinds:
        words += ["true", "false"]
    if int in kinds or float in kinds:
        words += ["1", "2", "5", "40"]
    if isinstance(parameter.default, (int, float, str)):
        words.append(str(parameter.default))
    return words or VALUES


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from([*COMMANDS, "train", "evaluate", "tarin"]))
    if command == "tarin":
        return [command]
    parameters = [name for name in inspect.signature(COMMANDS[command]).parameters if name not in ("run", "runs")]
    words = []
    for option in draw(st.lists(st.sampled_from([*parameters, *parameters, *DEEP]), max_size=4)):
        if option in FLAGS and draw(st.integers(0, 3)):
            words.append(f"--{option}")
            continue
        is_fitting = option in QUICK or draw(st.integers(0, 3)) > 0
        value = draw(st.sampled_from(fitting(command, option) if is_fitting else VALUES))
        words += draw(st.sampled_from([[f"--{option}", value], [f"--{option}={value}"]]))
    return [command, *draw(st.sampled_from(OTHERS.get(command, RUNS))), *ALWAYS.get(command, []), *words]


def check_command_line(run, place, argv):
    """Returns whether a command line worked."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(run.parent, place)
    (place / "run").rename(place / "sound")
    argv = ["=".join(PLACES.get(part, part) for part in word.split("=")) for word in argv]
    if argv[0] == "train" and "--run" not in " ".join(argv):
        argv += ["--run", "new"]
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.chdir(place):
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                main(argv)
            code = 0
        except SystemExit as exit:
            code = exit.code
            assert code in (None, 0, 2) or isinstance(code, str) and "\n" not in code.strip(), argv
        except Exception:
            raise AssertionError(f"{argv} ended in\n{traceback.format_exc()}") from None
    assert time.process_time() - began < 60, argv
    return code in (None, 0)


def check_command_lines(run, place, times):
    found = Counter()

    def check(argv):
        found["tried"] += 1
        found["worked"] += check_command_line(run, place, argv)

    settings(ORDINARY, max_examples=times)(given(argv=command_lines())(check))()
    print(f"\ncommand lines: {dict(found)}")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="contextlib.chdir")
def test_a_command_line_works_or_ends_in_a_line(run_and_table, tmp_path):
    check_command_lines(run_and_table, tmp_path / "here", 8)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="contextlib.chdir")
def test_many_command_lines(run_and_table, tmp_path):
    check_command_lines(run_and_table, tmp_path / "here", 50 * TIMES)


# ---------------------------------------------------------------------------------------------------------------- calls

POOL = [
    0, 1, 2, 3, -1, 2.5, True, None, float("nan"), float("inf"), "3", "", (), (3,), (1, 8, 8), (0,), (-1,), [4], [2, 2],
    {},
    torch.nn.ReLU, nn.MLP, len, object(), 1e-3, np.float64(2.0), np.int64(2),
]  # fmt: skip
ARRAYS = [np.ones(2), np.ones((2, 2)), np.array(2), torch.ones(2), torch.tensor(2), torch.zeros(0), torch.zeros(1, 3)]
CALLABLES = [
    getattr(module, name)
    for module in (priors, likelihoods, encoders, nn, bounds, estimators)
    for name in module.__all__
    if isinstance(getattr(module, name), type) and not inspect.isabstract(getattr(module, name))
]


USUAL = {"latent_dim": 2, "x_shape": 3, "in_shape": 3, "out_shape": 2, "num_classes": 3, "num_samples": 5}


@st.composite
def calls(draw):
    function = draw(st.sampled_from(CALLABLES))
    parameters = [
        p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    given = {}
    for p in parameters:
        if p.default is p.empty or draw(st.integers(0, 2)) == 0:
            use = draw(st.booleans()) and p.name in USUAL
            given[p.name] = USUAL[p.name] if use else draw(st.sampled_from(POOL + ARRAYS))
    return function, given


def check_call(call):
    """Returns whether a call built something."""
    function, arguments = call
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = function(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert str(error), (function, arguments)
        return False
    except Exception:
        raise AssertionError(f"{function.__name__}({arguments}) ended in\n{traceback.format_exc()}") from None
    assert not isinstance(made, torch.nn.Module) or all(p.isfinite().all() for p in made.parameters()), (
        function,
        arguments,
    )
    return True


def check_calls(times):
    found = Counter()

    def check(call):
        found["tried"] += 1
        found["built"] += check_call(call)

    settings(ORDINARY, max_examples=times)(given(call=calls())(check))()
    print(f"\ncalls: {dict(found)}")


def test_a_call_works_or_says_what_is_wrong():
    check_calls(300)


@pytest.mark.slow
def test_many_calls():
    check_calls(250 * TIMES)


BUILT = [f for f in CALLABLES if f.__name__ not in ("Comparison", "Estimate", "Task")]  # results, and inputs of methods


@pytest.mark.parametrize("function", BUILT, ids=[f"{f.__module__}.{f.__qualname__}" for f in BUILT])
def test_an_array_in_place_of_a_number_is_named(function):
    parameters = inspect.signature(function).parameters.values()
    needed = {p.name: USUAL.get(p.name, 3) for p in parameters if p.default is p.empty}
    for p in parameters:
        if p.annotation in (int, float, bool, int | None, float | None):
            for array in (np.ones(2), np.ones((2, 2)), torch.zeros(0)):
                with pytest.raises(ValueError) as error:
                    function(**needed | {p.name: array})
                assert f"{p.name} of {function.__name__} must be a single" in str(error.value)
                assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- kills

KILLED = ["train", "--num-samples", "10", "--latent-dim", "2", "--epochs", "12", "--seed", "3", "--quiet"]
WRITES = 30  # more than there are in a run


class Warm:
    """Runs of a warm process, see warm.py, and what one of them ends on when nothing happens to it."""

    def __init__(self, place):
        self.place, self.num_runs, self.unharmed = place, 0, {}
        np.save(place / "data.npy", np.random.default_rng(0).random((60, 3), dtype=np.float32))
        argv = [*KILLED, "--data", str(place / "data.npy")]
        self.argv = {False: argv, True: [*argv, "--compile=true"]}
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),  # shared, so that each graph is compiled once
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        like = json.dumps([*self.argv[False], "--run", str(place / "like")])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py")), like, str(place / "modules")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, directory, compiled, **order):
        """Returns the status of a run, and the seconds that it took."""
        argv = [*self.argv[compiled], "--run", str(directory), "--resume"]
        print(json.dumps({"argv": argv, **order}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def expected(self, compiled):
        """Returns the weights of a run that nothing happened to, and how long it takes."""
        if compiled not in self.unharmed:
            for i in range(1 + compiled):  # the first run compiles
                directory = self.place / f"unharmed{compiled:d}{i}"
                status, took = self.run(directory, compiled)
                assert status == 0
            self.unharmed[compiled] = (directory / "weights.safetensors").read_bytes(), took
        return self.unharmed[compiled]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    made = Warm(tmp_path_factory.mktemp("warm"))
    with made.process:  # which ends where there is nothing more to read
        yield made


def check_kills(directory, seed, warm, compiled=False):
    """Kills a run some times and resumes it to the end; returns how often it was killed, and how often at a write."""
    rng, found = random.Random(seed), Counter()
    expected, seconds = warm.expected(compiled)
    for _ in range(rng.choice([2, 3, 4, 5])):
        if rng.random() < 0.6:  # some come after the last write
            order = {"write": rng.randrange(1, WRITES), "where": rng.choice(["before", "after", "half"])}
        else:
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            order = {"seconds": rng.uniform(0, seconds), "signal": number}
        status, _ = warm.run(directory, compiled, **order)
        assert status in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM), (seed, order)
        found["killed"] += status != 0
        found["at a write"] += status != 0 and "write" in order
        found["by SIGTERM"] += status in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert warm.run(directory, compiled)[0] == 0, seed
    assert (directory / "weights.safetensors").read_bytes() == expected, seed
    return found


POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")


@POSIX
def test_a_killed_run_ends_on_the_same_bits(warm, tmp_path):
    assert check_kills(tmp_path / "run", 5, warm)["killed"] > 0


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["played back", "compiled"])
def test_many_killed_runs(compiled, warm, tmp_path):
    found = Counter()
    for seed in range((2 if compiled else 4) * TIMES):
        found += check_kills(tmp_path / str(seed), seed, warm, compiled)
        found["runs"] += 1
        shutil.rmtree(tmp_path / str(seed))
    print(f"\nkills of runs that are {'compiled' if compiled else 'played back'}: {dict(found)}")
