"""Parity of what two detectors find: boxes, scores and labels, whose order and number rounding may change.

Two scores that are nearly equal may change places, and an overlap at the threshold of the suppression may keep a box in
one of the two. Boxes are therefore compared as a set, and one picture may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Mapping

from export.convert.parity import AGREEMENTS, TOLERANCES, Parity
from export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Found = Mapping[str, Any]
"""What is found in a picture: "boxes" (n, 4) in pixels, "scores" (n,) and "labels" (n,), as arrays or tensors."""


def compare_found(
    reference: Sequence[Found],
    candidate: Sequence[Found],
    what: str,
    *,
    side: int,
    tolerance: float = TOLERANCES["fp32"],
    min_agreement: float = AGREEMENTS["fp32"],
) -> Parity:
    """Compare what is found in the same pictures.

    A picture agrees if both find the same number of boxes, and each box of either has one of the other with its label
    within the tolerance.

    Args:
        reference: What the network finds, an entry for each picture.
        candidate: What the file finds.
        what: The file's name in messages.
        side: Longer side of a picture in pixels.
        tolerance: Maximum difference of a score, and of a box's edges as a share of `side`.
        min_agreement: Share of the pictures that have to agree; one may always differ.

    Returns:
        Differences of the pictures that agree, and their share as the agreement.

    Raises:
        ExportError: too few pictures agree, or no box is found in any.
    """
    import numpy as np

    if not any(len(found["scores"]) for found in reference):
        raise ExportError(
            f"The network finds no box in {len(reference)} pictures: {what} cannot be compared with it.",
            "Train it for longer.",
        )
    apart = [_distances(*pair, side) for pair in zip(reference, candidate)]
    agree = [each.max(initial=0.0) <= tolerance for each in apart]
    least = min(min_agreement, 1 - 1 / len(apart))
    if np.mean(agree) < least:
        first = agree.index(False)
        numbers = [len(found[first]["scores"]) for found in (reference, candidate)]
        raise ExportError(
            f"{what} finds the same boxes as the network in {sum(agree)} of {len(agree)} pictures; in the first "
            f"other one the network finds {numbers[0]}, and the file {numbers[1]}.",
            "This may be rounding: a detector that is hardly trained gives many boxes nearly the same score. Train it "
            "for longer, or use its raw outputs.",
        )
    close = np.concatenate([each for each, same in zip(apart, agree) if same])
    return Parity(
        max_abs=float(close.max(initial=0.0)),
        mean_abs=float(close.mean()) if len(close) else 0.0,
        scale=1.0,
        top1_agreement=float(np.mean(agree)),
        samples=len(agree),
        allowed=tolerance,
    )


def _distances(one: Found, other: Found, side: int) -> npt.NDArray[np.float64]:
    """The distance of each box of either set to the nearest of its label in the other; infinite for other numbers."""
    import numpy as np

    rows = [
        np.column_stack([np.asarray(found["boxes"], dtype=np.float64) / side, np.asarray(found["scores"])])
        for found in (one, other)
    ]
    if len(rows[0]) != len(rows[1]):
        return np.full(1, np.inf)
    apart = np.abs(rows[0][:, None] - rows[1][None]).max(axis=2)
    apart[np.asarray(one["labels"])[:, None] != np.asarray(other["labels"])[None]] = np.inf
    return np.concatenate([apart.min(axis=axis, initial=np.inf) for axis in (0, 1)])
