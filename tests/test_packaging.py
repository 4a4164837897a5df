"""The wheel holds the whole package: packages are found, and none is listed by hand."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "pyrovae", source / "pyrovae", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    new = source / "pyrovae" / "priors" / "new" / "part.py"  # a package that no list can name
    new.parent.mkdir()
    new.write_text("")
    (new.parent / "__init__.py").write_text("")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pyrovae/")}
    assert packed == {path.relative_to(source).as_posix() for path in (source / "pyrovae").rglob("*") if path.is_file()}
    assert {"pyrovae/py.typed", "pyrovae/priors/new/part.py"} <= packed
