"""The part that runs on a board: Python 3.8, no torch, no onnx; only numpy, and TensorRT where it is used."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import export

FOLDER = Path(export.__file__).parent
WORKSTATION = {"to_onnx.py", "torch_formats.py"}
"""Files that may need torch; all others must at least be imported on a board."""

DEVICE = sorted(path for path in FOLDER.glob("*.py") if path.name not in WORKSTATION)
NAMES = ["export" if path.stem == "__init__" else f"export.{path.stem}" for path in DEVICE]


@pytest.mark.parametrize("path", DEVICE, ids=lambda path: path.name)
def test_syntax_is_that_of_python_3_8(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert future or len(tree.body) <= 1


@pytest.mark.parametrize("path", DEVICE, ids=lambda path: path.name)
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
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "compressor" for name in names), path.name
            if path.name not in WORKSTATION:
                assert not any(name.split(".")[0] == "torch" for name in names if name) or (
                    "TYPE_CHECKING" in path.read_text()
                ), path.name
