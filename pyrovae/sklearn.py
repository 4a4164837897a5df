"""A VAE of a table as an estimator of scikit-learn: density, embedding, reconstruction.

``import pyrovae`` does not import this module, because scikit-learn is slow to import.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pyrovae import encoders, likelihoods, nn, priors
from pyrovae.distributions import center
from pyrovae.inference.weights import log_weights
from pyrovae.training import History, fit
from pyrovae.vae import VAE

__all__ = ["VariationalAutoencoder"]

_ELEMENTS = 2**22  # samples times elements of data that are scored at once


class VariationalAutoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A VAE of a table with real columns, for pipelines, grid search and detection of unusual rows.

    .. math:: x = m + s \odot u, \qquad p(u) = \int \mathcal{N}(z; 0, I)\, p(u \mid z)\, dz, \qquad
        \log p(x) = \log p(u) - \textstyle\sum_d \log s_d

    with the means m and the standard deviations s of the columns of the training data; a constant column has s = 1. All
    computations are in double precision.

    Args:
        n_components: number of latent dimensions.
        hidden: widths of the hidden layers of the encoder and the decoder.
        likelihood: called with the numbers of latent dimensions and of columns to make :math:`p(u \mid z)`; by default
            a :class:`~pyrovae.likelihoods.Normal` with one standard deviation for each column and a network with
            `hidden`.
        max_iter: epochs, at most.
        batch_size: rows in a step.
        learning_rate: of Adam.
        validation_fraction: share of the rows that are set aside to stop training, when it is early enough; 0 to train
            for `max_iter` epochs on all rows.
        n_iter_no_change: epochs without a lower validation loss after which training stops; the weights of the best
            epoch are kept.
        n_samples: importance samples of each row for :meth:`score_samples`.
        random_state: seed, generator of NumPy, or None.

    Attributes:
        vae_: the :class:`pyrovae.VAE` of u.
        n_iter_: number of epochs that were trained.
        history_: the :class:`pyrovae.History` of training.
        mean_: m, shape ``(n_features_in_,)``.
        scale_: s, shape ``(n_features_in_,)``.
        n_features_in_: number of columns.
        feature_names_in_: names of the columns, if they have names.

    Raises:
        ValueError: when a parameter is out of range, or rows hold something else than finite numbers.

    References:
        Auto-Encoding Variational Bayes, D. P. Kingma and M. Welling, 2014, https://arxiv.org/abs/1312.6114;
        Importance Weighted Autoencoders, Y. Burda, R. Grosse and R. Salakhutdinov, 2016,
        https://arxiv.org/abs/1509.00519.

    >>> from sklearn.datasets import load_wine
    >>> X = load_wine().data
    >>> vae = VariationalAutoencoder(n_components=2, max_iter=5, random_state=0).fit(X)
    >>> vae.transform(X).shape, vae.score_samples(X).shape, vae.sample(3).shape
    ((178, 2), (178,), (3, 13))
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden: Sequence[int] = (64, 64),
        likelihood: Callable[[int, int], likelihoods.Likelihood] | None = None,
        max_iter: int = 500,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 30,
        n_samples: int = 100,
        random_state: Any = None,
    ):
        self.n_components = n_components
        self.hidden = hidden
        self.likelihood = likelihood
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.n_samples = n_samples
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> "VariationalAutoencoder":
        """Trains the VAE on rows; `y` is not used. Returns the estimator."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self._check_parameters()
        random = check_random_state(self.random_state)
        self._seed = int(random.randint(2**31 - 1))
        self.mean_ = X.mean(0)
        self.scale_ = X.std(0)
        # Rounding makes the deviation of a constant column a tiny number.
        self.scale_[self.scale_ <= 10 * np.finfo(np.float64).eps * np.abs(self.mean_)] = 1.0
        u = (X - self.mean_) / self.scale_
        num_validation = int(self.validation_fraction * len(u))
        order = random.permutation(len(u))
        validation, train = u[order[:num_validation]], u[order[num_validation:]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self.vae_ = self._make(u.shape[1])
            self.history_: History = fit(
                self.vae_.model,
                self.vae_.guide,
                train,
                epochs=self.max_iter,
                batch_size=self.batch_size,
                optimizer=partial(torch.optim.Adam, lr=self.learning_rate),
                validation=validation if num_validation else None,
                patience=self.n_iter_no_change if num_validation else None,
                progress=False,
            )
        self.n_iter_ = len(self.history_)
        self._forget()
        self._n_features_out = self.n_components
        return self

    @torch.no_grad()
    def transform(self, X: Any) -> np.ndarray:
        r"""Returns the means of :math:`q(z \mid x)`, shape ``(rows, n_components)``."""
        u = self._scaled(X)  # checks that it is fitted
        return self.vae_.encode(u).mean.numpy()

    @torch.no_grad()
    def inverse_transform(self, X: Any) -> np.ndarray:
        r"""Returns the means of :math:`p(x \mid z)` in the units of the columns, at latents."""
        check_is_fitted(self)
        z = np.asarray(X, np.float64)
        if z.ndim != 2 or z.shape[1] != self.n_components:
            raise ValueError(f"X must be latents of shape (rows, {self.n_components}), got {z.shape}.")
        return self._in_units(center(self.vae_.decode(torch.from_numpy(z.copy()))))

    @torch.no_grad()
    def score_samples(self, X: Any) -> np.ndarray:
        r"""Returns :math:`\log p(x)` in nats and in the units of the columns, shape ``(rows,)``, higher for usual rows.

        It is estimated by importance sampling with the encoder, which is below the truth on average, and less so with
        more `n_samples`. All rows share the same noise, so that the score of a row does not depend on the others.
        """
        u = self._scaled(X)
        size = max(1, _ELEMENTS // (self.n_samples * u.shape[1]))
        scores = []
        for part in u.split(size):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                log_w = log_weights(self.vae_.model, self._guide, part, num_samples=self.n_samples)
            scores.append(log_w.logsumexp(0) - np.log(self.n_samples))
        self._forget()
        return torch.cat(scores).numpy() - np.log(self.scale_).sum()

    def score(self, X: Any, y: Any = None) -> float:
        r"""Returns the mean of :math:`\log p(x)` over rows, in nats; `y` is not used."""
        return float(self.score_samples(X).mean())

    @torch.no_grad()
    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draws rows from p(x), shape ``(n_samples, n_features_in_)``; again the same ones with the same seed."""
        check_is_fitted(self)
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
        random = check_random_state(self.random_state if random_state is None else random_state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.randint(2**31 - 1)))
            return self._in_units(self.vae_.sample(n_samples))

    def _check_parameters(self) -> None:
        for name in ("n_components", "max_iter", "batch_size", "n_iter_no_change", "n_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be from 0 to below 1, got {self.validation_fraction}.")

    def _make(self, num_columns: int) -> VAE:
        network = partial(nn.MLP, hidden=tuple(self.hidden))
        likelihood = self.likelihood or partial(likelihoods.Normal, network=network, per_dimension=True)
        return VAE(
            priors.StandardNormal(self.n_components),
            likelihood(self.n_components, num_columns),
            encoders.DiagonalNormal(num_columns, self.n_components, network=network),
        ).double()

    def _scaled(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return torch.from_numpy((X - self.mean_) / self.scale_)

    def _in_units(self, u: Tensor) -> np.ndarray:
        return self.mean_ + self.scale_ * u.numpy()

    def _guide(self, u: Tensor) -> None:
        q = self.vae_.encode(u).base_dist
        with pyro.plate("data", len(u)):
            pyro.sample("z", _SharedNoise(q.loc, q.scale).to_event(1))

    def _forget(self) -> None:
        """Removes the parameters from Pyro's store, which would keep those of every fit of a search."""
        store = pyro.get_param_store()
        for name in [name for name in store if name.startswith(f"{self.vae_.name}$$$")]:
            del store[name]


class _SharedNoise(dist.Normal):
    """A normal distribution of vectors, ``(*leading, rows, dim)``, whose draws have the same noise in all rows."""

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(*shape[:-2], 1, shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.scale * noise

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)
