"""A finished run's network in another format: ONNX of any batch and precision, an engine, or `.pt2`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from compressor.core.errors import CompressorError
from compressor.core.files import parse_json, replacing
from compressor.core.manifest import Export, Parity
from compressor.core.progress import say
from compressor.core.records import RECIPE
from compressor.latency.provider import TableProvider
from compressor.models.onnx_file import NETWORK
from compressor.recipe import Recipe, load_recipe
from compressor.report.next_steps import repeat_command
from compressor.run.boxes import check_detection, write_boxes
from compressor.run.conversions import Conversion, write_precision
from compressor.run.deployable import write_score
from compressor.run.device import int8_runtime, opset_of, provider_of, request_of
from compressor.run.finish import write_page
from compressor.run.folder import RunFolder, refuse_changed
from compressor.run.load import builder_of, load_images, missing_data, network_of, refuse_other_files, task_of
from compressor.run.onnx_files import (
    COMPARED_IMAGES,
    MODEL,
    build_engine_of,
    drawn,
    file_of,
    one_array,
    open_exported,
    record,
    scored,
)
from compressor.training.feeds import random_inputs
from export.convert.batches import Batch
from export.convert.calibrated import ONNXRUNTIME, TENSORRT
from export.convert.quantize import RESTS, ROUNDINGS
from export.device.bundle import find_target
from export.device.here import CPU
from export.engine.engine import BuildSettings
from export.files import read_bytes, write_bytes

if TYPE_CHECKING:
    from torch import nn

    from compressor.data import DataBundle
    from compressor.latency.precisions import PrecisionTimer
    from compressor.training.task import Task
    from export.convert.onnx_header import OnnxHeader

PRECISIONS = ("fp32", "fp16", "int8", "mixed")


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        format: A key of `FORMATS`.
        precision: One of `PRECISIONS`.
        batch: Number of inputs per batch; None for the run's.
        target: Name of a board; determines the opset and whether INT8 is useful.
        address: ssh address of a device on which mixed precision is measured; None for the run's device.
        opset: Opset of the ONNX file; None for the target's or the recipe's.
        max_drop: Accuracy that FP16 or INT8 may lose, in percentage points; None for the recipe's.
        method: How INT8 ranges are calibrated.
        rounding: How INT8 weights are rounded; None for the recipe's.
        rest: Precision of the layers that INT8 leaves out, in a file for TensorRT; None for the device's usual form.
        out: Where to put a copy of the file.
        factory: Function that builds the network if it is the user's own code: `package.module:factory`.
        module, compute_capability, settings: Options of the engine builder.
    """

    format: str = "onnx"
    precision: str = "fp32"
    batch: Batch | None = None
    target: str | None = None
    address: str | None = None
    opset: int | None = None
    max_drop: float | None = None
    method: str = "minmax"
    rounding: str | None = None
    rest: str | None = None
    out: Path | None = None
    factory: str | None = None
    module: str | None = None
    compute_capability: tuple[str, ...] = ()
    settings: BuildSettings = field(default_factory=BuildSettings)


