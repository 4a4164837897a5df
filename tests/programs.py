"""Published Pyro programs, rewritten as small pairs, with the log p(x) that each should get.

Each keeps the particular parts of the original: its plates with their names, its loops and masks, its distributions,
and the ELBO that trains it. Run as a script, this prints a table: what had to change, whether ``fit`` equals Pyro's
``SVI``, and log p(x) with the true value.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from pyrovae import History, estimators, fit, log_marginal

LEARNING_RATE, STEPS = 0.01, 8  # of runs that are compared, step by step
TRAINING = 100  # steps before scores are taken


class Pair(NamedTuple):
    """A model and a guide, what they are called with, and how the original trains them.

    Args:
        model: the model.
        guide: the guide.
        data: what both are called with.
        loss: makes the ELBO that the original is trained by.
        truth: log p(x) of the data apart from Pyro, ``(batch,)``; None where there are no scores.
        module: the networks.
        dim: the dimension of the data plate.
    """

    model: Callable
    guide: Callable
    data: tuple[Tensor, ...]
    loss: Callable[[], ELBO]
    truth: Callable[..., Tensor] | None
    module: nn.Module
    dim: int = -1


class Program(NamedTuple):
    """A published program.

    Args:
        name: what it is, and whose.
        make: builds it, with initial parameters.
        changed: what had to change in it to be trained.
        scored: makes the pair whose data are scored from the trained one; None if it is the trained one.
        refused: error of a score of the trained pair, a regular expression; empty without one.
        warned: warning of fit; empty without one.
        changed_for_scores: what had to change for scores.
        compiles: whether the natural ELBO is traced into a graph.
        exact: the estimator without random numbers; None without one.
        alone: whether samples are drawn one by one.
        uncollapsed: error of diagnostics.collapse, a regular expression; empty without one.
        quick: whether its graph compiles in a few seconds; otherwise a slow test compiles it.
        weighs: whether bounds on importance weights are defined: no site has a scale of its own, no observed site is
            global.
    """

    name: str
    make: Callable[[], Pair]
    changed: str = "nothing"
    scored: Callable[[Pair], Pair] | None = None
    refused: str = ""
    warned: str = ""
    changed_for_scores: str = "nothing"
    compiles: bool = True
    exact: estimators.Estimator | None = None
    alone: bool = False
    uncollapsed: str = ""
    weighs: bool = True
    quick: bool = True


def net(*sizes: int) -> nn.Sequential:
    """A network in double precision."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def located(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the location and the scale of normal distributions, between a half and two, from a network."""
    loc, raw = parameters.chunk(2, dim=-1)
    return loc, (0.7 * raw.tanh()).exp()


def joined(*tensors: Tensor) -> Tensor:
    """Tensors side by side in the last dimension, the others made as long as they have to be."""
    lead = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(*lead, t.shape[-1]) for t in tensors], dim=-1)


def normals(dim: int, points: int = 121) -> tuple[Tensor, Tensor]:
    """Points of a standard normal, ``(points^dim, 1, dim)``, and the logarithms of their probabilities.

    By the trapezoid rule on [-8, 8], with an error below 1e-14: the integrand is smooth and vanishes at both ends.
    """
    line = torch.linspace(-8, 8, points, dtype=torch.float64)
    z = torch.cartesian_prod(*[line] * dim).reshape(-1, 1, dim)
    log_density = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    return z, log_density + dim * (line[1] - line[0]).log()


def integral(log_f: Tensor, log_weights: Tensor) -> Tensor:
    return (log_f + log_weights).logsumexp(0)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return (x * logits - softplus(logits)).sum(-1)


def log_normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * ((x - loc) / scale).square() - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)


def log_negative_binomial(x: Tensor, total: Tensor, logits: Tensor) -> Tensor:
    choices = torch.lgamma(total + x) - torch.lgamma(total) - torch.lgamma(x + 1)
    return (choices - total * softplus(logits) - x * softplus(-logits)).sum(-1)


