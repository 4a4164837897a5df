"""Properties of all public parts, over the registry in cases.py, and of the VAEs made of them."""

import copy
import importlib
import inspect
import io
import math
import pickle
import re

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from cases import SMALL, Case, cases, input_shape, inputs, output_shape
from helpers import FAILURE_RATE
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from spaces import Space, agreement, space_of
from torch import Tensor, nn
from triples import APART, COVERING, MEETING, name_of, vae_of

import pyrovae
from pyrovae import VAE, encoders, fit, likelihoods, log_marginal, priors
from pyrovae.distributions import IndependentBernoulli
from pyrovae.encoders import DiagonalNormal, FullRankNormal
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.nn import MLP, ConvNet, DeconvNet, OneHotInput, TokenEncoder
from pyrovae.priors import StandardNormal

EVERYTHING = cases("prior", "likelihood", "encoder", "network")
DISTRIBUTIONS = cases("prior", "likelihood", "encoder")
DENSITIES = [case for case in DISTRIBUTIONS if case.density]
EPS = torch.finfo(torch.float64).eps


def parametrise(listed: list[Case]):
    assert listed, "a test over no cases cannot fail"
    return pytest.mark.parametrize("case", listed, ids=lambda case: case.name)


def trainable(part: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in part.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("module", ["priors", "likelihoods", "encoders", "nn"])
def test_every_public_class_is_registered(module):
    module = importlib.import_module(f"pyrovae.{module}")
    public = {getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))}
    missing = {cls for cls in public if not inspect.isabstract(cls)} - {case.cls for case in EVERYTHING}
    assert not missing, f"add rows to tests/cases.py for {sorted(cls.__name__ for cls in missing)}"


def test_every_case_has_its_own_name():
    assert len({case.name for case in EVERYTHING}) == len(EVERYTHING)


@parametrise(EVERYTHING)
def test_a_case_builds_what_it_names(case):
    assert type(case.build()) is case.cls


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@parametrise(DISTRIBUTIONS)
def test_distributions_have_the_stated_shapes(case, leading):
    part = case.build()
    p = part(*inputs(case, part, *leading))
    event = output_shape(case, part)
    # A prior without a context is one distribution for all data.
    leading = leading if case.kind != "prior" or case.context_dim else ()
    assert (p.batch_shape, p.event_shape) == (leading, event)
    x = p.sample((5,))
    assert x.shape == (5, *leading, *event)
    assert p.log_prob(x).shape == (5, *leading)


@parametrise(cases("network"))
def test_networks_give_the_same_numbers_however_leading_dimensions_are_arranged(case):
    network = case.build().double()
    arguments = inputs(case, network, 2, 3)
    out = network(*arguments)
    assert out.shape == (2, 3, *network.out_shape)
    together = network(*(a.flatten(0, 1) for a in arguments)).unflatten(0, (2, 3))
    alone = torch.stack([torch.stack([network(*(a[i, j] for a in arguments)) for j in range(3)]) for i in range(2)])
    assert alone.shape == out.shape
    # Other batch sizes sum in another order. The rounding of a sum is below eps times its terms times their size; a
    # network has fewer terms than parameters and inputs, and nothing in it (weights below 1, inputs of 5) exceeds 100.
    terms = sum(p.numel() for p in network.parameters()) + math.prod(network.in_shape)
    for other in (together, alone):
        torch.testing.assert_close(other, out, rtol=0, atol=100 * EPS * terms)


@parametrise(cases("network"))
def test_networks_map_no_data_to_no_data(case):
    network = case.build()
    assert network(*inputs(case, network, 0)).shape == (0, *network.out_shape)


@parametrise(cases("likelihood", "encoder", "network", context=True))
def test_a_context_broadcasts_over_leading_dimensions_and_matters(case):
    part = case.build().double()
    x, context = inputs(case, part, 4)
    network = part if case.kind == "network" else part.network
    particles = x.expand(3, *x.shape)
    out = network(particles, context)
    assert torch.equal(out, network(particles, context.expand(3, *context.shape)))
    other = network(particles, -context)
    assert (out - other).flatten(2).abs().amax(-1).min() > 1e-6  # the output for every datum depends on the context


@parametrise([case for case in EVERYTHING if case.density and trainable(case.build())])
def test_every_trainable_parameter_gets_a_gradient(case):
    part = case.build()
    out = part(*inputs(case, part, 16))
    if case.kind == "network":
        loss = (out * torch.randn_like(out)).sum()
    else:
        log_prob = out.log_prob(out.sample())
        loss = (log_prob * torch.randn_like(log_prob)).sum()  # random weights: derivatives of a Laplace may cancel
    assert_gradients(part, loss)
    if case.kind == "likelihood" and hasattr(part, "log_scale") and part.log_scale.requires_grad:
        assert part.log_scale.grad.ne(0).all()  # no dead units


