"""Verses with a latent sentence: cures of a decoder that ignores its latent, beside the same decoder without one.

    python examples/text.py --data kjv.txt.gz

`kjv.txt.gz` is the King James Bible, a verse a line after its reference, as in "Ge1:1 In the beginning". The verses of
at most 20 words and marks are kept, and the 2,000 most frequent words. A tenth of the verses is held out, a tenth
chooses the epoch. All rows have the same recurrent decoder and, but for the language model, the same encoder of words.

Nats a word are -log p(x) over the number of words, with the marks of punctuation and the end of a verse. For a model
with a latent log p(x) is bounded from below by importance weighting (IWAE), so that its nats a word are an upper bound.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import pyro
import torch

import pyrovae
from pyrovae import bounds, data, encoders, likelihoods, nn, priors
from pyrovae.diagnostics import collapse
from pyrovae.distributions import sharpen

RECORDS = Path(__file__).with_suffix(".json")


class LanguageModel(torch.nn.Module):
    """The decoder alone: its latent is always zero."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood = likelihood

    def model(self, x):
        pyro.module("language_model", self)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.likelihood(x.new_zeros(len(x), self.likelihood.latent_dim)), obs=x)

    def guide(self, x):
        pass


class EncoderFirst(torch.optim.Adam):
    """Adam that moves the decoder at every `every`-th step alone, and the encoder at all others (He et al. 2019).

    As a callback of `fit` it turns to common steps once the mutual information of validation data stops rising.
    """

    def __init__(self, params, vae, x, every, **options):
        super().__init__(params, **options)
        self.vae, self.x, self.every, self.count, self.best = vae, x, every, 0, -math.inf
        self.decoder = set(vae.likelihood.parameters())

    def step(self, closure=None):
        if self.every > 1:
            self.count += 1
            is_decoders = self.count % self.every == 0
            for group in self.param_groups:
                for p in group["params"]:
                    if (p in self.decoder) != is_decoders:
                        p.grad = None  # Adam leaves it as it is
        return super().step(closure)

    def check(self, history):
        information = mutual_information(self.vae, self.x)
        if information <= self.best:
            self.every = 1
        self.best = max(self.best, information)