class TutorialVAE(nn.Module):
    """Grey pixels with Bernoulli distributions that do not validate them."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = net(2, 5, 9), net(9, 5, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), x.new_ones(x.shape[0], 2)).to_event(1))
            pixels = torch.sigmoid(self.decoder(z))
            pyro.sample("obs", dist.Bernoulli(pixels, validate_args=False).to_event(1), obs=x.reshape(-1, 9))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = located(self.encoder(x.reshape(-1, 9)))
            pyro.sample("latent", dist.Normal(loc, scale).to_event(1))

    def truth(self, x):
        z, weights = normals(2)
        return integral(log_bernoulli(x.reshape(-1, 9), self.decoder(z)), weights)


def tutorial_vae() -> Pair:
    vae = TutorialVAE()
    return Pair(vae.model, vae.guide, (torch.rand(14, 3, 3).double(),), Trace_ELBO, vae.truth, vae)


def tutorial_vae_of_bits(trained: Pair) -> Pair:
    return trained._replace(data=(trained.data[0].round(),))


class M2(nn.Module):
    """Images with a style and a digit, which is seen for some; where it is not, TraceEnum_ELBO sums over it."""

    def __init__(self, labelled: bool):
        super().__init__()
        self.labelled = labelled
        self.decoder, self.classifier, self.encoder = net(2 + 3, 6, 8), net(8, 3), net(8 + 3, 6, 4)

    def model(self, x, y=None):
        pyro.module("m2", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), 3) / 3), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joined(z, y))).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)))
            loc, scale = located(self.encoder(joined(x, y)))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def truth(self, x, y=None):
        z, weights = normals(2)
        each = [
            integral(log_bernoulli(x, self.decoder(joined(z, one.expand(len(x), 3)))), weights) - math.log(3)
            for one in torch.eye(3, dtype=torch.float64)
        ]
        return torch.stack(each).logsumexp(0) if y is None else (torch.stack(each, dim=-1) * y).sum(-1)


def m2(labelled: bool) -> Pair:
    m = M2(labelled)
    x = torch.rand(12, 8).double().round()
    y = torch.eye(3).double()[torch.arange(12) % 3]
    guide = config_enumerate(m.guide, expand=True)
    loss = Trace_ELBO if labelled else partial(TraceEnum_ELBO, max_plate_nesting=1)
    return Pair(m.model, m.guide if labelled else guide, (x, y) if labelled else (x,), loss, m.truth, m)


class CVAE(nn.Module):
    """Three quarters of a picture given one: a prior on the context, and a baseline network without a latent."""

    def __init__(self):
        super().__init__()
        self.baseline, self.prior = net(3, 6), net(3 + 6, 4)
        self.generation, self.recognition = net(2 + 3, 6, 6), net(6 + 3, 4)

    def model(self, xs, ys=None):
        pyro.module("generation", self)
        with pyro.plate("data"):
            guess = self.baseline(xs)
            loc, scale = located(self.prior(joined(xs, guess)))
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=self.generation(joined(z, xs)) + guess).to_event(1), obs=ys)

    def guide(self, xs, ys=None):
        with pyro.plate("data"):
            loc, scale = located(self.recognition(joined(ys, xs)))
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def truth(self, xs, ys):
        u, weights = normals(2)
        guess = self.baseline(xs)
        loc, scale = located(self.prior(joined(xs, guess)))
        logits = self.generation(joined(loc + scale * u, xs)) + guess
        return integral(log_bernoulli(ys, logits), weights)


def cvae() -> Pair:
    c = CVAE()
    return Pair(
        c.model, c.guide, (torch.rand(13, 3).double(), torch.rand(13, 6).double().round()), Trace_ELBO, c.truth, c
    )


class ScANVI(nn.Module):
    """Counts of genes: a label and a latent below another, a library size, and a loss scaled by the number of genes."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(5).double())
        self.second, self.genes = net(1 + 2, 2), net(1, 4, 5)
        self.encoder, self.classifier, self.first = net(5, 4, 4), net(1, 2), net(1 + 2, 2)

    def model(self, x, y=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(2)), obs=y)
            loc, scale = located(self.second(joined(z1, y)))
            z2 = pyro.sample("z2", dist.Normal(loc, scale).to_event(1))
            size = pyro.sample("l", dist.LogNormal(x.new_full((1,), 2.0), 0.4).to_event(1))
            total, logits = self.negative_binomial(z2, size)
            pyro.sample("x", dist.NegativeBinomial(total_count=total, logits=logits).to_event(1), obs=x)

    def negative_binomial(self, z2, size):
        mean = (size * torch.softmax(self.genes(z2), dim=-1)).log()
        return self.log_inverse_dispersion.exp(), mean - self.log_inverse_dispersion

    def guide(self, x, y=None):
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z_parameters, l_parameters = self.encoder(x.log1p()).chunk(2, dim=-1)
            loc, scale = located(l_parameters)
            pyro.sample("l", dist.LogNormal(2 + loc, 0.5 * scale).to_event(1))
            loc, scale = located(z_parameters)
            z2 = pyro.sample("z2", dist.Normal(loc, 1.2 * scale).to_event(1))
            if y is None:
                y = pyro.sample(
                    "y", dist.OneHotCategorical(logits=self.classifier(z2)), infer={"enumerate": "parallel"}
                )
            loc, scale = located(self.first(joined(z2, y)))
            pyro.sample("z1", dist.Normal(loc, 1.2 * scale).to_event(1))

    def truth(self, x):
        """p(x) is an integral over the second latent and the library size, whose p(z2) is one over what is above."""
        line = torch.linspace(-12, 12, 241, dtype=torch.float64).reshape(-1, 1, 1)
        z1, above = normals(1, 241)
        log_p = []
        for one in torch.eye(2, dtype=torch.float64):
            loc, scale = located(self.second(joined(z1.squeeze(1), one.expand(len(z1), 2))))
            log_p.append((log_normal(line.squeeze(-1), loc.T, scale.T) + above.T).logsumexp(1))
        log_p_z2 = torch.stack(log_p).logsumexp(0) - math.log(2) + (line[1] - line[0]).log().squeeze()
        u, weights = normals(1, 81)
        total = []
        for z, log_weight in zip(line, log_p_z2, strict=True):
            found = self.negative_binomial(z.expand(len(u), 1, 1), (2 + 0.4 * u).exp())
            total.append(integral(log_negative_binomial(x, *found), weights) + log_weight)
        return torch.stack(total).logsumexp(0)


