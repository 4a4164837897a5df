"""Few labels: the models M1, M2 and M1+M2 of Kingma et al. on MNIST, with 100 and 1,000 labels.

M1 is a VAE; a classifier then learns from the latents of the images with a label. M2 is a VAE with a latent class,
known for some images. M1+M2 is M2 on the latents of M1. Beside them, the classifier network of M2 on the pixels of the
images with a label alone. Each row is trained and its error goes into `benchmarks/labels.json`; the table of
`docs/labels.md` is made from it. A row that has a record is not run again, and a training that was stopped goes on.

    python benchmarks/labels.py --data-root data      # all rows
    python benchmarks/labels.py --page                # the table alone

Settings follow the paper (https://arxiv.org/abs/1406.5298): 50 latents in M1 and in M2, networks with softplus units,
M1 of two layers of 600 and M2 of one of 500, and an equal number of labels for each class. Images with a label are in
the training data so many times that they are a tenth of it, and the cross entropy of the classifier at them has a
weight (`--weight`). All take a fixed number of epochs; the last weights are scored.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import report
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import pyrovae
from pyrovae import VAE, bounds, data, encoders, likelihoods, priors
from pyrovae.nn import MLP
from pyrovae.structures import ClassifierELBO, SemiSupervisedVAE

RECORD = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "docs" / "labels.md"
IMAGE, CLASSES, LATENT = (1, 28, 28), 10, 50
LABELS = (100, 1000)
SHARE = 0.1  # of images with a label in the training data
deep = partial(MLP, hidden=(600, 600), activation=nn.Softplus)
wide = partial(MLP, hidden=(500,), activation=nn.Softplus)
# Errors in percent, from table 1 of the paper, for 100 and 1,000 labels.
PUBLISHED = {"M1 and a classifier": (11.82, 4.24), "M2": (11.97, 3.60), "M1+M2": (3.33, 2.40)}


class Digits(NamedTuple):
    """Grey values and classes."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Settings(NamedTuple):
    """What a row is trained with.

    Args:
        epochs: of M1.
        epochs_of_m2: of M2 on pixels.
        epochs_on_latents: of M2 on the latents of M1.
        weight: of the cross entropy at an image with a label.
        batch_size: images of a step.
        seed: of labels, weights and batches.
    """

    epochs: int = 80
    epochs_of_m2: int = 20
    epochs_on_latents: int = 60
    weight: float = 50.0
    batch_size: int = 200
    seed: int = 0


def with_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """Returns the places of `count` images, as many of each class, drawn at random."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = one_hot(labels[order], CLASSES).cumsum(0).gather(1, labels[order].unsqueeze(1)).squeeze(1)
    return order[rank <= count // CLASSES]


def mixed(x: Tensor, labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all data without classes, and those with a label so many times that they are a tenth of the result."""
    times = max(1, round(SHARE / (1 - SHARE) * len(x) / len(known)))
    hidden = torch.full((len(x),), -1)
    return torch.cat([x, *[x[known]] * times]), torch.cat([hidden, *[labels[known]] * times])


def error(guesses: Tensor, labels: Tensor) -> float:
    """Returns the share of wrong guesses in percent."""
    return 100 * (guesses != labels).double().mean().item()


def m1(digits: Digits, settings: Settings, runs: Path) -> VAE:
    """Returns M1, trained on all images; with the weights of an earlier call."""
    pyro.clear_param_store()
    pyro.set_rng_seed(settings.seed)
    vae = VAE(
        priors.StandardNormal(LATENT),
        likelihoods.Bernoulli(LATENT, IMAGE, deep),
        encoders.DiagonalNormal(IMAGE, LATENT, deep),
    )
    fit(vae, (digits.train[0],), bounds.ELBO(), settings.epochs, settings, runs / "m1.pt", data.dynamic_binarization)
    return vae


