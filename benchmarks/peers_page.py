"""The methods and cells of `benchmarks.peers`, and its page."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import cells
from benchmarks.cells import Lines
from benchmarks.compared import compared

ROWS = (("cifar_resnet20", "50%"), ("cifar_resnet56", "50%"), ("cifar_resnet20", "30%"))
PEERS = {
    "torch-pruning-l1": "Torch-Pruning, L1, uniform",
    "torch-pruning-taylor": "Torch-Pruning, Taylor, global",
    "torch-pruning-bn": "Torch-Pruning, batch-norm scale, global",
    "fastnas": "ModelOpt FastNAS",
}
AGENTS = ("knapsack", "joint")
COMPENSATED = "-compensated"
OURS = {
    **{agent: f"ours, {agent}" for agent in AGENTS},
    **{f"{agent}{COMPENSATED}": f"ours, {agent}, compensated" for agent in AGENTS},
}
METHODS = {**PEERS, **OURS}
TRAININGS = ("plain", "distilled")

INTRODUCTION = """# Other tools at equal cost

Written by `python -m benchmarks.peers` from its cells; do not edit. All methods prune the same weights to the same
share of the multiply-adds (as fvcore counts them; a method whose steps are coarse ends below the limit) and see the
same images. Their networks are fine-tuned by the same loop for {epochs}: SGD with Nesterov momentum, a cosine
schedule, batches of 128, shifts and mirroring. *Plain* trains with the labels alone; *distilled* is our own
fine-tuning, half of whose loss is the divergence from the dense network's outputs at temperature 4. *Before* is the
accuracy before any training, with batch norm re-estimated on 1,280 unlabeled images (compensated networks as they are
compensated, from {fit_images} unlabeled images). Accuracies are percentages of the test images, which neither training
nor a search has seen; ± is the standard deviation over seeds.

