"""The page's "Why is it not faster?" once a run was explained, and what the command refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from invented_run import write_run
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.core.manifest import Manifest
from compressor.report import write_report
from compressor.report.explain import explained, gap


def explanation() -> dict[str, Any]:
    facts = {"kind": "Conv", "bound": "compute", "peak_share": 0.62, "padding": 0.12, "sentence": ""}
    wide = {"dense_macs": 1000, "slim_macs": 400, "dense_ms": 2.0, "slim_ms": 1.5, "gap_ms": 0.7}
    return {
        "where": "an invented device",
        "peaks": "invented",
        "dense_ms": 3.0,
        "slim_ms": 2.1,
        "lines": [
            {
                **facts,
                **wide,
                "name": "layer9.conv",
                "layer": 0,
                "predicted_slim_ms": 1.4,
                "sentence": "Mend <it>.",
            },
            {
                "name": "Add at layer9.conv",
                "kind": "Add",
                "layer": None,
                "dense_ms": 1.0,
                "slim_ms": 0.6,
                "gap_ms": 0.2,
            },
        ],
    }


def test_the_page_shows_every_line_and_sentence(tmp_path: Path, manifest: dict[str, Any]) -> None:
    manifest["explanation"] = explanation()
    page = write_report(write_run(tmp_path / "run", manifest, [])).read_text(encoding="utf-8")
    for words in (
        "layer9.conv",
        "Add at layer9.conv",
        "Mend &lt;it&gt;.",
        "an invented device",
        "1.50 ms, 71%",
        "62%",
    ):
        assert words in page
    assert "40.0% of the MACs the slim network takes 70.0%" in gap(Manifest.tolerant(manifest))


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp32", "one's time, both in FP32. The gap"),
        ("mixed", "one's time, the dense network in FP32 and the slim one in mixed precision. The gap"),
        ("", "one's time. The gap"),  # as earlier versions wrote it
    ],
)
def test_the_page_names_the_precision_of_the_profiled_networks(
    tmp_path: Path, manifest: dict[str, Any], precision: str, words: str
) -> None:
    manifest["explanation"] = {**explanation(), "precision": precision}
    manifest["latency"]["precision"] = "int8"
    page = write_report(write_run(tmp_path / "run", manifest, [])).read_text(encoding="utf-8")
    assert words in page.replace("&#39;", "'")
    named = words.removeprefix("one's time").removesuffix(". The gap")
    assert f"Measured on an invented device{named}, under its profiler" in page
    assert f"Times were measured under the profiler{named}, for one" in page


def test_estimates_are_called_so(manifest: dict[str, Any]) -> None:
    manifest["explanation"] = explanation()
    assert (explained(Manifest.tolerant(manifest)) or {})["predicted"] == "Predicted, slim"
    manifest["latency"]["estimated"] = True
    assert (explained(Manifest.tolerant(manifest)) or {})["predicted"] == "Estimated, slim"
    del manifest["explanation"]
    assert explained(Manifest.tolerant(manifest)) is None


def test_a_run_without_networks_and_half_a_pair_of_profiles_are_refused(
    tmp_path: Path, manifest: dict[str, Any]
) -> None:
    run_folder = write_run(tmp_path / "run", {**manifest, "rounds": []}, [])
    for arguments, words in (
        (["--explain"], "has exported no checkpoints/dense.onnx yet"),
        (["--explain", "--dense-profile", "a.json"], "two networks together"),
        (["--dense-profile", "a.json", "--slim-profile", "b.json"], "Give --explain"),
    ):
        result = CliRunner().invoke(app, ["measure", str(run_folder), *arguments])
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())


def test_steps_of_an_estimated_table_are_refused() -> None:
    asked = [
        "--model",
        "tests.nets:tiny",
        "--device",
        "jetson-nano",
        "--latency",
        "90%",
        "--granularity",
        "measured",
    ]
    result = CliRunner().invoke(app, [*asked, "--dry-run"])
    assert result.exit_code == 2
    assert "estimated: it has no measured jumps" in " ".join(result.output.split())
