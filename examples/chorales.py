"""Bach's chorales by models of sequences: nats a step by the ELBO and by a particle filter, and a continuation.

    python examples/chorales.py --data jsb-chorales-quarter.json --lr 3e-3 --one-cycle --weight-decay 3e-3 \\
        --epochs 1200 --warm-up 9000 --patience 0
    python examples/chorales.py --data jsb-chorales-quarter.json --model recurrent --patience 30
    python examples/chorales.py --data jsb-chorales-quarter.json --model chords --latent-dim 32 --transpose 5 \\
        --lr 2e-3 --weight-decay 1e-5

The file holds the chorales as MIDI notes at each quarter note, split into training, validation and test sets (229, 76
and 77, the split of Boulanger-Lewandowski et al. 2012, https://arxiv.org/abs/1206.6392). A step is the 88 keys of a
piano, on or off. The deep Markov model is that of Krishnan et al. (https://arxiv.org/abs/1609.09869): a Markov chain of
latent states, and keys that are independent given the state. The recurrent VAE is that of Chung et al.
(https://arxiv.org/abs/1506.02216): all that it does depends on a memory of the chords so far. Model "chords" is the
same with keys that depend on the keys below them in the chord, as those of Boulanger-Lewandowski et al. do.
With --transpose, training songs are moved up or down by up to so many semitones, at random in each batch; the scores
are of the songs as they are. The ELBO may be far below log p(x) of a sequence of a hundred steps: a particle filter
says how far, with an error. Without a file the chords are simulated.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pyro
import torch
from torch.optim.lr_scheduler import OneCycleLR

import pyrovae
from pyrovae import bounds, encoders, estimators, likelihoods, nn, priors
from pyrovae.structures import BackwardGRU, ForwardGRU, RecurrentVAE, StateSpaceVAE

KEYS, LOWEST = 88, 21
RECORDS = Path(__file__).with_suffix(".json")
NO_SETTINGS = ("data", "model", "checkpoint", "record", "smoke")


def read(path):
    """Returns (x, mask) of the training, validation and test sets: padded sequences and their steps."""
    songs = json.loads(Path(path).read_text(encoding="utf-8"))
    return [padded(songs[part]) for part in ("train", "valid", "test")]


def padded(songs):
    x = torch.zeros(len(songs), max(map(len, songs)), KEYS)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    for i, song in enumerate(songs):
        mask[i, : len(song)] = True
        for t, notes in enumerate(song):
            x[i, t, [int(note) - LOWEST for note in notes]] = 1.0
    return x, mask


def simulated(count, steps=12):
    """Returns triads whose roots walk along the circle of fifths."""
    roots = 60 + (7 * torch.randint(-1, 2, (count, steps)).cumsum(1)) % 12
    return padded([[[int(n), int(n) + 4, int(n) + 7] for n in row] for row in roots])


def chord(row):
    """Returns the names of the keys of a step, such as "C4 E4 G4"."""
    names = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
    notes = [int(key) + LOWEST for key in row.nonzero()]
    return " ".join(f"{names[note % 12]}{note // 12 - 1}" for note in notes) or "rest"


def deep_markov(latent_dim, width):
    small = partial(nn.MLP, hidden=(width,))
    return StateSpaceVAE(
        priors.DiagonalNormal(latent_dim),
        encoders.DiagonalNormal(latent_dim, latent_dim, partial(nn.GatedTransition, width=width)),
        likelihoods.Bernoulli(latent_dim, KEYS, small),
        encoders.DiagonalNormal(latent_dim, latent_dim, small, context_dim=2 * width),
        BackwardGRU(KEYS, 2 * width),
    )


def recurrent(latent_dim, width):
    small = partial(nn.MLP, hidden=(width,))
    return RecurrentVAE(
        priors.DiagonalNormal(latent_dim, small, context_dim=width),
        likelihoods.Bernoulli(latent_dim, KEYS, small, context_dim=width),
        encoders.DiagonalNormal(KEYS, latent_dim, small, context_dim=width),
        ForwardGRU(KEYS, latent_dim, width),
    )


def chords(latent_dim, width):
    vae = recurrent(latent_dim, width)
    keys = likelihoods.SigmoidBelief(latent_dim, KEYS, partial(nn.MLP, hidden=(width,)), context_dim=width)
    return RecurrentVAE(vae.prior, keys, vae.encoder, vae.recurrence)


MODELS = {"deep-markov": deep_markov, "recurrent": recurrent, "chords": chords}


def main(args):
    pyro.set_rng_seed(args.seed)
    train, validation, test = read(args.data) if args.data else [simulated(n) for n in (40, 10, 10)]
    vae = MODELS[args.model](args.latent_dim, args.width)
    vae.likelihood.start_at(train[0][train[1]])

    def transpose(x, mask):
        """Moves the songs of a training batch up or down."""
        if not args.transpose or not vae.training:
            return x, mask
        shift = torch.randint(-args.transpose, args.transpose + 1, (len(x), 1, 1))
        return x.gather(-1, ((torch.arange(KEYS) - shift) % KEYS).expand_as(x)), mask

    history = pyrovae.fit(
        vae.model,
        vae.guide,
        train,
        loss=bounds.ELBO(beta=bounds.Linear(steps=args.warm_up)),
        epochs=args.epochs,
        batch_size=20,
        optimizer=partial(torch.optim.Adam, lr=args.lr, weight_decay=args.weight_decay),
        scheduler=partial(OneCycleLR, max_lr=args.lr, pct_start=0.1) if args.one_cycle else None,
        schedule_every_step=args.one_cycle,
        transform=transpose,
        clip_norm=20.0,
        validation=validation,
        patience=args.patience or None,
        checkpoint=args.checkpoint,
        resume=args.checkpoint is not None,
        progress=not args.smoke,
    )
    steps = int(test[1].sum())
    elbo = bounds.ELBO(num_particles=20 if not args.smoke else 2)
    values = [
        -sum(elbo.loss(vae.model, vae.guide, x[i : i + 10], mask[i : i + 10]) for i in range(0, len(x), 10))
        / int(mask.sum())
        for x, mask in (validation, test)
    ]
    method = estimators.ParticleFilter(num_samples=args.filters, num_particles=args.num_particles)
    vae.eval()
    estimate = pyrovae.log_marginal(
        vae.model_by_step, vae.guide_by_step, *test, method=method, max_memory=256e6, progress=not args.smoke
    )
    value = estimate.value.sum().item() / steps
    error = estimate.standard_error.square().sum().sqrt().item() / steps
    print(f"best epoch {history.best_epoch} of {len(history)}, {history['seconds'][-1] / 60:.0f} minutes")
    print(f"test log p(x) = {estimate.value.mean().item():.3f} nats a datum, by the particle filter")
    print(f"nats a step     ELBO, validation {-values[0]:.3f}   ELBO, test {-values[1]:.3f}")
    print(
        f"                log p(x) by the particle filter, test {-value:.3f} +- {error:.4f}, trusted: "
        f"{int(estimate.trusted.sum())} of {len(estimate.trusted)} chorales"
    )
    coming = vae.forecast(test[0][:1], 8, test[1][:1], num_samples=3, num_particles=args.num_particles)
    for draw in coming[:, 0]:
        print("continued:", " | ".join(map(chord, draw[:4])))
    if args.record:
        records = json.loads(RECORDS.read_text(encoding="utf-8"))
        records[args.model] = {
            "elbo of the test set, nats a step": -values[1],
            "elbo of the validation set, nats a step": -values[0],
            "log p(x) of the test set, nats a step": -value,
            "standard error": error,
            "trusted": int(estimate.trusted.sum()),
            "epochs": len(history),
            "minutes": round(history["seconds"][-1] / 60, 1),
            "settings": {k: v for k, v in vars(args).items() if k not in NO_SETTINGS},
        }
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    assert math.isfinite(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the file; simulated chords without one")
    parser.add_argument("--model", choices=MODELS, default="deep-markov")
    parser.add_argument("--latent-dim", type=int, default=48)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--patience", type=int, default=60, help="0 to go on to the last epoch")
    parser.add_argument("--warm-up", type=int, default=600, help="steps until the KL divergence has its full weight")
    parser.add_argument("--transpose", type=int, default=0, help="semitones by which training songs are moved, at most")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--one-cycle", action="store_true", help="let the learning rate rise to --lr, and fall to 0")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--num-particles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="a file from which an interrupted run goes on")
    parser.add_argument("--record", action="store_true", help="write the result beside this file")
    parser.add_argument("--smoke", action="store_true", help="a short run, to test the example")
    args = parser.parse_args()
    if args.smoke:
        args.latent_dim, args.width, args.epochs, args.warm_up, args.filters, args.num_particles = 4, 8, 2, 4, 8, 10
    main(args)
