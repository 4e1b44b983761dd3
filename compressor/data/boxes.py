"""Pictures with boxes in COCO's format: PATH/annotations/instances_train.json and the pictures in PATH/train/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.data.masks import picture_size
from compressor.data.preprocessing import Preprocessing, Wanted
from compressor.data.scenes import SceneFile, bundle_of
from compressor.data.splits import DataBundle, Loading
from export.files import open_regular

_LAYOUT = (
    "Expected PATH/annotations/instances_train.json and instances_val.json (or test), also as train2017, with the "
    "pictures in the folders PATH/train and PATH/val of the same names."
)


@dataclass(frozen=True)
class BoxedFile(SceneFile):
    """A picture on disk with its boxes.

    Attributes:
        size: Its (width, height) in pixels.
        boxes: Left, top, right and bottom edge in its pixels, and the number of the class, from 1 on.
    """

    size: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float, int], ...]

    @property
    def label(self) -> object:
        return self.size, self.boxes

    def target(self, preprocessing: Preprocessing) -> Tensor:
        high, wide = preprocessing.sides
        across, down = wide / self.size[0], high / self.size[1]
        scale = torch.tensor([across, down, across, down, 1.0])
        return torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 5) * scale


def load_coco(path: Path, name: str, wanted: Wanted, loading: Loading) -> DataBundle:
    """Load pictures with boxes; crowds are left out, and pictures without boxes are kept.

    Raises:
        CompressorError: The layout is another one, a picture is missing or has another size than the file says, or a
            box is empty or of an unknown category.
    """
    files = {
        part: sorted((path / "annotations").glob(f"instances_{part}*.json"))
        for part in ("train", "test", "val")
    }
    other = "test" if files["test"] else "val"
    for part in ("train", other):
        if len(files[part]) != 1:
            raise CompressorError(
                f"{path / 'annotations'} holds {len(files[part])} files instances_{part}*.json, expected one.",
                _LAYOUT,
            )
    (train_file,), (test_file,) = files["train"], files[other]
    train, test = (_content(file) for file in (train_file, test_file))
    names = _categories(train, train_file)
    if _categories(test, test_file) != names:
        raise CompressorError(
            f"{test_file} has other categories than {train_file}.",
            "Both need the same numbers with the same names.",
        )
    numbers = {key: place for place, key in enumerate(names, 1)}
    scenes = [
        _pictures(content, file, path, numbers) for content, file in ((train, train_file), (test, test_file))
    ]
    return bundle_of(
        name,
        tuple(names.values()),
        scenes[0],
        scenes[1],
        wanted.at(wanted.image_size or wanted.usual.image_size),
        loading,
        path=path,
    )


def _content(file: Path) -> dict[str, Any]:
    try:
        with open_regular(str(file)) as opened:
            found = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise CompressorError(f"{file} cannot be read: {error}.", _LAYOUT) from error
    parts = ("images", "annotations", "categories")
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in parts):
        raise CompressorError(f"{file} is not COCO's: it needs lists of {', '.join(parts)}.", _LAYOUT)
    return found


def _categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Return the names of the categories by number, in the order of the numbers."""
    try:
        found = {int(each["id"]): str(each["name"]) for each in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CompressorError(f"{file} has a category without id or name.", "Each needs both.") from error
    if not found:
        raise CompressorError(f"{file} has no categories.", "One is needed.")
    return dict(sorted(found.items()))


def _pictures(
    content: Mapping[str, Any], file: Path, path: Path, numbers: Mapping[int, int]
) -> list[BoxedFile]:
    folder = path / file.stem.removeprefix("instances_")
    try:
        places = {each["id"]: str(folder / Path(each["file_name"]).name) for each in content["images"]}
        stated = {each["id"]: (int(each["width"]), int(each["height"])) for each in content["images"]}
        boxes: dict[Any, list[tuple[float, float, float, float, int]]] = {key: [] for key in places}
        for each in content["annotations"]:
            if each.get("iscrowd"):
                continue
            if each["category_id"] not in numbers:
                raise CompressorError(
                    f"{file}: annotation {each['id']} has the unknown category {each['category_id']}.",
                    "Add the category, or remove the annotation.",
                )
            width, height = stated[each["image_id"]]
            left, top, across, down = (float(value) for value in each["bbox"])
            right, bottom = min(left + across, width), min(top + down, height)
            left, top = max(left, 0.0), max(top, 0.0)
            if not (right > left and bottom > top):
                raise CompressorError(
                    f"{file}: annotation {each['id']} has an empty box: {each['bbox']} in {width}x{height}.",
                    "A box is [left, top, width, height] in pixels, with an area inside the picture.",
                )
            boxes[each["image_id"]].append((left, top, right, bottom, numbers[each["category_id"]]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CompressorError(
            f"{file} has an entry that is not COCO's: {type(error).__name__}: {error}.",
            "Pictures need id, file_name, width and height; annotations id, image_id, category_id and bbox.",
        ) from error
    for key, place in places.items():
        if not Path(place).is_file():
            raise CompressorError(f"{file} names {Path(place).name}, which {folder} does not hold.", _LAYOUT)
        if (size := picture_size(place)) != stated[key]:
            raise CompressorError(
                f"{place} has {size[0]}x{size[1]} pixels; {file.name} says {stated[key][0]}x{stated[key][1]}.",
                "Correct width and height, and the boxes if they are for another size.",
            )
    return [BoxedFile(place, stated[key], tuple(boxes[key])) for key, place in places.items()]
