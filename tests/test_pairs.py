"""Pairs as others write them, around one linear Gaussian whose log p(x) is known."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import TraceTailAdaptive_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

import pyrovae
from pyrovae import bounds, diagnostics, estimators, fit, impute, log_marginal, log_weights

SCALE = 0.5
W = torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.4, -0.8]]).double()
COVARIANCE = torch.linalg.inv(torch.eye(2).double() + W @ W.T / SCALE**2)
ROUNDING = 1e-10  # of sums of some ten terms of size one to a hundred, in double precision


def data(size: int = 12) -> Tensor:
    return torch.randn(size, 2).double() @ W + SCALE * torch.randn(size, 3).double()


def truth(x: Tensor) -> Tensor:
    covariance = W.T @ W + SCALE**2 * torch.eye(3).double()
    return dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)


def posterior(x: Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(x @ W.T @ COVARIANCE / SCALE**2, COVARIANCE)


def prior(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(*shape, 2).double(), 1.0).to_event(1)


def likelihood(z: Tensor) -> dist.TorchDistribution:
    return dist.Normal(z @ W, SCALE).to_event(1)


def model(x, plate=lambda x: pyro.plate("data", len(x))):
    with plate(x):
        z = pyro.sample("z", prior(len(x)))
        pyro.sample("x", likelihood(z), obs=x)


def guide(x, plate=lambda x: pyro.plate("data", len(x))):
    with plate(x):
        pyro.sample("z", posterior(x))


def assert_exact(model, guide, x: Tensor, scale: float = 1.0) -> None:
    """Under the exact posterior each weight is p(x): of draws at once, one by one and in every estimate."""
    right = truth(x)
    log_w = log_weights(model, guide, x, num_samples=3)
    torch.testing.assert_close(log_w, right.expand(3, -1), rtol=0, atol=ROUNDING)
    for memory in (64e6, 1.0):
        estimate = log_marginal(model, guide, x, num_samples=30, max_memory=memory, progress=False)
        torch.testing.assert_close(estimate.value, right, rtol=0, atol=ROUNDING)
    loss = bounds.IWAE(3).loss(model, guide, x)  # alone is scaled up to what a plate stands for
    assert loss == pytest.approx(-scale * right.sum().item(), abs=scale * ROUNDING * len(x))


PLATES = {
    "another name": (lambda x: pyro.plate("documents", len(x)), 1),
    "no size": (lambda x: pyro.plate("data"), 1),
    "of many": (lambda x: pyro.plate("rows", 100, subsample_size=len(x)), 100 / 12),
    "its rows": (lambda x: pyro.plate("rows", 100, subsample=torch.arange(len(x))), 100 / 12),
}


@pytest.mark.parametrize(("plate", "scale"), PLATES.values(), ids=PLATES)
def test_any_plate_over_the_data(plate, scale):
    assert_exact(partial(model, plate=plate), partial(guide, plate=plate), data(), scale)


def test_plates_of_other_sizes_beside_the_data():
    def nested(x, observe):
        # As many columns as data, and the data are not the last dimension.
        with pyro.plate("rows", len(x), dim=-2):
            q = prior(1) if observe else posterior(x.unsqueeze(-2))
            z = pyro.sample("z", q)
            with pyro.plate("columns", 3, dim=-1):
                if observe:
                    pyro.sample("x", dist.Normal((z @ W).squeeze(-2), SCALE), obs=x)

    for size in (5, 3):
        if size == 3:  # then the shape does not tell which plate it is
            with pytest.raises(ValueError, match='the plate over the data may be.*"rows".*"columns"'):
                log_weights(partial(nested, observe=True), partial(nested, observe=False), data(3), num_samples=2)
            with pyrovae.data_plate("rows"):
                assert_exact(partial(nested, observe=True), partial(nested, observe=False), data(3))
            with pyrovae.data_plate("pages"), pytest.raises(ValueError, match='names no plate.*"rows", "columns"'):
                log_weights(partial(nested, observe=True), partial(nested, observe=False), data(3), num_samples=2)
        else:
            assert_exact(partial(nested, observe=True), partial(nested, observe=False), data(size))


def test_a_plate_named_data_is_the_one_whatever_there_is_beside():
    def nested(x, observe):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", prior(1) if observe else posterior(x.unsqueeze(-2)))
            with pyro.plate("columns", 3, dim=-1):
                if observe:
                    pyro.sample("x", dist.Normal((z @ W).squeeze(-2), SCALE), obs=x)

    assert_exact(partial(nested, observe=True), partial(nested, observe=False), data(3))


@pytest.mark.parametrize(
    "method", [estimators.Quadrature(), estimators.AnnealedImportanceSampling(4, num_temperatures=30)]
)
def test_latents_as_vectors_with_the_data_at_another_dimension(method):
    def column(x, observe):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", prior(1) if observe else posterior(x.unsqueeze(-2)))
            if observe:
                pyro.sample("x", likelihood(z), obs=x.unsqueeze(-2))

    x = data(4)
    estimate = log_marginal(
        partial(column, observe=True), partial(column, observe=False), x, method=method, progress=False
    )
    # Annealing from the exact posterior would be exact; from the prior its error is in the weights.
    error = estimate.standard_error.clamp(min=1e-6)
    assert ((estimate.value - truth(x)).abs() < 5 * error + 0.5 * error.square()).all()


def test_what_a_guide_observes_is_no_part_of_q():
    def with_more(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))
            pyro.factor("aux", -50 * x.new_ones(len(x)), has_rsample=False)
            pyro.sample("seen", dist.Normal(0.0, 1.0), obs=x[:, 0])

    x = data()
    estimate = log_marginal(model, with_more, x, num_samples=30, progress=False)
    torch.testing.assert_close(estimate.value, truth(x), rtol=0, atol=ROUNDING)
    for bound in (bounds.ELBO(), bounds.IWAE(3)):
        with pytest.raises(ValueError, match='the guide observes "aux", "seen", which is not part of q'):
            bound.loss(model, with_more, x)


def test_subsampling_in_the_guide_trains_as_svi_does():
    def both(x, observe):
        with pyro.plate("data", 12, subsample_size=4) as rows:
            shift = pyro.param("shift", torch.zeros(2).double())
            z = pyro.sample(
                "z", prior(4) if observe else dist.MultivariateNormal(posterior(x[rows]).loc + shift, COVARIANCE)
            )
            if observe:
                pyro.sample("x", likelihood(z), obs=x[rows])

    x, pair, found = data(), (partial(both, observe=True), partial(both, observe=False)), []
    pyro.set_rng_seed(0)
    fit(*pair, x, epochs=3, batch_size=12, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), progress=False)
    found.append(pyro.param("shift").detach().clone())
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = pyro.infer.SVI(
        *pair, pyro.optim.SGD({"lr": 0.1 / 12}), pyro.infer.Trace_ELBO()
    )  # fit's loss is that per datum
    for _ in range(3):
        svi.step(x)
    found.append(pyro.param("shift").detach())
    assert found[1].norm() > 0
    torch.testing.assert_close(*found, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match="drew 4 of 12 data"):
        log_marginal(*pair, x, progress=False)


def test_an_easy_guide_has_weights():
    class Own(EasyGuide):
        def guide(self, x):
            with self.plate("data", len(x)):
                self.group(match="z").sample("joint", posterior(x))

    assert_exact(model, Own(model), data())
    with pytest.raises(ValueError, match='auxiliary site "joint"'):
        diagnostics.collapse(model, Own(model), data(), progress=False)


def test_an_automatic_guide_of_local_latents_has_weights():
    def positive(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(torch.zeros(()).double(), 1.0))
            b = pyro.sample("b", dist.Dirichlet(torch.ones(3).double()))
            pyro.sample("x", dist.Normal(a + b[..., 0], 1.0), obs=x)

    x = torch.rand(6).double() + 1
    automatic = AutoNormal(positive, init_scale=1.0)  # as wide as the posterior
    automatic(x)
    log_w = log_weights(positive, automatic, x, num_samples=5)
    assert log_w.shape == (5, 6)
    # The mean of the weights is p(x), which the prior's own draws give as well.
    estimate = log_marginal(positive, automatic, x, num_samples=20_000, progress=False)
    other = log_marginal(
        positive, None, x, method=estimators.ImportanceSampling(20_000, proposal=estimators.Prior()), progress=False
    )
    error = (estimate.standard_error.square() + other.standard_error.square()).sqrt()
    assert ((estimate.value - other.value).abs() < 5 * error).all()
    # It has no density at latents that it did not draw.
    with pytest.raises(ValueError, match='auxiliary site "a_unconstrained", "b_unconstrained"'):
        log_marginal(
            positive, automatic, x, method=estimators.ImportanceSampling(10, estimators.Mixed()), progress=False
        )
    with pytest.raises(ValueError, match="is a point"):
        log_weights(positive, AutoDelta(positive), x, num_samples=5)


def test_a_latent_that_all_data_share_can_be_given():
    def shared(x):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("x", dist.Normal(z @ W, scale).to_event(1), obs=x)

    def shared_guide(x):
        pyro.sample("scale", dist.LogNormal(torch.zeros(()).double(), 0.1))
        guide(x)

    x, value = data(), {"scale": torch.tensor(SCALE).double()}
    given, given_guide = (poutine.condition(function, data=value) for function in (shared, shared_guide))
    for q in (guide, given_guide):
        estimate = log_marginal(given, q, x, num_samples=30, progress=False)
        torch.testing.assert_close(estimate.value, truth(x), rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match='The guide samples "scale", which the model observes.*poutine.condition'):
        log_marginal(given, shared_guide, x, progress=False)
    with pytest.raises(ValueError, match='"scale" of the model is outside.*poutine.condition'):
        log_marginal(shared, shared_guide, x, progress=False)


def test_a_shared_value_with_as_many_entries_as_rows_is_still_shared():
    def shared(x):
        pyro.sample("pair", prior())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("x", likelihood(z), obs=x)

    given, value = poutine.condition(shared, data={"pair": torch.ones(2).double()}), data(2)
    torch.testing.assert_close(log_weights(given, guide, value, num_samples=1)[0], truth(value), rtol=0, atol=ROUNDING)

    def copied(x):
        pyro.sample("x", dist.Normal(torch.zeros(2, 3).double(), 1.0).to_event(2), obs=2 * x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("y", likelihood(z), obs=x)

    with pytest.raises(ValueError, match='"x" of the model is outside'):
        log_weights(copied, guide, value, num_samples=1)


def test_models_that_squeeze_rows_away():
    def squeezing(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("x", dist.Normal((z @ W)[..., None].squeeze(), SCALE).to_event(1), obs=x)

    assert_exact(squeezing, guide, data(11))


def test_masks_inside_of_distributions_hide_what_others_hide():
    mask = torch.tensor([True, True, False]).repeat(4)

    def masked(x, mask, inside, observe):
        def hidden(p):
            return p.mask(mask) if inside else p

        with pyro.plate("data", len(x)), poutine.mask(mask=mask | inside):
            z = pyro.sample("z", hidden(prior(len(x)) if observe else posterior(x)))
            if observe:
                pyro.sample("x", hidden(likelihood(z)), obs=x)

    x, found = data(), []
    for inside in (True, False):
        pair = partial(masked, inside=inside, observe=True), partial(masked, inside=inside, observe=False)
        found.append(log_weights(*pair, x, mask, num_samples=2))
        with pytest.raises(ValueError, match='"z" is masked'):
            diagnostics.collapse(*pair, x, mask, progress=False)
        by_grid = log_marginal(pair[0], None, x, mask, method=estimators.Quadrature(2000), progress=False)
        torch.testing.assert_close(by_grid.value, torch.where(mask, truth(x), 0.0), rtol=0, atol=ROUNDING)
    for log_w in found:
        torch.testing.assert_close(log_w, torch.where(mask, truth(x), 0.0).expand(2, -1), rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:samples are drawn one by one")
@pytest.mark.parametrize("alone", [False, True])
def test_a_flow_of_zukos_as_the_prior_can_be_annealed_from(alone):
    validation = torch.distributions.Distribution._validate_args
    import zuko  # which switches validation off

    torch.distributions.Distribution.set_default_validate_args(validation)
    flow = zuko.flows.NSF(2, transforms=1, hidden_features=(8,)).double()

    def flowing(x, alone=False):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ZukoToPyro(flow()))
            pyro.sample("x", likelihood(z.reshape(len(x), 2) if alone else z), obs=x)

    x = data(3)
    right = log_marginal(flowing, None, x, method=estimators.Quadrature(10_000), progress=False)
    by_weights = log_marginal(flowing, guide, x, num_samples=20_000, progress=False)
    assert ((by_weights.value - right.value).abs() < 5 * by_weights.standard_error + right.standard_error).all()
    method = estimators.AnnealedImportanceSampling(16, num_temperatures=10)
    annealed = log_marginal(partial(flowing, alone=alone), None, x, method=method, progress=False)
    assert ((annealed.value - right.value).abs() < 5 * annealed.standard_error + right.standard_error).all()


def sized(x, size):
    """A plate whose size is an argument, which stays the same when the data are cut."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(x.new_zeros(size, 2), 1.0).to_event(1))
        pyro.sample("x", likelihood(z), obs=x)


