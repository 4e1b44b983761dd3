"""The images of splits, decoded."""

from __future__ import annotations

from compressor.data import DataBundle, MemorySplit, Split


def images_of(bundle: DataBundle) -> list[set[bytes]]:
    splits = (bundle.train, bundle.search, bundle.test)
    return [{image.numpy().tobytes() for image in decoded(split).images} for split in splits]


def decoded(split: Split) -> MemorySplit:
    found = split.in_memory()
    assert isinstance(found, MemorySplit)
    return found
