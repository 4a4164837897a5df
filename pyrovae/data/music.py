"""Music: songs as sequences of the keys of a piano, and back."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrovae.data.encodings import WholeNumbers
from pyrovae.data.folders import PARTS, count_files, listed, raise_first, read_files, split_files
from pyrovae.data.pictures import PICTURES
from pyrovae.data.sounds import SOUNDS
from pyrovae.data.splits import Split, Splits
from pyrovae.extras import check_installed
from pyrovae.inference.messages import warn
from pyrovae.nn.base import check_count

__all__ = ["PianoRoll", "is_music", "load_music", "read_music", "write_midi"]

Song = list[list[int]]  # the notes of each step, as MIDI numbers them

_MIDI = (".mid", ".midi")
_LOWEST, _NUM_KEYS, _NUM_NOTES = 21, 88, 128  # A0 and the keys of a piano; the notes of MIDI
_MAX_STEPS = 160
_PER_QUARTER = 4  # of MIDI files
_DRUMS = 9  # the channel of MIDI whose notes are drums
_LONGEST = 1_000_000  # steps of a song
_BETWEEN = 0.2  # of a step: the distance of a note from the nearest one, beyond which it is between steps
_MANY_BETWEEN = 0.05  # of the notes
_TICKS = 480  # of a quarter note, in MIDI files that are written
_VELOCITY = 80


@dataclass(frozen=True)
class PianoRoll(WholeNumbers):
    r"""How songs become sequences of keys that sound or not, and sequences become songs.

    .. math:: x_{tk} = 1 \text{ if note } k_0 + k \text{ sounds in step } t, \text{ else } 0

    A song is a list of steps, each a list of the notes that sound in it, as MIDI numbers them (60 is the middle C). A
    note that is struck twice looks like one that is held. Songs are cut into pieces of `num_steps`; the last piece may
    be shorter.

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

    title: ClassVar[str] = "a piano roll"

    lowest: int
    num_keys: int
    per_quarter: int
    num_steps: int

    def __post_init__(self) -> None:
        self.check_at_least(lowest=0, num_keys=1, per_quarter=1, num_steps=2)
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
            x = torch.zeros(len(song), self.num_keys)
            self.check(song, f"songs[{i}]")
            for t, notes in enumerate(song):
                x[t, [int(note) - self.lowest for note in notes]] = 1.0
            for piece in x.split(self.num_steps):
                pieces.append(torch.nn.functional.pad(piece, (0, 0, 0, self.num_steps - len(piece)), value=torch.nan))
                owners.append(i)
        x = torch.stack(pieces) if pieces else torch.empty(0, self.num_steps, self.num_keys)
        return x, torch.tensor(owners, dtype=torch.long)

    def check(self, song: Song, name: str) -> None:
        """Raises a ValueError that names a song if it has no step, or a note that is no key."""
        _check(song, name)
        last = self.lowest + self.num_keys - 1
        for t, notes in enumerate(song):
            for note in notes:
                if not self.lowest <= note <= last:
                    raise ValueError(
                        f"{name} has note {note} in step {t + 1}, and the notes here are {self.lowest} to {last}. "
                        "Transpose it or remove it."
                    )

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


