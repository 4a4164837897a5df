"""All triples of a prior, an encoder and a likelihood in cases.py that fit each other."""

import inspect
import itertools
from functools import partial

from cases import SMALL, Case, cases
from torch import nn

from pyrovae import VAE, encoders, likelihoods, priors
from pyrovae.nn import OneHotInput


def representatives(kind: str) -> list[Case]:
    """Returns the first case of each class."""
    return list({case.cls: case for case in reversed(cases(kind))}.values())[::-1]


def place(part: nn.Module) -> tuple[int, str]:
    return part.latent_dim, repr(part.support)


def apart(prior: Case, encoder: Case) -> bool:
    return place(prior.build()) != place(encoder.build())


def meet(prior: Case, encoder: Case) -> bool:
    """Returns whether a prior and an encoder fit; VampPrior fits all encoders with a density, in any space."""
    if prior.cls is priors.VampPrior:
        return encoder.density
    if prior.cls is priors.ExemplarPrior and encoder.cls in (
        encoders.InverseAutoregressiveFlow,
        encoders.NeuralSplineFlow,
    ):
        return False  # they have no mean: refused when the prior is built
    return not apart(prior, encoder)


def covering(triples: list[tuple[Case, Case, Case]]) -> set[str]:
    """Returns the names of some triples that together contain every pair of parts that fit."""
    kept, covered = set(), set()
    for new in (3, 2, 1):  # greedy: triples with most new pairs first
        for triple in triples:
            pairs = {tuple(case.name for case in pair) for pair in itertools.combinations(triple, 2)}
            if len(pairs - covered) >= new:
                kept.add(name_of(triple))
                covered |= pairs
    return kept


def name_of(triple: tuple[Case, Case, Case]) -> str:
    return "-".join(case.name for case in triple)


def vae_of(prior: Case, encoder: Case, likelihood: Case) -> VAE:
    x_shape = likelihood.build().x_shape
    q = encoder.build(x_shape)
    integers = encoder.cls is encoders.Categorical
    network = partial(OneHotInput, num_classes=q.num_classes, network=SMALL) if integers else SMALL
    takes_encoder = "encoder" in inspect.signature(prior.cls).parameters
    return VAE(prior.build(q) if takes_encoder else prior.build(), likelihood.build(q.latent_dim, network), q)


PAIRS = list(itertools.product(representatives("prior"), representatives("encoder")))
MEETING = [
    (p, e, x)
    for p, e in PAIRS
    if meet(p, e)
    for x in representatives("likelihood")
    # Decoders of sequences take latents of real numbers alone, not class numbers.
    if e.cls is not encoders.Categorical or not issubclass(x.cls, likelihoods.Autoregressive)
]
APART = [(p, e) for p, e in PAIRS if apart(p, e)]
COVERING = covering(MEETING)
