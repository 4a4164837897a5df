"""Text as data: lines to numbers and back, vocabularies, files."""

import gzip
import json
import sys

import pytest
import torch

from pyrovae import data
from pyrovae.data import Vocabulary, is_text_file, load_text, read_lines, split_lines

try:
    import tokenizers
except ImportError:
    tokenizers = None
needs_tokenizers = pytest.mark.skipif(tokenizers is None, reason="tokenizers is not installed")

VERSES = ["In the beginning God created the heaven and the earth.", "And God said, Let there be light: and it was so."]


def test_words_and_marks_become_numbers_and_lines_again():
    vocabulary = Vocabulary.of(VERSES)
    x = vocabulary.encode(VERSES)
    assert x.shape == (2, 15)  # of the longer verse, with its end
    assert x.dtype == torch.float32
    assert vocabulary.decode(x) == VERSES
    assert vocabulary.count_steps(x).tolist() == [12, 15]


def test_the_most_frequent_words_come_first_and_ties_in_alphabetical_order():
    lines = ["b a c", "a b d", "a"]
    vocabulary = Vocabulary.of(lines, max_words=3)
    assert vocabulary.words == ("a", "b", "c")
    assert Vocabulary.of(lines[::-1], max_words=3) == vocabulary
    x = vocabulary.encode(["d a", "c b"])
    assert x[:, :2].tolist() == [[Vocabulary.unknown, 2], [4, 3]]
    assert vocabulary.decode(x) == ["<unknown> a", "c b"]
    assert vocabulary.describe(lines) == (
        "3 words; 1 of 7 (14.3%) are not among them and become <unknown>; "
        "0 of 3 lines are cut, with no end within 4 steps"
    )


def test_characters_are_kept_as_they_are():
    lines = ["a  b", "ba!"]
    vocabulary = Vocabulary.of(lines, characters=True)
    assert vocabulary.words == (" ", "a", "b", "!")
    assert vocabulary.decode(vocabulary.encode(lines)) == lines


def test_a_line_that_is_too_long_is_cut_and_has_no_end():
    vocabulary = Vocabulary.of(["a b", "b"], num_steps=3)
    x = vocabulary.encode(["a b", "a b a", "a b a b"])
    assert x[:, -1].tolist() == [0, 3, 3]
    assert vocabulary.decode(x) == ["a b", "a b a ...", "a b a ..."]
    assert vocabulary.count_steps(x).tolist() == [3, 3, 3]
    assert "2 of 3 lines are cut, with no end within 3 steps" in vocabulary.describe(["a b", "a b a", "a b a b"])


def test_a_word_may_have_marks_inside():
    words = Vocabulary.of(['"Don\'t well-known x_1," he said (twice).']).words
    assert set(words) == {'"', "Don't", "well-known", "x_1", ",", "he", "said", "(", "twice", ")", "."}


