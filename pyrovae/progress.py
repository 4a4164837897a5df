"""Progress bars."""

import sys
from typing import Any

from tqdm import auto


class tqdm(auto.tqdm):
    """A bar of tqdm that writes to a file, such as the log of a job, once in ten seconds, not ten times a second."""

    def __init__(self, *args: Any, **kwargs: Any):
        if not sys.stderr.isatty() and "ipykernel" not in sys.modules:  # a notebook redraws its bar
            kwargs.setdefault("mininterval", 10)
        super().__init__(*args, **kwargs)