def make(vocabulary, x, args, *, posterior=encoders.DiagonalNormal, prior=priors.StandardNormal, **decoder):
    """Returns a VAE of verses; the keywords are those of the likelihood, and `skip` of its network."""
    time, words = vocabulary.num_steps, {"num_classes": vocabulary.num_classes, "end": vocabulary.end}
    network = partial(
        nn.RecurrentDecoder, width=args.width, embedding_width=args.width // 2, skip=decoder.pop("skip", False)
    )
    likelihood = likelihoods.Autoregressive(args.latent_dim, time, network, **words, **decoder).start_at(x)
    reader = partial(nn.TokenEncoder, **words, width=args.width // 2, embedding_width=args.width // 2)
    return pyrovae.VAE(prior(args.latent_dim), likelihood, posterior(time, args.latent_dim, reader))


def rows(vocabulary, x, args):
    """Returns how each row is made: the model and guide, the loss, and what fit gets besides."""
    build = partial(make, vocabulary, x, args)
    steps = args.epochs * math.ceil(len(x) / args.batch_size)
    sphere = {"posterior": encoders.VonMisesFisher, "prior": priors.HypersphericalUniform}
    linear = bounds.Linear(steps // 3)
    return {
        "language model": lambda: (LanguageModel(build().likelihood), bounds.ELBO()),
        "no cure": lambda: (build(), bounds.ELBO()),
        "linear warm-up": lambda: (build(), bounds.ELBO(beta=linear)),
        "cyclical warm-up": lambda: (build(), bounds.ELBO(beta=bounds.Cyclical(steps // 4))),
        "free bits": lambda: (build(), bounds.ELBO(penalty=bounds.FreeBits(args.free_nats, group_size=None))),
        "word dropout": lambda: (build(step_dropout=0.3), bounds.ELBO(beta=linear)),
        "encoder first": lambda: (build(), bounds.ELBO()),
        "skip decoder": lambda: (build(skip=True), bounds.ELBO(beta=linear)),
        "von Mises-Fisher": lambda: (build(**sphere), bounds.ELBO()),
        "skip and free bits": lambda: (
            build(skip=True),
            bounds.ELBO(penalty=bounds.FreeBits(args.free_nats, group_size=None)),
        ),
    }


def mutual_information(vae, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return collapse(vae.model, vae.guide, x, num_draws=2, progress=False).mutual_information


def nats(module, x):
    """Returns minus the evidence lower bound in nats a verse, always with the same noise."""
    was_training = module.training
    module.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        loss = sum(bounds.ELBO().loss(module.model, module.guide, part) for part in x.split(200)) / len(x)
    module.train(was_training)
    return loss


def train(name, module, loss, splits, args):
    """Trains a row, and returns the history and the epoch whose weights were kept: the best for validation verses."""
    x, held_out = splits.train.x, splits.validation.x
    best, losses, warm = {"nats": math.inf, "epoch": 0}, [], args.epochs // 3

    def keep_best(history):
        losses.append(nats(module, held_out))
        # Before a warm-up has ended, a collapsed model may have the better bound.
        if losses[-1] < best["nats"] and len(history) > warm:
            weights = {key: value.clone() for key, value in module.state_dict().items()}
            best.update(nats=losses[-1], epoch=len(history), weights=weights)
        return len(history) - max(best["epoch"], warm) >= args.patience

    callbacks, optimizer = [keep_best], partial(torch.optim.Adam, lr=args.lr)
    if name == "encoder first":
        optimizer = EncoderFirst(module.parameters(), module, held_out, args.encoder_steps, lr=args.lr)
        callbacks.append(optimizer.check)
    pyrovae.fit(
        module.model,
        module.guide,
        x,
        loss=loss,
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=optimizer,
        clip_norm=5.0,
        callbacks=callbacks,
        progress=False,
    )
    module.load_state_dict(best["weights"])
    return {"epoch": best["epoch"], "validation": losses}


def score(name, module, x, vocabulary, args):
    """Returns the numbers of a row of the table, on held-out verses."""
    module.eval()
    words = vocabulary.count_steps(x).double()
    x, words = x[: args.num_scored], words[: args.num_scored]
    if isinstance(module, LanguageModel):
        with torch.no_grad():
            log_px = module.likelihood(x.new_zeros(len(x), args.latent_dim)).log_prob(x).double()
        return {"log_px": log_px.tolist(), "words": words.tolist()}
    estimate = pyrovae.log_marginal(module.model, module.guide, x, num_samples=args.num_samples, progress=False)
    print(f"{name}: test {estimate}", flush=True)
    found = collapse(module.model, module.guide, x, progress=False)
    return {
        "log_px": estimate.value.tolist(),
        "trusted": int(estimate.trusted.sum()),
        "elbo": nats(module, x) * len(x) / words.sum().item(),
        "words": words.tolist(),
        "information": found.mutual_information,
        "information_error": found.mutual_information_error,
        "active_units": found.active_units,
    }


@torch.no_grad()
def say(vae, splits, args):
    """Returns lines of a model: verses read back, verses between two, and new verses."""
    vocabulary, x = splits.vocabulary, splits.test.x[:4]
    z = vae.encode(x).mean
    between = torch.lerp(z[0], z[1], torch.linspace(0, 1, 5).unsqueeze(-1))
    new = vae.decode(vae.prior().sample((4,)))
    return {
        "verses": vocabulary.decode(x),
        "read back": vocabulary.decode(vae.decode(z).greedy()),
        "between the first two": vocabulary.decode(vae.decode(between).greedy()),
        "new": vocabulary.decode(new.sample()),
        "new, with temperature 0.7 and a nucleus of 0.9": vocabulary.decode(
            new.generate(lambda step: sharpen(step, 0.7, 0.9).sample())
        ),
    }


def print_table(records):
    reference = records.get("language model")
    print(f"{'':20s}{'nats a word':>14s}{'less LM':>18s}{'ELBO':>8s}{'information':>14s}{'active':>8s}{'trusted':>9s}")
    for name, r in records.items():
        log_px, words = (torch.tensor(r[key], dtype=torch.float64) for key in ("log_px", "words"))
        line = f"{name:20s}{-log_px.sum() / words.sum():14.3f}"
        if reference is not None and r is not reference:
            # Paired over verses; the ratio's error by its linear approximation.
            difference = torch.tensor(reference["log_px"], dtype=torch.float64) - log_px
            ratio = difference.sum() / words.sum()
            error = (difference - ratio * words).std() * math.sqrt(len(words)) / words.sum()
            line += f"{ratio:+10.3f} ± {error:.3f}"
        elif "elbo" in r:
            line += f"{'':18s}"
        if "elbo" in r:
            line += f"{r['elbo']:8.3f}{r['information']:9.2f} ±{r['information_error']:4.2f}"
            line += f"{r['active_units']:5d}/{r['latent_dim']}{r['trusted']:5d}/{len(words)}"
        print(line)


def made_up_verses():
    """Returns lines of a small grammar, in which a verse has one subject."""
    people, verbs = ("Moses", "David", "Sarah", "Ruth"), ("said", "went", "saw", "came")
    return [f"And {p} {v}, and {p} {w}." for p in people for v in verbs for w in verbs] * 3


def read_verses(args):
    if args.smoke:
        return made_up_verses()
    lines, _ = data.read_lines(args.data)
    verses = [line.partition(" ")[2] for line in lines]
    counted = data.Vocabulary.of(verses)
    return [verse for verse in verses if len(counted.split(verse)) <= args.max_words]


def main(args):
    verses = read_verses(args)
    splits = data.split_lines(verses, max_words=args.vocabulary)
    vocabulary = splits.vocabulary
    print(f"{' + '.join(str(len(part.x)) for part in splits)} verses; {vocabulary.describe(verses)}", flush=True)
    records = json.loads(RECORDS.read_text()) if args.resume and RECORDS.exists() else {}
    makers = rows(vocabulary, splits.train.x, args)
    for name in args.only or makers:
        if name in records:
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        module, loss = makers[name]()
        record = train(name, module, loss, splits, args) | score(name, module, splits.test.x, vocabulary, args)
        if isinstance(module, pyrovae.VAE):
            record |= {"latent_dim": args.latent_dim, "lines": say(module, splits, args)}
        records[name] = record
        if not args.smoke:
            RECORDS.write_text(json.dumps(records, indent=1) + "\n")
            print_table(records)
            print(flush=True)
    print_table(records)
    chosen = max((r for r in records.values() if "lines" in r), key=lambda r: r["information"], default=None)
    for title, lines in (chosen or {"lines": {}})["lines"].items():
        print(f"\n{title}:", *lines, sep="\n  ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("kjv.txt.gz"), help="file of verses after their references")
    parser.add_argument("--max-words", type=int, default=20, help="longest verse, in words and marks")
    parser.add_argument("--vocabulary", type=int, default=2000, help="words that are known")
    parser.add_argument("--latent-dim", type=int, default=16)
    parser.add_argument("--width", type=int, default=128, help="units of the decoder")
    parser.add_argument("--free-nats", type=float, default=5.0, help="nats that free bits give")
    parser.add_argument("--encoder-steps", type=int, default=5, help="steps after which the decoder moves")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--patience", type=int, default=2, help="epochs without a better bound before the end")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--num-samples", type=int, default=100, help="importance samples a verse")
    parser.add_argument("--num-scored", type=int, default=300, help="held-out verses that are scored")
    parser.add_argument("--only", nargs="*", help="names of rows; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the rows that were recorded before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a quick run of some seconds, with made-up verses")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.width, args.latent_dim, args.num_samples, args.num_scored = 3, 16, 2, 10, 10
    main(args)
