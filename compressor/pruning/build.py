"""Traces a network and verifies the trace on a pruned copy.

The dense pass determines the groups. Then a copy with random widths runs the same pass in lockstep with the trace, on
the meta device: every operation must return exactly the sizes that the labels predict. Where one does not, the channels
of that operation are split in another way, or left dense and reported. A space therefore contains no width that would
not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.core.plugins import load_plugins
from compressor.pruning import rules as rules  # registers them
from compressor.pruning.attention import swap_name
from compressor.pruning.blocks import DOES_NOT_RUN, Branch, find_branches
from compressor.pruning.facts import MEETS_FIXED, Call, Facts, Key, Labels, Settings
from compressor.pruning.groups import Resolved, Skipped, resolve
from compressor.pruning.removal import inside, remove
from compressor.pruning.skeleton import copy_structure, named_tensors, walk
from compressor.pruning.slicer import Slicer, cut, cut_meta
from compressor.pruning.trace import RuleFailed, Tracer
from export.convert.trees import moved, tensors_in

_ROUNDS = 60


@dataclass
class Built:
    """A traced network: its facts, groups and slicer."""

    facts: Facts
    resolved: Resolved
    slicer: Slicer
    on_meta: bool


def build(model: nn.Module, args: tuple[Any, ...]) -> Built:
    """Trace `model` on `args` and check the result.

    Raises:
        CompressorError: The forward pass or a rule of the user's fails, the pass depends on data, or a plugin cannot be
            imported.
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
            turned.decisions[key] = _other_way(*facts.decisions[key])
            other_facts, _ = _trace(model, args, turned)
            other = resolve(other_facts)
            if _freedom(other) > _freedom(resolved):
                settings, facts, resolved = turned, other_facts, other
        slicer = Slicer(facts, resolved, _swaps(model, facts))
        try:
            for masks in _masks(facts, resolved):
                _lockstep(model, args, facts, resolved, slicer, on_meta, masks)
        except Mismatch as error:
            _learn(settings, facts, error)
            continue
        return Built(facts, resolved, slicer, on_meta)
    raise CompressorError(
        "The network's structure could not be determined: pruned copies keep failing in new places.",
        "Freeze the parts with unusual code by the argument `frozen`, or prune a part of the network.",
    )


def _freedom(resolved: Resolved) -> int:
    """Return the number of units that can be removed in total."""
    return sum(found.classes.size - 1 for found in resolved.groups)


def _swaps(model: nn.Module, facts: Facts) -> dict[str, str]:
    """Return the path of each attention module that may be pruned -> name of the class that replaces it."""
    found = {path: swap_name(module) for path, module in walk(model)}
    return {
        path: name for path, name in found.items() if name and (name != "multi_head_attention" or path in facts.swaps)
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
        except RuleFailed as error:
            raise CompressorError(
                str(error), "Correct the rule; docs/architecture.md says what a rule uses, and has one as an example."
            ) from error
        except Exception as error:  # user code may raise anything; the cause is reported
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors_in(args)) or "no tensor"
            where = getattr(error, "_module_path", "")
            raise CompressorError(
                f"The network's forward pass fails on the example input ({shapes})"
                f"{f' in module {where!r}' if where else ''}: {type(error).__name__}: {error}",
                "Pass the input that the network expects: its shape, type and device.",
            ) from (error if str(error) else on_meta)


def _skeleton(model: nn.Module, meta: bool) -> nn.Module:
    """Return a copy of the module tree that a pass may change."""
    if meta:
        return copy_structure(model, lambda tensor: torch.empty_like(tensor, device="meta"))
    # Parameters are views of the user's and buffers are copies: a pass in eval mode writes to neither.
    return copy_structure(
        model, lambda tensor: tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    )


