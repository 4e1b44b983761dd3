"""What stands beside an engine: where it came from, what it is for, and whether it may be loaded here.

An engine is bound to a GPU and to a version. TensorRT finds out while loading, and says so in terms of
bytes; the JSON file beside the engine lets us refuse it before, in words.
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
_HERE = "Build it again here with: python -m export build FILE.onnx"


@dataclass(frozen=True)
class EngineInfo:
    """The facts of an engine.

    Attributes:
        engine: Name of the engine file.
        sha256, size: Its checksum and its size in bytes.
        onnx: Name of the ONNX file that it was built from.
        onnx_sha256: Checksum of that file.
        precision: Of the ONNX file's tensors: "fp32", "fp16" or "int8".
        module, version: What built it.
        device: Name of the GPU that it was built on; empty where none was needed.
        compute_capabilities: The GPUs that it is for, such as "8.6".
        inputs, outputs: Names with shapes; -1 is an open dimension.
        settings: The builder's settings.
        metadata: The key-value pairs of the ONNX file.
        seconds: How long the build took; not written down, so that equal builds leave equal files.
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
        """The fields for a JSON file, without the time that the build took."""
        content = asdict(self)
        del content["seconds"]
        return {"format": FORMAT, **content}


def sidecar_path(engine: Path) -> Path:
    """`engines/slim.engine` -> `engines/slim.json`."""
    return engine.with_suffix(".json")


def write_sidecar(info: EngineInfo, engine: Path) -> None:
    """Write the facts beside the engine.

    Raises:
        ExportError: the file cannot be written.
    """
    write_json(sidecar_path(engine), info.to_dict())


def read_sidecar(engine: str | Path) -> EngineInfo:
    """The facts beside an engine, checked against the engine's bytes.

    Raises:
        ExportError: the engine or its facts are missing, damaged, of another format, or of another engine.
    """
    path = Path(engine)
    if not path.is_file():
        raise ExportError(f"There is no engine {path}.")
    sidecar = sidecar_path(path)
    content = read_json(sidecar, "engine's description")
    if content.pop("format", None) != FORMAT:
        raise ExportError(f"{sidecar} was not written by this version of the program.", _REBUILD)
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
            f"{path} is not the engine that {sidecar.name} describes: the checksums differ.",
            "Build the engine again, or copy both files again.",
        )
    return info


def require_loadable(info: EngineInfo, flavour: Flavour, device: Device) -> None:
    """Refuse an engine that was built for another GPU or by another version.

    Raises:
        ExportError: saying what the engine is for and what is here.
    """
    if info.module != flavour.module:
        raise ExportError(f"{info.engine} was built with {info.module}; here is {flavour.title}.", _HERE)
    if info.version != flavour.version and not info.settings.get("version_compatible"):
        raise ExportError(
            f"{info.engine} was built with version {info.version}; here is {flavour.title}.", _HERE
        )
    if device.compute_capability not in info.compute_capabilities and not (
        info.settings.get("hardware_compatible") and device.major >= 8
    ):
        raise ExportError(
            f"{info.engine} is for compute capability {', '.join(info.compute_capabilities)}; "
            f"the {device.name} here has {device.compute_capability}.",
            _HERE,
        )
