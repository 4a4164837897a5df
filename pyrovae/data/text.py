"""Text: lines as sequences of words, characters or tokens, and back."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.data.reading import DELIMITERS
from pyrovae.data.splits import Split, Splits, random_rows
from pyrovae.extras import check_installed
from pyrovae.inference.messages import warn

__all__ = ["Vocabulary", "is_text_file", "load_text", "read_lines", "split_lines"]

# A word with what joins its parts, as in don't and well-known, or one mark of punctuation.
_WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_NO_SPACE_BEFORE, _NO_SPACE_AFTER = set(".,;:!?)]}’”%"), set("([{‘“")
# Thai to Burmese, Khmer, kana, and the signs of Chinese.
_WITHOUT_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_MAX_STEPS = {"word": 64, "character": 256, "token": 128}
_UNKNOWN = "<unknown>"
_SAMPLE = 100  # lines by which a table is told from text


@dataclass(frozen=True)
class Vocabulary:
    """The words, characters or tokens of a text, and the length of its lines: what numbers stand for.

    Number 0 is the end of a line, and fills the steps after it; number 1 stands for all words that are not in the
    vocabulary. Words are what is between spaces, without the marks of punctuation, which are words of their own; case
    counts. Spaces between words are not kept.

    A tokenizer cuts lines into tokens, such as parts of words, which take the place of words. log p(x) is that of the
    tokens. Other tokens may give the same line, so that log p of the line is at least as large; of a tokenizer that
    does not keep lines as they are, that drops signs or takes capitals for small letters, it is log p of all lines
    with these tokens together. :meth:`describe` says how many lines are not kept.

    Args:
        words: the words, characters or tokens, from number 2 on.
        num_steps: the number of steps of a line with its end; a longer line is cut, and then has no end.
        characters: whether the steps are characters.
        tokenizer: a tokenizer of the package tokenizers, as JSON; None for words or characters.

    Raises:
        ImportError: when there is a tokenizer, and the package is not installed (extra ``tokenizers``).
        ValueError: when there are no two words, a word occurs twice, `num_steps` is below 2, or `tokenizer` is none.

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
    tokenizer: str | None = None

    end = 0
    unknown = 1

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            if self.characters:
                raise ValueError("characters=True and a tokenizer exclude each other: leave one out.")
            alien = [word for word in self.words if self._tokenizer.token_to_id(word) is None]
            if alien:
                raise ValueError(f"words: {alien[0]!r} is no token of the tokenizer.")
        if len(self.words) < 2:
            raise ValueError(
                f"a vocabulary needs at least two {self.unit}s, got {len(self.words)}: {list(self.words)}. Is it the "
                "right file?"
            )
        if len(set(self.words)) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words: {twice!r} occurs twice.")
        if self.num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, a word and the end, got {self.num_steps}.")

    @classmethod
    def of(
        cls,
        lines: Iterable[str],
        *,
        max_words: int = 5000,
        num_steps: int | None = None,
        characters: bool = False,
        tokenizer: Any = None,
    ) -> "Vocabulary":
        """Returns the vocabulary of lines, such as those of the training data: their most frequent words.

        Args:
            lines: the lines.
            max_words: the largest number of words, or tokens.
            num_steps: the number of steps; None for the longest line with its end, up to 64 words, 256 characters or
                128 tokens.
            characters: whether the steps are characters.
            tokenizer: a tokenizer of the package tokenizers, or the path of a file that it was saved in.
        """
        text = None if tokenizer is None else _tokenizer_text(tokenizer)
        tokenizer = None if text is None else read_tokenizer(text)
        lines = list(lines)
        if not characters and tokenizer is None and _has_no_spaces(lines):
            warn(
                "the lines are of a script without spaces between words: what is taken for a word is what lies between "
                "spaces. Take characters=True, or a tokenizer."
            )
        split = [_split(line, characters, tokenizer) for line in lines]
        unknown = None if text is None else _unknown_token(text)
        counts = Counter(word for line in split for word in line if word != unknown)
        # Words of the same frequency in the order of the alphabet, so that the order of the lines does not matter.
        ordered = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
        if num_steps is None:
            num_steps = min(max(map(len, split), default=0) + 1, _MAX_STEPS[_unit(characters, text)])
        return cls(tuple(ordered), max(num_steps, 2), characters, text)

    @property
    def unit(self) -> str:
        """The name of a step, which is word, character or token."""
        return _unit(self.characters, self.tokenizer)

    @property
    def num_classes(self) -> int:
        """The number of classes of a step, with those of the end and of the unknown word."""
        return len(self.words) + 2

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words, start=2)}

    @cached_property
    def _tokenizer(self) -> Any:
        return None if self.tokenizer is None else read_tokenizer(self.tokenizer)

    def split(self, line: str) -> list[str]:
        """Returns the words, characters or tokens of a line."""
        return _split(line, self.characters, self._tokenizer)

    def _join(self, words: Sequence[str]) -> str:
        if self._tokenizer is None:
            return "".join(words) if self.characters else _joined(words)
        parts = []
        for is_known, tokens in groupby(words, lambda word: word != _UNKNOWN):
            ids = [self._tokenizer.token_to_id(token) for token in tokens] if is_known else []
            parts.append(self._tokenizer.decode(ids, skip_special_tokens=False) if is_known else _UNKNOWN)
        return "".join(parts)

    def encode(self, lines: Sequence[str]) -> Tensor:
        """Returns lines as numbers, ``(len(lines), num_steps)``, float32 as networks and likelihoods take them.

        Raises:
            ValueError: when a line has no word.
        """
        x = torch.zeros(len(lines), self.num_steps)
        for row, line in enumerate(lines):
            words = self.split(line)[: self.num_steps]
            if not words:
                raise ValueError(f"line {row + 1} has no {self.unit}: {line!r}. Leave such lines out.")
            x[row, : len(words)] = torch.tensor([float(self._numbers.get(word, self.unknown)) for word in words])
        return x

    def decode(self, x: Tensor) -> list[str]:
        """Returns the lines of numbers ``(lines, num_steps)``; one without an end ends in "..."."""
        lines = []
        for row in x.long().tolist():
            ended = self.end in row
            numbers = row[: row.index(self.end)] if ended else row
            words = [_UNKNOWN if number == self.unknown else self.words[number - 2] for number in numbers]
            lines.append(self._join(words) + ("" if ended else " ..."))
        return lines

    def count_steps(self, x: Tensor) -> Tensor:
        """Returns the number of steps of each line that are scored, with the end, ``(lines,)``."""
        return (x != self.end).sum(-1).add(1).clamp(max=self.num_steps)

    def describe(self, lines: Sequence[str]) -> str:
        """Returns what the vocabulary does not keep of lines, in words."""
        split = [self.split(line) for line in lines]
        total = sum(map(len, split))
        unknown = sum(word not in self._numbers for words in split for word in words)
        cut = sum(len(words) >= self.num_steps for words in split)
        lost = ""
        if self._tokenizer is not None:
            changed = sum(self._join(words) != line.strip() for words, line in zip(split, lines, strict=True))
            lost = f"; the tokenizer does not keep {changed:,} lines as they are" if changed else ""
        return (
            f"{len(self.words):,} {self.unit}s; {unknown:,} of {total:,} ({unknown / max(total, 1):.1%}) are not among "
            f"them and become <unknown>; {cut:,} of {len(lines):,} lines are cut, with no end within {self.num_steps} "
            f"steps{lost}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the vocabulary as JSON and YAML hold it."""
        entries = {"characters": self.characters, "num_steps": self.num_steps, "words": list(self.words)}
        return entries if self.tokenizer is None else entries | {"tokenizer": self.tokenizer}

    @classmethod
    def from_dict(cls, entries: Any) -> "Vocabulary":
        """Returns the vocabulary of :meth:`to_dict`; raises a ValueError that says what is wrong with the entries."""
        if not isinstance(entries, dict) or entries.keys() - {"tokenizer"} != {"characters", "num_steps", "words"}:
            raise ValueError("a vocabulary must have the entries characters, num_steps and words.")
        words, num_steps, characters = entries["words"], entries["num_steps"], entries["characters"]
        tokenizer = entries.get("tokenizer")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("words of a vocabulary must be a list of texts.")
        if type(num_steps) is not int or type(characters) is not bool:
            raise ValueError("num_steps of a vocabulary must be a whole number, and characters true or false.")
        if not isinstance(tokenizer, str | None):
            raise ValueError("the tokenizer of a vocabulary must be a text.")
        return cls(tuple(words), num_steps, characters, tokenizer)


def _unit(characters: bool, tokenizer: str | None) -> str:
    return "token" if tokenizer is not None else "character" if characters else "word"


def _has_no_spaces(lines: Sequence[str]) -> bool:
    """Returns whether most letters are of scripts without spaces, such as Chinese, Japanese or Thai."""
    letters = [c for line in lines[:1000] for c in line if c.isalpha()]
    return 2 * sum(bool(_WITHOUT_SPACES.match(c)) for c in letters) > max(len(letters), 1)


def _split(line: str, characters: bool, tokenizer: Any) -> list[str]:
    """Returns the tokens of a line if there is a tokenizer, else its characters or words."""
    if tokenizer is not None:
        try:
            numbers = tokenizer.encode(line.strip(), add_special_tokens=False).ids
        except Exception as error:  # the package has no class for it
            raise ValueError(f"the tokenizer cannot take {line!r}: {error}.") from None
        # By their numbers: the text of what it does not know is not that of the token that it has for it.
        return [tokenizer.id_to_token(i) for i in numbers]
    return list(line.strip()) if characters else _WORDS.findall(line)


def _unknown_token(tokenizer: str) -> str | None:
    """Returns the token that a tokenizer itself has for what it does not know."""
    model = json.loads(tokenizer)["model"]
    number = model.get("unk_id")
    return model.get("unk_token") if number is None else model["vocab"][number][0]


def read_tokenizer(text: str) -> Any:
    """Returns the tokenizer of the package tokenizers that a JSON text describes.

    Raises:
        ImportError: when the package is not installed.
        ValueError: when it describes none.
    """
    check_installed("tokenizers", "tokenizers")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the package has no class for it
        raise ValueError(f"tokenizer is none of the package tokenizers: {error}.") from None


def _tokenizer_text(tokenizer: Any) -> str:
    """Returns a tokenizer, or the content of its file, as JSON: one that neither cuts, fills nor draws."""
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: there is no file {path}. Give one that a tokenizer was saved in.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"tokenizer: {path} is no JSON file of a tokenizer.") from None
        place = f"tokenizer: {path}"
    elif hasattr(tokenizer, "to_str"):
        text, place = tokenizer.to_str(), "tokenizer"
    else:
        raise TypeError(f"tokenizer must be a tokenizer of the package tokenizers or a path, got {tokenizer!r}.")
    try:
        read_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    entries = json.loads(text) | {"truncation": None, "padding": None}
    if "dropout" in entries["model"]:
        entries["model"]["dropout"] = None
    return json.dumps(entries, ensure_ascii=False)


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
