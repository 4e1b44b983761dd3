"""What both networks answer on the test split, with a few pictures: recorded in the passes that give their accuracies.

The answers are those of classifiers with labels; other tasks have none, and their runs no such file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.core.answers import ANSWERS, PICTURES, SCHEMA, Answers, Picture, read_answers
from compressor.core.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.run.folder import RunFolder
    from compressor.training.task import Examined, Task

MOST = 8
"""Pictures that a run keeps ..."""

MOST_CHANGED = 6
"""... and how many of them may be such that the networks answer differently, if there are others."""

SIDE = 160
"""Longest side of a kept picture in pixels."""


def record_dense(run: RunFolder, task: Task, tested: Examined) -> None:
    """Write the dense network's answers; those of a slim network, which belong to an earlier one, go."""
    if tested.answers is None:
        return
    predicted, truth = (each.tolist() for each in tested.answers)
    _write(run, Answers(schema_version=SCHEMA, classes=_names(task), truth=truth, dense=predicted, slim=[]))


def dense_answers(run: RunFolder) -> tuple[Tensor, Tensor] | None:
    """Return the recorded answers of the dense network and the labels, int64 (N,) each; None if there are none."""
    import torch

    known = read_answers(run.path)
    return (torch.tensor(known.dense), torch.tensor(known.truth)) if known.dense else None


def record_slim(run: RunFolder, task: Task, tested: Examined) -> None:
    """Add the delivered network's answers, and the pictures that show what has changed."""
    if tested.answers is None:
        return
    predicted, truth = (each.tolist() for each in tested.answers)
    known = read_answers(run.path)
    dense = known.dense if known.truth == truth else []  # a run that an earlier version began has none
    _write(
        run,
        Answers(
            schema_version=SCHEMA,
            classes=_names(task),
            truth=truth,
            dense=dense,
            slim=predicted,
            pictures=_kept(run, task, telling(truth, dense, predicted), len(truth)) if dense else [],
        ),
    )


def _names(task: Task) -> list[str]:
    return [str(name) for name in task.facts().get("classes", ())]


def _write(run: RunFolder, answers: Answers) -> None:
    """Write the file, and remove pictures that it does not name."""
    answers.write(run.file(ANSWERS))
    named = {each.file for each in answers.pictures}
    for path in run.file(PICTURES).glob("*.jpg"):
        if f"{PICTURES}/{path.name}" not in named:
            path.unlink(missing_ok=True)


def telling(truth: Sequence[int], dense: Sequence[int], slim: Sequence[int], most: int = MOST) -> list[int]:
    """Return the places of images that tell how the networks differ, at most `most`.

    First come those that only the dense network answers correctly, then those that only the slim one does, then other
    different answers, and at last some with the same answer. Both those with different and with the same answers are
    spread over the split, so that they are not all of its first class.

    >>> telling([0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 3], most=3)
    [2, 3, 0]
    """
    changed = [place for place in range(len(truth)) if dense[place] != slim[place]]
    changed.sort(key=lambda place: (dense[place] != truth[place], slim[place] != truth[place]))
    same = [place for place in range(len(truth)) if dense[place] == slim[place]]
    wanted = max(most - len(changed), most - MOST_CHANGED if most > MOST_CHANGED else 1)
    alike = _spread(same, min(wanted, len(same)))
    return _spread(changed, min(most - len(alike), len(changed))) + alike


def _spread(places: list[int], number: int) -> list[int]:
    """Return `number` of the places, evenly spread."""
    return [places[index * len(places) // number] for index in range(number)]


def _kept(run: RunFolder, task: Task, places: Sequence[int], images: int) -> list[Picture]:
    """Write images of the test split as files; none if they have no such form.

    Args:
        places: Places of the images among those that were answered.
        images: Number of images that were answered.
    """
    import torch

    from compressor.data.splits import MemorySplit, Split

    split = task.test
    if not isinstance(split, Split) or len(split) != images:  # some could not be read: their places are unknown
        return []
    chosen = split.chosen(torch.tensor(places)).in_memory()
    if not isinstance(chosen, MemorySplit) or len(chosen) != len(places):
        return []
    found = []
    for place, image in zip(places, chosen.images, strict=True):
        if (picture := _jpeg(image)) is None:
            return []
        name = f"{PICTURES}/{place}.jpg"
        write_atomic(run.file(name), picture)
        found.append(Picture(image=place, file=name))
    return found


def _jpeg(image: Tensor) -> bytes | None:
    """Return an image, uint8 (channels, height, width), as a small JPEG file; None if it is neither gray nor RGB."""
    from PIL import Image

    if len(image) not in (1, 3):
        return None
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
