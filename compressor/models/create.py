"""Create a network by name: the toolkit's own, torchvision's, timm's or the user's; and look up what is published."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.core import progress
from compressor.core.errors import CompressorError
from compressor.core.plugins import import_object
from compressor.models import cifar
from compressor.models.checkpoint import State
from compressor.models.computed import fix_weights
from compressor.models.detectors import CLASS_HEAD, PREPARED, check_detector, wrapped
from compressor.models.first_run import Makers, Shape, input_channels, replace_head, run_first, single_head
from compressor.models.names import call_factory, resolve, torchvision_names
from compressor.models.onnx_file import OnnxSource, open_onnx, require_equal
from compressor.models.sizes import cannot_build, interpolated, size_argument, usual_size
from compressor.models.weights import FRESH_HEAD, Say, fit_state, load_weights, some

FACTORY_TAG = "compressor_factory"
"""Attribute of a created model: the spec from which `build_from_factory` rebuilds it."""

Factory = Callable[..., Any] | str
"""A function or class that builds a network, or its reference `package.module:name`."""

_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_STATED = ("mean", "std", "crop_share", "interpolation", "resize", "channel_order", "range")
"""Fields of a preprocessing that an ONNX file may state, beside its size."""

_AUXILIARY_MAPS = ("aux_classifier.",)
"""The auxiliary head of torchvision's segmentation networks, which their weights may have and no network here has."""


def create_model(
    name: str,
    num_classes: int,
    weights: str | Path = "none",
    input_shape: Shape = (3, 32, 32),
    say: Say = progress.say,
    task: str = "classification",
) -> nn.Module:
    """Build a network and give it weights.

    If the network has as many outputs as there are classes, no layer is replaced. Otherwise a new layer replaces the
    one that computes the output, which a trial run determines.

    Args:
        name: A torchvision name ("resnet50"), "timm:NAME", one of the toolkit's own ("cifar_resnet20/32/44/56/110",
            "cifar_mobilenet_v2", "cifar_vgg16_bn"), the path of an ONNX file, which has its weights, or
            "package.module:factory", a callable that returns a module.
        num_classes: Outputs of the network.
        weights: "none" (as the factory initializes them, from torch's global generator), "default" (the library's
            best) or a file of weights; see `load_weights`.
        input_shape: (channels, height, width) of one image, for a trial run; a network for 1 channel is tried on 1
            if the image has 3, and vice versa.
        say: Receives a sentence about each replaced or chosen part.
        task: "classification", "segmentation" for a network of class maps, or "detection" for a `RawDetector`, whose
            `num_classes` include the background.

    Returns:
        The network in training mode on the CPU.

    Raises:
        CompressorError: The name is unknown, an extra is missing, the weights are unavailable or do not fit, the
            network does not accept inputs of that shape, or no single layer computes its output.
    """
    if num_classes < 2:
        raise CompressorError(f"A classifier needs at least 2 classes, got {num_classes}.")
    source, _ = resolve(name, task)
    file = _opened(name, str(weights), input_shape) if source == "onnx" else None
    known = name if file is None else file.name
    spec = model_factory(known, num_classes, weights=str(weights), image_size=input_shape[1:])
    model = _built(spec).cpu()
    if file is not None:
        require_equal(model, file, name)
    shape = (input_channels(model, input_shape), *input_shape[1:])
    if task == "detection":
        return _loaded_detector(model, spec, name, num_classes, str(weights), shape, say)
    out, makers = run_first(model, name, shape, task)
    if (outputs := out.shape[1]) != num_classes:
        if task != "classification":
            raise CompressorError(
                f"{name} gives maps of {outputs} classes, and the data has {num_classes}.",
                "Have the factory accept num_classes and build the network for them.",
            )
        head = single_head(name, makers, outputs, num_classes)
        replace_head(model, head, num_classes)
        makers = _checked_head(model, name, head, num_classes, shape)
        spec["head"] = head
        if file is not None or str(weights) == "none":  # else the weights to load decide
            setattr(model, FRESH_HEAD, outputs)
        say(f"{name} has {outputs} outputs: its last layer {head} is replaced by one of {num_classes}.")
    heads = makers.heads(num_classes)
    if file is not None:  # its weights are there
        pass
    elif str(weights) == "default":
        _load_default(model, spec, num_classes, heads, say)
    elif str(weights) != "none":
        adapted = partial(_without, beginnings=_auxiliary(name) if task != "classification" else ())
        load_weights(model, Path(weights), num_classes, lambda: heads, say, adapted)
    if fixed := fix_weights(model):
        say(
            f"{len(fixed)} weights of {name} are computed from others before each forward ({some(fixed)}); they are "
            "fixed at their values and trained on as plain weights."
        )
    setattr(model, FACTORY_TAG, spec)
    return model.train()


