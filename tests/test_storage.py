"""Files: read back bitwise, refused when damaged or foreign, and intact when a process is killed."""

import errno
import os
import pickle
import random
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import Moments, assert_same, ended_by, in_new_process
from torch import nn

from pyrovae import storage
from pyrovae.storage import load, read_checkpoint, save, write_atomically, write_checkpoint

# Processes that are killed. Their functions run in new processes, which import them from here and from test_training.


OLD, NEW = {"content": [1.0] * 1000}, {"content": [2.0] * 1000}


def overwrite_and_be_killed(folder: Path) -> None:
    """Kills processes that replace OLD by NEW, and asserts that the file is always one of them."""
    seen = []

    def found(path: Path) -> dict:
        state = read_checkpoint(path)
        assert state in (OLD, NEW)
        return state

    for last in range(1, 7):  # a write has five moments; the sixth never comes
        path = folder / f"moment{last}"
        write_checkpoint(path, OLD)
        status = ended_by(lambda _, path=path: write_checkpoint(path, NEW), last=last)
        assert status == (signal.SIGKILL if last < 6 else 0)
        seen.append(found(path))
    assert seen == [OLD, OLD, OLD, NEW, NEW, NEW], "the new content must appear with the renaming, and not before"

    def forever(_: Moments) -> None:
        while True:
            write_checkpoint(path, NEW)
            write_checkpoint(path, OLD)

    path, clock = folder / "random", random.Random(0)
    write_checkpoint(path, OLD)
    for _ in range(20):
        assert ended_by(forever, seconds=clock.uniform(0, 0.03)) == signal.SIGKILL
        found(path)


def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    in_new_process("test_storage.overwrite_and_be_killed", tmp_path)


# Weights.


