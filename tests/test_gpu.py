"""On a GPU, everything gives what it gives on the CPU; skipped where there is none."""

import json
from functools import partial

import pytest
import torch
from bound_cases import BY_NAME
from cases import SMALL
from triples import COVERING, MEETING, name_of, vae_of

import pyrovae
from pyrovae import VAE, encoders, estimators, likelihoods, nn, priors
from pyrovae.cli import main as command_line
from pyrovae.structures import BackwardGRU, HierarchicalVAE, MissingDataVAE, StateSpaceVAE

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
fit, log_marginal = partial(pyrovae.fit, progress=False), partial(pyrovae.log_marginal, progress=False)

# A point has no density, and no importance weights.
TRIPLES = {name_of(t): t for t in MEETING if name_of(t) in COVERING and t[1].density}


def small_vae() -> VAE:
    torch.manual_seed(0)
    prior, encoder = priors.StandardNormal(2), encoders.DiagonalNormal(4, 2, SMALL)
    return VAE(prior, likelihoods.Bernoulli(2, 4, SMALL), encoder)


def agree(a: estimators.Estimate, b: estimators.Estimate) -> None:
    """Two estimates of the same data agree within six standard errors, where both can be trusted."""
    both = a.trusted.cpu() & b.trusted.cpu()
    difference = (a.value.cpu() - b.value.cpu())[both].double()
    error = (a.standard_error.cpu().square() + b.standard_error.cpu().square())[both].double().sqrt()
    assert (difference.abs() <= 6 * error + 1e-4).all(), difference / error


@pytest.mark.parametrize("name", TRIPLES)
def test_every_triple_is_scored_and_trained(name):
    torch.manual_seed(0)
    vae = vae_of(*TRIPLES[name]).eval()
    with torch.no_grad():
        x = vae.sample(12)
    by_cpu = log_marginal(vae.model, vae.guide, x)
    vae.to(DEVICE)
    by_gpu = log_marginal(vae.model, vae.guide, x.to(DEVICE))
    assert by_gpu.value.device.type == DEVICE
    agree(by_cpu, by_gpu)
    fit(vae.model, vae.guide, x, epochs=2, batch_size=5, device=DEVICE, validation=x)
    assert vae.sample(3).device.type == DEVICE


@pytest.mark.parametrize("name", BY_NAME)
def test_every_bound_trains(name):
    vae = small_vae()
    x = vae.sample(20).detach()
    history = fit(vae.to(DEVICE).model, vae.guide, x, loss=BY_NAME[name].build(4), epochs=2, device=DEVICE)
    assert all(torch.isfinite(torch.tensor(history["loss"])))


