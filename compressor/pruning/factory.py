"""Finds the factory of a dense network at save time, and calls it at load time."""

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
_FACTORY_HINT = (
    "Pass a function or class that builds the dense network from num_classes at most: factory=build, or its reference "
    'factory="package.module:build".'
)


def find_factory(model: nn.Module, dense: Shapes, outputs: int) -> dict[str, Any] | None:
    """Find the spec that rebuilds the dense network of `model`; None if there is none.

    The candidates, in order: the tag of `create_model`, torchvision's builders, timm's configuration, and the network's
    class if it can be imported. A candidate is accepted only if it rebuilds every tensor in its dense shape.

    Args:
        model: The pruned network, or the dense one.
        dense: Name of each parameter and buffer -> its dense shape.
        outputs: Number of outputs of the network, for one input.
    """
    from compressor.models import factory_of

    tagged = factory_of(model)
    candidates = [tagged] if tagged is not None else _candidates(model, outputs)
    return next((spec for spec in candidates if _fits(spec, dense)), None)


def given_factory(given: Factory | Mapping[str, Any], dense: Shapes, outputs: int) -> dict[str, Any]:
    """Return the spec of a factory from the caller, after verifying that it rebuilds the dense network.

    Args:
        given: A function or class, its reference `package.module:name`, or a complete spec.
        dense: Name of each parameter and buffer -> its dense shape.
        outputs: Number of outputs of the network, for one input.

    Raises:
        CompressorError: The factory is malformed, fails, or builds other shapes.
    """
    factory: Factory | None = None
    if isinstance(given, Mapping):
        if not isinstance(given.get("factory"), str):
            raise CompressorError(f"A factory is a name with arguments, not {given!r}.", _FACTORY_HINT)
        spec = {**given, "kwargs": dict(given.get("kwargs", {}))}
    elif isinstance(given, str):
        spec = {"factory": given, "kwargs": {"num_classes": outputs}}
    elif callable(given):
        spec, factory = {"factory": _reference(given), "kwargs": {"num_classes": outputs}}, given
    else:
        raise CompressorError(f"A factory is a function or its name, not {given!r}.", _FACTORY_HINT)
    wrong = differences(build_dense(spec, factory), dense)
    if wrong:
        raise CompressorError(f"The factory {spec['factory']!r} builds another network: {wrong}.", _FACTORY_HINT)
    return spec


def _reference(kind: Any) -> str | None:
    """Return `package.module:name` of a function or class; None if it cannot be imported."""
    module, name = getattr(kind, "__module__", None), getattr(kind, "__qualname__", "<")
    return None if module in (None, "__main__") or "<" in name else f"{module}:{name}"


def build_dense(spec: Mapping[str, Any], factory: Factory | None = None) -> nn.Module:
    """Build the dense network on the meta device if its constructor allows it, else with new values on the CPU.

    A user's factory is called with no argument except `num_classes`.

    Args:
        spec: Spec from `find_factory`.
        factory: The caller's factory, which replaces that of the spec.

    Raises:
        CompressorError: The factory is unknown, cannot be imported, or fails.
    """
    from compressor.models import build_from_factory

    try:
        with torch.device("meta"):
            model = build_from_factory(spec, factory)
        if not _meta_leftovers(model):
            return model
    except Exception:
        # Constructors that compute with tensors need real ones; other errors occur again below.
        pass
    try:
        return build_from_factory(spec, factory)
    except CompressorError:
        raise
    except Exception as error:  # a library's code may raise anything
        raise CompressorError(
            f"The factory {spec.get('factory')!r} fails: {type(error).__name__}: {error}.", _FACTORY_HINT
        ) from error


def _meta_leftovers(model: nn.Module) -> bool:
    """Whether plain tensor attributes are on the meta device; only the constructor knows their values."""
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
    """Describe how the tensors of a network differ from the expected dense shapes; empty if they do not."""
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
