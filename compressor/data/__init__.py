"""Data by name: disjoint splits for training, scoring of candidates and the final test."""

from __future__ import annotations

from compressor.data.files import FileSplit
from compressor.data.load import load_data
from compressor.data.preprocessing import Preprocessing, Wanted
from compressor.data.splits import DataBundle, MemorySplit, Split

__all__ = ["DataBundle", "FileSplit", "MemorySplit", "Preprocessing", "Split", "Wanted", "load_data"]
