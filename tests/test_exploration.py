"""The latent space seen through decoders that are linear, so that every move is known."""

import json
import math

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from helpers import FAILURE_RATE
from linear_gaussian import AFFINE, diagonal_vae, set_affine
from pyro import distributions as dist

from pyrovae import VAE, encoders, likelihoods, priors, structures
from pyrovae.diagnostics import interpolations, latent_map, traversals


def pair(latent_dim: int = 3, x_dim: int = 4):
    vae, x = diagonal_vae(latent_dim, x_dim), torch.randn(50, x_dim).double()
    (layer,) = vae.likelihood.network.layers
    return vae, x, layer.weight.detach(), layer.bias.detach()


@torch.no_grad()
def means(vae, *args):
    return vae.encode(*args).mean


def test_a_dimension_moves_alone_along_its_column():
    vae, x, weight, bias = pair()
    found = traversals(vae.model, vae.guide, x, num_data=4, steps=5)
    z = means(vae, x)
    assert found.dims == z.var(0).argsort(descending=True).tolist() and found.names == [f"z[{d}]" for d in found.dims]
    torch.testing.assert_close(found.latents, z[:4])
    torch.testing.assert_close(found.data, x[:4])
    for i, d in enumerate(found.dims):
        for n in range(4):
            for t in range(5):
                moved = z[n].clone()
                moved[d] = found.values[i, t]
                torch.testing.assert_close(found.decoded[n, i, t], weight @ moved + bias)
    change = weight.norm(dim=0)[found.dims] / 2 * found.values.std(1, correction=0)  # of four elements
    torch.testing.assert_close(found.change, change)
    strongest = found.names[int(change.argmax())]
    assert found.verdict.startswith(strongest) and str(found).splitlines()[2].startswith(strongest)
    named = traversals(vae.model, vae.guide, x, dims=[2, 0], steps=2)
    assert named.names == ["z[2]", "z[0]"] and named.decoded.shape == (2, 2, 2, 4)


def test_a_dimension_goes_over_the_range_of_the_aggregate_posterior():
    """x ~ N(0, 1) and q(z | x) = N(2 x, 0.5^2): 95% of z lie within 1.96 sqrt(4.25)."""
    n = 4000
    vae, x = diagonal_vae(1, 1), torch.randn(n, 1).double()
    raw = math.log(math.expm1(0.5 - 1e-6)) - math.log(math.e - 1)
    set_affine(vae.encoder.network, torch.tensor([[2.0], [0.0]]), torch.tensor([0.0, raw]))
    found = traversals(vae.model, vae.guide, x)
    z = scipy.stats.norm(scale=math.sqrt(4.25))
    # The error of a quantile of n draws; ten draws a datum only make it smaller.
    error = math.sqrt(0.025 * 0.975 / n) / z.pdf(z.ppf(0.025))
    limit = scipy.stats.norm.isf(FAILURE_RATE / 4) * error
    assert abs(found.values[0, 0] - z.ppf(0.025)) < limit and abs(found.values[0, -1] - z.ppf(0.975)) < limit
    torch.testing.assert_close(found.values[0].diff(), found.values[0].diff().mean().expand(8))


def linear_hierarchy() -> structures.HierarchicalVAE:
    return structures.HierarchicalVAE(
        prior=priors.StandardNormal(1),
        conditionals=[encoders.DiagonalNormal(1, 2, AFFINE)],
        likelihood=likelihoods.Normal(2, 3, AFFINE),
        encoders=[encoders.DiagonalNormal(3, 2, AFFINE), encoders.DiagonalNormal(2, 1, AFFINE)],
    ).double()


def test_latents_below_one_that_moves_follow_it_in_their_own_units():
    vae, x = linear_hierarchy(), torch.randn(20, 3).double()
    found = traversals(vae.model, vae.guide, x, dims=[2, 0], num_data=3, steps=4)
    assert found.names == ["z2", "z1[0]"]
    with torch.no_grad():
        z1 = vae.encoders[0](x[:3]).mean
        z2 = vae.encoders[1](z1).mean
        before = vae.conditionals[0](z2)
        for t in range(4):
            after = vae.conditionals[0](found.values[0, t].expand(3, 1))
            followed = after.mean + after.stddev * (z1 - before.mean) / before.stddev
            torch.testing.assert_close(found.decoded[:, 0, t], vae.decode(followed).mean)
            moved = torch.stack([found.values[1, t].expand(3), z1[:, 1]], dim=-1)
            torch.testing.assert_close(found.decoded[:, 1, t], vae.decode(moved).mean)
    assert found.change[0] > 0


