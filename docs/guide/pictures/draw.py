"""Draws the pictures of the guide: python docs/guide/pictures/draw.py

Needs pyrovae and matplotlib. The VAE of the last picture is trained on scikit-learn's digits in a few seconds.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pyro
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch
from PIL import Image

from pyrovae import VAE, bounds, data, encoders, fit, likelihoods, priors

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9822b", "#3a9a5b", "#666666"


def canvas(width, height):
    """Returns a figure and axes whose units are inches, without a frame."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def node(axes, x, y, label, observed=False):
    axes.add_patch(Circle((x, y), 0.33, facecolor="#d5d5d5" if observed else "white", edgecolor="black", zorder=2))
    axes.text(x, y, label, ha="center", va="center", fontsize=15, zorder=3)


def arrow(axes, start, end, color="black", **kwargs):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, **kwargs))


def box(axes, x, y, width, height, text, color="black", fill="white", fontsize=11):
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=color, linewidth=1.4))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def save(figure, name):
    # Without the date and with fixed ids, so that the same picture is the same file.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def plates():
    """The graph of the model and of the guide."""
    figure, axes = canvas(7.6, 3.6)
    for left, title in ((0.3, "model: $p(z)\\,p(x \\mid z)$"), (4.1, "guide: $q(z \\mid x)$")):
        axes.text(left + 1.6, 3.35, title, ha="center", va="center", fontsize=13)
        axes.add_patch(
            FancyBboxPatch((left, 0.25), 3.2, 2.8, "round,pad=0,rounding_size=0.1", facecolor="none", edgecolor=GREY)
        )
        axes.text(left + 3.1, 0.38, "plate “data”, N", ha="right", va="bottom", fontsize=10, color=GREY)
        node(axes, left + 0.8, 2.4, "$z$")
        node(axes, left + 0.8, 1.1, "$x$", observed=True)
    arrow(axes, (1.1, 2.06), (1.1, 1.44))
    axes.text(1.6, 2.4, "prior", va="center", fontsize=11, color=BLUE)
    axes.text(1.25, 1.75, "likelihood\n(decoder)", va="center", fontsize=11, color=GREEN)
    arrow(axes, (4.9, 1.44), (4.9, 2.06), linestyle="--")
    axes.text(5.05, 1.75, "encoder", va="center", fontsize=11, color=ORANGE)
    save(figure, "plates")


def parts():
    """Three parts make a pair, and everything else takes pairs."""
    figure, axes = canvas(7.6, 3.9)
    axes.add_patch(
        FancyBboxPatch((0.1, 0.1), 3.85, 3.65, "round,pad=0,rounding_size=0.1", facecolor="none", edgecolor=GREY)
    )
    axes.text(3.8, 3.58, "VAE", ha="right", va="top", fontsize=12, color=GREY)
    for y, text, color in (
        (2.8, "prior\n$p(z)$", BLUE),
        (1.55, "likelihood\n$p(x \\mid z)$", GREEN),
        (0.3, "encoder\n$q(z \\mid x)$", ORANGE),
    ):
        box(axes, 0.25, y, 1.5, 0.8, text, color)
    box(axes, 2.6, 2.15, 1.2, 0.8, "model", "black", "#f3f3f3", 12)
    box(axes, 2.6, 0.65, 1.2, 0.8, "guide", "black", "#f3f3f3", 12)
    arrow(axes, (1.77, 3.15), (2.58, 2.68))
    arrow(axes, (1.77, 2.05), (2.58, 2.42))
    arrow(axes, (1.77, 0.75), (2.58, 0.98))
    axes.text(3.2, 0.42, "or your own pair", ha="center", va="center", fontsize=10, color=GREY)
    lines = (
        ("fit", "trains by any bound"),
        ("log_marginal", "estimates log p(x)"),
        ("diagnostics", "say what it learned"),
        ("SVI, NUTS, Predictive", "Pyro's own tools"),
    )
    axes.plot([4.2, 4.2], [0.5, 3.35], color=GREY, linewidth=1.4)
    axes.plot([3.82, 4.2], [2.55, 2.55], color=GREY, linewidth=1.4)
    axes.plot([3.82, 4.2], [1.05, 1.05], color=GREY, linewidth=1.4)
    for i, (name, text) in enumerate(lines):
        y = 3.0 - 0.95 * i
        box(axes, 5.0, y, 2.45, 0.7, f"{name}\n{text}", GREY, fontsize=10)
        arrow(axes, (4.2, y + 0.35), (4.98, y + 0.35), color=GREY, shrinkA=0)
    save(figure, "parts")


