"""Tables that the user has measured are kept, found by name, and not mixed up with others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.latency.provider import known_devices
from compressor.latency.remote_table import table_of_results
from compressor.latency.stored import keep
from compressor.latency.table import LatencyTable, find_table, tables_folder
from compressor.pruning.space import PruningSpace
from compressor.recipe import parse_recipe
from compressor.run.device import latency_table
from tests.latency.conftest import SmallNet
from tests.latency.remote_bundle import altered, respoil

pytestmark = pytest.mark.usefixtures("own_tables")


def test_kept_tables_are_found(measured: Path, space: PruningSpace, said: list[str]) -> None:
    table = table_of_results(measured)
    path = keep(table)
    assert path.parent == tables_folder()
    assert LatencyTable.load("my-orin", precision="fp16").predict(space) == table.predict(space)
    assert [entry.how for entry in known_devices() if entry.name == "my-orin"] == [
        f"measured by you on {table.fields.date}, 1 network"
    ]
    assert keep(table) == path  # the same measurements again change nothing
    with pytest.raises(CompressorError, match="already stored as the device my-orin"):
        keep(table_of_results(measured, "other-name"))
    with pytest.raises(
        CompressorError, match=r"no latency table of my-orin in int8\. It was measured in fp16"
    ):
        find_table("my-orin", "int8")
    path.write_text("{")
    assert [entry.name for entry in known_devices()].count("my-orin") == 0
    assert any("is damaged" in line and "skipped" in line for line in said)


def test_a_shipped_name_is_taken_only_by_its_own_module(measured: Path, said: list[str]) -> None:
    with pytest.raises(
        CompressorError, match=r"jetson-nano has compute capability 5\.3; this was measured on Orin"
    ):
        keep(table_of_results(measured, "jetson-nano"))
    other = table_of_results(measured, "jetson-orin-nano-8gb")
    other.fields = other.fields.model_copy(
        update={"device": other.fields.device.model_copy(update={"sku": "NVIDIA Jetson AGX Orin Developer Kit"})}
    )
    with pytest.raises(CompressorError, match=r"is a Jetson Orin Nano 8GB, and the board is a NVIDIA Jetson AGX Orin"):
        keep(other)
    keep(table_of_results(measured, "jetson-orin-nano-8gb"))
    assert not find_table("jetson-orin-nano-8gb", "fp16").estimated
    assert any("replaces the shipped one" in line for line in said)
    assert find_table("jetson-orin-nano-8gb", "fp32").estimated


class Straight(SmallNet):
    """The small network without its addition: other groups, but no operator that it has not."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(self.one(self.stem(x))))
        return self.head(self.narrow(self.deep(self.wide(x))).mean((2, 3)))


def test_other_networks_keep_the_shipped_estimate(
    measured: Path, space: PruningSpace, said: list[str]
) -> None:
    name = "jetson-orin-nano-8gb"
    table = table_of_results(measured, name)
    estimated = LatencyTable.load(name, "fp16", space=space)
    assert estimated.estimated
    keep(table)
    assert [entry.how.split()[0] for entry in known_devices() if entry.name == name] == ["estimated:", "measured"]
    assert LatencyTable.load(name, "fp16", space=space).to_json() == table.to_json()
    assert any("replaces the shipped one" in line for line in said)

    said.clear()
    larger = PruningSpace(SmallNet().eval(), torch.zeros(1, 3, 24, 24), granularity=8)
    found = LatencyTable.load(name, "fp16", space=larger)
    assert found.estimated
    assert found.predict(larger) > estimated.predict(space)
    (line,) = said
    assert re.search(
        r"other networks only: .* lacks 4 of .* operators, such as: .* network's latency is estimated", line
    )
    recipe = parse_recipe({"model": "resnet18", "device": name, "precision": "fp16"}, "test")
    assert latency_table(recipe, larger, torch.zeros(1, 3, 24, 24)).to_json() == found.to_json()
    assert said[-1] == f"The latency of {name} is estimated, not measured."

    said.clear()
    straight = PruningSpace(Straight().eval(), torch.zeros(1, 3, 16, 16), granularity=8)
    together = LatencyTable.load(name, "fp16", space=straight)
    assert not together.estimated
    assert together.predict(straight) == pytest.approx(table.predict(space), rel=0.2)
    assert any("was not measured on" in line and "operators of other networks" in line for line in said)


def test_where_nothing_is_shipped_a_table_says_what_it_lacks(measured: Path) -> None:
    keep(table_of_results(measured))
    larger = PruningSpace(SmallNet().eval(), torch.zeros(1, 3, 24, 24), granularity=8)
    with pytest.raises(CompressorError, match=r"table of my-orin lacks 4 of this network's operators"):
        LatencyTable.load("my-orin", "fp16", space=larger).predict(larger)


def test_another_board_of_the_same_name(measured: Path, back: Path) -> None:
    keep(table_of_results(measured))

    def other(files: dict[str, bytes]) -> None:
        for name in files:
            if name == "results.json" or (name.count("/") == 1 and json_of_a_turn(name)):
                altered(files, name, board="fedcba9876543210")

    with pytest.raises(
        CompressorError, match="from another state is stored already: the board is 'board fedcba9876543210'"
    ):
        keep(table_of_results(respoil(back, other)))


def json_of_a_turn(name: str) -> bool:
    return name.endswith(".json") and name.split("/")[1][0].isdigit()
