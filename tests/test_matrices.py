"""Files of sparse matrices and HDF5: read as they stand, in the order of their rows, or refused by name."""

import builtins
import re

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

import pyrovae
from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.data import Rows, load, random_splits


def counts(num_data: int = 30) -> np.ndarray:
    return np.random.RandomState(0).poisson(0.5, (num_data, 4)).astype(np.float32)


def assert_holds(path, x: np.ndarray) -> None:
    """Asserts that a file gives the rows of x, and the same splits as a dense array of them."""
    expected = random_splits(torch.from_numpy(x), validation=len(x) // 10, test=len(x) // 10)
    for found, part in zip(load(str(path)), expected, strict=True):
        assert isinstance(found.x, Rows) and found.x.dtype == torch.float32
        assert found.x[:].equal(part.x) and found.labels is None


def write_matrix(group: h5py.Group, matrix, **attributes) -> None:
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(matrix, name)
    group.attrs.update(attributes)


@pytest.mark.parametrize("kind", ["csr_array", "csr_matrix", "csc_array", "coo_array", "bsr_array", "dia_array"])
def test_a_matrix_of_scipy_is_read_and_stays_sparse(kind, tmp_path):
    x = counts()
    for compressed in (True, False):
        sparse.save_npz(tmp_path / "x.npz", getattr(sparse, kind)(x), compressed)
        assert_holds(tmp_path / "x.npz", x)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64])
@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_the_matrix_of_anndata_is_read(kind, dtype, tmp_path):
    x = counts()
    matrix = getattr(sparse, f"{kind}_matrix")(x.astype(dtype))
    newer = {"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0", "shape": x.shape}
    older = {"h5sparse_format": kind, "h5sparse_shape": x.shape}
    for attributes in (newer, older):
        with h5py.File(tmp_path / "x.h5ad", "w") as file:
            write_matrix(file.create_group("X"), matrix, **attributes)
            file.create_group("obs")["names"] = np.array([b"a", b"b"])
        assert_holds(tmp_path / "x.h5ad", x)


def test_arrays_of_hdf5_are_read_as_those_of_npz(tmp_path):
    x, y = np.random.randn(30, 3), np.arange(30)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["cells"], file["labels"] = x, y
    np.savez(tmp_path / "x.npz", cells=x, labels=y)
    for found, expected in zip(load(str(tmp_path / "x.h5")), load(str(tmp_path / "x.npz")), strict=True):
        assert found.x.equal(expected.x) and found.labels.equal(expected.labels)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name, part in (("train", x[:20]), ("validation", x[20:25]), ("test", x[25:])):
            file[name] = part
    assert load(str(tmp_path / "x.hdf5")).test.x.equal(torch.from_numpy(x[25:]).float())
    with h5py.File(tmp_path / "dense.h5ad", "w") as file:
        file["X"] = x
    expected = random_splits(torch.from_numpy(x).float(), validation=3, test=3)
    assert load(str(tmp_path / "dense.h5ad")).train.x.equal(expected.train.x)


def test_a_vae_learns_from_a_file(tmp_path):
    sparse.save_npz(tmp_path / "x.npz", sparse.csr_matrix(counts()))
    splits = load(str(tmp_path / "x.npz"))
    vae = VAE(priors.StandardNormal(2), likelihoods.Multinomial(2, 4), encoders.DiagonalNormal(4, 2))
    pyrovae.fit(vae.model, vae.guide, splits.train.x, validation=splits.validation.x, epochs=1, progress=False)
    assert pyrovae.log_marginal(vae.model, vae.guide, splits.test.x, num_samples=9, progress=False).value.shape == (3,)


def broken(path, change) -> str:
    matrix = sparse.csr_matrix(counts())
    change(matrix)
    if path.suffix == ".npz":
        sparse.save_npz(path, matrix)
    else:
        with h5py.File(path, "w") as file:
            write_matrix(file.create_group("X"), matrix, **{"encoding-type": "csr_matrix", "shape": (30, 4)})
    return str(path)


def point_outside(matrix) -> None:
    matrix.indices[5] = 1000


def hold_nan(matrix) -> None:
    matrix.data[:] = np.nan


@pytest.mark.parametrize("name", ["x.npz", "x.h5ad"])
def test_damaged_matrices_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} is truncated, or holds something other than numbers .*indices"):
        load(broken(tmp_path / name, point_outside))
    with pytest.raises(ValueError, match=rf"{name}: x holds NaN or infinity"):
        load(broken(tmp_path / name, hold_nan))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{name} is truncated"):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no matrix X among nothing"),
        ({"raw": np.eye(3)}, "no matrix X among raw"),
        ({"X/data": np.eye(3)}, "/X is a group of data, and no matrix"),
        ({"X": np.array([b"a", b"b"])}, "must hold numbers"),
        ({"X": np.zeros((0, 3))}, "must have rows and columns"),
    ],
)
def test_what_is_no_matrix_is_refused(content, message, tmp_path):
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        for name, array in content.items():
            file[name] = array
    with pytest.raises(ValueError, match=re.escape(message)):
        load(str(tmp_path / "x.h5ad"))


def test_an_unknown_order_of_a_matrix_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        write_matrix(file.create_group("X"), sparse.csr_matrix(counts()), shape=(30, 4))
    with pytest.raises(ValueError, match="neither by rows"):
        load(str(tmp_path / "x.h5ad"))


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.h5").write_bytes(b"")
    find = builtins.__import__

    def without_h5py(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_h5py)
    with pytest.raises(ImportError, match=re.escape("pip install 'pyrovae[hdf5]'")):
        load(str(tmp_path / "x.h5"))
