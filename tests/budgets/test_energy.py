"""Energy from a powercap folder that stands in for Linux' own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.budgets import energy
from compressor.budgets.base import parse_budget
from compressor.budgets.energy import EnergyBudget, EnergyMeter, Rapl, find_counters
from compressor.budgets.limits import reachable, resolve
from compressor.core.errors import CompressorError
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


def space_and_meter(root: Path) -> tuple[PruningSpace, EnergyMeter]:
    """A network that draws 2 mJ and 0.5 mJ for each channel."""
    space = PruningSpace(One().eval(), torch.zeros(1, 3, 8, 8), granularity=4, min_width=4)
    counter = root / "intel-rapl:0" / "energy_uj"

    def runner(network: nn.Module) -> energy.Runs:
        drawn = 2000 + 500 * network.a.out_channels  # type: ignore[union-attr, operator]
        return lambda: counter.write_text(str((int(counter.read_text()) + drawn) % RANGE))

    return space, EnergyMeter(space, Rapl(root), repeats=3, seconds=0.0, runner=runner)


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
    meter = EnergyMeter(space, Rapl(root), repeats=1, seconds=0.0)
    with pytest.raises(CompressorError, match="do not change"):
        meter.measure((16,))


def test_a_device_that_reports_no_energy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    assert find_counters("local", root).reading() == [RANGE - 500, 1000]
    with pytest.raises(CompressorError, match=r"no .*/nothing/intel-rapl:\*/energy_uj") as caught:
        find_counters("local", root / "nothing")
    assert "intel_rapl_common" in caught.value.hint
    with pytest.raises(CompressorError, match="only, not on jetson-nano"):
        find_counters("jetson-nano", root)


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

    def measured(meter: EnergyMeter, widths: tuple[int, ...]) -> float:
        meter.calls += 1
        return 1.0 + 0.1 * sum(widths) + 1e-3 * meter.calls  # no two measurements agree

    monkeypatch.setattr(energy, "POWERCAP", root)
    monkeypatch.setenv("COMPRESSOR_BACKEND", "onnxruntime-cpu")
    monkeypatch.setattr(EnergyMeter, "measure", measured)
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
    assert f"{entry['measured']:.3g}" in (tmp_path / "run" / "report.html").read_text()
