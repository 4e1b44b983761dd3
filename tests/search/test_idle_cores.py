"""By default other processes score on idle cores: once that is worth it, within the memory, with the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compressor.data import DataBundle, MemorySplit, Preprocessing, load_data
from compressor.models import create_model
from compressor.pruning.space import PruningSpace
from compressor.search.evaluate import Evaluator, Scoring
from compressor.search.sites import IdleCores, open_site
from compressor.training.classification import Classification
from tests.nets import Tiny

GIB = 2**30


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores, on which starting processes is worth it after the first candidate."""
    monkeypatch.setattr("compressor.search.sites.available_cores", lambda: 4)
    monkeypatch.setattr(IdleCores, "after_s", 1e-9)


def with_memory(monkeypatch: pytest.MonkeyPatch, free_bytes: float, largest_bytes: float = GIB) -> None:
    """Make up what is free, and what this process has needed at most."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free_bytes))
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=largest_bytes / 1024))


@pytest.fixture(scope="module")
def digits() -> DataBundle:
    return load_data("digits", seed=0)


def space_of(model: torch.nn.Module) -> PruningSpace:
    return PruningSpace(model, torch.zeros(1, 3, 32, 32))


def few_images() -> Classification:
    split = MemorySplit(
        torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), Preprocessing()
    )
    return Classification(split, split)


@pytest.mark.parametrize("compensate", ["off", "moments"])
def test_processes_start_after_a_while_and_change_no_score(
    digits: DataBundle, monkeypatch: pytest.MonkeyPatch, compensate: str
) -> None:
    with_memory(monkeypatch, 3 * GIB)  # of which 2.4 may be taken: two processes
    space = space_of(create_model("tests.nets:tiny", 10))
    scoring = Scoring(bn_batches=1, compensate=compensate, fit_images=64)
    plans = [space.uniform(share) for share in (0.9, 0.7, 0.5, 0.3)]
    task = Classification.of(digits, "closeness")
    alone = Evaluator(space, task, scoring, threads=1).many(plans)
    assert len(set(alone)) == 4
    site = open_site(None, None, 60)
    assert isinstance(site, IdleCores)
    helped = Evaluator(space, task, scoring, site=site)
    assert helped.workers == 1  # nothing has been scored yet
    assert helped.many(plans[:1]) == alone[:1]
    assert (site.pids, helped.workers) == ([], 2)
    assert helped.many(plans[1:]) == alone[1:]
    assert len(site.pids) == 2
    helped.close()


def test_a_candidate_needs_more_memory_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 2 * GIB)
    space, site = space_of(Tiny(10)), open_site(None, None, 60)
    assert isinstance(site, IdleCores)
    evaluator = Evaluator(space, few_images(), Scoring(bn_batches=1), site=site)
    evaluator.many([space.uniform(0.9)])
    assert evaluator.workers == 1
    evaluator.many([space.uniform(0.5), space.uniform(0.7)])
    assert site.pids == []


def test_processes_that_cannot_help_are_done_without(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """Nobody asked for them: a network that only this process can build is searched here."""

    class Local(Tiny):
        pass

    with_memory(monkeypatch, 8 * GIB)
    space = space_of(Local(10))
    plans = [space.uniform(share) for share in (0.9, 0.7, 0.5)]
    alone = Evaluator(space, few_images(), Scoring(bn_batches=1), threads=1).many(plans)
    evaluator = Evaluator(space, few_images(), Scoring(bn_batches=1), site=open_site(None, None, 60))
    evaluator.many(plans[:1])
    assert evaluator.workers == 4
    assert evaluator.many(plans) == alone
    assert evaluator.workers == 1
    assert [line for line in said if "in this process alone" in line and "no factory" in line]


@pytest.mark.parametrize(
    ("threads", "device", "most"), [(None, "cpu", 4), (2, "cpu", 2), (3, "cpu", None), (None, "cuda", None)]
)
def test_one_process_for_the_threads_of_each_candidate(
    threads: int | None, device: str, most: int | None
) -> None:
    site = open_site(None, threads, 60, device)
    assert (None if site is None else (site.number, site.threads)) == (most and (most, threads or 1))
