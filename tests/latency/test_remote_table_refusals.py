"""What comes back from a device spoilt, mixed up or hostile is refused, and the message says what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.core.errors import CompressorError
from compressor.latency.remote_table import table_of_results
from export.device.archive import CHECKSUMS
from export.errors import ExportError
from tests.latency.remote_bundle import altered, respoil

pytestmark = pytest.mark.usefixtures("own_tables")


def _first_networks(files: dict[str, bytes], number: int) -> None:
    altered(files, "results.json", networks=json.loads(files["results.json"])["networks"][:number])


SPOILT: list[tuple[str, Callable[[dict[str, bytes]], None]]] = [
    (r"mixes measurements: n01/1-2.txt is of the board 'other'", lambda f: altered(f, "n01/1-2.json", board="other")),
    (r"mixes measurements: .* version of TensorRT '8.5.2'", lambda f: altered(f, "n01/1-2.json", tensorrt="8.5.2")),
    (r"mixes measurements: .* power mode '7W'", lambda f: altered(f, "n01/1-2.json", power_mode="7W")),
    (r"1 measurements are missing in .*, such as n01 in turn 1", lambda f: f.pop("n01/1-2.txt") and None),
    (r"has no result for \d+ networks", lambda f: _first_networks(f, 3)),
    (r"belongs to another bundle", lambda f: altered(f, "results.json", bundle="0" * 64)),
    (r"another version of the program", lambda f: altered(f, "results.json", format=9)),
    (r"n01/1-2.txt is not a list of times", lambda f: f.update({"n01/1-2.txt": b"-5\n"})),
    (r"n01/1-2.txt is not a list of times", lambda f: f.update({"n01/1-2.txt": b"nan\n"})),
    (r"n01/1-2.txt has a time of 0 ms", lambda f: f.update({"n01/1-2.txt": b"0\n"})),
    (r"results.json is not valid JSON", lambda f: f.update({"results.json": b"{"})),
    (r"results.json holds a list", lambda f: f.update({"results.json": b"[]"})),
    (r"cannot be parsed", lambda f: altered(f, "results.json", networks=[1])),
    (r"cannot be parsed", lambda f: altered(f, "results.json", processes="many")),
    (r"cannot be parsed.*0 turns", lambda f: altered(f, "results.json", processes=0)),
    (r"cannot be parsed", lambda f: altered(f, "results.json", processes=10**9)),
    (r"cannot be parsed", lambda f: altered(f, "n01/1-2.json", after=[])),
    (r"cannot be parsed", lambda f: altered(f, "n01/1-2.json", after={"17000000.gpu": float("inf")})),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), SPOILT)
def test_results_that_do_not_belong_together(
    back: Path, message: str, change: Callable[[dict[str, bytes]], None]
) -> None:
    with pytest.raises((CompressorError, ExportError), match=message):
        table_of_results(respoil(back, change))


def test_hostile_and_damaged_archives(back: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in [
        ("../../etc/x", "leaves the archive's folder"),
        ("/etc/x", "leaves"),
        ("a\\b", "leaves"),
    ]:
        with tarfile.open(back / "results.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        with pytest.raises(ExportError, match=message):
            table_of_results(back)
    (back / "results.tar.gz").write_bytes(b"noise")
    with pytest.raises(ExportError, match=r"is not a complete \.tar\.gz"):
        table_of_results(back)
    monkeypatch.setattr("export.device.results.LARGEST_RESULTS", 1000)
    with pytest.raises(ExportError, match="unpacks to more than"):
        table_of_results(back / "results")


def test_a_changed_bundle(back: Path, tmp_path: Path) -> None:
    text = (back / "bundle.json").read_text()
    (back / "bundle.json").write_text(text.replace("my-orin", "another"))
    with pytest.raises(ExportError, match=r"checksum of bundle\.json does not match"):
        table_of_results(back)
    with pytest.raises(CompressorError, match="There is no folder"):
        table_of_results(tmp_path / "nothing")
    with pytest.raises(CompressorError, match=r"is not a bundle: it has no bundle\.json"):
        table_of_results(tmp_path)


def test_times_in_another_unit(back: Path) -> None:
    def shrink(files: dict[str, bytes]) -> None:
        for name in files:
            if name.endswith(".txt") and name.count("/") == 1:
                files[name] = b"1001\n" * 21

    respoil(back, shrink)
    facts = json.loads((back / "bundle.json").read_text())
    for layer in facts["facts"]["layout"]["layers"]:
        layer["out_hw"] = [4096, 4096]
    content = (json.dumps(facts) + "\n").encode()
    (back / "bundle.json").write_bytes(content)
    sums = [
        line for line in (back / CHECKSUMS).read_text().splitlines() if not line.endswith("  bundle.json")
    ]
    (back / CHECKSUMS).write_text(
        "\n".join([*sums, f"{hashlib.sha256(content).hexdigest()}  bundle.json", ""])
    )
    digest = hashlib.sha256((back / CHECKSUMS).read_bytes()).hexdigest()
    respoil(back, lambda files: altered(files, "results.json", bundle=digest))
    with pytest.raises(CompressorError, match="no device is that fast"):
        table_of_results(back)