def _opened(name: str, weights: str, input_shape: Shape) -> OnnxSource:
    """Open an ONNX file, and refuse other weights or images of another size than its own."""
    if weights not in ("default", "none"):
        raise CompressorError(f"{name} has its own weights; {weights} cannot be loaded into it.", "Omit --weights.")
    file = open_onnx(name)
    if tuple(input_shape[1:]) != file.shape[1:]:
        raise CompressorError(
            f"{name} takes images of {file.image_size} pixels, and these have {'x'.join(map(str, input_shape[1:]))}.",
            f"Give --image-size {file.image_size}, or omit it.",
        )
    return file


def usual_classes(name: str, input_shape: Shape = (3, 32, 32)) -> int:
    """Return the number of outputs of a network if nobody asks for another: of its library, or its factory's default.

    Args:
        name, input_shape: As in `create_model`.

    Raises:
        CompressorError: As `create_model`.
    """
    source, inner = resolve(name)
    if source == "cifar":
        return 10
    if source == "timm":
        from timm.models import get_pretrained_cfg

        found = get_pretrained_cfg(inner)
        return 1000 if found is None else int(found.num_classes)
    if source == "torchvision":
        return 1000
    if source == "onnx":
        return open_onnx(inner).outputs[0]
    what = f"The model {inner[:200]!r}"
    factory = import_object(inner, what, "package.module:factory")
    known = inspect.signature(factory).parameters.get("num_classes") if callable(factory) else None
    if known is not None and isinstance(known.default, int):
        return known.default
    model = call_factory(factory, what, 1000)
    out, _ = run_first(model, name, (input_channels(model, input_shape), *input_shape[1:]))
    return int(out.shape[1])


def _checked_head(model: nn.Module, name: str, head: str, num_classes: int, shape: Shape) -> Makers:
    """Return the layers that compute the output after the head was replaced, and check the number of classes."""
    try:
        out, makers = run_first(model, name, shape)
    except CompressorError as error:
        raise CompressorError(
            f"The last layer {head} of {name} cannot be replaced by one of {num_classes} outputs: {error.message}",
            "Have the factory accept num_classes and build the network for them.",
        ) from error
    if out.shape[1] != num_classes:
        raise CompressorError(
            f"With a last layer {head} of {num_classes} outputs {name} gives {out.shape[1]} outputs.",
            "Have the factory accept num_classes and build the network for them.",
        )
    return makers


