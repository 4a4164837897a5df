"""Matrices in files of scipy, HDF5 and AnnData, as arrays and sparse matrices by name."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import h5py

_SPARSE_NPZ = {"format", "shape", "data"}  # of every file that scipy.sparse.save_npz writes

_MAX_RATIO, _MAX_UNPACKED = 100, 1e9  # what a file may unpack to: times its size, or bytes


def read_npz(path: Path) -> dict[str, Any]:
    """Reads the arrays of an ``.npz`` file by name, or the matrix that ``scipy.sparse.save_npz`` wrote."""
    _check_unpacked_size(path)
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:  # unpickling could run code
        if not set(arrays) >= _SPARSE_NPZ:
            return dict(arrays)
    from scipy.sparse import load_npz  # slow to import

    return {"x": _checked(load_npz(path))}


def _check_unpacked_size(path: Path) -> None:
    """Raises a ValueError when a small file would unpack to an amount of memory that nobody expects of it."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = path.stat().st_size
    if unpacked > max(_MAX_UNPACKED, _MAX_RATIO * packed):
        raise ValueError(
            f"it has {packed / 1e6:,.1f} MB and would unpack to {unpacked / 1e9:,.1f} GB, more than {_MAX_RATIO} times "
            "as much. If that is meant, write the array as a .npy file"
        )


def read_hdf5(path: Path) -> dict[str, Any]:
    """Reads the data sets at the top of an HDF5 file by name, or the matrix X of an ``.h5ad`` file, into memory.

    Raises:
        ImportError: when h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path} is an HDF5 file, which h5py reads: pip install 'pyrovae[hdf5]'.") from error

    with h5py.File(path, "r") as file:
        if path.suffix == ".h5ad":
            if "X" not in file:
                raise ValueError(f"no matrix X among {', '.join(file) or 'nothing'}")
            return {"x": _matrix(file["X"])}
        return {name: _matrix(entry) for name, entry in file.items()}


def _matrix(entry: "h5py.Dataset | h5py.Group") -> Any:
    """Returns an array, or a sparse matrix as AnnData and others write it: a group with data, indices and indptr."""
    if hasattr(entry, "shape"):
        return entry[()]
    parts = {"data", "indices", "indptr"}
    if not set(entry) >= parts or not ("shape" in entry.attrs or "h5sparse_shape" in entry.attrs):
        raise ValueError(f"{entry.name} is a group of {', '.join(entry) or 'nothing'}, and no matrix")
    from scipy.sparse import csc_array, csr_array  # slow to import

    kind = entry.attrs.get("encoding-type", entry.attrs.get("h5sparse_format", ""))
    kinds = {"csr": csr_array, "csc": csc_array}
    if str(kind)[:3] not in kinds:
        raise ValueError(
            f"{entry.name} is stored as {kind!r}, neither by rows (csr_matrix) nor by columns (csc_matrix)"
        )
    shape = tuple(map(int, entry.attrs.get("shape", entry.attrs.get("h5sparse_shape"))))
    matrix = kinds[str(kind)[:3]](tuple(entry[name][()] for name in ("data", "indices", "indptr")), shape)
    return _checked(matrix)


def _checked(matrix: Any) -> Any:
    """Returns a sparse matrix; raises a ValueError if its indices point outside, as those of a damaged file may."""
    if matrix.format in ("csr", "csc"):
        matrix.check_format(full_check=True)
    return matrix
