"""Sparse matrices of scipy as data: to the bit what dense data give, a batch at a time."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pytest
import torch
from scipy import sparse

import pyrovae
from pyrovae import VAE, diagnostics, encoders, likelihoods, priors
from pyrovae.rows import Rows


def counts(num_data: int = 40, width: int = 6) -> np.ndarray:
    x = np.random.RandomState(0).poisson(0.7, (num_data, width))
    x[3] = 0  # a row without entries
    return x


def make_vae(x_shape: int = 6, context_dim: int = 0, likelihood=likelihoods.Multinomial) -> VAE:
    pyro.set_rng_seed(0)
    return VAE(
        priors.StandardNormal(2),
        likelihood(2, x_shape, context_dim=context_dim),
        encoders.DiagonalNormal(x_shape, 2, context_dim=context_dim),
    )


def stored_twice(x: np.ndarray) -> sparse.csr_array:
    """Returns a matrix whose entries are stored in parts, out of order, with zeros among them."""
    rows, columns = x.nonzero()
    order = np.random.RandomState(1).permutation(len(rows))
    order = order[np.argsort(rows[order], kind="stable")]
    data = np.stack([x[rows, columns][order] - 1, np.ones(len(rows))], axis=1).astype(np.float32).flatten()
    starts = 2 * np.searchsorted(rows[order], np.arange(len(x) + 1))
    matrix = sparse.csr_array((data, np.repeat(columns[order], 2), starts), x.shape)
    assert not matrix.has_canonical_format and (matrix.data == 0).any()
    return matrix


FORMS = {
    "csr_array": sparse.csr_array,
    "csr_matrix": sparse.csr_matrix,
    "csc_array": sparse.csc_array,
    "coo_array": sparse.coo_array,
    "coo_matrix": sparse.coo_matrix,
    "lil_array": sparse.lil_array,
    "dok_matrix": sparse.dok_matrix,
    "bsr_array": sparse.bsr_array,
    "dia_array": sparse.dia_array,
    "float64": lambda x: sparse.csr_array(x.astype(np.float64)),
    "float32": lambda x: sparse.csr_matrix(x.astype(np.float32)),
    "bytes": lambda x: sparse.csr_array(x.astype(np.uint8)),
    "small integers": lambda x: sparse.csr_array(x.astype(np.int8)),
    "stored in parts": stored_twice,
    "rows": lambda x: Rows(sparse.csr_array(x)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_sparse_matrix_gives_what_a_dense_tensor_gives(form):
    x = counts()
    given, tensor = FORMS[form](x), torch.from_numpy(x).float()
    before = given.toarray() if sparse.issparse(given) else given[:]

    def results(data) -> list[torch.Tensor]:
        vae = make_vae()
        history = pyrovae.fit(vae.model, vae.guide, data, epochs=2, batch_size=16, validation=data, progress=False)
        weights = [p.detach() for p in vae.parameters()]
        score = pyrovae.log_marginal(vae.model, vae.guide, data, num_samples=25, progress=False)
        log_w = pyrovae.log_weights(vae.model, vae.guide, data, num_samples=2).detach()
        collapse = diagnostics.collapse(vae.model, vae.guide, data, progress=False).kl
        code, rebuilt = vae.encode(data).mean.detach(), vae.reconstruct(data)
        losses = torch.tensor(history["loss"] + history["validation"])
        return [*weights, losses, score.value, score.khat, log_w, collapse, code, rebuilt]

    for found, expected in zip(results(given), results(tensor), strict=True):
        assert found.dtype == expected.dtype and found.equal(expected)
    after = given.toarray() if sparse.issparse(given) else given[:]
    assert (np.asarray(before) == np.asarray(after)).all(), "the data are as before"


def test_pairs_keywords_and_contexts_may_be_sparse():
    x, context = counts(), np.eye(40, 3)
    vae = make_vae(context_dim=3)
    dense = torch.from_numpy(x).float(), torch.from_numpy(context).float()
    mixed = [
        (sparse.csr_array(x), sparse.coo_matrix(context)),
        (x, sparse.csr_array(context)),
        pyrovae.Arguments(sparse.csr_array(x), sparse.csr_array(context)),
    ]

    def losses(data) -> list[float]:
        vae = make_vae(context_dim=3)
        return pyrovae.fit(vae.model, vae.guide, data, epochs=2, batch_size=16, progress=False)["loss"]

    assert all(losses(data) == losses(dense) for data in mixed)
    assert vae.encode(*mixed[0]).mean.equal(vae.encode(*dense).mean)
    assert vae.encode(sparse.csr_array(x), context=mixed[0][1]).mean.equal(vae.encode(*dense).mean)

    def loss_of(data) -> float:
        vae = make_vae()
        return pyrovae.fit(vae.model, vae.guide, data, epochs=1, progress=False)["loss"][0]

    assert loss_of(pyrovae.Arguments(x=sparse.csr_array(x))) == loss_of(dense[0])


def test_double_precision_and_a_model_of_integers():
    vae, x = make_vae().double(), counts()
    pyro.set_rng_seed(0)
    first = pyrovae.log_marginal(vae.model, vae.guide, sparse.csr_array(x), num_samples=3, progress=False).value
    pyro.set_rng_seed(0)
    second = pyrovae.log_marginal(vae.model, vae.guide, torch.from_numpy(x).double(), num_samples=3, progress=False)
    assert first.dtype == torch.double and first.equal(second.value)

    def model(x):
        assert x.dtype == torch.int64
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0, 1))
            pyro.sample("x", pyro.distributions.Poisson(z.exp().unsqueeze(-1).expand(-1, 6)).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(loc, 1.0))

    pyrovae.fit(model, guide, sparse.csr_array(x), epochs=1, progress=False)


def test_a_likelihood_starts_at_a_sparse_matrix():
    x = counts()
    started = []
    for data in (sparse.csr_array(x), x, Rows(sparse.csc_matrix(x)), torch.from_numpy(x).float()):
        likelihood = likelihoods.Multinomial(2, 6).start_at(data)
        started.append(next(p for name, p in reversed(list(likelihood.named_parameters())) if "bias" in name))
    assert all(bias.equal(started[-1]) for bias in started)


def test_rows_of_a_sparse_matrix():
    x = counts()
    rows = Rows(sparse.csr_matrix(x), torch.float32)
    dense = torch.from_numpy(x).float()
    assert (len(rows), rows.shape) == (40, (40, 6)) and repr(rows) == "Rows(40 of shape (6,), float32)"
    mask = np.arange(40) % 3 == 0
    for index in (slice(2, 9), slice(None, None, 3), slice(0, 0), 5, -1, [3, 1, 1], mask, torch.tensor([7, 3])):
        assert rows[index].equal(dense[index])
    part = rows.select(mask).select(slice(1, 5))
    assert part[:].equal(dense[mask][1:5]) and part[[2, 0]].equal(dense[mask][1:5][[2, 0]])
    assert torch.cat([chunk for _, chunk in rows.chunks()]).equal(dense)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (sparse.csr_array(np.array([[0, 1.0], [math.nan, 0]])), "data holds NaN or infinity.*the first of them row 1"),
        (sparse.csr_array(np.array([[0, 1.0], [0, -math.inf]])), "data holds NaN or infinity.*the first of them row 1"),
        (sparse.csr_array(np.array([[0, 1.0], [1e300, 0]])), "data holds NaN or infinity, or numbers beyond float32"),
        (sparse.csr_array(np.array([[0, 2**24]])), "data holds integers of 16777216 or more"),
        (sparse.csr_array(np.array([[0, -(2**63)]])), "data holds integers of 16777216 or more"),
        (sparse.csr_array(np.array([[0, 1j]])), "must have two dimensions, a row a datum, and hold real numbers"),
        (sparse.coo_array(np.array([1.0, 2.0])), r"hold real numbers; got shape \(2,\)"),
        (sparse.csr_array((0, 2)), "data: argument 1 is empty"),
        ((sparse.csr_array(np.eye(3, 2)), torch.zeros(2, 2)), "argument 1 has 3 rows but argument 2 has 2"),
        (sparse.csr_array(np.array([[0, 0.5]])), "support"),
        (sparse.csr_array(np.array([[0, -1.0]])), "support"),
    ],
)
def test_what_dense_data_may_not_hold_is_refused(data, message):
    vae = make_vae(2, likelihood=likelihoods.Poisson)
    with pytest.raises(ValueError, match=message):
        pyrovae.fit(vae.model, vae.guide, data, epochs=1, progress=False)


def test_a_large_matrix_is_never_dense_as_a_whole():
    # 8 GB if it were dense. The peak of memory is measured in a process of its own, after a first small fit.
    code = """
        import resource
        import numpy as np, pyro, pyrovae, torch
        from scipy import sparse
        from pyrovae import VAE, encoders, likelihoods, nn, priors
        from functools import partial

        torch.set_num_threads(1)
        num_data, width = 200_000, 10_000
        columns = np.random.RandomState(0).randint(width, size=num_data)
        x = sparse.csr_array((np.ones(num_data, np.float32), columns, np.arange(num_data + 1)), (num_data, width))
        pyro.set_rng_seed(0)
        network = partial(nn.MLP, hidden=())
        vae = VAE(priors.StandardNormal(1), likelihoods.Multinomial(1, width, network),
                  encoders.DiagonalNormal(width, 1, network))
        before = None

        class Stop(Exception):
            pass

        steps = []
        def transform(batch):
            steps.append(batch.shape)
            if len(steps) == 5:
                raise Stop
            return batch

        pyrovae.fit(vae.model, vae.guide, x[:256], epochs=1, progress=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            pyrovae.fit(vae.model, vae.guide, x, epochs=1, transform=transform, progress=False)
        except Stop:
            pass
        assert steps[-1] == (128, width), steps
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 200_000  # kilobytes
