"""ONNX Runtime on this machine's CPU in a separate process that only runs networks, as in deployment.

A process that has traced, exported and trained for a while has fragmented memory. Networks run slower in it than in a
fresh process, and not all by the same factor: after three runs in one process, a MobileNet-V2 pruned to 28 % of the
dense time was 14 % slower and the dense network 8 %. In a process that only runs networks neither changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressor.core.processes import Child, ChildDied, Failed
from compressor.latency.noise import timed
from compressor.latency.ort_profile import NetworkTimes, OrtCpu, TaggedNetwork
from compressor.latency.ratio import Burst, burst_of
from export.engine.bench import OnnxRunner
from export.errors import ExportError

WARM_UP_S = 0.25
"""Warm-up time of a network before its bursts, in seconds."""


class OrtProcess:
    """A `Device` that runs `OrtCpu` in a separate process, from the first network until this object is closed.

    Args:
        threads: Threads inside one operator.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._child: Child | None = None

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """Measure as `OrtCpu.measure` does.

        Raises:
            ExportError: ONNX Runtime rejects the network, or the process has died.
        """
        with tempfile.TemporaryDirectory(prefix="compressor-timing-") as folder:
            path = Path(folder) / "network.onnx"
            path.write_bytes(network.model)
            found = self._ask(
                {
                    "do": "measure", "model": str(path), "owner": network.owner, "epilogues": network.epilogues,
                    "seconds": seconds,
                }
            )  # fmt: skip
        operators = np.asarray(found["operators_ms"], dtype=np.float64)
        operators = operators.reshape(len(operators), network.operators)
        return NetworkTimes(np.asarray(found["whole_ms"]), operators, found["slowdown"])

    def close(self) -> None:
        """End the process; the next network starts a new one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, request: Mapping[str, Any]) -> Any:
        if self._child is None:
            self._child = Child(__name__, self.threads)
        try:
            return _request(self._child, {**request, "threads": self.threads})
        except _ProcessDied as error:
            self._child = None
            raise error from None


class BurstProcess:
    """One ONNX file, loaded and warm in a separate process, that runs in bursts on request.

    Args:
        path: The file.
        threads: Threads inside one operator.

    Attributes:
        once_ms: Approximate time of one run; valid after `ready`.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path, self.threads, self.once_ms = path, threads, 0.0
        self._child = Child(__name__, threads)

    def ready(self) -> None:
        """Load the network and warm it up.

        Raises:
            ExportError: ONNX Runtime rejects the network, or the process has died.
        """
        self.once_ms = float(
            _request(self._child, {"do": "open", "model": str(self.path), "threads": self.threads})
        )

    def burst(self, dropped: int, counted: int) -> Burst:
        """Run `counted` times after `dropped` runs that are not counted.

        Raises:
            ExportError: As for `ready`.
        """
        times = _request(self._child, {"do": "burst", "dropped": dropped, "counted": counted})
        wall, own = zip(*times, strict=True)
        return burst_of(wall, own if self.threads == 1 else None)

    def close(self) -> None:
        """End the process."""
        self._child.close()


class _ProcessDied(ExportError):
    """The timing process has ended unexpectedly."""


def _request(child: Child, request: Mapping[str, Any]) -> Any:
    try:
        return child.ask(request)
    except Failed as error:
        raise ExportError(str(error).removeprefix(f"{ExportError.__name__}: ")) from None
    except ChildDied as error:
        raise _ProcessDied(
            f"The process that times networks was {error}.", "Free some memory and try again."
        ) from None


def main() -> None:
    from compressor.core.processes import serve

    devices: dict[int, OrtCpu] = {}
    opened: list[OnnxRunner] = []

    def answer(request: dict[str, Any]) -> Any:
        if request["do"] == "open":
            opened[:] = [OnnxRunner(request["model"], threads=request["threads"])]
            return opened[0].warm_up(WARM_UP_S)
        if request["do"] == "burst":
            return timed(opened[0], request["dropped"] + request["counted"])[request["dropped"] :].tolist()
        threads = request["threads"]
        if threads not in devices:
            devices[threads] = OrtCpu(threads)
        content = Path(request["model"]).read_bytes()
        network = TaggedNetwork(content, tuple(request["owner"]), tuple(request["epilogues"]))
        times = devices[threads].measure(network, request["seconds"])
        return {
            "whole_ms": times.whole_ms.tolist(), "operators_ms": times.operators_ms.tolist(),
            "slowdown": times.slowdown,
        }  # fmt: skip

    serve(answer)


if __name__ == "__main__":
    main()
