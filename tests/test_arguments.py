"""Arguments of models and guides of every kind: cut by rows if they have rows, refused if they are ambiguous.

The pair has linear, Gaussian latents with a known posterior: a guide that draws from it has equal weights, log p(x)
exactly. Each datum has its own offset, so that wrong rows change log p(x).
"""

import collections
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from pyrovae import VAE, fit, impute, log_marginal
from pyrovae.arguments import Arguments, canonicalize, in_memory, take_rows
from pyrovae.diagnostics import calibration, collapse, gaps, latent_map, quality, reliability, sharpness
from pyrovae.encoders import DiagonalNormal
from pyrovae.estimators import ImportanceSampling
from pyrovae.inference.messages import check_finite, check_rows
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.priors import StandardNormal
from pyrovae.rows import Rows as ArrayRows
from pyrovae.structures import MissingDataVAE

N = 40
train = partial(fit, progress=False)


class Pair:
    """x = z W + offset + noise; `read` finds x and the offsets in whatever both are called with."""

    def __init__(self, read):
        generator = torch.Generator().manual_seed(0)
        self.read = read
        self.w = torch.randn(2, 5, generator=generator)
        self.offsets = torch.linspace(-2, 2, N)
        z, noise = (torch.randn(N, d, generator=generator) for d in (2, 5))
        self.x = z @ self.w + self.offsets[:, None] + 0.5 * noise
        self.covariance = torch.linalg.inv(torch.eye(2) + self.w @ self.w.T / 0.25)
        self.shift = nn.Parameter(torch.zeros(2))

    def truth(self) -> Tensor:
        w = self.w.double()
        p = torch.distributions.MultivariateNormal(torch.zeros(5).double(), w.T @ w + 0.25 * torch.eye(5).double())
        return p.log_prob((self.x - self.offsets[:, None]).double())

    def model(self, *args: Any, **kwargs: Any) -> None:
        x, offsets = self.read(*args, **kwargs)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w + offsets[:, None], 0.5).to_event(1), obs=x)

    def guide(self, *args: Any, **kwargs: Any) -> None:
        x, offsets = self.read(*args, **kwargs)
        pyro.param("shift", self.shift)
        mean = (x - offsets[:, None]) @ self.w.T @ self.covariance / 0.25 + self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, self.covariance))


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.get_default_dtype())


