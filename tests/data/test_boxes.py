"""Pictures with boxes in COCO's format, and generated ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import CompressorError
from compressor.data import load_data
from compressor.data.preprocessing import Preprocessing, Wanted
from compressor.data.scenes import augmented
from compressor.data.splits import DataBundle

CATEGORIES = [{"id": 7, "name": "car"}, {"id": 3, "name": "cat"}]


def coco(folder: Path, *boxes: dict[str, Any], **changes: Any) -> Path:
    """Four pictures to train on and one to test on, all of 40x20 pixels; `boxes` are those of the last."""
    (folder / "annotations").mkdir()
    for part, count in (("train2017", 4), ("val2017", 1)):
        (folder / part).mkdir()
        for number in range(count):
            Image.fromarray(np.full((20, 40, 3), 90, dtype=np.uint8)).save(folder / part / f"{number}.jpg")
        content = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 20} for n in range(count)],
            "annotations": [
                {"id": n, "image_id": 0, "category_id": 3, "bbox": [4, 2, 20, 10], **each}
                for n, each in enumerate(boxes if count == 1 else ({},))
            ],
            "categories": CATEGORIES,
            **(changes if count == 1 else {}),
        }
        (folder / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    return folder


def loaded(folder: Path) -> DataBundle:
    wanted = Wanted(usual=Preprocessing(resize="squash", crop_share=1.0), image_size=40)
    return load_data(f"coco:{folder}", seed=0, wanted=wanted, task="detection")


def test_boxes_are_scaled_with_their_picture(tmp_path: Path) -> None:
    data = loaded(coco(tmp_path, {}, {"category_id": 7, "bbox": [30, 10, 20, 30]}, {"iscrowd": 1}))
    assert (data.classes, len(data.train), len(data.search)) == (("cat", "car"), 3, 1)
    images, targets = next(iter(data.test.batches(1)))
    assert images.shape == (1, 3, 40, 40)
    assert targets[0].tolist() == [[4, 4, 24, 24, 1], [30, 20, 40, 40, 2]]  # the second is cut off at the edge
    assert {len(each) for each in next(iter(data.train.batches(4)))[1]} <= {0, 1}


@pytest.mark.parametrize(
    ("boxes", "changes", "message"),
    [
        ({"bbox": [4, 2, 0, 10]}, {}, r"annotation 0 has an empty box: \[4, 2, 0, 10\] in 40x20"),
        ({"bbox": [50, 2, 9, 9]}, {}, "has an empty box"),
        ({"category_id": 9}, {}, "unknown category 9"),
        ({"image_id": 5}, {}, "an entry that is not COCO's"),
        ({}, {"categories": CATEGORIES[:1]}, "other categories than"),
        ({}, {"images": 3}, "needs lists of images, annotations, categories"),
        ({}, {"images": [{"id": 0, "file_name": "0.jpg", "width": 9, "height": 9}]}, "40x20 pixels; .* says 9x9"),
        ({}, {"images": [{"id": 0, "file_name": "x.jpg", "width": 40, "height": 20}]}, "names x.jpg, which"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, boxes: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressorError, match=message):
        loaded(coco(tmp_path, boxes, **changes))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match=r"holds 0 files instances_train\*.json, expected one"):
        loaded(tmp_path)


def test_shapes_have_the_boxes_of_their_masks() -> None:
    boxes, masks = (load_data("shapes:20", seed=0, task=task) for task in ("detection", "segmentation"))
    assert boxes.classes == ("circle", "square", "triangle")
    for found, mask in zip(next(iter(boxes.test.batches(4)))[1], next(iter(masks.test.batches(4)))[1], strict=True):
        for left, top, right, bottom, kind in found.int().tolist():
            assert (mask[top:bottom, left:right] == kind).float().mean() > 0.4
            assert (mask[top, left:right] == kind).any()
            assert (mask[top:bottom, right - 1] == kind).any()
        assert set(found[:, 4].int().tolist()) == set(mask.unique().tolist()) - {0}


def test_a_box_moves_with_its_picture() -> None:
    box = torch.tensor([[4.0, 8.0, 16.0, 20.0, 2.0]])
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 8:20, 4:16] = 200
    moved = [augmented(image, box, seed) for seed in range(8)]
    for changed, found in moved:
        if len(found):
            left, top, right, bottom, kind = found[0].round().int().tolist()
            assert kind == 2
            assert (changed[0, top:bottom, left:right] > 100).float().mean() > 0.8
    assert len({tuple(found.flatten().tolist()) for _, found in moved}) > 4
