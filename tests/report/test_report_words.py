"""Numbers, verdicts and explanations, each against a sentence worked out by hand."""

from __future__ import annotations

import doctest
import re
from typing import Any

import pytest

from compressor.core.manifest import Manifest
from compressor.data.preprocessing import Preprocessing
from compressor.report import closing_table, explain, formats, judge_front, judgement, plots, verdict
from compressor.report import sources as sources_module
from compressor.report.comparison import comparison, tiles
from compressor.report.explain import images, parity
from compressor.report.judgement import budget_lines, judge
from compressor.report.plots import candidate_scatter, chosen, layer_bars, thinned, training_curve
from compressor.report.records import hottest, rounds, sources, stubborn
from compressor.report.tradeoff import tradeoff


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.milliseconds(1.4496), "1.45 ms"),
        (formats.milliseconds(0.01234), "0.0123 ms"),
        (formats.milliseconds(None), formats.ABSENT),
        (formats.milliseconds(float("nan")), formats.ABSENT),
        (formats.milliseconds(True), formats.ABSENT),
        (formats.count(4_111_514_624), "4.11 G"),
        (formats.count(25_557_032), "25.6 M"),
        (formats.count(960), "960"),
        (formats.count(999_999), "1,000 k"),
        (formats.size(94_104_321), "94.1 MB"),
        (formats.size(512), "512 B"),
        (formats.percent(0.4833), "48.3%"),
        (formats.percent(1 / 3000), "<0.1%"),
        (formats.percent(0), "0.0%"),
        (formats.points(-0.0027777), f"{formats.MINUS}0.28 points"),
        (formats.points(0.0125), "+1.25 points"),
        (formats.points(-0.00001), "0.00 points"),
        (formats.duration(0.44), "0.4 s"),
        (formats.duration(214.2), "3 min 34 s"),
        (formats.duration(7500), "2 h 05 min"),
        (formats.cost(2e7, "bytes"), "20.0 MB"),
        (formats.cost(3, "joules"), "3.00 joules"),
        (formats.percentile_name(50), "median"),
        (formats.percentile_name(90), "p90"),
    ],
)
def test_numbers_are_printed_for_people(shown: str, expected: str) -> None:
    assert shown == expected


def finished(**fields: Any) -> dict[str, Any]:
    return {"status": "finished", **fields}


def latency(**fields: Any) -> dict[str, Any]:
    return {"name": "latency", "unit": "ms", "target": 1.5, "dense": 3.0, "predicted": 1.4, **fields}


def test_the_verdict_says_by_how_much() -> None:
    kept = finished(budgets=[latency(measured=1.45, kept=True)])
    assert verdict(kept) == "Budget kept: latency 1.45 ms measured, 3.3% under the target of 1.50 ms."
    missed = finished(
        budgets=[
            latency(measured=1.62, kept=False),
            {
                "name": "params",
                "unit": "params",
                "target": 8e6,
                "dense": 2e7,
                "predicted": 8e6,
                "measured": 8e6,
            },
        ]
    )
    assert verdict(missed) == (
        "Budget missed: latency 1.62 ms measured, 8.0% over the target of 1.50 ms. "
        "Budget kept: parameters 8.00 M counted, exactly at the target of 8.00 M."
    )
    assert judge(missed).state == "missed"
    close = finished(budgets=[latency(measured=1.5004, kept=False)])
    assert verdict(close) == "Budget missed: latency 1.50 ms measured, <0.1% over the target of 1.50 ms."


def test_a_computed_cost_is_not_called_measured() -> None:
    channels = {"name": "onnx_bytes", "unit": "channels", "target": 20, "dense": 40, "measured": 10, "kept": True}
    computed = finished(budgets=[{**channels, "how": "computed"}])
    assert verdict(computed) == (
        "Budget kept: onnx_bytes 10.0 channels computed, 50.0% under the target of 20.0 channels."
    )
    (line,) = budget_lines(Manifest.tolerant(computed))
    assert line.measured == "10.0 channels (computed)"
    assert "10.0 channels measured" in verdict(finished(budgets=[channels]))  # of an earlier version


