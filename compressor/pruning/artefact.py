"""Saves and loads pruned networks: `channels.json` and `model.safetensors`, without pickle.

The JSON contains the factory of the dense network, the plan, the shape of every tensor, the changed attributes, what
took the place of removed blocks, and the checksum of the weights. Loading builds the dense network on the meta device,
removes the blocks, sets the widths and loads the weights. It needs neither the dense weights nor the pruning space. The
factory is found at save time; one is accepted only if it builds the same network: every tensor in its dense shape, and
the same operations in a forward pass (`sameness`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.core.errors import CompressorError
from compressor.core.files import read_json, replacing, sha256_file, write_atomic
from compressor.models import build_from_factory, factory_of
from compressor.models.names import is_users
from compressor.models.onnx_file import NETWORK, PREFIX, open_kept, open_onnx
from compressor.pruning.attention import swap_name
from compressor.pruning.plan import ChannelPlan
from compressor.pruning.removal import inside, remove
from compressor.pruning.sameness import difference
from compressor.pruning.skeleton import aliases, copy_structure, named_tensors
from compressor.pruning.slicer import RECORD, is_channels_last, swap

CHANNELS = "channels.json"
WEIGHTS = "model.safetensors"
FORMAT = "compressor-slim"
VERSION = 1
Shapes = Mapping[str, Sequence[int]]
Factory = Callable[..., Any] | str
_FACTORY_HINT = (
    "Pass a function or class that builds the dense network from num_classes at most: factory=build, or its reference "
    'factory="package.module:build".'
)
_SAVE_AGAIN = "Save the network again with compressor.save()."


def save(
    small: nn.Module,
    plan: ChannelPlan,
    directory: str | Path,
    *,
    factory: Factory | Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save a pruned network.

    Args:
        small: The result of `PruningSpace.apply`, fine-tuned or not, or a copy of it.
        plan: The plan that was applied.
        directory: Folder to write to; created if it is missing.
        factory: Builds the dense network, with no argument except num_classes: a function or class, its reference
            "package.module:name", or {"factory": name, "kwargs": {"num_classes": N}}. By default it is found for
            networks of `create_model`, torchvision and timm, and for user classes that can be imported. If none is
            found, `load` needs the function.
        extra: JSON-serialisable values, stored under "extra".

    Raises:
        CompressorError: The network does not come from `apply`, or from another plan, or the given factory does not
            build its dense network.
    """
    from safetensors.torch import save_file

    record = small.__dict__.get(RECORD)
    if not isinstance(record, dict) or "plan" not in record:
        raise CompressorError(
            f"This {type(small).__name__} was not created by PruningSpace.apply.",
            "Save the network that apply returned, or a deepcopy of it.",
        )
    if record["plan"] != plan:
        raise CompressorError("The network was created with another plan.", "Pass the plan that apply was called with.")
    spec = find_factory(small, record) if factory is None else given_factory(factory, small, record)
    if spec is None:
        kind = f"{type(small).__module__}.{type(small).__qualname__}"
        spec = {"factory": None, "class": kind, "kwargs": {"num_classes": record["outputs"]}}
    folder = Path(directory)
    if (name := str(spec["factory"])).startswith(PREFIX):
        write_atomic(folder / NETWORK, open_onnx(name).content)
    tensors = cpu_tensors(small)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "factory": spec,
        "plan": json.loads(plan.to_json()),
        "plan_sha256": plan.checksum,
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "edits": record["edits"],
        "swaps": record["swaps"],
        **({"replaced": record["replaced"]} if record["replaced"] else {}),
        "channels_last": channels_last(small),
        "weights": {"file": WEIGHTS, "sha256": sha256_file(folder / WEIGHTS)},
        "versions": {"torch": torch.__version__},
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(content, indent=1)
    except TypeError as error:
        raise CompressorError(
            f"`extra` is not JSON-serialisable: {error}.", "Use text, numbers, lists and dictionaries."
        ) from error
    write_atomic(folder / CHANNELS, text + "\n")