def is_music(path: str | Path) -> bool:
    """Returns whether a path is a MIDI file, JSON of songs, or a folder or an archive of mostly MIDI files."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".zip":
        count = count_files(path, _MIDI)
        return count > 0 and count > max(count_files(path, SOUNDS), count_files(path, PICTURES))
    if path.suffix.lower() == ".json" and path.is_file():
        return _groups(path) is not None
    return path.suffix.lower() in _MIDI and path.is_file()


def read_music(path: str | Path, per_quarter: int = _PER_QUARTER) -> dict[str, Song]:
    """Reads songs: MIDI files, for which it needs ``pip install 'pyrovae[midi]'``, or JSON.

    Notes of MIDI begin and end at the nearest step, and last one step at least; a warning tells of notes that begin
    between steps. Instruments play on one piano, drums are left out, and so are files without notes, with a warning.

    Args:
        path: a file (.mid, .midi), a folder or a .zip archive of such files; or a .json file of a list of songs, or of
            an object of lists of songs with the names train, valid and test. A song is a list of steps, a step the list
            of the notes that sound, empty for a rest.
        per_quarter: steps of a quarter note, of MIDI files.

    Returns:
        Songs by their names: those of the files, or their numbers in the list, after the name of the list.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when there is no song, or one cannot be read, or holds notes that are none of MIDI.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if path.suffix.lower() == ".json":
        return _read_json(path)
    check_installed("mido", "midi")
    check_count(per_quarter, "per_quarter")
    found: dict[str, _Midi] = {}
    wrong: dict[str, ValueError] = {}
    for name, content in read_files(path, _MIDI):
        try:
            found[name] = _read_midi(content, name if path.is_file() else str(path / name), per_quarter)
        except ValueError as error:
            wrong[name] = error
    raise_first(wrong, len(found) + len(wrong))
    songs = {name: midi.song for name, midi in found.items() if midi.song}
    if not songs:
        raise ValueError(f"{path} holds no song with notes. Give MIDI files (.mid) of instruments other than drums.")
    said = []
    if len(songs) < len(found):
        said.append(f"{listed([name for name in found if name not in songs])} hold no notes and are left out")
    drums = [name for name, midi in found.items() if midi.has_drums and midi.song]
    if drums:
        said.append(f"{listed(drums)} have drums, which are left out")
    between, count = (sum(getattr(midi, name) for midi in found.values()) for name in ("num_between", "num_notes"))
    if between > _MANY_BETWEEN * count:
        said.append(
            f"{between / count:.0%} of the notes begin between the {per_quarter} steps of a quarter note, and are "
            "moved: take a larger per_quarter where that changes the music"
        )
    others = {"sounds": SOUNDS, "pictures": PICTURES}
    counts = {what: count_files(path, suffixes) for what, suffixes in others.items()} if path.is_dir() else {}
    said += [f"{number:,} {what} are not read" for what, number in counts.items() if number]
    if said:
        warn(f"of {len(found):,} MIDI files in {path}: {'; '.join(said)}.")
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
        per_quarter: steps of a quarter note; if None 4 of MIDI files, and 1 of JSON, whose steps are as they are.
        num_steps: steps of a piece; as :meth:`PianoRoll.of` says if None.

    Returns:
        The splits, with the piano roll as ``splits.piano_roll``. x has shape ``(pieces, num_steps, num_keys)``, with
        NaN after the end of a piece, and ``split.rows`` are the numbers of the songs in their order, from 1.

    Raises:
        ValueError: as :func:`read_music`, or when there are too few songs.
    """
    path = Path(path)
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

    check_count(per_quarter, "per_quarter")
    for i, song in enumerate(songs):
        _check(song, f"songs[{i}]")
    each = max(1, _TICKS // per_quarter)  # ticks of a step
    pause: Song = [[] for _ in range(4 * per_quarter)]
    steps = [step for i, song in enumerate(songs) for step in (*(pause if i else ()), *song)]
    track, now, sounding = mido.MidiTrack(), 0, set[int]()
    for t, step in enumerate([*steps, []]):  # after which no note sounds
        tick = t * each
        changes = [("note_off", note) for note in sorted(sounding - {*step})]
        changes += [("note_on", note) for note in sorted({*step} - sounding)]
        for kind, note in changes:
            track.append(mido.Message(kind, note=note, velocity=_VELOCITY, time=tick - now))
            now = tick
        sounding = {*step}
    track.append(mido.MetaMessage("end_of_track", time=len(steps) * each - now))
    midi = mido.MidiFile(ticks_per_beat=each * per_quarter)
    midi.tracks.append(track)
    midi.save(path)


def _check(song: Any, name: str) -> None:
    """Raises a ValueError that names a song if it has no step, or what are no notes."""
    if not isinstance(song, list) or not song:
        raise ValueError(f"{name} has no step: a song is a list of steps, each a list of notes. Remove it.")
    for t, step in enumerate(song):
        for note in step if isinstance(step, list) else [step]:
            if isinstance(note, bool) or not isinstance(note, int | float) or note not in range(_NUM_NOTES):
                raise ValueError(
                    f"{name} has {note!r} in step {t + 1}. A step is a list of notes, whole numbers from 0 to "
                    f"{_NUM_NOTES - 1} as in MIDI, and a rest is an empty list."
                )
        if not isinstance(step, list):
            raise ValueError(f"step {t + 1} of {name} is {step!r}. A step is a list of notes: [{step!r}].")


def _groups(path: Path) -> dict[str, Any] | None:
    """Returns what a JSON file says are lists of songs, by their names, "" for a single one; None for a table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(content, list) and not any(isinstance(row, dict) for row in content):
        return {"": content}
    is_of_parts = isinstance(content, dict) and any(name.lower() in PARTS for name in content)
    return content if is_of_parts else None


