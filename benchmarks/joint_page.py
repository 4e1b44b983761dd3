"""The page of `benchmarks.results_joint`: tables from the manifests of its runs, and what the field reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compared import Compared, compared

BASE = "resnet20-pretrained"
RESULTS = {
    "resnet20-dense": ("ResNet-20", "dense baseline, from scratch", None),
    "resnet20-scratch": ("ResNet-20", "joint, from scratch, 50 % of MACs", "resnet20-dense"),
    "resnet20-pretrained-dense": ("ResNet-20", "dense baseline, from given weights", None),
    "resnet20-pretrained": ("ResNet-20", "joint, from given weights, 50 % of MACs", "resnet20-pretrained-dense"),
    "resnet20-pretrained-35": (
        "ResNet-20", "joint, from given weights, 35 % of MACs", "resnet20-pretrained-dense"
    ),
    "resnet20-pretrained-latency": (
        "ResNet-20", "joint, from given weights, 50 % of measured latency", "resnet20-pretrained-dense"
    ),
    "resnet56-dense": ("ResNet-56", "dense baseline, from scratch", None),
    "resnet56-scratch": ("ResNet-56", "joint, from scratch, 50 % of MACs", "resnet56-dense"),
    "paper": ("ResNet-56", "joint as the paper has it, from scratch, 50 % of MACs", "resnet56-dense"),
    "resnet56-pretrained-dense": ("ResNet-56", "dense baseline, from given weights", None),
    "resnet56-pretrained": ("ResNet-56", "joint, from given weights, 50 % of MACs", "resnet56-pretrained-dense"),
    "mobilenet_v2-dense": ("MobileNet-V2", "dense baseline, from scratch", None),
    "mobilenet_v2-scratch": ("MobileNet-V2", "joint, from scratch, 50 % of MACs", "mobilenet_v2-dense"),
}  # fmt: skip
"""Recipe: network, what was done, and the baseline with the same total epochs."""
ABLATIONS = {
    "ablation-no-environment": "no model of the changing reward",
    "ablation-no-alignment": "no alignment",
    "ablation-align-channel": "alignment by channel instead of by tensor",
    "ablation-early": "pruned after a quarter of the epochs instead of a half",
    "ablation-no-warm-start": "no warm start of the replay",
    "ablation-no-reward-model": "plans near the best by chance, not picked by the model of the reward",
    "ablation-importance-taylor": "Taylor saliency instead of L1 norms",
    "ablation-no-rescore": "no re-scoring on the final weights",
    "ablation-ema": "with an average of the weights",
    "ablation-one-schedule": "one schedule of the learning rate",
    "ablation-no-distill": "no teacher",
}
FIELD = """\
| network | method | accuracy before | after | cut of MACs |
|---|---|---|---|---|
| ResNet-56 | AMC | 92.80 | 91.90 | 50 % |
| ResNet-56 | HRank | 93.26 | 93.17 | 50 % |
| ResNet-56 | FPGM | 93.59 | 93.49 | 52.6 % |
| ResNet-56 | ResRep | 93.71 | 93.71 | 53 % |
| ResNet-56 | DepGraph | 93.53 | 93.77 | 53 % |
| ResNet-56 | White-Box | 93.26 | 93.55 | 55 % |
| ResNet-56 | DPM + DepGraph | 93.53 | 94.13 | 54 % |
| ResNet-56 | Adaptive-Channel | 94.04 | 94.36 | 55 % |
| ResNet-56 | a reproduction of arXiv 2403.19490, last epoch | 93.34 | 93.42 | 48.7 % as recounted |
| MobileNet-V2 | DCP | 94.47 | 94.69 | 1.35x fewer |
| MobileNet-V2 | SCOP | 94.48 | 94.24 | 1.67x fewer |
| MobileNet-V2 | ATO | 94.45 | 94.78 | 1.84x fewer |
| MobileNet-V2 | ACSP | 94.48 | 94.98 | 1.93x fewer |
"""


@dataclass(frozen=True)
class Setting:
    """What all cells of a page have in common.

    Attributes:
        epochs, whole: how long the longest recipe was trained, and how long it asks for.
        seeds: all that were asked for.
        train_images: how many there were before the search split was taken off; None for all.
        settings: fields set for all recipes.
    """

    epochs: int
    whole: int
    seeds: tuple[int, ...]
    train_images: int | None
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        name, seed: of its cell.
        epochs: search and fine-tuning together.
        accuracy: of the slim network on the test images, 0..1.
        images: test images.
        macs: multiply-adds of the slim network over the dense one's, both counted by fvcore on the built modules.
        latency: measured, over the dense one's in the same session; None where it was not measured.
        evaluations: networks scored.
        neither: share of the search's wall time that was neither training nor evaluating.
        minutes: wall time of all stages.
    """

    name: str
    seed: int
    epochs: int
    accuracy: float
    images: int
    macs: float
    latency: float | None
    evaluations: int
    neither: float
    minutes: float


