"""VAEs of MNIST and Fashion-MNIST: five kinds of model, trained the same way, and how far the usual log p(x) is off.

Two gated layers of 300 units, 40 latents a level, Bernoulli pixels that are binarised again for each batch, Adam with
a learning rate of 5e-4, batches of 100, as in Tomczak and Welling (2018, https://arxiv.org/abs/1705.07120); fewer
epochs. A run that was stopped goes on where it was.

    python benchmarks/images.py --data mnist --model two-level --data-root data     # trains one
    python benchmarks/estimators.py --only mnist --data-root data                   # trains and scores all
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import report
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyrovae
from pyrovae import VAE, bounds, data, encoders, estimators, likelihoods, priors
from pyrovae.nn import GatedMLP
from pyrovae.structures import HierarchicalVAE

IMAGE, LATENT = (1, 28, 28), 40
EPOCHS = 80
DATA_SETS = ("mnist", "fashion-mnist")
RECORD, PICTURE = Path(__file__).with_name("images.json"), Path(__file__).with_name("images.png")
network = partial(GatedMLP, hidden=(300, 300))


def _standard(x: Tensor) -> VAE:
    encoder = encoders.DiagonalNormal(IMAGE, LATENT, network)
    return VAE(priors.StandardNormal(LATENT), likelihoods.Bernoulli(LATENT, IMAGE, network), encoder)


def _vamp(x: Tensor) -> VAE:
    encoder = encoders.DiagonalNormal(IMAGE, LATENT, network)
    prior = priors.VampPrior(encoder, num_components=500, data=x[:500])
    return VAE(prior, likelihoods.Bernoulli(LATENT, IMAGE, network), encoder)


def _two_level(x: Tensor) -> HierarchicalVAE:
    return HierarchicalVAE(
        priors.StandardNormal(LATENT),
        [encoders.DiagonalNormal(LATENT, LATENT, network)],
        likelihoods.Bernoulli(LATENT, IMAGE, network),
        [encoders.DiagonalNormal(IMAGE, LATENT, network), encoders.DiagonalNormal(LATENT, LATENT, network)],
    )


# The model, built from the training images, and options of fit.
MODELS: dict[str, tuple[Callable[[Tensor], nn.Module], dict[str, Any]]] = {
    "vae": (_standard, {}),
    "vae-bf16": (_standard, {"precision": "bf16"}),
    "vamp": (_vamp, {}),
    "iwae": (_standard, {"loss": bounds.IWAE(5)}),
    "two-level": (_two_level, {}),
}


def trained(name: str, data_set: str, data_root: str, runs: Path = Path("runs/images")) -> tuple[nn.Module, Tensor]:
    """Returns a model, trained now if it was not before, and the test images, binarised once."""
    splits = data.load(data_set, data_root)
    make, options = MODELS[name]
    pyro.set_rng_seed(0)
    vae = make(splits.train.x)
    directory = runs / f"{data_set}-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    pyrovae.fit(
        vae.model,
        vae.guide,
        splits.train.x,
        epochs=EPOCHS,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=5e-4, fused=True),
        transform=data.dynamic_binarization,
        validation=data.static_binarization(splits.validation.x, 1),
        checkpoint=directory / "checkpoint.safetensors",
        resume=True,
        compile=True,
        **options,
    )
    return vae.eval(), data.static_binarization(splits.test.x, 2)


class Scores(NamedTuple):
    """What the estimators say of the same test images under one model; differences are less `UntilTrusted`'s."""

    data: str
    model: str
    usual: float
    usual_stated: float
    usual_untrusted: int
    usual_seconds: float
    trusted: float
    trusted_stated: float
    trusted_untrusted: int
    trusted_seconds: float
    usual_difference: float
    usual_error: float
    long_difference: float
    long_error: float
    differences: list[float]


def scored(data_set: str, name: str, vae: Any, x: Tensor, num_checked: int) -> Scores:
    """Scores images by the usual protocol, by stages, and some of them by long annealing from the prior."""
    usual_seconds, usual = _timed(vae, x, estimators.ImportanceSampling(5000))
    seconds, found = _timed(vae, x, estimators.UntilTrusted())
    long = estimators.AnnealedImportanceSampling(100, 2000)
    check = pyrovae.log_marginal(vae.model, None, x[:num_checked], method=long)
    apart = (usual.value - found.value).double()
    off = (check.value - found.value[:num_checked]).double()
    errors = (check.standard_error.square() + found.standard_error[:num_checked].square()).double()
    return Scores(
        data_set,
        name,
        usual.value.mean().item(),
        _error_of_mean(usual),
        int((~usual.trusted).sum()),
        usual_seconds,
        found.value.mean().item(),
        _error_of_mean(found),
        int((~found.trusted).sum()),
        seconds,
        apart.mean().item(),
        apart.std().item() / math.sqrt(len(apart)),
        off.mean().item(),
        errors.sum().sqrt().item() / num_checked,
        apart.tolist(),
    )