Our searches and FastNAS score candidates on {search_images} images, after {batch_norm_batches} batches for batch norm.
Ours score {evaluations} candidates; FastNAS scores each layer at the widths that are multiples of {divisor}.
Torch-Pruning's ratio is found by bisection, which is included in its time. *Search* is processor time of one process
with one thread, without loading the data; other work on the machine makes it up to twice as long. Torch-Pruning and
FastNAS leave channels on residual additions dense in these networks, because their graphs do not follow shortcuts that
pad channels.
"""


def planned(options: argparse.Namespace, done: dict[str, Any]) -> Iterator[str]:
    """Yield the names of all cells, in the order in which they are run; those of the best peer once it is known."""
    first, *others = options.seeds
    for model, share in ROWS:
        if model not in options.weights:
            continue
        row = f"{model}/{share}"
        yield f"{model}/dense"
        for method in METHODS:
            trainings = TRAININGS if method in OURS else TRAININGS[:1]
            if unreachable(done, row, method, first):
                trainings = ()
            yield from (f"{row}/{method}/{first}/{part}" for part in ("search", *trainings))
        best = best_peer(done, row, first)
        if best is None:
            continue
        yield f"{row}/{best}/{first}/distilled"
        for seed in others:
            for method in (best, *main_methods()):
                yield from (f"{row}/{method}/{seed}/{part}" for part in ("search", *TRAININGS))


def main_methods() -> list[str]:
    """Return our methods that are run with every seed: the compensated ones."""
    return [method for method in OURS if method.endswith(COMPENSATED)]


def best_peer(done: dict[str, Any], row: str, seed: int) -> str | None:
    """Return the peer with the highest accuracy after plain fine-tuning; None until all that can be are trained."""
    able = [method for method in PEERS if not unreachable(done, row, method, seed)]
    found = {method: done.get(f"{row}/{method}/{seed}/plain") for method in able}
    if any(entry is None for entry in found.values()):
        return None
    return max(found, key=lambda method: found[method]["after"])


def unreachable(done: dict[str, Any], row: str, method: str, seed: int) -> bool:
    """Return whether a method has failed to prune a network to the budget."""
    return "unreachable" in done.get(f"{row}/{method}/{seed}/search", {})


def page(options: argparse.Namespace, lines: Lines) -> str:
    """Return the page of all cells that there are."""
    done = lines.entries()
    parts = [INTRODUCTION.format(**{**lines.settings, "epochs": cells.epochs(lines.settings["epochs"])})]
    versions = {pair for entry in done.values() for pair in entry.get("versions", {}).items()}
    if versions:
        parts += ["Versions: " + ", ".join(f"{name} {text}" for name, text in sorted(versions)) + ".", ""]
    for model, share in ROWS:
        parts += section(options, done, model, share)
    missing = [cell for cell in dict.fromkeys(planned(options, done)) if cell not in done]
    if missing:
        parts += [f"{len(missing)} cells are missing, such as {missing[0]}; the same command runs them.", ""]
    command = cells.command(options, "peers", [model for model, _ in ROWS], ["evaluations", "divisor"])
    return "\n".join([*parts, "```", command, "```", ""])


def section(options: argparse.Namespace, done: dict[str, Any], model: str, share: str) -> list[str]:
    """Return the table of a network and a share, and what follows from it."""
    row = f"{model}/{share}"
    found = {method: values_by_seed(done, row, method) for method in METHODS}
    if not any(found.values()):
        return []
    dense = done.get(f"{model}/dense")
    lines = [f"## {model}, {share} of the multiply-adds", ""]
    if dense:
        lines += [f"Dense, as given: {dense['after']:.2%}, {dense['macs'] / 1e6:.2f} M multiply-adds.", ""]
    header = ("method", "search, s", "multiply-adds, M", "share", "before", "plain", "distilled", "seeds")
    rows = []
    for method, label in METHODS.items():
        seeds = found[method]
        if not seeds:
            continue
        macs = [entry["macs"] for entry in seeds.values() if "macs" in entry]
        cells_of = {
            name: [entry[name] for entry in seeds.values() if name in entry]
            for name in ("seconds", "before", *TRAININGS)
        }
        rows.append(
            (
                label,
                f"{statistics.fmean(cells_of['seconds']):.0f}" if cells_of["seconds"] else "",
                f"{statistics.fmean(macs) / 1e6:.2f}" if macs else "",
                f"{statistics.fmean(macs) / dense['macs']:.1%}" if macs and dense else "",
                "cannot reach it" if any("unreachable" in each for each in seeds.values())
                else percent(cells_of["before"]),
                *(percent(cells_of[name]) for name in TRAININGS),
                str(len(seeds)),
            )
        )
    lines += [*cells.table_lines(header, rows), ""]
    best = best_peer(done, row, options.seeds[0])
    if best is not None and dense:
        lines += [*verdicts(found, best, dense["test_images"]), ""]
    return lines


def values_by_seed(done: dict[str, Any], row: str, method: str) -> dict[int, dict[str, Any]]:
    """Return what is known of a method, by seed: its search's values, and the accuracy of each training."""
    found: dict[int, dict[str, Any]] = {}
    for cell, entry in done.items():
        parts = cell.split("/")
        if len(parts) == 5 and "/".join(parts[:2]) == row and parts[2] == method:
            seed = found.setdefault(int(parts[3]), {})
            seed.update(entry if parts[4] == "search" else {parts[4]: entry["after"]})
    return dict(sorted(found.items()))


def verdicts(found: dict[str, dict[int, dict[str, Any]]], best: str, images: int) -> Iterator[str]:
    """Compare each of our methods with the best peer, before training and after each."""
    for method, label in OURS.items():
        parts = []
        for name, what in (("before", "before training"), ("plain", "after plain fine-tuning"),
                           ("distilled", "after distillation")):  # fmt: skip
            ours, theirs = (
                {seed: entry[name] for seed, entry in found[each].items() if name in entry}
                for each in (method, best)
            )
            if ours and theirs:
                result = compared(ours, theirs, images)
                parts.append(f"{result.verdict} it {what} ({result.gap:+.2f} points, noise {result.noise:.2f})")
        if parts:
            yield f"- {label} beside {PEERS[best]}, the best peer: {'; '.join(parts)}."


def percent(values: list[float]) -> str:
    """Return a mean with its standard deviation, in percent; empty without values."""
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"
