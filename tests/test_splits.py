"""Fingerprints of data sets: other data, and the same in another order, have another one."""

import numpy as np
import pytest
import torch

from pyrovae.data.splits import Split, Splits
from pyrovae.rows import Rows


def splits(x, labels=None, context=None):
    def part(rows):
        return Split(x[rows], *(None if t is None else t[rows] for t in (labels, None, context)))

    return Splits(part(slice(0, 300)), part(slice(300, 350)), part(slice(350, None)))


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-2, 1.0, 1e3, 1e6, 1e9])
    return (torch.randn(400, 5, generator=generator) + 1) * scales


def one_column(x, column):
    other = x.clone()
    other[:, column] = 5 * x[:, column].std() - x[:, column]
    return other


CHANGES = {
    "order": lambda x: x.flip(0),
    "order of the training rows": lambda x: torch.cat([x[:300].flip(0), x[300:]]),
    "columns": lambda x: x[:, [1, 0, 2, 3, 4]],
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "a row less": lambda x: x[1:],
    "a column less": lambda x: x[:, :4],
    "missing cells": lambda x: x.where(torch.arange(400).unsqueeze(1) % 3 > 0, torch.nan),
    **{f"column {column}": lambda x, column=column: one_column(x, column) for column in range(5)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_data_have_another_fingerprint(x, change):
    assert not splits(change(x)).has_fingerprint(splits(x).fingerprint())


def test_changed_labels_and_contexts_have_another_fingerprint(x):
    labels = torch.arange(400) % 10
    before = splits(x, labels, x[:, :2]).fingerprint()
    assert splits(x, labels.clone(), x[:, :2].clone()).has_fingerprint(before)
    assert not splits(x, labels.flip(0), x[:, :2]).has_fingerprint(before)
    assert not splits(x, labels, x[:, 1:3]).has_fingerprint(before)


def test_rounding_and_the_place_of_the_data_do_not_change_a_fingerprint(x):
    before = splits(x).fingerprint()
    noise = 1 + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert splits(x * noise).has_fingerprint(before), "another machine may round otherwise"
    images = torch.rand(400, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    assert splits(images + 1e-7).has_fingerprint(splits(images).fingerprint())
    whole = x.numpy()
    on_disk = [Split(Rows(whole[part]), None) for part in (slice(0, 300), slice(300, 350), slice(350, 400))]
    assert np.allclose(Splits(*on_disk).fingerprint()[0], before[0])


def test_parts_without_data_have_a_fingerprint(x):
    empty = Splits(Split(x, None), Split(x[:0], None), Split(x[:0], None))
    assert empty.has_fingerprint(empty.fingerprint())
    assert empty.fingerprint()[1:] == [[0], [0]]
