"""Generated rows of a table against held-out rows: scores by hand, and right errors where nothing is copied."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure

from pyrovae import plots
from pyrovae.data import Binary, Category, Count, Ordered, Real
from pyrovae.diagnostics import Copies, ReportInputs, SyntheticRows, Utility, synthetic_rows
from pyrovae.diagnostics.synthetic import _copies, _likeness_of_columns

COLUMNS = [Real("a", 0, 1), Category("b", ("x", "y", "z")), Real("c", 0, 1), Binary("class", ("no", "yes"))]


def rows(n: int, missing: float = 0.0) -> torch.Tensor:
    """Draws rows with two classes of normal numbers, at -1 and 1, and a column that depends on the class."""
    y = torch.bernoulli(torch.full((n,), 0.5))
    b = torch.where(torch.rand(n) < 0.7, y, 2.0)
    x = torch.stack([torch.randn(n) + 2 * y - 1, b, torch.randn(n), y], dim=1)
    return torch.where(torch.rand(n, 4) < missing, torch.nan, x) if missing else x


def test_likeness_of_columns_is_that_of_scipy_and_of_a_count():
    x, y = rows(200, missing=0.1).double().numpy(), rows(150, missing=0.1).double().numpy() + 0.3
    y[:, 1] = np.floor(y[:, 1])
    found = _likeness_of_columns(x, y, [False, True, False, False])
    for d in (0, 2):
        a, b = (v[~np.isnan(v)] for v in (x[:, d], y[:, d]))
        assert found[d].item() == pytest.approx(1 - scipy.stats.ks_2samp(a, b).statistic)
    a, b = (v[~np.isnan(v)] for v in (x[:, 1], y[:, 1]))
    assert found[1].item() == pytest.approx(1 - sum(abs((a == k).mean() - (b == k).mean()) for k in range(3)) / 2)


def test_likeness_of_pairs_by_hand():
    """Two binary columns, whose joint distributions have shares 1/2, 0, 0, 1/2 and 1/4 four times."""
    columns = [Binary("a", ("n", "y")), Binary("b", ("n", "y"))]
    same = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(20, 1)
    free = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(10, 1)
    found = synthetic_rows(same, same, free, columns)
    assert found.columns.tolist() == [1, 1] and found.columns_floor.tolist() == [1, 1]
    assert found.pair_score == pytest.approx(0.5) and found.pairs_floor[0, 1] == 1
    assert "'a' and 'b' most (0.500, real rows 1.000)" in found.verdict


def test_values_that_many_rows_have_are_told_from_those_next_to_them():
    """Half of the numbers are 0: a model that puts small numbers in their place is seen in every pair."""
    columns = [Real("a", 0, 1), Real("b", 0, 1)]
    x = torch.randn(400, 2).abs()
    zeros = torch.where(torch.arange(400).unsqueeze(1) < 200, torch.tensor([0.0, 1.0]), torch.ones(2)) * x
    near = torch.where(zeros == 0, 1e-6, zeros)
    found = synthetic_rows(zeros, zeros, near, columns)
    assert found.pairs[0, 1] == pytest.approx(0.5, abs=0.01) and found.columns[0] == pytest.approx(0.5, abs=0.01)


def test_a_classifier_reaches_the_area_of_the_two_normal_distributions():
    r"""With one normal column, the best AUROC is :math:`\Phi(\sqrt 2)` = 0.921, that of F1 :math:`\Phi(1)` = 0.841."""
    columns = [COLUMNS[0], COLUMNS[3]]
    train, held_out, generated = (rows(3000)[:, [0, 3]] for _ in range(3))
    shuffled = torch.stack([generated[:, 0], generated[torch.randperm(3000), 1]], dim=1)
    good = synthetic_rows(train, held_out, generated, columns)
    best = scipy.stats.norm.cdf([math.sqrt(2), 1])
    for scores in (good.trained_on_generated, good.trained_on_real):
        # Trees lose a little; the standard error of the area with 3,000 rows is 0.005, of the share 0.007.
        assert best[0] - 0.04 < scores.auroc < best[0] + 0.02 and best[1] - 0.05 < scores.f1 < best[1] + 0.03
    bad = synthetic_rows(train, held_out, shuffled, columns)
    # What is learned from labels without a relation ranks at random: a few tree splits, so a wide interval.
    assert abs(bad.trained_on_generated.auroc - 0.5) < 0.2 and "loses" in bad.verdict


def test_distances_are_those_of_all_pairs():
    train, held_out, generated = (rows(40, missing=0.1).double().numpy() for _ in range(3))
    found = _copies(train, held_out, generated, [False, True, False, True])
    assert isinstance(found, Copies)
    pooled = np.concatenate([train, held_out])

    def rank(d, v):
        """The share of real values below, and half of those that are equal, as between neighbours on a line."""
        known = np.sort(pooled[:, d][~np.isnan(pooled[:, d])])
        return np.interp(v, known, (np.arange(len(known)) + 0.5) / len(known))

    def distance(x, y):
        total = 0.0
        for d, (u, v) in enumerate(zip(x, y, strict=True)):
            if d in (1, 3):
                total += float(u != v and not (np.isnan(u) and np.isnan(v)))
            else:
                a, b = (-1.0 if np.isnan(w) else rank(d, w) for w in (u, v))
                total += abs(a - b)
        return total

    nearest = [min(distance(x, y) for y in train) for x in generated]
    other = [min(distance(x, y) for y in held_out) for x in generated]
    assert found.generated == pytest.approx(np.median(nearest), rel=1e-5)
    share = np.mean([1.0 if p < q else 0.5 if p == q else 0.0 for p, q in zip(nearest, other, strict=True)])
    assert found.share == pytest.approx(share, abs=0.026), "a tie may be broken by rounding"


def test_the_error_of_the_share_is_right_where_nothing_is_copied():
    """Over 60 repetitions the share less 1/2, in standard errors, has variance 1: standard error sqrt(2 / 60)."""
    z = []
    for _ in range(60):
        train, held_out, generated = (rows(150).double().numpy() for _ in range(3))
        found = _copies(train, held_out, generated, [False, True, False, True])
        z.append((found.share - 0.5) / found.standard_error)
    assert abs(np.mean(z)) < 4 / math.sqrt(60)
    assert abs(np.var(z) - 1) < 4 * math.sqrt(2 / 60)


def test_copies_are_found():
    train, held_out, fresh = rows(400), rows(400), rows(400)
    copied = torch.cat([train[:200], fresh[:200]])
    found = synthetic_rows(train, held_out, copied, COLUMNS)
    assert 0.5 <= found.copies.equal < 0.52 and found.copies.equal_held_out < 0.05
    assert found.copies.share > 0.7 and "the model copies rows" in found.verdict
    assert "copies" not in synthetic_rows(train, held_out, fresh, COLUMNS).verdict.replace("none are copied", "")


def test_missing_cells():
    train, held_out, generated = rows(300, missing=0.2), rows(300, missing=0.2), rows(300)
    found = synthetic_rows(train, held_out, generated, COLUMNS)
    assert found.missing.allclose(-held_out.isnan().double().mean(0))
    assert found.column_score > 0.9, "missing cells are left out of the comparison"
    train[:, 0] = held_out[:, 0] = torch.nan
    assert synthetic_rows(train, held_out, generated, COLUMNS).columns[0] == 0


def test_a_column_of_a_single_class():
    x = rows(60)
    x[:, 3] = 1
    held_out = rows(60)
    found = synthetic_rows(rows(60), held_out, x, COLUMNS, target="class")
    share = held_out[:, 3].mean().item()  # that of the only class that is predicted, so the precision of it
    assert found.trained_on_generated == pytest.approx(Utility(share / (1 + share), 0.5)), "F1 is 0 of the other class"
    assert synthetic_rows(rows(60), x, rows(60), COLUMNS).trained_on_generated is None
    assert synthetic_rows(rows(60)[:, :1], rows(60)[:, :1], rows(60)[:, :1], COLUMNS[:1]).pair_score == 1


def test_the_result_prints_draws_and_sums_up(tmp_path):
    columns = [*COLUMNS[:3], Ordered("a class with a long name, which is cut here", (0, 1))]
    found = SyntheticRows.for_report(
        ReportInputs(print, print, rows(80), rows(90), held_out=True, columns=columns, generated=rows(100))
    )
    assert found.size == 80 and found.target == columns[3].name
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80 and " ".join(str(found).split()).endswith(found.verdict)
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["verdict"] == found.verdict and summary["columns"]["a"] == found.columns[0].item()
    assert isinstance(plots.synthetic_rows(found, tmp_path / "picture.png"), Figure)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused():
    x = rows(50)
    with pytest.raises(ValueError, match="generated must have at least 30 rows and the 4 columns"):
        synthetic_rows(x, x, x[:20], COLUMNS)
    with pytest.raises(ValueError, match="held_out must have"):
        synthetic_rows(x, x[:, :3], x, COLUMNS)
    with pytest.raises(ValueError, match="target must be a discrete column.*'b', 'class'.*got 'a'"):
        synthetic_rows(x, x, x, COLUMNS, target="a")
    with pytest.raises(ValueError, match="no table"):
        SyntheticRows.for_report(ReportInputs(print, print, x, x, held_out=True))
    assert synthetic_rows(x[:, [0, 2]], x[:, [0, 2]], x[:, [0, 2]], [Real("a", 0, 1), Count("c", 1, 1)]).target is None
