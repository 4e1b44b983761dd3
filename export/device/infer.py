"""Says what photographs show: python infer.py PHOTO..., or for the accuracy on DIR/CLASS/*.jpg: --folder DIR.

It needs numpy, Pillow, and onnxruntime or (for --model FILE.engine, built on this machine) TensorRT, and the files
model.onnx, labels.txt and preprocess.json beside it.
"""

import argparse
import json
import os
import sys
from typing import Any, Callable, Dict

import numpy as np
from PIL import Image, ImageOps

HERE = os.path.dirname(os.path.abspath(__file__))
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def prepared(path: str, how: Dict[str, Any]) -> Any:
    """Return a photograph as the network's input, float32 (1, channels, height, width)."""
    (high, wide), (rows, columns) = how["resize_to"], how["crop"]
    with Image.open(path) as file:
        file.draft("RGB", (2 * max(high, wide), 2 * max(high, wide)))  # a large JPEG decodes to a part of its size
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # 16 bits, or floats from 0 to 1
        values = np.asarray(image) * (256 if image.mode == "F" else 1 / 256)
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))  # behind transparent pixels
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    image = image.convert("L") if how["channel_order"] == "grey" else image
    if how["resize"] == "squash":
        size = wide, high
    elif high == wide:  # the short side is scaled
        size = int(high * image.width / min(image.size)), int(high * image.height / min(image.size))
    else:
        factor = max(high / image.height, wide / image.width)
        size = max(wide, round(factor * image.width)), max(high, round(factor * image.height))
    image = image.resize(size, getattr(Image, how["interpolation"].upper()))
    left, top = round((image.width - columns) / 2), round((image.height - rows) / 2)
    image = image.crop((left, top, left + columns, top + rows))
    pixels = np.asarray(image, dtype=np.float32).reshape(rows, columns, -1).transpose(2, 0, 1)
    scale, step = np.float32(255 / how["range"]), -1 if how["channel_order"] == "bgr" else 1
    mean, std = (np.array(how[name], dtype=np.float32).reshape(-1, 1, 1) * scale for name in ("mean", "std"))
    return np.ascontiguousarray((pixels[::step] - mean) / std)[None]


def onnx(path: str) -> Callable[[Any], Any]:
    """Return the network of an ONNX file: input -> scores of the classes."""
    import onnxruntime

    known = onnxruntime.get_available_providers()
    wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in known]
    session = onnxruntime.InferenceSession(path, providers=wanted)
    given = session.get_inputs()[0]
    batch = given.shape[0] if isinstance(given.shape[0], int) else 1
    return lambda image: session.run(None, {given.name: np.repeat(image, batch, 0)})[0][0]


def engine(path: str, how: Dict[str, Any]) -> Callable[[Any], Any]:
    """Return the network of a TensorRT engine: input -> scores of the classes. The CUDA driver gives its memory."""
    from ctypes import CDLL, byref, c_size_t, c_void_p

    import tensorrt

    cuda, context = CDLL("libcuda.so.1"), c_void_p()

    def call(name: str, *arguments: Any) -> None:
        if getattr(cuda, name)(*arguments):
            sys.exit(f"The CUDA driver refused {name}.")

    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", byref(context), 0)
    call("cuCtxSetCurrent", context)
    runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR))
    with open(path, "rb") as file:
        loaded = runtime.deserialize_cuda_engine(file.read())
    if loaded is None:
        sys.exit(f"{path} was built for another GPU or TensorRT: build it on this machine.")
    run = loaded.create_execution_context()
    places, order, named = [c_void_p(), c_void_p()], [0, 0], hasattr(run, "set_tensor_address")  # from 8.5 on
    for place, tensor in zip(places, (how["inputs"][0], how["outputs"][0])):
        call("cuMemAlloc_v2", byref(place), c_size_t(4 * int(np.prod(tensor["shape"]))))
        if named:
            run.set_tensor_address(tensor["name"], place.value)
        else:
            order[loaded.get_binding_index(tensor["name"])] = place.value or 0

    def scores(image: Any) -> Any:
        image = np.ascontiguousarray(np.repeat(image, how["inputs"][0]["shape"][0], 0))
        found = np.empty(how["outputs"][0]["shape"], dtype=np.float32)
        call("cuMemcpyHtoD_v2", places[0], c_void_p(image.ctypes.data), c_size_t(image.nbytes))
        if not (run.execute_async_v3(0) if named else run.execute_v2(order)):
            sys.exit(f"TensorRT cannot run {path}.")
        call("cuCtxSynchronize")
        call("cuMemcpyDtoH_v2", c_void_p(found.ctypes.data), places[1], c_size_t(found.nbytes))
        return found[0]

    return scores


def best(scores: Any, labels: Any, count: int = 3) -> str:
    """Return the likeliest classes with their probabilities."""
    shares = np.exp(scores.astype(np.float64) - scores.max())
    order = np.argsort(-shares, kind="stable")[:count]
    return ", ".join(f"{labels[place]} {percent(shares[place] / shares.sum())}" for place in order)


def percent(share: float) -> str:
    """Return a share in per cent; one that is too small for a decimal is never written as zero."""
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def accuracy(network: Callable[[Any], Any], folder: str, labels: Any, how: Dict[str, Any]) -> str:
    """Return the share of the photographs in FOLDER/CLASS for which the class has the highest score."""
    right = total = 0
    for label, name in enumerate(labels):
        for where, _, files in os.walk(os.path.join(folder, name)):
            for file in sorted(each for each in files if each[0] != "." and each.lower().endswith(SUFFIXES)):
                try:
                    image = prepared(os.path.join(where, file), how)
                except Exception as error:  # a damaged file may raise anything; it does not count
                    print(f"{os.path.join(where, file)} cannot be read: {error}", file=sys.stderr)
                    continue
                right, total = right + int(network(image).argmax() == label), total + 1
    if not total:
        sys.exit(f"{folder} has no photographs in folders that are named as the lines of labels.txt.")
    return f"accuracy: {right / total} ({right} of {total} photographs)"


def main() -> None:
    """Read the arguments and the files; print a line for each photograph, or the accuracy."""
    parser = argparse.ArgumentParser(description="Says what photographs show.")
    parser.add_argument("photos", nargs="*", metavar="PHOTO")
    parser.add_argument("--folder", metavar="DIR", help="print the accuracy on the photographs DIR/CLASS/*")
    parser.add_argument("--model", metavar="FILE", default=os.path.join(HERE, "model.onnx"), help="ONNX, or .engine")
    options = parser.parse_args()
    if not options.photos and not options.folder:
        parser.error("give photographs, or --folder DIR")
    if not os.path.isfile(options.model):
        parser.error(f"{options.model} does not exist; name a file with --model")
    with open(os.path.join(HERE, "preprocess.json"), encoding="utf-8") as file:
        how = json.load(file)
    with open(os.path.join(HERE, "labels.txt"), encoding="utf-8") as file:
        labels = file.read().split("\n")[:-1]
    network = engine(options.model, how) if options.model.endswith(".engine") else onnx(options.model)
    for photo in options.photos:
        try:
            image = prepared(photo, how)
        except Exception as error:  # a damaged file may raise anything
            sys.exit(f"{photo} cannot be read: {error}")
        print(f"{photo}: {best(network(image), labels)}")
    if options.folder:
        print(accuracy(network, options.folder, labels, how))


if __name__ == "__main__":
    main()
