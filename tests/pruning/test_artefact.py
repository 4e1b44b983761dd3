"""Saving and loading: what comes back, in other processes too, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.artefact import load, read_plan, save
from compressor.pruning.blueprint import blueprint
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from tests.pruning.networks import UNet, Zoo, filled, unset, zoo

ZOO = {"factory": "tests.pruning.networks:zoo", "kwargs": {"num_classes": 5}}


@pytest.fixture(scope="module")
def slim() -> tuple[nn.Module, ChannelPlan, Tensor]:
    torch.manual_seed(0)
    example = torch.randn(1, 3, 32, 32)
    space = PruningSpace(filled(Zoo()), example)
    plan = space.uniform(0.5)
    return space.apply(plan), plan, example


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=7)


def _created(name: str) -> nn.Module:
    from compressor.models import create_model

    return create_model(name, 10)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=6)


@pytest.mark.parametrize(
    ("build", "name", "size", "factory"),
    [
        (_torchvision, "resnet18", 32, "resnet18"),
        # With its auxiliary heads it is the class that builds it.
        (_torchvision, "googlenet", 64, "torchvision.models.googlenet:GoogLeNet"),
        (_torchvision, "swin_t", 64, "swin_t"),
        (_torchvision, "vit_b_32", 224, "vit_b_32"),
        (_timm, "vit_tiny_patch16_224", 224, "timm:vit_tiny_patch16_224"),
        (_timm, "convnext_atto", 64, "timm:convnext_atto"),
        (_timm, "coat_tiny", 224, "timm:coat_tiny"),  # uses a module under two paths
        (_created, "cifar_resnet20", 32, "cifar_resnet20"),
    ],
)
def test_round_trip_finds_the_factory(build: Any, name: str, size: int, factory: str, tmp_path: Path) -> None:
    model = build(name).eval()
    example = torch.randn(1, 3, size, size)
    space = PruningSpace(model, example)
    plan = space.uniform(0.4)
    small = space.apply(plan)
    save(small, plan, tmp_path, extra={"accuracy": 0.5})
    content = json.loads((tmp_path / "channels.json").read_text())
    assert content["factory"]["factory"] == factory
    assert content["extra"] == {"accuracy": 0.5}
    again = load(tmp_path)
    with torch.no_grad():  # the same weights need not lie alike in memory, and some products round by that
        torch.testing.assert_close(again(example), small(example), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in small.state_dict().items())
    assert read_plan(tmp_path) == plan
    assert not again.training
    # What was loaded can be saved again, and trained.
    save(again, plan, tmp_path / "again")
    again.train()
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in again.parameters())


def test_given_factory_types_and_copies(slim: tuple[nn.Module, ChannelPlan, Tensor], tmp_path: Path) -> None:
    small, plan, example = slim
    half = copy.deepcopy(small).half().to(memory_format=torch.channels_last)
    save(half, plan, tmp_path, factory=ZOO)
    again = load(tmp_path, factory=zoo)
    assert again.stem.weight.dtype == torch.float16
    assert again.shared.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(again.float()(example), half.float()(example))


def test_another_process_without_torch_pruning(
    slim: tuple[nn.Module, ChannelPlan, Tensor], tmp_path: Path
) -> None:
    small, plan, example = slim
    save(small, plan, tmp_path, factory=ZOO)
    torch.save(example, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['torch_pruning'] = None\n"
        "from compressor import load\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        f"print(load({str(tmp_path)!r}, factory='tests.pruning.networks:zoo')(x).tolist())\n"
        "assert 'compressor.pruning.space' not in sys.modules\n"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert out.returncode == 0, out.stderr
    torch.testing.assert_close(torch.tensor(json.loads(out.stdout)), small(example), rtol=1e-5, atol=1e-5)


def test_a_network_without_a_reference_is_loaded_by_its_function(tmp_path: Path) -> None:
    class Local(nn.Sequential):
        pass

    def build() -> nn.Module:
        return Local(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))

    example = torch.randn(1, 3, 8, 8)
    space = PruningSpace(build().eval(), example)
    plan = space.uniform(0.5)
    small = space.apply(plan)
    save(small, plan, tmp_path)
    with pytest.raises(CompressorError, match=r"Local, without a reference.*factory=build"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, factory=build)(example), small(example))


def test_loading_imports_nothing_that_a_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file names code of a module that would leave a mark when it is imported or called."""
    marker = tmp_path / "mark"
    (tmp_path / "trap.py").write_text(f"import os\nos.mkdir({str(marker)!r})\ndef net(num_classes=2):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space = PruningSpace(filled(Zoo()), torch.randn(1, 3, 32, 32))
    plan = space.uniform(0.5)
    save(space.apply(plan), plan, tmp_path / "run", factory=ZOO)
    named = ("trap:net", "torchvision.models.resnet:partial", "timm:hf-hub:a/b", "timm:local-dir:/tmp", "os:system")
    for name in named:
        _edited(tmp_path / "run", factory={"factory": name, "kwargs": {"num_classes": 5}})
        with pytest.raises(CompressorError, match=r"a file is not imported|has no model called"):
            load(tmp_path / "run")
    assert not marker.exists()
    assert load(tmp_path / "run", factory=zoo)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


class Gated(nn.Module):
    """Its classifier is a convolution that is built before the two Linears of its gate."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv, self.cls = nn.Conv2d(3, 16, 3), nn.Conv2d(16, num_classes, 1)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        gate = torch.sigmoid(self.up(self.down(x.mean((2, 3))).relu()))
        return self.cls(x * gate[:, :, None, None]).mean((2, 3))


def test_the_classes_are_those_of_the_output_and_not_of_the_last_weight(tmp_path: Path) -> None:
    example, reference = torch.randn(2, 3, 16, 16), f"{__name__}:Gated"
    space = PruningSpace(Gated(10).eval(), example[:1])
    plan = space.uniform(0.5)
    small = space.apply(plan)
    for given in (None, Gated, reference):
        save(small, plan, tmp_path, factory=given)
        content = json.loads((tmp_path / "channels.json").read_text())
        assert content["factory"] == {"factory": reference, "kwargs": {"num_classes": 10}}
        torch.testing.assert_close(load(tmp_path, factory=Gated)(example), small(example))


def test_save_refuses_what_apply_did_not_make(
    slim: tuple[nn.Module, ChannelPlan, Tensor], tmp_path: Path
) -> None:
    small, plan, _ = slim
    with pytest.raises(CompressorError, match=r"not created by PruningSpace\.apply"):
        save(Zoo(), plan, tmp_path, factory=ZOO)
    other = ChannelPlan({**plan.keep, "stem": (0,)})
    with pytest.raises(CompressorError, match="another plan"):
        save(small, other, tmp_path, factory=ZOO)
    with pytest.raises(CompressorError, match="builds another network"):
        save(small, plan, tmp_path, factory={**ZOO, "kwargs": {"num_classes": 6}})
    with pytest.raises(CompressorError, match="not JSON-serialisable"):
        save(small, plan, tmp_path / "new", factory=ZOO, extra={"x": object()})


class Curve(nn.Module):
    """What its arguments change beside its tensors: an activation, a factor, and a table that is no buffer."""

    def __init__(self, num_classes: int = 4, act: str = "relu", factor: float = 1.0, table: float = 0.5) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 16), nn.Linear(16, num_classes)
        self.act = {"relu": nn.ReLU(), "relu6": nn.ReLU6()}[act]
        self.factor, self.table = factor, torch.full((3,), table)
        self.ran: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.ran is None:
            self.ran = torch.arange(3.0)
        return self.head(self.act(self.hidden(x * self.table + self.ran))) * self.factor


def _curve(**arguments: Any) -> nn.Module:
    return Curve(4, **arguments)


def _dilated() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50(num_classes=7, replace_stride_with_dilation=[False, True, True])


def _other_activation() -> nn.Module:
    model = _torchvision("resnet18")
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, nn.ReLU):
                module._modules[name] = nn.SiLU()
    return model


def _other_epsilon() -> nn.Module:
    model = _torchvision("mobilenet_v2")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return model


def _timm_with(name: str, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=6, **arguments)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (_dilated, (3, 64, 64)),
        (_other_activation, (3, 32, 32)),
        (_other_epsilon, (3, 32, 32)),
        (partial(_timm_with, "resnet18", act_layer="silu"), (3, 32, 32)),
        (partial(_timm_with, "efficientnet_lite0", output_stride=16), (3, 64, 64)),
        (partial(_curve, act="relu6"), (3,)),
        (partial(_curve, factor=3.0), (3,)),
        (partial(_curve, table=0.7), (3,)),
    ],
)
def test_a_factory_of_another_network_with_the_same_tensors_is_not_recorded(
    build: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    example = torch.randn(1, *shape)
    space = PruningSpace(build().eval(), example)
    plan = space.uniform(0.5)
    small = space.apply(plan)
    save(small, plan, tmp_path)
    assert json.loads((tmp_path / "channels.json").read_text())["factory"]["factory"] is None
    with pytest.raises(CompressorError, match="without a reference to its factory"):
        load(tmp_path)
    torch.testing.assert_close(load(tmp_path, factory=build)(example), small(example), rtol=1e-4, atol=1e-5)
    with pytest.raises(CompressorError, match="no factory was found that builds the dense"):
        blueprint(space)


def test_a_given_factory_must_build_the_same_network(tmp_path: Path) -> None:
    example = torch.randn(1, 3)
    network = _curve(factor=3.0).eval()
    network(example)  # it now keeps a tensor that a new one does not have
    space = PruningSpace(network, example)
    plan = space.uniform(0.5)
    small = space.apply(plan)
    for factory in (Curve, partial(_curve, factor=3.0, act="relu6"), partial(_curve, factor=3.0, table=0.7)):
        with pytest.raises(CompressorError, match=r"builds another network: (it computes|a tensor of shape \[3\])"):
            save(small, plan, tmp_path, factory=factory)
    save(small, plan, tmp_path, factory=partial(_curve, factor=3.0))


def test_a_loaded_network_whose_modules_were_replaced_has_no_factory(tmp_path: Path) -> None:
    space = PruningSpace(_torchvision("resnet18").eval(), torch.randn(1, 3, 32, 32))
    plan = space.uniform(0.5)
    save(space.apply(plan), plan, tmp_path)
    again = load(tmp_path)
    again.relu = nn.SiLU()
    save(again, plan, tmp_path)
    with pytest.raises(CompressorError, match="without a reference to its factory"):
        load(tmp_path)


def _edited(folder: Path, **changes: Any) -> None:
    path = folder / "channels.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "is not a compressor-slim file"),
        ({"version": 99}, "version 99"),
        ({"weights": lambda w: {**w, "file": "../model.safetensors"}}, "outside its folder"),
        ({"weights": lambda w: {**w, "file": "/etc/passwd"}}, "outside its folder"),
        ({"weights": lambda w: {**w, "file": "none.safetensors"}}, "is missing"),
        ({"weights": lambda w: {**w, "sha256": "0" * 64}}, "does not match the checksum"),
        ({"plan": {"keep": {"stem": [0]}}}, "plan does not match its checksum"),
        ({"plan": 3}, "'plan' is missing or has a wrong type"),
        ({"tensors": lambda t: {**t, "stem.weight": [1, 3, 3, 3]}}, "Tensor 'stem.weight' has shape"),
        (
            {"tensors": lambda t: {k: v for k, v in t.items() if k != "stem.weight"}},
            "disagree about tensor 'stem.weight'",
        ),
        ({"factory": {"factory": "x:y", "kwargs": {"num_classes": "rm"}}}, "num_classes as an integer"),
        ({"factory": {"factory": "x:y", "kwargs": {"num_classes": 5}, "head": "gone"}}, "no linear"),
        ({"edits": [["stem", "out_channels", 10**6]]}, "sets 'stem.out_channels'"),
        ({"edits": [["stem", "__class__", 3]]}, "sets 'stem.__class__'"),
        ({"edits": [["gone", "out_channels", 3]]}, "network lacks"),
        ({"edits": [[["stem"], "out_channels", 3]]}, "network lacks"),
        ({"swaps": {"stem": "multi_head_attention"}}, "does not fit"),
    ],
)
def test_corrupt_and_foreign_files_are_refused(
    changes: dict[str, Any], words: str, slim: tuple[nn.Module, ChannelPlan, Tensor], tmp_path: Path
) -> None:
    small, plan, _ = slim
    save(small, plan, tmp_path, factory=ZOO)
    _edited(tmp_path, **changes)
    with pytest.raises(CompressorError, match=words):
        load(tmp_path, factory=zoo)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("tests.pruning.networks:nothing", "has no 'nothing'"),
        (UNet, "disagree about tensor"),
        (unset, "fails: KeyError: 'config'"),
        (len, "expected a function or a class"),
    ],
)
def test_factories_that_do_not_build_the_network(
    factory: Any, words: str, slim: tuple[nn.Module, ChannelPlan, Tensor], tmp_path: Path
) -> None:
    small, plan, _ = slim
    save(small, plan, tmp_path, factory=ZOO)
    with pytest.raises(CompressorError, match=words):
        load(tmp_path, factory=factory)


def test_broken_files_and_links_are_refused(
    slim: tuple[nn.Module, ChannelPlan, Tensor], tmp_path: Path
) -> None:
    small, plan, _ = slim
    with pytest.raises(CompressorError, match=r"contains no channels\.json"):
        load(tmp_path, factory=zoo)
    save(small, plan, tmp_path, factory=ZOO)
    weights = tmp_path / "model.safetensors"
    outside = tmp_path.parent / f"{tmp_path.name}.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    with pytest.raises(CompressorError, match="outside its folder"):
        load(tmp_path, factory=zoo)
    weights.unlink()
    weights.write_bytes(outside.read_bytes()[:-8])
    with pytest.raises(CompressorError, match="does not match the checksum"):
        load(tmp_path, factory=zoo)
    (tmp_path / "channels.json").write_text("{")
    with pytest.raises(CompressorError, match="is not readable as JSON"):
        load(tmp_path, factory=zoo)
