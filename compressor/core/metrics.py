"""What a run's networks are scored by: the task of a data source, the metric's name, and how a value is written."""

from __future__ import annotations

from dataclasses import dataclass

ACCURACY = "accuracy"
AGREEMENT = "agreement with the dense network"
CLOSENESS = "closeness to the dense network"
SCORE = "score"
MEAN_IOU = "mean IoU"
MEAN_AP = "mAP"

SCENES = {"masks": "segmentation", "coco": "detection"}
"""Sources of pictures with a target that is no class, and their task."""

PYTHON = "python"
"""Source of the data and of the network of a run that `compressor.compress` started with its caller's objects."""


@dataclass(frozen=True)
class Metric:
    """A score of a network of which more is better.

    Attributes:
        name: Its name in the manifest, on the page and on the terminal.
        share: Whether it is a share from 0 to 1, written in per cent; any other number is written as it is.
    """

    name: str = ACCURACY
    share: bool = True

    @property
    def title(self) -> str:
        """Its name at the beginning of a sentence."""
        return self.name if self.name == MEAN_AP else self.name[:1].upper() + self.name[1:]

    def text(self, value: float) -> str:
        """Write a value: 98.06%, or 31.4.

        >>> Metric().text(0.98056), Metric(SCORE, share=False).text(31.41592)
        ('98.06%', '31.42')
        """
        return f"{value:.2%}" if self.share else f"{value:.4g}"
