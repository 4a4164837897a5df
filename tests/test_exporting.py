"""Exported encoders and decoders give the numbers of the parts, for batches of any size."""

import io

import pytest
import torch

from pyrovae import VAE, encoders, exporting, likelihoods, nn, priors

SHAPE = (1, 8, 8)
CASES = {
    "bernoulli": lambda: VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(2, SHAPE), encoders.DiagonalNormal(SHAPE, 2)
    ),
    "normal": lambda: VAE(priors.StandardNormal(2), likelihoods.Normal(2, SHAPE), encoders.FullRankNormal(SHAPE, 2)),
    "convolutions": lambda: VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(2, SHAPE, network=nn.DeconvNet),
        encoders.DiagonalNormal(SHAPE, 2, network=nn.ConvNet),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch
def test_a_program_gives_mean_and_standard_deviation_of_any_batch(case):
    torch.manual_seed(0)
    vae = CASES[case]()
    file = io.BytesIO()
    torch.export.save(exporting.export_encoder(vae, torch.rand(3, *SHAPE)), file)
    file.seek(0)
    encode = torch.export.load(file).module()
    decode = exporting.export_decoder(vae, torch.randn(3, 2)).module()
    vae.eval()
    for size in (1, 5):
        x, z = torch.rand(size, *SHAPE), torch.randn(size, 2)
        for found, p in ((encode(x), vae.encode(x)), (decode(z), vae.decode(z))):
            assert torch.allclose(found[0], p.mean, atol=1e-6)
            assert torch.allclose(found[1], p.variance.sqrt(), atol=1e-6)
    assert exporting.export_encoder(vae.train(), torch.rand(3, *SHAPE)) is not None and vae.training


def test_what_is_refused():
    vae = CASES["bernoulli"]()
    with pytest.raises(ValueError, match="x must hold at least two data"):
        exporting.export_encoder(vae, torch.rand(1, *SHAPE))
    vae.encoder = encoders.NeuralSplineFlow(SHAPE, 2)
    with pytest.raises(ValueError, match="NeuralSplineFlow gives a distribution without a mean"):
        exporting.export_encoder(vae, torch.rand(2, *SHAPE))