def load(directory: str | Path, *, factory: Factory | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load a pruned network in eval mode. Code that is named in a file is not imported.

    Args:
        directory: Folder that `save` wrote.
        factory: Builds the dense network, with no argument except num_classes: a function or class, or its reference
            "package.module:name". Networks of torchvision, timm and this package need none, nor do those of ONNX
            files, which are read from the copy in the folder.
        device: Device of the weights.

    Raises:
        CompressorError: Files are missing, corrupt, of another format or modified, shapes disagree, or the factory
            is missing.
    """
    folder = Path(directory)
    content = _read_channels(folder)
    _check_factory(content["factory"], factory, folder)
    if factory is None and (name := str(content["factory"].get("factory"))).startswith(PREFIX):
        factory = open_kept(folder / NETWORK, name).network
    tensors = _read_weights(folder, content)
    model = build_dense(content["factory"], factory)
    dense = {name: list(tensor.shape) for name, tensor in named_tensors(model).items()}
    replaced = content.get("replaced", {})
    remove(model, replaced)
    left = {name: shape for name, shape in dense.items() if not inside(name, replaced)}
    _check_shapes(content, left, tensors, given=factory is not None)
    set_tensors(model, tensors, device)
    _set_attributes(model, content)
    if content.get("channels_last"):
        model = model.to(memory_format=torch.channels_last)
    model.__dict__[RECORD] = {
        "plan": ChannelPlan.from_json(json.dumps(content["plan"])),
        "dense": {name: tuple(shape) for name, shape in dense.items()},
        "edits": content["edits"],
        "swaps": content["swaps"],
        "replaced": dict(replaced),
        "outputs": content["factory"]["kwargs"]["num_classes"],
        "inputs": None,
    }
    return model.eval()


def _check_factory(spec: Mapping[str, Any], given: Factory | None, folder: Path) -> None:
    """Refuse to build a user-defined network unless the caller passes its factory."""
    name = spec.get("factory")
    if given is not None:
        return
    if name is None:
        raise CompressorError(
            f"{folder} contains a {str(spec.get('class'))[:200]}, without a reference to its factory.",
            f"Pass a function that builds the dense network: load({str(folder)!r}, factory=build).",
        )
    if isinstance(name, str) and is_users(name):
        shown = name[:200]
        raise CompressorError(
            f"{folder} contains a network built by {shown!r}; code that is named in a file is not imported.",
            f"If you trust it, pass it: load({str(folder)!r}, factory={shown!r}), or pass the function or class.",
        )


def saved_factory(directory: str | Path) -> str | None:
    """Return the name of what builds the dense network of a saved one; None if no name does."""
    name = _read_channels(Path(directory))["factory"].get("factory")
    return name if isinstance(name, str) else None


def untrained(directory: str | Path, *, factory: Factory | None = None) -> nn.Module:
    """Build the dense network of a saved one with new weights, in eval mode.

    Args:
        directory, factory: As for `load`.
    """
    spec = _read_channels(Path(directory))["factory"]
    _check_factory(spec, factory, Path(directory))
    return build_from_factory(spec, factory).eval()


def read_plan(directory: str | Path) -> ChannelPlan:
    """Read the plan of a saved network, without its weights."""
    return ChannelPlan.from_json(json.dumps(_read_channels(Path(directory))["plan"]))


def _read_channels(folder: Path) -> dict[str, Any]:
    path = folder / CHANNELS
    if not path.exists():
        raise CompressorError(f"{folder} contains no {CHANNELS}.", "Pass the folder that save() wrote.")
    content = read_json(path, "file", _SAVE_AGAIN)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CompressorError(f"{path} is not a {FORMAT} file.", "Pass the folder that save() wrote.")
    if content.get("version") != VERSION:
        raise CompressorError(
            f"{path} has version {content.get('version')!r}; this program reads {VERSION}.",
            "Use the program that wrote it.",
        )
    kinds = {"factory": dict, "plan": dict, "tensors": dict, "edits": list, "swaps": dict, "weights": dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise CompressorError(f"{path}: '{key}' is missing or has a wrong type.", _SAVE_AGAIN)
    plan = ChannelPlan.from_json(json.dumps(content["plan"]))
    if plan.checksum != content.get("plan_sha256"):
        raise CompressorError(f"{path}: the plan does not match its checksum.", _SAVE_AGAIN)
    replaced = content.get("replaced", {})
    if not isinstance(replaced, dict) or not all(isinstance(word, str) for word in replaced.values()):
        raise CompressorError(f"{path}: 'replaced' has a wrong type.", _SAVE_AGAIN)
    if bool(replaced) != bool(plan.removed):
        raise CompressorError(f"{path}: the plan and the replaced modules disagree about removed blocks.", _SAVE_AGAIN)
    return content


def _read_weights(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = content["weights"].get("file")
    if (
        not isinstance(name, str)
        or not name
        or name != Path(name).name
        or (folder / name).resolve().parent != folder.resolve()
    ):
        raise CompressorError(
            f"{CHANNELS} refers to weights outside its folder: {name!r}.", "Use the original, unmodified files."
        )
    path = folder / name
    if not path.is_file():
        raise CompressorError(f"{path} is missing.", _SAVE_AGAIN)
    if sha256_file(path) != content["weights"].get("sha256"):
        raise CompressorError(
            f"{path} does not match the checksum in {CHANNELS}.",
            "The files are corrupt or belong to two networks; save the network again with compressor.save().",
        )
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CompressorError(f"{path} is not a safetensors file: {error}.", _SAVE_AGAIN) from error


def _check_shapes(
    content: dict[str, Any], dense: dict[str, list[int]], tensors: dict[str, Tensor], given: bool
) -> None:
    name = "that was given" if given else repr(content["factory"].get("factory"))
    advice = "Pass the factory of the dense network that was pruned." if given else _SAVE_AGAIN
    for what, names in (("weights", tensors.keys()), (CHANNELS, content["tensors"].keys())):
        wrong = sorted(set(names) ^ set(dense))
        if wrong:
            raise CompressorError(f"The factory {name} and the {what} disagree about tensor '{wrong[0]}'.", advice)
    for key, tensor in tensors.items():
        shape = list(tensor.shape)
        if shape != content["tensors"][key]:
            raise CompressorError(
                f"Tensor '{key}' has shape {shape}, {CHANNELS} says {content['tensors'][key]}.", _SAVE_AGAIN
            )
        if len(shape) != len(dense[key]) or any(s > d for s, d in zip(shape, dense[key], strict=True)):
            raise CompressorError(
                f"Tensor '{key}' of shape {shape} is not a part of the dense network's {dense[key]}.",
                advice if given else "Was the network's code changed since it was saved?",
            )


def cpu_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all distinct parameters and buffers on the CPU, by their first name."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors(model).items()}


def channels_last(model: nn.Module) -> bool:
    """Whether weights are in channels-last format, which decides the order of sums and thus the last bits."""
    return any(is_channels_last(tensor) for tensor in model.parameters())


def set_tensors(model: nn.Module, tensors: dict[str, Tensor], device: str | torch.device) -> None:
    """Replace all parameters and buffers of a network by `tensors`; shared ones stay shared."""
    second = aliases(model)
    modules = dict(model.named_modules(remove_duplicate=False))  # a module may be used under two paths
    placed: dict[str, Tensor] = {}
    for name, old in named_tensors(model).items():
        tensor = tensors[name].to(device)
        placed[name] = (
            nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        )
    for name, first in {**{name: name for name in placed}, **second}.items():
        path, _, leaf = name.rpartition(".")
        held = modules[path]._parameters if leaf in modules[path]._parameters else modules[path]._buffers
        held[leaf] = placed[first]


def _set_attributes(model: nn.Module, content: Mapping[str, Any]) -> None:
    modules = dict(model.named_modules())
    for edit in content["edits"]:
        if not (
            isinstance(edit, list)
            and len(edit) == 3
            and all(isinstance(name, str) for name in edit[:2])
            and edit[0] in modules
        ):
            raise CompressorError(f"{CHANNELS} edits an attribute that the network lacks: {edit!r}.", _SAVE_AGAIN)
        path, attribute, value = edit
        before = vars(modules[path]).get(attribute)
        old = list(before) if isinstance(before, (tuple, list)) else [before]
        new = value if isinstance(value, list) else [value]
        if (
            attribute.startswith("_")
            or len(old) != len(new)
            or any(type(b) is not int or type(a) is not int or not 0 < a <= b for a, b in zip(new, old, strict=True))
        ):
            raise CompressorError(f"{CHANNELS} sets '{path}.{attribute}' from {before!r} to {value!r}.", _SAVE_AGAIN)
        setattr(modules[path], attribute, tuple(value) if isinstance(before, tuple) else value)
    for path, name in content["swaps"].items():
        if path not in modules or swap_name(modules[path]) != name:
            raise CompressorError(f"{CHANNELS} replaces '{path}' by '{name}', which does not fit.", _SAVE_AGAIN)
        swap(modules[path], name)


# ---------------------------------------------------------------- the factory of the dense network
def find_factory(model: nn.Module, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the spec that rebuilds the dense network of `model`; None if there is none.

    The candidates, in order: the tag of `create_model`, torchvision's builders, timm's configuration, and the network's
    class if it can be imported. A candidate is accepted only if it builds the same network.

    Args:
        model: The pruned network, or the dense one.
        record: What `apply` recorded of it, or `record_of` of a dense one.
    """
    tagged = factory_of(model)
    candidates = [tagged] if tagged is not None else _candidates(model, record["outputs"])
    return next((spec for spec in candidates if _fits(spec, model, record)), None)


def record_of(dense: nn.Module, outputs: int, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Return the record of a dense network, of which nothing was removed.

    Args:
        dense: The network.
        outputs: Number of its outputs, for one input.
        inputs: Its positional arguments.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense).items()}
    return {"dense": shapes, "outputs": outputs, "inputs": inputs, "edits": [], "swaps": {}, "replaced": {}}


