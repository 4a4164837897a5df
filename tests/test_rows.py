"""Arrays and memory maps as data: their rows become tensors a batch at a time."""

import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pyro
import pytest
import scipy.sparse
import torch
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae
from pyrovae import VAE, diagnostics, encoders, estimators, fit, likelihoods, log_marginal, priors
from pyrovae.data import split_missing
from pyrovae.data.batches import Batches, as_batches
from pyrovae.rows import Rows, _unpacked, number_type, pack_bits


def vae_of(kind=likelihoods.Normal, x_shape=3) -> VAE:
    pyro.set_rng_seed(0)
    return VAE(priors.StandardNormal(2), kind(2, x_shape), encoders.DiagonalNormal(x_shape, 2))


def values(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randn(*shape)


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def mapped(x: np.ndarray, path, mode: str) -> np.ndarray:
    np.save(path, x)
    return np.load(path, mmap_mode=mode)


# Forms of an array of numbers that float32 holds exactly.
FORMS = {
    "float32": lambda x, path: x.astype(np.float32),
    "float64": lambda x, path: x,
    "float16": lambda x, path: x.astype(np.float16),
    "extended precision": lambda x, path: x.astype(np.longdouble),
    "order of columns": lambda x, path: np.asfortranarray(x),
    "negative strides": lambda x, path: x[::-1].copy()[::-1],
    "every second column": lambda x, path: np.repeat(x, 2, axis=1)[:, ::2],
    "the other byte order": lambda x, path: x.astype(x.dtype.newbyteorder()),
    "read-only": lambda x, path: read_only(x),
    "a map to read": lambda x, path: mapped(x, path, "r"),
    "a map to write": lambda x, path: mapped(x.astype(np.float32), path, "r+"),
    "a private map": lambda x, path: mapped(x, path, "c"),
    "half of a map": lambda x, path: mapped(np.concatenate([x, x]), path, "r")[: len(x)],
    "integers": lambda x, path: x.astype(np.int64),
    "small integers": lambda x, path: x.astype(np.int8),
    "bytes": lambda x, path: x.astype(np.uint8),
    "a tensor of integers": lambda x, path: torch.from_numpy(x).long(),
    "a tensor of double precision": lambda x, path: torch.from_numpy(x),
    "unsigned integers": lambda x, path: x.astype(np.uint16),
}


def whole_numbers() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 100, (40, 3)).astype(np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_an_array_of_any_form_gives_what_a_tensor_gives(form, tmp_path):
    x = whole_numbers()
    given, tensor = FORMS[form](x, tmp_path / "x.npy"), torch.from_numpy(x).float()
    before = np.asarray(given).copy()

    def results(data):
        vae = vae_of()
        history = pyrovae.fit(vae.model, vae.guide, data, epochs=2, batch_size=16, validation=data, progress=False)
        score = log_marginal(vae.model, vae.guide, data, num_samples=5, progress=False).value
        collapse = diagnostics.collapse(vae.model, vae.guide, data, progress=False).kl
        imputed = pyrovae.impute(vae.model, vae.guide, data, num_samples=5).mean
        rebuilt, code = vae.reconstruct(data), vae.encode(data).mean.detach()
        drawn = pyrovae.log_weights(vae.model, vae.guide, data, num_samples=2).detach()
        return [torch.tensor(history["loss"] + history["validation"]), score, collapse, imputed, rebuilt, code, drawn]

    for found, expected in zip(results(given), results(tensor), strict=True):
        assert found.dtype == expected.dtype and found.equal(expected)
    assert np.array_equal(given, before)


@pytest.mark.parametrize(
    "method",
    [
        estimators.ImportanceSampling(4),
        estimators.AnnealedImportanceSampling(num_samples=2, num_temperatures=3),
        estimators.SequentialMonteCarlo(num_samples=2, num_particles=3),
        estimators.Quadrature(100),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_kind_of_estimator_scores_an_array_in_parts(method):
    vae, x = vae_of(), values(9, 3)
    found, expected = (
        (pyro.set_rng_seed(1), log_marginal(vae.model, vae.guide, data, method=method, max_memory=2e4, progress=False))[
            1
        ]
        for data in (x, torch.from_numpy(x).float())
    )
    assert found.value.equal(expected.value)


def test_a_diagnosis_of_each_kind_takes_an_array():
    vae, x = vae_of(), values(20, 3)
    for f in (
        diagnostics.latent_map,
        diagnostics.sharpness,
        diagnostics.traversals,
        diagnostics.anomalies,
    ):
        pyro.set_rng_seed(1)
        found = f(vae.model, vae.guide, x)
        pyro.set_rng_seed(1)
        assert str(found) == str(f(vae.model, vae.guide, torch.from_numpy(x).float()))


def test_a_model_of_double_precision_keeps_it():
    vae, x = vae_of().double(), values(20, 3)
    exact = log_marginal(vae.model, vae.guide, torch.from_numpy(x), num_samples=3, progress=False).value
    pyro.set_rng_seed(0)
    first = log_marginal(vae.model, vae.guide, x, num_samples=3, progress=False).value
    pyro.set_rng_seed(0)
    second = log_marginal(vae.model, vae.guide, torch.from_numpy(x), num_samples=3, progress=False).value
    assert first.dtype == exact.dtype == torch.double and first.equal(second)
    assert vae.encode(x).mean.dtype == torch.double
    pyrovae.fit(vae.model, vae.guide, x, epochs=1, progress=False)
    assert vae.decode(np.zeros((2, 2))).mean.dtype == torch.double


def test_double_precision_is_converted_for_a_vae_by_batches():
    vae, x = vae_of(), torch.from_numpy(values(20, 3))
    pyrovae.fit(vae.model, vae.guide, x, epochs=1, batch_size=5, progress=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 5)
    pyrovae.fit(vae.model, vae.guide, loader, epochs=1, progress=False)
    scores = []
    for data in (x, loader, x.float()):
        pyro.set_rng_seed(0)
        scores.append(log_marginal(vae.model, vae.guide, data, num_samples=1, progress=False).value.shape)
    assert scores == [(20,)] * 3
    assert vae.encode(x).mean.dtype == torch.float


class Classes(nn.Module):
    """A network that needs class numbers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, x):
        return self.embedding(x).mean(-2)


def test_networks_of_the_users_own_get_integers_as_they_are():
    x = np.random.RandomState(0).randint(0, 5, (20, 3))
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Categorical(2, 3, num_classes=5), encoders.DiagonalNormal(3, 2, Classes())
    )
    assert number_type(vae.model) == (torch.float32, False)
    pyrovae.fit(vae.model, vae.guide, x, epochs=1, progress=False)
    assert vae.encode(x).batch_shape == (20,)


@pytest.mark.parametrize("form", ["uint8", "int8", "uint16", "a map", "sparse"])
def test_arithmetic_with_bytes_of_an_array_does_not_wrap(form, tmp_path):
    x = np.random.RandomState(0).randint(0, 120, size=(30, 3))
    forms = {
        "a map": lambda: mapped(x.astype(np.uint8), tmp_path / "x.npy", "r"),
        "sparse": lambda: scipy.sparse.csr_array(x.astype(np.uint8)),
    }

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=(x - 100) * 2 / 64)

    losses = []
    for given in (forms.get(form, lambda: x.astype(form))(), torch.from_numpy(x).float()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        losses += fit(model, lambda x: None, given, epochs=2, batch_size=8, progress=False)["loss"]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_tensors_are_refused_by_name():
    vae = vae_of()
    for given in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises(ValueError, match=r"sparse tensor\. Give x\.to_dense\(\), or a sparse matrix of scipy"):
            fit(vae.model, vae.guide, given, epochs=1, progress=False)
        with pytest.raises(ValueError, match="sparse tensor"):
            log_marginal(vae.model, vae.guide, given, num_samples=2, progress=False)


def test_labels_beside_the_data_stay_integers():
    vae = pyrovae.structures.SemiSupervisedVAE(
        priors.StandardNormal(2),
        likelihoods.Normal(2, 3, context_dim=4),
        encoders.DiagonalNormal(3, 2, context_dim=4),
        num_classes=4,
    )
    data = (np.ones((8, 3), np.uint8), np.arange(8) % 4)
    for x, y in as_batches("data", data, 4, True, numbers=number_type(vae.model)):
        assert x.dtype == torch.float32 and y.dtype == torch.int64


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_found_in_any_part(value, monkeypatch):
    monkeypatch.setattr("pyrovae.rows._CHUNK", 100)
    x, vae = values(50, 3), vae_of()
    x[[31, 40], 1] = value
    for f in (
        partial(pyrovae.fit, progress=False),
        partial(log_marginal, progress=False),
        partial(diagnostics.collapse, progress=False),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinity, or numbers beyond float32, in 2 of 50 rows.*row 31"):
            f(vae.model, vae.guide, x)


def test_integers_that_would_be_rounded_are_refused():
    vae, x = vae_of(), np.full((9, 3), 2**24)
    with pytest.raises(ValueError, match=r"integers of 16777216 or more, which float32.*\.double\(\)"):
        pyrovae.fit(vae.model, vae.guide, x, progress=False)
    doubled = vae_of().double()
    assert doubled.encode(x).mean.dtype == torch.double
    log_marginal(doubled.model, doubled.guide, x, num_samples=1, progress=False)


def test_numbers_that_are_masked_are_not_taken_as_they_are():
    x = np.ma.masked_greater(np.array([[0.5, 1e4], [0.2, 0.3]]), 100)
    vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 2), encoders.DiagonalNormal(2, 2))
    for call in (log_marginal, partial(fit, epochs=1, progress=False)):
        with pytest.raises(ValueError, match="masked array hides 1 of 4 numbers"):
            call(vae.model, vae.guide, x)
    filled, mask = split_missing(x)
    assert torch.equal(filled, torch.tensor([[0.5, 0.0], [0.2, 0.3]]))
    assert torch.equal(mask, torch.tensor([[True, False], [True, True]]))
    assert all(map(torch.equal, split_missing(x.filled(np.nan)), (filled, mask)))


def test_rows_are_those_of_numpy():
    x = values(30, 2, 2)
    rows = Rows(x, torch.float64)
    mask = np.arange(30) % 3 == 0
    for index in (3, slice(None), slice(4, 9), slice(20, 3, -2), [5, 1, 1], np.array([7, 0]), mask, slice(0, 0)):
        for found in (rows, rows.select(np.arange(30)), Rows(torch.from_numpy(x))):
            if isinstance(found.source, torch.Tensor) and isinstance(index, slice) and (index.step or 1) < 0:
                continue  # torch has no such steps
            index_ = torch.from_numpy(index) if isinstance(index, np.ndarray) else index
            assert found[index_].equal(torch.from_numpy(np.array(x[index])))
    half = rows.select(mask).select(slice(1, 4))
    assert half[:].equal(torch.from_numpy(x[mask][1:4])) and half.shape == (3, 2, 2) and len(half) == 3
    assert repr(rows) == "Rows(30 of shape (2, 2), float64)"
    rows[:].zero_()
    assert x.any()  # a batch is a copy


def test_batches_do_not_share_memory_with_the_array():
    x = np.ones((6, 2), np.float32)
    for shuffle in (False, True):
        for (batch,) in as_batches("data", x, 4, shuffle):
            batch.zero_()
    assert x.all()


# Bits.


@pytest.mark.parametrize("shape", [(1,), (8,), (13,), (2, 3, 5)])
def test_bits_are_widened_to_what_they_were(shape):
    x = torch.from_numpy(values(40, *shape) > 0)
    for given in (x, x.float(), x.numpy(), x.long().numpy(), Rows(x.numpy(), torch.float32)):
        packed = pack_bits(given)
        assert packed.shape == x.shape and packed.dtype == torch.float32
        for rows in (slice(3, 9), torch.tensor([5, 0, 5]), [7, -1], torch.tensor([-1]), 4, x.flatten(1)[:, 0]):
            assert packed[rows].equal(x[rows].float())
        assert packed.select(np.array([6, 2]))[:].equal(x[[6, 2]].float())
    assert pack_bits(x.double()).dtype == torch.float64
    bits = torch.from_numpy(np.packbits(x.flatten(1).numpy(), axis=1))
    assert _unpacked(bits, x[0].numel()).equal(x.flatten(1).byte()), "the way of other devices"


def test_bits_take_an_eighth_of_a_byte():
    assert pack_bits(torch.ones(1000, 784)).source.packed.nbytes == 98_000


def test_bits_are_data_of_torch_too():
    x = torch.from_numpy(values(40, 5) > 0).float()
    dataset = TensorDataset(pack_bits(x), torch.arange(40))
    rows, numbers = next(iter(DataLoader(dataset, batch_size=40, shuffle=True)))
    assert rows.equal(x[numbers])


def test_bits_of_files_and_of_sparse_matrices(tmp_path):
    x = values(50, 9) > 1
    for given in (mapped(x, tmp_path / "x.npy", "r"), scipy.sparse.csr_matrix(x.astype(np.float32))):
        assert pack_bits(given)[:].equal(torch.from_numpy(x).float())


@pytest.mark.parametrize("bad", [0.5, 2.0, -1.0, float("nan")])
def test_only_zeros_and_ones_are_packed(bad):
    x = torch.zeros(4, 3)
    x[2, 1] = bad
    with pytest.raises(ValueError, match=f"x must be of zeros and ones, got {bad:g}"):
        pack_bits(x)


def test_bits_train_and_are_scored_as_the_numbers_are():
    x = torch.from_numpy(values(60, 13) > 0).float()
    found = []
    for given in (x, pack_bits(x)):
        vae = vae_of(likelihoods.Bernoulli, 13)
        fit(vae.model, vae.guide, given, epochs=2, batch_size=16, validation=given, progress=False)
        estimate = log_marginal(vae.model, vae.guide, given, num_samples=10, progress=False)
        found.append([*vae.state_dict().values(), estimate.value])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_arrays_and_tensors_beside_each_other_have_the_same_order():
    x = np.arange(10.0)
    batches = as_batches("data", (x, torch.arange(10), [*map(str, range(10))]), 3, shuffle=True)
    assert isinstance(batches, Batches)
    for a, b, c in batches:
        assert a.long().equal(b) and [int(i) for i in c] == b.tolist()


class Table:
    """A data set of dicts as other libraries have them: it is no data set of torch's."""

    def __init__(self, x: np.ndarray):
        self.x = torch.from_numpy(x).float()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "label": torch.as_tensor(row)}

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def test_a_data_set_of_another_library_trains_and_is_scored():
    x = values(20, 3)
    vae, table, seen = vae_of(), Table(x), []

    def select(batch):
        seen.extend(batch["label"].tolist())
        return batch["x"]

    pyrovae.fit(vae.model, vae.guide, table, epochs=1, batch_size=8, transform=select, progress=False)
    assert sorted(seen[-20:]) == [*range(20)] and seen[-20:] != [*range(20)]
    found = []
    for pair, data in (
        ((lambda b: vae.model(b["x"]), lambda b: vae.guide(b["x"])), table),
        ((vae.model, vae.guide), torch.utils.data.DataLoader(torch.from_numpy(x), 20)),
    ):
        pyro.set_rng_seed(0)
        found.append(log_marginal(*pair, data, num_samples=3, progress=False).value)
    assert found[0].equal(found[1])


def test_a_model_that_is_a_function_takes_the_default_type():
    def model(x):
        assert x.dtype == torch.float32
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * pyro.param("a", torch.tensor(0.5)), 1.0))

    pyrovae.fit(model, guide, values(10), epochs=1, progress=False)


def test_a_large_memory_map_trains_in_little_memory(tmp_path):
    path, megabytes = tmp_path / "x.npy", 128
    out = np.lib.format.open_memmap(path, "w+", np.float64, (megabytes * 2**17 // 512, 512))
    out[::2] = 1
    del out
    script = f"""
        import re
        import numpy as np
        import pyrovae
        from pyrovae import VAE, encoders, likelihoods, priors, rows

        vae = VAE(priors.StandardNormal(2), likelihoods.Normal(2, 4), encoders.DiagonalNormal(4, 2))
        model, guide = (lambda x: vae.model(x[:, :4])), (lambda x: vae.guide(x[:, :4]))

        def peak():
            return int(re.search(r"VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1]) // 1024

        def run(x):
            pyrovae.fit(model, guide, x, epochs=1, batch_size=512, progress=False)
            return pyrovae.log_marginal(model, guide, x, num_samples=1, progress=False, max_memory=1.6e7).value

        rows._MAPPED = 2**24
        run(np.zeros((10000, 512)))
        before = peak()
        value = run(np.load({str(path)!r}, mmap_mode="r"))
        print(len(value), peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    # A single copy in float32 would take half of the file.
    assert size == megabytes * 2**17 // 512 and peak < megabytes / 2, peak
