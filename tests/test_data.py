"""Data: fixed splits, binarisation, batches that contain every row, and files that are read correctly or refused."""

import gzip
import hashlib
import math
import struct
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torch import Tensor

from pyrovae.cli.parser import command_parser
from pyrovae.data import (
    DATA_SETS,
    Batches,
    Rows,
    Split,
    descriptions,
    dynamic_binarization,
    images,
    load,
    random_shift,
    random_splits,
    register,
    static_binarization,
)


def digest(t: Tensor) -> str:
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]


def rows_of(splits) -> list[tuple]:
    """Returns all rows of the three parts, sorted, to compare them as collections."""
    return sorted(tuple(row.flatten().tolist()) for split in splits for row in split.x)


# The embedded digits.


def test_digits_are_split_once_and_for_all():
    splits = load("digits")
    assert [tuple(s.x.shape) for s in splits] == [(1197, 1, 8, 8), (300, 1, 8, 8), (300, 1, 8, 8)]
    for x, labels in splits:
        assert (x.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (len(x),))
        assert x.min() == 0 and x.max() == 1
        assert set((x * 16).unique().tolist()) == set(range(17)), "16 grey levels and nothing between"
    # Published numbers depend on the split: it must not change, on any machine and for any random state.
    assert [digest(s.x) for s in splits] == DIGITS["x"]
    assert [digest(s.labels) for s in splits] == DIGITS["labels"]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(a.x.equal(b.x) for a, b in zip(splits, load("digits"), strict=True))


def test_digits_splits_are_a_partition():
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()
    everything = sorted(tuple(row.flatten().tolist()) for row in images / 16)
    assert (
        len(set(everything)) == len(everything) == 1797
    )  # all images differ, so equal collections mean disjoint parts
    assert rows_of(load("digits")) == everything


def test_digits_keep_their_labels():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    label_of = {
        image.astype(np.float32).tobytes(): label for image, label in zip(bunch.images, bunch.target, strict=True)
    }
    for x, labels in load("digits"):
        assert [label_of[(image[0] * 16).numpy().tobytes()] for image in x] == labels.tolist()


DIGITS = {
    "x": ["bee506d0ebabe257", "fdc8935c06e52f64", "17f413112d0647f1"],
    "labels": ["ef79db51bbb54aa8", "a1bac8f54508fe42", "b256cd4205c90bac"],
}


# Binarisation.


def assert_bernoulli(draws: Tensor, grey: Tensor) -> None:
    """Asserts that draws, ``(times, *shape)``, are 0 or 1 with means `grey`: five standard errors for each pixel."""
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    error = (grey * (1 - grey) / len(draws)).sqrt()
    assert ((draws.mean(0) - grey).abs() <= 5 * error).all()


def test_dynamic_binarization_has_the_grey_values_as_means():
    grey = torch.linspace(0, 1, 12).reshape(3, 4)
    draws = torch.stack([dynamic_binarization(grey)[0] for _ in range(2000)])
    assert_bernoulli(draws, grey)
    assert not draws[0].equal(draws[1]), "each call draws again"
    # Pixels are independent: the mean of the image has the variance of a mean of independent pixels. The variance of
    # n draws has a relative standard error of about sqrt(2 / n).
    expected = (grey * (1 - grey)).sum() / grey.numel() ** 2
    assert abs(draws.mean((1, 2)).var() / expected - 1) < 5 * math.sqrt(2 / 2000)


def test_dynamic_binarization_passes_on_the_rest():
    grey, context, more = torch.rand(5, 2), torch.randn(5, 3), torch.randn(5)
    x, *rest = dynamic_binarization(grey, context, more)
    assert x.shape == grey.shape and rest[0] is context and rest[1] is more


def test_dynamic_binarization_follows_the_random_state():
    grey = torch.rand(50)
    torch.manual_seed(3)
    (first,) = dynamic_binarization(grey)
    torch.manual_seed(3)
    assert dynamic_binarization(grey)[0].equal(first)


def moved_by(x: Tensor, down: int, right: int) -> Tensor:
    """Returns images moved by some pixels, with zeros where nothing was, the slow way."""
    result, (height, width) = torch.zeros_like(x), x.shape[-2:]
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[..., i, j] = x[..., i - down, j - right]
    return result