@parametrise([case for case in cases("prior", "encoder") if trainable(case.build())])
def test_every_trainable_parameter_gets_a_gradient_through_samples(case):
    part = case.build()
    p = part(*inputs(case, part, 16))
    if not p.has_rsample:
        with pytest.raises(NotImplementedError):
            p.rsample()
        return
    # Many draws and an asymmetric function: initially some derivatives cancel, or are zero for most draws.
    z = p.rsample((50,) if part.context_dim or case.kind == "encoder" else (800,))
    loss = (z * torch.randn_like(z)).sum() + z.pow(3).sum()
    assert_gradients(part, loss)
    if case.kind == "encoder":
        bias = list(part.network.parameters())[-1]
        assert bias.grad.ne(0).all()  # that of the last layer: no dead units


def assert_gradients(part: nn.Module, loss: Tensor) -> None:
    """Asserts that each trainable parameter gets a gradient."""
    loss.backward()
    assert not [name for name, p in trainable(part).items() if p.grad is None or not p.grad.abs().max() > 0]


def one_distribution(case: Case) -> dist.TorchDistribution:
    """Returns the distribution of a part with random parameters, because initial ones are often equal."""
    part = case.build().double().eval()
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.3 * torch.randn_like(p) / math.sqrt(p.shape[-1] if p.dim() > 1 else 1))
        return part(*inputs(case, part))


def space_for(case: Case, p: dist.TorchDistribution) -> Space:
    return case.space(p) if case.space else space_of(p, case.step)


@parametrise(DENSITIES)
@torch.no_grad()
def test_densities_are_normalised_and_samples_agree_with_them(case):
    p = one_distribution(case)
    space = space_for(case, p)
    probabilities = space.probabilities(p)
    # Each enumerated term has an error of eps times its logarithm, below 200 where it matters; the terms sum to 1.
    accuracy = case.accuracy if space.log_weights.any() else 200 * EPS
    assert abs(probabilities.sum().item() - 1) < accuracy
    assert agreement(p.sample((11000,)), space, probabilities) > FAILURE_RATE / len(DENSITIES)


@parametrise(DISTRIBUTIONS)
@torch.no_grad()
def test_samples_lie_in_the_support(case):
    part = case.build()
    p = part(*inputs(case, part, 3))
    x = p.sample((100,)).float()
    assert p.support.check(x).all()
    if case.kind == "likelihood":
        return
    assert part.support.check(x).all()
    # The supports of the part and of the distribution agree, inside and outside.
    first = torch.eye(x.shape[-1])[0]
    for other in (x + 0.5, -x, x * first, x * (1 - first), x + first, torch.full_like(x, math.nan)):
        assert torch.equal(part.support.check(other), p.support.check(other))


@parametrise(EVERYTHING)
def test_saved_and_loaded_parts_give_the_same_distribution(case, tmp_path):
    saved, loaded = case.build().eval(), case.build().eval()
    for p in saved.parameters():  # some are initially equal; those that are not trained must be saved too
        p.data.add_(0.1 * torch.randn_like(p))
    pyrovae.save(saved, tmp_path / "part.safetensors")
    assert pyrovae.load(loaded, tmp_path / "part.safetensors") is loaded
    arguments = inputs(case, saved, 4)
    ours, theirs = saved(*arguments), loaded(*arguments)
    if case.kind == "network":
        assert torch.equal(ours, theirs)
    else:
        x = ours.sample().clone()  # a correlated normal scores its own draw from its noise, with other rounding
        assert torch.equal(ours.log_prob(x), theirs.log_prob(x))


@parametrise(EVERYTHING)
def test_repr_states_the_class_and_its_shapes(case):
    part = case.build()
    names = {"prior": ["latent_dim"], "network": ["in_shape", "out_shape"]}.get(case.kind, ["latent_dim", "x_shape"])
    text = repr(part)
    assert text.startswith(case.cls.__name__)
    for name in names:
        assert f"{name}={getattr(part, name)}" in text


@parametrise([c for c in cases("likelihood", "encoder", "network") if c.cls not in (OneHotInput, TokenEncoder)])
def test_integers_are_refused(case):
    part = case.build()
    x, *context = inputs(case, part, 3)
    with pytest.raises(TypeError, match=r"floating-point inputs, got torch.int64"):
        part(x.long(), *context)


