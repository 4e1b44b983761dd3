"""The dense and the slim network timed side by side on the device of a run: this CPU or GPU, or over ssh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.job import Job, device_precision
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
        slim: An FP32 ONNX file; on a GPU the file of its precision is timed, the one that lies beside it or one made
            for the purpose.

    Raises:
        CompressorError: the device is not reached, or is no longer in the state of its table.
    """
    from export.here import gpu_backend

    if job.over_ssh:
        from compressor.latency.carry import in_precision
        from compressor.latency.over_ssh import measured_over_ssh

        precision, shape = device_precision(job.recipe), job.data.input_shape
        delivered = slim.with_name(f"{slim.stem}.{precision}.onnx")
        content = (
            delivered.read_bytes()
            if delivered.is_file()
            else in_precision(slim.read_bytes(), precision, shape)
        )
        dense = in_precision(run.file(DENSE).read_bytes(), precision, shape)
        return measured_over_ssh(job.recipe.device, dense, content, job.table)
    if (backend := gpu_backend()) is not None:
        return _on_gpu(run, job, slim, backend)
    return measured(run.file(DENSE), slim, job.recipe.threads, job.recipe.contract.repeats)


def _on_gpu(run: RunDir, job: Job, slim: Path, backend: Backend) -> tuple[LatencyStats, LatencyStats]:
    from compressor.latency.backends import Trtexec, device_of
    from compressor.latency.ort_profile import TaggedNetwork
    from export.stats import summarise

    device = device_of(backend, device_precision(job.recipe))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(job.recipe.contract.repeats):
        for path, found in zip((run.file(DENSE), slim), times, strict=True):
            network = TaggedNetwork(path.read_bytes(), (), ())
            found.extend(float(time) for time in device.measure(network, GPU_SECONDS).whole_ms)
    version = device.version if isinstance(device, Trtexec) else backend.version
    dense, small = (summarise(each, runtime=backend.runtime, version=version) for each in times)
    return dense, small