def scanvi() -> Pair:
    s = ScANVI(scale=1 / 15)
    x = torch.poisson(torch.rand(15, 5).double() * 4)
    return Pair(s.model, s.guide, (x,), partial(TraceEnum_ELBO, max_plate_nesting=1), s.truth, s)


class DeepMarkov(nn.Module):
    """Sequences of three lengths: a loop over time, masks inside of the distributions, and an annealing factor."""

    def __init__(self, annealing: float):
        super().__init__()
        self.annealing = annealing
        self.transition, self.emission, self.combined = net(1, 2), net(1, 4), net(1, 2)
        self.rnn = nn.RNN(4, 2, batch_first=True).double()
        self.first, self.first_guide = (nn.Parameter(torch.zeros(1).double()) for _ in range(2))

    def model(self, x, lengths):
        pyro.module("dmm", self)
        mask = lengths.unsqueeze(-1) > torch.arange(x.shape[1])
        z = self.first.expand(len(x), 1)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = located(self.transition(z))
                with poutine.scale(scale=self.annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).mask(mask[:, t : t + 1]).to_event(1))
                fn = dist.Bernoulli(logits=self.emission(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"obs_x_{t}", fn, obs=x[:, t])

    def guide(self, x, lengths):
        pyro.module("dmm", self)
        mask = lengths.unsqueeze(-1) > torch.arange(x.shape[1])
        h, _ = self.rnn(x)
        z = self.first_guide.expand(len(x), 1)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = located(self.combined(z) + h[:, t])
                with poutine.scale(scale=self.annealing):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, 1.3 * scale).mask(mask[:, t : t + 1]).to_event(1))

    def truth(self, x, lengths):
        """The forward algorithm, on a line of points for the latent."""
        line = torch.linspace(-12, 12, 481, dtype=torch.float64).unsqueeze(-1)
        step = (line[1] - line[0]).log()
        emission = self.emission(line)
        loc, scale = located(self.transition(line))
        moves = log_normal(line.T, loc, scale) + step  # from each point to each
        loc, scale = located(self.transition(self.first.unsqueeze(0)))
        alpha = (log_normal(line.T, loc, scale) + step).expand(len(x), -1)
        for t in range(x.shape[1]):
            seen = log_bernoulli(x[:, None, t], emission)
            alpha = alpha + torch.where((lengths > t).unsqueeze(-1), seen, 0.0)
            if t + 1 < x.shape[1]:
                # Beyond its end a sequence moves on unseen, which adds up to one.
                alpha = (alpha.unsqueeze(-1) + moves).logsumexp(1)
        return alpha.logsumexp(-1)


