"""Legal widths of groups, with validation and rounding of given widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compressor.core.errors import CompressorError
from compressor.pruning.construct import Ints, some
from compressor.pruning.groups import Group


def legal_widths(group: Group) -> Ints:
    """Return the legal widths of a group, ascending; the last is dense."""
    legal = (
        set(range(group.min_width, group.width + 1, group.granularity))
        if group.min_width % group.granularity == 0
        else set()
    )
    return np.array(sorted(legal | {group.width}), dtype=np.int64)


def checked_widths(
    groups: Sequence[Group], choices: Sequence[Ints], given: Mapping[str, int] | Sequence[int] | Ints
) -> Ints:
    """Return validated widths (G,) from a mapping (omitted groups stay dense) or a sequence.

    Args:
        groups: Groups of the space.
        choices: Legal widths of each group.
        given: Requested widths.

    Raises:
        CompressorError: A group is unknown, the number of widths is wrong, or a width is not legal.
    """
    if isinstance(given, Mapping):
        values: list[Any] = [given.get(group.name, group.width) for group in groups]
        if sum(group.name in given for group in groups) < len(given):
            names = [group.name for group in groups]
            unknown = next(name for name in given if name not in names)
            raise CompressorError(f"There is no group '{unknown}'.", f"Groups: {some(names, str(unknown))}.")
    else:
        values = list(given)
        if len(values) != len(groups):
            raise CompressorError(
                f"{len(values)} widths for {len(groups)} groups.", "Pass one for each group, in their order."
            )
    for group, legal, value in zip(groups, choices, values, strict=True):
        _check(group, legal, value)
    return np.array(values, dtype=np.int64)


def _check(group: Group, legal: Ints, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise CompressorError(
            f"The width of group '{group.name}' must be a whole number, not {value!r}.", "Use round()."
        )
    if value in legal:
        return
    legal_text = f"multiples of {group.granularity} from {group.min_width} on, or {group.width}"
    if value > group.width:
        what = f"is above the dense width {group.width}"
    elif value < group.min_width:
        what = f"is below the smallest width {group.min_width}"
    else:
        what = f"is not a multiple of the granularity {group.granularity}"
    raise CompressorError(f"Width {value} of group '{group.name}' {what}.", f"Legal widths: {legal_text}.")


def nearest_widths(choices: Sequence[Ints], wanted: Any) -> Ints:
    """Return the legal widths nearest to the real numbers `wanted`, (G,).

    Raises:
        CompressorError: Their number is wrong, or one is not finite.
    """
    real = np.asarray(wanted, dtype=np.float64)
    if real.shape != (len(choices),) or not np.isfinite(real).all():
        raise CompressorError(
            f"Widths to round must be {len(choices)} finite numbers, not shape {real.shape}.",
            "Pass one per group.",
        )
    nearest = [legal[int(np.abs(legal - value).argmin())] for legal, value in zip(choices, real, strict=True)]
    return np.array(nearest, dtype=np.int64)
