"""Time the dense and the slim network in turns on a run's device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.latency.provider import Turns
from compressor.run.contract import prunes_nothing, searched_share
from compressor.run.device import provider_of, request_of
from compressor.run.folder import RunDir
from compressor.run.job import Job
from compressor.run.onnx_files import DENSE

if TYPE_CHECKING:
    from compressor.latency.paired import Timing
    from compressor.pruning.plan import ChannelPlan


def timed_on_device(run: RunDir, job: Job, slim: Path, plan: ChannelPlan) -> Timing:
    """Time the run's dense file and a slim one in turns, until the latency target is decided.

    Args:
        run, job: Run and job that name the device.
        slim: FP32 ONNX file. A file of the run's precision beside it is timed in its place.
        plan: Plan of the network in the file.

    Raises:
        CompressorError: The device cannot be reached, or its state differs from that of its table.
    """
    contract, recipe = job.recipe.contract, job.recipe
    target = None if prunes_nothing(job, plan) else searched_share(run, job)
    turns = Turns(contract.repeats, target, contract.seconds)
    return provider_of(recipe).time(run.file(DENSE), slim, request_of(recipe), turns, job.table)