@parametrise(cases("likelihood", "encoder", "network"))
def test_inputs_of_a_wrong_shape_are_refused(case):
    part = case.build()
    shape = input_shape(case, part)
    _, *context = inputs(case, part, 3)
    for wrong in (torch.zeros(3, *shape[:-1], shape[-1] + 1), torch.zeros(shape[1:])):
        with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., .*got \("):
            part(wrong, *context)


@parametrise(cases("likelihood", "encoder", "network", context=True))
def test_a_context_that_does_not_fit_is_refused(case):
    part = case.build()
    x, context = inputs(case, part, 4)
    with pytest.raises(ValueError, match="context_dim=3 and needs a context"):
        part(x)
    with pytest.raises(ValueError, match=r"context must have shape \(\.\.\., 3\), got \(4, 2\)"):
        part(x, context[:, :2])
    with pytest.raises(ValueError, match=r"context must have shape \(\.\.\., 3\), got \(\)"):
        part(x, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"context of shape \(3, 3\) does not match inputs .*\(4,\)"):
        part(x, context[:3])


@parametrise(cases("likelihood", "encoder", "network", context=False))
def test_a_context_that_is_not_wanted_is_refused(case):
    part = case.build()
    with pytest.raises(ValueError, match="was built without a context but was given one of shape"):
        part(*inputs(case, part, 4), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: StandardNormal(0), ValueError, "latent_dim must be at least 1, got 0"),
        (lambda: StandardNormal("3"), ValueError, "latent_dim must be a whole number, got '3'"),
        (lambda: Normal(2.5, 4), ValueError, "latent_dim must be a whole number, got 2.5"),
        (lambda: DiagonalNormal(4, True), ValueError, "latent_dim must be a whole number, got True"),
        (lambda: MLP(4, 2, hidden=(-1,)), ValueError, "each of hidden must be at least 1, got -1"),
        (lambda: MLP(4, 2, hidden=(3.5,)), ValueError, "each of hidden must be a whole number, got 3.5"),
        (lambda: MLP(4, 2, hidden=8), ValueError, "hidden must be a sequence of whole numbers, got 8"),
        (lambda: DiagonalNormal(4, 0), ValueError, "latent_dim must be at least 1, got 0"),
        (lambda: Bernoulli(0, 4), ValueError, "latent_dim|in_shape"),
        (lambda: Bernoulli(2, ()), ValueError, "x_shape must be a positive int"),
        (lambda: DiagonalNormal((1, 0, 3), 2), ValueError, "x_shape must be a positive int"),
        (lambda: Normal(2, 4, scale=0.0), ValueError, "scale must be positive and finite, got 0"),
        (lambda: Normal(2, 4, scale=math.inf), ValueError, "scale must be positive and finite, got inf"),
        (lambda: Normal(2, 4, context_dim=-1), ValueError, "context_dim must be 0 .* got -1"),
        (lambda: MLP(4, -3), ValueError, "out_shape must be a positive int"),
        (lambda: MLP(2.5, 3), ValueError, "in_shape must be a positive int .* got 2.5"),
        (lambda: ConvNet(784, 3), ValueError, "in_shape must be the shape of an image"),
        (lambda: DeconvNet(3, (28, 28)), ValueError, "out_shape must be the shape of an image"),
        (lambda: encoders.Encoder(4, 2, num_params=2), TypeError, "abstract"),
        (lambda: likelihoods.Likelihood(4, 2), TypeError, "abstract"),
        (lambda: priors.Prior(4), TypeError, "abstract"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_name(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_numpys_integers_are_shapes():
    shape = np.array([1, 2, 3])
    assert Bernoulli(np.int64(2), shape).x_shape == (1, 2, 3)
    assert MLP(np.int64(4), np.int32(3)).out_shape == (3,)
    assert all(type(n) is int for n in Bernoulli(2, shape).x_shape)


def test_a_network_that_returns_another_shape_is_refused():
    encoder = DiagonalNormal(4, 2, network=nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"DiagonalNormal: its network must return \(\.\.\., 4\), but .* \(5, 3\)"):
        encoder(torch.zeros(5, 4))


def test_any_module_is_a_network():
    linear = nn.Linear(4, 4)
    x = torch.randn(5, 4)
    assert torch.equal(DiagonalNormal(4, 2, network=linear)(x).mean, linear(x)[:, :2])


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (
            (StandardNormal(3), Bernoulli(2, 4), DiagonalNormal(4, 2)),
            "agree on latent_dim: prior has 3, likelihood has 2",
        ),
        ((StandardNormal(2), Bernoulli(2, 4), DiagonalNormal(4, 3)), "agree on latent_dim.*encoder has 3"),
        ((StandardNormal(2), Bernoulli(2, (2, 2)), DiagonalNormal(4, 2)), r"agree on x_shape: likelihood has \(2, 2\)"),
        (
            (StandardNormal(2), Bernoulli(2, 4, context_dim=3), DiagonalNormal(4, 2, context_dim=5)),
            "agree on context_dim: likelihood has 3, encoder has 5",
        ),
    ],
)
def test_parts_that_disagree_make_no_vae(parts, match):
    with pytest.raises(ValueError, match=match):
        VAE(*parts)


def test_a_class_in_place_of_a_part_makes_no_vae():
    with pytest.raises(TypeError, match="prior must be a module, got <class .*StandardNormal.*Build a class"):
        VAE(StandardNormal, Bernoulli(2, 4), DiagonalNormal(4, 2))


class OwnEncoder(nn.Module):
    """A user's encoder that returns a function of the mean."""

    def __init__(self, returned=lambda loc: dist.Normal(loc, 1.0).to_event(1)):
        super().__init__()
        self.network, self.returned = nn.Linear(4, 2), returned

    def forward(self, x, context=None):
        return self.returned(self.network(x))


class OfOne(OwnEncoder):
    """An encoder that takes no context."""

    def forward(self, x):
        return super().forward(x)


P, L, E = StandardNormal(2), Bernoulli(2, 4), DiagonalNormal(4, 2)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((E, L, P), r"prior must have .* takes \(context=None\), but that of DiagonalNormal takes other .*order"),
        ((L, P, E), "prior must have .* but that of Bernoulli takes other arguments"),
        ((P, E, L), "likelihood and encoder are interchanged.*likelihood is DiagonalNormal, encoder is Bernoulli"),
        (
            (P, P, E),
            r"likelihood must have .* takes \(z, context=None\), but that of StandardNormal takes other",
        ),
        (
            (P, L, P),
            r"encoder must have .* takes \(x, context=None\), but that of StandardNormal takes other",
        ),
        ((OwnEncoder(), L, P), "prior must have .* but that of OwnEncoder takes other arguments"),
        ((P, L, OfOne()), r"encoder must have .* takes \(x, context=None\), but that of OfOne takes other arguments"),
    ],
)
def test_parts_in_another_order_are_named(parts, match):
    with pytest.raises(TypeError, match=match):
        VAE(*parts)


