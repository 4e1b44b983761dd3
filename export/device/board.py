"""Facts and state of a board: module, JetPack, power mode, clocks and temperatures.

A latency means little without them: the power mode changes the latency of a Jetson by a factor of two to four.
They are read from files and from tools of JetPack; missing ones are left out, because a desktop has none of them.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

Run = Callable[[Sequence[str]], Optional[str]]


def run_tool(command: Sequence[str]) -> str | None:
    """The output of a tool, or None if it is missing, fails or takes longer than ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_board(root: Path = Path("/"), run: Run = run_tool) -> dict[str, Any]:
    """The facts of a board that do not change during a measurement.

    Args:
        root: Root of the file system; tests pass another folder.
        run: Runs a tool and returns its output.

    Returns:
        The known ones of machine, model, l4t, power_mode and gpu.
    """
    facts = {
        "machine": platform.machine(),
        "model": _text(root / "proc/device-tree/model"),
        "l4t": _text(root / "etc/nv_tegra_release"),
        "power_mode": power_mode(run),
        "gpu": run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
    }
    return {key: value for key, value in facts.items() if value}


def power_mode(run: Run = run_tool) -> str | None:
    """The name of the power mode, such as "MAXN" or "25W", or None without nvpmodel."""
    for line in (run(["nvpmodel", "-q"]) or "").splitlines():
        name, mark, value = line.partition(":")
        if mark and name.strip().endswith("Power Mode"):
            return value.strip()
    return None


def board_state(root: Path = Path("/"), run: Run = run_tool) -> dict[str, Any]:
    """The state that may change during a measurement: clocks in MHz and temperatures in Celsius, by name."""
    clocks = {}
    for folder in sorted((root / "sys/class/devfreq").glob("*")):
        hertz = _text(folder / "cur_freq")
        if hertz.isdigit():
            clocks[folder.name] = int(hertz) // 1_000_000
    emc = _text(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate")
    if emc.isdigit():
        clocks["emc"] = int(emc) // 1_000_000
    temperatures = {}
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, value = _text(folder / "type"), _text(folder / "temp")
        if name and value.lstrip("-").isdigit():
            temperatures[name] = int(value) / 1000
    state: dict[str, Any] = {}
    if clocks:
        state["clocks_mhz"] = clocks
    if temperatures:
        state["temperatures_c"] = temperatures
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu"
    smi = run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    if smi:
        parts = [part.strip() for part in smi.splitlines()[0].split(",")]
        names = ("sm_mhz", "memory_mhz", "temperature_c")
        state["gpu"] = {name: int(part) for name, part in zip(names, parts) if part.isdigit()}
    return state


def board_lines(board: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Format the board's facts and its clocks and temperatures before and after as aligned lines."""
    rows = [(key.replace("_", " "), str(value)) for key, value in board.items()]
    units = {"clocks_mhz": "MHz", "temperatures_c": "C"}
    for group in ("clocks_mhz", "temperatures_c", "gpu"):
        for name, value in before.get(group, {}).items():
            later = after.get(group, {}).get(name, value)
            unit = units.get(group) or ("MHz" if name.endswith("_mhz") else "C")
            label = name.replace("_mhz", " clock").replace("_c", "") if group == "gpu" else name
            rows.append((label, f"{value:g} {unit}" if value == later else f"{value:g} -> {later:g} {unit}"))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _text(path: Path) -> str:
    """The text of a small file, or "" if it cannot be read: the files differ by board and user."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    except OSError:
        return ""
