"""Two budgets that nothing but a Python function knows, kept from end to end.

    python -m benchmarks.arbitrary_budgets --data folder:PATH --weights FILE

`odd_channels` jumps: it counts the channels of convolutions whose number of outputs is no multiple of 32, and falls
to 0 where a width reaches one. `session_ms` measures: it exports the built network, opens an ONNX Runtime session and
times it, so that no two calls agree. Both are only ever evaluated. Prints for each the target, what the chosen network
reached in the search, and what it has when it is measured again; writes it as JSON to --out.

Agents that ask for the cost of every step need hundreds of calls for the first episode, at half a second each for a
measured function: `session_ms` is therefore searched by an agent that asks once an episode.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def odd_channels(module: nn.Module) -> int:
    """Output channels of convolutions that have no multiple of 32 of them."""
    outputs = [part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)]
    return sum(channels for channels in outputs if channels % 32)


def session_ms(module: nn.Module) -> float:
    """Milliseconds of one image in an ONNX Runtime session, one thread: the slowest of the fastest tenth.

    On a busy machine medians of such short times do not repeat: what disturbs them lasts longer than they do.
    """
    import numpy as np
    import onnxruntime

    from export.convert.to_onnx import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        example = torch.zeros(1, 3, 32, 32)
        export_onnx(module.eval(), example, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: example.numpy()}
    times = []
    for _ in range(410):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(1e3 * (time.perf_counter() - started))
    return float(np.quantile(times[10:], 0.1))


WAYS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "odd_channels": ("40%", 1, "random", {}),
    "session_ms": ("70%", 3, "constrained", {"start": "uniform", "shortlist": 1, "episodes_per_update": 2}),
}
"""Limit, repeats, agent and its settings for each function."""


def run(name: str, given: Any, folder: Path) -> dict[str, Any]:
    """One run of the pipeline within one budget."""
    from compressor import run_recipe
    from compressor.recipe import parse_recipe

    limit, repeats, agent, settings = WAYS[name]
    fields = {
        "model": "cifar_resnet20",
        "weights": given.weights,
        "data": given.data,
        "agent": agent,
        "epochs": given.epochs,
        "budgets": {
            "functions": [f"benchmarks.arbitrary_budgets:{name}<={limit}"],
            "function_repeats": repeats,
        },
        "pruning": {"granularity": 1},
        "search": {
            "max_evaluations": given.evaluations,
            "search_images": given.images,
            "batch_norm_batches": 3,
            "settings": settings,
        },
        "export": {"engine": False},
    }
    started = time.perf_counter()
    result = run_recipe(parse_recipe(fields, "the benchmark"), out=folder / name)
    (budget,) = result.manifest["budgets"]
    return {
        "function": name,
        "agent": agent,
        "evaluations": result.manifest["search"]["evaluations"],
        "dense": budget["dense"],
        "target": budget["target"],
        "reached": budget["predicted"],
        "measured_again": budget["measured"],
        "kept": budget["kept"],
        "median_ms": [result.manifest["latency"][field] for field in ("dense_ms", "measured_ms")],
        "accuracy": result.manifest["accuracy"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="as for compress")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--images", type=int, default=500, help="that score a candidate")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--only", choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("arbitrary_budgets.json"))
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in WAYS:
            if given.only in (None, name):
                rows.append(run(name, given, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
