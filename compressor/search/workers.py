"""Worker processes that score candidates in parallel, and the data that each receives; one that dies is replaced."""

from __future__ import annotations

import queue
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compressor.core.errors import CompressorError
from compressor.core.processes import Child, ChildDied, ChildLate, Failed
from compressor.data.files import FileSplit
from compressor.data.images import ImageFile
from compressor.data.preprocessing import Preprocessing
from compressor.data.splits import MemorySplit, Split
from compressor.pruning.blueprint import blueprint
from compressor.pruning.space import PruningSpace
from compressor.training.classification import Classification

if TYPE_CHECKING:
    from compressor.pruning.plan import ChannelPlan
    from compressor.training.feeds import Feed
    from compressor.training.task import Task


LOCAL_CLUSTER = "ray://local"
"""A Ray cluster that is started on this machine and ends with the run."""

ATTEMPTS = 3
"""Number of workers that one candidate may end before the search stops."""


class WorkerLost(Exception):
    """A worker ended or hung; the text says how."""


class Worker(ABC):
    """One process that scores, wherever it runs; `version` is that of its weights."""

    version: int

    @abstractmethod
    def reweigh(self, weights: Any, channels_last: bool) -> None:
        """Replace the worker's weights."""

    @abstractmethod
    def score(self, plan: str, floor: float | None) -> float:
        """Return the accuracy of a plan (JSON); raise WorkerLost if there is no answer."""

    @abstractmethod
    def close(self) -> None:
        """End it."""


class Site(ABC):
    """Place where workers run: it publishes tensors once, and starts workers.

    Attributes:
        number: Number of parallel workers.
        threads: Threads of each.
        after_s: Seconds of scoring in the searching process, with as many threads, before workers are started. Such a
            site is a help that nobody asked for: without it, the search continues in its own process.
    """

    number: int
    threads: int
    after_s: float = 0.0

    def settle(self) -> int:
        """Choose and return the number of workers, right before they are started."""
        return self.number

    @abstractmethod
    def publish(self, name: str, tensors: Mapping[str, Tensor]) -> Any:
        """Publish tensors for every worker; they replace those of the same name."""

    @abstractmethod
    def start(self, index: int, plain: Mapping[str, Any], weights: Any, images: Any) -> Worker:
        """Start a worker; raise WorkerLost if it does not start."""

    @abstractmethod
    def stop(self) -> None:
        """Stop all workers, and start no more."""

    @abstractmethod
    def close(self) -> None:
        """Remove what was published, after the workers have ended."""


class Workers:
    """Scores plans on a site's workers; the same weights are sent to each worker once.

    Args:
        site: Where the workers run.
        plain: Arguments of `Scorer`.
        images: Images of both splits.
    """

    def __init__(self, site: Site, plain: Mapping[str, Any], images: Mapping[str, Tensor]) -> None:
        self.number = site.number
        self._site, self._plain = site, dict(plain)
        self._images = site.publish("images", images)
        self._weights: Any = None
        self._version = 0
        self._closed = False
        self._places: queue.SimpleQueue[tuple[int, Worker | None]] = queue.SimpleQueue()
        for index in range(site.number):
            self._places.put((index, None))
        self._threads = ThreadPoolExecutor(site.number, thread_name_prefix="scoring")

    def reweigh(self, tensors: Mapping[str, Tensor], channels_last: bool) -> None:
        """Score with these weights from now on; each worker receives them with its next candidate."""
        self._version += 1
        self._plain["channels_last"] = channels_last
        self._weights = self._site.publish(f"weights-{self._version}", tensors)

    def score(
        self, plans: Sequence[ChannelPlan], floors: Sequence[float | None] | None = None
    ) -> list[float]:
        """Return the accuracy of each plan, in order, stopping early below its floor if there is one.

        Raises:
            CompressorError: A candidate ended `ATTEMPTS` workers, or cannot be scored.
        """
        pairs = zip(plans, floors or [None] * len(plans), strict=True)
        waiting = [self._threads.submit(self._one, plan, floor) for plan, floor in pairs]
        try:
            return [each.result() for each in waiting]
        except BaseException:
            for each in waiting:
                each.cancel()
            self.close()
            raise

    def close(self) -> None:
        """Stop all workers, and abandon what they are scoring."""
        if self._closed:
            return
        self._closed = True
        self._site.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._site.close()

    def _one(self, plan: ChannelPlan, floor: float | None) -> float:
        index, worker = self._places.get()
        try:
            for attempt in range(ATTEMPTS):
                if self._closed:
                    raise CompressorError("The search was stopped.")
                try:
                    if worker is None:
                        worker = self._site.start(index, self._plain, self._weights, self._images)
                        worker.version = self._version
                    if worker.version != self._version:
                        worker.reweigh(self._weights, self._plain["channels_last"])
                        worker.version = self._version
                    return worker.score(plan.to_json(), floor)
                except WorkerLost as lost:
                    if worker is not None:
                        worker.close()
                    worker, end = None, str(lost)
                    if attempt == ATTEMPTS - 1 and not self._closed:
                        raise CompressorError(
                            f"A candidate of widths {list(plan.widths.values())} ended {ATTEMPTS} workers, one after "
                            f"another: the last was {end}.",
                            "If memory ran out, continue with fewer workers: compress --resume RUN --workers 1",
                        ) from None
            raise CompressorError("The search was stopped.")
        finally:
            self._places.put((index, worker))


