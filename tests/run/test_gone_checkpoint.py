"""A run whose search has lost its checkpoint says so before it searches again, and ends as it did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from compressor.run.pipeline import resume
from tests.runs import manifest_of


def test_a_search_whose_checkpoint_is_gone_is_said_and_done_again(
    finished: Path, tmp_path: Path, said: list[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = manifest_of(run)
    (run / "checkpoints" / "search.pt").unlink(missing_ok=True)
    unfinished = json.loads(json.dumps(before))
    for stage in ("finetune", "export", "measure", "report"):
        del unfinished["stages"][stage]
    (run / "manifest.json").write_text(json.dumps(unfinished))
    result = resume(run)
    episodes = before["search"]["episodes"]
    (note,) = [line for line in said if "is missing" in line]
    assert "the search is repeated from the beginning" in note
    assert f"including its {episodes} episodes" in note
    assert note in result.manifest["notes"]
    assert result.manifest["groups"] == before["groups"]
    assert result.manifest["accuracy"]["finetuned"] == before["accuracy"]["finetuned"]
