"""Recommendations: films that a user has not seen, ranked by VAEs and by EASE, nearest neighbours and popularity.

    python examples/recommend.py --data u.data

`u.data` is in https://grouplens.org/datasets/movielens/100k. Ratings of 4 and 5 count as one, all others as none. The
models learn from 688 users; of 150 others they see four fifths of the films, and rank the rest. This is repeated for
five random choices of the users. Each model has its settings from 100 further users. NDCG@100 and Recall@20 are as in
Liang et al. 2018 (https://arxiv.org/abs/1802.05814), with standard errors over users; a user who is tested more than
once counts once.

The first VAE is that paper's Mult-VAE. The second is linear, and learns to predict what it is not given: a random part
of a user's films is the context, and the rest are the data. The third has EASE (Steck 2019,
https://arxiv.org/abs/1905.03375) as a fixed term in its logits, so that the latents learn what EASE lacks. The last row
is the mean of three of them.
"""

import argparse
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from torch.nn import functional as F

import pyrovae
from pyrovae import bounds, data, encoders, likelihoods, nn, priors
from pyrovae.diagnostics import Ranking, ranking

LATENT_DIM, BATCH_SIZE = 64, 64


# Baselines: functions of what a user has seen.


def popularity(x):
    counts = x.sum(0)
    return lambda seen: counts.expand_as(seen)


def item_knn(x, neighbours):
    """The items most similar to those that were seen, by the cosine of their columns."""
    similarity = F.normalize(x, dim=0).T @ F.normalize(x, dim=0)
    similarity.fill_diagonal_(0)
    nearest = similarity.topk(neighbours, dim=0)
    similarity = torch.zeros_like(similarity).scatter_(0, nearest.indices, nearest.values)
    return lambda seen: seen @ similarity


def ease_weights(x, penalty):
    """The matrix B with a diagonal of zeros that minimises |x - x B|^2 + penalty |B|^2."""
    inverse = torch.linalg.inv(x.T.double() @ x.double() + penalty * torch.eye(x.shape[1]))
    return (inverse / -inverse.diagonal()).fill_diagonal_(0).float()


def ease(x, penalty):
    weights = ease_weights(x, penalty)
    return lambda seen: seen @ weights


# Mult-VAE: the decoder gives all films of a user, and the encoder sees half of them.


class NormalizedInput(torch.nn.Module):
    """Scales each row to length one, and drops half of it in training, before another network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(F.dropout(F.normalize(x, dim=-1), 0.5, self.training))


def mult_vae(x, args):
    network = partial(nn.MLP, hidden=(args.hidden,), activation=torch.nn.Tanh)
    num_items = x.shape[1]
    return pyrovae.VAE(
        priors.StandardNormal(args.latent_dim),
        likelihoods.Multinomial(args.latent_dim, num_items, network=network).start_at(x),
        encoders.DiagonalNormal(num_items, args.latent_dim, network=lambda n, m: NormalizedInput(network(n, m))),
    )


def mult_vae_scores(vae, seen):
    return vae.decode(vae.encode(seen).mean).logits


# The conditional VAE p(z) p(rest | z, seen) with the guide q(z | seen).


class SeenEncoder(torch.nn.Module):
    """A normal posterior given what was seen; the rest, x, has no part in it."""

    def __init__(self, num_items):
        super().__init__()
        self.x_shape, self.latent_dim = (num_items,), LATENT_DIM
        self.network = torch.nn.Linear(num_items, 2 * LATENT_DIM)

    def forward(self, x, seen):
        loc, raw = self.network(F.normalize(seen, dim=-1)).chunk(2, dim=-1)
        return dist.Normal(loc, F.softplus(raw) + 1e-4).to_event(1)


class RestDecoder(torch.nn.Module):
    """Logits that are linear in z and in what was seen, the latter by fixed weights; nothing is drawn again."""

    def __init__(self, num_items, weights):
        super().__init__()
        self.linear, self.scale = torch.nn.Linear(LATENT_DIM, num_items), torch.nn.Parameter(torch.tensor(30.0))
        self.register_buffer("weights", weights)

    def forward(self, z, seen):
        logits = self.linear(z)
        if self.weights is not None:
            logits = logits + self.scale * F.normalize(seen, dim=-1) @ self.weights
        return logits.masked_fill(seen > 0, -1e4)


def rest_vae(x, args, weights=None):
    num_items = x.shape[1]
    decoder = RestDecoder(num_items, weights)
    likelihood = likelihoods.Multinomial(LATENT_DIM, num_items, network=decoder, context_dim=num_items)
    nn.set_output_bias(decoder.linear, likelihood.output_for(x))
    return pyrovae.VAE(priors.StandardNormal(LATENT_DIM), likelihood, SeenEncoder(num_items))


def rest_vae_scores(vae, seen):
    return vae.decode(vae.encode(seen, seen).mean, seen).logits


def split_films(x):
    """Returns a random part of each user's films, from a fifth to four fifths of them, and before it the rest."""
    hidden = torch.rand_like(x) < 0.2 + 0.6 * torch.rand(len(x), 1)
    return x * hidden, x * ~hidden


