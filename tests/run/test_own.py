"""The whole job with a network, batches and functions of the caller's own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import CompressorError, RunResult
from compressor.run.own_checks import one_input
from export.convert.batches import parse_batch

FAST: dict[str, Any] = {
    "params": "60%", "agent": "uniform", "search": {"max_evaluations": 2}, "export": {"engine": False},
    "contract": {"repeats": 1, "seconds": 5.0},
}  # fmt: skip


class Own(nn.Module):
    """A classifier of gray pictures of 8 x 8 pixels."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Squashed(Own):
    """The same tensors, and another network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def pictures(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in which one of four quarters is bright, and which."""
    random = torch.Generator().manual_seed(seed)
    x, y = torch.rand(number, 1, 8, 8, generator=random), torch.arange(number) % 4
    for place in range(4):
        x[y == place, :, :, 2 * place : 2 * place + 2] += 1.0 + 0.5 * place
    return x, y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    network, (x, y) = Own(), pictures(256)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def batches() -> list[dict[str, torch.Tensor]]:
    x, y = pictures(128)
    return [{"picture": x[i : i + 32], "class": y[i : i + 32]} for i in range(0, 128, 32)]


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["picture"]), batch["class"])


def share(seed: int) -> Any:
    x, y = pictures(200, seed)
    return lambda model: (model(x).argmax(1) == y).float().mean()


@pytest.fixture(scope="module")
def finished_own(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, dict[str, Any]]:
    before = copy.deepcopy(trained.state_dict())
    result = compressor.compress(
        trained, torch.zeros(2, 1, 8, 8), train=batches(), loss=loss, evaluate=share(1), test=share(2), epochs=2,
        out=tmp_path_factory.mktemp("own") / "run", **FAST,
    )  # fmt: skip
    return result, before


def test_own_objects_take_the_whole_road(finished_own: Any, trained: nn.Module) -> None:
    result, before = finished_own
    assert result.exit_code == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    found = result.manifest["accuracy"]
    assert (found["metric"], found["dense"]) == ("score", pytest.approx(float(share(2)(trained))))
    assert found["finetuned"] == pytest.approx(float(share(2)(result.model)))
    assert found["exported"] == pytest.approx(found["finetuned"], abs=0.011)  # scored through ONNX Runtime
    assert not result.model.training
    sizes = [sum(each.numel() for each in network.parameters()) for network in (result.model, trained)]
    assert sizes[0] <= 0.6 * sizes[1]
    assert result.onnx.is_file()
    known = json.loads((result.directory / "preprocess.json").read_text())
    assert known["inputs"] == [{"name": "input", "shape": [1, 1, 8, 8], "type": "float32"}]
    assert "mean" not in known  # the program that made the inputs knows it
    assert not any((result.directory / name).exists() for name in ("labels.txt", "infer.py"))
    with pytest.raises(CompressorError, match="code that is named in a file is not imported"):
        compressor.load(result.directory)
    again = compressor.load(result.directory, factory=Own)(pictures(3)[0])
    torch.testing.assert_close(again, result.model(pictures(3)[0]))


def test_the_page_speaks_of_a_score(finished_own: Any) -> None:
    page = (finished_own[0].directory / "report.html").read_text(encoding="utf-8")
    assert "Score" in page
    assert "data and network given in Python" in page
    for word in ("ccuracy", "compress --recipe", "predicted class"):
        assert word not in page


def test_an_own_run_is_not_continued_by_the_command(finished_own: Any) -> None:
    from compressor.run.pipeline import resume

    with pytest.raises(CompressorError, match="objects of the Python program") as caught:
        resume(finished_own[0].directory)
    assert "resume=True" in caught.value.hint


def test_the_command_exports_what_needs_no_data(
    finished_own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor.run.boards import export_bundle
    from compressor.run.exports import Request, export_format

    name = f"{Own.__module__}:Own"
    run, said = Path(shutil.copytree(finished_own[0].directory, tmp_path / "run")), list[str]()
    monkeypatch.setattr("compressor.run.exports.say", said.append)
    for request in (Request(batch=parse_batch("4")), Request(opset=13), Request(format="pt2")):
        assert any("largest difference" in line for line in export_format(run, request))
    exports = json.loads((run / "manifest.json").read_text())["exports"]
    assert exports["batch4"]["parity"]["max_abs"] < 1e-4
    assert exports["batch4"]["accuracy"] is None
    assert all(line.startswith("The data of the Python program that started this run is not here: ") for line in said)
    lines = " ".join(export_bundle(run, "jetson-nano", tmp_path / "nano.tar.gz"))  # in another opset, both networks
    assert "fp16 is left out: Files in another precision" in lines
    assert "dense.opset13, model.opset13" in lines
    with pytest.raises(CompressorError, match="is in the Python program that started it") as caught:
        list(export_format(run, Request(precision="int8")))
    assert "export={'precisions': ['int8']}" in caught.value.hint
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "other"))  # another user
    with pytest.raises(CompressorError, match=f"'{name}', Python code that was not run") as caught:
        list(export_format(run, Request(format="pt2")))
    assert f"--factory {name}" in caught.value.hint
    assert list(export_format(run, Request(format="pt2", factory=name)))


