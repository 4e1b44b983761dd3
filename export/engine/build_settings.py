"""Build settings of an engine, and checks that the installed version supports them.

Anything that a version would misread, ignore or fail on without a reason is refused before the build.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Mapping, Sequence, Union

from export.convert.onnx_header import OnnxHeader
from export.engine.cuda import Device
from export.engine.trt import Flavour
from export.errors import ExportError

RTX_DEFAULT = ("8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for by default: Ampere, Ada and Blackwell."""

DEFAULT_WORKSPACE = 1 << 30
Shape = Sequence[int]
Capabilities = Union[str, Sequence[str], None]


@dataclass(frozen=True)
class BuildSettings:
    """Settings of the builder that the ONNX file does not determine.

    Attributes:
        workspace_bytes: Maximum scratch memory of a layer; keep it small on boards with 4 GB.
        optimisation_level: 0 (quick) to 5 (thorough); None is the version's default. From TensorRT 8.6.
        dla_core: Deep-learning accelerator to use, with the GPU as fallback; None uses only the GPU.
        version_compatible: Build an engine that newer versions can load. From TensorRT 8.6.
        hardware_compatible: Build an engine for all GPUs from Ampere on. From TensorRT 8.6.
        tf32: Whether FP32 layers may round their inputs to 10 bits of mantissa on GPUs that have TF32.
        profile: Optimisation profile of inputs with dynamic dimensions: name -> (minimum, optimum, maximum) shape.
    """

    workspace_bytes: int = DEFAULT_WORKSPACE
    optimisation_level: int | None = None
    dla_core: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = True
    profile: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON file."""
        content = asdict(self)
        content["profile"] = {name: [list(item) for item in shapes] for name, shapes in self.profile.items()}
        return content


def target_capabilities(flavour: Flavour, wanted: Capabilities, device: Device | None) -> tuple[str, ...]:
    """The compute capabilities to build for.

    Raises:
        ExportError: TensorRT finds no GPU, or the requested one is not the GPU of this machine.
    """
    asked = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
    if flavour.rtx:
        return asked or RTX_DEFAULT
    if device is None:
        raise ExportError(
            f"{flavour.title} builds an engine on the GPU that the engine is for, and no GPU was found.",
            "Build on the device itself (python -m export build FILE.onnx, or a bundle).",
        )
    if asked and asked != (device.compute_capability,):
        raise ExportError(
            f"{flavour.title} builds for the GPU of this machine ({device.name}, compute capability "
            f"{device.compute_capability}), not for {', '.join(asked)}.",
            "Build on the device itself.",
        )
    return (device.compute_capability,)


def check_request(header: OnnxHeader, name: str, flavour: Flavour, settings: BuildSettings) -> None:
    """Refuse what this version would misread, ignore or fail on without a reason.

    Raises:
        ExportError: the message names the version and the unsupported feature.
    """
    if header.opset not in flavour.opsets:
        raise ExportError(
            f"{name} has ONNX opset {header.opset}; {flavour.title} reads opsets {flavour.opsets[0]} to "
            f"{flavour.opsets[-1]}.",
            "Export it again with opset 17.",
        )
    lacking = [
        (settings.optimisation_level is not None and not flavour.optimisation_level, "optimisation levels"),
        (settings.version_compatible and not flavour.compatibility_modes, "version-compatible engines"),
        (settings.hardware_compatible and not flavour.compatibility_modes, "hardware-compatible engines"),
        (settings.dla_core is not None and not flavour.dla, "deep-learning accelerators"),
    ]
    for lacks, what in lacking:
        if lacks:
            raise ExportError(f"{flavour.title} does not support {what}.", "Remove the setting.")
    if settings.dla_core is not None and header.precision == "fp32":
        raise ExportError("A deep-learning accelerator computes in FP16 or INT8; the file is FP32.")
    unprofiled = [key for key, shape in header.shapes.items() if -1 in shape and key not in settings.profile]
    if unprofiled:
        raise ExportError(
            f"Input {unprofiled[0]} has dynamic dimensions: {list(header.shapes[unprofiled[0]])}. It needs "
            "a minimum, an optimum and a maximum shape.",
            "Give a profile, or export the network with a fixed batch size.",
        )


def timing_cache_path(folder: str | Path | None, flavour: Flavour, device: Device | None) -> Path | None:
    """The timing cache file of a device and version: the cache of another one can make the build fail."""
    if folder is None or not flavour.timing_cache or device is None:
        return None
    name = f"{device.name}-{device.compute_capability}-{flavour.version}"
    safe = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    return Path(folder) / f"{safe}.timing"