class Finished:
    """A run that has exported its network, with what another export of it needs."""

    def __init__(self, run: RunFolder, factory: str | None = None) -> None:
        self.run = run
        self._factory = factory
        self.recipe: Recipe = load_recipe(run.file(RECIPE))

    @classmethod
    def open(cls, folder: Path, factory: str | None = None) -> Finished:
        """Open the run in a folder and lock it.

        Args:
            folder: Folder of the run.
            factory: Function that builds its network if it is the user's own code; see `models.names`.

        Raises:
            CompressorError: The folder holds no run, or the run has exported nothing yet.
        """
        run = open_exported(folder)
        try:
            return cls(run, factory)
        except BaseException:
            run.close()
            raise

    def close(self) -> None:
        """Release the folder."""
        self.run.close()

    @cached_property
    def data(self) -> DataBundle:
        """The run's images.

        Raises:
            CompressorError: They are objects of a Python program, or other files than when the run began.
        """
        if self.recipe.from_python:
            raise CompressorError(
                "Files in another precision than fp32 are chosen and scored on the run's data, which is in the Python "
                "program that started it.",
                "Write them there, in a new folder: compressor.compress(..., export={'precisions': ['int8']})",
            )
        recipe = self.recipe
        if recipe.onnx:
            recipe = recipe.changed({"model": str(self.run.file(NETWORK))})
        data = load_images(recipe)
        refuse_other_files(recipe, self.run.manifest.splits, data.files)
        return data

    @cached_property
    def task(self) -> Task:
        """The run's task, with its images."""
        return task_of(self.recipe, self.data)

    @cached_property
    def goals(self) -> Any:
        """What scores compare with: the dense network's answers if there are no labels."""
        if self.task.labelled:
            return None
        return self.task.test_goals(self.dense(self.recipe.weights), "cpu")

    @cached_property
    def model(self) -> nn.Module:
        """The saved slim network.

        Raises:
            CompressorError: It cannot be built, or computes something else than the run's own file.
        """
        from compressor.pruning.artefact import load
        from export.convert.ort import onnx_outputs
        from export.convert.parity import gross_difference
        from export.convert.to_onnx import reference_outputs

        model = load(self.run.path, factory=builder_of(self.recipe, self.run.path, self._factory))
        inputs = random_inputs(self.example, 2, self.recipe.seed)
        expected = onnx_outputs(self.run.file(MODEL), [each.numpy() for each in inputs])
        if wrong := gross_difference(expected, reference_outputs(model, inputs), 2):
            raise CompressorError(
                f"The saved network, as it is built here, is not that of {self.run.file(MODEL)}: {wrong}.",
                "Name a function or class that builds the dense network that was compressed, with all that is not a "
                "weight: --factory module:function",
            )
        return model

    @cached_property
    def header(self) -> OnnxHeader:
        """What the run's own file says about the network."""
        from export.convert.onnx_header import read_header

        return read_header(self.run.file(MODEL))

    @cached_property
    def example(self) -> tuple[Any, ...]:
        """Arguments of the network for one input."""
        import torch

        return tuple(torch.zeros(1, *shape[1:]) for shape in self.header.shapes.values())

    def dense(self, weights: str) -> nn.Module:
        """Create the dense network with weights as a recipe names them; of a Python program's run, "none"."""
        from compressor.pruning.artefact import untrained

        name = builder_of(self.recipe, self.run.path, self._factory)
        if self.recipe.from_python:
            assert weights == "none"  # what it is compared with is of the program's data
            return untrained(self.run.path, factory=name)
        (shape,) = self.header.shapes.values()
        recipe, classes = self.recipe.changed({"model": name}), len(self.facts().get("classes", ()))
        channels, height, width = shape[1:]
        return network_of(recipe, classes, (channels, height, width), weights, []).eval()

    def metadata(self) -> dict[str, Any]:
        """Metadata of every exported file: that of the run's own."""
        return {**self.header.metadata, "run": self.run.name}

    def facts(self) -> dict[str, Any]:
        """Classes and preprocessing, as the run's own file has them."""
        known = self.header.metadata
        names = [name for name in ("classes", "preprocessing") if name in known]
        return {name: parse_json(known[name], f"'{name}' in {self.run.file(MODEL)}") for name in names}

    def images(self, number: int = COMPARED_IMAGES) -> Any:
        """Test images (N, C, H, W) for comparing files with the network; random numbers if the data is not here."""
        if missing := missing_data(self.recipe):
            say(f"{missing} is not here: files are compared on random inputs, and not scored.")
            return one_array(random_inputs(self.example, number, self.recipe.seed), "This export")
        return one_array(drawn(self.task, self.task.test, number, self.recipe.seed), "This export")

    def scored(self, path: Path) -> tuple[float | None, int | None]:
        """Return an FP32 file's score on the test split and the number of inputs; None if the data is not here."""
        return (None, None) if missing_data(self.recipe) else scored(path, self.task, self.model, self.goals)

    def onnx(self, request: Request) -> Iterator[str]:
        """Write the ONNX file that `path_of` names, from the FP32 file of the same batch and opset.

        Raises:
            CompressorError: It is the file that the run has judged, and the request has other settings.
        """
        fp32, target = self.path_of(request, "fp32"), self.path_of(request)
        if request.precision == self.recipe.precision != "fp32" and target == self.run.file(file_of(request.precision)):
            self._check_own(request, target)
            if target.is_file():
                refuse_changed(target, self.run.manifest)
                yield f"{target} is there, checked when the run wrote it."
                return
        if fp32 != self.run.file(MODEL):
            yield from self._write_fp32(fp32, request)
        elif request.precision == "fp32":
            yield f"{fp32} is there, checked when the run wrote it."
        if request.precision != "fp32":
            provider, runtime = provider_of(self.recipe), self.runtime(request)
            conversion = Conversion(
                run=self.run,
                task=self.task,
                network=self.model,
                source=fp32,
                target=target,
                precision=request.precision,
                max_drop_points=self.recipe.export.max_drop if request.max_drop is None else request.max_drop,
                goals=self.goals,
                rounding=request.rounding or self.recipe.export.rounding,
                rest=request.rest or ("fp32" if self.timed_on_cpu(request) else "fp16"),
                runtime=runtime,
                method=request.method,
                timer=self._timer(request) if request.precision == "mixed" else None,
            )
            yield from write_precision(
                conversion,
                engine=request.format == "onnx"
                and not self.batch(request).open
                and request.target is None
                and provider.is_here,  # an engine built here does not fit another device
            )

    def _check_own(self, request: Request, path: Path) -> None:
        """Refuse settings that differ from those of the run's own file: its time and its score are the run's result."""
        written, recipe = self.run.manifest.exports.get(request.precision, Export()), self.recipe.export
        known = {"max_drop": recipe.max_drop, "rest": written.rest}
        if written.rounding:
            known |= {"method": Request.method, "rounding": recipe.rounding}  # of each INT8 file that a run writes
        given = {name: getattr(request, name) for name in known}
        other = [name for name, value in known.items() if value != "" and given[name] not in (None, value)]
        if not other:
            return
        options = {name: _OPTIONS.get(name, f"--{name}") for name in other}
        problem = ", ".join(f"{options[name]} {known[name]}, not {given[name]}" for name in other)
        hint = f"Leave out {', '.join(options.values())}"
        if set(other) <= {"max_drop", "rounding"} and not self.recipe.from_python:
            fields = " ".join(f"--set export.{name}={given[name]}" for name in other)
            hint += f", or start another run: {repeat_command(self.run.path)} {fields}"
        raise CompressorError(f"{path} is the file that the run has judged, written with {problem}.", hint)

    def _timer(self, request: Request) -> PrecisionTimer:
        """Return the device on which mixed precision is measured.

        Raises:
            CompressorError: It cannot be measured from here, or does not run what is requested.
        """
        device = TableProvider.for_device(request.address) if request.address else provider_of(self.recipe)
        ran = (self.run.manifest.latency.runtime or device.runtime).split()[0]
        if device.is_here and ran != device.runtime:
            raise CompressorError(
                f"The run was timed with {ran}, and this machine has {device.runtime}.",
                "Export it on the machine of the run, or use --precision int8.",
            )
        if request.format == "engine" and not device.runs_tensorrt:
            raise CompressorError(
                f"Mixed precision is chosen by times of {device.title}, which runs no engines.",
                "Leave out --format, or use --precision int8.",
            )
        rest = cast("Literal['fp32', 'fp16'] | None", request.rest)
        device.check_load(request_of(self.recipe))
        return device.precision_timer(request_of(self.recipe), rest)

    def path_of(self, request: Request, precision: str | None = None) -> Path:
        """Return the path of a request's ONNX file; plain: the run's own.

        It is `model[.boxes][.PRECISION][.tensorrt][.BATCH][.OPSET].onnx`. A file for another device than the run's does
        not take the place of the one that the run has timed: in mixed precision, or in INT8 for TensorRT.
        """
        chosen, opset = precision or request.precision, self.opset(request)
        elsewhere = chosen == "mixed" and request.address not in (None, self.recipe.device)
        if chosen == self.recipe.precision == "int8":
            elsewhere = (self.runtime(request), int8_runtime(self.recipe)) == (TENSORRT, ONNXRUNTIME)
        parts = [
            "model",
            "boxes" if request.format == "boxes" else "",
            "" if chosen == "fp32" else chosen,
            "tensorrt" if elsewhere else "",
            self.label(request),
            "" if opset == opset_of(self.recipe) else f"opset{opset}",
            "onnx",
        ]
        return self.run.file(".".join(part for part in parts if part))

    def runtime(self, request: Request) -> str:
        """Return what a request's INT8 file is for: ONNX Runtime or TensorRT."""
        plain = request.rest is None and request.format == "onnx"
        return ONNXRUNTIME if plain and self.timed_on_cpu(request) else TENSORRT

    def timed_on_cpu(self, request: Request) -> bool:
        """Whether a request is for the device of the run, and the run was timed on a CPU."""
        timed = self.run.manifest.latency.runtime or provider_of(self.recipe).runtime
        return request.target is None and timed.startswith(CPU)

    def batch(self, request: Request) -> Batch:
        """Return the batch of a request: as given, or the run's."""
        own = self.recipe.batch
        return Batch(own, own, own) if request.batch is None else request.batch

    def label(self, request: Request) -> str:
        """Return the batch in a file's name; empty for the run's own."""
        batch, own = self.batch(request), self.recipe.batch
        return "" if (batch.least, batch.most) == (own, own) else batch.label or "batch1"

    def opset(self, request: Request) -> int:
        """Return the opset of a request's ONNX file."""
        return request.opset or opset_of(self.recipe, request.target)

    def _write_fp32(self, path: Path, request: Request) -> Iterator[str]:
        from export.convert.to_onnx import check_parity, export_onnx

        batch = self.batch(request)
        inputs = 1 if batch.open else batch.most
        opset = self.opset(request)
        with replacing(path) as trial:  # a file that fails a check never replaces `path`
            info = export_onnx(
                self.model,
                random_inputs(self.example, inputs, 0),
                trial,
                opset=opset,
                metadata=self.metadata(),
                dynamic_batch=batch.open,
                batches=batch.tried,
            )
            parity = check_parity(self.model, trial, self.images(), tolerance=self.recipe.export.tolerance)
            accuracy, images = self.scored(trial)
        entry = Export(
            file=path.name,
            bytes=info.size,
            opset=opset,
            parity=Parity.model_validate(parity.to_dict()),
            accuracy=accuracy,
            images=images,
        )
        record(self.run, entry)
        size = f"opset {opset}, {batch.label or 'batch of 1'}, {info.size / 1e6:.2f} MB"
        yield f"Wrote {path}: {size}; largest difference {parity.max_abs:.1e}."