class Column:
    """What pandas' Series is to us."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


Both = collections.namedtuple("Both", "x offsets")


def packed_offsets(packed: PackedSequence) -> Tensor:
    """The offset of a datum is the mean of a sequence of it, times zero to six."""
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return padded.sum(1) / lengths


# How x and offsets are given, and how they are read.
KINDS = {
    "tensors": (lambda x, o: ((x, o), {}), lambda x, o: (x, o)),
    "a keyword": (lambda x, o: ((x,), {"offsets": o}), lambda x, *, offsets: (x, offsets)),
    "keywords alone": (lambda x, o: ((), {"x": x, "offsets": o}), lambda *, x, offsets: (x, offsets)),
    "arrays": (lambda x, o: ((x.numpy(), o.double().numpy()), {}), lambda x, o: (x, o)),
    "an array after a tensor": (lambda x, o: ((x, o.numpy()), {}), lambda x, o: (x, o)),
    "a column": (lambda x, o: ((x, Column(o.double().numpy())), {}), lambda x, o: (x, o)),
    "a list of numbers": (lambda x, o: ((x, o.tolist()), {}), lambda x, o: (x, floats(o))),
    "a list of numbers first": (lambda x, o: ((o.tolist(), x), {}), lambda o, x: (x, floats(o))),
    "a tuple of tensors without dimensions": (lambda x, o: ((x, tuple(o)), {}), lambda x, o: (x, torch.stack(o))),
    "a list of words": (
        lambda x, o: ((x, [f"{v:.9g}" for v in o]), {}),
        lambda x, o: (x, floats([float(v) for v in o])),
    ),
    "an array of words": (
        lambda x, o: ((x, np.array([f"{v:.9g}" for v in o])), {}),
        lambda x, o: (x, floats(o.astype(float))),
    ),
    "a list of rows": (lambda x, o: ((list(x), o), {}), lambda x, o: (torch.stack(list(x)), o)),
    "a dict": (lambda x, o: (({"x": x, "o": o},), {}), lambda b: (b["x"], b["o"])),
    "nested dicts": (
        lambda x, o: (({"in": {"x": x.numpy()}, "o": o.tolist(), "name": "a", "no": None},), {}),
        lambda b: (b["in"]["x"], floats(b["o"])),
    ),
    "an ordered dict": (lambda x, o: ((collections.OrderedDict(x=x, o=o),), {}), lambda b: (b["x"], b["o"])),
    "a record": (lambda x, o: ((Both(x, o),), {}), lambda b: (b.x, b.offsets)),
    "two of a list": (lambda x, o: ((x, [o, x, None]), {}), lambda x, b: (x, b[0] + 0 * b[1].sum())),
    "None, numbers, strings, functions": (
        lambda x, o: ((None, 1.0, x, "a", o, torch.sin, torch.tensor(3.0)), {"more": None}),
        lambda none, one, x, a, o, sin, three, **kwargs: (x, o),
    ),
    "packed sequences": (
        lambda x, o: ((x, pack_sequence([v.expand(1 + i % 4) for i, v in enumerate(o)], enforce_sorted=False)), {}),
        lambda x, packed: (x, packed_offsets(packed)),
    ),
    "packed sequences in order": (
        lambda x, o: ((x, pack_sequence([v.expand(4 - i // 10) for i, v in enumerate(o)])), {}),
        lambda x, packed: (x, packed_offsets(packed)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_memory", [64e6, 1e4])
def test_log_marginal_of_every_kind(kind, max_memory):
    """The guide is the posterior, so every weight is p(x); rounding in float32 is all that is left."""
    given, read = KINDS[kind]
    pair = Pair(read)
    args, kwargs = given(pair.x, pair.offsets)
    found = log_marginal(pair.model, pair.guide, *args, num_samples=50, max_memory=max_memory, progress=False, **kwargs)
    # Some twenty terms of up to thousands, at 6e-8 each; offsets as words have nine digits.
    torch.testing.assert_close(found.value.double(), pair.truth(), atol=1e-3, rtol=0)


class Rows(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def loader(pair: Pair, collate=None, **settings: Any) -> DataLoader:
    return DataLoader(
        Rows([*zip(pair.x, pair.offsets, strict=True)]), collate_fn=collate, **{"batch_size": 7} | settings
    )


def dicts(items):
    return {"x": torch.stack([x for x, _ in items]), "o": [float(o) for _, o in items], "size": 7, "none": None}


def keywords(items):
    return Arguments(torch.stack([x for x, _ in items]), offsets=torch.stack([o for _, o in items]), scale=None)


LOADERS = {
    "tensors": (None, lambda x, o: (x, o)),
    "dicts": (dicts, lambda b: (b["x"], floats(b["o"]))),
    "keywords": (keywords, lambda x, *, offsets, scale: (x, offsets)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_are_scored_in_the_order_of_the_data(kind):
    collate, read = LOADERS[kind]
    pair = Pair(read)
    found = log_marginal(pair.model, pair.guide, loader(pair, collate), num_samples=30, progress=False)
    torch.testing.assert_close(found.value.double(), pair.truth(), atol=1e-3, rtol=0)
    assert found.trusted.shape == found.ess.shape == (N,)


def test_loaders_that_lose_the_order_are_refused():
    pair = Pair(lambda x, o: (x, o))
    for shuffled, name in (
        (loader(pair, shuffle=True), "RandomSampler"),
        (loader(pair, sampler=WeightedRandomSampler([1.0] * N, N)), "WeightedRandomSampler"),
    ):
        for f in (log_marginal, impute, reliability, collapse):
            with pytest.raises(ValueError, match=f"by a {name}.*shuffle=False"):
                f(pair.model, pair.guide, shuffled)
    with pytest.raises(TypeError, match="give no other argument"):
        log_marginal(pair.model, pair.guide, loader(pair), pair.x)
    with pytest.raises(ValueError, match="no batch of data"):
        log_marginal(pair.model, pair.guide, loader(pair, batch_size=N + 1, drop_last=True))


@pytest.mark.parametrize("make", [lambda x, o: Rows([*zip(x, o, strict=True)]), TensorDataset], ids=["own", "tensors"])
def test_data_sets_are_scored_in_their_order(make):
    pair = Pair(lambda x, o: (x, o))
    rows = make(pair.x, pair.offsets)
    found = log_marginal(pair.model, pair.guide, rows, num_samples=30, progress=False)
    torch.testing.assert_close(found.value.double(), pair.truth(), atol=1e-3, rtol=0)
    assert reliability(pair.model, pair.guide, rows, progress=False, num_samples=30).ess.shape == (N,)
    assert impute(pair.model, pair.guide, rows, num_samples=50).mean.shape == pair.x.shape
    with pytest.raises(TypeError, match="a Dataset must hold all rows of the data"):
        log_marginal(pair.model, pair.guide, rows, pair.x)


DIAGNOSTICS = {
    "collapse": lambda *a, **k: collapse(*a, progress=False, **k).kl,
    "gaps": lambda *a, **k: gaps(*a, num_steps=2, method=ImportanceSampling(50), progress=False, **k).test.elbo,
    "reliability": lambda *a, **k: reliability(*a, progress=False, num_samples=30, **k).ess,
    "sharpness": lambda *a, **k: sharpness(*a, shape=(1, 5), **k).error,
    "latent map": lambda *a, **k: latent_map(*a, **k).latents,
    "impute": lambda *a, **k: impute(*a, num_samples=50, **k).mean,
}


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_diagnostics_of_every_kind_are_those_of_tensors(name):
    """The same noise, and the same numbers: to the rounding of chunks."""
    found = {}
    for kind in (
        "tensors",
        "a dict",
        "arrays",
        "nested dicts",
        "keywords alone",
        "a list of numbers",
        "packed sequences",
    ):
        given, read = KINDS[kind]
        pair = Pair(read)
        args, kwargs = given(pair.x, pair.offsets)
        pyro.set_rng_seed(0)
        found[kind] = DIAGNOSTICS[name](pair.model, pair.guide, *args, **kwargs)
    for kind, (collate, read) in LOADERS.items():
        pair = Pair(read)
        pyro.set_rng_seed(0)
        found[f"a loader of {kind}"] = DIAGNOSTICS[name](pair.model, pair.guide, loader(pair, collate))
    for kind, value in found.items():
        torch.testing.assert_close(
            value, found["tensors"], msg=lambda text, kind=kind: f"{kind}: {text}", atol=1e-4, rtol=1e-4
        )


def test_data_drawn_anew_take_their_places_in_dicts():
    """The guide is the posterior, so that ranks are uniform and features of data and samples are alike."""
    pair = Pair(lambda b: (b["x"], floats(b["o"])))
    data = {"x": pair.x, "o": pair.offsets.tolist()}
    pyro.set_rng_seed(0)
    assert min(calibration(pair.model, pair.guide, data, num_rounds=10, progress=False).p_value) > 1e-3
    assert quality(pair.model, pair.guide, data).size == N // 2


class Net(nn.Module):
    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.encode, self.decode = read, nn.Linear(6, 4), nn.Linear(2, 5)

    def model(self, *args: Any, **kwargs: Any) -> None:
        pyro.module("net", self)
        x, o = self.read(*args, **kwargs)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z) + o[:, None], 0.5).to_event(1), obs=x)

    def guide(self, *args: Any, **kwargs: Any) -> None:
        x, o = self.read(*args, **kwargs)
        loc, log_scale = self.encode(torch.cat([x, o[:, None]], -1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def trained(read, data: Any, **settings: Any) -> list:
    pyro.clear_param_store()
    net = Net(read)
    pyro.set_rng_seed(1)
    settings = {"batch_size": 16, "validation": data} | settings
    history = train(net.model, net.guide, data, epochs=3, optimizer=partial(SGD, lr=1e-3), **settings)
    return [history["loss"], history["validation"], *(p.detach().clone() for p in net.parameters())]


def as_data(args: tuple, kwargs: dict) -> Any:
    return Arguments(*args, **kwargs) if kwargs else args


@pytest.mark.parametrize("kind", KINDS)
def test_fit_of_every_kind_is_that_of_tensors_to_the_bit(kind):
    given, read = KINDS[kind]
    pair = Pair(read)
    x, o = pair.x, pair.offsets
    if "words" in kind:
        o = floats([float(f"{v:.9g}") for v in o])
    if "packed" in kind:  # a mean rounds
        o = packed_offsets(given(x, o)[0][1])
    found, wanted = trained(read, as_data(*given(pair.x, pair.offsets))), trained(lambda x, o: (x, o), (x, o))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_fit_of_a_lone_thing():
    pair = Pair(None)
    whole = torch.cat([pair.x, pair.offsets[:, None]], 1)
    wanted = trained(lambda b: (b[:, :5], b[:, 5]), whole)
    for data, read in (
        (whole.double().numpy(), lambda b: (b[:, :5], b[:, 5])),
        ({"b": whole}, lambda b: (b["b"][:, :5], b["b"][:, 5])),
        ((whole.tolist(),), lambda b: (floats(b)[:, :5], floats(b)[:, 5])),
        (Arguments(b=whole), lambda *, b: (b[:, :5], b[:, 5])),
    ):
        for a, b in zip(trained(read, data), wanted, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize("kind", LOADERS)
def test_fit_takes_what_a_collate_gives(kind):
    collate, read = LOADERS[kind]
    pair = Pair(None)
    found = trained(read, loader(pair, collate))
    wanted = trained(lambda x, o: (x, o), loader(pair))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_transform_takes_and_gives_keywords():
    pair = Pair(None)
    data = Arguments(pair.x, offsets=pair.offsets)
    found = trained(lambda *, x, o: (x, o), data, transform=lambda x, offsets: Arguments(x=x, o=offsets))
    wanted = trained(lambda x, o: (x, o), (pair.x, pair.offsets))
    assert found[0] == wanted[0]


def test_compiled_steps_take_dicts_and_keywords():
    pair = Pair(None)
    wanted = trained(lambda x, o: (x, o), (pair.x, pair.offsets))
    for data, read in (
        ({"x": pair.x, "o": pair.offsets, "none": None}, lambda b: (b["x"], b["o"])),
        (Arguments(pair.x, o=[pair.offsets, None]), lambda x, *, o: (x, o[0])),
    ):
        found = trained(read, data, compile=True)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))


def test_a_packed_sequence_runs_as_it_is_after_one_warning():
    given, read = KINDS["packed sequences"]
    pair = Pair(None)
    data = given(pair.x, pair.offsets)[0]
    wanted = trained(read, data)
    with pytest.warns(UserWarning, match="not compiled") as caught:
        found = trained(read, data, compile=True)
    assert len(caught) == 1
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_fewer_data_than_a_batch_are_one_batch():
    pair = Pair(None)
    wanted = trained(lambda x, o: (x, o), (pair.x, pair.offsets), batch_size=N)
    for size in (128, 1000):
        assert trained(lambda x, o: (x, o), (pair.x, pair.offsets), batch_size=size)[0] == wanted[0]


# What is ambiguous.


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([torch.zeros(3), torch.zeros(4)], "argument 1 has 3 rows but argument 2 has 4"),
        ([torch.zeros(3), [1, 2]], "argument 2 is a list of 2: give an entry per datum"),
        ([torch.zeros(3), {"a": (1, 2)}], r"argument 2\['a'\] is a tuple of 2"),
        ([torch.zeros(3), np.zeros(2)], "argument 2 has 2"),
        ([torch.zeros(3), [torch.zeros(3)] * 3], "argument 2 is a list of 3 with 3 rows each"),
        ([[torch.zeros(3)] * 2], "are these 2 data, or 3"),
        ([torch.zeros(0, 3)], r"argument 1 is empty: shape \(0, 3\)"),
        ([torch.tensor(1.0), None, "a", 2.0], "no tensor, array or list"),
    ],
)
def test_what_cannot_be_told_is_refused(given, match):
    with pytest.raises(ValueError, match=match):
        log_marginal(lambda *a: None, lambda *a: None, *given)


def test_a_single_datum_is_no_question():
    x = torch.zeros(1, 3)
    for given in ([x, [x]], [x, [x, x]], [[x]], [x, [[1.0, 2.0]]]):
        args, kwargs, size = canonicalize(tuple(given), {})
        assert size == 1
        assert str(take_rows(slice(0, 1), args, kwargs)[0]) == str(tuple(given))


def test_what_a_list_is_stays_when_few_rows_are_left():
    """Two rows of two things, and two sequences of two steps, look alike."""
    x = torch.arange(8.0).reshape(4, 2)
    args, kwargs, _ = canonicalize((x, [x, x + 1], [x[:2], x[1:3], x[2:], x[:2]]), {})
    head = take_rows(slice(0, 2), args, kwargs)
    one = canonicalize(*head)[:2]
    for part in (take_rows(slice(0, 1), *one)[0], take_rows(torch.tensor([0]), *one)[0]):
        assert [t.tolist() for t in part[1]] == [[[0.0, 1.0]], [[1.0, 2.0]]]
        assert [t.tolist() for t in part[2]] == [[[0.0, 1.0], [2.0, 3.0]]]


def test_nothing_is_changed():
    x, d = torch.arange(4.0), {"o": [1, 2, 3, 4], "d": collections.OrderedDict(x=np.ones(4))}
    args, kwargs, _ = in_memory((x, d), {})
    taken, _ = take_rows(slice(1, 3), args, kwargs)
    assert d["o"] == [1, 2, 3, 4] and isinstance(d["d"]["x"], np.ndarray)
    assert taken[1]["o"] == [2, 3] and taken[1]["d"]["x"].dtype == torch.float32


def test_integers_and_booleans_are_kept():
    args, _, _ = canonicalize(
        (torch.zeros(2, dtype=torch.double), np.array([1, 2]), np.array([True, False]), np.float32([1, 2])), {}
    )
    assert [t.dtype for t in args] == [torch.double, torch.long, torch.bool, torch.double]


# Messages.


def vae_of(kind=Normal) -> VAE:
    return VAE(StandardNormal(2), kind(2, 6), DiagonalNormal(6, 2))


def test_double_precision_is_said_in_a_sentence():
    x = torch.randn(20, 6).double()
    model, guide = functions_of(vae_of())
    for f in (train, partial(log_marginal, progress=False), collapse):
        with pytest.raises(TypeError, match=r"argument 1 has dtype float64.*\.float\(\).*\.double\(\)"):
            f(model, guide, x)
    log_marginal(model, guide, x.numpy(), num_samples=2, progress=False)
    with pytest.raises(TypeError, match=r"argument 1 has dtype float32.*compute in float64.*\.float\(\)"):
        log_marginal(*functions_of(vae_of().double()), x.float())


def functions_of(vae: VAE) -> tuple:
    """Model and guide as functions, which do not show in which precision they compute."""
    return lambda x: vae.model(x), lambda x: vae.guide(x)


def test_rows_are_named_by_their_place_in_the_data():
    x = torch.zeros(1000, 6)
    x[900, 3] = 0.5
    vae = vae_of(Bernoulli)
    for seed in range(2):
        pyro.set_rng_seed(seed)
        with pytest.raises(ValueError, match="first datum outside is row 900 of the data"):
            train(vae.model, vae.guide, x, epochs=1)
    with pytest.raises(ValueError, match="first datum outside is row 900 of the data"):
        train(vae.model, vae.guide, torch.zeros(1000, 6), validation=x, epochs=1)
    for memory in (64e6, 1e5):
        with pytest.raises(ValueError, match="first datum outside is row 900 of the data"):
            log_marginal(vae.model, vae.guide, x, num_samples=5, max_memory=memory, progress=False)
    with pytest.raises(ValueError, match="first datum outside is row 900 of the data"):
        log_marginal(vae.model, vae.guide, DataLoader(Rows(x), 128), num_samples=5, progress=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_row_without_anything_observed_is_named(seed):
    x, m = torch.randn(1000, 6), torch.ones(1000, 6, dtype=torch.bool)
    m[900] = False
    v = MissingDataVAE(StandardNormal(2), Normal(2, 6), DiagonalNormal((2, 6), 2))
    pyro.set_rng_seed(seed)
    with pytest.raises(ValueError, match="first in row 900 of the data"):
        train(v.model, v.guide, (x, m), epochs=1)
    with pytest.raises(ValueError, match="first in row 900 of the data"):
        log_marginal(v.model, v.guide, x, m, num_samples=5, max_memory=1e5, progress=False)


def level(x):
    """A plain model of numbers around 1e8, without parameters."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(1e8), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def level_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + 1e8) / 2, 0.5**0.5))


