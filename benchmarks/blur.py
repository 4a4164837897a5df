"""Blurry samples: the same VAE with seven likelihoods, on grey levels of Fashion-MNIST and of Frey's faces.

All have the same encoder, the same convolutional decoder up to its last layer, 16 latents, and see the same batches.
Each model is trained, scored and drawn from, and its numbers go into `benchmarks/blur.json`; the tables and the spectra
of `docs/blur.md` are made from them. A row that has a record is not run again, and a training that was stopped goes on.

    python benchmarks/blur.py --fashion-mnist data --frey freyfaces.npz      # all rows, or those named
    python benchmarks/blur.py --page                                         # tables and spectra alone

`freyfaces.npz` holds `x`, bytes of shape (1965, 560), 28 x 20 pixels, in the order of the film.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyro
import report
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyrovae
from pyrovae import VAE, bounds, data, encoders, likelihoods, priors
from pyrovae.diagnostics import frechet_distance, precision_recall
from pyrovae.nn import MLP, ConvNet, DeconvNet, GatedPixelCNN
from pyrovae.structures import HierarchicalVAE

RECORD = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "docs" / "blur.md"
PICTURES = PAGE.parent / "guide" / "pictures"
LATENT, LEVELS, BATCH = 16, 256, 64
SHOWN = 12  # samples in the pictures
down, up = partial(ConvNet, channels=(16, 32)), partial(DeconvNet, channels=(32, 16))


class Images(NamedTuple):
    """Grey levels k / 255, and features of images, ``(n, d)``, in which samples are compared with data."""

    train: Tensor
    test: Tensor
    features: Callable[[Tensor], Tensor]
    about: str


class Model(NamedTuple):
    """A row: how it is built, and what it sees of grey levels."""

    build: Callable[[tuple[int, ...]], Any]
    sees: Callable[..., Any] | None = None
    volume: float | None = 1.0  # of a grey level in what it sees; None where log p of the data does not exist


def dequantize(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Returns ``(k + u) / 256`` for grey levels ``k / 255``, u uniform between 0 and 1, drawn again at each call."""
    return ((LEVELS - 1) * x + torch.rand_like(x)) / LEVELS, *rest


def one_level(likelihood: Callable[..., Any]) -> Callable[[tuple[int, ...]], VAE]:
    return lambda shape: VAE(
        priors.StandardNormal(LATENT), likelihood(LATENT, shape), encoders.DiagonalNormal(shape, LATENT, down)
    )


