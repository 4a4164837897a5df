"""Training from a memory map and from a table on the disk, beside the same tensor in memory: time of an epoch, memory.

An epoch is of 1,000,000 rows and 50 columns, in batches of 1,000, in CPU seconds of one thread; the three take turns.
The memory is the peak of a process that trains an epoch on a file of 2 GB, above that of the same process before, which
has trained on a small array; and that of scoring the rows.

    python benchmarks/rows.py --folder /tmp
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyro
import report
import torch

import pyrovae
from pyrovae import VAE, data, encoders, likelihoods, nn, priors

PEAK = """
import re
import numpy as np
import pyrovae
from pyrovae import VAE, encoders, likelihoods, priors

vae = VAE(priors.StandardNormal(8), likelihoods.Normal(8, 100), encoders.DiagonalNormal(100, 8))

def peak():
    return int(re.search(r"VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1]) / 1024

def run(x):
    pyrovae.fit(vae.model, vae.guide, x, epochs=1, batch_size=4096, progress=False)
    trained = peak()
    pyrovae.log_marginal(vae.model, vae.guide, x, num_samples=1, progress=False)
    return trained, peak()

run(np.zeros((20000, 100), np.float32))
before = peak()
trained, scored = run(np.load({path!r}, mmap_mode="r"))
print(before, trained - before, scored - before)
"""


def vae_of(columns: int) -> VAE:
    network = partial(nn.MLP, hidden=(64,))
    return VAE(
        priors.StandardNormal(8),
        likelihoods.Normal(8, columns, network=network),
        encoders.DiagonalNormal(columns, 8, network=network),
    )


def epochs(sources: dict, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of an epoch, by source and round."""
    vaes = {name: vae_of(x.shape[1]) for name, x in sources.items()}
    spent: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(rounds + 1):
        for name, x in sources.items():
            start = time.process_time()
            vae = vaes[name]
            pyrovae.fit(vae.model, vae.guide, x, epochs=1, batch_size=1000, progress=False)
            if number:  # the first round reads the files and traces the steps
                spent[name].append(time.process_time() - start)
    return spent


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        x = torch.randn(args.rows, 50)
        np.save(f"{folder}/x.npy", x.numpy())
        pq.write_table(pa.table({f"c{i}": x[:, i].numpy() for i in range(50)}), f"{folder}/x.parquet")
        start = time.process_time()
        table = data.Table(f"{folder}/x.parquet", memory_map=f"{folder}/rows.bin")
        read = time.process_time() - start
        sources = {"tensor": x, "memory map": np.load(f"{folder}/x.npy", mmap_mode="r"), "table on the disk": table.x}
        spent = epochs(sources, args.rounds)
        lines = []
        for name, seconds in spent.items():
            ratios = [s / t for s, t in zip(seconds, spent["tensor"], strict=True)]
            lines.append([name, report.quartiles(seconds, 1), "" if name == "tensor" else report.quartiles(ratios, 2)])
        path = f"{folder}/large.npy"
        large = np.lib.format.open_memmap(path, "w+", np.float32, (args.megabytes * 2**20 // 400, 100))
        for at in range(0, len(large), 2**17):
            large[at : at + 2**17] = np.float32(at % 7)
        size = large.nbytes / 2**30
        del large
        printed = subprocess.run([sys.executable, "-c", PEAK.format(path=path)], capture_output=True, text=True)
        if printed.returncode:
            sys.exit(printed.stderr)
        before, trained, scored = map(float, printed.stdout.split())
    report.write(
        "rows",
        "\n\n".join(
            [
                "## Rows on the disk",
                __doc__.partition("\n\n")[2].partition("\n\n    python")[0],
                report.machine(packages=("torch", "pyro-ppl")),
                report.table(["Source", "Seconds an epoch", "Ratio to the tensor"], lines),
                f"Reading the table from Parquet, with its schema, took {read:.0f} CPU seconds. Medians and quartiles "
                f"of {args.rounds} rounds.",
                f"The process with the library takes {before:.0f} MB. An epoch on a file of {size:.1f} GB takes "
                f"{trained:.0f} MB more, and scoring its rows {scored:.0f} MB.",
            ]
        ),
    )
    print(lines, statistics.median(spent["tensor"]), read, before, trained, scored)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the files are written, for a while")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=2048)
    main(parser.parse_args())
