"""Text: lines as sequences of words or characters, and back."""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.data.reading import DELIMITERS
from pyrovae.data.splits import Split, Splits, random_rows

__all__ = ["Vocabulary", "is_text_file", "load_text", "read_lines", "split_lines"]

# A word with what joins its parts, as in don't and well-known, or one mark of punctuation.
_WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_NO_SPACE_BEFORE, _NO_SPACE_AFTER = set(".,;:!?)]}’”%"), set("([{‘“")
_MAX_STEPS = {False: 64, True: 256}  # words, characters
_SAMPLE = 100  # lines by which a table is told from text


@dataclass(frozen=True)
class Vocabulary:
    """The words or characters of a text, and the length of its lines: what numbers stand for.

    Number 0 is the end of a line, and fills the steps after it; number 1 stands for all words that are not in the
    vocabulary. Words are what is between spaces, without the marks of punctuation, which are words of their own; case
    counts. Spaces between words are not kept.

    Args:
        words: the words, or characters, from number 2 on.
        num_steps: the number of steps of a line with its end; a longer line is cut, and then has no end.
        characters: whether the steps are characters.

    Raises:
        ValueError: when there are no two words, a word occurs twice, or `num_steps` is below 2.

    >>> vocabulary = Vocabulary(("the", "end", "."), num_steps=6)
    >>> x = vocabulary.encode(["the end.", "the very end of it all"])
    >>> x
    tensor([[2., 3., 4., 0., 0., 0.],
            [2., 1., 3., 1., 1., 1.]])
    >>> vocabulary.decode(x)
    ['the end.', 'the <unknown> end <unknown> <unknown> <unknown> ...']
    """

    words: tuple[str, ...]
    num_steps: int
    characters: bool = False

    end = 0
    unknown = 1

    def __post_init__(self) -> None:
        kind = "characters" if self.characters else "words"
        if len(self.words) < 2:
            raise ValueError(
                f"a vocabulary needs at least two {kind}, got {len(self.words)}: {list(self.words)}. Is it the right "
                "file?"
            )
        if len(set(self.words)) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words: {twice!r} occurs twice.")
        if self.num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, a word and the end, got {self.num_steps}.")

    @classmethod
    def of(
        cls, lines: Iterable[str], *, max_words: int = 5000, num_steps: int | None = None, characters: bool = False
    ) -> "Vocabulary":
        """Returns the vocabulary of lines, such as those of the training data: their most frequent words.

        Args:
            lines: the lines.
            max_words: the largest number of words.
            num_steps: the number of steps; None for the longest line with its end, up to 64 words or 256 characters.
            characters: whether the steps are characters.
        """
        split = [list(line.strip()) if characters else _WORDS.findall(line) for line in lines]
        counts = Counter(word for line in split for word in line)
        # Words of the same frequency in the order of the alphabet, so that the order of the lines does not matter.
        ordered = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
        if num_steps is None:
            num_steps = min(max(map(len, split), default=0) + 1, _MAX_STEPS[characters])
        return cls(tuple(ordered), max(num_steps, 2), characters)

    @property
    def num_classes(self) -> int:
        """The number of classes of a step, with those of the end and of the unknown word."""
        return len(self.words) + 2

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words, start=2)}

    def split(self, line: str) -> list[str]:
        """Returns the words or characters of a line."""
        return list(line.strip()) if self.characters else _WORDS.findall(line)

    def encode(self, lines: Sequence[str]) -> Tensor:
        """Returns lines as numbers, ``(len(lines), num_steps)``, float32 as networks and likelihoods take them.

        Raises:
            ValueError: when a line has no word.
        """
        x = torch.zeros(len(lines), self.num_steps)
        for row, line in enumerate(lines):
            words = self.split(line)[: self.num_steps]
            if not words:
                raise ValueError(f"line {row + 1} has no word: {line!r}. Leave empty lines out.")
            x[row, : len(words)] = torch.tensor([float(self._numbers.get(word, self.unknown)) for word in words])
        return x

    def decode(self, x: Tensor) -> list[str]:
        """Returns the lines of numbers ``(lines, num_steps)``; one without an end ends in "..."."""
        lines = []
        for row in x.long().tolist():
            ended = self.end in row
            numbers = row[: row.index(self.end)] if ended else row
            words = ["<unknown>" if number == self.unknown else self.words[number - 2] for number in numbers]
            lines.append(("".join(words) if self.characters else _joined(words)) + ("" if ended else " ..."))
        return lines

    def count_steps(self, x: Tensor) -> Tensor:
        """Returns the number of steps of each line that are scored, with the end, ``(lines,)``."""
        return (x != self.end).sum(-1).add(1).clamp(max=self.num_steps)

    def describe(self, lines: Sequence[str]) -> str:
        """Returns what the vocabulary does not keep of lines, in words."""
        kind = "characters" if self.characters else "words"
        split = [self.split(line) for line in lines]
        total = sum(map(len, split))
        unknown = sum(word not in self._numbers for words in split for word in words)
        cut = sum(len(words) >= self.num_steps for words in split)
        return (
            f"{len(self.words):,} {kind}; {unknown:,} of {total:,} ({unknown / max(total, 1):.1%}) are not among them "
            f"and become <unknown>; {cut:,} of {len(lines):,} lines are cut, with no end within {self.num_steps} steps"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the vocabulary as JSON and YAML hold it."""
        return {"characters": self.characters, "num_steps": self.num_steps, "words": list(self.words)}

    @classmethod
    def from_dict(cls, entries: Any) -> "Vocabulary":
        """Returns the vocabulary of :meth:`to_dict`; raises a ValueError that says what is wrong with the entries."""
        if not isinstance(entries, dict) or entries.keys() != {"characters", "num_steps", "words"}:
            raise ValueError("a vocabulary must have the entries characters, num_steps and words.")
        words, num_steps, characters = entries["words"], entries["num_steps"], entries["characters"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("words of a vocabulary must be a list of texts.")
        if type(num_steps) is not int or type(characters) is not bool:
            raise ValueError("num_steps of a vocabulary must be a whole number, and characters true or false.")
        return cls(tuple(words), num_steps, characters)


def _joined(words: Sequence[str]) -> str:
    """Returns words and marks as a line, with spaces where English has them."""
    line = ""
    for i, word in enumerate(words):
        if i and word not in _NO_SPACE_BEFORE and words[i - 1] not in _NO_SPACE_AFTER:
            line += " "
        line += word
    return line


def read_lines(path: str | Path, encoding: str | None = None) -> tuple[list[str], list[int]]:
    """Returns the lines of a text file that hold something, and their numbers, counted from 1.

    Args:
        path: the file, gzipped if its name ends in .gz.
        encoding: its encoding; None for UTF-8, or UTF-16 where the file begins with its mark.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is empty or is not in this encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from None
    if encoding is None:
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: the file is not in {encoding.removesuffix('-sig')}. Convert it to UTF-8, for "
            "example with iconv -f cp1252 -t utf-8."
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} holds bytes of zero: it is no text, or in another encoding. Convert it to UTF-8.")
    rows = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no line with text.")
    return [line for _, line in rows], [number for number, _ in rows]


