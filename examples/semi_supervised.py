"""Semi-supervised learning: handwritten digits, one in twelve with a label.

    python examples/semi_supervised.py

The model M2 of Kingma et al. (https://arxiv.org/abs/1406.5298) learns from 100 digits with a label and 1,097 without.
Its accuracy on test digits is compared with that of the same classifier network trained on the 100 labels alone, and of
scikit-learn's logistic regression.
"""

import argparse
from functools import partial

import pyro
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

import pyrovae
from pyrovae import data, encoders, likelihoods, nn, priors
from pyrovae.structures import ClassifierELBO, SemiSupervisedVAE

LATENT_DIM, X_SHAPE, CLASSES = 16, (1, 8, 8), 10
MLP = partial(nn.MLP, hidden=(128,))


def hide(labels, per_class):
    """Keeps the first few labels of each class and replaces the others by -1, unknown."""
    rank = torch.nn.functional.one_hot(labels, CLASSES).cumsum(0).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.where(rank <= per_class, labels, -1)


def supervised(x, labels, steps):
    """Trains the classifier network alone, on labelled data."""
    classifier = nn.MLP(X_SHAPE, CLASSES)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(classifier(x), labels).backward()
        optimizer.step()
    return classifier


def main(args):
    pyro.set_rng_seed(0)
    train, _, test = data.load("digits")
    labels = hide(train.labels, args.labels_per_class)
    known = labels >= 0

    vae = SemiSupervisedVAE(
        prior=priors.StandardNormal(LATENT_DIM),
        # The context of these parts is the label as a one-hot vector.
        likelihood=likelihoods.Normal(LATENT_DIM, X_SHAPE, MLP, scale=0.3, context_dim=CLASSES),
        encoder=encoders.DiagonalNormal(X_SHAPE, LATENT_DIM, MLP, context_dim=CLASSES),
        classifier=nn.MLP,
        num_classes=CLASSES,
    )
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        (train.x, labels),
        loss=ClassifierELBO(vae.classify, weight=args.weight),  # sums over the unknown labels
        epochs=args.epochs,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
    )
    print(history)
    print(f"test {pyrovae.log_marginal(vae.model, vae.guide, test.x, num_samples=args.num_samples)}")

    alone = supervised(train.x[known], labels[known], steps=10 * args.epochs)
    regression = LogisticRegression(max_iter=1000).fit(train.x[known].flatten(1), labels[known])
    accuracies = {
        f"VAE, {int(known.sum())} labels and {int((~known).sum()):,} digits without": vae.accuracy(test.x, test.labels),
        f"its classifier network, {int(known.sum())} labels": (alone(test.x).argmax(1) == test.labels).double().mean(),
        f"logistic regression, {int(known.sum())} labels": regression.score(test.x.flatten(1), test.labels),
    }
    print("accuracy on test digits:")
    for name, accuracy in accuracies.items():
        print(f"  {name:41s} {accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--weight", type=float, default=300.0, help="weight of the cross entropy of known labels")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--num-samples", type=int, default=1000, help="importance samples a datum")
    parser.add_argument("--smoke", action="store_true", help="a quick run of a few seconds")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_samples = 2, 20
    main(args)
