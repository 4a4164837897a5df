"""Music: songs as sequences of the keys of a piano, and back."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.data.folders import count_files, read_files, split_files
from pyrovae.data.pictures import PICTURES
from pyrovae.data.sounds import SOUNDS
from pyrovae.data.splits import Split, Splits
from pyrovae.extras import check_installed
from pyrovae.inference.messages import warn

__all__ = ["PianoRoll", "is_music", "load_music", "read_music", "write_midi"]

Song = list[list[int]]  # the notes of each step, as MIDI numbers them

_MIDI = (".mid", ".midi")
_LOWEST, _NUM_KEYS, _NUM_NOTES = 21, 88, 128  # A0 and the keys of a piano; the notes of MIDI
_MAX_STEPS = 160
_PER_QUARTER = 4  # of MIDI files
_DRUMS = 9  # the channel of MIDI whose notes are drums
_LONGEST = 1_000_000  # steps of a song
_TICKS = 480  # of a quarter note, in MIDI files that are written
_VELOCITY = 80


@dataclass(frozen=True)
class PianoRoll:
    r"""How songs become sequences of keys that sound or not, and sequences become songs.

    .. math:: x_{tk} = 1 \text{ if note } k_0 + k \text{ sounds in step } t, \text{ else } 0

    A song is a list of steps, each a list of the notes that sound in it, as MIDI numbers them (60 is the middle C). A
    note that is struck again while it sounds cannot be told from one that is held. Songs are cut into pieces of
    `num_steps`, the last of which may be shorter.

    Args:
        lowest: the note of the first key, :math:`k_0`.
        num_keys: the number of keys.
        per_quarter: steps of a quarter note, for MIDI files.
        num_steps: steps of a piece, at most.

    Raises:
        ValueError: when a number is too small, or the keys go beyond the 128 notes of MIDI.

    >>> roll = PianoRoll(lowest=60, num_keys=12, per_quarter=1, num_steps=2)
    >>> x, which = roll.encode([[[60, 64, 67], [], [61]]])
    >>> x.shape, which, roll.decode(x)
    (torch.Size([2, 2, 12]), tensor([0, 0]), [[[60, 64, 67], []], [[61]]])
    """

    lowest: int
    num_keys: int
    per_quarter: int
    num_steps: int

    def __post_init__(self) -> None:
        for name, least in (("lowest", 0), ("num_keys", 1), ("per_quarter", 1), ("num_steps", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.lowest + self.num_keys > _NUM_NOTES:
            raise ValueError(f"lowest + num_keys must be at most {_NUM_NOTES}, got {self.lowest} + {self.num_keys}.")

    @classmethod
    def of(cls, songs: Sequence[Song], per_quarter: int, num_steps: int | None = None) -> "PianoRoll":
        """Returns what suits songs: the 88 keys of a piano, or all notes of MIDI if there are others.

        Args:
            songs: the songs.
            per_quarter: steps of a quarter note.
            num_steps: steps of a piece; those of the longest song, up to 160, if None.
        """
        notes = {note for song in songs for step in song for note in step}
        is_piano = all(_LOWEST <= note < _LOWEST + _NUM_KEYS for note in notes)
        longest = min(_MAX_STEPS, max(2, *map(len, songs))) if num_steps is None else num_steps
        return cls(*((_LOWEST, _NUM_KEYS) if is_piano else (0, _NUM_NOTES)), per_quarter, longest)

    def encode(self, songs: Sequence[Song]) -> tuple[Tensor, Tensor]:
        """Returns the pieces of songs and the number of the song that each is of, counted from 0.

        Args:
            songs: the songs.

        Returns:
            Keys, ``(pieces, num_steps, num_keys)``, with NaN after the end of a piece; ``(pieces,)``.

        Raises:
            ValueError: when a song has no step, or a note that is no key.
        """
        pieces, owners = [], []
        for i, song in enumerate(songs):
            if not song:
                raise ValueError(f"songs[{i}] has no step. Remove it.")
            x = torch.zeros(len(song), self.num_keys)
            for t, notes in enumerate(song):
                for note in notes:
                    if not self.lowest <= note < self.lowest + self.num_keys:
                        last = self.lowest + self.num_keys - 1
                        raise ValueError(
                            f"songs[{i}] has note {note} in step {t}, and the notes here are {self.lowest} to {last}. "
                            "Transpose it or remove it."
                        )
                    x[t, note - self.lowest] = 1.0
            for piece in x.split(self.num_steps):
                pieces.append(torch.nn.functional.pad(piece, (0, 0, 0, self.num_steps - len(piece)), value=torch.nan))
                owners.append(i)
        x = torch.stack(pieces) if pieces else torch.empty(0, self.num_steps, self.num_keys)
        return x, torch.tensor(owners, dtype=torch.long)

    def decode(self, x: Tensor) -> list[Song]:
        """Returns songs of the keys that are 1.

        Args:
            x: keys, ``(songs, steps, num_keys)``; a song ends before its first step with NaN.

        Raises:
            ValueError: when x has another shape.
        """
        if x.dim() != 3 or x.shape[-1] != self.num_keys:
            raise ValueError(f"x must have shape (songs, steps, {self.num_keys}), got {tuple(x.shape)}.")
        lengths = (~x.isnan().any(-1)).cpu().int().cumprod(1).sum(1).tolist()
        return [
            [[self.lowest + int(key) for key in (step > 0.5).nonzero()] for step in song[:length]]
            for song, length in zip(x.cpu(), lengths, strict=True)
        ]

    def describe(self) -> str:
        """Returns in words what the data are.

        >>> print(PianoRoll(lowest=21, num_keys=88, per_quarter=1, num_steps=64).describe())
        notes 21 to 108, on or off; steps of a quarter note; pieces of up to 64 steps
        """
        part = "a quarter note" if self.per_quarter == 1 else f"1/{self.per_quarter} of a quarter note"
        return (
            f"notes {self.lowest} to {self.lowest + self.num_keys - 1}, on or off; steps of {part}; pieces of up to "
            f"{self.num_steps} steps"
        )

    def to_dict(self) -> dict[str, int]:
        """Returns the arguments, as JSON holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, entries: Any) -> "PianoRoll":
        """Returns the piano roll of :meth:`to_dict`; raises a ValueError that says what is wrong with the entries."""
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, dict) or entries.keys() != {*names}:
            raise ValueError(f"a piano roll must have the entries {', '.join(names)}.")
        return cls(**entries)


