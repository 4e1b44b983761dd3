"""`compress predict`: what a run's network says about photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.flags import JsonOption
from compressor.cli.terminal import friendly, show, show_json


def predict(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    photos: Annotated[list[Path], typer.Argument(help="Photographs.", metavar="PHOTO...")],
    runtime: Annotated[str, typer.Option(help="onnx (ONNX Runtime), torch, or engine (TensorRT).")] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(help="Of the file or the engine: fp32, fp16, int8, mixed; fp32 unless the run delivers mixed."),
    ] = None,
    top: Annotated[int, typer.Option(help="Number of answers for each photograph.", min=1)] = 3,
    factory: Annotated[
        str | None,
        typer.Option(help="With torch: module:factory of the network, if it was not run from here."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a run's slim network says about photographs: classes, shares of the pixels, or boxes."""
    with friendly():
        from compressor.report.formats import percent
        from compressor.run.predict import predict as predictions

        found = predictions(run, photos, runtime=runtime, precision=precision, top=top, factory=factory)
        if json:
            show_json([{"photo": str(photo), "answers": answers} for photo, answers in found])
            return
        for photo, answers in found:
            words = []
            for each in answers:
                edges = "" if each.box is None else f" at {', '.join(f'{edge:.0f}' for edge in each.box)}"
                words.append(f"{each.name} {percent(each.share)}{edges}")
            show([f"{photo}: {', '.join(words) or 'nothing found'}"])
