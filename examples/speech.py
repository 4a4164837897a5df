"""Spoken digits: power spectra by a VAE with the Itakura-Saito likelihood, resynthesis, and denoising in plain Pyro.

    python examples/speech.py --data recordings.zip --save speech     # the Free Spoken Digit Dataset

A frame of sound with normal Fourier coefficients of variance v has a power spectrum that is exponential with mean v:
`likelihoods.Gamma` with concentration 1, whose loss is the Itakura-Saito divergence. Two of the six speakers are held
out. Beside the VAE are, with as many numbers for a frame, a non-negative matrix factorization with the same likelihood
(NMF), and a PCA of log power, which has a density. The coefficients of an NMF that are fitted to a test frame give no
density of it: it gets one by a normal distribution of their logarithms, as a model in Pyro with a guide, and is scored
as the VAE is. A score is in nats a frame, in the units of the file (power of 16-bit samples).

To denoise, the decoder is given a new likelihood in a few lines of Pyro: variances of speech and noise add up. Each
frame is filtered by the expected share of the speech in its power. Without a file, vowels are simulated.
"""

import argparse
import io
import json
import math
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from scipy.io import wavfile
from sklearn.decomposition import NMF, PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import pyrovae
from pyrovae import encoders, estimators, likelihoods, nn, priors

RATE, WINDOW, HOP = 8000, 256, 128
RECORDS = Path(__file__).with_suffix(".json")


class LogMLP(nn.MLP):
    """An MLP of log power, in units of its standard deviation."""

    def forward(self, x, context=None):
        return super().forward((x.log() - 10) / 4, context)


