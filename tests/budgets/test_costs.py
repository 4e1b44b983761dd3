"""Memory against numbers worked out by hand, and against what a pass through the network holds."""

from __future__ import annotations

import copy
import operator
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.budgets.base import parse_budget
from compressor.budgets.limits import resolve
from compressor.models import create_model
from compressor.pruning.space import PruningSpace


class Branch(nn.Module):
    """A long branch beside a residual connection: `a` makes what is kept while `b` and `c` work."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1, bias=False)
        self.b = nn.Conv2d(8, 16, 1, bias=False)
        self.c = nn.Conv2d(16, 8, 1, bias=False)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.relu(self.a(x))
        inner = self.c(torch.relu(self.b(kept)))
        return self.head((kept + inner).mean((2, 3)))


class Chain(Branch):
    """The same without the residual connection."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean((2, 3)))


class Joined(Branch):
    """Two branches that are joined: all of both is held while their channels are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left = self.a(x)
        return self.head(torch.cat([left, self.b(left)], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "dense", "slim"),
    [
        (Branch, 100 * (8 + 16 + 8), 100 * (4 + 12 + 4)),  # while c works: kept, what it reads, what it makes
        (Chain, 100 * (8 + 16), 100 * (12 + 8)),  # b's input and output; slim: c's, whose output stays dense
        (Joined, 100 * 2 * (8 + 16), 100 * 2 * (4 + 12)),
    ],
)
def test_activations_by_hand(network: type[Branch], dense: int, slim: int) -> None:
    space = PruningSpace(network().eval(), torch.zeros(1, 3, 10, 10))
    names = [group.name for group in space.groups]
    widths = space.widths({name: {"a": 4, "b": 12}.get(name, 8) for name in names})
    assert list(space.activations(np.stack([space.dense_widths, widths]))) == [dense, slim]
    (memory,) = resolve([parse_budget("memory", "50%")], space)
    assert memory.dense == 4 * (dense + space.params(space.dense_widths))
    assert memory.predict(widths)[0] == 4 * (slim + space.params(widths))


class Held(TorchDispatchMode):
    """Counts the elements of tensors that exist, from their making to their end."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.now, self.peak = own, 0, 0
        self._known: set[int] = set()

    def _ended(self, key: int, elements: int) -> None:
        self.now -= elements
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                if (key := memory._cdata) not in self._known | self.own:
                    elements = memory.nbytes() // 4
                    self._known.add(key)
                    self.now += elements
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(memory, self._ended, key, elements)
        return out


def held(network: nn.Module, inputs: Tensor) -> int:
    """Elements of activations that a pass holds at most, run as a runtime would: batch-norm folded away, values
    dropped after their last use, what works element by element written in place."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            if hasattr(child, "inplace"):
                child.inplace = True
    graph = fx.symbolic_trace(network)
    seen: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        last = bool(node.all_input_nodes) and node.all_input_nodes[0] not in seen
        seen.update(node.all_input_nodes)
        if node.target in (functional.relu, torch.relu) and last:
            node.target, node.kwargs = torch.relu_, {}
        elif node.target in (operator.add, torch.add) and last:
            node.target = operator.iadd
    graph.recompile()
    own = {t.untyped_storage()._cdata for t in [*graph.parameters(), *graph.buffers(), inputs]}
    with torch.no_grad(), Held(own) as counted:
        fx.Interpreter(graph).run(inputs)
    return counted.peak


@pytest.mark.parametrize(("name", "size"), [("cifar_resnet20", 32), ("mobilenet_v2", 64)])
def test_what_a_pass_holds(name: str, size: int) -> None:
    inputs = torch.zeros(1, 3, size, size)
    space = PruningSpace(create_model(name, 10, "none", (3, size, size)), inputs)
    generator, ranking = np.random.default_rng(1), space.rank("l1")
    for widths in (space.dense_widths, space.random_widths(generator), space.random_widths(generator)):
        slim = space.apply(space.plan(widths, importance=ranking))
        assert space.activations(widths) == held(slim, inputs)