class LocalWorker(Worker):
    """A child process of this one."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._child = Child("compressor.search.scorer", threads)
        self._seconds = seconds
        self.version = 0

    @property
    def pid(self) -> int:
        return self._child.pid

    def begin(self, plain: Mapping[str, Any], weights: str, images: str) -> None:
        self._ask({"do": "begin", "plain": dict(plain), "weights": weights, "images": images})

    def reweigh(self, weights: str, channels_last: bool) -> None:
        self._ask({"do": "weights", "weights": weights, "channels_last": channels_last})

    def score(self, plan: str, floor: float | None) -> float:
        return float(self._ask({"do": "score", "plan": plan, "floor": floor}))

    def close(self) -> None:
        self._child.close()

    def _ask(self, request: Mapping[str, Any]) -> Any:
        try:
            return self._child.ask(request, self._seconds)
        except ChildDied as died:
            raise WorkerLost(str(died)) from None
        except ChildLate:
            raise WorkerLost(f"stopped, as it had not answered within {self._seconds:g} s") from None
        except Failed as failed:
            raise CompressorError(f"A worker failed: {failed}.", "Try it with --workers 1.") from None


class ThisMachine(Site):
    """Processes on this machine; tensors are in files that they map into memory.

    Args:
        number: Number of processes.
        threads: Threads of each process.
        seconds: Time limit for a candidate.
        devices: "cpu", or the accelerators that the processes share.
    """

    def __init__(self, number: int, threads: int, seconds: float, devices: Sequence[str] = ("cpu",)) -> None:
        self.number, self.threads = number, threads
        self._seconds, self._devices = seconds, devices
        self._folder = tempfile.TemporaryDirectory(prefix="compressor-workers-")
        self._started: weakref.WeakSet[LocalWorker] = weakref.WeakSet()
        self._stopped = False

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [worker.pid for worker in list(self._started)]

    def publish(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        from safetensors.torch import save_file

        path = Path(self._folder.name) / f"{name}.safetensors"
        for old in path.parent.glob(f"{name.partition('-')[0]}*.safetensors"):
            old.unlink()  # a worker that has mapped it keeps it until it ends
        save_file(dict(tensors), path)
        return str(path)

    def start(self, index: int, plain: Mapping[str, Any], weights: str, images: str) -> LocalWorker:
        if self._stopped:
            raise WorkerLost("not started: the search was stopped")
        worker = LocalWorker(self.threads, self._seconds)
        self._started.add(worker)
        if self._stopped:  # in the meantime: `stop` may not have seen the new worker
            worker.close()
            raise WorkerLost("ended: the search was stopped")
        device = self._devices[index % len(self._devices)]
        placed = {**plain, "device": device}
        try:
            worker.begin(placed, weights, images)
        except BaseException:
            worker.close()
            raise
        return worker

    def stop(self) -> None:
        self._stopped = True
        for worker in list(self._started):
            worker.close()

    def close(self) -> None:
        self._folder.cleanup()


def described(
    space: PruningSpace, task: Task, calibration: Feed | None, search: Feed | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a `Scorer` scores: network and splits as plain values, and the images of both splits as tensors.

    Args:
        space: Pruning space of the dense network.
        task: Task of the evaluator: that of classification.
        calibration, search: Splits as the evaluator reads them.
    """
    assert isinstance(task, Classification)
    plain: dict[str, Any] = {"network": blueprint(space), "measure": task.measure}
    images: dict[str, Tensor] = {}
    for name, split in (("train", calibration), ("search", search)):
        plain[name], tensors = _plain(split)
        images |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return plain, images


def _plain(split: Feed | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a split as plain values and, if it is in memory, tensors."""
    assert isinstance(split, Split)
    plain: dict[str, Any] = {"preprocessing": split.preprocessing.to_dict()}
    if isinstance(split, FileSplit):
        files = [[str(Path(file.path).resolve()), file.label] for file in split.files]
        return plain | {"files": files}, {}
    assert isinstance(split, MemorySplit)
    return plain, {"images": split.images.contiguous(), "labels": split.labels.contiguous()}


def split_of(name: str, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Split:
    preprocessing = Preprocessing.from_dict(plain["preprocessing"])
    if "files" in plain:
        files = [ImageFile(path, label) for path, label in plain["files"]]
        return FileSplit(files, preprocessing)
    return MemorySplit(tensors[f"{name}.images"], tensors[f"{name}.labels"], preprocessing)
