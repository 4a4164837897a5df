"""Images and arrays from files: folders of pictures, bytes, labels, and files that stay on the disk."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from pyrovae.data import Rows, load


def noise(*shape: int) -> np.ndarray:
    x = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    x.flat[0] = 255
    return x


def all_of(splits) -> torch.Tensor:
    return torch.cat([split.x[:] for split in splits])


def in_any_order(x: torch.Tensor) -> list:
    return sorted(x.flatten(1).tolist())


def folder_of(root, images: np.ndarray, names: list[str]):
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        path = root / name / f"{i:03}.png" if "." not in name else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def test_a_folder_gives_its_pictures_with_subfolders_as_classes(tmp_path):
    images = noise(30, 5, 7, 3)
    names = ["bird" if i % 3 else "ant" for i in range(30)]
    folder_of(tmp_path, images, names)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.png").write_text("nor this")
    splits = load(str(tmp_path))
    assert [len(split.x) for split in splits] == [24, 3, 3]
    assert splits.train.x.shape == (24, 3, 5, 7) and splits.train.x.dtype == torch.float32
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    label_of = {tuple(x): int(i % 3 > 0) for i, x in enumerate(expected.flatten(1).tolist())}  # ant is 0, bird is 1
    for split in splits:
        assert [label_of[tuple(x)] for x in split.x.flatten(1).tolist()] == split.labels.tolist()
    assert in_any_order(all_of(splits)) == in_any_order(expected)


def test_a_folder_may_bring_its_parts(tmp_path):
    images = noise(24, 4, 4)
    names = [f"{part}/{'b' if i % 2 else 'a'}" for i, part in enumerate(12 * ["train"] + 7 * ["test"] + 5 * ["valid"])]
    splits = load(str(folder_of(tmp_path / "three", images, names)))
    assert [len(split.x) for split in splits] == [12, 5, 7]
    expected = torch.from_numpy(images).unsqueeze(1).float() / 255
    assert in_any_order(splits.test.x) == in_any_order(expected[12:19])
    assert sorted(splits.test.labels.tolist()) == [0, 0, 0, 0, 1, 1, 1] or sum(splits.test.labels) in (3, 4)
    splits = load(str(folder_of(tmp_path / "two", images, [name.replace("valid", "train") for name in names])))
    assert [len(split.x) for split in splits] == [16, 1, 7]
    assert in_any_order(splits.test.x) == in_any_order(expected[12:19])


def test_pictures_of_many_kinds_become_one_and_it_is_said(tmp_path):
    rgb = noise(6, 6, 8, 3)
    for i in range(6):
        Image.fromarray(rgb[i]).save(tmp_path / f"{i}.png")
    Image.fromarray(noise(9, 20)).save(tmp_path / "grey.png")
    Image.fromarray(rgb[0]).quantize(8).save(tmp_path / "palette.gif")
    transparent = np.zeros((6, 8, 4), np.uint8)
    transparent[..., 3] = [255, 0] * 4
    Image.fromarray(transparent).save(tmp_path / "transparent.png")
    turned = Image.fromarray(np.full((8, 6, 3), 9, np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    with pytest.warns(UserWarning) as said:
        splits = load(str(tmp_path))
    (text,) = (str(w.message) for w in said)
    assert "of 10 pictures" in text and "1 were scaled to 8 x 6" in text and "1 were put on a white ground" in text
    assert "1 were made coloured" in text
    x = all_of(splits)
    assert x.shape == (10, 3, 6, 8)
    assert any(image.equal(torch.tensor([0.0, 1.0] * 4).expand(3, 6, 8)) for image in x)  # white where transparent
    assert any(bool((image == 9 / 255).all()) for image in x)


def test_sixteen_bits_become_eight_by_the_same_scale_in_all(tmp_path):
    for i, value in enumerate((0, 200, 257, 65535)):
        Image.fromarray(np.full((3, 3), value, np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="4 were reduced from sixteen bits"):
        x = all_of(load(str(tmp_path)))
    assert sorted((255 * x[:, 0, 0, 0]).round().tolist()) == [0, 1, 1, 255]


def test_of_an_animation_the_first_frame_is_read_with_a_word(tmp_path):
    frames = [Image.fromarray(np.full((3, 3), value, np.uint8)) for value in (0, 255, 255)]
    for i in range(3):
        frames[0].save(tmp_path / f"{i}.gif", save_all=i < 2, append_images=frames[1:] if i < 2 else ())
    with pytest.warns(UserWarning, match="2 were cut to the first of their frames"):
        assert not all_of(load(str(tmp_path))).any()


def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="holds no picture"):
        load(str(tmp_path))
    folder_of(tmp_path, noise(5, 4, 4), ["a"] * 5)
    whole = (tmp_path / "a" / "001.png").read_bytes()
    for content in (b"", b"not a picture", whole[: len(whole) // 2]):
        (tmp_path / "a" / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.png cannot be read as a picture"):
            load(str(tmp_path))
    (tmp_path / "a" / "bad.png").unlink()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a" / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif.*floating-point"):
        load(str(tmp_path))
    (tmp_path / "a" / "f.tif").unlink()
    for i in range(3):
        (tmp_path / "a" / f"{i:03}.png").unlink()
    with pytest.raises(ValueError, match="2 data, too few"):
        load(str(tmp_path))


# How images of 5 x 7 pixels are stored, and their shape after loading.
BYTES = {
    "grey": (lambda x: x[..., 0], (1, 5, 7)),
    "colour, channels last": (lambda x: x, (3, 5, 7)),
    "colour, channels first": (lambda x: np.moveaxis(x, -1, 1), (3, 5, 7)),
    "order of columns": (np.asfortranarray, (3, 5, 7)),
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_bytes_are_images_from_0_to_1(kind, suffix, tmp_path):
    form, shape = BYTES[kind]
    images, path = noise(20, 5, 7, 3), str(tmp_path / f"x.{suffix}")
    np.save(path, form(images)) if suffix == "npy" else np.savez(path, x=form(images))
    expected = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).float()[:, : shape[0]] / 255
    assert in_any_order(all_of(load(path))) == in_any_order(expected)
    assert load(path).test.x.shape == (2, *shape)


def test_two_values_are_0_and_1(tmp_path):
    bits = (noise(9, 4, 4) > 127).astype(np.uint8)
    for top in (1, 255):
        np.save(tmp_path / "x.npy", bits * top)
        assert in_any_order(all_of(load(str(tmp_path / "x.npy")))) == in_any_order(torch.from_numpy(bits).float())


def test_a_table_of_bytes_is_no_image_and_dark_images_are_told(tmp_path):
    np.save(tmp_path / "x.npy", noise(9, 4))
    assert all_of(load(str(tmp_path / "x.npy"))).max() == 255
    np.save(tmp_path / "dark.npy", noise(9, 4, 4) // 16)
    with pytest.warns(UserWarning, match="from 0 to 15 only"):
        load(str(tmp_path / "dark.npy"))


def test_channels_of_numbers_that_are_last_are_moved_and_it_is_said(tmp_path):
    x = np.random.RandomState(0).rand(9, 6, 5, 3)
    np.save(tmp_path / "x.npy", x)
    with pytest.warns(UserWarning, match="channels"):
        found = all_of(load(str(tmp_path / "x.npy")))
    assert in_any_order(found) == in_any_order(torch.from_numpy(np.moveaxis(x, -1, 1).copy()).float())


def test_labels_of_an_npz_become_classes(tmp_path):
    x, path = np.arange(60.0).reshape(20, 3), str(tmp_path / "x.npz")
    for y, expected in (
        (np.arange(20) % 4, lambda i: i % 4),
        (np.array(["dog", "cat"] * 10), lambda i: 1 - i % 2),  # in the order of the alphabet
        ((np.arange(20.0) % 3)[:, None], lambda i: i % 3),
    ):
        np.savez(path, images=x, labels=y)
        for split in load(path):
            assert split.labels.dtype == torch.int64
            assert split.labels.tolist() == [expected(round(row[0] / 3)) for row in split.x.tolist()]
    for y, text in ((np.arange(19), "19 labels, but images holds 20"), (np.arange(20) / 3, "must be classes")):
        np.savez(path, images=x, labels=y)
        with pytest.raises(ValueError, match=text):
            load(path)


def test_an_npz_of_two_parts_sets_some_aside(tmp_path):
    parts = {"x_train": noise(20, 4, 4), "y_train": np.arange(20) % 3, "x_test": noise(6, 4, 4), "y_test": np.arange(6)}
    np.savez(tmp_path / "mnist.npz", **parts)
    splits = load(str(tmp_path / "mnist.npz"))
    assert [len(split.x) for split in splits] == [18, 2, 6] == [len(split.labels) for split in splits]
    assert splits.test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert splits.test.x.equal(torch.from_numpy(parts["x_test"]).unsqueeze(1).float() / 255)


def test_a_large_file_stays_on_the_disk(tmp_path, monkeypatch):
    x = noise(500, 9, 8, 3)
    np.save(tmp_path / "x.npy", x)
    small = load(str(tmp_path / "x.npy"))
    monkeypatch.setattr("pyrovae.data.arrays._IN_MEMORY", 1000)
    large = load(str(tmp_path / "x.npy"))
    for a, b in zip(small, large, strict=True):
        assert isinstance(b.x, Rows) and b.x.map is not None and b.x.shape == tuple(a.x.shape)
        assert b.x[:].equal(a.x) and b.x[3:7].equal(a.x[3:7])


def test_loading_a_large_file_takes_little_memory(tmp_path):
    megabytes = 128
    out = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float64, (megabytes * 2**17 // 512, 512))
    out[:] = 1
    del out
    script = f"""
        import re
        from pyrovae.data import load

        def peak():
            return int(re.search(r"VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1]) // 1024

        load("digits")
        before = peak()
        splits = load({str(tmp_path / "x.npy")!r})
        print(len(splits.train.x), peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    rows = megabytes * 2**17 // 512
    assert size == rows - 2 * (rows // 10) and grown < megabytes / 2, done.stdout