def test_parts_of_ones_own_need_no_more_than_the_right_forward():
    class OwnPrior(nn.Module):
        def forward(self, *context):
            return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    vae = VAE(OwnPrior(), L, OwnEncoder())
    assert vae.sample(3).shape == (3, 4)
    assert vae.encode(torch.zeros(3, 4)).batch_shape == (3,)


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (lambda loc: torch.distributions.Normal(loc, 1.0), "OwnEncoder returned torch's Normal.*pyro.distributions"),
        (
            lambda loc: torch.distributions.Independent(torch.distributions.Normal(loc, 1.0), 1),
            "OwnEncoder returned torch's Independent.*pyro.distributions.TorchDistribution",
        ),
        (lambda loc: loc, "OwnEncoder must return a distribution of pyro.distributions, but returned a Tensor"),
    ],
)
def test_parts_must_return_pyros_distributions(returned, match):
    vae = VAE(P, L, OwnEncoder(returned))
    for use in (vae.encode, vae.guide, vae.reconstruct):
        with pytest.raises(TypeError, match=match):
            use(torch.zeros(5, 4))


class Flat(nn.Module):
    """A decoder network that treats all dimensions but the last as one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, z):
        return self.linear(z).view(-1, 2, 2)


@pytest.mark.parametrize("shape", [(3, 5, 2), (2, 1, 2)], ids=str)
def test_a_decoder_that_mixes_up_draws_and_data_is_told_what_to_write(shape):
    vae = VAE(P, Bernoulli(2, (2, 2), Flat()), DiagonalNormal((2, 2), 2))
    assert vae.decode(torch.zeros(5, 2)).batch_shape == (5,)
    with pytest.raises(ValueError, match=r"returned a distribution of batch shape \([0-9]+,\) for z of .*h\.reshape\("):
        vae.decode(torch.zeros(shape))


def test_decoders_may_leave_out_what_they_do_not_depend_on():
    class Constant(nn.Module):
        latent_dim = 2

        def forward(self, z, context=None):
            return dist.Normal(torch.zeros(4), 1.0).to_event(1)

    vae = VAE(P, Constant(), E)
    assert vae.sample(3).shape == (4,)
    assert log_marginal(vae.model, vae.guide, torch.zeros(5, 4), num_samples=3, progress=False).value.shape == (5,)


# ------------------------------------------------------------------------------------- what users call after training


def moody(inputs: int, outputs: int) -> nn.Module:
    """A network that differs in training mode, with one layer in evaluation mode."""
    return nn.Sequential(
        nn.Linear(inputs, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Dropout(0.5).eval(),
        nn.Linear(8, outputs),
    )


def moody_vae() -> VAE:
    vae = VAE(StandardNormal(2), Normal(2, 4, moody(2, 4)), DiagonalNormal(4, 2, moody(4, 4)))
    fit(vae.model, vae.guide, torch.randn(40, 4), epochs=2, batch_size=20, progress=False)
    return vae


VERBS = {
    "sample": lambda vae, x: vae.sample(len(x)),
    "reconstruct": lambda vae, x: vae.reconstruct(x),
    "encode": lambda vae, x: vae.encode(x).mean,
    "decode": lambda vae, x: vae.decode(x[:, :2]).mean,
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_users_call_runs_in_evaluation_mode(verb):
    vae, x = moody_vae(), torch.randn(10, 4)
    modes = [module.training for module in vae.modules()]
    assert True in modes and False in modes
    state = {name: t.clone() for name, t in vae.state_dict().items()}
    twin = copy.deepcopy(vae).eval()
    pyro.set_rng_seed(3)
    out = VERBS[verb](vae, x)
    assert [module.training for module in vae.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())
    pyro.set_rng_seed(3)
    if verb in ("encode", "decode"):
        part = twin.encoder(x) if verb == "encode" else twin.likelihood(x[:, :2])
        assert torch.equal(out, part.mean)
        assert out.requires_grad
    else:
        q = twin.prior() if verb == "sample" else twin.encoder(x)
        p = twin.likelihood(q.sample((10,) if verb == "sample" else ()))
        assert torch.equal(out, p.sample() if verb == "sample" else p.mean)


def test_the_mode_is_put_back_after_an_error():
    vae = moody_vae()
    modes = [module.training for module in vae.modules()]
    with pytest.raises(RuntimeError):
        vae.encode(torch.randn(10, 5))
    assert [module.training for module in vae.modules()] == modes


def test_model_and_guide_run_in_the_mode_that_there_is():
    """Statistics of batch norm are updated once in each run, also in a user's model that calls decode."""
    vae, x = moody_vae(), torch.randn(10, 4)

    def model(x):
        vae.register()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.decode(z), obs=x)

    def guide(x):
        vae.register()
        q = vae.encode(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    counters = [vae.encoder.network[1].num_batches_tracked, vae.likelihood.network[1].num_batches_tracked]
    for pair in ((vae.model, vae.guide), (model, guide)):
        before = [int(counter) for counter in counters]
        SVI(*pair, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step(x)
        assert [int(counter) for counter in counters] == [n + 1 for n in before]


def test_a_trained_vae_can_be_pickled():
    vae, x = moody_vae(), torch.randn(10, 4)
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(vae)), torch.load(file, weights_only=False), copy.deepcopy(vae)]
    assert len({vae.name, *(twin.name for twin in copies)}) == 4
    for twin in copies:
        assert type(twin) is VAE
        assert [m.training for m in twin.modules()] == [m.training for m in vae.modules()]
        assert torch.equal(twin.encode(x).mean, vae.encode(x).mean)
        before = weights_of(vae)
        fit(twin.model, twin.guide, x, epochs=1, batch_size=10, progress=False)
        assert all(torch.equal(a, b) for a, b in zip(weights_of(vae), before, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(weights_of(twin), before, strict=True))


def test_parts_that_are_shared_are_shared_in_copies():
    q = DiagonalNormal(4, 2)
    vae = VAE(priors.VampPrior(q, 3), Normal(2, 4), q)
    fit(vae.model, vae.guide, torch.randn(8, 4), epochs=1, batch_size=8, progress=False)
    pickled, (copied, encoder) = pickle.loads(pickle.dumps(vae)), copy.deepcopy((vae, q))
    for twin in (pickled, copied):
        assert [*twin.prior.parameters()][-1] is not [*vae.prior.parameters()][-1]
        assert {id(p) for p in twin.encoder.parameters()} <= {id(p) for p in twin.prior.parameters()}
    assert copied.encoder is encoder
    shallow = copy.copy(vae)
    assert shallow.encoder is vae.encoder and shallow.name != vae.name


def test_a_context_goes_to_the_parts_that_were_built_for_one():
    class Recorded(nn.Module):
        """A user's part without `context_dim`, which gets the context."""

        seen = None

        def forward(self, context=None):
            self.seen = context
            return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    context = torch.randn(5, 3)
    prior = Recorded()
    vae = VAE(prior, Bernoulli(2, 4, context_dim=3), DiagonalNormal(4, 2))
    vae.guide(torch.zeros(5, 4), context)  # an encoder without a context would raise if it got one
    vae.model(torch.zeros(5, 4), context)
    assert prior.seen is context
    assert vae.sample(7, context).shape == (7, 5, 4)
    with pytest.raises(ValueError, match="was built with context_dim=3 and needs a context"):
        vae.model(torch.zeros(5, 4))


def test_labels_are_no_context():
    x, labels = torch.rand(8, 4).round(), torch.arange(8)
    advice = (
        r"context has shape \(8,\), one number a datum.*transform=lambda x, labels: x.*one_hot\(labels, num_classes\)"
    )
    conditional = VAE(StandardNormal(2), Bernoulli(2, 4, context_dim=8), DiagonalNormal(4, 2))  # as wide as the batch
    for vae in (small_vae(), conditional):
        with pytest.raises(ValueError, match=advice):
            fit(vae.model, vae.guide, (x, labels), batch_size=8, progress=False)
        with pytest.raises(ValueError, match=advice):
            vae.sample(3, labels.float())
    vae = small_vae()
    fit(vae.model, vae.guide, (x, labels), batch_size=8, epochs=1, transform=lambda x, labels: x, progress=False)
    one_hot = nn.functional.one_hot(labels, 8).float()
    fit(conditional.model, conditional.guide, (x, one_hot), batch_size=8, epochs=1, progress=False)


def test_a_part_of_ones_own_may_take_labels_as_they_are():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 4)

        def forward(self, z, context=None):
            return dist.Normal(self.table(context) + z.sum(-1, keepdim=True), 1.0).to_event(1)

    vae = VAE(StandardNormal(2), Labelled(), DiagonalNormal(4, 2))
    labels = torch.tensor([0, 2, 1, 1])
    fit(vae.model, vae.guide, (torch.randn(4, 4), labels), batch_size=4, epochs=1, progress=False)
    assert vae.sample(5, labels).shape == (5, 4, 4)


