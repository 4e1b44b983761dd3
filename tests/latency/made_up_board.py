"""A board with the engines of `made_up_engines`, which runs timing bundles in this process, without their script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compressor.latency import over_ssh
from export.device.archive import CHECKSUMS, pack, unpack
from export.files import sha256_bytes
from tests.archives import checksums
from tests.latency.made_up_engines import engine_layers

URL = "ssh://me@orin.local"


class MadeUpBoard:
    """Stands for ssh, the script of bundles and trtexec.

    Attributes:
        facts: What the board says of itself.
        factor: How much slower it is than its engines.
        named: Whether layers are named after nodes.
        ran: The order of measurement of each bundle.
        opsets: Those of all networks.
        ends_after: Number of bundles after which the connection is interrupted.
    """

    def __init__(self, *, named: bool = True) -> None:
        self.facts = {
            "tensorrt": "10.3.0", "jetpack": "6.1", "l4t": "", "model": "NVIDIA Orin", "power_mode": "MAXN",
            "board": "0123456789abcdef",
        }  # fmt: skip
        self.factor, self.named, self.ends_after = 1.0, named, 10**9
        self.ran: list[list[str]] = []
        self.opsets: set[int] = set()

    def plug(self, monkeypatch: pytest.MonkeyPatch) -> MadeUpBoard:
        """Let every address of a device reach this board."""
        monkeypatch.setattr(over_ssh, "identify", lambda url, trtexec: dict(self.facts))
        monkeypatch.setattr(over_ssh, "run_remote", self.run)
        return self

    def run(
        self, url: str, bundle: Path, results: Path, *, duration_s: int, warmup_s: int, processes: int, **_: Any
    ) -> int:
        """Write the results of a bundle."""
        if len(self.ran) >= self.ends_after:
            raise KeyboardInterrupt
        files = unpack(bundle)
        manifest = json.loads(files["bundle.json"])
        self.ran.append(list(manifest["order"]))
        state = {name: self.facts[name] for name in ("tensorrt", "power_mode", "board")}
        found: dict[str, bytes] = {}
        for entry in manifest["networks"]:
            self.opsets.add(entry["opset"])
            layers = self._engine(files[f"models/{entry['name']}.onnx"])
            nanoseconds = round(1e6 * self.factor * sum(ms for _, ms in layers))
            for turn in range(1, processes + 1):
                for slot in (slot for slot, name in enumerate(manifest["order"], 1) if name == entry["name"]):
                    found[f"{entry['name']}/{turn}-{slot}.txt"] = f"{nanoseconds}\n".encode() * 40
                    found[f"{entry['name']}/{turn}-{slot}.json"] = _json({**state, "before": {}, "after": {}})
            if manifest["profile"]:
                profile = [{"name": name, "averageMs": self.factor * ms} for name, ms in layers]
                found[f"{entry['name']}/profile.json"] = _json([{"count": 100}, *profile])
        found["results.json"] = _json(
            {
                **self.facts, "format": manifest["format"], "kind": "timing", "bundle": sha256_bytes(files[CHECKSUMS]),
                "duration_s": duration_s, "warmup_s": warmup_s, "processes": processes,
                "streams": manifest.get("streams", 1), "networks": [_entry(each) for each in manifest["networks"]],
            }
        )  # fmt: skip
        results.write_bytes(pack({**found, CHECKSUMS: checksums(found)}, "results"))
        return 0

    def _engine(self, content: bytes) -> list[tuple[str, float]]:
        found = engine_layers(content)
        return found if self.named else [(f"__myl_Fc_{place}", ms) for place, (_, ms) in enumerate(found)]


def _entry(network: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": network["name"], "precision": network["precision"], "onnx_sha256": network["sha256"], "status": "ok",
        "engine_bytes": 1,
    }  # fmt: skip


def _json(content: object) -> bytes:
    return json.dumps(content).encode()
