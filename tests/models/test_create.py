"""Models by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.core.errors import CompressorError
from compressor.data import load_data
from compressor.models import build_from_factory, create_model, factory_of, model_factory
from compressor.models.sizes import interpolated


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Parameters in the last column: table 6 of the ResNet paper for CIFAR, the libraries' own pages for the
# rest, each with the head of 1,000 classes replaced by one of 10 where it has one.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet32", 464_154),
        ("cifar_resnet44", 658_586),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet110", 1_727_962),
        ("cifar_mobilenet_v2", 3_504_872 - 990 * 1281),
        ("cifar_vgg16_bn", 14_723_136 + 10 * 513),  # its features' own, and a linear layer
        ("resnet18", 11_689_512 - 990 * 513),
        ("squeezenet1_1", 1_235_496 - 990 * 513),
    ],
)
def test_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    assert count(create_model(name, 10)) == parameters


def test_cifar_resnet_by_hand() -> None:
    """Identity kernels make the network's path computable: the shortcut subsamples and pads with zeros."""
    model = create_model("cifar_resnet20", 10).eval()
    block = model.get_submodule("layer2.0")
    nn.init.zeros_(block.get_parameter("bn2.weight"))  # only the shortcut is left
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert out.shape == (1, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_cifar_mobilenet_keeps_a_4x4_map() -> None:
    model = create_model("cifar_mobilenet_v2", 10).eval()
    features = model.get_submodule("features")
    assert features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


@pytest.mark.parametrize(("name", "accuracy"), [("20", 0.8827), ("56", 0.8987)])
def test_given_checkpoints_reach_their_accuracy(
    name: str, accuracy: float, shared_data: Path, cifar_jpegs: Path
) -> None:
    """On 2,000 of the 10,000 test images, within three standard errors (0.7 %)."""
    from compressor.training.scoring import accuracy as measure

    weights = shared_data / f"resnet{name}_cifar10jpeg.pt"
    model = create_model(f"cifar_resnet{name}", 10, weights)
    data = load_data(f"folder:{cifar_jpegs}", seed=0)
    assert measure(model, data.test) == pytest.approx(accuracy, abs=0.022)


def test_same_seed_same_weights() -> None:
    torch.manual_seed(3)
    one = create_model("cifar_resnet20", 10).state_dict()
    torch.manual_seed(3)
    other = create_model("cifar_resnet20", 10).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "resnet18", "timm:mobilenetv1_100", "googlenet", "inception_v3"]
)
def test_factory_rebuilds_the_architecture(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    shape = (3, 96, 96) if name in ("googlenet", "inception_v3") else (3, 32, 32)
    model = create_model(name, 7, input_shape=shape).eval()
    spec = model_factory(name, 7)
    assert factory_of(model) == spec == {"factory": name, "kwargs": {"num_classes": 7}}
    with torch.device("meta"):
        again = build_from_factory(spec)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert next(again.parameters()).is_meta
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("size", [(32, 48), (224, 224)])
def test_a_vision_transformer_is_built_for_the_size_of_the_images(size: tuple[int, int]) -> None:
    pytest.importorskip("timm")
    name = "timm:deit_tiny_patch16_224"
    model = create_model(name, 7, input_shape=(3, *size)).eval()
    spec = factory_of(model)
    assert spec is not None
    assert spec["kwargs"] == {"num_classes": 7, **({"image_size": [32, 48]} if size == (32, 48) else {})}
    assert model.get_parameter("pos_embed").shape == (1, 1 + size[0] * size[1] // 256, 192)
    with torch.device("meta"):
        again = build_from_factory(spec)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert model(torch.zeros(2, 3, *size)).shape == (2, 7)


def test_torchvisions_transformers_are_built_for_square_images() -> None:
    from torchvision.models import VisionTransformer

    spec = model_factory("vit_b_16", 7, image_size=(32, 32))
    assert spec["kwargs"]["image_size"] == [32, 32]
    with torch.device("meta"):
        assert build_from_factory(spec).get_parameter("encoder.pos_embedding").shape == (1, 5, 768)
    for size, words in (((32, 48), "square"), ((40, 40), r"built for images of 40x40: AssertionError: .*indivisible")):
        with pytest.raises(CompressorError, match=words):
            create_model("vit_b_16", 7, input_shape=(3, *size))
    with pytest.raises(CompressorError, match="height and width"):
        build_from_factory({"factory": "vit_b_16", "kwargs": {"num_classes": 7, "image_size": 32}})
    published, wanted = (VisionTransformer(size, 16, 1, 1, 8, 8) for size in (64, 32))
    state = interpolated(wanted, published.state_dict())
    assert state["encoder.pos_embedding"].shape == (1, 5, 8)
    wanted.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnt50", ["resnt50", "resnet50"]),
        ("ResNet-50", ["resnet50"]),
        ("cifar_resnet50", ["cifar_resnet56"]),
        ("mobilenetv3_small", ["mobilenet_v3_small"]),
        ("no_such_package:net", ["no_such_package", "package.module:factory"]),
        ("torch.nn:Lineal", ["Lineal", "Linear"]),
        ("torch.nn:Module", ["without a forward"]),
        (".:x", ["package.module:factory"]),
        ("torch nn:x", ["package.module:factory"]),
        ("fcos_resnet50_fpn", ["a detection network"]),
        ("fcn_resnet50", ["a segmentation network"]),
        ("r3d_18", ["video clips"]),
        ("quantized_resnet50", ["quantised operators", "resnet50"]),
        ("raft_small", ["optical flow"]),
        ("torch.nn:Linear", ["in_features"]),
        ("os:abort", ["expected a function"]),
        ("torch.nn:ReLU", ["should give (1, classes)", "map for each class"]),
        ("os:getcwdb", ["expected a function"]),
    ],
)
def test_unknown_names(name: str, words: list[str]) -> None:
    with pytest.raises(CompressorError) as caught:
        create_model(name, 10)
    for word in words:
        assert word in str(caught.value)


