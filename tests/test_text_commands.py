"""The command line on text: train without options, then samples, reconstructions and scores as text."""

import csv
import json
import math
import shutil

import pytest
import torch
import yaml

from pyrovae import load_run
from pyrovae.cli import main
from pyrovae.cli.text import score_by_frequency
from pyrovae.data import Vocabulary

LINES = [f"{who} {what}, and {who} {then}." for who in "ABCDE" for what in ("ran", "sang") for then in ("ate", "sat")]
SMALL = ["--latent-dim", "2", "--num-samples", "30", "--likelihood", "Autoregressive"]
SMALL += ["--likelihood.network", "RecurrentDecoder", "--likelihood.network.width", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the directory of a run of two epochs, beside its text and what training printed."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "lines.txt").write_text("\n\n".join(LINES * 2), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--data", "lines.txt", "--run", "run", "--epochs", "2", *SMALL])
    return folder / "run"


def test_a_text_needs_no_option_but_its_file(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    words = {"num_classes": 14, "end": 0}
    assert config["likelihood"]["class_path"] == "pyrovae.likelihoods.Autoregressive"
    assert {name: config["likelihood"]["init_args"][name] for name in words} == words
    assert config["encoder"]["init_args"]["network"]["class_path"] == "pyrovae.nn.TokenEncoder"
    vocabulary = Vocabulary.from_dict(json.loads((run / "vocabulary.json").read_text()))
    assert set(vocabulary.words) == {*"ABCDE", "ran", "sang", "ate", "sat", "and", ",", "."}
    vae, loaded = load_run(run)
    assert loaded["vocabulary"] == vocabulary
    assert vae.decode(torch.zeros(1, 2)).end == vocabulary.end
    assert not list(run.glob("samples*"))


def test_the_result_is_said_by_the_word(tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(run.parent)
    main(["evaluate", str(run), "--num-samples", "30", "--output", str(tmp_path / "scores.csv")])
    said = capsys.readouterr().out
    values = [float(row["value"]) for row in csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())]
    nats = -sum(values) / (8 * len(values))  # seven words and marks, and the end
    assert f"{nats:.3f} nats a word, perplexity {math.exp(nats):,.1f}, of {8 * len(values)} words" in said
    assert "0 of 280 (0.0%) are not among them" in said


def test_samples_are_lines(tmp_path, capsys, run):
    out = tmp_path / "samples.txt"
    main(["sample", str(run), "--num-samples", "12", "--output", str(out)])
    assert len(out.read_text().splitlines()) == 12
    assert "no draws" not in capsys.readouterr().out
    main(["sample", str(run), "--num-samples", "3", "--temperature", "0.5", "--output", str(tmp_path / "cold.txt")])
    assert "made with temperature 0.5 and a nucleus of 1: these are no draws from p(x)" in capsys.readouterr().out


def test_reconstructions_stand_after_their_lines(tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(run.parent)
    main(["reconstruct", str(run), "--num-data", "3", "--output", str(tmp_path / "r.txt")])
    pairs = [line.split("\t") for line in (tmp_path / "r.txt").read_text().splitlines()]
    assert [len(pair) for pair in pairs] == [2, 2, 2]
    assert all(line in LINES for line, _ in pairs)
    assert "between the first two:" in capsys.readouterr().out


def test_each_line_of_a_file_has_a_score(tmp_path, run, capsys):
    (tmp_path / "new.txt").write_text("A ran, and A sat.\n\nZ ran.\n")
    main(["score", str(run), str(tmp_path / "new.txt"), "--num-samples", "200", "--output", str(tmp_path / "s.csv")])
    first, second = csv.DictReader((tmp_path / "s.csv").read_text().splitlines())
    assert (first["line"], first["words"], first["unknown"]) == ("1", "8", "0")
    assert (second["line"], second["words"], second["unknown"]) == ("3", "4", "1")
    assert float(first["nats_a_word"]) == pytest.approx(-float(first["log_p"]) / 8, rel=1e-5)
    assert "1 of 10 (10.0%) are not among them and become <unknown>" in capsys.readouterr().out


def test_training_goes_on_with_the_same_words(tmp_path, monkeypatch, capsys, run):
    monkeypatch.chdir(run.parent)
    before = (run / "vocabulary.json").read_bytes()
    main(["train", "--data", "lines.txt", "--run", "run", "--resume", "--epochs", "3"])
    assert "nats a word" in capsys.readouterr().out
    assert (run / "vocabulary.json").read_bytes() == before
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4  # of the epochs and the test


def test_characters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join(["abba", "baab", "aabb"] * 10))
    options = ["--characters", "true", "--max_steps", "4", "--epochs", "1", *SMALL]
    main(["train", "--data", "lines.txt", "--run", "run", *options])
    said = capsys.readouterr().out
    assert "2 characters; 0 of 120 (0.0%)" in said
    assert "30 of 30 lines are cut, with no end within 4 steps" in said
    assert "nats a character" in said
    main(["sample", "run", "--num-samples", "2"])
    assert all(
        line.endswith(" ...") or len(line) < 4 for line in (tmp_path / "run/samples-0.txt").read_text().split("\n")
    )


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("na na\n" * 9, [], "at least two words, got 1"),
        ("", [], "has no line with text"),
        ("one line\nand one", [], "holds 2 lines, too few"),
        ("a b\n" * 9, ["--max-words", "1"], "at least two words, got 1"),
    ],
)
def test_text_that_cannot_be_learned_is_refused(tmp_path, monkeypatch, content, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.txt").write_text(content)
    with pytest.raises(SystemExit, match=words):
        main(["train", "--data", "lines.txt", *options])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sample", "RUN", "--mean"], "are not for text"),
        (["sample", "RUN", "--output", "x.csv"], "output must end in .txt"),
        (["sample", "RUN", "--temperature", "0"], "temperature must be positive"),
        (["score", "RUN", "missing.txt"], "there is no file missing.txt"),
        (["train", "--data", "digits", "--max-words", "3", "--run", "new"], "max_steps and tokenizer are for text"),
    ],
)
def test_what_is_not_for_text_is_refused(tmp_path, monkeypatch, run, command, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        main([str(run) if word == "RUN" else word for word in command])
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_is_corrupt_is_refused(tmp_path, run):
    for name in ("config.yaml", "run.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    for content in ("{", "[]", '{"words": 1}'):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(ValueError, match=r"vocabulary\.json is corrupt"):
            load_run(tmp_path)


def test_the_baseline_is_the_frequency_of_words():
    vocabulary = Vocabulary(("a", "b"), 3)
    train = vocabulary.encode(["a b", "a"])  # a b end, a end
    x = vocabulary.encode(["b", "b a b"])
    _, log_p = score_by_frequency(train, x, vocabulary)
    end, a, b = (math.log((count + 0.5) / 7) for count in (2, 2, 1))
    assert log_p.tolist() == pytest.approx([b + end, b + a + b])


def test_a_file_of_a_tokenizer_gives_parts_of_words(tmp_path, monkeypatch, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(LINES, vocab_size=270, show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "lines.txt", "--run", "run", "--tokenizer", "tokenizer.json", "--epochs", "2", *SMALL]
    main(command)
    said = capsys.readouterr().out
    assert "nats a token" in said
    (tmp_path / "tokenizer.json").unlink()  # the run has it
    _, loaded = load_run("run")
    vocabulary = loaded["vocabulary"]
    assert vocabulary.decode(vocabulary.encode(LINES)) == LINES
    assert "\u0120and" in vocabulary.words  # with the space before it
    main(["score", "run", "lines.txt", "--num-samples", "30", "--output", "scores.csv"])
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [int(row["tokens"]) for row in rows] == [len(vocabulary.split(line)) + 1 for line in LINES]
    main(["train", "--resume", *command[1:]])
    main(["sample", "run", "--num-samples", "3", "--output", "samples.txt"])
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 3


def test_runs_with_other_vocabularies_are_not_compared(tmp_path, monkeypatch, run):
    monkeypatch.chdir(run.parent)
    main(
        ["train", "--data", "lines.txt", "--run", str(tmp_path / "other"), "--max-words", "5", "--epochs", "1", *SMALL]
    )
    for pair in ([str(run), str(tmp_path / "other")], [str(tmp_path / "other"), str(run)]):
        with pytest.raises(SystemExit, match="do not have the same vocabulary"):
            main(["compare", *pair, "--num-samples", "30"])


def test_lines_without_a_word_are_left_out(tmp_path, capsys, run):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"A": 0, "r": 1}, []))  # drops all other signs
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = ["train", "--data", str(tmp_path / "lines.txt"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    main([*command, "--run", str(tmp_path / "run"), "--epochs", "1", *SMALL])
    (tmp_path / "others.txt").write_text("\nA ran\n\nB sang\nran\n")
    capsys.readouterr()
    scores = ["--num-samples", "30", "--output", str(tmp_path / "scores.csv")]
    main(["score", str(tmp_path / "run"), str(tmp_path / "others.txt"), *scores])
    assert "1 of 3 lines have no token and are left out; the first is line 4" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["line"] for row in rows] == ["2", "5"]
    (tmp_path / "none.txt").write_text("B sang\n")
    with pytest.raises(SystemExit, match="no line has a token; line 1 is 'B sang'"):
        main(["encode", str(tmp_path / "run"), str(tmp_path / "none.txt"), "--output", str(tmp_path / "z.csv")])


def test_a_run_that_lost_its_vocabulary_is_refused(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "vocabulary.json").unlink()
    with pytest.raises(SystemExit, match="has no vocabulary.json any more, which says what its numbers stand for"):
        main(["sample", str(tmp_path / "run")])
