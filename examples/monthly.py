"""Monthly series by a state-space VAE beside exponential smoothing: forecasts of a year, scored by their intervals.

    python examples/monthly.py --series elnino
    python examples/monthly.py --series co2

The series are data sets of statsmodels (`pip install statsmodels`): the temperature of the eastern Pacific, and carbon
dioxide on Mauna Loa. The last ten years are held out; nothing is fitted on them. The month is a context of the
likelihood, so that the states hold what departs from an ordinary year; a series that grows is modelled by its
differences. From each month of the held-out years but the last, both models forecast twelve months: the VAE by a
particle filter, exponential smoothing (additive errors and seasons; without a trend, with one or with a damped one, by
AIC) as statsmodels does. The interval score of a 90 % interval (Gneiting and Raftery, 2007,
https://doi.org/10.1198/016214506000001437) is its width, and twenty times the distance by which it misses what came.
In a short run the series is simulated.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch

import pyrovae
from pyrovae import bounds, encoders, estimators, likelihoods, nn, priors
from pyrovae.structures import BackwardGRU, StateSpaceVAE

RECORDS = Path(__file__).with_suffix(".json")
HELD_OUT, AHEAD, WINDOW, SHARE = 120, 12, 48, 0.9
GROWS = {"elnino": False, "co2": True}


def read(name):
    """Returns the series, a number a month from a January on."""
    from statsmodels import datasets

    if name == "elnino":
        return datasets.elnino.load_pandas().data.to_numpy()[:, 1:].flatten()
    months = datasets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    return months[months.index.year > 1958].to_numpy()


def simulated(count=300):
    """Returns a year that comes back with departures that last some months."""
    x = np.zeros(count)
    for t in range(1, count):
        x[t] = 0.8 * x[t - 1] + 0.5 * float(torch.randn(()))
    return 20 + 2 * np.sin(np.arange(count) * 2 * math.pi / 12) + x


def build(latent_dim, width):
    affine, small = partial(nn.MLP, hidden=()), partial(nn.MLP, hidden=(width,))
    return StateSpaceVAE(
        priors.DiagonalNormal(latent_dim),
        encoders.DiagonalNormal(latent_dim, latent_dim, partial(nn.GatedTransition, width=width)),
        likelihoods.Normal(latent_dim, 1, affine, context_dim=12),
        encoders.DiagonalNormal(latent_dim, latent_dim, small, context_dim=2 * width + 12),
        BackwardGRU(1, 2 * width),
    )


def windows(y, first, ends, after=0):
    """Returns the steps before each end, and the months of these and of the steps after, as contexts."""
    x = torch.stack([y[end - WINDOW : end] for end in ends]).unsqueeze(-1)
    months = torch.stack([first + torch.arange(end - WINDOW, end + after) for end in ends]) % 12
    return x, torch.nn.functional.one_hot(months, 12).float()


def by_vae(x, ends, args):
    """Returns draws of the twelve months from each end on, and the log-density of the windows before them."""
    grows = GROWS[args.series]
    steps = torch.tensor(np.diff(x) if grows else x, dtype=torch.float32)
    first = int(grows)  # the month of the first step
    fitted = steps[: ends[0] - first]
    mean, scale = fitted.mean(), fitted.std()
    y = (steps - mean) / scale
    split = len(fitted) - WINDOW  # windows that end in the last years before those held out are for validation
    train, validation = (
        (windows_x, None, months)
        for windows_x, months in (
            windows(y, first, range(WINDOW, split, 2)),
            windows(y, first, range(split + 1, len(fitted) + 1, 6)),
        )
    )
    vae = build(args.latent_dim, args.width)
    pyrovae.fit(
        vae.model,
        vae.guide,
        train,
        loss=bounds.ELBO(num_particles=4, beta=bounds.Linear(steps=args.warm_up)),
        epochs=args.epochs,
        batch_size=50,
        optimizer=partial(torch.optim.Adam, lr=args.lr),
        clip_norm=10.0,
        validation=validation,
        patience=args.patience,
        progress=not args.smoke,
    )
    vae.eval()
    given, months = windows(y, first, [end - first for end in ends], AHEAD)
    draws = vae.forecast(given, AHEAD, None, months, num_samples=args.num_samples, num_particles=args.num_samples)
    draws = (draws.squeeze(-1) * scale + mean).double()
    if grows:
        draws = draws.cumsum(-1) + torch.as_tensor(x[np.asarray(ends) - 1]).unsqueeze(-1)
    held_out = slice(0, None, AHEAD)
    estimate = pyrovae.log_marginal(
        vae.model_by_step,
        vae.guide_by_step,
        given[held_out],
        None,
        months[held_out, :WINDOW],
        method=estimators.ParticleFilter(),
        progress=False,
    )
    return draws.numpy(), estimate


def by_smoothing(x, ends):
    """Returns the intervals of exponential smoothing, with the parameters that fit the years before the first end."""
    import pandas as pd
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    def model(end, trend, damped):
        options = {"error": "add", "trend": trend, "damped_trend": damped, "seasonal": "add", "seasonal_periods": 12}
        return ETSModel(pd.Series(x[:end]), **options)

    kinds = (None, False), ("add", False), ("add", True)
    fitted, kind = min(((model(ends[0], *kind).fit(disp=False), kind) for kind in kinds), key=lambda fit: fit[0].aic)
    found = []
    for end in ends:
        prediction = model(end, *kind).smooth(fitted.params).get_prediction(end, end + AHEAD - 1)
        found.append(prediction.summary_frame(alpha=1 - SHARE)[["pi_lower", "pi_upper"]].to_numpy().T)
    return np.stack(found, axis=1)


def interval_scores(low, high, came):
    miss = np.maximum(low - came, 0) + np.maximum(came - high, 0)
    return high - low + 2 / (1 - SHARE) * miss


def main(args):
    pyro.set_rng_seed(args.seed)
    x, smoothing = (simulated() if args.smoke else read(args.series)), None
    ends = list(range(len(x) - HELD_OUT, len(x) - AHEAD + 1))
    came = np.stack([x[end : end + AHEAD] for end in ends])
    draws, estimate = by_vae(x, ends, args)
    rows = {"state-space VAE": np.quantile(draws, ((1 - SHARE) / 2, (1 + SHARE) / 2), axis=0)}
    if not args.smoke:
        rows["exponential smoothing"] = smoothing = by_smoothing(x, ends)
    print(f"{args.series}: {len(x)} months, forecasts of {AHEAD} months from {len(ends)} months on")
    print(f"test log p(x) = {estimate.value.mean().item():.3f} nats a datum, windows of {WINDOW} standardized months")
    print(f"{'':24}interval score: all   month 1   month 6  month 12   share inside")
    record = {}
    for name, (low, high) in rows.items():
        scores = interval_scores(low, high, came)
        inside = ((low <= came) & (came <= high)).mean()
        of_months = "".join(f"{score:10.3f}" for score in scores.mean(0)[[0, 5, 11]])
        print(f"{name:24}{scores.mean():20.3f}{of_months}{inside:15.3f}")
        record[name] = {
            "interval score": scores.mean(),
            "of each month ahead": scores.mean(0).tolist(),
            "inside": inside,
        }
    if smoothing is not None:
        # Forecasts of one year overlap: the error is that of the means of nine years.
        paired = interval_scores(*rows["state-space VAE"], came).mean(1) - interval_scores(*smoothing, came).mean(1)
        years = np.stack([year.mean() for year in np.array_split(paired, len(paired) // 12)])
        record["difference"] = paired.mean()
        record["standard error"] = years.std(ddof=1) / math.sqrt(len(years))
        print(f"difference {record['difference']:.3f} +- {record['standard error']:.3f}")
    if args.record:
        records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
        records[args.series] = record
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", choices=GROWS, default="elnino")
    parser.add_argument("--latent-dim", type=int, default=4)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--patience", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=100, help="steps until the KL divergence has its full weight")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the result beside this file")
    parser.add_argument("--smoke", action="store_true", help="a short run, to test the example")
    args = parser.parse_args()
    if args.smoke:
        args.latent_dim, args.width, args.epochs, args.warm_up, args.num_samples = 2, 4, 2, 2, 50
    main(args)