def given_factory(
    given: Factory | Mapping[str, Any], small: nn.Module, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the spec of a factory from the caller, after verifying that it rebuilds the dense network.

    Args:
        given: A function or class, its reference `package.module:name`, or a complete spec, of which only shapes are
            verified.
        small: The pruned network.
        record: What `apply` recorded of it.

    Raises:
        CompressorError: The factory is malformed, fails, or builds another network.
    """
    factory: Factory | None = None
    kwargs = {"num_classes": record["outputs"]}
    if isinstance(given, Mapping):
        if not isinstance(given.get("factory"), str):
            raise CompressorError(f"A factory is a name with arguments, not {given!r}.", _FACTORY_HINT)
        spec = {**given, "kwargs": dict(given.get("kwargs", {}))}
    elif isinstance(given, str):
        spec = {"factory": given, "kwargs": kwargs}
    elif callable(given):
        spec, factory = {"factory": _reference(given), "kwargs": kwargs}, given
    else:
        raise CompressorError(f"A factory is a function or its name, not {given!r}.", _FACTORY_HINT)
    made = build_dense(spec, factory)
    wrong = differences(made, record["dense"])
    if not wrong and not isinstance(given, Mapping):
        wrong = _deviation(made, small, record)
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
                converts = {"transform_input": True} if getattr(model, "transform_input", False) else {}
                yield {"factory": name, "kwargs": {"num_classes": outputs, **converts}}
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    if isinstance(architecture, str) and kind.__module__.startswith("timm."):
        classes = getattr(model, "num_classes", outputs)
        yield {"factory": f"timm:{architecture}", "kwargs": {"num_classes": int(classes)}}
    if (reference := _reference(kind)) is not None:
        yield {"factory": reference, "kwargs": {"num_classes": outputs}}


def _fits(spec: Mapping[str, Any], model: nn.Module, record: Mapping[str, Any]) -> bool:
    try:
        made = build_dense(spec)
        return not (differences(made, record["dense"]) or _deviation(made, model, record))
    except CompressorError:
        return False


def _deviation(made: nn.Module, model: nn.Module, record: Mapping[str, Any]) -> str:
    """Describe how a dense network, pruned as `model` was, differs from `model` by more than its tensors' values.

    Args:
        made: A dense network with tensors of the right shapes; it is pruned in place.
        model, record: As for `find_factory`.

    Raises:
        CompressorError: The recorded changes do not fit the dense network.
    """
    known = copy_structure(model, lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format)).eval()
    tensors = named_tensors(known)
    remove(made, record["replaced"])
    if other := named_tensors(made).keys() ^ tensors.keys():
        return f"only one of them has {min(other)}"
    set_tensors(made, tensors, next(iter(tensors.values())).device)
    _set_attributes(made, record)
    return difference(known, made.eval(), record["inputs"])


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