@pytest.mark.parametrize("call", ["model", "guide"])
def test_a_context_that_no_part_takes_is_refused(call):
    with pytest.raises(ValueError, match=r"a context of shape \(5, 3\) was given, but no part takes one"):
        getattr(small_vae(), call)(torch.zeros(5, 4), torch.zeros(5, 3))


# ------------------------------------------------------------------------------- every prior, likelihood and encoder


@pytest.mark.parametrize(
    ("prior", "encoder", "likelihood"),
    [
        pytest.param(*triple, id=name_of(triple), marks=[] if name_of(triple) in COVERING else [pytest.mark.slow])
        for triple in MEETING
    ],
)
def test_every_prior_likelihood_and_encoder_that_meet_train_and_score(prior, encoder, likelihood):
    vae = vae_of(prior, encoder, likelihood)
    x = vae.sample(8).float()
    before = weights_of(vae)
    fit(vae.model, vae.guide, x, epochs=10, batch_size=8, progress=False)
    still = [
        name
        for (name, p), old in zip(vae.named_parameters(), before, strict=True)
        if p.requires_grad and torch.equal(p, old)
    ]
    assert not still
    if not encoder.density:
        with pytest.raises(ValueError, match='site "z" of the guide'):
            log_marginal(vae.model, vae.guide, x, num_samples=30, progress=False)
        return
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=30, progress=False)
    assert estimate.value.isfinite().all()
    assert estimate.standard_error.isfinite().all()


