"""Configurations of runs: from names of classes and their arguments, as in a run's ``config.yaml``, to a VAE."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import nn

from pyrovae.data import Schema
from pyrovae.encoders import Encoder
from pyrovae.likelihoods import Likelihood, Tabular
from pyrovae.nn import Shape
from pyrovae.priors import Prior
from pyrovae.structures import MissingDataVAE, TableFeatures
from pyrovae.vae import VAE

# The entries of a configuration that name classes, and arguments of these.
PARTS = ("prior", "likelihood", "encoder", "loss", "optimizer", "scheduler")

# Packages that have another name now than in the configurations of earlier versions.
_RENAMED_PACKAGES = {"pyrovae.latents": "pyrovae.distributions", "pyrovae.graphs": "pyrovae.compilation.api"}
# All public names of these packages are trusted: kernels, schedules and the like are not torch modules.
_TRUSTED_PACKAGES = ("pyrovae.priors", "pyrovae.bounds", "pyrovae.regularizers")
_TRUSTED_BASES = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, pyro.infer.ELBO)


def make_vae(
    x_shape: Shape,
    latent_dim: int,
    prior: Callable[[int], Prior],
    likelihood: Callable[[int, Shape], Likelihood],
    encoder: Callable[[Shape, int], Encoder],
) -> VAE:
    """Returns the VAE of these parts, with new weights.

    Args:
        x_shape: shape of a datum.
        latent_dim: number of latent dimensions.
        prior: called with `latent_dim`, or with the encoder if its first argument has this name, as that of a
            VampPrior.
        likelihood: called with `latent_dim` and `x_shape`.
        encoder: called with `x_shape` and `latent_dim`.
    """
    p, q = likelihood(latent_dim, x_shape), encoder(x_shape, latent_dim)
    return VAE(_make_prior(prior, latent_dim, q), p, q)


def make_table_vae(
    schema: Schema,
    latent_dim: int,
    prior: Callable[[int], Prior],
    likelihood: Callable[..., Likelihood],
    encoder: Callable[[Shape, int], Encoder],
) -> MissingDataVAE:
    """Returns the VAE of the rows of a table, with new weights; see :func:`make_vae` and :func:`structures.table_vae`.

    Args:
        schema: the columns.
        latent_dim: number of latent dimensions.
        prior: as for :func:`make_vae`.
        likelihood: called with `latent_dim` and the modelled columns.
        encoder: called with the number of features of a row and `latent_dim`.
    """
    features = TableFeatures(schema.modelled)
    p, q = likelihood(latent_dim, schema.modelled), encoder(features.num_features, latent_dim)
    return MissingDataVAE(_make_prior(prior, latent_dim, q), p, q, features)


def build_vae(config: dict[str, Any], x_shape: tuple[int, ...], schema: Schema | None = None) -> VAE | MissingDataVAE:
    """Returns the VAE that a configuration describes, with new weights; see :func:`make_vae`.

    Args:
        config: the configuration.
        x_shape: shape of a datum.
        schema: the columns of a table; None for other data.
    """
    from jsonargparse import ArgumentParser  # slow to import

    names = ("latent_dim", "prior", "likelihood", "encoder")
    parser = ArgumentParser()
    parser.add_function_arguments(make_vae, skip={"x_shape"})
    made = parser.instantiate(parser.parse_object({name: config[name] for name in names}))
    parts = {name: made[name] for name in names}
    return make_vae(x_shape, **parts) if schema is None else make_table_vae(schema, **parts)


def is_tabular(likelihood: Any) -> bool:
    """Returns whether a likelihood, or a callable that builds one, is that of the rows of a table."""
    cls = _class_of(likelihood)
    return isinstance(cls, type) and issubclass(cls, Tabular)


def _class_of(part: Any) -> Any:
    # jsonargparse gives a partial of a function of its own, which has the class among its arguments.
    return next((a for a in getattr(part, "args", ()) if isinstance(a, type)), getattr(part, "func", part))


def _make_prior(prior: Callable[..., Prior], latent_dim: int, encoder: Encoder) -> Prior:
    first = next(iter(inspect.signature(_class_of(prior)).parameters))
    return prior(encoder if first == "encoder" else latent_dim)


def with_current_names(config: Any) -> Any:
    """Returns a configuration with the present names of classes and functions of pyrovae that have moved."""
    if isinstance(config, dict):
        return {key: with_current_names(value) for key, value in config.items()}
    if isinstance(config, list):
        return [with_current_names(value) for value in config]
    return _current_name(config) if isinstance(config, str) and config.startswith("pyrovae.") else config


def _current_name(name: str) -> str:
    """Returns the public name of what a name meant in an earlier version; a name that can be imported as it is stays.

    >>> _current_name("pyrovae.latents.spheres.VonMisesFisher")
    'pyrovae.distributions.VonMisesFisher'
    """
    module, _, attribute = name.rpartition(".")
    package = ".".join(module.split(".")[:2])
    if package not in _RENAMED_PACKAGES and hasattr(sys.modules.get(module), attribute):
        return name
    package = _RENAMED_PACKAGES.get(package, package)
    return f"{package}.{attribute}" if hasattr(sys.modules.get(package), attribute) else name


def untrusted_names(config: dict[str, Any]) -> list[str]:
    """Returns the strings in the parts of a configuration that may name code outside pyrovae, torch and Pyro.

    Nothing is imported.
    """
    return [
        name
        for name in _strings({part: config[part] for part in PARTS if not config.get("built")})
        if not is_trusted(name)
    ]


def _strings(value: Any) -> list[str]:
    """Returns all strings that may name code. The name of a Pyro site, a word without a dot, does not."""
    if isinstance(value, dict):
        names_site = isinstance(value.get("site"), str) and value["site"].isidentifier()
        return [s for k, v in value.items() if not (k == "site" and names_site) for s in _strings(v)]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []


def is_trusted(name: str) -> bool:
    """Returns whether a name is of a part, an optimizer, a schedule or an ELBO that is already imported."""
    module, _, attribute = name.rpartition(".")
    if module in _TRUSTED_PACKAGES and attribute in sys.modules[module].__all__:
        return True
    cls = getattr(sys.modules.get(module), attribute, None)
    return (
        isinstance(cls, type)
        and issubclass(cls, _TRUSTED_BASES)
        # Both the name and the module that defines the class: a module may import a class from elsewhere.
        and {path.split(".")[0] for path in (module, cls.__module__)} <= {"pyrovae", "torch", "pyro"}
    )
