"""``pyrovae train``."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pyro
import torch
from pyro.infer import ELBO
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from pyrovae import data as datasets
from pyrovae import diagnostics, storage
from pyrovae.cli.common import MEANS, Preprocessing, check_device, default_run, is_discrete, load_splits, prior_means
from pyrovae.config import make_vae
from pyrovae.distributed import init_process_group
from pyrovae.encoders import DiagonalNormal, Encoder
from pyrovae.estimators import Estimate, independent_baseline, log_marginal
from pyrovae.likelihoods import Bernoulli, Likelihood
from pyrovae.nn import Shape
from pyrovae.priors import Prior, StandardNormal
from pyrovae.training import Callback, History, MetricsFile, fit
from pyrovae.vae import VAE

_NUM_MONITORED = 300  # validation data in which training measures whether the latents collapse


def train(
    data: str = "digits",
    run: str | None = None,
    data_root: str = "data",
    preprocessing: Preprocessing = "dynamic",
    latent_dim: int = 16,
    prior: Callable[[int], Prior] = StandardNormal,
    likelihood: Callable[[int, Shape], Likelihood] = Bernoulli,
    encoder: Callable[[Shape, int], Encoder] = DiagonalNormal,
    loss: ELBO | None = None,
    optimizer: Callable[[Iterable], Optimizer] = lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    epochs: int = 500,
    batch_size: int = 128,
    patience: int | None = 50,
    clip_norm: float | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    compile: bool = False,
    resume: bool = False,
    trust: bool = False,
    *,
    config: str = "",
) -> None:
    """Trains a VAE on a data set, scores it on the test split, and writes the results to a run directory.

    Args:
        data: the name of a data set (listed at the end of this help), or a .npy, .npz or .csv file.
        run: the run directory; runs/<data> by default. An existing directory is never overwritten.
        data_root: the directory of the images, which are downloaded to it if needed.
        preprocessing: what to do with values between 0 and 1. grey: nothing (also for tables); static: binarise all
            data once; dynamic: binarise the training data again for each batch, and the other splits once.
        latent_dim: number of latent dimensions.
        prior: the class of p(z).
        likelihood: the class of p(x | z).
        encoder: the class of q(z | x).
        loss: the class of the training objective, such as one of pyrovae.bounds; Pyro's Trace_ELBO by default.
        optimizer: the class of the optimizer.
        scheduler: the class of a learning-rate schedule, which steps once per epoch.
        epochs: passes over the training data.
        batch_size: data per step.
        patience: stop when the validation loss has not improved for this many epochs; null to never stop early.
        clip_norm: largest norm of the gradient over all parameters; null for no limit.
        num_samples: importance samples per datum for the test log p(x).
        seed: seed of the weights, the batches and the noise.
        device: cpu, cuda, cuda:1, ...; with cuda, each process of torchrun takes a GPU of its own.
        compile: train and score by compiled graphs, which take some seconds to make.
        resume: continue the run in the run directory with its configuration, or start it if there is none. Only epochs
            (to a larger number), patience, num_samples, data_root and device may be changed.
        trust: allow the configuration of a resumed run to name classes outside pyrovae, torch and Pyro, which runs
            their code.
        config: the configuration as YAML, to be kept in the run directory.
    """
    directory, world = Path(run) if run is not None else default_run(data), init_process_group(device)
    is_taken, is_new = world.broadcast_from_rank0(
        lambda: (directory.exists() and (not directory.is_dir() or any(directory.iterdir())), not directory.exists())
    )
    if is_taken and not resume:
        raise FileExistsError(
            f"{directory} already exists. Continue the run with --resume, or give another place with --run DIRECTORY."
        )
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    check_device(device)
    pyro.set_rng_seed(seed)
    splits, description = load_splits(data, data_root, preprocessing)
    x_shape = tuple(splits.train.x.shape[1:])
    vae = make_vae(x_shape, latent_dim, prior, likelihood, encoder).to(device)
    print(f"{description}\n{vae}\nrun directory: {directory}")

    metrics = MetricsFile(directory / "metrics.jsonl")
    callbacks: list[Callback] = []
    monitored = splits.validation.x[:_NUM_MONITORED].to(device)
    if len(monitored) > 1:
        monitor = diagnostics.CollapseMonitor(vae.model, vae.guide, monitored, every=max(1, epochs // 50))
        callbacks.append(_WherePossible(monitor))
    callbacks.append(metrics)  # the last, because it writes the entries of the others
    if world.is_rank0:
        storage.create_run(directory, config, x_shape)
    try:
        history = fit(
            vae.model,
            vae.guide,
            splits.train.x,
            loss=loss,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
            transform=datasets.dynamic_binarization if preprocessing == "dynamic" else None,
            clip_norm=clip_norm,
            validation=splits.validation.x,
            patience=patience,
            callbacks=callbacks,
            checkpoint=directory / "checkpoint.safetensors",
            resume=resume,
            device=device,
            compile=compile,
        )
    except Exception:
        # Bad input leaves nothing behind.
        if world.is_rank0 and is_new and not (directory / "checkpoint.safetensors").exists():
            for name in ("config.yaml", "run.json"):
                (directory / name).unlink()
            directory.rmdir()
        raise

    vae.eval()
    test = splits.test.x.to(device)
    estimate = log_marginal(vae.model, vae.guide, test, num_samples=num_samples, compile=compile)
    if world.is_rank0:
        storage.save(vae, directory / "weights.safetensors")
        _report_training(vae, splits, history, epochs, estimate, metrics, directory)


def _report_training(
    vae: VAE,
    splits: datasets.Splits,
    history: History,
    epochs: int,
    estimate: Estimate,
    metrics: MetricsFile,
    directory: Path,
) -> None:
    """Writes the metrics and the pictures of a run, and prints its results and what can be done next."""
    if len(history) < epochs:
        print(
            f"stopped after epoch {len(history)}: the validation loss had not improved since epoch "
            f"{history.best_epoch}, whose weights are kept."
        )
    n = len(estimate.value)
    result = {
        "split": "test",
        "log_marginal": estimate.value.mean().item(),
        "standard_error": estimate.standard_error.square().sum().sqrt().item() / n,
        "khat_above_0.7": int((estimate.khat > 0.7).sum()),
        "num_data": n,
        "num_samples": estimate.num_samples,
    }
    scores = f"test: {estimate}"
    # The baseline is a probability for binary data, and a density for all others.
    if is_discrete(vae) == bool(((splits.test.x == 0) | (splits.test.x == 1)).all()):
        name, baseline = independent_baseline(splits.train.x, splits.test.x)
        result["baseline"] = baseline.mean().item()
        scores += f"\n{name}: {result['baseline']:.3f} nats per datum (baseline)"
    metrics.write([*history.records, result])
    _draw(vae, splits, history, directory)
    print(f"\n{history}\n\n{scores}")
    method = re.search(r"method=(\w+)", estimate.remedy)
    options = f"--method {method[1]}" if method else "--num-samples 5000"
    print(f"\npictures, weights and metrics: {directory}\nscore it again: pyrovae evaluate {directory} {options}")
    print(f"what it learned, and where it loses nats: pyrovae diagnose {directory}")


class _WherePossible:
    """A callback that is dropped, with one line that says why, where it is not defined for the parts of a VAE."""

    def __init__(self, callback: Callback):
        self.callback: Callback | None = callback

    def __call__(self, history: History) -> None:
        if self.callback is None:
            return
        try:
            self.callback(history)
        except (ValueError, NotImplementedError) as error:
            tqdm.write(f"whether the latents collapse is not recorded: {error}")
            self.callback = None


@torch.no_grad()
def _draw(vae: VAE, splits: datasets.Splits, history: History, directory: Path) -> None:
    from pyrovae import plots  # matplotlib is slow to import

    device = next(vae.parameters()).device
    x = splits.test.x[:1000].to(device)
    labels = splits.test.labels
    plots.samples(prior_means(vae, 100), directory / "samples.png", MEANS)
    plots.reconstructions(x[:10], vae.reconstruct(x[:10]), directory / "reconstructions.png")
    plots.latent_space(
        vae.encode(x).sample().float(), None if labels is None else labels[:1000], directory / "latent_space.png"
    )
    plots.learning_curve(history, directory / "learning_curve.png")