def is_text_file(path: str | Path) -> bool:
    """Returns whether a file is text, a line a datum: .txt or .txt.gz, and not a table.

    A table is told by its lines: all have the same number of tabs, semicolons, bars or commas without a space after
    them, and at least one.
    """
    path = Path(path)
    if not path.name.removesuffix(".gz").endswith(".txt") or not path.is_file():
        return False
    try:
        lines = read_lines(path)[0][:_SAMPLE]
    except ValueError:
        return True  # and refused where it is read
    counts = ({len(re.findall(f"{re.escape(sign)}(?! )", line)) for line in lines} for sign in DELIMITERS)
    return len(lines) < 2 or not any(len(found) == 1 and found != {0} for found in counts)


def load_text(path: str | Path, vocabulary: Vocabulary | None = None, **options: Any) -> Splits:
    """Loads the lines of a text file as splits, 8/10, 1/10 and 1/10 of them in a fixed random order.

    Args:
        path: the file, UTF-8, gzipped if its name ends in .gz; empty lines are left out.
        vocabulary: the vocabulary; that of the training part if None.
        **options: of :meth:`Vocabulary.of`.

    Returns:
        The splits, with the vocabulary as ``splits.vocabulary``, and ``split.rows``, the numbers of the lines.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "verses.txt"
    >>> _ = path.write_text("\\n".join(["a rose is a rose", "is a rose", "a rose"] * 10))
    >>> splits = load_text(path)
    >>> splits.vocabulary.words, splits.train.x.shape
    (('a', 'rose', 'is'), torch.Size([24, 6]))
    """
    lines, numbers = read_lines(path)
    if len(lines) < 3:
        raise ValueError(f"{path} holds {len(lines)} lines, too few to split into train, validation and test.")
    splits = split_lines(lines, vocabulary, **options)
    where = torch.tensor(numbers)
    parts = (replace(part, rows=where[part.rows - 1]) for part in splits)  # type: ignore[operator]
    return Splits(*parts, vocabulary=splits.vocabulary)


def split_lines(lines: Sequence[str], vocabulary: Vocabulary | None = None, **options: Any) -> Splits:
    """Splits lines as :func:`load_text` does; ``split.rows`` are their numbers, counted from 1."""
    tenth = max(1, len(lines) // 10)
    parts = [rows.tolist() for rows in random_rows(len(lines), validation=tenth, test=tenth)]
    if vocabulary is None:
        vocabulary = Vocabulary.of((lines[row] for row in parts[0]), **options)
    elif options:
        raise ValueError(f"{', '.join(options)} are for a vocabulary that is made, but a vocabulary is given.")
    kept = [[row for row in rows if vocabulary.split(lines[row])] for rows in parts]
    splits = (Split(vocabulary.encode([lines[row] for row in rows]), None, torch.tensor(rows) + 1) for rows in kept)
    return Splits(*splits, vocabulary=vocabulary)
