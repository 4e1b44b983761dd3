"""Figures as inline SVG that use the colors and the font of the page.

Matplotlib writes fixed colors. Each role of the page's palette is drawn in a color of its own that is used for nothing
else, and is replaced by the CSS variable of the same name, so that one figure serves light and dark mode. Texts stay
texts: they can be searched, and use the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = ("ink", "muted", "grid", "band", "dense", "slim", "accent", "bad", "c1", "c2", "c3", "c4", "c5")
COLOURS = {role: f"#01{index:02x}fe" for index, role in enumerate(ROLES, start=16)}

WIDTH, HEIGHT = (
    4.8,
    3.0,
)  # inches: at this font size a figure is readable on a phone, and two fit side by side on a desktop
FONT = 9.5

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a dollar sign in a layer's name stays a dollar sign
    "font.family": [
        "DejaVu Sans"
    ],  # shipped with matplotlib: its widths determine the layout wherever the figure is drawn
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT - 1,
    "ytick.labelsize": FONT - 1,
    "legend.fontsize": FONT - 1,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
}


@dataclass(frozen=True)
class Chart:
    """A finished figure. `alt` describes it for readers who cannot see it; `caption` says what to look for."""

    svg: str
    title: str
    alt: str
    caption: str


@contextmanager
def drawing(height: float = HEIGHT) -> Iterator[tuple[Figure, Axes]]:
    """Open a figure with one pair of axes in the report's style, whatever the user's matplotlib settings are.

    Args:
        height: In inches; the width is that of every figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # a name in a script that the layout font lacks: the browser has fonts of its own and shows it
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def to_svg(figure: Figure, prefix: str) -> str:
    """The figure as one `<svg>` element, its identifiers made its own by `prefix`.

    Call it within `drawing`: the style also decides how the file is written.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return inline(buffer.getvalue(), prefix)


def inline(document: str, prefix: str) -> str:
    """Turn a matplotlib SVG document into an element for a page that holds several of them."""
    element = document[document.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # matplotlib's style rule is for "*", which inlined is the whole page; the page's style sheet has its own
    element = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", element, count=1, flags=re.DOTALL)
    element = re.sub(r' id="[^"]*_\d+"', "", element)  # figure_1, axes_1, ...: nothing refers to them
    element = re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}-", element)
    head, rest = element.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    element = f'{head} aria-hidden="true" focusable="false">{rest}'
    for role, colour in COLOURS.items():
        element = element.replace(colour, f"var(--{role})")
    return re.sub(r"\n\s*", "\n", element)
