"""A made-up run: its numbers are invented so that each can be found on the page; nothing was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def invented_layers() -> list[dict[str, Any]]:
    """Layers shaped like a bottleneck network: 4 stages of 3 convolutions each, a stem and a classifier."""
    layers = [layer("conv1", "conv", 2_408_448, 1_605_632, [3, 64], [3, 48], 0.110, 0.081)]
    channels, entering = 64, 48
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            slim = width * (3 + (block + stage) % 4) // 8
            for conv, (before, after) in enumerate(
                ((channels, width), (width, width), (width, width * 4)), start=1
            ):
                macs = before * after * (9 if conv == 2 else 1) * (32 >> stage) ** 2
                left = [entering if conv == 1 else slim, width * 2 if conv == 3 else slim]
                share = left[0] * left[1] / (before * after)
                ms = 0.004 + macs / 1.1e8
                # one layer whose time does not follow its MACs
                slim_ms = ms * 0.99 if (stage, block, conv) == (4, 1, 2) else 0.004 + macs * share / 1.0e8
                name = f"layer{stage}.{block}.conv{conv}"
                layers.append(
                    layer(name, "conv", macs, int(macs * share), [before, after], left, ms, slim_ms)
                )
            channels, entering = width * 4, width * 2
    return [*layers, layer("fc", "linear", 20_480, 10_240, [2048, 10], [1024, 10], 0.006, 0.005)]


def layer(
    name: str,
    kind: str,
    dense: int,
    slim: int,
    wide: list[int],
    narrow: list[int],
    dense_ms: float,
    slim_ms: float,
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "dense_macs": dense,
        "slim_macs": slim,
        "dense_channels": wide,
        "slim_channels": narrow,
        "dense_ms": round(dense_ms, 6),
        "slim_ms": round(slim_ms, 6),
    }


def invented_groups() -> list[dict[str, Any]]:
    groups = [{"name": "conv1", "width": 64, "kept": 48, "coupled": False}]
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        groups.append(
            {"name": f"layer{stage}.0.downsample.0", "width": 4 * width, "kept": 2 * width, "coupled": True}
        )
        for block in range(blocks):
            kept = width * (3 + (block + stage) % 4) // 8
            for conv in (1, 2):
                name = f"layer{stage}.{block}.conv{conv}"
                groups.append({"name": name, "width": width, "kept": kept, "coupled": False})
    return groups


def invented_episodes() -> list[dict[str, Any]]:
    """60 episodes whose rewards climb, a warm-up and a joint phase, and five final ones."""
    chance = random.Random(4)
    found = []
    for place in range(60):
        phase = "random" if place < 15 else "joint" if place < 55 else "final"
        reward = round(min(0.3 + 0.01 * place + chance.uniform(-0.08, 0.08), 0.97), 4)
        costs = {"latency": round(1.46 - abs(chance.gauss(0, 0.03)), 4), "flops": 5.4e8}
        found.append(
            {
                "episode": place,
                "epoch": place // 5,
                "phase": phase,
                "widths": [48, 64],
                "costs": costs,
                "reward": reward,
                "accuracy": reward,
                "seconds": 2.5,
            }
        )
    return found


def invented_manifest() -> dict[str, Any]:
    """A finished run that kept its latency budget in the second round."""
    layers = invented_layers()
    dense, slim = (sum(entry[f"{side}_macs"] for entry in layers) for side in ("dense", "slim"))
    candidates = [
        {"reward": 0.9222, "costs": {"latency": 1.44, "flops": 5.6e8}, "source": "joint"},
        {
            "reward": 0.9511,
            "costs": {"latency": 1.452, "flops": 5.5e8},
            "source": "final",
            "accuracy": 0.9511,
        },
        {"reward": 0.9433, "costs": {"latency": 1.449, "flops": 5.2e8}, "source": "saliency0.5", "accuracy": 0.9433},
        {"reward": 0.9102, "costs": {"latency": 1.431, "flops": 4.9e8}, "source": "uniform", "accuracy": 0.9102},
    ]
    stages = {
        name: {
            "started": f"2025-01-02T03:{place:02d}:00+00:00",
            "finished": f"2025-01-02T03:{place:02d}:50+00:00",
        }
        | {"seconds": 50.5}
        for place, name in enumerate(("profile", "search", "finetune", "export", "measure", "report"))
    }
    training = [
        {"phase": "search" if epoch < 18 else "finetune", "epoch": epoch + 1, "seconds": 7.0}
        | {"loss": round(2.2 / (1 + 0.5 * epoch), 4), "accuracy": round(1 - 0.9 / (1 + epoch), 4)}
        for epoch in range(30)
    ]
    return {
        "schema": 1,
        "status": "finished",
        "exit_code": 0,
        "model": "resnet50",
        "data": "digits",
        "seed": 7,
        "agent": "joint",
        "weights": "none",
        "epochs": 30,
        "recipe": {"device": "local", "precision": "fp32", "search": {"measure": "accuracy"}},
        "versions": {"compressor": "0.1.0", "python": "3.11.9", "torch": "2.9.0", "onnxruntime": "1.31.0"},
        "machine": {"cpu": "Invented CPU 3000", "cores": 2, "system": "Linux"},
        "stages": stages,
        "budgets": [
            {
                "name": "latency",
                "unit": "ms",
                "target": 1.5,
                "dense": 3.0,
                "predicted": 1.4,
                "measured": 1.45,
                "kept": True,
            },
            {
                "name": "flops",
                "unit": "MACs",
                "target": 6e8,
                "dense": dense,
                "predicted": slim,
                "measured": slim,
                "kept": True,
            },
        ],
        "accuracy": {
            "dense": 0.98333,
            "pruned": 0.70278,
            "finetuned": 0.98056,
            "exported": 0.98056,
            "split": "test",
            "images": 360,
            "dense_note": "The dense network was trained for the same epochs as the search.",
        },
        "latency": {
            "device": "local",
            "runtime": "onnxruntime-cpu 1.31.0",
            "precision": "fp32",
            "batch": 1,
            "threads": 1,
            "percentile": 50,
            "predicted_ms": 1.4,
            "measured_ms": 1.45,
            "dense_ms": 3.0,
            "p90_ms": 1.52,
            "p99_ms": 1.81,
            "dense_p90_ms": 3.11,
            "predicted_dense_ms": 2.97,
            "runs": 1250,
            "estimated": False,
        },
        "cost": {
            "dense": {"macs": dense, "params": 23_528_522, "onnx_bytes": 94_104_321},
            "slim": {
                "macs": slim,
                "params": 9_411_409,
                "onnx_bytes": 37_645_000,
                "safetensors_bytes": 37_700_123,
            },
        },
        "groups": invented_groups(),
        "skipped": [{"name": "fc", "reason": "its outputs are the classes"}],
        "layers": layers,
        "search": {
            "method": {
                "source": "arXiv 2403.19490",
                "parts": [
                    {
                        "part": "environment model",
                        "setting": "search.context_size",
                        "here": "128",
                        "published": "128",
                        "same": True,
                        "by": "default",
                        "why": "",
                        "effect": "300 updates",
                    },
                    {
                        "part": "episodes near the best plan",
                        "setting": "search.settings.near_share",
                        "here": "0.75",
                        "published": "0",
                        "same": False,
                        "by": "default",
                        "why": "they find better plans",
                        "effect": "",
                    },
                    {
                        "part": "alignment of the weights",
                        "setting": "search.align_weight",
                        "here": "off",
                        "published": "1e-05 to 0.0001",
                        "same": False,
                        "by": "recipe",
                        "why": "",
                        "effect": "",
                    },
                ],
            },
            "agent": "joint",
            "evaluations": 64,
            "episodes": 60,
            "seconds": 214.2,
            "timing": {"evaluation": 121.0, "training": 80.0, "agent": 13.2, "total": 214.2},
            "best_reward": 0.9511,
            "candidates": candidates,
        },
        "rounds": [
            {
                "predicted_ms": 1.455, "measured_ms": 1.62, "target_ms": 1.5, "kept": False, "ratio": 0.54,
                "interval": [0.535, 0.545],
            },
            {"predicted_ms": 1.4, "measured_ms": 1.45, "target_ms": 1.5, "kept": True},
        ],
        "training": training,
        "parity": {"max_abs": 3.4e-6, "mean_abs": 4.1e-7, "top1_agreement": 1.0, "tolerance": 1e-4},
        "engines": [],
        "engine_note": "To get an engine, install the extra of the GPU: pip install 'compressor[rtx]'",
        "notes": ["The data are scikit-learn's digits: 1,797 small images, for trials only."],
        "files": {"model.onnx": "ab" * 32, "channels.json": "cd" * 32, "search/episodes.jsonl": "ef" * 32},
    }


def write_run(folder: Path, manifest: dict[str, Any], episodes: list[dict[str, Any]]) -> Path:
    (folder / "search").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "recipe.yaml").write_text("model: resnet50\nbudgets:\n  latency: 50%\n")
    (folder / "model.onnx").write_bytes(b"\0" * 2048)
    lines = "".join(json.dumps(episode) + "\n" for episode in episodes)
    (folder / "search" / "episodes.jsonl").write_text(lines)
    return folder
