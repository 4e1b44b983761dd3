"""What a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.core.errors import CompressorError
from compressor.run.onnx_files import MODEL

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        directory: Folder of the run.
        manifest: Content of its `manifest.json`; of `front.json` if the run has several targets.
        exit_code: 0 if every budget is met as measured, 3 if the best plan found misses one, 4 if one is only
            predicted or undecided. Of several targets, the first of 3, 4 and 0 that one of them has.
        builder: What builds the dense network's structure; see `run.load.Loaded`.
        runs: Results of the targets in the order of their runs, if there are several; else empty.
        chosen: The one of `runs` that a limit of lost accuracy (`max_drop`) asks for; else None.
    """

    directory: Path
    manifest: Mapping[str, Any]
    exit_code: int
    builder: Any = field(repr=False, default=None)
    runs: tuple[RunResult, ...] = ()
    chosen: RunResult | None = field(repr=False, default=None)

    @cached_property
    def model(self) -> nn.Module:
        """The slim network on the CPU, in eval mode."""
        from compressor.pruning.artefact import load

        one = self._one
        return load(one.directory, factory=one.builder)

    @property
    def onnx(self) -> Path:
        """The slim network's ONNX file in FP32; those in other precisions are named in `manifest["exports"]`."""
        return self._one.directory / MODEL

    @property
    def _one(self) -> RunResult:
        """The run of the network that this result stands for.

        Raises:
            CompressorError: There are several networks.
        """
        if not self.runs:
            return self
        if self.chosen is None:
            raise CompressorError(
                f"The run in {self.directory} has {len(self.runs)} networks.", "Take one of them: result.runs[0]"
            )
        return self.chosen

    def plain(self) -> dict[str, Any]:
        """Return the result as JSON values, for other processes."""
        return {
            "directory": str(self.directory.resolve()),
            "manifest": dict(self.manifest),
            "exit_code": self.exit_code,
            "runs": [each.plain() for each in self.runs],
            "chosen": None if self.chosen is None else self.runs.index(self.chosen),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any], builder: Any) -> RunResult:
        """Return the result that `plain` describes."""
        runs = tuple(cls.of(each, builder) for each in plain["runs"])
        chosen = None if plain["chosen"] is None else runs[plain["chosen"]]
        return cls(Path(plain["directory"]), plain["manifest"], plain["exit_code"], builder, runs, chosen)
