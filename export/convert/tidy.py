"""Normalises an exported graph: no duplicate constants, and names after the modules of the network.

TensorRT's messages, layer-wise reports and the lists of layers kept in a higher precision use node names. The names
depend only on the graph, so that equal networks give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from export.convert.ort import first_line
from export.errors import ExportError

_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm")


def tidy(proto: Any) -> Any:
    """Turn constants into initialisers named after their first user; remove identities and doc strings.

    Changes and returns `proto`.
    """
    _store_constants(proto.graph)
    _remove_identities(proto.graph)
    _name_nodes(proto.graph)
    _name_initialisers(proto.graph)
    proto.graph.name = "network"
    proto.doc_string = ""
    proto.graph.doc_string = ""
    for node in proto.graph.node:
        node.doc_string = ""
    return proto


def module_path(node_name: str) -> str:
    """The qualified name of the module that a node comes from, as in torch.

    A scope repeats the name of its container, and the last part is the operator:

    >>> module_path("/features/features.1/conv/conv.0/conv.0.0/Conv")
    'features.1.conv.0.0'
    """
    path: list[str] = []
    for scope in node_name.strip("/").split("/")[:-1]:
        if path and scope.startswith(path[-1] + "."):
            path[-1] = scope
        else:
            path.append(scope)
    return ".".join(path)


def _store_constants(graph: Any) -> None:
    from onnx import helper

    kept = []
    for node in graph.node:
        values = [entry for entry in node.attribute if entry.name == "value"]
        if node.op_type == "Constant" and values:
            tensor = helper.get_attribute_value(values[0])
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            kept.append(node)
    _keep_nodes(graph, kept)


def _remove_identities(graph: Any) -> None:
    """Remove Identity nodes: the exporter inserts them for equal constants, and they hide that these are weights."""
    outputs = {value.name for value in graph.output}
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for user in _with_branches(node):
            for index, name in enumerate(user.input):
                user.input[index] = source.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            source[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    _keep_nodes(graph, kept)


def _keep_nodes(graph: Any, kept: list[Any]) -> None:
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _name_nodes(graph: Any) -> None:
    taken: set[str] = set()
    for place, node in enumerate(graph.node):
        node.name = _free(node.name or f"/{node.op_type}_{place}", taken)


def _name_initialisers(graph: Any) -> None:
    stored = {tensor.name: tensor for tensor in graph.initializer}
    taken = {name for node in graph.node for each in _with_branches(node) for name in each.output}
    taken |= {value.name for value in graph.input}
    renamed: dict[str, str] = {}
    for node in (each for outer in graph.node for each in _with_branches(outer)):
        for index, name in enumerate(node.input):
            if name in stored and name not in renamed:
                if node.op_type in _WITH_WEIGHTS:
                    own = ("input", "weight", "bias")[index]
                else:
                    own = f"{(node.name or node.op_type).rsplit('/', 1)[-1]}.{index}"
                renamed[name] = _free(f"{module_path(node.name)}.{own}".strip("."), taken)
            node.input[index] = renamed.get(name, name)
    ordered = [stored[name] for name in renamed]
    for tensor in ordered:
        tensor.name = renamed[tensor.name]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in ordered]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _with_branches(node: Any) -> Iterator[Any]:
    """Yield a node and those of its branches (If, Loop), which use the names of the graph around them."""
    yield node
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _with_branches(inner)


def _free(name: str, taken: set[str]) -> str:
    """Return `name`, or the first free of `name_1`, `name_2`, ..., and add it to `taken`."""
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def write_metadata(proto: Any, facts: Mapping[str, Any]) -> None:
    """Set the file's metadata to `facts`, sorted by name; values other than strings are written as JSON."""
    del proto.metadata_props[:]
    for key in sorted(facts):
        value = facts[key]
        entry = proto.metadata_props.add()
        entry.key = key
        entry.value = value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def check(proto: Any, opset: int) -> None:
    """Validate a graph with the ONNX checker.

    Raises:
        ExportError: the graph is not valid, or has operators of another opset or domain.
    """
    import onnx

    written = {entry.domain: entry.version for entry in proto.opset_import}
    if written != {"": opset}:
        raise ExportError(
            f"The exporter wrote operators of {written}, expected opset {opset} and no others.",
            "Replace custom operators by ONNX operators.",
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exported file is not valid ONNX: {first_line(error)}.") from error


def shapes(values: Any) -> dict[str, tuple[int | str, ...]]:
    """Names and shapes of a graph's inputs or outputs; a dynamic dimension is given by its name."""
    return {
        value.name: tuple(
            dim.dim_param if dim.dim_param else int(dim.dim_value) for dim in value.type.tensor_type.shape.dim
        )
        for value in values
    }
