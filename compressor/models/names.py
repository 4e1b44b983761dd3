"""Resolve model names, suggest the nearest names for an unknown one, and decide which user code may run.

A run's folder may come from somebody else, and its recipe names the factory of its network. Commands that read a
finished run import a factory only if this user has started a run with the same reference and the same module file
before, according to a list in the cache folder, or names it now.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import nn

from compressor.core.errors import CompressorError
from compressor.core.files import cache_folder, write_atomic
from compressor.core.plugins import raised_at, shown
from compressor.models import cifar
from compressor.models.detectors import PREPARED
from compressor.models.onnx_file import NETWORK, is_file

TIMM = "timm:"

_RUN_BEFORE = "factories.json"
"""File in the cache folder: reference of each factory that was run -> files of its module."""

TASKS = ("classification", "segmentation", "detection")
_OTHER_TASKS = {
    "detection": "a detection network",
    "segmentation": "a segmentation network",
    "video": "a network for video clips",
    "quantization": "a network of quantised operators",
    "optical_flow": "a network for optical flow",
}
"""Modules of torchvision.models besides its classifiers, and the kind of their networks."""


def resolve(name: str, task: str | None = "classification") -> tuple[str, str]:
    """Return the source of a name and the name within it.

    The sources are "cifar", "torchvision", "timm", "onnx" (a file, or one that was read; see `onnx_file`), "class" (a
    class of torchvision's own, such as `torchvision.models.googlenet:GoogLeNet`) and "user" (any other
    `package.module:factory`). None of them is imported or opened.

    Args:
        name: Name of a network.
        task: One of `TASKS` that it must be for; None for any of them.

    Raises:
        CompressorError: The name is unknown (the nearest ones are listed), it is for another task, or timm is missing.
    """
    if is_file(name):
        return "onnx", name
    if task not in (None, "classification"):
        _refuse_classifiers(name, str(task))
    if name.startswith(TIMM):
        return "timm", _timm_name(name.removeprefix(TIMM))
    if ":" in name:
        return ("class" if _is_torchvision_class(name) else "user"), name
    if name in cifar.BUILDERS:
        return "cifar", name
    ours, theirs = list(cifar.BUILDERS), torchvision_names(task)
    if name in theirs:
        return "torchvision", name
    _refuse_other_tasks(name, task)
    near = _nearest(name, [*ours, *theirs])
    raise CompressorError(
        f"There is no model called {name[:200]!r}.",
        f"{near} A model is a torchvision name, timm:NAME, FILE.onnx, package.module:factory or one of "
        f"{', '.join(ours)}.".strip(),
    )


def is_users(name: str) -> bool:
    """Return whether a name is the user's own code, which is imported only if the user names it."""
    return ":" in name and not name.startswith(TIMM) and not is_file(name) and not _is_torchvision_class(name)


def _is_torchvision_class(name: str) -> bool:
    """Return whether a name is that of a class which torchvision defines beside one of its classifiers."""
    module, _, attribute = name.partition(":")
    if not module.startswith("torchvision.models."):
        return False
    import torchvision

    builders = [torchvision.models.get_model_builder(each) for each in torchvision_names()]
    if module not in {inspect.unwrap(builder).__module__ for builder in builders}:
        return False
    found = vars(sys.modules[module]).get(attribute)
    return inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__ == module


def _refuse_classifiers(name: str, task: str) -> None:
    if name in cifar.BUILDERS or name.startswith(TIMM) or name in torchvision_names():
        raise CompressorError(
            f"{name} is a classifier of images, and the task is {task}.",
            f"The networks for it: {', '.join(torchvision_names(task))}; or package.module:factory.",
        )


def _refuse_other_tasks(name: str, task: str | None) -> None:
    import torchvision

    for other, what in _OTHER_TASKS.items():
        if name not in torchvision.models.list_models(module=getattr(torchvision.models, other)):
            continue
        if name in (names := torchvision_names(other)):
            raise CompressorError(
                f"{name} is {what}, and the task is {task}.", f"Give --task {other}, and data for it."
            )
        if names:
            raise CompressorError(
                f"{name} is {what} whose outputs have no fixed size before its post-processing.",
                f"Those that can be compressed: {', '.join(names)}.",
            )
        plain = _nearest(name.removeprefix("quantized_"), torchvision_names())
        raise CompressorError(
            f"{name} is {what}; only classifiers, segmentation and detection networks of images can be compressed.",
            f"{plain} The classifiers are those of torchvision.models.".strip(),
        )


def torchvision_names(task: str | None = "classification") -> list[str]:
    """Return the networks of torchvision for a task, or for all; of detectors those without a stage of proposals."""
    import torchvision

    models = torchvision.models
    if task is None:
        return [name for each in TASKS for name in torchvision_names(each)]
    if task == "segmentation":
        return list(models.list_models(module=models.segmentation))
    if task == "detection":
        return list(PREPARED)
    return list(models.list_models(module=models)) if task == "classification" else []


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    plain = {"".join(filter(str.isalnum, candidate)): candidate for candidate in known}
    near = get_close_matches("".join(filter(str.isalnum, name.lower())), plain, n=3, cutoff=0.5)
    return f"The nearest: {', '.join(prefix + plain[match] for match in near)}." if near else ""


