"""Compilation in the background: what takes over, when, with which results, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyrovae import VAE, bounds, encoders, fit, likelihoods, priors
from pyrovae.compilation import aot_process, background
from pyrovae.compilation.background import Background, Costs, _write, costs
from pyrovae.compilation.graph import CompiledGraph
from pyrovae.compilation.recording import Node, record
from pyrovae.nn import MLP

pytestmark = pytest.mark.skipif(os.name != "posix", reason="nothing is compiled in the background there")

fit = partial(fit, progress=False)


def make() -> VAE:
    pyro.set_rng_seed(0)
    network = partial(MLP, hidden=(6,))
    return VAE(
        priors.StandardNormal(2), likelihoods.StudentT(2, 4, network), encoders.DiagonalNormal(4, 2, network=network)
    )


def fitted(epochs: int = 4, **options) -> tuple[list[Tensor], list[float]]:
    """Returns the weights after so many epochs of 3 steps, and the losses."""
    vae = make()
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    history = fit(vae.model, vae.guide, x, loss=bounds.ELBO(), epochs=epochs, batch_size=8, **options)
    return [p.detach().clone() for p in vae.parameters()], history["loss"]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]


@pytest.fixture
def soon(monkeypatch):
    """Makes the compiled graph take over at the eighth step; returns the calls of the compiled function."""
    calls = []
    monkeypatch.setattr(background, "costs", lambda recording: Costs(1.0, 1.0, 4.0))
    original = Background.result

    def result(self):
        run = original(self)

        def counted(*inputs: Tensor) -> list:
            calls.append(1)
            return run(*inputs)

        return None if run is None else counted

    monkeypatch.setattr(Background, "result", result)
    return calls


@pytest.fixture
def without_compiler(monkeypatch):
    """Puts the recording's own operations in the place of a compiled library, rounded otherwise."""

    def result(self):
        run = self.recording.module()
        return lambda *inputs: [x * (1 + 1e-6) if isinstance(x, Tensor) and x.dim() else x for x in run(*inputs)]

    monkeypatch.setattr(Background, "start", lambda self: None)
    monkeypatch.setattr(Background, "result", result)


