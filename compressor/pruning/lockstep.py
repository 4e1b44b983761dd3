"""Verifies a trace on a pruned copy, and learns from mismatches.

A copy with random widths runs the same pass in lockstep with the trace: every operation must return exactly the sizes
that the labels predict. Where one does not, the next trace treats that call differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.pruning.atoms import Labels
from compressor.pruning.facts import Call, Facts, Settings
from compressor.pruning.groups import Resolved
from compressor.pruning.skeleton import named_tensors, walk
from compressor.pruning.slicer import Slicer, cut_meta
from compressor.pruning.trace import Tracer


class Mismatch(Exception):
    """A pruned copy deviated from the trace at a step."""

    def __init__(self, step: int, detail: str) -> None:
        super().__init__(detail)
        self.step = step


def random_keep(resolved: Resolved, seed: int) -> tuple[list[Any], Any]:
    """Draw masks over units that keep 40 to 80 % of each group, at least one unit and not all."""
    random = np.random.default_rng(seed)
    keep, widths = [], []
    for found in resolved.groups:
        size = found.classes.size
        width = int(np.clip(round(size * random.uniform(0.4, 0.8)), 1, size - 1))
        mask = np.zeros(size, dtype=bool)
        mask[random.permutation(size)[:width]] = True
        keep.append(mask)
        widths.append(width)
    return keep, np.array(widths, dtype=np.int64)


def lockstep(
    model: nn.Module, args: tuple[Any, ...], facts: Facts, resolved: Resolved, slicer: Slicer, on_meta: bool
) -> None:
    keep, widths = random_keep(resolved, seed=1)
    # Whether each atom is kept.
    kept = np.ones(resolved.group.size, dtype=bool)
    for index, mask in enumerate(keep):
        here = resolved.group == index
        kept[here] = mask[resolved.unit[here]]
    if on_meta:
        small = slicer.build(model, keep, widths, cut_meta).eval()
    else:
        from compressor.pruning.slicer import cut

        small = slicer.build(model, keep, widths, cut).eval()
    opaque = tuple(slicer.swaps)
    steps = [i for i, step in enumerate(facts.steps) if not _inside(step.path, opaque)]
    sizes: dict[int, int] = {}

    def size(dense: int, labels: Labels | None) -> int:
        if labels is None:
            return dense
        found = sizes.get(id(labels))
        if found is None:
            found = sizes[id(labels)] = int(kept[labels].sum())
        return found

    seen = 0

    def check(_: int, call: Call, results: list[Tensor], path: str) -> None:
        nonlocal seen
        if _inside(path, opaque):
            return
        if seen >= len(steps):
            raise Mismatch(steps[-1], "the pruned network runs more operations")
        step = facts.steps[steps[seen]]
        expected = [tuple(size(s, a) for s, a in zip(shape, axes, strict=True)) for shape, axes in step.outs]
        if step.name != call.name or expected != [tuple(t.shape) for t in results]:
            raise Mismatch(steps[seen], f"{call.name} in {path}")
        seen += 1

    tracer = Tracer(named_tensors(small), Settings(), check, quick=on_meta)
    tracer.watch(walk(small))
    try:
        with torch.no_grad(), tracer:
            small(*args)
    except Mismatch:
        raise
    except Exception as error:  # user code may raise anything on wrong sizes
        raise Mismatch(steps[min(seen, len(steps) - 1)], str(error)) from error


def _inside(path: str, opaque: tuple[str, ...]) -> bool:
    return any(path == p or path.startswith(p + ".") for p in opaque)


def learn(settings: Settings, facts: Facts, error: Mismatch) -> None:
    """Change the settings of the next trace at the failing step.

    Attempts, in order: the size of a reshape is assumed to come from the module's input; the other axis of a channel
    split is pruned; the channels of this operation stay dense; all channels of the module stay dense.
    """
    step = facts.steps[error.step]
    key = step.key
    reason = f"the code around '{step.name}' works at its dense width only"
    decision = facts.decisions.get(key)
    failures = settings.failures[key] = settings.failures.get(key, 0) + 1
    reshapes = step.name in ("view", "reshape")
    ways = [
        (turn, lock)
        for turn in ((False, True) if decision else (False,))
        for lock in ((False, True) if reshapes else (False,))
    ]
    if failures < len(ways) and key not in settings.frozen:
        turn, lock = ways[failures]
        if decision is not None and turn != ways[failures - 1][0]:
            settings.decisions[key] = other_way(*decision)
        (settings.locks.add if lock else settings.locks.discard)(key)
        return
    settings.locks.discard(key)
    if key not in settings.frozen:
        settings.frozen[key] = reason
        return
    path = step.path
    while path:
        inside = {other.key for other in facts.steps if _inside(other.path, (path,))} - settings.frozen.keys()
        if inside:
            settings.frozen.update(dict.fromkeys(inside, reason))
            return
        path = path.rpartition(".")[0]
    settings.frozen.update(dict.fromkeys((other.key for other in facts.steps), reason))


def other_way(choice: str, blocks: Sequence[Labels]) -> str:
    """Return the alternative way to prune a split."""
    if choice in ("rows", "columns"):
        return "columns" if choice == "rows" else "rows"
    last = max(block.ndim for block in blocks) - 1
    return str(last if int(choice) != last else max(last - 1, 0))
