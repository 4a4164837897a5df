"""The command line: ``pyrovae describe | train | evaluate | compare | diagnose | sample | score | ...``.

The arguments of a command are those of its function: jsonargparse reads their type hints and docstrings. To add a
command, write its function in a module of this package and enter it in ``COMMANDS`` of ``parser.py``.
"""

from pyrovae.cli.comparison import compare
from pyrovae.cli.description import describe
from pyrovae.cli.diagnosis import diagnose
from pyrovae.cli.drawing import reconstruct, sample
from pyrovae.cli.encoding import encode
from pyrovae.cli.forecasting import forecast
from pyrovae.cli.listing import parts
from pyrovae.cli.parser import main
from pyrovae.cli.repairing import repair
from pyrovae.cli.reporting import report
from pyrovae.cli.rows import impute, score
from pyrovae.cli.scoring import evaluate
from pyrovae.cli.training import train

__all__ = [
    "compare",
    "describe",
    "diagnose",
    "encode",
    "evaluate",
    "forecast",
    "impute",
    "main",
    "parts",
    "reconstruct",
    "repair",
    "report",
    "sample",
    "score",
    "train",
]
