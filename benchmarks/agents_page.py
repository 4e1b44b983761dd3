"""The tables of `benchmarks.agents`, on the terminal and as a page: all cells, gaps to the knapsack, missing cells."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compared import compared, unpacked

LEARNING = ("joint", "constrained", "stepwise")
BASELINE = "knapsack"
_FEW = 4
"""Plans of which a correlation says nothing."""
COLUMNS = {
    "budget": "budget",
    "agent": "agent",
    "brief": "brief",
    "used": "evaluations",
    "searched": "search split, %",
    "before": "before, %",
    "after": "after, %",
    "share": "predicted",
    "measured": "measured",
    "kept": "kept",
    "minutes": "minutes",
    "seeds": "seeds",
}
CLAIMS = """\
| paper | network, CIFAR-10 | claim |
|---|---|---|
| constrained (arXiv 2110.08558) | VGG variants | 83 to 92.9 % of the parameters removed at comparable accuracy |
| constrained (arXiv 2110.08558) | ResNet-18 | 75.09 % of the parameters removed at comparable accuracy |

Their networks were trained to the end, with some 3,000 evaluations and long fine-tuning. What compares with it here is
`cifar_vgg16_bn` at 17 % and 10 % of the parameters, for the cells that were run."""

ORDER = """\
The search ranks plans by their accuracy before training. The table gives the rank correlation (Spearman) of the
accuracy before fine-tuning with that after it, both on the test images, over all different plans of all agents but the
uniform one: 1 means that training keeps the order, 0 that nothing of it is left. All these plans were chosen by some
search, so they differ little before fine-tuning. Deviations of accuracies are in points."""

Cells = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One search: which agent, within which budget, with how many evaluations, which seed, and how many steps of
    training on each candidate."""

    model: str
    budget: str
    evaluations: int
    agent: str
    seed: int
    brief: int = 0

    @property
    def name(self) -> str:
        """The stem of its file."""
        parts = [self.model, self.budget, self.evaluations, self.agent, self.seed]
        parts += [f"brief{self.brief}"] if self.brief else []
        return "-".join(map(str, parts)).replace(":", "-").replace("%", "")