def test_numbers_that_single_precision_rounds_by_more_than_they_vary_are_told():
    x = 1e8 + np.random.default_rng(0).normal(size=50)
    with pytest.warns(UserWarning, match=r"varies by \d\.\d+ in element 0 .* float32 rounds to steps"):
        log_marginal(level, level_guide, x, num_samples=10, progress=False)
    exact = dist.Normal(0.0, 2**0.5).log_prob(torch.from_numpy(x - 1e8))
    found = log_marginal(level, level_guide, torch.from_numpy(x), num_samples=10, progress=False)
    torch.testing.assert_close(found.value, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("x", [np.full((5, 2), 1e8), 1.0 + np.arange(6.0).reshape(3, 2) / 1e3, np.zeros((1, 2))])
def test_other_numbers_of_double_precision_are_taken_in_silence(x):
    check_finite("x", ArrayRows(x, torch.float32))


def test_rounding_is_found_beside_missing_elements():
    x = np.array([[1e8, np.nan], [1e8 + 1, 0.5], [np.nan, 0.7]])
    with pytest.warns(UserWarning, match="element 0"):
        check_rows("x", ArrayRows(x, torch.float32), missing=True)


def test_arguments_are_scored_as_what_they_hold():
    def model(x, p=0.5):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z * p, 1.0), obs=x)

    def guide(x, p=0.5):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.randn(10)
    pyro.set_rng_seed(0)
    found = log_marginal(model, guide, Arguments(x, p=0.2), num_samples=50, progress=False)
    pyro.set_rng_seed(0)
    assert torch.equal(found.value, log_marginal(model, guide, x, p=0.2, num_samples=50, progress=False).value)
    with pytest.raises(ValueError, match="Arguments holds all positional arguments"):
        log_marginal(model, guide, Arguments(x), 0.2, progress=False)
    for data in ((x, 0.5), x.tolist()):
        with pytest.raises(ValueError, match='the data at site "x" is a .*, not a tensor: give numbers as a tensor'):
            log_marginal(model, guide, data, progress=False)
