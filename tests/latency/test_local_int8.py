"""INT8 on this machine's CPU: networks are converted before they are timed, and tables are kept apart from FP32's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency.assemble import export_candidate
from compressor.latency.backends.cpu import OrtProcess
from compressor.latency.converted import in_precision, in_precision_beside
from compressor.latency.local import Converted, LocalCpu
from compressor.latency.networks import NetworkTimes, TaggedNetwork
from compressor.latency.request import Request, Turns
from compressor.pruning.space import PruningSpace
from export.convert.calibrated import ONNXRUNTIME
from export.convert.to_onnx import export_onnx
from tests.export.nets import SmallNet

TO_INT8 = partial(in_precision, precision="int8", runtime=ONNXRUNTIME)


class Seen:
    """A device that keeps the network that it is given."""

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        self.network = network
        return NetworkTimes(np.ones(1), np.ones((1, network.operators)))


def kinds_in(content: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(content).graph.node]


def test_networks_are_timed_in_int8_and_by_operator(space: PruningSpace, example: Tensor) -> None:
    network, seen = export_candidate(space, space.rank(), example, space.dense_widths), Seen()
    Converted(seen, TO_INT8).measure(network, 0.1)
    assert (seen.network.owner, seen.network.epilogues) == (network.owner, network.epilogues)
    assert "QuantizeLinear" in kinds_in(seen.network.model)
    assert "QuantizeLinear" not in kinds_in(network.model)
    process = OrtProcess()
    times = [each.measure(network, 0.1) for each in (process, Converted(process, TO_INT8))]
    process.close()
    for each in times:
        assert each.operators_ms.shape[1] == network.operators
        assert (np.median(each.operators_ms, axis=0) > 0).all()


def test_tables_of_int8_are_kept_apart() -> None:
    here = LocalCpu()
    floats, int8 = Request(), Request(precision="int8")
    assert here.cache_key(floats) != here.cache_key(int8)
    assert here.identity(floats) == {}  # as journals of earlier versions
    assert here.identity(int8) == {"precision": "int8"}
    here.check("int8")
    here.check("mixed")
    with pytest.raises(CompressorError, match="run in fp32, int8, mixed on this machine's CPU, not in fp16"):
        here.check("fp16")


def test_the_delivered_file_is_timed(tmp_path: Path) -> None:
    for name, width in (("dense", 16), ("model", 8)):
        export_onnx(SmallNet(width), torch.zeros(1, 3, 16, 16), tmp_path / f"{name}.onnx")
    dense, slim = tmp_path / "dense.onnx", tmp_path / "model.onnx"
    files = in_precision_beside(dense, slim, Request(precision="int8"), ONNXRUNTIME)
    assert all("QuantizeLinear" in kinds_in(each) for each in files)
    (tmp_path / "model.int8.onnx").write_bytes(b"int8")
    assert in_precision_beside(dense, slim, Request(precision="int8"), ONNXRUNTIME)[1] == b"int8"
    (tmp_path / "model.int8.onnx").unlink()
    timing = LocalCpu().time(dense, slim, Request(precision="int8"), Turns(repeats=1))
    assert timing.ratio.value > 0
    assert timing.slim.runtime == "onnxruntime"


def test_a_batch_larger_than_the_usual_noise_is_converted(tmp_path: Path) -> None:
    export_onnx(SmallNet(), torch.zeros(6, 3, 16, 16), tmp_path / "model.onnx")
    found = in_precision((tmp_path / "model.onnx").read_bytes(), "int8", ONNXRUNTIME)
    assert "QuantizeLinear" in kinds_in(found)
