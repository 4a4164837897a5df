"""Importance-weighted training: the ELBO, the IWAE, and the IWAE with doubly reparameterised gradients.

    python examples/iwae.py

A bound is an object that `fit` takes as its loss. Data, parts, seed and budget are the same for all three; each is
stopped by its own bound on validation data, and all are scored in the same way. With the importance-weighted bound
(https://arxiv.org/abs/1509.00519) one good particle among many is enough: the model becomes better and uses more of its
latents, while the ELBO of its encoder becomes lower. With many particles the plain gradient of the encoder has a low
signal-to-noise ratio (https://arxiv.org/abs/1802.04537); the doubly reparameterised gradient (DReG,
https://arxiv.org/abs/1810.04152) does not.
"""

import argparse
import math
from functools import partial

import pyro
import torch

import pyrovae
from pyrovae import bounds, data, encoders, likelihoods, nn, priors

LATENT_DIM, X_SHAPE = 20, (1, 8, 8)
MLP = partial(nn.MLP, hidden=(100, 100))


@torch.no_grad()
def active_units(vae, x, threshold=0.01):
    """Counts the latent dimensions whose posterior mean has a variance over the data above a threshold."""
    return int((vae.encode(x).mean.var(0) > threshold).sum())


def main(args):
    train, validation, test = data.load("digits")
    x_validation, x_test = data.static_binarization(validation.x), data.static_binarization(test.x)
    k = args.num_particles
    losses = {
        "ELBO": bounds.ELBO(),
        f"IWAE, {k} particles": bounds.IWAE(k),
        f"IWAE, {k} particles, DReG": bounds.IWAE(k, gradient=bounds.DoublyReparameterized()),
    }
    estimates, lines = [], []
    for name, loss in losses.items():
        pyro.set_rng_seed(args.seed)  # the same initial weights
        vae = pyrovae.VAE(
            prior=priors.StandardNormal(LATENT_DIM),
            likelihood=likelihoods.Bernoulli(LATENT_DIM, X_SHAPE, MLP),
            encoder=encoders.DiagonalNormal(X_SHAPE, LATENT_DIM, MLP),
        )
        history = pyrovae.fit(
            vae.model,
            vae.guide,
            train.x,
            loss=loss,
            transform=data.dynamic_binarization,
            validation=x_validation,
            patience=args.patience,
            epochs=args.epochs,
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            progress=False,
        )
        estimate = pyrovae.log_marginal(vae.model, vae.guide, x_test, num_samples=args.num_samples, progress=False)
        print(f"{name}, epoch {history.best_epoch} of {len(history)}:\ntest {estimate}\n", flush=True)
        estimates.append(estimate)

        with torch.no_grad():  # the ELBO of this model; its terms are sums over the data
            terms = bounds.ELBO(num_particles=100).terms(vae.model, vae.guide, x_test)
        # All are scored on the same images: their differences are more accurate than their means.
        gain = estimate.value - estimates[0].value
        error = gain.std() / math.sqrt(len(gain))
        lines.append(
            f"{name:26}{estimate.value.mean():9.2f}{gain.mean():11.2f} ± {error:.2f}{terms.bound / len(x_test):10.2f}"
            f"{terms.kl['z'] / len(x_test):7.2f}{active_units(vae, x_test):9}{int((~(estimate.khat <= 0.7)).sum()):14}"
        )
    print(f"{'loss':26} log p(x)  over the ELBO      ELBO     KL   active   k-hat > 0.7")
    print("\n".join(lines))
    print(f"nats a datum; active: of {LATENT_DIM} latent dimensions; k-hat: of {len(x_test)} data, with unknown ones")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-particles", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--patience", type=int, default=30, help="epochs without a better validation bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=5000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.num_particles, args.epochs, args.num_samples = 5, 2, 25
    main(args)
