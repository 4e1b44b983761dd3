"""A small network, and devices that are made up: their times follow from the network's shapes alone."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.latency import assemble, joined, local, over_ssh, precisions, remote_bundle
from compressor.latency import measured as measured_devices
from compressor.latency.assemble import export_candidate
from compressor.latency.converted import in_precision
from compressor.latency.local import LocalCpu
from compressor.latency.machine import channel_block
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.precisions import _on_any_inputs
from compressor.latency.remote_bundle import write_table_bundle
from compressor.latency.request import Request
from compressor.latency.schema import Precision
from compressor.latency.table import LatencyTable
from compressor.pruning.space import PruningSpace
from export.convert.calibrated import TENSORRT
from export.convert.quantize import with_rest
from export.convert.trees import tensors_in
from export.device.archive import unpack
from tests.export.device.fake_trtexec import known_layers
from tests.latency.made_up_board import MadeUpBoard


@functools.cache
def channels_at_once() -> int:
    """The block of this machine's convolutions; asked once, as finding it loads a network."""
    return channel_block()


def local_table(
    space: PruningSpace,
    example: Tensor,
    *,
    device: object = None,
    cache_dir: Path | None = None,
    journal_path: Path | None = None,
    **request: Any,
) -> LatencyTable:
    """The table of this machine's CPU, or of a made-up device in its place, for which nothing is cached."""
    here = LocalCpu(cache_dir=cache_dir)
    if device is None:
        return here.table(space, example, Request(**request))
    return here.measured(space, example, Request(**request), device=device, journal_path=journal_path)


class SmallNet(nn.Module):
    """A stem, a residual block, a depthwise pair and a classifier: five groups or so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(32, 48, 3, 1, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(48, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32))
        self.wide = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6())
        self.deep = nn.Sequential(
            nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False), nn.BatchNorm2d(64), nn.ReLU6()
        )
        self.narrow = nn.Sequential(nn.Conv2d(64, 40, 1, bias=False), nn.BatchNorm2d(40))
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.two(self.one(x)))
        x = self.narrow(self.deep(self.wide(x)))
        return self.head(x.mean((2, 3)))


@dataclass
class MadeUpDevice:
    """Takes `factor` times what its rule says: a launch for each operator, then blocks of channels.

    The blocks are those of this machine, by which tables of local devices are fitted.

    Attributes:
        factor: How much slower than its rule.
        noise: Standard deviation of a run's time, as a share.
        measured: How many networks it was given.
    """

    factor: float = 1.0
    noise: float = 0.0
    seed: int = 0
    measured: int = field(default=0, init=False)

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        import onnx

        self.measured += 1
        graph = onnx.load_model_from_string(network.model).graph
        weights = {item.name: tuple(item.dims) for item in graph.initializer}
        times = []
        for node in graph.node:
            shape = next((weights[name] for name in node.input if len(weights.get(name, ())) >= 2), None)
            if node.op_type in ("Conv", "Gemm") and shape is not None:
                times.append(self.rule(shape))
        rng = np.random.default_rng([self.seed, self.measured])
        runs = np.asarray(times)[None] * (1 + self.noise * rng.standard_normal((40, len(times)))).clip(0.2)
        return NetworkTimes(self.whole(runs.sum(axis=1)), runs * self.factor)

    def rule(self, shape: tuple[int, ...]) -> float:
        """Milliseconds of one operator with weights of this shape."""
        block = channels_at_once()
        blocks = np.ceil(shape[0] / block) * np.ceil(shape[1] / block) * (block / 16) ** 2
        return float(0.02 + 0.003 * blocks * np.prod(shape[2:]))

    def whole(self, total: np.ndarray) -> np.ndarray:
        """The network's time from the sum of its operators'."""
        return np.asarray(self.factor * (0.05 + 0.9 * total))


_EXPORTED: dict[tuple[Any, ...], tuple[PruningSpace, TaggedNetwork]] = {}


def _exported_once(
    space: PruningSpace, ranking: Any, example: Any, widths: np.ndarray, **options: Any
) -> TaggedNetwork:
    """`export_candidate`, once for each sub-network of a space, which is kept with its network."""
    key = (id(space), tuple(widths.tolist()), *(tuple(each.shape) for each in tensors_in([example])), *options.items())
    if key not in _EXPORTED:
        _EXPORTED[key] = space, export_candidate(space, ranking, example, widths, **options)
    return _EXPORTED[key][1]


@pytest.fixture(scope="module", autouse=True)
def _exports_are_kept() -> Iterator[None]:
    """Most of the time of a table goes into exports, and most tables of these tests have the same sub-networks."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (assemble, joined, measured_devices, remote_bundle):
            patch.setattr(module, "export_candidate", _exported_once)
        yield