def deep_markov() -> Pair:
    d = DeepMarkov(annealing=0.5)
    x = torch.rand(9, 3, 4).double().round()
    return Pair(d.model, d.guide, (x, torch.arange(9) % 3 + 1), Trace_ELBO, d.truth, d)


class CEVAE(nn.Module):
    """A confounder behind a treatment and an outcome; the guide observes both, for networks that predict them."""

    def __init__(self):
        super().__init__()
        self.x_nn, self.t_nn, self.y0_nn, self.y1_nn = net(1, 4, 3), net(1, 1), net(1, 4, 1), net(1, 4, 1)
        self.t_guide_nn, self.y_guide_nn, self.z_guide_nn = net(3, 1), net(3 + 1, 1), net(3 + 2, 4, 2)

    def model(self, x, t=None, y=None):
        pyro.module("cevae_model", nn.ModuleList([self.x_nn, self.t_nn, self.y0_nn, self.y1_nn]))
        with pyro.plate("data", len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.x_nn(z), 0.7).to_event(1), obs=x)
            t = pyro.sample("t", dist.Bernoulli(logits=self.t_nn(z).squeeze(-1)), obs=t)
            y_logits = torch.where(t.bool(), self.y1_nn(z).squeeze(-1), self.y0_nn(z).squeeze(-1))
            pyro.sample("y", dist.Bernoulli(logits=y_logits), obs=y)

    def guide(self, x, t=None, y=None):
        pyro.module("cevae_guide", nn.ModuleList([self.t_guide_nn, self.y_guide_nn, self.z_guide_nn]))
        with pyro.plate("data", len(x), subsample=x):
            auxiliary = {"is_auxiliary": True}
            t = pyro.sample("t", dist.Bernoulli(logits=self.t_guide_nn(x).squeeze(-1)), obs=t, infer=dict(auxiliary))
            y_logits = self.y_guide_nn(joined(x, t.unsqueeze(-1))).squeeze(-1)
            y = pyro.sample("y", dist.Bernoulli(logits=y_logits), obs=y, infer=dict(auxiliary))
            loc, scale = located(self.z_guide_nn(joined(x, t.unsqueeze(-1), y.unsqueeze(-1))))
            pyro.sample("z", dist.Normal(loc, 1.3 * scale).to_event(1))

    def truth(self, x, t, y):
        z, weights = normals(1, 481)
        logits = torch.where(t.bool().unsqueeze(-1), self.y1_nn(z), self.y0_nn(z))
        log_f = log_normal(x, self.x_nn(z), torch.tensor(0.7).double()).sum(-1)
        log_f = log_f + log_bernoulli(t.unsqueeze(-1), self.t_nn(z)) + log_bernoulli(y.unsqueeze(-1), logits)
        return integral(log_f, weights)


def cevae() -> Pair:
    c = CEVAE()
    data = (torch.randn(16, 3).double(), torch.rand(16).double().round(), torch.rand(16).double().round())
    return Pair(c.model, c.guide, data, TraceCausalEffect_ELBO, c.truth, c)


def cevae_blind(trained: Pair) -> Pair:
    return trained._replace(guide=poutine.block(trained.guide, hide=["t", "y"]), loss=Trace_ELBO)