def test_without_a_measurement_there_is_no_verdict() -> None:
    predicted = finished(budgets=[latency(measured=None, kept=None)], latency={"estimated": True})
    assert judge(predicted).state == "predicted"
    assert verdict(predicted) == (
        "Only predicted: latency 1.40 ms, 6.7% under the target of 1.50 ms. "
        "The latency table of this device is estimated, not measured on it."
    )
    assert verdict(finished()) == "No budget was set."


def test_the_worst_budget_colours_the_verdict() -> None:
    kept, undecided = latency(measured=1.4, kept=True), latency(measured=1.49, kept=None, verdict="undecided")
    only_predicted = latency(measured=None, kept=None, verdict="predicted")
    assert judge(finished(budgets=[kept, undecided])).state == "undecided"
    assert judge(finished(budgets=[only_predicted, undecided])).state == "undecided"
    assert judge(finished(budgets=[only_predicted, kept])).state == "predicted"
    assert judge(finished(budgets=[undecided, latency(measured=1.6, kept=False)])).state == "missed"
    assert verdict(finished(budgets=[undecided])) == (
        "Not decided: latency 1.49 ms measured, 0.7% under the target of 1.50 ms."
    )


@pytest.mark.parametrize(
    ("slim_ms", "groups", "state"),
    [
        (5.0, [(8, 16)], "slower"),
        (4.05, [(8, 16)], "kept"),
        (3.0, [(8, 16)], "kept"),
        (5.0, [(16, 16)], "kept"),
    ],
)
def test_a_network_slower_than_the_dense_one_is_not_green(
    slim_ms: float, groups: list[tuple[int, int]], state: str
) -> None:
    macs = {"name": "macs", "unit": "MACs", "target": 2e9, "dense": 4e9, "measured": 2e9, "kept": True}
    judged = judge(
        finished(
            budgets=[macs],
            groups=[{"name": "a", "kept": kept, "width": width} for kept, width in groups],
            latency={"measured_ms": slim_ms, "dense_ms": 4.0},
        )
    )
    assert judged.state == state
    said = "The slim network is slower: 1.25 times as slow as the dense network as measured."
    assert judged.remarks == ((said,) if state == "slower" else ())


@pytest.mark.parametrize(
    ("value", "interval", "state"),
    [
        (1.015, [1.005, 1.025], "slower"),
        (1.03, [0.98, 1.08], "kept"),
        (0.97, [0.96, 0.98], "kept"),
        (1.03, [0.0, None], "kept"),
    ],
)
def test_a_network_is_called_slower_where_its_whole_interval_says_so(
    value: float, interval: list[float], state: str
) -> None:
    macs = {"name": "macs", "unit": "MACs", "target": 2e9, "dense": 4e9, "measured": 2e9, "kept": True}
    latency = {"measured_ms": 4 * value, "dense_ms": 4.0, "ratio": value, "interval": interval}
    groups = [{"name": "a", "kept": 8, "width": 16}]
    assert judge(finished(budgets=[macs], groups=groups, latency=latency)).state == state


def test_the_page_says_how_images_were_prepared() -> None:
    prepared = {**Preprocessing(size=32).to_dict(), "origin": "assumed: usual for ImageNet"}
    assert images(Manifest.tolerant({"preprocessing": prepared})) == (
        "Images are scaled to 36 pixels (bilinear) and cut to 32, 0..1, mean 0.485, 0.456, 0.406, std 0.229, 0.224, "
        "0.225 (assumed: usual for ImageNet)."
    )
    whole = Preprocessing(size=96, width=128, crop_share=1.0, resize="squash").to_dict()
    assert "Images are scaled to 96x128 pixels as a whole (bilinear), 0..1," in images(
        Manifest.tolerant({"preprocessing": whole})
    )
    assert images(Manifest()) == images(Manifest.tolerant({"preprocessing": {"mean": 3}})) == ""


@pytest.mark.parametrize(
    ("metric", "end"),
    [
        ("accuracy", "on average; the predicted class agrees on 100.00% of 64 inputs."),
        ("mean IoU", "on average; the predicted class agrees on 100.00% of the pixels of 64 inputs."),
        ("mAP", "on average."),
    ],
)
def test_the_parity_speaks_of_classes_where_there_are_some(metric: str, end: str) -> None:
    found = {"max_abs": 2e-6, "mean_abs": 1e-7, "top1_agreement": 1.0, "images": 64}
    run = Manifest.tolerant({"parity": found, "accuracy": {"metric": metric}})
    assert parity(run) == f"Exported ONNX against torch: outputs differ by at most 2.0e-06, 1.0e-07 {end}"


