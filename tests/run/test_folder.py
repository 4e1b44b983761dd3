"""The run folder: files appear whole, locks hold, resumes find what was finished."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.core.errors import CompressorError
from compressor.core.files import replacing, sha256_file, write_atomic
from compressor.core.records import EpisodeLog
from compressor.run.folder import RunFolder, new_run_path


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    file = tmp_path / "kept.txt"
    write_atomic(file, "old")

    def half_written(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CompressorError, match="No space is left"), replacing(file) as temporary:
        half_written(temporary)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder.create(folder, "model: a\n").close()
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom compressor.core.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n    temporary.write_text('half')\n    os._exit(9)\n"
    )
    (folder / "search").mkdir()
    for name in ("model.onnx", "search/plan.json"):
        subprocess.run([sys.executable, "-c", script, str(folder / name)], check=False)
    own = [".env.template", ".notes.txt", "search/.plan.json.bak", ".a.b.abcdefgh.c"]
    for name in own:
        (folder / name).write_text("mine")
    assert len(list(folder.rglob("*"))) == len(own) + 5
    RunFolder.open(folder).close()
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert left == {*own, "recipe.yaml", ".lock", "search"}


def test_a_place_that_cannot_be_written_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.require_empty(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "run", tmp_path / "file" / "new" / "run"):
        with pytest.raises(CompressorError, match=rf"{place} cannot be written: {tmp_path}/file is a file"):
            RunFolder.require_empty(place)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(CompressorError, match=rf"cannot be written: {tmp_path} is not writable") as caught:
        RunFolder.require_empty(tmp_path / "new" / "run")
    assert "--out DIR" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    file.write_bytes(b"abc")
    assert sha256_file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CompressorError, match="not an empty folder"):
        RunFolder.create(tmp_path, "model: a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_run_is_offered_for_resuming(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", "model: a\n").close()
    with pytest.raises(CompressorError, match="--resume"):
        RunFolder.create(tmp_path / "run", "model: a\n")


def test_a_run_that_was_killed_before_it_had_a_recipe_may_be_begun_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", ".recipe.yaml.ab3_xyz9.yaml"):
        (folder / name).touch()
    RunFolder.create(folder, "model: a\n").close()
    assert {path.name for path in folder.iterdir()} == {".lock", "recipe.yaml"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".notes.txt.ab3_xyz9.txt").touch()
    with pytest.raises(CompressorError, match="not an empty folder"):
        RunFolder.create(tmp_path / "other", "model: a\n")


def test_a_live_run_holds_its_folder(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from compressor.run.folder import RunFolder\n"
    script += (
        "run = RunFolder.create(Path(sys.argv[1]), 'model: a'); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(CompressorError, match="Another process"):
        RunFolder.open(tmp_path / "run")
    holder.kill()
    holder.communicate()
    RunFolder.open(tmp_path / "run").close()


def test_stages_are_recorded_and_survive_an_interruption(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "model: a\n")


    def work(result: str) -> str:
        run.manifest.seed = 1
        return result

    def stopped() -> str:
        raise KeyboardInterrupt

    assert run.stage("search", lambda: work("done"), lambda: "saved") == "done"
    with pytest.raises(KeyboardInterrupt):
        run.stage("finetune", stopped)
    run.close()
    again = RunFolder.open(tmp_path / "run")
    assert again.finished("search")
    assert not again.finished("finetune")
    assert again.manifest.seed == 1
    started = again.manifest.stages
    assert again.stage("search", stopped, lambda: "saved") == "saved"
    assert again.manifest.stages == started
    again.reopen("search")
    assert again.stage("search", lambda: "done again", lambda: "saved") == "done again"
    assert again.manifest.stages["search"].started == started["search"].started
    again.close()


def test_no_run_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match=r"not a run's folder"):
        RunFolder.open(tmp_path)


def test_checkpoints_round_trip_and_refuse_code(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "model: a\n")
    checkpoint = run.checkpoint("search")
    assert checkpoint.load() is None
    checkpoint.save({"epoch": 3, "weights": {"w": torch.arange(4.0)}, "rng": [1, None, True, "x"]})
    state = checkpoint.load()
    assert state is not None
    assert state["epoch"] == 3
    assert state["weights"]["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state["rng"] == [1, None, True, "x"]

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {marker}",)

    checkpoint.path.write_bytes(pickle.dumps({"epoch": Evil()}))
    with pytest.raises(CompressorError, match="cannot be read"):
        checkpoint.load()
    assert not marker.exists()
    checkpoint.path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(CompressorError, match="cannot be read"):
        checkpoint.load()
    run.close()


def test_an_episode_cut_short_is_dropped(tmp_path: Path) -> None:
    log = EpisodeLog(tmp_path / "search" / "episodes.jsonl")
    for number in range(4):
        log.append({"episode": number})
    with log.path.open("a") as file:
        file.write('{"episode": 4, "rew')
    again = EpisodeLog(log.path)
    assert len(again) == 4
    again.truncate(3)
    assert [json.loads(line)["episode"] for line in log.path.read_text().splitlines()] == [0, 1, 2]


def test_run_names_are_safe_and_new(tmp_path: Path) -> None:
    first = new_run_path(tmp_path, "timm:a/../b")
    assert first.parent == tmp_path
    assert "/" not in first.name
    first.mkdir()
    assert new_run_path(tmp_path, "timm:a/../b") != first
