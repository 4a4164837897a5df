"""The record of a training run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrovae import notebooks

__all__ = ["History"]


@dataclass
class History:
    """One record (a dict) for each epoch of training.

    A record holds "epoch", "loss", "learning_rate", "seconds" since the start, and "validation" if there are validation
    data. Losses are in nats per datum, so lower is better. A bound of :mod:`pyrovae.bounds` adds the parts of its loss,
    in nats per datum: "bound", "reconstruction", "kl z" for each latent site "z", and each regularizer under the name
    of its class. Callbacks may add entries to the last record.

    Args:
        records: the records, in order.

    >>> history = History([{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.5}])
    >>> history["loss"]
    [3.0, 2.5]
    >>> print(history)
    epoch    loss
        1  3.0000
        2  2.5000
    """

    records: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> list:
        """Returns one entry of every record, None where a record lacks it.

        Raises:
            KeyError: when no record has the entry.
        """
        if not any(name in record for record in self.records):
            raise KeyError(
                f"no record holds {name!r}; they hold {list(self.records[-1]) if self.records else 'nothing'}"
            )
        return [record.get(name) for record in self.records]

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the lowest validation loss, None before the first validation."""
        scored = [record for record in self.records if "validation" in record]
        return min(scored, key=lambda record: record["validation"])["epoch"] if scored else None

    def table(self, max_rows: int = 20) -> str:
        """Returns a table of at most `max_rows` records, including the first and the last.

        They are evenly spaced, or next to that where a record has more entries, such as those that a callback adds now
        and then. The table omits a constant learning rate, and entries that fewer than half of its rows hold.
        """
        cells = self._cells(max_rows)
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)

    def _cells(self, max_rows: int) -> list[list[str]]:
        """Returns the names of the entries that the table shows, and the rows below."""
        shown = [self.records[i] for i in self._rows(max_rows)]
        names = list(dict.fromkeys(name for record in self.records for name in record))
        if "learning_rate" in names and len(set(self["learning_rate"])) == 1:
            names.remove("learning_rate")
        names = [name for name in names if 2 * sum(name in record for record in shown) >= len(shown)]
        return [names] + [[_cell(record.get(name)) for name in names] for record in shown]

    def _rows(self, max_rows: int) -> list[int]:
        """Returns the places of the records that the table shows."""
        last, count = len(self) - 1, min(max_rows, len(self))
        spacing = last / max(count - 1, 1)
        reach = int((spacing - 1) / 2) if count > 2 else 0  # so that no record is shown twice
        rows = []
        for middle in (round(i * spacing) for i in range(count)):
            near = range(middle - reach, middle + reach + 1) if 0 < middle < last else [middle]
            rows.append(max(near, key=lambda i: (len(self.records[i]), -abs(i - middle))))
        return rows

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Shows the table and the losses by epoch, in a notebook."""
        if not self.records:
            return notebooks.preformatted("a history without epochs")
        names, *rows = self._cells(max_rows=20)
        return notebooks.table(names, rows) + notebooks.picture(self.plot())

    def plot(self, path: str | Path | None = None) -> Any:
        """Plots the losses by epoch; returns the matplotlib figure, and writes it to `path` if given."""
        from pyrovae import plots  # matplotlib is slow to import

        return plots.learning_curve(self, path)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"
