"""The dense and the slim network timed side by side on the device of a run: this CPU or GPU, or over ssh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.device import device_precision
from compressor.job import Job
from compressor.onnx_files import DENSE, measured
from compressor.run_dir import RunDir

if TYPE_CHECKING:
    from export.here import Backend
    from export.stats import LatencyStats

GPU_SECONDS = 2.0


def timed_on_device(run: RunDir, job: Job, slim: Path) -> tuple[LatencyStats, LatencyStats]:
    """Time the run's dense file and a slim one in turns.

    Args:
        run, job: Whose device.
        slim: An FP32 ONNX file; a GPU times the one of the run's precision that lies beside it, else one made for
            the purpose.

    Raises:
        CompressorError: the device is not reached, or is no longer in the state of its table.
    """
    from export.here import gpu_backend

    backend = None if job.over_ssh else gpu_backend()
    if not job.over_ssh and backend is None:
        return measured(run.file(DENSE), slim, job.recipe.threads, job.recipe.contract.repeats)
    files = _in_its_precision(run, job, slim)
    if backend is not None:
        return _on_gpu(job, backend, files)
    from compressor.latency.over_ssh import measured_over_ssh

    return measured_over_ssh(job.recipe.device, *files, job.table)


def _in_its_precision(run: RunDir, job: Job, slim: Path) -> tuple[bytes, bytes]:
    """The dense and the slim file as the device runs them: the delivered one where there is one."""
    from compressor.latency.carry import in_precision

    precision, shape = device_precision(job.recipe), job.data.input_shape
    delivered = slim if precision == "fp32" else slim.with_name(f"{slim.stem}.{precision}.onnx")
    dense = in_precision(run.file(DENSE).read_bytes(), precision, shape)
    if delivered.is_file():
        return dense, delivered.read_bytes()
    return dense, in_precision(slim.read_bytes(), precision, shape)


def _on_gpu(job: Job, backend: Backend, files: tuple[bytes, bytes]) -> tuple[LatencyStats, LatencyStats]:
    from compressor.latency.backends import device_of
    from compressor.latency.ort_profile import TaggedNetwork
    from export.stats import summarise

    device = device_of(backend, "fp32")  # nothing is left to convert
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(job.recipe.contract.repeats):
        for content, found in zip(files, times, strict=True):
            network = TaggedNetwork(content, (), ())
            found.extend(float(time) for time in device.measure(network, GPU_SECONDS).whole_ms)
    dense, small = (summarise(each, runtime=backend.runtime, version=backend.version) for each in times)
    return dense, small