class ProdLDA(nn.Module):
    """Documents as products of topics: dropout and batch normalisation in both networks, softmax on one dimension."""

    def __init__(self):
        super().__init__()
        self.beta, self.norm, self.drop = (
            nn.Linear(2, 6, bias=False).double(),
            nn.BatchNorm1d(6).double(),
            nn.Dropout(0.2),
        )
        self.encoder = net(6, 4, 4)
        self.loc_norm, self.scale_norm = (nn.BatchNorm1d(2, affine=False).double() for _ in range(2))

    def decoder(self, theta):
        return torch.softmax(self.norm(self.beta(self.drop(theta))), dim=1)

    def model(self, docs):
        pyro.module("decoder", nn.ModuleList([self.beta, self.norm]))
        with pyro.plate("documents", docs.shape[0]):
            log_theta = pyro.sample("logtheta", dist.Normal(docs.new_zeros(docs.shape[0], 2), 1.0).to_event(1))
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, self.decoder(torch.softmax(log_theta, -1))), obs=docs)

    def guide(self, docs):
        pyro.module("encoder", self.encoder)
        with pyro.plate("documents", docs.shape[0]):
            loc, scale = located(self.encoder(docs))
            loc, raw = self.encoder(docs).chunk(2, dim=-1)
            loc, scale = 0.5 * self.loc_norm(loc), (0.1 * self.scale_norm(raw)).exp()
            pyro.sample("logtheta", dist.Normal(loc, scale).to_event(1))

    def truth(self, docs):
        """In evaluation mode; batch normalisation is then a scale and a shift."""
        z, weights = normals(2)
        log_p = self.norm(self.beta(torch.softmax(z.squeeze(1), -1))).log_softmax(-1)
        choices = torch.lgamma(docs.sum(-1) + 1) - torch.lgamma(docs + 1).sum(-1)
        return integral(log_p @ docs.T + choices, weights)


def prod_lda() -> Pair:
    p = ProdLDA()
    docs = torch.poisson(torch.rand(16, 6).double() * 2) + torch.eye(6).double()[torch.arange(16) % 6]
    return Pair(p.model, p.guide, (docs,), Trace_ELBO, p.truth, p)


class LDA(nn.Module):
    """Words of documents under topics that all documents share; which topic a word is of, TraceEnum_ELBO sums over."""

    def __init__(self):
        super().__init__()
        self.predictor = net(4, 3, 2)

    def globals(self, docs):
        with pyro.plate("topics", 2):
            weights = pyro.sample("topic_weights", dist.Gamma(docs.new_tensor(0.5), 1.0))
            words = pyro.sample("topic_words", dist.Dirichlet(docs.new_ones(4) / 4))
        return weights, words

    def model(self, docs):
        weights, words = self.globals(docs.double())
        with pyro.plate("documents", len(docs)):
            topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", docs.shape[1]):
                topic = pyro.sample("word_topics", dist.Categorical(topics), infer={"enumerate": "parallel"})
                pyro.sample("doc_words", dist.Categorical(words[topic]), obs=docs.T)

    def guide(self, docs):
        pyro.module("predictor", self.predictor)
        weights = pyro.param("gamma_shape", torch.ones(2).double(), constraint=constraints.positive)
        words = pyro.param("dirichlet", 1 + torch.eye(4).double()[:2], constraint=constraints.greater_than(0.5))
        with pyro.plate("topics", 2):
            pyro.sample("topic_weights", dist.Gamma(2 * weights, 2.0))
            pyro.sample("topic_words", dist.Dirichlet(words))
        with pyro.plate("documents", len(docs)):
            pyro.sample("doc_topics", dist.Delta(self.predicted(docs).softmax(-1), event_dim=1))

    def predicted(self, docs):
        return self.predictor((docs.unsqueeze(-1) == torch.arange(4)).double().mean(1))

    def model_of_documents(self, docs):
        """With the topic of a word summed out by hand."""
        weights, words = self.globals(docs.double())
        with pyro.plate("documents", len(docs)):
            topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", docs.shape[1]):
                pyro.sample("doc_words", dist.Categorical(topics @ words), obs=docs.T)

    def guide_of_documents(self, docs):
        pyro.module("predictor", self.predictor)
        with pyro.plate("documents", len(docs)):
            pyro.sample("doc_topics", dist.Dirichlet(1 + self.predicted(docs).exp()))


TOPICS = {
    "topic_weights": torch.tensor([1.5, 2.5], dtype=torch.float64),
    "topic_words": torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.3, 0.5]], dtype=torch.float64),
}