def export_format(folder: Path, request: Request) -> Iterator[str]:
    """Write a finished run's network as `request` says; each file is compared with the network before it is kept.

    Yields:
        Lines for the user.

    Raises:
        CompressorError, ExportError: The run is not finished, the request is not supported, or a check fails.
    """
    check(request)
    with closing(Finished.open(folder, request.factory)) as finished:
        made = yield from FORMATS[request.format].write(finished, request)
        if request.out is not None:
            yield from _copied(made, request.out)
        write_score(finished.run, finished.recipe)
        yield f"Wrote {write_page(finished.run)}"


def check(request: Request) -> None:
    """Reject an unsupported request before anything is loaded for it.

    Raises:
        CompressorError: The request is not supported; the hint names the alternatives.
    """
    for what, value, known in (
        ("format", request.format, FORMATS),
        ("precision", request.precision, PRECISIONS),
        ("rounding", request.rounding or "nearest", ROUNDINGS),
        ("rest", request.rest or "fp16", RESTS),
    ):
        if value not in known:
            raise CompressorError(f"--{what} {value} is not exported.", f"Choose {', '.join(known)}.")
    if request.max_drop is not None and not 0 <= request.max_drop < 100:
        raise CompressorError(f"--max-drop takes percentage points from 0 to below 100, got {request.max_drop:g}.")
    if request.target is not None:
        board = find_target(request.target)
        if request.precision in ("int8", "mixed") and not board.int8:
            raise CompressorError(f"The {board.title} has no INT8 units.", "Use --precision fp16.")
        if request.precision == "mixed" and request.address is None:
            raise CompressorError(
                f"Mixed precision is chosen by measured times, and none can be measured on a {board.title} from here.",
                "Reach the board over ssh (--target ssh://user@host), or use --precision int8, which keeps sensitive "
                "layers in FP16.",
            )
    default, taken = Request(), (*_COMMON, *FORMATS[request.format].takes)
    for name in (each.name for each in fields(Request) if each.name not in taken):
        if getattr(request, name) != getattr(default, name):
            able = ", ".join(known for known, entry in FORMATS.items() if name in entry.takes)
            option = _OPTIONS.get(name, f"--{name}")
            problem = "is written in fp32" if name == "precision" else f"does not take {option}"
            raise CompressorError(f"--format {request.format} {problem}.", f"Leave it out, or choose --format {able}.")