def _run(model: nn.Module, args: tuple[Any, ...], settings: Settings, meta: bool) -> Facts:
    skeleton = _skeleton(model, meta).eval()
    own = named_tensors(skeleton)
    tracer = Tracer(own, settings, quick=meta)
    for tensor in tensors_in(args):
        tracer.mark(tensor, (None,) * tensor.dim(), True)
        tracer.new_value(tensor)
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
    outputs = _outputs(out)
    tracer.facts.flow.results = tracer.values(outputs)
    _fix_outputs(tracer, outputs)
    sizes = (tracer.choices(tensor) or (int(tensor.shape[1]) if tensor.dim() > 1 else 0) for tensor in outputs)
    tracer.facts.classes = next(filter(None, sizes), 1)
    tracer.record_traffic("output", outputs, ())
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


def _outputs(out: Any) -> list[Tensor]:
    """Return the tensors in an output of any class, such as a dataclass or a library's own dictionary."""
    opaque = not isinstance(out, (Tensor, list, tuple, dict)) and hasattr(out, "__dict__")
    return tensors_in(vars(out) if opaque else out)


def _fix_outputs(tracer: Tracer, outputs: Sequence[Tensor]) -> None:
    tracer.read(outputs)
    for tensor in outputs:
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
    _fix_outputs(tracer, _outputs(out))


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
        if key not in tried and key not in settings.failures and any(np.isin(roots[b], lost).any() for b in blocks)
    ][:8]


# ---------------------------------------------------------------- verification on a pruned copy
class Mismatch(Exception):
    """A pruned copy deviates from the trace at a step."""

    def __init__(self, step: int, detail: str) -> None:
        super().__init__(detail)
        self.step = step


def _masks(facts: Facts, resolved: Resolved) -> Iterator[list[NDArray[np.bool_]]]:
    """Yield masks over units, one for each group, of the copies that are checked.

    The first ones keep a random 40 to 80 % of each group, at least one unit and not all. An operation that is given
    numbers of channels may fit them by chance: the second ones, if there is one, keep a single unit of its groups.
    """
    random = np.random.default_rng(1)
    masks = []
    for found in resolved.groups:
        size = found.classes.size
        width = int(np.clip(round(size * random.uniform(0.4, 0.8)), 1, size - 1))
        mask = np.zeros(size, dtype=bool)
        mask[random.permutation(size)[:width]] = True
        masks.append(mask)
    yield masks
    groups = {index for labels in facts.numbered for index in np.unique(resolved.group[labels]).tolist()} - {-1}
    if groups:
        yield [np.arange(mask.size) == mask.size - 1 if i in groups else mask for i, mask in enumerate(masks)]


class _Steps:
    """The steps that a network is to run, compared with those that it runs.

    Args:
        facts: Trace of the dense network.
        steps: Indices of these steps.
        size: Size of an axis, from its dense size and its labels.
        opaque: Paths of modules whose steps are not compared.
    """

    def __init__(
        self,
        facts: Facts,
        steps: Sequence[int],
        size: Callable[[int, Labels | None], int],
        opaque: tuple[str, ...] = (),
    ) -> None:
        self.facts, self.steps, self.size, self.opaque = facts, steps, size, opaque
        self.seen = 0

    def compare(self, network: nn.Module, args: tuple[Any, ...], quick: bool) -> None:
        """Run a network and compare it.

        Raises:
            Mismatch: At the first operation that is another one, returns other sizes, or fails.
        """
        self.seen = 0
        tracer = Tracer(named_tensors(network), Settings(), self._check, quick=quick)
        tracer.watch(walk(network))
        try:
            with torch.no_grad(), tracer:
                network(*args)
        except Mismatch:
            raise
        except Exception as error:  # user code may raise anything on wrong sizes
            raise Mismatch(self.steps[min(self.seen, len(self.steps) - 1)], str(error)) from error

    def _check(self, call: Call, results: list[Tensor], path: str) -> None:
        if inside(path, self.opaque):
            return
        if self.seen >= len(self.steps):
            raise Mismatch(self.steps[-1], "the pruned network runs more operations")
        step = self.facts.steps[self.steps[self.seen]]
        expected = [tuple(self.size(s, a) for s, a in zip(shape, axes, strict=True)) for shape, axes in step.outs]
        if step.name != call.name or expected != [tuple(t.shape) for t in results]:
            raise Mismatch(self.steps[self.seen], f"{call.name} in {path}")
        self.seen += 1


