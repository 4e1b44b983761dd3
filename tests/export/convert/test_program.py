"""Files of `torch.export`: the network's own outputs, the same bytes, and no pickled surprise."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from export.convert.batches import Batch
from export.convert.program import (
    METADATA,
    check_loaded,
    export_program,
    load_program,
)
from export.errors import ExportError
from export.files import sha256_file
from tests.export.nets import SmallNet

IMAGES = np.random.default_rng(2).standard_normal((9, 3, 16, 16)).astype(np.float32)
EXAMPLE = torch.zeros(1, 3, 16, 16)
FACTS = {"classes": ["cat", "dog"], "run": "r1"}


def test_a_program_repeats_and_says_nothing_of_this_machine(tmp_path: Path) -> None:
    model = SmallNet()
    for name in ("a.pt2", "b.pt2"):
        info = export_program(model, EXAMPLE, tmp_path / name, metadata=FACTS)
        assert (info.sha256, info.size) == (sha256_file(info.path), info.path.stat().st_size)
    assert model.training  # left as it was
    content = (tmp_path / "a.pt2").read_bytes()
    assert content == (tmp_path / "b.pt2").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert json.loads(next(text for name, text in held.items() if name.endswith(METADATA))) == FACTS
    here = str(Path(__file__).parents[3]).encode()
    assert not any(here in text for text in held.values())
    assert check_loaded(load_program(tmp_path / "a.pt2"), model, IMAGES, "it").max_abs < 1e-5


def test_an_open_batch_takes_every_size_of_its_range(tmp_path: Path) -> None:
    model, path = SmallNet(), tmp_path / "net.pt2"
    export_program(model, EXAMPLE, path, batch=Batch(1, 4, 8))
    loaded = load_program(path)
    for batch in (1, 2, 8):
        assert check_loaded(loaded, model, IMAGES, "it", batch=batch).samples == 9 - 9 % batch
    with pytest.raises((RuntimeError, AssertionError), match=r"<= 8|batch"):
        loaded(torch.zeros(9, 3, 16, 16))


def test_another_network_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    export_program(SmallNet(12), EXAMPLE, path)
    with pytest.raises(ExportError, match=r"net\.pt2 differs from the network by"):
        check_loaded(load_program(path), SmallNet(), IMAGES, "net.pt2")


def test_files_that_are_none(tmp_path: Path) -> None:
    good = tmp_path / "good.pt2"
    export_program(SmallNet(), EXAMPLE, good)
    bad = tmp_path / "bad"
    for content in (b"", b"noise", good.read_bytes()[:500]):
        bad.write_bytes(content)
        with pytest.raises(ExportError, match=r"bad is not a program of torch\.export"):
            load_program(bad)
    with pytest.raises(ExportError, match="There is no program"):
        load_program(tmp_path / "none")


@pytest.mark.parametrize(
    ("member", "before", "after", "match"),
    [
        ("data/weights/model.pt", b"", b"pickle", "holds 'archive/data/weights/model.pt'"),
        ("data/aotinductor/model/x.so", b"", b"library", "which no exported network has"),
        ("data/weights/model_weights_config.json", b'"use_pickle": false', b'"use_pickle": 1', "holds pickled tensors"),
        ("data/weights/model_weights_config.json", b'"weight_0"', b'"opaque_obj_0"', "holds pickled tensors"),
        ("models/model.json", b"torch.ops.aten.conv2d.default", b"torch.load", "calls 'torch.load'"),
        ("models/model.json", b"Symbol('s77'", b"print('s77'", "code in place of a size"),
    ],
)  # fmt: skip
def test_what_torch_would_run_is_refused(
    tmp_path: Path, member: str, before: bytes, after: bytes, match: str
) -> None:
    good, bad = tmp_path / "good.pt2", tmp_path / "bad.pt2"
    export_program(SmallNet(), EXAMPLE, good, batch=Batch(1, 4, 8))
    with zipfile.ZipFile(good) as source:
        files = {name: source.read(name) for name in source.namelist()}
    name = f"{next(iter(files)).partition('/')[0]}/{member}"
    if before == b"Symbol('s77'":
        before = next(iter(re.findall(rb"Symbol\('\w+'", files[name])))
    changed = files.get(name, b"").replace(before, after) if before else after
    assert changed != files.get(name)
    with zipfile.ZipFile(bad, "w") as target:
        for each, content in {**files, name: changed}.items():
            target.writestr(each, content)
    with pytest.raises(ExportError, match=match):
        load_program(bad)


@pytest.mark.parametrize("member", ["sample_inputs", "weights"])
def test_pickled_objects_are_refused_before_anything_is_built(tmp_path: Path, member: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    good, bad = tmp_path / "good.pt2", tmp_path / "bad.pt2"
    export_program(SmallNet(), EXAMPLE, good)
    evil = io.BytesIO()
    torch.save({"x": Evil()}, evil)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if member == "sample_inputs" and "/sample_inputs/" in name:
                content = evil.getvalue()
            elif member == "weights" and name.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
                assert b"true" in content
            target.writestr(name, content)
    with pytest.raises(ExportError, match="holds pickled"):
        load_program(bad)
    assert not (tmp_path / "ran").exists()


def test_networks_that_cannot_be_written(tmp_path: Path) -> None:
    class Chooses(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match=r"cannot be written by torch\.export"):
        export_program(Chooses(), EXAMPLE, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []
