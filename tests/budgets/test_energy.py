"""Energy from a powercap folder, an NVML module and a tegrastats that stand in for the real ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.budgets import energy
from compressor.budgets.base import parse_budget
from compressor.budgets.counters import Nvml, Rapl
from compressor.budgets.energy import CountedEnergy, EnergyBudget, Runs, find_meter
from compressor.budgets.limits import reachable, resolve
from compressor.core.errors import CompressorError
from compressor.latency.request import Request
from compressor.pruning.space import PruningSpace
from compressor.search.bounds import ActionBounds

RANGE = 100_000_000


class One(nn.Module):
    """One group of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3)
        self.b = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).mean((2, 3)))


def zone(root: Path, name: str, kind: str, value: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder / "energy_uj"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two packages, a part of one, and the whole board, which must not be counted a second time."""
    zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 500)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:1", "package-1", 1000)
    zone(tmp_path, "intel-rapl:2", "psys", 99)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    return tmp_path


def shape_in(model: bytes) -> tuple[int, int]:
    """The batch of an ONNX file, and the channels of its convolution."""
    import onnx

    graph = onnx.load_model_from_string(model).graph
    channels = next(item.dims[0] for item in graph.initializer if len(item.dims) == 4)
    return graph.input[0].type.tensor_type.shape.dim[0].dim_value, channels


def space_and_meter(root: Path, batch: int = 1) -> tuple[PruningSpace, CountedEnergy]:
    """A network that draws 2 mJ and 0.5 mJ for each channel and input."""
    space = PruningSpace(One().eval(), torch.zeros(1, 3, 8, 8), granularity=4, min_width=4)
    counter = root / "intel-rapl:0" / "energy_uj"

    @contextmanager
    def load(model: bytes) -> Iterator[Runs]:
        inputs, channels = shape_in(model)
        drawn = 2000 + inputs * 500 * channels
        yield lambda: counter.write_text(str((int(counter.read_text()) + drawn) % RANGE))

    return space, CountedEnergy(space, Request(batch=batch), Rapl(root), load, repeats=3, seconds=0.0)


def test_packages_are_added_and_a_counter_may_begin_again(root: Path) -> None:
    rapl = Rapl(root)
    before = rapl.reading()
    assert before == [RANGE - 500, 1000]
    (root / "intel-rapl:0" / "energy_uj").write_text("250\n")
    (root / "intel-rapl:1" / "energy_uj").write_text("1100\n")
    assert rapl.spent(before, rapl.reading()) == 750 + 100


def test_millijoules_for_one_input_and_widths_that_keep_them(root: Path) -> None:
    space, meter = space_and_meter(root)
    (budget,) = resolve([parse_budget("energy", "60%")], space, callers={"energy": meter})
    assert isinstance(budget, EnergyBudget)
    assert budget.dense == pytest.approx(10.0)  # though its counter passed its range on the way
    assert str(budget) == "energy <= 6 mJ (60% of 10 mJ)"
    assert budget.predict(np.array([[8], [4], [8]])).tolist() == pytest.approx([6.0, 4.0, 6.0])
    assert meter.calls == 3
    assert meter.measure((4,)) == pytest.approx(4.0)
    reachable([budget], space)
    assert ActionBounds(space, [budget]).legal(0, space.dense_widths).widths.tolist() == [8]
    with pytest.raises(CompressorError, match="needs 4 mJ of energy"):
        reachable(resolve([parse_budget("energy", "1mJ")], space, callers={"energy": meter}), space)


def test_counters_that_stand_still_are_refused(root: Path) -> None:
    space, _ = space_and_meter(root)
    # A real session, of which this folder knows nothing.
    meter = CountedEnergy(space, Request(), Rapl(root), energy._on_cpu(1), repeats=1, seconds=0.0)
    with pytest.raises(CompressorError, match="do not change"):
        meter.measure((16,))


def test_a_batch_shares_what_a_run_costs(root: Path) -> None:
    _, meter = space_and_meter(root, batch=4)
    assert meter.measure((16,)) == pytest.approx((2.0 + 4 * 8.0) / 4)


class FakeNvml:
    """What is asked of `pynvml`, for one GPU that draws 90 W; `fails` names a call that raises."""

    class NVMLError(Exception):
        """The base of its errors."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.energy_mj = fails, 5_000

    def __getattr__(self, name: str) -> object:
        def call(*given: object) -> object:
            if name == self.fails:
                raise self.NVMLError("Not Supported")
            return {
                "nvmlInit": None, "nvmlDeviceGetHandleByPciBusId": given, "nvmlDeviceGetName": b"H100",
                "nvmlDeviceGetTotalEnergyConsumption": self.energy_mj,
            }[name]  # fmt: skip

        return call


def test_a_gpu_is_counted_by_nvml(root: Path) -> None:
    nvml = FakeNvml()
    counter = Nvml("0000:01:00.0", nvml)
    assert counter.source == "NVML of H100, the whole board"
    space, _ = space_and_meter(root)

    @contextmanager
    def load(model: bytes) -> Iterator[Runs]:
        def run() -> None:
            nvml.energy_mj += shape_in(model)[1]

        yield run

    meter = CountedEnergy(space, Request(), counter, load, repeats=3, seconds=0.0)
    assert meter.measure((8,)) == pytest.approx(8.0)
    assert meter.source == "NVML of H100, the whole board, idle power included"


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetTotalEnergyConsumption"])
def test_a_gpu_that_does_not_count_is_refused(call: str) -> None:
    with pytest.raises(CompressorError, match=r"NVML reports no energy of the GPU 0000.*: Not Supported") as told:
        Nvml("0000:01:00.0", FakeNvml(call))
    assert "Volta" in told.value.hint


def test_a_machine_without_nvmls_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(CompressorError, match="NVML's Python module") as told:
        Nvml("0000:01:00.0")
    assert "compressor[energy]" in told.value.hint


def test_a_gpu_of_this_machine_is_taken_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.budgets import counters
    from compressor.latency.local import LocalGpu
    from compressor.latency.provider import TableProvider
    from export.device.here import Backend
    from export.engine.cuda import Device

    class Driver:
        def __enter__(self) -> Driver:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def pci_bus_id(self) -> str:
            return "0000:01:00.0"

    gpu = Device("H100", "9.0", 80 << 30, 1980, "13.0")
    backend = Backend("tensorrt", "10.3.0", gpu)
    monkeypatch.setattr("export.device.here.gpu_backend", lambda: backend)
    monkeypatch.setattr("export.engine.cuda.Driver", Driver)
    monkeypatch.setattr(TableProvider, "for_device", staticmethod(lambda device: LocalGpu(backend)))
    monkeypatch.setattr(counters, "_pynvml", FakeNvml)
    space = PruningSpace(One().eval(), torch.zeros(1, 3, 8, 8))
    assert find_meter("local", Request(precision="fp16"))(space).source.startswith("NVML of H100")
    monkeypatch.setattr("export.device.here.gpu_backend", lambda: Backend("trtexec", "10.3.0", gpu))
    with pytest.raises(CompressorError, match="trtexec starts a process for each network"):
        find_meter("local", Request())


def test_a_device_that_reports_no_energy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    space = PruningSpace(One().eval(), torch.zeros(1, 3, 8, 8))
    meter = find_meter("local", Request(), root)(space)
    assert meter.source == "Intel RAPL of 2 processor package(s), idle power included"
    with pytest.raises(CompressorError, match=r"no .*/nothing/intel-rapl:\*/energy_uj") as caught:
        find_meter("local", Request(), root / "nothing")
    assert "intel_rapl_common" in caught.value.hint
    with pytest.raises(CompressorError, match="on Jetson modules over ssh, not on jetson-nano"):
        find_meter("jetson-nano", Request(), root)


def test_a_counter_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, **_: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, os.strerror(13))
        return str(RANGE)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(CompressorError, match=r"no permission to read .*energy_uj") as caught:
        Rapl(root)
    assert "chmod a+r" in caught.value.hint