def test_a_network_without_a_name_needs_a_factory(finished_own: Any, tmp_path: Path) -> None:
    from compressor.run.exports import Request, export_format

    run = Path(shutil.copytree(finished_own[0].directory, tmp_path / "run"))
    channels = json.loads((run / "channels.json").read_text())
    channels["factory"]["factory"] = None  # as of a class in the script itself
    (run / "channels.json").write_text(json.dumps(channels))
    with pytest.raises(CompressorError, match="no file names what builds it") as caught:
        list(export_format(run, Request(format="pt2")))
    assert "--factory module:function" in caught.value.hint
    assert list(export_format(run, Request(format="pt2", factory=f"{Own.__module__}:Own")))


def test_another_network_with_the_same_tensors_is_not_exported(finished_own: Any, tmp_path: Path) -> None:
    from compressor.run.exports import Request, export_format

    run = Path(shutil.copytree(finished_own[0].directory, tmp_path / "run"))
    request = Request(batch=parse_batch("4"), factory=f"{Own.__module__}:Squashed")
    with pytest.raises(CompressorError, match=r"not that of .*model\.onnx: its output for 2 inputs is off") as caught:
        list(export_format(run, request))
    assert "--factory module:function" in caught.value.hint
    assert not (run / "model.batch4.onnx").exists()


