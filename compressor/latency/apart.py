"""ONNX Runtime on this machine's CPU in a process that does nothing else, as where a network is delivered to.

A process that has traced, exported and trained for a while has its memory in pieces, and the same network takes longer
in it than in a fresh one, by a share of its own: three runs in one process made a MobileNet-V2 pruned to 28 % of the
dense time 14 % slower and the dense one 8 %. In a process that only runs networks neither changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressor.child import Child, ChildDied, Failed
from compressor.latency.ort_profile import NetworkTimes, OrtCpu, TaggedNetwork
from export.errors import ExportError
from export.stats import LatencyStats

COMPARED_S = 10.0
"""Networks that are compared are run for about this long together, at most."""

WARM_UP_S = 0.25
"""Each of them is run for so long before it counts."""


class OrtApart:
    """A `Device`: `OrtCpu` in a process of its own, which begins with the first network and ends with this object.

    Args:
        threads: Threads inside one operator.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._child: Child | None = None

    def measure(self, network: TaggedNetwork, seconds: float) -> NetworkTimes:
        """As `OrtCpu.measure`.

        Raises:
            ExportError: ONNX Runtime refuses the network, or the process has died of it.
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

    def compare(self, first: Path, second: Path, seed: int = 0) -> tuple[LatencyStats, LatencyStats]:
        """Two ONNX files timed in turns.

        Raises:
            ExportError: as for `measure`.
        """
        one, other = self._ask({"do": "compare", "models": [str(first), str(second)], "seed": seed})
        return LatencyStats(**one), LatencyStats(**other)

    def close(self) -> None:
        """End the process; the next network begins another."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ask(self, request: Mapping[str, Any]) -> Any:
        if self._child is None:
            self._child = Child(__name__, self.threads)
        try:
            return self._child.ask({**request, "threads": self.threads})
        except Failed as error:
            raise ExportError(str(error).removeprefix(f"{ExportError.__name__}: ")) from None
        except ChildDied as error:
            self._child = None
            raise ExportError(
                f"The process that times networks was {error}.", "Free some memory and try again."
            ) from None


def main() -> None:
    from compressor.child import serve
    from export.bench import compare_onnx

    devices: dict[int, OrtCpu] = {}

    def answer(request: dict[str, Any]) -> Any:
        threads = request["threads"]
        if request["do"] == "compare":
            compared = compare_onnx(
                request["models"],
                threads=threads,
                warmup_s=WARM_UP_S,
                max_seconds=COMPARED_S,
                seed=request["seed"],
            )
            return [stats.to_dict() for stats in compared.stats]
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
