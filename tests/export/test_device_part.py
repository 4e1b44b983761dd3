"""The part that runs on a board: Python 3.8, no torch, no onnx; only numpy, and TensorRT where it is used."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import export
from export.convert.ort import onnx_outputs
from export.engine.trt import RTX
from tests.export.nets import matmul_chain, write_reference

FOLDER = Path(export.__file__).parent
WORKSTATION = {"module.py", "program.py", "rewrites.py", "to_onnx.py", "trees.py"}
"""Files that may need torch; all others must at least be imported on a board."""

DEVICE = sorted(path for path in FOLDER.rglob("*.py") if path.name not in WORKSTATION)
IDS = [path.relative_to(FOLDER).as_posix() for path in DEVICE]
NAMES = [".".join(["export", *Path(name).with_suffix("").parts]).replace(".__init__", "") for name in IDS]


OLDEST = ("device/infer.py", "device/infer_tensorrt.py")
"""They run on Python 3.6 as well, which cannot import `annotations` from `__future__`."""


@pytest.mark.parametrize("path", DEVICE, ids=IDS)
def test_syntax_is_that_of_python_3_8(path: Path) -> None:
    oldest = path.relative_to(FOLDER).as_posix() in OLDEST
    tree = ast.parse(path.read_text(), feature_version=(3, 6) if oldest else (3, 8))
    future = oldest or any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert future or len(tree.body) <= 1


@pytest.mark.parametrize("path", DEVICE, ids=IDS)
def test_types_are_not_built_when_the_module_runs(path: Path) -> None:
    """Outside annotations, `list[int]` and `Sequence[int]` of collections.abc are errors in 3.8."""
    tree = ast.parse(path.read_text())
    banned = {"list", "dict", "tuple", "set", "frozenset", "type"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc":
            banned |= {alias.asname or alias.name for alias in node.names}
    annotations = set()
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                annotations |= {id(inner) for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id not in banned, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert not any(keyword.arg == "strict" for keyword in node.keywords), f"{path.name}:{node.lineno}"


BLOCKED = """
import sys
for name in ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx_bindings", "compressor"):
    sys.modules[name] = None
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def test_imports_without_torch_onnx_and_tensorrt() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *NAMES],
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (str(len(NAMES)), "")


WITHOUT_TORCH = """
import sys
for name in ("torch", "compressor", "torchvision"):
    sys.modules[name] = None
from export.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["build", "measure", "verify"])
def test_the_commands_work_where_torch_cannot_be_imported(tmp_path: Path, command: str) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    net = tmp_path / "net.onnx"
    net.write_bytes(matmul_chain(8, 3))
    write_reference(tmp_path / "reference.npz", inputs, onnx_outputs(net, inputs)[0])
    more = {
        "build": ["--module", RTX, "--compute-capability", "8.9"],
        "measure": ["--runtime", "onnxruntime", "--warmup", "0.01", "--duration", "0.05", "--processes", "1"],
        "verify": ["--runtime", "onnxruntime"],
    }[command]
    if command == "build":
        pytest.importorskip(RTX, reason="TensorRT-RTX is not installed")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, command, str(net), *more, "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "out.json").read_text())
    if command == "build":
        assert found["compute_capabilities"] == ["8.9"]
        assert found["size"] == (tmp_path / "net.engine").stat().st_size > 0
    elif command == "measure":
        assert 0 < found["latency"]["median_ms"] <= found["latency"]["p90_ms"] <= found["latency"]["p99_ms"]
        assert {"board", "state_before", "state_after"} <= set(found)
    else:
        assert found["parity"]["max_abs"] == 0


def old_python() -> str:
    found = shutil.which("python3.8")
    if found and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0:
        return found
    pytest.skip("there is no Python 3.8 on this machine")


def test_imports_in_python_3_8() -> None:
    done = subprocess.run(
        [old_python(), "-c", BLOCKED, *NAMES], capture_output=True, text=True, cwd=FOLDER.parent, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (str(len(NAMES)), "")


def test_nothing_imports_the_compressor() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "compressor" for name in names), path.name
            if path.name not in WORKSTATION:
                assert not any(name.split(".")[0] == "torch" for name in names if name) or (
                    "TYPE_CHECKING" in path.read_text()
                ), path.name