def sized_guide(x, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(x.new_zeros(size, 2), 1.0).to_event(1))


def test_a_number_of_rows_that_is_an_argument_is_named_where_the_data_are_cut():
    x = data(60)
    log_marginal(sized, sized_guide, x, len(x), num_samples=10, progress=False)
    with pytest.raises(ValueError, match=r"on some of them.*\(2, 3\).*size 60\).*from the data, len\(x\)"):
        diagnostics.collapse(sized, sized_guide, x, len(x), progress=False)


def by_rows(x):
    means, scales = (pyro.param(name, torch.ones(len(x), 2).double()) for name in ("means", "scales"))
    with pyro.plate("data", len(means)):
        pyro.sample("z", dist.Normal(means, scales).to_event(1))


@pytest.mark.parametrize("guide", [lambda: by_rows, lambda: AutoNormal(model)], ids=["parameters", "AutoNormal"])
@pytest.mark.parametrize(
    "diagnostic", ["collapse", "gaps", "latent_map", "traversals", "posterior_check", "calibration"]
)
def test_diagnostics_that_take_parts_of_the_data_refuse_guides_of_all_rows(guide, diagnostic):
    x, guide = data(60), guide()
    guide(x)  # which makes the parameters, as training does
    assert log_marginal(model, guide, x, num_samples=10, progress=False).value.shape == (len(x),)
    with pytest.raises(ValueError, match="parameters belong to rows.*log_marginal"):
        getattr(diagnostics, diagnostic)(model, guide, x)


