"""A run's files for use elsewhere: a program without torch reproduces the reported accuracy, and `compress predict`."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from compressor import load, run_recipe
from compressor.cli.app import app
from compressor.core.files import sha256_file
from compressor.data import Preprocessing, load_data
from compressor.data.images import decode
from export.convert.ort import onnx_outputs
from export.device import infer_tensorrt
from export.device.infer import prepared
from tests.runs import manifest_of, recipe

BARE = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "onnx", "timm", "compressor", "export", "scipy"):
            raise ModuleNotFoundError("not in a bare environment: " + name)

sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of four classes as photographs of many sizes, colors and formats; one of the test's is damaged."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    digits: Any = load_data("digits", seed=0)
    for part, split in (("train", digits.train), ("test", digits.test)):
        for place, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            if label > 3 or place > 400:
                continue
            wide, high = draw.integers(20, 90, 2).tolist()
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((wide, high))
            name = (f"{place}.png", f"{place}.jpg", f"{place}.webp")[place % 3]
            where = folder / part / f"digit {label}" / name
            where.parent.mkdir(parents=True, exist_ok=True)
            picture.convert("LA" if place % 6 == 0 else "RGB").save(where)
    (folder / "test" / "digit 1" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return folder


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed") / "run"
    wanted = recipe(
        data={"source": f"folder:{photos}", "crop_share": 0.8, "interpolation": "bicubic", "channel_order": "bgr"},
        budgets={"flops": "70%"}, agent="uniform", epochs=6, batch=2, training={"batch_size": 16},
        search={"max_evaluations": 2, "batch_norm_batches": 2},
    )  # fmt: skip
    assert run_recipe(wanted, folder).exit_code == 0
    return folder


def bare(program: Path, *arguments: object) -> str:
    """What a program prints that finds numpy, Pillow and onnxruntime, but neither torch nor the toolkit."""
    command = [sys.executable, "-c", BARE, str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_reproduces_the_accuracy_to_the_digit(finished: Path, photos: Path, tmp_path: Path) -> None:
    accuracy = manifest_of(finished)["accuracy"]
    assert 0.4 < accuracy["exported"] < 1
    for name in ("infer.py", "labels.txt", "preprocess.json", "model.onnx"):
        shutil.copy(finished / name, tmp_path)
    count = accuracy["exported_images"]
    right = round(accuracy["exported"] * count)
    said = bare(tmp_path / "infer.py", photos / "test")
    assert said == f"accuracy: {accuracy['exported']} ({right} of {count} photographs)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: PHOTO"),
        (["--model", "none.onnx", "a.jpg"], "none.onnx does not exist; name a file with --model"),
        (["no/such.jpg"], "no/such.jpg cannot be read: "),
        (["/etc"], "/etc has no photographs in folders that are named as the lines of labels.txt"),
    ],
)
def test_the_program_says_what_is_wrong(finished: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, str(finished / "infer.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def picture(mode: str, wide: int, high: int) -> Image.Image:
    """A picture of random pixels in a mode of Pillow's."""
    draw = np.random.default_rng(wide * high)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 65536, (high, wide)).astype(np.uint16))
    coarse = Image.fromarray(draw.integers(0, 256, (high // 4, wide // 4, 4), dtype=np.uint8), "RGBA")
    return coarse.resize((wide, high)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "size", "how"),
    [
        ("RGB", "jpg", (613, 401), {"size": 32}),  # a JPEG that is decoded to a part of its size
        ("RGB", "png", (101, 67), {"size": 24, "width": 40, "crop_share": 0.9}),
        ("RGB", "png", (67, 101), {"size": 40, "width": 24, "channel_order": "bgr", "interpolation": "lanczos"}),
        ("RGB", "png", (45, 90), {"size": 20, "width": 15}),  # 15 / 45 * 90 is 30, 22.5 / 45 * 90 none
        ("RGBA", "png", (70, 90), {"size": 24, "resize": "squash", "range": 255, "interpolation": "nearest"}),
        ("LA", "png", (33, 90), {"size": 24, "crop_share": 1.0}),
        ("P", "gif", (64, 90), {"size": 24}),
        ("I;16", "png", (50, 40), {"size": 24, "channel_order": "grey", "mean": (0.5,), "std": (0.25,)}),
        ("RGB", "webp", (24, 24), {"size": 24, "channel_order": "grey", "mean": (0.5,), "std": (0.25,)}),
    ],
)
def test_the_program_prepares_a_picture_as_the_run_does(
    tmp_path: Path, mode: str, suffix: str, size: tuple[int, int], how: dict[str, Any]
) -> None:
    path, preprocessing = tmp_path / f"picture.{suffix}", Preprocessing(**how)
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright
    picture(mode, *size).save(path, **({} if suffix == "gif" else {"exif": turned}))
    written = {
        **preprocessing.to_dict(), "resize_to": preprocessing.covered, "crop": preprocessing.sides
    }  # fmt: skip
    expected = decode(str(path), preprocessing)
    assert expected is not None
    np.testing.assert_array_equal(prepared(path, written), preprocessing.normalised(expected[None]).numpy())


class Memory:
    """A stand-in for the CUDA driver whose memory is the host's; it counts the calls."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.cuInit = self.cuDevicePrimaryCtxRetain = self.cuCtxSetCurrent = self.cuCtxSynchronize = lambda *_: 0

    def cuMemAlloc_v2(self, place: Any, size: Any) -> int:
        self.held.append(ctypes.create_string_buffer(size.value))
        place._obj.value = ctypes.addressof(self.held[-1])
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, given: Any, size: Any) -> int:
        ctypes.memmove(to, given, size.value)
        return 0

    cuMemcpyDtoH_v2 = cuMemcpyHtoD_v2


@pytest.mark.parametrize("named", [True, False], ids=["8.5", "8.2"])
def test_the_program_runs_an_engine(finished: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """TensorRT is a stand-in that computes with ONNX Runtime what is in the driver's memory."""
    memory = Memory()

    class Context:
        def computed(self, places: list[int]) -> bool:
            given = (ctypes.c_float * (2 * 3 * 16 * 16)).from_address(places[0])
            found = onnx_outputs(finished / "model.onnx", np.array(given, np.float32).reshape(2, 3, 16, 16))[0]
            ctypes.memmove(places[1], found.ctypes.data, found.nbytes)
            return True

        execute_v2 = computed

    class Named(Context):
        def __init__(self) -> None:
            self.places: dict[str, int] = {}

        def set_tensor_address(self, name: str, place: int) -> None:
            self.places[name] = place

        def execute_async_v3(self, _stream: int) -> bool:
            return self.computed([self.places["input"], self.places["output"]])

    engine = SimpleNamespace(
        create_execution_context=Named if named else Context, get_binding_index=["input", "output"].index
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: engine if content == b"engine" else None)
    logger = type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None})
    module = SimpleNamespace(Logger=logger, Runtime=lambda _logger: runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(infer_tensorrt, "CDLL", lambda _name: memory)
    path = finished / "own.engine"
    path.write_bytes(b"engine")
    how = json.loads((finished / "preprocess.json").read_text())
    scores_of = infer_tensorrt.network(str(path), how)
    for image in np.random.default_rng(0).standard_normal((3, 1, 3, 16, 16)).astype(np.float32):
        expected = onnx_outputs(finished / "model.onnx", np.repeat(image, 2, 0))[0]
        np.testing.assert_array_equal(scores_of(image), expected[0])
    path.write_bytes(b"of another machine")
    with pytest.raises(SystemExit, match="was built for another GPU or TensorRT: build it on this machine"):
        infer_tensorrt.network(str(path), how)
    path.unlink()


def test_the_files_say_how_a_picture_becomes_an_answer(finished: Path, photos: Path) -> None:
    assert (finished / "labels.txt").read_text() == "digit 0\ndigit 1\ndigit 2\ndigit 3\n"
    how, manifest = json.loads((finished / "preprocess.json").read_text()), manifest_of(finished)
    assert how["inputs"] == [{"name": "input", "shape": [2, 3, 16, 16], "type": "float32"}]
    assert how["outputs"] == [{"name": "output", "shape": [2, 4], "type": "float32"}]
    assert (how["task"], how["resize_to"], how["crop"]) == ("classification", [20, 20], [16, 16])
    assert (how["interpolation"], how["channel_order"], how["range"]) == ("bicubic", "bgr", 1)
    assert how["mean"] == manifest["preprocessing"]["mean"]
    assert how["scored"]["value"] == manifest["accuracy"]["exported"]
    assert how["scored"]["data"] == f"folder:{photos}"
    for name in ("infer.py", "infer_tensorrt.py", "labels.txt", "preprocess.json"):
        assert manifest["files"][name] == sha256_file(finished / name)


def predicted(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else " ".join(result.output.split())


def test_every_runtime_and_the_program_say_the_same(finished: Path, photos: Path) -> None:
    some = sorted((photos / "test").rglob("*.png"))[:5]
    lines = predicted(finished, *some, "--top", 1)
    assert lines == bare(finished / "infer.py", *some)
    found = json.loads(predicted(finished, *some, "--json", "--top", 4))
    model = load(finished, factory="tests.nets:tiny")
    assert [each["photo"] for each in found] == [str(path) for path in some]
    for each, other in zip(found, json.loads(predicted(finished, *some, "--json", "--runtime", "torch")), strict=True):
        assert sum(answer["share"] for answer in each["answers"]) == pytest.approx(1)
        assert other["answers"][0]["name"] == each["answers"][0]["name"]
        assert other["answers"][0]["share"] == pytest.approx(each["answers"][0]["share"], abs=1e-4)
    assert model.training is False


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--runtime", "caffe"], "Choose onnx, torch, engine"),
        (["--precision", "int8"], "The run has no model.int8.onnx. Write it with: compress export"),
        (["--precision", "fp8"], "--precision fp8 is not known. Choose fp32, fp16, int8, mixed."),
        (["--precision", "fp16", "--runtime", "torch"], "torch computes in fp32"),
        (["--runtime", "engine"], "The run has no model.engine. Write it with: compress export"),
        (["/no/such/photo.jpg"], "There is no photograph /no/such/photo.jpg"),
    ],
)
def test_what_cannot_be_predicted(finished: Path, photos: Path, options: list[str], expected: str) -> None:
    photo = next((photos / "test").rglob("*.png"))
    assert expected in predicted(finished, photo, *options, code=2)


def test_a_damaged_photograph_and_a_folder_that_is_no_run(finished: Path, photos: Path) -> None:
    damaged = photos / "test" / "digit 1" / "damaged.jpg"
    assert f"{damaged} cannot be read" in predicted(finished, damaged, code=2)
    assert "is not a run's folder" in predicted(photos, damaged, code=2)
