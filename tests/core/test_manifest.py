"""The typed manifest: what a run refuses, what a report leaves out, and that nothing is lost in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.core.errors import CompressorError
from compressor.core.manifest import Manifest, Measurement
from tests.runs import manifest_of


def test_a_manifest_is_written_as_it_was_read(finished: Path, tmp_path: Path) -> None:
    content = manifest_of(finished)
    manifest = Manifest.read(finished / "manifest.json")
    assert manifest.plain() == content
    manifest.write(tmp_path / "manifest.json")
    assert manifest_of(tmp_path) == content
    assert Manifest.tolerant(content).plain() == content


def test_keys_of_another_version_are_kept(tmp_path: Path) -> None:
    content = {"model": "a", "later": {"x": [1]}, "stages": {"begin": {"started": "t", "note": 2}}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert Manifest.read(tmp_path / "manifest.json").plain() == content


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"budgets": 3}, r"'budgets' is 3: "),
        ({"seed": "7"}, r"'seed' is '7': "),
        ({"rounds": [{"ratio": 0.5}]}, r"'rounds\.0': .*interval.* missing"),
        ({"budgets": [{"name": "latency", "target": "5ms"}]}, r"'budgets\.0\.target' is '5ms'"),
        ({"stages": {"begin": {"finished": "t"}}}, r"model, .*notes missing"),
    ],
)
def test_a_run_refuses_a_damaged_manifest_with_one_message(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(wrong))
    with pytest.raises(CompressorError, match=rf"manifest\.json: .*{words}") as refused:
        Manifest.read(tmp_path / "manifest.json")
    assert "restore it, or start a new run" in refused.value.hint
    Manifest.tolerant(wrong)


def test_a_report_reads_what_is_valid_beside_what_is_not() -> None:
    manifest = Manifest.tolerant(
        {"seed": 3, "model": 7, "latency": {"device": "local", "ratio": "x"}, "rounds": [{"ratio": 0.5}], "notes": 1}
    )
    assert (manifest.seed, manifest.model, manifest.notes) == (3, "", [])
    assert (manifest.latency.device, manifest.latency.ratio) == ("local", None)
    assert manifest.rounds[0].ratio == 0.5
    assert manifest.rounds[0].high == float("inf")


def test_a_measurement_is_complete() -> None:
    with pytest.raises(ValueError, match=r"target_ratio.* missing"):
        Measurement(ratio=0.5)