def rows_of(cells: Cells) -> list[dict[str, str]]:
    """One row for each budget and agent, over its seeds; uniform pruning stands in every table of its network."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["budget"], cell["agent"], cell["brief"]), []).append(cell)
    return [
        {"budget": budget, "agent": agent, "brief": str(brief)} | summary(of)
        for (budget, agent, brief), of in groups.items()
    ]


def summary(of: Cells) -> dict[str, str]:
    """One row of the table from the cells of its seeds."""
    shares = [entry["measured_share"] for entry in of if entry["measured_share"] is not None]
    return {
        "used": f"{statistics.mean(entry['used'] for entry in of):.0f}",
        "searched": _spread(entry["search_accuracy"] for entry in of),
        "before": _spread(entry["before"] for entry in of),
        "after": _spread(entry["after"] for entry in of),
        "share": f"{statistics.mean(entry['share'] for entry in of):.1%}",
        "measured": f"{statistics.mean(shares):.1%}" if shares else "",
        "kept": _kept(of),
        "minutes": f"{statistics.mean(entry['search_minutes'] for entry in of):.1f}",
        "seeds": str(len(of)),
    }


def show(cells: Cells, missing: int, console: Console) -> None:
    """Print what there is, network by network."""
    for model, evaluations, of in tables(cells):
        table = Table(title=f"{model}, {evaluations} evaluations")
        for name, heading in COLUMNS.items():
            table.add_column(heading, justify="left" if name in ("budget", "agent") else "right")
        for row in rows_of(of):
            table.add_row(*(row[name] for name in COLUMNS))
        console.print(table)
    if missing:
        console.print(f"{missing} cells are missing; the same command fills them.")


def tables(cells: Cells) -> Iterable[tuple[str, int, Cells]]:
    """Network by network and number by number the cells that may be compared; uniform pruning goes with each number."""
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = [cell for cell in cells if cell["model"] == model]
        numbers = {cell["evaluations"] for cell in own if cell["agent"] != "uniform"} or {1}
        for evaluations in sorted(numbers):
            yield (
                model,
                evaluations,
                [cell for cell in own if cell["agent"] == "uniform" or cell["evaluations"] == evaluations],
            )


def page(cells: Cells, dense: Mapping[str, float], missing: Sequence[Cell], command: str) -> str:
    """The whole page as Markdown.

    Args:
        cells: as `benchmarks.agents.run` gives them, in the order of the tables.
        dense: accuracy (0..1) of the given weights on the test images, network by network.
        missing: those that the command would still run.
        command: it, with the caller's own paths left out.
    """
    parts = ["# The agents at equal evaluations", _protocol(cells)]
    for model, evaluations, of in tables(cells):
        given = f"Dense, as given: {dense[model]:.2%}." if model in dense else ""
        parts += [f"## {model}, {evaluations} evaluations", given, _table(of), _gaps(of)]
    parts += ["## Accuracy before and after training", ORDER, _order_kept(cells)]
    parts += ["## What the papers claim", CLAIMS, "## Missing", _missing(missing, command)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _protocol(cells: Cells) -> str:
    said = {
        name: _all(cells, name) for name in ("epochs", "search_images", "batch_norm_batches", "test_images")
    }
    compensated = any(cell.get("compensate", "off") != "off" for cell in cells)
    scored = (
        "Candidates are compensated quickly; the best five and the slim network layer by layer, as it is delivered."
        if compensated
        else f"Candidates are only cut, after {said['batch_norm_batches']} batches for batch norm."
    )
    if any(cell.get("depth") == "auto" for cell in cells):
        scored += " Whole blocks may go, too."
    by_closeness = any(cell.get("score") == "closeness" for cell in cells)
    seen = "closeness to the dense network (no labels)" if by_closeness else "accuracy"
    text = f"""
        Written by `python -m benchmarks.agents` from its cells. Every agent searches on the same given weights, which
        do not change, with the same number of evaluations (uniform pruning needs one; *evaluations* is the number
        used). Every slim network is then fine-tuned in the same way, epochs on all training images:
        {said["epochs"]}. *Search
        split* is the {seen} as the search sees it, on at most {said["search_images"]} images. {scored}
        *Before* and *after* fine-tuning are on the
        {said["test_images"]} test images, which neither training nor search has seen. *Predicted* and *measured* are
        shares of the dense network's cost; latency is measured in alternation with the dense network. A budget is
        *kept* by prediction only where the measurement is above it: a run of `compress` would refit its table and
        continue the search. *Minutes* are those of the search. With more than one seed: means and standard deviations.
        Noise is two standard errors of a difference, of the test images, or between seeds where that is larger; where
        cells say which images are right, the images are compared in pairs.
        """
    return textwrap.fill(" ".join(text.split()), width=118)


def _table(of: Cells) -> str:
    brief = any(cell["brief"] for cell in of)
    names = [name for name in COLUMNS if name != "brief" or brief]
    lines = [
        f"| {' | '.join(COLUMNS[name] for name in names)} |",
        "|" + "---|" * len(names),
    ]
    lines += [f"| {' | '.join(row[name] for name in names)} |" for row in rows_of(of)]
    return "\n".join(lines)


def _gaps(of: Cells) -> str:
    """Every learning agent against the knapsack at the same cost, in words."""
    lines = []
    for budget in dict.fromkeys(cell["budget"] for cell in of):
        here = [cell for cell in of if cell["budget"] == budget and not cell["brief"]]
        base = [cell for cell in here if cell["agent"] == BASELINE]
        for agent in LEARNING:
            ours = [cell for cell in here if cell["agent"] == agent]
            if ours and base:
                before, after = (_gap(ours, base, when) for when in ("before", "after"))
                lines.append(
                    f"- {budget}: {agent} is {after} after fine-tuning, and {before} before it."
                    f"{_soon(ours, base)}"
                )
    return "\n".join(lines)


def _gap(ours: Cells, base: Cells, when: str) -> str:
    """The difference of test accuracies, and whether it is more than chance."""
    first, second = ({cell["seed"]: cell[when] for cell in of} for of in (ours, base))
    images, name = base[0]["test_images"], f"right_{when}"
    right = None
    if all(name in cell for cell in (*ours, *base)):
        first_right, second_right = ({cell["seed"]: unpacked(cell[name], images) for cell in of} for of in (ours, base))
        right = first_right, second_right
    found = compared(first, second, images, right)
    return f"{found.verdict} the knapsack ({found.gap:+.2f} points, noise {found.noise:.2f})"


def _soon(ours: Cells, base: Cells) -> str:
    """After how many plans an agent has found one as good on the search split as the knapsack's last."""
    ends = {cell["seed"]: cell["search_accuracy"] for cell in base}
    both = [cell for cell in ours if cell["seed"] in ends]
    soon = [
        next((number for number, accuracy in cell["found"] if accuracy >= ends[cell["seed"]]), None)
        for cell in both
    ]
    there = [number for number in soon if number is not None]
    if not there:
        return " On the search split it does not reach the knapsack's final accuracy." if both else ""
    return (
        f" On the search split it reaches the knapsack's final accuracy after {statistics.fmean(there):.0f} plans "
        f"({len(there)} of {len(both)} seeds)."
    )


