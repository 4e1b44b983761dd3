"""A run in several processes of `torchrun`: one folder, the same search, and one end for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from compressor.core.errors import CompressorError
from compressor.run import follower, together
from compressor.run.pipeline import run_recipe
from compressor.run.result import RunResult
from compressor.training.placement import Placement
from compressor.training.team import Team, launched
from tests.forked import command, forked, launch_variables
from tests.runs import manifest_of, recipe

ROOT = Path(__file__).resolve().parents[2]
COMPRESS = [sys.executable, "-c", "from compressor.cli import main; main()"]
NET = "tests.run.two_process_nets:Tiny"
FAST = [
    "--model", NET, "--flops", "60%", "--epochs", "3", "--set", "image_size=16", "--set", "search.epochs_share=0",
    "--set", "search.max_evaluations=6", "--set", "search.batch_norm_batches=2", "--set", "export.engine=false",
    "--set", "contract.seconds=5", "--set", "contract.repeats=1", "--set", "pruning.compensation_images=64",
]  # fmt: skip


def launch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `compress` in two processes of `torchrun`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    return subprocess.run(
        [sys.executable, *torchrun, *COMPRESS, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def test_two_processes_make_one_run(tmp_path: Path) -> None:
    """One of them dies, which ends both, and the run is resumed. Its search is that of one process."""
    said = [tmp_path / f"said{rank}" for rank in range(2)]
    arguments = [*FAST, "--out", str(tmp_path / "runs" / "run")]
    pair = [
        forked(command, arguments, said[rank], {**variables, "FAILS": "yes"})
        for rank, variables in enumerate(launch_variables(2))
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert pair[1].exitcode == -signal.SIGKILL
    assert pair[0].exitcode == 2
    words = " ".join(said[0].read_text().split())
    assert "ended in the middle of an epoch" in words
    assert words.count("compress --resume ") == 1
    assert "All files are in" not in words

    end = launch("--resume", "run", folder=tmp_path / "runs")
    assert end.returncode == 0, end.stdout
    assert end.stdout.count("All files are in run") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    two = manifest_of(tmp_path / "runs" / "run")
    assert two["machine"]["processes"] == 2
    assert [each["epoch"] for each in two["training"]] == [1, 2, 3]

    search = {"max_evaluations": 6, "batch_norm_batches": 2, "epochs_share": 0.0, "settings": {}}
    wanted = recipe(model=NET, budgets={"flops": "60%"}, search=search, training={})
    alone = run_recipe(wanted, tmp_path / "alone").manifest
    assert two["groups"] == alone["groups"]
    assert two["search"]["candidates"] == alone["search"]["candidates"]
    assert two["accuracy"]["pruned"] == alone["accuracy"]["pruned"]
    losses = [[each["loss"] for each in run["training"]] for run in (two, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.15)
    assert losses[0] != losses[1]  # each process has the batch-norm statistics of its share


@pytest.fixture
def pair() -> tuple[Team, Team]:
    """Two processes' views of one launch, for two threads."""
    store, sent = HashStore(), []

    def received(_: torch.Tensor) -> torch.Tensor:
        while not sent:
            time.sleep(0.01)
        return sent.pop()

    def send(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return tensor

    cpu = torch.device("cpu")
    first, other = Placement(cpu, 0, 2, spread=send), Placement(cpu, 1, 2, spread=received)
    return Team(0, 2, first, store), Team(1, 2, other, store)


def test_messages_arrive_in_order_with_their_states(pair: tuple[Team, Team]) -> None:
    first, other = pair
    first.tell({"do": "a"})
    first.tell({"do": "b"}, {"weights": [torch.arange(3)], "epoch": 4})
    assert other.hear() == ({"do": "a"}, None)
    message, state = other.hear()
    assert message == {"do": "b"}
    assert state["epoch"] == 4
    assert torch.equal(state["weights"][0], torch.arange(3))


def test_the_first_process_waits_for_the_others(pair: tuple[Team, Team]) -> None:
    first, other = pair
    first.tell({"do": "a"})
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(first.await_ready)
        other.hear()
        assert not waiting.done()
        other.ready()
        waiting.result(10)
    first.tell({"do": "b"})
    other.failed()
    with pytest.raises(CompressorError, match=r"Rank 1 of 2, on .* cannot take part"):
        first.await_ready()


def test_other_data_on_another_machine_is_refused(pair: tuple[Team, Team], monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = pair
    for name, of_thread in (("together", first), ("follower", other)):
        monkeypatch.setattr(f"compressor.run.{name}.team", lambda of_thread=of_thread: of_thread)
    task = SimpleNamespace(train=SimpleNamespace(steps=lambda _: 100))
    fewer = SimpleNamespace(train=SimpleNamespace(steps=lambda _: 99))
    with ThreadPoolExecutor(1) as threads:
        gathering = threads.submit(together.gather, recipe(), task)
        with pytest.raises(CompressorError, match=r"Rank 1 of 2, on .*: There are 99 training inputs here, and 100"):
            follower.follow(lambda _: SimpleNamespace(task=fewer, builder=None))  # type: ignore[arg-type]
        with pytest.raises(CompressorError, match="cannot take part"):
            gathering.result(10)


def test_the_others_have_the_first_one_s_result(
    pair: tuple[Team, Team], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, other = pair
    for name, of_thread in (("together", first), ("follower", other)):
        monkeypatch.setattr(f"compressor.run.{name}.team", lambda of_thread=of_thread: of_thread)
    sent = RunResult(tmp_path, {"seed": 3}, 4).plain()
    together.send_result(sent)
    assert follower.follow(None) == {**sent, "builder": None}  # type: ignore[arg-type]
    got = RunResult.of(sent, builder=None)
    assert (got.directory, got.manifest, got.exit_code) == (tmp_path, {"seed": 3}, 4)
    with pytest.raises(ValueError, match="disk"), together.leading():
        raise ValueError("disk")
    with pytest.raises(follower.FirstEnded):
        follower.follow(None)  # type: ignore[arg-type]
    other.failed()
    died = r"Rank 1 of 2, on .* ended in the middle of an epoch"
    with pytest.raises(CompressorError, match=died), together.leading():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer")


@pytest.mark.parametrize(
    ("size", "hint"), [(63, "training.batch_size=60"), (2, "training.batch_size=8"), (6, "training.batch_size=8")]
)
def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, size: int, hint: str) -> None:
    wanted = recipe(training={"batch_size": size})
    together.check_batch(wanted, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(together, "launched", lambda: (0, 4))
    with pytest.raises(CompressorError, match=hint):
        together.check_batch(wanted, SimpleNamespace())  # type: ignore[arg-type]
    together.check_batch(recipe(training={"batch_size": 64}), SimpleNamespace())  # type: ignore[arg-type]


def test_a_launcher_s_variables_must_be_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CompressorError, match=r"WORLD_SIZE is 2, .*unset WORLD_SIZE"):
        launched()
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert launched() == (1, 2)