def test_a_stopped_run_continues_with_the_same_objects(
    finished_own: Any, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "train": batches(), "loss": loss, "evaluate": share(1), "test": share(2), "epochs": 2,
        "out": tmp_path / "run", "resume": True, **FAST,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline.export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(trained, torch.zeros(2, 1, 8, 8), **options)
    with pytest.raises(CompressorError, match="weights is given:"):
        compressor.compress(Own(), torch.zeros(2, 1, 8, 8), **options)
    result = compressor.compress(trained, torch.zeros(2, 1, 8, 8), **options)
    assert result.manifest["accuracy"] == finished_own[0].manifest["accuracy"]
    assert result.manifest["files"]["model.safetensors"] == finished_own[0].manifest["files"]["model.safetensors"]


@pytest.mark.parametrize("epochs", [0, 1])
def test_without_labels_networks_agree_with_the_dense_one(trained: nn.Module, tmp_path: Path, epochs: int) -> None:
    x, _ = pictures(200)
    result = compressor.compress(
        trained, x[:1], calibration=[x[:100], x[100:]], epochs=epochs, out=tmp_path / "run", **FAST
    )
    found = result.manifest["accuracy"]
    assert found["metric"] == "agreement with the dense network"
    assert (found["dense"], found["images"]) == (1.0, 40)
    same = result.model(pictures(400, 5)[0]).argmax(1) == trained(pictures(400, 5)[0]).argmax(1)
    assert found["finetuned"] > 0.6
    assert abs(float(same.float().mean()) - found["finetuned"]) < 0.2
    assert len(result.manifest["training"]) == epochs
    page = (result.directory / "report.html").read_text(encoding="utf-8")
    assert "Agreement with the dense network" in page
    assert "ccuracy" not in page


def test_a_score_may_have_any_scale(trained: nn.Module, tmp_path: Path) -> None:
    x, y = pictures(100)

    def minus_loss(model: nn.Module) -> float:
        return -float(nn.functional.cross_entropy(model(x), y).detach())

    result = compressor.compress(trained, x[:1], evaluate=minus_loss, out=tmp_path / "run", **FAST)
    found = result.manifest["accuracy"]
    assert found["share"] is False
    assert found["finetuned"] == pytest.approx(minus_loss(result.model))
    candidates = result.manifest["search"]["candidates"]
    assert all(0 <= each["accuracy"] < 0.5 for each in candidates)  # below the dense network's half
    assert any("no test function" in note for note in result.manifest["notes"])


class Once:
    """Batches that are gone after the first time."""

    def __init__(self) -> None:
        self._left: Iterator[Any] = iter(batches())

    def __iter__(self) -> Iterator[Any]:
        return self._left


X = pictures(8)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing says how good a network is"),
        ({"evaluate": share(1), "epochs": 2}, "epochs is 2, and there is nothing to train on"),
        ({"evaluate": share(1), "loss": loss}, "loss is given without train"),
        ({"evaluate": lambda _: float("nan")}, "evaluate returns nan for the dense network"),
        ({"evaluate": lambda _: "good"}, "evaluate returned str, expected a number"),
        ({"evaluate": lambda model: model.nothing}, "evaluate raises AttributeError: .*nothing"),
        ({"evaluate": 0.9}, "evaluate is a float, expected a function"),
        ({"test": lambda _: None, "calibration": [X]}, "test returned NoneType"),
        ({"calibration": (X for _ in range(2))}, "calibration can be read only once: it is a generator"),
        ({"train": Once(), "loss": loss, "evaluate": share(1)}, "train has no batches"),
        ({"calibration": []}, "calibration has no batches"),
        ({"calibration": [torch.zeros(4, 3, 8, 8)]}, r"does not fit the network: .*\[4, 3, 8, 8\].*\[1, 1, 8, 8\]"),
        (
            {"calibration": X},
            r"calibration is one tensor of shape \[8, 1, 8, 8\], expected batches.*calibration=\[inputs\]",
        ),
        ({"calibration": [X, torch.zeros(4, 1, 9, 9)]}, "calibration: The batches' inputs cannot be put together"),
        ({"calibration": [X[:1]]}, "calibration holds 1 input; at least 3"),
        ({"train": [X], "evaluate": share(1)}, r"cross-entropy of a batch of \(inputs, labels\) raises"),
        ({"train": batches(), "loss": lambda m, b: m(b["picture"]), "evaluate": share(1)}, r"shape \[32, 4\]"),
        ({"train": batches(), "loss": lambda m, b: torch.zeros(()), "evaluate": share(1)}, "has no gradient"),
        ({"train": batches(), "loss": lambda m, b: loss(m, b) * float("inf"), "evaluate": share(1)}, "is inf"),
        ({"evaluate": share(1), "model": "resnet50"}, "multiple values|model is no field"),
        ({"evaluate": share(1), "data": "digits"}, "data is no field"),
        ({"evaluate": share(1), "weights": "none"}, "Untrained weights need batches"),
        ({"evaluate": share(1), "resume": True, "out": None}, "needs its folder"),
        ({"evaluate": share(1), "serch": {}}, "unknown field 'serch'"),
        ({"evaluate": share(1), "search": {"workers": 2}}, "not sent to other processes"),
        ({"evaluate": share(1), "pruning": {"importance": "taylor"}}, "taylor, which needs labels"),
        ({"calibration": [X], "training": {"distill_weight": 0}}, "distill_weight trains with labels"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused(
    trained: nn.Module, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    example = torch.zeros(1, 1, 8, 8)
    with pytest.raises((CompressorError, TypeError), match=message):
        compressor.compress(trained, example, **{"params": "60%", "out": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


def test_what_is_no_network_or_no_input_is_refused() -> None:
    for model, example, message in (
        ("resnet50", X, "model is a str"),
        (Own(), "x", "must contain a tensor"),
        (Own(), torch.zeros(1, 3, 8, 8), "does not run on the example input"),
        (Own(), {"y": X}, "does not run on the example input"),
    ):
        with pytest.raises(CompressorError, match=message):
            compressor.compress(model, example, evaluate=share(1))  # type: ignore[arg-type]


def test_a_compiled_network_is_unwrapped() -> None:
    with pytest.raises(CompressorError, match="evaluate returns nan for the dense network"):  # it has run
        compressor.compress(torch.compile(Own()), X, evaluate=lambda _: float("nan"))  # type: ignore[arg-type]


def test_hooks_that_are_not_copied_are_named(trained: nn.Module, tmp_path: Path) -> None:
    hooked = copy.deepcopy(trained)
    hooked.get_submodule("head").register_forward_hook(lambda *_: None)
    result = compressor.compress(hooked, X, evaluate=share(1), out=tmp_path / "run", **FAST)
    assert any("Forward hooks are not copied" in note and "head" in note for note in result.manifest["notes"])


def test_examples_become_arguments_for_one_input() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, c: int = 0) -> None: ...

    a, b = torch.zeros(4, 3), torch.ones(4, 2)
    arguments, names = one_input(Two(), {"b": b, "a": a})
    assert names == ("a", "b")
    assert [tuple(each.shape) for each in arguments] == [(1, 3), (1, 2)]
    (only,), names = one_input(Two(), {"left": a})
    assert names is None
    assert only["left"].shape == (1, 3)
    with pytest.raises(CompressorError, match="names b, but not a"):
        one_input(Two(), {"b": b})


def test_the_recipe_of_an_own_run(finished_own: Any) -> None:
    manifest = json.loads((finished_own[0].directory / "manifest.json").read_text())
    assert (manifest["model"], manifest["data"]) == ("python:Own", "python")
    assert manifest["weights"].startswith("given:")


@pytest.mark.parametrize("functions", [{}, {"train": batches(), "loss": loss, "evaluate": share(1)}])
def test_int8_is_calibrated_and_judged_by_the_same_task(
    trained: nn.Module, tmp_path: Path, functions: dict[str, Any]
) -> None:
    options: dict[str, Any] = {
        **FAST, "device": "jetson-orin-nano-8gb", "precision": "int8", "pruning": {"granularity": 1},
        **(functions or {"calibration": [pictures(128)[0]]}),
    }  # fmt: skip
    result = compressor.compress(trained, X, epochs=0, out=tmp_path / "run", **options)
    (entry,) = result.manifest["exports"].values()
    assert entry["accuracy"] > 0.8
    assert (tmp_path / "run" / entry["file"]).name == "model.int8.onnx"
