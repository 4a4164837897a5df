"""Data sets with fixed splits, preprocessing of data, and batches."""

from pyrovae.data import images as images  # registers its data sets
from pyrovae.data.batches import Batches
from pyrovae.data.cells import CellError
from pyrovae.data.columns import (
    Binary,
    Bounded,
    Category,
    Column,
    Constant,
    Continuous,
    Count,
    Discrete,
    Identifier,
    LeftOut,
    Modelled,
    Ordered,
    Positive,
    Real,
    Time,
)
from pyrovae.data.loading import DATA_SETS, descriptions, load, register
from pyrovae.data.music import PianoRoll, is_music, load_music, read_music, write_midi
from pyrovae.data.preprocessing import (
    dynamic_binarization,
    hide_cells,
    random_shift,
    random_transposition,
    split_missing,
    static_binarization,
)
from pyrovae.data.ratings import HeldOutUsers, Ratings, RatingSplits, hold_out_users, load_ratings
from pyrovae.data.reading import Dialect
from pyrovae.data.schema import Schema
from pyrovae.data.series import TimeSeries, load_series
from pyrovae.data.sounds import Spectrogram, is_sounds, load_sounds, read_sounds
from pyrovae.data.splits import Split, Splits, random_splits
from pyrovae.data.tables import Table
from pyrovae.data.text import Vocabulary, is_text_file, load_text, read_lines, split_lines
from pyrovae.rows import Rows, pack_bits

__all__ = [
    "Batches",
    "HeldOutUsers",
    "RatingSplits",
    "Ratings",
    "Rows",
    "Binary",
    "Bounded",
    "Category",
    "CellError",
    "Column",
    "Constant",
    "Continuous",
    "Count",
    "DATA_SETS",
    "Dialect",
    "Discrete",
    "Identifier",
    "LeftOut",
    "Modelled",
    "Ordered",
    "PianoRoll",
    "Positive",
    "Real",
    "Schema",
    "Spectrogram",
    "Split",
    "Splits",
    "Table",
    "Time",
    "TimeSeries",
    "Vocabulary",
    "descriptions",
    "dynamic_binarization",
    "hold_out_users",
    "hide_cells",
    "is_music",
    "is_sounds",
    "is_text_file",
    "load",
    "load_music",
    "load_ratings",
    "load_series",
    "load_sounds",
    "load_text",
    "pack_bits",
    "random_shift",
    "random_splits",
    "random_transposition",
    "read_lines",
    "read_music",
    "read_sounds",
    "register",
    "split_lines",
    "split_missing",
    "static_binarization",
    "write_midi",
]