def row_of(name: str, seed: int, folder: Path) -> Row:
    """Read a finished run's manifest, and count its network anew."""
    from compressor.core.files import read_json
    from compressor.core.manifest import MANIFEST

    manifest = read_json(folder / MANIFEST)
    timing, latency = manifest["search"]["timing"], manifest["latency"]
    return Row(
        name=name,
        seed=seed,
        epochs=manifest["epochs"],
        accuracy=manifest["accuracy"]["finetuned"],
        images=manifest["accuracy"]["images"],
        macs=counted_macs(folder) / manifest["cost"]["dense"]["macs"],
        latency=latency["measured_ms"] / latency["dense_ms"] if latency.get("measured_ms") else None,
        evaluations=manifest["search"]["evaluations"],
        neither=timing["agent"] / timing["total"],
        minutes=_minutes(manifest),
    )


def _minutes(manifest: dict[str, Any]) -> float:
    """Wall time of all stages; of one that was stopped and went on, what its search and its epochs took in all."""
    seconds = {name: float(stage["seconds"]) for name, stage in manifest["stages"].items()}
    epochs = [epoch["seconds"] for epoch in manifest["training"] if epoch["phase"] == "finetune"]
    whole = {"search": manifest["search"]["timing"]["total"], "finetune": sum(epochs)}
    return sum(max(took, whole.get(name, 0.0)) for name, took in seconds.items()) / 60


def counted_macs(folder: Path) -> int:
    """Multiply-adds of a run's slim network, counted by fvcore on the module that is loaded from its folder."""
    import torch

    from compressor import load
    from compressor.pruning.checks import count_macs
    from compressor.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    size = recipe.image_size or 32
    return count_macs(load(folder, factory=recipe.model), (torch.zeros(1, 3, size, size),))[0]


