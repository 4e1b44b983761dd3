"""A bundle from end to end: made, carried, run by a plain shell with a stand-in for trtexec, and read back."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export.convert.half import convert_half
from export.convert.ort import onnx_outputs
from export.convert.parity import Reference
from export.convert.quantize import quantize_onnx
from export.convert.to_onnx import export_onnx
from export.device.archive import CHECKSUMS, pack, unpack
from export.device.bundle import TARGETS, device_script, family_of, make_bundle, write_bundle
from export.device.results import DeviceResults, read_results
from export.errors import ExportError
from tests.archives import SAFELY, checksums
from tests.export.device.fake_trtexec import VERSIONS, make_trtexec, release
from tests.export.nets import SmallNet
from tests.export.tiny_disk import tiny_disk

TOOLS = ["cat", "cut", "head", "mkdir", "mv", "rm", "sha256sum", "sort", "tail", "tr", "wc"]
IMAGES = np.random.default_rng(4).standard_normal((2, 3, 16, 16)).astype(np.float32)
pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("dash"), reason="needs a POSIX shell")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    for opset, name in ((17, "slim"), (13, "old")):
        export_onnx(SmallNet(), torch.zeros(1, 3, 16, 16), folder / f"{name}.onnx", opset=opset)
        convert_half(folder / f"{name}.onnx", folder / f"{name}.fp16.onnx", inputs=IMAGES)
        quantize_onnx(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", IMAGES)
    return folder


def reference(folder: Path) -> Reference:
    return Reference(IMAGES, onnx_outputs(folder / "slim.onnx", IMAGES)[0])


@pytest.fixture
def bundle(tmp_path: Path, networks: Path) -> Path:
    path = tmp_path / "slim.tar.gz"
    files = [networks / "slim.onnx", networks / "slim.fp16.onnx", networks / "slim.int8.onnx"]
    make_bundle(path, files, reference(networks), target="jetson-orin-nano-8gb", facts={"run": "r1"})
    return path


def carry(bundle: Path, to: Path) -> Path:
    """Unpack as on the board: into an empty folder."""
    with tarfile.open(bundle) as archive:
        archive.extractall(to, **SAFELY)
    return to / bundle.name.removesuffix(".tar.gz")


def run(
    folder: Path, trtexec: Path | None, *options: str, shell: str = "dash", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing on the path but coreutils."""
    tools = folder.parent / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in TOOLS:
            (tools / name).symlink_to(str(shutil.which(name)))
    given = {"PATH": str(tools), **environment, **({"TRTEXEC": str(trtexec)} if trtexec else {})}
    return subprocess.run(
        [str(shutil.which(shell)), str(folder / "run.sh"), *options],
        env=given,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def by_name(results: DeviceResults) -> dict[str, str]:
    return {name: network.status for name, network in results.networks.items()}


def test_bundles_repeat_and_hold_what_they_say(bundle: Path, networks: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "slim.tar.gz"
    files = [networks / "slim.onnx", networks / "slim.fp16.onnx", networks / "slim.int8.onnx"]
    info = make_bundle(again, files, reference(networks), target="jetson-orin-nano-8gb", facts={"run": "r1"})
    assert again.read_bytes() == bundle.read_bytes()
    assert info.networks == {"slim": "fp32", "slim.fp16": "fp16", "slim.int8": "int8"}
    held = unpack(bundle)
    assert held["models/slim.fp16.onnx"] == (networks / "slim.fp16.onnx").read_bytes()
    assert held["workspace.txt"] == b"1024\n"
    assert len(held["reference/input-01.bin"]) == 4 * 3 * 16 * 16
    assert held[CHECKSUMS].count(b"\n") == len(held) - 1
    assert b"Jetson Orin Nano 8GB" in held["README.txt"]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("NVIDIA Jetson Nano Developer Kit", "nano"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "orin nano"),
        ("NVIDIA Orin NX Developer Kit", "orin nx"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "agx orin"),
        ("NVIDIA Jetson Xavier NX Developer Kit", "xavier nx"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "thor"),
        ("a carrier for Orin NX and Orin Nano", ""),
        ("Jetson-AGX", ""),
        ("", ""),
    ],
)
def test_a_board_names_its_module(model: str, family: str) -> None:
    assert family_of(model) == family
    assert "" not in map(family_of, (target.title for target in TARGETS.values()))


