"""The command line: ``pyrovae train | evaluate | compare | diagnose | sample | reconstruct | repair``.

The arguments of a command are those of its function: jsonargparse reads their type hints and docstrings. To add a
command, write its function in a module of this package and enter it in ``COMMANDS`` of ``parser.py``.
"""

from pyrovae.cli.comparison import compare
from pyrovae.cli.diagnosis import diagnose
from pyrovae.cli.drawing import reconstruct, sample
from pyrovae.cli.parser import main
from pyrovae.cli.repairing import repair
from pyrovae.cli.scoring import evaluate
from pyrovae.cli.training import train

__all__ = ["compare", "diagnose", "evaluate", "main", "reconstruct", "repair", "sample", "train"]
