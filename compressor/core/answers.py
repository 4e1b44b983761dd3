"""The answers of a run's networks on the test split, `answers.json`, as typed records: the only reader and writer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from compressor.core.errors import CompressorError
from compressor.core.manifest import Document, Record

ANSWERS = "answers.json"
SCHEMA = 1
PICTURES = "pictures"

_File = Annotated[str, Field(pattern=rf"^{PICTURES}/[0-9]{{1,12}}\.jpg$")]
_Class = Annotated[int, Field(ge=0, lt=10**9)]


class Picture(Record):
    """A picture of the test split that the run keeps: its place there, and its file in the run's folder."""

    image: Annotated[int, Field(ge=0)] = 0
    file: _File | None = None


@dataclass(frozen=True)
class ClassCount:
    """How many test images of a class there are, and how many of them each network answers correctly.

    Attributes:
        name: The class.
        images: Number of its images.
        dense, slim: Number of correct answers; None where a network's answers are not known.
    """

    name: str
    images: int
    dense: int | None
    slim: int | None


class Answers(Document):
    """The content of `answers.json`: a classifier's test split, image by image in its stored order.

    The accuracies of the dense and the delivered network are computed from these answers.

    Attributes:
        classes: Names of the classes, in the order of the labels.
        truth: Label of each image.
        dense, slim: Class that the dense and the delivered network answer; empty before they are tested.
        pictures: A few of the images.
    """

    indent: ClassVar[int | None] = None
    schema_version: int | None = Field(None, alias="schema")
    classes: list[str] = Field([])
    truth: list[_Class] = Field([])
    dense: list[_Class] = Field([])
    slim: list[_Class] = Field([])
    pictures: list[Picture] = Field([])

    def name(self, label: int) -> str:
        """Return the name of a class; a network may have more outputs than the data has classes."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    def counts(self) -> Iterator[ClassCount]:
        """Yield the correct answers of each class that has images, in the order of the labels."""
        images = Counter(self.truth)
        dense, slim = (
            Counter(label for label, given in zip(self.truth, answers, strict=False) if label == given)
            for answers in (self.dense, self.slim)
        )
        for label in sorted(images):
            yield ClassCount(
                self.name(label),
                images[label],
                dense[label] if self.dense else None,
                slim[label] if self.slim else None,
            )


def read_answers(run: Path) -> Answers:
    """Return the answers in a run's folder; without any if the file is missing or damaged, or its lists do not fit."""
    try:
        found = Answers.read_tolerant(run / ANSWERS)
    except CompressorError:
        return Answers()
    images = len(found.truth)
    fits = images and all(len(given) in (0, images) for given in (found.dense, found.slim))
    return found if fits else Answers()