def two_levels(shape: tuple[int, ...]) -> HierarchicalVAE:
    small = partial(MLP, hidden=(64,))
    return HierarchicalVAE(
        priors.StandardNormal(LATENT // 2),
        [encoders.DiagonalNormal(LATENT // 2, LATENT, small)],
        mixture(LATENT, shape),
        [encoders.DiagonalNormal(shape, LATENT, down), encoders.DiagonalNormal(LATENT, LATENT // 2, small)],
    )


mixture = partial(likelihoods.DiscretizedLogisticMixture, network=up, num_components=3)
pixels = partial(
    likelihoods.PixelCNN,
    network=partial(GatedPixelCNN, width=16, num_layers=3, kernel_size=3, network=up),
    output=partial(likelihoods.DiscretizedLogisticMixture, network=partial(MLP, hidden=(32,)), num_components=3),
)
density = {"sees": dequantize, "volume": 1 / LEVELS}
MODELS = {
    "Bernoulli": Model(
        one_level(partial(likelihoods.Bernoulli, network=up)), sees=data.dynamic_binarization, volume=None
    ),
    "Normal, scale 1": Model(one_level(partial(likelihoods.Normal, network=up, learn_scale=False)), **density),
    "Normal, scale learned": Model(one_level(partial(likelihoods.Normal, network=up)), **density),
    "Normal, optimal scale": Model(one_level(partial(likelihoods.OptimalNormal, network=up)), **density),
    "mixture of logistics": Model(one_level(mixture)),
    "mixture, two levels": Model(two_levels),
    "PixelCNN of mixtures": Model(one_level(pixels)),
}
COMPARED = "mixture of logistics"
EPOCHS = {"fashion-mnist": 10, "frey": 30}


def fashion_mnist(root: Path, train: int, test: int) -> Images:
    """Returns the first images of Fashion-MNIST, and the hidden layer of a classifier of the clothes."""
    splits = data.load("fashion-mnist", root)
    x, labels = splits.train.x[:train], splits.train.labels[:train]
    pyro.set_rng_seed(0)
    body = torch.nn.Sequential(ConvNet(tuple(x.shape[1:]), 64, channels=(16, 32)), torch.nn.ReLU())
    head = torch.nn.Linear(64, 10)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
    for _ in range(5):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(body(x[rows])), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (head(body(splits.test.x[:2000])).argmax(-1) == splits.test.labels[:2000]).float().mean()
    about = f"the 64 hidden units of a classifier that is right for {right:.1%} of 2,000 test images"
    return Images(x, splits.test.x[:test], torch.no_grad()(body), about)


def frey(file: Path, train: int, test: int) -> Images:
    """Returns a random split of the faces, and the principal components of those to train on."""
    x = torch.from_numpy(np.load(file)["x"]).float().view(-1, 1, 28, 20) / (LEVELS - 1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    x, x_test = x[: len(x) - 400][:train], x[len(x) - 400 :][:test]
    mean = x.mean(0)
    components = torch.linalg.svd((x - mean).flatten(1), full_matrices=False).Vh[:32].T
    return Images(x, x_test, lambda images: (images - mean).flatten(1) @ components, "32 principal components")


def spectrum(x: Tensor) -> tuple[list[float], list[float]]:
    """Returns frequencies in cycles a pixel, and the power of images at them, a mean over images and directions."""
    power = torch.fft.fft2(x - x.mean((-2, -1), keepdim=True)).abs().square().mean((0, 1)) / x[0, 0].numel()
    axes = [torch.fft.fftfreq(n).square() for n in x.shape[-2:]]
    band = ((axes[0].unsqueeze(-1) + axes[1]).sqrt() * 20).round().long()
    bands = range(1, 11)  # up to half a cycle a pixel
    return [k / 20 for k in bands], [power[band == k].mean().item() for k in bands]


def trained(name: str, images: Images, epochs: int, directory: Path) -> tuple[Any, float]:
    """Returns a model, trained now as far as it was not before, and its KL divergence in nats a datum."""
    pyro.set_rng_seed(0)
    vae = MODELS[name].build(tuple(images.train.shape[1:]))
    vae.likelihood.start_at(images.train)
    directory.mkdir(parents=True, exist_ok=True)
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        images.train,
        loss=bounds.ELBO(),
        epochs=epochs,
        batch_size=BATCH,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        transform=MODELS[name].sees,
        checkpoint=directory / "checkpoint.safetensors",
        resume=True,
        progress=False,
    )
    return vae.eval(), sum(value for key, value in history.records[-1].items() if key.startswith("kl "))


@torch.no_grad()
def measured(vae: Any, model: Model, images: Images, num_samples: int, scored: int) -> tuple[dict, dict[str, Tensor]]:
    """Returns the numbers of a trained model, and its samples as means and as draws."""
    pyro.set_rng_seed(1)
    number: dict[str, Any] = {}
    if model.volume is not None:
        grey = images.test[:scored]
        seen = grey if model.sees is None else model.sees(grey)[0]
        found = pyrovae.log_marginal(vae.model, vae.guide, seen, num_samples=num_samples, progress=False)
        value = found.value.double() + grey[0].numel() * math.log(model.volume)
        number |= {"log_p": [round(v, 2) for v in value.tolist()], "trusted": int(found.trusted.sum())}
    p = vae.decode_from_prior(len(images.test))
    samples = {"draws": p.sample()}
    if not isinstance(vae.likelihood, likelihoods.PixelCNN):  # whose means are of single pixels
        samples["means"] = p.mean
    if model.sees is dequantize:  # back from (k + 1/2) / 256 to k / 255
        samples = {kind: (LEVELS * x - 0.5) / (LEVELS - 1) for kind, x in samples.items()}
    for kind, x in samples.items():
        real, generated = images.features(images.test), images.features(x)
        precision, recall = precision_recall(real, generated)
        power = spectrum(x)[1]
        number[kind] = {
            "precision": precision,
            "recall": recall,
            "frechet": frechet_distance(real, generated),
            "spectrum": power,
        }
    return number, {kind: x[:SHOWN] for kind, x in samples.items()}


def data_numbers(images: Images) -> dict[str, Any]:
    """Returns the numbers of as many training images in place of samples: what a perfect model would have."""
    other = images.train[: len(images.test)]
    real, generated = images.features(images.test), images.features(other)
    frequency, power = spectrum(images.test)
    return {
        "features": images.about,
        "train": len(images.train),
        "test": len(images.test),
        "frequency": frequency,
        "spectrum": power,
        "floor": [*precision_recall(real, generated), frechet_distance(real, generated)],
    }


def draw_samples(samples: dict[str, dict[str, Tensor]], test: Tensor) -> Figure:
    """Draws a row of images for the data and for the means and draws of each model."""
    rows = [("data", test[:SHOWN])]
    rows += [
        (f"{name}\n{kind}", x) for name, kinds in samples.items() for kind, x in sorted(kinds.items(), reverse=True)
    ]
    line = 5.4 * test.shape[-2] / (SHOWN * test.shape[-1]) + 0.07  # of images that are 5.4 inches wide together
    figure = Figure(figsize=(7, line * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for ax, (title, x) in zip(axes, rows, strict=True):
        ax.imshow(torch.cat(list(x[:, 0].clamp(0, 1)), dim=-1).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        ax.set(xticks=[], yticks=[])
    return figure


def draw_spectra(records: dict[str, Any]) -> Figure:
    """Draws the power of samples over that of data by frequency: means on the left, draws on the right."""
    figure = Figure(figsize=(9, 3.2 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), 2, sharex=True, sharey=True, squeeze=False)
    for (title, record), row in zip(records.items(), axes, strict=True):
        own = np.array(record["data"]["spectrum"])
        for kind, ax in zip(("means", "draws"), row, strict=True):
            for name, colour in zip(MODELS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
                if kind in record["models"].get(name, {}):
                    ratio = np.array(record["models"][name][kind]["spectrum"]) / own
                    ax.plot(record["data"]["frequency"], ratio, color=colour, label=name)
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set(title=f"{title}: {kind} of p(x | z)", yscale="log", xlabel="cycles a pixel")
        row[0].set_ylabel("power / power of data")
        row[1].legend(fontsize=7)
    return figure


def table(record: dict[str, Any]) -> str:
    """Returns the table of a data set."""
    fine = [k for k, f in enumerate(record["data"]["frequency"]) if f >= 0.25]
    own = sum(record["data"]["spectrum"][k] for k in fine)

    def cells(number: dict[str, Any], kind: str) -> list[str]:
        if kind not in number:
            return ["", ""]
        found = number[kind]
        detail = sum(found["spectrum"][k] for k in fine) / own
        return [f"{detail:.0%}", f"{found['precision']:.2f} / {found['recall']:.2f}"]

    rows = []
    for name, number in ((name, record["models"][name]) for name in MODELS if name in record["models"]):
        score = "of other data"
        more = ""
        if "log_p" in number:
            values = torch.tensor(number["log_p"]).double()
            score = f"{values.mean():,.0f} ({number['trusted']} of {len(values)})"
            apart = values - torch.tensor(record["models"][COMPARED]["log_p"]).double()
            more = f"{apart.mean():+,.0f} ± {apart.std() / math.sqrt(len(apart)):.0f}" if name != COMPARED else ""
        rows.append([name, score, more, f"{number['kl']:.1f}", *cells(number, "means"), *cells(number, "draws")])
    precision, recall, _ = record["data"]["floor"]
    rows.append(["training images", "", "", "", "", "", "", f"{precision:.2f} / {recall:.2f}"])
    header = ["", "log p(x), nats (trusted)", f"less {COMPARED}", "KL, nats"]
    for kind in ("means", "draws"):
        header += [f"detail of {kind}", f"precision / recall of {kind}"]
    return report.table(header, rows)


def page(records: dict[str, Any], text: str) -> str:
    """Returns the page with the tables of the records."""
    for name, record in records.items():
        text = report.put(name, table(record), text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, help="the folder of Fashion-MNIST")
    parser.add_argument("--frey", type=Path, help="the file of Frey's faces")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--runs", type=Path, default=Path("runs/blur"), help="checkpoints and samples")
    parser.add_argument("--train", type=int, default=5000, help="training images at most")
    parser.add_argument("--test", type=int, default=400, help="test images, and samples")
    parser.add_argument("--num-samples", type=int, default=100, help="importance samples an image")
    parser.add_argument("--scored", type=int, default=100, help="test images whose log p(x) is estimated")
    parser.add_argument("--epochs", type=int, help="in place of those of the record")
    parser.add_argument("--page", action="store_true", help="write tables and spectra of the records, and no more")
    args = parser.parse_args(argv)
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for title, load, place in (("fashion-mnist", fashion_mnist, args.fashion_mnist), ("frey", frey, args.frey)):
        if place is None or args.page:
            continue
        images = load(place, args.train, args.test)
        record = records.setdefault(title, {"machine": report.machine(packages=("torch", "pyro-ppl")), "models": {}})
        record["data"] = data_numbers(images)
        samples = {}
        for name in args.models:
            directory = args.runs / title / name.replace(" ", "-").replace(",", "")
            if name not in record["models"] or not (directory / "samples.pt").exists():
                epochs = args.epochs or EPOCHS[title]
                vae, kl = trained(name, images, epochs, directory)
                number, drawn = measured(vae, MODELS[name], images, args.num_samples, args.scored)
                record["models"][name] = {"epochs": epochs, "kl": kl} | number
                torch.save(drawn, directory / "samples.pt")
                RECORD.write_text(json.dumps(records, indent=1) + "\n")
                print(title, name, flush=True)
            samples[name] = torch.load(directory / "samples.pt")
        draw_samples(samples, images.test).savefig(PICTURES / f"blur-{title}.png", dpi=90, bbox_inches="tight")
    draw_spectra(records).savefig(PICTURES / "blur-spectra.svg")
    PAGE.write_text(page(records, PAGE.read_text()))


if __name__ == "__main__":
    main()