def _lockstep(
    model: nn.Module,
    args: tuple[Any, ...],
    facts: Facts,
    resolved: Resolved,
    slicer: Slicer,
    on_meta: bool,
    masks: Sequence[NDArray[np.bool_]],
) -> None:
    """Run a pruned copy of `model` and compare the sizes of all results with those that the trace predicts.

    A network that keeps tensors for the shape of its last input, such as the anchors of a detector, may compute them
    again at other widths. If its copy differs, another one with real tensors runs once before it is compared.

    Raises:
        Mismatch: At the first operation that returns other sizes, or fails.
    """
    widths = np.array([mask.sum() for mask in masks], dtype=np.int64)
    kept = np.ones(resolved.group.size, dtype=bool)  # of each atom
    for index, mask in enumerate(masks):
        here = resolved.group == index
        kept[here] = mask[resolved.unit[here]]
    sizes: dict[int, int] = {}

    def size(dense: int, labels: Labels | None) -> int:
        if labels is None:
            return dense
        found = sizes.get(id(labels))
        if found is None:
            found = sizes[id(labels)] = int(kept[labels].sum())
        return found

    opaque = tuple(slicer.swaps)
    numbers = [i for i, step in enumerate(facts.steps) if not inside(step.path, opaque)]
    steps = _Steps(facts, numbers, size, opaque)
    small = slicer.build(model, masks, widths, cut_meta if on_meta else cut).eval()
    try:
        steps.compare(small, moved(args, "meta") if on_meta else args, on_meta)
    except Mismatch as found:
        if not _keeps_tensors(model):
            raise
        small = slicer.build(model, masks, widths, cut).eval()
        try:
            with torch.no_grad():
                small(*args)
        except Exception:  # user code may raise anything on wrong sizes
            raise found from None
        steps.compare(small, args, quick=False)


def find_blocks(model: nn.Module, args: tuple[Any, ...], built: Built) -> tuple[list[Branch], list[Skipped]]:
    """Find the blocks that can be removed whole, and run the network without them.

    It must run the operations that are left, with unchanged sizes; where code that remains calls modules of the branch,
    in training mode as well.

    Returns:
        The blocks in the order of execution, and what looks alike but stays, with the reason.
    """
    found, left = find_branches(model, built.facts)
    if not found or not _without(model, args, built, found):
        return found, left
    kept = []
    for branch in found:
        problem = _without(model, args, built, [branch])
        if problem:
            left.append(Skipped(branch.name, DOES_NOT_RUN.format(problem)))
        else:
            kept.append(branch)
    return kept, left


def _without(model: nn.Module, args: tuple[Any, ...], built: Built, branches: Sequence[Branch]) -> str:
    """Run the network without blocks; returns what is wrong, '' if nothing is."""
    facts, meta = built.facts, built.on_meta
    replaced = {path: word for branch in branches for path, word in branch.replaced.items()}
    gone = {facts.flow.events[each].step for branch in branches for each in branch.events}
    steps = _Steps(facts, [i for i in range(len(facts.steps)) if i not in gone], lambda dense, labels: dense)
    small = _skeleton(model, meta).eval()
    remove(small, replaced)
    given = moved(args, "meta") if meta else args
    try:
        with torch.random.fork_rng(devices=[]):
            steps.compare(small, given, meta)
    except Mismatch as error:
        return (str(error).strip().splitlines() or ["it fails"])[0][:120]
    if steps.seen < len(steps.steps):
        return "it runs fewer operations"
    called = any(word.startswith("nothing") for word in replaced.values())
    if called and not _trains(small, given) and _trains(_skeleton(model, meta), given):
        return "it does not train"
    return ""


