"""Repair: the hidden lower half of images, drawn given the upper half, beside nearest neighbours and a PCA.

    python examples/repair.py
    python examples/repair.py --data fashion-mnist --data-root data
    python examples/repair.py --data freyfaces.npz --shape 28 20

The first line takes the embedded digits. The Frey faces are a file with an array of bytes, (1965, 560). The VAE learns
from whole images and from upper halves. Then it scores whole images and upper halves, and the difference is

    log p(hidden | seen) = log p(hidden, seen) - log p(seen),

here in nats an image, of the levels of the pixels. The neighbours are a kernel density of the training images: those
whose upper halves are near say what the lower half is. The PCA is probabilistic: a normal distribution of few
dimensions, with noise. Both are densities, times the width of a level; their settings have the best log p(hidden |
seen) of validation images. The error is that of the mean of the lower half given the upper one.
"""

import argparse
import itertools
import json
import math
from functools import partial
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from torch.distributions import LowRankMultivariateNormal

import pyrovae
from pyrovae import bounds, data, encoders, likelihoods, nn, priors
from pyrovae.structures import MissingDataVAE

RECORDS = Path(__file__).with_suffix(".json")


def load(args):
    """Returns training, validation and test images with values from 0 to 1."""
    splits = data.load(args.data, args.data_root)
    parts = [torch.as_tensor(part.x[:]).float() for part in splits]
    if args.shape:
        parts = [x.reshape(-1, 1, *args.shape) / 255 for x in parts]
    return parts[0], parts[1][: args.num_test], parts[2][: args.num_test]


