"""Says what photographs show: python infer.py PHOTO...; of a folder with one for each class, how many it recognizes.

It needs numpy, Pillow, onnxruntime and the files beside it; for an engine (--model FILE.engine) TensorRT instead.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def prepared(path: Path, how: Any) -> Any:
    """Return a photograph as the network's input, float32 (1, channels, height, width); `how` is preprocess.json."""
    (high, wide), (rows, columns), order = how["resize_to"], how["crop"], how["channel_order"]
    with path.open("rb") as opened, Image.open(opened) as file:  # by name, a mapped TIFF would lose its orientation
        file.draft("RGB", (2 * max(high, wide), 2 * max(high, wide)))  # a large JPEG decodes to a part of its size
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # 16 bits, or floats from 0 to 1
        values = np.asarray(image) * (256 if image.mode == "F" else 1 / 256)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    white = Image.new("RGBA", image.size, "white")  # behind transparent pixels
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if order == "grey" else "RGB")
    w, h = wide, high
    if how["resize"] != "squash":  # the smallest size of the photograph's shape that covers it
        by_height = high * image.width >= wide * image.height
        side, own = (high, image.height) if by_height else (wide, image.width)
        w, h = ((int if high == wide else round)(side * each / own) for each in image.size)
    left, top = round((w - columns) / 2), round((h - rows) / 2)
    image = image.resize((w, h), getattr(Image, how["interpolation"].upper()))
    image = image.crop((left, top, left + columns, top + rows))
    pixels = np.asarray(image, np.float32).reshape(rows, columns, -1)[..., :: -1 if order == "bgr" else 1]
    mean, std = (np.array(how[name], np.float32) * np.float32(255 / how["range"]) for name in ("mean", "std"))
    return ((pixels - mean) / std).transpose(2, 0, 1)[None]


def network(path: str, how: Any) -> Any:
    """Return the network of a file as a function: input -> scores of the classes."""
    if path.endswith(".engine"):
        from infer_tensorrt import network as of_engine  # type: ignore[import-not-found]

        return of_engine(path, how)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    batch = given.shape[0] if isinstance(given.shape[0], int) else 1
    return lambda image: session.run(None, {given.name: np.repeat(image, batch, 0)})[0][0]


def photographs(path: Path, labels: Any) -> Any:
    """Return the photographs in the folders of the classes, each with its class; without a class a single one."""
    if not path.is_dir():
        return [(path, None)]
    files = [(each, label) for label, name in enumerate(labels) for each in (path / name).rglob("[!.]*")]
    found = [(each, label) for each, label in files if each.suffix.lower() in SUFFIXES]
    return found or sys.exit(f"{path} has no photographs in folders that are named as the lines of labels.txt.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+", metavar="PHOTO", type=Path, help="or a folder that has one for each class")
    how = json.loads((HERE / "preprocess.json").read_text("utf-8"))
    bundled = HERE.glob("models/model*.onnx")  # the shortest name is that of the FP32 file
    own = min(bundled, key=lambda each: len(each.name), default=HERE / how.get("file", "model.onnx"))
    parser.add_argument("--model", metavar="FILE", default=str(own), help="ONNX, or .engine")
    options = parser.parse_args()
    if not Path(options.model).is_file():
        parser.error(f"{options.model} does not exist; name a file with --model")
    labels = (HERE / "labels.txt").read_text("utf-8").split("\n")[:-1]
    scores_of, right = network(options.model, how), []
    for photo, label in [each for path in options.paths for each in photographs(path, labels)]:
        try:
            image = prepared(photo, how)
        except Exception as error:  # a damaged file may raise anything; in a folder it does not count
            print(f"{photo} cannot be read: {error}", file=sys.stderr)
            if label is None:
                sys.exit(1)
            continue
        scores = scores_of(image).astype(np.float64)
        best = scores.argmax()
        if label is None:
            sure = scores[best] if how.get("scores") == "probabilities" else 1 / np.exp(scores - scores[best]).sum()
            print(f"{photo}: {labels[best]} {sure:.1%}")
        else:
            right.append(int(best == label))
    if right:
        print(f"accuracy: {sum(right) / len(right)} ({sum(right)} of {len(right)} photographs)")


if __name__ == "__main__":
    main()