def model_factory(
    name: str, num_classes: int, weights: str = "none", image_size: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Return what rebuilds the architecture of `create_model`: {"factory": name, "kwargs": JSON values}, if no layer
    was replaced; `factory_of` returns the complete spec of a created model.

    Args:
        name, num_classes: As for `create_model`.
        weights: Matters for torchvision's GoogLeNet and Inception-V3 only, whose weights expect their inputs on another
            scale and make the network convert them.
        image_size: (height, width) of the images; matters for networks that are built for one size.
    """
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    if name in _AUXILIARY and weights != "none":
        kwargs["transform_input"] = True
    usual = usual_size(*resolve(name, None))
    if usual is not None and image_size is not None and image_size != usual:
        kwargs["image_size"] = list(image_size)
    return {"factory": name, "kwargs": kwargs}


def build_from_factory(spec: Mapping[str, Any], factory: Factory | None = None) -> nn.Module:
    """Build the architecture that `factory_of` describes, with random weights (none on the meta device).

    Weights that it computes from others are plain parameters, as after `create_model`. Of the spec's arguments only
    `num_classes` is passed to a user's factory, and only as an integer.

    Args:
        spec: {"factory": name, "kwargs": arguments, "head": name of the replaced layer, if any}.
        factory: Called instead of the spec's factory, or the reference `package.module:factory` of one.

    Raises:
        CompressorError: The spec is malformed or names something unknown.
    """
    model = _built(spec, factory)
    fix_weights(model)
    setattr(model, FACTORY_TAG, {key: spec[key] for key in ("factory", "kwargs", "head") if key in spec})
    return model


def _built(spec: Mapping[str, Any], factory: Factory | None = None) -> nn.Module:
    name, kwargs, head = spec.get("factory"), spec.get("kwargs", {}), spec.get("head")
    if not isinstance(kwargs, Mapping) or not (name is None or isinstance(name, str)):
        raise CompressorError(f"A factory needs a name and keyword arguments, got {dict(spec)!r}.")
    num_classes = kwargs.get("num_classes")
    if type(num_classes) is not int or set(kwargs) - {"num_classes", "transform_input", "image_size"}:
        raise CompressorError(f"The factory {name!r} takes num_classes as an integer, got {dict(kwargs)!r}.")
    size = kwargs.get("image_size")
    if size is not None and (type(size) is not list or [type(each) for each in size] != [int, int]):
        raise CompressorError(f"The factory {name!r} takes image_size as height and width, got {size!r}.")
    if isinstance(factory, str):
        return _built({**spec, "factory": factory})
    if factory is not None:
        model = call_factory(factory, "The given factory", num_classes)
    elif name is None:
        raise CompressorError("A factory needs a name and keyword arguments, got none.")
    else:
        model = _by_name(name, num_classes, bool(kwargs.get("transform_input", False)), size)
    model = wrapped(model)
    if head is not None:
        if not isinstance(head, str):
            raise CompressorError(f"A factory's head is the name of a layer, not {head!r}.")
        replace_head(model, head, num_classes)
    return model


def _by_name(name: str, num_classes: int, transform_input: bool, size: Sequence[int] | None) -> nn.Module:
    source, inner = resolve(name, None)
    if source == "cifar":
        return cifar.BUILDERS[inner](num_classes)
    if source == "onnx":
        return open_onnx(inner).network()
    if source in ("torchvision", "timm"):
        sized = size_argument(source, size)
        try:
            if source == "torchvision":
                return _torchvision(inner, num_classes, transform_input, sized)
            import timm

            model: nn.Module = timm.create_model(inner, pretrained=False, num_classes=num_classes, **sized)
            return model
        except Exception as error:  # a library's code may raise anything
            if size is None:
                raise
            raise cannot_build(source, inner, size, error) from error
    what = f"The model {inner[:200]!r}"
    return call_factory(import_object(inner, what, "package.module:factory"), what, num_classes)


def factory_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the spec that `create_model` or `build_from_factory` stored on a model, or None."""
    spec = getattr(model, FACTORY_TAG, None)
    return spec if isinstance(spec, dict) else None


def _torchvision(name: str, num_classes: int, transform_input: bool, sized: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model

    extra = dict(sized)
    if name in (*torchvision_names("segmentation"), *PREPARED):
        extra = {"weights_backbone": None}  # by default it is downloaded
    elif name in _AUXILIARY:
        # The auxiliary heads are for a special training recipe, and change what forward returns.
        extra = {"aux_logits": False, "init_weights": True, "transform_input": transform_input}
    elif name.startswith(("resnet", "resnext", "wide_resnet")):
        # Each block starts as its shortcut alone. Otherwise, trained from scratch on little data, ResNet-50 is still
        # near chance when it could have converged ("Accurate, large minibatch SGD", Goyal et al., 2017, 5.1).
        extra = {"zero_init_residual": True}
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **extra)
    return model


def _load_default(
    model: nn.Module,
    spec: Mapping[str, Any],
    num_classes: int,
    heads: Sequence[str],
    say: Say,
    adapted: Callable[[State], State] = lambda state: state,
) -> None:
    name = str(spec["factory"])
    source, inner = resolve(name, None)
    hint = "Use --weights none to train from scratch, or --weights FILE with a state dict that you have."
    if source not in ("torchvision", "timm"):
        raise CompressorError(f"There are no default weights for {name}.", hint)
    try:  # urllib and the hub raise OSErrors, timm a RuntimeError for a model without weights
        with _quiet("huggingface_hub"), torch.random.fork_rng(devices=[]):
            if source == "torchvision":
                state = interpolated(model, _torchvision_state(inner))
            else:
                state = _timm_state(inner, size_argument(source, spec["kwargs"].get("image_size")))
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompressorError(f"The default weights of {name} cannot be fetched: {reason}", hint) from error
    kept = adapted(_without(state, _auxiliary(inner)))
    fit_state(model, kept, f"the default weights of {name}", num_classes, lambda: heads, say)


def _without(state: State, beginnings: tuple[str, ...]) -> State:
    """Return weights without those whose names begin so."""
    return {key: value for key, value in state.items() if not key.startswith(beginnings)}


def _loaded_detector(
    model: nn.Module, spec: dict[str, Any], name: str, num_classes: int, weights: str, shape: Shape, say: Say
) -> nn.Module:
    """Check a new detector and give it weights; its class scores start fresh where these are for other classes."""
    detector: nn.Module = check_detector(model, name, num_classes, shape).detector
    own = detector.state_dict()

    def adapted(state: State) -> State:
        fresh = [
            key
            for key, value in state.items()
            if key.startswith(CLASS_HEAD) and key in own and own[key].shape != getattr(value, "shape", None)
        ]
        if fresh:
            setattr(model, FRESH_HEAD, len(fresh))
            say(f"The weights of {name} are for other classes: {some(fresh)} start fresh.")
        return {**state, **{key: own[key].clone() for key in fresh}}

    if weights == "default":
        _load_default(detector, spec, num_classes, (), say, adapted)
    elif weights != "none":
        load_weights(detector, Path(weights), num_classes, None, say, adapted)
    fix_weights(model)
    setattr(model, FACTORY_TAG, spec)
    return model.train()


def _auxiliary(name: str) -> tuple[str, ...]:
    """Return the beginnings of the names of the weights that the networks here do not have."""
    maps = name in torchvision_names("segmentation")
    return _AUXILIARY_MAPS if maps else _AUXILIARY.get(name, ())


def _torchvision_state(name: str) -> dict[str, torch.Tensor]:
    from torchvision.models import get_model_weights

    default: Any = get_model_weights(name)
    return dict(default.DEFAULT.get_state_dict(progress=False, check_hash=True))


def _timm_state(name: str, sized: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import timm

    pretrained: nn.Module = timm.create_model(name, pretrained=True, **sized)
    return pretrained.state_dict()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide a library's log of retries from the user, who gets one message at the end."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---------------------------------------------------------------- published facts
@dataclass(frozen=True)
class Published:
    """Published facts of a network's weights.

    Attributes:
        origin: Source of the facts.
        preprocessing: size, mean, std, crop_share, interpolation and resize, as `data.Preprocessing` names them.
        accuracy: Top-1 share of its default weights on ImageNet's validation images, 0..1; None if not stated.
    """

    origin: str
    preprocessing: dict[str, Any]
    accuracy: float | None = None


def published(name: str) -> Published | None:
    """Return what is published about a network's weights, without downloading; None for networks of no library.

    Raises:
        CompressorError: There is no such network.
    """
    source, inner = resolve(name, None)
    if source == "timm":
        return _of_timm(inner)
    if source == "onnx":
        return _of_file(inner)
    return _of_torchvision(inner) if source == "torchvision" else None


def _of_file(name: str) -> Published | None:
    """Return what an ONNX file says about its images, which is all of it or nothing."""
    file = open_onnx(name)
    if (known := file.preprocessing) is None:
        return None
    _, high, wide = file.shape
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items() if key in _STATED}
    size = {"size": high, **({} if high == wide else {"width": wide})}
    return Published(f"the metadata of {file.title}", {**fields, **size})


def _of_timm(name: str) -> Published | None:
    from timm.data.config import resolve_data_config
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(name)
    if found is None:
        return None
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=dict(vars(found)))  # type: ignore[no-untyped-call]
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        return None
    return Published(
        origin=f"timm's pretrained_cfg of {name}",
        preprocessing={
            "size": height,
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
            "crop_share": float(config["crop_pct"]),
            "interpolation": config["interpolation"],
            "resize": "squash" if config["crop_mode"] == "squash" else "short",
        },
    )


