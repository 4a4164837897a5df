"""Daily returns by stochastic volatility, trained by a particle filter, beside GARCH: densities of the next day, risk.

    python examples/volatility.py --data sp500.csv.gz

The file has a header with a column `Close` (or prices in its second column). The last 1,250 returns, some five years,
are held out; nothing is fitted on them. The model is plain Pyro, a loop over time:

    h_t = m + phi (h_{t-1} - m) + sigma (rho e_{t-1} + sqrt(1 - rho^2) n_t),   x_t = mu + exp(h_t / 2) e_t

with Student-t shocks e_t, and rho below zero where losses raise the volatility. It is trained by FIVO on windows of 50
days. Beside it is GARCH(1, 1) with Student-t errors, and GJR-GARCH, whose losses raise the volatility too (`pip install
arch`). The log-density of each held-out day given the days before is compared day by day. Value at risk is tested as
banks do: by the share of days below it (Kupiec) and by whether these days come in clusters (Christoffersen).
Without a file the returns are simulated.
"""

import argparse
import csv
import gzip
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import scipy.stats
import torch
from pyro import distributions as dist

import pyrovae
from pyrovae import bounds, estimators

RECORDS = Path(__file__).with_suffix(".json")


class StochasticVolatility(torch.nn.Module):
    def __init__(self, x):
        super().__init__()
        level = x.square().mean().log()
        for name, start in (("mu", x.mean()), ("m", level), ("phi", 2.5), ("sigma", -1.5), ("rho", 0.0), ("df", 1.5)):
            setattr(self, name, torch.nn.Parameter(torch.as_tensor(float(start))))
        self.proposal = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        torch.nn.init.zeros_(self.proposal[2].weight)
        torch.nn.init.zeros_(self.proposal[2].bias)
        self.before = None  # called with h_t and mu, for the risk of each day

    def step(self, h, shock):
        """Returns the mean and the standard deviation of h_t, given h_{t-1} and the shock of that day."""
        sigma, rho = self.sigma.exp(), self.rho.tanh()
        loc = self.m + self.phi.tanh() * (h - self.m) + sigma * rho * shock
        return loc, sigma * (1 - rho**2).sqrt()

    def start(self, x):
        stationary = self.sigma.exp() / (1 - self.phi.tanh() ** 2).sqrt()
        return self.m.expand(len(x)), stationary.expand(len(x))

    def model(self, x):
        pyro.module("volatility", self)
        df = 2 + self.df.exp()
        with pyro.plate("windows", len(x)):
            loc, scale = self.start(x)
            for t in range(x.shape[1]):
                h = pyro.sample(f"h{t}", dist.Normal(loc, scale))
                if self.before is not None:
                    self.before(h)
                pyro.sample(f"x{t}", dist.StudentT(df, self.mu, (h / 2).exp()), obs=x[:, t])
                loc, scale = self.step(h, (x[:, t] - self.mu) * (-h / 2).exp())

    def guide(self, x):
        pyro.module("volatility", self)
        with pyro.plate("windows", len(x)):
            loc, scale = self.start(x)
            for t in range(x.shape[1]):
                size = (x[:, t] - self.mu).abs() * (-loc / 2).exp()
                seen = torch.stack(torch.broadcast_tensors(loc - self.m, size.log1p(), (size - 1).tanh()), dim=-1)
                shift, stretch = self.proposal(seen).unbind(-1)
                h = pyro.sample(f"h{t}", dist.Normal(loc + scale * shift, scale * (1 + 0.5 * stretch.tanh())))
                loc, scale = self.step(h, (x[:, t] - self.mu) * (-h / 2).exp())

    def forecast(self, x):
        """A guide that looks at the days before alone: its particles are those of the forecast."""
        pyro.module("volatility", self)
        with pyro.plate("windows", len(x)):
            loc, scale = self.start(x)
            for t in range(x.shape[1]):
                h = pyro.sample(f"h{t}", dist.Normal(loc, scale))
                loc, scale = self.step(h, (x[:, t] - self.mu) * (-h / 2).exp())


def read(path):
    """Returns percent log returns."""
    content = Path(path).read_bytes()
    text = (gzip.decompress(content) if str(path).endswith(".gz") else content).decode()
    rows = list(csv.DictReader(text.splitlines()))
    name = "Close" if "Close" in rows[0] else list(rows[0])[1]
    prices = [float(row[name]) for row in rows if row[name] not in ("", ".")]
    return 100 * torch.tensor(prices, dtype=torch.float64).log().diff()


def simulated(n):
    h, x = 0.0, []
    for _ in range(n):
        h = 0.95 * h + 0.25 * float(torch.randn(()))
        x.append(math.exp(h / 2) * float(torch.distributions.StudentT(7.0).sample()))
    return torch.tensor(x, dtype=torch.float64)


def garch(x, held_out, o):
    """Returns the log-densities of the held-out days, and the probability below each, by a (GJR-)GARCH model."""
    from arch import arch_model

    model = arch_model(x.numpy(), mean="Constant", vol="GARCH", p=1, o=o, q=1, dist="t")
    fitted = model.fit(last_obs=len(x) - held_out, disp="off")
    variance = variance_of(fitted.params, x.numpy(), fitted.conditional_volatility[0] ** 2)
    df = fitted.params["nu"]
    scale = np.sqrt(variance * (df - 2) / df)
    standard = scipy.stats.t(df, fitted.params["mu"], scale)
    return standard.logpdf(x.numpy())[-held_out:], standard.cdf(x.numpy())[-held_out:]


