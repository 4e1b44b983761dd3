"""Layer rules for operations of the user's: what stays dense without them is pruned with them, and rightly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor import register_rule
from compressor.budgets.function import FunctionCaller
from compressor.core import plugins
from compressor.core.errors import CompressorError
from compressor.pruning import registry
from compressor.pruning.blueprint import blueprint
from compressor.pruning.facts import Call
from compressor.pruning.space import PruningSpace
from compressor.pruning.trace import Tracer
from tests.architecture import code_of, installed
from tests.pruning.networks import assert_is_dense_with_zeros, filled

NETWORK = '''
"""A network with an operation of its own, and a cost of networks."""

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function


@torch.library.custom_op("mylib::scale_channels", mutates_args=())
def scale_channels(images: Tensor, factors: Tensor) -> Tensor:
    return images * factors.reshape(-1, 1, 1)


@scale_channels.register_fake
def _(images: Tensor, factors: Tensor) -> Tensor:
    return torch.empty_like(images)


@torch.library.custom_op("mylib::slow_scale", mutates_args=())  # not on the meta device
def slow_scale(images: Tensor, factors: Tensor) -> Tensor:
    return images * factors.reshape(-1, 1, 1)


def mul(images: Tensor, factors: Tensor) -> Tensor:
    """Called like an operation of torch, with other arguments."""
    if has_torch_function((images, factors)):
        return handle_torch_function(mul, (images, factors), images, factors)
    return images * factors.reshape(-1, 1, 1)


class Scaled(nn.Module):
    def __init__(self, scale=torch.ops.mylib.scale_channels) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.factors = nn.Parameter(torch.ones(12))
        self.second = nn.Conv2d(12, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(self.first(x).relu(), self.factors)
        return self.head(self.second(x).relu().mean((2, 3)))


def network(num_classes: int = 5) -> nn.Module:
    return Scaled()


def channels(plan) -> int:
    return sum(plan.widths.values())
'''


@pytest.fixture(autouse=True)
def registered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_known", {})
    plugins.load_plugins.cache_clear()
    yield
    plugins.load_plugins.cache_clear()
    sys.modules.pop("myrules", None)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The module `mynets`; an operator of torch.library is registered once in a process."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "mynets.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    yield import_module("mynets")
    sys.path.remove(str(folder))


@pytest.fixture
def example() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def scale_rule(tracer: Tracer, call: Call) -> None:
    axes = list(tracer.axes(call.args[0]))
    axes[1] = tracer.merge(axes[1], tracer.axes(call.args[1])[0])
    tracer.mark(call.out, axes, tracer.active(call.args[0]))


def assert_dense_for(space: PruningSpace, operation: str) -> str:
    """Why the first convolution is left dense."""
    assert [group.name for group in space.groups] == ["second"]
    (reason,) = [part.reason for part in space.skipped if part.name == "first"]
    assert f"the operation '{operation}' is not known to keep channels apart" in reason
    return reason


def assert_pruned_rightly(space: PruningSpace, example: Tensor) -> None:
    assert [(group.name, group.width) for group in space.groups] == [("first", 12), ("second", 8)]
    plan = space.plan([5, 3], "random", seed=1)
    small = space.apply(plan)
    assert small.factors.shape == (5,)
    assert_is_dense_with_zeros(small, space, plan, example, rtol=1e-5, atol=1e-6)


def test_the_page_makes_a_rule(
    nets: object, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled(nets.Scaled())  # type: ignore[attr-defined]
    assert_dense_for(PruningSpace(model, example), "mylib::scale_channels")
    (tmp_path / "myrules.py").write_text(code_of("Add a layer rule"))
    monkeypatch.syspath_prepend(tmp_path)
    import_module("myrules")
    assert_pruned_rightly(PruningSpace(model, example), example)


def test_an_installed_package_brings_a_rule(
    nets: object, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, "mypackage", "myrules", code_of("Add a layer rule"))
    monkeypatch.syspath_prepend(tmp_path)
    assert_pruned_rightly(PruningSpace(filled(nets.Scaled()), example), example)  # type: ignore[attr-defined]


def test_an_overload_and_an_operator_without_meta(nets: object, example: Tensor) -> None:
    for operator, name in (
        (torch.ops.mylib.scale_channels.default, "mylib::scale_channels"),
        (torch.ops.mylib.slow_scale, "mylib::slow_scale"),
    ):
        model = filled(nets.Scaled(operator))  # type: ignore[attr-defined]
        assert_dense_for(PruningSpace(model, example), name)
        register_rule(operator)(scale_rule)
        assert_pruned_rightly(PruningSpace(model, example), example)


def test_a_function_that_goes_through_the_function_protocol(nets: object, example: Tensor) -> None:
    mul: Callable[..., Tensor] = nets.mul  # type: ignore[attr-defined]
    model = filled(nets.Scaled(mul))  # type: ignore[attr-defined]
    assert_dense_for(PruningSpace(model, example), "mynets.mul")  # torch's `mul` is another
    register_rule(mul)(scale_rule)
    assert_pruned_rightly(PruningSpace(model, example), example)


def test_sizes_that_a_rule_gets_wrong_leave_its_channels_dense(nets: object, example: Tensor) -> None:
    @register_rule("mylib::scale_channels")
    def wrong(tracer: Tracer, call: Call) -> None:
        """It says that the result keeps its size."""
        tracer.mark(call.out, [None] * 4, True)

    space = PruningSpace(filled(nets.Scaled()), example)  # type: ignore[attr-defined]
    assert [group.name for group in space.groups] == ["second"]


def short_mark(tracer: Tracer, call: Call) -> None:
    axes = list(tracer.axes(call.args[0]))
    axes[1] = axes[1][:5]  # type: ignore[index]
    tracer.mark(call.out, axes, True)


def three_axes(tracer: Tracer, call: Call) -> None:
    tracer.mark(call.out, tracer.axes(call.args[0])[:3], True)


def short_merge(tracer: Tracer, call: Call) -> None:
    axis = tracer.axes(call.args[0])[1]
    tracer.merge(axis, axis[:5])  # type: ignore[index]


def wrong_key(tracer: Tracer, call: Call) -> None:
    call.kwargs["scale"]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (short_mark, "ValueError: mark needs a label for each of the 12 channels of the result's axis 1, and got 5"),
        (three_axes, "ValueError: mark needs an entry for each of the result's 4 axes"),
        (short_merge, "ValueError: merge needs two axes of one size, and got labels of 12 and 5 channels"),
        (wrong_key, "KeyError: 'scale'"),
    ],
)
def test_an_error_in_a_rule_names_the_rule(
    nets: object, example: Tensor, rule: Callable[[Tracer, Call], None], says: str
) -> None:
    register_rule("mylib::scale_channels")(rule)
    with pytest.raises(CompressorError) as caught:
        PruningSpace(filled(nets.Scaled()), example)  # type: ignore[attr-defined]
    last = max(line for *_, line in rule.__code__.co_lines() if line)
    where = f"The rule of 'mylib::scale_channels' ({__name__}, line {last}) raised "
    assert caught.value.message.startswith(where + says)


def test_a_rule_that_marks_nothing_is_the_reason(nets: object, example: Tensor) -> None:
    register_rule("mylib::scale_channels")(lambda tracer, call: None)
    space = PruningSpace(filled(nets.Scaled()), example)  # type: ignore[attr-defined]
    (reason,) = [part.reason for part in space.skipped if part.name == "first"]
    assert "'mylib::scale_channels': its rule did not mark the result" in reason


def test_other_processes_have_the_rules(
    nets: object, example: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "myrules.py").write_text(code_of("Add a layer rule"))
    monkeypatch.syspath_prepend(tmp_path)
    import_module("myrules")
    space = PruningSpace(filled(nets.network()), example)  # type: ignore[attr-defined]
    caller = FunctionCaller("mynets:channels", space)
    try:
        assert caller.value((5, 3)) == 8
    finally:
        caller.close()
    scale = registry._RULES["mylib::scale_channels"]
    monkeypatch.setattr(scale, "__module__", "__main__")
    with pytest.raises(CompressorError, match="registered in the script that runs"):
        blueprint(space)


def test_what_cannot_be_registered() -> None:
    register_rule("mylib::other")(scale_rule)
    register_rule("mylib::other")(scale_rule)  # the same once more, as after a reload

    def again(tracer: Tracer, call: Call) -> None: ...

    with pytest.raises(CompressorError, match=r"'mylib::other' of the rule \S+again has the rule \S+scale_rule\."):
        register_rule("mylib::other")(again)
    with pytest.raises(CompressorError, match=r"'relu' .*again has the rule compressor\.\S+:elementwise\."):
        register_rule(torch.relu)(again)
    with pytest.raises(CompressorError, match="has no name"):
        register_rule(nn.ReLU())(again)
