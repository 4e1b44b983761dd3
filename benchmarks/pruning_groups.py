"""Which channels go together, by this project and by torch-pruning: `python -m benchmarks.pruning_groups`.

Half of each group of every network of docs/results/coverage.md is removed, one group after the other, by torch-pruning
from a copy of the dense network (`pruning.checks`). A group agrees where it removes exactly the elements that the
pruning space removes. Of the others, one of each kind in a network is judged: both networks that lose this group alone
are run and compared with the dense network whose removed elements are zero. (Where normalisation over channels or
softmax sees how many there are, a network differs from that by nature; then both do.)

Results are kept in benchmarks/results/pruning_groups.json; networks that are in it are not run again. The page is
docs/results/groups.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pruning_coverage import networks
from compressor.pruning.checks import compare, obstacles
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.skeleton import copy_structure
from compressor.pruning.space import PruningSpace
from compressor.pruning.torch_pruning_cut import Cutter
from tests.pruning.networks import filled

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pruning_groups.json"
PAGE = HERE.parent / "docs" / "results" / "groups.md"
UNABLE = "layers that it cannot remove"
EXPLAINS_NOTHING = "nothing that its graph cannot follow"
SAME = 1e-3
"""Outputs that differ by less than this share of their size are the same."""


def examine(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """One network: how many groups agree, what is done in the others, and who is right there."""
    torch.manual_seed(0)
    model, example = filled(build().eval()), torch.randn(shape)
    space = PruningSpace(model, example)
    plan = space.uniform(0.5, "random")
    start = time.perf_counter()
    found = compare(space, plan, seconds)
    row: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 1),
        "agreed": len(found.agreed),
        "failed": found.failed,
        "different": [],
    }
    judged: set[str] = set()
    for group, what in found.other.items():
        otherwise = UNABLE if group in found.unable else EXPLAINS_NOTHING
        through = ", ".join(obstacles(space, group)) or otherwise
        entry = {"group": group, "what": what, "through": through}
        kind = through + what.partition(" of '")[0].translate(str.maketrans("", "", "0123456789"))
        if kind not in judged and "not reached" not in what:
            judged.add(kind)
            entry |= judge(space, plan, group, example)
        row["different"].append(entry)
    return row


def judge(space: PruningSpace, plan: ChannelPlan, group: str, example: Tensor) -> dict[str, str]:
    """How far both networks that lose one group are from the dense one with the same elements at zero."""
    alone = ChannelPlan({group: plan.keep[group]})
    zeroed = {name: mask.float() for name, mask in space.keep_masks(alone).items()}
    ours = _apart(lambda: space.apply(alone)(example), space, zeroed, example)
    try:
        cutter = Cutter(space, alone)
        index = next(each.index for each in space.groups if each.name == group)
        cutter.remove(index, take_back=False)
    except Exception as error:
        return {"ours": ours, "theirs": f"fails: {type(error).__name__}"}
    masks = {}
    for name, parameter in space.model.named_parameters():
        if name in cutter.dense:
            masks[name] = torch.zeros(parameter.numel())
            masks[name][cutter.tensor(name).detach().flatten().long()] = 1
            masks[name] = masks[name].reshape(parameter.shape)
    theirs = cutter.with_values()
    return {"ours": ours, "theirs": _apart(lambda: theirs(example), space, masks, example)}


def _apart(run: Callable[[], Any], space: PruningSpace, masks: dict[str, Tensor], example: Tensor) -> str:
    with torch.no_grad():
        try:
            found = _first(run())
        except Exception as error:
            return f"does not run: {type(error).__name__}"
        dense = copy_structure(space.model, lambda tensor: tensor.detach().clone()).eval()
        for name, parameter in dense.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
        wanted = _first(dense(example))
        if found.shape != wanted.shape:
            return f"gives {tuple(found.shape)}"
        apart = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    return "the same" if apart < SAME else f"apart by {apart:.1g}"


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def page(results: dict[str, Any]) -> str:
    """The table and the kinds of disagreement."""
    import torch_pruning

    rows = list(results.items())
    agreed = sum(row["agreed"] for _, row in rows)
    every = agreed + sum(len(row["different"]) for _, row in rows)
    whole = sum(not row["failed"] and not row["different"] for _, row in rows)
    lines = [
        "# Groups compared with torch-pruning's",
        "",
        "Written by `python -m benchmarks.pruning_groups`; do not edit. [Pruning](../method/pruning.md) explains the",
        "disagreements.",
        "",
        f"{agreed} of {every} groups of {len(rows)} networks are the same in torch-pruning "
        f"{torch_pruning.__version__}; all of them in {whole} networks.",
        "",
        "*Through* are the operations on a group's channels that its graph need not follow exactly. *Ours* and",
        "*theirs* compare the network that loses this group alone with the dense one whose removed elements are zero.",
        "",
        "| network | groups | agree | differ through | in torch-pruning, such as | ours | theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows:
        count = row["agreed"] + len(row["different"])
        if row["failed"]:
            lines.append(f"| {name} | | | | {_cell(row['failed'])} | | |")
            continue
        if not row["different"]:
            lines.append(f"| {name} | {count} | all | | | | |")
        kinds: dict[str, list[dict[str, str]]] = {}
        for entry in row["different"]:
            kinds.setdefault(entry["through"], []).append(entry)
        for place, (through, entries) in enumerate(kinds.items()):
            shown = next((entry for entry in entries if "ours" in entry), entries[0])
            start = f"| {name} | {count} | {row['agreed']} |" if not place else "| | | |"
            lines.append(
                f"{start} {len(entries)}: {through} | {shown['group']}: {_cell(shown['what'])} | "
                f"{shown.get('ours', '')} | {shown.get('theirs', '')} |"
            )
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")[:160]


def main() -> int:
    """Fill up the results and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="begin no further network after this long"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="for the groups of one network")
    parser.add_argument("--heavy", action="store_true", help="also the networks above 300 million parameters")
    parser.add_argument("--again", action="store_true", help="run networks that have results too")
    parser.add_argument("only", nargs="*", help="names of networks")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    end, listed = time.monotonic() + 60 * asked.minutes, list(networks(heavy=asked.heavy))
    names = [name for name, _, _ in listed]
    for name, build, shape in listed:
        if (asked.only and name not in asked.only) or (name in results and not asked.again):
            continue
        if time.monotonic() > end:
            continue
        try:
            results[name] = examine(name, build, shape, asked.seconds)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        row = results[name]
        kinds = Counter(entry["through"] for entry in row["different"])
        print(f"{name}: {row['agreed']} agree, {dict(kinds)} {row['failed']} {row['seconds']} s", flush=True)
        RESULTS.write_text(
            json.dumps({each: results[each] for each in names if each in results}, indent=1) + "\n"
        )
    PAGE.write_text(page({name: results[name] for name in names if name in results}))
    return int(
        any(entry["through"] == EXPLAINS_NOTHING for row in results.values() for entry in row["different"])
    )


if __name__ == "__main__":
    raise SystemExit(main())