def _order_kept(cells: Cells) -> str:
    """Budget by budget, whether plans that are better before fine-tuning are so after it."""
    from scipy.stats import spearmanr

    plans: dict[tuple[str, str], dict[tuple[int, ...], list[Mapping[str, Any]]]] = {}
    for cell in cells:
        if cell["agent"] != "uniform" and not cell["brief"]:
            of = plans.setdefault((cell["model"], cell["budget"]), {})
            of.setdefault(tuple(cell["widths"].values()), []).append(cell)
    lines = ["| network | budget | plans | rank correlation | deviation before | after |", "|" + "---|" * 6]
    for (model, budget), of in plans.items():
        before, after = (
            [statistics.fmean(cell[when] for cell in same) for same in of.values()]
            for when in ("before", "after")
        )
        if len(of) > _FEW:
            spread = " | ".join(f"{100 * statistics.stdev(values):.1f}" for values in (before, after))
            lines.append(
                f"| {model} | {budget} | {len(of)} | {spearmanr(before, after)[0]:+.2f} | {spread} |"
            )
    return "\n".join(lines)


def _missing(missing: Sequence[Cell], command: str) -> str:
    """What is still to be run, shortest where all agents of a budget lack the same seeds."""
    if not missing:
        return "None of what was asked for."
    found: dict[tuple[str, int, str, int], dict[str, list[int]]] = {}
    for cell in missing:
        agents = found.setdefault((cell.model, cell.evaluations, cell.budget, cell.brief), {})
        agents.setdefault(cell.agent, []).append(cell.seed)
    lines = [f"{len(missing)} cells:", ""]
    for (model, evaluations, budget, brief), agents in found.items():
        seeds = {agent: ", ".join(map(str, numbers)) for agent, numbers in agents.items()}
        alike = dict.fromkeys(seeds.values())
        parts = [f"{', '.join(a for a in seeds if seeds[a] == these)} (seeds {these})" for these in alike]
        steps = f", {brief} steps on each" if brief else ""
        lines.append(f"- `{model}`, {evaluations} evaluations{steps}, {budget}: {'; '.join(parts)}")
    said = "This command fills them and continues where it stopped:"
    return "\n".join([*lines, "", said, "", "```bash", command, "```"])


def _kept(of: Cells) -> str:
    if not all(entry["kept"] for entry in of):
        return "no"
    measured = [entry for entry in of if entry["measured_share"] is not None]
    above = any(entry["measured_share"] > entry["target_share"] for entry in measured)
    return "by prediction" if above else "yes"


def _all(cells: Cells, name: str) -> str:
    return " or ".join(f"{value:,}" for value in sorted({cell[name] for cell in cells})) or "no"


def _spread(values: Iterable[float]) -> str:
    percent = [100 * value for value in values]
    text = f"{statistics.fmean(percent):.1f}"
    return text if len(percent) == 1 else f"{text} ± {statistics.stdev(percent):.1f}"
