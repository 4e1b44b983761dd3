"""Which classes of the test split each network gets right, and a few of its pictures with both answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.core.answers import Answers, ClassCount
from compressor.report.formats import ABSENT, percent, points, ratio

FEW = 20
"""Up to this number, classes are listed in the order of their labels; of more the worst are listed first ..."""

WORST = 20
"""... and this many of them are open on the page."""

JPEG = b"\xff\xd8\xff"


def by_class(answers: Answers) -> dict[str, Any] | None:
    """Return the correct answers of each class, and what changed in a sentence; None if no network was tested so."""
    counts = list(answers.counts())
    if not counts or not (answers.dense or answers.slim):
        return None
    many = len(counts) > FEW
    listed = sorted(counts, key=_worst) if many else counts
    rows = [_row(each) for each in listed]
    return {
        "many": many,
        "rows": rows[:WORST] if many else rows,
        "all": rows if many else [],
        "total": _row(_together(counts)),
        "changes": _changes(answers),
    }


def _worst(count: ClassCount) -> tuple[float, float]:
    """Return the place of a class among the worst: by what the slim network gets right, then by what it lost."""
    right = count.dense if count.slim is None else count.slim
    return (right or 0) / count.images, ((count.slim or 0) - (count.dense or 0)) / count.images


def _together(counts: Sequence[ClassCount]) -> ClassCount:
    sides = (
        None if any(getattr(each, side) is None for each in counts) else sum(getattr(each, side) for each in counts)
        for side in ("dense", "slim")
    )
    return ClassCount("all classes", sum(each.images for each in counts), *sides)


def _row(count: ClassCount) -> dict[str, str]:
    dense, slim = ratio(count.dense, count.images), ratio(count.slim, count.images)
    return {
        "name": count.name or "unnamed",
        "images": f"{count.images:,}",
        "dense": percent(dense, 2),
        "slim": percent(slim, 2),
        "change": ABSENT if dense is None or slim is None else points(slim - dense).removesuffix(" points"),
    }


def _changes(answers: Answers) -> str:
    """Say on how many images the answers differ, and who is right there."""
    if not answers.dense or not answers.slim:
        return ""
    both = list(zip(answers.truth, answers.dense, answers.slim, strict=True))
    lost, won, other = (
        sum(1 for truth, dense, slim in both if dense != slim and (dense == truth, slim == truth) == right)
        for right in ((True, False), (False, True), (False, False))
    )
    if not lost + won + other:
        return f"Both networks give the same answer to all {len(both):,} test images."
    return (
        f"The networks answer {lost + won + other:,} of {len(both):,} test images differently: only the dense one is "
        f"right on {lost:,}, only the slim one on {won:,}, neither on {other:,}."
    )


def shown_pictures(answers: Answers, pictures: Mapping[int, bytes]) -> list[dict[str, Any]]:
    """Return the kept pictures with the truth and both answers.

    Args:
        answers: Answers of the test split.
        pictures: Content of their files, by the place in the split.
    """
    if not answers.dense or not answers.slim:
        return []
    found = []
    for place, content in pictures.items():
        if place >= len(answers.truth) or not content.startswith(JPEG):
            continue
        truth = answers.truth[place]
        given = {"dense": answers.dense[place], "slim": answers.slim[place]}
        found.append(
            {
                "source": f"data:image/jpeg;base64,{base64.b64encode(content).decode()}",
                "alt": f"Test image {place}: {answers.name(truth)}",
                "truth": answers.name(truth),
                "answers": [(network, answers.name(label), label == truth) for network, label in given.items()],
            }
        )
    return found
