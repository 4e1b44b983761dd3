"""The pages in a real browser: nothing is cut off at the width of a desktop or a phone, and the console stays empty."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from invented_run import invented_episodes, invented_manifest, write_run
from PIL import Image
from test_explanation import explanation

from compressor import run_recipe
from compressor.core.answers import Answers
from compressor.report import write_report
from compressor.run.finish import report_again
from tests.other_device import OtherDevice
from tests.runs import recipe

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1440, 390)

CUT_OFF = """
() => {
  document.querySelectorAll("details").forEach(each => { each.open = true; });
  const wide = document.documentElement.clientWidth, found = [];
  const named = each =>
    `${each.tagName.toLowerCase()}.${each.getAttribute("class") || ""} "${each.textContent.trim().slice(0, 40)}"`;
  const hidden = each => each && getComputedStyle(each).position === "absolute";
  if (document.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  for (const each of document.querySelectorAll("body *")) {
    const box = each.getBoundingClientRect();
    if (!box.width || hidden(each.closest("thead"))) continue;
    if (each.closest("svg") && each.tagName !== "svg") {
      const figure = each.closest("svg").getBoundingClientRect();
      if (each.tagName === "text" && (box.left < figure.left - 2 || box.right > figure.right + 2))
        found.push(`beyond its figure: ${named(each)}`);
    } else if (box.right > wide + 1 || box.left < -1) found.push(`beyond the edge: ${named(each)}`);
    else if (each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX !== "visible")
      found.push(`cut off: ${named(each)}`);
  }
  return found;
}
"""
"""Returns what lies beyond the window or its own box, with everything unfolded."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser of this machine, else the one that playwright installs."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("there is no browser: apt-get install chromium, or playwright install chromium")
        opened = playwright.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of small runs of each kind, and that of a made-up run in which everything is long."""
    folder = tmp_path_factory.mktemp("pages")
    common: dict[str, Any] = {"agent": "uniform", "epochs": 1, "search": {"max_evaluations": 2}}
    with pytest.MonkeyPatch.context() as patch:
        OtherDevice(1.0).install(patch)
        run_recipe(recipe(**common, budgets={"latency": "80%,60%"}), folder / "front")
    begun = write_run(folder / "begun", {"model": "resnet50", "stages": {"begin": {"started": "2026-01-01"}}}, [])
    return {
        "finished": report_again(Path(shutil.copytree(finished, folder / "finished")))[0],  # with its figures
        "front": folder / "front/report.html",
        "target": folder / "front/latency-60/report.html",
        "begun": write_report(begun),
        "long": write_report(long_run(folder / "long")),
    }


def long_run(folder: Path) -> Path:
    """A run with long names, many classes, every operator explained, and pictures."""
    manifest, name = invented_manifest(), "backbone.features.stage4.block2.branch1.depthwise_convolution"
    manifest["model"] = f"package.module:{name}"
    manifest["groups"][0]["name"] = manifest["layers"][0]["name"] = name
    manifest["explanation"] = explanation()
    manifest["explanation"]["lines"][0].update(name=name, bound="memory traffic", sentence=f"{name} " * 6)
    manifest["search"]["candidates"] += [
        {"reward": 0.9, "costs": {"latency": 1.44}, "source": source} for source in ("sensitivities", "favoured", name)
    ]
    manifest["latency"]["runtime"] = "onnxruntime-cpu 1.31.0+a.long.local.version"
    manifest["notes"].append(f"/a/folder/without/any/space/{name * 3}")
    manifest["warnings"] = {"finetune": f"The training of the slim network collapsed: {name}"}
    write_run(folder, manifest, invented_episodes())
    (folder / "recipe.yaml").write_text(f"model: {name * 4}\n")
    classes = [f"n{label:08d} a class with a long name, number {label}" for label in range(40)]
    truth = list(range(40)) * 3
    pictures = [{"image": place, "file": f"pictures/{place}.jpg"} for place in range(8)]
    slim = [(label + (place % 3 == 0)) % 40 for place, label in enumerate(truth)]
    content = {"classes": classes, "truth": truth, "dense": truth, "slim": slim, "pictures": pictures}
    (folder / "answers.json").write_text(json.dumps(Answers.tolerant(content).plain()))
    (folder / "pictures").mkdir()
    for each in pictures:
        Image.new("RGB", (160, 90), "teal").save(folder / str(each["file"]))
    return folder


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["finished", "front", "target", "begun", "long"])
def test_nothing_is_cut_off_and_nothing_is_complained_of(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    said: list[str] = []
    requested: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(pages[name].as_uri())
    assert page.evaluate(CUT_OFF) == []
    pictures = "() => [...document.images].map(each => each.complete && each.naturalWidth > 0)"
    assert all(page.evaluate(pictures))
    assert bool(page.locator("svg").count()) == (name != "begun")
    page.close()
    assert said == []
    assert [url for url in requested if not url.startswith("data:")] == [pages[name].as_uri()]
