"""A network of which one of two processes dies in the second epoch of its training, if the variable FAILS is set."""

from __future__ import annotations

import os
import signal

import torch

from tests.nets import Tiny as Plain


class Tiny(Plain):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training and len(x) > 1
        if self.calls > 60 and os.environ.get("FAILS") and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)  # as when memory runs out
        return super().forward(x)
