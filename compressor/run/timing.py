"""The dense and the slim network timed side by side on the device of a run: this CPU or GPU, or over ssh."""

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
    from compressor.latency.ratio import Sitting
    from compressor.pruning.plan import ChannelPlan
    from export.device.here import Backend

GPU_SECONDS = 0.5
"""One burst on a GPU."""


def timed_on_device(run: RunDir, job: Job, slim: Path, plan: ChannelPlan) -> Timing:
    """Time the run's dense file and a slim one in turns, until what was promised of it is known.

    Args:
        run, job: Whose device.
        slim: An FP32 ONNX file; a GPU times the one of the run's precision that lies beside it, else one made for
            the purpose.
        plan: What is in it.

    Raises:
        CompressorError: the device is not reached, or is no longer in the state of its table.
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
    """The dense and the slim file as the device runs them: the delivered one where there is one."""
    from compressor.latency.remote_bundle import in_precision

    precision, shape = device_precision(job.recipe), job.data.input_shape
    delivered = slim if precision == "fp32" else slim.with_name(f"{slim.stem}.{precision}.onnx")
    dense = in_precision(run.file(DENSE).read_bytes(), precision, shape)
    if delivered.is_file():
        return dense, delivered.read_bytes()
    return dense, in_precision(slim.read_bytes(), precision, shape)


def _on_gpu(job: Job, backend: Backend, files: tuple[bytes, bytes], target: float | None) -> Timing:
    """Bursts in turns; each builds its network anew, which is what a fresh process is on the CPU."""
    from compressor.latency.backends import device_of
    from compressor.latency.ort_profile import TaggedNetwork

    device = device_of(backend, "fp32")  # nothing is left to convert
    networks = [TaggedNetwork(content, (), ()) for content in files]
    sat = 0

    def sit() -> Sitting:
        nonlocal sat
        sat += 1
        order = (0, 1) if sat % 2 else (1, 0)
        found = {
            place: burst_of(device.measure(networks[place], GPU_SECONDS).whole_ms.tolist()) for place in order
        }
        return [(found[0], found[1])]

    contract = job.recipe.contract
    return in_turns(
        sit,
        backend.runtime,
        backend.version,
        repeats=contract.repeats,
        target=target,
        seconds=contract.seconds,
    )
