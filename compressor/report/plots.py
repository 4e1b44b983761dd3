"""The figures of the report, from a run's records; None if these are not enough for a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from compressor.core.manifest import Candidate, Episode, Manifest
from compressor.report.formats import cost, count, milliseconds, number, significant
from compressor.report.judgement import COUNTED, NAMES
from compressor.report.svg import COLOURS, Chart, drawing, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 1500  # more points show no more, and each adds a hundred bytes to the page
MOST_SOURCES = 5
MOST_OF_A_KIND = 300
MOST_BANDS = 8
CROWD = 30  # more points than this are drawn small
EDGE = 1.1  # candidates that cost more than this times the target are left out: those near it could not be told apart
MOST_LAYERS = 40
LAYER_HEIGHT = 0.17  # inches of a layer's bar
LONGEST_NAME = 26
LETTERS = 55  # number of characters that fit side by side above a figure
MARKERS = ("o", "s", "D", "^", "v")
UNITS = {"latency": "ms", "flops": "MACs", "macs": "MACs", "params": "params", "memory": "bytes"}


def training_curve(manifest: Manifest, key: str, prefix: str) -> Chart | None:
    """Plot `loss` or `accuracy` over all epochs, with the phases in the background."""
    records = [(row.phase, value) for row in manifest.training if (value := getattr(row, key)) is not None]
    if len(records) < 2:
        return None
    scale = 100 if key == "accuracy" else 1
    values = [float(value) * scale for _, value in records]
    unit = "%" if key == "accuracy" else ""
    with drawing() as (figure, axes):
        _bands(axes, [phase for phase, _ in records])
        axes.plot(
            range(1, len(values) + 1), values, color=COLOURS["slim"], linewidth=1.6, marker=".", markersize=4
        )
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"training {key}{f' ({unit})' if unit else ''}")
        _count_axis(axes, 1, len(values))
        svg = to_svg(figure, prefix)
    phases = ", ".join(dict.fromkeys(phase for phase, _ in records if phase))
    alt = (
        f"Training {key} over {len(values)} epochs"
        + (f" (phases: {phases})" if phases else "")
        + f": {significant(values[0])}{unit} in the first, {significant(values[-1])}{unit} in the last."
    )
    caption = "On the training images, as the weights moved within each epoch."
    if key == "loss" and len({phase == "finetune" for phase, _ in records}) == 2 and _distills(manifest):
        caption += " With a trained dense network as the teacher, fine-tuning has a loss of another scale."
    return Chart(svg, f"Training {key}", alt, caption)


def _distills(manifest: Manifest) -> bool:
    training = manifest.recipe.get("training")
    return isinstance(training, dict) and bool(training.get("distill_weight"))


def reward_curve(manifest: Manifest, episodes: Sequence[Episode], prefix: str) -> Chart | None:
    """Plot every episode's reward, and the best so far of those that meet the budgets."""
    known = [episode for episode in episodes if episode.reward is not None]
    if len(known) < 2:
        return None
    rewards = [float(episode.reward or 0) for episode in known]
    places = list(range(1, len(rewards) + 1))
    kept = [
        reward if within_budgets(manifest, row) else -math.inf
        for reward, row in zip(rewards, known, strict=True)
    ]
    best = list(accumulate(kept, max))
    start = next((i for i, reward in enumerate(best) if reward > -math.inf), len(best))
    shown = thinned(len(rewards))
    with drawing() as (figure, axes):
        _bands(axes, [episode.phase for episode in known])
        axes.plot(
            [places[i] for i in shown],
            [rewards[i] for i in shown],
            linestyle="none",
            marker="o",
            markersize=3,
            markeredgewidth=0,
            alpha=0.55,
            color=COLOURS["slim"],
            label="an episode",
        )
        axes.step(
            places[start:],
            best[start:],
            where="post",
            color=COLOURS["accent"],
            linewidth=1.8,
            label="best so far within the budgets",
        )
        axes.set_xlabel("episode")
        axes.set_ylabel(reward_name(manifest))
        _count_axis(axes, 1, len(rewards))
        figure.legend(loc="outside lower center", ncols=2)
        svg = to_svg(figure, prefix)
    found = "None of them keeps the budgets, as predicted."
    if start < len(best):
        found = (
            f"The best reward within the budgets, {significant(best[-1], 4)}, was reached in episode "
            f"{best.index(best[-1]) + 1}."
        )
    left_out = "" if len(shown) == len(known) else f" {len(shown):,} of {len(known):,} episodes are drawn."
    alt = f"Reward over {len(rewards)} episodes. {found}"
    return Chart(svg, "Reward over the episodes", alt, f"{found}{left_out}")


