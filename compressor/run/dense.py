"""Check that the accuracy of the dense network, and later of the slim one, is plausible, and that trainings went well.

A network still runs when its images have another mean, channel order or class order; only its accuracy is low.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compressor.core.errors import CompressorError
from compressor.core.metrics import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compressor.core.manifest import Epoch
    from compressor.run.job import Job
    from compressor.training.task import Examined

BEYOND_CHANCE = 0.02
"""A network is better than guessing if its accuracy is significantly more than this above chance."""
FAR = 0.05
"""An accuracy this far below the published one is not explained by a library's version or the choice of test images."""
RISE = 1.5
"""A training has collapsed if its loss ends above this multiple of its lowest one ..."""
FALL = 0.1
"""... and its accuracy on the training images has fallen by this since; if unknown, the loss is above the first one."""
_CERTAIN = 0.01
_IMAGENET_CLASSES = 1000


def problem(predicted: Tensor, labels: Tensor, promised: float | None = None) -> str:
    """Describe what is wrong with a network's predictions, as a clause; empty if nothing is, or too few images show it.

    Chance is the agreement expected of independent predictions and labels with the same class frequencies:
    1/classes for balanced labels, and about 82 % if nine tenths of both are one class.

    Args:
        predicted, labels: Classes, int64 (N,).
        promised: Published accuracy of the weights on such images, 0..1.
    """
    from scipy.stats import beta, binom

    images, right = len(labels), int((predicted == labels).sum())
    classes = int(max(predicted.max(), labels.max())) + 1
    shares = [values.bincount(minlength=classes).double() / images for values in (predicted, labels)]
    chance = float((shares[0] * shares[1]).sum())
    at_most = float(beta.ppf(1 - _CERTAIN, right + 1, images - right)) if right < images else 1.0
    guessing = float(binom.sf(right - 1, images, min(1.0, chance + BEYOND_CHANCE))) > _CERTAIN
    if guessing and at_most < (1 + chance) / 2:
        return f"no better than guessing ({chance:.2%})"
    if promised is not None and at_most < promised - FAR:
        return f"far below the published {promised:.2%} of these weights"
    return ""


def check_dense(job: Job, predicted: Tensor, labels: Tensor, folder: str) -> str | None:
    """Return a note on the dense network's answers on the test split; None if they are plausible.

    Raises:
        CompressorError: They are implausible and the recipe does not accept that; the message names likely causes.
    """
    from compressor.data import Preprocessing
    from compressor.training.scoring import share_right

    wrong = problem(predicted, labels, _promised(job))
    if not wrong:
        return None
    share, facts = share_right(predicted, labels), job.task.facts()
    prepared = Preprocessing.from_dict(facts["preprocessing"])
    found = f"The dense network scores {share:.2%} on {len(labels)} test images, {wrong}."
    if job.recipe.accept_dense:
        return f"{found} The recipe accepts that."
    raise CompressorError(
        found,
        "Likely causes: the images are prepared differently than in its training (now "
        f"{prepared.describe()}): set --mean, --std, data.channel_order or data.range; the "
        f"classes are in another order than {', '.join(facts['classes'][:3])}, ...; or the weights are for another "
        f"task. Start again with the right settings, or continue as it is: compress --resume {folder} --accept-dense",
    )


def _promised(job: Job) -> float | None:
    """Return the published accuracy if it applies to these weights, classes and input size, else None."""
    from compressor.models import published

    recipe, facts = job.recipe, job.task.facts()
    classes = facts["classes"]
    if recipe.weights != "default" or recipe.onnx or len(classes) != _IMAGENET_CLASSES:
        return None
    known = published(recipe.model)
    images = facts["preprocessing"]
    if known is None or known.preprocessing["size"] != images["size"] or "width" in images:
        return None
    return known.accuracy if all(re.fullmatch(r"n[0-9]{8}", name) for name in classes) else None


def collapsed(network: str, epochs: Sequence[Epoch], tested: Examined, rate_field: str) -> str | None:
    """Describe a training that has failed and what to change; None if neither its loss nor its result says so.

    Args:
        network: "dense" or "slim", for the sentence.
        epochs: Its epochs.
        tested: Result of the network on the test split.
        rate_field: Recipe field of its learning rate.
    """
    cure = f"Lower {rate_field}, or train longer (--epochs)."
    if (rise := _rise(epochs)) is not None:
        lowest, last = rise
        return (
            f"The training of the {network} network collapsed: its loss rose from {epochs[lowest].loss:.3g} in epoch "
            f"{lowest + 1} to {epochs[last].loss:.3g} in epoch {last + 1}. {cure}"
        )
    wrong = "" if tested.answers is None else problem(*tested.answers)
    if not wrong or tested.answers is None:
        return None
    count = "one epoch" if len(epochs) == 1 else f"{len(epochs)} epochs"
    return (
        f"After {count} of training the {network} network scores {tested.score:.2%} on {len(tested.answers[1])} test "
        f"images, {wrong}. {cure}"
    )


def _rise(epochs: Sequence[Epoch]) -> tuple[int, int] | None:
    """Return the places of the lowest and of the last loss if the training lost again what it had learned."""
    losses = [float("inf") if each.loss is None else each.loss for each in epochs]
    if len(losses) < 2:
        return None
    last, lowest = len(losses) - 1, losses.index(min(losses))
    if not losses[last] > RISE * losses[lowest]:
        return None
    before, after = epochs[lowest].accuracy, epochs[last].accuracy
    fell = losses[last] > losses[0] if before is None or after is None else before - after > FALL
    return (lowest, last) if fell else None


def lost_in_finetuning(
    finetuned: float, pruned: float | None, dense: float | None, images: int | None, name: str = ACCURACY
) -> str | None:
    """Return a note if fine-tuning ends far below its start: by more than 2 points below the pruned network or 10 below
    the dense one, and by more than noise. Scores that are no shares of a number of images get none."""
    from compressor.training.scoring import standard_error

    if images is None:
        return None

    def far(start: float | None, margin: float) -> bool:
        if start is None:
            return False
        noise = (standard_error(start, images) ** 2 + standard_error(finetuned, images) ** 2) ** 0.5
        return bool(start - finetuned > max(margin, 3 * noise))

    if far(pruned, 0.02):
        return (
            f"Fine-tuning lowered the {name} from {pruned:.2%} to {finetuned:.2%}: its learning rate is too high for "
            "these weights, or it has too few epochs to recover (training.finetune_learning_rate, --epochs)."
        )
    if far(dense, 0.1):
        return (
            f"The fine-tuned network scores {finetuned:.2%}, {100 * ((dense or 0) - finetuned):.1f} points below the "
            "dense one: a looser budget or more epochs would preserve more."
        )
    return None