def lda_truth(docs: Tensor) -> Tensor:
    """An integral over the share of the first topic, a Beta distribution, in its log odds."""
    odds = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    share = torch.stack([odds.sigmoid(), (-odds).sigmoid()], dim=-1)
    a = TOPICS["topic_weights"]
    log_beta = torch.lgamma(a.sum()) - torch.lgamma(a).sum()
    # The density of the log odds: its derivative by the share is 1 / (s (1 - s)).
    log_prior = (a * share.log()).sum(-1) + log_beta + (odds[1] - odds[0]).log()
    log_words = (share @ TOPICS["topic_words"]).log()
    return torch.stack([(log_words[:, doc].sum(-1) + log_prior).logsumexp(0) for doc in docs])


def lda() -> Pair:
    m = LDA()
    docs = torch.randint(0, 4, (10, 5))
    return Pair(m.model, m.guide, (docs,), partial(TraceEnum_ELBO, max_plate_nesting=2), None, m)


def lda_given_topics(trained: Pair) -> Pair:
    m = trained.module
    model = poutine.condition(m.model_of_documents, data=TOPICS)
    return Pair(model, m.guide_of_documents, trained.data, Trace_ELBO, lda_truth, m)


class AIR(nn.Module):
    """Up to two objects in a picture, one after the other: whether there is another, and if so, what it is."""

    def __init__(self):
        super().__init__()
        self.decoder, self.recurrent = net(1, 4, 5), net(5 + 1 + 1, 6)
        self.present, self.what, self.baseline = net(6, 1), net(6, 2), net(5, 1)

    def model(self, x):
        pyro.module("air", self)
        with pyro.plate("data", len(x)):
            picture, present = x.new_zeros(len(x), 5), x.new_ones(len(x), 1)
            for t in range(2):
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.6 * present).to_event(1))
                what = pyro.sample(
                    f"z_what_{t}", dist.Normal(torch.zeros_like(present), 1.0).mask(present.bool()).to_event(1)
                )
                picture = picture + present * self.decoder(what)
            pyro.sample("obs", dist.Normal(picture, 0.6).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("air", self)
        with pyro.plate("data", len(x)):
            present, what = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)
            for t in range(2):
                h = torch.tanh(self.recurrent(joined(x, present, what)))
                infer = {"baseline": {"baseline_value": self.baseline(x).squeeze(-1)}}
                fn = dist.Bernoulli(present * (0.1 + 0.8 * torch.sigmoid(self.present(h)))).to_event(1)
                present = pyro.sample(f"z_pres_{t}", fn, infer=infer)
                loc, scale = located(self.what(h))
                what = pyro.sample(f"z_what_{t}", dist.Normal(loc, scale).mask(present.bool()).to_event(1))

    def truth(self, x):
        z, weights = normals(1, 241)
        one = self.decoder(z)  # (points, 1, 5)
        none = log_normal(x, torch.zeros(5), torch.tensor(0.6).double()).sum(-1) + math.log(0.4)
        single = integral(log_normal(x, one, torch.tensor(0.6).double()).sum(-1), weights) + math.log(0.6 * 0.4)
        two = (one.unsqueeze(0) + one.unsqueeze(1)).flatten(0, 1)
        log_f = log_normal(x, two, torch.tensor(0.6).double()).sum(-1)
        both = integral(log_f, (weights.unsqueeze(0) + weights.unsqueeze(1)).flatten(0, 1)) + math.log(0.36)
        return torch.stack([none, single, both]).logsumexp(0)


def air() -> Pair:
    a = AIR()
    return Pair(a.model, a.guide, (0.7 * torch.randn(11, 5).double(),), TraceGraph_ELBO, a.truth, a)