def train(vae, scores, splits, args, epochs, transform=None, **optimizer):
    """Trains a VAE, and returns its scores with the weights of the best epoch by NDCG of the validation users."""
    best = {"value": -1.0, "weights": None}

    def keep_best(history):
        if len(history) % args.every == 0:
            value = evaluate(partial(scores, vae), splits.validation).mean("NDCG@100")
            if value > best["value"]:
                best.update(value=value, weights=deepcopy(vae.state_dict()))

    steps = epochs * -(-splits.train.shape[0] // BATCH_SIZE)
    pyrovae.fit(
        vae.model,
        vae.guide,
        splits.train,
        transform=transform,
        loss=bounds.ELBO(beta=bounds.Linear(max(1, steps // 2), end=0.2)),
        batch_size=BATCH_SIZE,
        epochs=epochs,
        optimizer=partial(torch.optim.AdamW, fused=True, **optimizer),
        callbacks=[keep_best],
        progress=False,
    )
    vae.load_state_dict(best["weights"])
    return partial(scores, vae)


def evaluate(scores, users):
    return ranking(scores, users.seen, users.held_out, ndcg=[100], recall=[20])


def best_of(functions, splits):
    return max(functions, key=lambda f: evaluate(f, splits.validation).mean("NDCG@100"))


def run(ratings, seed, args):
    """Trains all models on one choice of users; returns the metrics of the test users by model, and their names."""
    splits = data.hold_out_users(ratings, validation=args.validation, test=args.test, seed=seed)
    x = torch.from_numpy(splits.train.toarray())
    pyro.set_rng_seed(seed)

    penalties = {penalty: ease(x, penalty) for penalty in (30.0, 100.0, 200.0, 300.0, 500.0)}
    models = {
        "popularity": popularity(x),
        "item-kNN": best_of([item_knn(x, k) for k in (20, 50, 100, 200) if k < x.shape[1]], splits),
        "EASE": best_of(penalties.values(), splits),
    }
    penalty = next(p for p, f in penalties.items() if f is models["EASE"])

    vae = mult_vae(x, args)
    models["Mult-VAE"] = train(vae, mult_vae_scores, splits, args, args.epochs, lr=1e-3, weight_decay=0.0)
    if seed == 0:  # of all films of the test users, by the model that has them as its data
        everything = splits.test.seen + splits.test.held_out
        estimate = pyrovae.log_marginal(vae.model, vae.guide, everything, num_samples=args.num_samples, progress=False)
        print(f"Mult-VAE: test {estimate}", flush=True)

    train_rest = partial(
        train, scores=rest_vae_scores, splits=splits, args=args, epochs=args.epochs, transform=split_films
    )
    models["VAE of the rest"] = train_rest(rest_vae(x, args), lr=3e-3, weight_decay=0.1)
    members = [
        train_rest(rest_vae(x, args, ease_weights(x, penalty)), lr=3e-3, weight_decay=0.1) for _ in range(args.members)
    ]
    models["... with EASE term"] = members[0]
    models[f"... mean of {args.members}"] = lambda seen: sum(f(seen).log_softmax(-1) for f in members)
    return {name: evaluate(f, splits.test) for name, f in models.items()}, splits.test.users


def by_user(found, users):
    """Returns one ranking of all seeds: the mean metrics of each user over the seeds that test this user."""
    _, row = np.unique(np.concatenate(users), return_inverse=True)
    values = {name: torch.cat([part.values[name] for part in found]).numpy() for name in found[0].values}
    return Ranking({name: torch.from_numpy(np.bincount(row, x) / np.bincount(row)) for name, x in values.items()})


def print_table(results):
    found, users = zip(*results, strict=True)
    rankings = {name: by_user([part[name] for part in found], users) for name in found[0]}
    count = len(rankings["EASE"].values["NDCG@100"])
    print(f"{len(results)} choices of {len(users[0])} test users, {count} different ones; ± standard errors over users")
    print(f"{'':20s}{'NDCG@100':>16s}{'Recall@20':>19s}{'NDCG less EASE':>21s}")
    for name, r in rankings.items():
        cells = [f"{r.mean(k):.4f} ± {r.standard_error(k):.4f}" for k in ("NDCG@100", "Recall@20")]
        difference = r.minus(rankings["EASE"])["NDCG@100"]
        gap = "" if name == "EASE" else f"{difference.mean:+.4f} ± {difference.standard_error:.4f}"
        print(f"{name:20s}{cells[0]:>16s}{cells[1]:>19s}{gap:>21s}")


def made_up_ratings(path):
    """Writes ratings of 120 users, who like the films of two of six genres."""
    likes = torch.rand(120, 6).argsort(1) < 2
    chance = torch.where(likes[:, torch.arange(60) % 6], 0.5, 0.05)
    rated = torch.bernoulli(chance).nonzero().tolist()
    path.write_text("user|item|rating|timestamp\n" + "".join(f"{u}|{i}|{4 + u % 2}|0\n" for u, i in rated))


def main(args):
    if args.smoke:
        pyro.set_rng_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            made_up_ratings(Path(folder, "made-up.data"))
            ratings = data.load_ratings(Path(folder, "made-up.data"), threshold=4, min_ratings=5)
    else:
        ratings = data.load_ratings(args.data, threshold=4, min_ratings=5)
    print_table([run(ratings, seed, args) for seed in range(args.seeds)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("u.data"), help="file of users, films and ratings")
    parser.add_argument("--seeds", type=int, default=5, help="random choices of users")
    parser.add_argument("--validation", type=int, default=100, help="users to choose settings by")
    parser.add_argument("--test", type=int, default=150, help="users to test on")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--every", type=int, default=10, help="epochs between two validations")
    parser.add_argument("--members", type=int, default=3, help="VAEs in the last row")
    parser.add_argument("--hidden", type=int, default=600, help="hidden units of Mult-VAE")
    parser.add_argument("--latent-dim", type=int, default=200, help="latent dimensions of Mult-VAE")
    parser.add_argument("--num-samples", type=int, default=100, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds, with made-up ratings")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.validation, args.test, args.epochs, args.every, args.members = 2, 20, 20, 2, 1, 2
        args.hidden, args.latent_dim = 20, 4
    main(args)
