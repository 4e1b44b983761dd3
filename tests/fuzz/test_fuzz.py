"""Damaged and hostile files of every kind: each is read, or refused with one message, and nothing else happens.

Valid files are changed in places: bytes, pieces cut out or doubled, values of their fields.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from compressor.core.errors import CompressorError
from compressor.core.records import Checkpoint
from compressor.data.images import decode
from compressor.latency.schema import SCHEMA_VERSION, read_table
from compressor.models.weights import read_weights
from compressor.pruning.artefact import CHANNELS as CHANNELS_FILE
from compressor.pruning.artefact import WEIGHTS as WEIGHTS_FILE
from compressor.pruning.artefact import load, read_plan, save
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.space import PruningSpace
from compressor.recipe import Recipe, load_recipe
from export.device.archive import CHECKSUMS, pack, require_checksums, unpack
from export.device.results import output_values, read_results, run_times
from export.errors import ExportError
from export.files import sha256_bytes
from tests.archives import checksums

Edits = list[tuple[int, int, bytes]]

EDITS = st.lists(
    st.tuples(
        st.integers(0, 1 << 30),
        st.integers(0, 3),
        st.sampled_from(
            [b"\0", b"\xff", b"\x80\x02.", b"9" * 30, b"[", b"{", b"-1", b"1e999", b"nan", b"&a [*a]", b"!!x "]
        )
        | st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=5,
)


def edited(content: bytes, edits: Edits) -> bytes:
    """The content with pieces overwritten, put in, cut out or doubled."""
    for place, how, piece in edits:
        at = place % (len(content) + 1)
        if how == 0:
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == 1:
            content = content[:at] + piece + content[at:]
        elif how == 2:
            content = content[:at]
        else:
            content = content[:at] + content[at // 2 : at] + content[at:]
    return content


def with_value(fields: Any, place: int, value: Any) -> Any:
    """Plain data with one of its values replaced."""
    fields = json.loads(json.dumps(fields))
    holder, key = {"": fields}, ""
    inside: Any = fields
    while isinstance(inside, dict | list) and inside and place % 5:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        holder, key = inside, keys[place % len(keys)]
        place, inside = place // 3, holder[key]
    holder[key] = value
    return holder[""] if key == "" and set(holder) == {""} else fields


def fault(read: Callable[[], object]) -> str:
    """What is wrong with reading something: empty where it is read, or refused with one clean and short message."""
    try:
        read()
    except (CompressorError, ExportError) as error:
        said = str(error)
        strange = sorted({char for char in said if not (char.isprintable() or char in "\n\t")})
        if not error.message.strip():
            return "the message is empty"
        if len(said) >= 4000:
            return f"the message has {len(said)} characters"
        return f"the message holds {strange}" if strange else ""
    except Exception as error:
        return f"{type(error).__name__} instead of a message: {error}"
    return ""


SCALE = int(os.environ.get("COMPRESSOR_FUZZ", "1"))
"""`COMPRESSOR_FUZZ=10 pytest tests/fuzz` tries ten times as many inputs, others each time."""


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=SCALE * examples, derandomize=SCALE == 1, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def _saved(value: object, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((20, 16)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def build() -> nn.Module:
    """The dense network of a pruned one."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