def _trains(network: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a network runs in training mode, on two inputs for batch norm."""
    for module in network.modules():
        module.training = True
    twice = tuple(torch.cat([arg, arg]) if isinstance(arg, Tensor) and arg.dim() > 1 else arg for arg in args)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(*twice)
    except Exception:  # user code may raise anything
        return False
    return True


def _keeps_tensors(model: nn.Module) -> bool:
    """Whether some attributes are tensors beside parameters and buffers."""
    return any(isinstance(value, Tensor) for _, module in walk(model) for value in vars(module).values())


def _learn(settings: Settings, facts: Facts, error: Mismatch) -> None:
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
            settings.decisions[key] = _other_way(*decision)
        (settings.locks.add if lock else settings.locks.discard)(key)
        return
    settings.locks.discard(key)
    if key not in settings.frozen:
        settings.frozen[key] = reason
        return
    path = step.path
    while path:
        below = {other.key for other in facts.steps if inside(other.path, (path,))} - settings.frozen.keys()
        if below:
            settings.frozen.update(dict.fromkeys(below, reason))
            return
        path = path.rpartition(".")[0]
    settings.frozen.update(dict.fromkeys((other.key for other in facts.steps), reason))


def _other_way(choice: str, blocks: Sequence[Labels]) -> str:
    """Return the alternative way to prune a split."""
    if choice in ("rows", "columns"):
        return "columns" if choice == "rows" else "rows"
    last = max(block.ndim for block in blocks) - 1
    return str(last if int(choice) != last else max(last - 1, 0))


# ---------------------------------------------------------------- arguments
def check_model(model: Any) -> None:
    """Refuse models that cannot be pruned.

    Raises:
        CompressorError: It is not a module, has no parameters, has parameters without data, or is scripted.
    """
    if not isinstance(model, nn.Module):
        raise CompressorError(f"The model must be a torch.nn.Module, not {type(model).__name__}.", "Build it first.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CompressorError("A scripted or traced module hides its structure.", "Pass the original module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CompressorError(f"The model is wrapped in {type(model).__name__}.", "Pass `model.module`.")
    parameters = list(model.named_parameters())
    if not parameters:
        raise CompressorError(
            f"{type(model).__name__} has no parameters: there is nothing to prune.", "Is it the right one?"
        )
    for name, value in parameters:
        if isinstance(value, nn.parameter.UninitializedParameter):
            raise CompressorError(f"Parameter '{name}' has no shape yet (lazy module).", "Run the model once first.")
        if value.device.type == "meta":
            raise CompressorError(
                f"The model is on the meta device: parameter '{name}' has no values.",
                "Load its weights: model.to_empty(device='cpu'), then load_state_dict().",
            )
    devices = {str(value.device) for _, value in parameters}
    if len(devices) > 1:
        raise CompressorError(
            f"The model is spread over several devices: {', '.join(sorted(devices))}.", "Move it to one."
        )


def checked_inputs(model: nn.Module, example: Any) -> tuple[Any, ...]:
    """Return the example as positional arguments for one input.

    Raises:
        CompressorError: The example has no tensor, or is on another device than the model.
    """
    args = example if isinstance(example, tuple) else (example,)
    tensors = tensors_in(args)
    if not tensors:
        raise CompressorError(
            f"The example input must contain a tensor, got {type(example).__name__}.",
            "Pass for example torch.randn(1, 3, 224, 224).",
        )
    device = next(model.parameters()).device
    for tensor in tensors:
        if tensor.device != device:
            raise CompressorError(
                f"The example input is on {tensor.device}, the model on {device}.",
                "Move one of them: example.to(device).",
            )
    batches = {tensor.shape[0] if tensor.dim() > 1 else 1 for tensor in tensors}
    if len(batches) == 1 and batches != {1} and all(isinstance(arg, Tensor) for arg in args):
        return tuple(arg[:1] for arg in args)
    return args