@pytest.mark.parametrize(("weight", "noted"), [(0.5, True), (0.0, False)])
def test_a_loss_with_distillation_is_on_another_scale(weight: float, noted: bool) -> None:
    training = [{"phase": phase, "loss": 2.0} for phase in ("warmup", "finetune")]
    run = Manifest.tolerant({"training": training, "recipe": {"training": {"distill_weight": weight}}})
    chart = training_curve(run, "loss", "loss")
    assert chart is not None
    assert ("a loss of another scale" in chart.caption) == noted


def test_a_run_on_its_way_says_where_it_stands() -> None:
    stages = {"search": {"finished": "t"}, "finetune": {"finished": None}, "report": {"finished": None}}
    running = {"status": "running", "stages": stages, "budgets": [latency(measured=1.0, kept=True)]}
    assert verdict(running) == (
        "This run is not finished, so there is no verdict (finished: search; begun: finetune)."
    )
    # the report is written while its own stage runs: measured is enough
    running["stages"] = {"measure": {"finished": "t"}, "report": {"finished": None}}
    assert judge(running).state == "kept"


@pytest.mark.parametrize(("module", "examples"), [(judgement, 1), (plots, 1), (sources_module, 1)])
def test_the_examples_in_the_documentation_hold(module: Any, examples: int) -> None:
    assert doctest.testmod(module) == (0, examples)


def test_a_training_that_collapsed_is_not_green() -> None:
    said = "The training of the slim network collapsed: its loss rose from 0.4 in epoch 3 to 2.3 in epoch 5."
    judged = judge(finished(budgets=[latency(measured=1.45, kept=True)], warnings={"finetune": said}))
    assert (judged.state, judged.remarks) == ("doubtful", (said,))
    assert judge(finished(budgets=[latency(measured=1.6, kept=False)], warnings={"finetune": said})).state == "missed"


def test_a_front_names_the_target_whose_training_collapsed() -> None:
    targets = [{"folder": "a", "status": "finished", "exit_code": 0, "state": state} for state in ("kept", "doubtful")]
    targets[1]["folder"] = "b"
    judged = judge_front({"status": "finished", "targets": targets})
    assert judged.state == "doubtful"
    assert judged.remarks == ("b: a training has failed, as its own page says.",)
    assert judge_front({"status": "finished", "targets": targets[:1]}).state == "kept"


@pytest.mark.parametrize(
    ("fields", "tile"),
    [
        ({}, ("Latency", formats.ABSENT, "not measured", "")),
        (
            {"measured_ms": 1.0, "dense_ms": 2.0},
            ("Latency, measured", "1.00 ms", f"2.00{formats.TIMES} faster than 2.00 ms", "good"),
        ),
        (
            {"measured_ms": 2.5, "dense_ms": 2.0},
            ("Latency, measured", "2.50 ms", f"1.25{formats.TIMES} slower than 2.00 ms", "open"),
        ),
        ({"measured_ms": 2.0, "dense_ms": 2.001}, ("Latency, measured", "2.00 ms", "dense 2.00 ms", "")),
        (
            {"predicted_ms": 1.0, "predicted_dense_ms": 4.0},
            ("Latency, predicted", "1.00 ms", f"4.00{formats.TIMES} faster than 4.00 ms", ""),
        ),
        ({"predicted_ms": 1.0, "estimated": True}, ("Latency, estimated", "1.00 ms", "dense not known", "")),
    ],
)
def test_the_tile_of_the_latency_is_always_there(fields: dict[str, Any], tile: tuple[str, ...]) -> None:
    groups = [{"name": "a", "kept": 8, "width": 16}]
    found = tiles(Manifest.tolerant({"latency": fields, "groups": groups}))[0]
    assert (found.label, found.value, found.before, found.state) == tile


@pytest.mark.parametrize(
    ("verdict", "state"), [("kept", "good"), ("missed", "bad"), ("undecided", "open"), ("predicted", "open")]
)
def test_the_budget_colours_the_latency(verdict: str, state: str) -> None:
    budget = {"name": "latency", "unit": "ms", "target": 1.5, "dense": 2.0, "verdict": verdict}
    found = tiles(Manifest.tolerant({"latency": {"measured_ms": 1.4, "dense_ms": 2.0}, "budgets": [budget]}))[0]
    assert found.state == state


def test_the_header_says_where_and_when() -> None:
    cpu = {"cpu": "A CPU", "cores": 2}
    stages = {
        "begin": {"started": "2026-11-30T23:20:00+00:00", "finished": "2026-11-30T23:21:00+00:00"},
        "measure": {"started": "2026-12-01T00:10:00+00:00"},
        "report": {"started": "2027-01-01T00:00:00+00:00"},
        "odd": {"started": "yesterday"},
    }
    local = {"device": "local", "runtime": "onnxruntime-cpu 1.32.0", "precision": "int8"}
    run = Manifest.tolerant({"machine": cpu, "stages": stages, "latency": local})
    assert explain.header(run) == "A CPU (local), onnxruntime-cpu 1.32.0, INT8, 1 December 2026"
    elsewhere = {"machine": cpu, "latency": {"device": "ssh://me@board", "runtime": "tensorrt", "precision": "fp16"}}
    assert explain.header(Manifest.tolerant(elsewhere)) == "ssh://me@board, tensorrt, FP16"
    begun = {"recipe": {"device": "jetson-nano", "precision": "fp16"}}
    assert explain.header(Manifest.tolerant(begun)) == "jetson-nano, FP16"
    assert explain.header(Manifest()) == ""


@pytest.mark.parametrize(
    ("runtime", "rest", "words"),
    [
        ("onnxruntime-cpu 1.32.0", "", "mixed FP32 and INT8"),
        ("tensorrt 10.3", "", "mixed FP16 and INT8"),
        ("TensorRT 10.3", "", "mixed FP16 and INT8"),
        ("tensorrt 10.3", "fp32", "mixed FP32 and INT8"),
        (None, "", "mixed precision"),
    ],
)
def test_the_header_names_both_precisions_of_a_mixed_run(runtime: str | None, rest: str, words: str) -> None:
    latency = {"device": "somewhere", "runtime": runtime, "precision": "mixed"}
    run = Manifest.tolerant({"latency": latency, "exports": {"mixed": {"rest": rest}} if rest else {}})
    assert explain.header(run) == ", ".join(part for part in ("somewhere", runtime, words) if part)