class Tied(nn.Module):
    """Two layers that share their weight, buffers of several types, and one that is not part of the state."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.rand(4) < 0.5)
        self.register_buffer("coarse", torch.randn(2, 3).bfloat16())
        self.register_buffer("transposed", torch.randn(2, 3).T)
        self.register_buffer("constant", torch.randn(2), persistent=False)


def test_weights_are_read_back_to_the_bit(tmp_path):
    written, read = Tied(), Tied()
    written.norm(torch.randn(5, 3))  # moves the running statistics
    constant = read.constant.clone()
    save(written, tmp_path / "weights")
    assert load(read, tmp_path / "weights") is read
    assert_same(dict(read.state_dict()), dict(written.state_dict()))
    assert read.decode.weight is read.encode.weight, "tied weights must stay tied"
    assert_same(read.constant, constant)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_folder_is_made_where_there_is_none(tmp_path):
    save(nn.Linear(2, 2), tmp_path / "runs" / "first" / "weights")
    assert load(nn.Linear(2, 2), tmp_path / "runs" / "first" / "weights").weight.shape == (2, 2)


def test_no_file(tmp_path):
    for read in (lambda path: load(nn.Linear(2, 2), path), read_checkpoint):
        with pytest.raises(FileNotFoundError, match=f"there is no file {tmp_path / 'nothing'}"):
            read(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} is a directory.*load_run"):
            read(tmp_path)


def refuse(path: Path, module: nn.Module | None = None) -> None:
    """Asserts that a weights file is refused with a ValueError that names it, and that the module stays as it was."""
    module = nn.Linear(2, 3) if module is None else module
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=str(path)):
        load(module, path)
    assert_same(dict(module.state_dict()), before)


def test_truncated_at_any_length(tmp_path):
    path = tmp_path / "weights"
    save(nn.Linear(2, 3), path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refuse(path)
    path.write_bytes(content + b"\0")
    refuse(path)


def test_any_flipped_bit(tmp_path):
    """For every bit: either the file is refused, or the weights read are those written.

    The second happens only where the file tells the version of pyrovae that wrote it, which is for people to read.
    """
    path, written = tmp_path / "weights", nn.Linear(2, 3)
    save(written, path)
    content = path.read_bytes()
    start, end = content.index(b"version"), content.index(storage.__version__.encode()) + len(storage.__version__)
    read_anyway = set()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            module = nn.Linear(2, 3)
            before = {name: t.clone() for name, t in module.state_dict().items()}
            try:
                load(module, path)
            except ValueError as error:
                assert str(path) in str(error)
                assert_same(dict(module.state_dict()), before)
            else:
                assert_same(dict(module.state_dict()), dict(written.state_dict()))
                read_anyway.add(position)
    assert read_anyway <= set(range(start, end))


def test_foreign_files(tmp_path):
    path = tmp_path / "weights"
    tensors = dict(nn.Linear(2, 3).state_dict())
    safetensors.torch.save_file(tensors, path)  # no metadata at all
    refuse(path)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})  # as Hugging Face writes them
    refuse(path)
    path.write_text("weights of a model")
    refuse(path)
    path.write_bytes(b"")
    refuse(path)


def test_pickles_are_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name, content in (("pickle", pickle.dumps(Bomb())), ("torch", None)):
        path = tmp_path / name
        path.write_bytes(content) if content else torch.save({"weight": Bomb()}, path)
        refuse(path)
        with pytest.raises(ValueError, match=str(path)):
            read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "torch", weights_only=False)  # the bomb is live
    assert (tmp_path / "exploded").exists()


def test_another_format_version(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "FORMAT", "999")
        save(nn.Linear(2, 3), path)
    refuse(path)
    with pytest.raises(ValueError, match="format 999"):
        load(nn.Linear(2, 3), path)


def test_weights_are_no_checkpoint_nor_the_reverse(tmp_path):
    weights, checkpoint = tmp_path / "a", tmp_path / "b"
    save(nn.Linear(2, 3), weights)
    write_checkpoint(checkpoint, dict(nn.Linear(2, 3).state_dict()))
    refuse(checkpoint)
    with pytest.raises(ValueError, match=f"{weights} holds weights, not checkpoint"):
        read_checkpoint(weights)


@pytest.mark.parametrize(
    "other",
    [lambda: nn.Linear(2, 4), lambda: nn.Linear(3, 2), lambda: nn.Linear(2, 3, bias=False), lambda: nn.Embedding(3, 2)],
    ids=["wider", "transposed", "more in the file", "other names"],
)
def test_another_modules_weights(tmp_path, other):
    save(nn.Linear(2, 3), tmp_path / "weights")
    refuse(tmp_path / "weights", other())


def test_part_of_the_names_is_not_enough(tmp_path):
    save(nn.Linear(2, 3, bias=False), tmp_path / "weights")  # the module has one more than the file
    refuse(tmp_path / "weights")


# Checkpoints.


def test_nested_values_are_read_back_to_the_bit(tmp_path):
    shared = torch.randn(3)
    state = {
        "nothing": None,
        "bools": [True, False],
        "numbers": [0, -1, 2**63, 0.1, -0.0, 1e-320, float("inf"), float("nan")],
        "text": ["", 'ß \u2028 \0 " \\', "tensor", "dict", "tuple"],
        # Keys that JSON would turn into text, and keys that the encoding itself uses.
        "keys": {
            0: "int",
            "0": "text",
            1.5: "float",
            None: "none",
            (1, "a"): "tuple",
            "tensor": "0",
            "dict": [],
            "tuple": (),
        },
        "true is not one": {True: 1},
        "nested": [(), (1,), [(), {}], {"a": ({"b": [{}]},)}],
        "dtypes": [torch.randn(2, 3).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
        + [
            torch.tensor([True, False]),
            torch.arange(3, dtype=torch.uint8),
            torch.tensor([-(2**62)]),
            torch.ones(2, dtype=torch.cfloat),
        ],
        "shapes": [
            torch.tensor(3.0),
            torch.tensor(True),
            torch.empty(0),
            torch.empty(2, 0, 3),
            torch.randn(4, 3).T,
            torch.randn(9)[::2],
        ],
        "bit patterns": torch.tensor([0x7FC00001, -1, 1, -(2**31)], dtype=torch.int32).view(torch.float32),
        "shared": [shared, shared, shared[1:]],
    }
    write_checkpoint(tmp_path / "checkpoint", state)
    assert_same(read_checkpoint(tmp_path / "checkpoint"), state)


def test_gradients_are_left_behind(tmp_path):
    write_checkpoint(tmp_path / "checkpoint", {"w": nn.Parameter(torch.ones(2))})
    assert_same(read_checkpoint(tmp_path / "checkpoint"), {"w": torch.ones(2)})


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, b"bytes", 1j], ids=lambda v: type(v).__name__)
def test_what_cannot_be_kept_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match=type(value).__name__):
        write_checkpoint(tmp_path / "checkpoint", {"a": [value]})
    assert not list(tmp_path.iterdir())


# Writing.


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"]
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing, failure):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(type(failure)) as caught:
            write_atomically(path, b"new")
    if isinstance(failure, OSError):
        assert caught.value.errno == errno.ENOSPC and str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "no temporary file may stay"


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "file" / "weights",
        tmp_path / "file" / "folder" / "weights",
        tmp_path / "folder",
        Path("/proc/weights"),
        tmp_path / ("n" * 300),
    ):
        # The message names the path that was asked for, not a temporary one.
        with pytest.raises(OSError, match=f"cannot write {path}: "):
            save(nn.Linear(2, 3), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "a file, not a folder"
