"""Pages whose tables are made from records: blurry samples, collapsed levels, few labels; smoke runs of their rows."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from pyrovae import data, encoders

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(request, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(request.param)


every = pytest.mark.parametrize("script", ["blur", "collapse", "labels"], indirect=True)
blur = pytest.mark.parametrize("script", ["blur"], indirect=True)
collapse = pytest.mark.parametrize("script", ["collapse"], indirect=True)
labels = pytest.mark.parametrize("script", ["labels"], indirect=True)


@every
def test_the_tables_of_the_page_are_those_of_the_records(script):
    text = script.PAGE.read_text()
    assert script.page(json.loads(script.RECORD.read_text()), text) == text


@blur
def test_every_likelihood_of_the_page_is_trained_scored_and_drawn_from(script, tmp_path):
    x = torch.randint(256, (40, 1, 8, 8)) / 255
    images = script.Images(x[:30], x[30:], lambda images: images.flatten(1), "pixels")
    for name in script.MODELS:
        vae, kl = script.trained(name, images, 1, tmp_path / name)
        again, same = script.trained(name, images, 1, tmp_path / name)
        assert kl == same > 0
        number, samples = script.measured(vae, script.MODELS[name], images, num_samples=2, scored=4)
        assert json.dumps(number) == json.dumps(script.measured(again, script.MODELS[name], images, 2, 4)[0])
        assert ("log_p" in number) == (name != "Bernoulli")
        assert samples["draws"].shape == (10, 1, 8, 8)
        assert samples["draws"].min() > -0.01 or name.startswith("Normal")
        record = {"data": script.data_numbers(images), "models": {script.COMPARED: number | {"kl": kl}}}
        assert ("of other data" in script.table(record)) == (name == "Bernoulli")


@blur
def test_power_is_that_of_a_wave(script):
    wave = torch.cos(2 * torch.pi * torch.arange(20) / 4).expand(3, 1, 20, 20)  # a quarter of a cycle a pixel
    frequency, power = script.spectrum(wave + 0.3)
    assert [f for f, p in zip(frequency, power, strict=True) if p > 1e-6] == [0.25]
    noise = torch.randn(2000, 1, 20, 20)
    assert torch.tensor(script.spectrum(noise)[1]).sub(1).abs().max() < 0.05  # unit variance, at each frequency


@blur
def test_dequantised_levels_fall_into_their_bins(script):
    x = torch.arange(256.0) / 255
    (y,) = script.dequantize(x.expand(100, -1))
    assert ((256 * y).floor() == torch.arange(256)).all()


@collapse
def test_every_cure_is_trained_and_asked(script, tmp_path):
    pixels = torch.rand(60, *script.IMAGE)
    test = data.static_binarization(pixels[:12])
    for name in script.ROWS:
        vae = script.trained(name, pixels, 20, tmp_path / name)
        number = script.measured(vae, test, scored=2, seconds=0.1)
        assert list(number["levels"]) == ["z1", "z2", "z3"]
        assert name in script.table({name: number})
        drawn = script.drawn_below(vae)
        assert drawn.shape == (3, 10, 28, 28)
    assert script.draw({name: drawn}).axes


@collapse
def test_images_in_a_line_share_the_upper_levels(script):
    vae = script.hierarchical()
    vae.conditionals[0] = encoders.Delta(16, 32)  # so that nothing else tells them apart
    drawn = script.drawn_below(vae)
    torch.testing.assert_close(drawn, drawn[:, :1].expand(-1, 10, -1, -1))
    assert (drawn[0, 0] - drawn[1, 0]).abs().max() > 1e-3


@labels
def test_every_row_learns_to_classify(script, tmp_path):
    """Bars at ten heights."""
    classes = torch.arange(400) % script.CLASSES
    x = torch.zeros(400, *script.IMAGE)
    for i, label in enumerate(classes.tolist()):
        x[i, 0, 2 * label : 2 * label + 4, 4:24] = 1.0
    digits = script.Digits((x[:300], classes[:300]), (x[300:350], classes[300:350]), (x[350:], classes[350:]))
    settings = script.Settings(epochs=60, epochs_of_m2=10, epochs_on_latents=60, batch_size=50)
    for name in script.ROWS:
        found = script.measured(name, digits, 100, settings, tmp_path)
        assert found == script.measured(name, digits, 100, settings, tmp_path)  # from the checkpoints
        assert found["test"] < 45, name  # a guess is wrong for 90 %


@labels
def test_labels_are_of_every_class_and_a_tenth_of_the_data(script):
    labels = torch.randint(script.CLASSES, (5000,))
    known = script.with_labels(labels, 100, seed=1)
    assert torch.bincount(labels[known]).tolist() == [10] * 10
    assert not torch.equal(known, script.with_labels(labels, 100, seed=2))
    x, hidden = script.mixed(torch.randn(5000, 3), labels, known)
    assert (hidden >= 0).double().mean().item() == pytest.approx(script.SHARE, rel=0.1)
    assert len(x) == len(hidden)
    assert (hidden[:5000] == -1).all()
    assert torch.equal(hidden[5000:5100], labels[known])