@pytest.mark.parametrize(("version", "flag"), [("8.5.2", "--streams=2"), ("11.4.1", "--infStreams=2")])
def test_batches_in_streams(tmp_path: Path, version: str, flag: str) -> None:
    """Inputs of the reference go to the board in batches, and their outputs are compared one by one here."""
    net, path, images = tmp_path / "slim.onnx", tmp_path / "b.tar.gz", np.concatenate([IMAGES, -IMAGES])
    export_onnx(SmallNet(), torch.zeros(2, 3, 16, 16), net)
    make_bundle(
        path, [net], Reference(images, onnx_outputs(net, images)[0]), target="jetson-orin-nano-8gb", streams=2
    )
    held = unpack(path)
    assert held["streams.txt"] == b"2\n"
    assert len(held["reference/input-01.bin"]) == 4 * 2 * 3 * 16 * 16
    folder, calls = carry(path, tmp_path / "board"), tmp_path / "calls.txt"
    done = run(folder, make_trtexec(tmp_path / "bin", version, calls=str(calls)), "--processes", "1")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert all((flag in call) == ("exportTimes" in call) for call in calls.read_text().splitlines())
    results = read_results(folder / "results", path)
    assert (results.batch, results.streams) == (2, 2)
    network = results.networks["slim"]
    assert network.parity is not None
    assert network.latency is not None
    assert (network.status, network.parity.samples) == ("ok", 4)
    assert network.latency.median_ms == pytest.approx(3.2, rel=1e-3)
    assert network.latency.inputs_per_s == pytest.approx(4 / 3.2e-3, rel=1e-2)
    assert "for a batch of 2 in 2 streams, 1250.0 inputs a second" in network.describe()
    with pytest.raises(ExportError, match=r"a fixed batch N that divides the 3 inputs"):
        make_bundle(path, [net], Reference(images[:3], images[:3]), target="jetson-orin-nano-8gb")