def page(setting: Setting, rows: Sequence[Row], missing: Sequence[str], command: str) -> str:
    """The whole page as Markdown."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    parts = [
        "# Joint training and pruning on CIFAR-10",
        _protocol(setting, rows),
        "## Results",
        _results(by_name),
    ]
    parts += [_compared(by_name), "## Ablations", _ablations(by_name), "## What the field reports"]
    parts += [
        "From the papers, on CIFAR-10's original images with full training; not comparable to shortened rows.",
        FIELD,
    ]
    parts += ["## Missing", _missing(missing, command)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _protocol(setting: Setting, rows: Sequence[Row]) -> str:
    lines = [
        "Written by `python -m benchmarks.results_joint` from its runs. A row is a recipe of `recipes/joint`.",
        "Accuracy is that of the last epoch on test images that neither training nor the search has seen. A baseline",
        "has the same total epochs as the rows compared with it, in one schedule and without a teacher. MACs are",
        "counted by fvcore on the slim module that is loaded from the run's folder. Given weights may have seen the",
        "images of the search split; that helps all rows from given weights alike.",
    ]
    if setting.epochs != setting.whole:
        lines += [
            f"**Shortened**: {setting.epochs} epochs where the recipes ask for {setting.whole}, the others in",
            "proportion. Such rows compare with each other, not with published numbers.",
        ]
    if setting.train_images:
        lines += [
            f"**{setting.train_images:,} training images only**, a fixed part of them; a tenth of these is the search",
            "split.",
        ]
    if setting.settings:
        lines += [f"Set for all: {', '.join(f'`{text}`' for text in setting.settings)}."]
    if rows:
        share = max(row.neither for row in rows)
        lines += [f"Of a search's wall time, at most {share:.1%} went into neither training nor evaluating."]
    lines += [f"Seeds asked for: {', '.join(map(str, setting.seeds))}."]
    return "\n".join(lines)


def _results(by_name: dict[str, list[Row]]) -> str:
    lines = [
        "| network | what | epochs | test accuracy, % | over baseline | MACs | measured latency | seeds "
        "| evaluations | neither | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (network, what, baseline) in RESULTS.items():
        if name in by_name:
            found = by_name[name]
            lines.append(
                f"| {network} | {what} | {found[0].epochs} | {_accuracy(found)} "
                f"| {_difference(found, by_name.get(baseline or '', []))} | {_mean(r.macs for r in found):.1%} "
                f"| {_latency(found)} | {len(found)} | {_mean(r.evaluations for r in found):.0f} "
                f"| {_mean(r.neither for r in found):.1%} | {_mean(r.minutes for r in found):.1f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else "No cell has been run yet."


def _compared(by_name: dict[str, list[Row]]) -> str:
    """Whether ResNet-56 at half of its MACs is no worse than dense, in words, once both were run."""
    lines = []
    for name, (network, what, baseline) in RESULTS.items():
        if name in by_name and baseline in by_name:
            found = _against(by_name[name], by_name[str(baseline)])
            lines.append(
                f"- {network}, {what}: {found.verdict} its baseline ({found.gap:+.2f} points, "
                f"noise {found.noise:.2f})."
            )
    return "\n".join(lines)


def _ablations(by_name: dict[str, list[Row]]) -> str:
    base = by_name.get(BASE)
    if base is None:
        return f"They are compared with `{BASE}`, which has not been run."
    lines = [
        f"Each row changes one thing of `{BASE}` ({_accuracy(base)} %). Differences within the noise (two standard",
        "errors of the difference: of the test images, or between seeds where that is larger) say nothing.",
        "",
        "| changed | test accuracy, % | difference, points | what it says | seeds | evaluations | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, what in ABLATIONS.items():
        if name in by_name:
            found = by_name[name]
            against = _against(found, base)
            says = {"not distinguishable from": "nothing"}.get(
                against.verdict, against.verdict.removesuffix(" than")
            )
            lines.append(
                f"| {what} | {_accuracy(found)} | {against.gap:+.2f} | {says} | {len(found)} "
                f"| {_mean(r.evaluations for r in found):.0f} | {_mean(r.minutes for r in found):.1f} |"
            )
    return "\n".join(lines) if len(lines) > 5 else f"None has been run yet; they are compared with `{BASE}`."


def _missing(missing: Sequence[str], command: str) -> str:
    if not missing:
        return "None."
    counts = {name: missing.count(name) for name in missing}
    names = ", ".join(
        f"`{name}`" + (f" ({count} seeds)" if count > 1 else "") for name, count in counts.items()
    )
    many = f"{len(missing)} cell{'s' if len(missing) > 1 else ''}"
    return f"{many}: {names}.\n\nThis command fills them:\n\n```bash\n{command}\n```"


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _accuracy(rows: Sequence[Row]) -> str:
    values = [100 * row.accuracy for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _against(rows: Sequence[Row], base: Sequence[Row]) -> Compared:
    ours, theirs = ({row.seed: row.accuracy for row in group} for group in (rows, base))
    return compared(ours, theirs, base[0].images)


def _difference(rows: Sequence[Row], base: Sequence[Row]) -> str:
    return f"{_against(rows, base).gap:+.2f}" if base else ""


def _latency(rows: Sequence[Row]) -> str:
    known = [row.latency for row in rows if row.latency is not None]
    return f"{statistics.fmean(known):.1%}" if known else ""