def networks_of(manifest: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The rows of the front of one run, by network."""
    found = tradeoff(Manifest.tolerant(manifest))
    assert found is not None
    return {row["network"]: (row["latency"], row["score"], row["known"]) for row in found["rows"]}


def test_the_front_of_one_run_compares_like_with_like(manifest: dict[str, Any]) -> None:
    assert networks_of(manifest) == {
        "dense": ("3.00 ms", "98.33%", "test split, measured"),
        "delivered": ("1.45 ms", "98.06%", "test split, measured"),
        "uniform": ("1.43 ms", "91.02%", "search split, predicted"),
        "best tried": ("1.45 ms", "95.11%", "search split, predicted"),
    }
    chart = (tradeoff(Manifest.tolerant(manifest)) or {})["chart"]
    assert chart.alt == "dense network 98.33% in 3.00 ms; delivered network 98.06% in 1.45 ms."
    for label in ("dense: test split, measured", "uniform: search split, predicted", "candidates: search split, pred"):
        assert label in chart.svg
    uniform = manifest["search"]["candidates"][-1]
    for change in ({"epoch": 1}, {"costs": {"latency": 1.6}}, {"accuracy": None}):
        manifest["search"]["candidates"][-1] = uniform | change
        assert "uniform" not in networks_of(manifest)
    manifest["search"]["candidates"][-1] = uniform | {"given_up": True}
    assert networks_of(manifest)["uniform"][:2] == (formats.ABSENT, formats.ABSENT)


def test_the_front_of_one_run_says_what_is_predicted(manifest: dict[str, Any]) -> None:
    manifest["recipe"]["search"]["measure"] = "closeness"  # no score of the test split's kind
    assert list(networks_of(manifest)) == ["dense", "delivered"]
    del manifest["latency"]["measured_ms"]
    assert networks_of(manifest)["delivered"] == ("1.40 ms", "98.06%", "test split, predicted")
    del manifest["accuracy"]["finetuned"]
    assert tradeoff(Manifest.tolerant(manifest)) is None


def test_candidates_far_beyond_the_target_do_not_set_the_scale(manifest: dict[str, Any]) -> None:
    far = {"reward": 0.5, "costs": {"latency": 2.9}, "source": "sensitivity"}
    manifest["search"]["candidates"] += [far, far | {"costs": {"latency": 2.95}}]
    chart = candidate_scatter(Manifest.tolerant(manifest), [], "tried")
    assert chart is not None
    assert "Not drawn: 2 far to the right, up to 2.95 ms" in chart.caption
    assert "sensitivity" not in chart.svg
    assert "accuracy, search split" in chart.svg
    assert "predicted latency (ms)" in chart.svg
    manifest["search"]["candidates"][-3]["accuracy"] = 0.5
    assert "reward (accuracy and costs)" in (candidate_scatter(Manifest.tolerant(manifest), [], "tried") or chart).svg


def test_layers_are_named_and_the_largest_drawn_where_there_are_many(manifest: dict[str, Any]) -> None:
    chart = layer_bars(Manifest.tolerant(manifest), "macs", "layers")
    assert chart is not None
    assert "layer4.1.conv2" in chart.svg
    assert "The 40 largest of 50 layers are drawn." in chart.caption
    manifest["layers"] = manifest["layers"][:3]
    chart = layer_bars(Manifest.tolerant(manifest), "macs", "layers")
    assert chart is not None
    assert "conv1" in chart.svg
    assert "drawn" not in chart.caption


def test_the_closing_table_shows_both_networks(manifest: dict[str, Any]) -> None:
    manifest["accuracy"]["split"] = "[red]test[/nothing]"
    split = (re.split(r" {2,}", line) for line in closing_table(manifest).lines())
    lines = {label: cells for label, *cells in split}
    assert lines["Accuracy, [red]test[/nothing] split"] == ["98.33%", "98.06%", "-0.28 points"]
    assert lines["Latency, predicted"] == ["2.97 ms", "1.40 ms", "47.1%"]
    assert lines["Latency, measured (median)"] == ["3.00 ms", "1.45 ms", "48.3%"]
    assert lines["MACs"] == ["278 M", "87.6 M", "31.5%"]
    assert lines["Parameters"] == ["23.5 M", "9.41 M", "40.0%"]
    assert lines["ONNX file"] == ["94.1 MB", "37.6 MB", "40.0%"]
    assert lines["Weights, safetensors"] == ["-", "37.7 MB", "-"]


def test_unknown_quantities_have_no_row(manifest: dict[str, Any]) -> None:
    manifest["latency"] = {"percentile": 90, "measured_ms": 2.0, "p90_ms": 2.0}
    manifest["accuracy"] = {
        "finetuned": 0.5,
        "split": "test",
        "images": 100,
        "exported": 0.5,
        "exported_images": 40,
    }
    labels = [row.label for row in comparison(Manifest.tolerant(manifest))]
    assert "Latency, predicted" not in labels
    assert [label for label in labels if "p90" in label] == ["Latency, measured (p90)"]
    assert "Accuracy, of the exported ONNX on 40 images" in labels
    assert [(tile.label, tile.before) for tile in tiles(Manifest.tolerant(manifest))][:2] == [
        ("Latency, measured", "dense not known"),
        ("Accuracy", "dense not known"),
    ]


@pytest.mark.parametrize(
    ("slim_macs", "slim_ms", "ending"),
    [
        (50, 5.0, "50.0% of its measured latency: the time fell in proportion to the work."),
        (50, 7.5, "75.0% of its measured latency: 50% of the relative saving in MACs became a saving in time."),
        (50, 10.5, "105.0% of its measured latency: none of the removed work saved time."),
        (50, 3.0, "30.0% of its measured latency: the time fell further than the work."),
        (100, 10.0, "100.0% of its measured latency: no work was removed, so no time was saved."),
    ],
)
def test_work_is_compared_with_time(slim_macs: int, slim_ms: float, ending: str) -> None:
    known = {
        "cost": {"dense": {"macs": 100}, "slim": {"macs": slim_macs}},
        "latency": {"dense_ms": 10.0, "measured_ms": slim_ms},
    }
    assert explain.speed(Manifest.tolerant(known)).endswith(ending)


def test_layers_whose_time_stayed_are_named() -> None:
    layers = [
        {"name": "followed", "dense_macs": 100, "slim_macs": 50, "dense_ms": 1.0, "slim_ms": 0.6},
        {"name": "stayed", "dense_macs": 100, "slim_macs": 50, "dense_ms": 1.0, "slim_ms": 0.8},
        {"name": "slowed", "dense_macs": 100, "slim_macs": 50, "dense_ms": 1.0, "slim_ms": 1.1},
        {"name": "kept whole", "dense_macs": 100, "slim_macs": 90, "dense_ms": 1.0, "slim_ms": 1.0},
    ]
    minus = formats.MINUS
    assert stubborn(Manifest.tolerant({"layers": layers})) == [
        f"slowed: MACs {minus}50.0%, time +10.0%",
        f"stayed: MACs {minus}50.0%, time {minus}20.0%",
    ]
    hot = hottest(Manifest.tolerant({"layers": layers, "latency": {"predicted_ms": 4.0}}), most=2)
    assert hot is not None
    assert [(layer["name"], layer["number"], layer["share"]) for layer in hot.layers] == [
        ("slowed", "3", "31.4%"),
        ("kept whole", "4", "28.6%"),
    ]
    assert "add up to 3.50 ms of the network's 4.00 ms. The other 0.500 ms (12.5%)" in hot.remark


def test_uniform_pruning_counts_only_on_the_same_weights() -> None:
    def told(agent: str, *candidates: dict[str, Any]) -> str:
        search = {"agent": agent, "best_reward": 0.9, "candidates": list(candidates)}
        return str(sources(Manifest.tolerant({"search": search}))["uniform"])

    ours = {"reward": 0.9, "source": "final", "epoch": 3}
    theirs = {"reward": 0.95, "source": "uniform", "epoch": 3}
    assert told("joint", theirs, ours).startswith(
        "The chosen network has reward 0.9000, less than the 0.9500 of uniform"
    )
    assert told("joint", theirs | {"given_up": True}, ours).startswith(
        "Uniform pruning within the same budgets was"
    )
    assert told("joint", theirs | {"epoch": 2}, ours) == ""
    assert told("joint", ours | {"source": "uniform"}).endswith("the search found nothing better.")
    assert told("uniform", ours) == ""


def test_what_became_of_the_finalists() -> None:
    def told(*found: dict[str, Any]) -> str:
        return str(sources(Manifest.tolerant({"search": {"finalists": list(found)}}))["finalists"])

    first, second = {"candidate_score": 0.9, "score": 0.7}, {"candidate_score": 0.8, "score": 0.75, "chosen": True}
    assert told() == ""
    assert "from 0.7000 to 0.7500. The best of these is delivered; among the candidates it was number 2." in told(
        first, second
    )
    assert told(second, first).endswith("among the candidates it was the best, too.")


def test_the_chosen_candidate_is_the_last_with_the_best_reward() -> None:
    twice = [
        {"reward": 0.9, "source": "joint"},
        {"reward": 0.9, "source": "final"},
        {"reward": 0.95, "source": "old"},
    ]
    found = chosen(Manifest.tolerant({"search": {"best_reward": 0.9, "candidates": twice}}))
    assert found is not None
    assert found.source == "final"
    assert chosen(Manifest.tolerant({"search": {"candidates": twice}})) is None


def test_thinning_keeps_the_ends() -> None:
    assert thinned(3, most=5) == [0, 1, 2]
    assert thinned(9, most=5) == [0, 2, 4, 6, 8]
    assert len(set(thinned(10_000))) == 1500


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"ratio": 0.498, "interval": [0.494, 0.502]}, "49.8% (49.4% to 50.2%)"),
        ({"ratio": 0.498, "interval": [0.0, None]}, "49.8% (interval not known)"),
        ({"ratio": 0.876, "interval": [0.015, 50.577]}, "87.6% (interval not known)"),
        ({"ratio": 0.498}, "49.8%"),
        ({}, formats.ABSENT),
    ],
)
def test_a_round_says_the_share_of_the_dense_time_and_its_interval(
    measured: dict[str, Any], words: str
) -> None:
    row = {"predicted_ms": 1.0, "measured_ms": 1.0, "target_ms": 1.1, "verdict": "kept", **measured}
    assert rounds(Manifest.tolerant({"rounds": [row]}))[0]["share"] == words