def test_the_power_of_a_jetson_is_recorded_while_a_network_runs(tmp_path: Path, networks: Path) -> None:
    folder, content = tmp_path / "board", (networks / "slim.onnx").read_bytes()
    write_bundle(folder, [("slim", content)], target=TARGETS["jetson-orin-nano-8gb"], profile=False, energy=True)
    trtexec = make_trtexec(tmp_path / "bin", "10.3.0")
    options = ("--processes", "2", "--duration", "1")
    done = run(folder, trtexec, *options)
    assert (done.returncode, "tegrastats was not found" in done.stderr) == (2, True)
    tools = tmp_path / "tools"
    for name in ("sleep", "timeout"):
        (tools / name).symlink_to(str(shutil.which(name)))
    lines = "\n".join(["VDD_IN 3000mW/3000mW", *["VDD_IN 9832mW/9433mW"] * 12])
    (tools / "tegrastats").write_text(f"#!/bin/sh\nprintf '{lines}\\n'\nexec sleep 30\n")
    (tools / "tegrastats").chmod(0o755)
    (tools / "sh").symlink_to(str(shutil.which("sh")))
    done = run(folder, trtexec, *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    network = read_results(folder / "results", folder, "timing").networks["slim"]
    assert [turn.power_mw for turn in network.turns] == [9832.0, 9832.0]
    assert network.run_mj == pytest.approx(9832 * 1.6 / 1e3, rel=1e-3)  # the stand-in's runs take 1.6 ms
    back = folder / "results"
    (back / "slim" / "power-1-1.log").write_text("VDD_IN 9832mW/9433mW\n")
    held = {str(path.relative_to(back)): path.read_bytes() for path in back.rglob("*.*") if path.is_file()}
    (back / CHECKSUMS).write_bytes(checksums(held))
    with pytest.raises(ExportError, match=r"power-1-1\.log has 1 readings"):
        read_results(back, folder, "timing")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_measures_and_verifies(tmp_path: Path, networks: Path, version: str) -> None:
    """The stand-in refuses flags that its version lacks, and precisions without their flags."""
    name = "old" if release(version) < (8, 4) else "slim"
    path = tmp_path / "b.tar.gz"
    files = [networks / f"{name}.onnx", networks / f"{name}.fp16.onnx"]
    target = "jetson-nano" if name == "old" else "jetson-orin-nano-8gb"
    if name == "slim":
        files.append(networks / "slim.int8.onnx")
    make_bundle(path, files, reference(networks), target=target)
    folder = carry(path, tmp_path / "board")
    calls = tmp_path / "calls.txt"
    trtexec = make_trtexec(tmp_path / "bin", version, calls=str(calls))
    done = run(folder, trtexec, "--processes", "2", "--duration", "1")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"TensorRT {version}" in done.stdout
    results = read_results(folder / "results", path)
    assert set(by_name(results).values()) == {"ok"}
    assert results.board.tensorrt == version
    for network in results.networks.values():
        assert network.latency is not None
        assert network.parity is not None
        assert (network.latency.runs, network.latency.median_ms) == (42, pytest.approx(1.6))
        assert network.latency.p99_ms == pytest.approx(1.7)
        assert network.parity.samples == 2
        assert network.engine_bytes > 1000
    memory = "--workspace=256" if version.startswith("8.2") else "--memPoolSize=workspace:1024"
    assert memory in calls.read_text()


def test_dense_and_slim_are_timed_side_by_side_and_shown_in_one_table(tmp_path: Path, networks: Path) -> None:
    files = []
    for name in ("dense", "model"):
        for kind in ("", ".fp16"):
            files.append(tmp_path / f"{name}{kind}.onnx")
            shutil.copy(networks / f"slim{kind}.onnx", files[-1])
    path, wrong = tmp_path / "both.tar.gz", Reference(IMAGES, reference(networks).outputs + 7)
    make_bundle(path, files, reference(networks), target="jetson-orin-nano-8gb", dense=reference(networks),
                more={"infer.py": b"print()", "labels.txt": b"a\nb\n"})  # fmt: skip
    folder = carry(path, tmp_path / "board")
    assert (folder / "labels.txt").read_text() == "a\nb\n"
    told = (folder / "README.txt").read_text()
    assert "models/dense.fp16.onnx  fp16, before compression" in told
    assert "python3 infer.py --model engines/model.fp16.engine PHOTO.jpg" in told
    done = run(folder, make_trtexec(tmp_path / "bin", "10.3.0"), "--processes", "1")
    assert (done.returncode, done.stderr) == (0, "")
    heading, *rows = done.stdout.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert " ".join(heading.split()) == "network precision median ms p90 ms p99 ms of dense engine MB difference state"
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(table) == ["dense", "dense.fp16", "model", "model.fp16"]
    assert table["model"][:5] == ["fp32", "1.600000", "1.680000", "1.698000", "100.0%"]
    assert len(table["dense"]) == len(table["model"]) - 1  # it is compared with nothing
    assert {cells[-1] for cells in table.values()} == {"ok"}
    assert {each.status for each in read_results(folder / "results", path).networks.values()} == {"ok"}
    other = tmp_path / "wrong.tar.gz"  # each network has outputs of its own
    make_bundle(other, files, reference(networks), target="jetson-orin-nano-8gb", dense=wrong)
    folder = carry(other, tmp_path / "board")
    done = run(folder, make_trtexec(tmp_path / "bin2", "10.3.0"), "--processes", "1", "--only", "fp32")
    states = by_name(read_results(folder / "results", other))
    assert states == {"dense": "verify-failed", "model": "ok"}
    with pytest.raises(ExportError, match="has no outputs of it"):
        make_bundle(tmp_path / "c.tar.gz", files, reference(networks), target="jetson-orin-nano-8gb")


def test_script_and_program_agree_on_the_numbers(tmp_path: Path, bundle: Path) -> None:
    folder = carry(bundle, tmp_path / "board")
    run(folder, make_trtexec(tmp_path / "bin", "10.3.0"), "--processes", "1", "--only", "fp16")
    written = json.loads((folder / "results/results.json").read_text())["networks"]
    (network,) = read_results(folder / "results", bundle).networks.values()
    assert network.latency is not None
    assert network.parity is not None
    assert written[0]["median_ms"] == pytest.approx(network.latency.median_ms, abs=1e-6)
    assert written[0]["p90_ms"] == pytest.approx(network.latency.p90_ms, abs=1e-6)
    assert written[0]["p99_ms"] == pytest.approx(network.latency.p99_ms, abs=1e-6)
    assert written[0]["largest_difference"] == pytest.approx(network.parity.max_abs, abs=2e-6)


def test_an_interrupted_run_goes_on(tmp_path: Path, bundle: Path) -> None:
    folder, calls = carry(bundle, tmp_path / "board"), tmp_path / "calls.txt"
    trtexec = make_trtexec(tmp_path / "bin", "8.6.2", calls=str(calls))
    assert run(folder, trtexec, "--processes", "1", "--only", "fp16").returncode == 0
    assert run(folder, trtexec, "--processes", "1").returncode == 0
    assert calls.read_text().count("--onnx=models/slim.fp16.onnx") == 1  # its engine was there
    newer = make_trtexec(tmp_path / "bin2", "10.3.0", calls=str(calls))
    assert run(folder, newer, "--processes", "1", "--only", "fp16").returncode == 0
    assert calls.read_text().count("--onnx=models/slim.fp16.onnx") == 2  # another version builds its own


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("build", "Could not find any implementation for node /conv1/Conv"),
        ("measure", "out of memory"),
        ("verify", "illegal memory access"),
    ],
)
def test_failures_are_recorded_and_said(tmp_path: Path, bundle: Path, stage: str, reason: str) -> None:
    folder = carry(bundle, tmp_path / "board")
    done = run(folder, make_trtexec(tmp_path / "bin", "10.13.2", fail=stage), "--processes", "1")
    assert done.returncode == 1
    assert f"slim: {stage}-failed" in done.stdout
    results = read_results(folder / "results", bundle)
    assert by_name(results) == dict.fromkeys(("slim", "slim.fp16", "slim.int8"), f"{stage}-failed")
    assert all(reason in network.reason for network in results.networks.values())
    assert all((network.latency is not None) == (stage == "verify") for network in results.networks.values())


