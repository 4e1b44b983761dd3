"""Eight runs with fixed seeds: the widths, the accuracy and the checksum of the weights of each.

    python -m benchmarks.fixed_runs                          # saves benchmarks/results/fixed_runs.json
    python -m benchmarks.fixed_runs --compare OTHER.json     # says which runs differ from those of another version

A change that is to leave results as they are must leave all of them as they are, on the same machine and with the same
versions of the libraries. Only the command line is used, so that the file also runs beside an earlier version of the
package. One run is killed in its search and resumed; it must end as the one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'compress'; from compressor.cli import main; main()"]
COMMON = ["--model", "cifar_resnet20", "--data", "digits", "--epochs", "3", "--seed", "7", "--threads", "1"]
SHORT = ["--set", "search.max_evaluations=12"]
AGENTS = ("uniform", "random", "knapsack", "joint", "constrained", "stepwise")
MACS = [*COMMON, *SHORT, "--flops", "50%"]
RUNS: dict[str, list[str]] = {
    **{agent: [*MACS, "--agent", agent] for agent in AGENTS},
    "jetson": [*COMMON, *SHORT, "--agent", "knapsack", "--device", "jetson-orin-nano-8gb", "--latency", "97%"],
    "joint, resumed": [*MACS, "--agent", "joint"],
}  # fmt: skip
EPISODES = 4
"""Lines of the episode log after which the run that is resumed is killed."""


def run(name: str, arguments: list[str], out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """One run in a process of its own.

    Returns:
        `widths` by group, `accuracy`, `weights` (sha256), `exit_code`, and for the Jetson `bundle` (sha256).
    """
    command = [*COMMAND, *arguments, "--out", str(out)]
    log = out.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        if name.endswith("resumed"):
            episodes = out / "search" / "episodes.jsonl"
            while process.poll() is None and not (episodes.exists() and episodes.read_text().count("\n") >= EPISODES):
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = subprocess.Popen(
                [*COMMAND, "--resume", str(out)], env=environment, stdout=output, stderr=output
            )
        code = process.wait()
    if code not in (0, 3, 4):
        raise SystemExit(f"{name} ended with exit code {code}:\n{log.read_text()[-2000:]}")
    manifest = json.loads((out / "manifest.json").read_text())
    found = {
        "widths": {group["name"]: group["kept"] for group in manifest["groups"]},
        "accuracy": manifest["accuracy"]["finetuned"],
        "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "exit_code": code,
    }
    if name == "jetson":
        bundle = out.with_suffix(".tar.gz")
        export = ["export", str(out), "--target", "jetson-orin-nano-8gb", "--bundle", str(bundle)]
        subprocess.run([*COMMAND, *export], env=environment, check=True, capture_output=True)
        found["bundle"] = hashlib.sha256(bundle.read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, default=Path("benchmarks/results/fixed_runs.json"))
    parser.add_argument("--compare", type=Path, help="a file that this command saved")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="compressor-fixed-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.setdefault("COMPRESSOR_CACHE", f"{folder}/cache")
        for name, arguments in RUNS.items():
            out = Path(folder) / name.replace(", ", "-")
            found[name] = run(name, arguments, out, environment)
            console.print(f"{name}: {found[name]['accuracy']:.4f}, weights {found[name]['weights'][:12]}")
    options.save.parent.mkdir(parents=True, exist_ok=True)
    options.save.write_text(json.dumps(found, indent=1) + "\n")
    other = json.loads(options.compare.read_text()) if options.compare else {}
    table = Table(title="Runs with fixed seeds")
    for column in ("run", "widths", "accuracy", "weights", "as in the other version"):
        table.add_column(column)
    for name, each in found.items():
        same = "" if not other else "yes" if other[name] == each else "NO"
        widths = " ".join(str(width) for width in each["widths"].values())
        table.add_row(name, widths, f"{each['accuracy']:.4f}", each["weights"][:12], same)
    console.print(table)
    resumed = {key: found["joint, resumed"][key] == found["joint"][key] for key in ("widths", "accuracy", "weights")}
    console.print(f"Resumed as not killed: {resumed}. Saved {options.save}")
    if not all(resumed.values()) or any(other[name] != each for name, each in found.items() if other):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
