"""Writes a remote bundle: a folder of sub-networks to be timed on another device.

The sub-networks are selected by `design`, so that every operator is measured at the widths that its table needs. The
dense network comes first and last. Held-out networks are spread among the others, and the order is otherwise random.
Weights do not affect the time: each tensor repeats its first few thousand values, so that the folder compresses well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from compressor.core.errors import CompressorError
from compressor.core.files import disk_error
from compressor.core.progress import bar
from compressor.latency.assemble import export_candidate, with_batch
from compressor.latency.converted import in_precision
from compressor.latency.layout import LayoutFields, layout_fields, signature
from compressor.latency.networks import WEIGHTED, TaggedNetwork
from compressor.latency.operators import Widths
from compressor.latency.request import Request
from compressor.latency.sampling import LEVELS, anchor_widths, grid_widths, random_widths
from compressor.latency.schema import Precision
from export.device.bundle import TARGETS, BundleInfo, Target, write_bundle
from export.errors import ExportError

if TYPE_CHECKING:

    from compressor.pruning.space import PruningSpace

HELD_OUT = 10
DENSE = "dense"
REPEATED = 4096
_UNKNOWN = Target("", "device", "", 8, 17, True, 0)

Index = Annotated[int, Field(ge=0, le=100_000)]


class CandidateFields(BaseModel):
    """One network of a bundle.

    Attributes:
        role: Use of the network in the fit.
        widths: Width of each group.
        owner: Operator that owns each node of the exported file.
        weighted: Node with the weight of each operator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["dense", "fitted", "held out"]
    widths: tuple[Index, ...]
    owner: tuple[Index, ...]
    weighted: tuple[Index, ...]


class TableFacts(BaseModel):
    """The facts in a bundle from which its results are turned into a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    purpose: Literal["table"] = "table"
    device: Annotated[str, Field(max_length=200)]
    model: Annotated[str, Field(max_length=400)]
    precision: Precision
    batch: Annotated[int, Field(ge=1, le=4096)] = 1
    streams: Annotated[int, Field(ge=1, le=64)] = 1
    network: Annotated[str, Field(max_length=64)]
    layout: LayoutFields
    epilogues: tuple[Annotated[str, Field(max_length=2000)], ...]
    candidates: Annotated[dict[str, CandidateFields], Field(max_length=2000)]


def target_of(device: str) -> Target:
    """Return the target of a device: that of a known module, else one that suits all newer modules."""
    return TARGETS.get(device, _UNKNOWN)


def write_table_bundle(
    space: PruningSpace, example: Any, folder: Path, device: str, request: Request
) -> BundleInfo:
    """Write the bundle's folder; it appears completely or not at all.

    Args:
        space, example: The network, and an input batch of size one.
        folder: Target folder; it must not exist, or be empty.
        device: Name of the future table.
        request: What the table is needed for; its opset is lowered to what the device supports.

    Raises:
        CompressorError, ExportError: The folder is in use, or a network cannot be exported.
    """
    require_empty(folder)
    target, example = target_of(device), with_batch(example, request.batch)
    rows, opset = candidate_rows(space, request.seed), min(request.opset, target.opset)
    order = [DENSE, *(name for name in rows if name != DENSE), DENSE]
    first: list[TaggedNetwork] = []
    candidates: dict[str, CandidateFields] = {}

    def networks() -> Iterator[tuple[str, bytes]]:
        ranking = space.rank()
        with bar("Writing networks", len(rows)) as progress:
            for name, (role, widths) in rows.items():
                network = export_candidate(space, ranking, example, widths, opset=opset)
                first[:] = first or [network]
                candidates[name] = CandidateFields(
                    role=role, widths=tuple(int(width) for width in widths), owner=network.owner,
                    weighted=weighted_nodes(network),
                )  # fmt: skip
                yield name, in_precision(repeating(network.model), request.precision)
                progress.advance(1, name)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from error
    with beside as temporary:
        part = Path(temporary) / folder.name

        def facts() -> dict[str, Any]:
            return TableFacts(
                device=device,
                model=request.model,
                precision=request.precision,
                batch=request.batch,
                streams=request.streams,
                network=signature(space),
                layout=layout_fields(space),
                epilogues=first[0].epilogues,
                candidates=candidates,
            ).model_dump(mode="json")

        written = write_bundle(part, networks(), target=target, order=order, facts=facts, streams=request.streams)
        try:
            if folder.is_dir():
                folder.rmdir()
            part.rename(folder)
        except OSError as error:
            raise disk_error(folder, error) from error
    return replace(written, path=folder)


def require_empty(folder: Path) -> None:
    """Refuse a folder with content, which a bundle must not overwrite.

    Raises:
        CompressorError: The folder exists and is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CompressorError(f"{folder} exists already.", "Choose another --bundle DIR, or delete it.")


def weighted_nodes(network: TaggedNetwork) -> tuple[int, ...]:
    """Return the index in the file of the node with each operator's weight."""
    import onnx

    kinds = [node.op_type for node in onnx.load_model_from_string(network.model).graph.node]
    found: dict[int, int] = {}
    for place, (kind, owner) in enumerate(zip(kinds, network.owner, strict=True)):
        if kind in WEIGHTED:
            found.setdefault(owner, place)
    if sorted(found) != list(range(network.operators)):
        raise ExportError("The operators of the network were not found in its exported file.")
    return tuple(found[owner] for owner in range(network.operators))


def candidate_rows(
    space: PruningSpace, seed: int
) -> dict[str, tuple[Literal["dense", "fitted", "held out"], Widths]]:
    """Return name -> (role, widths) in measurement order; all widths differ."""
    dense = np.asarray(space.dense_widths, dtype=np.int64)
    fitted = np.concatenate([anchor_widths(space), grid_widths(space, levels=LEVELS, seed=seed)])
    held = random_widths(space, HELD_OUT, seed=seed + 1)
    roles: list[tuple[Literal["fitted", "held out"], Widths]] = [("fitted", row) for row in fitted]
    roles += [("held out", row) for row in held]
    known = {dense.tobytes()}
    found: list[tuple[Literal["dense", "fitted", "held out"], Widths]] = [("dense", dense)]
    for place in np.random.default_rng(seed).permutation(len(roles)):
        role, row = roles[place]
        if row.tobytes() not in known:
            known.add(row.tobytes())
            found.append((role, row))
    return {DENSE if place == 0 else f"n{place:02d}": entry for place, entry in enumerate(found)}


def repeating(content: bytes) -> bytes:
    """Return the network with the first values of each large weight repeated over the whole tensor."""
    import onnx
    from onnx import numpy_helper

    proto: Any = onnx.load_model_from_string(content)
    for item in proto.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT and np.prod(item.dims) > REPEATED:
            values = np.resize(numpy_helper.to_array(item).reshape(-1)[:REPEATED], tuple(item.dims))
            item.CopyFrom(numpy_helper.from_array(values, item.name))
    return bytes(proto.SerializeToString(deterministic=True))
