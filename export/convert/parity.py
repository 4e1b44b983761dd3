"""Parity of an exported file with its network: differences and top-1 agreement of outputs on real inputs.

    parity = compare_outputs(reference, outputs)
    parity.max_abs, parity.mean_abs, parity.top1_agreement

The comparison needs only numpy, so that a device uses the same one.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.files import read_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 1.0, "mixed": 1.0}
"""Maximum difference for each precision, for outputs of up to 1; scaled with larger outputs."""

DEVICE_TOLERANCES = {**TOLERANCES, "fp32": 1e-2}
"""The same on a GPU, where FP32 layers use TF32 with a mantissa of 10 bits by default."""

AGREEMENTS = {"fp32": 0.999, "fp16": 0.99, "int8": 0.90, "mixed": 0.90}
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
    right = reference.astype(np.float64).reshape(len(reference), *(reference.shape[1:2] or (1,)), -1)
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


def worst(found: Sequence[Parity]) -> Parity:
    """The parity with the largest difference relative to the allowed one."""
    return max(found, key=lambda parity: (parity.max_abs / parity.allowed, -parity.top1_agreement))


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


@dataclass(frozen=True)
class Reference:
    """Inputs (N, C, H, W) and the FP32 network's outputs for them (N, ...)."""

    inputs: npt.NDArray[Any]
    outputs: npt.NDArray[Any]


def read_reference(path: str | Path) -> Reference:
    """Read a reference: an `.npz` file with `inputs` (N, C, H, W) and the FP32 network's `outputs` (N, ...).

    Raises:
        ExportError: the file is missing, damaged, or not a reference.
    """
    import numpy as np

    content = read_bytes(Path(path), "reference file")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            reference = Reference(inputs=arrays["inputs"], outputs=arrays["outputs"])
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ExportError(f"{path} is not a reference: {error}.", "Copy it again.") from error
    if len(reference.inputs) != len(reference.outputs) or reference.inputs.ndim < 2:
        raise ExportError(f"{path} is not a reference: its inputs and outputs differ in number.")
    return reference


def verify(
    outputs: npt.NDArray[Any],
    reference: Reference,
    what: str,
    *,
    precision: str,
    tolerance: float | None = None,
    min_agreement: float | None = None,
) -> Parity:
    """Compare outputs with those of a reference.

    Args:
        outputs: A network's outputs (N, ...) for the inputs of the reference.
        reference: The expected outputs.
        what: The network's name in messages.
        precision: "fp32", "fp16" or "int8"; it determines the limits.
        tolerance, min_agreement: Other limits than those of the precision.

    Raises:
        ExportError: the outputs differ by more than is allowed.
    """
    parity = compare_outputs(
        reference.outputs,
        outputs,
        tolerance=TOLERANCES[precision] if tolerance is None else tolerance,
    )
    # with few inputs, a single one would exceed the share that may differ
    least = AGREEMENTS[precision] if min_agreement is None else min_agreement
    return require(parity, what, min_agreement=min(least, 1 - 1 / len(reference.inputs)))
