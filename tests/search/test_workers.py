"""Candidates scored by several processes: the same numbers as by one, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.data import DataBundle, MemorySplit, Preprocessing, load_data
from compressor.models import create_model
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.sites import _room, check_workers, open_site
from compressor.search.workers import ThisMachine
from compressor.training.classification import Classification
from tests.nets import Tiny


class Fragile(Tiny):
    """Ends a worker where it is pruned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spec = sys.modules["__main__"].__spec__
        if self.conv1.out_channels < 32 and spec is not None and spec.name == "compressor.search.scorer":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    return load_data("digits", seed=0)


@pytest.fixture(scope="module")
def trained(digits: DataBundle) -> dict[str, torch.Tensor]:
    """Weights by which widths tell accuracies apart."""
    torch.manual_seed(0)
    model = create_model("tests.nets:tiny", 10)
    images, labels = next(digits.train.batches(512, shuffle_seed=0))
    optimiser = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    for _ in range(12):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model.state_dict()


@pytest.fixture
def space(trained: dict[str, torch.Tensor]) -> PruningSpace:
    """A network of its own for each test, because some change its weights."""
    model = create_model("tests.nets:tiny", 10)
    model.load_state_dict(trained)
    return PruningSpace(model, torch.zeros(1, 3, 32, 32))


def plans_of(space: PruningSpace, number: int) -> list[ChannelPlan]:
    generator = np.random.default_rng(0)
    ranking = space.rank("l1")
    return [space.plan(space.random_widths(generator), ranking) for _ in range(number)]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_same_accuracies_as_in_one_process(space: PruningSpace, digits: DataBundle) -> None:
    site = open_site(2, 1, 60)
    assert isinstance(site, ThisMachine)
    several = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1), site=site)
    plans = plans_of(space, 6)
    alone = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1)).many(plans)
    assert len(set(alone)) > 2
    assert several.many(plans[:2]) == alone[:2]
    first = site.pids
    assert len(first) == 2
    os.kill(first[0], signal.SIGKILL)  # it is replaced, and its candidate scored again
    assert several.many(plans) == alone
    assert (several.evaluations, several.workers) == (6, 2)
    with torch.no_grad():
        for parameter in space.model.parameters():
            parameter.mul_(1.0 + 0.5 * torch.rand(len(parameter), generator=torch.Generator().manual_seed(1)).view(
                -1, *[1] * (parameter.dim() - 1)
            ))  # fmt: skip
    several.weights_moved()
    again = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1)).many(plans)
    assert again != alone
    assert several.many(plans) == again
    several.weights_moved()
    floors = [None, 0.0, *[1.0] * 4]  # the last four are given up after the first batch
    alone = Evaluator(space, Classification.of(digits), Scoring(bn_batches=1)).many(plans, floors=floors)
    assert alone[:2] == again[:2]
    assert alone[2:] != again[2:]
    assert several.many(plans, floors=floors) == alone
    last = site.pids
    several.close()
    assert all(gone(pid) for pid in [*first, *last])


def test_a_worker_reads_its_sample_in_the_same_order(space: PruningSpace, digits: DataBundle) -> None:
    """Else the batches differ, and with them the batch-norm statistics."""
    ours = Evaluator(space, Classification.of(digits), Scoring(bn_batches=3, batch_size=100))
    theirs = Evaluator(space, Classification(ours._calibration, ours._search), Scoring(bn_batches=3, batch_size=100))
    assert len(ours._calibration) < len(digits.train)
    assert torch.equal(ours._calibration.images, theirs._calibration.images)


@pytest.mark.parametrize(
    "fit_images", [64, 512]
)  # 512 are more than batch norm reads, and than a fit may have
def test_compensated_candidates_have_the_same_accuracies_in_a_worker(
    space: PruningSpace, digits: DataBundle, fit_images: int
) -> None:
    plans = plans_of(space, 3)
    scoring = Scoring(bn_batches=1, compensate="moments", fit_images=fit_images)
    task = Classification.of(digits)
    several, alone = (
        Evaluator(space, task, scoring, site=open_site(1, 1, 60), threads=1),
        Evaluator(space, task, scoring, threads=1),
    )
    theirs = Evaluator(space, Classification(alone._calibration, alone._search), scoring, threads=1)
    assert torch.equal(alone._calibration.images, theirs._calibration.images)
    try:
        assert several.many(plans) == alone.many(plans)
        with torch.no_grad():
            for parameter in space.model.parameters():
                parameter.mul_(0.9)
        for each in (several, alone):
            each.weights_moved()
        assert several.many(plans) == alone.many(plans)
    finally:
        several.close()