def _timed(vae: Any, x: Tensor, method: estimators.Estimator) -> tuple[float, estimators.Estimate]:
    """Returns the CPU seconds of a datum, by all threads, and the estimate."""
    began = time.process_time()
    found = pyrovae.log_marginal(vae.model, vae.guide, x, method=method)
    return (time.process_time() - began) / len(x), found


def _error_of_mean(estimate: estimators.Estimate) -> float:
    return estimate.standard_error.double().square().sum().sqrt().item() / len(estimate.value)


def draw(scores: Sequence[Scores]) -> Figure:
    """Draws by how much the usual number is off for each image, one histogram a model."""
    columns = min(4, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(max(5, 2.6 * columns), 2.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    bins = torch.linspace(-3, 0.5, 36).tolist()
    for ax in axes[len(scores) :]:
        ax.set_axis_off()
    for ax, score in zip(axes, scores, strict=False):
        ax.hist([max(d, bins[0]) for d in score.differences], bins=bins, color="tab:blue")
        ax.axvline(0, color="black", linewidth=0.8)
        ax.axvline(score.usual_difference, color="tab:red", linewidth=1.2)
        ax.set_title(f"{score.data}, {score.model}: {score.usual_difference:+.2f}", fontsize=9)
    figure.supxlabel(
        "5,000 importance samples less trusted log p(x), nats\n(red: mean; left edge: and below)", fontsize=9
    )
    figure.supylabel("images")
    return figure


def trusted_scores(args: argparse.Namespace) -> str:
    """Returns the README's part on how far the usual number is off, after drawing its picture."""
    roots = {"mnist": args.data_root, "fashion-mnist": args.fashion_root or args.data_root}
    records = json.loads(RECORD.read_text()) if RECORD.exists() else []
    known = {(record["data"], record["model"]): Scores(**record) for record in records}
    for data_set in args.data_sets:
        for name in args.models:
            vae, x = trained(name, data_set, roots[data_set])
            pyro.set_rng_seed(0)
            known[data_set, name] = scored(data_set, name, vae, x[: args.test_images], args.checked)
            print(known[data_set, name]._replace(differences=[]), flush=True)
    scores = [known[key] for key in product(DATA_SETS, MODELS) if key in known]
    if not args.smoke:
        RECORD.write_text(json.dumps([score._asdict() for score in scores], indent=1) + "\n")
        draw(scores).savefig(PICTURE, dpi=120)
    rows = [
        [
            score.data,
            score.model,
            f"{score.usual:.2f} ± {score.usual_stated:.2f}",
            f"{score.usual_untrusted} of {len(score.differences)}",
            f"{score.trusted:.2f} ± {score.trusted_stated:.3f}",
            f"{score.trusted_untrusted} of {len(score.differences)}",
            f"{score.usual_difference:+.2f} ± {score.usual_error:.2f}",
            f"{score.long_difference:+.3f} ± {score.long_error:.3f}",
            f"{1000 * score.usual_seconds:.0f} / {1000 * score.trusted_seconds:.0f}",
        ]
        for score in scores
    ]
    header = ["data", "model", "usual", "not trusted", "UntilTrusted", "not trusted", "off by", "check", "ms / image"]
    return (
        "## Is the usual log p(x) right?\n\n"
        "`python benchmarks/estimators.py --only mnist`: models of MNIST and Fashion-MNIST (those that have been run), "
        f"two gated layers of 300 units, 40 latents a level, {EPOCHS} epochs; the first images of the "
        "test set, in the number that two columns say, binarised once. Usual: 5,000 importance samples of the guide, "
        "with the standard error of the mean that they state. "
        "`UntilTrusted()`: its default stages. Off by: the usual number less that of `UntilTrusted`, on the same "
        "images. Check: annealing from the prior with 100 chains and 2,000 temperatures, less `UntilTrusted`, on "
        f"{args.checked} of the images. Times are CPU milliseconds, usual and `UntilTrusted`.\n\n"
        f"{report.table(header, rows)}\n\n![histograms of the differences, one a model]({PICTURE.name})\n\n"
        f"{report.machine(packages=('torch', 'pyro-ppl'))}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", choices=DATA_SETS, required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data-root", default="data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained(args.model, args.data, args.data_root)
