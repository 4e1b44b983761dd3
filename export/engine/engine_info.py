"""The description of an engine: its provenance, its targets, and whether it can be loaded on this machine.

An engine only works on its GPU and with its TensorRT version. TensorRT detects a mismatch while loading, with an
error about bytes; the JSON file beside the engine allows a clear refusal before that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from export.engine.cuda import Device
from export.engine.trt import Flavour
from export.errors import ExportError
from export.files import read_json, sha256_file, write_json

FORMAT = 1
_REBUILD = "Build the engine again."
_HERE = "Build it again on this machine with: python -m export build FILE.onnx"


@dataclass(frozen=True)
class EngineInfo:
    """The facts of an engine.

    Attributes:
        engine: Name of the engine file.
        sha256, size: Its checksum and size in bytes.
        onnx: Name of the ONNX file that it was built from.
        onnx_sha256: Checksum of that file.
        precision: "fp32", "fp16" or "int8", from the ONNX file's tensors.
        module, version: The TensorRT module that built it.
        device: Name of the GPU that it was built on; empty where none was needed.
        compute_capabilities: The compute capabilities it was built for, such as "8.6".
        inputs: Name -> shape; -1 is a dynamic dimension.
        outputs: Names of the outputs.
        settings: The builder's settings.
        metadata: The key-value pairs of the ONNX file.
        seconds: Duration of the build; not saved, so that equal builds give equal files.
    """

    engine: str
    sha256: str
    size: int
    onnx: str
    onnx_sha256: str
    precision: str
    module: str
    version: str
    device: str
    compute_capabilities: tuple[str, ...]
    inputs: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    settings: dict[str, Any]
    metadata: dict[str, str]
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields for a JSON file, without the duration of the build."""
        content = asdict(self)
        del content["seconds"]
        return {"format": FORMAT, **content}


def sidecar_path(engine: Path) -> Path:
    """The path of an engine's description: `engines/slim.engine` -> `engines/slim.json`."""
    return engine.with_suffix(".json")


def write_sidecar(info: EngineInfo, engine: Path) -> None:
    """Write the description beside the engine.

    Raises:
        ExportError: the file cannot be written.
    """
    write_json(sidecar_path(engine), info.to_dict())


def read_sidecar(engine: str | Path) -> EngineInfo:
    """Read the description of an engine and check it against the engine's checksum.

    Raises:
        ExportError: the engine or its description is missing or damaged, or has another format, or the two do not
            match.
    """
    path = Path(engine)
    if not path.is_file():
        raise ExportError(f"There is no engine {path}.")
    sidecar = sidecar_path(path)
    content = read_json(sidecar, "engine's description")
    if content.pop("format", None) != FORMAT:
        raise ExportError(f"{sidecar} was written by another version of the program.", _REBUILD)
    try:
        info = EngineInfo(
            **{
                **content,
                "compute_capabilities": tuple(content["compute_capabilities"]),
                "outputs": tuple(content["outputs"]),
                "inputs": {name: tuple(shape) for name, shape in content["inputs"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{sidecar} does not describe an engine: {error}.", _REBUILD) from error
    if sha256_file(path) != info.sha256:
        raise ExportError(
            f"{sidecar.name} does not describe {path}: the checksums differ.",
            "Build the engine again, or copy both files again.",
        )
    return info


def require_loadable(info: EngineInfo, flavour: Flavour, device: Device) -> None:
    """Refuse an engine that was built for another GPU or by another version.

    Raises:
        ExportError: the message names what the engine needs and what this machine has.
    """
    if info.module != flavour.module:
        raise ExportError(f"{info.engine} was built with {info.module}; this machine has {flavour.title}.", _HERE)
    if info.version != flavour.version and not info.settings.get("version_compatible"):
        raise ExportError(
            f"{info.engine} was built with version {info.version}; this machine has {flavour.title}.", _HERE
        )
    if device.compute_capability not in info.compute_capabilities and not (
        info.settings.get("hardware_compatible") and device.major >= 8
    ):
        raise ExportError(
            f"{info.engine} is for compute capability {', '.join(info.compute_capabilities)}; "
            f"the {device.name} of this machine has {device.compute_capability}.",
            _HERE,
        )