class Halves:
    """Hides the lower half of a random half of the images of a batch."""

    def __init__(self, height):
        self.height = height

    def seen(self, x):
        return (torch.arange(self.height).unsqueeze(1) < self.height // 2).expand(x.shape)

    def __call__(self, x, mask):
        whole = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return x, self.seen(x) | whole


class Standardized(torch.nn.Module):
    """What the encoder takes: the seen pixels less their mean, in standard deviations, and where they are."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("scale", x.std(0).clamp_min(0.05))

    def forward(self, x, mask):
        return torch.stack([mask * (x - self.mean) / self.scale, mask.to(x.dtype)], dim=1)


def train(x, validation, levels, args):
    shape, halves = tuple(x.shape[1:]), Halves(x.shape[-2])
    network = partial(nn.GatedMLP, hidden=(args.hidden, args.hidden))
    vae = MissingDataVAE(
        priors.GaussianMixture(args.latent_dim, num_components=20),
        likelihoods.DiscretizedLogistic(args.latent_dim, shape, network=network, levels=levels).start_at(x),
        encoders.DiagonalNormal((2, *shape), args.latent_dim, network=network),
        features=Standardized(x),
    )
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        (x, torch.ones_like(x, dtype=torch.bool)),
        validation=(validation, torch.ones_like(validation, dtype=torch.bool)),
        transform=halves,  # also for validation images
        loss=bounds.ELBO(beta=bounds.Linear(args.warm_up)),  # without it the latents are not used
        epochs=args.epochs,
        patience=15,
        batch_size=64,
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.epochs),
        optimizer=partial(torch.optim.Adam, lr=args.learning_rate),
        progress=not args.smoke,
    )
    print(history)
    return vae, halves


class PCA:
    """A probabilistic PCA: x = mean + W z + noise, with z of as many dimensions as the seen pixels are best for."""

    def __init__(self, x, seen, hidden):
        self.mean = x.mean(0)
        variance, axes = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        self.variance, self.axes = variance.flip(0), axes.flip(1)
        sizes = [size for size in (5, 10, 20, 40, 80, 160) if size < x.shape[1]]
        self.size = max(sizes, key=lambda size: self.given(seen, size).log_prob(hidden).mean())

    def given(self, seen, size=None):
        """Returns the normal distribution of the hidden pixels, those after the seen ones."""
        d, size = seen.shape[1], size or self.size
        noise = self.variance[size:].mean()
        w = self.axes[:, :size] * (self.variance[:size] - noise).sqrt()
        covariance = torch.linalg.inv(torch.eye(size) + w[:d].T @ w[:d] / noise)
        z = (seen - self.mean[:d]) @ w[:d] @ covariance / noise
        factor = w[d:] @ torch.linalg.cholesky(covariance)
        return LowRankMultivariateNormal(self.mean[d:] + z @ w[d:].T, factor, noise.expand(len(factor)))


class Neighbours:
    """A kernel density: training images weigh exp(-distance of the seen pixels / 2 near^2); each says a normal one."""

    def __init__(self, x, seen, hidden):
        self.x, self.d = x, seen.shape[1]
        squares, errors = self.distances(seen, hidden)
        widths = itertools.product((0.1, 0.2, 0.4, 0.8, 1.6), (0.05, 0.1, 0.15, 0.2, 0.3))
        self.widths = max(widths, key=lambda widths: self.log_prob(squares, errors, *widths).mean())

    def distances(self, seen, hidden):
        """Returns the squared distances of both parts to those of each training image."""
        return torch.cdist(seen, self.x[:, : self.d]).square(), torch.cdist(hidden, self.x[:, self.d :]).square()

    def log_prob(self, squares, errors, near, noise):
        log_w = (-squares / (2 * near**2)).log_softmax(1)
        constant = (self.x.shape[1] - self.d) * math.log(noise * math.sqrt(2 * math.pi))
        return (log_w - errors / (2 * noise**2)).logsumexp(1) - constant

    def given(self, seen, hidden):
        """Returns log p(hidden | seen), the mean of the hidden pixels, and the hidden part of the nearest image."""
        squares, errors = self.distances(seen, hidden)
        weights = (-squares / (2 * self.widths[0] ** 2)).softmax(1)
        parts = self.x[:, self.d :]
        return self.log_prob(squares, errors, *self.widths), weights @ parts, parts[squares.argmin(1)]


def main(args):
    pyro.set_rng_seed(args.seed)
    x, validation, test = load(args)
    levels = 17 if args.data == "digits" else 256
    vae, halves = train(x, validation, levels, args)

    mask, whole = halves.seen(test), torch.ones_like(test, dtype=torch.bool)
    score = partial(pyrovae.log_marginal, vae.model, vae.guide, num_samples=args.num_samples, progress=False)
    of_all, of_seen = score(test, whole), score(test, mask)
    print(f"whole images: test {of_all}")
    print(f"upper halves: {of_seen}")
    imputed = vae.impute(test, mask, num_samples=args.num_samples, num_draws=3)

    d = int(mask[0].sum())
    flat = [part.flatten(1).double() for part in (x, validation, test)]
    _, chosen, (seen, hidden) = (part.split((d, part.shape[1] - d), dim=1) for part in flat)
    level = -hidden.shape[1] * math.log(levels - 1)  # of densities to probabilities of levels
    torch.set_default_dtype(torch.float64)
    pca = PCA(flat[0], *chosen).given(seen)
    value, mean, nearest = Neighbours(flat[0], *chosen).given(seen, hidden)
    torch.set_default_dtype(torch.float32)

    found = {
        "VAE": (of_all.value - of_seen.value, imputed.mean.flatten(1)[:, d:]),
        "neighbours": (value + level, mean),
        "nearest image": (None, nearest),
        "PCA": (pca.log_prob(hidden) + level, pca.mean),
        "mean image": (None, flat[0].mean(0)[d:].expand_as(hidden)),
    }
    print(f"\n{len(test)} test images; {hidden.shape[1]} of {flat[0].shape[1]} pixels are hidden")
    print(f"{'':16}{'log p(hidden | seen)':>22}{'VAE minus this':>20}{'RMSE':>18}")
    record = {}
    for name, (log_p, middle) in found.items():
        square = (middle - hidden).square().mean(1)
        root = square.mean().sqrt().item()
        entry = {"rmse": [root, square.std().item() / (2 * root * math.sqrt(len(square)))]}
        cells = ["", ""]
        if log_p is not None:
            gap = found["VAE"][0] - log_p
            entry |= {
                key: [v.mean().item(), v.std().item() / len(v) ** 0.5] for key, v in (("nats", log_p), ("gap", gap))
            }
            cells = ["{:.1f} ± {:.1f}".format(*entry["nats"]), "{:.1f} ± {:.1f}".format(*entry["gap"])]
        cells[1] = "" if name == "VAE" else cells[1]
        print(f"{name:16}{cells[0]:>22}{cells[1]:>20}" + "{:>11.4f} ± {:.4f}".format(*entry["rmse"]))
        record[name] = entry
    rows = {"original": test, "seen": torch.where(mask, test, 0.5)}
    rows |= {f"VAE, draw {k + 1}": drawn for k, drawn in enumerate(imputed.draws)}
    rows |= {name: torch.cat([seen, middle], dim=1).view(test.shape) for name, (_, middle) in found.items()}
    draw({name: row[: args.num_shown] for name, row in rows.items()}, args.output)
    if args.record:
        records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
        records[Path(args.data).stem] = record
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def draw(rows, path):
    height = next(iter(rows.values())).shape[-2]
    picture = torch.cat([torch.cat(list(row[:, 0]), dim=1) for row in rows.values()]).clamp(0, 1)
    figure = Figure(figsize=(7, 7 * picture.shape[0] / picture.shape[1]), layout="constrained")
    ax = figure.subplots()
    ax.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(yticks=[height * (i + 0.5) for i in range(len(rows))], yticklabels=list(rows), xticks=[])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, or a file of images")
    parser.add_argument("--data-root", default="data", help="folder of the data sets")
    parser.add_argument("--shape", type=int, nargs=2, help="height and width of the images of a file of rows of bytes")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warm-up", type=int, default=500, help="steps until the KL divergence counts in full")
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=300, help="units of each of two hidden layers")
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples an image")
    parser.add_argument("--num-test", type=int, default=500, help="test images, and validation images, at most")
    parser.add_argument("--num-shown", type=int, default=12, help="images in the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("repair.png"), help="file of the picture")
    parser.add_argument("--record", action="store_true", help="write the result beside this file")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.latent_dim, args.hidden, args.num_samples, args.num_test, args.warm_up = 2, 4, 32, 50, 50, 10
    main(args)