def test_unknown_timm_name() -> None:
    pytest.importorskip("timm")
    with pytest.raises(CompressorError, match="timm:mobilenetv1_100"):
        create_model("timm:mobilenet_v1_100", 10)


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CompressorError, match="pip install") as caught:
        create_model("timm:mobilenetv1_100", 10)
    assert "compressor[timm]" in caught.value.hint


def test_too_small_images() -> None:
    with pytest.raises(CompressorError, match="cannot take images of 3x32x32"):
        create_model("inception_v3", 10)


def test_user_factory_with_and_without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def fixed():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))\n"
        "def free(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, num_classes))\n"
        "def nothing():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("fixed", "free"):
        model = create_model(f"my_networks:{name}", 6)
        assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 6)
    assert said == ["my_networks:fixed has 1000 outputs: its last layer 2 is replaced by one of 6."]
    with pytest.raises(CompressorError, match=r"returned an object of type int, expected a torch\.nn\.Module"):
        create_model("my_networks:nothing", 6)


def test_default_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import urllib.request
    from urllib.error import URLError

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(CompressorError, match=r"cannot be fetched.*no network") as caught:
        create_model("resnet18", 10, "default")
    assert "--weights none" in caught.value.hint
    with pytest.raises(CompressorError, match="no default weights"):
        create_model("cifar_resnet20", 10, "default")


def test_default_weights_and_their_heads(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    published = mobilenet_v3_small(weights=None).state_dict()
    kind = MobileNet_V3_Small_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda self, *args, **kwargs: published)
    model = create_model("mobilenet_v3_small", 10, "default")
    assert torch.equal(model.get_parameter("features.0.0.weight"), published["features.0.0.weight"])
    assert model.get_parameter("classifier.3.weight").shape == (10, 1024)
    assert len(said) == 1
    assert "1000 classes" in said[0]
    assert "transform_input" in model_factory("googlenet", 10, "default")["kwargs"]


def test_torchvision_resnets_start_as_their_shortcuts() -> None:
    model = create_model("resnet18", 10)
    assert not model.get_parameter("layer3.1.bn2.weight").any()
    assert model.get_parameter("layer3.1.bn1.weight").all()
