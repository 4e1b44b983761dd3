"""Traces a network and verifies the trace on a pruned copy.

The dense pass determines the groups. Then a copy with random widths runs the same pass on the meta device, in lockstep:
every operation must return exactly the sizes that the labels predict. Where one does not, the channels of that
operation are split in another way, or left dense and reported. A space therefore contains no width that would not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.core.plugins import load_plugins
from compressor.pruning import rules as rules  # registers them
from compressor.pruning.attention import swap_name
from compressor.pruning.facts import MEETS_FIXED, Facts, Key, Settings, example_tensors, moved
from compressor.pruning.groups import Resolved, resolve
from compressor.pruning.lockstep import Mismatch, learn, lockstep, other_way
from compressor.pruning.skeleton import copy_structure, named_tensors, walk
from compressor.pruning.slicer import Slicer
from compressor.pruning.trace import Tracer

_ROUNDS = 60


@dataclass
class Built:
    """A traced network: its facts, groups and slicer."""

    facts: Facts
    resolved: Resolved
    slicer: Slicer
    settings: Settings
    on_meta: bool


def build(model: nn.Module, args: tuple[Any, ...]) -> Built:
    """Trace `model` on `args` and check the result.

    Raises:
        CompressorError: the forward pass fails, or depends on data; or a plugin cannot be imported.
    """
    load_plugins()
    settings = Settings()
    tried: set[Key] = set()
    for _ in range(_ROUNDS):
        facts, on_meta = _trace(model, args, settings)
        resolved = resolve(facts)
        for key in _suspects(facts, resolved, settings, tried):
            tried.add(key)
            turned = settings.copy()
            turned.decisions[key] = other_way(*facts.decisions[key])
            other_facts, _ = _trace(model, args, turned)
            other = resolve(other_facts)
            if _freedom(other) > _freedom(resolved):
                settings, facts, resolved = turned, other_facts, other
        slicer = Slicer(facts, resolved, _swaps(model, facts))
        try:
            lockstep(model, args if not on_meta else moved(args, "meta"), facts, resolved, slicer, on_meta)
        except Mismatch as error:
            learn(settings, facts, error)
            continue
        return Built(facts, resolved, slicer, settings, on_meta)
    raise CompressorError(
        "The network's structure could not be determined: pruned copies keep failing in new places.",
        "Freeze the parts with unusual code by the argument `frozen`, or prune a part of the network.",
    )


def _freedom(resolved: Resolved) -> int:
    return sum(found.classes.size - 1 for found in resolved.groups)


def _swaps(model: nn.Module, facts: Facts) -> dict[str, str]:
    found = {path: name for path, module in walk(model) if (name := swap_name(module)) is not None}
    return {
        path: name for path, name in found.items() if name != "multi_head_attention" or path in facts.swaps
    }


def _trace(model: nn.Module, args: tuple[Any, ...], settings: Settings) -> tuple[Facts, bool]:
    """Run the dense pass on the meta device, or with real tensors if the network cannot run there."""
    try:
        return _run(model, moved(args, "meta"), settings, meta=True), True
    except CompressorError:
        raise
    except Exception as on_meta:  # user code may raise anything; it may run without the meta device
        try:
            return _run(model, args, settings, meta=False), False
        except CompressorError:
            raise
        except Exception as error:  # user code may raise anything; the cause is reported
            shapes = (
                ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in example_tensors(args))
                or "no tensor"
            )
            where = getattr(error, "_module_path", "")
            raise CompressorError(
                f"The network's forward pass fails on the example input ({shapes})"
                f"{f' in module {where!r}' if where else ''}: {type(error).__name__}: {error}",
                "Pass the input that the network expects: its shape, type and device.",
            ) from (error if str(error) else on_meta)


def _skeleton(model: nn.Module, meta: bool) -> nn.Module:
    if meta:
        return copy_structure(model, lambda tensor: torch.empty_like(tensor, device="meta"))
    # Parameters are views of the user's and buffers are copies: a pass in eval mode writes to neither.
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
    tracer.watch(walk(skeleton))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), tracer:
            out = skeleton(*args)
    except Exception as error:
        failed = tracer.failed
        if failed is not None and not isinstance(error, CompressorError):
            error._module_path = failed.path  # type: ignore[attr-defined]
        raise
    _fix_outputs(tracer, out)
    shapes = [tensor.shape for tensor in example_tensors(_plain(out)) if tensor.dim() > 1]
    tracer.facts.classes = int(shapes[0][1]) if shapes else 1
    tracer.facts.traffic.record(tracer, "output", example_tensors(_plain(out)), ())
    if any(name not in tracer.facts.params for name, value in named_tensors(skeleton).items() if value.dim()):
        _train_pass(tracer, skeleton, args, meta)
    return tracer.facts


def _shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name of each parameter that shares the memory of another -> name of the other.

    Slicing would copy each to separate memory, and training would then make them differ.
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
    """Tie parts that run in training only (auxiliary classifiers) to the channels they read, by a train-mode pass.

    Batch-norm in train mode needs two inputs. If that pass is impossible, such parts stay unchanged; `resolve` reports
    those that would not fit.
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
        with torch.random.fork_rng(devices=[]), torch.no_grad(), tracer:
            out = skeleton(*twice)
    except Exception:  # training-only code may need labels or real data, and may raise anything
        return
    _fix_outputs(tracer, out)


def _plain(out: Any) -> Any:
    """Convert outputs of any class (dataclasses, a library's dictionaries) to nested lists and dictionaries."""
    if isinstance(out, (Tensor, list, tuple, dict)):
        return out
    return dict(vars(out)) if hasattr(out, "__dict__") else out


def _suspects(facts: Facts, resolved: Resolved, settings: Settings, tried: set[Key]) -> list[Key]:
    """Return channel splits that tied a whole layer into one unit, or that met an axis of fixed size."""
    stuck = [labels for labels, reason in facts.atoms.fixed if reason.startswith(MEETS_FIXED)]
    if not (resolved.collapsed or stuck) or not facts.decisions:
        return []
    roots = facts.atoms.solve().of
    lost = np.unique(np.concatenate([roots[labels] for labels in [*resolved.collapsed, *stuck]]))
    return [
        key
        for key, (_, blocks) in facts.decisions.items()
        if key not in tried
        and key not in settings.failures
        and any(np.isin(roots[b], lost).any() for b in blocks)
    ][:8]