def _read_json(path: Path) -> dict[str, Song]:
    groups = _groups(path)
    if not groups or not all(isinstance(group, list) for group in groups.values()) or not any(groups.values()):
        raise ValueError(
            f"{path} holds no songs. Give a list of songs, or an object with the lists train, valid and test and "
            "nothing else; a song is a list of steps, a step the list of its notes."
        )
    filled = {PARTS.get(part.lower()) for part, group in groups.items() if group}
    if "" not in groups and not {"train", "test"} <= filled:
        raise ValueError(f"{path} has {', '.join(groups)}. Give at least the parts train and test, with songs.")
    songs = {}
    for part, group in groups.items():
        for i, song in enumerate(group):
            name = f"{part}/{i + 1}" if part else f"{i + 1}"
            _check(song, f"song {name} of {path}")
            songs[name] = [sorted({int(note) for note in step}) for step in song]
    return songs


class _Midi(NamedTuple):
    """What a MIDI file holds: a song, empty without notes; whether it has drums; notes, and those between steps."""

    song: Song
    has_drums: bool
    num_notes: int
    num_between: int


def _read_midi(file: Path | io.BytesIO, name: str, per_quarter: int) -> _Midi:
    import mido

    try:
        midi = mido.MidiFile(**({"filename": file} if isinstance(file, Path) else {"file": file}))
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} cannot be read as a MIDI file ({reason}). Remove it or replace it.") from None
    if midi.ticks_per_beat < 1:
        raise ValueError(f"{name} counts time in frames of a film, not in quarter notes. Remove it or convert it.")
    notes: list[tuple[int, int, int]] = []
    has_drums, end = False, 0
    for track in midi.tracks:
        its_notes, its_drums, its_end = _notes_of(track)
        notes, has_drums, end = notes + its_notes, has_drums or its_drums, max(end, its_end)
    step = midi.ticks_per_beat / per_quarter
    if end / step > _LONGEST:
        raise ValueError(f"{name} has {end / step:,.0f} steps, more than {_LONGEST:,}. Remove it or cut it.")
    if not notes:
        return _Midi([], has_drums, 0, 0)
    placed = [(round(start / step), round(stop / step), note) for start, stop, note in notes]
    placed = [(first, max(first + 1, last), note) for first, last, note in placed]
    song: list[set[int]] = [set() for _ in range(max(round(end / step), *(last for _, last, _ in placed)))]
    for first, last, note in placed:
        for sounding in song[first:last]:
            sounding.add(note)
    between = sum(abs(start / step - round(start / step)) > _BETWEEN for start, _, _ in notes)
    return _Midi([sorted(sounding) for sounding in song], has_drums, len(notes), between)


def _notes_of(track: Any) -> tuple[list[tuple[int, int, int]], bool, int]:
    """Returns the notes of a track, each with the ticks of its start and end; whether it has drums; its length."""
    now, has_drums = 0, False
    notes: list[tuple[int, int, int]] = []
    started: dict[tuple[int, int], list[int]] = {}  # a note that is struck while it sounds ends twice
    ended: dict[tuple[int, int], int] = {}
    for message in track:
        now += message.time
        if message.type not in ("note_on", "note_off"):
            continue
        if message.channel == _DRUMS:
            has_drums = True
            continue
        key = message.channel, message.note
        if message.type == "note_on" and message.velocity:
            started.setdefault(key, []).append(now)
        elif started.get(key):
            notes.append((started[key].pop(0), now, message.note))
            ended[key] = now
    for key, starts in started.items():  # those that nothing ended sound to the end, unless an end came after them
        notes += [(start, now, key[1]) for start in starts if start >= ended.get(key, 0)]
    return notes, has_drums, now
