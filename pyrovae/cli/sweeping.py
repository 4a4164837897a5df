"""``pyrovae sweep``."""

import csv
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pyrovae import config as configs
from pyrovae.documents import read_yaml
from pyrovae.extras import check_installed
from pyrovae.locks import DirectoryLock

_RANGE = {"low", "high", "log"}
_OTHER_DATA = (
    "data",
    "data_root",
    "schema",
    "context",
    "preprocessing",
    "characters",
    "max_words",
    "max_steps",
    "tokenizer",
    "per_quarter",
)
_OTHER_UNITS = (*_OTHER_DATA, "loss")
_ERROR = "pyrovae: error: "
_EXAMPLE = "Give a range, {low: 0.0001, high: 0.01, log: true}, or a list of choices."


def sweep(file: str, trials: int = 20, directory: str | None = None, seed: int = 0, trust: bool = False) -> None:
    """Searches options of pyrovae train for the smallest validation loss, with Optuna.

    Args:
        file: YAML with two entries. train holds options of pyrovae train; vary holds options to search, each with a
            range such as {low: 0.0001, high: 0.01, log: true}, whole numbers if both ends are, or a list of choices.
        trials: runs to train, those of earlier calls counted. A sweep that was stopped goes on.
        directory: where the runs are kept; runs/<name of the file> by default.
        seed: seed of the choice of options.
        trust: allow the file to name classes outside pyrovae, torch and Pyro, which runs their code.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}. Give a file of settings: pyrovae sweep --help.")
    text = Path(file).read_text(encoding="utf-8")
    try:
        train, vary = _checked(read_yaml(text), trust)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    optuna = _package()
    place = Path(directory) if directory is not None else Path("runs") / Path(file).stem
    kept, lock = place / "sweep.yaml", DirectoryLock(place)
    if kept.exists() and read_yaml(kept.read_text(encoding="utf-8")) != read_yaml(text):
        raise ValueError(f"{place} holds another sweep than {file}. Give another --directory, or the file as it was.")
    lock.acquire()
    try:
        kept.write_text(text, encoding="utf-8")
        (place / "train.yaml").write_text(yaml.safe_dump(train, sort_keys=False), encoding="utf-8")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        log = optuna.storages.journal.JournalFileBackend(str(place / "trials.log"))
        storage = optuna.storages.JournalStorage(log)
        study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
        stopped = [trial for trial in study.get_trials() if trial.state.name == "RUNNING"]
        for trial in stopped:
            _run(study, trial.number, trial.user_attrs["options"], place, trust)
        for number in range(len(study.get_trials()), trials):
            # From the seed and the trials before alone: a sweep that goes on is the one that was not stopped.
            study.sampler = optuna.samplers.TPESampler(seed=seed + number)
            trial = study.ask()
            options = {name: _chosen(trial, name, values) for name, values in vary.items()}
            trial.set_user_attr("options", options)
            _run(study, number, options, place, trust)
        _report(study, list(vary), place)
    finally:
        lock.release()


def _checked(found: Any, trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the two entries of a file; raises a ValueError that says what is wrong with them."""
    if not isinstance(found, dict) or found.keys() != {"train", "vary"}:
        raise ValueError("it must have two entries, train and vary.")
    train, vary = found["train"] or {}, found["vary"]
    if "run" in train:
        raise ValueError("train must not name a run: each trial has its own. Leave it out.")
    train = configs.check_options(configs.with_current_names(train), trust)
    if not isinstance(vary, dict) or not vary:
        raise ValueError(f"vary must hold the options to search. {_EXAMPLE}")
    for name, values in vary.items():
        head = str(name).partition(".")[0]
        if head in _OTHER_UNITS or name == "likelihood":
            raise ValueError(f"vary must not hold {name}: losses of other data or objectives cannot be compared.")
        if head not in (*configs.SETTINGS, *configs.PARTS):
            raise ValueError(f"vary holds {name}, which is no option of pyrovae train.")
        for text in _texts(values):
            if "." in text and not trust and not configs.is_trusted(text):
                raise ValueError(f"vary names {text}, outside pyrovae, torch and Pyro. Give --trust to run its code.")
        if not (isinstance(values, list) and values) and not (
            isinstance(values, dict)
            and {"low", "high"} <= values.keys() <= _RANGE
            and all(type(values[end]) in (int, float) for end in ("low", "high"))
            and values["low"] < values["high"]
            and not (values.get("log") and values["low"] <= 0)
        ):
            raise ValueError(f"vary holds {values!r} for {name}. {_EXAMPLE} The low end of a log range is above 0.")
    return train, vary


def _texts(value: Any) -> list[str]:
    """Returns all texts in a value."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _chosen(trial: Any, name: str, values: Any) -> Any:
    """Returns a value of an option, chosen by Optuna."""
    if isinstance(values, list):
        return values[trial.suggest_categorical(name, list(range(len(values))))]
    whole = type(values["low"]) is int and type(values["high"]) is int
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(name, values["low"], values["high"], log=bool(values.get("log")))


def _run(study: Any, number: int, options: dict[str, Any], place: Path, trust: bool) -> None:
    """Trains a trial, or goes on with it, and tells the study its smallest validation loss.

    Raises:
        ValueError: when it fails and none before succeeded, because then the options are likely wrong.
    """
    run = place / f"{number:03d}"
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
    command = [sys.executable, "-m", "pyrovae", "train", "--config", str(place / "train.yaml"), "--run", str(run)]
    command += [*words, "--quiet", "--resume", *(["--trust"] if trust else [])]
    ended = subprocess.run(command, capture_output=True, text=True)
    said = f"{number:3}  {' '.join(words)}"
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"status {ended.returncode}"]
        why = next((line for line in lines if line.startswith(_ERROR)), lines[-1]).removeprefix(_ERROR)
        if not any(trial.state.name == "COMPLETE" for trial in study.get_trials()):
            raise ValueError(f"trial {number} failed ({' '.join(words)}): {why}")
        study.tell(number, state=importlib.import_module("optuna").trial.TrialState.FAIL)
        print(f"{said}: failed: {why}", flush=True)
        return
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    smallest = min((record["validation"] for record in records if "validation" in record), default=math.inf)
    study.tell(number, smallest)
    print(f"{said}: {smallest:.4f}", flush=True)


def _report(study: Any, names: list[str], place: Path) -> None:
    """Writes a table of the trials, the best first, and says which is the best."""
    done = sorted((t for t in study.get_trials() if t.state.name == "COMPLETE"), key=lambda trial: trial.value)
    with (place / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "validation", *names])
        for trial in done:
            options = trial.user_attrs["options"]
            writer.writerow([f"{trial.number:03d}", trial.value, *(options[name] for name in names)])
    best = place / f"{done[0].number:03d}"
    print(f"smallest validation loss: {done[0].value:.4f} nats a datum, {best}; all: {place / 'sweep.csv'}")
    print(f"its test log p(x): pyrovae evaluate {best}")


def _package() -> Any:
    check_installed("optuna", "sweep")
    return importlib.import_module("optuna")