def _onnx(finished: Finished, request: Request) -> Generator[str, None, Path]:
    yield from finished.onnx(request)
    return finished.path_of(request)


def _boxes(finished: Finished, request: Request) -> Generator[str, None, Path]:
    check_detection(finished.recipe)
    path = finished.path_of(request)
    yield from write_boxes(
        finished.run,
        finished.task,
        finished.model,
        path,
        finished.images(),
        opset=finished.opset(request),
        tolerance=finished.recipe.export.tolerance,
        metadata=finished.metadata(),
    )
    return path


def _engine(finished: Finished, request: Request) -> Generator[str, None, Path]:
    from export.convert.onnx_header import read_header

    onnx = yield from _onnx(finished, request)
    profile = finished.batch(request).profile(read_header(onnx).shapes)
    capability = request.compute_capability or (
        (find_target(request.target).compute_capability,) if request.target else ()
    )
    built, note = build_engine_of(
        finished.run,
        onnx,
        module=request.module,
        compute_capability=capability,
        settings=replace(request.settings, profile=profile),
        must=True,
    )
    yield note
    key = f"engine.{onnx.stem.partition('.')[2]}".rstrip(".")
    record(finished.run, Export(file=built[0].file, bytes=built[0].bytes), built, key)
    return finished.run.file(built[0].file)


