"""An operator's time as a function of its channels, fitted to the measured grid.

Runtimes compute channels in blocks: ONNX Runtime pads them to 8 or 16, tensor cores to 8 or 32. The time is
therefore a staircase, and a value between two grid points depends on the position of the next step. Each
operator's time is modelled as a sum, with non-negative coefficients, of terms that follow the kernels:

    blocks of input, of output, their product          the vectorised kernel with its padding
    channels, their product                            the part that is not padded (memory traffic, other kernels)
    fewer inputs than a block                          the kernel that reads the unblocked layout
    channels that do not fit the layout                the fall-back kernel and the change of layout around it
    channels that do not fill their last block         additions and pooling that then run outside the blocked layout

Non-negative coefficients keep the fit sane between and beyond noisy points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ALIGNMENT = 4
"""Channel counts that are not a multiple of this have no blocked layout in ONNX Runtime."""

KINDS = (
    "launch", "blocks", "blocks", "padded work", "channels", "channels", "work", "work", "work",
    "launch", "launch", "launch", "misfit", "misfit", "misfit", "misfit", "misfit",
    "ragged", "ragged", "ragged", "ragged", "ragged",
)  # fmt: skip
"""Kind of each term, in order: terms of one kind share systematic errors."""

_RIDGE = 1e-3
"""Ridge term, as a share of a term's norm: decides between nearly equal terms."""


@dataclass(frozen=True)
class Surface:
    """One operator's milliseconds over (input channels, output channels).

    Attributes:
        coefficients: (TERMS,), in milliseconds; none is negative.
        floor: Smallest time that is returned, in milliseconds.
        inputs, outputs: Smallest and largest measured channel count.
    """

    coefficients: Floats
    floor: float
    inputs: tuple[int, int]
    outputs: tuple[int, int]

    def covers(self, c_in: tuple[int, int], c_out: tuple[int, int]) -> bool:
        """Whether these (smallest, largest) ranges of channel counts lie inside the measured ranges."""
        return all(
            measured[0] <= requested[0] and requested[1] <= measured[1]
            for measured, requested in ((self.inputs, c_in), (self.outputs, c_out))
        )


class Surfaces:
    """The surfaces of a network's operators, evaluated together.

    Args:
        surfaces: One for each operator.
        block: Channels of a vector block.
        factors: Factor for the terms of each kind, in order of first occurrence in `KINDS`; empty for none.
    """

    def __init__(self, surfaces: Sequence[Surface], block: int, factors: Sequence[float] = ()) -> None:
        self._coefficients = np.stack([surface.coefficients for surface in surfaces])
        if factors:
            by_kind = dict(zip(dict.fromkeys(KINDS), factors, strict=True))
            self._coefficients = self._coefficients * np.asarray([by_kind[kind] for kind in KINDS])
        self._floor = np.asarray([surface.floor for surface in surfaces])
        self._block = block

    def __call__(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> Floats:
        """Milliseconds from the channel counts of each operator of each candidate, all (N, operators)."""
        total = np.zeros(np.shape(c_in))
        for place, term in enumerate(_terms(c_in, c_out, self._block)):
            total += term * self._coefficients[:, place]
        return np.asarray(np.maximum(total, self._floor))

    def by_kind(self, c_in: npt.ArrayLike, c_out: npt.ArrayLike) -> Floats:
        """Return the summed milliseconds of all operators by kind of term, (N, kinds), from (N, operators)."""
        parts = {kind: np.zeros(len(np.asarray(c_in))) for kind in KINDS}
        for place, term in enumerate(_terms(c_in, c_out, self._block)):
            parts[KINDS[place]] += (term * self._coefficients[:, place]).sum(axis=1)
        return np.stack(list(parts.values()), axis=1)


def fit_surface(c_in: Sequence[int], c_out: Sequence[int], ms: Sequence[float], block: int) -> Surface:
    """Fit the surface of one operator.

    Args:
        c_in, c_out: Channel counts of the measured points.
        ms: Their times in milliseconds, all above zero. Errors are relative to the time, so that narrow
            candidates are predicted as well as wide ones.
        block: Channels of a vector block.
    """
    from scipy.optimize import nnls

    inputs, outputs, times = np.asarray(c_in), np.asarray(c_out), np.asarray(ms, dtype=np.float64)
    terms = np.stack(_terms(inputs, outputs, block), axis=-1)
    weight = 1.0 / np.maximum(times, 0.1 * float(np.median(times)))
    weighted = terms * weight[:, None]
    ridge = _RIDGE * np.diag(np.linalg.norm(weighted, axis=0))
    target = np.concatenate([times * weight, np.zeros(terms.shape[1])])
    coefficients, _ = nnls(np.concatenate([weighted, ridge]), target)
    return Surface(
        coefficients=np.asarray(coefficients, dtype=np.float64),
        floor=0.5 * float(times.min()),
        inputs=(int(inputs.min()), int(inputs.max())),
        outputs=(int(outputs.min()), int(outputs.max())),
    )


def _terms(c_in: npt.ArrayLike, c_out: npt.ArrayLike, block: int) -> list[Floats]:
    """The terms at each pair of channel counts."""
    a, b = np.asarray(c_in, dtype=np.float64), np.asarray(c_out, dtype=np.float64)
    one = np.ones_like(a)
    blocks_a, blocks_b = np.ceil(a / block), np.ceil(b / block)
    narrow, wide = one * (a < block), one * (a >= block)
    misfit_a, misfit_b = one * (np.mod(a, ALIGNMENT) != 0), one * (np.mod(b, ALIGNMENT) != 0)
    ragged_a, ragged_b = one * (np.mod(a, block) != 0), one * (np.mod(b, block) != 0)
    a, b = a / block, b / block
    return [
        one, blocks_a, blocks_b, blocks_a * blocks_b,
        a, b, a * b, blocks_a * b, a * blocks_b,
        narrow, narrow * blocks_b, wide,
        misfit_a, misfit_a * b, misfit_a * a * b, misfit_b, misfit_b * b,
        ragged_a, ragged_a * a, ragged_b, ragged_b * b, ragged_b * blocks_a * blocks_b,
    ]  # fmt: skip