def test_a_vocabulary_is_kept_as_json():
    vocabulary = Vocabulary.of(VERSES, num_steps=9)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    for entries, words in (
        ({}, "must have the entries"),
        (vocabulary.to_dict() | {"words": [1, 2]}, "must be a list of texts"),
        (vocabulary.to_dict() | {"num_steps": True}, "must be a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            Vocabulary.from_dict(entries)


def test_vocabularies_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="at least two words, got 1"):
        Vocabulary.of(["na na na na"])
    with pytest.raises(ValueError, match="at least two characters, got 0"):
        Vocabulary.of([], characters=True)
    with pytest.raises(ValueError, match="'a' occurs twice"):
        Vocabulary(("a", "a"), 3)
    with pytest.raises(ValueError, match="num_steps must be at least 2"):
        Vocabulary(("a", "b"), 1)
    with pytest.raises(ValueError, match="line 2 has no word: '  '. Leave such lines out"):
        Vocabulary(("a", "b"), 3).encode(["a", "  "])


@pytest.mark.parametrize("name", ["verses.txt", "verses.txt.gz"])
def test_files_are_read_by_lines_without_empty_ones(tmp_path, name):
    content = ("\ufeff" + "a b\r\n\n  b c  \n \nc\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_lines(tmp_path / name) == (["a b", "b c", "c"], [1, 3, 5])
    assert is_text_file(tmp_path / name)


def test_other_encodings_are_told_or_refused_by_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("älter\nGrüße\n".encode("utf-16"))
    assert read_lines(tmp_path / "a.txt")[0] == ["älter", "Grüße"]
    (tmp_path / "b.txt").write_bytes(b"fine\nGr\xfc\xdfe\n")
    with pytest.raises(ValueError, match=r"b\.txt, line 2: the file is not in utf-8.*iconv"):
        read_lines(tmp_path / "b.txt")
    assert read_lines(tmp_path / "b.txt", "latin-1")[0] == ["fine", "Grüße"]
    (tmp_path / "c.txt").write_bytes("älter".encode("utf-16-le"))
    with pytest.raises(ValueError, match="not in utf-8|bytes of zero"):
        read_lines(tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no line with text"):
        read_lines(tmp_path / "d.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_lines(tmp_path / "e.txt")
    (tmp_path / "f.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_lines(tmp_path / "f.txt.gz")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "In the beginning, and then.\nIt was light.\n", True),
        ("a.txt", "a;b\n1;2\n3;4\n", False),
        ("a.txt", "a\tb\n1\t2\n", False),
        ("a.txt", "one line, with a comma\nand two, with one\n", True),
        ("a.txt", "", True),
        ("a.csv", "In the beginning.\n", False),
    ],
)
def test_text_is_told_from_tables(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert is_text_file(tmp_path / name) == expected
    assert not is_text_file(tmp_path / "missing.txt")


def test_the_vocabulary_is_that_of_the_training_lines(tmp_path):
    lines = [f"word{i} and word{i}" for i in range(30)]
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(lines))
    splits = load_text(path)
    assert [len(part.x) for part in splits] == [24, 3, 3]
    assert {f"word{(row - 1) // 2}" for row in splits.train.rows.tolist()} == set(splits.vocabulary.words) - {"and"}
    for part in splits:
        for row, x in zip(part.rows.tolist(), part.x, strict=True):
            known = splits.vocabulary.encode([path.read_text().splitlines()[row - 1]])
            assert torch.equal(known[0], x)
    assert (splits.test.x == Vocabulary.unknown).any()
    again = load_text(path, splits.vocabulary)
    assert torch.equal(again.train.x, splits.train.x)
    assert torch.equal(split_lines(lines).train.x, splits.train.x)
    assert torch.equal(data.load(str(path)).train.x, splits.train.x)
    with pytest.raises(ValueError, match="max_words are for a vocabulary that is made"):
        load_text(path, splits.vocabulary, max_words=3)
    path.write_text("a b\nb a")
    with pytest.raises(ValueError, match="holds 2 lines, too few"):
        load_text(path)


def _byte_pairs(**options):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(VERSES, trainer)
    return tokenizer


@needs_tokenizers
def test_a_tokenizer_cuts_lines_into_tokens_and_puts_them_together(tmp_path):
    tokenizer = _byte_pairs()
    lines = [*VERSES, "God said,  e\u0301t\u00e9"]  # two spaces, which words do not keep
    vocabulary = Vocabulary.of(lines, tokenizer=tokenizer)
    assert vocabulary.unit == "token"
    assert vocabulary.decode(vocabulary.encode(lines)) == lines
    assert vocabulary.split(lines[0]) == tokenizer.encode(lines[0]).tokens
    assert vocabulary.num_steps == 1 + max(len(tokenizer.encode(line).tokens) for line in lines)
    assert f"{len(vocabulary.words)} tokens; 0 of" in vocabulary.describe(lines)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary.of(lines, tokenizer=tmp_path / "tokenizer.json") == vocabulary


@needs_tokenizers
def test_tokens_that_are_rare_are_unknown():
    vocabulary = Vocabulary.of(["X and", "X let", "X and"], max_words=3, tokenizer=_byte_pairs())
    assert vocabulary.words[:2] == ("X", "\u0120and")  # the second with the space before it
    x = vocabulary.encode(["Xq and", "X and"])
    assert x[:, :3].tolist() == [[2, Vocabulary.unknown, 3], [2, 3, 0]]
    assert vocabulary.decode(x) == ["X<unknown> and", "X and"]


@needs_tokenizers
def test_what_a_tokenizer_does_not_know_is_unknown():
    words = {"[UNK]": 0, "light": 1, "was": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vocabulary = Vocabulary.of(["light was there", "there was light"], tokenizer=tokenizer)
    assert vocabulary.words == ("light", "was")
    assert vocabulary.encode(["light there"]).tolist() == [[2, Vocabulary.unknown, 0, 0]]
    pieces = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    vocabulary = Vocabulary.of(["abc", "b"], tokenizer=pieces)
    assert vocabulary.words == ("b", "a")
    assert vocabulary.encode(["abc"]).tolist() == [[3, 2, Vocabulary.unknown, 0]]


@needs_tokenizers
def test_a_tokenizer_neither_cuts_nor_fills_nor_draws():
    tokenizer = _byte_pairs(dropout=0.9)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50, pad_token="!")
    kept = Vocabulary.of(VERSES, tokenizer=tokenizer)
    assert kept.decode(kept.encode(VERSES)) == VERSES
    assert all(kept.split(VERSES[0]) == kept.split(VERSES[0]) for _ in range(5))
    assert "!" not in kept.words


@needs_tokenizers
def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"other\.json: tokenizer is none of the package tokenizers"):
        Vocabulary.of(VERSES, tokenizer=tmp_path / "other.json")
    with pytest.raises(ValueError, match="bytes is no JSON file of a tokenizer"):
        Vocabulary.of(VERSES, tokenizer=tmp_path / "bytes")
    with pytest.raises(FileNotFoundError, match="there is no file nowhere"):
        Vocabulary.of(VERSES, tokenizer="nowhere")
    with pytest.raises(TypeError, match="must be a tokenizer of the package tokenizers or a path, got 3"):
        Vocabulary.of(VERSES, tokenizer=3)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"light": 0, "was": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="the tokenizer cannot take 'dark': .*UNK"):
        Vocabulary.of(["light", "dark"], tokenizer=words)
    tokenizer = _byte_pairs()
    with pytest.raises(ValueError, match="exclude each other"):
        Vocabulary.of(VERSES, characters=True, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="'heavens' is no token of the tokenizer"):
        Vocabulary(("a", "heavens"), 5, tokenizer=tokenizer.to_str())
    with pytest.raises(ValueError, match="tokenizer of a vocabulary must be a text"):
        Vocabulary.from_dict(Vocabulary.of(VERSES).to_dict() | {"tokenizer": 3})


def test_a_tokenizer_without_its_package_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pyrovae\[tokenizers\]'"):
        Vocabulary(("a", "b"), 3, tokenizer="{}")


@needs_tokenizers
def test_it_is_said_how_many_lines_a_tokenizer_does_not_keep():
    kept = Vocabulary.of(VERSES, tokenizer=_byte_pairs())
    assert "does not keep" not in kept.describe(VERSES)
    small = _byte_pairs()
    small.normalizer = tokenizers.normalizers.Lowercase()
    lines = [*VERSES, "light"]
    said = Vocabulary.of(lines, tokenizer=small).describe(lines)
    assert said.endswith("; the tokenizer does not keep 2 lines as they are")