def candidate_scatter(manifest: Manifest, episodes: Sequence[Episode], prefix: str) -> Chart | None:
    """Plot reward against cost of all scored candidates, with the chosen network and the limit."""
    candidates = scored_candidates(manifest)
    name = scatter_cost(manifest, candidates, episodes)
    points = [
        (candidate, place) for candidate in candidates if (place := _place(manifest, candidate, name)) is not None
    ]
    known = {place for _, place in points}  # a search may also list every episode as a candidate
    visited = [place for episode in episodes if (place := _place(manifest, episode, name)) and place not in known]
    if not name or len(points) + len(visited) < 2:
        return None
    unit, target = cost_unit(manifest, name)
    pick = chosen(manifest)
    everything = [place[0] for _, place in points] + [place[0] for place in visited]
    edge = _edge(everything, target)
    points = [(candidate, place) for candidate, place in points if place[0] <= edge]
    visited = [place for place in visited if place[0] <= edge]
    groups = _by_source(points)
    with drawing() as (figure, axes):
        if visited:
            _dots(axes, visited, "during the search", "muted", ".", crowded=True)
        for index, (source, members) in enumerate(groups):
            _dots(axes, members, shortened(source), f"c{index + 1}", MARKERS[index], crowded=len(members) > CROWD)
        place = _place(manifest, pick, name) if pick is not None else None
        if place is not None:
            ring: dict[str, Any] = {
                "markerfacecolor": "none",
                "markeredgecolor": COLOURS["accent"],
                "markeredgewidth": 2,
            }
            axes.plot(*place, linestyle="none", marker="o", markersize=11, label="chosen", **ring)
        if target is not None:
            axes.axvline(target, color=COLOURS["bad"], linewidth=1, linestyle="--", label="target")
        label = NAMES.get(name, name)
        axes.set_xlabel(f"predicted {label}{f' ({unit})' if unit and unit not in COUNTED else ''}")
        axes.set_ylabel(reward_name(manifest))
        _cost_ticks(axes, unit)
        axes.grid(axis="x")
        axes.margins(y=0.1)
        figure.legend(loc="outside lower center", ncols=3)
        svg = to_svg(figure, prefix)
    alt = f"Reward against {NAMES.get(name, name)} of {len(points)} candidates and {len(visited)} episodes."
    if pick is not None and place is not None:
        alt += f" The chosen one costs {cost(place[0], unit)} and has reward {significant(place[1], 4)}."
    caption = "Left is cheaper, up is better. The table below says what the sources are."
    if beyond := [each for each in everything if each > edge]:
        caption += (
            f" Not drawn: {len(beyond)} far to the right, up to {cost(max(beyond), unit)}, such as those that measure "
            "what a group costs."
        )
    if max(len(visited), *(len(members) for _, members in groups), 0) > MOST_OF_A_KIND:
        caption += f" Of each kind {MOST_OF_A_KIND} are drawn."
    return Chart(svg, "What was tried", alt, caption)


def _edge(costs: Sequence[float], target: float | None) -> float:
    """Return the cost up to which candidates are drawn: near the target if there are some, else all."""
    if target is None or sum(each <= EDGE * target for each in costs) < 2:
        return math.inf
    return EDGE * target