def elbo():
    """log p(x) as the ELBO and a gap, the ELBO as reconstruction less KL, and what IWAE and importance sampling do."""
    figure, axes = canvas(7.6, 3.4)
    zero, evidence = 0.9, 6.9  # log p(x) = 6.9 on this axis
    bars = (
        (2.5, 4.9, "ELBO", BLUE),
        (1.6, 6.1, "IWAE, 8 particles", GREEN),
        (0.7, 6.75, "importance sampling, 5,000 samples", ORANGE),
    )
    for y, end, label, color in bars:
        axes.barh(y, end - zero, left=zero, height=0.5, color=color, alpha=0.75)
        axes.text(zero + 0.12, y, label, va="center", fontsize=11, color="white")
    axes.plot([evidence, evidence], [0.3, 3.0], color="black", linewidth=1.5)
    axes.text(evidence, 3.17, "$\\log p(x)$", ha="center", va="center", fontsize=13)
    arrow(axes, (4.9, 2.5), (evidence, 2.5), shrinkA=0, shrinkB=0)
    axes.text(5.9, 2.64, "$\\mathrm{KL}(q(z \\mid x)\\,\\|\\,p(z \\mid x))$", ha="center", va="bottom", fontsize=10)
    arrow(axes, (zero, 0.15), (7.5, 0.15), shrinkA=0, shrinkB=0, color=GREY)
    axes.text(7.45, 0.27, "nats", ha="right", va="bottom", fontsize=10, color=GREY)
    save(figure, "elbo")


def from_z_to_x():
    """Draws a VAE of digits with two latents: the data in latent space, a posterior, and what each place decodes to."""
    pyro.set_rng_seed(0)
    train, _, test = data.load("digits")
    vae = VAE(
        priors.StandardNormal(2), likelihoods.Normal(2, (1, 8, 8), scale=0.3), encoders.DiagonalNormal((1, 8, 8), 2)
    )
    fit(vae.model, vae.guide, train.x, loss=bounds.ELBO(), epochs=150, progress=False)
    with torch.no_grad():
        q = vae.encode(test.x)
        loc, scale = q.base_dist.loc, q.base_dist.scale
        steps = torch.linspace(-2.25, 2.25, 10)
        grid = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), dim=-1)
        images = vae.decode(grid).mean.squeeze(-3)
        one = int((test.labels == 3).nonzero()[4])
        draws = vae.decode(q.sample((4,))[:, one]).mean.squeeze(-3)

    figure = plt.figure(figsize=(9.4, 4.2))
    left = figure.add_axes((0.06, 0.12, 0.36, 0.78))
    points = left.scatter(loc[:, 0], loc[:, 1], c=test.labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=9)
    left.add_patch(Ellipse(loc[one], *(4 * scale[one]), facecolor="none", edgecolor="black", linewidth=1.5, zorder=3))
    left.set(xlim=(-3, 3), ylim=(-3, 3), title="means of $q(z \\mid x)$, test digits", xlabel="$z_1$", ylabel="$z_2$")
    figure.colorbar(points, cax=figure.add_axes((0.43, 0.12, 0.012, 0.78)), ticks=range(10))
    right = figure.add_axes((0.51, 0.12, 0.349, 0.78))
    tiles = torch.nn.functional.pad(images, (2, 2, 2, 2))
    picture = tiles.permute(0, 2, 1, 3).reshape(len(steps) * 12, len(steps) * 12)
    edge = 2.25 * len(steps) / (len(steps) - 1)
    right.imshow(picture, cmap="gray_r", vmin=0, vmax=1, extent=(-edge, edge, -edge, edge), interpolation="nearest")
    right.set(title="mean of $p(x \\mid z)$ at each place", xlabel="$z_1$")
    for i, image in enumerate([test.x[one, 0], *draws]):
        axes = figure.add_axes((0.9, 0.75 - 0.16 * i - 0.05 * (i > 0), 0.07, 0.14))
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set_axis_off()
        if i < 2:
            axes.set_title("$x$" if i == 0 else "$p(x \\mid z)$", fontsize=10, pad=3)
    figure.savefig(HERE / "from-z-to-x.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def faces():
    """The first rows of the picture of repaired faces, which examples/repair.py draws."""
    image = plt.imread(HERE / "repair.png")
    rows = (image.reshape(len(image), -1) < 1).any(1).nonzero()[0]
    height = (rows[-1] + 1 - rows[0]) // 10  # of ten rows of faces
    Image.fromarray((255 * image[rows[0] : rows[0] + 5 * height]).astype("uint8")).save(HERE / "faces.png")


if __name__ == "__main__":
    for picture in (plates, parts, elbo, from_z_to_x, faces):
        picture()
