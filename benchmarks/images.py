"""VAEs of MNIST and Fashion-MNIST that other benchmarks score: four kinds of model, trained the same way.

Two gated layers of 300 units, 40 latents a level, Bernoulli pixels that are binarised again for each batch, Adam with
a learning rate of 5e-4, batches of 100, as in Tomczak and Welling (2018, https://arxiv.org/abs/1705.07120); fewer
epochs. A run that was stopped goes on where it was.

    python benchmarks/images.py --data mnist --model two-level --data-root data
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

import pyrovae
from pyrovae import VAE, bounds, data, encoders, likelihoods, priors
from pyrovae.nn import GatedMLP
from pyrovae.structures import HierarchicalVAE

IMAGE, LATENT = (1, 28, 28), 40
EPOCHS = 80
DATA_SETS = ("mnist", "fashion-mnist")
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


# The model, built from the training images, and the loss.
MODELS: dict[str, tuple[Callable[[Tensor], nn.Module], pyro.infer.ELBO | None]] = {
    "vae": (_standard, None),
    "vamp": (_vamp, None),
    "iwae": (_standard, bounds.IWAE(5)),
    "two-level": (_two_level, None),
}


def trained(name: str, data_set: str, data_root: str, runs: Path = Path("runs/images")) -> tuple[nn.Module, Tensor]:
    """Returns a model, trained now if it was not before, and the test images, binarised once."""
    splits = data.load(data_set, data_root)
    make, loss = MODELS[name]
    pyro.set_rng_seed(0)
    vae = make(splits.train.x)
    directory = runs / f"{data_set}-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    pyrovae.fit(
        vae.model,
        vae.guide,
        splits.train.x,
        loss=loss,
        epochs=EPOCHS,
        batch_size=100,
        optimizer=partial(torch.optim.Adam, lr=5e-4, fused=True),
        transform=data.dynamic_binarization,
        validation=data.static_binarization(splits.validation.x, 1),
        checkpoint=directory / "checkpoint.safetensors",
        resume=True,
        compile=True,
    )
    return vae.eval(), data.static_binarization(splits.test.x, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", choices=DATA_SETS, required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data-root", default="data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained(args.model, args.data, args.data_root)
