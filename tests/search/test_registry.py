"""Agents by name: the toolkit's, and those of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compressor import register_agent
from compressor.cli import main
from compressor.core import plugins
from compressor.core.agents import AGENTS, agent_class, registry
from compressor.core.errors import CompressorError
from compressor.recipe import AgentSettings, NoSettings, Recipe, recipe_schema
from compressor.search.base import Agent
from compressor.search.records import SearchResult
from tests.architecture import code_of, installed
from tests.search.bench import Bench, Killed

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def registered_meanwhile() -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    for name in AGENTS:
        agent_class(name)
    saved = dict(registry.classes)
    modules = set(sys.modules)
    plugins.load_plugins.cache_clear()
    yield
    registry.classes.clear()
    registry.classes.update(saved)
    plugins.load_plugins.cache_clear()
    for name in set(sys.modules) - modules:
        if name.startswith(("mysloped", "mybroken")):
            del sys.modules[name]


def python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


class Plain(Agent):
    """Takes the uniform plan."""

    name = "plain"
    Settings = NoSettings

    def _search(self, run: Any) -> SearchResult:
        raise NotImplementedError


def test_settings_say_how_many_plans_are_scored() -> None:
    def scored(agent: str, most: int = 100, **settings: Any) -> int:
        found = agent_class(agent).Settings(**settings).scored_plans(most, joint_epochs=2, groups=10)
        assert isinstance(found, int)
        return found

    assert scored("uniform") == 1
    assert [scored("knapsack"), scored("knapsack", 30), scored("random", evaluations=7)] == [50, 30, 7]
    assert scored("stepwise") == 100
    assert scored("joint") == 2 * 10 + 20 + 2 * 10 + 8  # groups alone, the replay, two rounds, the final choice


def test_the_toolkits_agents_register_themselves() -> None:
    for name, module in AGENTS.items():
        assert registry.classes[name].__module__ == module
    assert registry.names() == list(AGENTS)


def test_the_page_makes_an_agent_that_searches_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mysloped.py").write_text(code_of("Add an agent"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CompressorError, match="no agent called 'sloped'"):
        agent_class("sloped")
    import_module("mysloped")  # as a script does before it calls `compress`
    assert agent_class("sloped").__module__ == "mysloped"
    assert Recipe(model="resnet50", agent="sloped").resolved().agent == "sloped"

    def bench(name: str) -> Bench:
        (tmp_path / name).mkdir(exist_ok=True)
        return Bench(tmp_path / name)

    whole = bench("whole").search("sloped", settings={"evaluations": 7})
    assert whole.reward == max(each.reward for each in whole.candidates)
    assert len({each.widths for each in whole.candidates}) > 3
    with pytest.raises(Killed):
        bench("killed").search("sloped", settings={"evaluations": 7}, kill_after=4)
    again = bench("killed").search("sloped", settings={"evaluations": 7})
    assert (again.widths, again.candidates) == (whole.widths, whole.candidates)


def test_an_installed_package_brings_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "mypackage", "mysloped", code_of("Add an agent"))
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.load_plugins() == ("mysloped",)
    assert registry.names() == [*AGENTS, "sloped"]
    assert agent_class("sloped").__module__ == "mysloped"


def test_the_command_line_finds_the_agent_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, "mypackage", "mysloped", code_of("Add an agent"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def command(agent: str, steepest: str) -> tuple[object, str, str]:
        options = ["--model", "tests.nets:tiny", "--flops", "50%", "--dry-run", "--agent", agent]
        options += ["--set", f"search.settings.steepest={steepest}"]
        monkeypatch.setattr(sys, "argv", ["compress", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, " ".join(printed.err.split()), printed.out

    code, told, _ = command("sloped", "2")
    assert (code, "steepest is 2, expected more than 0 and less than 1" in told) == (2, True), told
    code, told, _ = command("slopd", "0.3")
    assert (code, "Did you mean: sloped" in told) == (2, True), told
    code, told, plan = command("sloped", "0.3")
    assert (code, "agent: sloped" in plan) == (0, True), told


def test_the_settings_of_every_agent_are_described() -> None:
    schema = recipe_schema()
    for name in AGENTS:
        for field, described in schema["$defs"][f"{name}_settings"].get("properties", {}).items():
            assert described["description"], (name, field)
    of_joint = next(rule for rule in schema["allOf"] if rule["if"]["properties"]["agent"]["const"] == "joint")
    assert of_joint["then"]["properties"]["search"]["properties"]["settings"] == {"$ref": "#/$defs/joint_settings"}
    assert "required" not in of_joint["if"]  # the default


def test_a_recipe_refuses_a_setting_that_its_agent_has_not() -> None:
    for agent, settings, words in (
        ("knapsack", {"near_share": 0.5}, "The agent knapsack has no setting 'near_share'"),
        ("joint", {"near_share": 75}, "The setting near_share is 75, expected 0 to 1"),
        ("constrained", {"near_share": 1.0}, "near_share is 1.0, expected 0 or more and less than 1"),
        ("constrained", {"cap": 2.0}, "cap is 2.0, expected more than 0 and at most 1"),
    ):
        with pytest.raises(CompressorError, match=words):
            Recipe(model="resnet18", agent=agent, search={"settings": settings})  # type: ignore[arg-type]


def test_a_package_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "mybroken", "mybroken_agents", "import nothing_like_this\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # it stays refused
        with pytest.raises(CompressorError) as caught:
            agent_class("sloped")
        for part in ("package mybroken", "module mybroken_agents", "nothing_like_this", "line 1"):
            assert part in caught.value.message
        assert "pip uninstall mybroken" in caught.value.hint


def test_a_name_that_is_taken() -> None:
    assert register_agent(Plain) is Plain
    register_agent(Plain)  # the same class once more, as after a reload

    class Other(Plain):
        pass

    with pytest.raises(CompressorError, match=r"'plain' of \S+:\S+Other is taken by \S*test_registry:Plain\."):
        register_agent(Other)
    Other.name = "uniform"
    with pytest.raises(CompressorError, match=r"Other is taken by compressor.search.uniform:UniformAgent\."):
        register_agent(Other)


def test_classes_that_are_no_agents() -> None:
    class NoName(Agent):
        Settings = NoSettings

    class Colon(Plain):
        name = "my.package:Agent"

    class Unset(Agent):
        name: ClassVar[str] = "unset"

    class Required(Plain):
        class Settings(AgentSettings):
            number: int

    with pytest.raises(CompressorError, match=r"setting number of the agent .*Required has no default"):
        register_agent(Required)
    for kind, words in ((NoName, "name None"), (Colon, "my.package:Agent"), (Unset, "no settings")):
        with pytest.raises(CompressorError, match=words):
            register_agent(kind)
    with pytest.raises(CompressorError, match="no subclass of Agent"):
        register_agent(object)  # type: ignore[type-var]


def test_help_and_names_import_neither_torch_nor_agents(tmp_path: Path) -> None:
    code = """
import sys
from contextlib import suppress
from compressor.cli import main
from compressor.core.agents import AGENTS
with suppress(SystemExit):
    main()
print(len(AGENTS), [name for name in ("torch", "numpy", *AGENTS.values()) if name in sys.modules])
"""
    done = python(tmp_path, code, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f"{len(AGENTS)} []")
    assert "joint, constrained" in done.stdout