def grey(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        logits = z @ pyro.param("weight", torch.ones(2, 3))
        pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)


def grey_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_distributions_without_validation_train_with_a_warning_and_are_not_scored(compile):
    x = torch.rand(8, 3)
    with pytest.warns(UserWarning, match='"x" are outside the support.*validate_args=False'):
        history = fit(grey, grey_guide, x, epochs=2, batch_size=8, compile=compile, progress=False)
    assert all(map(math.isfinite, history["loss"]))
    for score in (partial(log_marginal, progress=False), partial(log_weights, num_samples=3), impute):
        with pytest.raises(ValueError, match='"x" is outside the support of Bernoulli'):
            score(grey, grey_guide, x)


def test_what_cannot_be_is_refused_by_name():
    x = data()
    with pytest.raises(ValueError, match="Were model and guide swapped"):
        fit(guide, model, x, progress=False)

    def deterministic(x):
        with pyro.plate("data", len(x)):
            pyro.deterministic("y", pyro.sample("z", prior(len(x))) @ W, event_dim=1)

    with pytest.raises(ValueError, match="the model observes nothing"):
        log_marginal(deterministic, guide, x, progress=False)

    class Unnormalised(dist.Poisson):
        def log_prob(self, value):
            return super().log_prob(value) + 5

    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(len(x)))
            pyro.sample("x", Unnormalised(z.exp().sum(-1)), obs=torch.ones(len(x)).double())

    with pytest.raises(ValueError, match='"x", Unnormalised, is not normalised'):
        log_marginal(counts, guide, x, progress=False)

    def improper(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
            pyro.sample("x", likelihood(z), obs=x)

    bounds.ELBO().loss(improper, guide, x)
    with pytest.raises(ValueError, match='"z" of the model is an ImproperUniform'):
        log_marginal(improper, guide, x, progress=False)


@pytest.mark.parametrize(("size", "warns"), [(1e5, True), (10.0, False)])
def test_counts_that_lose_nats_in_single_precision(size, warns, recwarn):
    rate = torch.full((100,), size)

    def counting(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    def apart(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    log_weights(counting, apart, torch.poisson(rate.expand(4, -1)), num_samples=1)
    assert any("nats a datum in torch.float32" in str(w.message) for w in recwarn) == warns


def test_rows_that_say_nothing_of_a_network_do_not_hide_that_it_is_wrong():
    # The first documents are empty, and so have the same probability whatever the network makes of their latents.
    pyro.set_rng_seed(2)
    network = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Softmax(dim=1)).double()

    def documents(x):
        pyro.module("network", network)
        with pyro.plate("docs", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Multinomial(probs=network(z), total_count=50, validate_args=False), obs=x)

    def apart(x):
        with pyro.plate("docs", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).double(), 1.0).to_event(1))

    x = torch.poisson(torch.full((18, 5), 2.0)).double()
    x[:9] = 0
    z = torch.randn(20_000, 1, 2).double()
    log_p = dist.Multinomial(probs=network[0](z).softmax(-1), total_count=50, validate_args=False).log_prob(x)
    right, spread = log_p.logsumexp(0) - math.log(len(z)), (log_p - log_p.amax(0)).exp()
    error = spread.std(0) / spread.mean(0) / math.sqrt(len(z))
    for memory in (64e6, 2e4):
        with pytest.warns(UserWarning, match="drawn one by one"):
            estimate = log_marginal(documents, apart, x, num_samples=300, max_memory=memory, progress=False)
        errors = (estimate.standard_error.square() + error.square()).sqrt().clamp(min=ROUNDING)
        assert ((estimate.value - right).abs() < 5 * errors).all()


