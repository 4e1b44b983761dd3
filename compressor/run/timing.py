"""Time the dense and the slim network in turns on a run's device: this CPU or GPU, or over ssh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.latency.paired import in_turns, measured
from compressor.latency.ratio import burst_of
from compressor.run.contract import prunes_nothing, searched_share
from compressor.run.device import device_precision
from compressor.run.folder import RunDir
from compressor.run.job import Job
from compressor.run.onnx_files import DENSE

if TYPE_CHECKING:
    from compressor.latency.paired import Timing
    from compressor.latency.ratio import PairSession
    from compressor.pruning.plan import ChannelPlan
    from export.device.here import Backend

GPU_SECONDS = 0.5
"""Seconds of one burst on a GPU."""


def timed_on_device(run: RunDir, job: Job, slim: Path, plan: ChannelPlan) -> Timing:
    """Time the run's dense file and a slim one in turns, until the latency target is decided.

    Args:
        run, job: Run and job that name the device.
        slim: FP32 ONNX file. A GPU times the file of the run's precision beside it, or a temporary one if there is
            none.
        plan: Plan of the network in the file.

    Raises:
        CompressorError: The device cannot be reached, or its state differs from that of its table.
    """
    from export.device.here import gpu_backend

    contract = job.recipe.contract
    target = None if prunes_nothing(job, plan) else searched_share(run, job)
    backend = None if job.over_ssh else gpu_backend()
    if not job.over_ssh and backend is None:
        return measured(run.file(DENSE), slim, job.recipe.threads, contract.repeats, target, contract.seconds)
    files = _in_its_precision(run, job, slim)
    if backend is not None:
        return _on_gpu(job, backend, files, target)
    from compressor.latency.over_ssh import measured_over_ssh

    return measured_over_ssh(job.recipe.device, *files, job.table)


def _in_its_precision(run: RunDir, job: Job, slim: Path) -> tuple[bytes, bytes]:
    """Return the dense and the slim file as the device runs them: the delivered file if there is one."""
    from compressor.latency.remote_bundle import in_precision

    precision, shape = device_precision(job.recipe), job.data.input_shape
    delivered = slim if precision == "fp32" else slim.with_name(f"{slim.stem}.{precision}.onnx")
    dense = in_precision(run.file(DENSE).read_bytes(), precision, shape)
    if delivered.is_file():
        return dense, delivered.read_bytes()
    return dense, in_precision(slim.read_bytes(), precision, shape)


def _on_gpu(job: Job, backend: Backend, files: tuple[bytes, bytes], target: float | None) -> Timing:
    """Time bursts in turns; each one rebuilds its network, like a new process on the CPU."""
    from compressor.latency.backends import device_of
    from compressor.latency.ort_profile import TaggedNetwork

    device = device_of(backend, "fp32")  # the files are converted already
    networks = [TaggedNetwork(content, (), ()) for content in files]
    sat = 0

    def run_session() -> PairSession:
        nonlocal sat
        sat += 1
        order = (0, 1) if sat % 2 else (1, 0)
        found = {
            place: burst_of(device.measure(networks[place], GPU_SECONDS).whole_ms.tolist()) for place in order
        }
        return [(found[0], found[1])]

    contract = job.recipe.contract
    return in_turns(
        run_session,
        backend.runtime,
        backend.version,
        repeats=contract.repeats,
        target=target,
        seconds=contract.seconds,
    )
