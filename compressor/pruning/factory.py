"""Which factory builds the dense network again: found at save time, called at load time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.pruning.skeleton import named_tensors

Shapes = Mapping[str, Sequence[int]]
Factory = Callable[..., Any] | str
_ADVICE = (
    "Give a function or class that builds the dense network from num_classes at most: factory=build, or its reference "
    'factory="package.module:build".'
)


def find_factory(model: nn.Module, dense: Shapes, outputs: int) -> dict[str, Any] | None:
    """The spec that rebuilds the dense network of `model`; None where none is found.

    Looked for in turn: the tag that `create_model` leaves, torchvision's builders, timm's configuration, and
    the class of the network where it can be imported. A find counts only where it rebuilds every tensor in
    its dense shape.

    Args:
        model: The pruned network, or the dense one.
        dense: Name of each parameter and buffer -> its dense shape.
        outputs: Of the network, for one input.
    """
    from compressor.models import factory_of

    tagged = factory_of(model)
    candidates = [tagged] if tagged is not None else _candidates(model, outputs)
    return next((spec for spec in candidates if _fits(spec, dense)), None)


def given_factory(given: Factory | Mapping[str, Any], dense: Shapes, outputs: int) -> dict[str, Any]:
    """The spec of a factory that the caller gives, once it rebuilds the dense network.

    Args:
        given: A function or class, its reference `package.module:name`, or a whole spec.
        dense: Name of each parameter and buffer -> its dense shape.
        outputs: Of the network, for one input.

    Raises:
        CompressorError: it is malformed, cannot be built, or builds other shapes.
    """
    factory: Factory | None = None
    if isinstance(given, Mapping):
        if not isinstance(given.get("factory"), str):
            raise CompressorError(f"A factory is a name with arguments, not {given!r}.", _ADVICE)
        spec = {**given, "kwargs": dict(given.get("kwargs", {}))}
    elif isinstance(given, str):
        spec = {"factory": given, "kwargs": {"num_classes": outputs}}
    elif callable(given):
        spec, factory = {"factory": _reference(given), "kwargs": {"num_classes": outputs}}, given
    else:
        raise CompressorError(f"A factory is a function or its name, not {given!r}.", _ADVICE)
    wrong = differences(build_dense(spec, factory), dense)
    if wrong:
        raise CompressorError(f"The factory {spec['factory']!r} builds another network: {wrong}.", _ADVICE)
    return spec


def _reference(kind: Any) -> str | None:
    """`package.module:name` of a function or class that can be imported."""
    module, name = getattr(kind, "__module__", None), getattr(kind, "__qualname__", "<")
    return None if module in (None, "__main__") or "<" in name else f"{module}:{name}"


def build_dense(spec: Mapping[str, Any], factory: Factory | None = None) -> nn.Module:
    """The dense network, on the meta device where its constructor allows it, else with fresh values on the
    CPU.

    A user's factory is called with `num_classes` at most.

    Args:
        spec: As `find_factory` gives it.
        factory: What the caller gives in the place of the spec's own.

    Raises:
        CompressorError: the factory is unknown, cannot be imported, or fails.
    """
    from compressor.models import build_from_factory

    try:
        with torch.device("meta"):
            model = build_from_factory(spec, factory)
        if not _meta_leftovers(model):
            return model
    except Exception:
        # Constructors that compute with tensors need real ones; what they get wrong on their own fails again below.
        pass
    try:
        return build_from_factory(spec, factory)
    except CompressorError:
        raise
    except Exception as error:  # a library's code may raise anything
        raise CompressorError(
            f"The factory {spec.get('factory')!r} fails: {type(error).__name__}: {error}.", _ADVICE
        ) from error


def _meta_leftovers(model: nn.Module) -> bool:
    """Plain tensor attributes hold values that only the constructor knows."""
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def _candidates(model: nn.Module, outputs: int) -> Iterator[dict[str, Any]]:
    kind = type(model)
    if kind.__module__.startswith("torchvision.models"):
        import torchvision.models

        for name in torchvision.models.list_models():
            builder = torchvision.models.get_model_builder(name)
            if inspect.unwrap(builder).__module__ == kind.__module__:
                yield {"factory": name, "kwargs": {"num_classes": outputs}}
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    architecture = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    if isinstance(architecture, str) and kind.__module__.startswith("timm."):
        classes = getattr(model, "num_classes", outputs)
        yield {"factory": f"timm:{architecture}", "kwargs": {"num_classes": int(classes)}}
    if (reference := _reference(kind)) is not None:
        yield {"factory": reference, "kwargs": {"num_classes": outputs}}


def _fits(spec: Mapping[str, Any], dense: Shapes) -> bool:
    try:
        return not differences(build_dense(spec), dense)
    except CompressorError:
        return False


def differences(model: nn.Module, dense: Shapes) -> str:
    """How the tensors of a network differ from expected dense shapes; empty where they do not."""
    found = {name: list(tensor.shape) for name, tensor in named_tensors(model).items()}
    missing, extra = sorted(dense.keys() - found.keys()), sorted(found.keys() - dense.keys())
    other = [name for name in found if name in dense and found[name] != list(dense[name])]
    parts = []
    if missing:
        parts.append(f"it lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
    if extra:
        parts.append(f"it has {', '.join(extra[:3])}{' and more' if len(extra) > 3 else ''} besides")
    if other:
        parts.append(f"{other[0]} has shape {found[other[0]]} instead of {list(dense[other[0]])}")
    return "; ".join(parts)
