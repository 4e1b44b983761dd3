"""The Jetson modules that bundles support, and the features of their GPU and TensorRT."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from export.errors import ExportError


@dataclass(frozen=True)
class Target:
    """A Jetson module.

    Attributes:
        name: Its key in `TARGETS`.
        title: Its name in messages.
        compute_capability: Compute capability of its GPU.
        memory_gb: Memory shared by CPU and GPU.
        opset: The newest ONNX opset that all its JetPack versions read.
        int8: Whether its GPU has INT8 units.
        dla: Number of deep-learning accelerators.
    """

    name: str
    title: str
    compute_capability: str
    memory_gb: int
    opset: int
    int8: bool
    dla: int

    @property
    def workspace_mib(self) -> int:
        """Workspace of the builder in MiB; small on boards with 4 GB of shared memory."""
        return 256 if self.memory_gb <= 4 else 1024


TARGETS = {
    target.name: target
    for target in (
        Target("jetson-nano", "Jetson Nano", "5.3", 4, 13, False, 0),
        Target("jetson-tx2", "Jetson TX2", "6.2", 8, 13, False, 0),
        Target("jetson-xavier-nx", "Jetson Xavier NX", "7.2", 8, 17, True, 2),
        Target("jetson-agx-xavier", "Jetson AGX Xavier", "7.2", 32, 17, True, 2),
        Target("jetson-orin-nano-4gb", "Jetson Orin Nano 4GB", "8.7", 4, 17, True, 0),
        Target("jetson-orin-nano-8gb", "Jetson Orin Nano 8GB", "8.7", 8, 17, True, 0),
        Target("jetson-orin-nx-8gb", "Jetson Orin NX 8GB", "8.7", 8, 17, True, 1),
        Target("jetson-orin-nx-16gb", "Jetson Orin NX 16GB", "8.7", 16, 17, True, 2),
        Target("jetson-agx-orin-32gb", "Jetson AGX Orin 32GB", "8.7", 32, 17, True, 2),
        Target("jetson-agx-orin-64gb", "Jetson AGX Orin 64GB", "8.7", 64, 17, True, 2),
        Target("jetson-thor-t5000", "Jetson Thor T5000", "11.0", 128, 17, True, 0),
    )
}


def find_target(name: str) -> Target:
    """Find a module by name.

    Raises:
        ExportError: the name is unknown; the message gives similar names.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=3, cutoff=0.4) or list(TARGETS)
    raise ExportError(f"There is no target {name}.", f"Did you mean {', '.join(near)}?")
