"""The examples and the code of the README run, and print an estimate."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    command = [sys.executable, "-W", "error", str(example), "--smoke"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"test log p\(x\) = -\d+\.\d+ nats a datum", result.stdout), result.stdout


def test_every_example_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in EXAMPLES if f"(examples/{path.name})" not in readme] == []


def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(import pyro\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    for slow, quick in (("epochs=200", "epochs=2"), ("method=UntilTrusted()", "num_samples=50")):
        assert slow in code
        code = code.replace(slow, quick)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"^log p\(x\) = -\d+", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "vae.safetensors").exists()
