"""Builds engines with TensorRT 8.5 to 11 and TensorRT-RTX, and caches them.

    info = build_engine("model.onnx", "engines/model.engine")
    info = build_engine("model.onnx", "m.engine", module="tensorrt_rtx_bindings", compute_capability="8.6")
    info, cached = cached_engine("model.onnx", "model.engine", "cache")

The ONNX file determines the precision: newer versions read it from the file, older ones also need flags, which are set
from its tensors. Anything that a version would misread, ignore or fail on without a reason is refused before the build.
A JSON file beside the engine describes it (`export.engine.engine_info`).
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Mapping, Sequence, Union

from export.convert.onnx_header import OnnxHeader, parse_header
from export.engine.cuda import Device, find_device
from export.engine.engine_info import EngineInfo, read_sidecar, write_sidecar
from export.engine.trt import RTX, Flavour, Messages, load
from export.errors import ExportError
from export.files import read_bytes, sha256_bytes, write_bytes

RTX_DEFAULT = ("8.6", "8.9", "12.0")
"""Compute capabilities that TensorRT-RTX builds for by default: Ampere, Ada and Blackwell."""

DEFAULT_WORKSPACE = 1 << 30
Shape = Sequence[int]
Capabilities = Union[str, Sequence[str], None]
_CACHE_FORMAT = 1


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
    targets = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
    if flavour.rtx:
        return targets or RTX_DEFAULT
    if device is None:
        raise ExportError(
            f"{flavour.title} builds an engine on the GPU that the engine is for, and no GPU was found.",
            "Build on the device itself (python -m export build FILE.onnx, or a bundle).",
        )
    if targets and targets != (device.compute_capability,):
        raise ExportError(
            f"{flavour.title} builds for the GPU of this machine ({device.name}, compute capability "
            f"{device.compute_capability}), not for {', '.join(targets)}.",
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


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    module: str | None = None,
    compute_capability: Capabilities = None,
    settings: BuildSettings | None = None,
    timing_cache: str | Path | None = None,
) -> EngineInfo:
    """Build an engine from an ONNX file and write its description beside it.

    Args:
        onnx_path: The ONNX file, with its weights inside.
        engine_path: The engine file, written atomically. Its description has the same name with the suffix
            `.json`.
        module: "tensorrt" or "tensorrt_rtx_bindings"; None is the first that is installed.
        compute_capability: The GPUs to build for, such as "8.6" or ["8.6", "8.9"]. TensorRT builds only
            for the GPU of this machine, TensorRT-RTX for any GPU that it supports. None is the GPU of this
            machine, or `RTX_DEFAULT`.
        settings: All other settings; None for `BuildSettings()`.
        timing_cache: Folder for kernel timings by device and version; None disables the cache.

    Raises:
        ExportError: no module is installed, the file is damaged, its opset is too new or it has unsupported
            operators (all are named), this version does not support a setting, or the build fails.
    """
    source, target = Path(onnx_path), Path(engine_path)
    content = read_bytes(source, "ONNX file")
    header = parse_header(content, str(source))
    trt, flavour = load(module)
    wanted = settings or BuildSettings()
    device = find_device()
    capabilities = target_capabilities(flavour, compute_capability, device)
    check_request(header, str(source), flavour, wanted)
    started = time.perf_counter()
    build = _Build(trt, flavour, wanted, header, str(source))
    network = build.parse(content, source)
    config = build.configure(network, capabilities)
    cache = timing_cache_path(timing_cache, flavour, device)
    build.use_timing_cache(config, cache)
    serialised = build.serialise(network, config)
    write_bytes(target, serialised)
    info = EngineInfo(
        engine=target.name,
        sha256=sha256_bytes(serialised),
        size=len(serialised),
        onnx=source.name,
        onnx_sha256=sha256_bytes(content),
        precision=header.precision,
        module=flavour.module,
        version=flavour.version,
        device=device.name if device and not flavour.rtx else "",
        compute_capabilities=capabilities,
        inputs=dict(header.shapes),
        outputs=header.outputs,
        settings=wanted.to_dict(),
        metadata=header.metadata,
        seconds=time.perf_counter() - started,
    )
    write_sidecar(info, target)
    return info


class _Build:
    """The objects of one build, which must outlive those that are created from them."""

    def __init__(
        self, trt: Any, flavour: Flavour, settings: BuildSettings, header: OnnxHeader, name: str
    ) -> None:
        self.trt, self.flavour, self.settings, self.header, self.name = trt, flavour, settings, header, name
        self.messages = Messages(trt, flavour.module)
        self.builder = trt.Builder(self.messages.logger)

    def parse(self, content: bytes, source: Path) -> Any:
        """Parse the file into a network."""
        flags = 0
        creation = self.trt.NetworkDefinitionCreationFlag
        if self.flavour.explicit_batch_flag:
            flags |= 1 << int(creation.EXPLICIT_BATCH)
        if self.flavour.strongly_typed == "flag":
            flags |= 1 << int(creation.STRONGLY_TYPED)
        network = self.builder.create_network(flags)
        self.parser = self.trt.OnnxParser(network, self.messages.logger)
        # external weights can only be found from the path
        parsed = (
            self.parser.parse_from_file(str(source))
            if self.header.external_data
            else self.parser.parse(content)
        )
        if not parsed or self.parser.num_errors:
            raise self._parser_error(content)
        if network.num_layers == 0 or network.num_outputs == 0:
            raise ExportError(f"{self.flavour.title} found no operators in {self.name}.", "Export it again.")
        return network

    def _parser_error(self, content: bytes) -> ExportError:
        found: list[str] = []
        for index in range(self.parser.num_errors):
            error = self.parser.get_error(index)
            found.append(self._describe(error))
        if self.flavour.parser_stops_early:
            found += self._unsupported(content)
        named = list(dict.fromkeys(text for text in found if text))
        count = "an operator" if len(named) == 1 else f"{len(named)} operators"
        if not named:
            return ExportError(f"{self.flavour.title} cannot read {self.name}: {self.messages.last_error()}.")
        return ExportError(
            f"{self.flavour.title} does not support {count} of {self.name}: {'; '.join(named)}.",
            "Replace them in the network, or build with a newer version.",
        )

    def _describe(self, error: Any) -> str:
        description = str(error.desc()).strip()
        if hasattr(error, "node_name"):
            node, kind = str(error.node_name()), str(error.node_operator())
        else:
            place = int(error.node())
            known = 0 <= place < len(self.header.nodes)
            node, kind = (self.header.nodes[place].name, self.header.nodes[place].kind) if known else ("", "")
        if not kind:
            return description
        unsupported = "UNSUPPORTED" in str(error.code()) or description in ("", "false")
        reason = "not supported" if unsupported and description in ("", "false") else description
        return f"{node or 'a node'} ({kind}): {reason}"

    def _unsupported(self, content: bytes) -> list[str]:
        if not hasattr(self.parser, "supports_model"):
            return []
        _, parts = self.parser.supports_model(content)
        nodes = self.header.nodes
        return [
            f"{nodes[index].name} ({nodes[index].kind}): not supported"
            for indices, supported in parts
            if not supported
            for index in indices
            if index < len(nodes)
        ]

    def configure(self, network: Any, capabilities: tuple[str, ...]) -> Any:
        """Create the builder's configuration."""
        trt, config, settings = self.trt, self.builder.create_builder_config(), self.settings
        flag = trt.BuilderFlag
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.flavour.precision_flags and self.header.precision in ("fp16", "int8"):
            config.set_flag(flag.FP16)
            if self.header.precision == "int8":
                config.set_flag(flag.INT8)
        if not settings.tf32:
            config.clear_flag(flag.TF32)
        if settings.optimisation_level is not None:
            config.builder_optimization_level = settings.optimisation_level
        if settings.version_compatible:
            config.set_flag(flag.VERSION_COMPATIBLE)
        if settings.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if settings.dla_core is not None:
            self._use_dla(config, settings.dla_core)
        if settings.profile:
            profile = self.builder.create_optimization_profile()
            for name, shapes in settings.profile.items():
                profile.set_shape(name, *(tuple(shape) for shape in shapes))
            config.add_optimization_profile(profile)
        if self.flavour.module == RTX:
            self._aim_at(config, capabilities)
        return config

    def _use_dla(self, config: Any, core: int) -> None:
        cores = int(self.builder.num_DLA_cores)
        if not 0 <= core < cores:
            raise ExportError(f"Deep-learning accelerator {core} was requested; this device has {cores}.")
        config.default_device_type = self.trt.DeviceType.DLA
        config.DLA_core = core
        config.set_flag(self.trt.BuilderFlag.GPU_FALLBACK)

    def _aim_at(self, config: Any, capabilities: tuple[str, ...]) -> None:
        known = self.trt.ComputeCapability.__members__
        names = {f"{name[2:-1]}.{name[-1]}": value for name, value in known.items() if name.startswith("SM")}
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            if capability not in names:
                raise ExportError(
                    f"{self.flavour.title} does not build for compute capability {capability}: expected "
                    f"{', '.join(sorted(names, key=float))}.",
                    "Build an engine for a Jetson on the board itself.",
                )
            if not config.set_compute_capability(names[capability], place):
                raise ExportError(f"{self.flavour.title} refused compute capability {capability}.")

    def use_timing_cache(self, config: Any, path: Path | None) -> None:
        """Load the timing cache; a cache that does not match is replaced by an empty one."""
        self._cache_path = path
        if path is None:
            return
        stored = path.read_bytes() if path.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(stored), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def serialise(self, network: Any, config: Any) -> bytes:
        """Build the engine and save the timing cache."""
        serialised = self.builder.build_serialized_network(network, config)
        if serialised is None:
            raise ExportError(
                f"{self.flavour.title} cannot build {self.name}: {self.messages.last_error()}.",
                self._advice(),
            )
        if self._cache_path is not None:
            write_bytes(self._cache_path, bytes(memoryview(config.get_timing_cache().serialize())))
        return bytes(memoryview(serialised))

    def _advice(self) -> str:
        text = " ".join(self.messages.errors())
        if "Turing" in text:
            return "Turing GPUs (7.5) need FP16: export the network in FP16."
        if "orkspace" in text or "memory" in text.lower():
            return f"Allow a larger workspace than {self.settings.workspace_bytes} bytes."
        return ""


