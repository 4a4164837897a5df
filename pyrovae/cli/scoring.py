"""``pyrovae evaluate``."""

import math
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyrovae.cli.common import (
    SplitName,
    advice_as_options,
    check_device,
    chosen_method,
    data_to_score,
    default_method,
    is_discrete,
    load_run_and_data,
    new_file,
    per_step,
    programs_of,
    unit_of,
    write_columns,
)
from pyrovae.cli.labels import arguments_of, note_on
from pyrovae.cli.text import per_word
from pyrovae.distributed import init_process_group
from pyrovae.estimators import Estimate, Estimator, ImportanceSampling, log_marginal
from pyrovae.likelihoods import bits_per_dim
from pyrovae.structures import SemiSupervisedVAE, SequenceVAE

_NUM_USUAL = 200  # data on which the usual number is computed


def evaluate(
    run: str,
    split: SplitName = "test",
    method: Estimator | None = None,
    num_samples: int | None = None,
    seconds: float | None = None,
    check: int = 0,
    num_data: int | None = None,
    output: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    max_memory: float = 64e6,
    seed: int = 0,
    device: str = "cpu",
    compile: bool | Literal["auto"] = "auto",
    quiet: bool = False,
    trust: bool = False,
) -> None:
    """Estimates log p(x) of each datum under a trained run, by stages of estimators until it can be trusted.

    Beside it stands the usual number, by 5,000 importance samples of the guide, on some of the data.

    Args:
        run: the run directory.
        split: the split of the data to score.
        method: the class of another estimator, one of pyrovae.estimators; UntilTrusted by default.
        num_samples: importance samples of the guide per datum, instead of stages; of sequences, filters. For other
            methods use --method.num_samples.
        seconds: budget of time of the stages, to which the second estimates and the usual number add theirs; null for
            no limit. Data for which it does not suffice are not trusted.
        check: number of data, drawn at random, to estimate a second time by long annealing from the prior.
        num_data: score only this many data, the first of the split; all by default.
        output: a .csv file for the results of each datum: estimate, standard error, effective sample size, k-hat,
            whether it can be trusted, what else the method gives, and its row in the file or the number of its sound.
        data: another data set of the same shape to score; that of the run by default.
        data_root: the directory of the images; that of the run by default.
        max_memory: memory for intermediate results, in bytes.
        seed: seed of the samples.
        device: cpu, cuda, cuda:1, ...; with cuda, each process of torchrun takes a GPU of its own.
        compile: score by code that a compiler makes, which takes some seconds. auto, the default, plays traced
            operations back, which gives the same bits as false, in less time.
        quiet: print the results alone, without progress bars.
        trust: allow the configuration of the run to name classes outside pyrovae, torch and Pyro, which runs their
            code.
    """
    world = init_process_group(device)
    out = None if output is None else world.broadcast_from_rank0(lambda: new_file(output, (".csv",)))
    if num_data is not None and num_data < 1:
        raise ValueError(f"num_data must be at least 1, got {num_data}.")
    is_default = method is None and num_samples is None
    if not is_default and (seconds is not None or check):
        raise ValueError("--seconds and --check are for the default method: leave out --method and --num-samples.")
    check_device(device)
    vae, splits, preprocessing = load_run_and_data(run, data, data_root, trust)
    if isinstance(vae, SequenceVAE) and (seconds is not None or check):
        raise ValueError("--seconds and --check are for stages of estimators; sequences are filtered. Leave them out.")
    method = chosen_method(method, num_samples, default_method(vae, seconds, check))
    pyro.set_rng_seed(seed)
    vae.to(device)
    part = data_to_score(splits, split, preprocessing, num_data, device)
    args = arguments_of(vae, part, splits.schema)
    estimate = log_marginal(
        *programs_of(vae, method), *args, method=method, max_memory=max_memory, compile=compile, progress=not quiet
    )
    if out is not None and world.is_rank0:
        names = ("value", "standard_error", "ess", "khat", "trusted")
        rows = {} if part.rows is None else {"row": part.rows}
        columns = {"datum": torch.arange(len(part.x)), **{name: getattr(estimate, name) for name in names}}
        write_columns(columns | estimate.diagnostics | rows, out)
        print(f"per datum: {out}")
    print(advice_as_options(f"{split}: {estimate}{note_on(vae, splits.schema)}"))
    if isinstance(vae, SequenceVAE):
        print(per_step(estimate, int(args[1].sum()), unit_of(splits)))
        return
    if is_default:
        print(_usual_number(vae, args, estimate, max_memory))
    if splits.vocabulary is not None:
        print(per_word(estimate.value.cpu(), part.x.cpu(), splits.vocabulary))
        return
    # A row has columns of different kinds, and a joint log p(x, label) is of more than the dimensions of x.
    is_of_x = splits.schema is None and not isinstance(vae, SemiSupervisedVAE)
    if is_of_x and is_discrete(vae) and method.relation == "=":
        bits = bits_per_dim(estimate.value, part.x.shape[1:]).mean().item()
        print(f"{bits:.4f} bits per dimension, of {part.x[0].numel():,}")


def _usual_number(vae: Any, args: tuple[Tensor, ...], estimate: Estimate, max_memory: float) -> str:
    """Returns a line with what most papers report, on some of the data, and how far it is off."""
    n = len(estimate.value)
    rows = torch.linspace(0, n - 1, min(_NUM_USUAL, n), device=args[0].device).round().long()
    few, method = (t[rows] for t in args), ImportanceSampling(5000)
    usual = log_marginal(vae.model, vae.guide, *few, method=method, max_memory=max_memory, progress=False)
    difference = (usual.value - estimate.value[rows]).double()
    error = difference.std().item() / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    untrusted = int((~usual.trusted).sum())
    return (
        f"the usual number, 5,000 importance samples of the guide, is off by {difference.mean().item():+.3f} nats "
        f"(standard error: {error:.3f})\non {len(rows):,} of these data; not to be trusted: {untrusted:,} of them"
    )