class SparseGamma(nn.Module):
    """Counts from a layer of sparse gamma latents, with weights that all data share."""

    def __init__(self):
        super().__init__()
        self.encoder = net(4, 4)

    def model(self, x):
        w = pyro.sample("w_bottom", dist.Gamma(x.new_full((8,), 0.8), 0.9).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_bottom", dist.Gamma(x.new_full((2,), 1.3), 0.9).to_event(1))
            pyro.sample("obs", dist.Poisson(z @ w.reshape(2, 4)).to_event(1), obs=x)

    def local(self, guide, x):
        pyro.module("encoder", self.encoder)
        loc, scale = located(self.encoder(x.log1p()))
        with guide.plate("data", len(x)):
            guide.group(match="z_.*").sample("auxiliary_z", dist.Normal(loc, 1.5 * scale).to_event(1))


class OfAll(EasyGuide):
    """Guides the weights and the latents."""

    def __init__(self, model, module):
        super().__init__(model)
        self.gamma = [module]  # which is registered under its own name

    def guide(self, x):
        loc = pyro.param("w_loc", torch.zeros(8).double())
        scale = pyro.param("w_scale", 0.3 * torch.ones(8).double(), constraint=constraints.positive)
        self.group(match="w_.*").sample("auxiliary_w", dist.Normal(loc, scale).to_event(1))
        self.gamma[0].local(self, x)


class OfLatents(OfAll):
    """Guides the latents alone."""

    def guide(self, x):
        self.gamma[0].local(self, x)


WEIGHTS = torch.tensor([0.5, 1.5, 0.2, 0.8, 1.0, 0.3, 0.9, 0.4], dtype=torch.float64)


def sparse_gamma_truth(x: Tensor) -> Tensor:
    """An integral over the logarithms of two latents."""
    line = torch.linspace(-30, 4, 401, dtype=torch.float64)
    log_z = torch.cartesian_prod(line, line).unsqueeze(1)
    log_prior = (1.3 * math.log(0.9) - math.lgamma(1.3) + 1.3 * log_z - 0.9 * log_z.exp()).sum(-1)
    rate = log_z.exp() @ WEIGHTS.reshape(2, 4)
    log_f = (torch.xlogy(x, rate) - rate - torch.lgamma(x + 1)).sum(-1)
    return integral(log_f, log_prior + 2 * (line[1] - line[0]).log())


def sparse_gamma() -> Pair:
    m = SparseGamma()
    x = torch.poisson(2 * torch.rand(12, 4).double())
    guide = OfAll(m.model, m)
    guide(x)  # it sets itself up at its first call
    return Pair(m.model, guide, (x,), Trace_ELBO, None, m)


def sparse_gamma_given_weights(trained: Pair) -> Pair:
    model = poutine.condition(trained.module.model, data={"w_bottom": WEIGHTS})
    guide = OfLatents(model, trained.module)
    guide(*trained.data)
    return Pair(model, guide, trained.data, Trace_ELBO, sparse_gamma_truth, trained.module)


class Improper(nn.Module):
    """A latent without a prior of its own: a flat one and a factor, in a plate on the left of the features'."""

    def __init__(self):
        super().__init__()
        self.proper = False
        self.slopes, self.encoder = nn.Parameter(torch.linspace(-1, 1, 4).double()), net(4, 2)

    def model(self, x):
        pyro.module("improper", self)
        with pyro.plate("rows", len(x), dim=-2):
            if self.proper:
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            else:
                z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
                pyro.factor("prior", -0.5 * z.square() - 0.5 * math.log(2 * math.pi))
            with pyro.plate("features", 4, dim=-1):
                pyro.sample("x", dist.Normal(z * self.slopes, 0.5), obs=x)

    def guide(self, x):
        loc, scale = located(self.encoder(x))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Normal(loc, scale))

    def truth(self, x):
        z, weights = normals(1, 481)
        return integral(log_normal(x, z * self.slopes, torch.tensor(0.5).double()).sum(-1), weights)


def improper() -> Pair:
    m = Improper()
    return Pair(m.model, m.guide, (torch.randn(10, 4).double(),), Trace_ELBO, m.truth, m, dim=-2)


def improper_as_proper(trained: Pair) -> Pair:
    trained.module.proper = True
    return trained


