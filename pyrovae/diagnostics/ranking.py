"""How well scores rank the items that a user has not seen: NDCG and recall, for any function that scores items."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from pyrovae.inference.messages import is_integer
from pyrovae.inference.running import evaluation_mode
from pyrovae.rows import is_sparse

if TYPE_CHECKING:
    from scipy.sparse import sparray, spmatrix

__all__ = ["Ranking", "RankingDifference", "ranking"]

Rows = Union[Tensor, np.ndarray, "spmatrix", "sparray"]


class RankingDifference(NamedTuple):
    """The difference of one metric between two rankings of the same users.

    Args:
        mean: the mean over users, the first minus the second.
        standard_error: its standard error over users, from the differences.
    """

    mean: float
    standard_error: float


class Ranking(NamedTuple):
    """How well scores rank the held-out items of each user, from :func:`ranking`.

    Args:
        values: the metrics of each user, ``(users,)``, by name: ``"NDCG@100"``, ``"Recall@20"`` and so on.
    """

    values: dict[str, Tensor]

    def mean(self, name: str) -> float:
        """Returns the mean of a metric over users."""
        return self.values[name].mean().item()

    def standard_error(self, name: str) -> float:
        """Returns the standard error of the mean over users; NaN for one user."""
        return _standard_error(self.values[name])

    def minus(self, other: "Ranking") -> dict[str, RankingDifference]:
        """Returns the differences to another ranking of the same users, in the same order, paired by user.

        Users who are hard for one function are mostly hard for the other: the error of the mean difference is smaller
        than those of the means.

        Raises:
            ValueError: when the numbers of users or the metrics differ.
        """
        shapes = [{name: len(x) for name, x in each.values.items()} for each in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the rankings have other metrics or users (number of users by metric: {shapes[0]} and {shapes[1]}). "
                "Rank the same users by the same metrics."
            )
        gaps = {name: x - other.values[name] for name, x in self.values.items()}
        return {name: RankingDifference(d.mean().item(), _standard_error(d)) for name, d in gaps.items()}

    def __str__(self) -> str:
        count = len(next(iter(self.values.values())))
        metrics = [f"{name} {self.mean(name):.4f} ± {self.standard_error(name):.4f}" for name in self.values]
        return f"{', '.join(metrics)} (mean and standard error over {count:,} users)"


def ranking(
    scores: Callable[[Tensor], Any],
    seen: Rows,
    held_out: Rows,
    *,
    ndcg: Sequence[int] = (100,),
    recall: Sequence[int] = (20, 50),
    batch_size: int = 500,
) -> Ranking:
    r"""Ranks the items that each user has not seen by their scores, and compares with the items held out.

    .. math:: \mathrm{Recall@}k = \frac{1}{\min(k, n)} \sum_{i \in H} \mathbb{1}[r_i \le k], \qquad
        \mathrm{NDCG@}k = \frac{\sum_{i \in H} \mathbb{1}[r_i \le k] / \log_2(r_i + 1)}
        {\sum_{r=1}^{\min(k, n)} 1 / \log_2(r + 1)}

    H is the set of the n held-out items of a user, and :math:`r_i` is the rank of item i, from 1, among all items that
    the user has not seen. Items with equal scores have no order: a metric is then its mean over all orders of them, so
    that it does not depend on how items are numbered.

    Args:
        scores: returns the scores of all items, ``(batch, items)``, for a batch of rows of `seen`, a float tensor of
            the same shape (a copy). It runs without gradients and in evaluation mode. For a VAE, ``lambda x:
            vae.decode(vae.encode(x).mean).logits``. Scores of seen items are not used.
        seen: what each user has seen, ``(users, items)``: a tensor, an array or a sparse matrix of scipy, zero where
            the user has not seen the item.
        held_out: the items to be found, of the same shape; whatever is not zero counts as one item.
        ndcg: the cut-offs k of NDCG.
        recall: the cut-offs k of recall.
        batch_size: users scored at once.

    Returns:
        A :class:`Ranking`, with the metrics of every user.

    Raises:
        ValueError: when `seen` and `held_out` differ in shape, hold NaN or infinity, or share an item of a user; when a
            user has no held-out item, so that both metrics are undefined; when scores have another shape, or are NaN
            or infinite for an item that was not seen; when a cut-off is not an integer of at least 1.

    References:
        Variational Autoencoders for Collaborative Filtering, D. Liang, R. G. Krishnan, M. D. Hoffman and T. Jebara,
        2018, https://arxiv.org/abs/1802.05814 (section 4.2); Computing Information Retrieval Performance Measures
        Efficiently in the Presence of Tied Scores, F. McSherry and M. Najork, 2008,
        https://doi.org/10.1007/978-3-540-78646-7_38.

    >>> seen = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    >>> held_out = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    >>> popularity = torch.tensor([9.0, 5.0, 7.0, 1.0])
    >>> found = ranking(lambda x: popularity.expand_as(x), seen, held_out, ndcg=[2], recall=[1])
    >>> found.values["NDCG@2"], found.values["Recall@1"]
    (tensor([0.6309, 0.6131], dtype=torch.float64), tensor([0., 1.], dtype=torch.float64))
    """
    cutoffs = [("NDCG", k) for k in ndcg] + [("Recall", k) for k in recall]
    for name, k in cutoffs:
        if not is_integer(k) or k < 1:
            raise ValueError(f"{name.lower()} must hold integers of at least 1, got {k!r}.")
    if not cutoffs:
        raise ValueError("there is no metric: give at least one cut-off, in ndcg or in recall.")
    if not is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    if len(seen.shape) != 2 or seen.shape != held_out.shape or 0 in seen.shape:
        raise ValueError(
            "seen and held_out must have one shape, (users, items), got "
            f"{tuple(seen.shape)} and {tuple(held_out.shape)}."
        )
    seen, held_out = _by_rows(seen), _by_rows(held_out)
    parts: dict[str, list[Tensor]] = {f"{name}@{k}": [] for name, k in cutoffs}
    for start in range(0, seen.shape[0], batch_size):
        x, targets = _dense("seen", seen, start, batch_size), _dense("held_out", held_out, start, batch_size)
        known, relevant = x != 0, targets.to(x.device) != 0
        _check_users(known, relevant, start)
        with torch.no_grad(), evaluation_mode():
            s = _checked_scores(scores(x), known, start)
        num_better, num_tied, user = _places(s, relevant)
        count = relevant.sum(1)
        for name, k in cutoffs:
            gains = _gains(name, k, x.shape[1], x.device)
            # An item among t equal ones, below b better ones, has the mean gain of the ranks b + 1, ..., b + t.
            gain = (gains[num_better + num_tied] - gains[num_better]) / num_tied
            total = torch.zeros(len(x), dtype=torch.float64, device=x.device).index_add_(0, user, gain)
            parts[f"{name}@{k}"].append((total / gains[count.clamp(max=k)]).cpu())
    return Ranking({name: torch.cat(x) for name, x in parts.items()})


def _standard_error(x: Tensor) -> float:
    return x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


def _by_rows(x: Any) -> Any:
    """Returns an array, a tensor, or a sparse matrix in a format that is cut by rows."""
    return x.tocsr() if is_sparse(x) else x


def _dense(name: str, rows: Any, start: int, size: int) -> Tensor:
    """Returns a copy of some rows, which a function may change."""
    part = rows[start : start + size]
    if isinstance(part, Tensor):
        part = part.detach().clone()
    else:
        part = torch.from_numpy(part.toarray() if is_sparse(part) else np.array(part))
        part = part.to(torch.get_default_dtype())
    part = part if part.is_floating_point() else part.to(torch.get_default_dtype())
    bad = (~part.isfinite()).any(1).nonzero()
    if len(bad):
        raise ValueError(f"{name} holds NaN or infinity in row {start + int(bad[0])}. Mark what is not there by zero.")
    return part


def _check_users(seen: Tensor, relevant: Tensor, start: int) -> None:
    both = (seen & relevant).nonzero()
    if len(both):
        row, item = both[0].tolist()
        raise ValueError(
            f"item {item} of user {start + row} is both seen and held out: a function that returns what it sees would "
            "find it. Remove it from one of them."
        )
    empty = (~relevant.any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"user {start + int(empty[0])} has no held-out item, so that the metrics are undefined. Leave out such "
            "users, from seen and from held_out."
        )


def _checked_scores(scores: Any, seen: Tensor, start: int) -> Tensor:
    """Returns scores with minus infinity for the items that were seen."""
    s = torch.as_tensor(scores).to(seen.device)
    if s.shape != seen.shape:
        raise ValueError(
            f"scores must return one score an item, {tuple(seen.shape)} for a batch of {len(seen)} users; it returned "
            f"{tuple(s.shape)}."
        )
    s = s if s.is_floating_point() else s.double()
    bad = (~s.isfinite() & ~seen).nonzero()
    if len(bad):
        row, item = bad[0].tolist()
        raise ValueError(
            f"the score of item {item} for user {start + row} is {s[row, item].item()}. Return a finite score for "
            "every item that was not seen, such as logits in place of logarithms of probabilities."
        )
    return s.masked_fill(seen, -math.inf)


def _places(scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for each relevant item, how many items are better, how many are equal (itself too), and its row."""
    in_order = (-scores).sort(1).values  # rising, with the seen items at the end
    wanted = -scores
    better = torch.searchsorted(in_order, wanted.contiguous())
    not_worse = torch.searchsorted(in_order, wanted.contiguous(), right=True)
    row, item = relevant.nonzero(as_tuple=True)
    return better[row, item], (not_worse - better)[row, item], row


def _gains(metric: str, k: int, num_items: int, device: torch.device) -> Tensor:
    """Returns the sum of the gains of the first r ranks, for r from 0 to `num_items`; ranks beyond k have none."""
    ranks = torch.arange(1, num_items + 1, dtype=torch.float64, device=device)
    gains = (ranks <= k).double() / ((ranks + 1).log2() if metric == "NDCG" else 1.0)
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)])
