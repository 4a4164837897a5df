"""Sounds: recordings as sequences of power spectra, and back."""

import io
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.encodings import WholeNumbers
from pyrovae.data.folders import count_files, raise_first, read_files, split_files
from pyrovae.data.pictures import PICTURES
from pyrovae.data.splits import Split, Splits
from pyrovae.extras import check_installed
from pyrovae.inference.messages import warn

__all__ = ["Spectrogram", "is_sounds", "load_sounds", "read_sounds"]

SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff")
_SECONDS = 0.032  # of a frame, about: a pitch of 60 Hz has two periods in it
_MAX_FRAMES = 64
_STEP = 2.0**-15  # of sixteen bits, where 1 is full scale
_HIGHEST = 3 + math.log10(4 / math.pi)  # of a square wave of full scale
_ITERATIONS = 100  # of Griffin and Lim


@dataclass(frozen=True)
class Spectrogram(WholeNumbers):
    r"""How sounds become sequences of spectra, and spectra become sounds.

    .. math:: x_{tf} = \log_{10} \frac{4\, |c_{tf}|}{w} + 3

    c are the Fourier coefficients of frames of w samples, which overlap by half, with a Hann window. x is the level of
    a frequency in a frame in units of 20 dB, above -60 dB of a sine of full scale: from about -3, the noise of sixteen
    bits, to 3. The first and the last coefficient of a frame, which have no phase, are left out.

    A level of 3 is that of a sine of full scale. Noise within a step of sixteen bits is added to the samples, always
    the same to the same sound, so that silence has a level, and a density of levels exists. A sound that is shorter
    than a frame is followed by silence. Sounds are cut into pieces of `num_frames`, the last of which may be
    shorter.

    Args:
        rate: samples a second.
        window: samples of a frame, :math:`w`, an even number.
        num_frames: frames of a piece, at most.

    Raises:
        ValueError: when `rate`, `window` or `num_frames` is too small, or `window` is odd.

    References:
        Signal Estimation from Modified Short-Time Fourier Transform, D. W. Griffin and J. S. Lim, 1984,
        https://doi.org/10.1109/TASSP.1984.1164317 (how :meth:`decode` finds the phases).

    >>> spectrogram = Spectrogram(rate=8000, window=256, num_frames=40)
    >>> sine = np.sin(2 * np.pi * 1000 / 8000 * np.arange(8000))
    >>> x, which = spectrogram.encode([sine])
    >>> x.shape, which
    (torch.Size([2, 40, 127]), tensor([0, 0]))
    >>> int(x[0, 20].argmax() + 1) * 8000 / 256, round(float(x[0, 20].max()), 2)
    (1000.0, 3.0)
    """

    title: ClassVar[str] = "a spectrogram"

    rate: int
    window: int
    num_frames: int

    def __post_init__(self) -> None:
        self.check_at_least(rate=1, window=4, num_frames=2)
        if self.window % 2:
            raise ValueError(f"window must be even, got {self.window}.")

    @classmethod
    def of(cls, sounds: Sequence[np.ndarray], rate: int) -> "Spectrogram":
        """Returns what suits sounds: frames of about 32 ms, and pieces as long as the longest sound, up to 64 frames.

        Args:
            sounds: their samples, with full scale from -1 to 1, ``(samples,)`` each.
            rate: samples a second.
        """
        window = max(16, 2 ** round(math.log2(_SECONDS * rate)))
        longest = max((len(sound) for sound in sounds), default=0)
        return cls(rate, window, min(_MAX_FRAMES, max(2, 1 + longest // (window // 2))))

    @property
    def num_frequencies(self) -> int:
        """The number of levels in a frame."""
        return self.window // 2 - 1

    @property
    def num_steps(self) -> int:
        """The number of steps of a piece, its frames."""
        return self.num_frames

    @property
    def hop(self) -> float:
        """The time from a frame to the next, in seconds."""
        return self.window / 2 / self.rate

    def encode(self, sounds: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Returns the pieces of sounds and the number of the sound that each is of, counted from 0.

        Args:
            sounds: samples, ``(samples,)`` each.

        Returns:
            Levels, ``(pieces, num_frames, num_frequencies)``, with NaN after the end of a piece; ``(pieces,)``.

        Raises:
            ValueError: when a sound is no vector of finite floating-point numbers, or has none.
        """
        pieces, owners = [], []
        for i, sound in enumerate(sounds):
            _check(sound, f"sounds[{i}]")
            for piece in self._levels(self._coefficients(_with_noise(sound))).split(self.num_frames):
                pieces.append(torch.nn.functional.pad(piece, (0, 0, 0, self.num_frames - len(piece)), value=torch.nan))
                owners.append(i)
        x = torch.stack(pieces) if pieces else torch.empty(0, self.num_frames, self.num_frequencies)
        return x, torch.tensor(owners, dtype=torch.long)

    def decode(self, x: Tensor) -> list[np.ndarray]:
        """Returns sounds with about these levels, whose phases are found by iterations that begin at random.

        Levels above that of a square wave of full scale become that.

        Args:
            x: levels, ``(pieces, frames, num_frequencies)``; a piece ends before its first frame with NaN.

        Raises:
            ValueError: when x has another shape, or a piece has no frame.
        """
        return [self._with_found_phases(self._magnitudes(piece)) for piece in self._until_end(x)]

    def decode_like(self, x: Tensor, sounds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns sounds with these levels, and the phases of the sounds that they reconstruct.

        Args:
            x: levels of as many frames as the sounds have, ``(sounds, frames, num_frequencies)``.
            sounds: samples, ``(samples,)`` each.
        """
        found = []
        for piece, sound in zip(self._until_end(x), sounds, strict=True):
            phases = torch.sgn(self._coefficients(_with_noise(sound))[: len(piece)])
            found.append(self._sound(self._magnitudes(piece) * phases))
        return found

    def describe(self) -> str:
        """Returns in words what the data are.

        >>> print(Spectrogram(rate=8000, window=256, num_frames=40).describe())
        8,000 samples a second; frames of 32 ms, one each 16 ms, of 127 levels in units of 20 dB; pieces of up to 40
        frames, 0.64 s
        """
        return (
            f"{self.rate:,} samples a second; frames of {1000 * self.window / self.rate:.0f} ms, one each "
            f"{1000 * self.hop:.0f} ms, of {self.num_frequencies} levels in units of 20 dB; pieces of up to "
            f"{self.num_frames}\nframes, {self.num_frames * self.hop:.2f} s"
        )

    def _coefficients(self, sound: np.ndarray) -> Tensor:
        """Returns the Fourier coefficients of the frames, ``(frames, frequencies)``, the first and the last too."""
        samples = torch.as_tensor(np.pad(sound, (0, max(0, self.window - len(sound)))))
        return torch.stft(samples, self.window, self.window // 2, window=self._hann(), return_complex=True).T

    def _sound(self, coefficients: Tensor) -> np.ndarray:
        if len(coefficients) == 1:  # one frame is not inverted by torch
            coefficients = coefficients.expand(2, -1)
        return torch.istft(coefficients.T, self.window, self.window // 2, window=self._hann()).numpy()

    def _until_end(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 3 or x.shape[-1] != self.num_frequencies:
            raise ValueError(f"x must have shape (pieces, frames, {self.num_frequencies}), got {tuple(x.shape)}.")
        lengths = (~x.isnan().any(-1)).cpu().int().cumprod(1).sum(1)
        if len(x) and not bool(lengths.all()):
            raise ValueError(f"piece {int(lengths.argmin())} of x has NaN in its first frame. Leave it out.")
        return [piece[:length] for piece, length in zip(x.cpu(), lengths.tolist(), strict=True)]

    def _hann(self) -> Tensor:
        return torch.hann_window(self.window, dtype=torch.float64)

    def _levels(self, coefficients: Tensor) -> Tensor:
        return ((4 / self.window) * coefficients[:, 1:-1].abs()).clamp_min(1e-12).log10().add(3).float()

    def _magnitudes(self, levels: Tensor) -> Tensor:
        middle = (self.window / 4) * 10 ** (levels.double().clamp_max(_HIGHEST) - 3)
        return torch.nn.functional.pad(middle, (1, 1))

    def _with_found_phases(self, magnitudes: Tensor) -> np.ndarray:
        phases = torch.exp(2j * math.pi * torch.rand_like(magnitudes))
        for _ in range(_ITERATIONS if len(magnitudes) > 1 else 0):
            phases = torch.sgn(self._coefficients(self._sound(magnitudes * phases))[: len(magnitudes)])
        return self._sound(magnitudes * phases)


def _check(sound: np.ndarray, name: str) -> None:
    """Raises a ValueError unless a sound is a vector of finite floating-point numbers."""
    if not isinstance(sound, np.ndarray) or sound.ndim != 1 or sound.dtype.kind != "f":
        what = f"{sound.dtype} of shape {sound.shape}" if isinstance(sound, np.ndarray) else type(sound).__name__
        raise ValueError(
            f"{name} must be a vector of floating-point samples, with full scale from -1 to 1, got {what}. Divide "
            "samples of sixteen bits by 32768; take one channel, or the mean of all."
        )
    if not len(sound):
        raise ValueError(f"{name} holds no samples. Remove it.")
    if not np.isfinite(sound).all():
        raise ValueError(f"{name} holds NaN or infinity. Remove it or replace it.")


def _with_noise(sound: np.ndarray) -> np.ndarray:
    seed = zlib.crc32(np.ascontiguousarray(sound, np.float32).tobytes())
    return sound + _STEP * np.random.default_rng(seed).uniform(-0.5, 0.5, len(sound))


def is_sounds(path: str | Path) -> bool:
    """Returns whether a path is a sound file, a .zip archive, or a folder with more sounds than pictures."""
    path = Path(path)
    if path.is_dir():
        return count_files(path, SOUNDS) > count_files(path, PICTURES)
    return path.suffix.lower() in (*SOUNDS, ".zip") and path.is_file()


def read_sounds(path: str | Path, rate: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """Reads a sound file, or those of a folder or a .zip archive; needs ``pip install 'pyrovae[sound]'``.

    Channels are averaged, and sounds of another rate are resampled; a warning says how many were.

    Args:
        path: a file (.wav, .flac, .ogg, .mp3, .aiff), a folder, or a .zip archive.
        rate: samples a second; that which most files have if None.

    Returns:
        Samples, with full scale from -1 to 1, by the names of the files, in their order; and the rate.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when there is no sound, or one cannot be read, is empty, or holds NaN or infinity.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    check_installed("soundfile", "sound")
    found: dict[str, tuple[np.ndarray, int]] = {}
    wrong: dict[str, ValueError] = {}
    for name, content in read_files(path, SOUNDS):
        try:
            found[name] = _read(content, name if path.is_file() else str(path / name))
        except ValueError as error:
            wrong[name] = error
    raise_first(wrong, len(found) + len(wrong))
    if not found:
        raise ValueError(f"{path} holds no sound. Give a folder or a .zip archive with files {', '.join(SOUNDS)}.")
    rates = Counter(its_rate for _, its_rate in found.values())
    rate = rate or min(rates, key=lambda each: (-rates[each], each))
    sounds, changed = {}, Counter[str]()
    for name, (samples, its_rate) in found.items():
        if samples.shape[1] > 1:
            changed["made of one channel, the mean"] += 1
        one = samples.mean(1)
        if its_rate != rate:
            from scipy.signal import resample_poly  # slow to import

            changed[f"resampled to {rate:,} samples a second"] += 1
            common = math.gcd(rate, its_rate)
            one = resample_poly(one, rate // common, its_rate // common)
        sounds[name] = one
    if changed:
        said = ", ".join(f"{count:,} were {what}" for what, count in changed.items())
        warn(f"of {len(sounds):,} sounds in {path}, {said}.")
    return sounds, rate


def load_sounds(path: str | Path, spectrogram: Spectrogram | None = None) -> Splits:
    """Loads sounds as splits of the pieces of their spectrograms; all pieces of a sound are in one of them.

    Subfolders are classes, or parts, as those of pictures (:func:`pyrovae.data.load`). Otherwise 8/10, 1/10 and 1/10 of
    the sounds are taken in a fixed random order.

    Args:
        path: a folder or a .zip archive.
        spectrogram: how they become spectra; what suits the sounds if None.

    Returns:
        The splits, with the spectrogram as ``splits.spectrogram``. x has shape ``(pieces, num_frames,
        num_frequencies)`` with NaN after the end of a piece, and ``split.rows`` are the numbers of the sounds in the
        order of their names, counted from 1.
    """
    path = Path(path)
    sounds, rate = read_sounds(path, None if spectrogram is None else spectrogram.rate)
    rows, labels = split_files(path, list(sounds), "sounds")
    samples = list(sounds.values())
    if spectrogram is None:
        spectrogram = Spectrogram.of([samples[i] for i in rows[0].tolist()], rate)
    splits = []
    for chosen in rows:
        x, which = spectrogram.encode([samples[i] for i in chosen.tolist()])
        of = chosen[which]
        splits.append(Split(x, None if labels is None else labels[of], of + 1))
    return Splits(*splits, spectrogram=spectrogram)


def _read(file: Path | io.BytesIO, name: str) -> tuple[np.ndarray, int]:
    """Returns the samples of a file, ``(samples, channels)``, and their rate."""
    import soundfile

    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"{name} cannot be read as a sound ({error}). Remove it or replace it.") from None
    _check(samples.mean(1), name)
    return samples, rate
