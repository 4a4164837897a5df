"""Data sets with fixed splits, preprocessing of data, and batches."""

from pyrovae.data import images as images  # registers its data sets
from pyrovae.data.batches import Batches
from pyrovae.data.loading import DATA_SETS, descriptions, load, register
from pyrovae.data.preprocessing import dynamic_binarization, split_missing, static_binarization
from pyrovae.data.splits import Split, Splits, random_splits
from pyrovae.rows import Rows

__all__ = [
    "DATA_SETS",
    "Batches",
    "Rows",
    "Split",
    "Splits",
    "descriptions",
    "dynamic_binarization",
    "load",
    "random_splits",
    "register",
    "split_missing",
    "static_binarization",
]
