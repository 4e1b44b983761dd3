"""Verifies a slim network by two independent libraries: fvcore counts its multiply-adds, torch-pruning cuts it again.

torch-pruning removes the same channels from a copy of the dense network. Its dependency graph is built from
autograd's, independently of the tracer of the pruning space. The copy's tensors are numbered: every element is its
index in the dense tensor, so that each pruned tensor shows which elements were kept, in which order. They must be those
of the slim network.

torch-pruning's graph cannot express everything (parts of a reshape, heads of torch's attention, whole groups of a
grouped convolution). A group of channels in which it removes something else is restored and left dense on both sides,
and reported with the operation. If it supports all of a group's operations exactly, the disagreement is an error.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.core.progress import say
from compressor.models.computed import evaluated
from compressor.pruning.counts import Ints, Layer
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.removal import inside
from compressor.pruning.skeleton import copy_structure, named_tensors
from compressor.pruning.torch_pruning_cut import Cutter, Unable, first_line, is_numbered, numbered
from export.convert.trees import moved

if TYPE_CHECKING:
    from compressor.pruning.space import PruningSpace

SECONDS = 60.0
"""No further group is checked after this many seconds."""

_EXACT = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm layer_norm prelu relu
    relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu celu selu mish softplus clamp dropout
    dropout2d add sub mul div iadd isub imul cat concat concatenate mean flatten contiguous detach clone max_pool2d
    avg_pool2d max_pool2d_with_indices boolean_dispatch adaptive_avg_pool2d adaptive_max_pool2d
"""
EXACT = frozenset(_EXACT.split())
"""Operations through which torch-pruning's graph follows channels exactly."""

PRODUCTS = ("conv", "mm", "matmul", "attention", "einsum", "linear", "bilinear", "lstm", "gru", "fft")
"""Parts of the names of operators with many multiply-adds."""

_PLAIN = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d})
"""Modules whose forward pass is one operation on their own weight; subclasses may differ."""


