"""Experiment trackers: MLflow and Weights & Biases, each through its own client.

Their own environment variables say where the numbers go (`MLFLOW_TRACKING_URI`, `WANDB_MODE`, ...); without any, MLflow
writes into the current folder. A client is only imported where a run asks for its tracker.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from compressor.core.errors import CompressorError
from compressor.recipe.validation import dotted

if TYPE_CHECKING:
    from compressor.recipe import Recipe

PROJECT = "compressor"
"""Name of MLflow's experiment and of the project at Weights & Biases, if their variables name none."""
_TITLES = {"mlflow": "MLflow", "wandb": "Weights & Biases"}
_USUAL_HOST = "api.wandb.ai"
_LONGEST_TEXT = 500
"""Characters of a parameter that every version of MLflow accepts."""
_PARAMS, _METRICS = 100, 1000
"""Most parameters and metrics of one call of MLflow."""


class Point(NamedTuple):
    """Values at one step of a curve."""

    step: int
    values: Mapping[str, float]


class Tracker(Protocol):
    """A tracked run. Its methods may raise whatever their client raises.

    Attributes:
        id: What the tracker knows the run by.
        where: Where the run can be seen.
    """

    id: str
    where: str

    def curve(self, axis: str, points: Sequence[Point]) -> None:
        """Add points of curves over `axis`, such as "episode"."""

    def numbers(self, values: Mapping[str, float]) -> None:
        """Set numbers of the whole run."""

    def texts(self, values: Mapping[str, str]) -> None:
        """Set texts of the whole run."""

    def close(self, finished: bool) -> None:
        """End the tracked run; a later process may continue one that is not finished."""


def check_tracker(name: str) -> None:
    """Refuse a tracker that cannot be used here, before anything slow starts.

    Raises:
        CompressorError: Its client is not installed, or knows no account.
    """
    if name == "none":
        return
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder of results, such as wandb/, is no client
        raise CompressorError(
            f"--track {name} needs the client of {_TITLES[name]}, which is not installed.",
            f"Install it: pip install 'compressor[{name}]'",
        )
    if name == "wandb":
        _check_account()


def open_tracker(recipe: Recipe, run_name: str, known: str | None) -> Tracker:
    """Begin a tracked run, or continue the one of this `id`.

    Raises:
        CompressorError: The tracker does not answer, or does not accept the run.
    """
    name = recipe.track
    try:
        return _TRACKERS[name](recipe, run_name, known)
    except Exception as error:  # clients raise errors of their own, of HTTP libraries and of data bases
        raise CompressorError(
            f"{_TITLES[name]} cannot track the run: {reason_of(error)}.",
            "Check its environment variables (docs/guide/tracking.md), or go on without it: "
            "compress --resume RUN --track none",
        ) from error


def reason_of(error: BaseException) -> str:
    """Return an error of a client in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


class Mlflow:
    """A run of MLflow. Numbers of the whole run are metrics, its texts are tags, its recipe the parameters."""

    def __init__(self, recipe: Recipe, run_name: str, known: str | None) -> None:
        for name, value in (("MAX_RETRIES", "2"), ("TIMEOUT", "20")):  # else a dead server takes minutes to be one
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new data base is no news
        self._client: Any = MlflowClient()
        if known is None:
            self.id = str(self._client.create_run(self._experiment(), run_name=run_name).info.run_id)
            fields = [Param(name, _text(value)) for name, value in dotted(recipe.model_dump(mode="json"))]
            for start in range(0, len(fields), _PARAMS):
                self._client.log_batch(self.id, params=fields[start : start + _PARAMS])
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")
        self.where = f"MLflow, run {self.id} in {self._client.tracking_uri}"

    def _experiment(self) -> str:
        """Return the experiment that MLflow's variables name, or the toolkit's own."""
        from mlflow.exceptions import MlflowException

        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            with suppress(MlflowException):  # another process has created it meanwhile
                return str(self._client.create_experiment(name))
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def curve(self, axis: str, points: Sequence[Point]) -> None:
        self._log([(name, value, point.step) for point in points for name, value in point.values.items()])

    def numbers(self, values: Mapping[str, float]) -> None:
        self._log([(name, value, 0) for name, value in values.items()])

    def _log(self, found: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), value, now, step) for name, value, step in found]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self.id, metrics=metrics[start : start + _METRICS])

    def texts(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(_name(name), _text(value)) for name, value in values.items()]
        for start in range(0, len(tags), _PARAMS):
            self._client.log_batch(self.id, tags=tags[start : start + _PARAMS])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Wandb:
    """A run of Weights & Biases. Numbers and texts of the whole run are its summary, its recipe the configuration."""

    def __init__(self, recipe: Recipe, run_name: str, known: str | None) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex[:16]
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, save_code=False)
        self._run: Any = wandb.init(
            id=self.id,
            name=run_name,
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            config=recipe.model_dump(mode="json"),
            resume="allow",
            settings=settings,
        )
        for axis in ("episode", "epoch"):
            self._run.define_metric(axis, hidden=True)
        for name, axis in (("search/*", "episode"), ("training/*", "epoch")):
            self._run.define_metric(name, step_metric=axis)
        self.where = f"Weights & Biases, {os.path.dirname(self._run.dir) if self._run.offline else self._run.url}"

    def curve(self, axis: str, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({axis: point.step, **{_name(name): value for name, value in point.values.items()}})

    def numbers(self, values: Mapping[str, float]) -> None:
        self._run.summary.update({_name(name): value for name, value in values.items()})

    def texts(self, values: Mapping[str, str]) -> None:
        self._run.summary.update({_name(name): value for name, value in values.items()})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


_TRACKERS: dict[str, Callable[[Recipe, str, str | None], Tracker]] = {"mlflow": Mlflow, "wandb": Wandb}


def _check_account() -> None:
    """Refuse to send anything to Weights & Biases without an account, instead of asking for one on the terminal."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return
    import wandb

    settings: Any = wandb.setup().settings
    if settings.mode in ("offline", "disabled") or settings.api_key or settings.identity_token_file:
        return
    host = urlsplit(settings.base_url).hostname or ""
    with suppress(OSError, NetrcParseError):
        known = netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
        if known.keys() & {host, _USUAL_HOST}:
            return
    raise CompressorError(
        f"Weights & Biases knows no account here for {host}.",
        "Log in with: wandb login; or set WANDB_API_KEY; or keep the numbers here: WANDB_MODE=offline",
    )


def _name(name: str) -> str:
    """Return a name of signs that every tracker accepts."""
    return re.sub(r"[^\w./ -]", "_", name)


def _text(value: object) -> str:
    return str(value)[:_LONGEST_TEXT]
