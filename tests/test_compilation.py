"""Compiled losses are the same as eager ones, for all parts, bounds and structures.

Most tests run the traced graph itself: the compiler takes seconds for each graph, and has its own tests.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pyro
import pytest
import torch
from bound_cases import BOUNDS, BY_NAME, BoundCase
from cases import CASES, SMALL, Case, inputs, output_shape
from compiling import (
    FETCHED,
    SGD,
    Pair,
    Traced,
    doubles,
    fresh,
    linear,
    pair_of,
    refused,
    same,
    same_compiled,
    small_vae,
    trained,
)
from linear_gaussian import diagonal_vae
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from triples import COVERING, MEETING, name_of, representatives, vae_of

from pyrovae import VAE, bounds, encoders, fit, likelihoods, priors
from pyrovae import compile as compiled
from pyrovae.nn import MLP
from pyrovae.regularizers import Adversarial, DensityRatio, MaximumMeanDiscrepancy, TotalCorrelation
from pyrovae.structures import (
    ClassifierELBO,
    DenseHierarchicalVAE,
    HierarchicalVAE,
    LadderVAE,
    MissingDataVAE,
    SemiSupervisedVAE,
)

fit = partial(fit, progress=False)


# The parts whose computation depends on values of tensors, and the files that fetch these.
UNTRACEABLE = {
    "ExemplarPrior": "mixtures.py",
    "OneHotCategorical": "reshaped.py",
    "OneHotCategorical-one": "reshaped.py",
    "OneHotCategorical-context": "reshaped.py",
    "OneHotCategorical-posterior": "reshaped.py",
    "OneHotCategorical-posterior-context": "reshaped.py",
    "ResampledPrior": "reshaped.py",
    "ResampledPrior-context": "reshaped.py",
    "VonMisesFisher": "spheres.py",
    "VonMisesFisher-circle": "spheres.py",
    "VonMisesFisher-context": "spheres.py",
    "GRUEncoder-masked": "sequences.py",
    "OneHotInput-vector": "inputs.py",
    "OneHotInput-context": "inputs.py",
}
QUICK = {*UNTRACEABLE, *(case.name for case in representatives("network"))}


def pair_with(case: Case) -> tuple[Pair, tuple]:
    """Returns a pair with one part, which draws latents or observes data, and its arguments."""
    part = case.build().double()
    args, shape = inputs(case, part, 4), output_shape(case, part)
    x = doubles(4, *shape) if case.kind == "network" else part(*args).sample()
    wide = dist.Normal(torch.zeros(shape, dtype=torch.float64), 2.0).to_event(len(shape))

    def model(*args):
        pyro.module("part", part)
        with pyro.plate("data", 4):
            if case.kind in ("prior", "encoder"):
                pyro.sample("z", wide)
            else:
                p = part(*args)
                pyro.sample("x", dist.Normal(p, 1.0).to_event(len(shape)) if case.kind == "network" else p, obs=x)

    def guide(*args):
        pyro.module("part", part)
        if case.kind in ("prior", "encoder"):
            with pyro.plate("data", 4):
                pyro.sample("z", part(*args))

    return Pair(model, guide, [part]), args


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else [pytest.mark.slow]) for c in CASES],
)
def test_every_part_compiled_is_the_same(case, traced):
    pair, args = fresh(lambda: pair_with(case))
    expected = trained(Trace_ELBO(), pair, *args, steps=3)
    pair, _ = fresh(lambda: pair_with(case))
    where = UNTRACEABLE.get(case.name)
    with refused(f"{FETCHED}.*{where}") if where else nullcontext():
        same(trained(compiled(Trace_ELBO()), pair, *args, steps=3), expected)
    assert traced.made == (0 if where else 1)


def traceable(case: Case) -> bool:
    # OneHotInput is what makes a decoder of classes; a prior that is resampled is only so when drawn from.
    return case.cls is priors.ResampledPrior or case.name not in UNTRACEABLE and case.cls is not encoders.Categorical


def each_once(triples: list[tuple[Case, Case, Case]]) -> list[tuple[Case, Case, Case]]:
    """Returns some of the triples, which together hold each part."""
    kept, covered = [], set()
    for new in (3, 2, 1):
        for triple in triples:
            names = {case.name for case in triple}
            if len(names - covered) >= new:
                kept.append(triple)
                covered |= names
    return kept


ONCE = each_once([t for t in MEETING if all(map(traceable, t)) and all(case.density for case in t)])
# Flows take the longest to trace: with the bounds that take the least, then.
ONCE.sort(key=lambda triple: not any("Spline" in case.name or "Flow" in case.name for case in triple))
assert len(ONCE) <= len(BOUNDS)


def test_each_class_of_parts_is_covered():
    met = {case.name for triple in ONCE for case in triple}
    apart = {case.name for case in CASES if not (traceable(case) and case.density)}
    # These fit only encoders that cannot be traced.
    apart |= {"HypersphericalUniform", "Categorical"}
    assert {case.name for kind in ("prior", "encoder", "likelihood") for case in representatives(kind)} - apart <= met


def assert_parts(triple: tuple[Case, Case, Case], bound: BoundCase, steps: int, traced: Traced) -> None:
    x = fresh(lambda: vae_of(*triple).double().sample(6))
    elbo = same_compiled(lambda: bound.build(2), lambda: pair_of(vae_of(*triple).double()), x, steps=steps)
    # One run to compile, and one for each call of the loss.
    assert (traced.made, traced.runs, elbo.elbo.steps) == (1, 1 + steps, steps)


PAIRED = [(bound, ONCE[i] if i < len(ONCE) else MEETING[0]) for i, bound in enumerate(BOUNDS)]


@pytest.mark.parametrize(("bound", "triple"), PAIRED, ids=[f"{b.name}-{name_of(t)}" for b, t in PAIRED])
def test_every_bound_and_class_of_parts_compiled_are_the_same(bound, triple, traced):
    assert_parts(triple, bound, 4, traced)


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda case: case.name)
def test_every_bound_compiled_is_the_same_for_long(bound, traced):
    same_compiled(lambda: bound.build(4), lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3), steps=100)
    assert traced.made == 1


@pytest.mark.slow
@pytest.mark.parametrize("triple", [t for t in MEETING if name_of(t) in COVERING], ids=name_of)
def test_all_parts_that_meet_compiled_are_the_same(triple, traced):
    bound = BY_NAME["IWAE" if all(case.density for case in triple) else "ELBO"]
    if all(map(traceable, triple)):
        assert_parts(triple, bound, 3, traced)
    else:
        with refused(FETCHED):
            x = fresh(lambda: vae_of(*triple).double().sample(6))
            same_compiled(lambda: bound.build(2), lambda: pair_of(vae_of(*triple).double()), x, steps=3)
        assert traced.made == 0


REGULARIZERS = {
    "TotalCorrelation": lambda: TotalCorrelation(2.0, 100),
    "MaximumMeanDiscrepancy": lambda: MaximumMeanDiscrepancy(2.0),
    "DensityRatio": lambda: DensityRatio(MLP(2, 1, hidden=(4,)).double(), 2.0),
    "Adversarial": lambda: Adversarial(MLP(3, 1, hidden=(4,)).double(), 2.0),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers_compiled_are_the_same(name, traced):
    found, fetched = [], name == "Adversarial"
    with refused("elements.py") if fetched else nullcontext():
        for wrap in (lambda elbo: elbo, compiled):
            vae, regularizer = fresh(lambda: (diagonal_vae(2, 3), REGULARIZERS[name]()))
            held = [t for t in vars(regularizer).values() if isinstance(t, nn.Module)]
            pair = Pair(vae.model, vae.guide, [vae, *held])
            found.append(trained(wrap(bounds.ELBO(2, regularizers=[regularizer])), pair, doubles(5, 3)))
    same(*found)
    assert traced.made == (not fetched)


def hierarchical() -> VAE:
    return HierarchicalVAE(
        priors.StandardNormal(2),
        [likelihoods.Normal(2, 3, SMALL)],
        likelihoods.Normal(3, 4, SMALL),
        [encoders.DiagonalNormal(4, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL)],
    )


def ladder() -> VAE:
    return LadderVAE(
        priors.StandardNormal(2),
        [likelihoods.Normal(2, 3, SMALL)],
        likelihoods.Normal(3, 4, SMALL),
        [nn.Linear(4, 5), nn.Linear(5, 5)],
        [encoders.DiagonalNormal(5, 3, SMALL), encoders.FullRankNormal(5, 2, SMALL)],
    )


def dense() -> VAE:
    return DenseHierarchicalVAE(
        priors.StandardNormal(2),
        [likelihoods.Normal(2, 3, SMALL)],
        likelihoods.Normal(5, 4, SMALL),
        [encoders.DiagonalNormal(4, 3, SMALL, context_dim=2), encoders.DiagonalNormal(4, 2, SMALL)],
    )


def missing() -> VAE:
    return MissingDataVAE(
        priors.StandardNormal(2), likelihoods.Normal(2, 4, SMALL), encoders.DiagonalNormal((2, 4), 2, SMALL)
    )


STRUCTURES = {
    "HierarchicalVAE": (hierarchical, ()),
    "LadderVAE": (ladder, ()),
    "DenseHierarchicalVAE": (dense, ()),
    "MissingDataVAE": (missing, (doubles(6, 4) > 0,)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_compiled_are_the_same(name, traced):
    make, args = STRUCTURES[name]
    same_compiled(lambda: BY_NAME["IWAE-DReG"].build(2), lambda: pair_of(make().double()), doubles(6, 4), *args)
    assert traced.made == 1


@pytest.mark.parametrize("mask", [doubles(6, 4) > 0, (doubles(6, 4) > 0).double()], ids=["booleans", "numbers"])
def test_a_mask_is_checked_in_graphs_too(mask, traced):
    vae, elbo = fresh(lambda: missing().double()), compiled(bounds.ELBO())
    for wrong, message in ((None, ""), (0.0, "mask has no observed element in 1 of 6 rows, first in row 2")):
        for _ in range(3):
            given = mask.clone()
            if wrong is None:
                elbo.loss_and_grads(vae.model, vae.guide, doubles(6, 4), given)
                continue
            given[2] = wrong
            with pytest.raises(ValueError, match=message):
                elbo.loss_and_grads(vae.model, vae.guide, doubles(6, 4), given)
    assert traced.made == 1


def test_a_context_is_an_input(traced):
    def make() -> Pair:
        likelihood = likelihoods.Normal(2, 4, SMALL, context_dim=3)
        vae = VAE(priors.StandardNormal(2), likelihood, encoders.DiagonalNormal(4, 2, SMALL, context_dim=3))
        return pair_of(vae.double())

    same_compiled(lambda: bounds.ELBO(), make, doubles(6, 4), doubles(6, 3), steps=3)
    elbo, pair = compiled(bounds.ELBO()), fresh(make)
    x, context = doubles(6, 4), doubles(6, 3)
    losses = []
    for given in (context, context, -context):  # the third call makes no comparison
        pyro.set_rng_seed(1)
        losses.append(elbo.terms(pair.model, pair.guide, x, given).loss.item())
    pyro.set_rng_seed(1)
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(bounds.ELBO().terms(pair.model, pair.guide, x, -context).loss.item(), rel=1e-12)


@pytest.mark.parametrize("bound", ["ELBO-draws", "IWAE-DReG"])
def test_chunks_of_particles_compiled_are_the_same(bound, traced):
    same_compiled(lambda: BY_NAME[bound].build(4, chunk_size=2), lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3))
    assert traced.made == 1


NO_LOSS = "has no differentiable_loss"
ONE_PLATE = {"max_plate_nesting": 1}
OF_PYRO = {
    "Trace": (Trace_ELBO, None),
    "Trace, particles in a loop": (partial(Trace_ELBO, 3), None),
    "Trace, vectorized": (partial(Trace_ELBO, 3, vectorize_particles=True, **ONE_PLATE), None),
    "TraceMeanField": (TraceMeanField_ELBO, None),
    "TraceEnum": (partial(TraceEnum_ELBO, strict_enumeration_warning=False, **ONE_PLATE), None),
    "TraceGraph": (TraceGraph_ELBO, NO_LOSS),
    "Renyi": (partial(RenyiELBO, num_particles=3, vectorize_particles=True, **ONE_PLATE), NO_LOSS),
}


@pytest.mark.parametrize("name", OF_PYRO)
def test_the_elbos_of_pyro_compiled_are_the_same(name, traced):
    make, reason = OF_PYRO[name]
    exact = "loop" not in name  # Pyro adds the gradients of such particles in another order
    with nullcontext() if reason is None else refused(reason):
        same_compiled(make, lambda: pair_of(diagonal_vae(2, 3)), doubles(5, 3), exact=exact)
    assert traced.made == (reason is None)


def classes() -> Pair:
    """A mixture of two components, summed over."""
    locs = nn.ParameterList([torch.tensor([-1.0, 1.0]).double()])

    def model(x):
        pyro.module("locs", locs)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.full((2,), 0.5).double()), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[0][k], 1.0), obs=x)

    return Pair(model, lambda x: None, [locs])


def some_labelled() -> Pair:
    likelihood = likelihoods.Normal(2, 3, SMALL, context_dim=2)
    encoder = encoders.DiagonalNormal(3, 2, SMALL, context_dim=2)
    return pair_of(SemiSupervisedVAE(priors.StandardNormal(2), likelihood, encoder, SMALL, num_classes=2).double())


def summed_in_the_guide() -> Pair:
    """Classes, one of which has probability zero in the model and in the guide where x is negative."""
    locs, encoder = nn.ParameterList([torch.tensor([0.3, -0.2, 0.1]).double()]), nn.Linear(1, 3).double()

    def possible(x, logits):
        return logits.masked_fill((x < 0).unsqueeze(-1) & torch.tensor([False, False, True]), -torch.inf)

    def model(x):
        pyro.module("locs", locs)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=possible(x, x.new_zeros(len(x), 3))))
            pyro.sample("x", dist.Normal(locs[0][k], 1.0), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            logits = possible(x, encoder(x.unsqueeze(-1)))
            pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    return Pair(model, guide, [locs, encoder])


@pytest.mark.parametrize("make", [classes, some_labelled, summed_in_the_guide])
def test_sums_over_classes_are_the_same(make, traced):
    """Pyro asks for probabilities that are zero, and leaves their terms out."""

    def elbo_of(pair: Pair) -> TraceEnum_ELBO:
        return ClassifierELBO(pair.modules[0].classify, 3.0) if make is some_labelled else TraceEnum_ELBO(**ONE_PLATE)

    args = (doubles(6, 3), torch.tensor([0, 1, -1, -1, 1, -1])) if make is some_labelled else (doubles(6),)
    pair = fresh(make)
    expected = trained(elbo_of(pair), pair, *args, steps=3)
    assert all(t.isfinite().all() for t in expected if t.is_floating_point())
    pair = fresh(make)
    # Without the terms of probability zero Pyro's sum has another order.
    same(trained(compiled(elbo_of(pair)), pair, *args, steps=3), expected, exact=make is not summed_in_the_guide)
    assert traced.made


def test_a_class_that_is_out_of_range_is_refused_in_a_graph_too():
    pair, labels = fresh(some_labelled), torch.tensor([0, 1, -1, -1, 1, -1])
    elbo = compiled(ClassifierELBO(pair.modules[0].classify, 3.0))
    elbo.loss_and_grads(*pair[:2], doubles(6, 3), labels)
    labels[4] = 2
    with pytest.raises(ValueError, match="classes from 0 to 1, or -1 where the class is unknown, but holds 2 in row 4"):
        elbo.loss_and_grads(*pair[:2], doubles(6, 3), labels)


def subsampled() -> Pair:
    """A pair with a global and a local latent, keywords, None, and a subsampled plate."""
    decoder, encoder = nn.Linear(2, 3).double(), nn.Linear(3, 4).double()

    def model(x, size=None, *, offset=None, unused=None):
        pyro.module("decoder", decoder)
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = decoder(z) + shift + (0.0 if offset is None else offset)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x[rows])

    def guide(x, size=None, *, offset=None, unused=None):
        pyro.module("encoder", encoder)
        loc = pyro.param("loc", x.new_zeros(3))
        pyro.sample("shift", dist.Normal(loc, 0.1).to_event(1))
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as rows:
            loc, log_scale = encoder(x[rows]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Pair(model, guide, [decoder, encoder])


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (bounds.ELBO, {}),
        (bounds.ELBO, {"offset": None}),
        (Trace_ELBO, {"offset": doubles(3)}),
        (TraceMeanField_ELBO, {"offset": 0.5, "unused": "this"}),
    ],
    ids=str,
)
def test_pairs_by_hand_with_subsamples_and_keywords_compiled_are_the_same(make, kwargs, traced):
    same_compiled(make, subsampled, doubles(8, 3), 4, steps=4, **kwargs)
    assert traced.made == 1


class Written(PyroModule):
    """A PyroModule with a constrained parameter, as model, with an automatic guide."""

    def __init__(self):
        super().__init__()
        self.decoder = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


def automatic(kind: type, model: Callable, module: nn.Module) -> Pair:
    """Returns a model with an automatic guide, after its first call."""
    guide = kind(model)
    guide(doubles(5, 3))
    guide.double()
    return Pair(model, guide, [module, guide])


@pytest.mark.parametrize("make", [bounds.ELBO, Trace_ELBO])
def test_modules_of_pyro_and_automatic_guides_compiled_are_the_same(make, traced):
    def pair() -> Pair:
        model = Written().double()
        return automatic(AutoNormal, model, model)

    same_compiled(make, pair, doubles(5, 3))
    assert traced.made == 1


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoLowRankMultivariateNormal])
def test_automatic_guides_of_latents_in_a_plate_compiled_are_the_same(kind, traced):
    def pair() -> Pair:
        by_hand = linear()
        return automatic(kind, by_hand.model, by_hand.modules[0])

    same_compiled(Trace_ELBO, pair, doubles(5, 3))
    assert traced.made == 1


def test_a_distribution_made_outside_that_validates_compiled_is_the_same(traced):
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).expand([5, 2]).to_event(1)

    def pair() -> Pair:
        made = linear()

        def model(x):
            pyro.module("decoder", made.modules[0])
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior)
                pyro.sample("x", dist.Normal(made.modules[0](z), 1.0).to_event(1), obs=x)

        return Pair(model, made.guide, made.modules[:1])

    same_compiled(Trace_ELBO, pair, doubles(5, 3))
    assert traced.made == 1


@pytest.mark.parametrize("make", [lambda: bounds.IWAE(3), Trace_ELBO], ids=["IWAE", "Trace_ELBO"])
def test_svi_takes_a_compiled_elbo(make, traced):
    found, x = [], doubles(5, 3)
    for wrap in (lambda elbo: elbo, compiled):
        pair = fresh(subsampled if make is Trace_ELBO else lambda: pair_of(diagonal_vae(2, 3)))
        svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 1e-3}), wrap(make()))
        losses = [torch.tensor(svi.step(x)) for _ in range(5)]
        found.append([*losses, *(p.detach().clone() for p in pyro.get_param_store().values())])
        found[-1] += [torch.tensor(svi.evaluate_loss(x))]
    same(found[1], found[0])
    assert traced.made == 1


def test_a_loss_is_differentiated_times_an_outer_factor_and_adds_to_gradients(traced):
    x, found = doubles(5, 3), []
    for wrap in (lambda elbo: elbo, compiled):
        vae, elbo = fresh(lambda: diagonal_vae(2, 3)), wrap(bounds.IWAE(3))
        for scale in (1.0, -2.5, 0.1):
            (scale * elbo.differentiable_loss(vae.model, vae.guide, x) ** 2).backward()
        losses = [elbo.loss_and_grads(vae.model, vae.guide, x) for _ in range(2)]
        assert not any(torch.as_tensor(loss).requires_grad for loss in losses)
        terms = elbo.terms(vae.model, vae.guide, x)
        assert terms.loss.requires_grad and not terms.bound.requires_grad
        (terms.loss / 3).backward()
        found.append([*(torch.as_tensor(loss) for loss in losses), *(p.grad for p in vae.parameters())])
    same(found[1], found[0], exact=False)  # the outer factor comes last


def test_gradients_of_parameters_do_not_share_memory(traced):
    # A sum of two parameters gives both the same gradient, but a change of one in place must not change the other.
    first, second = (nn.Linear(2, 3).double() for _ in range(2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = z @ first.weight.T + (first.bias + second.bias)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    compiled(bounds.ELBO()).loss_and_grads(model, guide, doubles(5, 3))
    before = second.bias.grad.clone()
    assert torch.equal(first.bias.grad, before)
    first.bias.grad.mul_(2)
    assert torch.equal(second.bias.grad, before)


def test_the_gradient_of_a_sum_of_parameters_can_be_clipped(traced):
    # It is one number, expanded to the shape of the parameters.
    def model(x):
        loc = pyro.param("loc", torch.zeros(3).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc.sum() + z, 1.0).to_event(1), obs=x[:, :2])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    found = []
    for compile in (False, True):
        fresh(lambda: None)
        fit(model, guide, doubles(8, 3), epochs=2, batch_size=8, optimizer=SGD, clip_norm=0.1, compile=compile)
        found.append([pyro.param("loc").detach()])
    same(found[1], found[0])


def test_an_elbo_with_its_own_loss_and_grads_keeps_it(traced):
    class Doubled(Trace_ELBO):
        def loss_and_grads(self, model, guide, *args, **kwargs):
            return 2 * super().loss_and_grads(model, guide, *args, **kwargs)

    found = []
    for wrap in (lambda elbo: elbo, compiled):
        pair = fresh(linear)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            found.append(trained(wrap(Doubled()), pair, doubles(5, 3)))
    same(found[1], found[0])


def test_without_gradients_nothing_is_compiled(traced):
    vae, x = diagonal_vae(2, 3), doubles(5, 3)
    elbo = compiled(bounds.IWAE(3))
    pyro.set_rng_seed(1)
    found = elbo.loss(vae.model, vae.guide, x)
    with torch.no_grad():
        elbo.terms(vae.model, vae.guide, x)
        elbo.differentiable_loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(1)
    assert found == bounds.IWAE(3).loss(vae.model, vae.guide, x)
    assert (traced.made, elbo.elbo.steps) == (0, 0)
    assert elbo is compiled(elbo)


def test_elbos_of_pyro_have_no_terms():
    with pytest.raises(AttributeError, match="Trace_ELBO has no terms"):
        compiled(Trace_ELBO()).terms(*pair_of(diagonal_vae(2, 3))[:2], doubles(5, 3))


@pytest.mark.parametrize("given", [Trace_ELBO, "ELBO", None, bounds.ELBO])
def test_what_is_compiled_must_be_an_instance_of_elbo(given):
    with pytest.raises(TypeError, match="elbo must be an instance of ELBO"):
        compiled(given)


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda case: case.name)
def test_every_bound_by_the_compiler_is_the_same(bound):
    same_compiled(lambda: bound.build(4), lambda: pair_of(small_vae().double()), doubles(5, 3), steps=9, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("triple", ONCE, ids=name_of)
def test_parts_by_the_compiler_are_the_same(triple):
    x = fresh(lambda: vae_of(*triple).double().sample(6))
    same_compiled(lambda: bounds.ELBO(2), lambda: pair_of(vae_of(*triple).double()), x, exact=False)
