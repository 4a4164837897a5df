"""Autoregressive likelihoods: no step sees the future, one pass equals single steps, draws agree with scores."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from helpers import FAILURE_RATE
from scipy.stats import chi2, norm
from torch import Tensor, nn

from pyrovae import VAE, log_marginal, priors
from pyrovae.distributions import Categorical, has_ended, mask_elements, sharpen
from pyrovae.encoders import DiagonalNormal
from pyrovae.likelihoods import Autoregressive, Bernoulli, DiscretizedLogisticMixture, Normal, StudentT
from pyrovae.nn import MLP, RecurrentDecoder, TokenEncoder, TransformerDecoder

EPS = torch.finfo(torch.float64).eps
Z, T = 2, 6
AFFINE = partial(MLP, hidden=())
NETWORKS = {
    "gru": partial(RecurrentDecoder, width=8, embedding_width=5),
    "lstm-2": partial(RecurrentDecoder, width=8, embedding_width=5, num_layers=2, cell=nn.LSTM),
    "skip": partial(RecurrentDecoder, width=8, embedding_width=5, num_layers=2, skip=True),
    "transformer": partial(TransformerDecoder, width=8, num_heads=2),
    "transformer-skip": partial(TransformerDecoder, width=8, num_heads=2, num_layers=3, skip=True),
}
OUTPUTS = {
    "classes": {"x_shape": T, "num_classes": 5},
    "text": {"x_shape": T, "num_classes": 5, "end": 0},
    "pairs of classes": {"x_shape": (T, 2), "num_classes": 3},
    "bits": {"x_shape": (T, 3), "output": partial(Bernoulli, network=AFFINE)},
    "grey levels": {
        "x_shape": (T, 2),
        "output": partial(DiscretizedLogisticMixture, network=AFFINE, num_components=2, levels=4),
    },
    "heavy tails": {"x_shape": T, "output": partial(StudentT, network=AFFINE)},
    "deep": {"x_shape": (T, 2), "output": partial(Normal, network=partial(MLP, hidden=(4,)))},
}

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
outputs = pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS)


def likelihood_of(network, arguments, **more) -> Autoregressive:
    return Autoregressive(Z, network=network, **arguments, **more).double().eval()


def sequences_of(likelihood: Autoregressive, *leading: int) -> Tensor:
    return likelihood(torch.randn(*leading, Z).double()).sample()


def free_of_end(likelihood: Autoregressive, *leading: int) -> Tensor:
    """Returns sequences without an end, whose every step is scored."""
    x = sequences_of(likelihood, *leading)
    return x.clamp_min(1) if likelihood.end == 0 else x


@outputs
@networks
@torch.no_grad()
def test_a_change_of_a_step_moves_nothing_before_it_and_all_that_follow(network, arguments):
    likelihood = likelihood_of(network, arguments)
    z, x = torch.randn(4, Z).double(), free_of_end(likelihood, 4)
    before = likelihood.network(z, x=x)
    for t in range(T):
        changed = x.clone()
        if likelihood.num_classes:
            changed[:, t] = (x[:, t] + 1) % likelihood.num_classes
        else:
            changed[:, t] = 1 - x[:, t]
        moved = likelihood.network(z, x=changed) - before
        assert torch.equal(moved[:, : t + 1], torch.zeros_like(moved[:, : t + 1]))
        assert (moved[:, t + 1 :].abs().amax((0, 2)) > 0).all()


@outputs
@networks
@torch.no_grad()
def test_one_pass_equals_step_by_step(network, arguments):
    likelihood = likelihood_of(network, arguments)
    z, x = torch.randn(4, Z).double(), free_of_end(likelihood, 4)
    p = likelihood(z)
    state, previous, single = likelihood.network.start(z), None, []
    for t in range(T):
        features, state = likelihood.network.next_features(state, previous)
        previous = x[:, t]
        single.append(likelihood.output(features).log_prob(previous.unsqueeze(-1) if x.dim() == 2 else previous))
    # Sums of some hundred terms in another order, each a few eps, with log-probabilities below 100.
    torch.testing.assert_close(p.log_prob_of_steps(x), torch.stack(single, -1), rtol=0, atol=1e4 * EPS)
    torch.testing.assert_close(p.log_prob(x), torch.stack(single, -1).sum(-1), rtol=0, atol=1e5 * EPS)


@networks
@torch.no_grad()
def test_padding_and_the_order_of_a_batch_change_nothing(network):
    text = {"num_classes": 5, "end": 0}
    likelihood = likelihood_of(network, {"x_shape": T, **text})
    z, x = torch.randn(8, Z).double(), sequences_of(likelihood, 8)
    x[:, 3:] = torch.where(torch.arange(8).unsqueeze(-1) < 4, 0.0, x[:, 3:])  # four end early
    log_prob = likelihood(z).log_prob(x)
    order = torch.randperm(8)
    torch.testing.assert_close(likelihood(z[order]).log_prob(x[order]), log_prob[order], rtol=0, atol=1e5 * EPS)
    longer = likelihood_of(network, {"x_shape": T + 3, **text})
    state = likelihood.state_dict()
    if "network.places" in state:
        state["network.places"] = torch.cat([state["network.places"], torch.randn(3, 8).double()])
    longer.load_state_dict(state)
    ended = (x == 0).any(-1)
    padded = torch.cat([x, torch.zeros(8, 3).double()], dim=-1)
    torch.testing.assert_close(longer(z).log_prob(padded)[ended], log_prob[ended], rtol=0, atol=1e5 * EPS)
    encoder = TokenEncoder(T, 3, **text).double()
    wider = TokenEncoder(T + 3, 3, **text).double()
    wider.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(wider(padded)[ended], encoder(x)[ended], rtol=0, atol=1e4 * EPS)
    torch.testing.assert_close(encoder(x[order]), encoder(x)[order], rtol=0, atol=1e4 * EPS)


def test_the_encoder_reads_both_ways_up_to_the_end():
    encoder = TokenEncoder(5, 3, num_classes=6, end=0).double()
    x = torch.tensor([[1.0, 2, 3, 0, 4]]).double()
    for t, matters in enumerate([True, True, True, True, False]):
        changed = x.clone()
        changed[:, t] = 5
        assert (not torch.equal(encoder(changed), encoder(x))) == matters


@networks
@torch.no_grad()
def test_all_sequences_add_up_to_one_and_draws_follow_them(network):
    likelihood = likelihood_of(network, {"x_shape": 4, "num_classes": 3, "end": 1})
    for p in likelihood.parameters():
        p.add_(0.3 * torch.randn_like(p))
    p = likelihood(torch.randn(Z).double())
    x = torch.cartesian_prod(*[torch.arange(3.0)] * 4).double()
    x = x[p.support.check(x)]
    probabilities = p.log_prob(x).exp()
    assert abs(probabilities.sum().item() - 1) < 1e4 * EPS
    draws = p.sample((20000,))
    counts = (draws.unsqueeze(1) == x).all(-1).sum(0)
    assert counts.sum() == len(draws)
    rare = probabilities < 5 / len(draws)  # merged, for the chi-square approximation
    observed = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)]).double()
    expected = torch.cat([probabilities[~rare], probabilities[rare].sum(0, keepdim=True)]) * len(draws)
    kept = expected > 0
    statistic = ((observed - expected).square() / expected)[kept].sum().item()
    assert chi2(int(kept.sum()) - 1).sf(statistic) > FAILURE_RATE


@torch.no_grad()
def test_nothing_but_the_end_follows_the_end():
    likelihood = Autoregressive(Z, 3, num_classes=3, end=0)
    p = likelihood(torch.zeros(Z))
    x = torch.tensor([[1.0, 0, 0], [1, 0, 2], [1, 2, 1], [1, 3, 0], [1, 0.5, 0]])
    assert p.support.check(x).tolist() == [True, False, True, False, False]
    assert has_ended(x, 0)[0].tolist() == [False, False, True]
    with pytest.raises(ValueError, match="support"):
        p.log_prob(x[1])
    p._validate_args = False
    assert p.log_prob(x[1]) == -torch.inf


@torch.no_grad()
def test_many_latents_score_the_same_sequences():
    likelihood = likelihood_of(NETWORKS["gru"], OUTPUTS["text"])
    z = torch.randn(3, 4, Z).double()
    x = sequences_of(likelihood, 4)
    alone = torch.stack([likelihood(z[k]).log_prob(x) for k in range(3)])
    torch.testing.assert_close(likelihood(z).log_prob(x), alone, rtol=0, atol=1e5 * EPS)
    p = likelihood(z[0, :1]).expand((3, 4))
    assert p.sample((5,)).shape == (5, 3, 4, T)
    torch.testing.assert_close(p.log_prob(x)[2, 1], likelihood(z[0, 0]).log_prob(x[1]), rtol=0, atol=1e5 * EPS)


def test_steps_that_are_left_out_in_training_are_not_read():
    likelihood = Autoregressive(Z, 5, NETWORKS["gru"], num_classes=4, step_dropout=1.0)
    z, x = torch.randn(3, Z), torch.randint(4, (3, 5)).float()
    blank = likelihood.network(z)
    torch.testing.assert_close(likelihood(z).log_prob(x), likelihood.output(blank).log_prob(x.unsqueeze(-1)).sum(-1))
    p = likelihood(z)
    likelihood.eval()  # decided when the distribution is made, as for other parts
    torch.testing.assert_close(p.log_prob(x), likelihood.output(blank).log_prob(x.unsqueeze(-1)).sum(-1))
    assert not torch.equal(likelihood(z).log_prob(x), p.log_prob(x))
    half = Autoregressive(Z, 4000, NETWORKS["gru"], num_classes=4, step_dropout=0.25)
    with torch.no_grad():
        read = half.network(z[:1], x=torch.zeros(1, 4000))
        some = half(z[:1]).log_prob_of_steps(torch.zeros(1, 4000)) != half.output(read).log_prob(torch.zeros(4000, 1))
    assert some.any()


@torch.no_grad()
def test_classes_start_at_their_frequencies():
    x = torch.tensor([[1.0, 2, 0, 0, 0], [1, 1, 1, 2, 0]])
    likelihood = Autoregressive(Z, 5, num_classes=4, end=0).start_at(x)
    bias = likelihood.output.network.layers[-1].bias
    counts = torch.tensor([2.0, 4, 2, 0]) + 0.5  # the padding after the first end is no data
    torch.testing.assert_close(bias.softmax(-1), counts / counts.sum())


@torch.no_grad()
def test_draws_of_many_classes_follow_their_probabilities():
    logits = torch.randn(2, 1000)
    logits[0, ::3] = -torch.inf  # classes without probability are not drawn
    p = Categorical(logits=logits)
    draws = p.sample((200_000,))
    assert draws.shape == (200_000, 2)
    for row in range(2):
        counts, expected = draws[:, row].long().bincount(minlength=1000), 200_000 * p.probs[row].double()
        assert counts[expected == 0].sum() == 0
        kept = expected > 5
        statistic = ((counts - expected).square() / expected)[kept].sum().item()
        assert chi2(int(kept.sum())).sf(statistic) > FAILURE_RATE
    assert p.expand((3, 2)).sample((0,)).shape == (0, 3, 2)


def test_sharpened_classes_are_tempered_and_cut():
    p = Categorical(probs=torch.tensor([0.1, 0.5, 0.15, 0.25]))
    torch.testing.assert_close(sharpen(p, 0.5).probs, p.probs**2 / p.probs.square().sum())
    torch.testing.assert_close(sharpen(p, top_p=0.5).probs, torch.tensor([0.0, 1, 0, 0]))
    torch.testing.assert_close(sharpen(p, top_p=0.6).probs, torch.tensor([0.0, 2, 0, 1]) / 3)
    torch.testing.assert_close(sharpen(p).probs, p.probs)
    # Tempered first: the squares of .5 and .25 are above 0.9 of all.
    torch.testing.assert_close(sharpen(p, 0.5, 0.9).probs, torch.tensor([0.0, 0.8, 0, 0.2]))
    assert sharpen(p.to_event(0)).event_shape == ()
    with pytest.raises(ValueError, match="temperature must be positive"):
        sharpen(p, 0.0)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        sharpen(p, top_p=1.5)
    with pytest.raises(TypeError, match="for classes, but p is a Normal"):
        sharpen(dist.Normal(0.0, 1.0))


@torch.no_grad()
def test_greedy_sequences_are_the_limit_of_low_temperatures():
    likelihood = Autoregressive(Z, 8, num_classes=5, end=0)
    p = likelihood(torch.randn(6, Z))
    cold = p.generate(lambda step: sharpen(step, 1e-6).sample())
    assert torch.equal(p.greedy(), cold)
    assert p.support.check(cold).all()
    nucleus = p.generate(lambda step: sharpen(step, 0.8, 0.9).sample(), (3,))
    assert nucleus.shape == (3, 6, 8)
    assert p.support.check(nucleus).all()


def test_steps_cannot_be_left_out_as_if_they_were_independent():
    p = Autoregressive(Z, 3, num_classes=3)(torch.zeros(Z))
    with pytest.raises(TypeError, match="independent elements, got Autoregressive"):
        mask_elements(p, torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "output or num_classes"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2"),
        ({"num_classes": 3, "end": 3}, ValueError, "end must be one of the classes"),
        ({"output": Normal, "end": 0}, ValueError, "end must be one of the classes"),
        ({"num_classes": 3, "step_dropout": 1.5}, ValueError, "step_dropout must be a probability"),
        ({"num_classes": 3, "network": MLP(Z, 5)}, TypeError, "must be a pyrovae.nn.SequenceDecoder"),
        ({"num_classes": 3, "network": RecurrentDecoder(Z, 5)}, ValueError, "must have num_classes=3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        Autoregressive(Z, 5, **arguments)


def test_networks_that_cannot_be_built_are_refused():
    with pytest.raises(TypeError, match=r"cell must be torch\.nn\.GRU"):
        RecurrentDecoder(Z, 5, cell=nn.RNN)
    with pytest.raises(ValueError, match="num_heads must divide width=8"):
        TransformerDecoder(Z, 5, width=8, num_heads=3)
    with pytest.raises(ValueError, match="in_shape must be the length"):
        TokenEncoder((5, 2), 3, num_classes=4)
    with pytest.raises(ValueError, match="end must be a class"):
        TokenEncoder(5, 3, num_classes=4, end=4)


def test_numbers_that_are_no_classes_are_not_looked_up_in_silence():
    encoder = TokenEncoder(3, 2, num_classes=4)
    assert encoder(torch.tensor([[1.0, 1.5, 2.0]])).isnan().all()
    with pytest.raises(IndexError):
        encoder(torch.tensor([[1.0, 4.0, 2.0]]))


def test_estimates_agree_with_quadrature_over_the_latent():
    likelihood = Autoregressive(1, 3, NETWORKS["gru"], num_classes=3, end=0).double().eval()
    encoder = DiagonalNormal(3, 1, partial(TokenEncoder, num_classes=3, end=0, width=8, embedding_width=4)).double()
    vae = VAE(priors.StandardNormal(1), likelihood, encoder)
    x = torch.tensor([[1.0, 0, 0], [2, 1, 2], [0, 0, 0]]).double()
    nodes = torch.linspace(-8, 8, 2001).double().unsqueeze(-1)
    with torch.no_grad():
        weights = dist.Normal(0.0, 1.0).log_prob(nodes).squeeze(-1) + math.log(16 / 2000)
        exact = (likelihood(nodes.unsqueeze(1)).log_prob(x) + weights.unsqueeze(-1)).logsumexp(0)
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=2000)
    z = norm.isf(FAILURE_RATE / 6)
    assert ((estimate.value - exact).abs() < z * estimate.standard_error).all()