PROGRAMS = [
    Program(
        "VAE, Pyro's tutorial",
        tutorial_vae,
        scored=tutorial_vae_of_bits,
        refused='"obs" is outside the support of Bernoulli',
        warned='"obs" are outside the support',
        changed_for_scores="grey values are rounded to bits",
        exact=estimators.Quadrature(),
        quick=False,
    ),
    Program("semi-supervised M2, unlabelled", partial(m2, False), quick=False),
    Program("semi-supervised M2, labelled", partial(m2, True), exact=estimators.Quadrature(), quick=False),
    Program("conditional VAE, Pyro's", cvae, exact=estimators.Quadrature()),
    Program("scANVI, Pyro's", scanvi, quick=False),
    Program("deep Markov model, Pyro's", deep_markov, uncollapsed="is masked", weighs=False, quick=False),
    Program(
        "CEVAE, pyro.contrib's shape",
        cevae,
        scored=cevae_blind,
        changed_for_scores="for bounds, what the guide observes is hidden",
        compiles=False,
        exact=estimators.Quadrature(),
    ),
    Program("ProdLDA, Pyro's", prod_lda, compiles=False, alone=True, exact=estimators.Quadrature(1000)),
    Program(
        "LDA with enumeration, Pyro's",
        lda,
        changed="rows are documents",
        scored=lda_given_topics,
        refused='"topic_weights".*outside',
        changed_for_scores="topics are given, the topic of a word is summed out, topics of a document have a density",
        quick=False,
        exact=estimators.Quadrature(),
        weighs=False,
    ),
    Program("AIR, Pyro's", air, compiles=False, uncollapsed="is masked"),
    Program(
        "sparse gamma, Pyro's",
        sparse_gamma,
        scored=sparse_gamma_given_weights,
        refused='"w_bottom".*outside',
        changed_for_scores="weights are given",
        uncollapsed="computes its latents from the auxiliary site",
        exact=estimators.Quadrature(),
        weighs=False,
    ),
    Program(
        "a flat prior and a factor",
        improper,
        scored=improper_as_proper,
        refused='"z" of the model is an ImproperUniform, which has no density',
        changed_for_scores="the flat prior and its factor are one normal",
        exact=estimators.Quadrature(),
    ),
]


def by_svi(pair: Pair, steps: int = STEPS) -> list[float]:
    """Trains by Pyro's own SVI; returns the loss a datum of each step."""
    size = len(pair.data[0])
    optimizer = pyro.optim.SGD({"lr": LEARNING_RATE / size, "momentum": 0.9})
    svi = SVI(pair.model, pair.guide, optimizer, pair.loss())
    return [svi.step(*pair.data) / size for _ in range(steps)]


def by_fit(pair: Pair, steps: int = STEPS, **options) -> History:
    """Trains by fit on the same batches, all data in their order."""
    # A loader takes a number from torch's random state for its workers; from its own, if it has one.
    batches = DataLoader(TensorDataset(*pair.data), batch_size=len(pair.data[0]), generator=torch.Generator())
    optimizer = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9)
    return fit(
        pair.model, pair.guide, batches, loss=pair.loss(), epochs=steps, optimizer=optimizer, progress=False, **options
    )


def made(program: Program) -> Pair:
    """Returns a program with the same parameters and data at every call, and the noise that follows."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pair = program.make()
    pyro.set_rng_seed(1)
    return pair


def trained(program: Program) -> Pair:
    """Returns what is scored of a program, after some training, in evaluation mode."""
    pair = made(program)
    train(pair)
    if program.scored is not None:
        pair = program.scored(pair)
        train(pair)
    pair.module.eval()
    return pair


def train(pair: Pair) -> None:
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.02}), pair.loss())
    for _ in range(TRAINING):
        svi.step(*pair.data)


def table() -> str:
    """Returns a row for each program: what had to change, fit against SVI, log p(x) against the truth."""
    rows = [
        (
            "program",
            "changed to train",
            "changed to score",
            "largest difference to SVI",
            "log p(x), nats a datum",
            "truth",
        )
    ]
    for program in PROGRAMS:
        pairs = [abs(a / b - 1) for a, b in zip(by_fit(made(program))["loss"], by_svi(made(program)), strict=True)]
        pair = trained(program)
        estimate = log_marginal(pair.model, pair.guide, *pair.data, num_samples=1000, progress=False)
        error = estimate.standard_error.square().sum().sqrt().item() / len(estimate.value)
        found = f"{estimate.value.mean().item():.4f} ± {error:.4f}"
        with torch.no_grad():
            truth = f"{pair.truth(*pair.data).mean().item():.4f}"
        rows.append((program.name, program.changed, program.changed_for_scores, f"{max(pairs):.1e}", found, truth))
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