@pytest.mark.slow
def test_a_library_takes_over_and_gives_the_same_result_to_rounding_and_twice_the_same_bits(soon, tmp_path):
    first = fitted()
    assert len(soon) >= 12 - 7
    soon.clear()
    assert equal(fitted(), first)
    assert len(soon) >= 12 - 7
    eager = fitted(compile=False)
    assert not equal(eager, first)  # it did take over
    for a, b in zip(first[0], eager[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert first[1] == pytest.approx(eager[1], rel=1e-4)


@pytest.mark.parametrize("epochs", [1, 2, 3], ids=["before", "while it compiles", "after"])
def test_a_resumed_run_gives_the_same_bits(epochs, soon, without_compiler, tmp_path):
    whole = fitted()
    fitted(epochs, checkpoint=tmp_path / "run")
    assert equal(fitted(checkpoint=tmp_path / "run", resume=True), whole)


def test_a_longer_run_begins_as_a_shorter_one(soon, without_compiler):
    assert fitted(3)[1] == fitted(4)[1][:3]


def _fails(self):
    raise OSError("no space left on device")


def _is_wrong(self):
    run = self.recording.module()
    return lambda *inputs: [x + 1 if isinstance(x, Tensor) else x for x in run(*inputs)]


def _raises(self):
    def run(*inputs: Tensor) -> list:
        raise RuntimeError("a kernel failed")

    return run


@pytest.mark.parametrize(
    ("method", "replacement"),
    [("_start", _fails), ("result", lambda self: None), ("result", _is_wrong), ("result", _raises)],
    ids=["no space", "no compiler", "a wrong library", "a library that fails"],
)
def test_a_compilation_that_fails_changes_nothing_but_speed(method, replacement, monkeypatch):
    monkeypatch.setattr(background, "costs", lambda recording: Costs(1.0, 1.0, 4.0))
    monkeypatch.setattr(Background, "start" if method == "result" else "close", lambda self: None)
    monkeypatch.setattr(Background, method, replacement)
    assert equal(fitted(), fitted(compile=False))


def test_without_a_compiler_the_process_fails_and_the_run_goes_on(soon, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert equal(fitted(), fitted(compile=False))
    assert not soon


def test_no_process_and_no_file_is_left(soon, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    processes = []
    original = Background.start

    def start(self):
        original(self)
        processes.append(self.process)
        assert list(tmp_path.iterdir()) == [self.folder]

    monkeypatch.setattr(Background, "start", start)
    fitted(2)  # ends before the library takes over
    assert len(processes) == 1
    assert processes[0].returncode is not None
    assert not list(tmp_path.iterdir())


SCRIPT = """
import torch
from pyrovae import VAE, bounds, encoders, fit, likelihoods, priors
from pyrovae.compilation import background

background.costs = lambda recording: background.Costs(1.0, 1.0, 2e6)
original = background.Background.start

def start(self):
    original(self)
    print(self.process.pid, flush=True)

background.Background.start = start
background.Background.of = classmethod(lambda cls, recording: cls(recording, 4, 10**9))
vae = VAE(priors.StandardNormal(2), likelihoods.StudentT(2, 4), encoders.DiagonalNormal(4, 2))
fit(vae.model, vae.guide, torch.randn(24, 4), loss=bounds.ELBO(), epochs=10**6, batch_size=8, progress=False)
"""


def test_the_process_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)  # it runs
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(300):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # it ended, and nobody asked for it
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process outlived its parent")


def test_a_graph_is_read_as_it_was_written(tmp_path):
    a, b = torch.randn(3, 4), torch.randn(4, 1).t()
    numbers = torch.arange(4.0)

    def program() -> list:
        noise = torch.randn(3, 4)
        values, places = (a * numbers + noise).max(0)
        return [values, places, (a.to(torch.float64) + b).sum(), torch.full_like(a, 2.0).normal_()]

    recording, _ = record(program, [a, b])
    results = [x for x in recording.results if isinstance(x, Node)]
    with (tmp_path / "graph").open("wb") as file:
        _write(recording, results, file)
    with (tmp_path / "graph").open("rb") as file:
        module, examples, num_threads = aot_process.read(file)
    assert num_threads == torch.get_num_threads()
    assert [(x.shape, x.stride()) for x in examples] == [(t.shape, t.stride()) for t in recording.inputs]
    for seed in (1, 2):  # the noise is not a constant
        torch.manual_seed(seed)
        expected = program()
        torch.manual_seed(seed)
        found = module(*recording.inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.slow
def test_what_is_no_input_and_no_operation_is_given_back():
    a = torch.randn(3)
    recording, _ = record(lambda: [a, a * 2, None, torch.ones(()), 3], [a])
    found = Background(recording, 0, 0)
    run = found.result()
    assert run is not None
    results = run(a)
    assert results[0] is a
    assert results[2] is None
    assert results[4] == 3
    torch.testing.assert_close([results[1], results[3]], [2 * a, torch.ones(())])


def test_only_what_a_compiler_saves_time_of_is_compiled():
    def found(likelihood, batch: int) -> Background | None:
        vae = VAE(priors.StandardNormal(10), likelihood, encoders.DiagonalNormal(784, 10))
        graphs = []

        class Found(CompiledGraph):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                graphs.append(self.background)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyrovae.compilation.graph.CompiledGraph", Found)
            fit(vae.model, vae.guide, torch.rand(3 * batch, 784), epochs=2, batch_size=batch)
        return graphs[0]

    assert found(likelihoods.OptimalNormal(10, 784), 512) is None  # products of matrices
    student = found(likelihoods.StudentT(10, 784), 128)
    assert student is not None
    assert 1000 < student.start_at < student.take_over_at < 20_000


def test_costs_follow_from_sizes():
    a, b, image, filters = torch.randn(30, 40), torch.randn(40, 50), torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    products, _ = record(lambda: [a @ b], [a, b])
    per_flop = costs(products).call / (2 * 30 * 40 * 50)
    assert per_flop * torch.get_num_threads() == pytest.approx(background._A_FLOP, rel=0.5, abs=1e-10)
    # 4e-6 for the operation is most of it here, so that the rest is compared in larger ones.
    wide, _ = record(lambda: [torch.exp(a.expand(1000, 30, 40))], [a])
    assert costs(wide).saved == pytest.approx(
        0.5 * (1000 * 30 * 40 * background._AN_ELEMENT / torch.get_num_threads() + background._AN_OPERATION)
    )
    convolved, _ = record(lambda: [nn.functional.conv2d(image, filters)], [image, filters])
    flops = 2 * 2 * 5 * 6 * 6 * 3 * 3 * 3
    expected = flops * background._A_FLOP / torch.get_num_threads() + background._AN_OPERATION
    assert costs(convolved).call == pytest.approx(expected)
    leaf = filters.clone().requires_grad_()

    def both_ways() -> list:
        out = nn.functional.conv2d(image, leaf)
        return list(torch.autograd.grad(out, leaf, torch.ones_like(out)))

    back, _ = record(both_ways, [image, leaf])
    assert costs(back).call == pytest.approx(
        2 * flops * background._A_FLOP / torch.get_num_threads(), rel=0.2, abs=2e-5
    )


def test_a_graph_that_changes_its_inputs_or_is_long_is_not_compiled():
    a = torch.randn(100, 100)
    changing, _ = record(lambda: [a.add_(1).exp()], [a])
    assert Background.of(changing) is None
    plain, _ = record(lambda: [(a + 1).exp()], [a])
    assert Background.of(plain) is not None
    assert Background.of(plain._replace(nodes=plain.nodes * 2000)) is None