def _program(finished: Finished, request: Request) -> Generator[str, None, Path]:
    from export.convert.program import check_loaded, export_program, load_program

    example, model, batch = finished.example[0], finished.model, finished.batch(request)
    path = finished.run.file(".".join(part for part in ("model", finished.label(request), "pt2") if part))
    with replacing(path) as trial:
        info = export_program(model, example, trial, batch=batch, metadata=finished.metadata())
        parity = check_loaded(load_program(trial), model, finished.images(), path.name, batch=batch.usual)
    entry = Export(file=path.name, bytes=info.size, parity=Parity.model_validate(parity.to_dict()))
    record(finished.run, entry)
    yield f"Wrote {path}: {info.size / 1e6:.2f} MB; largest difference {parity.max_abs:.1e}."
    yield f"Load it with export.convert.program.load_program({path.name!r})."
    return path


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        write: Writes and checks the file; yields lines for the user and returns its path.
        takes: Fields of `Request` that it takes, apart from those that all formats take.
    """

    write: Callable[[Finished, Request], Generator[str, None, Path]]
    takes: tuple[str, ...] = ()


_COMMON = ("format", "out", "factory")
_GRAPH = ("batch", "precision", "target", "address", "opset", "max_drop", "method", "rounding", "rest")
_OPTIONS = {
    "method": "--calibration", "max_drop": "--max-drop", "module": "--builder",
    "compute_capability": "--compute-capability", "settings": "settings of engines",
}  # fmt: skip
FORMATS = {
    "onnx": Format(_onnx, _GRAPH),
    "boxes": Format(_boxes, ("opset",)),
    "engine": Format(_engine, (*_GRAPH, "module", "compute_capability", "settings")),
    "pt2": Format(_program, ("batch",)),
}
"""The export formats by name."""


def _copied(made: Path, out: Path) -> Iterator[str]:
    """Copy a file, and an engine's description beside it."""
    goals = {made: out}
    if made.suffix == ".engine":
        goals[made.with_suffix(".json")] = out.with_suffix(".json")
    for source, goal in goals.items():
        if goal.is_dir():
            raise CompressorError(f"--out {goal} is a folder; a file's name was expected.")
        write_bytes(goal, read_bytes(source, "exported file"))
    yield f"Copied it to {out}."
