"""Timing in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.latency.backends.cpu import OrtProcess, measured
from compressor.latency.networks import TaggedNetwork, tag
from compressor.latency.request import Request, Turns
from export.convert.to_onnx import export_onnx
from export.errors import ExportError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network, and one of a sixteenth of its arithmetic."""
    folder = tmp_path_factory.mktemp("apart")
    paths = folder / "wide.onnx", folder / "narrow.onnx"
    for path, width in zip(paths, (128, 32), strict=True):
        net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()).eval()
        export_onnx(net, torch.zeros(1, 3, 32, 32), path)
    return paths


def test_operators_and_whole_come_back(files: tuple[Path, Path]) -> None:
    network = tag(files[0])
    times = OrtProcess().measure(network, 0.05)
    assert times.operators_ms.shape[1] == network.operators == 2
    assert len(times.whole_ms) > 3
    first, second = np.median(times.operators_ms, axis=0)
    assert 0 < first < second < 2 * times.median_ms
    assert times.slowdown >= 0


def test_a_network_without_operators_is_timed_as_a_whole(files: tuple[Path, Path]) -> None:
    times = OrtProcess().measure(TaggedNetwork(files[1].read_bytes(), (), ()), 0.05)
    assert times.operators_ms.shape == (0, 0)
    assert times.median_ms > 0


def test_two_files_are_timed_in_turns(files: tuple[Path, Path]) -> None:
    found = measured(*files, Request(), Turns(repeats=2))
    assert found.dense.runtime == "onnxruntime"
    assert (found.ratio.sessions, found.dense.runs) == (2, found.slim.runs)
    assert 0 < found.ratio.value < 0.7
    assert found.ratio.bursts >= 24


def test_a_file_that_cannot_be_timed_in_turns_is_named(tmp_path: Path, files: tuple[Path, Path]) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match=r"cannot load .*damaged\.onnx"):
        measured(files[0], tmp_path / "damaged.onnx", Request(), Turns(target=0.5))


def test_a_file_that_is_no_network(tmp_path: Path, files: tuple[Path, Path]) -> None:
    device = OrtProcess()
    with pytest.raises(ExportError, match="cannot load the network") as caught:
        device.measure(TaggedNetwork(b"nothing of the kind", (), ()), 0.05)
    assert "ExportError" not in str(caught.value)
    assert device.measure(TaggedNetwork(files[1].read_bytes(), (), ()), 0.05).median_ms > 0


def test_a_process_that_dies_is_said_and_replaced(files: tuple[Path, Path]) -> None:
    device, network = OrtProcess(), TaggedNetwork(files[1].read_bytes(), (), ())
    device.measure(network, 0.05)
    assert device._child is not None
    os.kill(device._child.pid, signal.SIGKILL)
    with pytest.raises(ExportError, match="times networks was killed by SIGKILL"):
        device.measure(network, 0.05)
    assert device.measure(network, 0.05).median_ms > 0


def test_several_at_once_and_a_percentile(files: tuple[Path, Path]) -> None:
    request = Request(streams=2)
    found = measured(*files, request, Turns(repeats=2, percentile=90))
    assert (found.dense.streams, found.slim.streams) == (2, 2)
    assert found.slim.inputs_per_s == pytest.approx(2e3 / found.slim.mean_ms)
    assert found.ratio.value == pytest.approx(found.slim.p90_ms / found.dense.p90_ms)
    assert found.ratio.dense_ms == pytest.approx(found.dense.p90_ms)
    assert found.tails[1] == pytest.approx(found.slim.p90_ms / found.slim.median_ms)
    times = OrtProcess(streams=2).measure(tag(files[0]), 0.05)
    assert times.operators_ms.shape[1] == 2
    assert len(times.whole_ms) >= 2 * 2 * 7  # of both, before and after the profile


def test_the_process_that_times_networks_is_light() -> None:
    """Two of them start for each session of a measurement, and importing torch would take most of its time."""
    code = "import sys, compressor.latency.backends.cpu; print({'torch', 'scipy', 'pydantic'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
