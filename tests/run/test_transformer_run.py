"""The whole job with a vision transformer: heads, hidden and embedding widths, and compensated projections."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor import run_recipe
from tests.runs import recipe


def test_a_vision_transformer_takes_the_whole_road(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    result = run_recipe(
        recipe(
            model="tests.nets:transformer", agent="uniform", epochs=3, budgets={"flops": "60%"},
            search={"max_evaluations": 2}, pruning={"granularity": 1}, training={"optimizer": "adamw"},
        ),
        out=tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0
    manifest = result.manifest
    kept = {group["name"]: (group["kept"], group["width"]) for group in manifest["groups"]}
    inside = (f"blocks.{n}.{part}" for n in (0, 1) for part in ("attn.qkv", "mlp.fc1"))
    assert set(kept) == {"patch_embed.proj", *inside}
    assert [width for _, width in kept.values()].count(4) == 2  # heads
    assert any(number < width for number, width in kept.values())
    assert manifest["checks"]["torch_pruning"]["confirmed"] is True
    assert manifest["checks"]["fvcore"]["confirmed"] is True
    assert manifest["parity"]["max_abs"] <= 1e-4
    found = manifest["compensation"]
    assert {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"} <= {
        *found["refitted"], *found["left"]
    }  # fmt: skip
    assert found["error"] < found["error_cut"]