def test_the_command_line_refuses_it_before_a_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from compressor.cli.app import app

    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    out = tmp_path / "run"
    found = CliRunner().invoke(
        app, ["--model", "cifar_resnet20", "--energy", "50%", "--epochs", "1", "--out", str(out)]
    )
    assert found.exit_code == 2
    assert "reports no energy" in " ".join(found.output.split())
    assert not out.exists()


def test_a_run_keeps_it_and_measures_it_anew_at_the_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressor import Recipe, run_recipe

    def measured(meter: CountedEnergy, widths: tuple[int, ...]) -> float:
        meter.calls += 1
        return 1.0 + 0.1 * sum(widths) + 1e-3 * meter.calls  # no two measurements agree

    monkeypatch.setattr(energy, "POWERCAP", root)
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    monkeypatch.setattr(CountedEnergy, "measure", measured)
    fields = {
        "model": "tests.nets:tiny",
        "agent": "uniform",
        "epochs": 1,
        "budgets": {"energy": "60%"},
        "search": {"max_evaluations": 1, "batch_norm_batches": 1, "search_images": 64},
        "contract": {"repeats": 1},
        "export": {"engine": False},
    }
    result = run_recipe(Recipe.model_validate(fields), out=tmp_path / "run")
    (entry,) = result.manifest["budgets"]
    assert (entry["name"], entry["unit"], entry["kept"]) == ("energy", "mJ", True)
    assert entry["dense"] == pytest.approx(9.001)
    assert entry["predicted"] < entry["measured"] <= entry["target"] == pytest.approx(0.6 * 9.001)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{entry['measured']:.3g}" in page
    assert "in total: Intel RAPL of 2 processor package(s), idle power included." in page
