"""Collapsed levels: a VAE of three levels on binarised MNIST, whose upper levels hold nothing, and cures.

All rows have the same layers, see the same batches, and take the same steps. Each is trained, and then asked how many
nats each level holds, how many of its units are active, and for log p(x), trusted. The numbers go into
`benchmarks/collapse.json`, and the table of `docs/collapse.md` is made from them. A row that has a record is not run
again, and a training that was stopped goes on.

    python benchmarks/collapse.py --data-root data      # all rows, or those named
    python benchmarks/collapse.py --page                # the table alone
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import report
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor, nn

import pyrovae
from pyrovae import bounds, data, encoders, estimators, likelihoods, priors
from pyrovae.diagnostics import collapse
from pyrovae.nn import MLP
from pyrovae.structures import DenseHierarchicalVAE, HierarchicalVAE, LadderVAE

RECORD = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parent.parent / "docs" / "collapse.md"
PICTURE = PAGE.parent / "guide" / "pictures" / "collapse.png"
IMAGE = (1, 28, 28)
LEVELS = (32, 16, 8)  # dimensions, from the data up
WARM_UP = bounds.Linear(epochs=10)
wide, narrow = partial(MLP, hidden=(200, 200)), partial(MLP, hidden=(100,))
normal = encoders.DiagonalNormal


def _upwards() -> dict[str, Any]:
    """Returns the parts of a model whose levels see the next one above."""
    first, second, third = LEVELS
    return {
        "prior": priors.StandardNormal(third),
        "conditionals": [normal(second, first, narrow), normal(third, second, narrow)],
        "likelihood": likelihoods.Bernoulli(first, IMAGE, wide),
    }


def hierarchical() -> nn.Module:
    first, second, third = LEVELS
    parts = [normal(IMAGE, first, wide), normal(first, second, narrow), normal(second, third, narrow)]
    return HierarchicalVAE(**_upwards(), encoders=parts)


def ladder() -> nn.Module:
    first, second, third = LEVELS
    networks = [wide(IMAGE, 200), narrow(200, 100), narrow(100, 100)]
    parts = [normal(200, first, narrow), normal(100, second, narrow), normal(100, third, narrow)]
    return LadderVAE(**_upwards(), networks=networks, encoders=parts)


def dense() -> nn.Module:
    first, second, third = LEVELS
    return DenseHierarchicalVAE(
        prior=priors.StandardNormal(third),
        conditionals=[normal(second + third, first, narrow), normal(third, second, narrow)],
        likelihood=likelihoods.Bernoulli(first + second + third, IMAGE, wide),
        encoders=[
            normal(IMAGE, first, wide, context_dim=second + third),
            normal(IMAGE, second, wide, context_dim=third),
            normal(IMAGE, third, wide),
        ],
    )


class Row(NamedTuple):
    """A model and its loss."""

    build: Callable[[], nn.Module]
    loss: Callable[[], pyro.infer.ELBO] = bounds.ELBO


free_bits = partial(bounds.FreeBits, 2.0, group_size=None)
ROWS = {
    "no cure": Row(hierarchical),
    "warm-up": Row(hierarchical, partial(bounds.ELBO, beta=WARM_UP)),
    "free bits": Row(hierarchical, lambda: bounds.ELBO(penalty=free_bits())),
    "ladder": Row(ladder),
    "ladder, warm-up": Row(ladder, partial(bounds.ELBO, beta=WARM_UP)),
    "dense": Row(dense),
    "dense, warm-up": Row(dense, partial(bounds.ELBO, beta=WARM_UP)),
}


def trained(name: str, x: Tensor, epochs: int, directory: Path) -> Any:
    """Returns the model of a row, trained now as far as it was not before."""
    pyro.set_rng_seed(0)
    vae: Any = ROWS[name].build()
    vae.likelihood.start_at(x)
    directory.mkdir(parents=True, exist_ok=True)
    pyrovae.fit(
        vae.model,
        vae.guide,
        x,
        loss=ROWS[name].loss(),
        epochs=epochs,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        transform=data.dynamic_binarization,
        checkpoint=directory / "checkpoint.safetensors",
        resume=True,
        progress=False,
    )
    return vae.eval()


@torch.no_grad()
def measured(vae: Any, test: Tensor, scored: int, seconds: float) -> dict[str, Any]:
    """Returns the numbers of a trained model, and what is said of it."""
    pyro.set_rng_seed(1)
    found = collapse(vae.model, vae.guide, test[:1000], progress=False)
    method = estimators.UntilTrusted(seconds=seconds)
    estimate = pyrovae.log_marginal(vae.model, vae.guide, test[:scored], method=method, progress=False)
    value = estimate.value.double()
    elbo = -bounds.ELBO(num_particles=10).loss(vae.model, vae.guide, test) / len(test)
    return {
        "levels": {
            site: {"kl": found.kl_by_site[site].mean().item(), "active": int(found.active[columns].sum())}
            for site, columns in sorted(found.columns.items())
        },
        "information": found.mutual_information,
        "elbo": elbo,
        "log_p": value.mean().item(),
        "log_p_error": value.std().item() / math.sqrt(len(value)),
        "trusted": int(estimate.trusted.sum()),
        "scored": scored,
        "verdict": found.verdict,
    }


@torch.no_grad()
def drawn_below(vae: Any, tops: int = 3, below: int = 10) -> Tensor:
    """Returns means of images, ``(tops, below, 28, 28)``, that share the two upper levels in each row."""
    pyro.set_rng_seed(2)
    model = poutine.uncondition(vae.model)
    first = poutine.trace(model).get_trace(torch.zeros(tops, *IMAGE))
    kept = {name: first.nodes[name]["value"].repeat_interleave(below, 0) for name in ("z2", "z3")}
    model = poutine.condition(model, data=kept)
    site = poutine.trace(model).get_trace(torch.zeros(tops * below, *IMAGE)).nodes["x"]
    return site["fn"].mean.view(tops, below, *IMAGE[1:])


def draw(drawn: dict[str, Tensor]) -> Figure:
    """Draws for each row images that share the two upper levels, a line for each draw of these."""
    figure = Figure(figsize=(8, 1.35 * math.ceil(len(drawn) / 2)), layout="constrained")
    axes = figure.subplots(math.ceil(len(drawn) / 2), 2, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, images) in zip(axes, drawn.items(), strict=False):
        ax.imshow(images.transpose(1, 2).flatten(0, 1).flatten(1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(name, fontsize=9)
    return figure


def table(records: dict[str, Any]) -> str:
    rows = []
    for name, number in ((name, records[name]) for name in ROWS if name in records):
        levels = [f"{level['kl']:.2f} ({level['active']})" for level in number["levels"].values()]
        score = f"{number['log_p']:.2f} ± {number['log_p_error']:.2f} ({number['trusted']} of {number['scored']})"
        rows.append([name, *levels, f"{number['information']:.2f}", f"{number['elbo']:.2f}", score])
    header = ["", *(f"z{i} of {n}" for i, n in enumerate(LEVELS, 1)), "I(x; z)", "ELBO", "log p(x) (trusted)"]
    return report.table(header, rows)


def page(records: dict[str, Any], text: str) -> str:
    """Returns the page with the table of the records."""
    return report.put("table", table(records), text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="the folder of MNIST")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"), help="checkpoints")
    parser.add_argument("--train", type=int, default=10000, help="training images at most")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--scored", type=int, default=100, help="test images whose log p(x) is estimated")
    parser.add_argument("--seconds", type=float, default=30, help="budget of that, a row")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--page", action="store_true", help="write the table of the records, and no more")
    args = parser.parse_args(argv)
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not args.page:
        splits = data.load("mnist", args.data_root)
        x, test = splits.train.x[: args.train], data.static_binarization(splits.test.x[: args.test])
        drawn = {}
        for name in args.rows:
            directory = args.runs / name.replace(" ", "-").replace(",", "")
            vae = trained(name, x, args.epochs, directory)
            if name not in records:
                records[name] = {"epochs": args.epochs} | measured(vae, test, args.scored, args.seconds)
                RECORD.write_text(json.dumps(records, indent=1) + "\n")
                print(name, records[name], flush=True)
            drawn[name] = drawn_below(vae)
        draw(drawn).savefig(PICTURE, dpi=110)
    PAGE.write_text(page(records, PAGE.read_text()))


if __name__ == "__main__":
    main()
