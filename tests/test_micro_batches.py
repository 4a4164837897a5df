"""Micro-batches and bf16 products: the steps are those of a loop written by hand."""

from functools import partial

import pyro
import pytest
import torch
from helpers import assert_same
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from pyrovae import VAE, bounds, encoders, fit, likelihoods, priors
from pyrovae.nn import MLP

train = partial(fit, progress=False, optimizer=partial(SGD, lr=0.02, momentum=0.9))
LINEAR = partial(bounds.Linear, start=0.0, end=1.0)


def small_vae() -> VAE:
    pyro.set_rng_seed(0)
    network = partial(MLP, hidden=(8,))
    return VAE(priors.StandardNormal(2), likelihoods.Normal(2, 4, network), encoders.DiagonalNormal(4, 2, network))


def rows(size: int) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def by_hand(elbo, x: Tensor, sizes: list[int], epochs: int) -> tuple[VAE, list[float]]:
    """Takes a step an epoch on all data, whose loss is summed over parts of some sizes; returns the mean losses."""
    vae, losses = small_vae(), []
    optimizer = SGD(vae.parameters(), lr=0.02, momentum=0.9)
    loader = DataLoader(x, batch_size=len(x))
    next(iter(loader))  # like fit, which looks at a batch first: a loader draws a seed
    for step, batch in enumerate(batch for _ in range(epochs) for batch in loader):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.double)
        for part in batch.split(sizes):
            if isinstance(elbo, bounds.Bound):
                elbo.steps = step
            loss = elbo.differentiable_loss(vae.model, vae.guide, part)
            (loss / len(x)).backward()
            total += loss.detach().double()
        optimizer.step()
        losses.append(total.item() / len(x))
    return vae, losses


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("make", [Trace_ELBO, lambda: bounds.ELBO(beta=LINEAR(steps=4))], ids=["Pyro's", "scheduled"])
def test_gradients_of_micro_batches_add_up(compile, make):
    x, epochs = rows(8), 6
    elbo = make()
    expected, losses = by_hand(elbo, x, [2, 3, 3], epochs)
    vae, loss = small_vae(), make()
    loader = DataLoader(x, batch_size=8)
    history = train(vae.model, vae.guide, loader, loss=loss, epochs=epochs, micro_batch_size=3, compile=compile)
    for ours, theirs in zip(vae.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # the order of a product with the scale
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    if isinstance(loss, bounds.Bound):
        assert loss.steps == epochs, "a schedule counts the steps of the optimizer"


def test_without_noise_the_step_is_that_of_the_whole_batch():
    def regression(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(network(x[:, :3]), 1.0).to_event(1), obs=x[:, 3:])

    def trained(micro_batch_size: int | None) -> tuple[list[Tensor], list[float]]:
        nonlocal network
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        network = nn.Linear(3, 1).double()
        options = {"epochs": 3, "batch_size": 7, "micro_batch_size": micro_batch_size, "clip_norm": 0.5}
        history = train(regression, lambda x: None, rows(20).double(), **options)
        return list(network.parameters()), history["loss"]

    network: nn.Linear
    for size in (1, 2, 6, 7, 100):
        torch.testing.assert_close(trained(size), trained(None), rtol=1e-12, atol=1e-12)


def test_no_more_data_than_a_micro_batch_are_seen_at_once():
    vae, sizes = small_vae(), []
    vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    train(vae.model, vae.guide, rows(50), epochs=1, batch_size=50, micro_batch_size=8, compile=False)
    assert max(sizes) == 8, "when model and guide are looked at, too"
    assert sum(sizes[-7:]) == 50


def test_a_subsampled_plate_stands_for_all_data():
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(4))
        with pyro.plate("data", 20, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    losses = []
    for size in (None, 3):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        history = train(model, lambda x: None, rows(20), epochs=3, batch_size=10, micro_batch_size=size)
        losses.append((history["loss"], pyro.param("loc").detach().clone()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


# What belongs to the batch as a whole: latents of all data, priors of parameters, factors.


def shared_mean(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 0.1).to_event(1))
    scale = pyro.param("scale", torch.ones(4), constraint=dist.constraints.positive)
    pyro.factor("prior of the scale", -scale.square().sum())
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)


def at_a_point(x: Tensor) -> None:
    pyro.sample("mean", dist.Delta(pyro.param("at", torch.zeros(4))).to_event(1))


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("make", [Trace_ELBO, lambda: bounds.ELBO(beta=LINEAR(steps=4))], ids=["Pyro's", "scheduled"])
def test_what_all_data_share_counts_once(make, compile):
    def trained(micro_batch_size: int | None) -> list:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        options = {"epochs": 5, "batch_size": 14, "compile": compile}
        history = train(shared_mean, at_a_point, rows(34), loss=make(), micro_batch_size=micro_batch_size, **options)
        return [*history["loss"], *(p.detach().clone() for p in pyro.get_param_store()._params.values())]

    for size in (1, 3, 7):
        torch.testing.assert_close(trained(size), trained(None), rtol=1e-4, atol=1e-5)


def test_the_maximum_a_posteriori_of_parts_is_that_of_all_data():
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 0.1).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    x = rows(40) + 4
    options = {"epochs": 300, "batch_size": 40, "optimizer": partial(SGD, lr=0.2)}
    train(model, AutoDelta(model), x, micro_batch_size=8, **options)
    (found,) = pyro.get_param_store()._params.values()
    torch.testing.assert_close(found.detach(), x.sum(0) / (40 + 1 / 0.1**2), rtol=1e-4, atol=1e-4)


