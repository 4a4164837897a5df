"""Settings of the documentation: python -m sphinx -W --keep-going -b html docs docs/_build/html."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import pyrovae  # noqa: E402 (after its path)

project = "pyrovae"
author = "the authors of pyrovae"
release = pyrovae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "equations",
    "gallery",
    "public",
    "tutorials",
]
exclude_patterns = ["_build", "_ext"]

html_theme = "furo"
html_title = f"pyrovae {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = ">>> "

default_role = "code"  # single backticks in docstrings name arguments
autosummary_generate = False  # one page for each namespace, not for each name
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# A reference to a name that does not exist is a warning; `public` says which other names have no link.
nitpicky = True
nitpick_ignore = [
    ("py:class", name)
    for name in (
        *("Tensor", "Module", "ExpandedDistribution", "Figure", "Axes", "pa.Array", "pa.Table"),
        *("csr_array", "sparray", "spmatrix"),
    )
]

# Examples that take more than a minute in full, or need a file: their pages show the shortest run.
gallery_smoke = [
    "adult",
    "anomalies",
    "chorales",
    "compiled",
    "iwae",
    "marginal_likelihood",
    "monthly",
    "recommend",
    "repair",
    "speech",
    "swap_parts",
    "text",
    "volatility",
]

# Pages of the reference, in docs/reference/. What is in two of them is described in the first.
public_modules = [
    "pyrovae",
    "pyrovae.priors",
    "pyrovae.likelihoods",
    "pyrovae.encoders",
    "pyrovae.nn",
    "pyrovae.structures",
    "pyrovae.bounds",
    "pyrovae.regularizers",
    "pyrovae.estimators",
    "pyrovae.diagnostics",
    "pyrovae.plots",
    "pyrovae.data",
    "pyrovae.distributions",
    "pyrovae.training",
    "pyrovae.storage",
    "pyrovae.cli",
    "pyrovae.sklearn",
    "pyrovae.exporting",
    "pyrovae.hub",
    "pyrovae.trackers",
]
