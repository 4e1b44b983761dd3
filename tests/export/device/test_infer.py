"""The program beside a network: its pictures are the toolkit's to the last bit, and an engine gets and gives them."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compressor.data import Preprocessing
from compressor.data.images import decode
from export.device import infer, infer_tensorrt

NOISE = np.random.default_rng(0)


def _noise(*shape: int, most: int = 256) -> Any:
    return NOISE.integers(0, most, shape)


def _pictures(folder: Path) -> list[Path]:
    """Write pictures of every kind that folders hold."""
    grey = Image.fromarray(_noise(61, 47).astype(np.uint8))
    colour = Image.fromarray(_noise(45, 83, 3).astype(np.uint8))
    turned = Image.Exif()
    turned[274] = 6
    palette = colour.quantize(16)
    ink = colour.convert("CMYK")
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.png": (grey, {}),
        "colour.png": (colour, {}),
        "turned.jpg": (colour, {"exif": turned}),
        "turned.tif": (colour, {"exif": turned}),
        "turneddeep.tif": (Image.fromarray(_noise(50, 40, most=65536).astype(np.uint16)), {"exif": turned}),
        "ink.jpg": (ink, {}),
        "large.jpg": (colour.resize((900, 640)), {}),
        "glass.png": (Image.fromarray(_noise(40, 40, 4).astype(np.uint8)), {}),
        "greyglass.png": (Image.fromarray(_noise(40, 52, 2).astype(np.uint8)), {}),
        "palette.gif": (palette, {}),
        "clearpalette.png": (palette, {"transparency": 3}),
        "deep.png": (Image.fromarray(_noise(50, 40, most=65536).astype(np.uint16)), {}),
        "bits.png": (grey.convert("1"), {}),
        "floats.tif": (Image.fromarray(NOISE.random((33, 44), dtype=np.float32)), {}),
        "small.png": (colour.resize((9, 17)), {}),
        "narrow.png": (colour.resize((45, 90)), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return [folder / name for name in made]


WAYS = [
    Preprocessing(size=32),
    Preprocessing(size=29, crop_share=0.9, interpolation="bicubic", channel_order="bgr", range=255,
                  mean=(103.5, 116.3, 123.7), std=(57.4, 57.1, 58.4)),
    Preprocessing(size=24, width=40, interpolation="lanczos"),
    Preprocessing(size=24, width=40, crop_share=1.0, resize="squash", interpolation="nearest"),
    Preprocessing(size=20, width=15),  # of 45 x 90 pixels: 15 / 45 * 90 is 30, 22.5 / 45 * 90 none
    Preprocessing(size=28, mean=(0.45,), std=(0.22,), channel_order="grey"),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.channel_order}-{way.interpolation}-{way.image_size}")
def test_a_picture_becomes_the_toolkits_input(way: Preprocessing, tmp_path: Path) -> None:
    how = {**way.to_dict(), "resize_to": way.covered, "crop": way.sides}
    for path in _pictures(tmp_path):
        image = decode(str(path), way)
        assert image is not None
        wanted = way.normalised(image[None]).numpy()
        found = infer.prepared(path, how)
        assert found.dtype == np.float32
        assert np.array_equal(found, wanted), path.name


@pytest.mark.parametrize(
    ("files", "how", "chosen"),
    [
        (["model.onnx", "model.int8.onnx"], {}, "model.onnx"),
        (["model.onnx", "model.int8.onnx"], {"file": "model.int8.onnx"}, "model.int8.onnx"),
        (["models/model.fp16.onnx", "models/dense.onnx", "models/model.onnx"], {}, "models/model.onnx"),
        (["models/model.fp16.opset13.onnx", "models/model.opset13.onnx"], {}, "models/model.opset13.onnx"),
    ],
)
def test_without_a_model_the_file_of_the_run_or_the_fp32_file_of_the_bundle_is_used(
    files: list[str],
    how: Any,
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "preprocess.json").write_text(json.dumps(how))
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    used = []

    def network(path: str, how: Any) -> Any:
        used.append(path)
        return lambda image: np.array([0.0, 100.0], np.float32)

    monkeypatch.setattr(infer, "HERE", tmp_path)
    monkeypatch.setattr(infer, "network", network)
    monkeypatch.setattr(infer, "prepared", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["infer.py", "a.jpg"])
    infer.main()
    assert used == [str(tmp_path / chosen)]
    assert capsys.readouterr().out == "a.jpg: dog 100.0%\n"


class _Cuda:
    """The driver's calls with this process's memory for that of the GPU."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        for name in ("cuInit", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxSynchronize"):
            setattr(self, name, lambda *_: 0)

    def cuMemAlloc_v2(self, place: Any, size: Any) -> int:
        self.held.append(ctypes.create_string_buffer(size.value))
        place._obj.value = ctypes.addressof(self.held[-1])
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to, source, size.value)
        return 0

    cuMemcpyDtoH_v2 = cuMemcpyHtoD_v2


class _Context:
    """An engine's context: the output is the sum of each channel. `old` is that of TensorRT 8.4, by number."""

    def __init__(self, old: bool) -> None:
        self.addresses: dict[str, int] = {}
        if not old:
            self.set_tensor_address = self.addresses.__setitem__

    def execute_async_v3(self, stream: int) -> bool:
        given = np.ctypeslib.as_array((ctypes.c_float * 12).from_address(self.addresses["x"])).reshape(1, 3, 2, 2)
        (ctypes.c_float * 3).from_address(self.addresses["y"])[:] = given.sum((0, 2, 3)).tolist()
        return True

    def execute_v2(self, addresses: list[int]) -> bool:
        self.addresses = {"y": addresses[0], "x": addresses[1]}
        return self.execute_async_v3(0)


@pytest.mark.parametrize(("old", "batch"), [(False, 1), (True, 1), (False, 4)])
def test_an_engine_gets_and_gives_its_tensors(
    old: bool, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            assert level == self.ERROR

    def loaded(content: bytes) -> Any:
        if content != b"an engine":
            return None
        return SimpleNamespace(
            create_execution_context=lambda: _Context(old), get_binding_index={"x": 1, "y": 0}.__getitem__
        )

    runtime = SimpleNamespace(deserialize_cuda_engine=loaded)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(Logger=Logger, Runtime=lambda _: runtime))
    cuda = _Cuda()
    monkeypatch.setattr(infer_tensorrt, "CDLL", lambda _: cuda)
    (tmp_path / "model.engine").write_bytes(b"an engine")
    how = {"inputs": [{"name": "x", "shape": [batch, 3, 2, 2]}], "outputs": [{"name": "y", "shape": [batch, 3]}]}
    network = infer_tensorrt.network(str(tmp_path / "model.engine"), how)
    for start in (0, 100):
        image = np.arange(start, start + 12, dtype=np.float32).reshape(1, 3, 2, 2)
        assert network(image).tolist() == [4 * start + 6, 4 * start + 22, 4 * start + 38]
    (tmp_path / "other.engine").write_bytes(b"of another GPU")
    with pytest.raises(SystemExit, match="built for another GPU"):
        infer_tensorrt.network(str(tmp_path / "other.engine"), how)
