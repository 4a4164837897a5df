"""Priors against closed forms, scipy, scikit-learn, and sums computed term by term."""

import math
import warnings
import weakref
from functools import partial

import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from cases import SMALL, cases, inputs
from helpers import FAILURE_RATE
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from spaces import Space, agreement, line
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyrovae
from pyrovae import VAE, encoders, fit, likelihoods, log_weights, priors
from pyrovae.distributions import NormalMixture, import_zuko

EPS = torch.finfo(torch.float64).eps
AFFINE = partial(pyrovae.nn.MLP, hidden=())


# ------------------------------------------------------------------------------------------------- mixtures of normals

MIXTURES = [priors.GaussianMixture, priors.FullRankGaussianMixture, priors.TiedGaussianMixture]


def moved(prior: nn.Module, by: float = 0.5) -> nn.Module:
    """Adds noise to the parameters, because initial ones are often equal."""
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(by * torch.randn_like(p))
    return prior


def factors_of(p: NormalMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the log weights, means and Cholesky factors of a mixture, in double precision."""
    scale_tril = p.scale_tril if p.scale is None else torch.diag_embed(p.scale)
    loc = p.loc.double()
    return p.logits.double(), loc, scale_tril.double().expand(*loc.shape, loc.shape[-1])


def torch_mixture(p: NormalMixture) -> torch.distributions.MixtureSameFamily:
    logits, loc, scale_tril = factors_of(p)
    components = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)


def rounding_of(p: NormalMixture, z: Tensor, eps: float) -> Tensor:
    """Returns a bound of the rounding error of the log-density, which is a difference of squares.

    Each of some d^2 + 4 d sums and products has an error of eps / 2 times the squares, (|z| + |m|)^T |S^-1|
    (|z| + |m|), which are smaller because z is centred; an inverse has the same error times its condition.
    """
    _, loc, scale_tril = factors_of(p)
    d = z.shape[-1]
    inverse = torch.linalg.inv(scale_tril)
    condition = (inverse.abs() @ scale_tril.abs()).sum(-1).amax()
    reach = z.double().abs().unsqueeze(-2) + loc.abs()
    squares = (inverse.abs() @ reach.unsqueeze(-1)).square().sum((-2, -1)).amax(-1)
    return eps / 2 * (d * d + 4 * d) * (1 + condition * squares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_components", [1, 7])
@pytest.mark.parametrize("cls", MIXTURES, ids=lambda cls: cls.__name__)
def test_mixtures_equal_torchs(cls, num_components, dtype):
    p = moved(cls(5, num_components)).to(dtype)()
    near, far = p.sample((20, 10)), 30 * torch.randn(20, 10, 5, dtype=dtype)
    for z in (near, far):
        error = (p.log_prob(z).double() - torch_mixture(p).log_prob(z.double())).abs()
        assert (error <= rounding_of(p, z, torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("cls", MIXTURES, ids=lambda cls: cls.__name__)
def test_narrow_components_far_apart_are_scored_as_well_as_single_precision_holds_them(cls):
    prior = moved(cls(3, 4))
    p = prior()
    with torch.no_grad():  # in units of their scales, the components are a million apart
        p.loc.mul_(30)
        (p.scale if p.scale is not None else p.scale_tril).mul_(1e-4)
        z = p.sample((200,))
        value, truth = p.log_prob(z), torch_mixture(p).log_prob(z.double())
    bound = rounding_of(p, z, EPS) + torch.finfo(torch.float32).eps * truth.abs()
    assert ((value.double() - truth).abs() <= bound).all()
    assert bound.max() < 0.1  # the error of single precision would be thousands


@pytest.mark.parametrize("cls", MIXTURES, ids=lambda cls: cls.__name__)
def test_mixtures_have_the_gradients_of_torchs(cls):
    prior = moved(cls(3, 4)).double()
    p = prior()
    z = p.sample((50,)).requires_grad_()
    weight = torch.randn(50, dtype=torch.float64)
    wanted = [z, *prior.parameters()]
    ours = torch.autograd.grad((p.log_prob(z) * weight).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((torch_mixture(p).log_prob(z) * weight).sum(), wanted)
    # Sums over 50 draws of derivatives of up to some hundreds, each with the rounding of a few hundred operations.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=50 * 1e5 * EPS)


@pytest.mark.parametrize("cls", MIXTURES, ids=lambda cls: cls.__name__)
def test_mixtures_state_their_mean_and_variance(cls):
    p = moved(cls(3, 4)).double()()
    truth = torch_mixture(p)
    torch.testing.assert_close(p.mean, truth.mean, rtol=0, atol=1e3 * EPS)
    # torch has no variance of mixtures of full-rank normals: it is computed from the components.
    logits, loc, scale_tril = factors_of(p)
    second = (logits.exp()[:, None] * (scale_tril.square().sum(-1) + loc.square())).sum(0)
    torch.testing.assert_close(p.variance, second - truth.mean.square(), rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("given", [{}, {"scale": torch.ones(2, 1), "scale_tril": torch.ones(2, 1, 1)}])
def test_a_mixture_takes_its_scales_or_its_cholesky_factors(given):
    with pytest.raises(ValueError, match="either scale or scale_tril"):
        NormalMixture(torch.zeros(2), torch.zeros(2, 1), **given)


@pytest.mark.parametrize("cls", MIXTURES, ids=lambda cls: cls.__name__)
def test_a_mixture_for_each_context_is_that_of_each_context(cls):
    prior = moved(cls(3, 4, SMALL, 2), 0.2).double()
    context = torch.randn(6, 2, dtype=torch.float64)
    p, z = prior(context), torch.randn(7, 6, 3, dtype=torch.float64)
    together = p.log_prob(z)
    for i in range(6):
        alone = prior(context[i])
        error = (together[:, i] - torch_mixture(alone).log_prob(z[:, i])).abs()
        assert (error <= 2 * rounding_of(alone, z[:, i], EPS)).all()


class Allocations(TorchDispatchMode):
    """Tracks the memory of all tensors that are created inside: now and at the peak."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.live.keys() | known:
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def _remove(self, key: int, size: int) -> None:
        del self.live[key]
        self.now -= size


def test_the_measure_of_memory_measures():
    x = torch.ones(1000, 250, requires_grad=True)  # a megabyte
    with Allocations() as memory:
        y = x.exp()  # saved for the backward pass
        del y
        assert memory.now == 0
        y = x.exp().exp().sum()
        assert memory.now == pytest.approx(2e6, abs=100)
        y.backward()
    assert memory.peak == pytest.approx(3e6, rel=0.01)  # both exponentials and one gradient
    assert memory.largest == 1e6


@pytest.mark.parametrize("cls", MIXTURES, ids=lambda cls: cls.__name__)
def test_mixtures_hold_no_tensor_over_particles_data_components_and_dimensions(cls):
    particles, batch, components, d = 50, 128, 500, 40
    prior = cls(d, components)
    z = torch.randn(particles, batch, d, requires_grad=True)
    with Allocations() as memory:
        prior().expand((particles, batch)).log_prob(z).sum().backward()
    assert z.grad is not None
    assert prior.params.grad is not None
    assert memory.largest < 4 * particles * batch * components * d / 10
    assert memory.peak < 200e6


def test_means_of_components_start_apart():
    loc = priors.GaussianMixture(3, 10)().loc
    assert torch.pdist(loc).min() > 0.1


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(
    ("prior", "truth"),
    [
        (priors.DiagonalNormal(3), lambda p: scipy.stats.norm(p.base_dist.loc, p.base_dist.scale)),
        (priors.Laplace(3), lambda p: scipy.stats.laplace(p.base_dist.loc, p.base_dist.scale)),
        (priors.StudentT(3, df=2.5), lambda p: scipy.stats.t(p.base_dist.df, p.base_dist.loc, p.base_dist.scale)),
    ],
    ids=["DiagonalNormal", "Laplace", "StudentT"],
)
def test_independent_priors_equal_scipys(prior, truth):
    prior = moved(prior.double())
    with torch.no_grad():
        p = prior()
        z = 3 * torch.randn(20, 3, dtype=torch.float64)
        expected = torch.from_numpy(truth(p).logpdf(z.numpy())).sum(-1)
        torch.testing.assert_close(p.log_prob(z), expected, rtol=0, atol=1e3 * EPS)


def test_priors_start_where_they_say():
    assert torch.equal(priors.DiagonalNormal(3)().mean, torch.zeros(3))
    # softplus(log(e - 1)) is 1, plus the floor of 1e-6 and float32 rounding.
    torch.testing.assert_close(priors.DiagonalNormal(3)().stddev, torch.ones(3), rtol=0, atol=2e-6)
    torch.testing.assert_close(priors.StudentT(3, df=7.0)().base_dist.df, torch.full((3,), 7.0), rtol=0, atol=2e-5)
    torch.testing.assert_close(
        priors.Dirichlet(3, concentration=0.2)().concentration, torch.full((3,), 0.2), rtol=0, atol=1e-6
    )
    assert torch.equal(priors.OneHotCategorical(3)().log_prob(torch.eye(3)), torch.full((3,), 1 / 3).log())


def test_dirichlet_equals_scipys():
    prior = moved(priors.Dirichlet(4, concentration=0.7).double())
    with torch.no_grad():
        p = prior()
        z = p.sample((20,))
        truth = scipy.stats.dirichlet(p.concentration.numpy())
        expected = torch.tensor([truth.logpdf(row.numpy()) for row in z])
    # Scipy computes the last number as one minus the others, which loses digits of a small one.
    error = (p.log_prob(z) - expected).abs()
    assert (error <= 1e3 * EPS * (1 + 1 / z.amin(-1))).all()


@pytest.mark.parametrize("dim", [2, 3, 5, 50])
def test_hyperspherical_uniform_is_one_over_the_area(dim):
    z = nn.functional.normalize(torch.randn(4, dim, dtype=torch.float64), dim=-1)
    area = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    log_prob = priors.HypersphericalUniform(dim).double()().log_prob(z)
    torch.testing.assert_close(log_prob, torch.full((4,), -math.log(area), dtype=torch.float64), rtol=0, atol=1e3 * EPS)


@torch.no_grad()
def test_discrete_priors_are_products_of_their_probabilities():
    classes = moved(priors.Categorical(3, num_classes=4).double())
    z = torch.randint(4, (10, 3))
    logits = classes.params.unflatten(0, (3, 4)).log_softmax(-1)
    expected = sum(logits[i, z[:, i]] for i in range(3))
    torch.testing.assert_close(classes().log_prob(z), expected, rtol=0, atol=100 * EPS)
    one_hot = moved(priors.OneHotCategorical(12, num_classes=4).double())
    logits = one_hot.params.unflatten(0, (3, 4)).log_softmax(-1)
    expected = sum(logits[i, z[:, i]] for i in range(3))
    vectors = nn.functional.one_hot(z, 4).double().flatten(-2)
    torch.testing.assert_close(one_hot().log_prob(vectors), expected, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("case", cases("prior", context=True), ids=lambda case: case.name)
@torch.no_grad()
def test_a_conditional_prior_gives_each_datum_its_own_distribution(case):
    prior = case.build().double().eval()
    (context,) = inputs(case, prior, 5)
    p = prior(context)
    z = p.sample((4,))
    together = p.log_prob(z)
    alone = torch.stack([prior(context[i : i + 1]).log_prob(z[:, i : i + 1])[:, 0] for i in range(5)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    swapped = prior(context.flip(0)).log_prob(z)
    assert ((swapped - together).abs() > 1e-6).any(0).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("case", cases("prior", context=True), ids=lambda case: case.name)
def test_a_conditional_prior_asks_for_its_context(case):
    with pytest.raises(ValueError, match="context"):
        case.build()()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: priors.StudentT(2, df=0.0), "df must be positive and finite, got 0"),
        (lambda: priors.GaussianMixture(2, 0), "num_components must be at least 1, got 0"),
        (lambda: priors.TiedGaussianMixture(2, 0), "num_components must be at least 1, got 0"),
        (lambda: priors.FullRankGaussianMixture(2, 0), "num_components must be at least 1, got 0"),
        (lambda: priors.HypersphericalUniform(1), "latent_dim must be at least 2 for latents on a sphere, got 1"),
        (lambda: priors.LogisticNormal(1), "latent_dim must be at least 2 for latents on a simplex, got 1"),
        (lambda: priors.Dirichlet(1), "latent_dim must be at least 2 for latents on a simplex, got 1"),
        (lambda: priors.Dirichlet(2, concentration=-1.0), "concentration must be positive and finite, got -1"),
        (lambda: priors.Categorical(2, 1), "num_classes must be at least 2, got 1"),
        (lambda: priors.OneHotCategorical(4, 3), "num_classes.*4.*3|num_classes.*3.*4"),
        (lambda: priors.RelaxedOneHotCategorical(4, temperature=0.0), "temperature must be positive and finite, got 0"),
        (lambda: priors.ResampledPrior(2, tries=0), "tries must be at least 1, got 0"),
        (lambda: priors.ResampledPrior(2, num_samples=0), "num_samples must be at least 1, got 0"),
        (lambda: priors.GaussianProcess(5, 2), "num_times must divide latent_dim=5, got 2"),
        (lambda: priors.GaussianProcess(4, 2, length_scale=0.0), "length_scale must be positive and finite, got 0"),
        (lambda: priors.GaussianProcess(4, 2, noise=1.0), "noise must be between 0 and 1, got 1"),
        (lambda: priors.GaussianProcess(4, 2, context_dim=3), "context_dim must be num_times=2, or 0 for none, got 3"),
        (lambda: priors.FlowPrior(3, lambda d, c: import_zuko().flows.MAF(d + 1, c)), r"flow must have .*\(4,\)"),
        (
            lambda: priors.FlowPrior(3, lambda d, c: import_zuko().flows.MAF(d, 2)),
            "flow takes no context of width 0",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


# ---------------------------------------------------------------------------------------------------- Gaussian process

KERNELS = {
    "squared_exponential": (priors.squared_exponential, lambda length: kernels.RBF(length)),
    "matern_32": (priors.matern_32, lambda length: kernels.Matern(length, nu=1.5)),
    "matern_52": (priors.matern_52, lambda length: kernels.Matern(length, nu=2.5)),
    # scikit-learn's is (1 + r^2 / (2 alpha))^-alpha.
    "cauchy": (priors.cauchy, lambda length: kernels.RationalQuadratic(length / math.sqrt(2), alpha=1.0)),
}


@pytest.mark.parametrize("context", [False, True], ids=["steps", "times"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_gaussian_process_equals_scikit_learns(name, context):
    kernel, theirs = KERNELS[name]
    times, processes, noise = 6, 2, 0.01
    width = times if context else 0
    prior = priors.GaussianProcess(times * processes, times, 1.5, kernel, noise, context_dim=width).double()
    with torch.no_grad():
        prior.params.copy_(torch.tensor([0.8, 2.5], dtype=torch.float64).log())
        t = 5 * torch.rand(3, times, dtype=torch.float64) if context else torch.arange(6.0).double().expand(3, -1)
        p = prior(t if context else None)
        z = torch.randn(3, times * processes, dtype=torch.float64)
        values = p.log_prob(z)
    for i in range(3):
        expected = 0.0
        for length, path in zip((0.8, 2.5), z[i].split(times), strict=True):
            covariance = kernels.ConstantKernel(1 - noise) * theirs(length) + kernels.WhiteKernel(noise)
            process = GaussianProcessRegressor(covariance, alpha=0.0, optimizer=None)
            expected += process.fit(t[i].numpy()[:, None], path.numpy()).log_marginal_likelihood_value_
        # The condition of a covariance with a hundredth of noise is below 6 / 0.01; the misfit is below 100 times that.
        assert values[i].item() == pytest.approx(expected, abs=1e6 * EPS * 100)


def test_the_gaussian_process_has_unit_variance_and_learns_its_length_scales():
    prior = priors.GaussianProcess(8, 4, length_scale=2.0)
    p = prior()
    torch.testing.assert_close(p.variance, torch.ones(8), rtol=0, atol=1e-5)
    z = torch.cat([torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0])])
    p.log_prob(z).backward()
    assert prior.params.grad[0] > 0  # a constant path prefers a longer length scale
    assert prior.params.grad[1] < 0  # a path that jumps prefers a shorter one


def test_the_gaussian_process_refuses_other_numbers_of_times():
    with pytest.raises(ValueError, match=r"context must hold 4 times a datum, .* got \(3, 5\)"):
        priors.GaussianProcess(8, 4, context_dim=4)(torch.rand(3, 5))


# ----------------------------------------------------------------------------------------------------------- VampPrior

POSTERIORS = list({case.cls: case for case in reversed(cases("encoder", context=False)) if case.density}.values())


@pytest.mark.parametrize("case", POSTERIORS, ids=lambda case: case.name)
@torch.no_grad()
def test_vamp_prior_is_the_mixture_of_the_encoder_at_its_pseudo_inputs(case):
    encoder = case.build()
    prior = moved(priors.VampPrior(encoder, 4).double().eval())
    p = prior()
    assert repr(prior.support) == repr(encoder.support)
    z = p.sample((20, 3))
    assert z.shape == (20, 3, encoder.latent_dim)
    assert prior.support.check(z).all()
    each = torch.stack([encoder(u).log_prob(z) for u in prior.pseudo_inputs()])
    # Rounding of log-densities of at most some hundreds. NormalMixture's is larger: see above.
    torch.testing.assert_close(p.log_prob(z), each.logsumexp(0) - math.log(4), rtol=1e-10, atol=1e-10)


def test_vamp_prior_with_a_context_encodes_each_row_of_it():
    encoder = encoders.DiagonalNormal(4, 2, SMALL, context_dim=3).double()
    prior = priors.VampPrior(encoder, 5).double()
    context, z = torch.randn(6, 3, dtype=torch.float64), torch.randn(7, 6, 2, dtype=torch.float64)
    each = torch.stack([encoder(u.expand(6, 4), context).log_prob(z) for u in prior.pseudo_inputs()])
    torch.testing.assert_close(prior(context).log_prob(z), each.logsumexp(0) - math.log(5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_particles", [1, 7])
def test_vamp_prior_encodes_its_pseudo_inputs_once(num_particles):
    encoder = encoders.DiagonalNormal(4, 2, SMALL)
    vae = VAE(priors.VampPrior(encoder, 5), likelihoods.Bernoulli(2, 4, SMALL), encoder)
    x = torch.ones(3, 4)
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    rows = []
    handle = encoder.network.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[:-1].numel()))
    elbo.differentiable_loss(vae.model, vae.guide, x).backward()
    assert sorted(rows) == [3, 5]
    rows.clear()
    with torch.no_grad():
        log_weights(vae.model, vae.guide, x, num_samples=num_particles)
    # The runs that count, and those of checks: of the structure, of vectorised and single draws, and of whether data
    # depend on each other, for which the model runs twice.
    assert (rows.count(3), rows.count(5), len(rows)) == (5, 6, 11)
    handle.remove()


def test_vamp_prior_starts_from_data():
    encoder = encoders.DiagonalNormal((1, 2, 3), 2, SMALL)
    x = 0.01 + 0.98 * torch.rand(8, 1, 2, 3)
    # A logit of at most 4.6 has a rounding of a few eps, and so has its sigmoid.
    close = partial(torch.testing.assert_close, rtol=0, atol=20 * torch.finfo(torch.float32).eps)
    close(priors.VampPrior(encoder, 5, data=x).pseudo_inputs(), x[:5])
    binary = (x < 0.5).float()
    close(priors.VampPrior(encoder, 8, data=binary).pseudo_inputs(), binary.clamp(0.01, 0.99))
    wide = 10 * x - 3
    torch.testing.assert_close(
        priors.VampPrior(encoder, 8, data=wide, bounds=(-3.0, 7.0)).pseudo_inputs(), wide, rtol=0, atol=1e-4
    )
    assert torch.equal(priors.VampPrior(encoder, 8, data=wide, bounds=None).pseudo_inputs(), wide)


def test_pseudo_inputs_stay_in_their_bounds_and_are_no_view_of_the_data():
    encoder = encoders.DiagonalNormal(4, 2, SMALL)
    prior = priors.VampPrior(encoder, 5, bounds=(-2.0, 3.0))
    with torch.no_grad():
        prior.raw_inputs.mul_(1e3)
    u = prior.pseudo_inputs()
    assert u.min() >= -2
    assert u.max() <= 3
    data = torch.rand(5, 4)
    before = data.clone()
    unbounded = priors.VampPrior(encoder, 5, data=data, bounds=None)
    with torch.no_grad():
        unbounded.raw_inputs.add_(1.0)
    assert torch.equal(data, before)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_components": 0}, "num_components must be at least 1, got 0"),
        (
            {"num_components": 5, "data": torch.rand(4, 4)},
            r"data must have shape \(at least 5, \*\(4,\)\), got \(4, 4\)",
        ),
        ({"num_components": 5, "data": torch.rand(5, 3)}, r"data must have shape .* got \(5, 3\)"),
        ({"num_components": 5, "data": 2 + torch.rand(5, 4)}, r"data ranges from 2.* outside bounds=\(0.0, 1.0\)"),
        ({"num_components": 5, "bounds": (1.0, 1.0)}, "bounds must be a pair \\(low, high\\)"),
    ],
)
def test_what_makes_no_vamp_prior_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        priors.VampPrior(encoders.DiagonalNormal(4, 2), **arguments)


def test_a_mixture_of_points_is_refused():
    with pytest.raises(ValueError, match="Delta"):
        priors.VampPrior(encoders.Delta(4, 2), 5)


def test_a_vae_with_a_vamp_prior_is_saved_and_loaded_whole(tmp_path):
    def build() -> VAE:
        encoder = encoders.DiagonalNormal(4, 2, SMALL)
        return VAE(priors.VampPrior(encoder, 5), likelihoods.Bernoulli(2, 4, SMALL), encoder)

    saved, loaded = build(), build()
    pyrovae.save(saved, tmp_path / "vae.safetensors")
    pyrovae.load(loaded, tmp_path / "vae.safetensors")
    assert loaded.prior.encoder is loaded.encoder
    z = torch.randn(6, 2)
    assert torch.equal(saved.prior().log_prob(z), loaded.prior().log_prob(z))


def test_the_encoder_learns_through_a_vamp_prior_too():
    encoder = encoders.DiagonalNormal(4, 2, SMALL)
    prior = priors.VampPrior(encoder, 5)
    prior().log_prob(torch.randn(20, 2)).sum().backward()
    assert encoder.network.layers[-1].bias.grad.ne(0).all()
    assert prior.raw_inputs.grad.ne(0).any()


# ------------------------------------------------------------------------------------------------------- ExemplarPrior


def exemplar_prior(count: int = 12, **arguments) -> priors.ExemplarPrior:
    data = torch.rand(count, 4)
    return priors.ExemplarPrior(encoders.DiagonalNormal(4, 2, SMALL), data, **arguments).double()


def terms_of(prior: priors.ExemplarPrior, z: Tensor) -> Tensor:
    """Returns the log-densities of z by each exemplar in turn, (exemplars, *leading)."""
    means = prior.encoder(prior.data.double()).mean
    return torch.stack([dist.Normal(m, prior.params.exp()).to_event(1).log_prob(z) for m in means])


@torch.no_grad()
def test_exemplars_in_evaluation_mode_are_all_of_them():
    prior = exemplar_prior(scale=0.3).eval()
    z = torch.randn(7, 5, 2, dtype=torch.float64)
    expected = terms_of(prior, z).logsumexp(0) - math.log(12)
    torch.testing.assert_close(prior().log_prob(z), expected, rtol=0, atol=1e5 * EPS)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@torch.no_grad()
def test_exemplars_leave_out_the_datum_itself(training):
    prior = exemplar_prior(num_neighbors=11).train(training)
    numbers = torch.tensor([3, 0, 11, 3, 7])
    z = torch.randn(7, 5, 2, dtype=torch.float64)
    terms = terms_of(prior, z)
    terms[numbers, :, torch.arange(5)] = -math.inf
    expected = terms.logsumexp(0) - math.log(11)
    torch.testing.assert_close(prior(numbers).log_prob(z), expected, rtol=0, atol=1e5 * EPS)


@torch.no_grad()
def test_exemplars_with_all_neighbours_are_exact_and_with_fewer_bounded():
    z = torch.randn(1, 1, 2, dtype=torch.float64)  # a single row: others would add their neighbours
    prior = exemplar_prior(30, num_neighbors=5, scale=0.3)
    terms = terms_of(prior, z)
    nearest = terms.topk(5, dim=0).values.logsumexp(0) - math.log(30)
    few = prior.train()().log_prob(z)
    torch.testing.assert_close(few, nearest, rtol=0, atol=1e5 * EPS)
    assert (few < terms.logsumexp(0) - math.log(30)).all()
    prior.num_neighbors = 30
    torch.testing.assert_close(prior().log_prob(z), terms.logsumexp(0) - math.log(30), rtol=0, atol=1e5 * EPS)
    many = 0.3 * torch.randn(6, 5, 2, dtype=torch.float64)
    prior.num_neighbors = 2
    exact = terms_of(prior, many).logsumexp(0) - math.log(30)
    assert (prior().log_prob(many) <= exact + 1e5 * EPS).all()


@torch.no_grad()
def test_samples_of_exemplars_never_come_from_the_one_left_out():
    prior = exemplar_prior(3, scale=1e-6).eval()
    numbers = torch.tensor([0, 1, 2])
    means = prior.encoder(prior.data.double()).mean
    z = prior(numbers).sample((200,))
    nearest = torch.cdist(z, means.expand(200, 3, 2)).argmin(-1)
    assert [set(column.tolist()) for column in nearest.T] == [{1, 2}, {0, 2}, {0, 1}]


def test_gradients_reach_the_encoder_through_the_neighbours():
    prior = exemplar_prior(num_neighbors=3).train()
    prior(torch.arange(5)).log_prob(torch.randn(5, 2, dtype=torch.float64)).sum().backward()
    assert prior.encoder.network.layers[-1].bias.grad[:2].ne(0).all()  # the biases of the mean
    assert prior.params.grad.ne(0).all()


@torch.no_grad()
def test_exemplars_follow_the_encoder():
    prior = exemplar_prior().eval()
    z = torch.randn(7, 2, dtype=torch.float64)
    before = prior().log_prob(z)
    moved(prior.encoder)
    after = prior().log_prob(z)
    assert (after - before).abs().min() > 1e-6
    torch.testing.assert_close(after, terms_of(prior, z).logsumexp(0) - math.log(12), rtol=0, atol=1e5 * EPS)


def test_a_vae_with_exemplars_trains_on_its_numbered_data():
    encoder = encoders.DiagonalNormal(4, 2, SMALL)
    x = (torch.rand(40, 4) < 0.5).float()
    vae = VAE(priors.ExemplarPrior(encoder, x, num_neighbors=4), likelihoods.Bernoulli(2, 4, SMALL), encoder)
    before = vae.prior.params.item()
    with pytest.warns(UserWarning, match="leaves no exemplar out"):
        fit(vae.model, vae.guide, x, epochs=1, compile=False, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(vae.model, vae.guide, (x, torch.arange(40)), epochs=3, batch_size=10, compile=False, progress=False)
    assert vae.prior.params.item() != before
    estimate = pyrovae.log_marginal(vae.model, vae.guide, x[:5], num_samples=50, progress=False)
    assert estimate.value.isfinite().all()


@torch.no_grad()
def test_saved_exemplars_are_their_means_and_need_the_data_to_train(tmp_path):
    encoder, data = encoders.DiagonalNormal(4, 2, SMALL), torch.rand(12, 4)
    vae = VAE(priors.ExemplarPrior(encoder, data, num_neighbors=3), likelihoods.Bernoulli(2, 4, SMALL), encoder).eval()
    z = torch.randn(7, 2)
    before = vae.prior().log_prob(z)
    pyrovae.save(vae, tmp_path / "vae.safetensors")
    again = pyrovae.load(tmp_path / "vae.safetensors").eval()
    assert torch.equal(again.prior().log_prob(z), before)
    with pytest.raises(ValueError, match="12 exemplars without their data, and cannot train: set its attribute data"):
        again.prior.train()()
    again.prior.data = data[:7]
    with pytest.raises(ValueError, match="has 7 rows, and it has 12 means"):
        again.prior(torch.arange(7))
    again.prior.data = data
    assert again.prior(torch.arange(7)).log_prob(z).isfinite().all()
    with pytest.raises(TypeError, match="data must be a tensor of exemplars, or their number, got a ndarray"):
        priors.ExemplarPrior(encoder, data.numpy())
    without = priors.ExemplarPrior(encoder, 12).eval()
    with pytest.raises(ValueError, match="no means were loaded"):
        without()


@torch.no_grad()
def test_exemplars_are_summed_some_rows_at_a_time(monkeypatch):
    p = exemplar_prior().eval()(torch.tensor([3, 0, 11, 3, 7]))
    z = torch.randn(7, 5, 2, dtype=torch.float64)
    whole = p.log_prob(z)
    monkeypatch.setattr("pyrovae.distributions.mixtures._CHUNK", 40)  # three rows of twelve
    torch.testing.assert_close(p.log_prob(z), whole, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda q: priors.ExemplarPrior(q), "ExemplarPrior needs data, the exemplars"),
        (lambda q: priors.ExemplarPrior(q, 1), r"data must have shape \(at least 2, \*\(4,\)\), got 1"),
        (
            lambda q: priors.ExemplarPrior(q, torch.full((12, 4), math.nan)),
            "data holds NaN or infinity in 12 of 12 rows",
        ),
        (lambda q: priors.ExemplarPrior(q, torch.rand(12, 3)), r"data must have shape .*got \(12, 3\)"),
        (lambda q: priors.ExemplarPrior(q, torch.rand(1, 4)), r"data must have shape \(at least 2"),
        (lambda q: priors.ExemplarPrior(q, torch.rand(12, 4), 0), "num_neighbors must be at least 1, got 0"),
        (lambda q: priors.ExemplarPrior(q, torch.rand(12, 4), scale=0.0), "scale must be positive and finite, got 0"),
        (lambda q: priors.ExemplarPrior(q, torch.rand(12, 4))(torch.tensor([12])), "from 0 to 11, got values from 12"),
        (
            lambda q: priors.ExemplarPrior(q, torch.rand(12, 4))(torch.tensor([0.5])),
            "from 0 to 11, got values from 0.5",
        ),
        (lambda q: priors.ExemplarPrior(encoders.VonMisesFisher(4, 2), torch.rand(12, 4)), "mixture of normals"),
        (lambda q: priors.ExemplarPrior(encoders.NeuralSplineFlow(4, 2), torch.rand(12, 4)), "without a mean"),
        (lambda q: priors.ExemplarPrior(encoders.InverseAutoregressiveFlow(4, 2), torch.rand(12, 4)), "without a mean"),
        (
            lambda q: priors.ExemplarPrior(encoders.DiagonalNormal(4, 2, context_dim=3), torch.rand(12, 4)),
            "encoder takes a context",
        ),
    ],
)
def test_what_makes_no_exemplars_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build(encoders.DiagonalNormal(4, 2))


# ------------------------------------------------------------------------------------------------------ ResampledPrior


def resampled(tries: int, num_samples: int = 1024) -> priors.ResampledPrior:
    """One dimension, with the acceptance probability sigmoid(2 z - 1)."""
    prior = priors.ResampledPrior(1, AFFINE, tries, num_samples).double()
    (layer,) = prior.network.layers
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(-1.0)
    return prior


def acceptance(z: float) -> float:
    return 1 / (1 + math.exp(1 - 2 * z))


@pytest.mark.parametrize("tries", [1, 2, 5, 1000])
@torch.no_grad()
def test_resampled_prior_is_the_closed_form(tries):
    prior = resampled(tries).eval()
    normalizer, _ = scipy.integrate.quad(lambda z: acceptance(z) * scipy.stats.norm.pdf(z), -40, 40, epsabs=1e-13)
    given_up = (1 - normalizer) ** (tries - 1)
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    expected = [
        scipy.stats.norm.logpdf(v) + math.log(acceptance(v) / normalizer * (1 - given_up) + given_up)
        for v in z.tolist()
    ]
    error = (prior().log_prob(z.unsqueeze(-1)) - torch.tensor(expected, dtype=torch.float64)).abs().max()
    # The documented error of log Z is s / (128 Z), with a standard deviation of a below one half.
    assert error < 0.5 / (128 * normalizer)
    assert tries > 1 or error < 1e-12  # with one try the first draw is accepted


@pytest.mark.parametrize("tries", [1, 2, 5, 1000])
@torch.no_grad()
def test_draws_of_the_resampled_prior_follow_its_density(tries):
    p = resampled(tries).eval()()
    space = line(0.0, 1.0, 1 / 16)
    space = Space(space.points.unsqueeze(-1), space.log_weights)
    probabilities = space.probabilities(p)
    assert abs(probabilities.sum().item() - 1) < 1e-3
    assert agreement(p.sample((41000,)), space, probabilities) > FAILURE_RATE


def test_in_training_the_normalizer_is_estimated_anew_and_without_bias():
    prior = resampled(2, num_samples=64).train()
    exact = resampled(2).eval()().log_normalizer.exp().item()
    draws = torch.stack([prior().log_normalizer.exp() for _ in range(500)]).detach()
    deviation = (draws.mean() - exact).abs() / (draws.std() / math.sqrt(500))
    assert draws.std() > 0
    # The fixed points err by 0.5 / 128 / sqrt(16384 / 128^2) at most; the standard error is about 0.0009.
    assert deviation < scipy.stats.norm.isf(FAILURE_RATE / 2) + 1


def test_evaluation_gives_the_same_density_always():
    prior = resampled(5).eval()
    z = torch.randn(9, 1, dtype=torch.float64)
    assert torch.equal(prior().log_prob(z), prior().log_prob(z))
    prior.train()
    assert not torch.equal(prior().log_prob(z), prior().log_prob(z))


# ----------------------------------------------------------------------------------------------------------- FlowPrior


@pytest.mark.parametrize("context_dim", [0, 3])
def test_flow_prior_takes_any_flow_of_zukos(context_dim):
    prior = priors.FlowPrior(2, import_zuko().flows.MAF, context_dim).double()
    context = torch.randn(4, 3, dtype=torch.float64) if context_dim else None
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(prior(context).log_prob(z), prior.flow(context).log_prob(z), rtol=0, atol=1e3 * EPS)


def test_flow_prior_learns():
    prior = priors.FlowPrior(2)
    vae = VAE(prior, likelihoods.Normal(2, 3, SMALL), encoders.DiagonalNormal(3, 2, SMALL))
    before = [p.clone() for p in prior.parameters()]
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(torch.randn(8, 3))
    assert all(not torch.equal(p, old) for p, old in zip(prior.parameters(), before, strict=True))


def test_supports_say_where_latents_live():
    assert priors.StandardNormal.support is constraints.real_vector
    inside, outside = torch.tensor([0.25, 0.75, 0.5, 0.5]), torch.tensor([0.25, 0.25, 1.0, 0.5])
    blocks = priors.RelaxedOneHotCategorical(4, 2).support
    assert blocks.check(inside)
    assert not blocks.check(outside)


def test_the_distribution_of_a_flow_prints():
    assert repr(priors.FlowPrior(2)()).startswith("Flow(NormalizingFlow(")
