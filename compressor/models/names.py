"""What a model's name stands for, and the nearest names where it stands for nothing."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from compressor.errors import CompressorError
from compressor.models import cifar

TIMM = "timm:"


def resolve(name: str) -> tuple[str, str]:
    """The source of a name and the name within it: ("cifar" | "torchvision" | "timm" | "user", name).

    Raises:
        CompressorError: nothing is called so (the nearest names are given), or timm is not installed.
    """
    if name.startswith(TIMM):
        return "timm", _timm_name(name.removeprefix(TIMM))
    if ":" in name:
        return "user", name
    if name in cifar.BUILDERS:
        return "cifar", name
    ours, theirs = list(cifar.BUILDERS), torchvision_names()
    if name in theirs:
        return "torchvision", name
    near = _nearest(name, [*ours, *theirs])
    raise CompressorError(
        f"There is no model called {name!r}.",
        f"{near} A model is a torchvision name, timm:NAME, package.module:factory or "
        f"one of {', '.join(ours)}.".strip(),
    )


def torchvision_names() -> list[str]:
    """The classifiers of torchvision."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    plain = {"".join(filter(str.isalnum, candidate)): candidate for candidate in known}
    near = get_close_matches("".join(filter(str.isalnum, name.lower())), plain, n=3, cutoff=0.5)
    return f"The nearest: {', '.join(prefix + plain[match] for match in near)}." if near else ""


def _timm_name(name: str) -> str:
    try:
        import timm
    except ImportError as error:
        raise CompressorError(
            f"The model timm:{name} needs timm, which is not installed.",
            "Install it with: pip install 'compressor[timm]'",
        ) from error
    architecture = name.partition(".")[0]  # what follows the point names weights, such as ".a1_in1k"
    if architecture not in (known := timm.list_models()):
        raise CompressorError(
            f"timm {timm.__version__} has no model called {name!r}.",
            _nearest(architecture, known, TIMM) or "timm.list_models() lists its models.",
        )
    return name


def call_user_factory(name: str, num_classes: int) -> nn.Module:
    """Import "package.module:factory" and call it with `num_classes`, or with nothing where it takes none.

    Raises:
        CompressorError: it cannot be imported or called, or returns no module.
    """
    module_name, _, attribute = name.partition(":")
    example = "Write it as package.module:factory, with the package installed or in the folder of the call."
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise CompressorError(f"The model {name!r} cannot be imported: {error}.", example) from error
    # A builtin such as os.abort is no factory, and the name may come from somebody else's file.
    if not callable(factory) or inspect.isbuiltin(factory):
        what = type(factory).__name__
        raise CompressorError(
            f"The model {name!r} is a {what}, expected a function or a class of modules.", example
        )
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise CompressorError(f"The model {name!r} cannot be called: {error}.", example) from error
    takes = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if others := [p for p in required if p != "num_classes"]:
        raise CompressorError(
            f"The model {name!r} wants the arguments {', '.join(others)}; only num_classes is given.",
            "Give them defaults, or wrap the factory in a function of your own.",
        )
    model = factory(num_classes=num_classes) if takes else factory()
    if not isinstance(model, nn.Module):
        what = type(model).__name__
        raise CompressorError(f"The model {name!r} returned a {what}, expected a torch.nn.Module.")
    return model
