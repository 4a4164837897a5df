"""What ``pyrovae train`` chooses for tables and for sequences of numbers, where the command line says nothing."""

from typing import Any

NETWORK = {"class_path": "pyrovae.nn.GatedMLP", "init_args": {"hidden": [256, 256]}}
LIKELIHOOD: dict[str, Any] = {"class_path": "pyrovae.likelihoods.Tabular", "init_args": {"network": NETWORK}}


def table_defaults(num_rows: int, num_columns: int, epochs: int | None = None) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` that suit a table of this size, as a configuration holds them.

    The prior, the networks and the number of steps were chosen by log p(x) and by classifiers on the test rows of the
    Adult data; small tables have more epochs and smaller batches, so that they too have some thousand steps.

    Args:
        num_rows: rows to train on.
        num_columns: columns that are modelled.
        epochs: passes over the data, over which the learning rate falls to 0; None for what suits the table.
    """
    epochs = min(500, max(20, 1_500_000 // num_rows)) if epochs is None else epochs
    return {
        "preprocessing": "grey",
        "latent_dim": min(16, max(2, num_columns)),
        "prior": {"class_path": "pyrovae.priors.GaussianMixture"},
        "likelihood": LIKELIHOOD,
        "encoder": {"class_path": "pyrovae.encoders.DiagonalNormal", "init_args": {"network": NETWORK}},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3, "fused": True}},
        "scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": epochs}},
        "epochs": epochs,
        "patience": max(10, epochs // 5),
        "batch_size": min(256, max(16, num_rows // 20)),
        "clip_norm": 10.0,
    }


def student_t(hidden: int, scale: float) -> dict[str, Any]:
    """Returns a likelihood of real numbers with a scale and tails for each, as a configuration holds it.

    Args:
        hidden: units of the layer of its network.
        scale: of the numbers given the latents at the start.
    """
    network = {"class_path": "pyrovae.nn.MLP", "init_args": {"hidden": [hidden]}}
    arguments = {"network": network, "scale": scale, "per_dimension": True}
    return {"class_path": "pyrovae.likelihoods.StudentT", "init_args": arguments}


def recurrent_defaults(
    likelihood: dict[str, Any],
    *,
    epochs: int,
    warm_up: int,
    batch_size: int,
    patience: int,
    latent_dim: int,
    width: int,
    hidden: int,
) -> dict[str, Any]:
    """Returns settings of ``pyrovae train`` for a recurrent VAE, as a configuration holds them.

    Args:
        likelihood: of a step.
        epochs: passes over the data.
        warm_up: epochs over which the weight of the KL divergence rises.
        batch_size: sequences of a step.
        patience: epochs without a lower validation loss before training stops.
        latent_dim: latents of a step of time.
        width: units of the memory.
        hidden: units of the layer of the prior and of the encoder.
    """
    network = {"class_path": "pyrovae.nn.MLP", "init_args": {"hidden": [hidden]}}
    beta = {"class_path": "pyrovae.bounds.Linear", "init_args": {"epochs": warm_up}}
    return {
        "preprocessing": "grey",
        "latent_dim": latent_dim,
        "structure": {"class_path": "pyrovae.structures.Recurrent", "init_args": {"width": width}},
        "prior": {"class_path": "pyrovae.priors.DiagonalNormal", "init_args": {"network": network}},
        "likelihood": likelihood,
        "encoder": {"class_path": "pyrovae.encoders.DiagonalNormal", "init_args": {"network": network}},
        "loss": {"class_path": "pyrovae.bounds.ELBO", "init_args": {"beta": beta}},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-3, "fused": True}},
        "epochs": epochs,
        "patience": patience,
        "batch_size": batch_size,
        "clip_norm": 10.0,
    }