METHODS = {
    "guide": estimators.ImportanceSampling(1000),
    "prior": estimators.ImportanceSampling(1000, estimators.Prior()),
    "refined": estimators.ImportanceSampling(1000, estimators.Refined(20)),
    "widened": estimators.ImportanceSampling(1000, estimators.Widened(1.5)),
    "Laplace": estimators.ImportanceSampling(1000, estimators.Laplace()),
    "adapted": estimators.ImportanceSampling(1000, estimators.Adapted()),
    "annealed": estimators.AnnealedImportanceSampling(20, 50),
    "sequential": estimators.SequentialMonteCarlo(100, 20),
    "quadrature": estimators.Quadrature(400),
    "until trusted": estimators.UntilTrusted(num_checked=3, check=estimators.AnnealedImportanceSampling(20, 50)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("compile", [False, "auto"])
def test_every_estimator(method, compile):
    vae = small_vae().eval()
    x = vae.sample(12).detach()
    by_cpu = log_marginal(vae.model, vae.guide, x, method=estimators.Quadrature(2000))
    vae.to(DEVICE)
    agree(by_cpu, log_marginal(vae.model, vae.guide, x.to(DEVICE), method=method, compile=compile))


def test_bracket_and_filter():
    vae = small_vae().eval().to(DEVICE)
    x = vae.sample(10).detach()
    method = estimators.AnnealedImportanceSampling(20, 200)
    bracket = estimators.bidirectional(vae.model, None, x, method=method, progress=False)
    assert (bracket.lower.value.mean() <= bracket.upper.value.mean() + 0.1).item()


def test_a_hierarchy():
    torch.manual_seed(0)
    vae = HierarchicalVAE(
        priors.StandardNormal(2),
        [encoders.DiagonalNormal(2, 3, SMALL)],
        likelihoods.Bernoulli(3, 4, SMALL),
        [encoders.DiagonalNormal(4, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL)],
    ).eval()
    x = vae.sample(12).detach()
    by_cpu = log_marginal(vae.model, vae.guide, x)
    vae.to(DEVICE)
    agree(by_cpu, log_marginal(vae.model, vae.guide, x.to(DEVICE)))
    fit(vae.model, vae.guide, x, epochs=2, device=DEVICE, validation=x)


def test_a_state_space():
    torch.manual_seed(0)
    vae = StateSpaceVAE(
        priors.StandardNormal(2),
        encoders.DiagonalNormal(2, 2, nn.GatedTransition),
        likelihoods.Normal(2, 3),
        encoders.DiagonalNormal(2, 2, context_dim=16),
        BackwardGRU(3, 16),
    ).eval()
    x = vae.sample(5, num_steps=6).detach()
    method = estimators.ParticleFilter(100)
    by_cpu = log_marginal(vae.model, vae.guide, x, method=method)
    vae.to(DEVICE)
    agree(by_cpu, log_marginal(vae.model, vae.guide, x.to(DEVICE), method=method))
    fit(vae.model, vae.guide, x, epochs=2, device=DEVICE, validation=x)
    vae.eval().forecast(x.to(DEVICE), 2)


def test_missing_data():
    torch.manual_seed(0)
    encoder = encoders.DiagonalNormal(8, 2, SMALL)
    vae = MissingDataVAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, 4, SMALL), encoder).to(DEVICE)
    x, mask = torch.bernoulli(torch.full((20, 4), 0.5)), torch.rand(20, 4) > 0.3
    fit(vae.model, vae.guide, (x, mask), epochs=2, device=DEVICE)
    vae.eval()
    log_marginal(vae.model, vae.guide, x.to(DEVICE), mask.to(DEVICE))
    vae.impute(x.to(DEVICE), mask.to(DEVICE))


def train(data: str, run: str) -> None:
    options = ["--device", DEVICE, "--epochs", "3", "--num-samples", "100", "--quiet"]
    command_line(["train", "--data", data, "--run", run, *options])


def test_diagnose_does_as_much_as_on_the_cpu(tmp_path):
    run, skipped = str(tmp_path / "r"), {}
    train("digits", run)
    for device in {"cpu", DEVICE}:
        out = tmp_path / device
        options = ["--device", device, "--num-data", "50", "--nuts-samples", "0", "--output", str(out)]
        command_line(["diagnose", run, *options])
        results = json.loads((out / "diagnosis.json").read_text())
        skipped[device] = {name: result["skipped"] for name, result in results.items() if "skipped" in result}
    assert skipped["cpu"] == skipped[DEVICE]


def test_commands_on_images(tmp_path):
    run = str(tmp_path / "r")
    train("digits", run)
    command_line(["evaluate", run, "--device", DEVICE, "--num-data", "60", "--seconds", "10"])
    command_line(["report", run, "--device", DEVICE])


def test_commands_on_a_table(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, generator=generator)
    lines = [f"{x:.3f},{x + y:.3f},{'high' if y > 0 else 'low'}" for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    table, run = tmp_path / "t.csv", str(tmp_path / "r")
    table.write_text("first,second,level\n" + "\n".join(lines) + "\n1.5,,high\n")
    train(str(table), run)
    command_line(["evaluate", run, "--device", DEVICE, "--seconds", "5"])
    command_line(["score", run, str(table), "--device", DEVICE, "--seconds", "5"])
    for verb in ("impute", "encode"):
        command_line([verb, run, str(table), "--device", DEVICE])


def test_commands_on_text(tmp_path):
    text, run = tmp_path / "t.txt", str(tmp_path / "r")
    text.write_text("\n".join(f"the {a} sees the {b}" for a in ("cat", "dog", "bird") for b in ("sun", "sea")) * 10)
    train(str(text), run)
    command_line(["evaluate", run, "--device", DEVICE, "--num-data", "5", "--seconds", "5"])