def _timm_name(name: str) -> str:
    """Return a name of timm's registry, with the tag of its weights if there is one; reject timm's other sources."""
    try:
        import timm
        from timm.models import get_arch_pretrained_cfgs
    except ImportError as error:
        raise CompressorError(
            f"The model timm:{name} needs timm, which is not installed.",
            "Install it with: pip install 'compressor[timm]'",
        ) from error
    architecture, _, tag = name.partition(".")
    if architecture not in (known := timm.list_models()):
        raise CompressorError(
            f"timm {timm.__version__} has no model called {name[:200]!r}.",
            _nearest(architecture, known, TIMM) or "timm.list_models() lists its models.",
        )
    tags = [each.partition(".")[2] for each in get_arch_pretrained_cfgs(architecture)]
    if "." in name and tag not in tags:
        known_tags = ", ".join(each for each in tags if each)
        raise CompressorError(
            f"timm {timm.__version__} has no weights called {tag[:200]!r} of {architecture}.",
            f"It knows: {known_tags}." if known_tags else f"Leave the tag out: {TIMM}{architecture}",
        )
    return name


def call_factory(factory: Callable[..., Any], what: str, num_classes: int) -> nn.Module:
    """Return a network from a factory; one that does not accept `num_classes` is called without it.

    Args:
        factory: Function, or class of modules.
        what: Name of the factory in messages.
        num_classes: Outputs of the network.

    Raises:
        CompressorError: It cannot be called this way, raises, or does not return a module.
    """
    # A builtin such as os.abort is not a factory.
    if not callable(factory) or inspect.isbuiltin(factory):
        raise CompressorError(
            f"{what} is a {type(factory).__name__}, expected a function or a class of modules.",
            "Write it as package.module:factory.",
        )
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise CompressorError(f"{what} cannot be called: {error}.", "Name a function or a class.") from error
    named = "num_classes" in parameters
    takes = named or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if others := [p for p in required if p != "num_classes"]:
        raise CompressorError(
            f"{what} requires the arguments {', '.join(others)}; only num_classes is given.",
            "Give them defaults, or wrap the factory in a function of your own.",
        )
    try:
        try:
            model = factory(num_classes=num_classes) if takes else factory()
        except TypeError:
            if named or not takes:
                raise
            model, takes = factory(), False  # its **keywords are for other arguments
    except CompressorError:
        raise
    except (Exception, SystemExit) as error:  # the factory's code may raise anything
        given = f"num_classes={num_classes}" if takes else ""
        raise CompressorError(
            f"{what}, called with ({given}), fails: {shown(error)}{raised_at(error)}.",
            "The factory must build the network from num_classes at most.",
        ) from error
    if not isinstance(model, nn.Module):
        raise CompressorError(f"{what} returned an object of type {type(model).__name__}, expected a torch.nn.Module.")
    return model


# ---------------------------------------------------------------- factories that this user has run
def remember_factory(name: str) -> None:
    """Record that the user runs the factory `package.module:factory`; other names need no record."""
    if not is_users(name) or (place := _module_file(name)) is None:
        return
    known = _run_before()
    if place in known.get(name, []):
        return
    with suppress(CompressorError):  # without a cache the commands require the name
        write_atomic(cache_folder() / _RUN_BEFORE, json.dumps({**known, name: [*known.get(name, []), place]}, indent=1))


def allowed_factory(name: str, given: str | None, folder: Path) -> str:
    """Return the factory that builds the network of the run in `folder`, or the path of its ONNX file.

    Args:
        name: Name in the run's files.
        given: Name that the user gave with the command, if any.
        folder: Folder of the run.

    Raises:
        CompressorError: It is user code that was neither run here before nor named now.
    """
    if given is not None:
        return given
    if is_file(name):
        return str(folder / NETWORK)
    find_again(name)
    if not is_users(name) or _module_file(name) in _run_before().get(name, []):
        return name
    raise CompressorError(
        f"The network of {folder} is built by {name[:200]!r}, Python code that was not run from here before; code that "
        "is named only in a file is not imported.",
        f"If you trust it, name it, in the folder of its module: --factory {name[:200]}",
    )


def find_again(name: str) -> None:
    """Let a factory be imported from where this user ran it before, if it is not found from here."""
    if not is_users(name) or _module_file(name) is not None:
        return
    places = [path for path in map(Path, _run_before().get(name, [])) if path.is_file()]
    if len(places) == 1:  # several: the folder of the call decides
        module = places[0].parent if places[0].name == "__init__.py" else places[0]
        sys.path.append(str(module.parent))


def _module_file(name: str) -> str | None:
    """Return the file of a reference's outermost package or module, as it would be imported from here; run none."""
    top = name.partition(":")[0].partition(".")[0]
    found = PathFinder.find_spec(top, [os.getcwd(), *sys.path])
    if found is None:
        return None
    places = list(found.submodule_search_locations or [])
    return str(Path(found.origin or places[0]).resolve()) if found.origin or places else None


def _run_before() -> dict[str, list[str]]:
    try:
        known = json.loads((cache_folder() / _RUN_BEFORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {name: places for name, places in known.items() if isinstance(places, list)}