def read(path):
    """Returns sounds, digits and speakers of files `{digit}_{speaker}_{index}.wav`, in a folder or an archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = {name: io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".wav")}
    else:
        files = {str(file): file for file in Path(path).rglob("*.wav")}
    if not files:
        raise SystemExit(f"there is no wav file in {path}.")
    sounds, digits, speakers = [], [], []
    for name in sorted(files):
        rate, samples = wavfile.read(files[name])
        if rate != RATE or samples.ndim > 1 or samples.dtype != np.int16:
            raise SystemExit(
                f"{name} has {rate} Hz and shape {samples.shape} of {samples.dtype}: 8,000 Hz, mono, int16."
            )
        digit, speaker, _ = Path(name).stem.split("_")
        sounds.append(samples.astype(np.float64))
        digits.append(int(digit))
        speakers.append(speaker)
    return sounds, np.array(digits), np.array(speakers)


def simulated():
    """Vowels of six speakers: pulses of a pitch, through two resonances that tell the digit."""
    sounds, digits, speakers = [], [], []
    rng = np.random.default_rng(0)
    for speaker in range(6):
        for digit in range(10):
            frequencies = np.fft.rfftfreq(3000, 1 / RATE)
            formants = 300 + 60 * digit, 900 + 150 * ((3 * digit) % 10)
            gain = sum(1 / (1 + ((frequencies - f) / 80) ** 2) for f in formants)
            pulses = rng.normal(size=3000) + 20 * (np.arange(3000) % (50 + 10 * speaker) == 0)
            sounds.append(2000 * np.fft.irfft(np.fft.rfft(pulses) * gain, 3000).round() / 10)
            digits.append(digit)
            speakers.append(f"s{speaker}")
    return sounds, np.array(digits), np.array(speakers)


def transform(sound):
    """Returns the Fourier coefficients of the frames, ``(frames, frequencies)``."""
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    return torch.stft(torch.as_tensor(sound), WINDOW, HOP, window=window, return_complex=True).T


def inverse(coefficients, length):
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    return torch.istft(coefficients.T, WINDOW, HOP, window=window, length=length)


def power(coefficients):
    """Returns power spectra; the first and the last coefficient are real, and not exponential."""
    return coefficients[:, 1:-1].abs().square().float()


def filtered(coefficients, gain):
    """Returns the coefficients times a gain for each; the first and the last get that of their neighbours."""
    return coefficients * torch.cat([gain[:, :1], gain, gain[:, -1:]], dim=1)


def griffin_lim(magnitude, length, steps=60):
    """Returns a sound with about these magnitudes, whose phases agree over overlapping frames."""
    phase = torch.exp(2j * math.pi * torch.rand(magnitude.shape, dtype=torch.float64))
    for _ in range(steps):
        again = transform(inverse(magnitude * phase, length))
        phase = again / again.abs().clamp(min=1e-8)
    return inverse(magnitude * phase, length)


def score_nmf(nmf, known_h, some_h, x):
    """Returns log p(x) by an NMF whose log coefficients are normal, with the mean and covariance of known frames."""
    least = 1e-6 * known_h.mean()
    logs, start = (torch.as_tensor(h.clip(least)).log().float() for h in (known_h, some_h))
    components = torch.as_tensor(nmf.components_).float()
    loc, tril = logs.mean(0), torch.linalg.cholesky(logs.T.cov() + 1e-3 * torch.eye(len(components)))

    def model(x, start):
        with pyro.plate("frames", len(x)):
            h = pyro.sample("h", dist.MultivariateNormal(loc, scale_tril=tril)).clamp(-40, 40).exp()
            variance = (h @ components).clamp(1e-3, 1e30)
            pyro.sample("x", dist.Exponential(1 / variance).to_event(1), obs=x)

    def guide(x, start):
        with pyro.plate("frames", len(x)):
            pyro.sample("h", dist.Normal(start, 0.3).to_event(1))

    return pyrovae.log_marginal(model, guide, x, start, method=estimators.UntilTrusted(), progress=False)


def pooled(codes, sizes):
    """Returns the means of the codes of the first, the second and the last third of each sound."""
    parts = [np.array_split(code, 3) for code in np.split(codes, np.cumsum(sizes)[:-1])]
    return np.stack([np.concatenate([part.mean(0) for part in thirds]) for thirds in parts])


def denoised(vae, coefficients, noise_variance, steps):
    """Returns the coefficients of speech in white noise: the decoder of a VAE, and a likelihood in which they add."""
    x = power(coefficients)
    start = vae.encoder(x).mean.detach()

    def model(x):
        with pyro.plate("frames", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(start), 1.0).to_event(1))
            speech = vae.likelihood(z).mean
            pyro.sample("x", dist.Exponential(1 / (speech + noise_variance)).to_event(1), obs=x)
        return speech / (speech + noise_variance)

    def guide(x):
        loc = pyro.param("loc", start)
        scale = pyro.param("scale", torch.full_like(start, 0.1), constraint=dist.constraints.positive)
        with pyro.plate("frames", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x)
    with torch.no_grad():
        shares = [poutine.replay(model, trace=poutine.trace(guide).get_trace(x))(x) for _ in range(50)]
    return filtered(coefficients, torch.stack(shares).mean(0).double())


def decibels(clean, sound):
    """Returns the signal-to-noise ratio of a sound."""
    return float(10 * torch.log10(clean.square().sum() / (clean - sound).square().sum()))


def main(args):
    pyro.set_rng_seed(args.seed)
    sounds, digits, speakers = read(args.data) if args.data else simulated()
    rng = np.random.default_rng(args.seed)
    # Samples were rounded to integers. Noise within a step makes them real numbers again, and silence has no zeros.
    spectra = [transform(sound + rng.uniform(-0.5, 0.5, len(sound))) for sound in sounds]
    sizes = np.array([len(frames) for frames in spectra])
    x = torch.cat([power(frames) for frames in spectra])
    names = sorted(set(speakers))
    is_test = np.isin(speakers, names[-2:])
    held_out = ~is_test & (rng.random(len(sounds)) < 0.1)
    of_test, of_held_out = (torch.as_tensor(np.repeat(part, sizes)) for part in (is_test, held_out))
    known, validation, test = x[~of_test & ~of_held_out], x[of_held_out], x[of_test]
    print(f"{len(sounds):,} sounds, {len(x):,} frames of {x.shape[1]} powers; test speakers: {', '.join(names[-2:])}")

    k = args.latents
    network = partial(nn.MLP, hidden=(args.units, args.units))
    vae = pyrovae.VAE(
        priors.StandardNormal(k),
        likelihoods.Gamma(k, x.shape[1:], network, concentration=1.0),
        encoders.DiagonalNormal(x.shape[1:], k, partial(LogMLP, hidden=(args.units, args.units))),
    )
    vae.likelihood.start_at(known)
    history = pyrovae.fit(
        vae.model,
        vae.guide,
        known,
        epochs=args.epochs,
        batch_size=256,
        validation=validation,
        patience=10,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        progress=not args.smoke,
    )
    print(f"{len(history)} epochs in {history['seconds'][-1]:.0f} s")

    # How good are the spectra? A few test frames are scored until they can be trusted.
    chosen = torch.as_tensor(rng.permutation(len(test))[: args.scored])
    some = test[chosen]
    estimate = pyrovae.log_marginal(
        vae.model, vae.guide, some, method=estimators.UntilTrusted(), progress=not args.smoke
    )
    trusted = int(estimate.trusted.sum())
    print(f"test log p(x) = {estimate.value.mean():.2f} nats a datum, a frame; {trusted} of {len(some)} are trusted")
    ours = estimate.value.double()

    few = known[torch.as_tensor(rng.permutation(len(known))[: args.fitted])].double().numpy()
    began = time.monotonic()
    nmf = NMF(
        k, beta_loss="itakura-saito", solver="mu", init="random", max_iter=args.iterations, random_state=0, tol=1e-5
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # it stops after the number of iterations that was asked for
        known_h, some_h = nmf.fit_transform(few), nmf.transform(some.double().numpy())
    variance = torch.as_tensor(some_h @ nmf.components_)
    fitted = (-variance.log() - some / variance).sum(1)
    of_nmf = score_nmf(nmf, known_h, some_h, some)
    seconds = time.monotonic() - began
    logs = [part.double().log().numpy() for part in (known, some)]
    pca = PCA(k).fit(logs[0])
    of_pca = torch.as_tensor(pca.score_samples(logs[1]) - logs[1].sum(1))
    record = {"frames": len(known), "latents": k, "epochs": len(history), "seconds": history["seconds"][-1]}
    record |= {"NMF trusted": int(of_nmf.trusted.sum())}
    record |= {"VAE": float(ours.mean()), "trusted": [trusted, len(some)], "NMF seconds": seconds}
    print(f"{'':44}{'nats a frame':>13}{'VAE minus this':>22}")
    others = {"NMF": of_nmf.value.double(), "PCA of log power": of_pca}
    others["NMF, fitted to each test frame: no density"] = fitted
    for name, value in others.items():
        gap = ours - value
        error = gap.std().item() / math.sqrt(len(gap))
        print(f"{name:44}{value.mean():13.2f}{f'{gap.mean():.2f} +- {error:.2f}':>22}")
        record[name] = {"log p": float(value.mean()), "VAE minus this": [float(gap.mean()), error]}

    # Do the latents tell digits of unseen speakers apart?
    with torch.no_grad():
        codes = {"VAE": vae.encoder(x).mean.numpy(), "PCA of log power": pca.transform(x.double().log().numpy())}
    for name, code in codes.items():
        features = pooled(code, sizes)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
            features[~is_test], digits[~is_test]
        )
        accuracy = classifier.score(features[is_test], digits[is_test])
        print(f"digits of unseen speakers from the latents of the {name}, a linear classifier: {accuracy:.1%} right")
        record[f"digits, {name}"] = accuracy

    # Noise as loud as 0 and 5 decibels; what is left of it after filtering.
    print(f"{'decibels with noise':>24}{'VAE':>8}{'NMF':>8}")
    for level in (0.0, 5.0):
        rows = []
        for i in rng.permutation(np.flatnonzero(is_test))[: args.denoised]:
            clean = torch.as_tensor(sounds[i])
            deviation = clean.square().mean().sqrt() * 10 ** (-level / 20)
            noisy = clean + deviation * torch.randn(len(clean), dtype=torch.float64)
            coefficients = transform(noisy)
            noise = deviation**2 * torch.hann_window(WINDOW).square().sum()
            ours_now = denoised(vae, coefficients, float(noise), args.steps)
            theirs = denoised_by_nmf(nmf, coefficients, float(noise))
            rows.append([decibels(clean, inverse(c, len(clean))) for c in (coefficients, ours_now, theirs)])
        before, after, by_nmf = np.mean(rows, 0)
        print(f"{before:24.1f}{after:8.1f}{by_nmf:8.1f}")
        record[f"noise at {level:.0f} dB: before, VAE, NMF"] = [before, after, by_nmf]
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        write(args, vae, sounds[i], noisy, coefficients, ours_now)
    if args.record:
        RECORDS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def denoised_by_nmf(nmf, coefficients, noise):
    """Returns the coefficients filtered by an NMF with a further component, the noise, of a known level."""
    x, w = power(coefficients).double().numpy(), nmf.components_
    h = np.full((len(x), len(w)), x.mean() / w.mean() / len(w))
    for _ in range(200):  # multiplicative updates of the Itakura-Saito divergence, with the noise as it is
        v = h @ w + noise
        h *= np.sqrt((x / v**2 @ w.T) / (1 / v @ w.T))
    return filtered(coefficients, torch.as_tensor(h @ w / (h @ w + noise)))


def write(args, vae, sound, noisy, coefficients, cleaned):
    """Writes sounds, and a picture of their spectra."""
    from matplotlib import pyplot as plt

    clean = transform(sound)
    with torch.no_grad():
        modelled = vae.likelihood(vae.encoder(power(clean + 1e-3)).mean).mean.double()
    ends = torch.cat([modelled[:, :1], modelled, modelled[:, -1:]], dim=1)
    pictures = {
        "sound": clean,
        "from the latents": transform(griffin_lim(ends.sqrt(), len(sound))),
        "with noise": coefficients,
        "denoised": cleaned,
    }
    figure, axes = plt.subplots(1, len(pictures), figsize=(12, 3), sharey=True, layout="constrained")
    top = float(clean.abs().square().log10().max() * 10)
    for ax, (name, frames) in zip(axes, pictures.items(), strict=True):
        levels = 10 * (frames.abs().square() + 1e-3).log10().T.numpy()
        ax.imshow(
            levels,
            origin="lower",
            aspect="auto",
            vmin=top - 60,
            vmax=top,
            cmap="magma",
            extent=(0, len(sound) / RATE, 0, RATE / 2000),
        )
        ax.set(title=name, xlabel="seconds")
        samples = inverse(frames, len(sound)).clamp(-32768, 32767).round().to(torch.int16).numpy()
        wavfile.write(Path(args.save) / f"{name.replace(' ', '-')}.wav", RATE, samples)
    axes[0].set_ylabel("kHz")
    figure.savefig(Path(args.save) / "spectrograms.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder or an archive of wav files; simulated vowels without one")
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--scored", type=int, default=500, help="test frames to score")
    parser.add_argument("--fitted", type=int, default=20_000, help="frames that the NMF is fitted to")
    parser.add_argument("--iterations", type=int, default=300, help="of the NMF")
    parser.add_argument("--denoised", type=int, default=20, help="test sounds with noise")
    parser.add_argument("--steps", type=int, default=300, help="of the posterior of each noisy sound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="a folder for sounds and a picture")
    parser.add_argument("--record", action="store_true", help="write the result beside this file")
    parser.add_argument("--smoke", action="store_true", help="a short run, to test the example")
    args = parser.parse_args()
    if args.smoke:
        args.latents, args.units, args.epochs, args.scored, args.iterations = 4, 32, 2, 10, 20
        args.denoised, args.steps = 1, 5
    main(args)