def test_wrong_outputs_do_not_pass(tmp_path: Path, bundle: Path) -> None:
    folder = carry(bundle, tmp_path / "board")
    done = run(folder, make_trtexec(tmp_path / "bin", "10.3.0", shift=0.5), "--processes", "1")
    assert done.returncode == 1
    assert "slim: verify-failed: outputs differ by 0.5" in done.stdout


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_other_shells(tmp_path: Path, bundle: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    folder = carry(bundle, tmp_path / "board")
    trtexec = make_trtexec(tmp_path / "bin", "8.5.2")
    if shell == "busybox":
        done = run(folder, trtexec, "--processes", "1", shell="busybox")
    else:
        done = run(folder, trtexec, "--processes", "1", "--only", "fp32", shell=shell)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("option", ["--help", "--identify"])
def test_a_device_gets_one_file_that_needs_no_other(option: str, tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_bytes(device_script())
    text = path.read_text()
    for function in ("say", "die", "number", "look_around", "describe"):
        assert text.count(f"\n{function}() {{") == 1
    environment = {"PATH": "", "TRTEXEC": ""}
    done = subprocess.run(
        [str(shutil.which("sh")), str(path), option],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if option == "--identify":
        assert (done.returncode, done.stdout) == (2, "")
        assert "error: " in done.stderr
    else:  # nothing is looked for before the options are read
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: sh run.sh")


def test_results_are_packed_where_tar_is(tmp_path: Path, bundle: Path) -> None:
    folder = carry(bundle, tmp_path / "board")
    trtexec = make_trtexec(tmp_path / "bin", "10.3.0")
    done = run(folder, trtexec, "--processes", "1", "--only", "fp16", PATH=os.environ["PATH"])
    assert "copy results.tar.gz back" in done.stdout
    packed = read_results(folder / "results.tar.gz", bundle)
    assert packed == read_results(folder / "results", bundle)
    assert packed.facts == {"run": "r1"}
    assert packed.to_dict()["networks"][0]["latency"]["runs"] == 21


def test_what_the_script_refuses(tmp_path: Path, bundle: Path) -> None:
    folder = carry(bundle, tmp_path / "board")
    trtexec = make_trtexec(tmp_path / "bin", "8.5.2")

    def refused(message: str, *options: str, program: Path | None = trtexec, **more: str) -> None:
        done = run(folder, program, *options, **more)
        assert done.returncode == 2
        assert message in done.stderr

    refused("unknown option --fast", "--fast")
    refused("--duration takes a whole number, got '5s'", "--duration", "5s")
    refused("--only takes a value", "--only")
    refused("no network of precision 'int4'", "--only", "int4")
    refused("TensorRT 7.1 is too old", TRT_VERSION="7.1")
    if not Path("/usr/src/tensorrt/bin/trtexec").exists():
        refused("trtexec was not found", program=None)
    (folder / "models/slim.onnx").write_bytes(b"damaged")
    refused("files are damaged")
    (folder / "networks.txt").unlink()
    refused("this is not a bundle")


def test_a_full_disk_on_the_board_is_one_message(tmp_path: Path, bundle: Path) -> None:
    folder = carry(bundle, tmp_path / "board")
    trtexec = make_trtexec(tmp_path / "bin", "10.3.0")
    with tiny_disk(tmp_path / "disk", 16) as disk:
        # the identity and the log of the build fit, the result does not
        (disk / "fill").write_bytes(bytes(4096 * 2))
        done = run(folder, trtexec, "--processes", "1", "--only", "fp32", "--out", str(disk / "out"))
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].endswith("is the disk full?")
    done = run(folder, trtexec, "--processes", "1", "--only", "fp32", "--out", str(tmp_path / "out"))
    assert done.returncode == 0
    assert "the engine exists" in done.stdout


def test_results_are_checked(tmp_path: Path, bundle: Path, networks: Path) -> None:
    folder = carry(bundle, tmp_path / "board")
    run(folder, make_trtexec(tmp_path / "bin", "10.3.0"), "--processes", "1", "--only", "fp16")
    results = folder / "results"

    def refused(message: str, change: Callable[[dict[str, bytes]], object], renew: bool = True) -> None:
        files = unpack(results)
        change(files)
        if renew:
            files.pop(CHECKSUMS)
            files[CHECKSUMS] = checksums(files)
        path = tmp_path / "changed.tar.gz"
        path.write_bytes(pack(files, "results"))
        with pytest.raises(ExportError, match=message):
            read_results(path, bundle)

    def edit(name: str, old: str, new: str) -> Callable[[dict[str, bytes]], object]:
        return lambda files: files.update({name: files[name].replace(old.encode(), new.encode())})

    times = "slim.fp16/1-2.txt"
    refused("checksum of results.json does not match", edit("results.json", "ok", "no"), renew=False)
    refused("has no results.json", lambda files: files.pop("results.json"), renew=False)
    refused("without a checksum: extra.txt", lambda files: files.update({"extra.txt": b""}), renew=False)
    refused("has no results.json", lambda files: files.pop("results.json"))
    refused("another version of the program", edit("results.json", '"format": 3', '"format": 1'))
    refused("names other", edit("results.json", '"slim.fp16"', '"other"'))
    refused("cannot be parsed", edit("results.json", '"engine_bytes"', '"bytes"'))
    refused("is not a list of times", edit(times, "1500000", "1.5"))
    refused("is not a list of times", edit(times, "1500000", "-1"))
    refused("1 measurements are missing in .*, such as slim.fp16 in turn 1", lambda files: files.pop(times))
    refused("mixes measurements", edit("slim.fp16/1-2.json", '"tensorrt": "10', '"tensorrt": "11'))
    refused("has no result|cannot be parsed", edit("results.json", '"processes": 1', '"processes": 0'))
    refused("is not an output file", edit("slim.fp16/output-00.json", "values", "valued"))
    other = tmp_path / "other.tar.gz"
    make_bundle(other, [networks / "slim.fp16.onnx"], reference(networks), target="jetson-orin-nano-8gb")
    with pytest.raises(ExportError, match="belongs to another bundle"):
        read_results(results, other)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../outside", tarfile.REGTYPE), ("/etc/passwd", tarfile.REGTYPE), ("results/link", tarfile.SYMTYPE),
     ("results/../../x", tarfile.REGTYPE), ("results/device", tarfile.CHRTYPE)],
)  # fmt: skip
def test_hostile_members_are_not_read(tmp_path: Path, bundle: Path, name: str, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    path = tmp_path / "hostile.tar.gz"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ExportError, match=r"leaves the archive's folder|is not a regular file"):
        read_results(path, bundle)


