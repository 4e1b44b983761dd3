"""Which factory builds the dense network again: found at save time, called at load time."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.pruning.skeleton import named_tensors

Shapes = Mapping[str, Sequence[int]]
_ADVICE = (
    'Pass factory={"factory": "package.module:function", "kwargs": {"num_classes": N}} to save(), where the function '
    "builds the dense network from num_classes at most, and can be imported."
)


def infer_factory(model: nn.Module, dense: Shapes) -> dict[str, Any]:
    """The spec that rebuilds the dense network of `model`.

    Looked for in turn: the tag that `create_model` leaves, torchvision's builders, timm's configuration, and
    the class of the network where it can be imported. A find counts only where it rebuilds every tensor in
    its dense shape.

    Args:
        model: The pruned network.
        dense: Name of each parameter and buffer -> its dense shape.

    Raises:
        CompressorError: none fits; the message names what to pass.
    """
    from compressor.models import factory_of

    tagged = factory_of(model)
    if tagged is not None:
        return tagged
    for spec in _candidates(model, dense):
        if _fits(spec, dense):
            return spec
    kind = type(model)
    raise CompressorError(
        f"No factory was found that builds the dense {kind.__module__}.{kind.__qualname__} again, so that a saved "
        "network could not be loaded.",
        _ADVICE,
    )


def check_factory(spec: Any, dense: Shapes) -> dict[str, Any]:
    """A spec given by the caller, once it rebuilds the dense network.

    Raises:
        CompressorError: it is malformed, cannot be built, or builds other shapes.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("factory"), str):
        raise CompressorError(f"A factory is a name with arguments, not {spec!r}.", _ADVICE)
    made = {"factory": spec["factory"], "kwargs": dict(spec.get("kwargs", {}))}
    wrong = differences(build_dense(made), dense)
    if wrong:
        raise CompressorError(f"The factory {spec['factory']!r} builds another network: {wrong}.", _ADVICE)
    return made


def build_dense(spec: Mapping[str, Any]) -> nn.Module:
    """The dense network, on the meta device where its constructor allows it, else with fresh values on the
    CPU.

    A user's factory must be a function or a class of modules, and is called with `num_classes` at most.

    Raises:
        CompressorError: the factory is unknown, cannot be imported, or fails.
    """
    from compressor.models import build_from_factory

    name = str(spec.get("factory"))
    if ":" in name and not name.startswith("timm:"):
        _check_user_factory(name)
    try:
        with torch.device("meta"):
            model = build_from_factory(spec)
        if not _meta_leftovers(model):
            return model
    except CompressorError:
        raise
    except Exception:
        # Constructors that compute with tensors need real ones; what they get wrong on their own fails again below.
        pass
    try:
        return build_from_factory(spec)
    except CompressorError:
        raise
    except Exception as error:  # a user's or a library's code may raise anything
        raise CompressorError(
            f"The factory {name!r} fails: {type(error).__name__}: {error}.", _ADVICE
        ) from error


def _check_user_factory(name: str) -> None:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise CompressorError(
            f"The factory {name!r}, which builds this network, cannot be imported: {error}.",
            "Install the package, or start Python in the folder of that module.",
        ) from error
    if not inspect.isfunction(found) and not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise CompressorError(
            f"The factory {name!r} is neither a function nor a class of modules.",
            "Name one that builds the dense network.",
        )


def _meta_leftovers(model: nn.Module) -> bool:
    """Plain tensor attributes hold values that only the constructor knows."""
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def _candidates(model: nn.Module, dense: Shapes) -> Iterator[dict[str, Any]]:
    kind = type(model)
    outputs = _outputs(dense)
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
    if kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__:
        yield {"factory": f"{kind.__module__}:{kind.__qualname__}", "kwargs": {"num_classes": outputs}}


def _outputs(dense: Shapes) -> int:
    """Outputs of the last weight: the number of classes of every common network."""
    weights = [shape for shape in dense.values() if len(shape) > 1]
    return weights[-1][0] if weights else 1


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