def reward_name(manifest: Manifest) -> str:
    """Name the reward for an axis: the score on the search split, if it is nothing else."""
    measured = manifest.recipe.get("search")
    closeness = isinstance(measured, dict) and measured.get("measure") == "closeness"
    name = "closeness to the dense network" if closeness else manifest.accuracy.metric
    same = all(row.accuracy is None or row.accuracy == row.reward for row in scored_candidates(manifest))
    return f"{name}, search split" if same else f"reward ({name} and costs)"


def layer_bars(manifest: Manifest, key: str, prefix: str) -> Chart | None:
    """Plot each layer's share of the dense network's MACs (`key` macs) or time (`key` ms), dense behind slim.

    Of many layers the largest are drawn.
    """
    both = [(getattr(layer, f"dense_{key}"), getattr(layer, f"slim_{key}")) for layer in manifest.layers]
    pairs = [
        (place, float(dense), float(slim))
        for place, (dense, slim) in enumerate(both, start=1)
        if dense is not None and slim is not None
    ]
    total = sum(dense for _, dense, _ in pairs)
    if total <= 0:
        return None
    largest = sorted(pairs, key=lambda pair: (-max(pair[1:]), pair[0]))[:MOST_LAYERS]
    drawn = sorted(largest)
    names = [shortened(manifest.layers[place - 1].name or "unnamed") for place, _, _ in drawn]
    with drawing(height=1.0 + LAYER_HEIGHT * len(drawn)) as (figure, axes):
        rows = range(len(drawn))
        for column, role, label, width in ((1, "dense", "dense", 0.86), (2, "slim", "slim", 0.5)):
            shares = [100 * pair[column] / total for pair in drawn]
            axes.barh(rows, shares, height=width, color=COLOURS[role], label=label, linewidth=0)
        axes.set_yticks(rows, names)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_xlabel(f"% of the dense layers' {'MACs' if key == 'macs' else 'time'}")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        figure.legend(loc="outside upper right", ncols=2)
        svg = to_svg(figure, prefix)
    kept = sum(slim for _, _, slim in pairs)
    shown = count if key == "macs" else milliseconds
    alt = f"Bars of {len(pairs)} layers, dense and slim: {shown(total)} in all before, {shown(kept)} after."
    title = "MACs by layer" if key == "macs" else "Time by layer"
    which = "" if len(drawn) == len(pairs) else f" The {len(drawn)} largest of {len(pairs)} layers are drawn."
    caption = f"In the order of execution; in all {shown(total)} dense, {shown(kept)} slim.{which}"
    return Chart(svg, title, alt, caption)


def shortened(name: str) -> str:
    """Return a layer's name with its middle left out if it is too long for a figure.

    >>> shortened("backbone.body.layer4.2.conv3.with.more")
    'backbone.bod…v3.with.more'
    """
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def scored_candidates(manifest: Manifest) -> list[Candidate]:
    """Return the candidates of the search that have a reward."""
    candidates = manifest.search.candidates if manifest.search is not None else []
    return [row for row in candidates if row.reward is not None]


def chosen(manifest: Manifest) -> Candidate | None:
    """Return the candidate that became the slim network: the marked one, else the last with the best reward.

    The last one, because the final choice is scored again with the final weights.
    """
    candidates = scored_candidates(manifest)
    marked = [candidate for candidate in candidates if candidate.chosen]
    best = manifest.search.best_reward if manifest.search is not None else None
    same = [each for each in candidates if best is not None and abs(float(each.reward or 0) - best) < 1e-9]
    found = marked or same
    return found[-1] if found else None


def scatter_cost(manifest: Manifest, candidates: Sequence[Episode], episodes: Sequence[Episode]) -> str:
    """Return the cost on the scatter plot's axis: the first budget's that was recorded, else any recorded, else ''."""
    recorded = [name for record in (*candidates, *episodes) for name in record.costs]
    wanted = [budget.name for budget in manifest.budgets]
    return next((name for name in wanted if name in recorded), recorded[0] if recorded else "")


