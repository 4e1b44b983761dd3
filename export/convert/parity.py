"""Parity of an exported file with its network: differences and top-1 agreement of outputs on real inputs.

    parity = compare_outputs(reference, outputs)
    parity.max_abs, parity.mean_abs, parity.top1_agreement

The comparison needs only numpy, so that a device uses the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.ort import describe, open_session, run_session
from export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 1.0}
"""Maximum difference for each precision, for outputs of up to 1; scaled with larger outputs."""

DEVICE_TOLERANCES = {**TOLERANCES, "fp32": 1e-2}
"""The same on a GPU, where FP32 layers use TF32 with a mantissa of 10 bits by default."""

AGREEMENTS = {"fp32": 0.999, "fp16": 0.99, "int8": 0.90}
"""Minimum top-1 agreement for each precision."""


LARGEST_SHARE = 1e-2
"""Maximum difference on random inputs relative to the largest output. Rounding stays below it in networks of any depth;
a wrongly exported operation does not."""


@dataclass(frozen=True)
class Parity:
    """The difference between the outputs of two networks.

    Attributes:
        max_abs, mean_abs: Maximum and mean absolute difference over all outputs.
        scale: Maximum absolute value of the reference.
        top1_agreement: Share of inputs for which both rank the same class first. Classes of the reference
            that differ by less than rounding count as equal.
        samples: Number of compared inputs.
        allowed: Maximum allowed difference.
    """

    max_abs: float
    mean_abs: float
    scale: float
    top1_agreement: float
    samples: int
    allowed: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON file."""
        return asdict(self)


def compare_outputs(
    reference: npt.NDArray[Any], candidate: npt.NDArray[Any], *, tolerance: float = 1e-4
) -> Parity:
    """Compare two arrays of outputs, one row for each input.

    Args:
        reference: Expected outputs (N, ...); classes are on the second axis.
        candidate: Outputs to check, of the same shape.
        tolerance: Maximum absolute difference for outputs of up to 1; scaled with larger outputs.

    Raises:
        ExportError: the shapes differ, there are no inputs, or an output is not finite.
    """
    import numpy as np

    if reference.shape != candidate.shape:
        raise ExportError(
            f"The outputs have the shape {list(candidate.shape)}, expected {list(reference.shape)}."
        )
    if reference.size == 0:
        raise ExportError("A comparison of outputs needs at least one input, got none.")
    for name, values in (("reference", reference), ("exported network", candidate)):
        if not np.isfinite(values).all():
            count = int(np.size(values) - np.isfinite(values).sum())
            raise ExportError(f"{count} of {values.size} outputs of the {name} are not finite.")
    right = reference.astype(np.float64).reshape(len(reference), reference.shape[1], -1)
    judged = candidate.astype(np.float64).reshape(right.shape)
    difference = np.abs(right - judged)
    scale = float(np.abs(right).max())
    allowed = tolerance * max(1.0, scale)
    chosen = np.take_along_axis(right, judged.argmax(axis=1)[:, None], axis=1)[:, 0]
    return Parity(
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        scale=scale,
        top1_agreement=float(np.mean(chosen >= right.max(axis=1) - 2 * min(allowed, 1e-4 * max(1.0, scale)))),
        samples=len(right),
        allowed=allowed,
    )


def require(parity: Parity, what: str, *, min_agreement: float = 0.0) -> Parity:
    """Return the parity if it is within the thresholds.

    Args:
        parity: The measured parity.
        what: The file's name in messages.
        min_agreement: Minimum top-1 agreement.

    Raises:
        ExportError: the difference is above the allowed one, or the agreement is below `min_agreement`.
    """
    if parity.max_abs > parity.allowed:
        raise ExportError(
            f"{what} differs from the network by {parity.max_abs:.3g} (mean {parity.mean_abs:.3g}) on "
            f"{parity.samples} inputs; at most {parity.allowed:.3g} is allowed for outputs of up to "
            f"{parity.scale:.3g}.",
            "So small a difference may be rounding in a deep network: a larger tolerance accepts it."
            if parity.max_abs < 20 * parity.allowed
            else "A network whose control flow depends on the values of its input cannot be exported.",
        )
    if parity.top1_agreement < min_agreement:
        raise ExportError(
            f"{what} ranks the same class first for {parity.top1_agreement:.2%} of {parity.samples} inputs; "
            f"at least {min_agreement:.2%} was expected.",
            "Keep the most sensitive layers in a higher precision, or calibrate on more inputs.",
        )
    return parity


def gross_difference(
    reference: Sequence[npt.NDArray[Any]], candidate: Sequence[npt.NDArray[Any]], count: int
) -> str | None:
    """Describe a difference of outputs for `count` inputs beyond rounding as a clause; None if there is none."""
    import numpy as np

    if len(reference) != len(candidate):
        return f"it has {len(candidate)} outputs, not {len(reference)}"
    for right, found in zip(reference, candidate):
        if right.shape != found.shape:
            return f"its output for {count} inputs has the shape {list(found.shape)}, not {list(right.shape)}"
        off = np.abs(right.astype(np.float64) - found.astype(np.float64)).max(initial=0.0)
        largest = np.abs(right.astype(np.float64)).max(initial=0.0)
        if not off <= LARGEST_SHARE * largest + 1e-6:
            return f"its output for {count} inputs is off by {off:.2g} where the largest is {largest:.2g}"
    return None


def portions(count: int, fixed: int | None) -> list[tuple[int, int]]:
    """Split `count` inputs into runs: the first input and the number of inputs of each run.

    Args:
        count: Number of all inputs.
        fixed: Batch size of a run; None for a dynamic batch: 1, then 3, then up to 64, so that a graph that is right
            for only one batch size is detected.

    >>> portions(5, 2), portions(70, None)
    ([(0, 2), (2, 2), (4, 2)], [(0, 1), (1, 3), (4, 64), (68, 2)])
    """
    if fixed is not None:
        return [(start, fixed) for start in range(0, count, fixed)]
    starts = [0, 1, *range(4, count, 64)]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], count]) if start < count]


def onnx_outputs(
    path: str | Path | bytes, inputs: npt.NDArray[Any], *, threads: int = 1
) -> list[npt.NDArray[np.float32]]:
    """Compute the outputs of an ONNX file for `inputs` (N, C, H, W) with ONNX Runtime: one array for each output.

    A file with a fixed batch runs in batches of that size, the last one padded with its last input; a file with a
    dynamic batch runs as `portions` splits the inputs.

    Raises:
        ExportError: ONNX Runtime cannot load the file, or the inputs have the wrong shape.
    """
    import numpy as np

    session = open_session(path, threads=threads)
    wanted = session.get_inputs()
    if len(wanted) != 1:
        raise ExportError(f"{describe(path)} has {len(wanted)} inputs, expected one.")
    if len(inputs) == 0:
        raise ExportError("Outputs need at least one input, got none.")
    declared = wanted[0].shape[0]
    parts: list[list[npt.NDArray[Any]]] = []
    for start, size in portions(len(inputs), declared if isinstance(declared, int) else None):
        chunk = np.ascontiguousarray(inputs[start : start + size], dtype=np.float32)
        missing = size - len(chunk)
        if missing:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        outputs = run_session(session, {wanted[0].name: chunk})
        parts.append([value[: size - missing] for value in outputs])
    return [np.concatenate([part[index] for part in parts]) for index in range(len(parts[0]))]


def worst(found: Sequence[Parity]) -> Parity:
    """The parity with the largest difference relative to the allowed one."""
    return max(found, key=lambda parity: (parity.max_abs / parity.allowed, -parity.top1_agreement))