_CONVERTED: dict[tuple[Any, ...], Any] = {}


def _once(make: Callable[..., Any], *key: Any) -> Any:
    """What `make` returns, worked out once for a key."""
    if key not in _CONVERTED:
        _CONVERTED[key] = make()
    return _CONVERTED[key]


def _converted_once(content: bytes, precision: Precision, runtime: str = TENSORRT) -> bytes:
    make = functools.partial(in_precision, content, precision, runtime)
    return bytes(_once(make, hashlib.sha256(content).digest(), precision, runtime))


def _calibrated_once(content: bytes, runtime: str) -> Any:
    return _once(functools.partial(_on_any_inputs, content, runtime), hashlib.sha256(content).digest(), runtime)


def _rest_once(calibrated: Any, nodes: Sequence[str], rest: str) -> Any:
    """`with_rest`, as a copy of what it returned before."""
    import onnx

    def make() -> tuple[Any, bytes]:
        return calibrated, with_rest(calibrated, nodes, rest).SerializeToString()

    return onnx.load_model_from_string(_once(make, id(calibrated), *nodes, rest)[1])


@pytest.fixture(scope="module", autouse=True)
def _conversions_are_kept() -> Iterator[None]:
    """Tests of networks in other precisions convert the same sub-networks: each is calibrated and converted once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (local, over_ssh, precisions, remote_bundle):
            patch.setattr(module, "in_precision", _converted_once)
        patch.setattr(precisions, "_on_any_inputs", _calibrated_once)
        patch.setattr(precisions, "with_rest", _rest_once)
        yield


@pytest.fixture(scope="session")
def example() -> Tensor:
    return torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="session")
def space(example: Tensor) -> PruningSpace:
    torch.manual_seed(0)
    return PruningSpace(SmallNet().eval(), example, granularity=8)


@pytest.fixture
def device() -> type[MadeUpDevice]:
    return MadeUpDevice


@pytest.fixture(scope="session")
def table(space: PruningSpace, example: Tensor) -> LatencyTable:
    """The table of a device without noise."""
    return local_table(space, example, device=MadeUpDevice())


@pytest.fixture
def truth(space: PruningSpace) -> Callable[[np.ndarray], np.ndarray]:
    """What `MadeUpDevice()` takes for widths (N, G)."""

    def milliseconds(widths: np.ndarray) -> np.ndarray:
        times = []
        for row in np.atleast_2d(widths):
            total = 0.0
            for layer in space.layers:
                c_in, c_out = int(layer.in_channels(row)), int(layer.out_channels(row))
                shape = (c_out, 1 if layer.kind == "depthwise" else c_in, *layer.kernel)
                total += MadeUpDevice().rule(shape if layer.kind != "linear" else shape[:2])
            times.append(0.05 + 0.9 * total)
        return np.asarray(times)

    return milliseconds


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of user tables for one test."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def written(space: PruningSpace, example: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle."""
    patch = pytest.MonkeyPatch()
    patch.setattr(remote_bundle, "LEVELS", 2)
    patch.setattr(remote_bundle, "HELD_OUT", 4)
    folder = tmp_path_factory.mktemp("carry") / "carry"
    write_table_bundle(space, example, folder, "my-orin", Request("small", "fp16"))
    patch.undo()
    return folder


@pytest.fixture(scope="session")
def memory(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stand-in makes of each network, worked out here once."""
    folder = tmp_path_factory.mktemp("memory")
    for path in (written / "models").iterdir():
        for rule in ("named", "nameless"):
            known_layers(path.read_bytes(), rule, folder)
    return folder


@pytest.fixture(scope="session")
def measured(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle after it was on a made-up board, which writes what its script would."""
    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("device") / "carry"))
    board = MadeUpBoard()
    board.facts |= {"model": "", "gpu": "Orin", "compute_capability": "8.7"}
    board.run("", folder, folder / "results.tar.gz", duration_s=1, warmup_s=0, processes=2)
    for name, content in unpack(folder / "results.tar.gz").items():
        path = folder / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def back(measured: Path, tmp_path: Path) -> Path:
    """A copy of the measured bundle to spoil."""
    return Path(shutil.copytree(measured, tmp_path / "carry"))
