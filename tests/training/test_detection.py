"""mAP by hand, the detector's own loss, and boxes from raw outputs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from compressor.data import load_data
from compressor.models import create_model
from compressor.models.detectors import Boxes, RawDetector, WithBoxes
from compressor.training.detection import Detection, mean_ap
from compressor.training.settings import TrainSettings
from export.convert.detections import compare_found
from export.convert.module import OnnxModule
from export.convert.to_onnx import export_onnx
from tests.nets import detector

TARGETS = [
    {"boxes": torch.tensor([[2.0, 2.0, 14.0, 14.0], [16.0, 10.0, 30.0, 28.0]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def test_mean_ap_by_hand() -> None:
    # the overlap is 0.82: enough at 7 of the 10 thresholds, 0.50 to 0.80, and the only box is found there
    metric = mean_ap()
    metric.update(
        [{"boxes": torch.tensor([[0.0, 0.0, 8.2, 10.0]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}],
        [{"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])}],
    )
    assert float(metric.compute()["map"]) == pytest.approx(0.7)


def plain(number: int) -> nn.Module:
    """torchvision's own detector, which scales and normalizes nothing here."""
    torch.manual_seed(number)
    model = detector()
    model.transform = GeneralizedRCNNTransform(32, 32, [0.0] * 3, [1.0] * 3, size_divisible=1, fixed_size=(32, 32))
    return model


@pytest.mark.parametrize("training", [True, False])
def test_losses_and_boxes_are_torchvisions_own(training: bool) -> None:
    images = torch.rand(2, 3, 32, 32)
    theirs, mine = plain(0), RawDetector(plain(0))
    theirs.train(training)
    mine.train(training)
    boxes = Boxes(mine, images[:1])
    if training:
        expected = torch.stack(list(theirs(list(images), TARGETS).values())).sum()
        found = boxes.loss(mine(images), images, TARGETS)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        found.backward()
        assert all(parameter.grad is not None for parameter in mine.parameters())
        return
    with torch.no_grad():
        for one, other in zip(theirs(list(images)), boxes.found(mine(images), images), strict=True):
            assert all(torch.allclose(one[name], other[name]) for name in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fcos_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_torchvisions_detectors_have_a_loss_and_a_score(name: str) -> None:
    data = load_data("shapes:20", seed=0, image_size=64, task="detection")
    model = create_model(name, 4, "none", (3, 64, 64), task="detection")
    task = Detection(data, model)  # type: ignore[arg-type]
    batch = next(iter(data.train.batches(2)))
    losses = task.losses(model, batch, None, TrainSettings(), nullcontext)
    assert losses.loss is not None
    assert losses.loss > 0
    assert 0 <= task.score(model, data.search, "cpu") <= 1


def test_distillation_compares_the_raw_outputs() -> None:
    data = load_data("shapes:20", seed=0, image_size=32, task="detection")
    model, other = RawDetector(plain(0)), RawDetector(plain(1))
    task = Detection(data, model)
    batch = next(iter(data.train.batches(2)))
    same, differs = (task.losses(model, batch, each, TrainSettings(), nullcontext).distilled for each in (model, other))
    model.eval()
    assert differs is not None
    assert same is not None
    assert differs > same


def test_weights_for_other_classes_start_fresh_in_the_class_head_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    given = detector(num_classes=7)
    torch.save(given.state_dict(), path)
    said: list[str] = []
    model = create_model("tests.nets:detector", 4, path, (3, 32, 32), said.append, "detection")
    state = model.state_dict()
    assert torch.equal(state["detector.backbone.first.0.weight"], given.state_dict()["backbone.first.0.weight"])
    assert state["detector.head.classification_head.module_list.0.weight"].shape[0] == 4 * 4
    assert len(said) == 1
    assert "are for other classes: head.classification_head" in said[0]


class Stem(nn.Sequential):
    """Features of a quarter of the input's size, for detectors that take one level."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 32, 5, 4, 2), nn.ReLU())


@pytest.mark.parametrize(("kind", "ratios"), [(RetinaNet, (0.5, 1.0)), (FCOS, (1.0,))])
def test_post_processing_survives_the_export(kind: Any, ratios: tuple[float, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    anchors = AnchorGenerator(((8,),), (ratios,))
    raw = RawDetector(kind(Stem(), 4, anchor_generator=anchors, score_thresh=1e-3))
    for module in raw.modules():  # torchvision's first weights give all boxes nearly the same score
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    network = WithBoxes(raw, torch.zeros(1, 3, 32, 32))
    images = torch.rand(3, 3, 32, 32).split(1)
    export_onnx(network, images[0], tmp_path / "a.onnx", compare=False, open_outputs="boxes")
    file = OnnxModule(tmp_path / "a.onnx", network.eval(), (images[0],))
    with torch.no_grad():
        pairs = [(network(image), file(image)) for image in images]
    assert all(len(found["scores"]) for found, _ in pairs)
    assert compare_found(*zip(*pairs, strict=True), "a.onnx", side=32).max_abs < 1e-4
