"""The Python examples of the README and of the guide, run as a user would."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from tests.other_device import OtherDevice

ROOT = Path(__file__).parents[2]


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "own.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(tmp_path / "own.py"))
    assert found["result"].exit_code == 0
    assert found["slim"](found["batches"][0][0]).shape == (16, 3)
    assert found["result"].onnx.is_file()


def test_the_guides_file_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer pictures, epochs and evaluations."""
    text = (ROOT / "docs/guide/own_network.py").read_text()
    less = {"Spots(0, 768)": "Spots(0, 256)", "epochs=4": "epochs=2", '"max_evaluations": 12': '"max_evaluations": 4'}
    for many, few in less.items():
        assert text.count(many) == 1
        text = text.replace(many, few)
    (tmp_path / "own_network.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    OtherDevice(1.0).install(monkeypatch)  # times that do not depend on the load of this machine
    runpy.run_path(str(tmp_path / "own_network.py"), run_name="__main__")
    manifest = json.loads((tmp_path / "spots/manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["accuracy"]["metric"] == "score"
    assert manifest["budgets"][0]["name"] == "latency"
    assert 0 < manifest["latency"]["measured_ms"] <= manifest["latency"]["dense_ms"]
    assert "spots/model.onnx" in capsys.readouterr().out