def test_batch_norm_of_as_many_features_as_rows_that_are_looked_at():
    for features in (2, 3, 7, 8):
        network = torch.nn.Sequential(
            torch.nn.Linear(2, features), torch.nn.BatchNorm1d(features), torch.nn.Linear(features, 3)
        )
        network.double().eval()

        def normed(x, network=network):
            pyro.module("network", network, update_module_params=False)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior(len(x)))
                pyro.sample("x", dist.Normal(network(z), SCALE).to_event(1), obs=x)

        pyro.clear_param_store()
        with pytest.warns(UserWarning, match="drawn one by one"):
            estimate = log_marginal(normed, guide, data(9), num_samples=5, progress=False)
        assert estimate.value.isfinite().all()


def test_an_elbo_that_has_a_gradient_alone_trains_as_in_svi():
    def shifted(x):
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.MultivariateNormal(posterior(x).loc + pyro.param("shift", torch.ones(2).double()), COVARIANCE)
            )

    x, found = data(), []
    elbo = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    for way in ("fit", "svi"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if way == "fit":
            loader = torch.utils.data.DataLoader(x, batch_size=12)  # which draws a seed at each pass
            fit(
                model,
                shifted,
                loader,
                loss=elbo,
                epochs=3,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
                progress=False,
            )
        else:
            svi = pyro.infer.SVI(model, shifted, pyro.optim.SGD({"lr": 0.1 / 12}), elbo)
            next(iter(loader))
            for _ in range(3):
                svi.step(next(iter(loader)))
        found.append(pyro.param("shift").detach().clone())
    assert (found[1] - 1).norm() > 0
    torch.testing.assert_close(*found, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match="TraceTailAdaptive_ELBO has a gradient only"):
        fit(model, shifted, x, loss=elbo, validation=x, epochs=1, progress=False)


def test_keywords_and_arrays_that_a_model_does_not_take_so():
    def keyword(*, table):
        model(table)

    with pytest.raises(TypeError, match=r"takes 0 positional arguments.*Arguments\(\*\*batch\)"):
        log_marginal(keyword, keyword, {"table": data()}, progress=False)

    network = torch.nn.Linear(3, 2)
    for given, advice in (
        ({"x": data()}, r"not dict.*Arguments\(\*\*batch\)"),
        ([[0.0, 1.0, 0.0]], r"not _EntryList.*torch.tensor\(x\)"),
        (np.array([[0.0, 1.0, 0.0]], object), "Arrays of objects"),
        (torch.ones(4, 3, dtype=torch.int64), r"argument 1 has dtype int64.*x.float\(\)"),
    ):
        with pytest.raises(TypeError, match=advice):
            log_marginal(model, lambda x: network(x), given, progress=False)

    def of_array(x):
        model(torch.from_numpy(x))

    with pytest.raises(TypeError, match="expected np.ndarray.*as tensors"):
        log_marginal(of_array, of_array, data().numpy(), progress=False)