def test_a_candidate_that_ends_every_worker_is_named(digits: DataBundle) -> None:
    model = create_model("tests.search.test_workers:Fragile", 10)
    space = PruningSpace(model, torch.zeros(1, 3, 32, 32))
    few = [
        MemorySplit(
            torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), Preprocessing()
        )
        for _ in range(2)
    ]
    site = open_site(2, 1, 60)
    evaluator = Evaluator(space, Classification(few[0], few[1]), Scoring(bn_batches=1), site=site)
    with pytest.raises(CompressorError, match=r"ended 3 workers.*killed by SIGKILL"):
        evaluator(space.smallest())
    assert site is not None
    assert all(gone(pid) for pid in site.pids)


def test_workers_end_with_a_process_that_is_killed() -> None:
    script = (
        "import time\nfrom compressor.core.processes import Child\n"
        "children = [Child('compressor.search.scorer') for _ in range(2)]\n"
        "print(*(child.pid for child in children), flush=True)\ntime.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as lines:
        pids = [int(word) for word in lines.readline().split()]
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    for _ in range(200):
        if all(_ended(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert len(pids) == 2
    assert all(_ended(pid) for pid in pids)


def test_workers_end_with_a_search_that_is_interrupted() -> None:
    script = (
        "import threading, time\nfrom types import SimpleNamespace as Plan\n"
        "from compressor.search.workers import ThisMachine, Workers\n"
        "site = ThisMachine(2, 1, 600)\n"
        "def tell():\n"
        "    while len(site.pids) < 2:\n        time.sleep(0.01)\n"
        "    print(*site.pids, flush=True)\n"
        "threading.Thread(target=tell, daemon=True).start()\n"
        "Workers(site, {'evaluator': {}}, {}).score([Plan(to_json=str, widths={})] * 2)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    assert parent.stdout is not None
    with parent.stdout as lines:
        pids = [int(word) for word in lines.readline().split()]
    parent.send_signal(signal.SIGINT)  # as Ctrl-C: while the workers start, and the search waits for them
    assert parent.wait(60) == -signal.SIGINT
    assert len(pids) == 2
    assert all(_ended(pid) for pid in pids)


def _ended(pid: int) -> bool:
    """Gone, or dead and waiting for whoever adopted it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_workers_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(CompressorError, match=r"--workers 20000: this machine has \d+ cores, .*; at most \d+ are"):
        open_site(20_000, 1, 60)
    with pytest.raises(CompressorError, match="expected 1 or more"):
        check_workers(0)
    pytest.importorskip("ray")
    with pytest.raises(CompressorError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        check_workers("ray://127.0.0.1:9")
    with pytest.raises(CompressorError, match="not an address"):
        check_workers("ray://nowhere")


def test_workers_on_ray_fit_on_single_machines() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    ray = SimpleNamespace(nodes=lambda: nodes)
    assert _room(ray, {"CPU": 1.0}) == 8
    assert _room(ray, {"CPU": 2.0}) == 3  # and not four
    assert _room(ray, {"CPU": 2.0, "GPU": 1.0}) == 1
    assert _room(ray, {"CPU": 8.0}) == 0


def test_a_worker_on_ray_that_cannot_begin_says_why(space: PruningSpace, digits: DataBundle) -> None:
    pytest.importorskip("ray")
    site = open_site("ray://local", 1, 100)
    try:
        worker = site.start(0, {"network": "elsewhere"}, b"", b"")
        with pytest.raises(CompressorError, match=r"A worker on the Ray cluster failed: \w+Error"):
            worker.score("{}", None)
    finally:
        site.stop()
        site.close()


@pytest.mark.parametrize("compensate", ["off", "quick"])
def test_ray_gives_the_same_accuracies(space: PruningSpace, digits: DataBundle, compensate: str) -> None:
    pytest.importorskip("ray")
    task, scoring = Classification.of(digits), Scoring(bn_batches=1, compensate=compensate)
    evaluator = Evaluator(space, task, scoring, site=open_site("ray://local", 1, 100))
    plans = plans_of(space, 4)
    try:
        assert evaluator.workers >= 1
        assert evaluator.many(plans) == Evaluator(space, task, scoring, threads=1).many(plans)
        with torch.no_grad():
            for parameter in space.model.parameters():
                parameter.mul_(0.9)
        evaluator.weights_moved()
        assert evaluator.many(plans) == Evaluator(space, task, scoring, threads=1).many(plans)
    finally:
        evaluator.close()