def is_music(path: str | Path) -> bool:
    """Returns whether a path is a MIDI file, JSON of songs, or a folder or an archive of mostly MIDI files."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".zip":
        count = count_files(path, _MIDI)
        return count > count_files(path, SOUNDS) and count > count_files(path, PICTURES)
    if path.suffix.lower() == ".json" and path.is_file():
        return _groups(path) is not None
    return path.suffix.lower() in _MIDI and path.is_file()


def read_music(path: str | Path, per_quarter: int = _PER_QUARTER) -> dict[str, Song]:
    """Reads songs: MIDI files, for which it needs ``pip install 'pyrovae[midi]'``, or JSON.

    Notes of MIDI begin and end at the nearest step, and last one step at least. Instruments play on one piano; drums
    are left out, as is the silence before the first note.

    Args:
        path: a file (.mid, .midi), a folder or a .zip archive of such files; or a .json file of a list of songs, or of
            an object of lists of songs with the names train, valid and test. A song is a list of steps, a step the list
            of the notes that sound.
        per_quarter: steps of a quarter note, of MIDI files.

    Returns:
        Songs by their names: those of the files, or their numbers in the list, after the name of the list.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when there is no song, or one cannot be read, holds no notes, or notes that are none of MIDI.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix.lower() == ".json":
        return _read_json(path)
    check_installed("mido", "midi")
    songs: dict[str, Song] = {}
    wrong: list[ValueError] = []
    drums = 0
    for name, content in read_files(path, _MIDI):
        try:
            songs[name], has_drums = _read_midi(content, name if path.is_file() else str(path / name), per_quarter)
            drums += has_drums
        except ValueError as error:
            wrong.append(error)
    if wrong:
        more = f" So are {len(wrong) - 1:,} others of {len(songs) + len(wrong):,}." if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}")
    if not songs:
        raise ValueError(f"{path} holds no song. Give a folder or a .zip archive with MIDI files (.mid).")
    if drums:
        warn(f"of {len(songs):,} songs in {path}, {drums:,} have drums, which are left out.")
    return songs


def load_music(
    path: str | Path, piano_roll: PianoRoll | None = None, per_quarter: int | None = None, num_steps: int | None = None
) -> Splits:
    """Loads songs as splits of pieces of the keys that sound; all pieces of a song are in one of them.

    The parts of a JSON file, and subfolders, are parts, as those of sounds are (:func:`load_sounds`). Otherwise 8/10,
    1/10 and 1/10 of the songs are taken in a fixed random order.

    Args:
        path: what :func:`read_music` reads.
        piano_roll: how songs become sequences; what suits them if None.
        per_quarter: steps of a quarter note, of MIDI files; 4 if None.
        num_steps: steps of a piece; as :meth:`PianoRoll.of` says if None.

    Returns:
        The splits, with the piano roll as ``splits.piano_roll``. x has shape ``(pieces, num_steps, num_keys)``, with
        NaN after the end of a piece, and ``split.rows`` are the numbers of the songs in their order, from 1.

    Raises:
        ValueError: as :func:`read_music`, or when there are too few songs.
    """
    path = Path(path)
    if per_quarter is not None and per_quarter < 1:
        raise ValueError(f"per_quarter must be at least 1, got {per_quarter}.")
    if per_quarter is not None and path.suffix.lower() == ".json":
        raise ValueError(f"per_quarter is for MIDI files, and {path} has steps of its own. Leave it out.")
    if piano_roll is not None:
        per_quarter = piano_roll.per_quarter
    elif per_quarter is None:
        per_quarter = 1 if path.suffix.lower() == ".json" else _PER_QUARTER
    songs = read_music(path, per_quarter)
    rows, labels = split_files(path, list(songs), "songs")
    steps = list(songs.values())
    if piano_roll is None:
        piano_roll = PianoRoll.of(steps, per_quarter, num_steps)
    splits = []
    for chosen in rows:
        x, which = piano_roll.encode([steps[i] for i in chosen.tolist()])
        of = chosen[which]
        splits.append(Split(x, None if labels is None else labels[of], of + 1))
    return Splits(*splits, piano_roll=piano_roll)


