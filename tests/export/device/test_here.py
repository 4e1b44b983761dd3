"""Facts of a board, read from a copy of the files that a Jetson has."""

from __future__ import annotations

from pathlib import Path

from export.device.here import board_lines, board_state, describe_board, power_mode, run_tool

TOOLS = {"nvpmodel": "NV Power Mode: 25W\n1", "nvidia-smi": None}


def tool(command: object) -> str | None:
    return TOOLS.get(next(iter(command)))  # type: ignore[call-overload]


def test_a_jetson(tmp_path: Path) -> None:
    def put(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    put("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    put("etc/nv_tegra_release", "# R36 (release), REVISION: 4.3\n")
    put("sys/class/devfreq/17000000.gpu/cur_freq", "1020000000\n")
    put("sys/kernel/debug/bpmp/debug/clk/emc/rate", "3199000000\n")
    put("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    put("sys/class/thermal/thermal_zone0/temp", "48500\n")
    put("sys/class/thermal/thermal_zone1/type", "cv0-thermal\n")  # without a temperature: it is powered down
    facts = describe_board(tmp_path, tool)
    assert facts["model"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert facts["l4t"] == "# R36 (release), REVISION: 4.3"
    assert facts["power_mode"] == "25W"
    assert "gpu" not in facts
    assert board_state(tmp_path, tool) == {
        "clocks_mhz": {"17000000.gpu": 1020, "emc": 3199},
        "temperatures_c": {"cpu-thermal": 48.5},
    }


def test_a_desktop(tmp_path: Path) -> None:
    def smi(command: object) -> str | None:
        asked = " ".join(command)  # type: ignore[arg-type]
        if "name,driver_version" in asked:
            return "NVIDIA RTX A2000, 580.65"
        return "1200, 6001, 54" if asked.startswith("nvidia-smi") else None

    assert describe_board(tmp_path, smi)["gpu"] == "NVIDIA RTX A2000, 580.65"
    assert power_mode(smi) is None
    assert board_state(tmp_path, smi) == {"gpu": {"sm_mhz": 1200, "memory_mhz": 6001, "temperature_c": 54}}


def test_tools_that_are_missing_or_fail() -> None:
    assert run_tool(["no-such-tool-anywhere"]) is None
    assert run_tool(["false"]) is None
    assert run_tool(["echo", "x"]) == "x"


def test_the_table_below_a_latency() -> None:
    before = {"clocks_mhz": {"gpu": 1020, "emc": 3199}, "gpu": {"sm_mhz": 1980, "temperature_c": 41}}
    after = {"clocks_mhz": {"gpu": 612, "emc": 3199}, "gpu": {"sm_mhz": 1980, "temperature_c": 44}}
    lines = board_lines({"model": "Orin Nano", "power_mode": "25W"}, before, after)
    assert lines == [
        "  model        Orin Nano",
        "  power mode   25W",
        "  gpu          1020 -> 612 MHz",
        "  emc          3199 MHz",
        "  sm clock     1980 MHz",
        "  temperature  41 -> 44 C",
    ]
    assert board_lines({}, {}, {}) == []
