"""``pyrovae evaluate``."""

import numpy as np
import pyro
import torch

from pyrovae.cli.common import (
    SplitName,
    arguments_of,
    check_device,
    data_to_score,
    is_discrete,
    load_run_and_data,
    new_file,
)
from pyrovae.distributed import init_process_group
from pyrovae.estimators import Estimator, ImportanceSampling, log_marginal
from pyrovae.likelihoods import bits_per_dim


def evaluate(
    run: str,
    split: SplitName = "test",
    method: Estimator | None = None,
    num_samples: int | None = None,
    num_data: int | None = None,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    max_memory: float = 64e6,
    seed: int = 0,
    device: str = "cpu",
    compile: bool = False,
    trust: bool = False,
) -> None:
    """Estimates log p(x) of each datum under a trained run, by importance sampling or another estimator.

    Args:
        run: the run directory.
        split: the split of the data to score.
        method: the class of the estimator, one of pyrovae.estimators; ImportanceSampling by default.
        num_samples: importance samples per datum, 5000 by default. For other methods use --method.num_samples.
        num_data: score only this many data, the first of the split; all by default.
        output: a .csv file for the results of each datum: estimate, standard error, effective sample size, k-hat,
            whether it can be trusted, and what else the method gives.
        data: another data set of the same shape to score; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        max_memory: memory for intermediate results, in bytes.
        seed: seed of the samples.
        device: cpu, cuda, cuda:1, ...; with cuda, each process of torchrun takes a GPU of its own.
        compile: score by compiled graphs, which take some seconds to make.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    world = init_process_group(device)
    out = None if output is None else world.broadcast_from_rank0(lambda: new_file(output, (".csv",)))
    if num_data is not None and num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    if method is None:
        method = ImportanceSampling(5000 if num_samples is None else num_samples)
    elif num_samples is not None:
        raise ValueError(f"--num-samples is for the default method: give --method.num_samples {num_samples} instead.")
    check_device(device)
    vae, splits, preprocessing = load_run_and_data(run, data, data_root, trust)
    pyro.set_rng_seed(seed)
    vae.to(device)
    x = data_to_score(splits, split, preprocessing)[:num_data].to(device)
    estimate = log_marginal(
        vae.model, vae.guide, *arguments_of(splits, x), method=method, max_memory=max_memory, compile=compile
    )
    if out is not None and world.is_rank0:
        columns = {name: getattr(estimate, name) for name in ("value", "standard_error", "ess", "khat", "trusted")}
        columns |= estimate.diagnostics
        table = torch.stack([torch.arange(len(x)), *(column.double().cpu() for column in columns.values())], dim=1)
        header = ",".join(("datum", *columns))
        np.savetxt(out, table, delimiter=",", fmt=["%d"] + ["%.9g"] * len(columns), comments="", header=header)
        print(f"per datum: {out}")
    print(f"{split}: {estimate}")
    if is_discrete(vae) and method.relation == "=":
        print(f"{bits_per_dim(estimate.value, x.shape[1:]).mean().item():.4f} bits per dimension, of {x[0].numel():,}")