def test_damaged_archives(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(ExportError, match="There is no archive"):
        read_results(tmp_path / "none.tar.gz", bundle)
    for content in (b"", b"noise", bundle.read_bytes()[:300], pack({}, "results")):
        path = tmp_path / "bad.tar.gz"
        path.write_bytes(content)
        with pytest.raises(ExportError, match=r"is not a complete \.tar\.gz|is empty"):
            read_results(path, bundle)


def test_what_cannot_go_into_a_bundle(tmp_path: Path, networks: Path) -> None:
    right = reference(networks)

    def refused(
        message: str, *files: str, name: str = "b.tar.gz", target: str = "jetson-orin-nano-8gb"
    ) -> None:
        with pytest.raises(ExportError, match=message):
            make_bundle(tmp_path / name, [networks / file for file in files], right, target=target)

    refused(
        "no target jetson-orin-nano. Did you mean .*jetson-orin-nano-8gb",
        "slim.onnx",
        target="jetson-orin-nano",
    )
    refused("at least one network")
    refused("There is no ONNX file", "none.onnx")
    refused("opset 17; the Jetson Nano reads opsets up to 13", "slim.onnx", target="jetson-nano")
    refused("Jetson TX2 has no INT8 units", "old.int8.onnx", target="jetson-tx2")
    refused("Two networks have the name slim", "slim.onnx", "slim.onnx")
    refused("Expected a bundle named NAME.tar.gz", "slim.onnx", name="b.zip")
    refused("Expected a bundle named NAME.tar.gz", "slim.onnx", name="$(reboot).tar.gz")
    hostile = networks / "a b;reboot.onnx"
    shutil.copy(networks / "slim.onnx", hostile)
    refused("cannot go into a bundle", hostile.name)
    hostile.unlink()
    export_onnx(SmallNet(), torch.zeros(3, 3, 16, 16), networks / "three.onnx")
    refused(r"takes \[3, 3, 16, 16\]; a bundle needs \[N, 3, 16, 16\], with a fixed batch N that", "three.onnx")
    assert not list(tmp_path.glob("*.tar.gz"))