def two_sites(x, context):
    with pyro.plate("data", len(x)):
        with pyro.plate("two", 2):
            a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
        b = pyro.sample("b", dist.StudentT(5.0, torch.zeros(3).double(), 1.0).to_event(1))
        columns = torch.broadcast_tensors(a.sum(-2, keepdim=True), b[..., 0], b[..., 2] + context)
        pyro.sample("x", dist.Normal(torch.stack(columns, dim=-1), 1.0).to_event(1), obs=x)


def two_sites_guide(x, context):
    with pyro.plate("data", len(x)):
        with pyro.plate("two", 2):
            pyro.sample("a", dist.Normal(torch.stack([x[:, 0], 2 * x[:, 0]]), 1.0))
        pyro.sample("b", dist.StudentT(5.0, x, 0.5).to_event(1))


def test_sites_by_hand_in_other_plates_and_with_a_context():
    x, context = torch.randn(20, 3).double(), torch.randn(20).double()
    found = traversals(two_sites, two_sites_guide, x, context=context, dims=range(5), num_data=3, steps=4)
    assert found.names == ["a[0]", "a[1]", "b[0]", "b[1]", "b[2]"]
    # The sites are independent, and all that does not move is where it was, with its own context.
    still = torch.stack([3 * x[:3, 0], x[:3, 0], x[:3, 2] + context[:3]], dim=-1)
    for t in range(4):
        expected = still.repeat(5, 1, 1)
        expected[0, :, 0] = found.values[0, t] + 2 * x[:3, 0]
        expected[1, :, 0] = found.values[1, t] + x[:3, 0]
        expected[2, :, 1] = found.values[2, t]
        expected[4, :, 2] = found.values[4, t] + context[:3]
        torch.testing.assert_close(found.decoded[:, :, t], expected.movedim(0, 1))
    assert found.change[3] < 1e-12 and "b[1] hardly at all" in found.verdict
    path = interpolations(two_sites, two_sites_guide, x, context, pairs=[(4, 7)], steps=3)
    middle = (x[4] + x[7]) / 2
    expected = torch.stack([3 * middle[0], middle[0], middle[2] + context[4]])
    torch.testing.assert_close(path.decoded[0, 1], expected)
    torch.testing.assert_close(path.ends[0], x[[4, 7]])


def test_straight_lines_are_straight_and_arcs_keep_their_distance():
    vae, x, weight, bias = pair()
    z = means(vae, x)
    found = interpolations(vae.model, vae.guide, x, pairs=[(0, 1), (0, 7)], steps=5)
    for i, (a, b) in enumerate(found.pairs):
        for k in range(5):
            here = z[a] + k / 4 * (z[b] - z[a])
            torch.testing.assert_close(found.latents[i, k], here)
            torch.testing.assert_close(found.decoded[i, k], weight @ here + bias)
    torch.testing.assert_close(found.detour, torch.ones(2).double())
    torch.testing.assert_close(found.largest_step, torch.full((2,), 0.25).double())
    assert found.verdict == "Smooth: no step is more than 25% of its path (equal steps would be 25% each)."
    assert interpolations(vae.model, vae.guide, x).pairs == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]

    set_affine(vae.encoder.network, torch.cat([torch.eye(3, 4), torch.zeros(3, 4)]), torch.zeros(6))
    unit = torch.nn.functional.normalize(x[:, :3], dim=1)
    arc = interpolations(vae.model, vae.guide, torch.cat([unit, x[:, 3:]], 1), pairs=[(0, 1)], steps=6, spherical=True)
    torch.testing.assert_close(arc.latents.norm(dim=-1), torch.ones(1, 6).double())
    angles = (arc.latents[0, :-1] * arc.latents[0, 1:]).sum(-1).acos()
    torch.testing.assert_close(angles, ((unit[0] @ unit[1]).acos() / 5).expand(5))
    torch.testing.assert_close(arc.latents[0, [0, -1]], unit[:2])
    # Opposite ends have no arc of their own: a line.
    opposite = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]).double()
    line = interpolations(vae.model, vae.guide, opposite, steps=3, spherical=True)
    torch.testing.assert_close(line.latents[0, :, 0], torch.tensor([1.0, 0, -1]).double())


