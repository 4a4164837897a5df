"""Pictures of the results of diagnostics, which draw themselves."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Result(Protocol):
    def plot(self, path: str | Path | None = None) -> "Figure": ...


def draw_result(result: _Result, path: str | Path | None = None) -> "Figure":
    """Draws the result of a function of :mod:`pyrovae.diagnostics`; the same as ``result.plot(path)``.

    Args:
        result: what the diagnostic returned.
        path: where to write the picture.
    """
    return result.plot(path)