def _of_torchvision(name: str) -> Published | None:
    from torchvision.models import get_model_weights

    if name in PREPARED:
        size, mean, std = PREPARED[name]
        prepared = {"size": size, "mean": mean, "std": std, "crop_share": 1.0, "interpolation": "bilinear"}
        return Published(f"torchvision's {name}", prepared)

    default: Any = getattr(get_model_weights(name), "DEFAULT", None)
    if default is None:
        return None
    transforms = default.transforms()
    if not hasattr(transforms, "crop_size"):
        return _of_maps(default, transforms)
    (size,), (scaled,) = transforms.crop_size, transforms.resize_size
    share = default.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1", math.nan)
    return Published(
        origin=f"torchvision's {default}",
        preprocessing={
            "size": size,
            "mean": tuple(transforms.mean),
            "std": tuple(transforms.std),
            "crop_share": size / scaled,
            "interpolation": transforms.interpolation.value,
        },
        accuracy=None if math.isnan(share) else share / 100,
    )


def _of_maps(weights: Any, transforms: Any) -> Published:
    """Return what is published about a segmentation network's weights; the whole picture is scaled."""
    return Published(
        origin=f"torchvision's {weights}",
        preprocessing={
            "size": transforms.resize_size[0],
            "mean": tuple(transforms.mean),
            "std": tuple(transforms.std),
            "crop_share": 1.0,
            "interpolation": transforms.interpolation.value,
        },
    )
