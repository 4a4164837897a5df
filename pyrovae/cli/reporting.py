"""``pyrovae report``."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
import yaml

from pyrovae import data as datasets
from pyrovae import estimators, storage
from pyrovae.cli import page
from pyrovae.cli.common import advice_as_options, check_device, data_to_score, first_of, load_data_of
from pyrovae.cli.comparison import comparable_runs, scored_runs
from pyrovae.cli.labels import scored
from pyrovae.cli.pictures import latents_of, pictures_of
from pyrovae.cli.rows import draw_rows
from pyrovae.plots.drawing import principal_plane
from pyrovae.training import History

_NUM_POINTS = 500  # data in the picture of the latents
_DATA_KEYS = ("x_shape", "fingerprint", "table", *storage.ENCODINGS)  # of a loaded configuration, which no file holds


def report(
    runs: list[str],
    output: str | None = None,
    num_data: int = 100,
    seconds: float | None = None,
    data_root: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Writes a page of HTML about one or more runs, which needs no network: to look at, to send and to keep.

    It holds the configuration, the learning curve, the score with its trust, samples, reconstructions, the latent space
    and the diagnosis, if pyrovae diagnose has written one. Several runs are compared by log p(x) of the same data.

    Args:
        runs: one or more run directories.
        output: a .html file; by default report.html in the run directory, or report-<other runs>.html in the first. A
            report is written again; another file is not replaced.
        num_data: test data on which several runs are compared, the first ones.
        seconds: budget of time of the estimates by which several runs are compared, for each run; null for no limit.
        data_root: the directory of the images; that of the run by default.
        seed: seed of what is drawn.
        device: cpu, cuda, cuda:1, ...
        trust: allow the configurations of the runs to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    if num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise ValueError("runs holds a directory twice. Give different runs.")
    check_device(device)
    others = "".join(f"-{Path(run).resolve().name}" for run in runs[1:])
    out = _checked_output(Path(runs[0]) / f"report{others}.html" if output is None else Path(output))
    loaded = {run: storage.load_run(run, trust=trust) for run in runs}  # all, before anything is done
    sections = []
    if len(runs) > 1:
        comparable = comparable_runs(runs, "test", num_data, None, data_root, device, trust)
        ranking = estimators.compare_all(scored_runs(comparable, "test", seconds=seconds, seed=seed))
        sections.append(_comparison(ranking, num_data))
    for run, (vae, config) in loaded.items():
        pyro.set_rng_seed(seed)
        splits = load_data_of(config, None, data_root)
        title = Path(run).resolve().name if len(runs) > 1 else ""
        sections += [f"<h2>{page.text(title)}</h2>"] if title else []
        sections += sections_of(Path(run), vae.to(device), config, splits)
    _write(out, runs, sections)
    print(f"report: {out}")


def write_report(directory: Path, vae: Any, config: dict[str, Any], splits: datasets.Splits) -> None:
    """Writes the report of a run that has just been trained, from its pictures."""
    _write(directory / "report.html", [str(directory)], sections_of(directory, vae, config, splits))


def _write(out: Path, runs: list[str], sections: list[str]) -> None:
    names = ", ".join(Path(run).resolve().name for run in runs)
    storage.write_atomically(out, page.page(f"pyrovae: {names}", sections).encode())


def sections_of(directory: Path, vae: Any, config: dict[str, Any], splits: datasets.Splits) -> list[str]:
    """Returns what a report says of a run, as parts of a page; what cannot be made is a line that says why.

    Args:
        directory: of the run.
        vae: its VAE, trained.
        config: its configuration.
        splits: its data.
    """
    records = _records(directory / "metrics.jsonl")
    history = History([record for record in records if "epoch" in record])
    parts: list[tuple[str, Callable[[], str]]] = [
        ("", lambda: page.cards(_numbers(vae, config, splits, history, records))),
        ("Learning curve", lambda: _learning_curve(history)),
        ("Samples and reconstructions", lambda: _pictures(directory, vae, splits, history)),
        ("Latent space", lambda: _latent_space(vae, splits)),
        ("Diagnosis", lambda: _diagnosis(directory)),
        ("Configuration", lambda: _configuration(vae, config)),
    ]
    sections = []
    for title, make in parts:
        try:
            content = make()
        except Exception as error:  # a part must not cost the others
            reason = " ".join(str(error).split()) or type(error).__name__
            content = f'<p class="faint">This could not be made: {page.text(reason)}</p>'
        sections.append((f"<h3>{title}</h3>" if title else "") + content)
    return sections


def _checked_output(out: Path) -> Path:
    """Returns the path of a report; raises an error where something other than a report is."""
    if out.suffix != ".html":
        raise ValueError(f"output must end in .html, got {out}.")
    if out.exists() and b'name="generator" content="pyrovae"' not in out.read_bytes()[:2000]:
        raise FileExistsError(f"{out} already exists and is no report. Give another file with --output.")
    return out


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _numbers(
    vae: Any, config: dict[str, Any], splits: datasets.Splits, history: History, records: list[dict[str, Any]]
) -> dict[str, str]:
    sizes = " + ".join(f"{len(part.x):,}" for part in splits)
    numbers = {
        "data: training, validation, test": sizes,
        "parameters": f"{sum(p.numel() for p in vae.parameters()):,}",
    }
    if len(history):
        numbers["epochs"] = f"{len(history):,}"
        if history.best_epoch is not None:
            numbers[f"lowest validation loss, in epoch {history.best_epoch}"] = f"{min(_finite(history)):.3f}"
    result = next((record for record in reversed(records) if "log_marginal" in record), None)
    if result is None:
        return numbers | {"score: pyrovae evaluate gives one": "none yet"}
    n, untrusted = result["num_data"], result["not_trusted"]
    score = f"{result['log_marginal']:.3f} ± {result['standard_error']:.3f}"
    found = {
        f"{scored(vae, splits.schema)}, test, nats a datum": score,
        "of the test data can be trusted": f"{1 - untrusted / n:.1%}",
    }
    if "baseline" in result:
        baseline = "independent dimensions" if splits.vocabulary is None else "words by their frequency"
        found[f"baseline of {baseline}, nats"] = f"{result['baseline']:.3f}"
    return found | numbers


def _finite(history: History) -> list[float]:
    return [value for value in history["validation"] if value is not None]


def _learning_curve(history: History) -> str:
    if not len(history):
        return '<p class="faint">The run has no record of its training.</p>'
    curves = {
        label: history[name]
        for name, label in (("loss", "training"), ("validation", "validation"))
        if any(name in record for record in history.records)
    }
    return page.line_chart(history["epoch"], curves, "epoch", "loss, nats a datum")


def _pictures(directory: Path, vae: Any, splits: datasets.Splits, history: History) -> str:
    """Returns the pictures of a run, drawn if it has none; of a table, new rows, and of a text, new lines."""
    if splits.schema is not None:
        cells = None if splits.test.context is None else splits.test.context[:8]
        drawn = draw_rows(vae, splits.schema, 8 if cells is None else len(cells), cells)
        rows = splits.schema.decode(drawn, cells).to_pylist()
        given = f", given {', '.join(splits.schema.context_names)} of test rows" if splits.schema.context else ""
        return f"<p>Rows that the model draws{page.text(given)}:</p>" + page.table(
            list(rows[0]), [[*row.values()] for row in rows]
        )
    if splits.vocabulary is not None:
        lines = splits.vocabulary.decode(vae.sample(8))
        return "<p>Lines that the model draws:</p>" + page.table(["line"], [[line or "(empty)"] for line in lines])
    shown = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, draw_to in pictures_of(str(directory), vae, splits, history).items():
            if name in ("samples.png", "reconstructions.png"):
                path = directory / name
                if not path.exists():
                    path = Path(temporary) / name
                    draw_to(path)
                shown.append(page.picture(path, name.removesuffix(".png")))
    return f'<div class="pair">{"".join(shown)}</div>'


def _latent_space(vae: Any, splits: datasets.Splits) -> str:
    """Returns the means of q(z | x) of test data in the plane of their leading principal components."""
    part = first_of(data_to_score(splits, "test", "grey"), _NUM_POINTS, str(next(vae.parameters()).device))
    z = latents_of(vae, part, splits.schema)[0].detach().cpu().flatten(1).double()
    if z.shape[1] > 2:
        z, shares = principal_plane(z)
        names = [f"component {i + 1}, {share:.0%} of the variance" for i, share in enumerate(shares)]
    else:
        z, names = torch.cat([z, z.new_zeros(len(z), 2 - z.shape[1])], dim=1), ["z 1", "z 2"]
    labels = None if part.labels is None else [str(label) for label in part.labels.tolist()]
    x = part.x.cpu()
    tiles = x.nan_to_num(0.5) if x.dim() == 4 and x.shape[1] in (1, 3) else None
    tips = [f"test datum {i}" + ("" if labels is None else f", label {labels[i]}") for i in range(len(x))]
    if splits.schema is not None:
        cells = splits.schema.decode(x, part.context).to_pylist()
        tips = [_of_row(tip, row) for tip, row in zip(tips, cells, strict=True)]
    if splits.vocabulary is not None:
        tips = [f"{tip}\n{line}" for tip, line in zip(tips, splits.vocabulary.decode(x), strict=True)]
    intro = f"<p class='faint'>A point for each of {len(x):,} test data, at its place in q(z | x). Point at one.</p>"
    return intro + page.scatter(z, labels, tips, tiles, names)


def _of_row(title: str, row: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in row.items()]
    return "\n".join([title, *lines[:12], *(["..."] if len(lines) > 12 else [])])


def _diagnosis(directory: Path) -> str:
    found = sorted(directory.glob("diagnosis-*/diagnosis.json"))
    if not found:
        return f'<p class="faint">None yet: pyrovae diagnose {page.text(directory)}, then pyrovae report again.</p>'
    sections = []
    for path in found:
        rows, drawn = [], []
        for name, result in json.loads(path.read_text()).items():
            title = name.replace("_", " ")
            verdict = result.get("verdict") or f"skipped: {result.get('skipped', 'no verdict')}"
            rows.append([result.get("question", title), advice_as_options(verdict)])
            if path.with_name(f"{name}.png").exists():
                drawn.append(page.details(title, page.picture(path.with_name(f"{name}.png"), title)))
        part = path.parent.name.removeprefix("diagnosis-")
        sections.append(f"<p>{page.text(part)} data</p>" + page.table(["question", "verdict"], rows) + "".join(drawn))
    return "".join(sections)


def _configuration(vae: Any, config: dict[str, Any]) -> str:
    settings = yaml.safe_dump({k: v for k, v in config.items() if k not in _DATA_KEYS}, sort_keys=False)
    return page.details("settings", f"<pre>{page.text(settings)}</pre>") + page.details(
        "modules", f"<pre>{page.text(vae)}</pre>"
    )


def _comparison(ranking: estimators.Ranking, num_data: int) -> str:
    rows = []
    for name, estimate in ranking.estimates.items():
        error = estimate.standard_error.double().square().sum().sqrt().item() / len(estimate.value)
        untrusted = int((~estimate.trusted).sum())
        rows.append([Path(name).resolve().name, estimate.value.double().mean().item(), error, untrusted])
    verdicts = "".join(f"<li>{page.text(' '.join(pair.verdict.split()))}</li>" for pair in ranking.pairs)
    counted = len(next(iter(ranking.estimates.values())).value)
    return (
        f"<h2>Comparison</h2><p>log p(x) of the first {counted:,} test data, the same for all runs.</p>"
        + page.table(["run", "nats a datum", "error by sampling", "not trusted"], rows)
        + f"<ul>{verdicts}</ul>"
    )