WEIGHTS = [
    _saved(NET.state_dict()),
    _saved({"state_dict": NET.state_dict()}, _use_new_zipfile_serialization=False),
    _saved({"a": torch.ones(2).to_sparse(), "b": torch.zeros(1).expand(1 << 12, 1 << 12)}),
]
PICTURES = {kind: _picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}
RECIPE = Recipe(model="resnet50", budgets={"latency": "50%"}).resolved()
PLAN = ChannelPlan({"conv1": (0, 1, 3), "layer1.0": (2,)})
CHANNELS = {
    "format": "compressor-slim", "version": 1, "factory": {"factory": "resnet18", "kwargs": {"num_classes": 10}},
    "plan": json.loads(PLAN.to_json()), "plan_sha256": PLAN.checksum, "tensors": {"a": [1, 2]}, "edits": [],
    "swaps": {}, "weights": {"file": "model.safetensors", "sha256": "0" * 64},
}  # fmt: skip
TABLE = {
    "schema_version": SCHEMA_VERSION, "device": {"name": "x"}, "precision": "fp32",
    "entries": {"conv": {"c_in": [1], "ms": [1.0]}},
}  # fmt: skip
RESULTS = {
    "format": 3, "bundle": "", "board": "7", "tensorrt": "10.3.0", "power_mode": "MAXN", "processes": 1,
    "duration_s": 1, "warmup_s": 0,
    "networks": [{"name": "net", "status": "ok", "onnx_sha256": "0" * 64, "engine_bytes": 5, "reason": ""}],
}  # fmt: skip
STATE = {"board": "7", "tensorrt": "10.3.0", "power_mode": "MAXN", "after": {"17000000.gpu": 900}}
TIMING = {
    "format": 3, "kind": "timing", "target": "x", "order": ["net"],
    "networks": [{"name": "net", "sha256": "0" * 64, "precision": "fp32"}],
}  # fmt: skip
BUNDLE = {
    **TIMING, "kind": "network", "samples": 1, "output_shape": [3],
    "networks": [{"name": "net", "sha256": "0" * 64, "precision": "fp32", "reference": "output", "beside": None}],
}  # fmt: skip


def archive(files: dict[str, bytes]) -> bytes:
    return pack({**files, CHECKSUMS: checksums(files)}, "results")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz(300)
@given(edits=EDITS, place=st.integers(0, 10**9), value=VALUES, fields=st.booleans())
def test_recipes(folder: Path, edits: Edits, place: int, value: Any, fields: bool) -> None:
    file = folder / "recipe.yaml"
    if fields:
        plain = with_value(RECIPE.model_dump(mode="json"), place, value)
        assert fault(lambda: file.write_text(json.dumps(plain)) and load_recipe(file).resolved()) == ""
    else:
        file.write_bytes(edited(RECIPE.to_yaml().encode(), edits))
        assert fault(lambda: load_recipe(file)) == ""


