"""Data sets with fixed splits, what is done to data before training, and batches of data in memory."""

from pyrovae.data.loading import Batches, Split, Splits, dynamic_binarization, load, split_missing, static_binarization

__all__ = ["Batches", "Split", "Splits", "dynamic_binarization", "load", "split_missing", "static_binarization"]