def write_midi(songs: Sequence[Song], path: str | Path, per_quarter: int = _PER_QUARTER) -> None:
    """Writes songs to one MIDI file, one after the other with a pause of four quarter notes between them.

    A note that sounds in steps one after the other is held. Needs ``pip install 'pyrovae[midi]'``.

    Args:
        songs: the songs.
        path: the file.
        per_quarter: steps of a quarter note.
    """
    check_installed("mido", "midi")
    import mido

    pause: Song = [[] for _ in range(4 * per_quarter)]
    steps = [step for song in songs for step in (*song, *pause)]
    track, now, sounding = mido.MidiTrack(), 0, set[int]()
    for t, step in enumerate(steps):  # the pause at the end ends all notes
        tick = round(t * _TICKS / per_quarter)
        changes = [("note_off", note) for note in sorted(sounding - {*step})]
        changes += [("note_on", note) for note in sorted({*step} - sounding)]
        for kind, note in changes:
            track.append(mido.Message(kind, note=note, velocity=_VELOCITY, time=tick - now))
            now = tick
        sounding = {*step}
    midi = mido.MidiFile(ticks_per_beat=_TICKS)
    midi.tracks.append(track)
    midi.save(path)


def _groups(path: Path) -> dict[str, list] | None:
    """Returns the lists of songs of a JSON file by their names, "" for a single one; None if they are no songs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    groups = content if isinstance(content, dict) else {"": content}
    songs = [song for group in groups.values() if isinstance(group, list) for song in group]
    are_songs = all(isinstance(song, list) and all(isinstance(step, list) for step in song) for song in songs)
    return groups if songs and are_songs and all(isinstance(group, list) for group in groups.values()) else None


def _read_json(path: Path) -> dict[str, Song]:
    groups = _groups(path)
    if groups is None:
        raise ValueError(
            f"{path} holds no songs. Give a list of songs, or an object with the lists train, valid and test; a song "
            "is a list of steps, a step the list of its notes."
        )
    songs = {}
    for part, group in groups.items():
        for i, song in enumerate(group):
            name = f"{part}/{i + 1}" if part else f"{i + 1}"
            for t, step in enumerate(song):
                for note in step:
                    if not isinstance(note, int | float) or note not in range(_NUM_NOTES):
                        raise ValueError(
                            f"song {name} of {path} has {note!r} in step {t}. Notes are whole numbers from 0 to "
                            f"{_NUM_NOTES - 1}, as in MIDI."
                        )
            if not song:
                raise ValueError(f"song {name} of {path} has no step. Remove it.")
            songs[name] = [sorted({int(note) for note in step}) for step in song]
    return songs


def _read_midi(file: Path | io.BytesIO, name: str, per_quarter: int) -> tuple[Song, bool]:
    """Returns the song of a MIDI file, and whether it has drums."""
    import mido

    try:
        midi = mido.MidiFile(**({"filename": file} if isinstance(file, Path) else {"file": file}))
        messages = mido.merge_tracks(midi.tracks)
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} cannot be read as a MIDI file ({reason}). Remove it or replace it.") from None
    if midi.ticks_per_beat < 1:
        raise ValueError(f"{name} counts time in frames of a film, not in quarter notes. Remove it or convert it.")
    step, now, has_drums = midi.ticks_per_beat / per_quarter, 0, False
    started: dict[tuple[int, int], int] = {}
    notes: list[tuple[int, int, int]] = []  # first step, the step after the last one, note
    for message in messages:
        now += message.time
        if message.type not in ("note_on", "note_off"):
            continue
        if message.channel == _DRUMS:
            has_drums = True
            continue
        key = message.channel, message.note
        if key in started:
            first = round(started.pop(key) / step)
            notes.append((first, max(first + 1, round(now / step)), message.note))
        if message.type == "note_on" and message.velocity:
            started[key] = now
    for (_, note), since in started.items():  # they never end: the file does
        first = round(since / step)
        notes.append((first, max(first + 1, round(now / step)), note))
    if not notes:
        raise ValueError(f"{name} holds no notes{' but drums' if has_drums else ''}. Remove it.")
    start = min(first for first, _, _ in notes)
    length = max(end for _, end, _ in notes) - start
    if length > _LONGEST:
        raise ValueError(f"{name} has {length:,} steps, more than {_LONGEST:,}. Remove it or cut it.")
    song: list[set[int]] = [set() for _ in range(length)]
    for first, end, note in notes:
        for sounding in song[first - start : end - start]:
            sounding.add(note)
    return [sorted(sounding) for sounding in song], has_drums
