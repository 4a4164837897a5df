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

    def refresh(self, *args: Any, **kwargs: Any) -> None:
        """Shows the bar, but not before its delay: what ends sooner would leave half a line behind."""
        if not self.disable and (self.delay <= 0 or self._time() >= self.start_t + self.delay):
            super().refresh(*args, **kwargs)
            self.last_print_t = self._time()  # by which close() knows that there is a line to end
