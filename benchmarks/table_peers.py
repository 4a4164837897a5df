"""Rows that other libraries make of a table, each with the CPU seconds that it took: the peers of ``tables.py``.

    python -m venv peers; peers/bin/pip install ctgan copulas
    peers/bin/python benchmarks/table_peers.py adult.data peers-of-adult

Each method has its own defaults. It runs in an environment without pyrovae, on one thread.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch


def gaussian_copula(rows, discrete):
    """A Gaussian copula of numbers and of classes as places between 0 and 1, as SDV codes them."""
    from copulas.multivariate import GaussianMultivariate
    from rdt import HyperTransformer
    from rdt.transformers.categorical import UniformEncoder
    from rdt.transformers.numerical import FloatFormatter

    coder = HyperTransformer()
    coder.set_config(
        {
            "sdtypes": {name: "categorical" if name in discrete else "numerical" for name in rows},
            "transformers": {
                name: UniformEncoder()
                if name in discrete
                else FloatFormatter(learn_rounding_scheme=True, enforce_min_max_values=True)
                for name in rows
            },
        }
    )
    model = GaussianMultivariate()
    model.fit(coder.fit_transform(rows))
    return lambda size: coder.reverse_transform(model.sample(size))


def of_ctgan(name):
    def train(rows, discrete):
        import ctgan

        # CTGAN and TVAE with a GPU or without: here without, as all methods.
        options = {"enable_gpu": False} if "enable_gpu" in getattr(ctgan, name).__init__.__code__.co_varnames else {}
        model = getattr(ctgan, name)(**options)
        model.fit(rows, discrete)
        return model.sample

    return train


METHODS = {"Gaussian copula": gaussian_copula, "TVAE": of_ctgan("TVAE"), "CTGAN": of_ctgan("CTGAN")}


def main(args):
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(args.train, skipinitialspace=True, keep_default_na=False)[: args.num_rows]
    discrete = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
    for name in args.methods:
        torch.manual_seed(0)
        np.random.seed(0)
        started = time.process_time()
        sample = METHODS[name](rows, discrete)
        trained = time.process_time()
        made = sample(len(rows))
        sampled = time.process_time()
        stem = name.replace(" ", "-")
        made[list(rows)].to_csv(args.output / f"{stem}.csv", index=False)
        seconds = {"train": trained - started, "sample": sampled - trained}
        (args.output / f"{stem}.json").write_text(json.dumps({"method": name, "cpu_seconds": seconds}) + "\n")
        print(name, seconds, flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="a .csv file of training rows")
    parser.add_argument("output", type=Path, help="a folder for the rows and the times")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num-rows", type=int, help="train on the first rows alone")
    main(parser.parse_args())
