"""Text in the command line: lines of a file as data, and lines that a run draws, reads back or scores."""

import math
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.cli.common import advice_as_options, new_file, write_rows
from pyrovae.data import Vocabulary
from pyrovae.distributions import Autoregressive, center, has_ended, sharpen
from pyrovae.estimators import Estimator, log_marginal

_TEXT = (".txt",)
_NUM_SHOWN, _NUM_BETWEEN = 10, 5  # lines


def text_options(settings: Any) -> dict[str, Any]:
    """Returns the options of a vocabulary among the settings of ``pyrovae train``; None where nothing is said."""
    return {
        "characters": settings.characters,
        "max_words": settings.max_words,
        "num_steps": settings.max_steps,
        "tokenizer": settings.tokenizer,
    }


def text_defaults(vocabulary: Vocabulary, num_lines: int) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` that suit text, as a configuration holds them.

    Args:
        vocabulary: the words.
        num_lines: lines to train on.
    """
    words = {"num_classes": vocabulary.num_classes, "end": vocabulary.end}
    decoder = {"class_path": "pyrovae.nn.RecurrentDecoder"}
    reader = {"class_path": "pyrovae.nn.TokenEncoder", "init_args": words}
    free = {"class_path": "pyrovae.bounds.FreeBits", "init_args": {"nats": 5.0, "group_size": None}}
    return {
        "preprocessing": "grey",
        "latent_dim": 16,
        "likelihood": {"class_path": "pyrovae.likelihoods.Autoregressive", "init_args": words | {"network": decoder}},
        "encoder": {"class_path": "pyrovae.encoders.DiagonalNormal", "init_args": {"network": reader}},
        "loss": {"class_path": "pyrovae.bounds.ELBO", "init_args": {"penalty": free}},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3, "fused": True}},
        "epochs": min(200, max(10, 200_000 // num_lines)),
        "patience": 5,
        "batch_size": min(32, max(8, num_lines // 20)),
        "clip_norm": 5.0,
        "num_samples": 100,
    }


def per_word(log_px: Tensor, x: Tensor, vocabulary: Vocabulary) -> str:
    """Returns in words the nats and the perplexity of a word, character or token of lines, given their log p."""
    kind, steps = vocabulary.unit, int(vocabulary.count_steps(x).sum())
    nats = -log_px.double().sum().item() / steps
    perplexity = f"{math.exp(nats):,.1f}" if nats < 100 else "above e^100"
    return f"{nats:.3f} nats a {kind}, perplexity {perplexity}, of {steps:,} {kind}s with the ends of lines"


def score_by_frequency(train: Tensor, x: Tensor, vocabulary: Vocabulary) -> tuple[str, Tensor]:
    """Returns the name and log p(x) of a baseline: all words are independent, with their frequencies in training."""

    def counted(lines: Tensor) -> Tensor:
        return ~has_ended(lines, vocabulary.end)

    counts = train[counted(train)].long().bincount(minlength=vocabulary.num_classes).double() + 0.5
    log_frequency = (counts / counts.sum()).log()
    return "words by their frequency", torch.where(counted(x), log_frequency[x.long()], 0.0).sum(-1)


def write_lines(lines: list[str], path: Path) -> None:
    """Writes lines as UTF-8, and prints the first."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for line in lines[:_NUM_SHOWN]:
        print(f"  {line}")


@torch.no_grad()
def sample_lines(
    vae: Any, vocabulary: Vocabulary, num_samples: int, output: str | Path, temperature: float, top_p: float, seed: int
) -> None:
    """Draws lines from p(x), or makes more usual ones, and writes them."""
    out = new_file(output, _TEXT)
    pyro.set_rng_seed(seed)
    p = vae.decode_from_prior(num_samples)
    if temperature == 1 and top_p == 1:
        x = p.sample()
    elif isinstance(p, Autoregressive):
        x = p.generate(lambda step: sharpen(step, temperature, top_p).sample())
        print(f"made with temperature {temperature:g} and a nucleus of {top_p:g}: these are no draws from p(x)")
    else:
        raise ValueError(f"temperature and top_p are for the likelihood Autoregressive, not {type(p).__name__}.")
    write_lines(vocabulary.decode(x), out)
    print(f"{num_samples} lines: {out}")


@torch.no_grad()
def reconstruct_lines(vae: Any, vocabulary: Vocabulary, x: Tensor, output: str | Path, seed: int) -> None:
    """Writes lines each with what is read back from its latent, and prints lines between the first two."""
    out = new_file(output, _TEXT)
    pyro.set_rng_seed(seed)
    pairs = zip(vocabulary.decode(x), vocabulary.decode(vae.reconstruct(x)), strict=True)
    write_lines([f"{line}\t{read_back}" for line, read_back in pairs], out)
    print(f"{len(x)} lines, each with its reconstruction after a tab: {out}")
    z = vae.encode(x[:2]).mean
    if len(x) > 1 and not torch.equal(z[0], z[1]):
        shares = torch.linspace(0, 1, _NUM_BETWEEN).unsqueeze(-1)
        between = center(vae.decode(torch.lerp(z[0], z[1], shares)))
        print("between the first two:", *vocabulary.decode(between), sep="\n  ")


def lines_with_words(vocabulary: Vocabulary, file: str) -> tuple[list[str], list[int]]:
    """Returns the lines of a file in which a vocabulary finds a word, and their numbers; prints how many are left out.

    Raises:
        ValueError: when it finds none in any line.
    """
    lines, numbers = datasets.read_lines(file)
    kept = [(line, number) for line, number in zip(lines, numbers, strict=True) if vocabulary.split(line)]
    if not kept:
        raise ValueError(f"{file}: no line has a {vocabulary.unit}; line {numbers[0]} is {lines[0]!r}.")
    if len(kept) < len(lines):
        first = min(set(numbers) - {number for _, number in kept})
        left_out = f"{len(lines) - len(kept):,} of {len(lines):,} lines have no {vocabulary.unit} and are left out"
        print(f"{file}: {left_out}; the first is line {first}")
    return [line for line, _ in kept], [number for _, number in kept]


def score_lines(
    vae: Any,
    vocabulary: Vocabulary,
    file: str,
    output: str | Path,
    method: Estimator,
    max_memory: float,
    seed: int,
    device: str,
) -> None:
    """Writes log p(x) of each line of a file that holds something, and prints nats a word."""
    out = new_file(output, (".csv",))
    lines, numbers = lines_with_words(vocabulary, file)
    x = vocabulary.encode(lines).to(device)
    print(vocabulary.describe(lines))
    pyro.set_rng_seed(seed)
    estimate = log_marginal(vae.model, vae.guide, x, method=method, max_memory=max_memory)
    value, steps = estimate.value.cpu(), vocabulary.count_steps(x).cpu()
    unknown = (x == vocabulary.unknown).sum(-1).tolist()
    kind = vocabulary.unit
    rows = []
    for i, number in enumerate(numbers):
        error, khat, trusted = estimate.standard_error[i], estimate.khat[i], int(estimate.trusted[i])
        shape = "" if khat.isnan() else f"{khat:.3g}"
        row = [number, f"{value[i]:.9g}", f"{error:.3g}", trusted, shape, int(steps[i]), unknown[i]]
        rows.append([*row, f"{-value[i] / steps[i]:.6g}"])
    header = ["line", "log_p", "standard_error", "trusted", "khat", f"{kind}s", "unknown", f"nats_a_{kind}"]
    write_rows(out, header, rows)
    print(advice_as_options(f"{file}: {estimate}") + f"\n{per_word(value, x.cpu(), vocabulary)}")
    for i in (value / steps).argsort()[:5].tolist():
        print(f"line {numbers[i]}, {-value[i] / steps[i]:.2f} nats a {kind}: {lines[i][:80]}")
    print(f"per line: {out}")
