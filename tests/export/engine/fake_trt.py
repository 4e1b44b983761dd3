"""A stand-in for the `tensorrt` module in one of its versions: the names that the version has, and no others.

The names follow NVIDIA's API references and migration guides of 8.5, 8.6, 10.x and 11.x. Using one that a
version lacks raises AttributeError, as the real module would. The stand-in records what the builder asked
of it.
"""

from __future__ import annotations

import enum
import types
from typing import Any

from export.convert.onnx_header import parse_header

VERSIONS = ("8.5.2.2", "8.6.2.3", "10.3.0.30", "10.13.2.6", "11.4.1.5")
UNSUPPORTED = ("Det", "Unique")


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def make_module(version: str, *, dla_cores: int = 0, build_error: str = "") -> types.ModuleType:
    """A module that calls itself `version`; `log` on it lists what was asked of it."""
    number = release(version)
    module = types.ModuleType("tensorrt")
    log: list[tuple[Any, ...]] = []
    module.__dict__.update(__version__=version, log=log)

    def names(title: str, *present: str) -> Any:
        made = enum.IntEnum(title, {name: value for value, name in enumerate(present)})
        setattr(module, title, made)
        return made

    creation = [] if number >= (11, 0) else ["EXPLICIT_BATCH"]
    creation += ["STRONGLY_TYPED"] if number >= (10, 0) else []
    numbers = {name: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}[name] for name in creation}
    made = enum.IntEnum("NetworkDefinitionCreationFlag", numbers)
    module.NetworkDefinitionCreationFlag = made  # type: ignore[attr-defined]
    flags = ["TF32", "REFIT", "GPU_FALLBACK", "DISABLE_TIMING_CACHE"]
    flags += ["FP16", "INT8"] if number < (11, 0) else []
    flags += ["VERSION_COMPATIBLE"] if number >= (8, 6) else []
    names("BuilderFlag", *flags)
    names("MemoryPoolType", "WORKSPACE", "DLA_MANAGED_SRAM")
    names("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
    names("DeviceType", "GPU", "DLA")
    if number >= (8, 6):
        names("HardwareCompatibilityLevel", "NONE", "AMPERE_PLUS")

    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]
    settable = {"profiling_verbosity", "default_device_type", "DLA_core"}
    if number >= (8, 6):
        settable |= {"builder_optimization_level", "hardware_compatibility_level"}

    class Cache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"+timed"

    class Config:
        def __setattr__(self, name: str, value: Any) -> None:
            if name not in settable:
                raise AttributeError(f"IBuilderConfig of {version} has no {name}")
            log.append((name, value))

        def set_flag(self, flag: Any) -> None:
            log.append(("set_flag", flag.name))

        def clear_flag(self, flag: Any) -> None:
            log.append(("clear_flag", flag.name))

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            log.append(("memory", pool.name, size))

        def create_timing_cache(self, content: bytes) -> Cache:
            return Cache(content)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            log.append(("cache", cache.content))
            object.__setattr__(self, "cache", cache)
            return not cache.content.startswith(b"foreign")

        def get_timing_cache(self) -> Cache:
            return self.__dict__["cache"]  # type: ignore[no-any-return]

        def add_optimization_profile(self, profile: Any) -> None:
            log.append(("profile", profile.shapes))

    class Network:
        num_layers, num_outputs = 0, 0

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, tuple[Any, ...]] = {}

        def set_shape(self, name: str, *shapes: Any) -> None:
            self.shapes[name] = shapes

    class Builder:
        num_DLA_cores = dla_cores

        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            if number < (10, 0) and not flags & 1:
                raise RuntimeError("implicit batch networks cannot be parsed")
            log.append(("create_network", flags))
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            if build_error:
                self.logger.log(Severity.ERROR, build_error)
                return None
            return f"engine of {version}".encode()

    class ParserError:
        def __init__(self, index: int, node: Any) -> None:
            self._index, self._node = index, node

        def desc(self) -> str:
            return ""

        def code(self) -> str:
            return "ErrorCode.UNSUPPORTED_NODE"

        def node(self) -> int:
            return self._index

    if number >= (8, 6):
        ParserError.node_name = lambda self: self._node.name  # type: ignore[attr-defined]
        ParserError.node_operator = lambda self: self._node.kind  # type: ignore[attr-defined]
    module.ParserError = ParserError  # type: ignore[attr-defined]

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self._network, self._errors = network, []

        def parse(self, content: bytes) -> bool:
            nodes = parse_header(content).nodes
            errors = [ParserError(i, node) for i, node in enumerate(nodes) if node.kind in UNSUPPORTED]
            self._errors = errors if number >= (10, 0) else errors[:1]  # older ones stop at the first
            self._network.num_layers, self._network.num_outputs = len(nodes), 1
            return not errors

        def parse_from_file(self, path: str) -> bool:
            log.append(("parse_from_file", path))
            with open(path, "rb") as file:
                return self.parse(file.read())

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

        def supports_model(self, content: bytes) -> tuple[bool, list[tuple[list[int], bool]]]:
            kinds = [node.kind for node in parse_header(content).nodes]
            parts = [([index], kind not in UNSUPPORTED) for index, kind in enumerate(kinds)]
            return all(good for _, good in parts), parts

    for made_class in (ILogger, Builder, OnnxParser):
        setattr(module, made_class.__name__, made_class)
    return module
