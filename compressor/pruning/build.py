"""Tracing a network, and proving on a pruned copy that the trace was understood.

After the dense pass has told the groups, a copy with random widths runs the same pass on the meta device, in lockstep: every
operation must yield exactly the sizes that the labels foretell. Where one does not, the channels that meet in that
operation are split another way or left dense, and named; so a space never promises a width that would not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.pruning.atoms import Labels
from compressor.pruning.attention import swap_name
from compressor.pruning.groups import Resolved, resolve
from compressor.pruning.skeleton import copy_structure, named_tensors
from compressor.pruning.slicer import Slicer, cut_meta
from compressor.pruning.trace import Call, Facts, Settings, Tracer, data_dependent, example_tensors, moved

_ROUNDS = 60


@dataclass
class Built:
    """A traced network: facts, groups and how to slice it."""

    facts: Facts
    resolved: Resolved
    slicer: Slicer
    settings: Settings
    on_meta: bool


class _Mismatch(Exception):
    """A pruned copy did not do what the trace foretold, at a step."""

    def __init__(self, step: int, detail: str) -> None:
        super().__init__(detail)
        self.step = step


def build(model: nn.Module, args: tuple[Any, ...], frozen_at_once: Sequence[str] = ()) -> Built:
    """Trace `model` on `args` and check the result.

    Raises:
        CompressorError: the forward pass fails, or depends on data.
    """
    settings = Settings()
    best: tuple[int, Settings] | None = None
    flips = 0
    for _ in range(_ROUNDS):
        facts, on_meta = _trace(model, args, settings)
        resolved = resolve(facts)
        flip = _collapsed(facts, resolved, settings) if flips < 4 else None
        freedom = sum(found.classes.size - 1 for found in resolved.groups)
        if best is not None and freedom <= best[0]:
            # Turning the split round did not help; go back to what was.
            settings, best, flips = best[1], None, 4
            continue
        if flip is not None:
            flips += 1
            best = (freedom, _copy(settings))
            settings.decisions.update(flip)
            continue
        best = None
        slicer = Slicer(facts, resolved, _swaps(model, facts))
        try:
            _lockstep(model, args if not on_meta else moved(args, "meta"), facts, resolved, slicer, on_meta)
        except _Mismatch as error:
            _learn(settings, facts, error)
            continue
        return Built(facts, resolved, slicer, settings, on_meta)
    raise CompressorError(
        "The network's structure could not be settled: pruned copies keep failing in new places.",
        "Freeze the parts with unusual code by the argument `frozen`, or prune a part of the network.",
    )


def _copy(settings: Settings) -> Settings:
    return Settings(dict(settings.decisions), dict(settings.frozen), set(settings.untied))


def _swaps(model: nn.Module, facts: Facts) -> dict[str, str]:
    found = {path: name for path, module in model.named_modules() if (name := swap_name(module)) is not None}
    return {path: name for path, name in found.items() if name != "multi_head_attention" or path in facts.swaps}


def _trace(model: nn.Module, args: tuple[Any, ...], settings: Settings) -> tuple[Facts, bool]:
    """The dense pass: on the meta device, or with real tensors where the network cannot run there."""
    try:
        return _run(model, moved(args, "meta"), settings, meta=True), True
    except CompressorError:
        raise
    except Exception as on_meta:
        try:
            return _run(model, args, settings, meta=False), False
        except CompressorError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in example_tensors(args)) or "no tensor"
            where = getattr(error, "_module_path", "")
            raise CompressorError(
                f"The network's forward pass fails on the example input ({shapes})"
                f"{f' in module {where!r}' if where else ''}: {type(error).__name__}: {error}",
                "Give the input that the network expects: its shape, type and device.",
            ) from (error if str(error) else on_meta)


def _skeleton(model: nn.Module, meta: bool) -> nn.Module:
    if meta:
        return copy_structure(model, lambda tensor: torch.empty_like(tensor, device="meta"))
    # Parameters are views of the user's, buffers copies: a pass in eval mode writes neither.
    return copy_structure(
        model, lambda tensor: tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    )


def _run(model: nn.Module, args: tuple[Any, ...], settings: Settings, meta: bool) -> Facts:
    skeleton = _skeleton(model, meta).eval()
    tracer = Tracer(named_tensors(skeleton), settings)
    for tensor in example_tensors(args):
        tracer.mark(tensor, (None,) * tensor.dim(), True)
    tracer.watch(skeleton.named_modules())
    try:
        with torch.no_grad(), tracer:
            out = skeleton(*args)
    except Exception as error:
        failed = tracer.failed
        if meta and failed is not None and "meta" in str(error) and any(w in str(error) for w in ("item", "data", "copy")):
            raise data_dependent("item", failed) from error
        if failed is not None and not isinstance(error, CompressorError):
            error._module_path = failed.path  # type: ignore[attr-defined]
        raise
    for tensor in example_tensors(_plain(out)):
        for labels in tracer.axes(tensor):
            tracer.atoms.fix(labels, "it makes the network's output")
    return tracer.facts


def _plain(out: Any) -> Any:
    """Nested lists and dictionaries of tensors from outputs of any class (dataclasses, dictionaries of a library)."""
    if isinstance(out, (Tensor, list, tuple, dict)):
        return out
    return dict(vars(out)) if hasattr(out, "__dict__") else out


def _collapsed(facts: Facts, resolved: Resolved, settings: Settings) -> dict[Any, str] | None:
    """Splits of channels that tied a whole layer into one unit, turned the other way."""
    if not resolved.collapsed:
        return None
    roots = facts.atoms.solve().of
    lost = np.concatenate(resolved.collapsed)
    turned: dict[Any, str] = {}
    for key, (choice, blocks) in facts.decisions.items():
        if key in settings.decisions or not any(np.isin(roots[b], lost).any() for b in blocks):
            continue
        if choice in ("rows", "columns"):
            turned[key] = "columns" if choice == "rows" else "rows"
        else:
            last = max(block.ndim for block in blocks) - 1
            turned[key] = str(last if int(choice) != last else max(last - 1, 0))
    return turned or None


def random_keep(resolved: Resolved, seed: int) -> tuple[list[Any], Any]:
    """Masks over units that keep 40 to 80 % of each group, at least one and not all."""
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


def _lockstep(
    model: nn.Module, args: tuple[Any, ...], facts: Facts, resolved: Resolved, slicer: Slicer, on_meta: bool
) -> None:
    keep, widths = random_keep(resolved, seed=1)
    # Every atom: whether it is kept.
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
            raise _Mismatch(steps[-1], "the pruned network runs more operations")
        step = facts.steps[steps[seen]]
        expected = [tuple(size(s, a) for s, a in zip(shape, axes, strict=True)) for shape, axes in step.outs]
        if step.name != call.name or expected != [tuple(t.shape) for t in results]:
            raise _Mismatch(steps[seen], f"{call.name} in {path}")
        seen += 1

    tracer = Tracer(named_tensors(small), Settings(), check)
    tracer.watch(small.named_modules())
    try:
        with torch.no_grad(), tracer:
            small(*args)
    except _Mismatch:
        raise
    except Exception as error:
        raise _Mismatch(steps[min(seen, len(steps) - 1)], str(error)) from error


def _inside(path: str, opaque: tuple[str, ...]) -> bool:
    return any(path == p or path.startswith(p + ".") for p in opaque)


def _learn(settings: Settings, facts: Facts, error: _Mismatch) -> None:
    """Turn the split at the failing step round if it has one that was not turned, else leave its channels dense."""
    step = facts.steps[error.step]
    decision = facts.decisions.get(step.key)
    if decision is not None and step.key not in settings.decisions:
        choice, blocks = decision
        if choice in ("rows", "columns"):
            settings.decisions[step.key] = "columns" if choice == "rows" else "rows"
        else:
            last = max(block.ndim for block in blocks) - 1
            settings.decisions[step.key] = str(last if int(choice) != last else max(last - 1, 0))
        return
    if step.key in settings.frozen:
        # Freezing what meets here did not help: the cause lies before it.
        index = error.step
        while index > 0 and facts.steps[index].key in settings.frozen:
            index -= 1
        step = facts.steps[index]
    settings.frozen[step.key] = f"the code around '{step.name}' works at its dense width only"