def test_images_are_moved_by_all_steps_alike_each_on_its_own():
    one, copies = torch.rand(2, 3, 4, 5) + 0.1, 4500
    x, labels = one[0].expand(copies, -1, -1, -1), torch.arange(copies)
    moved, same = random_shift(x, labels)
    assert same is labels and moved.shape == x.shape
    steps = [moved_by(one[0], down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    counts = torch.stack([(moved == step).flatten(1).all(1).sum() for step in steps])
    assert counts.sum() == copies, "each is one of the nine, all channels alike"
    assert chisquare(counts.numpy()).pvalue > 1e-5
    both = random_shift(one.repeat_interleave(1000, 0), pixels=2)[0].unflatten(0, (2, 1000))
    for image, results in zip(one, both, strict=True):
        steps = [moved_by(image, down, right) for down in range(-2, 3) for right in range(-2, 3)]
        assert all(any(torch.equal(result, step) for step in steps) for result in results[:50])
    assert random_shift(one, pixels=0)[0].equal(one)


def test_moved_images_follow_the_random_state():
    x = torch.rand(50, 4, 4)
    torch.manual_seed(3)
    (first,) = random_shift(x)
    assert not random_shift(x)[0].equal(first)
    torch.manual_seed(3)
    assert random_shift(x)[0].equal(first)


def test_only_images_are_moved_and_nothing_that_belongs_to_them_stays():
    with pytest.raises(ValueError, match="only images can be moved"):
        random_shift(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="pixels must be at least 0, got -1"):
        random_shift(torch.zeros(5, 4, 4), pixels=-1)
    with pytest.raises(ValueError, match="such as a mask"):
        random_shift(torch.zeros(5, 1, 4, 4), torch.ones(5, 1, 4, 4, dtype=torch.bool))


def test_static_binarization_is_one_draw():
    grey = torch.rand(4, 5)
    draws = torch.stack([static_binarization(grey, seed) for seed in range(2000)])
    assert_bernoulli(draws, grey)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert static_binarization(grey, 7).equal(draws[7]), "the same for the same seed, for any random state of torch"
    assert static_binarization(grey).equal(draws[0])
    torch.set_rng_state(state)
    static_binarization(grey)
    assert torch.get_rng_state().equal(state), "and without a trace in it"


@pytest.mark.parametrize("binarize", [dynamic_binarization, static_binarization])
@pytest.mark.parametrize("bad", [-0.01, 1.01, 255.0, math.nan])
def test_only_grey_values_are_binarised(binarize, bad):
    with pytest.raises(ValueError, match="between 0 and 1"):
        binarize(torch.tensor([0.0, 0.5, bad]))


# Batches.


@pytest.mark.parametrize(
    "size, batch_size, sizes", [(10, 3, [3, 3, 3, 1]), (10, 5, [5, 5]), (10, 10, [10]), (1, 1, [1])]
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_every_row_once(size, batch_size, sizes, shuffle):
    rows, squares = torch.arange(size), torch.arange(size) ** 2
    batches = Batches([rows, squares], batch_size, shuffle)
    assert len(batches) == len(sizes)
    for _ in range(2):
        passed = list(batches)
        assert [len(x) for x, _ in passed] == sizes
        order = torch.cat([x for x, _ in passed])
        assert sorted(order.tolist()) == list(range(size))
        assert shuffle or order.equal(rows)
        assert torch.cat([y for _, y in passed]).equal(order**2), "all tensors in the same order"


def test_batches_are_shuffled_by_torch():
    batches = Batches([torch.arange(20)], 6, shuffle=True)

    def order() -> list[int]:
        return torch.cat([x for (x,) in batches]).tolist()

    torch.manual_seed(5)
    first, second = order(), order()
    assert first != second, "a new order in every pass"
    torch.manual_seed(5)
    assert first == torch.randperm(20).tolist(), "the order is that of torch.randperm"
    assert second == order()


def test_a_thread_takes_the_next_batch_of_a_memory_map(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20.0).reshape(10, 2))
    x = Rows(np.load(tmp_path / "x.npy", mmap_mode="r"))
    batches = Batches([x], 3, shuffle=True)
    taken, threads = [], []

    def take(rows: Tensor) -> Tensor:
        threads.append(threading.current_thread())
        taken.append(len(rows))
        return batches.take(rows).args[0]

    torch.manual_seed(0)
    order = torch.randperm(10)
    torch.manual_seed(0)
    seen, ahead = [], []
    for batch in batches.each(take):
        assert batch.equal(x[batches.rows]), "rows are those of the batch that was yielded"
        deadline = time.monotonic() + 30
        while len(taken) < min(len(seen) + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.001)  # the next one is taken meanwhile
        ahead.append(len(taken))
        seen.append(batch)
    assert torch.cat(seen).equal(x[order]) and ahead == [2, 3, 4, 4]
    assert threading.main_thread() not in threads


def test_a_thread_that_takes_batches_passes_errors_on_and_may_be_left(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((10, 2)))
    batches = Batches([Rows(np.load(tmp_path / "x.npy", mmap_mode="r"))], 3, shuffle=False)

    def fail(rows: range) -> int:
        if rows.start == 6:
            raise OSError("the disk is gone")
        return rows.start

    passed = []
    with pytest.raises(OSError, match="the disk is gone"):
        for start in batches.each(fail):
            passed.append(start)
    assert passed == [0, 3]
    assert next(iter(batches))[0].shape == (3, 2)
    assert not [t for t in threading.enumerate() if t.name.startswith("next batch")]


# Files.


def numbers(rows: int, columns: int = 3) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_csv(array: np.ndarray, header: str = "") -> str:
    return header + "\n".join(",".join(str(v) for v in row) for row in array) + "\n"


WRITERS = {
    "npy": lambda path, a: np.save(path, a),
    "npz": lambda path, a: np.savez(path, a),
    "csv": lambda path, a: write(path, as_csv(a)),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_is_split_by_tenths(tmp_path, suffix):
    path = tmp_path / f"numbers.{suffix}"
    WRITERS[suffix](path, numbers(45))
    splits = load(str(path))
    assert [len(s.x) for s in splits] == [37, 4, 4]
    assert all(s.x.dtype == torch.float32 and s.labels is None for s in splits)
    assert rows_of(splits) == [tuple(row) for row in numbers(45).tolist()]
    assert all(a.x.equal(b.x) for a, b in zip(splits, load(str(path)), strict=True)), "the same split each time"


def test_images_keep_their_shape(tmp_path):
    images = np.random.rand(20, 3, 4, 5)
    np.save(tmp_path / "images.npy", images)
    assert load(str(tmp_path / "images.npy")).train.x.shape == (16, 3, 4, 5)


def test_an_npz_may_bring_its_splits(tmp_path):
    parts = {"train": numbers(4), "validation": numbers(3) + 100, "test": numbers(2) + 200}
    np.savez(tmp_path / "parts.npz", **parts)
    for split, part in zip(load(str(tmp_path / "parts.npz")), parts.values(), strict=True):
        assert split.x.tolist() == part.tolist()  # in the order of the file


@pytest.mark.parametrize("names", [("train", "test"), ("x", "y"), ()], ids=str)
def test_an_npz_of_other_arrays_is_refused(tmp_path, names):
    np.savez(tmp_path / "parts.npz", **{name: numbers(4) for name in names})
    with pytest.raises(ValueError, match=r"parts\.npz must hold one array, or train, validation and test"):
        load(str(tmp_path / "parts.npz"))


def test_an_npz_whose_parts_have_other_shapes_is_refused(tmp_path):
    np.savez(tmp_path / "parts.npz", train=numbers(4, 3), validation=numbers(4, 3), test=numbers(4, 2))
    with pytest.raises(ValueError, match=r"parts\.npz"):
        load(str(tmp_path / "parts.npz"))


@pytest.mark.parametrize(
    "start", ["", "a,b,c\n", "\ufeff", "\ufeffa,b,c\n"], ids=["numbers", "names", "mark", "mark and names"]
)
def test_a_csv_may_start_with_names(tmp_path, start):
    """Excel starts files with a byte order mark, which must not make a line of numbers look like names."""
    path = write(tmp_path / "numbers.csv", as_csv(numbers(10), start))
    for splits in (load(path), load(path, numbers=True)):
        assert rows_of(splits) == [tuple(row) for row in numbers(10).tolist()]


BAD_FILES = {
    "empty.csv": "",
    "names.csv": "a,b\n",
    "words.csv": "1,2\n3,x\n4,5\n6,7\n",
    "ragged.csv": "1,2\n3,4,5\n6,7\n8,9\n",
    "hole.csv": "1,2\n3,\n4,5\n6,7\n",
    "hole in the first row.csv": "1,,2\n3,4,5\n6,7,8\n9,10,11\n",  # not a line of names, which would be skipped
    "binary.csv": b"\xff\xfe\x00\x01",
    "nan.csv": "1,2\n3,nan\n4,5\n6,7\n",
    "inf.csv": "1,2\n3,4\n-inf,5\n6,7\n",
    "too few.csv": "1,2\n3,4\n",
    "empty.npy": b"",
    "text.npy": "not an array",
    "empty.npz": b"",
    "text.npz": "not an archive",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path, name):
    path = write(tmp_path / name, BAD_FILES[name])
    with pytest.raises(ValueError, match=name):
        load(path, numbers=True)


def test_the_row_of_a_nan_is_named(tmp_path):
    with pytest.raises(ValueError, match="in 1 of 4 rows, the first of them row 1"):
        load(write(tmp_path / "nan.csv", BAD_FILES["nan.csv"]), numbers=True)


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


BAD_ARRAYS = {
    "objects": lambda tmp_path: np.array([[1, Bomb(tmp_path / "exploded")], [2, 3], [4, 5]], dtype=object),
    "words": lambda _: np.array([["a", "b"]] * 4),
    "complex": lambda _: numbers(5) * 1j,
    "dates": lambda _: np.array([["2020-01-01"]] * 5, dtype="datetime64[D]"),
    "one-dimensional": lambda _: np.arange(5.0),
    "a number": lambda _: np.array(5.0),
    "no rows": lambda _: numbers(0),
    "no columns": lambda _: numbers(5, 0),
    "infinity": lambda _: np.full((5, 2), np.inf),
    "beyond float32": lambda _: np.full((5, 2), 1e300),
}


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, suffix, kind):
    path = tmp_path / f"bad.{suffix}"
    WRITERS[suffix](path, BAD_ARRAYS[kind](tmp_path))
    with pytest.raises(ValueError, match=path.name):
        load(str(path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed], ids=lambda save: save.__name__)
def test_a_truncated_array_is_refused(tmp_path, save):
    path = tmp_path / f"numbers.{'npy' if save is np.save else 'npz'}"
    save(path, numbers(20))
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=path.name):
            load(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=lambda save: save.__name__)
def test_a_damaged_archive_is_refused_or_read_right(tmp_path, save):
    """Archives have checksums of their content, but not of all their fields."""
    path = tmp_path / "numbers.npz"
    save(path, numbers(20))
    content, written = path.read_bytes(), load(str(path))
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read = load(str(path))
        except ValueError as error:
            assert path.name in str(error)
        else:
            assert all(a.x.equal(b.x) for a, b in zip(read, written, strict=True))


def test_names_that_stand_for_nothing(tmp_path):
    with pytest.raises(ValueError, match="no data set 'emnist'.*digits, mnist"):
        load("emnist", tmp_path)
    for suffix in WRITERS:
        with pytest.raises(FileNotFoundError, match=f"missing.{suffix}"):
            load(str(tmp_path / f"missing.{suffix}"))


# Data sets of the user's own.


@pytest.fixture
def no_new_data_sets():
    before = dict(DATA_SETS)
    yield
    DATA_SETS.clear()
    DATA_SETS.update(before)


def test_a_registered_data_set_is_loaded_by_name_and_listed(tmp_path, no_new_data_sets):
    x, labels = torch.randn(10, 3), torch.arange(10)
    torch.save((x, labels), tmp_path / "own.pt")

    @register("own")
    def own(root: Path):
        """Numbers in a file, shape (3,); 5 / 2 / 3.

        The rest of the docstring is not listed.
        """
        return random_splits(*torch.load(root / "own.pt"), validation=2, test=3)

    assert descriptions()["own"] == "Numbers in a file, shape (3,); 5 / 2 / 3."
    splits = load("own", tmp_path)
    assert [len(split.x) for split in splits] == [5, 2, 3]
    order = torch.cat([split.labels for split in splits])
    assert order.sort().values.equal(labels)
    assert torch.cat([split.x for split in splits]).equal(x[order])
    with pytest.raises(ValueError, match="no data set 'owl'.*cifar10, own; a file"):
        load("owl", tmp_path)
    assert "cifar10, own." in " ".join(command_parser("train").format_help_all().split())


def test_data_sets_without_a_new_name_or_a_description_are_refused(no_new_data_sets):
    with pytest.raises(ValueError, match="there is a data set 'mnist' already"):
        register("mnist")(descriptions)
    with pytest.raises(ValueError, match="'own' must have a docstring"):
        register("own")(lambda root: None)
    assert "own" not in DATA_SETS


# IDX files.


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, train: int = 10_020, test: int = 7, **replaced: bytes) -> dict[str, np.ndarray]:
    """Writes the four files of MNIST with images of 2 x 3 pixels; returns what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": np.random.randint(0, 256, (train, 2, 3)),
        "train-labels-idx1-ubyte": np.arange(train) % 10,
        "t10k-images-idx3-ubyte": np.random.randint(0, 256, (test, 2, 3)),
        "t10k-labels-idx1-ubyte": np.arange(test) % 10,
    }
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    return arrays


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("files that are there must not be downloaded")

    monkeypatch.setattr(images, "_download", refuse)


@pytest.mark.parametrize(
    "place, name",
    [
        ("MNIST/raw", "mnist"),
        ("raw", "mnist"),
        (".", "mnist"),
        ("FashionMNIST/raw", "fashion-mnist"),
        ("KMNIST/raw", "kmnist"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
def test_idx_files(tmp_path, no_download, place, name, zipped):
    arrays = write_idx(tmp_path / place)
    if zipped:
        for path in list((tmp_path / place).glob("*ubyte")):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), 1))
            path.unlink()
    splits = load(name, tmp_path)
    x, labels, x_test, labels_test = (torch.from_numpy(a) for a in arrays.values())
    x, x_test = x.unsqueeze(1).float() / 255, x_test.unsqueeze(1).float() / 255
    for split, expected in zip(
        splits, [Split(x[:20], labels[:20]), Split(x[20:], labels[20:]), Split(x_test, labels_test)], strict=True
    ):
        assert split.x.equal(expected.x) and split.labels.equal(expected.labels)
        assert (split.x.dtype, split.labels.dtype) == (torch.float32, torch.int64)


GOOD = idx(np.arange(60).reshape(10, 2, 3))
BAD_IDX = {
    "empty": b"",
    "short header": GOOD[:3],
    "no shape": GOOD[:6],
    "truncated": GOOD[:-1],
    "no data": GOOD[:16],
    "too long": GOOD + b"\0",
    "other magic": b"\1" + GOOD[1:],
    "other type": GOOD[:2] + b"\x0d" + GOOD[3:],
    "text": b"<html>404 Not Found</html>",
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("kind", BAD_IDX)
def test_bad_idx_files_are_refused(tmp_path, no_download, kind, zipped):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.unlink()
    if zipped:
        path = path.with_name(path.name + ".gz")
    path.write_bytes(gzip.compress(BAD_IDX[kind]) if zipped else BAD_IDX[kind])
    with pytest.raises(ValueError, match=str(path)):
        load("mnist", tmp_path)


def test_damaged_gz_files_are_refused_or_read_right(tmp_path):
    path = tmp_path / "images.gz"
    content = gzip.compress(GOOD)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(path)):
            images._read_idx(path)
    for position in range(len(content)):  # the date of a gz file, for example, may be anything
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read = images._read_idx(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert read.tolist() == np.arange(60).reshape(10, 2, 3).tolist()


def test_labels_of_another_set_are_refused(tmp_path, no_download):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(10_019)))
    with pytest.raises(ValueError, match="labels"):
        load("mnist", tmp_path)


def test_too_few_images_to_split_are_refused(tmp_path, no_download):
    write_idx(tmp_path, train=10_000)  # nothing would be left to train on
    with pytest.raises(ValueError, match="10,?000"):
        load("mnist", tmp_path)


# torchvision.


def install(monkeypatch, name: str, dataset: type) -> None:
    """Replaces torchvision, which is slow to import, by a module with one data set."""
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(**{name: dataset})
    monkeypatch.setitem(sys.modules, "torchvision", module)


def test_cifar10(tmp_path, monkeypatch):
    calls = []

    class CIFAR10:
        """Like torchvision's: pixels last, as an array, labels as a list."""

        def __init__(self, root, train, download):
            calls.append((Path(root), train, download))
            size = 5_010 if train else 6
            self.data = np.random.default_rng(int(train)).integers(0, 256, (size, 4, 5, 3), dtype=np.uint8)
            self.targets = [i % 10 for i in range(size)]

    install(monkeypatch, "CIFAR10", CIFAR10)
    splits = load("cifar10", tmp_path)
    assert sorted(calls) == [(tmp_path, False, True), (tmp_path, True, True)]
    pixels = torch.from_numpy(CIFAR10(tmp_path, True, True).data)
    test_pixels = torch.from_numpy(CIFAR10(tmp_path, False, True).data)
    for split, source, first in zip(splits, (pixels[:10], pixels[10:], test_pixels), (0, 10, 0), strict=True):
        assert split.x.shape == (len(source), 3, 4, 5)
        for channel in range(3):
            assert split.x[:, channel].equal(source[..., channel].float() / 255)
        assert split.labels.tolist() == [(first + i) % 10 for i in range(len(source))]