@pytest.mark.parametrize(("prior", "encoder"), APART, ids=[f"{p.name}-{e.name}" for p, e in APART])
def test_parts_over_different_spaces_make_no_vae(prior, encoder):
    p, q = prior.build(), encoder.build()
    with pytest.raises(ValueError, match="The parts of a VAE must agree on (support|latent_dim): prior has") as error:
        VAE(p, Bernoulli(q.latent_dim, q.x_shape, SMALL), q)
    named = re.findall(r"(priors|encoders)\.(\w+)", str(error.value))
    if "support" in str(error.value):
        assert named or "Build both with the same" in str(error.value)
    # The parts that the message names are over the same kind of space.
    over = {(f"{case.kind}s", case.cls.__name__): case.build().support for case in cases("prior", "encoder")}
    for kind, name in named:
        assert type(innermost(over[kind, name])) is type(innermost((p if kind == "encoders" else q).support))


def innermost(support):
    return innermost(support.base_constraint) if hasattr(support, "base_constraint") else support


def small_vae() -> VAE:
    return VAE(StandardNormal(2), Bernoulli(2, 4), DiagonalNormal(4, 2))


def weights_of(vae: VAE) -> list[Tensor]:
    return [p.detach().clone() for p in vae.parameters()]


def test_a_copy_of_a_vae_trains_on_its_own():
    original = small_vae()
    twin = copy.deepcopy(original)
    assert twin.name != original.name
    x = torch.ones(8, 4)
    for trained, other in ((original, twin), (twin, original)):
        before, others_before = weights_of(trained), weights_of(other)
        SVI(trained.model, trained.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
        assert not any(torch.equal(a, b) for a, b in zip(weights_of(trained), before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(weights_of(other), others_before, strict=True))


def test_samples_and_reconstructions_of_a_vae_have_the_shape_of_data():
    vae = VAE(StandardNormal(2), Bernoulli(2, (1, 2, 3)), DiagonalNormal((1, 2, 3), 2))
    assert vae.sample(5).shape == (5, 1, 2, 3)
    assert vae.reconstruct(torch.zeros(4, 1, 2, 3)).shape == (4, 1, 2, 3)
    assert not vae.sample(5).requires_grad


def test_a_conditional_vae_samples_for_every_row_of_its_context():
    vae = VAE(StandardNormal(2), Normal(2, 6, context_dim=3, scale=0.01), DiagonalNormal(6, 2, context_dim=3))
    context = torch.eye(3)
    x = vae.sample(50, context)
    assert x.shape == (50, 3, 6)
    # Each row has its own latents and its own context: no two columns of samples are near each other.
    assert (x[:, 0] - x[:, 1]).abs().amax(-1).min() > 0.01


def test_covariance_of_the_full_rank_normal_is_its_factor_times_its_transpose():
    d = 4
    encoder = FullRankNormal(3, d).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    q = encoder(x)
    params = encoder.network(x)
    # The documented order in loops: mean, diagonal, strict lower triangle row by row.
    factor = torch.zeros(6, d, d, dtype=torch.float64)
    lower = iter(params[:, 2 * d :].unbind(-1))
    for i in range(d):
        for j in range(i):
            factor[:, i, j] = next(lower)
        factor[:, i, i] = nn.functional.softplus(params[:, d + i] + math.log(math.e - 1)) + 1e-6
    assert torch.equal(q.mean, params[:, :d])
    assert (q.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    # Sums of d products of numbers of about 1.
    torch.testing.assert_close(q.covariance_matrix, factor @ factor.mT, rtol=0, atol=10 * d * EPS)


def test_every_entry_of_the_full_rank_factor_gets_a_gradient():
    d = 4
    encoder = FullRankNormal(3, d, network=MLP)
    q = encoder(torch.randn(6, 3))
    (gradient,) = torch.autograd.grad((q.scale_tril * torch.randn(6, d, d)).sum(), encoder.network.layers[-1].bias)
    assert gradient[:d].eq(0).all()  # the factor does not depend on the mean
    assert gradient[d:].ne(0).all()


def test_the_full_rank_normal_works_in_one_dimension():
    q = FullRankNormal(3, 1)(torch.randn(6, 3))
    assert (q.batch_shape, q.event_shape) == ((6,), (1,))
    assert q.scale_tril.gt(0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_normal_log_prob_is_the_closed_form_with_every_constant(scale):
    likelihood = Normal(2, 5, scale=scale).double()
    z, x = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    loc = likelihood.network(z).detach()
    truth = torch.from_numpy(scipy.stats.norm(loc.numpy(), scale).logpdf(x.numpy())).sum(-1)
    # log_scale is kept in float32 when the part is built: its rounding, half an ulp of |log scale| < 8, moves each
    # term by |dx/scale|^2 at most, and each term is computed to a few eps.
    moved = 5 * 2 * 2.0**-22 * ((x - loc) / scale).square().sum(-1).clamp_min(1)
    assert ((likelihood(z).log_prob(x) - truth).abs() <= moved).all()


@pytest.mark.parametrize(("per_dimension", "shape"), [(False, ()), (True, (1, 2, 3))])
def test_normal_learns_one_scale_or_one_per_dimension(per_dimension, shape):
    likelihood = Normal(2, (1, 2, 3), scale=0.3, per_dimension=per_dimension)
    assert likelihood.log_scale.shape == shape
    likelihood.log_scale.data.normal_()
    stddev = likelihood(torch.randn(4, 2)).stddev
    assert torch.equal(stddev, likelihood.log_scale.exp().expand(4, 1, 2, 3))


# ----------------------------------------------------------------------- the fast path of the Bernoulli likelihood

SIZES = [(1,), (7,), (64,), (97,), (784,), (3, 32, 32), (5, 13)]


def standard_log_prob(logits: Tensor, x: Tensor, event_dims: int) -> Tensor:
    """The textbook formula in double precision."""
    return dist.Bernoulli(logits=logits.double()).to_event(event_dims).log_prob(x.double())


def rounding(logits: Tensor, event_dims: int) -> Tensor:
    """Returns a bound of the float32 error: (size + 64) roundings of half an ulp, of sums below that of |l| + 1.

    64 is for the product of up to 64 factors, each multiplication with its rounding.
    """
    magnitude = (logits.double().abs() + 1).flatten(-event_dims)
    return (magnitude.shape[-1] + 64) * torch.finfo(torch.float32).eps / 2 * magnitude.sum(-1)


@pytest.mark.parametrize("extreme", [False, True], ids=["moderate", "extreme"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_fast_bernoulli_equals_the_standard_one(shape, extreme):
    logits = 3 * torch.randn(4, *shape)
    if extreme:
        logits = torch.where(torch.rand(4, *shape) < 0.5, 200.0, -200.0)
    x = (torch.rand(4, *shape) < 0.5).float()
    p = IndependentBernoulli(dist.Bernoulli(logits=logits), len(shape))
    with torch.no_grad():
        error = (p.log_prob(x).double() - standard_log_prob(logits, x, len(shape))).abs()
    assert (error <= rounding(logits, len(shape))).all()


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_fast_bernoulli_in_double_precision_is_exact_to_double_rounding(shape):
    logits = 3 * torch.randn(4, *shape, dtype=torch.float64)
    x = (torch.rand(4, *shape) < 0.5).double()
    p = IndependentBernoulli(dist.Bernoulli(logits=logits), len(shape))
    error = (p.log_prob(x) - standard_log_prob(logits, x, len(shape))).abs()
    ratio = EPS / torch.finfo(torch.float32).eps
    assert (error <= 2 * ratio * rounding(logits, len(shape))).all()  # twice, because the standard formula rounds too


@pytest.mark.parametrize("values", [(), (4,), (5, 4), (2, 5, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_fast_bernoulli_broadcasts_like_the_standard_one(values, dtype):
    logits = torch.randn(4, 2, 3)
    x = (torch.rand(*values, 2, 3) < 0.5).to(dtype)
    log_prob = IndependentBernoulli(dist.Bernoulli(logits=logits), 2, validate_args=dtype != torch.bool).log_prob(x)
    truth = standard_log_prob(logits, x, 2)
    assert log_prob.shape == truth.shape
    assert ((log_prob.double() - truth).abs() <= rounding(logits, 2)).all()


def test_fast_bernoulli_expands():
    logits = torch.randn(4, 7)
    x = (torch.rand(5, 4, 7) < 0.5).float()
    p = IndependentBernoulli(dist.Bernoulli(logits=logits), 1).expand((5, 4))
    assert isinstance(p, IndependentBernoulli)
    assert (p.batch_shape, p.event_shape) == ((5, 4), (7,))
    assert ((p.log_prob(x).double() - standard_log_prob(logits, x, 1)).abs() <= rounding(logits, 1)).all()
    one = IndependentBernoulli(dist.Bernoulli(logits=logits[0]), 1).expand((5, 4)).log_prob(x)
    assert one.shape == (5, 4)
    assert ((one.double() - standard_log_prob(logits[0], x, 1)).abs() <= rounding(logits[0], 1)).all()


def test_fast_bernoulli_has_the_standard_gradient():
    logits = (3 * torch.randn(4, 97, dtype=torch.float64)).requires_grad_()
    x = (torch.rand(4, 97) < 0.5).double()
    with torch.no_grad():
        fast = IndependentBernoulli(dist.Bernoulli(logits=logits), 1).log_prob(x)
    log_prob = IndependentBernoulli(dist.Bernoulli(logits=logits), 1).log_prob(x)
    assert ((log_prob - fast).abs() <= 2 * EPS / torch.finfo(torch.float32).eps * rounding(logits.detach(), 1)).all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    torch.testing.assert_close(gradient, x - logits.detach().sigmoid(), rtol=0, atol=4 * EPS)


def test_fast_bernoulli_leaves_its_arguments_as_they_were():
    logits, x = torch.randn(4, 7), torch.ones(4, 7)
    before = logits.clone()
    IndependentBernoulli(dist.Bernoulli(logits=logits), 1).log_prob(x)
    assert torch.equal(logits, before)
    assert torch.equal(x, torch.ones(4, 7))


def test_fast_bernoulli_without_event_dimensions_is_the_plain_one():
    logits, x = torch.randn(4, 7), torch.ones(4, 7)
    log_prob = IndependentBernoulli(dist.Bernoulli(logits=logits), 0).log_prob(x)
    assert log_prob.shape == (4, 7)
    assert ((log_prob.double() - standard_log_prob(logits, x, 0)).abs() <= rounding(logits.unsqueeze(-1), 1)).all()


def test_fast_bernoulli_refuses_grey_values_like_the_standard_one():
    with torch.no_grad(), pytest.raises(ValueError, match="support"):
        IndependentBernoulli(dist.Bernoulli(logits=torch.zeros(3)), 1).log_prob(torch.full((3,), 0.5))
