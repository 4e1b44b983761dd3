"""The page as a whole: what it says of a finished run, what it refuses to say, and that it is safe."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from invented_run import invented_episodes, invented_manifest, write_run

from compressor.core.errors import CompressorError
from compressor.report import write_report

VOID = {"meta", "br", "img", "link", "hr", "input"}
SECTIONS = ["budgets", "comparison", "removed", "search", "speed", "training", "export", "repeat"]
"""Those of every page; others are there if there is something to show."""
PYTHONS = re.compile(r"\b(?:None|nan|inf)\b")
"""What Python prints for values that are missing or no numbers: nothing that a reader should see."""


class Page(HTMLParser):
    """Checks that every element is closed in its order, and collects what the tests look at."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)

    @property
    def sections(self) -> list[str | None]:
        return [
            attributes["id"] for tag, attributes in self.elements if tag == "section" and "id" in attributes
        ]

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]


def page_of(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def changed(folder: Path, manifest: dict[str, Any], **fields: Any) -> Page:
    """The page of the same folder with some of the manifest's fields replaced; None takes a field out."""
    left = {key: value for key, value in {**manifest, **fields}.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(left))
    return page_of(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """The folder and the page of the made-up run as it is, for tests that only read them."""
    folder = write_run(tmp_path_factory.mktemp("whole") / "run", invented_manifest(), invented_episodes())
    return folder, page_of(folder)


def test_a_finished_run_answers_every_question(whole: tuple[Path, Page]) -> None:
    run_folder, text = whole[0], whole[1].text
    for answer in (
        "Budget kept: latency 1.45 ms measured, 3.3% under the target of 1.50 ms; MACs 87.6 M counted",
        "2.07× faster than 3.00 ms",  # noqa: RUF001
        "Invented CPU 3000 (local), onnxruntime-cpu 1.31.0, FP32, 2 January 2025",
        "Accuracy against latency",
        "−0.28 points, dense 98.33%",  # noqa: RUF001
        "Latency, predicted 2.97 ms 1.40 ms 47.1%",
        "Latency, measured (p99) – 1.81 ms –",  # noqa: RUF001
        "Parameters 23.5 M 9.41 M 40.0%",
        "360 images were tested, so one image more or less is 0.28 points.",
        "median of 1,250 runs: local, onnxruntime-cpu 1.31.0, fp32, batch 1, threads 1",
        "Round 1 1.46 ms 1.62 ms 54.0% (53.5% to 54.5%) 1.50 ms 8.0% over missed",
        "37 of 37 groups lost channels; 52.8% of all prunable channels remain.",
        "layer1.0.downsample.0 coupled 128 of 256, 50%",
        "fc its outputs are the classes",
        "64 networks scored, 60 episodes, 3 min 34 s.",
        "Of that time: evaluation 56.5%, training 37.3%, agent 6.2%.",
        "reward 0.9511, more than the 0.9102 of uniform pruning within the same budgets",
        "follows arXiv 2403.19490, as published except where the table says otherwise. As published: environment model "
        "(300 updates).",
        "episodes near the best plan 0.75 0 default of search.settings.near_share they find better plans",
        "alignment of the weights off 1e-05 to 0.0001 recipe of search.align_weight",
        "31.5% of the dense one's MACs in 48.3% of its measured latency: 75% of the relative saving",
        "layer4.1.conv2: MACs −75.0%, time −1.0%",  # noqa: RUF001
        "differ by at most 3.4e-06, 4.1e-07 on average (1e-04 allowed)",
        "To get an engine, install the extra of the GPU",
        f"compress --recipe {run_folder}/recipe.yaml",
        "Invented CPU 3000",
        "2025-01-02 03:01:00 UTC",
        "ab" * 32,
        "1,797 small images",
    ):
        assert answer in text
    assert "model.onnx 2.05 kB" in text


def test_the_page_is_whole_by_itself(whole: tuple[Path, Page]) -> None:
    page = whole[1]
    assert len(page.source.encode()) < 500_000
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 7
    assert not {"script", "img", "link", "iframe", "image", "object"} & set(tags)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page.elements
    outside = [
        value for name in ("src", "href", "xlink:href") for value in page.attributes(name) if "//" in value
    ]
    assert outside == []
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


def test_identifiers_are_unique_and_references_resolve(whole: tuple[Path, Page]) -> None:
    page = whole[1]
    names = page.attributes("id")
    assert len(names) == len(set(names))
    wanted = [
        value[1:] for name in ("href", "xlink:href") for value in page.attributes(name) if value[0] == "#"
    ]
    assert set(wanted) <= set(names)
    assert set(re.findall(r"url\(#([^)]*)\)", page.source)) <= set(names)


def test_cells_are_not_drawn_as_the_banner(whole: tuple[Path, Page]) -> None:
    page = whole[1].source
    style = page[page.index("<style>") : page.index("</style>")]
    blocks = set(re.findall(r'<(?:div|section|header) class="(\w+)', page))
    cells = set(re.findall(r'<t[dh][^>]* class="(\w+)', page))
    assert "banner" in blocks
    assert {"verdict", "num"} <= cells
    assert [name for name in cells - {"num"} if f"section, .{name} " in style or f".{name} {{ border" in style] == []


def test_every_figure_has_words(whole: tuple[Path, Page]) -> None:
    page = whole[1]
    charts = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(charts) == 7
    assert all(len(attributes["aria-label"] or "") > 30 for attributes in charts)
    assert "#01" not in page.source  # every colour that stands for a role was replaced by the page's variable


def test_the_same_files_give_the_same_bytes(whole: tuple[Path, Page], manifest: dict[str, Any]) -> None:
    run_folder, first = whole[0], whole[1].source.encode()
    # what the pipeline writes after the report: the end of its stage, and the checksum of the page itself
    manifest["stages"]["report"]["seconds"] = 99.0
    manifest["files"]["report.html"] = "12" * 32
    assert changed(run_folder, manifest).source.encode() == first


def test_hostile_names_are_text(tmp_path: Path, manifest: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>\"'$\\frac$ ]]> --> {{ 7*7 }}"
    manifest["model"] = manifest["data"] = evil
    manifest["groups"][0]["name"] = manifest["layers"][0]["name"] = manifest["notes"][0] = evil
    manifest["search"]["candidates"][0]["source"] = evil
    manifest["training"][0]["phase"] = evil
    manifest["files"] = {"javascript:alert(1)": "00", "../../etc/passwd": "11", "/etc/passwd": evil}
    folder = write_run(tmp_path / "run", manifest, [{**row, "phase": evil} for row in invented_episodes()])
    (folder / "recipe.yaml").write_text(f"model: {evil}")
    page = page_of(folder)
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(evil) >= 6
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert "./javascript%3Aalert%281%29" in links
    assert not any("passwd" in (link or "") for link in links)


def test_any_script_is_drawn_without_a_warning(
    tmp_path: Path, manifest: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    scripts = ["网络", "شبكة", "🙂"]
    for candidate, script in zip(manifest["search"]["candidates"], scripts, strict=False):
        candidate["source"] = script
    page = page_of(write_run(tmp_path / "run", manifest, invented_episodes()))
    assert all(script in page.text for script in scripts)
    assert [str(each.message) for each in recwarn if "Glyph" in str(each.message)] == []


def test_an_empty_manifest_says_that_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    text = page_of(tmp_path).text
    for sentence in (
        "This run is not finished, so there is no verdict (no stage has finished yet).",
        f"compress --resume {tmp_path}",
        "No budget is recorded for this run.",
        "Neither network has been measured or counted yet.",
        "The latency was not measured.",
        "The manifest does not say what was removed.",
        "This run has not searched yet",
        "this run does not have them all",
        "Fewer than two epochs of training are recorded",
        "The exported file was not compared with the trained network.",
        "No engine was built.",
        "This folder holds no recipe.yaml",
    ):
        assert sentence in text
    assert re.findall(r"\d+(?:\.\d+)? ?(?:ms|%|MB)", text) == []


@pytest.mark.parametrize("wrong", [[], {}, "text", 3, [None, 1, "x"], {"x": None, "y": {"z": []}}])
def test_every_part_may_be_wrong(tmp_path: Path, manifest: dict[str, Any], wrong: Any) -> None:
    page = page_of(write_run(tmp_path / "run", dict.fromkeys(manifest, wrong), []))
    assert set(SECTIONS) <= set(page.sections)
    assert "This run is not finished, so there is no verdict" in page.text
    assert PYTHONS.findall(page.text) == []


@pytest.mark.parametrize("turn", range(4))
def test_any_half_of_the_keys_may_be_missing(run_folder: Path, manifest: dict[str, Any], turn: int) -> None:
    missing = [key for place, key in enumerate(sorted(manifest)) if place >> (turn // 2) & 1 == turn % 2]
    page = changed(run_folder, manifest, **dict.fromkeys(missing))
    assert set(SECTIONS) <= set(page.sections)
    model = "model not recorded" if "model" in missing else "resnet50"
    data = "data not recorded" if "data" in missing else "digits"
    assert page.text.startswith(f"{model} on {data}: ")
    assert PYTHONS.findall(page.text) == []


def with_leaves(value: Any, wrong: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: with_leaves(inner, wrong) for key, inner in value.items()}
    return [with_leaves(inner, wrong) for inner in value] if isinstance(value, list) else wrong(value)


@pytest.mark.parametrize("wrong", [None, "7", -1, 0, 1e30, 10**400, True, {"a": None}])
def test_every_value_may_be_wrong(tmp_path: Path, manifest: dict[str, Any], wrong: Any) -> None:
    broken = with_leaves(manifest, lambda _: wrong)
    page = page_of(write_run(tmp_path / "run", broken, with_leaves(invented_episodes(), lambda _: wrong)))
    assert set(SECTIONS) <= set(page.sections)
    assert PYTHONS.findall(page.text) == []


@pytest.mark.parametrize("seed", range(4))
def test_some_values_may_be_wrong(tmp_path: Path, manifest: dict[str, Any], seed: int) -> None:
    chance = random.Random(seed)

    def spoil(value: Any) -> Any:
        return chance.choice([None, "x", -1, 0, [], 2.5]) if chance.random() < 0.2 else value

    page = page_of(
        write_run(tmp_path / "run", with_leaves(manifest, spoil), with_leaves(invented_episodes(), spoil))
    )
    assert set(SECTIONS) <= set(page.sections)
    assert PYTHONS.findall(page.text) == []


@pytest.mark.usefixtures("undrawn")
def test_a_device_that_was_not_reached(run_folder: Path, manifest: dict[str, Any]) -> None:
    latency = {"device": "jetson-nano", "predicted_ms": 9.9, "measured_ms": None, "estimated": True}
    budget = {
        "name": "latency",
        "unit": "ms",
        "target": 10,
        "dense": 20,
        "predicted": 9.9,
        "measured": None,
        "kept": None,
    }
    text = changed(run_folder, manifest, latency=latency, budgets=[budget]).text
    assert "Only predicted: latency 9.90 ms, 1.0% under the target of 10.0 ms." in text
    assert "estimated, not measured on it" in text
    assert "The latency was not measured on jetson-nano." in text
    assert "Latency, measured" not in text


def test_layers_without_times_are_ranked_by_macs(run_folder: Path, manifest: dict[str, Any]) -> None:
    for layer in manifest["layers"]:
        del layer["dense_ms"], layer["slim_ms"]
    page = changed(run_folder, manifest)
    assert "No layer has a time in this run, so they are ordered by MACs." in page.text
    assert "Where the work is now" in page.text
    assert [tag for tag, _ in page.elements].count("svg") == 6
    assert "Time, dense" not in page.text


def test_a_damaged_episode_log_is_counted(run_folder: Path) -> None:
    log = run_folder / "search" / "episodes.jsonl"
    log.write_text("not json\n[1]\n" + log.read_text() + '{"episode": 60, "rew')
    text = page_of(run_folder).text
    assert "2 lines of the episode log could not be read and are left out." in text
    assert re.search(r"The best reward within the budgets, 0\.9\d+, was reached in episode 59\.", text)


def test_what_breaks_a_budget_is_not_the_best(run_folder: Path, manifest: dict[str, Any]) -> None:
    log = run_folder / "search" / "episodes.jsonl"
    over = {"episode": 60, "phase": "final", "reward": 0.99, "costs": {"latency": 1.51}}
    log.write_text(log.read_text() + json.dumps(over) + "\n")
    manifest["search"]["candidates"].append({"reward": 0.99, "costs": {"latency": 1.51}, "source": "final"})
    manifest["search"]["candidates"].append({"reward": 0.98, "costs": {"latency": 1.52}, "source": "policy"})
    text = changed(run_folder, manifest).text
    assert "was reached in episode 59." in text
    assert "final the best ones, scored again at the end 2 0.9511 1.45 ms chosen" in text
    assert "policy the agent's policy, without chance 1 0.9800 1.52 ms, over a budget" in text


def test_a_long_search_stays_a_small_page(tmp_path: Path, manifest: dict[str, Any]) -> None:
    episodes = [
        {"reward": (place * 37 % 1000) / 1000, "costs": {"latency": 1 + place / 1e5}, "phase": "joint"}
        for place in range(20_000)
    ]
    manifest["search"]["candidates"] += [{**row, "source": row["phase"]} for row in episodes[::2]]
    page = page_of(write_run(tmp_path / "run", manifest, episodes))
    assert len(page.source.encode()) < 1_000_000
    assert "Of each kind 300 are drawn." in page.text
    assert "1,500 of 20,000 episodes are drawn." in page.text


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match="nothing to report") as error:
        write_report(tmp_path)
    assert "compress report RUN" in error.value.hint
    (tmp_path / "manifest.json").write_text("[1, 2]")
    with pytest.raises(CompressorError, match="holds list, expected an object"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
