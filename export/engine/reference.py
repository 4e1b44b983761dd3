"""Reference outputs that travel with a network, and the check of any runtime's outputs against them.

A reference is one `.npz` file, as `numpy.savez` writes it: `inputs` (N, C, H, W) and the FP32 network's `outputs`
(N, ...). It is read without pickle.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.convert.parity import AGREEMENTS, TOLERANCES, Parity, compare_outputs, require
from export.errors import ExportError
from export.files import read_bytes

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Reference:
    """Inputs (N, C, H, W) and what the FP32 network says to them (N, ...)."""

    inputs: npt.NDArray[Any]
    outputs: npt.NDArray[Any]


def read_reference(path: str | Path) -> Reference:
    """The reference in a file.

    Raises:
        ExportError: the file is missing, damaged, or no reference.
    """
    import numpy as np

    content = read_bytes(Path(path), "reference file")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            reference = Reference(inputs=arrays["inputs"], outputs=arrays["outputs"])
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ExportError(f"{path} is no reference: {error}.", "Copy it again as a whole.") from error
    if len(reference.inputs) != len(reference.outputs) or reference.inputs.ndim < 2:
        raise ExportError(f"{path} is no reference: its inputs and outputs do not belong together.")
    return reference


def verify(
    run: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    reference: Reference,
    what: str,
    *,
    precision: str,
    tolerance: float | None = None,
    min_agreement: float | None = None,
) -> Parity:
    """Run a network on the reference's inputs and compare what it says.

    Args:
        run: Inputs (N, C, H, W) -> outputs (N, ...).
        reference: What is right.
        what: How a message names the network.
        precision: "fp32", "fp16" or "int8": says how close is close enough.
        tolerance, min_agreement: Other limits than those of the precision.

    Raises:
        ExportError: the outputs differ by more than is allowed.
    """
    parity = compare_outputs(
        reference.outputs,
        run(reference.inputs),
        tolerance=TOLERANCES[precision] if tolerance is None else tolerance,
    )
    # on a handful of inputs a single one would be more than the share that may differ
    least = AGREEMENTS[precision] if min_agreement is None else min_agreement
    return require(parity, what, min_agreement=min(least, 1 - 1 / len(reference.inputs)))