class Disagreement(CompressorError):
    """An independent check contradicts the slim network: an internal error, not a user error."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "This is an internal error: nothing is exported, and the run's results so far are kept. Do not deploy "
            "the network; report this with recipe.yaml and channels.json of the run's folder.",
        )


@dataclass(frozen=True)
class Check:
    """Result of an independent check: True if confirmed, None if it could not run (a contradiction raises)."""

    confirmed: bool | None
    words: str


def checks(space: PruningSpace, plan: ChannelPlan, slim: nn.Module) -> dict[str, dict[str, Any]]:
    """Run both independent checks of a slim network; returns their records for the manifest.

    Args:
        space: The space that the network was pruned from; its model is only read.
        plan: Channels that each group keeps.
        slim: The delivered network; its weights may have been trained since.

    Raises:
        Disagreement: A check contradicts the network; nothing may be exported then.
    """
    found: dict[str, dict[str, Any]] = {}

    def run(name: str, what: str, check: Callable[[], Check]) -> None:
        start = time.monotonic()
        result = check()
        seconds = round(time.monotonic() - start, 1)
        found[name] = {"confirmed": result.confirmed, "words": result.words, "seconds": seconds}
        say(f"{what}: {result.words} ({seconds} s).")

    run("torch_pruning", "Removed channels", lambda: confirm_cut(space, plan, slim))
    run("fvcore", "Multiply-adds", lambda: confirm_macs(space, space.row(plan), slim))
    return found


# ---------------------------------------------------------------- multiply-adds by fvcore
def confirm_macs(space: PruningSpace, widths: Ints, slim: nn.Module) -> Check:
    """Compare fvcore's multiply-adds of the built network with those of the space, in total and by layer.

    Args:
        space: The space that the network was pruned from.
        widths: The plan as `space.row` returns it.
        slim: The delivered network.

    Raises:
        Disagreement: fvcore's count differs from `space.macs` or `space.layer_macs`.
    """
    expected = int(space.macs(widths))
    try:
        total, by_module, unseen = count_macs(slim, space.example_input)
    except Exception as error:  # fvcore's tracer runs user code and may raise anything
        return Check(None, f"not checked: fvcore cannot trace the network ({first_line(error)})")
    if total != expected:
        raise Disagreement(
            f"fvcore counts {total:,} multiply-adds of the slim network, the pruning space says {expected:,}."
        )
    layers: Counter[str] = Counter()
    for layer, macs in zip(space.layers, space.layer_macs(widths).tolist(), strict=True):
        layers[layer.name] += macs if layer.counted else 0
    plain = {name for name, module in slim.named_modules() if type(module) in _PLAIN}
    for name, macs in layers.items():
        if name in plain and by_module.get(name, 0) != macs:
            raise Disagreement(
                f"fvcore counts {by_module.get(name, 0):,} multiply-adds of the slim network's layer '{name}', the "
                f"pruning space says {macs:,}."
            )
    words = f"confirmed by fvcore: {total:,} multiply-adds"
    return Check(True, f"{words}; it does not count {_listed(unseen)}" if unseen else words)


def count_macs(model: nn.Module, example: tuple[Any, ...]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Count a network's multiply-adds with fvcore in eval mode.

    Returns:
        Total multiply-adds; multiply-adds by module; number of occurrences of each operator that is not counted.
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), "cpu")
    with evaluated(model), _quiet():
        from fvcore.nn import FlopCountAnalysis  # its import emits deprecation warnings of torch

        analysis = FlopCountAnalysis(model, moved(example, device))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return (
            int(analysis.total()),
            {name: int(macs) for name, macs in analysis.by_module().items()},
            dict(analysis.unsupported_ops()),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("fvcore")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _listed(unseen: dict[str, int], most: int = 6) -> str:
    """List operators, those with multiply-adds first: 'aten::add (16), aten::mul (4) and 2 more kinds'."""
    order = sorted(unseen, key=lambda name: (not any(part in name for part in PRODUCTS), -unseen[name], name))
    shown = ", ".join(f"{name.removeprefix('aten::')} ({unseen[name]})" for name in order[:most])
    return shown + (f" and {len(order) - most} more kinds" if len(order) > most else "")


# ---------------------------------------------------------------- removed channels by torch-pruning
@dataclass
class Comparison:
    """Result of applying a plan with torch-pruning.

    Attributes:
        agreed: Names of the groups in which it removes exactly the plan's channels.
        different: Name of each group in which it keeps elements that the plan removes -> description.
        coarser: Name of each group in which it removes more than the plan -> description.
        unable: Name of each group that it could not remove -> reason.
        failed: Reason why nothing could be compared; empty otherwise.
        codes: Its tensors by name: the index of each element in the dense tensor.
        unreached: Names of tensors that its graph does not reach, such as those that only training uses.
    """

    agreed: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)
    coarser: dict[str, str] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    codes: dict[str, Tensor] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()

    @property
    def other(self) -> dict[str, str]:
        """Descriptions of all groups in which it does not agree with the plan."""
        return {**self.different, **self.coarser, **self.unable}


def confirm_cut(space: PruningSpace, plan: ChannelPlan, slim: nn.Module) -> Check:
    """Compare the slim network with the dense one pruned by torch-pruning with the same plan; arguments as in `checks`.

    Raises:
        Disagreement: torch-pruning keeps other elements of a tensor, or the delivered network has other shapes.
    """
    _compare_shapes(space, plan, slim)
    found = compare(space, plan)
    if found.failed:
        return Check(None, f"not checked: {found.failed}")
    for name, what in found.different.items():
        if not obstacles(space, name) and runs(space, plan, name):
            raise Disagreement(f"torch-pruning disagrees with the slim network about the channels of '{name}': {what}.")
    compared = {name: codes for name, codes in found.codes.items() if name not in found.unreached}
    _compare_tensors(space, ChannelPlan({name: plan.keep[name] for name in found.agreed}), compared, found.unreached)
    skipped = found.other
    changed = len(found.agreed) + len(skipped)
    count = len(plan.removed)
    blocks = f"the removal of {_number(count, 'block')}, which torch-pruning cannot do" if count else ""
    if not changed or not (skipped or found.unreached):
        words = "no channels were removed"
        if changed:
            tensors, groups = _number(len(compared), "tensor"), _number(changed, "group")
            words = f"confirmed by torch-pruning: {tensors}, {groups} of channels"
        return Check(True, f"{words}; not checked: {blocks}" if blocks else words)
    lacks = [blocks] if blocks else []
    if skipped:
        reasons = Counter(
            ", ".join(obstacles(space, name)) or "plain layers" for name in {**found.different, **found.coarser}
        )
        kinds = [f"{count} through {operations}" for operations, count in reasons.most_common(3)]
        kinds += [f"{len(found.unable)} that it cannot remove"] if found.unable else []
        first, what = next(iter(skipped.items()))
        groups = _number(len(skipped), "group")
        lacks.append(f"its graph cannot express {groups} ({'; '.join(kinds)}), such as {first}: {what}")
    if found.unreached:
        tensors = _number(len(found.unreached), "tensor")
        lacks.append(f"its graph does not reach {tensors}, such as {found.unreached[0]}")
    start = f"{len(found.agreed)} of {_number(changed, 'group')} of channels confirmed by torch-pruning; "
    return Check(None, f"{start if found.agreed else ''}not checked: {'; '.join(lacks)}")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def runs(space: PruningSpace, plan: ChannelPlan, group: str) -> bool:
    """Whether the network still runs after torch-pruning removed one group's channels; if not, its graph is wrong."""
    alone = ChannelPlan({group: plan.keep[group]})
    example = moved(space.example_input, "cpu")
    try:
        cutter = Cutter(space, alone)
        cutter.remove(next(each.index for each in space.groups if each.name == group), take_back=False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            cutter.with_values()(*example)
    except Exception:  # the result may be an invalid network
        return False
    return True


def obstacles(space: PruningSpace, group: str) -> tuple[str, ...]:
    """Return the operations on a group's channels that torch-pruning's graph may not follow exactly."""
    index = next(each.index for each in space.groups if each.name == group)
    found = [name for name in space.operations(index) if name not in EXACT]
    for layer in space.layers:
        touched = index in {each for each, _ in (*layer.in_channels.terms, *layer.out_channels.terms)}
        if touched and layer.groups > 1 and not _is_depthwise(space, layer):
            found.append("grouped convolution")
            break
    return tuple(sorted(found))


def _is_depthwise(space: PruningSpace, layer: Layer) -> bool:
    """Whether each channel has exactly one filter, which torch-pruning treats as depthwise."""
    dense = space.dense_widths
    return layer.groups == int(layer.in_channels(dense)) == int(layer.out_channels(dense))


def compare(space: PruningSpace, plan: ChannelPlan, seconds: float = SECONDS) -> Comparison:
    """Remove a plan's channels with torch-pruning, one group of the space after the other.

    Args:
        space, plan: As in `checks`.
        seconds: Time limit; the remaining groups are then listed as unable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cutter = Cutter(space, plan)
        except Exception as error:  # torch-pruning runs user code under its own tracer, and may raise anything
            return Comparison(failed=f"its graph cannot trace the network ({first_line(error)})")
        found, end = Comparison(), time.monotonic() + seconds
        for group in space.groups:
            if len(plan.keep.get(group.name, range(group.width))) == group.width:
                continue
            if time.monotonic() > end:
                found.unable[group.name] = f"it was not reached in {seconds:.0f} s"
                continue
            try:
                left, more = cutter.remove(group.index)
            except Unable as error:
                found.unable[group.name] = str(error)
                continue
            if left or more:
                (found.different if left else found.coarser)[group.name] = left or more
            else:
                found.agreed.append(group.name)
    found.codes = {name: cutter.tensor(name).detach() for name in cutter.dense}
    changing = {
        name for group in space.groups if group.name in found.agreed for name, _ in cutter.by_group[group.index]
    }
    found.unreached = tuple(name for name in cutter.dense if name in cutter.unreached & changing)
    return found


def _compare_tensors(space: PruningSpace, plan: ChannelPlan, codes: dict[str, Tensor], without: Sequence[str]) -> None:
    """Compare the slicing of numbered tensors and of the network's own tensors with torch-pruning's tensors.

    Raises:
        Disagreement: A tensor differs.
    """
    ours = named_tensors(space.apply(plan, copy_structure(space.model, _numbered_or_copy)))
    real, dense = named_tensors(space.apply(plan)), named_tensors(space.model)
    for name in sorted({name for name, tensor in ours.items() if is_numbered(tensor)} - {*without} | {*codes}):
        theirs, mine = codes.get(name), ours.get(name)
        if theirs is None or mine is None:
            raise Disagreement(
                f"Tensor '{name}' is only in {'torch-pruning' if mine is None else 'our'} cut of the dense network."
            )
        if theirs.shape != mine.shape or not torch.equal(theirs.to(mine.dtype), mine):
            raise Disagreement(
                f"torch-pruning keeps other elements of '{name}' than the slim network: {tuple(theirs.shape)} beside "
                f"{tuple(mine.shape)}."
            )
        gathered = dense[name].detach().flatten()[theirs.long().to(dense[name].device).flatten()]
        if not torch.equal(gathered.reshape(theirs.shape), real[name]):
            raise Disagreement(f"The values of '{name}' in the slim network are not those that torch-pruning keeps.")


def _numbered_or_copy(tensor: Tensor) -> Tensor:
    return numbered(tensor) if is_numbered(tensor) else tensor.detach().clone()


def _compare_shapes(space: PruningSpace, plan: ChannelPlan, slim: nn.Module) -> None:
    indices, delivered, gone = space.indices(plan), slim.state_dict(), space.replaced(plan)
    dense = {name: tensor for name, tensor in space.model.state_dict().items() if not inside(name, gone)}
    if more := sorted(delivered.keys() - dense.keys()):
        raise Disagreement(f"The slim network has a tensor '{more[0]}' that the plan does not leave.")
    for name, tensor in dense.items():
        expected: Sequence[int] = [
            indices[name][axis].numel() if axis in indices.get(name, {}) else size
            for axis, size in enumerate(tensor.shape)
        ]
        if name not in delivered or list(delivered[name].shape) != expected:
            found = tuple(delivered[name].shape) if name in delivered else "missing"
            raise Disagreement(
                f"Tensor '{name}' of the slim network has shape {found}, expected {tuple(expected)} by the plan."
            )
