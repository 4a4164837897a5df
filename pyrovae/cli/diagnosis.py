"""``pyrovae diagnose``."""

import json
import textwrap
from pathlib import Path

import pyro
from torch import Tensor

from pyrovae import diagnostics, storage
from pyrovae.cli.common import SplitName, advice_as_options, check_device, data_to_score, first_of, load_data_of
from pyrovae.cli.labels import arguments_of, check_label, context_of, note_on, of_x_alone, with_label
from pyrovae.data import Splits
from pyrovae.estimators import Estimator, ParticleFilter, UntilTrusted
from pyrovae.parts import context_size
from pyrovae.structures import MissingDataVAE, SemiSupervisedVAE, SequenceVAE

_NUM_TEXTS, _SECONDS_FOR_TEXT = 60, 120.0
_NUM_SEQUENCES = 60
_NOT_FOR_TABLES = ("calibration", "sharpness", "quality")  # synthetic_rows compares columns and pairs of them


def diagnose(
    run: str,
    split: SplitName = "test",
    num_data: int | None = None,
    method: Estimator | None = None,
    nuts_samples: int | None = None,
    other: str | None = None,
    label: int | None = None,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Reports what a trained run learned and where it loses nats: tables with verdicts, a JSON file, pictures.

    Of sequences, such as sounds, music and time series, it reports the log-density of each step and the terms of its
    ELBO.

    Args:
        run: the run directory.
        split: the part of the data to look at.
        num_data: number of data to look at, the first ones, 300 by default, 60 of text and of sequences; gaps are
            measured on a third.
        method: the class of the estimator of log p(x) for the gaps, one of pyrovae.estimators;
            AnnealedImportanceSampling by default, for text UntilTrusted within two minutes; for sequences it is
            ParticleFilter.
        nuts_samples: draws of each of two NUTS chains for the posteriors of three data, after half as many warm-up
            steps: the slowest part. At least 100, 1,000 by default; 0, the default for text, leaves it out.
        other: a second data set of the same shape to compare with the first; without it, the most unusual data are
            listed.
        label: look at data of this class alone; needed for runs that take labels as a context.
        output: a directory for the results; by default diagnosis-<split> in the run directory.
        data: another data set of the same shape; by default the run's own.
        data_root: where the images are; by default as in training.
        seed: seed of everything that is drawn.
        device: cpu, cuda, cuda:1, ...
        trust: let the run's configuration name classes outside pyrovae, and so run their code.
    """
    if num_data is not None and num_data < 30:
        raise ValueError(f"num_data must be at least 30 for a diagnosis, got {num_data}.")
    if nuts_samples and nuts_samples < 100:
        raise ValueError(f"nuts_samples must be at least 100, or 0 to leave NUTS out; got {nuts_samples}.")
    out = Path(output) if output is not None else Path(run) / f"diagnosis-{split}"
    if out.exists():
        raise FileExistsError(f"{out} is there already. Name another place with --output.")
    check_device(device)
    vae, config = storage.load_run(run, trust=trust)
    preprocessing, schema = config["preprocessing"], config.get("table")
    if config.get("vocabulary"):  # each gradient passes through the decoder word by word
        num_data, method = num_data or _NUM_TEXTS, method or UntilTrusted(seconds=_SECONDS_FOR_TEXT)
        if nuts_samples is None:
            nuts_samples = 0
            print("posteriors by NUTS take long on text, and are left out. Add them with --nuts-samples 1000")
    if isinstance(vae, SequenceVAE):
        for name, given in (("other", other), ("label", label), ("nuts_samples", nuts_samples)):
            if given:
                raise ValueError(f"{name} is not for sequences, whose steps are diagnosed alone. Leave it out.")
        if method is not None and not isinstance(method, ParticleFilter):
            raise ValueError(f"steps of sequences are scored by ParticleFilter, got {method}. Leave out --method.")
        num_data = num_data or _NUM_SEQUENCES
    num_data = 300 if num_data is None else num_data
    nuts_samples = 1000 if nuts_samples is None else nuts_samples
    if schema is None:
        check_label(vae, label)
    elif label is not None:
        raise ValueError("label is not for tables. Leave it out.")
    if label is None and schema is None and context_size(vae) and not isinstance(vae, SemiSupervisedVAE):
        raise ValueError("the run takes labels as a context, and a diagnosis is of data of one class. Give --label.")

    def first(splits: Splits, split: SplitName, label: int | None) -> tuple[Tensor | None, ...]:
        part = data_to_score(splits, split, preprocessing)
        part = part if label is None else with_label(part, label)
        x, labels = part
        assert x is not None
        if isinstance(vae, SequenceVAE):
            steps, seen = arguments_of(vae, first_of(part, num_data, device))
            return steps, labels, seen  # a mask, which follows the data as a context does
        context = next(iter(() if schema is None else context_of(schema, part.context)), None)
        found: tuple[Tensor | None, ...] = (x, labels, context)
        if isinstance(vae, MissingDataVAE):
            complete = ~x.flatten(1).isnan().any(dim=1)
            print(f"{split}: data with missing elements are left out, {int((~complete).sum()):,} of {len(x):,}")
            found = tuple(None if t is None else t[complete] for t in found)
            if complete.sum() < 30:
                raise ValueError(
                    f"a diagnosis needs 30 data without missing elements, and {split} has {int(complete.sum())}."
                )
        return tuple(None if t is None else t[:num_data].to(device) for t in found)

    splits = load_data_of(config, data, data_root)
    vae.to(device)
    (x, labels, context), (train, _, train_context) = first(splits, split, label), first(splits, "train", label)
    strange, strange_context = None, None
    if other is not None:
        strange, _, strange_context = first(load_data_of(config, other, data_root), "test", None)
    assert x is not None and train is not None
    if strange is not None and strange.shape[1:] != x.shape[1:]:
        raise ValueError(f"other has data of shape {tuple(strange.shape[1:])}, the run of {tuple(x.shape[1:])}.")

    pyro.set_rng_seed(seed)
    if isinstance(vae, SequenceVAE):
        model, guide = vae.model_by_step, vae.guide_by_step
    else:
        model, guide = (of_x_alone(vae, program, label) for program in (vae.model, vae.guide))
    generated = None
    if schema is not None:
        generated = vae.sample(max(30, len(x))) if context is None else vae.sample(1, context)[0]
        if schema.context:
            print(note_on(vae, schema).lstrip())
    inputs = diagnostics.ReportInputs(
        model,
        guide,
        x,
        train,
        held_out=split != "train",
        labels=labels,
        other=strange,
        method=method,
        nuts_samples=nuts_samples,
        columns=None if schema is None else schema.modelled,
        generated=generated,
        context=context,
        train_context=train_context,
        other_context=strange_context,
    )
    results, verdicts = {}, []
    for name, kind in diagnostics.DIAGNOSES.items():
        if (name == "steps") != isinstance(vae, SequenceVAE) or (name == "posterior" and nuts_samples == 0):
            continue
        if name == "synthetic_rows" if schema is None else name in _NOT_FOR_TABLES:
            continue
        print(f"\n== {name.replace('_', ' ')}: {kind.question}")
        pyro.set_rng_seed(seed)  # each diagnostic draws the same, whichever ran before it
        try:
            result = kind.for_report(inputs)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).partition("Trace Shapes:")[0].rstrip()
            print(f"not for this model or these data: {reason}")
            results[name] = {"skipped": reason}
        else:
            print(advice_as_options(str(result)))
            out.mkdir(parents=True, exist_ok=True)
            result.plot(out / f"{name}.png")
            results[name] = {"question": kind.question, **result.summary()}
            verdicts.append(advice_as_options(f"{kind.question} {result.verdict}"))
        storage.write_atomically(out / "diagnosis.json", (json.dumps(results, indent=1) + "\n").encode())
    _draw_collapse(Path(run) / "metrics.jsonl", out / "collapse_history.png")
    print("\n== in short")
    for verdict in verdicts:
        print(textwrap.fill(verdict, 80, subsequent_indent="  "))
    print(f"\npictures and numbers: {out}")


def _draw_collapse(metrics: Path, path: Path) -> None:
    """Plots the mutual information of data and latents over training, if the run recorded it."""
    from pyrovae import plots

    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    records = [record for record in records if "mutual_information" in record]
    if len(records) > 1:
        plots.collapse_history(records, path)
        print(f"\nover training: {path}")