@fuzz(200)
@given(edits=EDITS, place=st.integers(0, 10**9), value=VALUES, fields=st.booleans())
def test_artefacts(folder: Path, edits: Edits, place: int, value: Any, fields: bool) -> None:
    text = json.dumps(with_value(CHANNELS, place, value) if fields else CHANNELS).encode()
    (folder / "channels.json").write_bytes(text if fields else edited(text, edits))
    assert fault(lambda: read_plan(folder)) == ""


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned network that `load` reads."""
    folder = tmp_path_factory.mktemp("slim")
    space = PruningSpace(build(), torch.zeros(1, 3, 8, 8))
    plan = space.uniform(0.5)
    save(space.apply(plan), plan, folder)
    assert load(folder, factory=build)(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
    return folder


@fuzz(150)
@given(edits=EDITS, place=st.integers(0, 10**9), value=VALUES, fields=st.booleans())
def test_slim_networks(slim: Path, folder: Path, edits: Edits, place: int, value: Any, fields: bool) -> None:
    """Weights that are changed with their checksum, and descriptions whose weights are right."""
    channels, weights = json.loads((slim / CHANNELS_FILE).read_bytes()), (slim / WEIGHTS_FILE).read_bytes()
    if fields:
        channels = with_value(channels, place, value)
    else:
        weights = edited(weights, edits)
        channels["weights"]["sha256"] = sha256_bytes(weights)
    (folder / CHANNELS_FILE).write_text(json.dumps(channels))
    (folder / WEIGHTS_FILE).write_bytes(weights)
    assert fault(lambda: load(folder, factory=build)) == ""


@fuzz(200)
@given(edits=EDITS, place=st.integers(0, 10**9), value=VALUES, fields=st.booleans())
def test_tables(edits: Edits, place: int, value: Any, fields: bool) -> None:
    text = json.dumps(with_value(TABLE, place, value) if fields else TABLE).encode()
    assert fault(lambda: read_table((text if fields else edited(text, edits)).decode(errors="replace"), "It")) == ""


def device_results(
    folder: Path, kind: str, found: Any, state: Any, times: bytes, outputs: bytes, described: Any = None
) -> tuple[Path, Path]:
    """A bundle with one network, and the results of a device: the paths of the results and of the bundle."""
    bundle, results = folder / "bundle.tar.gz", folder / "results.tar.gz"
    manifest = described or {"network": BUNDLE, "timing": TIMING}[kind]
    files = {"bundle.json": json.dumps(manifest).encode()}
    if kind == "network":
        files["reference/output-00.txt"] = b"1000000\n2000000\n3000000\n"
    bundle.write_bytes(archive(files))
    if isinstance(found, dict) and found.get("bundle") == "":
        found = {**found, "bundle": sha256_bytes(unpack(bundle)[CHECKSUMS])}
    named = {"results.json": found, "net/1-1.json": state}
    written = {name: json.dumps(value).encode() for name, value in named.items()}
    results.write_bytes(archive({**written, "net/1-1.txt": times, "net/output-00.json": outputs}))
    return results, bundle


TIMES, OUTPUTS = b"1000000\n2000000\n", b'[{"values": [1, 2, 3]}]'


@pytest.mark.parametrize("kind", ["network", "timing"])
def test_results_that_nothing_has_changed_are_read(folder: Path, kind: str) -> None:
    results, bundle = device_results(folder, kind, RESULTS, STATE, TIMES, OUTPUTS)
    network = read_results(results, bundle, kind).networks["net"]
    assert network.times_ms == [1.0, 2.0]
    assert (network.parity is not None) == (kind == "network")


def test_a_bundle_whose_outputs_have_no_axes(folder: Path) -> None:
    given = device_results(folder, "network", RESULTS, STATE, TIMES, OUTPUTS, {**BUNDLE, "output_shape": []})
    assert fault(lambda: read_results(*given)) == ""


@pytest.mark.parametrize("kind", ["network", "timing"])
@fuzz(200)
@given(edits=EDITS, place=st.integers(0, 10**9), value=VALUES, which=st.integers(0, 4))
def test_results(folder: Path, kind: str, edits: Edits, place: int, value: Any, which: int) -> None:
    found, state, times, outputs, described = RESULTS, STATE, TIMES, OUTPUTS, None
    if which == 0:
        found = with_value(RESULTS, place, value)
    elif which == 1:
        state = with_value(STATE, place, value)
    elif which == 2:
        times = edited(times, edits)
    elif which == 3:
        outputs = edited(outputs, edits)
    else:
        described = with_value({"network": BUNDLE, "timing": TIMING}[kind], place, value)
    results, bundle = device_results(folder, kind, found, state, times, outputs, described)
    assert fault(lambda: read_results(results, bundle, kind)) == ""
    assert fault(lambda: run_times(times, "times")) == ""
    assert fault(lambda: output_values(outputs, "values")) == ""


@fuzz(250)
@given(edits=EDITS, raw=st.booleans())
def test_archives(folder: Path, edits: Edits, raw: bool) -> None:
    file = folder / "some.tar.gz"
    content = archive({"a.json": b"{}" * 50, "b/c.txt": b"x" * 700})
    if raw:  # the tar inside is changed, and packed again
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            entry = tarfile.TarInfo("results/" + "n" * 120)
            entry.size, entry.mtime = 5, 1.5  # type: ignore[assignment]
            tar.addfile(entry, io.BytesIO(b"hello"))
        file.write_bytes(gzip.compress(edited(buffer.getvalue(), edits), 1))
    else:
        file.write_bytes(edited(content, edits))
    assert fault(lambda: require_checksums(unpack(file, largest=1 << 22), file)) == ""


@fuzz(300)
@given(edits=EDITS, kind=st.sampled_from(sorted(PICTURES)))
def test_pictures(folder: Path, edits: Edits, kind: str) -> None:
    file = folder / "picture"
    file.write_bytes(edited(PICTURES[kind], edits))
    assert fault(lambda: decode(str(file), 16)) == ""


@fuzz(250)
@given(edits=EDITS, which=st.integers(0, len(WEIGHTS) - 1), checkpoint=st.booleans())
def test_weights(folder: Path, edits: Edits, which: int, checkpoint: bool) -> None:
    file = folder / "net.pt"
    file.write_bytes(edited(WEIGHTS[which], edits))
    assert fault(lambda: Checkpoint(file).load() if checkpoint else read_weights(file)) == ""
