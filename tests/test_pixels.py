"""Images as sequences of pixels: no pixel ahead is seen, all before are, draws from a cache agree with scores."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from helpers import FAILURE_RATE
from scipy.stats import chi2, norm
from torch import Tensor

from pyrovae import VAE, fit, load_run, log_marginal, priors
from pyrovae.cli import main
from pyrovae.encoders import DiagonalNormal
from pyrovae.likelihoods import Autoregressive, Bernoulli, DiscretizedLogisticMixture, Normal, PixelCNN
from pyrovae.nn import MLP, GatedPixelCNN, RecurrentDecoder

EPS = torch.finfo(torch.float64).eps
Z = 2
SMALL = partial(MLP, hidden=(8,))
NETWORKS = {
    "kernel 1": partial(GatedPixelCNN, width=8, num_layers=2, kernel_size=1, network=SMALL),
    "kernel 3": partial(GatedPixelCNN, width=8, num_layers=5, kernel_size=3, network=SMALL),
    "kernel 5": partial(GatedPixelCNN, width=8, num_layers=3, kernel_size=5, network=SMALL),
}
OUTPUTS = {
    "bits": {"x_shape": (1, 4, 5), "output": partial(Bernoulli, network=SMALL)},
    "classes": {"x_shape": (1, 3, 4), "num_classes": 5},
    "coloured classes": {"x_shape": (2, 3, 3), "num_classes": 3},
    "grey levels": {
        "x_shape": (1, 5, 4),
        "output": partial(DiscretizedLogisticMixture, network=SMALL, num_components=2, levels=4),
    },
    "real colours": {"x_shape": (3, 2, 4), "output": partial(Normal, network=SMALL)},
    "a row": {"x_shape": (1, 1, 6), "output": partial(Bernoulli, network=SMALL)},
    "a column": {"x_shape": (1, 6, 1), "output": partial(Bernoulli, network=SMALL)},
    "channels one after the other": {
        "x_shape": (2, 3, 2),
        "num_classes": 3,
        "output": partial(Autoregressive, network=partial(RecurrentDecoder, width=8, embedding_width=4)),
    },
}

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
outputs = pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS)


def likelihood_of(network, arguments) -> PixelCNN:
    return PixelCNN(Z, network=network, **arguments).double()


def images_of(likelihood: PixelCNN, *leading: int) -> Tensor:
    return likelihood(torch.randn(*leading, Z).double()).sample()


def pixels_of(image: Tensor) -> Tensor:
    """Returns the pixels of images ``(N, C, H, W)``, row by row, ``(N, H * W, C)``, the slow way."""
    height, width = image.shape[-2:]
    return torch.stack([image[..., y, x] for y in range(height) for x in range(width)], dim=-2)


@outputs
@networks
@torch.no_grad()
def test_a_change_of_a_pixel_moves_nothing_before_it(network, arguments):
    likelihood = likelihood_of(network, arguments)
    z, x = torch.randn(4, Z).double(), images_of(likelihood, 4)
    p = likelihood(z)
    before, (height, width) = p.log_prob_of_steps(x), x.shape[-2:]
    for t in range(height * width):
        changed = x.clone()
        pixel = changed[..., t // width, t % width]
        pixel.copy_((pixel + 1) % likelihood.num_classes if likelihood.num_classes else 1 - pixel)
        moved = p.log_prob_of_steps(changed) - before
        assert torch.equal(moved[:, :t], torch.zeros_like(moved[:, :t]))
        assert (moved[:, t] != 0).any()
        neighbours = [s for s in (t + 1, t + width) if s < height * width and (s != t + 1 or s % width)]
        assert (moved[:, neighbours].abs().amax(0) > 0).all()


def test_all_pixels_above_and_to_the_left_are_seen_and_no_other():
    # A blind spot to the right above is the known mistake of masked convolutions in one stack.
    network = NETWORKS["kernel 3"](Z, (1, 4, 5)).double()
    x = torch.randn(3, 1, 4, 5).double().requires_grad_()
    h = network(torch.randn(3, Z).double(), x=x)
    for t in range(20):
        (gradient,) = torch.autograd.grad(h[:, t].square().sum(), x, retain_graph=True, allow_unused=True)
        seen = torch.zeros(20) if gradient is None else gradient.abs().amax((0, 1)).flatten()
        assert (seen > 0).tolist() == [s < t for s in range(20)]


def test_a_pixel_sees_no_farther_than_the_layers_reach():
    network = partial(GatedPixelCNN, width=4, num_layers=2, kernel_size=3, network=SMALL)(Z, (1, 9, 9)).double()
    x = torch.randn(1, 1, 9, 9).double().requires_grad_()
    h = network(torch.zeros(1, Z).double(), x=x)[0].unflatten(0, (9, 9))
    (gradient,) = torch.autograd.grad(h[8, 4].sum(), x)
    y, column = gradient[0, 0].nonzero().unbind(-1)
    # The vertical stack starts a row above, and each of the layers adds a row and a column on each side.
    assert (y.min().item(), column.min().item(), column.max().item()) == (8 - 3, 4 - 3, 4 + 2)


@outputs
@networks
@torch.no_grad()
def test_one_pass_equals_pixel_by_pixel(network, arguments):
    likelihood = likelihood_of(network, arguments)
    z, x = torch.randn(4, Z).double(), images_of(likelihood, 4)
    p, pixels = likelihood(z), pixels_of(x)
    state, previous, single = likelihood.network.start(z), None, []
    for t in range(pixels.shape[1]):
        features, state = likelihood.network.next_features(state, previous)
        previous = pixels[:, t]
        single.append(likelihood.output(features).log_prob(previous))
    # Sums of some hundred terms in another order, each a few eps, with log-probabilities below 100.
    torch.testing.assert_close(p.log_prob_of_steps(x), torch.stack(single, -1), rtol=0, atol=1e4 * EPS)
    torch.testing.assert_close(p.log_prob(x), torch.stack(single, -1).sum(-1), rtol=0, atol=1e5 * EPS)


@torch.no_grad()
def test_channels_may_depend_on_one_another_and_add_up_to_one():
    likelihood = likelihood_of(NETWORKS["kernel 3"], OUTPUTS["channels one after the other"] | {"x_shape": (2, 1, 2)})
    for p in likelihood.parameters():
        p.add_(0.3 * torch.randn_like(p))
    p = likelihood(torch.randn(Z).double())
    x = torch.cartesian_prod(*[torch.arange(3.0)] * 4).double().view(-1, 2, 1, 2)
    probabilities = p.log_prob(x).exp()
    assert abs(probabilities.sum().item() - 1) < 1e4 * EPS
    first = probabilities.view(3, 3, 3, 3).sum((1, 3))  # of the two channels of the first pixel
    assert (first - first.sum(0) * first.sum(1, keepdim=True)).abs().max() > 1e-3
    draws = p.sample((20000,))
    counts = (draws.unsqueeze(1) == x).flatten(2).all(-1).sum(0)
    kept = probabilities * len(draws) > 5  # for the chi-square approximation
    observed = torch.cat([counts[kept], counts[~kept].sum(0, keepdim=True)]).double()
    expected = torch.cat([probabilities[kept], probabilities[~kept].sum(0, keepdim=True)]) * len(draws)
    statistic = ((observed - expected).square() / expected)[expected > 0].sum().item()
    assert chi2(int((expected > 0).sum()) - 1).sf(statistic) > FAILURE_RATE


@torch.no_grad()
def test_many_latents_score_the_same_images():
    likelihood = likelihood_of(NETWORKS["kernel 5"], OUTPUTS["grey levels"])
    z, x = torch.randn(3, 4, Z).double(), images_of(likelihood, 4)
    alone = torch.stack([likelihood(z[k]).log_prob(x) for k in range(3)])
    torch.testing.assert_close(likelihood(z).log_prob(x), alone, rtol=0, atol=1e5 * EPS)
    p = likelihood(z[0, :1]).expand((3, 4))
    assert p.sample((5,)).shape == (5, 3, 4, 1, 5, 4)
    assert p.greedy().shape == (3, 4, 1, 5, 4)
    torch.testing.assert_close(p.log_prob(x)[2, 1], likelihood(z[0, 0]).log_prob(x[1]), rtol=0, atol=1e5 * EPS)


@torch.no_grad()
def test_images_outside_the_support_are_refused():
    p = PixelCNN(Z, (2, 2, 2), num_classes=3)(torch.zeros(Z))
    x = torch.zeros(3, 2, 2, 2)
    x[1, 1, 0, 1], x[2, 0, 1, 1] = 3, 0.5
    assert p.support.check(x).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="support"):
        p.log_prob(x)


@torch.no_grad()
def test_pixels_start_at_the_frequencies_of_all_pixels():
    x = torch.tensor([[[[0.0, 1], [1, 1]], [[2, 2], [0, 1]]]])
    likelihood = PixelCNN(Z, (2, 2, 2), num_classes=4).start_at(x)
    counts = torch.tensor([[1.0, 3, 0, 0], [1, 1, 2, 0]]) + 0.5  # of each channel
    bias = likelihood.output.network.layers[-1].bias.view(4, 2).T
    torch.testing.assert_close(bias.softmax(-1), counts / counts.sum(-1, keepdim=True))


def test_pixels_that_are_left_out_in_training_are_not_read():
    likelihood = PixelCNN(Z, (1, 3, 4), NETWORKS["kernel 3"], num_classes=4, step_dropout=1.0)
    z, x = torch.randn(3, Z), torch.randint(4, (3, 1, 3, 4)).float()
    blank = likelihood.output(likelihood.network(z)).log_prob(pixels_of(x)).sum(-1)
    torch.testing.assert_close(likelihood(z).log_prob(x), blank)
    likelihood.eval()
    assert not torch.allclose(likelihood(z).log_prob(x), blank)


@pytest.mark.parametrize(
    ("shape", "arguments", "words"),
    [
        ((1, 4, 4), {}, "output or num_classes"),
        (16, {"output": Bernoulli}, "must be the shape of an image"),
        ((1, 4, 4), {"output": Bernoulli, "network": RecurrentDecoder}, "must be one of images"),
        ((1, 4, 4), {"output": Bernoulli, "network": partial(GatedPixelCNN, kernel_size=4)}, "kernel_size must be odd"),
        ((1, 4, 4), {"output": Bernoulli, "step_dropout": -0.5}, "step_dropout must be a probability"),
    ],
)
def test_parts_that_do_not_fit_are_refused(shape, arguments, words):
    with pytest.raises(ValueError, match=words):
        PixelCNN(Z, shape, **arguments)


def test_estimates_agree_with_quadrature_over_the_latent():
    likelihood = PixelCNN(1, (1, 2, 3), NETWORKS["kernel 3"], partial(Bernoulli, network=SMALL)).double()
    vae = VAE(priors.StandardNormal(1), likelihood, DiagonalNormal((1, 2, 3), 1, SMALL).double())
    x = torch.tensor([[[[1.0, 0, 0], [1, 1, 0]]], [[[0, 1, 0], [0, 0, 1]]]]).double()
    nodes = torch.linspace(-8, 8, 2001).double().unsqueeze(-1)
    with torch.no_grad():
        weights = dist.Normal(0.0, 1.0).log_prob(nodes).squeeze(-1) + math.log(16 / 2000)
        exact = (likelihood(nodes.unsqueeze(1)).log_prob(x) + weights.unsqueeze(-1)).logsumexp(0)
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=2000)
    z = norm.isf(FAILURE_RATE / 4)
    assert ((estimate.value - exact).abs() < z * estimate.standard_error).all()


def test_training_finds_the_entropy_of_pixels_that_follow_their_neighbours():
    # The first pixel of a row is a coin; another is its left neighbour, or the opposite with probability 0.1. Nothing
    # predicts a pixel better than its neighbour.
    def draw(size: int) -> Tensor:
        flips = (torch.rand(size, 1, 3, 4) < torch.tensor([0.5, 0.1, 0.1, 0.1])).long()
        return (flips.cumsum(-1) % 2).float()

    likelihood = PixelCNN(
        1,
        (1, 3, 4),
        partial(GatedPixelCNN, width=8, num_layers=1, kernel_size=3, network=SMALL),
        partial(Bernoulli, network=SMALL),
    )
    vae = VAE(priors.StandardNormal(1), likelihood, DiagonalNormal((1, 3, 4), 1, SMALL))
    fit(vae.model, vae.guide, draw(4000), epochs=4, batch_size=50, optimizer=partial(torch.optim.Adam, lr=1e-2))
    test = draw(4000)
    flips = (test[..., 1:] != test[..., :-1]).sum((1, 2, 3))
    truth = 3 * math.log(0.5) + flips * math.log(0.1) + (9 - flips) * math.log(0.9)
    estimate = log_marginal(vae.model, vae.guide, test, num_samples=50)
    lost = truth - estimate.value
    error = (lost.var() / len(lost) + estimate.standard_error.square().mean() / len(lost)).sqrt()
    assert -norm.isf(FAILURE_RATE) * error < lost.mean() < 0.15  # the KL divergence from the truth, out of 5 nats


def test_the_command_line_trains_scores_and_draws(tmp_path, capsys):
    options = ["--likelihood", "PixelCNN", "--likelihood.output", "Bernoulli", "--likelihood.network", "GatedPixelCNN"]
    options += ["--likelihood.network.width", "4", "--likelihood.network.num_layers", "1", "--latent-dim", "2"]
    run = tmp_path / "run"
    main(["train", "--data", "digits", "--run", str(run), "--epochs", "1", "--num-samples", "20", *options])
    assert "log p(x)" in capsys.readouterr().out
    vae, _ = load_run(run)
    assert isinstance(vae.likelihood, PixelCNN)
    main(["sample", str(run), "--num-samples", "3", "--output", str(tmp_path / "samples.npy")])
    main(["reconstruct", str(run), "--output", str(tmp_path / "reconstructions.npy")])