def cached_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    cache: str | Path,
    *,
    module: str | None = None,
    compute_capability: Capabilities = None,
    settings: BuildSettings | None = None,
    timing_cache: str | Path | None = None,
) -> tuple[EngineInfo, bool]:
    """Copy an engine from the cache, or build it and add it; return its facts and whether it was cached.

    A build takes seconds to minutes, and resumed or repeated exports build the same file again. The key covers the ONNX
    file's bytes, the TensorRT product and version, the GPU and all settings. A cached engine whose checksum does not
    match is built again.

    Args:
        cache: Folder of the cache.
        onnx_path, engine_path, module, compute_capability, settings, timing_cache: As in `build_engine`.

    Raises:
        ExportError: as `build_engine`.
    """
    source, target = Path(onnx_path), Path(engine_path)
    wanted = settings or BuildSettings()
    key = engine_key(read_bytes(source, "ONNX file"), module, compute_capability, wanted)
    kept = Path(cache) / f"{key}.engine"
    found: EngineInfo | None = None
    with suppress(ExportError):  # missing or damaged
        found = read_sidecar(kept)
    built = found or build_engine(
        source,
        kept,
        module=module,
        compute_capability=compute_capability,
        settings=wanted,
        timing_cache=timing_cache,
    )
    info = replace(built, engine=target.name, onnx=source.name)
    write_bytes(target, read_bytes(kept, "engine"))
    write_sidecar(info, target)
    return info, found is not None


def engine_key(
    content: bytes, module: str | None, compute_capability: Capabilities, settings: BuildSettings
) -> str:
    """The cache key of an engine: a checksum of everything that determines it.

    Raises:
        ExportError: no module is installed, or it cannot build for the requested GPU.
    """
    _, flavour = load(module)
    device = find_device()
    facts = {
        "format": _CACHE_FORMAT,
        "onnx": sha256_bytes(content),
        "module": flavour.module,
        "version": flavour.version,
        "capabilities": target_capabilities(flavour, compute_capability, device),
        # TensorRT tunes an engine for one GPU model, TensorRT-RTX for a generation
        "device": device.name if device is not None and not flavour.rtx else "",
        "settings": settings.to_dict(),
    }
    return sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:32]
