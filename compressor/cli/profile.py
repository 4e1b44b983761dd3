"""`compress profile`: measure the latency table of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import completion
from compressor.cli.flags import (
    BatchOption,
    ImageSizeOption,
    StreamsOption,
    TaskOption,
    ThreadsOption,
    overrides,
    recipe_of,
)
from compressor.cli.terminal import friendly, show
from compressor.core.errors import CompressorError


def profile(
    model: Annotated[
        str | None, typer.Option(help="The network, as for compress.", autocompletion=completion.models)
    ] = None,
    data: Annotated[str, typer.Option(help="Determines the input size and the number of classes.")] = "digits",
    task: TaskOption = None,
    image_size: ImageSizeOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = None,
    streams: StreamsOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="ssh://user@host; with --bundle or --import the device's name.", autocompletion=completion.devices
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 (not for this machine's CPU), int8, or mixed (not with --bundle)."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A new folder, to copy to a device and run there.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--import", help="The folder of a bundle, with the device's results in it.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Time limit for measuring this machine or a registered device, such as 90s or 5min; by default 60s "
            "for this machine's CPU and 10min otherwise."
        ),
    ] = None,
) -> None:
    """Measure the latency table of a network: on this machine, over ssh, or with a folder copied to the device."""
    with friendly():
        from compressor.latency.provider import TableProvider
        from compressor.run.profile import import_results, measure_table, write_bundle

        if time_limit is not None and (
            results or bundle or TableProvider.for_device(device or "local").time_limit_s is None
        ):
            raise CompressorError(
                "--time-limit is for this machine and for registered devices; another device measures all networks of "
                "its bundle.",
                "Leave it out. On the device, run.sh takes --duration SECONDS and --processes N.",
            )
        if results is not None:
            if model is not None or bundle is not None or precision is not None:
                raise CompressorError(
                    "--import takes everything from the folder.",
                    "Leave out --model, --bundle and --precision.",
                )
            lines = import_results(results, device)
        else:
            if model is None:
                raise CompressorError("No network was given.", "For example: --model resnet50")
            fields = {
                "model": model, "data": data, "task": task, "image_size": image_size, "threads": threads,
                "batch": batch, "streams": streams,
            }  # fmt: skip
            recipe = recipe_of(
                None, overrides({**fields, "device": device, "precision": precision}) | {"weights": "none"}
            )
            if bundle is not None:
                if device is None:
                    raise CompressorError(
                        "--bundle needs the name of its device.",
                        "For example: --device jetson-orin-nano-8gb, or a name of your own",
                    )
                lines = write_bundle(recipe, bundle)
            else:
                lines = measure_table(recipe, time_limit)
        show(lines)
