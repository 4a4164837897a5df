"""Sounds as data: files to levels of frequencies and back, and the density that noise has."""

import math
import zipfile

import numpy as np
import pytest
import torch

from pyrovae.data import Spectrogram, is_sounds, load, load_sounds, read_sounds

soundfile = pytest.importorskip("soundfile")
RATE = 2000
SPECTROGRAM = Spectrogram(rate=RATE, window=64, num_frames=10)


def tone(frequency, seconds=0.5, rate=RATE, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write(path, samples, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)


@pytest.fixture
def folder(tmp_path):
    """Twenty tones of 0.1 to 1.05 seconds, in two classes."""
    for i in range(20):
        write(tmp_path / "sounds" / ("low" if i < 8 else "high") / f"{i:02d}.wav", tone(100 + 20 * i, 0.1 + 0.05 * i))
    return tmp_path / "sounds"


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 0.01])
def test_the_level_of_a_sine_is_its_amplitude(amplitude):
    x, _ = SPECTROGRAM.encode([tone(10 * RATE / 64, amplitude=amplitude)])
    assert x[0, 4].argmax() == 9  # coefficient 10; the first is left out
    assert x[0, 4].max().item() == pytest.approx(math.log10(amplitude) + 3, abs=1e-3)


def test_levels_of_white_noise_have_the_mean_and_variance_of_a_log_exponential():
    """Squares of coefficients of normal noise are exponential, of mean sum(window^2) times the variance."""
    scale, rng = 0.05, np.random.default_rng(0)
    spectrogram = Spectrogram(RATE, 64, 2000)
    x, _ = spectrogram.encode([scale * rng.normal(size=64 * 4000)])
    some = x[:, 1::4][~x[:, 1::4].isnan()].double()  # frames that do not overlap: independent but for neighbours in f
    power = (4 / 64) ** 2 * scale**2 * 3 / 8 * 64
    mean = (math.log(power) - np.euler_gamma) / (2 * math.log(10)) + 3
    variance = math.pi**2 / 6 / (2 * math.log(10)) ** 2
    # Three neighbouring frequencies of a Hann window are correlated by at most 2/3 and 1/6 in amplitude.
    num_independent = len(some) / 2.5
    assert some.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / num_independent))
    assert some.var().item() == pytest.approx(variance, rel=5 * math.sqrt(4.4 / num_independent))


def test_pieces_end_with_nan_and_know_their_sound():
    sounds = [tone(300, 0.1), tone(400, 0.5), tone(500, 0.32)]
    x, owners = SPECTROGRAM.encode(sounds)
    frames = [1 + len(sound) // 32 for sound in sounds]
    assert owners.tolist() == [0, 1, 1, 1, 1, 2, 2, 2][: len(owners)]
    there = ~x.isnan()
    assert torch.equal(there.all(-1), there.any(-1))
    counts = there.any(-1).sum(1)
    assert [int(counts[owners == i].sum()) for i in range(3)] == frames
    assert SPECTROGRAM.encode([])[0].shape == (0, 10, 31)


def test_silence_has_finite_levels_which_are_always_the_same():
    x, _ = SPECTROGRAM.encode([np.zeros(320)])
    again, _ = SPECTROGRAM.encode([np.zeros(320)])
    assert x[~x.isnan()].isfinite().all() and torch.equal(x.nan_to_num(9), again.nan_to_num(9))
    assert x.nanmean().item() == pytest.approx(-2.8, abs=0.3)


def test_sounds_come_back_from_their_levels():
    torch.manual_seed(0)
    spectrogram = Spectrogram(RATE, 64, 40)
    sound = tone(320, 0.6) + tone(700, 0.6, amplitude=0.1)
    x, _ = spectrogram.encode([sound])
    [found] = spectrogram.decode(x)
    assert abs(len(found) - len(sound)) < 64
    again, _ = spectrogram.encode([found])
    loud = (x > 1.5) & ~again.isnan()
    assert (x - again)[loud].abs().mean() < 0.05  # a decibel
    [same] = spectrogram.decode_like(x, [sound])
    n = len(same)
    assert np.abs(same[32:-32] - sound[:n][32:-32]).max() < 0.05 * np.abs(sound).max()


def test_one_frame_becomes_a_sound():
    x, _ = SPECTROGRAM.encode([tone(300, 0.02)])
    assert np.isfinite(SPECTROGRAM.decode(x[:1, :1])[0]).all()


def test_all_pieces_of_a_sound_are_in_one_part(folder):
    splits = load_sounds(folder)
    numbers = [set(part.rows.tolist()) for part in splits]
    assert set.union(*numbers) == set(range(1, 21)) and sum(map(len, numbers)) == 20
    assert splits.spectrogram.rate == RATE and splits.spectrogram.window == 64
    names = sorted(read_sounds(folder)[0])
    for part in splits:
        classes = [int(names[row - 1].startswith("low")) for row in part.rows.tolist()]
        assert part.labels.tolist() == classes


def test_an_archive_is_as_its_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "sounds.zip", "w") as archive:
        archive.writestr("__MACOSX/sounds/._00.wav", b"no sound")
        for path in folder.rglob("*.wav"):
            archive.write(path, path.relative_to(tmp_path))
    a, b = load(str(folder)), load(str(tmp_path / "sounds.zip"))
    for part, other in zip(a, b, strict=True):
        assert torch.equal(part.x.nan_to_num(9), other.x.nan_to_num(9))
        assert torch.equal(part.labels, other.labels)


