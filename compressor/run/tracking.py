"""Sends what a run writes to an experiment tracker, while it runs.

A thread looks at the run's own files, `manifest.json` and `search/episodes.jsonl`, and sends what is new there. So the
search and the training never wait for a tracker, and one that fails is tried again with all that it lacks. What was
sent is recorded in `tracking.json`, so that a resumed run continues the tracked one. Nothing is sent while a latency is
measured.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from compressor.core.errors import CompressorError
from compressor.core.manifest import MANIFEST, Document, Epoch, Manifest, read_episode
from compressor.core.progress import say
from compressor.core.records import EPISODES, episodes_after
from compressor.report.judgement import measured_to_the_end, time_ratio, verdict
from compressor.run.folder import RunFolder
from compressor.run.trackers import Point, Tracker, open_tracker, reason_of

if TYPE_CHECKING:
    from compressor.recipe import Recipe

SENT = "tracking.json"
INTERVAL_S = 10.0
"""Time between two looks at the files."""
PATIENCE_S = 60.0
"""How long the end of a run waits for its tracker."""
STOP_S = 5.0
"""How long a stopped run waits for it; what it lacks is sent when the run is resumed."""
_MEASURING = ("probe", "measure")
_PER_CALL = 100
"""Points of one call, after which is recorded that they were sent."""

Count = Annotated[int, Field(ge=0)]
Item = TypeVar("Item")


class Sent(Document):
    """What a run has sent to which tracker: numbers of episodes and of epochs."""

    tracker: str = ""
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")] = ""
    episodes: Count = 0
    epochs: Count = 0


@contextmanager
def followed(run: RunFolder, recipe: Recipe) -> Iterator[None]:
    """Send what the run writes to its recipe's tracker while the context lasts; does nothing without one.

    Raises:
        CompressorError: The tracker does not answer at the beginning. What it does later never ends the run.
    """
    if recipe.track == "none":
        yield
        return
    path, sent = run.file(SENT), Sent()
    with suppress(CompressorError):  # what is damaged is a new tracked run
        sent = Sent.read_tolerant(path)
    known = sent.id if sent.tracker == recipe.track else ""
    tracker = open_tracker(recipe, run.name, known or None)
    sent = sent if known else Sent(tracker=recipe.track, id=tracker.id, episodes=0, epochs=0)
    sent.write(path)
    say(f"The run is tracked by {tracker.where}")
    follower = Follower(run.path, tracker, sent)
    follower.start()
    try:
        yield
    except BaseException:
        follower.end(finished=False)
        raise
    if problem := follower.end(finished=True):
        run.note(f"{problem} The rest is sent by: compress --resume {run.path}")


class Follower:
    """The thread that follows a run.

    Args:
        folder: Folder of the run.
        tracker: Where its numbers go.
        sent: What has been sent before.
    """

    def __init__(self, folder: Path, tracker: Tracker, sent: Sent) -> None:
        self._folder, self._tracker, self._sent = folder, tracker, sent
        self._numbers: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._seen: tuple[int, ...] = ()
        self._problem = ""
        self._finished = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self, finished: bool) -> str:
        """Send the rest, and end the tracked run; return what went wrong, or nothing.

        Args:
            finished: Whether the run has ended, and not been stopped.
        """
        self._finished = finished
        self._stop.set()
        patience = PATIENCE_S if finished else STOP_S
        self._thread.join(patience)
        if self._thread.is_alive():
            return f"The tracker has not answered for {patience:g} s."
        return self._problem

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._try()
        self._try(last=True)

    def _try(self, last: bool = False) -> None:
        """Send what is new, and keep what is wrong."""
        try:
            self._send(last)
            if last:
                self._tracker.close(self._finished)
        except Exception as error:  # whatever a client raises, the run goes on
            reason = reason_of(error)
            if not self._problem and not last:
                say(f"The tracker fails: {reason}. The run continues, and tries again.")
            self._problem = f"The tracker fails: {reason}."

    def _send(self, last: bool) -> None:
        log, path = self._folder / EPISODES, self._folder / MANIFEST
        seen = (*_marks(path), *_marks(log))
        if not path.is_file() or (seen == self._seen and not last):
            return
        manifest = Manifest.read_tolerant(path)
        if not last and any(name in manifest.stages and not manifest.finished(name) for name in _MEASURING):
            return
        for part in _parts(episodes_after(log, self._sent.episodes)):
            first = self._sent.episodes
            self._tracker.curve("episode", [_of_episode(place, line) for place, line in enumerate(part, first)])
            self._keep(episodes=first + len(part))
        self._keep(epochs=min(self._sent.epochs, len(manifest.training)))  # fewer, where fine-tuning is repeated
        for entries in _parts(manifest.training[self._sent.epochs :]):
            self._tracker.curve("epoch", [_of_epoch(each) for each in entries])
            self._keep(epochs=self._sent.epochs + len(entries))
        numbers, texts = numbers_of(manifest), texts_of(manifest, self._folder)
        if new := {name: value for name, value in numbers.items() if self._numbers.get(name) != value}:
            self._tracker.numbers(new)
            self._numbers = numbers
        if changed := {name: text for name, text in texts.items() if self._texts.get(name) != text}:
            self._tracker.texts(changed)
            self._texts = texts
        self._seen, self._problem = seen, ""

    def _keep(self, **sent: int) -> None:
        """Record what has been sent."""
        after = self._sent.model_copy(update=sent)
        if after != self._sent:
            self._sent = after
            after.write(self._folder / SENT)


def numbers_of(manifest: Manifest) -> dict[str, float]:
    """Return the numbers of a run that are known so far, by the names that trackers show them under."""
    accuracy, latency = manifest.accuracy, manifest.latency
    ratio = time_ratio(manifest)
    found: dict[str, float | None] = {
        "score/dense": accuracy.dense,
        "score/cut": accuracy.pruned,
        "score/compensated": accuracy.compensated,
        "score/finetuned": accuracy.finetuned,
        "score/exported": accuracy.exported,
        "score/deployed": manifest.deployed_score if manifest.finished("measure") else None,
        "latency/predicted_ms": latency.predicted_ms,
        "latency/measured_ms": latency.measured_ms,
        "latency/dense_ms": latency.dense_ms,
        "latency/share_of_dense": None if ratio is None else ratio[0],
    }
    for name, cost in (("dense", manifest.cost.dense), ("slim", manifest.cost.slim)):
        found |= {f"macs/{name}": cost.macs, f"params/{name}": cost.params, f"onnx_bytes/{name}": cost.onnx_bytes}
    for budget in manifest.budgets:
        known = {"target": budget.target, "predicted": budget.predicted, "measured": budget.measured}
        found |= {f"budget/{budget.name}/{what}": value for what, value in known.items()}
    found |= {f"seconds/{name}": stage.seconds for name, stage in manifest.stages.items()}
    return _numbers(found)


def texts_of(manifest: Manifest, folder: Path) -> dict[str, str]:
    """Return what a tracker shows of a run beside its numbers: its state, and the paths of its files."""
    whole = folder.resolve()
    found = {"folder": str(whole), "status": manifest.status, "metric": manifest.accuracy.metric}
    if measured_to_the_end(manifest):
        found["verdict"] = verdict(manifest)
    found |= {f"versions/{name}": version for name, version in manifest.versions.items()}
    return found | {f"files/{name}": str(whole / name) for name in manifest.files}


def _of_episode(place: int, line: Mapping[str, Any]) -> Point:
    """Return the point of a line of the episode log."""
    episode = read_episode(line)
    costs = {f"search/{name}": value for name, value in episode.costs.items()}
    return Point(place, _numbers({"search/reward": episode.reward, "search/accuracy": episode.accuracy, **costs}))


def _of_epoch(epoch: Epoch) -> Point:
    values = {f"training/loss_{epoch.phase}": epoch.loss, f"training/accuracy_{epoch.phase}": epoch.accuracy}
    return Point(epoch.epoch or 0, _numbers(values))


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _PER_CALL):
        yield items[start : start + _PER_CALL]


def _marks(path: Path) -> tuple[int, int]:
    """Return what changes with a file."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size
