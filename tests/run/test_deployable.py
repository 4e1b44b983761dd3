"""A run's files for use elsewhere: a program without torch reproduces the reported accuracy, and `compress predict`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
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
from export.convert.ort import open_session, run_session
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


def test_the_files_say_how_a_picture_becomes_an_answer(finished: Path, photos: Path) -> None:
    assert (finished / "labels.txt").read_text() == "digit 0\ndigit 1\ndigit 2\ndigit 3\n"
    how, manifest = json.loads((finished / "preprocess.json").read_text()), manifest_of(finished)
    assert how["inputs"] == [{"name": "input", "shape": [2, 3, 16, 16], "type": "float32"}]
    assert how["outputs"] == [{"name": "output", "shape": [2, 4], "type": "float32"}]
    assert (how["task"], how["resize_to"], how["crop"]) == ("classification", [20, 20], [16, 16])
    assert (how["interpolation"], how["channel_order"], how["range"]) == ("bicubic", "bgr", 1)
    assert how["mean"] == manifest["preprocessing"]["mean"]
    assert how["scored"]["value"] == manifest["accuracy"]["exported"]
    assert how["scores"] == "logits"
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


def test_a_network_that_ends_in_a_softmax_gives_its_own_probabilities(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = recipe(
        model="tests.nets:sure", data=f"folder:{photos}", budgets={"flops": "70%"}, agent="uniform", epochs=2,
        training={"batch_size": 16}, search={"max_evaluations": 2, "batch_norm_batches": 2},
    )  # fmt: skip
    assert run_recipe(wanted, run).exit_code == 0
    how = json.loads((run / "preprocess.json").read_text())
    assert how["scores"] == "probabilities"
    photo = sorted((photos / "test").rglob("*.png"))[0]
    preprocessing = Preprocessing.from_record(manifest_of(run)["preprocessing"])[0]
    image = decode(str(photo), preprocessing)
    assert image is not None
    inputs = preprocessing.normalised(image[None]).numpy()
    expected = run_session(open_session(run / "model.onnx"), {"input": inputs})[0][0].max()
    assert bare(run / "infer.py", photo).endswith(f" {expected:.1%}\n")
    (answer,) = json.loads(predicted(run, photo, "--json", "--top", 1))[0]["answers"]
    assert answer["share"] == pytest.approx(float(expected), abs=1e-4)


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