def variance_of(params, x, first):
    """Returns the variance of each day given the days before."""
    error, variance = x - params["mu"], np.full(len(x), first)
    for t in range(1, len(x)):
        rise = params["alpha[1]"] + (params.get("gamma[1]", 0.0) if error[t - 1] < 0 else 0.0)
        variance[t] = params["omega"] + rise * error[t - 1] ** 2 + params["beta[1]"] * variance[t - 1]
    return variance


def tests_of_risk(below, level):
    """Returns the share of days below the value at risk, and the p-values of Kupiec's and Christoffersen's tests."""
    hits = below < level
    n, k = len(hits), int(hits.sum())

    def log_binomial(ones, zeros, share):
        return (ones * math.log(share) if ones else 0.0) + (zeros * math.log1p(-share) if zeros else 0.0)

    kupiec = 2 * (log_binomial(k, n - k, k / n) - log_binomial(k, n - k, level))
    counts = [[int(((hits[:-1] == i) & (hits[1:] == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    total = [counts[0][j] + counts[1][j] for j in (0, 1)]
    apart = sum(log_binomial(c[1], c[0], c[1] / max(sum(c), 1)) for c in counts)
    independent = max(2 * (apart - log_binomial(total[1], total[0], total[1] / sum(total))), 0.0)
    return k / n, scipy.stats.chi2.sf(kupiec, 1), scipy.stats.chi2.sf(independent, 1)


def main(args):
    pyro.set_rng_seed(args.seed)
    x = read(args.data) if args.data else simulated(600)
    held_out = args.held_out if args.data else 100
    known = x[: len(x) - held_out]
    windows = known[len(known) % args.window :].view(-1, args.window)
    volatility = StochasticVolatility(known).double()
    history = pyrovae.fit(
        volatility.model,
        volatility.guide,
        windows,
        loss=bounds.FIVO(args.num_particles),
        epochs=args.epochs,
        batch_size=len(windows),
        optimizer=partial(torch.optim.Adam, lr=0.02),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.epochs),
        progress=not args.smoke,
    )
    print(
        f"{history['seconds'][-1]:.0f} s of training; phi {volatility.phi.tanh():.3f}, sigma "
        f"{volatility.sigma.exp():.3f}, rho {volatility.rho.tanh():.2f}, df {2 + volatility.df.exp():.1f}"
    )

    recent = x[-(held_out + args.burn_in) :].unsqueeze(0)
    risk = []

    def before(h):
        # Particles of the forecast, equally weighted since the last step.
        day = len(risk)
        z = (recent[0, day].item() - volatility.mu.item()) / (h / 2).exp().double().numpy()
        risk.append(scipy.stats.t.cdf(z, 2 + volatility.df.exp().item()).mean())

    method = estimators.ParticleFilter(args.filters, args.forecast_particles)
    # The filters are checked, and then run: the days of the last run count.
    volatility.before = lambda h: (risk.clear() if len(risk) == recent.shape[1] else None, before(h))
    found = estimators.log_predictive(volatility.model, volatility.forecast, recent, method=method)
    volatility.before = None
    ours, below = found.value[0, -held_out:].numpy(), np.array(risk[-held_out:])
    error = found.standard_error[0, -held_out:].square().sum().sqrt().item() / held_out
    rows = {"stochastic volatility": (ours, below)}
    try:
        rows["GARCH(1, 1), Student-t"] = garch(x, held_out, o=0)
        rows["GJR-GARCH(1, 1), Student-t"] = garch(x, held_out, o=1)
    except ImportError:
        print("GARCH needs `pip install arch`")
    print(f"test log p(x) = {ours.mean():.4f} nats a datum, a day given the days before (filter: +- {error:.4f})")
    record = {"filter error, nats a day": error}
    print(f"{'':28}{'nats a day':>11}{'stoch. vol. minus this':>25}   value at risk: share below, p-values")
    for name, (log_p, u) in rows.items():
        difference = ours - log_p
        spread = difference.std() / math.sqrt(held_out)
        gap = f"{difference.mean():.4f} +- {spread:.4f}" if name != "stochastic volatility" else ""
        levels = [tests_of_risk(u, level) for level in (0.01, 0.05)]
        text = "; ".join(f"{share:.1%} ({a:.2f}, {b:.2f})" for share, a, b in levels)
        print(f"{name:28}{log_p.mean():11.4f}{gap:>25}   {text}")
        record[name] = {
            "nats a day": log_p.mean(),
            "difference": [difference.mean(), spread],
            "1 %, 5 %: share, Kupiec, Christoffersen": levels,
        }
    assert np.isfinite(ours).all()
    if args.record:
        records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
        records[Path(args.data).name.partition(".")[0]] = record
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a CSV file of prices, may be gzipped; simulated returns without one")
    parser.add_argument("--held-out", type=int, default=1250)
    parser.add_argument("--burn-in", type=int, default=250, help="days before, from which the filter starts")
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--num-particles", type=int, default=16)
    parser.add_argument("--filters", type=int, default=8)
    parser.add_argument("--forecast-particles", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the result beside this file")
    parser.add_argument("--smoke", action="store_true", help="a short run, to test the example")
    args = parser.parse_args()
    if args.smoke:
        args.epochs, args.num_particles, args.forecast_particles, args.burn_in = 6, 4, 50, 20
    main(args)
