"""What the command line answers to misspelt words, and the list of all parts."""

import pytest

from pyrovae.cli import main
from pyrovae.cli.listing import PARTS, classes_of

MISSPELT = [
    (["tarin"], "there is no command tarin.", "train"),
    (["train", "--latent-dims", "3"], "--latent_dims", "--latent_dim"),
    (["train", "--likelihood", "Norml"], "likelihood: there is no class Norml.", "Normal"),
    (["train", "--prior", "VampPriro"], "prior: there is no class VampPriro.", "VampPrior"),
    (["train", "--optimizer", "Adm"], "optimizer: there is no class Adm.", "Adam"),
    (["train", "--loss", "IWEA"], "loss: there is no class IWEA.", "IWAE"),
    (["train", "--likelihood.netwrk", "MLP"], "likelihood: it has no argument 'netwrk'.", "network"),
    (["train", "--likelihood.network.hiden", "3"], "it has no argument 'hiden'.", "hidden"),
    (["train", "--lr", "0.1"], "unrecognized arguments: --lr", "--optimizer.lr"),
    (["train", "--output-dir", "runs/a"], "--output_dir", "--run"),
    (["evaluate", "run", "--method", "Importance"], "method: there is no class Importance.", "ImportanceSampling"),
]


@pytest.mark.parametrize(("argv", "message", "nearest"), MISSPELT, ids=range(len(MISSPELT)))
def test_a_misspelt_word_is_answered_with_the_nearest_in_two_lines(argv, message, nearest, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("pyrovae: error: ") and message in first
    assert second.startswith("Nearest: ") and nearest in second.removeprefix("Nearest: ").rstrip(".").split(", ")


def test_a_file_in_the_place_of_an_option_is_taken_for_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(SystemExit):
        main(["train", "x.csv"])
    assert capsys.readouterr().err.splitlines()[1] == "Is it the data? Give --data x.csv."


INCOMPLETE = [
    (["train", "--loss", "IWAE"], "loss: IWAE needs num_particles. Give --loss.num_particles VALUE."),
    (["train", "--encoder.network.hidden", "512"], "encoder.network.hidden: it is a list: give '[512]'."),
    (["train", "--preprocessing", "x"], "preprocessing: must be one of 'grey', 'static', 'dynamic', got x."),
    (["evaluate"], "evaluate needs run. Give it after the command: pyrovae evaluate RUN."),
]


@pytest.mark.parametrize(("argv", "message"), INCOMPLETE)
def test_what_is_missing_is_said_in_a_line(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.splitlines()[0] == f"pyrovae: error: {message}"


def test_a_class_that_refuses_its_arguments_is_quoted_alone(tmp_path):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--loss", "IWAE", "--loss.num_particles", "0", "--run", str(tmp_path / "run")])
    assert exit.value.code == "pyrovae: error: num_particles must be an integer of at least 1, got 0."


def test_other_errors_say_where_to_look(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--epochs", "many"])
    first, second = capsys.readouterr().err.splitlines()
    assert (
        first.startswith("pyrovae: error: epochs: must be a whole number, got many.")
        and "pyrovae COMMAND --help" in second
    )


def test_every_part_is_listed_with_a_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["parts"])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for title, (_, module) in PARTS.items():
        assert any(line.startswith(title) for line in lines)
        for name in classes_of(module):
            [line] = [line for line in lines if line.split()[:1] == [name] and line.startswith("  ")][:1]
            assert len(line.split()) > 2
