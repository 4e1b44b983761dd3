"""The conditions under which a network is timed: inputs of a run, which of the runs counts, networks at once."""

from __future__ import annotations

from dataclasses import dataclass

MEDIAN = 50.0


@dataclass(frozen=True)
class Conditions:
    """The conditions of a latency.

    Attributes:
        batch: Inputs of one run; the latency is that of the whole batch.
        percentile: Percentile of the single runs that is the latency; 50 for the median.
        streams: Copies of the network that run at the same time; the latency is that of one run under this load.
    """

    batch: int = 1
    percentile: float = MEDIAN
    streams: int = 1

    @property
    def at_median(self) -> bool:
        """Whether the latency is the median."""
        return self.percentile == MEDIAN

    @property
    def title(self) -> str:
        """What the latency is of.

        >>> Conditions().title, Conditions(8, 99, 2).title
        ('latency', 'latency of a batch of 8 (p99 of single runs, 2 networks at once)')
        """
        of = f" of a batch of {self.batch}" if self.batch > 1 else ""
        how = [] if self.at_median else [f"p{self.percentile:g} of single runs"]
        how += [f"{self.streams} networks at once"] if self.streams > 1 else []
        return f"latency{of}" + (f" ({', '.join(how)})" if how else "")


UNLOADED = Conditions()
"""The usual conditions: the median time of one input, with nothing beside it."""