def within_budgets(manifest: Manifest, record: Episode) -> bool:
    """Return whether no recorded cost of a candidate or an episode is above its budget's target."""
    prices = [(price(manifest, record, budget.name), budget.target) for budget in manifest.budgets]
    return not any(found is not None and found > target * (1 + 1e-9) for found, target in prices)


def price(manifest: Manifest, record: Episode, name: str) -> float | None:
    """Return a recorded cost in the unit in which the run's target is shown; None if it was not recorded.

    The search counts in milliseconds of its table, the page in those of the last measurement; the targets in both
    convert them.
    """
    found = record.costs.get(name)
    searched = manifest.search.targets.get(name) if manifest.search is not None else None
    shown = next((budget.target for budget in manifest.budgets if budget.name == name), None)
    return found if found is None or not searched or shown is None else found * shown / searched


def cost_unit(manifest: Manifest, name: str) -> tuple[str, float | None]:
    """Return the unit of a cost and its budget's target, if known."""
    for budget in manifest.budgets:
        if budget.name == name:
            return budget.unit, number(budget.target)
    return UNITS.get(name, ""), None


def thinned(length: int, most: int = MOST_POINTS) -> list[int]:
    """Return indices of at most `most` of `length` records, evenly spread, including the first and the last."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _place(manifest: Manifest, record: Episode, name: str) -> tuple[float, float] | None:
    found = price(manifest, record, name)
    return None if found is None or record.reward is None else (found, record.reward)


def _by_source(
    points: list[tuple[Candidate, tuple[float, float]]],
) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return the points of each source, the largest first; sources beyond the palette are merged."""
    found: dict[str, list[tuple[float, float]]] = {}
    for candidate, place in points:
        found.setdefault(candidate.source or "source not recorded", []).append(place)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    head, tail = ordered[: MOST_SOURCES - 1], ordered[MOST_SOURCES - 1 :]
    if len(tail) > 1:
        tail = [("other sources", [place for _, places in tail for place in places])]
    return head + tail


def _bands(axes: Axes, phases: list[str]) -> None:
    """Shade every other phase, with its name on top if there is room; alternating phases have no bands."""
    spans = [(phase, len(list(members))) for phase, members in groupby(phases)]
    if len(spans) > MOST_BANDS:
        return
    start = 0.5
    for index, (phase, length) in enumerate(spans):
        end = start + length
        if index % 2:
            axes.axvspan(start, end, color=COLOURS["band"], linewidth=0, zorder=0)
        if (end - start) / len(phases) * LETTERS >= len(phase):
            look: dict[str, Any] = {
                "transform": axes.get_xaxis_transform(),
                "color": COLOURS["muted"],
                "fontsize": 8.5,
            }
            axes.text(start, 1.01, f" {phase}", **look)
        start = end


def _count_axis(axes: Axes, first: int, last: int) -> None:
    """Set a horizontal axis that counts from `first` to `last`."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _cost_ticks(axes: Axes, unit: str) -> None:
    """Set few ticks; counts and bytes with their prefix (540 M), milliseconds as they are."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    if unit in ("MACs", "params", "bytes"):
        axes.xaxis.set_major_formatter(EngFormatter())
    else:
        axes.ticklabel_format(axis="x", useOffset=False, style="plain")


def _dots(
    axes: Axes, places: Sequence[tuple[float, float]], label: str, role: str, marker: str, *, crowded: bool
) -> None:
    """Draw points of one kind: small and faint if there are many, and no more than are useful."""
    shown = [places[i] for i in thinned(len(places), MOST_OF_A_KIND)]
    look: dict[str, Any] = {"marker": marker, "markersize": 3.5 if crowded else 5.5}
    if crowded:
        look |= {"alpha": 0.5, "markeredgewidth": 0}
    axes.plot(*zip(*shown, strict=True), linestyle="none", color=COLOURS[role], label=label, **look)