def test_subfolders_may_be_parts(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for i in range(count):
            write(tmp_path / part / f"{i}.flac", tone(200 + 20 * i))
    splits = load_sounds(tmp_path)
    assert [len(set(part.rows.tolist())) for part in splits] == [9, 1, 3]
    assert splits.train.labels is None


def test_channels_are_averaged_and_rates_made_the_same(tmp_path):
    write(tmp_path / "a.wav", tone(300))
    write(tmp_path / "b.wav", np.stack([tone(300), np.zeros(1000)], 1))
    write(tmp_path / "c.wav", tone(300, rate=8000), 8000)
    with pytest.warns(UserWarning, match="of 3 sounds in .*, 1 were made of one channel.*, 1 were resampled to 2,000"):
        sounds, rate = read_sounds(tmp_path)
    assert rate == RATE
    assert np.abs(2 * sounds["b.wav"] - sounds["a.wav"]).max() < 2**-14
    assert np.abs(sounds["c.wav"] - sounds["a.wav"])[50:-50].max() < 0.01


def test_a_folder_of_music_with_its_covers_holds_sounds(folder):
    from PIL import Image

    Image.new("L", (4, 4)).save(folder / "cover.png")
    assert is_sounds(folder)
    for i in range(30):
        Image.new("L", (4, 4)).save(folder / f"{i}.png")
    assert not is_sounds(folder)


def test_a_folder_with_the_name_of_a_data_set_is_not_taken_for_it(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("digits")
    with pytest.warns(UserWarning, match=r"digits is the data set of this name.* name it ./digits"):
        assert load("digits").train.x.shape == (1197, 1, 8, 8)
    assert load("./digits").spectrogram is not None


@pytest.mark.parametrize(
    ("samples", "message"),
    [(np.zeros(0), "holds no samples"), (np.array([0.0, np.nan]), "holds NaN or infinity")],
)
def test_a_file_without_a_sound_is_named(folder, samples, message):
    write(folder / "high" / "bad.wav", samples, subtype="FLOAT")
    with pytest.raises(ValueError, match=rf"bad.wav {message}"):
        load_sounds(folder)
    with pytest.raises(ValueError, match=rf"sounds\[1\] {message}"):
        SPECTROGRAM.encode([tone(300), samples])


@pytest.mark.parametrize(
    "sound", [np.ones(300, np.int16), np.ones((300, 2)), [0.1, 0.2]], ids=["integers", "two channels", "a list"]
)
def test_samples_are_vectors_of_floating_point_numbers(sound):
    with pytest.raises(ValueError, match=r"sounds\[0\] must be a vector of floating-point samples, with full scale"):
        SPECTROGRAM.encode([sound])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 30), r"x must have shape \(pieces, frames, 31\), got \(2, 5, 30\)"),
        (torch.zeros(5, 31), r"x must have shape"),
        (torch.full((2, 5, 31), torch.nan), "piece 0 of x has NaN in its first frame"),
    ],
)
def test_levels_without_a_sound_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        SPECTROGRAM.decode(x)


def test_levels_above_full_scale_are_no_louder_than_it():
    assert np.abs(SPECTROGRAM.decode(torch.full((1, 10, 31), 100.0))[0]).max() < 100


def test_what_is_no_sound_is_named(tmp_path, folder):
    (folder / "broken.wav").write_bytes(b"RIFF, but no more")
    with pytest.raises(ValueError, match=r"broken.wav cannot be read as a sound \(.*\). Remove it"):
        load_sounds(folder)
    (tmp_path / "empty").mkdir()
    (folder / "other.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="So is, of 22 files: other.wav"):
        load_sounds(folder)
    with pytest.raises(ValueError, match="holds no sound"):
        read_sounds(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no picture, sound or MIDI file"):
        load(str(tmp_path / "empty"))
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"texts.zip holds no sound"):
        load(str(tmp_path / "texts.zip"))
    (tmp_path / "fake.zip").write_text("text")
    with pytest.raises(ValueError, match=r"fake.zip cannot be read as a .zip archive"):
        load(str(tmp_path / "fake.zip"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_sounds(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds 1 sounds, too few to split"):
        load_sounds(folder / "low" / "00.wav")


def test_a_spectrogram_is_checked():
    assert Spectrogram.from_dict(SPECTROGRAM.to_dict()) == SPECTROGRAM
    with pytest.raises(ValueError, match="must have the entries rate, window, num_frames"):
        Spectrogram.from_dict({"rate": 8000})
    with pytest.raises(ValueError, match="window must be even"):
        Spectrogram(8000, 255, 10)
    with pytest.raises(ValueError, match="num_frames must be a whole number of at least 2, got 1"):
        Spectrogram(8000, 256, 1)
    assert Spectrogram.of([np.zeros(100_000)], 44_100) == Spectrogram(44_100, 1024, 64)
    assert Spectrogram.of([np.zeros(2000)], 8000) == Spectrogram(8000, 256, 16)