def test_omniglot(tmp_path, monkeypatch):
    """Ink becomes 1 and paper 0, with greys between where a stroke covers part of a pixel."""
    calls = []

    class Omniglot(list):
        """Like torchvision's: pairs of an image in 8-bit grey, ink 0 and paper 255, and a label."""

        def __init__(self, root, background, download):
            calls.append((Path(root), background, download))
            image = Image.new("L", (105, 105), 255)
            image.paste(0, (0, 0, 105, 50))  # ink in the upper 50 of 105 rows: 13 1/3 of 28
            super().__init__((image, label) for label in range(1_355 if background else 4))

    install(monkeypatch, "Omniglot", Omniglot)
    splits = load("omniglot", tmp_path)
    assert sorted(calls) == [(tmp_path, False, True), (tmp_path, True, True)]
    assert [tuple(s.x.shape) for s in splits] == [(10, 1, 28, 28), (1345, 1, 28, 28), (4, 1, 28, 28)]
    assert sorted(torch.cat([splits.train.labels, splits.validation.labels]).tolist()) == list(range(1_355))
    assert splits.test.labels.tolist() == [0, 1, 2, 3]
    image = splits.test.x[0, 0]
    assert (splits.train.x == image).all()
    assert image.min() >= 0 and image.max() <= 1
    # Rows away from the edge are pure. The edge runs through row 13, a third ink and two thirds paper: it is grey, and
    # ink fades downwards, for any kernel of the resizing.
    assert (image[:11] == 1).all() and (image[16:] == 0).all()
    assert ((image[13] > 0.1) & (image[13] < 0.6)).all() and (image.diff(dim=0) <= 0).all()


@pytest.mark.parametrize(
    "failure", [RuntimeError("Error downloading train-images"), OSError("no route to host")], ids=repr
)
def test_a_download_that_fails(tmp_path, monkeypatch, failure):
    class MNIST:
        def __init__(self, *args, **kwargs):
            raise failure

    install(monkeypatch, "MNIST", MNIST)
    with pytest.raises(
        OSError, match=f"mnist is not in {tmp_path} and could not be downloaded.*{failure}.*Put its files"
    ):
        load("mnist", tmp_path)


def test_a_torchvision_that_does_not_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="mnist needs torchvision"):
        load("mnist", tmp_path)