def fit(
    vae: Any,
    args: tuple[Tensor, ...],
    loss: Any,
    epochs: int,
    settings: Settings,
    checkpoint: Path,
    transform: Callable | None = None,
) -> None:
    """Trains a VAE with a learning rate that falls to zero, or goes on with it."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    given = {"epochs": epochs, "batch_size": settings.batch_size, "optimizer": optimizer, "scheduler": schedule}
    pyrovae.fit(vae.model, vae.guide, args, loss=loss, transform=transform, checkpoint=checkpoint, resume=True, **given)


def m2(x_shape: tuple[int, ...], likelihood: Any) -> SemiSupervisedVAE:
    pyro.clear_param_store()
    encoder = encoders.DiagonalNormal(x_shape, LATENT, wide, context_dim=CLASSES)
    return SemiSupervisedVAE(priors.StandardNormal(LATENT), likelihood, encoder, wide, num_classes=CLASSES)


def classifier_alone(digits: Digits, known: Tensor, settings: Settings, runs: Path) -> Callable[[Tensor], Tensor]:
    """Returns the classifier network of M2, trained on the images with a label."""
    x, labels = digits.train[0][known], digits.train[1][known]
    network = wide(IMAGE, CLASSES)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(1000):
        rows = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        cross_entropy(network(x[rows]), labels[rows]).backward()
        optimizer.step()
    return lambda images: network(images).argmax(-1)


def classifier_of_latents(digits: Digits, known: Tensor, settings: Settings, runs: Path) -> Callable[[Tensor], Tensor]:
    """Returns a logistic regression on the latents of M1, trained on the images with a label."""
    encoder = m1(digits, settings, runs).encoder.eval()
    z, labels = encoder(data.static_binarization(digits.train[0][known])).mean, digits.train[1][known]
    found = LogisticRegression(max_iter=5000).fit(z.detach(), labels)
    return lambda images: torch.from_numpy(found.predict(encoder(data.static_binarization(images)).mean.detach()))


def m2_of_pixels(digits: Digits, known: Tensor, settings: Settings, runs: Path) -> Callable[[Tensor], Tensor]:
    """Returns M2 on binarised images."""
    vae = m2(IMAGE, likelihoods.Bernoulli(LATENT, IMAGE, wide, context_dim=CLASSES))
    args = mixed(*digits.train, known)
    loss, place = ClassifierELBO(vae.classify, settings.weight), runs / f"m2-{len(known)}-{settings.seed}.pt"
    fit(vae, args, loss, settings.epochs_of_m2, settings, place, data.dynamic_binarization)
    return lambda images: vae.classify(data.static_binarization(images)).logits.argmax(-1)


def m2_of_latents(digits: Digits, known: Tensor, settings: Settings, runs: Path) -> Callable[[Tensor], Tensor]:
    """Returns M2 on the latents of M1, which are drawn again for each batch."""
    encoder = m1(digits, settings, runs).encoder.eval()
    pyro.set_rng_seed(settings.seed)

    @torch.no_grad()
    def moments(images: Tensor) -> Tensor:
        q = encoder(data.static_binarization(images)).base_dist
        return torch.cat([q.loc, q.scale], dim=-1)

    def drawn(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = z.chunk(2, dim=-1)
        return loc + scale * torch.randn_like(scale), labels

    vae = m2((LATENT,), likelihoods.Normal(LATENT, LATENT, wide, per_dimension=True, context_dim=CLASSES))
    args = mixed(moments(digits.train[0]), digits.train[1], known)
    loss, place = ClassifierELBO(vae.classify, settings.weight), runs / f"m1m2-{len(known)}-{settings.seed}.pt"
    fit(vae, args, loss, settings.epochs_on_latents, settings, place, drawn)
    return lambda images: vae.classify(moments(images)[:, :LATENT]).logits.argmax(-1)


ROWS: dict[str, Callable[[Digits, Tensor, Settings, Path], Callable[[Tensor], Tensor]]] = {
    "the classifier alone": classifier_alone,
    "M1 and a classifier": classifier_of_latents,
    "M2": m2_of_pixels,
    "M1+M2": m2_of_latents,
}


def measured(name: str, digits: Digits, count: int, settings: Settings, runs: Path) -> dict[str, float]:
    """Trains a row, and returns its errors on validation and test images in percent."""
    known = with_labels(digits.train[1], count, settings.seed)
    pyro.set_rng_seed(settings.seed)
    classify = ROWS[name](digits, known, settings, runs)
    parts = {"validation": digits.validation, "test": digits.test}
    with torch.no_grad():
        return {part: error(classify(x), labels) for part, (x, labels) in parts.items()}


def mnist(root: str) -> Digits:
    splits = data.load("mnist", root)
    return Digits(*((part.x, part.labels) for part in splits))  # type: ignore[misc]


def table(record: dict[str, Any]) -> str:
    """Returns the table of errors."""
    rows = []
    for name in ROWS:
        cells = []
        for i, count in enumerate(LABELS):
            found = [run["test"] for run in record["rows"].get(f"{name}, {count}", {}).values()]
            if len(found) > 1:
                cells.append(f"{statistics.fmean(found):.2f} ± {statistics.stdev(found):.2f} ({len(found)})")
            else:
                cells.append(f"{found[0]:.2f}" if found else "not run")
            cells.append(f"{PUBLISHED[name][i]:.2f}" if name in PUBLISHED else "")
        rows.append([name, *cells])
    header = [""]
    for count in LABELS:
        header += [f"{count:,} labels, here", "published"]
    return report.table(header, rows)


def page(record: dict[str, Any], text: str) -> str:
    """Returns the page with the table of the record."""
    return report.put("errors", table(record), text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data", help="the folder of MNIST")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--labels", type=int, nargs="*", default=list(LABELS), help="numbers of images with a label")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--weight", type=float, default=Settings().weight, help="of the cross entropy")
    parser.add_argument("--runs", type=Path, default=Path("runs/labels"), help="the folder of the checkpoints")
    parser.add_argument("--page", action="store_true", help="write the table of the record, and no more")
    args = parser.parse_args(argv)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": {}}
    if not args.page:
        digits = mnist(args.data_root)
        record["machine"] = report.machine(packages=("torch", "pyro-ppl"))
        for seed in args.seeds:
            for name in args.rows:
                for count in args.labels:
                    runs = record["rows"].setdefault(f"{name}, {count}", {})
                    if str(seed) in runs:
                        continue
                    settings = Settings(weight=args.weight, seed=seed)
                    runs[str(seed)] = measured(name, digits, count, settings, args.runs)
                    RECORD.write_text(json.dumps(record, indent=1) + "\n")
                    print(f"{name}, {count:,} labels, seed {seed}: {runs[str(seed)]}", flush=True)
    PAGE.write_text(page(record, PAGE.read_text()))


if __name__ == "__main__":
    main()
