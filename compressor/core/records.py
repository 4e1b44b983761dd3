"""Records that a run writes: the checkpoint that a stage resumes from, and the log of its episodes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.core.errors import CompressorError
from compressor.core.files import disk_error, parse_json, read_text, replacing, write_atomic
from export.files import open_regular

RECIPE = "recipe.yaml"
EPISODES = "search/episodes.jsonl"


class Checkpoint:
    """The state that a resumed stage starts from: one file, replaced as a whole.

    The state is a nested dict or list of tensors, strings, numbers, booleans and None. It is read back with
    `weights_only=True`, so that a file from elsewhere cannot run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, state: Mapping[str, Any]) -> None:
        import torch

        with replacing(self.path) as temporary:
            try:
                torch.save(dict(state), temporary)
            except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
                raise CompressorError(
                    f"The checkpoint {self.path} cannot be written: {error}.",
                    "Most often the disk is full: free some space, then continue with: compress --resume RUN",
                ) from error

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, or None if there is none yet.

        Raises:
            CompressorError: The file is damaged or holds something other than a state.
        """
        import torch

        if not self.path.exists():
            return None
        try:
            with open_regular(self.path) as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CompressorError(
                f"The checkpoint {self.path} cannot be read: {reason}.",
                "Delete it to repeat its stage from the start.",
            ) from error
        if not isinstance(state, dict):
            raise CompressorError(
                f"The checkpoint {self.path} holds a {type(state).__name__}, expected a dict."
            )
        return state

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


_LOG_HINT = "Delete that line and those after it."


class EpisodeLog:
    """`episodes.jsonl`: one JSON object per line, written at the end of each episode."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._length = sum(1 for _ in self.records())

    def __len__(self) -> int:
        return self._length

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(dict(record), allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._length += 1

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the episodes so far; a last line truncated by a kill is left out."""
        if not self.path.exists():
            return
        lines = io.StringIO(read_text(self.path, "episode log"))
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            record = parse_json(line, f"Line {number} of {self.path}", _LOG_HINT)
            if not isinstance(record, dict):
                raise CompressorError(f"Line {number} of {self.path} is no episode.", _LOG_HINT)
            yield record

    def truncate(self, length: int) -> None:
        """Keep the first `length` episodes: those known to the resumed checkpoint."""
        kept = [json.dumps(record) + "\n" for _, record in zip(range(length), self.records(), strict=False)]
        write_atomic(self.path, "".join(kept))
        self._length = len(kept)


def episodes_after(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the episodes of a log after the first `count`, up to a line that is not whole, while a run writes it."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[count:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        found.append(record)
    return found