def test_jumps_are_found():
    vae, x = diagonal_vae(1, 1), torch.tensor([[-1.0], [1.0]]).double()
    set_affine(vae.encoder.network, torch.tensor([[1.0], [0.0]]), torch.zeros(2))
    set_affine(vae.likelihood.network, torch.tensor([[1.0]]), torch.zeros(1))

    class Step(torch.nn.Module):
        def forward(self, z):
            return (50 * (z - 0.1)).sigmoid()

    vae.likelihood.network = Step()
    found = interpolations(vae.model, vae.guide, x, steps=9)
    assert "1 of 1 paths jump" in found.verdict
    assert "no step is more than" not in found.verdict and found.detour.item() == pytest.approx(1)


def test_a_decoder_that_ignores_the_latents():
    vae, x, weight, _ = pair()
    set_affine(vae.likelihood.network, torch.zeros_like(weight), torch.ones(4))
    assert "the decoder ignores the latents" in traversals(vae.model, vae.guide, x).verdict
    found = interpolations(vae.model, vae.guide, x)
    assert "the decoder ignores the latents" in found.verdict
    assert json.loads(json.dumps(found.summary(), allow_nan=False))["detour"] == [None] * 5


def test_a_map_has_the_principal_components_and_counts_neighbours():
    vae, x, labels = pair(5, 6)[0], torch.randn(400, 6).double(), torch.randint(3, (400,))
    found = latent_map(vae.model, vae.guide, x, labels=labels)
    z = means(vae, x).numpy()
    values, vectors = np.linalg.eigh(np.cov(z.T))
    scores = (z - z.mean(0)) @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(found.coordinates.abs(), np.abs(scores), rtol=1e-6)  # an axis has no sign
    np.testing.assert_allclose(found.explained, values[::-1][:2] / values.sum())
    distance = ((z[:, None] - z[None]) ** 2).sum(-1) + np.diag(np.full(400, np.inf))
    assert found.agreement == (labels[distance.argmin(1)] == labels).double().mean().item()
    others = [(labels[np.arange(400) != i] == labels[i]).double().mean().item() for i in range(400)]
    assert found.chance == pytest.approx(np.mean(others))
    assert "hardly separate labels" in found.verdict  # which are random
    assert found.grid is None and found.decoded is None
    told = latent_map(vae.model, vae.guide, x, labels=(means(vae, x)[:, 0] > 0).long())
    assert "hardly" not in told.verdict and told.agreement > 0.6


def test_a_plane_is_decoded_from_the_top_left():
    vae, x, weight, bias = pair(2)
    found = latent_map(vae.model, vae.guide, x, points=4)
    torch.testing.assert_close(found.coordinates, means(vae, x))
    assert found.explained.sum().item() == pytest.approx(1)
    horizontal, vertical = found.grid
    assert (horizontal.diff() > 0).all() and (vertical.diff() > 0).all()
    for row, column in ((0, 0), (3, 1)):
        z = torch.stack([horizontal[column], vertical[3 - row]])
        torch.testing.assert_close(found.decoded[row, column], weight @ z + bias)
    line = latent_map(*(lambda v: (v.model, v.guide))(diagonal_vae(1, 4)), x)
    assert (line.coordinates[:, 1] == 0).all() and line.decoded is None
    assert line.verdict == "The map shows the latent dimension."


def test_latents_that_cannot_move_alone_are_refused():
    x = torch.randn(10, 4)
    sphere = VAE(priors.HypersphericalUniform(3), likelihoods.Normal(3, 4), encoders.VonMisesFisher(4, 3))
    with pytest.raises(ValueError, match='latents of site "z" leave their support'):
        traversals(sphere.model, sphere.guide, x)
    with pytest.raises(ValueError, match=r"use interpolations\(..., spherical=True\)"):
        interpolations(sphere.model, sphere.guide, x)
    arcs = interpolations(sphere.model, sphere.guide, x, spherical=True)
    torch.testing.assert_close(arcs.latents.norm(dim=-1), torch.ones(5, 9))
    circle = VAE(priors.HypersphericalUniform(2), likelihoods.Normal(2, 4), encoders.VonMisesFisher(4, 2))
    assert latent_map(circle.model, circle.guide, x).decoded is None
    simplex = VAE(priors.Dirichlet(3), likelihoods.Normal(3, 4), encoders.LogisticNormal(4, 3))
    with pytest.raises(ValueError, match='latents of site "z" leave their support'):
        traversals(simplex.model, simplex.guide, x)
    between = interpolations(simplex.model, simplex.guide, x)
    torch.testing.assert_close(between.latents.sum(-1), torch.ones(5, 9))
    classes = VAE(priors.OneHotCategorical(3), likelihoods.Normal(3, 4), encoders.OneHotCategorical(4, 3))
    for look in (traversals, interpolations, latent_map):
        with pytest.raises(ValueError, match='site "z" is discrete'):
            look(classes.model, classes.guide, x)


