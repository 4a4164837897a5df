"""The registry of diagnostics: whatever is in the package is in the report."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from pyrovae import VAE, diagnostics, encoders, likelihoods, plots, priors
from pyrovae.diagnostics import DIAGNOSES, Diagnosis, ReportInputs

QUICK = ["collapse", "sharpness", "quality", "anomalies", "traversals", "interpolations", "latent_map"]


def test_every_diagnosis_is_in_the_registry_with_a_question_of_its_own():
    kinds = [kind for kind in Diagnosis.__subclasses__() if kind.__module__.startswith("pyrovae.")]
    assert sorted(kinds, key=str) == sorted(DIAGNOSES.values(), key=str)
    questions = [kind.question for kind in kinds]
    assert len(set(questions)) == len(kinds) and all(question.endswith("?") for question in questions)


def test_the_function_of_every_diagnosis_is_public_and_its_picture_too():
    for name, kind in DIAGNOSES.items():
        function = {"posterior": "posterior_check"}.get(name, name)
        assert kind.__name__ in diagnostics.__all__
        assert function in diagnostics.__all__ and function in plots.__all__
        assert getattr(diagnostics, function).__module__ == kind.__module__


@pytest.mark.parametrize("name", QUICK)
def test_a_diagnosis_of_the_report_prints_draws_and_sums_up(name, tmp_path):
    vae = VAE(priors.StandardNormal(2), likelihoods.Bernoulli(2, (1, 6, 6)), encoders.DiagonalNormal((1, 6, 6), 2))
    x = torch.bernoulli(torch.rand(40, 1, 6, 6))
    inputs = ReportInputs(vae.model, vae.guide, x, x[:30], held_out=True, labels=torch.arange(40) % 3, other=1 - x)
    result = DIAGNOSES[name].for_report(inputs)
    lines = str(result).splitlines()
    assert max(map(len, lines)) <= 80 and " ".join(str(result).split()).endswith(result.verdict)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert summary["verdict"] == result.verdict and len(summary) > 1
    figure = getattr(plots, name)(result, tmp_path / "picture.png")
    assert isinstance(figure, Figure) and (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
