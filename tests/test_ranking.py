"""Rankings of unseen items: against a hand computation, scikit-learn, and the mean over all orders of equal scores."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy.sparse import coo_array, csr_array, csr_matrix
from sklearn.metrics import ndcg_score
from torch import nn

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.diagnostics import Ranking, RankingDifference, ranking


def random_users(num_users: int, num_items: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns seen and held-out items, at least one of the latter for each user."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(5, (num_users, num_items), generator=generator)
    kind[:, 0] = 1
    return (kind == 0).float(), (kind == 1).float()


def test_by_hand():
    # User 0 has seen item 0. The others in order of their scores: 3 (held out), 1, 4 (held out), 2 (held out).
    # User 1 has seen nothing. In order: 0, 1 (held out), 2, 3, 4.
    seen = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    held_out = torch.tensor([[0, 0, 1.0, 1, 1], [0, 1, 0, 0, 0]])
    scores = torch.tensor([[99.0, 3, 1, 4, 2], [5, 4, 3, 2, 1]])
    found = ranking(lambda x: scores, seen, held_out, ndcg=[2, 3, 100], recall=[1, 2, 3, 100])
    second, third, fourth = 1 / math.log2(3), 1 / math.log2(4), 1 / math.log2(5)
    expected = {
        "NDCG@2": [1 / (1 + second), second],
        "NDCG@3": [(1 + third) / (1 + second + third), second],
        "NDCG@100": [(1 + third + fourth) / (1 + second + third), second],
        "Recall@1": [1, 0],
        "Recall@2": [1 / 2, 1],
        "Recall@3": [2 / 3, 1],
        "Recall@100": [1, 1],
    }
    assert {name: x.tolist() for name, x in found.values.items()} == {
        name: pytest.approx(x, abs=1e-15) for name, x in expected.items()
    }


@pytest.mark.parametrize("num_levels", [2, 5, 10**9])
def test_ndcg_is_that_of_scikit_learn(num_levels):
    # Which averages over the orders of equal scores too.
    seen, held_out = random_users(40, 30)
    scores = torch.randint(num_levels, (40, 30)).double()
    found = ranking(lambda x: scores, seen, held_out, ndcg=[1, 3, 10, 30, 50], recall=[])
    for k in (1, 3, 10, 30, 50):
        unseen = [row == 0 for row in seen.numpy()]
        expected = [
            ndcg_score([h[u]], [s[u]], k=k) for u, h, s in zip(unseen, held_out.numpy(), scores.numpy(), strict=True)
        ]
        assert found.values[f"NDCG@{k}"].numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_equal_scores_give_the_mean_over_all_orders():
    seen = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0]])
    held_out = torch.tensor([[1.0, 0, 0, 1, 0, 0, 1]])
    scores = [3.0, 7.0, 2.0, 2.0, 2.0, 5.0, 1.0]
    orders = [
        order
        for order in itertools.permutations([0, 2, 3, 4, 5, 6])
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    assert len(orders) == math.factorial(3)
    found = ranking(lambda x: torch.tensor([scores]), seen, held_out, ndcg=[1, 3, 4, 6], recall=[1, 3, 4, 6])
    for k in (1, 3, 4, 6):
        hits = np.array([[float(item in (0, 3, 6)) for item in order[:k]] for order in orders])
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, 3) + 1))
        ndcg = (hits / np.log2(np.arange(2, k + 2))).sum(1).mean() / ideal
        assert found.values[f"NDCG@{k}"].item() == pytest.approx(ndcg, abs=1e-15)
        assert found.values[f"Recall@{k}"].item() == pytest.approx(hits.sum(1).mean() / min(k, 3), abs=1e-15)


def test_the_number_of_an_item_has_no_influence():
    seen, held_out = random_users(20, 15)
    weights = torch.randint(4, (15, 15)).float()
    order = torch.randperm(15)
    first = ranking(lambda x: x @ weights, seen, held_out, ndcg=[3], recall=[3])
    second = ranking(lambda x: x @ weights[order][:, order], seen[:, order], held_out[:, order], ndcg=[3], recall=[3])
    for name, x in first.values.items():
        torch.testing.assert_close(x, second.values[name])


def test_a_constant_score_has_the_recall_of_chance():
    # k of the u unseen items: each held-out item is among them with probability k / u.
    seen, held_out = random_users(50, 40)
    found = ranking(torch.zeros_like, seen, held_out, ndcg=[], recall=[5])
    n, unseen = held_out.sum(1), (seen == 0).sum(1)
    torch.testing.assert_close(found.values["Recall@5"], (n * 5 / unseen / n.clamp(max=5)).double())


@pytest.mark.parametrize("kind", [csr_array, csr_matrix, coo_array, np.float64, lambda x: torch.tensor(x)])
def test_every_kind_of_matrix_gives_the_same(kind):
    seen, held_out = random_users(23, 12)
    scores = torch.randn(12, 12)
    expected = ranking(lambda x: x @ scores, seen, held_out)
    found = ranking(
        lambda x: (x @ scores).numpy(), kind(seen.numpy()), kind(3 * held_out.numpy().astype(np.int64)), batch_size=5
    )
    for name, x in expected.values.items():
        torch.testing.assert_close(x, found.values[name], rtol=0, atol=0)


def test_scores_of_seen_items_have_no_influence():
    seen, held_out = random_users(10, 12)
    scores = torch.randn(10, 12)
    expected = ranking(lambda x: scores, seen, held_out)
    for value in (1e30, -math.inf, math.nan):
        found = ranking(lambda x, value=value: scores.masked_fill(x != 0, value), seen, held_out)
        assert all(x.equal(found.values[name]) for name, x in expected.values.items())


def test_a_function_may_change_what_it_is_given():
    seen, held_out = random_users(10, 12)
    scores, before = torch.randn(10, 12), seen.clone()
    expected = ranking(lambda x: scores, seen, held_out)
    for rows in (seen, seen.numpy()):
        found = ranking(lambda x: scores + 0 * x.zero_(), rows, held_out)
        assert all(x.equal(found.values[name]) for name, x in expected.values.items())
        assert seen.equal(before)


def test_errors_of_means_and_of_differences():
    a, b = torch.rand(30, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    first, second = Ranking({"NDCG@5": a}), Ranking({"NDCG@5": b})
    assert first.mean("NDCG@5") == pytest.approx(np.mean(a.numpy()))
    assert first.standard_error("NDCG@5") == pytest.approx(np.std(a.numpy(), ddof=1) / math.sqrt(30))
    difference = first.minus(second)["NDCG@5"]
    assert isinstance(difference, RankingDifference)
    gaps = (a - b).numpy()
    assert difference.mean == pytest.approx(gaps.mean())
    assert difference.standard_error == pytest.approx(gaps.std(ddof=1) / math.sqrt(30))
    assert str(first) == (
        f"NDCG@5 {a.mean():.4f} ± {a.std() / math.sqrt(30):.4f} (mean and standard error over 30 users)"
    )
    with pytest.raises(ValueError, match="other metrics or users"):
        first.minus(Ranking({"NDCG@5": a[:20]}))
    with pytest.raises(ValueError, match="other metrics or users"):
        first.minus(Ranking({"NDCG@6": a}))


def test_a_vae_is_scored_in_evaluation_mode_and_without_gradients():
    seen, held_out = random_users(30, 12)
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 4))
    vae = VAE(priors.StandardNormal(2), likelihoods.Multinomial(2, 12), encoders.DiagonalNormal(12, 2, network=network))
    assert network.training

    def scores(x):
        assert not torch.is_grad_enabled()
        return vae.likelihood(vae.encoder(x).mean).logits

    first, second = (ranking(scores, seen, held_out, batch_size=n) for n in (30, 7))
    for name, x in first.values.items():
        torch.testing.assert_close(x, second.values[name])
    assert network.training


SEEN, HELD_OUT = random_users(4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seen": SEEN[:3]}, "seen and held_out must have one shape, (users, items), got (3, 6) and (4, 6)"),
        ({"seen": SEEN[0], "held_out": HELD_OUT[0]}, "must have one shape"),
        ({"seen": SEEN[:0], "held_out": HELD_OUT[:0]}, "must have one shape"),
        ({"seen": SEEN.index_fill(1, torch.tensor(0), 1)}, "item 0 of user 0 is both seen and held out"),
        ({"held_out": HELD_OUT.index_fill(0, torch.tensor(2), 0), "batch_size": 2}, "user 2 has no held-out item"),
        ({"seen": SEEN.index_fill(0, torch.tensor(3), math.nan)}, "seen holds NaN or infinity in row 3"),
        ({"held_out": HELD_OUT.index_fill(0, torch.tensor(3), math.inf)}, "held_out holds NaN or infinity in row 3"),
        ({"scores": lambda x: x[:, :5]}, "one score an item, (4, 6) for a batch of 4 users; it returned (4, 5)"),
        ({"scores": lambda x: x.sum(0)}, "it returned (6,)"),
        ({"scores": lambda x: (1 - x).log() - math.inf}, "score of item 0 for user 0 is -inf. Return a finite score"),
        ({"scores": lambda x: x * math.nan}, "score of item 0 for user 0 is nan"),
        ({"ndcg": [0]}, "ndcg must hold integers of at least 1, got 0"),
        ({"recall": [2.5]}, "recall must hold integers of at least 1, got 2.5"),
        ({"ndcg": [], "recall": []}, "there is no metric"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_what_has_no_value_is_refused(arguments, message):
    call = {"scores": lambda x: 1.0 + x, "seen": SEEN, "held_out": HELD_OUT} | arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        ranking(call.pop("scores"), call.pop("seen"), call.pop("held_out"), **call)
