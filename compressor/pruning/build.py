"""Tracing a network, and proving on a pruned copy that the trace was understood.

After the dense pass has told the groups, a copy with random widths runs the same pass on the meta device, in lockstep: every
operation must yield exactly the sizes that the labels foretell. Where one does not, the channels that meet in that
operation are split another way or left dense, and named; so a space never promises a width that would not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from compressor.pruning.trace import MEETS_FIXED, Call, Facts, Key, Settings, Tracer, data_dependent, example_tensors, moved

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
    tried: set[Key] = set()
    for _ in range(_ROUNDS):
        facts, on_meta = _trace(model, args, settings)
        resolved = resolve(facts)
        for key in _suspects(facts, resolved, settings, tried):
            tried.add(key)
            turned = settings.copy()
            turned.decisions[key] = _other(*facts.decisions[key])
            other_facts, _ = _trace(model, args, turned)
            other = resolve(other_facts)
            if _freedom(other) > _freedom(resolved):
                settings, facts, resolved = turned, other_facts, other
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


def _freedom(resolved: Resolved) -> int:
    return sum(found.classes.size - 1 for found in resolved.groups)


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
    tracer = Tracer(named_tensors(skeleton), settings, quick=meta)
    for tensor in example_tensors(args):
        tracer.mark(tensor, (None,) * tensor.dim(), True)
    own = named_tensors(skeleton)
    for name, other in _shared_memory(named_tensors(model)).items():
        for labels in tracer.axes(own[name]):
            tracer.atoms.fix(labels, f"it shares its memory with '{other}' without being the same parameter")
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
    _fix_outputs(tracer, out)
    if any(name not in tracer.facts.params for name, value in named_tensors(skeleton).items() if value.dim()):
        _train_pass(tracer, skeleton, args, meta)
    return tracer.facts


def _shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each parameter that lies in the memory of another -> the other's name.

    Slicing would give each a memory of its own, and training would then move them apart.
    """
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not tensor.numel() or not isinstance(tensor, nn.Parameter):
            continue
        other = first.setdefault(tensor.untyped_storage().data_ptr(), name)
        if other != name:
            found[name], found[other] = other, name
    return found


def _fix_outputs(tracer: Tracer, out: Any) -> None:
    for tensor in example_tensors(_plain(out)):
        for labels in tracer.axes(tensor):
            tracer.atoms.fix(labels, "it makes the network's output")


def _train_pass(tracer: Tracer, skeleton: nn.Module, args: tuple[Any, ...], meta: bool) -> None:
    """Some parts run in training only (auxiliary classifiers): a pass in train mode ties them to the channels they read.

    Batch-norm in train mode needs two inputs. Where that pass is impossible, such parts are left as they are; `resolve`
    names those that would not fit.
    """
    if not meta or not all(isinstance(arg, Tensor) and arg.dim() > 1 for arg in args):
        return
    twice = tuple(torch.cat([arg, arg]) for arg in args)
    for tensor in twice:
        tracer.mark(tensor, (None,) * tensor.dim(), True)
    tracer.uncounted = True
    for module in skeleton.modules():
        module.training = True
    try:
        with torch.no_grad(), tracer:
            out = skeleton(*twice)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, CompressorError):
        return
    _fix_outputs(tracer, out)


def _plain(out: Any) -> Any:
    """Nested lists and dictionaries of tensors from outputs of any class (dataclasses, dictionaries of a library)."""
    if isinstance(out, (Tensor, list, tuple, dict)):
        return out
    return dict(vars(out)) if hasattr(out, "__dict__") else out


def _suspects(facts: Facts, resolved: Resolved, settings: Settings, tried: set[Key]) -> list[Key]:
    """Splits of channels that tied a whole layer into one unit, or that met an axis of fixed size."""
    stuck = [labels for labels, reason in facts.atoms.fixed if reason.startswith(MEETS_FIXED)]
    if not (resolved.collapsed or stuck) or not facts.decisions:
        return []
    roots = facts.atoms.solve().of
    lost = np.unique(np.concatenate([roots[labels] for labels in [*resolved.collapsed, *stuck]]))
    return [
        key
        for key, (_, blocks) in facts.decisions.items()
        if key not in tried and key not in settings.failures and any(np.isin(roots[b], lost).any() for b in blocks)
    ][:8]


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

    tracer = Tracer(named_tensors(small), Settings(), check, quick=on_meta)
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
    """What the next trace does differently at the failing step.

    A reshape is first taken to have its size from the module's input; then a split of channels is turned round; then the
    channels that meet here stay dense, and at last all channels of the module.
    """
    step = facts.steps[error.step]
    key = step.key
    reason = f"the code around '{step.name}' works at its dense width only"
    decision = facts.decisions.get(key)
    failures = settings.failures[key] = settings.failures.get(key, 0) + 1
    reshapes = step.name in ("view", "reshape")
    ways = [(turn, lock) for turn in ((False, True) if decision else (False,)) for lock in ((False, True) if reshapes else (False,))]
    if failures < len(ways) and key not in settings.frozen:
        turn, lock = ways[failures]
        if decision is not None and turn != ways[failures - 1][0]:
            settings.decisions[key] = _other(*decision)
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


def _other(choice: str, blocks: Sequence[Labels]) -> str:
    """The other way to prune a split."""
    if choice in ("rows", "columns"):
        return "columns" if choice == "rows" else "rows"
    last = max(block.ndim for block in blocks) - 1
    return str(last if int(choice) != last else max(last - 1, 0))