def test_arguments_out_of_range_are_refused():
    vae, x, *_ = pair()
    for look, options, message in (
        (traversals, {"steps": 1}, "steps must be at least 2, got 1"),
        (traversals, {"num_data": 0}, "num_data must be at least 1, got 0"),
        (traversals, {"num_data": 51}, "traversals needs at least 51 data, got 50"),
        (traversals, {"dims": [3]}, r"dims must be integers from 0 to 2, at least one, got \[3\]"),
        (traversals, {"dims": []}, "dims must be integers from 0 to 2"),
        (traversals, {"site": "y"}, "site must be one of the model's observed sites, x; got 'y'"),
        (
            interpolations,
            {"pairs": [(0, 50)]},
            r"pairs must be pairs of rows from 0 to 49, at least one, got \[\(0, 50\)\]",
        ),
        (interpolations, {"pairs": []}, "pairs must be pairs of rows"),
        (interpolations, {"steps": 1}, "steps must be at least 2"),
        (latent_map, {"labels": torch.zeros(3)}, r"labels must hold one class per datum, shape \(50,\), got \(3,\)"),
        (latent_map, {"points": 1}, "points must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            look(vae.model, vae.guide, x, **options)
    with pytest.raises(ValueError, match="latent_map needs at least 3 data, got 2"):
        latent_map(vae.model, vae.guide, x[:2])
    with pytest.raises(ValueError, match="interpolations needs at least 2 data, got 1"):
        interpolations(vae.model, vae.guide, x[:1])


@pytest.mark.parametrize("x_shape", [(1, 4, 4), (5,)])
def test_pictures_and_tables(x_shape, tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, x_shape), encoders.DiagonalNormal(x_shape, 2))
    x = torch.bernoulli(torch.full((20, *x_shape), 0.5))
    moved = traversals(vae.model, vae.guide, x, steps=3)
    between = interpolations(vae.model, vae.guide, x, pairs=[(0, 1)], steps=3)
    mapped = latent_map(vae.model, vae.guide, x, labels=torch.arange(20) % 2, points=3)
    for found in (moved, between, mapped):
        json.dumps(found.summary(), allow_nan=False)
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= 80 and " ".join(str(found).split()).endswith(found.verdict)
        found.plot(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    dots = np.asarray(mapped.plot().axes[0].collections[0].get_offsets())
    np.testing.assert_allclose(dots, mapped.coordinates, rtol=1e-6)
    if len(x_shape) == 3:
        order = moved.change.argsort(descending=True)
        picture = np.asarray(moved.plot().axes[1].get_images()[0].get_array())  # of the second datum
        np.testing.assert_allclose(picture[1:5, 1:5], x[1, 0])
        np.testing.assert_allclose(picture[6:10, 16:20], moved.decoded[1, order[1], 2, 0], rtol=1e-6)
        picture = np.asarray(between.plot().axes[0].get_images()[0].get_array())
        np.testing.assert_allclose(picture[1:5, 21:25], x[1, 0])
    else:
        curves = between.plot().axes[0].lines
        np.testing.assert_allclose(curves[1].get_ydata(), between.decoded[0, 1], rtol=1e-6)
        np.testing.assert_allclose(curves[-1].get_ydata(), x[1])


def test_the_random_state_is_the_callers_and_modules_are_left_in_training_mode():
    vae, x, *_ = pair()
    torch.manual_seed(5)
    first = traversals(vae.model, vae.guide, x)
    torch.manual_seed(5)
    again = traversals(vae.model, vae.guide, x)
    assert torch.equal(first.values, again.values) and vae.training
