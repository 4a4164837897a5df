"""Data sets with fixed splits, preprocessing of data, and batches."""

from pyrovae.data import images as images  # registers its data sets
from pyrovae.data.batches import Batches
from pyrovae.data.loading import DATA_SETS, descriptions, load, register
from pyrovae.data.preprocessing import dynamic_binarization, split_missing, static_binarization
from pyrovae.data.ratings import HeldOutUsers, Ratings, RatingSplits, hold_out_users, load_ratings
from pyrovae.data.splits import Split, Splits, random_splits
from pyrovae.rows import Rows

__all__ = [
    "DATA_SETS",
    "Batches",
    "HeldOutUsers",
    "RatingSplits",
    "Ratings",
    "Rows",
    "Split",
    "Splits",
    "descriptions",
    "dynamic_binarization",
    "hold_out_users",
    "load",
    "load_ratings",
    "random_splits",
    "register",
    "split_missing",
    "static_binarization",
]
