"""The pictures show what they are given."""

import numpy as np
import pytest
import torch

from pyrovae import History, plots


def picture_in(figure):
    return np.asarray(figure.axes[0].get_images()[0].get_array())


def test_samples_puts_images_in_reading_order_with_white_between():
    x = torch.stack([torch.full((1, 2, 3), v) for v in (0.1, 0.2, 0.3)])
    grid = picture_in(plots.samples(x))
    assert grid.shape == (2 * 3 + 1, 2 * 4 + 1)  # two rows and columns of a 2 x 3 image and a pixel of white
    assert grid[1, 1] == pytest.approx(0.1) and grid[1, 5] == pytest.approx(0.2) and grid[4, 1] == pytest.approx(0.3)
    assert (grid[0] == 1).all() and (grid[:, 0] == 1).all() and (grid[4:, 5:] == 1).all()


def test_colour_images_keep_their_channels():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 2] = 1.0
    assert picture_in(plots.samples(x))[1, 1].tolist() == [0.0, 0.0, 1.0]


def test_reconstructions_stand_below_their_data():
    grid = picture_in(plots.reconstructions(torch.zeros(4, 1, 2, 2), torch.full((4, 1, 2, 2), 0.5)))
    assert grid.shape == (7, 13)
    assert (grid[1:3, 1:3] == 0).all() and (grid[4:6, 1:3] == 0.5).all()


@pytest.mark.parametrize("draw", [plots.samples, lambda x, path: plots.reconstructions(x, x, path)])
def test_vectors_are_drawn_as_curves(draw, tmp_path):
    x = torch.randn(4, 6)
    figure = draw(x, tmp_path / "x.png")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), x[0])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
def test_latent_space_shows_every_datum_where_it_is(latent_dim):
    z, labels = torch.randn(30, latent_dim), torch.arange(30) % 3
    figure = plots.latent_space(z, labels)
    dots = np.asarray(figure.axes[0].collections[0].get_offsets())
    assert dots.shape == (30, 2)
    if latent_dim <= 2:
        np.testing.assert_allclose(dots[:, :latent_dim], z, rtol=1e-6)
    else:  # principal components: uncorrelated, the first with the most variance of all directions
        covariance = np.cov(dots.T)
        largest = np.linalg.eigvalsh(np.cov(z.numpy().T))[-1]
        assert abs(covariance[0, 1]) < 1e-5 * largest
        np.testing.assert_allclose(covariance[0, 0], largest, rtol=1e-4)
    assert len(figure.axes[0].get_legend().get_texts()) == 3


def test_learning_curve_draws_the_history(tmp_path):
    records = [{"epoch": i, "loss": 3.0 - i / 10, "validation": 3.0 + (i - 4) ** 2} for i in range(1, 8)]
    figure = History(records).plot(tmp_path / "curve.png")
    loss, validation, best = figure.axes[0].lines
    np.testing.assert_allclose(loss.get_ydata(), [r["loss"] for r in records])
    np.testing.assert_allclose(validation.get_ydata(), [r["validation"] for r in records])
    assert list(best.get_xdata()) == [4, 4]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
