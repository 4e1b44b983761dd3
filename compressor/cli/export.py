"""`compress export`: export a run's network in other formats and precisions, and run it on a board."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import completion
from compressor.cli.terminal import friendly, show
from compressor.core.errors import CompressorError

ENGINES, BOARDS = "Engines", "Boards"


def export(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    format: Annotated[
        str, typer.Option("--format", help="onnx, boxes (a detector's, with NMS), engine or pt2 (torch.export).")
    ] = "onnx",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8, or mixed: int8 or not for each layer, as measured.")
    ] = "fp32",
    batch: Annotated[
        str | None,
        typer.Option(help="Inputs per batch: 4; or a range: 1..8, tuned for 8; 1..4..8. By default the run's."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; by default the one that the target reads.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Percentage points that another precision may lose; by default the recipe's."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="How int8 ranges are calibrated: minmax, entropy or percentile.")
    ] = "minmax",
    rounding: Annotated[
        str | None,
        typer.Option(
            help="How int8 weights are rounded: nearest, or outputs (for each layer's outputs; slower); by default the "
            "recipe's."
        ),
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option(help="Precision of the rest with int8 or mixed: fp32 or fp16 (the default for TensorRT)."),
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="Copy the file there as well.")] = None,
    factory: Annotated[
        str | None,
        typer.Option(help="module:factory of the run's network, if it is code that was not run from here."),
    ] = None,
    builder: Annotated[
        str | None,
        typer.Option(help="tensorrt or tensorrt_rtx_bindings; by default the installed one.", rich_help_panel=ENGINES),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU to build for, as 8.6; may be repeated.", rich_help_panel=ENGINES),
    ] = None,
    workspace: Annotated[
        int, typer.Option(help="Memory for one layer in MiB.", min=1, rich_help_panel=ENGINES)
    ] = 1024,
    optimisation_level: Annotated[
        int | None, typer.Option(help="0 (quick) to 5 (thorough).", min=0, max=5, rich_help_panel=ENGINES)
    ] = None,
    dla: Annotated[
        int | None,
        typer.Option(help="Deep-learning accelerator; the GPU does what it cannot.", rich_help_panel=ENGINES),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="For newer TensorRT too.", rich_help_panel=ENGINES)
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option("--hardware-compatible", help="For every GPU from Ampere on.", rich_help_panel=ENGINES),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="A board such as jetson-orin-nano-8gb, or ssh://user@host to run it there.",
            rich_help_panel=BOARDS,
            autocompletion=completion.boards,
        ),
    ] = None,
    board: Annotated[
        str | None,
        typer.Option(
            help="The board at the ssh address; by default the run's device, else jetson-orin-nano-8gb.",
            rich_help_panel=BOARDS,
            autocompletion=completion.boards,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="NAME.tar.gz: all files that the board needs.", rich_help_panel=BOARDS),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--import", help="Import a board's results.", rich_help_panel=BOARDS),
    ] = None,
) -> None:
    """Write a run's network in other formats and precisions, bundle it for a board, or import its measurements."""
    with friendly():
        from compressor.latency.table import is_address
        from compressor.run import boards
        from compressor.run.exports import Request, export_format
        from export.convert.batches import parse_batch
        from export.engine.engine import BuildSettings

        over_ssh = target is not None and is_address(target)
        wanted = Request(
            format=format,
            precision=precision,
            batch=None if batch is None else parse_batch(batch),
            target=None if over_ssh else target,
            address=target if over_ssh and precision == "mixed" else None,
            opset=opset,
            max_drop=max_drop,
            method=calibration,
            rounding=rounding,
            rest=rest,
            out=file,
            factory=factory,
            module=builder,
            compute_capability=tuple(compute_capability or ()),
            settings=BuildSettings(
                workspace_bytes=workspace << 20,
                optimisation_level=optimisation_level,
                dla_core=dla,
                version_compatible=version_compatible,
                hardware_compatible=hardware_compatible,
            ),
        )
        if results is not None:
            if bundle is None:
                raise CompressorError(
                    "--import needs the bundle that was run on the board.", "Add --bundle FILE."
                )
            lines = boards.import_results(run, results, bundle)
        elif over_ssh or bundle is not None:
            if target is None:
                raise CompressorError(
                    "A bundle is for a board.", "Add --target BOARD, or --import RESULTS to import its results."
                )
            if format != "onnx" or batch is not None or opset is not None or file is not None:
                raise CompressorError(
                    "A bundle holds ONNX files for the run's batch, in the opset that its board reads.",
                    "Leave out --format, --batch, --opset and --out.",
                )
            if over_ssh:
                lines = boards.export_over_ssh(run, target, board, bundle, wanted)
            else:
                assert bundle is not None  # by the branch above
                lines = boards.export_bundle(run, target, bundle, wanted)
        else:
            lines = export_format(run, wanted)
        show(lines)