def test_sums_over_what_all_data_share_are_refused():
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2, 4))
        kind = pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc[kind.long()], 1.0).to_event(1), obs=x)

    def trained(**options) -> None:
        pyro.clear_param_store()
        train(model, lambda x: None, rows(8), loss=TraceEnum_ELBO(max_plate_nesting=1), epochs=1, **options)

    trained(batch_size=8)
    with pytest.raises(ValueError, match='Site "kind" is outside of the plate over the data, and is summed over'):
        trained(batch_size=8, micro_batch_size=4)


def test_data_in_no_plate_are_not_cut():
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(4))
        pyro.sample("x", dist.Normal(loc.expand_as(x), 1.0).to_event(2), obs=x)

    with pytest.raises(ValueError, match="cut into parts with micro_batch_size, but no plate .* holds the data"):
        train(model, lambda x: None, rows(8), epochs=1, batch_size=8, micro_batch_size=4)


def test_an_objective_that_is_traced_once_is_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match="JitTrace_ELBO is traced once, for a whole batch"):
        train(vae.model, vae.guide, rows(8), loss=JitTrace_ELBO(), epochs=1, batch_size=8, micro_batch_size=4)


def test_parameters_of_rows_are_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="micro_batch_size cuts batches, but parameter .* belongs to rows"):
        train(model, AutoNormal(model), rows(12), epochs=1, batch_size=12, micro_batch_size=6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {"batch_size": 10, "micro_batch_size": 4, "precision": "bf16"}

    def run(epochs: int, name: str, resume: bool = False) -> VAE:
        vae = small_vae()
        train(vae.model, vae.guide, rows(20), epochs=epochs, checkpoint=tmp_path / name, resume=resume, **options)
        return vae

    whole = run(4, "whole")
    run(2, "parts")
    assert_same(dict(run(4, "parts", resume=True).state_dict()), dict(whole.state_dict()))
    for changed in ({"micro_batch_size": 5}, {"precision": None}):
        options |= changed
        with pytest.raises(ValueError, match=f"{next(iter(changed))} is .*, but the checkpoint was written with"):
            run(5, "whole", resume=True)
        options |= {"micro_batch_size": 4, "precision": "bf16"}


@pytest.mark.parametrize("compile", [False, "auto"])
def test_bf16_products_are_those_of_autocast_and_densities_are_not(compile):
    def trained(**options) -> tuple[dict[str, Tensor], list[float]]:
        vae = small_vae()
        elbo = bounds.IWAE(4)
        history = train(vae.model, vae.guide, rows(24), loss=elbo, epochs=5, batch_size=12, **options)
        return dict(vae.state_dict()), history["loss"] + history["validation"]

    options = {"compile": compile, "validation": rows(9)}
    found = trained(precision="bf16", **options)
    with torch.autocast("cpu", torch.bfloat16):
        expected = trained(**options)
    assert_same(found, expected)
    assert all(t.dtype == torch.float32 for t in found[0].values())
    in_single = trained(**options)
    assert found[1] != in_single[1]
    assert found[1] == pytest.approx(in_single[1], rel=0.02)  # eight bits of each factor


def test_networks_compute_in_bf16_in_training_and_validation_alone():
    vae, seen = small_vae(), []
    layer = next(module for module in vae.encoder.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))

    def score(history) -> None:
        seen.append("callback")
        Trace_ELBO().loss(vae.model, vae.guide, rows(3))

    options = {"epochs": 2, "batch_size": 10, "validation": rows(4), "callbacks": [score], "compile": False}
    train(vae.model, vae.guide, rows(10), precision="bf16", **options)
    epoch = [torch.bfloat16, torch.bfloat16, "callback", torch.float32]
    assert seen[-2 * len(epoch) :] == 2 * epoch


@pytest.mark.parametrize(
    "options, message",
    [
        ({"micro_batch_size": 0}, "micro_batch_size must be an integer of at least 1, or None, got 0"),
        ({"micro_batch_size": 2.5}, "micro_batch_size must be an integer"),
        ({"micro_batch_size": True}, "micro_batch_size must be an integer"),
        ({"precision": "fp8"}, "precision must be \"bf16\" or None, got 'fp8'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    vae = small_vae()
    with pytest.raises(ValueError, match=message):
        train(vae.model, vae.guide, rows(8), epochs=1, **options)


def test_bf16_is_for_parameters_of_float32():
    vae = small_vae().double()
    with pytest.raises(ValueError, match="precision='bf16' is for parameters of float32, but .* is float64"):
        train(vae.model, vae.guide, rows(8).double(), epochs=1, precision="bf16")


def test_distributions_in_half_precision_are_refused():
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor, cast: bool = False) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = (encoder(x).float() if cast else encoder(x)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    message = 'site "z" in the guide has a distribution whose parameters are in half precision'
    with pytest.raises(ValueError, match=message):
        train(model, guide, rows(8), epochs=1, precision="bf16")
    train(model, partial(guide, cast=True), rows(8), epochs=1, precision="bf16")


@pytest.mark.parametrize("scaled", ["all", "likelihood"])
def test_a_scale_that_depends_on_the_size_of_the_batch_is_refused(scaled):
    x, layer = torch.randn(24, 3), nn.Linear(1, 3)

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=1 / len(x) if scaled == "all" else 1.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=torch.tensor(1 / len(x))):
                pyro.sample("x", dist.Normal(layer(z.unsqueeze(-1)), 0.7).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=1 / len(x) if scaled == "all" else 1.0):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.1))

    fit(model, guide, x, batch_size=24, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r'site ".*" is scaled by 0.04167 in a batch and by 0.1667 in a part of it'):
        fit(model, guide, x, batch_size=24, epochs=1, micro_batch_size=6, progress=False)
